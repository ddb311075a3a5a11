"""Raw text as one token stream, cut into blocks: for causal and masked language models.

The stream is `<s> document </s><s> document </s> ..`. A block is a row of L of its tokens, so
documents continue from one row to the next. Each token is predicted once: blocks may overlap, and
tokens that an earlier block has predicted are only context (label -100).

A batch for a causal model, B rows of L tokens:
    input_ids, attention_mask    int32 [B, L]
    labels                       int32 [B, L], not shifted (`losses.causal_lm_scores` shifts them);
                                 -100 where there is nothing to predict
    weights                      float32 [B], 1 for a block, 0 for a padding row
For masked models, `TokenBlocks` is a source of `pretraining.loader.Loader`.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

import numpy as np

from prelnroberta.config import IGNORE_INDEX
from prelnroberta.data.features.base import PADDING_INDEX, Features, collate_tokens, pad_rows
from prelnroberta.data.features.encoding import encode_texts
from prelnroberta.data.pretraining.packing import Row
from prelnroberta.data.shuffle import Batch
from prelnroberta.data.tokenizer import BOS_ID, EOS_ID, PAD_ID
from prelnroberta.errors import InputError

if TYPE_CHECKING:
    import tokenizers


def token_stream(documents: Iterable[str], tokenizer: tokenizers.Tokenizer) -> np.ndarray:
    """int32 [U]: `<s> document </s>` of all documents, in memory (4 bytes a token).

    Raises:
        InputError: every document is empty.
    """
    texts = (text for text in documents if text.strip())
    parts = [part for ids in encode_texts(tokenizer, texts) for part in ([BOS_ID], ids, [EOS_ID])]
    if not parts:
        raise InputError("no text: every document is empty; give other files")
    return np.concatenate(parts, dtype=np.int32)


class TokenBlocks(Features):
    """Rows of `length` tokens of a stream, each sharing `overlap` tokens with the one before.

    With `overlap=0`, the blocks of transformers' run_clm and run_mlm (group_texts), but with the
    shorter last block that those scripts drop; a causal model never predicts the first token of a
    block. With `overlap=1`, all tokens but the stream's first are predicted. A larger overlap gives
    every token at least that much context, for exact perplexities.

    Args:
        stream: int32 [U].
        length: L.
        overlap: tokens shared with the previous block.

    Raises:
        InputError: a length below 2, or an overlap outside [0, length).
    """

    per_token_arrays = ("labels",)

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
    def fill_ratio(self) -> float:
        """Share of the rows' positions that hold tokens."""
        return float(self.lengths.sum()) / (len(self) * self.length)

    def __len__(self) -> int:
        return len(self._starts)

    def __getitem__(self, index: int) -> Row:
        """Row `index` as one segment, padded at the end."""
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
        """The batch of the rows at `indices` [B] for a causal model, see the module docstring."""
        rows = {int(index): self._tokens(index) for index in indices if index != PADDING_INDEX}
        batch = collate_tokens(rows, indices, length)
        batch["labels"] = labels = pad_rows(rows, indices, length, IGNORE_INDEX)
        # Nothing precedes a row's first token; the previous row predicted those of the overlap.
        labels[:, 0] = IGNORE_INDEX
        labels[np.asarray(indices) > 0, : self.overlap] = IGNORE_INDEX
        return batch
