"""Replicas that train apart agree for a while, so that one set of weights can be scored or saved."""

from collections.abc import Iterator
from contextlib import contextmanager

from paraxis.run.interpreter import Rank
from paraxis.run.openmp import Team


@contextmanager
def agreed(rank: Rank | Team) -> Iterator[None]:
    """Replicas that disagree take their mean for a while, and go on as they were."""
    if isinstance(rank, Team):
        with rank.agreed():
            yield
        return
    engine = rank.engine
    kept = (engine.flat.params.clone(), engine.running.clone()) if rank.program.epilogue else None
    rank.settle()
    yield
    if kept:
        engine.flat.params.copy_(kept[0])
        engine.running.copy_(kept[1])
