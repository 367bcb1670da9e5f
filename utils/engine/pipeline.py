"""Reading, computing and writing at the same time: two threads with short queues around the caller's own."""

import queue
import threading
from collections.abc import Callable, Iterator
from typing import Any, Generic, TypeVar

T = TypeVar("T")
_END: Any = object()


class _Failure:
    """An exception on its way from a thread to the caller."""

    def __init__(self, error: BaseException) -> None:
        self.error = error


def ahead(items: Iterator[T], depth: int = 2) -> Iterator[T]:
    """`items`, produced by a thread that runs up to `depth` items ahead; its exceptions come up here.

    When the caller stops early, the thread ends after the item that it is at, and `items` is closed.
    """
    waiting: queue.Queue[Any] = queue.Queue(maxsize=depth)
    stopped = threading.Event()

    def offer(item: Any) -> bool:
        while not stopped.is_set():
            try:
                waiting.put(item, timeout=0.1)
                return True
            except queue.Full:
                continue
        return False

    def produce() -> None:
        end: Any = _END
        try:
            for item in items:
                if not offer(item):
                    break
        except BaseException as error:  # noqa: BLE001 (handed to the caller, which raises it)
            end = _Failure(error)
        finally:
            close = getattr(items, "close", None)
            if close is not None:
                close()
            offer(end)

    thread = threading.Thread(target=produce, name="reading ahead", daemon=True)
    thread.start()
    try:
        while True:
            item = waiting.get()
            if item is _END:
                return
            if isinstance(item, _Failure):
                raise item.error
            yield item
    finally:
        stopped.set()
        thread.join(timeout=5.0)


class Behind(Generic[T]):
    """Hands items to `work` in a thread of its own, in order, with at most `depth` waiting.

    An exception in `work` comes up at the next `put` or at `close`; after it nothing more is worked on.
    """

    def __init__(self, work: Callable[[T], None], depth: int = 4) -> None:
        self._work = work
        self._waiting: queue.Queue[Any] = queue.Queue(maxsize=depth)
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._run, name="writing behind", daemon=True)
        self._thread.start()

    def put(self, item: T) -> None:
        """Queue an item; waits while the queue is full."""
        self._raise()
        self._waiting.put(item)

    def close(self) -> None:
        """Wait until everything that was put is worked on."""
        if self._thread.is_alive():
            self._waiting.put(_END)
            self._thread.join()
        self._raise()

    def _run(self) -> None:
        while (item := self._waiting.get()) is not _END:
            if self._error is None:
                try:
                    self._work(item)
                except BaseException as error:  # noqa: BLE001 (raised in the caller's thread)
                    self._error = error

    def _raise(self) -> None:
        if self._error is not None:
            raise self._error
