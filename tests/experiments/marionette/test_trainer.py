from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Generator, Tensor, nn

from experiments.marionette.record import read_seconds
from experiments.marionette.trainer import Trainer, step_generator

PAST, NEVER = 0.0, float("inf")
SETTINGS: dict[str, Any] = {
    "steps": 5, "learning_rate": 0.1, "warm_up": 2, "decay": 0.4, "weight_decay": 0.0, "ema": 0.9, "seed": 1,
    "preview_minutes": 9, "widths": [3],
}  # fmt: skip


def squares(network: nn.Module, generator: Generator) -> Tensor:
    return network(torch.randn(4, 3, generator=generator)).square().mean()


def trainer(folder: Path, **settings: Any) -> Trainer:
    torch.manual_seed(0)
    return Trainer(nn.Linear(3, 2), squares, SETTINGS | settings, folder)


def train(folder: Path, deadline: float = NEVER, **settings: Any) -> Trainer:
    made = trainer(folder, **settings)
    made.run(deadline, lambda network, path: path.touch())
    return made


def assert_same(a: Trainer, b: Trainer) -> None:
    assert a.losses == b.losses and a.step == b.step
    for one, other in ((a.network, b.network), (a.average, b.average)):
        assert all(torch.equal(x, y) for x, y in zip(one.parameters(), other.parameters(), strict=True))


def test_every_call_takes_a_step_and_together_they_are_one_run(tmp_path: Path) -> None:
    for step in range(1, 5):
        assert train(tmp_path / "pieces", PAST).step == step
    pieces, whole = train(tmp_path / "pieces", PAST), train(tmp_path / "whole")
    assert pieces.finished
    assert_same(pieces, whole)
    names = ["000005.png", "checkpoint.pt", "losses.csv", "seconds.txt"]
    assert sorted(path.name for path in (tmp_path / "pieces").iterdir()) == names
    assert (tmp_path / "pieces/losses.csv").read_bytes() == (tmp_path / "whole/losses.csv").read_bytes()
    assert train(tmp_path / "whole").step == 5  # finished: nothing more


def test_chance_depends_on_seed_and_step_alone(tmp_path: Path) -> None:
    draws = {
        pair: torch.rand(3, generator=step_generator(*pair, torch.device("cpu")))
        for pair in [(0, 0), (0, 1), (1, 0), (1, 1)]
    }
    assert len({tuple(values.tolist()) for values in draws.values()}) == 4
    assert torch.equal(draws[0, 1], torch.rand(3, generator=step_generator(0, 1, torch.device("cpu"))))
    first, again = train(tmp_path / "a").losses, train(tmp_path / "b").losses
    assert first == again != train(tmp_path / "c", seed=2).losses


def test_other_settings_are_refused_by_name(tmp_path: Path) -> None:
    train(tmp_path, PAST)
    with pytest.raises(ValueError, match=r"learning_rate=0.1, widths=\[3\].* learning_rate=0.2, widths=\[4\]"):
        trainer(tmp_path, learning_rate=0.2, widths=[4])
    with pytest.raises(ValueError, match=r"batch=None.* batch=8"):
        trainer(tmp_path, batch=8)
    assert trainer(tmp_path, preview_minutes=1).step == 1


def test_steps_may_be_changed_until_the_rate_falls(tmp_path: Path) -> None:
    for _ in range(3):  # of 5, of which the last 2 have a falling rate
        train(tmp_path / "changed", PAST)
    assert_same(train(tmp_path / "changed", steps=7), train(tmp_path / "new", steps=7))


def test_learning_rate_rises_stays_and_falls_to_nothing(tmp_path: Path) -> None:
    made, rates = trainer(tmp_path, steps=10), []
    for made.step in range(10):
        rates.append(made.learning_rate())
    np.testing.assert_allclose(rates, [0.05, *[0.1] * 6, 0.075, 0.05, 0.025])


def test_average_lags_behind(tmp_path: Path) -> None:
    made = trainer(tmp_path)
    expected = made.network.weight.detach().clone()
    for step in range(4):
        made.advance()
        decay = (1 + step) / (10 + step)  # below 0.9 that early
        expected = decay * expected + (1 - decay) * made.network.weight.detach()
    torch.testing.assert_close(made.average.weight.detach(), expected)


def test_seconds_grow_with_every_call(tmp_path: Path) -> None:
    tmp_path.joinpath("seconds.txt").write_text("100\n")  # by hand
    train(tmp_path, PAST)
    first = read_seconds(tmp_path)
    train(tmp_path)
    assert 100 < first < read_seconds(tmp_path) < 160


def test_without_a_number_of_steps_training_goes_on_until_one_is_given(tmp_path: Path) -> None:
    for step in range(1, 4):  # of 5, of which the last 2 have a falling rate
        endless = train(tmp_path / "endless", PAST, steps=None)
        assert endless.step == step and not endless.finished
        assert endless.learning_rate() == 0.1
    assert_same(train(tmp_path / "endless"), train(tmp_path / "whole"))


def test_a_checkpoint_is_kept_after_every_hour_of_work(tmp_path: Path) -> None:
    train(tmp_path, PAST)
    assert not list(tmp_path.glob("hour-*"))
    first = tmp_path / "hour-001.pt"
    for seconds in (3600, 3700, 7000):
        tmp_path.joinpath("seconds.txt").write_text(f"{seconds}\n")
        train(tmp_path, PAST)
        assert torch.load(first, weights_only=True)["step"] == 2
    tmp_path.joinpath("seconds.txt").write_text("18001\n")
    train(tmp_path)
    assert [path.name for path in sorted(tmp_path.glob("hour-*"))] == ["hour-001.pt", "hour-005.pt"]
    assert torch.load(tmp_path / "hour-005.pt", weights_only=True)["step"] == 5
