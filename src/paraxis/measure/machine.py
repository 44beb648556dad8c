"""Facts about this machine: usable cores, who else keeps them busy, what is installed."""

import os
import platform
import time
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import psutil

from paraxis.measure.records import Machine


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
    )


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
