"""A language model as lm-eval knows one: tasks of lm-eval run on it, without torch.

What a request is cut into is just what lm-eval's own `hf` backend cuts it into (0.4.13): context
and continuation are encoded together and split where the context's own tokens end, its trailing
spaces moved over first; an empty context is the bos, or eos where there is none; what is too long
loses its start; a text to be scored whole goes through windows that share one token. Tests hold
both side by side. Two liberties: texts are encoded many at a time, and a bos that a text itself
begins with is looked for in each text, not only in the first of a batch.

Each process of several calls everything alike; the arrays behind `score` and `generate` are spread.
"""

import math
from collections.abc import Callable, Iterator
from typing import Any

import jinja2
from lm_eval.api.model import TemplateLM
from lm_eval.models.utils import (
    handle_stop_sequences,
    normalize_gen_kwargs,
    postprocess_generated_text,
)
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

from jaxlm.evals.model import Prompt
from jaxlm.evals.score import Request, Score, summed
from jaxlm.evals.texts import Texts

NEW_TOKENS = 256  # where a task names no number, as in lm-eval
# Keyword arguments of a task's generation -> those of our sampler.
SAMPLING = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty")


class Jaxlm(TemplateLM):
    """`score` and `generate` take all requests of a kind at once and answer them in their order.

    `length`: tokens that the model can read. `about`: what the results say of the model.
    """

    def __init__(
        self,
        texts: Texts,
        length: int,
        score: Callable[[list[Request]], list[Score]],
        generate: Callable[[list[Prompt]], list[list[int]]] | None = None,
        *,
        about: dict[str, Any] | None = None,
    ):
        super().__init__()
        self.tokenizer, self.max_length = texts.tokenizer, length
        self._texts, self._score, self._generate = texts, score, generate
        self._about = about or {}
        self.shortened = 0  # requests that lost their start

    @property
    def eot_token_id(self) -> int:
        return self.tokenizer.eos_token_id

    @property
    def prefix_token_id(self) -> int:
        return self._texts.prefix

    @property
    def tokenizer_name(self) -> str:
        return self.tokenizer.name_or_path.replace("/", "__")

    def get_model_info(self) -> dict[str, Any]:
        return self._about

    def tok_encode(self, string, add_special_tokens=None, **kwargs) -> list[int]:
        del kwargs
        return self._texts.encode([string], add_special_tokens)[0]

    def loglikelihood(self, requests: Any, disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        del disable_tqdm
        pairs: list[tuple[str, str]] = [request.args for request in requests]
        encoded = self._pairs(pairs)
        return self._loglikelihood_tokens(
            [(pair, *ids) for pair, ids in zip(pairs, encoded, strict=True)]
        )

    def _pairs(self, pairs: list[tuple[str, str]]) -> Iterator[tuple[list[int], list[int]]]:
        """(ids of the context, ids of the continuation) of each pair of texts."""
        moved = []
        for context, continuation in pairs:
            kept = context.rstrip() if context else ""
            moved.append((kept, context[len(kept) :] + continuation))
        # A context of nothing but spaces is no empty one to lm-eval: its ids are the bos, if any.
        alone = [c for (context, _), (_, c) in zip(pairs, moved, strict=True) if not context]
        plain = iter(self._texts.encode(alone, False))
        full = [m for (context, _), m in zip(pairs, moved, strict=True) if context]
        whole = iter(self._texts.encode([context + continuation for context, continuation in full]))
        once = list(dict.fromkeys(context for context, _ in full))
        contexts = dict(zip(once, self._texts.encode(once), strict=True))
        for (context, _), (kept, _) in zip(pairs, moved, strict=True):
            if context:
                yield contexts[kept], next(whole)[len(contexts[kept]) :]
                continue
            ids = next(plain)
            starts = ids[:1] == [self._texts.prefix]
            yield (ids[:1], ids[1:]) if starts else ([self._texts.prefix], ids)

    def _loglikelihood_tokens(self, requests, **kwargs) -> list[tuple[float, bool]]:
        del kwargs
        scored = self._score([self._request(*request) for request in requests])
        answers = [summed(score) for score in scored]
        for (texts, _, _), answer in zip(requests, answers, strict=True):
            if texts is not None:
                self.cache_hook.add_partial("loglikelihood", texts, answer)
        return answers

    def _request(self, texts, context, continuation):
        if not context or not continuation:
            what = "context" if continuation else "continuation"
            raise ValueError(
                f"a {what} has no tokens of its own and cannot be scored: {_shown(texts)}"
            )
        if len(continuation) > self.max_length:
            raise ValueError(
                f"a continuation of {len(continuation):,} tokens is longer than the model's "
                f"context of {self.max_length:,} tokens: {_shown(texts)}"
            )
        ids = [*context, *continuation][-(self.max_length + 1) :]
        self.shortened += len(ids) < len(context) + len(continuation)
        return Request(ids[:-1], continuation)

    def loglikelihood_rolling(self, requests, disable_tqdm: bool = False) -> list[float]:
        del disable_tqdm
        texts = [request.args[0] for request in requests]
        pieces, count = [], []
        for ids in self._texts.encode(texts):
            found = get_rolling_token_windows(
                ids, self._texts.prefix, self.max_length, context_len=1
            )
            found = [make_disjoint_window(window) for window in found]
            pieces += [(None, *window) for window in found]
            count.append(len(found))
        answers = iter(self._loglikelihood_tokens(pieces))
        totals = [math.fsum(next(answers)[0] for _ in range(n)) for n in count]
        for text, total in zip(texts, totals, strict=True):
            self.cache_hook.add_partial("loglikelihood_rolling", (text,), total)
        return totals

    def generate_until(self, requests, disable_tqdm: bool = False) -> list[str]:
        del disable_tqdm
        if self._generate is None:
            raise ValueError("this model was opened for scoring only, and a task generates text")
        end = self.tokenizer.decode(self.eot_token_id)
        prompts, stops = [], []
        for request, ids in zip(
            requests, self._texts.encode([r.args[0] for r in requests]), strict=True
        ):
            try:
                kwargs: dict[str, Any] = dict(normalize_gen_kwargs(request.args[1], NEW_TOKENS))
            except (ValueError, TypeError) as error:
                raise ValueError(f"a task's generation_kwargs mean nothing: {error}") from None
            until = handle_stop_sequences(kwargs.pop("until", None), eos=end)
            prompts.append(self._prompt(ids, until, kwargs))
            stops.append(until)
        texts = []
        for request, ids, until in zip(requests, self._generate(prompts), stops, strict=True):
            text = self.tokenizer.decode(self._until_special(ids, until), skip_special_tokens=True)
            text = postprocess_generated_text(text, until, None)
            self.cache_hook.add_partial("generate_until", request.args, text)
            texts.append(text)
        return texts

    def _prompt(self, ids, until, kwargs):
        tokens = kwargs.pop("max_gen_toks")
        room = self.max_length - tokens
        if room < 1:
            raise ValueError(
                f"a task generates up to {tokens:,} tokens, and the model's context has "
                f"{self.max_length:,}: give --gen_kwargs=max_gen_toks=N with a smaller number"
            )
        self.shortened += len(ids) > room
        if not kwargs.pop("do_sample", False):
            kwargs["temperature"] = 0.0
        if other := sorted(
            k for k, v in kwargs.items() if k not in SAMPLING and v not in (None, 1)
        ):
            raise ValueError(
                f"a task's generation_kwargs name {', '.join(other)}, which cannot be done here; "
                f"there are {', '.join(SAMPLING)}, do_sample, until and max_gen_toks"
            )
        said = {k: v for k, v in kwargs.items() if k in SAMPLING and v is not None}
        try:
            sampling = {name: float(value) for name, value in said.items()}
        except (TypeError, ValueError):
            raise ValueError(
                f"a task's generation_kwargs mean nothing: of {said} all have to be numbers"
            ) from None
        ids = ids or [self._texts.prefix]  # an empty context, and no bos put before it
        return Prompt(ids[-room:], tokens, tuple(stop for stop in until if stop), sampling)

    def _until_special(self, ids, until):
        """Cut before a stop that is a special token: decoding leaves no trace of it."""
        special = {self.tokenizer.convert_tokens_to_ids(stop) for stop in until}
        special &= set(self.tokenizer.all_special_ids)
        return ids[: next((i for i, token in enumerate(ids) if token in special), len(ids))]

    def apply_chat_template(self, chat_history, add_generation_prompt: bool = True) -> str:
        """The conversation as the tokenizer's template writes it; without the system's messages
        where the template knows none."""
        kwargs = {
            "tokenize": False,
            "add_generation_prompt": add_generation_prompt,
            "continue_final_message": not add_generation_prompt,
        }
        try:
            return self.tokenizer.apply_chat_template(chat_history, **kwargs)
        except jinja2.exceptions.TemplateError:
            rest = [message for message in chat_history if message["role"] != "system"]
            return self.tokenizer.apply_chat_template(rest, **kwargs)


def _shown(texts):
    return repr(texts)[:200] if texts is not None else "a window of a longer text"
