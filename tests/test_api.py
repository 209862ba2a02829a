"""The Python API and the choice of a model."""

from __future__ import annotations

import copy
import doctest
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import pytest
import torch
from tiny import CLASSES, noisy_picture, picture, save_tiny, tiny, write
from torch import Tensor, nn

import cdnctl
from cdnctl import checkpoints, images
from cdnctl.api import Model, load
from cdnctl.core import joint
from cdnctl.errors import UnknownClassError, UsageError, WeightsError
from cdnctl.restore import View
from cdnctl.selection import Models

SIGMA = 0.2
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Model:
    return tiny(tmp_path_factory.mktemp("weights"))


@pytest.fixture
def shelf(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Bundled weights: one model for small pictures, one for large ones with other classes."""
    folder = tmp_path / "weights"
    save_tiny(folder / "small.safetensors", patch=32, classes=("cat", "truck"))
    save_tiny(folder / "large.safetensors", patch=96, classes=("cat", "building", "lake"))
    monkeypatch.setattr(checkpoints, "PACKAGE", tmp_path)
    return folder


def batch(count: int = 2, height: int = 24, width: int = 32) -> Tensor:
    pictures = [noisy_picture(height, width, seed=i) for i in range(count)]
    return torch.from_numpy(np.stack(pictures).transpose(0, 3, 1, 2).copy())


# -- quantities -----------------------------------------------------------------------------

SPECS = [
    (None, None),
    ("dog", [0, 1, 0]),
    (2, [0, 0, 1]),
    ({"cat": 3, "dog": 1}, [0.75, 0.25, 0]),
    (torch.tensor([0.2, -1.0, 1.5]), [0.2, -1.0, 1.5]),
    (torch.tensor([[1.0, 0, 0], [0, 0.5, 0.5]]), [[1.0, 0, 0], [0, 0.5, 0.5]]),
]


@pytest.mark.parametrize("c, weights", SPECS, ids=range(len(SPECS)))
def test_denoise_and_score_are_those_of_the_core(model: Model, c: object, weights: object) -> None:
    y = batch()
    w = None if weights is None else torch.tensor(weights, dtype=torch.float32)
    torch.testing.assert_close(
        model.denoise(y, SIGMA, c), joint.denoise(model.module, y, SIGMA, w), atol=1e-6, rtol=0
    )
    torch.testing.assert_close(
        model.score(y, SIGMA, c), joint.score(model.module, y, SIGMA, w), atol=1e-4, rtol=0
    )
    # Independent of the network's own backward pass: autograd through log_joint.
    leaf = y.clone().requires_grad_()
    f = model.module.log_joint(leaf, SIGMA)
    p = f.detach().softmax(1) if w is None else w.expand_as(f)
    (gradient,) = torch.autograd.grad((f * p).sum(), leaf)
    torch.testing.assert_close(model.denoise(y, SIGMA, c), y + SIGMA**2 * gradient)


def test_classes_make_a_difference(model: Model) -> None:
    """Or the test above says little."""
    results = [model.denoise(batch(), SIGMA, c) for c, _ in SPECS]
    for i, first in enumerate(results):
        assert all((first - other).abs().max() > 1e-4 for other in results[:i])


def test_posterior_and_log_prob_are_those_of_the_core(model: Model) -> None:
    y = batch()
    f = model.module.log_joint(y, SIGMA)
    torch.testing.assert_close(model.posterior(y, SIGMA), joint.posterior(model.module, y, SIGMA))
    torch.testing.assert_close(model.log_prob(y, SIGMA), f.logsumexp(1))
    for c, name in enumerate(CLASSES):
        torch.testing.assert_close(model.log_prob(y, SIGMA, name), f[:, c])
    mixed = model.log_prob(y, SIGMA, {"cat": 1, "dog": 3})
    torch.testing.assert_close(mixed, (f[:, :2] + torch.tensor([0.25, 0.75]).log()).logsumexp(1))


@pytest.mark.parametrize("sigma", [0.0, 1e-3])
def test_posterior_is_exact_at_low_noise(model: Model, sigma: float) -> None:
    """The joint density in float32 would round the classes away."""
    y = batch()
    exact = copy.deepcopy(model.module).double().logits(y.double(), sigma).softmax(1)
    torch.testing.assert_close(model.posterior(y, sigma).double(), exact, atol=1e-6, rtol=1e-4)


def test_a_call_denoises(model: Model) -> None:
    y = batch()
    assert torch.equal(model(y, SIGMA), model.denoise(y, SIGMA))


def test_one_picture_is_a_batch_of_one(model: Model) -> None:
    y = batch()
    for function in (model.denoise, model.score, model.posterior, model.log_prob):
        whole, single = function(y, SIGMA), function(y[1], SIGMA)
        assert single.shape == whole.shape[1:]
        torch.testing.assert_close(single, whole[1], atol=1e-4, rtol=1e-4)


def test_sigma_per_picture(model: Model) -> None:
    y = batch()
    both = model.denoise(y, torch.tensor([0.1, 0.3]))
    for i, sigma in enumerate((0.1, 0.3)):
        torch.testing.assert_close(both[i], model.denoise(y[i], sigma), atol=1e-5, rtol=0)


def test_the_input_is_left_alone(model: Model) -> None:
    y = batch().requires_grad_()
    before = y.detach().clone()
    for function in (model.denoise, model.score, model.posterior, model.log_prob):
        function(y, SIGMA)
    assert torch.equal(y.detach(), before) and y.grad is None and y.requires_grad


@pytest.mark.parametrize(
    "arch, able", [("unet", {"denoise", "score"}), ("classifier", {"posterior"})]
)
def test_models_that_do_half(tmp_path: Path, arch: str, able: set[str]) -> None:
    half = tiny(tmp_path, arch)
    for name in able:
        assert getattr(half, name)(batch(), SIGMA).isfinite().all()
    for name in {"denoise", "score", "posterior", "log_prob"} - able:
        with pytest.raises(UsageError, match="cannot"):
            getattr(half, name)(batch(), SIGMA)


# -- gradients ------------------------------------------------------------------------------

ABLE = {
    "gradresnet": ("denoise", "score", "posterior", "log_prob"),
    "unet": ("denoise", "score"),
    "classifier": ("posterior",),
}
EVERY = [(arch, name) for arch, names in ABLE.items() for name in names]
NORMS: list[dict[str, Any]] = [{"norm": "pixel"}, {"norm": "group", "groups": 4}]


def small(channels: int = 3, height: int = 7, width: int = 9) -> Tensor:
    """Two pictures in float64, whose sides are no multiples of the tiny networks' cell of 4."""
    return batch(2, height, width)[:, :channels].double()


@pytest.mark.slow
@pytest.mark.parametrize("arch, name", EVERY)
@pytest.mark.parametrize("norm", NORMS, ids=lambda n: n["norm"])
@pytest.mark.parametrize("shape", [(3, 7, 9), (3, 8, 12), (1, 7, 9)], ids=str)
def test_gradients_by_finite_differences(
    tmp_path: Path, arch: str, name: str, norm: dict[str, Any], shape: tuple[int, int, int]
) -> None:
    function = getattr(tiny(tmp_path, arch, **norm).double(), name)
    inputs = (small(*shape).requires_grad_(), torch.tensor([0.1, 0.3]).double().requires_grad_())
    assert torch.autograd.gradcheck(function, inputs, fast_mode=True)


@pytest.mark.parametrize("name", ["denoise", "score", "log_prob"])
@pytest.mark.parametrize("c", ["dog", {"cat": 3, "dog": 1}, ["cat", "dog"]], ids=str)
def test_gradients_given_a_class(tmp_path: Path, name: str, c: Any) -> None:
    function = getattr(tiny(tmp_path).double(), name)
    y = small().requires_grad_()
    assert torch.autograd.gradcheck(lambda t: function(t, SIGMA, c), (y,), fast_mode=True)


@pytest.mark.parametrize("arch, name", EVERY)
def test_gradients_of_weights_by_finite_differences(tmp_path: Path, arch: str, name: str) -> None:
    model = tiny(tmp_path, arch).double().requires_grad_(True)
    function = getattr(model, name)
    generator = torch.Generator().manual_seed(0)
    y, parameters = small(), list(model.parameters())
    probe = torch.randn(function(y, SIGMA).shape, generator=generator).double()
    gradient = torch.autograd.grad(
        (function(y, SIGMA) * probe).sum(), parameters, allow_unused=True
    )
    direction = [torch.randn(p.shape, generator=generator).double() for p in parameters]
    slope = sum((g * d).sum() for g, d in zip(gradient, direction, strict=True) if g is not None)

    def at(step: float) -> Tensor:
        moved = copy.deepcopy(model).requires_grad_(False)
        for p, d in zip(moved.parameters(), direction, strict=True):
            p += step * d
        return (getattr(moved, name)(y, SIGMA) * probe).sum()

    # Central differences of two steps, whose errors of second order cancel.
    wide, narrow = ((at(h) - at(-h)) / (2 * h) for h in (1e-3, 5e-4))
    torch.testing.assert_close(slope, (4 * narrow - wide) / 3, rtol=1e-5, atol=1e-6)


def test_a_loss_that_holds_the_picture_and_its_denoised_version(model: Model) -> None:
    """The proximal step of plug-and-play methods: the residual moves with the picture."""
    double = copy.deepcopy(model).double()
    y = small(3, 4, 6).requires_grad_()
    assert torch.autograd.gradcheck(lambda t: (t - double(t, SIGMA)).square().sum(), (y,))


def test_second_derivatives(model: Model) -> None:
    double = copy.deepcopy(model).double()
    y = small(1, 4, 4).requires_grad_()
    for name in ABLE["gradresnet"]:
        function = getattr(double, name)
        assert torch.autograd.gradgradcheck(lambda t, f=function: f(t, SIGMA), (y,), fast_mode=True)


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("c", [None, "dog"])
def test_score_is_the_gradient_of_log_prob(model: Model, channels: int, c: Any) -> None:
    double = copy.deepcopy(model).double()
    y = small(channels, 8, 12).requires_grad_()
    (gradient,) = torch.autograd.grad(double.log_prob(y, SIGMA, c).sum(), y)
    score = double.score(y, SIGMA, c)
    torch.testing.assert_close(score, gradient)
    torch.testing.assert_close(double.denoise(y, SIGMA, c), y + SIGMA**2 * score)


@pytest.mark.parametrize("arch, name", EVERY)
def test_no_graph_unless_it_is_asked_for(tmp_path: Path, arch: str, name: str) -> None:
    model = tiny(tmp_path, arch)
    function = getattr(model, name)
    kept: list[Tensor] = []

    def keep(t: Tensor) -> Tensor:
        kept.append(t)
        return t

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
        plain = function(batch(), SIGMA)
        model.requires_grad_(True)
        with torch.no_grad():
            assert torch.equal(function(batch().requires_grad_(), SIGMA), plain)
        assert not kept and not plain.requires_grad
        assert function(batch(), SIGMA).requires_grad and kept
    model.requires_grad_(False)
    assert function(batch().requires_grad_(), SIGMA).requires_grad


# -- a module among modules -----------------------------------------------------------------


def test_a_parent_moves_and_saves_it(tmp_path: Path) -> None:
    class Solver(nn.Module):
        def __init__(self, denoiser: nn.Module):
            super().__init__()
            self.denoiser = denoiser

    model, other = tiny(tmp_path), tiny(tmp_path, seed=1)
    solver = Solver(model)
    assert isinstance(model, nn.Module) and not model.training
    state = solver.state_dict()
    assert state and all(key.startswith("denoiser.") for key in state)
    assert not torch.equal(model(batch(), SIGMA), other(batch(), SIGMA))
    Solver(other).load_state_dict(state)
    assert torch.equal(model(batch(), SIGMA), other(batch(), SIGMA))
    other.load_state_dict(model.state_dict())
    solver.double()
    assert {p.dtype for p in model.parameters()} == {torch.float64}
    assert model.half() is model and {p.dtype for p in model.parameters()} == {torch.float16}
    solver.to("meta")
    assert model.device == torch.device("meta")


def test_repr_is_short(model: Model) -> None:
    text = repr(model)
    assert "\n" not in text and len(text) < 120
    for part in ("tiny", "gradresnet", "3 classes", "cpu"):
        assert part in text
    assert text in repr(nn.Sequential(model))


# -- precision ------------------------------------------------------------------------------

FLOATS = [torch.float16, torch.bfloat16, torch.float32, torch.float64]


@pytest.mark.slow
@pytest.mark.parametrize("arch, name", EVERY)
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("own", FLOATS, ids=str)
def test_dtype_of_the_input_is_kept(
    tmp_path: Path, arch: str, name: str, dtype: torch.dtype, own: torch.dtype
) -> None:
    model = tiny(tmp_path, arch)
    y = batch(height=22).to(dtype)
    want = getattr(copy.deepcopy(model).double(), name)(y.double(), SIGMA)
    got = getattr(model.to(own), name)(y, SIGMA)
    half = dtype.itemsize == 2
    if name in ("posterior", "log_prob"):
        assert got.dtype is (torch.float32 if half else dtype)
    else:
        assert got.dtype is dtype
    error = (got.double() - want).abs().max() / want.abs().max()
    coarse = own.itemsize == 2 or half
    assert error < (0.02 if coarse else 1e-5)


def test_half_precision_pictures_are_denoised_in_the_precision_of_the_weights(
    model: Model,
) -> None:
    y = batch().half()
    assert torch.equal(model(y, SIGMA), model(y.float(), SIGMA).half())
    assert torch.equal(model.posterior(y, SIGMA), model.posterior(y.float(), SIGMA))
    # The square of so low a noise level is nothing in half precision.
    assert torch.equal(model.score(y, 1e-4), model.score(y.float(), 1e-4).half())


# -- gray, arrays, PIL pictures ---------------------------------------------------------------


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("size", [(24, 32), (21, 30)], ids=str)
@pytest.mark.parametrize("norm", NORMS, ids=lambda n: n["norm"])
def test_it_does_what_the_command_does(
    tmp_path: Path, channels: int, size: tuple[int, int], norm: dict[str, Any]
) -> None:
    """For gray, too, and where sides are no multiples of the coarsest cell."""
    model, pixels = tiny(tmp_path, **norm), noisy_picture(*size, channels)
    correction, logits = View(model, pixels, SIGMA).solve(lambda scores: scores.softmax(0))
    denoised = model.denoise(pixels, SIGMA)
    np.testing.assert_allclose(denoised, pixels + correction, rtol=0, atol=2e-6)
    np.testing.assert_allclose(
        model.posterior(pixels, SIGMA), logits.softmax(0).numpy(), rtol=1e-4, atol=1e-6
    )
    assert np.abs(correction).max() > 0.01


def test_gray_is_one_channel(model: Model) -> None:
    gray = batch()[:, :1]
    colour, seen = gray.expand(-1, 3, -1, -1), SIGMA * 3**0.5
    torch.testing.assert_close(
        model.denoise(gray, SIGMA), model.denoise(colour, seen).mean(1, keepdim=True)
    )
    torch.testing.assert_close(model.posterior(gray, SIGMA), model.posterior(colour, seen))
    torch.testing.assert_close(model.log_prob(gray, SIGMA), model.log_prob(colour, seen))


ARRAYS = [
    lambda p: p,
    lambda p: p.astype(np.float64),
    lambda p: p.astype(np.float16),
    lambda p: p.astype(">f4"),
    lambda p: p[:, :, 0],
    lambda p: p[:, :, :1],
    lambda p: p[::-1, ::2],
    lambda p: np.broadcast_to(p[:, :1], p.shape),
]


@pytest.mark.parametrize("make", ARRAYS, ids=range(len(ARRAYS)))
def test_arrays(model: Model, make: Callable[[np.ndarray], np.ndarray]) -> None:
    y = make(noisy_picture(22, 30))
    before = y.copy()
    native = np.ascontiguousarray(y.astype(y.dtype.newbyteorder("=")))
    tensor = torch.from_numpy(native.reshape(*y.shape[:2], -1)).permute(2, 0, 1)
    for function in (model, model.denoise, model.score):
        got, want = function(y, SIGMA), function(tensor, SIGMA)
        assert isinstance(got, np.ndarray) and got.dtype == y.dtype and got.shape == y.shape
        np.testing.assert_array_equal(got, want.permute(1, 2, 0).numpy().reshape(y.shape))
    for function in (model.posterior, model.log_prob):
        got, want = function(y, SIGMA), function(tensor, SIGMA)
        assert isinstance(got, np.ndarray)
        np.testing.assert_array_equal(got, want.numpy())
    np.testing.assert_array_equal(y, before)


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, ">u2"])
@pytest.mark.parametrize("gray", [False, True])
def test_arrays_of_whole_numbers(model: Model, dtype: Any, gray: bool) -> None:
    dtype = np.dtype(dtype)
    pixels = noisy_picture(22, 30)[:, :, 0 if gray else slice(None)]
    far = torch.tensor([0.0, 30.0, -29.0])  # class weights that lead out of [0, 1]
    y = images.from_unit(pixels, dtype)
    floats = images.to_unit(y)
    got = model.denoise(y, SIGMA, far)
    assert got.dtype == dtype and got.shape == y.shape
    denoised = model.denoise(floats, SIGMA, far)
    assert denoised.min() < 0 or denoised.max() > 1, "or clipping is not seen"
    np.testing.assert_array_equal(got, images.from_unit(denoised, dtype))
    np.testing.assert_array_equal(model.score(y, SIGMA), model.score(floats, SIGMA))
    np.testing.assert_array_equal(model.posterior(y, SIGMA), model.posterior(floats, SIGMA))


@pytest.mark.parametrize("mode", ["L", "RGB", "I;16"])
def test_pil_pictures(model: Model, mode: str) -> None:
    pixels = images.from_unit(
        noisy_picture(22, 30), np.dtype(np.uint16 if ";" in mode else np.uint8)
    )
    y = PIL.Image.fromarray(pixels if mode == "RGB" else pixels[:, :, 0])
    y.info["icc_profile"] = b"profile"
    got = model.denoise(y, SIGMA)
    assert isinstance(got, PIL.Image.Image) and got.mode == y.mode == mode and got.size == y.size
    assert got.info == y.info and got.info is not y.info
    array = np.asarray(y)
    np.testing.assert_array_equal(np.asarray(got), model.denoise(array, SIGMA))
    for function in (model.score, model.posterior, model.log_prob):
        np.testing.assert_array_equal(function(y, SIGMA), function(array, SIGMA))


# -- what is refused --------------------------------------------------------------------------

FUNCTIONS = ("__call__", "denoise", "score", "posterior", "log_prob")


def refused(model: Model, y: Any, sigma: Any, message: str) -> None:
    for name in FUNCTIONS:
        with pytest.raises(UsageError, match=message) as error:
            getattr(model, name)(y, sigma)
        assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "sigma, message",
    [
        (25, "sigma is 25, .*did you mean sigma=25/255"),
        (torch.tensor([0.1, 50.0]), "did you mean sigma=50/255"),
        (1e4, r"sigma is 10000, but must lie in \[0, 1\], as pixels do$"),
        (-0.1, "sigma is -0.1, but must lie"),
        (float("nan"), "sigma is nan"),
        (float("inf"), "sigma is inf"),
        (torch.tensor([0.1, float("nan")]), "sigma is nan"),
        ("auto", "sigma is 'auto', but must be a number"),
        (None, "sigma is None"),
        (torch.full((24, 32), 0.1), "noise level per pixel is not supported"),
        (torch.full((2, 1, 24, 32), 0.1), "noise level per pixel is not supported"),
        (torch.full((3,), 0.1), r"one per picture, \(2,\)"),
        (torch.zeros(0), r"one per picture, \(2,\)"),
    ],
    ids=range(13),
)
def test_wrong_noise_levels(model: Model, sigma: Any, message: str) -> None:
    refused(model, batch(), sigma, message)


def spoilt(value: float) -> Tensor:
    y = batch()
    y[1, 2, 3, 4] = value
    return y


WRONG_PICTURES = [
    (255 * batch(), "did you mean y / 255"),
    (-255 * batch(), "did you mean y / 255"),
    ((255 * picture(20, 24)).astype(np.float32), "did you mean y / 255"),
    (spoilt(float("nan")), "not finite"),
    (spoilt(float("inf")), "not finite"),
    (spoilt(-float("inf")), "not finite"),
    (torch.zeros(8, 8), r"expected float pictures \(B, C, H, W\).* got shape \(8, 8\)"),
    (torch.zeros(1, 1, 3, 8, 8), "expected float pictures"),
    (torch.zeros(2, 2, 8, 8), "expected float pictures .* C = 1 or 3"),
    (torch.zeros(8, 8, 3), "expected float pictures"),
    (torch.zeros(3, 8, 8, dtype=torch.uint8), "torch.uint8; did you mean y / 255"),
    (torch.zeros(3, 8, 8, dtype=torch.int64), "torch.int64; did you mean y / 255"),
    (torch.zeros(3, 0, 8), "no pixels"),
    (torch.zeros(0, 3, 8, 8), "no pixels"),
    (torch.zeros(3, 8, 8, device="meta"), "is on meta, but the model on cpu"),
    (np.zeros((3, 8, 8)), "expected an array"),
    (np.zeros((2, 8, 8, 3)), "batches are given as tensors"),
    (np.zeros((8, 8, 4)), "expected an array"),
    (np.zeros((8, 8, 3), np.int64), "got int64"),
    (np.zeros((8, 8, 3), bool), "got bool"),
    (np.zeros((0, 8, 3)), "no pixels"),
    (PIL.Image.new("RGBA", (8, 8)), "not 'RGBA': convert it"),
    (PIL.Image.new("P", (8, 8)), "not 'P': convert it"),
    ([[0.5]], "got list"),
    ("cat.png", "got str"),
]


@pytest.mark.parametrize("wrong, message", WRONG_PICTURES, ids=range(len(WRONG_PICTURES)))
def test_wrong_pictures(model: Model, wrong: Any, message: str) -> None:
    refused(model, wrong, SIGMA, message)


@pytest.mark.parametrize("sigma", [0.0, 0.02, 0.1, 1.0])
def test_noise_is_not_taken_for_wrong_units(model: Model, sigma: float) -> None:
    noise = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    for y in (batch(2, 64, 64) + sigma * noise, noise, 3 * torch.ones(3, 8, 8)):
        assert model(y, sigma).isfinite().all()
    with pytest.raises(UsageError, match="y / 255"):
        model(255 * batch(), sigma)


def test_noise_levels_of_any_form(model: Model) -> None:
    y = batch()
    same = [0.1, np.float64(0.1), torch.tensor(0.1), torch.tensor([0.1]), [0.1, 0.1],
            np.array([0.1, 0.1]), torch.full((2, 1, 1, 1), 0.1)]  # fmt: skip
    for sigma in same:
        torch.testing.assert_close(model(y, sigma), model(y, 0.1))


# -- classes --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "c",
    [3, -1, "zebra", {"cat": 1, "zebra": 1}, ["cat", "zebra"]],
    ids=["3", "-1", "name", "mixture", "list"],
)
def test_unknown_classes(model: Model, c: object) -> None:
    with pytest.raises(UnknownClassError):
        model.denoise(batch(), SIGMA, c)


@pytest.mark.parametrize(
    "c",
    [
        {},
        {"cat": 0.0},
        {"cat": -1.0, "dog": 2.0},
        {"cat": float("nan")},
        {"cat": float("inf")},
        torch.ones(2),
        torch.ones(2, 4),
        torch.tensor(1.0),
    ],
    ids=range(8),
)
def test_impossible_weights(model: Model, c: object) -> None:
    with pytest.raises(UsageError, match="class weights"):
        model.denoise(batch(), SIGMA, c)


@pytest.mark.parametrize("name", ["denoise", "score", "log_prob"])
def test_one_class_per_picture(model: Model, name: str) -> None:
    function, y = getattr(model, name), batch()
    got = function(y, SIGMA, ["cat", {"cat": 1, "dog": 3}])
    for i, c in enumerate(["cat", {"cat": 1, "dog": 3}]):
        torch.testing.assert_close(got[i], function(y[i], SIGMA, c), atol=1e-4, rtol=1e-4)
    one = function(y[0], SIGMA, ["dog"])
    assert torch.equal(one, function(y[0], SIGMA, "dog"))
    assert torch.equal(one, function(y[0], SIGMA, np.int64(1)))


@pytest.mark.parametrize("c", [[], ["cat"] * 3, torch.ones(3, 3)], ids=range(3))
def test_classes_for_another_number_of_pictures(model: Model, c: Any) -> None:
    with pytest.raises(UsageError, match=r"class weights .* 2 pictures"):
        model.denoise(batch(), SIGMA, c)


def test_a_class_of_another_kind(model: Model) -> None:
    for c in (1.5, [None], ["cat", ["dog"]]):
        with pytest.raises(UsageError, match="a class is a name, an index or a mixture"):
            model.denoise(batch(), SIGMA, c)


def test_unknown_class_lists_near_matches_and_who_knows_it(shelf: Path) -> None:
    small = load("small")
    with pytest.raises(UnknownClassError, match="did you mean 'truck'"):
        small.mixture("trucks")
    with pytest.raises(UnknownClassError, match="known to: --model large") as error:
        small.mixture("building")
    assert "cat, truck" in str(error.value)


# -- loading --------------------------------------------------------------------------------


def test_load_by_name_and_path(shelf: Path) -> None:
    by_name, by_path = load("small"), cdnctl.load(shelf / "small.safetensors")
    assert by_name.path == by_path.path and by_name.hash == by_path.hash
    assert by_name.name == "small" and by_name.classes == ("cat", "truck")
    assert by_name.sigma_range == (0.0, 0.4) and by_name.device == CPU
    assert torch.equal(by_name(batch(), SIGMA), by_path(batch(), SIGMA))
    assert load("large").hash != by_name.hash
    assert isinstance(by_name.to("cpu"), cdnctl.Model)


def test_load_what_is_not_there(shelf: Path, tmp_path: Path) -> None:
    with pytest.raises(WeightsError, match="large, small"):
        load("medium")
    with pytest.raises(WeightsError, match="none"):
        load(tmp_path / "none.safetensors")
    (tmp_path / "text.safetensors").write_text("not weights")
    with pytest.raises(WeightsError):
        load(tmp_path / "text.safetensors")


def test_the_example_in_the_docstring_runs(shelf: Path) -> None:
    (shelf / "small.safetensors").rename(shelf / "photo.safetensors")
    (found,) = doctest.DocTestFinder(recurse=False).find(Model, "Model")
    runner = doctest.DocTestRunner()
    assert runner.run(found).attempted > 5 and not runner.failures


def test_unknown_attribute() -> None:
    with pytest.raises(AttributeError, match="nothing"):
        _ = cdnctl.nothing


# -- the choice of a model ------------------------------------------------------------------


@pytest.mark.parametrize(
    "size, name",
    [((32, 32), "small"), ((40, 40), "small"), ((1, 1), "small"), ((41, 8), "large"),
     ((8, 41), "large"), ((2000, 3000), "large")],
)  # fmt: skip
def test_auto_picks_by_size(shelf: Path, size: tuple[int, int], name: str) -> None:
    assert Models("auto", CPU).pick(*size).name == name


def test_auto_takes_the_photo_model_for_a_small_picture_whose_class_it_knows(shelf: Path) -> None:
    for size in [(32, 32), (500, 500)]:
        assert Models("auto", CPU, ["lake"]).pick(*size).name == "large"
    assert Models("auto", CPU, ["truck"]).pick(32, 32).name == "small"
    assert Models("auto", CPU, ["cat"]).pick(32, 32).name == "small"
    assert Models("auto", CPU, ["cat"]).pick(500, 500).name == "large"


def test_auto_picks_for_files_by_their_headers(
    shelf: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As by the size of the first picture that tells it; where its header does, unread."""
    (tmp_path / "broken.png").write_text("no picture")
    (tmp_path / "cut.png").write_bytes(write(tmp_path / "b.png", picture(48, 30)).read_bytes()[:99])
    write(tmp_path / "small.png", picture(20, 30))
    odd = tmp_path / "odd.png"  # its header tells nothing at once: stands for camera raw
    odd.write_bytes((tmp_path / "b.png").read_bytes())
    told = images.stored_size

    def size(path: Path) -> tuple[int, int] | None:
        return None if path == odd else told(path)

    monkeypatch.setattr(images, "stored_size", size)

    def chosen(*names: str) -> str:
        return Models("auto", CPU).for_files([tmp_path / name for name in names]).name

    assert chosen("broken.png", "odd.png", "small.png") == "large"
    monkeypatch.setattr(images, "decode", None)  # no picture is read from here on
    assert chosen("small.png", "b.png") == chosen() == "small"
    assert chosen("b.png", "small.png") == chosen("cut.png", "small.png") == "large"


def test_auto_never_takes_the_small_model_for_a_photograph(shelf: Path) -> None:
    with pytest.raises(UnknownClassError, match="known to: --model small"):
        Models("auto", CPU, ["truck"]).pick(500, 500)
    (shelf / "large.safetensors").unlink()
    with pytest.raises(WeightsError, match=r"photo.*not found.*'small'.*--model.*500 x 41"):
        Models("auto", CPU).pick(41, 500)
    assert Models("auto", CPU).pick(40, 40).name == "small"
    assert Models("small", CPU).pick(500, 500).name == "small", "who names it, gets it"


def test_auto_without_the_small_model(shelf: Path) -> None:
    """The photo model does pictures of any size."""
    (shelf / "small.safetensors").unlink()
    assert {Models("auto", CPU).pick(n, n).name for n in (1, 40, 500)} == {"large"}


def test_auto_takes_the_camera_model_for_the_noise_of_cameras(shelf: Path) -> None:
    """Where there is one, for photographs, if no class is asked for."""
    assert Models("auto", CPU).pick(500, 500, camera=True).name == "large"
    save_tiny(shelf / "a.safetensors", "unet", classes=("lake",), coloured=True)
    assert Models("auto", CPU).pick(500, 500, camera=True).name == "a"
    assert Models("auto", CPU).pick(500, 500).name == "large"
    assert Models("auto", CPU).pick(40, 40, camera=True).name == "small"
    for known in ("building", "lake"):  # denoisers know no classes, whatever they were shown
        assert Models("auto", CPU, [known]).pick(500, 500, camera=True).name == "large"
    assert Models("large", CPU).pick(500, 500, camera=True).name == "large", "who names it, gets it"
    with pytest.raises(UnknownClassError, match="'large' does not know the class 'truck'"):
        Models("auto", CPU, ["truck", "lake"])


def test_auto_when_nobody_knows(shelf: Path) -> None:
    """Said at once, before any picture is read or folder made."""
    for classes, says in ((["zebra"], "zebra"), (["truck", "lake"], "truck")):
        with pytest.raises(UnknownClassError, match=f"'large' does not know the class '{says}'"):
            Models("auto", CPU, classes)


@pytest.mark.parametrize(
    "name, says, not_says",
    [
        ("lkae", "did you mean 'lake'", "--model"),
        ("Lake", "did you mean 'lake'", "--model"),
        ("buildings", "did you mean 'building'", "--model"),
        ("house", "did you mean 'building'", "--model"),
        ("lorry", "'truck' is known to: --model small", "did you mean"),
        ("bat", "its classes: cat, building, lake", "did you mean"),
        ("car", "its classes: cat, building, lake", "did you mean"),
    ],
)
def test_classes_that_are_suggested(shelf: Path, name: str, says: str, not_says: str) -> None:
    """What was misspelt or meant, not what merely shares letters."""
    with pytest.raises(UnknownClassError) as error:
        load("large").mixture(name)
    assert says in str(error.value) and not_says not in str(error.value)


def test_auto_without_weights(shelf: Path) -> None:
    for file in shelf.iterdir():
        file.unlink()
    with pytest.raises(WeightsError, match="no bundled weights"):
        Models("auto", CPU).pick(32, 32)


def test_a_named_model_is_checked_at_once(shelf: Path) -> None:
    assert Models("large", CPU, ["lake"]).pick(8, 8).name == "large"
    with pytest.raises(WeightsError, match="medium"):
        Models("medium", CPU)
    with pytest.raises(UnknownClassError, match="--model large"):
        Models("small", CPU, ["lake"])


def test_a_model_is_loaded_once(shelf: Path) -> None:
    models = Models("auto", CPU)
    assert models.pick(8, 8) is models.pick(9, 9) is not models.pick(99, 99)
