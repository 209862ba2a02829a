"""GradResNet: a residual network whose backward pass is the decoder.

Source of the idea: Thiry and Guth, "Classification-Denoising Networks", 2024
(arXiv 2410.03505). One scalar network models log p(y, c) of a noisy picture y
and a class c; the denoiser is Tweedie's formula applied to its gradient. The
parametrisation here keeps every quantity at unit scale at every noise level:

    r = y - 1/2,   tau^2 = sigma^2 + s0^2,   z = r / tau
    f_c(y) = -|r|^2 / (2 tau^2) + (s0 / sigma) U(z, sigma) + l_c(z, sigma)
    D_w(y) = 1/2 + (s0/tau)^2 r + (sigma s0 / tau) G,
    G = grad_z [U + (sigma / s0) sum_c w_c l_c]

with U extensive (a sum over pixels and stages) and l_c intensive (a mean).
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from cdnctl.models.adjoint import QuadraticForm
from cdnctl.models.trunk import PRIOR_STD, Mixture, NetConfig, Network, Normalised, Whole, resolved


class GradResNet(Network):
    """Joint log-density of a noisy picture and its class."""

    def __init__(self, config: NetConfig):
        super().__init__(config)
        last = len(config.widths) - 1
        self.sides = nn.ModuleDict()
        for i, width in enumerate(config.widths):
            rank = max(round(width * config.side), int(i == last))
            if rank:
                self.sides[str(i)] = QuadraticForm(width, rank, gain=0.3)

    def energy(self, features: list[Tensor]) -> Tensor:
        """U, (B,), from the features of every stage."""
        parts = [
            form.energy(features[int(i)])
            for i, form in self.sides.items()
            if isinstance(form, QuadraticForm)
        ]
        return torch.stack(parts).sum(0)

    def log_joint(self, y: Tensor, sigma: Tensor | float) -> Tensor:
        """f_c(y) = log p_sigma(y, c) up to a constant: (B, C, H, W) -> (B, K), in nats."""
        n = Normalised(y, sigma, self.config.multiple)
        features = list(self.trunk.encode(n, self.compute_dtype))
        logits, _ = self.head(features[-1])
        gauss = -(y - 0.5).square().sum((1, 2, 3)) / (2 * n.tau.flatten().square())
        u = self.energy(features).to(y.dtype)
        return (gauss + PRIOR_STD / n.sigma.flatten() * u)[:, None] + logits

    def correction(
        self,
        y: Tensor,
        sigma: Tensor | float,
        mixture: Mixture = None,
        whole: Whole | None = None,
    ) -> tuple[Tensor, Tensor]:
        """sigma^2 sum_c w_c s_c(y) by the trunk's adjoint, and the class scores."""
        n = Normalised(y, sigma, self.config.multiple)
        features, adjoint = self.trunk(n, self.compute_dtype)
        logits, head_adjoint = self.head(features[-1], whole)
        w = resolved(mixture, logits, whole)
        total = w.sum(1).view(-1, 1, 1, 1)

        # The cotangent of every stage's features: its side connection's gradient,
        # and for the last stage also that of the weighted class scores.
        pull: list[Tensor | None] = [None] * len(features)
        for i, form in self.sides.items():
            pull[int(i)] = form(features[int(i)]).mul_(total.to(features[0].dtype))
        pull[-1] = pull[-1] + head_adjoint(w * (n.sigma / PRIOR_STD).view(-1, 1))
        del features  # what the adjoint does not need makes room for it
        return n.correction(adjoint(pull), total), logits
