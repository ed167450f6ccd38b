"""What a checked `Run` is made of: mesh, model, optimizer, state and the compiled step.

Kept apart from the loop so that studies and planning build exactly what training does.
"""

import dataclasses
import functools
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
import optax

from jaxlm import chips, flops, sharding
from jaxlm.abstract import abstract_state
from jaxlm.checkpoint.digest import named
from jaxlm.checkpoint.stacks import of_layers
from jaxlm.contract import BASE, LM, TrainState, bound, whole
from jaxlm.hf import folder as hf
from jaxlm.hf.load import load as load_hf
from jaxlm.models.options import anywhere
from jaxlm.models.transformer import DecoderConfig, decoder, parameter_count_by_part
from jaxlm.optim.build import build as build_optimizer
from jaxlm.params import Hold, Kept
from jaxlm.params import load as load_params
from jaxlm.specs import Run
from jaxlm.step import init_state, make_between, make_step
from jaxlm.stored import Stored, is_run, look


class Built(NamedTuple):
    run: Run  # its model's vocabulary is known
    mesh: jax.sharding.Mesh
    lm: LM
    tx: optax.GradientTransformation
    schedule: Any  # step -> learning rate
    abstract: TrainState  # shapes, dtypes and shardings of the whole state
    scorer: LM  # for evaluation, whose rows hold several documents that must not see each other
    stored: Mapping[str, Stored]  # extra or column -> the model on disk that it is of

    def step(self):
        """The jitted training step, and what runs between steps."""
        shardings = jax.tree.map(lambda x: x.sharding, self.abstract)
        step = make_step(
            self.lm,
            self.run.method,
            self.tx,
            accumulate=self.run.accumulate,
            sums=self.run.optimizer.gradient_dtype or "float32",
            spike_sigmas=self.run.guard.spike_sigmas,
            shardings=shardings,
        )
        return step, make_between(self.run.method, shardings=shardings)

    @property
    def apart(self) -> DecoderConfig:
        """The model as it is where rows hold documents that must not see each other."""
        return kept_apart(self.run)

    def rows_here(self) -> np.ndarray:
        """Which rows of a global batch the devices of this process hold, in order."""
        rows = np.arange(self.run.rows)
        places = sharding.batch_sharding(self.mesh).addressable_devices_indices_map(rows.shape)
        return np.unique(np.concatenate([rows[place] for place in places.values()]))

    def trace(self):
        """The step traced for shapes alone: no array is made, so the devices need not be here."""
        step, _ = self.step()
        key = jax.eval_shape(lambda: jax.random.key(0))
        with jax.set_mesh(self.mesh):
            return step.trace(self.abstract, self.abstract_batch(), key)

    def abstract_batch(self, beside: bool = True) -> dict[str, jax.ShapeDtypeStruct]:
        """Shapes and shardings of a packed batch (`jaxlm.contract`).

        `beside`: with what it has next to its records, routes and columns.
        """
        where = sharding.batch_sharding(self.mesh)
        make = lambda like: jax.ShapeDtypeStruct(like.shape, like.dtype, sharding=where)
        return {name: make(like) for name, like in self.zeros(self.run.rows, beside).items()}

    def zeros(self, rows: int, beside: bool = True) -> dict[str, np.ndarray]:
        """A batch of that many rows of what the method reads, all of it padding."""
        members = (self.run.members,) if self.run.members > 1 else ()
        shape = (rows, *members, self.run.data.length)
        ids = ("tokens", "targets", "segments", "positions")
        batch = {name: np.zeros(shape, np.int32) for name in ids}
        batch |= {"weights": np.zeros(shape, np.float32)}
        if self.run.method.reads == "feedback":
            batch |= {"desirable": np.zeros(rows, np.float32)}
        batch |= {name: np.zeros(rows, np.int32) for name in ("source", "index")}
        if not beside:
            return batch
        batch |= {name: np.zeros(rows, np.float32) for name in self.run.method.routes}
        for name in self.run.method.columns:
            fields = self.column_fields(name)
            if clash := sorted(fields.keys() & batch.keys()):
                raise ValueError(f"the fields {clash} are given by more than one column")
            batch |= {field: np.zeros((rows, *x.shape), x.dtype) for field, x in fields.items()}
        return batch

    def column(self, name: str):
        """(params, batch) -> the fields of a column, and the shapes of these params."""
        column, lm = self.run.method.columns[name], self.lm.others.get(name, self.lm)
        fn = lambda params, batch: column.fn(lm, params, batch)
        if name in self.stored:
            return fn, sharding.abstract_params(lm, self.mesh)
        return fn, self.abstract_start

    def column_fields(self, name: str) -> dict[str, jax.ShapeDtypeStruct]:
        """Shapes and dtypes of a column's fields, of one record. Raises `ValueError` for fields
        that a batch has without it."""
        fn, params = self.column(name)
        batch = self.abstract_batch(beside=False)
        fields = jax.eval_shape(fn, params, batch)
        if clash := sorted(fields.keys() & (batch.keys() | self.run.method.routes.keys())):
            raise ValueError(
                f"the column {name!r} gives {clash}, which the batch has already: it would be "
                "overwritten; give the column's fields names of their own"
            )
        one = lambda x: jax.ShapeDtypeStruct(x.shape[1:], x.dtype)
        return {field: one(x) for field, x in fields.items()}

    def model_flops(self) -> int:
        """FLOPs that the model needs for one step, as MFU counts them.

        Nothing is counted that is computed twice to save memory, and of attention's products only
        the visible share: what a query may see of its row, taken as one document.
        """
        return self.needed(*self.plain_flops("none", experts_over=""))

    def needed(self, total: int, attention: int) -> int:
        """Of FLOPs with attention's whole square in them, those without what no query may see."""
        windows = [kind.window for kind in self.run.model.kinds]
        unseen = 1 - flops.mean_visible_share(self.run.data.length, windows)
        return total - round(unseen * attention)

    def plain_flops(self, remat: str, **options) -> tuple[int, int]:
        """FLOPs of the step with that rematerialisation and whole products, and attention's share.

        `options`: others of the model.

        Those of the optimizer (Muon has some) do not count.

        Traced with the layers scanned, which is quicker and counts the same, and with attention as
        the plain products that any kernel stands for.
        """
        options |= {"attention": "xla", "remat": remat, "scan_layers": "on"}
        model = dataclasses.replace(self.run.model, **options)
        traced = remade(self, model).trace()
        whole, attention, optimizer = (
            flops.count_flops(traced.jaxpr, scope=scope) for scope in ("", "attend", "optimizer")
        )
        return whole - optimizer, attention

    def put(self, batch: dict[str, np.ndarray]) -> dict[str, jax.Array]:
        """The rows of a batch that this process needs (`rows_here`), onto the mesh."""
        layout = sharding.batch_sharding(self.mesh)
        if jax.process_count() == 1:
            return jax.device_put(batch, layout)
        all_rows, here = np.arange(self.run.rows), self.rows_here()

        def make(value):
            part = lambda place: value[np.searchsorted(here, all_rows[place[0]])]
            return jax.make_array_from_callback((len(all_rows), *value.shape[1:]), layout, part)

        return {name: make(value) for name, value in batch.items()}

    def put_whole(self, batch: dict[str, np.ndarray]) -> dict[str, jax.Array]:
        """A batch that every host holds whole, onto the mesh."""
        return sharding.put_rows(self.mesh, batch)

    @property
    def abstract_model(self):
        """Shapes, dtypes and shardings of the model's own params, as `lm` makes them."""
        adapted = self.run.method.adapter is not None
        return sharding.abstract_params(self.lm, self.mesh) if adapted else self.abstract.params

    @property
    def abstract_start(self):
        """The same of `start_params`: of an adapter's base as the method holds it."""
        adapted = self.run.method.adapter is not None
        return self.abstract.extras[BASE] if adapted else self.abstract.params

    def parameters(self) -> dict[str, int]:
        """Numbers in each part of the model, and in the adapter where one is trained instead."""
        parts = parameter_count_by_part(self.abstract_model)
        if self.run.method.adapter:
            parts["adapter"] = sum(x.size for x in jax.tree.leaves(self.abstract.params))
        return parts

    def whole(self, params, extras):
        """Trained params, or an extra like them, as `lm` and `scorer` take them: with the base,
        where they are an adapter's."""
        if self.lm.low_rank or not self.run.method.adapter:
            return whole(self.lm, self.run.method, params, extras)
        return jax.jit(lambda *trees: whole(self.lm, self.run.method, *trees))(params, extras)

    def new_params(self):
        """Fresh params of the model, made on the devices where they will lie."""
        layout = jax.tree.map(lambda x: x.sharding, self.abstract_model)
        key = jax.random.key(self.run.seed)
        return jax.jit(self.lm.init, out_shardings=layout)(key)

    def load(self, path: str, hold: Hold | None = None):
        """The params of a run, a checkpoint or a Hugging Face folder, laid out like ours.

        `hold`: turns them, as they come, into those of `abstract_start`.
        """
        folder, wanted = Path(path).expanduser(), self.abstract_model
        kept = hold and Kept(hold, self.abstract_start)
        if hf.is_one(folder) and not is_run(folder):
            return load_hf(hf.open_folder(folder), wanted, self.run.model, kept)
        return load_params(folder, wanted, how=self.run.checkpoint.verify, kept=kept)

    def load_other(self, name: str):
        """The params of a model of its own (`Extra.model`, `Column.model`)."""
        wanted = sharding.abstract_params(self.lm.others[name], self.mesh)
        found = self.stored[name]
        return found.load(wanted, found.find(how=self.run.checkpoint.verify))

    def start_params(self):
        """The params that a new run starts from; of an adapter its base, as the method holds it."""
        same = jax.tree.structure(self.abstract_start) == jax.tree.structure(self.abstract_model)
        base = self.run.method.extras.get(BASE)
        hold = (lambda params: base.init(params, self.load)) if base else lambda params: params
        start = self.run.init.checkpoint or self.run.init.hf
        if start and not same:
            return self.load(start, hold)
        return hold(self.load(start) if start else self.new_params())

    def first_state(self) -> TrainState:
        """The state that a new run starts from."""
        base = params = self.start_params()
        layout = jax.tree.map(lambda x: x.sharding, self.abstract)._replace(extras={})
        method = dataclasses.replace(self.run.method, extras={})
        if method.adapter:
            new = bound(self.lm, method, {BASE: base}).init
            params = jax.jit(new, out_shardings=layout.params)(jax.random.key(self.run.seed))
        init = jax.jit(lambda p: init_state(p, method, self.tx), out_shardings=layout)
        # Outside the jitted init, since an extra may load its params from a file.
        extras = {
            name: self.load_other(name) if extra.model else extra.init(params, self.load)
            for name, extra in self.run.method.extras.items()
            if name != BASE
        } | ({BASE: base} if method.adapter else {})
        extras = jax.tree.map(
            lambda x, a: jax.device_put(x, a.sharding), extras, self.abstract.extras
        )
        return init(params)._replace(extras=extras)


def build(run: Run, vocabulary: int, devices=None) -> Built:
    """Everything but the arrays. Raises `ValueError` for what cannot be built; call under no jit.

    `vocabulary`: the tokenizer's, used where the recipe leaves the model's at 0.
    """
    mesh = sharding.make_mesh(run.mesh, devices)
    run.check_devices(mesh)
    device = mesh.devices.flat[0]
    # A CPU, slow at it, stands in for tests and plans.
    if run.model.quantize == "fp8" and device.platform != "cpu" and not chips.has_fp8(device):
        raise ValueError(chips.no_fp8(device.device_kind))
    model = run.model
    if not model.vocabulary:
        model = dataclasses.replace(model, vocabulary=vocabulary)
    if model.vocabulary < vocabulary:
        raise ValueError(
            f"config.model.vocabulary={model.vocabulary} is smaller than the tokenizer's, "
            f"{vocabulary}; 0 takes the tokenizer's"
        )
    packed = not run.data.attend_across_documents
    make = functools.partial(
        decoder, platform=sharding.platform(mesh), sequence=mesh.shape["sequence"]
    )
    others = {**run.method.extras, **run.method.columns}
    found = {name: look(other.model) for name, other in others.items() if other.model}
    for name, model_there in found.items():
        _refuse_unlike(name, model_there, run, vocabulary)
    fit = lambda options: dataclasses.replace(anywhere(options), loss_chunk=model.loss_chunk)
    made = lambda packed: {n: make(fit(f.options), packed=packed) for n, f in found.items()}
    lm = make(model, packed=packed)._replace(others=made(packed))
    run = dataclasses.replace(run, model=model)
    scorer = lm if packed else make(kept_apart(run))._replace(others=made(True))
    shapes = jax.eval_shape(lm.init, jax.random.key(0))
    sharding.refuse_replicated(lm.axes, shapes, mesh)
    trained = bound(lm, run.method, {BASE: shapes})
    tx, schedule = build_optimizer(run.optimizer, run.steps, trained.axes)
    if run.method.wrap:
        tx = run.method.wrap(tx)
    tx = optax.with_extra_args_support(tx)
    abstract = abstract_state(run, mesh, lm, tx)
    if run.init.hf and not is_run(run.workdir):
        source = hf.open_folder(Path(run.init.hf).expanduser())
        hf.matched(source, of_layers(named(shapes)), model)
    return Built(run, mesh, lm, tx, schedule, abstract, scorer, found)


def kept_apart(run: Run) -> DecoderConfig:
    """The run's model; where training attends across documents, with a backend that need not."""
    if not run.data.attend_across_documents:
        return run.model
    return dataclasses.replace(run.model, attention="auto")


def remade(built: Built, model) -> Built:
    """The same run on the same devices with another `DecoderConfig`."""
    run = dataclasses.replace(built.run, model=model)
    return build(run, model.vocabulary, list(built.mesh.devices.flat))


def _refuse_unlike(name, found, run, vocabulary):
    """What the options of another model show without its tokenizer."""
    places, rows = found.options.learned_positions, found.options.vocabulary
    if 0 < places < run.data.length:
        raise ValueError(
            f"the {name} {found.folder} has a table of {places:,} positions, and rows are longer: "
            f"config.data.length={run.data.length:,}; shorten the rows, or take another model"
        )
    if rows < vocabulary:
        raise ValueError(
            f"the {name} {found.folder} has {rows:,} rows in its embedding, and the vocabulary of "
            f"this run is {vocabulary:,}: they have other tokenizers; set "
            f"--config.data.tokenizer={found.tokenizer} to train with that one"
        )
