"""Everything that cdnctl raises on purpose.

::

    CdnctlError                 exit code 1
    ├── UsageError              2   a value that the user gave cannot be used
    │   ├── UnknownClassError       a class that the model does not know
    │   └── ConfigError             a training config with a wrong key or value
    ├── SetupError              3   something that the tool needs is missing
    │   ├── DeviceError             a device that is not there
    │   └── WeightsError            a weights file that is missing, damaged or foreign
    ├── ImageError              1   one picture cannot be read or written
    │   └── OutputExistsError   2       a file is there that was not to be replaced
    └── TrainingError           1   a training run cannot go on

A message is one line or a few: it quotes the offending value and says what to do.
The command line prints it to stderr and leaves with ``exit_code``.
"""

from __future__ import annotations

from pathlib import Path


class CdnctlError(Exception):
    """Base of all errors that cdnctl raises on purpose."""

    exit_code = 1


class UsageError(CdnctlError):
    """A value that the user gave cannot be used."""

    exit_code = 2


class UnknownClassError(UsageError):
    """A class name that the model does not know."""


class ConfigError(UsageError):
    """A training config with an unknown key, a wrong type or an impossible value."""


class SetupError(CdnctlError):
    """Something that the tool needs is not there or does not work."""

    exit_code = 3


class DeviceError(SetupError):
    """A compute device that is not available."""


class WeightsError(SetupError):
    """A weights file that is missing, damaged, or not one of ours."""


class ImageError(CdnctlError):
    """One picture cannot be read or written. A batch reports it and goes on."""


class OutputExistsError(ImageError):
    """A file is there that must not be replaced, and was not when the work was planned."""

    exit_code = 2

    def __init__(self, path: Path):
        super().__init__(
            f"{str(path)!r} was written by another program meanwhile: "
            "give --overwrite to replace it"
        )


class TrainingError(CdnctlError):
    """A training run cannot go on (not a number in the loss, data that vanished)."""
