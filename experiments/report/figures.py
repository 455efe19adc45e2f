"""What the report measures: for every figure of the paper the runs that make it, and the scores that it shows.

A run is a command whose folder keeps what it has made; a stored run, of which the page is made, is
{"command", "seconds", "scores": {method: {score: [one value per image]}}, "examples": [...]}, see `store`.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Run:
    """A command.

    Args:
        name: of the run's folder and of what is stored of it.
        module: that is started.
        words: its settings.
        quick: settings that stand after them in the reduced report.
    """

    name: str
    module: str
    words: tuple[str, ...]
    quick: tuple[str, ...]

    def command(self, quick: bool) -> list[str]:
        """The words of the command line, from "python" on."""
        words = (f"name={folder(quick)}_{self.name}", *self.words, *(self.quick if quick else ()))
        last = {word.lstrip("+").partition("=")[0]: word for word in words}
        return ["python", "-m", self.module, *last.values()]


@dataclass(frozen=True)
class Row:
    """One comparison of two methods on the same images.

    Args:
        title: what is compared, in words.
        run: name of a Run.
        metric: the score, as the run names it.
        baseline, ours: methods.
        lower: whether less is better.
        goal: the share of the baseline's mean that ours should reach, at most or at least; None: that the two differ.
    """

    title: str
    run: str
    metric: str
    baseline: str
    ours: str
    lower: bool = False
    goal: float | None = None


@dataclass(frozen=True)
class Figure:
    """A figure of the paper: its key in summary.json, a title, what one sees, and rows, the headline first."""

    key: str
    title: str
    text: str
    rows: tuple[Row, ...]
    shown: tuple[str, ...] = field(default=("reference", "unguided"))


def folder(quick: bool) -> str:
    """Name of the folder of results, and the beginning of the names of runs."""
    return "report_quick" if quick else "report"


EVALUATE, APPLICATIONS = "rg.evaluate", "experiments.applications"
FEW = ("images=16", "sampling.num_inference_steps=25")
SHORT = ("images=12", "+sampling.num_inference_steps=25")


def _control(kind: str) -> tuple[str, ...]:
    """Settings of an evaluation of a depth or edge head on the poses that pose heads are evaluated on."""
    source = (f"data.builder.root=data/marionette_{kind}_one", "++data.builder.source.kinds={one:1.0}")
    return (f"data={kind}", f"guidance={kind}", f"head.path={kind}", "images=32", *source)


TWO = ("data.builder.root=data/marionette_two", "++data.builder.source.kinds={one:0.0,two:1.0}", "images=32")
COMPARED = ("methods.correspondence=null", "methods.both_heads=null")
RUNS = (
    Run("pose", EVALUATE, ("images=32",), FEW),
    Run("depth", EVALUATE, _control("depth"), FEW),
    Run("edge", EVALUATE, _control("edge"), FEW),
    Run("two", EVALUATE, TWO, FEW),
    Run("drags", f"{APPLICATIONS}.drags", COMPARED, ("images=16", "+sampling.num_inference_steps=20")),
    Run("variations", f"{APPLICATIONS}.variations", ("images=16", "rounds=2"), ("images=6", *SHORT[1:])),
    Run("same_person", f"{APPLICATIONS}.same_person", (), SHORT),
)


def _pck(title: str, run: str) -> Sequence[Row]:
    judges = ("hourglass", "transformer")
    return [Row(f"{title}, {judge}", run, f"PCK@0.05, {judge}", "unguided", "guided") for judge in judges]


CONTROLLED = ("ceiling", "readout", "unguided", "guided")
EITHER = "distance, {}, either side"
FIGURES = (
    Figure(
        "fig4",
        "Spatially aligned control",
        "A pose, a depth map or edges steer the model; the prompt is another image's. From left to right: the image "
        "that the control comes from, with the pose that a judge sees in it; the readout while guiding; without "
        "guidance; guided.",
        (*_pck("pose", "pose"), *_pck("depth", "depth"), *_pck("edges", "edge")),
        CONTROLLED,
    ),
    Figure(
        "fig9",
        "Two people, one before the other",
        "The head was trained on single people; nobody told it which limb is whose.",
        tuple(_pck("two people", "two")),
        CONTROLLED,
    ),
    Figure(
        "fig2",
        "Drags",
        "Four points of a limb are dragged with its end: the point at the arrow's tail is to come to its head, the "
        "rest to stay. Where it came says a judge that knows nothing of heads; it may take one hand for the other, so "
        "the nearer of the two counts.",
        (
            *(
                Row(f"pixels from the goal, {j}", "drags", EITHER.format(j), "unguided", "ours", lower=True, goal=0.25)
                for j in ("hourglass", "transformer")
            ),
            *(Row(f"arrived, {j}", "drags", f"arrived, {j}", "unguided", "ours") for j in ("hourglass", "transformer")),
            Row("pixels from the goal, usual matcher", "drags", "distance, matcher", "unguided", "ours", lower=True),
            *(
                Row(f"raw features on four points, {j}", "drags", EITHER.format(j), "unguided", "raw_limb", lower=True)
                for j in ("hourglass", "transformer")
            ),
        ),
        ("reference", "unguided", "ours"),
    ),
    Figure(
        "fig5",
        "Drags against raw features",
        "The same drags by the energy that DragDiffusion minimises, on the backbone's own features, are the baseline: "
        "at the limb's end alone, as there, and on the four points that ours drags.",
        (
            *(
                Row(f"pixels from the goal, {j}", "drags", EITHER.format(j), "raw_features", "ours", lower=True, goal=1)
                for j in ("hourglass", "transformer")
            ),
            *(
                Row(f"arrived, {j}", "drags", f"arrived, {j}", "raw_features", "ours", goal=1)
                for j in ("hourglass", "transformer")
            ),
            Row("PSNR outside, dB", "drags", "PSNR outside", "raw_features", "ours", goal=1),
            Row("attributes kept", "drags", "attributes kept", "raw_features", "ours", goal=1),
            *(
                Row(f"against four points, {j}", "drags", EITHER.format(j), "raw_limb", "ours", lower=True, goal=1)
                for j in ("hourglass", "transformer")
            ),
        ),
        ("reference", "raw_features", "raw_limb", "ours"),
    ),
    Figure(
        "fig6",
        "Variations of one image",
        "New noise, and a prompt that says nothing of looks; the appearance head keeps them. Its strength grows to the "
        "right.",
        (
            Row("attributes kept", "variations", "attributes kept", "unguided", "default"),
            Row("appearance distance", "variations", "appearance distance", "unguided", "default", lower=True),
            Row(
                "pose diversity, hourglass, pixels", "variations", "pose diversity, hourglass", "unguided", "default",
                goal=0.5,
            ),
        ),
        ("reference", "unguided", "weak", "default", "strong"),
    ),
    Figure(
        "fig7",
        "The same person elsewhere",
        "A detector finds both faces by itself, the identity head compares them within the boxes. Verified: a "
        "classifier reads hair, its length, glasses and hat as in the reference.",
        (
            Row("verified", "same_person", "verified", "unguided", "identity", goal=2),
            Row("traits kept", "same_person", "traits kept", "unguided", "identity"),
            Row("appearance distance", "same_person", "appearance distance", "unguided", "identity", lower=True),
        ),
        ("reference", "unguided", "identity"),
    ),
)  # fmt: skip
