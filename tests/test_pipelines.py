"""A model as the denoiser of other programs' pipelines, as examples/README.md says."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import pytest
import torch
from tiny import noisy_picture, tiny

from cdnctl.api import Model

SIGMA = 25 / 255


@pytest.fixture
def model(tmp_path: Path) -> Model:
    return tiny(tmp_path, "hybrid")


def noisy(count: int = 2) -> torch.Tensor:
    pictures = [torch.from_numpy(noisy_picture(21, 18, seed=i)) for i in range(count)]
    return torch.stack(pictures).permute(0, 3, 1, 2)


def test_a_pipeline_without_noise_levels(model: Model) -> None:
    """It calls model(y), as spandrel does."""
    y = noisy()
    denoiser = partial(model.denoise, sigma=SIGMA)
    torch.testing.assert_close(denoiser(y), model(y, SIGMA))
    torch.testing.assert_close(denoiser(y)[:1], denoiser(y[:1]))
    assert denoiser(y).shape == y.shape and denoiser(y).dtype == y.dtype


def test_one_level_for_all_or_one_each(model: Model) -> None:
    """Libraries give floats, tensors without axes, or one level a picture."""
    y = noisy()
    expected = model(y, SIGMA)
    for sigma in (torch.tensor(SIGMA), torch.tensor([SIGMA]), torch.tensor([SIGMA, SIGMA])):
        torch.testing.assert_close(model(y, sigma), expected)
    each = model(y, torch.tensor([SIGMA, 0.3]))
    torch.testing.assert_close(each[0], expected[0])
    assert (each[1] - expected[1]).abs().max() > 1e-3


def test_deepinv_takes_it_as_it_is(model: Model) -> None:
    optim = pytest.importorskip("deepinv", reason="deepinv is not installed").optim
    y = noisy()
    expected = model(y, SIGMA)
    prior = optim.PnP(denoiser=model)
    torch.testing.assert_close(prior.prox(y, sigma_denoiser=SIGMA), expected)
    torch.testing.assert_close(optim.RED(denoiser=model).grad(y, SIGMA), y - expected)
