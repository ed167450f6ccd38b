"""The Llama block once more, in float64 and loops: what the decoder is held against.

Written from the papers and sharing no line with `jaxlm.models`. It reads one document at a time,
so packing and padding cannot go wrong here.
"""

import numpy as np


def llama(params, tokens, config):
    """Logits [L, V] of one document, and the sum over its tokens of |y| of each dense kernel."""
    p = _float64(params)
    x = p["embed"]["table"][tokens]
    taps = {}
    for name, block in p["blocks"].items():
        taps[name] = {"attention": {}, "mlp": {}}
        attended = _attention(
            block["attention"],
            _rms_norm(x, block["attention_norm"], config.norm_eps),
            config,
            taps[name]["attention"],
        )
        source = x if config.parallel_residual else x + attended
        fed = _feed_forward(
            block["mlp"],
            _rms_norm(source, block["mlp_norm"], config.norm_eps),
            config,
            taps[name]["mlp"],
        )
        x = x + attended + fed
    x = _rms_norm(x, p["final_norm"], config.norm_eps)
    logits = x @ (p["embed"]["table"].T if config.tied else p["head"]["kernel"])
    return _capped(logits, config.logit_soft_cap), {"blocks": taps}


def _attention(p, x, config, taps):
    heads, kv_heads = config.heads, config.kv_heads or config.heads
    width = config.head_width or config.width // heads
    query, key, value = (_dense(p, name, x, taps) for name in ("query", "key", "value"))
    outputs = []
    for head in range(heads):
        group = head // (heads // kv_heads)
        q = query[:, head * width : (head + 1) * width]
        k = key[:, group * width : (group + 1) * width]
        v = value[:, group * width : (group + 1) * width]
        if config.qk_norm:
            q = _rms_norm(q, p["query_norm"], config.norm_eps)
            k = _rms_norm(k, p["key_norm"], config.norm_eps)
        q, k = _rotated(q, config.rope_theta), _rotated(k, config.rope_theta)
        out = np.zeros_like(v)
        for t in range(len(x)):
            first = max(0, t + 1 - config.window) if config.window else 0
            scores = k[first : t + 1] @ q[t] / np.sqrt(width)
            scores = np.exp(_capped(scores, config.attention_soft_cap))
            out[t] = scores / scores.sum() @ v[first : t + 1]
        outputs.append(out)
    return _dense(p, "output", np.concatenate(outputs, axis=1), taps)


def _feed_forward(p, x, config, taps):
    up = _dense(p, "up", x, taps)
    if config.activation == "gelu":
        return _dense(p, "down", _gelu(up), taps)
    gate = _dense(p, "gate", x, taps)
    gate = gate / (1 + np.exp(-gate)) if config.activation == "swiglu" else _gelu(gate)
    return _dense(p, "down", gate * up, taps)


def _dense(p, name, x, taps):
    y = x @ p[name]["kernel"] + p[name].get("bias", 0.0)
    taps[name] = {"kernel": np.abs(y).sum(axis=0)}
    return y


def _rms_norm(x, p, eps):
    return x / np.sqrt((x**2).mean(axis=1, keepdims=True) + eps) * p["scale"]


def _rotated(x, theta):
    """Units k and k + K/2 as the complex number that position t turns by t · theta^(-2k/K)."""
    half = x.shape[1] // 2
    pairs = x[:, :half] + 1j * x[:, half:]
    speed = theta ** (-np.arange(half) / half)
    pairs = pairs * np.exp(1j * np.outer(np.arange(len(x)), speed))
    return np.concatenate([pairs.real, pairs.imag], axis=1)


def _gelu(x):
    return x / 2 * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)))


def _capped(x, cap):
    return cap * np.tanh(x / cap) if cap else x


def _float64(tree):
    if isinstance(tree, dict):
        return {name: _float64(part) for name, part in tree.items()}
    return np.asarray(tree, np.float64)
