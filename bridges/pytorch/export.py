"""Export of PyTorch models to files that load without this package: a state dict, and ONNX."""

from __future__ import annotations

import logging
import warnings
from pathlib import Path

import torch
from torch import Tensor, nn

from bridges.pytorch.pretrained import PreTrainedModel
from prelnroberta.files import atomic_write

# A protobuf message holds less than 2 GiB; larger weights go into a separate file.
_MAX_PROTOBUF_BYTES = 1_900_000_000


def save_state_dict(model: PreTrainedModel, path: str | Path) -> None:
    """Writes one safetensors file with the names and shapes of transformers' torch class.

    Tied parameters are written under all their names, so that
    `load_state_dict(load_file(path), strict=True)` succeeds.
    """
    from safetensors.torch import save_file

    state = {
        name: value.detach().clone().contiguous() for name, value in model.state_dict().items()
    }
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    with atomic_write(path) as partial:
        save_file(state, partial, metadata={"format": "pt"})


class _OnnxWrapper(nn.Module):
    """A model with positional tensors as inputs and a tuple of tensors as output."""

    def __init__(self, model: PreTrainedModel, output_names: tuple[str, ...]):
        super().__init__()
        self.model, self.output_names = model, output_names

    def forward(self, input_ids: Tensor, attention_mask: Tensor, token_type_ids: Tensor) -> tuple:
        options = {"use_cache": False} if self.model.model == "causal_lm" else {}
        output = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            token_type_ids=token_type_ids,
            **options,
        )
        return tuple(output[name] for name in self.output_names)


def save_onnx(model: PreTrainedModel, directory: str | Path) -> None:
    """Writes `model.onnx` into a new directory, for any batch size and length.

    Inputs are int64 input_ids, attention_mask and token_type_ids [B, L], or [B, A, L] for multiple
    choice. Outputs are those of the class, without a loss. Requires the `onnx` extra.
    """
    from onnxscript import ir  # noqa: F401 - a clearer error than the exporter's if it is missing

    choices = (3,) if model.model == "multiple_choice" else ()
    L = min(8, model.config.max_length)
    input_ids = torch.full((3, *choices, L), model.config.bos_token_id)
    inputs = (input_ids, torch.ones_like(input_ids), torch.zeros_like(input_ids))
    with torch.no_grad():
        output_names = tuple(name for name in model(input_ids) if name != "past_key_values")
    batch = torch.export.Dim("batch", min=1)
    length = torch.export.Dim("length", min=1, max=model.config.max_length)
    axes = {0: batch, 1: length}
    if choices:
        axes = {0: batch, 1: torch.export.Dim("choices", min=1), 2: length}
    num_bytes = sum(p.numel() * p.element_size() for p in model.parameters())
    Path(directory).parent.mkdir(parents=True, exist_ok=True)
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with atomic_write(directory) as partial, warnings.catch_warnings():
            partial.mkdir()
            warnings.simplefilter("ignore")  # torch's warnings about its own code
            torch.onnx.export(
                _OnnxWrapper(model.eval(), output_names).eval(),
                inputs,
                partial / "model.onnx",
                input_names=["input_ids", "attention_mask", "token_type_ids"],
                output_names=list(output_names),
                dynamic_shapes=[axes] * 3,
                dynamo=True,
                external_data=num_bytes > _MAX_PROTOBUF_BYTES,
                verbose=False,
            )
    finally:
        logger.setLevel(level)
