"""Open-i, Indiana University: 7,470 films of 3,851 patients with the radiologist's report, one study a patient."""

import io
import re
import tarfile
from collections.abc import Iterator
from xml.etree import ElementTree

from utils.archives import Header, gunzip
from utils.captions import caption
from utils.films import UNKNOWN_VIEW, VIEWS, Film
from utils.metadata import parse_table
from utils.mirror import Mirror
from utils.refusal import Refused
from utils.reports import caption_of, sex_in

NAME = "openi"
COUNT, SIZE, TEXT = "7,470", "1.3 GB", "reports"
LICENSE = "CC BY-NC-ND 4.0"
RESTRICTED = True
TERMS = """\
The Indiana University chest X-ray collection of Open-i, National Library of Medicine: Demner-Fushman et al., "Preparing a
collection of radiology examinations for distribution and retrieval", JAMIA 2016. Every report states CC BY-NC-ND 4.0:
name its authors, make no commercial use of it, and pass on neither films nor reports that you have changed, which the set
made here is. An adapter trained on it may be taken for such a work: ask before you publish one."""
EXAMPLE = "python download.py --source openi --accept_license"

MIRROR = "https://openi.nlm.nih.gov/imgs/collections"
REPORTS = "NLMCXR_reports.tgz"
FILMS = "NLMCXR_png.tgz"
# Of the DICOM originals, and where those are silent (one in three) from films that lie close together in t-SNE
HEADERS = "nlmcxr_dicom_metadata.csv.gz"
CLUSTERS = "nlmcxr_tsne_pa.csv.gz"
TABLES_AT = "https://raw.githubusercontent.com/mlmed/torchxrayvision/HEAD/torchxrayvision/data"
ADDRESSES = {name: f"{TABLES_AT}/{name}" for name in (HEADERS, CLUSTERS)}  # where no --mirror is named


def list_films(mirror: Mirror) -> list[Film]:
    """Return all films that a report names, by report and film.

    A film's view is that of its DICOM header, else that of its cluster; one in six has neither.

    Args:
        mirror: holds the reports and the films, in archives as published, the films also unpacked in `NLMCXR_png/`;
            and the two tables of views.

    Raises:
        Refused: where a file is missing or is something else.
    """
    contents = {name: mirror.read(name) for name in (REPORTS, HEADERS, CLUSTERS)}
    for name, content in contents.items():
        if content is None:
            there = f"; it is at {ADDRESSES[name]}" if name in ADDRESSES else ""
            raise Refused(f"--mirror {mirror.place} holds no {name}{there}")
    headers = {row["imageid"]: row["View Position"] for row in read_rows(HEADERS, contents[HEADERS], "View Position")}
    clusters = {row["imageid"]: row["tsne-view"] for row in read_rows(CLUSTERS, contents[CLUSTERS], "tsne-view")}
    films = []
    for report in read_reports(contents[REPORTS]):
        uid, sections, image_ids, terms = parse_report(*report)
        said = sections.get("FINDINGS", ""), sections.get("IMPRESSION", "")
        sex = sex_in(sections.get("INDICATION", ""))
        for image_id in image_ids:
            known = headers.get(re.sub(r"^(CXR\d+)_\d+_", r"\1_", image_id)) or clusters.get(image_id, "")
            view = "LATERAL" if "LATERAL" in known else VIEWS.get(known, UNKNOWN_VIEW)
            films.append(
                Film(
                    source_id=image_id,
                    path=f"NLMCXR_png/{image_id}.png",
                    file_name=f"images/{image_id}.png",
                    # A report without a word on its film leaves the film without a caption, not with half of one
                    text=caption_of(caption(view, None, sex, None), *said),
                    patient_id=f"openi-{uid.removeprefix('CXR')}",
                    findings=terms,
                    view=view,
                    sex=sex,
                    archive=FILMS,
                )
            )
    if not films:
        raise Refused(f"{REPORTS} of {mirror.place} names no film; expected the reports of Open-i")
    return sorted(films, key=lambda film: [int(part) for part in re.findall(r"\d+", film.source_id)])


def read_rows(name: str, content: bytes, column: str) -> list[dict]:
    """Return the rows of a gzipped CSV table of films."""
    return parse_table(name.removesuffix(".gz"), gunzip(name, content), ("imageid", column))


def read_reports(content: bytes) -> Iterator[tuple[str, bytes]]:
    """Yield name and content of each report in the archive."""
    try:
        with tarfile.open(fileobj=io.BytesIO(gunzip(REPORTS, content)), mode="r:", tarinfo=Header) as tar:
            for member in tar:
                if member.isreg() and member.name.endswith(".xml"):
                    yield member.name, tar.extractfile(member).read()
    except tarfile.TarError as error:
        raise Refused(f"{REPORTS} cannot be unpacked ({error}); fetch it again") from None


def parse_report(name: str, content: bytes) -> tuple[str, dict[str, str], list[str], list[str] | None]:
    """Return a report's id, its sections by name, the ids of its films, and its findings, None where it was not indexed.

    Findings are the first parts of the major MeSH terms, which were assigned by hand: "Opacity/lung/base/left" is
    "Opacity"; "normal" is none.
    """
    try:
        root = ElementTree.fromstring(content)
        uid = root.find("uId").attrib["id"]
        image_ids = [image.get("id") for image in root.iter("parentImage")]
    except (ElementTree.ParseError, AttributeError, LookupError, ValueError) as error:
        raise Refused(f"{REPORTS}: {name[:100]} is no report of Open-i ({error}); fetch the archive again") from None
    for image_id in image_ids:
        if not re.fullmatch(r"[\w-]{1,100}", image_id or ""):
            raise Refused(
                f"{REPORTS}: {name[:100]} names a film {image_id!r}; expected one such as CXR1_1_IM-0001-3001"
            )
    sections = {text.get("Label"): " ".join((text.text or "").split()) for text in root.iter("AbstractText")}
    terms = {(term.text or "").partition("/")[0].strip() for term in root.iter("major")} - {""}
    unindexed = {"No Indexing", "Technical Quality of Image Unsatisfactory"}
    findings = sorted(terms - unindexed - {"normal"})
    return uid, sections, image_ids, findings if findings or "normal" in terms else None
