"""Camera raw, developed by LibRaw."""

from __future__ import annotations

import io

from cdnctl.errors import ImageError
from cdnctl.images.build import check_size, make_image
from cdnctl.images.image import Image, Metadata

SUFFIXES = frozenset({".dng", ".cr2", ".cr3", ".nef", ".arw", ".raf", ".orf", ".rw2"})


def decode(data: bytes, max_pixels: int) -> Image:
    """Develop a camera raw file to 16-bit sRGB with the camera's white balance."""
    try:
        import rawpy
    except ImportError:
        raise ImageError(
            'camera raw needs an extra package; run: pip install "cdnctl[raw]"'
        ) from None
    with rawpy.imread(io.BytesIO(data)) as raw:
        check_size(raw.sizes.width, raw.sizes.height, max_pixels)
        samples = raw.postprocess(use_camera_wb=True, output_bps=16)  # turned upright, too
    notes = ["camera raw developed to 16-bit sRGB"]
    return make_image(samples, metadata=Metadata(), notes=notes)
