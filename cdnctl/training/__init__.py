"""A model made from pictures: a run that can be stopped, resumed and shared out.

- `config`: the TOML file, checked key by key before anything runs
- `datasets`: picture files in folders and zip files, all of them in memory
- `halves`: disjoint halves of them, without near duplicates
- `batches`: batch t as a function of (seed, t)
- `step`: the loss, its gradients, a step of the optimizers
- `state`: weights, their average, optimizers, guard; saved and loaded
- `validation`: the averaged weights on held-out pictures
- `runs`: what a run is, and what lies in its folder
- `loop`: all of these in one function, `train`
- `report`, `probe`: an account of a run; the fastest way to run the step here
"""
