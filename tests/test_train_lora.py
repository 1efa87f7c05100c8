"""The training loop on a tiny model: what moves, what is kept, and that a broken run ends as an unbroken one.

Each test here stands for a defect that reference scripts ship. Runs in this process where nothing is killed.
"""

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate.state import AcceleratorState, GradientState
from diffusers import DDPMScheduler
from PIL import Image
from safetensors.torch import load_file

import train_lora
from tests.conftest import ROOT, build_base
from utils.checkpoint import checkpoint_steps, load_checkpoint
from utils.files import write_jsonl
from utils.lora import WEIGHTS_NAME
from utils.refusal import Refused

QUICK = [
    *("--resolution", "64", "--train_batch_size", "4", "--rank", "4", "--text_encoder_rank", "4"),
    *("--learning_rate", "1e-2", "--text_encoder_lr", "1e-2", "--lr_warmup_steps", "0", "--mixed_precision", "no"),
    *("--num_validation_images", "0", "--report_to", "none", "--validation_steps", "1000"),
]


def flags(base: Path, data: Path, run: Path, *more: str) -> list[str]:
    paths = ["--pretrained_model_name_or_path", base, "--train_data_dir", data, "--output_dir", run]
    return [*map(str, paths), "--cache_dir", str(data.parent / "cache"), *QUICK, *more]


def train(*args) -> None:
    """Run the script's main as a fresh process would."""
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
    try:
        train_lora.main(train_lora.parse_args(flags(*args)))
    finally:
        AcceleratorState._reset_state(reset_partial_state=True)
        GradientState._reset_state()


def read(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def start(processes: int, args: list[str], log: Path) -> subprocess.Popen:
    """Start the script as a user does, on one process or on two."""
    command = [sys.executable, "train_lora.py"]
    if processes > 1:
        command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", str(processes),
                   "--master_port", "0", "--rdzv_backend", "c10d", "--rdzv_endpoint", "localhost:0",
                   "train_lora.py"]  # fmt: skip
    environment = os.environ | {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
    output = open(log, "a")
    return subprocess.Popen(
        [*command, *args], cwd=ROOT, env=environment, stdout=output, stderr=output, start_new_session=True
    )


@pytest.fixture(scope="module")
def captured(tiny_base: Path, tiny_data: Path, tmp_path_factory: pytest.TempPathFactory):
    """A bf16 run of six steps whose base, and whose every call of the UNet and the text encoder, is looked at."""
    run = tmp_path_factory.mktemp("captured") / "run"
    seen = {"unet": [], "text_encoder": []}
    load_base = train_lora.load_base

    def load_and_watch(*args):
        base = load_base(*args)
        seen["base"], seen["before"] = (
            base,
            {
                f"{part}.{name}": tensor.clone()
                for part in ("unet", "text_encoder", "vae")
                for name, tensor in getattr(base, part).state_dict().items()
            },
        )
        for part in ("unet", "text_encoder"):
            model = getattr(base, part)
            model.register_forward_pre_hook(
                lambda model, inputs, part=part: seen[part].append((model.training, inputs))
            )
        return base

    patch = pytest.MonkeyPatch()
    patch.setattr(train_lora, "load_base", load_and_watch)
    try:
        more = ["--mixed_precision", "bf16", "--max_train_steps", "6", "--caption_dropout", "0.5"]
        train(tiny_base, tiny_data, run, *more, "--validation_steps", "3")
    finally:
        patch.undo()
    return run, seen


def test_only_adapters_change(captured) -> None:
    _, seen = captured
    for part in ("unet", "text_encoder", "vae"):
        for name, tensor in getattr(seen["base"], part).state_dict().items():
            if "lora_" not in name:
                before = seen["before"][f"{part}.{name.replace('base_layer.', '')}"]
                assert torch.equal(before.to(tensor.dtype), tensor), name


def test_every_adapter_trains_in_fp32_under_bf16(captured) -> None:
    """In bf16 a step of Adam is smaller than the spacing of A's elements: most would never move."""
    run, seen = captured
    step = checkpoint_steps(run)[-1]
    _, tensors = load_checkpoint(run / f"checkpoint-{step}")
    for name, tensor in tensors["adapters"].items():
        assert tensor.dtype == torch.float32
        assert tensor.abs().sum() > 0, f"{name} never got a gradient"
    moments = [value for state in tensors["optimizer"]["state"].values() for value in state.values()]
    assert {moment.dtype for moment in moments if torch.is_tensor(moment)} == {torch.float32}
    parts = {name.split(".")[0] for name in tensors["adapters"]}
    assert parts == {"unet", "text_encoder"}


def test_noise_arithmetic_is_fp32_under_bf16(captured) -> None:
    """diffusers' add_noise rounds the schedule to its input's type: in bf16 the first timesteps get no noise."""
    _, seen = captured
    training_calls = [inputs for training, inputs in seen["unet"] if training]
    assert len(training_calls) == 6
    assert {inputs[0].dtype for inputs in training_calls} == {torch.float32}


def test_validation_runs_in_eval_mode_and_training_in_train_mode(captured) -> None:
    _, seen = captured
    modes = [training for training, _ in seen["unet"]]
    assert modes[0] is False  # the baseline comes first
    assert modes[-1] is False  # and the last step is validated
    assert sum(modes) == 6


def test_captions_are_dropped_at_the_rate_asked_for(captured) -> None:
    _, seen = captured
    captions = torch.cat([inputs[0] for training, inputs in seen["text_encoder"] if training])
    empty = captions[:, 1] == captions[:, 2]  # nothing but padding
    assert 5 <= empty.sum() <= 19  # of 24 at one half


def test_records_are_complete_and_say_nothing_personal(captured) -> None:
    run, _ = captured
    rows = read(run / "log.jsonl")
    assert [row["step"] for row in rows] == list(range(1, 7))
    assert all(set(row) == {"step", "loss", "lr", "grad_norm", "num_processes"} for row in rows)
    assert all(row["grad_norm"] > 0 for row in rows)  # 0 is what clipping of nothing returns
    validations = read(run / "validation.jsonl")
    assert [row["step"] for row in validations] == [0, 3, 6]
    assert validations[0]["best_step"] == 0
    bounds = validations[0]["bounds"]["ssim"]
    assert set(bounds) == {"ceiling", "mean_film", "noisy"}
    card = (run / "README.md").read_text()
    assert "Not for diagnosis" in card
    assert str(run) not in card
    assert (run / "curves.png").stat().st_size > 10_000


def test_gradients_are_clipped(tiny_base: Path, tiny_data: Path, tmp_path: Path) -> None:
    """With an epsilon of 1 Adam's step follows the gradient's size, so clipping to nothing must stop learning."""
    sizes = {}
    for norm in ("1e-9", "1"):
        run = tmp_path / norm
        train(tiny_base, tiny_data, run, "--max_train_steps", "2", "--max_grad_norm", norm, "--adam_epsilon", "1")
        _, tensors = load_checkpoint(run / "checkpoint-2")
        sizes[norm] = sum(t.abs().sum().item() for n, t in tensors["adapters"].items() if "lora_B" in n)
    assert sizes["1e-9"] < 1e-3 * sizes["1"]


def test_changed_settings_refuse_to_resume_by_name(tiny_base: Path, tiny_data: Path, tmp_path: Path) -> None:
    train(tiny_base, tiny_data, tmp_path / "run", "--max_train_steps", "2")
    before = (tmp_path / "run" / WEIGHTS_NAME).read_bytes()
    with pytest.raises(Refused, match=r"learning_rate: 0.01 -> 0.5; rank: 4 -> 8"):
        train(tiny_base, tiny_data, tmp_path / "run", "--max_train_steps", "2", "--learning_rate", "0.5", "--rank", "8",
              "--lora_alpha", "4")  # fmt: skip
    with pytest.raises(Refused, match="films_a_step: 4 -> 8"):
        train(tiny_base, tiny_data, tmp_path / "run", "--max_train_steps", "2", "--train_batch_size", "8")
    with pytest.raises(Refused, match="holds a finished run"):
        train(tiny_base, tiny_data, tmp_path / "run", "--max_train_steps", "2", "--resume_from_checkpoint", "none")
    assert (tmp_path / "run" / WEIGHTS_NAME).read_bytes() == before


def test_accumulation_of_micro_batches_is_the_large_batch(tiny_base: Path, tiny_data: Path, tmp_path: Path) -> None:
    train(tiny_base, tiny_data, tmp_path / "whole", "--max_train_steps", "4")
    train(tiny_base, tiny_data, tmp_path / "parts", "--max_train_steps", "4", "--train_batch_size", "1",
          "--gradient_accumulation_steps", "4")  # fmt: skip
    whole, parts = (read(tmp_path / name / "log.jsonl") for name in ("whole", "parts"))
    for name in ("loss", "grad_norm"):
        assert [row[name] for row in parts] == pytest.approx([row[name] for row in whole], rel=1e-4)
    assert [row["lr"] for row in parts] == [row["lr"] for row in whole]


def test_early_stopping_ends_the_run_and_the_best_is_kept(tiny_base: Path, tiny_data: Path, tmp_path: Path) -> None:
    """At a rate that ruins the model the first validation stays the best."""
    train(tiny_base, tiny_data, tmp_path / "run", "--max_train_steps", "40", "--validation_steps", "2",
          "--learning_rate", "1", "--text_encoder_lr", "1", "--early_stopping_patience", "2")  # fmt: skip
    validations = read(tmp_path / "run" / "validation.jsonl")
    assert validations[-1]["step"] < 40
    trained = validations[1:]
    assert validations[-1]["best_step"] == max(trained, key=lambda row: row["ssim"])["step"]
    assert read(tmp_path / "run" / "log.jsonl")[-1]["step"] == validations[-1]["step"]


def test_a_loss_that_is_not_finite_stops_with_its_step_and_films(
    tiny_base: Path, tiny_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    train(tiny_base, tiny_data, tmp_path / "run", "--max_train_steps", "4", "--checkpointing_steps", "2",
          "--validation_steps", "4")  # fmt: skip
    monkeypatch.setattr(train_lora, "min_snr_weights", lambda *_: torch.full((1000,), torch.nan))
    for name in ("checkpoint-4", WEIGHTS_NAME):
        path = tmp_path / "run" / name
        path.rename(path.with_name(f"away-{name}"))
    with pytest.raises(Refused, match=r"step 3: loss nan.*images/p\d\d_\d.png"):
        train(tiny_base, tiny_data, tmp_path / "run", "--max_train_steps", "4", "--checkpointing_steps", "2",
              "--validation_steps", "4")  # fmt: skip
    assert checkpoint_steps(tmp_path / "run") == [2]


def test_a_kill_between_the_first_adapter_and_the_first_checkpoint_costs_nothing(
    tiny_base: Path, tiny_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    more = ["--max_train_steps", "4", "--validation_steps", "2"]
    train(tiny_base, tiny_data, tmp_path / "unbroken", *more)

    def killed(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(train_lora, "save_checkpoint", killed)
        train(tiny_base, tiny_data, tmp_path / "broken", *more)
    assert (tmp_path / "broken" / WEIGHTS_NAME).exists()
    train(tiny_base, tiny_data, tmp_path / "broken", *more)
    for name in (WEIGHTS_NAME, "log.jsonl", "validation.jsonl"):
        assert (tmp_path / "broken" / name).read_bytes() == (tmp_path / "unbroken" / name).read_bytes(), name


@pytest.mark.parametrize("extra", [[], ["--use_8bit_adam", "--rank", "256"]])
def test_a_resumed_run_ends_in_the_same_bytes(
    tiny_base: Path, tiny_data: Path, tmp_path: Path, extra: list[str]
) -> None:
    """Also where rank 256 makes matrices large enough (4,096 numbers) for bitsandbytes to keep 8-bit moments."""
    more = ["--max_train_steps", "6", "--validation_steps", "3", "--checkpointing_steps", "2",
            "--checkpoints_total_limit", "0", *extra]  # fmt: skip
    train(tiny_base, tiny_data, tmp_path / "unbroken", *more)
    train(tiny_base, tiny_data, tmp_path / "broken", *more)
    broken = tmp_path / "broken"
    for step in (3, 4, 6):  # as if killed while the second checkpoint was written
        (broken / f"checkpoint-{step}").rename(broken / f"checkpoint-{step}.tmp")
    (broken / "log.jsonl").write_text((broken / "log.jsonl").read_text()[:-20])
    train(tiny_base, tiny_data, broken, *more)
    for name in (WEIGHTS_NAME, "log.jsonl", "validation.jsonl", "README.md", "curves.png"):
        assert (broken / name).read_bytes() == (tmp_path / "unbroken" / name).read_bytes(), name
    assert checkpoint_steps(broken) == [2, 3, 4, 6]
    if "--use_8bit_adam" in extra:
        _, tensors = load_checkpoint(broken / "checkpoint-6")
        moments = [
            moment.dtype
            for state in tensors["optimizer"]["state"].values()
            for moment in state["__bnb_optimizer_quant_state__"].values()
        ]
        assert {torch.uint8, torch.float32} == set(moments)


def test_killed_at_any_instant_the_same_command_ends_in_the_same_bytes(
    tiny_base: Path, tiny_data: Path, tmp_path: Path
) -> None:
    """SIGKILL to real runs on one process and on two; and two processes give the losses of one."""
    logs = {}
    for processes in (1, 2):
        more = ["--max_train_steps", "60", "--validation_steps", "20", "--checkpointing_steps", "7",
                "--train_batch_size", str(4 // processes)]  # fmt: skip
        runs = {name: tmp_path / f"{name}{processes}" for name in ("unbroken", "killed")}
        output = tmp_path / "output.txt"
        assert start(processes, flags(tiny_base, tiny_data, runs["unbroken"], *more), output).wait(300) == 0, (
            output.read_text()
        )
        for _ in range(2):
            steps = checkpoint_steps(runs["killed"]) if runs["killed"].exists() else []
            process = start(processes, flags(tiny_base, tiny_data, runs["killed"], *more), output)
            while process.poll() is None and checkpoint_steps(runs["killed"])[-1:] <= steps[-1:]:
                time.sleep(0.01)
            time.sleep(random.Random(processes).uniform(0, 0.3))  # in a step, a validation or a write
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        assert start(processes, flags(tiny_base, tiny_data, runs["killed"], *more), output).wait(300) == 0
        for name in (WEIGHTS_NAME, "log.jsonl", "validation.jsonl"):
            assert (runs["killed"] / name).read_bytes() == (runs["unbroken"] / name).read_bytes(), name
        logs[processes] = [row["loss"] for row in read(runs["unbroken"] / "log.jsonl")]
    assert logs[2] == pytest.approx(logs[1], abs=1e-5)


def test_a_velocity_model_is_trained_on_the_velocity(
    tmp_path: Path, tiny_data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first loss, from what the UNet was given and gave, by hand."""
    base, seen = build_base(tmp_path / "base", prediction_type="v_prediction"), {}
    add_noise, mse_loss = DDPMScheduler.add_noise, train_lora.F.mse_loss

    def keep_parts(scheduler, latents, noise, timesteps):
        alphas = scheduler.alphas_cumprod[timesteps][:, None, None, None]
        seen["velocity"] = alphas.sqrt() * noise - (1 - alphas).sqrt() * latents
        return add_noise(scheduler, latents, noise, timesteps)

    def keep_target(prediction, target, reduction):
        torch.testing.assert_close(target, seen["velocity"])
        seen["compared"] = True
        return mse_loss(prediction, target, reduction=reduction)

    monkeypatch.setattr(DDPMScheduler, "add_noise", keep_parts)
    monkeypatch.setattr(train_lora.F, "mse_loss", keep_target)
    train(base, tiny_data, tmp_path / "run", "--max_train_steps", "1")
    assert seen["compared"]


@pytest.mark.parametrize(("caption_dropout", "factor"), [("0", 1.5), ("1", 1.0)])
def test_a_box_over_the_whole_film_adds_its_share_of_the_loss(
    tiny_base: Path, own_data: Path, tmp_path: Path, caption_dropout: str, factor: float
) -> None:
    """Not where the caption that names its finding is dropped: guidance leads away from what is predicted there."""
    more = ("--max_train_steps", "1", "--caption_dropout", caption_dropout)
    train(tiny_base, own_data, tmp_path / "without", *more)
    rows = read(own_data / "metadata.jsonl")
    whole = [{"finding": "pleural effusion", "side": "left", "box": [0, 0, 1, 1]}]
    write_jsonl(own_data / "metadata.jsonl", [row | {"boxes": whole} for row in rows])
    train(tiny_base, own_data, tmp_path / "with", *more, "--box_loss_weight", "0.5")
    without, with_boxes = (read(tmp_path / name / "log.jsonl")[0] for name in ("without", "with"))
    assert with_boxes["loss"] == pytest.approx(factor * without["loss"], rel=1e-5)


def test_checkpointed_gradients_are_the_gradients(tiny_base: Path, tiny_data: Path, tmp_path: Path) -> None:
    """Of the text encoder too, which re-entrant checkpointing leaves without any."""
    more = ("--max_train_steps", "3")
    train(tiny_base, tiny_data, tmp_path / "plain", *more)
    train(tiny_base, tiny_data, tmp_path / "checkpointed", *more, "--gradient_checkpointing")
    plain, checkpointed = (read(tmp_path / name / "log.jsonl") for name in ("plain", "checkpointed"))
    for name in ("loss", "grad_norm"):
        assert [row[name] for row in checkpointed] == pytest.approx([row[name] for row in plain], rel=1e-5)
    _, tensors = load_checkpoint(tmp_path / "checkpointed" / "checkpoint-3")
    assert all(tensor.any() for name, tensor in tensors["adapters"].items() if "text_encoder" in name)


def test_held_out_films_change_nothing(tiny_base: Path, own_data: Path, tmp_path: Path) -> None:
    """The fold that evaluation will use leaves no trace in the adapter, whatever is on its films."""
    more = ("--fold", "3", "--max_train_steps", "3")
    train(tiny_base, own_data, tmp_path / "before", *more)
    for film in own_data.glob("images/p03_*.png"):
        Image.fromarray(255 - np.array(Image.open(film))).save(film)
    train(tiny_base, own_data, tmp_path / "after", *more)
    before, after = (load_file(tmp_path / name / WEIGHTS_NAME) for name in ("before", "after"))
    assert all(torch.equal(before[name], after[name]) for name in before)
    for film in own_data.glob("images/p04_*.png"):  # one that is trained or validated on does
        Image.fromarray(255 - np.array(Image.open(film))).save(film)
    train(tiny_base, own_data, tmp_path / "other", *more)
    other = load_file(tmp_path / "other" / WEIGHTS_NAME)
    assert not all(torch.equal(before[name], other[name]) for name in before)


def test_drawing_samples_changes_no_weight_and_tells_the_tracker(
    tiny_base: Path, tiny_data: Path, tmp_path: Path
) -> None:
    more = ("--max_train_steps", "4", "--validation_steps", "2")
    train(tiny_base, tiny_data, tmp_path / "blind", *more)
    train(
        tiny_base, tiny_data, tmp_path / "drawn", *more, "--num_validation_images", "2", "--report_to", "tensorboard"
    )
    blind, drawn = (load_file(tmp_path / name / WEIGHTS_NAME) for name in ("blind", "drawn"))
    assert all(torch.equal(blind[name], drawn[name]) for name in blind)
    names = [path.name for path in sorted((tmp_path / "drawn" / "samples").iterdir())]
    assert names == ["step-000000.png", "step-000002.png", "step-000004.png"]
    assert list((tmp_path / "drawn" / "logs").rglob("events.*"))


def test_every_other_way_to_say_it_runs(tiny_base: Path, tiny_data: Path, tmp_path: Path) -> None:
    """Epochs, mirrored films, noise offset, scaled rates, workers, fewer films; then the base comes from the record."""
    more = ["--num_train_epochs", "1", "--validation_epochs", "1", "--random_flip", "--center_crop", "--noise_offset",
            "0.1", "--scale_lr", "--dataloader_num_workers", "1", "--max_train_samples", "9",
            "--enable_xformers_memory_efficient_attention"]  # fmt: skip
    with pytest.warns(UserWarning, match="xformers"):
        train(tiny_base, tiny_data, tmp_path / "run", *more)
    rows = read(tmp_path / "run" / "log.jsonl")
    assert len(rows) == 3  # nine films by four
    assert rows[0]["lr"] == pytest.approx(4e-2)
    assert train_lora.parse_args(["--output_dir", str(tmp_path / "run")]).pretrained_model_name_or_path == str(
        tiny_base
    )


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        (["--fold", "7"], "fold"),
        (["--rank", "0"], "--rank 0"),
        (["--caption_dropout", "1.5"], "--caption_dropout"),
        (["--learning_rate", "nan"], "--learning_rate"),
        (["--resolution", "100"], "multiple of 16"),
        (["--mixed_precision", "fp16"], "CUDA"),
        (["--adam_beta1", "1.5"], "--adam_beta1"),
        (["--max_grad_norm", "0"], "--max_grad_norm 0"),
        (["--seed", "-1"], "--seed -1"),
        (["--train_data_dir", "/nowhere"], "no folder"),
        (["--pretrained_model_name_or_path", "/nowhere"], "assets/cxr-tiny"),
        (["--resume_from_checkpoint", "/nowhere"], "no checkpoint"),
        (["--box_loss_weight", "-1"], "--box_loss_weight -1"),
        (["--box_loss_weight", "0.5"], "no film of .* has a box"),
    ],
)
def test_bad_input_is_refused_in_words(
    tiny_base: Path, tiny_data: Path, tmp_path: Path, extra: list[str], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if torch.cuda.is_available() and "fp16" in extra:
        pytest.skip("fp16 runs here")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(Refused, match=message):
        train(tiny_base, tiny_data, tmp_path / "run", *extra)
