"""What all launchers share: options before `--`, the command after it, faults in one sentence.

Standard library only, so that a login node needs nothing but Python.
"""

import argparse
import difflib
import re
import shlex
import sys
from collections.abc import Callable
from typing import NoReturn

# How a jaxlm command ends, and what a launcher does then. 0: finished. 1 and 2: something that the
# user has to mend, and that would happen again: it stops. Anything else is worth another start:
# 143 asked to stop, and saved; 70 crashed; 75 another process was lost; 137 killed.
MEND = (1, 2)


class Parser(argparse.ArgumentParser):
    """Options as `--nodes=2`, help that shows defaults, and one sentence for a wrong one."""

    def __init__(self, module: str, about: str):
        super().__init__(
            prog=f"python -m {module}",
            usage=f"python -m {module} [OPTIONS] -- python -m jaxlm.train --config=RECIPE ...",
            description=about,
            epilog="Everything after -- is the jaxlm command; it is started as it stands.",
            formatter_class=argparse.RawDescriptionHelpFormatter,
            allow_abbrev=False,
        )
        self.add_argument("--name", default="jaxlm", help="of the job (jaxlm)")
        self.add_argument(
            "--dry_run", action="store_true", help="print what would be submitted, and stop"
        )

    def error(self, message: str) -> NoReturn:
        print(f"{self.prog}: {message}{meant(message, self)}", file=sys.stderr)
        raise SystemExit(2)

    def split(self, argv: list[str]) -> tuple[argparse.Namespace, list[str]]:
        """The options, and the command that follows `--`."""
        cut = argv.index("--") if "--" in argv else len(argv)
        options = self.parse_args(argv[:cut])
        command = argv[cut + 1 :]
        if not command:
            self.error("no command: put -- and then the jaxlm command behind the options")
        if not re.fullmatch(r"[a-z]([a-z0-9-]{0,38}[a-z0-9])?", options.name):
            self.error(
                f"--name={options.name} may hold lower-case letters, digits and dashes, up to 40, "
                "a letter first and no dash last"
            )
        return options, command


def meant(message: str, parser: argparse.ArgumentParser) -> str:
    """The option nearest to the one that argparse says it does not know; "" for other faults."""
    _, unknown, words = message.partition("unrecognized arguments: ")
    if not unknown:
        return ""
    word = words.split()[0].partition("=")[0]
    near = difflib.get_close_matches(word, parser._option_string_actions, 1, 0.5)
    return f"; did you mean {near[0]}?" if near else "; --help lists all there are"


def at_least(least: int) -> Callable[[str], int]:
    """A whole number, for `type=` of an option."""

    def number(text: str) -> int:
        if not text.isdecimal() or int(text) < least:
            raise argparse.ArgumentTypeError(f"{text!r} must be a whole number, at least {least}")
        return int(text)

    return number


def matching(pattern: str, example: str) -> Callable[[str], str]:
    """Text of a form, for `type=` of an option."""

    def checked(text: str) -> str:
        if not re.fullmatch(pattern, text):
            raise argparse.ArgumentTypeError(f"{text!r} should look like {example}")
        return text

    return checked


def environment(parser: Parser, pairs: list[str]) -> dict[str, str]:
    """--env=NAME=VALUE options as a dict."""
    found = {}
    for pair in pairs:
        name, equals, value = pair.partition("=")
        if not equals or not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", name):
            parser.error(f"--env={pair} should look like --env=NAME=VALUE")
        found[name] = value
    return found


def workdir(command: list[str]) -> str | None:
    """The work folder that a command names, "" if it leaves it to the recipe (a relative one, as a
    rule); None if it does not train."""
    if "jaxlm.train" not in command:
        return None
    found = ""
    for word, after in zip(command, [*command[1:], ""], strict=True):
        name, equals, value = word.partition("=")
        if name in ("--config.workdir", "-config.workdir"):
            found = value if equals else after
    return found


def require_shared_workdir(parser: Parser, command: list[str], hosts: int) -> None:
    """Ends with a sentence where several hosts would train into folders of their own."""
    named = workdir(command)
    if hosts > 1 and named is not None and not named.startswith("/"):
        said = f"--config.workdir={named} is" if named else "without --config.workdir it is"
        parser.error(
            f"{hosts} hosts train into one work folder, and {said} a folder of each one's own: "
            "name one on a file system that all of them share, such as --config.workdir=/mnt/runs/a"
        )


def line(command: list[str]) -> str:
    """A command as one line of shell."""
    return shlex.join(command)
