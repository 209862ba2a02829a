"""Many files with any operation: here one that no command has, darkening."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from tiny import files, noisy_picture, save_tiny, write

from cdnctl import images
from cdnctl.api import Model
from cdnctl.errors import ImageError
from cdnctl.images import Image
from cdnctl.restore import Denoise, Operation, Result, Settings
from cdnctl.restore.batch import Batch, Done
from cdnctl.restore.manifest import NAME, Manifest
from cdnctl.restore.plan import plan
from cdnctl.selection import Models

CPU = torch.device("cpu")


@dataclass(frozen=True)
class Darkened(Result):
    """A darker picture."""

    mean: float  # before


@dataclass(frozen=True)
class Darken:
    """Samples over a number."""

    by: int
    groups: list[int] = field(default_factory=list)  # how many pictures each run was given
    name: ClassVar[str] = "darken"

    @property
    def parameters(self) -> dict[str, Any]:
        return {"by": self.by}

    def prepare(self, image: Image, name: str, data: bytes) -> Image:
        if image.samples.shape[2] == 1:
            raise ImageError(f"{name!r} is gray")
        return image

    def by_camera(self, ready: Image) -> bool:
        return False

    def together(self, height: int, width: int) -> int:
        return 2 if height < 100 else 1

    def run(
        self, ready: Sequence[Image], model: Model, watch: Callable[[float], None]
    ) -> list[Darkened]:
        self.groups.append(len(ready))
        watch(0.5)
        results = []
        for image in ready:
            if image.samples[0, 0, 0] == 255:
                raise ImageError("too bright")
            dark = replace(image.with_samples(image.samples // self.by), notes=("dark",))
            results.append(Darkened(dark, model, float(image.samples.mean())))
        return results

    def record(self, result: Darkened) -> dict[str, Any]:
        return {"mean": result.mean}


@pytest.fixture
def place(tmp_path: Path) -> Path:
    save_tiny(tmp_path / "m.safetensors")
    for i in range(5):
        write(tmp_path / "in" / f"{i}.png", noisy_picture(20, 24, seed=i) / 2)
    write(tmp_path / "in" / "gray.png", noisy_picture(20, 24, 1))
    bright = noisy_picture(20, 24) / 2
    bright[0, 0] = 1
    write(tmp_path / "in" / "bright.png", bright)
    write(tmp_path / "in" / "large.png", noisy_picture(120, 24) / 2)
    return tmp_path


def go_on(place: Path, operation: Operation[Any], **options: Any) -> dict[str, Done[Any]]:
    models = Models(str(place / "m.safetensors"), CPU)
    manifest = Manifest(place / "out")
    batch = Batch(models, operation, resume=True, manifest=manifest, **options)
    with manifest:
        done = list(batch.run(plan([place / "in"], place / "out", False)))
    return {d.job.source.name: d for d in done}


def test_every_file_gets_what_the_operation_makes_of_it(place: Path) -> None:
    operation, heard = Darken(2), []
    done = go_on(place, operation, watch=lambda job, share: heard.append((job, share)))
    assert "'" + str(place / "in" / "gray.png") + "' is gray" == done["gray.png"].error
    assert str(done["bright.png"].error).endswith("bright.png': too bright")
    good = {name: d for name, d in done.items() if d.error is None}
    assert good.keys() == files(place / "out").keys() and len(good) == 6
    for name, d in good.items():
        before = images.read(place / "in" / name).samples
        np.testing.assert_array_equal(images.read(place / "out" / name).samples, before // 2)
        assert d.restored is not None and d.restored.mean == before.mean()
        assert d.restored.image.notes == ("dark",) and d.restored.model.name == "m"
    # Those of one size two by two; of the pair that the bright one spoils, each on its own.
    assert sorted(operation.groups) == [1, 1, 1, 2, 2, 2]
    assert {share for _, share in heard} == {0.5}


def test_the_manifest_says_what_was_done_and_with_what(place: Path) -> None:
    done = go_on(place, Darken(2))
    records = [json.loads(line) for line in (place / "out" / NAME).read_text("utf-8").splitlines()]
    good = {r["output"]: r for r in records if "error" not in r}
    assert len(good) == 6 and len(records) == 8
    for name, record in good.items():
        assert record["operation"] == "darken" and record["model"] == "m"
        assert record["parameters"] == {"by": 2, "model": "m", "strip_metadata": False}
        assert record["mean"] == done[name].restored.mean  # type: ignore[union-attr]
        assert "sigma" not in record, "which is of denoising"


def test_what_is_done_is_passed_over_and_with_other_settings_redone(place: Path) -> None:
    def redone(operation: Operation[Any]) -> int:
        return sum(d.restored is not None for d in go_on(place, operation).values())

    assert [redone(Darken(by)) for by in (2, 2, 3, 3)] == [6, 0, 6, 0]
    assert redone(Denoise(Settings(0.1))) == 8 and redone(Denoise(Settings(0.1))) == 0


def test_what_another_operation_did_is_not_done(place: Path) -> None:
    """Even where all their settings are the same."""

    class Brighten(Darken):
        name = "brighten"

    go_on(place, Darken(2))
    done = go_on(place, Brighten(2))
    assert sum(d.restored is not None for d in done.values()) == 6
