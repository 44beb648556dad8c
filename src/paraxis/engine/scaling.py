"""Dynamic scaling of losses (Micikevicius et al. 2018), as one rank keeps it.

Small gradients vanish in float16, so the loss is multiplied by a scale, and the update divides by it. Where a gradient
has overflowed the step is skipped and the scale halved; after many steps without an overflow it doubles. All ranks have
seen the same norm, whose sum over them is an instruction, and so keep the same scale.
"""

import math
from dataclasses import dataclass

from paraxis.plan.precision import PATIENCE, SCALED, first_scale
from paraxis.program.instructions import Program


@dataclass
class Scaling:
    """The scale of this step's losses; how many steps it has been right for, and how many have been skipped."""

    scale: float
    good: int = 0
    skipped: int = 0

    def takes(self, norm: float) -> bool:
        """Whether to take a step whose gradients have this norm (or its square); settles the next step's scale."""
        if math.isfinite(norm):
            self.good += 1
            if self.good == PATIENCE:
                self.scale, self.good = 2 * self.scale, 0
            return True
        self.scale, self.good, self.skipped = self.scale / 2, 0, self.skipped + 1
        return False


def scaling_for(program: Program, batch: int) -> Scaling | None:
    """Of a program whose losses are scaled, for a global batch of so many samples."""
    return Scaling(first_scale(batch)) if program.precision == SCALED else None
