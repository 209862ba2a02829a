"""How results are stored: format, depth, quality, dither, and the note in the file."""

from __future__ import annotations

import io
import struct
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import PIL.ImageCms
import pytest
import torch
from processes import Run
from tiny import noisy_picture, save_tiny, write

from cdnctl import images
from cdnctl.api import Model, load
from cdnctl.core.tone import to_display
from cdnctl.errors import UsageError
from cdnctl.images import Image, Metadata
from cdnctl.images.notes import text_of, with_note
from cdnctl.restore import Denoise, Settings, restore
from cdnctl.restore.operation import Result
from cdnctl.restore.writing import Writing, rounded
from cdnctl.selection import Models

SIGMA = 0.1
NOTE = "cdnctl 1 denoise, model m, sigma 2"
SRGB = PIL.ImageCms.ImageCmsProfile(PIL.ImageCms.createProfile("sRGB")).tobytes()
DESCRIPTION, SOFTWARE, MAKER_NOTE = 270, 305, 37500


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Model:
    return load(save_tiny(tmp_path_factory.mktemp("model") / "m.safetensors"))


def stored(writing: Writing, result: Result, suffix: str) -> Image:
    """What is read from the file that a result is written to."""
    data, _ = writing.encoded(Denoise(Settings(SIGMA)), restored(result), suffix)
    return images.read(io.BytesIO(data))


def restored(result: Result) -> Any:
    """A result with what a manifest would say of it."""
    from cdnctl.restore import Restored

    return Restored(result.image, result.model, SIGMA, SIGMA, {}, ends=result.ends)


def ramp(dtype: Any, channels: int = 3) -> Image:
    """All values of 16 bits, in the dtype."""
    values = np.arange(65536, dtype=np.float64).reshape(256, 256, 1).repeat(channels, 2) / 65535
    return Image(images.from_unit(values, np.dtype(dtype)))


# -- depth ----------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["uint8", "uint16", "uint32", "float32"])
@pytest.mark.parametrize("depth", [8, 16])
def test_depth_is_the_nearest_value(model: Model, dtype: str, depth: int) -> None:
    image = ramp(dtype)
    read = stored(Writing(depth=depth), Result(image, model), ".png")
    full = 2**depth - 1
    assert read.dtype == f"uint{depth}"
    ideal = image.samples / (np.iinfo(dtype).max if image.dtype.kind == "u" else 1.0) * full
    assert np.abs(read.samples - ideal).max() <= 0.5 + 1e-6
    # And back again, where it has room for all.
    if image.dtype == "uint8":
        again = stored(Writing(depth=8), Result(read, model), ".png")
        np.testing.assert_array_equal(again.samples, image.samples)


def test_counts_of_a_range_fill_the_depth(model: Model) -> None:
    counts = np.linspace(100, 4095, 64).round().astype(np.uint16).reshape(8, 8, 1)
    result = Result(Image(counts), model, ends=(100.0, 4095.0))
    read = stored(Writing(depth=8), result, ".png")
    assert read.samples.min() == 0 and read.samples.max() == 255
    np.testing.assert_allclose(read.samples, (counts - 100.0) / 3995 * 255, atol=0.5 + 1e-9)
    # The same where the format asks for it, and not where it holds the counts.
    np.testing.assert_array_equal(stored(Writing(), result, ".bmp").samples[..., :1], read.samples)
    np.testing.assert_array_equal(stored(Writing(), result, ".tif").samples, counts)


def test_alpha_and_hidden_colours_change_depth_too(model: Model) -> None:
    rng = np.random.default_rng(0)
    samples, alpha = rng.integers(0, 256, (9, 8, 3)), rng.integers(1, 256, (9, 8))
    alpha[2:4] = 0
    png = images.read(io.BytesIO(_png(np.dstack([samples, alpha]).astype(np.uint8))))
    assert png.hidden is not None
    deep = stored(Writing(depth=16), Result(png, model), ".png")
    assert deep.alpha is not None and deep.hidden is not None
    np.testing.assert_array_equal(deep.alpha, alpha * 257)
    np.testing.assert_array_equal(deep.hidden, png.hidden.astype(np.uint16) * 257)
    np.testing.assert_array_equal(deep.samples[alpha > 0], samples[alpha > 0] * 257)


def _png(samples: np.ndarray) -> bytes:
    file = io.BytesIO()
    PIL.Image.fromarray(samples).save(file, "PNG")
    return file.getvalue()


def test_sixteen_bits_of_eight_are_the_networks_own(model: Model) -> None:
    """Not eight in the clothes of sixteen; and rounded to eight, what eight would have been."""
    image = Image.of(noisy_picture(20, 24))
    plain = restore(image, model, Settings(SIGMA)).image.samples
    fine = restore(image, model, Settings(SIGMA, finer=True)).image.samples
    assert fine.dtype == np.uint16 and (fine % 257 != 0).mean() > 0.9
    # Twice rounded is off by a step where the first rounding hits a half.
    off = np.abs(np.rint(fine / 257).astype(int) - plain)
    assert off.max() <= 1 and (off > 0).mean() < 0.01
    # Nothing changes in steps of 8 bits where nothing is wanted.
    still = restore(image, model, Settings(SIGMA, strength=0.0, finer=True)).image.samples
    np.testing.assert_array_equal(still, image.samples.astype(np.uint16) * 257)


# -- dither ---------------------------------------------------------------------------------


def test_dithering_keeps_means_and_whole_numbers() -> None:
    values = np.repeat(np.linspace(0, 255, 41)[:, None, None], 40000, 1)
    found = rounded(values, dither=True)
    assert np.abs(found - values).max() < 1
    # The standard error of a mean of 40,000 that are off by half a step at most is 0.0025.
    np.testing.assert_allclose(found.mean((1, 2)), values[:, 0, 0], atol=0.0125)
    assert np.abs(rounded(values, dither=False).mean((1, 2)) - values[:, 0, 0]).max() > 0.2
    whole = np.arange(256.0).reshape(16, 16, 1)
    np.testing.assert_array_equal(rounded(whole, dither=True), whole)


@pytest.mark.parametrize("dtype", ["uint16", "uint32", "float64"])
def test_what_eight_bits_hold_is_not_dithered(model: Model, dtype: str) -> None:
    values = np.arange(256.0).reshape(16, 16, 1) / 255
    image = Image(images.from_unit(values, np.dtype(dtype)))
    writing = Writing(depth=8, dither=True)
    read = stored(writing, Result(image, model), ".png")
    np.testing.assert_array_equal(read.samples.ravel(), np.arange(256))
    between = Image(images.from_unit(values * 0.9 + 0.05, np.dtype(dtype)))
    first, second = (stored(writing, Result(between, model), ".png").samples for _ in range(2))
    np.testing.assert_array_equal(first, second, "it is the same each time")
    plain = stored(Writing(depth=8), Result(between, model), ".png").samples
    assert (first != plain).any() and np.abs(first.astype(int) - plain).max() <= 1


# -- refusals -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options, suffix, words",
    [
        ({"depth": 16}, ".jpg", ["--depth 16", ".jpg", "--format"]),
        ({"depth": 16}, ".bmp", ["--depth 16", ".bmp"]),
        ({"linear": True}, ".jpg", ["--linear", ".jpg", "--format"]),
        ({"linear": True, "depth": 8}, "", ["--linear", "--depth 16"]),
        ({"quality": 80}, ".png", ["--quality 80", ".png", ".jpg"]),
        ({"suffix": ".png"}, ".tif", [".tif", "--format is png"]),
        ({"depth": 12}, "", ["--depth is 12", "8 or 16"]),
        ({"suffix": ".pngg"}, "", ["--format is 'pngg'", "png"]),
        ({"dither": True}, "", ["--dither", "--depth 8"]),
        ({"dither": True, "depth": 16}, "", ["--dither", "--depth 8"]),
    ],
)
def test_what_a_format_cannot_hold_is_refused(
    options: dict[str, Any], suffix: str, words: list[str]
) -> None:
    with pytest.raises(UsageError) as error:
        Writing(**options).check({suffix})
    assert all(word in str(error.value) for word in words) and "\n" not in str(error.value)


@pytest.mark.parametrize("dtype", ["uint8", "uint16", "float32"])
def test_linear_light_is_what_the_tone_curve_was_laid_on(model: Model, dtype: str) -> None:
    """With alpha, and colours below it; the ends stay the ends."""
    image = ramp(dtype)
    alpha = np.full(image.samples.shape[:2], 3, image.dtype)
    image = replace(image, alpha=alpha, metadata=Metadata(icc=SRGB))
    read = stored(Writing(linear=True), Result(image, model), ".tif")
    assert read.dtype == (np.float32 if dtype == "float32" else np.uint16)
    again = to_display(torch.from_numpy(read.pixels.astype(np.float64))).numpy()
    step = 1e-6 if dtype == "float32" else 12.92 / 65535
    np.testing.assert_allclose(again, image.pixels, atol=step)
    assert read.pixels.min() == 0 and read.pixels.max() == 1
    assert read.metadata.icc is None, "it is of another curve"
    np.testing.assert_allclose(images.to_unit(read.alpha), images.to_unit(alpha), atol=1e-4)


def test_two_suffixes_of_one_format_agree() -> None:
    Writing(suffix=".jpg").check({".jpeg"})
    Writing(suffix=".tiff", depth=16).check({".tif"})
    Writing(quality=50).check({".jpg", ".png"})


def test_quality_weighs_size_against_error(model: Model) -> None:
    image = Image.of(noisy_picture(48, 64))
    for suffix in (".jpg", ".webp"):
        sizes, errors = [], []
        for quality in (30, 70, 100):
            writing = Writing(quality=quality)
            result = restored(Result(image, model))
            data, _ = writing.encoded(Denoise(Settings(SIGMA)), result, suffix)
            sizes.append(len(data))
            found = images.read(io.BytesIO(data)).samples
            errors.append(np.square(found - image.samples.astype(float)).mean())
        assert sizes == sorted(sizes) and errors == sorted(errors, reverse=True)
        assert errors[0] > errors[2] > 0, "with a quality WebP, too, is lossy"


# -- the note -------------------------------------------------------------------------------


def exif(**texts: str) -> bytes:
    tags = PIL.Image.Exif()
    tags[271] = "Maker"
    for name, text in texts.items():
        tags[{"software": SOFTWARE, "description": DESCRIPTION}[name]] = text
    tags.get_ifd(34665)[MAKER_NOTE] = b"points into itself"
    return tags.tobytes()[6:]


@pytest.mark.parametrize("suffix", [".jpg", ".webp", ".tif"])
def test_a_note_takes_the_first_free_place(suffix: str) -> None:
    cases = [
        (None, {SOFTWARE: NOTE}),
        (exif(), {SOFTWARE: NOTE}),
        (exif(software="Darkroom 5"), {SOFTWARE: "Darkroom 5", DESCRIPTION: NOTE}),
        (exif(description="my cat"), {SOFTWARE: NOTE, DESCRIPTION: "my cat"}),
        (exif(software="a", description="b"), {SOFTWARE: "a", DESCRIPTION: "b"}),
        (exif(software="cdnctl 0 x"), {SOFTWARE: f"cdnctl 0 x; {NOTE}"}),
    ]
    for before, expected in cases:
        image = Image.of(noisy_picture(9, 8))
        metadata = with_note(Metadata(exif=before), NOTE, suffix)
        data = images.encode(replace(image, metadata=metadata), suffix)
        tags = PIL.Image.open(io.BytesIO(data)).getexif()
        found = {tag: tags[tag] for tag in (SOFTWARE, DESCRIPTION) if tag in tags}
        assert found == expected
        if before is not None:
            assert tags[271] == "Maker"
            assert tags.get_ifd(34665)[MAKER_NOTE] == b"points into itself"


def test_the_rest_of_an_exif_block_stays_where_it_was() -> None:
    """Makers' notes hold places in the block."""
    for order in ("<", ">"):
        head = {"<": b"II", ">": b"MM"}[order] + struct.pack(order + "HI", 42, 8)
        entry = struct.pack(order + "HHI", 271, 2, 6) + struct.pack(order + "I", 26)
        block = head + struct.pack(order + "H", 1) + entry + bytes(4) + b"Maker\0"
        longer = with_note(Metadata(exif=block), NOTE, ".jpg").exif
        assert longer is not None and longer[8 : len(block)] == block[8:]
        assert text_of(longer, 271) == b"Maker" and text_of(longer, SOFTWARE) == NOTE.encode()
        tags = PIL.Image.Exif()
        tags.load(longer)
        assert tags[271] == "Maker" and tags[SOFTWARE] == NOTE


def test_damaged_or_full_blocks_are_left_alone() -> None:
    for block in (b"", b"II", b"XX*\0\x08\0\0\0", b"II*\0\xff\xff\0\0", b"II*\0\x08\0\0\0\x09\0ab"):
        before = Metadata(exif=block)
        after = with_note(before, NOTE, ".jpg")
        assert after == before or not block
    full = Metadata(exif=exif(description="x" * 64_900))
    assert with_note(full, NOTE, ".jpg") == full, "JPEG would leave all of it out"
    assert with_note(full, NOTE, ".webp") != full
    assert with_note(Metadata(), NOTE, ".bmp") == Metadata()


def test_png_gets_one_text_more() -> None:
    own = ((b"tEXt", b"Software\0Darkroom 5"), (b"tEXt", b"Description\0my cat"))
    image = Image.of(noisy_picture(9, 8))
    metadata = with_note(Metadata(png=own), "naïve cdnctl", ".png")
    data = images.encode(replace(image, metadata=metadata), ".png")
    read = images.read(io.BytesIO(data))
    assert read.metadata.png == (*own, (b"tEXt", b"Software\0na\\xefve cdnctl"))
    np.testing.assert_array_equal(read.samples, image.samples)


# -- the command ----------------------------------------------------------------------------


def test_a_folder_gets_the_format(tmp_path: Path, cdnctl: Run, weights: Path) -> None:
    for name in ("a.jpg", "b.tif", "sub/c.PNG"):
        write(tmp_path / "in" / name)
    options = ("-r", "--model", weights, "--sigma", "25")
    deep = ("--format", "png", "--depth", "16", *options)
    assert cdnctl("denoise", "in", "-o", "out", *deep).code == 0
    outputs = {p.relative_to(tmp_path / "out").as_posix() for p in (tmp_path / "out").rglob("*.*")}
    assert outputs - {"cdnctl-manifest.jsonl"} == {"a.png", "b.png", "sub/c.png"}
    assert images.read(tmp_path / "out" / "sub" / "c.png").dtype == np.uint16
    again = cdnctl("denoise", "in", "-o", "out", "--resume", "--json", *deep)
    assert {r["event"] for r in again.records} == {"skipped", "finished"}
    shallow = cdnctl("denoise", "in", "-o", "out", "--resume", "--json", *deep, "--depth", "8")
    assert [r["event"] for r in shallow.records].count("restored") == 3
    write(tmp_path / "in" / "a.png")
    clash = cdnctl("denoise", "in", "-o", "new", *deep)
    assert clash.code == 2 and "'new/a.png'" in clash.err and not (tmp_path / "new").exists()


def test_a_file_a_pipe_and_refusals(tmp_path: Path, cdnctl: Run, weights: Path) -> None:
    source = write(tmp_path / "a.png")
    options = ("--model", weights, "--sigma", "25")
    assert cdnctl("denoise", "a.png", "--format", "JPG", "--quality", "60", *options).code == 0
    data = (tmp_path / "a_denoised.jpg").read_bytes()
    assert PIL.Image.open(io.BytesIO(data)).format == "JPEG"
    assert PIL.Image.open(io.BytesIO(data)).getexif()[SOFTWARE].startswith("cdnctl ")
    piped = cdnctl("denoise", "-", "-o", "-", "--format", "jpg", "--quality", "60", *options,
                   stdin=source.read_bytes())  # fmt: skip
    assert piped.out == data
    bare = cdnctl("denoise", "-", "-o", "-", "--no-note", *options, stdin=source.read_bytes())
    noted = cdnctl("denoise", "-", "-o", "-", *options, stdin=source.read_bytes())
    assert b"cdnctl" not in bare.out and b"sigma 25" in noted.out
    one, other = (images.read(io.BytesIO(d.out)).samples for d in (bare, noted))
    np.testing.assert_array_equal(one, other)
    stripped = cdnctl("denoise", "-", "-o", "-", "--strip-metadata", *options,
                      stdin=source.read_bytes())  # fmt: skip
    assert b"cdnctl" not in stripped.out
    for extra, word in (
        (("-o", "x.jpg", "--depth", "16"), "--depth 16"),
        (("-o", "x.jpg", "--format", "png"), "--format is png"),
        (("-o", "x.png", "--quality", "3"), "--quality 3"),
        (("--format", "gif"), "'gif'"),
        (("--dither",), "--depth 8"),
    ):
        done = cdnctl("denoise", "a.png", *extra, *options)
        assert done.code == 2 and word in done.err and len(done.err.splitlines()) == 1
    assert {p.name for p in tmp_path.iterdir()} == {"a.png", "a_denoised.jpg"}


def test_repairs_are_finer_too(tmp_path: Path, cdnctl: Run, weights: Path) -> None:
    write(tmp_path / "a.png")
    options = ("--steps", "2", "--model", weights, "--depth", "16")
    assert cdnctl("upscale", "a.png", "-o", "b.png", *options).code == 0
    large = images.read(tmp_path / "b.png")
    assert large.dtype == np.uint16 and (large.samples % 257 != 0).mean() > 0.9


def test_the_library_writes_as_it_is_told(tmp_path: Path) -> None:
    """`Models` and `Batch` without a command, with what they write by default."""
    from cdnctl.restore.batch import Batch
    from cdnctl.restore.plan import Job

    source = write(tmp_path / "a.png")
    models = Models(str(save_tiny(tmp_path / "m.safetensors")), torch.device("cpu"))
    for writing in (Writing(), Writing(note=False)):
        job = Job(source, tmp_path / f"{writing.note}.png")
        (done,) = Batch(models, Denoise(Settings(SIGMA)), writing).run([job])
        assert done.error is None
        assert (b"cdnctl" in job.output.read_bytes()) == writing.note
