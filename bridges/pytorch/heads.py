"""Task heads: modules from the encoder's hidden states to logits."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from prelnroberta.config import RobertaPreLayerNormConfig


class LMHead(nn.Module):
    """[..., D] -> [..., V]. The activation is the exact gelu, whatever `hidden_act` is."""

    def __init__(self, config: RobertaPreLayerNormConfig):
        super().__init__()
        D, V = config.hidden_size, config.vocab_size
        self.dense = nn.Linear(D, D)
        self.layer_norm = nn.LayerNorm(D, config.layer_norm_eps)
        self.decoder = nn.Linear(D, V)
        self.bias = self.decoder.bias

    def forward(self, x: Tensor) -> Tensor:
        return self.decoder(self.layer_norm(F.gelu(self.dense(x))))


class ClassificationHead(nn.Module):
    """[B, D] -> [B, C]."""

    def __init__(self, config: RobertaPreLayerNormConfig):
        super().__init__()
        self.dense = nn.Linear(config.hidden_size, config.hidden_size)
        self.out_proj = nn.Linear(config.hidden_size, config.num_labels)
        self.dropout = classifier_dropout(config)

    def forward(self, x: Tensor) -> Tensor:
        return self.out_proj(self.dropout(self.dense(self.dropout(x)).tanh()))


def classifier_dropout(config: RobertaPreLayerNormConfig) -> nn.Dropout:
    rate = config.classifier_dropout
    return nn.Dropout(config.hidden_dropout_prob if rate is None else rate)
