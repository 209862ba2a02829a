"""What a model knows and how: pure functions, with a wrapper where they need a `Model`.

- of a picture: `evidence` (which pixels speak for a class), `uncertainty` (how sure each pixel is),
  `basis` (the patterns in which it is restored)
- of a classifier: `attacks` (changes made to mislead), `ood` (pictures of another kind),
  `separation` (how far apart its features hold the classes)
- of weights: `stages` (a network as a chain of learnt linear maps), `encoding` (whether two found
  the same covariances), `rainbow` (networks drawn from covariances)
- of training: `curves` (how the loss falls with the number of examples), `agreement` (whether two
  denoisers of different pictures do the same)
"""
