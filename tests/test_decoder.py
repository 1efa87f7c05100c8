"""The decoder's adaptation on a tiny autoencoder: what moves, who decides, and that a broken one ends as an unbroken one."""

import copy
import json
import shutil
from pathlib import Path
from threading import Barrier, Thread

import pytest
import torch
from diffusers import AutoencoderKL
from safetensors.torch import load_file, save_file

from utils.checkpoint import TENSORS_NAME, checkpoint_steps
from utils.decoder import (
    adapt_decoder,
    decoder_state,
    find_decoder,
    put_on_decoder,
    read_decoder,
    reconstruction_loss,
    score_round_trip,
)
from utils.images import to_pixel_values
from utils.latents import FilmDataset, cache_posteriors
from utils.metadata import read_metadata
from utils.pipeline import load_base
from utils.refusal import Refused
from utils.release import DECODER_NAME
from utils.validation import film_bank

QUICK = dict(max_train_steps=4, learning_rate=3e-3, batch_size=4, num_looks=2, checkpointing_steps=2)


@pytest.fixture(scope="module")
def setting(tiny_base: Path, tiny_data: Path, tmp_path_factory: pytest.TempPathFactory) -> dict:
    """Arguments of `adapt_decoder` but for the run's folder: films 0 to 27 train, 28 to 33 validate, the rest is held out."""
    vae, rows = load_base(str(tiny_base)).vae.to(memory_format=torch.channels_last), read_metadata(tiny_data)
    cached = cache_posteriors(tiny_data, rows, vae, tmp_path_factory.mktemp("cache"), 64)
    validating = range(28, 34)
    bank = film_bank(tiny_data, [rows[i] for i in validating], cached, validating, torch.zeros(6, 1),
                     vae.config.scaling_factor, 64)  # fmt: skip
    films = FilmDataset(tiny_data, rows[:28], 64)
    return dict(vae=vae, films=films, posteriors=cached, places=range(28), bank=bank, record={"fold": 0})


def adapt(setting: dict, run: Path, **changed) -> tuple[AutoencoderKL, dict]:
    """Adapt a copy of the tiny autoencoder and return it with the file's header."""
    vae = copy.deepcopy(setting["vae"])
    return vae, adapt_decoder(run, **setting | QUICK | {"vae": vae} | changed)


def kill_at(step: int):
    """Return an average over one process that breaks off in a step; before the first there are two for other things."""
    calls = iter(range(10_000))

    def mean(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.numel() > 2 and next(calls) == step - 1:
            raise KeyboardInterrupt
        return tensor

    return mean


@pytest.fixture(scope="module")
def adapted(setting: dict, tmp_path_factory: pytest.TempPathFactory) -> tuple[AutoencoderKL, dict, Path]:
    """An autoencoder after 24 steps, the header and the run's folder."""
    run = tmp_path_factory.mktemp("adapted")
    return *adapt(setting, run, max_train_steps=24, learning_rate=1e-2, checkpointing_steps=20), run


def test_the_round_trip_improves_and_nothing_before_the_latents_moves(setting: dict, adapted: tuple) -> None:
    vae, header, run = adapted
    before, after = (score_round_trip(setting["bank"], model, 4) for model in (setting["vae"], vae))
    assert after["ssim"].mean() > before["ssim"].mean() + 0.05
    assert header["validation"]["before"]["ssim"] == pytest.approx(before["ssim"].mean().item(), abs=1e-6)
    assert header["validation"]["after"]["ssim"] == pytest.approx(after["ssim"].mean().item(), abs=1e-6)
    own, adapted = setting["vae"].state_dict(), vae.state_dict()
    same = {name for name in own if torch.equal(own[name], adapted[name])}
    assert same >= {name for name in own if name.startswith(("encoder.", "quant_conv."))}
    assert not any(name.startswith("post_quant_conv.") or name == "decoder.conv_out.weight" for name in same)
    assert not any(parameter.requires_grad for parameter in vae.parameters())
    rows = [json.loads(line) for line in (run / "decoder" / "log.jsonl").open()]
    assert [row["step"] for row in rows] == list(range(1, 25))
    assert rows[0]["lr"] < max(row["lr"] for row in rows) == pytest.approx(1e-2)
    assert not checkpoint_steps(run / "decoder")


def test_all_channels_come_out_grey(setting: dict, adapted: tuple) -> None:
    def spread(model: AutoencoderKL) -> float:
        with torch.no_grad():
            pixel_values = model.decode(setting["bank"].latents / model.config.scaling_factor).sample
        return (pixel_values.amax(dim=1) - pixel_values.amin(dim=1)).mean().item()

    assert spread(adapted[0]) < spread(setting["vae"]) / 2


@pytest.mark.parametrize("step", [1, 4])
def test_an_interrupted_adaptation_ends_in_the_same_bytes(setting: dict, tmp_path: Path, step: int) -> None:
    adapt(setting, tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        adapt(setting, tmp_path / "broken", mean_over_processes=kill_at(step))
    assert not (tmp_path / "broken" / DECODER_NAME).exists()
    adapt(setting, tmp_path / "broken")
    for name in (DECODER_NAME, "decoder/log.jsonl", "decoder/validation.jsonl"):
        assert (tmp_path / "broken" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes(), name


def test_a_finished_one_is_put_on_again_and_one_of_other_settings_is_not(setting: dict, tmp_path: Path) -> None:
    vae, header = adapt(setting, tmp_path)
    when = (tmp_path / DECODER_NAME).stat().st_mtime_ns
    again, same = adapt(setting, tmp_path)
    assert same == header
    assert (tmp_path / DECODER_NAME).stat().st_mtime_ns == when
    assert all(torch.equal(one, other) for one, other in zip(vae.parameters(), again.parameters(), strict=True))
    _, other = adapt(setting, tmp_path, record={"fold": 1})
    assert other["fold"] == read_decoder(tmp_path / DECODER_NAME)[1]["fold"] == 1
    adapt(setting, tmp_path / "alone", record={"fold": 1})
    assert (tmp_path / DECODER_NAME).read_bytes() == (tmp_path / "alone" / DECODER_NAME).read_bytes()


def test_checkpoints_of_other_settings_are_not_gone_on_from(setting: dict, tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        adapt(setting, tmp_path / "broken", seed=1, mean_over_processes=kill_at(4))
    for run in ("broken", "whole"):
        adapt(setting, tmp_path / run)
    assert (tmp_path / "broken" / DECODER_NAME).read_bytes() == (tmp_path / "whole" / DECODER_NAME).read_bytes()


def test_a_torn_checkpoint_is_passed_over(setting: dict, tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        adapt(setting, tmp_path / "broken", mean_over_processes=kill_at(4))
    (torn,) = (tmp_path / "broken" / "decoder").glob("checkpoint-*/" + TENSORS_NAME)
    torn.write_bytes(b"")
    for run in ("broken", "whole"):
        adapt(setting, tmp_path / run)
    assert (tmp_path / "broken" / DECODER_NAME).read_bytes() == (tmp_path / "whole" / DECODER_NAME).read_bytes()


def test_two_processes_and_micro_batches_give_the_result_of_one(setting: dict, tmp_path: Path) -> None:
    """Two processes are two threads here, each with an autoencoder of its own."""
    gentle = dict(max_train_steps=3, learning_rate=1e-4, num_looks=1)  # Adam makes steps of its rate out of rounding
    alone, header = adapt(setting, tmp_path / "alone", **gentle)
    barrier, sent, vaes, headers = Barrier(2), {}, {}, {}

    def work(index: int) -> None:
        def mean(tensor: torch.Tensor) -> torch.Tensor:
            sent[index] = tensor.clone()
            barrier.wait()
            total = (sent[0] + sent[1]) / 2
            barrier.wait()
            return total

        vaes[index], headers[index] = adapt(
            setting,
            tmp_path / "both",
            process_index=index,
            num_processes=2,
            mean_over_processes=mean,
            micro_batch_size=1,
            **gentle,
        )

    threads = [Thread(target=work, args=(index,)) for index in (0, 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    state, read = read_decoder(tmp_path / "both" / DECODER_NAME)
    assert read == headers[0] == headers[1]
    assert read["step"] == header["step"] == 3
    for name, tensor in decoder_state(vaes[1]).items():
        assert torch.equal(tensor, state[name]), name
    for name, tensor in decoder_state(alone).items():
        torch.testing.assert_close(state[name], tensor, rtol=0, atol=1e-5, msg=name)


def test_held_out_films_change_nothing(setting: dict, tmp_path: Path) -> None:
    cached = copy.copy(setting["posteriors"])
    cached.mean, cached.std = cached.mean.copy(), cached.std.copy()
    cached.mean[34:] = cached.std[34:] = float("nan")
    data = Path(shutil.copytree(setting["films"].directory, tmp_path / "data"))
    for row in read_metadata(data)[34:]:
        (data / row["file_name"]).write_bytes(b"")
    adapt(setting, tmp_path / "one")
    adapt(setting, tmp_path / "other", posteriors=cached, films=FilmDataset(data, setting["films"].rows, 64))
    assert (tmp_path / "one" / DECODER_NAME).read_bytes() == (tmp_path / "other" / DECODER_NAME).read_bytes()


def test_the_base_is_kept_where_training_does_harm(setting: dict, adapted: tuple, tmp_path: Path) -> None:
    good = adapted[0]
    vae, header = adapt(setting | {"vae": good}, tmp_path, learning_rate=1.0, max_train_steps=3)
    assert header["step"] == 0
    assert header["validation"]["before"] == header["validation"]["after"]
    assert all(torch.equal(one, other) for one, other in zip(vae.parameters(), good.parameters(), strict=True))


def test_the_file_loads_into_a_stock_autoencoder(setting: dict, tiny_base: Path, tmp_path: Path) -> None:
    vae, _ = adapt(setting, tmp_path)
    stock = AutoencoderKL.from_pretrained(tiny_base, subfolder="vae")
    state = load_file(tmp_path / DECODER_NAME)
    loaded = stock.load_state_dict(state, strict=False)
    assert not loaded.unexpected_keys
    assert all(name.startswith(("encoder.", "quant_conv.")) for name in loaded.missing_keys)
    assert {tensor.dtype for tensor in state.values()} == {torch.float32}
    assert all(torch.equal(one, other) for one, other in zip(vae.parameters(), stock.parameters(), strict=True))


def test_the_loss_is_nought_for_the_film_itself_and_counts_each_channel(setting: dict) -> None:
    films = setting["bank"].films[:2]
    pixel_values = to_pixel_values(films).clone()
    assert reconstruction_loss(pixel_values, films, 1.0).abs().max() < 1e-5
    pixel_values[:, 2] += 0.3
    torch.testing.assert_close(reconstruction_loss(pixel_values, films, 0.0), torch.full((2,), 0.1))
    assert (reconstruction_loss(pixel_values, films, 1.0) > 0.1).all()


def test_a_loss_that_is_not_finite_stops_with_its_step(setting: dict, tmp_path: Path) -> None:
    def overflow(tensor: torch.Tensor) -> torch.Tensor:
        return tensor * float("inf") if tensor.numel() > 2 else tensor

    with pytest.raises(Refused, match="step 1 of the decoder"):
        adapt(setting, tmp_path, mean_over_processes=overflow)
    assert not (tmp_path / DECODER_NAME).exists()


def test_files_that_cannot_be_used_are_refused_in_a_line(setting: dict, tmp_path: Path) -> None:
    path, state = tmp_path / DECODER_NAME, decoder_state(setting["vae"])
    assert find_decoder(tmp_path) is None
    path.write_bytes(b"no weights")
    assert find_decoder(tmp_path) == find_decoder(tmp_path / "pytorch_lora_weights.safetensors") == path
    with pytest.raises(Refused, match="no readable safetensors"):
        read_decoder(path)
    save_file({"encoder.conv_in.weight": torch.zeros(1)}, path)
    with pytest.raises(Refused, match="holds no decoder"):
        read_decoder(path)
    vae, name = copy.deepcopy(setting["vae"]), "decoder.conv_in.bias"
    for wrong in (state | {name: torch.zeros(3)}, {key: tensor for key, tensor in state.items() if key != name}):
        with pytest.raises(Refused, match=f"does not fit this base model .*{name}"):
            put_on_decoder(vae, {key: tensor + 1 for key, tensor in wrong.items()})
    assert all(torch.equal(tensor, state[key]) for key, tensor in decoder_state(vae).items())
    with pytest.raises(Refused, match="4 films a step of the decoder for 5 processes"):
        adapt(setting, tmp_path, num_processes=5)
