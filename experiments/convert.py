"""Converts weights from elsewhere: fairseq, DinkyTrain, and transformers' files of any age.

python -m experiments.convert --input=checkpoint_best.pt --describe
python -m experiments.convert --input=checkpoint_best.pt --output=models/mine
python -m experiments.convert --input=models/mine --output=for_fairseq --to=fairseq

What is not RoBERTa-PreLayerNorm is refused with the reason. Both sides are then run, and the error
printed. bridges/formats/fairseq/README.md lists the forms.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from experiments.flags.checks import check_new_folder
from experiments.flags.launch import launch
from experiments.flags.programs import ConvertSettings
from prelnroberta.errors import InputError
from prelnroberta.files import atomic_write

if TYPE_CHECKING:
    import tokenizers

    from bridges.formats.foreign_checkpoint import Checkpoint


def main(settings: ConvertSettings) -> int:
    """Reads, writes and compares. Returns the exit code."""
    if not settings.describe:
        check_output(settings)

    from bridges.formats.detect import find_tokenizer, open_checkpoint
    from bridges.verify.conversion_check import verify_conversion

    checkpoint = open_checkpoint(input_path(settings), settings.head)
    describe(checkpoint)
    if settings.describe:
        for problem in checkpoint.problems:
            print(f"refused: {problem}")
        return 0
    params = checkpoint.to_params()
    tokenizer, note = find_tokenizer(checkpoint)
    print(note)
    dtype = checkpoint.stored_dtype if settings.dtype == "stored" else settings.dtype
    output = Path(settings.output or "")
    output.parent.mkdir(parents=True, exist_ok=True)
    with atomic_write(output) as partial:
        partial.mkdir()
        head = write(partial, settings.to, params, checkpoint, tokenizer, dtype)
        exact = dtype in ("float32", checkpoint.stored_dtype)
        errors = verify_conversion(checkpoint, params, partial, tokenizer, exact, head)
    same = "every weight is the same" if errors.weights == 0 else (
        f"weights differ by at most {errors.weights:.1e}"
    )  # fmt: skip
    print(
        f"input and output, each run in float64 by its own names: relative error "
        f"{errors.float64:.1e} on {errors.num_tokens} tokens; {same}"
    )
    print(f"this package's model in float32 against the input: {errors.float32:.1e}")
    print(f"written: {output} ({dtype})")
    return 0


def check_output(settings: ConvertSettings) -> None:
    """Raises InputError for an --output that is missing or would be overwritten."""
    if not settings.output:
        raise InputError("--output is missing: the folder to make (or give --describe)")
    check_new_folder(settings.output)


def input_path(settings: ConvertSettings) -> Path:
    """--input, or the model inside a run."""
    path = Path(settings.input)
    if (path / "model" / "config.json").exists() and not (path / "config.json").exists():
        return path / "model"
    return path


def describe(checkpoint: Checkpoint) -> None:
    """Prints what the input holds."""
    from prelnroberta.params import parameter_count

    config = checkpoint.config
    print(f"input: {checkpoint.format}, {checkpoint.path}")
    if config is not None:
        print(
            f"architecture: {config.num_hidden_layers} layers of {config.hidden_size}, "
            f"{config.num_attention_heads} heads, MLP {config.intermediate_size} "
            f"({config.hidden_act}), {config.max_length} positions, "
            f"layer_norm_eps {config.layer_norm_eps:g}"
        )
        print(f"parameters: {parameter_count(config, checkpoint.model):,} as {checkpoint.model}")
        tied = "tied to" if config.tie_word_embeddings else "untied from"
        print(f"vocabulary: {config.vocab_size:,} tokens; output {tied} the word table")
    stored = ", ".join(f"{count:,} {dtype}" for dtype, count in checkpoint.dtype_counts.items())
    print(f"stored: {stored or 'nothing'}")
    print(f"heads: {', '.join(checkpoint.heads) or 'none'}; norms: {checkpoint.norms}")
    for dropped in checkpoint.dropped:
        print(f"dropped: {dropped}")
    for note in checkpoint.notes:
        print(f"note: {note}")


def write(
    directory: Path,
    to: str,
    params: dict,
    checkpoint: Checkpoint,
    tokenizer: tokenizers.Tokenizer | None,
    dtype: str,
) -> str | None:
    """Writes the files into an empty directory; returns the name of the head, for fairseq's."""
    config, model = checkpoint.config, checkpoint.model
    if to == "fairseq":
        from bridges.formats.fairseq import writer

        writer.save_checkpoint(directory, params, config, model, tokenizer, dtype)
        for note in writer.conversion_notes(params, config, model):
            print(f"note: {note}")
        return writer.HEAD_NAME if model == "sequence_classification" else None

    from prelnroberta.data.tokenizer import save_tokenizer
    from prelnroberta.pretrained.hf_checkpoint import save_pretrained

    save_pretrained(directory, params, config, model, dtype=dtype)
    if tokenizer is not None:
        save_tokenizer(tokenizer, directory, config.max_length)
    return None


if __name__ == "__main__":
    launch(main, ConvertSettings)
