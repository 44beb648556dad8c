"""Compressed gradients: replicas add up their gradients in every step, each number in half its bytes, as bfloat16.

Akiba et al., "Extremely Large Minibatch SGD" (2017), sent them in half precision; bfloat16 has less mantissa and
the whole range. What arrives has been rounded twice: each replica's gradient, and the sum. Weights stay as they are.
"""

from typing import TYPE_CHECKING

from paraxis.sync.rule import Do, Rule

if TYPE_CHECKING:
    from torch import Tensor


def emulate_sum(parts: "list[Tensor]") -> "Tensor":
    """The same by plain code: one gradient of the replicas' own."""
    total = parts[0] * 0
    for part in parts:
        total += part.bfloat16().to(part.dtype)
    return total.bfloat16().to(total.dtype)


RULE = Rule(
    "compressed",
    "Akiba et al. 2017",
    gradients=(Do("AllReduce", buffer="grads", reduction="sum", payload="bf16"),),
    emulate_sum=emulate_sum,
)
