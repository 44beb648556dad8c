"""The native engine against what one would write by hand, paired and interleaved, and beside this machine's FMA peak.

    python benchmarks/native.py [case ...] [--rounds 20] [--seconds 0.3] [--jax PYTHON]

A case is a network (mlp, cnn, wide, resnet18), a network with a batch (cnn:128), or one of
    scaling   1 -> 2 threads, next to that of a loop of multiply-adds
    crowd     what is left beside another process that spins on one core; 8 ranks on the cores of 2
    agree     whether we and PyTorch reach the same parameters from equal starts on equal batches
Without a case: all networks. Ends in one JSON line. Ratios are medians of rates in the same round (above 1: ours is
faster) with a bootstrap 95% interval; with two threads ours is the faster of dp=2 with private and owner gradients, as
an exploration would choose. Eager batch norm sees the whole batch, that of dp=2 (as DDP's) each rank's half.
"""

import argparse
import json
import os
import random
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from statistics import median
from typing import Any

PEERS = Path(__file__).resolve().parent / "peers"
sys.path.insert(0, str(PEERS))

import pair  # noqa: E402  (the harness is a script among the peers)
from fma import compiler  # noqa: E402

NETS = {"mlp": (32, 128, 512), "cnn": (32, 128, 512), "wide": (32, 128, 512), "resnet18": (32, 128)}
SCALING = [("cnn", 32), ("cnn", 128), ("cnn", 512), ("wide", 512)]
CROWD = [("cnn", 128), ("cnn", 512), ("mlp", 128)]
MODES = ("scaling", "crowd", "agree")
STEPS = 30  # of `agree`
Result = dict[str, Any]


@dataclass(frozen=True)
class Candidate:
    """A peer to be started, or why it cannot be."""

    name: str
    command: str
    missing: str = ""


def ours(net: str, batch: int, ranks: int, more: str = "") -> Candidate:
    """Paraxis with threads as ranks."""
    plan = f"dp={ranks},engine=native{more}" if ranks > 1 else "engine=native"
    return Candidate(f"paraxis {plan}", f"python paraxis_peer.py --net {net} --batch {batch} --plan {plan}")


def eager(net: str, batch: int, threads: int) -> Candidate:
    """PyTorch as it comes."""
    return Candidate(f"eager, {threads} threads", f"python eager.py --net {net} --batch {batch} --threads {threads}")


def fma(threads: int) -> Candidate:
    """The peak; its rate is in MFLOP/s."""
    missing = "" if compiler() else "there is no C++ compiler"
    return Candidate(f"fma, {threads} threads", f"python fma.py --threads {threads}", missing)


def opponents(net: str, batch: int, threads: int, jax: str) -> list[Candidate]:
    """All loops written by hand that train this network on that many cores."""
    found, case = [eager(net, batch, threads)], f"--net {net} --batch {batch}"
    if threads == 1:
        return found
    no_jax = "" if jax or find_spec("jax") else "jax is not installed (--jax names a Python that has it)"
    no_mpi = "" if shutil.which("mpiexec") and find_spec("mpi4py") else "there is no mpiexec with mpi4py"
    return [
        *found,
        Candidate(
            f"compiled, {threads} threads",
            f"python compiled.py {case} --threads {threads}",
            "" if compiler() else "torch.compile needs a C++ compiler and there is none",
        ),
        Candidate("ddp", f"torchrun --standalone --nproc-per-node {threads} ddp.py {case}"),
        Candidate("mpi_flat", f"mpiexec -n {threads} python -m mpi4py mpi_flat.py {case}", no_mpi),
        Candidate(
            f"jax_scan, {threads} threads",
            f"{jax or 'python'} jax_scan.py {case} --threads {threads}",
            no_jax or ("" if net in ("mlp", "wide") else "it has MLPs only"),
        ),
    ]


def flops(net: str) -> int:
    """Operations a sample: 2 for every multiply-add of forward, weight gradient and input gradient.

    The first layer has no input gradient, and only taps inside the image count.
    """
    import torch

    from nets import make

    counts: list[int] = []

    def taps(size: int, out: int, kernel: int, stride: int, padding: int) -> int:
        places = (o * stride - padding + k for o in range(out) for k in range(kernel))
        return sum(0 <= place < size for place in places)

    def note(layer: Any, inputs: Any, output: Any) -> None:
        if isinstance(layer, torch.nn.Linear):
            counts.append(layer.in_features * layer.out_features)
        elif isinstance(layer, torch.nn.Conv2d):
            numbers = zip(
                inputs[0].shape[2:], output.shape[2:], layer.kernel_size, layer.stride, layer.padding, strict=True
            )
            height, width = (taps(*axis) for axis in numbers)
            counts.append(layer.in_channels * layer.out_channels * height * width)

    model = make(net).eval()
    for layer in model.modules():
        layer.register_forward_hook(note)
    with torch.no_grad():
        model(torch.zeros(1, 1, 28, 28))
    return 2 * (3 * sum(counts) - counts[0])


@contextmanager
def started(candidates: Sequence[Candidate], seconds: float) -> Iterator[tuple[dict[str, pair.Peer], dict[str, str]]]:
    """(the peers that run, calibrated for chunks of some seconds; why the others do not)."""
    peers, missing = {}, {c.name: c.missing for c in candidates if c.missing}
    with ExitStack() as stack:
        for candidate in candidates:
            if candidate.missing:
                continue
            try:
                peer = stack.enter_context(pair.Peer(candidate.command))
                if seconds:
                    peer.calibrate(seconds)
                peers[candidate.name] = peer
            except SystemExit as error:
                missing[candidate.name] = f"{error} (its messages are above)"
        for name, why in missing.items():
            say(f"    {name:28} not run: {why}")
        yield peers, missing


def rounds_of(candidates: Sequence[Candidate], rounds: int, seconds: float) -> tuple[dict[str, pair.Peer], Result]:
    """Every candidate once a round, in random order."""
    with started(candidates, seconds) as (peers, missing):
        for _ in range(rounds):
            for peer in random.sample(list(peers.values()), len(peers)):
                peer.measure()
    return peers, dict(missing)


def ratio(above: Sequence[float], below: Sequence[float]) -> Result:
    """Median and 95% interval of a ratio of rates, round by round."""
    values = [a / b for a, b in zip(above, below, strict=True)]
    return {"median": round(median(values), 4), "interval95": pair.interval(values)}


def shown(value: Result | None) -> str:
    """The ratio as it stands in a line."""
    return "{} [{}-{}]".format(value["median"], *value["interval95"]) if value else ""


def say(line: str) -> None:
    """To people; the JSON line goes to the other stream."""
    print(line, file=sys.stderr, flush=True)


def versus(net: str, batch: int, args: argparse.Namespace) -> Result:
    """One network and batch against every opponent, with 1 and with 2 threads."""
    each, found = flops(net), {}
    for threads in (1, 2):
        plans = [ours(net, batch, threads, more) for more in ("", ",gradients=owner")[:threads]]
        peak, others = fma(threads), opponents(net, batch, threads, args.jax)
        say(f"{net} {batch}, threads={threads}: {each / 1e6:.3f} MFLOP a sample")
        peers, missing = rounds_of([*plans, *others, peak], args.rounds, args.seconds)
        if any(plan.name not in peers for plan in plans):
            raise SystemExit(f"{plans[0].name} does not run")
        top = peers.pop(peak.name, None)
        first = max((peers[plan.name] for plan in plans), key=lambda peer: median(peer.rates))
        rows = [row(name, peer, first, top, each) for name, peer in peers.items()]
        found[f"threads={threads}"] = {
            "rows": rows,
            "not_run": missing,
            "fma_gflops": round(median(top.rates) / 1000, 1) if top else None,
        }
    return {f"{net} {batch}": found | {"mflop_per_sample": each / 1e6}}


def row(name: str, peer: pair.Peer, first: pair.Peer, peak: pair.Peer | None, each: int) -> Result:
    """What a line says of one peer."""
    share = ratio([each * rate / 1e6 for rate in peer.rates], peak.rates) if peak else None
    versus = ratio(first.rates, peer.rates) if peer is not first else None
    found = {"peer": name, "samples_per_second": median(peer.rates), "share_of_fma": share, "ours_over_this": versus}
    percent = f"{share['median']:6.1%} of FMA" if share else ""
    say(f"    {name:28} {median(peer.rates):>10.0f}/s {percent}  {shown(versus)}")
    return found | {"foreign_cpus": median(peer.foreign)}


def scaling(args: argparse.Namespace) -> Result:
    """What the second thread gives us, and what it gives a loop that shares nothing."""
    found = {}
    for net, batch in SCALING:
        names = [ours(net, batch, 1), ours(net, batch, 2), fma(1), fma(2)]
        peers, missing = rounds_of(names, args.rounds, args.seconds)
        one, two, loop_one, loop_two = (peers[c.name].rates if c.name in peers else None for c in names)
        if not one or not two:
            raise SystemExit(f"scaling {net} {batch}: {missing}")
        result: Result = {"ours": ratio(two, one), "fma": None, "ours_of_fma": None, "not_run": missing}
        if loop_one and loop_two:
            result["fma"] = ratio(loop_two, loop_one)
            gains = ([b / a for a, b in zip(*both, strict=True)] for both in ((one, two), (loop_one, loop_two)))
            result["ours_of_fma"] = ratio(*gains)
        found[f"scaling {net} {batch}"] = result
        shares = f"fma {shown(result['fma'])}, ours/fma {shown(result['ours_of_fma'])}"
        say(f"scaling {net} {batch}: 1 -> 2 threads {shown(result['ours'])}, {shares}")
    return found


@contextmanager
def spinner() -> Iterator[subprocess.Popen[bytes]]:
    """A process that spins on the last core whenever it is not stopped; it starts stopped."""
    process = subprocess.Popen([sys.executable, "-c", "while True: pass"])
    try:
        os.sched_setaffinity(process.pid, {max(os.sched_getaffinity(0))})
        process.send_signal(signal.SIGSTOP)
        yield process
    finally:
        process.kill()
        process.wait()


def windows(peers: Mapping[str, pair.Peer], rounds: int) -> dict[str, tuple[list[float], list[float]]]:
    """(rates alone, rates beside the spinner) of every peer; all windows of a round in random order."""
    rates: dict[str, tuple[list[float], list[float]]] = {name: ([], []) for name in peers}
    todo = [(name, crowded) for name in peers for crowded in (False, True)]
    with spinner() as process:
        for _ in range(rounds):
            for name, crowded in random.sample(todo, len(todo)):
                if crowded:
                    process.send_signal(signal.SIGCONT)
                peers[name].measure()
                process.send_signal(signal.SIGSTOP)
                rates[name][crowded].append(peers[name].rates[-1])
    return rates


def crowd(args: argparse.Namespace) -> Result:
    """Ours and eager with and without a spinning neighbour, in windows of half a second or more."""
    seconds, rounds, found = max(0.5, args.seconds), max(4, args.rounds), {}
    for net, batch in CROWD:
        names = [ours(net, batch, 2), eager(net, batch, 2)]
        with started(names, seconds) as (peers, missing):
            if missing:
                raise SystemExit(f"crowd {net} {batch}: {missing}")
            rates = windows(peers, rounds)
        result = {}
        for name, (alone, crowded) in rates.items():
            kept = ratio(crowded, alone)
            result[name] = {"alone": median(alone), "crowded": median(crowded), "kept": kept}
            say(f"crowd {net} {batch} {name:28} {median(alone):.0f} -> {median(crowded):.0f}/s, kept {shown(kept)}")
        first, second = (rates[c.name] for c in names)
        result["ours_over_eager_crowded"] = ratio(first[1], second[1])
        say(f"crowd {net} {batch} ours/eager in the crowd {shown(result['ours_over_eager_crowded'])}")
        found[f"crowd {net} {batch}"] = result
    return found | {"ranks cnn 128": many(args)}


def many(args: argparse.Namespace) -> Result:
    """8 threads where 2 have their cores, of ours and of eager."""
    pairs = {kind.__name__: (kind("cnn", 128, 8), kind("cnn", 128, 2)) for kind in (ours, eager)}
    peers, missing = rounds_of([c for both in pairs.values() for c in both], args.rounds, args.seconds)
    found: Result = {"not_run": missing}
    for kind, both in pairs.items():
        if not missing:
            found[kind] = ratio(*(peers[c.name].rates for c in both))
            say(f"cnn 128 {kind}: 8 threads over 2 {shown(found[kind])}")
    return found


def agree(args: argparse.Namespace) -> Result:
    """The sum of squares of all parameters after the same steps from the same start."""
    found = {}
    for net in ("mlp", "cnn", "wide"):
        plans = [ours(net, 128, ranks) for ranks in (1, 2)]
        names = [eager(net, 128, 1), *(Candidate(c.name, f"{c.command} --alike") for c in plans)]
        with started(names, 0) as (peers, missing):
            if missing:
                raise SystemExit(f"agree {net}: {missing}")
            before = {name: float(peer.ask("params")) for name, peer in peers.items()}
            for peer in peers.values():
                peer.ask(f"warm {STEPS}")
            after = {name: float(peer.ask("params")) for name, peer in peers.items()}
        wanted, change = after[names[0].name], abs(after[names[0].name] - before[names[0].name])
        for name in (c.name for c in plans):
            off, start = abs(after[name] - wanted), abs(before[name] - before[names[0].name])
            found[f"agree {net} {name}"] = {"start": start / wanted, "end": off / wanted, "of_change": off / change}
            say(f"agree {net} {name}: off by {off / wanted:.1e} of the sum, {off / change:.1e} of its change")
    return found


def cases_of(words: Sequence[str]) -> list[tuple[str, int]]:
    """(network, batch) of every word that is no mode."""
    found = []
    for word in words:
        net, _, batch = word.partition(":")
        if net not in NETS or not (batch.isdecimal() or not batch):
            raise SystemExit(f"case {word!r} is not one of {', '.join((*NETS, *MODES))}, or such as cnn:128")
        found += [(net, int(batch))] if batch else [(net, size) for size in NETS[net]]
    return found


def main() -> None:
    """Run the chosen cases and print a line a row, then the JSON line."""
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("case", nargs="*", help="default: all networks")
    options.add_argument("--rounds", type=int, default=20)
    options.add_argument("--seconds", type=float, default=0.3, help="length of a chunk")
    options.add_argument("--jax", default="", metavar="PYTHON", help="an interpreter that has jax")
    args = options.parse_args()
    chosen = args.case or list(NETS)
    cases = cases_of([word for word in chosen if word not in MODES])
    os.environ["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    os.chdir(PEERS)
    todo: dict[str, Callable[[], Result]] = {
        f"{net} {batch}": partial(versus, net, batch, args) for net, batch in cases
    }
    modes = {"scaling": scaling, "crowd": crowd, "agree": agree}
    todo |= {mode: partial(modes[mode], args) for mode in MODES if mode in chosen}
    results: Result = {}
    for name, run in todo.items():
        try:
            results |= run()
        except SystemExit as error:  # a peer that dies takes only its own case with it
            results[name] = {"failed": str(error)}
            say(f"{name}: FAILED: {error}")
    print(json.dumps({"rounds": args.rounds, "seconds": args.seconds, "results": results}))


if __name__ == "__main__":
    main()
