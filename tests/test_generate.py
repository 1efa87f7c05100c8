"""Generation on a tiny model: what an image depends on, what it says of itself, and what is refused."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from accelerate.state import AcceleratorState
from PIL import Image
from safetensors.torch import load_file, save_file

import generate
from utils.decoder import decoder_state
from utils.files import sha256_file
from utils.lora import adapter_state, add_lora, save_adapter
from utils.pipeline import load_base
from utils.refusal import Refused
from utils.release import DECODER_NAME, WEIGHTS_NAME

PROMPTS = ("PA chest radiograph of a man.", "AP chest radiograph of a woman. Pneumonia.")


def make(base: Path, output: Path, *more: str) -> list[dict]:
    """Run the script's main as a fresh process would and return its record."""
    paths = ["--pretrained_model_name_or_path", str(base), "--output_dir", str(output)]
    quick = ["--num_inference_steps", "3", "--resolution", "64", "--mixed_precision", "no"]
    AcceleratorState._reset_state(reset_partial_state=True)
    generate.main(generate.parse_args([*paths, *quick, *more]))
    AcceleratorState._reset_state(reset_partial_state=True)
    return [json.loads(line) for line in (output / "images.jsonl").read_text().splitlines()]


def pixels(output: Path, row: dict) -> np.ndarray:
    return np.asarray(Image.open(output / row["file_name"])).astype(int)


def asking(*prompts: str) -> list[str]:
    return [word for prompt in prompts for word in ("--prompt", prompt)]


def test_an_image_does_not_depend_on_what_else_is_asked_for(tiny_base: Path, tmp_path: Path) -> None:
    together = make(tiny_base, tmp_path / "a", *asking(*PROMPTS), "--num_images", "3")
    reverse = make(tiny_base, tmp_path / "b", *asking(*reversed(PROMPTS)), "--num_images", "3")
    alone = make(tiny_base, tmp_path / "c", *asking(PROMPTS[1]), "--seed", "2")
    assert len(together) == 6
    by_name = {row["file_name"]: row["sha256"] for row in together}
    assert {row["file_name"]: row["sha256"] for row in reverse} == by_name
    assert alone[0]["seed"] == 2
    assert by_name[alone[0]["file_name"]] == alone[0]["sha256"]


def test_another_batch_size_differs_by_a_grey_level_at_most(tiny_base: Path, tmp_path: Path) -> None:
    rows = {
        size: make(tiny_base, tmp_path / size, *asking(*PROMPTS), "--num_images", "2", "--batch_size", size)
        for size in ("1", "3", "8")
    }
    for size in ("3", "8"):
        for one, other in zip(rows["1"], rows[size], strict=True):
            assert np.abs(pixels(tmp_path / "1", one) - pixels(tmp_path / size, other)).max() <= 1


def test_prompts_share_their_noise_and_seeds_do_not(tiny_base: Path, tmp_path: Path) -> None:
    rows = make(tiny_base, tmp_path, *asking(*PROMPTS), "--num_images", "2", "--guidance_scale", "1")
    first, other_seed, same_seed, _ = (pixels(tmp_path, row) for row in rows)
    assert np.abs(first - same_seed).mean() < np.abs(first - other_seed).mean() / 4


def test_images_are_grey_and_say_how_they_were_made(tiny_base: Path, tmp_path: Path) -> None:
    row = make(tiny_base, tmp_path, *asking("Überlagerung, left.\u2028"), "--seed", "7")[0]
    image = Image.open(tmp_path / row["file_name"])
    assert image.mode == "L"
    assert image.size == (64, 64)
    assert image.text["Synthetic"] == "YES"
    assert "Not for diagnosis" in image.text["Disclaimer"]
    assert image.text["prompt"] == "Überlagerung, left."
    for name in ("seed", "guidance_scale", "num_inference_steps", "scheduler", "base", "adapters"):
        assert name in image.text
    assert row["synthetic"] is True
    assert (tmp_path / "contact_sheet.png").is_file()


def test_finished_images_are_left_alone_and_missing_ones_made_again(tiny_base: Path, tmp_path: Path) -> None:
    rows = make(tiny_base, tmp_path, *asking(*PROMPTS))
    kept, lost = (tmp_path / row["file_name"] for row in rows)
    before, when = lost.read_bytes(), kept.stat().st_mtime_ns
    lost.unlink()
    record = (tmp_path / "images.jsonl").read_bytes()
    (tmp_path / "images.jsonl").write_bytes(record[:-30])  # torn by a kill
    make(tiny_base, tmp_path, *asking(*PROMPTS))
    assert lost.read_bytes() == before
    assert kept.stat().st_mtime_ns == when
    assert (tmp_path / "images.jsonl").read_bytes() == record
    make(tiny_base, tmp_path, *asking(*PROMPTS))  # nothing is missing
    assert (tmp_path / "images.jsonl").read_bytes() == record
    make(tiny_base, tmp_path, *asking(*PROMPTS), "--guidance_scale", "2")
    assert len((tmp_path / "images.jsonl").read_text().splitlines()) == 4
    assert kept.stat().st_mtime_ns == when


def test_bases_of_one_name_are_told_apart_by_their_files(tiny_base: Path, tmp_path: Path) -> None:
    first, second = (Path(shutil.copytree(tiny_base, tmp_path / "jane.doe" / name / "base")) for name in ("v1", "v2"))
    weights = second / "unet" / "diffusion_pytorch_model.safetensors"
    state = load_file(weights)
    save_file(state | {"conv_out.bias": state["conv_out.bias"] + 0.5}, weights, {"format": "pt"})
    make(first, tmp_path / "out", *asking(PROMPTS[0]))
    one, other = make(second, tmp_path / "out", *asking(PROMPTS[0]))
    assert one["base"] == other["base"] == "base"
    assert np.abs(pixels(tmp_path / "out", one) - pixels(tmp_path / "out", other)).max() > 1
    moved = Path(shutil.move(first, tmp_path / "base"))
    assert len(make(moved, tmp_path / "out", *asking(PROMPTS[0]))) == 2, "a base is the same in another place"
    assert not any(b"jane.doe" in path.read_bytes() for path in (tmp_path / "out").iterdir())


def test_prompts_come_from_a_file_too_and_equal_ones_are_drawn_once_unless_their_noise_differs(
    tiny_base: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    (tmp_path / "prompts.txt").write_text("\n".join([*PROMPTS, "", PROMPTS[0]]))
    asked = ["--prompts_file", str(tmp_path / "prompts.txt")]
    rows = make(tiny_base, tmp_path / "out", *asked)
    assert [row["prompt"] for row in rows] == list(PROMPTS)
    assert "2 different prompts of 3;" in capsys.readouterr().out
    own = make(tiny_base, tmp_path / "own", *asked, "--own_noise")
    assert [(row["prompt"], row["seed"]) for row in own] == [(PROMPTS[0], 0), (PROMPTS[1], 1), (PROMPTS[0], 2)]
    assert "different prompts of" not in capsys.readouterr().out
    assert make(tiny_base, tmp_path / "own", *asked, "--own_noise") == own
    assert "0 new of 3 images" in capsys.readouterr().out


def test_the_decoder_beside_an_adapter_is_used_named_and_switched_off(
    tiny_base: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    base = load_base(str(tiny_base))
    add_lora(base.unet, 4, 4, seed=0)
    adapter, decoder = tmp_path / "run" / WEIGHTS_NAME, tmp_path / "run" / DECODER_NAME
    save_adapter(adapter, adapter_state(base.unet, base.text_encoder), {})
    asked = [*asking(PROMPTS[0]), "--lora", str(adapter)]
    (without,) = make(tiny_base, tmp_path / "without", *asked)
    assert without["decoder_sha256"] is None and "vae_decoder" not in capsys.readouterr().out
    state = decoder_state(base.vae)
    state["decoder.conv_out.bias"] += 0.2
    save_file(state, decoder)
    (adapted,) = make(tiny_base, tmp_path / "adapted", *asked)
    assert capsys.readouterr().out.count(f"decoder {decoder}") == 1
    assert adapted["decoder_sha256"] == sha256_file(decoder)
    assert Image.open(tmp_path / "adapted" / adapted["file_name"]).text["decoder_sha256"] == sha256_file(decoder)
    brighter = pixels(tmp_path / "adapted", adapted) - pixels(tmp_path / "without", without)
    assert 20 < brighter.mean() < 30  # 0.2 of the range from -1 to 1 is 25 grey levels
    (switched_off,) = make(tiny_base, tmp_path / "off", *asked, "--no_vae_decoder")
    assert switched_off == without
    (bare,) = make(tiny_base, tmp_path / "bare", *asking(PROMPTS[0]))
    (unweighted,) = make(tiny_base, tmp_path / "unweighted", *asked, "--lora_scale", "0")
    assert unweighted == bare, "the bare base has its own decoder"
    save_file({name: tensor[:2].clone() for name, tensor in state.items()}, decoder)
    with pytest.raises(Refused, match="does not fit this base model .*--no_vae_decoder"):
        make(tiny_base, tmp_path / "wrong", *asked)


@pytest.mark.parametrize("scheduler", [*sorted(generate.SCHEDULERS), "LCMScheduler", "TCDScheduler"])
def test_schedulers_run_those_of_the_help_and_those_of_few_steps(
    tiny_base: Path, tmp_path: Path, scheduler: str
) -> None:
    row = make(tiny_base, tmp_path, *asking(PROMPTS[0]), "--scheduler", scheduler)[0]
    assert pixels(tmp_path, row).std() > 0


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        ([], "no prompt"),
        (["--prompts_file", "/nowhere"], "no prompts at"),
        (["--prompt", "x", "--lora", "/nowhere"], "no adapter at"),
        (["--prompt", "x", "--num_images", "0"], "--num_images 0"),
        (["--prompt", "x", "--resolution", "100"], "multiple of 16"),
        (["--prompt", "x", "--seed", "-1"], "--seed -1"),
        (["--prompt", "x", "--guidance_scale", "nan"], "--guidance_scale nan"),
    ],
)
def test_bad_input_is_refused_in_words(tiny_base: Path, tmp_path: Path, extra: list[str], message: str) -> None:
    with pytest.raises(Refused, match=message):
        make(tiny_base, tmp_path / "out", *extra)
    assert not (tmp_path / "out").exists()


def test_a_long_prompt_is_fitted_as_captions_are_and_says_so(
    tiny_base: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    sentence = "There is a left pleural effusion."
    (long,) = make(tiny_base, tmp_path / "long", *asking(" ".join([sentence] * 40)))
    said = capsys.readouterr().out
    (fitted,) = [line for line in said.splitlines() if "longer than 77 tokens" in line]
    kept = fitted.partition(": ")[2]
    assert kept.endswith(sentence) and 1 < kept.count(sentence) < 40
    (short,) = make(tiny_base, tmp_path / "short", *asking(kept))
    assert "longer than" not in capsys.readouterr().out
    np.testing.assert_array_equal(pixels(tmp_path / "long", long), pixels(tmp_path / "short", short))

    # A sentence that no window holds is cut within, as the tokenizer does
    endless = "Chest radiograph of " + "a large " * 80 + "effusion. "
    (long,) = make(tiny_base, tmp_path / "endless", *asking(endless))
    (cut,) = [line for line in capsys.readouterr().out.splitlines() if "longer than 77 tokens" in line]
    assert "cut within a sentence: Chest radiograph of a large" in cut and "effusion" not in cut
    (short,) = make(tiny_base, tmp_path / "cut", *asking(cut.partition(": ")[2]))
    assert "longer than" not in capsys.readouterr().out
    np.testing.assert_array_equal(pixels(tmp_path / "endless", long), pixels(tmp_path / "cut", short))
