"""Starts ranks, keeps them, talks to them, and never leaves one behind.

A `Pool` is one transport's resident ranks. Each holds a line (a Unix socket in a private folder) to the driver; it ends
when the driver ends, and the driver notices when it dies, raises or falls silent.
"""

import contextlib
import json
import math
import os
import re
import secrets
import selectors
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import psutil

from paraxis import errors
from paraxis.errors import MissingError, ParaxisError, RankError
from paraxis.run import wire

Request = dict[str, Any]
START_LIMIT = 180.0  # seconds for ranks to start: a cold import of the framework takes 24 s, times the oversubscription
SILENCE = 30.0  # seconds without a sign of life, which a working rank gives every two
WORD = 3.0  # seconds that a launcher has to say how a rank ended
SIGNAL = re.compile(r"SIG(?:KILL|SEGV|TERM|BUS|ABRT|ILL)|signal (\d+)")
# Where handlers of signals and launchers begin to speak, after what an aborting process says itself.
AFTER = re.compile(r"^(?:\[\S+\] \*\*\* Process received signal|-{20,}$|prterun noticed|rank \d+ was killed by)", re.M)
GRACE = 2.0  # seconds that ranks have to answer after one of them has failed


@dataclass
class Pool:
    """Resident ranks of one transport; `lines[r]` is rank r's. `patience`: seconds any request may take."""

    transport: str
    size: int
    processes: list[subprocess.Popen[bytes]]
    lines: list[socket.socket]
    pids: list[int]
    log: Path
    folder: tempfile.TemporaryDirectory[str]
    facts: dict[str, Any] = field(default_factory=dict)
    patience: float = math.inf

    def ask(
        self,
        request: Request,
        ranks: Iterable[int] = (0,),
        limit: float = SILENCE,
        blob: bytes = b"",
        news: Callable[[dict[str, Any]], None] | None = None,
    ) -> list[Any]:
        """Send a request to some ranks and collect their answers in order; `limit` is the longest silence in seconds.

        Raises the error that all of them report alike (the pool lives on); RankError, and ends the pool, when one fails
        alone, dies or falls silent.
        """
        chosen = list(ranks)
        for rank in chosen:
            try:
                wire.send(self.lines[rank], request, blob)
            except OSError:
                self._fail(rank)
        answers, failures = self._collect(chosen, limit, news)
        if failures:
            self._raise(failures, len(chosen))
        return [answers[rank] for rank in chosen]

    def _collect(
        self, chosen: list[int], limit: float, news: Callable[[dict[str, Any]], None] | None
    ) -> tuple[dict[int, Any], dict[int, dict[str, Any]]]:
        answers: dict[int, Any] = {}
        failures: dict[int, dict[str, Any]] = {}
        heard = dict.fromkeys(chosen, time.monotonic())  # of ranks that still owe an answer
        end = time.monotonic() + self.patience
        with selectors.DefaultSelector() as selector:
            for rank in chosen:
                selector.register(self.lines[rank], selectors.EVENT_READ, rank)
            while len(answers) + len(failures) < len(chosen):
                longest = GRACE if failures else limit
                silent = min(heard, key=lambda rank: heard[rank])
                wait = min(heard[silent] + longest, end) - time.monotonic()
                events = selector.select(max(0.0, min(wait, 1e6)))
                if not events and failures:
                    break
                if not events:
                    self._silent(silent, limit, time.monotonic() >= end)
                for key, _ in events:
                    message, blob = self._read(key.data)
                    if "news" in message:
                        heard[key.data] = time.monotonic() if not failures else heard[key.data]
                        if news and message["news"] and key.data == chosen[0]:
                            news(message["news"])
                        continue
                    selector.unregister(key.fileobj)
                    heard.pop(key.data)
                    if "error" in message:
                        failures[key.data] = message["error"]
                        heard = dict.fromkeys(heard, time.monotonic())
                    else:
                        answers[key.data] = (message["answer"], blob) if blob else message["answer"]
        return answers, failures

    def _read(self, rank: int) -> tuple[wire.Message, bytes]:
        try:
            return wire.receive(self.lines[rank])
        except EOFError:
            self._fail(rank)
            raise RankError("unreachable") from None

    def _raise(self, failures: dict[int, dict[str, Any]], asked: int) -> None:
        """All alike and ours: the request was at fault. Otherwise a rank is."""
        texts = {f["text"] for f in failures.values()}
        first = min(failures, key=lambda r: (not failures[r]["ours"], failures[r]["step"] or 1 << 62, r))
        if len(failures) == asked and len(texts) == 1 and failures[first]["ours"]:
            raise _again(failures[first])
        self.kill()
        if failures[first]["type"] == "OutOfMemory":
            raise _again(failures[first])
        raise RankError(f"rank {first} of {self.size} over {self.transport} failed: {failures[first]['text']}")

    def _fail(self, rank: int) -> None:
        """A line has closed: find out why, end the others, raise RankError."""
        why = self._cause(rank)
        self.kill()
        raise RankError(f"rank {rank} of {self.size} over {self.transport} {why}")

    def _cause(self, rank: int) -> str:
        process = next((p for p in self.processes if p.pid == self.pids[rank]), None)
        code = 0
        with contextlib.suppress(subprocess.TimeoutExpired):
            code = process.wait(1.0) if process else 0
        name = signal.Signals(-code).name if code < 0 else self._told(process)
        if not name:
            return "died without a word (out of memory?)"
        why = last_words(self.log.read_text(errors="replace")) if name == "SIGABRT" else ""
        return f"was killed by {name}" + (f": {why}" if why else "")

    def _told(self, process: subprocess.Popen[bytes] | None) -> str:
        """The signal that a launcher says has ended a rank."""
        end = time.monotonic() + (0 if process else WORD)
        while True:
            over = time.monotonic() >= end or all(p.poll() is not None for p in self.processes)
            found = SIGNAL.search(self.log.read_text(errors="replace"))
            if found or over:
                break
            time.sleep(0.05)
        return signal.Signals(int(found[1])).name if found and found[1] else found[0] if found else ""

    def _silent(self, rank: int, limit: float, late: bool) -> None:
        try:
            state = psutil.Process(self.pids[rank]).status()
        except psutil.Error:
            state = "gone"
        self.kill()
        if late:
            raise RankError(f"{self.size} ranks over {self.transport} did not finish in {self.patience:.0f} s")
        hint = "; it is stopped (SIGSTOP): continue it with kill -CONT, or start again" if state == "stopped" else ""
        raise RankError(f"rank {rank} of {self.size} over {self.transport} gave no sign for {limit:.0f} s{hint}")

    def alive(self) -> bool:
        """Whether it can be asked."""
        return bool(self.lines)

    def close(self) -> None:
        """Let the ranks go; kill those that do not."""
        for line in self.lines:
            try:
                wire.send(line, {"do": "quit"})
            except OSError:
                continue
        end = time.monotonic() + 1.0
        for process in self.processes:
            try:
                process.wait(max(0.05, end - time.monotonic()))
            except subprocess.TimeoutExpired:
                break
        self.kill()

    def kill(self) -> None:
        """End every process of this pool now."""
        family = _family(self.processes, self.pids)
        for process in family:
            _kill(process)
        for line in self.lines:
            line.close()
        self.lines = []
        psutil.wait_procs(family, timeout=2)
        self.folder.cleanup()


def last_words(log: str) -> str:
    """Why a process aborts, as it says itself: Python, the C library and the C++ runtime print that before they do."""
    fatal = re.search(r"Fatal Python error: .*", log)
    return fatal[0] if fatal else " ".join(AFTER.split(log)[0].split())[-200:]


def _family(processes: list[subprocess.Popen[bytes]], pids: list[int]) -> list[psutil.Process]:
    """The started processes, all that they have started, and the ranks themselves."""
    family: dict[int, psutil.Process] = {}
    for pid in [p.pid for p in processes] + pids:
        try:
            process = psutil.Process(pid)
            if pid in pids or process.ppid() == os.getpid():
                family |= {p.pid: p for p in [process, *process.children(recursive=True)]}
        except psutil.Error:
            continue
    return list(family.values())


def _kill(process: psutil.Process) -> None:
    try:
        process.kill()
    except psutil.Error:
        return


def start(transport: str, size: int, oversubscribed: bool = False) -> "Starting":
    """Begin to start `size` ranks over mpi, gloo or nccl, or one rank alone (`solo`); raises MissingError."""
    commands = _commands(transport, size)
    folder = tempfile.TemporaryDirectory(prefix="paraxis-")
    server = socket.socket(socket.AF_UNIX)
    try:
        server.bind(f"{folder.name}/line")
    except OSError as error:  # such as a path of more than 107 bytes
        server.close()
        folder.cleanup()
        raise MissingError(
            f"TMPDIR={tempfile.gettempdir()}: no socket can be made there ({error}); set it to a short local folder "
            "such as /tmp"
        ) from None
    server.listen(size)
    token, log = secrets.token_hex(16), Path(folder.name) / "log"
    words = [transport, f"{folder.name}/line", token, *commands[1]]
    env = os.environ | _environment(transport, oversubscribed)
    with log.open("wb") as out:
        process = subprocess.Popen(
            [*commands[0], "-m", "paraxis.run.worker", *words],
            env=env,
            stdin=subprocess.DEVNULL,
            stdout=out,
            stderr=out,
            start_new_session=True,
        )
    return Starting(transport, size, [process], server, token, log, folder)


@dataclass
class Starting:
    """Ranks on their way up."""

    transport: str
    size: int
    processes: list[subprocess.Popen[bytes]]
    server: socket.socket
    token: str
    log: Path
    folder: tempfile.TemporaryDirectory[str]

    def join(self) -> Pool:
        """Wait until every rank has called; raises RankError with what they printed if they do not."""
        lines: dict[int, tuple[socket.socket, int]] = {}
        deadline = time.monotonic() + START_LIMIT
        self.server.settimeout(0.2)
        try:
            while len(lines) < self.size:
                try:
                    line, _ = self.server.accept()
                except TimeoutError:
                    self._check(deadline)
                    continue
                line.settimeout(None)
                hello, _ = wire.receive(line)
                if hello.get("token") != self.token:
                    line.close()
                elif "error" in hello:
                    _cannot_start(self.transport, hello["error"])
                else:
                    lines[hello["rank"]] = line, hello["pid"]
        except BaseException:
            self.kill([pid for _, pid in lines.values()])
            raise
        finally:
            self.server.close()
        ordered = [lines[rank] for rank in range(self.size)]
        pids = [pid for _, pid in ordered]
        pool = Pool(self.transport, self.size, self.processes, [x for x, _ in ordered], pids, self.log, self.folder)
        pool.facts = pool.ask({"do": "hello"})[0]
        return pool

    def kill(self, pids: Iterable[int] = ()) -> None:
        """End what has been started."""
        self.server.close()
        Pool(self.transport, 0, self.processes, [], list(pids), self.log, self.folder).kill()

    def _check(self, deadline: float) -> None:
        ended = [p for p in self.processes if p.poll() is not None]
        if ended or time.monotonic() > deadline:
            text = " ".join(self.log.read_text(errors="replace").split())[-300:]
            why = f"ended with exit code {ended[0].returncode}" if ended else f"did not start in {START_LIMIT:.0f} s"
            raise RankError(f"ranks over {self.transport} {why}: {text or 'they printed nothing'}")


def _again(failure: dict[str, Any]) -> ParaxisError:
    """The error that a rank has told of."""
    kind = getattr(errors, failure["type"], ParaxisError)
    error: ParaxisError = kind(failure["text"])
    if isinstance(error, errors.OutOfMemory):
        error.bytes = failure.get("bytes")
    return error


def _cannot_start(transport: str, error: dict[str, Any]) -> None:
    """Raises what a rank has said instead of its name: our own words as they are."""
    if error["ours"]:
        raise _again(error)
    raise RankError(f"a rank over {transport} could not start: {error['text']}")


def _commands(transport: str, size: int) -> tuple[list[str], list[str]]:
    """(how Python is started, the words behind the worker's own)."""
    if transport == "mpi":
        return [*mpiexec(), "-n", str(size), *_mpi_options(), sys.executable, "-m", "mpi4py"], []
    if transport == "solo":
        return [sys.executable], []
    with socket.create_server(("127.0.0.1", 0)) as probe:
        return [sys.executable], [str(size), f"tcp://127.0.0.1:{probe.getsockname()[1]}"]


def _environment(transport: str, oversubscribed: bool) -> dict[str, str]:
    env = {"PYTHONUNBUFFERED": "1"}
    if transport in ("gloo", "nccl"):
        env["GLOO_SOCKET_IFNAME"] = os.environ.get("GLOO_SOCKET_IFNAME", "lo")
    if transport == "mpi" and os.geteuid() == 0:
        env |= {"OMPI_ALLOW_RUN_AS_ROOT": "1", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1"}
    if transport == "mpi" and oversubscribed:
        env["OMPI_MCA_mpi_yield_when_idle"] = "1"
    return env


def mpiexec() -> list[str]:
    """The launcher that belongs to this environment's MPI, else the site's; raises MissingError."""
    if find_spec("mpi4py") is None:
        raise MissingError(
            "MPI is missing: pip install 'paraxis[mpi]', or mpi4py for this site's own; comm=gloo needs neither"
        )
    beside = Path(sys.executable).parent / "mpiexec"
    found = str(beside) if beside.exists() else shutil.which("mpiexec")
    if not found:
        raise MissingError("mpiexec is missing: pip install 'paraxis[mpi]' brings one; comm=gloo needs none")
    return [found]


def _mpi_options() -> list[str]:
    """Open MPI must be told that ranks may outnumber cores and that we pin them ourselves."""
    version = subprocess.run([*mpiexec(), "--version"], capture_output=True, text=True, check=False)
    ours = "Open MPI" in version.stdout or "PRRTE" in version.stdout or "OpenRTE" in version.stdout
    return ["--oversubscribe", "--bind-to", "none"] if ours else []


def task_request(spec: Any) -> Request:
    """The request that hands a task over."""
    return {"do": "take_task", "spec": json.loads(spec.model_dump_json())}
