"""From a radiology report to a caption: sections cleaned, sentences chosen and put in order.

A caption is what a model will be asked to draw, so it holds what one film can show and nothing else. De-identification
tokens go ("XXXX", as whole tokens: they are what memorised films are recalled by, arXiv:2502.07516), and so do sentences
that compare with earlier films, report a telephone call or plan what comes next. Nothing is added.
"""

import re


def words(*alternatives: str) -> re.Pattern:
    """Return a pattern for any of some expressions, as whole words in any case."""
    return re.compile(rf"\b(?:{'|'.join(alternatives)})\b", re.IGNORECASE)


REDACTED = re.compile(r"\S*XXXX\S*?(?P<mark>[.,;:?!]*)(?=\s|$)", re.IGNORECASE)
LIST_NUMBER = re.compile(r"(?:^|(?<=[\s.,]))\(?\d{1,2}[.)](?=\s|[A-Z])\s*")  # not the "1." of "1.5 cm"
SENTENCE_END = re.compile(r"(?<=[.?!;])\s+")
ABBREVIATION = re.compile(r"\b(?:dr|mr|mrs|ms|vs|approx|st|e\.g|i\.e)\.$", re.IGNORECASE)

# "Stable cardiomegaly" is cardiomegaly all the same: these words go, and what is there stays
AS_BEFORE = (
    r"(?:stable|unchanged|similar|(?:not (?:significantly )?|un)changed|without (?:significant |interval )?change)"
)
COMPARISONS = (
    re.compile(rf",?\s*\bin {AS_BEFORE} (?:position|appearance)\b", re.IGNORECASE),
    re.compile(rf"\b{AS_BEFORE} and\s+", re.IGNORECASE),
    # At the end of a sentence, with what it is compared with: ", unchanged from prior", "is stable in appearance"
    re.compile(
        rf",?\s*\b(?:(?:is|are|appears?|remains?) )?(?:(?:grossly|relatively|essentially|overall) )?{AS_BEFORE}"
        r"(?: in (?:appearance|size|position))?(?: (?:from|since|to|compared|when compared)\b[^.;]*)?(?=[.;]|$)",
        re.IGNORECASE,
    ),
    re.compile(
        r"\s*\b(?:(?:is|are) )?(?:once )?again(?: (?:noted|seen|demonstrated|identified|visualized))?(?=[.;]|$)",
        re.IGNORECASE,
    ),
    re.compile(
        r"\b(?:stable(?: appearance of)?,?|unchanged|persistent(?:ly)?|long-?standing|(?:once )?again,?|still)\s+",
        re.IGNORECASE,
    ),
)
# The past that a film does show
PAST = r"granulomatous|surg|sternotomy|cholecyst|trauma|fracture|infect|lumpectomy|mastectomy|cabg|bypass|fusion|resection"
# What a film cannot show: what has changed since another one
EARLIER = words(
    "unchanged", "stable", "stability", "interval(?:ly)?", "since", "compared?", "comparisons?", "previously", "earlier",
    "again", "now", "still", "new(?:ly)?", "remains?", "persist(?:s|ed|ent|ently|ence)?", "resol(?:ved|ving)",
    "improv(?:ed|ing|ement)", "worse(?:ned|ning)?", "progress(?:ed|ion|ing)", "re-?demonstrated", "similar to",
    "no (?:significant |definite )?changes?", "(?:decreas|increas)ed? (?:in|from)",
    rf"(?:prior|previous)(?! (?:\w+ ){{0,3}}(?:{PAST}))",
)  # fmt: skip
# ... what somebody said, asks for, advises or knows from elsewhere
ELSEWHERE = words(
    "recommend(?:s|ed|ation|ations)?", "suggested (?:follow|clinical)", "follow[- ]?up", r"correlat\w*", "discussed",
    "notified", r"telephone\w*", r"communicat\w*", "called", r"dictat\w*", "reviewed", "critical result", "dr", "physician",
    "consider(?:ation)?", "further evaluation", "could be (?:obtained|performed)", "may be (?:helpful|obtained|of benefit)",
    "please", "history of",
)  # fmt: skip
# ... and what a comparison or a token leaves behind: "The mediastinum" of "is stable", "Are intact" of "XXXX are intact"
REMNANT = re.compile(
    r"(?:is|are|was|were|has|have|of)\b.*|(?:the|and|of|with|in|is|are|there|has|have|been|heart|cardiac|cardio|cardiomediastinal|mediastin\w*|hilar|pulmonary"
    r"|silhouettes?|contours?|size|shape|vascular\w*|vasculature|lungs?|bones?|bony|osseous|structures?|soft|tissues?"
    r"|appearance|position|thora\w*|chest|spine|remainder|exam\w*|study|appears?|postsurgical|changes?|,|\s)*\.?",
    re.IGNORECASE,
)

NORMAL = words(
    "no", "not", "without", "negative", "normal", "clear", "unremarkable", "intact", "free of", "none", "nor", "absent",
    "within (?:normal )?limits",
)  # fmt: skip
TURN = words("but", "however", "except", "although", "otherwise", "aside from", "other than")

SEXES = {
    "M": words("male", "man", "gentleman", "boy", r"y/?[or]\.? m"),
    "F": words("female", "woman", "lady", "girl", r"y/?[or]\.? f"),
}


def caption_sentences(findings: str, impression: str) -> list[str]:
    """Return what a report says of its film, in the order of its weight.

    The impression comes first, as the radiologist's own summary; then the abnormal sentences of the findings; then the
    normal ones. A caption that is cut after any of them has lost what matters least. What is said twice is kept once.
    """
    first, others = (
        [sentence for sentence in sentences_of(section) if describes_the_film(sentence)]
        for section in (impression, findings)
    )
    unique = {}
    for sentence in [*first, *sorted(others, key=is_normal)]:  # sorted is stable: each kind keeps its order
        unique.setdefault(sentence.casefold(), sentence)
    return list(unique.values())


def sentences_of(section: str) -> list[str]:
    """Return the sentences of a section: cleaned, without comparisons, each with a capital first letter and a full stop."""
    pieces = []
    for piece in SENTENCE_END.split(clean(section)):
        if pieces and ABBREVIATION.search(pieces[-1]):
            pieces[-1] = f"{pieces[-1]} {piece}"
        else:
            pieces.append(piece)
    return [sentence for piece in pieces if (sentence := finish(without_comparisons(piece)))]


def clean(text: str) -> str:
    """Return a section without de-identification tokens and list numbers, with one space between words."""
    text = REDACTED.sub(r"\g<mark>", text)
    text = LIST_NUMBER.sub(". ", " ".join(text.split())).lstrip(". ")
    text = re.sub(r"\s+(?=[.,;:?!])", "", text)
    text = re.sub(r"(?<=[a-z]{2}\.)(?=[A-Z])", " ", text)
    text = re.sub(r"([.?!;,])(?:\s*[.,;:])+", r"\1", text)
    return " ".join(text.split()).strip(" ,;:-")


def without_comparisons(sentence: str) -> str:
    """Return "Small effusion." for "Stable small effusion, unchanged from prior."."""
    for comparison in COMPARISONS:
        sentence = comparison.sub("", sentence)
    return sentence


def finish(sentence: str) -> str:
    """Return a sentence with a capital, a full stop and no conjunction at its start; "" where no word is left."""
    said = re.sub(r"^(?:(?:and|or|but)\s+)+", "", sentence.strip(" .,;:?!-"), flags=re.IGNORECASE)
    return f"{said[0].upper()}{said[1:]}." if re.search(r"[A-Za-z]{2}", said) else ""


def describes_the_film(sentence: str) -> bool:
    """Return whether a sentence is about this film: no earlier one, no advice, nobody who was called."""
    return not (EARLIER.search(sentence) or ELSEWHERE.search(sentence) or REMNANT.fullmatch(sentence))


def is_normal(sentence: str) -> bool:
    """Return whether a sentence says that something is as it should be, or absent, and nothing else."""
    return bool(NORMAL.search(sentence)) and not TURN.search(sentence)


def sex_in(indication: str) -> str | None:
    """Return "M" or "F" where an indication names the patient's sex, None where it names none or two."""
    named = [sex for sex, nouns in SEXES.items() if nouns.search(indication)]
    return named[0] if len(named) == 1 else None
