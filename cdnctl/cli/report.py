"""What evaluate, attack and ood share: their options, the models and pictures that they measure,
and the report of what was found."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypeVar

import typer

from cdnctl.cli.common import report_error
from cdnctl.cli.tables import Column, Row, print_table

if TYPE_CHECKING:
    import torch

    from cdnctl.api import Model
    from cdnctl.measure.evaluate import Sample

T = TypeVar("T")

Folder = Annotated[Path, typer.Argument(help="Clean pictures: flat, or class folders.")]
ModelsOption = Annotated[
    list[str] | None,
    typer.Option(
        "--model",
        help="auto, a bundled model, a run folder, or a .safetensors file; repeat to compare.",
    ),
]
Levels = Annotated[
    str, typer.Option("--sigma", help="Noise levels, 0..255: 15,25,50 or start:stop:step.")
]
Seed = Annotated[int, typer.Option("--seed", help="Seed of all that is random.")]
Limit = Annotated[
    int | None, typer.Option("--limit", min=1, help="Only this many pictures, evenly spaced.")
]


@dataclass
class Report:
    """Models, the pictures of a folder that each is measured on, and what is found."""

    kind: str  # of the rows: their name in JSON
    columns: Mapping[str, Column]  # of the table; one of models is added where there are several
    seed: int
    limit: int | None
    as_json: bool
    quiet: bool
    models: list[tuple[Model, list[Sample]]] = field(default_factory=list)
    # What stands in for each model where given noise is that of a camera: auto's other choice.
    cameras: list[Model | None] = field(default_factory=list)
    failed: set[str] = field(default_factory=set)
    found: list[dict[str, Any]] = field(default_factory=list)  # of each model: protocol and rows
    table: list[Row] = field(default_factory=list)

    def add(
        self,
        names: Sequence[str] | None,
        device: torch.device,
        folder: Path,
        noisy: Path | None = None,
        ensemble: int = 1,
    ) -> None:
        """Models to measure; auto is that which suits the first picture of the folder."""
        from cdnctl.measure.evaluate import find_samples
        from cdnctl.restore.plan import expand
        from cdnctl.selection import AUTO, Models

        files = expand([folder], recursive=True)
        for name in names or [AUTO]:
            choice = Models(name, device, ensemble=ensemble)
            model = choice.for_files(files)
            camera = choice.for_files(files, camera=True) if noisy is not None else model
            self.cameras.append(camera if camera.name != model.name else None)
            self.models.append((model, self.some(find_samples(folder, noisy, model))))

    def some(self, items: Sequence[T]) -> list[T]:
        """At most ``limit`` of them, evenly spaced."""
        if self.limit is None or self.limit >= len(items):
            return list(items)
        return [items[i * len(items) // self.limit] for i in range(self.limit)]

    def fail(self, error: str) -> None:
        """A file that cannot be read, reported once."""
        if error not in self.failed:
            self.failed.add(error)
            report_error(error)

    def tell(self, model: Model, rows: Sequence[Row], protocol: Mapping[str, Any]) -> None:
        """What was found of a model, and how."""
        about = {"model": model.name, "weights": model.hash, "seed": self.seed, **protocol}
        self.found.append({"protocol": about, self.kind: rows})
        self.table += [{"model": self.label(model), **row} for row in rows]

    def label(self, model: Model) -> str:
        """Its name, which weights files may share."""
        names = [m.name for m, _ in self.models]
        return model.name if names.count(model.name) == 1 else f"{model.name} {model.hash[:6]}"

    def finish(self) -> None:
        """Print everything, as JSON or as a table; exit code 1 if a file could not be read."""
        if self.as_json:
            for one in self.found:
                print(json.dumps(one))
        else:
            if self.table:
                several = len({row["model"] for row in self.table}) > 1
                first = {"model": Column("model")} if several else {}
                print_table(first | dict(self.columns), self.table)
            if not self.quiet:
                for one in self.found:
                    about = one["protocol"].items()
                    print(", ".join(f"{k.replace('_', ' ')} {v}" for k, v in about))
        if self.failed:
            raise typer.Exit(1)
