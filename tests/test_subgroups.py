"""Films by sex, age, view and caption: everyone in one group of each, those of whom nothing is known in one of their own."""

import pytest

from utils.subgroups import age_band, subgroups, values_of


def row(text: str = "a", **columns) -> dict:
    return {"file_name": "x.png", "text": text, **columns}


def grouped(rows: list[dict], *views: str) -> dict:
    return subgroups(values_of(rows, views or [None] * len(rows), {"a"}))


def test_films_are_grouped_by_what_the_table_says() -> None:
    rows = [row(sex="F", age=17, view="PA"), row(sex="M", age=18, view="PA"), row("b", age=80), row("b", sex="F")]
    assert grouped(rows) == {
        "sex": {"F": [0, 3], "M": [1], "not known": [2]},
        "age": {"0 to 17": [0], "18 to 39": [1], "80 or more": [2], "not known": [3]},
        "caption": {"new": [2, 3], "seen in training": [0, 1]},
    }


def test_codes_are_values_and_blanks_are_none() -> None:
    assert grouped([row(sex=0), row(sex=1), row(sex="")]) == {"sex": {"0": [0], "1": [1], "not known": [2]}}


def test_a_view_that_only_the_caption_names_is_one() -> None:
    assert grouped([row(), row(view="LL"), row(view="AP")], "PA", None, "AP") == {
        "view": {"AP": [2], "LL": [1], "PA": [0]}
    }


def test_a_table_that_says_nothing_has_no_groups() -> None:
    assert grouped([row(), row()]) == {}


@pytest.mark.parametrize(
    ("age", "band"),
    [(0, "0 to 17"), (17.9, "0 to 17"), (59, "40 to 59"), (110, "80 or more"), (414, None), (-1, None), (None, None),
     ("45", "40 to 59"), ("unknown", None), ("", None), (True, None), (float("nan"), None)],
)  # fmt: skip
def test_ages_that_are_none_are_in_no_band(age: object, band: str | None) -> None:
    assert age_band(age) == band
