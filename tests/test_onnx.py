"""ONNX graphs give what torch gives, at any size and noise level."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from processes import Run
from tiny import noisy_picture, save_tiny, tiny

from cdnctl.api import Model, load
from cdnctl.onnx import Denoiser, export

SIZES = [(1, 16, 24), (3, 20, 31), (2, 51, 37), (1, 3, 50), (1, 1, 1)]


def batch(count: int, height: int, width: int) -> torch.Tensor:
    pixels = noisy_picture(height, width, seed=height)
    return torch.from_numpy(pixels).permute(2, 0, 1)[None].repeat(count, 1, 1, 1)


@pytest.mark.parametrize("arch", ["gradresnet", "hybrid", "unet"])
def test_what_is_traced_is_what_the_model_does(tmp_path: Path, arch: str) -> None:
    """The module itself, with none of the extra's packages."""
    model = tiny(tmp_path, arch)
    graph = Denoiser(model.module)
    for size in SIZES:
        y, sigma = batch(*size), torch.linspace(0.0, 0.3, size[0])
        with torch.no_grad():
            x, *posterior = graph(y, sigma)
            torch.testing.assert_close(x, model(y, sigma))
            if arch != "unet":
                torch.testing.assert_close(posterior[0], model.posterior(y, sigma))
        assert x.shape == y.shape


@pytest.mark.slow
@pytest.mark.parametrize("arch", ["gradresnet", "hybrid"])
def test_onnx_is_torch(tmp_path: Path, arch: str) -> None:
    compare(tiny(tmp_path, arch), tmp_path / "m.onnx")


@pytest.mark.slow
@pytest.mark.parametrize("name", ["photo", "cifar10"])
def test_bundled_models_too(tmp_path: Path, name: str) -> None:
    compare(load(name), tmp_path / "m.onnx")


def compare(model: Model, path: Path) -> None:
    runtime = pytest.importorskip(
        "onnxruntime", reason="onnxruntime, which the extra onnx brings, is not installed"
    )
    export(model, path)
    session = runtime.InferenceSession(path, providers=["CPUExecutionProvider"])
    known = session.get_modelmeta().custom_metadata_map
    assert known["name"] == model.name and json.loads(known["classes"]) == list(model.classes)
    for size in SIZES:
        y = batch(*size)
        for low, high in ((0.0, 0.05), (0.1, 1.0)):
            sigma = torch.linspace(low, high, size[0])
            x, posterior = session.run(None, {"y": y.numpy(), "sigma": sigma.numpy()})
            with torch.no_grad():
                expected, known_posterior = model(y, sigma), model.posterior(y, sigma)
            assert x.shape == y.shape
            assert np.abs(x - expected.numpy()).max() < 1e-4
            assert np.abs(posterior - known_posterior.numpy()).max() < 1e-4
            assert np.abs(x - y.numpy()).max() > 1e-3 or high < 0.1, "it does something"


def test_missing_packages_and_wrong_words(
    tmp_path: Path, cdnctl: Run, weights: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "onnxscript", None)
    for args, code, word in (
        ((weights, "--onnx", "m.onnx"), 3, 'pip install "cdnctl[onnx]"'),
        ((weights, "--onnx", "m.safetensors"), 2, ".onnx"),
        ((weights, "m.safetensors", "--onnx", "m.onnx"), 2, "--onnx"),
        ((weights,), 2, "missing argument"),
        ((classifier(tmp_path), "--onnx", "m.onnx"), 2, "cannot"),
    ):
        done = cdnctl("models", "export", *args)
        assert done.code == code and word in done.err and len(done.err.splitlines()) == 1
    assert not list(tmp_path.glob("m.*"))


def classifier(folder: Path) -> Path:
    return save_tiny(folder / "c.safetensors", "classifier")
