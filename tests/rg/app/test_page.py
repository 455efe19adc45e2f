"""A user's way through the page, by a real browser."""

import json
import os
import shlex
import subprocess
import sys
import urllib.error
import urllib.request

import numpy as np
import pytest
from PIL import Image

pytestmark = pytest.mark.browser
FIELD = "#pose-json textarea"


def pose(page):
    return json.loads(page.input_value(FIELD))["keypoints"]


def number(page, label):
    return page.get_by_label(label, exact=True).first


def make(page, steps=6):
    number(page, "Steps").fill(str(steps))
    number(page, "Steps").blur()
    page.click("#pose-make")


def drag_joint(page, joint, dx, dy):
    dot = page.locator(f"circle[data-person='0'][data-joint='{joint}']").bounding_box()
    x, y = dot["x"] + dot["width"] / 2, dot["y"] + dot["height"] / 2
    page.mouse.move(x, y)
    page.mouse.down()
    page.mouse.move(x + dx / 2, y + dy / 2)
    page.mouse.move(x + dx, y + dy)
    page.mouse.up()


def test_a_joint_is_dragged_and_a_picture_made_which_its_command_makes_again(visit, page_server, root):
    page = visit()
    before = pose(page)
    pixels = page.locator(".pose svg").bounding_box()["width"] / 64
    drag_joint(page, 4, 10 * pixels, -5 * pixels)
    after = pose(page)
    moved = np.subtract(after[0][4], before[0][4])
    np.testing.assert_allclose(moved, [10, -5, 0], atol=0.3)
    assert [a for k, a in enumerate(after[0]) if k != 4] == [b for k, b in enumerate(before[0]) if k != 4]
    make(page)
    page.wait_for_selector("#pose-result table.scores")
    names = page.eval_on_selector_all("#pose-result img[data-name]", "all => all.map(one => one.dataset.name)")
    assert names == ["unguided", "guided", "control", "readout"]
    assert page.locator(".pose svg image").get_attribute("href").startswith("data:image/png")
    line = shlex.split(page.inner_text("pre.command"))
    folder = page_server.folder / page.inner_text("#pose-result .state").removeprefix("kept in ")
    assert json.loads((folder / "pose.json").read_text())["keypoints"] == after
    environment = os.environ | {"PYTHONPATH": str(root)}
    assert line[0] == "python"
    subprocess.run([sys.executable, *line[1:], "name=again"], cwd=page_server.folder, env=environment, check=True)
    one, again = (
        np.asarray(Image.open(place / "00000.png")).astype(int)
        for place in (folder, page_server.folder / "outputs/again/latest")
    )
    assert one.std() > 10 and abs(one - again).max() <= 1


def test_the_editor_hides_mirrors_adds_removes_and_undoes(visit):
    page = visit()
    start = pose(page)
    page.locator("circle[data-joint='7']").click()
    page.click("button[data-do=hide]")
    assert pose(page)[0][7][2] == 0
    page.click("button[data-do=undo]")
    assert pose(page) == start
    page.click("button[data-do=mirror]")
    right, left = pose(page)[0][2], start[0][5]
    np.testing.assert_allclose(right[:2], [63 - left[0], left[1]], atol=0.11)
    page.click("button[data-do=add]")
    assert len(pose(page)) == 2
    page.click("button[data-do=remove]")
    assert len(pose(page)) == 1
    page.select_option(".pose select", label="two people")
    assert len(pose(page)) == 2
    file = {
        "name": "own.json",
        "mimeType": "application/json",
        "buffer": json.dumps({"size": [64, 64], "keypoints": start}).encode(),
    }
    page.set_input_files(".pose input[type=file]", file)
    page.wait_for_function("JSON.parse(document.querySelector('#pose-json textarea').value).keypoints.length == 1")
    assert page.locator(".pose circle").count() == 18


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("{", "control: expected JSON"),
        ('{"size": [64, 64], "keypoints": []}', "expected at least 1 person, found none"),
        ('{"size": [64, 64], "keypoints": [[[1, 2, 1]]]}', "at least 18 of them"),
    ],
)
def test_a_damaged_pose_is_refused_beside_the_field(visit, page_server, text, words):
    page = visit()
    page.fill(FIELD, text)
    make(page)
    error = page.wait_for_selector(".error-control p.wrong").inner_text()
    assert words in error and "Traceback" not in page.content()
    assert page.locator("p.wrong").count() == 1
    assert page.locator("#pose-result pre.command").count() == 0


def test_a_setting_out_of_range_is_refused_beside_its_field(visit):
    page = visit()
    make(page, steps=100_000)
    assert "expected 1 to 200" in page.wait_for_selector(".error-sampling-num_inference_steps p.wrong").inner_text()
    number(page, "Seed").fill("-1")
    make(page, steps=2)
    assert "seed: expected" in page.wait_for_selector(".error-seed p.wrong").inner_text()


def test_stop_stops_and_another_picture_can_be_made(visit, page_server):
    page = visit()
    folders = len(list((page_server.folder / "outputs/app").glob("2*")))
    make(page, steps=200)
    page.wait_for_selector("#pose-result img[data-name]")
    page.click("#pose-stop")
    page.wait_for_selector(".error-tab p.wrong", timeout=5_000)
    assert "stopped" in page.inner_text(".error-tab")
    assert len(list((page_server.folder / "outputs/app").glob("2*"))) == folders, "what was stopped leaves nothing"
    make(page, steps=2)
    page.wait_for_selector("#pose-result pre.command")


def test_two_users_share_nothing(visit):
    one, two = visit(), visit()
    drag_joint(one, 4, 40, 0)
    assert pose(one) != pose(two)
    make(one, steps=20)
    one.wait_for_selector("#pose-result img[data-name]")
    two.click("#pose-stop")
    assert two.locator("#pose-result img[data-name]").count() == 0
    one.wait_for_selector("#pose-result pre.command")
    assert two.locator("#pose-result img[data-name]").count() == 0


@pytest.mark.parametrize("width", [390, 820, 1440])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_the_page_fits_every_width(visit, width, scheme):
    page = visit(width=width, color_scheme=scheme)
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    picture = page.locator(".pose svg").bounding_box()
    assert picture["width"] >= 250 and abs(picture["width"] - picture["height"]) < 2


def test_touch_moves_a_joint(visit):
    page = visit(width=390, has_touch=True)
    before = pose(page)
    dot = page.locator("circle[data-joint='4']").bounding_box()
    x, y = dot["x"] + dot["width"] / 2, dot["y"] + dot["height"] / 2
    client = page.context.new_cdp_session(page)
    for kind, place in (
        ("touchStart", (x, y)),
        ("touchMove", (x + 30, y)),
        ("touchMove", (x + 60, y)),
        ("touchEnd", None),
    ):
        points = [] if place is None else [{"x": place[0], "y": place[1]}]
        client.send("Input.dispatchTouchEvent", {"type": kind, "touchPoints": points})
    page.wait_for_timeout(200)
    assert pose(page)[0][4][0] > before[0][4][0] + 5


@pytest.mark.parametrize("path", ["pyproject.toml", "outputs/app/../../page.log", "page.log"])
def test_no_file_is_served(page_server, path):
    for name in (f"{page_server.folder}/{path}", path):
        request = urllib.request.Request(f"{page_server.url}gradio_api/file={name}")
        with pytest.raises(urllib.error.HTTPError) as refused:
            urllib.request.urlopen(request)
        assert refused.value.code in (403, 404)
