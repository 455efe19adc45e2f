"""Training that can stop at any step: what it draws depends on (seed, step) alone, what it learnt is in one file."""

import copy
import csv
import io
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Generator, Tensor, nn
from tqdm import tqdm

from experiments.marionette.record import Stopwatch, read_seconds, save
from experiments.marionette.threads import SpareThreads
from rg.io.files import write_text

SAVE_EVERY = 180  # seconds
KEEP_EVERY = 3600  # seconds of work, after which a checkpoint is kept beside those that follow
CLIP = 1.0  # largest norm of the gradient


def step_generator(seed: int, step: int, device: torch.device) -> Generator:
    """The source of all chance in one step."""
    state = np.random.SeedSequence((seed, step)).generate_state(1, np.uint64)[0]
    return Generator(device).manual_seed(int(state) >> 1)


class Trainer:
    """Trains a network, and keeps a moving average of its weights, which is the result.

    The learning rate is constant after a short warm-up and falls to 0 in the last part of the steps: before that part
    begins the number of steps may still be changed. Without such a number it stays constant and training does not end:
    a number that is given later ends it, and should leave that last part before it.

    Args:
        network: what learns.
        loss: of one step; all chance comes from its generator.
        settings: steps (or None), learning_rate, warm_up (steps), decay (share of the steps), weight_decay, ema
            (largest decay of the average), seed, and whatever else decides the run.
        folder: gets checkpoint.pt, losses.csv, seconds.txt, images, and after every hour of work its checkpoint as
            hour-001.pt and so on; checkpoint.pt is taken up.

    Raises:
        ValueError: the checkpoint was made with other settings.
    """

    def __init__(
        self,
        network: nn.Module,
        loss: Callable[[nn.Module, Generator], Tensor],
        settings: dict[str, Any],
        folder: Path,
    ) -> None:
        self.network, self.loss, self.settings, self.folder = network, loss, settings, folder
        self.average = copy.deepcopy(network).requires_grad_(False).eval()
        self.optimizer = torch.optim.AdamW(
            network.parameters(), betas=(0.9, 0.99), weight_decay=settings["weight_decay"], fused=True
        )
        self.device = next(network.parameters()).device
        self.step, self.losses = 0, list[float]()
        folder.mkdir(parents=True, exist_ok=True)
        self.watch = Stopwatch(folder)
        self.checkpoint = folder / "checkpoint.pt"
        if self.checkpoint.is_file():
            self._take_up(torch.load(self.checkpoint, weights_only=True, map_location=self.device))

    @property
    def finished(self) -> bool:
        steps = self.settings["steps"]
        return steps is not None and self.step >= steps

    def _identity(self) -> dict[str, Any]:
        return {key: value for key, value in self.settings.items() if key not in ("steps", "preview_minutes")}

    def _take_up(self, state: dict[str, Any]) -> None:
        made, asked = state["settings"], self._identity()
        other = [name for name in {**made, **asked} if made.get(name) != asked.get(name)]
        if other:
            was, now = (", ".join(f"{name}={values.get(name)}" for name in other) for values in (made, asked))
            raise ValueError(
                f"{self.checkpoint} was made with {was}, got {now}: go back, or delete the checkpoint to begin anew"
            )
        self.network.load_state_dict(state["network"])
        self.average.load_state_dict(state["average"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.step, self.losses = state["step"], state["losses"].tolist()

    def save(self) -> None:
        """Writes checkpoint, losses and seconds under temporary names, then puts them in place."""
        state = {"network": self.network.state_dict(), "average": self.average.state_dict()}
        state |= {"optimizer": self.optimizer.state_dict(), "step": self.step}
        state |= {"losses": torch.tensor(self.losses, dtype=torch.float64), "settings": self._identity()}
        save(self.checkpoint, state)
        table = io.StringIO()
        csv.writer(table, lineterminator="\n").writerows([("step", "loss"), *enumerate(self.losses, 1)])
        write_text(self.folder / "losses.csv", table.getvalue())
        self.watch.note()
        hours = int(read_seconds(self.folder) // KEEP_EVERY)
        kept = self.folder / f"hour-{hours:03d}.pt"
        if hours and not kept.is_file():
            kept.hardlink_to(self.checkpoint)  # which the next one replaces, but does not change

    def learning_rate(self) -> float:
        """Of the present step."""
        steps, warm_up, decay = (self.settings[name] for name in ("steps", "warm_up", "decay"))
        left = 1.0 if steps is None else (steps - self.step) / max(1, decay * steps)
        return self.settings["learning_rate"] * min(1.0, (self.step + 1) / warm_up, left)

    def advance(self) -> float:
        """One step; returns its loss."""
        loss = self.loss(self.network, step_generator(self.settings["seed"], self.step, self.device))
        self.network.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(self.network.parameters(), CLIP)
        for group in self.optimizer.param_groups:
            group["lr"] = self.learning_rate()
        self.optimizer.step()
        decay = min(self.settings["ema"], (1 + self.step) / (10 + self.step))
        averages, weights = list(self.average.parameters()), list(self.network.parameters())
        with torch.no_grad():
            torch._foreach_lerp_(averages, weights, 1 - decay)
        self.step += 1
        self.losses.append(loss.item())
        return self.losses[-1]

    def run(self, deadline: float, preview: Callable[[nn.Module, Path], None]) -> bool:
        """Trains until the last step or until time.monotonic() passes deadline; returns whether it is finished.

        One step at least is taken: repeated calls get there, however early their deadlines.

        Args:
            preview: writes an image of what the average can do to a path, now and then and after the last step.
        """
        saved = shown = time.monotonic()
        threads = SpareThreads()
        steps = self.settings["steps"]
        progress = tqdm(total=steps, initial=self.step, desc=self.folder.name, mininterval=1)
        while not self.finished:
            loss = self.advance()
            threads.adapt()
            progress.update()
            progress.set_postfix(loss=f"{loss:.4f}", mean=f"{np.mean(self.losses[-200:]):.4f}", refresh=False)
            now = time.monotonic()
            if now - saved > SAVE_EVERY:
                self.save()
                saved = now
            if now - shown > 60 * self.settings["preview_minutes"] or self.finished:
                preview(self.average, self.folder / f"{self.step:06d}.png")
                shown = now
            if now > deadline:
                break
        progress.close()
        self.save()
        return self.finished


def multiplies_bfloat16(capabilities: Mapping[str, Any]) -> bool:
    """Whether a processor does, by what torch.cpu.get_capabilities says: one with AVX512-BF16 or AMX."""
    return bool(capabilities.get("avx512_bf16") or capabilities.get("amx_bf16"))


def mixed_precision(device: str | torch.device) -> torch.autocast:
    """Autocasts to bfloat16 where the device multiplies in it, and does nothing elsewhere.

    A GPU does. A CPU that does not emulates it, forty times slower than float32.
    """
    kind = torch.device(device).type
    able = kind != "cpu" or multiplies_bfloat16(torch.cpu.get_capabilities())
    return torch.autocast(kind, torch.bfloat16, enabled=able)
