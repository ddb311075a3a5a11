"""Settings of generation that contradict each other are refused."""

import pytest

from prelnroberta.errors import InputError
from prelnroberta.inference.generation_config import GenerationConfig

SETTINGS = [
    ({"max_new_tokens": 0}, "max_new_tokens=0", "> 0"),
    ({"max_length": 2.5}, "max_length=2.5", "int"),
    ({"max_length": 9, "max_new_tokens": 5}, "max_length=9", "max_new_tokens=5"),
    ({"min_length": -1}, "min_length=-1", ">= 0"),
    ({"min_length": 3, "min_new_tokens": 3}, "min_length=3", "min_new_tokens=3"),
    ({"eos_token_id": -1}, "eos_token_id=-1", "id"),
    ({"eos_token_id": (2, "x")}, "eos_token_id=(2, 'x')", "id"),
    ({"pad_token_id": None}, "pad_token_id=None", "id"),
    ({"repetition_penalty": 0}, "repetition_penalty=0", "> 0"),
    ({"do_sample": 1}, "do_sample=1", "true or false"),
    ({"do_sample": True, "temperature": 0.0}, "temperature=0.0", "> 0"),
    ({"do_sample": True, "temperature": float("nan")}, "temperature=nan", "> 0"),
    ({"do_sample": True, "top_k": 0}, "top_k=0", "None"),
    ({"do_sample": True, "top_p": 0.0}, "top_p=0.0", "(0, 1]"),
    ({"do_sample": True, "top_p": 1.5}, "top_p=1.5", "(0, 1]"),
    ({"do_sample": True, "num_beams": 2}, "num_beams=2", "not sampled"),
    ({"temperature": 0.7}, "temperature=0.7", "do_sample"),
    ({"top_k": 5}, "top_k=5", "do_sample"),
    ({"top_p": 0.9}, "top_p=0.9", "do_sample"),
    ({"num_beams": True}, "num_beams=True", "int"),
    ({"num_beams": 2, "length_penalty": "1"}, "length_penalty='1'", "number"),
    ({"num_beams": 2, "early_stopping": 1}, "early_stopping=1", "never"),
    ({"length_penalty": 2.0}, "length_penalty=2.0", "num_beams"),
    ({"early_stopping": True}, "early_stopping=True", "num_beams"),
    ({"num_return_sequences": 2}, "num_return_sequences=2", "num_beams=1"),
    ({"num_beams": 2, "num_return_sequences": 3}, "num_return_sequences=3", "num_beams=2"),
]


@pytest.mark.parametrize(("fields", "parts"), [(f, p) for f, *p in SETTINGS], ids=str)
def test_bad_settings_raise(fields, parts):
    with pytest.raises(InputError) as error:
        GenerationConfig(**fields)
    for part in parts:
        assert part in str(error.value)
