"""The commands that measure, evaluate, attack and ood: what they print, write and refuse."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from processes import Run
from tiny import CLASSES, picture, save_tiny

from cdnctl import images
from cdnctl.analysis.attacks import Attack, Budget, robustness
from cdnctl.api import load
from cdnctl.cli.attack import parse_attacks
from cdnctl.cli.options import parse_levels
from cdnctl.cli.tables import Column, print_table
from cdnctl.errors import UsageError
from cdnctl.images import Image
from cdnctl.measure.evaluate import find_samples

pytestmark = pytest.mark.slow  # seconds each

Measure = Callable[..., tuple[int, str, str]]
"""A command and its options to exit code, standard output and standard error."""


def write(path: Path, pixels: np.ndarray) -> Path:
    """A float TIFF, so that what is read back is exactly what was made."""
    path.parent.mkdir(parents=True, exist_ok=True)
    images.write(Image.of(pixels, np.float32), path)
    return path


@pytest.mark.parametrize(
    ("text", "levels"),
    [
        ("15,25,50", [15, 25, 50]),
        ("0:100:10", list(range(0, 101, 10))),
        ("0:5:2", [0, 2, 4]),
        ("7:7:1", [7]),
        ("10:12:0.5,100", [10, 10.5, 11, 11.5, 12, 100]),
        ("2:1:-0.2", [2, 1.8, 1.6, 1.4, 1.2, 1]),
    ],
)
def test_noise_levels(text: str, levels: list[float]) -> None:
    assert parse_levels(text) == pytest.approx([v / 255 for v in levels], abs=1e-12)


@pytest.mark.parametrize(
    "text", ["0:100", "0:10:0", "10:0:1", "a:b:c", "0:1:2:3", "0:100:0.01", "0:inf:1", "200:300:50"]
)
def test_noise_levels_that_make_no_sense(text: str) -> None:
    with pytest.raises(UsageError, match=text if "200" not in text else "300"):
        parse_levels(text)


def test_attacks_by_norm_and_radius() -> None:
    found = parse_attacks(["linf:1,2, l2:0.25", "square:8"])
    expected = [("linf", 1 / 255), ("linf", 2 / 255), ("l2", 0.25), ("square", 8 / 255)]
    assert found == [Attack(kind, radius) for kind, radius in expected]


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("4", "'4'"),
        ("linf:", "'linf:'"),
        ("linf:x", "'linf:x'"),
        ("l1:4", "'l1'"),
        ("linf:-1", "-0.0"),
        ("l2:128", "l2:0.5"),  # for the other scale
        ("linf:0.0157", "linf:4"),
    ],
)
def test_attacks_that_make_no_sense(text: str, says: str) -> None:
    with pytest.raises(UsageError, match=says):
        parse_attacks([text])


@pytest.fixture
def measure(tmp_path: Path, cdnctl: Run) -> Measure:
    """A command on class folders ``in``, beside weights of three architectures."""
    for arch, name in [("gradresnet", "joint"), ("classifier", "alone"), ("unet", "unet")]:
        save_tiny(tmp_path / f"{name}.safetensors", arch, patch=16)
    for i in range(6):
        write(tmp_path / "in" / CLASSES[i % 3] / f"{i}.tif", picture(16, 16, top=25 * i))

    def run(command: str, *args: object) -> tuple[int, str, str]:
        done = cdnctl(command, "in", *args)
        return done.code, done.text, done.err

    return run


MODELS = [part for n in ("joint", "alone", "unet") for part in ("--model", f"{n}.safetensors")]


def reports(out: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in out.splitlines()]


@pytest.mark.slow
def test_models_side_by_side(tmp_path: Path, measure: Measure) -> None:
    options = ("--sigma", "0:50:25", "--limit", 4)
    code, out, _ = measure("evaluate", *MODELS, *options, "--json", "--csv", "rows.csv")
    assert code == 0
    joint, alone, unet = reports(out)
    for report, can in [(joint, "both"), (alone, "accuracy"), (unet, "psnr")]:
        assert [row["sigma"] for row in report["scores"]] == [0, 25, 50]
        for row in report["scores"]:
            assert row["pictures"] == 4
            assert (row["accuracy"] is None) == (can == "psnr")
            assert (row["psnr"] is None) == (can == "accuracy" or row["sigma"] == 0)
    with (tmp_path / "rows.csv").open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 3 * 4 * 3 and {row["model"] for row in rows} == {"joint", "alone", "unet"}
    for report in (joint, unet):
        for score in report["scores"][1:]:
            psnrs = [
                float(row["psnr"])
                for row in rows
                if (row["model"], float(row["sigma"]))
                == (report["protocol"]["model"], score["sigma"])
            ]
            assert np.mean(psnrs) == pytest.approx(score["psnr"])
    (single,) = reports(measure("evaluate", *MODELS[2:4], *options, "--json")[1])
    assert single == alone, "company changes no score"
    table = measure("evaluate", *MODELS, *options)[1]
    assert "joint" in table and "unet" in table and "PSNR" in table
    assert "model" not in measure("evaluate", *MODELS[:2], *options, "-q")[1]


COLUMNS = ("sigma", "pictures", "PSNR noisy", "PSNR", "SSIM", "PSNR, class told", "accuracy")


def cells(table: str) -> list[list[str]]:
    """Rows of a printed table, the header first."""
    lines = [line for line in table.splitlines() if line[:1] in ("┃", "│")]
    return [[cell.strip() for cell in line[1:-1].split(line[0])] for line in lines]


@pytest.mark.parametrize(
    "options, gaps, notes",
    [
        ((*MODELS[:2], "--sigma", "25"), set(), []),
        ((*MODELS[:2], "--sigma", "0"), {2, 3, 4, 5}, ["at sigma 0"]),
        ((*MODELS[2:4], "--sigma", "25"), {2, 3, 4, 5}, ["'alone' (classifier)", "not denoise"]),
        ((*MODELS[4:], "--sigma", "25"), {5, 6}, ["'unet' (unet)", "does not classify"]),
        ((*MODELS[:2], "--noisy", "in"), set(), []),
    ],
    ids=["all", "no noise", "classifier", "denoiser", "pairs"],
)
def test_no_column_vanishes(
    measure: Measure, options: Any, gaps: set[int], notes: list[str]
) -> None:
    code, out, err = measure("evaluate", *options)
    header, row = cells(out)
    assert code == 0 and tuple(header) == COLUMNS
    assert {i for i, cell in enumerate(row) if cell == "-"} == gaps
    assert all(n in err for n in notes) and len(err.splitlines()) == bool(notes)
    assert measure("evaluate", *options, "-q")[2] == ""


def test_why_there_is_no_accuracy(tmp_path: Path, measure: Measure) -> None:
    for i in range(4):
        write(tmp_path / "in" / f"strange {i}" / "1.tif", picture(16, 16))
    options = (*MODELS[:2], *MODELS[4:], "--sigma", "25")
    _, out, err = measure("evaluate", *options)
    assert [row[-1] for row in cells(out)] == ["accuracy", "-", "-"]
    assert "strange 0, strange 1, strange 2 and 1 more" in err and "does not classify" in err
    for folder in [p for p in (tmp_path / "in").iterdir() if p.is_dir()]:
        for file in folder.iterdir():
            file.rename(tmp_path / "in" / f"{folder.name} {file.name}")
    assert (
        "no accuracy, which takes folders named after classes" in measure("evaluate", *options)[2]
    )


def test_nothing_to_draw(tmp_path: Path, measure: Measure) -> None:
    code, out, err = measure("evaluate", *MODELS[4:], "--sigma", "0", "--plot", "p.png")
    assert code == 0 and cells(out) and "'p.png' is not drawn" in err
    assert not (tmp_path / "p.png").exists()


def test_a_table_in_a_pipe_is_not_wrapped(tmp_path: Path, measure: Measure) -> None:
    name = "a model of a very long name " * 3
    (tmp_path / "joint.safetensors").rename(tmp_path / f"{name}.safetensors")
    save_tiny(tmp_path / f"{name}.safetensors", patch=16)
    models = ("--model", f"{name}.safetensors", *MODELS[4:])
    rows = cells(measure("evaluate", *models, "--sigma", "25")[1])
    assert len(rows) == 3 and tuple(rows[0]) == ("model", *COLUMNS) and rows[1][0] == name.strip()


def test_a_broken_file_is_reported_once(tmp_path: Path, measure: Measure) -> None:
    (tmp_path / "in" / "cat" / "broken.png").write_text("no picture")
    for command in (["evaluate"], ["attack", "--radius", "linf:1", "--steps", 1], ["ood"]):
        chosen = MODELS if command == ["evaluate"] else MODELS[:4]
        code, out, err = measure(*command, *chosen, "--json")
        assert code == 1 and err.count("broken.png") == 1
        assert len(reports(out)) == len(chosen) / 2


def test_nothing_but_broken_files(tmp_path: Path, measure: Measure) -> None:
    for file in (tmp_path / "in").rglob("*.tif"):
        file.write_text("no picture")
    for command in ("evaluate", "attack", "ood"):
        code, out, err = measure(command, *MODELS[:2])
        assert code == 1 and err.count("cannot read") == 6 and "%" not in out


@pytest.mark.parametrize("option", ["--csv", "--plot"])
def test_files_that_exist_are_kept(tmp_path: Path, measure: Measure, option: str) -> None:
    path = tmp_path / ("rows.csv" if option == "--csv" else "curves.png")
    path.write_text("precious")
    options = (*MODELS[:2], "--sigma", "25", option, path)
    code, out, err = measure("evaluate", *options)
    assert code == 2 and path.name in err and "--overwrite" in err and not out
    assert path.read_text() == "precious"
    assert measure("evaluate", *options, "--overwrite")[0] == 0
    assert path.read_bytes()[:8] != b"precious"


@pytest.mark.slow
def test_plot(tmp_path: Path, measure: Measure) -> None:
    options = (*MODELS, "--sigma", "0:50:25", "--plot")
    assert measure("evaluate", *options, "curves.png")[0] == 0
    both = images.read(tmp_path / "curves.png").pixels
    assert measure("evaluate", *MODELS[4:], *options[6:], "one.png")[0] == 0
    one = images.read(tmp_path / "one.png").pixels
    assert both.shape[0] == one.shape[0] and both.shape[1] == 2 * one.shape[1], "two axes and one"
    # The default colours of three lines are there.
    drawn = {tuple(c) for c in np.rint(255 * both.reshape(-1, 3)).astype(int)}
    assert {(31, 119, 180), (255, 127, 14), (44, 160, 44)} <= drawn
    assert measure("evaluate", *options, "curves.xyz")[0] == 2
    assert measure("evaluate", *options, "new.png", "--noisy", "in")[0] == 2
    assert not (tmp_path / "new.png").exists()


@pytest.mark.slow
def test_attacks(tmp_path: Path, measure: Measure) -> None:
    options = ("--radius", "linf:0,2,l2:0.1", "--steps", 3, "--restarts", 2, "--json")
    code, out, _ = measure("attack", *MODELS[:4], *options, "--sigma", "0,25", "--limit", 5)
    assert code == 0
    for report, name in zip(reports(out), ("joint", "alone"), strict=True):
        assert report["protocol"]["steps"] == 3 and report["protocol"]["restarts"] == 2
        model = load(tmp_path / f"{name}.safetensors")
        samples = find_samples(tmp_path / "in", None, model)
        chosen = [samples[i * 6 // 5] for i in range(5)]
        pictures = [(images.read(s.clean).pixels, str(s.label)) for s in chosen]
        attacks = [Attack("linf", 0.0), Attack("linf", 2 / 255), Attack("l2", 0.1)]
        expected = []
        for sigma in (0.0, 25 / 255):
            for r in robustness(pictures, model, attacks, sigma, budget=Budget(3, 2, 1000)):
                expected.append((round(sigma * 255, 4), r.accuracy, list(r.interval)))
        found = [(r["sigma"], r["robust_accuracy"], r["interval"]) for r in report["robustness"]]
        assert found == expected
        assert [(r["attack"], r["radius"]) for r in report["robustness"][:4]] == [
            ("none", 0), ("linf", 0), ("linf", 2), ("l2", 0.1),
        ]  # fmt: skip
    (transfer,) = reports(measure("attack", *MODELS[:2], *options, "--from", MODELS[3])[1])
    assert transfer["protocol"]["made_on"] == "alone"
    assert measure("attack", *MODELS[4:], *options)[0] == 2, "it cannot classify"
    table = measure("attack", *MODELS[:2], "--radius", "square:4", "--queries", 3)[1]
    assert "square" in table and "95 %" in table


def test_the_defaults_measure_something(measure: Measure) -> None:
    """Each command needs no more than a folder and a model."""
    quick = {"evaluate": (), "attack": ("--steps", 1, "--restarts", 1), "ood": ()}
    found = {c: reports(measure(c, *MODELS[:2], *more, "--json")[1]) for c, more in quick.items()}
    ((scores,), (robust,), (apart,)) = found.values()
    assert [row["sigma"] for row in scores["scores"]] == [15, 25, 50]
    assert [(r["attack"], r["radius"]) for r in robust["robustness"]] == [
        ("none", 0), ("linf", 1), ("linf", 2), ("linf", 4), ("linf", 8),
    ]  # fmt: skip
    assert {(row["ood"], row["sigma"]) for row in apart["ood"]} == {
        ("synthetic", 0), ("synthetic", 25),
    }  # fmt: skip


def test_out_of_distribution(tmp_path: Path, measure: Measure) -> None:
    for i in range(3):
        write(tmp_path / "other" / "deep" / f"{i}.tif", picture(40, 30, top=20 * i))
    options = ("other", "synthetic", "--limit", 5)
    code, out, _ = measure("ood", *options, *MODELS, "--json")
    assert code == 0
    joint, alone, unet = (report["ood"] for report in reports(out))
    for rows, count in [(joint, 2 * (1 + 4)), (alone, 2 * 2), (unet, 2 * 2)]:
        assert len(rows) == count
        for row in rows:
            assert row["pictures"] == 5 and 0 <= row["auroc"] <= 1
            assert row["others"] == (3 if row["ood"] == "other" else 5)
    assert "AUROC" in measure("ood", *options, *MODELS[:2])[1]
    same = reports(measure("ood", "in", *MODELS[:2], "--sigma", 25, "--json")[1])
    assert all(abs(row["auroc"] - 0.5) < 0.26 for row in same[0]["ood"]), "its own pictures"


@pytest.mark.parametrize(
    "args",
    [
        ("attack", "--csv", "a.csv"),
        ("attack", "--radius", "l3:1"),
        ("attack", "--from", "unet.safetensors"),
        ("ood", "--plot", "a.png"),
        ("ood", "--noisy", "in"),
        ("ood", "nowhere"),
        ("evaluate", "--attack", "linf:1"),
        ("evaluate", "--ood", "synthetic"),
        ("evaluate", "--sigma", "0:10:0"),
        ("evaluate", "--clip", "--noisy", "in"),
        ("evaluate", "--sigma", "25", "--noisy", "in"),
    ],
)
def test_what_is_refused(tmp_path: Path, measure: Measure, args: tuple[str, ...]) -> None:
    code, out, err = measure(*args, *MODELS[:2])
    assert code == 2 and err and not out
    assert not list(tmp_path.glob("a.*"))


def test_names_are_printed_as_they_are(capsys: pytest.CaptureFixture[str]) -> None:
    """A name may look like markup; what has no column is not shown, and None is told apart."""
    names = ["[bold]runs[/bold]", "[/b]", "a\\[b", ":cat:"]
    columns = {"name": Column("name"), "ssim": Column("SSIM", ".2f", missing="none")}
    rows = [{"file": "hidden", "name": name, "ssim": None} for name in names]
    print_table(columns, [*rows, {"name": "last", "ssim": 0.125}])
    header, *found = cells(capsys.readouterr().out)
    assert header == ["name", "SSIM"]
    assert found == [*([name, "none"] for name in names), ["last", "0.12"]]
