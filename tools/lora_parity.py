"""LoRA adapters against PEFT, both ways, on tiny models with random weights.

    python tools/lora_parity.py [--fixtures]

needs torch, transformers and peft (`make parity` installs them). A row for each family: the largest
difference of any logit, in float32, between PEFT and our model with PEFT's adapter merged into it,
fused kernels and GPT-2's transposed ones among them; and between our adapted model and PEFT with
the adapter that jaxlm.convert has written. --fixtures writes what tests/hf/test_peft.py compares
with.
"""

import argparse
import pathlib
import sys
import tempfile

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))
sys.path.insert(1, str(pathlib.Path(__file__).resolve().parents[1] / "tests" / "hf"))

import jax
import numpy as np
import peft
import torch
import transformers
from adapted import ADAPTED, TOWER, a_run, draw_adapter
from cases import CASES, save, texts
from fake import shapes_of
from reckoning import LIMIT, Ours, fixture, packed, split

from jaxlm.convert import to_peft

jax.config.update("jax_default_matmul_precision", "highest")
transformers.logging.set_verbosity_error()
transformers.logging.disable_progress_bar()
# What has a module of its own in each family; the others fuse query, key and value.
WRITTEN = {"llama": "", "gpt2": "output|mlp", "gpt_neox": "output|mlp", TOWER: ""}


def theirs(folder, adapter):
    """Logits of each document, by PEFT."""
    model = transformers.AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager"
    )
    model = peft.PeftModel.from_pretrained(model, adapter).eval()
    with torch.no_grad():
        return [model(torch.tensor(text[None])).logits[0].numpy() for text in texts()]


def compare(name, write):
    """The two differences."""
    with tempfile.TemporaryDirectory() as scratch:
        path, quiet = pathlib.Path(scratch), lambda text: None
        save(path / "hf", CASES[name], shapes_of(CASES[name]))
        draw_adapter(path / "adapter", name)
        expected = theirs(path / "hf", path / "adapter")
        if write and name != TOWER:
            np.savez_compressed(fixture(f"peft {name}"), *expected)
        read = Ours(path / "hf", adapter=path / "adapter").difference(texts(), expected, packed)
        logits, batch = a_run(path / "run", path / "hf", targets=WRITTEN[name]), packed(texts())
        to_peft(path / "run", path / "written", say=quiet)
        found = split(batch, logits(batch))
        ours = zip(found, theirs(path / "hf", path / "written"), strict=True)
        return read, float(np.max([np.abs(a - b).max() for a, b in ours]))


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--fixtures", action="store_true", help="write those of the tests anew")
    flags = parser.parse_args()
    print(f"{'lora':32}  read     written", flush=True)
    rows = {name: compare(name, flags.fixtures) for name in ADAPTED}
    for name, (read, written) in rows.items():
        print(f"{name:32}  {read:.1e}  {written:.1e}", flush=True)
    if wrong := [name for name, row in rows.items() if not max(row) <= LIMIT]:
        sys.exit(f"beyond {LIMIT:g}: {', '.join(wrong)}")


if __name__ == "__main__":
    main()
