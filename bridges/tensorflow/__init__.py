"""RobertaPreLayerNorm for TensorFlow: seven Keras 3 models, regenerated from the parameter tree.

    from bridges.tensorflow import TFRobertaPreLayerNormForMaskedLM

    model = TFRobertaPreLayerNormForMaskedLM.from_pretrained(folder)
    logits = model(input_ids, attention_mask=mask).logits  # [B, L, V]

Importing it chooses Keras' TensorFlow backend, unless the user's settings name another: then it
raises InputError, because a Keras of another backend would accept these models and compute with
arrays that TensorFlow does not know.
"""

import os

from prelnroberta.errors import InputError

os.environ.setdefault("KERAS_BACKEND", "tensorflow")
# Of TensorFlow's own lines on stderr, errors only.
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")

if os.environ["KERAS_BACKEND"] == "tensorflow":
    import keras

    _backend = keras.backend.backend()
else:
    _backend = os.environ["KERAS_BACKEND"]
if _backend != "tensorflow":
    raise InputError(
        f"bridges.tensorflow needs Keras' TensorFlow backend, found {_backend!r}: set "
        "KERAS_BACKEND=tensorflow before keras is imported"
    )

from bridges.tensorflow.models import (
    TFRobertaPreLayerNormForCausalLM,
    TFRobertaPreLayerNormForMaskedLM,
    TFRobertaPreLayerNormForMultipleChoice,
    TFRobertaPreLayerNormForQuestionAnswering,
    TFRobertaPreLayerNormForSequenceClassification,
    TFRobertaPreLayerNormForTokenClassification,
    TFRobertaPreLayerNormModel,
)
from bridges.tensorflow.pretrained import TFRobertaPreLayerNormPreTrainedModel

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
