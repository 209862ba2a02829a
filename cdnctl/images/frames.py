"""Animations (GIF, APNG, WebP) frame by frame, by Pillow, which wants all frames to write them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import PIL.Image

from cdnctl.errors import ImageError
from cdnctl.images.build import check_size, make_image
from cdnctl.images.image import Image, Metadata
from cdnctl.images.pages import Pages, joined
from cdnctl.images.pillow import QUALITY, riff_chunks, webp_size

_LARGEST = 65_535  # milliseconds that a frame may last in APNG


class FramePages(Pages):
    """The frames of an animation as they are shown, each on the whole canvas."""

    def __init__(self, path: Path, max_pixels: int):
        with path.open("rb") as file:
            head = file.read(30)
        # Opening a WebP file already sets memory aside for the size that its header claims.
        if size := webp_size(head):
            check_size(*size, max_pixels)
        self._picture = PIL.Image.open(path, formats=("GIF", "PNG", "WEBP"))
        try:
            count = int(getattr(self._picture, "n_frames", 1))
            if count > 1 and self._picture.format == "PNG" and head[24] > 8:
                raise ImageError("its frames have 16 bits, of which 8 would be lost")
            self._describe(path, count, max_pixels)
        except BaseException:
            self._picture.close()
            raise

    def _describe(self, path: Path, count: int, max_pixels: int) -> None:
        self.axes, self.shape = ("T", (count,)) if count > 1 else ("", ())
        self.dtype = np.dtype(np.uint8)
        # All of them, as they are in memory together when they are written.
        check_size(self._picture.width, self._picture.height * count, max_pixels)
        webp = self._picture.format == "WEBP"
        self.suffixes = (".webp", ".png") if webp else (".png", ".webp")
        self.lossless = not webp or b"VP8 " not in _codings(path)
        self.transparent = False  # whether a frame was, until now
        self._durations: dict[int, float] = {}

    def read(self, index: int) -> Image:
        """See `Pages`."""
        self._picture.seek(index)
        samples = np.asarray(self._picture.convert("RGBA"))
        self._durations[index] = float(self._picture.info.get("duration") or 0)
        if (samples[:, :, 3] == 255).all():
            samples = samples[:, :, :3]
        else:
            self.transparent = True
        return make_image(samples, metadata=Metadata(), notes=[], suffix=self.suffixes[0])

    def options(self, chosen: Sequence[int], strip: bool) -> dict[str, Any]:
        """How the chosen frames, which have been read, are shown, and what is said of them."""
        info = self._picture.info
        found: dict[str, Any] = {
            "duration": [min(round(self._durations[i]), _LARGEST) for i in chosen],
            "loop": int(info.get("loop", 1)),
        }
        if not strip:
            found |= {key: info[key] for key in ("icc_profile", "exif", "xmp") if info.get(key)}
        return found

    def close(self) -> None:
        """See `Pages`."""
        self._picture.close()


def _codings(path: Path) -> bytes:
    """Names of the chunks of a WebP file, those inside of frames among them."""
    data = path.read_bytes()
    inside = [data[at + 24 : at + 28] for at in _places(data, b"ANMF")]
    return b"".join([*riff_chunks(data), *inside])


def _places(data: bytes, name: bytes) -> Iterator[int]:
    at = data.find(name)
    while at >= 0:
        yield at
        at = data.find(name, at + 1)


def write_frames(
    file: BinaryIO,
    suffix: str,
    pages: FramePages,
    chosen: Sequence[int],
    images: Iterator[Image],
    strip: bool,
) -> tuple[str, ...]:
    """Write frames as APNG or as animated WebP, which is without loss if the source was."""
    frames = []
    for image in images:
        samples = joined(image, np.dtype(np.uint8))
        if pages.transparent and samples.shape[2] == 3:
            samples = np.dstack([samples, np.full(samples.shape[:2], 255, np.uint8)])
        frames.append(PIL.Image.fromarray(samples))
    options = pages.options(chosen, strip)
    if suffix == ".webp":
        options |= {"lossless": pages.lossless, "quality": QUALITY, "exact": True}
    kind = "WEBP" if suffix == ".webp" else "PNG"
    if len(frames) == 1:
        options = {k: v for k, v in options.items() if k not in ("duration", "loop")}
        frames[0].save(file, kind, **options)
        return ()
    frames[0].save(file, kind, save_all=True, append_images=frames[1:], **options)
    return ()
