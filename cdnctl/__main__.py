"""``python -m cdnctl``, also for ``torchrun -m cdnctl``."""

from cdnctl.cli import main

if __name__ == "__main__":
    main()
