"""Two real processes: they do what one does, and end together, with the reason, when one of them cannot go on."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.conftest import HANG_S, ROOT
from tests.processes import Processes, free_port
from tests.training import flags, kill, read, start, wait_for_checkpoint
from utils.interrupt import explain_lost_process
from utils.release import WEIGHTS_NAME


def start_machine(rank: int, port: int, args: list[str], log: Path) -> subprocess.Popen:
    """Start what launch/multi_node.yaml documents for one of two machines with a GPU each, on loopback and the CPU."""
    command = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", "launch/multi_node.yaml",
               "--machine_rank", str(rank), "--main_process_ip", "127.0.0.1", "--main_process_port", str(port),
               "--num_processes", "2", "train_lora.py", *args]  # fmt: skip
    environment = os.environ | {"OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
    output = open(log, "a")
    return subprocess.Popen(command, cwd=ROOT, env=environment, stdout=output, stderr=output, start_new_session=True)


def test_two_machines_encode_train_validate_and_draw_as_one_process(
    tiny_base: Path, tiny_data: Path, tmp_path: Path
) -> None:
    """Accumulating, with dropout of captions and sentences; each run over latents that it encodes itself."""
    output = tmp_path / "output.txt"

    def args(processes: int) -> list[str]:
        more = ["--max_train_steps", "12", "--validation_steps", "6", "--num_validation_images", "2", "--use_ema",
                "--gradient_accumulation_steps", "2", "--train_batch_size", str(4 // processes), "--caption_dropout", "0.3",
                "--sentence_dropout", "0.3", "--cache_dir", str(tmp_path / f"cache{processes}")]  # fmt: skip
        return flags(tiny_base, tiny_data, tmp_path / f"run{processes}", *more)

    assert Processes("train_lora.py", args(1), output).wait(HANG_S) == 0, output.read_text()
    port = free_port()
    machines = [start_machine(rank, port, args(2), output) for rank in range(2)]
    assert [machine.wait(HANG_S) for machine in machines] == [0, 0], output.read_text()
    assert {row["num_processes"] for row in read(tmp_path / "run2" / "log.jsonl")} == {2}
    one, two = tmp_path / "run1", tmp_path / "run2"
    for log, names, tolerance in (
        ("log.jsonl", ("loss", "lr"), 1e-5),
        ("validation.jsonl", ("mse", "ssim"), 5e-5),  # a pixel that rounds to the next grey level is 1e-6 of SSIM
    ):
        for name in names:
            values = [[row[name] for row in read(run / log)] for run in (one, two)]
            assert values[1] == pytest.approx(values[0], abs=tolerance), name
    for name in ("mean", "std"):
        paths = [next((tmp_path / f"cache{processes}").rglob(f"{name}.npy")) for processes in (1, 2)]
        np.testing.assert_allclose(*map(np.load, paths), atol=1e-6)
    sheets = [np.asarray(Image.open(run / "samples" / "step-000012.png")).astype(int) for run in (one, two)]
    assert np.abs(sheets[1] - sheets[0]).max() <= 1


def test_a_machine_that_is_killed_ends_the_job_with_a_line_and_the_same_commands_go_on(
    tiny_base: Path, tiny_data: Path, tmp_path: Path
) -> None:
    def args(run: str) -> list[str]:
        more = ["--max_train_steps", "6", "--checkpointing_steps", "3", "--train_batch_size", "2"]
        return flags(tiny_base, tiny_data, tmp_path / run, *more)

    output, port = tmp_path / "output.txt", free_port()
    assert Processes("train_lora.py", args("unbroken"), output, num_processes=2).wait(HANG_S) == 0, output.read_text()
    machines = [start_machine(rank, port, args("broken"), tmp_path / f"output{rank}.txt") for rank in range(2)]
    wait_for_checkpoint(machines[1], tmp_path / "broken")
    kill(machines[1])
    assert machines[0].wait(HANG_S) != 0
    said = (tmp_path / "output0.txt").read_text()
    assert said.count("train_lora.py: another process has gone (") == 1, said
    assert "RuntimeError" not in said
    port = free_port()
    machines = [start_machine(rank, port, args("broken"), output) for rank in range(2)]
    assert [machine.wait(HANG_S) for machine in machines] == [0, 0], output.read_text()
    assert "going on from" in output.read_text()
    for name in (WEIGHTS_NAME, "log.jsonl", "validation.jsonl"):
        assert (tmp_path / "broken" / name).read_bytes() == (tmp_path / "unbroken" / name).read_bytes(), name


def test_other_errors_are_not_taken_for_a_lost_process() -> None:
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"), explain_lost_process():
        raise RuntimeError("mat1 and mat2 shapes cannot be multiplied (4x2 and 4x2)")


def test_a_film_that_one_process_cannot_read_ends_the_job_with_its_name(
    tiny_base: Path, own_data: Path, tmp_path: Path
) -> None:
    film = own_data / "images" / "p10_1.png"  # row 21: the second process's
    film.write_bytes(film.read_bytes()[:300])
    output = tmp_path / "output.txt"
    assert start(2, flags(tiny_base, own_data, tmp_path / "run"), output).wait(HANG_S) != 0
    end = output.read_text().splitlines()[-15:]
    assert any("p10_1.png" in line for line in end), "\n".join(end)
