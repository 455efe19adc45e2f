"""What all commands share: their entry and help, errors of one line, run folders that never collide and can be resumed.

Nothing heavy is imported: `--help` and mistakes on the command line are answered before torch is loaded.
"""

import difflib
import functools
import hashlib
import itertools
import logging
import os
import re
import signal
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from filelock import FileLock, Timeout
from omegaconf import DictConfig, OmegaConf

if TYPE_CHECKING:
    from rg.heads.base import ReadoutHead

CONF = Path(__file__).parents[1] / "conf"
OUTPUTS = "outputs"
MAX_DEPTH = 32  # of lists and mappings in an override
# OSError: a folder that cannot be written to, a full disk; ImportError: Hydra found no such _target_.
BAD_INPUT = (ValueError, OSError, FloatingPointError, ImportError)
INTERRUPTED = 130  # exit status after Ctrl-C, as shells have it
# Overrides of earlier forms: the command (None: any), how the override begins, and what is written today.
RENAMED = (
    (None, "recipe@data.builder=", "pictures=folder pictures.path=my/images pictures.labels=my/labels"),
    (None, "+recipe=", "data=pose, and pictures=folder pictures.path=my/images for images of your own"),
    (None, "recipe.source.path=", "pictures.path=..."),
    (None, "recipe.annotator.path=", "pictures.labels=..."),
    (None, "recipe.", "data.builder...."),
    ("prepare", "root=", "data.builder.root=..."),
    ("edit", "picture=", "reference=..."),
    ("edit", "heads=", "terms=[appearance], or 'terms=[{head: appearance, weight: 1.0}]'"),
    ("edit", "weights=", "'terms=[{head: appearance, weight: 1.0}]'"),
    ("edit", "classes=", "'terms=[{head: my/head, class: module.Class}]'"),
)
# Settings that do not make another run: resume=true finds it whatever they are.
SAME_RUN = r"verbose|batch_size|engine(\.\w+)*|trainer\.(max_steps|max_time|check_val_every_n_epoch|log_every_n_steps)"
# A run's name is a folder's and, with W&B, an id's.
NAME = r"""(?!.*(^|/)\.{0,2}(/|$))[^:;,#?'"\\\s]+"""
_chosen: dict[tuple[str, str], str] = {}


def command(config_name: str, stopped: str = "the same command goes on") -> Callable[..., Callable[[], Any]]:
    """Makes a function of a composed configuration a command, whose overrides are in sys.argv.

    Bad input and what cannot be composed end with one line on stderr; HYDRA_FULL_ERROR=1 shows the stack.

    Args:
        config_name: the file below conf/.
        stopped: what to say after Ctrl-C or SIGTERM, which end with status 130.
    """

    def decorate(function: Callable[[DictConfig], Any]) -> Callable[[], Any]:
        @functools.wraps(function)
        def main() -> Any:
            import hydra

            from rg.settings import check

            @functools.wraps(function)
            def job(cfg: DictConfig) -> Any:
                check(cfg, added_names(sys.argv[1:]), removed_names(sys.argv[1:]))
                if not cfg.get("verbose"):
                    quiet_libraries()
                with _named(cfg.get("run_dir", ".")):
                    return function(cfg)

            main_of = hydra.main(version_base="1.3", config_path=str(CONF), config_name=config_name)
            shown = os.environ.get("HYDRA_FULL_ERROR")
            os.environ["HYDRA_FULL_ERROR"] = "1"  # what Hydra would print is raised, and said in one line here
            try:
                check_overrides(config_name, sys.argv[1:])
                sys.argv[1:] = quote_texts(sys.argv[1:])
                return main_of(one_line_errors(job, stopped, stack=shown == "1"))()
            except KeyboardInterrupt:
                print("\nstopped: nothing has begun", file=sys.stderr)
                raise SystemExit(INTERRUPTED) from None
            except Exception as error:
                if shown == "1" or not (_of_configuration(error) or isinstance(error, BAD_INPUT)):
                    raise
                raise SystemExit(_line(explain(config_name, error, sys.argv[1:]))) from None
            finally:
                os.environ.pop("HYDRA_FULL_ERROR")
                if shown is not None:
                    os.environ["HYDRA_FULL_ERROR"] = shown

        return main

    return decorate


@contextmanager
def _named(folder: str) -> Iterator[None]:
    """Gives errors of the disk a place: what libraries write, their tables and logs, does not say where it is."""
    try:
        yield
    except OSError as error:
        if not error.errno or error.filename is not None:
            raise
        raise OSError(error.errno, error.strerror, folder) from error


def one_line_errors(function: Callable[..., Any], stopped: str = "", stack: bool = False) -> Callable[..., Any]:
    """Ends a function with one line where input, files or numbers are bad or a person stops it; no stack trace.

    Args:
        function: any.
        stopped: what to say after Ctrl-C or SIGTERM.
        stack: show bad input's stack all the same.
    """

    @functools.wraps(function)
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        own = signal.signal(signal.SIGTERM, signal.default_int_handler)
        try:
            return function(*args, **kwargs)
        except KeyboardInterrupt:
            print(f"\nstopped: {stopped}", file=sys.stderr)
            raise SystemExit(INTERRUPTED) from None
        except Exception as error:
            # Hydra wraps what a constructor raises in an exception of its own.
            bad_input = next((e for e in (error, error.__cause__) if isinstance(e, BAD_INPUT)), None)
            if not stack and bad_input is None and _is_lack_of_memory(error):
                found = " ".join(str(error).split()) or "no more of it"
                raise SystemExit(
                    _line(f"memory: expected enough for the sizes and batches asked for, found {found}")
                ) from None
            if stack or (bad_input is None and not _of_configuration(error)):
                raise
            raise SystemExit(_line(str(bad_input or explain("", error, ())))) from None
        finally:
            signal.signal(signal.SIGTERM, own)

    return wrapped


def _line(text: str) -> str:
    """An error as it is printed: in one line, also where a name in it has several."""
    return "error: " + text.strip().replace("\n", "\\n").replace("\r", "\\r")


def compose_config(config_name: str, overrides: Sequence[str]) -> DictConfig:
    """The configuration of another command, within a command or without one."""
    from hydra import compose, initialize_config_dir
    from hydra.core.global_hydra import GlobalHydra

    if GlobalHydra.instance().is_initialized():
        return compose(config_name, list(overrides))
    with initialize_config_dir(str(CONF), version_base="1.3"):
        return compose(config_name, list(overrides))


def added_names(words: Sequence[str]) -> list[str]:
    """Dotted names of settings, not of choices of files, that words add to a configuration: +name=value."""
    names = (word.lstrip("+").partition("=")[0] for word in words if word.startswith("+") and "=" in word)
    return [name for name in names if not name.startswith("hydra") and not (CONF / name.split("@")[0]).is_dir()]


def removed_names(words: Sequence[str]) -> list[str]:
    """Dotted names of settings that words take from a configuration: ~name."""
    return [word[1:].partition("=")[0] for word in words if word.startswith("~")]


def quote_texts(words: Sequence[str]) -> list[str]:
    """The words with the values of texts, such as a prompt's, quoted where Hydra would read something else in them.

    A value that is quoted already, a list or null stays; in a sweep commas part values.
    """
    from hydra.core.override_parser.overrides_parser import OverridesParser
    from hydra.errors import HydraException

    from rg.settings import is_text

    def quoted(word: str) -> str:
        key, given, value = word.partition("=")
        if not given or key[0] in "-~" or not is_text(key.lstrip("+")):
            return word
        try:
            override = OverridesParser.create().parse_override(word)
            if not override.is_sweep_override() and isinstance(override.value(), str | list | None):
                return word
        except HydraException:
            pass
        escaped = value.replace("\\", "\\\\").replace("'", "\\'")
        return f"{key}='{escaped}'"

    return list(words) if {"-m", "--multirun"} & set(words) else [quoted(word) for word in words]


def _is_lack_of_memory(error: BaseException) -> bool:
    # torch has a class of its own for that of GPUs alone.
    return isinstance(error, MemoryError) or (isinstance(error, RuntimeError) and "allocate" in str(error))


def _of_configuration(error: BaseException) -> bool:
    return type(error).__module__.split(".")[0] in ("hydra", "omegaconf")


def near(word: str, known: Sequence[str]) -> str:
    """Which of the known words may have been meant, as the end of a sentence."""
    meant = difflib.get_close_matches(word, known, n=3, cutoff=0.5)
    return f"did you mean {' or '.join(meant)}?" if meant else f"there is {', '.join(sorted(known))}"


def check_overrides(config_name: str, words: Sequence[str]) -> None:
    """Refuses what can be refused without composing: earlier forms, choices that no file of conf/ has.

    Raises:
        ValueError: with the override, and the new form or the near misses.
    """
    name = config_name.split("/")[-1]
    for word in words:
        steps = ((letter in "[{") - (letter in "]}") for letter in word)
        if (depth := max(itertools.accumulate(steps), default=0)) > MAX_DEPTH:
            raise ValueError(f"{word[:40]}...: expected at most {MAX_DEPTH} brackets inside each other, found {depth}")
        for owner, begin, today in RENAMED:
            if owner in (None, name) and word.startswith(begin):
                raise ValueError(f"{word}: now written {today}")
        group, _, value = word.lstrip("+").partition("=")
        folder = CONF / group.split("@")[0]
        if not value or not re.fullmatch(r"[\w/]+", folder.relative_to(CONF).as_posix()) or not folder.is_dir():
            continue
        if value.startswith("{") or any("hydra.searchpath" in other for other in words):
            continue  # the settings themselves, or perhaps a file of another folder
        files = {path.relative_to(folder).as_posix()[:-5] for path in folder.rglob("[!_]*.yaml")}
        for choice in value.split(",") if {"-m", "--multirun"} & set(words) else [value]:
            if choice == "null":
                raise ValueError(f"{word}: expected one of {', '.join(sorted(files))}; ~{group} leaves it out")
            if choice not in files:
                raise ValueError(f"{group}={choice}: no such {group}; {near(choice, sorted(files))}")
            if group in ("experiment", "sweep"):
                _check_fits(name, word, CONF / group / f"{choice}.yaml")


def _check_fits(name: str, word: str, file: Path) -> None:
    """An experiment is for the command in the comment on top of it; rg.evaluate takes the controls of rg.sample too."""
    if not word.startswith("+"):
        raise ValueError(f"{word}: now written +{word}")
    found = re.search(r"^# (python -m \S*?(\w+) .*?)(?:\s{3,}|$)", file.read_text(encoding="utf-8"), re.MULTILINE)
    takes = {"evaluate": ("evaluate", "sample"), "cost": ("train", "sample", "evaluate", "cost")}.get(name, (name,))
    if found and found[2] not in takes:
        raise ValueError(f"{word}: is for another command: {found[1]}")


def explain(config_name: str, error: Exception, words: Sequence[str]) -> str:
    """What is wrong with overrides that do not compose, in one line."""
    text = " ".join(f"{error} {error.__cause__ or ''}".split())
    if (word := getattr(error, "override", None)) and word not in text:
        text = f"{word}: {text}"
    if ambiguous := re.search(r"Ambiguous value for argument '(.*?)' 1\.", text):
        key, _, value = ambiguous[1].partition("=")
        return f"{ambiguous[1]}: a value with commas is quoted twice: '{key}=\"{value}\"'; in brackets it is a list"
    if "Recursive interpolation" in text:
        asked = "; ".join(word for word in words if "${" in word)
        return f"{asked or text}: expected a value that does not lead back to itself"
    if unknown := re.search(r"Could not override '([^']+)'", text):
        return f"{unknown[1]}: no such setting; {near(unknown[1], _settings(config_name, words))}"
    if ours := re.search(r"^ValueError raised while resolving interpolation: (.*?) full_key: ", text):
        return ours[1]
    if missing := re.search(r"Missing mandatory value: (\S+)", text):
        return f"{missing[1]}: not given, expected {missing[1]}=..."
    if called := re.search(r"^Error in call to target '.*?\.?(\w+)': .*? full_key: (\S+)", text):
        return f"{called[2]}: {called[1]}: {str(error.__cause__).splitlines()[0]}"
    return text


def _settings(config_name: str, words: Sequence[str]) -> list[str]:
    """Dotted names of all settings of a command with the choices of files in words."""
    choices = [word for word in words if (CONF / word.lstrip("+").split("=")[0]).is_dir()]
    try:
        cfg = compose_config(config_name, choices)
    except Exception:  # the choices themselves are bad
        cfg = compose_config(config_name, ())
    return list(_flat(OmegaConf.to_container(cfg, resolve=False)))


def _flat(node: Any, path: str = "") -> Iterator[str]:
    for key, value in node.items() if isinstance(node, dict) else ():
        yield f"{path}{key}"
        yield from _flat(value, f"{path}{key}.")


def answer_help() -> None:
    """Prints what a command does and its settings, with the comments of its file, and exits; reads text alone."""
    words = sys.orig_argv
    module = words[words.index("-m") + 1] if "-m" in words[:-1] else ""
    place = CONF.parent / module.replace(".", "/")
    source = place / "__main__.py" if place.is_dir() else place.with_suffix(".py")
    code = source.read_text(encoding="utf-8") if module and source.is_file() else ""
    found = re.search(r'^@command\("([\w/]+)"', code, re.MULTILINE)
    if not found:
        return
    description = re.match(r'"""(.*?)"""', code, re.DOTALL)
    lines = [description[1].strip() if description else module]
    for name in _files(found[1]):
        own = re.sub(r"^(# @package.*|name: .*|defaults:|  - .*)\n|^hydra:\n(.*\n)*", "", _text(name), flags=re.M)
        lines += ["", f"conf/{name}.yaml", *(f"  {line}" for line in own.splitlines() if line)]
    lines += ["", "choices, and the settings of the first"]
    for group, choice in {**_choices(found[1]), "experiment": ""}.items():
        names = sorted(path.stem for path in (CONF / group).glob("[!_]*.yaml"))
        lines.append(f"  {group}={'|'.join(sorted(names, key=lambda name: name != choice))}")
        lines += [f"    {group}.{key}={value}" for key, value in _plain(group, choice).items()]
    lines += ["", "NAME=VALUE sets one, -m runs every combination of values with commas, --cfg job prints all of them."]
    print("\n".join(lines))
    raise SystemExit(0)


def _plain(group: str, choice: str) -> dict[str, Any]:
    """The numbers and words of a choice of a group, of its first level."""
    files = [path for path in (CONF / group / "_base.yaml", CONF / group / f"{choice}.yaml") if path.is_file()]
    values = OmegaConf.to_container(OmegaConf.merge(*map(OmegaConf.load, files))) if files else {}
    return {
        key: value
        for key, value in values.items()
        if isinstance(value, int | float | str) and key != "_target_" and "${" not in str(value)
    }


def _text(name: str) -> str:
    return (CONF / f"{name}.yaml").read_text(encoding="utf-8")


def _files(name: str) -> list[str]:
    """A configuration and those that it includes, all of conf/ itself."""
    included = re.findall(r"^  - /?(\w+)$", _text(name), re.MULTILINE)
    return [name, *(file for part in included if part != "_self_" for file in _files(part))]


def _choices(name: str) -> dict[str, str]:
    """Groups of a configuration, and which choice is the default."""
    text = "".join(map(_text, _files(name)))
    found = re.findall(r"^  - /?(\w+): (\w+)$", text, re.MULTILINE)
    return {group: choice for group, choice in found if (CONF / group).is_dir()}


def run_folder(name: str, overrides: str, resume: bool | str, chosen: dict[tuple[str, str], str] = _chosen) -> str:
    """<name>/<time>-<process>-<hash of overrides>, relative to outputs/.

    With resume=True it is the newest one with the same hash, with "unfinished" only if that has no results.json yet.
    The same run asks more than once while its configuration is resolved; it gets the same answer.

    Args:
        name: of the runs, such as pose_100.
        overrides: the run's own, as Hydra joins them; those of SAME_RUN are not in the hash.
        resume: true, false or "unfinished".
        chosen: answers given so far in this process.

    Raises:
        ValueError: another resume, or a name that is no folder's or no W&B id's.
    """
    if not re.fullmatch(NAME, str(name)):
        raise ValueError(f"name: expected what a folder and W&B can be called, such as pose_v2, got {name!r}")
    if resume not in (True, False, "unfinished"):
        raise ValueError(f"resume: expected true, false or unfinished, got {resume!r}")
    key = (name, overrides)
    if key not in chosen:
        own = re.sub(rf"(^|,)\+*({SAME_RUN})=[^,]*", "", overrides).removeprefix(",")
        code = hashlib.sha256(own.encode()).hexdigest()[:8]
        earlier = sorted((Path(OUTPUTS) / name).glob(f"*-{code}"))[-1:] if resume else []
        if resume == "unfinished":
            earlier = [folder for folder in earlier if not (folder / "results.json").exists()]
        if resume is True and not earlier:
            print(f"resume: no run of these settings in {OUTPUTS}/{name}: a new one begins", file=sys.stderr)
        begun = (f"{name}/{time.strftime('%Y%m%d-%H%M%S')}-{number}-{code}" for number in itertools.count(os.getpid()))
        fresh = next(folder for folder in begun if folder not in chosen.values())  # a sweep's jobs have their own
        chosen[key] = f"{name}/{earlier[0].name}" if earlier else fresh
    return chosen[key]


OmegaConf.register_new_resolver("run_folder", lambda *asked: run_folder(*asked), replace=True)
# W&B's id of a run follows from its folder: a resumed run continues its own charts.
OmegaConf.register_new_resolver("run_id", lambda folder: "-".join(Path(folder).parts[-2:]), replace=True)


@contextmanager
def claimed(run_dir: Path) -> Iterator[None]:
    """Keeps a run's folder to one process at a time; of a training on several devices the first rank alone asks.

    Raises:
        ValueError: another process works in it.
    """
    run_dir.mkdir(parents=True, exist_ok=True)
    lock = FileLock(run_dir / ".lock")
    try:
        lock.acquire(timeout=0)
    except Timeout:
        raise ValueError(
            f"{run_dir}: expected a folder in which nobody works, found another process in it: wait for its end, or "
            "begin a run of its own with another name=..."
        ) from None
    except NotImplementedError:  # not every file system has locks
        pass
    try:
        yield
    finally:
        lock.release()


def link_latest(run_dir: Path) -> None:
    """Makes <run_dir>/../latest a link to run_dir, in one step; where that cannot be, it says so and leaves it."""
    link = run_dir.parent / "latest"
    if link.exists() and not link.is_symlink():
        print(f"{link} is no link: it stays as it is; the run is {run_dir}", file=sys.stderr)
        return
    temporary = run_dir.parent / f".latest-{os.getpid()}"
    try:
        temporary.symlink_to(run_dir.name)
        temporary.replace(link)
    except OSError as error:  # not every file system has links
        print(f"{link} is not made, {error}; the run is {run_dir}", file=sys.stderr)


def quiet_libraries() -> None:
    """Keeps libraries to warnings that are of use here: their notices would drown the command's own lines."""
    from diffusers.utils import logging as diffusers_logging
    from transformers.utils import logging as transformers_logging

    logging.getLogger().setLevel(logging.WARNING)
    for name in ("lightning", "lightning.fabric", "lightning.pytorch"):  # these have handlers of their own
        logging.getLogger(name).setLevel(logging.WARNING)
    for name in ("rg", "data_prep", "experiments", "__main__"):
        logging.getLogger(name).setLevel(logging.INFO)
    for kind in (DeprecationWarning, FutureWarning, PendingDeprecationWarning):
        warnings.filterwarnings("ignore", category=kind)
    for words in (
        "deprecated",
        "does not have many workers",
        "exists and is not empty",
        "than the logging interval",
        "sync_dist",
    ):
        warnings.filterwarnings("ignore", message=f".*{words}")
    os.environ.setdefault("WANDB_QUIET", "true")
    for library in (diffusers_logging, transformers_logging):
        library.set_verbosity_error()
        library.disable_progress_bar()


def refresh_seconds() -> float:
    """How often a progress bar is drawn: a log file, which nobody watches, gets one state a minute."""
    return 0.1 if sys.stderr.isatty() else 60.0


def load_configured_head(choice: DictConfig, family: str) -> "ReadoutHead":
    """The head of a command: `head.released`, one of the authors' by name or file, where it is given, else `head.path`,
    which `head.class` reads where that is a class of the user's own.

    Args:
        family: the world's family of backbones, for which a released head is taken.

    Raises:
        FileNotFoundError, ValueError: see rg.heads.released.load and rg.heads.load_head.
    """
    from rg.heads import load_head, released

    if choice.released is not None:
        return released.load(choice.released, family=family)
    return load_head(choice.path, choice["class"])
