"""The seven models as PyTorch modules, made from the parameter tree.

Importing this loads torch, and jax for the parameter table, but runs nothing on jax.
"""

from bridges.pytorch.encoder import RobertaPreLayerNormModel
from bridges.pytorch.kv_cache import Cache
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
    "Cache",
    "RobertaPreLayerNormConfig",
    "RobertaPreLayerNormForCausalLM",
    "RobertaPreLayerNormForMaskedLM",
    "RobertaPreLayerNormForMultipleChoice",
    "RobertaPreLayerNormForQuestionAnswering",
    "RobertaPreLayerNormForSequenceClassification",
    "RobertaPreLayerNormForTokenClassification",
    "RobertaPreLayerNormModel",
]
