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


def subgroups(rows: Sequence[dict], training_captions: Collection[str]) -> dict[str, dict[str, list[int]]]:
    """Return the places of films by attribute and value; films whose table does not say are in no group.

    Args:
        rows: of `metadata.jsonl`.
        training_captions: that the model was trained on.

    Returns:
        By attribute (`sex`, `age`, `view`, `caption`), in order of the values, only where there are two at least: what
        all films share separates none.
    """
    known = set(training_captions)
    groups: dict[str, dict[str, list[int]]] = {"sex": {}, "age": {}, "view": {}, "caption": {}}
    for place, row in enumerate(rows):
        values = {
            "sex": row.get("sex"),
            "age": age_band(row.get("age")),
            "view": row.get("view"),
            "caption": "seen in training" if row["text"] in known else "new",
        }
        for attribute, value in values.items():
            if value is not None and value != "":
                groups[attribute].setdefault(str(value), []).append(place)
    return {attribute: dict(sorted(by_value.items())) for attribute, by_value in groups.items() if len(by_value) > 1}


def age_band(age: object) -> str | None:
    """Return "40 to 59" for 45, None for what is no age in years."""
    try:
        years = float("nan" if isinstance(age, bool) else age)
    except (TypeError, ValueError):
        return None
    return next((band for band, end in AGE_BANDS.items() if 0 <= years < end), None)
