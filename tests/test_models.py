"""Layers know their adjoint, and networks made of them what they claim to be: a score, a density.

What every architecture must do is in test_contract.py.
"""

from __future__ import annotations

import math
from dataclasses import replace
from itertools import product
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call, jvp

from cdnctl.core.joint import (
    Corrector,
    HasClassFeatures,
    HasPosterior,
    Joint,
    Mixture,
    denoise,
    log_marginal,
    per_sample,
    posterior,
    score,
)
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
from cdnctl.models.network import Whole
from cdnctl.models.trunk import ClassHead, NetConfig, Normalised, Trunk

TINY: NetConfig = REGISTRY["gradresnet"].example
K = TINY.num_classes
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


def run(net: Corrector, y: Tensor, sigma: Tensor | float, mixture: Mixture = None) -> Any:
    """The denoised picture and the logits."""
    correction, logits = net.correction(y, sigma, mixture)
    return y + correction, logits


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


def autograd_score(net: Joint, y: Tensor, sigma: Tensor, mixture: Tensor | None) -> Tensor:
    """The score by differentiating ``log_joint``, with nothing written by hand."""
    leaf = y.detach().clone().requires_grad_()
    f = net.log_joint(leaf, sigma)
    total = f.logsumexp(1) if mixture is None else (f * mixture.to(f)).sum(1)
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
    mixture = mixtures(config.num_classes, len(y))[kind]
    exact = make(config, double=True)
    want = autograd_score(exact, y.double(), sigma.double(), mixture)
    w = None if mixture is None else mixture.double()
    close(score(exact, y.double(), sigma.double(), w), want, 1e-10)
    # In single precision sigma * score is of unit scale, and the last digits are lost.
    got = score(make(config), y, sigma, mixture)
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
    fast = run(net, y, sigma)[0]
    got, want = (
        torch.autograd.grad(
            (d - goal).square().sum(), weights, allow_unused=True, materialize_grads=True
        )
        for d in (fast, slow)
    )
    for g, w in zip(got, want, strict=True):
        close(g, w, 1e-9)


# -- the identities, for every network on the trunk ---------------------------------------------

NORMS = ("group", "pixel", "none")
SIGMA = torch.tensor([0.1, 0.35])


def having(*protocols: type) -> list[tuple[str, str]]:
    """Names of the networks on the trunk that have all of that, each with every norm."""
    trunks = {a: r.module for a, r in REGISTRY.items() if r.config is NetConfig}
    found = [a for a, m in trunks.items() if all(issubclass(m, p) for p in protocols)]
    return list(product(found, NORMS))


def test_what_a_module_can_do_is_told_by_what_it_has() -> None:
    everything = {Corrector, HasPosterior, HasClassFeatures, Joint}
    expected = {
        "gradresnet": everything,
        "hybrid": everything - {Joint},
        "classifier": everything - {Joint, Corrector},
        "unet": {Corrector},
    }
    for arch, protocols in expected.items():
        net = make(TINY, arch)
        assert {p for p in everything if isinstance(net, p)} == protocols, arch
        assert {p for p in everything if issubclass(type(net), p)} == protocols, arch


@pytest.mark.parametrize("arch,norm", having(Joint))
def test_identities_of_a_density(arch: str, norm: str) -> None:
    """Tweedie's formula, for the marginal and for every class; in the unit of the picture."""
    net, y = make(replace(TINY, norm=norm), arch), pictures(TINY)
    var = per_sample(SIGMA, y) ** 2
    f = net.log_joint(y, SIGMA)
    assert f.shape == (2, K)
    close(run(net, y, SIGMA)[1].softmax(1), f.softmax(1), 1e-4)
    close(log_marginal(net, y, SIGMA), f.logsumexp(1), 1e-4)
    close(denoise(net, y, SIGMA), y + var * autograd_score(net, y, SIGMA, None), 1e-4)
    for e in torch.eye(K):
        close(denoise(net, y, SIGMA, e), y + var * autograd_score(net, y, SIGMA, e), 1e-4)


@pytest.mark.parametrize("arch,norm", having(Corrector, HasPosterior))
def test_identities_of_a_joint(arch: str, norm: str) -> None:
    net, y = make(replace(TINY, norm=norm), arch), pictures(TINY)
    net, y, sigma = net.double(), y.double(), SIGMA.double()
    var = per_sample(sigma, y) ** 2
    p = posterior(net, y, sigma)
    close(p, run(net, y, sigma)[1].softmax(1), 1e-10)
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


@pytest.mark.parametrize("arch,norm", having(Corrector))
def test_identities_of_a_denoiser(arch: str, norm: str) -> None:
    net, y = make(replace(TINY, norm=norm), arch), pictures(TINY)
    denoised = run(net, y, SIGMA)[0]
    close(denoise(net, y, SIGMA), denoised, 1e-4)
    close(y + per_sample(SIGMA, y) ** 2 * score(net, y, SIGMA), denoised, 1e-4)
    assert (denoised - y).abs().max() > 0.01


@pytest.mark.parametrize("arch,norm", having(HasClassFeatures))
def test_class_features_are_what_the_class_scores_are_made_of(arch: str, norm: str) -> None:
    config = replace(TINY, norm=norm)
    net, y = make(config, arch), pictures(config)
    features = net.class_features(y, SIGMA)
    assert features.shape == (2, config.head, 5, 6)  # 9x11 in cells of 2x2
    logits = net.logits(y, SIGMA)
    close(net.logits_of(features.mean((2, 3))), logits, 1e-5)
    close(net.logits_of(features.mean((2, 3))[0]), logits[0], 1e-5)
    if isinstance(net, Corrector):
        close(run(net, y, SIGMA)[1], logits, 1e-5)


def test_a_unet_knows_no_classes() -> None:
    net, y = make(TINY, "unet"), pictures(TINY)
    for w in mixtures(K, 2).values():
        assert torch.equal(run(net, y, SIGMA, w)[0], run(net, y, SIGMA)[0])
    assert torch.equal(run(net, y, SIGMA)[1], torch.zeros(2, K))


@pytest.mark.slow
@pytest.mark.parametrize("norm", NORMS)
def test_posterior_covariance_is_symmetric(norm: str) -> None:
    net = make(replace(TINY, norm=norm), double=True)
    y = pictures(TINY, 1, (5, 6)).double()
    for w in mixtures(K, 1).values():
        w = None if w is None else w.double()
        slope = torch.autograd.functional.jacobian(lambda t, w=w: run(net, t, 0.2, w)[0], y)
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
    change = (run(net, moved, 0.2)[0] - run(net, y, 0.2)[0]).abs().amax((0, 1)) > 0
    r = config.receptive_radius
    assert change.any() and not change[r + 1 :].any() and not change[:, r + 1 :].any()


@pytest.mark.slow
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
    want = run(net, whole, 0.2, fixed(config))[0][..., top : top + side, left : left + side]
    posterior = run(net, whole, 0.2)[1][0].softmax(0)
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
    a, b = (run(net, v, 0.2, fixed(config))[0] for v in (here, there))
    inside = slice(margin + step, side - margin)
    moved = slice(margin, side - margin - step)
    close(a[..., inside, inside], b[..., moved, moved], 1e-10)
    if step > 1:  # and by less than that it does not quite, which the tiling must know
        off = world[..., 1 : side + 1, 1 : side + 1]
        c = run(net, off, 0.2, fixed(config))[0]
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
    denoised, logits = run(net, pictures(config, 1, (32, 32)), 0.1)
    assert denoised.shape == (1, 3, 32, 32) and logits.shape == (1, 10)
    assert denoised.isfinite().all()


def test_the_baselines_are_of_comparable_size() -> None:
    """The decoders mirror the adjoint: about twice the weights of a shared trunk."""
    with torch.device("meta"):
        sizes = {
            a: sum(p.numel() for p in REGISTRY[a].module(NetConfig()).parameters())
            for a in ("gradresnet", "hybrid", "classifier", "unet")
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
