"""The project's logger: plain messages on standard output, silenced by level and never by redirecting streams."""

import io
import logging
import sys

LOGGER = logging.getLogger("yolov5-spd")


class _Stdout(logging.StreamHandler):
    """Writes to whatever `sys.stdout` is at the time of the message, so that captured streams are honored."""

    def __init__(self) -> None:
        super().__init__(sys.stdout)

    def emit(self, record: logging.LogRecord) -> None:
        self.stream = sys.stdout
        if isinstance(sys.stdout, io.TextIOWrapper) and sys.stdout.errors == "strict":
            sys.stdout.reconfigure(errors="backslashreplace")  # a name that the console cannot show costs no message
        super().emit(record)


if not LOGGER.handlers:
    _handler = _Stdout()
    _handler.setFormatter(logging.Formatter("%(message)s"))
    LOGGER.addHandler(_handler)
    LOGGER.setLevel(logging.INFO)
    LOGGER.propagate = False


def quiet(is_main: bool) -> None:
    """Ranks other than the main one report warnings only."""
    LOGGER.setLevel(logging.INFO if is_main else logging.WARNING)
