"""Tokenizers and chat templates of folders that go to others, or come from them with an adapter.

Whoever trains an adapter saves the tokenizer with it, as PEFT's and TRL's users do: it says what
the adapter was trained on. Where it and the model's differ, the adapter's are right.
"""

import pathlib

from jaxlm.data import chat
from jaxlm.data import tokenizer as tokenizers


def of_run(workdir: pathlib.Path, out: pathlib.Path) -> None:
    """The tokenizer of a run into a folder for others: one made here then puts bos before a text by
    itself, as training did."""
    tokenizers.copy(workdir / "tokenizer", out)
    if (out / "tokenizer.json").is_file():
        tokenizers.begin_with_bos(out)


def with_adapter(base: pathlib.Path, adapter: pathlib.Path, out: pathlib.Path) -> list[str]:
    """The tokenizer and chat template of a model with an adapter merged into it; returns what was
    taken from the adapter's folder that the model's lacks or has otherwise, in sentences."""
    notes = []
    source = base
    if _has_tokenizer(adapter):
        source = adapter
        if not _has_tokenizer(base):
            notes.append("The tokenizer is the adapter's, the model has none.")
        elif not tokenizers.same_ids(tokenizers.load(adapter), tokenizers.load(base)):
            notes.append(
                "The tokenizer is the adapter's, which was trained with it; the model's gives text "
                "other ids."
            )
    tokenizers.copy(source, out)
    trained_with, usual = chat.of_folder(adapter), chat.of_folder(base)
    if trained_with and trained_with != usual:
        what = "has another" if usual else "has none"
        notes.append(
            f"The chat template is the adapter's, which was trained with it; the model {what}."
        )
    template = trained_with or usual
    if template and chat.of_folder(out) != template:
        (out / chat.FILE).write_text(template, encoding="utf-8")
    return notes


def _has_tokenizer(folder: pathlib.Path) -> bool:
    kinds = ("tokenizer.json", "*token*.model", "vocab*")
    return any(path.is_file() for kind in kinds for path in folder.glob(kind))
