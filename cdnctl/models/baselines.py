"""The two single-task baselines: a ResNet classifier and a bias-free UNet denoiser.

They share the GradResNet's layers, configs and training loop, so that what a
comparison shows is the price of doing both jobs in one network.
"""

from __future__ import annotations

from torch import Tensor

from cdnctl.models.hybrid import Decoder
from cdnctl.models.trunk import Mixture, NetConfig, Network, Normalised, Whole, resolved


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
        mixture: Mixture = None,
        whole: Whole | None = None,
    ) -> tuple[Tensor, Tensor]:
        """sigma^2 sum_c w_c grad_y l_c, like y, and the class scores."""
        n = Normalised(y, sigma, self.config.multiple)
        features, adjoint = self.trunk(n, self.compute_dtype)
        logits, head_adjoint = self.head(features[-1], whole)
        pull = [None] * (len(features) - 1) + [head_adjoint(resolved(mixture, logits, whole))]
        g = adjoint(pull)[..., : y.shape[2], : y.shape[3]].to(y.dtype)
        return n.sigma.square() / n.tau * g, logits

    def forward(
        self, y: Tensor, sigma: Tensor | float, mixture: Mixture = None
    ) -> tuple[Tensor, Tensor]:
        """y as it is, for there is no density to denoise with, and the class scores."""
        return y, self.log_joint(y, sigma)


class UNet(Network):
    """Score alone: the GradResNet's trunk, then a decoder with weights of its own."""

    classifies = False
    mixes = False

    def __init__(self, config: NetConfig):
        super().__init__(config)
        del self.head
        self.decoder = Decoder(config)

    def correction(
        self,
        y: Tensor,
        sigma: Tensor | float,
        mixture: Mixture = None,
        whole: Whole | None = None,
    ) -> tuple[Tensor, Tensor]:
        """sigma^2 score, like y, and constant class scores, (B, K): every class is as likely.

        The learnt score knows no classes: ``mixture`` and ``whole`` change nothing.
        """
        logits = y.new_zeros(y.shape[0], self.num_classes)
        resolved(mixture, logits, whole)
        n = Normalised(y, sigma, self.config.multiple)
        features = list(self.trunk.encode(n, self.compute_dtype))
        return n.correction(self.decoder(features).to(n.z.dtype)), logits
