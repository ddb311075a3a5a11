"""transformers 4.57.6 on directories of ours, all in one process: what its Flax classes give, what
its torch classes say on loading, and Flax files for us to read.

python transformers4_models.py ROOT, which holds, for each case, CASE/config.json and weights,
CASE/batch.npz and CASE/architecture.txt. Writes CASE/flax.npz, CASE/msgpack/ and CASE/said.txt.
"""

import logging
import sys
from pathlib import Path

import numpy as np
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
        _, info = getattr(transformers, name).from_pretrained(case, output_loading_info=True)
        complaints = [*said.lines, *(f"{k}: {v}" for k, v in info.items() if v)]
        (case / "said.txt").write_text("\n".join(complaints))
        model = getattr(transformers, "Flax" + name).from_pretrained(case, from_pt=True)
        batch = dict(np.load(case / "batch.npz"))
        output = model(**batch, output_hidden_states=True, output_attentions=True)
        arrays = {}
        for field, value in output.items():
            for i, part in enumerate(value if isinstance(value, tuple) else (value,)):
                arrays[f"{field}.{i}"] = np.asarray(part)
        np.savez(case / "flax.npz", **arrays)
        model.save_pretrained(case / "msgpack")


if __name__ == "__main__":
    main(*sys.argv[1:])
