"""What generation is used for: augmentation studies, several adapters, films to begin at, data sets, kills, many processes."""

import errno
import shutil
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pydicom
import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from diffusers import StableDiffusionPipeline
from diffusers.utils import convert_state_dict_to_diffusers
from peft.utils import get_peft_model_state_dict
from PIL import Image

import generate
import utils.quality
from tests.conftest import HANG_S, ROOT, draw_film
from tests.processes import Processes
from tests.test_generate import PROMPTS, asking, make, pixels
from tests.test_lora import trained
from tests.training import train
from utils.export import save_kohya, to_kohya
from utils.files import read_jsonl
from utils.films import decode_film
from utils.lora import adapter_state, fold_alphas, save_adapter
from utils.metadata import read_metadata
from utils.pipeline import assemble, load_base, put_on_adapter, sample
from utils.provenance import TABLE, eight_bits, read_png
from utils.quality import QualityControl
from utils.refusal import Refused, run
from utils.release import WEIGHTS_NAME
from utils.webpage import Wish


@pytest.fixture(scope="module")
def adapter(tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of an adapter that changes images visibly, with the header that ours have."""
    base = trained(tiny_base)
    folder = tmp_path_factory.mktemp("adapter")
    settings = {"revision": None, "variant": None, "prediction_type": None}
    header = {"base": str(tiny_base), "fold": 0, "step": 1, "resolution": 64, "settings": settings}
    save_adapter(folder / WEIGHTS_NAME, adapter_state(base.unet, base.text_encoder), header)
    return folder


@pytest.fixture
def lenient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Random weights draw coloured fog; here it passes for films."""
    monkeypatch.setattr(utils.quality, "MOST_COLOUR", 256)
    monkeypatch.setattr(utils.quality, "LEAST_CONTRAST", 0)


def stock_films(base: Path, adapter: Path, count: int) -> list[np.ndarray]:
    """What diffusers' own pipeline draws of the first prompt, with the adapter beside the weights, not within."""
    pipeline = assemble(load_base(str(base)))
    put_on_adapter(pipeline, generate.read_adapter(adapter / WEIGHTS_NAME)[0])
    films = sample(pipeline, [PROMPTS[0]] * count, range(count), 64, 3, 4.0, 4)
    return [film.numpy().astype(int) for film in films]


def test_a_merged_adapter_draws_what_a_stock_pipeline_draws(tiny_base: Path, tmp_path: Path, adapter: Path) -> None:
    bare = make(tiny_base, tmp_path / "bare", *asking(PROMPTS[0]), "--num_images", "4")
    rows = make(tiny_base, tmp_path / "with", *asking(PROMPTS[0]), "--num_images", "4", "--lora", str(adapter))
    off = make(
        tiny_base,
        tmp_path / "off",
        *asking(PROMPTS[0]),
        "--num_images",
        "4",
        "--lora",
        str(adapter),
        "--lora_scale",
        "0",
    )
    for row, other, without, stock in zip(rows, bare, off, stock_films(tiny_base, adapter, 4), strict=True):
        ours = pixels(tmp_path / "with", row)
        assert np.abs(ours - stock).max() <= 1
        assert np.abs(ours - pixels(tmp_path / "bare", other)).max() > 8
        np.testing.assert_array_equal(pixels(tmp_path / "off", without), pixels(tmp_path / "bare", other))


def test_adapters_add_up_by_weight(tiny_base: Path, tmp_path: Path, adapter: Path) -> None:
    whole = make(tiny_base, tmp_path / "a", *asking(PROMPTS[0]), "--lora", str(adapter))
    halves = make(
        tiny_base,
        tmp_path / "b",
        *asking(PROMPTS[0]),
        "--lora",
        str(adapter),
        str(adapter),
        "--lora_scale",
        "0.25",
        "0.75",
    )
    assert [part["scale"] for part in halves[0]["adapters"]] == [0.25, 0.75]
    assert np.abs(pixels(tmp_path / "a", whole[0]) - pixels(tmp_path / "b", halves[0])).max() <= 1


def test_what_adapters_were_made_for_is_compared_as_they_were_trained_and_told(
    tiny_base: Path, tmp_path: Path, adapter: Path, capsys: pytest.CaptureFixture
) -> None:
    """Settings are as asked for: a resolution and a prediction of None are the base's own."""
    state, header = generate.read_adapter(adapter / WEIGHTS_NAME)

    def saved(name: str, base: str = header["base"], **settings) -> str:
        save_adapter(tmp_path / name, state, header | {"base": base, "settings": header["settings"] | settings})
        return str(tmp_path / name)

    asked = [saved("a.safetensors", resolution=None), saved("b.safetensors", resolution=64, prediction_type="epsilon")]
    (row,) = make(tiny_base, tmp_path / "out", *asking(PROMPTS[0]), "--lora", *asked)
    assert [of.keys() for of in row["adapters"]] == [{"sha256", "scale"}] * 2
    assert "was made for" not in capsys.readouterr().out
    v = saved("v.safetensors", prediction_type="v_prediction")
    with pytest.raises(Refused, match="differ in their prediction_type .epsilon and v_prediction"):
        make(tiny_base, tmp_path / "out", *asking(PROMPTS[0]), "--lora", asked[0], v)
    (_, bare, unweighted) = [
        *make(tiny_base, tmp_path / "out", *asking(PROMPTS[0])),
        make(tiny_base, tmp_path / "v", *asking(PROMPTS[0]), "--lora", v, "--lora_scale", "0")[0],
    ]
    assert unweighted == bare, "the bare base has its own schedule"
    other = saved("c.safetensors", "another/base")
    row = make(tiny_base, tmp_path / "out", *asking(PROMPTS[0]), "--lora", other)[-1]
    assert row["adapters"][0]["made_for"] == "another/base"
    assert f"{other} was made for another/base, and is put on {tiny_base.name}" in capsys.readouterr().out


def test_an_adapter_of_no_weight_leaves_the_others_as_they_are(tiny_base: Path, tmp_path: Path, adapter: Path) -> None:
    state, header = generate.read_adapter(adapter / WEIGHTS_NAME)
    settings = header["settings"] | {"prediction_type": "v_prediction"}
    save_adapter(v := tmp_path / "v.safetensors", state, header | {"settings": settings})
    (alone,) = make(tiny_base, tmp_path / "a", *asking(PROMPTS[0]), "--lora", str(adapter))
    weights = ["--lora", str(v), str(adapter), "--lora_scale", "0", "1"]
    (beside,) = make(tiny_base, tmp_path / "b", *asking(PROMPTS[0]), *weights)
    assert beside == alone, "the same name, and the same image"


def test_layers_of_a_kohya_file_have_an_alpha_each(tiny_base: Path) -> None:
    """As kohya's tools for ranks and alphas by block write it; diffusers takes the commonest for all."""
    base = trained(tiny_base)
    state = to_kohya(adapter_state(base.unet, base.text_encoder))
    told = dict(state)
    for number, name in enumerate(sorted(name for name in state if name.endswith(".alpha"))):
        told[name] = state[name] / 2 ** (number % 3)
        told[name.replace(".alpha", ".lora_up.weight")] = state[name.replace(".alpha", ".lora_up.weight")] * 2 ** (
            number % 3
        )
    folded, plain = fold_alphas(told, {}), fold_alphas(state, {})
    assert folded.keys() == plain.keys() and not any(name.endswith(".alpha") for name in folded)
    for name, tensor in plain.items():
        torch.testing.assert_close(folded[name], tensor)


@pytest.mark.parametrize("form", ["kohya", "diffusers"])
def test_adapters_of_other_tools_load(tiny_base: Path, tmp_path: Path, adapter: Path, form: str) -> None:
    """Kohya's form, and the file that diffusers' own script writes, in its way of writing it."""
    base = trained(tiny_base)
    if form == "kohya":
        save_kohya(path := tmp_path / "kohya.safetensors", adapter_state(base.unet, base.text_encoder), {})
    else:
        layers = [
            convert_state_dict_to_diffusers(get_peft_model_state_dict(part)) for part in (base.unet, base.text_encoder)
        ]
        StableDiffusionPipeline.save_lora_weights(tmp_path, *layers, safe_serialization=True)
        path = tmp_path / WEIGHTS_NAME
    (row,) = make(tiny_base, tmp_path / "out", *asking(PROMPTS[0]), "--lora", str(path))
    (ours,) = make(tiny_base, tmp_path / "ours", *asking(PROMPTS[0]), "--lora", str(adapter))
    assert np.abs(pixels(tmp_path / "out", row) - pixels(tmp_path / "ours", ours)).max() <= 1


def test_a_negative_prompt_and_a_solver_of_any_name_are_heeded_and_recorded(tiny_base: Path, tmp_path: Path) -> None:
    (plain,) = make(tiny_base, tmp_path / "a", *asking(PROMPTS[0]))
    (away,) = make(tiny_base, tmp_path / "a", *asking(PROMPTS[0]), "--negative_prompt", "AP. Blurred.")[1:]
    (heun,) = make(tiny_base, tmp_path / "a", *asking(PROMPTS[0]), "--scheduler", "HeunDiscreteScheduler")[2:]
    assert (away["negative_prompt"], heun["scheduler"]) == ("AP. Blurred.", "HeunDiscreteScheduler")
    for row in (away, heun):
        assert np.abs(pixels(tmp_path / "a", plain) - pixels(tmp_path / "a", row)).max() > 1


def test_prompts_come_from_grids_and_tables_with_their_labels(tiny_base: Path, tmp_path: Path) -> None:
    table = tmp_path / "prompts.jsonl"
    table.write_text('{"prompt": "A film.", "seed": 40, "age": 3, "negative_prompt": "b"}\n')
    rows = make(
        tiny_base, tmp_path / "out", "--grid", "view=PA", "sex=M,F", "--prompts_file", str(table), "--num_images", "2"
    )
    assert [row["prompt"] for row in rows[::2]] == [
        "A film.",
        "PA chest radiograph of a man.",
        "PA chest radiograph of a woman.",
    ]
    assert [row["seed"] for row in rows] == [40, 41, 0, 1, 0, 1]
    assert [row["labels"] for row in rows[1::2]] == [
        {"age": 3},
        {"view": "PA", "sex": "M"},
        {"view": "PA", "sex": "F"},
    ]
    assert rows[0]["negative_prompt"] == "b"
    own = make(
        tiny_base, tmp_path / "own", "--grid", "view=PA", "sex=M,F", "--num_images", "2", "--own_noise", "--seed", "5"
    )
    assert [row["seed"] for row in own] == [5, 6, 7, 8]


def test_sixteen_bits_hold_what_eight_round(tiny_base: Path, tmp_path: Path) -> None:
    (coarse,) = make(tiny_base, tmp_path / "8", *asking(PROMPTS[0]))
    (fine,) = make(tiny_base, tmp_path / "16", *asking(PROMPTS[0]), "--bit_depth", "16")
    film = read_png(tmp_path / "16" / fine["file_name"])
    assert film.dtype == np.uint16 and len(np.unique(film)) > 256
    assert np.abs(eight_bits(film).astype(int) - pixels(tmp_path / "8", coarse)).max() <= 1
    read = decode_film(tmp_path / "16" / fine["file_name"])
    np.testing.assert_array_equal(read, eight_bits(film), "a generated film's grey scale is its own")
    assert (tmp_path / "16" / "contact_sheet.png").is_file()


def test_dicom_films_are_the_images_also_of_those_that_are_there(tiny_base: Path, tmp_path: Path) -> None:
    rows = make(tiny_base, tmp_path, "--grid", "age=30", "sex=M,F")
    before = {row["file_name"]: (tmp_path / row["file_name"]).stat().st_mtime_ns for row in rows}
    make(tiny_base, tmp_path, "--grid", "age=30", "sex=M,F", "--dicom", "--burn_label")
    for row in rows:
        assert (tmp_path / row["file_name"]).stat().st_mtime_ns == before[row["file_name"]]
        dataset = pydicom.dcmread((tmp_path / "dicom" / row["file_name"]).with_suffix(".dcm"))
        assert (dataset.PatientAge, dataset.PatientSex) == ("030Y", row["labels"]["sex"])
        np.testing.assert_array_equal(dataset.pixel_array[:50], pixels(tmp_path, row)[:50])
        assert (dataset.pixel_array[-8:] != pixels(tmp_path, row)[-8:]).any(), "the label is in the DICOM film only"


def test_images_can_begin_at_a_film(
    tiny_base: Path, tmp_path: Path, lenient: None, capsys: pytest.CaptureFixture
) -> None:
    film = draw_film(3)
    Image.fromarray(film).save(tmp_path / "film.png")
    begin = ["--init_image", str(tmp_path / "film.png"), "--num_inference_steps", "20", "--guidance_scale", "1"]
    (near,) = make(tiny_base, tmp_path / "a", *asking(PROMPTS[0]), *begin, "--strength", "0.05")
    assert "share them no further than that film" in capsys.readouterr().out
    (far,) = make(tiny_base, tmp_path / "a", *asking(PROMPTS[0]), *begin, "--strength", "1")[1:]
    (free,) = make(tiny_base, tmp_path / "b", *asking(PROMPTS[0]), *begin[2:])
    assert (near["strength"], free["strength"], free["init_image_sha256"]) == (0.05, None, None)
    assert np.abs(pixels(tmp_path / "a", near) - pixels(tmp_path / "a", far)).max() > 1
    assert {row["patient_id"] for row in read_jsonl(tmp_path / "a" / TABLE)} == {
        f"film-{near['init_image_sha256'][:12]}"
    }


def test_flagged_images_are_drawn_anew_and_what_stays_flagged_is_no_training_film(
    tiny_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    drawn = []

    def flags(quality: QualityControl, picture: torch.Tensor) -> list[str]:
        drawn.append(picture)
        return ["blank"] if len(drawn) in (1, 3, 4) else []  # images 0 and 2, and 0 again

    monkeypatch.setattr(QualityControl, "flags", flags)
    rows = make(
        tiny_base, tmp_path / "a", *asking(PROMPTS[0]), "--num_images", "3", "--batch_size", "2", "--reject", "1"
    )
    said = capsys.readouterr().out
    assert len(drawn) == 5 and "1 of 3 images flagged (1 blank)" in said and "2 of 3 images drawn anew" in said
    assert [(row["attempts"], row["flags"]) for row in rows] == [(2, ["blank"]), (1, []), (2, [])]
    assert rows[0]["noise_seed"] != rows[0]["seed"] == 0 and rows[1]["noise_seed"] == rows[1]["seed"] == 1
    assert [row["file_name"] for row in read_metadata(tmp_path / "a")] == sorted(row["file_name"] for row in rows[1:])


def test_an_image_that_was_flagged_is_drawn_anew_in_its_place_when_asked_for_later(
    tiny_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn = []

    def flags(quality: QualityControl, picture: torch.Tensor) -> list[str]:
        drawn.append(picture)
        return ["blank"] if len(drawn) == 2 else []

    monkeypatch.setattr(QualityControl, "flags", flags)
    before = make(tiny_base, tmp_path, *asking(PROMPTS[0]), "--num_images", "3")
    after = make(tiny_base, tmp_path, *asking(PROMPTS[0]), "--num_images", "3", "--reject", "2")
    assert len(drawn) == 4
    assert [row["attempts"] for row in after] == [1, 2, 1] and not after[1]["flags"]
    assert [row["file_name"] for row in after] == [row["file_name"] for row in before]
    assert (after[0], after[2]) == (before[0], before[2]) and after[1]["sha256"] != before[1]["sha256"]


def test_labels_that_are_known_later_reach_table_and_dicom(tiny_base: Path, tmp_path: Path, lenient: None) -> None:
    by_prompt = asking("Chest radiograph of a 30-year-old man.")
    by_grid = ["--grid", "age=30", "--grid", "sex=M"]
    make(tiny_base, tmp_path, *by_prompt)
    make(tiny_base, tmp_path, *by_grid, "--dicom")
    (row,) = read_jsonl(tmp_path / TABLE)
    (path,) = (tmp_path / "dicom").iterdir()
    assert (row["age"], row["sex"], pydicom.dcmread(path).PatientAge) == (30, "M", "030Y")
    before = path.read_bytes()
    make(tiny_base, tmp_path, *by_prompt, "--dicom")
    assert path.read_bytes() == before, "what is known stays known, and the film one patient's"


def test_a_data_set_is_not_written_over(tiny_base: Path, own_data: Path) -> None:
    before = {path: path.read_bytes() for path in own_data.rglob("*") if path.is_file()}
    with pytest.raises(Refused, match="holds a data set that generate.py did not write"):
        make(tiny_base, own_data, *asking(PROMPTS[0]))
    assert {path: path.read_bytes() for path in own_data.rglob("*") if path.is_file()} == before


def test_the_page_draws_what_the_command_line_draws_and_keeps_two_models(
    tiny_base: Path, tmp_path: Path, adapter: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without gradio: what stands for its page asks as a visitor would."""
    (bare,) = make(tiny_base, tmp_path / "a", *asking(PROMPTS[0]))
    (adapted,) = make(tiny_base, tmp_path / "a", *asking(PROMPTS[0]), "--lora", str(adapter))[1:]
    wish = Wish(PROMPTS[0], "", adapter, 1.0, 0, 1, 4.0, 3)
    loads, answers = [], []

    def build_page(answer, folders, first):
        def launch(**_):
            for scale in (0.0, 1.0, 0.0, 0.5, 0.0):
                images, notes = answer(replace(wish, lora_scale=scale))
                answers.extend(path.read_bytes() for path in images)
                assert not notes
            with pytest.raises(Refused, match="no prompt"):
                answer(replace(wish, prompt=" "))

        return SimpleNamespace(launch=launch)

    load_model = generate.load_model
    monkeypatch.setattr(generate, "load_model", lambda *args: loads.append(1) or load_model(*args))
    monkeypatch.setattr(generate, "build_page", build_page)
    paths = ["--pretrained_model_name_or_path", str(tiny_base), "--output_dir", str(tmp_path / "served")]
    AcceleratorState._reset_state(reset_partial_state=True)
    generate.main(generate.parse_args([*paths, "--serve", "--resolution", "64", "--mixed_precision", "no"]))
    AcceleratorState._reset_state(reset_partial_state=True)
    assert len(loads) == 3  # the base once
    assert answers[0] == answers[2] == answers[4] == (tmp_path / "a" / bare["file_name"]).read_bytes()
    assert answers[1] == (tmp_path / "a" / adapted["file_name"]).read_bytes() != answers[3]


def test_films_from_few_noises_are_told_not_to_be_a_data_set(
    tiny_base: Path, tmp_path: Path, lenient: None, capsys: pytest.CaptureFixture
) -> None:
    grid = ["--grid", "age=30,40,50,60,70", "--num_images", "2"]
    make(tiny_base, tmp_path / "a", *grid)
    assert "all from 2 noises, too few for a data set; add --own_noise" in capsys.readouterr().out
    make(tiny_base, tmp_path / "a", *grid, "--own_noise")
    make(tiny_base, tmp_path / "a", *asking(PROMPTS[0]), "--num_images", "2")
    assert "too few for a data set" not in capsys.readouterr().out


def test_what_the_page_draws_goes_to_a_folder_of_its_own() -> None:
    folders = [generate.parse_args(more).output_dir for more in ([], ["--serve"], ["--serve", "--output_dir", "a"])]
    assert folders == [Path("images"), Path("images/page"), Path("a")]


def test_a_generated_folder_trains_as_it_stands(tiny_base: Path, tmp_path: Path, lenient: None) -> None:
    make(
        tiny_base,
        tmp_path / "images",
        "--grid",
        "age=" + ",".join(map(str, range(20, 40))),
        "findings=none",
        "--own_noise",
    )
    assert train(tiny_base, tmp_path / "images", tmp_path / "run", "--max_train_steps", "2") in (0, None)
    card = (tmp_path / "run" / "README.md").read_text()
    assert "synthetic" in card and "folder of the user's own" not in card


def test_a_generated_folder_is_an_imagefolder_of_the_hub_library(
    tiny_base: Path, tmp_path: Path, lenient: None
) -> None:
    datasets = pytest.importorskip("datasets")
    make(tiny_base, tmp_path, *asking(PROMPTS[0]), "--num_images", "3", "--own_noise", "--dicom")
    films = datasets.load_dataset(
        "imagefolder", data_dir=str(tmp_path), split="train", cache_dir=str(tmp_path / "hub")
    )
    rows = read_jsonl(tmp_path / TABLE)
    assert films["text"] == [row["text"] for row in rows] == [PROMPTS[0]] * 3
    assert films["patient_id"] == [row["patient_id"] for row in rows]
    assert films[0]["image"].tobytes() == Image.open(tmp_path / rows[0]["file_name"]).tobytes()


def test_the_captions_that_a_run_held_out_are_drawn(
    tiny_base: Path, tiny_data: Path, tmp_path: Path, own_data: Path
) -> None:
    lora = tmp_path / "fold3"
    train(tiny_base, tiny_data, lora, "--fold", "3", "--max_train_steps", "1")
    rows = make(tiny_base, tmp_path / "out", "--lora", str(lora), "--from_fold")
    by_itself = generate.parse_args(["--lora", str(lora)])
    _, described, _ = generate.load_model(by_itself, Accelerator(mixed_precision="no"))
    assert described["base"] == rows[0]["base"] == tiny_base.name, "found by the run's record, told by its last name"
    assert str(tiny_base.parent).encode() not in (lora / WEIGHTS_NAME).read_bytes()
    held_out = [row for row in read_jsonl(tiny_data / TABLE) if row["fold"] == 3]
    assert {row["prompt"] for row in rows} == {row["text"] for row in held_out}
    assert {str(row["labels"]["findings"]) for row in rows} == {"[]", "['pneumonia']"}
    assert read_jsonl(tmp_path / "out" / TABLE) == [], "what was held out is not trained on"
    (own_data / TABLE).write_text((own_data / TABLE).read_text().replace("Pneumonia", "Mass"))
    with pytest.raises(Refused, match="not the data that .* was trained on"):
        make(tiny_base, tmp_path / "out", "--lora", str(lora), "--from_fold", "--train_data_dir", str(own_data))


COMMAND = [*asking(*PROMPTS), "--num_images", "5", "--num_inference_steps", "3", "--resolution", "64", "--batch_size", "2",
           "--mixed_precision", "no"]  # fmt: skip


def images_of(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.glob("*") if path.suffix in (".png", ".jsonl")}


def test_killed_resumed_and_by_two_processes_the_folder_is_the_same(tiny_base: Path, tmp_path: Path) -> None:
    """Once in a process that is killed and one that goes on, once by two at a time with the prompts in another order."""

    def start(name: str, command: list[str], num_processes: int = 1) -> Processes:
        paths = ["--pretrained_model_name_or_path", str(tiny_base), "--output_dir", str(tmp_path / name)]
        return Processes("generate.py", [*paths, *command], tmp_path / "output.txt", num_processes)

    whole, two = start("whole", COMMAND), start("two", [*COMMAND[2:4], *COMMAND[:2], *COMMAND[4:]], 2)
    process = start("killed", COMMAND)
    while len(list((tmp_path / "killed").glob("*_?_*.png"))) < 3 and process.poll() is None:
        time.sleep(0.005)
    assert process.poll() is None, "it ended before it could be killed"
    process.kill()
    assert [started.wait(HANG_S) for started in (start("killed", COMMAND), whole, two)] == [0, 0, 0]
    assert len(read_jsonl(tmp_path / "whole" / "images.jsonl")) == 10
    assert images_of(tmp_path / "killed") == images_of(tmp_path / "whole")
    several, one = images_of(tmp_path / "two"), images_of(tmp_path / "whole")
    del several["contact_sheet.png"], one["contact_sheet.png"]  # the prompts are in another order there
    for name in ("images.jsonl", "metadata.jsonl"):
        assert sorted(several.pop(name).splitlines()) == sorted(one.pop(name).splitlines())
    assert several == one
    assert not list(tmp_path.glob("*/*.tmp"))


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        (["--scheduler", "magic"], "--scheduler magic; expected dpmsolver.*HeunDiscreteScheduler"),
        (["--scheduler", "FlowMatchEulerDiscreteScheduler"], "--scheduler FlowMatch"),
        (["--prompt", "word " * 10_000], "a prompt of 10000 words"),
        (["--negative_prompt", "x", "--guidance_scale", "1"], "has no effect"),
        (["--strength", "0", "--init_image", "f.png"], "--strength 0.0"),
        (["--strength", "0.3", "--init_image", "f.png"], "--strength 0.3 leaves none of 3 steps"),
        (["--init_image", "f.png", "--dicom"], "take one of them"),
        (["--seed", str(2**64)], "--seed 18446744073709551616"),
        (["--num_inference_steps", "600"], "has room for 499"),
        (["--scheduler", "LCMScheduler", "--num_inference_steps", "51"], "LCMScheduler has room for 50"),
        (["--resolution", "0"], "--resolution 0"),
        (["--scheduler", "EDMEulerScheduler"], "--scheduler EDMEulerScheduler"),
        (["--serve", "--port", "99999"], "--port 99999"),
        (["--serve", "--grid", "sex=M"], "--grid is not for --serve"),
        (["--serve", "--own_noise"], "--own_noise is not for --serve"),
        (["--serve", "--lora", "/nowhere"], "no adapter at /nowhere"),
        (["--serve", "--train_data_dir", "/nowhere"], "--train_data_dir is not for --serve"),
        (["--serve", "--prompt", "y"], "2 of --prompt; --serve begins with one"),
        (["--serve", "--lora", "a", "b", "--lora_scale", "0.3", "0.7"], "2 of --lora_scale; --serve"),
        (["--serve", "--num_images", "20"], "--num_images 20; the page of --serve draws 8"),
        (["--strength", "0.3"], "--strength has no effect without --init_image"),
        (["--lora_scale", "0.3"], "--lora_scale has no effect without --lora;"),
        (["--train_data_dir", "/nowhere"], "--train_data_dir has no effect without --from_fold"),
        (["--share"], "--share has no effect without --serve"),
        (["--port", "7860"], "--port has no effect without --serve"),
        (["--init_image", "/nowhere.png"], "no film that can be read"),
        (["--from_fold"], "expected --lora out/fold2"),
        (["--lora", "a", "--lora_scale", "1", "2"], "2 of --lora_scale for 1 of --lora"),
        (["--burn_label"], "add --dicom"),
        (["--reference", "/nowhere"], "no folder /nowhere"),
        (["--reject", "-1"], "--reject -1"),
    ],
)
def test_bad_input_is_refused_in_words(tiny_base: Path, tmp_path: Path, extra: list[str], message: str) -> None:
    with pytest.raises(Refused, match=message):
        make(tiny_base, tmp_path / "out", *asking(PROMPTS[0]), *extra)
    assert not (tmp_path / "out").exists()


def test_a_negative_prompt_of_a_table_is_refused_where_nothing_leads_away_from_it(
    tiny_base: Path, tmp_path: Path
) -> None:
    (tmp_path / "prompts.jsonl").write_text('{"prompt": "A film.", "negative_prompt": "b"}\n')
    with pytest.raises(Refused, match="negative_prompt of .*prompts.jsonl has no effect with --guidance_scale 1.0"):
        make(tiny_base, tmp_path, "--prompts_file", str(tmp_path / "prompts.jsonl"), "--guidance_scale", "1")


def test_adapters_that_cannot_be_used_are_refused_in_words(tiny_base: Path, tmp_path: Path, adapter: Path) -> None:
    torch.save({"lora": torch.ones(1)}, tmp_path / "adapter.bin")
    with pytest.raises(Refused, match="no safetensors file; others are pickles"):
        make(tiny_base, tmp_path / "out", *asking(PROMPTS[0]), "--lora", str(tmp_path / "adapter.bin"))
    with pytest.raises(Refused, match=f"is an adapter for {tiny_base}, not for assets/cxr-tiny"):
        make(ROOT / "assets" / "cxr-tiny", tmp_path / "out", *asking(PROMPTS[0]), "--lora", str(adapter))
    state, header = generate.read_adapter(adapter / WEIGHTS_NAME)
    save_adapter(tmp_path / "other.safetensors", state, header | {"base": "another/base"})
    with pytest.raises(Refused, match="differ in their base .*another/base"):
        make(
            tiny_base,
            tmp_path / "out",
            *asking(PROMPTS[0]),
            "--lora",
            str(adapter),
            str(tmp_path / "other.safetensors"),
        )
    name = next(name for name in state if ".lora_B." in name)
    save_adapter(tmp_path / "nan.safetensors", state | {name: state[name] * torch.nan}, header)
    with pytest.raises(Refused, match="not finite"):
        make(tiny_base, tmp_path / "out", *asking(PROMPTS[0]), "--lora", str(tmp_path / "nan.safetensors"))
    assert not (tmp_path / "out").exists()


def test_folders_and_disks_that_cannot_be_written_are_told_in_a_line(
    tiny_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    def said(*more: str, output: str = "out") -> str:
        assert run(lambda _: make(tiny_base, tmp_path / output, *asking(PROMPTS[0]), *more), lambda: None) == 2
        return capsys.readouterr().err

    def fill(*_) -> None:
        raise OSError(errno.ENOSPC, "No space left on device", "a.png")

    with monkeypatch.context() as patch:
        patch.setattr(generate, "keep", fill)
        *_, last, end = said().split("\n")
    assert last.endswith("cannot read or write a.png: No space left on device") and end == ""
    assert "generating" not in last, "the bar has a line of its own"
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10, 10, 0))
        assert "the images needs 0.00 GB" in said(output="full")

    # At the door: with a base that must not be loaded
    monkeypatch.setattr(generate, "load_base", lambda *_: pytest.fail("loaded a base first"))
    (tmp_path / "file").write_text("")
    (tmp_path / "metadata.jsonl").write_text('{"file_name": "lost.png", "text": "a film"}\n')
    for command, message in (
        ({"output": "file"}, f"cannot read or write {tmp_path}/file: Not a directory"),
        ({"output": "file/below"}, "Not a directory"),
        ({"output": "x" * 300}, "File name too long"),
        (["--init_image", str(tmp_path / "file")], "no film that can be read"),
        (["--reference", str(tmp_path)], "lost.png"),
        *(([flag, "long prompt " * 40], "File name too long") for flag in ("--prompts_file", "--lora", "--reference")),
    ):
        told = said(**command) if isinstance(command, dict) else said(*command)
        assert told.count("\n") == 1 and message in told


def test_a_model_that_does_not_fit_into_memory_is_told_in_a_line(
    tiny_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def load_base(*_):
        raise torch.OutOfMemoryError("CUDA out of memory.")

    monkeypatch.setattr(generate, "load_base", load_base)
    with pytest.raises(Refused, match="out of memory while loading the model; .*--mixed_precision fp16"):
        make(tiny_base, tmp_path, *asking(PROMPTS[0]))
