"""The TensorFlow twins of the Flax classes."""

import numpy as np

import bridges.tensorflow
from prelnroberta.pretrained.hf_checkpoint import ARCHITECTURES
from tests.helpers.small_models import flax_model, random_params

MODELS = [model for model in ARCHITECTURES if model != "encoder"]
IDS = np.array([[0, 5, 6, 7, 2], [0, 9, 8, 2, 1]])


def tf_model(model, config, params=None, **options):
    cls = getattr(bridges.tensorflow, "TF" + ARCHITECTURES[model])
    if model == "encoder":
        options["add_pooling_layer"] = False
    return cls(config, params=params, **options)


def tf_and_flax(model, config, **options):
    """(TF, Flax) of the same random parameters."""
    params = random_params(config, model)
    flax = flax_model(model, config)
    flax.params = params
    return tf_model(model, config, params, **options), flax
