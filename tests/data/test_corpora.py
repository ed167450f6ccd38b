"""The built-in corpora: what is in them, and that held-out text is new to the model."""

import re

import pytest

from jaxlm.data import corpora
from jaxlm.data.documents import Document, content_hash, is_held_out

SHARE = 0.045
WORDS = re.compile(r"\w+|[^\w\s]")
LENGTH = 20  # words and signs of an n-gram; shorter ones repeat in all code


@pytest.fixture(scope="module")
def both():
    return corpora.load(SHARE)


def side(documents, split):
    return [document for document in documents if document.split == split]


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


def test_prose_has_its_four_parts(both):
    names = [document.name for document in both["stdlib-prose"]]
    for part in ("topics/", "packages/", "extensions/"):
        assert [name for name in names if name.startswith(part)]
    assert "json/decoder.py docstrings" in names or "json/encoder.py docstrings" in names


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

    The yardsticks: the same documents, had each docstring been split by itself, share far more;
    and as much as that is what training modules share among themselves.
    """
    every = [*both["stdlib-code"], *both["stdlib-prose"]]
    held, train = side(every, "held_out"), side(every, "train")
    ours = overlap(held, train)
    alone = [d for d in every if is_held_out(content_hash(d.text), SHARE)]
    rest = [d for d in every if not is_held_out(content_hash(d.text), SHARE)]
    leaky = overlap(alone, rest)
    print(f"held-out overlap {ours:.2%}, with docstrings split on their own {leaky:.2%}")
    assert ours < 0.02
    assert leaky > 4 * ours


def test_a_copied_sibling_goes_back_to_training():
    line = "a line that is certainly long enough {}\n"
    original = Document("a.py", "".join(line.format(i) for i in range(20)))
    texts = {}
    for i in range(
        4000
    ):  # find one copy that the hash would hold out, and an original it would not
        copy = Document("b.py", original.text + f"# {i}\n")
        if is_held_out(content_hash(copy.text), SHARE):
            texts = {content_hash(d.text): [d] for d in (original, copy)}
            break
    other = next(
        Document("c.py", f"something else altogether {i}\n" * 5)
        for i in range(4000)
        if is_held_out(content_hash(f"something else altogether {i}\n" * 5), SHARE)
    )
    texts[content_hash(other.text)] = [other]
    assert not is_held_out(content_hash(original.text), SHARE)
    assert corpora.held_out_groups(texts, SHARE) == {content_hash(other.text)}


def test_repeated_prose_is_dropped():
    long = "".join(f"sentence number {i} of a long text\n" for i in range(30))
    part = "".join(f"sentence number {i} of a long text\n" for i in range(10, 20))
    kept, dropped = corpora.without_repeats(
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
