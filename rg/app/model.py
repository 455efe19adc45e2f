"""The loaded model and what all tabs do with it: fields that they share, jobs, previews, run folders."""

import logging
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import gradio as gr
from torch import Tensor

from rg.app.jobs import Jobs, Report, Stopped
from rg.app.runs import Run
from rg.app.view import Errors
from rg.backbone.diffusion import DiffusionBackbone
from rg.cli import BAD_INPUT
from rg.detectors.detection import Detector
from rg.generation import Watch
from rg.points import Size

log = logging.getLogger(__name__)
PREVIEW_SECONDS = 0.25  # between two previews: decoding one takes time from sampling
MAX_PROMPT = 2000  # letters
PROMPT = "a person in a red shirt and blue trousers on grass at day"


class Model:
    """What the tabs share.

    Args:
        backbone: the loaded model.
        judges: by name, who say where keypoints are.
        words: overrides that choose the world, of every command that is shown.
        jobs: where the model is used.
        root: the folder of all results.
        limits: of conf/app.yaml.
        sampling: the world's own number of steps.
    """

    def __init__(
        self,
        backbone: DiffusionBackbone,
        judges: Mapping[str, Detector],
        words: Sequence[str],
        *,
        jobs: Jobs,
        root: Path,
        limits: Mapping[str, Any],
        steps: int,
    ) -> None:
        self.backbone, self.judges, self.words = backbone, judges, list(words)
        self.jobs, self.root, self.limits, self.steps = jobs, root, limits, steps

    @property
    def size(self) -> Size:
        """(height, width) of the images that are made."""
        return self.backbone.resolution

    def add_prompt(self, fields: dict[str, Any], errors: Errors) -> None:
        fields["prompt"] = gr.Textbox(PROMPT, label="Prompt", max_length=MAX_PROMPT, lines=1, max_lines=4)
        errors.below("prompt")

    def add_sampling(self, fields: dict[str, Any], errors: Errors) -> None:
        """Fields of the number of steps and the seed, inside the columns of a tab."""
        with gr.Row():
            fields["sampling.num_inference_steps"] = gr.Number(self.steps, label="Steps", precision=0)
            fields["seed"] = gr.Number(0, label="Seed", precision=0)
        errors.below("sampling.num_inference_steps")
        errors.below("seed")

    def check_steps(self, steps: Any) -> None:
        """Raises ValueError where a job would take more steps than the limits allow, or none."""
        if not isinstance(steps, int) or not 1 <= steps <= self.limits["steps"]:
            found = "nothing" if steps is None else steps
            raise ValueError(f"num_inference_steps: expected 1 to {self.limits['steps']}, got {found}")

    @contextmanager
    def run(self, module: str) -> Iterator[Run]:
        """A new run folder; it goes where nothing comes of it."""
        run = Run(self.root, module)
        try:
            yield run
        except BaseException:
            run.discard()
            raise

    def watch(self, report: Report, show: Callable[[str, Tensor], None]) -> Watch:
        """Shows the newest image (3, H, W) in [-1, 1] of what is sampled, at most every PREVIEW_SECONDS."""
        last = [0.0]

        def watched(what: str, latents: Tensor) -> None:
            report(None)
            if time.monotonic() - last[0] >= PREVIEW_SECONDS:
                show(what, self.backbone.decode(latents[:1].float())[0].cpu())
                last[0] = time.monotonic()

        return watched

    def bind(
        self,
        begin: Any,
        stop: gr.Button | None,
        make: Callable[[Mapping[str, Any], Report], Any],
        fields: Mapping[str, Any],
        shown: gr.HTML,
        errors: Errors,
        keep: gr.State | None = None,
    ) -> None:
        """Lets a button or an event begin `make(values of the fields, report)`, whose HTML is shown.

        Args:
            stop: ends it; None where the button is bound already.
            keep: what gets the second of the two things that `make` then returns, for this user alone.
        """

        def start(request: gr.Request, *values: Any) -> Iterator[list[Any]]:
            given = dict(zip(fields, values, strict=True))
            for shown, *said in self.answer(request, partial(make, given), errors):
                kept = shown[1] if isinstance(shown, tuple) else gr.skip()
                first = shown[0] if isinstance(shown, tuple) else shown
                yield [first, *said, kept] if keep is not None else [first, *said]

        private: dict[str, Any] = {"api_visibility": "private", "show_progress": "hidden"}
        outputs = [shown, *errors.components, *([] if keep is None else [keep])]
        listen = begin.click if isinstance(begin, gr.Button) else begin
        listen(start, list(fields.values()), outputs, concurrency_limit=None, **private)
        if stop is not None:
            stop.click(self.stop, queue=False, **private)

    def answer(self, request: gr.Request, job: Callable[[Report], Any], errors: Errors) -> Iterator[list[Any]]:
        """What a tab's button yields: the HTML of a job as it grows, and what is wrong, beside its field."""
        yield [gr.skip(), *errors.say()]
        try:
            for shown in self.jobs.run(request.session_hash or "", job):
                yield [shown, *errors.say()]
        except Stopped as error:
            yield [gr.skip(), *errors.say(str(error))]
        except BAD_INPUT as error:
            message = " ".join(str(error.__cause__ if type(error).__module__.startswith("hydra") else error).split())
            yield [gr.skip(), *errors.say(message)]
        except Exception:
            log.exception("a job failed")
            yield [gr.skip(), *errors.say("this failed inside the program; the terminal that it runs in says how")]

    def stop(self, request: gr.Request) -> None:
        """Ends the job of whoever asks."""
        self.jobs.stop(request.session_hash or "")
