"""A recipe for tests: a toy decoder on a folder of text that the test makes ($JAXLM_TEST_TEXT)."""

import os

from jaxlm.config import defaults, source


def get_config():
    c = defaults()
    c.name = "tiny"
    c.steps = 20
    c.batch = 8
    c.data.length = 32
    text = os.environ.get("JAXLM_TEST_TEXT", "no-such-folder")
    c.data.mix.code = source(source=f"{text}/code", glob="**/*.txt", weight=0.5)
    c.data.mix.prose = source(source=f"{text}/prose", glob="**/*.txt", weight=0.5)
    c.data.tokenizer = "byte"
    c.data.held_out = 0.2
    c.model.update(width=32, layers=2, heads=2)
    c.optimizer.update(learning_rate=3e-3, schedule="linear")
    c.eval.update(every=50, batch=8, samples="0.5 1", sample_tokens=8)
    c.checkpoint.every = 10
    return c
