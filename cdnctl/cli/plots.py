"""Figures of the commands, by matplotlib."""

from __future__ import annotations

import io
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from cdnctl.cli.common import save
from cdnctl.errors import UsageError

if TYPE_CHECKING:
    from matplotlib.axes import Axes


def check_plot(path: Path) -> None:
    """Refuse what cannot be drawn before anything is measured."""
    from matplotlib.figure import Figure

    known = Figure().canvas.get_supported_filetypes()
    if path.suffix[1:].lower() not in known:
        raise UsageError(f"cannot draw {str(path)!r}: its suffix must be one of {', '.join(known)}")


def draw(path: Path, panels: Sequence[Callable[[Axes], None]], overwrite: bool) -> None:
    """Panels side by side, each drawn by a function of its axes, as a file."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5 * max(len(panels), 1), 4), layout="constrained")
    for i, panel in enumerate(panels):
        axes = figure.add_subplot(1, len(panels), i + 1)
        axes.grid(alpha=0.3)
        panel(axes)
    data = io.BytesIO()
    figure.savefig(data, format=path.suffix[1:].lower(), dpi=150)
    save(path, data.getvalue(), overwrite)


def curves(axes: Axes, scores: Mapping[str, Mapping[float, float]], name: str) -> None:
    """A score over sigma, 0..255, a line each. Where there is none its colour is left free, so
    that all panels of a figure agree."""
    for i, (label, line) in enumerate(scores.items()):
        if line:
            axes.plot(list(line), list(line.values()), "o-", ms=3, c=f"C{i}", label=label)
    axes.set(xlabel="sigma (0..255)", ylabel=name)


def training_panels(
    results: Mapping[str, tuple[Sequence[int], Sequence[float]]],
) -> list[Callable[[Axes], None]]:
    """Panels of a run over its steps: the loss, PSNR and accuracy, as far as it has them.

    results: as `training.report.read_results` gives them.
    """
    lines = {  # of each panel: its columns of results.csv, and what they are called
        "loss": {"loss": "training", "val_loss": "held out"},
        "PSNR (dB), held out": {n: n for n in results if n.startswith("val_psnr_")},
        "accuracy, held out": {n: n for n in results if n.startswith("val_accuracy_")},
    }

    def panel(name: str, columns: Mapping[str, str]) -> Callable[[Axes], None]:
        def paint(axes: Axes) -> None:
            for i, (column, label) in enumerate(columns.items()):
                style = "-" if column == "loss" else "o-"
                label = label if name == "loss" else f"sigma {label.rpartition('_')[2]}"
                axes.plot(*results[column], style, ms=3, c=f"C{i}", label=label)
            axes.set(xlabel="step", ylabel=name, yscale="log" if name == "loss" else "linear")
            axes.legend()

        return paint

    known = {n: {c: v for c, v in columns.items() if c in results} for n, columns in lines.items()}
    return [panel(name, columns) for name, columns in known.items() if columns]
