"""The families that are known, by the `model_type` of their config.json."""

from jaxlm.hf.families import (
    gemma2,
    gemma3,
    gpt2,
    gpt_neox,
    llama,
    mistral,
    mixtral,
    olmo2,
    qwen2,
    qwen3,
)

# In the order in which a model of ours looks for one that can say all its options.
FAMILIES = {
    one.FAMILY.model_type: one.FAMILY
    for one in (llama, mistral, qwen2, qwen3, olmo2, gemma2, gemma3, gpt_neox, gpt2, mixtral)
}
