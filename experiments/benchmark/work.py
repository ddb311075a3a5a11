"""What a contender is to the one who measures it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple


class Work(NamedTuple):
    """One contender's way to do one case.

    Attributes:
        check: without dropout: the loss of `cases.checked`, the vectors or logits of all real
            tokens [n, ...] in the order of the rows, or generated ids. What must agree.
        run: does the case's work once, and returns when it is done.
    """

    check: Callable[[], Any]
    run: Callable[[], None]
