"""Reading, computing and writing at the same time: a thread on each side of the caller's own, with short queues."""

from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, Generic, TypeVar

T = TypeVar("T")
_END: Any = object()


def ahead(items: Iterator[T], depth: int = 2) -> Iterator[T]:
    """`items`, produced by a thread that runs up to `depth` items ahead; its exceptions come up here.

    When the caller stops early, the thread ends after the item that it is at, and a generator is closed.
    """
    with ThreadPoolExecutor(1, thread_name_prefix="reading ahead") as pool:
        waiting: deque[Future[T]] = deque(pool.submit(next, items, _END) for _ in range(depth))
        try:
            while (item := waiting.popleft().result()) is not _END:
                waiting.append(pool.submit(next, items, _END))
                yield item
        finally:
            for future in waiting:
                future.cancel()
            close = getattr(items, "close", None)
            if close is not None:
                pool.submit(close).result()


class Behind(Generic[T]):
    """Hands items to `work` in a thread of its own, in order, with at most `depth` unfinished.

    An exception in `work` comes up once, at a later `put` or at `close`; after it nothing more is worked on.
    """

    def __init__(self, work: Callable[[T], None], depth: int = 4) -> None:
        self._work, self._depth = work, depth
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="writing behind")
        self._waiting: deque[Future[None]] = deque()
        self._broken = False

    def put(self, item: T) -> None:
        """Queue an item; waits while `depth` items are unfinished."""
        while self._waiting and (len(self._waiting) >= self._depth or self._waiting[0].done()):
            self._waiting.popleft().result()
        self._waiting.append(self._pool.submit(self._do, item))

    def close(self) -> None:
        """Wait until everything that was put is worked on."""
        try:
            while self._waiting:
                self._waiting.popleft().result()
        finally:
            self._pool.shutdown()

    def _do(self, item: T) -> None:
        if self._broken:
            return
        self._broken = True  # stays so if the work raises
        self._work(item)
        self._broken = False
