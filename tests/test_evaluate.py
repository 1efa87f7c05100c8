"""Evaluation on tiny runs: only held-out films, honest floors, and folds put together right."""

import base64
import json
import shutil
import statistics
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from accelerate.state import AcceleratorState
from safetensors.torch import load_file, save_file
from sklearn.metrics import roc_auc_score

import evaluate
from tests.conftest import ROOT, build_data
from tests.training import train
from utils import validation
from utils.decoder import decoder_state
from utils.encoders import FilmSpace
from utils.files import read_jsonl, sha256_file
from utils.images import load_film
from utils.latents import cache_posteriors
from utils.metadata import read_metadata
from utils.pipeline import load_base
from utils.refusal import Refused
from utils.release import DECODER_NAME, FAILED, WEIGHTS_NAME
from utils.runlog import read_config
from utils.validation import eval_mode, film_bank, score_model


@pytest.fixture(scope="module", autouse=True)
def few_steps() -> Iterator[None]:
    """Films are rebuilt in fewer steps, which take a third of an evaluation of eight films."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(validation, "NUM_DDIM_STEPS", 4)
        yield


def measure(*args) -> None:
    AcceleratorState._reset_state(reset_partial_state=True)
    evaluate.main(evaluate.parse_args([str(arg) for arg in args]))
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.fixture(scope="module")
def runs(tiny_base: Path, tiny_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two evaluated folds."""
    out = tmp_path_factory.mktemp("runs")
    for fold in ("0", "1"):
        train(tiny_base, tiny_data, out / f"fold{fold}", "--fold", fold, "--max_train_steps", "4")
        measure("--lora", out / f"fold{fold}", "--num_inference_steps", "2", "--mixed_precision", "no")
    return out


def test_only_the_held_out_fold_is_measured(runs: Path, tiny_data: Path) -> None:
    folds = {row["file_name"]: row["fold"] for row in map(json.loads, (tiny_data / "metadata.jsonl").open())}
    for fold in (0, 1):
        films = [json.loads(line) for line in (runs / f"fold{fold}" / "evaluation" / "films.jsonl").open()]
        assert sorted(row["file_name"] for row in films) == sorted(name for name, f in folds.items() if f == fold)


def test_figures_stand_beside_their_bounds(runs: Path) -> None:
    metrics = json.loads((runs / "fold0" / "evaluation" / "metrics.json").read_text())
    assert (metrics["films"], metrics["patients"]) == (8, 4)
    for strength in ("0.3", "0.5", "0.7"):
        for name in ("ssim", "psnr"):
            figures = metrics["rebuilt"][strength][name]
            assert figures["gain"]["mean"] == pytest.approx(figures["adapter"]["mean"] - figures["base"]["mean"])
            low, high = figures["gain"]["interval"]
            assert low <= figures["gain"]["mean"] <= high
            assert {"noisy", "adapter_normalised", "base_normalised"} <= set(figures)
    assert len(metrics["noise_prediction_mse"]) == 10
    free = metrics["free_samples"]
    assert "Not a measure of quality" in free["note"]
    assert {"generated", "random_pair", "mean_film"} == set(free["ssim"])
    assert metrics["adapter"]["step"] is not None


def test_the_base_is_scored_without_the_adapter(runs: Path, tiny_base: Path, tiny_data: Path, tmp_path: Path) -> None:
    """Against a base that never had one."""
    films = [json.loads(line) for line in (runs / "fold0" / "evaluation" / "films.jsonl").open()]
    rows = [row for row in read_metadata(tiny_data) if row["fold"] == 0]
    base = load_base(str(tiny_base))
    cached = cache_posteriors(tiny_data, rows, base.vae, tmp_path, 64)
    ids = base.tokenizer([row["text"] for row in rows], padding="max_length", return_tensors="pt").input_ids
    bank = film_bank(tiny_data, rows, cached, range(len(rows)), ids, base.vae.config.scaling_factor, 64)
    with eval_mode(base.unet, base.text_encoder):
        scores = score_model(bank, base.unet, base.text_encoder, base.vae, base.noise_scheduler, 16)
    for name in ("mse/50", "mse/950", "ssim/0.5", "psnr/0.7"):
        assert [row[f"base/{name}"] for row in films] == pytest.approx(scores[name].tolist(), rel=1e-3)
    assert any(abs(row["adapter/mse/50"] - row["base/mse/50"]) > 1e-3 for row in films)


def test_sets_of_films_stand_beside_real_ones_in_their_place(runs: Path) -> None:
    metrics = json.loads((runs / "fold0" / "evaluation" / "metrics.json").read_text())
    distribution = metrics["distribution"]
    assert (distribution["films"], distribution["features"], distribution["encoder"]) == (8, 64, "cxr-features")
    for films in ("generated", "base", "real", "mean_film"):
        assert distribution[films]["frechet"] is None, "8 films have no covariance of 64 features"
        assert distribution[films]["kernel"] is not None
    assert distribution["generated"]["kernel"] > distribution["real"]["kernel"], "a base of random weights draws noise"
    assert distribution["too_good"] == []
    audit = metrics["memorisation"]
    assert (audit["generated"], audit["references"], audit["verdict"]) == (8, 4, "too few films to say")
    variety = metrics["variety"]
    assert variety["one_caption"]["pairs"] % 6 == 0
    assert variety["scales"] == 3, "at 64 px"
    features = load_file(runs / "fold0" / "evaluation" / "features.safetensors")
    assert {name: tuple(tensor.shape) for name, tensor in features.items()} == {
        "held_out": (8, 64),
        "generated": (8, 64),
        "base": (8, 64),
    }
    assert distribution["copies"] == 0


def test_groups_have_their_own_figures_and_counts() -> None:
    scores = {f"{model}/ssim/0.5": torch.tensor([0.1, 0.2, 0.6]) for model in ("adapter", "base")}
    scores |= {"adapter/mse/50": torch.tensor([1.0, 1.0, 2.0]), "adapter/mse/950": torch.tensor([3.0, 3.0, 2.0])}
    scores |= {"base/mse/50": torch.tensor([2.0, 2.0, 2.0]), "base/mse/950": torch.tensor([4.0, 4.0, 4.0])}
    groups = {"sex": {"F": [0, 1], "M": [2]}}
    of_sex = evaluate.summarise_groups(scores, groups, ["a", "b", "b"], [50, 950], seed=0)["sex"]
    assert [(of["films"], of["patients"]) for of in of_sex.values()] == [(2, 2), (1, 1)]
    assert of_sex["F"]["ssim/adapter"]["interval"] is None, "two patients stand for none"
    assert [of["ssim/adapter"]["mean"] for of in of_sex.values()] == pytest.approx([0.15, 0.6])
    assert [of["mse/gain"]["mean"] for of in of_sex.values()] == pytest.approx([1, 1])


def test_pictures_and_report_are_there(runs: Path) -> None:
    folder = runs / "fold0" / "evaluation"
    report = (folder / "report.html").read_text()
    assert "Memorisation audit: too few films to say." in report
    assert report.index("better than the base? ") < report.index("<img"), "what was found comes first"
    for name in ("films", "noise_levels", "nearest"):
        assert (folder / f"{name}.png").stat().st_size > 1000
        assert f'<img alt="{name}" src="data:image/png;base64,' in report
    assert '<img alt="curves"' in report, "of training"
    for text in ("floor: the noisy film itself", "normalised: adapter", "another patient&#x27;s real film", "fp32"):
        assert text in report, text


def test_films_too_good_to_be_true_are_said_to_be(
    runs: Path, tiny_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    """The held-out films themselves for generated ones: too few for a distance to show it, but they are copies."""
    film_of = {row["text"]: tiny_data / row["file_name"] for row in read_metadata(tiny_data)}

    def copies(args, pipeline, resolution, once, captions, doing, seeds=None) -> torch.Tensor:
        return torch.stack([load_film(film_of[caption], resolution) for caption in captions])

    monkeypatch.setattr(evaluate, "draw_films", copies)
    measure("--lora", runs / "fold0", "--mixed_precision", "no", "--output_dir", tmp_path)
    metrics = json.loads((tmp_path / "metrics.json").read_text())
    assert metrics["distribution"]["copies"] > 0
    assert metrics["memorisation"]["verdict"] == FAILED
    assert "too good to be true" in capsys.readouterr().out
    assert "too good to be true" in (tmp_path / "report.html").read_text()


def test_an_evaluation_that_was_cut_off_goes_on(runs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    quick = (
        "--lora",
        runs / "fold0",
        "--num_inference_steps",
        "2",
        "--mixed_precision",
        "no",
        "--output_dir",
        tmp_path,
    )

    class CutOff(Exception):
        pass

    def cut_off(*args, **kwargs):
        raise CutOff

    with monkeypatch.context() as patch:
        patch.setattr(evaluate, "summarise_sets", cut_off)
        with pytest.raises(CutOff):
            measure(*quick)
    left = sorted(path.name for path in tmp_path.iterdir())
    assert "unfinished-generating.safetensors" in left and "unfinished-adapter.safetensors" in left
    monkeypatch.setattr(evaluate, "sample", cut_off)
    with monkeypatch.context() as patch:
        patch.setattr(evaluate, "score_model", cut_off)
        measure(*quick)
    for path in (runs / "fold0" / "evaluation").iterdir():
        assert path.read_bytes() == (tmp_path / path.name).read_bytes(), path.name
    assert not list(tmp_path.glob("unfinished-*"))
    with pytest.raises(CutOff):
        measure(*quick)  # nothing is left to go on from


def test_evaluation_repeats_to_the_byte(runs: Path, tmp_path: Path) -> None:
    measure(
        "--lora", runs / "fold0", "--num_inference_steps", "2", "--mixed_precision", "no", "--output_dir", tmp_path
    )
    for path in sorted(tmp_path.iterdir()):
        assert path.read_bytes() == (runs / "fold0" / "evaluation" / path.name).read_bytes(), path.name


def test_an_adapted_decoder_is_scored_beside_the_bases_own(runs: Path, tiny_base: Path, tmp_path: Path) -> None:
    run = Path(shutil.copytree(runs / "fold0", tmp_path / "fold0"))
    quick = ("--lora", run, "--num_inference_steps", "2", "--mixed_precision", "no")
    before = json.loads((run / "evaluation" / "metrics.json").read_text())
    state = decoder_state(load_base(str(tiny_base)).vae)
    state["decoder.conv_out.bias"] += 0.2
    save_file(state, run / DECODER_NAME)
    measure(*quick)
    metrics = json.loads((run / "evaluation" / "metrics.json").read_text())
    part = metrics["vae_decoder"]
    assert part["sha256"] == sha256_file(run / DECODER_NAME)
    for name in ("ssim", "psnr"):
        ceiling = part["ceiling"][name]
        assert ceiling["own"] == before["bounds"][name]["ceiling"]
        assert ceiling["adapted"] == metrics["bounds"][name]["ceiling"] != ceiling["own"]
        assert ceiling["gain"]["mean"] == pytest.approx(ceiling["adapted"]["mean"] - ceiling["own"]["mean"])
        assert ceiling["gain"]["interval"][0] <= ceiling["gain"]["mean"] <= ceiling["gain"]["interval"][1]
        figures, old = part["rebuilt"]["0.5"][name], before["rebuilt"]["0.5"][name]
        assert figures["own"] == old["adapter"]
        assert figures["own_normalised"] == pytest.approx(old["adapter_normalised"])
        assert figures["adapted"] == metrics["rebuilt"]["0.5"][name]["adapter"] != old["adapter"]
        assert metrics["rebuilt"]["0.5"][name]["base"] == old["base"], "the base keeps its own decoder"
        assert metrics["rebuilt"]["0.5"][name]["base_normalised"] == pytest.approx(old["base_normalised"])
    assert metrics["noise_prediction_mse"] == before["noise_prediction_mse"]
    assert "the adapted decoder" in (run / "evaluation" / "report.html").read_text()

    shutil.copytree(runs / "fold1", tmp_path / "fold1")
    with pytest.raises(Refused, match="evaluate them with --no_vae_decoder"):
        measure("--cross_validation", tmp_path)
    measure(*quick, "--no_vae_decoder")
    for path in sorted((run / "evaluation").iterdir()):
        assert path.read_bytes() == (runs / "fold0" / "evaluation" / path.name).read_bytes(), path.name


def test_prompts_are_asked_whether_they_are_followed_where_the_table_has_boxes(
    tiny_base: Path, own_data: Path, tmp_path: Path
) -> None:
    """Of a base and an adapter that draw noise only the form can be checked: counts, bounds, calibration, pages."""
    rows = [json.loads(line) for line in (own_data / "metadata.jsonl").open()]
    for i, row in enumerate(rows):
        side = ("left", "right")[i % 2]
        row["boxes"] = [{"finding": "mass", "side": side, "box": [0, 0, 1, 1]}] if row["findings"] else []
    (own_data / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    train(tiny_base, own_data, tmp_path / "fold0", "--max_train_steps", "2")
    measure(
        "--lora", tmp_path / "fold0", "--num_inference_steps", "2", "--mixed_precision", "no", "--num_prompted", "7"
    )
    folder = tmp_path / "fold0" / "evaluation"
    followed = json.loads((folder / "metrics.json").read_text())["prompt_followed"]
    for model in ("base", "adapter"):
        assert followed[model]["mass"]["films"] == 8, "as many of each side"
    films_that_show_it = sum(bool(row["boxes"]) for row in rows)
    assert (
        followed["reader"]["mass"]["films"]
        == followed["reader_after_round_trip"]["mass"]["films"]
        == films_that_show_it
    )
    assert set(followed["thresholds"]) == {"left nodule or mass", "right nodule or mass"}
    report = (folder / "report.html").read_text()
    assert '<img alt="findings"' in report and "prompted finding and side" in report


def test_variety_is_asked_of_captions_that_patients_share() -> None:
    captions = [*"vwxyz", *"vwxyz", "z", "v", "alone"]
    patients = [*"abcde", *"fghij", "k", "a", "l"]
    order = ["alone", *"vwxyz"]
    chosen, places = evaluate.shared_captions(captions, patients, order)
    assert chosen == [*"zvwxy"], "the commonest first"
    assert places == [[4, 9, 10], [0, 5], [1, 6], [2, 7], [3, 8]], "one film a patient"
    films = torch.arange(13)
    one, other, groups = evaluate.pairs_of(films, places)
    assert (one.tolist(), other.tolist()) == ([4, 4, 9, 0, 1, 2, 3], [9, 10, 10, 5, 6, 7, 8])
    assert groups == ["0", "0", "0", "1", "2", "3", "4"]
    assert evaluate.shared_captions(captions[:4], patients[:4], order[1:5]) == ([*"vwxy"], [])


def test_random_pairs_are_of_different_patients() -> None:
    patients = ["a", "a", "b", "c", "c", "c"]
    pairs = evaluate.other_patients(patients, seed=0)
    assert all(patients[i] != patients[j] for i, j in enumerate(pairs))
    assert evaluate.other_patients(["a", "a"], seed=0) == [0, 1]


def test_cross_validation_averages_folds_and_pools_films(runs: Path, tmp_path: Path) -> None:
    measure("--cross_validation", runs, "--output_dir", tmp_path)
    summary = json.loads((tmp_path / "summary.json").read_text())
    figure = summary["figures"]["adapter/ssim/0.5"]
    folds = [json.loads((runs / f"fold{fold}" / "evaluation" / "metrics.json").read_text()) for fold in (0, 1)]
    means = [fold["rebuilt"]["0.5"]["ssim"]["adapter"]["mean"] for fold in folds]
    assert figure["by_fold"] == pytest.approx(means)
    assert figure["mean"] == pytest.approx(statistics.fmean(means))
    assert figure["sd"] == pytest.approx(statistics.stdev(means))
    assert summary["films"] == 16
    assert summary["patients"] == 8
    gain = summary["figures"]["gain/ssim/0.5"]
    assert gain["pooled"] == pytest.approx(figure["pooled"] - summary["figures"]["base/ssim/0.5"]["pooled"])
    trained_on = [read_config(runs / f"fold{fold}")["films"]["training"] for fold in (0, 1)]
    test_to_train = statistics.fmean(fold["films"] / films for fold, films in zip(folds, trained_on, strict=True))
    reach = 12.706 * figure["sd"] * (1 / 2 + test_to_train) ** 0.5  # t of one degree of freedom
    assert figure["interval"] == pytest.approx([figure["mean"] - reach, figure["mean"] + reach], rel=1e-4)
    assert (tmp_path / "summary.csv").read_text().count("\n") == len(summary["figures"]) + len(summary["sets"]) + 1
    report = (tmp_path / "report.html").read_text()
    for text in ("Cross-validation, 2 of 5 folds", "SSIM, rebuilt from 0.5: gain over the base (positive is better)",
                 "too few films to say", "these distances flatter a run that memorises", "guidance_scale 4.0", "base model: ",
                 "MSE of the prediction at t = 50: adapter", "MS-SSIM, noisy film of strength 0.3 itself (floor)",
                 "PSNR, dB, with the real film of its caption: two unrelated real films"):  # fmt: skip
        assert text in report, text
    for fold in (0, 1):
        assert sha256_file(runs / f"fold{fold}" / WEIGHTS_NAME) in report
    share = summary["sets"]["memorisation/pixels/probability"]
    assert len(share["by_fold"]) == 2 and share["mean"] == pytest.approx(statistics.fmean(share["by_fold"]))
    pooled = summary["distribution"]
    assert (pooled["films"], pooled["generated"]["frechet"]) == (8, None)
    assert pooled["generated"]["kernel"] > pooled["real"]["kernel"]


def test_a_fold_of_a_single_patient_is_averaged_in_what_it_has(runs: Path, tmp_path: Path) -> None:
    """It has no two films of different patients."""
    few = Path(shutil.copytree(runs, tmp_path / "few"))
    path = few / "fold1" / "evaluation" / "films.jsonl"
    rows = [{name: row[name] for name in row if "random_pair" not in name} for row in read_jsonl(path)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    measure("--cross_validation", few, "--output_dir", tmp_path / "summary")
    figures = json.loads((tmp_path / "summary" / "summary.json").read_text())["figures"]
    assert "adapter/ssim/0.5" in figures and not [name for name in figures if "random_pair" in name]


def test_two_cross_validations_are_compared_film_by_film(runs: Path, tmp_path: Path) -> None:
    """Of one with itself nothing is gained; of one that is worse by a hundredth on every film, exactly that."""
    measure("--cross_validation", runs, "--against", runs, "--output_dir", tmp_path / "same")
    figures = json.loads((tmp_path / "same" / "summary.json").read_text())["against"]["figures"]
    assert {of["gain"] for of in figures.values()} == {0.0}
    assert figures["ssim/0.5"]["p"] is None
    worse = Path(shutil.copytree(runs, tmp_path / "worse"))
    for path in worse.glob("fold*/evaluation/films.jsonl"):
        rows = [json.loads(line) for line in path.open()]
        for row in rows:
            row["adapter/ssim/0.5"] -= 0.01
            row["adapter/mse/50"] += 0.01
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    measure("--cross_validation", runs, "--against", worse, "--output_dir", tmp_path / "better")
    against = json.loads((tmp_path / "better" / "summary.json").read_text())["against"]
    assert (against["films"], against["patients"]) == (16, 8)
    for name in ("ssim/0.5", "mse/50"):
        assert against["figures"][name]["gain"] == pytest.approx(0.01)
        assert against["figures"][name]["interval"] == pytest.approx([0.01, 0.01])
    assert [name for name, of in against["figures"].items() if "p" in of] == ["ssim/0.5"], "one figure is tested"
    assert against["figures"]["ssim/0.5"]["p"] < 0.01
    page = (tmp_path / "better" / "report.html").read_text()
    assert "p (Wilcoxon, by patient;" in page and "against worse:" in page and str(tmp_path) not in page
    shutil.rmtree(worse / "fold1")
    shutil.copytree(worse / "fold0", worse / "fold1")
    table = worse / "fold1" / "evaluation" / "films.jsonl"
    table.write_text(table.read_text().replace("images/", "others/"))
    with pytest.raises(Refused, match="scored other films"):
        measure("--cross_validation", runs, "--against", worse)
    figures = worse / "fold0" / "evaluation" / "metrics.json"
    for path in worse.glob("fold*/evaluation/metrics.json"):
        path.write_text(path.read_text().replace('"resolution": 64', '"resolution": 128'))
    with pytest.raises(Refused, match="differ in resolution"):
        measure("--cross_validation", runs, "--against", worse)
    for name in ("films.jsonl", "features.safetensors"):
        figures.with_name(name).unlink()
        with pytest.raises(Refused, match="fold0/evaluation is not whole"):
            measure("--cross_validation", worse)


def test_folds_that_do_not_belong_together_are_refused(runs: Path, tmp_path: Path) -> None:
    out = Path(shutil.copytree(runs, tmp_path / "out"))
    shutil.copytree(out / "fold1", out / "fold1-again")
    with pytest.raises(Refused, match="held out in two of the folds"):
        measure("--cross_validation", out)
    shutil.rmtree(out / "fold1-again")
    path = out / "fold1" / "evaluation" / "metrics.json"
    path.write_text(path.read_text().replace('"guidance_scale": 4.0', '"guidance_scale": 7.5'))
    with pytest.raises(Refused, match="differ in sampling"):
        measure("--cross_validation", out)
    (out / "fold0" / WEIGHTS_NAME).write_bytes(b"trained anew since")
    path.write_text(path.read_text().replace('"guidance_scale": 7.5', '"guidance_scale": 4.0'))
    with pytest.raises(Refused, match="fold0/evaluation is of another adapter"):
        measure("--cross_validation", out)
    for half in ("{", "[3]"):
        path.write_text(half)
        with pytest.raises(Refused, match=r"fold1/evaluation/metrics\.json cannot be read .*evaluate that fold again"):
            measure("--cross_validation", out)


def test_a_folder_that_cannot_be_written_is_refused_before_anything_is_loaded(
    runs: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def load_base(*args) -> None:
        raise AssertionError("weights load before the door is passed")

    monkeypatch.setattr(evaluate, "load_base", load_base)
    with pytest.raises(OSError, match=r"config\.json"):
        measure("--lora", runs / "fold0", "--output_dir", runs / "fold0" / "config.json")


def test_several_processes_are_refused(runs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each would evaluate everything, and write into the others' files."""
    monkeypatch.setattr(evaluate, "Accelerator", lambda **kwargs: SimpleNamespace(num_processes=2))
    with pytest.raises(Refused, match="start it with python evaluate.py"):
        measure("--lora", runs / "fold0")


def test_only_what_means_the_same_is_compared(runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    other = Path(shutil.copytree(runs, tmp_path / "other"))

    def change(name: str, value: object, part: str = "settings") -> None:
        for path in other.glob("fold*/evaluation/metrics.json"):
            metrics = json.loads(path.read_text())
            metrics[part][name] = value
            path.write_text(json.dumps(metrics))

    for path in other.glob("fold*/evaluation/metrics.json"):
        path.write_text(path.read_text().replace('"predicts": "epsilon"', '"predicts": "v_prediction"'))
    measure("--cross_validation", runs, "--against", other, "--output_dir", tmp_path)
    figures = json.loads((tmp_path / "summary.json").read_text())["against"]["figures"]
    assert set(figures) == {
        f"{name}/{strength}" for name in ("ssim", "psnr", "ms_ssim") for strength in (0.3, 0.5, 0.7)
    }
    said = "ot compared: mse: the two predict something else"
    assert said in capsys.readouterr().out and said in (tmp_path / "report.html").read_text()
    change("rescale_betas_zero_snr", True)
    measure("--cross_validation", runs, "--against", other, "--output_dir", tmp_path)
    against = json.loads((tmp_path / "summary.json").read_text())["against"]
    assert against["figures"] == {} and len(against["left_out"]) == 1
    change("guidance_scale", 7.5, "sampling")
    with pytest.raises(Refused, match="differ in sampling; only runs evaluated alike"):
        measure("--cross_validation", runs, "--against", other)


def test_another_feature_space_is_named_with_its_figures(
    runs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def halves(films: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        features = films.float().flatten(1)[:, ::64]
        return features, features

    monkeypatch.setitem(evaluate.SPACES, "xrv", lambda device: FilmSpace("xrv", "every 64th pixel", halves))
    more = ("--features", "xrv", "--num_inference_steps", "1", "--output_dir", tmp_path)
    measure("--lora", runs / "fold0", *more)
    metrics = json.loads((tmp_path / "metrics.json").read_text())
    assert metrics["features"] == metrics["distribution"]["encoder"] == "xrv"
    assert metrics["distribution"]["features"] == 64
    assert metrics["distribution"]["generated"]["frechet"] is None, "8 films cannot carry 64 numbers"
    assert "every 64th pixel" in (tmp_path / "report.html").read_text()


@pytest.fixture(scope="module")
def read_runs(tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two evaluated folds of enough patients for findings to be read."""
    folder = tmp_path_factory.mktemp("read")
    data = build_data(folder / "data", num_patients=120, films_each=1)
    rows = [json.loads(line) for line in (data / "metadata.jsonl").open()]
    for i, row in enumerate(rows[:-2]):
        row["sex"] = "MMFF"[i % 4]
    (data / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for fold in ("0", "1"):
        run = folder / "out" / f"fold{fold}"
        train(tiny_base, data, run, "--fold", fold, "--max_train_steps", "2")
        measure("--lora", run, "--num_inference_steps", "2", "--mixed_precision", "no")
    return folder / "out"


def test_what_captions_say_is_read_in_films(read_runs: Path) -> None:
    folder = read_runs / "fold0" / "evaluation"
    metrics = json.loads((folder / "metrics.json").read_text())
    part = metrics["alignment"]["labels"]["pneumonia"]
    assert (part["films"], part["positive"]) == (24, 12)
    assert part["shuffled"]["interval"][0] < 0.5 < part["shuffled"]["interval"][1]
    assert set(metrics["alignment"]["mean"]) == {
        "generated",
        "base",
        "real",
        "shuffled",
        "new_captions",
        "within_view",
    }
    assert metrics["alignment"]["mean"]["within_view"] is None, "all films are PA"
    assert metrics["counterfactual"]["pneumonia"]["pairs"] == 12
    assert metrics["tstr"]["films"] == 24
    rows = [json.loads(line) for line in (folder / "readings.jsonl").open()]
    assert len(rows) == 24
    for kind in ("generated", "base", "real"):
        truth, scores = zip(*((row["asserted"]["pneumonia"], row[kind]["pneumonia"]) for row in rows), strict=True)
        assert roc_auc_score(truth, scores) == pytest.approx(part[kind]["mean"])
    page = (folder / "report.html").read_text()
    for text in ("mean over findings", "ceiling: the real films", "generated from 24 captions", "not to be shared"):
        assert text in page
    captions = metrics["memorisation"]["captions"]
    assert captions["held_out"] == 24, "every patient is of another age, so every caption is of one film"
    assert captions["training"] == 86, "of 96 patients ten validate"
    lines = [line.split("\t") for line in (folder / "captions.txt").read_text().splitlines()]
    assert len(lines) == 8 and all("chest radiograph" in caption for _, caption in lines)
    further = [float(value) for value, _ in lines]
    assert further == sorted(further, reverse=True)
    assert "move the prediction from pure noise" in page
    groups = metrics["by_group"]["sex"]
    assert {sex: of["films"] for sex, of in groups.items()} == {"F": 12, "M": 12}
    for sex, of in groups.items():
        assert of["kernel"]["generated"]["mean"] > of["kernel"]["real"]["mean"], sex
        assert of["auroc"]["generated"] is None, "of six patients with and six without"
    assert "other real films of the group" in page and "sex: F" in page


def test_folds_are_read_together(read_runs: Path, tmp_path: Path) -> None:
    measure("--cross_validation", read_runs, "--against", read_runs, "--output_dir", tmp_path)
    summary = json.loads((tmp_path / "summary.json").read_text())
    part = summary["alignment"]["labels"]["pneumonia"]
    assert (part["films"], part["positive"]) == (48, 24)
    assert len(summary["tstr"]["real"]["by_fold"]) == 2
    assert summary["against"]["alignment"]["pneumonia"] == {"gain": 0.0, "interval": [0.0, 0.0]}
    page = (tmp_path / "report.html").read_text()
    of_sex = summary["by_group"]["sex"]
    assert {sex: of["films"] for sex, of in of_sex.items()} == {"F": 24, "M": 24}
    assert of_sex["F"]["auroc"]["generated"]["findings"] == 1, "of twelve patients with and twelve without"
    assert summary["distribution"]["base"]["kernel"] is not None
    assert "AUROC of captions: pneumonia" in page
    assert page.count("data:image/png;base64,") == 1, "films of patients are not on it"
    assert base64.b64encode((tmp_path / "folds.png").read_bytes()).decode() in page
    other = Path(shutil.copytree(read_runs, tmp_path / "other"))
    for path in other.glob("fold*/evaluation/readings.jsonl"):
        rows = [json.loads(line) for line in path.open()]
        for row in rows:
            row["generated"]["pneumonia"] = 1.0 if row["asserted"]["pneumonia"] else -1.0
        path.write_text("".join(json.dumps(row) + "\n" for row in reversed(rows)))
    measure("--cross_validation", other, "--against", read_runs, "--output_dir", tmp_path)
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert summary["alignment"]["labels"]["pneumonia"]["generated"]["mean"] == 1
    assert summary["against"]["alignment"]["pneumonia"]["gain"] == pytest.approx(1 - part["generated"]["mean"])
    for path in other.glob("fold*/evaluation/readings.jsonl"):
        rows = [json.loads(line) for line in path.open()]
        for row in rows:
            row["real"]["pneumonia"] += 0.01
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    measure("--cross_validation", other, "--against", read_runs, "--output_dir", tmp_path / "probes")
    against = json.loads((tmp_path / "probes" / "summary.json").read_text())["against"]
    assert against["alignment"] == {} and "the probes differ" in against["left_out"][0]
    assert "as many real films" in page


def test_other_data_than_trained_on_is_refused(tiny_base: Path, own_data: Path, tmp_path: Path) -> None:
    train(tiny_base, own_data, tmp_path / "run", "--max_train_steps", "1")
    table = own_data / "metadata.jsonl"
    table.write_text(table.read_text().replace("Pneumonia", "Normal"))
    with pytest.raises(Refused, match="not the data"):
        measure("--lora", tmp_path / "run")


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ([], "nothing given"),
        (["--lora", "a", "--cross_validation", "b"], "both"),
        (["--lora", "a", "--against", "b"], "--against compares"),
        (["--lora", "a", "--seed", "-1"], "--seed -1"),
        (["--lora", "a", "--seed", str(2**64)], f"--seed {2**64}"),
        (["--lora", "/nowhere"], "no training run at"),
        (["--lora", str(ROOT / "assets" / "cxr-tiny" / "unet")], "not that of a training run"),
        (["--cross_validation", "/nowhere"], "0 evaluated folds"),
        (["--lora", "/nowhere", "--batch_size", "0"], "--batch_size 0"),
    ],
)
def test_bad_input_is_refused_in_words(args: list[str], message: str) -> None:
    with pytest.raises(Refused, match=message):
        measure(*args)
