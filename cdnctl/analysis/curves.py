"""Learning curves b + v / n: how the loss falls with the number of training examples.

A generative model, of log p(x, c), and a discriminative one, of log p(c | x), both have an excess
loss of about b + v / n: b from what the family cannot express, v from its parameters. Generative
models have more b and less v, so that they win for few examples (Ng and Jordan 2001; Thiry and
Guth 2024). For a family that holds the truth, b = 0 and v follows from Fisher's information.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from cdnctl.errors import UsageError


@dataclass(frozen=True)
class Curve:
    """b + v / n, b and v not negative, with standard errors of both."""

    b: float
    v: float
    b_error: float = 0.0
    v_error: float = 0.0

    def at(self, n: float) -> float:
        return self.b + self.v / n


def fit(counts: Sequence[float], losses: Sequence[float], errors: Sequence[float]) -> Curve:
    """The curve through losses that were measured with ``counts`` training examples.

    errors: standard errors of the losses, positive. Weighted least squares under b >= 0 and
    v >= 0; the errors are those without the bounds. UsageError for less than two counts.
    """
    from scipy.optimize import nnls

    n, loss, error = (np.asarray(a, np.float64) for a in (counts, losses, errors))
    if len(np.unique(n)) < 2 or not (n > 0).all() or not (error > 0).all():
        raise UsageError("a learning curve needs two counts of examples, and errors above 0")
    design = np.stack([np.ones_like(n), 1 / n], 1) / error[:, None]
    scale = np.linalg.norm(design, axis=0)  # the columns differ by orders of magnitude
    (b, v), _ = nnls(design / scale, loss / error)
    spread = np.sqrt(np.diag(np.linalg.inv((design / scale).T @ (design / scale)))) / scale
    return Curve(float(b / scale[0]), float(v / scale[1]), float(spread[0]), float(spread[1]))


def crossing(one: Curve, other: Curve) -> float | None:
    """The number of examples at which the curves cross; None if one is better for any."""
    if (one.b - other.b) * (other.v - one.v) <= 0:
        return None
    return (other.v - one.v) / (one.b - other.b)


def discriminative_v(dimensions: int) -> float:
    """v of logistic regression, in nats: half of its d + 1 parameters, if it holds the truth."""
    return (dimensions + 1) / 2


def generative_v(dimensions: int, separation: float) -> float:
    """v of linear discriminant analysis, in nats of log p(c | x), on its own ground: two equally
    frequent Gaussian classes in d dimensions whose means are ``separation`` standard deviations
    apart.

    tr(F C) / 2, with F the information that classes have on the logit's coefficients, and C the
    covariance, times n, that estimates of means, covariance and frequencies give those (Efron
    1975). The same as for logistic regression at separation 0, and less with more of it.
    """
    from scipy.integrate import quad

    half = separation / 2

    def mean(power: int) -> float:
        """E p (1 - p) t^power, t along the line between the means, p = p(c | x)."""

        def integrand(t: float) -> float:
            # Of both classes alike; p (1 - p) = 1 / (2 + 2 cosh(logit)), without overflow.
            weight = math.exp(-((t - half) ** 2) / 2) / math.sqrt(2 * math.pi)
            logit = math.exp(-abs(separation * t))
            return weight * logit / (1 + logit) ** 2 * t**power

        return quad(integrand, -half - 12, half + 12, limit=200)[0]

    square = separation**2
    across = mean(0) * (4 + square)  # the intercept, and each of the d - 1 other directions
    return (dimensions * across + mean(2) * (4 + 2 * square)) / 2
