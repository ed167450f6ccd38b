"""What a decoder can be: its options, what their zeros stand for, and which shapes are impossible.

The fields of `DecoderConfig` are the keys of `config.model`.
"""

import dataclasses
import difflib
import functools
import math
from collections.abc import Iterable, Mapping

import jax

from jaxlm.models import attention, pattern, rope

# Name of the feed-forward's form -> its nonlinearity, and whether a gate multiplies the up part.
ACTIVATIONS = {
    "swiglu": (jax.nn.silu, True),
    "geglu": (jax.nn.gelu, True),  # the tanh form, as in Gemma
    "gelu": (jax.nn.gelu, False),
    "gelu_exact": (functools.partial(jax.nn.gelu, approximate=False), False),  # GPT-NeoX
}
NORMS = ("rms", "rms_plus_one", "layer")  # see `layers.Norm`
NORM_PLACES = ("before", "after", "both")  # of what attention and feed-forward read and write

_policies = jax.checkpoint_policies


def _and_attended(policy):
    """That policy, and what attention returned: the kernels need it, and are dear to run again."""
    attended = _policies.save_only_these_names("attended")
    return lambda *eqn, **params: attended(*eqn, **params) or policy(*eqn, **params)


# What the backward pass finds stored of a block; the rest it computes again. None = store all.
REMAT = {
    "none": None,
    "full": _policies.nothing_saveable,  # the inputs of each block only: least memory, +33 % FLOPs
    "dots": _and_attended(_policies.dots_saveable),
    "dots_no_batch": _and_attended(_policies.dots_with_no_batch_dims_saveable),  # not the scores
    "dots_offloaded": _and_attended(
        _policies.offload_dot_with_no_batch_dims("device", "pinned_host")
    ),
    "attention": _policies.save_only_these_names("attention", "attended"),  # it read and returned
}

QUANTIZE = ("off", "int8", "fp8")
EXPERTS_OVER = ("", "fsdp", "tensor")
DTYPES = ("float32", "bfloat16", "float16")

# What is read only where another option is on; and of rotary positions.
IDLE_WITHOUT = {
    "experts": ("experts_per_token", "router_balance", "experts_over"),
    "qk_norm": ("qk_norm_over",),
}
ROTARY = ("rope_scaling", "rope_theta", "local_rope_theta", "rotary_fraction")


@dataclasses.dataclass(frozen=True)
class DecoderConfig:
    """One decoder; its defaults are a Llama, its options the rest of the family."""

    vocabulary: int = 0  # in a config, 0 = what the tokenizer has
    width: int = 128
    layers: int = 4
    heads: int = 2
    kv_heads: int = 0  # 0 = heads; fewer = grouped queries, 1 = multi-query
    head_width: int = 0  # 0 = width / heads
    ffn_width: int = 0  # 0 = 8/3 · width rounded up to 64 with a gate, else 4 · width
    activation: str = "swiglu"  # a name of ACTIVATIONS
    experts: int = 0  # feed-forwards, of which each token takes a few; 0 = one for all
    experts_per_token: int = 2
    router_balance: float = 0.0  # weight of the loss that evens out experts (Mixtral: 0.02)
    experts_over: str = ""  # axis of the mesh that splits whole experts; "" = each one's width
    qkv_bias: bool = False  # on query, key and value only (Qwen 2)
    attention_bias: bool = False  # on all four kernels of attention
    mlp_bias: bool = False
    bias: bool = False  # on every kernel but the head's
    tied: bool = True  # the head is the embedding table
    qk_norm: bool = False  # normalises queries and keys (Qwen 3)
    qk_norm_over: str = "head"  # head by head, or "width": all heads of a token at once (OLMo 2)
    window: int = 0  # positions a query sees, itself included; 0 = all before it
    layer_pattern: str = ""  # such as "local*5 global": the latter without window; see `pattern`
    local_rope_theta: float = 0.0  # of local layers, unscaled then; 0 = as in global ones
    attention_scale: float = 0.0  # of query · key; 0 = 1/sqrt(head_width)
    attention_soft_cap: float = 0.0  # scores through c·tanh(s/c); 0 = off
    logit_soft_cap: float = 0.0
    parallel_residual: bool = False  # attention and feed-forward read the same input (GPT-NeoX)
    learned_positions: int = 0  # a table of so many, added to the embedding; 0 = rotary ones
    rope_theta: float = 10000.0
    rope_scaling: str = ""  # for longer contexts, such as "linear factor=2"; see `rope`
    rotary_fraction: float = 1.0  # of the units of a head that positions turn (GPT-NeoX)
    embedding_scale: float = 1.0  # multiplies the token's embedding (Gemma: sqrt(width))
    norm: str = "rms"  # a name of NORMS
    norm_place: str = "before"  # a name of NORM_PLACES
    norm_eps: float = 1e-6
    init_scale: float = 1.0  # multiplies the standard deviation of every initial kernel
    dtype: str = "float32"  # of activations and products; norms, softmax, logits stay float32
    param_dtype: str = "float32"
    quantize: str = "off"  # a name of QUANTIZE: what products of kernels multiply, see `products`
    scan_layers: str = "auto"  # on | off | auto: on for a TPU, and with optimizer.offload
    remat: str = "none"  # a name of REMAT
    attention: str = "auto"  # a name of attention.BACKENDS, or auto
    loss_chunk: int = 0  # tokens of a device whose logits exist at one time; 0 = all

    @property
    def kinds(self) -> tuple[pattern.Kind, ...]:
        """Of each layer."""
        everywhere = self.rope_theta, self.rope_scaling
        of_local = (self.local_rope_theta, "") if self.local_rope_theta else everywhere
        local, whole = pattern.Kind(self.window, *of_local), pattern.Kind(0, *everywhere)
        return tuple(
            local if is_local else whole
            for is_local in pattern.is_local(self.layer_pattern, self.layers)
        )

    @property
    def rotary_width(self) -> int:
        """Units of a head that positions turn; of a resolved config."""
        return 0 if self.learned_positions else int(self.head_width * self.rotary_fraction)

    @property
    def query_scale(self) -> float:
        """What queries are multiplied by, next to the 1/sqrt(head_width) of attention."""
        return self.attention_scale * math.sqrt(self.head_width) if self.attention_scale else 1.0


def resolve(
    config: DecoderConfig, platform: str, *, packed: bool = True, sequence: int = 1
) -> DecoderConfig:
    """Fills in what zeros and autos stand for. Raises `ValueError` for what cannot be built.

    `packed`: rows may hold several documents. `sequence`: size of that mesh axis.
    """
    known("activation", config.activation, ACTIVATIONS)
    known("remat", config.remat, REMAT)
    known("dtype", config.dtype, DTYPES)
    known("param_dtype", config.param_dtype, DTYPES)
    known("quantize", config.quantize, QUANTIZE)
    known("scan_layers", config.scan_layers, ("auto", "on", "off"))
    known("experts_over", config.experts_over, EXPERTS_OVER)
    known("norm", config.norm, NORMS)
    known("norm_place", config.norm_place, NORM_PLACES)
    known("qk_norm_over", config.qk_norm_over, ("head", "width"))
    rope.parse(config.rope_scaling)
    pattern.is_local(config.layer_pattern, 0)
    _refuse_signs(config)
    _refuse_idle(config)
    _refuse_heads(config)
    _refuse_experts(config)
    gated = ACTIVATIONS[config.activation][1]
    ffn_width = -(-8 * config.width // (3 * 64)) * 64 if gated else 4 * config.width
    scan = "on" if platform == "tpu" else "off"
    head_width = config.head_width or config.width // config.heads
    needs = attention.Needs(
        window=config.window,
        soft_cap=config.attention_soft_cap,
        packed=packed,
        sequence=sequence,
        dtype=config.dtype,
        head_width=head_width,
    )
    resolved = dataclasses.replace(
        config,
        kv_heads=config.kv_heads or config.heads,
        head_width=head_width,
        ffn_width=config.ffn_width or ffn_width,
        scan_layers=scan if config.scan_layers == "auto" else config.scan_layers,
        attention=attention.resolve(config.attention, platform, needs),
    )
    _refuse_rotary(resolved)
    return resolved


def anywhere(config: DecoderConfig) -> DecoderConfig:
    """The same model for whatever devices it is opened on, where it is read and not trained.

    What was chosen for the machine that trained it (a kernel of attention, how layers lie, what the
    backward pass stores) is open again. Experts lie in slices: for the few tokens that are
    generated at a time nobody then waits for the device of one that all of them chose.
    """
    return dataclasses.replace(
        config, attention="auto", scan_layers="auto", remat="none", experts_over=""
    )


def experts_fit(config: DecoderConfig, sizes: Mapping[str, int]) -> bool:
    """Whether a mesh of these sizes can split the experts as `config.experts_over` says.

    Raises `ValueError` where that names no axis that can.
    """
    known("experts_over", config.experts_over, EXPERTS_OVER)
    return not config.experts_over or config.experts % sizes[config.experts_over] == 0


def known(key: str, value: str, names: Iterable[str]) -> None:
    """Raises `ValueError`, naming the nearest, unless `config.model.<key>` is one of `names`."""
    names = list(names)
    if value in names:
        return
    near = difflib.get_close_matches(str(value), names, n=1)
    raise ValueError(
        f"config.model.{key} is {value!r}, which is not one of {', '.join(map(repr, names))}"
        + (f"; did you mean {near[0]!r}?" if near else ".")
    )


def _refuse_signs(config):
    for key in ("vocabulary", "width", "layers", "heads"):
        if getattr(config, key) < 1:
            raise ValueError(
                f"config.model.{key} is {getattr(config, key)} and has to be at least 1"
                + (": set it to the size of the tokenizer." if key == "vocabulary" else ".")
            )
    for key in (
        "kv_heads",
        "head_width",
        "ffn_width",
        "window",
        "loss_chunk",
        "learned_positions",
        "experts",
    ):
        if getattr(config, key) < 0:
            raise ValueError(
                f"config.model.{key} is {getattr(config, key)} and cannot be negative; "
                "0 stands for its default."
            )
    for key in (
        "attention_soft_cap",
        "logit_soft_cap",
        "attention_scale",
        "local_rope_theta",
        "router_balance",
    ):
        if not 0 <= getattr(config, key) < math.inf:
            raise ValueError(
                f"config.model.{key} is {getattr(config, key)} and has to be a number that is not "
                "negative; 0 = "
                + {"attention_scale": "1/sqrt(head_width).", "local_rope_theta": "rope_theta."}.get(
                    key, "off."
                )
            )
    for key in ("rope_theta", "rotary_fraction", "embedding_scale", "norm_eps", "init_scale"):
        if not 0 < getattr(config, key) < math.inf:
            raise ValueError(
                f"config.model.{key} is {getattr(config, key)} and has to be a number greater than "
                "0."
            )
    if config.rotary_fraction > 1:
        raise ValueError(
            f"config.model.rotary_fraction is {config.rotary_fraction}, and cannot be above 1: it "
            "is a share of the units of a head."
        )


def _refuse_idle(config):
    """Options that change nothing, since the one that reads them is off."""
    usual = DecoderConfig()
    changed = lambda key: getattr(config, key) != getattr(usual, key)
    for switch, keys in IDLE_WITHOUT.items():
        for key in filter(changed, keys if not getattr(config, switch) else ()):
            raise ValueError(
                f"config.model.{key} is {getattr(config, key)!r}, which nothing reads without "
                f"config.model.{switch}: set that too, or leave {key} at {getattr(usual, key)!r}."
            )
    for key in filter(changed, ROTARY if config.learned_positions else ()):
        raise ValueError(
            f"config.model.{key} is {getattr(config, key)!r}, but there are no rotary positions "
            f"with config.model.learned_positions = {config.learned_positions}: leave {key} at "
            f"{getattr(usual, key)!r}."
        )


def _refuse_experts(config):
    if not config.experts:
        return
    if not 1 <= config.experts_per_token <= config.experts:
        raise ValueError(
            f"config.model.experts_per_token is {config.experts_per_token}; it has to be from 1 to "
            f"config.model.experts = {config.experts}."
        )
    if config.bias or config.mlp_bias:
        raise ValueError("config.model.experts have no biases: set bias and mlp_bias to False.")
    if config.quantize != "off":
        raise ValueError(
            f"config.model.quantize is {config.quantize!r}, which the kernels of experts are not "
            "made for: set it to 'off'."
        )


def _refuse_heads(config):
    heads, kv_heads = config.heads, config.kv_heads or config.heads
    if heads % kv_heads:
        raise ValueError(
            f"config.model.heads is {heads}, which config.model.kv_heads = {kv_heads} does not "
            "divide: each key/value head serves the same number of query heads."
        )
    if not config.head_width and config.width % heads:
        raise ValueError(
            f"config.model.width is {config.width}, which config.model.heads = {heads} does not "
            "divide; change one of them or set config.model.head_width."
        )


def _refuse_rotary(config):
    """Of a resolved config."""
    width, head_width = config.rotary_width, config.head_width
    if not config.learned_positions and (width % 2 or width == 0):
        part = "" if width == head_width else f", and of them only {width}"
        raise ValueError(
            f"config.model.head_width is {head_width}{part}, but rotary positions turn pairs of "
            "units, so it has to be even; set config.model.head_width or rotary_fraction."
        )
    scaling, _ = rope.parse(config.rope_scaling)
    unscaled = config.local_rope_theta and not config.layer_pattern
    if scaling and unscaled:
        raise ValueError(
            f"config.model.rope_scaling is {config.rope_scaling!r}, which no layer uses: with "
            "config.model.local_rope_theta the local ones are not scaled, and all are local; set "
            "config.model.layer_pattern, or rope_theta alone."
        )
    if scaling == "yarn" and config.rope_theta <= 1:
        raise ValueError(
            f"config.model.rope_theta is {config.rope_theta:g}, and has to be above 1 with "
            f"config.model.rope_scaling = {config.rope_scaling!r}: slower turns of later pairs are "
            "what it goes by."
        )
    if scaling == "dynamic" and width == 2:
        raise ValueError(
            f"config.model.rope_scaling is {config.rope_scaling!r}, but of a head only 2 units "
            "are turned, which leaves nothing to scale."
        )
