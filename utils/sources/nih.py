"""NIH ChestX-ray14: 112,120 frontal films of 30,805 patients, with labels but without reports."""

import re
from dataclasses import replace

from utils.archives import gunzip
from utils.captions import caption
from utils.films import Film
from utils.metadata import MAX_AGE, parse_table, path_fault
from utils.mirror import Mirror
from utils.refusal import Refused

NAME = "nih"
COUNT, SIZE, TEXT = "112,120", "45 GB", "labels"
LICENSE = "NIH ChestX-ray14: unrestricted use with attribution"
RESTRICTED = False
TERMS = """\
NIH ChestX-ray14 may be used without restriction. Its publisher asks you to
  - link to the original download site: https://nihcc.app.box.com/v/ChestXray-NIHCC
  - acknowledge the NIH Clinical Center as the provider of the data
  - cite Wang et al., "ChestX-ray8: Hospital-scale Chest X-ray Database and Benchmarks on Weakly-Supervised
    Classification and Localization of Common Thorax Diseases", CVPR 2017.
Its labels were mined from reports by software; "No Finding" does not mean that the film is normal."""
EXAMPLE = "python download.py --source nih --limit 500"

# The later table has the impossible ages corrected; the packed one is the copy that has an address of its own
TABLES = ("Data_Entry_2017_v2020.csv", "Data_Entry_2017.csv", "Data_Entry_2017_v2020.csv.gz")
COLUMNS = ("Image Index", "Finding Labels", "Patient ID", "Patient Age", "Patient Gender", "View Position")

# The twelve archives as published: name at the host, MD5, films in the order of the table; 45 GB in all
MIRROR = "https://nihcc.box.com/shared/static"
ARCHIVES = (
    ("vfk49d74nhbxq3nqjg0900w5nvkorp5c", "fe8ed0a6961412fddcbb3603c11b3698", 4999),
    ("i28rlmbvmfjbl8p2n3ril0pptcmcu9d1", "ab07a2d7cbe6f65ddd97b4ed7bde10bf", 10000),
    ("f1t00wrtdk94satdfb9olcolqx20z2jp", "2301d03bde4c246388bad3876965d574", 10000),
    ("0aowwzs5lhjrceb3qp67ahp0rd1l1etg", "9f1b7f5aae01b13f4bc8e2c44a4b8ef6", 10000),
    ("v5e3goj22zr6h8tzualxfsqlqaygfbsn", "1861f3cd0ef7734df8104f2b0309023b", 10000),
    ("asi7ikud9jwnkrnkj99jnpfkjdes7l6l", "456b53a8b351afd92a35bc41444c58c8", 10000),
    ("jn1b4mw4n6lnh74ovmcjb8y48h8xj07n", "1075121ea20a137b87f290d6a4a5965e", 10000),
    ("tvpxmn7qyrgl0w8wfh9kqfjskv6nmm1j", "b61f34cec3aa69f295fbb593cbd9d443", 10000),
    ("upyy3ml7qdumlgk2rfcvlb9k6gvqq2pj", "442a3caa61ae9b64e61c561294d1e183", 10000),
    ("l6nilvfa9cg3s28tqv1qc1olm3gnz54p", "09ec81c4c31e32858ad8cf965c494b74", 10000),
    ("hhq8fkdgvcari67vfhs7ppg2w6ni4jze", "499aefc67207a5a97692424cf5dbeed5", 10000),
    ("ioqwiy20ihqwyr8pf4c24eazhh281pbu", "dc9fda1757c2de0032b63347a7d2895c", 7121),
)
ADDRESSES = {f"images_{i:03d}.tar.gz": f"{MIRROR}/{key}.gz" for i, (key, _, _) in enumerate(ARCHIVES, start=1)} | {
    TABLES[-1]: f"https://raw.githubusercontent.com/mlmed/torchxrayvision/HEAD/torchxrayvision/data/{TABLES[-1]}"
}
MD5S = {f"images_{i:03d}.tar.gz": md5 for i, (_, md5, _) in enumerate(ARCHIVES, start=1)}


def list_films(mirror: Mirror) -> list[Film]:
    """Return all films of the published table, in its order.

    Where the table is the whole one, each film is known to lie in one of the twelve archives, too.

    Args:
        mirror: where the table lies, with the films in `images/` or, in a local folder, in `images_001.tar.gz` to
            `images_012.tar.gz`.

    Raises:
        Refused: without a table, or for a table that cannot be used.
    """
    tables = TABLES if mirror.place != MIRROR else TABLES[-1:]
    for table in tables:
        content = mirror.read(table)
        if content is None:
            continue
        if table.endswith(".gz"):
            content, table = gunzip(table, content), table.removesuffix(".gz")
        # The header's "OriginalImage[Width,Height]" is two columns, and some copies end each line in a comma
        films = [film_of(row, table) for row in parse_table(table, content, COLUMNS, extra_cells=True)]
        return films if mirror.is_remote and mirror.place != MIRROR else in_archives(films)
    raise Refused(f"--mirror {mirror.place} holds no {' or '.join(tables)}; expected one beside the folder images/")


def in_archives(films: list[Film]) -> list[Film]:
    """Return the films with the archive that each lies in, as they are where the table is not the whole one."""
    if len(films) != sum(count for _, _, count in ARCHIVES):
        return films
    archives = (name for name, (_, _, count) in zip(MD5S, ARCHIVES, strict=True) for _ in range(count))
    place = {film.source_id: archive for film, archive in zip(sorted(films, key=by_name), archives, strict=True)}
    return [replace(film, archive=place[film.source_id]) for film in films]


def by_name(film: Film) -> str:
    return film.source_id


def film_of(row: dict[str, str], table: str) -> Film:
    """Return what one line of the table says."""
    name = row["Image Index"]
    fault = path_fault(name)
    if fault or "/" in name:
        raise Refused(f"{table}: Image Index {name!r} {fault or 'is a path'}; expected a plain file name")
    if not row["Patient ID"]:
        raise Refused(f"{table}: {name} has no Patient ID; without it no patient can be kept in one fold")
    view = row["View Position"].upper() or None
    age = age_in_years(row["Patient Age"])
    sex = row["Patient Gender"].upper() if row["Patient Gender"].upper() in ("M", "F") else None
    findings = finding_names(row["Finding Labels"])
    return Film(
        source_id=name,
        path=f"images/{name}",
        file_name=f"images/{name.rpartition('.')[0] or name}.png",
        text=caption(view, age, sex, findings, name),
        patient_id=f"nih-{row['Patient ID'].lstrip('0') or 0}",
        findings=findings,
        view=view,
        age=age,
        sex=sex,
    )


def age_in_years(text: str) -> int | None:
    """Return the age written as "58", "058Y", "011M" or "020D", None where it is missing or cannot be true."""
    match = re.fullmatch(r"(\d{1,4})([YMD]?)", text.upper())
    if match is None:
        return None
    number, unit = int(match[1]), match[2]
    years = number // {"M": 12, "D": 365}.get(unit, 1)
    return years if years <= MAX_AGE else None


def finding_names(labels: str) -> list[str] | None:
    """Return the labels of "Edema|Pleural_Thickening" as ["Edema", "Pleural thickening"]; "No Finding" is []."""
    names = {name.strip().replace("_", " ").capitalize() for name in labels.split("|")} - {"", "No finding"}
    return sorted(names) if labels else None
