"""What a run folder shows to people."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import PIL.Image
import pytest
import torch
from runs import rows_of

from cdnctl.checkpoints import MODEL, read_header
from cdnctl.errors import UsageError
from cdnctl.training.report import CELL, GAP, describe, read_results, sheet
from cdnctl.training.runs import CONFIG, RESULTS
from cdnctl.training.validation import Samples


@pytest.mark.parametrize("side,factor", [(16, 6), (96, 1), (100, 1)])
def test_a_sheet_of_samples(side: int, factor: int, tmp_path: Path) -> None:
    """Every picture has its place on it, clipped, and larger by a whole factor."""
    generator = torch.Generator().manual_seed(0)
    clean = torch.rand(2, 3, side, side, generator=generator)
    many = torch.randn(2, 3, 2, 3, side, side, generator=generator)  # far beyond [0, 1]
    (tmp_path / "sheet.png").write_bytes(sheet(Samples(clean, *many, (15.0, 25.0, 50.0))))
    pixels = np.array(PIL.Image.open(tmp_path / "sheet.png"))
    step, noisy, denoised = side * factor + GAP, *many
    assert side * factor >= CELL and pixels.shape[1] == 7 * step - GAP
    order = [clean, noisy[0], denoised[0], noisy[1], denoised[1], noisy[2], denoised[2]]
    top = pixels.shape[0] - 2 * step + GAP
    for x, column in enumerate(order):
        for y, wanted in enumerate(column):
            at = pixels[top + y * step :, x * step :][: side * factor, : side * factor]
            small = at[::factor, ::factor]
            assert np.array_equal(small.repeat(factor, 0).repeat(factor, 1), at)
            levels = wanted.clamp(0, 1).mul(255).round().permute(1, 2, 0).numpy()
            assert np.array_equal(small, levels)


def test_an_account_of_a_run(whole: Path, tmp_path: Path) -> None:
    rows = rows_of(whole)
    results = read_results(whole)
    for name in rows[0]:
        want = [(int(r["step"]), float(r[name])) for r in rows if r[name]]
        assert list(zip(*results[name], strict=True)) == want
    about = dict(describe(whole))
    best = min((r for r in rows if r["val_loss"]), key=lambda r: float(r["val_loss"]))
    assert f"step {best['step']}" in about["best"]
    assert f"{float(best['val_psnr_25']):.2f} dB" in about["best"]
    assert f"{float(best['val_accuracy_25']):.1%}" in about["best"]
    assert "10 of 10" in about["step"] and "finished" in about["step"]
    assert f"{float(rows[-1]['loss']):.5f}" in about["loss"]
    assert "60 pictures" in about["data"] and "brick, grass" in about["data"]
    assert "steps = 10" in about["config"] and "lr =" not in about["config"]
    steps = [read_header(whole / n / MODEL).training["steps"] for n in ("best", "last")]
    for step, line in zip(steps, about["weights"].splitlines(), strict=True):
        assert line.endswith(f"step {step}")
    assert {line.partition(":")[0] for line in about["files"].splitlines()} == {
        p.name for p in whole.iterdir()
    }
    # Of one that has only begun; and half a row is none.
    (tmp_path / CONFIG).write_bytes((whole / CONFIG).read_bytes())
    early = dict(describe(tmp_path))
    assert early["step"].startswith("0 of 10") and early["weights"] == "none yet"
    text = (whole / RESULTS).read_text()
    (tmp_path / RESULTS).write_text(text[: text.index("\n") + 3])
    assert "0 of 10" in dict(describe(tmp_path))["step"]
    for text in ("", "{", "[]", "{}", '{"config": {"data": {"patsh": 1}}}'):
        (tmp_path / CONFIG).write_text(text)
        with pytest.raises(UsageError, match=str(tmp_path)):
            describe(tmp_path)
