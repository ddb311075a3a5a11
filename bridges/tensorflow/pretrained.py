"""Base class of the seven TF* classes: Keras 3 models with transformers' names and arguments.

The counterpart of `prelnroberta/pretrained/base.py`. Each class takes labels and returns its loss,
checks its inputs in eager calls, and converts from and to a parameter tree.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import jax
import keras
import numpy as np
import tensorflow as tf

from bridges.tensorflow import kv_cache, losses, variable_mapping
from bridges.tensorflow.encoder import (
    Dropout,
    Embeddings,
    Encoder,
    EncoderOutput,
    encode,
    no_dropout,
)
from bridges.tensorflow.input_checks import (
    as_tensor_input,
    check_cache_room,
    to_host_array,
    to_tensor,
)
from bridges.tensorflow.keras_fit import InternalLossMixin
from bridges.tensorflow.kv_cache import KVCache
from bridges.tensorflow.losses import Scores
from bridges.tensorflow.outputs import ModelOutput, make_output
from bridges.tensorflow.shapes import shape_list
from bridges.tensorflow.weight_files import read_weights
from prelnroberta import params as parameters
from prelnroberta.config import IGNORE_INDEX, RobertaPreLayerNormConfig, require_config
from prelnroberta.errors import InputError
from prelnroberta.params import Tree
from prelnroberta.pretrained import hf_checkpoint
from prelnroberta.pretrained.input_checks import check_inputs, check_labels

Tensor = tf.Tensor

PER_TOKEN_ARGUMENTS = (
    "input_ids",
    "attention_mask",
    "token_type_ids",
    "position_ids",
    "segment_ids",
    "inputs_embeds",
)
_ENCODER_ARGUMENTS = (*PER_TOKEN_ARGUMENTS, "head_mask")
DECODER_ARGUMENTS = ("encoder_hidden_states", "encoder_attention_mask", "past_key_values")
# In the order of transformers' TF classes.
_POSITIONAL_ARGUMENTS = (
    "input_ids",
    "attention_mask",
    "token_type_ids",
    "position_ids",
    "head_mask",
    "inputs_embeds",
)
_OPTIONS = (
    "training",
    "output_attentions",
    "output_hidden_states",
    "return_dict",
    "use_cache",
)


class TFRobertaPreLayerNormPreTrainedModel(InternalLossMixin, keras.Model):
    """Base class of the seven TF* classes.

    Args:
        config: the architecture.
        seed: of the initial parameters, which equal those of the Flax class, and of dropout.
        params: a parameter tree, used in place of initial values.
        dtype: a Keras dtype policy: float32, mixed_bfloat16 or mixed_float16; None: the global
            policy. Weights are float32.
        name, trainable: as in Keras.

    Raises:
        InputError: an invalid config, tree or dtype.
    """

    config_class = RobertaPreLayerNormConfig
    base_model_prefix = "roberta_prelayernorm"
    model: ClassVar[str]
    # Arguments of the constructor that from_pretrained accepts.
    options: ClassVar[frozenset[str]] = frozenset({"dtype", "name", "trainable"})
    target_names = ("labels",)
    reads_first_position = False

    def __init__(
        self,
        config: RobertaPreLayerNormConfig,
        *,
        seed: int = 0,
        params: Tree | None = None,
        dtype: Any = None,
        name: str | None = None,
        trainable: bool = True,
    ):
        require_config(config)
        parameters.table(config, self.model)
        super().__init__(name=name, dtype=dtype, trainable=trainable, autocast=False)
        if self.variable_dtype != "float32":
            raise InputError(
                f"dtype={self.dtype_policy.name!r} keeps weights in {self.variable_dtype}, "
                "expected float32, mixed_bfloat16 or mixed_float16"
            )
        self.config = config
        self.seed = seed
        self.loading_info = hf_checkpoint.LoadingInfo()
        self.seed_generator = keras.random.SeedGenerator(seed)
        self.embeddings = Embeddings(config)
        self.encoder = Encoder(config)
        self.make_head()
        self.build()
        if params is None:
            params = parameters.init(config, jax.random.key(seed), self.model)
        self.assign_params(params)

    def make_head(self) -> None:
        """Sets the layers of the head as attributes."""

    def build(self, input_shape: Any = None) -> None:
        for layer in self.layers:
            layer.build()

    # Parameter tree.

    def variables_by_path(self) -> dict[str, keras.Variable]:
        """Path -> variable; `variable_mapping.py` maps paths to leaves of the tree."""
        return {v.path.removeprefix(f"{self.path}/"): v for v in self.weights}

    def assign_params(self, params: Tree) -> None:
        """Sets the variables to the values of a float32 tree.

        Raises:
            InputError: one message listing all differences from the model's tree.
        """
        variables = self.variables_by_path()
        for path, value in variable_mapping.to_variables(params, self.config, self.model).items():
            variables[path].assign(value)

    @classmethod
    def from_params(cls, params: Tree, config: RobertaPreLayerNormConfig, **options: Any) -> Any:
        """A model with the values of a parameter tree; `options` are the constructor's."""
        return cls(config, params=params, **options)

    def to_params(self) -> Tree:
        """The parameter tree, float32 numpy."""
        values = {path: v.value.numpy() for path, v in self.variables_by_path().items()}
        return variable_mapping.from_variables(values, self.config, self.model, self.name)

    # Files.

    @classmethod
    def from_pretrained(
        cls,
        directory: str | Path,
        *,
        config: RobertaPreLayerNormConfig | None = None,
        ignore_mismatched_sizes: bool = False,
        seed: int = 0,
        **changes: Any,
    ) -> Any:
        """Reads a local Hugging Face directory: safetensors, shards, Flax msgpack or tf_model.h5.

        A part that is missing from the files as a whole, such as a head, gets new values; a part
        that this class does not have is dropped. Both are logged as a warning and listed in
        `loading_info`.

        Args:
            config: replaces the directory's.
            ignore_mismatched_sizes: also give new values to tensors of another shape.
            seed: of new values, and of dropout.
            changes: arguments of the class, or fields of the config to replace.

        Raises:
            InputError: a missing or damaged file; missing, unexpected, mis-shaped or non-finite
                tensors, all in one message; an unknown argument.
        """
        config, options = hf_checkpoint.resolve_config(cls, directory, config, cls.options, changes)
        model_name = cls.resolve_model(options)
        tensors, source = read_weights(directory)
        params, loading_info = hf_checkpoint.load_state_dict(
            tensors,
            config,
            model_name,
            source,
            lambda: parameters.init(config, jax.random.key(seed), model_name),
            ignore_mismatched_sizes,
        )
        hf_checkpoint.log_loading_info(loading_info, source, cls)
        model = cls(config, params=params, seed=seed, **options)
        model.loading_info = loading_info
        return model

    @classmethod
    def resolve_model(cls, options: Mapping[str, Any]) -> str:
        """The model of the parameter table that the class is with these constructor options."""
        return cls.model

    def save_pretrained(self, directory: str | Path, max_shard_bytes: int = 5 * 10**9) -> None:
        """Writes config.json and float32 safetensors, which transformers 4.57 and 5 load."""
        hf_checkpoint.save_pretrained(
            directory, self.to_params(), self.config, self.model, max_shard_bytes
        )

    def get_config(self) -> dict[str, Any]:
        """The constructor's arguments, for Keras' own files."""
        return {
            "config": self.config.to_dict(),
            "seed": self.seed,
            "dtype": keras.saving.serialize_keras_object(self.dtype_policy),
            "name": self.name,
            "trainable": self.trainable,
        }

    @classmethod
    def from_config(cls, config: dict[str, Any], custom_objects: Any = None) -> Any:
        arguments = dict(config)
        arguments["config"] = RobertaPreLayerNormConfig.from_dict(arguments["config"])
        arguments["dtype"] = keras.saving.deserialize_keras_object(arguments["dtype"])
        return cls(**arguments)

    # Forward pass.

    @tf.autograph.experimental.do_not_convert
    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Runs the model on tensors, arrays or lists, by position, by name, or in one dict.

        Args:
            input_ids [B, L], attention_mask [B, L] or [B, L, L], token_type_ids, position_ids,
                segment_ids [B, L], head_mask [H] or [N, H], inputs_embeds [B, L, D]: as in
                `prelnroberta.model.encoder.Encoder`. Multiple choice: [B, A, L].
            encoder_hidden_states [B, S, D], encoder_attention_mask [B, S] or [B, L, S]: for the
                cross-attention of a decoder.
            past_key_values: a cache from `init_cache`; attention_mask then covers only the new
                tokens. use_cache=True without a cache starts one.
            labels, or start_positions and end_positions: as in the Flax classes.
            training: apply dropout.
            output_attentions, output_hidden_states, return_dict: None: the config's values.

        Returns:
            `outputs.ModelOutput`, or a tuple if return_dict is False.

        Raises:
            InputError: invalid inputs. Values are checked only in eager calls: a tf.function has
                none while it is traced.
        """
        options = {name: kwargs.pop(name) for name in _OPTIONS if name in kwargs}
        inputs = {
            name: as_tensor_input(name, value)
            for name, value in self._named_inputs(args, kwargs).items()
            if value is not None
        }
        self._check_inputs(inputs)
        return super().__call__(inputs, **options)

    @property
    def argument_names(self) -> tuple[str, ...]:
        """Names of the inputs, without targets."""
        return _ENCODER_ARGUMENTS

    def _named_inputs(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> dict[str, Any]:
        """Inputs by name; raises InputError for names that this class does not take."""
        if args and isinstance(args[0], Mapping):
            kwargs, args = {**args[0], **kwargs}, args[1:]
        inputs = {**dict(zip(_POSITIONAL_ARGUMENTS, args, strict=False)), **kwargs}
        if len(args) > len(_POSITIONAL_ARGUMENTS):
            raise InputError(f"only {', '.join(_POSITIONAL_ARGUMENTS)} are taken by position")
        allowed = (*self.argument_names, *self.target_names)
        unknown = [name for name in inputs if name not in allowed]
        if unknown:
            nearest = {name: difflib.get_close_matches(name, allowed, n=1) for name in unknown}
            raise InputError(
                f"{type(self).__name__}: unexpected "
                + ", ".join(f"{n} (nearest: {m[0]})" if m else n for n, m in nearest.items())
            )
        return inputs

    def _check_inputs(self, inputs: Mapping[str, Any]) -> None:
        """Checks everything in eager mode, otherwise the length alone."""
        if ("input_ids" in inputs) == ("inputs_embeds" in inputs):
            raise InputError("give input_ids or inputs_embeds: one of the two, and not both")
        missing = [n for n in self.target_names if n not in inputs]
        if 0 < len(missing) < len(self.target_names):
            raise InputError(f"give both of {', '.join(self.target_names)}, or none")
        host = {n: to_host_array(x) for n, x in inputs.items() if n != "past_key_values"}
        batch_axes = 2 if self.model == "multiple_choice" else 1
        shape = tuple(inputs.get("input_ids", inputs.get("inputs_embeds")).shape)
        if any(array is None for array in host.values()):
            length = shape[batch_axes]
            if length and not {"position_ids", "past_key_values"} & inputs.keys():
                self.config.check_length(length)
            return
        targets = {name: host.pop(name) for name in self.target_names if name in host}
        check_inputs(self.config, host, batch_axes)
        if targets:
            self.check_targets(targets, shape)
        if "past_key_values" in inputs:
            check_cache_room(self.config, inputs["past_key_values"], host)

    def check_targets(
        self, targets: Mapping[str, np.ndarray], input_shape: tuple[int, ...]
    ) -> None:
        """Checks targets against inputs [B, L, ...], or [B, A, L, ...] for multiple choice."""
        check_labels(self.config, self.model, targets["labels"], input_shape)

    def call(
        self,
        inputs: dict[str, Any],
        training: bool | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        use_cache: bool | None = None,
    ) -> Any:
        """As `__call__`, for the named and checked inputs that it passes on."""
        inputs = {n: x if n == "past_key_values" else to_tensor(x) for n, x in inputs.items()}
        targets = {n: inputs.pop(n) for n in self.target_names if n in inputs}
        output_hidden_states = self._or_config(output_hidden_states, "output_hidden_states")
        output_attentions = self._or_config(output_attentions, "output_attentions")
        input_shape = shape_list(inputs.get("input_ids", inputs.get("inputs_embeds")))
        if use_cache and "past_key_values" in set(self.argument_names) - inputs.keys():
            inputs["past_key_values"] = self.init_cache(input_shape[0], self.config.max_length)
        dropout = self.apply_dropout if training else no_dropout
        encoded = encode(
            self.embeddings,
            self.encoder,
            self.config,
            self.compute_dtype,
            dropout,
            **self.flatten_choices(inputs),
            read_first=self.reads_first_position
            and not (output_hidden_states or output_attentions),
        )
        head_output = self.compute_head(encoded, dropout, input_shape)
        output = make_output(
            loss=self.scores(head_output, targets).mean if targets else None,
            **head_output,
            past_key_values=encoded.cache,
            hidden_states=self._hidden_states(encoded) if output_hidden_states else None,
            attentions=encoded.attentions if output_attentions else None,
            cross_attentions=(encoded.cross_attentions or None) if output_attentions else None,
        )
        return output if self._or_config(return_dict, "return_dict") else output.to_tuple()

    def _or_config(self, value: bool | None, field: str) -> bool:
        return getattr(self.config, field) if value is None else value

    def _hidden_states(self, encoded: EncoderOutput) -> tuple[Tensor, ...]:
        if self.config.tie_last_hidden_states:
            return (*encoded.residuals[:-1], encoded.last_hidden_state)
        return encoded.residuals

    def apply_dropout(self, x: Tensor, rate: float) -> Tensor:
        return keras.random.dropout(x, rate, seed=self.seed_generator) if rate else x

    def flatten_choices(self, inputs: dict[str, Any]) -> dict[str, Any]:
        """Inputs with all batch axes in one: [B, L] as they are."""
        return inputs

    def compute_head(
        self, encoded: EncoderOutput, dropout: Dropout, input_shape: list[Any]
    ) -> ModelOutput:
        """The head's fields of the output, such as logits.

        Args:
            input_shape: [B, L, ...], or [B, A, L, ...] for multiple choice.
        """
        raise NotImplementedError

    def init_cache(self, batch_size: Any, max_length: Any) -> KVCache:
        """An empty cache for `past_key_values`; see `kv_cache.py`."""
        return kv_cache.init_cache(self.config, batch_size, max_length, self.compute_dtype)

    def scores(self, output: ModelOutput, targets: Mapping[str, Tensor]) -> Scores:
        return losses.label_scores(output["logits"], to_tensor(targets["labels"]))

    def metric_inputs(
        self, output: ModelOutput, targets: Mapping[str, Tensor]
    ) -> tuple[Any, Any, Any]:
        return weigh_labels(to_tensor(targets["labels"]), output["logits"])


def weigh_labels(labels: Tensor, logits: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(y, y_pred, sample_weight) for Keras' metrics; ignored labels have weight 0."""
    counts = labels != IGNORE_INDEX
    return tf.where(counts, labels, 0), logits, tf.cast(counts, tf.float32)
