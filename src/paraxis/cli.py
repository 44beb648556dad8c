"""The command line: explore, train, verify, show, doctor.

Documents go to standard output, everything else to standard error.
"""

import json
import os
import signal
import sys
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any, Literal

from cyclopts import App, CycloptsError, Parameter
from rich.console import Console

from paraxis import __version__
from paraxis.errors import ParaxisError
from paraxis.options import Exports, Json, Limit, TaskOptions
from paraxis.plan.own import Asked
from paraxis.progress import err, progress
from paraxis.run.joined import JoinedPool, joined_ranks, let_the_first_speak
from paraxis.session import Tell

app = App(
    name="paraxis",
    version=__version__,
    help="Explore, prove, measure and use parallel plans for a neural network.",
    suppress_keyboard_interrupt=False,
)
STUDY = Path("paraxis-study")
DEFAULT, AS_IT_IS = TaskOptions(), Asked()
COMMS = {"all": ("openmp", "mpi", "gloo"), "native": ("openmp",), "torch": ("mpi", "gloo")}  # of every engine


def _spec(network: str, options: TaskOptions) -> Any:
    from paraxis.api import make_spec

    return make_spec(network, **vars(options))


@app.command
def explore(
    network: str = "cnn",
    /,
    *,
    workers: int | None = None,
    budget: float | None = None,
    engine: Literal["all", "native", "torch"] = "all",
    memory_limit: Limit = None,
    out: Path | None = None,
    resume: Annotated[bool, Parameter(negative="")] = False,
    study: str | None = None,
    schema: Annotated[bool, Parameter(negative="")] = False,
    json_: Json = False,
    export: Exports = None,
    task: TaskOptions = DEFAULT,
) -> int:
    """Find out which plan to train a network with on this machine.

    Parameters
    ----------
    network
        mlp, mlp:784-1024-1024-10, cnn, resnet18, gpt, gpt:small, or your own FILE.py[:FUNCTION].
    workers
        Explore plans for 1, 2, 4 ... so many workers (default: usable cores).
    budget
        Seconds for all of it, start-up included (default: 60; a study takes what it takes).
    engine
        native: our C++ on OpenMP threads; torch: PyTorch, over MPI and Gloo.
    out
        Folder for study.json, samples.jsonl and report.html (default: paraxis-study, or paraxis-study/STUDY).
    resume
        Go on with what an earlier exploration of the same task has measured in that folder; proofs are made again.
    study
        Run a study of factors and levels instead: a shipped one, FILE.toml, or list to see what there is. It resumes.
    schema
        Print the JSON Schema of study.json and end.
    export
        Write the figures for other tools, too: csv, tensorboard (may be given twice).
    """
    from paraxis.measure.records import Study

    if schema:
        print(json.dumps(Study.model_json_schema(), indent=1))
        return 0
    if study is not None:
        from paraxis.study.command import run_study

        own = (network, workers, engine, task) != ("cnn", None, "all", DEFAULT)
        return run_study(study, out, STUDY, budget, own, json_)
    from paraxis.report.export import require
    from paraxis.showing import deliver

    require(export or [])
    spec, folder, limit = _spec(network, task), out or STUDY, _bytes(memory_limit)
    return deliver(_explored(spec, workers, budget, engine, folder, resume, limit), folder, export, json_)


def _bytes(limit: str | None) -> int | None:
    from paraxis.fitting import bytes_of

    return None if limit is None else bytes_of(limit)


def _explored(
    spec: Any, workers: int | None, budget: float | None, engine: str, out: Path, resume: bool, limit: int | None
) -> Any:
    from paraxis.experiment import explore_task, save_to
    from paraxis.measure.samples import open_book
    from paraxis.session import writable

    save = save_to(writable(out))
    comms, budget = COMMS[engine], 60.0 if budget is None else budget
    with joined_ranks() as joined, progress() as tell:
        return explore_task(spec, {}, workers, budget, comms, tell, save, joined, open_book(out, resume), limit=limit)


@app.command
def verify(
    network: str = "cnn",
    /,
    *,
    plan: str = "all",
    workers: int | None = None,
    steps: int = 20,
    dtype: str = "float64",
    fault: str | None = None,
    memory_limit: Limit = None,
    json_: Json = False,
    task: TaskOptions = DEFAULT,
) -> int:
    """Prove that plans compute what the serial run computes; exits 1 if one does not.

    Parameters
    ----------
    network
        mlp, mlp:784-1024-1024-10, cnn, resnet18, gpt, gpt:small, or your own FILE.py[:FUNCTION].
    plan
        A plan such as dp=2 or pp=2,microbatches=4, or all.
    workers
        For all: plans for 1, 2, 4 ... so many workers (default: usable cores).
    dtype
        float64 (to 1e-10) or float32 (to the measured band of another summation order).
    fault
        Seed a known mistake, to see that the proof catches it: dropped-reduction, all-data, wrong-mask ...
    """
    from paraxis.verification import verify_task

    spec = _spec(network, task)
    with joined_ranks() as joined, progress() as tell:
        document = verify_task(spec, {}, plan, workers, steps, dtype, tell, joined, fault, _bytes(memory_limit))
    if json_:
        print(json.dumps(document, indent=1))
    else:
        from paraxis.report.proofs import print_proofs

        print_proofs(document, Console(highlight=False))
    return 0 if document["passed"] else 1


@app.command
def train(
    network: str = "cnn",
    /,
    *,
    plan: str = "best",
    epochs: int | None = None,
    steps: int | None = None,
    target: float | None = None,
    out: Path = Path("paraxis-run"),
    memory_limit: Limit = None,
    json_: Json = False,
    task: TaskOptions = DEFAULT,
) -> int:
    """Train to the end with a plan and save a plain state_dict.

    Parameters
    ----------
    network
        mlp, mlp:784-1024-1024-10, cnn, resnet18, gpt, gpt:small, or your own FILE.py[:FUNCTION].
    plan
        serial, today, dp=2 ..., or best: what an exploration in paraxis-study recommends, else a short one now.
    epochs
        Epochs to train (default 1).
    steps
        Optimiser steps to train, at most.
    target
        Stop at this accuracy on the validation split, or on the test set where there is none.
    out
        Folder for weights.safetensors.
    """
    from paraxis.training import Length, train_task

    spec, length, limit = _spec(network, task), Length(epochs, steps, target), _bytes(memory_limit)
    with joined_ranks() as joined, progress() as tell:
        chosen = _choose(plan, spec, tell, joined, limit)
        news = lambda epoch: tell(_epoch_line(epoch), -2)  # noqa: E731
        document = train_task(spec, {}, chosen, length, out, tell, news, joined, limit)
    if json_:
        print(json.dumps(document, indent=1))
        return 0
    print(f"plan: {document['label']}, {len(document['losses'])} steps in {document['seconds']:.1f} s")
    if document["test"]:
        print(f"test accuracy: {document['test']['accuracy']:.2%} of {document['test']['samples']} samples")
    for note in document["notes"]:
        print(note)
    print(f"weights: {document['weights']}")
    return 0


def _choose(plan: str, spec: Any, tell: Tell, joined: JoinedPool | None, limit: int | None) -> Any:
    from paraxis.api import read_recommendation
    from paraxis.measure.gpus import usable
    from paraxis.measure.machine import usable_cores
    from paraxis.plan.plan import parse

    if plan.partition(",")[0] == "today":
        more = [] if "threads=" in plan else [f"threads={usable_cores()}"]
        more += ["device=cuda"] * ("device" not in plan and usable().count > 0)
        return parse(",".join([plan, *more]))
    if plan != "best":
        return parse(plan)
    known = read_recommendation(STUDY, spec.network, limit)
    if known is None:
        from paraxis.experiment import explore_task

        words: Any = {"accuracy": False, "limit": limit}
        study = explore_task(spec, {}, None, 30.0, COMMS["all"], tell, lambda _: None, joined, **words)
        known = study.recommendation.plan if study.recommendation else "serial"
    tell(f"best plan: {parse(known).short()}", -2)
    return parse(known)


def _epoch_line(epoch: dict[str, Any]) -> str:
    scores = "".join(
        f", {key} accuracy {epoch[key]['accuracy']:.2%}" for key in ("validation", "test") if epoch.get(key)
    )
    return f"epoch {epoch['epoch']}: loss {epoch['loss']:.4f}{scores}, {epoch['seconds']:.1f} s"


@app.command
def show(
    what: str,
    detail: str | None = None,
    /,
    *more: str,
    trace: Path | None = None,
    out: Path | None = None,
    export: Exports = None,
    shape: Annotated[Asked, Parameter(name="*")] = AS_IT_IS,
    json_: Json = False,
    task: TaskOptions = DEFAULT,
) -> int:
    """Explain a plan of a study, compare studies, draw a plan's program, or try a schedule of your own.

    Parameters
    ----------
    what
        A study's folder or study.json, a plan such as pp=4,microbatches=8, or a schedule: FILE.py[:NAME] or FILE.txt.
    detail
        With a study: a plan in it, its label, today or best; without one the study's table is printed.
        With another study: both are compared, and as many more as are given.
        With a plan: cut this network and simulate with its measured costs (default: stages alike, backwards double).
        With a schedule: check, simulate, prove and time it on this network (default: a small one).
    trace
        Write the timelines as Chrome trace JSON, which https://ui.perfetto.dev opens.
    out
        Write the comparison of studies as this HTML file.
    export
        Only write a study's figures beside it for other tools: csv, tensorboard (may be given twice).
    """
    from paraxis import showing
    from paraxis.plan.own import is_own

    if is_own(what):
        return _tried(what, detail, shape, json_, task)
    if showing.compared(what, detail, more, out, json_) or showing.exported(what, export):
        return 0
    if showing.is_study(what):
        showing.explain_study(Path(what), detail, trace, json_)
        return 0
    spec = _spec(detail, task) if detail else None
    with progress() as tell:
        shown = showing.document_of(what, spec, tell)
    if trace:
        showing.write_trace(trace, {"simulated": showing.simulated_events(shown)}, shown["replicas"])
    if json_:
        print(json.dumps(shown, indent=1))
    else:
        print("\n".join(showing.show_lines(shown, Console().width)))
    return 0


def _tried(name: str, network: str | None, shape: Asked, json_: bool, task: TaskOptions) -> int:
    from paraxis.scheduling import tried

    def spec_of(network: str, words: dict[str, Any]) -> Any:
        return _spec(network, replace(task, **{k: v for k, v in words.items() if getattr(task, k) is None}))

    return tried(name, network, shape, json_, spec_of)


@app.command
def doctor(*, json_: Json = False) -> int:
    """Check what this machine has for parallel training: ok, or how to mend it."""
    from paraxis.doctor import examine

    with progress() as tell:
        findings = examine(tell)
    if json_:
        print(json.dumps({"checks": findings, "ok": all(f["ok"] for f in findings if f["needed"])}, indent=1))
    else:
        for f in findings:
            mark = "ok     " if f["ok"] else "MISSING" if f["needed"] else "no     "
            print(f"{mark} {f['name']:<10} {f['found']}" + (f"\n        mend: {f['mend']}" if f["mend"] else ""))
    return 0 if all(f["ok"] for f in findings if f["needed"]) else 1


def main() -> None:
    """Entry point: every error of ours is one line; 2 for bad input, 1 for a failed run, 130 for Ctrl-C."""
    signal.signal(signal.SIGTERM, _terminated)
    try:
        result = app(sys.argv[1:], exit_on_error=False, print_error=False, result_action="return_value")
        code = result if isinstance(result, int) else 0
    except CycloptsError as error:
        _fail(" ".join(str(error).split()) + " (see paraxis --help)")
        code = 2
    except ParaxisError as error:
        _fail(str(error))
        code = error.exit_code
    except KeyboardInterrupt:
        _end_at_once_if_told_again()
        _fail("interrupted; what was finished is kept")
        code = 130
    except BrokenPipeError:
        code = _reader_gone()
    try:
        sys.stdout.flush()
    except BrokenPipeError:
        code = _reader_gone()
    _end_at_once_if_told_again()
    sys.exit(code)


def _reader_gone() -> int:
    """Whoever read our output has closed it: nothing more can be said there."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return 1


def _fail(text: str) -> None:
    let_the_first_speak(os.environ)
    err.print(f"paraxis: {text}", markup=False)


def _end_at_once_if_told_again() -> None:
    """Python's own farewell, met by a signal that it turns into an exception, would print a traceback."""
    for one in (signal.SIGINT, signal.SIGTERM):
        signal.signal(one, signal.SIG_DFL)


def _terminated(*_: object) -> None:
    raise KeyboardInterrupt
