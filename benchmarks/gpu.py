"""What a GPU is worth, and what CUDA graphs are: samples/s by plan, paired and interleaved in one process.

    python benchmarks/gpu.py [mlp cnn resnet18 gpt:nano gpt:small bf16] [--skip gpt:small] [--rounds 10] [--seconds 0.3]
                             [--budget 420]

For each network at batch 128: PyTorch's own loop on the CPU with its default threads and on the GPU, then our engine
on the GPU, eager and with CUDA graphs. On the CPU gpt:small has a batch of 4, for its steps take seconds; samples/s are
compared all the same. `bf16` trains gpt:small in bfloat16, against a loop of plain PyTorch written here that asks for
the same kernels: autocast, the same attention, and the fused AdamW.

MFU is the share of the peak that a product of two 8192 x 8192 bfloat16 matrices reaches here. A step's work is counted
as 6 N for each byte of text, for N weights that are multiplied (all but positions; the head's are the bytes' vectors),
plus 6 L T d for attention: L layers, T bytes of context, width d, two products in the forward and four in the backward
of 2 T d each, of which a causal mask leaves half (Chowdhery et al. 2022, appendix B, count the whole).

Prints a table and ends in one JSON line; without a GPU one line, and exit code 2. A part that fails, or that the budget
does not reach, says so in its place; the others go on, and the exit code is 1.
"""

import argparse
import gc
import json
import random
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from math import ceil
from statistics import median
from typing import Any

import torch
import torch.nn.functional as F

from paraxis.measure.statistics import interval, paired
from paraxis.run.duties import Duties
from paraxis.task.gpt import shape_of
from paraxis.task.networks import build
from paraxis.task.spec import TaskSpec
from paraxis.task.task import make_task

BATCH, BATCH_ON_CPU = 128, {"gpt:small": 4}
NETWORKS = ("mlp", "cnn", "resnet18", "gpt:nano", "gpt:small")
BF16 = "bf16"
THREADS = torch.get_num_threads()  # of every contender: on a GPU they only shorten what is done before it is timed
GPU = f"device=cuda,threads={THREADS}"
PLANS = {"gpu, plain loop": f"{GPU},engine=plain", "gpu, eager": GPU, "gpu, graphs": f"{GPU},graphs=1"}
MIXED = {"eager": f"{GPU},precision=bf16", "graphs": f"{GPU},precision=bf16,graphs=1"}
SIDE = 8192  # of the matrices whose product is the peak
WARM = 6  # steps before anything is timed: graphs are recorded by then
Chunk = Callable[[int], float]  # so many steps -> seconds


@dataclass
class Contender:
    """What is timed: `chunk(steps)` gives seconds; `times` are seconds of a step by round."""

    name: str
    batch: int
    chunk: Chunk
    steps: int = 1
    times: dict[int, float] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    def calibrate(self, seconds: float) -> None:
        """Warm up, and find out how many steps take about so long."""
        self.chunk(WARM)
        took = self.chunk(2) / 2
        took = self.chunk(max(1, round(seconds / 4 / took))) / max(1, round(seconds / 4 / took))
        self.steps = max(1, round(seconds / took))

    def measure(self, number: int) -> None:
        """One round."""
        self.chunk(ceil(self.steps / 10))
        self.times[number] = self.chunk(self.steps) / self.steps

    @property
    def rate(self) -> float:
        """Samples a second, in the median round."""
        return self.batch / median(self.times.values())


@contextmanager
def planned(name: str, spec: TaskSpec, text: str) -> Iterator[Contender]:
    """A plan, set up in this process as a resident rank sets it up."""
    duties = Duties("solo")
    duties.take_task({"spec": spec.model_dump()}, b"", lambda _: None)
    duties.setup({"plan": text, "key": name, "dtype": "float32", "cpus": [], "fault": None}, b"", lambda _: None)

    def chunk(steps: int) -> float:
        request = {"key": name, "warm": 0, "steps": steps, "trace": 0}
        seconds: float = duties.measure(request, b"", lambda _: None)["seconds"]
        return seconds

    made = Contender(name, spec.batch or BATCH, chunk)
    try:
        yield made
        made.notes = duties.remarks({"key": name}, b"", lambda _: None)
    finally:
        duties.drop({"key": name}, b"", lambda _: None)


@contextmanager
def by_hand(name: str, spec: TaskSpec) -> Iterator[Contender]:
    """gpt in bfloat16 as one writes it in plain PyTorch, on the same samples; fused AdamW, gradients set to none."""
    torch.set_num_threads(THREADS)
    device = torch.device("cuda", 0)
    net = build(spec.network, spec.seed).to(device)
    optimizer = torch.optim.AdamW(net.parameters(), spec.lr, weight_decay=spec.weight_decay, fused=True)
    source, batch, at = make_task(spec, plain=True).train.on(device), spec.batch or BATCH, [0]

    def chunk(steps: int) -> float:
        torch.cuda.synchronize()
        begun = time.perf_counter()
        for _ in range(steps):
            x, y = source.share(at[0], 0, batch)
            with torch.autocast("cuda", torch.bfloat16):
                scores = net(x)
            loss = F.cross_entropy(scores.float().flatten(0, 1), y.flatten())
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
            at[0] += 1
        torch.cuda.synchronize()
        return time.perf_counter() - begun

    yield Contender(name, batch, chunk)


def contest(contenders: list[Contender], rounds: int, seconds: float) -> None:
    """Rounds in random order, a chunk of each."""
    for own in contenders:
        own.calibrate(seconds)
    for number in range(rounds):
        for own in random.Random(number).sample(contenders, len(contenders)):
            own.measure(number)


def told(own: Contender, first: Contender) -> dict[str, Any]:
    """Samples a second with their 95% interval, and how many times the first contender's they are, round by round."""
    low, high = interval([own.batch / t for t in own.times.values()])
    found = {"name": own.name, "batch": own.batch, "samples_per_second": round(own.rate, 1)}
    found |= {"interval95": [round(low, 1), round(high, 1)], "step_ms": round(1e3 * median(own.times.values()), 4)}
    ratio = paired(
        {n: t / own.batch for n, t in own.times.items()}, {n: t / first.batch for n, t in first.times.items()}
    )
    if own is not first and ratio is not None:
        found["times_the_first"] = {
            "median": round(ratio.median, 3),
            "interval95": [round(ratio.low, 3), round(ratio.high, 3)],
        }
    return found | ({"notes": own.notes} if own.notes else {})


def task(network: str, batch: int) -> TaskSpec:
    """A shipped network on its usual samples; gpt with a rate that needs no warm-up: thousands of steps must not
    diverge."""
    return TaskSpec(network=network, batch=batch, **({"lr": 1e-4} if network.startswith("gpt") else {}))


def compare(network: str, rounds: int, seconds: float) -> dict[str, Any]:
    """A network on the CPU and on the GPU; the ratio of graphs to our own eager steps is told apart."""
    spec = task(network, BATCH)
    small = spec.model_copy(update={"batch": BATCH_ON_CPU.get(network, BATCH)})
    with ExitStack() as stack:
        cpu = stack.enter_context(planned("cpu, plain loop", small, f"engine=plain,threads={THREADS}"))
        every = [cpu, *(stack.enter_context(planned(name, spec, text)) for name, text in PLANS.items())]
        contest(every, rounds, seconds)
    _, plain, eager, graphs = every
    ratio = paired(graphs.times, eager.times)
    against = paired(graphs.times, plain.times)
    assert ratio is not None and against is not None, "all took part in every round"
    rows = [told(own, cpu) for own in every]
    return {
        "contenders": rows,
        "graphs_over_eager": [round(v, 3) for v in (ratio.median, ratio.low, ratio.high)],
        "graphs_over_plain_loop": [round(v, 3) for v in (against.median, against.low, against.high)],
    }


def peak() -> float:
    """Operations a second of the product of two large bfloat16 matrices: the median of 20 rows of 10."""
    a, b = (torch.randn(SIDE, SIDE, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    out, times = torch.empty_like(a), []
    for _ in range(25):
        torch.cuda.synchronize()
        begun = time.perf_counter()
        for _ in range(10):  # in a row, so that starting them costs nothing
            torch.matmul(a, b, out=out)
        torch.cuda.synchronize()
        times.append((time.perf_counter() - begun) / 10)
    return 2 * SIDE**3 / median(times[5:])


def work(network: str) -> tuple[int, int]:
    """(operations of a training step for each byte, bytes of a sample)."""
    shape = shape_of(network.partition(":")[2])
    weights = sum(p.numel() for name, p in build(network, 0).named_parameters() if not name.startswith("wpe"))
    return 6 * weights + 6 * shape.layers * shape.context * shape.width, shape.context


def mixed(rounds: int, seconds: float, batch: int = 64) -> dict[str, Any]:
    """gpt:small in bfloat16: ours, eager and with graphs, against the loop written here; with MFU."""
    network = "gpt:small"
    spec = task(network, batch)
    with ExitStack() as stack:
        every = [stack.enter_context(by_hand("plain PyTorch", spec))]
        every += [stack.enter_context(planned(name, spec, text)) for name, text in MIXED.items()]
        contest(every, rounds, seconds)
    most, (operations, length) = peak(), work(network)
    rows = [told(own, every[0]) | {"mfu": round(own.rate * length * operations / most, 4)} for own in every]
    return {"contenders": rows, "peak_tflops": round(most / 1e12, 1), "operations_per_byte": operations}


def show(part: str, found: dict[str, Any]) -> None:
    """A table for people."""
    print(f"{part}", file=sys.stderr)
    for row in found["contenders"]:
        ratio = row.get("times_the_first", {"median": 1.0, "interval95": ["", ""]})
        low, high = row["interval95"]
        line = f"  {row['name']:16} batch {row['batch']:<4} {row['samples_per_second']:>11} samples/s  [{low}, {high}]"
        line += f"  x{ratio['median']:<8} {ratio['interval95']}" + (f"  MFU {row['mfu']:.1%}" if "mfu" in row else "")
        print(line, *row.get("notes", []), sep="\n    ", file=sys.stderr)
    if "graphs_over_eager" in found:
        for key in ("graphs_over_eager", "graphs_over_plain_loop"):
            middle, low, high = found[key]
            print(f"  {key.replace('_', ' ')}: x{middle} [{low}, {high}]", file=sys.stderr)


def main() -> int:
    """Run the chosen parts; 2 without a GPU, 1 if one of them has no figures."""
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("parts", nargs="*", metavar="PART", help=f"of {', '.join((*NETWORKS, BF16))}; default: all")
    options.add_argument("--skip", nargs="*", default=[], metavar="PART")
    options.add_argument("--rounds", type=int, default=10)
    options.add_argument("--seconds", type=float, default=0.3, help="of a chunk")
    options.add_argument("--budget", type=float, default=420, help="seconds after which no further part is begun")
    args = options.parse_args()
    if odd := {*args.parts, *args.skip} - {*NETWORKS, BF16}:
        options.error(f"no part {', '.join(sorted(odd))}; there are {', '.join((*NETWORKS, BF16))}")
    if not torch.cuda.is_available():
        print("benchmarks/gpu.py needs a CUDA device and found none", file=sys.stderr)
        return 2
    found: dict[str, Any] = {"device": torch.cuda.get_device_name(), "torch": torch.__version__}
    found |= {"cpu_threads": THREADS}
    start = time.perf_counter()
    for part in (p for p in (*NETWORKS, BF16) if p in (args.parts or (*NETWORKS, BF16)) and p not in args.skip):
        begun = time.perf_counter()
        try:
            if begun - start > args.budget:
                raise TimeoutError(f"not begun: {args.budget:g} s were spent; ask for it by name")
            own = mixed(args.rounds, args.seconds) if part == BF16 else compare(part, args.rounds, args.seconds)
            found[part] = own | {"seconds": round(time.perf_counter() - begun, 1)}
            show(part, found[part])
        except Exception as error:  # the other parts' figures are worth having
            found[part] = {"failed": f"{type(error).__name__}: {' '.join(str(error).split())[:400]}"}
            print(f"{part}\n  {found[part]['failed']}", file=sys.stderr)
        gc.collect()
        torch.cuda.empty_cache()
    print(json.dumps(found))
    return int(any("failed" in own for own in found.values() if isinstance(own, dict)))


if __name__ == "__main__":
    sys.exit(main())
