"""One density, everything else a function of it.

A joint model gives f_c(y, sigma) = log p_sigma(y, c) up to a constant that
depends on neither y nor c, where y = x + sigma * noise. ``score`` is the one
primitive here; the rest follows from it by exact identities (Miyasawa 1961,
Robbins 1956, Efron 2011; Thiry and Guth 2024 for the joint form).

Pictures are (B, C, H, W) in [0, 1]; sigma is a float or a (B,) tensor in the
same unit (50 on the 0..255 scale is 50/255 here).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from cdnctl.core.coloured import Told

MIN_SIGMA = 1e-4  # below this (0.03 of 255) a noise level is treated as this one

Mixture = Tensor | Callable[[Tensor], Tensor] | None
"""Weights w of class-conditional scores, (B, K) or (K,); or a function that gives them from the
logits, (B, K) to (B, K); or None for the posterior, which gives the unconditional score."""


Sigma = Tensor | float | Told
"""A noise level, float or (B,), in the unit of the picture; or all that is known of noise that is
not white, for a network that hears it."""


class Whole(NamedTuple):
    """The picture that a tile is part of: a tile's own logits are not those of it."""

    cells: int  # positions over which class features are averaged, see `HasClassFeatures`
    posterior: Tensor  # p(c | picture), (K,), or of each picture of a batch, (B, K)


class Denoiser(Protocol):
    """Posterior mean of the clean picture, as a function of a noisy one and sigma."""

    def __call__(self, y: Tensor, sigma: Tensor | float) -> Tensor: ...


@runtime_checkable
class Corrector(Protocol):
    """What can denoise: given any mixture of classes, and a tile as a part of its picture."""

    def correction(
        self,
        y: Tensor,
        sigma: Sigma,
        mixture: Mixture = None,
        whole: Whole | None = None,
    ) -> tuple[Tensor, Tensor]:
        """sigma^2 sum_c w_c s_c(y), like y, and the logits l_c, (B, K), in one pass.

        y: (B, C, H, W) in [0, 1] plus noise. sigma: float or (B,), in the same unit. mixture: the
        weights w. whole: for a tile, the picture that it is part of. K is 0 for a model that
        knows no classes.
        """
        ...


@runtime_checkable
class Joint(Protocol):
    """A density of noisy pictures and classes."""

    def log_joint(self, y: Tensor, sigma: Tensor | float) -> Tensor:
        """f_c(y, sigma): (B, C, H, W) -> (B, K), in nats."""
        ...


@runtime_checkable
class HasScore(Protocol):
    """A model that has its score, instead of a density to differentiate."""

    def score(self, y: Tensor, sigma: Tensor | float, mixture: Tensor | None = None) -> Tensor: ...


@runtime_checkable
class HasPosterior(Protocol):
    """What can classify."""

    def logits(self, y: Tensor, sigma: Tensor | float) -> Tensor:
        """l_c, (B, K): log p(c | y) up to a function of y. They are exact where a joint density
        is not: beside its energy, of the order of 1 / sigma^2, the differences between classes
        drown in rounding."""
        ...


@runtime_checkable
class HasClassFeatures(HasPosterior, Protocol):
    """A classifier by the mean of local features: it can classify a picture tile by tile."""

    def class_features(self, y: Tensor, sigma: Tensor | float) -> Tensor:
        """One position for each cell of the network, (B, F, H / multiple, W / multiple)."""
        ...

    def logits_of(self, mean_features: Tensor) -> Tensor:
        """Logits, (..., K), from the mean of the features over all positions, (..., F)."""
        ...


@runtime_checkable
class HasSteps(Protocol):
    """A network that can be watched at work."""

    def steps(self, y: Tensor, sigma: Tensor | float) -> Iterator[tuple[str, Tensor]]:
        """What comes out of each of its parts, by name, the picture first: (B, C', h, w) each."""
        ...


Model = Joint | HasScore | Corrector
"""What has a score, in one way or another."""


def per_sample(sigma: Sigma, y: Tensor) -> Tensor:
    """sigma as (B, 1, 1, 1) or (1, 1, 1, 1), in y's dtype and on its device."""
    sigma = sigma.sigma if isinstance(sigma, Told) else sigma
    return torch.as_tensor(sigma, dtype=y.dtype, device=y.device).reshape(-1, 1, 1, 1)


def variance(sigma: Tensor | float, y: Tensor) -> Tensor:
    """sigma^2 as `per_sample`, but at least MIN_SIGMA^2: something to divide by."""
    return per_sample(sigma, y).clamp_min(MIN_SIGMA).square()


def per_class(mixture: Tensor, like: Tensor) -> Tensor:
    """A mixture, (K,) or (B, K), as (B, K), in the dtype and on the device of ``like`` (B, K)."""
    return mixture.to(like).expand(like.shape)


def score(model: Model, y: Tensor, sigma: Tensor | float, mixture: Tensor | None = None) -> Tensor:
    """sum_c w_c grad_y log p_sigma(y, c), like y.

    mixture: (K,) or (B, K). None means the posterior p(c | y), which gives
    grad_y log p_sigma(y); a one-hot vector gives the class-conditional score.
    Works inside a surrounding ``no_grad`` and leaves y's ``requires_grad`` alone.
    Differentiable in y, sigma, mixture and the model's parameters, as far as autograd
    is on and any of them requires grad; otherwise no graph is kept.
    """
    if isinstance(model, HasScore):
        return model.score(y, sigma, mixture)
    if isinstance(model, Corrector):
        return model.correction(y, sigma, mixture)[0] / variance(sigma, y)
    parameters = model.parameters() if isinstance(model, nn.Module) else ()
    inputs = (t for t in (y, sigma, mixture, *parameters) if isinstance(t, Tensor))
    wanted = torch.is_grad_enabled() and any(t.requires_grad for t in inputs)
    with torch.enable_grad():
        # A view of y: sigma or mixture may depend on y, too, and are held fixed here.
        leaf = y.view_as(y) if wanted and y.requires_grad else y.detach().requires_grad_()
        f = model.log_joint(leaf, sigma)
        w = f.softmax(1) if mixture is None else per_class(mixture, f)
        return torch.autograd.grad(f, leaf, w, create_graph=wanted)[0]


def log_marginal(model: Joint, y: Tensor, sigma: Tensor | float) -> Tensor:
    """log p_sigma(y) = logsumexp_c f_c(y), up to a constant: (B,), in nats."""
    return model.log_joint(y, sigma).logsumexp(1)


def posterior(model: Joint | HasPosterior, y: Tensor, sigma: Tensor | float) -> Tensor:
    """p(c | y), (B, K): softmax of the joint log-density, or the logits, over classes."""
    if isinstance(model, HasPosterior):
        return model.logits(y, sigma).softmax(1)
    return model.log_joint(y, sigma).softmax(1)


def denoise(
    model: Model, y: Tensor, sigma: Tensor | float, mixture: Tensor | None = None
) -> Tensor:
    """Posterior mean E[x | y] by Tweedie's formula, y + sigma^2 score(y), like y. Not clipped.

    With ``mixture`` one-hot: E[x | y, c]. With any other mixture w of classes:
    y + sigma^2 sum_c w_c s_c(y).
    """
    return y + per_sample(sigma, y).square() * score(model, y, sigma, mixture)
