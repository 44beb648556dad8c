"""The GPUs of this machine and the versions of what computes on them, told without loading the framework."""

import os
import re
import shutil
import subprocess
from importlib.metadata import distributions
from importlib.util import find_spec
from pathlib import Path

from paraxis.plan.devices import Gpus

QUERY = ("--query-gpu=name,driver_version", "--format=csv,noheader")


def listed() -> list[tuple[str, str]]:
    """(name, driver version) of every GPU, of which CUDA_VISIBLE_DEVICES may hide some."""
    tool = shutil.which("nvidia-smi")
    if tool is None:
        return []
    try:
        told = subprocess.run([tool, *QUERY], capture_output=True, text=True, check=False, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return []
    rows = [line.rpartition(", ") for line in told.stdout.splitlines() if ", " in line] if not told.returncode else []
    return visible([(name.strip(), driver.strip()) for name, _, driver in rows], os.environ.get("CUDA_VISIBLE_DEVICES"))


def visible(gpus: list[tuple[str, str]], chosen: str | None) -> list[tuple[str, str]]:
    """Those that a process sees: the ones named, up to the first that is none; what is no number is believed."""
    if chosen is None:
        return gpus
    found = []
    for word in filter(None, (part.strip() for part in chosen.split(","))):
        if word.startswith("-") or (word.isdecimal() and int(word) >= len(gpus)):
            break
        found.append(gpus[int(word)] if word.isdecimal() else gpus[0])
    return found if gpus else []


def cuda_of_torch() -> str | None:
    """The version of CUDA that PyTorch was built with; None if with none."""
    spec = find_spec("torch")
    path = Path(spec.origin).with_name("version.py") if spec and spec.origin else None
    text = path.read_text() if path and path.exists() else ""
    found = re.search(r"^cuda\b[^=\n]*=\s*['\"]([\d.]+)['\"]", text, re.M)
    return found[1] if found else None


def versions() -> dict[str, str]:
    """Of the driver, CUDA and NCCL, where there is a GPU."""
    gpus = listed()
    if not gpus:
        return {}
    names = {d.metadata["Name"]: d.version for d in distributions()} if cuda_of_torch() else {}
    nccl = next((version for name, version in names.items() if str(name).startswith("nvidia-nccl")), None)
    return {"driver": gpus[0][1]} | {k: v for k, v in (("cuda", cuda_of_torch()), ("nccl", nccl)) if v}


def usable() -> Gpus:
    """How many GPUs there are for PyTorch to use, as far as can be told without it."""
    gpus, cuda = listed(), cuda_of_torch()
    if gpus and cuda:
        return Gpus(len(gpus))
    return Gpus(0, "this torch was built without CUDA" if gpus else "no GPU, or no driver for it")
