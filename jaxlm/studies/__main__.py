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
import importlib
import time
from pathlib import Path
from typing import Any

import jax

from jaxlm.host.console import Console
from jaxlm.studies import page
from jaxlm.studies.arms import Arms

STUDIES = {
    "tr_dpo": "DPO with a reference that follows the policy (arXiv 2404.09656)",
    "lift": "preference pairs that keep length limits (arXiv 2406.17744)",
    "distill": "a general teacher, an expert, or both (arXiv 2406.19112)",
}


def main() -> int:
    name, settings, out = _asked()
    study = importlib.import_module(f"jaxlm.studies.{name}")
    began = time.monotonic()
    with Console(out / "study.log") as console:
        for note in process.notes:
            console.warn(note)
        of = {"source": _source(name), "jax": jax.__version__, **dataclasses.asdict(settings)}
        arms = Arms(out, console, of)
        numbers = study.run(settings, arms, console)
        told = study.tell(settings, numbers)
        seconds = time.monotonic() - began
        setup = {
            "study": name,
            **dataclasses.asdict(settings),
            "seconds of this start": round(seconds),
        }
        where = page.write(out, told, setup, numbers)
        for table in told.tables:
            console.say(f"\n{table.caption}")
            console.table(table.rows, table.head)
        console.say()
        for verdict in told.verdicts:
            console.say(str(verdict))
        console.say(f"\n{where}  ({seconds:.0f} s)")
    return 0


def _source(name: str) -> list[str]:
    """What makes the numbers: all that trains and measures, and of the study what stands before
    `tell`."""
    folder = Path(__file__).parent
    texts = [(folder / f"{file}.py").read_text() for file in ("models", "texts", name)]
    rooms = "methods", "models", "optim", "generate", "evals", "data"
    shared = [file for room in rooms for file in sorted((folder.parent / room).rglob("*.py"))]
    shared += [folder.parent / f"{file}.py" for file in ("contract", "sharding", "step")]
    return [*(text.partition("\ndef tell(")[0] for text in texts), *map(Path.read_text, shared)]


def _asked() -> tuple[str, Any, Path]:
    """The study, its settings as the command line has them, and the folder."""
    parser = argparse.ArgumentParser(
        prog="python -m jaxlm.studies",
        description=__doc__,
        formatter_class=argparse.RawTextHelpFormatter,
        add_help=False,
    )
    parser.add_argument("name", nargs="?", default="", choices=["", *STUDIES], metavar="NAME")
    name = parser.parse_known_args()[0].name
    if not name:
        print((__doc__ or "").strip())
        print("\n" + "\n".join(f"  {name:10}{claim}" for name, claim in STUDIES.items()))
        raise SystemExit(0)
    study = importlib.import_module(f"jaxlm.studies.{name}")
    parser.add_argument("-h", "--help", action="help")
    parser.add_argument("--out", default=f"runs/studies/{name}", help="folder of the report")
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
    given = vars(parser.parse_args())
    base = study.QUICK if given["quick"] else study.Settings()
    chosen = {f.name: given[f.name] for f in dataclasses.fields(base) if given[f.name] is not None}
    chosen = {k: tuple(v) if isinstance(v, list) else v for k, v in chosen.items()}
    return name, dataclasses.replace(base, **chosen), Path(given["out"]).expanduser()


if __name__ == "__main__":
    process.run(main, "the same command goes on with the arms that are not finished")
