from collections.abc import Mapping, Sequence
from typing import Any

import pytest

from rg.io.records import Record, check_arguments, validate


class Base:
    def __init__(
        self, *, widths: list[int], taps: list[int] | None = None, span: tuple[float, ...] = (0.0,)
    ) -> None: ...


class Network(Base):
    def __init__(
        self, *, name: str, classes: Mapping[str, Sequence[str]] = {}, plain=3, **hyperparameters: Any
    ) -> None: ...


class Fixed(Network):
    """Gives what its bases require."""

    def __init__(self, **hyperparameters: Any) -> None: ...


GOOD = {"name": "x", "widths": [1, 2], "span": [0, 0.5], "classes": {"a": ["b"]}, "plain": object.__name__}


def test_arguments_that_fit_their_annotations_pass() -> None:
    check_arguments(Network, GOOD, "config.json")
    check_arguments(Network, GOOD | {"taps": None}, "config.json")
    check_arguments(Fixed, {}, "config.json")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"widths": [1, "2"]}, r"widths\.1: expected .*integer, found '2'"),
        ({"widths": [1, True]}, r"widths\.1: expected .*integer, found True"),
        ({"widths": 3}, "widths: expected .*(array|list), found 3"),
        ({"taps": [0.5]}, "taps.*0: expected .*integer, found 0.5"),
        ({"name": None}, "name: expected .*string, found None"),
        ({"span": [1, None]}, r"span\.1: expected .*number, found None"),
        ({"classes": {"a": "b"}}, r"classes\.a: expected .*, found 'b'"),
        ({"colour": 1}, "colour: expected one of .*'widths'.* found 1"),
    ],
)
def test_other_arguments_are_named(change: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=f"^config.json: {words}"):
        check_arguments(Network, GOOD | change, "config.json")
    with pytest.raises(ValueError, match=r"config.json: name: expected this key, found none"):
        check_arguments(Network, {"widths": [1]}, "config.json")


class Entry(Record):
    count: int
    share: float


def test_a_record_is_typed_and_its_error_one_line() -> None:
    assert validate(Entry, {"count": 1, "share": 1, "more": []}, "a.json").share == 1
    for content, words in (
        ({"count": 1.5, "share": 0.5}, "count: expected .*integer, found 1.5"),
        ({"count": 1, "share": float("inf")}, "share: expected .*finite.*, found inf"),
        ({"count": 1}, "share: expected this key, found none"),
        ({"count": "\n" * 10_000, "share": 1}, r"count: expected .*integer, found '\\n"),
        ([], r"content: expected .*, found \[\]"),
    ):
        with pytest.raises(ValueError, match=f"^a.json: {words}") as error:
            validate(Entry, content, "a.json")
        assert "\n" not in str(error.value) and len(str(error.value)) < 200
