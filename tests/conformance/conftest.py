"""What all tests here share."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch


@pytest.fixture(scope="session", autouse=True)
def seeding_the_cpu_alone() -> Iterator[None]:
    """torch.manual_seed keeps a stack trace for every kind of device that is not there: 5 ms within pytest."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "manual_seed", torch.default_generator.manual_seed)
        yield


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where recipes are written: one place, so that equal tasks are emulated once."""
    return tmp_path_factory.mktemp("recipes")
