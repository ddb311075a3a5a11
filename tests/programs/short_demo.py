"""Run by test_demo.py: the demo itself, with a recipe that takes no minutes.

python -m tests.programs.short_demo RECIPE [FLAGS]
"""

import sys
from pathlib import Path

from experiments import demo
from experiments.flags.launch import launch

demo.RECIPE = Path(sys.argv.pop(1))
launch(demo.main, demo.DemoSettings)
