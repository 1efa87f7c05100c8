"""The job scripts for Slurm, with stubs in place of its commands and of python: what is queued again, and what is left as it is."""

import os
import shutil
import signal
import subprocess
import time
from pathlib import Path

import pytest

from launch.doctor import FILMS_A_STEP
from tests.conftest import HANG_S, ROOT

# What is called lands in calls.txt, a line each
STUBS = {
    "python": """case "$*" in
        *doctor.py*) echo "python train_lora.py --train_batch_size 8" ;;
        train_lora.py*) mkdir -p out/fold3 && touch -a out/fold3/pytorch_lora_weights.safetensors; exit ${TRAINING:-0} ;;
        evaluate.py*) mkdir -p out/fold3/evaluation && echo '  "training_films": 9' >out/fold3/evaluation/metrics.json ;;
    esac""",
    "accelerate": """echo "gloo $SLURM_NODEID ${GLOO_SOCKET_IFNAME:-}" >>calls.txt; trap 'touch told' TERM; touch "started$SLURM_NODEID"
        [ "$SLURM_NODEID" = "${FAILS:-}" ] || until [ -e told ] || [ -z "${WAITS:-}" ]; do sleep 0.05; done
        exit ${TRAINING:-0}""",
    # As the real one: what fails has the others told, and the highest status is its own
    "srun": """[ "$1" != --kill-on-bad-exit=1 ] || shift
        for SLURM_NODEID in $(seq 0 $((${SLURM_JOB_NUM_NODES:-1} - 1))); do
            export SLURM_NODEID; "$@" & tasks="${tasks:-} $!"; done
        echo "$tasks" >tasks; highest=0
        for task in $tasks; do wait $task || { status=$?; kill $tasks 2>&-; [ $status -lt $highest ] || highest=$status; }; done
        exit $highest""",
    "scontrol": """[ "$1" != requeue ] || kill $PPID; [ "$1" != show ] || printf 'node1\\nnode2\\n'""",
    "getent": 'echo "10.0.0.${2#node} STREAM $2"',
    "ip": 'echo "$4 via 10.9.9.9 dev to-$4 src 10.0.0.9 uid 0"',
    "scancel": "kill $(cat tasks)",
}
JOB = {"SLURM_JOB_ID": "70", "SLURM_JOB_NODELIST": "node[1-2]", "SLURM_JOB_NUM_NODES": "2", "SLURM_GPUS_ON_NODE": "4"}
TASK = {"SLURM_JOB_ID": "70", "SLURM_ARRAY_JOB_ID": "70", "SLURM_ARRAY_TASK_ID": "3"}


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    shutil.copytree(ROOT / "launch", tmp_path / "launch")
    programs = tmp_path / ".venv" / "bin"
    programs.mkdir(parents=True)
    for name, text in STUBS.items():
        (programs / name).write_text(f"""#!/usr/bin/env bash\necho "{name} ${{*//$'\\n'/ }}" >>calls.txt\n{text}\n""")
        (programs / name).chmod(0o755)
    return tmp_path


def submit(checkout: Path, script: str, *flags: str, **environment: str) -> subprocess.Popen:
    command = ["bash", f"launch/{script}", *flags]
    return subprocess.Popen(command, cwd=checkout, env=os.environ | environment)


def calls(checkout: Path, *programs: str) -> list[str]:
    lines = (checkout / "calls.txt").read_text().splitlines()
    return [line for line in lines if line.split()[0] in programs and "doctor.py" not in line]


def test_a_fold_is_trained_and_evaluated_and_not_again(checkout: Path) -> None:
    assert submit(checkout, "cross_validate.slurm", "--rank", "4", EVALUATE="--max_films 9", **TASK).wait(HANG_S) == 0
    train, evaluate = calls(checkout, "python")
    assert train == (
        "python train_lora.py --train_batch_size 8 --fold 3 --train_data_dir data --output_dir out/fold3 --rank 4"
    )
    assert evaluate == "python evaluate.py --lora out/fold3 --max_films 9"
    assert submit(checkout, "cross_validate.slurm", EVALUATE="--max_films 9", **TASK).wait(HANG_S) == 0
    assert len(calls(checkout, "python")) == 3, "evaluated again, though adapter and flags are the same"
    assert submit(checkout, "cross_validate.slurm", **TASK).wait(HANG_S) == 0
    assert calls(checkout, "python")[-1] == "python evaluate.py --lora out/fold3"


def test_a_fold_that_is_told_to_leave_is_queued_again_alone(checkout: Path) -> None:
    assert submit(checkout, "cross_validate.slurm", TRAINING="143", **TASK).wait(HANG_S) != 0
    assert calls(checkout, "scontrol") == ["scontrol requeue 70_3"], "70 is the whole array, too"
    assert not any("evaluate.py" in line for line in calls(checkout, "python"))


def test_a_fold_that_fails_is_not_queued_again(checkout: Path) -> None:
    assert submit(checkout, "cross_validate.slurm", TRAINING="2", **TASK).wait(HANG_S) == 2
    assert calls(checkout, "scontrol") == []


def test_machines_are_started_as_their_preset_says(checkout: Path) -> None:
    assert submit(checkout, "multi_node.slurm", "--fold", "2", **JOB).wait(HANG_S) == 0
    assert sorted(calls(checkout, "accelerate")) == [
        f"accelerate launch --config_file launch/multi_node.yaml --num_machines 2 --machine_rank {rank} "
        f"--main_process_ip node1 --num_processes 8 --main_process_port 20070 "
        f"train_lora.py --train_batch_size {FILMS_A_STEP // 8} --fold 2"
        for rank in range(2)
    ]
    assert not any("requeue" in line for line in calls(checkout, "scontrol"))


@pytest.mark.parametrize(
    ("environment", "interfaces"),
    [({}, ["to-10.0.0.2", "to-10.0.0.1"]), ({"GLOO_SOCKET_IFNAME": "mine"}, ["mine", "mine"])],
)
def test_machines_find_one_another_whatever_they_call_themselves(
    checkout: Path, environment: dict[str, str], interfaces: list[str]
) -> None:
    """By the interface that leads to the other, not by their own name, which may stand for 127.0.1.1."""
    assert submit(checkout, "multi_node.slurm", **JOB, **environment).wait(HANG_S) == 0
    assert sorted(calls(checkout, "gloo")) == [f"gloo {rank} {name}" for rank, name in enumerate(interfaces)]


def test_a_machine_without_ip_is_left_to_gloo(checkout: Path) -> None:
    (checkout / ".venv" / "bin" / "ip").write_text("#!/usr/bin/env bash\nexit 127\n")
    assert submit(checkout, "multi_node.slurm", **JOB).wait(HANG_S) == 0
    assert sorted(calls(checkout, "gloo")) == ["gloo 0 ", "gloo 1 "]


def test_a_machine_that_fails_ends_the_job_though_the_others_are_told_to_leave(checkout: Path) -> None:
    """By srun; else what fails each time would be queued again each time."""
    assert submit(checkout, "multi_node.slurm", FAILS="0", WAITS="1", TRAINING="1", **JOB).wait(HANG_S) == 1
    assert not any("requeue" in line for line in calls(checkout, "scontrol"))


@pytest.mark.parametrize("status", [0, 1])
@pytest.mark.parametrize("number", [signal.SIGUSR1, signal.SIGTERM])
def test_machines_that_are_told_to_leave_are_queued_again_unless_they_are_done(
    checkout: Path, status: int, number: int
) -> None:
    """USR1 is the job's before its time is up, SIGTERM the machines' when it is pre-empted: here one's, which all follow."""
    job = submit(checkout, "multi_node.slurm", WAITS="1", TRAINING=str(status), **JOB)
    while len(list(checkout.glob("started?"))) < 2:
        assert job.poll() is None
        time.sleep(0.05)
    if number == signal.SIGUSR1:
        job.send_signal(number)
    else:
        os.kill(int((checkout / "tasks").read_text().split()[0]), number)
    assert bool(job.wait(HANG_S)) == bool(status)
    if number == signal.SIGUSR1:
        assert calls(checkout, "scancel") == ["scancel --signal=TERM 70"]  # to the steps, not to the script
    assert ("scontrol requeue 70" in calls(checkout, "scontrol")) == bool(status)


def test_gpus_that_sixteen_films_cannot_be_dealt_out_to_are_refused(checkout: Path) -> None:
    assert submit(checkout, "multi_node.slurm", **JOB | {"SLURM_GPUS_ON_NODE": "3"}).wait(HANG_S) == 2
    assert calls(checkout, "accelerate") == []
