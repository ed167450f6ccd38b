"""A copy of the params that follows them in jumps: TR-DPO's reference
(https://arxiv.org/abs/2404.09656), composed with the method that owns the copy.

    after every `every`-th optimizer step:  reference <- alpha · params + (1 - alpha) · reference

`alpha` 1 is the paper's hard update, below 1 the soft one; the paper leaves open how often the soft
one runs, so both numbers are free. alpha weighs the policy. Mixed in float32, since in bfloat16
small differences round away; TRL's callback mixes in the type of the reference. The result is kept
in that type: in bfloat16 what alpha moves by less than 1/512 of a number is lost at every update,
so small alphas want model.param_dtype="float32". DPO's loss and rewards restart from log 2 and 0
after a hard update. Of LoRA's adapters A and B are mixed each for itself: below alpha 1 their
product is not the mix of products (`methods.lora` says by how much).
"""

import jax
import jax.numpy as jnp

from jaxlm.contract import Between, Method


def follow(*, every: int = 512, alpha: float = 0.6, name: str = "reference") -> Method:
    """`every`: in optimizer steps, well below those of the run. `name`: the extra that follows."""
    if every < 1:
        raise ValueError(f"every is {every}; give the steps between two updates, at least 1")
    if not 0 <= alpha <= 1:
        raise ValueError(f"alpha is {alpha}; give the weight of the params in the mix, from 0 to 1")

    def mix(param, reference):
        param, old = param.astype(jnp.float32), reference.astype(jnp.float32)
        return (alpha * param + (1 - alpha) * old).astype(reference.dtype)

    def fn(params, extras):
        return {name: jax.tree.map(mix, params, extras[name])}

    return Method(between=(Between(every, (name,), fn),))
