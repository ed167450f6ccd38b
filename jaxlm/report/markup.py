"""Markup that escapes itself, and numbers the way people read them.

Every piece of text on the page passes through `el`, so a sample that contains `</script>` is shown
and never run. `Html` marks what is already escaped; a plain `str` never is.
"""

import datetime
import html
import math
import re
from typing import Any

VOID = {"meta", "link", "br", "hr", "col"}
NONE = "–"  # what stands where a number is missing or not finite
UNPRINTABLE = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\ud800-\udfff\ufdd0-\ufdef\ufffe\uffff]")


class Html(str):
    """Markup whose text is already escaped."""

    __slots__ = ()


def escape(text: Any) -> Html:
    """Text as markup; control characters become visible, lone surrogates a replacement sign."""
    if isinstance(text, Html):
        return text
    return Html(html.escape(UNPRINTABLE.sub(_visible, str(text)), quote=True))


def _visible(match: re.Match) -> str:
    code = ord(match.group())
    return chr(0x2400 + code) if code < 32 else "\ufffd"


def join(children: Any, between: str = "") -> Html:
    """Children of any depth (text, markup, lists, None) as one piece of markup."""
    if children is None or children is False:
        return Html("")
    if isinstance(children, str) or not hasattr(children, "__iter__"):
        return escape(children)
    return Html(between.join(part for child in children if (part := join(child))))


def el(tag: str, *children: Any, **attributes: Any) -> Html:
    """One element. `class_` stands for class, `data_x` for data-x; None and False are left out."""
    parts = [tag]
    for name, value in attributes.items():
        if value is None or value is False:
            continue
        name = name.rstrip("_").replace("_", "-")
        parts.append(name if value is True else f'{name}="{escape(value)}"')
    opening = f"<{' '.join(parts)}>"
    return Html(opening if tag in VOID else f"{opening}{join(children)}</{tag}>")


def finite(value: Any) -> float | None:
    """The value as a float of sane size; None for anything else, such as NaN, null or text."""
    if isinstance(value, str) or value is None:
        return None
    try:
        value = float(value)
    except (TypeError, ValueError, OverflowError):
        return None
    return value if abs(value) < 1e100 else None


def number(value: Any, digits: int = 4) -> str:
    """A number with `digits` significant figures, in plain notation where that is short."""
    value = finite(value)
    if value is None:
        return NONE
    if value == 0:
        return "0"
    size = math.floor(math.log10(abs(value)))
    if size < -4 or size >= 7:
        mantissa, _, power = f"{value:.{max(digits - 2, 0)}e}".partition("e")
        return _signed(f"{_trim(mantissa)}e{int(power)}")
    return _signed(_trim(f"{value:,.{max(digits - 1 - size, 0)}f}"))


def bits(value: Any) -> str:
    """Bits per character: three decimals, all kept, so that columns line up."""
    value = finite(value)
    return NONE if value is None else f"{value:.3f}"


def count(value: Any) -> str:
    """A whole number with its thousands marked."""
    value = finite(value)
    return NONE if value is None else _signed(f"{round(value):,}")


def short(value: Any) -> str:
    """A count in three figures: 1.28M."""
    value = finite(value)
    if value is None:
        return NONE
    for size, letter in ((1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= size * 0.9995:
            return number(value / size, 3) + letter
    return number(value, 3)


def percent(share: Any, decimals: int = 0) -> str:
    """A share of one, in percent."""
    share = finite(share)
    if share is None:
        return NONE
    if 0 < share < 0.5 * 10 ** (-2 - decimals):
        return f"<\u202f{10**-decimals:g}\u202f%"
    return _signed(f"{100 * share:.{decimals}f}\u202f%")


def duration(seconds: Any) -> str:
    """Seconds in the two units that matter."""
    seconds = finite(seconds)
    if seconds is None:
        return NONE
    if seconds < 10:
        return f"{seconds:.2f} s" if seconds < 1 else f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    if not minutes:
        return f"{rest} s"
    hours, minutes = divmod(minutes, 60)
    if not hours:
        return f"{minutes} min {rest:02d} s"
    return f"{hours:,} h {minutes:02d} min"


def moment(value: Any) -> str:
    """A time, given in unix seconds or as ISO text, to the minute in UTC."""
    seconds = finite(value)
    try:
        if seconds is not None:
            when = datetime.datetime.fromtimestamp(seconds, datetime.UTC)
        else:
            when = datetime.datetime.fromisoformat(value).astimezone(datetime.UTC)
    except (TypeError, ValueError, OverflowError, OSError):
        return value if isinstance(value, str) and value else NONE
    return f"{when:%Y-%m-%d %H:%M} UTC"


def _trim(text: str) -> str:
    return text.rstrip("0").rstrip(".") if "." in text else text


def _signed(text: str) -> str:
    return text.replace("-", "\u2212")
