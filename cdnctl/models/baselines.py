"""The two single-task baselines: a ResNet classifier and a bias-free UNet denoiser.

They share the GradResNet's layers, configs and training loop, so that what a
comparison shows is the price of doing both jobs in one network.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cdnctl.core.joint import per_sample
from cdnctl.models.adjoint import Chain, Conv
from cdnctl.models.trunk import MIN_SIGMA, ClassHead, NetConfig, Normalised, Trunk, Weights, make_blocks


class Classifier(nn.Module):
    """Class scores alone: the GradResNet's trunk and head, forward only."""

    denoises = False
    classifies = True

    def __init__(self, config: NetConfig):
        super().__init__()
        self.config = config
        self.num_classes = config.num_classes
        self.compute_dtype: torch.dtype | None = None
        self.trunk = Trunk(config)
        self.head = ClassHead(config)

    def log_joint(self, y: Tensor, sigma: Tensor | float) -> Tensor:
        """Class scores, (B, K): log p(c | y) up to a function of y."""
        n = Normalised(y, sigma, self.config.multiple)
        return self.head(self.trunk(n, self.compute_dtype)[0][-1])[0]

    def class_features(self, y: Tensor, sigma: Tensor | float) -> Tensor:
        """What the class scores are a linear map of, after a mean over positions: (B, F, h, w)."""
        n = Normalised(y, sigma, self.config.multiple)
        top: Tensor = self.head.features(self.trunk(n, self.compute_dtype)[0][-1])[0]
        return top.to(y.dtype)

    def forward(
        self, y: Tensor, sigma: Tensor | float, weights: Weights = None
    ) -> tuple[Tensor, Tensor]:
        """y as it is, and the class scores, (B, K)."""
        return y, self.log_joint(y, sigma)


class UNet(nn.Module):
    """Score alone: the GradResNet's trunk, then a decoder with weights of its own.

    The decoder mirrors the trunk's adjoint layer by layer (transposed stem and
    strided convolutions, as many residual blocks, 1x1 side connections), so it
    has the same number of multiply-adds as the GradResNet's gradient.
    """

    denoises = True
    classifies = False

    def __init__(self, config: NetConfig):
        super().__init__()
        self.config = config
        self.num_classes = config.num_classes
        self.compute_dtype: torch.dtype | None = None
        self.trunk = Trunk(config)
        last = len(config.widths) - 1
        self.blocks = nn.ModuleList(
            Chain(*make_blocks(config, w, n))
            for w, n in zip(config.widths, config.blocks, strict=True)
        )
        self.skips = nn.ModuleList(Conv(w, w, 1) for w in config.widths)
        self.ups = nn.ModuleList(
            Conv(config.widths[i], config.widths[i + 1], config.down, stride=2) for i in range(last)
        )
        self.out = Conv(config.channels * config.unshuffle**2, config.widths[0], 3, gain=0.1)

    def correction(
        self,
        y: Tensor,
        sigma: Tensor | float,
        weights: Weights = None,
        cells: int | None = None,
    ) -> tuple[Tensor, Tensor]:
        """sigma^2 score, like y, and constant class scores, (B, K): every class is as likely.

        The learnt score knows no classes: ``weights`` and ``cells`` change nothing.
        """
        n = Normalised(y, sigma, self.config.multiple)
        features, _ = self.trunk(n, self.compute_dtype)
        h: Tensor | None = None
        for i in reversed(range(len(features))):
            skip = self.skips[i](features[i])[0]
            h = skip if h is None else skip + _transposed(self.ups[i], h)
            h = self.blocks[i](h)[0]
        assert h is not None
        g = F.pixel_shuffle(_transposed(self.out, h).to(n.z.dtype), self.config.unshuffle)
        return n.correction(g), y.new_zeros(y.shape[0], self.num_classes)

    def forward(
        self, y: Tensor, sigma: Tensor | float, weights: Weights = None
    ) -> tuple[Tensor, Tensor]:
        """y + sigma^2 score (Tweedie's formula), like y, and constant class scores."""
        correction, logits = self.correction(y, sigma)
        return y + correction, logits

    def score(self, y: Tensor, sigma: Tensor | float, weights: Tensor | None = None) -> Tensor:
        """The learnt score, like y; it knows no classes, so ``weights`` change nothing."""
        return self.correction(y, sigma)[0] / per_sample(sigma, y).clamp_min(MIN_SIGMA).square()


def _transposed(conv: nn.Module, x: Tensor) -> Tensor:
    """Transposed convolution with the weights of a ``Conv``."""
    assert isinstance(conv, Conv)
    w = conv.weight.to(x.dtype)
    return F.conv_transpose2d(x, w, stride=conv.stride, padding=conv.padding)
