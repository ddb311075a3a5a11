"""Every class against transformers 4.57.6's Flax class, its torch class as a reader of what we
write, and its `flax_model.msgpack`, which transformers 5 can no longer read."""

import numpy as np
import pytest
from support import ODD, assert_close, random_params
from test_models import SMALL, TWO_TYPES, case_batch, flax_class
from test_parity_flax4 import run_oracle

from prelnroberta.huggingface import ARCHITECTURES, save_pretrained

LOOSE = {"tie_last_hidden_states": False}
CASES = {
    "base": ("base", ODD.replace(**LOOSE)),
    "masked_lm": ("masked_lm", SMALL.replace(tie_word_embeddings=False, **LOOSE)),
    "cross": (
        "causal_lm",
        SMALL.replace(is_decoder=True, add_cross_attention=True, **LOOSE),
    ),
    "causal_lm": ("causal_lm", ODD.replace(is_decoder=True, **LOOSE)),
    "single_label": ("sequence_classification", SMALL.replace(num_labels=3, **LOOSE)),
    "multiple_choice": ("multiple_choice", TWO_TYPES.replace(**LOOSE)),
    "token": ("token_classification", ODD.replace(num_labels=4, hidden_act="silu", **LOOSE)),
    "span": ("question_answering", SMALL.replace(layer_norm_eps=1e-12, **LOOSE)),
}


def inputs_of(kind):
    batch = case_batch(*CASES[kind], kind)
    return {k: v for k, v in batch.items() if k != "labels" and "positions" not in k}


@pytest.fixture(scope="module")
def answers(tmp_path_factory):
    root = tmp_path_factory.mktemp("flax4")
    for kind, (model, config) in CASES.items():
        save_pretrained(root / kind, random_params(config, model), config, model)
        np.savez(root / kind / "batch.npz", **inputs_of(kind))
        (root / kind / "architecture.txt").write_text(ARCHITECTURES[model])
    run_oracle("transformers4_models.py", root)
    return root


@pytest.mark.parametrize("kind", CASES)
def test_outputs_are_those_of_transformers_4(kind, answers):
    """From safetensors that we wrote and from msgpack that it wrote, to the same bits."""
    model, config = CASES[kind]
    batch = inputs_of(kind)
    ours = flax_class(model).from_pretrained(answers / kind)
    found = ours(**batch, output_hidden_states=True, output_attentions=True)
    expected = dict(np.load(answers / kind / "flax.npz"))
    real = batch["attention_mask"] == 1 if config.is_decoder else slice(None)
    for name, b in expected.items():
        field, _, i = name.partition(".")
        a = found[field]
        a = np.asarray(a[int(i)] if isinstance(a, tuple) else a)
        if "attentions" in field:
            a, b = a.swapaxes(1, 2), b.swapaxes(1, 2)
        assert_close(a[real], b[real], name, 6e-6, 6e-5)
    values = [v for v in found.values() if v is not None]
    assert len(expected) == sum(len(v) if isinstance(v, tuple) else 1 for v in values)

    read = flax_class(model).from_pretrained(answers / kind / "msgpack", **LOOSE)
    assert not str(read.swapped)
    again = read(**batch)
    np.testing.assert_array_equal(again[0], ours(**batch)[0])


@pytest.mark.parametrize("kind", CASES)
def test_transformers_4_reads_what_we_write_without_a_word(kind, answers):
    assert (answers / kind / "said.txt").read_text() == ""
