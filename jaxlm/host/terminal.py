"""Text for terminals and logs: durations, counts, tables, bars, and what a stream can show."""

import contextlib
import math
import os
import re
import shutil

SPINNER = "⠋⠙⠹⠸⠼⠴⠦⠧⠇⠏"
ASCII = str.maketrans(
    {"…": "...", "·": "|", "×": "x", "–": "-", "—": "-", "█": "#", "░": ".", "≤": "<=", "≥": ">="}
    | {"→": "->", "’": "'", "‘": "'", "“": '"', "”": '"', "µ": "u", "±": "+-", "✓": "ok"}
)
CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")


def duration(seconds: float, fine: bool = False) -> str:
    """`8 s`, `2 min 05 s`, `3 h 10 min`; with `fine` tenths below ten seconds."""
    if fine and seconds < 9.95:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    if not minutes:
        return f"{rest} s"
    hours, minutes = divmod(minutes, 60)
    days, hours = divmod(hours, 24)
    if days:
        return f"{days} d {hours} h"
    return f"{hours} h {minutes:02d} min" if hours else f"{minutes} min {rest:02d} s"


def clock(seconds: float) -> str:
    """`0:08`, `2:05`, `3:10:00`."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


def count(number: float) -> str:
    """`950`, `9.1k`, `128k`, `1.3M`."""
    for unit, size in (("T", 1e12), ("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if abs(number) >= 0.9995 * size:
            scaled = number / size
            return f"{scaled:.1f}{unit}" if abs(scaled) < 99.95 else f"{scaled:.0f}{unit}"
    return f"{number:.0f}"


def table_lines(rows, header=()) -> list[str]:
    """Rows as lines with aligned columns: numbers to the right, everything else to the left."""
    rows = [[_cell(value) for value in row] for row in rows]
    everything = ([[str(name) for name in header]] if header else []) + rows
    columns = max(map(len, everything), default=0)
    everything = [row + [""] * (columns - len(row)) for row in everything]
    widths = [max(len(row[c]) for row in everything) for c in range(columns)]
    body = everything[bool(header) :]
    right = [
        any(row[c] for row in body) and all(_is_number(row[c]) for row in body if row[c])
        for c in range(columns)
    ]
    return [
        "  "
        + "  ".join(
            text.rjust(width) if is_right else text.ljust(width)
            for text, width, is_right in zip(row, widths, right, strict=True)
        ).rstrip()
        for row in everything
    ]


def _cell(value):
    if isinstance(value, float):
        return f"{value:.3f}" if math.isfinite(value) else "–"
    if isinstance(value, int) and not isinstance(value, bool):
        return f"{value:,}"
    return "–" if value is None else str(value)


def _is_number(text):
    return text == "–" or bool(re.match(r"[-+]?[\d.,]+([eE][-+]?\d+)?\s*(%|×|\S{1,4})?$", text))


def visible(text: str) -> str:
    """Control characters as text: a sample of the corpus must not recolour the terminal."""
    return CONTROL.sub(lambda m: "" if m.group() == "\r" else f"\\x{ord(m.group()):02x}", text)


def encodable(text, stream):
    """The text, or what comes nearest to it in the encoding of the stream."""
    encoding = getattr(stream, "encoding", None) or "utf-8"
    try:
        text.encode(encoding)
        return text
    except UnicodeEncodeError:
        frames = str.maketrans(SPINNER, ("|/-\\" * len(SPINNER))[: len(SPINNER)])
        plain = text.translate(ASCII).translate(frames)
        return plain.encode(encoding, "replace").decode(encoding)


def is_terminal(stream):
    """Whether a line can be redrawn in place there."""
    try:
        terminal = stream is not None and stream.isatty()
    except ValueError:  # closed
        return False
    in_ci = os.environ.get("CI", "").lower() not in ("", "0", "false")
    return terminal and os.environ.get("TERM") != "dumb" and not in_ci


def wants_color(live):
    """NO_COLOR forbids, a terminal or CLICOLOR_FORCE allows."""
    if os.environ.get("NO_COLOR"):
        return False
    return live or os.environ.get("CLICOLOR_FORCE", "0") != "0"


def columns(stream):
    """Width of the terminal right now."""
    try:
        return os.get_terminal_size(stream.fileno()).columns or 80
    except (OSError, ValueError, AttributeError):
        return shutil.get_terminal_size().columns


def point_at_nothing(stream):
    """Keeps Python from complaining about the broken pipe once more when it exits."""
    with contextlib.suppress(OSError, ValueError, AttributeError):
        nothing = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nothing, stream.fileno())
        os.close(nothing)
