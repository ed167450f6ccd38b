"""Packing: every token is a target once, and no document sees or is predicted from another."""

import numpy as np
import pytest

from jaxlm.data import pack

BOS, EOS = 1, 2


def documents(seed: int, count: int = 12) -> list[list[int]]:
    rng = np.random.default_rng(seed)
    return [rng.integers(3, 99, rng.integers(0, 20)).tolist() for _ in range(count)]


def stream(docs):
    return [token for ids in docs for token in (BOS, *ids, EOS)]


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("length", [2, 7, 16])
def test_every_token_but_bos_is_a_target_exactly_once(seed, length):
    docs = documents(seed)
    rows, left = pack.pack(docs, length, BOS, EOS)
    batch = pack.to_batch(rows, attend_across_documents=False)
    targets = batch["targets"][batch["weights"] > 0].tolist()
    assert targets == [token for token in stream(docs) if token != BOS]
    assert left.tokens.size == 0
    assert np.all(batch["targets"][(batch["weights"] == 0) & (batch["segments"] > 0)][:-1] == BOS)
    # Nothing is wasted: only the last row has padding.
    assert np.all(batch["segments"][:-1] > 0)
    assert len(rows.tokens) == -(-(len(stream(docs)) - 1) // length)


@pytest.mark.parametrize("seed", range(4))
def test_segments_and_positions_follow_the_documents(seed):
    rows, _ = pack.pack(documents(seed), 16, BOS, EOS)
    batch = pack.to_batch(rows, attend_across_documents=False)
    for tokens, segments, positions in zip(
        batch["tokens"], batch["segments"], batch["positions"], strict=True
    ):
        real = int((segments > 0).sum())
        assert np.all(segments[real:] == 0)
        assert segments[0] == 1
        begins = [0] + [i for i in range(1, real) if tokens[i] == BOS]
        for number, (a, b) in enumerate(zip(begins, [*begins[1:], real], strict=True), 1):
            assert np.all(segments[a:b] == number)
            assert positions[a:b].tolist() == list(range(b - a))


def test_attending_across_documents_changes_segments_and_positions_only():
    rows, _ = pack.pack(documents(0), 16, BOS, EOS)
    apart, across = (pack.to_batch(rows, attend) for attend in (False, True))
    for key in ("tokens", "targets", "weights"):
        assert np.array_equal(apart[key], across[key])
    real = apart["segments"] > 0
    assert np.array_equal(across["segments"], real.astype(np.int32))
    assert np.array_equal(across["positions"], np.where(real, np.arange(16), 0))


@pytest.mark.parametrize("seed", range(4))
def test_packing_in_chunks_is_packing_at_once(seed):
    docs = documents(seed)
    whole, _ = pack.pack(docs, 7, BOS, EOS)
    parts, left = [], pack.EMPTY
    for i in range(0, len(docs), 3):
        rows, left = pack.pack(docs[i : i + 3], 7, BOS, EOS, before=left, last=False)
        parts.append(rows)
    parts.append(pack.pack([], 7, BOS, EOS, before=left)[0])
    for field in pack.Rows._fields:
        joined = np.concatenate([getattr(part, field) for part in parts])
        assert np.array_equal(joined, getattr(whole, field))


@pytest.mark.parametrize("dtype", ["<u2", "<u4"])
def test_records_hold_the_rows(dtype):
    rows, _ = pack.pack(documents(1), 7, BOS, EOS)
    records = pack.to_bytes(rows, np.dtype(dtype))
    assert {len(record) for record in records} == {pack.record_bytes(7, np.dtype(dtype))}
    for a, b in zip(rows, pack.from_bytes(records, 7, np.dtype(dtype)), strict=True):
        assert np.array_equal(a, b)


def test_no_documents_are_no_rows():
    rows, _ = pack.pack([], 7, BOS, EOS)
    assert rows.tokens.shape == (0, 8)


def test_batch_types_are_those_of_the_contract():
    batch = pack.to_batch(pack.pack(documents(2), 7, BOS, EOS)[0], attend_across_documents=False)
    assert {key: value.dtype.name for key, value in batch.items()} == {
        "tokens": "int32",
        "targets": "int32",
        "weights": "float32",
        "segments": "int32",
        "positions": "int32",
    }
