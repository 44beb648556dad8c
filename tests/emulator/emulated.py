"""`torch.cuda` for the device of emulator.cpp: what paraxis asks of it, in a process that has loaded the library."""

import ctypes
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from time import perf_counter
from types import SimpleNamespace
from typing import Any

LIBRARY, GPUS = "PARAXIS_EMULATOR", "PARAXIS_EMULATED_GPUS"  # in the environment: a path, how many (one)
BYTES, CUDA, NAME = 4 << 30, "13.0", "emulated GPU"
RESULTS = {"allocated": ctypes.c_size_t, "peak": ctypes.c_size_t, "wait": ctypes.c_char_p, "replay": ctypes.c_char_p}
POINTERS = {"replay": [ctypes.c_void_p], "forget": [ctypes.c_void_p], "begin": [ctypes.c_int64]}


def visible() -> int:
    """How many of the GPUs this process sees."""
    hidden, count = os.environ.get("CUDA_VISIBLE_DEVICES"), int(os.environ.get(GPUS, "1"))
    return count if hidden is None else min(count, len([word for word in hidden.split(",") if word]))


def load() -> ctypes.CDLL:
    """The library, before torch is imported."""
    library = ctypes.CDLL(os.environ[LIBRARY])
    for name, result in (RESULTS | {"begin": ctypes.c_void_p}).items():
        getattr(library, f"gpu_{name}").restype = result
    for name, taken in POINTERS.items():
        getattr(library, f"gpu_{name}").argtypes = taken
    library.gpu_limit.argtypes = library.gpu_setup.argtypes = [ctypes.c_int, ctypes.c_size_t]
    library.gpu_setup(visible(), BYTES)
    return library


def _checked(message: bytes | None) -> None:
    if message is not None:
        raise RuntimeError(message.decode())


class Stream:
    """An order of work; here all is done in the order of asking."""

    def __init__(self, device: Any = None, priority: int = 0, *, name: str = "side") -> None:
        self.device, self.name = _device(device), name

    def synchronize(self) -> None:
        _checked(EMULATOR.gpu_wait())

    def wait_stream(self, other: "Stream") -> None:
        _device(other.device)

    def wait_event(self, event: "Event") -> None:
        assert event.at is not None

    def record_event(self, event: "Event | None" = None) -> "Event":
        event = event or Event()
        event.record(self)
        return event

    def query(self) -> bool:
        return True


class Event:
    def __init__(self, enable_timing: bool = False, blocking: bool = False) -> None:
        self.timed, self.at = enable_timing, None

    def record(self, stream: Stream | None = None) -> None:
        self.at = perf_counter()

    def synchronize(self) -> None:
        assert self.at is not None, "an event that was not recorded"
        _checked(EMULATOR.gpu_wait())

    def query(self) -> bool:
        return True

    def elapsed_time(self, end: "Event") -> float:
        assert self.timed and end.timed and self.at is not None and end.at is not None
        return (end.at - self.at) * 1e3


class CUDAGraph:
    """What was asked for between begin and end, at the addresses of that time."""

    def __init__(self) -> None:
        self.made: int | None = None

    def capture_begin(self, pool: int, capture_error_mode: str) -> None:
        if current_stream().name == "default":
            raise RuntimeError("CUDA graphs must be captured on a non-default stream.")
        self.made = EMULATOR.gpu_begin(pool)

    def capture_end(self) -> None:
        EMULATOR.gpu_end()

    def replay(self) -> None:
        assert self.made is not None
        _checked(EMULATOR.gpu_replay(self.made))

    def __del__(self) -> None:
        if self.made is not None:
            EMULATOR.gpu_forget(self.made)


STREAMS: dict[int, Stream] = {}
POOLS = iter(range(1 << 30))


def _device(device: Any) -> Any:
    torch = sys.modules["torch"]
    if device is None:
        return torch.device("cuda", EMULATOR.gpu_current())
    if isinstance(device, int):
        device = torch.device("cuda", device)
    device = torch.device(device)
    if device.type != "cuda":
        raise ValueError(f"Expected a cuda device, but got: {device}")
    index = EMULATOR.gpu_current() if device.index is None else device.index
    if index >= visible():
        raise RuntimeError("CUDA error: invalid device ordinal")
    return torch.device("cuda", index)


def current_stream(device: Any = None) -> Stream:
    at = _device(device)
    return STREAMS.setdefault(at.index, Stream(at, name="default"))


def set_stream(stream: Stream) -> None:
    EMULATOR.gpu_use(stream.device.index)
    STREAMS[stream.device.index] = stream


@contextmanager
def stream(own: Stream | None) -> Iterator[None]:
    usual = current_stream(own.device if own else None)
    if own is not None:
        set_stream(own)
    try:
        yield
    finally:
        set_stream(usual)


@contextmanager
def graph(made: CUDAGraph, pool: int, stream: Stream, capture_error_mode: str = "global") -> Iterator[None]:
    """As torch's: waits for the device, collects garbage, then captures on the stream."""
    synchronize()
    usual = current_stream(stream.device)
    set_stream(stream)
    made.capture_begin(pool, capture_error_mode)
    try:
        yield
    finally:
        made.capture_end()
        set_stream(usual)


def synchronize(device: Any = None) -> None:
    _device(device)
    _checked(EMULATOR.gpu_wait())


def set_device(device: Any) -> None:
    EMULATOR.gpu_use(_device(device).index)


MODE = {"waits": 0}


def set_sync_debug_mode(mode: int | str) -> None:
    MODE["waits"] = {"default": 0, "warn": 1}.get(mode, mode)
    EMULATOR.gpu_tell_of_waits(int(bool(MODE["waits"])))


LIMITS: dict[int, float] = {}


def set_per_process_memory_fraction(fraction: float, device: Any = None) -> None:
    index = _device(device).index
    LIMITS[index] = fraction
    EMULATOR.gpu_limit(index, int(fraction * BYTES))


def _resize_(storage: Any, size: int) -> Any:
    torch = sys.modules["torch"]
    if storage.device.type != "cuda":
        return RESIZE(storage, size)
    torch.ops.emulator.resize_storage(torch.empty(0, dtype=torch.uint8, device=storage.device).set_(storage), size)
    return storage


def arm(torch: Any) -> None:
    """Let torch.cuda be this."""
    global RESIZE
    cuda = torch.cuda
    RESIZE, torch.UntypedStorage.resize_ = torch.UntypedStorage.resize_, _resize_
    torch.version.cuda = CUDA
    for own in (Stream, Event, CUDAGraph, current_stream, set_stream, stream, graph, synchronize, set_device):
        setattr(cuda, own.__name__, own)
    cuda.set_sync_debug_mode, cuda.get_sync_debug_mode = set_sync_debug_mode, lambda: MODE["waits"]
    cuda.set_per_process_memory_fraction = set_per_process_memory_fraction
    cuda.get_per_process_memory_fraction = lambda d=None: LIMITS.get(_device(d).index, 1.0)
    cuda._lazy_init = cuda.init = cuda.empty_cache = lambda: None
    cuda.is_available = lambda: visible() > 0
    cuda.is_initialized = lambda: True
    cuda.device_count = lambda: visible()
    cuda.current_device = lambda: EMULATOR.gpu_current()
    cuda.is_bf16_supported = lambda including_emulation=True: True
    cuda.graph_pool_handle = lambda: next(POOLS)
    cuda.default_generators = (torch.default_generator,) * visible()
    cuda.memory_allocated = cuda.memory_reserved = lambda d=None: EMULATOR.gpu_allocated(_device(d).index)
    cuda.max_memory_allocated = lambda d=None: EMULATOR.gpu_peak(_device(d).index)
    cuda.reset_peak_memory_stats = lambda d=None: EMULATOR.gpu_new_peak(_device(d).index)
    cuda.mem_get_info = lambda d=None: (BYTES - EMULATOR.gpu_allocated(_device(d).index), BYTES)
    cuda.get_device_properties = lambda d=None: SimpleNamespace(
        name=NAME, total_memory=BYTES, major=9, minor=0, multi_processor_count=1
    )
    cuda.get_device_name = lambda d=None: NAME
    cuda.get_device_capability = lambda d=None: (9, 0)


def _of_torch(torch: Any) -> None:
    arm(torch)
    from emulated_nccl import ProcessGroupNCCL

    torch.distributed.ProcessGroupNCCL = ProcessGroupNCCL


def _of_paraxis(gpus: Any) -> None:
    gpus.cuda_of_torch = lambda: CUDA  # it reads a file of torch's


CHANGES = {"torch": _of_torch, "paraxis.measure.gpus": _of_paraxis}


class _Finder:
    """Lets the library be loaded before torch, and modules be changed right after their import."""

    @staticmethod
    def find_spec(name: str, path: Any = None, target: Any = None) -> Any:
        global EMULATOR
        if name not in CHANGES:
            return None
        change = CHANGES.pop(name)
        if name == "torch":
            EMULATOR = load()
        spec = find_spec(name)
        assert spec and spec.loader
        run = spec.loader.exec_module

        def exec_module(module: Any) -> None:
            run(module)
            change(module)

        spec.loader.exec_module = exec_module  # type: ignore[method-assign]
        return spec


def emulate() -> None:
    """From the import of torch on, this process has emulated GPUs."""
    sys.meta_path.insert(0, _Finder)  # type: ignore[arg-type]
