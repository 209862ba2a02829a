"""Learning curves: fits against known ones, and the constants of theory against simulations."""

from __future__ import annotations

import numpy as np
import pytest

from cdnctl.analysis.curves import Curve, crossing, discriminative_v, fit, generative_v
from cdnctl.errors import UsageError

pytestmark = pytest.mark.slow  # seconds each

Array = np.ndarray


# -- fits -----------------------------------------------------------------------------


def test_the_curves_of_the_paper_cross_where_they_should() -> None:
    """Thiry and Guth 2024: b = 5 and 1, v = 20 and 100 cross at n = 20, b = 1 for both never."""
    generative, discriminative = Curve(5, 20), Curve(1, 100)
    assert crossing(generative, discriminative) == crossing(discriminative, generative) == 20
    assert generative.at(20) == discriminative.at(20) == 6
    assert generative.at(10) < discriminative.at(10)
    assert crossing(Curve(1, 100), Curve(1, 10000)) is None
    assert crossing(Curve(1, 100), Curve(2, 10000)) is None


def test_a_fit_finds_the_curve_within_its_errors() -> None:
    rng = np.random.default_rng(0)
    n = np.array([100, 200, 500, 1000, 5000])
    errors = np.array([0.05, 0.04, 0.03, 0.02, 0.02])
    truth = Curve(0.3, 40)
    exact = fit(n, [truth.at(k) for k in n], errors)
    assert abs(exact.b - 0.3) < 1e-9 and abs(exact.v - 40) < 1e-6
    found = [fit(n, 0.3 + 40 / n + errors * rng.normal(size=5), errors) for _ in range(400)]
    for name, true in (("b", 0.3), ("v", 40)):
        values = np.array([getattr(f, name) for f in found])
        spread = getattr(found[0], f"{name}_error")
        assert abs(values.mean() - true) < 4 * spread / 20
        assert abs(values.std() / spread - 1) < 0.15


def test_a_fit_is_weighted_and_never_negative() -> None:
    # The point that is known to nothing changes nothing.
    found = fit([100, 200, 400], [0.5, 0.25, 9.0], [1e-3, 1e-3, 1e3])
    assert abs(found.v - 50) < 0.01 and abs(found.b) < 1e-4
    rising = fit([100, 200, 400], [0.1, 0.2, 0.3], [0.01, 0.01, 0.01])
    assert rising.v == 0 and abs(rising.b - 0.2) < 1e-9


@pytest.mark.parametrize(
    ("counts", "errors"), [([100], [0.1]), ([100, 100], [0.1, 0.1]), ([100, 200], [0.1, 0])]
)
def test_what_is_no_curve_is_refused(counts: list[float], errors: list[float]) -> None:
    with pytest.raises(UsageError, match="two counts"):
        fit(counts, [1.0] * len(counts), errors)


# -- constants ------------------------------------------------------------------------


def examples(rng: np.random.Generator, d: int, separation: float, n: int) -> tuple[Array, Array]:
    labels = rng.integers(0, 2, n)
    x = rng.normal(size=(n, d))
    x[:, 0] += (labels - 0.5) * separation
    return x, labels


def analysis(x: Array, labels: Array) -> Array:
    """Intercept and slopes of linear discriminant analysis, (d + 1,)."""
    means = np.stack([x[labels == c].mean(0) for c in (0, 1)])
    rest = x - means[labels]
    slopes = np.linalg.solve(rest.T @ rest / len(x), means[1] - means[0])
    share = labels.mean()
    return np.append(np.log(share / (1 - share)) - means.sum(0) @ slopes / 2, slopes)


def regression(x: Array, labels: Array) -> Array:
    """Intercept and slopes of logistic regression by Newton's method, (d + 1,)."""
    design = np.column_stack([np.ones(len(x)), x])
    weights = analysis(x, labels)  # a good start
    for _ in range(8):
        p = 1 / (1 + np.exp(-design @ weights))
        hessian = (design * (p * (1 - p))[:, None]).T @ design
        weights = weights + np.linalg.solve(hessian, design.T @ (labels - p))
    return weights


def excess(weights: Array, separation: float) -> float:
    """E KL(p(c | x), q(c | x)), in nats: the logit depends on two directions of x only."""
    nodes, shares = np.polynomial.hermite_e.hermegauss(40)
    shares = shares / shares.sum()
    along, across = nodes[:, None], nodes[None]
    total = 0.0
    for shift in (-separation / 2, separation / 2):
        t = along + shift
        true = separation * t + 0 * across
        found = weights[0] + weights[1] * t + np.linalg.norm(weights[2:]) * across
        p = 1 / (1 + np.exp(-true))
        kl = p * (true - found) + np.logaddexp(0, found) - np.logaddexp(0, true)
        total += shares @ kl @ shares / 2
    return float(total)


@pytest.mark.parametrize("separation", [1.44, 3.17, 4.04])
def test_simulated_curves_have_the_constants_of_theory(separation: float) -> None:
    """n times the excess loss of 150 repetitions; with too little separation there is no gap."""
    d, n, rng = 4, 3200, np.random.default_rng(0)
    found = {analysis: [], regression: []}
    for _ in range(150):
        x, labels = examples(rng, d, separation, n)
        for learn, losses in found.items():
            losses.append(n * excess(learn(x, labels), separation))
    for learn, v in ((analysis, generative_v(d, separation)), (regression, discriminative_v(d))):
        losses = np.array(found[learn])
        error = losses.std() / np.sqrt(len(losses))
        assert abs(losses.mean() - v) < 3 * error + 0.1 * v  # terms of order 1 / n^2
    gap = generative_v(d, separation) / discriminative_v(d)
    assert (gap > 0.85) if separation < 2 else (gap < 0.65)


def test_generative_constants() -> None:
    """Those of regression at no separation, and never more; additive in dimensions."""
    for d in (1, 4, 10):
        assert abs(generative_v(d, 1e-6) - discriminative_v(d)) < 1e-6
        values = [generative_v(d, s) for s in (0.5, 1, 2, 3, 4, 6)]
        assert values == sorted(values, reverse=True) and values[0] < discriminative_v(d)
    steps = np.diff([generative_v(d, 3.0) for d in (1, 2, 3)])
    assert abs(steps[0] - steps[1]) < 1e-9


def test_the_constant_in_one_dimension() -> None:
    """Where the slope along the means, whose variance has a term of its own, matters most."""
    n, rng = 3200, np.random.default_rng(1)
    losses = np.array([n * excess(analysis(*examples(rng, 1, 3.0, n)), 3.0) for _ in range(1500)])
    assert abs(losses.mean() - generative_v(1, 3.0)) < 4 * losses.std() / np.sqrt(1500)
