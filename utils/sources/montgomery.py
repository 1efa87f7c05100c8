"""Montgomery County, Maryland: 138 frontal films of a tuberculosis programme, each with a radiologist's reading."""

import re
from collections.abc import Mapping
from pathlib import PurePosixPath

from tqdm import tqdm

from utils.captions import caption
from utils.films import Film
from utils.metadata import MAX_AGE
from utils.mirror import Mirror
from utils.refusal import Refused
from utils.reports import NORMAL, caption_sentences, words

NAME = "montgomery"
COUNT, SIZE, TEXT = "138", "0.6 GB", "readings"
LICENSE = "NLM: attribution"
RESTRICTED = False
TERMS = """\
The Montgomery County set is given by the National Library of Medicine, Bethesda, and the Department of Health and Human Services,
Montgomery County, Maryland. Publications are to name them as its source and to cite Jaeger et al., "Automatic tuberculosis
screening using chest radiographs", and Candemir et al., "Lung segmentation in chest radiographs using anatomical atlases with
nonrigid registration", both IEEE Transactions on Medical Imaging 33(2), 2014."""
EXAMPLE = "python download.py --source montgomery"

MIRROR = "https://openi.nlm.nih.gov/imgs/collections"
ARCHIVE = "NLM-MontgomeryCXRSet.zip"
VIEW = "PA"
FILM = re.compile(r"(?:.*/)?CXR_png/((?:MCU|CHN)CXR_(\d{4})_([01]))\.png")  # masks have the names of their films
READING = re.compile(r"(?:.*/)?ClinicalReadings/((?:MCU|CHN)CXR_\d{4}_[01])\.txt")
SAME_PATIENT = re.compile(r"\(?same pt as ([\w, ]+?)\)?\s*$", re.IGNORECASE | re.MULTILINE)
# "Patient's Sex: F", "Patient's Age: 027Y"; "male , 29yrs", "femal 32yrs", "female24yrs", "male 16month"
HEAD = re.compile(r"\s*(?:patient's (?:sex|age)\s*:|(?:male|femal)e?\s*,?\s*(?:\d|$))", re.IGNORECASE)
SEX = re.compile(r"sex\s*:\s*([MF])\b|\b(male|femal)", re.IGNORECASE)
AGE = re.compile(r"(\d+)\s*(y|mo|m|w|d)?", re.IGNORECASE)
UNITS = {"y": 1, "m": 12, "mo": 12, "w": 52, "d": 365}  # in a year
WRITTEN_OUT = {
    "PTB": "pulmonary tuberculosis", "STB": "secondary pulmonary tuberculosis", "TB": "tuberculosis",
    "RUL": "right upper lobe", "RML": "right middle lobe", "RLL": "right lower lobe", "LUL": "left upper lobe",
    "LLL": "left lower lobe", "RT": "right", "LT": "left", "THEL": "the", "FEILD": "field",
}  # fmt: skip
ABBREVIATION = re.compile(rf"\b(?:{'|'.join(WRITTEN_OUT)})\b", re.IGNORECASE)
# What a film cannot show of a patient under treatment
NOT_SHOWN = words(
    "treat(?:ed|ment)", "therapy", "rx", r"smears?", r"cultures?", "positive TST", "dot", "probes?", "h/o", "no report",
    r"HRZE?\S*", "contact", "N?ATB", "pt", r"for \d+[MY]", "improvements?", "closed", "less apparent",
)  # fmt: skip


def list_films(mirror: Mirror) -> list[Film]:
    """Return all films of the set, by name, with the reading of each.

    Args:
        mirror: holds the zip archive as published or, a folder, the same unpacked.

    Raises:
        Refused: where there is neither, or no film in it.
    """
    return list_readings(mirror, ARCHIVE, NAME)


def list_readings(mirror: Mirror, archive: str, set_name: str) -> list[Film]:
    """Return the films of one of the two sets that the National Library of Medicine gives in this form."""
    members, readings = open_set(mirror, archive)
    films = {match[1]: (name, match) for name in members if (match := FILM.fullmatch(name))}
    if not films:
        raise Refused(f"--mirror {mirror.place} has no film such as CXR_png/{set_name[:3].upper()}CXR_0001_0.png")
    patients = same_patients(readings)
    return [
        film_of(
            name, path, match[3] == "1", readings.get(name, ""), f"{set_name}-{patients.get(name, match[2])}", archive
        )
        for name, (path, match) in sorted(films.items())
    ]


def open_set(mirror: Mirror, archive: str) -> tuple[list[str], dict[str, str]]:
    """Return the paths of all members, and the readings by name of the film; from the archive or unpacked."""
    if not mirror.is_remote and not mirror.path(archive).is_file():
        paths = [path for path in mirror.path("").rglob("*.*") if path.parent.name in ("CXR_png", "ClinicalReadings")]
        members = [path.relative_to(mirror.place).as_posix() for path in paths]
        texts = {match[1]: mirror.read(name) for name in members if (match := READING.fullmatch(name))}
    else:
        plain = mirror.open_zip(archive)
        if plain is None:
            raise Refused(f"--mirror {mirror.place} holds no {archive}")
        infos = [info for info in plain.infolist() if not info.filename.startswith("__MACOSX")]
        members = [info.filename for info in infos]
        wanted = sorted(
            (info for info in infos if READING.fullmatch(info.filename)), key=lambda info: info.header_offset
        )
        texts = {
            READING.fullmatch(info.filename)[1]: plain.read(info)
            for info in tqdm(wanted, "readings", unit="file", disable=None)
        }
    return members, {name: text.decode("utf-8", "replace") for name, text in texts.items()}


def same_patients(readings: Mapping[str, str]) -> dict[str, str]:
    """Return for each film whose reading names others of its patient the first number among them."""
    patients = {}
    for name, reading in sorted(readings.items()):
        match = SAME_PATIENT.search(reading)
        if match is not None:
            names = [name, *re.findall(r"\w+CXR_\d{4}_\d", match[1])]
            known = [patients[other] for other in names if other in patients]
            first = min([*known, *(other.split("_")[1] for other in names)])
            patients |= dict.fromkeys([*names, *(other for other in patients if patients[other] in known)], first)
    return patients


def film_of(name: str, path: str, is_abnormal: bool, reading: str, patient_id: str, archive: str) -> Film:
    """Return what name and reading say of a film."""
    sex, age, statement = parse_reading(reading)
    if not is_abnormal:
        findings = []
    else:
        said = not statement or re.search("tubercul", statement, re.IGNORECASE) and not NORMAL.search(statement)
        findings = ["Tuberculosis"] if said else None
    sentences = [sentence for sentence in caption_sentences(statement, "") if not NOT_SHOWN.search(sentence)]
    if is_abnormal and all(NORMAL.search(sentence) for sentence in sentences):
        sentences = []  # what is abnormal was in what was left out
    if not is_abnormal or not sentences:
        text = caption(VIEW, age, sex, findings, name) if findings is not None else ""
    else:
        text = " ".join([caption(VIEW, age, sex, None), *sentences])
    return Film(
        source_id=name,
        path=path,
        file_name=f"images/{PurePosixPath(path).name}",
        text=text,
        patient_id=patient_id,
        findings=findings,
        view=VIEW,
        age=age,
        sex=sex,
        archive=archive,
    )


def parse_reading(reading: str) -> tuple[str | None, int | None, str]:
    """Return sex, age in years and what is said of the film, with the abbreviations of the trade written out."""
    lines = [line.strip() for line in reading.splitlines() if line.strip()]
    head = [line for line in lines if HEAD.match(line)]
    sex = next((match for line in head if (match := SEX.search(line))), None)
    age = next((match for line in head if (match := AGE.search(line))), None)
    years = int(age[1]) // UNITS[(age[2] or "y").lower()] if age else None
    said = SAME_PATIENT.sub("", "\n".join(line for line in lines if line not in head))
    said = ABBREVIATION.sub(lambda match: WRITTEN_OUT[match[0].upper()], said)
    said = re.sub(r"\s*(?:;|\n|,?\s*\bIMP:)\s*", ". ", said)
    said = re.sub(r"(?:^|(?<=\. ))\d\.(?!\d)\s*", "", said)
    said = re.sub(r",(?=\S)", ", ", re.sub(r"\s*\?\s*(?=\w)", " possible ", said))
    known_sex = None if sex is None else {"m": "M", "f": "F"}[(sex[1] or sex[2])[0].lower()]
    return known_sex, years if years is not None and years <= MAX_AGE else None, " ".join(said.split())
