"""SIGTERM and ^C as a wish to leave: after the step that runs, with a checkpoint, on all processes at once.

And what one process says when another has left without a word.
"""

import re
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

import torch
import torch.distributed

from utils.refusal import Refused

GRACE = 2.0  # seconds in which a second signal is taken for the first: launchers pass on what the terminal sends, too
# What gloo, NCCL and the store of addresses say when the other end of a connection is gone
LOST = re.compile("gloo/transport|ncclRemoteError|Connection (was likely )?closed|Connection reset|Broken pipe")


@contextmanager
def explain_lost_process() -> Iterator[None]:
    """Refuse in one line to go on where the connection to another process is lost. Serves as a decorator, too."""
    try:
        yield
    except RuntimeError as error:
        if not LOST.search(str(error)):
            raise
        reason = re.sub(r"^\[[^]]*\] *", "", str(error)).split(". ")[0]  # without the line of gloo's source
        raise Refused(
            f"another process has gone ({' '.join(reason.split())[:160]}); where it did not say why, it was killed: the same "
            "command goes on from the last checkpoint"
        ) from error


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
