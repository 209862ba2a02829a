"""Make the README's pictures with the bundled models.

python examples/make_figure.py

figure.png: cat_noisy.png restored, and what speaks for "cat". camera.png: what a simulated camera
makes of three photographs in little light, and what cdnctl makes of that with no option given. The
photographs come with scikit-image and are in the public domain: an astronaut (NASA), and a cup of
coffee and a cat (CC0, Rachel Michetti and Stefan van der Walt).
"""

from pathlib import Path

import imageio.v3 as iio
import numpy as np
import torch
from skimage import data

import cdnctl
from cdnctl import images
from cdnctl.analysis.evidence import evidence
from cdnctl.figures import evidence_colours
from cdnctl.images import Image
from cdnctl.restore import Settings, restore
from cdnctl.training.cameras import MARGIN, Cameras, photographs

SIGMA = 50 / 255
SIDE = 224
SCENES = (data.astronaut()[0:, 120:], data.coffee()[60:, 180:], data.chelsea()[20:, 60:])


def main() -> None:
    """Write both beside this script."""
    here = Path(__file__).parent
    model = cdnctl.load("photo")
    noisy = images.read(here / "cat_noisy.png")
    settings = Settings(sigma=SIGMA, target={"cat": 1.0})
    restored = restore(noisy, model, settings).image.pixels
    heat = evidence(model, noisy.pixels, SIGMA, "cat").heat(*restored.shape[:2])
    why = evidence_colours(restored, heat / np.percentile(np.abs(heat), 99.5))
    _write(here / "figure.png", np.concatenate([noisy.pixels, restored, why], axis=1))

    taken = photographed(torch.Generator().manual_seed(0))
    camera = cdnctl.load("camera")
    rows = [taken, [restore(Image(one), camera, Settings()).image.samples for one in taken]]
    picture = np.concatenate([np.concatenate(row, axis=1) for row in rows], axis=0)
    _write(here / "camera.png", images.to_unit(picture))


def photographed(generator: torch.Generator) -> list[np.ndarray]:
    """The scenes, (SIDE, SIDE, 3) of uint8, as an ordinary camera has them at a high sensitivity:
    600 electrons in a pixel that is white, JPEG of quality 92."""
    side = SIDE + 2 * MARGIN
    scenes = np.stack([scene[:side, :side] / 255 for scene in SCENES])
    count = len(scenes)
    values = {
        "exposure": 1, "lens": 0.7, "gain": 1 / 600, "read": 4 / 600, "red": 2, "blue": 1.6,
        "overlap": 0.6, "demosaic": 1, "contrast": 0.3, "smooth": 1, "blur": 0, "sharp": 0.4,
        "radius": 1, "quality": 92, "subsampled": 1, "resaved": 0,
    }  # fmt: skip
    whole = {"demosaic", "quality", "subsampled", "resaved"}
    kinds = {name: torch.int64 if name in whole else torch.float32 for name in values}
    cameras = Cameras(
        **{name: torch.full((count,), v, dtype=kinds[name]) for name, v in values.items()}
    )
    tensor = torch.from_numpy(scenes).float().permute(0, 3, 1, 2)
    _, noisy = photographs(tensor, cameras, generator)
    return [images.from_unit(y.permute(1, 2, 0).numpy(), np.dtype(np.uint8)) for y in noisy]


def _write(path: Path, pixels: np.ndarray) -> None:
    iio.imwrite(path, np.rint(np.clip(pixels, 0, 1) * 255).astype(np.uint8))


if __name__ == "__main__":
    main()
