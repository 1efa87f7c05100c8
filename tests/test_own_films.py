"""Films of one's own: DICOM folders whose names must not come along, data sets of the hub, several sources in one set."""

import json
import stat
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import download
from tests.test_dicom import save
from tests.test_download import assert_same_folder, film, folder_mirror, nih_mirror, run_here, serve, write_table  # noqa: F401
from utils import pseudonyms, transfer
from utils.files import read_jsonl, sha256_file
from utils.metadata import read_metadata
from utils.mirror import Mirror
from utils.refusal import Refused
from utils.sources import dicom, folder, hf

NAME = "Somebody^Known"


def dicom_folder(directory: Path, num_films: int = 12, table: str = "file_name,labels") -> Path:
    """Write two films a patient, in folders that are named after them, and a table of labels."""
    rows = [table]
    for number in range(num_films):
        place = directory / f"Known, Somebody {number // 2}"
        place.mkdir(parents=True, exist_ok=True)
        name = f"IM{number:04d}"
        elements = dict(
            PatientID=f"ID-{number // 2}", PatientAge=f"{30 + number:03d}Y", PatientSex="F", ViewPosition="PA"
        )
        pixels = np.asarray(film(number)).astype(np.uint16) * 16
        save(place, pixels, 12, name, **elements, StudyInstanceUID=f"1.2.{number}", AccessionNumber=f"A{number}")
        key = {
            "file_name": f'"{place.name}/{name}"',
            "StudyInstanceUID": f"1.2.{number}",
            "AccessionNumber": f"A{number}",
        }
        rows.append(f"{key[table.partition(',')[0]]},{'Edema|Effusion' if number % 2 else 'No Finding'}")
    (directory / "labels.csv").write_text("\n".join(rows) + "\n")
    return directory


def test_nothing_of_a_dicom_folder_tells_who_the_patients_are(tmp_path: Path) -> None:
    mirror = dicom_folder(tmp_path / "scans")
    data = run_here(tmp_path, mirror, source="dicom")
    rows = read_metadata(data)
    assert len(rows) == 12 and len({row["patient_id"] for row in rows}) == 6
    assert {row["sex"] for row in rows} == {"F"} and sorted(row["age"] for row in rows) == list(range(30, 42))
    written = b"".join(path.read_bytes() for path in data.rglob("*") if path.is_file())
    written += "".join(str(path.relative_to(data)) for path in data.rglob("*")).encode()
    for secret in (b"Known", b"Somebody", b"IM00", b"ID-", b"labels.csv", str(tmp_path).encode()):
        assert secret not in written
    # Whoever has the cache folder, and nobody else, can find a film again
    (names,) = (tmp_path / "cache" / "raw").rglob("names.jsonl")
    files = {row["source_id"]: row["file"] for row in read_jsonl(names)}
    assert {files[row["source_id"]].partition("/")[0] for row in rows} == {f"Known, Somebody {n}" for n in range(6)}
    (journal,) = (tmp_path / "cache" / "journal").glob("*.jsonl")
    assert "Known, Somebody" in journal.read_text()
    for private in (names, journal, tmp_path / "cache" / "salt"):
        assert stat.S_IMODE(private.stat().st_mode) == 0o600, private


def test_the_journal_stays_private_when_another_source_is_added(tmp_path: Path) -> None:
    run_here(tmp_path, dicom_folder(tmp_path / "scans"), source="dicom")
    run_here(tmp_path, folder_mirror(tmp_path / "films"), "--add")
    (journal,) = (tmp_path / "cache" / "journal").glob("*.jsonl")
    assert "Known, Somebody" in journal.read_text() and stat.S_IMODE(journal.stat().st_mode) == 0o600


def test_pseudonyms_last_as_long_as_their_key(tmp_path: Path) -> None:
    mirror = dicom_folder(tmp_path / "scans")
    data = run_here(tmp_path / "one", mirror, source="dicom")
    before = read_metadata(data)
    assert read_metadata(run_here(tmp_path / "one", mirror, source="dicom")) == before
    others = read_metadata(run_here(tmp_path / "other", mirror, source="dicom"))
    assert not {row["patient_id"] for row in before} & {row["patient_id"] for row in others}
    (tmp_path / "one" / "cache" / "salt").write_bytes(b"")
    with pytest.raises(Refused, match="salt is not the key"):
        pseudonyms.load_salt(tmp_path / "one" / "cache")


@pytest.mark.parametrize("key", ["file_name", "StudyInstanceUID", "AccessionNumber"])
def test_a_table_is_joined_by_what_it_has(key: str, tmp_path: Path) -> None:
    films = dicom.list_films(Mirror(str(dicom_folder(tmp_path, table=f"{key},labels"))))
    assert [film.findings for film in films] == [[], ["Edema", "Effusion"]] * 6
    assert films[1].patient_id == "id-0" and films[1].view == "PA" and "31-year-old woman" in films[1].text


def test_a_column_findings_may_hold_labels(tmp_path: Path) -> None:
    films = dicom.list_films(Mirror(str(dicom_folder(tmp_path, table="file_name,findings"))))
    assert [film.findings for film in films] == [[], ["Edema", "Effusion"]] * 6
    assert films[1].text.endswith("edema and effusion.")


def headers(tmp_path: Path, **elements) -> object:
    save(tmp_path, np.asarray(film(0)).astype(np.uint16), 12, "a.dcm", **elements)
    (tmp_path / "t.csv").write_text("file_name,text\na.dcm,A film.\n")
    (found,) = dicom.list_films(Mirror(str(tmp_path)))
    return found


@pytest.mark.parametrize(
    ("elements", "known"),
    [
        ({"ViewPosition": "AP"}, {"view": "AP"}),
        ({"ViewPosition": "LL"}, {"view": "LATERAL"}),
        ({"PatientOrientation": ["L", "F"]}, {"view": "FRONTAL"}),
        ({"PatientOrientation": ["P", "F"]}, {"view": "LATERAL"}),
        ({"PatientOrientation": ["L", "F"], "ViewPosition": "LLD"}, {"view": "UNKNOWN"}),
        ({"PatientOrientation": ["L", "F"], "ViewPosition": "PA"}, {"view": "PA", "fault": None}),
        ({"PatientOrientation": ["R", "F"], "ViewPosition": "PA"}, {"fault": "mirrored or upside down by its header"}),
        ({"PatientOrientation": ["L", "H"]}, {"fault": "mirrored or upside down by its header"}),
        ({"PatientOrientation": ["A", "F"], "ViewPosition": "LL"}, {"fault": None}),
        ({"PresentationIntentType": "FOR PROCESSING"}, {"fault": "not for presentation"}),
        ({"PresentationIntentType": "FOR PRESENTATION"}, {"fault": None}),
        ({}, {"view": "UNKNOWN", "age": None, "sex": None}),
        ({"PatientAge": "011M"}, {"age": 0}),
        ({"PatientBirthDate": "19500601", "StudyDate": "20200531"}, {"age": 69}),
        ({"PatientSex": "O"}, {"sex": None}),
        ({"Modality": "CT"}, {"fault": "modality CT"}),
        ({"PatientID": ""}, {"patient_id": None}),
    ],
)
def test_headers_are_read(elements: dict, known: dict, tmp_path: Path) -> None:
    found = headers(tmp_path, **elements)
    assert {name: getattr(found, name) for name in known} == known


def test_reports_of_dicom_films_are_cleaned(tmp_path: Path) -> None:
    save(tmp_path, np.asarray(film(0)).astype(np.uint16), 12, "a.dcm", ViewPosition="PA")
    report = "FINDINGS: Small effusion, unchanged from prior. Heart size is normal.\nIMPRESSION: Small left effusion. Call Dr. XXXX."
    write_table(tmp_path, [{"file_name": "a.dcm", "report": report}])
    (found,) = dicom.list_films(Mirror(str(tmp_path)))
    assert found.text == "PA chest radiograph. Small left effusion. Small effusion. Heart size is normal."


def test_dicom_films_that_nothing_is_known_of_are_left_out_one_by_one(tmp_path: Path) -> None:
    mirror = dicom_folder(tmp_path / "scans", 14)
    save(mirror, np.asarray(film(50)).astype(np.uint16), 12, "IM9999")  # not in the table
    save(
        mirror / "Known, Somebody 0",
        np.asarray(film(51)).astype(np.uint16),
        12,
        "IM0000",
        PatientID="",
        ViewPosition="PA",
    )
    whole = (mirror / "Known, Somebody 1" / "IM0003").read_bytes()
    (mirror / "Known, Somebody 1" / "IM0003").write_bytes(whole[:200])  # nobody knows whose it was
    data = run_here(tmp_path, mirror, source="dicom")
    (mirror / "Known, Somebody 2" / "IM0004").unlink()  # the table still has it
    data = run_here(tmp_path, mirror, "--overwrite", source="dicom")
    reasons = ["no patient id", "no patient id", "not found", "not in the table"]
    rejected = read_jsonl(data / "rejected.jsonl")
    assert sorted(row["reason"] for row in rejected) == reasons
    assert not any("IM" in row["source_id"] for row in rejected)
    assert len(read_metadata(data)) == 11


def test_films_without_the_element_that_the_table_is_joined_by_take_no_words_of_others(tmp_path: Path) -> None:
    mirror = dicom_folder(tmp_path, table="AccessionNumber,labels")
    save(mirror, np.asarray(film(60)).astype(np.uint16), 12, "x.dcm", PatientID="ID-0", AccessionNumber="")
    (found,) = (found for found in dicom.list_films(Mirror(str(mirror))) if found.path == "x.dcm")
    assert found.text == "" and found.fault == "not in the table"


def test_a_copy_of_a_film_is_taken_once(tmp_path: Path) -> None:
    mirror = dicom_folder(tmp_path / "scans")
    folder = mirror / "Known, Somebody 0"
    (folder / "copy").write_bytes((folder / "IM0000").read_bytes())
    with open(mirror / "labels.csv", "a") as table:
        table.write('"Known, Somebody 0/copy",No Finding\n')
    data = run_here(tmp_path, mirror, source="dicom")
    assert len(read_metadata(data)) == 12
    assert [row["reason"] for row in read_jsonl(data / "rejected.jsonl")] == ["copy of a film of its patient"]
    assert download.check_dataset(data) == []


def test_links_are_followed_once(tmp_path: Path) -> None:
    mirror = dicom_folder(tmp_path / "scans")
    (mirror / "round").symlink_to(mirror)
    outside = tmp_path / "outside"
    outside.mkdir()
    save(outside, np.asarray(film(70)).astype(np.uint16), 12, "y.dcm", PatientID="ID-0")
    (mirror / "linked").symlink_to(outside)
    paths = [found.path for found in dicom.list_films(Mirror(str(mirror)))]
    assert "linked/y.dcm" in paths and len(paths) == 13


def test_other_words_of_a_header_stay_in_it(tmp_path: Path) -> None:
    found = headers(tmp_path, Modality="DOE JOHN")
    assert found.fault == "modality not known"
    assert headers(tmp_path, PatientAge="097Y").age == 90


def test_the_key_never_lies_in_the_data_folder(tmp_path: Path) -> None:
    with pytest.raises(Refused, match="--cache_dir .* lies in --output_dir"):
        run_here(
            tmp_path, dicom_folder(tmp_path / "scans"), "--cache_dir", str(tmp_path / "data" / "cache"), source="dicom"
        )
    assert not (tmp_path / "data").exists()


def test_a_second_delivery_needs_the_key_of_the_first(tmp_path: Path) -> None:
    """Else a patient who is in both would be two, one on each side of a split."""
    first = dicom_folder(tmp_path / "scans")
    data = run_here(tmp_path, first, source="dicom")
    second = dicom_folder(tmp_path / "more")
    for number in range(12):
        path = second / f"Known, Somebody {number // 2}"
        elements = dict(PatientID=f"ID-{number // 2}", PatientSex="F", ViewPosition="PA")
        save(path, np.asarray(film(300 + number)).astype(np.uint16) * 16, 12, f"IM{number:04d}", **elements)
    with pytest.raises(Refused, match="pseudonyms of another key"):
        run_here(tmp_path, second, "--add", "--cache_dir", str(tmp_path / "other"), source="dicom")
    run_here(tmp_path, second, "--add", source="dicom")
    rows = read_metadata(data)
    assert len(rows) == 24 and len({row["patient_id"] for row in rows}) == 6
    assert len({(row["patient_id"], row["fold"]) for row in rows}) == 6


@pytest.mark.parametrize(
    ("table", "message"),
    [
        ("file_name,labels\nelsewhere.dcm,Edema\n", "no file_name of the table is that of one of its 1 DICOM files$"),
        ("number,labels\n1,Edema\n", "expected one of file_name, SOPInstanceUID"),
        ("file_name,nothing\na.dcm,Edema\n", "and one of text, report"),
        ("file_name,labels\na.dcm,Edema\na.dcm,Edema\n", "row 2: its file_name is there twice"),
        ("AccessionNumber,labels\n,Edema\n", "row 1: no AccessionNumber"),
        ("file_name,labels,patient_id\na.dcm,Edema,\n", "row 1: its film has no patient_id; give one to every film"),
    ],
)
def test_tables_that_match_no_dicom_file_are_refused(table: str, message: str, tmp_path: Path) -> None:
    save(tmp_path, np.asarray(film(0)).astype(np.uint16), 12, "a.dcm")
    (tmp_path / "t.csv").write_text(table)
    with pytest.raises(Refused, match=message):
        dicom.list_films(Mirror(str(tmp_path)))


def test_folders_without_dicom_files_are_refused(tmp_path: Path) -> None:
    (tmp_path / "t.csv").write_text("file_name,text\na.dcm,A film.\n")
    (tmp_path / "a.dcm").write_text("no film")
    with pytest.raises(Refused, match="holds no DICOM file"):
        dicom.list_films(Mirror(str(tmp_path)))


def test_a_header_that_declares_text_marks_the_film(tmp_path: Path) -> None:
    mirror = dicom_folder(tmp_path / "scans")
    pixels = np.asarray(film(0)).astype(np.uint16) * 16
    elements = dict(PatientID="ID-0", PatientAge="030Y", ViewPosition="PA", BurnedInAnnotation="YES")
    save(mirror / "Known, Somebody 0", pixels, 12, "IM0000", **elements)
    data = run_here(tmp_path, mirror, source="dicom")
    assert [row["burned_in_text"] for row in read_metadata(data)].count(True) == 1
    assert json.loads((data / "dataset.json").read_text())["counts"]["burned_in_text"] == 1


# Data sets of the Hugging Face hub, here in a folder as `datasets` writes it


def hub_set(directory: Path, **columns) -> Path:
    import datasets

    rows = []
    for number in range(12):
        film(number).save(directory / "x.png") if directory.mkdir(parents=True, exist_ok=True) is None else None
        picture = {"bytes": (directory / "x.png").read_bytes(), "path": f"{number}.jpg"}
        rows.append({"image": picture, "report": f"FINDINGS:\nFilm {number} is clear.", "uid": number // 2, **columns})
    (directory / "x.png").unlink()
    features = datasets.Features(
        {"image": datasets.Image(), "report": datasets.Value("string"), "uid": datasets.Value("int64")}
        | {name: datasets.Value("string") for name in columns}
    )
    (directory / "data").mkdir()
    for part in range(2):
        rows_here = datasets.Dataset.from_list(rows[6 * part : 6 * part + 6], features=features)
        rows_here.to_parquet(directory / "data" / f"train-{part:05d}-of-00002.parquet")
    return directory


def test_a_set_of_the_hub_becomes_a_data_folder(tmp_path: Path) -> None:
    mirror = hub_set(tmp_path / "set")
    data = run_here(tmp_path, mirror, "--accept_license", "--patient_column", "uid", source="hf")
    rows = read_metadata(data)
    assert len(rows) == 12 and len({row["patient_id"] for row in rows}) == 6
    assert rows[3]["text"] == "Chest radiograph. Film 3 is clear."
    direct = run_here(tmp_path / "direct", folder_mirror(tmp_path / "films", 12))
    for number in (0, 7, 11):
        same = (data / f"images/train_{number:08d}.png").read_bytes() == (direct / f"images/{number}.png").read_bytes()
        assert same


def test_a_set_of_the_hub_goes_on_where_it_was(tmp_path: Path) -> None:
    mirror = hub_set(tmp_path / "set")
    data = run_here(tmp_path, mirror, "--accept_license", source="hf")
    before = {path: path.read_bytes() for path in data.rglob("*") if path.is_file()}
    (data / "dataset.json").unlink()
    for number in (5, 9):
        (data / f"images/train_{number:08d}.png").unlink()
    run_here(tmp_path, mirror, "--accept_license", source="hf")
    assert {path: path.read_bytes() for path in data.rglob("*") if path.is_file()} == before


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--caption_column", "words"], "--caption_column words: .* has columns image, report, uid"),
        (["--image_column", "picture"], "say with --image_column"),
        (["--split", "test"], "cannot be read"),
        (["--image_column", "report"], "with pictures: image; say with --image_column"),
        (["--caption_column", "image"], "expected text"),
    ],
)
def test_columns_that_are_not_there_are_refused(flags: list[str], message: str, tmp_path: Path) -> None:
    mirror = hub_set(tmp_path / "set")
    with pytest.raises(Refused, match=message):
        run_here(tmp_path, mirror, "--accept_license", *flags, source="hf")


def test_a_set_names_no_file_that_is_not_its_own(tmp_path: Path) -> None:
    """Else a set of the hub could have any file of this machine, or any address behind its wall, come into data/."""
    for path in (
        "hf://datasets/me/films@a1b2/x.png",
        "hf://datasets/me/films/x.png",
        "zip://x.png::hf://datasets/me/films@a1/y.zip",
    ):
        assert hf.belongs("me/films", path)
    for path in (
        "/etc/passwd",
        "http://169.254.169.254/x",
        "hf://datasets/me/films2@a/x.png",
        "hf://datasets/me/films@a/../../you/x.png",
    ):
        assert not hf.belongs("me/films", path)
    (tmp_path / "set").mkdir()
    assert hf.belongs(str(tmp_path / "set"), str(tmp_path / "set" / "a" / "x.png"))
    assert hf.belongs(str(tmp_path / "set"), f"zip://x.png::{tmp_path}/set/films.zip")
    (tmp_path / "set" / "link.png").symlink_to(tmp_path / "blob")  # as in the hub's own cache
    assert hf.belongs(str(tmp_path / "set"), str(tmp_path / "set" / "link.png"))
    assert not hf.belongs(str(tmp_path / "set"), str(tmp_path / "set" / ".." / "x.png"))


def test_findings_of_a_set_of_the_hub_may_be_labels(tmp_path: Path) -> None:
    mirror = hub_set(tmp_path / "set", findings="Edema|Effusion", sex="missing")
    rows = read_metadata(run_here(tmp_path, mirror, "--accept_license", "--patient_column", "uid", source="hf"))
    assert (rows[3]["findings"], rows[3]["sex"]) == (["Edema", "Effusion"], None)
    flags = ("--accept_license", "--patient_column", "uid", "--caption_column", "findings")
    rows = read_metadata(run_here(tmp_path / "labels", mirror, *flags, source="hf"))
    assert {row["text"] for row in rows} >= {"Chest radiograph. Edema and effusion."}


def test_classes_and_lists_of_a_set_of_the_hub_are_words(tmp_path: Path) -> None:
    import datasets

    kind = datasets.ClassLabel(names=["Normal.", "Pneumonia."])
    assert hf.plain(kind, 1) == "Pneumonia." and hf.plain(kind, None) is hf.plain(kind, -1) is None
    assert hf.plain(datasets.List(kind), [0, 1]) == ["Normal.", "Pneumonia."]
    assert hf.plain(datasets.List(datasets.Value("string")), ["Effusion.", "Mass."]) == "Effusion. Mass."
    assert hf.plain(datasets.Value("int64"), 3) == 3


def test_the_data_folder_is_an_imagefolder_of_the_hub_library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With all that lies in it: diffusers' own script reads it in this way."""
    import datasets

    data = run_here(tmp_path, nih_mirror(tmp_path / "nih"), source="nih")
    loaded = datasets.load_dataset("imagefolder", data_dir=str(data), split="train", cache_dir=str(tmp_path / "hub"))
    rows = read_metadata(data)
    assert sorted(loaded["text"]) == sorted(row["text"] for row in rows)
    assert loaded[0]["image"].size == (64, 64) and loaded.num_rows == 24


# Columns, caps, and a second source


def test_tables_may_have_other_names_for_their_columns(tmp_path: Path) -> None:
    mirror = folder_mirror(tmp_path / "films")
    reference = run_here(tmp_path / "reference", mirror)
    names = {"file_name": "image", "text": "report", "patient_id": "mrn"}
    rows = read_jsonl(mirror / "metadata.jsonl")
    theirs = [{names[name]: value for name, value in row.items()} for row in rows]
    write_table(mirror, theirs)
    flags = ("--image_column", "image", "--caption_column", "report", "--patient_column", "mrn")
    assert_same_folder(reference, run_here(tmp_path, mirror, *flags))
    ours = {"file_name": "no.png", "text": "Not asked for.", "patient_id": "one"}
    write_table(mirror, [ours | row for row in theirs])
    assert_same_folder(reference, run_here(tmp_path / "before", mirror, *flags))
    write_table(mirror, [row | ours for row in theirs])
    assert_same_folder(reference, run_here(tmp_path / "after", mirror, *flags))
    with pytest.raises(Refused, match="lacks name; it has image, report, mrn"):
        run_here(tmp_path / "other", mirror, "--image_column", "name")


def test_names_may_be_uids(tmp_path: Path) -> None:
    (tmp_path / "films").mkdir()
    for number in range(6):
        film(number).save(tmp_path / "films" / f"1.2.840.{number}", format="PNG")
    write_table(
        tmp_path / "films", [{"file_name": f"1.2.840.{n}", "text": "A film.", "patient_id": n} for n in range(6)]
    )
    names = [row["file_name"] for row in read_metadata(run_here(tmp_path, tmp_path / "films"))]
    assert names == [f"images/1.2.840.{number}.png" for number in range(6)]


def test_columns_and_cells_that_are_not_understood_are_named(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    mirror = folder_mirror(tmp_path / "films")
    rows = read_jsonl(mirror / "metadata.jsonl")
    odd = {"view": "p.a.", "sex": "weiblich", "age": "58Y", "label": "Edema"}
    write_table(mirror, [row | (odd if number < 2 else {"view": "Boxer"}) for number, row in enumerate(rows)])
    data = run_here(tmp_path, mirror, "--num_folds", "2")
    said = capsys.readouterr().out
    assert "metadata.jsonl: not used: label; used where they are there: file_name, text, patient_id, findings" in said
    assert f"sex is not understood in 2 of {len(rows)} rows, such as 'weiblich'; expected M or F" in said
    assert f"age is not understood in 2 of {len(rows)} rows, such as '58Y'; expected years" in said
    assert [(row["view"], row["sex"], row["age"]) for row in read_metadata(data)] == [("PA", None, None)] * 2
    assert {row["reason"] for row in read_jsonl(data / "rejected.jsonl")} == {"not frontal but BOXER"}
    write_table(mirror, [row | {"view": "Boxer"} for row in rows])
    with pytest.raises(Refused, match=r"no film that can be used: not frontal but BOXER \(\d+\); add --view all"):
        run_here(tmp_path / "boxers", mirror)


def test_at_most_so_many_films_of_a_patient_are_taken(tmp_path: Path) -> None:
    data = run_here(tmp_path, nih_mirror(tmp_path / "nih"), "--max_films_per_patient", "1", source="nih")
    assert [row["source_id"][-7:] for row in read_metadata(data)] == ["000.png"] * 12
    assert {row["reason"] for row in read_jsonl(data / "rejected.jsonl")} == {"one more of its patient"}


@pytest.fixture
def two_sources(tmp_path: Path) -> tuple[Path, Path]:
    """A data folder that holds the NIH films, and a mirror of other films, one of which is an NIH film."""
    data = run_here(tmp_path, nih_mirror(tmp_path / "nih"), source="nih")
    mirror = folder_mirror(tmp_path / "films", 10)
    for number in range(10):
        film(100 + number).save(mirror / f"{number}.png")
    film(7).save(mirror / "4.png", compress_level=1)
    return data, mirror


def test_a_second_source_is_folded_together_with_the_first(two_sources: tuple[Path, Path], tmp_path: Path) -> None:
    data, mirror = two_sources
    alone = {row["file_name"]: row for row in read_metadata(data)}
    run_here(tmp_path, mirror, "--add")
    rows = {row["file_name"]: row for row in read_metadata(data)}
    assert len(rows) == 34 and set(alone) < set(rows)
    assert {row["source"] for row in rows.values()} == {"nih", "folder"}
    copy, original = rows["images/folder_4.png"], rows["images/00000003_001.png"]
    assert copy["group"] == original["group"] and copy["fold"] == original["fold"]
    assert len({row["fold"] for row in rows.values()}) == 5
    record = json.loads((data / "dataset.json").read_text())
    assert [part["name"] for part in record["sources"]] == ["nih", "folder"]
    assert record["counts"]["kept"] == 34 and record["counts"]["duplicates_across_patients"] == 1
    assert download.check_dataset(data) == []
    # Again: nothing changes. A third source: another folder of films
    before = (data / "metadata.jsonl").read_bytes()
    run_here(tmp_path, mirror, "--add")
    assert (data / "metadata.jsonl").read_bytes() == before
    more = folder_mirror(tmp_path / "more", 6, sex="M")
    for number in range(6):
        film(200 + number).save(more / f"{number}.png")
    run_here(tmp_path, more, "--add")
    assert {row["source"] for row in read_metadata(data)} == {"nih", "folder", "folder2"}
    assert download.check_dataset(data) == []


def test_an_addition_that_was_interrupted_goes_on(two_sources: tuple[Path, Path], tmp_path: Path, monkeypatch) -> None:
    data, mirror = two_sources
    write, left = transfer.write_bytes, iter(range(4))

    def stop_after_four(path: Path, content: bytes) -> None:
        if next(left, None) is None:
            raise KeyboardInterrupt
        write(path, content)

    monkeypatch.setattr(transfer, "write_bytes", stop_after_four)
    with pytest.raises(KeyboardInterrupt):
        run_here(tmp_path, mirror, "--add")
    monkeypatch.undo()
    assert len(read_metadata(data)) == 24  # still the set that it was
    run_here(tmp_path, mirror, "--add")
    assert len(read_metadata(data)) == 34 and download.check_dataset(data) == []


def test_what_cannot_be_folded_together_is_refused(two_sources: tuple[Path, Path], tmp_path: Path) -> None:
    data, mirror = two_sources
    before = {path: path.read_bytes() for path in data.rglob("*") if path.is_file()}
    with pytest.raises(Refused, match="made with --seed 0, not 1"):
        run_here(tmp_path, mirror, "--add", "--seed", "1")
    with pytest.raises(Refused, match="resolution 64, not 128"):
        download.main(download.parse_args(
            ["--mirror", str(mirror), "--source", "folder", "--add", "--resolution", "128", "--output_dir", str(data)]
        ))  # fmt: skip
    with pytest.raises(Refused, match="holds this nih table already"):
        run_here(tmp_path, tmp_path / "nih", "--add", source="nih")
    with pytest.raises(Refused, match="holds no finished set to add to"):
        run_here(tmp_path / "empty", mirror, "--add")
    with pytest.raises(Refused, match="source nih, not folder"):
        run_here(tmp_path, mirror)
    write_table(mirror, [{"file_name": f"{n}.png", "text": "A film."} for n in range(10)])
    with pytest.raises(Refused, match="has no patient_id but others have"):
        run_here(tmp_path, mirror, "--add")
    table = (data / "rejected.jsonl").read_bytes()
    (data / "rejected.jsonl").unlink()
    with pytest.raises(Refused, match="rejected.jsonl is not as download.py wrote it"):
        run_here(tmp_path, mirror, "--add")
    (data / "rejected.jsonl").write_bytes(table)
    path, whole = data / "images" / "00000003_000.png", (data / "images" / "00000003_000.png").read_bytes()
    path.write_bytes(whole[:99])
    folder_mirror(mirror)
    with pytest.raises(Refused, match="00000003_000.png is not as download.py wrote it"):
        run_here(tmp_path, mirror, "--add")
    path.write_bytes(whole)
    assert {path: path.read_bytes() for path in data.rglob("*") if path.is_file()} == before


def test_films_without_patients_cannot_be_added_to_by_films_with_them(tmp_path: Path) -> None:
    mirror = folder_mirror(tmp_path / "films")
    write_table(mirror, [{"file_name": f"{n}.png", "text": "A film."} for n in range(10)])
    run_here(tmp_path, mirror)
    with pytest.raises(Refused, match="0.png has no patient_id but others have"):
        run_here(tmp_path, nih_mirror(tmp_path / "nih"), "--add", source="nih")


def test_the_same_films_under_another_limit_are_not_taken_twice(tmp_path: Path) -> None:
    mirror = nih_mirror(tmp_path / "nih")
    run_here(tmp_path, mirror, "--limit", "12", source="nih")
    data = run_here(tmp_path, mirror, "--add", "--limit", "20", source="nih")
    assert len(read_metadata(data)) == 20
    assert [row["reason"] for row in read_jsonl(data / "rejected.jsonl")] == ["copy of a film of its patient"] * 12


def test_a_set_made_with_a_cache_that_is_gone_leaves_nothing_behind(tmp_path: Path) -> None:
    data = run_here(tmp_path, folder_mirror(tmp_path / "films"))
    run_here(tmp_path, nih_mirror(tmp_path / "nih"), "--overwrite", "--cache_dir", str(tmp_path / "new"), source="nih")
    assert len(list((data / "images").iterdir())) == 24 and download.check_dataset(data) == []


def test_a_local_film_that_is_not_the_one_of_the_table_is_left_out(tmp_path: Path) -> None:
    mirror = folder_mirror(tmp_path / "films")
    rows = read_jsonl(mirror / "metadata.jsonl")
    rows[2]["sha256"], rows[3]["sha256"] = sha256_file(mirror / "2.png"), "0" * 64
    write_table(mirror, rows)
    data = run_here(tmp_path, mirror)
    assert [(row["source_id"], row["reason"]) for row in read_jsonl(data / "rejected.jsonl")] == [
        ("3.png", "wrong SHA-256")
    ]


def test_a_film_that_is_published_anew_under_its_name_is_fetched_anew(tmp_path: Path, serve) -> None:  # noqa: F811
    mirror = folder_mirror(tmp_path / "films")
    address = serve(mirror).address
    for number in (0, 1):
        film(20 + number).save(mirror / "3.png")
        rows = read_jsonl(mirror / "metadata.jsonl")
        write_table(mirror, [row | {"sha256": sha256_file(mirror / row["file_name"])} for row in rows])
        data = run_here(tmp_path, address, "--overwrite")
        (row,) = (row for row in read_metadata(data) if row["source_id"] == "3.png")
        direct = run_here(tmp_path / str(number), mirror)
        assert (data / row["file_name"]).read_bytes() == (direct / row["file_name"]).read_bytes()


def test_a_data_folder_can_be_a_mirror(tmp_path: Path) -> None:
    """Its films are taken as they are, to the byte."""
    data = run_here(tmp_path, nih_mirror(tmp_path / "nih"), source="nih")
    again = run_here(tmp_path / "again", data)
    rows, others = read_metadata(data), read_metadata(again)
    assert [row["sha256"] for row in rows] == [row["sha256"] for row in others]


def test_views_and_findings_are_known_by_their_usual_names(tmp_path: Path) -> None:
    mirror = folder_mirror(tmp_path / "films")
    rows = read_jsonl(mirror / "metadata.jsonl")
    views = ["Posteroanterior", "anteroposterior", "PA", "AP", "frontal", "Left Lateral", "LL", "lat", None, "PA"]
    for row, view in zip(rows, views, strict=True):
        row |= {"view": view, "findings": "No Findings", "patient_id": f" {row['patient_id']} "}
    rows[0]["findings"], rows[1]["findings"] = "Edema;Mass", "nan"
    write_table(mirror, rows)
    known = folder.list_films(Mirror(str(mirror)))
    assert [film.view for film in known] == [
        "PA",
        "AP",
        "PA",
        "AP",
        "FRONTAL",
        "LATERAL",
        "LATERAL",
        "LATERAL",
        None,
        "PA",
    ]
    assert [film.findings for film in known[:3]] == [["Edema", "Mass"], [], []]
    assert known[3].patient_id == "p3"


def test_deep_paths_make_names_that_any_disk_takes(tmp_path: Path) -> None:
    name = "/".join(["1.2.840." + "9" * 56] * 4) + "/film.png"
    assert len(folder.data_name(name).encode()) < 100
    assert folder.data_name(name) != folder.data_name(name.replace("film", "other"))


def test_the_report_shows_the_set(tmp_path: Path) -> None:
    mirror = nih_mirror(tmp_path / "nih")
    Image.new("L", (80, 80)).save(mirror / "images" / "00000001_000.png")
    data = run_here(tmp_path, mirror, source="nih")
    page = (data / "report.html").read_text()
    assert page.count("data:image/png;base64,") == 2
    for text in ("nih: 23 films", "blank 1", "Edema 15", "PA 23", "40 to 63, median", "Not for diagnosis"):
        assert text in page, text
    assert str(tmp_path) not in page
