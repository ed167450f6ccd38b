import numpy as np
import pytest

from jaxlm.evals.compression import compressors, primed_xz, token_bits, windows


@pytest.mark.parametrize("length", [4, 7, 32])
@pytest.mark.parametrize("stride", [1, 3, 4])
def test_every_target_is_scored_once_with_enough_context(length, stride):
    rng = np.random.default_rng(0)
    documents = [list(rng.integers(1, 99, n)) for n in (2, 3, 9, 40, 41, 5, 33, 2, 64)]
    rows = windows(documents, length, stride)
    scored = np.zeros((len(documents), 64), int)
    np.add.at(scored, (rows.document_NL, rows.offset_NL), (rows.batch["weights"] > 0).astype(int))
    for d, ids in enumerate(documents):
        assert (scored[d, : len(ids) - 1] == 1).all()
        assert scored[d].sum() == len(ids) - 1
    for n, at in zip(*np.nonzero(rows.batch["weights"]), strict=True):
        ids = documents[rows.document_NL[n, at]]
        offset = rows.offset_NL[n, at]
        assert rows.batch["tokens"][n, at] == ids[offset]
        assert rows.batch["targets"][n, at] == ids[offset + 1]
        if offset >= length:
            assert rows.batch["positions"][n, at] >= length - stride


def test_bits_come_back_in_document_order():
    documents = [[0, 5, 6, 7, 8, 9, 1], [0, 3, 1], [0, 2, 2, 2, 1]]
    rows = windows(documents, 4, 2)
    bits = token_bits(rows, lambda b: b["targets"] * np.log(2), batch=3)
    assert [list(b) for b in bits] == [ids[1:] for ids in documents]


def test_short_documents_share_rows():
    rows = windows([[0, 5, 1]] * 8, 16, 8)
    assert len(rows) == 1
    assert set(rows.batch["segments"][0]) == set(range(1, 9))


def test_primed_xz_knows_what_it_has_seen():
    text = "".join(map(chr, np.random.default_rng(0).integers(32, 120, 20_000)))
    stream, files = compressors([text, text])
    assert stream["xz"] < 0.6 * files["xz"]
    assert primed_xz([text], [text]) < 0.01 * files["xz"]
