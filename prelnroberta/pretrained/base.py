"""Base class of the seven Flax* classes: holds `params` and calls a pure module of `heads.py`.

It reads and writes files, changes parameters, checks inputs on the host and runs the module. Names
and arguments are those of `FlaxPreTrainedModel` in transformers 4.57 (`modeling_flax_utils.py`).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np

from prelnroberta import params as parameters
from prelnroberta.config import RobertaPreLayerNormConfig, require_config
from prelnroberta.errors import InputError
from prelnroberta.model import kv_cache as caches
from prelnroberta.model import losses
from prelnroberta.model.attention_kernels import Attention
from prelnroberta.model.encoder import EncoderOutput, Execution, TableModule
from prelnroberta.model.kv_cache import KVCache
from prelnroberta.params import Tree
from prelnroberta.pretrained import hf_checkpoint, outputs
from prelnroberta.pretrained.input_checks import (
    as_array,
    check_cache,
    check_inputs,
    check_labels,
    check_prng_key,
)

Array = jax.Array


class FlaxRobertaPreLayerNormPreTrainedModel:
    """Base class of the seven classes.

    Internals need no hooks. `output_hidden_states` returns the residual stream before and after
    each block, `output_attentions` the probabilities of each head; `head_mask` disables heads, and
    `jax.grad` with respect to `inputs_embeds` gives attributions. `module.apply` offers the same as
    `keep_residuals` (always before the final norm) and `keep_attentions`.
    `optimizer.freeze_labels` freezes parameters by patterns of their paths.

    Attributes:
        module: the pure module.
        params: its parameter tree.
        loading_info: a `hf_checkpoint.LoadingInfo`: the tensors that from_pretrained initialized
            and those it ignored.

    Args:
        config: the architecture.
        input_shape: accepted for compatibility with transformers and ignored.
        seed: of the initial parameters.
        dtype: of the computation, float32 or bfloat16. Parameters are float32.
        _do_init: False leaves `params` unset; make them with `init_weights` and pass them to each
            call.
        gradient_checkpointing: recompute blocks in the backward pass.
        attention: xla, cudnn or splash; see `model/attention_kernels.py`.
    """

    config_class = RobertaPreLayerNormConfig
    base_model_prefix = "roberta_prelayernorm"
    model: str
    module_class: type[TableModule]
    # Arguments of the constructor that from_pretrained accepts.
    options: ClassVar[frozenset[str]] = frozenset(
        {"input_shape", "gradient_checkpointing", "attention"}
    )
    # Whether calls take and return past_key_values.
    supports_cache: ClassVar[bool] = False

    def __init__(
        self,
        config: RobertaPreLayerNormConfig,
        input_shape: tuple[int, ...] = (1, 1),
        seed: int = 0,
        dtype: Any = jnp.float32,
        _do_init: bool = True,
        gradient_checkpointing: bool = False,
        attention: Attention = "xla",
    ):
        require_config(config)
        self.config = config
        self.dtype = _floating_dtype(dtype)
        self.execution = Execution(
            dtype=self.dtype,
            remat="full" if gradient_checkpointing else "none",
            attention=attention,
        )
        self.loading_info = hf_checkpoint.LoadingInfo()
        # The leaves of a tree, and that tree in the form of `Execution.params_for_inference`.
        self._inference_params: tuple[list[Array], Tree] = ([], {})
        self._params = self.init_weights(jax.random.key(seed)) if _do_init else None

    @property
    def module(self) -> TableModule:
        """The pure module: `module.apply({"params": params}, ...)`."""
        return self.module_class(self.config, self.execution)

    @property
    def params(self) -> Tree:
        """The parameter tree, nested dicts of arrays. Setting it checks paths and shapes."""
        if self._params is None:
            raise InputError("params: made with _do_init=False, pass `params` to each call")
        return self._params

    @params.setter
    def params(self, tree: Tree) -> None:
        self._params = self._checked_params(tree)

    def _checked_params(self, tree: Tree) -> Tree:
        """The tree itself; raises InputError unless its paths and shapes are the model's. Any
        dtype is accepted."""
        leaves = jax.tree.leaves(tree)
        if not (isinstance(tree, Mapping) and all(hasattr(leaf, "shape") for leaf in leaves)):
            raise InputError(
                "params: expected a tree of arrays in nested dicts, like `model.params`"
            )
        expected = parameters.float32_leaves(parameters.shapes(self.config, self.model))
        found = parameters.float32_leaves(
            {path: leaf.shape for path, leaf in parameters.flatten(tree).items()}
        )
        parameters.check_leaves(expected, found, "params")
        return tree

    def init_weights(
        self, rng: Array, input_shape: tuple[int, ...] = (1, 1), params: Tree | None = None
    ) -> Tree:
        """New parameters, except for the leaves given in `params`."""
        initial = parameters.init(self.config, rng, self.model)
        if params is None:
            return initial
        tree = parameters.unflatten({**parameters.flatten(initial), **parameters.flatten(params)})
        parameters.check(tree, self.config, self.model)
        return tree

    def enable_gradient_checkpointing(self) -> None:
        self.execution = dataclasses.replace(self.execution, remat="full")

    def num_params(self, params: Tree | None = None) -> int:
        return sum(leaf.size for leaf in jax.tree.leaves(params or self.params))

    # Files.

    @classmethod
    def from_pretrained(
        cls,
        directory: str | Path,
        *,
        config: RobertaPreLayerNormConfig | None = None,
        dtype: Any = jnp.float32,
        ignore_mismatched_sizes: bool = False,
        seed: int = 0,
        _do_init: bool = True,
        from_pt: bool = False,
        **kwargs: Any,
    ) -> Any:
        """Reads a local Hugging Face directory: safetensors, shards, or Flax msgpack.

        Modules that the files lack completely, such as a head, are newly initialized. Modules that
        this class lacks are ignored. Both are logged as a warning and listed in `loading_info`.

        Args:
            config: overrides the directory's config.
            ignore_mismatched_sizes: also initialize tensors of another shape.
            seed: of newly initialized tensors.
            _do_init: False returns (model, params).
            from_pt: accepted for compatibility with transformers; the file type is detected.
            kwargs: arguments of the constructor, or fields of the config to replace.

        Raises:
            InputError: if a file is missing or damaged, or an argument is unknown; one message
                lists every missing, unexpected, mis-shaped and non-finite tensor.
        """
        config, options = hf_checkpoint.resolve_config(cls, directory, config, cls.options, kwargs)
        model = cls(config, seed=seed, dtype=dtype, _do_init=False, **options)
        state_dict, source = hf_checkpoint.read_weights(directory)
        params, model.loading_info = hf_checkpoint.load_state_dict(
            state_dict,
            config,
            model.model,
            source,
            lambda: model.init_weights(jax.random.key(seed)),
            ignore_mismatched_sizes,
        )
        hf_checkpoint.log_loading_info(model.loading_info, source, cls)
        params = jax.device_put(params)
        if not _do_init:
            return model, params
        model._params = params
        return model

    def save_pretrained(
        self, directory: str | Path, params: Tree | None = None, max_shard_bytes: int = 5 * 10**9
    ) -> None:
        """Writes config.json and float32 safetensors, which transformers 4.57 and 5 load."""
        tree = jax.tree.map(
            lambda leaf: np.asarray(leaf, np.float32), self.params if params is None else params
        )
        hf_checkpoint.save_pretrained(directory, tree, self.config, self.model, max_shard_bytes)

    # Changes to parameters.

    def to_bf16(self, params: Tree, mask: Tree | None = None) -> Tree:
        """Casts floating leaves to bfloat16, all or those where `mask` is True."""
        return _cast(params, jnp.bfloat16, mask)

    def to_fp16(self, params: Tree, mask: Tree | None = None) -> Tree:
        return _cast(params, jnp.float16, mask)

    def to_fp32(self, params: Tree, mask: Tree | None = None) -> Tree:
        return _cast(params, jnp.float32, mask)

    def resize_token_embeddings(
        self,
        new_num_tokens: int | None = None,
        pad_to_multiple_of: int | None = None,
        seed: int = 0,
    ) -> None:
        """Grows or shrinks the vocabulary: word table, output bias and untied output.

        New rows are initialized like a new model's, new biases to 0. Updates config.vocab_size.

        Args:
            new_num_tokens: the new vocabulary size; None: the current one.
            pad_to_multiple_of: round the size up to a multiple of this.
            seed: of the new rows.

        Raises:
            InputError: if an argument is not a positive int, or the new vocabulary lacks the pad,
                bos or eos id.
        """
        V = self.config.vocab_size if new_num_tokens is None else new_num_tokens
        multiple = 1 if pad_to_multiple_of is None else pad_to_multiple_of
        for name, value in (("new_num_tokens", V), ("pad_to_multiple_of", multiple)):
            if not isinstance(value, (int, np.integer)) or value < 1:
                raise InputError(f"resize_token_embeddings: {name}={value!r}, expected an int > 0")
        V = -(-int(V) // int(multiple)) * int(multiple)
        config = self.config.replace(vocab_size=V)
        leaves, table = parameters.flatten(self.params), parameters.table(config, self.model)
        initial = parameters.flatten(parameters.init(config, jax.random.key(seed), self.model))
        for path, row in table.items():
            if row.shape.startswith("V"):
                kept = leaves[path][:V]
                added = initial[path][len(kept) :].astype(kept.dtype)
                leaves[path] = jnp.concatenate([kept, added])
        self.config, self._params = config, parameters.unflatten(leaves)

    def prune_heads(self, heads_to_prune: Mapping[int, Sequence[int]]) -> None:
        """Removes heads from the self-attention of layers by setting their parameters to 0.

        This makes nothing smaller or faster: layers share stacked arrays, so shapes, `config` and
        saved files keep their sizes (transformers 4 cut the matrices). The heads' values and their
        rows of the output projection become 0, which removes the heads from the function, also
        after saving and loading. They stay removed in training, because each of the two has a zero
        gradient while the other is 0. Their attention probabilities are still returned.

        Args:
            heads_to_prune: {layer: [head, ...]}.

        Raises:
            InputError: for a layer or head that does not exist.
        """
        leaves = parameters.flatten(self.params)
        N, H = self.config.num_hidden_layers, self.config.num_attention_heads
        pruned = _pruned_heads(heads_to_prune, N, H)
        for leaf, mask in {
            "value/kernel": pruned[:, None, :, None],
            "value/bias": pruned[:, :, None],
            "output/kernel": pruned[:, :, None, None],
        }.items():
            path = f"encoder/layers/attention/{leaf}"
            leaves[path] = jnp.where(mask, 0.0, leaves[path]).astype(leaves[path].dtype)
        self._params = parameters.unflatten(leaves)

    # The forward pass.

    def __call__(
        self,
        input_ids: Any = None,
        attention_mask: Any = None,
        token_type_ids: Any = None,
        position_ids: Any = None,
        head_mask: Any = None,
        encoder_hidden_states: Any = None,
        encoder_attention_mask: Any = None,
        params: Tree | None = None,
        dropout_rng: Array | None = None,
        train: bool = False,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        past_key_values: KVCache | None = None,
        *,
        labels: Any = None,
        start_positions: Any = None,
        end_positions: Any = None,
        inputs_embeds: Any = None,
        segment_ids: Any = None,
    ) -> Any:
        """Runs the model. Takes jax or numpy arrays or lists; shapes as in `Encoder.__call__`.

        Args:
            params: used instead of the model's own.
            dropout_rng: a jax PRNG key, required if `train`.
            train: apply dropout.
            output_attentions, output_hidden_states, return_dict: None: as in the config.
            past_key_values: from `init_cache`; attention_mask then covers the new tokens only.
            labels: [B, L] for masked LM, causal LM (shifted inside) and token classification; [B]
                or [B, C] for sequence classification; [B] for multiple choice. -100 is ignored.
            start_positions, end_positions: [B], for question answering; positions outside of the
                row are ignored.

        Returns:
            A dataclass of `outputs.py`, or a tuple if return_dict is False.

        Raises:
            InputError: for arguments that do not fit, before anything is computed.
        """
        inputs = self._checked_inputs(
            input_ids=input_ids,
            attention_mask=attention_mask,
            token_type_ids=token_type_ids,
            position_ids=position_ids,
            head_mask=head_mask,
            encoder_hidden_states=encoder_hidden_states,
            encoder_attention_mask=encoder_attention_mask,
            inputs_embeds=inputs_embeds,
            segment_ids=segment_ids,
        )
        if train:
            check_prng_key("dropout_rng (which train=True needs)", dropout_rng)
        targets = self._collect_targets(
            labels=labels, start_positions=start_positions, end_positions=end_positions
        )
        if past_key_values is not None:
            self._check_cache(past_key_values, inputs)
            inputs["cache"] = past_key_values
        params = self.params if params is None else self._checked_params(params)
        if targets:
            embeds = inputs.get("inputs_embeds")
            self._check_targets(targets, (inputs["input_ids"] if embeds is None else embeds).shape)
        head, encoded = _apply(
            self.module,
            self._params_for_inference(params),
            dropout_rng if train else None,
            inputs,
            keep_residuals=self._or_config(output_hidden_states, "output_hidden_states"),
            keep_attentions=self._or_config(output_attentions, "output_attentions"),
        )
        output = self._make_output(head, encoded, targets)
        return output if self._or_config(return_dict, "return_dict") else output.to_tuple()

    def _or_config(self, value: bool | None, field: str) -> bool:
        return getattr(self.config, field) if value is None else value

    def _checked_inputs(self, **inputs: Any) -> dict[str, Any]:
        """The inputs as arrays, without those that are None."""
        arrays = {name: as_array(name, value) for name, value in inputs.items()}
        check_inputs(self.config, arrays, batch_axes=2 if self.model == "multiple_choice" else 1)
        return {name: array for name, array in arrays.items() if array is not None}

    def _check_cache(self, cache: KVCache, inputs: Mapping[str, Any]) -> None:
        if not (self.supports_cache and self.config.is_decoder):
            raise InputError(
                f"past_key_values: {type(self).__name__} with "
                f"is_decoder={self.config.is_decoder} does not decode with a cache"
            )
        check_cache(self.config, cache, inputs)

    def _params_for_inference(self, params: Tree) -> Tree:
        """`Execution.params_for_inference`, computed once for the same arrays.

        Returns the tree unchanged if layers are scanned, or if its leaves are traced, numpy arrays
        or on several devices.
        """
        if self.execution.uses_scan:  # enable_gradient_checkpointing may have changed it
            return params
        leaves = jax.tree.leaves(params)
        known, converted = self._inference_params
        if len(known) == len(leaves) and all(a is b for a, b in zip(known, leaves, strict=True)):
            return converted
        if not all(map(_is_on_one_device, leaves)):
            return params
        with jax.ensure_compile_time_eval():  # a caller may be tracing something else
            self._inference_params = leaves, self.execution.params_for_inference(params)
        return self._inference_params[1]

    def init_cache(self, batch_size: int, max_length: int) -> KVCache:
        """An empty cache for `past_key_values`; see `model/kv_cache.py`."""
        return caches.init_cache(self.config, batch_size, max_length, self.dtype)

    def _collect_targets(self, **targets: Any) -> dict[str, Any]:
        """The targets as arrays, without those that are None; checks their names."""
        given = {name: as_array(name, v) for name, v in targets.items() if v is not None}
        expected = {
            "encoder": (),
            "base": (),
            "question_answering": ("start_positions", "end_positions"),
        }.get(self.model, ("labels",))
        for name in given:
            if name not in expected:
                accepted = " and ".join(expected) or "no labels"
                raise InputError(f"{name}: {type(self).__name__} takes {accepted}")
        if len(given) == 1 and len(expected) == 2:
            raise InputError(f"give both of {', '.join(expected)}, or none")
        return given

    def _check_targets(self, targets: Mapping[str, Any], input_shape: tuple[int, ...]) -> None:
        check_labels(self.config, self.model, targets["labels"], input_shape)

    def _hidden_fields(self, encoded: EncoderOutput) -> dict[str, Any]:
        """hidden_states and attentions, as transformers names them."""
        hidden_states = encoded.residuals
        if hidden_states is not None and self.config.tie_last_hidden_states:
            hidden_states = (*hidden_states[:-1], encoded.last_hidden_state)
        return {"hidden_states": hidden_states, "attentions": encoded.attentions}

    def _make_output(
        self, logits: Array, encoded: EncoderOutput, targets: Mapping[str, Any]
    ) -> Any:
        loss = self.loss(logits, targets["labels"]) if targets else None
        return outputs.HeadOutput(loss=loss, logits=logits, **self._hidden_fields(encoded))

    def loss(self, logits: Array, labels: Array) -> Array:
        """[] float32: the mean over labels that are not ignored; 0 if all are."""
        return losses.label_scores(logits, jnp.asarray(labels)).mean


@partial(jax.jit, static_argnums=0, static_argnames=("keep_residuals", "keep_attentions"))
def _apply(
    module: TableModule, params: Tree, rng: Array | None, inputs: dict[str, Any], **keep: bool
) -> tuple[Any, EncoderOutput]:
    """The output of the head, None for the bare encoder, and that of the encoder."""
    output: Any = module.apply(
        {"params": params},
        **{**inputs, **keep},
        deterministic=rng is None,
        rngs=None if rng is None else {"dropout": rng},
    )
    return (None, output) if isinstance(output, EncoderOutput) else output


def _pruned_heads(heads_to_prune: Mapping[int, Sequence[int]], N: int, H: int) -> np.ndarray:
    """[N, H] bool; raises InputError for a layer or head that does not exist."""
    if not isinstance(heads_to_prune, Mapping):
        raise InputError(f"prune_heads: {heads_to_prune!r}, expected {{layer: [head, ...]}}")
    pruned = np.zeros((N, H), bool)
    for layer, layer_heads in heads_to_prune.items():
        for head in layer_heads:
            if layer not in range(N) or head not in range(H):
                raise InputError(
                    f"prune_heads: layer {layer!r}, head {head!r}, expected 0 to {N - 1}, "
                    f"0 to {H - 1}"
                )
        pruned[layer, list(layer_heads)] = True
    return pruned


def _is_on_one_device(leaf: Any) -> bool:
    is_concrete = isinstance(leaf, jax.Array) and not isinstance(leaf, jax.core.Tracer)
    return is_concrete and len(leaf.sharding.device_set) == 1


def _floating_dtype(dtype: Any) -> jnp.dtype:
    try:
        resolved = jnp.dtype(dtype)
    except TypeError:
        resolved = None
    if resolved is None or not jnp.issubdtype(resolved, jnp.floating):
        raise InputError(f"dtype={dtype!r}, expected float32 or bfloat16")
    return resolved


def _cast(params: Tree, dtype: Any, mask: Tree | None) -> Tree:
    def cast(leaf: Array, selected: bool = True) -> Array:
        return leaf.astype(dtype) if selected and jnp.issubdtype(leaf.dtype, jnp.floating) else leaf

    return jax.tree.map(cast, params) if mask is None else jax.tree.map(cast, params, mask)
