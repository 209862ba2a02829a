"""How outputs are stored, and where names of inputs come from: options of all that makes pictures
of pictures, added to a command by `with_storing`."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Annotated, Any, get_type_hints

import typer

from cdnctl.errors import UsageError

if TYPE_CHECKING:
    from cdnctl.restore.writing import Writing


@dataclass(frozen=True)
class Storing:
    """What a command line says of it."""

    names: Annotated[
        str | None,
        typer.Option(
            "--files-from",
            metavar="FILE",
            help="Names of pictures, one a line or each with a NUL behind it; - for standard "
            "input: each is answered before the next is waited for.",
        ),
    ] = None
    kind: Annotated[
        str | None,
        typer.Option("--format", metavar="FORMAT", help="Of outputs: png, jpg, tif, webp and so."),
    ] = None
    depth: Annotated[
        int | None,
        typer.Option("--depth", help="Bits of a sample, 8 or 16 (default: as in the input)."),
    ] = None
    quality: Annotated[
        int | None,
        typer.Option(
            "--quality", min=1, max=100, help="Of JPEG, WebP and HEIC files (default: 95)."
        ),
    ] = None
    linear: Annotated[
        bool,
        typer.Option("--linear", help="Write linear light in 16 bits, of camera raw most of all."),
    ] = False
    dither: Annotated[
        bool, typer.Option("--dither", help="With --depth 8: noise in the place of steps.")
    ] = False
    no_note: Annotated[
        bool, typer.Option("--no-note", help="Do not say in the file what was done.")
    ] = False

    def suits(self, scale: str | None) -> None:
        """UsageError if what is asked for does not go with a --range."""
        if self.linear and scale is not None:
            raise UsageError(
                f"--linear undoes the tone curve of sRGB, which values of --range {scale} do not "
                "have: leave one of them out"
            )

    def writing(self, strip: bool) -> Writing:
        """The same for `cdnctl.restore`; UsageError for what makes no sense."""
        from cdnctl.restore.writing import Writing

        suffix = None if self.kind is None else f".{self.kind.lower().removeprefix('.')}"
        return Writing(
            suffix, self.depth, self.quality, self.linear, self.dither, strip, not self.no_note
        )


def with_storing(command: Callable[..., None]) -> Callable[..., None]:
    """The command with the options of `Storing` behind --strip-metadata, and without the parameter
    ``storing`` that is made of them: typer reads options from signatures."""
    signature = inspect.signature(command, eval_str=True)
    types = get_type_hints(Storing, include_extras=True)
    added = [
        inspect.Parameter(
            field.name,
            inspect.Parameter.POSITIONAL_OR_KEYWORD,
            default=field.default,
            annotation=types[field.name],
        )
        for field in fields(Storing)
    ]
    parameters = [p for name, p in signature.parameters.items() if name != "storing"]
    place = [p.name for p in parameters].index("strip_metadata") + 1
    parameters[place:place] = added

    @functools.wraps(command)
    def run(**values: Any) -> None:
        storing = Storing(**{field.name: values.pop(field.name) for field in fields(Storing)})
        inputs, name = values.get("inputs"), command.__name__
        if not inputs and storing.names is None:
            raise UsageError(
                f"missing argument: name pictures, or give --files-from (see cdnctl {name} --help)"
            )
        if inputs and storing.names is not None:
            raise UsageError(
                f"{str(inputs[0])!r} and --files-from {storing.names} both name pictures: "
                "leave one of them out"
            )
        command(**values, storing=storing)

    run.__signature__ = signature.replace(parameters=parameters)  # type: ignore[attr-defined]
    return run
