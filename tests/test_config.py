"""Training configs: what is in them, and what is refused."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from cdnctl.errors import ConfigError
from cdnctl.models import REGISTRY, Architecture, Needs, Network
from cdnctl.training.config import DataConfig, TrainConfig, bounds, load, override, parse


@dataclass(frozen=True)
class Inner:
    blocks: tuple[int, ...] = (1,)


@dataclass(frozen=True)
class Outer:
    inner: Inner = Inner()


class Net(Network):
    def __init__(self, config: Outer):
        super().__init__(Needs(3, len(config.inner.blocks)))


Nested = Architecture(Outer, Net, Outer(), "denoising")


def test_defaults_are_a_sound_config() -> None:
    assert parse({}) == TrainConfig()


def test_config_survives_json() -> None:
    """As it does in a run folder."""
    config = parse(
        {
            "name": "x",
            "model": {"widths": [4, 8], "blocks": [1, 1], "norm": "none"},
            "optim": {"betas": [0.8, 0.9], "lr": 1},
            "run": {"validate_sigmas": []},
        }
    )
    again = parse(json.loads(json.dumps(config.to_dict())))
    assert again == config
    assert again.model["arch"] == "gradresnet"
    assert again.optim.betas == (0.8, 0.9) and again.run.validate_sigmas == ()


BAD_CONFIGS = {
    # text: what the error must quote
    "[data]\npatsh = 32": ("patsh", "data", "patch"),
    "[dta]\npatch = 32": ("dta", "data"),
    "patch = 32": ("patch", "data"),
    "[model]\ndepth = 3": ("depth", "model", "widths"),
    "[data]\npatch = 'big'": ("data.patch", "'big'", "a whole number"),
    "[data]\npatch = 1.5": ("data.patch", "1.5", "a whole number"),
    "[data]\npatch = true": ("data.patch", "True", "a whole number"),
    "[data]\nrotate = 1": ("data.rotate", "1", "true or false"),
    "[optim]\nlr = '1e-3'": ("optim.lr", "'1e-3'", "a number"),
    "[optim]\nbetas = [0.9]": ("optim.betas", "[0.9]"),
    "[optim]\nbetas = [0.9, 'x']": ("optim.betas", "'x'"),
    "[model]\nwidths = 64": ("model.widths", "64", "a list of whole numbers"),
    "[model]\nwidths = [4.5]": ("model.widths", "4.5"),
    "[model]\nwidths = [[4]]": ("model.widths", "[[4]]"),
    "[run]\nvalidate_sigmas = [25, 'x']": ("run.validate_sigmas", "'x'"),
    "data = 3": ("data", "3", "[data]"),
    "model = 'unet'": ("model", "'unet'"),
    "name = 3": ("name", "3"),
    "[name]\nx = 1": ("name", "'x'"),
    "[model]\narch = 'resnet'": ("'resnet'", "gradresnet", "unet"),
    "[model]\narch = ['unet']": ("['unet']", "gradresnet"),
    "[model]\nwidths = [64]": ("widths", "(64,)", "blocks"),
    "[model]\nnorm = 'batch'": ("norm", "'batch'", "pixel"),
    "[noise]\nhigh = nan": ("noise", "nan"),
    "[run]\nprecision = 'half'": ("run.precision", "'half'", "bfloat16"),
    "[noise]\nwide = 0.1": ("noise.top", "0.0", "60.0"),
    "[noise]\ncamera = 0.1\n[model]\ncoloured = true\nchannels = 1": ("noise.camera", "channels"),
    "[noise]\ncamera = 0.1": ("noise.camera", "0.1", "model.coloured"),
    "[data": ("not valid TOML",),
    "a = 1\na = 2": ("not valid TOML",),
    "x = " + "9" * 5000: ("not valid TOML",),
    "x = " + "[" * 5000: ("not valid TOML",),
}


@pytest.mark.parametrize("text", BAD_CONFIGS, ids=lambda t: t[:40])
def test_config_errors_quote_key_and_value(text: str, tmp_path: Path) -> None:
    path = tmp_path / "config.toml"
    path.write_text(text)
    with pytest.raises(ConfigError) as caught:
        load(path)
    for word in BAD_CONFIGS[text]:
        assert word in str(caught.value)


def outside(value: Any, low: float, high: float) -> list[float]:
    """Values of the kind of one beyond its bounds."""
    beyond: list[float] = [low - 1, high + 1]
    return beyond if isinstance(value, int) else [*beyond, math.nan, math.inf, -math.inf]


def with_value(name: str, value: float) -> dict[str, Any]:
    """A raw config with one key set anew, in all places of a list."""
    section, key = name.split(".")
    plain = getattr(getattr(TrainConfig(), section), key)
    return {section: {key: [value] * len(plain) if isinstance(plain, tuple) else value}}


@pytest.mark.parametrize("name,value,low,high", sorted(set(bounds(TrainConfig()))))
def test_numbers_beyond_their_bounds(name: str, value: float, low: float, high: float) -> None:
    for bad in outside(value, low, high):
        with pytest.raises(ConfigError) as caught:
            parse(with_value(name, bad))
        assert f"{bad}" in str(caught.value) and name.partition(".")[0] in str(caught.value)
    for good in (low, high):  # the ends are allowed, as far as other keys go with them
        try:
            parse(with_value(name, good))
        except ConfigError as error:
            assert "must lie between" not in str(error)


def test_every_number_has_bounds() -> None:
    sections = {k: v for k, v in TrainConfig().to_dict().items() if isinstance(v, dict)}
    numbers = {
        f"{section}.{key}"
        for section, values in sections.items()
        if section != "model"
        for key, value in values.items()
        if not isinstance(value, bool | str)
    }
    assert numbers == {name for name, *_ in bounds(TrainConfig())}


def test_config_files_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"absent\.toml"):
        load(tmp_path / "absent.toml")
    with pytest.raises(ConfigError, match=str(tmp_path)):
        load(tmp_path)
    (tmp_path / "latin.toml").write_bytes(b'name = "\xff"')
    with pytest.raises(ConfigError, match="not valid TOML"):
        load(tmp_path / "latin.toml")


def test_a_good_config_file(tmp_path: Path) -> None:
    path = tmp_path / "config.toml"
    path.write_text("name = 'x'\n[model]\narch = 'unet'\n[optim]\nlr = 1\n", encoding="utf-8")
    config = load(path)
    assert (config.name, config.model["arch"], config.optim.lr) == ("x", "unet", 1)
    assert config.data == DataConfig()


def test_keys_set_anew() -> None:
    settings = ["optim.steps=7", "run.precision=bfloat16", 'model.norm="none"', "run.compile=true"]
    changed = override(parse({}), [*settings, "model.widths=[4, 8]", "model.blocks=[1,1]"])
    assert changed == parse(
        {
            "optim": {"steps": 7},
            "run": {"precision": "bfloat16", "compile": True},
            "model": {"norm": "none", "widths": [4, 8], "blocks": [1, 1]},
        }
    )
    assert override(changed, ["optim.steps=8", "optim.steps=9"]).optim.steps == 9
    assert override(changed, []) == changed


def test_a_key_of_a_section_in_a_section(monkeypatch: pytest.MonkeyPatch) -> None:
    """As of a network that is made of two."""
    monkeypatch.setitem(REGISTRY, "nested", Nested)  # type: ignore[arg-type]
    config = parse({"model": {"arch": "nested", "inner": {"blocks": [1, 2]}}})
    changed = override(config, ["model.inner.blocks=[3, 4]", "optim.steps=7"])
    assert changed.model["inner"] == {"blocks": [3, 4]} and changed.optim.steps == 7
    for wrong in ("model.outer.blocks=1", "model.inner.blocks.x=1", "model.inner=1"):
        with pytest.raises(ConfigError):
            override(config, [wrong])


@pytest.mark.parametrize(
    "setting,word",
    [
        ("steps=3", "steps=3"),
        ("optim.steps", "optim.steps"),
        ("optim=3", "optim=3"),
        ("name.x=3", "name.x=3"),
        ("optim.stps=3", "stps"),
        ("optim.steps=many", "'many', but must be a whole number"),
        ("optim.lr=fast", "'fast', but must be a number"),
        ("optim.kind=3", "3, but must be text"),
        ("optim.betas=0.9", "0.9, but must be a list of 2 numbers"),
        ("run.validate_sigmas=3", "3, but must be a list of numbers"),
        ("model.widths=[4.5]", "but must be a list of whole numbers"),
        ("optim.steps=0", "optim.steps"),
        ("run.compile=yes", "'yes', but must be true or false"),
    ],
)
def test_settings_that_are_none(setting: str, word: str) -> None:
    with pytest.raises(ConfigError) as caught:
        override(parse({}), [setting])
    assert word in str(caught.value)
