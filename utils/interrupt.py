"""SIGTERM and ^C as a wish to leave: after the step that runs, with a checkpoint, on all processes at once."""

import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

import torch
import torch.distributed

GRACE = 2.0  # seconds in which a second signal is taken for the first: launchers pass on what the terminal sends, too


class LeaveRequest:
    """Listens for SIGTERM (a pre-empted job, a closed session) and SIGINT (^C) until it is closed.

    A first signal is noted; one that comes more than GRACE seconds later raises KeyboardInterrupt with its number, of
    which `refusal.run` makes the exit status. Outside the main thread, where Python delivers no signals, it listens to
    nothing.
    """

    def __init__(self, num_processes: int):
        """Agree on leaving among `num_processes`, over a group of its own, so that no process waits for its device."""
        self.signal = 0
        self._noted_at = 0.0
        self._leave_at_once = False
        self._former: dict[int, object] = {}
        self._group = torch.distributed.new_group(backend="gloo") if num_processes > 1 else None
        if threading.current_thread() is threading.main_thread():
            self._former = {number: signal.signal(number, self._note) for number in (signal.SIGTERM, signal.SIGINT)}

    def close(self) -> None:
        """Give signals back to whoever had them."""
        for number, handler in self._former.items():
            signal.signal(number, handler)

    def _note(self, number: int, _: FrameType | None) -> None:
        if self._leave_at_once or (self.signal and time.monotonic() - self._noted_at > GRACE):
            raise KeyboardInterrupt(number)
        if not self.signal:
            self.signal, self._noted_at = number, time.monotonic()

    def agreed(self) -> int:
        """Return the signal that this or any other process has had, 0 for none. Every process must ask as often."""
        if self._group is None:
            return self.signal
        noted = torch.tensor(self.signal)
        torch.distributed.all_reduce(noted, torch.distributed.ReduceOp.MAX, group=self._group)
        return int(noted)

    @contextmanager
    def at_once(self) -> Iterator[None]:
        """Let a signal end the process where it stands: for long work that is done again after the last checkpoint."""
        if self.signal:
            raise KeyboardInterrupt(self.signal)
        self._leave_at_once = True
        try:
            yield
        finally:
            self._leave_at_once = False
