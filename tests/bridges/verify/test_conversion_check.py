"""The verification of a conversion finds wrongly paired tensors."""

import pytest

from bridges.formats.detect import open_checkpoint
from bridges.verify.conversion_check import verify_conversion
from prelnroberta.errors import InputError
from prelnroberta.pretrained import hf_checkpoint
from tests.helpers.transformers_files import FILE_CONFIG, FILE_FORMS, tensors_of, write_config

pytestmark = [pytest.mark.torch, pytest.mark.tensorflow]


def test_swapped_norms_raise(tmp_path):
    """A wrong pairing survives every round trip; it does not survive being run."""
    write_config(tmp_path)
    FILE_FORMS["bin"](tmp_path, tensors_of())
    found = open_checkpoint(tmp_path)
    wrong = found.to_params()
    layers = wrong["encoder"]["layers"]
    layers["mlp_norm"], layers["attention_norm"] = layers["attention_norm"], layers["mlp_norm"]
    hf_checkpoint.save_pretrained(tmp_path / "out", wrong, FILE_CONFIG)
    with pytest.raises(InputError, match="the result is another function"):
        verify_conversion(found, found.to_params(), tmp_path / "out", None, exact=True)
