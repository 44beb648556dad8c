"""What a plan's `precision` means: what is computed in 16 bits, and how losses are scaled against underflow.

Mixed precision after Micikevicius et al. 2018: weights, their gradients, updates and losses stay in float32; networks
compute in bfloat16 or float16 wherever torch.autocast finds that right. Gradients in float16 need losses to be scaled;
the scale halves whenever gradients overflow, and that step is not taken.
"""

from math import ceil, log2
from typing import TYPE_CHECKING

from paraxis.errors import PlanError

if TYPE_CHECKING:
    from paraxis.plan.plan import Plan

MIXED = ("bf16", "fp16")
SCALED = "fp16"
PATIENCE = 2000  # steps without an overflow, after which the scale doubles


def first_scale(batch: int) -> float:
    """A power of two, with which losses begin that are summed over a batch: about 2^16 for their mean."""
    return 2.0 ** max(0, 16 - ceil(log2(max(batch, 1))))


def check_precision(plan: "Plan") -> None:
    """Raises PlanError for what a precision cannot be had with."""
    if plan.precision == "tf32" and not plan.on_gpu():
        raise PlanError(
            "precision=tf32: its products are of NVIDIA GPUs, a CPU has none; take device=cuda, or precision=bf16"
        )


def told_of_precision(plan: "Plan") -> str:
    """For people: that a plan's arithmetic is not the one it is compared with; empty where it is."""
    if plan.precision == "fp32":
        return ""
    what = "products of matrices in TF32" if plan.precision == "tf32" else f"networks in {plan.precision}"
    return (
        f"It computes {what} and is proved against a serial run that does too; today's fp32 rounds less, so a "
        "comparison of their times is one of unlike arithmetic."
    )
