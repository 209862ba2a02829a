"""Decoders kept quiet: what matters comes out as an `ImageError`."""

from __future__ import annotations

import logging
import threading
import warnings

# Both log oddities of a file.
for _library in ("tifffile", "PIL"):
    logging.getLogger(_library).setLevel(logging.CRITICAL + 1)


class _Quiet:
    """Context without warnings. Unlike `warnings.catch_warnings`, threads may share it: the
    first that enters turns them off, the last that leaves turns them on again."""

    def __init__(self) -> None:
        self._lock, self._inside = threading.Lock(), 0

    def __enter__(self) -> None:
        with self._lock:
            if not self._inside:
                self._context = warnings.catch_warnings()
                self._context.__enter__()
                warnings.simplefilter("ignore")
            self._inside += 1

    def __exit__(self, *details: object) -> None:
        with self._lock:
            self._inside -= 1
            if not self._inside:
                self._context.__exit__(None, None, None)


quiet = _Quiet()
"""The one such context of the process."""
