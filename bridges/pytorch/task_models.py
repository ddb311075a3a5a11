"""The six models with a task head; each returns its loss if labels are given."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bridges.pytorch.base_model import RobertaPreLayerNormModel
from bridges.pytorch.generation import generate
from bridges.pytorch.heads import ClassificationHead, LMHead, classifier_dropout
from bridges.pytorch.input_checks import check_inputs, check_labels, check_span
from bridges.pytorch.losses import label_loss, sequence_loss, span_loss
from bridges.pytorch.pretrained import PreTrainedModel
from bridges.pytorch.unpadding import Unpadding
from prelnroberta.config import IGNORE_INDEX, RobertaPreLayerNormConfig
from prelnroberta.errors import InputError
from prelnroberta.inference.generation import GenerationOutput
from prelnroberta.inference.generation_config import GenerationConfig
from prelnroberta.pretrained.outputs import (
    BaseModelOutput,
    CausalLMOutput,
    HeadOutput,
    ModelOutput,
    QuestionAnsweringOutput,
)

# `prelnroberta.outputs` is an identifier of the format in which torch.export saves programs, no
# longer a module path. It stays as it is, so that saved programs still load.
for _output in (BaseModelOutput, CausalLMOutput, HeadOutput, QuestionAnsweringOutput):
    torch.export.register_dataclass(
        _output, serialized_type_name=f"prelnroberta.outputs.{_output.__name__}"
    )


class ModelWithHead(PreTrainedModel):
    """The encoder and a head; subclasses define the head in `compute_logits`.

    Attributes:
        output_class: what `forward` returns.
        encoder_fields: fields of the encoder's output that are returned as well.
        add_pooling_layer: whether the encoder has its pooler.
        first_only: whether the head reads only the first position.
    """

    output_class: ClassVar[type[ModelOutput]] = HeadOutput
    encoder_fields: ClassVar[tuple[str, ...]] = ("hidden_states", "attentions")
    add_pooling_layer: ClassVar[bool] = False
    first_only: ClassVar[bool] = False

    def __init__(self, config: RobertaPreLayerNormConfig):
        super().__init__(config)
        self.roberta_prelayernorm = RobertaPreLayerNormModel(config, self.add_pooling_layer)

    def compute_logits(self, hidden: Tensor) -> Tensor:
        """Last hidden states -> logits."""
        raise NotImplementedError

    def align_labels(self, labels: Tensor) -> Tensor:
        """Labels at the positions of the logits that predict them."""
        return labels

    def compute_loss(self, logits: Tensor, labels: Tensor) -> Tensor:
        return label_loss(logits, labels)

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        *,
        return_dict: bool | None = None,
        skip_padding: bool = False,
        **options: Any,
    ) -> ModelOutput | tuple[Any, ...]:
        """Takes labels, and the arguments of `RobertaPreLayerNormModel.forward`; raises its errors.

        Args:
            labels: of tokens [B, L], or of rows: [B], or [B, C] numbers. -100 does not count.
            skip_padding: as there; padded positions get logits of 0 and their labels no loss.

        Returns:
            The loss if labels are given, the logits, and requested fields of the encoder's output.
        """
        inputs = inputs_embeds if input_ids is None else input_ids
        check_labels(self.config, self.model, labels, inputs)
        if labels is not None or self.output_class is not CausalLMOutput:
            options.setdefault("use_cache", False)
        encoded = self.roberta_prelayernorm(
            input_ids,
            attention_mask,
            token_type_ids,
            position_ids,
            inputs_embeds,
            skip_padding=skip_padding,
            first_only=self.first_only,
            return_dict=True,
            **options,
        )
        hidden, unpadding = encoded.last_hidden_state, None
        labels = None if labels is None else self.align_labels(labels)
        if skip_padding and attention_mask is not None and not self.first_only:
            unpadding = Unpadding.from_mask(attention_mask)
            hidden, labels = unpadding.unpad(hidden), unpadding.unpad(labels)
        logits = self.compute_logits(hidden)
        loss = None if labels is None else self.compute_loss(logits, labels)
        logits = logits if unpadding is None else unpadding.pad(logits)
        return self.make_output(encoded, return_dict, loss=loss, logits=logits)

    def make_output(
        self, encoded: BaseModelOutput, return_dict: bool | None, **fields: Any
    ) -> ModelOutput | tuple[Any, ...]:
        """The output of the head's `fields` and the encoder's `encoder_fields`."""
        shared = {name: getattr(encoded, name) for name in self.encoder_fields}
        output = self.output_class(**fields, **shared)
        return output if self._or_config(return_dict, "return_dict") else output.to_tuple()


class ModelWithLMHead(ModelWithHead):
    """A language model. Its output bias has two names, as in transformers."""

    def __init__(self, config: RobertaPreLayerNormConfig):
        super().__init__(config)
        self.lm_head = LMHead(config).apply(self.init_weights)
        self.tie_weights()

    def tie_weights(self) -> None:
        """Shares the bias between its names, and the word table if tie_word_embeddings is set."""
        self.lm_head.bias = self.lm_head.decoder.bias
        if self.config.tie_word_embeddings:
            word_embeddings = self.roberta_prelayernorm.embeddings.word_embeddings
            self.lm_head.decoder.weight = word_embeddings.weight

    def compute_logits(self, hidden: Tensor) -> Tensor:
        return self.lm_head(hidden)


class RobertaPreLayerNormForMaskedLM(ModelWithLMHead):
    """Logits [B, L, V]; labels [B, L]."""

    model = "masked_lm"


class RobertaPreLayerNormForCausalLM(ModelWithLMHead):
    """Logits [B, L, V] at t predict the token at t + 1; labels [B, L] are shifted inside.

    The config must have is_decoder=True: otherwise each token would see the one it predicts.
    """

    model = "causal_lm"
    output_class = CausalLMOutput
    encoder_fields = ("past_key_values", "hidden_states", "attentions", "cross_attentions")

    def __init__(self, config: RobertaPreLayerNormConfig):
        super().__init__(config)
        if not config.is_decoder:
            raise InputError(
                f"{type(self).__name__}: config has is_decoder=False, expected True "
                "(from_pretrained(..., is_decoder=True) changes it)"
            )

    def align_labels(self, labels: Tensor) -> Tensor:
        """Labels [B, L] shifted to the left."""
        return F.pad(labels[:, 1:], (0, 1), value=IGNORE_INDEX)

    @torch.no_grad()
    def generate(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        *,
        generator: torch.Generator | None = None,
        encoder_hidden_states: Tensor | None = None,
        encoder_attention_mask: Tensor | None = None,
        return_dict_in_generate: bool = False,
        **settings: Any,
    ) -> Tensor | GenerationOutput:
        """Continues prompts [B, L], padded anywhere.

        Args:
            attention_mask: [B, L]; None: everything but the pad id is visible.
            generator: for sampling; None: torch's default.
            encoder_hidden_states, encoder_attention_mask: [B, S, D] and [B, S].
            return_dict_in_generate: return `GenerationOutput`, which has the scores of beams.
            settings: fields of `prelnroberta.inference.generation_config.GenerationConfig`.

        Returns:
            [B * num_return_sequences, L + G] int64: the prompts, then new tokens, then pads.

        Raises:
            InputError: invalid prompts or settings, or rows that would exceed the model's
                positions.
        """
        if attention_mask is None:
            attention_mask = input_ids != self.config.pad_token_id
        defaults = {
            "eos_token_id": self.config.eos_token_id,
            "pad_token_id": self.config.pad_token_id,
        }
        output = generate(
            self,
            input_ids,
            attention_mask,
            GenerationConfig(**{**defaults, **settings}),
            generator,
            encoder_hidden_states=encoder_hidden_states,
            encoder_attention_mask=encoder_attention_mask,
        )
        return output if return_dict_in_generate else output.sequences


class RobertaPreLayerNormForSequenceClassification(ModelWithHead):
    """Logits [B, C] of `<s>`; labels [B] int, [B, C] float, or in regression [B(, C)]."""

    model = "sequence_classification"
    first_only = True

    def __init__(self, config: RobertaPreLayerNormConfig):
        super().__init__(config)
        self.classifier = ClassificationHead(config).apply(self.init_weights)

    def compute_logits(self, hidden: Tensor) -> Tensor:
        return self.classifier(hidden[:, 0])

    def compute_loss(self, logits: Tensor, labels: Tensor) -> Tensor:
        return sequence_loss(self.config, logits, labels)


class RobertaPreLayerNormForMultipleChoice(ModelWithHead):
    """Logits [B, A]; inputs have an axis of choices, [B, A, L] or [B, A, L, D]; labels [B]."""

    model = "multiple_choice"
    add_pooling_layer = True

    def __init__(self, config: RobertaPreLayerNormConfig):
        super().__init__(config)
        self.dropout = nn.Dropout(config.hidden_dropout_prob)
        self.classifier = nn.Linear(config.hidden_size, 1).apply(self.init_weights)

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        *,
        return_dict: bool | None = None,
        **options: Any,
    ) -> HeadOutput | tuple[Any, ...]:
        """As `ModelWithHead.forward`: loss and logits [B, A]; hidden states have B * A rows."""
        inputs = {
            "input_ids": input_ids,
            "attention_mask": attention_mask,
            "token_type_ids": token_type_ids,
            "position_ids": position_ids,
            "inputs_embeds": inputs_embeds,
        }
        check_inputs(self.config, inputs, batch_axes=2)
        choices = inputs_embeds if input_ids is None else input_ids
        check_labels(self.config, self.model, labels, choices)
        rows = {name: x if x is None else x.flatten(0, 1) for name, x in inputs.items()}
        options = {"use_cache": False, "first_only": True, **options}
        encoded = self.roberta_prelayernorm(**rows, return_dict=True, **options)
        logits = self.classifier(self.dropout(encoded.pooler_output)).view(choices.shape[:2])
        loss = None if labels is None else label_loss(logits, labels)
        return self.make_output(encoded, return_dict, loss=loss, logits=logits)


class RobertaPreLayerNormForTokenClassification(ModelWithHead):
    """Logits [B, L, C]; labels [B, L]."""

    model = "token_classification"

    def __init__(self, config: RobertaPreLayerNormConfig):
        super().__init__(config)
        self.dropout = classifier_dropout(config)
        self.classifier = nn.Linear(config.hidden_size, config.num_labels)
        self.classifier.apply(self.init_weights)

    def compute_logits(self, hidden: Tensor) -> Tensor:
        return self.classifier(self.dropout(hidden))


class RobertaPreLayerNormForQuestionAnswering(ModelWithHead):
    """Start and end logits [B, L] of the answer's span; positions [B] as labels."""

    model = "question_answering"
    output_class = QuestionAnsweringOutput

    def __init__(self, config: RobertaPreLayerNormConfig):
        if config.num_labels != 2:
            raise InputError(
                f"config: num_labels={config.num_labels}, expected 2 (start and end) for question "
                "answering"
            )
        super().__init__(config)
        self.qa_outputs = nn.Linear(config.hidden_size, 2).apply(self.init_weights)

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        start_positions: Tensor | None = None,
        end_positions: Tensor | None = None,
        *,
        return_dict: bool | None = None,
        skip_padding: bool = False,
        **options: Any,
    ) -> QuestionAnsweringOutput | tuple[Any, ...]:
        """As `ModelWithHead.forward`, with positions [B] as labels; those outside L do not count.

        Logits and loss include padded positions, as in transformers. With skip_padding they are
        computed from hidden states of 0 there, so it is for inference alone.

        Returns:
            The loss if both positions are given; start_logits and end_logits [B, L].
        """
        positions = {"start_positions": start_positions, "end_positions": end_positions}
        positions = {name: value for name, value in positions.items() if value is not None}
        inputs = inputs_embeds if input_ids is None else input_ids
        check_span(positions, inputs, skip_padding)
        encoded = self.roberta_prelayernorm(
            input_ids,
            attention_mask,
            token_type_ids,
            position_ids,
            inputs_embeds,
            skip_padding=skip_padding,
            return_dict=True,
            **{"use_cache": False, **options},
        )
        logits = self.qa_outputs(encoded.last_hidden_state)
        loss = span_loss(logits, *positions.values()) if positions else None
        starts, ends = logits.unbind(-1)
        return self.make_output(
            encoded, return_dict, loss=loss, start_logits=starts, end_logits=ends
        )
