"""A Stable Diffusion of random weights and a set of made-up films, both built in a second: the suite needs no hub."""

import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import utils.quiet  # noqa: F401

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL, DDPMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from PIL import Image
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from utils.mirror import Mirror

ROOT = Path(__file__).resolve().parent.parent
SIDE = 64  # pixels
HANG_S = 1200  # what takes longer hangs; machines that others share have taken 160 s for what takes 10


def build_base(folder: Path, prediction_type: str = "epsilon") -> Path:
    """Save a pipeline of 64 px, four latent channels, random weights and the bundled base's tokenizer."""
    torch.manual_seed(0)
    tokenizer = CLIPTokenizer.from_pretrained(ROOT / "assets" / "cxr-tiny" / "tokenizer")
    unet = UNet2DConditionModel(
        sample_size=8, block_out_channels=(16, 32), layers_per_block=1, norm_num_groups=4, cross_attention_dim=32,
        attention_head_dim=2, down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
    )  # fmt: skip
    vae = AutoencoderKL(
        block_out_channels=(8, 8, 8, 8), norm_num_groups=4, latent_channels=4, sample_size=SIDE,
        down_block_types=("DownEncoderBlock2D",) * 4, up_block_types=("UpDecoderBlock2D",) * 4,
    )  # fmt: skip
    text_encoder = CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(tokenizer), hidden_size=32, intermediate_size=32, num_hidden_layers=2,
            num_attention_heads=2, bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )  # fmt: skip
    scheduler = DDPMScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", clip_sample=False, steps_offset=1,
        prediction_type=prediction_type,
    )  # fmt: skip
    pipeline = StableDiffusionPipeline(
        vae=vae, text_encoder=text_encoder, tokenizer=tokenizer, unet=unet, scheduler=scheduler, safety_checker=None,
        feature_extractor=None, requires_safety_checker=False,
    )  # fmt: skip
    pipeline.save_pretrained(folder)
    return folder


def draw_film(seed: int) -> np.ndarray:
    """Return smooth noise brighter on one side, uint8 [64, 64]: unlike others, and unlike its mirror image."""
    generator = np.random.default_rng(seed)
    rough = Image.fromarray(generator.integers(0, 200, (8, 8), dtype=np.uint8))
    film = np.asarray(rough.resize((SIDE, SIDE), Image.Resampling.BICUBIC)).astype(int)
    return (film + np.linspace(0, 55, SIDE).astype(int)).clip(0, 255).astype(np.uint8)


def build_data(folder: Path, num_patients: int = 20, films_each: int = 2) -> Path:
    """Save an imagefolder of made-up films: five folds by patient, a finding in every other patient."""
    (folder / "images").mkdir(parents=True)
    rows = []
    for patient in range(num_patients):
        for film in range(films_each):
            name = f"images/p{patient:02d}_{film}.png"
            Image.fromarray(draw_film(100 * patient + film)).save(folder / name)
            findings = ["pneumonia"] if patient % 2 else []
            text = f"PA chest radiograph of a {30 + patient}-year-old man. {'Pneumonia' if findings else 'No acute finding'}."
            rows.append(
                {
                    "file_name": name,
                    "text": text,
                    "patient_id": f"p{patient}",
                    "fold": patient % 5,
                    "findings": findings,
                }
            )
    (folder / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def mirror_of(files: dict[str, bytes]) -> Mirror:
    """Return a mirror that holds these files."""
    mirror = Mirror("mirror")
    mirror.read, mirror.path = files.get, Path("/nowhere").joinpath
    return mirror


def fake_package(folder: Path, name: str, version: str) -> None:
    """Put an empty package into a folder of packages, as an installer would."""
    (folder / name).mkdir()
    (folder / name / "__init__.py").touch()
    about = folder / f"{name}-{version}.dist-info"
    about.mkdir()
    (about / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
    (about / "INSTALLER").write_text("pip\n")
    (about / "RECORD").write_text(
        f"{name}/__init__.py,,\n{about.name}/METADATA,,\n{about.name}/INSTALLER,,\n{about.name}/RECORD,,\n"
    )


@pytest.fixture(scope="session")
def tiny_base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_base(tmp_path_factory.mktemp("base") / "tiny")


@pytest.fixture(scope="session")
def tiny_data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Shared films: read only. A test that changes some copies them with `own_data`."""
    return build_data(tmp_path_factory.mktemp("films") / "data")


@pytest.fixture
def own_data(tiny_data: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_data, tmp_path / "data"))


@pytest.fixture(scope="session")
def watched(tiny_base: Path, tiny_data: Path, tmp_path_factory: pytest.TempPathFactory) -> SimpleNamespace:
    """A bf16 run of six steps with dropout everywhere, whose every call of UNet and text encoder is looked at."""
    from tests.training import watch_run  # imports the whole of train_lora.py

    more = ("--max_train_steps", "6", "--caption_dropout", "0.5", "--lora_dropout", "0.1", "--validation_steps", "3")
    run = tmp_path_factory.mktemp("watched") / "run"
    return watch_run(tiny_base, tiny_data, run, *more, precision="bf16", in_full=True)
