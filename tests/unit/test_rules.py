"""Update rules on flat buffers compute what torch.optim computes, or leave the update to it."""

from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from paraxis.engine.flat import TOTALS, Flat, flatten
from paraxis.engine.rules import RULES, of_optimizer, plain
from paraxis.engine.torch_engine import TorchEngine
from paraxis.plan.plan import Plan
from paraxis.program.lower import lower
from paraxis.task.spec import TaskSpec
from paraxis.task.task import Task, make_task

torch.set_num_threads(1)
STEPS, SCALE = 20, 0.25
SGD, ADAM, ADAMW, RMSPROP = torch.optim.SGD, torch.optim.Adam, torch.optim.AdamW, torch.optim.RMSprop
CASES = {
    "sgd": (SGD, {"lr": 0.1}),
    "sgd decay": (SGD, {"lr": 0.1, "weight_decay": 0.02}),
    "sgd momentum": (SGD, {"lr": 0.1, "momentum": 0.9}),
    "sgd momentum decay": (SGD, {"lr": 0.1, "momentum": 0.9, "weight_decay": 0.02}),
    "sgd nesterov": (SGD, {"lr": 0.1, "momentum": 0.8, "nesterov": True}),
    "sgd nesterov decay": (SGD, {"lr": 0.1, "momentum": 0.8, "nesterov": True, "weight_decay": 0.02}),
    "adam": (ADAM, {"lr": 0.01}),
    "adam decay betas": (ADAM, {"lr": 0.01, "weight_decay": 0.1, "betas": (0.8, 0.95), "eps": 1e-4}),
    "adam decoupled": (ADAM, {"lr": 0.01, "weight_decay": 0.1, "decoupled_weight_decay": True}),
    "adamw": (ADAMW, {"lr": 0.01}),
    "adamw no decay": (ADAMW, {"lr": 0.01, "weight_decay": 0.0}),
}
NATIVE = {
    "rmsprop": (RMSPROP, {"lr": 0.01}),
    "amsgrad": (ADAM, {"lr": 0.01, "amsgrad": True}),
    "maximize": (SGD, {"lr": 0.1, "maximize": True}),
    "dampening": (SGD, {"lr": 0.1, "momentum": 0.9, "dampening": 0.1}),
    "tensor rate": (ADAM, {"lr": torch.tensor(0.01)}),
    "nadam": (torch.optim.NAdam, {"lr": 0.01}),
    "subclass": (type("Mine", (SGD,), {}), {"lr": 0.1}),
}


def network() -> nn.Sequential:
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 4, bias=False), nn.Linear(4, 3)).double()


def groups_of(net: nn.Module) -> list[dict[str, Any]]:
    """Weights in one group; biases in another, with a rate of their own and no decay."""
    named = list(net.named_parameters())
    biases = [p for name, p in named if name.endswith("bias")]
    weights = [p for name, p in named if name.endswith("weight")]
    return [{"params": weights}, {"params": biases, "lr": 0.003, "weight_decay": 0.0}]


def gradients(net: nn.Module, step: int) -> dict[str, Tensor]:
    """Gradients by name, the same for every network of this shape."""
    source = torch.Generator().manual_seed(step)
    return {n: torch.randn(p.shape, dtype=p.dtype, generator=source) for n, p in net.named_parameters()}


def flat_of(net: nn.Sequential, groups: list[dict[str, Any]]) -> Flat:
    names = {id(p): name for name, p in net.named_parameters()}
    return flatten([net[:2], net[2:]], [g["params"] for g in groups], names, torch.float64)


def assert_close(net: nn.Module, wanted: nn.Module) -> None:
    for (name, p), q in zip(net.named_parameters(), wanted.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-12, atol=1e-12, msg=name)


@pytest.mark.parametrize("name", CASES)
def test_rules_equal_torch_with_groups_and_a_scheduler(name: str) -> None:
    kind, options = CASES[name]
    ours, theirs = network(), network()
    optimizers = [kind(groups_of(net), **options) for net in (ours, theirs)]
    schedulers = [torch.optim.lr_scheduler.LambdaLR(o, lambda step: 1 / (1 + step)) for o in optimizers]
    hyper = of_optimizer(optimizers[0], schedulers[0])
    assert hyper.rule == ("sgd" if kind is SGD else "adam")
    flat = flat_of(ours, hyper.groups)
    states: list[dict[str, Tensor]] = [{} for _ in flat.runs]
    for step in range(STEPS):
        for key, g in gradients(theirs, step).items():
            ours.get_parameter(key).grad.copy_(g)
            theirs.get_parameter(key).grad = g * SCALE
        grads = flat.grads[TOTALS:]
        for (group, first, last), state in zip(flat.runs, states, strict=True):
            RULES[hyper.rule](flat.params[first:last], grads[first:last], state, hyper.groups[group], SCALE)
        optimizers[1].step()
        hyper.advance()
        schedulers[1].step()
        assert_close(ours, theirs)
    assert not torch.equal(network()[0].weight, ours[0].weight)


@pytest.mark.parametrize("name", [*CASES, *NATIVE])
def test_only_what_a_rule_computes_is_taken_from_torch(name: str) -> None:
    kind, options = (CASES | NATIVE)[name]
    expected = "native" if name in NATIVE else "sgd" if kind is SGD else "adam"
    assert plain(kind([nn.Parameter(torch.zeros(2))], **options)) == expected


# -- flat buffers ----------------------------------------------------------------------------------------------


def test_flat_buffers_hold_the_parameters_and_their_gradients() -> None:
    net = network()
    before = deepcopy(net.state_dict())
    flat = flat_of(net, groups_of(net))
    assert flat.params.shape == (20 + 4 + 16 + 12 + 3,) and flat.grads.shape == (TOTALS + 55,)
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())
    flat.params.fill_(2.0)
    assert all(bool((p == 2).all()) for p in net.parameters()), "views, not copies"
    net(torch.ones(3, 5, dtype=torch.float64)).sum().backward()
    assert float(flat.grads[TOTALS:].abs().sum()) > 0 and not flat.totals.any()
    assert flat.bounds == ((0, 24), (24, 55))
    for name, first, last in flat.names:
        assert torch.equal(net.get_parameter(name).grad.reshape(-1), flat.grads[TOTALS + first : TOTALS + last])


def test_runs_cover_every_parameter_once_and_join_what_shares_a_group() -> None:
    net = network()
    flat = flat_of(net, groups_of(net))
    assert [(first, last) for _, first, last in flat.runs] == [(0, 20), (20, 24), (24, 52), (52, 55)]
    assert [group for group, _, _ in flat.runs] == [0, 1, 0, 1]
    one = flat_of(net, [{"params": list(net.parameters())}])
    assert one.runs == ((0, 0, 55),)


def test_a_bucket_carries_its_gradients_and_the_first_one_the_totals() -> None:
    net = network()
    flat = flat_of(net, groups_of(net))
    flat.grads.copy_(torch.arange(len(flat.grads), dtype=torch.float64))
    assert flat.gradients(0).tolist() == list(range(TOTALS + 24))
    assert flat.gradients(1).tolist() == list(range(TOTALS + 24, TOTALS + 55))


def test_what_is_frozen_stays_out_and_what_is_shared_counts_once() -> None:
    shared = nn.Linear(3, 3)
    frozen = nn.Linear(3, 3).requires_grad_(False)
    net = nn.Sequential(shared, frozen, shared)
    names = {id(p): "p" for p in net.parameters()}
    flat = flatten([[net[0]], [net[1], net[2]]], [list(shared.parameters())], names, torch.float64)
    assert flat.params.dtype == flat.grads.dtype == torch.float32, "that of the parameters, where there are some"
    assert flat.bounds == ((0, 12), (12, 12)) and flat.params.numel() == 12
    assert flat.gradients(1).numel() == 0 and frozen.weight.grad is None


def test_buffers_of_a_stage_without_parameters_have_the_tasks_precision(tmp_path: Path) -> None:
    task = task_of(tmp_path, "")
    program = lower(Plan(pp=2, split=(1, 3)), task.layout())
    dtype = task.dtype
    assert TorchEngine(task, program, 0).flat.totals.dtype == dtype == torch.float64


# -- through the engine ----------------------------------------------------------------------------------------

OWN = """
import torch
from torch import nn

def net():
    torch.manual_seed(4)
    return nn.Sequential(nn.Flatten(), nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 3))
def batches():
    return [(torch.ones(8, 6), torch.arange(8) % 3)]
"""
OPTIMIZERS = {
    "rmsprop": "return torch.optim.RMSprop(parameters, lr=0.01, momentum=0.5)",
    "amsgrad": "return torch.optim.Adam(parameters, lr=0.01, amsgrad=True, weight_decay=0.1)",
    "two groups": "return torch.optim.AdamW([{'params': parameters[::2], 'lr': 0.1}, {'params': parameters[1::2]}])",
    "only some": "return torch.optim.SGD(parameters[2:], lr=0.1, momentum=0.9)",
}
CHOSEN = {
    "sgd": {"lr": 0.1, "momentum": 0.9, "nesterov": True, "weight_decay": 0.01},
    "adam": {"lr": 0.01, "weight_decay": 0.1},
    "adamw": {"lr": 0.01, "weight_decay": 0.1},
}


def task_of(folder: Path, more: str, **settings: Any) -> Task:
    path = folder / "own.py"
    path.write_text(OWN + more)
    return make_task(TaskSpec(network=str(path), **settings), dtype=torch.float64)


def assert_engine_follows_torch(task: Task) -> None:
    """STEPS updates of an engine against torch.optim and its scheduler on a copy."""
    copy = deepcopy(task.net)
    like = Task(**(vars(task) | {"net": copy}))
    optimizer = like.optimizer()
    scheduler = like.scheduler(optimizer)
    net = task.net
    engine = TorchEngine(task, lower(Plan(), task.layout()), 0)
    engine.known_weight = 4.0
    for step in range(STEPS):
        for key, g in gradients(copy, step).items():
            net.get_parameter(key).grad.copy_(g)
            copy.get_parameter(key).grad = g / 4
        engine.update()
        optimizer.step()
        if scheduler is not None:
            scheduler.step()
        assert_close(net, copy)
    assert engine.step == STEPS


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_an_engine_updates_as_the_users_own_optimiser_and_scheduler(name: str, tmp_path: Path) -> None:
    more = f"def optimizer(parameters):\n    {OPTIMIZERS[name]}\n"
    more += "def scheduler(optimizer):\n    return torch.optim.lr_scheduler.StepLR(optimizer, 3, 0.5)\n"
    task = task_of(tmp_path, more)
    assert (task.hyper().rule == "native") == (name in ("rmsprop", "amsgrad"))
    assert_engine_follows_torch(task)


@pytest.mark.parametrize("schedule", ["constant", "warmup", "cosine"])
@pytest.mark.parametrize("name", CHOSEN)
def test_an_engine_updates_as_the_chosen_optimiser_and_schedule(name: str, schedule: str, tmp_path: Path) -> None:
    more = {"lr_schedule": schedule, "warmup": 4, "horizon": 15}
    assert_engine_follows_torch(task_of(tmp_path, "", optimizer=name, **CHOSEN[name], **more))


def test_schedules_rise_and_fall_as_said(tmp_path: Path) -> None:
    def rates(**settings: Any) -> list[float]:
        task = task_of(tmp_path, "", lr=0.8, **settings)
        hyper, found = task.hyper(), []
        for _ in range(8):
            found.append(hyper.groups[0]["lr"])
            hyper.advance()
        return found

    assert rates() == [0.8] * 8
    assert rates(lr_schedule="warmup", warmup=4) == pytest.approx([0.2, 0.4, 0.6, 0.8, 0.8, 0.8, 0.8, 0.8])
    cosine = rates(lr_schedule="cosine", warmup=2, horizon=6)
    assert cosine == pytest.approx([0.4, 0.8, 0.8, 0.8 * 0.8535533905932737, 0.4, 0.8 * 0.14644660940672624, 0, 0])
