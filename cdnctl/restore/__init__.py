"""Pictures restored to pictures.

::

    a file ──plan──▶ job ──batch──▶ many files, manifest
    Image  ──denoise──▶ Image: what its noise is (levels), as the network sees it (view),
                        what it shows (classes)
    Image  ──repair──▶ Image: holes, scale and blur, by a model as the prior

Imports point to the left: ``samples``, ``noise`` and ``measuring`` (what noise a picture holds),
``levels`` (how strong it is), ``tiles`` and ``scale`` (arithmetic of sizes), ``view`` (a picture
as the network sees it), ``settings``, ``classes`` (what it shows), ``denoise``; ``prior`` (a model
as the denoiser of whole pictures), ``repair``, ``deblock`` (JPEG); beside these ``plan`` (which
file goes where) and ``manifest`` (what was done); ``batch`` (many files) above all.

The names of the Python API are here; what is for many files is in ``plan`` and ``batch``.
"""

from cdnctl.restore.classes import (
    Classified,
    at_class_scale,
    choose_class,
    class_change,
    class_mixture,
    classify,
    most_probable,
    ranked,
)
from cdnctl.restore.deblock import Deblock, Deblocked
from cdnctl.restore.denoise import Denoise, Restored, moved, restore, restore_batch, whole_place
from cdnctl.restore.levels import Level, estimate_sigma, noise_level
from cdnctl.restore.operation import Operation, Result
from cdnctl.restore.repair import Deblur, Inpaint, Repair, Repaired, Upscale
from cdnctl.restore.repair import Settings as RepairSettings
from cdnctl.restore.samples import on_own_scale, on_unit_scale
from cdnctl.restore.settings import Settings
from cdnctl.restore.stack import Stack, batch_size
from cdnctl.restore.view import (
    OutOfMemory,
    View,
    check_channels,
    default_tile,
    in_tiles_that_fit,
    memory_errors,
    out_of_memory,
)

__all__ = [
    "Classified",
    "Deblock",
    "Deblocked",
    "Deblur",
    "Denoise",
    "Inpaint",
    "Level",
    "Operation",
    "OutOfMemory",
    "Repair",
    "RepairSettings",
    "Repaired",
    "Restored",
    "Result",
    "Settings",
    "Stack",
    "Upscale",
    "View",
    "at_class_scale",
    "batch_size",
    "check_channels",
    "choose_class",
    "class_change",
    "class_mixture",
    "classify",
    "default_tile",
    "estimate_sigma",
    "in_tiles_that_fit",
    "memory_errors",
    "most_probable",
    "moved",
    "noise_level",
    "on_own_scale",
    "on_unit_scale",
    "out_of_memory",
    "ranked",
    "restore",
    "restore_batch",
    "whole_place",
]
