"""Camera raw, developed by LibRaw."""

from __future__ import annotations

import io
from typing import Any

import PIL.Image

from cdnctl.errors import ImageError
from cdnctl.images.build import check_size, make_image
from cdnctl.images.image import Image, Metadata
from cdnctl.images.metadata import EXIF_IFD, EXIF_PREFIX, ORIENTATION, describing_tags, exif_tags

SUFFIXES = frozenset({".dng", ".cr2", ".cr3", ".nef", ".arw", ".raf", ".orf", ".rw2"})

_SRGB = (2.4, 12.92)  # exponent of the tone curve, and slope of its foot
_MAKER_NOTE = 37500


def decode(data: bytes, max_pixels: int) -> Image:
    """Develop a camera raw file to 16-bit sRGB with the camera's white balance, as bright as it
    was exposed."""
    try:
        import rawpy
    except ImportError:
        raise ImageError(
            'camera raw needs an extra package; run: pip install "cdnctl[raw]"'
        ) from None
    notes = ["camera raw developed to 16-bit sRGB"]
    with rawpy.imread(io.BytesIO(data)) as raw:
        check_size(raw.sizes.width, raw.sizes.height, max_pixels)
        # Brightened until a hundredth of the pixels is white, as LibRaw has it, lights are lost.
        samples = raw.postprocess(
            use_camera_wb=True, output_bps=16, gamma=_SRGB, no_auto_bright=True
        )  # turned upright, too
        exif = _exif(data, raw, notes)
    return make_image(samples, metadata=Metadata(exif=exif), notes=notes)


def _exif(data: bytes, raw: Any, notes: list[str]) -> bytes | None:
    """What the file says of the picture: most raw files are TIFF files, others have a preview
    that says it. Makers' own notes, which only their programs read, point into the file."""
    tags = PIL.Image.Exif()
    try:
        if data[:4] in (b"II*\0", b"MM\0*"):
            tags.load_from_fp(io.BytesIO(data))
        else:
            preview = PIL.Image.open(io.BytesIO(raw.extract_thumb().data))
            tags = exif_tags(preview.info.get("exif"))
        told = describing_tags(tags)
        if EXIF_IFD in told:
            inner = dict(told.get_ifd(EXIF_IFD))
            if inner.pop(_MAKER_NOTE, None) is not None:
                notes.append("the maker's own notes left out")
            told[EXIF_IFD] = inner
        if not len(told):
            return None
        told[ORIENTATION] = 1
        return told.tobytes()[len(EXIF_PREFIX) :]
    except Exception:  # of LibRaw, which finds no preview, and Pillow's parser, in many ways
        notes.append("no EXIF data found")
        return None
