"""Rotary positions in a config.json: `rope_parameters`, as transformers 5 writes them, and the
older `rope_theta` with `rope_scaling`; and as keys of `config.model` (`jaxlm.models.rope`).
"""

import math
from typing import Any

from jaxlm.hf.keys import LENGTH, shown
from jaxlm.models import rope

Json = dict[str, Any]

KEYS = frozenset({"rope_theta", "rope_scaling", "rope_parameters"})

# Our numbers of a scaling -> theirs.
NUMBERS = {
    "factor": "factor",
    "length": "original_max_position_embeddings",
    "low": "low_freq_factor",
    "high": "high_freq_factor",
    "fast": "beta_fast",
    "slow": "beta_slow",
    "attention": "attention_factor",
}


def options(hf: Json, theta: float = 10000.0) -> Json:
    """`rope_theta`, and `rope_scaling` where positions are stretched."""
    said = parameters(hf, theta)
    return {"rope_theta": float(said["rope_theta"]), "rope_scaling": scaling(said, hf)}


def parameters(hf: Json, theta: float, *, partial: bool = False) -> Json:
    """Both forms as one dict; `theta`: where neither names it. `partial`: positions may turn a part
    of a head only. Raises `ValueError` for what concerns some layers, or such a part, alone."""
    said = {"rope_theta": hf.get("rope_theta", theta)}
    said |= hf.get("rope_scaling") or hf.get("rope_parameters") or {}
    said["rope_type"] = said.get("rope_type") or said.get("type") or "default"
    part = lambda key, value: key == "partial_rotary_factor" and value != 1 and not partial
    if odd := [key for key, v in said.items() if isinstance(v, dict) or part(key, v)]:
        raise ValueError(
            f"config.json says {odd[0]}={shown(said[odd[0]])} of rotary positions, which this kind "
            "of model has not"
        )
    return said


def scaling(said: Json, hf: Json) -> str:
    """The scaling of one set of parameters. Raises `ValueError` for a kind that is not known."""
    kind = said["rope_type"]
    if kind == "default":
        return ""
    if kind not in rope.KINDS:
        raise ValueError(
            f"config.json says rope_type={shown(kind)}, which is not known here; known are "
            f"default, {', '.join(rope.KINDS)}"
        )
    length = hf.get(LENGTH)
    said = {"original_max_position_embeddings": length} | {
        key: value for key, value in said.items() if value is not None
    }
    if kind == "dynamic":
        said["original_max_position_embeddings"] = length
    said = {key: value for key, value in said.items() if value is not None}
    if kind == "yarn":
        said = _yarn(said, length)
    names = {ours: said[NUMBERS[ours]] for ours in rope.KINDS[kind] if NUMBERS.get(ours) in said}
    needed = [one for one, usual in rope.KINDS[kind].items() if usual is None and one not in names]
    if lacking := [LENGTH if one == "length" else NUMBERS[one] for one in needed]:
        raise ValueError(
            f"config.json says rope_type={shown(kind)}, and lacks {' and '.join(lacking)}, which "
            "that needs"
        )
    if kind == "yarn" and said.get("truncate") is False:
        names["truncate"] = 0
    text = " ".join([kind, *(f"{ours}={value:.17g}" for ours, value in names.items())])
    numbers = ", ".join(f"{NUMBERS[one]}={said[NUMBERS[one]]}" for one in names if one in NUMBERS)
    try:
        rope.parse(text)
    except ValueError as error:
        raise ValueError(
            f"config.json says rope_type={shown(kind)} with {numbers}: {error}"
        ) from None
    return text


def _yarn(said: Json, length: int | None) -> Json:
    """With the factors that some configs leave to be reckoned."""
    if "factor" not in said and length:
        said["factor"] = length / said["original_max_position_embeddings"]
    scales = said.get("mscale") and said.get("mscale_all_dim") and "factor" in said
    if scales and "attention_factor" not in said:
        part = lambda by: 0.1 * by * math.log(said["factor"]) + 1.0
        said["attention_factor"] = part(said["mscale"]) / part(said["mscale_all_dim"])
    return said


def config(theta: float, text: str) -> Json:
    """Keys of config.json in the older form, which transformers 4 and 5 both read."""
    kind, numbers = rope.parse(text)
    if not kind:
        return {"rope_theta": theta, "rope_scaling": None}
    said: Json = {"rope_type": kind}
    for ours, value in numbers.items():
        if ours in NUMBERS and not (ours == "attention" and not value):
            said[NUMBERS[ours]] = int(value) if ours == "length" else value
    if not numbers.get("truncate", 1.0):
        said["truncate"] = False
    length = {"max_position_embeddings": int(numbers["length"])} if kind == "dynamic" else {}
    return {"rope_theta": theta, "rope_scaling": said, **length}
