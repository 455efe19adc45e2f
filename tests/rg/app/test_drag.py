"""Pictures that are uploaded and dragged, by a real browser."""

import json

import numpy as np
import pytest
from PIL import Image

pytestmark = pytest.mark.browser


@pytest.fixture
def drag(visit):
    page = visit()
    page.get_by_role("tab", name="Drag").click()
    page.wait_for_selector(".arrows svg")
    steps = page.get_by_label("Steps", exact=True).last
    steps.fill("4")
    steps.blur()
    return page


def shown(page):
    page.wait_for_selector("#drag-picture img[data-name=before]", state="attached")
    page.wait_for_timeout(200)  # the editor sees it
    return page.evaluate("document.querySelector('#drag-picture img').src")


def draw(page, *points):
    box = page.locator(".arrows svg").bounding_box()
    for x, y in points:
        page.mouse.click(box["x"] + (x + 0.5) * box["width"] / 64, box["y"] + (y + 0.5) * box["height"] / 64)


def test_a_picture_is_made_and_a_point_dragged(drag):
    drag.click("#drag-draw")
    shown(drag)
    draw(drag, (30, 25), (40, 25), (10, 10), (12, 14))
    rows = json.loads(drag.input_value("#drag-rows textarea"))
    np.testing.assert_allclose(rows, [[30, 25, 40, 25], [10, 10, 12, 14]], atol=0.3)
    drag.click(".arrows button[data-do=undo]")
    assert len(json.loads(drag.input_value("#drag-rows textarea"))) == 1
    drag.click("#drag-make")
    drag.wait_for_selector("#drag-result pre.command")
    assert "rg.edit +experiment=drag reference=outputs/app/" in drag.inner_text("#drag-result pre.command")
    after = drag.evaluate("document.querySelector('.compare .after').src")
    assert after != drag.evaluate("document.querySelector('.compare img').src")


def test_a_photograph_that_was_turned_is_upright_and_a_damaged_file_is_refused(drag, tmp_path):
    image = Image.new("RGB", (200, 100), "red")
    image.paste("blue", (0, 0, 100, 100))  # left, which is on top once it is upright
    exif = Image.Exif()
    exif[0x0112] = 6
    image.save(tmp_path / "turned.jpg", exif=exif)
    drag.set_input_files("#drag-file input[type=file]", tmp_path / "turned.jpg")
    shown(drag)
    script = """async () => { const image = document.querySelector('#drag-picture img'); await image.decode();
        const canvas = document.createElement('canvas'); canvas.width = canvas.height = 64;
        const context = canvas.getContext('2d'); context.drawImage(image, 0, 0);
        return [[32, 5], [32, 58]].map(([x, y]) => [...context.getImageData(x, y, 1, 1).data]); }"""
    above, below = drag.evaluate(script)
    assert above[2] > 200 > 50 > above[0] and below[0] > 200 > 50 > below[2]
    (tmp_path / "damaged.png").write_bytes(b"\x89PNG\r\n\x1a\n and no more")
    drag.reload()
    drag.get_by_role("tab", name="Drag").click()
    drag.set_input_files("#drag-file input[type=file]", tmp_path / "damaged.png")
    error = drag.wait_for_selector(".error-reference p.wrong").inner_text()
    assert "expected an image (PNG, JPEG" in error and str(tmp_path) not in error and "outputs" not in error


def test_a_drag_without_a_picture_or_an_arrow_is_refused_beside_the_field(drag):
    drag.click("#drag-make")
    assert "expected a picture, got none" in drag.wait_for_selector(".error-reference p.wrong").inner_text()
    drag.click("#drag-draw")
    shown(drag)
    drag.click("#drag-make")
    assert "drag: expected 1 to 32 arrows" in drag.wait_for_selector(".error-drag p.wrong").inner_text()
