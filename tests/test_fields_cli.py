"""cdnctl field: from files to files."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import tifffile
from processes import Run

from cdnctl.fields.model import most_levels

FIELD = "field"

pytestmark = pytest.mark.slow  # they fit and sample


@pytest.fixture
def fields(cdnctl: Run, tmp_path: Path) -> Path:
    run = cdnctl(FIELD, "simulate", "phi4", "-o", "x.npy", "--count", 1500, "--side", 8)
    assert run.code == 0
    return tmp_path / "x.npy"


def test_simulate_fit_sample_check(cdnctl: Run, fields: Path, tmp_path: Path) -> None:
    assert np.load(fields).shape == (1500, 8, 8)
    run = cdnctl(FIELD, "fit", fields, "-o", "m.safetensors", "--json")
    rows = [json.loads(line) for line in run.out.splitlines()]
    assert run.code == 0 and [row["side"] for row in rows] == [1, 2, 4, 8]
    run = cdnctl(
        FIELD, "sample", "m.safetensors", "-o", "y.tif", "--count", 100, "--moves", 30, "--json"
    )
    assert run.code == 0 and len(run.out.splitlines()) == 4
    y = tifffile.imread(tmp_path / "y.tif")
    assert y.shape == (100, 8, 8) and y.dtype == np.float32
    run = cdnctl(
        FIELD, "check", fields, "y.tif", "--plot", "p.png", "--model", "m.safetensors", "--json"
    )
    assert run.code == 0
    found = json.loads(run.out)
    assert abs(found["std_ratio"] - 1) < 0.2 and len(found["spectrum_ratio"]) == 5
    assert found["histogram_distance"] < found["histogram_distance_gaussian"]
    assert [row["side"] for row in found["smallest_eigenvalues"]] == [8, 4, 2, 1]
    assert (tmp_path / "p.png").read_bytes()[:4] == b"\x89PNG"
    run = cdnctl(FIELD, "check", fields, fields)
    assert run.code == 0 and b"(1.000)" in run.out


def test_refining_keeps_what_is_known(cdnctl: Run, fields: Path, tmp_path: Path) -> None:
    assert cdnctl(FIELD, "fit", fields, "-o", "m.safetensors", "--levels", 1).code == 0
    low = np.load(fields)[:3].reshape(3, 4, 2, 4, 2).sum((2, 4)) / 2  # haar
    np.save(tmp_path / "low.npy", low)
    run = cdnctl(
        *(FIELD, "sample", "m.safetensors", "--coarse", "low.npy", "-o", "fine.npy"),
        *("--errors", "std.npy", "--count", 20, "--moves", 30),
    )
    assert run.code == 0
    fine, std = np.load(tmp_path / "fine.npy"), np.load(tmp_path / "std.npy")
    np.testing.assert_allclose(fine.reshape(3, 4, 2, 4, 2).sum((2, 4)) / 2, low, atol=1e-9)
    assert std.shape == fine.shape == (3, 8, 8) and (std > 0.05).all()


def test_denoising_by_a_gaussian_model(cdnctl: Run, tmp_path: Path) -> None:
    simulate = (FIELD, "simulate", "gaussian", "--count", 500, "--side", 8, "--std", 1)
    assert cdnctl(*simulate, "-o", "x.npy").code == 0
    x = np.load(tmp_path / "x.npy")
    noisy = x + np.random.default_rng(1).normal(size=x.shape)
    np.save(tmp_path / "y.npy", noisy)
    fit = (FIELD, "fit", "x.npy", "--gaussian", "--reach", 4, "-o", "m.safetensors")
    assert cdnctl(*fit).code == 0
    denoise = (FIELD, "denoise", "m.safetensors", "y.npy", "--sigma", 1)
    run = cdnctl(*denoise, "-o", "z.npy")
    assert run.code == 0
    error = np.std(np.load(tmp_path / "z.npy") - x)
    assert error == pytest.approx(float(run.out.split()[-1]), rel=0.03) and error < 0.6
    assert cdnctl(*denoise, "-o", "z.npy").code == 2  # it is there


def test_levels_reach_down_to_a_pixel() -> None:
    assert [most_levels(s, False) for s in (1, 6, 32)] == [0, 1, 5]
    assert [most_levels(s, True) for s in (2, 12, 32)] == [0, 1, 4]


@pytest.mark.parametrize(
    ("args", "code", "words"),
    [
        (("simulate", "ising", "-o", "a.npy"), 2, "'ising'"),
        (("simulate", "phi4", "-o", "a.png"), 2, "'a.png' must end in .npy"),
        (("simulate", "phi4", "-o", "a.npy", "--side", "7"), 2, "the side is 7"),
        (("simulate", "gaussian", "-o", "x.npy"), 2, "exists"),
        (("fit", "none.npy", "-o", "m.safetensors"), 1, "none.npy"),
        (("fit", "bad.npy", "-o", "m.safetensors"), 1, "cannot read fields"),
        (("fit", "text.npy", "-o", "m.safetensors"), 1, "real numbers"),
        (("fit", "nan.npy", "-o", "m.safetensors"), 2, "field 1 (from 0)"),
        (("fit", "wide.tif", "-o", "m.safetensors"), 2, "(2, 4, 6)"),
        (("fit", "x.npy", "-o", "m.npy"), 2, "must end in .safetensors"),
        (("fit", "x.npy", "-o", "m.safetensors", "--wavelet", "bior1.3"), 2, "bior1.3"),
        (("fit", "x.npy", "-o", "m.safetensors", "--levels", "3"), 2, "halved 3 times"),
        (("sample", "none.safetensors", "-o", "a.npy"), 3, "no field model"),
        (("sample", "none.safetensors", "-o", "a.npy", "--errors", "b.npy"), 2, "--coarse"),
        (("check", "x.npy", "wide.tif"), 2, "(2, 4, 6)"),
    ],
)
def test_bad_input_gets_its_line(
    cdnctl: Run, tmp_path: Path, args: tuple[str, ...], code: int, words: str
) -> None:
    x = np.random.default_rng(2).normal(size=(60, 4, 4))
    np.save(tmp_path / "x.npy", x)
    x[1, 2, 3] = np.nan
    np.save(tmp_path / "nan.npy", x)
    np.save(tmp_path / "text.npy", np.array(["a"]))
    (tmp_path / "bad.npy").write_bytes(b"not an array")
    tifffile.imwrite(tmp_path / "wide.tif", np.zeros((2, 4, 6), np.float32))
    before = sorted(tmp_path.iterdir())
    run = cdnctl(FIELD, *args)
    assert run.code == code and words in run.err
    assert run.err.count("\n") == 1 and sorted(tmp_path.iterdir()) == before
