"""Precision, recall and F1 of entities. An entity is correct if its start, end and type are.

With a scheme, counts are those of seqeval's strict mode, in which tags that violate the scheme are
not an entity. Otherwise they are those of CoNLL's conlleval (and of seqeval's default mode), which
accepts invalid tags.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from prelnroberta.data.readers.bio_tags import conlleval_spans, seqeval_strict_spans
from prelnroberta.metrics.classification import AVERAGE_MODES, ClassCounts


class EntityCounts:
    """Counts of entities by sentence and type, so that sentences can be resampled.

    Args:
        true, predicted: tags of each sentence, one per word.
        scheme: one of `bio_tags.SCHEMES` for strict counts; None for those of conlleval.

    Attributes:
        types: the entity types that occur, sorted.

    Raises:
        ValueError: a sentence has another number of tags in `predicted` than in `true`.
    """

    def __init__(
        self,
        true: Sequence[Sequence[str]],
        predicted: Sequence[Sequence[str]],
        scheme: str | None = "IOB2",
    ):
        entities = []
        self._tags = np.zeros((len(true), 2), np.int64)  # correct tags and all tags of a sentence
        for i, (true_tags, predicted_tags) in enumerate(zip(true, predicted, strict=True)):
            if len(true_tags) != len(predicted_tags):
                raise ValueError(
                    f"sentence {i} has {len(true_tags)} words, but {len(predicted_tags)} tags"
                )
            self._tags[i] = sum(map(str.__eq__, true_tags, predicted_tags)), len(true_tags)
            entities.append((_entities(true_tags, scheme), _entities(predicted_tags, scheme)))
        self.types = sorted({span.type for a, b in entities for span in a | b})
        index = {entity_type: i for i, entity_type in enumerate(self.types)}
        self._counts = np.zeros((len(entities), 3, len(self.types)), np.int64)
        for i, (targets, predictions) in enumerate(entities):
            for field, group in enumerate((targets & predictions, predictions, targets)):
                for span in group:
                    self._counts[i, field, index[span.type]] += 1

    def counts(self, sentences: np.ndarray | slice = slice(None)) -> ClassCounts:
        """Counts by type.

        Args:
            sentences: indices of sentences, possibly with repeats; all by default.
        """
        return ClassCounts(*self._counts[sentences].sum(axis=0))

    def metrics(self, sentences: np.ndarray | slice = slice(None)) -> dict[str, float]:
        """precision, recall, f1 (micro averages, as CoNLL reports), f1_macro, f1_weighted, and
        accuracy, the share of words whose tag is correct."""
        counts = self.counts(sentences)
        precision, recall, f1 = counts.average("micro")
        correct, total = self._tags[sentences].sum(axis=0).tolist()
        return {
            "precision": precision,
            "recall": recall,
            "f1": f1,
            **{f"f1_{mode}": counts.average(mode)[2] for mode in AVERAGE_MODES if mode != "micro"},
            "accuracy": correct / total if total else 0.0,
        }


def _entities(tags: Sequence[str], scheme: str | None) -> set:
    return set(conlleval_spans(tags) if scheme is None else seqeval_strict_spans(tags, scheme))
