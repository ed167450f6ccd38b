"""A Hugging Face folder: its config.json, its tensors, and what is wrong with it.

Only safetensors are read, and no code that a folder brings is ever run.
"""

import json
import re
import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from jaxlm.hf import keys, tensors, wrapped
from jaxlm.hf.families import FAMILIES
from jaxlm.hf.family import Family, Json, unread, whole
from jaxlm.hf.links import Link
from jaxlm.hf.tensors import Spec, names_of
from jaxlm.models.options import DTYPES, DecoderConfig

INDEX, SINGLE = "model.safetensors.index.json", "model.safetensors"
KNOWN = FAMILIES.keys() | wrapped.WRAPPERS.keys()


class Told(NamedTuple):
    """What a config.json says."""

    options: Json  # fields of `DecoderConfig`
    family: Family
    config: Json  # config.json as it is, or that of the language model inside (`hf.wrapped`)
    inside: str  # the `model_type` of the larger model; "" = it stands alone


class Source(NamedTuple):
    """A folder whose model we know."""

    path: Path
    config: Json  # as in `Told`
    family: Family
    tensors: dict[str, Spec]  # by the names that the family gives them
    inside: str = ""  # as in `Told`
    others: Mapping[str, int] = {}  # tensors of the larger model that are not taken, by its parts
    adapter: Any = None  # what is added to the tensors (`hf.peft.Adapter`)

    @property
    def options(self) -> DecoderConfig:
        """The model; dtypes are that of most tensors, float32 where it is none that a model has."""
        kinds = [str(tensors.DTYPES.get(spec.code)) for spec in self.tensors.values()]
        dtype = max(DTYPES, key=kinds.count)
        return DecoderConfig(**options(self.path).options, dtype=dtype, param_dtype=dtype)

    @property
    def notes(self) -> list[str]:
        """What somebody may want to know of what was not read."""
        found = []
        if self.inside:
            left = f"; left out are the tensors of {wrapped.told(self.others)}"
            found.append(
                f"of the {self.inside} in {self.path} the text model is taken, a "
                f"{self.family.model_type}, and exported as such{left if self.others else ''}"
            )
        if "auto_map" in self.config:
            found.append(
                "config.json names code of the model's own (auto_map); it is not run, the model "
                f"is taken for a {self.family.model_type}"
            )
        if idle := unread(self.family, self.config):
            found.append(f"keys of config.json that have no meaning here: {names_of(idle)}")
        return found


def is_one(path: Path) -> bool:
    """Whether that looks like a Hugging Face folder."""
    return (path / "config.json").is_file()


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


def options(path: Path) -> Told:
    """The model of a folder, without a look at the tensors.

    Raises `ValueError` if it is no such folder, or a model that we cannot be.
    """
    config = _config(path)
    if (kind := config["model_type"]) not in KNOWN:
        inner = config.get("text_config")
        around = f" (around a {inner.get('model_type')!r})" if isinstance(inner, dict) else ""
        raise ValueError(
            f"{path} holds a model of the architecture {kind!r}{around}, which is not known here; "
            f"known are {', '.join(sorted(KNOWN))}"
        )
    if how := config.get("quantization_config"):
        how = how.get("quant_method", "some method") if isinstance(how, dict) else how
        raise ValueError(
            f"the tensors in {path} are quantized ({how}), which is not supported; take the "
            "model's folder in float32, float16 or bfloat16"
        )
    try:
        inside = kind if kind in wrapped.WRAPPERS else ""
        config = wrapped.config(config) if inside else config
        family = FAMILIES[config["model_type"]]
        keys.require(config, family.reads)
        found = family.options(config)
        whole(DecoderConfig(**found))
        return Told(found, family, config, inside)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None


def open_folder(path: Path) -> Source:
    """Its config and the headers of its files. Raises `ValueError` for whatever is wrong."""
    told, found, others = options(path), _tensors(path), {}
    if told.inside:
        try:
            found, others = wrapped.taken_out(found)
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from None
    found = _with_prefix(found, told.family)
    return Source(path, told.config, told.family, found, told.inside, others)


def require_rows(tokenizer: Any, vocabulary: int, path: Path) -> None:
    """Raises `ValueError` if the model's embedding has no row for some token.

    Rows that no token has are common: they fill the table up to a round number.
    """
    if tokenizer.vocabulary_size > vocabulary:
        raise ValueError(
            f"the tokenizer {tokenizer.name} has {tokenizer.vocabulary_size:,} tokens, and the "
            f"embedding of {path} only {vocabulary:,} rows: they do not belong together"
        )


def _config(path: Path) -> Json:
    require_folder(path)
    if not is_one(path):
        ours = any((path / name).is_file() for name in ("model.json", "run.json"))
        what = ", but what jaxlm wrote: use it as it is, or write one with to-hf" if ours else ""
        raise ValueError(f"{path} is no folder of a Hugging Face model: no config.json{what}")
    try:
        config = json.loads((path / "config.json").read_text())
    except ValueError:
        config = None
    if not isinstance(config, dict) or not isinstance(config.get("model_type"), str):
        raise ValueError(
            f"{path}/config.json is not readable as a model's configuration: it has to be a JSON "
            "object with a model_type"
        )
    return config


def _tensors(path: Path) -> dict[str, Spec]:
    if (path / INDEX).is_file():
        return _sharded(path)
    if (path / SINGLE).is_file():
        return tensors.specs(path / SINGLE)
    if parts := sorted(path.glob("model-*-of-*.safetensors")):
        raise ValueError(f"{path} has {parts[0].name} but no {INDEX}: copy or download that too")
    if others := sorted([*path.glob("*.bin"), *path.glob("*.pt*"), *path.glob("*.h5")]):
        raise ValueError(
            f"{path} holds its tensors as {others[0].name}, which is read by running code in it; "
            "only safetensors are read here. Whoever trusts it can convert it with torch: "
            "AutoModelForCausalLM.from_pretrained(folder).save_pretrained(new_folder)"
        )
    raise ValueError(f"{path} holds no tensors: neither {SINGLE} nor {INDEX}")


def _sharded(path: Path) -> dict[str, Spec]:
    try:
        places: dict[str, str] = json.loads((path / INDEX).read_text())["weight_map"]
        files = sorted(set(places.values()))
        if not all(isinstance(file, str) for file in files):
            raise TypeError
    except (ValueError, KeyError, TypeError, AttributeError):
        raise ValueError(f"{path / INDEX} is not readable as an index of tensors") from None
    if missing := [
        file for file in files if Path(file).name != file or not (path / file).is_file()
    ]:
        raise ValueError(f"{path} lacks {names_of(missing)}, which {INDEX} names; download it too")
    found: dict[str, Spec] = {}
    for file in files:
        here = tensors.specs(path / file)
        found |= {name: spec for name, spec in here.items() if places.get(name, file) == file}
    if lost := places.keys() - found.keys():
        raise ValueError(
            f"{path} is not whole: {INDEX} names tensors that their files do not hold: "
            f"{names_of(f'{name} ({places[name]})' for name in lost)}"
        )
    return found


def _with_prefix(found: dict[str, Spec], family: Family) -> dict[str, Spec]:
    """The names as a model with a head has them: files of the bare model lack the prefix."""
    if any(name.startswith(family.prefix) for name in found):
        return found
    bare = lambda name: not name.startswith("lm_head.") and not name.startswith("embed_out.")
    return {(family.prefix if bare(name) else "") + name: spec for name, spec in found.items()}


def matched(
    source: Source, shapes: Mapping[str, tuple[int, ...]], options: DecoderConfig
) -> list[Link]:
    """The links between our arrays and the tensors of the folder.

    `shapes`: of our arrays by path, with "blocks/<layer>/". Raises `ValueError` that lists the
    tensors that are missing, are of another shape, or have no place in the model.
    """
    links, nameless = source.family.links(list(shapes), options, source.tensors)
    expected = their_shapes(links, shapes)
    there = source.tensors
    lines = []
    if nameless:
        lines.append(
            f"arrays that a {source.family.model_type} has no tensor for: {names_of(nameless)}"
        )
    if missing := expected.keys() - there.keys():
        lines.append(f"missing: {names_of(missing)}")
    unknown = [
        name
        for name in there.keys() - expected.keys()
        if not any(re.fullmatch(pattern, name) for pattern in source.family.harmless)
    ]
    if options.tied:
        unknown = [name for name in unknown if not _is_the_table(source, name, links)]
    if unknown:
        lines.append(f"without a place in the model: {names_of(unknown)}")
    if wrong := [
        f"{name} {list(there[name].shape)} instead of {list(expected[name])}"
        for name in sorted(expected.keys() & there.keys())
        if there[name].shape != expected[name]
    ]:
        more = f" and {len(wrong) - 12} more" if len(wrong) > 12 else ""
        lines.append(f"of another shape: {', '.join(wrong[:12])}{more}")
    floats = {"F64", "F32", "F16", "BF16"}
    if odd := [
        f"{n} ({there[n].code})" for n in expected if n in there and there[n].code not in floats
    ]:
        lines.append(f"neither float32, float16 nor bfloat16: {names_of(odd)}")
    if lines:
        raise ValueError(
            f"the tensors in {source.path} are not those of its config.json "
            f"({source.family.architecture}):\n  " + "\n  ".join(lines)
        )
    return links


def their_shapes(
    links: list[Link], shapes: Mapping[str, tuple[int, ...]]
) -> dict[str, tuple[int, ...]]:
    """Shape of each tensor of theirs."""
    found = {}
    for link in links:
        ours = [jax.ShapeDtypeStruct(shapes[path], np.float32) for path in link.ours]
        theirs = jax.eval_shape(link.form.theirs, *ours)
        found |= {name: x.shape for name, x in zip(link.theirs, theirs, strict=True)}
    return found


def _is_the_table(source: Source, name: str, links: list[Link]) -> bool:
    """Whether a tensor is the head of a tied model, stored once more."""
    table = next((link.theirs[0] for link in links if link.ours[0] == "embed/table"), None)
    if name not in ("lm_head.weight", "embed_out.weight") or table not in source.tensors:
        return False
    head, embedding = tensors.view(source.tensors[name]), tensors.view(source.tensors[table])
    return head.shape == embedding.shape and all(
        np.array_equal(head[i : i + 4096], embedding[i : i + 4096], equal_nan=True)
        for i in range(0, len(head), 4096)
    )
