"""Stacks: files of many pictures, denoised page by page, with what is of them all.

::

    file ──look at all──▶ black and white, noise of each channel
         ──page by page──▶ prepare ──▶ run ──▶ file, whose name comes last

Black and white, where they are percentiles, and the noise are those of the stack: a page of it is
one exposure among many by the same instrument. No more is in memory than a page, or as many small
ones as go through the network together.
"""

from __future__ import annotations

import hashlib
import math
import re
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from cdnctl import images
from cdnctl.api import Model
from cdnctl.errors import ImageError, OutputExistsError
from cdnctl.images import Image, Pages
from cdnctl.restore.batch import Batch, Done
from cdnctl.restore.denoise import Denoise, Ready, Restored, measured
from cdnctl.restore.levels import MEASURABLE, Level, noise_level
from cdnctl.restore.manifest import Origin, changed, digest_of
from cdnctl.restore.measuring import sampled
from cdnctl.restore.plan import Job
from cdnctl.restore.samples import Percentiles, black_and_white, is_gray, on_unit_scale, scaled

SIDE, GRID = 256, 4  # of a stack's squares that its noise is measured by: as of a large picture's
MOST_SAMPLES = 2**22  # of a stack that percentiles are taken of


@dataclass(frozen=True)
class Selection:
    """Some pages, or all, as the user has said it."""

    text: str
    ranges: tuple[tuple[int, int], ...] = ()  # first and last, from 1; (): all

    def of(self, count: int, name: str) -> list[int]:
        """Which of so many, from 0. ImageError if one is not there."""
        if not self.ranges:
            return list(range(count))
        last = max(end for _, end in self.ranges)
        if last > count:
            raise ImageError(
                f"{name!r} has {count} page{'s' * (count > 1)}, and --pages {self.text} asks for "
                f"page {last}: give --pages all, or up to {count}"
            )
        return sorted({i for start, end in self.ranges for i in range(start - 1, end)})


@dataclass(frozen=True)
class RestoredPages(Restored):
    """What was found in a stack: sigma, held back and class change as root mean square or mean
    over pages, the mean of the posteriors. The image has no pixels, but the notes."""

    pages: int = 0


@dataclass(frozen=True)
class DenoisePages(Denoise):
    """Denoising of the pages of one stack."""

    ends: tuple[float, float] | None = None  # see `black_and_white`
    levels: dict[int, Level] = field(default_factory=dict)  # by channel, where measured over all

    def of_page(self, image: Image, name: str, channel: int) -> Ready:
        """What `run` is to be given of a page; see `Denoise.prepare`."""
        if isinstance(self.settings.range, Percentiles) and self.settings.range.each:
            return self.prepare(image, name, b"")
        unit = image if self.ends is None else scaled(image, self.ends)
        level, mask = self.levels.get(channel), self.settings.mask
        if mask is not None:
            mask.check(image.samples)
        found = measured(unit, self.settings) if level is None else _within(level, unit)
        return Ready(unit, found or measured(unit, self.settings), self.ends, image.dtype)


def _within(level: Level, page: Image) -> Level | None:
    """A level measured over a stack, at the tones of a page; None if it says nothing of it."""
    if level.noise is None:
        return level
    if is_gray(page.samples) != (len(level.noise.levels) == 1):
        return None
    noise = level.noise.within(images.to_unit(sampled(page.samples)).mean(2))
    return Level(noise.safe, noise)


def looked_over(
    denoise: Denoise, pages: Pages, chosen: Sequence[int], name: str
) -> tuple[DenoisePages, tuple[str, ...]]:
    """The operation on the pages of a stack, with what all of them say of black, white and noise,
    and remarks. ImageError for any page that cannot be read: sooner than after hours of work."""
    settings = denoise.settings
    samples: list[np.ndarray] = []
    squares: dict[int, list[np.ndarray]] = defaultdict(list)
    among = Counter(pages.channel(index) for index in chosen)
    seen: Counter[int] = Counter()
    low, high = math.inf, -math.inf
    shapes = set()
    for index in chosen:
        image = images.read_page(pages, index, name)
        low, high = min(low, image.samples.min()), max(high, image.samples.max())
        step = math.ceil(math.sqrt(len(chosen) * image.samples.size / MOST_SAMPLES))
        some = image.samples[::step, ::step]
        hidden = None if image.alpha is None else image.alpha[::step, ::step] == 0
        samples.append((some if hidden is None or hidden.all() else some[~hidden]).ravel())
        shapes.add((image.samples.shape, image.dtype))
        own = pages.channel(index)
        squares[own] += _squares(image.samples, seen[own], among[own])
        seen[own] += 1
    whole = Image(np.concatenate(samples)[:, None, None])
    if images.is_unknown(pages.dtype) and settings.range is None:
        raise ImageError(
            f"{name!r}: its samples are {pages.dtype.name} and go from {low:.10g} to {high:.10g}, "
            f"which says not what is black and white: give --range, such as {low:.6g}:{high:.6g}"
        )
    each = isinstance(settings.range, Percentiles) and settings.range.each
    ends = None if each else black_and_white(whole, settings.range, name)
    notes = () if each else on_unit_scale(whole, ends, name).notes
    levels: dict[int, Level] = {}
    if settings.sigma is None and isinstance(settings.noise, str) and len(shapes) == 1 and not each:
        for channel, found in squares.items():
            if min(found[0].shape[:2]) < MEASURABLE:
                continue
            mosaic = Image(_mosaic(found))
            mosaic = mosaic if ends is None else scaled(mosaic, ends)
            levels[channel] = noise_level(mosaic, kind=settings.noise)
    return DenoisePages(settings, ends, levels), notes


def _squares(samples: np.ndarray, place: int, count: int) -> list[np.ndarray]:
    """Squares of a page, the ``place``-th of so many: those of all pages are GRID x GRID, each
    from another part of the picture where there are several parts."""
    cells = [c for c in range(GRID**2) if c * count // GRID**2 == place]
    height, width = samples.shape[:2]
    found = []
    for cell in cells:
        where = []
        # Neighbours in the mosaic are of different pages anyway; parts far from each other first.
        for size, part in ((height, cell // GRID), (width, (cell + cell // GRID) % GRID)):
            side = min(SIDE, size)
            # At multiples of 8, as in `measuring.sampled`.
            start = round((size - side) * part / (GRID - 1)) // 8 * 8
            where.append(slice(start, start + side))
        found.append(samples[tuple(where)].copy())
    return found


def _mosaic(squares: Sequence[np.ndarray]) -> np.ndarray:
    """At most GRID x GRID squares of one size side by side, (H, W, C)."""
    rows = [squares[at : at + GRID] for at in range(0, len(squares), GRID)]
    full = [np.concatenate(row, 1) for row in rows if len(row) == len(rows[0])]
    return np.concatenate(full, 0)


@dataclass(frozen=True)
class PagesBatch(Batch[Restored]):
    """Many files of which some are stacks; those are denoised page by page, one after the other,
    and behind all others."""

    pages: Selection = Selection("all")

    @cached_property
    def parameters(self) -> dict[str, Any]:
        """See `Batch`."""
        return {**super().parameters, "pages": self.pages.text}

    def run(
        self,
        jobs: Iterable[Job | Done[Restored] | None],
        late: list[Done[Restored]] | None = None,
    ) -> Generator[Done[Restored]]:
        """See `Batch`; all jobs are known before."""
        every = [job for job in jobs if isinstance(job, Job)]
        stacks = [job for job in every if is_stack(job.source, self.max_pixels)]
        single: list[Job] = []
        for job in (job for job in every if job not in set(stacks)):
            try:
                self.pages.of(1, str(job.source))
                single.append(job)
            except ImageError as error:
                yield self._failed(job, str(error))
        yield from super().run(single, late)
        for job in stacks:
            done = self._stack(job)
            if late is not None:
                late.append(done)
            yield done
            if late is not None:
                late.remove(done)

    def _stack(self, job: Job) -> Done[Restored]:
        """Denoise a file page by page."""
        started = time.monotonic()
        name = str(job.source)
        try:
            overwrite = self._begin(job)
            if isinstance(overwrite, Done):
                return overwrite
            time_of_input = changed(job.source)  # before it is read, see there
            origin = Origin(digest_of(job.source), job.source.stat().st_size, time_of_input)
            job.output.parent.mkdir(parents=True, exist_ok=True)
            temporary = images.temporary_name()
            if self.manifest is not None:
                # Now, as this takes long: whoever goes on after a sudden death removes it.
                begun = {"output": self.manifest.name_of(job.output), "temporary": temporary}
                self.manifest.add(begun | {"input": name})
            with images.saving(job.output, temporary, overwrite=overwrite) as file:
                restored = self.write(
                    file, job.output.suffix.lower(), job.source, name, self._watched(job)
                )
                seconds = time.monotonic() - started
                if self.manifest is not None:
                    file.seek(0)
                    found = hashlib.file_digest(file, "sha256").hexdigest()
                    record = self._record(job, origin, restored, found, seconds)
                    self.manifest.add(record | {"pages": restored.pages})
            return Done(job, restored, seconds=time.monotonic() - started)
        except OutputExistsError:
            return self._taken(job)
        except ImageError as error:
            return self._failed(job, str(error))
        except MemoryError:
            return self._failed(job, f"cannot denoise {name!r}: not enough memory for its pages")
        except (OSError, RecursionError) as error:
            reason = getattr(error, "strerror", None) or error
            return self._failed(job, f"cannot write {str(job.output)!r}: {reason}")

    def _watched(self, job: Job) -> Callable[[float], None]:
        return lambda share: self.watch(job, share)

    def write(
        self,
        file: BinaryIO,
        suffix: str,
        source: Path,
        name: str,
        watch: Callable[[float], None] = lambda share: None,
    ) -> RestoredPages:
        """Denoise the stack in ``source`` into an open file of the format of ``suffix``.

        name: of the stack, for messages. watch: told the share of the work that is done.
        ImageError if a page will not do, or the format holds no stacks.
        """
        with images.open_pages(source, self.max_pixels, name) as pages:
            if suffix not in pages.suffixes:
                raise ImageError(
                    f"{name!r} is a stack, and not to be written as {suffix}: name an output that "
                    f"ends in {' or '.join(pages.suffixes)}"
                )
            chosen = self.pages.of(pages.count, name)
            assert isinstance(self.operation, Denoise)
            operation, notes = looked_over(self.operation, pages, chosen, name)
            found: list[Restored] = []

            def restored() -> Iterator[Image]:
                for result in self._restored(operation, pages, chosen, name, watch):
                    yield result.image
                    found.append(replace(result, image=_without_pixels(result.image)))

            kept = images.write_pages(file, suffix, pages, chosen, restored(), self.writing.strip)
            noise = operation.levels[min(operation.levels)].noise if operation.levels else None
            together = _together(found, [index + 1 for index in chosen], noise)
            every = (*notes, *together.image.notes, *kept)
            return replace(together, image=replace(together.image, notes=every))

    def _restored(
        self,
        operation: DenoisePages,
        pages: Pages,
        chosen: Sequence[int],
        name: str,
        watch: Callable[[float], None],
    ) -> Iterator[Restored]:
        """Results in order; small pages go through the network together."""
        waiting: list[tuple[int, Ready]] = []
        done = 0

        def worked_off() -> Iterator[Restored]:
            nonlocal done
            height, width = waiting[0][1].image.samples.shape[:2]
            model = self.models.pick(height, width, operation.by_camera(waiting[0][1]))

            def share(part: float) -> None:
                watch((done + part * len(waiting)) / len(chosen))

            yield from _run(operation, waiting, model, name, share)
            done += len(waiting)
            watch(done / len(chosen))
            waiting.clear()

        for index in chosen:
            image = images.read_page(pages, index, name)
            where = f"{name}, page {index + 1}"
            try:
                ready = operation.of_page(image, where, pages.channel(index))
            except ImageError as error:
                text = str(error)
                raise ImageError(text if where in text else f"{where!r}: {text}") from None
            shape = ready.image.samples.shape
            if waiting and _kind(operation, waiting[0][1]) != _kind(operation, ready):
                yield from worked_off()
            waiting.append((index, ready))
            if len(waiting) == operation.together(*shape[:2]):
                yield from worked_off()
        if waiting:
            yield from worked_off()


def _run(
    operation: DenoisePages,
    items: Sequence[tuple[int, Ready]],
    model: Model,
    name: str,
    watch: Callable[[float], None],
) -> list[Restored]:
    """Results of pages of one size. ImageError that names the page that will not do."""
    try:
        return operation.run([ready for _, ready in items], model, watch)
    except ImageError as error:
        if len(items) > 1:  # which of them it is
            return [r for item in items for r in _run(operation, [item], model, name, watch)]
        raise ImageError(f"{name!r}, page {items[0][0] + 1}: {error}") from None


def _kind(operation: Denoise, ready: Ready) -> tuple[object, ...]:
    """What pages have in common that go through the network together."""
    return (*ready.image.samples.shape, operation.by_camera(ready))


def is_stack(path: Path, max_pixels: int) -> bool:
    """Whether a file is a stack, or an array, of which pages keep what pictures cannot."""
    if not images.takes_pages(path):
        return False
    try:
        with images.open_pages(path, max_pixels) as pages:
            return pages.count > 1 or images.is_array(path)
    except ImageError:
        return True  # why it cannot be opened is said when its turn comes


def _without_pixels(image: Image) -> Image:
    return Image(image.samples[:0, :0].copy(), notes=image.notes, suffix=image.suffix)


def _together(found: Sequence[Restored], numbers: Sequence[int], noise: Any) -> RestoredPages:
    """Results of pages, with their numbers, as one."""

    def rms(values: Sequence[float]) -> float:
        return float(np.sqrt(np.mean(np.square(values))))

    posterior: dict[str, float] = defaultdict(float)
    for result in found:
        for label, share in result.posterior.items():
            posterior[label] += share / len(found)
    changes = [result.class_change for result in found if result.class_change is not None]
    return RestoredPages(
        replace(found[0].image, notes=_remarks(found, numbers)),
        found[0].model,
        rms([result.sigma for result in found]),
        max(result.told for result in found),
        dict(sorted(posterior.items(), key=lambda item: -item[1])),
        float(np.mean([result.held for result in found])),
        rms(changes) if changes else None,
        noise,
        len(found),
    )


def _remarks(found: Sequence[Restored], numbers: Sequence[int]) -> tuple[str, ...]:
    """Notes on pages, those that differ in numbers only as one."""
    first: dict[str, tuple[int, str]] = {}
    often: dict[str, int] = defaultdict(int)
    for result, number in zip(found, numbers, strict=True):
        for note in result.image.notes:
            kind = re.sub(r"\d[\d.]*", "0", note)
            first.setdefault(kind, (number, note))
            often[kind] += 1
    remarks = []
    for kind, (number, note) in first.items():
        more = f" and {often[kind] - 1} more" if often[kind] > 1 else ""
        where = "each page" if often[kind] == len(found) > 1 else f"page {number}{more}"
        remarks.append(f"{where}: {note}")
    return tuple(remarks)
