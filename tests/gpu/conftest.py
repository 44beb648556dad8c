"""What all tests here share."""

from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where recipes are written: one place, so that equal tasks are emulated once."""
    return tmp_path_factory.mktemp("recipes")
