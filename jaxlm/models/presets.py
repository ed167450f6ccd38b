"""Model keys of well-known shapes, for recipes: `c.model.update(presets.LLAMA_8B)`.

A preset is what differs from the defaults of `DecoderConfig`. The vocabulary stays with the
tokenizer. `tests/models/test_options.py` holds each against the parameter count it is known by.
Positions turn as in plain RoPE; the longer contexts of Llama 3.1 take
rope_scaling="llama3 factor=8 length=8192" (Llama 3.2 1B: factor=32).
"""

# For machines with memory to spare only where their blocks are rematerialized.
_LLAMA_3 = {
    "kv_heads": 8,
    "rope_theta": 500000.0,
    "norm_eps": 1e-5,
    "dtype": "bfloat16",
    "remat": "dots_no_batch",
    "loss_chunk": 2048,
}

LLAMA_1B = {  # Llama 3.2 1B
    **_LLAMA_3,
    "width": 2048,
    "layers": 16,
    "heads": 32,
    "ffn_width": 8192,
    "tied": True,
}

LLAMA_8B = {  # Llama 3 and 3.1 8B
    **_LLAMA_3,
    "width": 4096,
    "layers": 32,
    "heads": 32,
    "ffn_width": 14336,
    "tied": False,
}

LLAMA_70B = {  # Llama 3 and 3.1 70B
    **_LLAMA_3,
    "width": 8192,
    "layers": 80,
    "heads": 64,
    "ffn_width": 28672,
    "tied": False,
    "remat": "full",
}
