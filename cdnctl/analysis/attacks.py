"""How far a classifier can be led astray by small changes of a picture.

Robust accuracy is the share of pictures that are classified rightly whatever an attack does
within a ball of a given radius around them. It is an upper bound: a stronger attack
may find what these have missed. Attacks: projected gradient ascent (Madry et al. 2018,
arXiv 1706.06083) in the l-inf and l2 norms, as Thiry and Guth measure it (2024, arXiv
2410.03505), and Square (Andriushchenko et al. 2020, arXiv 1912.00049), which sees no
gradient and so is not fooled by one that leads nowhere. Pictures are in [0, 1] and stay there.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from cdnctl.api import Model
from cdnctl.core.metrics import interval
from cdnctl.core.mirror import mirrored
from cdnctl.core.noise import noised
from cdnctl.errors import UsageError
from cdnctl.grouping import batches
from cdnctl.restore import check_channels
from cdnctl.restore.scale import Shrink

LogPosterior = Callable[[Tensor], Tensor]
"""log p(c | y) in nats, up to a constant: (B, C, H, W) -> (B, K), differentiable."""

NORMS = ("linf", "l2")
SQUARE = "square"  # in the l-inf norm
KINDS = (*NORMS, SQUARE)

GRADIENT_PIXELS = 2**16  # of a batch, all of whose features are kept for the gradient


@dataclass(frozen=True)
class Attack:
    """What is tried, and how hard."""

    kind: str  # "linf" or "l2": by gradient; "square": l-inf without one
    radius: float  # for pixels in [0, 1]; l2: over all pixels and channels

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise UsageError(f"unknown attack {self.kind!r}; known: {', '.join(KINDS)}")
        if not 0 <= self.radius < math.inf:
            raise UsageError(f"radius is {self.radius:g}, but must be a number from 0 up")


@dataclass(frozen=True)
class Budget:
    """How long an attack may try."""

    steps: int = 40  # gradient steps of a restart
    restarts: int = 5
    queries: int = 1000  # of Square: looks at the class scores of a picture


@dataclass(frozen=True)
class Robustness:
    """Accuracy under one attack."""

    attack: Attack | None  # None: clean pictures
    sigma: float  # what the network is told, in [0, 1]
    pictures: int
    correct: int

    @property
    def accuracy(self) -> float:
        """Share of pictures that are classified rightly."""
        return self.correct / self.pictures

    @property
    def interval(self) -> tuple[float, float]:
        """95 % interval of the accuracy, for the draw of pictures."""
        return interval(self.correct, self.pictures)


def project(point: Tensor, x: Tensor, norm: str, radius: float) -> Tensor:
    """The nearest point to ``point`` in [0, 1] and within the radius of ``x``; both like x.

    x: (B, C, H, W) in [0, 1]. Exact for both norms: for l2 it is x + d, clipped, with
    d = s (point - x) and the scale s at which the clipped change is as long as the radius.

    >>> x = torch.tensor([0.5, 0.5]).view(1, 1, 1, 2)
    >>> project(x + torch.tensor([3.0, 4.0]), x, "l2", 0.3125).flatten().tolist()
    [0.6875, 0.75]
    >>> project(x + torch.tensor([3.0, -4.0]), x, "linf", 0.25).flatten().tolist()
    [0.75, 0.25]
    """
    if norm == "linf":
        return torch.minimum(torch.maximum(point, x - radius), x + radius).clamp(0, 1)
    inside = point.clamp(0, 1)
    long = (inside - x).flatten(1).norm(dim=1) > radius
    if not long.any():
        return inside
    d = (point - x).flatten(1)
    room = torch.where(point > x, 1 - x, x).flatten(1)  # before a pixel is clipped
    # The squared length at scale s is sum_i min(s |d_i|, room_i)^2. Sorted by the scale at
    # which they are clipped, the first k pixels count with their room, the others with d.
    limit, order = (room / d.abs()).nan_to_num(math.inf, posinf=math.inf).sort(dim=1)
    clipped = room.square().gather(1, order).cumsum(1)
    free = d.square().gather(1, order).flip(1).cumsum(1).flip(1)
    before = torch.cat([clipped.new_zeros(len(d), 1), clipped[:, :-1]], 1)
    # The first pixel whose limit gives more than the radius is not clipped yet.
    reached = before + limit.square() * free > radius**2
    k = reached.to(torch.int8).argmax(1, keepdim=True)
    squared = (radius**2 - before.gather(1, k)) / free.gather(1, k)
    scale = squared.clamp_min(0).sqrt().view(-1, *[1] * (x.ndim - 1))
    shrunk = (x + scale * d.view_as(x)).clamp(0, 1)
    return torch.where(long.view(scale.shape), shrunk, inside)


def random_start(x: Tensor, norm: str, radius: float, generator: torch.Generator | None) -> Tensor:
    """Uniform in the ball around x, (B, C, H, W), then projected into [0, 1]."""
    if norm == "linf":
        delta = 2 * torch.rand(x.shape, generator=generator) - 1
    else:
        delta = torch.randn(x.shape, generator=generator)
        depth = torch.rand(len(x), generator=generator) ** (1 / x[0].numel())
        delta *= (depth / delta.flatten(1).norm(dim=1)).view(-1, 1, 1, 1)
    return project(x + radius * delta.to(x), x, norm, radius)


def pgd(
    log_posterior: LogPosterior,
    x: Tensor,
    labels: Tensor,
    norm: str,
    radius: float,
    steps: int = 40,
    restarts: int = 5,
    step_size: float | None = None,
    generator: torch.Generator | None = None,
    until_fooled: bool = False,
) -> Tensor:
    """Pictures near x, like x, on which the classifier does worst, by projected gradient ascent.

    x: (B, C, H, W) in [0, 1]; labels: (B,). The cross-entropy is followed by steps of
    ``step_size`` (None: 2.5 radius / steps) along its sign (l-inf) or its normalised
    gradient (l2). The first start is x itself, the others are random. Of all points on
    all paths the one with the highest cross-entropy is kept, but a misclassified one before
    any other: so more steps of one size, or more restarts, never hurt.
    ``until_fooled``: a picture is left alone once it is misclassified.
    """
    size = 2.5 * radius / max(steps, 1) if step_size is None else step_size
    best = x.clone()
    loss = x.new_full((len(x),), -math.inf)
    fooled = torch.zeros_like(labels, dtype=torch.bool)
    for restart in range(restarts):
        start = random_start(x, norm, radius, generator) if restart else x
        rows = torch.arange(len(x), device=x.device)
        point = start
        for step in range(steps + 1):
            if until_fooled:
                point, rows = point[~fooled[rows]], rows[~fooled[rows]]
            if not len(rows):
                break
            value, wrong, gradient = _ascent(log_posterior, point, labels[rows])
            gain = (value > loss[rows]) & (wrong == fooled[rows]) | (wrong & ~fooled[rows])
            better = rows[gain]
            best[better], loss[better], fooled[better] = point[gain], value[gain], wrong[gain]
            if step < steps:
                direction = gradient.sign() if norm == "linf" else _unit(gradient)
                point = project(point + size * direction, x[rows], norm, radius)
    return best


def _ascent(
    log_posterior: LogPosterior, point: Tensor, labels: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Cross-entropy (B,), whether it is misclassified (B,), and the gradient, like point."""
    with torch.enable_grad():
        leaf = point.detach().requires_grad_()
        scores = log_posterior(leaf)
        value = torch.nn.functional.cross_entropy(scores, labels, reduction="none")
        (gradient,) = torch.autograd.grad(value.sum(), leaf)
    return value.detach(), scores.argmax(1) != labels, gradient


def _unit(gradient: Tensor) -> Tensor:
    """Of length 1 each. Where a class is certain, the squares of a gradient would underflow."""
    tiny = torch.finfo(gradient.dtype).tiny
    scaled = gradient / gradient.abs().amax((1, 2, 3), keepdim=True).clamp_min(tiny)
    return scaled / scaled.square().sum((1, 2, 3), keepdim=True).sqrt().clamp_min(tiny)


@torch.no_grad()
def square(
    log_posterior: LogPosterior,
    x: Tensor,
    labels: Tensor,
    radius: float,
    queries: int = 1000,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Pictures within l-inf ``radius`` of x, like x, found by random search on the class scores.

    x: (B, C, H, W) in [0, 1]; labels: (B,). Square (Andriushchenko et al. 2020, algorithms 1
    and 2): every pixel is moved by plus or minus the radius, first in vertical stripes;
    then a random square is tried at a time, with one random sign per channel, and kept if
    the margin of the true class falls. Squares shrink as the search goes on, from 0.8 of the
    picture, as in AutoAttack (Croce and Hein 2020). Misclassified pictures are left alone.
    """
    b, c, h, w = x.shape

    def signs(*shape: int) -> Tensor:
        return (2 * torch.randint(0, 2, shape, generator=generator) - 1).to(x)

    def corner(size: int, side: int) -> Tensor:
        return torch.randint(0, size - side + 1, (b, 1, 1, 1), generator=generator).to(x.device)

    def moved(delta: Tensor, rows: Tensor) -> Tensor:
        return (x[rows] + radius * delta[rows]).clamp(0, 1)

    best, delta = x.clone(), signs(b, c, 1, w).repeat(1, 1, h, 1)
    margin = _margin(log_posterior(x), labels)
    row, column = (torch.arange(n, device=x.device) for n in (h, w))
    for query in range(queries):
        trial = delta
        if query:
            side = square_side(query / queries, h, w)
            top, left = corner(h, side), corner(w, side)
            rows_in = (row.view(1, 1, h, 1) >= top) & (row.view(1, 1, h, 1) < top + side)
            columns_in = (column >= left) & (column < left + side)
            trial = torch.where(rows_in & columns_in, signs(b, c, 1, 1), delta)
        active = (margin >= 0).nonzero()[:, 0]
        if not len(active):
            break
        point = moved(trial, active)
        found = _margin(log_posterior(point), labels[active])
        # The stripes are where the search starts, whether better than the picture or not.
        better = found < margin[active] if query else torch.ones_like(found, dtype=torch.bool)
        kept = active[better]
        delta[kept], margin[kept], best[kept] = trial[kept], found[better], point[better]
    return best


def square_side(progress: float, height: int, width: int) -> int:
    """Side in pixels of the squares that are tried, at a progress from 0 to 1."""
    halvings = sum(progress > t for t in (0.001, 0.005, 0.02, 0.05, 0.1, 0.2, 0.4, 0.6, 0.8))
    area = 0.8 / 2**halvings * height * width
    return max(1, min(round(area**0.5), height, width))


def _margin(scores: Tensor, labels: Tensor) -> Tensor:
    """Score of the true class minus the best other one, (B,): below 0 if misclassified."""
    true = scores.gather(1, labels[:, None])
    others = scores.scatter(1, labels[:, None], -math.inf)
    return (true - others.max(1, keepdim=True).values)[:, 0]


def log_posterior(model: Model, sigma: float, draws: int = 0, seed: int = 0) -> LogPosterior:
    """The model's log p(c | y) of pictures (B, C, H, W) of any size, told sigma (in [0, 1]),
    at the scale of the training as `restore.classify` does it.

    draws: so many noises of standard deviation sigma are added, and p(c | y) is averaged
    over them. They are the same at every look and known to who attacks: the classifier
    is a fixed function, with no randomness to hide behind. 0: none is added.
    """
    network = model.classifier()

    def one(y: Tensor) -> Tensor:
        shrink = Shrink(y.shape[2], y.shape[3], model.header.patch)
        y = mirrored(shrink(y), model.needs.multiple)
        return network.logits(y, sigma * shrink.noise).log_softmax(1)

    def averaged(y: Tensor) -> Tensor:
        generator = torch.Generator().manual_seed(seed)
        noises = (torch.randn(y.shape[1:], generator=generator).to(y) for _ in range(draws))
        return torch.stack([one(noised(y, sigma, noise)) for noise in noises]).logsumexp(0)

    return averaged if draws else one


def robustness(
    pictures: Iterable[tuple[np.ndarray, str]],
    model: Model,
    attacks: Sequence[Attack],
    sigma: float = 0.0,
    *,
    budget: Budget = Budget(),
    draws: int = 0,
    source: Model | None = None,
    seed: int = 0,
    advance: Callable[[], None] = lambda: None,
) -> list[Robustness]:
    """Accuracy on clean pictures and under every attack, attacks of one kind by their radius.

    pictures: float32 (H, W, C) in [0, 1] and the class of each. sigma, draws: see
    ``log_posterior``. source: changes that lead this model astray most are tried on ``model``
    (a transfer attack). A picture that falls within one radius has fallen within every
    larger one, as the balls lie in each other. advance: called per picture and attack.
    """
    target = log_posterior(model, sigma, draws, seed)
    if source is not None and source.classes != model.classes:
        raise UsageError(
            f"model {source.name!r} has other classes than model {model.name!r}: "
            "changes made on it cannot be tried"
        )
    attacked = target if source is None else log_posterior(source, sigma, draws, seed)
    # Not the seed itself: the first start would lie along the first noise of `log_posterior`.
    generator = torch.Generator().manual_seed(~seed)
    ordered = sorted(set(attacks), key=lambda a: (KINDS.index(a.kind), a.radius))
    correct = dict.fromkeys([None, *ordered], 0)
    total = 0

    def size(item: tuple[np.ndarray, str]) -> tuple[int, ...]:
        return item[0].shape[:2]

    for group in batches(pictures, size, lambda h, w: max(1, GRADIENT_PIXELS // (h * w))):
        x, labels = _stacked(group, model)
        with torch.no_grad():
            standing = right = target(x).argmax(1) == labels
        total += len(group)
        correct[None] += int(right.sum())
        for i, attack in enumerate(ordered):
            standing = right.clone() if not i or ordered[i - 1].kind != attack.kind else standing
            rows = standing.nonzero()[:, 0]
            if len(rows):
                stop = source is None
                examples = _run(attack, attacked, x[rows], labels[rows], budget, generator, stop)
                with torch.no_grad():
                    standing[rows] = target(examples).argmax(1) == labels[rows]
            correct[attack] += int(standing.sum())
            for _ in group:
                advance()
    return [Robustness(attack, sigma, total, count) for attack, count in correct.items()]


def _run(
    attack: Attack,
    attacked: LogPosterior,
    x: Tensor,
    labels: Tensor,
    budget: Budget,
    generator: torch.Generator,
    until_fooled: bool,
) -> Tensor:
    if attack.kind == SQUARE:
        return square(attacked, x, labels, attack.radius, budget.queries, generator)
    return pgd(
        attacked,
        x,
        labels,
        attack.kind,
        attack.radius,
        budget.steps,
        budget.restarts,
        generator=generator,
        until_fooled=until_fooled,
    )


def _stacked(group: Sequence[tuple[np.ndarray, str]], model: Model) -> tuple[Tensor, Tensor]:
    """Pictures of one size as (B, C, H, W), gray ones in all channels, and their labels (B,)."""
    channels = model.needs.channels
    check_channels(model, group[0][0].shape[2])
    x = [np.broadcast_to(p, (*p.shape[:2], channels)).transpose(2, 0, 1) for p, _ in group]
    labels = [model.classes.index(label) for _, label in group]
    return (
        torch.from_numpy(np.stack(x)).clamp(0, 1).to(model.device),
        torch.tensor(labels, device=model.device),
    )
