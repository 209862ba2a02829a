"""Tests of reading and writing pictures: what goes in must come out."""

from __future__ import annotations

import builtins
import contextlib
import io
import os
import struct
import warnings
import zlib
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import PIL.ImageCms
import PIL.ImageOps
import PIL.ImageSequence
import PIL.IptcImagePlugin
import pytest
import tifffile
from hypothesis import given, settings
from hypothesis import strategies as st

from cdnctl import images
from cdnctl.errors import ImageError
from cdnctl.images import Image, Metadata

ICC = PIL.ImageCms.ImageCmsProfile(PIL.ImageCms.createProfile("sRGB")).tobytes()
MODES = {1: "L", 2: "LA", 3: "RGB", 4: "RGBA"}
DEPTHS = {
    ".png": ["uint8", "uint16"],
    ".tif": ["uint8", "uint16", "float16", "float32"],
    ".webp": ["uint8"],
    ".bmp": ["uint8"],
}


def exif_block(orientation: int = 1) -> bytes:
    exif = PIL.Image.Exif()
    exif[271] = "Maker"
    exif[274] = orientation
    exif[306] = "2021:03:04 05:06:07"
    exif[34665] = {36867: "2021:03:04 05:06:07", 37500: b"maker's note"}
    exif[34853] = {1: "N"}
    return exif.tobytes()


def noise(height: int, width: int, channels: int, dtype: str, seed: int = 0) -> np.ndarray:
    """Random samples (H, W, C) over the full range; a third of alpha, if any, is 0."""
    rng = np.random.default_rng(seed)
    shape = (height, width, channels)
    if np.dtype(dtype).kind == "f":
        samples = rng.random(shape).astype(dtype)
    else:
        samples = rng.integers(0, np.iinfo(dtype).max, shape, dtype, endpoint=True)
    if channels in (2, 4):
        samples[rng.random((height, width)) < 1 / 3, -1] = 0
    return samples


def picture(samples: np.ndarray, **metadata: Any) -> Image:
    """Make an `Image` of samples (H, W, C) by way of a TIFF file that tifffile wrote."""
    channels = samples.shape[2]
    out = io.BytesIO()
    tifffile.imwrite(
        out,
        samples if channels > 1 else samples[:, :, 0],
        photometric="rgb" if channels > 2 else "minisblack",
        planarconfig="contig",
        extrasamples=["unassalpha"] if channels in (2, 4) else None,
        metadata=None,
    )
    image = images.read(io.BytesIO(out.getvalue()))
    return images.replace(image, metadata=Metadata(**metadata))


def pillow_bytes(samples: np.ndarray, kind: str, **options: Any) -> bytes:
    out = io.BytesIO()
    PIL.Image.fromarray(samples.squeeze(2) if samples.shape[2] == 1 else samples).save(
        out, kind, **options
    )
    return out.getvalue()


def read_bytes(data: bytes) -> Image:
    return images.read(io.BytesIO(data))


def png16(samples: np.ndarray, *, key: tuple[int, ...] | None = None) -> bytes:
    """Write a 16-bit PNG the plain way, unfiltered: an independent check of the reader."""
    height, width, channels = samples.shape
    rows = samples.astype(">u2").tobytes()
    stride = len(rows) // height
    raw = b"".join(b"\0" + rows[y * stride : (y + 1) * stride] for y in range(height))
    kind = {1: 0, 2: 4, 3: 2, 4: 6}[channels]
    chunks = [(b"IHDR", struct.pack(">IIBBBBB", width, height, 16, kind, 0, 0, 0))]
    if key:
        chunks.append((b"tRNS", struct.pack(f">{len(key)}H", *key)))
    chunks += [(b"IDAT", zlib.compress(raw)), (b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))
        for name, data in chunks
    )


def assert_same(left: Image, right: Image) -> None:
    assert left.dtype == right.dtype
    assert np.array_equal(left.pixels, right.pixels)
    for a, b in ((left.alpha, right.alpha), (left.hidden, right.hidden)):
        assert (a is None) == (b is None)
        assert a is None or (a.dtype == b.dtype and np.array_equal(a, b))


# ------------------------------------------------------------------------------- round trips


@settings(max_examples=150, deadline=None)
@given(
    st.sampled_from([(suffix, dtype) for suffix in DEPTHS for dtype in DEPTHS[suffix]]),
    st.sampled_from([1, 2, 3, 4]),
    st.integers(1, 40),
    st.integers(1, 40),
    st.integers(0, 99),
)
def test_lossless_formats_return_what_they_were_given(kind, channels, height, width, seed):
    suffix, dtype = kind
    if (suffix == ".webp" and channels < 3) or (suffix == ".bmp" and channels in (2, 4)):
        channels = 3
    image = picture(noise(height, width, channels, dtype, seed))
    again = read_bytes(images.encode(image, suffix))
    assert_same(image, again)
    assert images.conversions(image, suffix) == again.notes == ()
    assert images.encode(again, suffix) == images.encode(image, suffix)


@pytest.mark.parametrize("suffix", [".png", ".tif", ".webp"])
@pytest.mark.parametrize("size", [(100, 1), (5000, 1), (1, 5000), (5000, 3), (3000, 17)])
@pytest.mark.parametrize("channels", [1, 3])
def test_long_and_narrow(suffix, size, channels):
    """Of noise, which no coder makes smaller."""
    channels = 3 if suffix == ".webp" else channels
    for dtype in DEPTHS[suffix]:
        image = picture(noise(*size, channels, dtype))
        assert_same(read_bytes(images.encode(image, suffix)), image)


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


@pytest.mark.parametrize("suffix", [".png", ".tif", ".jpg", ".webp"])
@pytest.mark.parametrize("dtype", ["uint8", "uint16"])
def test_metadata_survives(suffix, dtype):
    meta = {"icc": ICC, "exif": exif_block()[6:], "xmp": b"<x:xmpmeta/>", "dpi": (300.0, 150.0)}
    image = picture(noise(8, 9, 3, dtype), **meta)
    once = read_bytes(images.encode(image, suffix)).metadata
    assert (once.icc, once.xmp) == (ICC, b"<x:xmpmeta/>")
    assert once.dpi == (None if suffix == ".webp" else pytest.approx((300, 150), abs=0.02))
    tags = PIL.Image.Exif()
    tags.load(once.exif)
    assert tags[306] == tags.get_ifd(34665)[36867] == "2021:03:04 05:06:07"
    assert tags.get_ifd(34665)[37500] == b"maker's note"
    assert tags.get_ifd(34853)[1] == "N"
    twice = read_bytes(images.encode(images.replace(image, metadata=once), suffix)).metadata
    assert twice == once


IPTC = b"\x1c\x02\x00\x00\x02\0\4" + b"\x1c\x02\x78\x00\x07caption"


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


def test_gray_profile_cannot_go_into_webp():
    profile = ICC[:16] + b"GRAY" + ICC[20:]
    image = picture(noise(8, 9, 1, "uint8"), icc=profile)
    assert images.conversions(image, ".webp") == ("ICC data left out",)
    assert read_bytes(images.encode(image, ".webp")).metadata.icc is None
    assert images.conversions(image, ".png") == ()


def test_other_libraries_read_what_is_written():
    meta = {"icc": ICC, "exif": exif_block()[6:], "dpi": (300.0, 300.0)}
    for dtype in ("uint8", "uint16", "float32"):
        samples = noise(700, 301, 4, dtype)
        data = images.encode(picture(samples, **meta), ".tif")
        with tifffile.TiffFile(io.BytesIO(data)) as file:
            assert np.array_equal(file.asarray(), samples)
            assert len(file.pages.first.dataoffsets) > 1
    with PIL.Image.open(
        io.BytesIO(images.encode(picture(noise(4, 5, 3, "uint8"), **meta), ".tif"))
    ) as file:
        assert file.info["icc_profile"] == ICC
        assert file.getexif().get_ifd(34665)[36867] == "2021:03:04 05:06:07"
        assert file.info["dpi"] == (300, 300)


def test_tiff_resolution_in_centimetres():
    out = io.BytesIO()
    tifffile.imwrite(out, noise(2, 2, 3, "uint8"), resolution=(100, 50), resolutionunit=3)
    image = read_bytes(out.getvalue())
    assert image.metadata.dpi == pytest.approx((254, 127))
    assert read_bytes(images.encode(image, ".tif")).metadata == image.metadata


@pytest.mark.parametrize("byteorder", ["<", ">"])
def test_bigtiff_is_tiff(byteorder):
    """Its tags as well: they are stored in another way."""
    samples, tags = noise(5, 7, 3, "uint16"), [(274, "H", 1, 6, True), (271, "s", 0, "Maker", True)]
    found = []
    for big in (False, True):
        out = io.BytesIO()
        tifffile.imwrite(
            out,
            samples,
            photometric="rgb",
            bigtiff=big,
            byteorder=byteorder,
            resolution=(300, 150),
            resolutionunit=2,
            iccprofile=ICC,
            extratags=tags,
            metadata=None,
        )
        found.append(read_bytes(out.getvalue()))
    assert_same(*found)
    assert found[0].metadata == found[1].metadata and found[1].metadata.dpi == (300, 150)
    assert found[1].pixels.shape == (7, 5, 3) and b"Maker" in found[1].metadata.exif


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


@pytest.mark.parametrize("suffix", [".png", ".tif", ".jpg", ".webp", ".bmp"])
def test_strip_metadata_leaves_pixels_only(tmp_path, suffix):
    meta = {"icc": ICC, "exif": exif_block()[6:], "xmp": b"<x/>", "dpi": (300.0, 300.0)}
    image = picture(noise(8, 9, 3, "uint8"), **meta)
    images.write(image, tmp_path / f"a{suffix}", strip_metadata=True)
    meta = images.read(tmp_path / f"a{suffix}").metadata
    assert (meta.icc, meta.exif, meta.xmp, meta.png) == (None, None, None, ())
    assert meta.dpi is None or suffix in (".bmp", ".jpg")
    data = (tmp_path / f"a{suffix}").read_bytes()
    assert b"Maker" not in data and b"2021" not in data


# ------------------------------------------------------------------------------- orientation


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("kind", ["PNG", "TIFF", "WEBP", "JPEG"])
def test_orientation_is_applied_and_reset(kind, orientation):
    options = {"exif": exif_block(orientation)}
    if kind == "WEBP":
        options["lossless"] = True
    data = pillow_bytes(noise(5, 7, 3, "uint8"), kind, **options)
    with PIL.Image.open(io.BytesIO(data)) as file:
        expected = np.asarray(PIL.ImageOps.exif_transpose(file))
    image = read_bytes(data)
    assert np.array_equal(np.rint(image.pixels * 255), expected)
    tags = PIL.Image.Exif()
    tags.load(image.metadata.exif)
    assert tags.get(274, 1) == 1
    assert tags[271] == "Maker"
    if kind != "JPEG":
        assert_same(read_bytes(images.encode(image, "." + kind.lower())), image)


@pytest.mark.parametrize("form", ['x tiff:Orientation="%d"', "<tiff:Orientation>%d</tiff:O"])
def test_orientation_is_reset_in_xmp_too(form):
    """Or programs that look there turn the picture once more; untouched where none applied."""
    xmp = (form % 6).encode()
    samples = noise(5, 7, 3, "uint8")
    turned = read_bytes(pillow_bytes(samples, "JPEG", exif=exif_block(6), xmp=xmp))
    assert turned.samples.shape == (7, 5, 3) and turned.metadata.xmp == (form % 1).encode()
    assert read_bytes(pillow_bytes(samples, "JPEG", xmp=xmp)).metadata.xmp == xmp


@pytest.mark.parametrize("orientation", range(1, 9))
def test_orientation_turns_16_bit_tiff_and_alpha_too(orientation):
    samples = noise(5, 7, 4, "uint16")
    out = io.BytesIO()
    tifffile.imwrite(
        out,
        samples,
        photometric="rgb",
        extrasamples=["unassalpha"],
        metadata=None,
        extratags=[(274, "H", 1, orientation, True)],
    )
    image = read_bytes(out.getvalue())
    eight = PIL.Image.fromarray((samples >> 8).astype(np.uint8))
    eight.getexif()[274] = orientation
    expected = np.asarray(PIL.ImageOps.exif_transpose(eight))
    assert np.array_equal(image.alpha >> 8, expected[:, :, 3])
    assert_same(read_bytes(images.encode(image, ".tif")), image)


# ------------------------------------------------------------------------------------- alpha


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 999), st.sampled_from([2, 4]), st.sampled_from(["uint8", "uint16"]))
def test_colour_under_alpha_0_is_filled_for_work_and_put_back_in_the_file(seed, channels, dtype):
    samples = noise(12, 10, channels, dtype, seed)
    image = picture(samples)
    visible = samples[:, :, -1] > 0
    if visible.any() and not visible.all():
        seen = {tuple(pixel) for pixel in image.pixels[visible]}
        assert {tuple(pixel) for pixel in image.pixels[~visible]} <= seen
    flat = image.with_samples(images.from_unit(np.full(image.samples.shape, 0.5), image.dtype))
    data = images.encode(flat, ".png")
    again = read_bytes(data)
    assert np.array_equal(again.alpha, samples[:, :, -1])
    assert again.hidden is None or np.array_equal(again.hidden, samples[~visible][:, :-1])


def test_no_dark_fringe():
    samples = np.zeros((9, 9, 4), np.uint8)
    samples[2:7, 2:7] = 255
    image = picture(samples)
    assert (image.pixels == 1).all()


def test_wholly_transparent_picture_is_left_alone():
    samples = noise(6, 5, 4, "uint8")
    samples[:, :, 3] = 0
    image = picture(samples)
    assert image.hidden is None
    assert np.array_equal(np.rint(image.pixels * 255), samples[:, :, :3])
    assert_same(read_bytes(images.encode(image, ".png")), image)


def test_premultiplied_alpha_becomes_straight():
    straight = np.array([[[200, 100, 50, 128], [255, 0, 9, 255]]], np.uint16) * 257
    premultiplied = straight.copy()
    premultiplied[:, :, :3] = np.rint(straight[:, :, :3] * (straight[:, :, 3:] / 65535))
    out = io.BytesIO()
    tifffile.imwrite(out, premultiplied, photometric="rgb", extrasamples=["assocalpha"])
    image = read_bytes(out.getvalue())
    assert np.abs(image.pixels * 65535 - straight[:, :, :3]).max() <= 1
    assert "premultiplied" in image.notes[0]


def test_alpha_cannot_go_into_jpeg_or_bmp():
    for suffix in (".jpg", ".jpeg", ".bmp"):
        with pytest.raises(ImageError, match=r"transparency; choose \.png"):
            images.encode(picture(noise(3, 3, 4, "uint8")), suffix)


# ------------------------------------------------------------------------ dtypes and conversions


@pytest.mark.parametrize("byteorder", ["<", ">"])
@pytest.mark.parametrize("compression", [None, "lzw", "zlib", "packbits", "zstd"])
@pytest.mark.parametrize("tile", [None, (16, 16)])
@pytest.mark.parametrize("dtype", ["uint8", "uint16", "float32"])
def test_tiff_variants(byteorder, compression, tile, dtype):
    samples = noise(37, 21, 3, dtype)
    for planar in ("contig", "separate"):
        stored = samples if planar == "contig" else np.moveaxis(samples, -1, 0)
        out = io.BytesIO()
        tifffile.imwrite(
            out,
            stored,
            photometric="rgb",
            planarconfig=planar,
            byteorder=byteorder,
            compression=compression,
            predictor=compression in ("lzw", "zlib", "zstd"),
            tile=tile,
        )
        assert_same(read_bytes(out.getvalue()), picture(samples))


def test_tiff_white_is_zero_and_odd_depths():
    samples = noise(4, 5, 1, "uint16")[:, :, 0]
    out = io.BytesIO()
    tifffile.imwrite(out, samples, photometric="miniswhite")
    assert np.array_equal(
        np.rint(read_bytes(out.getvalue()).pixels[:, :, 0] * 65535), 65535 - samples
    )

    twelve = noise(6, 8, 3, "uint16") >> 4
    out = io.BytesIO()
    tifffile.imwrite(out, twelve, photometric="rgb", bitspersample=12)
    image = read_bytes(out.getvalue())
    assert image.dtype == np.uint16
    assert np.abs(image.pixels - twelve / 4095).max() < 1e-5
    assert image.notes == ("12-bit samples stored as uint16",)


def test_float_tiff_keeps_values_outside_the_unit_range():
    samples = np.array([[[-0.5], [0.25], [7.0]]], np.float32)
    image = picture(samples)
    assert np.array_equal(image.pixels, samples)
    assert np.array_equal(read_bytes(images.encode(image, ".tif")).pixels, samples)
    clipped = read_bytes(images.encode(image, ".png"))
    assert clipped.dtype == np.uint16
    assert clipped.pixels.ravel().tolist() == pytest.approx([0, 0.25, 1], abs=1e-5)
    assert images.conversions(image, ".png") == ("float32 samples stored as uint16",)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_numbers_that_are_not_finite_are_refused(bad):
    samples = np.full((3, 3, 1), bad, np.float32)
    with pytest.raises(ImageError, match="not finite"):
        picture(samples)
    fine = picture(np.zeros((3, 3, 1), np.float32))
    with pytest.raises(ImageError, match="finite"):
        images.encode(fine.with_samples(samples), ".png")


def test_whole_numbers_are_rounded_and_clipped():
    image = Image.of(np.array([[[-3.0], [0.5], [1.2], [100.4 / 255]]], np.float32))
    stored = np.asarray(PIL.Image.open(io.BytesIO(images.encode(image, ".png"))))
    assert stored.tolist() == [[0, 128, 255, 100]]


def test_sixteen_bits_into_jpeg_is_said():
    image = picture(noise(8, 8, 3, "uint16"))
    assert images.conversions(image, ".jpg") == ("uint16 samples stored as uint8",)
    assert read_bytes(images.encode(image, ".jpg")).dtype == np.uint8


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


def test_webp_is_written_as_it_was_coded():
    samples = noise(32, 32, 3, "uint8")
    for lossless in (True, False):
        image = read_bytes(pillow_bytes(samples, "WEBP", lossless=lossless))
        assert image.lossless == lossless
        assert read_bytes(images.encode(image, ".webp")).lossless == lossless
    gray = picture(noise(4, 4, 1, "uint8"), icc=ICC[:16] + b"GRAY" + ICC[20:])
    assert read_bytes(images.encode(gray, ".webp")).metadata.icc is None


def test_deep_formats_are_never_cut_to_8_bits_in_silence():
    header = b"P6 2 1 65535\n"
    with pytest.raises(ImageError, match="16 bits"):
        read_bytes(header + bytes(12))
    gray = read_bytes(b"P5 2 1 65535\n" + struct.pack(">2H", 258, 65535))
    assert gray.dtype == np.uint16
    assert np.rint(gray.pixels * 65535).ravel().tolist() == [258, 65535]


# ---------------------------------------------------------------------------------- refusals


def animated(kind: str) -> bytes:
    frames = [PIL.Image.fromarray(noise(5, 5, 3, "uint8", seed)) for seed in range(3)]
    out = io.BytesIO()
    frames[0].save(out, kind, save_all=True, append_images=frames[1:])
    return out.getvalue()


@pytest.mark.parametrize("kind", ["GIF", "PNG", "WEBP", "TIFF"])
def test_several_frames_are_refused(kind):
    with pytest.raises(ImageError, match="3 frames"):
        read_bytes(animated(kind))


def test_imagej_stacks_are_refused_and_thumbnails_are_not_pages():
    out = io.BytesIO()
    tifffile.imwrite(out, noise(5, 5, 4, "uint16").transpose(2, 0, 1), imagej=True)
    with pytest.raises(ImageError, match="4 frames"):
        read_bytes(out.getvalue())
    with tifffile.TiffFile(
        io.BytesIO(out.getvalue())
    ) as file:  # one page for all the frames, as for stacks over 4 GiB
        data = bytearray(out.getvalue())
        second = file.pages[0].offset + 2 + 12 * len(file.pages[0].tags)
        data[second : second + 4] = bytes(4)
    with pytest.raises(ImageError, match="4 frames"):
        read_bytes(bytes(data))
    out = io.BytesIO()
    with tifffile.TiffWriter(out) as writer:
        writer.write(noise(16, 16, 3, "uint8"), photometric="rgb", metadata=None)
        writer.write(noise(4, 4, 3, "uint8"), photometric="rgb", subfiletype=1, metadata=None)
    assert read_bytes(out.getvalue()).pixels.shape == (16, 16, 3)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("empty.png", b"", "empty"),
        ("text.png", b"hello, I am not a picture\n" * 9, "not a picture"),
        ("cut.png", pillow_bytes(noise(20, 20, 3, "uint8"), "PNG")[:300], "cut short"),
    ],
)
def test_bad_files_are_refused_with_their_path(tmp_path, name, content, message):
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(ImageError, match=message) as caught:
        images.read(path)
    assert f"'{path}'" in str(caught.value)


def test_folder_and_missing_file(tmp_path):
    (tmp_path / "x.png").mkdir()
    with pytest.raises(ImageError, match="folder"):
        images.read(tmp_path / "x.png")
    with pytest.raises(ImageError, match="no such file"):
        images.read(tmp_path / "y.png")


def test_unreadable_file(tmp_path, monkeypatch):
    def refuse(*_: Any) -> bytes:
        raise PermissionError(13, "Permission denied")

    (tmp_path / "a.png").touch()
    monkeypatch.setattr(Path, "read_bytes", refuse)  # root may read everything
    with pytest.raises(ImageError, match="permission"):
        images.read(tmp_path / "a.png")


SIZED = ["PNG", "BMP", "GIF", "TIFF", "WEBP", "JPEG", "PPM", "AVIF", "TGA"]


@pytest.mark.parametrize("kind", SIZED)
def test_too_many_pixels_are_refused_before_decoding(kind):
    data, name = pillow_bytes(noise(20, 30, 3, "uint8"), kind), f"a.{kind.lower()}"
    with pytest.raises(ImageError, match=r"30 x 20 pixels.* --max-megapixels 1$"):
        images.decode(data, name, 599)
    assert images.decode(data, name, 600).pixels.shape == (20, 30, 3)


@pytest.mark.parametrize("options", [{"lossless": True}, {}, {"exif": b"Exif\0\0"}])
def test_a_webp_header_tells_what_the_decoder_finds(options):
    """Before the decoder, which sets memory aside at once; of all three kinds of header."""
    for width, height in [(1, 1), (30, 20), (257, 16383), (16383, 3)]:
        out = io.BytesIO()
        PIL.Image.new("RGB", (width, height)).save(out, "WEBP", **options)
        with pytest.raises(ImageError, match=rf"\b{width} x {height} pixels"):
            images.decode(out.getvalue(), "a.webp", 0)


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


@pytest.mark.parametrize("kind", SIZED)
def test_pixels_are_counted_without_decoding(kind, tmp_path):
    path = tmp_path / f"a.{kind.lower()}"
    data = pillow_bytes(noise(20, 30, 3, "uint8"), kind)
    path.write_bytes(data)
    assert images.count_pixels(path) == 600 and images.stored_size(path) == (30, 20)
    path.write_bytes(b"no picture")
    assert images.count_pixels(path) == 10, "the number of bytes"
    assert images.stored_size(path) is None


def test_what_cannot_be_read_counts_nothing(tmp_path):
    os.mkfifo(tmp_path / "a.png")
    for name in ("a.png", "none.png", "."):
        assert images.count_pixels(tmp_path / name) == 0
        assert images.stored_size(tmp_path / name) is None
    for size in (8, 20, 30):
        (tmp_path / "b.png").write_bytes(png16(noise(2, 2, 3, "uint16"))[:size])
        assert images.count_pixels(tmp_path / "b.png") in (size, 4)


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "BMP", "TIFF", "GIF", "PPM"])
def test_the_format_is_kept_for_those_that_write_without_a_name(kind):
    suffix = {"JPEG": ".jpg", "TIFF": ".tif"}.get(kind, f".{kind.lower()}")
    image = read_bytes(pillow_bytes(noise(20, 30, 3, "uint8"), kind))
    assert image.suffix == (suffix if suffix in images.WRITE_SUFFIXES else ".png")
    again = read_bytes(images.encode(image, image.suffix))
    assert again.suffix == image.suffix


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


@pytest.mark.parametrize(
    ("name", "data", "package", "extra"),
    [
        ("a.heic", b"\0\0\0\x18ftypheic\0\0\0\0mif1heic", "pillow_heif", "heic"),
        ("a.nef", b"II*\0\x08\0\0\0\0\0", "rawpy", "raw"),
    ],
)
def test_missing_extras_are_named(tmp_path, monkeypatch, name, data, package, extra):
    original = builtins.__import__

    def without(module: str, *args: Any, **kwargs: Any) -> Any:
        if module == package:
            raise ImportError(module)
        return original(module, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    (tmp_path / name).write_bytes(data)
    with pytest.raises(ImageError, match=rf'pip install "cdnctl\[{extra}\]"'):
        images.read(tmp_path / name)


def test_a_blank_picture_packed_as_tightly_as_can_be_is_read():
    blank = PIL.Image.new("1", (2000, 2000))
    for kind, options in (("PNG", {"compress_level": 9}), ("TIFF", {"compression": "group4"})):
        out = io.BytesIO()
        blank.save(out, kind, **options)
        assert not read_bytes(out.getvalue()).pixels.any()


def test_unknown_suffix():
    with pytest.raises(ImageError, match=r"'\.gif' is not .*\.png"):
        images.encode(picture(noise(2, 2, 1, "uint8")), ".gif")
    assert images.is_image_path(Path("A.PNG")) and not images.is_image_path(Path("a.txt"))


# ----------------------------------------------------------------------------------- writing


@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError, MemoryError])
@pytest.mark.parametrize("existing", [b"old", None])
def test_interrupted_write_leaves_nothing(tmp_path, monkeypatch, error, existing):
    target = tmp_path / "a.png"
    if existing:
        target.write_bytes(existing)

    def fail(*_: Any) -> None:
        raise error

    monkeypatch.setattr("cdnctl.files.give_name", fail)
    with pytest.raises(ImageError if error is OSError else error):
        images.write(picture(noise(3, 3, 3, "uint8")), target)
    assert [path.read_bytes() for path in tmp_path.iterdir()] == ([existing] if existing else [])


def test_write_keeps_permissions_and_links(tmp_path):
    target, link = tmp_path / "a.png", tmp_path / "b.png"
    target.write_bytes(b"old")
    target.chmod(0o640)
    link.symlink_to(target)
    image = picture(noise(3, 3, 3, "uint8"))
    assert images.write(image, link) == ()
    assert link.is_symlink() and target.stat().st_mode & 0o777 == 0o640
    assert_same(images.read(target), image)


def test_write_refuses_what_is_no_file(tmp_path):
    image = picture(noise(3, 3, 3, "uint8"))
    (tmp_path / "d.png").mkdir()
    for path, message in [
        (tmp_path / "d.png", "regular file"),
        (tmp_path / "none" / "a.png", "no folder"),
        (tmp_path / ("x" * 300 + ".png"), "cannot write"),
        (tmp_path / "a", "suffix"),
    ]:
        with pytest.raises(ImageError, match=message) as caught:
            images.write(image, path)
        assert str(path) in str(caught.value)


def test_format_limits_are_reported():
    wide = Image.of(np.zeros((1, 70_000, 1), np.float32))
    for suffix in (".jpg", ".webp"):
        with pytest.raises(ImageError, match="cannot hold"):
            images.encode(wide, suffix)


def test_large_exif_is_left_out_of_jpeg_with_a_note():
    exif = PIL.Image.Exif()
    exif[34665] = {37500: bytes(70_000)}
    image = picture(noise(3, 3, 3, "uint8"), exif=exif.tobytes()[6:])
    assert images.conversions(image, ".jpg") == ("EXIF data left out",)
    assert read_bytes(images.encode(image, ".jpg")).metadata.exif is None


# ---------------------------------------------------------------------------------- damage


KINDS = ["png", "png16", "tiff", "tiff-lzw", "jpeg", "webp", "webp-lossy"]
KINDS += ["bmp", "gif", "ppm", "avif", "qoi"]
# Of the same formats what else there is of codings, layouts and colours; and what needs extras.
MORE_KINDS = ["png-palette", "png-bits", "png-adam7", "pgm16", "pbm", "tga", "jpeg-cmyk"]
MORE_KINDS += ["jpeg-progressive", "webp-gray", "gif-key", "bmp-palette", "tiff-zstd", "tiff-jpeg"]
MORE_KINDS += ["tiff-tiles", "tiff-float", "tiff-planar", "tiff-fax", "tiff-big", "heic"]


@cache
def specimens() -> dict[str, bytes]:
    """Return one small file of each kind, with metadata where the format has it."""
    meta = {"icc": ICC, "exif": exif_block(6)[6:], "xmp": b"<x/>", "dpi": (96.0, 96.0)}
    rgb, rgba = noise(24, 17, 3, "uint8"), noise(24, 17, 4, "uint16")
    lzw = io.BytesIO()
    tifffile.imwrite(lzw, rgba, photometric="rgb", compression="lzw", predictor=True)
    return {
        "png": images.encode(picture(rgb, **meta), ".png"),
        "png16": images.encode(picture(rgba, **meta), ".png"),
        "tiff": images.encode(picture(rgba, **meta), ".tif"),
        "tiff-lzw": lzw.getvalue(),
        "jpeg": images.encode(picture(rgb, **meta), ".jpg"),
        "webp": images.encode(picture(noise(24, 17, 4, "uint8"), **meta), ".webp"),
        "webp-lossy": pillow_bytes(rgb, "WEBP"),
        "bmp": pillow_bytes(rgb, "BMP"),
        "gif": pillow_bytes(rgb, "GIF"),
        "ppm": pillow_bytes(rgb, "PPM"),
        "avif": pillow_bytes(rgb[:8, :8], "AVIF"),
        "qoi": pillow_bytes(rgb, "QOI"),
    }


@cache
def more_specimens() -> dict[str, bytes]:
    """Return one small file of each further kind."""
    rgb, gray = noise(24, 17, 3, "uint8"), noise(24, 17, 1, "uint8")
    deep, floats = noise(24, 17, 3, "uint16"), noise(24, 17, 3, "float32")

    def saved(picture: PIL.Image.Image, kind: str, **options: Any) -> bytes:
        out = io.BytesIO()
        picture.save(out, kind, **options)
        return out.getvalue()

    def tiff(samples: np.ndarray, **options: Any) -> bytes:
        out = io.BytesIO()
        big = options.pop("bigtiff", False)
        tifffile.imwrite(out, samples, photometric="rgb", bigtiff=big, metadata=None, **options)
        return out.getvalue()

    colours = PIL.Image.fromarray(rgb)
    palette, bits = colours.quantize(16), PIL.Image.fromarray(gray[:, :, 0] > 127)
    files = {
        "png-palette": saved(palette, "PNG", transparency=bytes(range(16))),
        "png-bits": saved(bits, "PNG"),
        "png-adam7": adam7(rgb),
        "pgm16": b"P5 17 24 65535\n" + deep[:, :, 0].astype(">u2").tobytes(),
        "pbm": saved(bits, "PPM"),
        "tga": saved(PIL.Image.fromarray(noise(24, 17, 4, "uint8")), "TGA", compression="tga_rle"),
        "jpeg-cmyk": saved(colours.convert("CMYK"), "JPEG", icc_profile=ICC),
        "jpeg-progressive": saved(colours, "JPEG", progressive=True, exif=exif_block(3)),
        "webp-gray": pillow_bytes(gray, "WEBP", lossless=True),
        "gif-key": saved(palette, "GIF", transparency=3, interlace=True),
        "bmp-palette": saved(palette, "BMP"),
        "tiff-zstd": tiff(deep, compression="zstd", predictor=True),
        "tiff-jpeg": tiff(np.tile(rgb, (2, 2, 1)), compression="jpeg"),
        "tiff-tiles": tiff(deep, tile=(16, 16), compression="packbits"),
        "tiff-float": tiff(floats, compression="zlib", predictor=True, byteorder=">"),
        "tiff-planar": tiff(np.moveaxis(deep, -1, 0), planarconfig="separate"),
        "tiff-fax": saved(bits, "TIFF", compression="group4"),
        "tiff-big": tiff(deep, bigtiff=True),
    }
    with contextlib.suppress(ImportError):
        import pillow_heif

        pillow_heif.register_heif_opener()
        files["heic"] = saved(colours.resize((16, 16)), "HEIF", exif=exif_block(8))
    return files


def mutations(data: bytes, count: int, seed: int) -> list[bytes]:
    """Return damaged copies: some bytes changed, half of them in the first 200; a few cut.

    Of a third, a part is repeated, left out, moved, or made a number that has a meaning.
    """
    rng = np.random.default_rng(seed)
    copies = []
    for _ in range(count):
        copy = bytearray(data)
        for _ in range(rng.integers(1, 5)):
            end = min(200, len(copy)) if rng.random() < 0.5 else len(copy)
            copy[rng.integers(0, end)] = rng.integers(0, 256)
        if rng.random() < 1 / 3:
            at, length = rng.integers(0, len(copy)), rng.choice([1, 2, 4, 8, 12, 100])
            to = min(200, len(copy)) if rng.random() < 0.5 else len(copy)
            place = rng.integers(0, to)
            numbers = [bytes(length), b"\xff" * length, b"\x7f" + b"\xff" * (length - 1)]
            numbers += [number[::-1] for number in (numbers[2], b"\0" * (length - 1) + b"\1")]
            part = bytes(copy[at : at + length])
            copy[place : place + rng.choice([0, length])] = [b"", part, *numbers][rng.integers(7)]
        if rng.random() < 0.2:
            del copy[rng.integers(1, len(copy)) :]
        if copy[:8] == b"\x89PNG\r\n\x1a\n" and rng.random() < 0.7:
            copy = mended_png(bytes(copy))
        copies.append(bytes(copy))
    return copies


def mended_png(data: bytes) -> bytearray:
    """Make the checksums right again, so that damage gets past them."""
    out, at = bytearray(data), 8
    while at + 12 <= len(data):
        end = at + 8 + int.from_bytes(data[at : at + 4], "big")
        out[end : end + 4] = struct.pack(">I", zlib.crc32(data[at + 4 : end]))[: len(data) - end]
        at = end + 4
    return out


@pytest.mark.parametrize("kind", KINDS + MORE_KINDS)
def test_damaged_files_give_an_image_or_an_image_error(kind, capfd):
    files = specimens() | more_specimens()
    if kind not in files:
        pytest.skip("needs pillow-heif")
    data, name = files[kind], f"a.{kind.split('-')[0]}"  # TGA is known by its suffix only
    outcomes = {True: 0, False: 0}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        images.decode(data, name)
        for copy in mutations(data, 400, seed=len(kind)):
            try:
                image = images.decode(copy, name)
            except ImageError as error:
                assert name in str(error) and len(str(error)) < 300
                assert str(error).isprintable(), "on one line, and no commands to terminals"
                outcomes[False] += 1
            else:
                assert image.pixels.dtype == np.float32 and np.isfinite(image.pixels).all()
                if image.pixels.size < 10_000:
                    images.encode(image, ".tif")
                outcomes[True] += 1
    assert min(outcomes.values()) > 0
    printed = capfd.readouterr()
    # dav1d, which older Pillows bring, prints to stderr from C.
    assert printed.out == "" and (printed.err == "" or kind == "avif")


@pytest.mark.parametrize("channels", [1, 2, 3, 4])
@pytest.mark.parametrize("dtype", ["uint8", "uint16"])
def test_png_with_a_row_too_few_is_an_error(channels, dtype):
    data = bytearray(images.encode(picture(noise(9, 7, channels, dtype)), ".png"))
    data[23] = 10
    with pytest.raises(ImageError, match="cut short"):
        read_bytes(bytes(mended_png(bytes(data))))


@pytest.mark.parametrize("size", [(1, 1), (3, 2), (5, 9), (8, 8), (13, 21)])
def test_interlaced_png(size):
    samples = noise(*size, 3, "uint8")
    image = read_bytes(adam7(samples))
    assert np.array_equal(np.rint(image.pixels * 255), samples)
    with pytest.raises(ImageError, match="cut short"):
        read_bytes(adam7(samples, lose=1))


def adam7(samples: np.ndarray, lose: int = 0) -> bytes:
    """Write an interlaced 8-bit RGB PNG, its pixel data ``lose`` bytes short."""
    height, width, _ = samples.shape
    raw = b""
    for x, y, dx, dy in [
        (0, 0, 8, 8), (4, 0, 8, 8), (0, 4, 4, 8), (2, 0, 4, 4), (0, 2, 2, 4), (1, 0, 2, 2),
        (0, 1, 1, 2),
    ]:  # fmt: skip
        for row in samples[y::dy, x::dx]:
            raw += b"\0" + row.tobytes() if row.size else b""
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 1)
    packed = zlib.compress(raw[: len(raw) - lose])
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))
        for name, data in [(b"IHDR", header), (b"IDAT", packed), (b"IEND", b"")]
    )


def test_tiff_whose_pages_run_in_a_circle():
    frames = animated("TIFF")
    with tifffile.TiffFile(io.BytesIO(frames)) as file:
        offsets = [page.offset for page in file.pages]
        tags = [len(page.tags) for page in file.pages]
    data = bytearray(frames)
    end = offsets[2] + 2 + 12 * tags[2]
    data[end : end + 4] = struct.pack("<I", offsets[1])
    with pytest.raises(ImageError, match="frames"):
        read_bytes(bytes(data))


def test_tiff_with_a_missing_strip_is_an_error():
    for samples in (noise(32, 8, 3, "uint16"), noise(32, 8, 1, "uint8")):
        out = io.BytesIO()
        tifffile.imwrite(out, samples.squeeze(), rowsperstrip=8, metadata=None)
        data = bytearray(out.getvalue())
        with tifffile.TiffFile(io.BytesIO(data)) as file:
            at = file.pages.first.tags[257].valueoffset
        data[at] = 40
        with pytest.raises(ImageError, match="cut short"):
            read_bytes(bytes(data))


@pytest.mark.parametrize("kind", KINDS)
def test_a_file_cut_short_is_an_error_or_has_all_its_pixels(kind):
    data = specimens()[kind]
    whole = read_bytes(data)
    for length in range(0, len(data), max(1, len(data) // 150)):
        try:
            image = read_bytes(data[:length])
        except ImageError:
            continue
        missing_exif = image.metadata.exif != whole.metadata.exif  # it may follow the pixels
        assert missing_exif or np.array_equal(image.pixels, whole.pixels)


def test_a_notebook_shows_an_image_on_one_line() -> None:
    samples = np.arange(60000, dtype=np.uint16).reshape(100, 200, 3)
    bare = Image(samples)
    assert repr(bare) == "Image(uint16 (100, 200, 3), 0..59999)"
    full = Image(samples, samples[..., 0], Metadata(icc=ICC, xmp=b"x" * 10**6), ("a note",))
    told = ("alpha", f"icc of {len(ICC)} bytes", "xmp of 1000000 bytes", "a note")
    assert repr(full) == f"Image(uint16 (100, 200, 3), 0..59999, {', '.join(told)})"
