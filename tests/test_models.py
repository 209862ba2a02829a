"""Every architecture keeps one contract; every layer knows its adjoint."""

from __future__ import annotations

import math
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call, jvp

from cdnctl.checkpoints import Header, build_module, load_model, save_model
from cdnctl.core.joint import Joint, denoise, log_marginal, per_sample, posterior, score
from cdnctl.models import REGISTRY
from cdnctl.models.adjoint import (
    Activation,
    Chain,
    Conv,
    GroupNorm,
    NoNorm,
    PixelNorm,
    QuadraticForm,
    Residual,
)
from cdnctl.models.trunk import ClassHead, NetConfig, Normalised, Trunk, Whole

K = 3
TINY = NetConfig(
    num_classes=K, widths=(4, 8), blocks=(1, 1), norm="pixel", groups=2, down=4, head=8
)
# Every norm, stride kernel and folding; both activations; and shapes off the beaten track.
VARIANTS = [
    replace(TINY, norm=norm, down=down, unshuffle=cell, activation="silu" if cell > 1 else "gelu")
    for norm, down, cell in product(("group", "pixel", "none"), (2, 4), (1, 2))
] + [
    replace(TINY, side=0.0),
    replace(TINY, side=0.3, channels=1, num_classes=1),
    replace(TINY, widths=(4, 6, 8), blocks=(0, 2, 1), down=2),
    replace(TINY, widths=(4,), blocks=(1,), norm="none"),
    replace(TINY, constant=True),
    replace(TINY, widths=(4, 6, 8), blocks=(0, 2, 1), decoder=(2, 0, 1), constant=True),
]
LOCAL = [c for c in VARIANTS if c.norm != "group"]


def label(value: Any) -> str | None:
    if not isinstance(value, NetConfig):
        return None
    shape = f"{value.norm}-down{value.down}-fold{value.unshuffle}-{value.activation}"
    own = "-decoder" * bool(value.decoder) + "-constant" * value.constant
    return f"{shape}-{len(value.widths)}stages-side{value.side:g}{own}"


def make(config: NetConfig, arch: str = "gradresnet", seed: int = 0, double: bool = False) -> Any:
    """A network whose weights are random throughout: gains and biases too."""
    torch.manual_seed(seed)
    net = REGISTRY[arch].module(config)
    with torch.no_grad():
        for parameter in net.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    return (net.double() if double else net).eval()


def pictures(config: NetConfig, count: int = 2, size: tuple[int, int] = (9, 11)) -> Tensor:
    g = torch.Generator().manual_seed(1)
    return 0.5 + 0.3 * torch.randn(count, config.channels, *size, generator=g)


def mixtures(k: int, count: int) -> dict[str, Tensor | None]:
    g = torch.Generator().manual_seed(2)
    return {
        "posterior": None,
        "one-hot": torch.eye(k)[k - 1],
        "arbitrary": torch.randn(count, k, generator=g),
    }


def close(got: Tensor, want: Tensor, tolerance: float) -> None:
    torch.testing.assert_close(got, want, rtol=tolerance, atol=tolerance)


def autograd_score(net: Any, y: Tensor, sigma: Tensor, weights: Tensor | None) -> Tensor:
    """The score by differentiating ``log_joint``, with nothing written by hand."""
    leaf = y.detach().clone().requires_grad_()
    f = net.log_joint(leaf, sigma)
    total = f.logsumexp(1) if weights is None else (f * weights.to(f)).sum(1)
    return torch.autograd.grad(total.sum(), leaf)[0]


# -- layers and their adjoints --------------------------------------------------------

LAYERS = {
    "conv3": lambda: Conv(4, 6, 3),
    "conv1": lambda: Conv(4, 6, 1),
    "down4": lambda: Conv(4, 6, 4, stride=2),
    "down2": lambda: Conv(4, 6, 2, stride=2),
    "pixel norm": lambda: PixelNorm(4),
    "group norm": lambda: GroupNorm(4, 2),
    "no norm": lambda: NoNorm(),
    "gelu": lambda: Activation("gelu"),
    "silu": lambda: Activation("silu"),
    "chain": lambda: Chain(PixelNorm(4), Conv(4, 6, 3), Activation("gelu"), Conv(6, 2, 4, 2)),
    "residual": lambda: Residual(Chain(GroupNorm(4, 4), Conv(4, 4, 3), Activation("silu"))),
    "class head, pixel": lambda: ClassHead(replace(TINY, widths=(4,), blocks=(1,))),
    "class head, group": lambda: ClassHead(
        replace(TINY, widths=(4,), blocks=(1,), norm="group", activation="silu")
    ),
}


def layer(name: str) -> nn.Module:
    torch.manual_seed(0)
    built = LAYERS[name]()
    with torch.no_grad():
        for parameter in built.parameters():
            parameter += 0.3 * torch.randn_like(parameter)
    return built.double()


@pytest.mark.parametrize("name", LAYERS)
def test_layer_adjoint(name: str) -> None:
    """<g, J v> = <J^T g, v>."""
    net = layer(name)
    x, v = torch.randn(2, 3, 4, 6, 8, dtype=torch.float64)
    out, pushed = jvp(lambda t: net(t)[0], (x,), (v,))
    g = torch.randn_like(out)
    pulled = net(x)[1](g)
    assert pulled.shape == x.shape and pulled.dtype is x.dtype
    assert pushed.abs().max() > 1e-3
    close((g * pushed).sum(), (pulled * v).sum(), 1e-10)


class ThereAndBack(nn.Module):
    """A layer's output and its adjoint's, as one function of input, cotangent and weights."""

    def __init__(self, net: nn.Module):
        super().__init__()
        self.net = net

    def forward(self, x: Tensor, g: Tensor) -> tuple[Tensor, Tensor]:
        out, adjoint = self.net(x)
        return out, adjoint(g)


def check_gradients(net: nn.Module, *inputs: Any) -> None:
    """Gradients of all outputs in the tensors among the inputs and in all weights."""
    names = [name for name, _ in net.named_parameters()]
    count = len(inputs)

    def function(*values: Any) -> Any:
        weights = dict(zip(names, values[count:], strict=True))
        return functional_call(net, weights, values[:count])

    assert torch.autograd.gradcheck(function, (*inputs, *net.parameters()), fast_mode=True)


@pytest.mark.parametrize("name", LAYERS)
def test_training_through_a_layer_adjoint(name: str) -> None:
    net = layer(name)
    x = torch.randn(1, 4, 4, 4, dtype=torch.float64, requires_grad=True)
    g = torch.randn_like(net(x)[0]).requires_grad_()
    check_gradients(ThereAndBack(net), x, g)


@pytest.mark.parametrize("config", VARIANTS, ids=label)
def test_trunk_adjoint(config: NetConfig) -> None:
    """The same over all stages at once, some of which have no cotangent."""
    torch.manual_seed(0)
    trunk = Trunk(config).double()
    y, v = pictures(config, 4, (8, 16)).double().chunk(2)
    sigma = torch.tensor([0.1, 0.4]).double()

    def features(y: Tensor) -> tuple[Tensor, ...]:
        return tuple(trunk(Normalised(y, sigma, config.multiple), None)[0])

    outs, pushed = jvp(features, (y,), (v,))
    n = Normalised(y, sigma, config.multiple)
    gs = [torch.randn_like(f) for f in outs]
    for skipped in range(len(gs)):
        some = [None if i < skipped else g for i, g in enumerate(gs)]
        pulled = trunk(n, None)[1](list(some))
        want = sum(((g * p).sum() for g, p in zip(some, pushed, strict=True) if g is not None))
        close((pulled * v / n.tau).sum(), torch.as_tensor(want), 1e-10)


def test_quadratic_form_and_its_gradient() -> None:
    torch.manual_seed(0)
    form = QuadraticForm(4, 5, 0.7).double()
    x, v = torch.randn(2, 3, 4, 5, 5, dtype=torch.float64)
    _, pushed = jvp(form.energy, (x,), (v,))
    close(pushed, (form(x) * v).sum((1, 2, 3)), 1e-10)
    energies = form.energy(torch.randn(100, 4, 1, 1, dtype=torch.float64))
    assert energies.min() < 0 < energies.max(), "the form must be indefinite"


# -- GradResNet: the written-out score is the gradient of the density --------------------------


@pytest.mark.parametrize("kind", ["posterior", "one-hot", "arbitrary"])
@pytest.mark.parametrize("config", VARIANTS, ids=label)
def test_score_is_the_gradient_of_log_joint(config: NetConfig, kind: str) -> None:
    y = pictures(config)  # of odd sides: the padding takes part
    sigma = torch.tensor([0.004, 0.4])
    weights = mixtures(config.num_classes, len(y))[kind]
    exact = make(config, double=True)
    want = autograd_score(exact, y.double(), sigma.double(), weights)
    w = None if weights is None else weights.double()
    close(exact.score(y.double(), sigma.double(), w), want, 1e-10)
    # In single precision sigma * score is of unit scale, and the last digits are lost.
    got = make(config).score(y, sigma, weights)
    assert got.dtype is torch.float32
    unit = per_sample(sigma, y)
    close(unit * got, (unit * want).float(), 1e-4)


@pytest.mark.parametrize("config", VARIANTS, ids=label)
def test_weight_gradients_are_those_of_double_backward(config: NetConfig) -> None:
    """Training through the adjoint is training through create_graph=True."""
    net = make(config, double=True)
    y = pictures(config, size=(8, 8)).double()
    sigma = torch.tensor([0.08, 0.4]).double()
    goal = torch.randn_like(y)
    weights = list(net.parameters())

    leaf = y.clone().requires_grad_()
    marginal = net.log_joint(leaf, sigma).logsumexp(1).sum()
    slope = torch.autograd.grad(marginal, leaf, create_graph=True)[0]
    slow = y + per_sample(sigma, y) ** 2 * slope
    # The posterior that mixes the classes is differentiated through, too.
    fast = net(y, sigma)[0]
    got, want = (
        torch.autograd.grad(
            (d - goal).square().sum(), weights, allow_unused=True, materialize_grads=True
        )
        for d in (fast, slow)
    )
    for g, w in zip(got, want, strict=True):
        close(g, w, 1e-9)


# -- the identities, for every architecture ----------------------------------------------------

NORMS = ("group", "pixel", "none")
ARCHS = list(product(REGISTRY, NORMS))
JOINTS = [(a, n) for a, n in ARCHS if REGISTRY[a].module.classifies]
DENOISERS = [(a, n) for a, n in ARCHS if REGISTRY[a].module.denoises]
SIGMA = torch.tensor([0.1, 0.35])


DENSITIES = [(a, n) for a, n in ARCHS if hasattr(REGISTRY[a].module, "log_joint")]


def test_what_a_module_can_do_is_told_by_what_it_has() -> None:
    assert JOINTS and DENOISERS
    assert {a for a, _ in DENSITIES} == {"gradresnet", "classifier"}
    for arch in REGISTRY:
        net = make(TINY, arch)
        assert net.num_classes == K and net.compute_dtype is None
        assert net.denoises or net.classifies
        assert isinstance(net, Joint) == ((arch, "pixel") in DENSITIES)


@pytest.mark.parametrize("arch,norm", DENSITIES)
def test_identities_of_a_density(arch: str, norm: str) -> None:
    """Tweedie's formula, for the marginal and for every class; in the unit of the picture."""
    net, y = make(replace(TINY, norm=norm), arch), pictures(TINY)
    var = per_sample(SIGMA, y) ** 2
    f = net.log_joint(y, SIGMA)
    assert f.shape == (2, K)
    close(net(y, SIGMA)[1].softmax(1), f.softmax(1), 1e-4)
    close(
        log_marginal(net, y, SIGMA),
        f.exp().sum(1).log() if arch != "gradresnet" else f.logsumexp(1),
        1e-4,
    )
    close(denoise(net, y, SIGMA), y + var * autograd_score(net, y, SIGMA, None), 1e-4)
    for e in torch.eye(K):
        close(denoise(net, y, SIGMA, e), y + var * autograd_score(net, y, SIGMA, e), 1e-4)


@pytest.mark.parametrize("arch,norm", JOINTS)
def test_identities_of_a_joint(arch: str, norm: str) -> None:
    net, y = make(replace(TINY, norm=norm), arch), pictures(TINY)
    net, y, sigma = net.double(), y.double(), SIGMA.double()
    var = per_sample(sigma, y) ** 2
    p = posterior(net, y, sigma)
    close(p, net(y, sigma)[1].softmax(1), 1e-10)
    assert p.std() > 0.01, "a flat posterior would make the rest trivial"

    whole = denoise(net, y, sigma)
    parts = torch.stack([denoise(net, y, sigma, e) for e in torch.eye(K)], 1)
    # Consistency and any mixture.
    close((p[:, :, None, None, None] * parts).sum(1), whole, 1e-9)
    w = torch.tensor([0.7, -0.4, 1.9]).double()
    mixed = y + (w.view(1, K, 1, 1, 1) * (parts - y[:, None])).sum(1)
    close(denoise(net, y, sigma, w), mixed, 1e-9)
    # The mixture as a function of the class scores, and the posterior as one of them.
    for way, want in (
        (lambda logits: w.expand_as(logits), mixed),
        (lambda logits: logits.softmax(1), whole),
    ):
        close(y + net.correction(y, sigma, way)[0], want, 1e-9)
    # The evidence map.
    for c in range(K):
        leaf = y.clone().requires_grad_()
        log_p = net.logits(leaf, sigma).log_softmax(1)[:, c].sum()
        evidence = var * torch.autograd.grad(log_p, leaf)[0]
        close(parts[:, c] - whole, evidence, 1e-9)
        assert evidence.abs().max() > 1e-6


@pytest.mark.parametrize("arch,norm", DENOISERS)
def test_identities_of_a_denoiser(arch: str, norm: str) -> None:
    net, y = make(replace(TINY, norm=norm), arch), pictures(TINY)
    denoised = net(y, SIGMA)[0]
    close(denoise(net, y, SIGMA), denoised, 1e-4)
    close(y + per_sample(SIGMA, y) ** 2 * score(net, y, SIGMA), denoised, 1e-4)
    assert (denoised - y).abs().max() > 0.01


@pytest.mark.parametrize("arch,norm", JOINTS)
def test_class_features_are_what_the_class_scores_are_made_of(arch: str, norm: str) -> None:
    config = replace(TINY, norm=norm)
    net, y = make(config, arch), pictures(config)
    features = net.class_features(y, SIGMA)
    assert features.shape == (2, config.head, 5, 6)  # 9x11 in cells of 2x2
    close(net.head.linear(features.mean((2, 3))), net(y, SIGMA)[1], 1e-5)
    close(net.logits(y, SIGMA), net(y, SIGMA)[1], 1e-5)


def test_classes_of_one_task_baselines() -> None:
    y = pictures(TINY)
    unet = make(TINY, "unet")
    for w in mixtures(K, 2).values():
        assert torch.equal(unet(y, SIGMA, w)[0], unet(y, SIGMA)[0])
    assert torch.equal(unet(y, SIGMA)[1], torch.zeros(2, K))
    assert torch.equal(make(TINY, "classifier")(y, SIGMA)[0], y)


@pytest.mark.parametrize("norm", NORMS)
def test_posterior_covariance_is_symmetric(norm: str) -> None:
    net = make(replace(TINY, norm=norm), double=True)
    y = pictures(TINY, 1, (5, 6)).double()
    for w in mixtures(K, 1).values():
        w = None if w is None else w.double()
        slope = torch.autograd.functional.jacobian(lambda t, w=w: net(t, 0.2, w)[0], y)
        slope = slope.reshape(y.numel(), -1)
        assert (slope - slope.T).abs().max() < 1e-10
        hessian = torch.autograd.functional.hessian(
            lambda t, w=w: (
                net.log_joint(t, 0.2).logsumexp(1)
                if w is None
                else (net.log_joint(t, 0.2) * w).sum()
            ).sum(),
            y,
        )
        close(slope, torch.eye(y.numel()) + 0.2**2 * hessian.reshape(y.numel(), -1), 1e-9)


# -- the contract of every architecture ---------------------------------------------------------

each_arch = pytest.mark.parametrize("arch,norm", ARCHS)


@each_arch
@pytest.mark.parametrize("cell,down", [(1, 4), (2, 2)])
def test_any_size(arch: str, norm: str, cell: int, down: int) -> None:
    net = make(replace(TINY, norm=norm, unshuffle=cell, down=down), arch)
    for size in ((1, 1), (1, 7), (5, 1), (2, 3), (16, 16), (13, 18), (3, 40)):
        for count in (1, 3):
            y = pictures(TINY, count, size)
            denoised, logits = net(y, 0.2)
            assert denoised.shape == y.shape and logits.shape == (count, K)
            assert denoised.dtype is logits.dtype is torch.float32
            assert denoised.isfinite().all() and logits.isfinite().all()


@each_arch
def test_a_large_picture(arch: str, norm: str) -> None:
    config = replace(TINY, norm=norm, widths=(2, 4), down=2, head=2)
    net, y = make(config, arch), pictures(TINY, 1, (700, 1000))
    with torch.no_grad():
        denoised, logits = net(y, 0.2)
    assert denoised.shape == y.shape and denoised.isfinite().all() and logits.isfinite().all()


@each_arch
def test_finite_gradients(arch: str, norm: str) -> None:
    """At extreme inputs, too: flat, black, far out of range, without noise, of one pixel."""
    net = make(replace(TINY, norm=norm), arch)
    flat = torch.full((1, 3, 8, 8), 0.5)
    for y in (flat, flat * 0, flat * 20, flat[..., :1, :1], pictures(TINY)):
        for sigma in (0.0, 1e-3, 0.2, 1.0):
            denoised, logits = net(y, sigma)
            loss = denoised.square().mean() + logits.square().mean()
            gradients = torch.autograd.grad(
                loss, list(net.parameters()), allow_unused=True, materialize_grads=True
            )
            assert all(g.isfinite().all() for g in gradients)
            assert score(net, y, sigma).isfinite().all()


@each_arch
def test_training_gradients(arch: str, norm: str) -> None:
    config = replace(TINY, norm=norm, widths=(4, 4), activation="silu")
    net = make(config, arch, double=True)
    y = pictures(config, 1, (4, 6)).double().requires_grad_()
    check_gradients(net, y, torch.tensor([0.3]).double())


@each_arch
def test_every_weight_is_trained(arch: str, norm: str) -> None:
    """No weight lies outside what the two losses reach."""
    net = make(replace(TINY, norm=norm), arch)
    denoised, logits = net(pictures(TINY), SIGMA)
    loss = denoised.square().sum() + logits.log_softmax(1)[:, 0].sum()
    for name, parameter in net.named_parameters():
        gradient = torch.autograd.grad(loss, parameter, retain_graph=True)[0]
        assert gradient.abs().max() > 0, name


@each_arch
def test_save_and_load_to_the_bit(arch: str, norm: str, tmp_path: Path) -> None:
    model = {"num_classes": K, "widths": [4, 8], "blocks": [1, 1], "norm": norm, "groups": 2}
    header = Header(arch, arch, model | {"head": 8}, ("a", "b", "c"), (0.0, 0.25), 16)
    torch.manual_seed(0)
    net = build_module(header)
    path = tmp_path / "net.safetensors"
    save_model(path, net.state_dict(), header)
    again, read = load_model(path)
    assert read == header
    assert type(again) is REGISTRY[arch].module and not again.training
    for key, value in net.state_dict().items():
        assert torch.equal(again.state_dict()[key], value), key
    y = pictures(TINY)
    for got, want in zip(again(y, SIGMA), net(y, SIGMA), strict=True):
        assert torch.equal(got, want) and not got.requires_grad


@each_arch
def test_batch_mates_do_not_matter(arch: str, norm: str) -> None:
    net = make(replace(TINY, norm=norm), arch)
    y = pictures(TINY, 4)
    sigma = torch.tensor([0.02, 0.1, 0.3, 0.9])
    together = net(y, sigma)
    for i in range(4):
        alone = net(y[i : i + 1], sigma[i].item())
        for whole, part in zip(together, alone, strict=True):
            close(part, whole[i : i + 1], 1e-5)
    for whole, part in zip(net(y, torch.full((4,), 0.3)), net(y, 0.3), strict=True):
        close(part, whole, 1e-6)


@each_arch
@pytest.mark.parametrize("requires_grad", [False, True])
def test_score_leaves_the_caller_alone(arch: str, norm: str, requires_grad: bool) -> None:
    net = make(replace(TINY, norm=norm), arch)
    before = pictures(TINY)
    y = before.clone().requires_grad_(requires_grad)
    want = score(net, y, SIGMA).detach()
    with torch.no_grad():
        assert torch.equal(score(net, y, SIGMA), want)
        assert not torch.is_grad_enabled()
    assert torch.equal(y.detach(), before)
    assert y.requires_grad is requires_grad and y.grad is None and y.is_leaf
    assert all(p.grad is None for p in net.parameters())
    strided = before.permute(0, 1, 3, 2).contiguous().permute(0, 1, 3, 2)
    close(score(net, strided, SIGMA), want, 1e-4)


@each_arch
def test_dtype_follows_the_input(arch: str, norm: str) -> None:
    net = make(replace(TINY, norm=norm), arch)
    y = pictures(TINY)
    assert score(net, y, SIGMA.double()).dtype is torch.float32
    wide = net(y.double(), SIGMA)[0]
    assert wide.dtype is torch.float64
    close(wide.float(), net(y, SIGMA)[0], 1e-4)
    assert make(replace(TINY, norm=norm), arch, double=True)(y.double(), 0.1)[1].dtype is (
        torch.float64
    )


@each_arch
def test_half_precision_trunk(arch: str, norm: str) -> None:
    """In bf16 the trunk alone is coarse: outputs, class scores and energy keep their type."""
    net, y = make(replace(TINY, norm=norm), arch), pictures(TINY)
    want, logits = net(y, SIGMA)
    net.compute_dtype = torch.bfloat16
    got, coarse = net(y, SIGMA)
    assert got.dtype is coarse.dtype is torch.float32
    assert not torch.equal(got, want) or not net.denoises
    assert (got - want).abs().max() < 0.05 and (coarse - logits).abs().max() < 0.1
    assert net.logits(y, SIGMA).dtype is torch.float32 if net.classifies else True
    assert net.log_joint(y, SIGMA).dtype is torch.float32 if isinstance(net, Joint) else True


@each_arch
def test_half_precision_weights_run_the_trunk_in_half_precision(arch: str, norm: str) -> None:
    net, y = make(replace(TINY, norm=norm), arch).half(), pictures(TINY)
    for function in (lambda: net.correction(y, SIGMA)[0], lambda: net(y, SIGMA)[1]):
        found = []
        for net.compute_dtype in (None, torch.float16, torch.float32):
            found.append(function())
        assert all(f.dtype is torch.float32 for f in found)
        assert torch.equal(found[0], found[1])
        assert not torch.equal(found[0], found[2]) or not found[0].any()


# -- how far a pixel reaches --------------------------------------------------------------------

LOCAL_NETS = [("gradresnet", c) for c in LOCAL if not c.decoder] + [
    (a, c) for a in ("unet", "hybrid") for c in LOCAL
]


def fixed(config: NetConfig) -> Tensor:
    """Class weights that do not depend on the picture: the last class alone."""
    return torch.eye(config.num_classes)[-1].double()


@pytest.mark.parametrize("arch,config", LOCAL_NETS, ids=label)
def test_receptive_radius_bounds_the_reach(arch: str, config: NetConfig) -> None:
    net = make(config, arch, double=True)
    radius, step = config.receptive_radius, config.multiple
    side = -(-(2 * radius + 3 * step) // step) * step
    y = pictures(config, 1, (side, side)).double()
    centre = side // 2 // step * step
    at = torch.arange(side)
    reach = 0
    whole = Whole(side * side, torch.full((config.num_classes,), 1 / config.num_classes))
    with torch.no_grad():
        before = net.correction(y, 0.2, fixed(config), whole)[0] + y
        for phase in range(step):
            pixel = centre + phase
            moved = y.clone()
            moved[..., pixel, pixel] += 0.5
            change = (
                net.correction(moved, 0.2, fixed(config), whole)[0] + moved - before
            ).abs().amax((0, 1)) > 0
            distance = torch.maximum((at - pixel).abs()[:, None], (at - pixel).abs()[None])
            reach = max(reach, int(distance[change].max()))
    assert radius // 2 < reach <= radius


def test_one_class_keeps_the_reach() -> None:
    """With one class the posterior is constant: the same bound, without any weights."""
    config = replace(TINY, num_classes=1)
    net = make(config, double=True)
    y = pictures(config, 1, (64, 64)).double()
    moved = y.clone()
    moved[..., 0, 0] += 0.5
    change = (net(moved, 0.2)[0] - net(y, 0.2)[0]).abs().amax((0, 1)) > 0
    r = config.receptive_radius
    assert change.any() and not change[r + 1 :].any() and not change[:, r + 1 :].any()


@pytest.mark.parametrize("arch,config", LOCAL_NETS, ids=label)
def test_a_tile_is_treated_as_part_of_the_whole(arch: str, config: NetConfig) -> None:
    """Away from its borders a tile, cut at multiples, gives what the whole picture gives."""
    net = make(config, arch, double=True)
    step = config.multiple
    margin = -(-config.receptive_radius // step) * step
    inner, top, left = 4 * step, step, 3 * step
    side = 2 * margin + inner
    whole = pictures(config, 1, (top + side + step, left + side)).double()
    height, width = whole.shape[2:]
    cells = (height // step) * (width // step)
    tile = whole[..., top : top + side, left : left + side]
    want = net(whole, 0.2, fixed(config))[0][..., top : top + side, left : left + side]
    posterior = net(whole, 0.2)[1][0].softmax(0)
    got = tile + net.correction(tile, 0.2, fixed(config), Whole(cells, posterior))[0]
    core = slice(margin, margin + inner)
    close(got[..., core, core], want[..., core, core], 1e-10)
    assert (got - want).abs().max() > 1e-6, "the borders of a tile do differ"


@pytest.mark.parametrize("arch,config", LOCAL_NETS, ids=label)
def test_translation(arch: str, config: NetConfig) -> None:
    """A picture that moves by ``multiple`` moves its denoised version along."""
    # The posterior of a hybrid is that of the picture, which changes at its borders.
    net = make(replace(config, num_classes=1) if arch == "hybrid" else config, arch, double=True)
    config = net.config
    step = config.multiple
    margin = -(-config.receptive_radius // step) * step
    side = 2 * margin + 3 * step
    world = pictures(config, 1, (side + step, side + step)).double()
    here, there = world[..., :side, :side], world[..., step:, step:]
    a, b = (net(v, 0.2, fixed(config))[0] for v in (here, there))
    inside = slice(margin + step, side - margin)
    moved = slice(margin, side - margin - step)
    close(a[..., inside, inside], b[..., moved, moved], 1e-10)
    if step > 1:  # and by less than that it does not quite, which the tiling must know
        off = world[..., 1 : side + 1, 1 : side + 1]
        c = net(off, 0.2, fixed(config))[0]
        less = slice(margin + step - 1, side - margin - 1)
        assert (a[..., inside, inside] - c[..., less, less]).abs().max() > 1e-6


# -- the published shape ------------------------------------------------------------------------


def test_published_shape() -> None:
    """ResNet-18 for 32x32 pictures: 11.2 million weights, and as many here within a half."""
    config = NetConfig()
    assert config.widths == (64, 128, 256, 512) and config.blocks == (2, 2, 2, 2)
    assert config.norm == "group" and config.unshuffle == 1
    net = make(config).requires_grad_(False)
    count = sum(p.numel() for p in net.parameters())
    assert 1 / 1.5 < count / 11.17e6 < 1.5, count
    denoised, logits = net(pictures(config, 1, (32, 32)), 0.1)
    assert denoised.shape == (1, 3, 32, 32) and logits.shape == (1, 10)
    assert denoised.isfinite().all()


def test_the_baselines_are_of_comparable_size() -> None:
    """The decoders mirror the adjoint: about twice the weights of a shared trunk."""
    with torch.device("meta"):
        sizes = {
            a: sum(p.numel() for p in REGISTRY[a].module(NetConfig()).parameters())
            for a in REGISTRY
        }
    assert sizes["classifier"] < sizes["gradresnet"] < sizes["unet"] < sizes["hybrid"]
    assert sizes["hybrid"] < 2.2 * sizes["gradresnet"]


@pytest.mark.parametrize(
    "change",
    [
        {"widths": ()},
        {"widths": (8,)},
        {"widths": (8, 0)},
        {"blocks": (1, -1)},
        {"decoder": (1,)},
        {"decoder": (1, -1)},
        {"blocks": (1, 1), "decoder": (1, 10**9)},
        {"blocks": (1, 10**9)},
        {"widths": (8,) * 10**4, "blocks": (1,) * 10**4},
        {"norm": "batch"},
        {"groups": 3, "norm": "group"},
        {"activation": "relu"},
        {"down": 3},
        {"num_classes": 0},
        {"channels": 0},
        {"unshuffle": 0},
        {"head": 0},
        {"side": -1.0},
        {"side": math.nan},
        {"side": math.inf},
    ],
    ids=lambda change: ",".join(change),
)
def test_impossible_shapes(change: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(change))):
        replace(TINY, **change)
