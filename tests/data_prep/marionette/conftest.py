"""What the tests of the marionette world share: an average person, a plain scene, and many drawn scenes."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from data_prep.marionette.render import Stills, render_scenes
from data_prep.marionette.scene import POSE, SHAPE, Camera, Person, Scene
from data_prep.marionette.scene_sampling import draw_scene
from data_prep.marionette.skeleton import Frame, body_points

_AVERAGE = {name: 0.0 if name in ("eye_height", "mouth_height") else 1.0 for name in SHAPE} | {"hair_fall": 0.25}
_WORDS = {"shirt": "red", "trousers": "blue", "skin": "tan", "hair": "black", "hair_length": "short", "eye": "green"}
_WORDS |= {"hat": None, "glasses": False, "shirt_pattern": "plain", "trousers_pattern": "plain"}


@pytest.fixture(scope="session")
def person() -> Callable[..., Person]:
    """An average person who stands upright at the origin and faces +z: `person(worn={"hat": "red"}, yaw=0.5)`.

    `worn` replaces entries of the identity, `place` is (x, z), any other argument is an angle of the pose.
    """

    def make(*, worn: dict[str, Any] | None = None, place: tuple[float, float] = (0.0, 0.0), **pose: float) -> Person:
        return Person(_WORDS | _AVERAGE | (worn or {}), dict.fromkeys(POSE, 0.0) | pose, place)

    return make


@pytest.fixture(scope="session")
def scene() -> Callable[..., Scene]:
    """A scene by day on grass: `scene(person(), kind="one", camera=Camera(yaw=1.0))`.

    Its camera stands 3 units in front of the origin at a height of 0.9, level: a unit there is half of the image.
    """

    def make(*people: Person, kind: str = "one", camera: Camera | None = None, **fields: Any) -> Scene:
        return Scene(
            **{"kind": kind, "sky": "day", "ground": "grass", "people": people} | fields, camera=camera or Camera()
        )

    return make


@pytest.fixture(scope="session")
def body() -> Callable[[Person], tuple[dict[str, Tensor], dict[str, Frame]]]:
    """The points (3,) and frames of a person, pelvis at the origin, float64: `points, frames = body(person())`."""

    def build(someone: Person) -> tuple[dict[str, Tensor], dict[str, Frame]]:
        angles = {name: torch.tensor(someone.pose[name], dtype=torch.float64) for name in POSE}
        shape = {name: torch.tensor(someone.identity[name], dtype=torch.float64) for name in SHAPE}
        return body_points({name: (angle.cos(), angle.sin()) for name, angle in angles.items()}, shape)

    return build


@pytest.fixture(scope="session")
def uniform() -> Callable[..., Tensor]:
    """Doubles between -1 and 1: `uniform(3, 50, seed=1)`."""

    def draw(*shape: int, seed: int = 0) -> Tensor:
        return torch.rand(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)) * 2 - 1

    return draw


@pytest.fixture(scope="session")
def shoot() -> Callable[..., Stills]:
    """Renders scenes at 64 pixels: `shoot(scene(person()), resolution=32)`."""

    def render(*scenes: Scene, resolution: int = 64, supersampling: int = 2, device: str = "cpu") -> Stills:
        return render_scenes(scenes, resolution=resolution, supersampling=supersampling, device=device)

    return render


@pytest.fixture(scope="session")
def drawn() -> list[Scene]:
    """2,500 scenes of the world."""
    return [draw_scene((6, 0, index)) for index in range(2500)]


@pytest.fixture(scope="session")
def sided() -> list[Scene]:
    """The same 2,500 scenes with people whose sides can be told."""
    return [draw_scene((6, 0, index), sided=True) for index in range(2500)]


@pytest.fixture(scope="session")
def distance() -> Callable[..., Tensor]:
    """Signed distances (...) of points (3, ...) from capsules: `distance(points, start, end, radius)`.

    Outside they are positive. Ends are (3, ...), radii (...); everything broadcasts.
    """

    def measure(points: Tensor, start: Tensor, end: Tensor, radius: Tensor) -> Tensor:
        axis = end - start
        length = (axis * axis).sum(0)
        share = ((points - start) * axis).sum(0) / length.clamp_min(1e-30)
        return (points - start - share.clamp(0, 1) * axis).norm(dim=0) - radius

    return measure
