"""A tiny Llama, a reference, some pairs and what is asked of TRL's trainers and of our methods.

Shared by tools/preference_parity.py, which runs TRL, and the test that compares with what it wrote.
P pairs, L positions. Texts are lists of ids; TRL gets them as words of a tokenizer with a word for
each id, ours as batches.
"""

import dataclasses
import pathlib
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax

sys.path.append(str(pathlib.Path(__file__).parents[1] / "hf"))

from cases import CASES as MODELS
from cases import draw
from fake import shapes_of
from reckoning import Ours, summed

from jaxlm.contract import compose
from jaxlm.hf import tensors
from jaxlm.methods.dpo import dpo
from jaxlm.methods.follow import follow
from jaxlm.methods.kto import kto
from jaxlm.methods.next_token import next_token
from jaxlm.methods.orpo import orpo
from jaxlm.methods.simpo import simpo
from jaxlm.step import init_state, make_between, make_step, per

MODEL = MODELS["llama"] | {"num_hidden_layers": 1}  # tests/hf sees to many
BOS, EOS = 1, 2  # ids of MODEL
LENGTH = 24  # of the longest text, and of our rows
BETA, MARGIN, SMOOTHING = 0.3, 0.7, 0.1
UNDESIRABLE = 1.5
RATE, EVERY, ALPHA, STEPS = 0.5, 5, 0.6, 20  # of the run whose reference follows
NAMES = ("tokens", "targets", "weights", "segments", "positions")


@dataclasses.dataclass(frozen=True)
class Case:
    """A method of ours, and how its metrics name what TRL is compared in."""

    method: object
    batch: str  # a name of `batches`
    logprobs: tuple[str, ...] = ()
    rewards: tuple[str, ...] = ()


def _pairs(method, name, batch="pairs", rewards=True):
    of = lambda what: tuple(f"{name}/{what}_{member}" for member in ("chosen", "rejected"))
    return Case(method, batch, of("logprob"), of("reward") if rewards else ())


CASES = {
    "dpo sigmoid": _pairs(dpo(beta=BETA), "dpo"),
    "dpo sigmoid, smoothed": _pairs(dpo(beta=BETA, label_smoothing=SMOOTHING), "dpo"),
    "dpo robust": _pairs(dpo(beta=BETA, loss="robust", label_smoothing=SMOOTHING), "dpo"),
    "dpo hinge": _pairs(dpo(beta=BETA, loss="hinge"), "dpo"),
    "dpo ipo": _pairs(dpo(beta=BETA, loss="ipo"), "dpo", rewards=False),
    "simpo": _pairs(simpo(beta=BETA, margin=MARGIN), "simpo"),
    "orpo": _pairs(orpo(ratio_weight=BETA), "orpo", "bare pairs", rewards=False),
    "kto": Case(kto(beta=BETA, weight_undesirable=UNDESIRABLE), "feedback"),
    "sft": Case(next_token(), "rows"),
    "sft, packed": Case(next_token(), "packed rows"),
}


def texts(bare=False):
    """(prompt, chosen, rejected) of each pair, without eos. `bare`: prompts of bos alone, and all
    chosen responses of one length."""
    rng = np.random.default_rng(1)
    say = lambda length: rng.integers(3, MODEL["vocab_size"], length).tolist()
    prompts, chosen, rejected = (2, 6, 4, 9), (7, 3, 12, 5), (4, 9, 6, 11)
    if bare:
        prompts, chosen = (0,) * 4, (6,) * 4
    return [
        ([BOS, *say(p)], say(c), say(r)) for p, c, r in zip(prompts, chosen, rejected, strict=True)
    ]


KINDS = ("desirable", "undesirable")
LABELS = [True, False, True, False]  # of the responses that KTO reads


def feedback():
    """(prompt, response) of each row of KTO: the chosen ones, and the rejected where disliked."""
    return [(p, c if liked else r) for (p, c, r), liked in zip(texts(), LABELS, strict=True)]


def batches(name):
    """The batches of one loss, whose sums are added up."""
    if name == "feedback":
        rows = feedback()
        mismatched = [rows[i - 1][1] for i in range(len(rows))]  # TRL turns them by one
        members = [
            _row([p, y])
            for (p, own), other in zip(rows, mismatched, strict=True)
            for y in (own, other)
        ]
        stacked = {k: np.stack([m[k] for m in members]).reshape(-1, 2, LENGTH) for k in NAMES}
        return [stacked | {"desirable": np.array(LABELS, np.float32)}]
    if name == "packed rows":
        return [{k: v[None] for k, v in _row(*(text[:2] for text in texts()), length=64).items()}]
    if name == "rows":
        rows = [_row(text[:2]) for text in texts()]
        return [{k: np.stack([row[k] for row in rows]) for k in NAMES}]
    found = []
    for prompt, chosen, rejected in texts(bare=name == "bare pairs"):
        members = [_row([prompt, chosen]), _row([prompt, rejected])]
        found.append({k: np.stack([m[k] for m in members])[None] for k in NAMES})
    return found


def _row(*documents, length=LENGTH):
    """One row of (prompt, response) documents; weights are 1 where an id of a response is next."""
    row = {k: np.zeros(length, np.float32 if k == "weights" else np.int32) for k in NAMES}
    at = 0
    for segment, (prompt, response) in enumerate(documents, 1):
        ids = [*prompt, *response, EOS]
        here = slice(at, at := at + len(ids) - 1)
        row["tokens"][here], row["targets"][here] = ids[:-1], ids[1:]
        row["segments"][here], row["positions"][here] = segment, np.arange(len(ids) - 1)
        row["weights"][here] = np.arange(1, len(ids)) >= len(prompt)
    return row


def save_model(folder, name=""):
    """A Hugging Face folder; models of other names have other weights."""
    import json

    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(MODEL))
    shapes = shapes_of(MODEL)
    layout = {tensor: (shape, np.dtype(np.float32)) for tensor, shape in shapes.items()}
    with tensors.Writer(folder, layout, 10**9) as writer:
        for tensor, shape in shapes.items():
            writer.put(tensor, draw(f"{name} {tensor}" if name else tensor, shape))


class Sides:
    """Our policy and reference."""

    def __init__(self, folder):
        for name in ("policy", "reference"):
            save_model(folder / name, "" if name == "policy" else name)
        self.policy, self.reference = Ours(folder / "policy"), Ours(folder / "reference")

    def figures(self, name):
        """Of a case: loss, log-probabilities and rewards of each response, gradients by tensor."""
        case, lm = CASES[name], self.policy.lm
        extras = {"reference": self.reference.params}

        @jax.jit
        def summed_up(params, batch):
            loss = lambda p: case.method.objective(lm, p, extras, batch, None)
            return jax.value_and_grad(loss, has_aux=True)(params)

        found = [summed_up(self.policy.params, batch) for batch in batches(case.batch)]
        weight = sum(aux.weight for (_, aux), _ in found)
        of = lambda names: [[float(aux.metrics[n]) for n in names] for (_, aux), _ in found]
        mean = lambda *leaves: sum(leaves) / weight
        figures = {
            "loss": float(sum(loss for (loss, _), _ in found) / weight),
            "gradients": self.policy.by_tensor(jax.tree.map(mean, *(grads for _, grads in found))),
        }
        if case.logprobs:
            figures["logprobs"] = of(case.logprobs)
        if case.rewards:
            figures["rewards"] = of(case.rewards)
        if name == "kto":
            figures |= _of_kto(found[0][0][1])
        return figures

    def follow(self):
        """A run of DPO whose reference follows: the loss of each step, and both sets of params."""
        method = compose(dpo(beta=BETA), follow(every=EVERY, alpha=ALPHA))
        tx, lm = optax.with_extra_args_support(optax.sgd(RATE)), self.policy.lm
        copy = lambda params: jax.tree.map(jnp.copy, params)
        state = init_state(copy(self.policy.params), method, tx)
        state = state._replace(extras={"reference": copy(self.reference.params)})
        step, between = make_step(lm, method, tx), make_between(method)
        rows = batches("pairs")
        batch = {k: jnp.concatenate([row[k] for row in rows]) for k in NAMES}
        losses = []
        for n in range(1, STEPS + 1):
            state, metrics = step(state, batch, jax.random.key(0))
            state = between(n, state)
            losses.append(float(metrics["loss"]))
        of = self.policy.by_tensor
        return losses, of(state.params), of(state.extras["reference"])


def _of_kto(aux):
    """The means that TRL logs; its rewards are those against the reference, without k."""
    mean = lambda name: float(per(aux.metrics[f"kto/{name}"], aux.weight))
    rewards = [mean(f"reward_{kind}") + BETA * mean("divergence") for kind in KINDS]
    return {"divergence": mean("divergence"), "rewards": rewards}


def in_short(by_tensor):
    """Of each tensor two numbers, for a file: its norm, and its sum with drawn weights."""
    return {name: list(summed(name, x)) for name, x in by_tensor.items()}
