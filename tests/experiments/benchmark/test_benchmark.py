"""The benchmark gives all contenders the same work; tested at a size too small to time."""

import json

import numpy as np
import pytest

from experiments.benchmark import report, runner
from experiments.benchmark.cases import (
    Case,
    all_cases,
    comparison_batch,
    read_case,
    write_case,
    write_weights,
)
from experiments.benchmark.runner import Result
from experiments.tasks.task_names import TASK_NAMES
from prelnroberta.errors import InputError
from tests.helpers.programs import call

pytestmark = [pytest.mark.torch, pytest.mark.tensorflow, pytest.mark.oracle]

TEXTS = [[0, *np.random.default_rng(i).integers(5, 400, 3 + 7 * i % 23), 2] for i in range(64)]
RAGGED = {"preset": "tiny", "B": 3, "L": 24, "ragged": True}
CASES = [
    Case("train", "masked_lm", **RAGGED),
    *(Case("train", model, **RAGGED, steps=2) for model in TASK_NAMES if model != "masked_lm"),
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("benchmark")


@pytest.fixture(autouse=True)
def short(monkeypatch):
    monkeypatch.setattr(runner, "_MIN_SECONDS", 0.0)
    monkeypatch.setattr(runner, "_CASE_SECONDS", 0.0)


def run(case, folder, names, rounds=1):
    weights, work = folder / f"{case.operation}-{case.model}", folder / case.name
    if not weights.exists():
        write_weights(case, weights)
    write_case(case, work, TEXTS)
    return runner.run_case(case, weights, work, rounds, names)


def test_case_names_are_unique_and_cover_every_task():
    names = [case.name for case in all_cases()]
    assert len(set(names)) == len(names)
    assert {case.model for case in all_cases() if case.operation == "train"} == set(TASK_NAMES)


@pytest.mark.slow
def test_all_contenders_compute_the_same(folder):
    """`run_case` itself refuses contenders that differ."""
    results = {result.name: result for result in run(CASES[0], folder, None)}
    assert len(results) == 9 and {"ours packed", runner.FLAX, runner.TORCH_SDPA} <= results.keys()
    for result in results.values():
        assert result.difference < 1e-5 and len(result.seconds) == 1 and result.seconds[0] > 0


@pytest.mark.slow
@pytest.mark.parametrize("model", ["question_answering", "multiple_choice"])
def test_task_losses_match_torch(folder, model):
    [case] = [case for case in CASES if case.model == model]
    results = run(case, folder, {"ours packed", runner.TORCH_SDPA})
    assert {"ours packed", "ours padded", runner.TORCH_SDPA} <= {r.name for r in results}


def test_first_seconds_include_compilation_and_short_cases_get_more_rounds(folder, monkeypatch):
    monkeypatch.setattr(runner, "_CASE_SECONDS", 1e9)
    for result in run(Case("forward", "base", **RAGGED), folder, {"ours packed"}, rounds=2):
        assert len(result.seconds) == 5 * 2
        assert result.first_seconds > 10 * result.seconds[0]


def test_contender_with_other_outputs_raises(folder, monkeypatch):
    monkeypatch.setattr(runner, "_MAX_DIFFERENCE", -1.0)
    with pytest.raises(InputError, match="ours packed differs from ours by"):
        run(CASES[0], folder, {"ours packed"})


def test_work_counts_real_tokens_only(folder):
    from experiments.benchmark.contenders.prelnroberta_flax import _training_batches

    for case in CASES:
        write_case(case, folder / "rows", TEXTS)
        case, batch = read_case(folder / "rows")
        ids = batch["input_ids"][batch["attention_mask"] == 1]
        for mode in ("packed", "padded"):
            parts = _training_batches(case, batch, mode)
            found = np.concatenate(
                [
                    part["input_ids"][part.get("segment_ids", part.get("attention_mask")) > 0]
                    for part in parts
                ]
            )
            np.testing.assert_array_equal(np.sort(found), np.sort(ids))


def test_packed_outputs_match_case_without_padding(folder):
    from experiments.benchmark.contenders.prelnroberta_flax import _training_batches

    [case] = [case for case in CASES if case.model == "question_answering"]
    write_case(case, folder / "answers", TEXTS)
    case, batch = read_case(folder / "answers")
    for side in ("start_positions", "end_positions"):
        expected = np.take_along_axis(batch["input_ids"], batch[side][:, None], 1)
        found = []
        for part in _training_batches(case, batch, "packed"):
            rows, places = np.nonzero(part[side] >= 0)
            at = part[side][rows, places]
            np.testing.assert_array_equal(part["segment_ids"][rows, at], 1 + places)
            found.extend(part["input_ids"][rows, at])
        np.testing.assert_array_equal(np.sort(found), np.sort(expected[:, 0]))
    first = comparison_batch(case, batch)
    assert len(first["input_ids"]) == case.B and first["attention_mask"].all()
    assert (first["end_positions"] < first["input_ids"].shape[1]).all()


def test_ratios_are_taken_within_rounds():
    slow_machine = np.array([0.5, 1.0, 10.0])
    ours = Result("ours", False, 0.0, 1.0, 1.0, None, list(1.0 * slow_machine))
    theirs = Result("theirs", True, 0.0, 1.0, 1.0, 2**30, list(1.5 * slow_machine))
    np.testing.assert_allclose(runner.speedups(ours, theirs), 1.5)
    flax = Result(runner.FLAX, True, 0.0, 1.0, 1.0, None, [0.1] * 3)
    lucky = Result("faster by the clock alone", True, 0.0, 1.0, 1.0, None, [1.4, 1.6, 1.0])
    assert runner.best_peer(ours, [ours, lucky, theirs, flax]) is theirs


def test_tables_and_plot(tmp_path):
    names = ["ours", runner.FLAX, runner.TORCH_SDPA, "transformers 4.57 TF XLA", "our PyTorch"]
    results = [
        {
            "name": n,
            "is_peer": "transformers" in n,
            "difference": 1e-7,
            "first_seconds": 2.0,
            "import_seconds": 1.0,
        }
        | {"peak_bytes": 2**30, "seconds": [0.1 * (i + 1)] * 3}
        for i, n in enumerate(names)
    ]
    record = {
        "case": "pretrain-base-8x128-15%",
        "tokens": 1000,
        "fill": 1.0,
        "gflop": 30.0,
        "matrix_product_gflops": 300.0,
        "results": results,
    }
    lines = report.format_case(record).splitlines()
    assert lines[1].split()[:4] == ["ours", "100.0", "10,000", "300"] and "3.00x" in lines[3]
    row = report.summary_table([record]).splitlines()[-1]
    assert row.split("|")[2:7] == [" 10,000 ", " 2.00 ", " 3.00 ", " 5 torch SDPA ", " 0.60 "]
    plot = report.draw_speedups(tmp_path / "speed.png", [json.loads(json.dumps(record))])
    assert plot.stat().st_size


def test_resumed_run_keeps_only_its_own_results(tmp_path):
    run = {"machine": "a", "rounds": 5, "code": report.code_digest()}
    found = report.load_results(tmp_path, run)
    assert found["cases"] == [] and found["code"] == run["code"]
    report.save_results(tmp_path, found | {"compiled": [{"what": "x"}]})
    assert report.load_results(tmp_path, run)["compiled"] == [{"what": "x"}]
    with pytest.raises(InputError, match="this is 'other': give another"):
        report.load_results(tmp_path, run | {"code": "other"})


def test_unknown_case_lists_case_names(tmp_path):
    result = call("benchmark", "--case=nothing", f"--output={tmp_path}")
    assert result.returncode == 2 and "pretrain-base-8x128-15%" in result.stderr
