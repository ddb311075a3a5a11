"""Random texts, tagged sentences and questions with unusual characters and spaces."""

from prelnroberta.data.readers.conll import Sentence
from prelnroberta.data.readers.squad import Answer, Question

WORDS = ["the", "of", "a", "in", "is", "model", "answer", "window", "question", "Don't", "it's"]
WORDS += ["U.S.", "1,000", "(see)", "e-mail", "—", "café\n日本語", "🙂", "naïve", "\xa0", "ﬁ"]
WORDS += ["supercalifragilistic", "http://x.y/z?a=b", "@user", "#tag", "<mask>", '"quoted"', "..."]
SPACES = [" "] * 12 + ["  ", "\n", "\t ", "\u3000"]


def random_text(rng, most):
    """Words with odd spaces between them and, sometimes, around them."""
    words = rng.choice(WORDS, int(rng.integers(0, most + 1)))
    parts = [part for word in words for part in (word, rng.choice(SPACES))]
    return "".join([rng.choice(["", "", " "]), *parts[: len(parts) - int(rng.integers(0, 2))]])


def assert_same_ids(found, expected):
    assert [ids.tolist() for ids in found] == expected


TAGS = ("O", "B-x", "I-x", "B-y", "I-y")


def random_sentences(rng, n, most):
    words = [word for word in WORDS if word.strip()]
    for i in range(n):
        size = int(rng.integers(1, most + 1))
        yield Sentence(f"f:{i}", rng.choice(words, size).tolist(), rng.choice(TAGS, size).tolist())


def random_questions(rng, n, most):
    """Answers are any stretch of the context: whole words or parts, at its ends, or none."""
    for i in range(n):
        context = random_text(rng, most)
        answers = []
        if context.strip() and rng.random() < 0.85:
            start = int(rng.integers(0, len(context)))
            end = min(len(context), start + int(rng.integers(1, 25)))
            edge = rng.random()
            start, end = (0, end) if edge < 0.1 else (start, len(context) if edge > 0.9 else end)
            answers = [Answer(context[start:end], start)]
        yield Question(f"f:{i}", f"q{i}", random_text(rng, 3) + "?", context, answers)
