"""Tests of the formats that Pillow and imageio read and write."""

from __future__ import annotations

import io
import struct
from pathlib import Path

import imagecodecs
import numpy as np
import PIL.Image
import PIL.IptcImagePlugin
import pytest
from specimens import ICC, IPTC, assert_same, noise, picture, pillow_bytes, read_bytes, sun_raster

from cdnctl import images
from cdnctl.errors import ImageError


@pytest.mark.parametrize("kind", ["PNG", "GIF", "BMP", "TIFF"])
def test_palette_becomes_rgb_with_a_note(kind):
    source = PIL.Image.fromarray(noise(6, 7, 3, "uint8")).quantize(16)
    out = io.BytesIO()
    source.save(out, kind)
    image = read_bytes(out.getvalue())
    assert np.array_equal(np.rint(image.pixels * 255), np.asarray(source.convert("RGB")))
    assert image.notes == ("palette image converted to RGB",)


@pytest.mark.parametrize("kind", ["JPEG", "TIFF"])
def test_cmyk_becomes_rgb_with_a_note(kind):
    out = io.BytesIO()
    PIL.Image.new("CMYK", (5, 4), (0, 255, 255, 0)).save(out, kind, icc_profile=ICC)
    image = read_bytes(out.getvalue())
    assert image.pixels.shape == (4, 5, 3)
    assert np.abs(image.pixels - (1, 0, 0)).max() < 0.05
    assert image.notes == ("CMYK converted to RGB",)
    assert image.metadata.icc is None  # it describes CMYK


@pytest.mark.parametrize("kind", ["PNG", "BMP", "TIFF", "PPM"])
def test_one_bit_becomes_grayscale(kind):
    bits = noise(5, 11, 1, "uint8")[:, :, 0] > 127
    out = io.BytesIO()
    PIL.Image.fromarray(bits).save(out, kind)
    image = read_bytes(out.getvalue())
    assert np.array_equal(image.pixels[:, :, 0], bits)
    assert image.dtype == np.uint8
    assert "1-bit" in image.notes[0]


def test_deep_formats_are_never_cut_to_8_bits_in_silence():
    header = b"P6 2 1 65535\n"
    with pytest.raises(ImageError, match="16 bits"):
        read_bytes(header + bytes(12))
    gray = read_bytes(b"P5 2 1 65535\n" + struct.pack(">2H", 258, 65535))
    assert gray.dtype == np.uint16
    assert np.rint(gray.pixels * 65535).ravel().tolist() == [258, 65535]


def test_webp_is_written_as_it_was_coded():
    samples = noise(32, 32, 3, "uint8")
    for lossless in (True, False):
        image = read_bytes(pillow_bytes(samples, "WEBP", lossless=lossless))
        assert image.lossless == lossless
        assert read_bytes(images.encode(image, ".webp")).lossless == lossless
    gray = picture(noise(4, 4, 1, "uint8"), icc=ICC[:16] + b"GRAY" + ICC[20:])
    assert read_bytes(images.encode(gray, ".webp")).metadata.icc is None


@pytest.mark.parametrize("options", [{"lossless": True}, {}, {"exif": b"Exif\0\0"}])
def test_a_webp_header_tells_what_the_decoder_finds(options):
    """Before the decoder, which sets memory aside at once; of all three kinds of header."""
    for width, height in [(1, 1), (30, 20), (257, 16383), (16383, 3)]:
        out = io.BytesIO()
        PIL.Image.new("RGB", (width, height)).save(out, "WEBP", **options)
        with pytest.raises(ImageError, match=rf"\b{width} x {height} pixels"):
            images.decode(out.getvalue(), "a.webp", 0)


def test_gray_profile_cannot_go_into_webp():
    profile = ICC[:16] + b"GRAY" + ICC[20:]
    image = picture(noise(8, 9, 1, "uint8"), icc=profile)
    assert images.conversions(image, ".webp") == ("ICC data left out",)
    assert read_bytes(images.encode(image, ".webp")).metadata.icc is None
    assert images.conversions(image, ".png") == ()


def test_large_exif_is_left_out_of_jpeg_with_a_note():
    exif = PIL.Image.Exif()
    exif[34665] = {37500: bytes(70_000)}
    image = picture(noise(3, 3, 3, "uint8"), exif=exif.tobytes()[6:])
    assert images.conversions(image, ".jpg") == ("EXIF data left out",)
    assert read_bytes(images.encode(image, ".jpg")).metadata.exif is None


def test_sixteen_bits_into_jpeg_is_said():
    image = picture(noise(8, 8, 3, "uint16"))
    assert images.conversions(image, ".jpg") == ("uint16 samples stored as uint8",)
    assert read_bytes(images.encode(image, ".jpg")).dtype == np.uint8


@pytest.mark.parametrize("record", [IPTC, IPTC[:-1]])  # of even and odd length
def test_iptc_survives(record):
    """Where Photoshop puts it: IptcImagePlugin looks there."""
    image = picture(noise(8, 9, 3, "uint8"), iptc=record)
    for suffix in (".jpg", ".tif"):
        assert images.conversions(image, suffix) == ()
        data = images.encode(image, suffix)
        assert read_bytes(data).metadata.iptc == record
        with PIL.Image.open(io.BytesIO(data)) as file:
            info = PIL.IptcImagePlugin.getiptcinfo(file)
            assert info is not None and info[2, 0] == b"\0\4"
    for suffix in (".png", ".webp", ".bmp"):
        assert images.conversions(image, suffix) == ("IPTC data left out",)
    long = picture(noise(8, 9, 3, "uint8"), iptc=record * 5000)
    assert images.conversions(long, ".jpg") == ("IPTC data left out",)
    assert read_bytes(images.encode(long, ".jpg")).metadata.iptc is None


# -- read by imageio alone ------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "channels", "dtype"),
    [("JPEG2000", channels, "uint8") for channels in (1, 2, 3, 4)]
    + [("JPEG2000", 1, "uint16"), ("SGI", 1, "uint8"), ("SGI", 3, "uint8"), ("SGI", 4, "uint8")]
    + [("SUN", 1, "uint8"), ("SUN", 3, "uint8")],
)
def test_jpeg_2000_sgi_and_sun_raster_are_read_to_the_last_bit(kind, channels, dtype):
    samples = noise(24, 17, channels, dtype)
    data = sun_raster(samples) if kind == "SUN" else pillow_bytes(samples, kind)
    image = read_bytes(data)
    assert_same(image, picture(samples))
    assert_same(read_bytes(images.encode(image, ".png")), image)
    assert image.notes == () and image.suffix == ".png"


@pytest.mark.parametrize("suffix", [".jp2", ".j2k", ".sgi", ".ras"])
def test_a_folder_is_searched_for_them(suffix):
    assert images.is_image_path(Path(f"a{suffix}"))


@pytest.mark.parametrize(
    ("channels", "bits", "message"),
    [(3, 16, "16 bits a sample would be cut to 8"), (1, 12, "12 bits"), (3, 12, "12 bits")],
)
def test_deep_jpeg_2000_is_never_cut_in_silence(channels, bits, message):
    samples = noise(24, 17, channels, "uint16").squeeze() >> (16 - bits)
    for codec in ("jp2", "j2k"):
        data = imagecodecs.jpeg2k_encode(
            samples, codecformat=codec, bitspersample=bits, reversible=True
        )
        with pytest.raises(ImageError, match=message):
            read_bytes(data)


def test_deep_sgi_is_never_cut_in_silence():
    with pytest.raises(ImageError, match="16 bits a sample would be cut to 8"):
        read_bytes(pillow_bytes(noise(24, 17, 3, "uint8"), "SGI", bpc=2))


def test_jpeg_2000_with_a_box_behind_its_pixels_is_whole():
    data = pillow_bytes(noise(24, 17, 3, "uint8"), "JPEG2000")
    at = data.index(b"jp2c") - 4
    closed = data[:at] + struct.pack(">I", len(data) - at) + data[at + 4 :]
    box = struct.pack(">I", 12) + b"xml <x/>"
    assert_same(read_bytes(closed + box), read_bytes(data))
    with pytest.raises(ImageError, match="cut short"):
        read_bytes(closed[:-1] + box)


def test_what_another_reader_takes_for_its_own_is_refused(monkeypatch):
    """imageio lets each reader of Pillow try, and Pillow takes the first that wants a file."""
    data = pillow_bytes(noise(24, 17, 3, "uint8"), "BMP")
    monkeypatch.setattr(PIL.Image, "ID", ["GREEDY", *PIL.Image.ID])
    greedy = (lambda file, name: PIL.Image.new("RGB", (9, 9)), None)
    monkeypatch.setitem(PIL.Image.OPEN, "GREEDY", greedy)
    with pytest.raises(ImageError, match="damaged"):
        read_bytes(data)
