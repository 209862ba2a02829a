"""Fixed linear transforms of pictures and the nonlinearities that go with them: tensors in and
out, nothing learnt, no files."""
