"""Tests of reading and writing pictures: what goes in must come out."""

from __future__ import annotations

import builtins
import io
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import PIL.ImageOps
import pytest
import tifffile
from camera import mosaic, to_linear
from hypothesis import given, settings
from hypothesis import strategies as st
from specimens import (
    ICC,
    animated,
    assert_same,
    exif_block,
    noise,
    picture,
    pillow_bytes,
    png16,
    read_bytes,
)

from cdnctl import images
from cdnctl.errors import ImageError
from cdnctl.images import Image, Metadata

DEPTHS = {
    ".png": ["uint8", "uint16"],
    ".tif": ["uint8", "uint16", "float16", "float32"],
    ".webp": ["uint8"],
    ".bmp": ["uint8"],
}


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


@pytest.mark.parametrize(
    ("suffix", "size", "channels"),
    [
        (".png", (5000, 1), 1),
        (".png", (3000, 17), 3),
        (".png", (1, 5000), 3),
        (".tif", (5000, 1), 3),
        (".tif", (1, 5000), 1),
        (".webp", (5000, 3), 3),
    ],
)
def test_long_and_narrow(suffix, size, channels):
    """Of noise, which no coder makes smaller."""
    for dtype in DEPTHS[suffix]:
        image = picture(noise(*size, channels, dtype))
        assert_same(read_bytes(images.encode(image, suffix)), image)


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
    twice = read_bytes(images.encode(replace(image, metadata=once), suffix)).metadata
    assert twice == once


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


@pytest.mark.parametrize(
    ("kind", "orientation"),
    [("PNG", turn) for turn in range(1, 9)]
    + [(kind, turn) for kind in ("TIFF", "WEBP", "JPEG") for turn in (6, 7)],
)
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


def test_alpha_cannot_go_into_jpeg_or_bmp():
    for suffix in (".jpg", ".jpeg", ".bmp"):
        with pytest.raises(ImageError, match=r"transparency; choose \.png"):
            images.encode(picture(noise(3, 3, 4, "uint8")), suffix)


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


@pytest.mark.parametrize("kind", ["GIF", "PNG", "WEBP", "TIFF"])
def test_several_frames_are_refused(kind):
    with pytest.raises(ImageError, match="3 frames"):
        read_bytes(animated(kind))


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


SIZED = ["PNG", "BMP", "GIF", "TIFF", "WEBP", "JPEG", "PPM", "AVIF", "TGA", "JPEG2000", "SGI"]


@pytest.mark.parametrize("kind", SIZED)
def test_too_many_pixels_are_refused_before_decoding(kind):
    data, name = pillow_bytes(noise(20, 30, 3, "uint8"), kind), f"a.{kind.lower()}"
    with pytest.raises(ImageError, match=r"30 x 20 pixels.* --max-megapixels 1$"):
        images.decode(data, name, 599)
    assert images.decode(data, name, 600).pixels.shape == (20, 30, 3)


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


def test_a_notebook_shows_an_image_on_one_line() -> None:
    samples = np.arange(60000, dtype=np.uint16).reshape(100, 200, 3)
    bare = Image(samples)
    assert repr(bare) == "Image(uint16 (100, 200, 3), 0..59999)"
    full = Image(samples, samples[..., 0], Metadata(icc=ICC, xmp=b"x" * 10**6), ("a note",))
    told = ("alpha", f"icc of {len(ICC)} bytes", "xmp of 1000000 bytes", "a note")
    assert repr(full) == f"Image(uint16 (100, 200, 3), 0..59999, {', '.join(told)})"


def dng(scene: np.ndarray, **texts: str) -> bytes:
    """A raw file whose sensor saw a scene (H, W, 3) in [0, 1] of sRGB values at half exposure."""
    identity = [v for entry in (3.2404542, -1.5371385, -0.4985314, -0.9692660, 1.8760108, 0.0415560,
                                0.0556434, -0.2040259, 1.0572252)
                for v in (round(entry * 10**7), 10**7)]  # fmt: skip
    black, white = 500, 16500
    seen = np.rint(mosaic(to_linear(scene)) / 2 * (white - black) + black).astype(np.uint16)
    tags = [
        (50706, 1, 4, b"\1\4\0\0", True),
        (33421, 3, 2, (2, 2), True),
        (33422, 1, 4, b"\0\1\1\2", True),
        (50721, 10, 9, identity, True),
        (50728, 5, 3, [1] * 6, True),
        (50714, 3, 1, black, True),
        (50717, 3, 1, white, True),
        (50778, 3, 1, 21, True),
        *((code, 2, 0, texts[name], True) for name, code in (("maker", 271), ("model", 272))),
    ]
    out = io.BytesIO()
    tifffile.imwrite(out, seen, photometric=32803, extratags=tags, metadata=None)
    return out.getvalue()


def test_raw_is_as_bright_as_it_was_exposed_and_says_who_took_it():
    pytest.importorskip("rawpy", reason="camera raw is an extra")
    scene = np.full((96, 128, 3), [0.3, 0.5, 0.4])
    scene[:, 64:] = 0.7
    image = images.decode(dng(scene, maker="Maker", model="Model 1"), "a.dng")
    assert image.dtype == np.uint16 and image.samples.shape == (96, 128, 3)
    for columns in (slice(16, 48), slice(80, 112)):
        found = to_linear(image.pixels[16:80, columns].astype(np.float64)).mean((0, 1))
        want = to_linear(scene[16:80, columns]).mean((0, 1)) / 2
        np.testing.assert_allclose(found, want, rtol=0.05)
    tags = PIL.Image.Exif()
    tags.load(image.metadata.exif)
    assert (tags[271], tags[272], tags[274]) == ("Maker", "Model 1", 1)
    assert any("raw" in note for note in image.notes)
