"""Ranks that share layers, as processes: proved, trained, saved as one plain state_dict, listed, refused."""

import json
from typing import Any

import pytest
from safetensors.numpy import load_file


def proves(desk: Any, network: str, plan: str, *words: Any) -> Any:
    done = desk.run("verify", network, "--plan", plan, "--steps", 3, "--json", *words)
    assert done.rc == 0, done.err + done.out
    assert done.document["passed"]
    return done.document


@pytest.mark.slow
def test_gpt_shares_heads_columns_and_words(desk: Any) -> None:
    document = proves(desk, "gpt:1-16-2-16,dropout=0.1", "tp=2,comm=gloo", "--clip", 1)
    (note,) = [note for note in document["notes"] if note.startswith("tp=2 splits")]
    assert "h.0.attn.c_attn+h.0.attn.c_proj by 2 heads" in note and "wte+lm_head by 256 classes" in note
    assert "every rank has all of wpe, h.0.ln_1, h.0.ln_2, ln_f" in note


@pytest.mark.slow
def test_weights_are_saved_whole_and_are_those_of_the_serial_run(desk: Any) -> None:
    found = {}
    for plan in ("serial", "tp=2,comm=mpi"):
        out = f"run-{plan[:4]}"
        done = desk.run("train", "cnn", "--plan", plan, "--steps", 4, "--out", out, "--json")
        assert done.rc == 0, done.err
        found[plan[:4]] = done.document, load_file(desk.folder / out / "weights.safetensors")
    (alone, right), (shared, state) = found.values()
    assert {name: value.shape for name, value in state.items()} == {name: value.shape for name, value in right.items()}
    for name, value in state.items():
        assert abs(value - right[name]).max() < 1e-5, name
    assert shared["test"]["accuracy"] == pytest.approx(alone["test"]["accuracy"], abs=1e-3)
    assert shared["test"]["loss"] == pytest.approx(alone["test"]["loss"], rel=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("plan", ["tp=2,sequence=1,comm=gloo", "pp=2,tp=2,microbatches=2,sequence=1,comm=mpi"])
def test_gpt_shares_tokens_between_its_splits(desk: Any, plan: str) -> None:
    document = proves(desk, "gpt:1-16-2-16,dropout=0.1", plan, "--clip", 1)
    (note,) = [note for note in document["notes"] if note.startswith("tp=2,sequence=1 splits")]
    assert "wte+lm_head by 256 classes; every rank has all of wpe" in note and note.endswith("for 8 of 16 tokens")
    words = ["--fault", "partial-gradients", "--clip", 1]
    done = desk.run("verify", "gpt:1-16-2-16", "--plan", plan, "--steps", 3, "--json", *words)
    assert done.rc == 1 and not done.document["passed"]
    desk.run("verify", "mlp:784-64-10", "--plan", plan).refused("sequence=1: nothing of what tp splits has")


@pytest.mark.slow
def test_what_cannot_be_shared_is_refused_in_one_line(desk: Any) -> None:
    desk.run("show", "tp=3", "cnn").refused("tp=3: it divides none of 7+10 by 50 columns", "tp=2, tp=5")
    shown = desk.run("show", "tp=2", "cnn")
    assert "tp=2 splits 7+10 by 50 columns; every rank has all of 0, 3" in shown.out


@pytest.mark.slow
@pytest.mark.parametrize("plan", ["dp=2,tp=2,comm=mpi", "pp=2,tp=2,microbatches=4,comm=gloo", "tp=4,comm=mpi"])
def test_hybrids_of_four_processes_are_serial(desk: Any, plan: str) -> None:
    proves(desk, "gpt:2-32-4-16,dropout=0.1", plan, "--clip", 1)


@pytest.mark.slow
def test_exploring_lists_what_is_shared_and_what_cannot_be(desk: Any) -> None:
    done = desk.run("explore", "cnn", "--workers", 4, "--budget", 120, "--engine", "torch", "--json", limit=240)
    assert done.rc == 0, done.err
    study = json.loads(done.out)
    rows = {row["label"]: row for row in study["results"]}
    assert rows["tp=4 mpi"]["status"] == "refused" and "tp=2, tp=5" in rows["tp=4 mpi"]["reason"]
    assert rows["tp=2 mpi"]["status"] in ("ok", "not run")
    assert any(note.startswith("tp=2 splits 7+10") for note in study["notes"])
