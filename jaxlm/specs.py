"""The checked parts of a config, and the `Run` that they make.

Each group of keys is a dataclass whose fields are the keys, with their defaults; it refuses values
that cannot be, in one sentence (`ValueError`). `config` makes a `Run` of them.
"""

import dataclasses
import re
from pathlib import Path
from typing import Any

from jaxlm.contract import Method
from jaxlm.data.conversations import MEMBERS
from jaxlm.data.examples import READ_AS
from jaxlm.data.prepare import DataSpec
from jaxlm.models.options import experts_fit
from jaxlm.models.transformer import DecoderConfig
from jaxlm.optim.build import OptimizerSpec
from jaxlm.sharding import MeshSpec, rows_divide_by


@dataclasses.dataclass(frozen=True)
class CheckpointSpec:
    every: int = 500  # steps
    keep: int = 2  # newest ones kept
    keep_best: str = ""  # also keep the best: "loss/code", "max:dpo/accuracy/likes", "min:NAME"
    verify: str = "full"  # "full": hash each file; "sizes": only their sizes, for large models

    def __post_init__(self):
        _at_least(1, every=self.every, keep=self.keep)
        if self.verify not in ("full", "sizes"):
            raise ValueError(f"verify={self.verify!r} may be 'full' or 'sizes'")
        side, colon, _ = self.keep_best.partition(":")
        if colon and side not in ("min", "max"):
            raise ValueError(f"keep_best={self.keep_best!r} may begin with 'min:' or 'max:'")

    def best(self) -> tuple[str, str]:
        """(figure, side) by which one more is kept: "min", "max", or "" where it is not said."""
        side, _, figure = self.keep_best.rpartition(":")
        return figure, side


@dataclasses.dataclass(frozen=True)
class EvalSpec:
    every: int = 0  # steps; 0 = only at the end
    batch: int = 32  # rows scored at a time
    stride: int = 0  # tokens newly scored in each window; 0 = half the length
    characters: int = 2**21  # of each held-out source, at most; whole documents
    samples: str = "0.1 0.5 1"  # shares of the run after which continuations are written
    sample_tokens: int = 64
    tasks: str = ""  # of lm-eval, names and YAML files with commas; needs the extra jaxlm[eval]
    tasks_every: int = 0  # steps; 0 = only at the end
    tasks_limit: int = 0  # items of each task, the first ones; 0 = all

    def __post_init__(self):
        _at_least(1, batch=self.batch, characters=self.characters, sample_tokens=self.sample_tokens)
        _at_least(0, every=self.every, stride=self.stride)
        _at_least(0, tasks_every=self.tasks_every, tasks_limit=self.tasks_limit)
        self.shares()

    def shares(self) -> tuple[float, ...]:
        """The shares of the run after which continuations are written."""
        try:
            shares = tuple(float(share) for share in self.samples.split())
        except ValueError:
            shares = (-1.0,)
        if not all(0 < share <= 1 for share in shares):
            raise ValueError(
                f"samples={self.samples!r} holds shares of the run above 0 and up to 1, such as "
                "'0.5 1'; '' writes none"
            )
        return shares


@dataclasses.dataclass(frozen=True)
class LogSpec:
    every: int = 10  # steps
    tensorboard: bool = True
    wandb: str = ""  # project; needs the extra jaxlm[wandb]

    def __post_init__(self):
        _at_least(1, every=self.every)


@dataclasses.dataclass(frozen=True)
class GuardSpec:
    stop_after: int = 10  # updates skipped in a row
    spike_sigmas: float = 0.0  # skip a loss that far above its running mean; 0 = off

    def __post_init__(self):
        _at_least(1, stop_after=self.stop_after)
        _at_least(0, spike_sigmas=self.spike_sigmas)


@dataclasses.dataclass(frozen=True)
class ExpectSpec:
    """What a recipe promises on the machine its docstring names; empty and 0 promise nothing."""

    bits_per_char: str = ""  # at most, by source, e.g. "code=1.30 prose=1.60"
    others: str = ""  # figures of the last evaluation: "loss/chat<=0.5 dpo/accuracy/pairs>=0.9"
    minutes: float = 0.0  # of training, at most

    def __post_init__(self):
        self.figures()
        self.bounds()

    def bounds(self) -> list[tuple[str, str, float]]:
        """(figure, "<=" or ">=", bound) of `others`."""
        found = [re.split("(<=|>=)", part) for part in self.others.split()]
        try:
            return [(name, side, float(bound)) for name, side, bound in found]
        except ValueError:
            raise ValueError(
                f"others={self.others!r} should look like 'loss/chat<=0.5 dpo/accuracy/pairs>=0.9'"
            ) from None

    def figures(self) -> dict[str, float]:
        try:
            return {
                k: float(v) for k, v in (part.split("=") for part in self.bits_per_char.split())
            }
        except ValueError:
            raise ValueError(
                f"bits_per_char={self.bits_per_char!r} should look like 'code=1.30 prose=1.60'"
            ) from None


@dataclasses.dataclass(frozen=True)
class InitSpec:
    checkpoint: str = ""  # a work folder or checkpoint whose params the run starts from
    hf: str = ""  # a Hugging Face folder to start from; its config.json says what the model is

    def __post_init__(self):
        if self.checkpoint and self.hf:
            raise ValueError(
                f"checkpoint={self.checkpoint!r} and hf={self.hf!r}: a run starts from one of them"
            )


@dataclasses.dataclass(frozen=True)
class Run:
    """A checked config: what `train` builds from."""

    name: str
    workdir: Path
    seed: int
    steps: int
    batch: int
    accumulate: int
    method: Method
    profile: range  # steps to trace, counted from 1
    model: DecoderConfig
    optimizer: OptimizerSpec
    data: DataSpec
    mesh: MeshSpec
    checkpoint: CheckpointSpec
    eval: EvalSpec
    log: LogSpec
    guard: GuardSpec
    init: InitSpec
    expect: ExpectSpec
    config: dict[str, Any]  # the resolved config, cut down to the groups in use
    changed: dict[str, list]  # dotted key -> [default, value]
    overridden: tuple[str, ...] = ()  # keys set on the command line that the curve depends on
    notes: tuple[str, ...] = ()  # what of the recipe gave way to them, and what to know besides
    promised: tuple[str, ...] = ()  # expectations set on the command line: judged in any case

    @property
    def judged(self) -> tuple[str, ...]:
        """The fields of `expect` that this run is held to: those of its recipe are for the recipe's
        own settings."""
        return self.promised if self.overridden else ("bits_per_char", "others")

    @property
    def rows(self) -> int:
        """Rows drawn for one step; more than `batch` where the method selects."""
        return self.batch * self.method.oversample

    @property
    def members(self) -> int:
        """Rows of tokens in a row of the batch: 2 where the method reads pairs or feedback."""
        return MEMBERS[READ_AS[self.method.reads][0]]

    @property
    def tokens_per_step(self) -> int:
        return self.batch * self.members * self.data.length

    def check_devices(self, mesh) -> None:
        """Raises `ValueError` if the batch cannot lie on this mesh."""
        ways = rows_divide_by(mesh)
        if self.batch % (self.accumulate * ways):
            raise ValueError(
                f"config.batch={self.batch} must be a multiple of config.accumulate × devices that "
                f"share the batch (data × fsdp) = {self.accumulate} × {ways}"
            )
        if self.data.length % mesh.shape["sequence"]:
            raise ValueError(
                f"config.data.length={self.data.length} must be a multiple of "
                f"config.mesh.sequence={mesh.shape['sequence']}"
            )
        over = self.model.experts_over
        if not experts_fit(self.model, mesh.shape):
            raise ValueError(
                f"config.model.experts={self.model.experts} must be a multiple of "
                f"config.mesh.{over}={mesh.shape[over]} where config.model.experts_over={over!r} "
                "gives each device there whole ones; change the mesh, or leave experts_over empty: "
                "each device then has a slice of every expert's width"
            )


def _at_least(least, **values):
    for name, value in values.items():
        if not value >= least:
            raise ValueError(f"{name}={value} must be at least {least}")
