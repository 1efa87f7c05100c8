"""Real processes of a script, forked from one that has imported its libraries: to import them takes most of a short run.

What a fresh interpreter, `torchrun` and `accelerate launch` add is in tests/test_contract.py and tests/test_distributed.py.
"""

import contextlib
import multiprocessing
import os
import runpy
import signal
import socket
import sys
import time
from pathlib import Path

import torch

from tests.conftest import ROOT

SERVER = multiprocessing.get_context("forkserver")
SERVER.set_forkserver_preload(["train_lora", "generate", "tests.processes"])


class Processes:
    """A script started on the CPU with one process, or with several as `torchrun` does: a session and a rank each.

    Args:
        script: its file's name, such as "train_lora.py".
        args: its command line.
        num_processes: how many there are; `pids` has their ids by rank.
        output: the file that standard output and error are added to.
    """

    def __init__(self, script: str, args: list[str], output: Path, num_processes: int = 1):
        environment = {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
        if num_processes > 1:
            environment |= {"MASTER_ADDR": "localhost", "MASTER_PORT": str(free_port())}
            environment |= dict.fromkeys(("WORLD_SIZE", "LOCAL_WORLD_SIZE"), str(num_processes))
        self._processes = []
        for rank in range(num_processes):
            ranks = dict.fromkeys(("RANK", "LOCAL_RANK"), str(rank)) if num_processes > 1 else {}
            self._processes.append(SERVER.Process(target=_run, args=(script, args, output, environment | ranks)))
            self._processes[-1].start()

    @property
    def pids(self) -> list[int]:
        return [process.pid for process in self._processes]

    def poll(self) -> int | None:
        """Return None while one runs, and then the exit status: the first that is not 0, or 0."""
        statuses = [process.exitcode for process in self._processes]
        return None if None in statuses else next(filter(None, statuses), 0)

    def wait(self, timeout_s: float) -> int:
        """Return the exit status when all have ended. TimeoutError where they do not."""
        end = time.monotonic() + timeout_s
        for process in self._processes:
            process.join(max(0.0, end - time.monotonic()))
        if (status := self.poll()) is None:
            self.kill()
            raise TimeoutError(f"{self.pids} were still running after {timeout_s} s")
        return status

    def kill(self) -> None:
        """Send SIGKILL to all, and to what they started."""
        for process in self._processes:
            with contextlib.suppress(ProcessLookupError):  # it has ended
                os.killpg(process.pid, signal.SIGKILL)
        for process in self._processes:
            process.join()


def free_port() -> int:
    """Return a port of this machine that nobody listens on."""
    with socket.create_server(("localhost", 0)) as server:
        return server.getsockname()[1]


def _run(script: str, args: list[str], output: Path, environment: dict[str, str]) -> None:
    os.setsid()
    multiprocessing.set_start_method("fork", force=True)  # not the server's, for data loaders
    os.environ.update(environment)
    os.chdir(ROOT)
    with open(output, "a") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    torch.set_num_threads(1)
    sys.argv = [script, *args]
    runpy.run_path(str(ROOT / script), run_name="__main__")
