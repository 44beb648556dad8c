"""The Python interface with live objects, from scripts that run as __main__ as a notebook's cells do."""

import json
from pathlib import Path
from typing import Any

import pytest

HEAD = """
import json
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset
import paraxis

class Net(nn.Module):
    def __init__(self, width=32):
        super().__init__()
        self.first, self.noise, self.last = nn.Linear(6, width), nn.Dropout(0.1), nn.Linear(width, 3)

    def forward(self, x):
        return self.last(self.noise(torch.tanh(self.first(x))))

X = torch.randn(160, 6, generator=torch.Generator().manual_seed(0))
LIST = [(x, x[:, :3].argmax(1)) for x in X.split(16)]
LOADER = DataLoader(TensorDataset(X, X[:, :3].argmax(1)), batch_size=16, shuffle=True)
torch.manual_seed(1)
net = Net()
"""


def python(desk: Any, text: str, limit: float = 120) -> Any:
    """What a script prints as its last line, in JSON; it runs as __main__."""
    done = desk.launch("python", desk.write("script.py", HEAD + text), limit=limit)
    assert done.rc == 0, done.err
    return json.loads(done.out.splitlines()[-1])


@pytest.mark.slow
def test_a_class_of_the_script_is_proved_and_trained(desk: Any) -> None:
    said = python(
        desk,
        """
before = {k: v.clone() for k, v in net.state_dict().items()}
proof = paraxis.verify(net, LOADER, plan="dp=2,comm=gloo", steps=5)
run = paraxis.train(net, LIST, plan="dp=2,comm=gloo", epochs=3, lr=0.3, out="run")
from safetensors.torch import load_file
other = Net()
other.load_state_dict(load_file(run["weights"]), strict=True)
same = all(torch.equal(before[k], v) for k, v in net.state_dict().items())
moved = max(float((before[k] - v).abs().max()) for k, v in other.state_dict().items())
print(json.dumps([proof["passed"], run["losses"], same, moved]))
""",
    )
    passed, losses, same, moved = said
    assert passed and len(losses) == 30
    assert sum(losses[-5:]) < 0.9 * sum(losses[:5])
    assert same, "training changes the saved weights, not the network that was given"
    assert 1e-3 < moved < 2, "training starts from the weights that the network has"


@pytest.mark.slow
def test_a_study_of_live_objects(desk: Any) -> None:
    said = python(
        desk,
        """
optimizer = lambda parameters: torch.optim.AdamW(parameters, lr=0.01)
phases = []
study = paraxis.explore(Net, LIST, workers=2, budget=12, comms=("gloo",), out="study", optimizer=optimizer,
                        stages=lambda n: [nn.Sequential(n.first, nn.Tanh()), nn.Sequential(n.noise, n.last)],
                        tell=lambda what, done: phases.append(what))
ok = [r.label for r in study.results if r.status == "ok" and r.verified.passed]
print(json.dumps([study.finished, ok, study.recommendation.sentence, [r.reason for r in study.results], phases]))
""",
    )
    finished, ok, sentence, reasons, phases = said
    assert finished and "serial" in ok and sentence.startswith("Use ") and phases
    assert all(reason is None or "--budget" in reason for reason in reasons)
    assert sorted(p.name for p in (desk.folder / "study").iterdir()) == ["report.html", "samples.jsonl", "study.json"]


def test_mistakes_are_errors_of_ours(desk: Any) -> None:
    said = python(
        desk,
        """
def caught(f, *args, **kwargs):
    try:
        f(*args, **kwargs)
    except paraxis.ParaxisError as error:
        return f"{type(error).__name__}: {error}"
    return "nothing"

print(json.dumps([
    caught(paraxis.train, net, iter(LIST), steps=2),
    caught(paraxis.train, net, LIST, lr=-1),
    caught(paraxis.train, net, LIST, leraning_rate=1),
    caught(paraxis.train, net, LIST, plan="dp=x"),
    caught(paraxis.train, "mlp", LIST),
    caught(paraxis.train, net, [], steps=2),
    caught(paraxis.train, net, steps=2),
    caught(paraxis.explore, net, LIST, budget=0, comms=("gloo",)),
    caught(paraxis.explore, net, LIST, workers=0, comms=("gloo",)),
    caught(paraxis.verify, net, LIST, plan="dp=2,comm=gloo", workers=-1, steps=0),
]))
""",
    )
    wanted = ["read only once", "lr", "leraning_rate", "dp", "batches", "batch", "data", "budget", "workers", "steps"]
    for text, part in zip(said, wanted, strict=True):
        assert text.startswith(("TaskError: ", "PlanError: ")) and part in text, text
        assert len(text.splitlines()) == 1


@pytest.mark.slow
def test_the_notebook_of_the_examples(desk: Any, examples: Path) -> None:
    done = desk.launch("python", examples / "notebook.py")
    assert done.rc == 0, done.err
    assert "proved: True" in done.out and "Use " in done.out


@pytest.mark.slow
def test_two_jobs_at_once_from_threads(desk: Any) -> None:
    said = python(
        desk,
        """
from concurrent.futures import ThreadPoolExecutor
def job(n):
    return paraxis.train(net, LIST, plan="dp=2,comm=gloo", steps=20, out=f"run{n}")["losses"]
with ThreadPoolExecutor() as pool:
    print(json.dumps(list(pool.map(job, range(2)))))
""",
    )
    assert said[0] == pytest.approx(said[1], abs=1e-6)
