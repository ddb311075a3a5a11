"""Run by test_token_files.py: prints by how many MB a large corpus exceeds the peak of a small one.

python -m tests.programs.tokenize_and_measure FOLDER
"""

import pathlib
import re
import sys

from prelnroberta.data.pretraining import token_files
from prelnroberta.data.pretraining.corpus import FileCorpus
from prelnroberta.data.pretraining.token_files import tokenize_corpus
from prelnroberta.data.tokenizer import load_tokenizer

token_files._BATCH_BYTES >>= 3  # what a batch takes must not hide what is kept
peaks = []
for name in ("small.txt", "large.txt"):
    tokenize_corpus(FileCorpus([f"{sys.argv[1]}/{name}"]), load_tokenizer(sys.argv[1]), sys.argv[1])
    # Not getrusage: its peak begins with that of the process that started this one.
    status = pathlib.Path("/proc/self/status").read_text()
    peaks.append(int(re.search(r"VmHWM:\s+(\d+)", status)[1]) / 1024)
print(peaks[1] - peaks[0])
