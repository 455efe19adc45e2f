"""The page as users have it: a server in a process of its own, and a real browser."""

import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[3]
FLAGS = [
    *("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync"),
    *("--disable-background-networking", "--disable-component-update"),
]


class Page:
    """A running page: its address, the folder that it was started in, its process id."""

    def __init__(self, folder: Path, *words: str) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        self.folder, self.url = folder, f"http://127.0.0.1:{port}/"
        environment = os.environ | {"PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
        self.log = folder / "page.log"
        with self.log.open("w") as log:
            line = [sys.executable, "-m", "rg.app", f"port={port}", *words]
            self.process = subprocess.Popen(line, cwd=folder, env=environment, stdout=log, stderr=log)
        end = time.monotonic() + 180
        while self.url not in self.log.read_text():
            assert self.process.poll() is None and time.monotonic() < end, self.log.read_text()[-2000:]
            time.sleep(0.2)

    def close(self) -> None:
        self.process.send_signal(signal.SIGTERM)
        self.process.wait(30)


@pytest.fixture(scope="session")
def page_server(tmp_path_factory):
    page = Page(tmp_path_factory.mktemp("page"))
    yield page
    page.close()


@pytest.fixture(scope="session")
def chromium():
    from playwright.sync_api import sync_playwright

    path = os.environ.get("CHROMIUM") or shutil.which("chromium") or shutil.which("chromium-browser")
    assert path, "expected the browser chromium, found none: make test-app installs it"
    with sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=path, args=FLAGS)
        yield browser
        browser.close()


@pytest.fixture
def visit(chromium, page_server):
    """Opens the page as another user each time: `visit(width=390)`; no request may leave this machine."""
    contexts, outside, errors = [], [], []

    def go(url=page_server.url, width=1280, **options):
        context = chromium.new_context(viewport={"width": width, "height": 900}, **options)
        context.set_default_timeout(120_000)
        contexts.append(context)
        page = context.new_page()
        page.on("request", lambda sent: None if local(sent.url) else outside.append(sent.url))
        page.on("pageerror", lambda error: errors.append(str(error)))
        page.goto(url)
        page.wait_for_selector(".pose circle")
        page.wait_for_function("document.querySelector('#pose-json textarea').value.length > 100")
        return page

    yield go
    for context in contexts:
        context.close()
    assert not outside and not errors


def local(url: str) -> bool:
    return url.startswith(("http://127.0.0.1:", "data:", "blob:"))
