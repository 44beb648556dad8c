"""What is said of ranks that die."""

import pytest

from paraxis.run.launch import last_words

STACK = "[vm:38] *** Process received signal ***\n[vm:38] Signal: Aborted (6)\n[vm:38] [ 0] libc.so.6(abort+0xd3)\n"
BANNER = f"{'-' * 74}\nprterun noticed that process rank 1 with PID 38 on node vm exited on\nsignal 6 (Aborted).\n"
FATAL = "Fatal Python error: _enter_buffered_busy: could not acquire lock"


@pytest.mark.parametrize(
    "log, words",
    [
        ("double free or corruption (!prev)\n" + STACK + "done 0\n" + BANNER, "double free or corruption (!prev)"),
        ("terminate called\n  what():  no room\n" + BANNER, "terminate called what(): no room"),
        ("malloc(): invalid size\nrank 1 was killed by SIGABRT\n", "malloc(): invalid size"),
        (f"{FATAL}\nPython runtime state: initialized\n\nThread 0x1:\n  File x.py, line 3\n" + STACK, FATAL),
        ("no" * 500 + " end\n" + STACK, "no" * 98 + " end"),
        (STACK + BANNER, ""),
    ],
)
def test_a_rank_that_aborts_has_said_why(log: str, words: str) -> None:
    assert last_words(log) == words
