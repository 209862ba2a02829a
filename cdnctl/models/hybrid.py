"""Hybrid: the score by a UNet, what the class adds to it by the head on the UNet's encoder.

The decoder of `GradResNet` is the transpose of its encoder, which keeps log p(y, c) exact
and costs 0.2 to 0.3 dB. Here the decoder has weights of its own, and the class enters by

    s_c(y) = s(y) + grad_y log p(c | y),    p(. | y) = softmax l(y),

so that for any mixture w of classes, with W = sum_c w_c,

    sum_c w_c s_c = W s + sum_c (w_c - W p(c | y)) grad_y l_c.

Posterior, D_c, mixtures, guidance, evidence and D = sum_c p(c | y) D_c are as exact as they
are for a joint density. What a hybrid does not have is log p(y): its score need not be a
gradient.
"""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn.functional import conv_transpose2d, pixel_shuffle

from cdnctl.models.adjoint import Chain, Conv
from cdnctl.models.hearing import heard, make_ears
from cdnctl.models.network import Mixture, Whole, posterior_of, resolved
from cdnctl.models.trunk import (
    PRIOR_STD,
    Classifying,
    Correcting,
    NetConfig,
    Normalised,
    make_blocks,
)


class Decoder(nn.Module):
    """Features of every stage to the score at unit scale.

    It mirrors the trunk: transposed stem and strided convolutions, residual blocks, and a
    1x1 convolution from every stage of the trunk.
    """

    def __init__(self, config: NetConfig):
        super().__init__()
        self.unshuffle = config.unshuffle
        self.blocks = nn.ModuleList(
            Chain(*make_blocks(config, w, n))
            for w, n in zip(config.widths, config.decoder or config.blocks, strict=True)
        )
        self.skips = nn.ModuleList(Conv(w, w, 1) for w in config.widths)
        self.ups = nn.ModuleList(
            Conv(w, deeper, config.down, stride=2)
            for w, deeper in zip(config.widths, config.widths[1:], strict=False)
        )
        self.ears = make_ears(config.widths, config.coloured)
        self.out = Conv(config.channels * config.unshuffle**2, config.widths[0], 3, gain=0.1)

    def forward(self, features: list[Tensor], n: Normalised) -> Tensor:
        """(B, C, H', W') from the features of all stages; empties the list it is given."""
        h: Tensor | None = None
        for i in reversed(range(len(features))):
            skip = self.skips[i](features.pop())[0]  # (B, widths[i], h_i, w_i)
            h = skip if h is None else skip + _transposed(self.ups[i], h)
            h = self.blocks[i](heard(self.ears, i, n.spectrum, h))[0]
        assert h is not None
        return pixel_shuffle(_transposed(self.out, h), self.unshuffle)


class Hybrid(Correcting, Classifying):
    """A denoiser and a classifier on one encoder, tied by Bayes' rule."""

    def __init__(self, config: NetConfig):
        super().__init__(config)
        self.decoder = Decoder(config)

    def corrected(
        self, n: Normalised, mixture: Mixture, whole: Whole | None
    ) -> tuple[Tensor, Tensor]:
        """Without a mixture that is the UNet alone; with one the trunk's adjoint is run for the
        gradient of the logits."""
        if mixture is None:
            features = list(self.trunk.encode(n, self.compute_dtype))
            logits, _ = self.head(features[-1], whole)
            return n.correction(self.decoder(features, n).to(n.z.dtype)), logits
        features, adjoint = self.trunk(n, self.compute_dtype)  # (B, widths[i], h_i, w_i) each
        logits, head_adjoint = self.head(features[-1], whole)  # (B, K)
        w = resolved(mixture, logits, whole)  # (B, K)
        total = w.sum(1, keepdim=True)  # (B, 1)
        cotangents: list[Tensor | None] = [None] * len(features)
        tilt = w - total * posterior_of(logits, whole)
        cotangents[-1] = head_adjoint(tilt * (n.sigma / PRIOR_STD).view(-1, 1))
        total = total.view(-1, 1, 1, 1)
        s = self.decoder(features, n).to(n.z.dtype)  # (B, C, H', W')
        g = total * s + adjoint(cotangents)
        return n.correction(g, total), logits


def _transposed(conv: nn.Module, x: Tensor) -> Tensor:
    """Transposed convolution with the weights of a ``Conv``."""
    assert isinstance(conv, Conv)
    w = conv.weight.to(x.dtype)
    return conv_transpose2d(x, w, stride=conv.stride, padding=conv.padding)
