"""Weight decay and learning rate by parameter name, in one string that fits a command line.

    "norm|embed: weight_decay=0; head: learning_rate=0.3, weight_decay=0.01"

Clauses are separated by `;`. Each is a regular expression, searched anywhere in the parameter's
path, and after the last colon what it sets: `weight_decay` is a value, `learning_rate` a multiple
of the schedule's. Where several clauses match, the last one that sets a key wins. `DEFAULT` comes
first: no decay on norms and biases.

Paths look like `blocks/attention/query/kernel`: the number of a layer is left out, so that a rule
means the same whether layers are stacked or not.
"""

import difflib
import re
from typing import Any, NamedTuple

import jax

DEFAULT = "norm/|bias$: weight_decay=0"
KEYS = ("weight_decay", "learning_rate")


class Rule(NamedTuple):
    """What parameters whose path matches `pattern` get."""

    pattern: str
    values: dict[str, float]


def is_names(node: Any) -> bool:
    """Whether a node of an axes tree is a leaf of it: a tuple of logical axis names."""
    return isinstance(node, tuple)


def path_of(path: tuple) -> str:
    """`a/b/c` of a key path, without the numbers of layers."""
    parts = [
        str(getattr(key, "key", getattr(key, "idx", getattr(key, "name", key)))) for key in path
    ]
    return "/".join(part for part in parts if not part.isdigit())


def parse(text: str) -> tuple[Rule, ...]:
    """The rules in a string. Raises `ValueError` naming the clause that cannot be read."""
    return tuple(_parse_clause(clause) for clause in text.split(";") if clause.strip())


def _parse_clause(clause: str) -> Rule:
    where = f"optimizer.rules: the clause {clause.strip()!r}"
    pattern, colon, settings = (part.strip() for part in clause.rpartition(":"))
    if not (colon and pattern and settings):
        raise ValueError(
            f"{where} should read 'pattern: key=value', as in 'embed: weight_decay=0'."
        )
    try:
        re.compile(pattern)
    except re.error as error:
        raise ValueError(f"{where} has no valid regular expression: {error}.") from None
    values = {}
    for setting in settings.split(","):
        key, _, value = (part.strip() for part in setting.partition("="))
        if key not in KEYS:
            near = difflib.get_close_matches(key, KEYS, 1, 0.5)
            hint = f"did you mean {near[0]!r}?" if near else f"it may set {' and '.join(KEYS)}."
            raise ValueError(f"{where} sets {key!r}; {hint}")
        try:
            values[key] = float(value)
        except ValueError:
            raise ValueError(f"{where} sets {key} to {value!r}, which is not a number.") from None
        if not values[key] >= 0:
            raise ValueError(f"{where} sets {key} to {value}; it may not be negative.")
    return Rule(pattern, values)


def per_parameter(text: str, axes: Any, weight_decay: float) -> tuple[Any, Any]:
    """Trees like `axes` of rate multiples and of weight decays.

    Raises `ValueError` for a rule that matches no parameter.
    """
    rules = parse(text)
    paths = [path_of(path) for path, _ in _leaves_with_path(axes)]
    for rule in rules:
        if not any(re.search(rule.pattern, path) for path in paths):
            near = difflib.get_close_matches(rule.pattern, paths, 4, 0.0)
            raise ValueError(
                f"optimizer.rules: the pattern {rule.pattern!r} matches no parameter. "
                f"Some parameters are {', '.join(dict.fromkeys(near))}."
            )

    def value(path, key, default):
        set_by = [
            rule.values[key]
            for rule in (*parse(DEFAULT), *rules)
            if key in rule.values and re.search(rule.pattern, path)
        ]
        return set_by[-1] if set_by else default

    def tree(key, default):
        return jax.tree_util.tree_map_with_path(
            lambda path, _: value(path_of(path), key, default), axes, is_leaf=is_names
        )

    return tree("learning_rate", 1.0), tree("weight_decay", weight_decay)


def _leaves_with_path(axes):
    return jax.tree_util.tree_leaves_with_path(axes, is_leaf=is_names)
