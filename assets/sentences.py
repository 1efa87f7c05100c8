"""Radiology sentences of our own making, for the words that the films' captions never use.

cxr-tiny sees three labels in pixels. Its text encoder has to know more words than that, or an adapter starts from
random vectors: it learns to read these sentences as a second task (`assets/train_cxr_tiny.py`). No report was copied.
"""

import random
from dataclasses import dataclass

from utils.captions import capitalised, describe_findings

SIDES = ("none", "right", "left", "bilateral")
ZONES = ("none", "upper", "middle", "lower")
VIEWS = ("none", "pa", "ap", "lateral")
SEXES = ("none", "female", "male")
AGES = ("none", "infant", "child", "young adult", "middle-aged", "old")
PRESENCES = ("not mentioned", "denied", "present")

# What each finding goes by; those that are PAIRED have a side
PAIRED = {
    "effusion": ("pleural effusion", "effusion", "pleural fluid"),
    "pneumothorax": ("pneumothorax", "collapsed lung with a pleural line"),
    "nodule": ("nodule", "pulmonary nodule", "round nodule", "small round opacity"),
    "mass": ("mass", "lung mass", "round mass", "large round opacity"),
    "consolidation": ("consolidation", "airspace consolidation", "airspace opacity"),
    "atelectasis": ("atelectasis", "volume loss", "linear atelectasis"),
    "infiltration": ("infiltration", "infiltrate", "hazy opacity"),
    "pleural thickening": ("pleural thickening", "thickened pleura"),
    "fibrosis": ("fibrosis", "scarring", "reticular opacities"),
    "pneumonia": ("pneumonia", "lobar pneumonia", "bronchopneumonia"),
    "bacterial pneumonia": ("bacterial pneumonia", "pneumonia of bacterial origin"),
    "viral pneumonia": ("viral pneumonia", "pneumonia of viral origin"),
    "pacemaker": ("pacemaker", "pacemaker with leads", "cardiac pacemaker", "implanted cardiac device"),
    "catheter": ("central venous catheter", "central line", "picc line"),
    "tube": ("chest tube", "chest drain", "pigtail drain"),
    "fracture": ("rib fracture", "healed rib fracture", "clavicle fracture"),
}
UNPAIRED = {
    "cardiomegaly": ("cardiomegaly", "enlarged heart", "enlarged cardiac silhouette", "heart is enlarged"),
    "emphysema": ("emphysema", "hyperinflation", "flattened diaphragms"),
    "edema": ("edema", "pulmonary edema", "vascular congestion"),
    "hernia": ("hiatal hernia", "hernia"),
    "endotracheal tube": ("endotracheal tube", "intubated patient"),
}
ZONED = ("nodule", "mass", "consolidation", "infiltration", "atelectasis")
FINDINGS = (*PAIRED, *UNPAIRED)
SYNONYMS = PAIRED | UNPAIRED
NORMAL = (
    "No acute finding.", "Normal.", "Clear lungs.", "The lungs are clear.", "No acute cardiopulmonary abnormality.",
    "Normal heart size.", "No focal consolidation.", "Unremarkable.", "No finding.",
)  # fmt: skip
PEOPLE = {
    ("infant", "none"): ("an infant", "a baby", "a newborn"),
    ("infant", "female"): ("an infant girl", "a baby girl"),
    ("infant", "male"): ("an infant boy", "a baby boy"),
    ("child", "none"): ("a child", "a {age}-year-old child", "a young patient"),
    ("child", "female"): ("a girl", "a {age}-year-old girl"),
    ("child", "male"): ("a boy", "a {age}-year-old boy"),
    ("none", "none"): ("a patient",),
    ("none", "female"): ("a woman", "a female patient"),
    ("none", "male"): ("a man", "a male patient"),
}
ADULTS = {
    "none": ("a {age}-year-old patient", "an adult of {age} years"),
    "female": ("a {age}-year-old woman", "a woman of {age}"),
    "male": ("a {age}-year-old man", "a man of {age}"),
}
AGE_RANGES = {"child": (1, 17), "young adult": (18, 39), "middle-aged": (40, 64), "old": (65, 95)}


@dataclass(frozen=True)
class Reading:
    """What a sentence says: an index into SIDES, ZONES, VIEWS, SEXES, AGES and, a finding, into PRESENCES."""

    view: int
    sex: int
    age: int
    presences: tuple[int, ...]  # in the order of FINDINGS
    sides: tuple[int, ...]
    zones: tuple[int, ...]

    @property
    def answers(self) -> list[int]:
        """All of it in one list: view, sex, age, then presence, side and zone of each finding in turn."""
        by_finding = zip(self.presences, self.sides, self.zones, strict=True)
        return [self.view, self.sex, self.age, *(answer for triple in by_finding for answer in triple)]


def compose(rng: random.Random) -> tuple[str, Reading]:
    """Return a caption as a report would put it, and what it says."""
    view, sex = rng.choice(VIEWS), rng.choice(SEXES)
    age = rng.choice(AGES)
    presences, sides, zones = ([0] * len(FINDINGS) for _ in range(3))
    sentences = []
    mentioned = rng.sample(FINDINGS, rng.choices((0, 1, 2, 3), (2, 5, 3, 1))[0])
    if len(mentioned) > 1 and rng.random() < 0.4:  # a list, as of labels
        sentences.append(f"{capitalised(describe_findings([name_of(finding, rng) for finding in mentioned]))}.")
        for finding in mentioned:
            presences[FINDINGS.index(finding)] = PRESENCES.index("present")
        mentioned = []
    for finding in mentioned:
        index, name = FINDINGS.index(finding), name_of(finding, rng)
        if rng.random() < 0.2:
            presences[index] = PRESENCES.index("denied")
            sentences.append(rng.choice(("No {}.", "There is no {}.", "No evidence of {}.")).format(name))
            continue
        side = rng.choices(SIDES, (2, 4, 4, 1))[0] if finding in PAIRED else "none"
        zone = rng.choice(ZONES) if finding in ZONED and side != "bilateral" else "none"
        presences[index] = PRESENCES.index("present")
        sides[index], zones[index] = SIDES.index(side), ZONES.index(zone)
        sentences.append(describe(name, side, zone, rng))
    if PRESENCES.index("present") not in presences and rng.random() < 0.7:
        sentences.append(rng.choice(NORMAL))
    rng.shuffle(sentences)
    text = " ".join([opening(view, sex, age, rng), *sentences])
    reading = Reading(
        VIEWS.index(view), SEXES.index(sex), AGES.index(age), tuple(presences), tuple(sides), tuple(zones)
    )
    return text, reading


def name_of(finding: str, rng: random.Random) -> str:
    """Return one of the names that a finding goes by."""
    return rng.choice(SYNONYMS[finding])


def describe(name: str, side: str, zone: str, rng: random.Random) -> str:
    """Return a sentence that puts a finding on a side and in a zone, each where it is not "none"."""
    if side == "bilateral":
        place, adjective = "in both lungs", "bilateral"
    elif zone != "none":
        region = f"{zone} {rng.choice(('zone', 'lung', 'lobe') if zone != 'middle' else ('zone', 'lung'))}"
        place = f"in the {side} {region}" if side != "none" else f"in the {region}"
        adjective = f"{side} {zone} zone" if side != "none" else f"{zone} zone"
    elif side != "none":
        place = rng.choice((f"on the {side}", f"in the {side} lung", f"over the {side} chest", f"on the {side} side"))
        adjective = side
    else:
        place, adjective = "", ""
    if not place:
        sentence = rng.choice(("{name}.", "There is {name}.", "Findings of {name}.")).format(name=name)
    else:
        form = rng.choice(("{adjective} {name}.", "{name} {place}.", "There is {name} {place}."))
        sentence = form.format(name=name, place=place, adjective=adjective)
    return sentence[0].upper() + sentence[1:]


def opening(view: str, sex: str, age: str, rng: random.Random) -> str:
    """Return the first sentence: the view and the patient, as far as they are known."""
    film = {
        "none": ("Chest radiograph", "Chest X-ray", "Frontal chest film", "Chest film"),
        "pa": ("PA chest radiograph", "PA chest X-ray", "Posteroanterior chest film", "Upright PA view"),
        "ap": ("AP chest radiograph", "AP chest X-ray", "Portable AP chest film", "Supine AP view"),
        "lateral": ("Lateral chest radiograph", "Lateral chest X-ray", "Lateral view"),
    }[view]
    if age == sex == "none":
        patient = rng.choice(("", " of a patient"))
    elif age in ("none", "infant", "child"):
        patient = " of " + rng.choice(PEOPLE[age, sex])
    else:
        patient = " of " + rng.choice(ADULTS[sex])
    if age in AGE_RANGES:
        years = rng.randint(*AGE_RANGES[age])
        patient = patient.format(age=years)
        for number in (8, 11, 18, *range(80, 90)):
            patient = patient.replace(f"of a {number}-", f"of an {number}-")
    return f"{rng.choice(film)}{patient}."
