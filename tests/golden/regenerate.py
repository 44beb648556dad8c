"""Writes the golden programs anew: `python tests/golden/regenerate.py`. Read the difference before you commit it."""

from pathlib import Path

from paraxis.plan.plan import parse
from paraxis.program.cut import Layout
from paraxis.program.instructions import Program
from paraxis.program.lower import lower

HERE = Path(__file__).parent
PLAIN = Layout(parameters=(6, 0, 6, 0, 6))
TIED = Layout(parameters=(6, 0, 6, 0, 6), clip=True, tied=(("first.weight", (0, 4)),))
RICH = Layout(parameters=(6, 0, 6, 0, 6), weight_in_data=True, statistics=True, clip=True)
CASES = {
    "serial": ("serial", PLAIN),
    "accumulation": ("microbatches=2", PLAIN),
    "data-buckets": ("dp=2,bucket_bytes=24", PLAIN),
    "data-rich": ("dp=2,microbatches=2", RICH),
    "pipeline-1f1b": ("pp=2,microbatches=3", PLAIN),
    "pipeline-gpipe-rich": ("pp=3,schedule=gpipe,microbatches=2", RICH),
    "grid-buckets-rich": ("dp=2,pp=2,microbatches=2,split=2+3,bucket_bytes=24", RICH),
    "pipeline-tied": ("dp=2,pp=3,microbatches=2", TIED),
    "average": ("dp=2,sync=average@3", RICH),
}


def made(name: str) -> Program:
    """The program that the golden file of this name should hold."""
    text, layout = CASES[name]
    return lower(parse(text), layout, steps_per_epoch=5)


def path(name: str) -> Path:
    """Where the golden file of this name lies."""
    return HERE / f"{name}.txt"


if __name__ == "__main__":
    for case in CASES:
        path(case).write_text(made(case).text())
