"""Crops of training pictures, and the batches that are drawn from them."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from sets import collection, flat_pictures
from torch import Tensor

from cdnctl.core.noise import sample_sigma
from cdnctl.errors import UsageError
from cdnctl.training.batches import Batch, Batches
from cdnctl.training.config import DataConfig, LossConfig, NoiseConfig
from cdnctl.training.datasets import Pictures


def who(batch: Batch) -> list[int]:
    """Indices of the pictures of ``flat_pictures`` in a batch."""
    return (batch.clean[:, 0, 0, 0] * 255).round().long().tolist()


def cut(array: np.ndarray, top: int, left: int, side: int, turn: int) -> np.ndarray:
    """A crop in plain numpy: mirror at the edges, slice, transpose, flip. (3, side, side)."""
    pad = side + 12
    padded = np.pad(array, ((pad, pad), (pad, pad), (0, 0)), "reflect")
    crop = padded[top + pad : top + pad + side, left + pad : left + pad + side]
    if turn & 1:
        crop = crop[:, ::-1]
    if turn & 2:
        crop = crop[::-1]
    if turn & 4:
        crop = crop.transpose(1, 0, 2)
    return crop.transpose(2, 0, 1)


def test_crops_are_numpy_crops() -> None:
    """All eight turns; inside, over every edge, and of pictures smaller than the crop."""
    pictures, arrays = collection([(9, 14), (6, 6), (3, 5), (1, 4), (1, 1), (2, 2)], [0] * 6)
    rng = np.random.default_rng(1)
    for side in (1, 4, 7):
        which = torch.arange(6).repeat_interleave(16)
        turn = torch.arange(8).repeat(12)
        top, left = torch.from_numpy(rng.integers(-6, 12, (2, len(which))))
        got = pictures.crops(which, top, left, turn, side)
        assert got.dtype is torch.float32
        for k, i in enumerate(which.tolist()):
            want = cut(arrays[i], int(top[k]), int(left[k]), side, int(turn[k]))
            np.testing.assert_allclose(got[k], want, atol=1e-7)


def test_the_eight_turns_are_the_symmetries_of_the_square() -> None:
    pictures, arrays = collection([(5, 5)], [0])
    zero = torch.zeros(8, dtype=torch.int64)
    got = pictures.crops(zero, zero, zero, torch.arange(8), 5).numpy()
    square = arrays[0].transpose(2, 0, 1)
    turned = [np.rot90(square, k, (1, 2)) for k in range(4)]
    symmetries = {np.ascontiguousarray(t).tobytes() for s in turned for t in (s, s[:, :, ::-1])}
    assert len(symmetries) == 8
    assert {np.ascontiguousarray(c).tobytes() for c in got} == symmetries


def make_batches(pictures: Pictures, seed: int = 0, **data: Any) -> Batches:
    return Batches(pictures, DataConfig(**data), NoiseConfig(), LossConfig(), seed)


@pytest.mark.parametrize(
    "labels,shift,rotate", [([-1], 3, True), ([-1], 0, False), ([0], 0, True), ([0], 2, True)]
)
def test_crops_of_a_batch_are_all_those_allowed(
    labels: list[int], shift: int, rotate: bool
) -> None:
    """Labelled: shifted over the edge and mirrored. Unlabelled: inside, and turned."""
    pictures, arrays = collection([(5, 6)], labels)
    draw = make_batches(pictures, patch=4, batch=256, shift=shift, rotate=rotate)
    reach = shift if labels == [0] else 0
    allowed = {
        np.rint(cut(arrays[0], top, left, 4, turn) * 255).astype(np.uint8).tobytes()
        for top in range(-reach, 2 + reach)
        for left in range(-reach, 3 + reach)
        for turn in range(8 if labels == [-1] and rotate else 2)
    }
    seen = {
        np.rint(crop.numpy() * 255).astype(np.uint8).tobytes()
        for step in range(6)
        for crop in draw(step).clean
    }
    assert seen == allowed


@pytest.mark.parametrize("batch", [1, 4, 5, 7, 30])
def test_an_epoch_shows_every_picture_once(batch: int) -> None:
    labels = [0] * 7 + [-1] * 11 + [1] * 6
    draw = make_batches(flat_pictures(labels), patch=2, batch=batch, labelled_share=0.4)
    order = [i for step in range(60) for i in who(draw(step))]
    for pool in ({i for i, c in enumerate(labels) if c >= 0}, {7 + i for i in range(11)}):
        mine = [i for i in order if i in pool]
        epochs = [mine[k : k + len(pool)] for k in range(0, len(mine) - len(pool), len(pool))]
        assert all(sorted(epoch) == sorted(pool) for epoch in epochs)
        assert len(epochs) < 3 or len({tuple(epoch) for epoch in epochs}) > 1


def equal(a: Batch, b: Batch) -> bool:
    if (a.lesson is None) != (b.lesson is None):
        return False
    same = a.lesson is None or b.lesson is None or equal(a.lesson, b.lesson)
    return same and all(torch.equal(x, tensors(b)[name]) for name, x in tensors(a).items())


def tensors(batch: Batch) -> dict[str, Tensor]:
    return {name: value for name, value in vars(batch).items() if isinstance(value, Tensor)}


def test_a_batch_depends_on_seed_and_step_alone() -> None:
    pictures, _ = collection([(8, 9)] * 5 + [(7, 7)] * 5, [0, 1] * 3 + [-1] * 4)
    config = {"patch": 4, "batch": 6}
    in_order = make_batches(pictures, **config)
    forward = [in_order(t) for t in range(8)]
    draw = make_batches(pictures, **config)
    for t in (5, 0, 7, 7, 2, 6, 5):
        assert equal(draw(t), forward[t])
        assert equal(make_batches(pictures, **config)(t), forward[t])
    torch.manual_seed(123)
    torch.rand(7)
    assert equal(draw(3), forward[3])
    for other in (forward[4], make_batches(pictures, seed=1, **config)(3)):
        for name, value in tensors(forward[3]).items():
            if name in ("clean", "noise", "sigma"):
                assert not torch.equal(getattr(other, name), value), name


LESSON = {"patch": 4, "batch": 6, "class_batch": 4, "class_patch": 3, "thumbnail": 6}


def test_thumbnails_teach_classes_and_nothing_else() -> None:
    """Small labelled pictures in the lesson, large ones of both kinds outside of it."""
    sizes = [(5, 9)] * 5 + [(8, 9)] * 5 + [(7, 7)] * 5 + [(5, 5)] * 2
    labels = [0, 1, 2, 3, 0] + [1] * 5 + [-1] * 7
    pictures, _ = collection(sizes, labels)
    lessons, rest = set(), set()
    for step in range(20):
        batch = make_batches(pictures, **LESSON)(step)
        lesson = batch.lesson
        assert lesson is not None and lesson.lesson is None
        assert batch.clean.shape == (6, 3, 4, 4) and lesson.clean.shape == (4, 3, 3, 3)
        assert (lesson.labels >= 0).all()
        lessons |= set(lesson.labels.tolist())
        rest |= set(batch.labels.tolist())
    assert lessons == {0, 1, 2, 3} and rest == {-1, 1}
    shares = [make_batches(pictures, **LESSON)(3, rank, 2).lesson for rank in range(2)]
    whole = make_batches(pictures, **LESSON)(3).lesson
    assert whole is not None and all(share is not None for share in shares)
    assert torch.equal(torch.cat([s.sigma for s in shares if s])[[0, 2, 1, 3]], whole.sigma)
    with pytest.raises(UsageError, match=r"data\.thumbnail = 20"):
        make_batches(pictures, **LESSON | {"thumbnail": 20})


def test_lessons_have_little_noise_and_half_of_them_none() -> None:
    """Labelled pictures teach in both places where none of them are thumbnails."""
    pictures, _ = collection([(9, 9)] * 8, [0, 1] * 4)
    asked = LESSON | {"thumbnail": 0, "class_batch": 40}
    noise = NoiseConfig(high=100, lessons=8)
    batch = Batches(pictures, DataConfig(**asked), noise, LossConfig(), seed=0)(0)
    lesson = batch.lesson
    assert lesson is not None and not batch.alone
    assert torch.equal(lesson.told, lesson.sigma) and 0 < lesson.sigma.max() <= 8 / 255
    assert 10 <= int((lesson.sigma == 0).sum()) <= 30
    assert batch.sigma.max() > 8 / 255


def test_some_are_told_more_noise_than_they_have_and_some_have_very_much() -> None:
    pictures, _ = collection([(9, 9)] * 8, [0, 1] * 4)
    noise = NoiseConfig(high=100, excess=0.3, wide=0.2, top=1500)
    data = DataConfig(patch=4, batch=400)
    batch = Batches(pictures, data, noise, LossConfig(), seed=0)(0)
    told, sigma = batch.told * 255, batch.sigma * 255
    assert (told >= sigma).all() and told.max() <= 1500
    assert 0.2 < (told > sigma).float().mean() < 0.4
    far = told > 100
    assert 0.1 < far.float().mean() < 0.3
    # Uniform in the logarithm: half of them below the geometric mean of the ends.
    middle = (100 * 1500) ** 0.5
    assert 0.3 < (told[far] < middle).float().mean() < 0.7
    plain = Batches(pictures, data, NoiseConfig(high=100), LossConfig(), seed=0)(0)
    assert torch.equal(plain.noise, batch.noise), "and nothing else is drawn anew"


def test_patterns_are_of_two_colours_and_repeat() -> None:
    pictures, _ = collection([(40, 40)] * 4, [0] * 4)
    asked = {"patch": 32, "batch": 8}
    found = {"stripes": 0, "checks": 0}
    for step in range(20):
        plain = make_batches(pictures, **asked)(step)
        batch = make_batches(pictures, **asked, patterns=0.5)(step)
        assert torch.equal(batch.noise, plain.noise) and torch.equal(batch.sigma, plain.sigma)
        for clean, before, label in zip(batch.clean, plain.clean, batch.labels, strict=True):
            if torch.equal(clean, before):
                continue
            assert label == -1
            assert len(clean.flatten(1).unique(dim=1).T) <= 2
            # Twice the widest band is a period of all.
            assert torch.equal(clean[:, 16:], clean[:, :-16])
            assert torch.equal(clean[..., 16:], clean[..., :-16])
            plain_axis = bool((clean == clean[:, :1]).all() or (clean == clean[..., :1]).all())
            found["stripes" if plain_axis else "checks"] += 1
    assert sum(found.values()) in range(50, 111) and min(found.values()) > 10


def test_flats_are_linear_in_place_and_as_many_as_asked_for() -> None:
    pictures, _ = collection([(9, 9)] * 4, [0] * 4)
    flat = 0
    for step in range(20):
        plain = make_batches(pictures, patch=5, batch=64)(step).clean
        batch = make_batches(pictures, patch=5, batch=64, flats=0.25)(step)
        mixed = batch.clean
        changed = (plain != mixed).flatten(1).any(1)
        assert torch.equal(batch.labels == -1, changed) and not batch.condition[changed].any()
        flat += int(changed.sum())
        for crop in mixed[changed]:
            assert crop.min() >= 0 and crop.max() <= 1
            inside = ((crop > 0) & (crop < 1)).flatten(1).all(1)
            bend = crop.diff(n=2, dim=1).abs().amax((1, 2)) + crop.diff(n=2, dim=2).abs().amax(
                (1, 2)
            )
            assert (bend[inside] < 1e-5).all()
    assert 0.2 < flat / (20 * 64) < 0.3


def test_noise_levels_are_one_of_each_stratum() -> None:
    for seed in range(5):
        g = torch.Generator().manual_seed(seed)
        u = sample_sigma(16, 0, 1, 1.0, g)
        assert sorted((u * 16).long().tolist()) == list(range(16))
        assert u.tolist() != sorted(u.tolist())


@pytest.mark.parametrize("world", [2, 3, 6])
def test_shares_of_the_processes_make_up_the_batch(world: int) -> None:
    pictures, _ = collection([(8, 9)] * 10, [0, 1] * 3 + [-1] * 4)
    draw = make_batches(pictures, patch=4, batch=6)
    for step in (0, 5):
        whole = draw(step)
        shares = [draw(step, rank, world) for rank in range(world)]
        assert {len(share.sigma) for share in shares} == {6 // world}
        joined = torch.cat([share.sigma for share in shares])
        place = [joined.tolist().index(v) for v in whole.sigma.tolist()]
        assert sorted(place) == list(range(6))
        for name, value in tensors(whole).items():
            parts = torch.cat([getattr(share, name) for share in shares])
            assert torch.equal(parts[place], value), name


@pytest.mark.parametrize(
    "labels,share,count",
    [
        ([0] * 9 + [-1] * 5, 0.5, 5),
        ([0] * 9 + [-1] * 5, 0.25, 2),  # 2.5 rounds to even
        ([0] * 9 + [-1] * 5, 0.0, 0),
        ([0] * 9 + [-1] * 5, 1.0, 10),
        ([0] * 9, 0.5, 10),
        ([-1] * 5, 0.5, 0),
    ],
)
def test_mixing_of_labelled_and_unlabelled(labels: list[int], share: float, count: int) -> None:
    pictures = flat_pictures(labels)
    draw = make_batches(pictures, patch=2, batch=10, labelled_share=share)
    for step in range(5):
        batch = draw(step)
        assert len(batch.labels) == 10
        assert int((batch.labels >= 0).sum()) == count
        assert batch.labels.tolist() == [labels[i] for i in who(batch)]
        assert not batch.condition[batch.labels < 0].any()


def test_noise_of_a_batch() -> None:
    pictures = flat_pictures([0] * 8)
    config = NoiseConfig(low=51, high=102)
    for share in (0.0, 0.3, 1.0):
        draw = Batches(
            pictures, DataConfig(patch=4, batch=200), config, LossConfig(conditional=share), 0
        )
        batches = [draw(t) for t in range(5)]
        sigma = torch.cat([b.sigma for b in batches])
        assert sigma.min() >= 0.2 and sigma.max() <= 0.4 and sigma.std() > 0.04
        noise = torch.cat([b.noise for b in batches])
        assert abs(noise.mean()) < 0.02 and abs(noise.std() - 1) < 0.02
        condition = torch.cat([b.condition for b in batches]).float().mean().item()
        assert abs(condition - share) < 0.05
        assert share not in (0.0, 1.0) or condition == share


@pytest.mark.parametrize("share", [0.0, 0.3, 1.0])
def test_some_are_told_less_noise_than_there_is(share: float) -> None:
    pictures, data = flat_pictures([0] * 8), DataConfig(patch=4, batch=200)
    plain = NoiseConfig(low=51, high=102)
    batch = Batches(pictures, data, replace(plain, mismatch=share), LossConfig(), 0)(3)
    ratio = batch.told / batch.sigma
    assert ratio.min() >= 0.25 and ratio.max() <= 1
    assert abs((ratio < 1).float().mean() - share) < 0.1
    assert share or torch.equal(batch.told, batch.sigma)
    assert share < 1 or (ratio.min() < 0.3 and abs(ratio.mean() - 0.625) < 0.05)
    same = Batches(pictures, data, plain, LossConfig(), 0)(3)
    assert torch.equal(same.noise, batch.noise) and torch.equal(same.sigma, batch.sigma)
