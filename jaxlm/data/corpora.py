# ruff: noqa: SIM905  (lists of names read better as text)
"""The built-in corpora, read from this Python itself: no network, no data to ship.

stdlib-code   the modules of the standard library, one document a file, without tests, vendored
              packages, generated tables and fragments
stdlib-prose  the language reference that pydoc carries, the docstrings of each of those modules,
              the docstrings of the extension modules, and the long descriptions of a fixed list of
              packages that jaxlm itself requires (installing another one changes nothing)

Held out are whole groups, by the hash of their text: a module and its docstrings go together. A
document that another group has a part of (a sibling that was written by copying) is never held out,
so that what is held out is new to the model (`repeats`).
"""

import ast
import functools
import importlib
import importlib.metadata
import inspect
import os
import pathlib
import sys
import sysconfig
import warnings
from collections.abc import Iterator

from jaxlm.data.documents import Document, Progress, Tally, content_hash
from jaxlm.data.repeats import held_out_groups, without_repeats

SHORTEST = 200  # characters; what is shorter is a fragment

# Folders and files of the standard library that are not somebody's hand-written library code.
_NOT_LIBRARY = frozenset(
    """test tests idle_test ctypes_test site-packages dist-packages __pycache__ ensurepip _vendor
    lib-dynload encodings pydoc_data __phello__ stringprep.py __hello__.py""".split()
)
_GENERATED = ("_sysconfigdata", "config-")

_EXTENSIONS = """builtins posix _io _socket _decimal _pickle _curses sys time _thread _ast math
_asyncio itertools _ssl _csv array _sqlite3 _signal _datetime _hashlib _struct gc _lzma fcntl zlib
select mmap _collections _functools _operator _random unicodedata _bisect _heapq _json _elementtree
_zoneinfo marshal atexit faulthandler _codecs _weakref cmath binascii _bz2 pyexpat resource termios
syslog grp pwd errno _posixsubprocess _tracemalloc _warnings _contextvars _symtable _locale
_multiprocessing _queue _opcode _statistics _typing _imp _abc _string _stat""".split()

_PACKAGES = """absl-py array_record attrs click etils flax fsspec grain huggingface_hub idna
importlib_resources jax jaxlib matplotlib ml-collections ml_dtypes msgpack numpy opt_einsum optax
orbax-checkpoint packaging pillow psutil pyarrow pyparsing python-dateutil PyYAML regex requests
safetensors scipy tensorboardX tensorflow-datasets tokenizers tqdm transformers urllib3""".split()


def _library() -> pathlib.Path:
    return pathlib.Path(sysconfig.get_paths()["stdlib"])


@functools.cache
def _module_files() -> tuple[pathlib.Path, ...]:
    found = []
    for folder, folders, names in os.walk(_library()):
        folders[:] = [f for f in folders if f not in _NOT_LIBRARY and not f.startswith(_GENERATED)]
        found += [
            pathlib.Path(folder, name)
            for name in names
            if name.endswith(".py") and name not in _NOT_LIBRARY and not name.startswith(_GENERATED)
        ]
    return tuple(sorted(found))


@functools.cache
def _packages() -> tuple[importlib.metadata.Distribution, ...]:
    found = []
    for name in _PACKAGES:
        try:
            found.append(importlib.metadata.distribution(name))
        except importlib.metadata.PackageNotFoundError:
            continue
    return tuple(found)


def fingerprint() -> list:
    """What the corpora depend on, quickly: this Python, its files, the packages' versions."""
    versions = [(package.name, package.version) for package in _packages()]
    return [sys.version, *versions, *_module_files()]


def rows(
    name: str, share: float, tally: Tally, progress: Progress | None = None
) -> Iterator[Document]:
    """The documents of one corpus, `split` set."""
    documents = load(share, progress)[name]
    tally.rows += len(documents)
    tally.duplicates += _repeated(share)[name]
    yield from documents


def load(share: float, progress: Progress | None = None) -> dict[str, list[Document]]:
    """Both corpora, with `share` of the groups held out; built once a process."""
    return _load(share, progress or _silent)[0]


def _repeated(share: float) -> dict[str, int]:
    return _load(share, _silent)[1]


def _silent(done: int, total: int, note: str) -> None:
    del done, total, note


_loaded: dict[float, tuple[dict[str, list[Document]], dict[str, int]]] = {}


def _load(share, progress):
    if share not in _loaded:
        code = list(_code(progress))
        texts = {document.name: document.text for document in code}
        prose, repeated = without_repeats(list(_prose(code, progress)))
        groups = _groups(code, prose, texts)
        held = held_out_groups(groups, share)
        _loaded[share] = (
            {
                "stdlib-code": _split(code, held, texts),
                "stdlib-prose": _split(prose, held, texts),
            },
            {"stdlib-code": 0, "stdlib-prose": repeated},
        )
    return _loaded[share]


def _group_of(document: Document, texts: dict[str, str]) -> int:
    """The hash that decides a document's split: of its module where it has one."""
    module = document.name.removesuffix(" docstrings")
    return content_hash(texts.get(module, document.text))


def _groups(code, prose, texts) -> dict[int, list[Document]]:
    groups: dict[int, list[Document]] = {}
    for document in (*code, *prose):
        groups.setdefault(_group_of(document, texts), []).append(document)
    return groups


def _split(documents, held, texts) -> list[Document]:
    return [
        document._replace(split="held_out" if _group_of(document, texts) in held else "train")
        for document in documents
    ]


def _code(progress: Progress) -> Iterator[Document]:
    files = _module_files()
    for done, path in enumerate(files):
        if done % 20 == 0:
            progress(done, len(files), "reading the standard library")
        text = path.read_bytes().decode("utf-8", "replace").replace("\r\n", "\n")
        if len(text) >= SHORTEST:
            yield Document(path.relative_to(_library()).as_posix(), text)


def _prose(code: list[Document], progress: Progress) -> Iterator[Document]:
    """Longest first where one text may contain another."""
    parts = [*sorted(_topics(), key=lambda d: (-len(d.text), d.name)), *_descriptions()]
    for done, module in enumerate(code):
        if done % 10 == 0:
            progress(done, len(code), "collecting docstrings")
        parts.append(Document(f"{module.name} docstrings", docstrings(module.text)))
    parts += _extension_docstrings()
    return (part for part in parts if len(part.text) >= SHORTEST)


def _topics() -> Iterator[Document]:
    from pydoc_data.topics import topics

    for name, text in sorted(topics.items()):
        yield Document(f"topics/{name}", text.strip() + "\n")


def _descriptions() -> Iterator[Document]:
    for package in _packages():
        body = package.metadata.json.get("description", "")
        yield Document(f"packages/{package.name}", str(body).replace("\r\n", "\n").strip() + "\n")


def docstrings(module: str) -> str:
    """All docstrings of a module's source, in order, a blank line between."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # invalid escapes in old modules
        try:
            tree = ast.parse(module)
        except SyntaxError:
            return ""
    found, pending = [], [tree]
    while pending:
        node = pending.pop()
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            found.append(ast.get_docstring(node) or "")
        for field in ("handlers", "finalbody", "orelse", "body"):
            pending.extend(reversed(getattr(node, field, ()) or ()))
    return "".join(f"{text.strip()}\n\n" for text in found if text.strip()).removesuffix("\n")


def _extension_docstrings() -> Iterator[Document]:
    for name in sorted(_EXTENSIONS):
        try:
            module = importlib.import_module(name)
        except ImportError:
            continue
        texts = list(dict.fromkeys(_documented(module)))
        yield Document(f"extensions/{name}", "\n\n".join(t for t in texts if t) + "\n")


def _documented(thing, depth: int = 0) -> Iterator[str]:
    """The docstrings of a module, of its functions and classes, and of their methods."""
    text = getattr(thing, "__doc__", None)
    yield inspect.cleandoc(text) if isinstance(text, str) else ""
    if depth < 2 and (inspect.ismodule(thing) or inspect.isclass(thing)):
        for name, member in sorted(vars(thing).items()):
            if not name.startswith("__") and (
                callable(member) or inspect.isgetsetdescriptor(member)
            ):
                yield from _documented(member, depth + 1)
