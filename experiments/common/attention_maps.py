"""Attention maps of one text: a use of `predict`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from experiments.common.text_embeddings import load_encoder
from experiments.flags.checks import check_new_folder
from prelnroberta.errors import InputError
from prelnroberta.files import atomic_write

if TYPE_CHECKING:
    from experiments.flags.programs import PredictSettings


def draw_attention_maps(settings: PredictSettings, folder: Path) -> int:
    """Makes the folder --output with attention.html and attention.png of one --text."""
    from experiments.common.plots import draw_attention, write_attention_html
    from prelnroberta.data.tokenizer import load_tokenizer

    if len(settings.text) != 1 or not settings.output:
        raise InputError("--task=attention needs one --text, and --output, a folder for the maps")
    check_new_folder(settings.output)
    module, params, config = load_encoder(settings, folder)
    text = settings.text[0]
    encoding = load_tokenizer(folder).encode(text, settings.pair)
    config.check_length(len(encoding.ids), "--text")
    encoded = module.apply({"params": params}, np.array([encoding.ids]), keep_attentions=True)
    attention = np.stack([np.asarray(layer[0], np.float32) for layer in encoded.attentions])
    tokens = [text[a:b] for a, b in encoding.offsets]
    if settings.pair is not None:
        sides = {0: text, 1: settings.pair}
        tokens = [
            sides.get(side, "")[a:b]
            for side, (a, b) in zip(encoding.sequence_ids, encoding.offsets, strict=True)
        ]
    tokens = [token.strip() or piece for token, piece in zip(tokens, encoding.tokens, strict=True)]
    with atomic_write(settings.output) as partial_path:
        partial_path.mkdir()
        write_attention_html(partial_path / "attention.html", tokens, attention)
        drawn = draw_attention(partial_path / "attention.png", tokens, attention)
    print(f"{Path(settings.output) / 'attention.html'}")
    if drawn:
        print(f"{Path(settings.output) / 'attention.png'}")
    return 0
