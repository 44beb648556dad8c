"""Refusals name the key that is wrong, for the reason that it is, and what they advise works."""

import random
import re

import pytest

from paraxis.errors import MissingError, PlanError
from paraxis.plan.devices import Gpus, check_devices
from paraxis.plan.plan import parse

NATIVE = "dp=2,engine=native"


@pytest.mark.parametrize(
    "text, words, works",
    [
        (
            "tp=2,engine=native,sequence=1",
            "sequence=1: engine=native has tp ranks that see all tokens",
            "tp=2,sequence=1",
        ),
        ("sequence=1,engine=native", "sequence=1: engine=native has tp ranks that see all tokens", "sequence=1"),
        ("device=cuda,engine=native", "device=cuda: engine=native computes on CPUs; take engine=torch", "device=cuda"),
        (
            "engine=native,precision=bf16",
            "precision=bf16: engine=native computes in fp32; take engine=torch",
            "precision=bf16",
        ),
        (
            "engine=native,precision=tf32",
            "precision=tf32: engine=native computes in fp32; take engine=torch,device=cuda",
            "device=cuda,precision=tf32",
        ),
        ("engine=native,compile=1", "compile=1: engine=native is compiled already", "compile=1"),
        (
            "engine=native,graphs=1",
            "graphs=1: engine=native computes on CPUs, and CUDA graphs record a GPU; take engine=torch,device=cuda",
            "device=cuda,graphs=1",
        ),
        ("today,graphs=1", "graphs=1: engine=plain is the framework's own loop", "engine=torch,device=cuda,graphs=1"),
        ("today,comm=openmp", "engine=plain is one process; leave comm out", "today"),
        ("dp=2,comm=openmp", "engine=torch takes mpi or gloo", "dp=2,comm=mpi"),
        ("dp=2,comm=openmp,device=cuda", "takes mpi or gloo, and nccl on GPUs", "dp=2,comm=nccl,device=cuda"),
        ("dp=2,comm=nccl", "comm=nccl: it joins GPUs, and device=cpu", "dp=2,comm=nccl,device=cuda"),
        ("dp=2,zero=1,sync=average@4", "zero=1: sync=average@4 lets replicas differ", "dp=2,zero=1"),
        ("dp=2,zero=2,sync=compressed", "zero=2: sync=compressed adds up whole gradients, packed", "dp=2,zero=2"),
        (
            f"{NATIVE},tp=2,sync=compressed",
            "sync=compressed: threads send nothing that could be smaller; take sync=gradient",
            f"{NATIVE},tp=2",
        ),
        (
            f"{NATIVE},sync=diloco@8:bf16:fragments=2:overlap=1",
            "weights in one piece, and threads send nothing that could be smaller; leave out fragments and overlap and",
            f"{NATIVE},sync=diloco@8",
        ),
        (
            f"{NATIVE},comm=mpi,sync=diloco@8:int8",
            "int8 scales rows of one parameter, which engine=native has not; leave out int8",
            f"{NATIVE},comm=mpi,sync=diloco@8",
        ),
        (f"{NATIVE},pp=2,threads=3", "threads=3: here threads are ranks; take dp=6 instead", "dp=6,pp=2,engine=native"),
        (
            "pp=2,tp=2,engine=native,microbatches=4,schedule=interleaved",
            "schedule=interleaved: threads of a tp group share one stage; take 1f1b",
            "pp=2,tp=2,engine=native,microbatches=4,schedule=1f1b",
        ),
        (
            "pp=2,interleave=2,microbatches=4",
            "interleave=2: several stages a rank take schedule=layerwise or gpipe or interleaved",
            "pp=2,interleave=2,microbatches=4,schedule=gpipe",
        ),
        ("pp=2,split=8", "split=8 names 1 stage, but pp=2", "pp=2,split=4+4"),
    ],
)
def test_a_refusal_has_the_right_reason_and_its_advice_works(text: str, words: str, works: str) -> None:
    with pytest.raises(PlanError, match=re.escape(words)):
        parse(text)
    assert parse(works)


def test_what_has_no_effect_is_not_refused() -> None:
    assert parse("interleave=2,microbatches=4") == parse("microbatches=4")


VALUES = {
    "dp": ["2"],
    "pp": ["2"],
    "tp": ["2"],
    "microbatches": ["4"],
    "interleave": ["2"],
    "schedule": ["gpipe", "1f1b", "interleaved", "zb-h1", "layerwise"],
    "split": ["3+5", "1"],
    "sync": ["average@8", "diloco@8:bf16", "diloco@8:int8:fragments=2:overlap=2", "compressed", "hogwild"],
    "engine": ["native", "plain", "torch"],
    "comm": ["openmp", "mpi", "nccl"],
    "threads": ["2"],
    "gradients": ["owner"],
    "zero": ["1", "3"],
    "recompute": ["all", "1"],
    "sequence": ["1"],
    "device": ["cuda", "cpu+cuda:0"],
    "precision": ["tf32", "bf16", "fp16"],
    "compile": ["1"],
    "graphs": ["1"],
}


def test_a_refusal_begins_with_a_key_that_was_given() -> None:
    rng, refused = random.Random(0), 0
    for _ in range(4000):
        keys = rng.sample(list(VALUES), rng.randint(1, 6))
        given = {key: rng.choice(VALUES[key]) for key in keys}
        try:
            parse(",".join(f"{key}={value}" for key, value in given.items()))
        except PlanError as error:
            refused += 1
            key, _, rest = str(error).partition("=")
            assert key in given and rest.startswith(given[key]), (given, str(error))
    assert 1000 < refused < 4000


@pytest.mark.parametrize(
    "text, count, rest, works",
    [
        ("dp=2,device=cuda,comm=nccl", 1, "take comm=mpi or gloo, or device=cuda with at most 1 rank a host", ""),
        ("dp=8,device=cuda,comm=nccl", 2, "device=cuda with at most 2 ranks a host", "dp=2,device=cuda,comm=nccl"),
        ("pp=2,device=cuda:1,comm=nccl", 2, "take comm=mpi or gloo, or device=cuda", "pp=2,device=cuda,comm=nccl"),
    ],
)
def test_gpus_that_several_ranks_would_share(text: str, count: int, rest: str, works: str) -> None:
    with pytest.raises(PlanError, match=f"one rank a GPU; .*{rest}$"):
        check_devices(parse(text), Gpus(count))
    check_devices(parse(works or text.replace("nccl", "gloo")), Gpus(count))
    with pytest.raises(MissingError, match="no CUDA device here"):
        check_devices(parse(text), Gpus(0, "none"))
