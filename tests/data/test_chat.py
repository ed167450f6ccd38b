"""Loss falls on responses and on what ends them, whatever the template; nothing leaks in a row."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conversations import (
    BARE,
    CHATML,
    LOOKING_BACK,
    STRICT,
    SYSTEMLESS,
    THINKING,
    TRIMMED,
    UNASKED,
    tokenizer_of,
    turns,
    write_rows,
)
from toy import toy

from jaxlm.data import chat, conversations, tokenizer
from jaxlm.data.batches import batches
from jaxlm.data.documents import Document, Tally
from jaxlm.data.examples import Malformed
from jaxlm.data.prepare import prepare
from jaxlm.data.sources import SourceSpec
from jaxlm.data.spec import DataSpec
from jaxlm.methods.next_token import next_token
from jaxlm.observe import first_question

SAID = turns("Hello there", "hello you\n ", "And für 日本?", "  x🎉 <b> ")


def template_of(folder, text, kind="byte", **keys):
    tokens, folder = tokenizer_of(folder, kind)
    return chat.Template(text, tokens, folder, **keys)


def shown(template, found):
    """The text of the learned tokens, special ones included, a bar between the responses."""
    parts, before = [], False
    for i, kept in zip(found.ids, found.answer, strict=True):
        if kept and not before:
            parts.append([])
        if kept:
            parts[-1].append(i)
        before = kept
    decode = lambda ids: template._backend.decode(ids, skip_special_tokens=False)
    return [decode(part) for part in parts]


@pytest.mark.parametrize("kind", ["byte", "bpe"])
@pytest.mark.parametrize(
    ("text", "learned"),
    [
        (CHATML, ["hello you\n <|im_end|>", "  x🎉 <b> <|im_end|>"]),
        (TRIMMED, ["hello you<|im_end|>", "x🎉 <b><|im_end|>"]),
        (chat.PLAIN, ["hello you\n <|eos|>", "  x🎉 <b> <|eos|>"]),
        (BARE, ["hello you\n \n", "  x🎉 <b> \n<|eos|>"]),
        (THINKING, ["hello you\n <|im_end|>", "hm.   x🎉 <b> <|im_end|>"]),
        (UNASKED, ["assistant: hello you\n <|eos|>", "assistant:   x🎉 <b> <|eos|>"]),
    ],
)
def test_only_responses_and_their_ends_are_learned(tmp_path, kind, text, learned):
    template = template_of(tmp_path, text, kind)
    found = template.encode(SAID)
    assert shown(template, found) == learned
    whole = template._backend.decode(found.ids, skip_special_tokens=False)
    assert whole == template.render(SAID) + ("<|eos|>" if text == BARE else "")
    assert template.unended == (text == BARE)
    # A later answer alone, as in a preference after a longer conversation.
    assert shown(template, template.encode(SAID, 2)) == learned[1:]


@pytest.mark.parametrize("kind", ["byte", "bpe"])
def test_what_is_asked_is_what_the_answer_was_learned_after(tmp_path, kind):
    for text in (CHATML, chat.PLAIN, TRIMMED, BARE):
        template = template_of(tmp_path, text, kind)
        found = template.encode(SAID, 2)
        assert template.prompt(SAID[:3]) == found.ids[: found.answer.index(True)]
        learned = [i for i, kept in zip(found.ids, found.answer, strict=True) if kept]
        assert learned[-1] in template.stops


def test_special_tokens_are_parsed_and_counted(tmp_path):
    template = template_of(tmp_path, CHATML)
    end = template._backend.token_to_id("<|im_end|>")
    assert template.encode(turns("a", "b")).ids.count(end) == 2
    assert template.spelled == 0
    template.encode(turns("a <|im_end|>", "b"))
    assert template.spelled == 1


def test_a_token_never_joins_a_question_with_its_answer(tmp_path):
    """The BPE has a token for "::", which generation could not begin an answer with."""
    colons = ["a::b::c:: "] * 9
    tokens, folder = tokenizer_of(tmp_path, "bpe", colons)
    template = chat.Template("{% for m in messages %}{{ m.content }}{% endfor %}", tokens, folder)
    assert len(tokens.encode("::")) == 1
    found = template.encode(turns("a:", ":b"))
    assert template.joined == 1
    assert found.ids[: found.answer.index(True)] == template.prompt(turns("a:"))


def test_a_tokenizer_without_offsets_gives_the_same(tmp_path):
    template = template_of(tmp_path, CHATML)
    found = template.encode(SAID)

    class Slow:
        def __init__(self, backend):
            self.backend = backend

        def encode(self, text, add_special_tokens):
            return self.backend.encode(text, add_special_tokens=add_special_tokens).ids

    again = template_of(tmp_path, CHATML)
    added = again._added
    again.__dict__ |= {"_backend": Slow(template._backend), "_added": added}
    assert again.encode(SAID) == found


@pytest.mark.parametrize(
    ("text", "said", "why"),
    [
        (SYSTEMLESS, [{"role": "system", "content": "be kind"}, *SAID], "drops the text of a sys"),
        (
            SYSTEMLESS,
            [{"role": "system", "content": "be kind"}, *turns("Please be kind.", "be kind")],
            "drops the text of a sys",
        ),
        (STRICT, [*SAID[:1], *SAID], "refuses these messages: Roles must alternate!"),
        (LOOKING_BACK, SAID, "otherwise once it is answered"),
    ],
)
def test_what_a_template_cannot_carry_is_said(tmp_path, text, said, why):
    with pytest.raises(Malformed, match=why):
        template_of(tmp_path, text).encode(said)


def test_a_system_message_may_stand_with_the_last_question(tmp_path):
    moved = (
        "{% set asked = messages | selectattr('role', 'equalto', 'user') | list %}"
        "{% for m in messages if m.role != 'system' %}"
        "{% if m == asked[-1] %}{{ messages[0].content + ' ' }}{% endif %}"
        "{{ m.content + eos_token }}{% endfor %}"
    )
    said = [{"role": "system", "content": "Why not?"}, *turns("Who", "so", "Why", "so")]
    found = template_of(tmp_path, moved).encode(said, 4)
    assert sum(found.answer) == len("so") + 1


def test_a_question_is_asked_that_the_template_takes(tmp_path):
    template = template_of(tmp_path, STRICT)
    talks = [[*SAID[:1], *SAID], turns("q" * 50, "a"), turns("Why?", "so")]
    documents = [Document(str(i), json.dumps({"messages": m})) for i, m in enumerate(talks)]
    asked = first_question(documents, template, most=30)
    assert template.tokenizer.decode(asked) == "Why?"
    assert first_question(documents[:2], template, most=30) == []


def test_a_template_gives_the_same_on_any_day(tmp_path):
    dated = "{{ strftime_now('%d %b %Y') }}{% for m in messages %}{{ m.content }}{% endfor %}"
    assert template_of(tmp_path, dated).render(SAID[:1]).startswith("26 Jul 2024")
    today = template_of(tmp_path, dated, today=True).render(SAID[:1])
    assert not today.startswith("26 Jul 2024")


def test_where_a_template_comes_from(tmp_path):
    tokens, folder = tokenizer_of(tmp_path)
    found, note = chat.find("", tokens, folder)
    assert found.text == chat.PLAIN
    assert "has no chat template" in note
    assert chat.find("chatml", tokens, folder)[0].text == CHATML
    (tmp_path / "own.jinja").write_text(BARE)
    assert chat.find(str(tmp_path / "own.jinja"), tokens, folder)[0].text == BARE
    (folder / chat.FILE).write_text(UNASKED)
    assert chat.find("", tokens, folder)[0].text == UNASKED
    with pytest.raises(ValueError, match="is none of '', 'plain', 'chatml', and no file"):
        chat.find("chatty", tokens, folder)
    bytes_only = tmp_path / "bytes"
    tokenizer.save_byte(bytes_only)
    with pytest.raises(ValueError, match=r"needs the token <\|im_start\|>"):
        chat.find("chatml", tokenizer.load(bytes_only), bytes_only)


# ---------------------------------------------------------------- rows


def prepared(folder, rows, **keys):
    where = tokenizer_of(folder)[1]
    path = write_rows(folder / "chat.jsonl", rows)
    source = SourceSpec("talk", path, format="chat")
    options = {"tokenizer": str(where), "template": "chatml", "length": 64, "held_out": 0.0}
    return prepare(DataSpec((source,), **(options | keys)), folder / "cache")


def talks(count, seed=0):
    rng = np.random.default_rng(seed)
    word = lambda: "".join(chr(97 + c) for c in rng.integers(0, 26, rng.integers(1, 9)))
    return [
        {"messages": turns(f"{i}", *[word() for _ in range(1 + 2 * (i % 3 == 0))])}
        for i in range(count)
    ]


def test_rows_hold_whole_conversations(tmp_path):
    found = prepared(tmp_path, talks(40))
    rows = found.sources[0].rows
    batch = next(batches(found, rows=rows, position=0, seed=0, threads=0))
    start = found.tokenizer.vocabulary_size - 2
    texts = set()
    for b in range(rows):
        for segment in range(1, batch["segments"][b].max() + 1):
            here = batch["segments"][b] == segment
            ids = batch["tokens"][b][here]
            assert ids[0] == start
            assert batch["positions"][b][here].tolist() == list(range(here.sum()))
            texts.add(tuple(ids.tolist()))
    assert len(texts) == found.card["sources"]["talk"]["documents"] == 40
    assert batch["weights"].sum() == found.sources[0].tokens
    # Best fit leaves little room: the rows could not be fewer by more than one in five.
    used = (batch["segments"] > 0).sum()
    assert rows <= 1.25 * used / 64 + 1


@pytest.mark.slow
def test_a_conversation_learns_the_same_alone_and_packed(tmp_path):
    template = chat.find("chatml", *tokenizer_of(tmp_path))[0]
    make = conversations.Maker("chat", template, 64, "drop", Tally())
    named = [(str(i), {"messages": row["messages"]}) for i, row in enumerate(talks(6))]
    packed = make(named)
    alone = [make([one]) for one in named]
    assert len(packed.rows.tokens) < len(alone)
    lm = toy(V=260)
    params = lm.init(jax.random.key(0))

    def loss(made):
        dtype = np.dtype("<u2")
        stored = conversations.to_records(made, "chat", dtype)
        batch = conversations.to_batch(stored, "chat", 64, dtype, False)
        batch = jax.tree.map(jnp.asarray, batch)
        return next_token().objective(lm, params, {}, batch, None)[0]

    np.testing.assert_allclose(loss(packed), sum(map(loss, alone)), rtol=1e-5)


@pytest.mark.parametrize(("too_long", "kept"), [("drop", 2), ("start", 3), ("end", 2)])
def test_what_is_too_long_is_dropped_or_cut_and_counted(tmp_path, too_long, kept):
    rows = [{"prompt": q, "response": "fine"} for q in ("hi", "ho", "q" * 90)]
    found = prepared(tmp_path, rows, too_long=too_long)
    card = found.card["sources"]["talk"]
    assert card["documents"] == kept
    assert card["useless"] == ({"cut": 1} if too_long == "start" else {"too long": 1})
    assert any(("lost their start" if kept == 3 else "1 for too long") in n for n in found.notes)
    if too_long == "start":
        batch = next(batches(found, rows=found.sources[0].rows, position=0, seed=0, threads=0))
        assert batch["weights"].sum() == 3 * len("fine.")


def test_the_end_is_cut_where_the_response_is_long(tmp_path):
    found = prepared(tmp_path, [{"prompt": "hi", "response": "r" * 90}], too_long="end")
    batch = next(batches(found, rows=1, position=0, seed=0, threads=0))
    assert batch["segments"].all()
    assert found.card["sources"]["talk"]["useless"] == {"cut": 1}


def test_conversations_may_not_see_each_other():
    source = SourceSpec("talk", "x", format="chat")
    with pytest.raises(ValueError, match="'talk' holds conversations; set it False"):
        DataSpec((source,), attend_across_documents=True)


def test_a_replay_of_text_is_mixed_in(tmp_path):
    (tmp_path / "text").mkdir()
    (tmp_path / "text" / "a.txt").write_text("plain text " * 40)
    where = tokenizer_of(tmp_path)[1]
    sources = (
        SourceSpec("talk", write_rows(tmp_path / "chat.jsonl", talks(40)), format="chat"),
        SourceSpec("text", str(tmp_path / "text")),
    )
    spec = DataSpec(sources, tokenizer=str(where), length=64, held_out=0.0, template="chatml")
    found = prepare(spec, tmp_path / "cache")
    batch = next(batches(found, rows=8, position=0, seed=0, threads=0))
    share = [batch["weights"][batch["source"] == i].mean() for i in (0, 1)]
    assert share[0] < 0.7 < share[1]
    assert found.sources[1].format == "text"


def test_a_model_stops_where_its_template_ends_an_answer(tmp_path):
    tokens, folder = tokenizer_of(tmp_path)
    assert chat.stops(tokens, folder) == {tokens.eos}
    (folder / chat.FILE).write_text(CHATML)
    end = chat.Template(CHATML, tokens, folder)._backend.token_to_id("<|im_end|>")
    assert chat.stops(tokens, folder) == {tokens.eos, end}


def test_a_missing_library_is_no_fault_of_the_rows(tmp_path, monkeypatch):
    from transformers.utils import chat_template_utils

    def missing(**keys):
        raise ImportError("needs jinja2")

    monkeypatch.setattr(chat_template_utils, "render_jinja_template", missing)
    with pytest.raises(ValueError, match="cannot be rendered here: needs jinja2"):
        template_of(tmp_path, CHATML).render(SAID)
