"""The shape of the package: imports point one way, and units change in few places."""

from __future__ import annotations

import ast
import subprocess
import sys
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "cdnctl"

# From the top down. A module may import what lies in its own layer or below.
LAYERS = [
    {"__main__"},
    {"cli"},
    {"measure"},
    {"training"},
    {"analysis"},
    {"fields"},
    {"restore"},
    {"api", "onnx", "selection"},
    {
        "cards",
        "checkpoints",
        "figures",
        "grouping",
        "images",
        "pictures",
        "runtime",
    },
    {"models"},
    {"inverse"},
    {"sampling"},
    {"transforms"},
    {"core"},
    {"schema"},
    {"files"},
    {"errors", "headers", "units", "version"},
]
# Rooms of which neither may import the other, whichever lies above.
STRANGERS = [("analysis", "training"), ("restore", "training")]
DEPTH = {room: depth for depth, layer in enumerate(LAYERS) for room in layer}
SOURCES = {
    ".".join(p.relative_to(PACKAGE).with_suffix("").parts): ast.parse(p.read_text("utf-8"))
    for p in sorted(PACKAGE.rglob("*.py"))
}
MODULES = [name for name in SOURCES if name != "__init__"]


def imports(name: str) -> set[str]:
    """Every module that a module imports anywhere, inside functions too, by its full name."""
    found = set()
    for node in ast.walk(SOURCES[name]):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0 and node.module, f"{name} has a relative import"
            # 'from cdnctl import images' imports a module, 'from cdnctl.images import read' none.
            whole = {f"{node.module}.{alias.name}" for alias in node.names}
            modules = {w for w in whole if w.removeprefix("cdnctl.") in known()}
            found |= modules or {node.module}
    return found


def known() -> set[str]:
    return {name.removesuffix(".__init__") for name in SOURCES}


def own(name: str) -> set[str]:
    """Of them those of this package, without its name."""
    return {m.removeprefix("cdnctl.") for m in imports(name) if m.startswith("cdnctl.")}


def room(name: str) -> str:
    return name.split(".")[0]


def test_every_module_has_a_layer() -> None:
    assert {room(name) for name in MODULES} == DEPTH.keys()


@pytest.mark.parametrize("name", MODULES)
def test_imports_point_downwards(name: str) -> None:
    for target in own(name):
        assert DEPTH[room(target)] >= DEPTH[room(name)], f"{name} imports {target}"


@pytest.mark.parametrize("one,other", STRANGERS)
def test_strangers_do_not_import_each_other(one: str, other: str) -> None:
    assert {one, other} <= DEPTH.keys()
    for name in MODULES:
        for target in own(name):
            assert {room(name), room(target)} != {one, other}, f"{name} imports {target}"


def test_imports_go_round_in_no_circle() -> None:
    graph = {name.removesuffix(".__init__"): own(name) for name in MODULES}
    TopologicalSorter(graph).prepare()  # CycleError names the circle


@pytest.mark.parametrize("name", ["batch", "manifest", "operation", "plan", "writing"])
def test_many_files_know_nothing_of_what_is_done_to_them(name: str) -> None:
    allowed = {"batch", "manifest", "operation", "plan", "writing"}
    others = {m.removeprefix("restore.") for m in own(f"restore.{name}") if room(m) == "restore"}
    assert others <= allowed - {name}


@pytest.mark.parametrize("name", [n for n in MODULES if room(n) == "core"])
def test_the_core_stands_alone(name: str) -> None:
    for module in imports(name):
        allowed = ("torch", "numpy", "scipy", "skimage.metrics", "cdnctl.core", "cdnctl.errors")
        standard = module.split(".")[0] in sys.stdlib_module_names
        assert standard or module.startswith(allowed), f"{name} imports {module}"
    for node in ast.walk(SOURCES[name]):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
            assert node.func.id not in ("print", "open"), f"{name} talks or touches files"


@pytest.mark.parametrize(
    "name", [n for n in SOURCES if room(n) not in ("cli", "figures", "images", "units")]
)
def test_255_lives_where_units_change(name: str) -> None:
    for node in ast.walk(SOURCES[name]):
        if isinstance(node, ast.Constant) and not isinstance(node.value, str):
            assert node.value != 255, f"{name}, line {node.lineno}"


@pytest.mark.parametrize(
    "code",
    [
        "import cdnctl; cdnctl.__version__",
        "import cdnctl.cli",
        "import sys; sys.argv[1:] = ['--help']\nfrom cdnctl.cli import main\n"
        "try: main()\nexcept SystemExit as stop: assert not stop.code",
        "import sys; sys.argv[1:] = ['denoise', '--help']\nfrom cdnctl.cli import main\n"
        "try: main()\nexcept SystemExit as stop: assert not stop.code",
    ],
)
def test_torch_stays_unloaded(code: str) -> None:
    heavy = {"torch", "skimage", "imagecodecs", "imageio", "matplotlib", "PIL", "tifffile"}
    check = f"\nimport sys\nprint(sorted({heavy} & set(sys.modules)))"
    run = subprocess.run(
        [sys.executable, "-c", code + check], capture_output=True, text=True, check=True
    )
    assert run.stdout.splitlines()[-1] == "[]", run.stdout
