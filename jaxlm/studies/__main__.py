"""Studies of what papers claim, on language models that are trained here in minutes.

    python -m jaxlm.studies                         what there is
    python -m jaxlm.studies tr_dpo [--out=DIR] [--quick] [--seeds=8] [--KEY=VALUE ...]

Writes report.html, figure.png and results.json to DIR, by default runs/studies/NAME, and says the
verdicts, which follow from the numbers alone. The settings of a study are its keys (--help names
them); --quick takes sizes of a few seconds, to see that it runs. Arms that are finished are kept:
the same command goes on where it was stopped.
"""

from jaxlm.host import process

process.start(__name__)

import argparse
import dataclasses
import difflib
import importlib
import math
import sys
import time
from pathlib import Path
from typing import Any

import jax

from jaxlm import files
from jaxlm.host.console import Console
from jaxlm.studies import page
from jaxlm.studies.arms import Arms
from jaxlm.studies.numbers import Numbers, diverged, unknown

STUDIES = {
    "tr_dpo": "DPO with a reference that follows the policy (arXiv 2404.09656)",
    "lift": "preference pairs that keep length limits (arXiv 2406.17744)",
    "distill": "a general teacher, an expert, or both (arXiv 2406.19112)",
}


QUICK = "A quick run shows that the study runs. At its sizes no claim is judged."


def main() -> int:
    name, settings, out, quick = _asked(sys.argv[1:])
    study = importlib.import_module(f"jaxlm.studies.{name}")
    began, worked = time.monotonic(), time.process_time()
    with Console(out / "study.log") as console:
        for note in process.notes:
            console.warn(note)
        of = {"source": _source(name), "jax": jax.__version__, **dataclasses.asdict(settings)}
        arms = Arms(out, console, of)
        numbers = study.run(settings, arms, console)
        notes, known = _known(numbers)
        for note in notes:
            console.warn(note)
        told = study.tell(settings, known)
        if quick:
            notes.append(QUICK)
            told = told._replace(verdicts=[v._replace(holds=None) for v in told.verdicts])
        seconds, processor = time.monotonic() - began, time.process_time() - worked
        setup = {
            "study": name,
            **dataclasses.asdict(settings),
            "seconds of this start": round(seconds),
            "of processor time": round(processor),
        }
        where = page.write(out, told, setup, numbers, notes)
        for table in told.tables:
            console.say(f"\n{table.caption}")
            console.table(table.rows, table.head)
        console.say()
        for verdict in told.verdicts:
            console.say(str(verdict))
        console.say(f"\n{where}  ({seconds:.0f} s, {processor:.0f} s of processor time)")
    return 0


def _known(numbers: dict[str, Numbers]) -> tuple[list[str], dict[str, Numbers]]:
    """A sentence for each arm that diverged, and the numbers without theirs."""
    gone = diverged(numbers)
    if len(gone) == len(numbers):
        raise ValueError(
            "every arm diverged, so there is nothing to tell; lower the learning rate. First: "
            + next(f"{name}: {what}" for name, what in gone.items())
        )
    notes = [
        f"The arm {name!r} diverged and is left out: not finite are {what}."
        for name, what in gone.items()
    ]
    return notes, {k: unknown(v) if k in gone else v for k, v in numbers.items()}


def _source(name: str) -> list[str]:
    """What makes the numbers: all that trains and measures, and of the study what stands before
    `tell`."""
    folder = Path(__file__).parent
    texts = [(folder / f"{file}.py").read_text() for file in ("models", "texts", name)]
    rooms = "methods", "models", "optim", "generate", "evals", "data"
    shared = [file for room in rooms for file in sorted((folder.parent / room).rglob("*.py"))]
    shared += [folder.parent / f"{file}.py" for file in ("contract", "sharding", "step")]
    return [*(text.partition("\ndef tell(")[0] for text in texts), *map(Path.read_text, shared)]


def _asked(argv: list[str]) -> tuple[str, Any, Path, bool]:
    """The study, its settings as the command line has them, the folder, and whether it is quick.

    Raises `ValueError` with a sentence about what is wrong in it.
    """
    name = next((word for word in argv if word in STUDIES), "")
    if not name:
        if words := [word for word in argv if word not in ("-h", "--help")]:
            raise ValueError(_no_study(words))
        print((__doc__ or "").strip())
        print("\n" + "\n".join(f"  {name:10}{claim}" for name, claim in STUDIES.items()))
        raise SystemExit(0)
    study = importlib.import_module(f"jaxlm.studies.{name}")
    parser = _Parser(
        prog=f"python -m jaxlm.studies {name}",
        description=__doc__,
        formatter_class=argparse.RawTextHelpFormatter,
        allow_abbrev=False,
    )
    usual = f"runs/studies/{name}, with --quick behind it -quick"
    parser.add_argument("--out", help=f"folder of the report; by default {usual}")
    parser.add_argument("--quick", action="store_true", help="sizes of a few seconds")
    for field in dataclasses.fields(study.Settings):
        usual = getattr(study.Settings(), field.name)
        several = isinstance(usual, tuple)
        kind = type(usual[0] if several else usual)
        parser.add_argument(
            f"--{field.name}",
            type=kind,
            nargs="*" if several else None,
            help=f"{kind.__name__}{', several' * several}; by default {usual}",
        )
    rest = list(argv)
    rest.remove(name)
    found, wrong = parser.parse_known_args(rest)
    if wrong:
        raise ValueError(_no_key(wrong[0], name, list(vars(found))))
    given = vars(found)
    base = study.QUICK if given["quick"] else study.Settings()
    chosen = {f.name: given[f.name] for f in dataclasses.fields(base) if given[f.name] is not None}
    chosen = {k: tuple(v) if isinstance(v, list) else v for k, v in chosen.items()}
    for key, value in chosen.items():
        _refuse(key, value, getattr(study.Settings(), key))
    out = given["out"] or f"runs/studies/{name}{'-quick' * given['quick']}"
    return name, dataclasses.replace(base, **chosen), files.local(out, "--out"), given["quick"]


class _Parser(argparse.ArgumentParser):
    def error(self, message):
        raise ValueError(f"{message.removeprefix('argument ')} (--help has all keys)")


def _no_study(words: list[str]) -> str:
    wrong = next((word for word in words if not word.startswith("-")), words[0])
    near = difflib.get_close_matches(wrong, STUDIES, 1, 0.4)
    hint = f"did you mean {near[0]}?" if near else f"there are {', '.join(STUDIES)}"
    return f"there is no study {wrong!r}; {hint}"


def _no_key(word: str, name: str, keys: list[str]) -> str:
    key = word.partition("=")[0].lstrip("-")
    if not word.startswith("-"):
        return f"{word!r} is no key of {name}; keys are set like --seeds=8"
    near = difflib.get_close_matches(key, keys, 1, 0.5)
    hint = f"did you mean --{near[0]}?" if near else "--help has all of them"
    return f"{name} has no key --{key}; {hint}"


def _refuse(key: str, value: Any, usual: Any) -> None:
    """Counts are 1 or more, other numbers finite and not below 0."""
    for each in value if isinstance(value, tuple) else (value,):
        if isinstance(each, int) and each < 1 and usual:
            raise ValueError(f"--{key}={each}: a count of 1 or more")
        if not 0 <= each < math.inf:
            raise ValueError(f"--{key}={each:g}: a number from 0 on")


if __name__ == "__main__":
    process.run(main, "the same command goes on with the arms that are not finished")
