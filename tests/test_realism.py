"""Sets of films beside real ones: the figures of honest sets, and what the usual mistakes look like in them. Hermetic."""

from functools import partial
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

from tests.conftest import ROOT
from utils.audit import audit, caption_pull, compare_pulls, count_copies, is_near_copy, suspects
from utils.distances import nearest_neighbours
from utils.encoders import bundled_space, measure_films
from utils.images import load_film, thumbnails, to_pixel_values
from utils.metadata import read_metadata
from utils.pipeline import load_base
from utils.realism import compare_halves, compare_sets, pair_similarity, set_figures
from utils.release import FAILED, TOO_FEW
from utils.validation import decode

DEMO = ROOT / "assets" / "demo"
SIZE = 90  # films a set, three of each of 30 patients; the other 270 are the pool
HELD_OUT, POOL = [f"patient {i // 3}" for i in range(SIZE)], [f"another {i // 3}" for i in range(3 * SIZE)]


@pytest.fixture(scope="module")
def films() -> torch.Tensor:
    """All films of the demo set, patient after patient, patients in an order that chance gave them."""
    patients: dict[str, list[dict]] = {}
    for row in read_metadata(DEMO):
        patients.setdefault(row["patient_id"], []).append(row)
    order = torch.randperm(len(patients), generator=torch.Generator().manual_seed(0)).tolist()
    rows = [row for i in order for row in list(patients.values())[i]]
    return torch.stack([load_film(DEMO / row["file_name"], 128) for row in rows])


@pytest.fixture(scope="module")
def spaces(films: torch.Tensor) -> dict[str, dict[str, torch.Tensor]]:
    """What evaluate.py measures of held-out films, of training films, and of what is passed off as generated."""
    held_out, pool = films[:SIZE], films[SIZE:]
    training = pool[:SIZE]
    blurred = F.avg_pool2d(F.pad(held_out[:, None].float(), (4, 4, 4, 4), mode="replicate"), 9, stride=1)[:, 0]
    sets = {
        "held_out": held_out,
        "pool": pool,
        "training": training,
        "one film, over and over": held_out[:1].expand(SIZE, -1, -1),
        "a few films, over and over": held_out[:27:3].repeat(SIZE // 9, 1, 1),
        "the mean film": pool.float().mean(dim=0).round().to(torch.uint8).expand(SIZE, -1, -1),
        "blurred": blurred.round().to(torch.uint8),
        "turned left to right": held_out.flip(2),
        "negative": 255 - held_out,
        "a quarter of the grey levels": held_out // 4,
        "noise": torch.randint(0, 256, held_out.shape, generator=torch.Generator().manual_seed(1), dtype=torch.uint8),
    }
    space = bundled_space(torch.device("cpu"))
    return {name: measure_films(space, films.split(64), len(films)) for name, films in sets.items()}


@pytest.fixture(scope="module")
def compared(spaces: dict) -> dict:
    features = {name: space["features"] for name, space in spaces.items()}
    return compare_sets(features["held_out"], HELD_OUT, features, features["pool"], POOL, seed=0)


TRAPS = [
    "one film, over and over", "a few films, over and over", "the mean film", "blurred", "turned left to right",
    "negative", "a quarter of the grey levels", "noise",
]  # fmt: skip


@pytest.mark.parametrize("trap", TRAPS)
def test_what_is_not_a_set_of_real_films_is_farther_than_one(compared: dict, trap: str) -> None:
    real, spread = compared["real"], compared["real_sd"]
    assert compared[trap]["frechet"] > 2 * real["frechet"] + 3 * spread["frechet"]
    assert compared[trap]["kernel"] > real["kernel"] + 3 * spread["kernel"]


def test_variety_that_is_lost_shows_in_recall_and_coverage_where_precision_does_not(compared: dict) -> None:
    few = compared["a few films, over and over"]
    assert few["precision"] > 0.9
    assert few["coverage"] < 0.5 * compared["real"]["coverage"]
    assert few["recall"] < 0.5 * compared["real"]["recall"]


def test_other_real_films_are_as_near_as_the_floor(compared: dict) -> None:
    assert abs(compared["training"]["frechet"] - compared["real"]["frechet"]) < 3 * compared["real_sd"]["frechet"]
    assert compared["films"] == SIZE
    assert compared["features"] == 64


def test_the_reference_against_itself_is_too_good_and_said_to_be(compared: dict) -> None:
    """As where the path of the real films is given for both."""
    assert compared["held_out"]["frechet"] == pytest.approx(0, abs=1e-6)
    assert compared["too_good"] == ["held_out"]


def test_a_memorised_set_passes_for_real_and_is_caught_by_the_audit(spaces: dict, compared: dict) -> None:
    assert "training" not in compared["too_good"]
    one_each = {part: {space: films[::3] for space, films in spaces[part].items()} for part in spaces}
    everything = spaces["pool"], spaces["held_out"]
    record = audit(one_each["training"], one_each["training"], one_each["held_out"], *everything, HELD_OUT, 30, seed=0)
    for space in ("features", "pixels"):
        assert record[space]["probability"] == 1.0
        assert record[space]["interval"][0] > 0.6
        assert record[space]["near_copies"] == 1.0
    assert (record["generated"], record["references"], record["training_films"]) == (30, 30, 270)
    assert record["verdict"] == FAILED, "so few films that nothing could pass, but enough to see that"
    assert record["copies"] == 30
    copied, of, ratio = suspects(*(spaces[n]["pixels"] for n in ("training", "training", "held_out")), 1)[0]
    assert copied == of and ratio == 0


def test_films_of_new_patients_are_not_taken_for_memorised(spaces: dict) -> None:
    """Real films in the place of generated ones: nearer to one half of the others as often as to the other half."""
    asked = {space: films[:SIZE] for space, films in spaces["pool"].items()}
    trained = {space: films[SIZE : 2 * SIZE : 3] for space, films in spaces["pool"].items()}
    everything = {space: films[SIZE:] for space, films in spaces["pool"].items()}
    unseen = {space: films[::3] for space, films in spaces["held_out"].items()}
    record = audit(asked, trained, unseen, everything, spaces["held_out"], HELD_OUT, 30, seed=0)
    for space in ("features", "pixels"):
        low, high = record[space]["interval"]
        assert low < 0.5 < high
        assert record[space]["near_copies_interval"][0] < record[space]["near_copies_expected"]
        assert record[space]["near_copies_expected"] == pytest.approx(1.89 / 91)
    assert record["copies"] == 0
    assert record["verdict"] == TOO_FEW


def test_one_copy_among_many_films_convicts(spaces: dict, films: torch.Tensor) -> None:
    """Also one that has been through an autoencoder; nothing is one that films at hand are as like to."""
    asked = {space: films[:SIZE].clone() for space, films in spaces["pool"].items()}
    trained = {space: films[SIZE : 2 * SIZE : 3] for space, films in spaces["pool"].items()}
    everything = {space: films[SIZE:] for space, films in spaces["pool"].items()}
    unseen = {space: films[::3] for space, films in spaces["held_out"].items()}
    asked["pixels"][7] = everything["pixels"][100]
    record = audit(asked, trained, unseen, everything, spaces["held_out"], HELD_OUT, 30, seed=0)
    assert (record["copies"], record["verdict"]) == (1, FAILED)

    pixels = {name: space["pixels"] for name, space in spaces.items()}
    vae = load_base(str(ROOT / "assets" / "cxr-tiny")).vae.eval()
    with torch.no_grad():
        latents = vae.encode(to_pixel_values(films[:4])).latent_dist.mean
        after = thumbnails(decode(vae, latents * vae.config.scaling_factor))
    assert count_copies(after, pixels["held_out"], pixels["pool"]) == 4
    assert count_copies(pixels["pool"], pixels["held_out"], pixels["training"]) == 0
    blank = torch.zeros(2, 1024)
    assert count_copies(blank, torch.cat([blank, pixels["pool"]]), pixels["held_out"]) == 0
    assert count_copies(after, pixels["held_out"], pixels["held_out"]) == 0, "the others are as like"


def test_a_copy_of_a_film_that_was_not_asked_for_is_a_near_copy(spaces: dict) -> None:
    asked = {space: films[120:160] for space, films in spaces["pool"].items()}
    trained = {space: films[:60:3] for space, films in spaces["pool"].items()}
    unseen = {space: films[:60:3] for space, films in spaces["held_out"].items()}
    record = audit(asked, trained, unseen, spaces["pool"], spaces["held_out"], HELD_OUT, 20, seed=0)
    assert record["pixels"]["probability"] < 0.8
    assert record["pixels"]["near_copies"] == 1.0
    assert record["verdict"] == FAILED


def test_a_plain_film_is_no_near_copy(spaces: dict) -> None:
    """The mean film is nearer to training films than nearly any held-out film is, and as near to held-out ones."""
    train, held_out = (spaces[name]["pixels"] for name in ("pool", "held_out"))
    mean = spaces["the mean film"]["pixels"][:1]
    assert nearest_neighbours(mean, train)[0] < nearest_neighbours(held_out, train)[0].quantile(0.1)
    assert not is_near_copy(mean, train, held_out, HELD_OUT).any()
    assert is_near_copy(train[:9], train, held_out, HELD_OUT).all()


def test_halves_of_real_films_are_as_near_to_one_another_as_generated_ones_that_are_real(spaces: dict) -> None:
    """And blurred ones are not."""
    real, blurred = spaces["held_out"]["features"], spaces["blurred"]["features"]
    both = compare_halves(real, {"same": real, "worse": blurred}, POOL[:SIZE], seed=0)
    assert both["films"] == 45 and both["real"] == both["same"]
    assert both["relative"]["same"] == {
        "frechet": None, "kernel": 0.0, "precision": 1.0, "recall": 1.0, "density": 1.0, "coverage": 1.0
    }  # fmt: skip
    beyond = (both["worse"]["kernel"] - both["real"]["kernel"]) / both["real_sd"]["kernel"]
    assert both["relative"]["worse"]["kernel"] == pytest.approx(beyond) and beyond > 3
    assert compare_halves(real[:3], {"same": real[:3]}, POOL[:3], seed=0) is None, "of one patient"


def test_fewer_films_than_features_have_no_frechet_distance_but_a_kernel_distance() -> None:
    generator = torch.Generator().manual_seed(0)
    a, b = (torch.randn(60, 64, generator=generator) for _ in range(2))
    figures = set_figures(a, b)
    assert figures["frechet"] is None
    assert abs(figures["kernel"]) < 3 * figures["kernel_error"]
    patients = [str(i) for i in range(60)]
    compared = compare_sets(a, patients, {"generated": b}, b, patients, seed=0)
    assert compared["real"]["frechet"] is compared["real_sd"]["frechet"] is None
    assert (compared["real_sd"]["kernel"], compared["too_good"]) == (None, []), "of a pool of one set nothing spreads"
    with pytest.raises(ValueError, match="two of one size"):
        set_figures(a, b[:50])
    assert compare_sets(a[:2], patients[:2], {"generated": b}, b, patients, seed=0) is None


@pytest.mark.parametrize(("films_each", "expected"), [(1, 20), (5, 4), (10, 4)])
def test_the_floor_is_of_as_many_patients_as_the_reference(films_each: int, expected: int) -> None:
    """Two films of a patient are alike: a floor of fewer patients than the reference would be farther, of more nearer.

    A patient of the pool has five films: where the reference has ten of each of two, those of two more are taken.
    """
    generator = torch.Generator().manual_seed(0)
    patients = torch.randn(40, 1, 4, generator=generator)
    pool = (patients + 0.01 * torch.randn(40, 5, 4, generator=generator)).flatten(0, 1)
    reference = torch.randn(20, 4, generator=generator)
    of_reference = [str(i // films_each) for i in range(20)]
    whose = [str(i // 5) for i in range(200)]
    drawn = []
    original = set_figures

    def spy(reference, films):
        drawn.append(len({whose[int((pool == film).all(dim=1).nonzero()[0])] for film in films}))
        return original(reference, films)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("utils.realism.set_figures", spy)
        compare_sets(reference, of_reference, {}, pool, whose, seed=0)
    assert drawn == [expected] * 10


def test_the_floors_spread_is_that_of_sets_that_share_no_film() -> None:
    generator = torch.Generator().manual_seed(0)
    pool, reference = torch.randn(2000, 3, generator=generator), torch.randn(40, 3, generator=generator)
    apart = [set_figures(reference, films)["kernel"] for films in pool.split(40)]
    patients = [str(i) for i in range(100)]
    small = compare_sets(reference, patients[:40], {}, pool[:100], patients, seed=0)
    assert small["real_sd"]["kernel"] == pytest.approx(torch.tensor(apart).std().item(), rel=0.6)


def test_films_of_one_caption_are_as_alike_as_their_pairs(films: torch.Tensor) -> None:
    same = pair_similarity(films[:4], films[:4], ["a", "a", "b", "b"], seed=0)
    other = pair_similarity(films[:4], films[4:8], ["a", "a", "b", "b"], seed=0)
    assert same["mean"] == pytest.approx(1) and same["pairs"] == 4
    assert other["interval"][0] <= other["mean"] <= other["interval"][1] < 0.9
    assert pair_similarity(films[:2], films[2:4], ["a", "a"], seed=0)["interval"] is None
    uneven = pair_similarity(films[[0, 0, 0, 4]], films[[0, 0, 0, 8]], ["a", "a", "a", "b"], seed=0)
    assert uneven["mean"] == pytest.approx((1 + pair_similarity(films[[4]], films[[8]], ["b"], seed=0)["mean"]) / 2)
    assert (uneven["pairs"], uneven["groups"]) == (4, 2)


def test_thumbnails_see_copies_whatever_their_brightness(films: torch.Tensor) -> None:
    rows = thumbnails(torch.stack([films[0], films[0] // 2 + 40, films[1], torch.zeros_like(films[0])]))
    assert rows.shape == (4, 1024)
    assert (rows[0] - rows[1]).norm() < 0.05 * (rows[0] - rows[2]).norm()
    assert rows[3].tolist() == [0.0] * 1024, "a blank film has no direction"


def test_a_caption_learnt_by_heart_pulls_harder() -> None:
    """A UNet whose prediction moves by the caption's tokens, thrice as far for a caption that starts with 7."""

    def text_encoder(ids: torch.Tensor) -> tuple[torch.Tensor]:
        return (ids.float(),)

    def unet(noise: torch.Tensor, timestep: int, hidden: torch.Tensor) -> SimpleNamespace:
        assert timestep == 999
        shift = hidden.sum(dim=1) * torch.where(hidden[:, 0] == 7, 3.0, 1.0)
        return SimpleNamespace(sample=noise + shift[:, None, None, None])

    ids = torch.tensor([[1, 2], [7, 2], [2, 2]])
    pull = partial(caption_pull, unet, text_encoder, empty_ids=torch.zeros(1, 2, dtype=torch.long), latent_shape=(4, 2, 2),
                   timestep=999, batch_size=2, device=torch.device("cpu"))  # fmt: skip
    pulls = pull(input_ids=ids)
    assert pulls.tolist() == pytest.approx([3 * 4, 27 * 4, 4 * 4], rel=1e-5)  # over 16 numbers
    others = torch.linspace(10, 20, 20, dtype=torch.float64)
    record = compare_pulls(pulls.repeat(4), others, seed=0)
    assert (record["training"], record["held_out"]) == (12, 20)
    above = [(others < pull).double().mean().item() for pull in pulls]
    assert record["probability"] == pytest.approx(sum(above) / 3)
    assert record["interval"][0] < record["probability"] < record["interval"][1]
    assert compare_pulls(pulls, others, seed=0) is None, "three captions say nothing"
