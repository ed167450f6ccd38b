"""What model a folder holds, told from its small files alone; and then its params.

A folder is the work folder of a run, one that `jaxlm.convert` made, or a Hugging Face folder.
"""

import argparse
import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from jaxlm import config as configs
from jaxlm import params
from jaxlm.data import tokenizer as tokenizers
from jaxlm.hf import folder as hf
from jaxlm.hf import kept, peft
from jaxlm.hf.load import load as load_hf
from jaxlm.models.options import DecoderConfig
from jaxlm.specs import CheckpointSpec, Run

BEST = "best"  # the step of the checkpoint that `config.checkpoint.keep_best` keeps


class Stored(NamedTuple):
    """A model that lies on disk."""

    folder: Path
    options: DecoderConfig  # as the folder names it; its vocabulary is known
    length: int  # tokens of context that it was trained with
    tokenizer: Path  # folder of the tokenizer
    generation: dict[str, Any]  # generation_config.json, or what else is known of it
    run: Run | None = None  # that made it
    source: hf.Source | None = None  # of a Hugging Face folder

    @property
    def notes(self) -> list[str]:
        """What somebody may want to know of what was not read."""
        return self.source.notes if self.source else []

    def find(
        self,
        step: int | str | None = None,
        *,
        which: str = "",
        how: str = "",
        say: Callable[[str], None] = print,
    ) -> Path:
        """Where its params lie, or an extra of a run in their place: see `checkpoint_of`. Raises
        `ValueError` where it has no such step, or no such extra."""
        if which and not self.run:
            raise ValueError(
                f"--params={which}: {self.folder} holds one model and nothing beside it; averages "
                "and references lie in the work folders of runs"
            )
        if not self.source:
            return checkpoint_of(self.folder, step, which=which, how=how, say=say)
        if step is not None:
            raise ValueError(
                f"--step={step}: {self.folder} is a Hugging Face folder, which holds one model "
                "and no steps"
            )
        return self.folder

    def load(self, abstract: Any, place: Path | None = None, *, which: str = "") -> Any:
        """The params as a tree like `abstract`: its shapes, dtypes and shardings. `place`: what
        `find` found; None = the newest."""
        if self.source:
            return load_hf(self.source, abstract, self.options)
        return params.of_checkpoint(place or self.find(), abstract, which=which)


def checkpoint_of(
    folder: Path,
    step: int | str | None = None,
    *,
    which: str = "",
    how: str = "",
    say: Callable[[str], None] = print,
) -> Path:
    """The folder of a checkpoint in a work folder, or in one that `jaxlm.convert` made: the newest
    good one, that of a number, or `BEST`. What is read of it was verified.

    `which`: see `params.held`; `how`: see `checkpoint`; "" = as the run itself does. `say` hears of
    each that is skipped. Raises `ValueError`.
    """
    spec = _keeping(folder)
    how = how or spec.verify
    if step != BEST:
        step = None if step is None else int(step)
        return params.verified(folder, step=step, how=how, which=which, say=say)
    figure, side = spec.best()
    if not figure:
        raise ValueError(
            f"--step={BEST}: {folder} has no best checkpoint, since "
            + ("its config.checkpoint.keep_best is empty" if is_run(folder) else "it is no run")
            + "; leave --step out for the newest, or give it a number"
        )
    best = figure, side == "max"
    found = params.verified(folder, best=best, how=how, which=which, say=say)
    say(f"Note: --step={BEST} is step {int(found.name):,}, by {spec.keep_best}.")
    return found


def a_step(text: str) -> int | str:
    """What --step says."""
    if text != BEST and not text.isdecimal():
        raise argparse.ArgumentTypeError(f"{text!r} is no step: give a number, or {BEST}")
    return text if text == BEST else int(text)


def _keeping(folder: Path) -> CheckpointSpec:
    """What the config of a run says of its checkpoints; the defaults elsewhere."""
    flat = _saved(folder) if is_run(folder) else {}
    known = {f"checkpoint.{field.name}": field.name for field in dataclasses.fields(CheckpointSpec)}
    return CheckpointSpec(**{name: flat[key] for key, name in known.items() if key in flat})


def is_run(folder: str | Path) -> bool:
    """Whether that is the work folder of a run, whatever else lies there."""
    return (Path(folder).expanduser() / "run.json").is_file()


def look(path: str | Path) -> Stored:
    """The model of a folder. Raises `ValueError` if there is none, or none that we can be."""
    folder = Path(path).expanduser()
    hf.require_folder(folder)
    if is_run(folder):
        return _of_run(folder)
    if found := kept.read(folder):
        length, where = found.length, folder / "tokenizer"
        generation = kept.of_generation(found.generation, found.hf)
        return Stored(folder, found.options, length, where, generation)
    if hf.is_one(folder):
        source = hf.open_folder(folder)
        length = kept.length(source.config)
        generation = kept.of_generation(kept.generation(folder), source.config)
        return Stored(folder, source.options, length, folder, generation, source=source)
    if (folder / peft.CONFIG).is_file():
        raise ValueError(
            f"{folder} holds an adapter of PEFT and no model; merge it with the model that it "
            f"belongs to: python -m jaxlm.convert from-hf BASE OUT --adapter={folder}"
        )
    run = next((above for above in folder.absolute().parents[:2] if is_run(above)), None)
    raise ValueError(
        f"{folder} holds no model: neither the run.json of a run, nor what jaxlm.convert "
        "makes (model.json), nor a Hugging Face model (config.json)"
        + (f"; the run is {run}, and --step=N names one of its checkpoints" if run else "")
    )


def behind(path: str | Path) -> Stored | None:
    """The model whose params a start names: of a folder that `look` knows, or of a checkpoint in
    one; None for a checkpoint that lies on its own. Raises `ValueError` if there is no folder."""
    folder = Path(path).expanduser()
    if not folder.is_dir():
        raise ValueError(
            f"config.init.checkpoint={str(path)!r}: there is no such folder (seen from "
            f"{Path.cwd()}); train or convert the model that this run is to start from first"
        )
    of_checkpoint = folder.absolute().parents[:2]  # WORKDIR/checkpoints/STEP
    for place in (folder, *of_checkpoint):
        if is_run(place) or kept.read(place) or hf.is_one(place):
            return look(place)
    return None


def _unreadable(folder: Path) -> ValueError:
    return ValueError(f"{folder}/run.json cannot be read as what a run writes of itself")


def _saved(folder):
    """The flat config of a run."""
    try:
        return configs.flatten(json.loads((folder / "run.json").read_text())["config"])
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        raise _unreadable(folder) from None


def _of_run(folder):
    try:
        run = configs.from_saved(_saved(folder))
    except (KeyError, TypeError, AttributeError):
        raise _unreadable(folder) from None
    began = kept.read(folder)  # if it was with a Hugging Face model
    where = folder / "tokenizer"
    options = run.model
    if not options.vocabulary:
        size = tokenizers.load(where).vocabulary_size
        options = dataclasses.replace(options, vocabulary=size)
    generation = kept.of_generation(began.generation, began.hf) if began else {}
    return Stored(folder, options, run.data.length, where, generation, run)
