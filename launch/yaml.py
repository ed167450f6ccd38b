"""Plain values as YAML for people, without a package: strings are quoted wherever in doubt."""

import json
import re
from collections.abc import Iterator
from typing import Any

PLAIN = re.compile(r"[A-Za-z][A-Za-z0-9_./-]*")
WORDS = {"true", "false", "yes", "no", "on", "off", "null", "y", "n"}  # mean something else


def dump(value: dict | list) -> str:
    return "\n".join(_lines(value)) + "\n"


def _lines(value: Any) -> Iterator[str]:
    if not value or not isinstance(value, dict | list):
        yield _scalar(value)
    elif isinstance(value, dict):
        for name, inner in value.items():
            first, *rest = _lines(inner)
            if inner and isinstance(inner, dict | list):
                yield f"{_scalar(name)}:"
                yield from (f"  {line}" for line in (first, *rest))
            else:
                yield f"{_scalar(name)}: {first}"
    else:
        for inner in value:
            first, *rest = _lines(inner)
            yield f"- {first}"
            yield from (f"  {line}" for line in rest)


def _scalar(value):
    plain = isinstance(value, str) and PLAIN.fullmatch(value) and value.lower() not in WORDS
    return value if plain else json.dumps(value)
