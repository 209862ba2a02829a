"""One density, everything else a function of it.

A joint model gives f_c(y, sigma) = log p_sigma(y, c) up to a constant that
depends on neither y nor c, where y = x + sigma * noise. ``score`` is the one
primitive here; the rest follows from it by exact identities (Miyasawa 1961,
Robbins 1956, Efron 2011; Thiry and Guth 2024 for the joint form).

Pictures are (B, C, H, W) in [0, 1]; sigma is a float or a (B,) tensor in the
same unit (50 on the 0..255 scale is 50/255 here).
"""

from __future__ import annotations

from typing import Protocol, runtime_checkable

import torch
from torch import Tensor, nn


class Denoiser(Protocol):
    """Posterior mean of the clean picture, as a function of a noisy one and sigma."""

    def __call__(self, y: Tensor, sigma: Tensor | float) -> Tensor: ...


@runtime_checkable
class Joint(Protocol):
    """A density of noisy pictures and classes."""

    def log_joint(self, y: Tensor, sigma: Tensor | float) -> Tensor:
        """f_c(y, sigma): (B, C, H, W) -> (B, K), in nats."""
        ...


@runtime_checkable
class HasScore(Protocol):
    """A model that computes its score without autograd, or has nothing but a score."""

    def score(self, y: Tensor, sigma: Tensor | float, mixture: Tensor | None = None) -> Tensor: ...


@runtime_checkable
class HasPosterior(Protocol):
    """A model that computes its class scores without its density, or has no density."""

    def logits(self, y: Tensor, sigma: Tensor | float) -> Tensor: ...


def per_sample(sigma: Tensor | float, y: Tensor) -> Tensor:
    """sigma as (B, 1, 1, 1) or (1, 1, 1, 1), in y's dtype and on its device."""
    return torch.as_tensor(sigma, dtype=y.dtype, device=y.device).reshape(-1, 1, 1, 1)


def per_class(mixture: Tensor, like: Tensor) -> Tensor:
    """A mixture, (K,) or (B, K), as (B, K), in the dtype and on the device of ``like`` (B, K)."""
    return mixture.to(like).expand(like.shape)


def score(
    model: Joint | HasScore, y: Tensor, sigma: Tensor | float, mixture: Tensor | None = None
) -> Tensor:
    """sum_c w_c grad_y log p_sigma(y, c), like y.

    mixture: (K,) or (B, K). None means the posterior p(c | y), which gives
    grad_y log p_sigma(y); a one-hot vector gives the class-conditional score.
    Works inside a surrounding ``no_grad`` and leaves y's ``requires_grad`` alone.
    Differentiable in y, sigma, mixture and the model's parameters, as far as autograd
    is on and any of them requires grad; otherwise no graph is kept.
    """
    if isinstance(model, HasScore):
        return model.score(y, sigma, mixture)
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
    """p(c | y), (B, K): softmax of the joint log-density, or the class scores, over classes."""
    if isinstance(model, HasPosterior):
        return model.logits(y, sigma).softmax(1)
    return model.log_joint(y, sigma).softmax(1)


def denoise(
    model: Joint | HasScore, y: Tensor, sigma: Tensor | float, mixture: Tensor | None = None
) -> Tensor:
    """Posterior mean E[x | y] by Tweedie's formula, y + sigma^2 score(y), like y. Not clipped.

    With ``mixture`` one-hot: E[x | y, c]. With any other mixture w of classes:
    y + sigma^2 sum_c w_c s_c(y).
    """
    return y + per_sample(sigma, y).square() * score(model, y, sigma, mixture)
