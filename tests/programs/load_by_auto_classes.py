"""Run by a test of hf_checkpoint.py: transformers' auto classes on a folder; warnings are errors.

python tests/programs/load_by_auto_classes.py FOLDER TEXT prints ids and logits.
"""

import json
import sys
import warnings

warnings.simplefilter("error")
import torch  # noqa: E402
from transformers import AutoModelForMaskedLM, AutoTokenizer  # noqa: E402

directory, text = sys.argv[1:]
tokenizer = AutoTokenizer.from_pretrained(directory)
model = AutoModelForMaskedLM.from_pretrained(directory).eval()
inputs = tokenizer(text, return_tensors="pt")
with torch.no_grad():
    logits = model(**inputs).logits
print(json.dumps([inputs["input_ids"].tolist(), logits.tolist()]))
