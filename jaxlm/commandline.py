"""The command line of what takes a recipe: `--config=FILE --config.key=value ...`.

`ml_collections` parses it; here its tracebacks become one line that names the wrong flag, the
nearest key and the remedy.
"""

import difflib
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from absl import flags
from ml_collections import config_flags

from jaxlm import methods
from jaxlm.config import check, defaults, flatten, source
from jaxlm.specs import Run


def parse(
    argv: list[str], usage: str | None, define: Callable[[Any], None] | None = None
) -> tuple[Run, Any]:
    """Reads `--config=FILE --config.key=value ...`; returns the checked run and the other flags.

    `define` puts a command's own flags in the place of --dry_run. Exits with one line for a key,
    value or file that is wrong.
    """
    values, argv = flags.FlagValues(), joined(argv)
    config_flags.DEFINE_config_file(
        "config", None, "The recipe.", flag_values=values, sys_argv=argv
    )
    (define or _define_dry_run)(values)
    if any(a in ("--h", "--help") for a in argv[1:]):
        print((usage or "").strip())
        raise SystemExit(0)
    _refuse_missing_recipe(value_of("config", argv).split(":")[0])
    try:
        rest = values(argv)
        if values["config"].value is None:
            raise ValueError("no recipe given: add --config=configs/quickstart.py, say")
        if len(rest) > 1:
            raise ValueError(f"{rest[1]!r} is no flag; keys are set like --config.steps=100")
        c, overrides = values["config"].value, config_flags.get_override_values(values["config"])
    except SyntaxError as e:
        raise SystemExit(f"config: {e.filename}, line {e.lineno}: {e.msg}") from None
    except (AttributeError, KeyError, ValueError, TypeError, OSError, flags.Error) as e:
        raise SystemExit(f"config: {_for_people(e, argv)}") from None
    return check(c, overrides), values


def joined(argv: list[str]) -> list[str]:
    """The words of a command line with --name=value for each `--name value` and `-name value`.

    absl reads all of these, but we look at them too: before it does, and for what went wrong.
    """
    found = argv[:1]
    for word in argv[1:]:
        flag = re.fullmatch(r"--?([A-Za-z].*)", word, re.DOTALL)
        before = found[-1] if len(found) > 1 else ""
        if not flag and before.startswith("--") and "=" not in before:
            found[-1] = f"{before}={word}"
        else:
            found.append(f"--{flag[1]}" if flag else word)
    return found


def value_of(name: str, argv: list[str]) -> str:
    """What a command line says for a flag, the last time; "" if nothing."""
    prefix = f"--{name}="
    return next(
        (a.removeprefix(prefix) for a in reversed(joined(argv)) if a.startswith(prefix)), ""
    )


def _define_dry_run(values):
    flags.DEFINE_bool("dry_run", False, "Say what would run, and stop.", flag_values=values)


def _refuse_missing_recipe(name):
    if not name or Path(name).is_file():
        return
    there = sorted(str(path) for path in Path("configs").glob("*.py"))
    near = difflib.get_close_matches(name, there, 1, 0.4) or there
    hint = f"; did you mean {near[0]}?" if near else ""
    raise SystemExit(f"config: there is no recipe {name}{hint}")


def _for_people(error, argv):
    """What is wrong with the first flag that is: its name, with the nearest key, or its value."""
    text = " ".join(str(error.args[0] if error.args else error).split())
    known = flatten(defaults().to_dict())
    for flag, _, value in (a.removeprefix("--").partition("=") for a in argv[1:]):
        key = flag.removeprefix("config.")
        of_source = re.fullmatch(r"data\.mix\.(\w+)\.(\w+)", key)
        entry = source()
        if flag not in known and flag.startswith("config.") and key not in known:
            if key.split(".")[0] in _methods_named(argv):
                name = key.split(".")[0]
                return (
                    f"there is no method {name!r}; register it in jaxlm/methods/__init__.py, or "
                    f"name it in your recipe as own_method(c, 'package.module:{name}')"
                )
            if not of_source:
                return f"there is no key {key!r}{_did_you_mean(key, known)}"
            if of_source[2] not in entry:
                keys = [f"data.mix.{of_source[1]}.{k}" for k in entry]
                return f"there is no key {key!r}{_did_you_mean(key, keys)}"
        if flag == key and f"flag {flag!r}" in text and (near := _nearest(key, known)):
            return f"there is no flag --{flag}; keys are set like --config.{near}={value or '...'}"
        kind = type(known.get(key, entry.get(of_source[2]) if of_source else None))
        if kind in _NUMBERS and f"--{flag}={value}:" in text:
            return f"--{flag}={value}: {value!r} is no {_NUMBERS[kind]}"
    return text[1:-1] if text[:1] in "\"'" and text[:1] == text[-1:] else text


def _methods_named(argv):
    said = [a.partition("=")[2] for a in argv if a.startswith("--config.method=")]
    return {name.strip() for text in said for name in text.split("+")} - methods.METHODS.keys()


_NUMBERS = {int: "whole number", float: "number"}


def _did_you_mean(key, known):
    near = _nearest(key, known)
    return f"; did you mean --config.{near}?" if near else ""


def _nearest(key, known):
    """The known key that somebody meant: of the same last name, its initials, or its look."""
    group, _, last = key.rpartition(".")
    tails = {k: k.split(".")[-1] for k in known}
    same = [k for k, tail in tails.items() if tail == last]
    initials = [k for k, tail in tails.items() if "".join(w[0] for w in tail.split("_")) == last]
    within = [k for k in initials if k.startswith(f"{group}.")]
    return (same or within or initials or difflib.get_close_matches(key, known, 1, 0.5) or [""])[0]
