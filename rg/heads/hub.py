"""Heads and guiders on the model hub: where a name leads to, and what is uploaded."""

import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

import huggingface_hub
from huggingface_hub import ModelCard, ModelCardData

from rg.backbone.loading import HUB_ID
from rg.models import locate

if TYPE_CHECKING:
    from rg.heads.base import ReadoutHead

TAGS = ["readout-guidance", "diffusers"]
FILES = ["*.json", "*.safetensors"]  # whatever else a repository holds is not downloaded
CARD = """{header}
# {kind}

A readout head of {taps} taps with {channels} channels, for denoisers with a time embedding of {time} and text
embeddings of {text}; its features are read under the prompt {prompt!r}.

```python
from rg import FixedTarget, GuidanceTerm, ReadoutGuidance, load_control, load_head

guidance = ReadoutGuidance([GuidanceTerm(load_head("{repository}"), FixedTarget(load_control("control.png")))])
with guidance.attach(pipe):
    images = pipe("a prompt").images
```
"""


def find_folder(name: str | Path, kind: str = ".") -> Path:
    """The folder called `name`: a path, a shipped model of that kind, or "owner/name" on the hub, downloaded once.

    Raises:
        FileNotFoundError: there is none, or the hub does not answer and its cache has none either.
    """
    try:
        return locate(name, kind)
    except FileNotFoundError:
        if not HUB_ID.fullmatch(str(name)):
            raise
        missing = f"expected a path, a shipped name, or a repository of the hub {str(name)!r}"
    try:
        return Path(huggingface_hub.snapshot_download(str(name), allow_patterns=FILES))
    except Exception as error:  # whatever the network, the hub or its cache may raise
        raise FileNotFoundError(f"{missing}, which gave {type(error).__name__}") from None


def push_head(
    head: "ReadoutHead",
    repo_id: str,
    *,
    base_model: str | None = None,
    private: bool | None = None,
    token: str | None = None,
    commit_message: str = "Upload a readout head",
) -> str:
    """Uploads a head and a model card to the hub; the address of what was uploaded.

    Args:
        repo_id: "owner/name", made where there is none.
        base_model: the repository of the model that the head was trained on.

    Raises:
        ValueError: the name is no "owner/name".
    """
    if not HUB_ID.fullmatch(repo_id):
        raise ValueError(f"repo_id: expected owner/name, got {repo_id!r}")
    repo_id = huggingface_hub.create_repo(repo_id, private=private, token=token, exist_ok=True).repo_id
    with tempfile.TemporaryDirectory() as folder:
        head.save_pretrained(folder)
        head_card(head, repo_id, base_model).save(Path(folder) / "README.md")
        return str(
            huggingface_hub.upload_folder(
                repo_id=repo_id, folder_path=folder, token=token, commit_message=commit_message
            )
        )


def head_card(head: "ReadoutHead", repo_id: str, base_model: str | None = None) -> ModelCard:
    """What a head is and how it is used, with the tags by which it is found."""
    hparams = head.hparams
    data = ModelCardData(library_name="readout-guidance", tags=[*TAGS, type(head).__name__], base_model=base_model)
    text = CARD.format(
        header=f"---\n{data.to_yaml()}\n---",
        kind=type(head).__name__,
        taps=len(hparams.tap_channels),
        channels=", ".join(map(str, hparams.tap_channels)),
        time=hparams.time_embed_dim,
        text=hparams.condition_dim,
        prompt=head.prompt,
        repository=repo_id,
    )
    return ModelCard(text)
