"""What is to be continued: prompts from the command line or a file, as tokens.

A file holds one prompt a line; one whose name ends in .jsonl holds objects with `prompt` (or
`text`), a text to go on from, or with what training reads as a conversation (`messages`,
`conversations`, a `prompt` of messages, a column `system`; `data.examples`). That goes through the
chat template of the tokenizer's folder, without the answer it may end with. Templates run in
transformers' sandbox; nothing is downloaded and no code from the folder is run.
"""

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from jaxlm.data.chat import Template, of_folder
from jaxlm.data.examples import Malformed, Useless, question
from jaxlm.data.tokenizer import Tokenizer, of_transformers

NO_TEXT = ("messages", "conversations", "system", "instruction")
"""Columns that make a row a conversation."""


class Prompt(NamedTuple):
    """A text to go on from, or the messages of a conversation."""

    text: str = ""
    messages: Sequence[dict[str, Any]] = ()


def from_file(path: Path) -> list[Prompt]:
    """The prompts of a file. Raises `ValueError` naming the line that is none."""
    try:
        text = path.expanduser().read_text(encoding="utf-8-sig")  # some editors put a mark in front
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"the prompts {str(path)!r} cannot be read: {error}") from None
    # Not `splitlines`: a prompt may hold Unicode's separators, which JSON leaves as they are.
    lines = text.removesuffix("\n").split("\n") if text else []
    kind = path.suffix.lower()
    if kind == ".json":
        raise ValueError(
            f"the prompts {str(path)!r}: read are lines of text, or of JSON where the name ends in "
            ".jsonl; write an object a line, and rename it"
        )
    if kind == ".jsonl":
        rows = [_parsed(line, f"{path}:{n}") for n, line in enumerate(lines, 1) if line.strip()]
        found = [prompt for prompt, _ in rows]
        if answered := sum(cut for _, cut in rows):
            said = f"{path}: {answered:,} conversations end with an answer, which is not asked with"
            print(f"{said}; the model answers in its place", file=sys.stderr)
    else:
        found = [Prompt(line) for line in lines]
    if not found:
        raise ValueError(f"{path} holds no prompt")
    for n, prompt in enumerate(found, 1):
        require_letters(prompt, f"prompt {n} of {path}")
    return found


def require_letters(prompt: Prompt, where: str) -> None:
    """Raises `ValueError` for half a letter: from JSON, or a shell that does not speak UTF-8."""
    try:
        prompt.text.encode()
    except UnicodeEncodeError as error:
        half = error.object[error.start]
        raise ValueError(
            f"{where} holds {half!r}, half a surrogate pair, which UTF-8 cannot hold"
        ) from None


def _parsed(line, where) -> tuple[Prompt, bool]:
    """The prompt of a line, and whether it had an answer that was left out."""
    try:
        row = json.loads(line)
    except ValueError as error:
        raise ValueError(f"{where} is no JSON: {error}") from None
    if not isinstance(row, dict):
        raise ValueError(f"{where} is no JSON object")
    text = row["prompt"] if row.get("prompt") is not None else row.get("text")
    if isinstance(text, str) and not any(row.get(key) for key in NO_TEXT):
        return Prompt(text), False
    try:
        messages, answered = question(row)
    except (Malformed, Useless) as why:
        raise ValueError(
            f"{where} has neither a prompt, a text, nor messages, a list of "
            f'{{"role": ..., "content": ...}}: {why}'
        ) from None
    return Prompt(messages=messages), answered


def encoded(
    prompts: Sequence[Prompt], tokenizer: Tokenizer, folder: Path, *, behind_bos: bool
) -> list[list[int]]:
    """The tokens of each prompt: messages as the template of `folder` says, a text as in training.

    `behind_bos`: every text stood behind bos, as in our runs. Else it is what the tokenizer of
    `folder` makes of it by itself (Qwen's has no bos); an empty one is bos all the same.
    """
    texts = [p.text for p in prompts if not p.messages]
    if behind_bos:
        ids = iter([tokenizer.bos, *found] for found in tokenizer.encode_batch(texts))
    else:
        theirs = of_transformers(folder) if texts else None
        ids = iter(theirs(text)["input_ids"] or [tokenizer.bos] for text in texts if theirs)
    template = None
    if any(p.messages for p in prompts):
        # A run of ours was trained with one date, other models with that of the day.
        template = chat_template(tokenizer, folder, today=not behind_bos)
    asked = lambda p: _answerable(template, p.messages, folder) if template else []
    return [asked(p) if p.messages else next(ids) for p in prompts]


def chat_template(tokenizer: Tokenizer, folder: Path, *, today: bool) -> Template:
    """The template of a folder. Raises `ValueError` where there is none."""
    if not (text := of_folder(folder)):
        raise ValueError(
            f"{folder} has no chat template, so there is no telling how a conversation is "
            "written; give the prompt as text, as the model is to read it"
        )
    return Template(text, tokenizer, folder, today)


def _answerable(template, messages, folder):
    """Tokens up to where the answer begins."""
    try:
        return template.prompt(messages)
    except Malformed as why:
        raise ValueError(f"{folder}: {why}") from None
