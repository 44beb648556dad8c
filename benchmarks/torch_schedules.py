"""The schedules of torch.distributed.pipelining as one's own: schedule=benchmarks/torch_schedules.py:NAME.

What PyTorch itself orders is asked for, without ranks: the two that walk a stage walk one that writes down what it is
told to compute; the interleaved one gives its list of actions.
"""

from types import SimpleNamespace
from typing import Any

from torch.distributed.pipelining.schedules import Schedule1F1B, ScheduleGPipe, ScheduleInterleaved1F1B

OPS = {"FORWARD": "F", "FULL_BACKWARD": "B"}
Order = list[tuple[str, int, int]]


def gpipe(ranks: int, microbatches: int, rank: int, stages: int) -> Order:
    """ScheduleGPipe."""
    return _walked(ScheduleGPipe, ranks, microbatches, rank)


def one_f_one_b(ranks: int, microbatches: int, rank: int, stages: int) -> Order:
    """Schedule1F1B."""
    return _walked(Schedule1F1B, ranks, microbatches, rank)


def interleaved(ranks: int, microbatches: int, rank: int, stages: int) -> Order:
    """ScheduleInterleaved1F1B; raises ValueError for numbers of microbatches that it refuses."""
    rounds = max(1, microbatches // ranks)
    if microbatches % rounds:
        raise ValueError(f"{microbatches} microbatches are no multiple of {rounds} rounds")
    schedule: Any = object.__new__(ScheduleInterleaved1F1B)
    schedule.n_local_stages, schedule.pp_group_size, schedule._n_microbatches = stages, ranks, microbatches
    schedule.microbatches_per_round = microbatches // rounds
    actions = [a for a in schedule._calculate_single_rank_operations(rank) if a is not None]
    return [(OPS[a.computation_type.name], a.stage_index, a.microbatch_index) for a in actions]


def _walked(kind: type, ranks: int, microbatches: int, rank: int) -> Order:
    order: Order = []
    stage = SimpleNamespace(
        stage_index=rank,
        is_last=False,
        get_fwd_recv_ops=lambda i: [],
        get_fwd_send_ops=lambda i: [],
        get_bwd_recv_ops=lambda i: [],
        get_bwd_send_ops=lambda i: [],
        forward_one_chunk=lambda i, *_, **__: order.append(("F", rank, i)),
        backward_one_chunk=lambda i, **_: order.append(("B", rank, i)),
        perform_reduce_grad=lambda _: None,
    )
    schedule: Any = object.__new__(kind)
    schedule._n_microbatches, schedule._num_stages, schedule._stage = microbatches, ranks, stage
    schedule._internal_losses, schedule.scale_grads, schedule._loss_fn = [], True, None
    schedule._check_inputs = lambda *_: ([()] * microbatches, [{}] * microbatches)
    schedule._initialize_stage = schedule._update_losses = lambda *_: None
    schedule._step_microbatches()
    return order
