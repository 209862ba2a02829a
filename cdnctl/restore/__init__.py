"""Pictures to pictures: one, or many files.

::

    file ──plan──▶ Job ──batch──▶ prepare ──▶ run ──▶ file, line of the manifest
                                  └─── Operation ───┘
    Image ──levels──▶ Level ──view, stack──▶ network ──denoise──▶ Restored

Who imports whom, each only what stands above it:

- ``samples`` (black, white, gray), ``noise`` (a model of noise), ``tiles``, ``scale``, and
  ``manifest`` (what was done): these import nothing of this room;
- ``measuring`` (what noise a picture holds), ``levels`` (how strong it is: told, or measured),
  ``profiles`` (what several pictures have in common);
- ``view`` (a picture as the network sees it, within a budget of memory), ``stack`` (small ones
  together);
- ``masks``, ``settings``, ``classes`` (what a picture shows), ``operation`` (what can be done to
  pictures);
- ``denoise``, the first operation; ``preview`` (parts to judge settings by); ``prior`` (a model as
  the denoiser of whole pictures), ``repair`` and ``repairs`` (holes, scale, blur), ``deblock``
  (JPEG);
- ``plan`` (which file goes where), ``writing`` (how a result is stored) and ``batch`` (many files),
  which know nothing of denoising; ``pages`` (stacks), which does.

The names of the Python API are here; what is for many files is in ``plan``, ``writing`` and
``batch``.
"""

from cdnctl.restore.classes import (
    Classified,
    Seen,
    at_class_scale,
    choose_class,
    class_change,
    class_mixture,
    classify,
    classify_together,
    most_probable,
    ranked,
    seen,
)
from cdnctl.restore.deblock import Deblock, Deblocked
from cdnctl.restore.denoise import Denoise, Restored, moved, restore, restore_batch, whole_place
from cdnctl.restore.levels import Level, estimate_sigma, noise_level
from cdnctl.restore.masks import Mask
from cdnctl.restore.noise import Noise
from cdnctl.restore.operation import Operation, Result
from cdnctl.restore.repair import Repair, Repaired
from cdnctl.restore.repair import Settings as RepairSettings
from cdnctl.restore.repairs import Deblur, Inpaint, Upscale
from cdnctl.restore.samples import Percentiles, black_and_white, on_own_scale, on_unit_scale
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
    "Mask",
    "Noise",
    "Operation",
    "OutOfMemory",
    "Percentiles",
    "Repair",
    "RepairSettings",
    "Repaired",
    "Restored",
    "Result",
    "Seen",
    "Settings",
    "Stack",
    "Upscale",
    "View",
    "at_class_scale",
    "batch_size",
    "black_and_white",
    "check_channels",
    "choose_class",
    "class_change",
    "class_mixture",
    "classify",
    "classify_together",
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
    "seen",
    "whole_place",
]
