"""The doctor: it names what is broken and what mends it, and for every card the command of its preset."""

import importlib.util
import sys
from pathlib import Path
from types import SimpleNamespace

import huggingface_hub
import peft
import pytest
import torch
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.commands.launch import launch_command_parser

import train_lora
from launch import doctor
from launch.doctor import FILMS_A_STEP, Card, training_command
from tests.conftest import ROOT, fake_package
from utils import hardware, pipeline
from utils.pipeline import BUNDLED_BASE, STABLE_DIFFUSION
from utils.refusal import Refused

T4, L4 = Card("Tesla T4", 14.6, bf16=False), Card("NVIDIA L4", 22.2, bf16=True)
A100, H100 = Card("NVIDIA A100", 39.4, bf16=True), Card("NVIDIA H100", 79.1, bf16=True)
OLD, SMALL = Card("GeForce GTX 1070", 7.9, bf16=False), Card("GeForce RTX 3060", 11.7, bf16=True)


def understood(command: str) -> tuple:
    """Return what accelerate and the script make of a command line."""
    launch = launch_command_parser().parse_args(command.removeprefix("accelerate launch ").split())
    assert launch.training_script == "train_lora.py"
    return launch, train_lora.parse_args(launch.training_script_args)


@pytest.mark.parametrize(
    "cards",
    [[T4], [L4], [A100], [H100], [OLD], [SMALL], [L4] * 2, [T4] * 3, [A100] * 8, [H100] * 24, [T4, L4]],
)
def test_every_machine_trains_sixteen_films_a_step(cards: list[Card]) -> None:
    launch, args = understood(training_command(cards))
    processes = launch.num_processes or 1
    assert args.train_batch_size * args.gradient_accumulation_steps * processes == FILMS_A_STEP
    assert processes <= len(cards)
    assert not (args.cuda_graph and processes > 1)
    precision = launch.mixed_precision or load_config_from_file(str(ROOT / launch.config_file)).mixed_precision
    assert precision == ("bf16" if all(card.bf16 for card in cards) else "fp16")


@pytest.mark.parametrize(("cards", "precision"), [([], None), ([T4], "fp16"), ([L4], None), ([A100] * 4, None)])
def test_without_a_launcher_one_card_trains_the_same(cards: list[Card], precision: str | None) -> None:
    python, script, *flags = training_command(cards, launcher=False).split()
    args = train_lora.parse_args(flags)
    assert (python, script, args.mixed_precision) == ("python", "train_lora.py", precision)
    assert args.train_batch_size * args.gradient_accumulation_steps == FILMS_A_STEP
    assert training_command(cards, "bf16", launcher=False).count("--mixed_precision") == 1


def test_a_run_in_bf16_is_not_sent_to_a_card_without(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    monkeypatch.setattr(doctor, "find_cards", lambda: [T4])
    monkeypatch.setattr(doctor, "check_cards", lambda cards: [])
    (tmp_path / "config.json").write_text('{"settings": {"mixed_precision": "bf16"}}')
    args = doctor.parse_args(["--command", "--run", str(tmp_path)])
    with pytest.raises(Refused, match="began in bf16, which Tesla T4 has no hardware for"):
        doctor.main(args)
    (tmp_path / "README.md").touch()  # it is finished, and training says so
    assert doctor.main(args) == 0 and "--mixed_precision bf16" in capsys.readouterr().out


def test_a_run_goes_on_in_its_precision_on_a_card_of_another_kind(tmp_path: Path) -> None:
    args = ["--command", "--run", str(tmp_path)]
    assert doctor.begun_precision(doctor.parse_args(args).run) is None
    (tmp_path / "config.json").write_text('{"settings": {"mixed_precision": "fp16"}}')
    begun = doctor.begun_precision(tmp_path)
    for cards in ([], [L4], [A100] * 2):
        _, there = understood(training_command(cards, begun))
        assert there.mixed_precision == "fp16"
    (tmp_path / "config.json").write_text('{"settings": []}')
    with pytest.raises(Refused, match="damaged"):
        doctor.begun_precision(tmp_path)


@pytest.mark.parametrize("path", sorted((ROOT / "launch").glob("*.yaml")), ids=lambda path: path.stem)
def test_a_preset_is_hardware_and_a_command_that_is_understood(path: Path) -> None:
    lines = path.read_text().splitlines()
    (command,) = [line.removeprefix("# ") for line in lines if line.startswith("# accelerate launch")]
    launch, args = understood(command)
    assert ROOT / launch.config_file == path
    assert 4 <= sum(not line.startswith("#") for line in lines) <= 8
    cards = {"cpu": [], "t4": [T4], "l4": [L4], "a100": [A100], "multi_gpu": [A100] * 4}.get(path.stem)
    if cards is not None:
        named, flags = understood(f"{training_command(cards)} --fold 0")
        assert (named.config_file, named.num_processes, flags) == (launch.config_file, launch.num_processes, args)
    if path.stem != "cpu":  # without a GPU the base comes with a batch of its own
        processes = launch.num_processes or load_config_from_file(str(path)).num_processes
        assert args.train_batch_size * args.gradient_accumulation_steps * processes == FILMS_A_STEP


def test_packages_that_are_missing_or_too_old_are_named_with_what_mends_them(monkeypatch: pytest.MonkeyPatch) -> None:
    installed = {"torch": "2.6.0", "xformers": "0.0.1"}

    def version(name: str) -> str:
        if name not in installed:
            raise doctor.importlib.metadata.PackageNotFoundError(name)
        return installed[name]

    monkeypatch.setattr(doctor.importlib.metadata, "version", version)
    lines = ["# a comment", "peft>=0.20", "torch>=999  # new", "xformers>=999", 'numpy>=9; sys_platform == "none"']
    findings = {finding.what: finding for finding in doctor.check_packages(lines)}
    assert findings["peft"].fatal and findings["peft"].mend == 'pip install "peft>=0.20"'
    assert findings["torch"].fatal and "2.6.0, wanted >=999" in findings["torch"].found
    assert findings["xformers"].mend and not findings["xformers"].fatal  # an accelerator is never needed
    assert "numpy" not in findings


@pytest.fixture
def unseen(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """A card that the driver lists and torch, of CUDA 12.8, does not."""
    monkeypatch.setattr(doctor, "driver_sees", lambda: "NVIDIA L4")
    monkeypatch.setattr(doctor, "find_cards", lambda: [])
    monkeypatch.setattr(torch.version, "cuda", "12.8")
    for name in ("CUDA_VISIBLE_DEVICES", "ACCELERATE_USE_CPU"):
        monkeypatch.delenv(name, raising=False)
    return monkeypatch


@pytest.mark.parametrize(
    ("cuda", "visible", "mend"),
    [
        (None, None, "a CUDA build of torch"),
        ("12.8", None, "a driver for CUDA 12.8"),
        ("12.8", "0", "a driver for CUDA 12.8"),  # as Slurm names a job's card
        ("12.8", "GPU-8932f937", "a driver for CUDA 12.8"),
    ],
)
def test_a_card_that_torch_does_not_see_is_a_fault(cuda, visible, mend, unseen: pytest.MonkeyPatch) -> None:
    unseen.setattr(torch.version, "cuda", cuda)
    if visible:
        unseen.setenv("CUDA_VISIBLE_DEVICES", visible)
    (finding,) = doctor.check_cards([])
    assert finding.fatal and "NVIDIA L4" in finding.found and finding.mend.startswith(mend)
    with pytest.raises(Refused, match=f"NVIDIA L4, which torch cannot use .*{mend}.*ACCELERATE_USE_CPU=true"):
        doctor.main(doctor.parse_args(["--command"]))  # else five folds train the bundled base on a core each


@pytest.mark.parametrize(
    ("name", "value"),
    [("CUDA_VISIBLE_DEVICES", ""), ("CUDA_VISIBLE_DEVICES", "-1"), ("ACCELERATE_USE_CPU", "true")],
)
def test_a_card_that_the_environment_leaves_out_is_not(name, value, unseen: pytest.MonkeyPatch, capsys) -> None:
    unseen.setenv(name, value)
    (finding,) = doctor.check_cards([])
    assert not finding.fatal and f"{name}={value}" in finding.found and finding.mend.startswith(f"unset {name}")
    assert doctor.main(doctor.parse_args(["--command"])) == 0
    assert capsys.readouterr().out == training_command([]) + "\n"


def test_a_card_that_something_else_fills_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda number: (2**30, 22 * 2**30))
    monkeypatch.setattr(torch.version, "cuda", "12.8")
    monkeypatch.setattr(doctor, "kernel_problem", lambda number: None)
    (finding,) = doctor.check_cards([L4])
    assert "22.2 GiB, 1.0 free, CUDA 12.8" in finding.found and not finding.fatal and "end what else" in finding.mend


def test_a_card_that_this_torch_has_no_kernels_for_is_a_fault(monkeypatch: pytest.MonkeyPatch) -> None:
    """It is listed with its memory like any other, and fails at the first product."""

    def ones(*size: int, device: str) -> torch.Tensor:
        raise torch.AcceleratorError(f"CUDA error: no kernel image is available on {device}\nCompile with ...")

    monkeypatch.setattr(torch, "ones", ones)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda number: (22 * 2**30, 22 * 2**30))
    (finding,) = doctor.check_cards([L4])
    assert finding.fatal and "no kernel image is available on cuda:0)" in finding.found
    monkeypatch.setattr(doctor, "find_cards", lambda: [L4])
    with pytest.raises(Refused, match="NVIDIA L4 computes nothing.*CUDA 12.6"):
        doctor.main(doctor.parse_args(["--command"]))


def test_without_the_hub_a_base_that_is_here_still_trains(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", "http://127.0.0.1:9")  # where nobody listens
    assert doctor.check_hub(BUNDLED_BASE).mend is None
    finding = doctor.check_hub(STABLE_DIFFUSION)
    assert finding.fatal and "not reached" in finding.found and BUNDLED_BASE in finding.mend
    assert doctor.check_hub(str(tmp_path)).mend is None and not doctor.is_here(str(tmp_path / "nowhere"))
    monkeypatch.setattr(huggingface_hub, "try_to_load_from_cache", lambda *args: str(tmp_path / "config.json"))
    assert not doctor.is_here(STABLE_DIFFUSION), "cut off before its weights"
    (tmp_path / "diffusion_pytorch_model.fp16.safetensors").touch()
    assert doctor.check_hub(STABLE_DIFFUSION).mend is None and doctor.is_here(STABLE_DIFFUSION)


def test_packages_that_do_not_fit_together_are_a_fault(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "utils.pipeline", None)  # its import raises
    last = list(doctor.examine())[-1]
    assert last.what == "import" and last.fatal and "requirements.txt -c constraints.txt" in last.mend
    monkeypatch.setenv("COLAB_RELEASE_TAG", "release-colab_20260801")
    assert list(doctor.examine())[-1].mend.endswith("-c cache/torch.txt"), "Colab's torch stays"


def test_a_torchao_that_peft_refuses_is_a_fault(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As Colab has it: everything imports, and the first layer that gets an adapter raises."""
    fake_package(tmp_path, "torchao", "0.10.0")
    monkeypatch.syspath_prepend(tmp_path)
    peft.import_utils.is_torchao_available.cache_clear()
    last = list(doctor.examine())[-1]
    assert (last.what, last.fatal) == ("import", True)
    assert "incompatible version of torchao" in last.found and last.mend.startswith("pip uninstall -y torchao ")


def test_a_peft_too_old_for_transformers_is_a_fault(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pipeline, "MIN_PEFT_VERSION", "999.0")
    last = list(doctor.examine())[-1]
    assert last.fatal and "needs peft 999.0" in last.found and "-r requirements.txt" in last.mend


def test_a_full_disk_is_a_fault(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor.shutil, "disk_usage", lambda path: SimpleNamespace(free=3e9))
    assert doctor.check_disk(tmp_path, 6e9).fatal
    assert doctor.check_disk(tmp_path, 0).mend is None
    monkeypatch.setattr(doctor, "ROOT", tmp_path)
    (tmp_path / "out").mkdir()
    assert len(list(doctor.check_disks(0))) == 1
    (tmp_path / "out").rmdir()
    (tmp_path / "out").symlink_to("/dev")  # another file system, as Drive is
    here, there = doctor.check_disks(0)
    assert str(tmp_path) in here.found and "GB free in /dev" in there.found


def test_packages_that_are_compiled_at_every_start_are_told_of(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch, "__file__", str(tmp_path / "__init__.py"))
    for told, said in ((False, 0), (True, 1)):
        monkeypatch.setattr(sys, "dont_write_bytecode", told)
        assert len(list(doctor.check_bytecode())) == said
    compiled = Path(importlib.util.cache_from_source(torch.__file__))
    compiled.parent.mkdir()
    compiled.touch()
    assert not list(doctor.check_bytecode()), "as pip does it"


def test_the_screen_ends_in_the_command_or_in_what_is_broken(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.setattr(hardware, "compile_problem", lambda device: None)  # which compiles
    monkeypatch.setattr(doctor, "check_hub", lambda base: doctor.Finding("hub", "reached"))
    monkeypatch.setattr(doctor, "find_cards", lambda: [])
    monkeypatch.setattr(doctor, "driver_sees", lambda: None)
    assert doctor.main(doctor.parse_args([])) == 0
    screen = capsys.readouterr().out
    assert screen.splitlines()[-1] == f"train with: {training_command([])} --fold 0"
    assert len(screen.splitlines()) < 24
    assert doctor.main(doctor.parse_args(["--command"])) == 0
    assert capsys.readouterr().out == training_command([]) + "\n"
    monkeypatch.setattr(doctor, "check_hub", lambda base: doctor.Finding("hub", f"asked for {base}"))
    monkeypatch.setattr("utils.pipeline.default_base", lambda: STABLE_DIFFUSION)  # as on a GPU
    for named in (BUNDLED_BASE, str(ROOT / BUNDLED_BASE)):
        flags = ["--", "--rank", "2", "--pretrained_model_name_or_path", named]
        assert doctor.main(doctor.parse_args(flags)) == 0
        assert f"asked for {BUNDLED_BASE}\n" in capsys.readouterr().out
    monkeypatch.undo()
    monkeypatch.setitem(sys.modules, "torch", None)
    with pytest.raises(Refused, match="pip install -r requirements.txt"):
        doctor.main(doctor.parse_args(["--command"]))
    monkeypatch.setattr(doctor, "check_packages", lambda lines: [doctor.Finding("torch", "missing", "get it", True)])
    assert doctor.main(doctor.parse_args([])) == 1
    assert "broken: torch" in capsys.readouterr().out
