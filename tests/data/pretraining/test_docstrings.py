"""Prose of docstrings, and the corpus of installed packages."""

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from prelnroberta.data.pretraining.docstrings import STDLIB, DocstringCorpus, extract_prose

NUMPYDOC = """Return the sum of the values that are given along an axis
    of the array, see :func:`~numpy.add` and `the guide <https://x.org>`_ for more [1]_.

    Parameters
    ----------
    a : array_like
        The elements to sum, in any shape that can be made into an array
        by ``numpy.asarray``.
    axis : int, optional

    Returns
    -------
    out : ndarray
        An array with the same shape as the input, with the axis removed.

    Notes
    -----
    This note has the title that is above it, which is not a part of it.

    See Also
    --------
    mean : Compute the mean of the values that are given along an axis.

    Examples
    --------
    >>> the_sum_of_all_the_values_in_the_array_is_printed(a)
    Here is the following result::

        this is code that could be read as a sentence if it were not indented.

    .. math:: the sum of a is the sum of all the elements of the array a.

    where the lower limit is the first of the elements in the array.

    ==========  ===========================================================
    the name    the text of the row that is the first one in the table.
    ==========  ===========================================================
    """
GOOGLE = """Trains the model on the given data for as many steps as asked.

    Args:
      rate (float): the rate at which the parameters are changed, which
        should be small and is often found by trying.
      data: An iterator over the batches that the model is to be trained on.

    See https://example.com for all of the words that are in the text of the link.

    * The first bullet is long enough to be a paragraph of its own.
    * The second bullet is as well, and it must not run into the first.
    """


def test_prose_is_sentences_without_markup():
    assert extract_prose(NUMPYDOC) == [
        "Return the sum of the values that are given along an axis of the array, see numpy.add and "
        "the guide for more.",
        "The elements to sum, in any shape that can be made into an array by numpy.asarray.",
        "An array with the same shape as the input, with the axis removed.",
        "This note has the title that is above it, which is not a part of it.",
    ]
    assert extract_prose(GOOGLE) == [
        "Trains the model on the given data for as many steps as asked.",
        "the rate at which the parameters are changed, which should be small and is often found by "
        "trying.",
        "An iterator over the batches that the model is to be trained on.",
        "The first bullet is long enough to be a paragraph of its own.",
        "The second bullet is as well, and it must not run into the first.",
    ]


@settings(deadline=None)
@given(st.text(st.sampled_from(list("ab :*`-.>\n[]")), max_size=80))
def test_prose_accepts_any_string(text):
    assert all("\n" not in paragraph for paragraph in extract_prose(text))


@pytest.fixture
def toy(tmp_path, monkeypatch):
    """A package that must not be imported, and a corpus of it alone."""
    root = tmp_path / "toy"
    (root / "tests").mkdir(parents=True)
    sentence = "The %s of the module is to say a thing that no other one says.\n"
    (root / "b.py").write_text(
        f'"""{sentence % "beginning"}"""\n'
        f'def f():\n    """{sentence % "function"}"""\n'
        f'class C:\n    """{sentence % "class"}\n\n{sentence % "rest"}"""\n'
        f'add_newdoc("f", """{sentence % "argument"}""")\n'
        'raise SystemExit("imported")\n'
    )
    (root / "a.py").write_text(f'"""{sentence % "class"}"""\n')
    (root / "broken.py").write_text('"""The %s of the module\n')
    (root / "tests" / "c.py").write_text(f'"""{sentence % "test"}"""\n')
    (root / "test_d.py").write_text(f'"""{sentence % "test"}"""\n')
    monkeypatch.syspath_prepend(tmp_path)
    corpus = DocstringCorpus(["toy", "no_such_package"])
    assert corpus.roots.pop(STDLIB)[0].is_dir()
    return corpus


def test_docstrings_are_read_in_order_and_once(toy):
    found = [(d.key, [line.split()[1] for line in d.text.split("\n")]) for d in toy.documents()]
    assert found == [
        ("toy/a", ["class"]),
        ("toy/b", ["beginning"]),
        ("toy/b", ["function"]),
        ("toy/b", ["rest"]),
        ("toy/b", ["argument"]),
    ]
    assert list(toy.documents()) == list(toy.documents())


def test_manifest_lists_versions_and_missing_packages():
    corpus = DocstringCorpus(["numpy", "no_such_package"])
    manifest = corpus.manifest()
    assert manifest["missing_packages"] == ["no_such_package"]
    import numpy

    assert manifest["packages"]["numpy"] == {"numpy": numpy.__version__}
    assert json.loads(json.dumps(manifest)) == manifest
