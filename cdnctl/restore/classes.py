"""What a picture shows, and what telling a class changes in it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from cdnctl.api import Model
from cdnctl.core.joint import HasPosterior
from cdnctl.grouping import batches
from cdnctl.images import Image
from cdnctl.restore import tiles
from cdnctl.restore.levels import noise_level
from cdnctl.restore.scale import Shrink
from cdnctl.restore.settings import AUTO, Settings
from cdnctl.restore.stack import Stack, batch_size
from cdnctl.restore.view import View, memory_errors


@dataclass(frozen=True)
class Classified:
    """What a picture shows, and how it was looked at."""

    posterior: Mapping[str, float]  # p(c | picture), most probable class first
    sigma: float  # noise level of the picture, in [0, 1] pixel units
    factor: float  # how many of its pixels became one along an axis, at least 1
    size: tuple[int, int]  # height and width that the network saw


def class_mixture(model: Model, settings: Settings, logits: Tensor) -> Tensor:
    """Mixture w with D_w = D + guidance (D_target - D), (K,): the whole choice of classes
    is one mixture, because D = sum_c p(c | y) D_c."""
    p = logits.softmax(0)
    if settings.target is None:
        return p
    if settings.target == AUTO:
        target: Tensor | None = torch.nn.functional.one_hot(p.argmax(), len(p)).to(p.dtype)
    else:
        target = model.mixture(settings.target)
    assert target is not None
    return p + settings.guidance * (target - p)


def at_class_scale(view: View) -> View:
    """The picture at the size at which its class scores are taken: itself, or a smaller copy
    with the noise that is left in it, if it is larger than the crops of the training."""
    shrink = Shrink(view.height, view.width, view.model.header.patch)
    if shrink.factor == 1:
        return view
    # A gray picture has one channel here. Averages of coloured noise may look gray, too, but
    # only where so little of it is left that the factor of sqrt(3) does not matter.
    small = shrink.samples(view.pixels)
    return View(view.model, small, view.sigma * shrink.noise, view.tile, memory=view.memory)


def choose_class(view: View, settings: Settings) -> tuple[Settings, Tensor | None]:
    """Settings with the most probable class in the place of "auto", and the class scores that
    say so; the settings as they are, and None, if those come with the view's correction."""
    small = at_class_scale(view)
    if not isinstance(view.model.module, HasPosterior) or (small is view and len(view.tiles) == 1):
        return settings, None
    logits = small.logits()
    if settings.target == AUTO:
        best = view.model.classes[int(logits.argmax())]
        settings = replace(settings, target={best: 1.0})
    return settings, logits


def ranked(model: Model, logits: Tensor) -> dict[str, float]:
    """Posterior by class name, most probable first; empty if the model does not classify."""
    if not isinstance(model.module, HasPosterior):
        return {}
    p = logits.double().softmax(0)
    return {model.classes[i]: float(p[i]) for i in p.argsort(descending=True).tolist()}


def most_probable(stack: Stack) -> Tensor:
    """The most probable class of each picture, (n,), at the scale of the training."""
    small = [at_class_scale(view) for view in stack.views]
    if small[0] is stack.first:
        return stack.logits.argmax(1)
    return torch.stack([view.logits() for view in small]).argmax(1)


def class_change(view: View, logits: Tensor, settings: Settings) -> float:
    """Root mean square, in [0, 1] pixel units, of the change that the class makes in a restored
    picture before it is clipped and rounded: strength guidance (D_target - D).

    Where the view has several tiles, in the middle one only. logits: of the whole picture, (K,).
    """
    shift = class_shift(view.model, settings, logits)
    middle = next(
        tile
        for tile in view.tiles
        if tile.place[0].stop > view.height // 2 and tile.place[1].stop > view.width // 2
    )
    results = tiles.run(lambda y: view.correct(y, shift), view.read, [middle], view.model.device)
    ((rows, columns), change), *_ = results
    inside = change[:, : view.height - rows.start, : view.width - columns.start]
    return rms(weighed(inside, settings))


def weighed(change: Tensor, settings: Settings) -> Tensor:
    """A change (B, C, H, W) as strong as the settings say for luma and for chroma."""
    luma, chroma = settings.strengths
    return chroma * change + (luma - chroma) * change.mean(1, keepdim=True)


def class_shift(model: Model, settings: Settings, logits: Tensor) -> Tensor:
    """The mixture, (K,), whose correction is the change that the class makes. Corrections are
    linear in the mixture, so one pass with weights that sum to zero gives the difference of two."""
    return class_mixture(model, settings, logits) - logits.softmax(0)


def rms(values: Tensor) -> float:
    """Root mean square of all values."""
    return values.double().square().mean().sqrt().item()


def few(height: int, width: int) -> int:
    """How many pictures of one size are classified together. Most commands see one alone, which
    is not to wait for a large batch of blanks; more would be faster by a third."""
    return max(1, batch_size(height, width) // 4)


@dataclass(frozen=True)
class Seen:
    """A picture as its classes are told from it: small, whatever it was."""

    view: View  # at the scale of the training
    sigma: float  # noise level of the picture itself, in [0, 1] pixel units
    factor: float  # how many of its pixels became one along an axis, at least 1


def seen(image: Image, model: Model, sigma: float | None = None) -> Seen:
    """What ``classify_together`` needs of a picture. sigma: in [0, 1]; None: measured.

    UsageError if the model does not classify, ImageError if it cannot see such pictures.
    """
    model.classifier()
    sigma = noise_level(image, sigma=sigma).sigma
    view = View(model, image.samples, sigma)
    small = at_class_scale(view)
    return Seen(small, sigma, min(view.height, view.width) / min(small.height, small.width))


@torch.no_grad()
def classify_together(pictures: Sequence[Seen]) -> list[Classified]:
    """Posteriors over classes, those of one size in the network together; to the bit what each
    has on its own, see `batch_size` and `few`."""
    found: dict[int, Classified] = {}

    def kind(i: int) -> tuple[int, ...]:
        view = pictures[i].view
        return view.height, view.width, id(view.model)

    for group in batches(range(len(pictures)), kind, few):
        views = [pictures[i].view for i in group]
        with memory_errors(views[0]):
            logits = Stack(views, few(views[0].height, views[0].width)).logits
        for i, view, row in zip(group, views, logits, strict=True):
            one = pictures[i]
            posterior = ranked(view.model, row)
            found[i] = Classified(posterior, one.sigma, one.factor, (view.height, view.width))
    return [found[i] for i in range(len(pictures))]


def classify(image: Image, model: Model, sigma: float | None = None) -> Classified:
    """Posterior over classes of one picture, at the scale of the training."""
    return classify_together([seen(image, model, sigma)])[0]
