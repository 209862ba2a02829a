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

from cdnctl.core.joint import per_sample
from cdnctl.models.adjoint import QuadraticForm
from cdnctl.models.trunk import MIN_SIGMA, PRIOR_STD, ClassHead, NetConfig, Normalised, Trunk, Weights, mixture


class GradResNet(nn.Module):
    """Joint log-density of a noisy picture and its class.

    ``compute_dtype`` is the precision of the trunk (None: that of the input);
    the input, the output, the class scores and the energy stay at the input's.
    """

    denoises = True
    classifies = True

    def __init__(self, config: NetConfig):
        super().__init__()
        self.config = config
        self.num_classes = config.num_classes
        self.compute_dtype: torch.dtype | None = None
        self.trunk = Trunk(config)
        last = len(config.widths) - 1
        ranks = [max(1 if i == last else 0, round(w * config.side)) for i, w in enumerate(config.widths)]
        self.sides = nn.ModuleDict(
            {str(i): QuadraticForm(config.widths[i], rank, gain=0.3) for i, rank in enumerate(ranks) if rank}
        )
        self.head = ClassHead(config)

    def energy(self, features: list[Tensor]) -> Tensor:
        """U, (B,), from the features of every stage."""
        return torch.stack([form.energy(features[int(i)]) for i, form in self.sides.items()]).sum(0)

    def log_joint(self, y: Tensor, sigma: Tensor | float) -> Tensor:
        """f_c(y) = log p_sigma(y, c) up to a constant: (B, C, H, W) -> (B, K), in nats."""
        n = Normalised(y, sigma, self.config.multiple)
        features, _ = self.trunk(n, self.compute_dtype)
        logits, _ = self.head(features[-1])
        gauss = -(y - 0.5).square().sum((1, 2, 3)) / (2 * n.tau.flatten().square())
        u = self.energy(features).to(y.dtype)
        return (gauss + PRIOR_STD / n.sigma.flatten() * u)[:, None] + logits

    def class_features(self, y: Tensor, sigma: Tensor | float) -> Tensor:
        """What the class scores are a linear map of, after a mean over positions: (B, F, h, w)."""
        n = Normalised(y, sigma, self.config.multiple)
        top: Tensor = self.head.features(self.trunk(n, self.compute_dtype)[0][-1])[0]
        return top.to(y.dtype)

    def correction(
        self,
        y: Tensor,
        sigma: Tensor | float,
        weights: Weights = None,
        cells: int | None = None,
    ) -> tuple[Tensor, Tensor]:
        """sigma^2 sum_c w_c s_c(y), like y, and the class scores l_c, (B, K), in one pass.

        y: (B, C, H, W) in [0, 1] plus noise. sigma: float or (B,), in [0, 1] pixel
        units. weights: mixture of class-conditional scores, (B, K) or (K,), or a
        function that gives them from the class scores (None: the posterior, which
        gives the unconditional score). cells: for a tile of a larger picture, the
        number of last-stage positions of the whole (give ``weights`` too: the class
        scores of a tile are not those of the picture).
        """
        n = Normalised(y, sigma, self.config.multiple)
        features, adjoint = self.trunk(n, self.compute_dtype)
        logits, head_adjoint = self.head(features[-1], cells)
        w = mixture(weights, logits)
        total = w.sum(1).view(-1, 1, 1, 1)

        # The cotangent of every stage's features: its side connection's gradient,
        # and for the last stage also that of the weighted class scores.
        pull: list[Tensor | None] = [None] * len(features)
        for i, form in self.sides.items():
            pull[int(i)] = total.to(features[0].dtype) * form(features[int(i)])
        pull[-1] = pull[-1] + head_adjoint(w * (n.sigma / PRIOR_STD).view(-1, 1))  # type: ignore[operator]
        return n.correction(adjoint(pull), total), logits

    def forward(
        self, y: Tensor, sigma: Tensor | float, weights: Weights = None
    ) -> tuple[Tensor, Tensor]:
        """y + sigma^2 sum_c w_c s_c(y) (Tweedie's formula), like y, and the class scores."""
        correction, logits = self.correction(y, sigma, weights)
        return y + correction, logits

    def score(self, y: Tensor, sigma: Tensor | float, weights: Tensor | None = None) -> Tensor:
        """sum_c w_c grad_y f_c(y), like y. The hand-written adjoint of ``log_joint``."""
        return self.correction(y, sigma, weights)[0] / per_sample(sigma, y).clamp_min(MIN_SIGMA).square()
