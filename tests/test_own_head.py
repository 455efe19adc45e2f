"""docs/own_head.md, followed to the letter in an empty folder."""

import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from rg.backbone.diffusion import DiffusionBackbone
from rg.detectors.keypoints import KeypointDetector
from rg.generation import generate
from rg.heads import import_head, load_head

pytestmark = pytest.mark.slow

# A block of code; of a file its name stands above it, commands have none.
BLOCK = re.compile(r"^(?:`([\w./]+)`:\n\n)?```(\w+)\n(.*?)^```$", re.DOTALL | re.MULTILINE)
PROMPT = "a person in a red shirt and blue trousers on grass at day"


class Reader:
    """Does what the page says. `said` is what its commands printed."""

    def __init__(self, folder: Path, root: Path) -> None:
        self.folder = folder
        self.environment = {"PYTHONPATH": str(root), "PATH": f"{Path(sys.executable).parent}:/usr/bin:/bin"}
        self.environment |= {"HF_HUB_OFFLINE": "1", "HOME": str(folder), "OMP_NUM_THREADS": "1"}
        self.commands, self.said = [], ""
        for name, language, code in BLOCK.findall((root / "docs" / "own_head.md").read_text()):
            if name:
                (folder / name).parent.mkdir(parents=True, exist_ok=True)
                (folder / name).write_text(code)
            else:
                assert language == "sh", f"a block without the name of a file:\n{code}"
                self.commands.append(code)
                self.said += self.run(code)

    def run(self, code: str) -> str:
        shell = ["bash", "-e", "-c", code]
        done = subprocess.run(shell, cwd=self.folder, env=self.environment, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, f"{code}\n{done.stdout}{done.stderr}"
        return done.stdout

    def images(self, names: list[str]) -> torch.Tensor:
        """Images (B, 3, H, W) in [-1, 1] from files."""
        arrays = [np.asarray(Image.open(self.folder / name)) for name in names]
        return torch.from_numpy(np.stack(arrays)).permute(0, 3, 1, 2) / 127.5 - 1


@pytest.fixture(scope="module")
def reader(tmp_path_factory: pytest.TempPathFactory, root: Path) -> Reader:
    return Reader(tmp_path_factory.mktemp("own_head"), root)


def test_every_block_is_followed(reader: Reader, root: Path):
    page = (root / "docs" / "own_head.md").read_text()
    assert len(BLOCK.findall(page)) == page.count("```") / 2
    assert all(any(f"rg.{name}" in code for code in reader.commands) for name in ("train", "sample"))


def test_the_head_is_trained_and_loads(reader: Reader, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.syspath_prepend(reader.folder)
    folder = reader.folder / "outputs/person_mask/latest/head"
    with pytest.raises(ValueError, match="'MaskHead'.*class"):
        load_head(folder)
    head = load_head(folder, "mask_head.MaskHead")
    assert type(head) is import_head("mask_head.MaskHead") and type(head).__module__ == "mask_head"
    checkpoint = folder.parent / "checkpoints/last.ckpt"
    again = type(head).load_from_checkpoint(checkpoint, weights_only=True)
    assert all(torch.equal(tensor, head.state_dict()[name]) for name, tensor in again.state_dict().items())
    header, *rows = (folder.parent / "csv/version_0/metrics.csv").read_text().splitlines()
    scores = dict(zip(header.split(","), rows[-1].split(","), strict=True))
    assert float(scores["val/iou_t50"]) > 0.5, scores


def test_the_person_stands_where_the_mask_is(reader: Reader):
    first, last = re.search(
        r"mean energy: ([\d.]+) at the first guided step, ([\d.]+) at the last", reader.said
    ).groups()
    assert float(last) < 0.5 * float(first)
    run = reader.folder / "outputs/person_at_left/latest"
    assert (run / "grid.png").is_file()
    guided = reader.images([run / f"{number:05d}.png" for number in range(4)])
    pipe = DiffusionBackbone.from_pretrained("marionette", device="cpu").pipeline
    settings = {"num_inference_steps": 25, "guidance_scale": 2.0, "eta": 1.0}
    unguided = generate(pipe, [PROMPT] * 4, seeds=range(4), **settings)
    # The detector knows nothing of the head.
    mask = torch.from_numpy(np.asarray(Image.open(reader.folder / "mask.png")) > 0)
    found = KeypointDetector.from_pretrained("detector").detect(torch.cat([guided, unguided])).points[:, 0]
    columns, rows = found.round().long().clamp(0, 63).unbind(-1)
    inside = mask[rows, columns].float().mean(1)
    assert inside[:4].mean() > 0.7 > 0.4 > inside[4:].mean(), inside
    assert (found[:4, :, 0].mean(1) < 22).all(), "every person is at the left"


def test_a_function_on_features_mirrors_the_images(reader: Reader):
    unguided, mirrored = (
        (strip - strip.flip(-1)).abs().mean()
        for strip in (torch.stack(reader.images([f"{name}.png"])[0].chunk(4, -1)) for name in ("unguided", "mirrored"))
    )
    assert mirrored < 0.7 * unguided, (unguided, mirrored)


def test_training_goes_on_where_it_was(reader: Reader):
    (training,) = (code.strip() for code in reader.commands if "rg.train" in code)
    run = reader.folder / "outputs/person_mask/latest"
    before = (run / "head/head.safetensors").read_bytes()
    assert "resuming" in reader.run(f"{training} resume=true")
    assert (run / "head/head.safetensors").read_bytes() == before, "there was nothing left to do"
    shutil.copytree(run / "checkpoints", reader.folder / "longer/checkpoints")
    longer = training.replace("max_steps=100", "max_steps=104")
    assert "resuming" in reader.run(f"{longer} hydra.run.dir=longer")
    saved = torch.load(reader.folder / "longer/checkpoints/last.ckpt", weights_only=True)
    assert saved["global_step"] == 104
    assert (reader.folder / "longer/head/head.safetensors").read_bytes() != before
