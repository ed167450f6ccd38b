"""Every family against torch's transformers: logits, gradients, the way back, greedy text.

    python tools/parity.py [--only=gemma] [--tokens=64]

needs torch (`make parity` installs it). Each case is a tiny model with random weights in float32
(tests/hf/cases.py), read by both sides from the same folder, with jax's products at the highest
precision. With --fixtures it also writes what the tests without torch compare with. Columns: the
largest difference of any logit, on plain rows, on rows padded left and right, and on packed rows;
of any gradient of a parameter, relative to the largest of that parameter; of any logit of torch
after import and export (inf: some bit has changed); how many greedy tokens are those of `generate`.
"""

import argparse
import json
import pathlib
import sys
import tempfile

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))
sys.path.insert(1, str(pathlib.Path(__file__).resolve().parents[1] / "tests" / "hf"))

import jax
import numpy as np
import torch
import transformers
from cases import CASES, save, texts
from fake import shapes_of
from reckoning import LIMIT, Ours, apart, fixture, greedy, packed, padded, save_fixture

from jaxlm.convert import from_hf, to_hf
from jaxlm.hf import folder as hf
from jaxlm.hf import tensors

jax.config.update("jax_default_matmul_precision", "highest")
transformers.logging.set_verbosity_error()
transformers.logging.disable_progress_bar()


class Theirs:
    """The model of a folder, in torch."""

    def __init__(self, folder):
        self.model = transformers.AutoModelForCausalLM.from_pretrained(
            folder, dtype=torch.float32, attn_implementation="eager"
        )
        self.model.eval()

    def logits(self, text):
        """Of one document alone."""
        with torch.no_grad():
            return self.model(torch.tensor(text[None])).logits[0].numpy()

    def gradients(self, documents):
        """Of the summed loss of all documents, by the names that files have."""
        self.model.zero_grad()
        for text in documents:
            logprobs = self.model(torch.tensor(text[None])).logits[0].log_softmax(-1)
            targets = torch.tensor(np.roll(text, -1))
            (-logprobs[torch.arange(len(text)), targets].sum()).backward()
        state = self.model.state_dict(keep_vars=True)
        grads = {n: p.grad for n, p in state.items() if getattr(p, "grad", None) is not None}
        with tempfile.TemporaryDirectory() as folder:  # as it stores them, fused or not
            self.model.save_pretrained(folder, state_dict=grads)
            return arrays_of(folder)

    def greedy(self, text, tokens):
        found = self.model.generate(
            torch.tensor(text[None]), max_new_tokens=tokens, do_sample=False, eos_token_id=None
        )
        return found[0, len(text) :].numpy()


def compare(config, tokens, write=None):
    """A row of the table: name of a figure -> the figure."""
    documents, row = texts(), {}
    with tempfile.TemporaryDirectory() as scratch:
        folder = pathlib.Path(scratch) / "hf"
        save(folder, config, shapes_of(config))
        ours, theirs = Ours(folder), Theirs(folder)
        expected = [theirs.logits(text) for text in documents]
        gradients = theirs.gradients(documents)
        if write:
            save_fixture(write, expected, gradients)
        for name, layout in (("plain", None), ("padded", padded), ("packed", packed)):
            row[name] = ours.difference(documents, expected, layout)
        row["gradients"] = np.max([*apart(ours.gradients(documents), gradients).values()])
        row["export"] = exported(folder, expected, documents)
        fresh = lambda text: Theirs(folder).greedy(text, tokens)  # dynamic RoPE has a memory
        row["greedy"] = sum(
            int(np.sum(np.cumprod(greedy(ours, text, tokens) == fresh(text))))
            for text in documents[:2]
        )
    return row


def arrays_of(folder):
    """The tensors of a folder by name, in a larger model those of the language model in it."""
    found = hf.open_folder(pathlib.Path(folder)).tensors
    return {name: np.array(tensors.view(spec)) for name, spec in found.items()}


def exported(folder, expected, documents):
    """The largest difference of a logit after import and export; inf if a bit has changed."""
    quiet = lambda text: None
    from_hf(folder, folder.parent / "ours", say=quiet)
    to_hf(folder.parent / "ours", folder.parent / "back", say=quiet)
    one, two = arrays_of(folder), arrays_of(folder.parent / "back")
    same = one.keys() == two.keys() and all(x.tobytes() == two[n].tobytes() for n, x in one.items())
    back = Theirs(folder.parent / "back")
    found = [back.logits(text) for text in documents]
    differences = [np.abs(a - b).max() for a, b in zip(found, expected, strict=True)]
    return float(np.max(differences)) if same else float("inf")


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", default="", help="cases whose names hold this")
    parser.add_argument("--tokens", type=int, default=64, help="greedy ones after each prompt")
    parser.add_argument("--fixtures", action="store_true", help="write those of the tests anew")
    parser.add_argument("--json", default="", help="a file for the figures too")
    flags = parser.parse_args()
    chosen = {name: config for name, config in CASES.items() if flags.only in name}
    rows = {}
    print(f"{'case':38}  plain    padded   packed   gradients  export  greedy", flush=True)
    for name, config in chosen.items():
        row = rows[name] = compare(config, flags.tokens, flags.fixtures and fixture(name))
        figures = "  ".join(f"{row[key]:.1e}" for key in ("plain", "padded", "packed", "gradients"))
        count = f"{row['greedy']}/{2 * flags.tokens}"
        print(f"{name:38}  {figures}    {row['export']:.0e}   {count}", flush=True)
    if flags.json:
        pathlib.Path(flags.json).write_text(json.dumps(rows, indent=1, default=float))
    figures = ("plain", "padded", "packed", "gradients", "export")
    wrong = [
        name
        for name, row in rows.items()
        if not all(row[key] <= LIMIT for key in figures) or row["greedy"] < 2 * flags.tokens
    ]
    if wrong:
        sys.exit(f"beyond {LIMIT:g}, or other text: {', '.join(wrong)}")


if __name__ == "__main__":
    main()
