"""The Python API and the choice of a model."""

from __future__ import annotations

import copy
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny import CLASSES, noisy_picture, save_tiny, tiny
from torch import Tensor

import cdnctl
from cdnctl import checkpoints
from cdnctl.api import Model, load
from cdnctl.core import joint
from cdnctl.errors import UnknownClassError, UsageError, WeightsError
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
    exact = copy.deepcopy(model.module).double().class_scores(y.double(), sigma).softmax(1)
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


def test_results_are_plain_and_the_input_is_left_alone(model: Model) -> None:
    y = batch().requires_grad_()
    before = y.detach().clone()
    for function in (model.denoise, model.score, model.posterior, model.log_prob):
        assert not function(y, SIGMA).requires_grad
    assert torch.equal(y.detach(), before) and y.grad is None and y.requires_grad


@pytest.mark.parametrize(
    "wrong",
    [
        torch.zeros(8, 8),
        torch.zeros(1, 1, 3, 8, 8),
        torch.zeros(2, 1, 8, 8),
        torch.zeros(8, 8, 3),
        torch.zeros(3, 8, 8, dtype=torch.uint8),
        torch.zeros(3, 8, 8, dtype=torch.int64),
    ],
    ids=lambda t: f"{t.dtype}-{tuple(t.shape)}",
)
def test_wrong_pictures(model: Model, wrong: Tensor) -> None:
    for function in (model, model.denoise, model.score, model.posterior, model.log_prob):
        with pytest.raises(UsageError, match="expected float pictures"):
            function(wrong, SIGMA)


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


# -- classes --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "c", [3, -1, "zebra", {"cat": 1, "zebra": 1}], ids=["3", "-1", "name", "mixture"]
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


def test_unknown_class_lists_near_matches_and_who_knows_it(shelf: Path) -> None:
    small = load("small")
    with pytest.raises(UnknownClassError, match="did you mean 'truck'"):
        small.weights("trucks")
    with pytest.raises(UnknownClassError, match="known to: --model large") as error:
        small.weights("building")
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
        load("large").weights(name)
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
