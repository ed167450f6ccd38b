"""Windows over a stream, bits per character and MIN-K%: known answers and invariants."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxlm.evals import stream
from jaxlm.evals.score import Score


@given(st.integers(0, 700), st.integers(1, 90), st.data())
def test_every_target_is_scored_once_with_its_context(length, window, data):
    stride = data.draw(st.integers(1, window))
    found = stream.windows(length, window, stride)
    scored = [t for _, first, end in found for t in range(first, end + 1)]
    assert scored == list(range(1, length)), "every target but the first, in order, once"
    for i, (start, first, end) in enumerate(found):
        assert end - start <= window
        assert start == i * stride
        assert first - start >= (1 if i == 0 else window - stride + 1)
        assert end - first + 1 <= (window if i == 0 else stride)


def test_windows_of_the_paper():
    assert stream.windows(3000) == [
        (0, 1, 1900),
        (512, 1901, 2412),
        (1024, 2413, 2924),
        (1536, 2925, 2999),
    ]


def test_a_stride_that_skips_tokens_is_refused():
    with pytest.raises(ValueError, match="stride of 11 tokens would leave tokens unscored"):
        stream.windows(100, 10, 11)


def unigram(weights):
    """A scorer that knows how often each id comes, and looks at nothing before it."""
    logs = np.log(np.asarray(weights) / np.sum(weights))
    return lambda requests: [Score(logs[list(r.targets)], np.zeros(1)) for r in requests]


@given(st.integers(2, 600), st.integers(1, 50), st.data())
def test_a_uniform_model_needs_log_v_bits_a_token(length, window, data):
    stride = data.draw(st.integers(1, window))
    ids = [i % 16 for i in range(length)]
    nats = stream.stream_nats(unigram([1] * 16), ids, window, stride)
    assert len(nats) == length - 1
    assert stream.bits_per_character(nats, length - 1) == pytest.approx(4)


def test_bits_are_the_code_length_of_the_stream_whatever_the_windows():
    rng = np.random.default_rng(0)
    weights = rng.random(50)
    for length in (2, 49, 50, 51, 63, 64, 65, 1000):
        ids = rng.integers(50, size=length).tolist()
        bits = -np.log2(weights[ids[1:]] / weights.sum()).sum()
        nats = stream.stream_nats(unigram(weights), ids, 49, 14)
        assert stream.bits_per_character(nats, 10) == pytest.approx(bits / 10)


def test_a_document_on_its_own_is_scored_whole():
    documents = [[1], [1, 2], list(range(40)), list(range(9))]
    found = stream.documents_nats(unigram([1] * 64), documents, 8)
    assert [len(nats) for nats in found] == [0, 1, 39, 8]
    assert all(np.allclose(nats, math.log(64)) for nats in found)


def test_min_k_is_the_mean_of_the_least_likely():
    assert stream.min_k(np.array([1.0, 9.0, 2.0, 7.0, 3.0, 1.0, 1.0, 1.0, 1.0, 1.0])) == 8
    assert stream.min_k(np.array([3.0])) == 3
    assert stream.min_k(np.arange(100.0), 1) == 99
    assert math.isnan(stream.min_k(np.zeros(0)))
