"""What PyTorch finds of GPUs on this host."""

import os

import torch

from paraxis.plan.devices import Gpus


def found_here() -> Gpus:
    """What PyTorch can use; takes no memory of a GPU."""
    if torch.version.cuda is None:
        return Gpus(0, f"torch {torch.__version__} was built without CUDA")
    if not torch.cuda.is_available():
        hidden = os.environ.get("CUDA_VISIBLE_DEVICES")
        seen = "no GPU, or no driver for it" if hidden is None else f"CUDA_VISIBLE_DEVICES={hidden}"
        return Gpus(0, f"torch {torch.__version__} with CUDA {torch.version.cuda} finds none ({seen})")
    return Gpus(torch.cuda.device_count())
