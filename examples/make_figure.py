"""Make the README's picture from cat_noisy.png with the bundled photo model.

python examples/make_figure.py
"""

from pathlib import Path

import imageio.v3 as iio
import numpy as np

import cdnctl
from cdnctl import images
from cdnctl.analysis.evidence import evidence
from cdnctl.figures import evidence_colours
from cdnctl.restore import Settings, restore

SIGMA = 50 / 255


def main() -> None:
    """Write figure.png: noisy, restored, evidence for "cat", side by side."""
    here = Path(__file__).parent
    model = cdnctl.load("photo")
    noisy = images.read(here / "cat_noisy.png")
    settings = Settings(sigma=SIGMA, target={"cat": 1.0})
    restored = restore(noisy, model, settings).image.pixels
    heat = evidence(model, noisy.pixels, SIGMA, "cat").heat(*restored.shape[:2])
    why = evidence_colours(restored, heat / np.percentile(np.abs(heat), 99.5))
    row = np.concatenate([noisy.pixels, restored, why], axis=1)
    iio.imwrite(here / "figure.png", np.rint(np.clip(row, 0, 1) * 255).astype(np.uint8))


if __name__ == "__main__":
    main()
