"""Fixtures of several test files."""

from __future__ import annotations

from pathlib import Path

import pytest
from tiny import save_tiny


@pytest.fixture(scope="session")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An untrained model."""
    return save_tiny(tmp_path_factory.mktemp("weights") / "tiny.safetensors")
