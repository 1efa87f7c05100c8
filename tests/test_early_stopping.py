"""Early stopping on paired differences: chance does not reset patience, small steps add up. Hermetic."""

from dataclasses import asdict

import numpy as np

from utils.early_stopping import EarlyStopping

FILMS = np.random.default_rng(0).normal(0.7, 0.09, 48)  # films differ by 0.09, checkpoints by a hundredth of that


def test_a_small_gain_on_every_film_is_a_gain() -> None:
    stopping = EarlyStopping(patience=2)
    for step in range(1, 8):
        noise = np.random.default_rng(step).normal(0, 0.001, 48)
        assert stopping.update(step, (FILMS + 0.001 * step + noise).tolist())
    assert not stopping.should_stop
    assert stopping.best_step == 7


def test_chance_spends_patience_but_the_best_is_still_kept() -> None:
    stopping = EarlyStopping(patience=3)
    stopping.update(1, FILMS.tolist())
    for step in (2, 3, 4):
        noise = np.random.default_rng(step).normal(0, 0.02, 48)
        stopping.update(step, (FILMS + noise - noise.mean() + 0.0001 * step).tolist())
    assert stopping.should_stop
    assert stopping.best_step == 4


def test_steps_too_small_to_see_add_up() -> None:
    stopping = EarlyStopping(patience=4)
    noise = [np.random.default_rng(step).normal(0, 0.003, 48) for step in range(12)]
    for step in range(12):
        stopping.update(step + 1, (FILMS + 0.0005 * step + noise[step] - noise[step].mean()).tolist())
    assert not stopping.should_stop


def test_worse_is_never_best_and_a_tie_keeps_the_earlier() -> None:
    stopping = EarlyStopping(patience=0)
    assert stopping.update(1, [0.5, 0.6])
    assert not stopping.update(2, [0.5, 0.6])
    assert not stopping.update(3, [0.4, 0.5])
    assert stopping.best_step == 1
    assert not stopping.should_stop  # patience 0 never stops


def test_state_survives_json_and_goes_on_alike() -> None:
    import json

    one, other = EarlyStopping(patience=2), EarlyStopping(patience=2)
    one.update(1, FILMS.tolist())
    other = EarlyStopping(**json.loads(json.dumps(asdict(one))))
    for step in (2, 3):
        one.update(step, FILMS.tolist())
        other.update(step, FILMS.tolist())
    assert asdict(one) == asdict(other)
    assert other.should_stop
