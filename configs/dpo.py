"""A fine-tuned model learns to prefer right answers to wrong ones: DPO, its reference frozen.

python -m jaxlm.train --config=configs/sft.py
python -m jaxlm.train --config=configs/dpo.py
Expect: 4 to 5 minutes on 2 CPU cores that others use too; held-out accuracy 0.91 to 0.92, loss 0.38
to 0.42 (log 2 at the start). It ranks answers rightly, and writes fewer right ones than before.
Others: --config.method=kto, orpo, simpo, or "dpo + follow" (TR-DPO) with --config.follow.every=32.
Your own: --config.data.mix.pairs.source=/data/pairs.jsonl (docs/finetuning.md).
A model of 7 or 8 billion parameters that was fine-tuned, from a Hugging Face folder:
python -m jaxlm.train --config=configs/dpo.py:/models/Llama-3.1-8B-Instruct \
    --config.data.mix.pairs.source=/data/pairs
"""

from jaxlm.config import defaults, source


def get_config(hf=""):
    c = defaults()
    c.name = "dpo"
    c.method = "dpo"
    c.data.mix.pairs = source(source="exercises")
    c.checkpoint.keep_best = "loss/pairs"
    return of_large_model(c, hf) if hf else of_small_model(c)


def of_small_model(c):
    """From the model of configs/sft.py, with its tokenizer and template."""
    c.init.checkpoint = "runs/sft"
    c.data.update(length=96, tokenizer="runs/sft/tokenizer")
    c.steps = 200
    c.batch = 16
    c.dpo.beta = 0.1
    c.model.update(width=128, layers=4, heads=2, qk_norm=True, loss_chunk=512)
    c.optimizer.update(name="adamw", learning_rate=2e-4, warmup_steps=20, schedule="linear")
    c.checkpoint.every = 50
    c.eval.update(every=50, samples="0.5 1")
    c.expect.others = "dpo/accuracy/pairs>=0.85 loss/pairs<=0.5"
    return c


def of_large_model(c, hf):
    """For a pod or a node of GPUs; rate and clip of TR-DPO's authors for 7B, the rest untried."""
    c.init.hf = hf
    c.steps = 1000
    c.batch = 64
    c.data.length = 1024
    c.dpo.beta = 0.05
    c.model.remat = "full"
    c.optimizer.update(name="adamw", learning_rate=1e-6, warmup_steps=100, clip=2.0)
    c.checkpoint.update(every=250, verify="sizes")
    c.eval.every = 250
    return c
