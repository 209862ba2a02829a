"""Halves of the pictures of a run: disjoint, nested, without copies across."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from runs import CPU, run
from safetensors.torch import load_file
from sets import collection, labelled

from cdnctl.checkpoints import MODEL
from cdnctl.errors import ConfigError, UsageError
from cdnctl.training.config import DataConfig, parse
from cdnctl.training.datasets import Pictures, fingerprint, load_datasets
from cdnctl.training.halves import chosen

SIZES = [(20 + i % 3, 24 - i % 5) for i in range(31)]


def many() -> tuple[Pictures, list[np.ndarray]]:
    return collection(SIZES, [i % 3 for i in range(31)])


def held(pictures: Pictures) -> list[bytes]:
    """Each picture as bytes, to tell which it is."""
    ends = pictures.offsets + pictures.sizes.prod(1) * pictures.channels
    return [
        pictures.buffer[a:b].numpy().tobytes()
        for a, b in zip(pictures.offsets.tolist(), ends.tolist(), strict=True)
    ]


def part(pictures: Pictures, half: str, limit: int = 0, **more: bool) -> Pictures:
    return chosen(pictures, DataConfig(half=half, limit=limit, **more))


def test_halves_are_disjoint_and_all_there_is() -> None:
    pictures, _ = many()
    first, second = held(part(pictures, "first")), held(part(pictures, "second"))
    assert (len(first), len(second)) == (16, 15)
    assert sorted(first + second) == sorted(held(pictures))
    assert chosen(pictures, DataConfig()) is pictures
    labels = dict(zip(held(pictures), pictures.labels.tolist(), strict=True))
    one = part(pictures, "second")
    assert [labels[key] for key in held(one)] == one.labels.tolist()


@pytest.mark.parametrize("half", ["all", "first", "second"])
def test_fewer_are_among_more(half: str) -> None:
    pictures, _ = many()
    sets = [set(held(part(pictures, half, limit))) for limit in (1, 4, 9, 0)]
    assert [len(s) for s in sets[:3]] == [1, 4, 9]
    assert sets[0] < sets[1] < sets[2] < sets[3]


def test_a_half_has_a_buffer_of_its_own() -> None:
    """What tells runs apart sees that their pictures are others."""
    pictures, _ = collection([(8, 8)] * 12, [-1] * 12)
    first, second = part(pictures, "first"), part(pictures, "second")
    assert len(first.buffer) == len(second.buffer) == len(pictures.buffer) // 2
    assert fingerprint(first)["sha256"] != fingerprint(second)["sha256"]


def test_copies_are_taken_out_before() -> None:
    """Brighter ones, and such with little noise; but not what is only somewhat alike."""
    rng = np.random.default_rng(0)
    base = rng.integers(60, 180, (30, 32, 32, 3)).astype(float)
    base += 0.5 * base[0]  # all correlate
    base *= 180 / base.max()
    copies = 0.9 * base[:10] + 20 + rng.normal(0, 2, base[:10].shape)
    arrays = np.concatenate([base, copies, base[:5]]).clip(0, 255).astype(np.uint8)
    flat = torch.from_numpy(arrays.transpose(0, 3, 1, 2).copy())
    n, length = len(flat), flat[0].numel()
    pictures = Pictures(
        flat.flatten(),
        torch.arange(n) * length,
        torch.full((n, 2), 32),
        torch.arange(n) % 30,
        (),
    )
    pictures = replace(
        pictures, labels=torch.tensor([*range(30), *range(10), *range(5)])
    )  # which picture it is a copy of
    first, second = (part(pictures, half).labels.tolist() for half in ("first", "second"))
    assert sorted(first + second) == list(range(30))
    first, second = (
        part(pictures, half, distinct=False).labels.tolist() for half in ("first", "second")
    )
    assert len(first + second) == 45 and set(first) & set(second)


def test_flat_pictures_are_one() -> None:
    pictures, _ = collection([(8, 8)] * 3, [-1] * 3)
    pictures.buffer[: 2 * 192] = torch.tensor([7, 9], dtype=torch.uint8).repeat_interleave(192)
    assert len(part(pictures, "all", 3)) == 2
    with pytest.raises(UsageError, match=r"of 2 pictures 1 differ"):
        part(pictures.subset(torch.tensor([0, 1])), "second")


def test_bad_values() -> None:
    with pytest.raises(ConfigError, match=r"data.half is 'third', but must be all, first or sec"):
        parse({"data": {"half": "third"}})
    with pytest.raises(ConfigError, match=r"data.limit is -1"):
        parse({"data": {"limit": -1}})


def test_a_run_sees_its_half_only(tmp_path: Path) -> None:
    """A run with a half, and on a folder that holds no more than that half, are one run."""
    labelled(tmp_path / "set", 24)
    data = {"patch": 4, "batch": 4, "holdout": 0, "distinct": False}
    sections = {"data": data | {"half": "second"}}
    run(tmp_path / "half", [tmp_path / "set"], sections=sections)
    whole, _ = load_datasets([tmp_path / "set"], DataConfig(holdout=0), CPU)
    mine = part(whole, "second", distinct=False)
    assert len(mine) == 12
    wanted = {int(key[0]) for key in held(mine)}  # levels are numbers of files
    for path in (tmp_path / "set").rglob("*.png"):
        if int(path.stem) not in wanted:
            path.unlink()
    run(tmp_path / "alone", [tmp_path / "set"], sections={"data": data})
    one, other = (load_file(tmp_path / name / "last" / MODEL) for name in ("half", "alone"))
    assert all(torch.equal(one[key], other[key]) for key in one)
