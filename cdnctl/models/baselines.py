"""The two single-task baselines: a ResNet classifier and a bias-free UNet denoiser.

They share the GradResNet's layers, configs and training loop, so that what a
comparison shows is the price of doing both jobs in one network.
"""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from cdnctl.models.hybrid import Decoder
from cdnctl.models.network import Mixture, Whole
from cdnctl.models.trunk import Classifying, Correcting, NetConfig, Normalised


class Classifier(Classifying):
    """Logits alone: the trunk and its class head."""


class UNet(Correcting):
    """Score alone: the GradResNet's trunk, then a decoder with weights of its own."""

    def __init__(self, config: NetConfig):
        super().__init__(config)
        self.decoder = Decoder(config)

    def adopted(self, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """As `TrunkNetwork.adopted`; of a network that classifies, all but its class head."""
        return super().adopted({k: v for k, v in weights.items() if not k.startswith("head.")})

    def corrected(
        self, n: Normalised, mixture: Mixture, whole: Whole | None
    ) -> tuple[Tensor, Tensor]:
        """The learnt score knows no classes: no mixture changes it, and all are as likely."""
        features = list(self.trunk.encode(n, self.compute_dtype))
        logits = n.y.new_zeros(n.y.shape[0], self.num_classes)
        return n.correction(self.decoder(features, n).to(n.z.dtype)), logits
