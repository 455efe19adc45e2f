import threading
import time

import pytest

from rg.app.__main__ import check_remote
from rg.app.jobs import Jobs, Stopped
from rg.app.runs import Run
from rg.cli import compose_config


def test_the_newest_report_and_the_result_come_in_order():
    jobs = Jobs(seconds=10, waiting=1)
    reported = threading.Event()

    def job(report):
        report("one")
        assert reported.wait(5)
        return "two"

    seen = []
    for value in jobs.run("a", job):
        seen.append(value)
        reported.set()
    assert seen == ["one", "two"]


def test_one_job_runs_at_a_time():
    jobs, running, most = Jobs(seconds=10, waiting=4), [], []

    def job(report):
        running.append(1)
        most.append(len(running))
        time.sleep(0.02)
        running.pop()

    threads = [threading.Thread(target=lambda name=name: list(jobs.run(name, job))) for name in "abc"]
    [thread.start() for thread in threads]
    [thread.join() for thread in threads]
    assert most == [1, 1, 1]


@pytest.mark.parametrize("waits", [False, True])
def test_a_job_is_stopped_at_its_next_report_and_no_other_one(waits):
    jobs, step, other = Jobs(seconds=10, waiting=2), threading.Event(), threading.Event()

    def job(report):
        step.set()
        for _ in range(500):
            time.sleep(0.01)
            report(None)

    if waits:  # it is stopped before it begins
        blocker = threading.Thread(target=lambda: list(jobs.run("other", lambda report: other.wait(5))))
        blocker.start()
    else:
        other.set()
    result = []

    def run():
        try:
            list(jobs.run("mine", job))
        except Stopped as error:
            result.append(str(error))

    thread = threading.Thread(target=run)
    thread.start()
    assert waits or step.wait(5)
    jobs.stop("nobody")
    while "mine" not in jobs._stops:
        time.sleep(0.01)
    jobs.stop("mine")
    other.set()
    thread.join(5)
    assert len(result) == 1 and result[0].startswith("stopped") and step.is_set() != waits


def test_a_job_ends_at_the_time_limit():
    def job(report):
        while True:
            time.sleep(0.01)
            report(None)

    with pytest.raises(Stopped, match=r"time limit of 0\.05 s"):
        list(Jobs(seconds=0.05, waiting=1).run("a", job))


def test_a_second_job_of_a_session_and_a_full_queue_are_refused_and_the_place_is_free_afterwards():
    jobs, ready = Jobs(seconds=10, waiting=0), threading.Event()
    thread = threading.Thread(target=lambda: list(jobs.run("a", lambda report: ready.wait(5))))
    thread.start()
    while "a" not in jobs._stops:
        time.sleep(0.01)
    with pytest.raises(ValueError, match="another of yours"):
        list(jobs.run("a", lambda report: None))
    with pytest.raises(ValueError, match="at most 0 waiting"):
        list(jobs.run("b", lambda report: None))
    ready.set()
    thread.join()
    with pytest.raises(ZeroDivisionError):
        list(jobs.run("b", lambda report: 1 / 0))
    assert list(jobs.run("b", lambda report: 3)) == [3]


def test_a_run_shows_the_line_that_its_configuration_comes_from(tmp_path):
    run = Run(tmp_path, "rg.sample")
    cfg = run.compose(["+experiment=pose_control", "prompt=it's a person, {red}", "seed=3"])
    assert cfg.prompt == "it's a person, {red}" and cfg.seed == 3
    line = """python -m rg.sample +experiment=pose_control 'prompt=it'"'"'s a person, {red}' seed=3"""
    assert run.command == line and (run.folder / "command.txt").read_text() == line + "\n"
    with pytest.raises(ValueError, match="seed: expected"):
        run.compose(["+experiment=pose_control", "seed=-1"])
    run.discard()
    assert not run.folder.exists()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["host=0.0.0.0"], "host: expected 127.0.0.1 without allow_remote=true"),
        (["host=0.0.0.0", "allow_remote=true"], "password: expected one"),
        (["allow_remote=true"], "password: expected one"),
    ],
)
def test_nobody_else_gets_in_unasked(words, message):
    with pytest.raises(ValueError, match=message):
        check_remote(compose_config("app", words))
    check_remote(compose_config("app", []))
    check_remote(compose_config("app", ["host=0.0.0.0", "allow_remote=true", "password=secret"]))
