"""`jaxlm.generate`: what cannot be written is refused before a model is opened."""

import pytest

from jaxlm.generate import __main__ as command


@pytest.mark.parametrize(("place", "words"), [("", "is a folder"), ("no/file", "there is no")])
def test_an_output_that_cannot_be_written_is_refused(tmp_path, place, words):
    flags = command._flags().parse_args(["--checkpoint=x", f"--output={tmp_path}/{place}"])
    with pytest.raises(ValueError, match=words):
        command._checked(flags)
