"""squad_scores.py GIVEN JUDGED: scores by transformers 4's copy of the SQuAD v2.0 script, as JSON.

GIVEN: {"predictions": {id: text}, "answers": {id: [texts]}, "null": {id: number}}.
"""

import json
import sys
from pathlib import Path
from types import SimpleNamespace

from transformers.data.metrics import squad_metrics


def main() -> None:
    given = json.loads(Path(sys.argv[1]).read_text())
    examples = [
        SimpleNamespace(qas_id=name, answers=[{"text": text} for text in texts])
        for name, texts in given["answers"].items()
    ]
    exact, f1 = squad_metrics.get_raw_scores(examples, given["predictions"])
    answerable = {name: bool(texts) for name, texts in given["answers"].items()}
    best = {
        name: squad_metrics.find_best_thresh(
            given["predictions"], scores, given["null"], answerable
        )
        for name, scores in (("exact", exact), ("f1", f1))
    }
    Path(sys.argv[2]).write_text(json.dumps({"exact": exact, "f1": f1, "best": best}))


if __name__ == "__main__":
    main()
