"""How good, how fast and how hungry: numbers about models and about other methods.

- `evaluate`: scores on folders of pictures
- `methods`: classical denoisers and yardsticks of time, by name like the models
- `benchmark`: quality, time and memory of methods; pictures per second of folders
- `gradient`: what the gradient of a scalar network costs
"""
