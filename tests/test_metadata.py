"""What files say of their picture when it is turned, and when its format changes."""

from __future__ import annotations

import io
import struct

import numpy as np
import PIL.Image
import PIL.PngImagePlugin
import pytest
from specimens import noise

from cdnctl import images
from cdnctl.images.metadata import turned_exif


def encoded(kind: str, **options: object) -> bytes:
    """A file of 7 x 5 pixels, by Pillow."""
    file = io.BytesIO()
    PIL.Image.fromarray(noise(5, 7, 3, "uint8")).save(file, kind, **options)  # type: ignore[arg-type]
    return file.getvalue()


def sized(orientation: int, order: str = "<") -> bytes:
    """EXIF that tells the picture's size as stored, in either byte order."""
    exif = PIL.Image.Exif()
    exif.endian = order
    exif[274] = orientation
    exif[34665] = {36867: "2021:03:04 05:06:07", 40962: 7, 40963: 70000}
    return exif.tobytes()


@pytest.mark.parametrize("order", ["<", ">"])
@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("kind", ["JPEG", "PNG"])
def test_width_and_height_in_exif_are_those_of_the_turned_picture(
    kind: str, orientation: int, order: str
) -> None:
    """The second is too large for the 16 bits that the first has: types go with their values."""
    image = images.decode(encoded(kind, exif=sized(orientation, order)), "a")
    tags = PIL.Image.Exif()
    tags.load(image.metadata.exif)
    inner = tags.get_ifd(34665)
    expected = (7, 70000) if image.samples.shape == (5, 7, 3) else (70000, 7)
    assert (image.samples.shape == (5, 7, 3)) == (orientation < 5)
    assert (inner[40962], inner[40963]) == expected
    assert inner[36867] == "2021:03:04 05:06:07"


def test_turning_exif_twice_changes_nothing() -> None:
    exif = sized(1).removeprefix(b"Exif\0\0")
    assert turned_exif(exif) != exif and turned_exif(turned_exif(exif)) == exif
    with pytest.raises(struct.error):
        turned_exif(exif[:9])


def test_xmp_and_resolution_turn_as_well() -> None:
    xmp = b'<x exif:PixelXDimension="7" exif:PixelYDimension="5" tiff:Orientation="6"/>'
    data = encoded("JPEG", exif=sized(6), xmp=xmp, dpi=(300, 150))
    found = images.decode(data, "a.jpg").metadata
    assert (
        found.xmp == b'<x exif:PixelYDimension="7" exif:PixelXDimension="5" tiff:Orientation="1"/>'
    )
    assert found.dpi == pytest.approx((150, 300))


def test_comments_stay_in_jpeg_and_are_missed_elsewhere() -> None:
    image = images.decode(encoded("JPEG", comment=b"from the tower"), "a.jpg")
    again = images.decode(images.encode(image, ".jpg"), "b.jpg")
    assert again.metadata.comment == b"from the tower" and images.conversions(image, ".jpg") == ()
    assert images.conversions(image, ".png") == ("comment data left out",)
    assert images.conversions(again.with_samples(again.samples), ".tif") == (
        "comment data left out",
    )


def test_text_of_png_is_missed_elsewhere() -> None:
    text = PIL.PngImagePlugin.PngInfo()
    text.add_text("Title", "Dresden")
    image = images.decode(encoded("PNG", pnginfo=text), "a.png")
    assert images.conversions(image, ".png") == ()
    for suffix in (".jpg", ".tif", ".webp", ".bmp"):
        assert "text data left out" in images.conversions(image, suffix)
    plain = images.decode(encoded("PNG"), "a.png")
    assert images.conversions(plain, ".jpg") == () and np.array_equal(plain.samples, image.samples)
