"""The benchmark: that it compares like with like. How fast anything is, no test can say."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import torch
from processes import Run
from tiny import picture, save_tiny, write

from cdnctl import images
from cdnctl.checkpoints import read_header
from cdnctl.core.metrics import picture_psnr
from cdnctl.core.noise import noisy_version
from cdnctl.errors import CdnctlError
from cdnctl.measure import benchmark, gradient, methods
from cdnctl.models import NetConfig
from cdnctl.models.gradresnet import GradResNet
from cdnctl.training.config import DataConfig, TrainConfig
from cdnctl.training.objectives import joint
from cdnctl.training.step import loss_and_gradients

pytestmark = pytest.mark.slow  # methods run in processes of their own

TASKS = {"denoise", "train"}
SHAPE = NetConfig(num_classes=3, widths=(4, 8), blocks=(1, 1), norm="pixel", head=8)


# -- methods, each in a process of its own ------------------------------------------------------


@pytest.mark.slow
def test_quality_is_that_of_the_method(tmp_path: Path, cdnctl: Run) -> None:
    """Each method as if called here, on the same noisy pictures; memory is one per method."""
    folder = tmp_path / "in"
    for i in range(2):
        write(folder / f"{i}.png", picture(40, 30 + i, top=20 * i))
    options = ("--methods", "wavelet,total variation", "--sigma", "15,50")
    done = cdnctl("bench", "quality", folder, *options, "--json")
    assert done.code == 0
    (rows,) = done.records
    assert [(r["method"], r["sigma"]) for r in rows] == [
        ("wavelet", 15), ("wavelet", 50), ("total variation", 15), ("total variation", 50),
    ]  # fmt: skip
    for row in rows:
        psnrs = []
        for i in range(2):
            clean = images.read(folder / f"{i}.png").pixels
            noisy = noisy_version(clean, row["sigma"] / 255, f"/{i}.png", 0)
            result = methods.method(row["method"])(noisy, row["sigma"] / 255)
            psnrs.append(picture_psnr(np.clip(result, 0, 1), clean))
        assert row["psnr"] == pytest.approx(np.mean(psnrs), abs=1e-6)
        assert row["seconds_per_megapixel"] > 0
    for two in (rows[:2], rows[2:]):
        assert two[0]["peak_mb"] == two[1]["peak_mb"]


@pytest.mark.slow
@pytest.mark.parametrize("name", methods.YARDSTICKS)
def test_yardsticks_in_tiles_do_the_work_of_the_whole(name: str) -> None:
    stack = methods.PlainStack(*methods.YARDSTICKS[name])
    noisy = np.random.default_rng(0).random((333, 401, 3), np.float32)
    whole = torch.nn.functional.pad(torch.from_numpy(noisy).permute(2, 0, 1), (0, 1, 0, 1))
    if stack.fold == 1:
        whole = whole[:, :-1, :-1]
    with torch.no_grad():
        expected = stack.layers(whole[None])[0, :, :333, :401].permute(1, 2, 0).numpy()
    np.testing.assert_allclose(stack.run(noisy, 0.1), expected, atol=1e-5)


def test_models_keep_the_samples_of_a_picture() -> None:
    """Whole numbers come back as such: floats in their place would count as memory."""
    noisy = np.random.default_rng(0).integers(0, 256, (48, 40, 3), np.uint8)
    assert methods.method("photo")(noisy, 0.1).dtype == np.uint8


@pytest.mark.slow
def test_peak_memory_is_that_of_the_method() -> None:
    """It holds a picture and a result at least, and knows nothing of what this process holds."""
    ballast = np.ones((500, 1000, 1000), np.uint8)
    small, large = benchmark.cost(["wavelet"], [0.1, 2.0], threads=1)
    assert small.peak_mb < large.peak_mb < ballast.nbytes / 1e6
    assert large.peak_mb > 2 * 2e6 * 3 * 4 / 1e6


@pytest.mark.slow
def test_a_method_that_fails_or_dies() -> None:
    with (
        benchmark._worker("wavelet", 1) as run,
        pytest.raises(CdnctlError, match=r"'wavelet'.*8 x 16.*IndexError"),
    ):
        run(np.zeros((16, 8), np.float32), 0.1)
    with benchmark._worker("wavelet", 1) as run:
        (worker,) = workers()
        worker.kill()
        with pytest.raises(CdnctlError, match=r"'wavelet'.*8 x 16.* died"):
            run(np.zeros((16, 8, 3), np.float32), 0.1)
    assert not workers()


def workers() -> list[psutil.Process]:
    children = psutil.Process().children()
    return [p for p in children if any("spawn_main" in part for part in p.cmdline())]


@pytest.mark.slow
def test_plot(tmp_path: Path, cdnctl: Run) -> None:
    write(tmp_path / "in" / "a.png", picture(20, 24))
    plot = tmp_path / "plot.png"
    plot.write_text("precious")
    options = ("--methods", "wavelet", "--sigma", "10:50:20", "--json", "--plot")
    done = cdnctl("bench", "quality", "in", *options, plot)
    assert done.code == 2 and "plot.png" in done.err and "--overwrite" in done.err
    assert plot.read_text() == "precious"
    assert cdnctl("bench", "quality", "in", *options, "plot.xyz").code == 2
    done = cdnctl("bench", "quality", "in", *options, plot, "--overwrite")
    assert done.code == 0 and [row["sigma"] for row in done.records[0]] == [10, 30, 50]
    pixels = images.read(plot).pixels
    assert pixels.shape[1] > 2 * pixels.shape[0], "two panels side by side"
    blue = (np.rint(255 * pixels) == (31, 119, 180)).all(2)
    halves = np.array_split(blue, 2, axis=1)
    assert all(half.any() for half in halves), "the method is in both, in the first colour"


# -- the price of the gradient ------------------------------------------------------------------


def double(value: Any) -> Any:
    return value.double() if torch.is_tensor(value) and value.is_floating_point() else value


def test_all_ways_compute_the_same() -> None:
    """By autograd and written out: the same picture, the same loss, the same gradients."""
    torch.manual_seed(0)
    ours, naive = GradResNet(SHAPE).double(), gradient.ByAutograd(SHAPE).double()
    naive.load_state_dict(ours.state_dict())
    config = TrainConfig(data=DataConfig(patch=8, batch=8))
    batch = gradient._batch(config.data, 3, 3)
    batch = type(batch)(*(double(value) for value in vars(batch).values()))
    assert batch.condition.any() and not batch.condition.all()

    results = [loss_and_gradients(joint, net, batch, config) for net in (ours, naive)]
    torch.testing.assert_close(*(parts for parts, _ in results), rtol=1e-9, atol=1e-9)
    for got, want in zip(*(gradients for _, gradients in results), strict=True):
        assert want.abs().max() > 0
        torch.testing.assert_close(got, want, rtol=1e-8, atol=1e-9)
    with torch.no_grad():
        got, want = (net.correction(batch.clean, batch.sigma)[0] for net in (ours, naive))
    torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-9)
    assert not want.requires_grad, "a picture that is not trained on holds no graph"


@pytest.mark.parametrize("norm", ["pixel", "group"])
def test_ratios(tmp_path: Path, norm: str) -> None:
    header = read_header(save_tiny(tmp_path / "tiny.safetensors", norm=norm, patch=16))
    rows = list(gradient.ratios(header, pixels=2**10, rounds=3))
    keys = [(r.task, r.precision, r.way) for r in rows]
    assert len(set(keys)) == len(keys) and {r.model for r in rows} == {"tiny"}
    for precision in {r.precision for r in rows}:
        denoise, train = (
            {r.way: r for r in rows if (r.task, r.precision) == (task, precision)}
            for task in sorted(TASKS)
        )
        assert denoise.keys() == train.keys() | {gradient.FORWARD} and len(denoise) == 4
        assert denoise[gradient.FORWARD].ratio == train[gradient.UNET].ratio == 1
        for ways in (denoise, train):
            (reference,) = {r.reference for r in ways.values()}
            assert all(r.seconds_per_megapixel > 0 for r in ways.values())
            assert ways[reference].ratio == 1


def test_ways_take_turns() -> None:
    calls: list[str] = []
    seconds = gradient.alternate(
        {"a": lambda: calls.append("a"), "b": lambda: calls.append("b")}, 3
    )
    assert calls == ["a", "b"] * 4, "three rounds after one that warms up"
    assert {way: len(times) for way, times in seconds.items()} == {"a": 3, "b": 3}


@pytest.mark.slow
def test_gradient_command(cdnctl: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    few = partial(gradient.ratios, pixels=2**12, rounds=1)
    monkeypatch.setattr(gradient, "ratios", few)
    done = cdnctl("bench", "gradient", "--json", "--model", "cifar10")
    assert done.code == 0
    (rows,) = done.records
    assert {r["model"] for r in rows} == {"cifar10"} and {r["task"] for r in rows} == TASKS
    done = cdnctl("bench", "gradient")
    assert done.code == 0 and done.text.count("photo") == len(rows)
    for way in {r["way"] for r in rows}:
        assert way in done.text, "names fit into a terminal of 80 columns"


@pytest.mark.parametrize(
    "options, named",
    [
        (("gradient", "--methods", "wavelet"), "no such option: --methods"),
        (("cost", "--megapixels", "many"), "'many'"),
        (("cost", "--methods", "photo,nonsense"), "'nonsense'"),
        (("quality", ".", "--methods", methods.REFERENCE), "no quality"),
        (("quality", "in", "--sigma", "0:50"), "'0:50'"),
        (("quality", "in", "--sigma", "0:50:25"), "sigma 0"),
        (("quality",), "missing argument"),
        (
            ("pictures",),
            "the commands of cdnctl bench are quality, cost, folders, gradient, repair, "
            "confidence, learning",
        ),
    ],
)
def test_usage_errors(tmp_path: Path, cdnctl: Run, options: tuple[str, ...], named: str) -> None:
    write(tmp_path / "a.png")
    done = cdnctl("bench", *options)
    assert done.code == 2 and named in done.err and not done.out
