"""What a synchronisation rule holds on a rank beside the parameters: its buffers, and numbers that travel packed."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from paraxis.program.instructions import Instruction, Program
from paraxis.sync.rule import buffers, fragment_of

FLOAT = 4  # bytes of an element
ROW = 128  # elements that share a scale, of 4 bytes, where they travel as int8


@dataclass(frozen=True)
class Agreeing:
    """Elements of a rank's gradients, and of each fragment of its rule's buffers, of which there are `copies`."""

    gradients: int
    fragments: tuple[int, ...]
    copies: int
    replicas: int

    @property
    def kept(self) -> int:
        """Bytes of the rule's buffers."""
        return FLOAT * self.copies * sum(self.fragments)

    def packed(self, i: Instruction) -> int:
        """Bytes of the letters that a packed sum has sent and waits for, from its start on (see comm.payload).

        A rank keeps its own piece and those of the others, packed, and has room for what each of them sends.
        """
        if i.buffer == "grads":
            elements = self.gradients
        else:
            elements = sum(self.fragments) if i.bucket < 0 else self.fragments[i.bucket]
        size = 2 * elements if i.payload == "bf16" else elements + FLOAT * -(-elements // ROW)
        return size * (2 * self.replicas - 1) // self.replicas


def agreeing(program: Program, every: Mapping[str, int], own: Sequence[str]) -> Agreeing:
    """Of a rank with the parameters `own`; `every`: elements of all trained parameters, in the network's order."""
    names = [b.name for b in program.buffers if b.name in buffers()]
    reduced = [i for _, body in program.bodies for i in body[0] if i.buffer in names]
    row = ROW if any(i.payload == "int8" for i in reduced) else 1  # with which every parameter begins
    fragments = [0] * (1 + max([0, *(i.bucket for i in reduced)]))
    part = fragment_of(every, len(fragments))
    for name in own:
        fragments[part[name]] += -(-every[name] // row) * row
    return Agreeing(sum(every[name] for name in own), tuple(fragments), len(names), program.mesh.dp)
