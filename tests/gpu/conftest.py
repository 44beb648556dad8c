"""Tests that need a GPU, skipped and counted where there is none; they borrow what the others have."""

import os
import sys
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from typing import Any

import pytest
import torch

HERE = Path(__file__).parents[1]
sys.path.insert(0, str(HERE / "conformance"))


def _of_multi() -> Any:
    spec = spec_from_file_location("desks", HERE / "multi" / "conftest.py")
    assert spec and spec.loader
    module = module_from_spec(spec)
    sys.modules["desks"] = module
    spec.loader.exec_module(module)
    return module


desk = _of_multi().desk


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where recipes are written."""
    return tmp_path_factory.mktemp("recipes")


LONG = (
    "gpt:nano",
    "too_large",
    "recorded_in_float32[resnet18]",
    "cnn-pp=2",
    "nccl[dp=2]",
    "zero=3]",
    "nccl[tp=2]",
    "[mlp-device=cuda]",
    "[cnn-device=cuda]",
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """One reason for all. What takes long where the CPU does a GPU's work is slow there."""
    skip = pytest.mark.skip(reason="needs a CUDA device, and torch finds none")
    for item in items:
        if "PARAXIS_EMULATOR" in os.environ and any(word in item.name for word in LONG):
            item.add_marker(pytest.mark.slow)
        if item.get_closest_marker("cuda") and not torch.cuda.is_available():
            item.add_marker(skip)
