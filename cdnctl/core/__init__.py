"""The mathematics: tensors and arrays in and out, no files, no prints.

- `joint`: what a model may offer, and what follows from it: score, posterior, denoiser
- `noise`, `coloured`: noise added and undone; noise that is not white
- `guard`: how far a denoiser may change a picture
- `losses`, `metrics`: score matching and cross-entropy; PSNR, SSIM, accuracy, AUROC
- `linear`, `spectra`: Jacobians by their products, eigenvectors; covariances of weights
- `thresholds`, `mirror`: moments behind a threshold; pictures beyond their edges
"""
