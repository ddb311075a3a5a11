"""Mean losses of the heads.

They are the means of `prelnroberta/model/losses.py`: in float32 or wider, over the labels that
count, which `IGNORE_INDEX` does not, and 0 if no label counts.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from bridges.pytorch.encoder import at_least_float32
from prelnroberta.config import (
    IGNORE_INDEX,
    REGRESSION,
    SINGLE_LABEL,
    RobertaPreLayerNormConfig,
)


def label_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """Cross entropy of logits [..., C] against labels [...] int."""
    loss_sum = F.cross_entropy(
        at_least_float32(logits).flatten(0, -2),
        labels.long().flatten(),
        ignore_index=IGNORE_INDEX,
        reduction="sum",
    )
    return loss_sum / (labels != IGNORE_INDEX).sum().clamp(min=1)


def sequence_loss(config: RobertaPreLayerNormConfig, logits: Tensor, labels: Tensor) -> Tensor:
    """Loss of logits [B, C] against labels [B] int, [B, C] float, or in regression [B(, C)].

    The problem type is the config's, or is inferred from the labels in each call without changing
    the config.
    """
    problem_type = config.problem_type
    if problem_type is None and config.num_labels == 1:
        problem_type = REGRESSION
    integers = not labels.is_floating_point() and labels.dtype != torch.bool
    if problem_type == SINGLE_LABEL or (problem_type is None and integers):
        return label_loss(logits, labels)
    logits = at_least_float32(logits).flatten()
    labels = labels.to(logits.dtype).flatten()
    if problem_type == REGRESSION:
        return F.mse_loss(logits, labels)
    return F.binary_cross_entropy_with_logits(logits, labels)


def span_loss(logits: Tensor, starts: Tensor, ends: Tensor) -> Tensor:
    """Mean loss of start and end; positions [B] outside of logits [B, L, 2] are ignored."""
    L = logits.shape[1]
    labels = [p.masked_fill((p < 0) | (p >= L), IGNORE_INDEX) for p in (starts, ends)]
    return sum(label_loss(logits[..., side], label) for side, label in enumerate(labels)) / 2
