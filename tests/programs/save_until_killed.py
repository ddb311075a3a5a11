"""Run by test_checkpoint.py: saves one step after another until it is killed.

python -m tests.programs.save_until_killed FOLDER
"""

import sys

from prelnroberta.training.checkpoint import CheckpointManager
from tests.helpers.train_states import train_state

checkpoints = CheckpointManager(sys.argv[1], max_to_keep=2)
print("ready", flush=True)
for step in range(1, 10_000):
    checkpoints.save(train_state(step, size=400), {"note": step})
