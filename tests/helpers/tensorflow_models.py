"""The TensorFlow twins of the Flax classes."""

import bridges.tensorflow
from prelnroberta.config import ARCHITECTURES
from tests.helpers.small_models import flax_model, random_params


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
