"""Batches: the same rows in the same order for any number of hosts and from any position."""

import dataclasses
import itertools

import numpy as np
import pytest
from small import prepared

from jaxlm.data import mix, pack, records
from jaxlm.data.batches import batches

STAGES = (mix.Stage(0, {"a": 1.0, "b": 1.0}), mix.Stage(40, {"a": 1.0, "b": 3.0}))


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return prepared(tmp_path_factory.mktemp("data"), {"a": 30, "b": 12})


def take(data, count, **keys):
    keys = {"rows": 8, "position": 0, "seed": 3, "stages": STAGES, "threads": 0} | keys
    return list(itertools.islice(batches(data, **keys), count))


def same(a, b):
    assert len(a) == len(b)
    for x, y in zip(a, b, strict=True):
        assert x.keys() == y.keys()
        for key in x:
            assert np.array_equal(x[key], y[key]), key


def joined(parts):
    """Global batches out of the batches of all hosts."""
    return [{k: np.concatenate([p[k] for p in hosts]) for k in hosts[0]} for hosts in zip(*parts)]  # noqa: B905


@pytest.mark.parametrize("hosts", [2, 4])
def test_hosts_together_are_one_host_in_the_same_order(data, hosts):
    k = 8 // hosts
    parts = [take(data, 9, mine=range(h * k, h * k + k)) for h in range(hosts)]
    same(joined(parts), take(data, 9))


def test_a_host_may_need_any_rows(data):
    whole, some = take(data, 5), take(data, 5, mine=[1, 2, 6])
    same([{k: v[[1, 2, 6]] for k, v in batch.items()} for batch in whole], some)


@pytest.mark.parametrize("position", [0, 8, 24, 13, 400])
def test_any_position_continues_identically(data, position):
    whole = take(data, 60, rows=1)
    rest = take(data, 5, rows=1, position=position % 50)
    same(rest, whole[position % 50 : position % 50 + 5])
    same(
        take(data, 4, position=position), take(data, position // 8 + 4, position=position % 8)[-4:]
    )


def test_another_batch_size_continues_with_the_next_row(data):
    before = take(data, 3, rows=8)
    after = take(data, 2, rows=4, position=24)
    whole = take(data, 4, rows=8)
    rows = np.concatenate([b["tokens"] for b in (*before, *after)])
    assert np.array_equal(rows, np.concatenate([b["tokens"] for b in whole]))


def test_threads_change_nothing(data):
    same(take(data, 12, threads=2, prefetch=3), take(data, 12))


def test_each_epoch_is_another_permutation(data):
    rows = data.sources[0].rows
    only = (mix.Stage(0, {"a": 1.0}),)
    index = np.concatenate([b["index"] for b in take(data, 2 * rows, rows=1, stages=only)])
    first, second = index[:rows], index[rows:]
    assert sorted(first) == sorted(second) == list(range(rows))
    assert not np.array_equal(first, second)
    assert not np.array_equal(first, np.arange(rows))
    other = np.concatenate([b["index"] for b in take(data, rows, rows=1, stages=only, seed=4)])
    assert not np.array_equal(first, other)


def test_source_and_index_say_where_a_row_comes_from(data):
    batch = take(data, 1)[0]
    assert batch["source"].tolist() == [0, 1] * 4
    single = {
        (int(b["source"][0]), int(b["index"][0])): b["tokens"][0]
        for b in take(data, 200, rows=1, seed=9)
    }
    for source, index, tokens in zip(batch["source"], batch["index"], batch["tokens"], strict=True):
        if (source, index) in single:
            assert np.array_equal(tokens, single[source, index])


def test_batches_are_those_of_the_contract(data):
    batch = take(data, 1)[0]
    assert {k: (v.shape, v.dtype.name) for k, v in batch.items()} == {
        "tokens": ((8, 16), "int32"),
        "targets": ((8, 16), "int32"),
        "weights": ((8, 16), "float32"),
        "segments": ((8, 16), "int32"),
        "positions": ((8, 16), "int32"),
        "source": ((8,), "int32"),
        "index": ((8,), "int32"),
    }


def test_a_limited_source_ends_with_a_message(data):
    limited = dataclasses.replace(
        data, sources=(dataclasses.replace(data.sources[0], max_epochs=0.5), data.sources[1])
    )
    rows = 2 * int(0.5 * data.sources[0].rows)
    assert len(take(limited, rows, rows=1, stages=STAGES[:1])) == rows
    with pytest.raises(ValueError, match=r"source .a. is used up: max_epochs=0\.5"):
        take(limited, rows + 1, rows=1, stages=STAGES[:1])


@pytest.mark.parametrize("mine", [[], [8], [-1]])
def test_rows_beyond_the_batch_are_refused(data, mine):
    with pytest.raises(ValueError, match="a batch of 8 rows has no rows"):
        take(data, 1, mine=mine)


def test_the_epoch_of_a_source_is_its_documents(data):
    """Decoded back from the batches, a source is its training documents, each token once."""
    source, tokens = data.sources[0], data.tokenizer
    only = (mix.Stage(0, {"a": 1.0}),)
    rows = sorted(
        take(data, source.rows, rows=1, stages=only), key=lambda batch: int(batch["index"][0])
    )
    targets = np.concatenate([b["targets"][b["weights"] > 0] for b in rows])
    assert len(targets) == source.tokens
    text = tokens.decode(targets[targets != tokens.eos])
    assert len(text) == source.characters


def test_reading_from_memory_and_from_several_files_is_the_same(tmp_path, monkeypatch):
    rows = pack.pack([list(range(3, 60))] * 5, 8, 1, 2)[0]
    monkeypatch.setattr(records, "ROWS_PER_FILE", 7)
    writer = records.Writer(tmp_path, np.dtype("<u2"))
    writer.write(rows)
    writer.close()
    assert len(writer.names) == -(-writer.rows // 7) > 2
    files = [tmp_path / name for name in writer.names]
    order = np.random.default_rng(0).permutation(writer.rows).tolist()
    in_memory = records.Reader(files).read(order)
    monkeypatch.setattr(records, "IN_MEMORY_BYTES", 0)
    assert records.Reader(files).read(order) == in_memory
    assert in_memory == [pack.to_bytes(rows, np.dtype("<u2"))[row] for row in order]
