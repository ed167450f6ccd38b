"""FLOPs of a program, counted from its jaxpr; and the matmul peak to hold them against.

Counted are matrix products and convolutions, 2 for each multiply-add. XLA's own `cost_analysis`
counts the body of a scan once and a kernel not at all, so it cannot be used for a model that is
scanned over its layers. What remat computes again is counted again: the share of the peak is that
of the hardware's work (HFU); without remat it is the model's (MFU).
"""

import functools
import math
import re
import time
from collections.abc import Iterable

import jax
import jax.numpy as jnp

from jaxlm import chips


def peak_flops(device, dtype: str = "bfloat16") -> tuple[float, str]:
    """FLOP/s that one device can reach in matrix products, and "measured" or "published".

    The published figures are for bfloat16; JAX's default precision computes float32 products in
    bfloat16 on a TPU, but not on a GPU, so there float32 is measured. The CPU devices of a process
    share its cores, and so the peak.
    """
    known = chips.of_kind(device.device_kind)
    half = jnp.dtype(dtype).itemsize == 2
    if known and (half or device.platform == "tpu"):
        return known.flops, "published"
    sharing = jax.local_device_count("cpu") if device.platform == "cpu" else 1
    return matmul_peak(dtype, device) / sharing, "measured"


@functools.cache
def matmul_peak(dtype: str = "float32", device=None) -> float:
    """FLOP/s of the fastest of some square matrix products on this device, in about 0.5 s."""
    device = device or jax.devices()[0]
    best, seconds, began = 0.0, 0.0, time.perf_counter()
    for size in (1024, 2048, 4096, 8192):
        with jax.default_device(device):
            x = jnp.full((size, size), 1 / 3, dtype)
        product = jax.jit(jnp.matmul).lower(x, x).compile()
        jax.block_until_ready(product(x, x))
        for _ in range(4):
            start = time.perf_counter()
            jax.block_until_ready(product(x, x))
            seconds = time.perf_counter() - start
            best = max(best, 2 * size**3 / seconds)
        if time.perf_counter() - began + 5 * 8 * seconds > 0.8:  # the next size takes 8 times that
            break
    return best


def count_flops(jaxpr, unknown: list[str] | None = None, *, scope: str = "") -> int:
    """FLOPs of matrix products and convolutions in a jaxpr, scan bodies times their length.

    Of a `cond` the dearest branch counts. The trips of a `while_loop` are unknown, but for one in
    the scope of `usual_trips`: its body counts once, and its name is added to `unknown`. In a
    `shard_map` the body counts once per shard.
    With `scope` only what was traced inside `jax.named_scope(scope)` counts.
    """
    jaxpr = getattr(jaxpr, "jaxpr", jaxpr)  # of a closed one
    return sum(_of_equation(equation, unknown, scope) for equation in jaxpr.eqns)


def _of_equation(equation, unknown, scope):
    name, params = equation.primitive.name, equation.params
    if scope and scope in _scopes(equation):
        scope = ""  # all inside belongs to it
    if name in PRODUCTS:
        return 0 if scope else PRODUCTS[name](equation)
    if name == "cond":
        return max(count_flops(branch, unknown, scope=scope) for branch in params["branches"])
    inside = sum(count_flops(inner, unknown, scope=scope) for inner in _programs(params))
    if name == "while":
        trips = USUAL_TRIPS.search(str(equation.source_info.name_stack))
        if inside and not trips and unknown is not None:
            unknown.append(name)
        return inside * (int(trips.group(1)) if trips else 1)
    if name == "scan":
        return params["length"] * inside
    if name == "shard_map":
        # The body is written for one shard of these axes; over the others it is still whole.
        return math.prod(params["mesh"].shape[a] for a in params["newly_manual_axes"]) * inside
    if name == "pallas_call":
        return math.prod(params["grid_mapping"].grid) * inside
    return inside


def _of_dot(equation):
    (contract, _), (batch, _) = equation.params["dimension_numbers"]
    left, right = (v.aval.shape for v in equation.invars)
    shared = math.prod(left[i] for i in (*contract, *batch))
    return 2 * math.prod(left) * math.prod(right) // max(shared, 1)


def _of_convolution(equation):
    # Each output number sums over the kernel's window and the input features of its group.
    kernel = equation.invars[1].aval.shape
    out_feature = equation.params["dimension_numbers"].rhs_spec[0]
    window = math.prod(kernel) // max(kernel[out_feature], 1)
    return 2 * math.prod(equation.outvars[0].aval.shape) * window


def visible_share(length: int, window: int = 0) -> float:
    """Share of a row's [L, L] pairs that causal attention looks at; a window of 0 is no window."""
    seen = min(window or length, length)
    return (seen * (seen + 1) / 2 + (length - seen) * seen) / length**2


def mean_visible_share(length: int, windows: Iterable[int]) -> float:
    """`visible_share` on average over layers with these windows."""
    shares = [visible_share(length, window) for window in windows]
    return sum(shares) / len(shares)


def usual_trips(count: int) -> str:
    """The scope for a `while_loop` whose trips depend on the data, and are so many on average: what
    counts a program reads them there."""
    return f"trips_{count}"


USUAL_TRIPS = re.compile(r"\btrips_(\d+)\)*(?:/while)?$")  # end of the name of a loop
PRODUCTS = {"dot_general": _of_dot, "conv_general_dilated": _of_convolution}


def _scopes(equation):
    """Names of the scopes an equation was traced in: of "transpose(jvp(mlp))/up" mlp and up too."""
    return re.split(r"\W+", str(equation.source_info.name_stack))


def _programs(params):
    """The jaxprs among the parameters of an equation: of jit, remat, scan, custom_vjp and others.

    Only the forward program of a custom derivative is among them; when it has been differentiated,
    the jaxpr holds both directions as plain equations.
    """
    for value in params.values():
        for item in value if isinstance(value, (tuple, list)) else (value,):
            if hasattr(getattr(item, "jaxpr", item), "eqns"):
                yield item
