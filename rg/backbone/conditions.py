"""What a denoiser is conditioned on beside the time, in every family: the condition that a head was trained under."""

from dataclasses import dataclass
from typing import Any

import torch
from diffusers import DiffusionPipeline
from torch import Tensor

from rg.backbone.denoiser import denoiser_of
from rg.backbone.families import family_of

TEXT_ENCODERS = ("text_encoder", "text_encoder_2", "text_encoder_3")
# Relative difference of two text embeddings that is still rounding.
ROUNDING = {torch.float16: 1e-2, torch.bfloat16: 2e-2}


@dataclass(frozen=True)
class Condition:
    """One prompt's embeddings.

    text: (1, tokens, width), the denoiser's encoder_hidden_states.
    pooled: (1, width) where the family has a pooled embedding and time ids (SDXL), else None.
    mask: (1, tokens), 1 for tokens and 0 for padding, where the family has one (PixArt), else None.
    sized: whether the image's size is a condition of its own (PixArt-alpha at 1024 px).
    projection: (1, width), a pooled embedding without time ids (Stable Diffusion 3, Flux), else None.
    """

    text: Tensor
    pooled: Tensor | None = None
    mask: Tensor | None = None
    sized: bool = False
    projection: Tensor | None = None

    def inputs(self, rows: int, image_size: tuple[int, int], like: Tensor) -> dict[str, Any]:
        """Arguments of the denoiser for `rows` rows, in the dtype and on the device of `like`.

        Args:
            image_size: (height, width) of the image being made. Time ids say that it is an uncropped original of that
                size (Podell et al., 2023, section 2.2), as in training.
        """
        inputs: dict[str, Any] = {"encoder_hidden_states": self.text.to(like).expand(rows, -1, -1)}
        if self.pooled is not None:
            ids = like.new_tensor([[*image_size, 0, 0, *image_size]])
            pooled = self.pooled.to(like).expand(rows, -1)
            inputs["added_cond_kwargs"] = {"text_embeds": pooled, "time_ids": ids.expand(rows, -1)}
        if self.projection is not None:
            inputs["pooled_projections"] = self.projection.to(like).expand(rows, -1)
        if self.mask is not None:
            inputs["encoder_attention_mask"] = self.mask.to(like.device).expand(rows, -1)
        if self.sized:
            size, ratio = like.new_tensor([image_size]), like.new_tensor([[image_size[0] / image_size[1]]])
            added = {"resolution": size.expand(rows, -1), "aspect_ratio": ratio.expand(rows, -1)}
            inputs["added_cond_kwargs"] = added
        return inputs

    def replace_in(self, held: dict[str, Any], rows: int, image_size: tuple[int, int]) -> dict[str, Any] | None:
        """A denoiser's arguments `held` for `rows` rows under this condition; None where they say it already."""
        return with_condition(held, self.inputs(rows, image_size, held["encoder_hidden_states"]))


def encode_condition(pipe: DiffusionPipeline, prompt: str, device: torch.device | None = None) -> Condition:
    """The condition of one prompt, by the pipeline's own text encoders.

    Raises:
        ValueError: the pipeline has no text encoder.
    """
    if all(getattr(pipe, name, None) is None for name in TEXT_ENCODERS):
        raise ValueError(
            f"prompt: the head reads features under the prompt {prompt!r}, and this {type(pipe).__name__} has no text "
            "encoder to embed it: expected pipe.text_encoder, got None; keep it, or guide with branch=cond"
        )
    family = family_of(denoiser_of(pipe))
    with torch.inference_mode(False), torch.no_grad():
        device = device or pipe._execution_device
        encoded = pipe.encode_prompt(prompt=prompt, device=device, num_images_per_prompt=1, **family.encoding)
    return Condition(**family.condition(encoded))


def with_condition(held: dict[str, Any], own: dict[str, Any]) -> dict[str, Any] | None:
    """A denoiser's arguments `held` under the condition `own` instead; None where they say the same already.

    Other entries, such as image embeddings, are kept; so are time ids of another form than the head's (the SDXL
    refiner's aesthetic score).
    """
    text, added = own["encoder_hidden_states"], dict(own.get("added_cond_kwargs", {}))
    held_added = held.get("added_cond_kwargs") or {}
    same = _alike(held["encoder_hidden_states"], text)
    if "pooled_projections" in own:
        same &= _alike(held["pooled_projections"], own["pooled_projections"])
    if "encoder_attention_mask" in own:
        same &= _equal(held["encoder_attention_mask"], own["encoder_attention_mask"])
    if added:
        if "time_ids" in added and held_added["time_ids"].shape != added["time_ids"].shape:
            added["time_ids"] = held_added["time_ids"]
        for name, value in added.items():
            same &= (_alike if name == "text_embeds" else _equal)(held_added[name], value)
        own = {**own, "added_cond_kwargs": {**held_added, **added}}
    return None if same else {**held, **own}


def _equal(one: Tensor, other: Tensor) -> bool:
    return torch.equal(one.to(other), other)


def _alike(one: Tensor, other: Tensor) -> bool:
    if one.shape != other.shape:
        return False
    difference, size = ((one - other).float().flatten(1).norm(dim=1), other.float().flatten(1).norm(dim=1))
    return bool((difference <= ROUNDING.get(one.dtype, 1e-4) * size).all())
