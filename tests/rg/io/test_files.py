import errno
import json
import os
import resource
from pathlib import Path
from threading import Barrier, Thread

import pytest

from rg.io.files import (
    MAX_DEPTH,
    MAX_TEXT,
    atomic,
    fingerprint,
    parse_json,
    read_json,
    read_text,
    write_json,
    write_text,
)


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_an_interrupted_write_leaves_the_old_file(tmp_path: Path, error: type[BaseException]) -> None:
    path = tmp_path / "notes.txt"
    write_text(path, "old")
    with pytest.raises(error), atomic(path) as temporary:
        temporary.write_text("half of the n")
        raise error
    assert path.read_text() == "old" and list(tmp_path.iterdir()) == [path]


def test_what_cannot_be_written_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(TypeError):
        write_json(tmp_path / "record.json", {"x": object()})
    with pytest.raises(RuntimeError), atomic(tmp_path / "never.txt"):
        raise RuntimeError
    assert not list(tmp_path.iterdir())


def test_a_full_disk_is_an_error_that_names_the_file(tmp_path: Path) -> None:
    path = tmp_path / "table.md"
    write_text(path, "old")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))
    try:
        with pytest.raises(OSError, match="table.md'$") as caught:
            write_text(path, "new" * 1000)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert caught.value.errno == errno.EFBIG and path.read_text() == "old" and list(tmp_path.iterdir()) == [path]
    with pytest.raises(OSError, match="elsewhere'$"), atomic(path):  # another file's error stays its own
        (tmp_path / "elsewhere").read_bytes()


def test_the_file_appears_at_the_end_alone(tmp_path: Path) -> None:
    path = tmp_path / "new" / "table.md"
    with atomic(path) as temporary:
        temporary.write_text("ü")
        assert not path.exists() and temporary.parent == path.parent and not list(path.parent.glob("*.md"))
    assert path.read_text(encoding="utf-8") == "ü" and list(path.parent.iterdir()) == [path]


def test_files_that_differ_in_their_ending_do_not_meet(tmp_path: Path) -> None:
    with atomic(tmp_path / "table.md") as text, atomic(tmp_path / "table.json") as record:
        text.write_text("text")
        record.write_text("{}")
    assert (tmp_path / "table.md").read_text() == "text" and (tmp_path / "table.json").read_text() == "{}"


def test_two_writers_at_once_leave_one_of_two_whole_files(tmp_path: Path) -> None:
    path, together = tmp_path / "record.json", Barrier(2)

    def write(value: int) -> None:
        with atomic(path) as temporary:
            together.wait(timeout=10)
            temporary.write_text(json.dumps([value] * 10_000))
            together.wait(timeout=10)

    writers = [Thread(target=write, args=(value,)) for value in (1, 2)]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join()
    assert json.loads(path.read_text()) in ([1] * 10_000, [2] * 10_000) and list(tmp_path.iterdir()) == [path]


def test_json_is_read_back(tmp_path: Path) -> None:
    write_json(tmp_path / "a" / "b.json", {"x": [1, None, "ü"]})
    assert json.loads((tmp_path / "a" / "b.json").read_text()) == {"x": [1, None, "ü"]}


def test_fingerprint_changes_with_weights_and_settings(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_bytes(b"weights")
    (tmp_path / "config.json").write_text("{}")
    first = fingerprint(tmp_path)
    (tmp_path / "README.md").write_text("words")
    assert fingerprint(tmp_path) == first and len(first) == 16
    (tmp_path / "config.json").write_text('{"a": 1}')
    second = fingerprint(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"other")
    assert len({first, second, fingerprint(tmp_path)}) == 3


def test_the_mark_at_the_beginning_of_a_text_is_no_part_of_it(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text('{"x": "ü"}', encoding="utf-8-sig")
    assert read_text(tmp_path / "a.json")[0] == "{" and read_json(tmp_path / "a.json") == {"x": "ü"}


def test_texts_that_cannot_be_read_are_named(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    with pytest.raises(ValueError, match=f"{path}: expected a regular file, found none"):
        read_text(path)
    path.write_bytes(b"\xff\xfe")
    with pytest.raises(ValueError, match=f"{path}: expected text in UTF-8, found .*0xff"):
        read_text(path)
    with path.open("wb") as file:
        file.truncate(2**40)
    with pytest.raises(ValueError, match=f"{path}: expected at most {MAX_TEXT:,} bytes, found {2**40:,}"):
        read_text(path)
    path.unlink()
    os.mkfifo(path)
    with pytest.raises(ValueError, match=f"{path}: expected a regular file, found something else"):
        read_text(path)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "expected JSON"),
        ("{'x': 1}", "expected JSON.*line 1 column 2"),
        ('{"x": [1, NaN]}', "finite.* NaN"),
        ('{"x": -Infinity}', "finite.* -Infinity"),
        ("9" * 5000, "4300"),
        ("[" * 20_000, f"{MAX_DEPTH} levels, found 20,000"),
        ('{"x": ' * 20_000 + "1" + "}" * 20_000, f"{MAX_DEPTH} levels, found 20,000"),
    ],
)
def test_json_that_cannot_be_read_is_named(text: str, words: str) -> None:
    with pytest.raises(ValueError, match=f"a.json: .*{words}"):
        parse_json(text, "a.json")


def test_only_open_brackets_outside_of_strings_are_levels() -> None:
    for content in ("[" * 1000, 'a "quoted\\" [' * 100, [[]] * 1000, [["]", "}"]] * 100):
        assert parse_json(json.dumps(content), "a.json") == content
    deepest = "[" * MAX_DEPTH + "]" * MAX_DEPTH
    assert parse_json(f"[{deepest[1:-1]}, {deepest[1:-1]}]", "a.json")
    assert parse_json("[NaN]", "a.json", constants=True)[0] != 0
