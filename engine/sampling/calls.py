"""Functions that the worker runs between two steps, each on the items of all callers that wait for it."""

from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass

import torch
from torch import Tensor

from engine.sampling.worker import finish_future


@dataclass(eq=False)
class Call:
    """A function that maps a list to one of equal length, item by item, and what it is to be applied to."""

    function: Callable[[Sequence], Sequence | Tensor]
    items: list
    future: Future


class Calls:
    """Calls that wait."""

    def __init__(self):
        self._waiting: deque[Call] = deque()

    def __bool__(self) -> bool:
        return bool(self._waiting)

    def add(self, call: Call) -> None:
        self._waiting.append(call)

    def run(self, most: int) -> None:
        """Applies the first call's function to its items and those of all calls of this function, `most` at a time."""
        function = self._waiting[0].function
        calls = [call for call in self._waiting if call.function == function]
        self._waiting = deque(call for call in self._waiting if call.function != function)
        for call in calls:
            if call.future.cancelled():
                finish_future(call.future)
        _finish([call for call in calls if not call.future.cancelled()], most)

    def abort(self, error: BaseException) -> None:
        """Ends all calls with this error."""
        while self._waiting:
            finish_future(self._waiting.popleft().future, error=error)


def _finish(calls: list[Call], most: int) -> None:
    """Ends calls of one function with their results; if it fails, applies it to each call's items separately."""
    if not calls:
        return
    try:
        results = iter(_applied(calls[0].function, [item for call in calls for item in call.items], most))
    except Exception as error:
        if len(calls) == 1:
            finish_future(calls[0].future, error=error)
            return
        for call in calls:
            _finish([call], most)
        return
    for call in calls:
        finish_future(call.future, [next(results) for _ in call.items])


def _applied(function: Callable[[Sequence], Sequence | Tensor], items: list, most: int) -> list:
    """function(items), in parts of at most `most` items, of fewer where memory runs out."""
    results = []
    while len(results) < len(items):
        part = items[len(results) : len(results) + most]
        try:
            made = function(part)
        except torch.OutOfMemoryError:
            if len(part) == 1:
                raise
            most = len(part) // 2
        else:
            assert len(made) == len(part), f"{function} made {len(made)} of {len(part)} items"
            results.extend(made)
    return results
