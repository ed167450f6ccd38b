"""Whole experts on each device: experts are split over an axis of the mesh, and their width is not.

Letters: B batch, L length, T tokens, D width, F width of an expert; E experts that a device has, C
experts chosen for each token; N rows of a block; I and O what a kernel takes and gives, R the rank
of factors beside it.

fsdp    the tokens of all devices along it are gathered, each device multiplies those that chose its
        experts, and the outputs are scattered back as sums. No kernel is ever gathered and no
        kernel's gradient scattered: 5·T·D numbers travel a layer and step in place of three times
        all experts' kernels, which is less for few tokens a device and more for many. An all-to-all
        would send the chosen tokens only; how many these are is known too late for a shape.
tensor  tokens lie there on every device already, and outputs are summed as those of slices are.
        What travels stays the same; each device's products are of whole experts.

No token is dropped: if all choose one device's experts, that device multiplies them all. A slot is
an index here, and there are enough for that; blocks that nobody needs are not run, and no array but
those of tokens grows with the number of slots. So each block goes through all three kernels before
the next, and the backward pass multiplies by gate and up once more whatever `config.remat` says: 11
products in place of 9 without rematerialisation, 11 in place of 12 with all of it.

What is given for it is balance: the others wait for the device whose experts are most popular, n
times as long as for an even share at the worst of n devices, where slices of every expert's width
(`experts`) let nobody wait. The load-balance loss evens that out on average, not in each batch. Nor
can one axis hold more devices than there are experts.
"""

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxlm import flops, sharding
from jaxlm.models import layers, quantized
from jaxlm.models.expert_blocks import block_size, slots
from jaxlm.models.expert_devices import Split, summed
from jaxlm.models.options import ACTIVATIONS, DecoderConfig

MOST = 4096  # rows of a block: with more only what it works with grows


class How(NamedTuple):
    """What is known of the work before any token is."""

    nonlinearity: Callable
    experts: int  # of all devices
    over: tuple[str, ...]  # axes of the mesh that split experts; () where none does
    gathers: bool  # whether these split tokens too
    units: tuple[str, ...]  # axes that split the width of experts


class Work(NamedTuple):
    """The blocks that one device multiplies."""

    tokens_BN: jax.Array  # whose row each slot holds; those of empty slots are beyond all tokens
    weights_BN: jax.Array
    expert_B: jax.Array
    used: jax.Array  # how many there are to run
    slot_TC: jax.Array  # of each pair; beyond all slots where another device has it


def kernel_axes(name: str, over: str) -> tuple[str | None, ...]:
    """Logical axes of one kernel of all experts. An axis of the mesh splits an array only once."""
    takes, gives = layers.KERNEL_AXES[name]
    if not over:
        return "experts", takes, gives
    takes, gives = (None if sharding.LOGICAL[axis] == over else axis for axis in (takes, gives))
    return f"experts_over_{over}", takes, gives


def apply(config: DecoderConfig, split: Split, kernels, x_BLD, chosen_BLC, weights_BLC, mask_BL):
    """The mixture for the tokens of one device, and the taps of its experts."""
    gathers = bool(split.experts) and set(split.experts) <= set(split.tokens)
    nonlinearity = ACTIVATIONS[config.activation][0]
    how = How(nonlinearity, config.experts, split.experts, gathers, split.width)
    x_TD, chosen_TC, weights_TC = (
        x.reshape(-1, x.shape[-1]) for x in (x_BLD, chosen_BLC, weights_BLC)
    )
    fed: Any = feed(how, kernels, x_TD, weights_TC, chosen_TC, mask_BL.reshape(-1))
    y_TD, taps = fed
    y_TD = summed(y_TD, (*(() if how.gathers else how.over), *how.units))
    taps = summed(taps, tuple(axis for axis in split.tokens if axis not in how.over))
    return y_TD.reshape(x_BLD.shape), taps


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def feed(how: How, kernels, x_TD, weights_TC, chosen_TC, mask_T):
    """The share of the outputs that is this device's, and what its experts' kernels gave: for each
    the sums over tokens of mask·|y| [E, O] and of mask [E]."""
    return _feed(how, kernels, x_TD, weights_TC, chosen_TC, mask_T)


def _feed(how, kernels, x_TD, weights_TC, chosen_TC, mask_T):
    x_TD, weights_TC, chosen_TC, mask_T = _gathered(how, x_TD, weights_TC, chosen_TC, mask_T)
    kernels = _arrays(kernels, x_TD.dtype)
    E, work = _of_all(kernels), _work(how, _of_all(kernels), weights_TC, chosen_TC)

    def block(b, carry):
        y_TD, taps, tokens_E = carry
        tokens_N, expert = work.tokens_BN[b], work.expert_B[b]
        here, x_ND, mask_N = _one(kernels, expert), _rows(x_TD, tokens_N), _rows(mask_T, tokens_N)
        given = {name: _product(x_ND, k) for name, k in here.items() if name != "down"}
        part_ND = _product(_inner(how, given), here["down"])
        weighed_ND = part_ND.astype(jnp.float32) * work.weights_BN[b][:, None]
        y_TD = _add_rows(y_TD, tokens_N, weighed_ND)
        # All devices with slices of these experts run as many blocks.
        given["down"] = summed(part_ND, how.units)
        of_mask = lambda y_NO: jnp.sum(jnp.abs(y_NO).astype(jnp.float32) * mask_N[:, None], axis=0)
        taps = {name: taps[name].at[expert].add(of_mask(y)) for name, y in given.items()}
        return y_TD, taps, tokens_E.at[expert].add(jnp.sum(mask_N))

    zeros = lambda *shape: jnp.zeros(shape, jnp.float32)
    taps = {name: zeros(E, kernel.shape[-1]) for name, (kernel, *_) in kernels.items()}
    start = zeros(*x_TD.shape), taps, zeros(E)
    y_TD, taps, tokens_E = _run(how, work, E, block, start)
    taps = {name: (sums_EO, tokens_E) for name, sums_EO in taps.items()}
    return _scattered(how, y_TD.astype(x_TD.dtype)), taps


def _forward(how, kernels, *tokens):
    trained = jax.tree.map(lambda part: () if part.perturbed else None, _first_parts(kernels))
    kernels, tokens = jax.tree.map(lambda part: part.value, (kernels, tokens))
    *read, _ = tokens
    return _feed(how, kernels, *tokens), (trained, kernels, *read)


def _backward(how, saved, cotangents):
    trained, stored, x_TD, weights_TC, chosen_TC = saved
    d_TD, _ = cotangents
    stored = {
        name: (quantized.array_again(kernel, d_TD)[0], *factors)
        for name, (kernel, *factors) in stored.items()
    }
    x_TD, weights_TC, chosen_TC, d_TD = _gathered(how, x_TD, weights_TC, chosen_TC, d_TD)
    E, work = _of_all(stored), _work(how, _of_all(stored), weights_TC, chosen_TC)

    def block(b, carry):
        d_x_TD, d_weights_BN, d_kernels = carry
        tokens_N, expert, weights_N = work.tokens_BN[b], work.expert_B[b], work.weights_BN[b]
        here, x_ND, d_ND = _one(stored, expert), _rows(x_TD, tokens_N), _rows(d_TD, tokens_N)
        given = {name: _product(x_ND, k) for name, k in here.items() if name != "down"}
        inner_NF, pull = jax.vjp(functools.partial(_inner, how), given)
        d_inner_NF = _transposed(d_ND, here["down"]).astype(jnp.float32)
        d_weights_N = jnp.sum(inner_NF.astype(jnp.float32) * d_inner_NF, axis=1)
        weighed = lambda d: (d.astype(jnp.float32) * weights_N[:, None]).astype(x_TD.dtype)
        (d_given,) = pull(weighed(d_inner_NF))
        d_x_ND = sum(
            (_transposed(d, here[name]).astype(jnp.float32) for name, d in d_given.items()),
            jnp.zeros(x_ND.shape, jnp.float32),
        )
        of = {name: (x_ND, d) for name, d in d_given.items()} | {"down": (inner_NF, weighed(d_ND))}
        new = {name: _of_kernels(x, here[name], d, trained[name]) for name, (x, d) in of.items()}
        d_kernels = jax.tree.map(lambda sums, d: sums.at[expert].add(d), d_kernels, new)
        return (
            _add_rows(d_x_TD, tokens_N, d_x_ND),
            d_weights_BN.at[b].set(d_weights_N),
            d_kernels,
        )

    zeros = lambda like: jnp.zeros(like.shape, jnp.float32)
    asked = lambda sign, kernel: None if sign is None else zeros(kernel)
    is_sign = lambda node: node is None or node == ()
    start = jax.tree.map(asked, trained, stored, is_leaf=is_sign)
    start = zeros(x_TD), zeros(work.weights_BN), start
    d_x_TD, d_weights_BN, d_kernels = _run(how, work, E, block, start)
    cast = lambda sign, d, kernel: None if sign is None else d.astype(kernel.dtype)
    d_kernels = jax.tree.map(cast, trained, d_kernels, stored, is_leaf=is_sign)
    d_weights_TC = d_weights_BN.reshape(-1).at[work.slot_TC].get(mode="fill", fill_value=0)
    d_x_TD, d_weights_TC = (_scattered(how, d) for d in (d_x_TD.astype(x_TD.dtype), d_weights_TC))
    return d_kernels, d_x_TD, d_weights_TC, None, None


feed.defvjp(_forward, _backward, symbolic_zeros=True)


def _work(how, E, weights_TC, chosen_TC):
    T, C = chosen_TC.shape
    first = jax.lax.axis_index(how.over) * E if how.over else 0
    expert_P = chosen_TC.reshape(-1) - first
    mine_P = (expert_P >= 0) & (expert_P < E)
    size = min(block_size(T * C, how.experts), MOST)
    slot_P, expert_B, used = slots(jnp.where(mine_P, expert_P, E), E, size)
    S = len(expert_B) * size
    slot_P = jnp.where(mine_P, slot_P, S)
    put = lambda empty_S, of_P: empty_S.at[slot_P].set(of_P, mode="drop").reshape(-1, size)
    tokens_BN = put(T + jnp.arange(S), jnp.arange(T * C) // C)  # no two rows of a block the same
    weights_BN = put(jnp.zeros(S, jnp.float32), weights_TC.reshape(-1))
    return Work(tokens_BN, weights_BN, expert_B, used, slot_P.reshape(T, C))


def _run(how, work, E, block, start):
    """`block` for the blocks that are used: where experts are even, four and a half for each."""
    T, C = work.slot_TC.shape
    even = T * C / how.experts / work.tokens_BN.shape[1]
    usual = min(math.ceil(E * (even + 0.5)), len(work.expert_B))
    with jax.named_scope(flops.usual_trips(usual)):
        return jax.lax.fori_loop(0, work.used, block, start)


def _inner(how, given):
    inner_NF = how.nonlinearity(given["gate" if "gate" in given else "up"])
    return inner_NF * given["up"] if "gate" in given else inner_NF


def _product(x_NI, kernels):
    """With the product of the factors beside a kernel added, if there are such."""
    kernel_IO, *factors = kernels
    y_NO = x_NI @ kernel_IO
    return y_NO + (x_NI @ factors[0]) @ factors[1] if factors else y_NO


def _transposed(d_NO, kernels):
    """The gradient of what `_product` reads."""
    kernel_IO, *factors = kernels
    d_NI = d_NO @ kernel_IO.T
    return d_NI + (d_NO @ factors[1].T) @ factors[0].T if factors else d_NI


def _of_kernels(x_NI, kernels, d_NO, trained):
    """The gradients of the kernels of `_product` that are trained; None for the others."""
    _, *factors = kernels
    of = functools.partial(jnp.einsum, "NI,NO->IO", preferred_element_type=jnp.float32)
    pairs = [(x_NI, d_NO)]
    if factors:
        pairs += [(x_NI, d_NO @ factors[1].T), (x_NI @ factors[0], d_NO)]
    return tuple(
        None if sign is None else of(x, d) for sign, (x, d) in zip(trained, pairs, strict=True)
    )


def _arrays(kernels, dtype):
    return {
        name: (quantized.array(kernel, dtype), *factors)
        for name, (kernel, *factors) in kernels.items()
    }


def _first_parts(kernels):
    """Of a kernel in few bits one array stands for it: none of them is trained."""
    return {
        name: (jax.tree.leaves(kernel)[0], *factors) for name, (kernel, *factors) in kernels.items()
    }


def _of_all(kernels):
    """How many experts these are of."""
    return len(kernels["up"][0])


def _one(kernels, expert):
    return jax.tree.map(lambda kernel: kernel[expert], kernels)


def _rows(x_T, tokens_N):
    """Those rows; zeros for what lies beyond."""
    return x_T.at[tokens_N].get(mode="fill", fill_value=0, unique_indices=True)


def _add_rows(x_TD, tokens_N, rows_ND):
    return x_TD.at[tokens_N].add(rows_ND, mode="drop", unique_indices=True)


def _gathered(how, *arrays):
    """Of the tokens of all devices along the axis of experts."""
    if not how.gathers:
        return arrays
    return tuple(jax.lax.all_gather(x, how.over, tiled=True) for x in arrays)


def _scattered(how, x_T):
    """The sum of what these devices have of each token, to where the token is."""
    if not how.gathers:
        return x_T
    return jax.lax.psum_scatter(x_T, how.over, scatter_dimension=0, tiled=True)
