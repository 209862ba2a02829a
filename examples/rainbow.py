"""How much of a small network is the covariances of its weights? The experiment of Guth, Menard,
Rochette and Mallat (2023, arXiv 2305.18512) on gray CIFAR-10, from training to its controls.

python examples/rainbow.py cifar10-train/ --test cifar10-val/

Two networks without biases learn ten classes for five epochs. New ones are drawn from the
covariances of their weights, layer by layer, each aligned with the old one on training pictures.
Controls: drawn without alignment; drawn white, of the same energy; twice as wide. Published for the
10,000 test pictures: 42.4 -> 30.6 % (MLP), 57.4 -> 40.3 % (CNN).

It takes about five minutes of one CPU core, a third of them to train.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from cdnctl.analysis.rainbow import arc_cosine, gaussian, resample, white
from cdnctl.core.metrics import accuracy
from cdnctl.training.datasets import Pictures, Source, find_pictures

SIDE, BATCH, RATE, MOMENTUM = 32, 128, 0.01, 0.9
# Of ImageNet, by channel, and what a channel weighs in gray: as in the published preprocessing.
MEAN, STD, GRAY = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225), (0.299, 0.587, 0.114)
WIDTHS = (64, 256, 1024, 4096)  # of random layers whose kernels are compared with the limit

Set = tuple[Tensor, Tensor]
"""Gray pictures (n, 1, 32, 32) and their classes (n,)."""


def mlp(classes: int) -> nn.Sequential:
    """0.66 million multiply-adds a picture."""
    return nn.Sequential(
        nn.Flatten(), nn.Linear(SIDE**2, 512, bias=False), nn.ReLU(),
        nn.Linear(512, 256, bias=False), nn.ReLU(), nn.Linear(256, classes, bias=False),
    )  # fmt: skip


def cnn(classes: int) -> nn.Sequential:
    """1.4 million multiply-adds a picture."""
    return nn.Sequential(
        nn.Conv2d(1, 32, 5, stride=2, bias=False), nn.ReLU(),
        nn.Conv2d(32, 64, 5, stride=2, bias=False), nn.ReLU(),
        nn.Flatten(), nn.Linear(64 * 5**2, classes, bias=False),
    )  # fmt: skip


NETWORKS = {"MLP": mlp, "CNN": cnn}


def read(sources: Sequence[Source], classes: Sequence[str]) -> Set:
    """Pictures, which must be of 32 x 32 pixels, in gray."""
    found = Pictures.load(sources, classes, torch.device("cpu"))
    if not bool((found.sizes == SIDE).all()) or bool((found.labels < 0).any()):
        raise SystemExit(f"give pictures of {SIDE} x {SIDE} pixels in class folders")
    mean, std, share = (torch.tensor(v).view(1, 3, 1, 1) for v in (MEAN, STD, GRAY))
    scale = np.iinfo(np.uint8).max
    parts = found.buffer.view(-1, 3, SIDE, SIDE).split(5000)
    gray = [((p / scale - mean) / std * share).sum(1, keepdim=True) for p in parts]
    return torch.cat(gray), found.labels


def train(net: nn.Module, x: Tensor, labels: Tensor, epochs: int) -> None:
    """By SGD on the cross-entropy, at one rate, without augmentation or decay."""
    optimiser = torch.optim.SGD(net.parameters(), lr=RATE, momentum=MOMENTUM)
    for _ in range(epochs):
        for rows in torch.randperm(len(x)).split(BATCH):
            optimiser.zero_grad()
            nn.functional.cross_entropy(net(x[rows]), labels[rows]).backward()
            optimiser.step()
    net.eval().requires_grad_(False)


def share(net: nn.Module, test: Set) -> float:
    """Per cent of pictures that are told rightly."""
    x, labels = test
    return 100 * accuracy(torch.cat([net(part) for part in x.split(1000)]), labels)


def controls() -> Iterator[tuple[str, dict[str, object]]]:
    """What is tried, and how `resample` is called for it."""
    yield "drawn", {}
    yield "drawn, twice as wide", {"widen": 2}
    yield "drawn white", {"draw": white}
    yield "drawn, not aligned", {"aligned": False}
    yield "not drawn (must be equal)", {"draw": lambda rows, count, generator: rows}


def report(build: Callable[[int], nn.Sequential], data: Set, test: Set, args: object) -> nn.Module:
    """Train a network and print what is left of it in every control; the network."""
    epochs, draws, frames, seed = (getattr(args, k) for k in ("epochs", "draws", "frames", "seed"))
    torch.manual_seed(seed)
    net = build(int(data[1].max()) + 1)
    began = time.process_time()
    train(net, *data, epochs)
    print(
        f"| trained, {time.process_time() - began:.0f} s | {share(net, test):.1f} % | |", flush=True
    )
    batches = list(data[0][torch.randperm(len(data[0]))[:frames]].split(500))
    for name, options in controls():
        made = [
            resample(net, batches, torch.Generator().manual_seed(seed + k), **options)  # type: ignore[arg-type]
            for k in range(draws)
        ]
        found = np.array([share(m.network, test) for m in made])
        explained = " / ".join(f"{100 * e:.1f}" for e in np.mean([m.explained for m in made], 0))
        spread = f" +- {found.std(ddof=1):.1f}" if draws > 1 else ""
        print(f"| {name} | {found.mean():.1f}{spread} % | {explained} % |", flush=True)
    return net


def kernel_slope(net: nn.Module, x: Tensor, draws: int) -> tuple[float, list[float]]:
    """How the kernel of a drawn first layer nears the limit of its width: the slope over the
    logarithm of the width (-1/2 is expected), and relative errors."""
    rows = next(net.parameters()).double().flatten(1)
    x = x.flatten(1).double()
    want = arc_cosine(x, x, rows.T @ rows)
    errors = []
    for width in WIDTHS:
        square = 0.0
        for k in range(draws):
            drawn = gaussian(rows, width, torch.Generator().manual_seed(k))
            z = (x @ drawn.T).relu()
            square += float((z @ z.T - want).square().sum()) / draws
        errors.append((square / float(want.square().sum())) ** 0.5)
    slope = float(np.polyfit(np.log(WIDTHS), np.log(errors), 1)[0])
    return slope, errors


def main() -> None:
    """Print a table for each network."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n\n")[0])
    parser.add_argument("train", type=Path, nargs="+", help="folders or zip files of class folders")
    parser.add_argument("--test", type=Path, required=True, help="other pictures of these classes")
    parser.add_argument("--epochs", type=int, default=5)
    parser.add_argument("--draws", type=int, default=5, help="networks drawn from one")
    parser.add_argument("--frames", type=int, default=10_000, help="pictures to align on")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    sources = [source for root in args.train for source in find_pictures(root)]
    labels = sorted({str(source.label) for source in sources})
    data = read(sources, labels)
    test = read(find_pictures(args.test, "val") or find_pictures(args.test), labels)
    print(f"{len(data[0])} pictures to learn from, {len(test[0])} to try, seed {args.seed}")
    for name, build in NETWORKS.items():
        print(f"\n| {name} | right | energy that alignment explains, by layer |\n|---|---|---|")
        net = report(build, data, test, args)
        if name == "MLP":
            first = net
    slope, errors = kernel_slope(first, test[0][:100], 40)
    listed = ", ".join(f"{100 * e:.1f} %" for e in errors)
    widths = " / ".join(map(str, WIDTHS))
    print(f"\nKernel of the MLP's first layer, drawn {widths} wide, against its limit:")
    print(f"errors {listed}, slope {slope:.3f}")
    print(f"{time.process_time() / 60:.1f} minutes of CPU")


if __name__ == "__main__":
    main()
