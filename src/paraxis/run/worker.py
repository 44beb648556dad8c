"""A resident rank: waits asleep on its line to the driver, and does what it is asked. Started by `launch`.

    python -m paraxis.run.worker TRANSPORT SOCKET TOKEN [SIZE ADDRESS]

With a size it forks that many ranks after the framework is loaded: loading it takes seconds of a core, once is enough.
"""

import os
import queue
import re
import signal
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable
from typing import Any

from paraxis.errors import OutOfMemory, ParaxisError
from paraxis.run import wire

Answer = dict[str, Any]
HEARTBEAT = 2.0  # seconds
NO_ROOM = ("CUDA error: out of memory", "CUBLAS_STATUS_ALLOC_FAILED", "CUDNN_STATUS_ALLOC_FAILED")


def main(words: list[str]) -> None:
    """Load the framework, become one rank or fork several, then serve until the driver says quit or goes away."""
    transport, path, token, *rest = words
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the driver's business; it ends us
    from paraxis.run.duties import Duties

    if rest:
        size, address = int(rest[0]), rest[1]
        rank = fork(size)
        become(transport, path, token, lambda: Duties(transport, rank, size, address))
    else:
        become(transport, path, token, lambda: Duties(transport))


def fork(size: int) -> int:
    """The rank in each child; the parent waits for all of them, says how they ended, and ends."""
    children = {}
    for rank in range(size):
        child = os.fork()
        if child == 0:
            return rank
        children[child] = rank
    while children:
        child, status = os.wait()
        rank = children.pop(child)
        if os.WIFSIGNALED(status):
            print(f"rank {rank} was killed by {signal.Signals(os.WTERMSIG(status)).name}", flush=True)
    os._exit(0)


def become(transport: str, path: str, token: str, make: Callable[[], Any]) -> None:
    """Call the driver as one rank, and serve it."""
    line = socket.socket(socket.AF_UNIX)
    line.connect(path)
    try:
        duties = make()
    except Exception as error:
        wire.send(line, {"token": token, "rank": -1, "error": _describe(error)})
        return
    wire.send(line, {"token": token, "rank": duties.rank, "pid": os.getpid()})
    serve(line, duties)


def serve(line: socket.socket, duties: Any) -> None:
    """Answer every request in turn.

    A thread reads the line, so that a vanished driver ends even a rank that hangs; another gives signs of life while
    this rank works, so that a long step is not taken for a stopped process.
    """
    inbox: queue.Queue[tuple[wire.Message, bytes]] = queue.Queue()

    def read() -> None:
        while True:
            try:
                inbox.put(wire.receive(line))
            except EOFError:
                os._exit(1)

    busy, lock = threading.Event(), threading.Lock()

    def tell(news: Answer) -> None:
        with lock:
            wire.send(line, {"news": news})

    def beat() -> None:
        while busy.wait():
            time.sleep(HEARTBEAT)
            if busy.is_set():
                tell({})

    threading.Thread(target=read, daemon=True).start()
    threading.Thread(target=beat, daemon=True).start()
    while True:
        request, blob = inbox.get()
        if request["do"] == "quit":
            wire.send(line, {"ok": True})
            sys.stdout.flush()
            os._exit(0)  # MPI's own farewell could hang on a rank that has died
        busy.set()
        answer, out = perform(duties, request, blob, tell)
        busy.clear()
        with lock:
            wire.send(line, answer, out)


def perform(duties: Any, request: wire.Message, blob: bytes, tell: Callable[[Answer], None]) -> tuple[Answer, bytes]:
    """One request's answer, or the error it ended in."""
    try:
        answer = getattr(duties, request.pop("do"))(request, blob, tell)
        if isinstance(answer, tuple):
            return {"answer": answer[0]}, answer[1]
        return {"answer": answer}, b""
    except Exception as error:
        return {"error": _describe(error)}, b""


def _describe(error: Exception) -> Answer:
    if type(error).__name__ == "OutOfMemoryError" or any(word in str(error) for word in NO_ROOM):
        error = _out_of_memory(error)
    frames = traceback.extract_tb(error.__traceback__)
    where = f" ({os.path.basename(frames[-1].filename)}:{frames[-1].lineno})" if frames else ""
    ours = isinstance(error, ParaxisError)
    text = str(error) if ours else " ".join(str(error).split())[:400]
    return {
        "step": getattr(error, "step", None),
        "type": type(error).__name__,
        "text": text if ours else f"{type(error).__name__}: {text}{where}",
        "ours": ours,
        "bytes": getattr(error, "bytes", None),
    }


def _out_of_memory(error: Exception) -> OutOfMemory:
    """PyTorch's own many lines in one."""
    text, units = str(error), {"KiB": 1 << 10, "MiB": 1 << 20, "GiB": 1 << 30}
    wanted, capacity = re.search(r"allocate ([\d.]+ \w+)", text), re.search(r"capacity of ([\d.]+) (\w+)", text)
    asked = f" when {wanted[1]} more were asked for" if wanted else ""
    there = f" of {capacity[1]} {capacity[2]}" if capacity else ""
    made = OutOfMemory(f"the GPU is out of memory{there}{asked}")
    made.bytes = int(float(capacity[1]) * units.get(capacity[2], 1)) if capacity else None
    return made


if __name__ == "__main__":
    main(sys.argv[1:])
