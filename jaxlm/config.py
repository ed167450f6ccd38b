"""From a recipe's ConfigDict to a checked `Run`.

`ml_collections` is the front end: each key can be set on the command line, its type checked. The
keys come from the dataclasses and from the keyword arguments of the methods, so that nothing is
written twice. Whatever can be wrong with a config is told here, before anything is compiled, in
one sentence that names the key, the value and the remedy (`ValueError`).
"""

import dataclasses
import difflib
import fnmatch
import functools
import typing
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import ml_collections

from jaxlm import files, methods
from jaxlm.contract import Method, compose
from jaxlm.data.examples import READ_AS
from jaxlm.data.prepare import DataSpec
from jaxlm.data.sources import SourceSpec, parse_added
from jaxlm.data.tokenizer import load as load_tokenizer
from jaxlm.figures import check_best, check_figure, wanted_figures
from jaxlm.hf import folder as hf
from jaxlm.hf import kept
from jaxlm.hf.family import RUNTIME
from jaxlm.models.transformer import DecoderConfig
from jaxlm.optim.build import USUAL, OptimizerSpec, settled
from jaxlm.recipe import give_way
from jaxlm.sharding import MeshSpec
from jaxlm.specs import (
    CheckpointSpec,
    EvalSpec,
    ExpectSpec,
    GuardSpec,
    InitSpec,
    LogSpec,
    Run,
)

ConfigDict = Any  # of ml_collections, whose types say that every value may be anything


GROUPS = {
    "model": DecoderConfig,
    "optimizer": OptimizerSpec,
    "data": DataSpec,
    "mesh": MeshSpec,
    "checkpoint": CheckpointSpec,
    "eval": EvalSpec,
    "log": LogSpec,
    "guard": GuardSpec,
    "init": InitSpec,
    "expect": ExpectSpec,
}
TOP = {
    "name": "run",
    "workdir": "",  # empty: runs/<name>
    "seed": 0,
    "steps": 1000,
    "batch": 16,  # rows of one optimizer step, over all devices and micro-batches
    "accumulate": 1,  # micro-batches
    "method": "next_token",
    "profile": "",  # steps to trace, such as "10-14"; empty: none
}
# What a restarted run may change, as patterns: nothing that the curve depends on but by rounding.
FREE = (
    *("workdir", "profile", "expect.*", "mesh.*", "checkpoint.*", "eval.*", "log.*", "accumulate"),
    *("model.remat", "model.attention", "model.scan_layers", "model.loss_chunk"),
    *("model.experts_over", "optimizer.offload", "optimizer.gradient_dtype"),
)
MOST_BFLOAT16 = 256  # equal numbers that bfloat16 can sum before the next one is rounded away
SOURCES = "data.mix.*.source"  # nor the places of its data: a hash tells that it is the same


def defaults() -> ConfigDict:
    """Every key with its default, locked: a recipe's typo is an error, not a new key."""
    c: ConfigDict = ml_collections.ConfigDict(TOP)
    for name, spec in GROUPS.items():
        c[name] = _fields(spec)
    c.data.mix = ml_collections.ConfigDict()
    c.data.add = ""  # more sources from the command line: name:path:weight,...
    for name, method in methods.METHODS.items():
        c[name] = methods.knobs(method)
    c.lock()
    c.data.mix.unlock()
    return c


def source(**keys) -> ConfigDict:
    """One entry of `config.data.mix`, with all keys of a source so that each can be overridden."""
    c: ConfigDict = ml_collections.ConfigDict(
        {k: v for k, v in _fields(SourceSpec).items() if k != "name"}
    )
    c.lock()
    c.update(keys)
    return c


def own_method(c: ConfigDict, name: str) -> None:
    """Gives a method of your own, "package.module:function", its group of knobs in a recipe."""
    group = name.rpartition(":")[2]
    if group in c and group not in methods.METHODS:
        raise ValueError(
            f"the method {name!r} needs another name: {group!r} is a key of the config"
        )
    with c.unlocked():
        c[group] = methods.knobs(methods.resolve(name))
    c.data.mix.unlock()  # locked with the rest when the block ended


def check(c: ConfigDict, overrides: Iterable[str] = ()) -> Run:
    """Builds and checks the run that a config describes. Raises `ValueError` for people.

    `overrides`: the keys that did not come from the recipe.
    """
    for key in ("steps", "batch", "accumulate"):
        if c[key] < 1:
            raise ValueError(f"config.{key}={c[key]} must be at least 1")
    if c.eval.stride > c.data.length:
        raise ValueError(
            f"config.eval.stride={c.eval.stride} would leave tokens unscored: it may be at most "
            f"config.data.length={c.data.length}"
        )
    overrides = tuple(overrides)
    c, notes = give_way(c, overrides)
    if c.init.hf:
        c, more = _with_model_of_hf(c, overrides)
        notes += more
    if 0 < c.model.learned_positions < c.data.length:
        raise ValueError(
            f"config.data.length={c.data.length} is more than the table of positions holds: set it "
            f"to config.model.learned_positions={c.model.learned_positions} at most"
        )
    groups = {name: _build(spec, c[name], name) for name, spec in GROUPS.items() if name != "data"}
    groups["optimizer"] = settled(groups["optimizer"])
    if groups["optimizer"].offload:
        groups["model"] = _stacked(groups["model"])
    method, used = _method(c)
    data = _data(c.data, c.method, method.reads)
    workdir = c.workdir or f"runs/{c.name}"
    data = _with_kept_tokenizer(data, files.local(workdir, "config.workdir"))
    check_best(c, groups["checkpoint"], data, method)
    promised = tuple(key.split(".")[1] for key in overrides if key.startswith("expect."))
    for key, figure in wanted_figures(groups["expect"], promised):
        check_figure(f"config.{key}", figure, data, method)
    _check_routes(method, [source.name for source in data.sources])
    if method.select and method.reads != "rows":
        raise ValueError(
            f"config.method={c.method!r} selects rows of text, and its objective reads "
            f"{method.reads}; leave the selection out"
        )
    if method.objective is None:
        raise ValueError(
            f"config.method={c.method!r} has no objective; add one, as in "
            f"'next_token + {c.method}' or 'dpo + {c.method}'"
        )
    if late := [b.every for b in method.between if b.every >= c.steps > 1]:
        raise ValueError(
            f"config.method={c.method!r}: what happens every {late[0]} steps would change nothing "
            f"in the config.steps={c.steps} of this run; set its `every` well below that"
        )
    if c.accumulate > 1 and not method.separable:
        raise ValueError(f"config.method={c.method!r} is no sum over rows: set config.accumulate=1")
    if c.optimizer.gradient_dtype == "bfloat16" and not 1 < c.accumulate <= MOST_BFLOAT16:
        raise ValueError(
            f"config.optimizer.gradient_dtype={c.optimizer.gradient_dtype!r} is for sums of 2 to "
            f"{MOST_BFLOAT16} micro-batches, and config.accumulate={c.accumulate}: "
            + (
                "there is nothing to sum; leave it out"
                if c.accumulate == 1
                else "the last ones would be rounded away in bfloat16; leave it out"
            )
        )
    if c.accumulate > 1 and c.model.experts and c.model.router_balance:
        notes += (
            f"experts are evened out within each micro-batch of {c.batch // c.accumulate} rows, so "
            f"config.accumulate={c.accumulate} is not quite what 1 is "
            f"(config.model.router_balance={c.model.router_balance:g})",
        )
    unused = set(methods.METHODS) - used
    if idle := [key for key in overrides if key.split(".")[0] in unused]:
        group = idle[0].split(".")[0]
        raise ValueError(
            f"config.{idle[0]} is set, and nobody reads it: config.method={c.method!r} does not "
            f"name {group}; leave it out, or join {group} to the method with a +"
        )
    flat = {k: v for k, v in flatten(c.to_dict()).items() if k.split(".")[0] not in unused}
    flat["workdir"] = workdir
    flat |= {f"optimizer.{key}": getattr(groups["optimizer"], key) for key in USUAL}
    return Run(
        **groups,
        **{k: c[k] for k in ("name", "seed", "steps", "batch", "accumulate")},
        workdir=Path(workdir).expanduser(),
        method=method,
        profile=_profile(c.profile, c.steps),
        data=data,
        config=flat,
        changed=_changed(flat),
        overridden=tuple(key for key in overrides if not _is_free(key)),
        notes=notes,
        promised=promised,
    )


def _with_model_of_hf(
    c: ConfigDict, overrides: tuple[str, ...]
) -> tuple[ConfigDict, tuple[str, ...]]:
    """The config with the model of `c.init.hf`, and its tokenizer unless another one is named; and
    a sentence about each key of a recipe that gave way to a folder of the command line.

    A run that has begun is what it was, whatever has become of the folder.
    """
    folder, usual = Path(c.init.hf).expanduser(), defaults()
    workdir = Path(c.workdir or f"runs/{c.name}").expanduser()
    began = kept.read(workdir) if _has_begun(workdir) else None
    if began:
        found, kind = dataclasses.asdict(began.options), began.hf.get("model_type")
    else:
        told = hf.options(folder)
        found, kind = told.options, told.family.model_type
    asked = lambda key: key in overrides or "init.hf" not in overrides  # or it may give way
    whole = {key: found.get(key, value) for key, value in _fields(DecoderConfig).items()}
    other = {
        f"model.{key}": (value, whole[key])
        for key, value in c.model.items()
        if key not in RUNTIME
        and (value != usual.model[key] or f"model.{key}" in overrides)
        and value != whole[key]
    }
    if wrong := [f"{k[6:]}={v!r} (there {there!r})" for k, (v, there) in other.items() if asked(k)]:
        raise ValueError(
            f"config.init.hf={c.init.hf!r} is a {kind} whose config.json says "
            f"otherwise than config.model: {', '.join(wrong)}; leave these keys out"
        )
    c = c.copy_and_resolve_references()
    c.model.update({key: value for key, value in whole.items() if key not in RUNTIME})
    if c.data.tokenizer == usual.data.tokenizer and "data.tokenizer" not in overrides:
        c.data.tokenizer = str(folder)
    elif not asked("data.tokenizer") and c.data.tokenizer != str(folder):
        other["data.tokenizer"] = c.data.tokenizer, str(folder)
        c.data.tokenizer = str(folder)
    if not began and Path(c.data.tokenizer).expanduser().is_dir():
        hf.require_rows(load_tokenizer(Path(c.data.tokenizer)), c.model.vocabulary, folder)
    return c, tuple(
        f"config.{key}={there!r}: config.init.hf has it so, and the recipe's is {value!r}"
        for key, (value, there) in other.items()
    )


def _with_kept_tokenizer(data: DataSpec, workdir: Path) -> DataSpec:
    """With the tokenizer that a run has kept, where the folder that it came from is gone."""
    there = data.tokenizer in ("bpe", "byte") or Path(data.tokenizer).expanduser().is_dir()
    if there or not _has_begun(workdir):
        return data
    return dataclasses.replace(data, tokenizer=str(workdir / "tokenizer"))


def _has_begun(workdir: Path) -> bool:
    """Whether a run has written there what it is, and kept what it is made of."""
    return (workdir / "run.json").is_file()


def differences(old: dict[str, Any], new: dict[str, Any]) -> list[str]:
    """What keeps a run from being continued: one line per key that differs and matters."""
    lines = []
    for key in sorted(old.keys() | new.keys()):
        was, now = _plain(old.get(key)), _plain(new.get(key))
        if was != now and not _is_free(key) and not fnmatch.fnmatchcase(key, SOURCES):
            lines.append(f"{key}: {was!r} there, {now!r} here")
    return lines


def _is_free(key):
    return any(fnmatch.fnmatchcase(key, pattern) for pattern in FREE)


def flatten(tree: dict, prefix: str = "") -> dict[str, Any]:
    """{"a": {"b": 1}} -> {"a.b": 1}."""
    flat = {}
    for key, value in tree.items():
        if isinstance(value, dict):
            flat |= flatten(value, f"{prefix}{key}.")
        else:
            flat[prefix + key] = value
    return flat


def nest(flat: dict[str, Any]) -> dict:
    """The opposite of `flatten`."""
    tree: dict = {}
    for key, value in flat.items():
        *groups, last = key.split(".")
        functools.reduce(lambda t, g: t.setdefault(g, {}), groups, tree)[last] = value
    return tree


def from_saved(flat: dict[str, Any]) -> Run:
    """The run that a checkpoint or run.json describes, for generation and evaluation."""
    c = defaults()
    for name in (part.strip() for part in flat["method"].split("+")):
        if ":" in name:
            own_method(c, name)
    for key, value in flat.items():
        *groups, last = key.split(".")
        if groups[:2] == ["data", "mix"] and groups[2] not in c.data.mix:
            c.data.mix[groups[2]] = source()
        group = functools.reduce(lambda t, g: t[g], groups, c)
        if key == "init.hf":
            continue  # where the params came from; what the model is stands in its keys
        if last in group:
            group[last] = tuple(value) if isinstance(value, list) else value
    return check(c)


# ---------------------------------------------------------------- building the parts


def _fields(spec) -> dict[str, Any]:
    """Field -> default of a dataclass, cast by annotation: a float knob written 1 takes 0.5 too."""
    kinds = typing.get_type_hints(spec)
    plain = (bool, int, float, str)
    out = {}
    for field in dataclasses.fields(spec):
        if kinds[field.name] in plain:
            default = "" if field.default is dataclasses.MISSING else field.default
            out[field.name] = kinds[field.name](default)
    return out


def _build(spec, group: ConfigDict, name: str):
    try:
        return spec(**{k: v for k, v in group.items() if k in _fields(spec)})
    except ValueError as e:
        raise ValueError(f"config.{name}: {e}") from None


def _stacked(model: DecoderConfig) -> DecoderConfig:
    """The model for moments that lie on the hosts and come back a layer at a time, wherever it is
    trained or planned. Raises `ValueError` where its layers are to lie one by one."""
    if model.scan_layers == "off":
        raise ValueError(
            "config.optimizer.offload=True brings moments back a layer at a time, and "
            "config.model.scan_layers='off' does not stack the layers: leave one of them out"
        )
    return dataclasses.replace(model, scan_layers="on")


def _data(group: ConfigDict, method: str, reads: str) -> DataSpec:
    """The data group and its mixture; a source's name is its key in the mixture.

    Raises `ValueError` for a source that does not give what the method reads.
    """
    sources = [SourceSpec(name=name, **dict(entry)) for name, entry in group.mix.items()]
    sources += parse_added(group.add)
    if not sources:
        raise ValueError(
            "the mixture is empty: set config.data.mix in the recipe, or "
            "--config.data.add=name:path:weight"
        )
    known = READ_AS[reads]
    for i, each in enumerate(sources):
        if each.format and each.format not in known:
            raise ValueError(
                f"source {each.name!r} has format={each.format!r}, and config.method={method!r} "
                f"reads {reads}: set config.data.mix.{each.name}.format to "
                f"{' or '.join(map(repr, known))}, or choose another method"
            )
        sources[i] = dataclasses.replace(each, format=each.format or known[0])
    keys = {k: v for k, v in group.items() if k not in ("mix", "add")}
    return DataSpec(sources=tuple(sources), **keys)


def _method(c: ConfigDict) -> tuple[Method, set[str]]:
    """The composed method, and the names of the groups it reads."""
    parts, used, live = [], set(), []
    for name in (part.strip() for part in c.method.split("+")):
        make = methods.resolve(name)
        group = name.split(":")[-1]
        used.add(group)
        try:
            parts.append(make(**dict(c.get(group, {}))))
        except ValueError as e:
            raise ValueError(f"config.{group}: {e}") from None
        live += [f"config.{group}.{k}='live'" for k in parts[-1].columns if k in c.get(group, {})]
    try:
        return compose(*parts), used
    except ValueError as e:
        hint = f" (set {', '.join(live)})" if live and "before training" in str(e) else ""
        raise ValueError(f"config.method={c.method!r}: {e}{hint}") from None


def _profile(text: str, steps: int) -> range:
    """The steps to trace; an empty range for none."""
    if not text:
        return range(0)
    first, dash, last = text.partition("-")
    number = lambda digits: int(digits) if digits.isascii() and digits.isdecimal() else 0
    begin, end = number(first), number(last if dash else first)
    if not 1 <= begin <= end <= steps:
        raise ValueError(
            f"config.profile={text!r} is no range of steps such as '10-14', counted from 1 and up "
            f"to config.steps={steps}; '' traces none"
        )
    return range(begin, end + 1)


def _check_routes(method: Method, sources: list[str]):
    """That the sources which a method names are in the mixture."""
    for field, names in method.routes.items():
        for name in set(names) - set(sources):
            near = difflib.get_close_matches(name, sources, 1)
            hint = f"did you mean {near[0]!r}?" if near else f"there are {', '.join(sources)}"
            raise ValueError(f"{field}_sources names {name!r}, which is no source; {hint}")


def _changed(flat):
    known = flatten(defaults().to_dict())
    usual = settled(OptimizerSpec(flat["optimizer.name"]))
    known |= {f"optimizer.{key}": getattr(usual, key) for key in USUAL}
    of_source = source().to_dict()
    for key in flat:
        if key.startswith("data.mix."):
            known[key] = of_source.get(key.split(".")[-1])
    return {k: [known.get(k), v] for k, v in flat.items() if _plain(known.get(k)) != _plain(v)}


def _plain(value):
    """Tuples and lists alike, as JSON brings them back."""
    return list(value) if isinstance(value, tuple) else value
