"""A small language that says which documents to keep; nothing in it is executed.

"min_characters=200, max_characters=100000, match='^(import|from) ', name=*.py" keeps what meets
every term. A value that contains a comma stands in quotes. The text of a conversation is that of
its messages, one below the other.

  min_characters max_characters min_words max_words    whole numbers, inclusive
  match reject                                         a regular expression found, not found
  name                                                 a file pattern for the document's name
"""

import fnmatch
import re
from collections.abc import Callable

from jaxlm.data.documents import Document

Keep = Callable[[Document], bool]

_TERM = re.compile(r"""\s*(\w+)\s*=\s*("[^"]*"|'[^']*'|[^,]*?)\s*(?:,|$)""")

_NUMBERS: dict[str, Callable[[Document, int], bool]] = {
    "min_characters": lambda document, n: len(document.text) >= n,
    "max_characters": lambda document, n: len(document.text) <= n,
    "min_words": lambda document, n: len(document.text.split()) >= n,
    "max_words": lambda document, n: len(document.text.split()) <= n,
}
KEYS = (*_NUMBERS, "match", "reject", "name")


def parse_filter(text: str) -> Keep:
    """A predicate over documents; raises `ValueError` naming the term it cannot read."""
    terms, at = [], 0
    while text[at:].strip():
        found = _TERM.match(text, at)
        if not found or found.end() == at:
            raise ValueError(
                f"filter {text!r}: {text[at:].strip()!r} is not key=value; put a value that "
                f"contains a comma in quotes"
            )
        value = found[2]
        quoted = len(value) > 1 and value[0] == value[-1] and value[0] in "\"'"
        terms.append(_term(text, found[1], value[1:-1] if quoted else value))
        at = found.end()
    return lambda document: all(term(document) for term in terms)


def _term(text: str, key: str, value: str) -> Keep:
    if key in _NUMBERS:
        if not value.isdecimal():
            raise ValueError(f"filter {text!r}: {key} needs a whole number, not {value!r}")
        test, number = _NUMBERS[key], int(value)
        return lambda document: test(document, number)
    if key == "name":
        return lambda document: fnmatch.fnmatchcase(document.name, value)
    if key not in ("match", "reject"):
        raise ValueError(f"filter {text!r}: {key!r} is unknown; there are {', '.join(KEYS)}")
    try:
        pattern = re.compile(value, re.MULTILINE)
    except re.error as error:
        raise ValueError(f"filter {text!r}: {value!r} is no regular expression: {error}") from None
    wanted = key == "match"
    return lambda document: bool(pattern.search(document.text)) == wanted
