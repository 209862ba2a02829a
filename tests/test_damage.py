"""Tests of damaged files: each gives a picture or one clear error, whatever is in it."""

from __future__ import annotations

import warnings

import numpy as np
import pytest
from specimens import KINDS, MORE_KINDS, more_specimens, mutations, read_bytes, specimens

from cdnctl import images
from cdnctl.errors import ImageError

pytestmark = pytest.mark.slow  # thousands of damaged files


@pytest.mark.parametrize("kind", KINDS + MORE_KINDS)
def test_damaged_files_give_an_image_or_an_image_error(kind, capfd):
    files = specimens() | more_specimens()
    if kind not in files:
        pytest.skip("pillow-heif, which the extra heic brings, is not installed")
    data, name = files[kind], f"a.{kind.split('-')[0]}"  # TGA is known by its suffix only
    outcomes = {True: 0, False: 0}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        images.decode(data, name)
        for copy in mutations(data, 400, seed=len(kind)):
            try:
                image = images.decode(copy, name)
            except ImageError as error:
                assert name in str(error) and len(str(error)) < 300
                assert str(error).isprintable(), "on one line, and no commands to terminals"
                outcomes[False] += 1
            else:
                assert image.pixels.dtype == np.float32 and np.isfinite(image.pixels).all()
                if image.pixels.size < 10_000:
                    images.encode(image, ".tif")
                outcomes[True] += 1
    assert min(outcomes.values()) > 0
    printed = capfd.readouterr()
    # dav1d, which older Pillows bring, prints to stderr from C.
    assert printed.out == "" and (printed.err == "" or kind == "avif")


@pytest.mark.parametrize("kind", KINDS)
def test_a_file_cut_short_is_an_error_or_has_all_its_pixels(kind):
    data = specimens()[kind]
    whole = read_bytes(data)
    for length in range(0, len(data), max(1, len(data) // 150)):
        try:
            image = read_bytes(data[:length])
        except ImageError:
            continue
        missing_exif = image.metadata.exif != whole.metadata.exif  # it may follow the pixels
        assert missing_exif or np.array_equal(image.pixels, whole.pixels)
