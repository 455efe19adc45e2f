"""The guider that modular pipelines of diffusers take: text guidance, and a readout's on top."""

import inspect
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Self

import torch
from diffusers import ModularPipeline
from diffusers.configuration_utils import register_to_config
from diffusers.guiders import ClassifierFreeGuidance
from diffusers.guiders.guider_utils import GuiderOutput
from torch import Tensor, nn

from rg.backbone.denoiser import latent_channels, taps
from rg.backbone.families import family_of
from rg.backbone.features import predict
from rg.guidance.attach import check_head, check_scheduler, check_weights, hooked
from rg.guidance.clock import Images
from rg.guidance.energy import Reading, energy_and_gradient
from rg.guidance.guidance import GuidanceTerm, ReadoutGuidance
from rg.guidance.step import Forward, StepTrace, norm
from rg.guidance.targets import Control, FixedTarget
from rg.guidance.updates import alpha_bar, holds_signal, prediction_type
from rg.heads import load_head
from rg.heads.hub import find_folder

if TYPE_CHECKING:
    from rg.heads.base import ReadoutHead

HEAD = "head"  # a saved guider's folder of its head


class ReadoutGuider(ClassifierFreeGuidance):
    """Classifier-free guidance whose result moves along the gradient of a readout's energy.

    `pipe.update_components(guider=ReadoutGuider("pose").steer(control))`; without `steer` it is text guidance alone.
    Pipelines call their denoiser once for each prompt; features are read in the calls that are made anyway.

    Args:
        head: a readout head, or its folder, a shipped one's name, or "owner/name" on the hub.
        update: a rule that moves the denoiser's output: "score" or "velocity_norm" (rg.guidance.rules.RULES).
        strength: without a unit, see ReadoutGuidance.
        branch: "cond" reads under the prompt; "uncond" under the negative one, which should be the head's own, "" by
            default; "both".
        readout_start, readout_stop: the steps in which the readout guides, as fractions of them.
        guidance_scale, guidance_rescale, use_original_formulation, start, stop, enabled: of text guidance, as in
            ClassifierFreeGuidance; enabled=False leaves the readout out too.

    Raises:
        FileNotFoundError, ValueError: there is no such head, or a setting is none of those above.
    """

    ignore_for_config: ClassVar[list[str]] = ["head"]

    @register_to_config
    def __init__(
        self,
        head: "ReadoutHead | str | Path | None" = None,
        update: str = "score",
        strength: float = 1.0,
        branch: str = "cond",
        readout_start: float = 0.0,
        readout_stop: float = 1.0,
        guidance_scale: float = 7.5,
        guidance_rescale: float = 0.0,
        use_original_formulation: bool = False,
        start: float = 0.0,
        stop: float = 1.0,
        enabled: bool = True,
    ) -> None:
        super().__init__(guidance_scale, guidance_rescale, use_original_formulation, start, stop, enabled)
        self.head = load_head(head) if isinstance(head, str | Path) else head
        self.trace: list[StepTrace] = []
        self.guidance: ReadoutGuidance | None = None
        self._settings = {"update": update, "strength": strength, "branch": branch}
        self._settings |= {"start": readout_start, "stop": readout_stop}
        self._images, self._stack = Images(), ExitStack()
        self._read: list[tuple[Reading, Tensor, Tensor]] = []

    def steer(self, control: Control | FixedTarget | None = None, *, terms: Sequence[GuidanceTerm] = ()) -> Self:
        """Sets what images are to show; without arguments nothing but their text.

        Args:
            control: for the guider's own head, see FixedTarget: one for all images or one for each.
            terms: instead, any summands of the energy.

        Raises:
            ValueError: a control without a head, or a rule that does not move the denoiser's output.
        """
        if control is not None and self.head is None:
            raise ValueError("head: expected one to read the control with, got None")
        if control is not None:
            target = control if isinstance(control, FixedTarget) else FixedTarget(control)
            terms = [*terms, GuidanceTerm(self.head, target)]
        self.guidance = ReadoutGuidance(terms, **self._settings) if terms else None
        if self.guidance is not None and self.guidance.rule.moves != "output":
            raise ValueError(f"update: expected score or velocity_norm in a guider, got {self.guidance.update}")
        return self

    def new(self, **changes: Any) -> Self:
        """A copy with other settings, the same head and no control."""
        made = self.from_config(self.config, **changes)
        made.head = self.head
        return made

    def set_state(self, step: int, num_inference_steps: int, timestep: Tensor) -> None:
        """The pipeline is at this step; the first one begins a run."""
        super().set_state(step, num_inference_steps, timestep)
        self._leave()
        self._read.clear()
        if step == 0:
            self._images = Images()
            self.trace.clear()

    def prepare_models(self, denoiser: nn.Module) -> None:
        """Listens to the denoiser's coming call, where its features are to be read.

        Raises:
            ValueError: the denoiser, the scheduler or a head does not fit, or there is no unconditional call to read.
        """
        super().prepare_models(denoiser)
        if not self._reads_now():
            return
        components = _running_components()
        self._check(denoiser, components)

        def answer(forward: Forward, sample: Tensor, timestep: Tensor, **inputs: Any) -> Tensor:
            return self._look(components, denoiser, forward, sample, timestep, inputs)

        self._stack.enter_context(hooked(denoiser, answer))
        # Called by a denoiser that raises, too, after which no pipeline cleans up.
        self._stack.callback(denoiser.register_forward_hook(lambda *_: self._leave(), always_call=True).remove)

    def cleanup_models(self, denoiser: nn.Module) -> None:
        """Leaves the denoiser as it was."""
        self._leave()
        super().cleanup_models(denoiser)

    def forward(self, pred_cond: Tensor, pred_uncond: Tensor | None = None) -> GuiderOutput:
        """Text guidance's prediction, moved where features were read. Both predictions of the result are then the
        moved one: pipelines that compare their lengths (Qwen-Image) must not take the change back."""
        given = super().forward(pred_cond, pred_uncond)
        if not self._read:
            return given
        reading, energy, _ = self._read[-1]
        energy = torch.stack([energy for _, energy, _ in self._read]).sum(0)
        gradient = torch.stack([gradient for _, _, gradient in self._read]).sum(0)
        change = self._change(reading, gradient)
        family = family_of(reading.denoiser)
        moved = family.rescaled(given.pred, pred_cond)
        moved = (moved + family.packed(change)).to(given.pred.dtype)
        values = (energy, norm([gradient]), norm([change]))
        self.trace.append(StepTrace(self._step, reading.timestep.item(), *(v.cpu() for v in values), "shared", []))
        self._read.clear()
        return GuiderOutput(pred=moved, pred_cond=moved, pred_uncond=pred_uncond)

    def save_pretrained(self, save_directory: str | Path, push_to_hub: bool = False, **arguments: Any) -> None:
        """Writes guider_config.json and, where there is one, the folder `head`. The control is not saved."""
        if self.head is not None:
            self.head.save_pretrained(Path(save_directory) / HEAD)
        super().save_pretrained(save_directory, push_to_hub=push_to_hub, **arguments)

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path: str | Path, subfolder: str | None = None, **arguments: Any
    ) -> Self:
        """Loads a guider from its folder, or from "owner/name" on the hub.

        Raises:
            FileNotFoundError: there is no such folder or repository.
            ValueError: the head's files are damaged.
        """
        folder = find_folder(pretrained_model_name_or_path) / (subfolder or ".")
        guider = cls.from_config(cls.load_config(folder), **arguments)
        if (folder / HEAD).is_dir():
            guider.head = load_head(folder / HEAD)
        return guider

    def _reads_now(self) -> bool:
        """Whether the coming call is one of those that are read."""
        guidance = self.guidance
        if guidance is None or not self._enabled:
            return False
        total = self._num_inference_steps
        if not guidance.start * total <= self._step < guidance.stop * total:
            return False
        if guidance.branch == "uncond" and self.num_conditions == 1:
            raise ValueError(
                f"branch: expected with branch=uncond a call under the negative prompt, step {self._step} has none: "
                f"guidance_scale is {self.guidance_scale}, or text guidance is over; use branch=cond"
            )
        return guidance.branch == "both" or self.is_conditional == (guidance.branch == "cond")

    def _check(self, denoiser: nn.Module, components: ModularPipeline) -> None:
        taps(denoiser)
        check_weights("denoiser", denoiser)
        for term in self.guidance.terms:
            check_head(term.head, components)
        check_scheduler(components.scheduler, self.guidance.update, flow=family_of(denoiser).flow)
        self._scheduler = components.scheduler

    def _look(
        self,
        components: ModularPipeline,
        denoiser: nn.Module,
        forward: Forward,
        sample: Tensor,
        timestep: Tensor,
        inputs: dict[str, Any],
    ) -> Tensor:
        """The denoiser's own output; its features' energy and gradient are kept."""
        with torch.enable_grad():
            x = sample.detach().requires_grad_()
            prediction = predict(denoiser, x, timestep, forward=forward, **inputs)
        factor, (height, width) = components.vae_scale_factor, sample.shape[-2:]
        reading = Reading(
            x=x,
            latent=x.detach()[:, : latent_channels(denoiser)],
            output=prediction.output.detach(),
            features=prediction.features,
            timestep=timestep,
            step=self._step,
            images=len(sample),
            image_size=(height * factor, width * factor),
            denoiser=denoiser,
            num_timesteps=components.scheduler.config.num_train_timesteps,
            rows=slice(0, len(sample)),
            shared=True,
        )
        energy, gradient = energy_and_gradient(self.guidance.terms, reading)
        self._read.append((reading, energy.value, gradient))
        return reading.output

    def _change(self, reading: Reading, gradient: Tensor) -> Tensor:
        """How the rule changes the denoiser's output: (B, C, h, w)."""
        rule, channels = self.guidance.rule, gradient.shape[1]
        abar, kind = alpha_bar(self._scheduler, reading.timestep), prediction_type(self._scheduler)
        if rule.in_units and (kind == "epsilon" or holds_signal(kind, abar)):
            gradient = self._images.in_units(gradient)
        return rule.function(
            gradient,
            reading.output[:, :channels],
            reading.latent,
            abar.to(gradient.device, torch.promote_types(abar.dtype, gradient.dtype)),
            prediction_type=kind,
        )

    def _leave(self) -> None:
        self._stack.close()


def _running_components() -> ModularPipeline:
    """The modular pipeline whose block prepares its models: blocks tell a guider neither scheduler nor sizes.

    Raises:
        ValueError: no block of one does.
    """
    frame = inspect.currentframe()
    while frame is not None:
        found = frame.f_locals.get("components") if frame.f_code.co_name == "__call__" else None
        if isinstance(found, ModularPipeline):
            return found
        frame = frame.f_back
    raise ValueError("guider: expected to be called by a block of a modular pipeline, got another caller")
