"""Texts to ids for evaluation, through the tokenizer's own `transformers` class.

Training puts bos and eos around documents itself (`jaxlm.data.tokenizer`); a published figure is of
what the tokenizer does by itself when it is asked for the ids of a text, and only `transformers`
knows that of every model. Its import takes seconds, so it waits until it is needed.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jaxlm.data.tokenizer import of_transformers


class Texts:
    """`add_bos`: whether a text begins with the bos (or eos, where there is none); None = as the
    tokenizer does by itself."""

    def __init__(self, tokenizer: Any, add_bos: bool | None = None):
        self.tokenizer, self.add_bos = tokenizer, add_bos
        bos, eos = tokenizer.bos_token_id, tokenizer.eos_token_id
        if bos is None and eos is None:
            raise ValueError(
                f"the tokenizer {tokenizer.name_or_path} names neither a bos nor an eos token, and "
                "a text with nothing before it needs one; add eos_token to its "
                "tokenizer_config.json"
            )
        self.prefix: int = eos if bos is None else bos  # what stands for "nothing before it"
        self._prefix_text = tokenizer.decode(self.prefix)

    def encode(self, texts: Sequence[str], special: bool | None = None) -> list[list[int]]:
        """Ids of each text. `special`: with what the tokenizer puts around it; None = as `add_bos`
        says, and without where the text itself begins with the bos."""
        has_bos = [special is None and text.startswith(self._prefix_text) for text in texts]
        chosen = self.add_bos if special is None else special
        found: list[list[int]] = [[] for _ in texts]
        for bos in (False, True):
            here = [i for i, has in enumerate(has_bos) if has == bos]
            now = False if bos else chosen
            kwargs = {} if now is None else {"add_special_tokens": now}
            if here:
                rows = self.tokenizer([texts[i] for i in here], **kwargs)["input_ids"]
                for i, row in zip(here, rows, strict=True):
                    needed = self.add_bos and now and row[:1] != [self.prefix]
                    found[i] = [self.prefix, *row] if needed else row
        return found


def load(folder: Path, add_bos: bool | None = None) -> Texts:
    """The tokenizer of a folder. Raises `ValueError` where there is none."""
    return Texts(of_transformers(folder), add_bos)
