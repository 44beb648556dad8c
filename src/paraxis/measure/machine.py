"""Facts about this machine: usable cores, who else keeps them busy, what is installed."""

import os
import platform
import re
import time
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path

import psutil

from paraxis.measure import gpus
from paraxis.measure.records import Machine

VERSIONS = ("paraxis", "numpy", "mpi4py")


def usable_cores() -> int:
    """Cores this process may use: affinity, cgroup quota and Slurm's allocation, not what the machine has."""
    affinity = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    bounds = [affinity]
    try:
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text().split()
        if quota != "max":
            bounds.append(max(1, int(quota) // int(period)))
    except (OSError, ValueError):
        pass
    if os.environ.get("SLURM_CPUS_ON_NODE", "").isdecimal():
        bounds.append(int(os.environ["SLURM_CPUS_ON_NODE"]))
    return max(1, min(bounds))


def cpu_model() -> str:
    """The processor's name."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    return next(
        (line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.processor()
    )


def pinned(quiet: bool) -> str:
    """What `pinning` does with ranks here, in words."""
    cores = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else []
    if not cores:
        return "none: this system cannot"
    where = f"cores {', '.join(map(str, cores[:64]))}"
    if not quiet:
        return f"none, for other programs were busy at the start; ranks share {where}"
    return f"several ranks that fit have cores of their own among {where}"


def describe(mpi: str | None = None) -> Machine:
    """The record of this machine, as it is now."""
    return Machine(
        cpu=cpu_model() or platform.machine(),
        usable_cores=usable_cores(),
        memory_bytes=int(psutil.virtual_memory().total),
        load_before=os.getloadavg()[0],
        python=platform.python_version(),
        torch=installed("torch") or "",
        mpi=mpi,
        system=f"{platform.system()} {platform.machine()}",
        gpus=[name for name, _ in gpus.listed()],
        caches=caches(),
        frequency_hz=frequency(),
        versions={name: found for name in VERSIONS if (found := installed(name))}
        | ({"compiler": built} if (built := compiler()) else {})
        | gpus.versions(),
    )


def caches(folder: Path = Path("/sys/devices/system/cpu/cpu0/cache")) -> dict[str, int]:
    """Bytes of the first core's caches by level (L1d, L1i, L2 ...); empty where the system does not tell."""
    found = {}
    for index in sorted(folder.glob("index*")):
        try:
            level, kind, size = ((index / name).read_text().strip() for name in ("level", "type", "size"))
            suffix = {"Data": "d", "Instruction": "i"}.get(kind, "")
            found[f"L{level}{suffix}"] = int(size.rstrip("KMG")) << {"K": 10, "M": 20, "G": 30}.get(size[-1:], 0)
        except (OSError, ValueError):
            continue
    return found


def frequency() -> float | None:
    """Hertz of the cores now, where the system tells; inside virtual machines it is often the nominal one."""
    try:
        now = psutil.cpu_freq()
    except (OSError, RuntimeError, AttributeError):
        return None
    return now.current * 1e6 if now and now.current else None


def compiler() -> str | None:
    """What the native engine was compiled with, as compilers write it into what they make."""
    try:
        spec = find_spec("paraxis._native")
        text = Path(spec.origin).read_bytes() if spec and spec.origin else b""
    except (OSError, ImportError):
        return None
    found = re.search(rb"(GCC): \([^)]*\) ([\d.]+)|(clang) version ([\d.]+)", text)
    return b" ".join(part for part in found.groups() if part).decode() if found else None


def installed(package: str) -> str | None:
    """The version of an installed package, without importing it."""
    try:
        return version(package)
    except PackageNotFoundError:
        return None


class ForeignLoad:
    """Cores that other programs keep busy: all CPU seconds spent less those of our own processes."""

    def __init__(self, pids: list[int]) -> None:
        self.processes = []
        for pid in [os.getpid(), *pids]:
            try:
                self.processes.append(psutil.Process(pid))
            except psutil.Error:
                continue
        self.before = self._now()

    def _now(self) -> tuple[float, float, float]:
        times = psutil.cpu_times()
        # guest time is counted in user already
        busy = sum(times) - times.idle - getattr(times, "iowait", 0.0) - getattr(times, "guest", 0.0)
        own = 0.0
        for process in self.processes:
            try:
                spent = process.cpu_times()
                own += spent.user + spent.system
            except psutil.Error:
                continue
        return time.monotonic(), busy, own

    def settle(self, seconds: float = 0.15) -> float:
        """Foreign cores busy over a short sleep."""
        time.sleep(seconds)
        return self.cores()

    def cores(self) -> float:
        """Foreign cores busy since the last call."""
        now, (start, busy, own) = self._now(), self.before
        self.before = now
        return max(0.0, (now[1] - busy) - (now[2] - own)) / max(now[0] - start, 1e-9)


def pinning(ranks: int, threads: int, quiet: bool) -> list[list[int]]:
    """The cores of each rank, side by side; none (no pinning) when ranks would collide, also with other programs."""
    if not hasattr(os, "sched_getaffinity"):
        return []
    cores = sorted(os.sched_getaffinity(0))
    if not quiet or ranks == 1 or ranks * threads > min(len(cores), usable_cores()):
        return []
    return [cores[r * threads : (r + 1) * threads] for r in range(ranks)]
