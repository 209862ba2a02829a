"""The training config: a TOML file, checked key by key before anything runs."""

from __future__ import annotations

import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from cdnctl.errors import ConfigError
from cdnctl.images import PEAK
from cdnctl.models import Needs, architecture
from cdnctl.schema import build

CHANNELS = (1, 3)  # of training pictures: gray, or colour


@dataclass(frozen=True)
class DataConfig:
    """What a batch is made of."""

    patch: int = 64  # side of the square crops, in pixels
    batch: int = 16  # pictures per step, all processes together
    labelled_share: float = 0.5  # of a batch, where both kinds of pictures are there
    shift: int = 0  # labelled crops may reach this many pixels over the edge (reflected)
    rotate: bool = True  # quarter turns for unlabelled pictures; flips are always on
    class_batch: int = 0  # pictures per step for the class loss alone, besides ``batch``
    class_patch: int = 64  # side of their crops
    # Pictures with a shorter side are thumbnails: compressed too hard to be clean targets, they
    # are for the class loss alone (0: none are; else class_batch draws from them).
    thumbnail: int = 0
    flats: float = 0.0  # share of the crops replaced by flat colours and gradients
    patterns: float = 0.0  # share of them replaced by stripes and checks of 1 to 8 pixels
    holdout: int = 500  # pictures kept out for validation where a dataset has no val/ folder
    # Part of what is left: all, or the first or second of two disjoint halves, in an order that is
    # random and always the same; two networks of them tell whether pictures are enough (compare).
    half: str = "all"
    limit: int = 0  # of the pictures of that part (0: all of them)
    distinct: bool = True  # with either of the two: without near duplicates, taken out before


@dataclass(frozen=True)
class NoiseConfig:
    """Noise levels, on the 0..255 scale of the command line."""

    low: float = 0.0
    high: float = 60.0
    power: float = 1.0  # sigma = low + (high - low) u^power
    mismatch: float = 0.0  # share of pictures with less noise given than there is, see Batch
    excess: float = 0.0  # share of pictures with more noise given than there is
    # Share of pictures taken by simulated cameras, see `training.cameras`; of their noise the
    # network hears what can be measured.
    camera: float = 0.0
    wide: float = 0.0  # share of pictures with levels from high to top, uniform in their logarithm
    top: float = 0.0
    # Highest noise level of pictures that serve the class loss alone; half of them are then free of
    # noise. 0: they have the same levels as the others.
    lessons: float = 0.0

    @property
    def highest(self) -> float:
        """Of all levels."""
        return self.top if self.wide else self.high


@dataclass(frozen=True)
class LossConfig:
    """loss = score * score matching + classes * cross-entropy."""

    score: float = 1.0
    score_power: float = 0.0  # weighs noise level sigma by sigma^power
    classes: float = 0.02
    smoothing: float = 0.0  # label smoothing of the cross-entropy
    conditional: float = 0.5  # share of labelled pictures denoised with their true class


@dataclass(frozen=True)
class OptimConfig:
    """Warm-up, decay to zero, averaged weights, guarded steps.

    ``schedule`` cosine, or linear: constant, then falling over the last ``decay`` of the
    steps, so that a run that has not begun to fall can be given more or fewer steps.

    ``kind`` adamw, or muon: momentum made orthogonal for convolutions (Jordan 2024, scaled
    to AdamW's step size as by Liu et al. 2025, arXiv 2502.16982), AdamW for the rest; or sgd:
    plain gradient descent, whose momentum is the first of ``betas``.
    """

    kind: str = "adamw"
    steps: int = 100_000
    lr: float = 2e-3
    warmup: int = 500
    schedule: str = "cosine"
    decay: float = 0.3  # share of the steps over which a linear schedule falls
    weight_decay: float = 0.01
    betas: tuple[float, float] = (0.9, 0.99)
    ema: float = 0.999
    clip: float = 3.0  # gradient norm is clipped to this multiple of its running mean
    guard: float = 10.0  # beyond this multiple, the step is undone: back to the averaged weights


@dataclass(frozen=True)
class RunConfig:
    """How the run goes, without influence on what it converges to."""

    seed: int = 0
    precision: str = "auto"  # of the trunk: auto, float32, tf32, bfloat16 (auto on CUDA)
    compile: bool = False  # torch.compile the step: minutes to start, then faster
    channels_last: bool = False  # memory order of the weights; features are always so
    log_every: int = 100
    validate_every: int = 2000
    checkpoint_every: int = 1000
    validate_sigmas: tuple[float, ...] = (15.0, 25.0, 50.0)


@dataclass(frozen=True)
class TrainConfig:
    """A whole training config; ``model`` holds ``arch`` and that architecture's fields."""

    name: str = "model"
    model: Mapping[str, Any] = field(default_factory=lambda: {"arch": "gradresnet"})
    data: DataConfig = DataConfig()
    noise: NoiseConfig = NoiseConfig()
    loss: LossConfig = LossConfig()
    optim: OptimConfig = OptimConfig()
    run: RunConfig = RunConfig()

    def to_dict(self) -> dict[str, Any]:
        """Plain nested dict with every default written out, ready for JSON."""
        return asdict(self)


def parse(raw: Mapping[str, Any]) -> TrainConfig:
    """TrainConfig from nested plain values (a parsed TOML file or ``to_dict``)."""
    sections = {
        "data": DataConfig,
        "noise": NoiseConfig,
        "loss": LossConfig,
        "optim": OptimConfig,
        "run": RunConfig,
    }
    known = ["name", "model", *sections]
    for key, value in raw.items():
        if key not in known:
            raise ConfigError(f"unknown section {key!r}; known sections: {', '.join(known)}")
        if key != "name" and not isinstance(value, Mapping):
            raise ConfigError(f"{key} is {value!r}, but must be a section, [{key}]")
        if key == "name" and not isinstance(value, str):
            raise ConfigError(f"name is {value!r}, but must be text")
    parts: dict[str, Any] = {k: build(cls, raw.get(k, {}), k) for k, cls in sections.items()}
    model = {"arch": "gradresnet"} | dict(raw.get("model", {}))
    config = TrainConfig(name=raw.get("name", "model"), model=model, **parts)
    channels = needs(config).channels
    if channels not in CHANNELS:
        raise ConfigError(
            f"model.channels is {channels}, but training pictures have "
            f"{' or '.join(map(str, CHANNELS))}"
        )
    _check(config)
    return config


def needs(config: TrainConfig) -> Needs:
    """What the network of a config asks of its pictures; ConfigError if there cannot be one."""
    arch = architecture(config.model["arch"])
    shape = {k: v for k, v in config.model.items() if k != "arch"}
    if arch.knows_classes:  # how many of them, the datasets say
        shape = {"num_classes": 1} | shape
    with torch.device("meta"):
        return arch.module(build(arch.config, shape, "model")).needs


def bounds(c: TrainConfig) -> tuple[tuple[str, float, float, float], ...]:
    """(name, value, lowest, highest) of every number of a config, both ends allowed."""
    return (
        ("data.patch", c.data.patch, 1, 4096),
        ("data.batch", c.data.batch, 1, 65536),
        ("data.labelled_share", c.data.labelled_share, 0, 1),
        ("data.shift", c.data.shift, 0, 4096),
        ("data.class_batch", c.data.class_batch, 0, 65536),
        ("data.class_patch", c.data.class_patch, 1, 4096),
        ("data.thumbnail", c.data.thumbnail, 0, 4096),
        ("data.flats", c.data.flats, 0, 1),
        ("data.patterns", c.data.patterns, 0, 1),
        ("data.holdout", c.data.holdout, 0, 10**9),
        ("data.limit", c.data.limit, 0, 10**9),
        ("noise.low", c.noise.low, 0, c.noise.high),
        ("noise.high", c.noise.high, c.noise.low, PEAK),
        ("noise.power", c.noise.power, 0, 100),
        ("noise.mismatch", c.noise.mismatch, 0, 1),
        ("noise.excess", c.noise.excess, 0, 1),
        ("noise.camera", c.noise.camera, 0, 1),
        ("noise.wide", c.noise.wide, 0, 1),
        ("noise.top", c.noise.top, 0, 100 * PEAK),
        ("noise.lessons", c.noise.lessons, 0, PEAK),
        ("loss.score", c.loss.score, 0, 1e9),
        ("loss.classes", c.loss.classes, 0, 1e9),
        ("loss.score_power", c.loss.score_power, -10, 10),
        ("loss.smoothing", c.loss.smoothing, 0, 1),
        ("loss.conditional", c.loss.conditional, 0, 1),
        ("optim.steps", c.optim.steps, 1, 10**9),
        ("optim.lr", c.optim.lr, 0, 1e9),
        ("optim.warmup", c.optim.warmup, 0, 10**9),
        ("optim.decay", c.optim.decay, 0, 1),
        ("optim.weight_decay", c.optim.weight_decay, 0, 1e9),
        ("optim.betas", min(c.optim.betas), 0, 1 - 1e-9),
        ("optim.betas", max(c.optim.betas), 0, 1 - 1e-9),
        ("optim.ema", c.optim.ema, 0, 1),
        ("optim.clip", c.optim.clip, 1e-9, 1e9),
        ("optim.guard", c.optim.guard, 1, 1e9),
        ("run.seed", c.run.seed, 0, 2**63 - 1),
        ("run.log_every", c.run.log_every, 1, 10**9),
        ("run.validate_every", c.run.validate_every, 1, 10**9),
        ("run.checkpoint_every", c.run.checkpoint_every, 1, 10**9),
        *(("run.validate_sigmas", s, 0, PEAK) for s in c.run.validate_sigmas),
    )


def _check(c: TrainConfig) -> None:
    for name, value, low, high in bounds(c):
        if not low <= value <= high:
            raise ConfigError(f"{name} is {value}, but must lie between {low} and {high}")
    if c.optim.kind not in ("adamw", "muon", "sgd"):
        raise ConfigError(f"optim.kind is {c.optim.kind!r}, but must be adamw, muon or sgd")
    if c.optim.schedule not in ("cosine", "linear"):
        raise ConfigError(f"optim.schedule is {c.optim.schedule!r}, but must be cosine or linear")
    if c.data.half not in ("all", "first", "second"):
        raise ConfigError(f"data.half is {c.data.half!r}, but must be all, first or second")
    if c.noise.wide and not c.noise.top > c.noise.high > 0:
        raise ConfigError(
            f"noise.top is {c.noise.top} and noise.high {c.noise.high}, but with noise.wide levels "
            "lie between them: the top must be higher, and none of them 0"
        )
    if c.noise.camera and not c.model.get("coloured"):
        raise ConfigError(
            f"noise.camera is {c.noise.camera}, but model.coloured is not true: such a network "
            "does not hear what such noise is like"
        )
    if c.noise.camera and c.model.get("channels", 3) != 3:
        raise ConfigError(
            f"noise.camera is {c.noise.camera}, but model.channels is {c.model['channels']}: the "
            "simulated cameras take pictures of three colours"
        )
    if c.data.thumbnail and not c.data.class_batch and c.loss.classes:
        raise ConfigError(
            f"data.thumbnail is {c.data.thumbnail}, but data.class_batch is 0: say how many "
            "thumbnails a step is to learn classes from"
        )
    if c.run.precision not in ("auto", "float32", "tf32", "bfloat16"):
        raise ConfigError(
            f"run.precision is {c.run.precision!r}, but must be auto, float32, tf32 or bfloat16"
        )


def override(config: TrainConfig, settings: Sequence[str]) -> TrainConfig:
    """The config with single keys set anew, each given as ``section.key=value``.

    A value is written as in TOML; one that TOML does not know is taken for a string.
    """
    raw = config.to_dict()
    for setting in settings:
        key, equals, text = setting.partition("=")
        *path, name = key.strip().split(".")
        section: Any = raw
        for part in path:  # sections lie in sections where a network is made of several
            section = section.get(part) if isinstance(section, dict) else None
        if not (equals and path and name and isinstance(section, dict)):
            raise ConfigError(f"{setting!r} is not SECTION.KEY=VALUE, such as optim.steps=1000")
        try:
            value = tomllib.loads(f"value = {text}")["value"]
        except (ValueError, RecursionError):
            value = text.strip()
        section[name] = value
    return parse(raw)


def load(path: Path) -> TrainConfig:
    """Read a TOML config. ConfigError if it is missing, not TOML, or wrong."""
    try:
        raw = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"cannot read the config {str(path)!r}: {error.strerror}") from None
    except (ValueError, RecursionError) as error:  # of syntax, encoding, or huge numbers
        raise ConfigError(f"the config {str(path)!r} is not valid TOML: {error}") from None
    return parse(raw)
