"""Run by test_token_files.py: tokenizes a.txt of a folder and waits in the middle of it.

python -m tests.programs.tokenize_slowly FOLDER SECONDS
"""

import sys
import time

from prelnroberta.data.pretraining import token_files
from prelnroberta.data.pretraining.corpus import FileCorpus
from prelnroberta.data.tokenizer import load_tokenizer

directory, delay = sys.argv[1], float(sys.argv[2])


class Slow(FileCorpus):
    def documents(self):
        for number, document in enumerate(super().documents()):
            if number == 50:
                print("reading", flush=True)
                time.sleep(delay)
            yield document


train, _ = token_files.tokenize_corpus(
    Slow([directory + "/a.txt"]), load_tokenizer(directory), directory
)
print(len(train.tokens))
