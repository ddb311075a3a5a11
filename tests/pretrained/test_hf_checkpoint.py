"""Hugging Face directories: the name table, both ways, against transformers 5 itself."""

import numpy as np
import pytest

from prelnroberta import params as parameters
from prelnroberta.errors import InputError
from prelnroberta.pretrained.hf_checkpoint import (
    from_state_dict,
    load_pretrained,
    save_pretrained,
    to_state_dict,
)
from tests.helpers.small_models import ODD, TINY, random_params

CONFIGS = {"tied": TINY, "untied": ODD}


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_params_round_trip_bit_for_bit(config, tmp_path):
    params = random_params(config)
    save_pretrained(tmp_path, params, config)
    back, config_back = load_pretrained(tmp_path)
    assert config_back.replace(extra={}) == config
    expected = parameters.flatten(params)
    for path, leaf in parameters.flatten(back).items():
        np.testing.assert_array_equal(leaf, expected[path], err_msg=path)


def test_all_differences_are_listed_in_one_error():
    tensors = to_state_dict(random_params(TINY), TINY)
    del tensors["lm_head.dense.weight"]
    tensors["lm_head.dens.weight"] = np.zeros((2, 2), np.float32)
    tensors["lm_head.bias"] = np.zeros((7,), np.float32)
    with pytest.raises(InputError) as error:
        from_state_dict(tensors, TINY, source="here")
    for part in (
        "missing lm_head.dense.weight float32[32, 32]",
        "unexpected lm_head.dens.weight (nearest: lm_head.dense.weight)",
        "lm_head.bias is float32[7], expected float32[512]",
    ):
        assert part in str(error.value)


def test_nan_raises_with_tensor_name():
    tensors = to_state_dict(random_params(TINY), TINY)
    tensors["lm_head.bias"][3] = np.nan
    with pytest.raises(InputError, match=r"NaN or infinity in lm_head\.bias"):
        from_state_dict(tensors, TINY)


def test_corrupt_files_raise_one_line(tmp_path):
    save_pretrained(tmp_path, random_params(TINY), TINY)
    path = tmp_path / "model.safetensors"
    whole = path.read_bytes()
    for damaged in (whole[: len(whole) // 2], whole[:5], b"not a tensor file"):
        path.write_bytes(damaged)
        with pytest.raises(InputError, match=r"model\.safetensors.*damaged") as error:
            load_pretrained(tmp_path)
        assert "\n" not in str(error.value)
    path.unlink()
    with pytest.raises(InputError, match=r"model\.safetensors: no such file"):
        load_pretrained(tmp_path)
