"""What the gradient of a scalar network costs, as ratios taken within one run.

The ways to compute a thing take turns, round after round, so that whatever else the machine
does hits all of them alike; a ratio is the median over rounds of the ratio within a round.
All networks have the shape of a given model and random weights, on which no time depends.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from statistics import median

import torch
from torch import Tensor

from cdnctl.checkpoints import Header, build_module
from cdnctl.errors import UsageError
from cdnctl.models import Mixture, Whole
from cdnctl.models.baselines import UNet
from cdnctl.models.gradresnet import GradResNet
from cdnctl.models.network import resolved
from cdnctl.models.trunk import Correcting, Normalised, TrunkNetwork
from cdnctl.training import objectives
from cdnctl.training.batches import Batch
from cdnctl.training.config import DataConfig, TrainConfig
from cdnctl.training.step import loss_and_gradients

ROUNDS = 7
PIXELS = 2**18  # of what is denoised; a training step sees a quarter of them

FORWARD = "log p alone"  # no gradient
ADJOINT = "adjoint"  # written out, as cdnctl computes
AUTOGRAD = "autograd"  # of log p; trained by double backward
UNET = "UNet"  # of as many multiply-adds


@dataclass(frozen=True)
class Ratio:
    """What one way to do a task costs beside the reference of that task."""

    model: str
    task: str  # denoise, or train: loss and gradients of the weights, without the optimiser
    precision: str  # of the trunk: float32 or bfloat16
    way: str
    seconds_per_megapixel: float  # median over rounds
    ratio: float  # of seconds, to the reference's
    reference: str  # a way


class ByAutograd(GradResNet):
    """A GradResNet whose score is found by differentiating log p, with nothing written out.

    Where gradients are enabled it can be trained, by double backward.
    """

    def corrected(
        self, n: Normalised, mixture: Mixture, whole: Whole | None
    ) -> tuple[Tensor, Tensor]:
        """As of `GradResNet`, of whole pictures; the class scores up to a constant of them all."""
        training = torch.is_grad_enabled()
        with torch.enable_grad():
            leaf = n.y.detach().requires_grad_()
            f = self.log_joint(leaf, n.sigma.flatten())
            w = resolved(mixture, f, whole)
            score = torch.autograd.grad(f, leaf, w, create_graph=training)[0]
        return n.sigma.square() * score, f


def ratios(header: Header, pixels: int = PIXELS, rounds: int = ROUNDS) -> Iterator[Ratio]:
    """Time denoising and training with networks of a model's shape, in every fast precision.

    Inference is of one square picture, or of many of the size of the training crops if the
    network must see pictures as a whole. UsageError if the model's shape is none of theirs.
    """
    module = build_module(header)
    if not isinstance(module, TrunkNetwork):
        raise UsageError(
            f"model {header.name!r} ({header.arch}) has not the shape of a GradResNet or a UNet: "
            "give one that has"
        )
    shape, needs = module.config, module.needs
    networks: dict[str, Correcting] = {
        ADJOINT: GradResNet(shape),
        AUTOGRAD: ByAutograd(shape),
        UNET: UNet(shape),
    }
    side = header.patch if needs.margin is None else math.isqrt(pixels)
    pictures = torch.rand(max(1, pixels // side**2), shape.channels, side, side)
    data = DataConfig(patch=header.patch, batch=max(1, pixels // 4 // header.patch**2))
    config, batch = TrainConfig(data=data), _batch(data, shape.channels, shape.num_classes)

    def untracked(function: Callable[[Tensor, float], object]) -> Callable[[], object]:
        return torch.no_grad()(lambda: function(pictures, 0.1))

    def trained(network: Correcting) -> Callable[[], object]:
        objective = objectives.denoising if isinstance(network, UNet) else objectives.joint
        return lambda: loss_and_gradients(objective, network, batch, config)

    denoising = {FORWARD: untracked(GradResNet(shape).log_joint)}
    denoising |= {way: untracked(network.correction) for way, network in networks.items()}
    training = {way: trained(network) for way, network in networks.items()}
    tasks = (
        ("denoise", FORWARD, denoising, pictures[:, 0].numel()),
        ("train", UNET, training, batch.clean[:, 0].numel()),
    )
    precisions: dict[str, torch.dtype | None] = {"float32": None}
    if torch.ops.mkldnn._is_mkldnn_bf16_supported():  # elsewhere it is emulated, in minutes
        precisions["bfloat16"] = torch.bfloat16
    for precision, dtype in precisions.items():
        for task, reference, ways, count in tasks:
            for network in networks.values():
                network.compute_dtype = dtype
                network.requires_grad_(task == "train")
            seconds = alternate(ways, rounds)
            for way, times in seconds.items():
                ratio = median(a / b for a, b in zip(times, seconds[reference], strict=True))
                each = median(times) / count * 1e6
                yield Ratio(header.name, task, precision, way, each, ratio, reference)


def alternate(ways: Mapping[str, Callable[[], object]], rounds: int) -> dict[str, list[float]]:
    """Seconds of every way in every round. They take turns; a first round warms up."""
    seconds: dict[str, list[float]] = {way: [] for way in ways}
    for number in range(rounds + 1):
        for way, run in ways.items():
            start = time.perf_counter()
            run()
            if number:
                seconds[way].append(time.perf_counter() - start)
    return seconds


def _batch(data: DataConfig, channels: int, classes: int) -> Batch:
    """A training batch of random pixels, a quarter of which is denoised given its class."""
    count = data.batch
    clean, noise = torch.rand(2, count, channels, data.patch, data.patch)
    sigma = torch.linspace(0.02, 0.4, count)
    labels = torch.arange(count) % classes
    return Batch(clean, noise, sigma, sigma, labels, torch.arange(count) % 4 == 0)
