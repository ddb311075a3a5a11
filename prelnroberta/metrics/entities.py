"""Precision, recall and F1 of entities: an entity counts where start, end and type are right.

`strict` are seqeval's strict mode's, in which what breaks the scheme is no entity; otherwise those
of CoNLL's conlleval (and seqeval's default mode), which reads broken tags as well as it can.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from prelnroberta.data.readers.bio_tags import conlleval_spans, seqeval_strict_spans
from prelnroberta.metrics.classification import AVERAGE_MODES, ClassCounts


class EntityCounts:
    """Entities of each sentence and type, so that sentences can be resampled.

    Args:
        true, predicted: tags of each sentence, as many as it has words.
        scheme: one of `tags.SCHEMES` for strict counts; None for conlleval's.

    Attributes:
        types: those that occur, sorted.
    """

    def __init__(
        self,
        true: Sequence[Sequence[str]],
        predicted: Sequence[Sequence[str]],
        scheme: str | None = "IOB2",
    ):
        pairs = []
        self._words = np.zeros((len(true), 2), np.int64)  # tags that are right, tags
        for i, (wanted, found) in enumerate(zip(true, predicted, strict=True)):
            if len(wanted) != len(found):
                raise ValueError(f"sentence {i} has {len(wanted)} words, but {len(found)} tags")
            self._words[i] = sum(map(str.__eq__, wanted, found)), len(wanted)
            pairs.append((_entities(wanted, scheme), _entities(found, scheme)))
        self.types = sorted({span.type for a, b in pairs for span in a | b})
        number = {kind: t for t, kind in enumerate(self.types)}
        self._counts = np.zeros((len(pairs), 3, len(self.types)), np.int64)
        for i, (wanted, found) in enumerate(pairs):
            for row, spans_ in enumerate((wanted & found, found, wanted)):
                for span in spans_:
                    self._counts[i, row, number[span.type]] += 1

    def counts(self, sentences: np.ndarray | slice = slice(None)) -> ClassCounts:
        """Counts by type, over all sentences or those of the given numbers, which may repeat."""
        return ClassCounts(*self._counts[sentences].sum(axis=0))

    def metrics(self, sentences: np.ndarray | slice = slice(None)) -> dict[str, float]:
        """precision, recall, f1 (micro, as CoNLL reports it), f1_macro, f1_weighted, and accuracy,
        the share of words whose tag is right."""
        counts = self.counts(sentences)
        precision, recall, f1 = counts.averaged("micro")
        right, words = self._words[sentences].sum(axis=0).tolist()
        return {
            "precision": precision,
            "recall": recall,
            "f1": f1,
            **{f"f1_{a}": counts.averaged(a)[2] for a in AVERAGE_MODES if a != "micro"},
            "accuracy": right / words if words else 0.0,
        }


def _entities(tags: Sequence[str], scheme: str | None) -> set:
    return set(conlleval_spans(tags) if scheme is None else seqeval_strict_spans(tags, scheme))
