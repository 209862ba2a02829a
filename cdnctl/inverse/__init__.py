"""Linear inverse problems: pictures from measurements that do not fix them.

A measurement is m = A x + noise. `operators` has A with its adjoint, `jpeg` what a JPEG file says
about the picture that it was made of, and `guide` makes of a denoiser, an operator and a
measurement the denoiser that knows the measurement, too; `cdnctl.sampling` does the rest.
Nothing here knows of files or models.
"""
