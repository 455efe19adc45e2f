"""The commands on the published worlds' layouts, in half precision, from pictures to a table of results."""

import json

import pytest
from PIL import Image

from rg.data.shards import Manifest, read_shards
from tests.rehearsal import MODELS, PICTURES, SIDE, rehearse


@pytest.mark.slow
def test_the_commands_go_from_pictures_of_coco_to_results(tmp_path):
    said = []
    seconds = rehearse(tmp_path, said.append)
    assert len(seconds) == 4 * len(MODELS) and len(said) == 5 * len(MODELS)
    for model in MODELS:
        coco = tmp_path / f"data/{model}_coco/test"
        assert len(Manifest.read(coco).shards) == 2 and len(read_shards(coco)) == PICTURES
        outputs = tmp_path / "outputs"
        assert Image.open(outputs / f"{model}_sample/latest/00001.png").size == (SIDE, SIDE)
        evaluated = outputs / f"{model}_eval/latest"
        assert json.loads((evaluated / "results.json").read_text())["images"] == 2
        assert "guided" in (evaluated / "table.md").read_text()
        assert (evaluated / "grid.png").is_file() and (outputs / f"{model}/latest/head/head.json").is_file()
