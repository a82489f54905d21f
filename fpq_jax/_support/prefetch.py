"""Computing the next item of a sequence while one is used."""

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

Item = TypeVar("Item")
Result = TypeVar("Result")


def prefetch(function: Callable[[Item], Result], items: Iterable[Item]) -> Iterator[Result]:
    """function(item) for each item, in order; the next one is computed in a thread while one is used."""
    with ThreadPoolExecutor(1) as thread:
        pending: deque[Future[Result]] = deque()
        for item in items:
            pending.append(thread.submit(function, item))
            if len(pending) > 1:
                yield pending.popleft().result()  # and not kept here
        while pending:
            yield pending.popleft().result()
