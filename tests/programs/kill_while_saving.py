"""Run by test_checkpoint.py: forks children that save steps, and kills each at a random moment.

python -m tests.programs.kill_while_saving FOLDER KILLS SEED prints the step each child began from.
"""

import os
import random
import signal
import sys
import time

from prelnroberta.training.checkpoint import CheckpointManager
from tests.helpers.train_states import assert_same_state, train_state

directory, kills, seed = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
moments, found = random.Random(seed), []
for _ in range(kills):
    reader, writer = os.pipe()
    child = os.fork()  # everything is imported, and no device is initialized yet
    if child == 0:
        checkpoints = CheckpointManager(directory, max_to_keep=2)
        latest = checkpoints.latest_step() or 0
        if latest:
            restored, extra = checkpoints.restore(train_state(9))
            assert_same_state(restored, train_state(latest))
            assert extra == {"note": latest}
        os.write(writer, f"{latest}\n".encode())
        for step in range(latest + 1, 10_000):
            checkpoints.save(train_state(step), {"note": step})
            os.write(writer, b"begun\n")
    os.close(writer)
    with os.fdopen(reader) as pipe:
        line = pipe.readline()
        if not line:
            sys.exit(f"a start failed after {found}")
        found.append(int(line))
        begin, saves = time.monotonic(), moments.randrange(1, 4)
        for _ in range(saves):
            pipe.readline()
        # Anywhere in the time that a save takes, on however busy a machine.
        time.sleep(moments.uniform(0, (time.monotonic() - begin) / saves))
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
print(*found)
