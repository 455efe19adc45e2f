"""The model card of the embedded model, from its results alone, and the contact sheet."""

import textwrap
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from PIL import Image
from torch import Tensor

from rg.io.files import atomic


def contact_sheet(images: Tensor, path: Path, columns: int = 8, enlarge: int = 2) -> None:
    """Writes images (N, 3, H, W) uint8 in rows, in their order, as PNG, whole or not at all."""
    count, _, height, width = images.shape
    rows = -(-count // columns)
    sheet = Image.new("RGB", (columns * width, rows * height), "white")
    for i, image in enumerate(images):
        sheet.paste(Image.fromarray(image.permute(1, 2, 0).numpy()), (i % columns * width, i // columns * height))
    sheet = sheet.resize((sheet.width * enlarge, sheet.height * enlarge), Image.Resampling.NEAREST)
    with atomic(path) as temporary:
        sheet.save(temporary, format="PNG")


def _wrap(*sentences: str) -> str:
    return textwrap.fill(" ".join(sentences), 110, break_long_words=False, break_on_hyphens=False)


def training_text(record: dict[str, Any] | None) -> list[str]:
    """What the run says of itself: a row per stage, with whatever of these figures it noted."""
    if not record:
        return []
    stages = {name: found for name, found in record.items() if isinstance(found, dict)}
    minutes = {name: f"{found['seconds'] / 60:.1f}" for name, found in stages.items() if "seconds" in found}
    rows = [
        [name, *(f"{found[key]:,}" if key in found else "-" for key in ("steps", "batch_size")), minutes.get(name, "-")]
        for name, found in stages.items()
    ]
    command = [f"    {record['command']}"] if "command" in record else []
    return ["## Training", *command, table(["stage", "steps", "batch size", "minutes"], rows)]


def measured_text(results: dict[str, Any]) -> str:
    """Autoencoder, distances and people."""
    cfg, psnr = results["settings"], results["psnr"]
    steps, whole = cfg["sampling"]["num_inference_steps"], cfg["whole"]
    method = _wrap(
        f"{cfg['images']:,} samples of held-out prompts, {steps} DDIM steps, at each scale of text guidance. The",
        "*ceiling* is renders of the same scenes through the autoencoder: no sample can be expected to do better.",
        "Shares are ± their standard error.",
    )
    autoencoder = _wrap(
        f"PSNR of the autoencoder on held-out renders: {psnr['mean']:.2f} dB from the mean of the latents,",
        f"{psnr['sampled']:.2f} dB from a sample of them ({psnr['mean'] - psnr['sampled']:.2f} dB less).",
    )
    meaning = _wrap(
        f"The kernel distance (unbiased, on the detector's features) is to {cfg['images']:,} other held-out renders,",
        f"± the jackknife's standard error over {cfg['parts']} parts; standardised features have mean 0 and variance 1",
        f"over those renders. A person is whole with {whole['keypoints']} or more of 18 keypoints found with a",
        f"confidence of {whole['least']} or more.",
    )
    return f"## Measured\n\n    {results['command']}\n\n{method}\n\n{autoencoder}\n\n{main_table(results)}\n\n{meaning}"


def words_text(results: dict[str, Any]) -> str:
    """Whether images show what their prompts name, and whether one word changes one thing."""
    cfg = results["settings"]
    method = _wrap(
        "By the classifier's word. What a prompt leaves out (hair) does not count; no hat and no glasses do. Renders",
        "of one person, portraits included:",
    )
    unseen = _wrap(
        f"Shirt and trousers of colours that are never together in training, {cfg['unseen']} prompts of one person",
        f"at scale {cfg['scale']:g}:",
    )
    changed = _wrap(
        f"One colour word of {cfg['changed']} prompts is changed; the noise stays (scale {cfg['scale']:g}). A word",
        "flips if it is read as asked for before and after. The ceiling is the same scenes recoloured.",
    )
    two = []
    if results["fidelity"]["ceiling"]["two"]:
        two = ["Renders of two people, the attributes of both:", fidelity_table(results, "two")]
    parts = ["### Does an image show what its prompt names?", method, fidelity_table(results, "alone"), *two]
    parts += [unseen, unseen_table(results), "### Does one word change one thing?", changed, changed_table(results)]
    return "\n\n".join(parts)


def card_text(results: dict[str, Any]) -> str:
    """The model card."""
    cfg, counts, timing = results["settings"], results["parameters"], results["latency"][0]
    sizes = ", ".join(f"{name.replace('_', ' ')} {count / 1e6:.2f} million" for name, count in counts.items())
    what = _wrap(
        "A text-to-image latent diffusion model of the marionette world, an ordinary diffusers Stable Diffusion",
        f"folder: half precision, {results['megabytes']:.1f} MB, {sum(counts.values()) / 1e6:.1f} million parameters",
        f"({sizes}); weights `{results['model']}`.",
    )
    seconds = (f"{x['seconds_per_image']:.2f} s at scale {x['guidance_scale']:g}" for x in results["latency"])
    cost = _wrap(
        f"{timing['num_inference_steps']} steps in a batch of {timing['batch_size']}, {timing['threads']} threads on",
        f"{timing['device']}, per image: {', '.join(seconds)}.",
    )
    sheet = _wrap(
        f"`{cfg['sheet']}`: the first {len(results['sheet'])} prompts and seeds at scale {cfg['scale']:g}, none",
        f"picked; the prompts are in `{cfg['results']}`.",
    )
    parts = ["# marionette", what, *training_text(results["training"]), measured_text(results), words_text(results)]
    parts += ["### Cost", cost, "## Contact sheet", sheet]
    return "\n\n".join(parts) + "\n"


ORDER = ("people", "portrait", "sky", "ground", "shirt", "trousers", "hat", "glasses", "hair", "hair_length")


def table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A Markdown table."""
    lines = [f"| {' | '.join(header)} |", "|---" * len(header) + "|"]
    return "\n".join([*lines, *(f"| {' | '.join(row)} |" for row in rows)])


def _percent(found: dict[str, float] | None) -> str:
    return f"{found['share']:.1%} ± {found['sem']:.1%}" if found else "-"


def _sets(figures: dict[str, Any]) -> list[str]:
    """The scales, then the ceiling."""
    return [*sorted(name for name in figures if name != "ceiling"), "ceiling"]


def _names(found: Iterable[str]) -> list[str]:
    return [name for name in (*ORDER, "pair", "all", "every") if name in set(found)]


LABELS = {"all": "**all of these**", "every": "all right at once", "pair": "shirt and trousers at once"}


def _label(name: str) -> str:
    return LABELS.get(name, name.replace("_", " "))


def main_table(results: dict[str, Any]) -> str:
    """Distances and people found."""
    sets = _sets(results["people_found"])
    rows = []
    for form, label in (("raw", "kernel distance"), ("standardised", "standardised kernel distance")):
        found = results["kernel_distance"][form]
        rows.append([label, *(f"{found[name]['value']:.4f} ± {found[name]['sem']:.4f}" for name in sets)])
        excess = [f"{found[name]['excess']:+.4f} ± {found[name]['excess_sem']:.4f}" for name in sets[:-1]]
        rows.append([f"{label}, less the ceiling's", *excess, ""])
    for kind, label in (("one", "person"), ("two", "both people")):
        for key in ("found", "whole"):
            cells = [_percent(results["people_found"][name].get(kind, {}).get(key)) for name in sets]
            rows.append([f"{label} {'found' if key == 'found' else 'found whole'}", *cells])
    return table(["", *sets], rows)


def fidelity_table(results: dict[str, Any], group: str) -> str:
    """Fidelity by attribute for images of one person ("alone") or "two"."""
    found = {name: results["fidelity"][name][group] for name in _sets(results["fidelity"])}
    rows = [[_label(k), *(_percent(f.get(k)) for f in found.values())] for k in _names(found["ceiling"])]
    return table(["", *found], rows)


def unseen_table(results: dict[str, Any]) -> str:
    """Fidelity on pairs of colours that are never together in training."""
    found = results["unseen_pairs"]
    rows = [[_label(k), *(_percent(found[s].get(k)) for s in ("samples", "ceiling"))] for k in _names(found["samples"])]
    return table(["", "samples", "ceiling"], rows)


def changed_table(results: dict[str, Any]) -> str:
    """What changing one colour word changes."""
    keys = ("flipped", "others", "both")
    rows = [
        [_label(name), *(_percent(found[source][key]) for source in ("samples", "ceiling") for key in keys)]
        for name, found in results["changed_words"].items()
    ]
    header = ["word", "it flips", "nothing else does", "both at once"]
    return table([*header, *(f"ceiling: {key}" for key in header[1:])], rows)


def _of(found: dict[str, float], ceiling: dict[str, float]) -> str:
    return f"{found['share']:.1%} ({ceiling['share']:.1%})"
