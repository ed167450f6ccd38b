"""Bits per character of a corpus as one stream, by the protocol of the paper, and MIN-K%.

Compression Represents Intelligence Linearly (https://arxiv.org/abs/2404.09937): the documents, each
with the bos that its tokenizer adds, are one stream; windows of 1,900 tokens advance by 512; the
first window scores all its targets, each later one those that the window before did not reach.
Bits per character are the total over ln 2 and over the characters, by `len()`: code points. The
stream's first token has nothing before it and is not scored; a bos within is scored, and adds no
character. Documents attend to the ones before them, as in the authors' code.

Differs from it in one thing: the tail behind the last full window is scored too. There its
characters count and its bits do not, which flatters whatever is short.

MIN-K% of an example is the mean negative log p of the k % of its tokens that the model expected
least, in nats; unusually low figures hint that the model was trained on the example.
"""

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

from jaxlm.evals.score import Request, Score

WINDOW, STRIDE = 1900, 512  # tokens
MIN_K = 20  # %


class Window(NamedTuple):
    """The model reads ids[start:end] and predicts ids[first:end + 1]."""

    start: int
    first: int
    end: int


def stride_of(window: int) -> int:
    """The share of a window that the protocol's stride is of its own."""
    return max(1, round(window * STRIDE / WINDOW))


def windows(length: int, window: int = WINDOW, stride: int = STRIDE) -> list[Window]:
    """The windows of a stream of `length` ids; every target but the first id is in just one.

    Beyond the first window, every target has at least `window - stride + 1` ids before it.
    """
    if not 1 <= stride <= window:
        raise ValueError(
            f"a stride of {stride} tokens would leave tokens unscored: it has to be at least 1 and "
            f"at most the window, {window}"
        )
    found, first = [], 1
    while first < length:
        start = len(found) * stride
        end = min(start + window, length - 1)
        found.append(Window(start, first, end))
        first = end + 1
    return found


def stream_nats(
    score: Callable[[list[Request]], list[Score]], ids: Sequence[int], window: int, stride: int
) -> np.ndarray:
    """Negative log p in nats of every id of the stream but the first."""
    requests = [
        Request(ids[start:end], ids[first : end + 1])
        for start, first, end in windows(len(ids), window, stride)
    ]
    return _joined(score(requests))


def documents_nats(
    score: Callable[[list[Request]], list[Score]], documents: Sequence[Sequence[int]], length: int
) -> list[np.ndarray]:
    """Negative log p in nats of every id but the first of each document, read on its own.

    A document of more than `length` ids goes through windows that advance by half of it.
    """
    requests, count = [], []
    for ids in documents:
        here = windows(len(ids), length, max(length // 2, 1))
        requests += [Request(ids[s:end], ids[first : end + 1]) for s, first, end in here]
        count.append(len(here))
    scores = iter(score(requests))
    return [_joined([next(scores) for _ in range(n)]) for n in count]


def bits_per_character(nats: np.ndarray, characters: int) -> float:
    """Of a text whose tokens cost so many nats."""
    return math.fsum(nats) / (math.log(2) * max(characters, 1))


def min_k(nats: np.ndarray, percent: float = MIN_K) -> float:
    """Mean of the `percent` % largest; at least one of them. NaN where there is none."""
    if not len(nats):
        return math.nan
    count = max(1, int(percent / 100 * len(nats)))
    return float(np.sort(nats)[-count:].mean(dtype=np.float64))


def _joined(scores: list[Score]) -> np.ndarray:
    none = np.zeros(0, np.float32)
    return -np.concatenate([none, *(score.logprobs for score in scores)])
