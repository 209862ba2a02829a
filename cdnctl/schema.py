"""Frozen dataclasses from plain values, such as a config file or a weights header holds."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import MISSING, fields, is_dataclass
from typing import Any, TypeVar, get_args, get_type_hints

from cdnctl.errors import ConfigError

T = TypeVar("T")


def _fits(value: Any, hint: Any) -> bool:
    if is_dataclass(hint):
        return isinstance(value, Mapping)
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
    if is_dataclass(hint):
        return "a section of keys and values"
    if hint in words:
        return words[hint][0]
    inner = get_args(hint)
    count = "" if inner[-1] is ... else f"{len(inner)} "
    many = "sections" if is_dataclass(inner[0]) else words[inner[0]][1]
    return f"a list of {count}{many}"


def _built(value: Any, hint: Any, where: str) -> Any:
    """A value that fits, with dataclasses for the mappings in it and tuples for the lists."""
    if is_dataclass(hint):
        return build(hint, value, where)  # type: ignore[arg-type]
    if isinstance(value, list | tuple):
        inner = get_args(hint)[0]
        return tuple(_built(v, inner, f"{where}[{i}]") for i, v in enumerate(value))
    return value


def build(cls: type[T], values: Mapping[str, Any], where: str) -> T:
    """A frozen dataclass from a mapping, and so are the dataclasses in its fields.

    An unknown key, a missing one or a wrong type is a ConfigError that says ``where`` it is.
    """
    hints = get_type_hints(cls)
    every = fields(cls)  # type: ignore[arg-type]
    known = [f.name for f in every]
    for key, value in values.items():
        if key not in known:
            raise ConfigError(f"unknown key {key!r} in {where}; known keys: {', '.join(known)}")
        if not _fits(value, hints[key]):
            raise ConfigError(f"{where}.{key} is {value!r}, but must be {_plain(hints[key])}")
    needed = [f.name for f in every if f.default is MISSING and f.default_factory is MISSING]
    if missing := [name for name in needed if name not in values]:
        raise ConfigError(f"{where} lacks {' and '.join(missing)}")
    clean = {key: _built(value, hints[key], f"{where}.{key}") for key, value in values.items()}
    try:
        return cls(**clean)
    except ValueError as error:
        raise ConfigError(f"{where}: {error}") from None
