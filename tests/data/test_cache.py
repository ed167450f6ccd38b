"""The cache of prepared data: errors at its door."""

import pytest

from jaxlm.data import cache as caching


def test_a_full_disk_is_said_and_leaves_nothing_behind(tmp_path):
    def build(folder):
        (folder / "half").write_text("half")
        raise RuntimeError("write() failed: No space left on device; writing half")

    with pytest.raises(ValueError, match=r"disk is full.*XDG_CACHE_HOME"):
        caching.cached(tmp_path / "records", "records of a", build, lambda *a: None)
    assert not [path for path in tmp_path.iterdir() if path.is_dir()]
