"""A sentence or two for a film of which only labels are known, and long captions fitted into a text encoder's window."""

import re
from collections.abc import Callable, Sequence

VIEW_NAMES = {"PA": "PA", "AP": "AP", "LATERAL": "Lateral", "LL": "Lateral", "RL": "Lateral"}
ADULT_AGE = 18  # years


def caption(view: str | None, age: int | None, sex: str | None, findings: Sequence[str] | None) -> str:
    """Return a caption that says what the labels say, and leaves out what they do not.

    Labels name neither side nor severity, so the caption never does. No finding reads "No acute finding.", not
    "Normal.": in the published sets the label means that none of the listed findings was reported.

    Args:
        view: "PA", "AP", "LATERAL" ("LL", "RL"); anything else is left out.
        age: in years; under 18 the patient is a boy or a girl.
        sex: "M" or "F"; anything else is left out.
        findings: names in any order; empty for a film without finding, None where nothing is known.
    """
    view_name = VIEW_NAMES.get((view or "").upper())
    film = f"{view_name} chest radiograph" if view_name else "Chest radiograph"
    patient = describe_patient(age, sex)
    first = f"{film} of {patient}." if patient else f"{film}."
    if findings is None:
        return first
    return f"{first} {describe_findings(findings)}"


def describe_patient(age: int | None, sex: str | None) -> str:
    """Return "a 58-year-old man", "an infant girl", "a woman", or "" where neither age nor sex is known."""
    if age is None:
        return {"M": "a man", "F": "a woman"}.get(sex, "")
    if age < ADULT_AGE:
        noun = {"M": "boy", "F": "girl"}.get(sex, "child")
    else:
        noun = {"M": "man", "F": "woman"}.get(sex, "patient")
    if age == 0:
        return "an infant" if noun == "child" else f"an infant {noun}"
    article = "an" if age in (8, 11, 18) or 80 <= age <= 89 else "a"
    return f"{article} {age}-year-old {noun}"


def describe_findings(findings: Sequence[str]) -> str:
    """Return the findings as one sentence in alphabetical order, so that equal labels give equal text."""
    names = sorted({uncapitalised(name) for name in findings}, key=str.casefold)
    if not names:
        return "No acute finding."
    listed = " and ".join([", ".join(names[:-1]), names[-1]]) if len(names) > 1 else names[0]
    return f"{listed[0].upper()}{listed[1:]}."


def uncapitalised(name: str) -> str:
    """Return the name with a small first letter, unless its first word is an abbreviation such as "COVID-19"."""
    return name if name[1:2].isupper() else name[:1].lower() + name[1:]


def fit(caption: str, count_tokens: Callable[[str], int], limit: int) -> str:
    """Return a caption that fits, or as many of its first sentences as do, each whole.

    The first two, which are the view and what matters most, stay whatever their length; the tokenizer then cuts.

    Args:
        caption: sentences, the most telling first.
        count_tokens: of a text, those that begin and end it included.
        limit: most tokens that the text encoder takes.
    """
    if count_tokens(caption) <= limit:
        return caption
    sentences = re.split(r"(?<=[.?!])\s+", caption)
    kept = min(2, len(sentences))
    while kept < len(sentences) and count_tokens(" ".join(sentences[: kept + 1])) <= limit:
        kept += 1
    return " ".join(sentences[:kept])
