"""The bundled weights are found however the package was installed."""

import ast
import re
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow  # seconds each

ROOT = Path(__file__).parent.parent

FIND = """
import site, sys
before = list(sys.path)
site.addsitedir({place!r})
added = [p for p in sys.path if p not in before]  # the folder, and what a .pth in it names
sys.path[:] = added + before
import cdnctl
from cdnctl.checkpoints import bundled, read_header
print({{name: read_header(path).name for name, path in bundled().items()}})
print(cdnctl.__file__)
"""


def names_found(place: Path) -> tuple[dict, Path]:
    """Bundled models by a fresh interpreter that imports cdnctl from ``place``."""
    run = subprocess.run(
        [sys.executable, "-I", "-c", FIND.format(place=str(place))],
        capture_output=True,
        text=True,
        check=True,
        cwd=place,
    )
    found, origin = run.stdout.splitlines()
    return eval(found, {}), Path(origin)


@pytest.fixture(scope="session")
def built(tmp_path_factory):
    """(wheel from the source tree, sdist, wheel from the sdist)."""
    out = tmp_path_factory.mktemp("dist")

    def build(source: Path, kind: str, target: Path) -> Path:
        target.mkdir()
        command = [sys.executable, "-m", "build", "--no-isolation", f"--{kind}", "-o"]
        subprocess.run([*command, str(target), str(source)], check=True, capture_output=True)
        (result,) = target.iterdir()
        return result

    wheel = build(ROOT, "wheel", out / "wheel")
    sdist = build(ROOT, "sdist", out / "sdist")
    with tarfile.open(sdist) as archive:
        archive.extractall(out / "unpacked", filter="data")
    (unpacked,) = (out / "unpacked").iterdir()
    return wheel, sdist, build(unpacked, "wheel", out / "again")


def test_all_that_is_imported_is_installed():
    """By the first set-up command, but for what the extras and the README's Limits name."""

    def plain(name: str) -> str:
        return re.split(r"[<>=!~;\[ ]", name)[0].lower().replace("_", "-")

    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
    installed = {plain(name) for name in project["dependencies"]}
    extras = {
        "heic": {"pillow-heif"},
        "raw": {"rawpy"},
        "onnx": {"onnx", "onnxscript", "onnxruntime"},
    }
    for extra, names in extras.items():
        assert {plain(name) for name in project["optional-dependencies"][extra]} == names
    optional = set.union(*extras.values(), {"bm3d"})
    owners = packages_distributions()
    found = set()
    for path in (ROOT / "cdnctl").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text("utf-8"))):
            names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom):
                names = [str(node.module)]
            found |= {name.split(".")[0] for name in names}
    needed = set()
    for module in found - sys.stdlib_module_names - {"cdnctl"}:
        needed |= {plain(name) for name in owners.get(module, [module])}
    assert needed - optional <= installed


EXPECTED = {p.stem for p in (ROOT / "weights").glob("*.safetensors")}


def check(place: Path, inside: Path) -> None:
    found, origin = names_found(place)
    assert set(found) == EXPECTED == {"photo", "camera", "cifar10"}
    assert origin.is_relative_to(inside)


@pytest.mark.slow
def test_found_from_a_checkout():
    check(ROOT, ROOT)


@pytest.mark.slow
def test_found_from_an_editable_install(tmp_path):
    code = "import sys, hatchling.build; print(hatchling.build.build_editable(sys.argv[1]))"
    run = [sys.executable, "-c", code, str(tmp_path)]
    name = subprocess.run(run, cwd=ROOT, check=True, capture_output=True, text=True).stdout.strip()
    place = tmp_path / "site"
    with zipfile.ZipFile(tmp_path / name) as archive:
        archive.extractall(place)
    check(place, ROOT)


@pytest.mark.parametrize("which", [0, 2], ids=["wheel", "wheel from the sdist"])
def test_found_from_a_wheel(built, which, tmp_path):
    with zipfile.ZipFile(built[which]) as archive:
        archive.extractall(tmp_path)
    check(tmp_path, tmp_path)


def test_wheel_is_small_and_holds_configs_cards_and_types(built):
    wheel = built[0]
    assert wheel.stat().st_size < 60e6
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
    assert "cdnctl/py.typed" in names
    for name in EXPECTED:
        assert f"cdnctl/weights/{name}.md" in names
    for config in (ROOT / "cdnctl" / "configs").glob("*.toml"):
        assert f"cdnctl/configs/{config.name}" in names
