"""The training step: losses, learning rates, optimizers, and no look at a number."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from runs import CPU, after, break_losses, run, same_to_the_bit, state_of, tiny_config, tiny_net
from torch import Tensor
from torch._dynamo.exc import BackendCompilerFailed
from torch._inductor.exc import TritonMissing

from cdnctl.checkpoints import MODEL, build_module, load_model
from cdnctl.core.joint import denoise
from cdnctl.core.losses import score_matching
from cdnctl.errors import SetupError
from cdnctl.training import state as states
from cdnctl.training.batches import Batch, Batches
from cdnctl.training.config import LossConfig, OptimConfig, TrainConfig, parse
from cdnctl.training.datasets import load_datasets
from cdnctl.training.loop import train
from cdnctl.training.objectives import joint, objective_of
from cdnctl.training.step import learning_rate, numerics


def test_losses_of_a_batch() -> None:
    """Unlabelled: the unconditional score. Labelled: some given the class; and the class."""
    net = tiny_net()
    clean, noise = torch.rand(4, 3, 8, 8), torch.randn(4, 3, 8, 8)
    sigma = torch.tensor([0.1, 0.2, 0.3, 0.0])
    told = torch.tensor([0.1, 0.1, 0.3, 0.0])
    labels, condition = torch.tensor([1, 0, -1, 1]), torch.tensor([True, False, False, True])
    config = LossConfig(score_power=0.5)
    got = joint(net, Batch(clean, noise, sigma, told, labels, condition), config)
    noisy = clean + sigma.view(-1, 1, 1, 1) * noise
    logits = net.logits(noisy, told)
    for i in range(3):
        w = torch.eye(2)[labels[i]] if condition[i] else None
        d = denoise(net, noisy[i : i + 1], told[i : i + 1], w)
        want = score_matching(d, clean[i : i + 1], sigma[i : i + 1], 0.5)
        torch.testing.assert_close(got[0][i : i + 1], want, rtol=1e-4, atol=1e-5)
        entropy = -logits[i].log_softmax(0)[labels[i]] if labels[i] >= 0 else torch.zeros(())
        torch.testing.assert_close(got[1][i], entropy, rtol=1e-4, atol=1e-5)
    assert got[0].isfinite().all(), "no noise at all must not divide by zero"


def test_learning_rate() -> None:
    config = TrainConfig(optim=OptimConfig(steps=100, lr=0.5, warmup=10))
    rates = [learning_rate(t, config) for t in range(101)]
    assert rates[:10] == pytest.approx([0.05 * k for k in range(1, 11)])
    assert max(rates) == rates[10] == 0.5
    assert all(a > b > 0 or b == pytest.approx(0) for a, b in pairwise(rates[10:]))
    assert rates[55] == pytest.approx(0.25) and rates[100] == pytest.approx(0)
    assert learning_rate(0, TrainConfig(optim=OptimConfig(warmup=0, lr=0.5))) == 0.5


def test_a_linear_schedule_is_constant_and_then_falls_to_nothing() -> None:
    config = parse(
        {"optim": {"steps": 100, "warmup": 10, "schedule": "linear", "decay": 0.25, "lr": 0.5}}
    )
    rates = [learning_rate(step, config) for step in range(101)]
    assert rates[9:76] == [0.5] * 67 and rates[100] == 0
    falls = -np.diff(rates[75:])
    np.testing.assert_allclose(falls, 0.5 / 25)


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("arch", ["gradresnet", "unet", "classifier"])
def test_the_first_step_is_one_of_adamw(
    arch: str, channels_last: bool, datasets: list[Path], tmp_path: Path
) -> None:
    """Against plain AdamW: the fused kernel is easily fed gradients in another memory order."""
    sections = {
        "model": {"arch": arch},
        "optim": {"steps": 1, "warmup": 0, "lr": 0.1},
        "run": {"channels_last": channels_last},
    }
    config = tiny_config(**sections)
    run(tmp_path / "run", datasets, sections=sections)
    pictures, _ = load_datasets(datasets, config.data, CPU)
    header = load_model(tmp_path / "run" / "last" / MODEL)[1]
    torch.manual_seed(config.run.seed)
    net = build_module(header)
    batch = Batches(pictures, config.data, config.noise, config.loss, config.run.seed)(0)
    matching, entropy = objective_of(config)(net, batch, config.loss)
    (matching + config.loss.classes * entropy).mean().backward()
    norms = [p for p in net.parameters() if p.ndim == 1]
    weights = [p for p in net.parameters() if p.ndim > 1]
    groups = [{"params": weights}, {"params": norms, "weight_decay": 0.0}]
    torch.optim.AdamW(groups, 0.1, config.optim.betas, weight_decay=0.01, fused=False).step()
    got = state_of(tmp_path / "run")
    for name, parameter in net.named_parameters():
        if parameter.grad is not None:
            clear = parameter.grad.abs() > 1e-6  # Adam's first step is the sign of the gradient
            off = (got[f"model.{name}"] - parameter.detach()).abs()
            assert clear.any() and off[clear].max() < 1e-4, name


def test_the_first_step_of_muon(datasets: list[Path], tmp_path: Path) -> None:
    """Convolutions move by an almost orthogonal matrix of AdamW's size; all else as with AdamW."""
    sections = {"optim": {"steps": 1, "warmup": 0, "lr": 0.1, "weight_decay": 0.0}}
    run(tmp_path / "adamw", datasets, sections=sections)
    sections["optim"]["kind"] = "muon"
    run(tmp_path / "muon", datasets, sections=sections)
    header = load_model(tmp_path / "muon" / "last" / MODEL)[1]
    torch.manual_seed(tiny_config().run.seed)
    before = dict(build_module(header).named_parameters())
    adamw, muon = state_of(tmp_path / "adamw"), state_of(tmp_path / "muon")
    for name, start in before.items():
        if start.ndim != 4:
            assert torch.equal(muon[f"model.{name}"], adamw[f"model.{name}"]), name
            continue
        step = (start.detach() - muon[f"model.{name}"]).flatten(1)
        size = 0.1 * 0.2 * max(step.shape) ** 0.5
        values = torch.linalg.svdvals(step) / size
        # The iteration brings singular values near 1 but for the smallest, which stay below.
        assert 0.5 < values.max() < 1.35 and values.mean() > 0.3, name


# -- nothing waits for the device -----------------------------------------------------------


LOOKS = ("item", "tolist", "cpu", "numpy", "__bool__", "__int__", "__float__", "__index__")


@pytest.mark.parametrize("kind", ["adamw", "muon"])
def test_a_step_looks_at_no_number(
    kind: str, datasets: list[Path], tmp_path: Path, strict: None
) -> None:
    """Between reports. What torch's own code looks at is seen by the test below, on a GPU."""
    seen: list[str] = []
    patch = pytest.MonkeyPatch()

    def watched(name: str) -> Callable[..., Any]:
        original = getattr(Tensor, name)
        return lambda self, *args: (seen.append(name), original(self, *args))[1]

    calls = iter(range(1, 10**9))

    def should_stop() -> bool:
        step = next(calls)
        if step == 2:
            for name in LOOKS:
                patch.setattr(Tensor, name, watched(name))
            assert torch.ones(()).item() and torch.ones(()) and seen == ["item", "__bool__"]
            seen.clear()
        if step == 12:
            patch.undo()
        return step == 13

    sections = {
        "run": {"log_every": 100, "validate_every": 100, "checkpoint_every": 100},
        "optim": {"kind": kind, "steps": 50},
    }
    try:
        assert (
            run(tmp_path / "run", datasets, sections=sections, should_stop=should_stop).step == 13
        )
    finally:
        patch.undo()
    assert not seen


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("precision", ["float32", "tf32", "bfloat16"])
def test_a_step_never_waits_for_the_gpu(
    precision: str, datasets: list[Path], tmp_path: Path
) -> None:
    calls = iter(range(1, 10**9))

    def should_stop() -> bool:
        step = next(calls)
        torch.cuda.set_sync_debug_mode("error" if 2 <= step < 12 else "default")
        return step == 13

    sections = {
        "run": {"log_every": 100, "validate_every": 100, "precision": precision},
        "optim": {"steps": 50},
        "data": {"batch": 8},
    }
    config = tiny_config(**sections)
    config = replace(config, run=replace(config.run, checkpoint_every=100, channels_last=True))
    device = torch.device("cuda")
    folder = tmp_path / "run"
    try:
        train(folder, config=config, datasets=datasets, device=device, should_stop=should_stop)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    # It goes on from here on the CPU, and from there on the GPU again.
    assert train(folder, device=CPU, should_stop=after(2)).step == 15
    assert train(folder, device=device).finished


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["adamw", "muon"])
@pytest.mark.parametrize("bad", [(), (6,), (6, 7, 8)])
def test_looking_or_not_makes_no_difference(
    kind: str,
    bad: tuple[int, ...],
    datasets: list[Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    sections = {"run": {"validate_every": 100}, "optim": {"kind": kind, "steps": 9}}
    for name in ("free", "strict"):
        with monkeypatch.context() as patch:
            break_losses(patch, set(bad), 1e6)
            patch.setattr(states, "_looks_are_free", lambda device, name=name: name == "free")
            run(tmp_path / name, datasets, sections=sections)
    same_to_the_bit(tmp_path / "free", tmp_path / "strict")


# -- numbers and compilers ------------------------------------------------------------------


@pytest.mark.parametrize("ampere", [True, False])
def test_numerics_are_put_back(ampere: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    cudnn = torch.backends.cudnn
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: ampere)

    def flags() -> tuple[bool, bool, str]:
        return cudnn.benchmark, cudnn.allow_tf32, torch.get_float32_matmul_precision()

    before = flags()
    wanted = {
        "float32": (None, (True, False, "highest")),
        "tf32": (None, (True, True, "high")),
        "bfloat16": (torch.bfloat16, (True, False, "highest")),
        "auto": (torch.bfloat16 if ampere else None, (True, False, "highest")),
    }
    for precision, (dtype, inside) in wanted.items():
        with numerics(precision, torch.device("cuda")) as got:
            assert got is dtype and flags() == inside
        assert flags() == before
        with numerics(precision, CPU) as got:
            assert got is (None if precision == "auto" else dtype) and flags() == before


@pytest.mark.parametrize("kind", ["adamw", "muon"])
def test_memory_order_is_a_matter_of_rounding(
    kind: str, datasets: list[Path], tmp_path: Path
) -> None:
    quiet = {"optim": {"kind": kind, "steps": 4, "warmup": 0, "lr": 1e-3}}
    for name in ("plain", "turned"):
        sections = quiet | {"run": {"channels_last": name == "turned", "validate_every": 100}}
        run(tmp_path / name, datasets, sections=sections)
    plain, turned = state_of(tmp_path / "plain"), state_of(tmp_path / "turned")
    for key, value in plain.items():
        scale = float(value.abs().max())
        torch.testing.assert_close(turned[key], value, rtol=0.02, atol=0.02 * scale + 1e-6)


@pytest.mark.parametrize(
    "error",
    [BackendCompilerFailed(print, RuntimeError("no C++ compiler"), None), TritonMissing(None)],
    ids=["C++", "triton"],
)
def test_without_a_compiler_the_error_says_what_to_do(
    error: Exception, datasets: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*args: object) -> None:
        raise error

    monkeypatch.setattr(torch, "compile", lambda function, **options: fail)
    with pytest.raises(SetupError, match="compile = false"):
        run(tmp_path / "run", datasets, sections={"run": {"compile": True}})
