"""The top of the page: what was reached, whether the run is over, the model beside compressors."""

from typing import Any

import numpy as np

from jaxlm.report.markup import (
    NONE,
    Html,
    bits,
    count,
    duration,
    el,
    finite,
    join,
    moment,
    number,
    percent,
    short,
)
from jaxlm.report.read import Folder, items, last, mapping, named
from jaxlm.report.tables import key, meter, table

STREAM, FILES = "compressors", "compressors_per_file"
SAME_TEXT = (
    "xz primed has read the training text before it compresses; the model was trained on the same "
    "text. The model’s weights are not counted in its bits."
)


def sources(folder: Folder) -> list[str]:
    """Names of the sources in one order for the whole page, from whichever file knows them."""
    card = mapping(folder.run.get("data_card"))
    known = [
        mapping(card.get("sources")),
        mapping(folder.results.get("bits_per_char")),
        named(folder.evals, "bits_per_char/"),
    ]
    return list(dict.fromkeys(name for names in known for name in names))


def color(folder: Folder, name: str) -> str:
    """The style-sheet class of a source's colour."""
    names = sources(folder)
    return f"s{names.index(name) % 8}" if name in names else "s7"


def compressors(folder: Folder, source: str, which: str = STREAM) -> dict[str, float]:
    """Bits per character of each compressor on a source, the best first."""
    found = mapping(mapping(folder.results.get(which)).get(source))
    values = {name: value for name, v in found.items() if (value := finite(v)) is not None}
    return dict(sorted(values.items(), key=lambda pair: pair[1]))


def model_bits(folder: Folder, source: str) -> float | None:
    """The model's bits per character: the final one, or that of the last evaluation so far."""
    final = finite(mapping(folder.results.get("bits_per_char")).get(source))
    return last(folder.evals, f"bits_per_char/{source}") if final is None else final


def planned_steps(folder: Folder) -> float | None:
    return finite(mapping(folder.run.get("config")).get("steps"))


def commit(run: dict[str, Any]) -> str:
    """The start of the commit's hash, and whether the tree was changed since (written as +)."""
    text = str(run.get("commit") or "")
    return text.rstrip("+")[:12] + (" with changes" if text.endswith("+") else "")


def name(folder: Folder) -> str:
    return str(folder.run.get("name") or folder.path.resolve().name or "run")


def state(folder: Folder) -> tuple[str, str]:
    """One word for the run and a sentence: Finished, Interrupted, Unfinished."""
    done = finite(folder.results.get("steps")) or last(folder.metrics, "step") or 0
    planned = planned_steps(folder)
    of = f" of {count(planned)} ({percent(done / planned)})" if planned else ""
    if folder.results:
        return "Finished", f"The run finished after {count(done)} steps."
    turns = [e["kind"] for e in folder.events if e.get("kind") in ("start", "resume", "interrupt")]
    if turns[-1:] == ["interrupt"]:
        again = "The same command continues it."
        return "Interrupted", f"The run was interrupted at step {count(done)}{of}. {again}"
    seen = [t for event in folder.events if (t := finite(event.get("time"))) is not None]
    when = f" Its last event is of {moment(max(seen))}." if seen else ""
    return "Unfinished", (
        f"The run has no results yet. It is at step {count(done)}{of}, "
        f"still going or ended without a word.{when}"
    )


def header(folder: Folder) -> Html:
    """Name, state, verdict and one line of facts."""
    word, sentence = state(folder)
    verdict = [text for text in items(folder.results.get("verdict")) if isinstance(text, str)]
    return el(
        "header",
        el(
            "div",
            el("span", "jaxlm · report of a run", class_="mark"),
            el("span", word, class_=f"state {word.lower()}"),
            class_="top",
        ),
        el("h1", name(folder)),
        [el("p", said, class_="verdict") for said in verdict or [sentence]],
        el("p", " · ".join(_facts(folder)), class_="facts"),
    )


def _facts(folder: Folder) -> list[str]:
    run, facts = folder.run, [f"folder {folder.path.resolve().name}"]
    if method := mapping(run.get("config")).get("method"):
        facts.append(str(method))
    if best := folder.results.get("best"):
        facts.append(str(best).replace(" so far", ""))
    if finite(run.get("parameters")):
        facts.append(f"{short(run['parameters'])} parameters")
    if run.get("device"):
        facts.append(str(run["device"]))
    if run.get("started"):
        facts.append(f"started {moment(run['started'])}")
    if run.get("commit"):
        facts.append(f"commit {commit(run)}")
    return facts


def tiles(folder: Folder, seconds: float | None) -> Html:
    """The headline numbers."""
    speed = folder.metrics.get("tokens_per_second", np.zeros(0))
    speed = float(np.nanmedian(speed)) if np.isfinite(speed).any() else None
    peak = folder.metrics.get("peak_fraction", np.zeros(0))
    peak = float(np.nanmedian(peak)) if np.isfinite(peak).any() else None
    tokens = finite(folder.results.get("tokens")) or last(folder.metrics, "tokens")
    steps = finite(folder.results.get("steps")) or last(folder.metrics, "step")
    loss = last(folder.metrics, "loss")
    cards = [_source_tile(folder, name) for name in sources(folder)[:4]]
    if not any(cards):
        cards = [_tile("training loss", number(loss), "nats per token, last step")] if loss else []
    if tokens:
        cards.append(_tile("tokens read", short(tokens), f"in {count(steps)} steps"))
    if speed:
        share = f"median; {percent(peak)} of the matmul peak" if peak else "median over the steps"
        cards.append(_tile("tokens per second", short(speed), share))
    if seconds:
        whole = "from start to end, all parts" if folder.results else "so far, all parts"
        cards.append(_tile("time", duration(seconds), whole))
    return el("dl", cards, class_="tiles") if any(cards) else Html("")


def _tile(name: str, value: str, below: str, kind: str = "") -> Html:
    inside = [el("dt", name), el("dd", value, class_="figure"), el("dd", below, class_="below")]
    return el("div", inside, class_=kind or None)


def _source_tile(folder: Folder, name: str) -> Html | None:
    value = model_bits(folder, name)
    if value is None:
        return _judged_tile(folder, name)
    below = "bits per character" + ("" if folder.results else ", last evaluation")
    rivals = compressors(folder, name)
    if rivals:
        best = min(rivals, key=lambda name: rivals[name])
        below += f"; {_against(value, rivals[best])} than {best} ({rivals[best]:.3f})"
    return _tile(f"held-out {name}", bits(value), below, f"of {color(folder, name)}")


def _judged_tile(folder: Folder, name: str) -> Html | None:
    """Of a source that is no text: the accuracy if there is one, else the loss."""
    accuracies = (column for column in folder.evals if column.endswith(f"/accuracy/{name}"))
    for column in (*accuracies, f"loss/{name}"):
        value = last(folder.evals, column)
        if value is not None:
            is_loss = column.startswith("loss/")
            what, shown = ("loss", number(value)) if is_loss else ("accuracy", "")
            below = "nats, of what is trained" if shown else "of the model’s preferences"
            hue = f"of {color(folder, name)}"
            return _tile(f"held-out {name}: {what}", shown or percent(value, 1), below, hue)
    return None


def _against(value: float, rival: float) -> str:
    share = value / rival - 1 if rival else 0.0
    return f"{percent(abs(share))} {'more' if share > 0 else 'less'}"


def against_compressors(folder: Folder) -> Html:
    """Per source a table, best first: the model and the compressors on the same held-out text."""
    tables = [_ranking(folder, name) for name in sources(folder)]
    if not any(tables):
        return Html("")
    context = folder.results.get("context")
    return join(
        [
            el("div", tables, class_="pair"),
            el("p", context, class_="note") if isinstance(context, str) and context else None,
            el("p", SAME_TEXT, class_="note"),
        ]
    )


def _ranking(folder: Folder, source: str) -> Html | None:
    stream, files = compressors(folder, source), compressors(folder, source, FILES)
    model = model_bits(folder, source)
    per_file = finite(mapping(folder.results.get("model_per_file")).get(source))
    if model is None or not (stream or files):
        return None
    names = dict.fromkeys([*stream, *files])
    rows: list[list[Any]] = [[name, stream.get(name), files.get(name)] for name in names]
    rows.append([el("strong", "this model"), model, per_file])
    most = max(v for row in rows for v in row[1:] if v is not None)
    rows.sort(key=lambda row: (row[1] is None, row[1]))
    hue = color(folder, source)
    shown = [
        [name, *(_bar(v, most, hue if isinstance(name, Html) else "plain") for v in values)]
        for name, *values in rows
    ]
    head = [el("span", "bits per character", class_="quiet"), "one stream", "file by file"]
    drawn = table(head, shown, caption=f"Held-out {source}: bits per character, best first")
    return el("section", el("h3", key(hue, source)), drawn, class_="ranking")


def _bar(value: float | None, most: float, hue: str) -> Html | str:
    return NONE if value is None else meter(value / most, bits(value), hue)
