"""RoBERTa-PreLayerNorm in JAX. Names are loaded when they are first used."""

from importlib import import_module
from typing import Any

_HOMES = {
    "RobertaPreLayerNormConfig": "config",
    "PRESETS": "config",
    "InputError": "errors",
    "FlaxRobertaPreLayerNormPreTrainedModel": "pretrained",
    "FlaxRobertaPreLayerNormModel": "pretrained",
    "FlaxRobertaPreLayerNormForMaskedLM": "pretrained",
    "FlaxRobertaPreLayerNormForCausalLM": "pretrained",
    "FlaxRobertaPreLayerNormForSequenceClassification": "pretrained",
    "FlaxRobertaPreLayerNormForMultipleChoice": "pretrained",
    "FlaxRobertaPreLayerNormForTokenClassification": "pretrained",
    "FlaxRobertaPreLayerNormForQuestionAnswering": "pretrained",
}
__all__ = list(_HOMES)


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
