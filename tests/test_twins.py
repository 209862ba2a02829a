"""Models drawn from the covariances of another one's weights: exact twins, controls, files."""

from __future__ import annotations

import runpy
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from processes import Run
from tiny import CLASSES, files, picture, save_tiny, tiny, write
from torch import Tensor, nn

from cdnctl.analysis.blocks import blocks, hidden, resample_blocks
from cdnctl.api import Model, load
from cdnctl.checkpoints import Header, build_module, read_header, save_model
from cdnctl.core import spectra
from cdnctl.errors import UsageError
from cdnctl.measure.twins import CONTROLS, draw_twin, look, write_twin

ARCHS = ("gradresnet", "hybrid", "classifier", "unet")


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def noisy(count: int = 3) -> list[tuple[Tensor, Tensor]]:
    draws = [torch.rand(4, 3, 16, 16, generator=generator(s), dtype=torch.float64)
             for s in range(count)]  # fmt: skip
    return [(y, torch.linspace(0.05, 0.3, 4, dtype=torch.float64)) for y in draws]


def network(folder: Path, arch: str) -> nn.Module:
    """Weights that are large enough for every block to matter."""
    net = tiny(folder, arch, num_classes=3, head=8).module.double()
    for block in blocks(net):
        block.second.weight.data *= 4
    return net


def output(net: nn.Module) -> Tensor:
    y, sigma = noisy(1)[0]
    return net.correction(y, sigma)[0] if hasattr(net, "correction") else net.logits(y, sigma)


def turned(rows: Tensor, count: int, g: torch.Generator) -> Tensor:
    return rows[torch.randperm(len(rows), generator=g)]


@pytest.mark.parametrize("arch", ARCHS)
def test_blocks_in_another_order_are_found_out(tmp_path: Path, arch: str) -> None:
    """Activations mind no order, so alignment undoes it; without, the network is another one."""
    net = network(tmp_path, arch)
    want = output(net)
    twin = resample_blocks(net, noisy(), generator(), draw=turned)
    torch.testing.assert_close(output(twin.network), want)
    assert twin.explained == pytest.approx([1.0] * len(list(blocks(net))))
    torch.testing.assert_close(output(net), want, rtol=0, atol=0)  # left alone
    blind = resample_blocks(net, noisy(), generator(), draw=turned, aligned=False)
    assert (output(blind.network) - want).norm() > 0.01 * want.norm()
    assert blind.explained[0] == pytest.approx(1.0), "it is measured all the same"


def test_only_blocks_are_drawn_and_in_the_order_of_their_work(tmp_path: Path) -> None:
    net = network(tmp_path, "hybrid")
    names = [block.name for block in blocks(net)]
    seen = list(hidden(net, names, noisy(1)[0]))
    assert sorted(seen) == sorted(names) != seen, (
        "the decoder goes from the last stage to the first"
    )
    assert [n.partition(".")[0] for n in seen] == ["trunk", "trunk", "decoder", "decoder"]
    twin = resample_blocks(net, noisy(), generator()).network
    before, after = net.state_dict(), twin.state_dict()
    changed = {k for k in before if not torch.equal(before[k], after[k])}
    assert {k.rpartition(".layers.")[0] for k in changed} == {f"{n}.branch" for n in names}
    assert len(changed) == 2 * len(names)


def test_a_block_has_as_much_energy_as_before(tmp_path: Path) -> None:
    """Rows of the same covariance: on average, the first map gives as much."""
    net = network(tmp_path, "classifier")
    (block, *_) = blocks(net)
    before = spectra.trace(spectra.cross(*2 * [block.first.weight.detach().flatten(1)]))
    energies = []
    for seed in range(200):
        (drawn, *_) = blocks(resample_blocks(net, noisy(1), generator(seed)).network)
        rows = drawn.first.weight.detach().flatten(1)
        energies.append(spectra.trace(spectra.cross(rows, rows)) / before)
    found = torch.tensor(energies)
    assert found.mean().item() == pytest.approx(1, abs=4 * found.std().item() / 200**0.5)
    assert found.std() > 0.02, "and each draw is another one"


# -- pictures and files ---------------------------------------------------------------------


def dataset(folder: Path, side: int = 20) -> Path:
    for i, name in enumerate(CLASSES):
        for k in range(4):
            write(folder / name / f"{k}.png", picture(side, side + 4, top=30 * i + 5 * k))
    return folder


def save_scattering(path: Path, **shape: object) -> Path:
    """An untrained scattering network, whose statistics are those of nothing."""
    model = {"num_classes": 3, "widths": [4, 6]} | shape
    arch = str(model.pop("arch", "scattering"))
    if not model["widths"]:
        del model["widths"]
    header = Header(path.stem, arch, model, CLASSES, (0.0, 0.0), 16, {"steps": 7}, scores={"a": 1})
    torch.manual_seed(0)
    save_model(path, build_module(header).state_dict(), header)
    return path


def test_pictures_are_spread_over_datasets(tmp_path: Path) -> None:
    folder = dataset(tmp_path / "a")
    packed = tmp_path / "b.zip"
    with zipfile.ZipFile(packed, "w") as archive:
        for file in folder.rglob("*.png"):
            archive.write(file, f"more/{file.parent.name} {file.name}")
    model = load(save_scattering(tmp_path / "m.safetensors"))
    crops = look([folder, packed], model, 8, generator())
    assert [c.shape for c in crops] == [(8, 3, 16, 16)]
    assert sum(len(c) for c in look([folder, packed], model, 100, generator())) == 24
    small = look([dataset(tmp_path / "small", 10)], model, 2, generator())
    assert small[0].shape == (2, 3, 16, 16), "smaller pictures go on beyond their edges"
    assert 0 <= min(c.min() for c in crops) < max(c.max() for c in crops) <= 1


@pytest.mark.parametrize("control", CONTROLS)
@pytest.mark.parametrize("kind", ["scattering", "denoiser"])
def test_twins_are_models(tmp_path: Path, kind: str, control: str) -> None:
    source = tmp_path / "m.safetensors"
    (save_scattering if kind == "scattering" else save_tiny)(source)
    roots = [dataset(tmp_path / "data")]

    def twin(seed: int) -> Model:
        target = tmp_path / f"twin {seed}.safetensors"
        explained = write_twin(source, target, roots, seed, 12, control)
        assert explained and all(0 < share <= 1 + 1e-6 for share in explained)
        return load(target)

    old, one, again, other = load(source), twin(3), twin(3), twin(4)
    y = torch.rand(2, 3, 16, 16, generator=generator())
    assert torch.equal(one.posterior(y, 0.1), again.posterior(y, 0.1))
    assert not torch.equal(one.posterior(y, 0.1), other.posterior(y, 0.1))
    assert not torch.equal(one.posterior(y, 0.1), old.posterior(y, 0.1))
    assert one.header.scores == {} and one.header.model == old.header.model
    drawn = one.header.training["drawn"]
    assert drawn == {"weights": old.hash, "seed": 3, "control": control, "pictures": 12}
    card = (tmp_path / "twin 3.md").read_text(encoding="utf-8")
    assert old.hash in card and "cdnctl train" not in card and "drawn anew" in card


def test_what_cannot_be_drawn_is_refused(tmp_path: Path) -> None:
    model = load(save_scattering(tmp_path / "m.safetensors", maps="real", frames=2))
    with pytest.raises(UsageError, match=r"'m' \(scattering\).*frames"):
        draw_twin(model, [torch.rand(2, 3, 16, 16)], generator(), "none")
    shape = {"arch": "fixed-scattering", "widths": [], "octaves": 2, "angles": 4}
    fixed = load(save_scattering(tmp_path / "fixed.safetensors", **shape))
    with pytest.raises(UsageError, match="no chain of linear maps"):
        draw_twin(fixed, [torch.rand(2, 3, 16, 16)], generator(), "none")
    few = load(save_scattering(tmp_path / "few.safetensors"))
    with pytest.raises(UsageError, match="2 activations are too few to align the 12 channels"):
        draw_twin(few, [torch.rand(2, 3, 16, 16)], generator(), "none")
    plain = tiny(tmp_path, "classifier", blocks=[0, 0])
    with pytest.raises(UsageError, match="no residual blocks"):
        draw_twin(plain, [torch.rand(2, 3, 16, 16)], generator(), "none")


def test_resample(tmp_path: Path, cdnctl: Run) -> None:
    save_scattering(tmp_path / "m.safetensors")
    dataset(tmp_path / "data")
    command = ("models", "resample", "m.safetensors", "out/twin.safetensors", "--on", "data")
    done = cdnctl(*command, "--seed", "3")
    assert done.code == 0 and "layer by layer" in done.text and "%" in done.text
    made = files(tmp_path / "out")
    assert made.keys() == {"twin.safetensors", "twin.md"}
    assert read_header(tmp_path / "out/twin.safetensors").name == "m-drawn-3"
    assert cdnctl(*command).code == 2, "it is there"
    assert cdnctl("models", "show", "out/twin.safetensors").code == 0
    assert files(tmp_path / "out") == made
    assert cdnctl(*command, "--overwrite", "--quiet", "--seed", "3").text.split() == [
        str(Path("out/twin.safetensors"))
    ]
    assert files(tmp_path / "out") == made
    for wrong, said in (
        (("--control", "black"), "'black'"),
        (("--on", "nowhere"), "nowhere"),
        (("--limit", "0"), "limit"),
    ):
        failed = cdnctl(*command, "--overwrite", *wrong)
        assert failed.code == 2 and said in failed.err, wrong
    assert cdnctl("models", "resample", "m.safetensors", "a.txt", "--on", "data").code == 2


@pytest.mark.slow
def test_the_published_experiment_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """examples/rainbow.py, on a few pictures: what is not drawn anew stays as it was."""
    script = Path(__file__).parent.parent / "examples" / "rainbow.py"
    rng = np.random.default_rng(0)
    for split in ("train", "test"):
        for i in range(600 if split == "train" else 20):  # the MLP has 512 channels to align
            pixels = rng.uniform(0, 1, (32, 32, 3)) * np.linspace(i % 2, 1, 32)[:, None, None]
            write(tmp_path / split / f"class {i % 2}" / f"{i}.png", pixels.astype(np.float32))
    options = "train --test test --epochs 2 --draws 1 --frames"
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.argv", [str(script), *options.split(), "600"])
    runpy.run_path(str(script), run_name="__main__")
    told = capsys.readouterr().out
    for name in ("MLP", "CNN"):
        table = told.partition(f"| {name} |")[2].partition("\n\n")[0]
        rows = [line.split("|")[1:4] for line in table.splitlines() if line.endswith("% |")]
        first = table.splitlines()[2].split("|")
        assert first[1].startswith(" trained") and len(rows) == 5
        right = {row[0].strip(): row[1] for row in rows}
        assert right["not drawn (must be equal)"] == first[2]
        assert all(0 <= float(share.strip(" %")) <= 100 for share in right.values())
    slope = float(told.partition("slope ")[2].split()[0])
    assert slope == pytest.approx(-0.5, abs=0.1)
    assert "minutes of CPU" in told
