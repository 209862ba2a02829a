"""Items that can go through a network together."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import TypeVar

WAITING_PIXELS = 2**22  # that wait for others of their size: some 100 MB

T = TypeVar("T")


def batches(
    items: Iterable[T], kind: Callable[[T], tuple[int, ...]], count: Callable[[int, int], int]
) -> Iterator[list[T]]:
    """Lists of items of one kind, which can go through a network together.

    kind: height and width of an item, and whatever else must be equal within a list.
    count: height and width to the length of a full list. Full lists come at once. Where too
    many pixels wait, the kind that waits longest comes.
    """
    waiting: dict[tuple[int, ...], list[T]] = {}
    pixels = 0
    for item in items:
        key = kind(item)
        waiting.setdefault(key, []).append(item)
        pixels += key[0] * key[1]
        full = len(waiting[key]) == count(key[0], key[1])
        while full or pixels > WAITING_PIXELS:
            key = key if full else next(iter(waiting))
            group = waiting.pop(key)
            pixels -= len(group) * key[0] * key[1]
            yield group
            full = False
    yield from waiting.values()
