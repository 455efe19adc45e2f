"""What records and constructor calls from files have to be, checked by pydantic; every error is one line."""

import inspect
import json
import reprlib
from functools import cache
from typing import Any, TypeVar, get_type_hints

from pydantic import BaseModel, ConfigDict, TypeAdapter, ValidationError

T = TypeVar("T")
# A number is no text and no bool is a number; nothing is nan.
CONFIG = ConfigDict(strict=True, allow_inf_nan=False, arbitrary_types_allowed=True)


class Record(BaseModel):
    """What a record of plain values has to hold; keys beside its fields are left out."""

    model_config = CONFIG | ConfigDict(frozen=True)


def validate(schema: type[T], content: Any, name: str) -> T:
    """The content as the schema says, a Record or another annotation.

    Raises:
        ValueError: it is not so; `name`, the key, what was expected and what was found in one line.
    """
    try:
        return _adapter(schema).validate_python(content)
    except ValidationError as error:
        raise ValueError(f"{name}: {_first_problem(error)}") from error


@cache
def _adapter(schema: Any) -> TypeAdapter[Any]:
    own_config = isinstance(schema, type) and issubclass(schema, BaseModel)
    return TypeAdapter(schema, config=None if own_config else CONFIG)


# What pydantic says of these would not go on after "expected".
WORDS = {
    "missing": "this key",
    "extra_forbidden": "no such key",
    "too_short": "at least {min_length} of them",
    "too_long": "at most {max_length} of them",
    "string_pattern_mismatch": "text like {pattern}",
}


def _first_problem(error: ValidationError, key: str = "") -> str:
    first = error.errors(include_url=False)[0]
    key = ".".join([*filter(None, [key]), *map(str, first["loc"])]) or "content"
    expected = WORDS.get(first["type"], first["msg"]).format(**first.get("ctx", {}))
    for begin in ("Input should be ", "Value error, ", "expected "):
        expected = expected.removeprefix(begin)
    found = "none" if first["type"] == "missing" else reprlib.repr(first["input"])
    return f"{key}: expected {expected}, found {found}"


def check_arguments(cls: type, arguments: dict[str, Any], name: str) -> None:
    """Checks plain values against the annotations of a constructor and, as far as it passes keywords on, its bases'.

    Raises:
        ValueError: a required value is missing, or one is unknown or of another type; `name`, key, expected, found.
    """
    known: dict[str, Any] = {}
    owners = [owner for owner in cls.__mro__ if "__init__" in vars(owner)]
    for owner in owners:
        hints = _hints(owner)
        parameters = list(inspect.signature(owner.__init__).parameters.values())[1:]
        named = [p for p in parameters if p.kind in (p.KEYWORD_ONLY, p.POSITIONAL_OR_KEYWORD)]
        for parameter in named:
            known.setdefault(parameter.name, hints.get(parameter.name, Any))
            # What a base requires, the class may give.
            if owner is owners[0] and parameter.default is parameter.empty and parameter.name not in arguments:
                raise ValueError(f"{name}: {parameter.name}: expected this key, found none")
        if not any(p.kind is p.VAR_KEYWORD for p in parameters):
            break
    for key, value in arguments.items():
        if key not in known:
            raise ValueError(f"{name}: {key}: expected one of {sorted(known)}, found {reprlib.repr(value)}")
        try:  # as JSON, in which a list can stand for a tuple
            _adapter(known[key]).validate_json(json.dumps(value))
        except ValidationError as error:
            raise ValueError(f"{name}: {_first_problem(error, key)}") from error


def _hints(owner: type) -> dict[str, Any]:
    try:
        return get_type_hints(owner.__init__)
    except (NameError, TypeError):  # annotations that only a type checker can follow
        return {}
