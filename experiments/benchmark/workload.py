"""The interface between a contender and the process that times it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple


class Workload(NamedTuple):
    """A case, as one variant of a contender computes it.

    Attributes:
        outputs: computes, without dropout, what all contenders must agree on: the loss of
            `cases.comparison_batch`, the hidden states or logits of all real tokens [n, ...] in
            the order of the rows, or generated ids.
        run: computes the case once, and returns when it is done.
    """

    outputs: Callable[[], Any]
    run: Callable[[], None]
