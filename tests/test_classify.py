"""Many pictures classified together: as each on its own, in order, and as a table."""

from __future__ import annotations

import csv
import os
import subprocess
from pathlib import Path

import numpy as np
import pytest
from processes import COMMAND, Run
from tiny import noisy_picture, tiny, write

from cdnctl import images
from cdnctl.images import Image
from cdnctl.restore import classify, classify_together, seen

# Larger than the crops of the training (64), smaller, long; gray and colour.
SIZES = [(20, 24, 3), (20, 24, 1), (90, 80, 3), (24, 20, 3), (20, 24, 3), (80, 90, 1), (70, 300, 3)]


def pictures() -> list[Image]:
    return [Image.of(noisy_picture(*size, seed=i)) for i, size in enumerate(SIZES * 2)]


@pytest.mark.parametrize("arch", ["gradresnet", "classifier", "hybrid"])
def test_together_is_one_by_one(tmp_path: Path, arch: str) -> None:
    model = tiny(tmp_path, arch)
    for sigma in (None, 0.1):
        alone = [classify(image, model, sigma) for image in pictures()]
        together = classify_together([seen(image, model, sigma) for image in pictures()])
        assert together == alone
        assert len({tuple(one.posterior.values()) for one in alone}) == len(alone)
    # Against the network itself, at the scale of the training.
    y = images.to_unit(pictures()[0].samples)
    expected = model.posterior(y, 0.1)
    found = np.array([alone[0].posterior[name] for name in model.classes])
    np.testing.assert_allclose(found, expected, atol=1e-5)
    assert classify_together([]) == []


def test_a_table_of_a_folder(tmp_path: Path, cdnctl: Run, weights: Path) -> None:
    for i, image in enumerate(pictures()[:7]):
        write(tmp_path / "in" / f"{i}.png", image.pixels)
    (tmp_path / "in" / "3b.png").write_text("text")
    options = ("--model", weights, "--top", "2")
    done = cdnctl("classify", "in", *options, "--json", "--csv", "a.csv")
    assert done.code == 1
    names = [Path(r["input"]).name for r in done.records]
    assert names == ["0.png", "1.png", "2.png", "3.png", "3b.png", "4.png", "5.png", "6.png"]
    with (tmp_path / "a.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [r["input"] for r in rows] == [r["input"] for r in done.records]
    for row, record in zip(rows, done.records, strict=True):
        if "error" in record:
            assert row["error"] == record["error"] and not row["class"]
            continue
        (first, p), (second, q) = record["classes"].items()
        assert [row["class"], row["class_2"]] == [first, second] and not row["error"]
        assert [float(row["probability"]), float(row["probability_2"])] == [p, q]
        assert [int(row["width"]), int(row["height"])] == record["size"]
        alone = cdnctl("classify", record["input"], *options, "--json").records
        assert alone == [record]
    again = cdnctl("classify", "in", *options, "--csv", "a.csv")
    assert again.code == 2 and "'a.csv' exists" in again.err
    over = cdnctl("classify", "in/0.png", "--model", weights, "--csv", "a.csv", "--overwrite")
    assert over.code == 0 and len((tmp_path / "a.csv").read_text().splitlines()) == 2


def test_certificates_as_a_table(tmp_path: Path, cdnctl: Run, weights: Path) -> None:
    write(tmp_path / "a.png")
    command = ("classify", "a.png", "--model", weights, "--certify", 64, "--draws", 20, "--json")
    (record,) = cdnctl(*command, "--csv", "a.csv").records
    with (tmp_path / "a.csv").open() as file:
        (row,) = csv.DictReader(file)
    assert float(row["radius"]) == record["radius"] and row["class"] == (record["class"] or "")


@pytest.mark.slow
def test_a_reader_that_leaves_costs_no_table(tmp_path: Path, weights: Path) -> None:
    for i in range(3):
        write(tmp_path / "in" / f"{i}.png")
    read, end = os.pipe()
    os.close(read)
    command = [COMMAND, "classify", "in", "--model", weights, "--csv", "a.csv"]
    done = subprocess.run(list(map(str, command)), cwd=tmp_path, stdout=end, check=False)
    os.close(end)
    assert done.returncode == 0
    assert len((tmp_path / "a.csv").read_text().splitlines()) == 4
