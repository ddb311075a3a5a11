"""Every program takes its settings as an argument: no command line and no absl flags."""

import json
import subprocess
import sys

from tests.helpers.programs import ENVIRONMENT, ROOT, SCRATCH, corpus_file

PROGRAM = """
import sys
from absl import flags
from pathlib import Path
from experiments import evaluate, export, finetune, predict, pretrain

folder, corpus, cache = sys.argv[1:]
pretrained, tuned = f"{folder}/pretrained", f"{folder}/tuned"
settings = pretrain.PretrainSettings(
    run_dir=pretrained, preset="tiny", vocab_size=300, sequence_length=32, batch_size=8,
    corpus=(corpus,), cache_dir=cache, validation_fraction=0.1, steps=4, warmup_steps=1,
    eval_every=2, save_every=2, eval_rows=16,
)
assert pretrain.main(settings) == 0
assert pretrain.main(settings) == 0  # complete
rows = [f"{'good' if i % 2 else 'bad'} number {i},{'yes' if i % 2 else 'no'}" for i in range(24)]
Path(folder, "rows.csv").write_text("\\n".join(["text,label", *rows]) + "\\n")
file = f"{folder}/rows.csv"
assert finetune.main(
    finetune.FinetuneSettings(
        run_dir=tuned, task="sequence_classification", init_from=pretrained, train_file=file,
        eval_file=file, batch_size=8, steps=3, seeds=(1, 2), sweep=("learning_rate=1e-3",),
    )
) == 0
best = f"{tuned}/learning_rate=1e-3,seed=2"
assert evaluate.main(
    evaluate.EvaluateSettings(model=best, file=file, output=f"{folder}/evaluated")
) == 0
assert predict.main(
    predict.PredictSettings(model=best, text=("good one",), output=f"{folder}/answers.jsonl")
) == 0
assert export.main(
    export.ExportSettings(model=pretrained, output=f"{folder}/exported", format=("stablehlo",))
) == 0
assert not flags.FLAGS.is_parsed()
"""


def test_pretrain_finetune_evaluate_predict_export(tmp_path):
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, tmp_path, corpus_file(), SCRATCH / "cache"],
        cwd=ROOT,
        env=ENVIRONMENT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert "is complete: 4 steps of 4" in done.stdout
    results = json.loads((tmp_path / "evaluated/results.json").read_text())
    assert results["examples"] == 24
    assert json.loads((tmp_path / "answers.jsonl").read_text())["label"] in ("yes", "no")
    assert (tmp_path / "exported/stablehlo").is_dir()
    table = json.loads((tmp_path / "tuned/table.json").read_text())
    assert [(row["run"], row["seeds"]) for row in table] == [("learning_rate=1e-3", 2)]
