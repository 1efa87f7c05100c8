"""From a radiology report to a caption: sections cleaned, sentences chosen and put in order.

A caption is what a model will be asked to draw, so it holds what one film can show and nothing else. De-identification
tokens go ("XXXX" or "___", as whole tokens: they are what memorised films are recalled by, arXiv:2502.07516), and so do sentences
that compare with earlier films, report a telephone call or plan what comes next. Nothing is added.
"""

import re
from collections.abc import Mapping


def words(*alternatives: str) -> re.Pattern:
    """Return a pattern for any of some expressions, as whole words in any case."""
    return re.compile(rf"\b(?:{'|'.join(alternatives)})\b", re.IGNORECASE)


# "AP chest compared to ___:" before what is said of the film
COMPARED = re.compile(
    r"(?:^|(?<=[.;] ))[^.;:]*\b(?:compared|comparison(?: is)?(?: made)?) (?:to|with)\b(?:[^.;]|\b[ap]\.m\.)*?:\s+(?=(?-i:[A-Z]))",
    re.IGNORECASE,
)
REDACTED = re.compile(r"\S*(?:XXXX|___)\S*?(?P<mark>[.,;:?!]*)(?=\s|$)", re.IGNORECASE)
LIST_NUMBER = re.compile(r"(?:^|(?<=[\s.,]))\(?\d{1,2}[.)](?=\s|[A-Z])\s*")  # not the "1." of "1.5 cm"
SENTENCE_END = re.compile(r"(?<=[.?!;])\s+")
ABBREVIATION = re.compile(r"\b(?:dr|mr|mrs|ms|vs|approx|st|e\.g|i\.e)\.$", re.IGNORECASE)

# "Stable cardiomegaly" is cardiomegaly all the same: these words go, and what is there stays
AS_BEFORE = (
    r"(?:stable|unchanged|similar|(?:not (?:significantly )?|un)changed|without (?:significant |interval )?change)"
)
STATE = r"(?:is|are|has|have|appears?|remains?)"
CLAUSE = "(?:there|the|no|it|this|an?)"  # begins another one
# What follows "from" up to the next thought: "from prior exam", not "from prior, with new effusion" or "... except for a mass"
THOUGHT = (
    "with|without|but|which|except|excluding|other than|apart|aside|although|though|however|while|whereas|when|now"
)
REFERENCE = (
    r"(?: (?:from|since|to|compared (?:to|with)|when compared (?:to|with)|in comparison)\b"
    rf"(?:(?! (?:{THOUGHT}|and)\b)[^.,;])*)"
)
END = rf"(?=[.,;]|$| (?:{THOUGHT})\b)"
COMPARISONS = tuple(
    (re.compile(pattern, re.IGNORECASE), replacement)
    for pattern, replacement in (
        (rf",?\s*\bin {AS_BEFORE} (?:position|appearance)\b", ""),
        # "is unchanged and there is no effusion" before "stable and enlarged"
        (rf"(?<!no)\s*\b(?:{STATE} )?{AS_BEFORE}(?= and {CLAUSE}\b)", ""),
        (rf"(?<!no )\b{AS_BEFORE} and\s+(?!{CLAUSE}\b)", ""),
        # At the end of a thought: ", unchanged from prior", "is stable in appearance"
        (
            rf"(?<!no)(?:,| and)?\s*\b(?:{STATE} )?(?:(?:grossly|relatively|essentially|overall) )?{AS_BEFORE}"
            rf"(?: in (?:appearance|size|position))?{REFERENCE}?{END}",
            "",
        ),
        (rf"\s*\b(?:(?:is|are) )?(?:once )?again(?: (?:noted|seen|demonstrated|identified|visualized))?{END}", ""),
        (r"\bre-?demonstrat(?:ion|ed) (?:of )?(?:the )?", ""),
        (r"\b(?:interval )?(?:development|worsening|progression) (?:of|in) (?:the )?", ""),
        (r"\binterval (?:increase|decrease) (?:of|in) (?:the )?", ""),
        (r"\s*\b(?:(?:is|are|has|have) )?(?:slightly |mildly |minimally )?(?:increased|decreased) in size" + END, ""),
        (
            r"(?<!no )(?<!not )(?<!without )\b(?:stable(?: appearance of)?,?|unchanged|long-?standing|(?:once )?again,?|still)\s+",
            "",
        ),
        (r"\bremains\b", "is"),
        (r"\bremain\b", "are"),
    )
)
# So does "new" of "New effusion", not of "No evidence of new effusion", whose effusion may be an old one
NEW = re.compile(
    r"\b(?:new(?:ly)?|persistent(?:ly)?|(?:interval )?(?:worsening|increasing|decreasing|improving))\s+", re.IGNORECASE
)
DENIED_SO_FAR = re.compile(
    r"\b(?:no|not|without|nor|neither|negative for|free of)\b"
    r"(?:(?!\b(?:but|however|except|although|otherwise|aside from|other than|with)\b)[^.;])*$",
    re.IGNORECASE,
)
OR = words("or", "nor")
# "No interval worsening of the effusion", "no change in the effusion": without what is compared it would be "no effusion"
CERTAINTY = (
    r"(?:(?:evidence|signs?|suggestion|of|for|an?|any|the|definite|significant|interval|convincing|appreciable|obvious|other|major"
    r"|gross|further|radiographic) )*"
)
DENIED_CHANGE = re.compile(
    r"\b(?:no|not|without|nor) (?:[\w-]+ ){0,4}?(?:worsening|progression|interval (?:increase|decrease))(?: in size)? (?:of|in)\b"
    rf"|\b(?:no|not|without|nor) {CERTAINTY}(?:"
    r"(?:worsening|progression|improvement|change|interval (?:increase|decrease))(?: in size)? (?:of|in)\b"
    r"(?! (?:appearance|size|position)\b)|(?:increase|decrease) in size\b"
    r"|(?:worsening|progress\w*|increasing|decreasing|improv\w*|stable|unchanged)\b)"
    rf"|\bno {CERTAINTY}changes?\b",
    re.IGNORECASE,
)
# "No pneumothorax, unchanged effusion": what is denied ends at the comma, unless it goes on with an "or"
DENIED_UP_TO = re.compile(
    r"(\b(?:no|without)\b[^.,;]*),\s+(?=(?:stable|unchanged|new|persistent|(?:interval )?(?:worsening|increas(?:ed?|ing)"
    r"|decreas(?:ed?|ing)|improv(?:ed|ing)))\s(?!and\b)(?![^.;]*\b(?:or|nor)\b))",
    re.IGNORECASE,
)
# What a film cannot show: what has changed since another one, and what is no longer there
EARLIER = words(
    "unchanged", "stable", "stability", "interval(?:ly)?", "since", "compared?", "comparisons?", "previously", "earlier",
    "again", "now", "still", "new(?:ly)?", "persist(?:s|ed|ent|ently|ence)?", r"resol(?:v\w*|ution)", "clear(?:ed|ing)",
    "remov(?:ed|al)", "improv(?:ed|ing|ement)", "worsen(?:ed|ing)", "worse(?! (?:on|than|at|in))", "progress(?:ed|ion|ing)",
    "as before", "similar to", "no (?:significant |definite )?changes?", "(?:decreas|increas)ed? (?:in size|from|since)",
    "no longer", "(?:has|have) (?:decreas|increas)ed", "(?:smaller|larger)(?=[.,;]|$)",
    r"(?:prior|previous)(?= (?:\w+ ){0,2}(?:stud|exam|film|radiogr|x-?ray|ct\b|imag|report|date|scan|compar)|[.,;]|$)\w*",
    "(?:from|to|since|than|on) (?:the |a )?(?:prior|previous)",
)  # fmt: skip
# ... what somebody said, asks for, advises or knows from elsewhere: it goes with what follows it in the sentence
ELSEWHERE = words(
    "recommend(?:s|ed|ation|ations)?", "suggested (?:follow|clinical)", "follow[- ]?up", r"correlat\w*", "discussed",
    "notified", r"telephone\w*", r"communicat\w*", "called", r"dictat\w*", "reviewed", "critical result", "dr", "physician",
    "consider(?:ation)?", "further evaluation", "could be (?:obtained|performed)", "may be (?:helpful|obtained|of benefit)",
    "please", "history of",
    # ... and who it was, and when
    "signed", "transcribed", "(?:read|seen|interpreted|reported) by", "attending", "resident", "mrn", "dob", "date of birth",
    "patient (?:name|id)", r"m\.?d(?:\.|\b)", r"\d{1,2}[/.-]\d{1,2}[/.-]\d{2,4}", r"\d{1,2}:\d\d",
    "mrs?", "ms", "(?:verified|approved|authenticated) by", "paged", "relayed", "conveyed", "informed", "accession", "name",
    "nhs", "ssn", r"\d{4}-\d\d-\d\d", r"\d{3}[- ]\d{2,4}[- ]\d{4}", r"\S+@\S+",
    r"(?:january|february|march|april|may|june|july|august|september|october|november|december) \d+",
)  # fmt: skip
# Films of other parts, of which some reports tell as well: "Left knee." begins what is not about the chest
PART = r"(?:(?:the|left|right|both|bilateral) )*(?:knees?|hips?|pelvis|femurs?|lumbosacral spine|ankles?|feet|foot|elbows?|wrists?)"
OTHER_PART = re.compile(rf"{PART}(?: and {PART})*(?:,? \w+ views?)?\.?", re.IGNORECASE)
THE_CHEST = words(
    "chest", "lungs?", "heart", "cardiac", r"cardio\w*", r"mediastin\w*", "pulmonary", r"pleura\w*", r"hil(?:ar|um|a)", "ribs?",
    r"aort\w*", r"trache\w*", r"pneumothora\w*", r"opaci\w*", r"consolidat\w*", r"infiltrat\w*", r"nodul\w*", "airspace",
    "(?:left|right|small|moderate|large|bilateral) effusions?",
)  # fmt: skip
HEADING = re.compile(
    r"(?:^|(?<=[.;] ))[ \t]*"
    r"([A-Z][A-Z ,/&()-]{2,60}|(?i:findings?|impressions?|conclusions?|reports?|results?)[ \t]*):",
    re.MULTILINE,
)
IMPRESSION = re.compile(r"impression|conclusion|opinion|assessment", re.IGNORECASE)
# A heading may also be the examination: "CHEST, PA AND LATERAL:"; that of the history, the technique or a call is neither
FINDINGS = re.compile(
    r"findings?|interpretation|(?:reports?|results?)\s*$|(?=.*\b(?:chest|radiographs?)\b)(?!.*\b(?:exam|examination|comparison|technique|procedure)\b)",
    re.I,
)
# ... or an organ, of which what follows tells: "LUNGS AND PLEURA: clear"
ORGANS = re.compile(
    r"(?:(?:lungs?|pleura(?:l spaces?)?|airways?|trachea|heart|cardiac(?: silhouette)?|cardiomediastin\w*|mediastin\w*|hil(?:a|um)"
    r"|(?:pulmonary )?vessels|vascular\w*|vasculature|aorta|bones?|bony(?: structures?)?|osseous(?: structures?)?|skelet\w*|ribs|spine"
    r"|soft tissues?|chest wall|thora(?:x|cic cage)|(?:hemi)?diaphragms?|(?:upper )?abdomen|(?:support )?(?:devices?|apparatus)|lines?"
    r"|tubes?|catheters?|hardware)(?:\s*(?:,|/|&|\band\b)\s*|\s*$))+",
    re.IGNORECASE,
)
# What was asked, or is known from before: "REASON FOR CHEST X-RAY", "CLINICAL IMPRESSION"
ASKED = words("reason", "history", "indications?", r"clinical\w*", "previous", "prior")
# Of what came before the film: after these a first paragraph tells nothing of it
BEFORE_THE_FILM = words(
    "reason", "history", "indications?", r"clinical\w*", "comparison", "technique", "procedure", r"exam\w*"
)
# Who reported and when, below a report: an office, or nothing but a name or a date
OFFICE = words("radiologist", "consultant", "registrar", "gmc", "dr", "prof(?:essor)?")
NAME = re.compile(r"[A-Z][\w'.-]{0,29}(?:,? [A-Z][\w'.-]{0,29}){1,3}")
DATE = re.compile(r"[\d/.: -]{4,24}")
ADDENDUM = words("addendum")
SIGNATURE_WORDS = 10  # at most
LEAST_WORDS = 3  # before such a remark, for the rest to be a statement
# What a remark or a token leaves at the end of a sentence
DANGLING = re.compile(
    r"(?:\s*,)?\s*\b(?:and|or|but|which|that|with|without|is|are|has|have|been|was|of|in|on|for|to|from|the|an?|by|as|at|if|no"
    r"|due|given|consistent|compatible|suggest(?:s|ing|ive)?|may|could|would|should|be|represent(?:s|ing)?|there|this|these"
    r"|patient's|clinical(?:ly)?|concern|when)$",
    re.IGNORECASE,
)
# Words that alone are no statement: "The mediastinum" of "The mediastinum is stable"
BARE = re.compile(
    r"the|and|of|with|in|is|are|was|there|has|have|had|been|this|these|it|they|heart|cardiac|cardio|cardiomediastinal|mediastin\w*"
    r"|hilar|pulmonary|silhouettes?|contours?|size|shape|vascular\w*|vasculature|lungs?|bones?|bony|osseous|structures?|soft"
    r"|tissues?|appearance|position|thora\w*|chest|spine|remainder|exam\w*|study|appears?|changes?",
    re.IGNORECASE,
)
SUBJECTLESS = re.compile(r"(?:is|are|was|were|has|have|of)\b", re.IGNORECASE)

NORMAL = words(
    "no", "not", "without", "negative", "normal", "clear", "unremarkable", "intact", "free of", "none", "nor", "absent",
    "within (?:normal )?limits",
)  # fmt: skip
TURN = words("but", "however", "except", "although", "otherwise", "aside from", "other than")
FINDING = words(
    r"effusions?", r"(?:hydro|pneumo|ha?emo|pyo|chylo)+thora\w*", r"opaci\w*", r"consolidat\w*", r"infiltrat\w*", r"atelecta\w*", r"(?:o?edema)",
    r"congest\w*", r"cardiomegaly", r"enlarg\w*", r"nodul\w*", r"mass(?:es)?", r"granuloma\w*", r"fractures?", r"scar\w*",
    r"emphysem\w*", r"hyper\w*", r"fibro\w*", r"calcifi\w*", r"\w*scoliosis", r"degenerat\w*", r"pacemaker", r"defibrillator",
    r"catheter\w*", r"tubes?", r"picc", r"port", r"herni\w*", r"thicken\w*", r"pneumonia\w*", r"lesions?", r"disease",
    r"tortuo\w*", r"kypho\w*", r"osteophyt\w*", r"cavit\w*", r"collapse\w*", r"elevat\w*", r"ectasia", r"ectatic", r"stents?",
    r"sternotomy", r"clips?", r"fluid", r"volume loss", r"deformit\w*", r"prominen\w*", r"blunt\w*", r"bronchi\w*", r"interstitial", r"aneurysm\w*",
    r"\w*adenopath\w*", r"metasta\w*", r"pneumo(?:mediastin|periton|pericard)\w*", r"tumou?rs?", r"neoplas\w*", r"malignan\w*",
    r"tubercul\w*", r"bullae?", "bullous", r"blebs?", r"widen\w*", r"plaques?", "ground[- ]glass", r"haz(?:y|e|iness)",
    "air[- ]?space (?:process|filling)", r"reticul\w*", r"ha?emorrhag\w*", r"abscess\w*", "empyema", r"cyst(?:s|ic)?", "shift",
    r"deviat\w*", r"abnormalit\w*", "failure", "chf", "(?:volume|fluid) overload", r"engorge\w*", r"redistribut\w*", r"aspirat\w*",
    "ards", "air[- ]?trapping", "free air", r"lucen\w*", "densit(?:y|ies)", "fullness", "kerley", "swan[- ]ganz", "drains?",
    "wires?", "copd", r"lymphoma\w*", r"hypo(?:inflat|aerat|ventilat)\w*",
)  # fmt: skip
GONE = words("resolved", "resolution", "clear(?:ed|ing)", "remov(?:ed|al)", "no longer")
# ... but not all of it, or something else is there: "removal of the tube with new pneumothorax"
STILL = words(
    "not", r"partial\w*", r"near\w*", "almost", r"incomplete\w*", r"fail\w*", "residual", r"persist\w*", r"remain\w*", "new",
    "now", "but", "however", "with", "and", "although", r"increas\w*", "larger?",
)  # fmt: skip

SEXES = {
    "M": words("male", "man", "gentleman", "boy", r"y/?[or]\.? m"),
    "F": words("female", "woman", "lady", "girl", r"y/?[or]\.? f"),
}


def caption_sentences(findings: str, impression: str) -> list[str]:
    """Return what a report says of its film, in the order of its weight.

    The impression comes first, as the radiologist's own summary; then the abnormal sentences of the findings; then the
    normal ones. A caption that is cut after any of them has lost what matters least. What is said twice is kept once.

    Nothing is returned where only normal sentences are left and one was left out that states a finding: such a caption
    would call a film normal that is not.
    """
    first, others = sentences_of(impression), sentences_of(findings)
    unique, lost = {}, False
    for sentence in [*first, *sorted(others, key=is_normal)]:  # sorted is stable: each kind keeps its order
        if describes_the_film(sentence):
            unique.setdefault(sentence.casefold(), sentence)
        else:
            is_gone = GONE.search(sentence) and not STILL.search(sentence)
            lost |= states_a_finding(sentence) and not is_gone
    kept = list(unique.values())
    return (
        [] if lost and all(NORMAL.search(sentence) and not states_a_finding(sentence) for sentence in kept) else kept
    )


def caption_of(first: str, findings: str, impression: str) -> str:
    """Return a sentence, such as the view, and what a report's sections say of the film; "" where they say nothing."""
    sentences = caption_sentences(findings, impression)
    return " ".join([first, *sentences]) if sentences else ""


def text_of(cells: Mapping, column: str, first: str) -> str:
    """Return the caption that a row of a table gives: cleaned where it is a report, and as it is where it is a caption.

    Args:
        cells: of the row, by column.
        column: has the text. `findings` and `impression` are sections of a report, and are taken together; `report`, and
            what begins with a heading of one, or has several lines and such a heading, is a whole report.
        first: sentence that a report's caption begins with, such as the view.
    """
    text = str(cells.get(column) or "")
    if column in ("findings", "impression"):
        sections = {name: str(cells.get(name) or "") for name in ("findings", "impression")}
    elif column == "report" or (
        (HEADING.match(text.strip()) or "\n" in text.strip()) and any(map(kind_of, HEADING.findall(text)))
    ):  # a caption of ours may say "Findings:", too
        sections = sections_of(text)
    else:
        return " ".join(text.split())
    return caption_of(first, **sections)


def sections_of(report: str) -> dict[str, str]:
    """Return `findings` and `impression` of a whole report; of one without these headings, the paragraphs that tell of any.

    Lines at the end that say who reported are left out, and so is a first paragraph before others: the history. If that
    has no heading and names a finding where the others deny all, it may be the film's, and nothing is returned; nor is
    anything where an addendum names a finding, which may correct what stands above it.
    """
    start, *parts = HEADING.split(unsigned(report))
    sections, last = {"findings": "", "impression": ""}, ("", start)
    for heading, body in zip(parts[::2], parts[1::2], strict=True):
        kind, last = kind_of(heading), (heading, body)
        if ADDENDUM.search(heading) and any(map(states_a_finding, sentences_of(body))):
            return {"findings": "", "impression": ""}
        if kind is not None:
            named = f"{heading.strip().capitalize()}: {body.strip()}" if ORGANS.fullmatch(heading.strip()) else body
            sections[kind] = f"{sections[kind]} {named}".strip()
    if not any(text.strip() for text in sections.values()):
        sections["findings"] = told_by(*last)
    return {kind: " ".join(text.split()) for kind, text in sections.items()}


def told_by(heading: str, body: str) -> str:
    """Return the paragraphs of a section that tell of a film, as `sections_of` says; those of a history alone are none."""
    paragraphs = [paragraph for paragraph in re.split(r"\n[ \t]*\n", body) if paragraph.strip()]
    told = [paragraph for paragraph in paragraphs if FINDING.search(paragraph) or NORMAL.search(paragraph)]
    telling = [paragraph for paragraph in told if paragraph is not paragraphs[0]]
    if not telling:
        is_history = BEFORE_THE_FILM.search(heading) and len(paragraphs) == 1
        return "" if is_history else (told or paragraphs or [""])[-1]
    doubtful = not heading and any(map(states_a_finding, sentences_of(paragraphs[0])))
    if doubtful and all(map(is_normal, sentences_of(" ".join(telling)))):
        return ""
    return " ".join(telling)


def unsigned(report: str) -> str:
    """Return a report without the lines at its end that say who wrote it, and when."""
    lines = report.rstrip().splitlines()
    while lines and is_signature(lines[-1].strip(), lines[-2].strip() if len(lines) > 1 else ""):
        lines = "\n".join(lines[:-1]).rstrip().splitlines()
    return "\n".join(lines)


def is_signature(line: str, before: str) -> bool:
    """Return whether a line names somebody's office, or is a name or a date below a whole sentence, and says nothing of a film."""
    if FINDING.search(line) or NORMAL.search(line) or HEADING.search(line):
        return False
    if OFFICE.search(line) and len(line.split()) <= SIGNATURE_WORDS:
        return True
    is_name = NAME.fullmatch(line) and not line.isupper()
    ends = before[-1:] in ("", ".", ":", "!", "?") or (NAME.fullmatch(before) and not is_name)
    return bool(is_name or DATE.fullmatch(line)) and bool(ends)


def kind_of(heading: str) -> str | None:
    """Return which section a heading opens: "findings", "impression", or None for one that is of no use."""
    if ASKED.search(heading):
        return None
    if IMPRESSION.search(heading):
        return "impression"
    return "findings" if FINDINGS.match(heading) or ORGANS.fullmatch(heading.strip()) else None


def sentences_of(section: str) -> list[str]:
    """Return the sentences of a section: cleaned, without comparisons, each with a capital first letter and a full stop."""
    pieces = []
    for piece in SENTENCE_END.split(DENIED_UP_TO.sub(r"\1. ", clean(section))):
        if pieces and ABBREVIATION.search(pieces[-1]):
            pieces[-1] = f"{pieces[-1]} {piece}"
        else:
            pieces.append(piece)
    pieces = of_the_chest(pieces)
    return [sentence for piece in pieces if (sentence := finish(without_remarks(without_comparisons(piece))))]


def of_the_chest(pieces: list[str]) -> list[str]:
    """Return sentences without those about films of other parts, from "Left knee." on until one is about the chest."""
    kept, elsewhere = [], False
    for piece in pieces:
        if OTHER_PART.fullmatch(piece.partition(":")[0].strip()):
            elsewhere = True
        elif THE_CHEST.search(piece):
            elsewhere = False
        if not elsewhere:
            kept.append(piece)
    return kept


def clean(text: str) -> str:
    """Return a section without de-identification tokens and list numbers, with one space between words."""
    text = REDACTED.sub(r"\g<mark>", text)
    text = LIST_NUMBER.sub(". ", " ".join(text.split())).lstrip(". ")
    text = re.sub(r"\s+(?=[.,;:?!])", "", text)
    text = COMPARED.sub(lambda before: before[0] if FINDING.search(before[0]) else "", text)
    text = re.sub(r"(?<=[a-z]{2}\.)(?=[A-Z])", " ", text)
    text = re.sub(r"([.?!;,])(?:\s*[.,;:])+", r"\1", text)
    return " ".join(text.split()).strip(" ,;:-")


def without_comparisons(sentence: str) -> str:
    """Return "Small effusion." for "Stable small effusion, unchanged from prior."; what denies a change stays whole."""
    if DENIED_CHANGE.search(sentence):
        return sentence
    for comparison, replacement in COMPARISONS:
        sentence = comparison.sub(replacement, sentence)
    return NEW.sub(
        lambda word: word[0] if is_denied(sentence[: word.start()], sentence[word.end() :]) else "", sentence
    )


def is_denied(before: str, after: str) -> bool:
    """Return whether what stands between two parts of a sentence is denied, by a "no" whose clause or list goes on."""
    denied = DENIED_SO_FAR.search(before)
    return denied is not None and ("," not in denied[0] or OR.search(denied[0] + after) is not None)


def without_remarks(sentence: str) -> str:
    """Return "Opacity at the base" for "Opacity at the base, correlate clinically."; a remark alone stays whole."""
    remark = ELSEWHERE.search(sentence)
    if remark is None:
        return sentence
    before = trimmed(sentence[: remark.start()])
    return before if len(before.split()) >= LEAST_WORDS else sentence


def trimmed(sentence: str) -> str:
    """Return a sentence without what dangles at its end."""
    sentence = sentence.strip(" .,;:?!-")
    while shorter := DANGLING.search(sentence):
        sentence = sentence[: shorter.start()].rstrip(" ,;:-")
    return sentence


def finish(sentence: str) -> str:
    """Return a sentence with a capital, a full stop and no conjunction at its start; "" where no word is left."""
    said = re.sub(r"^(?:(?:and|or|but)\s+)+", "", trimmed(sentence), flags=re.IGNORECASE)
    return f"{said[0].upper()}{said[1:]}." if re.search(r"[A-Za-z]{2}", said) else ""


def describes_the_film(sentence: str) -> bool:
    """Return whether a sentence is a statement about this film: no earlier one, no advice, nobody who was called."""
    if any(kind.search(sentence) for kind in (DENIED_CHANGE, EARLIER, ELSEWHERE)) or SUBJECTLESS.match(sentence):
        return False
    return not all(BARE.fullmatch(word) for word in re.findall(r"[\w'-]+", sentence))


def states_a_finding(sentence: str) -> bool:
    """Return whether a sentence names a finding before it denies anything, or after a "but", or denies that it has changed."""
    if DENIED_CHANGE.search(sentence):
        return bool(FINDING.search(sentence))
    organ, _, said = sentence.partition(": ")  # "Lines and tubes: none" states no tube
    sentence = said if said and ORGANS.fullmatch(organ) else sentence
    denial, turn = NORMAL.search(sentence), TURN.search(sentence)
    stated = sentence if denial is None else sentence[: denial.start()]
    return bool(FINDING.search(stated) or (turn and FINDING.search(sentence[turn.end() :])))


def is_normal(sentence: str) -> bool:
    """Return whether a sentence says that something is as it should be, or absent, and states no finding."""
    return bool(NORMAL.search(sentence)) and not TURN.search(sentence) and not states_a_finding(sentence)


def sex_in(indication: str) -> str | None:
    """Return "M" or "F" where an indication names the patient's sex, None where it names none or two."""
    named = [sex for sex, nouns in SEXES.items() if nouns.search(indication)]
    return named[0] if len(named) == 1 else None
