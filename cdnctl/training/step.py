"""The training step: the loss, its gradients, and what is made of them.

**A step never waits for the GPU.** The host asks for steps well ahead of the device, which is
only idle if the host stops to look at a number. So what depends on numbers in a normal step
(clipping, undoing a bad step) is arithmetic on the device, see `state.Guard`.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist
from torch import Tensor
from torch._dynamo.exc import TorchDynamoException

from cdnctl.errors import SetupError
from cdnctl.models import Network
from cdnctl.training.batches import Batch
from cdnctl.training.config import TrainConfig
from cdnctl.training.objectives import Objective, objective_of
from cdnctl.training.state import TrainState


def learning_rate(step: int, config: TrainConfig) -> float:
    """Linear warm-up, then cosine to zero, or constant and then linear to zero."""
    o = config.optim
    if step < o.warmup:
        return o.lr * (step + 1) / o.warmup
    if o.schedule == "linear":
        fall = max(1, round(o.decay * o.steps))
        return o.lr * min(1.0, max(0, o.steps - step) / fall)
    phase = (step - o.warmup) / max(1, o.steps - o.warmup)
    return o.lr * 0.5 * (1 + math.cos(math.pi * min(1.0, phase)))


@contextmanager
def numerics(precision: str, device: torch.device) -> Iterator[torch.dtype | None]:
    """The dtype of the trunk for a ``run.precision`` (None: the input's). Within the context, torch
    is also set up accordingly: tf32, and the search for fast convolutions."""
    if precision == "auto":
        # GPUs before Ampere only emulate bfloat16.
        fast = device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
        precision = "bfloat16" if fast else "float32"
    dtype = torch.bfloat16 if precision == "bfloat16" else None
    if device.type != "cuda":
        yield dtype
        return
    cudnn, rounded = torch.backends.cudnn, precision == "tf32"
    before = cudnn.benchmark, cudnn.allow_tf32, torch.get_float32_matmul_precision()
    try:
        cudnn.benchmark, cudnn.allow_tf32 = True, rounded
        torch.set_float32_matmul_precision("high" if rounded else "highest")
        yield dtype
    finally:
        cudnn.benchmark, cudnn.allow_tf32, matmul = before
        torch.set_float32_matmul_precision(matmul)


def make_objective(config: TrainConfig) -> Objective:
    """What the config's architecture is trained to do, compiled if the config says so."""
    objective = objective_of(config)
    return torch.compile(objective, dynamic=False) if config.run.compile else objective


def loss_and_gradients(
    objective: Objective, model: Network, batch: Batch, config: TrainConfig
) -> tuple[Tensor, list[Tensor]]:
    """(loss, score matching, cross-entropy), (3,), means over the batch of all processes, and
    the gradient for each parameter, laid out in memory like it.

    SetupError if the objective is to be compiled and cannot be.
    """
    parameters = list(model.parameters())
    rows = config.data.batch
    learners = 0 if batch.alone else rows
    learners += config.data.class_batch if batch.lesson is not None else 0
    try:
        matching, entropy = objective(model, batch, config.loss)
        parts = torch.stack([matching.sum() / rows, entropy.sum() / learners])
        loss = config.loss.score * parts[0] + config.loss.classes * parts[1]
        gradients = torch.autograd.grad(loss, parameters, allow_unused=True)
    except TorchDynamoException as error:
        reason = " ".join(str(error).strip().splitlines()[:2])
        raise SetupError(
            f"torch.compile does not work here ({reason}): "
            "install a C++ compiler (g++) and, for a GPU, triton; or set compile = false under "
            "[run] in the config"
        ) from None
    parts = torch.cat([loss[None], parts]).detach()
    return parts, [_like(p, g) for p, g in zip(parameters, gradients, strict=True)]


def _like(parameter: Tensor, gradient: Tensor | None) -> Tensor:
    """The gradient with the strides of its parameter (zero where there is none).

    Convolutions give gradients in channels-last order. Fused AdamW goes through memory without
    a look at strides: they must be those of the weights.
    """
    if gradient is None:
        return torch.zeros_like(parameter)
    if gradient.stride() == parameter.stride():
        return gradient
    return torch.empty_like(parameter).copy_(gradient)


def train_step(
    state: TrainState, objective: Objective, batch: Batch, config: TrainConfig, world: int = 1
) -> Tensor:
    """One step of training: loss parts as `loss_and_gradients`, of this process's rows."""
    parts, gradients = loss_and_gradients(objective, state.model, batch, config)
    if world > 1:
        for g in gradients:
            dist.all_reduce(g)
        for statistic in state.model.buffers():  # each process has seen its own rows
            dist.all_reduce(statistic)
            statistic /= world
    norm = torch.stack(torch._foreach_norm(gradients)).norm()
    factor, undo = state.guard.judge(norm, config.optim)
    with torch.no_grad():
        state.update(gradients, factor, undo, learning_rate(state.step, config))
        state.model.after_step()
        state.step += 1
        state.average(config.optim.ema)
    return parts
