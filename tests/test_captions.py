"""Captions say what the labels say and nothing more."""

import itertools
import re

import pytest

from utils.captions import caption, fit


@pytest.mark.parametrize(
    ("view", "age", "sex", "findings", "text"),
    [
        ("PA", 58, "M", [], "PA chest radiograph of a 58-year-old man. No acute finding."),
        (
            "AP",
            77,
            "M",
            ["Pneumonia", "Edema", "Pleural thickening", "Effusion", "Infiltration"],
            "AP chest radiograph of a 77-year-old man. Edema, effusion, infiltration, pleural thickening and pneumonia.",
        ),
        ("PA", 80, "F", ["Mass", "Hernia"], "PA chest radiograph of an 80-year-old woman. Hernia and mass."),
        ("AP", 8, "M", ["Nodule"], "AP chest radiograph of an 8-year-old boy. Nodule."),
        ("PA", 17, "F", None, "PA chest radiograph of a 17-year-old girl."),
        ("PA", 18, "F", None, "PA chest radiograph of an 18-year-old woman."),
        ("AP", 0, "F", [], "AP chest radiograph of an infant girl. No acute finding."),
        ("AP", 0, None, [], "AP chest radiograph of an infant. No acute finding."),
        (None, None, "F", ["COVID-19"], "Chest radiograph of a woman. COVID-19."),
        (None, 40, None, None, "Chest radiograph of a 40-year-old patient."),
        ("LL", None, None, None, "Lateral chest radiograph."),
        ("XY", None, "?", ["Edema", "COVID-19"], "Chest radiograph. COVID-19 and edema."),
    ],
)
def test_caption_reads(view, age, sex, findings, text):
    assert caption(view, age, sex, findings) == text


def test_one_film_in_five_is_described_in_other_words():
    texts = [caption("PA", 58, "M", ["Edema"], f"{film}.png") for film in range(4000)]
    usual = caption("PA", 58, "M", ["Edema"])
    assert texts == [caption("PA", 58, "M", ["Edema"], f"{film}.png") for film in range(4000)]
    assert 0.18 < sum(text != usual for text in texts) / 4000 < 0.22
    assert len(set(texts)) == 4
    assert all(text.endswith(".") and "58-year-old man" in text and "dema" in text for text in texts)


def test_caption_does_not_depend_on_the_order_of_findings():
    texts = {caption("PA", 50, "M", order) for order in itertools.permutations(["Mass", "Edema", "Hernia"])}
    assert len(texts) == 1


def test_caption_invents_neither_side_nor_severity():
    findings = ["Atelectasis", "Cardiomegaly", "Effusion", "Pneumothorax"]
    for view, age, sex in itertools.product(("PA", "AP", None), (0, 5, 50, None), ("M", "F", None)):
        text = caption(view, age, sex, findings)
        assert not re.search(r"left|right|bilateral|mild|moderate|severe|normal|None|  ", text)


def count_words(text: str) -> int:
    return len(text.split())


@pytest.mark.parametrize(
    ("limit", "fitted"),
    [
        (9, "Left effusion. Nodule of 1.5 cm. Clear right lung."),  # as it is, to the space
        (8, "Left effusion. Nodule of 1.5 cm."),
        (5, "Left effusion. Nodule of 1.5 cm."),  # never less than the view and what matters most
    ],
)
def test_a_long_caption_loses_whole_sentences_from_its_end(limit: int, fitted: str) -> None:
    assert fit("Left effusion. Nodule of 1.5 cm. Clear right lung.", count_words, limit) == fitted
