"""`model.json`: what a folder of ours remembers of the Hugging Face model that it came from.

It stands in the folders that `jaxlm.convert` makes, and in the work folders of runs that started
from such a model, so that the way back gives the same config.json.
"""

import dataclasses
import json
import typing
from pathlib import Path
from typing import Any, NamedTuple

from jaxlm.files import write_atomically
from jaxlm.hf import folder as hf
from jaxlm.hf import keys
from jaxlm.hf.family import Json, whole
from jaxlm.models.options import DecoderConfig

FORMAT = 1


class Kept(NamedTuple):
    options: DecoderConfig
    hf: Json  # config.json, as it was
    generation: Json  # generation_config.json, as it was; {} if there was none
    inside: str = ""  # `model_type` of a larger model that this one was taken out of

    @property
    def length(self) -> int:
        return length(self.hf)


def length(hf: Json) -> int:
    """Tokens of context that a config.json speaks of."""
    return hf.get("max_position_embeddings") or hf.get("n_positions") or 2048


def write(folder: Path, kept: Kept) -> None:
    content = {
        "format": FORMAT,
        "model": dataclasses.asdict(kept.options),
        "hf": kept.hf,
        "generation": kept.generation,
        "inside": kept.inside,
    }
    write_atomically(folder / "model.json", json.dumps(content, indent=1))


def read(folder: Path) -> Kept | None:
    """None if there is no such file. Raises `ValueError` for one that cannot be read."""
    path = folder / "model.json"
    if not path.is_file():
        return None
    try:
        content = json.loads(path.read_text())
        if content["format"] > FORMAT:
            raise ValueError(f"{path} was written by a newer jaxlm; upgrade jaxlm to read it")
        kinds = typing.get_type_hints(DecoderConfig)
        model, inside = content["model"], content.get("inside", "")
        if strange := model.keys() - kinds.keys():
            raise ValueError(
                f"{path} has options that this jaxlm does not know: {', '.join(sorted(strange))}"
            )
        found = Kept(DecoderConfig(**model), content["hf"], content["generation"], inside)
        if not all(isinstance(part, dict) for part in (found.hf, found.generation)):
            raise TypeError
        if odd := [key for key, value in model.items() if not _is(value, kinds[key])]:
            raise ValueError(f"{path} says {odd[0]}={keys.shown(model[odd[0]])}, which cannot be")
    except (json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError, AttributeError):
        raise ValueError(f"{path} is not readable as what jaxlm writes of a model") from None
    try:
        whole(found.options)
        keys.require(found.hf, ())
        keys.require(found.generation, ())
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    return found


def _is(value: Any, kind: type) -> bool:
    return type(value) is kind or (kind is float and type(value) is int)


def of_hf(folder: Path, options: DecoderConfig) -> Kept:
    """What there is to remember of a Hugging Face folder."""
    told = hf.options(folder)
    return Kept(options, told.config, generation(folder), told.inside)


def ends(generation: Json) -> list[int]:
    """The tokens that end a text, as a generation_config.json names them."""
    named = generation.get("eos_token_id")
    return named if isinstance(named, list) else [] if named is None else [named]


def of_generation(said: Json, hf: Json) -> Json:
    """A generation_config.json, and where there is none what config.json says of it, as
    transformers has it."""
    return said or {key: hf[key] for key in ("eos_token_id",) if hf.get(key) is not None}


def generation(folder: Path) -> Json:
    """Its generation_config.json, {} if there is none. Raises `ValueError` for one that is none."""
    path = folder / "generation_config.json"
    if not path.is_file():
        return {}
    try:
        found = json.loads(path.read_text())
    except ValueError:
        found = None
    if not isinstance(found, dict) or not keys.TOKENS.fits(found.get("eos_token_id")):
        raise ValueError(
            f"{path} does not say which tokens end a text: it has to be a JSON object, its "
            "eos_token_id a number or a list of them; repair or remove it"
        )
    return found
