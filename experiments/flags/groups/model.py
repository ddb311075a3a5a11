"""The architecture, and the weights to start from."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from experiments.common.find_model import find_model_folder
from experiments.flags.field import flag
from prelnroberta.config import PRESETS, RobertaPreLayerNormConfig

DEFAULT_PRESET = "small"


def _override(help: str) -> Any:
    return flag(None, help)


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelSettings:
    preset: str | None = flag(
        None, f"Named architecture: {', '.join(PRESETS)}. Default: {DEFAULT_PRESET}."
    )
    init_from: str | None = flag(
        None, "A model folder or a run to start from: its config, weights and tokenizer."
    )
    tokenizer: str | None = flag(
        None,
        "A tokenizer.json; a folder with tokenizer.json, vocab.json and merges.txt, or fairseq's "
        "encoder.json, vocab.bpe and dict.txt; or a run. Default: that of --init_from, or else "
        "(pretrain) one trained on the corpus.",
    )
    hidden_size: int | None = _override("D, overrides the preset.")
    num_hidden_layers: int | None = _override("N, overrides the preset.")
    num_attention_heads: int | None = _override("H, overrides the preset.")
    intermediate_size: int | None = _override("F, width of the MLP; overrides the preset.")
    max_position_embeddings: int | None = _override(
        "Rows of the position table, two more than the longest row; overrides the preset."
    )
    initializer_range: float | None = _override(
        "Standard deviation of initial values; overrides the preset."
    )
    layer_norm_eps: float | None = _override("Epsilon of LayerNorm; overrides the preset.")
    hidden_dropout_prob: float | None = _override(
        "Dropout of activations; overrides the preset or --init_from."
    )
    attention_probs_dropout_prob: float | None = _override(
        "Dropout of attention probabilities; overrides the preset or --init_from."
    )

    def model_config(self, vocab_size: int) -> RobertaPreLayerNormConfig:
        """The config of --init_from with other dropout, or else the preset with all overrides."""
        dropouts = self._given(
            "hidden_dropout_prob", "attention_probs_dropout_prob", "classifier_dropout"
        )
        sizes = self._given(
            "hidden_size",
            "num_hidden_layers",
            "num_attention_heads",
            "intermediate_size",
            "max_position_embeddings",
            "initializer_range",
            "layer_norm_eps",
        )
        from_preset = RobertaPreLayerNormConfig.preset(
            self.preset or DEFAULT_PRESET, vocab_size=vocab_size, **sizes, **dropouts
        )
        if not self.init_from:
            return from_preset
        folder = find_model_folder(self.init_from)
        if ignored := {**self._given("preset", "fast_start"), **sizes}:
            # A recipe sets these, so the user must know that they have no effect.
            names = ", ".join(f"--{name}" for name in ignored)
            print(f"starting from the architecture and values of {folder}: {names} have no effect")
        return RobertaPreLayerNormConfig.from_json(folder).replace(**dropouts)

    def tokenizer_path(self) -> Path | None:
        """--tokenizer, which may be a run, or else the folder of --init_from, if one is given."""
        if self.tokenizer is None:
            return find_model_folder(self.init_from) if self.init_from else None
        source = Path(self.tokenizer)
        return source / "tokenizer" if (source / "flags.txt").exists() else source

    def _given(self, *names: str) -> dict[str, Any]:
        """name -> value of those of these flags that the program has and that are set."""
        values = {name: getattr(self, name, None) for name in names}
        return {n: value for n, value in values.items() if value is not None and value is not False}
