"""Which tokens are masked, in training and in evaluation."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

from experiments.flags.field import flag
from prelnroberta.errors import InputError

if TYPE_CHECKING:
    import numpy as np

    from prelnroberta.data.pretraining.masking import Masking


@dataclasses.dataclass(frozen=True, kw_only=True)
class MaskingSettings:
    mask_rate: float = flag(0.15, "Share of tokens to predict, in (0, 1).")
    mask_sampling: str = flag(
        "exact",
        "exact: a fixed number of tokens a row, which may be special tokens (fairseq). "
        "bernoulli: each token independently, never a special token (Hugging Face).",
        choices=["exact", "bernoulli"],
    )
    mask_unit: str = flag("token", "What is masked as a whole.", choices=["token", "word", "span"])
    mask_random: float = flag(
        0.1, "Share of the selected tokens that are replaced by random tokens."
    )
    mask_keep: float = flag(0.1, "Share of the selected tokens that stay unchanged.")
    eval_mask_rate: float = flag(
        0.15, "Mask rate of evaluations. Runs with the same rate can be compared."
    )
    logits_chunk_size: int = flag(
        0, "Masked positions per logits chunk; 0 computes all of them together."
    )

    def masking(self, vocab_size: int, word_start_mask: np.ndarray) -> Masking:
        """The masks of training. What --mask_random and --mask_keep leave becomes `<mask>`.

        Args:
            word_start_mask: [V] bool, tokens that begin a word.

        Raises:
            InputError: naming the flag and the range that it must be in.
        """
        from prelnroberta.data.pretraining.masking import Masking

        if not 0 < self.mask_rate < 1:
            raise InputError(f"--mask_rate={self.mask_rate}, expected a share in (0, 1)")
        shares = self.mask_random, self.mask_keep
        if not (min(shares) >= 0 and sum(shares) <= 1):
            raise InputError(
                f"--mask_random={shares[0]} and --mask_keep={shares[1]}, expected shares of at "
                "least 0 whose sum is at most 1; the rest becomes <mask>"
            )
        return Masking(
            vocab_size=vocab_size,
            rate=self.mask_rate,
            sampling=self.mask_sampling,
            unit=self.mask_unit,
            mask=1.0 - self.mask_random - self.mask_keep,
            random=self.mask_random,
            keep=self.mask_keep,
            word_start_mask=word_start_mask,
        )

    def eval_masking(self, masking: Masking) -> Masking:
        """The masks of evaluation: those of training at --eval_mask_rate, never on special tokens.
        A masked `<s>` is known by its position, so it says nothing about the text."""
        try:
            return dataclasses.replace(masking, rate=self.eval_mask_rate, sampling="bernoulli")
        except InputError as error:
            raise InputError(f"--eval_mask_rate: {error}") from None

    def check_masking(self) -> None:
        """Raises InputError for rates that are wrong with any vocabulary."""
        import numpy as np

        V = 1 << 10
        self.eval_masking(self.masking(V, np.zeros(V, bool)))

    def masked_per_row(self, vocab_size: int, length: int) -> int:
        """M, the number of masked positions that a row of `length` tokens has room for."""
        import numpy as np

        return self.masking(vocab_size, np.zeros(vocab_size, bool)).max_masked_positions(length)
