"""Tokenizers, templates and rows of conversations for the tests of this folder."""

import json

from jaxlm.data import chat, tokenizer

CHATML = chat.CHATML
# With bos, the turn's end inside a block, text trimmed.
TRIMMED = (
    "{{ bos_token }}{%- for m in messages %}\n"
    "{% generation %}{{ '<|im_start|>' + m.role + '\\n' + m.content | trim }}{% endgeneration %}\n"
    "{{- '<|im_end|>\\n' }}{% endfor %}"
    "{%- if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
# Nothing special ends a turn, and the assistant's turn is opened with what it never writes again.
BARE = (
    "{% for m in messages %}{{ '[' + m.role + ']' + m.content + '\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '[assistant]' }}{% endif %}"
)
# Answers carry a thought, but for those that another question follows.
THINKING = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\\n' }}"
    "{% if m.role == 'assistant' and loop.last %}{{ 'hm. ' }}{% endif %}"
    "{{ m.content + '<|im_end|>\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
# Takes no notice of add_generation_prompt: the model writes the header itself.
UNASKED = "{% for m in messages %}{{ m.role + ': ' + m.content + eos_token }}{% endfor %}"
SYSTEMLESS = (
    "{% for m in messages if m.role != 'system' %}{{ m.content + '<|im_end|>' }}{% endfor %}"
)
STRICT = (
    "{% for m in messages %}{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Roles must alternate!') }}{% endif %}{{ m.content + eos_token }}"
    "{% endfor %}"
)
# Tells the answer's number of words before it begins.
LOOKING_BACK = (
    "{{ messages | length }}{% for m in messages %}{{ m.role + m.content + eos_token }}{% endfor %}"
)


def turns(*texts):
    """Messages of the user and the assistant by turns."""
    roles = ("user", "assistant")
    return [{"role": roles[i % 2], "content": text} for i, text in enumerate(texts)]


def tokenizer_of(folder, kind="byte", texts=(), template=""):
    """(tokenizer, its folder) with ChatML's two special tokens."""
    if kind == "byte":
        tokenizer.save_byte(folder)
    else:
        tokenizer.train_bpe(texts or ["user assistant Hello there, hello you\n"] * 3, 300, folder)
    path = folder / "tokenizer.json"
    held = json.loads(path.read_text())
    first = max(held["model"]["vocab"].values()) + 1
    first = max([first, *(token["id"] + 1 for token in held["added_tokens"])])
    like = held["added_tokens"][0]
    for i, token in enumerate(("<|im_start|>", "<|im_end|>")):
        held["added_tokens"].append(like | {"id": first + i, "content": token})
    path.write_text(json.dumps(held))
    if template:
        (folder / chat.FILE).write_text(template)
    return tokenizer.load(folder), folder


def write_rows(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)
