"""The block once more, in float64 and loops: what the decoder is held against.

Written from the papers and sharing no line with `jaxlm.models`. It reads one document at a time,
so packing and padding cannot go wrong here.
"""

import math

import numpy as np


def llama(params, tokens, config):
    """Logits [L, V] of one document, and the sum over its tokens of |y| of each dense kernel."""
    p = _float64(params)
    x = p["embed"]["table"][tokens] * config.embedding_scale
    if config.learned_positions:
        x = x + p["embed"]["positions"][: len(x)]
    taps = {}
    kinds = layer_kinds(config)
    for (name, block), kind in zip(p["blocks"].items(), kinds, strict=True):
        taps[name] = {"attention": {}, "mlp": {}}
        normed = lambda x, norm: _norm(x, block[norm], config) if norm in block else x  # noqa: B023
        x_normed = normed(x, "attention_norm")
        attended = _attention(block["attention"], x_normed, config, kind, taps[name]["attention"])
        attended = normed(attended, "attention_post_norm")
        source = x if config.parallel_residual else x + attended
        fed = _feed_forward(block["mlp"], normed(source, "mlp_norm"), config, taps[name]["mlp"])
        x = x + attended + normed(fed, "mlp_post_norm")
    x = _norm(x, p["final_norm"], config)
    logits = x @ (p["embed"]["table"].T if config.tied else p["head"]["kernel"])
    return _capped(logits, config.logit_soft_cap), {"blocks": taps}


def layer_kinds(config):
    """Window, theta and scaling of each layer, by a pattern written out as "local global"."""
    names = config.layer_pattern.split() or ["local"]
    everywhere = config.rope_theta, config.rope_scaling
    local = (config.local_rope_theta, "") if config.local_rope_theta else everywhere
    kinds = {"local": (config.window, *local), "global": (0, *everywhere)}
    return [kinds[names[i % len(names)]] for i in range(config.layers)]


def _attention(p, x, config, kind, taps):
    window, theta, scaling = kind
    heads, kv_heads = config.heads, config.kv_heads or config.heads
    width = config.head_width or config.width // config.heads
    query, key, value = (_dense(p, name, x, taps) for name in ("query", "key", "value"))
    if config.qk_norm and config.qk_norm_over == "width":
        query, key = (_norm(y, p[f"{n}_norm"], config) for n, y in (("query", query), ("key", key)))
    outputs = []
    for head in range(heads):
        group = head // (heads // kv_heads)
        q = query[:, head * width : (head + 1) * width]
        k = key[:, group * width : (group + 1) * width]
        v = value[:, group * width : (group + 1) * width]
        if config.qk_norm and config.qk_norm_over == "head":
            q, k = _norm(q, p["query_norm"], config), _norm(k, p["key_norm"], config)
        if not config.learned_positions:
            q, k = (_rotated(y, config, theta, scaling) for y in (q, k))
        out = np.zeros_like(v)
        for t in range(len(x)):
            first = max(0, t + 1 - window) if window else 0
            scores = k[first : t + 1] @ q[t] * (config.attention_scale or width**-0.5)
            scores = np.exp(_capped(scores, config.attention_soft_cap))
            out[t] = scores / scores.sum() @ v[first : t + 1]
        outputs.append(out)
    return _dense(p, "output", np.concatenate(outputs, axis=1), taps)


def _feed_forward(p, x, config, taps):
    if not config.experts:
        return _dense_feed_forward(p, x, config, taps)
    weights = np.exp(_dense(p, "router", x, taps))
    weights /= weights.sum(axis=1, keepdims=True)
    out, by_expert = np.zeros_like(x), []
    for expert in range(config.experts):
        here = {name: {"kernel": p["experts"][name]["kernel"][expert]} for name in p["experts"]}
        rank = (weights > weights[:, [expert]]).sum(axis=1)
        chose = rank < config.experts_per_token
        best = -np.sort(-weights[chose], axis=1)[:, : config.experts_per_token]
        by_expert.append({})
        fed = _dense_feed_forward(here, x[chose], config, by_expert[-1])
        out[chose] += fed * (weights[chose, expert] / best.sum(axis=1))[:, None]
    taps["experts"] = {
        name: {"kernel": np.stack([found[name]["kernel"] for found in by_expert])}
        for name in by_expert[0]
    }
    return out


def _dense_feed_forward(p, x, config, taps):
    up = _dense(p, "up", x, taps)
    if config.activation in ("gelu", "gelu_exact"):
        return _dense(p, "down", _gelu(up, config.activation == "gelu_exact"), taps)
    gate = _dense(p, "gate", x, taps)
    gate = gate / (1 + np.exp(-gate)) if config.activation == "swiglu" else _gelu(gate)
    return _dense(p, "down", gate * up, taps)


def _dense(p, name, x, taps):
    y = x @ p[name]["kernel"] + p[name].get("bias", 0.0)
    taps[name] = {"kernel": np.abs(y).sum(axis=0)}
    return y


def _norm(x, p, config):
    if config.norm == "layer":
        x = x - x.mean(axis=1, keepdims=True)
    x = x / np.sqrt((x**2).mean(axis=1, keepdims=True) + config.norm_eps)
    return x * (p["scale"] + (config.norm == "rms_plus_one")) + p.get("bias", 0.0)


def _rotated(x, config, theta, scaling):
    """Units k and k + R/2 as the complex number that position t turns by t · speed of the pair.

    R is the part of a head that turns at all.
    """
    half = round(x.shape[1] * config.rotary_fraction) // 2
    pairs = x[:, :half] + 1j * x[:, half : 2 * half]
    speed, factor = speeds(half, theta, scaling, length=len(x))
    pairs = factor * pairs * np.exp(1j * np.outer(np.arange(len(x)), speed))
    return np.concatenate([pairs.real, pairs.imag, x[:, 2 * half :]], axis=1)


def speeds(half, theta, scaling, length):
    """The angle per position of each pair in a text of that length, and what lengthens them."""
    kind, *settings = scaling.split() or [""]
    c = {key: float(value) for key, value in (setting.split("=") for setting in settings)}
    if kind == "dynamic" and length > c["length"]:
        stretch = c["factor"] * length / c["length"] - (c["factor"] - 1)
        theta *= stretch ** (half / (half - 1))
    speed = np.array([theta ** (-i / half) for i in range(half)])
    if kind == "linear":
        return speed / c["factor"], 1.0
    if kind == "llama3":
        scaled = []
        for s in speed:
            turns = c["length"] * s / (2 * math.pi)
            if turns < c["low"]:
                scaled.append(s / c["factor"])
            elif turns > c["high"]:
                scaled.append(s)
            else:
                smooth = (turns - c["low"]) / (c["high"] - c["low"])
                scaled.append((1 - smooth) * s / c["factor"] + smooth * s)
        return np.array(scaled), 1.0
    if kind == "yarn":
        index = lambda turns: half * math.log(c["length"] / (turns * 2 * math.pi)) / math.log(theta)
        low = max(math.floor(index(c.get("fast", 32))), 0)
        high = min(math.ceil(index(c.get("slow", 1))), 2 * half - 1)
        ramp = np.clip((np.arange(half) - low) / (high - low), 0, 1)
        factor = c.get("attention") or 0.1 * math.log(c["factor"]) + 1
        return speed / c["factor"] * ramp + speed * (1 - ramp), factor
    return speed, 1.0


def _gelu(x, exact=False):
    if exact:
        return x / 2 * (1 + np.vectorize(math.erf)(x / math.sqrt(2)))
    return x / 2 * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)))


def _capped(x, cap):
    return cap * np.tanh(x / cap) if cap else x


def _float64(tree):
    if isinstance(tree, dict):
        return {name: _float64(part) for name, part in tree.items()}
    return np.asarray(tree, np.float64)
