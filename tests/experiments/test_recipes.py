"""Every recipe is a flagfile that the program accepts, with the published numbers."""

import subprocess
import sys
from pathlib import Path

import pytest

RECIPES = sorted((Path(__file__).parents[2] / "experiments" / "recipes").glob("*.flags"))
# Stops after every flag has been checked, before any text is read.
CHECK_ONLY = """
from experiments import pretrain
from experiments.flags.launch import launch

def check(settings):
    config, optimizer = pretrain.check_settings(settings), settings.optimizer_config()
    print(config.num_hidden_layers, config.hidden_size, settings.sequence_length,
          settings.batch_size, optimizer.steps, optimizer.learning_rate, optimizer.warmup_steps,
          settings.mask_rate, settings.mask_random + settings.mask_keep)

launch(check, pretrain.PretrainSettings)
"""
PUBLISHED = {
    "efficient_mlm_large": "24 1024 128 4096 23000 0.002 1380 0.4 0.0",
    "roberta_base": "12 768 512 8192 500000 0.0006 24000 0.15 0.2",
}


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.stem)
def test_recipe_runs(recipe, tmp_path):
    result = subprocess.run(
        [
            *(sys.executable, "-c", CHECK_ONLY),
            *(f"--flagfile={recipe}", f"--run_dir={tmp_path / 'run'}"),
        ],
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout.strip() == PUBLISHED.get(recipe.stem, result.stdout.strip())


def test_every_recipe_is_tested():
    names = {path.stem for path in RECIPES}
    assert names == {"demo", "small_cpu", "roberta_base", "efficient_mlm_large"}
