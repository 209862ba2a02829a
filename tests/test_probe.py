"""The probe: which way to run the step is fastest here."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from runs import CPU, tiny_config
from torch import Tensor
from torch._dynamo.exc import BackendCompilerFailed

from cdnctl.errors import SetupError
from cdnctl.training import objectives, step
from cdnctl.training.batches import Batch
from cdnctl.training.config import LossConfig
from cdnctl.training.probe import Trial, best_trial, probe


def probed(datasets: list[Path], **options: Any) -> dict[tuple[str, bool, bool], Trial]:
    config = tiny_config(**options.pop("sections", {}))
    trials = probe(config, datasets, device=CPU, each=0.0, **options)
    return {(t.precision, t.channels_last, t.compile): t for t in trials}


@pytest.mark.slow
def test_probe(datasets: list[Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "compile", lambda function, **options: function)
    shown: list[Trial] = []
    trials = probed(datasets, watch=shown.append)
    ways = {(p, c, j) for p in ("float32", "bfloat16") for c in (0, 1) for j in (0, 1)}
    assert set(trials) == ways and shown == list(trials.values())
    assert [t.compile for t in shown] == [False] * 4 + [True] * 4, "the slow ones last"
    reference = trials["float32", False, False]
    assert reference.loss_error == reference.gradient_error == 0
    for (precision, _, _), trial in trials.items():
        assert trial.sound and trial.rate > 0 and trial.error is None
        assert trial.first >= 0 and math.isnan(trial.memory)
        assert (trial.gradient_error > 1e-4) is (precision == "bfloat16")
    assert best_trial(shown).rate == max(t.rate for t in shown)
    assert len(probed(datasets, max_seconds=0.0)) == 4, "no time to compile"
    muon = probed(datasets, sections={"optim": {"kind": "muon"}}, max_seconds=0.0)
    assert len(muon) == 4 and all(t.sound for t in muon.values())


@pytest.mark.slow
def test_probe_trusts_no_way_that_computes_something_else(
    datasets: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    original, like = objectives.joint, step._like

    def off(model: Any, batch: Batch, config: LossConfig) -> tuple[Tensor, Tensor]:
        matching, entropy = original(model, batch, config)
        return (matching * 1.02 if model.compute_dtype else matching), entropy

    monkeypatch.setitem(objectives.OBJECTIVES, "joint", off)  # type: ignore[arg-type]
    trials = probed(datasets, max_seconds=0.0)
    assert {k[0] for k, t in trials.items() if t.sound} == {"float32"}
    fastest = replace(trials["bfloat16", False, False], rate=1e9)
    assert best_trial([*trials.values(), fastest]).precision == "float32"
    monkeypatch.undo()

    def scrambled(parameter: Tensor, gradient: Tensor | None) -> Tensor:
        good = like(parameter, gradient)
        return good if parameter.is_contiguous() else good.flatten().roll(1).view(good.shape)

    monkeypatch.setattr(step, "_like", scrambled)
    trials = probed(datasets, max_seconds=0.0)
    assert {k[1] for k, t in trials.items() if t.sound} == {False}


@pytest.mark.slow
def test_probe_goes_on_where_a_way_does_not_work(
    datasets: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*args: object) -> None:
        raise BackendCompilerFailed(fail, RuntimeError("no C++ compiler"), None)

    monkeypatch.setattr(torch, "compile", lambda function, **options: fail)
    trials = probed(datasets)
    assert len(trials) == 8
    for (_, _, compiled), trial in trials.items():
        assert trial.sound is not compiled and bool(trial.error) is compiled
        assert not compiled or "no C++ compiler" in str(trial.error)
    assert not best_trial(list(trials.values())).compile
    with pytest.raises(SetupError, match="no C"):
        best_trial([t for t in trials.values() if t.compile])
