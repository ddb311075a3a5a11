"""The PyTorch twins of the Flax classes, and how their outputs are compared."""

import numpy as np
import torch

import bridges.pytorch
from prelnroberta.config import ARCHITECTURES
from tests.helpers.small_models import random_params


def twin_class(model):
    return getattr(bridges.pytorch, ARCHITECTURES[model])


def twin(model, config, params=None):
    params = random_params(config, model) if params is None else params
    options = {"add_pooling_layer": False} if model == "encoder" else {}
    return twin_class(model).from_params(params, config, **options)


def to_torch(batch, dtype=torch.float32):
    found = {name: torch.from_numpy(np.array(value)) for name, value in batch.items()}
    return {k: v.to(dtype) if v.is_floating_point() else v for k, v in found.items()}


def paired_outputs(found, expected):
    """(name, ours, theirs) of two outputs, tuples taken apart."""
    for name, value in expected.items():
        if name == "past_key_values" or (isinstance(value, tuple) and not value):
            continue
        several = isinstance(value, tuple)
        a, b = (found[name], value) if several else ((found[name],), (value,))
        assert len(a) == len(b), name
        for i, (ours, theirs) in enumerate(zip(a, b, strict=True)):
            ours = ours.detach().numpy() if isinstance(ours, torch.Tensor) else ours
            theirs = theirs.detach().numpy() if isinstance(theirs, torch.Tensor) else theirs
            yield f"{name} {i}", np.asarray(ours), np.asarray(theirs)


def scalar_target(output):
    """A number that everything the model computes goes into: its loss, or a weighted sum."""
    if output.get("loss") is not None:
        return output["loss"]
    total = (output[0] * torch.linspace(-1, 1, output[0].numel()).view_as(output[0])).sum()
    pooled = output.get("pooler_output")
    return total if pooled is None else total + (pooled**2).sum()
