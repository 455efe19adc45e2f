"""What a U-Net is conditioned on beside the time: the condition that a head was trained under, for every model family."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

# Relative difference of two text embeddings that is still rounding.
ROUNDING = {torch.float16: 1e-2, torch.bfloat16: 2e-2}


@dataclass(frozen=True)
class Condition:
    """One prompt's embeddings.

    text: (1, tokens, width), the U-Net's encoder_hidden_states.
    pooled: (1, width) where the family has a pooled embedding and time ids (SDXL), else None.
    """

    text: Tensor
    pooled: Tensor | None = None

    def inputs(self, rows: int, image_size: tuple[int, int], like: Tensor) -> dict[str, Any]:
        """Arguments of the U-Net for `rows` rows, in the dtype and on the device of `like`.

        Args:
            image_size: (height, width) of the image being made. Time ids say that it is an uncropped original of that
                size (Podell et al., 2023, section 2.2), as in training.
        """
        inputs: dict[str, Any] = {"encoder_hidden_states": self.text.to(like).expand(rows, -1, -1)}
        if self.pooled is not None:
            ids = like.new_tensor([[*image_size, 0, 0, *image_size]])
            pooled = self.pooled.to(like).expand(rows, -1)
            inputs["added_cond_kwargs"] = {"text_embeds": pooled, "time_ids": ids.expand(rows, -1)}
        return inputs


def encode_condition(pipe: Any, prompt: str, device: torch.device | None = None) -> Condition:
    """The condition of one prompt, by the pipeline's own text encoders.

    Raises:
        ValueError: the pipeline has no text encoder.
    """
    if all(getattr(pipe, name, None) is None for name in ("text_encoder", "text_encoder_2")):
        raise ValueError(
            f"prompt: the head reads features under the prompt {prompt!r}, and this {type(pipe).__name__} has no text "
            "encoder to embed it: expected pipe.text_encoder, got None; keep it, or guide with branch=cond"
        )
    with torch.no_grad():
        encoded = pipe.encode_prompt(
            prompt=prompt,
            device=device or pipe._execution_device,
            num_images_per_prompt=1,
            do_classifier_free_guidance=False,
        )
    # Two values in Stable Diffusion 1 and 2 (prompt, negative), four in SDXL (both pooled ones behind them).
    return Condition(encoded[0], encoded[2] if len(encoded) == 4 else None)


def replaced(held: dict[str, Any], own: dict[str, Any]) -> dict[str, Any] | None:
    """A U-Net's arguments `held` under the condition `own` instead; None where they say the same already.

    Other entries, such as picture embeddings, are kept; so are time ids of another form than the head's (the SDXL
    refiner's aesthetic score).
    """
    text, added = own["encoder_hidden_states"], dict(own.get("added_cond_kwargs", {}))
    held_added = held.get("added_cond_kwargs") or {}
    same = _alike(held["encoder_hidden_states"], text)
    if added:
        if held_added["time_ids"].shape != added["time_ids"].shape:
            added["time_ids"] = held_added["time_ids"]
        same &= _alike(held_added["text_embeds"], added["text_embeds"])
        same &= torch.equal(held_added["time_ids"].to(added["time_ids"]), added["time_ids"])
        own = {**own, "added_cond_kwargs": {**held_added, **added}}
    return None if same else {**held, **own}


def _alike(one: Tensor, other: Tensor) -> bool:
    if one.shape != other.shape:
        return False
    difference, size = ((one - other).float().flatten(1).norm(dim=1), other.float().flatten(1).norm(dim=1))
    return bool((difference <= ROUNDING.get(one.dtype, 1e-4) * size).all())
