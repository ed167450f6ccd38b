"""Hugging Face models to and from folders of jaxlm, on this machine: nothing is downloaded.

    python -m jaxlm.convert from-hf HF_FOLDER OUT [--dtype=float32] [--adapter=PEFT_FOLDER]
    python -m jaxlm.convert to-hf FOLDER OUT [--dtype=bfloat16] [--step=N] [--params=ema]
    python -m jaxlm.convert to-peft FOLDER OUT [--step=N]

from-hf reads a folder with config.json, safetensors and a tokenizer. OUT then serves as
--checkpoint of jaxlm.generate and jaxlm.evaluate and as --config.init.checkpoint; training can
start from the Hugging Face folder itself too, with --config.init.hf=HF_FOLDER. --adapter merges a
LoRA adapter that PEFT has written; a tokenizer or chat template beside it goes before the model's.
to-hf takes such a folder or the work folder of a run, and writes what
AutoModelForCausalLM.from_pretrained(OUT) reads; a run with LoRA is written merged. to-peft writes
its adapter alone, for PeftModel.from_pretrained(model, OUT), with the tokenizer that it belongs to.

Either way only some tensors are in memory at one time, and OUT appears when it is whole.
"""

from jaxlm.host import process

process.start(__name__)

import contextlib
import dataclasses
import errno
import json
import os
import shlex
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax

from jaxlm import files, params, stored
from jaxlm.checkpoint import storage
from jaxlm.data import chat, handed_on
from jaxlm.data import tokenizer as tokenizers
from jaxlm.hf import export, folder, kept, peft, wrapped
from jaxlm.hf.families import FAMILIES
from jaxlm.hf.family import whole
from jaxlm.hf.kept import Kept
from jaxlm.hf.load import stream
from jaxlm.host import cluster
from jaxlm.host.arguments import Parser
from jaxlm.models.options import DTYPES, DecoderConfig, anywhere
from jaxlm.models.transformer import decoder

PART = 2**29  # bytes of arrays written at one time

Say = Callable[[str], None]


def from_hf(
    source: Path, out: Path, *, dtype: str = "", adapter: Path | None = None, say: Say = print
) -> None:
    """A Hugging Face folder as one of ours, with a PEFT adapter merged if one is named.

    Raises `ValueError` for whatever is wrong.
    """
    found = folder.open_folder(source)
    if adapter:
        found = found._replace(adapter=peft.read(adapter, found.inside))
        peft.require_places(found.adapter, found.tensors)
        if others := found.adapter.others:
            say(f"Note: of the adapter are left out the factors for {wrapped.told(others)}.")
    for note in found.notes:
        say(f"Note: {note}.")
    options = found.options
    if dtype:
        options = dataclasses.replace(options, dtype=dtype, param_dtype=dtype)
    abstract = _shapes(options)
    with _new_folder(out) as half:
        kept.write(half, kept.of_hf(source, options))
        _take_tokenizer(source, half / "tokenizer", options, say, adapter)
        about = {"from": str(source.absolute()), "config": dataclasses.asdict(options)}
        parts = _parts(stream(found, abstract, options))
        storage.save_in_parts(half / "checkpoints" / "0", "params", parts, about)


def to_hf(
    source: Path,
    out: Path,
    *,
    dtype: str = "",
    step: int | str | None = None,
    shard_bytes: int = 5 * 10**9,
    which: str = "",
    say: Say = print,
) -> None:
    """One of our folders as a Hugging Face folder; `which`: see `params.held`.

    Raises `ValueError` for whatever is wrong.
    """
    model = _model(source)
    place = stored.checkpoint_of(source, step, which=which, say=say)
    shapes = params.saved_shapes(place, which)
    family = FAMILIES[model.hf["model_type"]]
    if model.inside:
        say(
            f"Note: of the {model.inside} that {source} came from it has the text model alone, and "
            f"is written as such, a {family.model_type}."
        )

    load = lambda names: params.read(place, {name: shapes[name] for name in names}, which)
    with _new_folder(out) as half:
        export.write(
            half, family, model.options, shapes, load, dtype=dtype, shard_bytes=shard_bytes
        )
        if stored.is_run(source):
            handed_on.of_run(source, half)
        elif (source / "tokenizer").is_dir():
            tokenizers.copy(source / "tokenizer", half)
        config = {k: v for k, v in model.hf.items() if k not in ("torch_dtype", "auto_map")}
        config["dtype"] = dtype or str(next(iter(shapes.values())).dtype)
        _write_json(half / "config.json", config)
        if model.generation:
            _write_json(half / "generation_config.json", model.generation)


def to_peft(source: Path, out: Path, *, step: int | str | None = None, say: Say = print) -> str:
    """The adapter of a run with LoRA as a folder of PEFT's; returns what belongs beside it, in a
    sentence. The tokenizer and its chat template lie in that folder too.

    Raises `ValueError` if the run has no adapter.
    """
    place = stored.checkpoint_of(source, step, say=say)
    if not (factors := params.adapter_shapes(place)):
        raise ValueError(f"{source} holds no adapter but a whole model: write it with to-hf")
    knobs = params.adapter_facts(place)
    if lacking := {"rank", "alpha", "dropout", "rslora"} - knobs.keys():
        raise ValueError(
            f"the method that trained {source} does not say its adapter's {sorted(lacking)}, which "
            "PEFT wants to know; write the merged model with to-hf"
        )
    model = _model(source)
    family = FAMILIES[model.hf["model_type"]]

    def load(names):
        wanted = {"params": {name: factors[name] for name in names}}
        return storage.load(place, wanted, "sizes", part=True)["params"]

    if params.is_rounded(place):
        say(
            "Note: this adapter was trained on a base rounded to few bits, and PEFT adds it to the "
            "base as it was, so that its answers differ somewhat from the run's; to-hf writes the "
            "rounded base with the adapter merged, which answers as the run does."
        )
    with _new_folder(out) as half:
        base, sentence = beside_adapter(storage.read(place).about["config"], source)
        shapes = params.saved_shapes(place)
        peft.write(half, family, model.options, knobs, base, shapes, factors, load, model.inside)
        if stored.is_run(source):
            handed_on.of_run(source, half)
    return sentence


def beside_adapter(config: dict[str, Any], source: Path) -> tuple[str, str]:
    """(folder of the model that a run's adapter belongs to, "" = none; how PEFT gets that model),
    by the run's flat config."""
    if folder := config["init.hf"]:
        return folder, f"The model is that of {folder}."
    if folder := config["init.checkpoint"]:
        way = f"python -m jaxlm.convert to-hf {shlex.quote(folder)} BASE"
        return folder, f"The model is that of {folder}; as a Hugging Face folder: {way}."
    return "", (
        "The run started from params of its own, which no folder holds: for a model to load write "
        f"the merged one, python -m jaxlm.convert to-hf {shlex.quote(str(source))} OUT."
    )


def _model(source: Path) -> Kept:
    """Options and config.json of a model folder or of a run."""
    if found := kept.read(source):
        return found
    found = stored.look(source)
    if not found.run:
        raise ValueError(f"{source} is a Hugging Face folder already")
    tokenizer = tokenizers.load(found.tokenizer)
    ids: dict[str, Any] = {"bos_token_id": tokenizer.bos, "eos_token_id": tokenizer.eos}
    if found.run.data.structured:
        ends = sorted(chat.stops(tokenizer, found.tokenizer))
        ids["eos_token_id"] = ends if len(ends) > 1 else ends[0]
    told = export.family_of(found.options).config(whole(found.options)) | ids
    # Of a table of positions that key would be another name of its size.
    length = {} if "n_positions" in told else {"max_position_embeddings": found.length}
    return Kept(found.options, length | told, ids)


def _shapes(options: DecoderConfig):
    """Shapes of the params, one array a layer."""
    plain = dataclasses.replace(anywhere(options), scan_layers="off")
    return jax.eval_shape(decoder(plain, "cpu").init, jax.random.key(0))


def _parts(arrays: Iterator[tuple[str, jax.Array]]) -> Iterator[dict[str, jax.Array]]:
    """Arrays by name, some at a time."""
    part: dict[str, jax.Array] = {}
    for name, array in arrays:
        part[name] = array
        if sum(x.nbytes for x in part.values()) >= PART:
            yield part
            part = {}
    if part:
        yield part


def _take_tokenizer(
    source: Path, target: Path, options: DecoderConfig, say: Say, adapter: Path | None
) -> None:
    if adapter:
        for note in handed_on.with_adapter(source, adapter, target):
            say(f"Note: {note}")
    else:
        tokenizers.copy(source, target)
    if not any(target.iterdir()):
        target.rmdir()
        say("Note: the folder has no tokenizer; text cannot be written or scored without one.")
        return
    folder.require_rows(tokenizers.load(target, str(source)), options.vocabulary, source)


@contextlib.contextmanager
def _new_folder(out: Path) -> Iterator[Path]:
    """A folder next to `out` that takes its name when everything is in it, and is gone otherwise.

    Raises `ValueError` if `out` exists or cannot be written.
    """
    if out.exists():
        raise ValueError(f"{out} exists already: choose another name, or remove it first")
    out = out.absolute()  # Orbax wants it, and mkdtemp of Python 3.11 leaves a folder relative
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        half = Path(tempfile.mkdtemp(prefix=f".{out.name}.half-", dir=out.parent))
    except OSError as error:
        raise ValueError(f"{out} cannot be written ({error.strerror})") from None
    try:
        yield half
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise
        raise ValueError(
            f"{out} could not be written: {error.strerror}. Nothing is left of it; free some space "
            "and run the same command"
        ) from None
    else:
        half.chmod(0o777 & ~_umask())  # a temporary folder is its maker's alone
        half.rename(out)
    finally:
        shutil.rmtree(half, ignore_errors=True)


def _umask() -> int:
    now = os.umask(0)
    os.umask(now)
    return now


def _write_json(path: Path, value) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n")


def main() -> int:
    flags = _flags().parse_args()
    if cluster.place():
        raise ValueError("conversion runs in one process; start it on one host")
    source, out = Path(flags.source).expanduser(), files.local(flags.out, "OUT")
    say = lambda text: print(text, file=sys.stderr, flush=True)
    if flags.way == "from-hf":
        adapter = Path(flags.adapter).expanduser() if flags.adapter else None
        from_hf(source, out, dtype=flags.dtype, adapter=adapter, say=say)
        print(f"{out} is written. {_next(out)}")
    elif flags.way == "to-peft":
        beside = to_peft(source, out, step=flags.step, say=say)
        print(
            f"{out} is written, for peft.PeftModel.from_pretrained(model, {str(out)!r}). {beside}"
        )
    else:
        if not flags.shard_gb > 0:
            raise ValueError(f"--shard_gb={flags.shard_gb} must be greater than 0")
        size = round(flags.shard_gb * 10**9)
        to_hf(
            source,
            out,
            dtype=flags.dtype,
            step=flags.step,
            shard_bytes=size,
            which=flags.params,
            say=say,
        )
        print(f"{out} is written, for AutoModelForCausalLM.from_pretrained({str(out)!r}).")
    return 0


def _next(out: Path) -> str:
    """What can be done with a folder that from-hf made."""
    if (out / "tokenizer").is_dir():
        checkpoint = shlex.quote(f"--checkpoint={out}")
        return f"Try: {sys.executable} -m jaxlm.generate {checkpoint} --prompt=..."
    start = shlex.quote(f"--config.init.checkpoint={out}")
    return (
        f"Without a tokenizer it serves for {start}; for text, put "
        f"tokenizer.json and tokenizer_config.json into {out / 'tokenizer'}."
    )


def _flags():
    parser = Parser("python -m jaxlm.convert", __doc__)
    names = {
        "from-hf": "a Hugging Face folder",
        "to-hf": "a folder of jaxlm's",
        "to-peft": "the work folder of a run with LoRA",
    }
    ways = parser.add_subparsers(dest="way", required=True, metavar=" | ".join(names))
    for way, what in names.items():
        one = ways.add_parser(way, help=f"convert {what}")
        one.add_argument("source", metavar="FOLDER", help=what)
        one.add_argument("out", metavar="OUT", help="the folder to write; must not exist")
        if way != "to-peft":
            kinds = ("", *DTYPES)
            said = "of the tensors; as they are"
            one.add_argument("--dtype", default="", choices=kinds, help=said)
        if way == "from-hf":
            one.add_argument("--adapter", default="", help="a PEFT folder to merge")
        else:
            said = "of the checkpoint, or best; the newest"
            one.add_argument("--step", type=stored.a_step, help=said)
        if way == "to-hf":
            one.add_argument("--shard_gb", type=float, default=5.0, help="a file holds, at most")
            one.add_argument(
                "--params", default="", help="an extra in their place: ema; the params"
            )
    return parser


if __name__ == "__main__":
    process.run(main)
