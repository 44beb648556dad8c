"""The doctor: what this machine has for parallel training, tried and not assumed; ok, or how to mend it."""

import os
import shutil
from typing import Any

from paraxis.errors import ParaxisError
from paraxis.measure import gpus
from paraxis.measure.machine import ForeignLoad, cpu_model, installed, usable_cores
from paraxis.run.launch import start
from paraxis.session import Tell

Finding = dict[str, Any]


def examine(tell: Tell) -> list[Finding]:
    """Every check in turn; transports are tried with two real ranks."""
    tell("looking at cores and load", -1)
    findings = [_cores(), _load(), _torch()]
    for transport, mend in (
        ("mpi", "pip install 'paraxis[mpi]' (brings Open MPI), or mpi4py for this site's MPI"),
        ("gloo", "it comes with PyTorch: reinstall torch>=2.9"),
    ):
        tell(f"starting two ranks over {transport}", -1)
        findings.append(_transport(transport, mend))
    return [*findings, _native(), _compiler(), _gpu()]


def _finding(name: str, ok: bool, found: str, mend: str = "", needed: bool = True) -> Finding:
    return {"name": name, "ok": ok, "found": found, "mend": "" if ok else mend, "needed": needed}


def _cores() -> Finding:
    cores, machine = usable_cores(), os.cpu_count() or 1
    found = f"{cores} usable of {machine} ({cpu_model()})"
    return _finding(
        "cores", cores > 1, found, "parallel plans need 2 usable cores: raise the affinity or the cgroup quota", False
    )


def _load() -> Finding:
    foreign = ForeignLoad([]).settle(0.5)
    mend = "timings will be noisy: stop other programs, or wait"
    return _finding("load", foreign < 0.3, f"other programs keep {foreign:.1f} cores busy", mend, False)


def _torch() -> Finding:
    found = installed("torch")
    return _finding("torch", found is not None, found or "not installed", "pip install 'torch>=2.9'")


def _transport(transport: str, mend: str) -> Finding:
    try:
        pool = start(transport, 2, oversubscribed=usable_cores() < 2).join()
        facts = pool.facts
        pool.close()
    except ParaxisError as error:
        return _finding(transport, False, str(error).splitlines()[0], mend, transport == "gloo")
    return _finding(transport, True, facts["library"] or f"two ranks talk (torch {facts['torch']})")


def _native() -> Finding:
    from paraxis.engine.native_engine import extension

    try:
        return _finding("native", True, f"threads as ranks, kernels for {extension().kernels()}", needed=False)
    except ParaxisError as error:
        return _finding("native", False, "not built", str(error), False)


def _compiler() -> Finding:
    path = next((p for p in map(shutil.which, (os.environ.get("CXX", "c++"), "g++", "clang++")) if p), None)
    mend = "apt-get install g++, or your system's, and install again; only the native engine needs it"
    return _finding("compiler", path is not None, path or "no C++ compiler", mend, False)


def _gpu() -> Finding:
    names, cuda = [name for name, _ in gpus.listed()], gpus.cuda_of_torch()
    told = ", ".join(f"{key} {version}" for key, version in gpus.versions().items())
    if names and not cuda:
        found = f"{', '.join(names)}, but torch was built without CUDA"
        return _finding("gpu", False, found, "install a torch that was built with CUDA", False)
    mend = "plans run on the CPU; nothing to mend without a card"
    return _finding("gpu", bool(names), f"{', '.join(names)} ({told})" if names else "none", mend, False)
