"""The parameter table: paths, shapes, counts, initial values and checks."""

import jax
import numpy as np
import pytest

from prelnroberta import params as parameters
from prelnroberta.config import RobertaPreLayerNormConfig
from prelnroberta.errors import InputError
from prelnroberta.model.encoder import Encoder
from prelnroberta.model.heads import MaskedLM
from tests.helpers.small_models import ODD, TINY, random_params

GOLDEN = """\
embeddings/norm/bias                    [32]
embeddings/norm/scale                   [32]
embeddings/position                     [66, 32]
embeddings/token_type                   [1, 32]
embeddings/word                         [512, 32]
encoder/final_norm/bias                 [32]
encoder/final_norm/scale                [32]
encoder/layers/attention/key/bias       [2, 4, 8]
encoder/layers/attention/key/kernel     [2, 32, 4, 8]
encoder/layers/attention/output/bias    [2, 32]
encoder/layers/attention/output/kernel  [2, 4, 8, 32]
encoder/layers/attention/query/bias     [2, 4, 8]
encoder/layers/attention/query/kernel   [2, 32, 4, 8]
encoder/layers/attention/value/bias     [2, 4, 8]
encoder/layers/attention/value/kernel   [2, 32, 4, 8]
encoder/layers/attention_norm/bias      [2, 32]
encoder/layers/attention_norm/scale     [2, 32]
encoder/layers/mlp/wi/bias              [2, 64]
encoder/layers/mlp/wi/kernel            [2, 32, 64]
encoder/layers/mlp/wo/bias              [2, 32]
encoder/layers/mlp/wo/kernel            [2, 64, 32]
encoder/layers/mlp_norm/bias            [2, 32]
encoder/layers/mlp_norm/scale           [2, 32]
lm_head/bias                            [512]
lm_head/dense/bias                      [32]
lm_head/dense/kernel                    [32, 32]
lm_head/norm/bias                       [32]
lm_head/norm/scale                      [32]
"""


def test_golden_tree():
    """The tree is the product: a change here is a change for every bridge and checkpoint."""
    rows = sorted(parameters.shapes(TINY).items())
    assert "".join(f"{path:<40}{list(shape)}\n" for path, shape in rows) == GOLDEN


def test_base_has_its_published_parameter_count():
    config = RobertaPreLayerNormConfig.preset("roberta-base")
    assert parameters.parameter_count(config) == 124_698_969


def test_module_init_and_table_agree():
    for model, module in (("masked_lm", MaskedLM), ("encoder", Encoder)):
        variables = jax.eval_shape(module(ODD).init, jax.random.key(0), np.zeros((1, 4), np.int32))
        parameters.check(variables["params"], ODD, model)


def test_initial_values():
    config = TINY.replace(vocab_size=5000, hidden_size=64, initializer_range=0.05)
    flat = parameters.flatten(parameters.init(config, jax.random.key(3)))
    for path, row in parameters.table(config).items():
        value = np.asarray(flat[path])
        if row.init in ("zeros", "ones"):
            assert (value == (row.init == "ones")).all(), path
            continue
        rest = value
        if row.init == "embedding":
            assert (value[config.pad_token_id] == 0).all(), path
            rest = np.delete(value, config.pad_token_id, 0)
        assert (rest != 0).all(), path
        # Five standard errors of a standard deviation.
        assert abs(rest.std() / 0.05 - 1) < 5 / np.sqrt(2 * rest.size), path


def test_initial_leaf_does_not_depend_on_other_leaves():
    head = parameters.flatten(parameters.init(TINY, jax.random.key(0)))
    for path, leaf in parameters.flatten(
        parameters.init(TINY, jax.random.key(0), "encoder")
    ).items():
        np.testing.assert_array_equal(leaf, head[path])


def test_check_lists_all_differences():
    flat = parameters.flatten(random_params(TINY))
    del flat["embeddings/word"]
    flat["encoder/layers/mlp/wi/kernle"] = flat.pop("encoder/layers/mlp/wi/kernel")
    flat["lm_head/bias"] = np.zeros((3,), np.float32)
    flat["lm_head/norm/bias"] = flat["lm_head/norm/bias"].astype(np.float16)
    with pytest.raises(InputError) as error:
        parameters.check(parameters.unflatten(flat), TINY, source="here")
    for part in (
        "here: ",
        "missing embeddings/word float32[512, 32]",
        "unexpected encoder/layers/mlp/wi/kernle (nearest: encoder/layers/mlp/wi/kernel)",
        "lm_head/bias is float32[3], expected float32[512]",
        "lm_head/norm/bias is float16[32], expected float32[32]",
    ):
        assert part in str(error.value)
