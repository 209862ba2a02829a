"""The Python API: a trained model with its classes, ready to use."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor

from cdnctl.checkpoints import Header, bundled, find_weights, load_model, weights_hash
from cdnctl.core import joint
from cdnctl.errors import UnknownClassError, UsageError
from cdnctl.models import Network

ClassSpec = str | int | Mapping[str, float] | Tensor | None


@dataclass(frozen=True)
class Model:
    """A trained joint model of noisy pictures and classes.

    Pictures are float tensors (B, C, H, W) or (C, H, W) in [0, 1], sigma is a float
    or (B,) in the same unit. ``model(y, sigma)`` denoises, which is the form that
    plug-and-play libraries expect of a denoiser.
    """

    module: Network
    header: Header
    path: Path

    @property
    def name(self) -> str:
        """Name of the model, as 'cdnctl models' lists it."""
        return self.header.name

    @property
    def classes(self) -> tuple[str, ...]:
        """Class names, in the order of the posterior's columns."""
        return self.header.classes

    @property
    def sigma_range(self) -> tuple[float, float]:
        """Noise levels seen in training, in [0, 1] pixel units."""
        return self.header.sigma_range

    @cached_property
    def hash(self) -> str:
        """Short hash of the weights, see ``checkpoints.weights_hash``."""
        return weights_hash(self.path)

    @property
    def device(self) -> torch.device:
        """Device of the weights."""
        return next(self.module.parameters()).device

    def to(self, device: torch.device | str) -> Model:
        """Move the weights to another device, in place as of any torch module."""
        return Model(self.module.to(device), self.header, self.path)

    def weights(self, c: ClassSpec) -> Tensor | None:
        """Class weights, (K,) or as given, of a class name, an index, a mixture of names, a
        tensor of weights, or None (the posterior). Mixtures are normalised to a sum of 1.

        UnknownClassError lists near matches and the bundled models that know the name.
        """
        if isinstance(c, Tensor) and c.shape[-1:] != (len(self.classes),):
            raise UsageError(
                f"class weights have shape {tuple(c.shape)}, but there are "
                f"{len(self.classes)} classes"
            )
        if c is None or isinstance(c, Tensor):
            return c
        if isinstance(c, int):
            if not 0 <= c < len(self.classes):
                raise UnknownClassError(f"class index {c} is not in 0..{len(self.classes) - 1}")
            c = self.classes[c]
        mixture = {c: 1.0} if isinstance(c, str) else c
        total = sum(mixture.values())
        if not mixture or min(mixture.values()) < 0 or not 0 < total < float("inf"):
            raise UsageError(f"class weights must be positive and finite, not {dict(mixture)}")
        w = torch.zeros(len(self.classes))
        for name, value in mixture.items():
            if name not in self.classes:
                raise UnknownClassError(unknown_class(name, self))
            w[self.classes.index(name)] = value / total
        return w

    def denoise(self, y: Tensor, sigma: Tensor | float, c: ClassSpec = None) -> Tensor:
        """Posterior mean E[x | y] or, given a class, E[x | y, c]; like y, not clipped."""
        self._need("denoises", "denoise")
        with torch.no_grad():
            return self._batched(y, lambda b: joint.denoise(self.module, b, sigma, self.weights(c)))

    def score(self, y: Tensor, sigma: Tensor | float, c: ClassSpec = None) -> Tensor:
        """grad_y log p(y) or, given a class, grad_y log p(y, c); like y."""
        self._need("denoises", "give a score")
        with torch.no_grad():
            return self._batched(y, lambda b: joint.score(self.module, b, sigma, self.weights(c)))

    def posterior(self, y: Tensor, sigma: Tensor | float) -> Tensor:
        """p(c | y): (B, K), or (K,) for a single picture."""
        self._need("classifies", "classify")
        with torch.no_grad():
            return self._batched(y, lambda b: self.module.class_scores(b, sigma).softmax(1))

    def log_prob(self, y: Tensor, sigma: Tensor | float, c: ClassSpec = None) -> Tensor:
        """log p(y) or, given a class, log p(y, c), in nats up to a constant: (B,) or a scalar.

        Of a mixture w of classes: log sum_c w_c p(y, c).
        """
        for ability in ("denoises", "classifies"):  # a joint density is both
            self._need(ability, "give a log-density")
        weights = self.weights(c)

        def run(batch: Tensor) -> Tensor:
            f = self.module.log_joint(batch, sigma)
            if weights is not None:
                f = f + joint.per_class(weights, f).log()
            return f.logsumexp(1)

        with torch.no_grad():
            return self._batched(y, run)

    def __call__(self, y: Tensor, sigma: Tensor | float) -> Tensor:
        """Denoise: E[x | y], like y."""
        return self.denoise(y, sigma)

    def _need(self, ability: str, verb: str) -> None:
        if not getattr(self.module, ability):
            raise UsageError(f"model {self.name!r} ({self.header.arch}) cannot {verb}")

    def _batched(self, y: Tensor, run: Callable[[Tensor], Tensor]) -> Tensor:
        """Apply to (B, C, H, W), or to (C, H, W) as a batch of one."""
        channels = self.module.config.channels
        if y.ndim not in (3, 4) or y.shape[-3] != channels or not y.is_floating_point():
            raise UsageError(
                f"expected float pictures (B, {channels}, H, W), got {y.dtype} {tuple(y.shape)}"
            )
        return run(y) if y.ndim == 4 else run(y[None])[0]


def unknown_class(name: str, model: Model) -> str:
    """Message for a class that a model does not know: near matches, and who knows it."""
    from cdnctl.checkpoints import read_header

    near = difflib.get_close_matches(name, model.classes, n=3, cutoff=0.5)
    others = [n for n, path in bundled().items() if name in read_header(path).classes]
    message = f"model {model.name!r} does not know the class {name!r}"
    if near:
        message += f"; did you mean {' or '.join(map(repr, near))}?"
    if others:
        message += f"; known to: --model {' or '.join(others)}"
    return f"{message}; its classes: {', '.join(model.classes)}"


def load(name: str | Path = "photo", device: torch.device | str = "cpu") -> Model:
    """A bundled model by name, or one from a run folder of `cdnctl train` (the best weights of
    the run, else the last ones) or from a weights file.

    WeightsError if there is no such model or the file is not sound.
    """
    path = find_weights(name)
    module, header = load_model(path)
    return Model(module.to(device), header, path)
