"""The training loop on a tiny model: what moves, what is kept, and that a broken run ends as an unbroken one."""

import json
import re
import shutil
from collections import deque
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from diffusers import DDPMScheduler
from diffusers.models.attention import BasicTransformerBlock
from PIL import Image
from safetensors.torch import load_file, save_file

import train_lora
from tests import training
from tests.conftest import ROOT, build_base
from tests.training import read, train, watch_run
from utils.checkpoint import BEST_NAME, TENSORS_NAME, checkpoint_steps, load_checkpoint
from utils.export import save_kohya
from utils.files import write_jsonl
from utils.folds import split_fold
from utils.hardware import choose_adamw
from utils.lora import adapter_state, read_adapter
from utils.metadata import read_metadata
from utils.pipeline import STABLE_DIFFUSION, load_base
from utils.refusal import Refused
from utils.release import DECODER_NAME, KOHYA_NAME, WEIGHTS_NAME
from utils.runlog import read_config, read_split


def test_only_adapters_change(watched) -> None:
    for part in ("unet", "text_encoder", "vae"):
        for name, tensor in getattr(watched.base, part).state_dict().items():
            if "lora_" not in name:
                before = watched.before[f"{part}.{name.replace('base_layer.', '')}"]
                assert torch.equal(before.to(tensor.dtype), tensor), name


def test_records_are_complete_and_say_nothing_personal(watched) -> None:
    run = watched.run
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


def test_a_run_that_is_over_wants_neither_base_nor_films(
    tiny_base: Path, tiny_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    """In a new Colab runtime the base would be downloaded, and latents whose cache is lost encoded, for nothing."""
    run = tmp_path / "run"
    train(tiny_base, tiny_data, run, "--max_train_steps", "2")
    kept = {path: path.read_bytes() for path in (run / WEIGHTS_NAME, run / "config.json", run / "validation.jsonl")}
    for name in (WEIGHTS_NAME, "log.jsonl"):  # as a sync may lose them
        (run / name).unlink()
    for name in ("load_base", "cache_posteriors"):
        monkeypatch.setattr(train_lora, name, None)
    capsys.readouterr()
    train(tiny_base, tiny_data, run, "--max_train_steps", "2", "--export", "kohya")
    assert "budget used up: best step 2" in capsys.readouterr().out
    assert {path: path.read_bytes() for path in kept} == kept
    assert (run / "kohya_lora_weights.safetensors").is_file()
    moved = shutil.copytree(tiny_data, tmp_path / "moved")
    train(tiny_base, moved, run, "--max_train_steps", "2")
    assert read_config(run)["train_data_dir"] == str(moved), "where evaluate.py looks for the films"


def test_a_run_that_is_begun_anew_forgets_its_base(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"base": "assets/other"}')
    named = [
        train_lora.parse_args(["--output_dir", str(tmp_path), *more]).pretrained_model_name_or_path
        for more in ([], ["--resume_from_checkpoint", "none"])
    ]
    assert named == ["assets/other", train_lora.parse_args([]).pretrained_model_name_or_path]


def test_dropout_whose_masks_are_a_micro_steps_keeps_the_portions_of_a_step(
    tiny_base: Path, tiny_data: Path, tmp_path: Path
) -> None:
    train(tiny_base, tiny_data, tmp_path / "run", "--max_train_steps", "1", "--lora_dropout", "0.1")
    with pytest.raises(Refused, match=r"other settings \(train_batch_size: 4 -> 2\)"):
        train(tiny_base, tiny_data, tmp_path / "run", "--max_train_steps", "1", "--lora_dropout", "0.1",
              "--train_batch_size", "2", "--gradient_accumulation_steps", "2")  # fmt: skip


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


def test_a_validation_that_a_kill_cut_short_is_made_again(
    tiny_base: Path, tiny_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    more = ["--max_train_steps", "4", "--validation_steps", "2"]
    train(tiny_base, tiny_data, tmp_path / "unbroken", *more)

    def killed(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(train_lora, "amend_checkpoint", killed)
        train(tiny_base, tiny_data, tmp_path / "broken", *more)
    assert (tmp_path / "broken" / WEIGHTS_NAME).exists()
    assert len(read(tmp_path / "broken" / "validation.jsonl")) == 2  # the second is made again, and once in the record
    train(tiny_base, tiny_data, tmp_path / "broken", *more)
    for name in (WEIGHTS_NAME, "log.jsonl", "validation.jsonl"):
        assert (tmp_path / "broken" / name).read_bytes() == (tmp_path / "unbroken" / name).read_bytes(), name


@pytest.mark.parametrize(
    "extra",
    [[], ["--use_8bit_adam", "--rank", "256"],
     ["--use_ema", "--lora_dropout", "0.2", "--sentence_dropout", "0.5", "--input_perturbation", "0.1", "--noise_offset", "0.1",
      "--loraplus_lr_ratio", "4", "--train_text_encoder_frac", "0.7", "--lr_scheduler", "cosine_with_restarts"]],
)  # fmt: skip
def test_a_resumed_run_ends_in_the_same_bytes(
    tiny_base: Path, tiny_data: Path, tmp_path: Path, extra: list[str]
) -> None:
    """Also where rank 256 makes matrices large enough (4,096 numbers) for bitsandbytes to keep 8-bit moments."""
    more = ["--max_train_steps", "6", "--validation_steps", "3", "--checkpointing_steps", "2",
            "--checkpoints_total_limit", "0", *extra]  # fmt: skip
    train(tiny_base, tiny_data, tmp_path / "unbroken", *more)
    train(tiny_base, tiny_data, tmp_path / "broken", *more)
    broken = tmp_path / "broken"
    for step in (3, 4):  # as if killed while the second checkpoint was written
        (broken / f"checkpoint-{step}").rename(broken / f"checkpoint-{step}.tmp")
    (broken / "log.jsonl").write_text((broken / "log.jsonl").read_text()[:-20])
    for torn in (broken / "checkpoint-6" / TENSORS_NAME, broken / "validation.jsonl"):  # as a Drive may keep them
        torn.write_bytes(b"")
    train(tiny_base, tiny_data, broken, *more)
    for name in (WEIGHTS_NAME, "log.jsonl", "validation.jsonl", "README.md"):
        assert (broken / name).read_bytes() == (tmp_path / "unbroken" / name).read_bytes(), name
    assert checkpoint_steps(broken) == [2, 3, 4, 6]
    if "--use_8bit_adam" in extra:
        _, tensors = load_checkpoint(broken / "checkpoint-6")
        moments = [
            moment.dtype
            for state in tensors["optimizer"]["state"].values()
            for moment in state.get("__bnb_optimizer_quant_state__", state).values()  # so nested by newer versions
        ]
        runs = (
            choose_adamw(True, torch.device("cpu")) is not torch.optim.AdamW
        )  # an older one has kernels for CUDA alone
        assert set(moments) == ({torch.uint8, torch.float32} if runs else {torch.float32})


def test_the_best_adapter_goes_with_the_checkpoint_that_is_gone_on_from(
    tiny_base: Path, tiny_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Lost by a sync that broke off, or of a later step that is forgotten: as it was at the checkpoint."""
    run, more = (
        tmp_path / "run",
        ("--max_train_steps", "6", "--validation_steps", "2", "--checkpoints_total_limit", "0"),
    )
    update = train_lora.EarlyStopping.update  # whatever step is the best by this machine's arithmetic
    monkeypatch.setattr(
        train_lora.EarlyStopping, "update", lambda self, step, ssim: update(self, step, [v + step for v in ssim])
    )
    train(tiny_base, tiny_data, run, *more, "--export", "kohya")
    best = read(run / "validation.jsonl")[-1]["best_step"]
    whole = (run / WEIGHTS_NAME).read_bytes()
    (run / WEIGHTS_NAME).unlink()
    train(tiny_base, tiny_data, run, *more, "--export", "kohya")
    assert (run / WEIGHTS_NAME).read_bytes() == whole
    for later in (4, 6):
        shutil.rmtree(run / f"checkpoint-{later}")
    # Another card, on which no later validation is as good
    monkeypatch.setattr(train_lora.EarlyStopping, "update", lambda self, step, ssim: False)
    train(tiny_base, tiny_data, run, *more)
    rows = read(run / "validation.jsonl")
    assert [row["best_step"] for row in rows] == [0, 2, 2, 2]
    assert read_adapter(run / WEIGHTS_NAME)[1]["step"] == 2
    assert best > 2 and not (run / KOHYA_NAME).exists()
    for half_uploaded in (run / WEIGHTS_NAME, run / "checkpoint-6" / BEST_NAME):
        half_uploaded.write_bytes(half_uploaded.read_bytes()[:-9])
    with pytest.raises(Refused, match="is missing or not whole, and so is its copy in .*checkpoint-6"):
        train(tiny_base, tiny_data, run, *more)


def test_a_presets_cuda_graph_can_be_taken_back(tiny_data: Path) -> None:
    """The doctor's command for an A100 has it; what a person adds comes after."""
    preset = ["--train_data_dir", str(tiny_data), "--cuda_graph", "--gradient_checkpointing"]
    with pytest.raises(Refused, match="--no_cuda_graph takes back"):
        train_lora.check_args(train_lora.parse_args(preset))
    train_lora.check_args(train_lora.parse_args([*preset, "--no_cuda_graph"]))
    assert not train_lora.parse_args([]).cuda_graph


@pytest.mark.parametrize("steps_a_flush", [25, 10])
def test_gradients_that_all_overflow_fp16_end_the_run(steps_a_flush: int) -> None:
    """However often checkpoints have the losses read."""
    accelerator = SimpleNamespace(scaler=object(), reduce=lambda tensor, how: tensor, is_main_process=False)
    recent: deque[float] = deque(maxlen=train_lora.FLUSH_EVERY)

    def learn(first: int, norm: float) -> None:
        rows = [
            {"step": step, "loss": torch.tensor(1.0), "grad_norm": norm, "lr": 0.0, "position": 0}
            for step in range(first, first + steps_a_flush)
        ]
        train_lora.flush(rows, accelerator, Path("/nowhere"), [], None, 4, recent)

    learn(1, 1.0)
    with pytest.raises(Refused, match="every gradient of the last 25 steps overflowed fp16"):
        for first in range(1 + steps_a_flush, 100, steps_a_flush):
            learn(first, float("inf"))
    assert recent.count(float("inf")) == 25


@pytest.mark.parametrize("more", [("--train_text_encoder_frac", "0.5"), ("--gradient_checkpointing",)])
def test_compiled_blocks_learn_what_plain_ones_do(
    tiny_base: Path, tiny_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, more: tuple[str, ...]
) -> None:
    """Traced whole, with the compiler's slow last stage left out; a second time where the text encoder stops."""
    more = ("--max_train_steps", "4", "--validation_steps", "2", *more)
    compiled, compile_module = [], torch.nn.Module.compile

    def trace(module: torch.nn.Module, fullgraph: bool, dynamic: bool, options: dict | None = None) -> None:
        compiled.append(type(module))
        compile_module(module, backend="aot_eager", fullgraph=fullgraph, dynamic=dynamic)

    monkeypatch.setattr(torch.nn.Module, "compile", trace)
    train(tiny_base, tiny_data, tmp_path / "plain", *more)
    assert not compiled
    train(tiny_base, tiny_data, tmp_path / "compiled", *more, "--compile")
    assert {kind.__name__ for kind in compiled} == {"ResnetBlock2D", "Transformer2DModel"}
    plain, traced = ([row["loss"] for row in read(tmp_path / run / "log.jsonl")] for run in ("plain", "compiled"))
    assert traced == pytest.approx(plain, rel=1e-5)


@pytest.mark.parametrize("card", ["a100", "l4"])
def test_what_launch_names_is_a_command(card: str) -> None:
    command = re.search(r"train_lora\.py (.*)", (ROOT / "launch" / f"{card}.yaml").read_text()).group(1)
    args = train_lora.parse_args(command.split())
    assert args.train_batch_size * args.gradient_accumulation_steps == 16  # the films of a step by default


def test_a_graph_is_left_out_on_a_cpu_and_said(tiny_base: Path, tiny_data: Path, tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match="--cuda_graph needs one process on a CUDA device"):
        train(tiny_base, tiny_data, tmp_path / "run", "--max_train_steps", "1", "--cuda_graph")
    assert len(read(tmp_path / "run" / "log.jsonl")) == 1


def test_cudnns_attention_is_left_out_of_training(tiny_base: Path, tiny_data: Path, tmp_path: Path) -> None:
    torch.backends.cuda.enable_cudnn_sdp(True)
    train(tiny_base, tiny_data, tmp_path / "run", "--max_train_steps", "1")
    assert not torch.backends.cuda.cudnn_sdp_enabled()


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


def test_checkpointed_gradients_are_the_gradients(
    tiny_base: Path, tiny_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of the text encoder too, which re-entrant checkpointing leaves without any."""
    more = ("--max_train_steps", "3")
    train(tiny_base, tiny_data, tmp_path / "plain", *more)
    with monkeypatch.context() as patch:
        calls, forward = [], BasicTransformerBlock.forward
        patch.setattr(
            BasicTransformerBlock, "forward", lambda *a, **k: calls.append(a[0].training) or forward(*a, **k)
        )
        train(tiny_base, tiny_data, tmp_path / "checkpointed", *more, "--gradient_checkpointing")
    assert sum(calls) == 2 * 3 * 4  # blocks of the tiny UNet in three steps, each computed twice
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


def test_a_finding_that_moves_patients_into_validation_ends_resume_and_evaluation(
    tiny_base: Path, own_data: Path, tmp_path: Path
) -> None:
    """The films are the same, but some that were trained on would validate."""
    run, more = tmp_path / "run", ("--max_train_steps", "1", "--shuffle_captions", "--max_train_samples", "9")
    train(tiny_base, own_data, run, *more)
    config, before = read_config(run), read_metadata(own_data)
    read_split(config, run, own_data)
    rows = [row | ({"findings": ["edema"]} if row["patient_id"] == "p16" else {}) for row in before]
    trained, validates = split_fold(before, 0, 0)[0], split_fold(rows, 0, 0)[1]
    assert {row["file_name"] for row in trained} & {row["file_name"] for row in validates}
    write_jsonl(own_data / "metadata.jsonl", rows)
    with pytest.raises(Refused, match="other patients set aside for validation"):
        train(tiny_base, own_data, run, *more)
    with pytest.raises(Refused, match="other patients set aside for validation"):
        read_split(config, run, own_data)
    del config["settings"]["validation_data_hash"]  # a run of an earlier version is evaluated as it was
    read_split(config, run, own_data)


def test_shuffled_captions_are_learnt_and_true_ones_validate(tiny_base: Path, tiny_data: Path, tmp_path: Path) -> None:
    for name, more in (("true", ()), ("shuffled", ("--shuffle_captions",))):
        train(tiny_base, tiny_data, tmp_path / name, "--max_train_steps", "1", *more)
    true, shuffled = ({"log": read(tmp_path / n / "log.jsonl"), "validation": read(tmp_path / n / "validation.jsonl")}
                      for n in ("true", "shuffled"))  # fmt: skip
    assert true["log"][0]["loss"] != shuffled["log"][0]["loss"]
    assert [row["ssim"] for row in true["validation"]][0] == [row["ssim"] for row in shuffled["validation"]][0]
    assert "A control, not for use" in (tmp_path / "shuffled" / "README.md").read_text()
    assert "A control" not in (tmp_path / "true" / "README.md").read_text()
    with pytest.raises(Refused, match="--shuffle_captions with --push_to_hub"):
        train(tiny_base, tiny_data, tmp_path / "shuffled", "--shuffle_captions", "--push_to_hub")


def test_no_backward_pass_goes_through_a_text_encoder_without_adapters(tiny_base: Path) -> None:
    """transformers makes what goes into checkpointed layers require gradients, whether or not any layer learns."""
    base = load_base(str(tiny_base))
    base.text_encoder.requires_grad_(False)
    args = train_lora.parse_args(["--gradient_checkpointing", "--text_encoder_rank", "0"])
    train_lora.choose_kernels(args, base.unet, base.text_encoder, torch.device("cpu"), 1)
    hidden_states = base.text_encoder.train()(torch.ones(1, 77, dtype=torch.int64))[0]
    assert not hidden_states.requires_grad


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
    (events,) = (tmp_path / "drawn" / "logs").rglob("events.*")
    # Other trackers beside it, and a run begun anew, leave no second one
    again = ("--report_to", "all", "--resume_from_checkpoint", "none", "--overwrite")
    train(tiny_base, tiny_data, tmp_path / "drawn", *more, *again)
    assert not events.exists() and len(list((tmp_path / "drawn" / "logs").rglob("events.*"))) == 1


def test_the_moving_average_is_what_is_validated_and_kept(tiny_base: Path, tiny_data: Path, tmp_path: Path) -> None:
    """Training itself goes on from the adapters, as if there were no average."""
    more = (
        "--max_train_steps",
        "4",
        "--validation_steps",
        "2",
        "--checkpointing_steps",
        "1",
        "--checkpoints_total_limit",
        "0",
    )
    train(tiny_base, tiny_data, tmp_path / "plain", *more, "--no-use_ema")
    train(tiny_base, tiny_data, tmp_path / "averaged", *more)
    shadow = None
    for step in (1, 2, 3, 4):
        _, plain = load_checkpoint(tmp_path / "plain" / f"checkpoint-{step}")
        _, averaged = load_checkpoint(tmp_path / "averaged" / f"checkpoint-{step}")
        assert all(torch.equal(plain["adapters"][name], tensor) for name, tensor in averaged["adapters"].items())
        decay = 0 if step == 1 else 1 - step ** (-2 / 3)
        new = list(averaged["adapters"].values())
        shadow = [decay * old + (1 - decay) * tensor for old, tensor in zip(shadow or new, new, strict=True)]
        torch.testing.assert_close(averaged["ema"]["shadow_params"], shadow)
    best = read(tmp_path / "averaged" / "validation.jsonl")[-1]["best_step"]
    _, averaged = load_checkpoint(tmp_path / "averaged" / f"checkpoint-{best}")
    kept = load_file(tmp_path / "averaged" / WEIGHTS_NAME)
    for name, tensor in zip(averaged["adapters"], averaged["ema"]["shadow_params"], strict=True):
        name = name.replace(".default", "").replace("text_encoder.encoder", "text_encoder.text_model.encoder")
        assert torch.equal(kept[name], tensor), name


def test_a_batch_that_does_not_fit_is_split_into_micro_steps(
    tiny_base: Path, tiny_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The films of a step stay the same, and so does what is learnt."""
    train(tiny_base, tiny_data, tmp_path / "whole", "--max_train_steps", "3")

    def check(attempt, films, most):
        for size in (most, 1):
            attempt(size)
        return films // 2

    monkeypatch.setattr(train_lora, "largest_batch_size", check)
    seen = watch_run(tiny_base, tiny_data, tmp_path / "split", "--max_train_steps", "3", "--auto_batch_size")
    whole, split = (read(tmp_path / name / "log.jsonl") for name in ("whole", "split"))
    assert [row["loss"] for row in split] == pytest.approx([row["loss"] for row in whole], rel=1e-4)
    training = [len(inputs[0]) for mode, inputs in seen.text_encoder if True in mode]
    assert training[-6:] == [2] * 6


def test_too_large_a_batch_and_a_full_disk_are_told_in_a_line(
    tiny_base: Path, tiny_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def out_of_memory(*_, **__):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB.")

    with monkeypatch.context() as patch, pytest.raises(Refused, match="--auto_batch_size"):
        patch.setattr(Accelerator, "backward", out_of_memory)
        train(tiny_base, tiny_data, tmp_path / "run", "--max_train_steps", "2")
    with monkeypatch.context() as patch, pytest.raises(Refused, match="--validation_batch_size"):
        patch.setattr(train_lora, "score_model", out_of_memory)
        train(tiny_base, tiny_data, tmp_path / "validated", "--max_train_steps", "2")
    usage = shutil.disk_usage(tmp_path)
    with (
        monkeypatch.context() as patch,
        pytest.raises(Refused, match="checkpoints needs 0.00 GB in .*, where 0.00 GB"),
    ):
        patch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=10))
        patch.setattr(train_lora, "encode_films", lambda *_: pytest.fail("films were encoded first"))
        train(tiny_base, tiny_data, tmp_path / "full", "--max_train_steps", "2")


@pytest.mark.parametrize("flag", ["--output_dir", "--cache_dir"])
def test_a_folder_that_cannot_be_written_to_is_refused_before_the_base_loads(
    tiny_base: Path, tiny_data: Path, tmp_path: Path, flag: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setattr(train_lora, "load_base", lambda *_: pytest.fail("the base was loaded first"))
    with pytest.raises(OSError, match="file/a"):
        train(tiny_base, tiny_data, tmp_path / "run", flag, str(tmp_path / "file" / "a"))


@pytest.mark.parametrize(
    ("base", "recipe"),
    [
        ("assets/cxr-tiny", {"max_train_steps": 1000, "learning_rate": 4e-3, "text_encoder_lr": 2e-3,
                             "lora_targets": "feed_forward", "snr_gamma": 0, "adapt_decoder_lr": 1e-3}),
        (STABLE_DIFFUSION, {"max_train_steps": 4000, "learning_rate": 1e-4, "text_encoder_lr": 1e-5,
                            "lora_targets": "attention", "snr_gamma": 5, "adapt_decoder_lr": 1e-4}),
    ],
)  # fmt: skip
def test_a_silent_command_line_takes_the_recipe_of_its_base(base: str, recipe: dict, tmp_path: Path) -> None:
    args = train_lora.parse_args(["--pretrained_model_name_or_path", base, "--output_dir", str(tmp_path)])
    wanted = recipe | {"train_batch_size": 16, "gradient_accumulation_steps": 1, "lr_scheduler": "cosine"}
    assert {name: getattr(args, name) for name in wanted} == wanted


def test_the_rate_warms_up_in_a_twentieth_of_the_steps_and_falls_by_a_cosine(
    tiny_base: Path, tiny_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    silent = [word for word in training.QUICK if word != "--lr_warmup_steps"]
    silent.remove("0")  # its value
    assert len(silent) == len(training.QUICK) - 2
    monkeypatch.setattr(training, "QUICK", silent)
    train(tiny_base, tiny_data, tmp_path / "run", "--max_train_steps", "40", "--train_batch_size", "1")
    wanted = [0, 0.5, *(0.5 + 0.5 * np.cos(np.pi * np.arange(38) / 38))]
    assert [row["lr"] for row in read(tmp_path / "run" / "log.jsonl")] == pytest.approx([1e-2 * of for of in wanted])


def test_a_piecewise_constant_rate_follows_its_rules(tiny_base: Path, tiny_data: Path, tmp_path: Path) -> None:
    train(tiny_base, tiny_data, tmp_path / "run", "--max_train_steps", "4", "--lr_scheduler", "piecewise_constant",
          "--lr_step_rules", "1:2,0.1:3,0.01")  # fmt: skip
    rates = [row["lr"] for row in read(tmp_path / "run" / "log.jsonl")]
    assert rates == pytest.approx([1e-2, 1e-2, 1e-3, 1e-4])


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
        (["--train_text_encoder_frac", "2"], "--train_text_encoder_frac 2"),
        (["--lora_dropout", "1"], "--lora_dropout 1"),
        (["--ema_decay", "1"], "--ema_decay 1"),
        (["--lr_scheduler", "piecewise_constant"], "--lr_step_rules None"),
        (["--lr_step_rules", "1:10,0.1"], "--lr_scheduler cosine"),
        (["--rescale_betas_zero_snr"], "v_prediction"),
        (["--lr_step_rules", "1:500"], "--lr_step_rules 1:500"),
        (["--compile", "--use_dora"], "--use_dora"),
        (["--cuda_graph", "--gradient_checkpointing"], "--gradient_checkpointing"),
        (["--cuda_graph", "--lora_dropout", "0.1"], "--lora_dropout"),
        (["--auto_batch_size", "--lora_dropout", "0.1"], "--auto_batch_size with --lora_dropout"),
        (["--export", "kohya", "--use_dora"], "--use_dora"),
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


def test_an_adapted_decoder_is_part_of_the_run(tiny_base: Path, tiny_data: Path, tmp_path: Path) -> None:
    """Validated with, recorded, put on again by a resume, and gone where the next run goes without."""
    more = (
        "--max_train_steps",
        "2",
        "--checkpointing_steps",
        "1",
        "--adapt_decoder_steps",
        "20",
        "--adapt_decoder_lr",
        "3e-3",
    )
    run = tmp_path / "run"
    train(tiny_base, tiny_data, run, *more)
    config = json.loads((run / "config.json").read_text())
    before, after = config["vae_decoder"]["before"], config["vae_decoder"]["after"]
    assert after["ssim"] > before["ssim"]
    validations = read(run / "validation.jsonl")
    assert validations[0]["bounds"]["ssim"]["ceiling"] == pytest.approx(after["ssim"], abs=1e-5)
    floor, ceiling = (validations[0]["bounds"]["ssim"][bound] for bound in ("mean_film", "ceiling"))
    assert validations[-1]["ssim_normalised"] == (validations[-1]["ssim"] - floor) / (ceiling - floor)
    assert "vae_decoder.safetensors" in (run / "README.md").read_text()

    kept = {
        name: (run / name).read_bytes() for name in (DECODER_NAME, WEIGHTS_NAME, "validation.jsonl", "config.json")
    }
    (run / "checkpoint-2").rename(run / "checkpoint-2.tmp")
    seen = watch_run(tiny_base, tiny_data, run, *more)
    assert [name for name, content in kept.items() if (run / name).read_bytes() != content] == []
    changed = {
        name.split(".")[0]
        for name, t in seen.base.vae.state_dict().items()
        if not torch.equal(t, seen.before[f"vae.{name}"])
    }
    assert changed <= {"decoder", "post_quant_conv"} and "decoder" in changed

    train(tiny_base, tiny_data, run, "--max_train_steps", "2", "--resume_from_checkpoint", "none", "--overwrite")
    assert not (run / DECODER_NAME).exists()


def test_an_adapter_that_its_file_does_not_give_back_is_an_error(
    tiny_base: Path, tiny_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    more = ("--max_train_steps", "2", "--lora_alpha", "8", "--export", "kohya")
    train(tiny_base, tiny_data, tmp_path / "sound", *more, in_full=True)
    assert load_file(tmp_path / "sound" / KOHYA_NAME)

    def without_alpha(state):
        return {name: t / 2 if "lora_B" in name else t for name, t in state.items()}

    wrong = {
        "adapter_state": lambda *models: without_alpha(adapter_state(*models)),
        "save_kohya": lambda path, state, header: save_kohya(path, without_alpha(state), header),
    }
    for name, function in wrong.items():
        with monkeypatch.context() as patch, pytest.raises(RuntimeError, match="does not give the trained model back"):
            patch.setattr(train_lora, name, function)
            train(tiny_base, tiny_data, tmp_path / name, *more, in_full=True)


def test_what_out_of_memory_advises_does_not_refuse_the_resume(
    tiny_base: Path, tiny_data: Path, tmp_path: Path
) -> None:
    train(tiny_base, tiny_data, tmp_path / "run", "--max_train_steps", "4", "--checkpointing_steps", "2")
    (tmp_path / "run" / "checkpoint-4").rename(tmp_path / "run" / "checkpoint-4.tmp")
    train(tiny_base, tiny_data, tmp_path / "run", "--max_train_steps", "4", "--checkpointing_steps", "2",
          "--gradient_checkpointing", "--auto_batch_size", "--validation_batch_size", "2")  # fmt: skip
    assert checkpoint_steps(tmp_path / "run") == [2, 4]


def test_films_that_are_enlarged_are_counted(
    tiny_base: Path, own_data: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    rows = read(own_data / "metadata.jsonl")
    sides = [{"width": 100, "height": 100}, {"width": 200, "height": 96}]
    rows = [row | (sides[number] if number < 2 else {}) for number, row in enumerate(rows)]
    write_jsonl(own_data / "metadata.jsonl", rows)
    train(tiny_base, own_data, tmp_path / "run", "--max_train_steps", "1", "--resolution", "96")
    assert "are enlarged" not in capsys.readouterr().out
    train(tiny_base, own_data, tmp_path / "larger", "--max_train_steps", "1", "--resolution", "112")
    assert f"2 of {len(rows)} films are smaller than 112 px and are enlarged" in capsys.readouterr().out


def test_a_base_whose_weights_have_changed_is_refused(tiny_data: Path, tmp_path: Path) -> None:
    base = build_base(tmp_path / "base")
    steps = ["--max_train_steps", "2", "--checkpointing_steps", "1"]
    train(base, tiny_data, tmp_path / "run", *steps)
    shutil.rmtree(tmp_path / "run" / "checkpoint-2")  # of a run that is over the base is not looked at
    weights = base / "unet" / "diffusion_pytorch_model.safetensors"
    save_file({name: 1.1 * tensor for name, tensor in load_file(weights).items()}, weights)
    with pytest.raises(Refused, match="other weights"):
        train(base, tiny_data, tmp_path / "run", *steps)


def test_a_validation_that_is_not_finite_is_refused_and_never_the_best(
    tiny_base: Path, tiny_data: Path, tmp_path: Path
) -> None:
    with pytest.raises(Refused, match=r"step \d: (validation films score no finite|loss)"):
        train(tiny_base, tiny_data, tmp_path / "run", "--max_train_steps", "3", "--learning_rate", "1e25",
              "--validation_steps", "1", "--lr_scheduler", "constant", "--max_grad_norm", "1e25")  # fmt: skip
    assert all(row["best_step"] == 0 for row in read(tmp_path / "run" / "validation.jsonl"))


def test_accumulation_is_what_the_command_line_says(
    tiny_base: Path, tiny_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """accelerate prefers its environment's, and the optimizer then steps when it likes."""
    train(tiny_base, tiny_data, tmp_path / "plain", "--max_train_steps", "2")
    monkeypatch.setenv("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "4")
    train(tiny_base, tiny_data, tmp_path / "told", "--max_train_steps", "2")
    assert read(tmp_path / "told" / "log.jsonl") == read(tmp_path / "plain" / "log.jsonl")
