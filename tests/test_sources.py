"""Readers of the published sets: what their files say, in their own odd ways, and nothing else, reaches a caption."""

import gzip
import io
import zipfile
from contextlib import nullcontext
from pathlib import Path

import pytest

import download
from tests.conftest import mirror_of
from tests.test_download import film, run_here
from tests.test_mirror import Host
from utils.files import read_jsonl
from utils.films import UNKNOWN_VIEW, Film
from utils.mirror import Mirror
from utils.refusal import Refused
from utils.sources import chexpert, covid, mimic, montgomery, padchest, shenzhen, vindr


def csv(*lines: str) -> bytes:
    return ("\n".join(lines) + "\n").encode()


def of(films: list[Film], name: str) -> Film:
    return next(film for film in films if film.source_id == name)


@pytest.mark.parametrize("source", download.SOURCES.values(), ids=lambda source: source.NAME)
def test_every_source_says_what_it_is(source) -> None:
    assert source.EXAMPLE.startswith("python download.py")
    assert ("--accept_license" in source.EXAMPLE) == source.RESTRICTED
    assert source.TERMS and source.LICENSE and source.TEXT and source.__doc__.count("\n") == 0
    assert all(len(line) <= 130 for line in source.TERMS.splitlines())


def test_sources_that_restrict_what_one_may_do_ask_first(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    for source in ("covid-chestxray", "mimic-cxr", "chexpert", "padchest", "vindr", "hf"):
        with pytest.raises(Refused, match="--accept_license"):
            run_here(tmp_path, tmp_path, source=source)
        assert download.SOURCES[source].TERMS in capsys.readouterr().out
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("source", ["folder", "dicom", "hf", "mimic-cxr", "chexpert", "padchest", "vindr"])
def test_sources_without_an_address_say_where_to_get_them(source: str, tmp_path: Path) -> None:
    args = ["--source", source, "--accept_license", "--output_dir", str(tmp_path / "data")]
    with pytest.raises(Refused, match=f"--source {source} needs --mirror: python download.py --source {source}"):
        download.main(download.parse_args(args))


# The two sets of the National Library of Medicine

READINGS = {
    "MCUCXR_0001_0": "Patient's Sex: F \nPatient's Age: 027Y\nnormal",
    "MCUCXR_0080_0": "Patient's Sex: O \nPatient's Age: 005Y\nnormal",
    "MCUCXR_0113_1": "Patient's Sex: F \nPatient's Age: 084Y\nRML infiltrate; rt pleural effusion; pt on Rx since 6M",
    "MCUCXR_0117_1": "Patient's Sex: F \nPatient's Age: 085Y\nstable CXR since 6M (same pt as MCUCXR_0113_1)",
    "MCUCXR_0162_1": "Patient's Sex: M \nPatient's Age: 049Y\nlarge cavity in LUL; active TB",
    "MCUCXR_0166_1": "Patient's Sex: M \nPatient's Age: 049Y\nNO REPORT (same pt as MCUCXR_0162_1)",
    "MCUCXR_0170_1": "Patient's Sex: M \nPatient's Age: 049Y\nold scars (same pt as MCUCXR_0166_1, MCUCXR_0162_1)",
}


def nlm_zip(readings: dict[str, str]) -> bytes:
    """An archive as published: films, readings, and masks under the names of the films."""
    archive = io.BytesIO()
    with zipfile.ZipFile(archive, "w") as plain:
        for number, (name, reading) in enumerate(readings.items()):
            png = io.BytesIO()
            film(number, side=200).save(png, "PNG")
            plain.writestr(f"Set/CXR_png/{name}.png", png.getvalue())
            plain.writestr(f"Set/ManualMask/leftMask/{name}.png", b"a mask")
            plain.writestr(f"__MACOSX/Set/CXR_png/._{name}.png", b"a fork")
            plain.writestr(f"Set/ClinicalReadings/{name}.txt", reading)
    return archive.getvalue()


def test_readings_become_captions(tmp_path: Path) -> None:
    (tmp_path / montgomery.ARCHIVE).write_bytes(nlm_zip(READINGS))
    films = montgomery.list_films(Mirror(str(tmp_path)))
    assert [film.source_id for film in films] == sorted(READINGS)
    assert of(films, "MCUCXR_0001_0").text == "PA chest X-ray of a 27-year-old woman. No acute finding is seen."
    assert (of(films, "MCUCXR_0080_0").sex, of(films, "MCUCXR_0080_0").age) == (None, 5)
    treated = of(films, "MCUCXR_0113_1")
    assert treated.text == (
        "PA chest radiograph of an 84-year-old woman. Right middle lobe infiltrate. Right pleural effusion."
    )
    assert of(films, "MCUCXR_0162_1").findings == ["Tuberculosis"]
    assert of(films, "MCUCXR_0117_1").text == ""  # nothing is said of this film itself


@pytest.mark.parametrize(
    ("reading", "text", "findings"),
    [
        ("RUL infiltrate under treatment. Heart size is normal.", "", None),
        ("normal on 2nd reading; improved after treatment", "", None),
        (
            "no evidence of active tuberculosis; RUL scars",
            "Right upper lobe scars. No evidence of active tuberculosis.",
            None,
        ),
        ("STB", "Secondary pulmonary tuberculosis.", ["Tuberculosis"]),
    ],
)
def test_no_abnormal_film_is_called_normal_for_want_of_words(
    reading: str, text: str, findings: list[str] | None
) -> None:
    found = montgomery.film_of("x_1", "CXR_png/x_1.png", True, f"male 40yrs\n{reading}", "p", "a.zip")
    assert found.text.endswith(text) and bool(found.text) == bool(text) and "ormal" not in found.text
    assert found.findings == findings


def test_films_of_one_patient_are_known_by_their_readings(tmp_path: Path) -> None:
    (tmp_path / montgomery.ARCHIVE).write_bytes(nlm_zip(READINGS))
    patients = {film.source_id[7:11]: film.patient_id for film in montgomery.list_films(Mirror(str(tmp_path)))}
    assert patients["0117"] == patients["0113"] == "montgomery-0113"
    assert patients["0162"] == patients["0166"] == patients["0170"] == "montgomery-0162"
    assert len(set(patients.values())) == 4


@pytest.mark.parametrize(
    ("head", "sex", "age"),
    [
        ("male 45yrs", "M", 45),
        ("femal 32yrs", "F", 32),
        ("female24yrs", "F", 24),
        ("male 42", "M", 42),
        ("male 16month", "M", 1),
        ("female 64days", "F", 0),
        ("male , 29yrs  \t", "M", 29),
        ("Female, 28yrs", "F", 28),
    ],
)
def test_heads_of_readings_are_read_as_they_were_typed(head: str, sex: str, age: int) -> None:
    assert montgomery.parse_reading(f"{head}\nnormal\n") == (sex, age, "normal")
    assert montgomery.parse_reading(f"{head}\nbilateral PTB ?right pleurisy\nNATB")[2] == (
        "bilateral pulmonary tuberculosis possible right pleurisy. NATB"
    )
    assert montgomery.parse_reading(f"{head}\n1.PTB; 2.5 cm cavity")[2] == "pulmonary tuberculosis. 2.5 cm cavity"


def test_an_archive_at_an_address_and_a_folder_give_the_same_set(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    readings = {
        f"CHNCXR_{n:04d}_{n % 2}": f"male {30 + n}yrs\n{'Right PTB' if n % 2 else 'normal'}" for n in range(1, 11)
    }
    host = Host(nlm_zip(readings))
    monkeypatch.setattr(download, "open_client", lambda workers: nullcontext(host.client))
    remote = run_here(tmp_path / "remote", "http://host", source="shenzhen")
    (tmp_path / "folder").mkdir()
    with zipfile.ZipFile(io.BytesIO(host.content)) as plain:
        plain.extractall(tmp_path / "folder")
    (tmp_path / "local").mkdir()
    unpacked = run_here(tmp_path / "local", tmp_path / "folder", source="shenzhen")
    assert (remote / "metadata.jsonl").read_bytes() == (unpacked / "metadata.jsonl").read_bytes()
    rows = read_jsonl(remote / "metadata.jsonl")
    assert len(rows) == 10 and len({row["patient_id"] for row in rows}) == 10
    # The films that were fetched are kept: another size asks for none of them again
    host.sent, (whole) = 0, len(host.content)
    run_here(tmp_path / "remote", "http://host", "--overwrite", "--resolution", "128", source="shenzhen")
    assert host.sent < whole


def test_a_mirror_without_the_set_is_refused(tmp_path: Path) -> None:
    for source in (montgomery, shenzhen):
        with pytest.raises(Refused, match="no film such as"):
            source.list_films(Mirror(str(tmp_path)))


# COVID-19 image data collection

COVID_HEADER = "patientid,offset,sex,age,finding,view,modality,date,location,folder,filename,license,clinical_notes,"


def covid_films(*lines: str) -> list[Film]:
    return covid.list_films(mirror_of({covid.TABLE: csv(COVID_HEADER, *lines)}))


def test_covid_table_is_read() -> None:
    films = covid_films(
        "2,0,M,65,Pneumonia/Viral/COVID-19,PA,X-ray,2020,Vietnam,images,a.jpeg,CC BY 3.0,On January 22 a man fell ill,",
        "3,0,F,,No Finding,AP Supine,X-ray,,,images,b.png, ,,",
        "311a,,,40,todo,AP,X-ray,,,images,c.png,CC BY-NC-SA,,",
        "4,,M,50,Pneumonia/Bacterial/Staphylococcus/MRSA,L,X-ray,,,images,d.png,,,,",
        '5,,F,60,"COVID-19, ARDS",Axial,CT,,,volumes,e.nii.gz,,,',
    )
    assert [film.text for film in films[:2]] == [
        "PA chest radiograph of a 65-year-old man. COVID-19 pneumonia.",
        "AP chest radiograph of a woman. No acute finding.",
    ]
    assert films[2].text == "" and films[2].findings is None
    assert films[3].view == "LATERAL" and films[3].findings == ["MRSA pneumonia"]
    assert films[4].fault == "modality CT" and films[4].findings == ["ARDS", "COVID-19"]
    assert [film.license for film in films[:3]] == ["CC BY 3.0", "unknown", "CC BY-NC-SA"]
    assert [film.patient_id for film in films] == ["covid-2", "covid-3", "covid-311a", "covid-4", "covid-5"]


def test_a_film_under_two_patients_ties_them_together() -> None:
    films = covid_films(
        *(
            f"{p},,M,50,COVID-19,PA,X-ray,,,images,{name},,,"
            for p, name in ((285, "x.jpg"), (339, "x.jpg"), (339, "y.jpg"))
        )
    )
    assert [film.patient_id for film in films] == ["covid-285"] * 3
    assert [film.fault for film in films] == [None, "in the table twice", None]
    assert len({film.source_id for film in films}) == 3


def test_patients_are_tied_together_through_others() -> None:
    shared = ((1, "a.jpg"), (2, "a.jpg"), (2, "b.jpg"), (3, "b.jpg"), (3, "c.jpg"), (4, "d.jpg"))
    films = covid_films(*(f"{p},,M,50,COVID-19,PA,X-ray,,,images,{name},,," for p, name in shared))
    assert [film.patient_id for film in films] == ["covid-1"] * 5 + ["covid-4"]


# Sets that are given to registered users only

CHEXPERT_HEADER = "Path,Sex,Age,Frontal/Lateral,AP/PA,No Finding,Cardiomegaly,Edema,Support Devices"


def test_chexpert_labels_are_read() -> None:
    path = "CheXpert-v1.0-small/train/patient{:05d}/study1/view1_frontal.jpg".format
    films = chexpert.list_films(
        mirror_of(
            {
                "train.csv": csv(
                    CHEXPERT_HEADER,
                    f"{path(1)},Female,68,Frontal,AP,1.0,,,",
                    f"{path(2)},Male,87,Frontal,PA,,1.0,-1.0,1.0",
                    f"{path(3)},Unknown,0,Frontal,AP,,0.0,-1.0,",
                    f"{path(4)},Male,50,Lateral,,,1.0,,",
                    f"{path(5)},Male,50,Frontal,LL,,1.0,,",
                )
            }
        )
    )
    assert films[0].text == "AP chest radiograph of a 68-year-old woman. No acute finding."
    assert films[1].findings == ["Cardiomegaly", "Support devices"]
    other = csv(CHEXPERT_HEADER + ",Pleural Other", f"{path(1)},Male,50,Frontal,PA,,1.0,,,1.0")
    assert chexpert.list_films(mirror_of({"train.csv": other}))[0].findings == ["Cardiomegaly"]
    assert films[2].text == "" and films[2].age is None and films[2].sex is None  # nothing certain is no finding
    assert [film.view for film in films] == ["AP", "PA", "AP", "LATERAL", "LATERAL"]
    assert films[1].path == "train/patient00002/study1/view1_frontal.jpg" and films[1].patient_id == "chexpert-00002"
    with pytest.raises(Refused, match="no path of CheXpert"):
        chexpert.list_films(
            mirror_of({"train.csv": csv(CHEXPERT_HEADER, "a/../patient00001/x.jpg,Male,1,Frontal,AP,,,,")})
        )


def test_chexpert_plus_reports_are_taken_where_they_are(tmp_path: Path) -> None:
    (tmp_path / "df_chexpert_plus_240401.csv").write_bytes(
        csv(
            "path_to_image,section_findings,section_impression,frontal_lateral,ap_pa,age,sex",
            'train/patient1/study1/view1_frontal.jpg,nan,"\n1. STABLE CARDIOMEGALY.\n\n2. NO EDEMA.",Frontal,AP,61.0,Female',
            "train/patient2/study1/view1_frontal.jpg,Dominant nodule.,Malignant effusion.,Frontal,PA,60,Male",
        )
    )
    film, other = chexpert.list_films(Mirror(str(tmp_path)))
    assert other.text == "PA chest radiograph of a 60-year-old man. Malignant effusion. Dominant nodule."
    assert film.path == "PNG/train/patient1/study1/view1_frontal.png"
    assert film.text.casefold() == "ap chest radiograph of a 61-year-old woman. cardiomegaly. no edema."


def test_padchest_labels_stand_where_they_are() -> None:
    header = (
        "ImageID,ImageDir,StudyDate_DICOM,PatientID,PatientBirth,PatientSex_DICOM,Projection,Report,Labels,"
        "LabelsLocalizationsBySentence"
    )
    rows = (
        """a.png,0,20140915,83,1930.0,F,PA,x,"['normal']","[['normal'], ['normal']]\"""",
        """b.png,12,20140915,84,1960.0,M,AP_horizontal,x,"['nodule', ' pleural effusion']","""
        """"[['pleural effusion', 'loc right'], ['nodule'], ['exclude']]\"""",
        """c.png,12,20140915,85,nan,O,L,x,"['nodule', ' COPD signs']","['nodule', ' COPD signs', 'loc left']\"""",
        """d.png,1,20140915,86,1960.0,M,PA,x,"['unchanged']","['unchanged']\"""",
        """e.png,1,20140915,nan,1960.0,M,EXCLUDE,x,"['exclude']",nan""",
        """f.png,1,20140915,87,1930.0,F,PA,x,"['abnormal foreign body', nan]",nan""",
        """g.png,1,20140915,88,1930.0,F,PA,x,"['nodule']","[['normal']]\"""",
        """h.png,1,20140915,89,1930.0,F,PA,x,"['normal', 'unchanged']","[['normal'], ['unchanged']]\"""",
        """i.png,1,20140915,90,1930.0,F,PA,x,"['pleural effusion', 'hemidiaphragm elevation', 'dai']","""
        """"[['pleural effusion', 'loc right'], ['hemidiaphragm elevation left side'], ['dai']]\"""",
        """j.png,1,20140915,91,1930.0,F,PA,x,"[' normal']","[[' normal']]\"""",
        """k.png,1,20140915,92,1930.0,F,PA,x,"['cardiomegaly', ' exclude']","[['cardiomegaly'], ['exclude']]\"""",
    )
    films = padchest.list_films(mirror_of({f"{padchest.TABLE}.gz": gzip.compress(csv(header, *rows))}))
    assert films[0].text == "PA chest radiograph of an 84-year-old woman. No acute finding."
    assert films[1].text == "AP chest radiograph of a 54-year-old man. Pleural effusion: right. Nodule."
    assert (films[1].path, films[1].archive, films[1].findings) == (
        "12/b.png",
        "12.zip",
        ["nodule", "pleural effusion"],
    )
    assert films[2].text.endswith("COPD signs and nodule.") and (films[2].view, films[2].age) == ("LATERAL", None)
    assert films[3].text == "" and films[4].fault == "excluded by its owner" and films[4].patient_id is None
    assert films[5].findings == ["abnormal foreign body"]  # "normal" is in it, and it is not
    assert films[6].findings == ["nodule"]
    assert films[7].text == "" and films[7].findings is None  # it may be unchanged from anything
    assert films[8].text.endswith("Pleural effusion: right. Hemidiaphragm elevation: left. Implantable defibrillator.")
    assert films[8].findings == ["hemidiaphragm elevation", "implantable defibrillator", "pleural effusion"]
    assert (
        films[9].findings == [] and "no acute finding" in films[9].text and films[10].fault == "excluded by its owner"
    )


@pytest.mark.parametrize("place", ["12/a.png", "images/12/a.png", "images/a.png", None])
def test_padchest_films_are_found_where_they_were_unpacked(place: str | None, tmp_path: Path) -> None:
    header = (
        "ImageID,ImageDir,StudyDate_DICOM,PatientID,PatientBirth,PatientSex_DICOM,Projection,Labels,"
        "LabelsLocalizationsBySentence"
    )
    rows = [f"""{n}.png,12,20140915,{n},1930.0,F,PA,"['normal']",[]""" for n in ("a", *range(6))]
    (tmp_path / padchest.TABLE).write_bytes(csv(header, *rows))
    if place is None:
        with zipfile.ZipFile(tmp_path / "12.zip", "w") as plain:
            for number, name in enumerate(("a", *range(6))):
                film(number).save(tmp_path / "x.png")
                plain.write(tmp_path / "x.png", f"{name}.png")
    else:
        for number, name in enumerate(("a", *range(6))):
            path = tmp_path / place.replace("a.png", f"{name}.png")
            path.parent.mkdir(parents=True, exist_ok=True)
            film(number).save(path)
    data = run_here(tmp_path / "run", tmp_path, "--accept_license", source="padchest")
    assert len(read_jsonl(data / "metadata.jsonl")) == 7


def test_vindr_counts_what_two_of_three_radiologists_saw() -> None:
    rows = [f"{image},{rad},{e},{n}" for image, votes in {"aa": "110", "bb": "100", "cc": "000"}.items()
            for rad, (e, n) in enumerate([(vote, 1 if image == "cc" else 0) for vote in votes])]  # fmt: skip
    rows = [f"{row},{int(row.startswith('bb'))}" for row in rows]  # what all three saw says nothing
    table = "annotations/image_labels_train.csv"
    films = vindr.list_films(
        mirror_of({table: csv("image_id,rad_id,Pleural effusion,No finding,Other diseases", *rows)})
    )
    assert [film.findings for film in films] == [["Pleural effusion"], None, []]
    assert films[0].path == "train/aa.dicom" and films[0].patient_id is None
    kaggle = [
        f"aa,{name},R{rad}"
        for rad, name in ((1, "Cardiomegaly"), (1, "Cardiomegaly"), (2, "Nodule/Mass"), (3, "Nodule/Mass"))
    ]
    (film,) = vindr.list_films(mirror_of({"train.csv": csv("image_id,class_name,rad_id", *kaggle)}))
    assert film.findings == ["Nodule/mass"]


REPORT = """                                 FINAL REPORT
 EXAMINATION:  CHEST (PA AND LAT)

 INDICATION:  ___ year old woman with cough

 COMPARISON:  ___

 FINDINGS:

 Heart size is normal.  Small
 left effusion.

 IMPRESSION:

 Small left pleural effusion, unchanged from ___.
"""


@pytest.mark.parametrize("packed", [True, False])
def test_mimic_reports_meet_their_films(packed: bool, tmp_path: Path) -> None:
    header = "dicom_id,subject_id,study_id,PerformedProcedureStepDescription,ViewPosition"
    rows = [f"02aa-{n},10000032,50414267,CHEST (PA AND LAT),{view}" for n, view in enumerate(("PA", "LATERAL", ""))]
    table = csv(header, *rows, "03bb,10000764,57375967,CHEST,AP")
    (tmp_path / "mimic-cxr-2.0.0-metadata.csv.gz").write_bytes(gzip.compress(table))
    labels = csv("subject_id,study_id,Edema,No Finding,Pleural Effusion", "10000032,50414267,-1.0,,1.0")
    (tmp_path / "mimic-cxr-2.0.0-chexpert.csv").write_bytes(labels)
    study = tmp_path / "files" / "p10" / "p10000032"
    (study / "s50414267").mkdir(parents=True)
    (study / "s50414267" / "02aa-0.dcm").write_bytes(b"")
    if packed:
        with zipfile.ZipFile(tmp_path / mimic.REPORTS, "w") as plain:
            plain.writestr("files/p10/p10000032/s50414267.txt", REPORT)
    else:
        (study / "s50414267.txt").write_text(REPORT)
    films = mimic.list_films(Mirror(str(tmp_path)))
    assert films[0].text == (
        "PA chest radiograph. Small left pleural effusion. Small left effusion. Heart size is normal."
    )
    assert films[0].path == "files/p10/p10000032/s50414267/02aa-0.dcm" and films[0].patient_id == "mimic-10000032"
    assert films[0].findings == ["Pleural effusion"]
    assert [film.view for film in films] == ["PA", "LATERAL", UNKNOWN_VIEW, "AP"]
    assert films[3].text == ""  # no report


def test_tables_of_other_sets_are_told_apart(tmp_path: Path) -> None:
    (tmp_path / "train.csv").write_bytes(csv("a,b", "1,2"))
    for source, message in (
        (chexpert, "lacks Path"),
        (vindr, "lacks image_id"),
        (padchest, f"holds no {padchest.TABLE}"),
        (mimic, f"holds no {mimic.TABLE}"),
        (covid, f"holds no {covid.TABLE}"),
    ):
        with pytest.raises(Refused, match=message):
            source.list_films(Mirror(str(tmp_path)))
