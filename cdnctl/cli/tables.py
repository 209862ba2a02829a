"""Tables: on standard output for people, as CSV files for programs."""

from __future__ import annotations

import csv
import io
import math
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cdnctl.cli.common import save
from cdnctl.units import PEAK

if TYPE_CHECKING:
    from rich.table import Table

Row = Mapping[str, Any]


@dataclass(frozen=True)
class Column:
    """A column of a table: its title, and how its values are written."""

    title: str
    form: str | Callable[[Any], str] = ""  # a format, such as ".2f", or a function
    missing: str = "-"  # stands for None
    whole: bool = False  # never broken over lines

    def cell(self, value: Any) -> str:
        """A value as it is shown."""
        if value is None:
            return self.missing
        return self.form(value) if callable(self.form) else format(value, self.form)


def drawn(columns: Mapping[str, Column], rows: Sequence[Row]) -> Table:
    """A table of those values of the rows that have a column."""
    from rich.table import Column as Head
    from rich.table import Table
    from rich.text import Text  # plain strings would be searched for markup

    heads = [Head(c.title, overflow="fold", no_wrap=c.whole) for c in columns.values()]
    table = Table(*heads)
    for row in rows:
        table.add_row(*(Text(column.cell(row[key])) for key, column in columns.items()))
    return table


def print_table(columns: Mapping[str, Column], rows: Sequence[Row]) -> None:
    """A table on standard output. Where that is no terminal, no cell is wrapped."""
    from rich.console import Console

    width = None if sys.stdout.isatty() else 100_000  # a table takes no more than it needs
    Console(highlight=False, width=width).print(drawn(columns, rows))


def write_csv(path: Path, rows: Sequence[Row], overwrite: bool) -> None:
    """All values of rows, which have the same keys, under the keys of the first."""
    text = io.StringIO()
    writer = csv.DictWriter(text, list(rows[0]))
    writer.writeheader()
    writer.writerows(rows)
    save(path, text.getvalue().encode(), overwrite)


def scaled(item: Any, **first: Any) -> dict[str, Any]:
    """A dataclass as a row, behind what comes ``first``; its noise level, if it has one, is on the
    command line's scale."""
    values = first | asdict(item)
    if values["sigma"] is not None:
        values["sigma"] = round(values["sigma"] * PEAK, 4)
    return values


def plain(value: Any) -> Any:
    """As JSON and a table can hold it: what is no finite number is None."""
    if isinstance(value, Mapping):
        return {key: plain(one) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return [plain(one) for one in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def protocol(about: Mapping[str, Any]) -> str:
    """How something was measured, on one line."""
    values = {k: " and ".join(v) if isinstance(v, list) else v for k, v in about.items()}
    return ", ".join(f"{key.replace('_', ' ')} {value}" for key, value in values.items())
