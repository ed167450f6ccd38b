"""A training step of a 1B Llama on one GPU: ours by every attention backend, beside torch's.

    python tools/bench_gpu.py --torch=python        # which Python has torch and transformers
    python tools/bench_gpu.py --only=equality       # is each backend right on this GPU?
    python tools/bench_gpu.py --only=tiles          # which tiles suit flash here
    python tools/bench_gpu.py --shape=toy           # anywhere, in a minute: only that it runs

Same shape and rows (Llama 3.2 1B, 4 rows of 4,096 tokens), AdamW, gradients clipped by their global
norm. Each contestant has a process of its own, so that the memory of the one before is free; one
that fails is a line of the table, and the rest go on.

Ours: bfloat16 compute, float32 parameters and moments, the preset's remat and loss chunks, scanned
and unrolled. Packed rows hold four documents each; cudnn gets rows of one document, as it can do no
other, and "flash, one document" is flash on the same. torch: `torch.compile` and sdpa, rows of one
document, once under autocast (float32 parameters, as ours) and once with everything in bfloat16.

MFU is of the dense bfloat16 peak. FLOPs are those the model needs: 6 for each token and parameter
of a product (the head counts, looking up embeddings does not) and 6·heads·head width·(length + 1)
for each token and layer, causal attention of whole rows. So packed rows, which need less, and what
remat does again are not counted as work.
"""

import argparse
import dataclasses
import functools
import itertools
import json
import pathlib
import statistics
import subprocess
import sys
import time

ROOT = pathlib.Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tools")]

from bench_train import Shape, llama  # noqa: E402  (imports no JAX)

from jaxlm.host import gpu_memory  # noqa: E402  (nor does this)

SHAPES = {
    "1b": Shape(2048, 16, 32, 8, 8192, 128256, 4096, 4),
    "toy": Shape(64, 2, 4, 2, 128, 256, 64, 2),
}
DOCUMENTS = 4  # of a packed row


def model_flops(shape: Shape) -> int:
    """What one step needs; see above."""
    D, head = shape.width, shape.width // shape.heads
    attention = D * head * (shape.heads + shape.kv_heads) * 2
    matrices = shape.layers * (attention + 3 * D * shape.ffn_width) + D * shape.vocabulary
    of_token = 6 * matrices + 6 * shape.layers * shape.heads * head * (shape.length + 1)
    return of_token * shape.batch * shape.length


# The contestants. Each runs in its own process and returns what it measured.


def our_step(shape: Shape, job: dict, steps: int) -> dict:
    """A step as `train` builds it, on the first device."""
    import jax
    import numpy as np

    from jaxlm import sharding
    from jaxlm.methods.next_token import next_token
    from jaxlm.models import presets
    from jaxlm.models.transformer import DecoderConfig, decoder
    from jaxlm.optim import OptimizerSpec, build
    from jaxlm.step import init_state, make_step

    sizes = dataclasses.asdict(shape)
    rows, length = sizes.pop("batch"), sizes.pop("length")
    model = {**presets.LLAMA_1B, **sizes, "scan_layers": job["scan"], "attention": job["attention"]}
    mesh = sharding.make_mesh(sharding.MeshSpec(), jax.devices()[:1])
    lm = decoder(
        DecoderConfig(**model | job.get("model", {})),
        sharding.platform(mesh),
        packed=job["documents"] > 1,
    )
    tx, _ = build(OptimizerSpec(learning_rate=1e-4), 1000, lm.axes)
    method = next_token()
    words = np.random.default_rng(0).integers(0, shape.vocabulary, (rows, length + 1), np.int32)
    place = np.broadcast_to(np.arange(length, dtype=np.int32), (rows, length))
    document = length // job["documents"]
    key = jax.random.key(1)
    with jax.set_mesh(mesh):
        state = jax.jit(lambda key: init_state(lm.init(key), method, tx))(jax.random.key(0))
        batch = jax.device_put({
            "tokens": words[:, :-1],
            "targets": words[:, 1:],
            "weights": np.ones((rows, length), np.float32),
            "segments": place // document + 1,
            "positions": place % document,
        })  # fmt: skip
        began = time.perf_counter()
        compiled = make_step(lm, method, tx).lower(state, batch, key).compile()
        compiling = time.perf_counter() - began

        def turn(count):
            nonlocal state
            for _ in range(count):
                state, metrics = compiled(state, batch, key)
            return float(metrics["loss"])

        measured = timed(turn, steps)
    peak = (jax.devices()[0].memory_stats() or {}).get("peak_bytes_in_use")
    temporary = compiled.memory_analysis().temp_size_in_bytes
    return {"compile": compiling, "bytes": peak or temporary, **measured}


def torch_step(shape: Shape, job: dict, steps: int) -> dict:
    """A plain training loop around Hugging Face's Llama."""
    import torch

    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.manual_seed(0)
    torch.set_float32_matmul_precision("high")
    model = llama(shape).to(device, torch.float32 if job["autocast"] else torch.bfloat16)
    if job["checkpoint"]:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    adam = torch.optim.AdamW(model.parameters(), lr=1e-4, weight_decay=0.1, fused=True)
    run = torch.compile(model) if job["compile"] else model
    words = torch.randint(0, shape.vocabulary, (shape.batch, shape.length), device=device)

    def step():
        adam.zero_grad(set_to_none=True)
        with torch.autocast(device, dtype=torch.bfloat16, enabled=job["autocast"]):
            loss = run(input_ids=words, labels=words).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        adam.step()
        return loss

    def turn(count):
        for _ in range(count):
            loss = step()
        return loss.item()

    began = time.perf_counter()
    turn(1)
    compiling = time.perf_counter() - began  # with one step
    measured = timed(turn, steps)
    used = torch.cuda.max_memory_allocated() if device == "cuda" else 0
    return {"compile": compiling, "bytes": used, **measured}


def timed(turn, steps: int) -> dict:
    """Seconds of a step, the median of three turns of `steps`; and the last loss."""
    turn(2)
    seconds = []
    for _ in range(3):
        began = time.perf_counter()
        loss = turn(steps)
        seconds.append((time.perf_counter() - began) / steps)
    return {"seconds": statistics.median(seconds), "loss": loss}


def about(shape: Shape, job: dict, steps: int) -> dict:
    """The device and its peak."""
    import jax

    from jaxlm import flops, sharding

    del shape, job, steps
    device = jax.devices()[0]
    platform = sharding.platform(sharding.make_mesh(sharding.MeshSpec(), [device]))
    peak, source = flops.peak_flops(device, "bfloat16")
    said = f"{device.device_kind}, jax {jax.__version__}, dense bfloat16 peak {peak:.3g} ({source})"
    return {"about": said, "peak": peak, "platform": platform}


# Is each backend right on this device?


def equality(shape: Shape, job: dict, steps: int) -> dict:
    """For each dtype and options: is the backend right, and how far from the plain one?"""
    del steps
    results = []
    for dtype in ("bfloat16", "float32"):
        for options in ({}, {"window": 65, "soft_cap": 20.0}):
            if job["attention"] == "cudnn" and (options or dtype == "float32"):
                continue  # refused: see `attention.refusal`
            name = f"{job['attention']}, {dtype}{', window and cap' if options else ''}"
            try:
                results.append({"name": name, **errors(shape, job, dtype, options)})
            except Exception as error:  # of a kernel's compiler, say: the others still count
                results.append({"name": name, "failed": str(error).strip().split("\n")[0][:200]})
    return {"results": results}


def errors(shape: Shape, job: dict, dtype: str, options: dict) -> dict:
    """Largest error of output and gradients, relative to the plain backend's in float32; and of
    packed documents to the same documents alone."""
    import jax
    import numpy as np

    from jaxlm.models import attention

    K = shape.width // shape.heads
    L = min(shape.length, 1024) - 24  # no multiple of any tile
    packed = job["documents"] > 1
    needs = attention.Needs(packed=packed, dtype=dtype, head_width=K, **options)
    name = attention.resolve(job["attention"], job["platform"], needs)
    keys = jax.random.split(jax.random.key(0), 4)
    heads = shape.heads, shape.kv_heads, shape.kv_heads, shape.heads
    arrays = [
        jax.random.normal(key, (2, L, count, K)).astype(dtype)
        for key, count in zip(keys, heads, strict=True)
    ]
    ends = [0, L // 2, L // 2 + 9, L] if packed else [0, L]
    places = np.zeros((2, 2, L), np.int32)
    for number, (start, end) in enumerate(itertools.pairwise(ends), 1):
        places[0, :, start:end] = number
        places[1, :, start:end] = np.arange(end - start)

    @functools.partial(jax.jit, static_argnames="backend")
    def results(arrays, segments, positions, backend):
        fn = functools.partial(
            attention.attention,
            segments_BL=segments,
            positions_BL=positions,
            backend=backend,
            **options,
        )
        out, pull = jax.vjp(fn, *arrays[:3])
        return out, *pull(arrays[3])

    def error(ours, others):
        far = lambda a, b: np.abs(a - b).max() / max(np.abs(b).max(), 1e-30)
        as_float = lambda xs: [np.asarray(x, np.float32) for x in xs]
        pairs = zip(as_float(ours), as_float(others), strict=True)
        return max(float(far(a, b)) for a, b in pairs)

    ours = results(arrays, *places, name)
    with jax.default_matmul_precision("highest"):
        exact = results([x.astype("float32") for x in arrays], *places, "xla")
    alone = 0.0  # error against each document by itself
    for start, end in itertools.pairwise(ends):
        cut = lambda xs, run=slice(start, end): [x[:, run] for x in xs]
        by_itself = results(cut(arrays), *(p[:, start:end] for p in places), name)
        alone = max(alone, error(cut(ours), by_itself))
    limit = 2e-2 if dtype == "bfloat16" else 1e-4
    far = error(ours, exact)
    return {"error": far, "packed": alone, "pass": far < limit and alone < limit}


def tiles(shape: Shape, job: dict, steps: int) -> dict:
    """Milliseconds of flash, forward and backward, by its tiles."""
    import jax
    import jax.numpy as jnp

    from jaxlm.models.attention_gpu import Tiles, flash

    L, K = shape.length, shape.width // shape.heads
    heads = shape.heads, shape.kv_heads, shape.kv_heads
    arrays = [jnp.ones((shape.batch, L, count, K), "bfloat16") for count in heads]
    place = jnp.broadcast_to(jnp.arange(L), (shape.batch, L))
    fn = functools.partial(
        flash,
        segments_BL=jnp.ones_like(place),
        positions_BL=place,
        window=0,
        soft_cap=0.0,
        interpret=job["interpret"],
        **{kernel: Tiles(*sizes) for kernel, sizes in job["tiles"].items()},
    )
    loss = lambda *arrays: fn(*arrays).astype(jnp.float32).sum()
    found = {}
    for name, program in (
        ("forward", jax.jit(fn)),
        ("both", jax.jit(jax.grad(loss, argnums=(0, 1, 2)))),
    ):
        jax.block_until_ready(program(*arrays))
        turn = lambda count, program=program: [program(*arrays) for _ in range(count)]
        began = time.perf_counter()
        jax.block_until_ready(turn(steps))
        found[name] = 1e3 * (time.perf_counter() - began) / steps
    return found


WORK = {
    "ours": our_step,
    "torch": torch_step,
    "about": about,
    "equality": equality,
    "tiles": tiles,
}


def run(job: dict, args, python: str = sys.executable) -> dict:
    """What a job measured in a process of its own, or {"failed": why}."""
    command = [python, __file__, f"--worker={json.dumps(job)}", f"--shape={args.shape}"]
    command += [f"--steps={args.steps}", f"--batch={args.batch}"]
    gpu_memory.use()
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=args.limit)
    except subprocess.TimeoutExpired:
        return {"failed": f"took more than {args.limit} s"}
    lines = [line for line in done.stdout.splitlines() if line.startswith("{")]
    if done.returncode == 0 and lines:
        return json.loads(lines[-1])
    said = [line for line in done.stderr.splitlines() if line.strip()] or ["nothing"]
    errors = [line for line in said if "Error" in line or "RESOURCE_EXHAUSTED" in line]
    return {"failed": (errors or said)[-1].strip()[:300]}


def steps_to_time(args, platform: str) -> dict[str, tuple[dict, str]]:
    """Name -> job and the Python that runs it."""
    jobs = {}
    backends = {
        "gpu": [("cudnn", 1), ("flash", 1), ("flash", DOCUMENTS), ("xla", DOCUMENTS)],
        "cpu": [("cpu_blocks", DOCUMENTS), ("flash_interpreted", DOCUMENTS), ("xla", DOCUMENTS)],
        "tpu": [("splash", DOCUMENTS), ("xla", DOCUMENTS)],
    }[platform]
    for scan in ("off", "on"):
        for backend, documents in backends:
            if not wanted(args, [backend]):
                continue
            name = f"{backend}{', one document' if documents == 1 else ''}"
            name += ", scanned" if scan == "on" else ""
            job = {"kind": "ours", "attention": backend, "scan": scan, "documents": documents}
            jobs[name] = job, sys.executable
    if args.torch:
        for name, autocast in (("torch autocast", True), ("torch bfloat16", False)):
            for checkpoint in (False, True):
                job = {"kind": "torch", "autocast": autocast, "checkpoint": checkpoint}
                job["compile"] = not args.eager
                jobs[name + (", checkpointed" if checkpoint else "")] = job, args.torch
    return jobs


def print_steps(args, platform: str, peak: float) -> bool:
    """The table of steps; the ratio is to the fastest of torch's so far, so these come first."""
    shape = chosen(args)
    jobs = steps_to_time(args, platform)
    order = sorted(jobs, key=lambda name: not name.startswith("torch"))
    need, tokens = model_flops(shape), shape.batch * shape.length
    print(f"\n{'':32}{'MFU %':>7}{'tokens/s':>11}{'ms/step':>10}{'GB':>8}{'compile s':>11}  ratio")
    best, worked = 0.0, True
    for name in order:
        job, python = jobs[name]
        found = run(job, args, python)
        if "failed" in found:
            worked = False
            print(f"{name:32}failed: {found['failed']}", flush=True)
            continue
        rate = tokens / found["seconds"]
        best = max(best, rate) if name.startswith("torch") else best
        ratio = f"{rate / best:7.2f}" if best else "      -"
        mfu = 100 * need / found["seconds"] / peak
        line = f"{name:32}{mfu:7.1f}{rate:11,.0f}{1e3 * found['seconds']:10.1f}"
        line += f"{found['bytes'] / 1e9:8.1f}{found['compile']:11.1f}{ratio}"
        print(f"{line}  loss {found['loss']:.3f}", flush=True)
    return worked


def print_equality(args, platform: str) -> bool:
    """Pass or fail of each backend, plain and with window and cap, in both types."""
    backends = {
        "gpu": ["flash", "cudnn", "xla"],
        "cpu": ["cpu_blocks", "flash_interpreted", "splash_interpreted", "xla"],
        "tpu": ["splash", "xla"],
    }[platform]
    print(f"\n{'attention: relative error':40}{'to plain':>10}{'to alone':>10}")
    right = True
    for backend in wanted(args, backends):
        job = {"kind": "equality", "attention": backend, "platform": platform}
        job["documents"] = 1 if backend == "cudnn" else DOCUMENTS
        found = run(job, args)
        for one in found.get("results", [{"name": backend, **found}]):
            right = right and one.get("pass", False)
            if "failed" in one:
                print(f"{one['name']:40}  FAIL: {one['failed']}", flush=True)
            else:
                line = f"{one['name']:40}{one['error']:10.1e}{one['packed']:10.1e}"
                print(f"{line}  {'pass' if one['pass'] else 'FAIL'}", flush=True)
    return right


def print_tiles(args, platform: str) -> bool:
    """Times of flash by the tiles of one of its kernels at a time, the others as they are."""
    choices = {
        "forward": [(128, 64, 3), (128, 128, 2), (64, 64, 3), (128, 32, 4), (64, 128, 3)],
        "keys": [(128, 32, 3), (64, 64, 3), (64, 32, 4), (128, 64, 2), (32, 64, 3)],
        "queries": [(128, 32, 3), (64, 64, 3), (64, 32, 4), (128, 64, 2), (32, 64, 3)],
    }
    print(f"\n{'tiles (held, walked, stages)':40}{'forward ms':>12}{'both ms':>10}")
    for kernel, sizes in choices.items():
        for size in sizes:
            job = {"kind": "tiles", "tiles": {kernel: size}, "interpret": platform == "cpu"}
            found = run(job, args)
            name = f"{kernel} {size}"
            if "failed" in found:
                print(f"{name:40}failed: {found['failed']}", flush=True)
            else:
                print(f"{name:40}{found['forward']:12.3f}{found['both']:10.3f}", flush=True)
    return True


def wanted(args, backends: list[str]) -> list[str]:
    named = args.backends.split(",") if args.backends else backends
    return [backend for backend in backends if backend in named]


def chosen(args) -> Shape:
    shape = SHAPES[args.shape]
    return dataclasses.replace(shape, batch=args.batch or shape.batch)


def main(argv=None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--shape", choices=SHAPES, default="1b")
    parser.add_argument("--batch", type=int, default=0, help="rows; 0 = the shape's")
    parser.add_argument("--steps", type=int, default=10, help="of a turn; three turns are timed")
    parser.add_argument("--torch", default="", help="a Python that has torch and transformers")
    parser.add_argument("--eager", action="store_true", help="torch without torch.compile")
    parser.add_argument("--only", default="equality,steps", help="of equality, steps, tiles")
    parser.add_argument("--backends", default="", help="of attention; '' = all that run here")
    parser.add_argument("--limit", type=int, default=900, help="seconds for one contestant")
    parser.add_argument("--worker", default="", help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.worker:
        job = json.loads(args.worker)
        print(json.dumps(WORK[job["kind"]](chosen(args), job, args.steps)), flush=True)
        return 0
    here = run({"kind": "about"}, args)
    if "failed" in here:
        raise SystemExit(f"JAX finds no device: {here['failed']}")
    print(f"{here['about']}\n{args.shape}: {chosen(args)}", flush=True)
    if here["platform"] == "cpu" and args.shape != "toy":
        print("There is no GPU here, so nothing was measured; --shape=toy runs on a CPU.")
        return 0
    good = True
    if "equality" in args.only:
        good = print_equality(args, here["platform"])
    if "tiles" in args.only:
        good = print_tiles(args, here["platform"]) and good
    if "steps" in args.only:
        good = print_steps(args, here["platform"], here["peak"]) and good
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
