"""Run by test_evaluate.py: fine-tunes a tiny model for each task in one process, on two devices.

python tests/programs/six_tasks.py FOLDER MODEL TASK=TRAIN_FILE ...
"""

import sys
from pathlib import Path

from experiments import finetune
from experiments.flags.programs import FinetuneSettings

folder, model, *files = sys.argv[1:]
for number, pair in enumerate(files):
    task, _, path = pair.partition("=")
    run_dir = Path(folder) / task
    settings = FinetuneSettings(
        task=task,
        init_from=model,
        run_dir=str(run_dir),
        train_file=path,
        eval_file=path,
        max_length=64,
        doc_stride=8,
        steps=4,
        eval_every=2,
        batch_size=4,
        length_buckets=1,
        learning_rate=1e-3,
        parallelism="pmap" if number % 2 else "jit",
    )
    assert finetune.main(settings) == 0
