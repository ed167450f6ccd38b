"""A work folder as a run leaves it, made up but plausible: for tests and for looking at the page.

python tests/report_folder.py FOLDER [STEPS]
"""

import inspect
import json
import math
import re
import sys
import textwrap
from pathlib import Path

import numpy as np

BATCH_TOKENS = 16 * 128
STARTED = 1_763_600_000.0
SOURCES = {
    # name: loss and bits per character at the end, compressors, characters per token
    "code": (1.95, 1.224, {"gzip": 2.08, "bz2": 1.78, "xz": 1.81, "xz primed": 1.49}, 3.1),
    "prose": (2.90, 1.527, {"gzip": 2.56, "bz2": 2.30, "xz": 2.34, "xz primed": 1.84}, 3.6),
}


def make(folder: Path, steps: int = 2000, *, seed: int = 0, sources: dict = SOURCES) -> Path:
    """Write all six files of a finished run of so many steps."""
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(seed)
    _lines(folder / "metrics.jsonl", _metrics(steps, rng, sources))
    _lines(folder / "evals.jsonl", _evals(steps, sources))
    _lines(folder / "samples.jsonl", _samples(steps))
    _lines(folder / "events.jsonl", _events(steps))
    (folder / "run.json").write_text(json.dumps(_run(steps, sources)))
    (folder / "results.json").write_text(json.dumps(_results(steps, rng, sources)))
    return folder


def _lines(path: Path, rows) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def _metrics(steps, rng, sources):
    warm = steps // 20 or 1
    noise = rng.normal(0, 1, (steps, 4))
    for i in range(steps):
        share = (i + 1) / steps
        loss = 2.3 + 6.1 * math.exp(-((i * 2000 / steps) ** 0.45) / 2.4) + 0.09 * noise[i, 0]
        slow = 0.55 if i % 97 == 40 else 1.0
        yield {
            "step": i + 1,
            "loss": loss,
            "bits_per_char": loss / math.log(2) / 3.3,
            "tokens": (i + 1) * BATCH_TOKENS,
            "learning_rate": 0.02 * min(1, (i + 1) / warm) * min(1, 2 * (1 - share) + 1e-3),
            "norm/grads": 0.4 * math.exp(0.25 * noise[i, 1]) + 6 * math.exp(-i / (steps / 80)),
            "norm/updates": 0.02 * math.exp(0.1 * noise[i, 2]),
            "tokens_per_second": slow * (18_600 + 420 * noise[i, 3]),
            "peak_fraction": slow * (0.31 + 0.007 * noise[i, 3]),
            "skipped": 0 if i < steps // 3 else 1,
            "weight": BATCH_TOKENS,
            **{
                f"weights/{name}": (0.5 + (0.2 if share > 0.6 else 0) * (1 - 2 * (k % 2))) * 2 / n
                for n in [len(sources)]
                for k, name in enumerate(sources)
            },
        }


def _evals(steps, sources):
    for k in range(11):
        step = max(round(steps * k / 10), 1)
        row = {"step": step, "tokens": step * BATCH_TOKENS, "seconds": 1.4}
        for name, (loss, bits, _, _) in sources.items():
            fall = math.exp(-((2000 * k / 10) ** 0.5) / 7.5)
            row[f"loss/{name}"] = loss + (8.3 - loss) * fall
            row[f"bits_per_char/{name}"] = bits + (6.5 - bits) * fall + 0.002 * (10 - k)
            if k:
                row[f"ema/bits_per_char/{name}"] = row[f"bits_per_char/{name}"] - 0.012
        yield row


def _samples(steps):
    written = {
        0.1: (
            "    self.self = self.get(self)\n        return self._file(name, name)\n    def get_",
            " is the value of the the string and the object is a not the file. The :class:`the`",
        ),
        0.5: (
            '    """Return the name of the file."""\n        if not isinstance(path, str):\n'
            "            raise TypeError('expected a string, not %r' % path)\n        return path",
            " statement is used to bind a name in the module to a new object. If the argument\n"
            "is given, it is evaluated in the current namespace and the result is returned.",
        ),
        1.0: (
            '    """Read at most size bytes from the file.\n\n        Return an empty bytes object '
            'at end of file.\n        """\n        if self._closed:\n            raise ValueError('
            '"I/O operation on closed file")\n        with self._lock:\n'
            "            return self._raw.read(size)",
            " statement executes its body with the names of the module bound in the local\n"
            "namespace.  When an exception is raised in the body, it is passed to the method\n"
            "*__exit__()*, which may return a true value to stop it; see section Exceptions.",
        ),
    }
    for fraction, (code, prose) in written.items():
        row = {"step": round(steps * fraction), "fraction": fraction}
        yield row | {"source": "code", "prompt": "def read(self, size=-1):\n    ", "text": code}
        yield row | {"source": "prose", "prompt": 'The "with"', "text": prose}


def _events(steps):
    clock = STARTED
    rows = []

    def add(kind, seconds, step=0, **more):
        nonlocal clock
        clock += seconds
        rows.append({"kind": kind, "seconds": seconds, "step": step, "time": clock, **more})

    add("start", 0.0)
    add("setup", 2.6)
    add("data", 14.2)
    add("compile", 8.9)
    for k in range(20):
        if k == 9:
            rows.append({"kind": "interrupt", "step": k * steps // 20, "time": clock})
            clock += 3600
            add("resume", 0.0, k * steps // 20)
            add("setup", 2.3)
            add("compile", 0.8)
        add("train_step", steps * 0.0055, (k + 1) * steps // 20)
        add("data_wait", steps * 0.00004, (k + 1) * steps // 20)
        if k % 2:
            add("evaluate", 1.4, (k + 1) * steps // 20)
            add("checkpoint", 0.05, (k + 1) * steps // 20)
        clock += 0.1
    rows.append(
        {
            "kind": "warning",
            "text": "1 update was skipped at step 667: its gradient was not finite.",
            "time": clock,
        }
    )
    add("report", 0.2, steps)
    return rows


def _run(steps, sources):
    model = {"width": 128, "layers": 4, "heads": 2, "head_width": 64, "qk_norm": True}
    model |= {"vocabulary": 4096, "activation": "swiglu", "tied": True, "rope_theta": 10000.0}
    optimizer = {"name": "muon", "learning_rate": 0.02, "schedule": "linear", "clip": 1.0}
    mix = {name: {"weight": 1.0, "path": f"stdlib-{name}"} for name in sources}
    card = {
        name: {
            "documents": 1214 + 300 * k,
            "characters": 14_820_113,
            "tokens": round(14_820_113 / per_token),
            "chars_per_token": per_token,
            "duplicates": 21 + k,
            "held_out_documents": 55,
            "held_out_characters": 671_204,
            "hash": f"{k}9c2f61d0b7a4e88131f0c5be77aa0192d3c4b5a6f70819f",
        }
        for k, (name, (*_, per_token)) in enumerate(sources.items())
    }
    return {
        "name": "quickstart",
        "command": "python -m jaxlm.train --config=configs/quickstart.py "
        "--config.data.mix.code.weight=0.5 --config.workdir='runs/my first run'",
        "config": {
            "steps": steps,
            "seed": 0,
            "workdir": "runs/my first run",
            "method": "next_token",
            "batch": {"rows": 16, "length": 128, "accumulate": 1},
            "model": model,
            "optimizer": optimizer,
            "data": {"mix": mix, "tokenizer": {"kind": "bpe", "size": 4096}},
            "mesh": {"data": 1, "fsdp": 1, "tensor": 1, "sequence": 1},
            "checkpoint": {"every": 200, "keep": 3},
        },
        "config_diff": {
            "steps": [1000, steps],
            "model.qk_norm": [False, True],
            "optimizer.name": ["adamw", "muon"],
            "optimizer.learning_rate": [0.001, 0.02],
            "optimizer.schedule": ["cosine", "linear"],
            "data.mix.code.weight": [None, 0.5],
            "data.mix.code.filter": [None, ""],
        },
        "commit": "a473cc05d1e24b7790c0c1d24d2e1f0b1a2c3d4e",
        "versions": {"jax": "0.10.2", "jaxlib": "0.10.2", "flax": "0.12.8", "optax": "0.2.8"},
        "python": "3.11.7",
        "device": "cpu, 2 cores of x86_64",
        "devices": 1,
        "mesh": {"data": 1, "fsdp": 1, "tensor": 1, "sequence": 1},
        "parameters": 1_278_592,
        "parameters_by_part": {
            "embed": 524_288,
            "attention": 262_656,
            "mlp": 491_520,
            "norms": 128,
        },
        "flops_per_token": 7.2e6,
        "peak_flops": 4.8e11,
        "peak_is": "measured",
        "started": "2025-11-20T00:53:20+00:00",
        "data_card": {
            "sources": card,
            "tokenizer": {"kind": "bpe", "size": 4096, "hash": "77d0aa1c9be2f0017c55"},
            "hash": "5fd2c07ab9913e66120f",
        },
        "expected": {"code": 1.30, "prose": 1.60},
    }


def _results(steps, rng, sources):
    per_file = lambda values: {name: v * 1.19 for name, v in values.items()}
    documents = {
        name: [
            {
                "name": f"{module}.py" if name == "code" else f"pydoc topic: {module}",
                "characters": int(rng.integers(400, 60_000)),
                "bits_per_char": bits * (0.55 + 0.1 * k),
            }
            for k, module in enumerate(
                ("enum", "dis", "textwrap", "shelve", "heapq", "tokenize", "turtle", "this")
            )
        ]
        for name, (_, bits, _, _) in sources.items()
    }
    return {
        "bits_per_char": {name: bits for name, (_, bits, _, _) in sources.items()},
        "compressors": {name: rivals for name, (_, _, rivals, _) in sources.items()},
        "compressors_per_file": {name: per_file(r) for name, (_, _, r, _) in sources.items()},
        "model_per_file": {name: bits * 1.04 for name, (_, bits, _, _) in sources.items()},
        "context": "The model reads windows of 128 tokens that overlap by half; its context starts "
        "empty at each file, while a compressor's stream carries over.",
        "documents": documents,
        "passages": [
            {"source": "code", "name": "textwrap.py", "tokens": _tokens(textwrap.TextWrapper, rng)},
            {"source": "prose", "name": "inspect.py docstrings", "tokens": _prose(rng)},
        ],
        "steps": steps,
        "tokens": steps * BATCH_TOKENS,
        "seconds": 30 + steps * 0.111,
        "verdict": [
            f"{name}: {bits:.3f} bits per character, below primed xz ({rivals['xz primed']:.3f})."
            for name, (_, bits, rivals, _) in sources.items()
        ],
    }


def _costed(text, rng, rarity):
    pieces = re.findall(r"\s*\w{1,7}|\s*[^\w\s]+|\s+", text)
    seen: dict[str, int] = {}
    tokens: list[list] = []
    for i, piece in enumerate(pieces):
        seen[piece] = seen.get(piece, 0) + 1
        cost = rarity * rng.gamma(0.8, 1.6) * len(piece.strip()) ** 0.5 / seen[piece] ** 0.6
        tokens.append([piece, None if i == 0 else round(cost + 0.02, 3)])
    return tokens


def _tokens(thing, rng):
    source = inspect.getsource(thing)
    return _costed(source[source.index("    def _munge") :][:2400], rng, 1.9)


def _prose(rng):
    docs = (inspect.__doc__, json.__doc__)
    return _costed("\n\n".join(inspect.cleandoc(doc or "") for doc in docs)[:2600], rng, 2.1)


if __name__ == "__main__":
    print(make(Path(sys.argv[1]), int((sys.argv[2:] or ["2000"])[0])))
