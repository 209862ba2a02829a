"""Physical fields, which are not photographs: simulated, modelled scale by scale, sampled.

- `simulate`: fields of a known law; `stacks`: their files
- `bands`, `energy`: what is drawn given the rest, and by which energy
- `model`, `mala`: models fitted, and sampled; `store`: their files
- `check`: two sets of fields compared
"""
