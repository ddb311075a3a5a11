"""The model's configuration: Hugging Face's fields and defaults, validated, with presets and FLOPs.

Field names, defaults and the json form are those of transformers
(`models/roberta_prelayernorm/configuration_roberta_prelayernorm.py`), so that one `config.json`
works for this package and for transformers. Unknown keys are kept in `extra` and written back
unchanged.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from prelnroberta.errors import InputError

MODEL_TYPE = "roberta-prelayernorm"
ACTIVATIONS = (
    "gelu",
    "gelu_new",
    "gelu_pytorch_tanh",
    "quick_gelu",
    "relu",
    "silu",
    "swish",
    "tanh",
)
REGRESSION, SINGLE_LABEL, MULTI_LABEL = PROBLEM_TYPES = (
    "regression",
    "single_label_classification",
    "multi_label_classification",
)
ARCHITECTURES = {  # model of the parameter table -> its class in transformers
    "encoder": "RobertaPreLayerNormModel",
    "base": "RobertaPreLayerNormModel",
    "masked_lm": "RobertaPreLayerNormForMaskedLM",
    "causal_lm": "RobertaPreLayerNormForCausalLM",
    "sequence_classification": "RobertaPreLayerNormForSequenceClassification",
    "multiple_choice": "RobertaPreLayerNormForMultipleChoice",
    "token_classification": "RobertaPreLayerNormForTokenClassification",
    "question_answering": "RobertaPreLayerNormForQuestionAnswering",
}

IGNORE_INDEX = -100  # the label of a target that does not count, as in torch's cross entropy
# The logit of an entry that is not a class of its target: another sequence's token, a choice that
# is not there. Finite, so that a target without any class has a finite loss.
MASKED_LOGIT = -1e30

_POSITIVE_INTS = (
    "vocab_size",
    "hidden_size",
    "num_hidden_layers",
    "num_attention_heads",
    "intermediate_size",
    "max_position_embeddings",
    "type_vocab_size",
)
_PROBABILITIES = ("hidden_dropout_prob", "attention_probs_dropout_prob", "classifier_dropout")
_POSITIVE_FLOATS = ("initializer_range", "layer_norm_eps")
_BOOLS = (
    "use_cache",
    "is_decoder",
    "add_cross_attention",
    "tie_word_embeddings",
    "tie_last_hidden_states",
    "output_hidden_states",
    "output_attentions",
    "return_dict",
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class RobertaPreLayerNormConfig:
    """Architecture of a RoBERTa-PreLayerNorm model. Immutable; change it with `replace`.

    Every field has transformers' name, meaning and default. `tie_last_hidden_states` is
    transformers 5's: True makes the last of `hidden_states` the normalised `last_hidden_state`,
    False the residual stream before the final norm, as in transformers 4.

    Raises:
        InputError: naming the field, its value and what was expected.
    """

    vocab_size: int = 50265
    hidden_size: int = 768
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    intermediate_size: int = 3072
    hidden_act: str = "gelu"
    hidden_dropout_prob: float = 0.1
    attention_probs_dropout_prob: float = 0.1
    max_position_embeddings: int = 512
    type_vocab_size: int = 2
    initializer_range: float = 0.02
    layer_norm_eps: float = 1e-12
    pad_token_id: int = 1
    bos_token_id: int | None = 0
    eos_token_id: int | tuple[int, ...] | None = 2
    position_embedding_type: str = "absolute"
    use_cache: bool = True
    classifier_dropout: float | None = None
    is_decoder: bool = False
    add_cross_attention: bool = False
    tie_word_embeddings: bool = True
    tie_last_hidden_states: bool = True
    num_labels: int | None = None
    id2label: Mapping[int, str] | None = dataclasses.field(default=None, hash=False)
    label2id: Mapping[str, int] | None = dataclasses.field(default=None, hash=False)
    problem_type: str | None = None
    chunk_size_feed_forward: int = 0
    output_hidden_states: bool = False
    output_attentions: bool = False
    return_dict: bool = True
    extra: Mapping[str, Any] = dataclasses.field(default_factory=dict, hash=False)

    def __post_init__(self) -> None:
        for name in _POSITIVE_INTS:
            value = getattr(self, name)
            self._require(_is_int(value) and value > 0, name, "an int > 0")
        for name in _PROBABILITIES:
            value = getattr(self, name)
            if value is None and name == "classifier_dropout":
                continue
            self._require(_is_number(value) and 0 <= value < 1, name, "a number in [0, 1)")
        for name in _POSITIVE_FLOATS:
            value = getattr(self, name)
            self._require(_is_number(value) and value > 0, name, "a number > 0")
        for name in _BOOLS:
            self._require(isinstance(getattr(self, name), bool), name, "true or false")
        self._require(
            self.hidden_size % self.num_attention_heads == 0,
            "hidden_size",
            f"a multiple of num_attention_heads={self.num_attention_heads}",
        )
        self._require(self.hidden_act in ACTIVATIONS, "hidden_act", f"one of {list(ACTIVATIONS)}")
        self._require(
            self.position_embedding_type == "absolute",
            "position_embedding_type",
            "'absolute': transformers 5 dropped the relative forms and its Flax classes never had "
            "them",
        )
        self._require(
            _is_int(self.chunk_size_feed_forward) and self.chunk_size_feed_forward >= 0,
            "chunk_size_feed_forward",
            "an int >= 0",
        )
        self._require_token_ids()
        self._require(
            self.max_position_embeddings > self.pad_token_id + 1,
            "max_position_embeddings",
            f"more than pad_token_id + 1 = {self.pad_token_id + 1}: positions start there",
        )
        self._require(
            self.is_decoder or not self.add_cross_attention,
            "add_cross_attention",
            "false unless is_decoder is true",
        )
        self._resolve_labels()

    def _require(self, condition: bool, field: str, expected: str) -> None:
        if not condition:
            raise InputError(f"config: {field}={getattr(self, field)!r}, expected {expected}")

    def _require_token_ids(self) -> None:
        in_vocab = f"an id in [0, vocab_size={self.vocab_size})"

        def valid(token: Any) -> bool:
            return _is_int(token) and 0 <= token < self.vocab_size

        self._require(valid(self.pad_token_id), "pad_token_id", in_vocab)
        self._require(
            self.bos_token_id is None or valid(self.bos_token_id), "bos_token_id", in_vocab
        )
        eos = self.eos_token_id
        if isinstance(eos, (list, tuple)):
            object.__setattr__(self, "eos_token_id", tuple(eos))
            self._require(all(map(valid, eos)), "eos_token_id", f"each {in_vocab}")
        else:
            self._require(eos is None or valid(eos), "eos_token_id", in_vocab)

    def _resolve_labels(self) -> None:
        """Derives num_labels, id2label and label2id from those that were given; checks the rest."""
        if self.num_labels is not None:
            valid = _is_int(self.num_labels) and self.num_labels > 0
            self._require(valid, "num_labels", "an int > 0")
        names = self.id2label
        if names is None:
            names = {i: f"LABEL_{i}" for i in range(self.num_labels or 2)}
        self._require(isinstance(names, Mapping) and len(names) > 0, "id2label", "{id: name}")
        try:
            names = {int(i): str(name) for i, name in names.items()}
        except ValueError:
            self._require(False, "id2label", "ids that are whole numbers")
        self._require(sorted(names) == list(range(len(names))), "id2label", "ids 0, 1, 2, ...")
        self._require(
            self.num_labels in (None, len(names)),
            "num_labels",
            f"{len(names)}, as many as id2label names (leave one of the two out)",
        )
        object.__setattr__(self, "id2label", names)
        object.__setattr__(self, "num_labels", len(names))
        if self.label2id is None:
            object.__setattr__(self, "label2id", {name: i for i, name in names.items()})
        self._require(isinstance(self.label2id, Mapping), "label2id", "{name: id}")
        self._require(
            self.problem_type in (None, *PROBLEM_TYPES), "problem_type", f"one of {PROBLEM_TYPES}"
        )
        self._require(
            not (self.problem_type == SINGLE_LABEL and len(names) == 1),
            "problem_type",
            "another type when num_labels is 1: a single class has no alternatives",
        )

    @property
    def head_dim(self) -> int:
        """K: the size of one attention head."""
        return self.hidden_size // self.num_attention_heads

    @property
    def max_length(self) -> int:
        """The longest row in tokens: positions start at pad_token_id + 1, so 514 give 512."""
        return self.max_position_embeddings - self.pad_token_id - 1

    def check_length(self, length: int, what: str = "a row") -> None:
        """Raises InputError if `length` tokens do not fit the position table."""
        if length > self.max_length:
            raise InputError(
                f"{what} of {length} tokens is longer than the {self.max_length} that "
                f"max_position_embeddings={self.max_position_embeddings} holds (positions start "
                f"at pad_token_id + 1 = {self.pad_token_id + 1}): shorten it or train with more "
                "positions"
            )

    def replace(self, **changes: Any) -> RobertaPreLayerNormConfig:
        """A changed copy. A new num_labels without id2label gets default label names."""
        if "num_labels" in changes:
            changes = {"id2label": None, **changes}
        if "id2label" in changes:
            changes = {"num_labels": None, "label2id": None, **changes}
        return dataclasses.replace(self, **changes)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> RobertaPreLayerNormConfig:
        """Creates a config from the content of a `config.json`.

        Raises:
            InputError: for another model_type, heads pruned by transformers 4, or a value out of
                its range.
        """
        values = dict(values)
        model_type = values.pop("model_type", MODEL_TYPE)
        if model_type != MODEL_TYPE:
            raise InputError(
                f"config: model_type={model_type!r}, expected {MODEL_TYPE!r} (plain RoBERTa "
                "normalises after each sublayer, so its weights do not fit)"
            )
        if values.get("pruned_heads"):
            raise InputError(
                f"config: pruned_heads={values['pruned_heads']}, expected none: layers share one "
                "array, so all have the same heads (prune_heads here sets weights to 0)"
            )
        if values.get("id2label") is not None:
            # transformers writes both; id2label wins there as well.
            values.pop("num_labels", None)
        known = {field.name for field in dataclasses.fields(cls)} - {"extra"}
        own = {name: values.pop(name) for name in list(values) if name in known}
        return cls(**own, extra=values)

    def to_dict(self) -> dict[str, Any]:
        """The content of a `config.json` that transformers 4 and 5 load unchanged."""
        values = {
            field.name: getattr(self, field.name)
            for field in dataclasses.fields(self)
            if field.name not in ("extra", "num_labels")
        }
        values["id2label"] = {str(i): name for i, name in self.id2label.items()}
        values["label2id"] = dict(self.label2id)
        if isinstance(self.eos_token_id, tuple):
            values["eos_token_id"] = list(self.eos_token_id)
        return {"model_type": MODEL_TYPE, **self.extra, **values}

    @classmethod
    def from_json(cls, path: str | Path) -> RobertaPreLayerNormConfig:
        """Reads a `config.json`, or the one in a directory. InputErrors name the file."""
        path = Path(path)
        if path.is_dir():
            path = path / "config.json"
        try:
            values = json.loads(path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            raise InputError(f"{path}: no such file, expected a model's config.json") from None
        except (json.JSONDecodeError, UnicodeDecodeError) as error:
            raise InputError(f"{path}: not valid json ({error})") from None
        if not isinstance(values, dict):
            raise InputError(f"{path}: expected a json object, found {type(values).__name__}")
        try:
            return cls.from_dict(values)
        except InputError as error:
            raise InputError(f"{path}: {error}") from None

    def to_json(self) -> str:
        return json.dumps(self.to_dict(), indent=2, sort_keys=True) + "\n"

    @classmethod
    def preset(cls, name: str, **changes: Any) -> RobertaPreLayerNormConfig:
        """An architecture of `PRESETS` by name, with the given fields changed."""
        if name not in PRESETS:
            raise InputError(f"preset {name!r}: expected one of {sorted(PRESETS)}")
        return cls(**{**PRESETS[name], **changes})

    def forward_flops(self, length: int, num_read: int | None = None, lm_head: bool = True) -> int:
        """FLOPs (2 per multiply-add) of the matrix products of one forward pass over one row.

        Training costs three times as much: the backward pass has two products for each.

        Args:
            length: L, tokens in the row.
            num_read: M, the number of positions that the head reads. The last block's queries,
                output projection and MLP, and the head, are computed at those alone. None: L.
            lm_head: whether to include the masked-LM head.
        """
        D, F, N, V = (
            self.hidden_size,
            self.intermediate_size,
            self.num_hidden_layers,
            self.vocab_size,
        )
        num_read = length if num_read is None else num_read

        def block(queries: int) -> int:
            keys_and_values = 2 * length * D * D
            query_and_output = 2 * queries * D * D
            scores_and_values = 2 * queries * length * D
            mlp = 2 * queries * D * F
            return 2 * (keys_and_values + query_and_output + scores_and_values + mlp)

        head = 2 * num_read * (D * D + D * V) if lm_head else 0
        return (N - 1) * block(length) + block(num_read) + head


def _is_int(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


# Published models use type_vocab_size 1, eps 1e-5 and 514 positions (princeton-nlp/DinkyTrain,
# fairseq's roberta_base and roberta_large with --encoder-normalize-before).
_FAIRSEQ = {"max_position_embeddings": 514, "type_vocab_size": 1, "layer_norm_eps": 1e-5}
PRESETS: dict[str, dict[str, Any]] = {
    "roberta-base": {**_FAIRSEQ},
    "roberta-large": {
        **_FAIRSEQ,
        "hidden_size": 1024,
        "num_hidden_layers": 24,
        "num_attention_heads": 16,
        "intermediate_size": 4096,
    },
    "small": {
        **_FAIRSEQ,
        "vocab_size": 8192,
        "hidden_size": 256,
        "num_hidden_layers": 6,
        "num_attention_heads": 4,
        "intermediate_size": 1024,
    },
    "tiny": {
        **_FAIRSEQ,
        "vocab_size": 512,
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "intermediate_size": 64,
        "max_position_embeddings": 66,
    },
}


def require_config(config: object) -> None:
    """Raises InputError unless `config` is this package's; transformers' own class is refused."""
    if not isinstance(config, RobertaPreLayerNormConfig):
        raise InputError(
            f"config is a {type(config).__name__}, expected prelnroberta's "
            "RobertaPreLayerNormConfig (convert another with from_dict(config.to_dict()))"
        )
