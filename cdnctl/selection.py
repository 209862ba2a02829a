"""Which bundled model suits a picture."""

from __future__ import annotations

from collections.abc import Iterable
from functools import cached_property
from pathlib import Path

import torch

from cdnctl.api import Model, load
from cdnctl.checkpoints import Header, bundled, read_header
from cdnctl.errors import UnknownClassError, WeightsError

AUTO = "auto"
SMALL = 40  # pictures with no side longer than this are taken for small ones


class Models:
    """Loads models when they are first needed, and picks one for a picture.

    name: a bundled model, a run folder, a weights file, or "auto": the small-picture model for
    pictures of up to 40 pixels a side, the photo model otherwise, but one that
    knows all of ``classes`` if the first choice does not.
    """

    def __init__(self, name: str, device: torch.device, classes: Iterable[str] = ()):
        self.name, self.device = name, device
        self.classes = set(classes)
        self._loaded: dict[str | Path, Model] = {}
        if name != AUTO:
            self.pick(1, 1).weights(dict.fromkeys(self.classes, 1.0) or None)

    @cached_property
    def _headers(self) -> dict[str, Header]:
        return {name: read_header(path) for name, path in bundled().items()}

    def pick(self, height: int, width: int) -> Model:
        """The model for a picture of this size. WeightsError if there is none."""
        if self.name != AUTO:
            return self._load(self.name)
        headers = self._headers
        if not headers:
            raise WeightsError(
                "no bundled weights were found: give --model FILE, or install cdnctl again"
            )
        small = max(height, width) <= SMALL
        order = sorted(headers, key=lambda n: headers[n].patch, reverse=not small)
        knowing = [n for n in order if self.classes <= set(headers[n].classes)]
        if not knowing:
            first = self._load(order[0])
            first.weights(dict.fromkeys(sorted(self.classes), 1.0))  # says which class it is
            raise UnknownClassError(f"no bundled model knows all of {sorted(self.classes)}")
        return self._load(knowing[0])

    def hash_of(self, name: str) -> str | None:
        """Hash of the weights of a model that `pick` may give, by its own name; else None."""
        if self.name != AUTO:
            model = self._load(self.name)
            return model.hash if model.name == name else None
        return self._load(name).hash if name in self._headers else None

    def _load(self, name: str) -> Model:
        if name not in self._loaded:
            self._loaded[name] = load(name, self.device)
        return self._loaded[name]
