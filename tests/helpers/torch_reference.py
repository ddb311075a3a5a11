"""transformers 5's PyTorch classes in float64, with our parameters."""

import numpy as np
import torch
import transformers
from transformers import RobertaPreLayerNormConfig as TorchConfig
from transformers import RobertaPreLayerNormForMaskedLM as TorchMaskedLM

from prelnroberta.config import ARCHITECTURES, RobertaPreLayerNormConfig
from prelnroberta.pretrained.hf_checkpoint import to_state_dict

torch.set_num_threads(1)


def transformers_model(model, config, params):
    """transformers 5's class with our parameters, in float64."""
    values = {k: v for k, v in config.to_dict().items() if k != "model_type"}
    settings = transformers.RobertaPreLayerNormConfig(**values, attn_implementation="eager")
    options = {"add_pooling_layer": False} if model == "encoder" else {}
    theirs = getattr(transformers, ARCHITECTURES[model])(settings, **options).eval()
    tensors = {k: torch.from_numpy(v) for k, v in to_state_dict(params, config, model).items()}
    found = theirs.load_state_dict(tensors, strict=False)
    tied = {"lm_head.decoder.weight", "lm_head.decoder.bias"}
    assert not found.unexpected_keys and set(found.missing_keys) <= tied
    return theirs.double()


class TorchReference:
    """transformers' model in float64 on a batch, with what each submodule returned."""

    def __init__(self, config: RobertaPreLayerNormConfig, params: dict, batch: dict):
        values = {k: v for k, v in config.to_dict().items() if k != "model_type"}
        self.model = TorchMaskedLM(TorchConfig(**values, attn_implementation="eager")).eval()
        tensors = {k: torch.from_numpy(v) for k, v in to_state_dict(params, config).items()}
        if config.tie_word_embeddings:
            word = tensors["roberta_prelayernorm.embeddings.word_embeddings.weight"]
            tensors["lm_head.decoder.weight"] = word
            tensors["lm_head.decoder.bias"] = tensors["lm_head.bias"]
        self.model.load_state_dict(tensors, strict=True)
        self.model.double()
        self.seen = {}
        for name, module in self.model.named_modules():
            module.register_forward_hook(self._keep(name))
        self.output = self.model(**{k: torch.from_numpy(v) for k, v in batch.items()})
        self.output.loss.backward()

    def _keep(self, name):
        def hook(module, args, output):
            output = output[0] if isinstance(output, tuple) else output
            if isinstance(output, torch.Tensor):
                self.seen[name] = output.detach().double().numpy()

        return hook

    def gradients(self) -> dict[str, np.ndarray]:
        return {
            name: p.grad.numpy() for name, p in self.model.named_parameters() if p.grad is not None
        }
