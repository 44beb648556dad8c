"""`explore --study` with the batch-size procedure, on real ranks from the command line, and resumed."""

import json

import pytest
from conftest import Desk

from paraxis.measure.batch_sizes import BatchSizes

TINY = """
name = "tiny"
procedure = "batch-size"
measure = ["steps_to_target"]
[parameters]
network = "mlp:64-32-4"
data = "synthetic:4000,64,4"
plan = "serial"
batches = [8, 32, 128, 512]
target = 0.9
lr = 0.05
octaves = 1
widest = 2
seeds = [1, 2]
max_samples = 40000
noise_batch = 128
noise_parts = 8
"""


@pytest.mark.slow
def test_the_study_runs_says_its_answer_and_resumes_without_a_trial(desk: Desk) -> None:
    desk.write("tiny.toml", TINY)
    done = desk.run("explore", "--study", "tiny.toml", "--json")
    found = BatchSizes.model_validate(done.document["analysis"])
    assert done.rc == 0 and found.finished and [p.batch for p in found.points] == [8, 32, 128, 512]
    assert found.noise is not None and found.noise.small == 16
    steps = [p.median for p in found.points]
    assert steps[0] > steps[-1], "a larger batch takes fewer steps"
    file = desk.folder / "paraxis-study" / "tiny" / "trials.jsonl"
    before = file.read_bytes()
    again = desk.run("explore", "--study", "tiny.toml", "--json")
    assert again.document["analysis"] == done.document["analysis"] and file.read_bytes() == before
    printed = " ".join(desk.run("explore", "--study", "tiny.toml").out.split())
    assert found.sentence in printed
    lines = [json.loads(line) for line in before.splitlines()[1:]]
    assert {line["factors"]["rule"] for line in lines} == {"reach", "noise"}


def test_a_parameter_that_does_not_fit_is_refused_in_one_line(desk: Desk) -> None:
    desk.write("bad.toml", TINY.replace("seeds = [1, 2]", "seeds = [0]"))
    desk.run("explore", "--study", "bad.toml").refused("search_seed=0 is one of the seeds")
