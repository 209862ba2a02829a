"""Many pictures to many files: planned before any work, resumable, a bad file on its own.

Reading, computing and writing overlap: threads read ahead and write behind, while the caller's
thread computes. Small pictures of one size go through the network together.
"""

from __future__ import annotations

import os
import time
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from itertools import islice
from pathlib import Path
from typing import Any, Generic

from cdnctl import images
from cdnctl.api import Model
from cdnctl.errors import ImageError, OutputExistsError
from cdnctl.restore.manifest import Manifest, Origin, changed, digest, digest_of
from cdnctl.restore.operation import Operation, R
from cdnctl.restore.plan import Job, same_file
from cdnctl.restore.writing import Writing
from cdnctl.selection import AUTO, Models

HELD_PIXELS = 32_000_000  # decoded pictures that wait for the network or the disk
LARGE_PIXELS = HELD_PIXELS // 8  # of such pictures, only one is read ahead
AHEAD = 16  # files read ahead of the network
WAITING = 128  # small pictures that wait for others of their size
OLDEST = "denoise"  # the operation of lines of a manifest that name none: there was no other


def count_pixels(jobs: Sequence[Job]) -> dict[Job, int]:
    """Pixels of the pictures, as far as their headers tell without decoding."""
    with ThreadPoolExecutor(4) as pool:  # for slow file systems; more get into each other's way
        found = pool.map(images.count_pixels, [job.source for job in jobs])
        return dict(zip(jobs, found, strict=True))


def large_last(pixels: Mapping[Job, int]) -> list[Job]:
    """Jobs in order, but those of large pictures behind the others, the largest at the end: one
    of them takes as long as thousands of small ones, which need not wait for it."""
    return sorted(pixels, key=lambda job: pixels[job] if pixels[job] > LARGE_PIXELS else 0)


@dataclass(frozen=True)
class Done(Generic[R]):
    """How one job ended: with what was found, with an error, or (neither) passed over as done."""

    job: Job
    restored: R | None = None
    error: str | None = None
    seconds: float = 0.0  # of reading, computing and writing
    exit_code: int = ImageError.exit_code  # with an error, of a run for this job alone


@dataclass(frozen=True)
class _Loaded:
    """A picture that has been read."""

    job: Job
    ready: Any = field(repr=False)  # for the operation, see there
    shape: tuple[int, ...]  # height, width, channels
    origin: Origin
    overwrite: bool  # what is there is ours to replace
    seconds: float  # of reading

    @property
    def pixels(self) -> int:
        return self.shape[0] * self.shape[1]


@dataclass
class _Held:
    """Pixels of pictures that wait for the network or the disk."""

    pixels: int = 0
    last: int = LARGE_PIXELS + 1  # of the picture read last; nothing is known of the first

    def add(self, item: _Loaded) -> None:
        self.pixels += item.pixels
        self.last = item.pixels


@dataclass(frozen=True)
class _Group:
    """Pictures of one shape that go through a network together."""

    model: Model
    items: list[_Loaded]


@dataclass(frozen=True)
class Batch(Generic[R]):
    """An operation on many files; everything that its jobs have in common."""

    models: Models
    operation: Operation[R]
    writing: Writing = field(default_factory=Writing)
    manifest: Manifest | None = None
    resume: bool = False  # pass over what the manifest says is done
    overwrite: bool = False  # also what was changed since the manifest was written
    skip_existing: bool = False  # pass over what is there
    max_pixels: int = images.MAX_PIXELS  # refuse larger pictures
    # Called with the share of a large picture that is done.
    watch: Callable[[Job, float], None] = lambda job, share: None

    def run(
        self, jobs: Iterable[Job | Done[R] | None], late: list[Done[R]] | None = None
    ) -> Generator[Done[R]]:
        """Work on all files; results come as they are finished, not always in order.

        A bad file is reported in its ``Done`` and the rest goes on. SetupError when the disk
        is full: everything after would fail as well.

        jobs: what comes as a ``Done`` is yielded as it is. None says that the next one may take
        long to come: all before are then finished, and yielded, before it is asked for.

        late: if the run ends early, by an exception or closed from outside, it receives the results
        that were written, or were being written, and not yet yielded. It may repeat the last one.
        """
        held = _Held()
        writes: deque[tuple[_Loaded, Future[Done[R]]]] = deque()
        written: dict[Job, Done[R]] = {}  # by the threads, which no signal interrupts

        def write(item: _Loaded, result: R, seconds: float) -> Done[R]:
            done = written[item.job] = self._write(item, result, seconds)
            return done

        def settled() -> Iterator[Done[R]]:
            yield writes[0][1].result()
            item, _ = writes.popleft()
            held.pixels -= item.pixels
            written.pop(item.job, None)  # gone, if the job came twice

        pool = ThreadPoolExecutor(max(2, min(8, os.cpu_count() or 1)))
        try:
            for group in self._grouped(self._read(jobs, pool, held)):
                if group is None:
                    while writes:
                        yield from settled()
                elif isinstance(group, Done):
                    yield group
                else:
                    # Report small pictures before a large one keeps this thread busy for long.
                    while writes and writes[0][0].pixels <= LARGE_PIXELS < group.items[0].pixels:
                        yield from settled()
                    for item, result, seconds in self._compute(group):
                        if isinstance(result, ImageError):
                            held.pixels -= item.pixels
                            yield self._failed(item.job, str(result))
                        else:
                            writes.append((item, pool.submit(write, item, result, seconds)))
                while writes and (writes[0][1].done() or held.pixels > HELD_PIXELS):
                    yield from settled()
            while writes:
                yield from settled()
        finally:
            pool.shutdown(wait=True, cancel_futures=True)
            if late is not None:
                late += written.values()

    def _read(
        self, jobs: Iterable[Job | Done[R] | None], pool: ThreadPoolExecutor, held: _Held
    ) -> Iterator[_Loaded | Done[R] | None]:
        """Pictures in order, read ahead as far as memory allows; None as among the jobs."""
        todo = iter(jobs)
        reads: deque[Future[_Loaded | Done[R]] | Done[R] | None] = deque()

        def read_ahead() -> None:
            room = 1 if held.last > LARGE_PIXELS else AHEAD
            if held.pixels > HELD_PIXELS:
                room = 0
            room = max(room - len(reads), 0 if reads else 1)
            if None in reads:  # nothing is asked for before it has been passed on
                return
            for job in islice(todo, room):
                reads.append(pool.submit(self._load, job) if isinstance(job, Job) else job)
                if job is None:
                    break

        read_ahead()
        while reads:
            read = reads.popleft()
            item = read.result() if isinstance(read, Future) else read
            if isinstance(item, _Loaded):
                held.add(item)
                if held.pixels <= HELD_PIXELS:
                    read_ahead()  # while the network is busy with this one
            yield item
            read_ahead()

    def _grouped(
        self, items: Iterable[_Loaded | Done[R] | None]
    ) -> Iterator[_Group | Done[R] | None]:
        """Pictures that go through the network together: small ones of one size; those before
        None, which follows them, with no others."""
        waiting: dict[tuple[object, ...], _Group] = {}
        for item in items:
            if isinstance(item, Done):
                yield item
                continue
            # A large one takes long, and nobody is to wait for it.
            if item is None or item.pixels > LARGE_PIXELS:
                yield from waiting.values()
                waiting.clear()
            if item is None:
                yield None
                continue
            height, width, _ = item.shape
            model = self.models.pick(height, width, self.operation.by_camera(item.ready))
            key = (*item.shape, model.name)
            group = waiting.setdefault(key, _Group(model, []))
            group.items.append(item)
            if len(group.items) == self.operation.together(height, width):
                yield waiting.pop(key)
            elif sum(len(group.items) for group in waiting.values()) > WAITING:
                yield waiting.pop(max(waiting, key=lambda k: len(waiting[k].items)))
        yield from waiting.values()

    def _load(self, job: Job) -> _Loaded | Done[R]:
        """Read a file and prepare the picture; in a thread."""
        started = time.monotonic()
        try:
            overwrite = self._begin(job)
            if isinstance(overwrite, Done):
                return overwrite
            time_of_input = changed(job.source)  # before it is read, see there
            data = images.read_bytes(job.source)
            image = images.decode(data, str(job.source), self.max_pixels)
            shape = image.samples.shape
            ready = self.operation.prepare(image, str(job.source), data)
            origin = Origin(digest(data), len(data), time_of_input)
            seconds = time.monotonic() - started
            return _Loaded(job, ready, shape, origin, overwrite, seconds)
        except ImageError as error:
            return self._failed(job, str(error))
        except MemoryError:
            return self._failed(job, f"cannot read {str(job.source)!r}: not enough memory for it")
        except OSError as error:
            reason = error.strerror or error
            return self._failed(job, f"cannot read {str(job.source)!r}: {reason}")

    def _begin(self, job: Job) -> Done[R] | bool:
        """Whether what is there is ours to replace; or how the job ends, if there is no work."""
        self._tidy(job)
        exists = os.path.exists(job.output)
        if self.resume and self.is_done(job):
            return Done(job)
        overwrite = self.overwrite or (self.resume and exists)
        return self._taken(job) if exists and not overwrite else overwrite

    def _compute(self, group: _Group) -> Iterator[tuple[_Loaded, R | ImageError, float]]:
        """Work on pictures of one size: each with its result, or why there is none, and the
        seconds that it took."""
        started = time.monotonic()
        items, model = group.items, group.model
        results: Sequence[R | ImageError]
        try:
            watch = partial(self.watch, items[0].job)
            results = self.operation.run([item.ready for item in items], model, watch)
        except ImageError as error:
            if len(items) > 1:  # one of them spoils it: each on its own, which changes no result
                for item in items:
                    yield from self._compute(_Group(model, [item]))
                return
            results = [ImageError(f"{str(items[0].job.source)!r}: {error}")]
        seconds = (time.monotonic() - started) / len(items)
        for item, result in zip(items, results, strict=True):
            yield item, result, seconds

    def _write(self, item: _Loaded, restored: R, seconds: float) -> Done[R]:
        """Encode and write; in a thread. The manifest hears of it just before the file appears."""
        job, started = item.job, time.monotonic()
        try:
            job.output.parent.mkdir(parents=True, exist_ok=True)
            suffix = job.output.suffix.lower()
            data, restored = self.writing.encoded(self.operation, restored, suffix)
            seconds += item.seconds + time.monotonic() - started
            temporary = images.temporary_name()
            if self.manifest is not None:
                record = self._record(job, item.origin, restored, digest(data), seconds)
                self.manifest.add(record | {"temporary": temporary})
            images.save(data, job.output, temporary, overwrite=item.overwrite)
            return Done(job, restored, seconds=seconds)
        except OutputExistsError:
            return self._taken(job)
        except ImageError as error:
            return self._failed(job, str(error))
        except (OSError, RecursionError) as error:  # the latter from very deep folders
            reason = getattr(error, "strerror", None) or error
            return self._failed(job, f"cannot write {str(job.output)!r}: {reason}")

    def _tidy(self, job: Job) -> None:
        """Remove the temporary files that killed runs may have left of an output."""
        # The manifest is locked, so none of the runs that it tells of is still at work.
        for record in [] if self.manifest is None else self.manifest.records(job.output):
            images.remove_temporary(job.output, str(record.get("temporary")))

    def _taken(self, job: Job) -> Done[R]:
        """An output that was not there when the work was planned, and is not ours to replace."""
        if self.skip_existing:
            return Done(job)
        error = OutputExistsError(job.output)
        return replace(self._failed(job, str(error)), exit_code=error.exit_code)

    def _failed(self, job: Job, error: str) -> Done[R]:
        if self.manifest is not None:
            record = {"input": str(job.source), "error": error}
            self.manifest.add({"output": self.manifest.name_of(job.output)} | record)
        return Done(job, error=error)

    def _record(
        self, job: Job, origin: Origin, restored: R, digest_of_output: str, seconds: float
    ) -> dict[str, Any]:
        assert self.manifest is not None
        return {
            "output": self.manifest.name_of(job.output),
            "output_sha256": digest_of_output,
            "input": str(job.source),
            **origin.to_dict(),
            "operation": self.operation.name,
            "model": restored.model.name,
            "weights": restored.model.hash,
            "parameters": self.parameters,
            **self.operation.record(restored),
            "seconds": round(seconds, 4),
        }

    @cached_property
    def parameters(self) -> dict[str, Any]:
        """What the outputs depend on besides the pictures and the weights, as JSON has it."""
        # For a weights file the name of its model, not its path: moving the file changes no output.
        name = self.models.name if self.models.name == AUTO else self.models.pick(1, 1).name
        ensemble = self.models.ensemble
        return {
            **self.operation.parameters,
            **({} if ensemble == 1 else {"ensemble": ensemble}),
            "model": name,
            **self.writing.parameters,
        }

    def is_done(self, job: Job) -> bool:
        """Whether the manifest says that an earlier run did this job, and nothing has changed.

        ImageError if doing it again would replace an output that is not cdnctl's own.
        """
        if self.manifest is None or not os.path.exists(job.output):
            return False
        found = digest_of(job.output)
        ours = [r for r in self.manifest.records(job.output) if r.get("output_sha256") == found]
        if not ours and not self.overwrite:
            raise ImageError(
                f"{str(job.output)!r} exists and is not as cdnctl wrote it: "
                "give --overwrite to replace it"
            )
        if any(
            record.get("operation", OLDEST) == self.operation.name
            and record.get("parameters") == self.parameters
            and record.get("weights") == self.models.hash_of(str(record.get("model")))
            and Origin.from_dict(record).still(job.source)
            for record in ours
        ):
            return True
        for source in (Path(str(record.get("input"))) for record in ours):
            if source.exists() and not same_file(source, job.source) and not self.overwrite:
                raise ImageError(
                    f"{str(job.output)!r} was made from {str(source)!r}, another picture of that "
                    "name: choose another output folder, or give --overwrite to replace it"
                )
        return False
