"""The files of the authors' release on the Hugging Face hub (Luo et al., CVPR 2024; the weights are Apache-2.0)."""

import hashlib
import logging
from pathlib import Path

from huggingface_hub import hf_hub_download

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
# What is known of the files' contents.
SHA256 = {
    "weights/readout_sdv15_spatial_depth.pt": "0f8e5fa64fce49fa51cc2c518f8b8e6440dffa26029f3d08b43e983c74259ad6",
    "weights/readout_sdv15_spatial_edge.pt": "f0d20fde493aaeda43634c62cc3b0de431dc87e076ebc4c1f29432c861d44746",
    "weights/readout_sdv15_spatial_pose.pt": "3cb200468736f73f8598fc15ccfaec2fd203f09c975f69df371b99e0878b3aa8",
    "weights/readout_sdxl_spatial_depth.pt": "2fadea2cbb3ec0bd22dc3e925966dcc51dbdbf9ec694d34cb7dc426734ea5d26",
    "readout_pose/readout_sdv15_pose_keypoint.pt": "6cff51c97885845e9621cbbd8fefd761dd017ad4a50472293de69a54fca57418",
    "readout_pose/readout_sdxl_pose_keypoint.pt": "93bc388656d69097cc88dbc5038233016324203de6a83ceac15a3bf2ba3d9f26",
}


def download(name: str, family: str | None) -> Path:
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
    if file not in SHA256:
        log.warning("%s: no SHA256 is known to compare with; this one has %s", file, found)
    elif found != SHA256[file]:
        raise ValueError(f"released={name}: expected SHA256 {SHA256[file]}, found {found}; delete {path} and try again")
    return path
