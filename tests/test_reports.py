"""What a report says of one film, and nothing else. Hermetic; the sentences are made up."""

import pytest

from utils.reports import caption_sentences, describes_the_film, sentences_of, sex_in, text_of


@pytest.mark.parametrize(
    ("findings", "kept"),
    [
        ("Improved left effusion. Lungs otherwise clear.", []),
        ("Heart is normal. MRN 1234567.", ["Heart is normal."]),
        ("Small effusion. Seen by John Smith MD at 3:45 PM on 03/04/2020.", ["Small effusion."]),
        ("Small effusion. Electronically signed by Jane Doe, MD.", ["Small effusion."]),
        ("Small left effusion on 1/2/1950.", ["Small left effusion."]),
        ("Small left effusion seen on 2020-03-04.", ["Small left effusion seen."]),
        ("Small effusion. Verified by Jane Doe.", ["Small effusion."]),
        ("Small effusion. Findings were conveyed to Ms. Johnson at 4pm.", ["Small effusion."]),
        ("Small effusion. Name: John Smith. SSN 123-45-6789.", ["Small effusion."]),
        ("Small effusion. NHS number 943 476 5919. Accession 12345678.", ["Small effusion."]),
        ("Small effusion. Films of March 3, 2020.", ["Small effusion."]),
        ("Mrs. Miller has a small effusion. Heart is normal.", []),
    ],
)
def test_neither_a_lost_finding_nor_a_name_is_left(findings, kept):
    assert caption_sentences(findings, "") == kept


def test_a_report_is_known_by_its_headings_and_a_caption_is_left_alone():
    report = (
        "HISTORY: Mr. Known, MRN 123. FINDINGS: Stable effusion. IMPRESSION: Small effusion. Discussed with Dr. XXXX."
    )
    assert text_of({"words": report}, "words", "PA film.") == "PA film. Small effusion. Effusion."
    assert text_of({"report": "Chest.\n\nSmall effusion.\n"}, "report", "A film.") == "A film. Small effusion."
    assert text_of({"report": "Chest.\n\nJane Doe, M.D."}, "report", "A film.") == ""
    assert text_of({"findings": "Mass.", "impression": None}, "findings", "A film.") == "A film. Mass."
    for caption in (
        "PA view: stable since 2019, as the user wrote it.",
        "NOTE: portable film",
        "PA chest X-ray of a 58-year-old man. Findings: effusion.",
    ):
        assert text_of({"text": caption}, "text", "A film.") == caption


@pytest.mark.parametrize(
    ("section", "sentences"),
    [
        ("1. Small effusion. 2. Clear lungs 3) Normal heart", ["Small effusion.", "Clear lungs.", "Normal heart."]),
        ("nodule of 1.5 cm.. and a scar", ["Nodule of 1.5 cm.", "A scar."]),
        ("Seen by Dr. Someone. Clear.", ["Seen by Dr. Someone.", "Clear."]),
        ("", []),
        (" . ", []),
    ],
)
def test_a_section_becomes_sentences(section: str, sentences: list[str]) -> None:
    assert sentences_of(section) == sentences


@pytest.mark.parametrize(
    ("section", "sentences"),
    [
        ("Normal chest x-XXXX. Clear.", ["Normal chest.", "Clear."]),  # the token goes whole, its full stop stays
        ("XXXX-year-old with XXXX, effusion.", ["With, effusion."]),
        ("Effusion which XXXX.", ["Effusion."]),
        ("xxxx XXXX.", []),
    ],
)
def test_no_deidentification_token_is_left(section: str, sentences: list[str]) -> None:
    assert sentences_of(section) == sentences


@pytest.mark.parametrize(
    ("report", "said"),
    [
        ("Stable cardiomegaly.", "Cardiomegaly."),
        ("Stable small effusion, unchanged from prior.", "Small effusion."),
        ("Pacemaker on the left, in stable position.", "Pacemaker on the left."),
        ("The heart is stable and within normal limits.", "The heart is within normal limits."),
        ("Opacity at the right base again noted.", "Opacity at the right base."),
        ("Clips of a previous coronary bypass.", "Clips of a previous coronary bypass."),
        ("Sequela of prior TB.", "Sequela of prior TB."),
        ("Effusions, right worse than left.", "Effusions, right worse than left."),
        ("The heart remains enlarged.", "The heart is enlarged."),
        ("New large pneumothorax.", "Large pneumothorax."),
        ("There has been interval development of an effusion.", "There has been an effusion."),
        ("Interval worsening of scoliosis.", "Scoliosis."),
        ("The effusion is slightly increased in size.", "The effusion."),
        ("Opacity at the base, correlate clinically.", "Opacity at the base."),
        (
            "Cardiomegaly, stable compared to prior, with new effusion and a pneumothorax.",
            "Cardiomegaly, with effusion and a pneumothorax.",
        ),
        ("Nodules unchanged from prior exam, without consolidation.", "Nodules, without consolidation."),
        ("Heart size is enlarged but stable.", "Heart size is enlarged."),
    ],
)
def test_what_was_there_before_is_there_still(report: str, said: str) -> None:
    """Leaving the sentence out would make a normal caption of a film that is not."""
    assert caption_sentences("", report) == [said]


@pytest.mark.parametrize(
    "sentence",
    [
        "The mediastinum is stable.",
        "Interval resolution of the effusion.",
        "The nodule seen previously has resolved.",
        "No new infiltrate.",
        "No significant change.",
        "XXXX are unremarkable.",
        "Dr. XXXX was notified.",
        "Recommend follow-up CT.",
        "Correlate clinically.",
        "History of sarcoidosis.",
    ],
)
def test_what_no_single_film_shows_is_left_out(sentence: str) -> None:
    assert caption_sentences(sentence, f"Clear lungs. {sentence}") == ["Clear lungs."]


@pytest.mark.parametrize(
    "said",
    [
        "No interval worsening of the right effusion.",
        "No evidence of worsening pneumothorax.",
        "There is no evidence of interval increase in the small pneumothorax.",
        "No change right upper lobe cavitation.",
        "No significant change in the pleural fluid.",
        "The effusion has decreased.",
        "The pneumothorax is smaller.",
        "Effusion without significant change in volume loss.",
        "No increase in size of the nodule.",
    ],
)
def test_a_denied_change_is_not_a_denied_finding(said: str) -> None:
    """Nor is the finding, whose film this is, left out and the film called normal."""
    assert caption_sentences(said, "") == []
    assert caption_sentences(said, "The heart is normal.") == []
    assert caption_sentences(said, "Cardiomegaly.") == ["Cardiomegaly."]


def test_what_is_denied_ends_where_the_next_begins() -> None:
    assert caption_sentences("No pneumothorax, unchanged right effusion.", "") == [
        "Right effusion.",
        "No pneumothorax.",
    ]
    assert caption_sentences("No degenerative changes. No effusion.", "") == [
        "No degenerative changes.",
        "No effusion.",
    ]
    for denied in ("No effusion, new infiltrate or pneumothorax.", "No pneumothorax, unchanged nodule, or effusion."):
        assert all(said.startswith("No ") for said in caption_sentences(denied, "")), "a list goes on"
    assert caption_sentences("The left effusion is larger than the right.", "") == [
        "The left effusion is larger than the right."
    ]


def test_films_of_other_parts_are_not_told_of() -> None:
    said = "Left knee. Advanced degenerative joint disease. Chest. Lungs are clear. Tube tip in the pelvis. Scoliosis."
    assert caption_sentences(said, "") == ["Tube tip in the pelvis.", "Scoliosis.", "Lungs are clear."]
    assert caption_sentences("Bilateral hip replacements. Small left effusion.", "")[-1] == "Small left effusion."
    assert caption_sentences("Right knee: severe narrowing. Osteophytes.", "Heart is normal.") == ["Heart is normal."]


@pytest.mark.parametrize(
    ("report", "caption"),
    [
        ("Chest PA.\n\nLarge right pneumothorax.\n\nJohn Smith, Consultant Radiologist", "Large right pneumothorax."),
        ("Chest PA.\n\nLarge right pneumothorax.\n\nJane Doe-Miller", "Large right pneumothorax."),
        ("Clinical information: cough\n\nReport: Large right effusion.\n\nDr A. Jones", "Large right effusion."),
        ("IMPRESSION:\nNormal chest\nJohn Smith, Consultant Radiologist, GMC 1234567", "Normal chest."),
        ("IMPRESSION:\nMild Cardiomegaly\nClear Lungs", "Mild Cardiomegaly Clear Lungs."),
        ("IMPRESSION:\nNormal chest.\n\nJane Doe\n12/03/2020 14:05", "Normal chest."),
        (
            "TRACHEA IS CENTRAL.\nHEART SIZE IS\nNORMAL. LUNGS CLEAR.",
            "TRACHEA IS CENTRAL. HEART SIZE IS NORMAL. LUNGS CLEAR.",
        ),
        (
            "Opacity is\nat the base. Seen by Dr. Smith.\nLungs otherwise clear.",
            "Opacity is at the base. Lungs otherwise clear.",
        ),
        ("Chest PA.\n\nBilateral hilar lymphadenopathy.", "Bilateral hilar lymphadenopathy."),
    ],
)
def test_who_reported_is_not_in_the_caption(report: str, caption: str) -> None:
    assert text_of({"report": report}, "report", "A film.") == f"A film. {caption}"


@pytest.mark.parametrize(
    "said",
    [
        "Interval removal of left chest tube with new moderate left pneumothorax.",
        "Right pneumothorax has not resolved.",
        "Resolving right lower lobe pneumonia.",
        "The heart failure has worsened since the prior study.",
        "No substantial interval increase in the right effusion.",
        "No acute worsening of the right effusion.",
        "No acute progression of disease.",
    ],
)
def test_nor_where_only_part_of_it_is_gone_or_no_worse(said: str) -> None:
    assert caption_sentences("Heart size is normal. No acute osseous abnormality.", said) == []


def test_what_is_gone_is_no_finding() -> None:
    assert caption_sentences("Heart is normal.", "Pneumonia has resolved. Interval removal of chest tube.") == [
        "Heart is normal."
    ]


@pytest.mark.parametrize(
    ("said", "kept"),
    [
        ("The lungs are clear and unchanged from prior except for a new right upper lobe mass.",
         "The lungs are clear except for a right upper lobe mass."),
        ("The heart is normal and unchanged since the prior study although there is a large right pneumothorax.",
         "The heart is normal although there is a large right pneumothorax."),
        ("The right effusion is unchanged and there is no pneumothorax.",
         "The right effusion and there is no pneumothorax."),
    ],
)  # fmt: skip
def test_a_comparison_takes_nothing_else_along(said: str, kept: str) -> None:
    assert sentences_of(said) == [kept]


def test_a_film_is_not_called_normal_because_its_finding_was_left_out() -> None:
    finding = "Effusion has increased since the prior study."
    assert caption_sentences(finding, "No pneumothorax.") == []
    assert caption_sentences(finding, "Cardiomegaly.") == ["Cardiomegaly."]
    assert caption_sentences("No effusion since the prior study.", "No pneumothorax.") == ["No pneumothorax."]


@pytest.mark.parametrize(
    "finding",
    [
        "hydropneumothorax",
        "hilar lymphadenopathy",
        "pulmonary metastases",
        "hemothorax",
        "mediastinal widening",
        "hazy density",
    ],
)
def test_findings_are_known_by_any_of_their_names(finding: str) -> None:
    assert caption_sentences(f"The {finding} has increased since the prior study.", "No effusion.") == []


@pytest.mark.parametrize(
    "said",
    [
        "There is no evidence of new consolidation or effusion.",
        "No definite new focal consolidation.",
        "No suspicious new nodule.",
        "No evidence of persistent pneumothorax.",
        "No acute or new infiltrate.",
        "No effusion, consolidation, or new nodule.",
    ],
)
def test_what_is_not_new_may_be_there(said: str) -> None:
    assert caption_sentences(said, "Left lower lobe consolidation is unchanged.") == ["Left lower lobe consolidation."]


def test_what_is_new_after_a_denial_is_there() -> None:
    for change in ("new", "persistent", "worsening", "interval increase in"):
        said = caption_sentences(f"No pneumothorax, {change} right effusion.", "")
        assert said == ["Right effusion.", "No pneumothorax."]
    assert caption_sentences("No pneumothorax but new right effusion.", "") == ["No pneumothorax but right effusion."]
    assert caption_sentences("The heart is not enlarged, with new scarring.", "") == [
        "The heart is not enlarged, with scarring."
    ]


def test_a_comparison_before_a_colon_leaves_what_follows_it() -> None:
    seen = ["Heart size is top normal.", "Left pleural effusion."]
    for before in ("AP chest compared to ___:\n \n", "AP chest compared to ___ through ___, 4:45 p.m.:\n"):
        said = caption_sentences("", f"{before} Left pleural effusion. Heart size is top normal.")
        assert sorted(said) == seen
    assert caption_sentences("", "Comparison: none. Clear lungs.") == ["Clear lungs."]
    larger = "Right effusion is larger compared to prior: Now moderate."
    assert caption_sentences(larger, "No pneumothorax.") == [], "what is compared is a finding, and lost"


@pytest.mark.parametrize(
    ("report", "caption"),
    [
        (
            "REASON FOR EXAMINATION: Evaluate for pneumonia.\n\nPortable AP chest.\n\nSevere cardiomegaly. Right effusion.\n\n"
            "There is no pneumothorax.",
            "Severe cardiomegaly. Right effusion. There is no pneumothorax.",
        ),
        ("INDICATION: Pneumonia in an adult.", ""),
        ("CHEST, PA: Large effusion.\n\nNo pneumothorax.", "Large effusion. No pneumothorax."),
        ("LUNGS: Consolidation.\nPLEURA: Large right effusion.\nHEART AND MEDIASTINUM: Normal size.\nBONES: Unremarkable.",
         "Lungs: Consolidation. Pleura: Large right effusion. Heart and mediastinum: Normal size. Bones: Unremarkable."),
        ("FINDINGS:\nLINES AND TUBES: None.\nLUNGS: Consolidation.\n\nIMPRESSION: No pneumothorax.",
         "No pneumothorax. Lungs: Consolidation. Lines and tubes: None."),
        ("INTERPRETATION: Large left pneumothorax.\nLINES: None.", "Large left pneumothorax. Lines: None."),
        ("Right lower lobe pneumonia.\n\nNo pneumothorax.", ""),  # the history, or the film's
        ("REASON FOR CHEST X-RAY: large pneumothorax\n\nFINDINGS: Lungs are clear.", "Lungs are clear."),
        ("CLINICAL IMPRESSION: Rule out pneumonia.\nFINDINGS: Lungs are clear.", "Lungs are clear."),
        ("IMPRESSION: No pneumothorax.\nADDENDUM: There is a small left apical pneumothorax.", ""),
        ("IMPRESSION: Small effusion.\nADDENDUM: Discussed with Dr. Known.", "Small effusion."),
        ("FINDINGS: Effusion.\n\nJane Doe MBBS FRCR\n2020-03-04 12:33", "Effusion."),
        ("Cough.\n\nNo pneumothorax.\n\nSmall effusion.", "Small effusion. No pneumothorax."),
    ],
)  # fmt: skip
def test_findings_are_found_in_reports_of_other_forms(report: str, caption: str) -> None:
    assert text_of({"report": report}, "report", "A film.") == (f"A film. {caption}" if caption else "")


@pytest.mark.parametrize("word", ["mediastin", "thora", "exam", "vascular"])
def test_odd_words_take_no_time(word: str) -> None:
    assert not describes_the_film(word * 200 + "!")


def test_odd_lines_take_no_time() -> None:
    assert text_of({"report": "Effusion.\n" + "A" * 5000 + "\n" + "No of the " * 500}, "report", "A film.")


@pytest.mark.parametrize(
    "sentence",
    [
        "No degenerative change in the spine.",
        "No obvious fracture or degenerative change of the ribs.",
        "No increase in interstitial markings.",
        "Heart is not enlarged with fibrotic change in the upper lobes.",
        "There is no development of effusion.",
    ],
)
def test_kinds_of_change_are_no_changes_since(sentence: str) -> None:
    said = caption_sentences(f"Heart size normal. {sentence}", "")
    assert "Heart size normal." in said and len(said) == 2


def test_the_impression_leads_and_normal_sentences_come_last() -> None:
    findings = (
        "No effusion. Rib fracture on the left. The heart is normal. Clear apices, but scars at the bases. "
        "Cardiomegaly without congestion."
    )
    assert caption_sentences(findings, "Fracture. No effusion.") == [
        "Fracture.",
        "No effusion.",
        "Rib fracture on the left.",
        "Clear apices, but scars at the bases.",
        "Cardiomegaly without congestion.",
        "The heart is normal.",
    ]


@pytest.mark.parametrize(
    ("indication", "sex"),
    [
        ("XXXX-year-old female with cough", "F"),
        ("XXXX y/o M, dyspnea", "M"),
        ("male infant", "M"),
        ("Woman whose man smokes", None),
        ("chest pain", None),
        ("I am short of breath", None),
    ],
)
def test_the_sex_is_what_the_indication_names(indication: str, sex: str | None) -> None:
    assert sex_in(indication) == sex
