"""The authors' head files as heads of this package (Luo et al., CVPR 2024; the weights are Apache-2.0).

A file is an archive of `torch.save` with plain values: `config` and `aggregation_network`, the weights. Files of the
public trainer hold more entries, which are not read.
"""

import hashlib
import logging
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import hf_hub_download
from torch import Tensor

from rg.heads.appearance import AppearanceHead
from rg.heads.base import ReadoutHead
from rg.heads.correspondence import CorrespondenceHead
from rg.heads.spatial import SpatialHead
from rg.points import KEYPOINTS

# Heads without output convolutions: the files do not say which of the two they are.
RELATIVE: dict[str, tuple[type[ReadoutHead], dict[str, Any]]] = {
    "appearance": (AppearanceHead, {}),
    # The authors call this one without a time embedding.
    "correspondence": (CorrespondenceHead, {"repulsion": 0.5, "time_convention": "none"}),
}
# The models that files name, and the width of their text embeddings: families with the same taps differ in it.
CONDITION_DIM = {
    "runwayml/stable-diffusion-v1-5": 768,
    "stabilityai/stable-diffusion-2-1": 1024,
    "stabilityai/stable-diffusion-xl-base-1.0": 2048,
}


def load(
    source: str | Path, *, family: str | None = None, task: str | None = None, time_convention: str | None = None
) -> ReadoutHead:
    """A released head, frozen, float32, in evaluation mode: a SpatialHead, AppearanceHead or CorrespondenceHead.

    Args:
        source: one of rg.heads.released.FILES, which is downloaded once, or the path of a file.
        family: the backbone of a name in FILES: "sd15" or "sdxl".
        task: "appearance" or "correspondence", for the path of such a file.
        time_convention: None takes that of the authors' training: "mirrored"; "none" for correspondence and for the
            older layout, which ignores time. Their own guidance embeds t ("direct").

    Raises:
        FileNotFoundError: there is no such file, or it cannot be downloaded.
        ValueError: another family or task, or a file of another form; the message names the entries.
    """
    path, labelled_by = Path(source), None
    if str(source) in FILES:
        task = str(source) if str(source) in RELATIVE else None
        labelled_by = LABELLED_BY.get(str(source))
        path = download(str(source), family)
    if not path.is_file():
        raise FileNotFoundError(f"released={source}: expected one of {sorted(FILES)} or a .pt file, found no such file")
    try:
        head = _build(_read(path), task, time_convention)
    except (ValueError, RuntimeError) as error:  # torch refuses widths below zero by a RuntimeError
        raise ValueError(f"released={path}: {error}") from error
    head.labelled_by = labelled_by
    return head


def _read(path: Path) -> dict[str, Any]:
    try:
        record = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # whatever damaged or foreign bytes lead to
        reason = str(error).strip().split("\n")[0][:200]
        raise ValueError(f"expected a file of torch.save with plain values, found {reason!r}") from error
    weights = _entry(record, "aggregation_network", dict)
    foreign = [name for name, tensor in weights.items() if not (isinstance(name, str) and isinstance(tensor, Tensor))]
    if foreign:
        raise ValueError(f"aggregation_network: expected tensors by name, found another thing at {foreign}")
    return record


def _entry(record: Any, key: str, *kinds: type) -> Any:
    """The value at a dotted key of nested dictionaries."""
    value = record
    for part in key.split("."):
        if not isinstance(value, dict) or part not in value:
            raise ValueError(f"expected an entry {key}, found none")
        value = value[part]
    if not isinstance(value, kinds):
        raise ValueError(f"{key}: expected {' or '.join(kind.__name__ for kind in kinds)}, found {value!r:.80}")
    return value


def _list(record: Any, key: str, *kinds: type) -> list[Any]:
    """The list at a dotted key; a tuple counts as one."""
    values = list(_entry(record, key, list, tuple))
    if not all(isinstance(value, kinds) for value in values):
        raise ValueError(f"{key}: expected a list of {' or '.join(kind.__name__ for kind in kinds)}, found {values}")
    return values


def _build(record: dict[str, Any], task: str | None, time_convention: str | None) -> ReadoutHead:
    theirs: dict[str, Tensor] = record["aggregation_network"]
    # By the names, whatever the flag bottleneck_sequential says: they are what was trained.
    sequential = any(re.match(r"bottleneck_layers\.\d+\.0\.", name) for name in theirs)
    if sequential and time_convention not in (None, "none"):
        raise ValueError(f"time_convention: the layout of this file ignores time, got {time_convention!r}")
    kind, arguments = _kind(record, task)
    convention = time_convention or ("none" if sequential else arguments.get("time_convention", "mirrored"))
    time_layer = theirs.get(_their_name("bottlenecks.0.time.weight", sequential))
    head = kind(
        tap_channels=_list(record, "config.dims", int),
        time_embed_dim=1 if time_layer is None or time_layer.ndim != 2 else time_layer.shape[1],
        condition_dim=CONDITION_DIM.get(str(record["config"].get("model_id"))),
        projection_dim=_entry(record, "config.projection_dim", int),
        prompt=str(record["config"].get("prompt", "")),
        **{**arguments, "time_convention": convention},
    )
    own = head.state_dict()
    renamed = {_their_name(name, sequential): name for name in own}
    if missing := sorted(renamed.keys() - theirs.keys()):
        raise ValueError(f"aggregation_network: expected also {missing}")
    if leftover := sorted(theirs.keys() - renamed.keys()):
        raise ValueError(f"aggregation_network: no place for {leftover}")
    for name, tensor in theirs.items():
        expected = own[renamed[name]].shape
        if tensor.shape != expected or not tensor.is_floating_point():
            found = f"{tensor.dtype} {tuple(tensor.shape)}"
            raise ValueError(f"aggregation_network: expected {name} of shape {tuple(expected)}, found {found}")
    head.load_state_dict({renamed[name]: tensor.float() for name, tensor in theirs.items()})
    return head.eval().requires_grad_(False)


def _kind(record: dict[str, Any], task: str | None) -> tuple[type[ReadoutHead], dict[str, Any]]:
    """The class of a file's head, and the constructor's arguments that this class alone has."""
    if _list(record, "config.save_timestep", int) != [0]:
        raise ValueError(f"config.save_timestep: expected [0], found {record['config']['save_timestep']}")
    if not _entry(record, "config.aggregation_kwargs.use_output_head", bool):
        if task not in RELATIVE:
            raise ValueError(f"task: expected one of {sorted(RELATIVE)} for a file without output head, got {task!r}")
        return RELATIVE[task]
    if task is not None:
        raise ValueError(f"task: expected none for a file with an output head, got {task!r}")
    channels = _entry(record, "config.aggregation_kwargs.output_head_channels", int)
    # Guided by a plain mean of squares, whichever mean they were trained with.
    arguments: dict[str, Any] = {"sparse_energy": False}
    match channels, bool(record["config"]["aggregation_kwargs"].get("output_head_act", True)):
        case 3, True:
            low_high = _list(record, "config.dataset_args.control_range", int, float)
            if len(low_high) != 2 or not low_high[0] < low_high[1]:
                raise ValueError(f"config.dataset_args.control_range: expected (low, high), found {low_high}")
            sparse = _entry(record, "config.dataset_args.sparse_loss", bool)
            return SpatialHead, {"variant": "rgb", "control_range": low_high, "sparse": sparse, **arguments}
        case 18, False:
            # Trained on bumps of a sixteenth of the map.
            sigma = _entry(record, "config.output_resolution", int) / 16
            return SpatialHead, {"variant": "keypoints", "sigma": sigma, "sparse": False, **arguments}
        case found:
            raise ValueError(
                "config.aggregation_kwargs: expected output_head_channels 3 with output_head_act (RGB) or "
                f"{len(KEYPOINTS)} without it (keypoints), found {found}"
            )


def _their_name(name: str, sequential: bool) -> str:
    """The authors' name of one of our parameters."""
    name = name.removeprefix("aggregation.").replace("shortcut_norm.", "shortcut.norm.")
    name = re.sub(r"\.norm(\d)\.", r".conv\1.norm.", name).replace(".time.", ".emb_layers.")
    inner = "0." if sequential else ""
    return re.sub(r"^bottlenecks\.(\d+)\.", rf"bottleneck_layers.\g<1>.{inner}", name)


log = logging.getLogger(__name__)
REPOSITORY = "g-luo/readout-guidance"
FAMILIES = {"sd15": "sdv15", "sdxl": "sdxl"}
FILES = {
    "pose": "weights/readout_{}_spatial_pose.pt",
    "depth": "weights/readout_{}_spatial_depth.pt",
    "edge": "weights/readout_{}_spatial_edge.pt",
    "correspondence": "weights/readout_{}_drag_correspondence.pt",
    "appearance": "weights/readout_{}_drag_appearance.pt",
    "pose_keypoint": "readout_pose/readout_{}_pose_keypoint.pt",
}
# The annotators of their labels that may judge images, too.
LABELLED_BY = {"pose": "OpenPose", "pose_keypoint": "OpenPose"}
# What is known of the files' contents.
SHA256 = {
    "weights/readout_sdv15_spatial_depth.pt": "0f8e5fa64fce49fa51cc2c518f8b8e6440dffa26029f3d08b43e983c74259ad6",
    "weights/readout_sdv15_spatial_edge.pt": "f0d20fde493aaeda43634c62cc3b0de431dc87e076ebc4c1f29432c861d44746",
    "weights/readout_sdv15_spatial_pose.pt": "3cb200468736f73f8598fc15ccfaec2fd203f09c975f69df371b99e0878b3aa8",
    "weights/readout_sdxl_spatial_depth.pt": "2fadea2cbb3ec0bd22dc3e925966dcc51dbdbf9ec694d34cb7dc426734ea5d26",
    "readout_pose/readout_sdv15_pose_keypoint.pt": "6cff51c97885845e9621cbbd8fefd761dd017ad4a50472293de69a54fca57418",
    "readout_pose/readout_sdxl_pose_keypoint.pt": "93bc388656d69097cc88dbc5038233016324203de6a83ceac15a3bf2ba3d9f26",
}


def download(name: str, family: str | None, known: Mapping[str, str] = SHA256) -> Path:
    """The file of one of FILES in the cache of huggingface_hub; its SHA256 is checked where it is known.

    Raises:
        FileNotFoundError: it is not in the cache and the hub does not answer.
        ValueError: there are no released heads for this family, or the file has another SHA256.
    """
    if family not in FAMILIES:
        raise ValueError(f"released={name}: expected a backbone family of {sorted(FAMILIES)}, got {family!r}")
    file = FILES[name].format(FAMILIES[family])
    try:
        path = Path(hf_hub_download(REPOSITORY, file, local_files_only=True))
    except FileNotFoundError:
        try:
            path = Path(hf_hub_download(REPOSITORY, file))
        except Exception as error:  # the errors of the hub's network libraries have no common base
            reason = str(error.__cause__ or error).split("\n")[0]
            raise FileNotFoundError(
                f"released={name}: expected https://huggingface.co/{REPOSITORY}/resolve/main/{file} in the cache or "
                f"from the hub, found neither ({reason}); fetch it by hand and give its path instead of the name"
            ) from error
    with path.open("rb") as stream:
        found = hashlib.file_digest(stream, "sha256").hexdigest()
    if file not in known:
        log.warning("%s: no SHA256 is known to compare with; this one has %s", file, found)
    elif found != known[file]:
        raise ValueError(f"released={name}: expected SHA256 {known[file]}, found {found}; delete {path} and try again")
    return path
