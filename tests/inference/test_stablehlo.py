"""Exported StableHLO programs compute the same function at any shape."""

import jax
import numpy as np
import pytest

from bridges.verify.parity import PARITY_MODELS
from experiments.export import flax, largest_error
from prelnroberta.inference.stablehlo import PLATFORMS, PROGRAM_NAME, load_stablehlo, save_stablehlo
from tests.helpers.export_cases import export_case


@pytest.mark.parametrize("model", [*PARITY_MODELS, "encoder"])
def test_stablehlo_matches_every_class(model, tmp_path):
    params, config = export_case(model)
    save_stablehlo(params, config, model, tmp_path / "new" / "program")
    program = jax.export.deserialize(
        bytearray((tmp_path / "new/program" / PROGRAM_NAME).read_bytes())
    )
    assert program.platforms == PLATFORMS
    loaded = load_stablehlo(tmp_path / "new/program")

    def run(inputs):
        return {name: np.asarray(x) for name, x in loaded(*inputs.values()).items()}

    assert largest_error(run, params, config, model) < 2e-5


def test_wrong_outputs_exceed_tolerance():
    params, config = export_case("question_answering")
    run = flax(params, config, "question_answering")
    assert largest_error(run, params, config, "question_answering") == 0
    for damage in (0.1, np.nan):

        def wrong(inputs, damage=damage):
            found = run(inputs)
            found["end_logits"] = found["end_logits"].copy()
            found["end_logits"][-1, -1] += damage
            return found

        assert largest_error(wrong, params, config, "question_answering") > 1e-2
