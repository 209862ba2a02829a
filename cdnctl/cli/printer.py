"""What denoise says of its pictures: lines for people, or objects for programs."""

from __future__ import annotations

import json
import sys
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cdnctl.cli.common import report_error, shown, warn
from cdnctl.units import PEAK

if TYPE_CHECKING:
    from cdnctl.restore import Restored, Settings
    from cdnctl.restore.batch import Done
    from cdnctl.restore.plan import Job

STDIO = Path("-")  # on the command line: standard input or output


class Printer:
    """Says how each picture went: a line for people or an object for programs."""

    def __init__(self, settings: Settings, as_json: bool, quiet: bool):
        self.target = settings.target
        self.estimated = settings.sigma is None
        self.profiled = not isinstance(settings.noise, str)
        self.as_json, self.quiet = as_json, quiet

    def result(self, source: Path, output: Path, restored: Restored, seconds: float) -> None:
        """A picture that was restored; its noise level is in 0..255."""
        model = restored.model
        level = restored.sigma * PEAK
        low, high = (PEAK * s for s in model.sigma_range)
        if restored.told * PEAK > high + 1e-6:
            note = " (a gray picture counts sqrt(3)-fold)" if restored.told > restored.sigma else ""
            warn(
                f"{shown(source)}: sigma {level:.1f}{note} is outside the range "
                f"{low:g}..{high:g} that model {model.name!r} was trained on"
            )
        # On the 0..255 scale, root mean square.
        change = restored.class_change
        change = None if change is None else round(change * PEAK, 6)
        best = next(iter(restored.posterior.items()), None)
        # With the picture itself on standard output, remarks go to standard error.
        stream = sys.stderr if output == STDIO else sys.stdout
        if self.as_json:
            record: dict[str, Any] = {
                "event": "restored",
                "input": str(source),
                "output": str(output),
                "sigma": round(level, 3),
                "sigma_estimated": self.estimated,
                "noise": None if restored.noise is None else restored.noise.record(),
                "model": model.name,
                "weights": model.hash,
                "class_change": change,
                "posterior": {k: round(v, 6) for k, v in restored.posterior.items()},
                "held": round(restored.held, 6),
                "seconds": round(seconds, 4),
                "notes": list(restored.image.notes),
            }
            print(json.dumps(record), file=stream, flush=True)
        elif not self.quiet:
            how = "given" if not self.estimated else "profile" if self.profiled else "estimated"
            where = f"{shown(source)} -> {shown(output)}"
            parts = [where, f"sigma {level:.1f} ({how})", f"model {model.name}"]
            if restored.noise is not None and not restored.noise.is_white:
                parts.insert(1, restored.noise.summary())
            if best is not None and (best[1] >= 0.5 or self.target == "auto"):
                parts.append(f"most probable class {best[0]} ({best[1]:.0%})")
            if change is not None:
                amount = f"{change:.2f}" if change >= 0.01 else "less than 0.01"
                parts.append(f"telling the class changed {amount} of 255 (rms)")
            print(", ".join([*parts, *restored.image.notes]), file=stream, flush=True)

    def failure(self, done: Done[Restored]) -> None:
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
