"""What files and settings of users and of accidents look like: damaged, cut, empty, exchanged, hostile."""

import io
import json
import os
import struct
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

Rng = np.random.Generator

DEEP: Any = []
for _ in range(200):
    DEEP = [DEEP]
# Values where others belong.
VALUES: tuple[Any, ...] = (
    *(None, True, False, 0, 1, -1, 3, 10**9, 10**400, -(2**63), 0.5, -0.5, 1e308, float("nan"), float("inf")),
    *("", "x", "0", "None", "../../x", "/dev/zero", "a\0b", "ü\u2028\U0001f600", "x" * 10_000, "line\nline"),
    *("${oc.env:HOME}", "${seed}", "[1,", "{a:", "a=b", "'", "a,b", "-", "~"),
    *([], {}, [[]], [None], [0] * 1000, {"": ""}, {"_target_": "os.getcwd"}, DEEP),
)


def mutate(path: Path, rng: Rng) -> str:
    """Changes a file in place in one of many ways; says which."""
    ways: list[Callable[[Path, Rng], None]] = [*BYTES, *BYTES, *WHOLE]
    for endings, own in OWN.items():
        if path.suffix in endings:
            ways = own * 4 + ways
    way = ways[int(rng.integers(len(ways)))]
    way(path, rng)
    return way.__name__


def _span(size: int, rng: Rng) -> tuple[int, int]:
    start = int(rng.integers(size + 1))
    return start, min(size, start + int(rng.integers(1, 64)))


def flip_bit(path: Path, rng: Rng) -> None:
    data = bytearray(path.read_bytes())
    data[int(rng.integers(len(data)))] ^= 1 << int(rng.integers(8))
    path.write_bytes(bytes(data))


def flip_bit_of_the_head(path: Path, rng: Rng) -> None:
    data = bytearray(path.read_bytes())
    data[int(rng.integers(min(len(data), 64)))] ^= 1 << int(rng.integers(8))
    path.write_bytes(bytes(data))


def cut(path: Path, rng: Rng) -> None:
    data = path.read_bytes()
    path.write_bytes(data[: int(rng.integers(len(data)))])


def cut_the_begin(path: Path, rng: Rng) -> None:
    data = path.read_bytes()
    path.write_bytes(data[int(rng.integers(1, len(data) + 1)) :])


def insert(path: Path, rng: Rng) -> None:
    data, place = path.read_bytes(), _span(path.stat().st_size, rng)
    path.write_bytes(data[: place[0]] + rng.bytes(place[1] - place[0] + 1) + data[place[0] :])


def delete(path: Path, rng: Rng) -> None:
    data, place = path.read_bytes(), _span(path.stat().st_size, rng)
    path.write_bytes(data[: place[0]] + data[place[1] :])


def overwrite(path: Path, rng: Rng) -> None:
    data, place = path.read_bytes(), _span(path.stat().st_size, rng)
    new = bytes(place[1] - place[0]) if rng.random() < 0.5 else rng.bytes(place[1] - place[0])
    path.write_bytes(data[: place[0]] + new + data[place[1] :])


def repeat(path: Path, rng: Rng) -> None:
    data = path.read_bytes()
    path.write_bytes(data * 2)


def append(path: Path, rng: Rng) -> None:
    path.write_bytes(path.read_bytes() + rng.bytes(int(rng.integers(1, 100))))


def empty(path: Path, rng: Rng) -> None:
    path.write_bytes(b"")


def noise(path: Path, rng: Rng) -> None:
    path.write_bytes(rng.bytes(path.stat().st_size))


def another(path: Path, rng: Rng) -> None:
    contents = (b"null", b"{}", b"[]\n", b"%!PS\n", b"<svg/>", b"\x89PNG\r\n\x1a\n", b"PK\x03\x04", b"\x80\x04.")
    path.write_bytes(contents[int(rng.integers(len(contents)))])


def exchange(path: Path, rng: Rng) -> None:
    """With another file of the folder."""
    others = sorted(p for p in path.parent.iterdir() if p.is_file() and p != path)
    if others:
        path.write_bytes(others[int(rng.integers(len(others)))].read_bytes())


def missing(path: Path, rng: Rng) -> None:
    path.unlink()


def folder(path: Path, rng: Rng) -> None:
    path.unlink()
    path.mkdir()


def link_to_itself(path: Path, rng: Rng) -> None:
    path.unlink()
    path.symlink_to(path.name)


def pipe(path: Path, rng: Rng) -> None:
    path.unlink()
    os.mkfifo(path)


def device(path: Path, rng: Rng) -> None:
    path.unlink()
    path.symlink_to("/dev/zero")


def endless(path: Path, rng: Rng) -> None:
    """A sparse file of a terabyte."""
    os.truncate(path, 2**40)


BYTES = [flip_bit, flip_bit, flip_bit_of_the_head, cut, cut_the_begin, insert, delete, overwrite, repeat, append]
WHOLE = [empty, noise, another, exchange, missing, folder, link_to_itself, pipe, device, endless]


def _places(node: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    inner = node.items() if isinstance(node, dict) else enumerate(node) if isinstance(node, list) else ()
    return [path, *(place for key, value in inner for place in _places(value, (*path, key)))]


def change(content: Any, rng: Rng) -> Any:
    """Plain values with one of them changed, removed, added or renamed."""
    content = json.loads(json.dumps(content))
    places = _places(content)
    # As often near the top as in the many numbers below.
    short = [place for place in places if len(place) <= 2]
    place = [short, places][int(rng.integers(2))]
    place = place[int(rng.integers(len(place)))]
    value = VALUES[int(rng.integers(len(VALUES)))]
    if not place:
        return value
    holder = content
    for key in place[:-1]:
        holder = holder[key]
    match int(rng.integers(6)):
        case 0 if isinstance(holder, dict):
            del holder[place[-1]]
        case 1 if isinstance(holder, dict):
            holder[f"{place[-1]}_"] = holder.pop(place[-1])
        case 2 if isinstance(holder, dict):
            holder["added"] = value
        case 3 if isinstance(holder, list):
            holder.insert(0, value)
        case 4 if isinstance(holder, list):
            holder.pop()
        case _:
            holder[place[-1]] = value
    return content


def changed_json(path: Path, rng: Rng) -> None:
    path.write_text(json.dumps(change(json.loads(path.read_bytes()), rng)), encoding="utf-8")


def encoded_otherwise(path: Path, rng: Rng) -> None:
    path.write_bytes(path.read_bytes().decode().encode(["utf-16", "utf-32", "utf-8-sig"][int(rng.integers(3))]))


def changed_header(path: Path, rng: Rng) -> None:
    """Of safetensors."""
    data = path.read_bytes()
    (size,) = struct.unpack("<Q", data[:8])
    header = json.dumps(change(json.loads(data[8 : 8 + size]), rng)).encode()
    path.write_bytes(struct.pack("<Q", len(header)) + header + data[8 + size :])


def changed_weight(path: Path, rng: Rng) -> None:
    data = path.read_bytes()
    (size,) = struct.unpack("<Q", data[:8])
    place = 8 + size + int(rng.integers((len(data) - 8 - size) // 4)) * 4
    value = [np.nan, np.inf, 1e30, 0.0, -1.0][int(rng.integers(5))]
    path.write_bytes(data[:place] + np.float32(value).tobytes() + data[place + 4 :])


class Program:
    """What unpickles to a started program."""

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, ("touch started",)


def changed_archive(path: Path, rng: Rng) -> None:
    """Of torch.save: a member is removed, empty, renamed, or its pickle starts a program."""
    import pickle

    stream, way = io.BytesIO(), int(rng.integers(4))
    with zipfile.ZipFile(path) as old, zipfile.ZipFile(stream, "w") as new:
        names = old.namelist()
        chosen = names[int(rng.integers(len(names)))]
        for name in names:
            data = old.read(name)
            if way == 3 and name.endswith("data.pkl"):
                data = pickle.dumps(Program())
            if name == chosen and way < 3:
                if way == 0:
                    continue
                name, data = (name, b"") if way == 1 else (f"../{name}", data)
            new.writestr(name, data)
    path.write_bytes(stream.getvalue())


def changed_tar(path: Path, rng: Rng) -> None:
    """A member is removed, doubled, renamed, a link, a device, empty, damaged or of another JSON."""
    stream, way = io.BytesIO(), int(rng.integers(8))
    with tarfile.open(path) as old, tarfile.open(fileobj=stream, mode="w") as new:
        members = old.getmembers()
        chosen = int(rng.integers(len(members)))
        for number, member in enumerate(members):
            data = old.extractfile(member).read()
            if number == chosen:
                if way == 0:
                    continue
                if way == 1:
                    new.addfile(member, io.BytesIO(data))
                elif way == 2:
                    names = (f"../../{member.name}", f"/{member.name}", "x.json", "99999999.json", "ü" * 300, ".", "")
                    member.name = names[int(rng.integers(len(names)))]
                elif way == 3:
                    types = (tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.CHRTYPE, tarfile.DIRTYPE, tarfile.FIFOTYPE)
                    member.type, member.linkname = types[int(rng.integers(len(types)))], "/etc/passwd"
                    data = b""
                elif way == 4 or not data:
                    data = b""
                elif way == 5 and member.name.endswith("json"):
                    data = json.dumps(change(json.loads(data), rng)).encode()
                else:
                    place = int(rng.integers(len(data)))
                    data = data[:place] + rng.bytes(4) + data[place + 4 :]
                member.size = len(data)
            new.addfile(member, io.BytesIO(data))
    path.write_bytes(stream.getvalue())


OWN = {
    (".json",): [changed_json, changed_json, encoded_otherwise],
    (".safetensors",): [changed_header, changed_weight],
    (".ckpt", ".pt"): [changed_archive],
    (".tar",): [changed_tar],
    (".txt",): [encoded_otherwise],
}


def change_words(words: list[str], names: list[str], rng: Rng) -> tuple[list[str], str]:
    """Overrides of Hydra and one more: of a setting that is there or is not, with any value; and its name."""
    name = names[int(rng.integers(len(names)))]
    value = VALUES[int(rng.integers(len(VALUES)))]
    way = int(rng.integers(12))
    if way == 0:
        name = name[:-1] + "q" if rng.random() < 0.5 else f"{name}.more"
    text = value if isinstance(value, str) and way < 9 else json.dumps(value, ensure_ascii=False).replace('"', "")
    word = {1: f"+{name}={text}", 2: f"++{name}={text}", 3: f"~{name}", 4: f"{name}", 5: f"{name}="}.get(way)
    return [*words, word or f"{name}={text}"], name
