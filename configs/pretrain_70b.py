"""A 70B Llama 3 learns code and prose from scratch, on 256 or more large TPUs or 32 GPU nodes.

python -m jaxlm.train --config=configs/pretrain_70b.py --config.data.mix.code.source=/data/code
python -m jaxlm.plan --config=configs/pretrain_70b.py --topology=v6e:16x16
Expect: on 256 v6e 27 of 32 GiB, 14 to 20 s a step, 39 to 56 % MFU, 40 to 58 days (the plan's).
Shape, rate, warm-up and batch: Llama 3 70B and the first stage of its training (arXiv 2407.21783,
table 3 and section 3.4.1). Betas, clip and decay: Llama 2 (arXiv 2307.09288).
"""

from jaxlm.config import defaults, source
from jaxlm.models import presets


def get_config():
    c = defaults()
    c.name = "pretrain_70b"
    c.steps = 250_000  # of four million tokens
    c.batch = 1024
    c.accumulate = 4
    c.data.length = 4096
    # Your own text: folders of ArrayRecord, Parquet or JSON lines, or tfds:NAME.
    c.data.mix.code = source(source="data/code", weight=0.3)
    c.data.mix.prose = source(source="data/prose", weight=0.7)
    c.data.vocabulary = 128_256
    c.model.update(presets.LLAMA_70B, vocabulary=128_256, remat="full")
    c.optimizer.update(learning_rate=1.5e-4, warmup_steps=8000, schedule="cosine")
    c.optimizer.final_fraction = 0.01
    c.checkpoint.update(every=500, verify="sizes")
    c.eval.every = 5000
    return c
