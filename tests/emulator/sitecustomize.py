"""Every Python process that finds this on its path has emulated GPUs, if it is told where their library lies."""

import os

if "PARAXIS_EMULATOR" in os.environ:
    from emulated import emulate

    emulate()
