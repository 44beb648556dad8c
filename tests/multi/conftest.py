"""A desk: a folder from which the command is run as a user runs it, and at which every process it leaves is found."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from uuid import uuid4

import psutil
import pytest

# Who is started in the background of a shell ignores Ctrl-C, and so would all that is started from here.
signal.signal(signal.SIGINT, signal.default_int_handler)
BIN = Path(sys.executable).parent
EXAMPLES = Path(__file__).parents[2] / "examples"
PROGRESS = re.compile(r" *\d+\.\d s  \S.*")
LAUNCHERS = (
    "OMPI_",
    "PMI",
    "PMIX",
    "PRTE",
    "SLURM_",
    "MV2_",
    "TORCHELASTIC",
    "RANK",
    "WORLD_SIZE",
    "MASTER_",
    "LOCAL_RANK",
)
ROOT = {"OMPI_ALLOW_RUN_AS_ROOT": "1", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1"} if os.geteuid() == 0 else {}


@dataclass(frozen=True)
class Done:
    """A command that has ended."""

    rc: int
    out: str
    err: str
    seconds: float

    @property
    def document(self) -> Any:
        """Standard output, which must be one JSON document and nothing else."""
        return json.loads(self.out)

    def refused(self, *parts: str, rc: int = 2) -> str:
        """The one line that a failed command says, after lines of progress at most; it must hold all parts."""
        *before, line = self.err.splitlines() or [""]
        assert line.startswith("paraxis: "), self.err
        strange = [text for text in before if not PROGRESS.fullmatch(text)]
        assert not strange, self.err
        assert "Traceback" not in self.err + self.out
        for part in parts:
            assert part.lower() in line.lower(), line
        assert self.rc == rc, (self.rc, line)
        return line


@dataclass
class Running:
    """A command that runs, with its output going to files."""

    process: subprocess.Popen[bytes]
    out: Path
    err: Path
    begun: float

    def until(self, done: Callable[[], Any], limit: float = 60) -> None:
        """Wait for something to come true while the command runs."""
        end = time.monotonic() + limit
        while not done():
            assert self.process.poll() is None, f"ended with {self.process.returncode}: {self.err.read_text()}"
            assert time.monotonic() < end, f"waited {limit:g} s in vain: {self.err.read_text()}"
            time.sleep(0.02)

    def says(self, text: str, limit: float = 60) -> None:
        """Wait for a text on standard error."""
        self.until(lambda: text in self.err.read_text(), limit)

    def interrupt(self) -> None:
        """Ctrl-C: the terminal signals the whole foreground group."""
        os.killpg(self.process.pid, signal.SIGINT)

    def finish(self, limit: float = 120) -> Done:
        """Wait for its end."""
        try:
            rc = self.process.wait(limit)
        except subprocess.TimeoutExpired:
            os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()
            raise AssertionError(f"no end within {limit:g} s: {self.err.read_text()}") from None
        return Done(rc, self.out.read_text(), self.err.read_text(), time.monotonic() - self.begun)


class Desk:
    """A folder to work in, a private TMPDIR, and a mark in the environment of every process started from here."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.mark, self.count = folder, uuid4().hex, 0
        self.tmp = Path(tempfile.mkdtemp(prefix="px"))
        kept = {k: v for k, v in os.environ.items() if not k.startswith(LAUNCHERS)}
        self.env = kept | {"TMPDIR": str(self.tmp), "PARAXIS_TEST": self.mark, "COLUMNS": "200"}

    def write(self, name: str, text: str) -> Path:
        """A file on the desk."""
        path = self.folder / name
        path.write_text(text)
        return path

    def start(self, *words: object, program: tuple[object, ...] = (BIN / "paraxis",), **env: str) -> Running:
        """Begin a command in a session of its own."""
        self.count += 1
        out, err = (self.folder / f".{kind}{self.count}" for kind in ("out", "err"))
        with out.open("wb") as o, err.open("wb") as e:
            command = [str(word) for word in (*program, *words)]
            process = subprocess.Popen(
                command,
                cwd=self.folder,
                env=self.env | env,
                stdin=subprocess.DEVNULL,
                stdout=o,
                stderr=e,
                start_new_session=True,
            )
        return Running(process, out, err, time.monotonic())

    def run(self, *words: object, limit: float = 120, **env: str) -> Done:
        """A command from beginning to end, after which nothing is left of it: no process and no scratch folder."""
        done = self.start(*words, **env).finish(limit)
        self.check_tidy()
        return done

    def launch(self, *words: object, limit: float = 120, tidy: bool = True, **env: str) -> Done:
        """The same for another program, such as this environment's mpiexec; one that aborts is not `tidy`."""
        env = ROOT | {"PATH": f"{BIN}:{self.env['PATH']}"} | env
        done = self.start(*words, program=("/usr/bin/env",), **env).finish(limit)
        self.check_tidy() if tidy else self.check_gone()
        return done

    def processes(self) -> list[psutil.Process]:
        """Every living process that was started from here."""
        found = []
        for process in psutil.process_iter():
            try:
                if process.environ().get("PARAXIS_TEST") == self.mark and process.status() != psutil.STATUS_ZOMBIE:
                    found.append(process)
            except psutil.Error:
                continue
        return found

    def ranks(self, transport: str) -> list[psutil.Process]:
        """The processes that compute over a transport, in the order of their start."""
        found = []
        for process in self.processes():
            words = process.cmdline()
            if "paraxis.run.worker" in words and words[words.index("paraxis.run.worker") + 1] == transport:
                found.append(process)
        parents = {process.ppid() for process in found}  # mpiexec, and the process that Gloo's ranks are forked from
        return sorted((p for p in found if p.pid not in parents), key=lambda p: p.pid)

    def check_gone(self, within: float = 2.0) -> None:
        """No process is left of what was started, or will be soon."""
        end = time.monotonic() + within
        while (left := self.processes()) and time.monotonic() < end:
            time.sleep(0.05)
        assert not left, [process.cmdline() for process in left]

    def check_tidy(self) -> None:
        """Neither a process nor a scratch folder of ours is left."""
        self.check_gone()
        assert not list(self.tmp.glob("paraxis-*"))

    def clear(self) -> None:
        """End whatever is left, so that one failing test does not disturb the next."""
        for process in self.processes():
            process.kill()
        shutil.rmtree(self.tmp, ignore_errors=True)


@pytest.fixture
def desk(tmp_path: Path) -> Iterator[Desk]:
    """A fresh desk."""
    made = Desk(tmp_path)
    yield made
    made.clear()


@pytest.fixture(scope="module")
def shared_desk(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Desk]:
    """A desk for a run that several tests look at."""
    made = Desk(tmp_path_factory.mktemp("desk"))
    yield made
    made.clear()


@pytest.fixture(scope="session")
def examples() -> Path:
    """The folder of the shipped examples."""
    return EXAMPLES
