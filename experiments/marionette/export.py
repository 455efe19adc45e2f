"""Ships a trained pipeline: half precision, no file too large for a repository, the folder put in place whole."""

import json
import shutil
from pathlib import Path

import torch
from diffusers import StableDiffusionPipeline

LARGEST_FILE = "15MB"


def export(trained: Path, output: Path) -> int:
    """Writes the pipeline in the folder `trained` to `output` in half precision, returns its size in bytes.

    What was in `output` is replaced at the very end; a README.md there is kept.
    """
    pipeline = StableDiffusionPipeline.from_pretrained(trained, dtype=torch.float16, local_files_only=True)
    partial = output.with_name(output.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    pipeline.save_pretrained(partial, max_shard_size=LARGEST_FILE)
    for path in partial.rglob("*.json"):  # where the weights were last loaded from is nobody's business
        text = json.loads(path.read_text(encoding="utf-8"))
        text.pop("_name_or_path", None)
        path.write_text(json.dumps(text, indent=2) + "\n", encoding="utf-8")
    if (output / "README.md").is_file():
        shutil.copy(output / "README.md", partial)
    former = output.with_name(output.name + ".former")
    shutil.rmtree(former, ignore_errors=True)
    if output.is_dir():
        output.replace(former)
    partial.replace(output)
    shutil.rmtree(former, ignore_errors=True)
    return sum(path.stat().st_size for path in output.rglob("*") if path.is_file())
