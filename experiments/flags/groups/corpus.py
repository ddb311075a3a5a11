"""Raw text to pretrain on."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

from experiments.flags.field import flag
from prelnroberta.errors import InputError

if TYPE_CHECKING:
    from prelnroberta.data.pretraining.corpus import FileCorpus
    from prelnroberta.data.pretraining.docstrings import DocstringCorpus


@dataclasses.dataclass(frozen=True, kw_only=True)
class CorpusSettings:
    corpus: tuple[str, ...] = flag(
        ("docstrings",),
        "Text to train on: files, folders or globs of .txt, .md and .jsonl, each also as .gz, "
        "comma-separated; or 'docstrings', the prose in the installed Python packages.",
    )
    text_field: str = flag("text", "Field of .jsonl lines that holds the text.")
    validation_fraction: float = flag(0.05, "Share of documents to hold out for evaluation.")
    vocab_size: int = flag(8192, "Vocabulary size of the tokenizer to train.")
    cache_dir: str = flag(
        "~/.cache/prelnroberta", "Directory of tokenized text, shared by runs.", on_resume="free"
    )

    def open_corpus(self) -> DocstringCorpus | FileCorpus:
        """The corpus of --corpus and --text_field.

        Raises:
            InputError: --corpus is empty, or a path of it does not exist.
        """
        from prelnroberta.data.pretraining.corpus import FileCorpus
        from prelnroberta.data.pretraining.docstrings import DocstringCorpus

        if self.corpus == ("docstrings",):
            return DocstringCorpus()
        if not self.corpus:
            raise InputError("--corpus is empty, expected 'docstrings', files, folders or globs")
        return FileCorpus(list(self.corpus), self.text_field)

    def check_corpus(self) -> None:
        """Raises InputError for a split or a path that cannot be used."""
        if not 0 < self.validation_fraction < 1:
            raise InputError(
                f"--validation_fraction={self.validation_fraction}, expected a share in (0, 1): "
                "evaluation needs held-out text, and training the rest"
            )
        self.open_corpus()
