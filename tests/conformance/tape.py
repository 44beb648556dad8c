"""What a CUDA graph is, on a CPU: operations are taken down as they are asked for, and done when the tape is played.

Nothing is computed while it records (values are those of memory that nobody has written), addresses and numbers are
those of the recording, and to ask for a value is an error, as on a device.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

ASKS = (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.nonzero.default)


class Tape(TorchDispatchMode):
    """Takes down every operation with its tensors."""

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        """The compiler, whose import takes seconds, is not there to be kept out."""
        return False

    def __init__(self) -> None:
        super().__init__()
        self.entries: list[tuple[Any, tuple[Any, ...], dict[str, Any], list[Tensor], list[Tensor]]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        """Do it once, for its results' shapes, and put back what it has written to."""
        if func in ASKS:
            raise RuntimeError("operation not permitted when stream is capturing")
        kwargs = kwargs or {}
        schema = func._schema
        written = [
            value
            for argument, value in zip(schema.arguments, args, strict=False)
            if argument.alias_info is not None and argument.alias_info.is_write
        ]
        before = [(t, t.clone()) for t in tree_leaves((written, args[3:5] if "batch_norm" in func.name() else ()))]
        made = func(*args, **kwargs)
        for tensor, old in before:
            if isinstance(tensor, Tensor) and tensor.numel():
                tensor.copy_(old)
        fresh = all(r.alias_info is None for r in schema.returns)
        outputs = [t for t in tree_leaves(made) if isinstance(t, Tensor)] if fresh else []
        if outputs or written:
            self.entries.append((func, args, kwargs, outputs, written))
        for t in outputs:
            if t.is_floating_point():
                t.fill_(float("nan"))
        return made

    def play(self) -> None:
        """Do all of it, on the same memory."""
        with torch.no_grad():
            for func, args, kwargs, outputs, _ in self.entries:
                made = func(*args, **kwargs)
                for there, t in zip(outputs, [t for t in tree_leaves(made) if isinstance(t, Tensor)], strict=False):
                    there.copy_(t)


class TapeRecorder:
    """A recorder of tapes; `played` counts what they have done. It `sees` in the last pass why nothing is recorded."""

    def __init__(self, sees: str = "") -> None:
        self.warmed = self.recorded = self.played = 0
        self.sees = sees

    def warm(self, run: Callable[[], None], last: bool = False) -> str:
        """Run it as it is."""
        self.warmed += 1
        run()
        return self.sees if last else ""

    def record(self, run: Callable[[], None]) -> Callable[[], None]:
        """A tape of it."""
        tape = Tape()
        with tape:
            run()
        self.recorded += 1

        def play() -> None:
            self.played += 1
            tape.play()

        return play
