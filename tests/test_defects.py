"""A test for every defect of the reference scripts, diffusers' train_text_to_image_lora.py and its advanced sibling.

Each fails when its defect is put back. Hermetic: a tiny base, made-up films.
"""

import json
import random
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from diffusers import DDPMScheduler
from diffusers.training_utils import compute_snr
from PIL import Image

import train_lora
from tests.conftest import HANG_S, build_base
from tests.processes import Processes
from tests.test_lora import trained
from tests.training import flags, read, train, wait_for_checkpoint, watch_run
from utils.checkpoint import load_checkpoint
from utils.diffusion import min_snr_weights
from utils.export import to_kohya
from utils.images import load_film
from utils.latents import TrainingStream, cache_posteriors
from utils.lora import adapter_state
from utils.metadata import read_metadata
from utils.pipeline import load_base
from utils.release import WEIGHTS_NAME


def adapters(run: Path, step: int, part: str = "") -> dict[str, torch.Tensor]:
    _, tensors = load_checkpoint(run / f"checkpoint-{step}")
    return {name: tensor for name, tensor in tensors["adapters"].items() if name.startswith(part)}


def test_b1_clipping_gets_the_gradients(tiny_base: Path, tiny_data: Path, tmp_path: Path) -> None:
    """A spent iterator of parameters clips nothing. With an epsilon of 1 Adam's step follows the gradient's size."""
    sizes = {}
    for norm in ("1e-9", "1"):
        run = tmp_path / norm
        train(tiny_base, tiny_data, run, "--max_train_steps", "2", "--max_grad_norm", norm, "--adam_epsilon", "1")
        sizes[norm] = sum(t.abs().sum().item() for n, t in adapters(run, 2).items() if "lora_B" in n)
        assert all(row["grad_norm"] > 0 for row in read(run / "log.jsonl"))  # 0 is the norm of nothing
    assert sizes["1e-9"] < 1e-3 * sizes["1"]


def test_b2_adapters_and_moments_are_fp32_under_bf16(watched) -> None:
    """In bf16 a step of Adam is smaller than the spacing of A's elements: most would never move."""
    _, tensors = load_checkpoint(watched.run / "checkpoint-6")
    for name, tensor in tensors["adapters"].items():
        assert tensor.dtype == torch.float32
        assert tensor.abs().sum() > 0, f"{name} never got a gradient"
    moments = [value for state in tensors["optimizer"]["state"].values() for value in state.values()]
    assert {moment.dtype for moment in moments if torch.is_tensor(moment)} == {torch.float32}
    assert {name.split(".")[0] for name in tensors["adapters"]} == {"unet", "text_encoder"}


def test_b3_precision_that_only_the_launcher_knows_is_the_runs(
    tiny_base: Path, tiny_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`accelerate launch --mixed_precision bf16` and no flag: the base is cast, the adapters are not."""
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    seen = watch_run(tiny_base, tiny_data, tmp_path / "run", "--max_train_steps", "1", precision=None)
    assert json.loads((seen.run / "config.json").read_text())["settings"]["mixed_precision"] == "bf16"
    dtypes = {is_adapter: set() for is_adapter in (True, False)}
    for name, parameter in seen.base.unet.named_parameters():
        dtypes["lora_" in name].add(parameter.dtype)
    assert dtypes == {True: {torch.float32}, False: {torch.bfloat16}}


def test_b4_noise_is_added_in_fp32_under_bf16(
    tiny_base: Path, tiny_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """diffusers rounds the schedule to the latents' type: in bf16 the first timesteps get no noise at all."""
    add_noise, errors = DDPMScheduler.add_noise, []

    def compare(scheduler, latents, noise, timesteps):
        noisy_latents = add_noise(scheduler, latents, noise, timesteps)
        alphas = scheduler.alphas_cumprod.double()[timesteps][:, None, None, None]
        exact = alphas.sqrt() * latents.double() + (1 - alphas).sqrt() * noise.double()
        errors.append((noisy_latents - exact).abs().max().item())
        return noisy_latents

    monkeypatch.setattr(DDPMScheduler, "add_noise", compare)
    train(tiny_base, tiny_data, tmp_path / "run", "--max_train_steps", "3", precision="bf16")
    assert max(errors) < 1e-5


def test_b5_latents_stay_with_their_captions(tiny_base: Path, tiny_data: Path, tmp_path: Path) -> None:
    """A cache addressed by step under a shuffling loader gives every film another film's caption."""
    rows = read_metadata(tiny_data)
    cached = cache_posteriors(tiny_data, rows, load_base(str(tiny_base)).vae.eval(), tmp_path, 64)
    chosen = [3, 11, 12, 30]
    stream = TrainingStream(cached, chosen, torch.arange(4)[:, None], seed=0)
    for position in range(12):
        item = stream[position]
        row = chosen[int(item["input_ids"])]
        assert np.array_equal(item["mean"], cached.mean[row])
        assert np.array_equal(item["std"], cached.std[row])


def test_b6_a_resume_restores_the_text_encoder_and_adds_no_second_adapter(
    tiny_base: Path, tiny_data: Path, tmp_path: Path
) -> None:
    more = ("--max_train_steps", "4", "--checkpointing_steps", "2")
    train(tiny_base, tiny_data, tmp_path / "unbroken", *more)
    train(tiny_base, tiny_data, tmp_path / "broken", *more)
    (tmp_path / "broken" / "checkpoint-4").rename(tmp_path / "broken" / "checkpoint-4.tmp")
    seen = watch_run(tiny_base, tiny_data, tmp_path / "broken", *more)
    whole = adapters(tmp_path / "unbroken", 4, "text_encoder")
    assert whole
    assert all(torch.equal(whole[n], t) for n, t in adapters(tmp_path / "broken", 4, "text_encoder").items())
    assert list(seen.base.text_encoder.peft_config) == ["default"]


def test_b7_the_kohya_file_is_well_formed_where_the_text_encoder_is_trained(tiny_base: Path) -> None:
    """diffusers' own trainer writes `..._to_k_lora.down.weight`, no alpha, and a text encoder that nobody finds."""
    base = trained(tiny_base, alpha=6.0)
    state = adapter_state(base.unet, base.text_encoder)
    kohya = to_kohya(state)
    layers = {name.split(".")[0] for name in kohya}
    assert set(kohya) == {
        f"{layer}.{part}" for layer in layers for part in ("lora_down.weight", "lora_up.weight", "alpha")
    }
    assert len(kohya) == 3 * len(state) / 2
    text = {layer for layer in layers if layer.startswith("lora_te_text_model_encoder_layers_")}
    unet = {layer for layer in layers if layer.startswith("lora_unet_")}
    assert text | unet == layers
    assert "lora_te_text_model_encoder_layers_1_self_attn_out_proj" in text
    assert "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn2_to_out_0" in unet
    assert {kohya[f"{layer}.alpha"].item() for layer in layers} == {4.0}  # the rank: alpha / rank is in B


def test_b8_a_text_encoder_that_stops_stays_stopped(tiny_base: Path, tiny_data: Path, tmp_path: Path) -> None:
    """A rate set to zero in the optimizer is set back by the schedule's next step."""
    run = tmp_path / "run"
    train(tiny_base, tiny_data, run, "--max_train_steps", "4", "--train_text_encoder_frac", "0.5",
          "--checkpointing_steps", "1", "--checkpoints_total_limit", "0")  # fmt: skip
    for part, moves in (("text_encoder", [True, False, False]), ("unet", [True, True, True])):
        steps = [adapters(run, step, part) for step in (1, 2, 3, 4)]
        for before, after, moved in zip(steps[:-1], steps[1:], moves, strict=True):
            assert any(not torch.equal(before[name], after[name]) for name in before) == moved


@pytest.mark.parametrize(("prediction_type", "shift"), [("epsilon", 0), ("v_prediction", 1)])
def test_b9_min_snr_weights_are_the_papers(prediction_type: str, shift: int) -> None:
    """The velocity's error is weighed by min(SNR, gamma) / (SNR + 1), not by min(SNR, gamma) / SNR + 1."""
    scheduler = DDPMScheduler()
    snr = compute_snr(scheduler, torch.arange(1000)).double()
    weights = min_snr_weights(scheduler.alphas_cumprod, 5.0, prediction_type)
    torch.testing.assert_close(weights, (snr.clamp(max=5.0) / (snr + shift)).float(), rtol=1e-5, atol=1e-7)


def test_b10_a_resumed_run_sees_the_films_that_come_next(tiny_base: Path, tiny_data: Path, tmp_path: Path) -> None:
    """In the order in which an unbroken run sees them, and past a checkpoint that a kill left half written."""
    more = ("--max_train_steps", "9", "--checkpointing_steps", "2", "--checkpoints_total_limit", "0",
            "--caption_dropout", "0")  # fmt: skip

    def captions(seen) -> list[torch.Tensor]:
        return [inputs[0] for mode, inputs in seen.text_encoder if True in mode]

    unbroken = watch_run(
        tiny_base, tiny_data, tmp_path / "run", *more
    )  # nine steps of four films: into the second epoch
    for step in (8, 9):
        (tmp_path / "run" / f"checkpoint-{step}").rename(tmp_path / "run" / f"checkpoint-{step}.tmp")
    resumed = watch_run(tiny_base, tiny_data, tmp_path / "run", *more)
    assert len(captions(resumed)) == 3
    assert all(map(torch.equal, captions(resumed), captions(unbroken)[6:]))


def test_b11_killed_at_any_instant_one_process_or_two_end_in_the_same_bytes(
    tiny_base: Path, tiny_data: Path, tmp_path: Path
) -> None:
    """States of the random generators that only the first process saves leave the others with wrong ones, or waiting.

    SIGKILL to real runs; and two processes give the losses of one.
    """
    logs, output = {}, tmp_path / "output.txt"
    for num_processes in (1, 2):
        more = ["--max_train_steps", "24", "--validation_steps", "12", "--checkpointing_steps", "5",
                "--train_batch_size", str(4 // num_processes)]  # fmt: skip
        unbroken, killed = (tmp_path / f"{name}{num_processes}" for name in ("unbroken", "killed"))
        args = flags(tiny_base, tiny_data, unbroken, *more)
        assert Processes("train_lora.py", args, output, num_processes).wait(HANG_S) == 0, output.read_text()
        args = flags(tiny_base, tiny_data, killed, *more)
        for _ in range(2):
            process = Processes("train_lora.py", args, output, num_processes)
            wait_for_checkpoint(process, killed)
            time.sleep(random.Random(num_processes).uniform(0, 0.3))  # in a step, a validation or a write
            process.kill()
        assert Processes("train_lora.py", args, output, num_processes).wait(HANG_S) == 0, output.read_text()
        for name in (WEIGHTS_NAME, "log.jsonl", "validation.jsonl"):
            assert (killed / name).read_bytes() == (unbroken / name).read_bytes(), name
        logs[num_processes] = [row["loss"] for row in read(unbroken / "log.jsonl")]
    assert logs[2] == pytest.approx(logs[1], abs=1e-5)


def test_b12_gradients_of_both_models_wait_for_the_last_micro_step(
    tiny_base: Path, tiny_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A model that `accumulate` is not told of exchanges its gradients between processes every micro-step."""
    accumulate, told = Accelerator.accumulate, []

    def remember(accelerator, *models):
        told.append({type(model).__name__ for model in models})
        return accumulate(accelerator, *models)

    monkeypatch.setattr(Accelerator, "accumulate", remember)
    more = ("--train_batch_size", "2", "--gradient_accumulation_steps", "2")
    train(tiny_base, tiny_data, tmp_path / "run", "--max_train_steps", "1", *more)
    assert told == [{"UNet2DConditionModel", "CLIPTextModel"}] * 2


def test_b13_dropout_is_off_in_validation_and_on_in_training(watched) -> None:
    """In all layers: a UNet left in training mode drops out of adapters while it samples."""
    modes = [mode for mode, _ in watched.unet]
    assert modes[0] == modes[-1] == {False}  # the baseline comes first, and the last step is validated
    assert sum(True in mode for mode in modes) == 6  # a step each; all other calls are of validations


def test_b14_a_run_without_samples_is_uploaded(
    tiny_base: Path, tiny_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    uploaded = []
    monkeypatch.setattr(train_lora, "push", lambda *args: uploaded.append(args) or "me/chest")
    monkeypatch.setattr(train_lora, "why_not_upload", lambda run_dir: None)
    train(tiny_base, tiny_data, tmp_path / "run", "--max_train_steps", "1", "--num_validation_images", "0",
          "--push_to_hub", "--hub_model_id", "chest")  # fmt: skip
    assert uploaded == [(tmp_path / "run", "chest", None)]


def test_b15_captions_are_dropped_at_the_rate_asked_for(watched) -> None:
    """Without, no unconditional model is trained, and guidance leads away from the base's."""
    captions = torch.cat([inputs[0] for mode, inputs in watched.text_encoder if True in mode])
    empty = captions[:, 1] == captions[:, 2]  # nothing but padding
    assert 5 <= empty.sum() <= 19  # of 24 at one half
    assert train_lora.parse_args([]).caption_dropout > 0


def test_b16_a_film_of_16_bits_is_scaled_not_saturated(tmp_path: Path) -> None:
    """Pillow's convert("RGB") makes 255 of all that is more."""
    ramp = np.linspace(0, 65535, 64 * 64).astype(np.uint16).reshape(64, 64)
    Image.fromarray(ramp).save(tmp_path / "film.png")
    film = load_film(tmp_path / "film.png", 64).numpy().ravel()
    assert (np.diff(film.astype(int)) >= 0).all()
    assert len(np.unique(film)) == 256
    assert np.unique(film, return_counts=True)[1].max() < 40


def test_b17_no_film_is_mirrored_unasked(tiny_base: Path, own_data: Path, tmp_path: Path) -> None:
    """The heart is on the left, and captions name sides."""
    train(tiny_base, own_data, tmp_path / "run", "--max_train_steps", "1")
    caches = [json.loads(path.read_text()) for path in (own_data.parent / "cache").rglob("index.json")]
    assert [cache["mirrored"] for cache in caches] == [False]


def test_b18_the_loss_is_finite_where_the_schedule_ends_in_noise_alone(tiny_data: Path, tmp_path: Path) -> None:
    """Min-SNR divides by an SNR of zero there."""
    base = build_base(tmp_path / "base", prediction_type="v_prediction")
    train(base, tiny_data, tmp_path / "run", "--max_train_steps", "2", "--rescale_betas_zero_snr", "--snr_gamma", "5")
    assert len(read(tmp_path / "run" / "log.jsonl")) == 2  # a loss that is not finite would have ended it
    alphas_cumprod = DDPMScheduler(rescale_betas_zero_snr=True).alphas_cumprod.clone()
    alphas_cumprod[-1] = 0
    for prediction_type in ("epsilon", "v_prediction"):
        assert min_snr_weights(alphas_cumprod, 5.0, prediction_type).isfinite().all()
