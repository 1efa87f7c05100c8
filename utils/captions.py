"""A sentence or two for a film of which only labels are known, and long captions fitted into a text encoder's window."""

import hashlib
import re
from collections.abc import Callable, Sequence

VIEW_NAMES = {"PA": "PA", "AP": "AP", "LATERAL": "Lateral", "LL": "Lateral", "RL": "Lateral"}
ADULT_AGE = 18  # years


# Ways to say the same, the usual one first
FILMS = ("{view} chest radiograph", "{view} chest X-ray", "{view} chest film", "{view} view of the chest")
WITHOUT_VIEW = ("Chest radiograph", "Chest X-ray", "Chest film", "Radiograph of the chest")
WITH_FINDINGS = ("{}.", "Findings: {}.", "Signs of {}.", "The film shows {}.")
WITHOUT = (
    "No acute finding.",
    "No acute finding is seen.",
    "There is no acute finding.",
    "The film shows no acute finding.",
)
SHARE_OF_OTHERS = 0.2  # of films have a caption in another way than the usual one


def caption(
    view: str | None, age: int | None, sex: str | None, findings: Sequence[str] | None, film: str | None = None
) -> str:
    """Return a caption that says what the labels say, and leaves out what they do not.

    Labels name neither side nor severity, so the caption never does. No finding reads "No acute finding.", not
    "Normal.": in the published sets the label means that none of the listed findings was reported.

    Args:
        view: "PA", "AP", "LATERAL" ("LL", "RL"); anything else is left out.
        age: in years; under 18 the patient is a boy or a girl.
        sex: "M" or "F"; anything else is left out.
        findings: names in any order; empty for a film without finding, None where nothing is known.
        film: its name, from which it follows whether the caption is in the usual words, as four in five are, or in
            others: a model that has read a label in one phrase only does not know it in another.
    """
    way = phrasing(film)
    view_name = VIEW_NAMES.get((view or "").upper())
    name = FILMS[way].format(view=view_name) if view_name else WITHOUT_VIEW[way]
    patient = describe_patient(age, sex)
    first = f"{name} of {patient}." if patient else f"{name}."
    if findings is None:
        return first
    listed = describe_findings(findings)
    return f"{first} {WITH_FINDINGS[way].format(listed if way else capitalised(listed)) if listed else WITHOUT[way]}"


def phrasing(film: str | None) -> int:
    """Return which way of saying things a film's caption has: 0 is the usual one."""
    if film is None:
        return 0
    draw = int.from_bytes(hashlib.sha256(film.encode()).digest()[:4], "big") / 2**32
    return 1 + int(draw / SHARE_OF_OTHERS * (len(FILMS) - 1)) if draw < SHARE_OF_OTHERS else 0


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
    """Return "effusion and pneumonia": alphabetical, so that equal labels give equal text; "" for none."""
    names = sorted({uncapitalised(name) for name in findings}, key=str.casefold)
    return " and ".join([", ".join(names[:-1]), names[-1]]) if len(names) > 1 else "".join(names)


def capitalised(text: str) -> str:
    return text[:1].upper() + text[1:]


def uncapitalised(name: str) -> str:
    """Return the name with a small first letter, unless its first word is an abbreviation such as "COVID-19"."""
    return name if name[1:2].isupper() else name[:1].lower() + name[1:]


ALWAYS_KEPT = 2  # sentences


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
    sentences = sentences_of(caption)
    kept = min(ALWAYS_KEPT, len(sentences))
    while kept < len(sentences) and count_tokens(" ".join(sentences[: kept + 1])) <= limit:
        kept += 1
    return " ".join(sentences[:kept])


def sentences_of(caption: str) -> list[str]:
    return re.split(r"(?<=[.?!])\s+", caption)
