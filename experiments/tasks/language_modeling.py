"""Causal and masked language modeling of running text."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import jax
import numpy as np

from experiments.tasks.base import (
    Array,
    EvalResult,
    Prediction,
    RowOutputs,
    Task,
    stack_outputs,
)
from prelnroberta.config import RobertaPreLayerNormConfig
from prelnroberta.data.features.base import PADDING_INDEX, Features
from prelnroberta.data.features.language_modeling import TokenBlocks, token_stream
from prelnroberta.data.pretraining.corpus import FileCorpus
from prelnroberta.data.pretraining.loader import Loader
from prelnroberta.data.pretraining.masking import Masking
from prelnroberta.data.readers.row_errors import RowErrors
from prelnroberta.data.shuffle import Batch
from prelnroberta.metrics.classification import perplexity
from prelnroberta.metrics.unigram_baseline import UnigramBaseline
from prelnroberta.model import losses
from prelnroberta.model.encoder import TableModule
from prelnroberta.model.losses import LossSettings, Scores
from prelnroberta.params import Tree

if TYPE_CHECKING:
    import tokenizers


class _LanguageModel(Task):
    """What causal and masked language modeling share: raw text (.txt, .md, .jsonl), and a loss for
    each row of tokens instead of predictions."""

    metric = "perplexity"

    def selection_score(self, metrics: Mapping[str, float]) -> float:
        return -metrics[self.metric]

    def read_examples(self, path: str | Path, labelled: bool, row_errors: RowErrors) -> list:
        column = "text" if self.settings.text_column is None else str(self.settings.text_column)
        return [document.text for document in FileCorpus([str(path)], column).documents()]

    def evaluate(self, features: Features, rows: Sequence[RowOutputs]) -> EvalResult:
        loss, correct, weight = (
            stack_outputs(rows, name) for name in ("loss", "correct", "weight")
        )

        def metrics_for(i: np.ndarray) -> dict[str, float]:
            tokens = float(weight[i].sum())
            return {
                "perplexity": perplexity(float(loss[i].sum()), tokens),
                "accuracy": float(correct[i].sum()) / tokens,
            }

        return EvalResult(metrics_for, len(rows))

    def predictions(self, features: Features, rows: Sequence[RowOutputs]) -> Iterator[Prediction]:
        for number, row in enumerate(rows):
            weight = max(float(row["weight"]), 1.0)
            yield {"row": number, "loss": float(row["loss"]) / weight, "tokens": weight}

    def outputs(
        self, config: RobertaPreLayerNormConfig, logits: Array, batch: dict[str, Array]
    ) -> dict[str, Array]:
        def row_scores(logits: Array, batch: dict[str, Array]) -> Scores:
            batch_of_one = jax.tree.map(lambda x: x[None], (logits, batch))
            return self.loss(config, *batch_of_one, losses.DEFAULT_LOSS)

        return dataclasses.asdict(jax.vmap(row_scores)(logits, batch))

    def baseline_score(self, train: Features, features: Features) -> float:
        """Perplexity of the token frequencies of `train`."""
        size = int(max(train.stream.max(), features.stream.max())) + 1
        counts = np.bincount(train.stream, minlength=size)
        scores = UnigramBaseline(counts, ()).scores(*self._targets(features))
        return perplexity(float(scores.loss), float(scores.weight))

    def _targets(self, features: Features) -> tuple[np.ndarray, np.ndarray]:
        """Labels of all tokens that are predicted, and their weights."""
        raise NotImplementedError


class CausalLM(_LanguageModel):
    """Predicts the next token of running text."""

    model = "causal_lm"

    def model_config(self, config: RobertaPreLayerNormConfig) -> RobertaPreLayerNormConfig:
        return config.replace(is_decoder=True)

    def features(
        self, examples: Sequence, tokenizer: tokenizers.Tokenizer, row_errors: RowErrors
    ) -> Features:
        # Neighbouring rows share one token, so that every token is predicted once.
        return TokenBlocks(token_stream(examples, tokenizer), self.settings.max_length, overlap=1)

    def loss(
        self,
        config: RobertaPreLayerNormConfig,
        logits: Array,
        batch: dict[str, Array],
        settings: LossSettings,
    ) -> Scores:
        return losses.causal_lm_scores(logits, batch["labels"], settings)

    def _targets(self, features: Features) -> tuple[np.ndarray, np.ndarray]:
        labels = features.stream[1:]
        return labels, np.ones(len(labels))


@dataclasses.dataclass(frozen=True)
class MaskedBlocks(Features):
    """`TokenBlocks` with the masks of epoch 0, which are the same at every evaluation."""

    blocks: TokenBlocks
    masking: Masking

    @property
    def lengths(self) -> np.ndarray:
        return np.full(len(self.blocks), self.blocks.length)

    @property
    def stream(self) -> np.ndarray:
        return self.blocks.stream

    def batch(self, indices: np.ndarray, length: int) -> Batch:
        rows = [self.masking.apply(self.blocks[max(i, 0)], 0, 0, max(i, 0)) for i in indices]
        batch = {name: np.stack([row[name] for row in rows]) for name in rows[0]}
        batch["masked_weights"][np.asarray(indices) == PADDING_INDEX] = 0.0
        return batch


class MaskedLM(_LanguageModel):
    """Predicts masked tokens of running text."""

    model = "masked_lm"
    label_key = "masked_labels"

    def features(
        self, examples: Sequence, tokenizer: tokenizers.Tokenizer, row_errors: RowErrors
    ) -> Features:
        s = self.settings
        masking = Masking(tokenizer.get_vocab_size(), rate=s.mask_rate, sampling="bernoulli")
        return MaskedBlocks(TokenBlocks(token_stream(examples, tokenizer), s.max_length), masking)

    def training_batches(
        self, features: Features, batch_size: int, seed: int, steps: int, multiple: int
    ) -> Loader:
        return Loader(features.blocks, features.masking, batch_size, seed)

    def logits(
        self,
        module: TableModule,
        params: Tree,
        batch: dict[str, Array],
        dropout_rngs: Array | None = None,
    ) -> Array:
        logits, _ = module.apply(
            {"params": params},
            batch["input_ids"],
            position_ids=batch["position_ids"],
            segment_ids=batch["segment_ids"],
            read_positions=batch["masked_positions"],
            dropout_rngs=dropout_rngs,
        )
        return logits

    def loss(
        self,
        config: RobertaPreLayerNormConfig,
        logits: Array,
        batch: dict[str, Array],
        settings: LossSettings,
    ) -> Scores:
        return losses.cross_entropy(
            logits, batch["masked_labels"], batch["masked_weights"], settings
        )

    def _targets(self, features: Features) -> tuple[np.ndarray, np.ndarray]:
        batch = features.batch(np.arange(len(features.blocks)), features.blocks.length)
        return batch["masked_labels"], batch["masked_weights"]
