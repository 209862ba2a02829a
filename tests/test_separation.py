"""Fisher's ratio against closed forms, and what shrinkage in a frame does to it."""

from __future__ import annotations

import math
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny import picture, tiny
from torch import Tensor

from cdnctl.analysis.separation import layer_by_layer, measure, separation
from cdnctl.api import load
from cdnctl.checkpoints import Header, build_module, save_model
from cdnctl.core.joint import HasPosterior, HasSteps
from cdnctl.core.thresholds import soft_moments
from cdnctl.errors import UsageError
from cdnctl.models import REGISTRY
from cdnctl.models.frames import bases, concentrate


def randn(*shape: int, seed: int = 0) -> Tensor:
    g = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=g, dtype=torch.float64)


def classes(means: Tensor, std: float = 1.0, count: int = 20_000) -> tuple[Tensor, Tensor]:
    """Pictures of classes that are normal about their means (K, d)."""
    labels = torch.arange(count) % len(means)
    return means[labels] + std * randn(count, means.shape[1]), labels


def test_the_ratio_of_normal_classes_is_known() -> None:
    """Two classes at +-m, of covariance s^2: |m|^2 / s^2."""
    m = torch.tensor([[3.0, 0, 4, 0]], dtype=torch.float64)
    found = separation(*classes(torch.cat([m, -m]), std=2.0))
    assert found.between == pytest.approx(25, rel=0.02)
    assert found.within == pytest.approx(16, rel=0.02)
    assert found.fisher == pytest.approx(25 / 4, rel=0.04)


def test_classes_count_by_their_pictures() -> None:
    x = torch.tensor([[0.0], [2.0], [5.0], [7.0], [1.0], [1.0]], dtype=torch.float64)
    found = separation(x, torch.tensor([0, 0, 4, 4, 0, 0]))
    plain = 4 / 6 * (1 - 16 / 6) ** 2 + 2 / 6 * (6 - 16 / 6) ** 2
    assert found.within == pytest.approx((1 + 1 + 1 + 1) / 4)
    assert found.between == pytest.approx(plain - found.within / 6)
    assert found.fisher == pytest.approx(plain * (6 - 2 - 2) / (6 - 2) - 1 / 6, rel=1e-5)


def test_few_pictures_tell_on_average_what_many_do() -> None:
    """The plain ratio would be 5 times too large here: 60 pictures of 4 classes, 20 features."""
    means = torch.zeros(4, 20, dtype=torch.float64)
    means[:, 0] = torch.tensor([2.0, -2.0, 1.0, -1.0])
    labels = torch.arange(60) % 4
    found = [separation(means[labels] + randn(60, 20, seed=s), labels) for s in range(2000)]
    for value, exact in (("between", 2.5), ("within", 20.0), ("fisher", 2.5)):
        values = torch.tensor([getattr(f, value) for f in found])
        spread = values.std().item() / len(values) ** 0.5
        assert values.mean().item() == pytest.approx(exact, abs=4 * spread), value
        assert spread < 0.03 * exact, "or the line above says nothing"


def test_features_that_repeat_count_once() -> None:
    x, labels = classes(randn(3, 5, seed=1), count=200)
    found = separation(x, labels)
    wide = separation(x @ randn(5, 30, seed=2), labels)
    assert wide.features == 30 and wide.fisher == pytest.approx(found.fisher, rel=1e-3)


def test_the_ratio_minds_no_linear_map() -> None:
    x, labels = classes(randn(3, 5, seed=1))
    base = separation(x, labels)
    mapped = separation(x @ randn(5, 5, seed=2), labels)
    assert mapped.fisher == pytest.approx(base.fisher, rel=1e-3)
    assert mapped.within != pytest.approx(base.within, rel=0.1)
    constant = separation(torch.cat([x, torch.ones(len(x), 1)], 1), labels)
    assert constant.fisher == pytest.approx(base.fisher, rel=1e-3)


def test_labels_at_random_separate_nothing() -> None:
    """Within three standard deviations of chi^2 of 30 degrees of freedom, over n."""
    found = separation(randn(20_000, 10), torch.arange(20_000) % 4)
    assert found.fisher == pytest.approx(0, abs=3 * math.sqrt(2 * 30) / 20_000)


def test_what_cannot_be_told() -> None:
    with pytest.raises(ValueError, match="1 class"):
        separation(randn(20, 3), torch.zeros(20))
    with pytest.raises(ValueError, match="3 pictures of 3 classes"):
        separation(randn(3, 1), torch.arange(3))
    found = separation(randn(12, 30), torch.arange(12) % 2)
    assert found.fisher is None and found.within > 0
    assert separation(randn(33, 30), torch.arange(33) % 2).fisher is None
    assert separation(randn(34, 30), torch.arange(34) % 2).fisher is not None


def test_layers_are_means_over_positions() -> None:
    x, labels = classes(randn(3, 5, seed=1), count=300)
    maps = x[:, :, None, None] + torch.tensor([[-1.0, 1.0]])
    layers = [("first", maps), ("second", 2 * maps)]
    batches = [([(n, t[i : i + 100]) for n, t in layers], labels[i : i + 100])
               for i in (0, 100, 200)]  # fmt: skip
    found = dict(layer_by_layer(batches))
    assert list(found) == ["first", "second"]
    assert found["first"].fisher == pytest.approx(separation(x, labels).fisher)
    assert found["second"].within == pytest.approx(4 * found["first"].within)


# -- of a model -----------------------------------------------------------------------------


def pictures(count: int = 24, side: int = 16) -> list[tuple[str, np.ndarray, str]]:
    """Two classes that differ in brightness."""
    rng = np.random.default_rng(0)
    labels = [("dark", "light")[i % 2] for i in range(count)]
    return [
        (str(i), rng.uniform(0, 0.6, (side, side, 3)).astype(np.float32) + 0.2 * (c == "light"), c)
        for i, c in enumerate(labels)
    ]


@pytest.mark.parametrize("arch", REGISTRY)
def test_every_architecture_shows_its_layers(tmp_path: Path, arch: str) -> None:
    made = REGISTRY[arch].example
    shape = asdict(made) | ({"num_classes": 2} if hasattr(made, "num_classes") else {})
    classes = ("a", "b") if "num_classes" in shape else ()
    header = Header("tiny", arch, shape, classes, (0.0, 0.4), 16)
    torch.manual_seed(0)
    save_model(tmp_path / "tiny.safetensors", build_module(header).state_dict(), header)
    model = load(tmp_path / "tiny.safetensors")
    if not isinstance(model.module, HasSteps):
        with pytest.raises(UsageError, match=rf"'tiny' \({arch}\)"):
            list(measure(model, pictures(), 0.0))
        return
    found = dict(measure(model, pictures(), 0.0))
    first, *_, last = found
    assert first == "picture" and len(found) >= 3
    assert last == ("class features" if isinstance(model.module, HasPosterior) else "stage 2")
    assert found["picture"].features == 3
    exact = separation(
        torch.from_numpy(np.stack([x.mean((0, 1)) / 0.25 for _, x, _ in pictures()])),
        torch.tensor([c == "light" for *_, c in pictures()]),
    )
    assert found["picture"].fisher == pytest.approx(exact.fisher, rel=1e-3)
    assert found["picture"].within == pytest.approx(exact.within, rel=1e-3)


def test_the_last_layer_is_what_classes_are_told_by(tmp_path: Path) -> None:
    model = tiny(tmp_path)
    assert isinstance(model.module, HasSteps)
    y = torch.from_numpy(picture(32, 48)).permute(2, 0, 1)[None]
    layers = dict(model.module.steps(y, 0.1))
    head = model.module.logits_of(layers["class features"].mean((2, 3)))
    torch.testing.assert_close(head, model.module.logits(y, 0.1))
    assert layers["stage 1"].shape[2:] == (16, 24) and layers["stage 2"].shape[2:] == (8, 12)


def test_noise_is_seen_and_large_pictures_are_shrunk(tmp_path: Path) -> None:
    model = tiny(tmp_path, patch=16)
    clean, noisy, large = (
        dict(measure(model, pictures(side=side), sigma))["picture"]
        for side, sigma in ((16, 0.0), (16, 0.4), (32, 0.0))
    )
    assert noisy.fisher < 0.7 * clean.fisher
    assert large.within == pytest.approx(clean.within / 4, rel=0.4), "means of four times as many"


def test_what_shows_no_layers_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="does not show its layers"):
        measure(tiny(tmp_path).ensemble(2), pictures(), 0.0)
    with pytest.raises(UsageError, match="1 class"):
        measure(tiny(tmp_path), pictures()[::2], 0.0)


# -- concentration --------------------------------------------------------------------------


def shrunk(x: Tensor, atoms: Tensor, threshold: float) -> Tensor:
    return concentrate(x[:, :, None, None], atoms, threshold)[:, :, 0, 0]


@pytest.mark.parametrize("sparse", [True, False])
def test_shrinkage_separates_where_means_are_sparse(sparse: bool) -> None:
    """Means on one atom of an orthonormal frame: the ratio rises. Spread over all: it falls."""
    d, threshold = 16, 1.5
    atoms = bases(1, d).double()
    coefficients = torch.zeros(4, d, dtype=torch.float64)
    for k in range(4):
        coefficients[k, k if sparse else slice(None)] = 4.0 if sparse else 1.0
    if not sparse:
        coefficients *= torch.sign(randn(4, d, seed=3))
    x, labels = classes(coefficients @ atoms)
    before, after = separation(x, labels), separation(shrunk(x, atoms, threshold), labels)
    assert after.within < before.within
    assert (after.fisher > before.fisher) == sparse


def test_variance_within_a_class_is_the_closed_form() -> None:
    """Of orthonormal atoms, which keep variances: coefficient by coefficient."""
    d, threshold = 8, 0.7
    atoms = bases(1, d).double()
    means = 2 * randn(2, d, seed=1)
    x, labels = classes(means, std=0.8, count=60_000)
    found = separation(shrunk(x, atoms, threshold), labels)
    exact = soft_moments(means @ atoms.T, torch.tensor(0.8, dtype=torch.float64), threshold)
    assert found.within == pytest.approx(exact.variance.sum(1).mean().item(), rel=0.02)
    centre = (exact.mean[0] - exact.mean[1]) / 2
    assert math.sqrt(found.between) == pytest.approx(centre.norm().item(), rel=0.02)
