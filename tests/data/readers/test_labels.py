"""Label names and their ids."""

from prelnroberta.data.readers.labels import LabelIds, discover_labels, label_to_name
from tests.helpers.raw_files import error_message


def test_label_names():
    assert discover_labels(["10", "9", 2]) == ("2", "9", "10")
    assert discover_labels(["b", " a", "b"]) == ("a", "b")
    assert label_to_name(True) == "true" and label_to_name(1) == "1"
    assert "no labels" in error_message(discover_labels, [])
    ids = LabelIds(["neg", "pos"])
    assert [ids.find(label) for label in ("pos", 0, "1")] == [1, 0, 1]
    assert ids.find(2) == "label '2' is not among the 2 labels neg, pos"
    assert LabelIds(["1", "0"]).find(1) == 0, "names that are numbers are names"
    assert "expected different names" in error_message(LabelIds, ["a", "a"])
