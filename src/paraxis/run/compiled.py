"""How long a plan takes to compile: what its first step takes more than its second one, backwards included."""

from collections.abc import Callable
from dataclasses import dataclass, field
from time import perf_counter

import torch

from paraxis.engine.devices import wait
from paraxis.errors import ParaxisError, PlanError

COMPILERS = ("torch._dynamo", "torch._inductor", "torch._functorch")


@dataclass
class FirstSteps:
    """Seconds of the first two steps of a plan, as they are run."""

    device: torch.device
    seconds: list[float] = field(default_factory=list)

    def run(self, steps: Callable[[int], None], count: int) -> None:
        """`count` steps more; raises PlanError with what torch.compile says if it fails."""
        while count and len(self.seconds) < 2:
            wait(self.device)
            begun = perf_counter()
            try:
                steps(1)
            except ParaxisError:
                raise
            except Exception as error:
                if not type(error).__module__.startswith(COMPILERS):
                    raise
                told = " ".join(str(error).split())[:200]
                raise PlanError(f"compile=1: torch.compile failed ({told}); leave compile out") from error
            wait(self.device)
            self.seconds.append(perf_counter() - begun)
            count -= 1
        if count:
            steps(count)

    @property
    def compiling(self) -> float | None:
        """Seconds of compilation; None until two steps have been made."""
        return max(0.0, self.seconds[0] - self.seconds[1]) if len(self.seconds) > 1 else None
