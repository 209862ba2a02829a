"""Frozen dataclasses from plain values, such as a config file or a weights header holds."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from typing import Any, TypeVar, get_args, get_type_hints

from cdnctl.errors import ConfigError

T = TypeVar("T")


def _fits(value: Any, hint: Any) -> bool:
    if hint is float:
        return isinstance(value, int | float) and not isinstance(value, bool)
    if hint is int:
        return isinstance(value, int) and not isinstance(value, bool)
    if hint in (bool, str):
        return isinstance(value, hint)
    inner = get_args(hint)  # of a tuple: (type, ...) or one type per entry
    return (
        isinstance(value, list | tuple)
        and (inner[-1] is ... or len(value) == len(inner))
        and all(_fits(v, inner[0]) for v in value)
    )


def _plain(hint: Any) -> str:
    """A type in words: 'a whole number', 'a list of 2 numbers'."""
    words = {
        int: ("a whole number", "whole numbers"),
        float: ("a number", "numbers"),
        bool: ("true or false", "values that are true or false"),
        str: ("text", "texts"),
    }
    if hint in words:
        return words[hint][0]
    inner = get_args(hint)
    count = "" if inner[-1] is ... else f"{len(inner)} "
    return f"a list of {count}{words[inner[0]][1]}"


def build(cls: type[T], values: Mapping[str, Any], where: str) -> T:
    """A frozen dataclass from a mapping; an unknown key or a wrong type is a ConfigError."""
    hints = get_type_hints(cls)
    known = [f.name for f in fields(cls)]  # type: ignore[arg-type]
    for key, value in values.items():
        if key not in known:
            raise ConfigError(f"unknown key {key!r} in {where}; known keys: {', '.join(known)}")
        if not _fits(value, hints[key]):
            raise ConfigError(f"{where}.{key} is {value!r}, but must be {_plain(hints[key])}")
    clean = {k: tuple(v) if isinstance(v, list) else v for k, v in values.items()}
    try:
        return cls(**clean)
    except ValueError as error:
        raise ConfigError(f"{where}: {error}") from None
