"""Base class of the seven models: conversion from and to the parameter tree, and files."""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar, Self

import torch
from torch import nn

from prelnroberta import params as parameters
from prelnroberta.config import RobertaPreLayerNormConfig, require_config
from prelnroberta.params import Tree
from prelnroberta.pretrained import hf_checkpoint


class PreTrainedModel(nn.Module):
    """A model of the parameter table whose state dict has transformers' names.

    Attributes:
        model: its name in the parameter table, such as "masked_lm".
        options: names of the constructor's arguments in addition to the config.
        loading_info: what `from_pretrained` could not take from the files.
    """

    model: str
    options: ClassVar[frozenset[str]] = frozenset()

    def __init__(self, config: RobertaPreLayerNormConfig):
        super().__init__()
        require_config(config)
        self.config = config
        self.loading_info = hf_checkpoint.LoadingInfo()

    def init_weights(self, module: nn.Module) -> None:
        """For `apply`: N(0, initializer_range) and zero biases; torch initializes norms itself."""
        if isinstance(module, (nn.Linear, nn.Embedding)):
            nn.init.normal_(module.weight, std=self.config.initializer_range)
        if isinstance(module, nn.Linear):
            nn.init.zeros_(module.bias)

    def tie_weights(self) -> None:
        """Shares the parameters that the config ties; by default there are none."""

    # Parameter tree.

    @classmethod
    def from_params(cls, params: Tree, config: RobertaPreLayerNormConfig, **options: Any) -> Self:
        """A float32 model in eval mode with a copy of the tree's values.

        Raises:
            InputError: one message listing every missing, unexpected or mis-shaped leaf.
        """
        # The meta device: no values are drawn or allocated only to be replaced.
        with torch.device("meta"):
            model = cls(config, **options)
        parameters.check(params, config, model.model)
        tensors = hf_checkpoint.to_state_dict(params, config, model.model)
        state = {name: torch.tensor(value) for name, value in tensors.items()}
        if hf_checkpoint.LM_BIAS in state:
            state[hf_checkpoint.DECODER_BIAS] = state[hf_checkpoint.LM_BIAS]
            word_embeddings = state[hf_checkpoint.WORD_EMBEDDINGS]
            state.setdefault(hf_checkpoint.DECODER_WEIGHT, word_embeddings)
        model.load_state_dict(state, assign=True)
        model.tie_weights()
        return model.eval()

    def to_params(self) -> Tree:
        """The parameter tree, float32 numpy; bit for bit the one given to `from_params`.

        Raises:
            InputError: a parameter holds NaN or infinity; names all of them.
        """
        tensors = {
            name: parameter.detach().to("cpu", torch.float32).numpy()
            for name, parameter in self.named_parameters()
        }
        return hf_checkpoint.from_state_dict(tensors, self.config, self.model, type(self).__name__)

    # Files.

    @classmethod
    def from_pretrained(
        cls,
        directory: str | Path,
        *,
        config: RobertaPreLayerNormConfig | None = None,
        dtype: torch.dtype = torch.float32,
        ignore_mismatched_sizes: bool = False,
        **changes: Any,
    ) -> Self:
        """Reads a local Hugging Face directory: safetensors, shards, or Flax msgpack.

        A part that is missing from the files as a whole, such as a head, gets new values; a part
        that this class does not have is dropped. Both are logged as a warning and listed in
        `loading_info`.

        Args:
            config: replaces the directory's.
            dtype: of the parameters.
            ignore_mismatched_sizes: also give new values to tensors of another shape.
            changes: arguments of the class, or fields of the config to replace.

        Raises:
            InputError: a missing or damaged file; missing, unexpected, mis-shaped or non-finite
                tensors, all in one message; an unknown argument.
        """
        config, options = hf_checkpoint.resolve_config(cls, directory, config, cls.options, changes)
        with torch.device("meta"):
            model_name = cls(config, **options).model
        tensors, source = hf_checkpoint.read_weights(directory)
        tree, loading_info = hf_checkpoint.load_state_dict(
            tensors,
            config,
            model_name,
            source,
            lambda: cls(config, **options).to_params(),
            ignore_mismatched_sizes,
        )
        model = cls.from_params(tree, config, **options).to(dtype)
        model.loading_info = loading_info
        hf_checkpoint.log_loading_info(loading_info, source, cls)
        return model

    def save_pretrained(self, directory: str | Path, max_shard_bytes: int = 5 * 10**9) -> None:
        """Writes config.json and float32 safetensors, which transformers 4.57 and 5 load."""
        hf_checkpoint.save_pretrained(
            directory, self.to_params(), self.config, self.model, max_shard_bytes
        )

    # Training.

    def gradient_checkpointing_enable(self) -> None:
        """Recomputes layers in the backward pass instead of storing their activations."""
        self._set_gradient_checkpointing(True)

    def gradient_checkpointing_disable(self) -> None:
        self._set_gradient_checkpointing(False)

    def _set_gradient_checkpointing(self, enabled: bool) -> None:
        for module in self.modules():
            if hasattr(module, "gradient_checkpointing"):
                module.gradient_checkpointing = enabled

    # Options.

    def _or_config(self, value: bool | None, field: str) -> bool:
        return getattr(self.config, field) if value is None else value
