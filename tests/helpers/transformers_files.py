"""Checkpoints in every file format of transformers."""

import json

import flax.serialization
import h5py
import numpy as np
import safetensors.numpy
import torch

from prelnroberta import params as parameters
from prelnroberta.pretrained import hf_checkpoint
from tests.helpers.small_models import TINY, random_params

FILE_CONFIG = TINY.replace(vocab_size=90, max_position_embeddings=30)
FILE_PARAMS = random_params(FILE_CONFIG)


def tensors_of(tree=FILE_PARAMS, config=FILE_CONFIG, model="masked_lm"):
    return hf_checkpoint.to_state_dict(tree, config, model)


def as_torch_tensors(tensors):
    return {name: torch.from_numpy(np.array(value)) for name, value in tensors.items()}


def write_config(folder, config=FILE_CONFIG, **changes):
    values = {**config.to_dict(), "torch_dtype": "float16", **changes}
    (folder / "config.json").write_text(json.dumps(values))


def princeton(tensors):
    """As princeton-nlp uploaded them: roberta's name, a norm that nothing uses, a buffer."""
    found = {n.replace("roberta_prelayernorm.", "roberta."): v for n, v in tensors.items()}
    for n in range(FILE_CONFIG.num_hidden_layers):
        for leaf in ("weight", "bias"):
            found[f"roberta.encoder.layer.{n}.attention.self.LayerNorm.{leaf}"] = np.ones(32)
    return found | {"roberta.embeddings.position_ids": np.arange(30)[None]}


def flax_tree(tensors):
    flat = {}
    for name, value in tensors.items():
        module, _, leaf = name.rpartition(".")
        if leaf == "weight" and value.ndim == 1:
            leaf = "scale"
        elif leaf == "weight" and "embeddings" in module:
            leaf = "embedding"
        elif leaf == "weight":
            leaf, value = "kernel", value.T
        flat[f"{module.replace('.', '/')}/{leaf}"] = np.ascontiguousarray(value)
    return parameters.unflatten(flat)


def write_h5(path, tensors):
    """Names as TF's classes in transformers 4.57 give them: see the slow test for the real ones."""
    with h5py.File(path, "w") as file:
        for name, value in tensors.items():
            module, _, leaf = name.rpartition(".")
            group = "lm_head" if module.startswith("lm_head") else "roberta_prelayernorm"
            if leaf == "weight" and "embeddings.LayerNorm" not in module and "embed" in module:
                leaf = "weight" if "word" in module else "embeddings"
            elif value.ndim == 1 and "orm" in module:
                leaf = {"weight": "gamma", "bias": "beta"}[leaf]
            elif leaf == "weight":
                leaf, value = "kernel", value.T
            module = module.replace("encoder.layer.", "encoder.layer_._").replace(".", "/")
            base = f"tf_roberta_pre_layer_norm_for_masked_lm_1/{module}"
            file[f"{group}/{base}/{leaf}:0"] = value
            if "embeddings" in module:
                file[f"lm_head/{base}/{leaf}:0"] = value


def write_bin_shards(folder, tensors):
    names = sorted(tensors)
    places = {name: f"pytorch_model-{1 + i % 3:05}-of-00003.bin" for i, name in enumerate(names)}
    for place in set(places.values()):
        shard = {name: tensors[name] for name in names if places[name] == place}
        torch.save(as_torch_tensors(shard), folder / place)
    index = {"metadata": {}, "weight_map": places}
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps(index))


FILE_FORMS = {
    "bin": lambda f, t: torch.save(as_torch_tensors(t), f / "pytorch_model.bin"),
    "bin, torch's old container": lambda f, t: torch.save(
        as_torch_tensors(t), f / "pytorch_model.bin", _use_new_zipfile_serialization=False
    ),
    "bin, tied copies": lambda f, t: torch.save(
        as_torch_tensors(t)
        | {
            "lm_head.decoder.weight": torch.from_numpy(FILE_PARAMS["embeddings"]["word"]),
            "lm_head.decoder.bias": torch.from_numpy(FILE_PARAMS["lm_head"]["bias"]),
        },
        f / "pytorch_model.bin",
    ),
    "bin in shards": write_bin_shards,
    "princeton-nlp": lambda f, t: (
        write_config(f, model_type="roberta", architectures=["RobertaForMaskedLM"]),
        torch.save(as_torch_tensors(princeton(t)), f / "pytorch_model.bin"),
    ),
    "safetensors": lambda f, t: safetensors.numpy.save_file(t, f / "model.safetensors"),
    "safetensors in shards": lambda f, t: hf_checkpoint.save_pretrained(
        f, FILE_PARAMS, FILE_CONFIG, max_shard_bytes=5000
    ),
    "msgpack": lambda f, t: (f / "flax_model.msgpack").write_bytes(
        flax.serialization.msgpack_serialize(flax_tree(t))
    ),
    "h5": lambda f, t: write_h5(f / "tf_model.h5", t),
}
