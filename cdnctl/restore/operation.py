"""What can be done to pictures, one after the other or many of them, see `batch`."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, TypeVar

from cdnctl.api import Model
from cdnctl.images import Image


@dataclass(frozen=True)
class Result:
    """A picture that was made of another, and with which model."""

    image: Image  # with notes on what should not go unsaid
    model: Model
    # Black and white of the picture where its samples are counts; None: 0, and all that whole
    # numbers hold, or 1.
    ends: tuple[float, float] | None = field(default=None, kw_only=True)


R = TypeVar("R", bound=Result)


class Operation(Protocol[R]):
    """Something that is done to pictures with a model, each on its own: who else is in the
    folder changes no bit of it."""

    @property
    def name(self) -> str:
        """A verb, such as "denoise": as it stands in manifests."""
        ...

    @property
    def parameters(self) -> Mapping[str, Any]:
        """What the results depend on besides the picture and the weights, as JSON has it."""
        ...

    def prepare(self, image: Image, name: str, data: bytes) -> Any:
        """What ``run`` is to be given of a picture; in the thread that has read it.

        name: of the picture, for messages. data: its file. ImageError if it will not do.
        """
        ...

    def by_camera(self, ready: Any) -> bool:
        """Whether a picture, as ``prepare`` gave it, is for a model of the noise of cameras."""
        ...

    def together(self, height: int, width: int) -> int:
        """How many pictures of a size ``run`` takes at once."""
        ...

    def run(
        self, ready: Sequence[Any], model: Model, watch: Callable[[float], None]
    ) -> Sequence[R]:
        """The results for what ``prepare`` gave for pictures of one shape.

        watch: told the share of the work that is done, now and then. ImageError if one of them
        will not do.
        """
        ...

    def record(self, result: R) -> Mapping[str, Any]:
        """What the manifest says of a result, as JSON has it."""
        ...
