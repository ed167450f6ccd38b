"""The share of a GPU's memory that JAX may take: it takes it at its start, in one piece.

By itself JAX takes 75 %, so that other programs find room beside it. A command of ours is alone on
its GPUs, and asks for `USUAL`; the rest is for CUDA, its libraries and NCCL. What the user has set
stays. Source: docs.jax.dev, "GPU memory allocation".
"""

import os

from jaxlm.host import hardware

VARIABLE = "XLA_CLIENT_MEM_FRACTION"
OLD = "XLA_PYTHON_CLIENT_MEM_FRACTION"  # the same by its former name; JAX refuses both together
USUAL = 0.94


def use() -> None:
    """Asks for the usual share where there is a GPU. Call it before JAX starts."""
    if hardware.nvidia_gpu() and not (os.environ.get(VARIABLE) or os.environ.get(OLD)):
        os.environ[VARIABLE] = str(USUAL)


def share() -> float:
    """What a command started in this environment takes of a GPU."""
    text = os.environ.get(VARIABLE) or os.environ.get(OLD) or str(USUAL)
    try:
        return float(text)
    except ValueError:
        raise ValueError(f"{VARIABLE}={text!r} must be a share such as .94") from None
