"""The seven Flax* classes: owners of `params` around the pure modules of `heads.py`.

Names, arguments and outputs are those of transformers 4.57's Flax classes
(`modeling_flax_roberta_prelayernorm.py`), and more: every class takes `labels` and
`inputs_embeds`, decodes with a cache, and checks its input on the host. All that is computed is
in `module`, which can be used alone under jit, grad, vmap and pmap.
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np

from prelnroberta import cache as caches
from prelnroberta import heads, huggingface, outputs
from prelnroberta import params as parameters
from prelnroberta.cache import Cache
from prelnroberta.config import RobertaPreLayerNormConfig
from prelnroberta.errors import InputError
from prelnroberta.inputs import as_array, check_inputs, check_integers, check_labels
from prelnroberta.modeling import Encoder, EncoderOutput, Execution, TableModule, read_encoder
from prelnroberta.params import Tree

Array = jax.Array
_log = logging.getLogger(__name__)


class FlaxRobertaPreLayerNormPreTrainedModel:
    """What the seven classes share.

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
        if not isinstance(config, RobertaPreLayerNormConfig):
            raise InputError(
                f"config is a {type(config).__name__}, expected a RobertaPreLayerNormConfig"
            )
        self.config = config
        self.dtype = jnp.dtype(dtype)
        self.execution = Execution(
            dtype=self.dtype,
            remat="full" if gradient_checkpointing else "none",
            attention=attention,
        )
        self.swapped = huggingface.Swapped()
        self._params = self.init_weights(jax.random.key(seed)) if _do_init else None

    @property
    def module(self) -> TableModule:
        """The pure module: `module.apply({"params": params}, ...)`."""
        return self.module_class(self.config, self.execution)

    @property
    def params(self) -> Tree:
        """The parameter tree. Setting it checks paths and shapes."""
        if self._params is None:
            raise InputError("params: made with _do_init=False, give `params` to each call")
        return self._params

    @params.setter
    def params(self, tree: Tree) -> None:
        expected = parameters.float32_leaves(parameters.shapes(self.config, self.model))
        found = parameters.flatten(tree)
        as_float32 = {
            path: jax.ShapeDtypeStruct(leaf.shape, jnp.float32) for path, leaf in found.items()
        }
        parameters.check_leaves(expected, as_float32, "params")
        self._params = tree

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
        **changes: Any,
    ) -> Any:
        """Reads a local Hugging Face directory: safetensors, shards, or Flax msgpack.

        Parts the files lack as a whole, such as a head, get new values; parts this class has no
        place for are dropped; both are logged as a warning and kept in `swapped`.

        Args:
            config: in place of the directory's.
            ignore_mismatched_sizes: new values for tensors of another shape, too.
            seed: of new values.
            _do_init: False returns (model, params).
            changes: arguments of the class, or fields of the config to replace.

        Raises:
            InputError: a file that is missing or damaged; one message listing every missing,
                unexpected, mis-shaped and non-finite tensor; an unknown argument.
        """
        directory = Path(directory)
        if not directory.is_dir():
            raise InputError(
                f"{directory}: no such directory, expected one with config.json and the weights "
                "(hub names are not downloaded)"
            )
        if config is None:
            config = RobertaPreLayerNormConfig.from_json(directory)
        fields = {field.name for field in dataclasses.fields(config)} - {"extra"}
        own = {"gradient_checkpointing", "attention", "add_pooling_layer", "input_shape"}
        unknown = changes.keys() - fields - own
        if unknown:
            raise InputError(f"from_pretrained: unknown argument {', '.join(sorted(unknown))}")
        config = config.replace(**{k: v for k, v in changes.items() if k in fields})
        options = {k: v for k, v in changes.items() if k in own}
        model = cls(config, seed=seed, dtype=dtype, _do_init=False, **options)
        tensors, source = huggingface.read_weights(directory)
        tree, model.swapped = huggingface.read_tensors(
            tensors,
            config,
            model.model,
            source,
            lambda: model.init_weights(jax.random.key(seed)),
            ignore_mismatched_sizes,
        )
        if str(model.swapped):
            _log.warning("%s into %s: %s", source, cls.__name__, model.swapped)
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
        huggingface.save_pretrained(directory, tree, self.config, self.model, max_shard_bytes)

    # Changes to parameters.

    def to_bf16(self, params: Tree, mask: Tree | None = None) -> Tree:
        """A tree with floats in bfloat16, where `mask` is True."""
        return _cast(params, jnp.bfloat16, mask)

    def to_fp16(self, params: Tree, mask: Tree | None = None) -> Tree:
        return _cast(params, jnp.float16, mask)

    def to_fp32(self, params: Tree, mask: Tree | None = None) -> Tree:
        return _cast(params, jnp.float32, mask)

    def resize_token_embeddings(
        self, new_num_tokens: int, pad_to_multiple_of: int | None = None, seed: int = 0
    ) -> None:
        """Grows or cuts the vocabulary: word table, output bias and untied output.

        New rows are drawn like initial ones, new biases are 0; config.vocab_size follows.

        Args:
            pad_to_multiple_of: round the number of rows up to one.
        """
        V = -(-new_num_tokens // (pad_to_multiple_of or 1)) * (pad_to_multiple_of or 1)
        config = self.config.replace(vocab_size=V)
        old, table = parameters.flatten(self.params), parameters.table(config, self.model)
        fresh = parameters.flatten(parameters.init(config, jax.random.key(seed), self.model))
        for path, row in table.items():
            if row.shape.startswith("V"):
                kept = old[path][:V]
                old[path] = jnp.concatenate([kept, fresh[path][len(kept) :].astype(kept.dtype)])
        self.config, self._params = config, parameters.unflatten(old)

    def prune_heads(self, heads_to_prune: Mapping[int, Sequence[int]]) -> None:
        """Takes heads out of layers: {layer: heads}.

        Their values and outputs become 0, which is the function without them; and since each has
        a zero gradient while the other is 0, they stay out in training. Shapes stay, because all
        layers share one array.
        """
        flat = parameters.flatten(self.params)
        N, H = self.config.num_hidden_layers, self.config.num_attention_heads
        for n, pruned in heads_to_prune.items():
            for head in pruned:
                if not (0 <= n < N and 0 <= head < H):
                    raise InputError(
                        f"prune_heads: layer {n}, head {head}, expected 0 to {N - 1}, 0 to {H - 1}"
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
        past_key_values: Cache | None = None,
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
        if train and dropout_rng is None:
            raise InputError("train=True needs dropout_rng, a jax PRNG key")
        targets = self._targets(labels, start_positions, end_positions)
        inputs["cache"] = past_key_values
        if past_key_values is not None:
            self._check_room(past_key_values, inputs)

        def either(given: bool | None, name: str) -> bool:
            return getattr(self.config, name) if given is None else given

        module = self.module
        tree = self.params if params is None else params
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
        head, encoded = _apply(module, tree, rng, inputs, **keep)
        output = self._output(head, encoded, targets)
        return output if either(return_dict, "return_dict") else output.to_tuple()

    def init_cache(self, batch_size: int, max_length: int) -> Cache:
        """An empty cache for `past_key_values`; see `cache.py`."""
        return caches.init_cache(self.config, batch_size, max_length, self.dtype)

    def _check_room(self, cache: Cache, inputs: Mapping[str, Any]) -> None:
        new = inputs["input_ids"] if inputs["input_ids"] is not None else inputs["inputs_embeds"]
        if not isinstance(cache["index"], jax.core.Tracer):
            used, columns = int(cache["index"]), cache["valid"].shape[1]
            if used + new.shape[1] > columns:
                raise InputError(
                    f"past_key_values has {columns} columns, {used} used: no room for "
                    f"{new.shape[1]} more; call init_cache with a larger max_length"
                )
            if inputs["position_ids"] is None and not isinstance(new, jax.core.Tracer):
                real = np.ones(new.shape[:2], int)
                if inputs["input_ids"] is not None:
                    real = np.asarray(new) != self.config.pad_token_id
                counts = np.asarray(cache["count"]) + real.sum(-1)
                self.config.check_length(int(counts.max()))

    def _targets(self, labels: Any, starts: Any, ends: Any) -> dict[str, Any]:
        allowed = {"base": (), "question_answering": ("start_positions", "end_positions")}
        given = {"labels": labels, "start_positions": starts, "end_positions": ends}
        given = {name: as_array(name, v) for name, v in given.items() if v is not None}
        allowed = allowed.get(self.model, ("labels",))
        for name in given:
            if name not in allowed:
                raise InputError(f"{name}: {type(self).__name__} takes {allowed or 'no labels'}")
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
        return heads.label_scores(logits, jnp.asarray(labels)).mean


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


def _cast(params: Tree, dtype: Any, mask: Tree | None) -> Tree:
    def cast(leaf: Array, chosen: bool = True) -> Array:
        return leaf.astype(dtype) if chosen and jnp.issubdtype(leaf.dtype, jnp.floating) else leaf

    return jax.tree.map(cast, params) if mask is None else jax.tree.map(cast, params, mask)


class FlaxRobertaPreLayerNormModel(FlaxRobertaPreLayerNormPreTrainedModel):
    """The encoder (or decoder) and, unless add_pooling_layer is False, its pooler."""

    def __init__(
        self, config: RobertaPreLayerNormConfig, *args: Any, add_pooling_layer: bool = True, **named
    ):
        self.model = "base" if add_pooling_layer else "encoder"
        self.module_class = heads.Base if add_pooling_layer else Encoder
        super().__init__(config, *args, **named)

    def _output(
        self, pooled: Array | None, encoded: EncoderOutput, targets: Mapping[str, Any]
    ) -> outputs.BaseModelOutput:
        return outputs.BaseModelOutput(
            last_hidden_state=encoded.last_hidden_state,
            pooler_output=pooled,
            past_key_values=encoded.cache,
            cross_attentions=encoded.cross_attentions,
            **self._hidden(encoded),
        )


class FlaxRobertaPreLayerNormForMaskedLM(FlaxRobertaPreLayerNormPreTrainedModel):
    model = "masked_lm"
    module_class = heads.MaskedLM


@dataclasses.dataclass(frozen=True)
class _Decoder:
    """One decoding step as `generation.Decode`: equal for equal modules, so it compiles once."""

    module: heads.CausalLM

    def __call__(
        self, params: Tree, input_ids: Array, attention_mask: Array, cache: Cache
    ) -> tuple[Array, Cache]:
        named = {"attention_mask": attention_mask, "cache": cache}
        logits, output = self.module.apply({"params": params}, input_ids, **named)
        return logits, output.cache


class FlaxRobertaPreLayerNormForCausalLM(FlaxRobertaPreLayerNormPreTrainedModel):
    """The decoder; its config must have is_decoder, or every token sees what it predicts."""

    model = "causal_lm"
    module_class = heads.CausalLM

    def __init__(self, config: RobertaPreLayerNormConfig, *args: Any, **named: Any):
        super().__init__(config, *args, **named)
        if not config.is_decoder:
            raise InputError(
                f"{type(self).__name__}: config has is_decoder=False, expected True "
                "(from_pretrained(..., is_decoder=True) changes it)"
            )

    def _output(
        self, logits: Array, encoded: EncoderOutput, targets: Mapping[str, Any]
    ) -> outputs.CausalLMOutput:
        return outputs.CausalLMOutput(
            loss=self.loss(logits, targets["labels"]) if targets else None,
            logits=logits,
            past_key_values=encoded.cache,
            cross_attentions=encoded.cross_attentions,
            **self._hidden(encoded),
        )

    def loss(self, logits: Array, labels: Array) -> Array:
        return heads.causal_lm_scores(logits, jnp.asarray(labels)).mean

    def generate(
        self,
        input_ids: Any,
        attention_mask: Any = None,
        *,
        prng_key: Array | None = None,
        params: Tree | None = None,
        encoder_hidden_states: Any = None,
        encoder_attention_mask: Any = None,
        **settings: Any,
    ) -> Any:
        """Continues prompts [B, L], padded on either side or amid.

        Args:
            attention_mask: [B, L]; None: whatever is not the pad id.
            prng_key: to sample.
            encoder_hidden_states, encoder_attention_mask: [B, S, D] and [B, S].
            settings: fields of `generation_settings.Generation`.

        Returns:
            `generation.GenerationOutput`.

        Raises:
            InputError: prompts or settings that don't fit, or rows that would outgrow the
                model's positions.
        """
        from prelnroberta.generation import generate
        from prelnroberta.generation_settings import Generation

        tree = self.params if params is None else params
        input_ids = as_array("input_ids", input_ids)
        if attention_mask is None:
            attention_mask = input_ids != self.config.pad_token_id
        given = {
            "input_ids": input_ids,
            "attention_mask": as_array("attention_mask", attention_mask),
            "encoder_hidden_states": as_array("encoder_hidden_states", encoder_hidden_states),
            "encoder_attention_mask": as_array("encoder_attention_mask", encoder_attention_mask),
        }
        check_inputs(self.config, given)
        ends = {"eos_token_id": self.config.eos_token_id, "pad_token_id": self.config.pad_token_id}
        wanted = Generation(**{**ends, **settings})
        B, L = input_ids.shape
        _, most = wanted.new_tokens(L)
        if not isinstance(input_ids, jax.core.Tracer):
            longest = int((np.asarray(input_ids) != self.config.pad_token_id).sum(-1).max())
            self.config.check_length(longest + most - 1, "a prompt and its continuation")
        cache = self.init_cache(B, L + most - 1)
        if encoder_hidden_states is not None:
            states = jnp.asarray(given["encoder_hidden_states"], self.dtype)
            cache |= read_encoder(
                tree["encoder"]["layers"], states, given["encoder_attention_mask"]
            )
        return generate(
            _Decoder(self.module), tree, cache, input_ids, given["attention_mask"], wanted, prng_key
        )


class FlaxRobertaPreLayerNormForSequenceClassification(FlaxRobertaPreLayerNormPreTrainedModel):
    model = "sequence_classification"
    module_class = heads.SequenceClassification

    def loss(self, logits: Array, labels: Array) -> Array:
        return heads.sequence_scores(self.config, logits, jnp.asarray(labels)).mean


class FlaxRobertaPreLayerNormForMultipleChoice(FlaxRobertaPreLayerNormPreTrainedModel):
    """Inputs have an axis of choices: [B, C, L], inputs_embeds [B, C, L, D]."""

    model = "multiple_choice"
    module_class = heads.MultipleChoice


class FlaxRobertaPreLayerNormForTokenClassification(FlaxRobertaPreLayerNormPreTrainedModel):
    model = "token_classification"
    module_class = heads.TokenClassification


class FlaxRobertaPreLayerNormForQuestionAnswering(FlaxRobertaPreLayerNormPreTrainedModel):
    """Takes start_positions and end_positions [B] in place of labels."""

    model = "question_answering"
    module_class = heads.QuestionAnswering

    def _check_targets(self, targets: Mapping[str, Any], logits: jax.ShapeDtypeStruct) -> None:
        for name, value in targets.items():
            if value.shape != logits.shape[:1]:
                raise InputError(
                    f"{name} has shape {list(value.shape)}, expected {list(logits.shape[:1])}"
                )
            check_integers(name, jnp.abs(value), None, None)

    def _output(
        self, logits: Array, encoded: EncoderOutput, targets: Mapping[str, Any]
    ) -> outputs.QuestionAnsweringOutput:
        loss = None
        if targets:
            positions = (jnp.asarray(targets[f"{side}_positions"]) for side in ("start", "end"))
            starts, ends = heads.span_scores(logits, *positions)
            loss = (starts.mean + ends.mean) / 2
        return outputs.QuestionAnsweringOutput(
            loss=loss,
            start_logits=logits[..., 0],
            end_logits=logits[..., 1],
            **self._hidden(encoded),
        )
