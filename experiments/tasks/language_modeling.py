"""Language models of running text, causal and masked."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import jax
import numpy as np

from experiments.tasks.base import (
    Answer,
    Array,
    Measured,
    Row,
    Task,
    stacked,
)
from prelnroberta.config import RobertaPreLayerNormConfig
from prelnroberta.data.features.base import NOTHING, Features
from prelnroberta.data.features.language_modeling import Blocks, token_stream
from prelnroberta.data.pretraining.corpus import FileCorpus
from prelnroberta.data.pretraining.loader import Loader
from prelnroberta.data.pretraining.masking import Masking
from prelnroberta.data.readers.row_errors import BadRows
from prelnroberta.data.shuffle import Batch
from prelnroberta.metrics.classification import perplexity
from prelnroberta.metrics.unigram import UnigramBaseline
from prelnroberta.model import heads
from prelnroberta.model.encoder import TableModule
from prelnroberta.model.heads import LossSettings, Scores
from prelnroberta.params import Tree

if TYPE_CHECKING:
    import tokenizers


class _LanguageModel(Task):
    """Raw text: .txt, .md or .jsonl; what is measured is the loss of each row's tokens."""

    metric = "perplexity"

    def merit(self, metrics: Mapping[str, float]) -> float:
        return -metrics[self.metric]

    def read(self, path: str | Path, labelled: bool, bad: BadRows) -> list:
        column = "text" if self.settings.text_column is None else str(self.settings.text_column)
        return [document.text for document in FileCorpus([str(path)], column).documents()]

    def measure(self, features: Features, rows: Sequence[Row]) -> Measured:
        loss, correct, weight = (stacked(rows, name) for name in ("loss", "correct", "weight"))

        def of(i: np.ndarray) -> dict[str, float]:
            total = float(weight[i].sum())
            return {
                "perplexity": perplexity(float(loss[i].sum()), total),
                "accuracy": float(correct[i].sum()) / total,
            }

        return Measured(of, len(rows))

    def answers(self, features: Features, rows: Sequence[Row]) -> Iterator[Answer]:
        for number, row in enumerate(rows):
            weight = max(float(row["weight"]), 1.0)
            yield {"row": number, "loss": float(row["loss"]) / weight, "tokens": weight}

    def outputs(
        self, config: RobertaPreLayerNormConfig, logits: Array, batch: dict[str, Array]
    ) -> dict[str, Array]:
        def of_row(logits: Array, batch: dict[str, Array]) -> Scores:
            one = jax.tree.map(lambda x: x[None], (logits, batch))
            return self.loss(config, *one, heads.PLAIN)

        return dataclasses.asdict(jax.vmap(of_row)(logits, batch))

    def trivial(self, train: Features, features: Features) -> float:
        """Word frequencies alone."""
        size = int(max(train.stream.max(), features.stream.max())) + 1
        counts = np.bincount(train.stream, minlength=size)
        scores = UnigramBaseline(counts, ()).scores(*self._asked(features))
        return perplexity(float(scores.loss), float(scores.weight))

    def _asked(self, features: Features) -> tuple[np.ndarray, np.ndarray]:
        """Labels and weights of all that is asked for."""
        raise NotImplementedError


class CausalLM(_LanguageModel):
    """The next token of running text."""

    model = "causal_lm"

    def configure(self, config: RobertaPreLayerNormConfig) -> RobertaPreLayerNormConfig:
        return config.replace(is_decoder=True)

    def features(
        self, examples: Sequence, tokenizer: tokenizers.Tokenizer, bad: BadRows, training: bool
    ) -> Features:
        # One token of context shared by neighbours: every token is predicted once.
        return Blocks(token_stream(examples, tokenizer), self.settings.max_length, overlap=1)

    def loss(
        self,
        config: RobertaPreLayerNormConfig,
        logits: Array,
        batch: dict[str, Array],
        settings: LossSettings,
    ) -> Scores:
        return heads.causal_lm_scores(logits, batch["labels"], settings)

    def _asked(self, features: Features) -> tuple[np.ndarray, np.ndarray]:
        labels = features.stream[1:]
        return labels, np.ones(len(labels))


@dataclasses.dataclass(frozen=True)
class MaskedBlocks(Features):
    """Blocks under the masks of epoch 0: the same at every evaluation."""

    blocks: Blocks
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
        batch["masked_weights"][np.asarray(indices) == NOTHING] = 0.0
        return batch


class MaskedLM(_LanguageModel):
    """The tokens behind masks."""

    model = "masked_lm"
    target = "masked_labels"

    def features(
        self, examples: Sequence, tokenizer: tokenizers.Tokenizer, bad: BadRows, training: bool
    ) -> Features:
        s = self.settings
        masking = Masking(tokenizer.get_vocab_size(), rate=s.mask_rate, sampling="bernoulli")
        return MaskedBlocks(Blocks(token_stream(examples, tokenizer), s.max_length), masking)

    def batches(
        self, features: Features, batch_size: int, seed: int, steps: int, multiple: int
    ) -> Loader:
        return Loader(features.blocks, features.masking, batch_size, seed)

    def logits(
        self, module: TableModule, params: Tree, batch: dict[str, Array], keys: Array | None = None
    ) -> Array:
        logits, _ = module.apply(
            {"params": params},
            batch["input_ids"],
            position_ids=batch["position_ids"],
            segment_ids=batch["segment_ids"],
            read_positions=batch["masked_positions"],
            dropout_keys=keys,
        )
        return logits

    def loss(
        self,
        config: RobertaPreLayerNormConfig,
        logits: Array,
        batch: dict[str, Array],
        settings: LossSettings,
    ) -> Scores:
        return heads.cross_entropy(
            logits, batch["masked_labels"], batch["masked_weights"], settings
        )

    def _asked(self, features: Features) -> tuple[np.ndarray, np.ndarray]:
        batch = features.batch(np.arange(len(features.blocks)), features.blocks.length)
        return batch["masked_labels"], batch["masked_weights"]
