"""Distillation (https://arxiv.org/abs/1503.02531, as https://arxiv.org/abs/2406.19112 has it).

At every target the student's distribution q is drawn to the teacher's p, both of logits / τ:

    loss = (1 - weight) · -log q(target) + weight · τ² · D(p, q)       in nats, the first at τ = 1

forward         D = KL(p || q): the student covers all that the teacher may say
reverse         D = KL(q || p): it keeps to what the teacher finds likely
jensen_shannon  D = beta · KL(p || m) + (1 - beta) · KL(q || m),  m = beta · p + (1 - beta) · q
                (https://arxiv.org/abs/2306.13649)

τ² keeps the gradient's size, whatever τ. Summed over targets by their loss weights, as in
next_token: so a response's first token, which the prompt's last position predicts, is distilled,
and nothing behind its last token is. The authors' released code masks by the labels unshifted and
has both wrong.

The teacher reads the same ids, so it has the same tokenizer; its shape is free. Rows of either
embedding beyond the smaller of the two are padding that no token has, and are left out of both.

With `expert`, two teachers: rows of the sources `expert_sources` are distilled from the expert, all
others from the teacher (the paper's domain alignment from an expert). Each sample has one of the
two, but both read all rows of a batch, since which rows are whose is known only when they come.
"""

import jax
import jax.numpy as jnp

from jaxlm.contract import Aux, Extra, Method, params_of
from jaxlm.methods.likelihood import Seen, logprobs, summed

DIVERGENCES = ("forward", "reverse", "jensen_shannon")


def distill(
    *,
    teacher: str = "",
    divergence: str = "forward",
    temperature: float = 1.0,
    weight: float = 1.0,
    beta: float = 0.5,
    expert: str = "",
    expert_sources: str = "",
) -> Method:
    """`teacher`, `expert`: folders of a run, a converted or a Hugging Face model. `weight`: share
    of distillation against cross-entropy. `beta`: the teacher's share of Jensen-Shannon's mixture.
    `expert_sources`: names of sources, as "code,math"."""
    _refuse(teacher, divergence, temperature, weight, beta)
    names = tuple(filter(None, (name.strip() for name in expert_sources.split(","))))
    if bool(expert) != bool(names):
        raise ValueError(
            f"expert={expert!r} and expert_sources={expert_sources!r}: rows of these sources are "
            "distilled from the expert, so set both or neither"
        )
    frozen = {"teacher": teacher} | ({"expert": expert} if expert else {})

    def objective(lm, params, extras, batch, key):
        hidden_BLD, taps, penalties = lm.hidden(params, batch, key)
        seen = [_read(lm.others[name], extras[name], batch) for name in frozen]
        fixed = [batch["weights"], batch["targets"]]
        if expert:
            fixed.append(jnp.broadcast_to(batch["expert"][:, None], batch["targets"].shape))
        loss, metrics = summed(score, Seen(lm, params, hidden_BLD), seen, (), fixed)
        total = batch["weights"].sum()
        penalties = {name: total * penalty for name, penalty in penalties.items()}
        metrics = {f"distill/{name}": value for name, value in metrics.items()}
        return sum(penalties.values(), loss), Aux(total, metrics | penalties, taps)

    def score(student_BCV, *rest):
        teachers, (weights_BC, targets_BC, *routed) = rest[: len(frozen)], rest[len(frozen) :]
        size = min(x.shape[-1] for x in (student_BCV, *teachers))
        student_BCV, *teachers = (
            x[..., :size].astype(jnp.float32) for x in (student_BCV, *teachers)
        )
        teacher_BCV = teachers[0]
        if routed:
            teacher_BCV = jnp.where(routed[0][..., None] > 0, teachers[1], teachers[0])
        p_BCV, q_BCV = (jax.nn.log_softmax(x / temperature) for x in (teacher_BCV, student_BCV))
        apart_BC = diverge(p_BCV, q_BCV, divergence, beta)
        missed_BC = -logprobs(student_BCV, targets_BC)
        loss_BC = (1 - weight) * missed_BC + weight * temperature**2 * apart_BC
        agree_BC = jnp.argmax(student_BCV, -1) == jnp.argmax(teacher_BCV, -1)
        metrics = {
            "divergence": apart_BC,
            "cross_entropy": missed_BC,
            "teacher_cross_entropy": -logprobs(teacher_BCV, targets_BC),
            "agreement": agree_BC.astype(jnp.float32),
        }
        total = lambda x_BC: jnp.sum(weights_BC * x_BC)
        return total(loss_BC), {name: total(x_BC) for name, x_BC in metrics.items()}

    extras: dict[str, Extra] = {name: params_of(folder) for name, folder in frozen.items()}
    routes = {"expert": names} if expert else {}
    return Method(objective=objective, extras=extras, routes=routes)


def diverge(p_BCV: jax.Array, q_BCV: jax.Array, divergence: str, beta: float = 0.5) -> jax.Array:
    """The divergence of two distributions given by their logarithms, in nats, [B, C]."""
    kl = lambda a, b: jnp.sum(jnp.exp(a) * (a - b), axis=-1)
    if divergence == "forward":
        return kl(p_BCV, q_BCV)
    if divergence == "reverse":
        return kl(q_BCV, p_BCV)
    m_BCV = jnp.logaddexp(p_BCV + jnp.log(beta), q_BCV + jnp.log(1 - beta))
    return beta * kl(p_BCV, m_BCV) + (1 - beta) * kl(q_BCV, m_BCV)


def _read(lm, params, batch):
    """A frozen model that has read the batch."""
    params = jax.lax.stop_gradient(params)
    return Seen(lm, params, lm.hidden(params, batch)[0])


def _refuse(teacher, divergence, temperature, weight, beta):
    if not teacher:
        raise ValueError(
            "teacher is empty; name the work folder of a run, or a converted or Hugging Face folder"
        )
    if divergence not in DIVERGENCES:
        raise ValueError(
            f"divergence is {divergence!r}, and may be one of {', '.join(DIVERGENCES)}"
        )
    if not temperature > 0:
        raise ValueError(f"temperature is {temperature}, and must be positive")
    if not 0 <= weight <= 1:
        raise ValueError(
            f"weight is {weight}: the share of distillation against cross-entropy, from 0 to 1"
        )
    if not 0 < beta < 1:
        raise ValueError(f"beta is {beta}: the teacher's share of the mixture, between 0 and 1")
