"""Samples from a trained run.

    python -m jaxlm.generate --workdir=runs/quickstart --prompt="def read(path):"
        [--tokens=128] [--samples=1] [--temperature=0.8] [--top_k=0] [--seed=0] [--step=N]

Reads the newest good checkpoint (or that of --step) and prints the prompt with its continuation.
Several processes (see launch/) spread the model over all their devices, and process 0 prints.
A model trained for minutes has the style of its text, and no meaning.
"""

from jaxlm.host import process

process.start(__name__)

import argparse
import sys

import jax

from jaxlm.generate.sample import make_sampler
from jaxlm.host import cluster
from jaxlm.opened import open_model


def main() -> int:
    flags = _flags().parse_args()
    _refuse(flags)
    if where := cluster.place():
        process.hush_libraries()
        facts = {
            "the version of jax": jax.__version__,
            **{f"--{k}": v for k, v in vars(flags).items()},
        }
        cluster.join(where, facts, lambda text: None)
    for text in samples(flags):
        if cluster.process() == 0:
            print(text, flush=True)
    return 0


def samples(flags):
    """Yields `flags.samples` texts, the prompt in front. Raises `ValueError` for people."""
    say = lambda text: print(text, file=sys.stderr) if cluster.process() == 0 else None
    opened = open_model(flags.workdir, step=flags.step, say=say)
    params, tokenizer = opened.params, opened.tokenizer
    with jax.set_mesh(opened.mesh):
        sample = make_sampler(
            opened.lm, opened.length, temperature=flags.temperature, top_k=flags.top_k
        )
        (ids,) = tokenizer.encode_batch([flags.prompt])
        for i in range(flags.samples):
            new = sample(
                params, [tokenizer.bos, *ids], flags.tokens, flags.seed + i, stop=tokenizer.eos
            )
            yield flags.prompt + tokenizer.decode(new)


def _flags():
    parser = argparse.ArgumentParser(
        prog="python -m jaxlm.generate",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--workdir", required=True, help="the work folder of a run")
    parser.add_argument("--prompt", default="", help="text to go on from; empty: a new document")
    parser.add_argument("--tokens", type=int, default=128, help="new tokens, at most")
    parser.add_argument("--samples", type=int, default=1)
    parser.add_argument("--temperature", type=float, default=0.8, help="0: the likeliest token")
    parser.add_argument("--top_k", type=int, default=0, help="0: all tokens")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--step", type=int, default=None, help="of the checkpoint; the newest")
    return parser


def _refuse(flags):
    for name, least in (("tokens", 1), ("samples", 1), ("temperature", 0), ("top_k", 0)):
        if getattr(flags, name) < least:
            raise ValueError(f"--{name}={getattr(flags, name)} must be at least {least}")


if __name__ == "__main__":
    process.run(main)
