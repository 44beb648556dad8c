"""No training: how many multiply-adds this machine does. "samples/s" are millions of operations a second (MFLOP/s).

Every thread adds into its own registers, so that neither memory nor the other threads hold it up.
"""

import ctypes
import os
import shlex
import shutil
import subprocess
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from common import parser
from control import serve

SOURCE = r"""
#if defined(__AVX512F__)
#define BYTES 64
#elif defined(__AVX__)
#define BYTES 32
#else
#define BYTES 16
#endif
#define CHAINS 12  /* more than latency times units, and all of them fit in registers */
typedef float V __attribute__((vector_size(BYTES)));
extern "C" int per_turn() { return CHAINS * BYTES / 4 * 2; }
extern "C" float spin(long turns, float seed) {
    V a[CHAINS], by = {}, plus = {}, all = {};
    by += 0.999f, plus += 0.001f * seed;
    for (int k = 0; k < CHAINS; ++k) a[k] = plus + float(k);
    for (long n = 0; n < turns; ++n) {
#pragma GCC unroll 12
        for (int k = 0; k < CHAINS; ++k) a[k] = a[k] * by + plus;
    }
    for (int k = 0; k < CHAINS; ++k) all += a[k];
    return all[0];
}
"""
FLAGS = ("-O3", "-march=native", "-ffp-contract=fast", "-shared", "-fPIC", "-x", "c++")
STEP = 10_000_000  # operations of a thread in a step, some 0.1 ms


def compiler() -> list[str]:
    """The C++ compiler's words; none if there is none."""
    given = shlex.split(os.environ.get("CXX", ""))
    found = next((name for name in ("c++", "g++", "clang++") if shutil.which(name)), None)
    return given or ([found] if found else [])


def build() -> ctypes.CDLL:
    """The loop, compiled for this very processor and loaded; its file is not kept."""
    words = compiler()
    if not words:
        raise SystemExit("fma.py needs a C++ compiler (g++ or clang++) and found none")
    with tempfile.TemporaryDirectory() as folder:
        source, library = Path(folder, "fma.cpp"), Path(folder, "fma.so")
        source.write_text(SOURCE)
        done = subprocess.run([*words, *FLAGS, str(source), "-o", str(library)], stderr=subprocess.PIPE, text=True)
        if done.returncode:
            first = (done.stderr.splitlines() or ["no message"])[0]
            raise SystemExit(f"fma.py could not be compiled by {words[0]}: {first}")
        loaded = ctypes.CDLL(str(library))
    loaded.spin.argtypes, loaded.spin.restype = [ctypes.c_long, ctypes.c_float], ctypes.c_float
    return loaded


def main() -> None:
    """Multiply and add on --threads threads; --net and --batch mean nothing here."""
    args = parser(__doc__).parse_args()
    library = build()
    turns = STEP // library.per_turn()
    args.net, args.batch = "fma", args.threads * turns * library.per_turn() / 1e6
    threads = ThreadPoolExecutor(args.threads)  # ctypes lets go of the interpreter's lock meanwhile

    def run(steps: int) -> None:
        list(threads.map(lambda seed: library.spin(turns * steps, seed), [1.0] * args.threads))

    serve(args, run, lambda: 0.0)


if __name__ == "__main__":
    main()
