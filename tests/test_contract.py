"""Every architecture keeps one contract, those that are registered and some made up here.

The made-up ones are what nobody has yet: a classifier that cannot denoise, and one that must see
whole pictures; a denoiser that knows no classes; a model of two networks at two scales; a model
of one channel. All that they have in common with the others is the contract.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from test_models import check_gradients, close
from tiny import noisy_picture, picture, write
from torch import Tensor, nn

from cdnctl.api import Model, load
from cdnctl.checkpoints import Header, build_module, load_model, save_model, weights_hash
from cdnctl.core import joint
from cdnctl.core.joint import Corrector, HasClassFeatures, HasPosterior, Joint, per_sample
from cdnctl.errors import ConfigError, ImageError, UsageError, WeightsError
from cdnctl.images import Image
from cdnctl.measure.evaluate import evaluate, find_samples
from cdnctl.models import REGISTRY, Architecture, Mixture, Needs, NetConfig, Network, Whole
from cdnctl.models.baselines import UNet
from cdnctl.models.gradresnet import GradResNet
from cdnctl.models.network import resolved
from cdnctl.restore import Settings, View, classify, restore
from cdnctl.training import datasets
from cdnctl.training.config import parse
from cdnctl.training.loop import train

SIGMA = torch.tensor([0.1, 0.35])


# -- a classifier that cannot denoise -------------------------------------------------------------


@dataclass(frozen=True)
class ColourConfig:
    num_classes: int
    features: int = 6


class Colours(Network):
    """Looks at the colour of each pixel, and at nothing else."""

    def __init__(self, config: ColourConfig):
        super().__init__(Needs(3, 4 * config.features, margin=0), config.num_classes)
        self.mix = nn.Conv2d(3, config.features, 1)
        self.linear = nn.Linear(config.features, config.num_classes)

    def class_features(self, y: Tensor, sigma: Tensor | float) -> Tensor:
        weight, bias = (p.to(y.dtype) for p in (self.mix.weight, self.mix.bias))
        return F.silu(F.conv2d(y / (1 + per_sample(sigma, y)), weight, bias))

    def logits_of(self, mean_features: Tensor) -> Tensor:
        weight, bias = (p.to(mean_features.dtype) for p in (self.linear.weight, self.linear.bias))
        return F.linear(mean_features, weight, bias)

    def logits(self, y: Tensor, sigma: Tensor | float) -> Tensor:
        return self.logits_of(self.class_features(y, sigma).mean((2, 3)))


# -- a classifier that must see whole pictures, and has no features that could be averaged --------


@dataclass(frozen=True)
class LayoutConfig:
    num_classes: int = 2
    grid: int = 3


class Layout(Network):
    """Looks where in the picture it is bright."""

    def __init__(self, config: LayoutConfig):
        super().__init__(Needs(3, 12), config.num_classes)
        self.grid = config.grid
        self.linear = nn.Linear(config.grid**2, config.num_classes)

    def logits(self, y: Tensor, sigma: Tensor | float) -> Tensor:
        map_ = F.adaptive_avg_pool2d(y.mean(1) / (1 + per_sample(sigma, y)[:, 0]), self.grid)
        weight, bias = (p.to(y.dtype) for p in (self.linear.weight, self.linear.bias))
        return F.linear(map_.flatten(1), weight, bias)


# -- a denoiser that knows no classes -------------------------------------------------------------


@dataclass(frozen=True)
class BlurConfig:
    reach: int = 2  # pixels
    prior: float = 0.1  # standard deviation of what is sharp

    def __post_init__(self) -> None:
        if self.reach < 0:
            raise ValueError(f"reach is {self.reach}, but must not be negative")


class Blur(Network):
    """D = y + gain (blurred y - y), the more noise the more of it."""

    def __init__(self, config: BlurConfig):
        super().__init__(Needs(3, 36, margin=config.reach))
        self.reach, self.prior = config.reach, config.prior
        side = 2 * config.reach + 1
        self.kernel = nn.Parameter(torch.full((1, 1, side, side), 1 / side**2))

    def correction(
        self,
        y: Tensor,
        sigma: Tensor | float,
        mixture: Mixture = None,
        whole: Whole | None = None,
    ) -> tuple[Tensor, Tensor]:
        kernel = self.kernel.to(y.dtype).expand(3, -1, -1, -1)
        square = per_sample(sigma, y).square()
        blurred = F.conv2d(y, kernel, padding=self.reach, groups=3)
        return square / (square + self.prior**2) * (blurred - y), y.new_zeros(len(y), 0)


# -- a model made of two networks at two scales ---------------------------------------------------


@dataclass(frozen=True)
class PyramidConfig:
    coarse: NetConfig
    fine: NetConfig
    num_classes: int = 3


class Pyramid(Network):
    """A joint density of pictures of half the size, and a UNet for what they leave out."""

    def __init__(self, config: PyramidConfig):
        coarse = GradResNet(replace(config.coarse, num_classes=config.num_classes))
        fine = UNet(config.fine)
        a, b = coarse.needs, fine.needs
        assert a.margin is not None and b.margin is not None
        multiple = max(2 * a.multiple, b.multiple)
        needs = Needs(
            a.channels,
            a.bytes_per_pixel // 4 + b.bytes_per_pixel,
            multiple,
            margin=max(2 * a.margin + 1, b.margin + 1),
            posterior=a.posterior,
        )
        super().__init__(needs, config.num_classes)
        self.coarse, self.fine = coarse, fine

    def halved(self, y: Tensor) -> Tensor:
        """Means of four pixels, whose noise is half as strong; sides are extended."""
        pad = [-n % self.needs.multiple for n in y.shape[-2:]]
        return F.avg_pool2d(F.pad(y, (0, pad[1], 0, pad[0]), "replicate"), 2)

    def correction(
        self,
        y: Tensor,
        sigma: Tensor | float,
        mixture: Mixture = None,
        whole: Whole | None = None,
    ) -> tuple[Tensor, Tensor]:
        half = per_sample(sigma, y).flatten() / 2
        low, logits = self.coarse.correction(self.halved(y), half, mixture, whole)
        fine, _ = self.fine.correction(y, sigma)
        total = resolved(mixture, logits, whole).sum(1).view(-1, 1, 1, 1)
        low = low - total * self.halved(fine)
        up = F.interpolate(low, scale_factor=2.0)[..., : y.shape[2], : y.shape[3]]
        return up + total * fine, logits

    def class_features(self, y: Tensor, sigma: Tensor | float) -> Tensor:
        return self.coarse.class_features(self.halved(y), per_sample(sigma, y).flatten() / 2)

    def logits_of(self, mean_features: Tensor) -> Tensor:
        return self.coarse.logits_of(mean_features)

    def logits(self, y: Tensor, sigma: Tensor | float) -> Tensor:
        return self.logits_of(self.class_features(y, sigma).mean((2, 3)))


TINY: NetConfig = REGISTRY["gradresnet"].example
PYRAMID = PyramidConfig(coarse=replace(TINY, down=2), fine=replace(TINY, widths=(4,), blocks=(1,)))

MADE_UP = {
    "colours": Architecture(ColourConfig, Colours, ColourConfig(3), "classifying"),
    "layout": Architecture(LayoutConfig, Layout, LayoutConfig(3), "classifying"),
    "blur": Architecture(BlurConfig, Blur, BlurConfig(), "denoising"),
    "pyramid": Architecture(PyramidConfig, Pyramid, PYRAMID, "joint"),
    "one channel": Architecture(NetConfig, GradResNet, replace(TINY, channels=1), "joint"),
}
EVERY = {**REGISTRY, **MADE_UP}
each = pytest.mark.parametrize("arch", EVERY)


@pytest.fixture(autouse=True)
def registered(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, line in MADE_UP.items():
        monkeypatch.setitem(REGISTRY, name, line)  # type: ignore[arg-type]


def classes_of(arch: str) -> tuple[str, ...]:
    return ("cat", "dog", "emu")[: getattr(EVERY[arch].example, "num_classes", 0)]


def save_example(path: Path, arch: str) -> Path:
    """Weights of the architecture's example, random throughout: gains and biases too."""
    shape = asdict(EVERY[arch].example)
    header = Header("tiny", arch, shape, classes_of(arch), (0.0, 0.4), 64, version="0")
    torch.manual_seed(0)
    state = build_module(header).state_dict()
    torch.manual_seed(1)
    save_model(path, {k: v + 0.1 * torch.randn_like(v) for k, v in state.items()}, header)
    return path


@pytest.fixture
def model(arch: str, tmp_path: Path) -> Model:
    return load(save_example(tmp_path / "tiny.safetensors", arch))


@pytest.fixture
def net(model: Model) -> Any:
    return model.module


def pictures(net: Network, count: int = 2, size: tuple[int, int] = (9, 11)) -> Tensor:
    g = torch.Generator().manual_seed(1)
    return 0.5 + 0.3 * torch.randn(count, net.needs.channels, *size, generator=g)


def outputs(net: Network, y: Tensor, sigma: Tensor | float) -> dict[str, Tensor]:
    """Everything that a network can say."""
    found = {}
    if isinstance(net, Corrector):
        found["correction"], found["logits too"] = net.correction(y, sigma)
    if isinstance(net, HasPosterior):
        found["logits"] = net.logits(y, sigma)
    if isinstance(net, Joint):
        found["log_joint"] = net.log_joint(y, sigma)
    return found


# -- networks -------------------------------------------------------------------------------------


@each
def test_an_example_is_small_and_can_do_something(arch: str, net: Any) -> None:
    line = EVERY[arch]
    assert isinstance(line.example, line.config) and line.config.__dataclass_params__.frozen
    assert isinstance(net, Corrector | HasPosterior)
    assert isinstance(net, Corrector) or not isinstance(net, Joint)
    assert sum(p.numel() for p in net.parameters()) < 10_000
    assert net.needs.sigma_range == (0.0, 0.4) and net.compute_dtype is None
    assert isinstance(net, HasPosterior) <= (net.num_classes > 0)
    knows = any(f.name == "num_classes" for f in fields(line.config))
    assert net.num_classes == (line.example.num_classes if knows else 0)


@each
def test_any_size(net: Any) -> None:
    c, k = net.needs.channels, net.num_classes
    for size in ((1, 1), (1, 7), (5, 1), (2, 3), (16, 16), (13, 18), (3, 40)):
        for count in (1, 3):
            for name, out in outputs(net, pictures(net, count, size), 0.2).items():
                assert out.shape == ((count, c, *size) if name == "correction" else (count, k))
                assert out.dtype is torch.float32 and out.isfinite().all()


@each
def test_class_features_lie_on_the_cells(net: Any) -> None:
    if isinstance(net, HasClassFeatures):
        cell = net.needs.multiple
        y = pictures(net, 2, (3 * cell, 2 * cell))
        features = net.class_features(y, SIGMA)
        assert features.shape == (2, features.shape[1], 3, 2)
        close(net.logits_of(features.mean((2, 3))), net.logits(y, SIGMA), 1e-5)
        close(net.logits_of(features.mean((2, 3))[0]), net.logits(y, SIGMA)[0], 1e-5)


@each
def test_corrections_are_linear_in_the_mixture(net: Any) -> None:
    """And without one they are those of the posterior."""
    if not isinstance(net, Corrector) or not isinstance(net, HasPosterior):
        return
    y, k = pictures(net), net.num_classes
    parts = torch.stack([net.correction(y, SIGMA, e)[0] for e in torch.eye(k)], 1)
    for w in (net.logits(y, SIGMA).softmax(1), torch.randn(2, k), torch.randn(2, k)):
        mixed = (w[:, :, None, None, None] * parts).sum(1)
        close(net.correction(y, SIGMA, w)[0], mixed, 1e-5)
        close(net.correction(y, SIGMA, lambda logits, w=w: w)[0], mixed, 1e-5)
    close(net.correction(y, SIGMA)[0], net.correction(y, SIGMA, lambda f: f.softmax(1))[0], 1e-5)
    close(net.correction(y, SIGMA)[1], net.logits(y, SIGMA), 1e-5)


@each
def test_a_large_picture(net: Any) -> None:
    with torch.no_grad():
        for out in outputs(net, pictures(net, 1, (350, 500)), 0.2).values():
            assert out.isfinite().all()


@each
def test_finite_gradients(net: Any) -> None:
    """At extreme inputs, too: flat, black, far out of range, without noise, of one pixel."""
    net.requires_grad_(True)
    flat = torch.full((1, net.needs.channels, 8, 8), 0.5)
    for y in (flat, flat * 0, flat * 20, flat[..., :1, :1], pictures(net)):
        for sigma in (0.0, 1e-3, 0.2, 1.0):
            said = outputs(net, y, sigma)
            said.pop("log_joint", None)
            loss = sum(out.square().sum() / out.shape[0] for out in said.values())
            gradients = torch.autograd.grad(
                loss, list(net.parameters()), allow_unused=True, materialize_grads=True
            )
            assert all(g.isfinite().all() for g in gradients)
            if isinstance(net, Corrector):
                assert joint.score(net, y, sigma).isfinite().all()


class Outputs(nn.Module):
    """Everything that a network says of a picture, as a module's output."""

    def __init__(self, net: Network):
        super().__init__()
        self.net = net

    def forward(self, y: Tensor, sigma: Tensor) -> tuple[Tensor, ...]:
        return tuple(out for out in outputs(self.net, y, sigma).values() if out.numel())


@pytest.mark.slow
@each
def test_training_gradients(net: Any) -> None:
    net = net.double().requires_grad_(True)
    y = pictures(net, 1, (4, 6)).double().requires_grad_()
    check_gradients(Outputs(net), y, torch.tensor([0.3]).double())


@each
def test_batch_mates_do_not_matter(net: Any) -> None:
    y = pictures(net, 4)
    sigma = torch.tensor([0.02, 0.1, 0.3, 0.9])
    together = outputs(net, y, sigma)
    for i in range(4):
        for name, part in outputs(net, y[i : i + 1], sigma[i].item()).items():
            close(part, together[name][i : i + 1], 1e-5)
    alike = outputs(net, y, 0.3)
    for name, whole in outputs(net, y, torch.full((4,), 0.3)).items():
        close(alike[name], whole, 1e-6)


@each
@pytest.mark.parametrize("requires_grad", [False, True])
def test_the_caller_is_left_alone(net: Any, requires_grad: bool) -> None:
    before = pictures(net)
    y = before.clone().requires_grad_(requires_grad)
    want = {k: v.detach() for k, v in outputs(net, y, SIGMA).items()}
    with torch.no_grad():
        for name, out in outputs(net, y, SIGMA).items():
            assert torch.equal(out, want[name])
        assert not torch.is_grad_enabled()
    assert torch.equal(y.detach(), before)
    assert y.requires_grad is requires_grad and y.grad is None and y.is_leaf
    assert all(p.grad is None for p in net.parameters())
    strided = before.permute(0, 1, 3, 2).contiguous().permute(0, 1, 3, 2)
    for name, out in outputs(net, strided, SIGMA).items():
        close(out, want[name], 1e-4)


@each
def test_dtype_follows_the_input(net: Any) -> None:
    y = pictures(net)
    narrow = outputs(net, y, SIGMA.double())
    for name, wide in outputs(net, y.double(), SIGMA).items():
        assert narrow[name].dtype is torch.float32 and wide.dtype is torch.float64
        close(wide.float(), narrow[name], 1e-4)


@each
def test_half_precision_inside(net: Any) -> None:
    """In bf16 the trunk alone is coarse: what comes out keeps its type."""
    y = pictures(net)
    want = outputs(net, y, SIGMA)
    net.compute_dtype = torch.bfloat16
    for name, got in outputs(net, y, SIGMA).items():
        assert got.dtype is torch.float32
        if name != "log_joint":
            close(got, want[name], 0.1)


# -- files ----------------------------------------------------------------------------------------


@each
def test_save_and_load_to_the_bit(arch: str, tmp_path: Path) -> None:
    shape = asdict(EVERY[arch].example)
    header = Header(arch, arch, shape, classes_of(arch), (0.0, 0.25), 16)
    torch.manual_seed(0)
    net = build_module(header).eval()
    path = tmp_path / "net.safetensors"
    save_model(path, net.state_dict(), header)
    again, read = load_model(path)
    assert (read.arch, read.classes) == (header.arch, header.classes)
    assert type(again) is EVERY[arch].module and not again.training
    assert again.needs == net.needs
    first = weights_hash(path)
    for key, value in net.state_dict().items():
        assert torch.equal(again.state_dict()[key], value), key
        save_model(path, again.state_dict() | {key: value + 1}, header)
        # Even of a tensor that is a single number; some are empty.
        assert (weights_hash(path) != first) == (value.numel() > 0), key
    y = pictures(net)
    want = outputs(net, y, SIGMA)
    for name, got in outputs(again, y, SIGMA).items():
        assert torch.equal(got, want[name]) and not got.requires_grad


@pytest.mark.parametrize(
    ("arch", "shape", "message"),
    [
        ("colours", {}, "model lacks num_classes"),
        ("colours", {"num_classes": 3, "colour": 1}, "unknown key 'colour' in model"),
        ("blur", {"reach": -2}, "model: reach is -2, but must not be negative"),
        ("blur", {"prior": [1.0]}, r"model\.prior is \[1.0\], but must be a number"),
        ("pyramid", {"coarse": 3, "fine": {}}, r"model\.coarse is 3, but must be a section"),
        ("pyramid", {"coarse": {"depth": 3}, "fine": {}}, "unknown key 'depth' in model.coarse"),
        ("pyramid", {"coarse": {"widths": []}, "fine": {}}, r"model\.coarse: widths"),
        ("pyramid", {"coarse": {}}, "model lacks fine"),
    ],
)
def test_shapes_that_cannot_be(arch: str, shape: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        build_module(Header("x", arch, shape, (), (0.0, 0.4), 64))


# -- what is built on a model ---------------------------------------------------------------------


def shown(model: Model, height: int, width: int) -> np.ndarray:
    return noisy_picture(height, width, model.needs.channels)


def exact(pixels: np.ndarray) -> Image:
    return Image.of(pixels, np.float32)


@each
def test_denoise_or_a_reason_why_not(model: Model) -> None:
    y = shown(model, 20, 24)
    if not isinstance(model.module, Corrector):
        for refused in (lambda: restore(exact(y), model, Settings(0.1)), lambda: model(y, 0.1)):
            with pytest.raises(UsageError, match=r"model 'tiny' \(.*\) cannot denoise"):
                refused()
        return
    result = restore(exact(y), model, Settings(0.1)).image.samples
    assert result.shape == y.shape and not np.array_equal(result, y)
    np.testing.assert_allclose(y + View(model, y, 0.1).correction(), model(y, 0.1), atol=1e-5)
    told = Settings(0.1, target="auto")
    if isinstance(model.module, HasPosterior):
        assert restore(exact(y), model, told).class_change
    else:
        with pytest.raises(UsageError, match=r"model 'tiny' \(.*\) knows no classes"):
            restore(exact(y), model, told)


@each
def test_classify_or_a_reason_why_not(arch: str, model: Model) -> None:
    y = shown(model, 80, 90)
    if not isinstance(model.module, HasPosterior):
        for refused in (lambda: classify(exact(y), model, 0.1), lambda: model.posterior(y, 0.1)):
            with pytest.raises(UsageError, match=r"model 'tiny' \(.*\) cannot classify"):
                refused()
        return
    found = classify(exact(y), model, 0.1)
    assert set(found.posterior) == set(classes_of(arch))
    assert sum(found.posterior.values()) == pytest.approx(1)
    small = model.posterior(shown(model, 20, 24), 0.1)
    assert small.sum() == pytest.approx(1) and small.std() > 0


@each
def test_evaluate(arch: str, model: Model, tmp_path: Path) -> None:
    for name in classes_of(arch) or ("cat",):
        write(tmp_path / name / "a.png", picture(24, 20, model.needs.channels))
    rows = list(evaluate(find_samples(tmp_path, None, model), model, [0.1]))
    assert rows and all(row.error is None for row in rows)
    for row in rows:
        assert (row.psnr is not None) == isinstance(model.module, Corrector)
        assert (row.predicted is not None) == isinstance(model.module, HasPosterior)


@pytest.mark.slow
@each
@torch.no_grad()
def test_tiles_give_what_the_whole_gives(model: Model) -> None:
    net = model.module
    if net.needs.margin is None:
        assert len(View(model, shown(model, 90, 130), 0.1, 40).tiles) == 1
        return
    cell = net.needs.multiple
    height, width = 90 + -90 % cell, 130 + -130 % cell
    pixels = shown(model, height, width)
    whole, view = (View(model, pixels, 0.1, tile) for tile in (1000, 70))
    assert len(whole.tiles) == 1 and len(view.tiles) > 1
    if isinstance(net, HasPosterior):
        close(view.logits(), whole.logits(), 1e-4)
    if isinstance(net, Corrector):
        mixture = torch.linspace(-1, 2, net.num_classes)
        for w in (None, mixture) if isinstance(net, HasPosterior) else (None,):
            np.testing.assert_allclose(view.correction(w), whole.correction(w), atol=1e-5)


@pytest.mark.parametrize("arch", ["one channel"])
def test_colour_is_refused_by_a_gray_model(model: Model, tmp_path: Path) -> None:
    """But for gray that is stored as colour; and by `evaluate` without an end to the rest."""
    gray = noisy_picture(20, 24, 1)
    stored = np.repeat(gray, 3, axis=2)
    want = restore(exact(gray), model, Settings(0.1)).image.samples
    assert np.array_equal(
        restore(exact(stored), model, Settings(0.1)).image.samples, want.repeat(3, 2)
    )
    with pytest.raises(ImageError, match="model 'tiny' is for gray pictures, but this one has 3"):
        restore(exact(noisy_picture(20, 24)), model, Settings(0.1))
    write(tmp_path / "cat" / "a.png", picture(24, 20))
    write(tmp_path / "cat" / "b.png", picture(24, 20, 1))
    rows = list(evaluate(find_samples(tmp_path, None, model), model, [0.1]))
    assert [row.error is None for row in rows] == [False, True]


@pytest.mark.parametrize("arch", ["one channel"])
def test_a_gray_model_sees_gray_as_it_is(
    model: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In one channel, and told the level that the noise has, stored as gray or as colour."""
    net, seen = model.module, []
    correct = net.correction

    def noted(y: Tensor, sigma: Any, *rest: Any, **more: Any) -> Any:
        seen.append((y.shape[1], float(torch.as_tensor(sigma).max())))
        return correct(y, sigma, *rest, **more)

    monkeypatch.setattr(net, "correction", noted)
    for shape in ((20, 24), (300, 240)):
        gray = noisy_picture(*shape, 1)
        restored = restore(exact(gray), model, Settings(0.1))
        restore(exact(gray.repeat(3, -1)), model, Settings(0.1))
        assert restored.told == restored.sigma == 0.1
    assert len(seen) >= 4 and {channels for channels, _ in seen} == {1}
    # Of small pictures the blanks that fill up a batch are told 1.
    assert {round(level, 6) for _, level in seen} <= {0.1, 1.0}


@pytest.mark.parametrize("arch", ["blur"])
def test_a_model_of_other_values_is_no_model_of_pictures(model: Model, tmp_path: Path) -> None:
    path = tmp_path / "field.safetensors"
    save_model(path, model.module.state_dict(), replace(model.header, value_range=(-2.0, 2.0)))
    assert load_model(path)[0].needs.value_range == (-2.0, 2.0)
    with pytest.raises(WeightsError, match="values from -2 to 2, and not of pictures"):
        load(path)


@pytest.fixture
def dataset(tmp_path: Path) -> Iterator[Path]:
    for name in ("cat", "dog", "emu"):
        for i in range(4):
            write(tmp_path / "data" / name / f"{i}.png", picture(20, 26, top=20 * i))
    yield tmp_path / "data"


@pytest.mark.slow
@each
def test_some_steps_of_training(arch: str, dataset: Path, tmp_path: Path) -> None:
    shape = asdict(EVERY[arch].example)
    config = parse(
        {
            "model": {"arch": arch} | {k: v for k, v in shape.items() if k != "num_classes"},
            "data": {"patch": 16, "batch": 4, "holdout": 1},
            "optim": {"steps": 3, "warmup": 1, "lr": 0.01},
            "run": {"validate_every": 2},
        }
    )
    assert train(
        tmp_path / "run", config=config, datasets=[dataset], device=torch.device("cpu")
    ).finished
    trained = load(tmp_path / "run")
    torch.manual_seed(config.run.seed)
    start = build_module(trained.header).state_dict()
    changed = [k for k, v in trained.module.state_dict().items() if not torch.equal(v, start[k])]
    assert changed, "weights stay as they were"
    assert trained.classes == (classes_of(arch) and ("cat", "dog", "emu"))


def test_gray_training_pictures_are_means_of_colours(dataset: Path) -> None:
    sources = datasets.find_pictures(dataset)
    cpu = torch.device("cpu")
    colour, gray = (datasets.Pictures.load(sources, ["cat", "dog", "emu"], cpu, c) for c in (3, 1))
    every = torch.arange(len(gray))
    corner = torch.zeros_like(every)
    some, mean = (p.crops(every, corner, corner, corner, 16) for p in (colour, gray))
    assert mean.shape == (len(sources), 1, 16, 16)
    torch.testing.assert_close(mean, some.mean(1, keepdim=True), atol=0.51 / 255, rtol=0)
