"""What the applications share: held-out images as references, inverted once, and images made after them."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf
from rich.progress import track
from torch import Tensor

from experiments.quality.relative import RawFeatures
from rg.backbone.diffusion import DiffusionBackbone
from rg.backbone.inversion import invert
from rg.cli import compose_config
from rg.data.samples import Samples
from rg.data.shards import read_shards
from rg.detectors import AttributeClassifier
from rg.generation import generate, image_seeds
from rg.guidance.guidance import GuidanceTerm
from rg.heads import load_head
from rg.heads.correspondence import CorrespondenceHead
from rg.heads.relative import RelativeHead
from rg.io.figures import image_grid, save_figure
from rg.io.files import write_json, write_text
from rg.io.images import from_bytes, open_saved, pixels, save_image
from rg.metrics.statistics import paired_gain

RAW = "raw"  # in place of a head's name: the backbone's own features
Heads = list[tuple[RelativeHead, float]]


class RawCorrespondence(CorrespondenceHead):
    """The correspondence energy on the backbone's own features, which DragDiffusion and DIFT compare."""

    forward = RawFeatures.forward


class Bench:
    """References, their inverted noise, and who judges what is made after them.

    Args:
        cfg: with world, split, images, batch_size, seed, sampling, classifier.
        run_dir: keeps what is made, in a folder for each method.
        choose: gives the positions of the samples that can be used; None takes all.
        kind: of the scenes, a key of data_prep.marionette.scene.KINDS; None: those of the poses.
    """

    def __init__(
        self,
        cfg: DictConfig,
        run_dir: Path,
        choose: Callable[[Samples], Sequence[int]] | None = None,
        kind: str | None = None,
    ) -> None:
        self.cfg, self.run_dir = cfg, run_dir
        edit = compose_config("edit", [f"world={cfg.world}"])
        self.guidance = edit.guidance
        self.sampling = {**OmegaConf.to_container(edit.sampling, resolve=True), **cfg.sampling}
        self.backbone: DiffusionBackbone = instantiate(edit.world.backbone)
        self.detectors = {name: instantiate(edit.world.detectors[name]) for name in edit.world.judges}
        self.classifier = AttributeClassifier.from_pretrained(cfg.classifier)
        words = [f"data.builder.root=data/{cfg.world}_{kind}", f"++data.builder.source.kinds={{one: 0.0, {kind}: 1.0}}"]
        words = [f"world={cfg.world}", "data=pose", *(words if kind else [])]
        builder = compose_config("train", words).data.builder
        instantiate(builder)(split=cfg.split, n=cfg.images)
        found = read_shards(Path(builder.root) / cfg.split, cfg.images, autoencoder_id=self.backbone.autoencoder_id)
        self.samples: Samples = found if choose is None else found.take(choose(found))
        self.given = from_bytes(self.samples.decoded())
        self.latents = torch.stack([self.samples[i]["latent_mean"] for i in range(len(self.samples))])
        taps = self.backbone.predict(self.latents[:1].to(self.backbone.device), torch.zeros(1)).features
        self.grid = (taps[-1].shape[-2], taps[-1].shape[-1])
        self._noise: Tensor | None = None

    def batches(self, what: str) -> Iterator[slice]:
        """Slices of the references, with a progress bar."""
        size, count = self.cfg.batch_size, len(self.samples)
        yield from track([slice(i, min(i + size, count)) for i in range(0, count, size)], description=what)

    def noise(self) -> Tensor:
        """Noise (B, C, h, w) from which sampling without text guidance leads back to each reference."""
        if self._noise is None:
            steps, parts = self.sampling["num_inference_steps"], []
            for rows in self.batches("inverting"):
                pairs = zip(self.latents[rows], self.samples.prompt[rows], strict=True)
                parts += [invert(self.backbone, x[None], num_inference_steps=steps, prompt=text) for x, text in pairs]
            self._noise = torch.cat(parts)
        return self._noise

    def widths(self) -> dict[str, Any]:
        """Hyperparameters of a head without weights on this backbone."""
        widths = {"tap_channels": self.backbone.tap_channels, "time_embed_dim": self.backbone.time_embed_dim}
        return {**widths, "output_scale": 2, "projection_dim": 8, "norm_groups": 1}

    def heads(self, name: str, method: Mapping[str, Any]) -> Heads:
        """The heads of a method and their weights.

        Raises:
            FileNotFoundError: there is no such head.
            ValueError: a head that does not compare with a reference or was made for another backbone.
        """
        found: Heads = []
        for head_name, weight in method["heads"].items():
            head = RawCorrespondence(**self.widths()).eval() if head_name == RAW else load_head(head_name)
            if not isinstance(head, RelativeHead):
                expected = "expected a head that compares with a reference"
                raise ValueError(f"methods.{name}.heads.{head_name}: {expected}, got {type(head).__name__}")
            head.check_taps(self.backbone.tap_channels, self.backbone.time_embed_dim, self.backbone.condition_dim)
            found.append((head.to(self.backbone.device).requires_grad_(False), float(weight)))
        return found

    def readout_size(self, head: RelativeHead) -> tuple[int, int]:
        """(height, width) of a head's readouts here."""
        return head.hparams.output_scale * self.grid[0], head.hparams.output_scale * self.grid[1]

    def make(
        self,
        name: str,
        method: Mapping[str, Any],
        terms: Callable[[Heads, slice], list[GuidanceTerm]],
        *,
        prompts: Sequence[str],
        rounds: int | None = None,
    ) -> Tensor:
        """What a method makes after every reference; images that are saved are not made again.

        Args:
            method: {"heads": {name: weight}, "guidance": settings of guidance, "sampling": of the pipeline}.
            terms: the energies of the references of a slice.
            prompts: what the new images are to show.
            rounds: images after each reference, each from new noise; None: one, from the reference's own.

        Returns:
            (rounds, B, 3, H, W), or (B, 3, H, W), in [-1, 1].
        """
        heads, count = self.heads(name, method), len(self.samples)
        paths = [
            [self.run_dir / name / f"{i:05d}{'' if rounds is None else f'-{r}'}.png" for i in range(count)]
            for r in range(rounds or 1)
        ]
        for rows in self.batches(name):
            missing = [r for r, row in enumerate(paths) if not all(path.is_file() for path in row[rows])]
            for r, images in self._edit(heads, terms, method, rows, prompts[rows], missing, own_noise=rounds is None):
                for image, path in zip(images, paths[r][rows], strict=True):
                    save_image(image, path)
        images = [torch.stack([from_bytes(pixels(open_saved(p, self.samples.size))) for p in row]) for row in paths]
        return images[0] if rounds is None else torch.stack(images)

    def _edit(
        self,
        heads: Heads,
        terms: Callable[[Heads, slice], list[GuidanceTerm]],
        method: Mapping[str, Any],
        rows: slice,
        prompts: Sequence[str],
        rounds: Sequence[int],
        *,
        own_noise: bool,
    ) -> Iterator[tuple[int, Tensor]]:
        """The images (b, 3, H, W) of every round, of the references of a slice that is recorded once."""
        pipe, guidance, count = self.backbone.pipeline, None, len(self.samples)
        arguments = {**self.sampling, **method.get("sampling", {})}
        seeds = image_seeds(self.cfg.seed, range(rows.start, rows.stop))
        noise = self.noise()[rows] if rounds and (heads or own_noise) else None
        if heads and rounds:
            guidance = instantiate(self.guidance, **method.get("guidance", {}))(terms=terms(heads, rows))
            with guidance.record(pipe):  # an inverted image comes back without text guidance alone
                given = {**arguments, "guidance_scale": 1.0, "latents": noise}
                generate(pipe, self.samples.prompt[rows], seeds=seeds, **given)
        if own_noise:
            arguments["latents"] = noise
        for number in rounds:
            new = [seed + (number + 1) * count for seed in seeds]
            yield number, generate(pipe, prompts, seeds=new, guidance=guidance, **arguments)

    @cached_property
    def attributes(self) -> list[dict[str, str]]:
        """What the classifier reads in each reference."""
        return self.classifier.read(self.given)

    def attributes_kept(self, images: Tensor, names: Sequence[str] | None = None) -> Tensor:
        """Share of the attributes (B,) that the classifier reads as in the references; of all, or of those named."""
        pairs = zip(self.attributes, self.classifier.read(images), strict=True)
        shares = []
        for was, now in pairs:
            asked = [name for name in was if names is None or name in names]
            shares.append(sum(now.get(name) == was[name] for name in asked) / len(asked) if asked else torch.nan)
        return torch.tensor(shares)


def table(methods: Mapping[str, Mapping[str, Sequence[float]]], baseline: str, compared: Sequence[str]) -> str:
    """Markdown: a row per method with the mean of every score.

    Args:
        methods: name -> score -> values of the same images.
        compared: beginnings of the scores that get the paired difference to the baseline's, a 95 % interval.
    """
    names = list(next(iter(methods.values())))
    lines = [f"| method | {' | '.join(names)} |", "|---" * (len(names) + 1) + "|"]
    for method, scores in methods.items():
        row = []
        for name in names:
            values = torch.tensor(scores[name])
            text = f"{values.nanmean():.2f}"
            if name.startswith(tuple(compared)) and method != baseline and baseline in methods and len(values) > 1:
                gain = paired_gain(torch.tensor(methods[baseline][name]), values)
                text += f" ({gain['low']:+.2f} to {gain['high']:+.2f})"
            row.append(text)
        lines.append(f"| {method} | {' | '.join(row)} |")
    return "\n".join(lines) + "\n"


def publish(
    bench: Bench,
    scores: Mapping[str, Mapping[str, Sequence[float]]],
    baseline: str,
    compared: Sequence[str],
    grid: Mapping[str, Tensor],
    command_line: str,
    marks: Mapping[str, Any] | None = None,
) -> str:
    """Writes table.md, grid.png and results.json into the bench's folder; returns the table, see `table`.

    Args:
        grid: rows of images (N, 3, H, W) in [0, 1] by name.
        marks: arrows and boxes of the images, in pixels, for those who draw them.
    """
    text = table(scores, baseline, compared)
    save_figure(image_grid(dict(grid), side=128), bench.run_dir / "grid.png")
    write_text(bench.run_dir / "table.md", text)
    for i, image in enumerate(bench.given):
        save_image(image, bench.run_dir / "reference" / f"{i:05d}.png")
    results = {"command": command_line, "images": len(bench.samples), "scores": scores, "marks": dict(marks or {})}
    write_json(bench.run_dir / "results.json", results)
    return text


def check_methods(methods: DictConfig) -> dict[str, dict[str, Any]]:
    """The methods of a configuration as plain values; null ones are left out.

    Raises:
        ValueError: there is none, or one says nothing of heads or gives all of them the weight 0.
    """
    methods = OmegaConf.masked_copy(methods, [name for name, method in methods.items() if method is not None])
    if not methods:
        raise ValueError("methods: expected at least one {NAME: {heads: {HEAD: weight}}}, got none")
    for name, method in methods.items():
        if not OmegaConf.is_dict(method) or not OmegaConf.is_dict(method.get("heads")):
            raise ValueError(f"methods.{name}: expected {{heads: {{HEAD: weight}}}}, got {method}")
        if method.heads and not any(method.heads.values()):
            raise ValueError(f"methods.{name}.heads: expected a weight other than 0, got {method.heads}")
    return OmegaConf.to_container(methods, resolve=True)
