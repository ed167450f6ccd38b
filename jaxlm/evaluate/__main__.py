"""Evaluates a finished model: tasks of lm-eval, bits per character of a corpus, or length limits.

    python -m jaxlm.evaluate --checkpoint=runs/quickstart --tasks=arc_easy,my_task.yaml
        [--num_fewshot=N] [--limit=N] [--include_path=FOLDER] [--chat] [--log_samples]
    python -m jaxlm.evaluate --checkpoint=runs/quickstart --compression=notes.jsonl,src
        [--window=1900] [--stride=512] [--min_k=20] [--text=KEY] [--glob='**/*.py']
    python -m jaxlm.evaluate --checkpoint=runs/dpo --lengths=length_instructed_alpaca_baseline.json
        --chat [--scales=1,0.5,0.3] [--judge=my.module:function] [--limit=N] [--log_samples]

The model lies on all devices of this machine (--devices=N: on N), or of all processes that are
started together (see launch/); process 0 writes. Results are lm-eval's own JSON, in evaluations/ of
a work folder, or in --output=FOLDER; without that those of a Hugging Face folder are shown and not
kept. Nothing is downloaded without --download. docs/evaluation.md says more.
"""

from jaxlm.host import process

process.start(__name__)

import dataclasses
import math
import os
from pathlib import Path
from typing import Any

os.environ.setdefault("TQDM_DISABLE", "1")  # lm-eval's bars; ours is one

import jax

from jaxlm import files, openflags, report
from jaxlm.data.chat import of_folder
from jaxlm.evals import length_files, stream, tasks
from jaxlm.evals.model import Model
from jaxlm.evaluate import answers, compress, lengths, write
from jaxlm.generate import prompts
from jaxlm.host import cluster
from jaxlm.host.arguments import Parser
from jaxlm.host.console import Console
from jaxlm.opened import Opened
from jaxlm.stored import is_run


def main() -> int:
    flags = _flags().parse_args()
    _refuse(flags)
    if where := cluster.place():
        process.hush_libraries()
    with Console(quiet=bool(where and where.process)) as console:
        if where:
            facts: dict[str, Any] = {f"--{k}": v for k, v in vars(flags).items()}
            cluster.join(where, {"the version of jax": jax.__version__, **facts}, console.say)
        for note in process.notes:
            console.warn(note)
        if not _destination(flags):
            console.say("  the figures are shown, and written nowhere: --output=FOLDER keeps them")
        if flags.tasks:
            run_tasks(flags, console)
        if flags.compression:
            run_compression(flags, console)
        if flags.lengths:
            run_lengths(flags, console)
    return 0


def run_tasks(flags, console: Console) -> dict[str, Any]:
    """Loads tasks and model, evaluates, prints the table, writes the files."""
    with console.phase(1, 3, "tasks", "reading the tasks and their data"):
        names = tasks.parse(flags.tasks)
        loaded = tasks.load(names, include=flags.include_path, download=flags.download)
        tasks.require_examples(loaded, flags.num_fewshot)
    model, opened = _opened(flags, console)
    about = _of(flags, opened) | {"model_num_parameters": _parameters(model.params)}
    about |= {"model_dtype": str(jax.tree.leaves(model.params)[0].dtype)}
    lm = model.for_lm_eval(about)
    if flags.chat and not getattr(lm.tokenizer, "chat_template", None):
        raise ValueError(
            f"--chat: the tokenizer of {flags.checkpoint} has no chat template; put "
            "chat_template.jinja beside its tokenizer.json, or leave --chat out"
        )
    cache = None
    if flags.use_cache:
        name = str(Path(flags.use_cache).expanduser())
        how = opened.model, model.length, model.texts.add_bos
        cache = answers.file_of(name, model.params, *how)
    from lm_eval.loggers import EvaluationTracker

    tracker = EvaluationTracker()
    with console.phase(3, 3, "evaluate", "running the requests"):
        results = tasks.evaluate(
            lm,
            loaded,
            writer=cluster.process() == 0,
            model_args={"pretrained": flags.checkpoint} | openflags.told(flags, opened),
            num_fewshot=flags.num_fewshot,
            limit=flags.limit,
            use_cache=cache,
            cache_requests=flags.cache_requests,
            gen_kwargs=flags.gen_kwargs or None,
            apply_chat_template=flags.chat,
            system_instruction=flags.system or None,
            evaluation_tracker=tracker,
        )
    if lm.shortened:
        console.warn(
            f"{lm.shortened:,} contexts were longer than the model's {model.length:,} tokens and "
            "lost their start"
        )
    head, rows = tasks.table(results)
    console.table(rows, head)
    tracker.general_config_tracker.log_end_time()
    told = dataclasses.asdict(tracker.general_config_tracker) | openflags.told(flags, opened)
    _keep(
        flags,
        console,
        lambda folder: write.tasks(folder, results, told, samples=flags.log_samples),
    )
    return results


def run_compression(flags, console: Console) -> dict[str, dict]:
    """Bits per character and MIN-K% of each source: prints the table, writes the files."""
    with console.phase(1, 3, "text", "reading the documents"):
        found = {
            spec.name: compress.read(spec, flags.characters, console.warn)
            for spec in compress.specs(flags.compression, flags.text, flags.glob)
        }
    model, opened = _opened(flags, console)
    stride = flags.stride or stream.stride_of(flags.window)
    compress.fitting(model, flags.window, stride)
    figures, rows = {}, {}
    with console.phase(3, 3, "evaluate", "scoring the text"):
        for name, documents in found.items():
            figures[name], rows[name] = compress.measure(
                model, documents, window=flags.window, stride=stride, percent=flags.min_k
            )
    console.table(
        [
            [
                name,
                f"{f['documents']:,}",
                f"{f['characters']:,}",
                f"{f['tokens']:,}",
                f"{f['bits_per_character']:.4f}",
                *([f"{f['min_k']:.3f}", f"{f['min_k_lowest']:.3f}"] if "min_k" in f else []),
            ]
            for name, f in figures.items()
        ],
        ["source", "documents", "characters", "tokens", "bits/char"]
        + ([f"min-{flags.min_k:g}% mean", "lowest"] if flags.min_k else []),
    )
    about = _of(flags, opened) | {"protocol": "arXiv 2404.09937, the tail scored"}
    kept = rows if flags.log_samples else {}
    _keep(flags, console, lambda folder: write.corpora(folder, figures, kept, about))
    return figures


def run_lengths(flags, console: Console) -> list[dict]:
    """Violations of length limits and what the judge says: prints the table, writes the files."""
    with console.phase(1, 3, "prompts", "reading the prompts and their limits"):
        judge = lengths.judge_of(flags.judge) if flags.judge else None
        asked = lengths.some(length_files.load(flags.lengths, flags.baselines), flags.limit)
        if judge:
            lengths.require_baselines(asked, flags.lengths)
    model, opened = _opened(flags, console)
    if not flags.chat and of_folder(opened.folder):
        console.warn(f"{flags.checkpoint} has a chat template, and is asked without: add --chat")

    def encode(texts: list[str]) -> list[list[int]]:
        if not flags.chat:
            return model.texts.encode(texts)
        said = [prompts.Prompt(messages=_turns(flags.system, text)) for text in texts]
        own = is_run(flags.checkpoint)
        return prompts.encoded(said, opened.tokenizer, opened.folder, behind_bos=own)

    found, rows = [], []
    with console.phase(3, 3, "evaluate", "answering"):
        for scale in lengths.scales(flags.scales):
            figures, some = lengths.measure(
                model,
                asked,
                encode,
                scale=scale,
                tokens=flags.max_tokens,
                judge=judge if cluster.process() == 0 else None,  # which may cost something
            )
            found.append(figures)
            rows += some
    console.table([lengths.row(figures) for figures in found], list(lengths.HEAD))
    if cut := max(figures["cut_off"] for figures in found):
        console.warn(
            f"up to {cut:.0%} of the answers were cut off at --max_tokens={flags.max_tokens}, and "
            "may keep their limit for that alone"
        )
    about = _of(flags, opened) | {"file": flags.lengths, "judge": flags.judge}
    about |= {"chat": flags.chat, "max_tokens": flags.max_tokens}
    kept = rows if flags.log_samples else []
    _keep(flags, console, lambda folder: write.lengths(folder, found, kept, about))
    return found


def _turns(system: str, text: str) -> list[dict[str, str]]:
    """The messages of a prompt."""
    before = [{"role": "system", "content": system}] if system else []
    return [*before, {"role": "user", "content": text}]


def _opened(flags, console) -> tuple[Model, Opened]:
    with console.phase(2, 3, "model", f"opening {flags.checkpoint}"):
        opened = openflags.opened(flags, console.warn, every=True)
        # Training puts a bos before each document, whatever the tokenizer does by itself.
        bos = {"on": True, "off": False}.get(flags.bos, True if is_run(flags.checkpoint) else None)
        model = Model(
            opened.lm,
            opened.params,
            opened.folder,
            opened.mesh,
            opened.length,
            opened.ends,
            tokens=flags.batch_tokens,
            add_bos=bos,
            tick=lambda done, total: console.progress(done, total, unit="request"),
            # Each has read tasks and texts for itself.
            same=lambda requests: cluster.agree("what the model is asked", requests),
        )
        return model, opened


def _destination(flags) -> Path | None:
    """Where results are written; None = nowhere."""
    if flags.output:
        return files.local(flags.output, "--output")
    if is_run(flags.checkpoint):
        return Path(flags.checkpoint).expanduser() / "evaluations"
    return None


def _keep(flags, console, put):
    """Writes results where they belong, in process 0, and makes the page of a work folder anew."""
    if cluster.process() or not (folder := _destination(flags)):
        return
    console.say(f"  results   {put(folder)}")
    if not flags.output:
        console.say(f"  the page  {report.write(folder.parent)}")


def _of(flags, opened: Opened) -> dict[str, Any]:
    """What was evaluated, for the files of results."""
    return {"checkpoint": flags.checkpoint} | openflags.told(flags, opened)


def _parameters(params):
    return sum(leaf.size for leaf in jax.tree.leaves(params))


def _flags():
    parser = Parser("python -m jaxlm.evaluate", __doc__)
    add = parser.add_argument
    openflags.add_to(add, "all")
    add("--batch_tokens", type=int, default=0, help="of a batch on one device; 0: some that fit")
    add(
        "--bos",
        choices=("auto", "on", "off"),
        default="auto",
        help="whether a text begins with the bos; auto: as the tokenizer does, but for work "
        "folders of runs, which are trained with one",
    )
    add("--output", default="", help="folder for the results")
    add("--log_samples", action="store_true", help="keep each item and its answers too")
    add("--limit", type=float, default=None, help="items or prompts; below 1: their share")
    add("--chat", action="store_true", help="put prompts through the tokenizer's chat template")
    add("--system", default="", help="text of the system's message")
    some = parser.add_argument_group("tasks").add_argument
    some("--tasks", default="", help="names, patterns and YAML files, with commas")
    some("--num_fewshot", type=int, default=None, help="solved examples before each question")
    some("--include_path", default="", help="folder with YAML files of more tasks")
    some("--gen_kwargs", default="", help="of tasks that generate: max_gen_toks=64,temperature=0")
    some("--use_cache", default="", help="file for answers, which a later call need not ask again")
    some("--cache_requests", action="store_true", help="keep the requests made of the data")
    some("--download", action="store_true", help="let data sets be fetched from the network")
    more = parser.add_argument_group("compression").add_argument
    more("--compression", default="", help="text files, JSON lines, Parquet, folders, with commas")
    more("--window", type=int, default=stream.WINDOW, help="tokens that the model reads at a time")
    more(
        "--stride",
        type=int,
        default=None,
        help=f"tokens by which windows advance; the share of {stream.STRIDE} in {stream.WINDOW}",
    )
    more("--min_k", type=float, default=stream.MIN_K, help="percent of least likely tokens; 0: off")
    more("--characters", type=int, default=0, help="of each source, at most; whole documents")
    more("--text", default="text", help="key or column that holds the text")
    more("--glob", default="", help="files of a folder: '**/*.py'")
    last = parser.add_argument_group("length limits").add_argument
    last("--lengths", default="", help="a file of AlpacaEval-LI's or MT-Bench-LI's prompts")
    last("--baselines", default="", help="MT-Bench-LI's, where they do not lie beside the prompts")
    last("--scales", default="1", help="what the limits are multiplied by: 1,0.5 or all")
    last("--judge", default="", help="package.module:function, of an evals.length.Comparison")
    last("--max_tokens", type=int, default=1024, help="of an answer, which is cut off there")
    return parser


def _refuse(flags):
    if not (flags.tasks or flags.compression or flags.lengths):
        raise ValueError(
            "nothing to do: give --tasks=NAME,... or --compression=FILE,... or --lengths=FILE"
        )
    openflags.refuse(flags)
    lengths.scales(flags.scales)
    if flags.tasks:
        tasks.require_lm_eval()
    least = {"batch_tokens": 0, "characters": 0, "window": 1, "stride": 1, "min_k": 0}
    least |= {"num_fewshot": 0, "max_tokens": 1}
    for name, low in least.items():
        if (value := getattr(flags, name)) is not None and value < low:
            raise ValueError(f"--{name}={value} must be at least {low}")
    if odd := [one for one in filter(None, flags.gen_kwargs.split(",")) if "=" not in one]:
        raise ValueError(
            f"--gen_kwargs={flags.gen_kwargs}: {odd[0]!r} is no NAME=VALUE, as max_gen_toks=64 is"
        )
    if not flags.min_k <= 100:
        raise ValueError(f"--min_k={flags.min_k:g} is a share in percent, at most 100")
    if flags.limit is not None and not 0 < flags.limit < math.inf:
        raise ValueError(
            f"--limit={flags.limit:g} must be a number above 0; leave it out for all items"
        )
    if (flags.stride or 0) > flags.window:
        raise ValueError(
            f"--stride={flags.stride} would leave tokens unscored: it may be at most "
            f"--window={flags.window}"
        )
    where, folder = cluster.place(), _destination(flags)
    if flags.log_samples and not folder:
        raise ValueError(
            f"--log_samples: {flags.checkpoint} is no work folder of a run, and nothing is written "
            "into it; say where to with --output=FOLDER"
        )
    if folder and not (where and where.process):
        write.require_folder(folder)
    if flags.use_cache and where:
        raise ValueError(
            "--use_cache keeps answers in a file of one process: leave it out where several "
            "processes evaluate together"
        )


if __name__ == "__main__":
    process.run(main, room="take a smaller --batch_tokens, or more devices")
