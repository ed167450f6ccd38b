"""What model a folder holds, told from its small files alone; and then its params.

A folder is the work folder of a run, one that `jaxlm.convert` made, or a Hugging Face folder.
"""

import dataclasses
import json
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from jaxlm import config as configs
from jaxlm.data import tokenizer as tokenizers
from jaxlm.hf import folder as hf
from jaxlm.hf import kept, peft
from jaxlm.hf.load import load as load_hf
from jaxlm.models.options import DecoderConfig
from jaxlm.params import load as load_params
from jaxlm.specs import Run


class Stored(NamedTuple):
    """A model that lies on disk."""

    folder: Path
    options: DecoderConfig  # as the folder names it; its vocabulary is known
    length: int  # tokens of context that it was trained with
    tokenizer: Path  # folder of the tokenizer
    generation: dict[str, Any]  # generation_config.json; {} = none
    run: Run | None = None  # that made it
    source: hf.Source | None = None  # of a Hugging Face folder

    @property
    def notes(self) -> list[str]:
        """What somebody may want to know of what was not read."""
        return self.source.notes if self.source else []

    def load(
        self,
        abstract: Any,
        *,
        step: int | None = None,
        how: str = "full",
        say: Callable[[str], None] = print,
        which: str = "",
    ) -> Any:
        """The params as a tree like `abstract`: its shapes, dtypes and shardings; `which`: an extra
        of that name in their place (`params.held`)."""
        if self.source:
            return load_hf(self.source, abstract, self.options)
        return load_params(self.folder, abstract, step=step, how=how, say=say, which=which)


def is_run(folder: str | Path) -> bool:
    """Whether that is the work folder of a run, whatever else lies there."""
    return (Path(folder).expanduser() / "run.json").is_file()


def require_folder(folder: Path) -> None:
    """Raises `ValueError` if there is none, with what may be meant."""
    if folder.is_dir():
        return
    if folder.exists():
        raise ValueError(
            f"{folder} is a file; name the folder that holds the model: {folder.parent}"
        )
    raise ValueError(
        f"there is no folder {folder} (seen from {Path.cwd()}), which is to hold the model; jaxlm "
        "downloads nothing: fetch one of Hugging Face first, as with `hf download OWNER/NAME "
        f"--local-dir {shlex.quote(str(folder))}`"
    )


def look(path: str | Path) -> Stored:
    """The model of a folder. Raises `ValueError` if there is none, or none that we can be."""
    folder = Path(path).expanduser()
    require_folder(folder)
    if is_run(folder):
        return _of_run(folder)
    if found := kept.read(folder):
        length, where = found.length, folder / "tokenizer"
        return Stored(folder, found.options, length, where, found.generation)
    if hf.is_one(folder):
        source = hf.open_folder(folder)
        length, generation = kept.length(source.config), kept.generation(folder)
        return Stored(folder, source.options, length, folder, generation, source=source)
    if (folder / peft.CONFIG).is_file():
        raise ValueError(
            f"{folder} holds an adapter of PEFT and no model; merge it with the model that it "
            f"belongs to: python -m jaxlm.convert from-hf BASE OUT --adapter={folder}"
        )
    raise ValueError(
        f"{folder} holds no model: neither the run.json of a run, nor what jaxlm.convert "
        "makes (model.json), nor a Hugging Face model (config.json)"
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


def _of_run(folder):
    try:
        saved = json.loads((folder / "run.json").read_text())["config"]
    except (OSError, ValueError, KeyError, TypeError):
        raise ValueError(
            f"{folder}/run.json cannot be read as what a run writes of itself"
        ) from None
    run = configs.from_saved(configs.flatten(saved))
    began = kept.read(folder)  # if it was with a Hugging Face model
    where = folder / "tokenizer"
    options = run.model
    if not options.vocabulary:
        size = tokenizers.load(where).vocabulary_size
        options = dataclasses.replace(options, vocabulary=size)
    generation = began.generation if began else {}
    return Stored(folder, options, run.data.length, where, generation, run)
