"""Raw text as one stream of tokens, cut into rows: for causal and masked language models.

The stream is `<s> document </s><s> document </s> ..`; a row is L of its tokens, so documents
continue from row to row. Every token is predicted once: rows share their ends with the next one's
beginning, and what an earlier row has predicted already is only context (label -100).

A batch of causal rows, B rows of L tokens:
    input_ids, attention_mask    int32 [B, L]
    labels                       int32 [B, L], not shifted: `heads.causal_lm_scores` shifts; -100
                                 where nothing is asked
    weights                      float32 [B], 1 for a row, 0 for a filling row
Masked rows go through `masking.Masking` and `loader.Loader`, whose source `TokenBlocks` can be.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

import numpy as np

from prelnroberta.config import IGNORE_INDEX
from prelnroberta.data.features.base import PADDING_INDEX, Features, collate_tokens, padded
from prelnroberta.data.features.encoding import token_ids
from prelnroberta.data.pretraining.packing import Row
from prelnroberta.data.shuffle import Batch
from prelnroberta.data.tokenizer import BOS_ID, EOS_ID, PAD_ID
from prelnroberta.errors import InputError

if TYPE_CHECKING:
    import tokenizers


def token_stream(documents: Iterable[str], tokenizer: tokenizers.Tokenizer) -> np.ndarray:
    """int32 [T]: `<s> document </s>` of all documents. In memory, 4 bytes a token.

    Raises:
        InputError: no text at all.
    """
    texts = (text for text in documents if text.strip())
    parts = [part for ids in token_ids(tokenizer, texts) for part in ([BOS_ID], ids, [EOS_ID])]
    if not parts:
        raise InputError("no text: every document is empty; give other files")
    return np.concatenate(parts, dtype=np.int32)


class TokenBlocks(Features):
    """Rows of `length` tokens of a stream, each beginning `length - overlap` after the one before.

    `overlap=0` are the blocks of transformers' run_clm and run_mlm (group_texts), with a shorter
    last one where those drop it; the first token of each is then never predicted by a causal model.
    `overlap=1`, one token of context, predicts all but the stream's first; more gives each token at
    least that much context, for exact perplexities.

    Raises:
        InputError: a length below 2, or an overlap not inside [0, length).
    """

    by_token = ("labels",)

    def __init__(self, stream: np.ndarray, length: int, overlap: int = 0):
        if length < 2 or not 0 <= overlap < length:
            raise InputError(
                f"rows of {length} tokens with an overlap of {overlap}: expected 2 tokens or more "
                "and a smaller overlap"
            )
        self.stream = stream
        self.length = length
        self.overlap = overlap
        self._starts = np.arange(0, max(len(stream) - overlap, 1), length - overlap)

    @property
    def lengths(self) -> np.ndarray:
        return np.minimum(len(self.stream) - self._starts, self.length)

    @property
    def fill(self) -> float:
        """Share of the rows' positions that hold tokens."""
        return float(self.lengths.sum()) / (len(self) * self.length)

    def __len__(self) -> int:
        return len(self._starts)

    def __getitem__(self, index: int) -> Row:
        """Row `index` as one segment, padded at the end, for `loader.Loader`."""
        if not 0 <= index < len(self):
            raise IndexError(index)
        tokens = self._tokens(index)
        used = np.arange(self.length) < len(tokens)
        input_ids = np.full(self.length, PAD_ID, np.int32)
        input_ids[: len(tokens)] = tokens
        positions = np.where(used, np.arange(self.length) + PAD_ID + 1, PAD_ID)
        return Row(input_ids, used.astype(np.int32), positions.astype(np.int32))

    def _tokens(self, index: int) -> np.ndarray:
        start = self._starts[index]
        return self.stream[start : start + self.length]

    def batch(self, indices: np.ndarray, length: int) -> Batch:
        """The module's batch of the rows at `indices` [B] for a causal model; -1 fills up."""
        rows = {int(index): self._tokens(index) for index in indices if index != PADDING_INDEX}
        batch = collate_tokens(rows, indices, length)
        batch["labels"] = labels = padded(rows, indices, length, IGNORE_INDEX)
        # A row's first token has no predecessor there; those of an overlap were predicted before.
        labels[:, 0] = IGNORE_INDEX
        labels[np.asarray(indices) > 0, : self.overlap] = IGNORE_INDEX
        return batch
