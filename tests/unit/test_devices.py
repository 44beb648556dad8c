"""Which device a rank is on, what a host must have for it, and where layers go when devices are unlike."""

from dataclasses import dataclass, replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from paraxis.doctor import _gpu
from paraxis.engine import torch_engine
from paraxis.errors import MissingError, OutOfMemory, PlanError
from paraxis.fitting import advised, fitted
from paraxis.measure import gpus
from paraxis.measure.machine import describe
from paraxis.plan.devices import Gpus, check_devices, crowded, device_of, untried
from paraxis.plan.plan import Plan, parse
from paraxis.plan.space import on_gpus
from paraxis.program.cut import balanced, balanced_on, splits
from paraxis.run.clock import HOST, _nanoseconds, clock_of
from paraxis.run.devices import device_for
from paraxis.run.duties import Duties
from paraxis.run.worker import perform
from paraxis.session import failure
from paraxis.task.batches import ArraySource, StreamSource, digest
from paraxis.task.data import load
from paraxis.task.spec import TaskSpec
from paraxis.task.task import make_task

NONE = Gpus(0, "torch 9 was built without CUDA")


def devices(text: str, count: int) -> list[str]:
    plan = parse(text)
    return [device_of(plan, rank, rank, count) for rank in range(plan.mesh.size)]


def test_each_rank_has_the_device_of_its_place() -> None:
    assert devices("device=cuda", 2) == ["cuda:0"]
    assert devices("dp=4,device=cuda", 4) == ["cuda:0", "cuda:1", "cuda:2", "cuda:3"]
    assert devices("dp=4,device=cuda", 2) == ["cuda:0", "cuda:1"] * 2
    assert devices("pp=2,microbatches=2,devices=cpu+cuda:0", 1) == ["cpu", "cuda:0"]
    assert devices("dp=2,pp=2,microbatches=2,device=cuda:1+cpu", 2) == ["cuda:1", "cuda:1", "cpu", "cpu"]
    assert devices("pp=2,device=cpu+cpu", 0) == ["cpu", "cpu"]


@pytest.mark.parametrize(
    ("text", "gpus", "words"),
    [
        ("device=cuda", NONE, r"device=cuda: no CUDA device here: torch 9 was built without CUDA; device=cpu works"),
        ("device=cuda:3", Gpus(1), r"device=cuda:3: this machine has 1 CUDA device: cuda:0$"),
        ("pp=2,device=cpu+cuda:4", Gpus(3), r"device=cuda:4: this machine has 3 CUDA devices: cuda:0 to cuda:2$"),
    ],
)
def test_devices_that_are_not_there(text: str, gpus: Gpus, words: str) -> None:
    with pytest.raises(MissingError, match=words):
        check_devices(parse(text), gpus)
    check_devices(parse("dp=2"), NONE)


def test_nccl_takes_one_rank_a_gpu() -> None:
    for text, count in (("dp=2,device=cuda,comm=nccl", 1), ("dp=2,device=cuda:1,comm=nccl", 4)):
        with pytest.raises(PlanError, match=r"comm=nccl: 2 ranks would be on cuda:\d, and NCCL .*mpi or gloo"):
            check_devices(parse(text), Gpus(count))
        check_devices(replace(parse(text), comm="gloo"), Gpus(count))
    check_devices(parse("dp=2,device=cuda,comm=nccl"), Gpus(2))
    check_devices(parse("dp=4,device=cuda,comm=nccl"), Gpus(2), local=2)  # two hosts
    assert crowded(parse("dp=4,device=cuda"), 2, 4) == ("cuda:0", 2)
    assert crowded(parse("dp=4,device=cpu"), 2, 4) is None


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_without_a_gpu_a_rank_says_so_before_anything_is_built() -> None:
    with pytest.raises(MissingError, match=r"no CUDA device here: torch .*; device=cpu works"):
        device_for(parse("device=cuda"), 0, launched=False)
    assert device_for(parse("serial"), 0, launched=False) == torch.device("cpu")


# -- memory --------------------------------------------------------------------------------------------------------

TORCH_SAYS = (
    "CUDA out of memory. Tried to allocate 2.50 GiB. GPU 0 has a total capacity of 79.11 GiB of which 1.06 GiB is free."
    " Including non-PyTorch memory, this process has 78.04 GiB memory in use.\nSee documentation"
)


class OutOfMemoryError(RuntimeError):
    """As the framework's."""


def told(error: Exception) -> dict[str, Any]:
    def work(*_: object) -> None:
        raise error

    answer, _ = perform(SimpleNamespace(work=work), {"do": "work"}, b"", lambda _: None)
    found: dict[str, Any] = answer["error"]
    return found


def test_no_room_on_a_gpu_is_said_in_one_line() -> None:
    found = told(OutOfMemoryError(TORCH_SAYS))
    assert found["type"] == "OutOfMemory" and found["ours"] and found["bytes"] == int(79.11 * 2**30)
    assert found["text"] == "the GPU is out of memory of 79.11 GiB when 2.50 GiB more were asked for"
    found = told(RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"))
    assert (found["type"], found["text"], found["bytes"]) == ("OutOfMemory", "the GPU is out of memory", None)
    assert told(RuntimeError("shapes differ"))["type"] == "RuntimeError"
    assert failure(OutOfMemory("x")) == ("failed", "x") and failure(PlanError("x"))[0] == "refused"


@dataclass(frozen=True)
class Bytes:
    """A computed memory."""

    total: int


class Room:
    """A session in which a layer takes 10 bytes and microbatches share them; it notes what is dropped."""

    def __init__(self, limit: int | None) -> None:
        self.limit, self.asked = limit, []  # type: ignore[var-annotated]

    def settled(self, plan: Plan) -> Plan:
        return plan

    def memory(self, plan: Plan) -> Bytes:
        layers = plan.split[1] if plan.split else 6
        return Bytes(60 // plan.microbatches if plan.pp == 1 else 10 * layers)

    def home_alive(self, plan: Plan) -> bool:
        return True

    def home(self, plan: Plan) -> Any:
        return SimpleNamespace(ask=lambda request, ranks: self.asked.append((request, list(ranks))))


def test_who_runs_out_of_memory_is_told_what_would_fit() -> None:
    room: Any = Room(20)
    with pytest.raises(OutOfMemory) as caught, advised(room, "k", parse("device=cuda")):
        raise OutOfMemory("the GPU is out of memory")
    line = str(caught.value)
    assert "\n" not in line and line.startswith("device=cuda: the GPU is out of memory") and "allowed" in line
    assert "; microbatches=4,device=cuda would need 1.5e-05 MB" in line
    assert room.asked == [({"do": "drop", "key": "k"}, [0])]
    with pytest.raises(OutOfMemory, match="recompute=all or device=cpu need less"), advised(Room(None), "k", Plan()):  # type: ignore[arg-type]
        raise OutOfMemory("the GPU is out of memory")


def test_a_cut_keeps_to_the_memory_of_the_gpu() -> None:
    costs = [[9.0] * 6, [1.0] * 6]
    plan = parse("pp=2,microbatches=4,device=cpu+cuda:0")
    free: Any = Room(None)
    assert fitted(free, plan, costs) is None and balanced_on(costs) == (1, 5)
    for limit, split in ((50, (1, 5)), (49, (2, 4)), (20, (4, 2))):
        room: Any = Room(limit)
        found = fitted(room, plan, costs)
        assert found is not None and found.split == split
    small: Any = Room(5)
    assert fitted(small, plan, costs) is None and fitted(small, parse("pp=2"), costs) is None


def test_unlike_devices_get_unlike_shares() -> None:
    costs = [4.0, 1.0, 1.0, 2.0, 1.0, 3.0]
    assert balanced_on([costs] * 3) == balanced(costs, 3)
    fast = [c / 10 for c in costs]
    assert balanced_on([costs, fast]) == (1, 5) and balanced_on([fast, costs]) == (5, 1)
    assert splits([costs, fast])[0] == (1, 5) and set(splits([costs] * 2)) == {(k, 6 - k) for k in range(1, 6)}
    assert splits([costs] * 2)[0] == balanced(costs, 2)


# -- what there is -----------------------------------------------------------------------------------------------------


def test_some_gpus_may_be_hidden() -> None:
    three = [("A", "1"), ("B", "1"), ("C", "1")]
    assert gpus.visible(three, None) == three and gpus.visible(three, "") == []
    assert gpus.visible(three, "2,0") == [three[2], three[0]] and gpus.visible(three, "1,9,0") == [three[1]]
    assert gpus.visible(three, "-1") == [] and gpus.visible([], "0") == [] and len(gpus.visible(three, "GPU-6e,1")) == 2


def test_a_machine_with_gpus_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    assert gpus.cuda_of_torch() == torch.version.cuda
    monkeypatch.setattr(gpus, "listed", lambda: [("NVIDIA H100", "580.1"), ("NVIDIA H100", "580.1")])
    monkeypatch.setattr(gpus, "cuda_of_torch", lambda: "13.0")
    record = describe()
    assert record.gpus == ["NVIDIA H100"] * 2 and record.versions["driver"] == "580.1"
    assert gpus.usable() == Gpus(2) and _gpu()["ok"] and "driver 580.1, cuda 13.0" in _gpu()["found"]
    monkeypatch.setattr(gpus, "cuda_of_torch", lambda: None)
    assert gpus.usable().count == 0 and not _gpu()["ok"] and "without CUDA" in _gpu()["found"]


def test_the_space_has_plans_for_gpus() -> None:
    assert on_gpus(0, 8, 5, ("mpi",)) == []
    one = [plan.short() for plan in on_gpus(1, 2, 5, ("openmp", "mpi", "gloo"))]
    several = ["dp=2,comm=mpi,device=cuda", "pp=2,microbatches=4,comm=mpi,device=cpu+cuda:0"]
    assert one == ["device=cuda", "device=cuda,graphs=1", *several]
    assert not any(untried(parse(plan), 1) for plan in one)
    four = on_gpus(4, 8, 3, ("mpi",))
    assert {plan.comm for plan in four} == {"", "nccl"} and max(plan.mesh.size for plan in four) == 4
    for plan in four:
        check_devices(plan, Gpus(4))
        assert untried(plan, 4) == (plan.comm == "nccl")
    assert untried(parse("pp=2,device=cuda:0+cuda:1,comm=mpi"), 2) and not untried(parse("dp=2"), 2)


# -- time and samples ----------------------------------------------------------------------------------------------


class Event:
    """A mark in a stream, at some millisecond."""

    def __init__(self, at: float) -> None:
        self.at, self.waited = at, False

    def synchronize(self) -> None:
        self.waited = True

    def elapsed_time(self, other: "Event") -> float:
        return other.at - self.at


def test_events_are_told_by_the_hosts_clock() -> None:
    rows = [[Event(0.0), Event(0.5)], [Event(0.5), Event(2.0)]]
    assert _nanoseconds(rows, lambda: 10_000_000) == [[8_000_000, 8_500_000], [8_500_000, 10_000_000]]
    assert rows[1][1].waited and not rows[0][0].waited
    assert _nanoseconds([]) == [] and clock_of(torch.device("cpu")) is HOST
    assert HOST.told([[1, 2]]) == [[1, 2]]


def test_samples_on_a_device_are_the_same_samples() -> None:
    arrays = load("synthetic:40,3,2").train
    here = ArraySource(arrays, 8, 1, torch.float32)
    there = ArraySource(arrays, 8, 1, torch.float32).on(torch.device("cpu"))
    for step in (0, 3, 7):
        for a, b in zip(here.share(step, 2, 4), there.share(step, 2, 4), strict=True):
            assert torch.equal(a, b)
    held = ArraySource(arrays, 8, 1, torch.float32, shuffled=False).on(torch.device("cpu"))
    assert torch.equal(held.thinned(10).share(0, 0, 4)[1], torch.from_numpy(arrays.targets)[::4][:4].long())
    stream = StreamSource(lambda: [(torch.ones(4, 2), torch.zeros(4))], 4, 0, torch.float64).on(torch.device("cpu"))
    assert stream.share(3, 1, 2)[0].dtype == torch.float64


def test_the_first_batch_is_told_as_the_host_has_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a GPU 1/255 times a byte is not the byte over 255: ranks would seem to have read other samples."""
    elsewhere = {"dtype": torch.float64, "_blocks": {}}
    monkeypatch.setattr(torch_engine, "move", lambda task, *_: vars(task.train).update(elsewhere))
    duties = Duties("solo")
    try:
        duties.take_task({"spec": {"network": "mlp"}}, b"", lambda _: None)
        told = duties.setup({"key": "p", "plan": "serial", "dtype": "float32", "cpus": []}, b"", lambda _: None)
    finally:
        torch.set_num_threads(duties.default_threads)
    assert told["batch"] == digest(make_task(TaskSpec(network="mlp")).train)
