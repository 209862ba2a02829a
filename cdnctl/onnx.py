"""A denoiser as an ONNX graph, for programs without torch.

Needs the extra ``onnx``. What the network does is a plain feed-forward computation, its adjoint
and the mirroring of sides included, so the graph takes pictures of any size and any noise level.
"""

from __future__ import annotations

import json
import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor, nn

from cdnctl.api import Model
from cdnctl.core.joint import Corrector, HasPosterior, per_sample, variance
from cdnctl.errors import SetupError
from cdnctl.files import write_atomically
from cdnctl.models import Network

SUFFIX = ".onnx"
# Of the picture that the graph is traced with: no side is a multiple of a cell, or like another.
TRACED = (2, 51, 37)
LARGEST = 2**16  # side, and number of pictures


class Denoiser(nn.Module):
    """``Model.denoise`` of pictures in all channels, in operations that depend on no size."""

    def __init__(self, module: Network):
        super().__init__()
        self.module: nn.Module = module
        self.multiple = module.needs.multiple

    def forward(self, y: Tensor, sigma: Tensor) -> tuple[Tensor, ...]:
        """E[x | y], like y, and p(c | y), (B, K), if the network classifies.

        y: (B, C, H, W) in [0, 1] plus noise. sigma: (B,), in the same unit.
        """
        height, width = y.shape[2:]
        assert isinstance(self.module, Corrector)
        whole = y
        for axis in (2, 3):
            whole = _mirrored(whole, axis, self.multiple)
        correction, logits = self.module.correction(whole, sigma)
        # As by the score, which is finite: a noise level of 0 changes nothing.
        share = per_sample(sigma, y).square() / variance(sigma, y)
        x = y + share * correction[:, :, :height, :width]
        return (x, logits.softmax(1)) if isinstance(self.module, HasPosterior) else (x,)


def _mirrored(y: Tensor, axis: int, multiple: int) -> Tensor:
    """`core.mirror.mirrored` along one axis, of a size that is not known yet."""
    size = y.shape[axis]
    index = torch.arange((size + multiple - 1) // multiple * multiple)
    period = torch.ones_like(index) * (2 * size)  # a tensor: ONNX has no remainder by a size
    index = index % period
    return y.index_select(axis, torch.minimum(index, period - 1 - index))


def export(model: Model, target: Path) -> None:
    """Write a model's denoiser as an ONNX file, with what is known of it in its metadata.

    Inputs ``y`` (batch, C, height, width) and ``sigma`` (batch,), outputs ``x`` like y and, of a
    model that classifies, ``posterior`` (batch, K); all float32. Takes about a minute.

    UsageError if the model does not denoise, SetupError if packages are missing.
    """
    model.corrector("be exported as a denoiser")
    try:
        import onnx  # noqa: F401
        import onnxscript  # noqa: F401
    except ImportError:
        raise SetupError('ONNX needs extra packages; run: pip install "cdnctl[onnx]"') from None
    count, height, width = TRACED
    y = torch.rand(count, model.needs.channels, height, width)
    sides = {"batch": 0, "height": 2, "width": 3}
    named = {at: torch.export.Dim(name, min=1, max=LARGEST) for name, at in sides.items()}
    network = Denoiser(model.module).float().cpu().eval()
    outputs = ["x", "posterior"] if isinstance(model.module, HasPosterior) else ["x"]
    with _quietly(), torch.no_grad():
        program = torch.onnx.export(
            network,
            (y, torch.full((count,), 0.1)),
            dynamo=True,
            dynamic_shapes={"y": named, "sigma": {0: named[0]}},
            input_names=["y", "sigma"],
            output_names=outputs,
            verbose=False,
        )
    assert program is not None
    low, high = model.sigma_range
    program.model.metadata_props.update(
        {
            "name": model.name,
            "weights": model.hash,
            "classes": json.dumps(model.classes),
            "sigma_range": json.dumps([low, high]),
            "pixels": "float32 from 0 to 1, and sigma in the same unit",
        }
    )
    write_atomically(target, program.model_proto.SerializeToString())


@contextmanager
def _quietly() -> Iterator[None]:
    """Without what torch says of packages that are not needed, and of its own code."""
    loggers = [logging.getLogger(name) for name in ("torch.onnx", "torch.export", "onnxscript")]
    before = [logger.level for logger in loggers]
    try:
        for logger in loggers:
            logger.setLevel(logging.ERROR)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, before, strict=True):
            logger.setLevel(level)
