"""Keypoints in JSON: the one owner of their form on disk.

{"keypoints": people x 18 x [x, y, visible]}, in pixels. What is not visible (0, or less) is not read: its place may be
NaN, null or anything. Further keys are left out.
"""

from pathlib import Path
from typing import Annotated, Any, TypeVar

import torch
from pydantic import BeforeValidator, Field
from torch import Tensor

from rg.io.files import read_json
from rg.io.records import Record, validate
from rg.points import KEYPOINTS

MAX_BYTES = 2**24
MAX_PEOPLE = 256
FARTHEST = 1e6  # pixels


def _hide(value: Any) -> Any:
    """A keypoint whose place is 0 where it is not visible and its place is no number."""
    if not isinstance(value, list) or len(value) != 3:
        return value
    visible = float(value[2]) if isinstance(value[2], bool) else value[2]
    if isinstance(visible, int | float) and visible <= 0:
        return [*(place if _is_place(place) else 0.0 for place in value[:2]), visible]
    return [*value[:2], visible]


def _is_place(value: Any) -> bool:
    number = isinstance(value, int | float) and not isinstance(value, bool)
    return number and abs(value) <= FARTHEST  # nan is not


Number = Annotated[float, Field(ge=-FARTHEST, le=FARTHEST)]
Keypoint = Annotated[list[Number], Field(min_length=3, max_length=3), BeforeValidator(_hide)]
Person = Annotated[list[Keypoint], Field(min_length=len(KEYPOINTS), max_length=len(KEYPOINTS))]
People = Annotated[list[Person], Field(max_length=MAX_PEOPLE)]
HeightWidth = Annotated[list[Annotated[int, Field(ge=1, le=2**16)]], Field(min_length=2, max_length=2)]


class Pose(Record):
    """People in an image."""

    keypoints: People


class SizedPose(Pose):
    """People in an image of a size, (height, width)."""

    size: HeightWidth


P = TypeVar("P", bound=Pose)


def to_tensor(people: list[Any]) -> Tensor:
    """(P, 18, 3) float32 of (x, y, visible), P = 0 where there are none."""
    return torch.tensor(people, dtype=torch.float32).reshape(-1, len(KEYPOINTS), 3)


def read_pose(path: Path, schema: type[P]) -> P:
    """Reads a JSON file of keypoints as one of the records above.

    Raises:
        ValueError: it is not such a file, of more than MAX_BYTES or MAX_PEOPLE people, or has a visible keypoint that
            is no place; the message names the path, the key, what was expected and what was found.
    """
    return validate(schema, read_json(path, limit=MAX_BYTES, constants=True), str(path))
