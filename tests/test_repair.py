"""Holes, scale and blur, against the posterior mean of a Gaussian prior in closed form."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import pytest
import torch
from tiny import CLASSES, picture, tiny, write

from cdnctl import images
from cdnctl.api import Model
from cdnctl.core.linear import dense
from cdnctl.errors import ImageError, UnknownClassError, UsageError
from cdnctl.images import Image
from cdnctl.inverse.jpeg import box_of
from cdnctl.inverse.operators import Convolution, gaussian, motion
from cdnctl.restore import Deblock, Deblur, Inpaint, Repair, Repaired, RepairSettings, Upscale
from cdnctl.restore.prior import Prior

pytestmark = pytest.mark.slow  # seconds each

STD = 0.25  # of the pixels of the Gaussian model, whose mean is 1/2


@pytest.fixture(scope="module")
def random(tmp_path_factory: pytest.TempPathFactory) -> Model:
    return tiny(tmp_path_factory.mktemp("random"))


@pytest.fixture(scope="module")
def bell(tmp_path_factory: pytest.TempPathFactory) -> Model:
    """The exact denoiser of independent Gaussian pixels."""
    return tiny(tmp_path_factory.mktemp("bell"), gaussian=True)


def repaired(operation: Repair, image: Image, model: Model) -> Repaired:
    heard: list[float] = []
    (result,) = operation.run([operation.prepare(image, "x.png", b"")], model, heard.append)
    assert heard == sorted(heard) and heard[-1] == pytest.approx(1)
    return result


def floats(height: int = 24, width: int = 28, channels: int = 3) -> Image:
    return Image(picture(height, width, channels))


def square(height: int = 24, width: int = 28) -> np.ndarray:
    hole = np.zeros((height, width), bool)
    hole[6:14, 9:20] = True
    return hole


# -- the prior ------------------------------------------------------------------------


@pytest.mark.parametrize("target", [None, "cat"])
@pytest.mark.parametrize("channels", [1, 3])
def test_tiles_equal_the_whole(random: Model, target: str | None, channels: int) -> None:
    shape = channels, 150, 131
    mixture = random.mixture(target)
    whole, parts = Prior(random, shape, mixture), Prior(random, shape, mixture, tile=96)
    assert len(whole.tiles) == 1 and len(parts.tiles) > 4
    y = torch.rand(1, *shape, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(parts(y, 0.1), whole(y, 0.1), atol=2e-6, rtol=0)


def test_a_result_in_tiles_is_that_of_the_whole(random: Model) -> None:
    image, kernel = floats(90, 100), motion(5, 30)
    settings = [RepairSettings(noise=0.01, steps=3, tile=tile) for tile in (None, 88)]
    one, many = (repaired(Deblur(s, kernel, "m"), image, random).image.samples for s in settings)
    np.testing.assert_allclose(many, one, atol=1e-4)


def test_memory_that_does_not_suffice_is_refused(random: Model) -> None:
    with pytest.raises(ImageError, match=r"worked on as a whole.*--memory"):
        repaired(Upscale(RepairSettings(memory=10_000)), floats(), random)


# -- against closed forms ---------------------------------------------------------------


@pytest.mark.parametrize("channels", [1, 3])
def test_a_hole_in_independent_pixels_is_filled_with_their_mean(bell: Model, channels: int) -> None:
    """In time: a step goes back a share of the way from the smooth start."""
    image, hole = floats(channels=channels), square()
    result = repaired(Inpaint(RepairSettings(steps=120), hole), image, bell)
    filled = result.image.samples
    np.testing.assert_allclose(filled[hole], 0.5, atol=2e-3)
    np.testing.assert_array_equal(filled[~hole], image.samples[~hole])
    assert result.missed == 0


def test_known_pixels_with_noise_are_shrunk(bell: Model) -> None:
    image, hole, noise = floats(), square(), 0.05
    result = repaired(Inpaint(RepairSettings(noise=noise, steps=40), hole), image, bell)
    share = STD**2 / (STD**2 + noise**2)
    expected = np.where(hole[..., None], 0.5, 0.5 + share * (image.samples - 0.5))
    np.testing.assert_allclose(result.image.samples, expected, atol=6e-3)


@pytest.mark.parametrize("factor", [2, 3, 4])
def test_scale_of_independent_pixels(bell: Model, factor: int) -> None:
    image = floats(12, 10)
    result = repaired(Upscale(RepairSettings(steps=120), factor), image, bell).image.samples
    assert result.shape == (12 * factor, 10 * factor, 3)
    means = result.reshape(12, factor, 10, factor, 3).mean((1, 3))
    np.testing.assert_allclose(means, image.samples, atol=1e-5)
    repeated = image.samples.repeat(factor, 0).repeat(factor, 1)
    np.testing.assert_allclose(result, repeated, atol=2e-3)


@pytest.mark.parametrize("kernel", [gaussian(0.5), motion(4, 20), torch.tensor([[1.0, 3.0]])])
def test_blur_of_independent_pixels(bell: Model, kernel: torch.Tensor) -> None:
    """The posterior mean by a dense solution, over a scene that is larger than the picture."""
    image, noise = floats(12, 11, 1), 0.02
    deblur = Deblur(RepairSettings(noise=noise, steps=60), kernel, "k")
    result = repaired(deblur, image, bell).image.samples[..., 0]
    h, w = kernel.shape
    operator = Convolution(kernel / kernel.sum(), valid=True)
    scene = torch.full((1, 1, 12 + h - 1, 11 + w - 1), 0.5, dtype=torch.float64)
    a = dense(operator.apply, scene)
    m = torch.from_numpy(image.samples[..., 0]).double().flatten()
    normal = a @ a.mT + (noise / STD) ** 2 * torch.eye(len(a), dtype=torch.float64)
    expected = 0.5 + a.mT @ torch.linalg.solve(normal, m - 0.5)
    expected = expected.view(scene.shape[2:])
    top, left = h - 1 - h // 2, w - 1 - w // 2
    inside = expected[top : top + 12, left : left + 11].numpy()
    # What the kernel hardly lets through comes back slowly: most of it, not all.
    assert np.linalg.norm(result - inside) < 0.12 * np.linalg.norm(inside - 0.5)
    assert np.linalg.norm(result - inside) < 0.5 * np.linalg.norm(image.samples[..., 0] - inside)


def test_draws_have_the_spread_of_the_posterior(bell: Model) -> None:
    hole = square(32, 32)
    operation = Inpaint(RepairSettings(samples=10, steps=80), hole)
    result = repaired(operation, floats(32, 32), bell)
    assert result.draws.shape == (10, 32, 32, 3)
    spread = np.sqrt((result.spread()[hole] ** 2).mean())
    assert spread == pytest.approx(STD, rel=0.08)
    assert result.spread()[~hole].max() < 1e-6
    mean = result.draws.mean(0)
    np.testing.assert_allclose(result.image.samples[hole], mean[hole], atol=1e-6)


def test_draws_are_those_of_the_seed(random: Model) -> None:
    def of(seed: int) -> np.ndarray:
        settings = RepairSettings(samples=1, steps=2, seed=seed)
        return repaired(Inpaint(settings, square()), floats(), random).image.samples

    np.testing.assert_array_equal(of(3), of(3))
    assert np.abs(of(3) - of(4)).max() > 0.01


def test_a_class_changes_the_result(random: Model) -> None:
    def of(target: dict[str, float] | None) -> np.ndarray:
        settings = RepairSettings(steps=3, target=target)
        return repaired(Inpaint(settings, square()), floats(), random).image.samples

    assert np.abs(of({CLASSES[0]: 1.0}) - of({CLASSES[1]: 1.0})).max() > 1e-4
    with pytest.raises(UnknownClassError, match="zebra"):
        of({"zebra": 1.0})


# -- pictures ---------------------------------------------------------------------------


def test_what_was_transparent_can_be_seen(bell: Model, tmp_path: Path) -> None:
    alpha = np.where(square(), 0, 200).astype(np.uint8)
    path = write(tmp_path / "a.png", picture(24, 28), alpha=alpha)
    image = images.read(path)
    result = repaired(Inpaint(RepairSettings(steps=80)), image, bell).image
    images.write(result, tmp_path / "b.png")
    again = images.read(tmp_path / "b.png")
    assert again.alpha is not None
    np.testing.assert_array_equal(again.alpha, np.where(square(), 255, 200))
    assert np.abs(again.samples[square()].astype(float) - 127.5).max() < 4
    np.testing.assert_array_equal(again.samples[~square()], image.samples[~square()])


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
def test_alpha_and_depth_grow_with_the_picture(bell: Model, dtype: Any) -> None:
    samples = images.from_unit(picture(12, 10), np.dtype(dtype))
    alpha = np.full((12, 10), 7, dtype)
    result = repaired(Upscale(RepairSettings(steps=4)), Image(samples, alpha), bell).image
    assert result.samples.dtype == dtype and result.samples.shape == (24, 20, 3)
    assert result.alpha is not None and result.alpha.shape == (24, 20)
    assert (result.alpha == 7).all()


def test_gray_in_three_channels_stays_gray(random: Model) -> None:
    gray = np.repeat(picture(24, 28, 1), 3, 2)
    result = repaired(Inpaint(RepairSettings(steps=2), square()), Image(gray), random).image
    assert (np.ptp(result.samples, axis=2) == 0).all()


@pytest.mark.parametrize(
    "make, words",
    [
        (lambda s: Inpaint(s, np.zeros((4, 4), bool)), "no pixel is missing"),
        (lambda s: Inpaint(s, np.ones((4, 4), bool)), "every pixel is missing"),
        (lambda s: Upscale(s, 0), "factor of 0"),
        (lambda s: Upscale(s, 5), "factor of 5"),
        (lambda s: Deblur(s, torch.zeros(3, 3)), "sums to 0"),
    ],
)
def test_what_cannot_be_is_refused(make: Any, words: str) -> None:
    with pytest.raises(UsageError, match=words):
        make(RepairSettings())


@pytest.mark.parametrize("bad", [{"noise": 2.0}, {"noise": -0.1}, {"steps": 0}, {"samples": -1}])
def test_settings_that_cannot_be(bad: dict[str, Any]) -> None:
    with pytest.raises(UsageError, match=next(iter(bad))):
        RepairSettings(**bad)


@pytest.mark.parametrize(
    "operation, words",
    [
        (Inpaint(RepairSettings(), square(20, 20)), "20 x 20 pixels, the picture 28 x 24"),
        (Inpaint(RepairSettings()), "no alpha"),
        (Deblur(RepairSettings(), gaussian(4)), "33 x 33 pixels, the picture 28 x 24"),
    ],
)
def test_a_picture_that_does_not_suit_is_its_own_fault(operation: Repair, words: str) -> None:
    with pytest.raises(ImageError, match=f"'x.png': .*{words}"):
        operation.prepare(floats(), "x.png", b"")


def test_every_setting_that_matters_is_in_the_parameters() -> None:
    base = RepairSettings()
    operations: list[Repair] = [
        Inpaint(base),
        Inpaint(base, square()),
        Inpaint(base, ~square()),
        Upscale(base, 2),
        Upscale(base, 3),
        Deblur(base, gaussian(1), "gauss:1"),
        Deblur(base, gaussian(2), "gauss:2"),
        *(
            Upscale(RepairSettings(**s))  # type: ignore[arg-type]
            for s in (
                {"noise": 0.1},
                {"steps": 3},
                {"samples": 2},
                {"samples": 2, "seed": 1},
                {"target": {"cat": 1.0}},
                {"range": (0, 2)},
            )
        ),
    ]
    found = [(o.name, o.parameters) for o in operations]
    assert all(a != b for i, a in enumerate(found) for b in found[:i])


# -- JPEG -------------------------------------------------------------------------------


def coded(pixels: np.ndarray, quality: int, orientation: int = 1, mode: str = "RGB") -> bytes:
    data = io.BytesIO()
    exif = PIL.Image.Exif()
    exif[274] = orientation
    samples = np.rint(pixels * 255).astype(np.uint8)
    PIL.Image.fromarray(samples).convert(mode).save(data, "JPEG", quality=quality, exif=exif)
    return data.getvalue()


def deblocked(data: bytes, model: Model) -> tuple[Image, Any]:
    operation = Deblock()
    image = images.decode(data, "x.jpg")
    (result,) = operation.run([operation.prepare(image, "x.jpg", data)], model, lambda s: None)
    return image, result


@pytest.mark.parametrize("mode", ["RGB", "L"])
def test_a_picture_without_blocks_is_one_that_the_file_can_be_of(random: Model, mode: str) -> None:
    data = coded(picture(64, 80), 20, mode=mode)
    image, result = deblocked(data, random)
    change = np.abs(result.image.samples.astype(float) - image.samples)
    assert change.mean() > 0.3, "nothing was done"
    assert result.outside < 1.5
    free = random.denoise(image.pixels, result.sigma)  # which knows of no box
    box = box_of(data)
    assert box.outside(torch.from_numpy(free).permute(2, 0, 1)[None]).item() > result.outside


@pytest.mark.parametrize("orientation", [3, 5, 6, 7, 8])
def test_the_box_is_turned_as_the_picture_is(random: Model, orientation: int) -> None:
    plain = coded(picture(64, 80), 20)
    turned = coded(picture(64, 80), 20, orientation)
    expected = images.upright(deblocked(plain, random)[1].image.samples, orientation)
    np.testing.assert_array_equal(deblocked(turned, random)[1].image.samples, expected)


@pytest.mark.parametrize("quality", [10, 40, 75])
def test_what_the_quantisation_took_is_known_about(quality: int) -> None:
    from skimage import data

    clean = data.astronaut()[64:256, 128:384].mean(-1, keepdims=True).repeat(3, 2) / 255
    stored = coded(clean, quality)
    lost = (images.decode(stored, "x").pixels - np.rint(clean * 255) / 255).std()
    # Coefficients near edges are larger than a Laplace distribution has them: the others smaller.
    assert lost < box_of(stored).error() < 1.6 * lost


def test_what_is_no_jpeg_has_no_blocks(tmp_path: Path) -> None:
    path = write(tmp_path / "a.png")
    with pytest.raises(ImageError, match=r"a\.png' is no JPEG file"):
        Deblock().prepare(images.read(path), str(path), path.read_bytes())
