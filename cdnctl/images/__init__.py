"""Pictures: from a file to float pixels and back, with everything else in the file kept.

::

    bytes ──decode──▶ Image: samples in the file's dtype + alpha, EXIF, ICC profile, …
    samples ──to_unit──▶ float32 pixels in [0, 1] ──from_unit──▶ samples
    Image ──encode──▶ bytes ──save──▶ file

Depth is what the file's header says, never a guess from the values. A picture stays in its own
dtype, which for most is a quarter of the memory of floats; `to_unit` and `from_unit` also take
parts of it. Pixels are clipped and rounded in `from_unit` only.

**Colour under alpha 0** cannot be seen, and is often black. A filter that mixes neighbours
would draw it into the visible edge as a dark fringe. So `read` gives such pixels the colour of
the nearest visible pixel, and keeps the file's own colour in `Image.hidden`; `write` puts it
back. Unchanged pixels thus come out as they went in, and changed ones have no fringe.

**Files of many pictures** are another matter: see `pages`.

**A new format** is a module beside `png`, `tiff`, `npy`, `pillow` and `raw`:
``decode(data, max_pixels)``, which asks `build.check_size` before memory is set aside and ends in
`build.make_image`; ``encode(samples, metadata)``; and ``DTYPES``, the dtypes of samples that each
suffix can hold.
`codec` then needs a line each in ``_DTYPES`` (or in READ_SUFFIXES), ``_decode`` and ``encode``, and
in `conversions` what the format cannot hold. tests/specimens.py takes a small file of its kind,
which the tests then damage. What Pillow reads and needs no path of its own is a name in
`pillow.FORMATS` and, where it holds no metadata, in ``pillow._PLAIN``: imageio then reads it.
"""

from cdnctl.files import remove_temporary, temporary_name
from cdnctl.images.build import MAX_PIXELS, MEGAPIXEL, as_stored, upright
from cdnctl.images.codec import (
    LOSSY_SUFFIXES,
    READ_SUFFIXES,
    WRITE_SUFFIXES,
    conversions,
    count_pixels,
    decode,
    encode,
    holds,
    is_image_path,
    read,
    read_bytes,
    save,
    saving,
    stored_dtype,
    stored_size,
    write,
)
from cdnctl.images.image import Image, Metadata, from_unit, to_unit
from cdnctl.images.notes import with_note
from cdnctl.images.pages import Pages, is_unknown
from cdnctl.images.pillow import QUALITY, jpeg_orientation
from cdnctl.images.quiet import quiet
from cdnctl.images.stacks import (
    is_array,
    open_pages,
    read_page,
    takes_pages,
    write_pages,
)
from cdnctl.units import PEAK

__all__ = [
    "LOSSY_SUFFIXES",
    "MAX_PIXELS",
    "MEGAPIXEL",
    "PEAK",
    "QUALITY",
    "READ_SUFFIXES",
    "WRITE_SUFFIXES",
    "Image",
    "Metadata",
    "Pages",
    "as_stored",
    "conversions",
    "count_pixels",
    "decode",
    "encode",
    "from_unit",
    "holds",
    "is_array",
    "is_image_path",
    "is_unknown",
    "jpeg_orientation",
    "open_pages",
    "quiet",
    "read",
    "read_bytes",
    "read_page",
    "remove_temporary",
    "save",
    "saving",
    "stored_dtype",
    "stored_size",
    "takes_pages",
    "temporary_name",
    "to_unit",
    "upright",
    "with_note",
    "write",
    "write_pages",
]
