"""The flags that say which model a command opens, and how; and that model."""

import argparse
from collections.abc import Callable
from typing import Any

import jax

from jaxlm.host import cluster
from jaxlm.models.options import DTYPES
from jaxlm.opened import Opened, open_model
from jaxlm.stored import a_step


def add_to(add: Callable[..., Any], devices: str) -> None:
    """By `parser.add_argument`; `devices`: what 0 of them stands for."""
    add(
        "--checkpoint",
        "--workdir",
        required=True,
        help="the work folder of a run, a folder of jaxlm.convert, or a Hugging Face folder",
    )
    add("--step", type=a_step, default=None, help="of the checkpoint, or best; the newest")
    add("--params", default="", help="an extra of a run in their place, such as ema; the params")
    kinds = ("", *DTYPES)
    add("--dtype", default="", choices=kinds, help="of params and products; as they are")
    add("--max_length", type=int, default=0, help="tokens of context; 0: as in training")
    add("--devices", type=int, default=0, help=f"of this machine; 0: {devices}")


def refuse(flags: argparse.Namespace) -> None:
    """Raises `ValueError` for values that mean nothing, before anything starts."""
    for name in ("max_length", "devices"):
        if getattr(flags, name) < 0:
            raise ValueError(f"--{name}={getattr(flags, name)} must be at least 0")
    if flags.devices and cluster.place():
        raise ValueError("--devices: several processes work on all of theirs; leave it out")


def opened(flags: argparse.Namespace, say: Callable[[str], None], *, every: bool) -> Opened:
    """The model; `every`: on all devices where --devices is 0, not on as few as hold it."""
    devices: list | int = flags.devices
    if every:
        devices = jax.devices()[: flags.devices or None]
        if len(devices) < flags.devices:
            raise ValueError(f"--devices={flags.devices}: this machine has {len(devices)}")
    return open_model(
        flags.checkpoint,
        step=flags.step,
        devices=devices,
        which=flags.params,
        dtype=flags.dtype,
        length=flags.max_length,
        say=say,
    )


def told(flags: argparse.Namespace, opened: Opened) -> dict[str, Any]:
    """For files of results: of a run the step, and which of its params; and by what the model is
    another than the folder's own."""
    said = {"dtype": flags.dtype, "max_length": flags.max_length}
    said = {name: value for name, value in said.items() if value}
    if opened.step is None:
        return said
    return {"step": opened.step, "params": flags.params or "params"} | said
