"""The two single-task baselines: a ResNet classifier and a bias-free UNet denoiser.

They share the GradResNet's layers, configs and training loop, so that what a
comparison shows is the price of doing both jobs in one network.
"""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn.functional import conv_transpose2d, pixel_shuffle

from cdnctl.models.adjoint import Chain, Conv
from cdnctl.models.trunk import NetConfig, Network, Normalised, Weights, make_blocks, mixture


class Classifier(Network):
    """Class scores alone: a joint model whose density is flat but for the classes."""

    denoises = False

    def log_joint(self, y: Tensor, sigma: Tensor | float) -> Tensor:
        """Class scores, (B, K): log p(c | y) up to a function of y."""
        n = Normalised(y, sigma, self.config.multiple)
        *_, last = self.trunk.encode(n, self.compute_dtype)
        logits: Tensor = self.head(last)[0]
        return logits

    def correction(
        self,
        y: Tensor,
        sigma: Tensor | float,
        weights: Weights = None,
        cells: int | None = None,
    ) -> tuple[Tensor, Tensor]:
        """sigma^2 sum_c w_c grad_y l_c, like y, and the class scores."""
        n = Normalised(y, sigma, self.config.multiple)
        features, adjoint = self.trunk(n, self.compute_dtype)
        logits, head_adjoint = self.head(features[-1], cells)
        pull = [None] * (len(features) - 1) + [head_adjoint(mixture(weights, logits))]
        g = adjoint(pull)[..., : y.shape[2], : y.shape[3]].to(y.dtype)
        return n.sigma.square() / n.tau * g, logits

    def forward(
        self, y: Tensor, sigma: Tensor | float, weights: Weights = None
    ) -> tuple[Tensor, Tensor]:
        """y as it is, for there is no density to denoise with, and the class scores."""
        return y, self.log_joint(y, sigma)


class UNet(Network):
    """Score alone: the GradResNet's trunk, then a decoder with weights of its own.

    The decoder mirrors the trunk's adjoint layer by layer (transposed stem and
    strided convolutions, as many residual blocks, 1x1 side connections), so it
    has the same number of multiply-adds as the GradResNet's gradient.
    """

    classifies = False

    def __init__(self, config: NetConfig):
        super().__init__(config)
        del self.head
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
        logits = y.new_zeros(y.shape[0], self.num_classes)
        mixture(weights, logits)
        n = Normalised(y, sigma, self.config.multiple)
        features = list(self.trunk.encode(n, self.compute_dtype))
        h: Tensor | None = None
        for i in reversed(range(len(features))):
            skip = self.skips[i](features.pop())[0]
            h = skip if h is None else skip + _transposed(self.ups[i], h)
            h = self.blocks[i](h)[0]
        assert h is not None
        g = pixel_shuffle(_transposed(self.out, h).to(n.z.dtype), self.config.unshuffle)
        return n.correction(g), logits


def _transposed(conv: nn.Module, x: Tensor) -> Tensor:
    """Transposed convolution with the weights of a ``Conv``."""
    assert isinstance(conv, Conv)
    w = conv.weight.to(x.dtype)
    return conv_transpose2d(x, w, stride=conv.stride, padding=conv.padding)
