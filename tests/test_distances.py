"""Distances against their definitions and known answers, intervals against what they must do. Hermetic."""

import math

import numpy as np
import pytest
import torch
from scipy.linalg import sqrtm
from sklearn.metrics import roc_auc_score
from torchmetrics.image.kid import poly_mmd

from utils.distances import (
    auroc,
    frechet_distance,
    kernel_distance,
    memorisation,
    nearest_neighbours,
    precision_recall,
    weighted_auroc,
)
from utils.refusal import Refused


def features(seed: int, count: int, num_features: int = 5) -> torch.Tensor:
    """Correlated normal features, the same correlation whatever the seed."""
    mixing = np.random.default_rng(99).normal(size=(num_features, num_features))
    return torch.from_numpy(np.random.default_rng(seed).normal(size=(count, num_features)) @ mixing)


def test_frechet_distance_is_heusels_formula() -> None:
    a, b = features(0, 30), features(1, 40).square()
    cov_a, cov_b = np.cov(a.numpy(), rowvar=False), np.cov(b.numpy(), rowvar=False)
    means = (a.mean(dim=0) - b.mean(dim=0)).numpy()
    expected = means @ means + np.trace(cov_a + cov_b - 2 * sqrtm(cov_a @ cov_b).real)
    assert frechet_distance(a, b) == pytest.approx(expected, rel=1e-9)


def test_frechet_distance_of_known_gaussians() -> None:
    """N(0, 1) and N(3, 4) in each of two independent dimensions: 2 (3^2 + (1 - 2)^2) = 20."""
    generator = np.random.default_rng(2)
    a = generator.normal(size=(100_000, 2))
    b = 3 + 2 * generator.normal(size=(100_000, 2))
    assert frechet_distance(torch.from_numpy(a), torch.from_numpy(b)) == pytest.approx(20, rel=0.01)


def test_frechet_distance_to_itself_is_zero_also_with_a_dead_feature() -> None:
    a = features(0, 30)
    a[:, 2] = 1.0  # singular for another reason than too few films
    assert frechet_distance(a, a) == pytest.approx(0, abs=1e-10)
    assert frechet_distance(a.float(), a.float() + 2) == pytest.approx(20, rel=1e-5)  # five features moved by 2


def test_frechet_distance_refuses_too_few_films() -> None:
    with pytest.raises(Refused, match="5 and 30 films"):
        frechet_distance(features(0, 5), features(1, 30))


def brute_kernel_distance(a: np.ndarray, b: np.ndarray) -> float:
    def mean_kernel(x: np.ndarray, y: np.ndarray, skip_diagonal: bool) -> float:
        pairs = [(i, j) for i in range(len(x)) for j in range(len(y)) if not (skip_diagonal and i == j)]
        return float(np.mean([(x[i] @ y[j] / x.shape[1] + 1) ** 3 for i, j in pairs]))

    return mean_kernel(a, a, True) + mean_kernel(b, b, True) - 2 * mean_kernel(a, b, False)


def test_kernel_distance_and_its_error_are_their_definitions(monkeypatch: pytest.MonkeyPatch) -> None:
    """Film by film and left-out film by left-out film, also where the sets are larger than a chunk."""
    monkeypatch.setattr("utils.distances.CHUNK", 4)
    a, b = features(0, 9).numpy(), 0.5 * features(1, 7).numpy() + 0.3
    value, error = kernel_distance(torch.from_numpy(a), torch.from_numpy(b))
    assert value == pytest.approx(brute_kernel_distance(a, b), rel=1e-9)
    without_a = [brute_kernel_distance(np.delete(a, i, axis=0), b) for i in range(len(a))]
    without_b = [brute_kernel_distance(a, np.delete(b, i, axis=0)) for i in range(len(b))]
    assert error == pytest.approx(math.sqrt(8 * np.var(without_a) + 6 * np.var(without_b)), rel=1e-9)


def test_kernel_distance_is_unbiased_and_its_error_covers() -> None:
    """Between equal distributions: the mean over trials is 0, and the error is not smaller than the spread."""
    trials = [kernel_distance(features(2 * i, 20), features(2 * i + 1, 30)) for i in range(200)]
    values, errors = np.array(trials).T
    assert abs(values.mean()) < 3 * values.std() / math.sqrt(200)
    assert errors.mean() > 0.9 * values.std()


def test_kernel_distance_of_two_films_is_refused() -> None:
    with pytest.raises(Refused, match="at least 3"):
        kernel_distance(features(0, 2), features(1, 9))


def test_nearest_neighbours_are_the_nearest_whatever_the_chunk(monkeypatch: pytest.MonkeyPatch) -> None:
    query, reference = features(0, 10), features(1, 30)
    expected = (query[:, None] - reference[None]).norm(dim=2).min(dim=1)
    for chunk in (3, 100):
        monkeypatch.setattr("utils.distances.CHUNK", chunk)
        distances, indices = nearest_neighbours(query, reference)
        torch.testing.assert_close(distances, expected.values)
        assert indices.tolist() == expected.indices.tolist()


def test_a_copy_lies_at_distance_zero() -> None:
    reference = 1000 + features(0, 50)
    distances, indices = nearest_neighbours(reference[[7, 3]].float(), reference.float())
    assert distances.tolist() == [0, 0]
    assert indices.tolist() == [7, 3]


def test_the_nearest_of_the_same_group_does_not_count() -> None:
    films = torch.tensor([[0.0], [0.1], [5.0], [9.0]])
    distances, _ = nearest_neighbours(films, films, torch.tensor([0, 0, 1, 2]))
    assert distances.tolist() == pytest.approx([5.0, 4.9, 4.0, 4.0])
    assert nearest_neighbours(films, films, torch.zeros(4))[0].isinf().all()


def test_memorisation_of_a_fair_model_is_about_a_half() -> None:
    answer = memorisation(features(0, 300), features(1, 400), features(2, 100), seed=0)
    assert answer.interval[0] < 0.5 < answer.interval[1]
    assert answer.interval[1] - answer.interval[0] < 0.25
    assert (answer.num_generated, answer.num_references) == (300, 100)


def test_memorisation_of_a_copying_model_is_nearly_one() -> None:
    train = features(1, 80)
    copies = train[[5, 70, 33, 12]] + torch.tensor([[0.03], [0.01], [0.02], [0.04]])
    assert memorisation(copies, train, features(2, 80), seed=0).probability == 1


def test_memorisation_counts_ties_half_and_repeats_by_seed() -> None:
    reals, generated = features(1, 40), features(0, 20)
    assert memorisation(generated, reals, reals, seed=0).probability == 0.5
    once, again = (memorisation(generated, reals, features(2, 25), seed=3) for _ in range(2))
    assert (once.probability, once.interval) == (again.probability, again.interval)


def test_more_training_than_held_out_films_are_no_memorisation() -> None:
    """Of ten times as many films one is nearer, without a model having seen any."""
    answer = memorisation(features(0, 300), features(1, 1000), features(2, 100), seed=1)
    assert answer.probability < 0.65


def test_more_patients_among_the_training_films_are_no_memorisation() -> None:
    """As many films of ten times as many patients lie closer to anything, without a model having seen any."""
    train, few = features(1, 2000), features(2, 200)
    held_out = few.repeat_interleave(10, dim=0) + 0.01 * features(3, 2000)
    patients = np.arange(200).repeat(10)
    unaware = memorisation(features(0, 2000), train, held_out, seed=1)
    aware = memorisation(features(0, 2000), train, held_out, 1, np.arange(2000), patients)
    assert unaware.probability > 0.75
    assert aware.probability == pytest.approx(0.5, abs=0.06)
    assert aware.num_references == 200


@pytest.mark.parametrize("num_references", [20, 200])
def test_memorisations_interval_holds_the_truth_about_as_often_as_it_says(num_references: int) -> None:
    """Whichever real films there are: a bootstrap of generated ones alone holds it in 49 of the 60 trials with 20."""
    hits = 0
    for trial in range(60):
        sets = (
            features(3 * trial, 200),
            features(3 * trial + 1, num_references),
            features(3 * trial + 2, num_references),
        )
        low, high = memorisation(*sets, seed=trial).interval
        hits += low <= 0.5 <= high
    assert hits >= 52


def test_memorisation_without_films_is_refused() -> None:
    with pytest.raises(Refused, match="no generated"):
        memorisation(features(0, 3)[:0], features(1, 3), features(2, 3), seed=0)


def labelled(seed: int, count: int = 60) -> tuple[np.ndarray, np.ndarray]:
    generator = np.random.default_rng(seed)
    labels = generator.random(count) < 0.4
    return np.round(generator.normal(size=count) + labels, 1), labels  # rounded: some scores are tied


def test_auroc_is_scikit_learns_under_any_weights() -> None:
    scores, labels = labelled(0)
    assert auroc(scores, labels, np.arange(60).astype(str), seed=0)[0] == roc_auc_score(labels, scores)
    weights = np.random.default_rng(1).integers(0, 3, (5, 60))
    expected = [roc_auc_score(labels, scores, sample_weight=row) for row in weights]
    assert weighted_auroc(scores, labels, weights) == pytest.approx(expected)


def test_auroc_interval_is_that_of_patients() -> None:
    """Ten copies of each film say no more than one."""
    scores, labels = labelled(2)
    patients = np.arange(60).astype(str)
    _, once = auroc(scores, labels, patients, seed=0)
    _, copied = auroc(scores.repeat(10), labels.repeat(10), patients.repeat(10), seed=0)
    assert copied == pytest.approx(once)
    _, as_if_independent = auroc(scores.repeat(10), labels.repeat(10), np.arange(600).astype(str), seed=0)
    assert as_if_independent[1] - as_if_independent[0] < 0.5 * (once[1] - once[0])


def test_auroc_interval_covers_the_truth_about_as_often_as_it_says() -> None:
    truth = 0.5 * (1 + math.erf(1 / 2))  # normal scores a standard deviation apart: Phi(1 / sqrt(2))
    patients, covered = np.arange(80).astype(str), 0
    for trial in range(200):
        scores, labels = labelled(1000 + trial, 80)
        _, (low, high) = auroc(scores, labels, patients, trial, 300)
        covered += low <= truth <= high
    assert 0.88 <= covered / 200 <= 0.99


def test_auroc_without_both_labels_says_nothing() -> None:
    area, interval = auroc([0.1, 0.2], [True, True], ["a", "b"], seed=0)
    assert math.isnan(area)
    assert all(math.isnan(end) for end in interval)
    area, interval = auroc([0.1, 0.2], [False, True], ["a", "a"], seed=0)
    assert area == 1
    assert all(math.isnan(end) for end in interval)


def test_features_that_do_not_match_or_are_not_finite_are_told() -> None:
    with pytest.raises(ValueError, match="shapes"):
        nearest_neighbours(features(0, 4), features(0, 4, num_features=3))
    with pytest.raises(ValueError, match="not finite"):
        kernel_distance(features(0, 4) * math.nan, features(1, 4))


def test_precision_recall_of_a_set_with_a_known_answer() -> None:
    """Real films at 0, 1, 2, 3, whose balls reach 1; generated ones at 0.5, within the first two, and at 10."""
    real, generated = torch.tensor([[0.0], [1.0], [2.0], [3.0]]), torch.tensor([[0.5], [10.0]])
    figures = precision_recall(real, generated, k=1)
    assert figures == {"precision": 0.5, "recall": 1.0, "density": 1.0, "coverage": 0.5}


def test_precision_recall_is_its_definitions_whatever_the_chunk(monkeypatch: pytest.MonkeyPatch) -> None:
    """Kynkaanniemi et al. 2019, Eq. 1 and 2; Naeem et al. 2020, Eq. 3 and 5; film by film."""
    real, generated, k = features(0, 23).numpy(), 0.7 * features(1, 17).numpy() + 0.4, 3

    def far(x: np.ndarray, y: np.ndarray) -> float:
        return float(np.linalg.norm(x - y))

    def radii(films: np.ndarray) -> list[float]:
        return [sorted(far(x, y) for j, y in enumerate(films) if j != i)[k - 1] for i, x in enumerate(films)]

    of_real, of_generated = radii(real), radii(generated)
    inside = np.array([[far(r, g) < radius for g in generated] for r, radius in zip(real, of_real, strict=True)])
    within = [any(far(r, g) < radius for g, radius in zip(generated, of_generated, strict=True)) for r in real]
    expected = {
        "precision": inside.any(axis=0).mean(), "recall": np.mean(within), "density": inside.sum() / (k * 17),
        "coverage": inside.any(axis=1).mean(),
    }  # fmt: skip
    for chunk in (4, 100):
        monkeypatch.setattr("utils.distances.CHUNK", chunk)
        figures = precision_recall(torch.from_numpy(real), torch.from_numpy(generated), k)
        assert figures == pytest.approx(expected)


def test_density_and_coverage_of_equal_distributions_are_what_their_authors_say() -> None:
    figures = precision_recall(features(0, 2000), features(1, 2000), k=5)
    assert figures["density"] == pytest.approx(1, abs=0.05)
    assert figures["coverage"] == pytest.approx(1 - 2**-5, abs=0.02)


def test_a_set_of_one_film_repeated_reaches_nothing() -> None:
    """Also where there are more rows than PyTorch measures one by one unasked."""
    real, one = features(0, 60), features(1, 1).expand(60, -1)
    assert precision_recall(real, one, k=5)["recall"] == 0
    assert precision_recall(one, real, k=5)["precision"] == 0


def test_balls_of_more_neighbours_than_films_are_refused() -> None:
    with pytest.raises(Refused, match="more than 5 each"):
        precision_recall(features(0, 5), features(1, 30))


def test_kernel_distance_is_that_of_torchmetrics_on_the_same_features() -> None:
    """Over all films at once, without the subsets that it averages over."""
    a, b = features(0, 40), features(1, 40) + 0.5
    theirs = poly_mmd(a.double(), b.double(), degree=3, gamma=None, coef=1.0)
    assert kernel_distance(a, b)[0] == pytest.approx(theirs.item(), rel=1e-9)


def test_distances_are_torch_fidelitys_on_the_same_features() -> None:
    """Of torch-fidelity 0.4.0: kid_features_to_metric with one subset of all films, gamma None and coef0 1;
    fid_statistics_to_metric; prc_features_to_metric of 5 neighbours.
    """
    a = torch.from_numpy(np.random.default_rng(1).normal(size=(60, 16)))
    b = torch.from_numpy(np.random.default_rng(2).normal(0.3, 1.2, size=(60, 16)))
    assert kernel_distance(a, b)[0] == pytest.approx(0.3652898910039477, rel=1e-6)
    assert frechet_distance(a, b) == pytest.approx(5.562040125384932, rel=1e-9)
    reached = precision_recall(real=b, generated=a, k=5)
    assert reached["precision"] == pytest.approx(0.9833333492279053, abs=1e-6)
    assert reached["recall"] == pytest.approx(0.5333333611488342, abs=1e-6)
