"""Ranks that somebody else has started (mpiexec, torchrun, Slurm): rank 0 drives, all of them work.

Requests travel over the transport itself; between them every rank but the driver sleeps.
"""

import json
import os
import signal
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass, field
from importlib import import_module
from typing import Any

from paraxis import errors
from paraxis.errors import MissingError, ParaxisError

LAUNCHED_BY = {
    "OMPI_COMM_WORLD_SIZE": ("mpi", "mpiexec"),
    "PMI_SIZE": ("mpi", "mpiexec"),
    "MV2_COMM_WORLD_SIZE": ("mpi", "mpiexec"),
    "TORCHELASTIC_RUN_ID": ("gloo", "torchrun"),
    "SLURM_NTASKS": ("mpi", "srun"),
}
RANK_IN = ("OMPI_COMM_WORLD_RANK", "PMI_RANK", "MV2_COMM_WORLD_RANK", "RANK", "SLURM_PROCID")


def launched(env: Mapping[str, str]) -> tuple[str, str, int]:
    """(transport, launcher, ranks) if a launcher has started us among several, else ("", "", 1)."""
    for variable, (transport, launcher) in LAUNCHED_BY.items():
        if variable not in env or (variable == "SLURM_NTASKS" and "SLURM_PROCID" not in env):
            continue
        size = env.get("WORLD_SIZE", "1") if launcher == "torchrun" else env[variable]
        if size.isdecimal() and int(size) > 1:
            return transport, launcher, int(size)
    return "", "", 1


def let_the_first_speak(env: Mapping[str, str]) -> None:
    """Before an error is said: ranks that fail alike say it once. Returns on rank 0, and elsewhere if it is still there
    after a while in which launchers end what is left of a world whose first rank has failed."""
    if launched(env)[2] > 1 and any(env.get(name, "0") != "0" for name in RANK_IN):
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        time.sleep(1.0)


@dataclass
class JoinedPool:
    """The pool that rank 0 sees; the other ranks serve it with `serve`."""

    transport: str
    duties: Any
    facts: dict[str, Any] = field(default_factory=dict)

    @property
    def size(self) -> int:
        """Number of ranks."""
        return int(self.duties.world.size)

    @property
    def pids(self) -> list[int]:
        """This process; those of other ranks may be on other machines."""
        return [os.getpid()]

    def alive(self) -> bool:
        """As long as this process."""
        return True

    def ask(
        self,
        request: dict[str, Any],
        ranks: Iterable[int] = (0,),
        limit: float = 0.0,
        blob: bytes = b"",
        news: Callable[[dict[str, Any]], None] | None = None,
    ) -> list[Any]:
        """As `Pool.ask`; rank 0 does its own part meanwhile."""
        if blob:
            raise errors.TaskError("live objects cannot travel to other hosts; put the network into a file")
        chosen = list(ranks)
        line = json.dumps(request | {"ranks": chosen}).encode()
        _share(self.duties, line)
        answer = _perform(self.duties, request | {"ranks": chosen}, news)
        answers = [json.loads(text) for text in _gather(self.duties, json.dumps(answer).encode())]
        failed = [a["error"] for a in answers if a and "error" in a]
        if failed:
            first = min(failed, key=lambda error: error["step"] or 1 << 62)  # later steps suffer from it
            raise getattr(errors, first["type"], ParaxisError)(first["text"])
        return [answers[rank]["answer"] for rank in chosen]

    def close(self) -> None:
        """Let the others go."""
        _share(self.duties, b'{"do": "quit", "ranks": []}')

    def kill(self) -> None:
        """End all ranks."""
        if self.transport == "mpi":
            sys.stderr.flush()
            self.duties.world.comm.Abort(1)
        os._exit(1)


@contextmanager
def joined_ranks() -> Iterator[JoinedPool | None]:
    """The ranks that a launcher has started, or None; those but the first serve, and end here.

    What a user's file prints meanwhile goes to standard error: standard output is for our document.
    """
    transport, launcher, size = launched(os.environ)
    if size == 1:
        yield None
        return
    with redirect_stdout(sys.stderr):
        pool = join(transport, launcher, size)
        if pool is None:
            raise SystemExit(0)
        try:
            yield pool
        except ParaxisError:
            pool.close()
            raise
        except BaseException as error:
            if isinstance(error, KeyboardInterrupt):
                print("paraxis: interrupted")
            pool.kill()
            raise
        pool.close()


def join(transport: str, launcher: str, size: int) -> JoinedPool | None:
    """Join the world: the pool on rank 0, None on the others after they have served. Raises MissingError for N
    singletons in place of one world of N."""
    from paraxis.run.duties import Duties

    env = os.environ
    rank = int(env["RANK"]) if transport == "gloo" else 0
    duties = Duties(transport, rank, size, "env://")
    if duties.world.size != size:
        raise MissingError(
            f"{launcher} started {size} processes, but each is alone in its MPI world: mpiexec and mpi4py belong to "
            "different MPI libraries; use the mpiexec of the MPI that mpi4py was built with (paraxis doctor shows it)"
        )
    if duties.rank == 0:
        pool = JoinedPool(transport, duties)
        pool.facts = pool.ask({"do": "hello"})[0]
        return pool
    _serve(duties)
    return None


def _serve(duties: Any) -> None:
    while True:
        request = json.loads(_share(duties, None))
        if request["do"] == "quit":
            return
        answer = _perform(duties, request, None)
        _gather(duties, json.dumps(answer).encode())


def _perform(duties: Any, request: dict[str, Any], news: Callable[[dict[str, Any]], None] | None) -> dict[str, Any]:
    """This rank's answer; an error in the middle of work ends all ranks, because the others may wait for this one."""
    from paraxis.run.worker import perform

    if duties.rank not in request["ranks"]:
        return {}
    words = {key: value for key, value in request.items() if key != "ranks"}
    answer, _ = perform(duties, words, b"", news or (lambda _: None))
    if "error" in answer and (not answer["error"]["ours"] or answer["error"]["type"] == "OutOfMemory"):
        # In one piece, and a moment before the abort: a launcher drops, or mixes with its own words, what comes later.
        sys.stderr.write(f"paraxis: rank {duties.rank}: {answer['error']['text']}\n")
        sys.stderr.flush()
        time.sleep(0.3)
        JoinedPool(duties.transport, duties).kill()
    return answer


def _share(duties: Any, line: bytes | None) -> bytes:
    return _lines(duties).share_line(duties.world, line)


def _gather(duties: Any, line: bytes) -> list[bytes]:
    return _lines(duties).gather_lines(duties.world, line)


def _lines(duties: Any) -> Any:
    """The transport's module."""
    return import_module("paraxis.comm.mpi" if duties.transport == "mpi" else "paraxis.comm.torch_dist")
