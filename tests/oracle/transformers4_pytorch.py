"""transformers 4.57.6's torch classes on folders that the twins wrote, all in one process: what
they say on loading, what they compute, and folders that they write for the twins to read.

python transformers4_pytorch.py ROOT, which holds, for each case, CASE/config.json and weights,
CASE/batch.npz and CASE/architecture.txt. Writes CASE/said.txt, CASE/torch.npz and CASE/written/.
"""

import logging
import sys
from pathlib import Path

import numpy as np
import torch
import transformers


class Said(logging.Handler):
    def __init__(self):
        super().__init__(logging.WARNING)
        self.lines = []

    def emit(self, record):
        self.lines.append(record.getMessage())


def main(root: str) -> None:
    said = Said()
    transformers.logging.set_verbosity_warning()
    logging.getLogger("transformers").addHandler(said)
    for case in sorted(Path(root).iterdir()):
        name = (case / "architecture.txt").read_text()
        said.lines.clear()
        model, info = getattr(transformers, name).from_pretrained(case, output_loading_info=True)
        complaints = [*said.lines, *(f"{k}: {v}" for k, v in info.items() if v)]
        (case / "said.txt").write_text("\n".join(complaints))
        batch = {k: torch.from_numpy(v) for k, v in np.load(case / "batch.npz").items()}
        with torch.no_grad():
            output = model.eval()(**batch, output_hidden_states=True, output_attentions=True)
        arrays = {}
        for field, value in output.items():
            if field != "past_key_values":
                for i, part in enumerate(value if isinstance(value, tuple) else (value,)):
                    arrays[f"{field}.{i}"] = part.numpy()
        np.savez(case / "torch.npz", **arrays)
        model.save_pretrained(case / "written")


if __name__ == "__main__":
    main(*sys.argv[1:])
