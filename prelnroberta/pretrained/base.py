"""What the seven Flax* classes share: an owner of `params` around a pure module of `heads.py`.

Files, changes to parameters, checks of input on the host and the call itself, by the names and
arguments of transformers 4.57's `FlaxPreTrainedModel` (`modeling_flax_utils.py`).
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
from prelnroberta.model.encoder import EncoderOutput, Execution, TableModule
from prelnroberta.model.kv_cache import KVCache
from prelnroberta.params import Tree
from prelnroberta.pretrained import hf_checkpoint, outputs
from prelnroberta.pretrained.input_checks import (
    as_array,
    check_cache,
    check_inputs,
    check_key,
    check_labels,
)

Array = jax.Array


class FlaxRobertaPreLayerNormPreTrainedModel:
    """What the seven classes share.

    The inside is read without hooks: `output_hidden_states` gives the residual stream before and
    after each block, `output_attentions` each head's probabilities, `head_mask` silences heads, and
    `jax.grad` with respect to `inputs_embeds` attributes to tokens. `module.apply` has all of it as
    `keep_residuals` (the last one always before the final norm) and `keep_attentions`.
    `optimizer.freeze_labels` freezes parameters by patterns of their paths.

    Attributes:
        module: the pure module.
        params: its parameter tree.
        loading_info: the `hf_checkpoint.LoadingInfo` of from_pretrained.

    Args:
        config: the architecture.
        input_shape: accepted for transformers' sake; no shape is needed to make parameters.
        seed: of the initial parameters.
        dtype: of the computation: float32 or bfloat16. Parameters are float32.
        _do_init: False leaves `params` unset: make them with `init_weights`, and give them to
            each call.
        gradient_checkpointing: compute blocks again in the backward pass.
        attention: xla, cudnn or splash; see `fused_attention.py`.
    """

    config_class = RobertaPreLayerNormConfig
    base_model_prefix = "roberta_prelayernorm"
    model: ClassVar[str]
    module_class: ClassVar[type[TableModule]]
    # What from_pretrained passes on.
    options: ClassVar[frozenset[str]] = frozenset(
        {"input_shape", "gradient_checkpointing", "attention"}
    )
    # Whether past_key_values go in and come out.
    decodes: ClassVar[bool] = False

    def __init__(
        self,
        config: RobertaPreLayerNormConfig,
        input_shape: tuple[int, ...] = (1, 1),
        seed: int = 0,
        dtype: Any = jnp.float32,
        _do_init: bool = True,
        gradient_checkpointing: bool = False,
        attention: str = "xla",
    ):
        require_config(config)
        self.config = config
        self.dtype = _float_type(dtype)
        self.execution = Execution(
            dtype=self.dtype,
            remat="full" if gradient_checkpointing else "none",
            attention=attention,
        )
        self.loading_info = hf_checkpoint.LoadingInfo()
        self._last_prepared: tuple[list[Array], Tree] = ([], {})
        self._params = self.init_weights(jax.random.key(seed)) if _do_init else None

    @property
    def module(self) -> TableModule:
        """The pure module: `module.apply({"params": params}, ...)`."""
        return self.module_class(self.config, self.execution)

    @property
    def params(self) -> Tree:
        """The parameter tree, nested dicts of arrays. Setting it checks paths and shapes."""
        if self._params is None:
            raise InputError("params: made with _do_init=False, give `params` to each call")
        return self._params

    @params.setter
    def params(self, tree: Tree) -> None:
        self._params = self._checked(tree)

    def _checked(self, tree: Tree) -> Tree:
        """The tree itself, if its paths and shapes are the model's; of any floating dtype."""
        leaves = jax.tree.leaves(tree)
        if not (isinstance(tree, Mapping) and all(hasattr(leaf, "shape") for leaf in leaves)):
            raise InputError("params: expected a tree of arrays in nested dicts, as `model.params`")
        expected = parameters.float32_leaves(parameters.shapes(self.config, self.model))
        found = parameters.float32_leaves(
            {path: leaf.shape for path, leaf in parameters.flatten(tree).items()}
        )
        parameters.check_leaves(expected, found, "params")
        return tree

    def init_weights(
        self, rng: Array, input_shape: tuple[int, ...] = (1, 1), params: Tree | None = None
    ) -> Tree:
        """New parameters, with the leaves of `params` in place of theirs."""
        fresh = parameters.init(self.config, rng, self.model)
        if params is None:
            return fresh
        given = {**parameters.flatten(fresh), **parameters.flatten(params)}
        tree = parameters.unflatten(given)
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
        **changes: Any,
    ) -> Any:
        """Reads a local Hugging Face directory: safetensors, shards, or Flax msgpack.

        Parts the files lack as a whole, such as a head, get new values; parts this class has no
        place for are dropped; both are logged as a warning and kept in `loading_info`.

        Args:
            config: in place of the directory's.
            ignore_mismatched_sizes: new values for tensors of another shape, too.
            seed: of new values.
            _do_init: False returns (model, params).
            from_pt: accepted for transformers' sake; the files say what they are.
            changes: arguments of the class, or fields of the config to replace.

        Raises:
            InputError: a file that is missing or damaged; one message listing every missing,
                unexpected, mis-shaped and non-finite tensor; an unknown argument.
        """
        config, options = hf_checkpoint.resolve_config(cls, directory, config, cls.options, changes)
        model = cls(config, seed=seed, dtype=dtype, _do_init=False, **options)
        tensors, source = hf_checkpoint.read_weights(directory)
        tree, model.loading_info = hf_checkpoint.load_state_dict(
            tensors,
            config,
            model.model,
            source,
            lambda: model.init_weights(jax.random.key(seed)),
            ignore_mismatched_sizes,
        )
        hf_checkpoint.log_loading_info(model.loading_info, source, cls)
        tree = jax.device_put(tree)
        if not _do_init:
            return model, tree
        model._params = tree
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
        """A tree with floats in bfloat16, where `mask` is True."""
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
        """Grows or cuts the vocabulary: word table, output bias and untied output.

        New rows are drawn like initial ones, new biases are 0; config.vocab_size follows.

        Args:
            new_num_tokens: None: as many as there are.
            pad_to_multiple_of: round the number of rows up to one.

        Raises:
            InputError: for a number that is not one, or that cuts off the pad, bos or eos id.
        """
        V = self.config.vocab_size if new_num_tokens is None else new_num_tokens
        multiple = 1 if pad_to_multiple_of is None else pad_to_multiple_of
        for name, value in (("new_num_tokens", V), ("pad_to_multiple_of", multiple)):
            if not isinstance(value, (int, np.integer)) or value < 1:
                raise InputError(f"resize_token_embeddings: {name}={value!r}, expected an int > 0")
        V = -(-int(V) // int(multiple)) * int(multiple)
        config = self.config.replace(vocab_size=V)
        old, table = parameters.flatten(self.params), parameters.table(config, self.model)
        fresh = parameters.flatten(parameters.init(config, jax.random.key(seed), self.model))
        for path, row in table.items():
            if row.shape.startswith("V"):
                kept = old[path][:V]
                old[path] = jnp.concatenate([kept, fresh[path][len(kept) :].astype(kept.dtype)])
        self.config, self._params = config, parameters.unflatten(old)

    def prune_heads(self, heads_to_prune: Mapping[int, Sequence[int]]) -> None:
        """Takes heads out of the self-attention of layers, {layer: heads}, by setting them to 0.

        It makes nothing smaller or faster: all layers share one array, so shapes, `config` and
        saved files stay as they are (transformers 4 cut the matrices). What becomes 0 are the
        heads' values and their rows of the output projection. That is the function without them,
        after saving and loading as well; and as each of the two has a zero gradient while the
        other is 0, they stay out in training. Their attention probabilities are still reported.

        Raises:
            InputError: for a layer or head that there is not.
        """
        flat = parameters.flatten(self.params)
        N, H = self.config.num_hidden_layers, self.config.num_attention_heads
        if not isinstance(heads_to_prune, Mapping):
            raise InputError(f"prune_heads: {heads_to_prune!r}, expected {{layer: [head, ...]}}")
        for n, pruned in heads_to_prune.items():
            for head in pruned:
                if n not in range(N) or head not in range(H):
                    raise InputError(
                        f"prune_heads: layer {n!r}, head {head!r}, expected 0 to {N - 1}, "
                        f"0 to {H - 1}"
                    )
        where = np.zeros((N, H), bool)
        for n, pruned in heads_to_prune.items():
            where[n, list(pruned)] = True
        for leaf, mask in {
            "value/kernel": where[:, None, :, None],
            "value/bias": where[:, :, None],
            "output/kernel": where[:, :, None, None],
        }.items():
            path = f"encoder/layers/attention/{leaf}"
            flat[path] = jnp.where(mask, 0.0, flat[path]).astype(flat[path].dtype)
        self._params = parameters.unflatten(flat)

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
        """Runs the model. Arrays, numpy arrays or lists; shapes as in `Encoder.__call__`.

        Args:
            params: in place of the model's own.
            dropout_rng: key for dropout; needed when `train`.
            output_attentions, output_hidden_states, return_dict: None: as the config says.
            past_key_values: from `init_cache`; attention_mask is then of the new tokens alone.
            labels: masked LM, causal LM [B, L] (the latter shifted inside), token classes [B, L],
                sequence [B] or [B, C], choice [B]; -100 does not count.
            start_positions, end_positions: [B], for question answering; outside of the row does
                not count.

        Returns:
            A dataclass of `outputs.py`, or a tuple without return_dict.

        Raises:
            InputError: for whatever does not fit, before anything is computed.
        """
        named = {
            "input_ids": input_ids,
            "attention_mask": attention_mask,
            "token_type_ids": token_type_ids,
            "position_ids": position_ids,
            "head_mask": head_mask,
            "encoder_hidden_states": encoder_hidden_states,
            "encoder_attention_mask": encoder_attention_mask,
            "inputs_embeds": inputs_embeds,
            "segment_ids": segment_ids,
        }
        inputs = {name: as_array(name, value) for name, value in named.items()}
        check_inputs(self.config, inputs, rows=2 if self.model == "multiple_choice" else 1)
        if train:
            check_key("dropout_rng (which train=True needs)", dropout_rng)
        targets = self._targets(labels, start_positions, end_positions)
        if past_key_values is not None:
            if not (self.decodes and self.config.is_decoder):
                raise InputError(
                    f"past_key_values: {type(self).__name__} with "
                    f"is_decoder={self.config.is_decoder} does not decode with a cache"
                )
            check_cache(self.config, past_key_values, inputs)
        inputs["cache"] = past_key_values

        def either(given: bool | None, name: str) -> bool:
            return getattr(self.config, name) if given is None else given

        module = self.module
        tree = self.params if params is None else self._checked(params)
        keep = {
            "keep_residuals": either(output_hidden_states, "output_hidden_states"),
            "keep_attentions": either(output_attentions, "output_attentions"),
        }
        inputs = {name: value for name, value in inputs.items() if value is not None}
        rng = dropout_rng if train else None
        if targets:
            run = partial(_apply, module, **keep)
            found = jax.eval_shape(run, tree, rng, inputs)[0]
            self._check_targets(targets, found)
        head, encoded = _apply(module, self._prepared(tree), rng, inputs, **keep)
        output = self._output(head, encoded, targets)
        return output if either(return_dict, "return_dict") else output.to_tuple()

    def _prepared(self, tree: Tree) -> Tree:
        """`Execution.params_for_inference`, once for the same arrays; what is scanned, traced, numpy's or
        on several devices, as it is."""
        if self.execution.uses_scan:  # enable_gradient_checkpointing may have changed it since
            return tree
        leaves = jax.tree.leaves(tree)
        known, prepared = self._last_prepared
        if len(known) == len(leaves) and all(a is b for a, b in zip(known, leaves, strict=True)):
            return prepared
        if not all(map(_lies_on_one_device, leaves)):
            return tree
        with jax.ensure_compile_time_eval():  # a caller may be tracing something else
            self._last_prepared = leaves, self.execution.params_for_inference(tree)
        return self._last_prepared[1]

    def init_cache(self, batch_size: int, max_length: int) -> KVCache:
        """An empty cache for `past_key_values`; see `cache.py`."""
        return caches.init_cache(self.config, batch_size, max_length, self.dtype)

    def _targets(self, labels: Any, starts: Any, ends: Any) -> dict[str, Any]:
        allowed = {"base": (), "question_answering": ("start_positions", "end_positions")}
        given = {"labels": labels, "start_positions": starts, "end_positions": ends}
        given = {name: as_array(name, v) for name, v in given.items() if v is not None}
        allowed = allowed.get(self.model, ("labels",))
        for name in given:
            if name not in allowed:
                takes = " and ".join(allowed) or "no labels"
                raise InputError(f"{name}: {type(self).__name__} takes {takes}")
        if len(given) == 1 and len(allowed) == 2:
            raise InputError(f"give both of {', '.join(allowed)}, or none")
        return given

    def _check_targets(self, targets: Mapping[str, Any], logits: jax.ShapeDtypeStruct) -> None:
        check_labels(self.config, self.model, targets["labels"], logits.shape)

    def _hidden(self, encoded: EncoderOutput) -> dict[str, Any]:
        """hidden_states and attentions by transformers' names."""
        streams = encoded.residuals
        if streams is not None and self.config.tie_last_hidden_states:
            streams = (*streams[:-1], encoded.last_hidden_state)
        return {"hidden_states": streams, "attentions": encoded.attentions}

    def _output(self, logits: Array, encoded: EncoderOutput, targets: Mapping[str, Any]) -> Any:
        loss = self.loss(logits, targets["labels"]) if targets else None
        return outputs.HeadOutput(loss=loss, logits=logits, **self._hidden(encoded))

    def loss(self, logits: Array, labels: Array) -> Array:
        """[] float32: the mean over the labels that count; a finite 0 where none does."""
        return losses.label_scores(logits, jnp.asarray(labels)).mean


@partial(jax.jit, static_argnums=0, static_argnames=("keep_residuals", "keep_attentions"))
def _apply(
    module: TableModule, params: Tree, rng: Array | None, inputs: dict[str, Any], **keep: bool
) -> tuple[Any, EncoderOutput]:
    """What stands on the encoder, and the encoder's output."""
    found = module.apply(
        {"params": params},
        **inputs,
        **keep,
        deterministic=rng is None,
        rngs=None if rng is None else {"dropout": rng},
    )
    return (None, found) if isinstance(found, EncoderOutput) else found


def _lies_on_one_device(leaf: Any) -> bool:
    concrete = isinstance(leaf, jax.Array) and not isinstance(leaf, jax.core.Tracer)
    return concrete and len(leaf.sharding.device_set) == 1


def _float_type(dtype: Any) -> jnp.dtype:
    try:
        found = jnp.dtype(dtype)
    except TypeError:
        found = None
    if found is None or not jnp.issubdtype(found, jnp.floating):
        raise InputError(f"dtype={dtype!r}, expected float32 or bfloat16")
    return found


def _cast(params: Tree, dtype: Any, mask: Tree | None) -> Tree:
    def cast(leaf: Array, chosen: bool = True) -> Array:
        return leaf.astype(dtype) if chosen and jnp.issubdtype(leaf.dtype, jnp.floating) else leaf

    return jax.tree.map(cast, params) if mask is None else jax.tree.map(cast, params, mask)
