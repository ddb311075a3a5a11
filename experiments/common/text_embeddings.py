"""Vectors of texts, from the encoder of a model with any head: a use of `predict`."""

from __future__ import annotations

import itertools
import json
import shutil
import tempfile
import zipfile
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from experiments.common.text_input import TextInput
from prelnroberta.config import RobertaPreLayerNormConfig
from prelnroberta.errors import InputError
from prelnroberta.files import atomic_write

if TYPE_CHECKING:
    from experiments.flags.programs import PredictSettings

_CHUNK = 1024  # texts in memory at the same time


def load_encoder(
    settings: PredictSettings, folder: Path
) -> tuple[Any, Any, RobertaPreLayerNormConfig]:
    """The module, parameters and config of the encoder of a model with any head, or with none."""
    from prelnroberta.model.encoder import Encoder
    from prelnroberta.pretrained.hf_checkpoint import load_pretrained

    params, config = load_pretrained(folder, "encoder")
    execution = settings.execution()
    return Encoder(config, execution), execution.params_for_inference(params), config


def embed(settings: PredictSettings, folder: Path) -> int:
    """Writes --output: an .npz with `vectors` [n, layers, D] float32 and `texts` [n], or .jsonl."""
    config = RobertaPreLayerNormConfig.from_json(folder)
    layers = layer_numbers(settings, config)
    output = Path(settings.output or "")
    if output.suffix not in (".npz", ".jsonl"):
        raise InputError(f"--output={settings.output}, expected a file named .npz or .jsonl")
    vectors = embed_texts(settings, folder, layers)
    with atomic_write(output) as partial_path:
        if output.suffix == ".jsonl":
            count = write_jsonl(partial_path, vectors)
        else:
            count = write_npz(partial_path, vectors, (len(layers), config.hidden_size))
    print(f"{count:,} texts, {len(layers)} x {config.hidden_size} numbers each: {output}")
    return 0


def layer_numbers(settings: PredictSettings, config: RobertaPreLayerNormConfig) -> list[int]:
    """--layers as numbers from 0 (the embeddings) to N (after the final norm)."""
    N = config.num_hidden_layers
    asked = settings.layers
    if not asked or not all(-N - 1 <= layer <= N for layer in asked):
        raise InputError(
            f"--layers={','.join(map(str, asked))}, expected numbers from 0 (embeddings) to {N} "
            "(the last layer, normalized), or from -1 backwards"
        )
    return [layer % (N + 1) for layer in asked]


def embed_texts(
    settings: PredictSettings, folder: Path, layers: list[int]
) -> Iterator[tuple[str, np.ndarray]]:
    """(text, its vectors [layers, D]) of each text of the input."""
    import jax

    from experiments.common.evaluator import batches_by_length
    from prelnroberta.data.features.base import PADDING_INDEX
    from prelnroberta.data.features.sequence_classification import text_features
    from prelnroberta.data.readers.classification import TextExample
    from prelnroberta.data.readers.row_errors import RowErrors
    from prelnroberta.data.tokenizer import load_tokenizer

    module, params, config = load_encoder(settings, folder)
    tokenizer = load_tokenizer(folder)
    longest = config.max_length if settings.max_length is None else settings.max_length
    if not 8 <= longest <= config.max_length:
        raise InputError(f"--max_length={longest}, expected 8 to {config.max_length}, the model's")
    compute = jax.jit(partial(vectors_of, module, layers, settings.pooling))
    source = TextInput(settings.text, settings.file)
    lines = source.lines()
    while chunk := list(itertools.islice(lines, 1 if source.is_keyboard else _CHUNK)):
        examples = [TextExample(line.place, line.text) for line in chunk]
        features = text_features(examples, tokenizer, longest, row_errors=RowErrors())
        found: list[Any] = [None] * len(chunk)
        for indices, batch in batches_by_length(features, longest):
            rows = np.asarray(compute(params, batch["input_ids"], batch["attention_mask"]))
            for index, row in zip(indices, rows, strict=True):
                if index != PADDING_INDEX:
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
    """Writes arrays `vectors` [n, *shape] and `texts` [n]; returns n.

    Memory does not grow with n: the header of an array holds its length, so that numbers and texts
    wait in temporary files next to `path` until n is known.
    """
    count = longest = 0
    with (
        tempfile.TemporaryFile(dir=path.parent) as numbers,
        tempfile.TemporaryFile("w+", dir=path.parent, encoding="utf-8") as lines,
        zipfile.ZipFile(path, "w") as archive,
    ):
        for text, rows in vectors:
            numbers.write(np.ascontiguousarray(rows, "<f4").tobytes())
            lines.write(json.dumps(text) + "\n")
            count, longest = count + 1, max(longest, len(text))
        numbers.seek(0)
        lines.seek(0)
        with archive.open("vectors.npy", "w", force_zip64=True) as file:
            _write_header(file, "<f4", (count, *shape))
            shutil.copyfileobj(numbers, file)
        # Every text takes the size of the longest; nearly all of it is zeros.
        entry = zipfile.ZipInfo("texts.npy")
        entry.compress_type = zipfile.ZIP_DEFLATED
        dtype = f"<U{max(longest, 1)}"
        with archive.open(entry, "w", force_zip64=True) as file:
            _write_header(file, dtype, (count,))
            for line in lines:
                file.write(np.array(json.loads(line), dtype).tobytes())
    return count


def _write_header(file: Any, dtype: str, shape: tuple[int, ...]) -> None:
    header = {"descr": dtype, "fortran_order": False, "shape": shape}
    np.lib.format.write_array_header_2_0(file, header)
