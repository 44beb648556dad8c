"""How fast this machine moves and multiplies numbers, with one core and with all usable ones at once.

    python -m paraxis.measure.speed CORES CACHE

prints one JSON line. It is a process of its own, because a BLAS settles its threads when it is loaded, and ours are one
per core with matrices of its own, so that nothing but the hardware is shared.
"""

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from threading import Barrier

import numpy as np

from paraxis.measure.records import Machine, Rate

SIDE = 512  # of the square matrices: three of them stay in a second-level cache or near it
SLICE, SLICES = 0.04, 3  # seconds a thread works on end, and how often; the best counts, for others only slow it down
LIMIT = 15.0  # seconds that it may take in all
ALONE = {f"{name}_NUM_THREADS": "1" for name in ("OPENBLAS", "OMP", "MKL", "BLIS", "VECLIB_MAXIMUM")}
HOW = {
    "memory_bytes_per_second": "copies of arrays larger than the last cache by numpy, a byte read and a byte written",
    "flops_per_second": f"float32 products of {SIDE}x{SIDE} matrices by numpy's BLAS, one a core",
}


def with_speeds(machine: Machine) -> Machine:
    """The machine with its measured rates; without them where they cannot be measured. Takes about a second."""
    cache = max(machine.caches.values(), default=1 << 25)
    words = [sys.executable, "-m", "paraxis.measure.speed", str(machine.usable_cores), str(cache)]
    try:
        done = subprocess.run(words, env=os.environ | ALONE, capture_output=True, text=True, timeout=LIMIT, check=True)
        found = json.loads(done.stdout)
    except (OSError, ValueError, subprocess.SubprocessError):
        return machine
    rates = {key: Rate(one_core=found[key][0], all_cores=found[key][1], how=how) for key, how in HOW.items()}
    return machine.model_copy(update=rates)


def rate(make: Callable[[], Callable[[], object]], amount: float, threads: int) -> float:
    """Amounts a second that so many threads do together, each with what `make` gives it; the best of a few slices."""
    barrier = Barrier(threads)

    def work(_: int) -> list[float]:
        act, found = make(), []
        act()
        for _ in range(SLICES):
            barrier.wait()
            count, start = 0, time.perf_counter()
            while (spent := time.perf_counter() - start) < SLICE:
                act()
                count += 1
            found.append(count * amount / spent)
        return found

    with ThreadPoolExecutor(threads) as pool:
        return max(sum(at_once) for at_once in zip(*pool.map(work, range(threads)), strict=True))


def copying(size: int) -> Callable[[], object]:
    """A copy of so many bytes; numpy lets go of the interpreter's lock meanwhile."""
    source, target = np.ones(size // 8), np.zeros(size // 8)
    return lambda: np.copyto(target, source)


def multiplying() -> Callable[[], object]:
    """A matrix product."""
    a, b, c = (np.full((SIDE, SIDE), 0.5, np.float32) for _ in range(3))
    return lambda: np.matmul(a, b, out=c)


def main(cores: int, cache: int) -> None:
    """Measure and print."""
    whole = min(1 << 27, max(1 << 24, 2 * cache))
    found: dict[str, list[float]] = {key: [] for key in HOW}
    for threads in (1, cores):
        size = max(1 << 23, whole // threads)
        found["memory_bytes_per_second"].append(rate(lambda size=size: copying(size), 2.0 * size, threads))  # type: ignore[misc]
        found["flops_per_second"].append(rate(multiplying, 2.0 * SIDE**3, threads))
    print(json.dumps(found))


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]))
