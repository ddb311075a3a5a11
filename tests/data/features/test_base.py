"""Every feature type works with the packed loader and with length buckets."""

import numpy as np

from prelnroberta.config import REGRESSION
from prelnroberta.data.batches.buckets import bucketed_eval_batches
from prelnroberta.data.batches.packed import PackedBatches
from prelnroberta.data.features.language_modeling import TokenBlocks
from prelnroberta.data.features.multiple_choice import choice_features
from prelnroberta.data.features.question_answering import question_features
from prelnroberta.data.features.sequence_classification import text_features
from prelnroberta.data.features.token_classification import token_features
from prelnroberta.data.readers.classification import TextExample
from prelnroberta.data.readers.swag import ChoiceExample
from tests.helpers.random_texts import TAGS, random_questions, random_sentences, random_text


def test_every_feature_type_works_with_both_loaders(tokenizer):
    rng = np.random.default_rng(6)
    kinds = {
        "texts": text_features(
            [TextExample(f"{i}", random_text(rng, 9), None, 1.0) for i in range(23)],
            tokenizer,
            64,
            REGRESSION,
        ),
        "tokens": token_features(list(random_sentences(rng, 23, 9)), tokenizer, 32, TAGS),
        "questions": question_features(list(random_questions(rng, 23, 20)), tokenizer, 64, 8),
        "choices": choice_features(
            [ChoiceExample("f", "a", "b", ["c", random_text(rng, 9)], 0)] * 23, tokenizer, 64
        ),
        "blocks": TokenBlocks(np.arange(4, 99, dtype=np.int32), 16, 1),
    }
    for name, features in kinds.items():
        n = len(features.lengths)
        buckets = (16, 32, 64, 128)
        seen = []
        loader = PackedBatches(features, 5, 0, steps=-(-n // 5))
        for step in range(loader.steps_per_epoch):
            batch = loader.batch(step)
            seen += loader.indices(step).tolist()
            assert batch["input_ids"].shape == (loader.num_rows, loader.length)
            assert {a.shape[0] for a in batch.values()} == {loader.num_rows}
        assert sorted(seen) == list(range(n)), name
        found = [i for indices, _ in bucketed_eval_batches(features, buckets, 256) for i in indices]
        assert sorted(i for i in found if i >= 0) == list(range(n)), name
