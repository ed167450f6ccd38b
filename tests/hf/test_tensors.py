"""Our reader and writer of safetensors against the library's."""

import json

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from jaxlm.hf import tensors

BF16 = np.dtype(ml_dtypes.bfloat16)


def some_arrays():
    rng = np.random.default_rng(0)
    return {
        "a.weight": rng.standard_normal((5, 3), np.float32),
        "b": rng.standard_normal(7).astype(BF16),
        "c": rng.standard_normal((2, 1, 4)).astype(np.float16),
        "empty": np.zeros((0, 3), np.float32),
    }


def write(folder, arrays, shard_bytes=10**9):
    layout = {name: (x.shape, x.dtype) for name, x in arrays.items()}
    with tensors.Writer(folder, layout, shard_bytes) as writer:
        for name in reversed(arrays):  # any order
            writer.put(name, arrays[name])


def assert_same(found, arrays):
    assert found.keys() == arrays.keys()
    for name, x in arrays.items():
        assert (found[name].dtype, found[name].shape) == (x.dtype, x.shape)
        assert found[name].tobytes() == x.tobytes()


def test_the_library_reads_what_is_written(tmp_path):
    write(tmp_path, some_arrays())
    assert_same(load_file(tmp_path / "model.safetensors"), some_arrays())


def test_what_the_library_writes_is_read(tmp_path):
    save_file(some_arrays(), tmp_path / "x.safetensors")
    specs = tensors.specs(tmp_path / "x.safetensors")
    assert_same({name: np.array(tensors.view(spec)) for name, spec in specs.items()}, some_arrays())


def test_shards_hold_no_more_than_they_may_and_the_index_finds_all(tmp_path):
    arrays = {f"t{i}": np.full((4, 4), i, np.float32) for i in range(7)}
    write(tmp_path, arrays, shard_bytes=3 * 64)
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == 7 * 64
    files = sorted(set(index["weight_map"].values()))
    assert files == [f"model-0000{i}-of-00003.safetensors" for i in (1, 2, 3)]
    for name, x in arrays.items():
        assert_same({name: load_file(tmp_path / index["weight_map"][name])[name]}, {name: x})


def test_a_writer_that_was_not_given_all_tensors_fails(tmp_path):
    layout = {name: (x.shape, x.dtype) for name, x in some_arrays().items()}
    with (
        pytest.raises(AssertionError, match="never written"),
        tensors.Writer(tmp_path, layout, 10**9) as writer,
    ):
        writer.put("b", some_arrays()["b"])


@pytest.mark.parametrize(
    ("left", "told"),
    [(4, "does not begin with a header"), (40, "header alone takes"), (-1, "header says")],
)
def test_a_file_that_was_cut_off_is_refused(tmp_path, left, told):
    write(tmp_path, some_arrays())
    path = tmp_path / "model.safetensors"
    path.write_bytes(path.read_bytes()[:left])
    with pytest.raises(ValueError, match=told):
        tensors.specs(path)


@pytest.mark.parametrize(
    "header",
    [
        b"no json",
        b'{"a": 3}',
        b'{"a": {"dtype": "F32", "shape": [2], "data_offsets": [8, 0]}}',
        b"[]",
    ],
)
def test_a_header_that_makes_no_sense_is_refused(tmp_path, header):
    (tmp_path / "x").write_bytes(len(header).to_bytes(8, "little") + header + bytes(8))
    with pytest.raises(ValueError, match="header is unreadable"):
        tensors.specs(tmp_path / "x")


def test_bytes_that_do_not_fit_the_shape_are_refused(tmp_path):
    header = b'{"a": {"dtype": "F32", "shape": [3], "data_offsets": [0, 8]}}'
    (tmp_path / "x").write_bytes(len(header).to_bytes(8, "little") + header + bytes(8))
    with pytest.raises(ValueError, match="do not fit its shape"):
        tensors.specs(tmp_path / "x")
