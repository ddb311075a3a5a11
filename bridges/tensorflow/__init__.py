"""RobertaPreLayerNorm for TensorFlow: seven Keras 3 models, built from the parameter tree.

    from bridges.tensorflow import TFRobertaPreLayerNormForMaskedLM

    model = TFRobertaPreLayerNormForMaskedLM.from_pretrained(folder)
    logits = model(input_ids, attention_mask=mask).logits  # [B, L, V]

`export.save_saved_model` and `export.save_tflite` write files that load without this package.
"""

from bridges.tensorflow.keras_backend import require_tensorflow

require_tensorflow()

from bridges.tensorflow.pretrained import TFRobertaPreLayerNormPreTrainedModel  # noqa: E402
from bridges.tensorflow.task_models import (  # noqa: E402
    TFRobertaPreLayerNormForCausalLM,
    TFRobertaPreLayerNormForMaskedLM,
    TFRobertaPreLayerNormForMultipleChoice,
    TFRobertaPreLayerNormForQuestionAnswering,
    TFRobertaPreLayerNormForSequenceClassification,
    TFRobertaPreLayerNormForTokenClassification,
    TFRobertaPreLayerNormModel,
)

__all__ = [
    "TFRobertaPreLayerNormForCausalLM",
    "TFRobertaPreLayerNormForMaskedLM",
    "TFRobertaPreLayerNormForMultipleChoice",
    "TFRobertaPreLayerNormForQuestionAnswering",
    "TFRobertaPreLayerNormForSequenceClassification",
    "TFRobertaPreLayerNormForTokenClassification",
    "TFRobertaPreLayerNormModel",
    "TFRobertaPreLayerNormPreTrainedModel",
]
