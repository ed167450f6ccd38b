"""Our preference losses and fine-tuning against TRL's trainers, on one tiny Llama and one batch.

    python tools/preference_parity.py               a table of differences
    python tools/preference_parity.py --fixtures    also writes tests/fixtures/trl.json

Needs torch, transformers and trl (`make parity` installs them). TRL's trainers prepare, collate and
compute the loss themselves, from words of a tokenizer with a word for each id; its gradients are
those of its loss. tests/methods/trl_cases.py holds model, texts and our side. Columns: the largest
difference of the loss, of the log-probability and of the reward of a response, and of any gradient
of a parameter, relative to the largest of that parameter. Below the table: a run of DPO with TRL's
`SyncRefModelCallback`, whose losses are compared step by step and whose reference at the end, and
where TRL does something else by design.
"""

import argparse
import contextlib
import importlib.metadata
import io
import json
import logging
import os
import pathlib
import sys
import tempfile
import warnings

ROOT = pathlib.Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests" / "methods")]
os.environ["HF_HUB_OFFLINE"] = os.environ["HF_DATASETS_OFFLINE"] = "1"
os.environ["TRL_EXPERIMENTAL_SILENCE"] = os.environ["TQDM_DISABLE"] = "1"

import datasets
import jax
import numpy as np
import torch
import transformers
import trl_cases as cases
from reckoning import LIMIT, apart
from tokenizers import Tokenizer, models, pre_tokenizers
from trl import DPOConfig, DPOTrainer, KTOConfig, KTOTrainer, SFTConfig, SFTTrainer
from trl.experimental.cpo import CPOConfig, CPOTrainer
from trl.experimental.orpo import ORPOConfig, ORPOTrainer

jax.config.update("jax_default_matmul_precision", "highest")
transformers.logging.set_verbosity_error()
transformers.logging.disable_progress_bar()
datasets.disable_progress_bars()
warnings.filterwarnings("ignore")
logging.disable(logging.WARNING)

FIXTURE = ROOT / "tests" / "fixtures" / "trl.json"
APART = {
    "dpo sigmoid, smoothed": "TRL's sigmoid reads no label_smoothing; its `aot` of one pair at a "
    "time is that formula",
    "dpo ipo": "TRL logs rewards of sums over tokens, while its loss takes means, as ours does in "
    "both",
    "orpo": "TRL's likelihood of the chosen text counts the prompt and weighs every token of the "
    "batch alike, ours is a mean over responses of their means over tokens: compared where both "
    "are one, prompts of bos alone and chosen responses of one length",
    "kto": "TRL logs rewards without the divergence k, which is taken off ours; mismatched "
    "responses are those of the row before in both",
    "simpo": "TRL's CPO trainer with loss simpo and cpo_alpha 0; its simpo_gamma is our margin",
}
OURS_ALONE = "R-DPO's length_penalty: TRL has none (ld_alpha is LD-DPO, another idea)"

_DPO = {"beta": cases.BETA, "label_smoothing": cases.SMOOTHING}
# Name of a case -> trainer, its config, what else the config says.
TRAINERS = {
    "dpo sigmoid": (DPOTrainer, DPOConfig, {**_DPO, "loss_type": ["sigmoid"]}),
    "dpo sigmoid, smoothed": (DPOTrainer, DPOConfig, {**_DPO, "loss_type": ["aot"]}),
    "dpo robust": (DPOTrainer, DPOConfig, {**_DPO, "loss_type": ["robust"]}),
    "dpo hinge": (DPOTrainer, DPOConfig, {**_DPO, "loss_type": ["hinge"]}),
    "dpo ipo": (DPOTrainer, DPOConfig, {**_DPO, "loss_type": ["ipo"]}),
    "simpo": (
        CPOTrainer,
        CPOConfig,
        {"beta": cases.BETA, "loss_type": "simpo", "simpo_gamma": cases.MARGIN, "cpo_alpha": 0.0},
    ),
    "orpo": (ORPOTrainer, ORPOConfig, {"beta": cases.BETA}),
    "kto": (
        KTOTrainer,
        KTOConfig,
        {"beta": cases.BETA, "undesirable_weight": cases.UNDESIRABLE},
    ),
    "sft": (SFTTrainer, SFTConfig, {"completion_only_loss": True}),
    "sft, packed": (SFTTrainer, SFTConfig, {"completion_only_loss": True, "packing": True}),
}


def model(folder):
    return transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)


def tokenizer():
    """A word for each id."""
    size = cases.MODEL["vocab_size"]
    words = {"<pad>": 0, "<s>": cases.BOS, "</s>": cases.EOS}
    words |= {f"w{i}": i for i in range(3, size)}
    backend = Tokenizer(models.WordLevel(words, unk_token="<pad>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<s>", eos_token="</s>", pad_token="<pad>"
    )


def dataset(name):
    said = lambda ids: " ".join("<s>" if i == cases.BOS else f"w{i}" for i in ids)
    after = lambda ids: " " + said(ids)
    if name == "kto":
        rows = [
            {"prompt": said(prompt), "completion": after(response), "label": label}
            for (prompt, response), label in zip(cases.feedback(), cases.LABELS, strict=True)
        ]
    elif name.startswith("sft"):
        rows = [{"prompt": said(p), "completion": after(c)} for p, c, _ in cases.texts()]
    else:
        rows = [
            {"prompt": said(p), "chosen": after(c), "rejected": after(r)}
            for p, c, r in cases.texts(bare=name == "orpo")
        ]
    return datasets.Dataset.from_list(rows)


def trainer(name, folder, kind=None, **options):
    """TRL's trainer of a case, in float32 on the processor, all rows in one batch."""
    make, config, own = TRAINERS[name]
    rows = dataset(name)
    args = config(
        output_dir=str(folder / "out"),
        per_device_train_batch_size=len(rows),
        max_length=64,
        bf16=False,
        use_cpu=True,
        gradient_checkpointing=False,
        report_to="none",
        save_strategy="no",
        **{"packing_strategy": "bfd"} if "packed" in name else {},
        **own | options,
    )
    needs_reference = make in (DPOTrainer, KTOTrainer)
    return (kind or make)(
        model=model(folder / "policy"),
        args=args,
        train_dataset=rows,
        processing_class=tokenizer(),
        **{"ref_model": model(folder / "reference")} if needs_reference else {},
    )


def figures(name, folder):
    """The same as `cases.Sides.figures`, of TRL."""
    one = trainer(name, folder)
    columns = one.train_dataset
    collated = lambda rows: one.data_collator([columns[i] for i in rows])
    alone = [[i] for i in range(len(columns))]
    together = alone if name == "dpo sigmoid, smoothed" else [list(range(len(columns)))]
    one.model.train()
    one.model.zero_grad()
    loss = 0.0
    for rows in together:
        part = one.compute_loss(one.model, one._prepare_inputs(collated(rows))) / len(together)
        part.backward()
        loss += part.item()
    gradients = {n: p.grad.numpy().copy() for n, p in one.model.named_parameters()}
    found = {"loss": loss, "gradients": gradients}
    if name == "kto":
        means = one._metrics["train"]
        rewards = [means[f"rewards/{member}"][-1] for member in ("chosen", "rejected")]
        return found | {"divergence": means["kl"][-1], "rewards": rewards}
    if name.startswith("sft"):
        return found
    logged = []
    for rows in alone:
        with torch.no_grad():
            one.compute_loss(one.model, one._prepare_inputs(collated(rows)))
        logged.append({k: float(v[-1]) for k, v in metrics(one).items()})
    of = lambda what: [[row[f"{what}/{m}"] for m in ("chosen", "rejected")] for row in logged]
    found["logprobs"] = of("logps")
    if cases.CASES[name].rewards:
        found["rewards"] = of("rewards")
    if name in ("simpo", "orpo"):  # means over tokens
        texts = cases.texts(bare=name == "orpo")
        lengths = np.array([[len(c) + 1, len(r) + 1] for _, c, r in texts])
        found["logprobs"] = (np.array(found["logprobs"]) * lengths).tolist()
    return found


def metrics(one):
    return one._metrics["train"] if hasattr(one, "_metrics") else one._stored_metrics["train"]


class Recorded(DPOTrainer):
    """Keeps the losses as they are; logged ones are rounded."""

    def compute_loss(self, *args, **kwargs):
        loss = super().compute_loss(*args, **kwargs)
        self.losses = [*getattr(self, "losses", []), loss.item()]
        return loss


def follow(folder):
    """The same as `cases.Sides.follow`, of TRL's whole training loop."""
    one = trainer(
        "dpo sigmoid",
        folder,
        Recorded,
        sync_ref_model=True,
        ref_model_sync_steps=cases.EVERY,
        ref_model_mixup_alpha=cases.ALPHA,
        max_steps=cases.STEPS,
        optim="sgd",
        learning_rate=cases.RATE,
        lr_scheduler_type="constant",
        max_grad_norm=0.0,
        weight_decay=0.0,
        disable_tqdm=True,
        logging_strategy="no",
    )
    with contextlib.redirect_stdout(io.StringIO()):  # a summary
        one.train()
    of = lambda torch_model: {n: p.detach().numpy() for n, p in torch_model.named_parameters()}
    return one.losses, of(one.model), of(one.ref_model)


def difference(ours, theirs):
    """Name of a figure -> the largest difference; of gradients, relative to their largest."""
    row = {}
    for name, one in ours.items():
        if name == "gradients":
            row[name] = max(apart(one, theirs[name]).values())
        else:
            row[name] = float(np.abs(np.array(one) - np.array(theirs[name])).max())
    return row


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--fixtures", action="store_true", help="write those of the tests anew")
    parser.add_argument("--json", default="", help="a file for the differences too")
    flags = parser.parse_args()
    versions = {name: importlib.metadata.version(name) for name in ("trl", "transformers", "torch")}
    print(", ".join(f"{name} {version}" for name, version in versions.items()))
    rows, kept = {}, {}
    columns = ("loss", "logprobs", "rewards", "gradients")
    print(f"{'':24}" + "".join(f"{c:>10}" for c in columns), flush=True)
    with tempfile.TemporaryDirectory() as scratch:
        folder = pathlib.Path(scratch)
        sides = cases.Sides(folder)
        for name in cases.CASES:
            theirs = figures(name, folder)
            row = rows[name] = difference(sides.figures(name), theirs)
            kept[name] = theirs | {"gradients": cases.in_short(theirs["gradients"])}
            shown = "".join(f"{row[c]:10.1e}" if c in row else f"{'':>10}" for c in columns)
            print(f"{name:24}{shown}", flush=True)
        losses, *theirs = follow(folder)
        our_losses, *ours = sides.follow()
    row = rows["dpo + follow"] = {"loss": float(np.abs(np.subtract(our_losses, losses)).max())}
    for name, one, other in zip(("policy", "reference"), ours, theirs, strict=True):
        row[name] = max(apart(one, other).values())
    kept["dpo + follow"] = {"losses": losses, "reference": cases.in_short(theirs[1])}
    print(
        f"dpo + follow: {cases.STEPS} steps of SGD, alpha {cases.ALPHA} every {cases.EVERY}; loss "
        f"{losses[0]:.4f} to {losses[-1]:.4f}; largest difference of a step's loss "
        f"{row['loss']:.1e}, at the end of the policy {row['policy']:.1e}, of the reference "
        f"{row['reference']:.1e}"
    )
    print("\nWhere TRL does something else by design:")
    for name, what in APART.items():
        print(f"  {name}: {what}")
    print(f"  {OURS_ALONE}")
    if flags.fixtures:
        FIXTURE.write_text(json.dumps({"versions": versions, "cases": kept}) + "\n")
        print(f"{FIXTURE.relative_to(ROOT)}: {FIXTURE.stat().st_size:,} bytes")
    if flags.json:
        pathlib.Path(flags.json).write_text(json.dumps(rows, indent=1))
    if wrong := [name for name, row in rows.items() if not max(row.values()) <= LIMIT]:
        sys.exit(f"beyond {LIMIT:g}: {', '.join(wrong)}")


if __name__ == "__main__":
    main()
