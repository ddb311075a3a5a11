"""RoBERTa-PreLayerNorm in JAX.

The public names are imported lazily, on first use: `import prelnroberta` loads no JAX.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from prelnroberta.config import PRESETS, RobertaPreLayerNormConfig
    from prelnroberta.errors import InputError
    from prelnroberta.pretrained.base import FlaxRobertaPreLayerNormPreTrainedModel
    from prelnroberta.pretrained.flax_models import (
        FlaxRobertaPreLayerNormForCausalLM,
        FlaxRobertaPreLayerNormForMaskedLM,
        FlaxRobertaPreLayerNormForMultipleChoice,
        FlaxRobertaPreLayerNormForQuestionAnswering,
        FlaxRobertaPreLayerNormForSequenceClassification,
        FlaxRobertaPreLayerNormForTokenClassification,
        FlaxRobertaPreLayerNormModel,
    )

__all__ = [
    "PRESETS",
    "FlaxRobertaPreLayerNormForCausalLM",
    "FlaxRobertaPreLayerNormForMaskedLM",
    "FlaxRobertaPreLayerNormForMultipleChoice",
    "FlaxRobertaPreLayerNormForQuestionAnswering",
    "FlaxRobertaPreLayerNormForSequenceClassification",
    "FlaxRobertaPreLayerNormForTokenClassification",
    "FlaxRobertaPreLayerNormModel",
    "FlaxRobertaPreLayerNormPreTrainedModel",
    "InputError",
    "RobertaPreLayerNormConfig",
]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module = {
        "PRESETS": "config",
        "RobertaPreLayerNormConfig": "config",
        "InputError": "errors",
        "FlaxRobertaPreLayerNormPreTrainedModel": "pretrained.base",
    }.get(name, "pretrained.flax_models")
    return getattr(import_module(f"{__name__}.{module}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
