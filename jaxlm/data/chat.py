"""Conversations as tokens: any chat template, and which tokens the model has to answer for.

A template is a text in Jinja, run in the sandbox of transformers; no code of a model's folder is
run. It comes from a file, from the tokenizer's folder, or is one of the two here. Its special
tokens are parsed as such, in the messages' texts too (that is how models are fed; `spelled` counts
it).

Where a response begins and ends is found by rendering: what the template makes of the messages
before it, with the assistant's turn opened, must be the beginning of the whole, and so must what it
makes of the messages up to it. Its tokens are told by the offsets of one tokenization of the whole;
where a token would straddle the beginning of a response, and for tokenizers without offsets, the
parts between are tokenized one by one, as generation does. The end of a response takes in the token
that ends a turn, which is where generation stops; a template that has none gets the tokenizer's eos
behind the last response.
"""

import functools
import hashlib
import itertools
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, cast

from jaxlm.data.examples import Malformed, Message
from jaxlm.data.tokenizer import Tokenizer, object_in

PLAIN = (
    "{{ bos_token }}{% for message in messages %}"
    "{% if message['role'] == 'assistant' %}"
    "{{ 'assistant:\\n' + message['content'] + eos_token + '\\n' }}"
    "{% else %}{{ message['role'] + ':\\n' + message['content'] + '\\n' }}{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}{{ 'assistant:\\n' }}{% endif %}"
)
CHATML = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
BUILT_IN = {"plain": PLAIN, "chatml": CHATML}
FILE = "chat_template.jinja"
# Templates that write the date would give other data every day.
DATED = "{%- macro strftime_now(format) -%}26 Jul 2024{%- endmacro -%}"


class Encoded(NamedTuple):
    """A conversation as tokens; 1 in `answer` = a token of a response, which is to be learned."""

    ids: list[int]
    answer: list[bool]


class Laid(NamedTuple):
    """A conversation as text, and where its responses stand in it."""

    text: str
    spans: list[tuple[int, int]]
    spelled: int  # messages whose text spells a special token


class Template:
    """Messages -> text -> tokens. Raises `ValueError` for a template that cannot be read.

    `today`: whether the template may write the date of today.
    """

    def __init__(self, text: str, tokenizer: Tokenizer, folder: pathlib.Path, today: bool = False):
        self.text, self.tokenizer, self.folder = text, tokenizer, folder
        self._source = text if today or "strftime_now" not in text else DATED + text
        self._special = specials(folder)
        self._names = {k: v for k, v in self._special.items() if isinstance(v, str)}
        self._last: tuple[Sequence[Message] | None, str] = None, ""
        self.spelled = 0  # messages whose text spells a special token
        self.joined = 0  # conversations with a token that would straddle a response's beginning
        self.unended = 0  # conversations that got an eos, since the template ends no response

    @functools.cached_property
    def _backend(self):
        return _parsing(self.tokenizer)

    @property
    def hash(self) -> str:
        return hashlib.sha256(repr((self.text, self._names)).encode()).hexdigest()

    def render(self, messages: Sequence[Mapping[str, Any]], ask: bool = False) -> str:
        """The text of a conversation; `ask`: with the assistant's turn opened behind it."""
        from transformers.utils.chat_template_utils import render_jinja_template

        try:
            rendered = render_jinja_template(
                conversations=[[dict(message) for message in messages]],
                chat_template=self._source,
                add_generation_prompt=ask,
                **cast(dict[str, Any], self._names),
            )[0]
        except ImportError as error:  # of the environment, not of the messages
            raise ValueError(f"chat templates cannot be rendered here: {error}") from None
        except Exception as error:  # what the template itself raises, above all
            raise Malformed(f"the chat template refuses these messages: {_reason(error)}") from None
        return rendered[0]

    def prompt(self, messages: Sequence[Mapping[str, Any]]) -> list[int]:
        """The tokens up to where the answer to these messages begins."""
        return self._tokens([self.render(messages, ask=True)])[0]

    def encode(self, messages: Sequence[Message], answers_from: int = 0) -> Encoded:
        """Raises `Malformed` for a conversation that the template cannot carry.

        `answers_from`: the first message that may be one to learn.
        """
        laid = self.lay_out(messages, answers_from)
        return self.encoded(laid, self.tokenize([laid.text])[0])

    # Many conversations at a time: `lay_out` each, `tokenize` their texts together, on all cores,
    # and make each `encoded`.

    def lay_out(self, messages: Sequence[Message], answers_from: int = 0) -> Laid:
        """The conversation as text. Raises `Malformed`."""
        whole = self.render(messages)
        spelled = self._require_all(messages, whole)
        spans = [
            self._span(messages, k, whole)
            for k, message in enumerate(messages)
            if k >= answers_from and message["role"] == "assistant"
        ]
        return Laid(whole, spans, spelled)

    def tokenize(self, texts: Sequence[str]) -> list[Any]:
        """What `encoded` needs of each text; None where the tokenizer tells no offsets."""
        if not hasattr(self._backend, "encode_batch_fast"):
            return [None] * len(texts)
        return self._backend.encode_batch(list(texts), add_special_tokens=False)

    def encoded(self, laid: Laid, encoding: Any) -> Encoded:
        """Raises `Malformed` where there is nothing to learn."""
        self.spelled += laid.spelled
        found = self._by_offsets(encoding, laid.spans) if encoding is not None else None
        if found is None:
            found = self._by_pieces(laid.text, laid.spans)
        if not any(found.answer):
            raise Malformed("the response has no tokens")
        last = max(i for i, kept in enumerate(found.answer) if kept)
        if found.ids[last] not in self.stops:
            self.unended += 1
            ids, answer = found.ids[: last + 1], found.answer[: last + 1]
            return Encoded([*ids, self.tokenizer.eos], [*answer, True])
        return found

    # ------------------------------------------------------------ where the responses are

    def _require_all(self, messages, whole) -> int:
        """How many messages spell a special token.

        Each text has to have a place of its own, in any order: some templates write the system's
        message before the last question. The longest choose first, for a shorter one may stand in
        them too; of like ones the system's is last, since that is what is dropped.
        """
        spelled = 0
        said = [(message["content"].strip(), message["role"]) for message in messages]
        for content, role in sorted(said, key=lambda one: (-len(one[0]), one[1] == "system")):
            if content not in whole:
                raise Malformed(f"the chat template drops the text of a {role}'s message")
            whole = whole.replace(content, "\0", 1)
            spelled += any(token in content for token in self._added)
        return spelled

    def _span(self, messages, k, whole) -> tuple[int, int]:
        """Where in the text the k-th message's own part begins and ends."""
        asked = self._opened(messages[:k])
        if not whole.startswith(asked):
            raise Malformed(
                f"the chat template writes what comes before message {k + 1} otherwise once it is "
                "answered, so there is no telling where the answer begins"
            )
        answered = whole if k + 1 == len(messages) else self.render(messages[: k + 1])
        begin, end = len(asked), len(answered)
        if not whole.startswith(answered) or end <= begin:
            content = messages[k]["content"].strip()
            end = whole.find(content, begin) + len(content)
            if end < begin + len(content):
                raise Malformed(f"the chat template writes message {k + 1} before its turn")
            rest = whole[end:]
            ending = next((t for t in self._added if rest.lstrip().startswith(t)), "")
            end += len(rest) - len(rest.lstrip()) + len(ending) if ending else 0
        kept = whole[begin:end].rstrip()  # a line end behind the turn's last token is not its own
        if any(kept.endswith(token) for token in self._added):
            end = begin + len(kept)
        return begin, end

    def _opened(self, messages) -> str:
        """With the assistant's turn opened; the two responses of a pair answer the same."""
        if messages != self._last[0]:
            self._last = messages, self.render(messages, ask=True)
        return self._last[1]

    # ------------------------------------------------------------ tokens

    def _by_offsets(self, encoding, spans) -> Encoded | None:
        answer, reached, at = [], 0, 0
        for start, end in encoding.offsets:
            # Byte-level tokens leave a space before them out of their offsets.
            start, reached = min(start, reached), max(reached, end)
            while at < len(spans) and start >= spans[at][1]:
                at += 1
            if at < len(spans) and start < spans[at][0] < end:
                self.joined += 1
                return None
            answer.append(at < len(spans) and spans[at][0] <= start)
        return Encoded(list(encoding.ids), answer)

    def _by_pieces(self, whole, spans) -> Encoded:
        borders = [0, *(at for span in spans for at in span), len(whole)]
        texts = [whole[a:b] for a, b in itertools.pairwise(borders)]
        ids, answer = [], []
        for i, found in enumerate(self._tokens(texts)):
            ids += found
            answer += [i % 2 == 1] * len(found)
        return Encoded(ids, answer)

    def _tokens(self, texts) -> list[list[int]]:
        found: list[Any] = [self._backend.encode(text, add_special_tokens=False) for text in texts]
        return [list(getattr(encoding, "ids", encoding)) for encoding in found]

    @functools.cached_property
    def _added(self) -> list[str]:
        """The texts of all special tokens, longest first."""
        found = set(self._names.values())
        if hasattr(self._backend, "get_added_tokens_decoder"):
            added = self._backend.get_added_tokens_decoder().values()
            found |= {token.content for token in added if token.special}
        return sorted(filter(None, found), key=len, reverse=True)

    @functools.cached_property
    def stops(self) -> frozenset[int]:
        """The tokenizer's eos, and the special token that ends an answer in this template."""
        stops = {self.tokenizer.eos}
        asked = [{"role": "user", "content": "a"}]
        try:
            before = self.render(asked, ask=True)
            whole = self.render([*asked, {"role": "assistant", "content": "bcb"}])
        except Malformed:
            return frozenset(stops)
        if whole.startswith(before):
            behind = whole[len(before) :].partition("bcb")[2].lstrip()
            ending = next((token for token in self._added if behind.startswith(token)), None)
            if ending and (found := self._tokens([ending])[0]):
                stops.add(found[0])
        return frozenset(stops)


def find(name: str, tokenizer: Tokenizer, folder: pathlib.Path) -> tuple[Template, str]:
    """The template that `config.data.template` asks for, and a sentence where it was chosen for
    want of one. Raises `ValueError` where it cannot be had."""
    own = of_folder(folder) if not name else ""
    if not name and not own:
        note = (
            f"The tokenizer {tokenizer.name} has no chat template, so conversations are written "
            "with the plain one (config.data.template='plain' says so without this note)."
        )
        return Template(PLAIN, tokenizer, folder), note
    if own:
        return Template(own, tokenizer, folder), ""
    if name == "chatml":
        _require_chatml(tokenizer)
    return Template(BUILT_IN.get(name) or _read(name), tokenizer, folder), ""


def stops(tokenizer: Tokenizer, folder: pathlib.Path) -> frozenset[int]:
    """Tokens that end an answer of a model: eos, and what its own template ends a turn with."""
    text = of_folder(folder)
    return Template(text, tokenizer, folder).stops if text else frozenset({tokenizer.eos})


def of_folder(folder: pathlib.Path) -> str:
    """The chat template in a tokenizer's folder; "" if there is none."""
    if (path := folder / FILE).is_file():
        try:
            return path.read_text(encoding="utf-8")
        except UnicodeDecodeError as error:
            raise ValueError(f"{path} cannot be read: {error}") from None
    for path in (folder / "tokenizer_config.json", folder / "chat_template.json"):
        if (said := object_in(path).get("chat_template")) not in (None, []):
            return _chosen(said, path)
    return ""


def _chosen(said: Any, path: pathlib.Path) -> str:
    """One template, or of several by name the usual one. Raises `ValueError` for what is none."""
    several = said if isinstance(said, list) else [{"name": "default", "template": said}]
    named = lambda each: isinstance(each, dict) and isinstance(each.get("name"), str)
    if not all(named(each) and isinstance(each.get("template"), str) for each in several):
        raise ValueError(
            f"{path} has a chat_template that is neither a text nor a list of "
            '{"name": ..., "template": ...} with texts; mend it, or put the template into '
            f"{path.with_name(FILE)}"
        )
    found = {each["name"]: each["template"] for each in several}
    return found.get("default") or next(iter(found.values()))


def specials(folder: pathlib.Path) -> dict[str, Any]:
    """bos_token, eos_token and so on, as templates name them."""
    found = object_in(folder / "special_tokens_map.json")
    found |= object_in(folder / "tokenizer_config.json")
    text = lambda value: value.get("content") if isinstance(value, dict) else value
    named = {k: text(v) for k, v in found.items() if k.endswith("_token") and text(v)}
    return {"bos_token": "", "eos_token": ""} | {k: v for k, v in named.items() if v is not True}


def _read(path: str | pathlib.Path) -> str:
    try:
        return pathlib.Path(path).expanduser().read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(
            f"config.data.template={str(path)!r} is none of '', {', '.join(map(repr, BUILT_IN))}, "
            f"and no file with a chat template: {error}"
        ) from None


def _require_chatml(tokenizer: Tokenizer) -> None:
    parsing = _parsing(tokenizer)
    for token in ("<|im_start|>", "<|im_end|>"):
        found = parsing.encode(token, add_special_tokens=False)
        if len(getattr(found, "ids", found)) != 1:
            raise ValueError(
                f"config.data.template='chatml' needs the token {token}, which the tokenizer "
                f"{tokenizer.name} does not have; use 'plain', or a .jinja file of its own"
            )


def _parsing(tokenizer: Tokenizer):
    """The tokenizer's backend, parsing special tokens instead of spelling them."""
    if not hasattr(tokenizer.backend, "encode_batch_fast"):
        return tokenizer.backend
    import tokenizers

    return tokenizers.Tokenizer.from_str(tokenizer.backend.to_str())


def _reason(error):
    return (str(error).strip() or repr(error)).splitlines()[0]
