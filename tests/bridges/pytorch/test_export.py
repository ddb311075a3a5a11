"""ONNX programs and PyTorch state dicts."""

import numpy as np
import pytest
import torch

from bridges import pytorch
from bridges.pytorch.export import save_onnx, save_state_dict
from experiments.export import largest_error
from prelnroberta.config import ARCHITECTURES
from tests.helpers.export_cases import export_case

pytestmark = pytest.mark.torch

torch.set_num_threads(1)


@pytest.mark.parametrize("model", ["base", "causal_lm", "multiple_choice", "question_answering"])
def test_onnx_matches_flax_at_any_shape(model, tmp_path):
    import onnxruntime

    params, config = export_case(model)
    twin = getattr(pytorch, ARCHITECTURES[model]).from_params(params, config)
    save_onnx(twin, tmp_path / "onnx")
    session = onnxruntime.InferenceSession(tmp_path / "onnx/model.onnx")
    names = [x.name for x in session.get_outputs()]

    def run(inputs):
        found = session.run(names, {name: np.int64(x) for name, x in inputs.items()})
        return dict(zip(names, found, strict=True))

    assert largest_error(run, params, config, model) < 2e-5
    # Choices are as free as batch and length.
    assert all(not isinstance(axis, int) for x in session.get_inputs() for axis in x.shape)


@pytest.mark.oracle
@pytest.mark.parametrize("model", ["masked_lm", "question_answering"])
def test_state_dict_loads_strictly_into_transformers(model, tmp_path):
    import transformers
    from safetensors.torch import load_file

    params, config = export_case(model)
    twin = getattr(pytorch, ARCHITECTURES[model]).from_params(params, config)
    save_state_dict(twin, tmp_path / "state_dict.safetensors")
    values = {k: v for k, v in config.to_dict().items() if k != "model_type"}
    theirs = getattr(transformers, ARCHITECTURES[model])(
        transformers.RobertaPreLayerNormConfig(**values)
    )
    theirs.load_state_dict(load_file(tmp_path / "state_dict.safetensors"), strict=True)
