"""Crops by which settings are judged, and what the settings make of them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from processes import Run
from tiny import files, noisy_picture, save_tiny, tiny, write

from cdnctl import images
from cdnctl.figures import contact_sheet
from cdnctl.images import Image
from cdnctl.restore import Level, Settings, restore
from cdnctl.restore.preview import overlap, restored_at, telling_places


def test_places_show_what_their_names_say() -> None:
    rng = np.random.default_rng(0)
    y = np.full((240, 400, 3), 0.5) + 0.02 * rng.standard_normal((240, 400, 3))
    y[0:100, 0:100] -= 0.3
    y[120:220, 300:400] += 0.3
    y[120:220, 20:120] += 0.3 * rng.choice([-1, 1], (100, 100, 1))
    y[0:80, 300:400] = 1  # clipped: no lights to judge by
    places = telling_places(np.clip(y, 0, 1), 64)
    assert list(places) == ["shadows", "lights", "texture"]
    tones = {name: y[place].mean() for name, place in places.items()}
    assert tones["shadows"] < 0.3 and 0.7 < tones["lights"] < 0.9
    assert y[places["texture"]].std() > 0.2
    assert all(part.stop - part.start == 64 for place in places.values() for part in place)


def test_places_do_not_overlap_and_small_pictures_are_one() -> None:
    y = noisy_picture(80, 120)
    places = list(telling_places(y, 60).values())
    assert not any(overlap(a, b) for i, a in enumerate(places) for b in places[:i])
    assert telling_places(y, 200) == {"the picture": (slice(0, 80), slice(0, 120))}
    assert len(telling_places(y, 80)) <= 2


@pytest.mark.parametrize("arch", ["unet", "gradresnet"])
def test_places_are_those_of_the_restored_picture(tmp_path: Path, arch: str) -> None:
    """Of networks that see a part on its own, and of those that must know the whole."""
    model = tiny(tmp_path, arch, widths=[8], blocks=[1], patch=512)
    image = Image.of(noisy_picture(280, 300), np.float32)
    settings, level = Settings(0.2, strength=(0.5, 1.0)), Level(0.2)
    places = [(slice(0, 40), slice(10, 50)), (slice(200, 240), slice(250, 300))]
    whole = restore(image, model, settings).image.samples
    for place, found in zip(
        places, restored_at(image, model, settings, level, places), strict=True
    ):
        np.testing.assert_allclose(found, whole[place], atol=1e-5)


def test_crops_stand_in_the_sheet_as_they_are() -> None:
    rng = np.random.default_rng(0)
    crops = [Image(rng.integers(0, 256, (40, 60, 3), np.uint8)) for _ in range(4)]
    sheet = contact_sheet(["input", "sigma 5"], {"a": crops[:2], "b": crops[2:]}, "words").samples
    windows = np.lib.stride_tricks.sliding_window_view(sheet, (40, 60, 3))[:, :, 0]
    corners = np.argwhere([(windows[:, :, 0, 0] == c.samples[0, 0]).all(-1) for c in crops])
    found = {
        i: (row, column)
        for i, row, column in corners
        if np.array_equal(windows[row, column], crops[i].samples)
    }
    assert len(found) == 4
    assert found[0][0] == found[1][0] < found[2][0] == found[3][0]
    assert found[0][1] == found[2][1] < found[1][1] == found[3][1]


def test_a_sheet_and_nothing_else(tmp_path: Path, cdnctl: Run) -> None:
    model = save_tiny(tmp_path / "m.safetensors")
    write(tmp_path / "p.png", noisy_picture(64, 96))
    before = files(tmp_path)
    command = ("denoise", "p.png", "--model", model, "--sigma", "5,auto", "--strength", "0.5,1")
    done = cdnctl(*command, "--sheet", "sheet.png", "--json")
    assert done.code == 0 and len(done.records[0]["sigmas"]) == 2
    assert set(files(tmp_path)) == {*before, "sheet.png"}
    assert images.read(tmp_path / "sheet.png").samples.shape[1] > 3 * 96
    assert cdnctl(*command, "--sheet", "sheet.png").code == 2  # it exists
    for wrong in (
        ("--sheet", "sheet.jpg"),
        ("--sheet", "new.png", "-o", "out.png"),
        ("--sheet", "new.png", "p.png"),
        (),
    ):
        done = cdnctl(*command, *wrong)
        assert done.code == 2 and done.err.count("\n") == 1
    assert set(files(tmp_path)) == {*before, "sheet.png"}
