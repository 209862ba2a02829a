"""Layers that know their adjoint.

The score of a scalar network is its gradient, and a gradient is an ordinary
feed-forward computation with tied weights: run the layers forward, then their
adjoints backward. Every layer here returns ``(output, adjoint)``, where
``adjoint(g)`` maps a cotangent of the output to the cotangent of the input.

Autograd would do the same with ``create_graph=True``, but pays for it: training
then differentiates through the double-backward formulas of convolutions and
norms, which are slow. Written out, the whole thing is one plain graph that runs
under ``no_grad`` at inference, trains with a single ordinary backward pass, and
compiles into one piece.

An adjoint may be called once: it lets go of what it remembers layer by layer, which
halves the memory of inference. It leaves the cotangent that it is given alone.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from itertools import zip_longest

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Adjoint = Callable[[Tensor], Tensor]


def stat_dtype(x: Tensor) -> torch.dtype:
    """The dtype for statistics: of half-precision features they are taken in float32."""
    return torch.promote_types(x.dtype, torch.float32)


def init_normal(weight: Tensor, std: float) -> None:
    """Fill weights with independent normal numbers.

    Not on the meta device, where they have no values: drawing there imports torch's compiler,
    which would cost every command a second.
    """
    if not weight.is_meta:
        nn.init.normal_(weight, std=std)


class Conv(nn.Module):
    """Bias-free convolution (B, C_in, H, W) -> (B, C_out, H/stride, W/stride).

    A kernel of 3 at stride 1 keeps the size, 4 at stride 2 halves it with
    overlapping (hence less aliased) windows, 2 at stride 2 halves it without.
    H and W must be multiples of the stride, so that the transposed convolution
    restores exactly the input's size.
    """

    def __init__(self, c_in: int, c_out: int, kernel: int, stride: int = 1, gain: float = 1.0):
        super().__init__()
        self.stride = stride
        self.padding = (kernel - stride + 1) // 2
        self.weight = nn.Parameter(torch.empty(c_out, c_in, kernel, kernel))
        init_normal(self.weight, gain / (c_in * kernel**2) ** 0.5)
        if stride > 1 and kernel == 4 and not self.weight.is_meta:
            # Start from smooth windows: a white 4x4 kernel aliases as much as a 2x2 one.
            taper = torch.tensor([1.0, 3.0, 3.0, 1.0]) / 5**0.5
            self.weight.data *= torch.outer(taper, taper)

    def forward(self, x: Tensor, gain: Tensor | None = None) -> tuple[Tensor, Adjoint]:
        """gain: factors of the input's channels, (C_in,). They multiply the weights, which are
        fewer than the pixels."""
        w = self.weight if gain is None else self.weight * gain.view(1, -1, 1, 1)
        w = w.to(x.dtype)  # (C_out, C_in, kernel, kernel)
        y = F.conv2d(x, w, stride=self.stride, padding=self.padding)  # (B, C_out, H/stride, ...)
        return y, lambda g: F.conv_transpose2d(g, w, stride=self.stride, padding=self.padding)


class Norm(nn.Module, ABC):
    """A normalisation with a gain per channel and no bias."""

    eps = 1e-4

    def __init__(self, channels: int):
        super().__init__()
        self.gain = nn.Parameter(torch.ones(channels))

    @abstractmethod
    def normalise(self, x: Tensor) -> tuple[Tensor, Adjoint]:
        """The norm without its gain, (B, C, H, W) like x, and the adjoint of that."""

    def forward(self, x: Tensor) -> tuple[Tensor, Adjoint]:
        gain = self.gain.to(x.dtype).view(1, -1, 1, 1)  # (1, C, 1, 1)
        n, adjoint = self.normalise(x)
        return n * gain, lambda g: adjoint(g * gain)


class PixelNorm(Norm):
    """RMS norm over the channels of each pixel: y = gain * x / sqrt(mean_c x^2 + eps).

    It depends on nothing outside the pixel, so a tile of a picture is treated as the
    whole picture would be.
    """

    def normalise(self, x: Tensor) -> tuple[Tensor, Adjoint]:
        # Sums, not means: autograd would spread a mean over all channels, out of channels-last.
        share = 1 / x.shape[1]
        wide = x.to(stat_dtype(x))  # (B, C, H, W)
        rstd = (wide.square().sum(1, keepdim=True) * share + self.eps).rsqrt()  # (B, 1, H, W)

        def adjoint(g: Tensor) -> Tensor:
            # What depends on the pixel alone is put together first: fewer passes over memory.
            wide, g = x.to(rstd.dtype), g.to(rstd.dtype)
            along = rstd * (rstd.square() * share * (g * wide).sum(1, keepdim=True))  # (B, 1, H, W)
            return (g * rstd).addcmul_(wide, along, value=-1).to(x.dtype)

        return (wide * rstd).to(x.dtype), adjoint


class GroupNorm(Norm):
    """Group norm: statistics over (C/groups, H, W) of each picture.

    For networks of one fixed input size: the output at a pixel depends on the whole picture.
    """

    def __init__(self, channels: int, groups: int):
        super().__init__(channels)
        self.groups = groups

    def normalise(self, x: Tensor) -> tuple[Tensor, Adjoint]:
        b, c, h, w = x.shape
        split = (b, self.groups, c // self.groups, h, w)  # (B, G, C/G, H, W)
        axes = (2, 3, 4)
        wide = x.to(stat_dtype(x)).view(split)
        centred = wide - wide.mean(axes, keepdim=True)
        rstd = (centred.square().mean(axes, keepdim=True) + self.eps).rsqrt()  # (B, G, 1, 1, 1)
        n = centred * rstd

        def adjoint(g: Tensor) -> Tensor:
            g = g.to(n.dtype).view(split)
            g = g - g.mean(axes, keepdim=True) - n * (g * n).mean(axes, keepdim=True)
            return (rstd * g).view(x.shape).to(x.dtype)

        return n.view(x.shape).to(x.dtype), adjoint


class NoNorm(nn.Module):
    """The identity, for networks without normalisation."""

    def forward(self, x: Tensor) -> tuple[Tensor, Adjoint]:
        return x, lambda g: g


class Activation(nn.Module):
    """Smooth pointwise non-linearity: the score must be continuous, which excludes ReLU."""

    def __init__(self, kind: str):
        super().__init__()
        self.kind = kind

    def forward(self, x: Tensor) -> tuple[Tensor, Adjoint]:
        if self.kind == "gelu":
            # The aten backward kernel is a single pass and differentiable itself.
            return F.gelu(x), lambda g: torch.ops.aten.gelu_backward(g, x)

        def silu_adjoint(g: Tensor) -> Tensor:  # aten's kernel has no derivative
            s = torch.sigmoid(x)
            return g * s * (1 + x * (1 - s))

        return F.silu(x), silu_adjoint


class Chain(nn.Module):
    """Layers in sequence; the adjoint runs their adjoints in reverse.

    A convolution behind a norm takes over its gain.
    """

    def __init__(self, *layers: nn.Module):
        super().__init__()
        self.layers = nn.ModuleList(layers)

    def forward(self, x: Tensor) -> tuple[Tensor, Adjoint]:
        adjoints: list[Adjoint] = []
        gain: Tensor | None = None
        for layer, behind in zip_longest(self.layers, self.layers[1:]):
            if isinstance(layer, Norm) and isinstance(behind, Conv):
                x, adjoint = layer.normalise(x)
                gain = layer.gain
            elif gain is not None:
                x, adjoint = layer(x, gain)
                gain = None
            else:
                x, adjoint = layer(x)
            adjoints.append(adjoint)

        def run(g: Tensor) -> Tensor:
            while adjoints:
                g = adjoints.pop()(g)
            return g

        return x, run


class Residual(nn.Module):
    """x + branch(x), where the branch has a layer that makes a new tensor, in both directions."""

    def __init__(self, branch: Chain):
        super().__init__()
        self.branch = branch

    def forward(self, x: Tensor) -> tuple[Tensor, Adjoint]:
        y, adjoint = self.branch(x)
        return y.add_(x), lambda g: adjoint(g).add_(g)


class QuadraticForm(nn.Module):
    """Signed sum of squares of a 1x1 projection: u(x) = 1/2 sum_k s_k (P x)_k^2.

    Half of the signs s_k are +1, half -1, so the form may be indefinite: minus
    a log-density is not convex. ``forward`` gives its gradient P^T (s * P x),
    ``energy`` its value per picture.
    """

    def __init__(self, channels: int, rank: int, gain: float):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(rank, channels, 1, 1))
        init_normal(self.weight, gain / channels**0.5)
        sign = torch.ones(1, rank, 1, 1)
        sign[:, 1::2] = -1
        self.sign: Tensor
        self.register_buffer("sign", sign, persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        p = self.weight.flatten(1)  # (rank, C)
        form = (p * self.sign.view(-1, 1)).T @ p  # (C, C): one convolution instead of two
        return F.conv2d(x, form[:, :, None, None].to(x.dtype))  # (B, C, H, W)

    def energy(self, x: Tensor) -> Tensor:
        """Value of the form, (B,), summed over pixels in at least float32."""
        x = x.to(stat_dtype(x))
        p = F.conv2d(x, self.weight.to(x.dtype))  # (B, rank, H, W)
        squares = p.square() * self.sign.to(x.dtype)
        return 0.5 * squares.sum((1, 2, 3))
