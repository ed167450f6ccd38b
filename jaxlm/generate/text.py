"""Tokens become text as they come: stop strings are found across tokens, letters are never cut.

A tokenizer may decode a token by what stands before it (a leading space is dropped at the start of
a text), and a letter may take several tokens. So new tokens are decoded together, behind the last
ones of the prompt, and an unfinished letter at the end is held back.
"""

from collections.abc import Callable, Sequence

BEFORE = 8  # tokens of the prompt that are decoded too
UNFINISHED = "\ufffd"  # what decoding gives for a part of a letter


class Text:
    """The text of one row.

    `decode`: token ids -> text. `stops`: the text ends before the first of them that appears.
    """

    def __init__(self, decode: Callable[[Sequence[int]], str], prompt: Sequence[int], stops=()):
        self.decode, self.stops = decode, tuple(stops)
        self.before = list(prompt[-BEFORE:])
        self.skip = len(decode(self.before).rstrip(UNFINISHED))
        self.ids: list[int] = []
        self.text = ""
        self._told = 0  # characters that `news` has returned

    def add(self, ids: Sequence[int]) -> bool:
        """Takes tokens in, none behind the one that completes a stop string; whether one did."""
        known = len(self.ids)
        self.ids += ids
        self.text = self._decoded(len(self.ids))
        if not any(stop in self.text for stop in self.stops):
            return False
        ends = (n for n in range(known + 1, len(self.ids)) if self._stop(self._decoded(n)) >= 0)
        del self.ids[next(ends, len(self.ids)) :]
        self.text = self._decoded(len(self.ids))
        self.text = self.text[: self._stop(self.text)]
        return True

    def news(self, *, last: bool) -> str:
        """Text that was not returned before; unless `last`, without what may yet change."""
        end = len(self.text)
        if not last:
            end = len(self.text.rstrip(UNFINISHED))
            end -= max((self._begun(stop, end) for stop in self.stops), default=0)
        new = self.text[self._told : end]
        self._told = max(self._told, end)
        return new

    def _decoded(self, count):
        return self.decode([*self.before, *self.ids[:count]])[self.skip :]

    def _stop(self, text):
        """Where the first stop string begins; -1 = nowhere."""
        return min((at for stop in self.stops if (at := text.find(stop)) >= 0), default=-1)

    def _begun(self, stop, end):
        """Characters at the end that may be the beginning of a stop string."""
        most = min(len(stop) - 1, end)
        fits = (n for n in range(most, 0, -1) if stop.startswith(self.text[end - n : end]))
        return next(fits, 0)
