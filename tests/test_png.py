"""Tests of PNG: every bit, text and date, and what is cut short."""

from __future__ import annotations

import io
import struct
import zlib

import numpy as np
import PIL.Image
import PIL.PngImagePlugin
import pytest
from specimens import adam7, mended_png, noise, picture, pillow_bytes, png16, read_bytes

from cdnctl import images
from cdnctl.errors import ImageError


@pytest.mark.parametrize("channels", [1, 2, 3, 4])
def test_16_bit_png_is_read_to_the_last_bit(channels):
    samples = noise(9, 13, channels, "uint16")
    image = read_bytes(png16(samples))
    colours = channels - (channels in (2, 4))
    assert len(np.unique(samples & 255)) > 50
    visible = np.ones((9, 13), bool) if image.alpha is None else image.alpha > 0
    stored = np.rint(image.pixels * 65535).astype(np.uint16)
    assert image.dtype == np.uint16
    assert np.array_equal(stored[visible], samples[:, :, :colours][visible])
    assert image.alpha is None or np.array_equal(image.alpha, samples[:, :, -1])


def test_16_bit_png_with_a_transparent_colour_gets_alpha():
    samples = noise(5, 6, 3, "uint16")
    image = read_bytes(png16(samples, key=tuple(int(v) for v in samples[2, 3])))
    assert image.alpha is not None
    assert [tuple(at) for at in np.argwhere(image.alpha == 0)] == [(2, 3)]
    assert np.array_equal(image.hidden, samples[2:3, 3])


def test_png_text_date_and_gamma_survive():
    info = PIL.PngImagePlugin.PngInfo()
    info.add_text("Author", "Somebody", zip=True)
    info.add_itxt("Title", "Ein schönes Bild")
    info.add(b"tIME", bytes([7, 229, 1, 2, 3, 4, 5]))
    info.add(b"gAMA", struct.pack(">I", 45455))
    first = read_bytes(pillow_bytes(noise(3, 4, 3, "uint8"), "PNG", pnginfo=info))
    data = images.encode(first, ".png")
    assert read_bytes(data).metadata == first.metadata
    with PIL.Image.open(io.BytesIO(data)) as file:
        file.load()
        assert file.text == {"Author": "Somebody", "Title": "Ein schönes Bild"}
        assert file.info["gamma"] == pytest.approx(0.45455)


@pytest.mark.parametrize("size", [(1, 1), (3, 2), (5, 9), (8, 8), (13, 21)])
def test_interlaced_png(size):
    samples = noise(*size, 3, "uint8")
    image = read_bytes(adam7(samples))
    assert np.array_equal(np.rint(image.pixels * 255), samples)
    with pytest.raises(ImageError, match="cut short"):
        read_bytes(adam7(samples, lose=1))


@pytest.mark.parametrize("channels", [1, 2, 3, 4])
@pytest.mark.parametrize("dtype", ["uint8", "uint16"])
def test_png_with_a_row_too_few_is_an_error(channels, dtype):
    data = bytearray(images.encode(picture(noise(9, 7, channels, dtype)), ".png"))
    data[23] = 10
    with pytest.raises(ImageError, match="cut short"):
        read_bytes(bytes(mended_png(bytes(data))))


def test_the_default_limit():
    """250 megapixels, whatever Pillow thinks of it, and more where it is asked for."""
    header = struct.pack(">IIBBBBB", 30_000, 30_000, 8, 2, 0, 0, 0)
    data = b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(part)) + name + part + struct.pack(">I", zlib.crc32(name + part))
        for name, part in [(b"IHDR", header), (b"IDAT", bytes(100_000)), (b"IEND", b"")]
    )
    with pytest.raises(ImageError, match=r"30000 x 30000 pixels, .* limit of 250 megapixels"):
        read_bytes(data)
    with pytest.raises(ImageError, match="damaged"):
        images.decode(data, "a.png", 900 * images.MEGAPIXEL)


@pytest.mark.parametrize("width", [15_000, 60_000, 2**31 - 1])
def test_a_header_that_claims_huge_dimensions(width):
    data = bytearray(png16(noise(2, 2, 3, "uint16")))
    data[16:24] = struct.pack(">II", width, width)
    data[29:33] = struct.pack(">I", zlib.crc32(data[12:29]))
    with pytest.raises(ImageError, match=rf"{width} x {width} pixels, which .* bytes cannot hold"):
        read_bytes(bytes(data))
    webp = b"WEBPVP8X\x0a\0\0\0\0\0\0\0" + b"\xff" * 6
    with pytest.raises(ImageError, match="limit"):
        read_bytes(b"RIFF" + struct.pack("<I", len(webp)) + webp)
