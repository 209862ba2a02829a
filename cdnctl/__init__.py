"""cdnctl: restore and classify noisy pictures with one joint density.

    import cdnctl
    model = cdnctl.load("photo")
    clean = model.denoise(noisy, sigma=25 / 255)

Importing this package does not import torch; ``load`` does.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from cdnctl.version import VERSION as __version__

if TYPE_CHECKING:
    from cdnctl.api import Model, load

__all__ = ["Model", "__version__", "load"]


def __getattr__(name: str) -> Any:
    if name in ("load", "Model"):
        from cdnctl import api

        return getattr(api, name)
    raise AttributeError(f"module 'cdnctl' has no attribute {name!r}")
