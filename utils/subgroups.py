"""For whom are the figures what they are? Films grouped by sex, age, view, and by whether training saw their caption."""

from collections.abc import Collection, Sequence

from utils.metadata import MAX_AGE

AGE_BANDS = {
    "0 to 17": 18,
    "18 to 39": 40,
    "40 to 59": 60,
    "60 to 79": 80,
    "80 or more": MAX_AGE + 1,
}  # years, below which
NOT_KNOWN = "not known"


def values_of(rows: Sequence[dict], views: Sequence[str | None], training_captions: Collection[str]) -> list[dict]:
    """Return the group of each film by attribute: `sex`, `age` and `view`, None where that is not known, and `caption`.

    Args:
        rows: of `metadata.jsonl`.
        views: of the films, from `alignment.views_of`.
        training_captions: that the model was trained on.
    """
    known = set(training_captions)
    sexes = [row.get("sex") for row in rows]
    return [
        {
            "sex": None if sex in (None, "") else str(sex),
            "age": age_band(row.get("age")),
            "view": view or row.get("view") or None,
            "caption": "seen in training" if row["text"] in known else "new",
        }
        for row, sex, view in zip(rows, sexes, views, strict=True)
    ]


def subgroups(values: Sequence[dict]) -> dict[str, dict[str, list[int]]]:
    """Return the places of films by attribute and value.

    Args:
        values: of each film, from `values_of`.

    Returns:
        In order of the values, "not known" last, only for attributes of which two values at least are known: what all films
        share separates none.
    """
    groups: dict[str, dict[str, list[int]]] = {}
    for place, of_film in enumerate(values):
        for attribute, value in of_film.items():
            groups.setdefault(attribute, {}).setdefault(value or NOT_KNOWN, []).append(place)
    ordered = {
        name: dict(sorted(of.items(), key=lambda part: (part[0] == NOT_KNOWN, part))) for name, of in groups.items()
    }
    return {name: of for name, of in ordered.items() if len(of.keys() - {NOT_KNOWN}) > 1}


def join_groups(one: dict[str, dict[str, dict]], other: dict[str, dict[str, dict]]) -> dict[str, dict[str, dict]]:
    """Return figures by attribute and value of two parts that hold the same groups, in one."""
    return {
        attribute: {value: figures | other[attribute][value] for value, figures in of.items()}
        for attribute, of in one.items()
    }


def age_band(age: object) -> str | None:
    """Return "40 to 59" for 45, None for what is no age in years."""
    try:
        years = float("nan" if isinstance(age, bool) else age)
    except (TypeError, ValueError):
        return None
    return next((band for band, end in AGE_BANDS.items() if 0 <= years < end), None)
