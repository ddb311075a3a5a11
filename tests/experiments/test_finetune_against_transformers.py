"""transformers 5 loads a fine-tuned model and computes the same."""

import csv
import json

import numpy as np
import pytest
import torch
import transformers

from prelnroberta.data.tokenizer import load_tokenizer
from tests.helpers.finetuning import finished_finetuning, reviews

pytestmark = [pytest.mark.torch, pytest.mark.oracle]


def test_transformers_loads_finetuned_model_and_matches_outputs():
    run_dir, _ = finished_finetuning()
    model = transformers.AutoModelForSequenceClassification.from_pretrained(run_dir / "model")
    tokenizer = transformers.AutoTokenizer.from_pretrained(run_dir / "model")
    assert model.config.id2label == {0: "bad", 1: "good"}
    answers = [json.loads(x) for x in (run_dir / "predictions.jsonl").read_text().splitlines()]
    rows = list(csv.DictReader(reviews("dev", 40, 2).open()))
    assert [a["text"] for a in answers] == [r["text"] for r in rows]
    inputs = tokenizer([a["text"] for a in answers], padding=True, return_tensors="pt")
    with torch.no_grad():
        expected = torch.softmax(model.eval()(**inputs).logits, -1).numpy()
    found = np.array([list(a["probabilities"].values()) for a in answers])
    np.testing.assert_allclose(found, expected, atol=1e-5)
    right = np.mean([a["label"] == r["label"] for a, r in zip(answers, rows, strict=True)])
    assert right == json.loads((run_dir / "results.json").read_text())["metrics"]["accuracy"]
    assert load_tokenizer(run_dir / "model").get_vocab_size() == model.config.vocab_size
