"""The core against a Gaussian mixture in closed form: exact identities, to 1e-8 in float64."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from oracle import Array, ClosedForm, GaussianMixture
from torch import Tensor

from cdnctl.core.joint import HasScore, denoise, log_marginal, per_sample, posterior, score
from cdnctl.core.losses import cross_entropy, score_matching
from cdnctl.core.metrics import accuracy, psnr
from cdnctl.core.noise import add_noise, noised, noised_array, sample_sigma

SHAPE = (1, 3, 4)
CLASSES = (1, 3, 2)  # components of each class: one is a single Gaussian
SIGMAS = np.array([0.02, 0.05, 0.1, 0.2, 0.5, 1.0])
K = len(CLASSES)


class Case:
    """A mixture, noisy pictures, one noise level each, and what is exactly known of them."""

    def __init__(self, seed: int):
        self.model = GaussianMixture.random(CLASSES, SHAPE, seed)
        self.y = self.model.sample(SIGMAS, seed)
        self.sigma = torch.from_numpy(SIGMAS)
        flat = self.y.flatten(1).numpy()
        self.exact = [self.model.closed_form(v, s) for v, s in zip(flat, SIGMAS, strict=True)]

    def known(self, name: str) -> Array:
        """A quantity of ``ClosedForm`` for all pictures."""
        return np.stack([getattr(e, name) for e in self.exact])


@pytest.fixture(scope="module", params=range(3))
def case(request: pytest.FixtureRequest) -> Case:
    return Case(request.param)


def one_hot(c: int) -> Tensor:
    return torch.eye(K, dtype=torch.float64)[c]


def close(got: Tensor, want: Array | Tensor, atol: float = 1e-8) -> None:
    want = torch.as_tensor(want)
    torch.testing.assert_close(got.reshape(want.shape), want, rtol=1e-8, atol=atol)


def jacobian(function: Any, y: Tensor, step: float) -> Tensor:
    """d function / dy at one picture (1, C, H, W) by five-point differences: (n_out, n)."""
    n = y.numel()
    offsets = step * torch.eye(n, dtype=y.dtype).view(n, *y.shape[1:])
    at = {k: function(y + k * offsets).flatten(1) for k in (-2, -1, 1, 2)}
    return ((8 * (at[1] - at[-1]) - (at[2] - at[-2])) / (12 * step)).T


# -- the identities -------------------------------------------------------------------


def test_the_oracle_has_classes_to_tell_apart(case: Case) -> None:
    p = case.known("posterior")
    assert ((p > 0.02).sum(1) > 1).any(), "no ambiguous picture: the identities would be trivial"


def test_log_marginal(case: Case) -> None:
    want = np.log(np.exp(case.known("log_joint")).sum(1))
    close(log_marginal(case.model, case.y, case.sigma), want)


def test_posterior(case: Case) -> None:
    close(posterior(case.model, case.y, case.sigma), case.known("posterior"))


def test_score(case: Case) -> None:
    got = score(case.model, case.y, case.sigma)
    assert got.shape == case.y.shape
    close(got, case.known("score"))


@pytest.mark.parametrize("c", range(K))
def test_class_conditional_score_and_denoiser(case: Case, c: int) -> None:
    close(score(case.model, case.y, case.sigma, one_hot(c)), case.known("class_scores")[:, c])
    close(denoise(case.model, case.y, case.sigma, one_hot(c)), case.known("class_means")[:, c])


def test_denoiser_is_the_posterior_mean(case: Case) -> None:
    close(denoise(case.model, case.y, case.sigma), case.known("mean"))


def test_any_mixture_of_classes(case: Case) -> None:
    w = torch.tensor([0.7, -0.4, 1.9], dtype=torch.float64)  # neither positive nor of sum one
    scores = np.einsum("k,bkn->bn", w.numpy(), case.known("class_scores"))
    close(score(case.model, case.y, case.sigma, w), scores)
    want = case.y.flatten(1).numpy() + SIGMAS[:, None] ** 2 * scores
    close(denoise(case.model, case.y, case.sigma, w), want)


def test_weights_of_each_picture(case: Case) -> None:
    w = torch.from_numpy(np.random.default_rng(0).normal(size=(len(SIGMAS), K)))
    want = np.einsum("bk,bkn->bn", w.numpy(), case.known("class_scores"))
    close(score(case.model, case.y, case.sigma, w), want)


def test_evidence_map(case: Case) -> None:
    whole = denoise(case.model, case.y, case.sigma)
    for c in range(K):
        evidence = denoise(case.model, case.y, case.sigma, one_hot(c)) - whole
        leaf = case.y.clone().requires_grad_()
        log_p = posterior(case.model, leaf, case.sigma)[:, c].log().sum()
        gradient = torch.autograd.grad(log_p, leaf)[0]
        close(evidence, per_sample(case.sigma, case.y) ** 2 * gradient)
        close(evidence, case.known("class_means")[:, c] - case.known("mean"))


def test_consistency(case: Case) -> None:
    p = posterior(case.model, case.y, case.sigma)
    parts = torch.stack([denoise(case.model, case.y, case.sigma, one_hot(c)) for c in range(K)], 1)
    close((p[:, :, None, None, None] * parts).sum(1), denoise(case.model, case.y, case.sigma))


@pytest.mark.parametrize("c", [None, *range(K)])
def test_posterior_covariance_and_effective_dimension(case: Case, c: int | None) -> None:
    weights = None if c is None else one_hot(c)
    for i, sigma in enumerate(SIGMAS):
        e: ClosedForm = case.exact[i]
        want = e.cov if c is None else e.class_covs[c]
        slope = jacobian(
            lambda y, s=sigma: denoise(case.model, y, s, weights), case.y[i : i + 1], 2e-3 * sigma
        )
        close(sigma**2 * slope, want)
        assert (slope - slope.T).abs().max() * sigma**2 < 1e-8
        assert abs(slope.trace().item() - np.trace(want) / sigma**2) < 1e-6


def test_covariance_is_the_curvature_of_the_log_marginal(case: Case) -> None:
    n = math.prod(SHAPE)
    for i, sigma in enumerate(SIGMAS):
        hessian = torch.autograd.functional.hessian(
            lambda y, s=sigma: log_marginal(case.model, y, s).sum(), case.y[i : i + 1]
        ).reshape(n, n)
        cov = sigma**2 * (torch.eye(n) + sigma**2 * hessian)
        close(cov, case.exact[i].cov)
        assert torch.linalg.eigvalsh(cov).min() > -1e-8


def test_a_constant_changes_nothing(case: Case) -> None:
    class Shifted:
        num_classes = K

        def log_joint(self, y: Tensor, sigma: Tensor | float) -> Tensor:
            return case.model.log_joint(y, sigma) + 1000.0

    close(posterior(Shifted(), case.y, case.sigma), case.known("posterior"))
    close(denoise(Shifted(), case.y, case.sigma), case.known("mean"))


# -- the manners of ``score`` -----------------------------------------------------------


def test_one_noise_level_for_all_or_one_each(case: Case) -> None:
    same = torch.full_like(case.sigma, 0.2)
    for sigma in (0.2, torch.tensor(0.2, dtype=torch.float64), same[:1]):
        close(denoise(case.model, case.y, sigma), denoise(case.model, case.y, same))


def test_score_works_inside_no_grad(case: Case) -> None:
    with torch.no_grad():
        got = denoise(case.model, case.y, case.sigma)
        assert not torch.is_grad_enabled()
    close(got, case.known("mean"))


@pytest.mark.parametrize("requires_grad", [False, True])
def test_score_leaves_the_callers_tensor_alone(case: Case, requires_grad: bool) -> None:
    y = case.y.clone().requires_grad_(requires_grad)
    denoise(case.model, y, case.sigma)
    score(case.model, y, case.sigma, one_hot(1))
    assert torch.equal(y.detach(), case.y)
    assert y.requires_grad is requires_grad and y.grad is None and y.is_leaf


@pytest.mark.parametrize("weights", [None, one_hot(1)], ids=["posterior", "class"])
@pytest.mark.parametrize("function", [score, denoise])
def test_score_is_differentiable(case: Case, weights: Tensor | None, function: Any) -> None:
    y, sigma = case.y.clone().requires_grad_(), case.sigma.clone().requires_grad_()
    assert torch.autograd.gradcheck(
        lambda y, sigma: function(case.model, y, sigma, weights), (y, sigma), fast_mode=True
    )
    # A noise level that depends on the picture adds to its derivative, not to the score.
    tied = function(case.model, y, sigma * y.sum().exp() / y.sum().exp().detach(), weights)
    torch.testing.assert_close(tied, function(case.model, y, sigma, weights))


def test_score_is_differentiable_in_weights_and_parameters(case: Case) -> None:
    class Scaled(torch.nn.Module):
        num_classes = K

        def __init__(self) -> None:
            super().__init__()
            self.scale = torch.nn.Parameter(torch.ones((), dtype=torch.float64))

        def log_joint(self, y: Tensor, sigma: Tensor | float) -> Tensor:
            return self.scale * case.model.log_joint(y, sigma)

    model = Scaled()
    got = score(model, case.y, case.sigma, one_hot(1)).sum()
    (by_scale,) = torch.autograd.grad(got, model.scale)
    w = one_hot(1).requires_grad_()
    (by_weights,) = torch.autograd.grad(score(case.model, case.y, case.sigma, w).sum(), w)
    for derivative in (by_scale, by_weights @ one_hot(1)):  # the score is linear in both
        close(derivative, got.detach())


def test_score_keeps_no_graph_unless_it_is_asked_for(case: Case) -> None:
    assert not score(case.model, case.y, case.sigma).requires_grad
    y = case.y.clone().requires_grad_()
    assert score(case.model, y, case.sigma).requires_grad
    with torch.no_grad():
        assert not score(case.model, y, case.sigma).requires_grad


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_score_follows_the_dtype(case: Case, dtype: torch.dtype) -> None:
    w = one_hot(0).to(torch.float32)
    sigma = case.sigma.to(torch.float64)
    for weights in (None, w):
        assert score(case.model, case.y.to(dtype), sigma, weights).dtype is dtype
        assert denoise(case.model, case.y.to(dtype), sigma, weights).dtype is dtype


def test_a_model_with_a_score_of_its_own_is_asked_for_it() -> None:
    class Line:
        def score(self, y: Tensor, sigma: Tensor | float, mixture: Tensor | None = None) -> Tensor:
            return 2 * y if mixture is None else mixture.sum() * y

    assert isinstance(Line(), HasScore)
    y = torch.rand(2, 1, 3, 3)
    close(denoise(Line(), y, torch.tensor([0.5, 1.0])), torch.stack([1.5 * y[0], 3 * y[1]]))
    close(denoise(Line(), y, 1.0, torch.tensor([1.0, 2.0])), 4 * y)


# -- noise, losses, metrics ---------------------------------------------------------------


def test_noise_is_white_of_the_given_level_and_repeatable() -> None:
    x = torch.rand(2, 3, 100, 120)
    before = x.clone()
    sigma = torch.tensor([0.1, 0.7])
    y = add_noise(x, sigma, torch.Generator().manual_seed(3))
    assert torch.equal(y, add_noise(x, sigma, torch.Generator().manual_seed(3)))
    assert not torch.equal(y, add_noise(x, sigma, torch.Generator().manual_seed(4)))
    assert torch.equal(x, before)
    eps = (y - x) / sigma.view(2, 1, 1, 1)
    assert eps.mean((1, 2, 3)).abs().max() < 0.03
    assert (eps.std((1, 2, 3)) - 1).abs().max() < 0.02
    assert (eps[..., 1:] * eps[..., :-1]).mean().abs() < 0.02
    assert y.min() < 0 and y.max() > 1, "noisy pictures are not clipped"
    assert add_noise(x.double(), 0.1).dtype is torch.float64


def test_noise_levels_fill_their_range() -> None:
    for power in (1.0, 2.0, 0.5):
        draw = sample_sigma(20_000, 0.1, 0.4, power, torch.Generator().manual_seed(0))
        assert draw.shape == (20_000,) and draw.min() >= 0.1 and draw.max() <= 0.4
        share = ((draw - 0.1) / 0.3) ** (1 / power)  # uniform, if the power is right
        for q in (0.1, 0.5, 0.9):
            assert abs((share < q).double().mean().item() - q) < 0.015


def test_score_matching_is_the_error_of_the_score(case: Case) -> None:
    clean = torch.rand_like(case.y)
    sigma = per_sample(case.sigma, case.y)
    wanted = (clean - case.y) / sigma**2
    error = (score(case.model, case.y, case.sigma) - wanted).square().mean((1, 2, 3))
    got = score_matching(denoise(case.model, case.y, case.sigma), clean, case.sigma)
    close(got, 0.5 * case.sigma**2 * error)
    for power in (1.0, 2.5):
        close(
            score_matching(denoise(case.model, case.y, case.sigma), clean, case.sigma, power),
            got * case.sigma**power,
        )


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_cross_entropy_of_labelled_pictures_only(smoothing: float) -> None:
    logits = torch.randn(5, 4, dtype=torch.float64)
    labels = torch.tensor([0, -1, 3, 2, -1])
    log_p = logits.log_softmax(1)
    got = cross_entropy(logits, labels, smoothing)
    for i, c in enumerate(labels.tolist()):
        want = -(1 - smoothing) * log_p[i, c] - smoothing * log_p[i].mean() if c >= 0 else 0.0
        assert abs(got[i].item() - float(want)) < 1e-12


def test_noise_is_added_to_tensors_and_arrays_alike() -> None:
    """To the bit, whether the level is one or one of each picture."""
    x = torch.rand(3, 2, 4, 5, generator=torch.Generator().manual_seed(0))
    sigma = torch.tensor([0.1, 0.7, 0.3])
    noise = torch.from_numpy(np.random.default_rng(5).standard_normal(x.shape, np.float32))
    each = noised(x, sigma, noise)
    for i, level in enumerate(sigma.tolist()):
        one = noised_array(x.numpy(), level, np.random.default_rng(5))
        assert np.array_equal(one, noised(x, level, noise)) and one.dtype == np.float32
        assert torch.equal(each[i], torch.from_numpy(one[i])) and not np.array_equal(one, x)
    shared = noised(x, 0.3, noise[0])  # one noise for all pictures
    assert torch.equal(shared[2], noised(x[2:], 0.3, noise[:1])[0])


def test_psnr_and_accuracy() -> None:
    x = torch.rand(3, 3, 8, 8)
    y = torch.stack([x[0], x[1] + 0.1, x[2] - 0.01])
    got = psnr(y, x)
    assert got[0] == math.inf
    assert got[1:].tolist() == pytest.approx([20.0, 40.0], abs=1e-3)
    logits = torch.tensor([[3.0, 1.0], [0.0, 1.0], [2.0, -1.0], [0.0, 5.0]])
    assert accuracy(logits, torch.tensor([0, 1, 1, 1])) == 0.75
