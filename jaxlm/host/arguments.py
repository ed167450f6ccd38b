"""The flags of a command: written out in full, and a wrong one is told in one sentence."""

import argparse
import difflib
from typing import NoReturn


class Parser(argparse.ArgumentParser):
    """Of `python -m MODULE`."""

    def __init__(self, prog: str, description: str | None = None, **more):
        super().__init__(
            prog=prog,
            description=description,
            formatter_class=argparse.RawDescriptionHelpFormatter,
            allow_abbrev=False,
            **more,
        )

    def _unknown(self, word: str) -> str:
        flag = word.partition("=")[0]
        if not flag.startswith("-"):
            return f"nothing is said by {word!r}: a flag is given as --NAME=VALUE"
        parsers = [self]
        for action in self._actions:
            if isinstance(action, argparse._SubParsersAction):
                parsers += action.choices.values()
        known = [name for parser in parsers for name in parser._option_string_actions]
        near = difflib.get_close_matches(flag, known, 1, 0.5)
        return f"there is no flag {flag}" + (f"; did you mean {near[0]}?" if near else "")

    def error(self, message: str) -> NoReturn:
        _, unknown, words = message.partition("unrecognized arguments: ")
        words = self._unknown(words.split()[0]) if unknown else message.removeprefix("argument ")
        self.exit(2, f"{self.prog}: {words} (--help lists all there are)\n")
