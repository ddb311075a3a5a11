"""Files of a PyTorch twin that need none of our code: a state dict, and ONNX."""

from __future__ import annotations

import logging
import warnings
from pathlib import Path

import torch
from torch import Tensor, nn

from bridges.pytorch.pretrained import PreTrained
from prelnroberta.files import written_whole

# One protobuf message holds less than 2 GiB: larger weights go into a file beside it.
_PROTOBUF_BYTES = 1_900_000_000


def save_state_dict(model: PreTrained, path: str | Path) -> None:
    """Writes one safetensors file whose names and shapes are those of transformers' torch class.

    Tied names are all written, so that `load_state_dict(load_file(path), strict=True)` fits.
    """
    from safetensors.torch import save_file

    state = {
        name: value.detach().clone().contiguous() for name, value in model.state_dict().items()
    }
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    with written_whole(path) as partial:
        save_file(state, partial, metadata={"format": "pt"})


class _Named(nn.Module):
    """A twin as ONNX wants one: tensors by position in, a tuple of tensors out."""

    def __init__(self, model: PreTrained, names: tuple[str, ...]):
        super().__init__()
        self.model, self.names = model, names

    def forward(self, input_ids: Tensor, attention_mask: Tensor, token_type_ids: Tensor) -> tuple:
        options = {"use_cache": False} if self.model.model == "causal_lm" else {}
        output = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            token_type_ids=token_type_ids,
            **options,
        )
        return tuple(output[name] for name in self.names)


def save_onnx(model: PreTrained, directory: str | Path) -> None:
    """Writes `model.onnx` into a new directory: any batch and length.

    Inputs are int64 input_ids, attention_mask and token_type_ids [B, L], or [B, C, L] of choices;
    outputs are those of the class, without a loss. Needs the `onnx` extra.
    """
    from onnxscript import ir  # noqa: F401 - torch's exporter says less clearly that it is absent

    choices = (3,) if model.model == "multiple_choice" else ()
    L = min(8, model.config.max_length)
    rows = torch.full((3, *choices, L), model.config.bos_token_id)
    inputs = (rows, torch.ones_like(rows), torch.zeros_like(rows))
    with torch.no_grad():
        names = tuple(model(*inputs[:1]).keys())
    names = tuple(name for name in names if name != "past_key_values")
    batch = torch.export.Dim("batch", min=1)
    length = torch.export.Dim("length", min=1, max=model.config.max_length)
    axes = {0: batch, 1: length}
    if choices:
        axes = {0: batch, 1: torch.export.Dim("choices", min=1), 2: length}
    large = sum(p.numel() * p.element_size() for p in model.parameters()) > _PROTOBUF_BYTES
    Path(directory).parent.mkdir(parents=True, exist_ok=True)
    quiet = logging.getLogger("torch.onnx")
    level = quiet.level
    quiet.setLevel(logging.ERROR)
    try:
        with written_whole(directory) as partial, warnings.catch_warnings():
            partial.mkdir()
            warnings.simplefilter("ignore")  # of torch, about itself
            torch.onnx.export(
                _Named(model.eval(), names).eval(),
                inputs,
                partial / "model.onnx",
                input_names=["input_ids", "attention_mask", "token_type_ids"],
                output_names=list(names),
                dynamic_shapes=[axes] * 3,
                dynamo=True,
                external_data=large,
                verbose=False,
            )
    finally:
        quiet.setLevel(level)
