"""The six tasks: how each one's files are read, scored, answered and measured, in one place.

`experiments.finetune`, `evaluate` and `predict` are the same for all tasks; what differs is here. A
task goes from files to figures in the order of its methods:

    read      file -> examples                     (prelnroberta/data)
    settled   what the training examples decide: the names of the classes
    features  examples -> token ids in batches     (prelnroberta/data)
    logits    batch -> what the model says         \\
    loss      logits -> summed scores               | pure, compiled together
    outputs   logits -> what answers are made of   /
    answers   outputs -> predictions, JSON-able
    measure   outputs -> metrics
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, ClassVar

import jax
import jax.numpy as jnp
import numpy as np

from prelnroberta import heads
from prelnroberta.config import RobertaPreLayerNormConfig
from prelnroberta.data.bad_rows import BadRows
from prelnroberta.data.blocks import Blocks, token_stream
from prelnroberta.data.bucketing import NOTHING, Features, TrainingBatches
from prelnroberta.data.classification import MULTI, REGRESSION, SINGLE
from prelnroberta.data.loader import Batch, Loader
from prelnroberta.data.masking import Masking
from prelnroberta.entity_metrics import EntityCounts
from prelnroberta.errors import InputError
from prelnroberta.heads import IGNORE, LossSettings, Scores
from prelnroberta.metrics import UnigramBaseline
from prelnroberta.modeling import TableModule
from prelnroberta.params import Tree
from prelnroberta.squad_metrics import QuestionScores, question_scores
from prelnroberta.task_metrics import (
    ClassScores,
    class_report,
    confusion_counts,
    confusion_matrix,
    multi_label_counts,
    multi_label_metrics,
    perplexity,
    regression_metrics,
    single_label_metrics,
)

if TYPE_CHECKING:
    import tokenizers

Array = jax.Array
Row = dict[str, np.ndarray]  # what the model said of one row of the features
Answer = dict[str, Any]


@dataclasses.dataclass(frozen=True, kw_only=True)
class TaskSettings:
    """How a file becomes batches and batches become answers, kept beside a model as `task.json`.

    Attributes:
        max_length: of a row, in tokens.
        text_column, pair_column, label_columns: names, or numbers from 0; None, (): the task's own.
        labels: names of the classes, id by id; (): those of the training file.
        problem_type: of sequence classification, as in config.json.
        all_pieces: whether every piece of a word is labelled, or the first alone.
        stride: tokens that windows over long inputs share; None: the task's own.
        may_be_null: whether questions may have no answer.
        n_best, max_answer_length, null_threshold: of answers (`questions.predict_answers`).
        mask_rate: share of tokens to predict, in masked language modeling.
    """

    task: str
    max_length: int
    text_column: str | int | None = None
    pair_column: str | int | None = None
    label_columns: tuple[str | int, ...] = ()
    labels: tuple[str, ...] = ()
    problem_type: str = SINGLE
    all_pieces: bool = False
    stride: int | None = None
    may_be_null: bool = False
    n_best: int = 20
    max_answer_length: int = 30
    null_threshold: float = 0.0
    mask_rate: float = 0.15


@dataclasses.dataclass(frozen=True)
class Measured:
    """What a model's answers to some examples are worth.

    Attributes:
        of: numbers of examples [k] -> metrics of those; an example may be counted several times.
        count: of all examples.
        confusion, names: of classes, [C, C] counts, true by row.
        classes: precision, recall and F1 of each class.
    """

    of: Callable[[np.ndarray], dict[str, float]]
    count: int
    confusion: np.ndarray | None = None
    names: Sequence[str] = ()
    classes: Sequence[ClassScores] = ()

    @functools.cached_property
    def metrics(self) -> dict[str, float]:
        return self.of(np.arange(self.count))

    def report(self) -> str:
        """The classes as a table to read."""
        width = max([12, *(len(c.name) for c in self.classes)])
        lines = [f"{'':{width}}  precision  recall      f1  support"]
        for name, precision, recall, f1, support in self.classes:
            lines.append(
                f"{name:{width}}  {precision:9.3f}  {recall:6.3f}  {f1:6.3f}  {support:7,}"
            )
        return "\n".join(lines) + "\n"


class Task:
    """What the tasks share. `metric` is what models are compared by; `target` is in the batches of
    examples whose answers are known."""

    model: ClassVar[str]
    metric: str = "accuracy"
    target: ClassVar[str] = "labels"

    def __init__(self, settings: TaskSettings):
        self.settings = settings

    # Data.

    def read(self, path: str | Path, labelled: bool, bad: BadRows) -> list:
        raise NotImplementedError

    def stream(self, path: str, bad: BadRows, file: BinaryIO | None) -> Iterator:
        """Examples without labels as they are read; from `file`, if given, under `path`'s name."""
        raise NotImplementedError

    def typed(self, texts: Sequence[str], pair: str | None, choices: Sequence[str]) -> list:
        """Examples of what was typed on the command line."""
        raise NotImplementedError

    def settled(self, examples: Sequence) -> TaskSettings:
        """The settings with what the training examples decide."""
        return self.settings

    def configure(self, config: RobertaPreLayerNormConfig) -> RobertaPreLayerNormConfig:
        """The config of this task's model, of the architecture of `config`."""
        if not self.settings.labels:
            return config
        return config.replace(id2label=dict(enumerate(self.settings.labels)))

    def features(
        self, examples: Sequence, tokenizer: tokenizers.Tokenizer, bad: BadRows, training: bool
    ) -> Features:
        raise NotImplementedError

    def batches(
        self, features: Features, batch_size: int, seed: int, buckets: Sequence[int]
    ) -> TrainingBatches | Loader:
        return TrainingBatches(features, batch_size, seed, buckets)

    # The model: pure.

    def logits(
        self, module: TableModule, params: Tree, batch: dict[str, Array], keys: Array | None = None
    ) -> Array:
        """Of rows [B]; `keys` [B] are their dropout keys, None evaluates."""
        logits, _ = module.apply(
            {"params": params},
            batch["input_ids"],
            attention_mask=batch["attention_mask"],
            dropout_keys=keys,
        )
        return logits

    def loss(
        self,
        config: RobertaPreLayerNormConfig,
        logits: Array,
        batch: dict[str, Array],
        settings: LossSettings,
    ) -> Scores:
        return heads.label_scores(logits, batch["labels"], settings)

    def outputs(
        self, config: RobertaPreLayerNormConfig, logits: Array, batch: dict[str, Array]
    ) -> dict[str, Array]:
        """By row of the batch, float32."""
        return {"probabilities": jax.nn.softmax(logits.astype(jnp.float32), axis=-1)}

    # Results.

    def answers(self, features: Features, rows: Sequence[Row]) -> Iterator[Answer]:
        """One for each example, in order."""
        raise NotImplementedError

    def measure(self, features: Features, rows: Sequence[Row]) -> Measured:
        raise NotImplementedError

    def trivial(self, train: Features, features: Features) -> float:
        """`metric` of whoever knows the labels of training, and reads no text."""
        raise NotImplementedError

    def merit(self, metrics: Mapping[str, float]) -> float:
        """More is better; what is undefined is worse than anything."""
        value = metrics[self.metric]
        return value if math.isfinite(value) else -1e9

    def label_counts(self, features: Features) -> np.ndarray:
        """[C]: how often each class is asked for."""
        labels = np.concatenate([np.atleast_1d(x) for x in features.labels])
        return np.bincount(labels[labels != IGNORE], minlength=len(self.settings.labels))


def _stacked(rows: Sequence[Row], name: str) -> np.ndarray:
    return np.stack([row[name] for row in rows])


def _of_classes(labels: np.ndarray, found: np.ndarray, names: Sequence[str]) -> Measured:
    """One class of `names` for each of n examples: labels, found [n] int."""
    C = len(names)
    confusion = confusion_matrix(labels, found, C)
    return Measured(
        lambda i: single_label_metrics(confusion_matrix(labels[i], found[i], C)),
        len(labels),
        confusion,
        names,
        class_report(confusion_counts(confusion), names),
    )


def _most_frequent(train: Features, features: Features) -> float:
    """Accuracy of always the most frequent label of training."""
    return float((features.labels == np.bincount(train.labels).argmax()).mean())


class SequenceClassification(Task):
    """Texts or pairs of texts: one label, several labels, or a number."""

    model = "sequence_classification"

    @property
    def metric(self) -> str:
        return {REGRESSION: "pearson", MULTI: "f1_micro"}.get(
            self.settings.problem_type, "accuracy"
        )

    def read(self, path: str | Path, labelled: bool, bad: BadRows) -> list:
        from prelnroberta.data.classification import read_examples

        s = self.settings
        label = (s.label_columns[0] if len(s.label_columns) == 1 else s.label_columns) or "label"
        text = "text" if s.text_column is None else s.text_column
        return read_examples(path, text, s.pair_column, label if labelled else None, bad=bad)

    def stream(self, path: str, bad: BadRows, file: BinaryIO | None) -> Iterator:
        from prelnroberta.data.classification import stream_examples

        s = self.settings
        text = "text" if s.text_column is None else s.text_column
        return stream_examples(path, text, bad, s.pair_column, file=file)

    def typed(self, texts: Sequence[str], pair: str | None, choices: Sequence[str]) -> list:
        from prelnroberta.data.classification import TextExample

        return [TextExample(f"--text {i}", text, pair) for i, text in enumerate(texts, 1)]

    def settled(self, examples: Sequence) -> TaskSettings:
        from prelnroberta.data.classification import label_names
        from prelnroberta.data.labels import discover_labels

        s = self.settings
        if s.labels or s.problem_type == REGRESSION:
            return s
        if s.problem_type == MULTI and len(s.label_columns) > 1:
            names = tuple(map(str, s.label_columns))
        elif s.problem_type == MULTI:
            names = discover_labels(name for e in examples for name in label_names(e.label))
        else:
            names = discover_labels(e.label for e in examples)
        return dataclasses.replace(s, labels=names)

    def configure(self, config: RobertaPreLayerNormConfig) -> RobertaPreLayerNormConfig:
        names = self.settings.labels or ("LABEL_0",)
        kind = self.settings.problem_type
        return config.replace(id2label=dict(enumerate(names)), problem_type=kind)

    def features(
        self, examples: Sequence, tokenizer: tokenizers.Tokenizer, bad: BadRows, training: bool
    ) -> Features:
        from prelnroberta.data.classification import text_features

        s = self.settings
        return text_features(examples, tokenizer, s.max_length, s.problem_type, s.labels, bad)

    def loss(
        self,
        config: RobertaPreLayerNormConfig,
        logits: Array,
        batch: dict[str, Array],
        settings: LossSettings,
    ) -> Scores:
        return heads.sequence_scores(config, logits, batch["labels"], settings, batch["weights"])

    def outputs(
        self, config: RobertaPreLayerNormConfig, logits: Array, batch: dict[str, Array]
    ) -> dict[str, Array]:
        logits = logits.astype(jnp.float32)
        if self.settings.problem_type == REGRESSION:
            return {"value": logits[:, 0]}
        if self.settings.problem_type == MULTI:
            return {"probabilities": jax.nn.sigmoid(logits)}
        return {"probabilities": jax.nn.softmax(logits, axis=-1)}

    def answers(self, features: Features, rows: Sequence[Row]) -> Iterator[Answer]:
        names, kind = self.settings.labels, self.settings.problem_type
        for example, row in zip(features.examples, rows, strict=True):
            answer = {"text": example.text}
            if example.pair is not None:
                answer["pair"] = example.pair
            if kind == REGRESSION:
                yield answer | {"value": float(row["value"])}
                continue
            probabilities = dict(zip(names, row["probabilities"].tolist(), strict=True))
            if kind == MULTI:
                answer["labels"] = [name for name, p in probabilities.items() if p > 0.5]
            else:
                answer["label"] = max(probabilities, key=probabilities.get)
            yield answer | {"probabilities": probabilities}

    def measure(self, features: Features, rows: Sequence[Row]) -> Measured:
        labels, names = features.labels, self.settings.labels
        if self.settings.problem_type == REGRESSION:
            values = _stacked(rows, "value")
            return Measured(lambda i: regression_metrics(labels[i], values[i]), len(rows))
        if self.settings.problem_type == MULTI:
            sides = _stacked(rows, "probabilities") > 0.5
            return Measured(
                lambda i: multi_label_metrics(labels[i], sides[i]),
                len(rows),
                classes=class_report(multi_label_counts(labels, sides), names),
            )
        return _of_classes(labels, _stacked(rows, "probabilities").argmax(axis=-1), names)

    def trivial(self, train: Features, features: Features) -> float:
        if self.settings.problem_type == REGRESSION:
            return 0.0  # the correlation with a constant
        if self.settings.problem_type == MULTI:
            sides = np.broadcast_to(train.labels.mean(axis=0) > 0.5, features.labels.shape)
            return multi_label_metrics(features.labels, sides)[self.metric]
        return _most_frequent(train, features)


class TokenClassification(Task):
    """Words of sentences: entities (IOB2 tags), or any other label a word."""

    model = "token_classification"

    @property
    def metric(self) -> str:
        return "f1" if self._of_entities else "accuracy"

    @property
    def _of_entities(self) -> bool:
        from prelnroberta.data.tags import is_tag

        return all(map(is_tag, self.settings.labels))

    def read(self, path: str | Path, labelled: bool, bad: BadRows) -> list:
        from prelnroberta.data.conll import read_sentences

        s = self.settings
        tag = s.label_columns[0] if s.label_columns else None
        return read_sentences(path, s.text_column, tag, labelled, bad).examples

    def stream(self, path: str, bad: BadRows, file: BinaryIO | None) -> Iterator:
        from prelnroberta.data.conll import stream_sentences

        return stream_sentences(path, bad, self.settings.text_column, tagged=False, file=file)

    def typed(self, texts: Sequence[str], pair: str | None, choices: Sequence[str]) -> list:
        from prelnroberta.data.conll import Sentence

        return [Sentence(f"--text {i}", text.split(), None) for i, text in enumerate(texts, 1)]

    def settled(self, examples: Sequence) -> TaskSettings:
        from prelnroberta.data.conll import tag_names

        s = self.settings
        return s if s.labels else dataclasses.replace(s, labels=tag_names(examples))

    def features(
        self, examples: Sequence, tokenizer: tokenizers.Tokenizer, bad: BadRows, training: bool
    ) -> Features:
        from prelnroberta.data.tokens import token_features

        s = self.settings
        return token_features(
            examples, tokenizer, s.max_length, s.labels, s.all_pieces, s.stride, bad
        )

    def _tags(
        self, features: Features, rows: Sequence[Row]
    ) -> Iterator[tuple[Any, list[str], list[float]]]:
        """Of each sentence: itself, its predicted tags, and their probabilities."""
        by_word = features.by_word([row["probabilities"] for row in rows])
        for sentence, words in zip(features.examples, by_word, strict=True):
            tags = [self.settings.labels[i] for i in words.argmax(axis=-1)]
            yield sentence, tags, words.max(axis=-1).tolist()

    def answers(self, features: Features, rows: Sequence[Row]) -> Iterator[Answer]:
        from prelnroberta.data.tokens import entities

        for sentence, tags, probabilities in self._tags(features, rows):
            answer = {"words": sentence.words, "tags": tags, "probabilities": probabilities}
            if self._of_entities:
                found = entities(sentence, tags, probabilities)
                answer["entities"] = [entity._asdict() for entity in found]
            yield answer

    def measure(self, features: Features, rows: Sequence[Row]) -> Measured:
        names = self.settings.labels
        ids = {name: i for i, name in enumerate(names)}
        found = [tags for _, tags, _ in self._tags(features, rows)]
        true = [sentence.tags for sentence in features.examples]
        confusions = [
            confusion_matrix([ids[t] for t in a], [ids[t] for t in b], len(names))
            for a, b in zip(true, found, strict=True)
        ]
        confusion = sum(confusions)
        if self._of_entities:
            counts = EntityCounts(true, found, scheme=None)  # conlleval's, seqeval's default
            strict = EntityCounts(true, found)
            return Measured(
                lambda i: {**counts.metrics(i), "f1_strict": strict.metrics(i)["f1"]},
                len(found),
                confusion,
                names,
                class_report(counts.counts(), counts.types),
            )
        return Measured(
            lambda i: single_label_metrics(sum(confusions[k] for k in i)),
            len(found),
            confusion,
            names,
            class_report(confusion_counts(confusion), names),
        )

    def trivial(self, train: Features, features: Features) -> float:
        if self._of_entities:
            return 0.0  # no entity is ever named
        counts = self.label_counts(features)
        return float(counts[self.label_counts(train).argmax()] / counts.sum())


class QuestionAnswering(Task):
    """Questions whose answer is a piece of their context, or that it has none (SQuAD 2)."""

    model = "question_answering"
    metric = "f1"
    target = "start_positions"

    def read(self, path: str | Path, labelled: bool, bad: BadRows) -> list:
        from prelnroberta.data.squad import read_questions

        return read_questions(path, labelled, bad)

    def stream(self, path: str, bad: BadRows, file: BinaryIO | None) -> Iterator:
        from prelnroberta.data.squad import stream_questions

        return stream_questions(path, bad, answered=False, file=file)

    def typed(self, texts: Sequence[str], pair: str | None, choices: Sequence[str]) -> list:
        from prelnroberta.data.squad import Question

        if pair is None:
            raise InputError("--text is a question: give its context as --pair")
        return [
            Question(f"--text {i}", str(i), text, pair, None) for i, text in enumerate(texts, 1)
        ]

    def settled(self, examples: Sequence) -> TaskSettings:
        null = any(not question.answers for question in examples)
        return dataclasses.replace(self.settings, may_be_null=null)

    def configure(self, config: RobertaPreLayerNormConfig) -> RobertaPreLayerNormConfig:
        return config.replace(num_labels=2)

    def features(
        self, examples: Sequence, tokenizer: tokenizers.Tokenizer, bad: BadRows, training: bool
    ) -> Features:
        from prelnroberta.data.questions import question_features

        s = self.settings
        stride = s.max_length // 3 if s.stride is None else s.stride  # run_qa's 128 of 384
        return question_features(examples, tokenizer, s.max_length, stride, bad)

    def loss(
        self,
        config: RobertaPreLayerNormConfig,
        logits: Array,
        batch: dict[str, Array],
        settings: LossSettings,
    ) -> Scores:
        starts, ends = heads.span_scores(
            logits, batch["start_positions"], batch["end_positions"], settings
        )
        return starts + ends

    def outputs(
        self, config: RobertaPreLayerNormConfig, logits: Array, batch: dict[str, Array]
    ) -> dict[str, Array]:
        return {"logits": logits.astype(jnp.float32)}

    def _predicted(self, features: Features, rows: Sequence[Row]) -> list:
        from prelnroberta.data.questions import predict_answers

        s = self.settings
        return predict_answers(
            features,
            [row["logits"] for row in rows],
            s.n_best,
            s.max_answer_length,
            s.may_be_null,
            s.null_threshold,
        )

    def answers(self, features: Features, rows: Sequence[Row]) -> Iterator[Answer]:
        predicted = self._predicted(features, rows)
        for question, found in zip(features.examples, predicted, strict=True):
            first = next((c for c in found.candidates if c.text == found.text), None)
            yield {
                "id": question.id,
                "question": question.question,
                "answer": found.text,
                "start": first.start if first else None,
                "end": first.end if first else None,
                "probability": first.probability if first else None,
                "null_difference": found.null_difference,
                "candidates": [c._asdict() for c in found.candidates],
            }

    def _scores(self, features: Features, texts: Sequence[str]) -> QuestionScores:
        answers = {q.id: [answer.text for answer in q.answers] for q in features.examples}
        found = dict(zip(answers, texts, strict=True))
        return question_scores(found, answers, self.settings.may_be_null)

    def measure(self, features: Features, rows: Sequence[Row]) -> Measured:
        scores = self._scores(features, [p.text for p in self._predicted(features, rows)])
        return Measured(scores.metrics, len(features.examples))

    def trivial(self, train: Features, features: Features) -> float:
        texts = [q.answers[0].text if q.answers else "" for q in train.examples]
        most = max(set(texts), key=lambda text: (texts.count(text), text))
        return self._scores(features, [most] * len(features.examples)).metrics()[self.metric]


class MultipleChoice(Task):
    """Which of several continuations is right."""

    model = "multiple_choice"

    def read(self, path: str | Path, labelled: bool, bad: BadRows) -> list:
        from prelnroberta.data.choices import read_choices

        context, prefix, label = self._columns
        return read_choices(path, context, prefix, label=label if labelled else None, bad=bad)

    @property
    def _columns(self) -> tuple[str, str, str]:
        s = self.settings
        return (
            "sent1" if s.text_column is None else s.text_column,
            "sent2" if s.pair_column is None else s.pair_column,
            s.label_columns[0] if s.label_columns else "label",
        )

    def stream(self, path: str, bad: BadRows, file: BinaryIO | None) -> Iterator:
        from prelnroberta.data.choices import stream_choices

        context, prefix, _ = self._columns
        return stream_choices(path, bad, context, prefix, label=None, file=file)

    def typed(self, texts: Sequence[str], pair: str | None, choices: Sequence[str]) -> list:
        from prelnroberta.data.choices import ChoiceExample

        if len(choices) < 2:
            raise InputError("--text is a context: give its continuations as --choice, 2 or more")
        return [
            ChoiceExample(f"--text {i}", text, pair or "", list(choices), None)
            for i, text in enumerate(texts, 1)
        ]

    def configure(self, config: RobertaPreLayerNormConfig) -> RobertaPreLayerNormConfig:
        return config.replace(num_labels=1)

    def features(
        self, examples: Sequence, tokenizer: tokenizers.Tokenizer, bad: BadRows, training: bool
    ) -> Features:
        from prelnroberta.data.choices import choice_features

        return choice_features(examples, tokenizer, self.settings.max_length)

    def logits(
        self, module: TableModule, params: Tree, batch: dict[str, Array], keys: Array | None = None
    ) -> Array:
        from prelnroberta.data.choices import masked_logits

        logits = super().logits(module, params, batch, keys)
        return masked_logits(logits.astype(jnp.float32), batch["choice_mask"])

    def answers(self, features: Features, rows: Sequence[Row]) -> Iterator[Answer]:
        for example, row in zip(features.examples, rows, strict=True):
            probabilities = row["probabilities"][: len(example.choices)].tolist()
            best = int(np.argmax(probabilities))
            yield {
                "context": example.context,
                "choice": best,
                "text": example.choices[best],
                "probabilities": probabilities,
            }

    def measure(self, features: Features, rows: Sequence[Row]) -> Measured:
        right = _stacked(rows, "probabilities").argmax(axis=-1) == features.labels
        return Measured(lambda i: {"accuracy": float(right[i].mean())}, len(right))

    def trivial(self, train: Features, features: Features) -> float:
        return _most_frequent(train, features)


class _LanguageModel(Task):
    """Raw text: .txt, .md or .jsonl; what is measured is the loss of each row's tokens."""

    metric = "perplexity"

    def merit(self, metrics: Mapping[str, float]) -> float:
        return -metrics[self.metric]

    def read(self, path: str | Path, labelled: bool, bad: BadRows) -> list:
        from prelnroberta.data.corpus import FileCorpus

        column = "text" if self.settings.text_column is None else str(self.settings.text_column)
        return [document.text for document in FileCorpus([str(path)], column).documents()]

    def measure(self, features: Features, rows: Sequence[Row]) -> Measured:
        loss, correct, weight = (_stacked(rows, name) for name in ("loss", "correct", "weight"))

        def of(i: np.ndarray) -> dict[str, float]:
            total = float(weight[i].sum())
            return {
                "perplexity": perplexity(float(loss[i].sum()), total),
                "accuracy": float(correct[i].sum()) / total,
            }

        return Measured(of, len(rows))

    def answers(self, features: Features, rows: Sequence[Row]) -> Iterator[Answer]:
        for number, row in enumerate(rows):
            weight = max(float(row["weight"]), 1.0)
            yield {"row": number, "loss": float(row["loss"]) / weight, "tokens": weight}

    def outputs(
        self, config: RobertaPreLayerNormConfig, logits: Array, batch: dict[str, Array]
    ) -> dict[str, Array]:
        def of_row(logits: Array, batch: dict[str, Array]) -> Scores:
            one = jax.tree.map(lambda x: x[None], (logits, batch))
            return self.loss(config, *one, heads.PLAIN)

        return dataclasses.asdict(jax.vmap(of_row)(logits, batch))

    def trivial(self, train: Features, features: Features) -> float:
        """Word frequencies alone."""
        size = int(max(train.stream.max(), features.stream.max())) + 1
        counts = np.bincount(train.stream, minlength=size)
        scores = UnigramBaseline(counts, ()).scores(*self._asked(features))
        return perplexity(float(scores.loss), float(scores.weight))

    def _asked(self, features: Features) -> tuple[np.ndarray, np.ndarray]:
        """Labels and weights of all that is asked for."""
        raise NotImplementedError


class CausalLM(_LanguageModel):
    """The next token of running text."""

    model = "causal_lm"

    def configure(self, config: RobertaPreLayerNormConfig) -> RobertaPreLayerNormConfig:
        return config.replace(is_decoder=True)

    def features(
        self, examples: Sequence, tokenizer: tokenizers.Tokenizer, bad: BadRows, training: bool
    ) -> Features:
        # One token of context shared by neighbours: every token is predicted once.
        return Blocks(token_stream(examples, tokenizer), self.settings.max_length, overlap=1)

    def loss(
        self,
        config: RobertaPreLayerNormConfig,
        logits: Array,
        batch: dict[str, Array],
        settings: LossSettings,
    ) -> Scores:
        return heads.causal_lm_scores(logits, batch["labels"], settings)

    def _asked(self, features: Features) -> tuple[np.ndarray, np.ndarray]:
        labels = features.stream[1:]
        return labels, np.ones(len(labels))


@dataclasses.dataclass(frozen=True)
class MaskedBlocks:
    """Blocks under the masks of epoch 0: the same at every evaluation."""

    blocks: Blocks
    masking: Masking

    @property
    def lengths(self) -> np.ndarray:
        return np.full(len(self.blocks), self.blocks.length)

    @property
    def stream(self) -> np.ndarray:
        return self.blocks.stream

    def batch(self, indices: np.ndarray, length: int) -> Batch:
        rows = [self.masking.apply(self.blocks[max(i, 0)], 0, 0, max(i, 0)) for i in indices]
        batch = {name: np.stack([row[name] for row in rows]) for name in rows[0]}
        batch["masked_weights"][np.asarray(indices) == NOTHING] = 0.0
        return batch


class MaskedLM(_LanguageModel):
    """The tokens behind masks."""

    model = "masked_lm"
    target = "masked_labels"

    def features(
        self, examples: Sequence, tokenizer: tokenizers.Tokenizer, bad: BadRows, training: bool
    ) -> Features:
        s = self.settings
        masking = Masking(tokenizer.get_vocab_size(), rate=s.mask_rate, sampling="bernoulli")
        return MaskedBlocks(Blocks(token_stream(examples, tokenizer), s.max_length), masking)

    def batches(
        self, features: Features, batch_size: int, seed: int, buckets: Sequence[int]
    ) -> TrainingBatches | Loader:
        return Loader(features.blocks, features.masking, batch_size, seed)

    def logits(
        self, module: TableModule, params: Tree, batch: dict[str, Array], keys: Array | None = None
    ) -> Array:
        logits, _ = module.apply(
            {"params": params},
            batch["input_ids"],
            position_ids=batch["position_ids"],
            segment_ids=batch["segment_ids"],
            read_positions=batch["masked_positions"],
            dropout_keys=keys,
        )
        return logits

    def loss(
        self,
        config: RobertaPreLayerNormConfig,
        logits: Array,
        batch: dict[str, Array],
        settings: LossSettings,
    ) -> Scores:
        return heads.cross_entropy(
            logits, batch["masked_labels"], batch["masked_weights"], settings
        )

    def _asked(self, features: Features) -> tuple[np.ndarray, np.ndarray]:
        batch = features.batch(np.arange(len(features.blocks)), features.blocks.length)
        return batch["masked_labels"], batch["masked_weights"]


TASKS: dict[str, type[Task]] = {
    task.model: task
    for task in (
        SequenceClassification,
        TokenClassification,
        QuestionAnswering,
        MultipleChoice,
        CausalLM,
        MaskedLM,
    )
}
