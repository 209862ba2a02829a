"""Validation: scores and samples of the averaged weights."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from runs import CPU, run, tiny_config, tiny_net
from sets import picture

from cdnctl.checkpoints import Header, build_module
from cdnctl.training import validation
from cdnctl.training.config import DataConfig
from cdnctl.training.datasets import load_datasets
from cdnctl.training.runs import Progress
from cdnctl.training.state import TrainState
from cdnctl.training.validation import take_samples, validate


def test_validation_is_of_the_average_and_leaves_no_trace(datasets: list[Path]) -> None:
    net = tiny_net()
    config = tiny_config()
    held = load_datasets(datasets, config.data, CPU)[0]
    state = TrainState(net, config)
    first = validate(state, held, config)
    assert first == validate(state, held, config), "the same noise each time"
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.mul_(1.5)
    weights = {k: v.clone() for k, v in net.state_dict().items()}
    assert validate(state, held, config) == first
    assert all(torch.equal(v, weights[k]) for k, v in net.state_dict().items())
    for value in state.ema.values():
        value.mul_(1.5)
    assert validate(state, held, config) != first


def test_samples_are_of_the_average_and_leave_no_trace(datasets: list[Path]) -> None:
    net, config = tiny_net(), tiny_config(run={"validate_sigmas": [0, 25, 50]})
    held = load_datasets(datasets, config.data, CPU)[0]
    state = TrainState(net, config)
    average = build_module(Header("x", "gradresnet", vars(net.config), ("a", "b"), (0, 1), 16))
    average.load_state_dict(net.state_dict())
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.mul_(1.5)
    weights = {k: v.clone() for k, v in net.state_dict().items()}
    before = torch.get_rng_state()
    samples = take_samples(state, held, config)
    assert samples is not None and samples.sigmas == (0, 25, 50)
    assert torch.equal(torch.get_rng_state(), before)
    assert all(torch.equal(v, weights[k]) for k, v in net.state_dict().items())
    assert samples.clean.shape == (4, 3, 16, 16)
    assert samples.noisy.shape == samples.denoised.shape == (3, 4, 3, 16, 16)
    for sigma, noisy, denoised in zip((0, 25, 50), samples.noisy, samples.denoised, strict=True):
        assert (noisy - samples.clean).std() == pytest.approx(sigma / 255, rel=0.1)
        with torch.no_grad():
            want = noisy + average.correction(noisy, sigma / 255)[0]
            torch.testing.assert_close(denoised, want)
    again = take_samples(state, held, config)
    assert again is not None and torch.equal(again.noisy, samples.noisy), "the same each time"
    for one in (held.subset(torch.arange(0)), held.subset(torch.tensor([3]))):
        few = take_samples(state, one, config)
        assert (few is None) if not len(one) else (few is not None and len(few.clean) == 1)
    assert take_samples(state, held, tiny_config(run={"validate_sigmas": []})) is None


def test_samples_are_of_pictures_that_are_no_thumbnails(tmp_path: Path) -> None:
    """Evenly spaced, at the side of the crops that validation denoises."""
    for i, side in enumerate((8, 40, 8, 40, 8)):
        picture(tmp_path / f"{i}.png", (side, side), level=10 * i)
    data = {"thumbnail": 20, "class_batch": 2, "class_patch": 8, "patch": 16}
    config = tiny_config(data=data, run={"validate_sigmas": [25]})
    held = load_datasets([tmp_path], DataConfig(holdout=0), CPU)[0]
    samples = take_samples(TrainState(tiny_net(), config), held, config)
    assert samples is not None
    assert samples.clean.shape == (2, 3, validation.VALIDATION_PATCH, validation.VALIDATION_PATCH)
    for clean, level in zip(samples.clean, (10, 30), strict=True):
        assert torch.equal(clean, torch.full_like(clean, level).div(255))
    small = held.subset(torch.tensor([0, 2]))
    assert take_samples(TrainState(tiny_net(), config), small, config) is None


def test_samples_come_with_a_validation(datasets: list[Path], tmp_path: Path) -> None:
    for arch in ("gradresnet", "classifier"):
        progress: list[Progress] = []
        run(tmp_path / arch, datasets, sections={"model": {"arch": arch}}, watch=progress.append)
        shown = [p.step for p in progress if p.samples is not None]
        assert shown == ([4, 8, 10] if arch == "gradresnet" else [])
