"""What is inside a model: vectors of texts, and where its heads look. Uses of `predict`."""

from __future__ import annotations

import itertools
import json
import zipfile
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from experiments import flags
from experiments.flags import FLAGS
from prelnroberta.config import RobertaPreLayerNormConfig
from prelnroberta.errors import InputError
from prelnroberta.files import written_whole

_CHUNK = 1024  # texts computed at a time


def load_encoder(folder: Path) -> tuple[Any, Any, RobertaPreLayerNormConfig]:
    """(module, params, config) of the encoder of a model with any head, or with none."""

    from prelnroberta.model.encoder import Encoder
    from prelnroberta.pretrained.hf_checkpoint import load_pretrained

    params, config = load_pretrained(folder, "encoder")
    execution = flags.execution()
    return Encoder(config, execution), execution.prepared(params), config


# ---------------------------------------------------------------------------------------------
# Embeddings.


def embed(folder: Path) -> int:
    """--output: an .npz with `vectors` [n, layers, D] float32 and `texts` [n], or .jsonl."""
    config = RobertaPreLayerNormConfig.from_json(folder)
    layers = chosen_layers(config)
    output = Path(FLAGS.output or "")
    if output.suffix not in (".npz", ".jsonl"):
        raise InputError(f"--output={FLAGS.output}, expected a file named .npz or .jsonl")
    vectors = embedded(folder, layers)
    with written_whole(output) as partial_path:
        if output.suffix == ".jsonl":
            count = write_jsonl(partial_path, vectors)
        else:
            count = write_npz(partial_path, vectors, (len(layers), config.hidden_size))
    print(f"{count:,} texts, {len(layers)} x {config.hidden_size} numbers each: {output}")
    return 0


def chosen_layers(config: RobertaPreLayerNormConfig) -> list[int]:
    """--layers as numbers from 0 (the embeddings) to N (after the final norm)."""
    N = config.num_hidden_layers
    try:
        asked = [int(layer) for layer in FLAGS.layers]
    except ValueError:
        asked = []
    if not asked or not all(-N - 1 <= layer <= N for layer in asked):
        raise InputError(
            f"--layers={','.join(FLAGS.layers)}, expected numbers from 0 (embeddings) to {N} (the "
            "last layer, normed), or from -1 backwards"
        )
    return [layer % (N + 1) for layer in asked]


def embedded(folder: Path, layers: list[int]) -> Iterator[tuple[str, np.ndarray]]:
    """(text, its vectors [layers, D]) of each text of the input."""
    import jax

    from experiments.common.evaluator import by_length
    from experiments.common.text_input import reads_keyboard, texts
    from prelnroberta.data.features.base import NOTHING
    from prelnroberta.data.features.sequence_classification import text_features
    from prelnroberta.data.readers.classification import TextExample
    from prelnroberta.data.readers.row_errors import BadRows
    from prelnroberta.data.tokenizer import load_tokenizer

    module, params, config = load_encoder(folder)
    tokenizer = load_tokenizer(folder)
    longest = config.max_length if FLAGS.max_length is None else FLAGS.max_length
    if not 8 <= longest <= config.max_length:
        raise InputError(f"--max_length={longest}, expected 8 to {config.max_length}, the model's")
    compute = jax.jit(partial(vectors_of, module, layers, FLAGS.pooling))
    lines = texts()
    while chunk := list(itertools.islice(lines, 1 if reads_keyboard() else _CHUNK)):
        examples = [TextExample(line.place, line.text) for line in chunk]
        features = text_features(examples, tokenizer, longest, bad=BadRows())
        found: list[Any] = [None] * len(chunk)
        for indices, batch in by_length(features, longest):
            rows = np.asarray(compute(params, batch["input_ids"], batch["attention_mask"]))
            for index, row in zip(indices, rows, strict=True):
                if index != NOTHING:
                    found[index] = row
        yield from zip((line.text for line in chunk), found, strict=True)


def vectors_of(module: Any, layers: list[int], pooling: str, params: Any, ids: Any, mask: Any):
    """[B, layers, D] float32 of ids [B, L]: of real tokens the mean, or the first, `<s>`.

    Layer 0 is the embeddings, n the residual stream after block n, N what the final norm makes of
    the last.
    """
    import jax.numpy as jnp

    encoded = module.apply({"params": params}, ids, attention_mask=mask, keep_residuals=True)
    streams = [*encoded.residuals[:-1], encoded.last_hidden_state]
    x = jnp.stack([streams[layer] for layer in layers], axis=1).astype(jnp.float32)
    if pooling == "first":
        return x[:, :, 0]
    weights = mask.astype(jnp.float32)
    total = jnp.einsum("bnld,bl->bnd", x, weights)
    return total / jnp.maximum(weights.sum(axis=1), 1.0)[:, None, None]


def write_jsonl(path: Path, vectors: Iterator[tuple[str, np.ndarray]]) -> int:
    count = 0
    with path.open("w", encoding="utf-8") as file:
        for text, rows in vectors:
            file.write(json.dumps({"text": text, "vectors": rows.tolist()}) + "\n")
            count += 1
    return count


def write_npz(path: Path, vectors: Iterator[tuple[str, np.ndarray]], shape: tuple) -> int:
    """Numbers and texts go to files beside `path` first: an array's header tells its length."""
    parts = [path.with_name(f"{path.name}.{part}") for part in ("vectors", "texts")]
    count = longest = 0
    try:
        with parts[0].open("wb") as numbers, parts[1].open("w", encoding="utf-8") as lines:
            for text, rows in vectors:
                numbers.write(np.ascontiguousarray(rows, "<f4").tobytes())
                lines.write(json.dumps(text) + "\n")
                count, longest = count + 1, max(longest, len(text))
        with zipfile.ZipFile(path, "w", allowZip64=True) as archive:
            with archive.open("vectors.npy", "w", force_zip64=True) as file:
                _write_header(file, "<f4", (count, *shape))
                with parts[0].open("rb") as numbers:
                    while block := numbers.read(1 << 20):
                        file.write(block)
            # Every text takes the room of the longest, nearly all of it zeros.
            texts = zipfile.ZipInfo("texts.npy")
            texts.compress_type = zipfile.ZIP_DEFLATED
            with archive.open(texts, "w", force_zip64=True) as file:
                _write_header(file, f"<U{max(longest, 1)}", (count,))
                with parts[1].open(encoding="utf-8") as lines:
                    for line in lines:
                        file.write(np.array(json.loads(line), f"<U{max(longest, 1)}").tobytes())
    finally:
        for part in parts:
            part.unlink(missing_ok=True)
    return count


def _write_header(file: Any, dtype: str, shape: tuple[int, ...]) -> None:
    header = {"descr": dtype, "fortran_order": False, "shape": shape}
    np.lib.format.write_array_header_2_0(file, header)


# ---------------------------------------------------------------------------------------------
# Attention.


def draw_attention(folder: Path) -> int:
    """--output: a folder, in which attention.html and attention.png of one --text are made."""
    from experiments.common.plots import draw_attention as draw
    from experiments.common.plots import write_attention_html
    from prelnroberta.data.tokenizer import load_tokenizer

    if len(FLAGS.text) != 1 or not FLAGS.output:
        raise InputError("--task=attention needs one --text, and --output, a folder for the maps")
    flags.check_new_folder(FLAGS.output)
    module, params, config = load_encoder(folder)
    encoding = load_tokenizer(folder).encode(FLAGS.text[0], FLAGS.pair)
    config.check_length(len(encoding.ids), "--text")
    encoded = module.apply({"params": params}, np.array([encoding.ids]), keep_attentions=True)
    attention = np.stack([np.asarray(layer[0], np.float32) for layer in encoded.attentions])
    tokens = [FLAGS.text[0][a:b] for a, b in encoding.offsets]
    if FLAGS.pair is not None:
        sides = {0: FLAGS.text[0], 1: FLAGS.pair}
        tokens = [
            sides.get(side, "")[a:b]
            for side, (a, b) in zip(encoding.sequence_ids, encoding.offsets, strict=True)
        ]
    tokens = [text.strip() or piece for text, piece in zip(tokens, encoding.tokens, strict=True)]
    with written_whole(FLAGS.output) as partial_path:
        partial_path.mkdir()
        write_attention_html(partial_path / "attention.html", tokens, attention)
        drawn = draw(partial_path / "attention.png", tokens, attention)
    print(f"{Path(FLAGS.output) / 'attention.html'}")
    if drawn:
        print(f"{Path(FLAGS.output) / 'attention.png'}")
    return 0
