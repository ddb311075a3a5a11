"""200 steps on real data against transformers' own torch models under torch's own AdamW.

Same initial weights, same batches, no dropout, for each task: losses agree step by step, ours of
packed rows, theirs of padded ones. Data is what `experiments.example_data` makes, from three
packages' documentation. With dropout the metrics at the end are compared over seeds by
tests/oracle/dropout_seeds.py.
"""

import numpy as np
import pytest
import torch

from experiments.tasks import TASKS
from tests.helpers.training_curves import draw_batches, our_training, prepare_task, torch_training

pytestmark = [pytest.mark.torch, pytest.mark.oracle]


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """Tiny matrices are slower on several."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.mark.slow
@pytest.mark.parametrize("name", TASKS)
def test_loss_curve_matches_torch(name, tmp_path):
    task, features, config, params = prepare_task(name, dropout=0.0)
    batches, padded = draw_batches(task, features, 5)
    theirs, _ = torch_training(task, config, params, padded, 5, tmp_path)
    ours, _ = our_training(task, config)(params, batches, 5)
    print(name, np.abs(ours - theirs).max(), theirs[:5].mean(), theirs[100:].mean())
    # The largest difference measured, of any step and task, is 3e-6.
    np.testing.assert_allclose(ours, theirs, atol=5e-5)
    assert theirs[100:].mean() < theirs[:5].mean() - 0.02, "nothing was learned"
