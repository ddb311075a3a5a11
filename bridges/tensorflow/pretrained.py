"""What the seven TF* classes share: Keras 3 models with transformers' names and arguments.

What `prelnroberta/pretrained/flax_models.py` is to Flax. Every class takes labels and returns its loss, checks
its input on the host when called eagerly, and is filled from a parameter tree and gives it back.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

import jax
import keras
import numpy as np
import tensorflow as tf

from bridges.tensorflow import heads, variable_mapping
from bridges.tensorflow import kv_cache as caches
from bridges.tensorflow.encoder import Dropout, Embeddings, Encoded, Encoder, encode
from bridges.tensorflow.heads import IGNORE, Scores
from bridges.tensorflow.keras_fit import OwnLoss
from bridges.tensorflow.kv_cache import Cache, sizes
from bridges.tensorflow.outputs import Output, output
from bridges.tensorflow.weight_files import read_weights
from prelnroberta import params as parameters
from prelnroberta.config import RobertaPreLayerNormConfig, require_config
from prelnroberta.errors import InputError
from prelnroberta.params import Tree
from prelnroberta.pretrained import hf_checkpoint
from prelnroberta.pretrained.input_checks import as_array, check_inputs, check_labels

Tensor = tf.Tensor

ROW_ARGUMENTS = (
    "input_ids",
    "attention_mask",
    "token_type_ids",
    "position_ids",
    "segment_ids",
    "inputs_embeds",
)
_ARGUMENTS = (*ROW_ARGUMENTS, "head_mask")
DECODER_ARGUMENTS = ("encoder_hidden_states", "encoder_attention_mask", "past_key_values")
# Positional arguments, in the order of transformers' TF classes.
_POSITIONAL = (
    "input_ids",
    "attention_mask",
    "token_type_ids",
    "position_ids",
    "head_mask",
    "inputs_embeds",
)


class TFRobertaPreLayerNormPreTrainedModel(OwnLoss, keras.Model):
    """What the seven classes share.

    Args:
        config: the architecture.
        seed: of the initial parameters, which are those of the Flax class, and of dropout.
        params: a parameter tree in place of initial values.
        dtype: a Keras dtype policy: float32, mixed_bfloat16 or mixed_float16; None: the global
            one. Weights stay float32.
        name, trainable: as Keras means them.

    Raises:
        InputError: a config, tree or dtype that doesn't fit.
    """

    config_class = RobertaPreLayerNormConfig
    base_model_prefix = "roberta_prelayernorm"
    model: ClassVar[str]
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
        self.swapped = hf_checkpoint.Swapped()
        self.noise = keras.random.SeedGenerator(seed)
        self.embeddings = Embeddings(config)
        self.encoder = Encoder(config)
        self.make_head()
        self.build()
        if params is None:
            params = parameters.init(config, jax.random.key(seed), self.model)
        self.assign_params(params)

    def make_head(self) -> None:
        """Sets what stands on the encoder as attributes."""

    def build(self, input_shape: Any = None) -> None:
        for part in self.layers:
            part.build()

    # The parameter tree.

    def variables_by_path(self) -> dict[str, keras.Variable]:
        """Path -> variable; `names.py` says which leaf of the tree each path is."""
        return {v.path.removeprefix(f"{self.path}/"): v for v in self.weights}

    def assign_params(self, params: Tree) -> None:
        """Takes the values of a tree, float32. Raises InputError listing all that differs."""
        own = self.variables_by_path()
        for path, value in variable_mapping.to_variables(params, self.config, self.model).items():
            own[path].assign(value)

    @classmethod
    def from_params(cls, params: Tree, config: RobertaPreLayerNormConfig, **options: Any) -> Any:
        """A model of a parameter tree; options as the class takes them."""
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

        Parts the files lack as a whole, such as a head, get new values; parts this class has no
        place for are dropped; both are logged as a warning and kept in `swapped`.

        Args:
            config: in place of the directory's.
            ignore_mismatched_sizes: new values for tensors of another shape, too.
            seed: of new values, and of dropout.
            changes: arguments of the class, or fields of the config to replace.

        Raises:
            InputError: a file that is missing or damaged; one message listing every missing,
                unexpected, mis-shaped and non-finite tensor; an unknown argument.
        """
        config, options = hf_checkpoint.open_directory(cls, directory, config, cls.options, changes)
        model = cls.model_of(options)
        tensors, source = read_weights(directory)
        params, swapped = hf_checkpoint.read_tensors(
            tensors,
            config,
            model,
            source,
            lambda: parameters.init(config, jax.random.key(seed), model),
            ignore_mismatched_sizes,
        )
        hf_checkpoint.report_swapped(swapped, source, cls)
        made = cls(config, params=params, seed=seed, **options)
        made.swapped = swapped
        return made

    @classmethod
    def model_of(cls, options: Mapping[str, Any]) -> str:
        """Which model of the parameter table the class is under these options."""
        return cls.model

    def save_pretrained(self, directory: str | Path, max_shard_bytes: int = 5 * 10**9) -> None:
        """Writes config.json and float32 safetensors, which transformers 4.57 and 5 load."""
        hf_checkpoint.save_pretrained(
            directory, self.to_params(), self.config, self.model, max_shard_bytes
        )

    def get_config(self) -> dict[str, Any]:
        """For Keras' own files."""
        return {
            "config": self.config.to_dict(),
            "seed": self.seed,
            "dtype": keras.saving.serialize_keras_object(self.dtype_policy),
            "name": self.name,
            "trainable": self.trainable,
        }

    @classmethod
    def from_config(cls, config: dict[str, Any], custom_objects: Any = None) -> Any:
        values = dict(config)
        values["config"] = RobertaPreLayerNormConfig.from_dict(values["config"])
        values["dtype"] = keras.saving.deserialize_keras_object(values["dtype"])
        return cls(**values)

    # The forward pass.

    @tf.autograph.experimental.do_not_convert
    def __call__(self, *positional: Any, **named: Any) -> Any:
        """Runs the model on tensors, arrays or lists, by position, by name, or in one dict.

        Args:
            input_ids [B, L], attention_mask [B, L] or [B, L, L], token_type_ids, position_ids,
                segment_ids [B, L], head_mask [H] or [N, H], inputs_embeds [B, L, D]: as
                `prelnroberta.model.encoder.Encoder` says. Multiple choice: [B, C, L].
            encoder_hidden_states [B, S, D], encoder_attention_mask [B, S] or [B, L, S]: for the
                cross-attention of a decoder.
            past_key_values: a cache from `init_cache`; attention_mask is then of the new tokens
                alone. use_cache=True without one starts one.
            labels, or start_positions and end_positions: as the Flax classes take them.
            training: dropout.
            output_attentions, output_hidden_states, return_dict: None: as the config says.

        Returns:
            `outputs.Output`, or a tuple without return_dict.

        Raises:
            InputError: for whatever does not fit. Values are checked in eager calls only: inside a
                tf.function there are none yet.
        """
        options = {name: named.pop(name) for name in _OPTIONS if name in named}
        if positional and isinstance(positional[0], Mapping):
            first, *positional = positional
            named = {**first, **named}
        inputs = {**dict(zip(_POSITIONAL, positional, strict=False)), **named}
        if len(positional) > len(_POSITIONAL):
            raise InputError(f"only {', '.join(_POSITIONAL)} are taken by position")
        allowed = (*self.argument_names, *self.target_names)
        unknown = [name for name in inputs if name not in allowed]
        if unknown:
            near = {name: difflib.get_close_matches(name, allowed, n=1) for name in unknown}
            raise InputError(
                f"{type(self).__name__}: unexpected "
                + ", ".join(f"{n} (nearest: {m[0]})" if m else n for n, m in near.items())
            )
        inputs = {
            name: value
            if isinstance(value, Mapping) or tf.is_tensor(value)
            else _array(name, value)
            for name, value in inputs.items()
            if value is not None
        }
        self._check(inputs)
        return super().__call__(inputs, **options)

    @property
    def argument_names(self) -> tuple[str, ...]:
        return _ARGUMENTS

    def _check(self, inputs: Mapping[str, Any]) -> None:
        """Holds what can be read now to the config: everything in eager mode, else the length."""
        if ("input_ids" in inputs) == ("inputs_embeds" in inputs):
            raise InputError("give input_ids or inputs_embeds: one of the two, and not both")
        missing = [n for n in self.target_names if n not in inputs]
        if 0 < len(missing) < len(self.target_names):
            raise InputError(f"give both of {', '.join(self.target_names)}, or none")
        given = {name: value for name, value in inputs.items() if name != "past_key_values"}
        host = {name: _host(value) for name, value in given.items()}
        rows = 2 if self.model == "multiple_choice" else 1
        first = inputs.get("input_ids", inputs.get("inputs_embeds"))
        if any(value is None for value in host.values()):
            length = tuple(first.shape)[rows]
            if length and not {"position_ids", "past_key_values"} & inputs.keys():
                self.config.check_length(length)
            return
        targets = {name: host.pop(name) for name in self.target_names if name in host}
        check_inputs(self.config, host, rows)
        if targets:
            self.check_targets(targets, first.shape[: rows + 1])
        if "past_key_values" in inputs:
            self._check_room(inputs["past_key_values"], host)

    def _check_room(self, cache: Cache, inputs: Mapping[str, np.ndarray]) -> None:
        index, count = _host(cache["index"]), _host(cache["count"])
        if index is None:
            return
        new = inputs.get("input_ids", inputs.get("inputs_embeds"))
        columns = cache["valid"].shape[1]
        if index + new.shape[1] > columns:
            raise InputError(
                f"past_key_values has {columns} columns, {index} used: no room for {new.shape[1]} "
                "more; call init_cache with a larger max_length"
            )
        if "position_ids" not in inputs:
            real = np.ones(new.shape[:2], bool)
            if "input_ids" in inputs:
                real = new != self.config.pad_token_id
            self.config.check_length(int((count + real.sum(-1)).max()))

    def check_targets(self, targets: Mapping[str, np.ndarray], shape: tuple[int, ...]) -> None:
        """Holds targets to inputs [B, L], or [B, C, L], of `shape`."""
        V, C = self.config.vocab_size, self.config.num_labels
        logits = {
            "sequence_classification": (shape[0], C),
            "multiple_choice": shape[:2],
            "token_classification": (*shape, C),
        }
        check_labels(
            self.config, self.model, targets["labels"], tuple(logits.get(self.model, (*shape, V)))
        )

    def call(
        self,
        inputs: dict[str, Any],
        training: bool | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        use_cache: bool | None = None,
    ) -> Any:
        """As `__call__`, on tensors, under the names that it has checked."""

        def either(given: bool | None, name: str) -> bool:
            return getattr(self.config, name) if given is None else given

        inputs = {n: v if n == "past_key_values" else standardized(v) for n, v in inputs.items()}
        targets = {n: inputs.pop(n) for n in self.target_names if n in inputs}
        keep = either(output_hidden_states, "output_hidden_states")
        attentions = either(output_attentions, "output_attentions")
        first = inputs.get("input_ids", inputs.get("inputs_embeds"))
        if use_cache and "past_key_values" in set(self.argument_names) - inputs.keys():
            inputs["past_key_values"] = self.init_cache(sizes(first)[0], self.config.max_length)
        encoded = encode(
            self.embeddings,
            self.encoder,
            self.config,
            self.compute_dtype,
            self.drop if training else _same,
            **self.as_rows(inputs),
            read_first=self.reads_first_position and not (keep or attentions),
        )
        found = self.head(encoded, self.drop if training else _same, sizes(first))
        residuals = encoded.residuals
        if self.config.tie_last_hidden_states:
            residuals = (*residuals[:-1], encoded.last_hidden_state)
        made = output(
            loss=self.scores(found, targets).mean if targets else None,
            **found,
            past_key_values=encoded.cache,
            hidden_states=residuals if keep else None,
            attentions=encoded.attentions if attentions else None,
            cross_attentions=(encoded.cross_attentions or None) if attentions else None,
        )
        return made if either(return_dict, "return_dict") else made.to_tuple()

    def drop(self, x: Tensor, rate: float) -> Tensor:
        return keras.random.dropout(x, rate, seed=self.noise) if rate else x

    def as_rows(self, inputs: dict[str, Any]) -> dict[str, Any]:
        """The inputs with B first and L after it."""
        return inputs

    def head(self, encoded: Encoded, drop: Dropout, sizes: list[Any]) -> Output:
        """What stands on the encoder, given sizes [B, L] or [B, C, L] of the input."""
        raise NotImplementedError

    def init_cache(self, batch_size: Any, max_length: int) -> Cache:
        """An empty cache for `past_key_values`; see `cache.py`."""
        return caches.init_cache(self.config, batch_size, max_length, self.compute_dtype)

    def scores(self, output: Output, targets: Mapping[str, Tensor]) -> Scores:
        return heads.label_scores(output["logits"], standardized(targets["labels"]))

    def metric_arguments(
        self, output: Output, targets: Mapping[str, Tensor]
    ) -> tuple[Any, Any, Any]:
        return counted(standardized(targets["labels"]), output["logits"])


_OPTIONS = (
    "training",
    "output_attentions",
    "output_hidden_states",
    "return_dict",
    "use_cache",
)


def _same(x: Tensor, rate: float) -> Tensor:
    return x


def standardized(value: Tensor) -> Tensor:
    """Integers and booleans as int32: -100 must fit, and comparisons must agree."""
    value = tf.convert_to_tensor(value)
    return value if value.dtype.is_floating else tf.cast(value, tf.int32)


def _array(name: str, value: Any) -> Any:
    return value if isinstance(value, keras.KerasTensor) else as_array(name, value)


def _host(value: Any) -> np.ndarray | None:
    """The value as numpy; None while it is being traced."""
    if isinstance(value, keras.KerasTensor) or tf.is_symbolic_tensor(value):
        return None
    return value.numpy() if tf.is_tensor(value) else np.asarray(value)


def counted(labels: Tensor, logits: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(y, y_pred, sample_weight): labels that don't count weigh nothing."""
    counted = labels != IGNORE
    return tf.where(counted, labels, 0), logits, tf.cast(counted, tf.float32)
