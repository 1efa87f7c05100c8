"""The table of a data folder is read with suspicion, and two sources turn theirs into the same kind of row."""

import json

import numpy as np
import pytest
from PIL import Image

from tests.conftest import mirror_of
from utils.check import check_dataset
from utils.files import sha256_file, write_jsonl
from utils.metadata import dataset_hash, findings_list, parse_table, path_fault, read_metadata
from utils.mirror import Mirror
from utils.refusal import Refused
from utils.sources import folder, nih

NIH_HEADER = (
    "Image Index,Finding Labels,Follow-up #,Patient ID,Patient Age,Patient Gender,View Position,"
    "OriginalImage[Width,Height],OriginalImagePixelSpacing[x,y]"
)


def imagefolder(directory, rows: list[dict], table: str = "metadata.jsonl"):
    """Write a data folder with a random film for each row."""
    for index, row in enumerate(rows):
        path = directory / str(row.get("file_name"))
        path.parent.mkdir(parents=True, exist_ok=True)
        grey = np.random.default_rng(index).integers(0, 256, (64, 64), dtype=np.uint8)
        Image.fromarray(grey).save(path)
    if table.endswith(".jsonl"):
        write_jsonl(directory / table, rows)
    else:
        lines = [",".join(rows[0]), *(",".join(f'"{cell}"' for cell in row.values()) for row in rows)]
        (directory / table).write_text("\n".join(lines) + "\n")
    return directory


def rows_of(number: int = 3, **columns) -> list[dict]:
    return [
        {"file_name": f"images/{index}.png", "text": f"Film {index}.", "patient_id": f"p{index}", "fold": index}
        | columns
        for index in range(number)
    ]


@pytest.mark.parametrize("table", ["metadata.jsonl", "metadata.csv"])
def test_both_tables_read_alike(table, tmp_path):
    rows = read_metadata(imagefolder(tmp_path, rows_of(findings="Edema|Mass")[::-1], table))
    assert [row["file_name"] for row in rows] == ["images/0.png", "images/1.png", "images/2.png"]
    assert rows[1] == {
        "file_name": "images/1.png",
        "text": "Film 1.",
        "patient_id": "p1",
        "fold": 1,
        "findings": ["Edema", "Mass"],
        "sha256": sha256_file(tmp_path / "images/1.png"),
    }


def test_what_the_table_lacks_is_none(tmp_path):
    imagefolder(tmp_path, [{"file_name": "a.png", "text": "A film."}])
    row = read_metadata(tmp_path)[0]
    assert row["patient_id"] is row["fold"] is row["findings"] is None


def test_columns_can_have_other_names(tmp_path):
    imagefolder(tmp_path, [{"file_name": "a.png", "report": "A film.", "path": "a.png"}])
    assert read_metadata(tmp_path, image_column="image", caption_column="report")[0]["text"] == "A film."
    assert read_metadata(tmp_path, image_column="path", caption_column="report")[0]["file_name"] == "a.png"
    with pytest.raises(Refused, match="lacks text; it has file_name, report, path"):
        read_metadata(tmp_path)
    imagefolder(tmp_path, [{"file_name": "a.png", "report": "As asked.", "text": "Not as asked."}])
    assert read_metadata(tmp_path, caption_column="report")[0]["text"] == "As asked."


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(file_name="images/0.png"), "images/0.png is in the table twice"),
        (dict(file_name="../2.png"), "climbs out"),
        (dict(file_name="/2.png"), "absolute"),
        (dict(file_name=7), "is no name"),
        (dict(file_name="images/absent.png"), "no such file"),
        (dict(text="  "), "images/2.png has no text"),
        (dict(text=None), "images/2.png has no text"),
        (dict(patient_id="p0"), "patient p0 is in folds 0 and 2"),
        (dict(fold="first"), "row 3: fold 'first'"),
        (dict(fold=-1), "row 3: fold -1"),
        (dict(fold=1.5), "row 3: fold 1.5"),
    ],
)
def test_rows_that_would_spoil_a_run_are_refused(change, message, tmp_path):
    imagefolder(tmp_path, rows_of())
    rows = rows_of()
    write_jsonl(tmp_path / "metadata.jsonl", [*rows[:2], rows[2] | change])
    with pytest.raises(Refused, match=message):
        read_metadata(tmp_path)


def test_patients_tied_together_must_share_a_fold(tmp_path):
    imagefolder(tmp_path, rows_of(group="p0"))
    with pytest.raises(Refused, match="group p0 is in folds 0 and 1"):
        read_metadata(tmp_path)


def test_a_group_may_join_patients_but_never_split_one(tmp_path):
    """A table of others may have a column of that name, for studies say."""
    rows = [{"file_name": f"{i}.png", "text": "x", "patient_id": "p", "group": f"study{i}"} for i in range(2)]
    imagefolder(tmp_path, rows)
    with pytest.raises(Refused, match="patient p is in groups study0 and study1"):
        read_metadata(tmp_path)


def test_folders_without_one_table_are_refused(tmp_path):
    with pytest.raises(Refused, match="there is no folder"):
        read_metadata(tmp_path / "absent")
    with pytest.raises(Refused, match="neither of metadata.jsonl and metadata.csv"):
        read_metadata(tmp_path)
    imagefolder(tmp_path, rows_of())
    imagefolder(tmp_path, rows_of(), "metadata.csv")
    with pytest.raises(Refused, match="both of"):
        read_metadata(tmp_path)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("t.csv", b"", "t.csv lacks file_name, text; it has none"),
        ("t.csv", b"file_name,label\na.png,x\n", "t.csv lacks text; it has file_name, label"),
        ("t.csv", b"file_name;text\na.png;x\n", "t.csv: columns are separated by ';'; save it with commas"),
        ("t.csv", b"file_name,text\n", "no rows"),
        ("t.csv", b"file_name,text,text\na.png,x,y\n", "t.csv has the column text twice"),
        ("t.csv", b"file_name,text\na.png,Edema, mass\n", "line 2: more cells"),
        ("t.csv", b"file_name,text\na.png\n", "line 2: fewer cells"),
        ("t.csv", b'file_name,text\na.png,"Edema\n', "t.csv, line"),
        ("t.csv", "file_name,text\na.png,Ödem\n".encode("latin-1"), "UTF-8"),
        ("t.csv", b"\x89PNG\r\n\x1a\n", "UTF-8"),
        ("t.jsonl", b'{"file_name": "a.png", "text": "A."}\n{"file_name"', "line 2: not a JSON object"),
        ("t.jsonl", b'["a.png", "A."]\n', "line 1: not a JSON object"),
        ("t.jsonl", b'{"file_name": "a.png"}\n', "line 1: lacks text"),
        ("t.jsonl", b'{"file_name": "a.png", "text": "A.", "age": NaN}\n', "line 1: not a JSON object"),
        ("t.jsonl", b'{"file_name": "a.png", "text": "\\ud800"}\n', "line 1: not a JSON object"),
        ("t.jsonl", b"[" * 100_000, "line 1: not a JSON object"),
        ("t.csv", b"file_name,text\na.png," + b"x" * 10_000_000, "field larger than field limit"),
        ("t.jsonl", b'{"file_name": "a.png", "text": "%b"}\n' % (b"x" * 10_000_000), "line 1: text has 10000000 char"),
    ],
)
def test_tables_that_cannot_be_used_are_refused(name, content, message):
    with pytest.raises(Refused, match=message):
        parse_table(name, content, ("file_name", "text"))


def test_spreadsheet_csv_is_read():
    content = '\ufefffile_name, text \r\na.png,"Edema, mass\r\nand ""more"""\r\n'.encode()
    assert parse_table("t.csv", content, ("file_name", "text")) == [
        {"file_name": "a.png", "text": 'Edema, mass\r\nand "more"'}
    ]


@pytest.mark.parametrize("name", ["a.png", "images/a b.png", "ü/ä.dcm", "..a/b..png"])
def test_ordinary_paths_are_accepted(name):
    assert path_fault(name) is None


@pytest.mark.parametrize(
    "name",
    ["", " ", None, 3, "/a", "C:/a", "../a", "a/../../b", "a\\b", "a\0b", "a\nb", "./a", "a//b", "a/", "x" * 300],
)
def test_paths_that_leave_their_folder_or_cannot_be_written_are_not(name):
    assert path_fault(name)


def test_dataset_hash_depends_on_content_and_not_on_order():
    rows = rows_of(sha256="0", view="PA")
    assert dataset_hash(rows) == dataset_hash(rows[::-1])
    assert dataset_hash(rows) == dataset_hash([row | {"view": "AP"} for row in rows])
    for change in (
        dict(text="?"),
        dict(fold=9),
        dict(patient_id=None),
        dict(sha256="1"),
        dict(file_name="z"),
        dict(boxes=[{}]),
    ):
        assert dataset_hash(rows) != dataset_hash([rows[0] | change, *rows[1:]])


def test_a_folder_of_others_is_checked_as_far_as_possible(tmp_path):
    folder = imagefolder(tmp_path, rows_of(2))
    (folder / "rejected.jsonl").write_text("")
    faults = check_dataset(folder)
    assert len(faults) == 1 and "dataset.json" in faults[0]


def nih_films(*lines: str, header: str = NIH_HEADER):
    return nih.list_films(mirror_of({"Data_Entry_2017.csv": "\n".join([header, *lines]).encode()}))


def test_nih_table_of_both_years_is_read():
    old = nih_films("00000061_012.png,Edema|Pleural_Thickening|Edema,12,61,058Y,M,AP,3056,2544,0.139,0.139,")
    new = nih_films("00000061_012.png,Edema|Pleural_Thickening,12,61,58,M,AP,3056,2544,0.139,0.139")
    assert old == new
    film = new[0]
    assert (film.source_id, film.path) == ("00000061_012.png", "images/00000061_012.png")
    assert (film.patient_id, film.view, film.age, film.sex) == ("nih-61", "AP", 58, "M")
    assert film.findings == ["Edema", "Pleural thickening"]
    assert film.text == "AP chest X-ray of a 58-year-old man. Findings: edema and pleural thickening."  # one in five


def test_nih_header_with_its_comma_at_the_end_or_in_quotes_is_read():
    line = "00000001_000.png,No Finding,0,1,57,F,PA,2682,2749,0.143,0.143"
    quoted = NIH_HEADER.replace("OriginalImage[Width,Height]", '"OriginalImage[Width,Height]"')
    assert nih_films(line) == nih_films(line + ",", header=NIH_HEADER + ",") == nih_films(line, header=quoted)
    assert nih_films(line)[0].findings == []


@pytest.mark.parametrize(
    ("age", "years"), [("411", None), ("", None), ("011M", 0), ("020D", 0), ("110", 110), ("0", 0)]
)
def test_impossible_ages_are_not_known(age, years):
    film = nih_films(f"00000001_000.png,No Finding,0,1,{age},F,PA,1,1,1,1")[0]
    assert film.age == years
    assert ("year" in film.text) == bool(years)


def test_later_nih_table_is_preferred():
    line = "00000001_000.png,No Finding,0,1,{},F,PA,1,1,1,1"
    tables = {f"Data_Entry_2017{suffix}.csv": f"{NIH_HEADER}\n{line.format(age)}".encode() for suffix, age in
              (("", 1), ("_v2020", 2))}  # fmt: skip
    assert nih.list_films(mirror_of(tables))[0].age == 2


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("../evil.png,No Finding,0,1,57,F,PA,1,1,1,1", "climbs out"),
        ("a/b.png,No Finding,0,1,57,F,PA,1,1,1,1", "is a path"),
        ("00000001_000.png,No Finding,0,,57,F,PA,1,1,1,1", "no Patient ID"),
    ],
)
def test_nih_lines_that_cannot_be_used_are_refused(line, message):
    with pytest.raises(Refused, match=message):
        nih_films(line)


def test_nih_without_a_table_says_what_to_do():
    with pytest.raises(Refused, match="holds no Data_Entry_2017_v2020.csv or .*beside the folder images/"):
        nih.list_films(mirror_of({}))
    with pytest.raises(Refused, match="lacks Patient ID, Patient Age"):
        nih_films("a,b,c,d", header="Image Index,Finding Labels,Patient Gender,View Position")


def folder_films(table: str, content: str, directory):
    (directory / table).write_text(content)
    return folder.list_films(Mirror(str(directory)))


def test_folder_carries_what_its_table_has(tmp_path):
    films = folder_films(
        "films.csv",
        "file_name,text,patient_id,view,age,sex,findings\n"
        "images/a/1.jpg,Edema  and\tmass.,7,pa,58.0,female,Edema|Mass\n"
        "b.dcm.tif,Clear.,8,,999,?,No Finding\n"
        "c,Clear.,8,,,,\n",
        tmp_path,
    )
    assert [film.file_name for film in films] == ["images/a_1.png", "images/b.dcm.png", "images/c.png"]
    assert [film.path for film in films] == ["images/a/1.jpg", "b.dcm.tif", "c"]
    assert films[0].text == "Edema and mass."
    assert [(film.patient_id, film.view, film.age, film.sex) for film in films] == [
        ("7", "PA", 58, "F"),
        ("8", None, None, None),
        ("8", None, None, None),
    ]
    assert [film.findings for film in films] == [["Edema", "Mass"], [], None]


def test_folder_reads_json_lines_and_lists(tmp_path):
    row = {"file_name": "a.png", "text": "A.", "patient_id": 7, "findings": ["B", "A"], "age": 40}
    film = folder_films("any.jsonl", json.dumps(row) + "\n\n", tmp_path)[0]
    assert (film.patient_id, film.findings, film.age) == ("7", ["A", "B"], 40)


def test_folder_takes_a_hash_for_that_of_the_file_if_it_is_one(tmp_path):
    digest = "0123456789abcdef" * 4
    cells = {digest: digest, f" {digest.upper()} ": digest, "": None, None: None, digest[1:]: None, "g" * 64: None}
    rows = [{"file_name": f"{n}.png", "text": "A.", "sha256": cell} for n, cell in enumerate(cells)]
    films = folder_films("any.jsonl", "".join(json.dumps(row) + "\n" for row in rows), tmp_path)
    assert [film.sha256 for film in films] == list(cells.values())
    assert ["sha256" in film.described() for film in films] == [bool(digest) for digest in cells.values()]


def test_folder_prefers_the_table_with_the_usual_name(tmp_path):
    (tmp_path / "notes.csv").write_text("a,b\n")
    assert folder_films("metadata.csv", "file_name,text\na.png,A.\n", tmp_path)[0].text == "A."


@pytest.mark.parametrize(
    ("tables", "message"),
    [
        ({}, "found none"),
        ({"a.csv": "", "b.csv": ""}, "found a.csv, b.csv"),
        ({"a.csv": "file_name,text\n../a.png,A.\n"}, "climbs out"),
        ({"a.csv": "file_name,text\n/a.png,A.\n"}, "absolute"),
        ({"a.csv": "file_name,text\na.png,\n"}, "a.png has no text"),
        ({"a.csv": "file_name,text,patient_id\na.png,A.,\n"}, "a.png has no patient_id"),
        ({"a.csv": "image,caption\na.png,A.\n"}, "lacks file_name, text; it has image, caption"),
    ],
)
def test_folders_that_cannot_be_used_are_refused(tables, message, tmp_path):
    for name, content in tables.items():
        (tmp_path / name).write_text(content)
    with pytest.raises(Refused, match=message):
        folder.list_films(Mirror(str(tmp_path)))


@pytest.mark.parametrize(
    ("cell", "findings"),
    [
        (["edema", "Effusion"], ["edema", "Effusion"]),
        (["No Finding"], []),
        ("No finding", []),
        ("Edema;Effusion", ["Edema", "Effusion"]),
        ("Effusion, Edema", ["Edema", "Effusion"]),
        ("Effusion, left|Edema", ["Edema", "Effusion, left"]),
        ('["Edema"]', ["Edema"]),
        ("Effusion | Edema", ["Edema", "Effusion"]),
        ("", None),
        (None, None),
    ],
)
def test_findings_are_read_alike_whoever_wrote_the_table(cell: object, findings: list[str] | None) -> None:
    """A healthy film of one's own table has no finding called "No finding"."""
    assert findings_list(cell) == findings
