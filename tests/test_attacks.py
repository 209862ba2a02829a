"""Attacks: against linear classifiers, whose worst case within a ball is known exactly."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from processes import Run
from scipy.optimize import brentq
from scipy.stats import binom
from tiny import CLASSES, picture, tiny, write
from torch import Tensor

from cdnctl.analysis import attacks
from cdnctl.analysis.attacks import (
    NORMS,
    Attack,
    Budget,
    Robustness,
    log_posterior,
    pgd,
    project,
    random_start,
    robustness,
    square,
    square_side,
)
from cdnctl.api import Model, load
from cdnctl.checkpoints import Header, build_module, save_model
from cdnctl.errors import UsageError
from cdnctl.measure.evaluate import Sample, evaluate
from cdnctl.restore import View

SHAPE = (3, 5, 4)
COUNT = 60


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def pictures(seed: int = 0, low: float = 0.0, high: float = 1.0) -> Tensor:
    """Anywhere in the cube, some pixels at its very faces."""
    x = torch.rand(COUNT, *SHAPE, generator=generator(seed), dtype=torch.float64)
    return (1.2 * x - 0.1).clamp(0, 1) * (high - low) + low


def linear(seed: int = 0, scale: float = 1.0) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
    """Two classes with scores 0 and w.(x - 1/2): w, like x, and the log posterior."""
    w = scale * torch.randn(SHAPE, generator=generator(seed), dtype=torch.float64)

    def scores(x: Tensor) -> Tensor:
        margin = ((x - 0.5) * w.to(x)).sum((1, 2, 3))
        return torch.stack([torch.zeros_like(margin), margin], 1).log_softmax(1)

    return w, scores


def worst_change(x: np.ndarray, w: np.ndarray, norm: str, radius: float) -> float:
    """The most that w.x can fall within the ball and the unit cube, in numpy and float64."""
    room = np.where(w > 0, x, 1 - x)  # downhill
    if norm == "linf":
        return float((np.abs(w) * np.minimum(radius, room)).sum())

    # By the conditions of Karush, Kuhn and Tucker the change is min(s |w|, room) for some s.
    def length(s: float) -> float:
        return float(np.sqrt((np.minimum(s * np.abs(w), room) ** 2).sum()))

    if length(1e6) <= radius:
        return float((np.abs(w) * room).sum())
    s = brentq(lambda s: length(s) - radius, 0, 1e6, xtol=1e-14)
    return float((np.abs(w) * np.minimum(s * np.abs(w), room)).sum())


def distance(a: Tensor, b: Tensor, norm: str) -> Tensor:
    flat = (a - b).flatten(1)
    return flat.abs().amax(1) if norm == "linf" else flat.norm(dim=1)


# -- projections ----------------------------------------------------------------------------


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("radius", [0.0, 0.1, 0.7, 3.0])
def test_projections_are_the_nearest_points(norm: str, radius: float) -> None:
    """Of a convex set: no point of it lies on the far side of the projection."""
    x = pictures()
    point = x + 2 * torch.randn(x.shape, generator=generator(1), dtype=torch.float64)
    point[:5] = x[:5] + 0.01 * (point[:5] - x[:5])
    point[5:10] = x[5:10]
    nearest = project(point, x, norm, radius)
    assert nearest.min() >= 0 and nearest.max() <= 1
    assert distance(nearest, x, norm).max() <= radius + 1e-12
    torch.testing.assert_close(project(nearest, x, norm, radius), nearest, atol=1e-12, rtol=0)
    for seed in range(20):
        # Points of the set: random ones, and from some of them as far as the set goes.
        other = random_start(x, norm, radius, generator(seed)).to(x)
        other = project(x + (1 + seed % 3 * 10) * (other - x), x, norm, radius)
        beyond = ((point - nearest) * (other - nearest)).flatten(1).sum(1)
        assert beyond.max() <= 1e-10


@pytest.mark.parametrize("norm", NORMS)
def test_what_is_inside_stays(norm: str) -> None:
    x = pictures()
    inside = random_start(x, norm, 0.3, generator()).to(x)
    torch.testing.assert_close(project(inside, x, norm, 0.3), inside, atol=1e-7, rtol=0)


@pytest.mark.parametrize("norm", NORMS)
def test_random_starts_fill_the_ball(norm: str) -> None:
    x = torch.full((4000, 1, 1, 2), 0.5, dtype=torch.float64)
    start = random_start(x, norm, 0.25, generator())
    assert (start - x).mean(0).abs().max() < 0.01, "on all sides"
    far = distance(start, x, norm) / 0.25
    # Of a disc or a square, the share within a fraction f of the radius is f^2.
    for fraction in (0.3, 0.6, 0.9):
        assert (far <= fraction).double().mean() == pytest.approx(fraction**2, abs=0.03)
    assert far.max() <= 1 + 1e-6


# -- PGD ------------------------------------------------------------------------------------


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("cube", [(0.0, 1.0), (0.4, 0.6)], ids=["at its faces", "inside"])
def test_pgd_attains_the_worst_case_of_a_linear_classifier(
    norm: str, cube: tuple[float, float]
) -> None:
    w, scores = linear()
    x = pictures(1, *cube)
    labels = scores(x).argmax(1)
    sign = 2.0 * labels - 1
    for radius in (0.003, 0.03, 0.1) if norm == "linf" else (0.02, 0.1, 0.5):
        found = pgd(scores, x, labels, norm, radius, steps=100, restarts=1)
        assert found.min() >= 0 and found.max() <= 1
        assert distance(found, x, norm).max() <= radius * (1 + 1e-9)
        fall = sign * ((x - found) * w).sum((1, 2, 3))
        best = [
            worst_change(a.numpy(), (s * w).numpy(), norm, radius)
            for a, s in zip(x, sign, strict=True)
        ]
        np.testing.assert_allclose(fall, best, rtol=2e-3 if norm == "l2" else 1e-9)
        margin = sign * ((x - 0.5) * w).sum((1, 2, 3))
        robust = margin.numpy() > np.array(best)
        close = np.abs(margin.numpy() - best) < 2e-3 * np.array(best)
        accurate = (scores(found).argmax(1) == labels).numpy()
        np.testing.assert_array_equal(accurate[~close], robust[~close])
        assert close.mean() < 0.1
        if radius in (0.03, 0.1) and cube == (0.0, 1.0):
            assert 0 < robust.mean() < 1, "or the comparison says nothing"


@pytest.mark.parametrize("norm", NORMS)
def test_pgd_never_beats_a_certificate(norm: str) -> None:
    """Many classes: right within r if every margin exceeds r times its dual norm."""
    w = torch.randn(4, int(np.prod(SHAPE)), generator=generator(), dtype=torch.float64)

    def scores(x: Tensor) -> Tensor:
        return (x.flatten(1) @ w.T).log_softmax(1)

    x = pictures(2)
    labels = scores(x).argmax(1)
    differences = w[labels][:, None] - w  # (B, K, n)
    margins = (differences * x.flatten(1)[:, None]).sum(2)
    dual = differences.abs().sum(2) if norm == "linf" else differences.norm(dim=2)
    safe_radius = (margins / dual).nan_to_num(torch.inf, posinf=torch.inf).amin(1)
    radius = float(safe_radius.median())
    found = pgd(scores, x, labels, norm, radius, restarts=3, generator=generator())
    right = scores(found).argmax(1) == labels
    certified = safe_radius > radius
    assert right[certified].all() and 0 < certified.double().mean() < 1
    # And it finds nearly all that there is to find: the ball cut by the cube holds less.
    assert right[~certified].double().mean() < 0.5


def bumpy(x: Tensor) -> Tensor:
    """Two classes whose loss has many local maxima."""
    flat = x.flatten(1)
    scores = torch.sin(9 * flat).sum(1) + 2 * (flat - 0.5).sum(1)
    return torch.stack([torch.zeros_like(scores), scores], 1).log_softmax(1)


def losses(found: Tensor, labels: Tensor) -> Tensor:
    return torch.nn.functional.cross_entropy(bumpy(found), labels, reduction="none")


@pytest.mark.parametrize("norm", NORMS)
def test_more_steps_and_more_restarts_never_hurt(norm: str) -> None:
    x, radius = pictures(), 0.15 if norm == "linf" else 0.6
    labels = bumpy(x).argmax(1)
    before, right = losses(x, labels), torch.ones(COUNT, dtype=torch.bool)
    for steps, restarts in [(0, 1), (1, 1), (3, 1), (10, 1), (10, 2), (10, 5)]:
        found = pgd(
            bumpy, x, labels, norm, radius, steps, restarts, step_size=radius / 4,
            generator=generator(),
        )  # fmt: skip
        still = bumpy(found).argmax(1) == labels
        after = losses(found, labels)
        assert not (still & ~right).any(), "what was found once is lost"
        same = still == right
        assert (after[same] >= before[same]).all()
        if (steps, restarts) == (0, 1):
            assert torch.equal(found, x) and still.all()
        before, right = after, still
    assert right.double().mean() < 0.5


@pytest.mark.parametrize("norm", NORMS)
def test_a_misclassified_picture_is_kept_before_a_higher_loss(norm: str) -> None:
    """Uphill lie three places: right, wrong, and right again with the highest loss."""
    table = torch.tensor([[3.0, 0, 0], [0, 0.1, -9], [0, -0.05, -0.05]], dtype=torch.float64)

    def scores(x: Tensor) -> Tensor:
        place = ((x.detach() - 0.5) / 0.1).round().long().clamp(0, 2).flatten()
        slope = torch.tensor([-1.0, 0, 0]).to(x)  # the true class becomes less probable
        return table[place] + slope * (x - x.detach()).flatten(1)

    x, label = torch.full((1, 1, 1, 1), 0.5, dtype=torch.float64), torch.tensor([0])
    for steps, place in [(0, 0.5), (1, 0.6), (2, 0.6), (3, 0.6)]:
        found = pgd(scores, x, label, norm, 0.4, steps, restarts=1, step_size=0.1)
        assert found.item() == pytest.approx(place)


@pytest.mark.parametrize("norm", NORMS)
def test_pgd_is_determined_by_its_seed_and_leaves_its_input_alone(norm: str) -> None:
    x = pictures()
    labels, copy = bumpy(x).argmax(1), x.clone()
    runs = [pgd(bumpy, x, labels, norm, 0.8, 3, 3, generator=generator(seed)) for seed in (0, 0, 1)]
    assert torch.equal(runs[0], runs[1]) and not torch.equal(runs[0], runs[2])
    assert torch.equal(x, copy) and not x.requires_grad


@pytest.mark.parametrize(("norm", "radius"), [("linf", 0.3), ("l2", 1.5)])
def test_certainty_does_not_hide_the_way(norm: str, radius: float) -> None:
    """In single precision, gradients whose squares are zero still lead somewhere."""
    w, scores = linear(scale=25.0)
    x = pictures(1).float()
    margin = ((x - 0.5) * w).sum((1, 2, 3))
    labels, sign, margin = (margin > 0).long(), margin.sign(), margin.abs()
    best = [
        worst_change(a.double().numpy(), (s * w).numpy(), norm, radius)
        for a, s in zip(x, sign, strict=True)
    ]
    can_fall = margin < 0.99 * torch.tensor(best)
    # Beyond this, no single-precision number is as small as the gradient.
    sure = can_fall & (margin > 50) & (margin < 85)
    assert sure.sum() > 3
    found = pgd(scores, x, labels, norm, radius, restarts=1)
    assert (scores(found).argmax(1) != labels)[sure].all()
    step = attacks._unit(1e-30 * w[None].float())
    torch.testing.assert_close(step.norm(), torch.tensor(1.0))


@pytest.mark.parametrize("norm", NORMS)
def test_stopping_early_changes_who_is_fooled_not_at_all(norm: str) -> None:
    """Of the first restart; later starts are the same ones, too."""
    x, radius = pictures(), 0.1 if norm == "linf" else 0.4
    labels = bumpy(x).argmax(1)
    looks = []

    def counted(y: Tensor) -> Tensor:
        looks.append(len(y))
        return bumpy(y)

    results = []
    for stop in (False, True):
        looks.clear()
        found = pgd(
            counted, x, labels, norm, radius, 10, 3, generator=generator(), until_fooled=stop
        )
        results.append((bumpy(found).argmax(1) != labels, sum(looks)))
    assert torch.equal(results[0][0], results[1][0])
    assert results[1][1] < results[0][1] == 3 * 11 * COUNT
    assert 0 < results[0][0].double().mean() < 1


# -- Square ---------------------------------------------------------------------------------


def test_square_finds_the_worst_case_where_one_square_is_enough() -> None:
    """Weights of one sign per channel: the worst change is one sign per channel, too."""
    sign = torch.tensor([1.0, -1.0, 1.0], dtype=torch.float64).view(3, 1, 1)
    w = sign * linear()[0].abs()

    def scores(x: Tensor) -> Tensor:
        assert not x.requires_grad and not torch.is_grad_enabled(), "it sees no gradient"
        margin = ((x - 0.5) * w).sum((1, 2, 3))
        return torch.stack([torch.zeros_like(margin), margin], 1)

    x = pictures(3)
    with torch.no_grad():
        labels = scores(x).argmax(1)
    side = 2.0 * labels - 1
    margin = side * ((x - 0.5) * w).sum((1, 2, 3))
    for radius in (0.02, 0.1, 0.3):
        found = square(scores, x, labels, radius, 400, generator())
        assert found.min() >= 0 and found.max() <= 1
        assert distance(found, x, "linf").max() <= radius + 1e-12
        best = torch.tensor(
            [
                worst_change(a.numpy(), (s * w).numpy(), "linf", radius)
                for a, s in zip(x, side, strict=True)
            ],
            dtype=torch.float64,
        )
        left = side * ((found - 0.5) * w).sum((1, 2, 3))
        assert (left >= margin - best - 1e-9).all(), "more than there is"
        assert torch.equal(left <= 0, margin <= best)
        assert (left <= margin).all()


def test_square_is_determined_by_its_seed_and_leaves_the_fooled_alone() -> None:
    x = pictures()
    labels, copy = bumpy(x).argmax(1), x.clone()
    labels[::3] = 1 - labels[::3]  # already wrong
    runs = [square(bumpy, x, labels, 0.05, 50, generator(seed)) for seed in (0, 0, 1)]
    assert torch.equal(runs[0], runs[1]) and not torch.equal(runs[0], runs[2])
    assert torch.equal(x, copy)
    assert torch.equal(runs[0][::3], x[::3])


def test_more_queries_never_hurt() -> None:
    """Of one schedule: what is kept at first is replaced by better only."""
    x = pictures()
    labels = bumpy(x).argmax(1)
    right = [
        (bumpy(square(bumpy, x, labels, 0.1, n, generator())).argmax(1) == labels).double().mean()
        for n in (1, 20, 400)
    ]
    assert right[0] > right[1] > right[2]


def test_squares_shrink_to_a_pixel() -> None:
    sides = [square_side(i / 1000, 32, 32) for i in range(1000)]
    assert sides == sorted(sides, reverse=True)
    assert sides[0] == round((0.8 * 32 * 32) ** 0.5) and sides[-1] == 1
    assert square_side(0.0, 3, 100) == 3


# -- robust accuracy of models --------------------------------------------------------------


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Model:
    return tiny(tmp_path_factory.mktemp("weights"))


@pytest.fixture(scope="module")
def labelled(model: Model) -> list[tuple[np.ndarray, str]]:
    """Pictures of two sizes, gray ones among them, with the class that the model sees in
    them, but for the last two."""
    shapes = [(16, 16, 3), (15, 18, 3), (16, 16, 1)]
    found = []
    for i in range(12):
        x = picture(*shapes[i % 3], top=20 * i)
        y = torch.from_numpy(np.broadcast_to(x, (*x.shape[:2], 3)).transpose(2, 0, 1).copy())
        guess = int(log_posterior(model, 0.0)(y[None]).argmax())
        found.append((x, CLASSES[guess if i < 10 else guess - 1]))
    return found


SMALL = Budget(steps=5, restarts=2, queries=20)


def accuracies(found: list[Robustness]) -> dict[tuple[str, float], float]:
    return {(r.attack.kind, r.attack.radius) if r.attack else ("", 0.0): r.accuracy for r in found}


@pytest.mark.slow
def test_robust_accuracy_falls_from_the_clean_one_to_nothing(
    model: Model, labelled: list[tuple[np.ndarray, str]]
) -> None:
    tried = [Attack(kind, r) for kind in ("l2", "linf", "square") for r in (0.0, 0.002, 0.01)]
    tried += [Attack("linf", 1.0), Attack("l2", 30.0)]
    steps: list[None] = []
    found = robustness(labelled, model, tried, budget=SMALL, advance=lambda: steps.append(None))
    assert len(steps) == len(tried) * len(labelled)
    assert all(r.pictures == len(labelled) for r in found)
    by = accuracies(found)
    assert by["", 0.0] == 10 / 12
    for kind in ("l2", "linf", "square"):
        curve = [by[kind, r] for r in sorted(r for k, r in by if k == kind)]
        assert curve[0] == by["", 0.0] and curve == sorted(curve, reverse=True)
    assert by["linf", 1.0] == by["l2", 30.0] == 0
    assert 0 < by["linf", 0.002] < by["", 0.0], "or the test says little"
    assert by["linf", 0.01] <= by["square", 0.01]
    assert found == robustness(labelled, model, tried, budget=SMALL)


def test_what_fell_within_a_small_radius_has_fallen_within_a_large_one(
    model: Model, labelled: list[tuple[np.ndarray, str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fickle(log_posterior: object, x: Tensor, labels: object, *args: object, **_: object):
        return x if 0.9 in args else 1 - x  # it finds nothing within the larger radius

    monkeypatch.setattr(attacks, "pgd", fickle)
    small, large = (Attack("linf", r) for r in (0.5, 0.9))
    (_, one, two) = robustness(labelled, model, [large, small])
    assert one.attack == small and one.correct == two.correct < 10
    clean, alone = robustness(labelled, model, [large])
    assert alone.correct == clean.correct == 10


def test_attacked_is_what_classifies(model: Model) -> None:
    """The same class probabilities as for `classify`, whatever the sides of the picture."""
    for shape in [(16, 16), (15, 18), (3, 5)]:
        pixels = picture(*shape)
        y = torch.from_numpy(pixels.transpose(2, 0, 1).copy())[None]
        expected = View(model, pixels, 0.1).logits().double().log_softmax(0)
        found = log_posterior(model, 0.1)(y)[0].double()
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)


def test_clean_accuracy_is_that_of_evaluate(
    tmp_path: Path, model: Model, labelled: list[tuple[np.ndarray, str]]
) -> None:
    from cdnctl import images

    samples = []
    for i, (pixels, label) in enumerate(labelled):
        path = tmp_path / f"{i}.tif"
        images.write(images.Image.of(pixels, np.float32), path)
        samples.append(Sample(path, label))
    rows = list(evaluate(samples, model, [0.0]))
    (clean,) = robustness(labelled, model, [])
    assert clean.correct == sum(r.predicted == r.label for r in rows)


def test_robust_accuracy_does_not_depend_on_the_batch(
    model: Model, labelled: list[tuple[np.ndarray, str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A single restart draws nothing, so it is the same in whatever batch."""
    tried, budget = [Attack("linf", 0.002), Attack("l2", 0.05)], Budget(5, 1)
    together = robustness(labelled, model, tried, budget=budget)
    monkeypatch.setattr(attacks, "GRADIENT_PIXELS", 1)
    assert robustness(labelled, model, tried, budget=budget) == together


def test_transfer(tmp_path: Path, model: Model, labelled: list[tuple[np.ndarray, str]]) -> None:
    tried = [Attack("linf", 0.01), Attack("l2", 0.3)]
    own = accuracies(robustness(labelled, model, tried, budget=SMALL))
    same = accuracies(robustness(labelled, model, tried, budget=SMALL, source=model))
    other = tiny(tmp_path, seed=1)
    foreign = accuracies(robustness(labelled, model, tried, budget=SMALL, source=other))
    assert own == same
    assert all(own[k] <= foreign[k] for k in own) and own != foreign
    strange = tiny(tmp_path, classes=("cat", "horse", "dog"))
    with pytest.raises(UsageError, match="other classes"):
        robustness(labelled, model, tried, source=strange)
    with pytest.raises(UsageError, match="cannot classify"):
        robustness(labelled, tiny(tmp_path, "unet"), tried)


def test_noise_draws_average_posteriors(model: Model) -> None:
    sigma = 0.3
    y = torch.from_numpy(picture(16, 16).transpose(2, 0, 1).copy())[None]
    told = log_posterior(model, sigma)
    torch.testing.assert_close(told(y), model.posterior(y, sigma).log(), atol=1e-4, rtol=0)
    mean = log_posterior(model, sigma, draws=3, seed=5)(y).softmax(1)
    noise = generator(5)
    expected = [
        model.posterior(y + sigma * torch.randn(y.shape[1:], generator=noise), sigma)
        for _ in range(3)
    ]
    torch.testing.assert_close(mean, torch.stack(expected).mean(0), atol=1e-4, rtol=0)
    assert (mean - told(y).exp()).abs().max() > 1e-3


def test_starts_are_drawn_apart_from_the_noise(
    model: Model, labelled: list[tuple[np.ndarray, str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    starts: list[Tensor] = []

    def watched(log_posterior: object, x: Tensor, *_: object, **options: object) -> Tensor:
        starts.append(torch.randn(x.shape[1:], generator=options["generator"]))  # type: ignore
        return x

    monkeypatch.setattr(attacks, "pgd", watched)
    for seed in (0, 5):
        starts.clear()
        robustness(labelled, model, [Attack("l2", 0.1)], 0.1, draws=1, seed=seed)
        noise = torch.randn(starts[0].shape, generator=generator(seed))
        alike = torch.cosine_similarity(starts[0].flatten(), noise.flatten(), 0)
        assert alike.abs() < 6 / noise.numel() ** 0.5


def test_intervals_hold_what_they_promise() -> None:
    """Whatever the true accuracy, at least 95 of 100 draws give an interval that covers it."""
    results = [Robustness(None, 0.0, 30, correct) for correct in range(31)]
    intervals = np.array([result.interval for result in results])
    assert (intervals[:, 0] <= np.arange(31) / 30).all()
    assert (np.arange(31) / 30 <= intervals[:, 1]).all()
    for truth in np.linspace(0.01, 0.99, 50):
        covered = (intervals[:, 0] <= truth) & (truth <= intervals[:, 1])
        assert binom.pmf(np.arange(31), 30, truth)[covered].sum() >= 0.95


@pytest.mark.parametrize("wrong", [("l1", 0.1), ("linf", -1.0), ("l2", float("nan"))])
def test_attacks_that_make_no_sense(wrong: tuple[str, float]) -> None:
    with pytest.raises(UsageError, match=r"l1|-1|nan"):
        Attack(*wrong)


@pytest.mark.parametrize(
    "shape",
    [
        {"arch": "scattering", "rho": "skip"},
        {"arch": "scattering", "bank": "octave", "rho": "phases", "maps": "real", "frames": 2},
        {"arch": "fixed-scattering", "octaves": 2, "angles": 4, "cells": 2},
    ],
)
def test_fixed_wavelets_are_attacked_like_others(
    tmp_path: Path, cdnctl: Run, shape: dict[str, object]
) -> None:
    """Ten classes, sides that are no whole cells, a gray and a flat picture."""
    classes = tuple(f"class {i}" for i in range(10))
    arch = str(shape["arch"])
    config = {k: v for k, v in shape.items() if k != "arch"} | {"num_classes": 10}
    if arch == "scattering":
        config["widths"] = [4, 6]
    header = Header("waves", arch, config, classes, (0.0, 0.1), 16)
    torch.manual_seed(0)
    save_model(tmp_path / "waves.safetensors", build_module(header).state_dict(), header)
    model = load(tmp_path / "waves.safetensors")
    pixels = [picture(14, 18), picture(14, 18, 1), np.full((14, 18, 3), 128 / 255, np.float32)]
    for i, x in enumerate(pixels):
        y = torch.from_numpy(x.transpose(2, 0, 1).copy())
        label = model.classes[int(model.posterior(y, 0.0).argmax())]
        write(tmp_path / "in" / label / f"{i}.png", x)
    attack = ("attack", "in", "--model", "waves.safetensors", "--steps", "3", "--restarts", "2")
    radii = ("--radius", "linf:2,60,l2:0.5,square:8", "--queries", "5", "--json")
    for more in ((), ("--sigma", "10", "--draws", "2"), ("--from", "waves.safetensors")):
        done = cdnctl(*attack, *radii, *more)
        assert done.code == 0, done.err
        (report,) = done.records
        shares = {(r["attack"], r["radius"]): r["robust_accuracy"] for r in report["robustness"]}
        assert len(shares) == 5 and shares["linf", 60] <= shares["linf", 2]
        if not more:
            assert shares["none", 0] == 1 and shares["linf", 60] < 1
