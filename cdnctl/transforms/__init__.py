"""Fixed linear transforms of pictures and the nonlinearities that go with them: tensors in and
out, nothing learnt, no files.

- `wavelet`: orthogonal wavelets, forward and back; packets
- `scattering`: filters, moduli of wavelets, their averages
"""
