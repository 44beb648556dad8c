"""Is a plan as fast here as the loop one would write by hand? Paired, interleaved, against benchmarks/peers.

    python benchmarks/versus_peers.py [data|pipeline|zero|tensor|all] [--rounds 20]

Ends in one JSON line: for every case the median ratio of rates (above 1: Paraxis is faster) with its 95% interval.
"""

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path

PEERS = Path(__file__).parent / "peers"
TORCHRUN = "torchrun --standalone --nproc-per-node 2"
MPI = "mpiexec -n 2 python -m mpi4py"


def data(batch: int) -> list[str]:
    """dp=2 over MPI on `cnn` without dropout, against flat MPI and DistributedDataParallel."""
    case = f"--net cnn --batch {batch}"
    return [
        f"python paraxis_peer.py {case} --plan dp=2,comm=mpi",
        f"{MPI} mpi_flat.py {case}",
        f"{TORCHRUN} ddp.py {case}",
    ]


def pipeline(net: str) -> list[str]:
    """pp=2 with 4 microbatches over MPI and over Gloo, against torch.distributed.pipelining."""
    case = f"--net {net} --batch 128"
    return [
        f"python paraxis_peer.py {case} --plan pp=2,microbatches=4,schedule=1f1b,comm=mpi",
        f"{TORCHRUN} pipeline.py {case} --schedule 1F1B --microbatches 4",
        f"{TORCHRUN} pipeline.py {case} --schedule GPipe --microbatches 4",
        f"python paraxis_peer.py {case} --plan pp=2,microbatches=4,schedule=1f1b,comm=gloo",
    ]


def sharded(net: str) -> list[str]:
    """ZeRO-3 over MPI and over Gloo, against FSDP2, which shards the same: every layer of 400 KB or more by itself."""
    case = f"--net {net} --batch 128"
    return [
        f"python paraxis_peer.py {case} --plan dp=2,zero=3,comm=mpi",
        f"{TORCHRUN} fsdp.py {case}",
        f"python paraxis_peer.py {case} --plan dp=2,zero=3,comm=gloo",
        f"python paraxis_peer.py {case} --plan dp=2,zero=1,comm=mpi",
    ]


def tensor(batch: int) -> list[str]:
    """tp=2 over MPI and over Gloo on the wide MLP, against DTensor's column and row split of the same two layers."""
    case = f"--net wide --batch {batch}"
    return [
        f"python paraxis_peer.py {case} --plan tp=2,comm=mpi",
        f"{TORCHRUN} tensor.py {case}",
        f"python paraxis_peer.py {case} --plan tp=2,comm=gloo",
    ]


CASES = {
    "data": {f"cnn {batch}": data(batch) for batch in (32, 128, 512)},
    "pipeline": {f"{net} 128": pipeline(net) for net in ("wide", "cnn")},
    "zero": {f"{net} 128": sharded(net) for net in ("cnn", "resnet18")},
    "tensor": {"wide 128": tensor(128)},
}


def run(commands: list[str], rounds: int, seconds: float) -> list[dict[str, object]]:
    """One paired run; returns what pair.py found of every peer."""
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    words = [sys.executable, "pair.py", "--rounds", str(rounds), "--seconds", str(seconds), "--", *commands]
    done = subprocess.run(words, cwd=PEERS, env=os.environ | {"PATH": path}, stdout=subprocess.PIPE, check=True)
    found: list[dict[str, object]] = json.loads(done.stdout)["peers"]
    return found


def main() -> None:
    """Run the chosen cases and print a line each, then the JSON line."""
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("which", nargs="?", choices=[*CASES, "all"], default="all")
    options.add_argument("--rounds", type=int, default=20)
    options.add_argument("--seconds", type=float, default=0.3)
    args = options.parse_args()
    results = {}
    for group in CASES if args.which == "all" else [args.which]:
        for name, commands in CASES[group].items():
            peers = run(commands, args.rounds, args.seconds)
            results[f"{group} {name}"] = peers
            for peer in peers:
                ratio = peer.get("first_over_this", "")
                print(f"{group} {name:10} {peer['median']:>9} samples/s  {ratio}  {peer['command']}", file=sys.stderr)
    keep = ("command", "median", "first_over_this")
    print(json.dumps({case: [{k: p[k] for k in keep if k in p} for p in peers] for case, peers in results.items()}))


if __name__ == "__main__":
    main()
