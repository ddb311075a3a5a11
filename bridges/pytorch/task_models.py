"""What stands on the encoder: the seven models, their heads and their losses.

Losses are the means of `prelnroberta/model/heads.py`: over the labels that count, which -100 does not, in
float32, and a finite 0 where none counts.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bridges.pytorch.encoder import RobertaPreLayerNormModel, at_least_float32
from bridges.pytorch.generation import generate
from bridges.pytorch.pretrained import PreTrained, on_host, values_can_be_read
from bridges.pytorch.unpadding import Packing
from prelnroberta.config import RobertaPreLayerNormConfig
from prelnroberta.errors import InputError
from prelnroberta.inference.generation import GenerationOutput
from prelnroberta.inference.generation_config import Generation
from prelnroberta.pretrained.input_checks import check_labels
from prelnroberta.pretrained.outputs import (
    BaseModelOutput,
    CausalLMOutput,
    HeadOutput,
    Output,
    QuestionAnsweringOutput,
)

IGNORE = -100

for _output in (BaseModelOutput, CausalLMOutput, HeadOutput, QuestionAnsweringOutput):
    torch.export.register_dataclass(
        _output, serialized_type_name=f"prelnroberta.outputs.{_output.__name__}"
    )


def label_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """Cross entropy of logits [..., C] against labels [...] int."""
    total = F.cross_entropy(
        at_least_float32(logits).flatten(0, -2),
        labels.long().flatten(),
        ignore_index=IGNORE,
        reduction="sum",
    )
    return total / (labels != IGNORE).sum().clamp(min=1)


def sequence_loss(config: RobertaPreLayerNormConfig, logits: Tensor, labels: Tensor) -> Tensor:
    """Of logits [B, C]: against labels [B] int, [B, C] float, or in regression [B(, C)].

    The config's problem type, or what labels look like: decided by every call, written nowhere.
    """
    kind = config.problem_type
    if kind is None and config.num_labels == 1:
        kind = "regression"
    whole = not labels.is_floating_point() and labels.dtype != torch.bool
    if kind == "single_label_classification" or (kind is None and whole):
        return label_loss(logits, labels)
    logits = at_least_float32(logits).flatten()
    labels = labels.to(logits.dtype).flatten()
    if kind == "regression":
        return F.mse_loss(logits, labels)
    return F.binary_cross_entropy_with_logits(logits, labels)


def span_loss(logits: Tensor, starts: Tensor, ends: Tensor) -> Tensor:
    """Mean of the losses of both ends; positions [B] outside of logits [B, L, 2] don't count."""
    L = logits.shape[1]
    inside = [p.masked_fill((p < 0) | (p >= L), IGNORE) for p in (starts, ends)]
    return sum(label_loss(logits[..., side], p) for side, p in enumerate(inside)) / 2


class LMHead(nn.Module):
    """[..., D] -> [..., V]. The activation is the exact gelu, whatever `hidden_act` says."""

    def __init__(self, config: RobertaPreLayerNormConfig):
        super().__init__()
        D, V = config.hidden_size, config.vocab_size
        self.dense = nn.Linear(D, D)
        self.layer_norm = nn.LayerNorm(D, config.layer_norm_eps)
        self.decoder = nn.Linear(D, V)
        self.bias = self.decoder.bias

    def forward(self, x: Tensor) -> Tensor:
        return self.decoder(self.layer_norm(F.gelu(self.dense(x))))


class ClassificationHead(nn.Module):
    """[B, D] -> [B, C]."""

    def __init__(self, config: RobertaPreLayerNormConfig):
        super().__init__()
        self.dense = nn.Linear(config.hidden_size, config.hidden_size)
        self.out_proj = nn.Linear(config.hidden_size, config.num_labels)
        self.dropout = classifier_dropout(config)

    def forward(self, x: Tensor) -> Tensor:
        return self.out_proj(self.dropout(self.dense(self.dropout(x)).tanh()))


def classifier_dropout(config: RobertaPreLayerNormConfig) -> nn.Dropout:
    rate = config.classifier_dropout
    return nn.Dropout(config.hidden_dropout_prob if rate is None else rate)


class Headed(PreTrained):
    """A model with a head; subclasses say what it computes of the last hidden states.

    Attributes:
        output: what `forward` returns.
        of_encoder: which of its fields are the encoder's.
        pooled: whether the encoder has its pooler.
        first_only: whether the head reads the first position and no other.
    """

    output: ClassVar[type[Output]] = HeadOutput
    of_encoder: ClassVar[tuple[str, ...]] = ("hidden_states", "attentions")
    pooled: ClassVar[bool] = False
    first_only: ClassVar[bool] = False

    def __init__(self, config: RobertaPreLayerNormConfig):
        super().__init__(config)
        self.roberta_prelayernorm = RobertaPreLayerNormModel(config, self.pooled)

    def logits_of(self, x: Tensor) -> Tensor:
        """Last hidden states -> logits."""
        raise NotImplementedError

    def targets(self, labels: Tensor) -> Tensor:
        """Labels, each where the logits it is compared with are."""
        return labels

    def loss_of(self, logits: Tensor, targets: Tensor) -> Tensor:
        return label_loss(logits, targets)

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
    ) -> Output | tuple[Any, ...]:
        """Arguments and errors as `RobertaPreLayerNormModel.forward`'s, and labels.

        Args:
            labels: of tokens [B, L], or of rows: [B], or [B, C] numbers. -100 does not count.
            skip_padding: as there; padded positions have logits of 0 and their labels no loss.

        Returns:
            loss, given labels; logits; and what was asked for.
        """
        self.check_labels(labels, input_ids, inputs_embeds)
        if labels is not None or self.output is not CausalLMOutput:
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
        x, packing = encoded.last_hidden_state, None
        targets = None if labels is None else self.targets(labels)
        if skip_padding and attention_mask is not None and not self.first_only:
            packing = Packing.of(attention_mask)
            x, targets = packing.take(x), packing.take(targets)
        logits = self.logits_of(x)
        loss = None if targets is None else self.loss_of(logits, targets)
        logits = logits if packing is None else packing.put(logits)
        return self.returned(encoded, return_dict, loss=loss, logits=logits)

    def check_labels(
        self, labels: Tensor | None, ids: Tensor | None, embeds: Tensor | None
    ) -> None:
        """Holds labels to the logits there will be."""
        given = embeds if ids is None else ids
        if labels is None or given is None or not values_can_be_read():
            return
        B, L, *_ = given.shape
        V, C = self.config.vocab_size, self.config.num_labels
        shape = {
            "sequence_classification": (B, C),
            "multiple_choice": (B, L),
            "token_classification": (B, L, C),
        }.get(self.model, (B, L, V))
        check_labels(self.config, self.model, on_host("labels", labels), shape)

    def returned(
        self, encoded: BaseModelOutput, return_dict: bool | None, **own: Any
    ) -> Output | tuple[Any, ...]:
        """This class's own fields, and those that it has of the encoder's output."""
        shared = {name: getattr(encoded, name) for name in self.of_encoder}
        output = self.output(**own, **shared)
        return output if self.setting(return_dict, "return_dict") else output.to_tuple()


class WithLMHead(Headed):
    """One bias, by both of transformers' names; one matrix with the word table, if tied."""

    def __init__(self, config: RobertaPreLayerNormConfig):
        super().__init__(config)
        self.lm_head = LMHead(config).apply(self.initial_values)
        self.tie()

    def tie(self) -> None:
        self.lm_head.bias = self.lm_head.decoder.bias
        if self.config.tie_word_embeddings:
            words = self.roberta_prelayernorm.embeddings.word_embeddings
            self.lm_head.decoder.weight = words.weight

    def logits_of(self, x: Tensor) -> Tensor:
        return self.lm_head(x)


class RobertaPreLayerNormForMaskedLM(WithLMHead):
    """Logits [B, L, V]; labels [B, L]."""

    model = "masked_lm"


class RobertaPreLayerNormForCausalLM(WithLMHead):
    """The decoder; its config must have is_decoder, or every token sees what it predicts."""

    model = "causal_lm"
    output = CausalLMOutput
    of_encoder = ("past_key_values", "hidden_states", "attentions", "cross_attentions")

    def __init__(self, config: RobertaPreLayerNormConfig):
        super().__init__(config)
        if not config.is_decoder:
            raise InputError(
                f"{type(self).__name__}: config has is_decoder=False, expected True "
                "(from_pretrained(..., is_decoder=True) changes it)"
            )

    def targets(self, labels: Tensor) -> Tensor:
        """Labels [B, L] one to the left: logits at t predict the token at t + 1."""
        return F.pad(labels[:, 1:], (0, 1), value=IGNORE)

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
        """Continues prompts [B, L], padded on either side or amid.

        Args:
            attention_mask: [B, L]; None: whatever is not the pad id.
            generator: to sample with; None: torch's own.
            encoder_hidden_states, encoder_attention_mask: [B, S, D] and [B, S].
            return_dict_in_generate: return `GenerationOutput`, which has the scores of beams.
            settings: fields of `prelnroberta.inference.generation_config.Generation`.

        Returns:
            [B * num_return_sequences, L + G] int64: prompts as given, then new tokens, then pads.

        Raises:
            InputError: prompts or settings that don't fit, or rows that would outgrow the
                model's positions.
        """
        if attention_mask is None:
            attention_mask = input_ids != self.config.pad_token_id
        ends = {"eos_token_id": self.config.eos_token_id, "pad_token_id": self.config.pad_token_id}
        found = generate(
            self,
            input_ids,
            attention_mask,
            Generation(**{**ends, **settings}),
            generator,
            encoder_hidden_states=encoder_hidden_states,
            encoder_attention_mask=encoder_attention_mask,
        )
        return found if return_dict_in_generate else found.sequences


class RobertaPreLayerNormForSequenceClassification(Headed):
    """Logits [B, C] of `<s>`; labels [B] int, [B, C] float, or in regression [B(, C)]."""

    model = "sequence_classification"
    first_only = True

    def __init__(self, config: RobertaPreLayerNormConfig):
        super().__init__(config)
        self.classifier = ClassificationHead(config).apply(self.initial_values)

    def logits_of(self, x: Tensor) -> Tensor:
        return self.classifier(x[:, 0])

    def loss_of(self, logits: Tensor, targets: Tensor) -> Tensor:
        return sequence_loss(self.config, logits, targets)


class RobertaPreLayerNormForMultipleChoice(Headed):
    """Inputs have an axis of choices: [B, C, L], inputs_embeds [B, C, L, D]; labels [B]."""

    model = "multiple_choice"
    pooled = True

    def __init__(self, config: RobertaPreLayerNormConfig):
        super().__init__(config)
        self.dropout = nn.Dropout(config.hidden_dropout_prob)
        self.classifier = nn.Linear(config.hidden_size, 1).apply(self.initial_values)

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
        """As `Headed.forward`: loss and logits [B, C]; hidden states are of B * C rows."""
        inputs = {
            "input_ids": input_ids,
            "attention_mask": attention_mask,
            "token_type_ids": token_type_ids,
            "position_ids": position_ids,
            "inputs_embeds": inputs_embeds,
        }
        self.check(inputs, rows=2)
        self.check_labels(labels, input_ids, inputs_embeds)
        flat = {name: x if x is None else x.flatten(0, 1) for name, x in inputs.items()}
        options = {"use_cache": False, "first_only": True, **options}
        encoded = self.roberta_prelayernorm(**flat, return_dict=True, **options)
        logits = self.classifier(self.dropout(encoded.pooler_output))
        logits = logits.view((inputs_embeds if input_ids is None else input_ids).shape[:2])
        loss = None if labels is None else label_loss(logits, labels)
        return self.returned(encoded, return_dict, loss=loss, logits=logits)


class RobertaPreLayerNormForTokenClassification(Headed):
    """Logits [B, L, C]; labels [B, L]."""

    model = "token_classification"

    def __init__(self, config: RobertaPreLayerNormConfig):
        super().__init__(config)
        self.dropout = classifier_dropout(config)
        self.classifier = nn.Linear(config.hidden_size, config.num_labels)
        self.classifier.apply(self.initial_values)

    def logits_of(self, x: Tensor) -> Tensor:
        return self.classifier(self.dropout(x))


class RobertaPreLayerNormForQuestionAnswering(Headed):
    """Two numbers a token: how likely the answer starts, and ends, there."""

    model = "question_answering"
    output = QuestionAnsweringOutput

    def __init__(self, config: RobertaPreLayerNormConfig):
        if config.num_labels != 2:
            raise InputError(
                f"config: num_labels={config.num_labels}, expected 2 (start and end) for question "
                "answering"
            )
        super().__init__(config)
        self.qa_outputs = nn.Linear(config.hidden_size, 2).apply(self.initial_values)

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
        """As `Headed.forward`, with positions [B] as labels; outside of the row don't count.

        Logits and loss include padded positions, as in transformers; skip_padding computes them
        from hidden states of 0 there, so it is for inference alone.

        Returns:
            loss, given both positions; start_logits and end_logits [B, L].
        """
        positions = {"start_positions": start_positions, "end_positions": end_positions}
        positions = {name: value for name, value in positions.items() if value is not None}
        self.check_positions(positions, skip_padding, input_ids, inputs_embeds)
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
        return self.returned(encoded, return_dict, loss=loss, start_logits=starts, end_logits=ends)

    def check_positions(
        self,
        positions: Mapping[str, Tensor],
        skip_padding: bool,
        ids: Tensor | None,
        embeds: Tensor | None,
    ) -> None:
        """Both or none, integers, one a row."""
        if len(positions) == 1:
            raise InputError("give both of start_positions, end_positions, or none")
        if positions and skip_padding:
            raise InputError("skip_padding: the loss of a span runs over padded positions, too")
        given = embeds if ids is None else ids
        for name, value in positions.items():
            if given is not None and value.shape != given.shape[:1]:
                raise InputError(
                    f"{name} has shape {list(value.shape)}, expected {list(given.shape[:1])}"
                )
            if value.is_floating_point():
                raise InputError(f"{name} is {value.dtype}, expected integers")
