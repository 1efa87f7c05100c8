"""The recipe of the bundled base: sentences and marks say what is there, whitening changes nothing, Muon steps."""

import random

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL, StableDiffusionPipeline
from PIL import Image
from torch import nn

from assets import train_cxr_tiny
from assets.kermany import read_labels
from assets.marks import DRAW, RESOLUTION, draw_collimation, draw_grid_cutoff, draw_tilt, mark
from assets.sentences import AGES, FINDINGS, NORMAL, PRESENCES, SEXES, SIDES, VIEWS, ZONES, compose
from assets.train_cxr_tiny import (
    as_matrix,
    descend,
    make_optimizers,
    make_scheduler,
    make_tokenizer,
    mean_ssim,
    parse_args,
    replace_group_norms,
    train_text_encoder,
    whiten,
)
from utils.metrics import ssim
from utils.pipeline import BUNDLED_BASE, ROOT
from utils.refusal import Refused

needs_muon = pytest.mark.skipif(
    not hasattr(torch.optim, "Muon"), reason="Muon came with torch 2.9; only training the base needs it"
)


def films(count: int = 4) -> np.ndarray:
    return np.random.default_rng(0).integers(60, 120, (count, RESOLUTION, RESOLUTION), dtype=np.uint8)


def test_a_reading_says_what_its_sentence_says():
    rng = random.Random(0)
    for _ in range(500):
        text, reading = compose(rng)
        lower = text.lower()
        assert ("lateral" in lower.partition(".")[0]) == (VIEWS[reading.view] == "lateral")
        if SEXES[reading.sex] == "female":
            assert any(word in lower for word in ("woman", "female", "girl"))
        if AGES[reading.age] == "none":
            assert not any(character.isdigit() for character in text)
        said = [i for i in range(len(FINDINGS)) if PRESENCES[reading.presences[i]] == "present"]
        sides = {SIDES[reading.sides[i]] for i in said} - {"none"}
        zones = {ZONES[reading.zones[i]] for i in said} - {"none"}
        assert all(word in lower or (word == "bilateral" and "both" in lower) for word in sides | zones)
        if said:
            assert not any(normal in text for normal in NORMAL)


@pytest.mark.parametrize("kind", ["braid", "zip", "cable", "pin", "side marker"])
def test_what_lies_on_a_film_lies_where_its_sentence_says(kind):
    blank = Image.fromarray(np.full((RESOLUTION, RESOLUTION), 90, dtype=np.uint8))
    rng = random.Random(0)
    for _ in range(40):
        film, sentence = DRAW[kind](blank, rng)
        rows, columns = np.nonzero(np.asarray(film) != 90)
        # The patient's right is on the left of the film
        assert (columns.mean() < RESOLUTION / 2) == ("right" in sentence.lower()), sentence
        if "upper" in sentence.lower():
            assert rows.mean() < 0.45 * RESOLUTION
        if "lower" in sentence.lower():
            assert rows.mean() > 0.55 * RESOLUTION


def test_how_a_film_was_taken_is_said_of_the_right_side():
    middle = np.zeros((RESOLUTION, RESOLUTION), dtype=np.uint8)
    middle[:, RESOLUTION // 2] = 90  # a spine
    rng = random.Random(0)
    for _ in range(40):
        film, sentence = draw_grid_cutoff(Image.fromarray(middle), rng)
        half = np.asarray(film)[:, : RESOLUTION // 2].mean() > np.asarray(film)[:, RESOLUTION // 2 :].mean()
        assert half == ("right" in sentence.lower())
        film, sentence = draw_tilt(Image.fromarray(middle), rng)
        head = np.nonzero(np.asarray(film)[20])[0].mean()
        assert (head < RESOLUTION / 2) == ("right" in sentence.lower()), "the head goes to that side"
        film, sentence = draw_collimation(Image.fromarray(np.full_like(middle, 90)), rng)
        dark = np.asarray(film) == 0
        edges = {"right": dark[:, 0], "left": dark[:, -1], "upper": dark[0], "lower": dark[-1]}
        named = [edge for edge in edges if edge in sentence.lower()] or list(edges)
        assert [edge for edge, column in edges.items() if column.all()] == named


def test_the_first_variant_is_bare_and_seeds_decide():
    labels = ["normal", "viral pneumonia", "bacterial pneumonia", "normal"]
    marked, captions = mark(films(), labels, seed=0)
    again, captions_again = mark(films(), labels, seed=0)
    assert np.array_equal(marked[:4], films())
    assert (marked[4:].reshape(3, 4, -1) != films().reshape(1, 4, -1)).any(axis=2).all()
    assert np.array_equal(marked, again) and captions == captions_again
    assert all("viral" in captions[1 + 4 * variant].lower() for variant in range(4))


@pytest.mark.skipif(
    not hasattr(torch.optim, "Muon"), reason="Muon came with torch 2.9; only training the base needs it"
)
def test_a_matrix_is_a_view_and_muon_moves_the_kernel():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(4, 8, 3), nn.Flatten(), nn.Linear(8, 2)).to(memory_format=torch.channels_last)
    kernel = model[0].weight
    assert as_matrix(kernel.detach()).data_ptr() == kernel.data_ptr()
    before, bias_before = kernel.detach().clone(), model[2].bias.detach().clone()
    optimizers = make_optimizers([model], muon_lr=1e-2, adam_lr=1e-2)
    x = torch.randn(16, 4, 3, 3)
    losses = []
    for _ in range(30):
        loss = (model(x) - 1).square().mean()
        losses.append(loss.item())
        loss.backward()
        descend(optimizers, list(model.parameters()), 1.0)
    assert (kernel != before).any() and (model[2].bias != bias_before).any()
    assert losses[-1] < 0.2 * losses[0]
    assert (kernel.grad == 0).all()  # zeroed in place: the optimizer's view is of this memory


def test_as_matrix_refuses_what_cannot_be_a_view():
    with pytest.raises(RuntimeError):
        as_matrix(torch.zeros(4, 3, 3, 3))


@pytest.fixture(scope="module")
def vae() -> AutoencoderKL:
    torch.manual_seed(0)
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        block_out_channels=(8, 16),
        latent_channels=8,
        norm_num_groups=4,
        mid_block_add_attention=False,
    ).eval()


def test_group_norm_by_way_of_a_contiguous_tensor_is_group_norm(vae):
    pixels = torch.randn(2, 3, 32, 32).contiguous(memory_format=torch.channels_last)
    with torch.no_grad():
        expected = vae.encode(pixels).latent_dist.mean
        replace_group_norms(vae)
        torch.testing.assert_close(vae.encode(pixels).latent_dist.mean, expected)


def test_whitening_leaves_the_decoder_s_answer_and_gives_unit_latents(vae):
    pixels = torch.from_numpy(films())[:, None].expand(-1, 3, -1, -1) / 127.5 - 1
    with torch.no_grad():
        posterior = vae.encode(pixels).latent_dist
        before, noise_before = (
            vae.decode(posterior.mean).sample,
            posterior.std / posterior.mean.std((0, 2, 3))[:, None, None],
        )
        whiten(vae, films())
        posterior = vae.encode(pixels).latent_dist
        after = vae.decode(posterior.mean).sample
    torch.testing.assert_close(after, before, atol=1e-4, rtol=1e-3)
    torch.testing.assert_close(posterior.mean.std((0, 2, 3)), torch.ones(8), atol=0.05, rtol=0)
    assert posterior.mean.mean((0, 2, 3)).abs().max() < 0.05
    torch.testing.assert_close(posterior.std, noise_before, atol=1e-2, rtol=0.05)


def test_the_loss_s_ssim_is_the_metric_s():
    generator = torch.Generator().manual_seed(0)
    a, b = torch.randint(0, 256, (2, 3, 40, 40), generator=generator).to(torch.uint8)
    differentiable = mean_ssim(a[:, None] / 255, b[:, None] / 255)
    torch.testing.assert_close(differentiable, ssim(a, b).mean(), atol=1e-5, rtol=1e-5)


def test_the_tokenizer_knows_the_words_and_every_other_word_in_pieces(tmp_path):
    args = parse_args(["--films", "nowhere", "--work_dir", str(tmp_path)])
    tokenizer = make_tokenizer(args, ["Chest radiograph of a child."])
    for word in ("effusion", "pneumothorax", "left", "right", "upper", "pacemaker", "cardiomegaly"):
        assert len(tokenizer(word).input_ids) == 3  # start, the word, end
    for text in ("zqx", "ñandú", "中文", "38.5°", "60-year-old"):
        tokens = tokenizer(text).input_ids
        assert tokenizer.eos_token_id not in tokens[:-1]
        assert tokenizer.decode(tokens[1:-1]).replace(" ", "") == text


@needs_muon
def test_a_broken_stage_goes_on_to_the_same_weights(tmp_path, monkeypatch):
    monkeypatch.setattr(train_cxr_tiny, "CHECKPOINT_STEPS", 2)
    tokenizer = make_tokenizer(parse_args(["--films", "nowhere", "--work_dir", str(tmp_path)]), ["Normal."])

    def train(name: str) -> dict[str, torch.Tensor]:
        (tmp_path / name).mkdir(exist_ok=True)
        flags = ["--films", "nowhere", "--work_dir", str(tmp_path / name), "--text_steps", "5"]
        text_encoder, _ = train_text_encoder(parse_args(flags), tokenizer)
        return text_encoder.state_dict()

    unbroken = train("unbroken")

    def break_at_step_three(step: int, total: int) -> float:
        if step == 3:
            raise KeyboardInterrupt
        return cosine(step, total)

    cosine = train_cxr_tiny.cosine
    monkeypatch.setattr(train_cxr_tiny, "cosine", break_at_step_three)
    with pytest.raises(KeyboardInterrupt):
        train("broken")
    monkeypatch.setattr(train_cxr_tiny, "cosine", cosine)
    resumed = train("broken")
    assert all(torch.equal(resumed[name], unbroken[name]) for name in unbroken)
    assert (tmp_path / "broken" / "text-state.pt").is_file()


def test_a_fifth_of_the_patients_is_held_out_with_all_films(tmp_path):
    table = ["file_name,patient_id,label", *(f"{i}.jpg,patient{i % 10},normal" for i in range(40))]
    (tmp_path / "labels.csv").write_text("\n".join(table))
    rows, held_out = read_labels(tmp_path)
    patients = {row["patient_id"] for row, out in zip(rows, held_out, strict=True) if out}
    assert len(patients) == 2 and held_out.sum() == 8
    assert not patients & {row["patient_id"] for row, out in zip(rows, held_out, strict=True) if not out}
    with pytest.raises(Refused, match=r"labels\.csv not found"):
        read_labels(tmp_path / "elsewhere")


def test_the_bundled_base_loads_in_a_stock_pipeline_as_fp32():
    """Stored in fp16; diffusers loads in fp32 what it has no other order for, transformers what the config names."""
    pipeline = StableDiffusionPipeline.from_pretrained(ROOT / BUNDLED_BASE)
    parts = (pipeline.unet, pipeline.vae, pipeline.text_encoder)
    assert {parameter.dtype for part in parts for parameter in part.parameters()} == {torch.float32}
    assert pipeline.scheduler.config.prediction_type == make_scheduler().config.prediction_type == "v_prediction"
    pipeline.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(0)
    images = pipeline(
        "Chest radiograph of a child. Normal.", num_inference_steps=2, generator=generator, output_type="np"
    )
    assert images.images.shape == (1, RESOLUTION, RESOLUTION, 3) and np.isfinite(images.images).all()
