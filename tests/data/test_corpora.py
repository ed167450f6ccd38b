"""The built-in corpora: what is in them, and that held-out text is new to the model."""

import re

import pytest

from jaxlm.data import corpora, repeats
from jaxlm.data.documents import Document, content_hash, is_held_out

SHARE = 0.045
WORDS = re.compile(r"\w+|[^\w\s]")
LENGTH = 20  # words and signs of an n-gram; shorter ones repeat in all code


@pytest.fixture(scope="module")
def both():
    return corpora.load(SHARE)


def side(documents, split):
    return [document for document in documents if document.split == split]


@pytest.mark.slow
def test_sizes(both):
    code, prose = both["stdlib-code"], both["stdlib-prose"]
    assert sum(len(document.text) for document in code) > 6e6
    assert sum(len(document.text) for document in prose) > 1.5e6
    for documents in (code, prose):
        held = side(documents, "held_out")
        assert 0.01 < len(held) / len(documents) < 0.09
        assert len(held) + len(side(documents, "train")) == len(documents)
        assert min(len(document.text) for document in documents) >= corpora.SHORTEST
        assert len({document.name for document in documents}) == len(documents)


@pytest.mark.slow
def test_code_is_library_code(both):
    names = [document.name for document in both["stdlib-code"]]
    assert {"json/decoder.py", "typing.py", "email/message.py"} < set(names)
    for left_out in (
        "idle_test/",
        "tests/",
        "site-packages",
        "ensurepip",
        "encodings/",
        "_sysconfig",
    ):
        assert not [name for name in names if left_out in name]
    assert "stringprep.py" not in names
    assert "pydoc_data/topics.py" not in names


@pytest.mark.slow
def test_prose_has_its_four_parts(both):
    names = [document.name for document in both["stdlib-prose"]]
    for part in ("topics/", "packages/", "extensions/"):
        assert [name for name in names if name.startswith(part)]
    assert "json/decoder.py docstrings" in names or "json/encoder.py docstrings" in names


@pytest.mark.slow
def test_a_docstring_takes_the_split_of_its_module(both):
    split = {document.name: document.split for document in both["stdlib-code"]}
    checked = 0
    for document in both["stdlib-prose"]:
        if document.name.endswith(" docstrings"):
            assert document.split == split[document.name.removesuffix(" docstrings")]
            checked += 1
    assert checked > 100


def grams(text: str) -> set[int]:
    words = WORDS.findall(text)
    return {hash(tuple(words[i : i + LENGTH])) for i in range(len(words) - LENGTH + 1)}


def overlap(held: list[Document], train: list[Document]) -> float:
    """Share of the held-out n-grams that training text has too."""
    wanted = set().union(*(grams(document.text) for document in held))
    found = set()
    for document in train:
        found |= wanted & grams(document.text)
    return len(found) / len(wanted)


@pytest.mark.slow
def test_held_out_text_is_new_to_the_model(both):
    """Held out shares under 2 % of its 20-word runs with all training text of both corpora.

    The yardstick: a plain split by the hash of each document, docstrings apart from their module
    and copied siblings kept, shares 10 to 25 %.
    """
    every = [*both["stdlib-code"], *both["stdlib-prose"]]
    ours = overlap(side(every, "held_out"), side(every, "train"))
    plain = [[], []]
    for document in every:
        plain[is_held_out(content_hash(document.text), SHARE)].append(document)
    yardstick = overlap(plain[True], plain[False])
    print(f"held-out overlap {ours:.2%}, of a plain split {yardstick:.2%}")
    assert ours < 0.02
    assert yardstick > 4 * ours


def test_copied_siblings_are_never_held_out():
    line = "a line that is certainly long enough {}\n"
    original = Document("a.py", "".join(line.format(i) for i in range(20)))
    copy = Document("b.py", original.text + "# and a last line of its own\n")
    others = [Document(f"{i}.py", f"something else altogether {i}\n" * 5) for i in range(40)]
    groups = {content_hash(d.text): [d] for d in (original, copy, *others)}
    held = repeats.held_out_groups(groups, 0.9)
    names = {groups[key][0].name for key in held}
    assert names <= {document.name for document in others}
    assert len(names) == 38  # 0.9 of 42
    assert repeats.held_out_groups(groups, 0.0) == set()
    smallest = sorted(key for key in groups if groups[key][0].name not in ("a.py", "b.py"))
    assert repeats.held_out_groups(groups, 0.1) == set(smallest[:5])


def test_repeated_prose_is_dropped():
    long = "".join(f"sentence number {i} of a long text\n" for i in range(30))
    part = "".join(f"sentence number {i} of a long text\n" for i in range(10, 20))
    kept, dropped = repeats.without_repeats(
        [
            Document("long", long),
            Document("part", part),
            Document("new", "entirely new words here\n"),
        ]
    )
    assert [document.name for document in kept] == ["long", "new"]
    assert dropped == 1


def test_docstrings_come_in_order_and_from_everywhere():
    module = '"""Module."""\nif True:\n    def f():\n        """F."""\n' + (
        'class C:\n    """C."""\n    async def g(self):\n        """G."""\n'
        'try:\n    x = 1\nexcept ValueError:\n    def h():\n        """H."""\n'
    )
    assert corpora.docstrings(module) == "Module.\n\nF.\n\nC.\n\nG.\n\nH.\n"
    assert corpora.docstrings("def broken(:\n") == ""


def test_fingerprint_is_quick_and_stable():
    assert corpora.fingerprint() == corpora.fingerprint()
    assert len(corpora.fingerprint()) > 300
