"""A wish to leave: noted once, agreed upon, and, in real runs, a checkpoint of the step and an exit status that says so."""

import os
import signal
import time
from pathlib import Path

import pytest

from tests.conftest import HANG_S
from tests.processes import Processes
from tests.training import flags, read
from utils import interrupt
from utils.checkpoint import checkpoint_steps
from utils.interrupt import LeaveRequest
from utils.release import WEIGHTS_NAME


@pytest.fixture
def leave():
    request = LeaveRequest(num_processes=1)
    yield request
    request.close()


def test_a_signal_is_noted_and_the_next_one_is_not_waited_for(leave, monkeypatch: pytest.MonkeyPatch) -> None:
    assert leave.agreed() == 0
    os.kill(os.getpid(), signal.SIGTERM)
    os.kill(os.getpid(), signal.SIGINT)  # a launcher passes on what the terminal has sent already
    assert leave.agreed() == signal.SIGTERM
    monkeypatch.setattr(interrupt, "GRACE", 0.0)
    with pytest.raises(KeyboardInterrupt) as raised:
        os.kill(os.getpid(), signal.SIGINT)
    assert raised.value.args == (signal.SIGINT,)


def test_work_that_is_done_again_anyway_is_left_at_once(leave) -> None:
    with pytest.raises(KeyboardInterrupt), leave.at_once():
        os.kill(os.getpid(), signal.SIGTERM)
    assert leave.agreed() == 0
    os.kill(os.getpid(), signal.SIGTERM)  # outside it is noted, and the next such work not begun
    with pytest.raises(KeyboardInterrupt), leave.at_once():
        pytest.fail("begun")


def test_handlers_are_given_back() -> None:
    before = signal.getsignal(signal.SIGTERM)
    LeaveRequest(num_processes=1).close()
    assert signal.getsignal(signal.SIGTERM) == before


SETTINGS = ["--max_train_steps", "40", "--checkpointing_steps", "1000", "--validation_steps", "40",
            "--dataloader_num_workers", "1", "--train_batch_size"]  # fmt: skip


@pytest.fixture(scope="module")
def unbroken(tiny_base: Path, tiny_data: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[int, Path]:
    """A run that no signal reaches, on one process and on two."""
    folder = tmp_path_factory.mktemp("unbroken")
    for num_processes in (1, 2):
        args = flags(tiny_base, tiny_data, folder / str(num_processes), *SETTINGS, str(4 // num_processes))
        assert Processes("train_lora.py", args, folder / "output.txt", num_processes).wait(HANG_S) == 0
    return {num_processes: folder / str(num_processes) for num_processes in (1, 2)}


@pytest.mark.parametrize(("number", "num_processes"), [(signal.SIGINT, 1), (signal.SIGTERM, 2)])
def test_a_signal_saves_after_the_step_and_the_same_command_goes_on(
    tiny_base: Path, tiny_data: Path, tmp_path: Path, unbroken: dict[int, Path], num_processes: int, number: int
) -> None:
    """On two processes only one of them gets the signal, and both leave after the same step."""
    output, run = tmp_path / "output.txt", tmp_path / "run"
    args = flags(tiny_base, tiny_data, run, *SETTINGS, str(4 // num_processes))
    process = Processes("train_lora.py", args, output, num_processes)
    while not (run / "log.jsonl").exists() and process.poll() is None:  # the first 25 steps are done
        time.sleep(0.01)
    assert process.poll() is None
    os.killpg(process.pids[-1], number)  # its data loader's, too, as a terminal does, and a scheduler
    assert process.wait(HANG_S) == 128 + number
    assert "interrupted; the same command goes on" in output.read_text()
    (step,) = checkpoint_steps(run)
    assert read(run / "log.jsonl")[-1]["step"] == step
    assert 25 <= step < 40
    assert Processes("train_lora.py", args, output, num_processes).wait(HANG_S) == 0
    for name in (WEIGHTS_NAME, "log.jsonl", "validation.jsonl"):
        assert (run / name).read_bytes() == (unbroken[num_processes] / name).read_bytes(), name
