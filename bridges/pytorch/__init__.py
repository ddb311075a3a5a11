"""The seven models as PyTorch modules, built from the parameter tree.

Importing this package loads torch, and jax for the parameter table, but starts no jax backend.
"""

from bridges.pytorch.base_model import RobertaPreLayerNormModel
from bridges.pytorch.kv_cache import KVCache
from bridges.pytorch.task_models import (
    RobertaPreLayerNormForCausalLM,
    RobertaPreLayerNormForMaskedLM,
    RobertaPreLayerNormForMultipleChoice,
    RobertaPreLayerNormForQuestionAnswering,
    RobertaPreLayerNormForSequenceClassification,
    RobertaPreLayerNormForTokenClassification,
)
from prelnroberta.config import RobertaPreLayerNormConfig

__all__ = [
    "KVCache",
    "RobertaPreLayerNormConfig",
    "RobertaPreLayerNormForCausalLM",
    "RobertaPreLayerNormForMaskedLM",
    "RobertaPreLayerNormForMultipleChoice",
    "RobertaPreLayerNormForQuestionAnswering",
    "RobertaPreLayerNormForSequenceClassification",
    "RobertaPreLayerNormForTokenClassification",
    "RobertaPreLayerNormModel",
]
