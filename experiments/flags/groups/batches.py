"""Batches: how long a row is, how it is filled, and how many rows a batch has."""

from __future__ import annotations

import dataclasses

from experiments.flags.checks import check_positive
from experiments.flags.field import flag
from prelnroberta.config import RobertaPreLayerNormConfig
from prelnroberta.errors import InputError


@dataclasses.dataclass(frozen=True, kw_only=True)
class BatchSettings:
    sequence_length: int = flag(128, "L, tokens in a row, including special tokens.")
    packing: str = flag(
        "contiguous",
        "How rows are filled. contiguous: running text across documents (fairseq's 'none'). "
        "documents, sentences: whole documents or lines, packed so that attention and positions "
        "never cross a boundary.",
        choices=["contiguous", "documents", "sentences"],
    )
    batch_size: int = flag(32, "B, rows in an optimizer step.")
    eval_rows: int = flag(1024, "Maximum number of validation rows in an evaluation.")

    def check_rows(self, config: RobertaPreLayerNormConfig) -> None:
        """Raises InputError for rows that this architecture cannot take."""
        check_positive(self, "eval_rows")
        if self.sequence_length < 3:
            raise InputError(f"--sequence_length={self.sequence_length}, expected 3 or more")
        config.check_length(
            self.sequence_length, f"--sequence_length={self.sequence_length}: a row"
        )
