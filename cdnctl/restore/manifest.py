"""What a batch has done, one JSON object a line, so that it can go on after anything.

A line is written before the output that it tells of gets its name. If a run is killed between
the two, the output is missing or is not what the line says, and the job is done again: a line
alone proves nothing, a line with an output of its hash does.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import threading
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType
from typing import IO, Any

from cdnctl.errors import ImageError, SetupError, UsageError

NAME = "cdnctl-manifest.jsonl"


def digest(data: bytes) -> str:
    """SHA-256 as hexadecimal digits."""
    return hashlib.sha256(data).hexdigest()


def digest_of(path: Path) -> str:
    """That of a file, of which only parts are in memory. ImageError if it cannot be read."""
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise ImageError(f"cannot read {str(path)!r}: {error.strerror or error}") from None


def changed(path: Path) -> int:
    """When a file was last changed, in ns; 0 if it is not there.

    Ask before you read: of a file that is changed while it is read, the time is then too old,
    and a later run compares the content.
    """
    try:
        return path.stat().st_mtime_ns
    except OSError:
        return 0


@dataclass(frozen=True)
class Origin:
    """An input file as it was when it was read."""

    input_sha256: str = ""
    input_bytes: int = -1
    input_mtime: int = 0  # see `changed`

    @staticmethod
    def from_dict(record: Mapping[str, Any]) -> Origin:
        """From a line of the manifest; values that are missing match no file."""
        return Origin(**{k: record[k] for k in asdict(Origin()) if k in record})

    def to_dict(self) -> dict[str, Any]:
        """For a line of the manifest."""
        return asdict(self)

    def still(self, path: Path) -> bool:
        """Whether the file is the same. Its content is read only if its time has changed."""
        try:
            stat = path.stat()
            if stat.st_size != self.input_bytes:
                return False
            if stat.st_mtime_ns == self.input_mtime:
                return True
            return digest_of(path) == self.input_sha256
        except (OSError, ImageError):
            return False


class Manifest:
    """The manifest of an output folder: what it says, and as a context open for more lines.

    rank, world: each of several processes writes its own part, and all read all parts. The file
    is read when it is opened and locked while it is open; `read` alone changes nothing. Entering
    raises UsageError if another run has it, SetupError if it cannot be written.
    """

    def __init__(self, folder: Path, rank: int = 0, world: int = 1):
        self.folder = folder
        self.path = folder / (NAME if rank == 0 else f"cdnctl-manifest.{rank}-of-{world}.jsonl")
        self._lock = threading.Lock()
        self._file: IO[bytes] | None = None
        self._torn = False  # whether the file ends in half a line
        self._records: dict[str, list[dict[str, Any]]] = defaultdict(list)

    def read(self) -> None:
        """Take in what the manifest says. SetupError if it cannot be read."""
        try:
            for part in parts(self.folder):
                self._take(part.read_bytes())
        except OSError as error:
            raise SetupError(
                f"cannot read the manifest of {str(self.folder)!r}: {error.strerror or error}"
            ) from None

    def __enter__(self) -> Manifest:
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            self._file = open(self.path, "a+b", buffering=0)
        except OSError as error:
            raise SetupError(
                f"cannot write {str(self.path)!r} ({error.strerror or error}): "
                "choose another output folder"
            ) from None
        if not _locked(self._file):
            self._file.close()
            raise UsageError(
                f"another run is writing to {str(self.folder)!r}: "
                "wait for it, or choose another folder"
            )
        try:
            self.read()  # not before: until then another run may have written
            if self._file.seek(0, os.SEEK_END) > 0:
                self._file.seek(-1, os.SEEK_END)
                self._torn = self._file.read(1) != b"\n"  # by a run that was killed
        except BaseException:
            self._file.close()
            raise
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        assert self._file is not None
        self._file.close()

    def name_of(self, output: Path) -> str:
        """An output's name in the manifest: its path from the folder on, with slashes."""
        return Path(os.path.relpath(output, self.folder)).as_posix()

    def add(self, record: Mapping[str, Any]) -> None:
        """Write a line; from any thread. SetupError if it cannot be written."""
        line = json.dumps(record, ensure_ascii=True, allow_nan=False).encode() + b"\n"
        assert self._file is not None
        with self._lock:
            rest = memoryview(b"\n" + line if self._torn else line)
            self._torn = True
            try:
                while rest:
                    rest = rest[self._file.write(rest) :]
            except OSError as error:
                raise SetupError(
                    f"cannot write {str(self.path)!r} ({error.strerror or error}): "
                    "make room, then go on with --resume"
                ) from None
            self._torn = False

    def records(self, output: Path) -> list[dict[str, Any]]:
        """The lines, of those that were there at the start, about an output."""
        return self._records.get(self.name_of(output), [])

    def _take(self, content: bytes) -> None:
        for line in content.splitlines():
            try:
                record = json.loads(line)
                self._records[record["output"]].append(record)
            except (ValueError, KeyError, TypeError, RecursionError):
                continue  # half a line, or somebody's own


def parts(folder: Path) -> list[Path]:
    """The manifest files of a folder, if it is there: one, or one of each process."""
    if not folder.is_dir():
        return []
    pattern = re.compile(r"cdnctl-manifest(\.\d+-of-\d+)?\.jsonl")
    return sorted(p for p in folder.iterdir() if pattern.fullmatch(p.name))


def _locked(file: IO[bytes]) -> bool:
    """Lock an open file until it is closed or the process ends; False if another has it."""
    try:
        import fcntl
    except ImportError:  # Windows
        import msvcrt

        file.seek(2**40)  # a byte far behind the end: locks there forbid writing, too
        try:
            msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)  # type: ignore[attr-defined]
        except OSError:
            return False
        finally:
            file.seek(0, os.SEEK_END)
        return True
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        pass  # a file system without locks
    return True
