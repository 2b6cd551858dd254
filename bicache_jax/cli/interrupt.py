"""Ctrl-C that works at once, whatever the main thread is busy with."""

from __future__ import annotations

import os
import signal
import socket
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

EXIT_INTERRUPTED = 130  # 128 + SIGINT, as shells count


def say_interrupted(words: str) -> None:
    """Tells the user that the command was interrupted, and what that means for their results."""
    print(f"bicache: interrupted{'; ' + words if words else ''}", file=sys.stderr, flush=True)


@contextmanager
def ends_at_once(last_words: Callable[[], str]) -> Iterator[None]:
    """Inside it, SIGINT ends the process with status 130 without asking the main thread.

    Python would raise KeyboardInterrupt in the main thread. That has to wait for a compiled program, which may run for
    minutes; it is lost where it falls into a garbage collection, in which jax has a callback; and XLA may crash when an
    interpreter shuts down in the middle of its work. Finished results are on disk, so nothing is left to be done.

    Args:
        last_words: called on SIGINT, from another thread: what to tell the user.

    Yields:
        Nothing.
    """
    ours = threading.current_thread() is threading.main_thread()
    if not ours or signal.getsignal(signal.SIGINT) is not signal.default_int_handler:
        yield  # a program around us, or `nohup`, has its own idea of SIGINT
        return
    reader, writer = socket.socketpair()
    writer.setblocking(False)

    def watch() -> None:
        while received := reader.recv(64):
            if signal.SIGINT in received:
                say_interrupted(last_words())
                os._exit(EXIT_INTERRUPTED)

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    # The number of a signal is written to this descriptor as it arrives, given that it has any handler.
    descriptor = signal.set_wakeup_fd(writer.fileno(), warn_on_full_buffer=False)
    handler = signal.signal(signal.SIGINT, lambda *_: None)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, handler)
        signal.set_wakeup_fd(descriptor)
        writer.close()
        watcher.join()
        reader.close()
