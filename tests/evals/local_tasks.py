"""Tasks of each of lm-eval's kinds, and a small random Llama, both made without a network.

All is drawn from fixed seeds by numpy, so that the tool that runs them through lm-eval's `hf`
backend and the tests that run them through ours start from the same files.
"""

import json
import pathlib
import random

import numpy as np
from safetensors.numpy import save_file

from jaxlm.data.tokenizer import byte_characters

TEXT = """the cat dog sat on a red mat and then it ran to the old house in the rain because there
was no other place that stayed dry for long under such heavy weather as this one had been"""
WORDS = TEXT.split()
# Tokens; some texts are longer.
CONTEXT = 96
MODEL = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": CONTEXT,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0,
    "hidden_act": "silu",
    "tie_word_embeddings": False,
    "torch_dtype": "float32",
}
MERGES = [
    *("Ġ t", "h e", "Ġt he", "Ġ a", "i n", "o n", "r e", "Ġ s", "Ġ d", "Ġ c", "a t", "Ġc at"),
    *("o g", "Ġd og", "Ġs at", "u n", "Ġ r", "Ġr un", "a n", "Ġa n", "Ġan d", "Ġ i", "Ġi n", "Ċ Ċ"),
]
TASKS = ("local_choice", "local_last_word", "local_text", "local_answer", "local_chosen_few")


def write_tasks(folder: pathlib.Path) -> None:
    """A YAML file and its JSON lines for each of `TASKS`."""
    rng = random.Random(0)
    say = lambda low, high: " ".join(rng.choices(WORDS, k=rng.randint(low, high)))
    choice = [
        {"question": say(2, 40), "options": [say(1, 6) for _ in range(4)], "answer": i % 4}
        for i in range(12)
    ]
    common = {"dataset_path": "json", "test_split": "test", "metadata": {"version": 1}}
    mean = lambda *names: [
        {"metric": n, "aggregation": "mean", "higher_is_better": True} for n in names
    ]
    _task(
        folder,
        "local_choice",
        choice,
        common,
        output_type="multiple_choice",
        doc_to_text="Question: {{question}}\nAnswer:",
        doc_to_choice="{{options}}",
        doc_to_target="{{answer}}",
        metric_list=mean("acc", "acc_norm"),
    )
    letters = [{**row, "answer": row["answer"]} for row in choice]
    _task(
        folder,
        "local_chosen_few",
        letters,
        common | {"fewshot_split": "test", "num_fewshot": 2},
        output_type="multiple_choice",
        doc_to_text="{{question}} =>",
        doc_to_choice=["A", "B", "C", "D"],
        doc_to_target="{{answer}}",
        metric_list=mean("acc"),
    )
    _task(
        folder,
        "local_last_word",
        [
            {"start": start, "word": say(1, 1)}
            for start in ["", *(say(1, 60) + " " for _ in range(11))]
        ],
        common,
        output_type="loglikelihood",
        doc_to_text="{{start}}",
        doc_to_target="{{word}}",
        target_delimiter="",
        metric_list=[
            {"metric": "perplexity", "aggregation": "perplexity", "higher_is_better": False},
            *mean("acc"),
        ],
    )
    _task(
        folder,
        "local_text",
        [{"page": say(3, 120)} for _ in range(6)],
        common,
        output_type="loglikelihood_rolling",
        doc_to_text="",
        doc_to_target="{{page}}",
        metric_list=[
            {"metric": n, "aggregation": a, "higher_is_better": False}
            for n, a in (
                ("word_perplexity", "weighted_perplexity"),
                ("byte_perplexity", "weighted_perplexity"),
                ("bits_per_byte", "bits_per_byte"),
            )
        ],
    )
    _task(
        folder,
        "local_answer",
        [{"question": say(1, 60), "answer": say(1, 2)} for _ in range(8)],
        common,
        output_type="generate_until",
        doc_to_text="{{question}}\n",
        doc_to_target="{{answer}}",
        generation_kwargs={"until": ["e", "\n\n"], "max_gen_toks": 24, "do_sample": False},
        metric_list=mean("exact_match"),
    )


def _task(folder, name, rows, common, **keys):
    folder.mkdir(parents=True, exist_ok=True)
    data = folder / f"{name}.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    keys |= common | {"task": name, "dataset_kwargs": {"data_files": {"test": str(data)}}}
    # JSON is YAML.
    (folder / f"{name}.yaml").write_text(json.dumps(keys, indent=1))


def write_model(folder: pathlib.Path, bos: bool, **changed) -> dict[str, np.ndarray]:
    """A Hugging Face folder of a random Llama; `bos`: its tokenizer begins texts with one.

    `changed`: fields of its configuration.
    """
    folder.mkdir(parents=True, exist_ok=True)
    c = MODEL | changed
    size = write_tokenizer(folder, bos, c["max_position_embeddings"])
    vocabulary = c.get("vocab_size", size)
    rng = np.random.default_rng(0)
    D, F = c["hidden_size"], c["intermediate_size"]
    heads, kv = (c[f"num_{k}_heads"] * c["head_dim"] for k in ("attention", "key_value"))
    draw = lambda rows, columns: rng.normal(size=(rows, columns)).astype(np.float32) * columns**-0.5
    tensors = {
        "model.embed_tokens.weight": draw(vocabulary, D) * 4,
        "lm_head.weight": draw(vocabulary, D) * 2,
    }
    for i in range(c["num_hidden_layers"]):
        block = f"model.layers.{i}."
        for name, rows in (("q", heads), ("k", kv), ("v", kv)):
            tensors[f"{block}self_attn.{name}_proj.weight"] = draw(rows, D)
        tensors[f"{block}self_attn.o_proj.weight"] = draw(D, heads)
        tensors[f"{block}mlp.gate_proj.weight"] = draw(F, D)
        tensors[f"{block}mlp.up_proj.weight"] = draw(F, D)
        tensors[f"{block}mlp.down_proj.weight"] = draw(D, F)
        for name in ("input_layernorm", "post_attention_layernorm"):
            tensors[f"{block}{name}.weight"] = rng.uniform(0.5, 1.5, D).astype(np.float32)
    tensors["model.norm.weight"] = rng.uniform(0.5, 1.5, D).astype(np.float32)
    config = c | {"vocab_size": vocabulary, "bos_token_id": size - 2}
    config |= {"eos_token_id": size - 1, "pad_token_id": size - 1}
    (folder / "config.json").write_text(json.dumps(config, indent=1))
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return tensors


def write_tokenizer(folder: pathlib.Path, bos: bool, length: int) -> int:
    """A byte-level BPE with a few merges; returns its size, of which the last are bos and eos."""
    import tokenizers
    from tokenizers import decoders, models, pre_tokenizers, processors

    pieces = [*byte_characters(), *(merge.replace(" ", "") for merge in MERGES)]
    pairs = [tuple(merge.split(" ")) for merge in MERGES]
    backend = tokenizers.Tokenizer(models.BPE({p: i for i, p in enumerate(pieces)}, pairs))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(["<s>", "</s>"])
    if bos:
        backend.post_processor = processors.TemplateProcessing(
            single="<s> $A", special_tokens=[("<s>", len(pieces))]
        )
    backend.save(str(folder / "tokenizer.json"))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": "<s>",
        "eos_token": "</s>",
        "pad_token": "</s>",
        "clean_up_tokenization_spaces": False,
        "model_max_length": length,
        "chat_template": (
            "{% for m in messages %}{% if m['role'] == 'system' %}{{ raise_exception('none') }}"
            "{% endif %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}"
            "{% if add_generation_prompt %}assistant:{% endif %}"
        ),
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=1))
    return len(pieces) + 2


def kept(results) -> dict[str, dict]:
    """Of lm-eval's results: each item's answers, in order, and the metrics."""
    found = {}
    for task, samples in results["samples"].items():
        ordered = sorted(samples, key=lambda sample: sample["doc_id"])
        answers = [[answer for (answer,) in sample["resps"]] for sample in ordered]
        metrics = {k: v for k, v in results["results"][task].items() if "," in k and v != "N/A"}
        found[task] = {"answers": json.loads(json.dumps(answers)), "metrics": metrics}
    return found


def largest_gap(theirs, ours) -> float:
    """Of the log p; infinite where an answer is of another kind, or another text."""
    gap = 0.0
    for one, other in zip(_flat(theirs), _flat(ours), strict=True):
        if isinstance(one, float) and isinstance(other, float):
            gap = float(np.maximum(gap, abs(one - other)))  # NaN stays NaN, unlike with `max`
        elif one != other:
            return float("inf")
    return gap


def same_metrics(theirs, ours) -> bool:
    """Whether metrics agree: those counted exactly, those of log p to a ten-thousandth of them."""
    return theirs.keys() == ours.keys() and np.allclose(
        [float(theirs[k]) for k in sorted(theirs)],
        [float(ours[k]) for k in sorted(theirs)],
        rtol=1e-4,
        atol=0,
    )


def _flat(tree):
    if isinstance(tree, list | tuple):
        for part in tree:
            yield from _flat(part)
    else:
        yield tree
