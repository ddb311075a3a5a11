"""Entity scores against seqeval's recorded answers."""

from pathlib import Path

import numpy as np
import pytest

from prelnroberta.metrics.classification import (
    classification_report,
)
from prelnroberta.metrics.entities import EntityCounts

HERE = Path(__file__).parent


def test_entity_scores_match_seqeval():
    """Its answers are kept in a file; tests/oracle/seqeval_cases.py writes it."""
    lines = (HERE / "seqeval_cases.txt").read_text().splitlines()
    assert len(lines) > 400
    for line in lines:
        scheme, *sides, precision, recall, f1, _, _, macro = line.split("\t")
        true, predicted = (
            [
                [tag if tag == "O" else f"{tag[0]}-{tag[1:]}" for tag in sentence.split(" ")]
                for sentence in side.split("/")
            ]
            for side in sides
        )
        counts = EntityCounts(true, predicted, None if scheme == "default" else scheme)
        found = counts.metrics()
        for name, expected in zip(
            ("precision", "recall", "f1", "f1_macro"), (precision, recall, f1, macro), strict=True
        ):
            assert found[name] == pytest.approx(float(expected), abs=1e-10), (line, name)
        right = [
            a == b for pair in zip(true, predicted, strict=True) for a, b in zip(*pair, strict=True)
        ]
        assert found["accuracy"] == pytest.approx(np.mean(right))


def test_entity_counts_of_resampled_sentences():
    """A bootstrap draws sentences; drawn twice, one counts twice."""
    true = [["B-x", "O"], ["B-x", "I-x"], ["O", "B-y"]]
    predicted = [["B-x", "O"], ["B-x", "O"], ["O", "O"]]
    counts = EntityCounts(true, predicted)
    twice = EntityCounts([true[1], true[1], true[2]], [predicted[1], predicted[1], predicted[2]])
    assert counts.metrics(np.array([1, 1, 2])) == twice.metrics()
    assert counts.types == ["x", "y"]
    assert [line.support for line in classification_report(counts.counts(), counts.types)] == [2, 1]
    with pytest.raises(ValueError, match="sentence 0 has 1 words, but 2 tags"):
        EntityCounts([["O"]], [["O", "O"]])
