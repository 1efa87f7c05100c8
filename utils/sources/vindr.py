"""VinDr-CXR, Vietnam: 18,000 frontal DICOM films, each labelled by three radiologists; who the patients are is not told."""

from collections import Counter, defaultdict

from utils.captions import caption
from utils.films import Film
from utils.metadata import parse_table, path_fault
from utils.mirror import Mirror
from utils.refusal import Refused

NAME = "vindr"
COUNT, SIZE, TEXT = "18,000", "150 GB", "labels"
LICENSE = "PhysioNet Credentialed Health Data License 1.5.0"
RESTRICTED = True
TERMS = """\
VinDr-CXR (Nguyen et al., Scientific Data 2022) is given to credentialed users of PhysioNet who have signed its data use
agreement: no passing on, no attempt to tell who a patient is. Ask for it at https://physionet.org/content/vindr-cxr, download
it with your own account, and name the folder with --mirror. Nothing is downloaded here. It does not say which films are of
one patient, so it cannot be folded by patient: train with --group_by image, knowing that a patient may be on both sides."""
EXAMPLE = "python download.py --source vindr --accept_license --mirror FOLDER (with annotations/ and train/)"

VIEW = "PA"  # of all its films
PARTS = ("train", "test")
KAGGLE_TABLE = "train.csv"
KAGGLE_COLUMNS = ("image_id", "class_name", "rad_id")
MAJORITY = 2  # of three radiologists
WRITTEN_OUT = {"ILD": "Interstitial lung disease", "COPD": "COPD", "Enlarged PA": "Enlarged pulmonary artery"}


def list_films(mirror: Mirror) -> list[Film]:
    """Return all films, by name; a finding counts where two of the three radiologists saw it.

    Args:
        mirror: a folder as PhysioNet delivers it (`annotations/image_labels_train.csv` beside `train/`), or the part of
            it that Kaggle does (`train.csv` beside `train/`).

    Raises:
        Refused: without a table, or for one that cannot be used.
    """
    films = []
    for part in PARTS:
        table = f"annotations/image_labels_{part}.csv"
        content = mirror.read(table)
        if content is not None:
            films += part_films(part, votes_of_labels(table, content))
    kaggle = mirror.read(KAGGLE_TABLE) if not films else None
    if kaggle is not None:
        films = part_films("train", votes_of_boxes(kaggle))
    if not films:
        raise Refused(f"--mirror {mirror.place} holds neither annotations/image_labels_train.csv nor {KAGGLE_TABLE}")
    return films


def votes_of_labels(table: str, content: bytes) -> dict[str, list[set[str]]]:
    """Return for each film what each of its radiologists saw; the test films have one row, which is their consensus."""
    votes = defaultdict(list)
    for row in parse_table(table, content, ("image_id",)):
        labels = {name for name, value in row.items() if name not in ("image_id", "rad_id") and value in ("1", "1.0")}
        votes[row["image_id"]].append(labels)
    return votes


def votes_of_boxes(content: bytes) -> dict[str, list[set[str]]]:
    """Return the same of Kaggle's table, which has one row a box."""
    seen = defaultdict(lambda: defaultdict(set))
    for row in parse_table(KAGGLE_TABLE, content, KAGGLE_COLUMNS):
        seen[row["image_id"]][row["rad_id"]].add(row["class_name"])
    return {image: list(by_radiologist.values()) for image, by_radiologist in seen.items()}


def part_films(part: str, votes: dict[str, list[set[str]]]) -> list[Film]:
    """Return the films of a part of the set, by name."""
    return [film_of(part, image, sights) for image, sights in sorted(votes.items())]


def film_of(part: str, image: str, sights: list[set[str]]) -> Film:
    """Return what the radiologists agreed on of a film: nothing at all is no caption."""
    path = f"{part}/{image}.dicom"
    if path_fault(path) or "/" in image:
        raise Refused(f"image_id {image!r} is no name of a film; expected letters and digits")
    counts = Counter(name for sight in sights for name in sight)
    agreed = {name for name, count in counts.items() if count >= min(MAJORITY, len(sights))}
    # "Other disease", "Other diseases" and "Other lesion" say nothing that a caption could
    named = sorted(
        WRITTEN_OUT.get(name, name.capitalize()) for name in agreed if not name.startswith(("Other ", "No "))
    )
    findings = named or ([] if "No finding" in agreed else None)
    return Film(
        source_id=f"{part}/{image}",
        path=path,
        file_name=f"images/{image}.png",
        text=caption(VIEW, None, None, findings, image) if findings is not None else "",
        findings=findings,
        view=VIEW,
    )
