"""Text from a trained model.

    python -m jaxlm.generate --checkpoint=runs/quickstart --prompt="def read(path):"
    python -m jaxlm.generate --checkpoint=... --prompts=questions.jsonl --output=answers.jsonl

Reads the newest good checkpoint, that of --step=N, or with --step=best the one that the run kept as
its best. One prompt is shown with its continuation as it is written; many are generated in batches.
--output writes a JSON object a line: prompt, text, finish ("stop" or "length"), seed, and with
--logprobs the ids and their log-probabilities; until all are there its name ends in .part.
A model that one device cannot hold is spread over all of this machine (--devices=N: over N).
Several processes (see launch/) spread it over all their devices, and process 0 prints.
A model trained for minutes has the style of its text, and no meaning.
"""

from jaxlm.host import process

process.start(__name__)

import itertools
import json
import os
import re
import sys
import textwrap
from pathlib import Path
from typing import Any

import jax

from jaxlm import files, openflags
from jaxlm.generate import prompts as read
from jaxlm.generate.engine import Generator, Request
from jaxlm.generate.programs import STEPS
from jaxlm.generate.prompts import Prompt
from jaxlm.generate.sampling import Sampling
from jaxlm.host import cluster
from jaxlm.host.arguments import Parser
from jaxlm.stored import is_run

SHOWN = 4  # tokens between two looks at the terminal
PART = 256  # answers that are written together
MOST = 10**7  # answers of a call
WIDEST = 90  # characters of a question above its answer


def main() -> int:
    flags = _flags().parse_args()
    sampling, prompts = _checked(flags)
    if where := cluster.place():
        process.hush_libraries()
        facts = {
            "the version of jax": jax.__version__,
            **{f"--{k}": v for k, v in vars(flags).items()},
        }
        cluster.join(where, facts, lambda text: None)
        cluster.agree("what --prompts holds", prompts)
    here = cluster.process() == 0
    say = lambda text: print(text, file=sys.stderr) if here else None
    for note in _notes(flags):
        say(f"Note: {note}")
    opened = openflags.opened(flags, say, every=False)
    tokenizer = opened.tokenizer
    own = is_run(flags.checkpoint)
    ids = read.encoded(prompts, tokenizer, opened.folder, behind_bos=own)
    if flags.keep_end:
        ids = [tokens[-opened.length :] for tokens in ids]
    generate = Generator(opened.lm, opened.length, tokenizer.decode, opened.ends, rows=flags.rows)
    generate.refuse([Request(tokens, flags.tokens) for tokens in ids])
    asked = [
        Request(tokens, flags.tokens, flags.seed + i, tuple(flags.stop))
        for tokens in ids
        for i in range(flags.samples)
    ]
    said = [prompt.messages or prompt.text for prompt in prompts for _ in range(flags.samples)]
    streamed = len(asked) == 1 and not flags.output and not flags.logprobs
    show = streamed and here
    if show:
        print(prompts[0].text, end="", flush=True)

    def answered():
        for start in range(0, len(asked), PART):
            part = slice(start, start + PART)
            with jax.set_mesh(opened.mesh):
                results = generate(
                    opened.params,
                    asked[part],
                    sampling,
                    logprobs=flags.logprobs,
                    on_text=(lambda _, text: print(text, end="", flush=True)) if show else None,
                    steps=SHOWN if streamed else STEPS,  # alike in all processes
                )
            rows = zip(said[part], asked[part], results, strict=True)
            yield [_record(*row, flags.logprobs) for row in rows]

    if show or not here:
        list(answered())
        print(end="\n" if show else "", flush=True)
    else:
        _write(flags, answered(), apart=len(asked) > 1)
    return 0


def _notes(flags):
    """What may not have been meant."""
    for stop in flags.stop:
        if odd := re.search(r"\\[nt]", stop):
            what = {"n": "the end of a line", "t": "a tab"}[odd[0][1]]
            yield (
                f"--stop={stop} has a backslash and the letter {odd[0][1]}; for {what} write "
                f"--stop=$'{stop}', which the shell turns into one"
            )
    if flags.samples > 1 and not flags.temperature:
        yield f"--temperature=0 makes all {flags.samples} samples of a prompt the same"


def _record(prompt, request, result, logprobs):
    record = {"messages" if isinstance(prompt, list) else "prompt": prompt, "text": result.text}
    record |= {"finish": result.finish, "seed": request.seed}
    return {**record, "ids": result.ids, "logprobs": result.logprobs} if logprobs else record


def heading(number: int, record: dict) -> str:
    """The line above an answer on a terminal: its number, and the question of a conversation."""
    messages = record.get("messages") or [{"content": ""}]
    asked = textwrap.shorten(str(messages[-1].get("content", "")), WIDEST, placeholder=" …")
    return f"── {number} {asked}".rstrip()


def _write(flags, parts, apart):
    """Records as they come: printed, `apart` under a heading each, or to a file that has its name
    once it is whole."""
    line = lambda record: json.dumps(record, ensure_ascii=False)
    if not flags.output:
        for i, record in enumerate(itertools.chain.from_iterable(parts), 1):
            if apart and not flags.logprobs:
                print(heading(i, record))
            text = record["text"]
            print(line(record) if flags.logprobs else record.get("prompt", "") + text, flush=True)
        return
    path = Path(flags.output).expanduser()
    half = path.with_name(path.name + ".part")
    with half.open("w", encoding="utf-8") as file:
        for records in parts:
            file.writelines(f"{line(record)}\n" for record in records)
            file.flush()
        os.fsync(file.fileno())
    half.replace(path)


def _checked(flags):
    """How to sample, and the prompts; whatever is wrong with the flags, before anything starts."""
    openflags.refuse(flags)
    for name, least in (("tokens", 1), ("samples", 1), ("rows", 1)):
        if getattr(flags, name) < least:
            raise ValueError(f"--{name}={getattr(flags, name)} must be at least {least}")
    if "" in flags.stop:
        raise ValueError("--stop is empty, which every text has in it; leave it out")
    try:
        sampling = Sampling(
            temperature=flags.temperature,
            top_k=flags.top_k,
            top_p=flags.top_p,
            min_p=flags.min_p,
            repetition_penalty=flags.repetition_penalty,
        )
    except ValueError as error:
        raise ValueError(f"--{error}") from None
    output = files.local(flags.output, "--output")
    if flags.output and output.is_dir():
        raise ValueError(f"--output={flags.output} is a folder; name a file in it")
    if flags.output and output.exists():
        raise ValueError(f"--output={flags.output} is there already; name another file, or move it")
    if flags.output and not output.parent.is_dir():
        raise ValueError(f"--output={flags.output}: there is no folder to write it into")
    if flags.prompts and flags.prompt:
        raise ValueError("--prompt and --prompts are both given; leave one of them out")
    prompts = [Prompt(text) for text in flags.prompt or [""]]
    for n, prompt in enumerate(prompts, 1):
        read.require_letters(prompt, f"prompt {n}")
    if flags.prompts:
        prompts = read.from_file(Path(flags.prompts))
    if (count := len(prompts) * flags.samples) > MOST:
        raise ValueError(
            f"--samples={flags.samples:,} of {len(prompts):,} prompts are {count:,} answers, more "
            f"than the {MOST:,} of one call; ask for some at a time, with --seed for others"
        )
    if flags.chat:
        message = lambda text: [{"role": "user", "content": text}]
        prompts = [p if p.messages else Prompt(messages=message(p.text)) for p in prompts]
    if flags.system:
        prompts = [_behind(flags.system, prompt) for prompt in prompts]
    return sampling, prompts


def _behind(system: str, prompt: Prompt) -> Prompt:
    """The conversation with that message of the system, unless it has one of its own."""
    if not prompt.messages:
        raise ValueError("--system is a message of a conversation: give --chat too")
    if prompt.messages[0]["role"] == "system":
        return prompt
    return Prompt(messages=[{"role": "system", "content": system}, *prompt.messages])


def _flags():
    parser = Parser("python -m jaxlm.generate", __doc__)

    def add(*names, default: Any = None, **more):
        if isinstance(default, float) or type(default) is int:
            more["help"] = f"{more.get('help', '')} (default: {default})".strip()
        parser.add_argument(*names, default=default, **more)

    openflags.add_to(add, "one that holds the model, else all")
    add(
        "--prompt",
        action="append",
        help="text to go on from; empty: a new document; may be given again",
    )
    add("--prompts", default="", help="a file of them: lines, or .jsonl with prompt or messages")
    add(
        "--chat",
        default=False,
        action="store_true",
        help="a prompt is a message, for the chat template",
    )
    add(
        "--system",
        default="",
        help="text of the system's message, for conversations that begin with none",
    )
    add(
        "--keep_end",
        default=False,
        action="store_true",
        help="of a prompt that is too long, read only the end",
    )
    add("--output", default="", help="a .jsonl file to write; without it, the terminal")
    add("--tokens", "--max_new_tokens", type=int, default=128, help="new tokens, at most")
    add("--stop", action="append", default=[], help="text to end before; may be given again")
    add("--samples", type=int, default=1, help="of each prompt, with seeds that count up")
    add("--seed", type=int, default=0)
    add(
        "--logprobs",
        default=False,
        action="store_true",
        help="of the tokens, under the model as it is",
    )
    add("--temperature", type=float, default=0.8, help="0: the likeliest token")
    add("--top_k", type=int, default=0, help="keep this many of the likeliest; 0: all")
    add("--top_p", type=float, default=1.0, help="keep the fewest with this probability together")
    add("--min_p", type=float, default=0.0, help="keep those this likely against the likeliest")
    add("--repetition_penalty", type=float, default=1.0, help="1: none")
    add("--rows", type=int, default=32, help="generated together, at most")
    return parser


if __name__ == "__main__":
    process.run(main, room="generate fewer --rows at a time, or on more --devices")
