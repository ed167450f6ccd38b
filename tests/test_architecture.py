"""Imports point down only; and what else a reader may rely on in every file."""

import ast
import pathlib

import pytest

ROOT = pathlib.Path(__file__).parents[1]
BASE = {"contract", "files", "host", "sharding", "specs"}
TOP = {
    *(
        "commandline",
        "config",
        "build",
        "step",
        "checkpoint",
        "metrics",
        "flops",
        "journal",
        "folder",
    ),
    *("observe", "summary", "report", "methods", "models", "optim", "data", "evals", "generate"),
    *("goodput", "profile", "hf", "params", "stored", "fingerprint", "figures"),
}
# room -> the rooms it may import from, itself included
MAY_IMPORT = {
    "contract": set(),
    "host": {"host"},
    "files": set(),
    "sharding": {"contract"},
    "checkpoint": {"checkpoint", "contract", "files", "host"},
    "params": {"checkpoint", "contract", "host", "models.lora", "models.quantized"},
    "hf": {"hf", "params", "models", "checkpoint", "contract", "files"},
    "stored": {"config", "data", "hf", "models", "params", "specs"},
    "fingerprint": {"checkpoint", "params"},
    "metrics": {"contract"},
    "chips": set(),
    "flops": {"contract", "chips"},
    "step": {"contract"},
    "goodput": set(),
    "profile": set(),
    "report": {"report", "goodput"},
    "models": {"models", "contract", "sharding", "flops"},
    "optim": {"optim", "contract", "sharding"},
    "data": {"data", "contract", "sharding"},
    "methods": {
        *("contract", "sharding", "methods.likelihood", "methods.responses"),
        *("models.lora", "models.quantized"),
    },
    "evals": {"evals", "contract", "sharding", "generate", "data", "methods.likelihood"},
    "generate": {
        *("generate", "contract", "sharding", "data.tokenizer", "data.chat", "data.examples"),
    },
    "commandline": {"config", "methods", "specs"},
    "recipe": set(),
    "specs": {"contract", "sharding", "models", "optim", "data"},
    "figures": {"contract", "data", "specs"},
    "config": {
        *("contract", "sharding", "methods", "models", "optim", "data", "hf", "recipe", "specs"),
        *("figures", "files"),
    },
    "build": {
        *("abstract", "chips", "contract", "sharding", "checkpoint", "params", "hf", "models"),
        *("optim", "step", "flops", "stored", "specs"),
    },
    "opened": {"chips", "contract", "data", "hf", "host", "models", "sharding", "stored"},
    "journal": {"host", "metrics"},
    "folder": {"config", "files", "models", "host", "data", "hf", "specs"},
    "together": {"config", "data", "folder", "host", "specs"},
    "restarts": {"checkpoint", "folder", "host", "specs"},
    "tasks": {"build", "evals", "host", "specs"},
    "observe": BASE | TOP | {"tasks"},
    "summary": BASE | TOP,
    "abstract": {"contract", "optim", "sharding", "specs", "step"},
    "start": {"build", "data", "figures", "hf", "specs", "step", "stored"},
    "resume": {"build", "checkpoint", "contract", "data", "fingerprint", "host", "step"},
    "columns": {"build", "checkpoint", "data", "files", "fingerprint", "host", "sharding"},
    "train": BASE | TOP | {"columns", "restarts", "resume", "start", "tasks", "together"},
    "convert": BASE | TOP,
    "plan": BASE | TOP | {"plan", "chips"},
    "openflags": {"host", "models", "opened", "stored"},
    "generate.__main__": BASE | TOP | {"openflags"},
    "evaluate": BASE | TOP | {"evaluate", "opened", "openflags"},
    "studies": BASE | TOP | {"studies", "train"},
}
FILES = sorted((ROOT / "jaxlm").rglob("*.py"))


def room(module: str) -> str:
    """jaxlm.data.mix -> data, but for the modules that the table names in full."""
    inner = module.removeprefix("jaxlm.")
    return inner if inner in MAY_IMPORT else inner.split(".")[0]


def imports(path: pathlib.Path):
    """Our own modules that a file imports, those inside functions too."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (a.name for a in node.names if a.name.startswith("jaxlm"))
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            if node.module == "jaxlm":
                yield from (f"jaxlm.{a.name}" for a in node.names if a.name != "__version__")
            elif (node.module or "").startswith("jaxlm."):
                yield node.module


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_imports_point_down(path):
    module = ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
    if module == "jaxlm":
        assert not list(imports(path))
        return
    here = room(module)
    assert here in MAY_IMPORT, f"{module} has no row in the table"
    for found in imports(path):
        name = found.removeprefix("jaxlm.")
        allowed = MAY_IMPORT[here]
        ok = name in allowed or room(found) in allowed or module.startswith(found)
        if here == "methods" and not module.endswith("methods"):
            ok = name in allowed  # a method never imports another
        if module == "jaxlm.methods":
            ok = True  # the register
        assert ok, f"{module} imports {found}"


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_every_file_says_what_it_is(path):
    tree = ast.parse(path.read_text())
    assert not tree.body or ast.get_docstring(tree), "a file opens with what it is"


def test_the_loop_names_no_method():
    names = {p.stem for p in (ROOT / "jaxlm" / "methods").glob("*.py")} - {
        "__init__",
        "likelihood",
        "responses",
    }
    for file in ("step", "train", "resume", "build", "observe", "journal", "checkpoint/__init__"):
        tree = ast.parse((ROOT / "jaxlm" / f"{file}.py").read_text())
        used = {n.id for n in ast.walk(tree) if isinstance(n, ast.Name)}
        used |= {n.attr for n in ast.walk(tree) if isinstance(n, ast.Attribute)}
        assert not used & names, f"{file} names {used & names}"


def test_platform_is_asked_of_the_mesh():
    for path in FILES:
        assert "default_backend(" not in path.read_text(), f"{path}: ask the mesh's devices"


def test_no_pickle_no_remote_code_no_tensorflow():
    for path in FILES:
        text = path.read_text()
        assert "trust_remote_code=True" not in text, path
        for node in ast.walk(ast.parse(text)):
            names = [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            names += [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            found = {name.split(".")[0] for name in names}
            assert not found & {"pickle", "cloudpickle", "tensorflow", "clu", "torch"}, path
