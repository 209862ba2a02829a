"""Make the example picture: scikit-image's cat with Gaussian noise of sigma 50.

    python examples/make_examples.py

The photograph is ``skimage.data.chelsea``, by Stefan van der Walt, released under
CC0 (public domain); it comes with scikit-image.
"""

from pathlib import Path

import imageio.v3 as iio
import numpy as np
from skimage import data, transform

SIGMA = 50


def main() -> None:
    """Write cat.png (clean, 300 pixels wide) and cat_noisy.png beside this script."""
    here = Path(__file__).parent
    cat = data.chelsea()
    clean = transform.resize(cat, (200, 300), anti_aliasing=True)
    noisy = clean + np.random.default_rng(0).normal(0, SIGMA / 255, clean.shape)
    for name, pixels in (("cat.png", clean), ("cat_noisy.png", noisy)):
        iio.imwrite(here / name, np.rint(np.clip(pixels, 0, 1) * 255).astype(np.uint8))


if __name__ == "__main__":
    main()
