"""A 1.2B Llama 3 learns code and prose from scratch: the smallest run that needs accelerators.

python -m jaxlm.train --config=configs/pretrain_1b.py --config.data.mix.code.source=/data/code
python -m jaxlm.plan --config=configs/pretrain_1b.py --topology=v5e:4x4
Expect: on 16 v5e 4.1 to 4.7 s a step, 58 to 68 % MFU, 4.7 to 5.4 days (the plan's, docs/pod.md).
Shape: Llama 3.2 1B. Optimizer: betas, clip and decay of Llama 2 (arXiv 2307.09288), rate and cosine
to a tenth of Llama 3's 8B (arXiv 2407.21783, table 3), since none is published for 1B.
"""

from jaxlm.config import defaults, source
from jaxlm.models import presets


def get_config():
    c = defaults()
    c.name = "pretrain_1b"
    c.steps = 100_000  # of a million tokens
    c.batch = 256
    c.accumulate = 8
    c.data.length = 4096
    # Your own text: folders of ArrayRecord, Parquet or JSON lines, or tfds:NAME.
    c.data.mix.code = source(source="data/code", weight=0.3)
    c.data.mix.prose = source(source="data/prose", weight=0.7)
    c.data.vocabulary = 128_256
    c.model.update(presets.LLAMA_1B, vocabulary=128_256, remat="full")
    c.optimizer.update(learning_rate=3e-4, warmup_steps=2000, schedule="cosine")
    c.optimizer.final_fraction = 0.1
    c.checkpoint.update(every=1000, verify="sizes")
    c.eval.every = 5000
    return c
