"""Tests of TIFF: its layouts, codings and depths, and pages that are not there."""

from __future__ import annotations

import io
import struct

import numpy as np
import PIL.Image
import PIL.ImageOps
import pytest
import tifffile
from specimens import ICC, animated, assert_same, exif_block, noise, picture, read_bytes

from cdnctl import images
from cdnctl.errors import ImageError


@pytest.mark.parametrize("coding", range(5))
@pytest.mark.parametrize("depth", range(3))
def test_tiff_variants(coding, depth):
    """Every pair of codings, depths, byte orders and tiles, if not every four of them."""
    compression = (None, "lzw", "zlib", "packbits", "zstd")[coding]
    dtype = ("uint8", "uint16", "float32")[depth]
    byteorder = "<>"[(coding + depth) % 2]
    tile = (None, (16, 16))[(coding + depth // 2) % 2]
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


def test_premultiplied_alpha_becomes_straight():
    straight = np.array([[[200, 100, 50, 128], [255, 0, 9, 255]]], np.uint16) * 257
    premultiplied = straight.copy()
    premultiplied[:, :, :3] = np.rint(straight[:, :, :3] * (straight[:, :, 3:] / 65535))
    out = io.BytesIO()
    tifffile.imwrite(out, premultiplied, photometric="rgb", extrasamples=["assocalpha"])
    image = read_bytes(out.getvalue())
    assert np.abs(image.pixels * 65535 - straight[:, :, :3]).max() <= 1
    assert "premultiplied" in image.notes[0]


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
    assert found[0].metadata == found[1].metadata and found[1].metadata.dpi == (150, 300)
    assert found[1].pixels.shape == (7, 5, 3) and b"Maker" in found[1].metadata.exif


def test_tiff_resolution_in_centimetres():
    out = io.BytesIO()
    tifffile.imwrite(out, noise(2, 2, 3, "uint8"), resolution=(100, 50), resolutionunit=3)
    image = read_bytes(out.getvalue())
    assert image.metadata.dpi == pytest.approx((254, 127))
    assert read_bytes(images.encode(image, ".tif")).metadata == image.metadata


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
