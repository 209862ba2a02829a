"""What is said of pictures that are restored: lines for people, or objects for programs."""

from __future__ import annotations

import json
import sys
from abc import ABC, abstractmethod
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any, Generic, NoReturn, TypeVar

import typer

from cdnctl.cli.common import report_error, shown, warn
from cdnctl.units import PEAK

if TYPE_CHECKING:
    from cdnctl.restore import Deblocked, Restored, Result, Settings
    from cdnctl.restore.batch import Done
    from cdnctl.restore.plan import Job

R = TypeVar("R", bound="Result")
STDIO = Path("-")  # on the command line: standard input or output


class Printer(ABC, Generic[R]):
    """Says how each picture went: a line for people or an object for programs."""

    def __init__(self, as_json: bool, quiet: bool):
        self.as_json, self.quiet = as_json, quiet

    @abstractmethod
    def found(self, result: R) -> dict[str, Any]:
        """What was found, for programs."""

    @abstractmethod
    def words(self, result: R) -> list[str]:
        """The same for people, in parts of a sentence."""

    def warnings(self, result: R) -> list[str]:
        """What should not be as it is."""
        return []

    def result(self, source: Path, output: Path, restored: R, seconds: float) -> None:
        """A picture that was restored."""
        for text in self.warnings(restored):
            warn(f"{shown(source)}: {text}")
        # With the picture itself on standard output, remarks go to standard error.
        stream = sys.stderr if output == STDIO else sys.stdout
        notes = restored.image.notes
        if self.as_json:
            record: dict[str, Any] = {
                "event": "restored",
                "input": str(source),
                "output": str(output),
                "model": restored.model.name,
                "weights": restored.model.hash,
                **self.found(restored),
                "seconds": round(seconds, 4),
                "notes": list(notes),
            }
            print(json.dumps(record), file=stream, flush=True)
        elif not self.quiet:
            where = f"{shown(source)} -> {shown(output)}"
            print(", ".join([where, *self.words(restored), *notes]), file=stream, flush=True)

    def failure(self, done: Done[R]) -> None:
        """A picture that could not be restored."""
        if self.as_json:
            self._event("failed", done.job, error=done.error)
        else:
            report_error(str(done.error))

    def skipped(self, job: Job) -> None:
        """A picture that an earlier run restored."""
        if self.as_json:
            self._event("skipped", job)

    def planned(self, job: Job, done: bool) -> None:
        """A picture that would be restored, or passed over."""
        if self.as_json:
            self._event("planned", job, done=done)
        else:
            note = ", done before" if done else ""
            print(f"{shown(job.source)} -> {shown(job.output)}{note}", flush=True)

    def summary(self, counts: Counter[str], seconds: float) -> None:
        """What became of all pictures."""
        if self.as_json:
            kinds = {kind: counts[kind] for kind in ("restored", "skipped", "failed")}
            record = {"event": "finished", **kinds, "seconds": round(seconds, 3)}
            print(json.dumps(record), flush=True)
        elif not self.quiet:
            plural = "" if counts["restored"] == 1 else "s"
            done = f"{counts['restored']} picture{plural} restored in {seconds:.1f} s"
            skipped = f", {counts['skipped']} done before" if counts["skipped"] else ""
            print(done + skipped, file=sys.stderr, flush=True)

    def _event(self, event: str, job: Job, **more: Any) -> None:
        record = {"event": event, "input": str(job.source), "output": str(job.output), **more}
        print(json.dumps(record), flush=True)


class Heard(Generic[R]):
    """What became of jobs, told by a printer as it is heard of."""

    def __init__(self, printer: Printer[R]):
        self.printer = printer
        self.kinds: dict[Job, str] = {}  # of what became of each
        self.counts: Counter[str] = Counter()
        self.failed: list[Done[R]] = []
        self.last: R | None = None  # result

    def __call__(self, done: Done[R]) -> None:
        """A job has ended."""
        # Noted last: what is interrupted before comes again, as late.
        if done.error is not None:
            self.failed.append(done)
            self.printer.failure(done)
            kind = "failed"
        elif done.restored is None:
            self.printer.skipped(done.job)
            kind = "skipped"
        else:
            self.printer.result(done.job.source, done.job.output, done.restored, done.seconds)
            self.last, kind = done.restored, "restored"
        self.kinds[done.job] = kind
        self.counts[kind] += 1

    def once(self, done: Done[R]) -> None:
        """A job has ended, which may have been heard of."""
        if done.job not in self.kinds:
            self(done)

    def interrupted(self, stop: BaseException, total: int, hint: str) -> NoReturn:
        """Say how far it came, and leave."""
        report_error(f"interrupted after {len(self.kinds)} of {total} pictures{hint}")
        raise typer.Exit(int(stop.code or 1) if isinstance(stop, SystemExit) else 130)


class DenoisePrinter(Printer["Restored"]):
    """Printer of what denoise finds; noise levels are in 0..255."""

    def __init__(self, settings: Settings, as_json: bool, quiet: bool):
        super().__init__(as_json, quiet)
        self.target = settings.target
        self.estimated = settings.sigma is None
        self.profiled = not isinstance(settings.noise, str)

    def warnings(self, result: Restored) -> list[str]:
        """Of noise that the model was not trained on."""
        low, high = (PEAK * s for s in result.model.sigma_range)
        if result.told * PEAK <= high + 1e-6:
            return []
        note = " (a gray picture counts sqrt(3)-fold)" if result.told > result.sigma else ""
        return [
            f"sigma {result.sigma * PEAK:.1f}{note} is outside the range {low:g}..{high:g} that "
            f"model {result.model.name!r} was trained on"
        ]

    def found(self, result: Restored) -> dict[str, Any]:
        """See `Printer`."""
        # On the 0..255 scale, root mean square.
        change = result.class_change
        pages = getattr(result, "pages", None)  # of a stack
        return {
            **({} if pages is None else {"pages": pages}),
            "sigma": round(result.sigma * PEAK, 3),
            "sigma_estimated": self.estimated,
            "noise": None if result.noise is None else result.noise.record(),
            "class_change": None if change is None else round(change * PEAK, 6),
            "posterior": {k: round(v, 6) for k, v in result.posterior.items()},
            "held": round(result.held, 6),
        }

    def words(self, result: Restored) -> list[str]:
        """See `Printer`."""
        how = "given" if not self.estimated else "profile" if self.profiled else "estimated"
        sigma = f"{result.sigma * PEAK:.1f}"
        parts = [f"sigma {sigma} ({how})", f"model {result.model.name}"]
        if result.noise is not None and not result.noise.is_white:
            # Not the level of a pixel, which the summary gives: grain takes a higher one.
            by = " (profile)" if self.profiled else ""
            parts[0] = f"{result.noise.summary()}, taken out at sigma {sigma}{by}"
            if result.sigma == 0:
                parts[0] = "no noise that could not be texture: left as it is"
        pages = getattr(result, "pages", None)  # of a stack
        if pages is not None:
            parts.insert(0, f"{pages} page{'s' * (pages > 1)}")
        best = next(iter(result.posterior.items()), None)
        if best is not None and (best[1] >= 0.5 or self.target == "auto"):
            parts.append(f"most probable class {best[0]} ({best[1]:.0%})")
        if result.class_change is not None:
            change = round(result.class_change * PEAK, 6)
            amount = f"{change:.2f}" if change >= 0.01 else "less than 0.01"
            parts.append(f"telling the class changed {amount} of 255 (rms)")
        return parts


class JpegPrinter(Printer["Deblocked"]):
    """Printer of what is found in JPEG files; all levels are of 0..255."""

    def found(self, result: Deblocked) -> dict[str, Any]:
        """See `Printer`."""
        return {"sigma": round(result.sigma * PEAK, 3), "outside": round(result.outside, 4)}

    def words(self, result: Deblocked) -> list[str]:
        """See `Printer`."""
        return [
            f"error of the file's rounding {result.sigma * PEAK:.1f}",
            f"model {result.model.name}",
        ]
