"""Pairs of a token and an expert sorted into blocks, each of one expert.

Letters: P pairs, E experts, B blocks of `size` slots.
"""

import jax
import jax.numpy as jnp

FEWEST = 64  # rows of a block, where there are as many: fewer and reading the kernel takes longer


def block_size(pairs: int, experts: int) -> int:
    """Rows of a block: a quarter of an expert's mean share, so that filling up costs an eighth."""
    mean = -(-pairs // experts)
    return max(pairs // (4 * experts), min(FEWEST, mean), 1)


def slots(expert_P: jax.Array, experts: int, size: int) -> tuple[jax.Array, jax.Array, jax.Array]:
    """The slot of each pair, the expert of each block of `size` slots, how many blocks are used.

    Pairs of an expert keep their order; of one that is none of these `experts` the slot means
    nothing. There are as many blocks as could ever be needed; what is left over at the end goes to
    the last expert, and is empty.
    """
    P = len(expert_P)
    chose_PE = jax.nn.one_hot(expert_P, experts, dtype=jnp.int32)
    earlier_P = jnp.sum((jnp.cumsum(chose_PE, axis=0) - chose_PE) * chose_PE, axis=1)
    blocks_E = -(-jnp.sum(chose_PE, axis=0) // size)
    end_E = jnp.cumsum(blocks_E)
    slot_P = jnp.sum((end_E - blocks_E)[None] * chose_PE, axis=1) * size + earlier_P
    blocks = (P + experts * (size - 1)) // size
    expert_B = jnp.sum(jnp.arange(blocks)[:, None] >= end_E[None], axis=1)
    return slot_P, jnp.minimum(expert_B, experts - 1), end_E[-1]
