"""The seams between the training loop and a method.

A method is a value of type `Method`: a handful of pure functions, each optional. The step calls
them in one order (adapter, select, objective, wrap, between) and never asks which method it is
running.

A batch is a flat dict of arrays; B rows, L positions. Packed language-model batches hold
  tokens    [B, L] int32    what the model reads
  targets   [B, L] int32    what each position predicts
  weights   [B, L] float32  loss weight of each target; 0 = padding, document border, prompt
  segments  [B, L] int32    document within the row, from 1; 0 = padding
  positions [B, L] int32    position within the document
  source    [B]    int32    index of the source in the mixture
  index     [B]    int32    row number in that source, for audits
A method with batches of another shape documents them in its own file.
"""

import dataclasses
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

Params = Any  # plain nested dict of arrays
Batch = Mapping[str, jax.Array]
Extras = Mapping[str, Any]  # name -> pytree: reference params, teacher params, masks
RECORD = {"tokens", "targets", "weights", "segments", "positions", "source", "index", "desirable"}
BASE = "base"  # the extra that holds the model's own params where an adapter's are trained


class LM(NamedTuple):
    """A language model as pure functions. The module library stays behind them."""

    init: Callable[[jax.Array], Params]
    """key -> params."""
    hidden: Callable[..., tuple[jax.Array, Any, dict[str, jax.Array]]]
    """(params, batch, key=None) -> hidden_BLD, taps, penalties; key None = evaluation."""
    unembed: Callable[[Params, jax.Array], jax.Array]
    """(params, hidden [..., D]) -> logits [..., V]; called chunk by chunk."""
    axes: Any
    """Pytree like params, of tuples of logical axis names (`jaxlm.sharding`)."""
    chunk: int = 0
    """Tokens of a device whose logits exist at one time in a loss; 0 = all of them."""
    head: Callable[[Params], Callable[[jax.Array], jax.Array]] | None = None
    """params -> (hidden -> logits): `unembed` for many calls, what it reads gathered only once."""
    begin: Callable[..., tuple[jax.Array, Any]] | None = None
    """(params, batch, length) -> hidden_BLD, cache: what `hidden` returns first for a batch, and a
    cache of `length` slots whose first L remember it."""
    extend: Callable[..., tuple[jax.Array, Any]] | None = None
    """(params, batch, cache) -> hidden_BLD, cache: of the L tokens that come next in each row,
    which have to fit into the cache. Both read tokens, segments (0 = padding) and positions."""
    others: Mapping[str, "LM"] = MappingProxyType({})
    """Models of another shape (`Extra.model`, `Column.model`) by the extra's or column's name."""
    attended: Callable[..., tuple[jax.Array, Any, dict[str, jax.Array], jax.Array]] | None = None
    """As `hidden`, and how much each token of the last layer attends to each: [B, L, L] float32,
    the mean over heads. None where the model cannot tell."""
    low_rank: bool = False
    """Whether params may hold factors beside a kernel, whose product adds to it (`models.lora`)."""
    positions: int = 0
    """Tokens that a row has at most, where positions are looked up in a table; 0 = any number."""


class Aux(NamedTuple):
    """What an objective reports next to its summed loss."""

    weight: jax.Array  # [] tokens or pairs that the loss and every metric are summed over
    # [] each, summed over the same weight; or (sum [], weight []) of what has a weight of its own.
    metrics: dict[str, Any]
    taps: Any = (
        None  # (sum of mask * |y| per output unit, sum of mask), float32, partial params tree
    )


class TrainState(NamedTuple):
    """Everything a step reads and writes."""

    step: jax.Array  # [] int32, optimizer steps taken
    params: Params
    opt_state: Any
    extras: Extras
    guard: Any = ()  # what the guards against bad updates remember (jaxlm.step)


Objective = Callable[[LM, Params, Extras, Batch, Any], tuple[jax.Array, Aux]]
"""The last is the step's key; None = evaluation, without dropout."""
Selector = Callable[[LM, Params, Extras, Batch, jax.Array], tuple[Batch, dict[str, jax.Array]]]
Wrap = Callable[[optax.GradientTransformation], optax.GradientTransformation]
"""optimizer -> optimizer; its update hands the keywords that it is given on to the inner one, as
those of `optax.chain` do (moments on the hosts need them: `optim.offload`)."""


@dataclasses.dataclass(frozen=True)
class Extra:
    """A pytree that the objective, the selector or the wrap reads next to the params.

    `init(params, load) -> pytree` runs once, at the start of a run; `load(path)` reads the params
    of a finished run, already sharded like the params. `axes` are its logical axes; None = those
    of the params. With `evaluate`, evaluation scores it too, as another set of params.

    `model` names a folder that holds a model of any shape: `load` then gives its params, by their
    own axes, and `LM.others` has the model under the extra's name. Make one with `params_of`.
    """

    init: Callable[[Params, Callable[[str], Params]], Any]
    axes: Any = None
    evaluate: bool = False
    model: str = ""


@dataclasses.dataclass(frozen=True)
class Column:
    """Fields of the batch that a frozen model gives once for each record, before training.

    `fn(lm, params, batch) -> {field: [B, ...]}`, one entry a row of the batch, kept on disk and
    joined to batches by (source, index). `about` names all that they depend on besides model and
    data. `model`: its folder, as in `Extra`; "" = the params that the run starts from, as they were
    then. What would take more than `limit_gb` on disk is refused.
    """

    fn: Callable[[LM, Params, Batch], dict[str, jax.Array]]
    about: str
    model: str = ""
    limit_gb: float = 100.0


class Between(NamedTuple):
    """`fn(params, extras) -> {name: new value}` after every `every`-th step, compiled apart.

    With `exact` what it writes is kept in float32, whatever type the params have.
    """

    every: int
    writes: tuple[str, ...]
    fn: Callable[[Params, Extras], Extras]
    exact: bool = False


class Adapter(NamedTuple):
    """Params that are trained in place of a model's own, which stay as they are: the extra `BASE`.
    Its `init` may hold them in another form; it is given the model's params, or parts of them as
    they are read, each in a tree with its place.

    `TrainState.params` then are the adapter's, and all that is like them: gradients, moments, a
    reference that starts as a copy of them.
    """

    bind: Callable[[LM, Params], LM]
    """(lm, base) -> the model of the adapter's params alone, as selector and objective see it. It
    takes the params of a whole model too. Of a base of shapes only `init` and `axes` are used."""
    whole: Callable[[LM, Params, Params], Params]
    """(lm, base, params) -> params that `lm` itself takes, for evaluation and generation."""
    about: Mapping[str, Any] = MappingProxyType({})
    """What checkpoints keep of it for those who read them without the method, as JSON. Of low-rank
    factors (`models.lora`) that is "scale"; `convert` reads rank, alpha, dropout and rslora too."""


@dataclasses.dataclass(frozen=True)
class Method:
    """Optional parts; see the module docstring for when each is called."""

    objective: Objective | None = None
    separable: bool = True  # the loss is a sum over rows, so micro-batches may be summed
    likelihood: bool = False  # the loss is -log p of the targets, so that it can be told in bits
    reads: str = "rows"  # batches as above; "pairs": as `methods.dpo` documents them
    select: Selector | None = None
    oversample: int = 1  # rows that `select` sees for each row it keeps
    wrap: Wrap | None = None  # optimizer -> optimizer
    extras: Mapping[str, Extra] = dataclasses.field(default_factory=dict)
    between: tuple[Between, ...] = ()
    routes: Mapping[str, tuple[str, ...]] = dataclasses.field(default_factory=dict)
    """Field of the batch, [B] float32 -> the sources whose rows have 1 there; others have 0."""
    columns: Mapping[str, Column] = dataclasses.field(default_factory=dict)
    adapter: Adapter | None = None  # brings the extra `BASE` too


def compose(*parts: Method) -> Method:
    """Merges methods into one.

    Wraps nest with the first part outermost: it sees the gradients first. Raises `ValueError` for
    two objectives, selectors or adapters, two extras of one name, or a `between` writing an unknown
    extra.
    """

    def only(field):
        found = [getattr(part, field) for part in parts if getattr(part, field) is not None]
        if len(found) > 1:
            raise ValueError(
                f"{len(found)} of the composed methods bring their own {field}; a run has one"
            )
        return found[0] if found else None

    def merged(field):
        found = {}
        for part in parts:
            if clash := found.keys() & getattr(part, field).keys():
                raise ValueError(f"the {field} {sorted(clash)} are defined by more than one method")
            found |= getattr(part, field)
        return found

    objective = only("objective")  # told first: two of them may share an extra's name too
    extras, columns, routes = merged("extras"), merged("columns"), merged("routes")
    if clash := sorted(RECORD & routes.keys()):
        raise ValueError(f"the routes {clash} have the names of what records hold already")
    between = tuple(b for part in parts for b in part.between)
    written = {name for b in between for name in b.writes}
    if still := sorted(written & columns.keys()):
        raise ValueError(
            f"{still} is written between steps, but was computed once, before training: it would "
            "never move; let the method read it live"
        )
    if unknown := written - extras.keys():
        raise ValueError(
            f"{sorted(unknown)} is written between steps but no composed method defines it"
        )
    for name in {name for b in between if b.exact for name in b.writes}:
        extras[name] = _in_float32(extras[name])
    wraps = [part.wrap for part in parts if part.wrap]

    def wrap(tx):
        for outer in reversed(wraps):
            tx = outer(tx)
        return tx

    return Method(
        objective=objective,
        separable=all(part.separable for part in parts),
        likelihood=any(part.likelihood for part in parts),
        reads=next((part.reads for part in parts if part.objective), "rows"),
        select=only("select"),
        oversample=max((part.oversample for part in parts), default=1),
        wrap=wrap if wraps else None,
        extras=extras,
        between=between,
        routes=routes,
        columns=columns,
        adapter=only("adapter"),
    )


def bound(lm: LM, method: Method, extras: Extras) -> LM:
    """The model as a method's functions see it: of the adapter's params, where there is one."""
    return method.adapter.bind(lm, extras[BASE]) if method.adapter else lm


def whole(lm: LM, method: Method, params: Params, extras: Extras) -> Params:
    """Trained params as `lm` takes them: with the base, where they are an adapter's."""
    return method.adapter.whole(lm, extras[BASE], params) if method.adapter else params


def copy_of_params(params: Params, load: Callable[[str], Params]) -> Params:
    """`Extra.init` of an extra that starts as the params, copied since the step donates them."""
    del load
    return jax.tree.map(jnp.copy, params)


def _in_float32(extra: Extra) -> Extra:
    """The same extra, its numbers of fewer bits widened."""

    def wide(x):
        return x.astype(jnp.float32) if jnp.issubdtype(x.dtype, jnp.floating) else x

    init = lambda params, load: jax.tree.map(wide, extra.init(params, load))
    return dataclasses.replace(extra, init=init)


def params_of(model: str) -> Extra:
    """The extra that is another model: a run's work folder, a converted or Hugging Face folder."""
    return Extra(lambda params, load: load(model), model=model)
