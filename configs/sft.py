"""A decoder is fine-tuned on conversations: loss on responses only, conversations packed whole.

python -m jaxlm.train --config=configs/sft.py
Expect: 6 to 8 minutes on 2 CPU cores that others use too; held-out loss 0.07 to 0.10 nats per token
of a response, 75 to 86 % of held-out questions answered without a slip (most slips are in sums).
Your own: --config.data.mix.chat.source=/data/chat.jsonl (docs/finetuning.md).
A model of 7 or 8 billion parameters, its tokenizer and template, from a Hugging Face folder:
python -m jaxlm.train --config=configs/sft.py:/models/Llama-3.1-8B-Instruct \
    --config.data.mix.chat.source=/data/chat
"""

from jaxlm.config import defaults, source


def get_config(hf=""):
    c = defaults()
    c.name = "sft"
    c.data.mix.chat = source(source="exercises", format="chat")
    c.checkpoint.keep_best = "loss/chat"
    return of_large_model(c, hf) if hf else of_small_model(c)


def of_small_model(c):
    """From scratch, on the built-in exercises."""
    c.steps = 600
    c.batch = 16
    c.data.update(length=128, tokenizer="byte", template="plain")
    c.model.update(width=128, layers=4, heads=2, qk_norm=True, loss_chunk=512)
    c.optimizer.update(name="muon", learning_rate=9e-3, adam_learning_rate=0.012)
    c.optimizer.update(schedule="linear", decay_fraction=0.4)
    c.checkpoint.every = 200
    c.eval.update(every=200, samples="0.1 0.5 1")
    c.expect.others = "loss/chat<=0.15"
    return c


def of_large_model(c, hf):
    """For a pod or a node of GPUs: rate and batch as is common for full fine-tuning, untried."""
    c.init.hf = hf
    c.steps = 2000
    c.batch = 64
    c.data.length = 4096
    c.model.remat = "full"
    c.optimizer.update(name="adamw", learning_rate=1e-5, warmup_steps=60, schedule="linear")
    c.checkpoint.update(every=500, verify="sizes")
    c.eval.every = 500
    return c
