"""Text to token ids and back: "bpe" (trained here), "byte", or a Hugging Face folder.

All three are one small class around the `tokenizers` library; `transformers` takes seconds to
import and is asked only for a folder without tokenizer.json. Text is encoded as text: a document
that spells out "<|bos|>" gets ordinary tokens for it, never the special one.
"""

import dataclasses
import hashlib
import json
import pathlib
import shutil
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np

from jaxlm.data.documents import cut

BOS, EOS = "<|bos|>", "<|eos|>"
FILES = (  # of a tokenizer, each of them a JSON object
    *("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"),
    *("added_tokens.json", "chat_template.json"),
)
VOCABULARIES = ("tokenizer.json", "tokenizer.model", "vocab.json")  # one of them there has to be
LONGEST = 2**20  # characters encoded in one piece; a longer text is cut at line ends


@dataclasses.dataclass(frozen=True)
class Tokenizer:
    """`backend` is a `tokenizers.Tokenizer`, or a transformers one that has no such file."""

    backend: Any
    name: str  # "bpe", "byte", or the folder
    bos: int
    eos: int
    vocabulary_size: int
    hash: str  # of everything that decides the ids

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """Token ids of each text, without bos and eos; runs on all cores."""
        pieces = [cut(text, LONGEST) for text in texts]
        encoded = iter(self._encode([piece for parts in pieces for piece in parts]))
        return [[i for _ in parts for i in next(encoded)] for parts in pieces]

    def encode(self, text: str) -> list[int]:
        return self.encode_batch([text])[0]

    def _encode(self, texts: list[str]) -> list[list[int]]:
        if hasattr(self.backend, "encode_batch_fast"):
            found = self.backend.encode_batch_fast(texts, add_special_tokens=False)
            return [encoding.ids for encoding in found]
        return [self.backend.encode(text, add_special_tokens=False) for text in texts]

    def decode(self, ids: Sequence[int]) -> str:
        """The text of the ids; special tokens leave no trace."""
        return self.backend.decode([int(i) for i in ids], skip_special_tokens=True)

    def pieces(self, text: str) -> list[tuple[int, str]]:
        """(id, the text it stands for) for each token; the texts join to `text`.

        Of a character that takes several tokens, the last one gets it and the others get "".
        """
        if not hasattr(self.backend, "encode_batch_fast"):
            return [(i, self.decode([i])) for i in self.encode(text)]
        encoding = self.backend.encode(text, add_special_tokens=False)
        ends = [*(start for start, _ in encoding.offsets), len(text)][1:]
        found, at = [], 0
        for i, end in zip(encoding.ids, ends, strict=True):
            found.append((i, text[at : max(at, end)]))
            at = max(at, end)
        return found

    def is_lossless(self, text: str) -> bool:
        """Whether decoding gives the text back; bits per character mean little otherwise."""
        return self.decode(self.encode(text)) == text


def same_ids(a: Tokenizer, b: Tokenizer) -> bool:
    """Whether both give text the same ids, however their files are written.

    What a tokenizer puts around a text by itself is not compared: here nothing is put there.
    """
    if a.hash == b.hash:
        return True
    if (a.bos, a.eos) != (b.bos, b.eos) or not (
        hasattr(a.backend, "to_str") and hasattr(b.backend, "to_str")
    ):
        return False
    parts = [json.loads(tokenizer.backend.to_str()) for tokenizer in (a, b)]
    deciding = ("model", "normalizer", "pre_tokenizer", "added_tokens")
    return all(parts[0].get(key) == parts[1].get(key) for key in deciding)


def token_dtype(vocabulary_size: int) -> np.dtype:
    """The smallest type that holds every id."""
    return np.dtype("<u2" if vocabulary_size <= 2**16 else "<u4")


def train_bpe(texts: Iterable[str], vocabulary_size: int, folder: pathlib.Path) -> None:
    """Trains a byte-level BPE and saves it so that `AutoTokenizer.from_pretrained` loads it."""
    import tokenizers
    from tokenizers import decoders, models, pre_tokenizers, trainers

    if vocabulary_size < 258:
        raise ValueError(
            f"a BPE vocabulary has at least 256 bytes + bos + eos, not {vocabulary_size}"
        )
    backend = tokenizers.Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary_size,
        special_tokens=[BOS, EOS],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    backend.train_from_iterator(texts, trainer)
    _save(backend, folder)


def save_byte(folder: pathlib.Path) -> None:
    """Writes the tokenizer whose id of a byte is that byte; bos is 256 and eos 257."""
    import tokenizers
    from tokenizers import decoders, models, pre_tokenizers

    vocabulary = {character: byte for byte, character in enumerate(byte_characters())}
    backend = tokenizers.Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([BOS, EOS])
    _save(backend, folder)


def byte_characters() -> list[str]:
    """The printable stand-in of each byte in a byte-level vocabulary, as GPT-2 chose them."""
    plain = {*range(33, 127), *range(161, 173), *range(174, 256)}
    others = iter(range(256, 512))
    return [chr(byte if byte in plain else next(others)) for byte in range(256)]


def _save(backend, folder: pathlib.Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    backend.save(str(folder / "tokenizer.json"))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": BOS,
        "eos_token": EOS,
        "add_bos_token": False,
        "add_eos_token": False,
        "clean_up_tokenization_spaces": False,
        "model_max_length": 10**9,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=1))


def copy(source: pathlib.Path, target: pathlib.Path) -> None:
    """Only what a tokenizer is made of: the folder may hold a whole model."""
    wanted = ("*token*.json", "*token*.model", "special_tokens_map.json", "vocab*", "merges*")
    templates = ("*.jinja", "chat_template.json", "additional_chat_templates/*.jinja")
    target.mkdir(exist_ok=True)
    for path in {path for pattern in (*wanted, *templates) for path in source.glob(pattern)}:
        place = target / path.relative_to(source)
        place.parent.mkdir(exist_ok=True)
        half = place.with_name(place.name + ".tmp")
        shutil.copyfile(path, half)
        half.replace(place)


def begin_with_bos(folder: pathlib.Path) -> None:
    """Lets a tokenizer that was made here put bos before a text by itself, as training did.

    For those who get the folder; here bos is put where it belongs. Another's stays as it is.
    """
    import tokenizers
    from tokenizers import processors

    backend = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    bos = backend.token_to_id(BOS)
    if bos is None or backend.post_processor is not None:
        return
    template = {"single": f"{BOS} $A", "pair": f"{BOS} $A $B", "special_tokens": [(BOS, bos)]}
    backend.post_processor = processors.TemplateProcessing(**template)
    backend.save(str(folder / "tokenizer.json"))
    path = folder / "tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"add_bos_token": True}, indent=1))


def load(folder: pathlib.Path, name: str = "") -> Tokenizer:
    """The tokenizer of a folder, ours or Hugging Face's; `ValueError` says what is missing."""
    folder = pathlib.Path(folder).expanduser()
    if not folder.is_dir():
        raise ValueError(
            f"there is no folder of a tokenizer {str(folder)!r}: put tokenizer.json and "
            "tokenizer_config.json there; in a recipe, data.tokenizer is 'bpe', 'byte', or such a "
            "folder on this machine, as a downloaded Hugging Face model is."
        )
    if (folder / "tokenizer.json").is_file():
        return _load_fast(folder, name or str(folder))
    return _load_with_transformers(folder, name or str(folder))


def _load_fast(folder: pathlib.Path, name: str) -> Tokenizer:
    import tokenizers

    content = (folder / "tokenizer.json").read_bytes()
    try:
        backend = tokenizers.Tokenizer.from_str(content.decode())
    except Exception as error:  # the library raises plain Exception
        raise ValueError(f"{folder}/tokenizer.json cannot be read: {error}") from None
    backend.no_truncation()
    backend.no_padding()
    backend.encode_special_tokens = True  # text is text, whatever it spells
    special = {
        key: _special(folder, key, backend.token_to_id) for key in ("bos_token", "eos_token")
    }
    size = max(backend.get_vocab().values()) + 1  # some vocabularies have gaps
    return _described(backend, name, special, size, content)


def _special(folder: pathlib.Path, key: str, to_id: Callable) -> int | None:
    """The id that the folder's configuration gives to bos_token or eos_token."""
    for file in ("tokenizer_config.json", "special_tokens_map.json"):
        said = object_in(folder / file).get(key)
        token = said.get("content") if isinstance(said, dict) else said
        if token is not None and not isinstance(token, str):
            raise ValueError(
                f"{folder / file} says {key}={said!r}, where the text of a token has to stand"
            )
        if token and to_id(token) is not None:
            return to_id(token)
    return None


def object_in(path: pathlib.Path) -> dict[str, Any]:
    """A file with a JSON object; {} if there is none. Raises `ValueError` for one with another."""
    try:
        found = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    except ValueError:
        found = None
    if not isinstance(found, dict):
        raise ValueError(f"{path} cannot be read: it has to be a JSON object")
    return found


def of_transformers(folder: pathlib.Path) -> Any:
    """The tokenizer of a folder as transformers has it, which knows what it puts around a text.

    Raises `ValueError` where there is none, naming the file that is to blame where one is.
    """
    import transformers  # takes seconds

    transformers.logging.set_verbosity_error()  # of texts longer than the context, say
    try:
        found = transformers.AutoTokenizer.from_pretrained(str(folder), local_files_only=True)
        found("a")  # some of what is wrong shows only here
        return found
    except Exception as error:  # many kinds
        for file in FILES:
            object_in(folder / file)
        reason = (str(error).strip() or repr(error)).splitlines()[0]
        if not any((folder / file).is_file() for file in VOCABULARIES):
            reason = f"it has none of {', '.join(VOCABULARIES)}; copy the model's into it"
        raise ValueError(f"no tokenizer can be loaded from {folder}: {reason}") from None


def _load_with_transformers(folder: pathlib.Path, name: str) -> Tokenizer:
    backend = of_transformers(folder)
    if set(backend.get_vocab()) <= set(backend.all_special_tokens):
        raise ValueError(  # transformers makes an empty tokenizer up from model_type alone
            f"no tokenizer can be loaded from {folder}: it has no vocabulary; copy the model's "
            "tokenizer files into it, tokenizer.json above all"
        )
    special = {"bos_token": backend.bos_token_id, "eos_token": backend.eos_token_id}
    files = sorted(p for p in folder.iterdir() if p.is_file() and p.stat().st_size < 2**27)
    content = b"".join(p.read_bytes() for p in files if "token" in p.name or "vocab" in p.name)
    return _described(backend, name, special, len(backend), content)


def _described(backend, name, special, vocabulary_size, content) -> Tokenizer:
    """Fills in bos from eos and the other way round: many models have only one."""
    found = [i for i in (special["bos_token"], special["eos_token"]) if i is not None]
    if not found:
        raise ValueError(
            f"the tokenizer {name} names neither a bos nor an eos token, and documents need one "
            f"between them; add eos_token to its tokenizer_config.json."
        )
    bos, eos = found[0], found[-1]
    digest = hashlib.sha256(content + repr((bos, eos)).encode()).hexdigest()
    return Tokenizer(backend, name, bos, eos, vocabulary_size, digest)
