"""What the seven classes share: parameters from and to the tree, files, checks of their input."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar, Self

import numpy as np
import torch
from torch import Tensor, nn

from bridges.pytorch.kv_cache import Cache
from bridges.pytorch.unpadding import Packing
from prelnroberta import params as parameters
from prelnroberta.config import RobertaPreLayerNormConfig, require_config
from prelnroberta.errors import InputError
from prelnroberta.params import Tree
from prelnroberta.pretrained import hf_checkpoint
from prelnroberta.pretrained.input_checks import check_inputs

_WORD = "roberta_prelayernorm.embeddings.word_embeddings.weight"


class PreTrained(nn.Module):
    """A module that is a model of the parameter table; its state dict has transformers' names.

    Attributes:
        model: which of `prelnroberta.params.MODELS` it is.
        options: what its constructor takes beside the config.
    """

    model: str
    options: ClassVar[frozenset[str]] = frozenset()

    def __init__(self, config: RobertaPreLayerNormConfig):
        super().__init__()
        require_config(config)
        self.config = config
        self.swapped = hf_checkpoint.Swapped()

    def initial_values(self, module: nn.Module) -> None:
        """For `apply`: N(0, initializer_range), zero biases; norms are made as 1 and 0."""
        if isinstance(module, (nn.Linear, nn.Embedding)):
            nn.init.normal_(module.weight, std=self.config.initializer_range)
        if isinstance(module, nn.Linear):
            nn.init.zeros_(module.bias)

    def tie(self) -> None:
        """Makes one parameter of what the config ties; nothing, where there is no such."""

    # The parameter tree.

    @classmethod
    def from_params(cls, params: Tree, config: RobertaPreLayerNormConfig, **options: Any) -> Self:
        """The model with the values of a tree, copied, float32, in eval mode.

        Raises:
            InputError: one message listing every missing, unexpected or mis-shaped leaf.
        """
        # On the meta device nothing is drawn, and nothing allocated, to be thrown away.
        with torch.device("meta"):
            model = cls(config, **options)
        parameters.check(params, config, model.model)
        tensors = hf_checkpoint.to_tensors(params, config, model.model)
        state = {name: torch.tensor(value) for name, value in tensors.items()}
        if "lm_head.bias" in state:
            state["lm_head.decoder.bias"] = state["lm_head.bias"]
            state.setdefault("lm_head.decoder.weight", state[_WORD])
        model.load_state_dict(state, assign=True)
        model.tie()
        return model.eval()

    def to_params(self) -> Tree:
        """The parameter tree, float32 numpy: to the bit what `from_params` was given.

        Raises:
            InputError: naming every parameter that holds NaN or infinity.
        """
        tensors = {
            name: parameter.detach().to("cpu", torch.float32).numpy()
            for name, parameter in self.named_parameters()
        }
        return hf_checkpoint.from_tensors(tensors, self.config, self.model, type(self).__name__)

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

        Parts the files lack as a whole, such as a head, get new values; parts this class has no
        place for are dropped; both are logged as a warning and kept in `swapped`.

        Args:
            config: in place of the directory's.
            dtype: of the parameters.
            ignore_mismatched_sizes: new values for tensors of another shape, too.
            changes: arguments of the class, or fields of the config to replace.

        Raises:
            InputError: a file that is missing or damaged; one message listing every missing,
                unexpected, mis-shaped and non-finite tensor; an unknown argument.
        """
        config, options = hf_checkpoint.open_directory(cls, directory, config, cls.options, changes)
        with torch.device("meta"):
            name = cls(config, **options).model
        tensors, source = hf_checkpoint.read_weights(directory)
        tree, swapped = hf_checkpoint.read_tensors(
            tensors,
            config,
            name,
            source,
            lambda: cls(config, **options).to_params(),
            ignore_mismatched_sizes,
        )
        model = cls.from_params(tree, config, **options).to(dtype)
        model.swapped = swapped
        hf_checkpoint.report_swapped(swapped, source, cls)
        return model

    def save_pretrained(self, directory: str | Path, max_shard_bytes: int = 5 * 10**9) -> None:
        """Writes config.json and float32 safetensors, which transformers 4.57 and 5 load."""
        hf_checkpoint.save_pretrained(
            directory, self.to_params(), self.config, self.model, max_shard_bytes
        )

    # Training.

    def gradient_checkpointing_enable(self) -> None:
        """Computes layers again in the backward pass instead of storing what is in them."""
        self._checkpoint(True)

    def gradient_checkpointing_disable(self) -> None:
        self._checkpoint(False)

    def _checkpoint(self, on: bool) -> None:
        for module in self.modules():
            if hasattr(module, "gradient_checkpointing"):
                module.gradient_checkpointing = on

    # Input.

    def setting(self, given: bool | None, name: str) -> bool:
        return getattr(self.config, name) if given is None else given

    def check(
        self,
        inputs: Mapping[str, Tensor | None],
        cache: Cache | None = None,
        caches: bool = False,
        rows: int = 1,
    ) -> None:
        """Holds inputs to the config and to each other; see `prelnroberta.pretrained.input_checks`.

        Args:
            caches: whether a cache is given or made.
            rows: how many axes come before L: 1 is [B, L], 2 is [B, C, L].
        """
        if not values_can_be_read():
            return
        host = {name: on_host(name, value) for name, value in inputs.items() if value is not None}
        masks = [value for name, value in host.items() if name.endswith("attention_mask")]
        if caches and any(mask.ndim != 2 for mask in masks):
            raise InputError("a cache takes masks of two axes, [B, L] and [B, S]")
        ids, mask = host.get("input_ids", host.get("inputs_embeds")), host.get("attention_mask")
        if cache is None:
            check_inputs(self.config, host, rows)
            return
        if not self.config.is_decoder:
            raise InputError("past_key_values: config has is_decoder=False, nothing is cached")
        if mask is not None and ids is not None and mask.shape[1] == cache.columns + ids.shape[1]:
            host["attention_mask"] = mask[:, cache.columns :]
        check_inputs(self.config, host, rows)
        if "position_ids" not in host:
            real = np.ones(ids.shape[:2], bool)
            if "input_ids" in host:
                real = ids != self.config.pad_token_id
            counts = on_host("past_key_values", cache.count) + real.sum(-1)
            self.config.check_length(int(counts.max()), "a row and what is cached of it")

    def packing(
        self, mask: Tensor | None, reads_first: bool, unserved: Mapping[str, bool]
    ) -> Packing | None:
        """Where the real tokens are; None if there is nothing to skip."""
        asked = [name for name, is_asked in unserved.items() if is_asked]
        if asked:
            raise InputError(f"skip_padding: does not go with {', '.join(asked)}")
        if mask is None or bool(mask.all()):
            return None
        if mask.ndim != 2:
            raise InputError(f"skip_padding: attention_mask has {mask.ndim} axes, expected [B, L]")
        if reads_first and not bool(mask[:, 0].all()):
            raise InputError(
                "skip_padding: a row begins with padding, where this model reads the row: pad on "
                "the right"
            )
        return Packing.of(mask)


def values_can_be_read() -> bool:
    """Not in a program that is being traced: what they were would be part of it."""
    return not (torch.compiler.is_compiling() or torch.jit.is_tracing())


def on_host(name: str, value: Any) -> np.ndarray:
    """A tensor as numpy; where its values are out of sight, zeros of its shape and kind.

    Out of sight are those of another device, which should not wait for checks, and of functorch.
    """
    if not isinstance(value, Tensor):
        raise InputError(f"{name} is a {type(value).__name__}, expected a torch.Tensor")
    try:
        return value.detach().numpy()
    except (RuntimeError, TypeError):
        kind = np.float32 if value.is_floating_point() else np.int64
        return np.broadcast_to(np.zeros((), kind), tuple(value.shape))
