"""What differs between the families of denoisers that guidance knows, one class each.

U-Nets of Stable Diffusion: a tap is the output of `conv2` of a decoder ResNet block, before the residual is added (Luo
et al., 2024, section 3.1). Transformers: a tap is the output of a block, whose tokens are patches of the latents, laid
out as a map. A further family is a class here, and a row of TRANSFORMERS.
"""

from collections.abc import Callable
from typing import Any, ClassVar

import torch
from diffusers import (
    Flux2Transformer2DModel,
    FluxTransformer2DModel,
    PixArtTransformer2DModel,
    QwenImageTransformer2DModel,
    SanaTransformer2DModel,
    SD3Transformer2DModel,
)
from torch import Tensor, nn
from torch.nn.functional import pixel_shuffle, pixel_unshuffle

# Of a block: the image's tokens, behind those of the text or alone; or those of the text and of the image.
TapOutput = Tensor | tuple[Tensor, Tensor]


class Family:
    """A denoiser as guidance sees it: latents (B, C, h, w) in, features (B, C_l, h_l, w_l) out.

    attribute: where pipelines hold the denoiser. sample: what it calls its input.
    branches: who says whether a batch holds both halves of text guidance: the "pipeline" by its property, what it tells
        its "encode_prompt", or "never", where it has no unconditional half.
    encoding: arguments of the pipeline's encode_prompt beside one prompt.
    flow: whether it is a flow-matching model: it predicts noise - x0 at x_t = (1 - s) x0 + s noise, with s the
        scheduler's timestep over their number (Liu et al., 2023; Lipman et al., 2023).
    """

    attribute: ClassVar[str] = "transformer"
    sample: ClassVar[str] = "hidden_states"
    branches: ClassVar[str] = "pipeline"
    encoding: ClassVar[dict[str, Any]] = {"do_classifier_free_guidance": False}
    flow: ClassVar[bool] = False

    def __init__(self, denoiser: nn.Module) -> None:
        self.denoiser = denoiser

    def taps(self) -> dict[str, nn.Module]:
        """Names and modules of the taps in the order in which they run."""
        return {f"transformer_blocks.{i}": block for i, block in enumerate(self.denoiser.transformer_blocks)}

    def tap_channels(self) -> list[int]:
        """Channels of the taps, in their order."""
        config = self.denoiser.config
        return [config.num_attention_heads * config.attention_head_dim] * len(self.taps())

    def tokens(self, output: TapOutput, count: int) -> Tensor:
        """What a tap gives of the image: `count` = h_l * w_l tokens (B, count, C), or a map."""
        return output

    def with_tokens(self, output: TapOutput, tokens: Tensor) -> TapOutput:
        """A tap's output with other tokens of the image, or another map."""
        return tokens

    def patch(self) -> int:
        """Latents per token and axis."""
        return self.denoiser.config.patch_size

    def time_layers(self) -> tuple[Callable[[Tensor], Tensor], nn.Module]:
        """What makes sinusoids of time indices, and what embeds them."""
        raise NotImplementedError

    def condition_dim(self) -> int:
        """Width of the text embeddings."""
        return self.denoiser.config.caption_channels

    def condition(self, encoded: tuple[Any, ...]) -> dict[str, Any]:
        """The fields of a Condition of what the pipeline's encode_prompt gives for one prompt."""
        raise NotImplementedError

    def latent_channels(self) -> int:
        """Channels of the latent itself: inpainting adds input channels behind it, learned variance output channels."""
        config = self.denoiser.config
        return min(config.in_channels, config.out_channels or config.in_channels)

    def scheduler_time(self, timestep: Tensor) -> Tensor:
        """The scheduler's timestep of what pipelines give the denoiser, who repeat it for every row."""
        return timestep.flatten()[0]

    def denoiser_time(self, timestep: Tensor) -> Tensor:
        """What the denoiser is given for the scheduler's timesteps."""
        return timestep

    def time_rounding(self) -> float:
        """How far, relatively, the denoiser's time may lie from the scheduler's timestep."""
        return 0.0

    def unpacked(self, sample: Tensor, inputs: dict[str, Any]) -> Tensor:
        """What pipelines give as latents, as (B, C, h, w); arguments that only say how they lie are taken away."""
        return sample

    def packed(self, output: Tensor) -> Tensor:
        """An output (B, C', h, w) as pipelines expect it."""
        return output

    def rescaled(self, combined: Tensor, under_prompt: Tensor) -> Tensor:
        """What modular pipelines make of text guidance's output and of that under the prompt, as they lay them out."""
        return combined

    def call(self, forward: Callable[..., Any], sample: Tensor, timestep: Tensor, **inputs: Any) -> tuple[Tensor, ...]:
        """The denoiser's own answer, by `forward`, to latents (B, C, h, w) at the scheduler's timesteps (B,)."""
        return forward(sample, timestep=timestep, **inputs)


class UNet(Family):
    """Stable Diffusion 1, 2 and SDXL."""

    attribute, sample = "unet", "sample"

    def taps(self) -> dict[str, nn.Module]:
        """From coarse to fine; none where the denoiser has no decoder of ResNet blocks."""
        return {
            f"up_blocks.{i}.resnets.{j}.conv2": resnet.conv2
            for i, block in enumerate(getattr(self.denoiser, "up_blocks", ()))
            for j, resnet in enumerate(getattr(block, "resnets", ()))
        }

    def tap_channels(self) -> list[int]:
        """Those of the layer under an adapter such as LoRA's, which hides its sizes."""
        return [getattr(tap, "base_layer", tap).out_channels for tap in self.taps().values()]

    def patch(self) -> int:
        """Every latent is a place of its own."""
        return 1

    def time_layers(self) -> tuple[nn.Module, nn.Module]:
        return self.denoiser.time_proj, self.denoiser.time_embedding

    def scheduler_time(self, timestep: Tensor) -> Tensor:
        """As it is given: a scalar."""
        return timestep

    def condition_dim(self) -> int:
        """768 in Stable Diffusion 1, 1024 in 2, 2048 in SDXL."""
        return self.denoiser.config.cross_attention_dim

    def condition(self, encoded: tuple[Any, ...]) -> dict[str, Any]:
        """Two values in Stable Diffusion 1 and 2 (prompt, negative), four in SDXL (both pooled ones behind them)."""
        return {"text": encoded[0], "pooled": encoded[2] if len(encoded) == 4 else None}


class PixArt(Family):
    """PixArt-alpha and Sigma (Chen et al., 2024)."""

    branches = "encode_prompt"

    def time_layers(self) -> tuple[nn.Module, nn.Module]:
        embedding = self.denoiser.adaln_single.emb
        return embedding.time_proj, embedding.timestep_embedder

    def condition(self, encoded: tuple[Any, ...]) -> dict[str, Any]:
        """The prompt's embedding and mask, then the negative prompt's."""
        return {"text": encoded[0], "mask": encoded[1], "sized": self.denoiser.use_additional_conditions}


class StableDiffusion3(Family):
    """Stable Diffusion 3 and 3.5 (Esser et al., 2024): blocks give the tokens of the text and those of the image."""

    encoding: ClassVar[dict[str, Any]] = {"do_classifier_free_guidance": False, "prompt_2": None, "prompt_3": None}
    flow = True

    def tokens(self, output: TapOutput, count: int) -> Tensor:
        """Those of the image; the text's are no part of a map."""
        return output[1]

    def with_tokens(self, output: TapOutput, tokens: Tensor) -> TapOutput:
        return output[0], tokens

    def time_layers(self) -> tuple[nn.Module, nn.Module]:
        embedding = self.denoiser.time_text_embed
        return embedding.time_proj, embedding.timestep_embedder

    def condition_dim(self) -> int:
        """4096."""
        return self.denoiser.config.joint_attention_dim

    def condition(self, encoded: tuple[Any, ...]) -> dict[str, Any]:
        """The prompt's embedding, the negative prompt's, and both pooled ones."""
        return {"text": encoded[0], "projection": encoded[2]}


class Sana(Family):
    """SANA (Xie et al., 2025): every latent, of 32x32 pixels, is a token."""

    flow = True

    def time_layers(self) -> tuple[nn.Module, nn.Module]:
        embedding = self.denoiser.time_embed.emb
        return embedding.time_proj, embedding.timestep_embedder

    def condition(self, encoded: tuple[Any, ...]) -> dict[str, Any]:
        """The prompt's embedding and mask, then the negative prompt's."""
        return {"text": encoded[0], "mask": encoded[1]}


class Flux(StableDiffusion3):
    """Flux 1: pipelines lay 2x2 latents of C channels out as a token of 4 C, give times in [0, 1], and never have an
    unconditional half; a guidance-distilled model is told the scale of text guidance instead."""

    branches = "never"
    # What pipelines tell guidance-distilled models where their caller says nothing.
    guidance_scale: ClassVar[float] = 3.5
    encoding: ClassVar[dict[str, Any]] = {"prompt_2": None}

    def taps(self) -> dict[str, nn.Module]:
        """Blocks of two streams, then of one, which give both streams too."""
        single = {f"single_transformer_blocks.{i}": b for i, b in enumerate(self.denoiser.single_transformer_blocks)}
        return super().taps() | single

    def patch(self) -> int:
        """Its own patch_size counts packed latents."""
        return PACKED

    def condition(self, encoded: tuple[Any, ...]) -> dict[str, Any]:
        """The prompt's embedding, the pooled one, and ids that are all zero."""
        return {"text": encoded[0], "projection": encoded[1]}

    def latent_channels(self) -> int:
        return super().latent_channels() // PACKED**2

    def scheduler_time(self, timestep: Tensor) -> Tensor:
        """1000 times what is given, in float64: there and back again gives the same."""
        return timestep.flatten()[0].double() * 1000

    def denoiser_time(self, timestep: Tensor) -> Tensor:
        return (timestep.double() / 1000).to(self.denoiser.dtype)

    def time_rounding(self) -> float:
        """Pipelines give times in the denoiser's precision."""
        return torch.finfo(self.denoiser.dtype).eps

    def unpacked(self, sample: Tensor, inputs: dict[str, Any]) -> Tensor:
        """By the ids of the tokens, without the text's.

        Raises:
            ValueError: there are other tokens than one per place, such as those of a reference image.
        """
        places = inputs.pop("img_ids")
        inputs.pop("txt_ids")
        return _one_image(sample, *(int(side) + 1 for side in places.flatten(0, -2)[:, 1:3].amax(0)))

    def packed(self, output: Tensor) -> Tensor:
        return pixel_unshuffle(output, PACKED).flatten(2).transpose(1, 2)

    def call(self, forward: Callable[..., Any], sample: Tensor, timestep: Tensor, **inputs: Any) -> tuple[Tensor, ...]:
        """With the tokens' places as the pipelines say them, and their default scale where none is given."""
        if self.denoiser.config.guidance_embeds and inputs.get("guidance") is None:
            inputs["guidance"] = torch.full_like(timestep, self.guidance_scale, dtype=torch.float32)
        height, width = (side // PACKED for side in sample.shape[-2:])
        inputs |= self.places(height, width, sample, inputs["encoder_hidden_states"].shape[1])
        output = forward(self.packed(sample), timestep=self.denoiser_time(timestep), **inputs)[0]
        return (_unpack(output, height),)

    def places(self, height: int, width: int, sample: Tensor, words: int) -> dict[str, Any]:
        """Where h x w tokens of the image and `words` of the text lie, as the denoiser's arguments."""
        rows, columns = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
        places = torch.stack([torch.zeros_like(rows), rows, columns], -1).flatten(0, 1)
        return {"img_ids": places.to(sample), "txt_ids": sample.new_zeros(words, 3)}


class Flux2(Flux):
    """Flux 2 (dev, Klein): packed as Flux 1. A place has a fourth number, which counts the text's tokens; blocks of one
    stream give both streams in one, the text's first."""

    guidance_scale = 4.0
    encoding: ClassVar[dict[str, Any]] = {}

    def tokens(self, output: TapOutput, count: int) -> Tensor:
        return output[:, -count:] if isinstance(output, Tensor) else output[1]

    def with_tokens(self, output: TapOutput, tokens: Tensor) -> TapOutput:
        if isinstance(output, Tensor):
            return torch.cat([output[:, : -tokens.shape[1]], tokens], 1)
        return output[0], tokens

    def time_layers(self) -> tuple[Callable[[Tensor], Tensor], nn.Module]:
        embedding = self.denoiser.time_guidance_embed
        return embedding.time_proj, embedding.timestep_embedder

    def condition(self, encoded: tuple[Any, ...]) -> dict[str, Any]:
        """The prompt's embedding, and places of its tokens."""
        return {"text": encoded[0]}

    def places(self, height: int, width: int, sample: Tensor, words: int) -> dict[str, Any]:
        one = torch.arange(1)
        image = torch.cartesian_prod(one, torch.arange(height), torch.arange(width), one)
        text = torch.cartesian_prod(one, one, one, torch.arange(words))
        return {"img_ids": image.to(sample.device), "txt_ids": text.to(sample.device)}


class QwenImage(Flux):
    """Qwen-Image: packed as Flux 1, blocks of two streams alone. Its pipelines give each token of the combined output
    the length that it has under the prompt."""

    encoding: ClassVar[dict[str, Any]] = {}

    def taps(self) -> dict[str, nn.Module]:
        return Family.taps(self)

    def time_layers(self) -> tuple[Callable[[Tensor], Tensor], nn.Module]:
        embedding = self.denoiser.time_text_embed
        return lambda index: embedding.time_proj(index / 1000), embedding.timestep_embedder

    def condition(self, encoded: tuple[Any, ...]) -> dict[str, Any]:
        """The prompt's embedding, and no mask: one prompt has no padding."""
        return {"text": encoded[0]}

    def latent_channels(self) -> int:
        return self.denoiser.config.in_channels // PACKED**2

    def unpacked(self, sample: Tensor, inputs: dict[str, Any]) -> Tensor:
        """By the shapes that pipelines give, one for each image."""
        shapes = inputs.pop("img_shapes")[0]
        return _one_image(sample, *shapes[0][1:])

    def places(self, height: int, width: int, sample: Tensor, words: int) -> dict[str, Any]:
        return {"img_shapes": [[(1, height, width)]] * len(sample)}

    def rescaled(self, combined: Tensor, under_prompt: Tensor) -> Tensor:
        return combined * (under_prompt.norm(dim=-1, keepdim=True) / combined.norm(dim=-1, keepdim=True))


# Of Flux 1, 2 and Qwen-Image: latents a side of what is packed into a token.
PACKED = 2


def _one_image(tokens: Tensor, height: int, width: int) -> Tensor:
    """Latents (B, C, h, w) of packed tokens; raises ValueError where there are more than one per place."""
    if tokens.shape[1] != height * width:
        raise ValueError(
            f"latents: expected {height}x{width} tokens as their ids say, got {tokens.shape[1]}: no pipelines with "
            "a second image"
        )
    return _unpack(tokens, height)


def _unpack(tokens: Tensor, height: int) -> Tensor:
    return pixel_shuffle(tokens.transpose(1, 2).unflatten(2, (height, -1)), PACKED)


# The class of diffusers: its family.
TRANSFORMERS: dict[type[nn.Module], type[Family]] = {
    PixArtTransformer2DModel: PixArt,
    SD3Transformer2DModel: StableDiffusion3,
    SanaTransformer2DModel: Sana,
    FluxTransformer2DModel: Flux,
    Flux2Transformer2DModel: Flux2,
    QwenImageTransformer2DModel: QwenImage,
}
NAMES = (
    "a U-Net as pipe.unet (Stable Diffusion 1, 2, SDXL) or the transformer of PixArt, Stable Diffusion 3, SANA, Flux 1 "
    "and 2 or Qwen-Image as pipe.transformer"
)


def transformer_family(denoiser: object) -> type[Family] | None:
    """The family of a transformer, compiled or not; None where it is none that guidance knows."""
    plain = getattr(denoiser, "_orig_mod", denoiser)
    return next((family for kind, family in TRANSFORMERS.items() if isinstance(plain, kind)), None)


def family_of(denoiser: nn.Module) -> Family:
    """A denoiser as one of its family; what is no transformer is taken for a U-Net, see `rg.backbone.denoiser.taps`."""
    return (transformer_family(denoiser) or UNet)(denoiser)
