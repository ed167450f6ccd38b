"""An 8B Llama 3 learns code and prose from scratch, on a slice of 256 small TPUs or GPU nodes.

python -m jaxlm.train --config=configs/pretrain_8b.py --config.data.mix.code.source=/data/code
python -m jaxlm.plan --config=configs/pretrain_8b.py --topology=v5e:16x16
Expect: on 256 v5e 5.7 to 7.1 s a step, 57 to 70 % MFU, 17 to 20 days (the plan's, docs/pod.md).
Shape, rate, warm-up and batch: Llama 3 8B and the first stage of its training (arXiv 2407.21783,
table 3 and section 3.4.1). Betas, clip and decay: Llama 2 (arXiv 2307.09288).
"""

from jaxlm.config import defaults, source
from jaxlm.models import presets


def get_config():
    c = defaults()
    c.name = "pretrain_8b"
    c.steps = 250_000  # of four million tokens
    c.batch = 1024
    c.accumulate = 4
    c.data.length = 4096
    # Your own text: folders of ArrayRecord, Parquet or JSON lines, or tfds:NAME.
    c.data.mix.code = source(source="data/code", weight=0.3)
    c.data.mix.prose = source(source="data/prose", weight=0.7)
    c.data.vocabulary = 128_256
    c.model.update(presets.LLAMA_8B, vocabulary=128_256, remat="full")
    c.optimizer.update(learning_rate=3e-4, warmup_steps=8000, schedule="cosine")
    c.optimizer.final_fraction = 0.01
    c.checkpoint.update(every=1000, verify="sizes")
    c.eval.every = 5000
    return c
