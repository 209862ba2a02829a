"""The Python API: a trained model with its classes, ready to use."""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import TypeVar, overload

import numpy as np
import PIL.Image
import torch
from torch import Tensor, nn

from cdnctl.checkpoints import Header, bundled, find_weights, load_model, weights_hash
from cdnctl.core import joint
from cdnctl.core.joint import Corrector, HasPosterior, Joint
from cdnctl.errors import UnknownClassError, UsageError, WeightsError
from cdnctl.models import Needs, Network
from cdnctl.models.ensemble import ensemble
from cdnctl.pictures import Given, Sigma

OneClass = str | int | np.integer | Mapping[str, float]
ClassSpec = OneClass | Sequence[OneClass] | Tensor | None

AnyPicture = Tensor | np.ndarray | PIL.Image.Image
Picture = TypeVar("Picture", Tensor, np.ndarray, PIL.Image.Image)


class Model(nn.Module):
    """A trained joint model of noisy pictures and classes.

    ``model(y, sigma)`` denoises, which is the form that plug-and-play libraries expect of a
    denoiser:

    >>> import cdnctl, torch
    >>> from skimage import data
    >>> model = cdnctl.load("photo")
    >>> clean = torch.tensor(data.chelsea()[:128, 100:228] / 255, dtype=torch.float32)
    >>> y = clean.permute(2, 0, 1) + 25 / 255 * torch.randn(3, 128, 128)
    >>> x = model(y, 25 / 255)
    >>> x.shape, x.dtype
    (torch.Size([3, 128, 128]), torch.float32)

    **Pictures** are float tensors (B, C, H, W) or (C, H, W) in [0, 1]; numpy arrays (H, W) or
    (H, W, C) of floats in [0, 1], uint8 or uint16; or PIL pictures of modes L, RGB and I;16.
    What comes out is of the same kind, dtype and shape; whole numbers are rounded and clipped,
    floats are not. C may be 1: gray is denoised as the command line does it. (Gray that is
    stored in three channels has the same noise in all three: give one of them.)

    **sigma** is a number, or one per picture, (B,), in the same unit: 25/255, not 25, whatever
    the dtype of the picture.

    **Errors** are a UsageError for what is no picture or no noise level, and for the wrong
    scale: sigma above 1, and pixels beyond 10 (1 + sigma), which no noise on [0, 1] reaches.

    **Precision**: the network computes in the better of the precisions of its weights and of
    the picture, and no worse than float32, but for the convolutions of a model in half
    precision (``model.half()``), which are done in that. Probabilities and densities of half
    precision pictures are float32, or they would overflow.

    **Gradients** flow through everything: to y and sigma if they require grad, to the weights
    after ``model.requires_grad_(True)``. Otherwise, and under ``torch.no_grad``, no graph is
    kept: the weights of a loaded model do not require grad.

    **Sides** that are no multiples of the network's coarsest cell are extended by mirroring, as
    the command line does. There, ``score`` is that of the extended picture, cropped, and
    ``log_prob`` that of the extended picture: the one is the gradient of the other for whole
    cells only.
    """

    def __init__(self, module: Network, header: Header, path: Path):
        super().__init__()
        self.module = module
        self.header = header
        self.path = path
        self.training = module.training

    def __repr__(self) -> str:
        weight = next(self.module.parameters())
        count = sum(p.numel() for p in self.module.parameters())
        return (
            f"<cdnctl.Model {self.name!r}: {self.header.arch}, {len(self.classes)} classes, "
            f"{count / 1e6:.2f} million parameters, {weight.dtype} on {weight.device}>"
        )

    def ensemble(self, count: int) -> Model:
        """The mean of this model over ``count`` symmetries: 2, left and right exchanged, or 8,
        quarter turns too (classes are told of the first two). It has everything that the model
        has, a density too, and takes ``count`` times as long. With 1 it is the model itself.
        UsageError for another number."""
        module = ensemble(self.module, count)
        return self if module is self.module else Model(module, self.header, self.path)

    @property
    def name(self) -> str:
        """Name of the model, as 'cdnctl models' lists it."""
        return self.header.name

    @property
    def classes(self) -> tuple[str, ...]:
        """Class names, in the order of the posterior's columns."""
        return self.header.classes

    @property
    def needs(self) -> Needs:
        """What the network asks of whoever gives it pictures."""
        return self.module.needs

    @property
    def sigma_range(self) -> tuple[float, float]:
        """Noise levels seen in training, in [0, 1] pixel units."""
        return self.needs.sigma_range

    @cached_property
    def hash(self) -> str:
        """Short hash of the weights in the file, see ``checkpoints.weights_hash``."""
        return weights_hash(self.path)

    @property
    def device(self) -> torch.device:
        """Device of the weights."""
        return next(self.module.parameters()).device

    def mixture(self, c: ClassSpec) -> Tensor | None:
        """Class weights, (K,) or as given, of a class name, an index, a mixture of names, a
        tensor of weights, or None (the posterior); of a list of them, one per picture, (B, K).
        Mixtures are normalised to a sum of 1.

        UnknownClassError lists near matches and the bundled models that know the name.
        """
        if isinstance(c, Tensor) and c.shape[-1:] != (len(self.classes),):
            raise UsageError(
                f"class weights have shape {tuple(c.shape)}, but there are "
                f"{len(self.classes)} classes"
            )
        if c is None or isinstance(c, Tensor):
            return c
        if isinstance(c, Sequence) and not isinstance(c, str):
            rows = [self._mixture(one) for one in c]
            return torch.stack(rows) if rows else torch.zeros(0, len(self.classes))
        return self._mixture(c)

    def _mixture(self, c: OneClass) -> Tensor:
        """Weights (K,) of one class or mixture."""
        if isinstance(c, int | np.integer):
            if not 0 <= c < len(self.classes):
                raise UnknownClassError(f"class index {c} is not in 0..{len(self.classes) - 1}")
            c = self.classes[c]
        mixture = {c: 1.0} if isinstance(c, str) else c
        if not isinstance(mixture, Mapping):
            raise UsageError(f"a class is a name, an index or a mixture of names, not {c!r}")
        total = sum(mixture.values())
        if not mixture or min(mixture.values()) < 0 or not 0 < total < float("inf"):
            raise UsageError(f"class weights must be positive and finite, not {dict(mixture)}")
        w = torch.zeros(len(self.classes))
        for name, value in mixture.items():
            if name not in self.classes:
                raise UnknownClassError(unknown_class(name, self))
            w[self.classes.index(name)] = value / total
        return w

    def forward(self, y: Picture, sigma: Sigma, c: ClassSpec = None) -> Picture:
        """``denoise``."""
        return self.denoise(y, sigma, c)

    def denoise(self, y: Picture, sigma: Sigma, c: ClassSpec = None) -> Picture:
        """Posterior mean E[x | y] or, given a class, E[x | y, c]; like y.

        c: a class name, an index, a mixture ``{"cat": 0.7, "dog": 0.3}``, a list with one of
        these per picture, or weights (K,) or (B, K).
        """
        network = self.corrector()
        given, mixture = self._given(y, sigma, c)
        return given.picture(joint.denoise(network, given.y, given.sigma, mixture))

    @overload
    def score(self, y: Tensor, sigma: Sigma, c: ClassSpec = None) -> Tensor: ...
    @overload
    def score(
        self, y: np.ndarray | PIL.Image.Image, sigma: Sigma, c: ClassSpec = None
    ) -> np.ndarray: ...
    def score(self, y: AnyPicture, sigma: Sigma, c: ClassSpec = None) -> Tensor | np.ndarray:
        """grad_y log p(y) or, given a class, grad_y log p(y, c), for y in [0, 1]; shaped like y.

        An array for arrays and PIL pictures, of floats.
        """
        network = self.corrector("give a score")
        given, mixture = self._given(y, sigma, c)
        return given.samples(joint.score(network, given.y, given.sigma, mixture))

    @overload
    def posterior(self, y: Tensor, sigma: Sigma) -> Tensor: ...
    @overload
    def posterior(self, y: np.ndarray | PIL.Image.Image, sigma: Sigma) -> np.ndarray: ...
    def posterior(self, y: AnyPicture, sigma: Sigma) -> Tensor | np.ndarray:
        """p(c | y): (B, K), or (K,) for a single picture."""
        network = self.classifier()
        given, _ = self._given(y, sigma)
        return given.numbers(joint.posterior(network, given.y, given.sigma))

    @overload
    def log_prob(self, y: Tensor, sigma: Sigma, c: ClassSpec = None) -> Tensor: ...
    @overload
    def log_prob(
        self, y: np.ndarray | PIL.Image.Image, sigma: Sigma, c: ClassSpec = None
    ) -> np.ndarray: ...
    def log_prob(self, y: AnyPicture, sigma: Sigma, c: ClassSpec = None) -> Tensor | np.ndarray:
        """log p(y) or, given a class, log p(y, c), in nats up to a constant: (B,) or a scalar.

        Of a mixture w of classes: log sum_c w_c p(y, c).
        """
        network = self.module
        if not isinstance(network, Joint):
            self.corrector("give a log-density")
            self.classifier("give a log-density")
            raise UsageError(
                f"model {self.name!r} ({self.header.arch}) has a score and class scores, "
                "but no log-density: give a model of architecture gradresnet"
            )
        given, mixture = self._given(y, sigma, c)
        f = network.log_joint(given.y, given.sigma)
        if mixture is not None:
            f = f + joint.per_class(mixture, f).log()
        return given.numbers(f.logsumexp(1))

    def corrector(self, verb: str = "denoise") -> Corrector:
        """The network as a denoiser; "cannot ``verb``" as UsageError if it is none."""
        if isinstance(self.module, Corrector):
            return self.module
        raise UsageError(f"model {self.name!r} ({self.header.arch}) cannot {verb}")

    def classifier(self, verb: str = "classify") -> HasPosterior:
        """The network as a classifier; "cannot ``verb``" as UsageError if it is none."""
        if isinstance(self.module, HasPosterior):
            return self.module
        raise UsageError(f"model {self.name!r} ({self.header.arch}) cannot {verb}")

    def _given(
        self, y: AnyPicture, sigma: Sigma, c: ClassSpec = None
    ) -> tuple[Given, Tensor | None]:
        """What the network is given: pictures with their noise levels, and class weights."""
        mixture = self.mixture(c)
        needs = self.needs
        weight = next(self.module.parameters())
        given = Given(y, sigma, needs.channels, needs.multiple, weight)
        if mixture is not None and mixture.shape[:-1] not in ((), (1,), (given.count,)):
            raise UsageError(
                f"class weights have shape {tuple(mixture.shape)}, but there are "
                f"{given.count} pictures: give one class, or one per picture"
            )
        return given, mixture


# What people call the classes of the bundled models.
SYNONYMS: Mapping[str, tuple[str, ...]] = {
    "aeroplane": ("airplane", "vehicle"),
    "animal": ("wildlife",),
    "auto": ("automobile", "vehicle"),
    "bicycle": ("vehicle",),
    "boat": ("ship", "vehicle"),
    "bus": ("vehicle",),
    "car": ("automobile", "vehicle"),
    "face": ("person",),
    "fish": ("sealife",),
    "house": ("building",),
    "human": ("person",),
    "kitten": ("cat",),
    "lorry": ("truck", "vehicle"),
    "man": ("person",),
    "people": ("person",),
    "plane": ("airplane", "vehicle"),
    "puppy": ("dog",),
    "train": ("vehicle",),
    "van": ("vehicle",),
    "woman": ("person",),
}


def unknown_class(name: str, model: Model) -> str:
    """Message for a class that a model does not know: near matches, and who knows it."""
    from cdnctl.checkpoints import read_header

    known = {n: read_header(path).told_apart for n, path in bundled().items()}
    plain = name.casefold()
    meant = SYNONYMS.get(plain, ())
    # Two of three letters alike, as in car and cat, are no misspelling.
    folded = {c.casefold(): c for c in model.classes}
    near = [c for c in meant if c in model.classes] or [
        folded[c] for c in difflib.get_close_matches(plain, folded, n=3, cutoff=0.7)
    ]
    message = f"model {model.name!r} does not know the class {name!r}"
    if near:
        message += f"; did you mean {' or '.join(map(repr, near))}?"
    for word in (name, *meant):
        others = [n for n, classes in known.items() if word in classes and n != model.name]
        if others and word not in near:
            what = "known" if word == name else f"{word!r} is known"
            message += f"; {what} to: --model {' or '.join(others)}"
    return f"{message}; its classes: {', '.join(model.classes)}"


def load(name: str | Path = "photo", device: torch.device | str = "cpu") -> Model:
    """A bundled model by name, or one from a run folder of `cdnctl train` (the best weights of
    the run, else the last ones) or from a weights file.

    WeightsError if there is no such model, the file is not sound, or the model is not one of
    pictures.
    """
    path = find_weights(name)
    module, header = load_model(path)
    low, high = module.needs.value_range
    if (low, high) != (0.0, 1.0):
        raise WeightsError(
            f"{str(path)!r} is a model of values from {low:g} to {high:g}, and not of pictures, "
            "whose values go from 0 to 1"
        )
    return Model(module.to(device), header, path)
