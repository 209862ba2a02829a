"""A small learning curve: two classes of pictures told apart by a generative and by a
discriminative model of the same form, with few and with many labelled pictures.

Both give a logit that is linear in the principal components of small versions of the pictures:
linear discriminant analysis fits p(x, c), logistic regression p(c | x). Their losses on pictures
that neither has seen are fitted by b + v / n, and v stands beside what theory says it is where the
family holds the truth, see `cdnctl.analysis.curves`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from cdnctl.analysis.curves import Curve, crossing, discriminative_v, fit, generative_v
from cdnctl.errors import UsageError

Array = np.ndarray

NEWTON = 20  # steps of logistic regression
RIDGE = (
    1e-3  # of logistic regression: classes that few examples separate have no largest likelihood
)


@dataclass(frozen=True)
class Learning:
    """One approach: mean losses in nats on unseen examples, and the curve through them."""

    approach: str
    losses: tuple[float, ...]  # for each count
    errors: tuple[float, ...]  # their standard errors, over repetitions
    curve: Curve
    theory: float  # v, if the family held the truth


def features(pictures: Array, dimensions: int) -> Array:
    """The first principal components, (N, dimensions), with mean 0 and variance 1, of pictures
    (N, ...) of one size. UsageError if these have fewer values, or there are fewer of them."""
    flat = pictures.reshape(len(pictures), -1).astype(np.float64)
    if not 0 < dimensions < min(flat.shape):
        raise UsageError(
            f"{dimensions} dimensions of {len(flat)} pictures of {flat.shape[1]} values: give 1 "
            f"to {min(flat.shape) - 1}"
        )
    flat = flat - flat.mean(0)
    values, vectors = np.linalg.eigh(flat.T @ flat / len(flat))
    kept = slice(-1, -dimensions - 1, -1)
    return flat @ vectors[:, kept] / np.sqrt(values[kept])


def analysed(x: Array, labels: Array) -> Array:
    """Linear discriminant analysis, by maximum likelihood: intercept and slopes, (d + 1,)."""
    first, second = (x[labels == c].mean(0) for c in (0, 1))
    rest = x - np.where(labels[:, None] == 1, second, first)
    # One example a class leaves no covariance: the ridge is that of the other approach.
    covariance = rest.T @ rest / len(x) + RIDGE * np.eye(x.shape[1])
    slopes = np.linalg.solve(covariance, second - first)
    share = labels.mean()
    return np.append(np.log(share / (1 - share)) - (first + second) @ slopes / 2, slopes)


def regressed(x: Array, labels: Array) -> Array:
    """Logistic regression with a little weight decay, by Newton's method: (d + 1,)."""
    design = np.column_stack([np.ones(len(x)), x])
    weights = np.zeros(design.shape[1])
    for _ in range(NEWTON):
        p: Array = 1 / (1 + np.exp(-(design @ weights).clip(-30, 30)))
        gradient = design.T @ (p - labels) / len(x) + RIDGE * weights
        curvature = p * (1 - p) / len(x)
        hessian = (design * curvature[:, None]).T @ design + RIDGE * np.eye(len(weights))
        change = np.linalg.solve(hessian, gradient)
        # A full step may overshoot where classes are nearly separated.
        weights = weights - change * min(1.0, 5 / max(float(np.linalg.norm(change)), 1e-12))
    return weights


def loss(weights: Array, x: Array, labels: Array) -> float:
    """Mean -log p(c | x) in nats."""
    logit = weights[0] + x @ weights[1:]
    return float((np.logaddexp(0, logit) - labels * logit).mean())


def learning(
    x: Array,
    labels: Array,
    counts: Sequence[int],
    repetitions: int = 40,
    seed: int = 0,
    watch: Callable[[], None] = lambda: None,
) -> tuple[Learning, Learning]:
    """The generative and the discriminative approach on examples x, (N, d), with labels 0 and 1.

    Half of them is for measuring; of the other half each repetition draws its examples, as many
    of one class as of the other. UsageError if it has too few.
    """
    rng = np.random.default_rng(seed)
    order = rng.permutation(len(x))
    seen, unseen = order[: len(x) // 2], order[len(x) // 2 :]
    pools = [seen[labels[seen] == c] for c in (0, 1)]
    most = 2 * min(map(len, pools))
    if max(counts) > most or min(counts) < 4:
        raise UsageError(f"{max(counts)} examples to learn from: give from 4 to {most}")
    means = [x[labels == c].mean(0) for c in (0, 1)]
    rest = x - np.where(labels[:, None] == 1, means[1], means[0])
    apart = means[1] - means[0]
    separation = float(np.sqrt(apart @ np.linalg.solve(rest.T @ rest / len(x), apart)))
    d = x.shape[1]
    approaches = {
        "generative": (analysed, generative_v(d, separation)),
        "discriminative": (regressed, discriminative_v(d)),
    }
    found: dict[str, list[list[float]]] = {name: [] for name in approaches}
    for count in counts:
        draws = [
            np.concatenate([rng.choice(pool, count // 2, replace=False) for pool in pools])
            for _ in range(repetitions)
        ]
        for name, (learn, _) in approaches.items():
            found[name].append(
                [loss(learn(x[i], labels[i]), x[unseen], labels[unseen]) for i in draws]
            )
        watch()
    results = []
    for name, (_, theory) in approaches.items():
        values = np.array(found[name])  # (counts, repetitions)
        errors = values.std(1, ddof=1) / np.sqrt(repetitions)
        curve = fit(counts, values.mean(1).tolist(), errors.tolist())
        results.append(Learning(name, tuple(values.mean(1)), tuple(errors), curve, theory))
    return results[0], results[1]


def meeting(generative: Learning, discriminative: Learning) -> float | None:
    """The count of examples at which the fitted curves cross, see `curves.crossing`."""
    return crossing(generative.curve, discriminative.curve)
