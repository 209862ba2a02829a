"""Which bundled model suits a picture."""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import suppress
from functools import cached_property
from pathlib import Path

import torch

from cdnctl import images
from cdnctl.api import Model, load
from cdnctl.checkpoints import Header, bundled, read_header
from cdnctl.errors import ImageError, WeightsError

AUTO = "auto"
SMALL = 40  # pictures with no side longer than this are taken for small ones


class Models:
    """Loads models when they are first needed, and picks one for a picture.

    name: a bundled model, a run folder, a weights file, or "auto": the small-picture model for
    pictures of up to 40 pixels a side, the camera model for photographs with the noise of a camera,
    the photo model otherwise. A small picture
    goes to the photo model, too, where the other is missing or does not know all of
    ``classes``. A photograph never goes to the small-picture model, which damages it.
    ensemble: the models are means over so many symmetries, see `Model.ensemble`.
    """

    def __init__(
        self, name: str, device: torch.device, classes: Iterable[str] = (), ensemble: int = 1
    ):
        self.name, self.device, self.ensemble = name, device, ensemble
        self.classes = set(classes)
        self._loaded: dict[str | Path, Model] = {}
        if name != AUTO:
            self._knowing(name)
        elif self._white and not any(map(self._knows, self._white)):
            # No picture can be done: better said now than when the first one comes.
            self._knowing(max(self._white, key=lambda n: self._headers[n].patch))

    @cached_property
    def _headers(self) -> dict[str, Header]:
        return {name: read_header(path) for name, path in bundled().items()}

    @cached_property
    def _white(self) -> list[str]:
        """Names of the models for white noise."""
        return [name for name, header in self._headers.items() if not header.model.get("coloured")]

    def pick(self, height: int, width: int, camera: bool = False) -> Model:
        """The model for a picture of this size. WeightsError if there is none.

        camera: whether its noise is that of a camera, and not told.
        """
        if self.name != AUTO:
            return self._load(self.name)
        headers = {name: self._headers[name] for name in self._white}
        hearing = [name for name in self._headers if name not in headers]
        if camera and max(height, width) > SMALL and any(map(self._knows, hearing)):
            return self._load(next(filter(self._knows, hearing)))
        if not headers:
            raise WeightsError(
                "no bundled weights were found: give --model FILE, or install cdnctl again"
            )
        if max(height, width) <= SMALL:
            order = sorted(headers, key=lambda n: headers[n].patch)
        else:
            order = [n for n in headers if headers[n].patch > SMALL]
            order.sort(key=lambda n: headers[n].patch, reverse=True)
        if not order:
            raise WeightsError(
                f"the bundled model for photographs, 'photo', was not found, and "
                f"{' and '.join(map(repr, headers))} is for pictures of up to {SMALL} pixels a "
                f"side: install cdnctl again, or give --model (this picture: {width} x {height})"
            )
        return self._knowing(next(filter(self._knows, order), order[0]))

    def for_files(self, files: Iterable[Path], camera: bool = False) -> Model:
        """The model for the first of these pictures that tells its size: by its header, or where
        that does not suffice, such as in camera raw, decoded. WeightsError if there is none."""
        for path in files:
            with suppress(ImageError):
                width, height = images.stored_size(path) or images.read(path).samples.shape[1::-1]
                return self.pick(height, width, camera)
        return self.pick(1, 1)

    def hash_of(self, name: str) -> str | None:
        """Hash of the weights of a model that `pick` may give, by its own name; else None."""
        if self.name != AUTO:
            model = self._load(self.name)
            return model.hash if model.name == name else None
        return self._load(name).hash if name in self._headers else None

    def _knows(self, name: str) -> bool:
        return self.classes <= set(self._headers[name].told_apart)

    def _knowing(self, name: str) -> Model:
        """A model; UnknownClassError if it does not know all of the classes."""
        model = self._load(name)
        model.mixture(dict.fromkeys(sorted(self.classes), 1.0) or None)
        return model

    def _load(self, name: str) -> Model:
        if name not in self._loaded:
            self._loaded[name] = load(name, self.device).ensemble(self.ensemble)
        return self._loaded[name]
