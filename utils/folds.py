"""Folds of whole patients: nobody, and no copy of a film, is on both sides of a split."""

from collections import Counter, defaultdict
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import islice

import numpy as np
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

from utils.metadata import dataset_hash
from utils.refusal import Refused
from utils.seeding import derive_seed

MAX_HASH_DISTANCE = 4  # bits of 64; films saved again differ in 3 at most, of unrelated pairs one in a thousand in 4
MIN_CORRELATION = 0.99
MAX_MERGED_SHARE = 0.05  # of the set, in one group of several patients
SMALL_SET = 100  # films below which a single pair is already a large share
HASHES_PER_BLOCK, PAIRS_AT_ONCE = 64, 1024
MOST_STRATA = 32
NOISE = "noise-"  # begins the patient_id of a generated film


def assign_folds(groups: Sequence[Hashable], strata: Sequence[Hashable], num_folds: int, seed: int) -> list[int]:
    """Return a fold for each film, so that no group is in two folds and strata are spread evenly.

    Strata with fewer films than folds cannot be spread; they count as the commonest stratum.

    Args:
        groups: who the film is of, [N].
        strata: what should be equally frequent in all folds, [N].

    Raises:
        Refused: with fewer groups than folds.
    """
    from sklearn.model_selection import StratifiedGroupKFold  # seconds, and only what deals out folds needs it

    num_groups = len(set(groups))
    if num_groups < num_folds and all(str(group).startswith(NOISE) for group in groups):
        raise Refused(
            f"generated films from {num_groups} noises cannot fill {num_folds} folds, as films from one noise stay together; "
            "draw them with other noise each: generate.py --own_noise"
        )
    if num_groups < num_folds:
        raise Refused(
            f"{num_groups} patients cannot fill {num_folds} folds; take more films, or fewer folds: download.py --num_folds"
        )
    counts = Counter(strata)
    commonest = min(counts, key=lambda stratum: (-counts[stratum], str(stratum)))
    labels = [str(stratum if counts[stratum] >= num_folds else commonest) for stratum in strata]
    # Shuffled here: before 1.8 scikit-learn shuffled what it knows of the groups without the groups. The same draw as since
    drawn = np.random.RandomState(seed).permutation(num_groups).argsort().tolist()
    order = dict(zip(sorted(set(groups), key=str), drawn, strict=True))
    splitter = StratifiedGroupKFold(num_folds)
    folds = np.full(len(groups), -1)
    for fold, (_, held_out) in enumerate(splitter.split(labels, labels, [order[group] for group in groups])):
        folds[held_out] = fold
    if len(set(folds.tolist())) < num_folds:
        raise Refused(
            f"the films of {num_groups} patients do not fill {num_folds} folds; make fewer: download.py --num_folds"
        )
    return folds.tolist()


def find_duplicates(
    hashes: Sequence[int], load_thumbnail: Callable[[int], np.ndarray], patients: Sequence[Hashable]
) -> list[tuple[int, int]]:
    """Return the pairs of films of different patients that are one film.

    Difference hashes propose pairs; the normalised cross-correlation of the thumbnails decides. Frontal films
    resemble one another so much that hashes alone would chain most of a set into one group.

    Args:
        hashes: 64 bits each, [N].
        load_thumbnail: gives film i as uint8 [128, 128]; called for proposed films only, by several threads.
        patients: whose film it is, [N]; copies within one patient do no harm and are not looked for.
    """
    thumbnails = {}  # kept as bytes: a hundred thousand films are 1.8 GB
    duplicates, pairs = [], propose_pairs(np.array(hashes, dtype=np.uint64), patients)
    with ThreadPoolExecutor() as pool:
        while batch := list(islice(pairs, PAIRS_AT_ONCE)):
            missing = sorted({film for pair in batch for film in pair} - thumbnails.keys())
            thumbnails.update(zip(missing, pool.map(load_thumbnail, missing), strict=True))
            duplicates += [pair for pair in batch if correlation(*map(thumbnails.get, pair)) > MIN_CORRELATION]
    return duplicates


def propose_pairs(hashes: np.ndarray, patients: Sequence[Hashable]) -> Iterator[tuple[int, int]]:
    """Yield pairs i < j of different patients whose hashes differ in few bits.

    Args:
        hashes: uint64, [N].
        patients: [N].
    """
    numbers = {patient: number for number, patient in enumerate(dict.fromkeys(patients))}
    owners = np.array([numbers[patient] for patient in patients])
    for start in range(0, len(hashes), HASHES_PER_BLOCK):
        block = slice(start, start + HASHES_PER_BLOCK)
        distances = np.bitwise_count(hashes[block, None] ^ hashes[None, start:])  # [block, N - start]
        first, second = np.nonzero(distances <= MAX_HASH_DISTANCE)
        new = (first < second) & (owners[block][first] != owners[start:][second])
        yield from zip((first[new] + start).tolist(), (second[new] + start).tolist(), strict=True)


def correlation(first: np.ndarray, second: np.ndarray) -> float:
    """Return the normalised cross-correlation of two thumbnails, in [-1, 1]; that of a uniform one is 0."""
    one = first.astype(np.float32).ravel() - first.mean(dtype=np.float32)
    other = second.astype(np.float32).ravel() - second.mean(dtype=np.float32)
    return float(one @ other) / max(float(np.linalg.norm(one) * np.linalg.norm(other)), 1e-6)


def merge_groups(patients: Sequence[str], duplicates: Iterable[tuple[int, int]]) -> list[str]:
    """Return for each film the first, by name, of all patients that copies of films tie together.

    Args:
        patients: whose film it is, [N].
        duplicates: pairs of films that are one.

    Raises:
        Refused: where one group of several patients holds so much of the set that the copies cannot be believed.
    """
    names = sorted(set(patients))
    number = {name: index for index, name in enumerate(names)}
    edges = np.array([(number[patients[i]], number[patients[j]]) for i, j in duplicates], dtype=int).reshape(-1, 2)
    graph = coo_array((np.ones(len(edges)), (edges[:, 0], edges[:, 1])), shape=(len(names), len(names)))
    component = connected_components(graph, directed=False)[1]
    members = defaultdict(list)
    for name, group in zip(names, component.tolist(), strict=True):
        members[group].append(name)
    merged = [members[component[number[patient]]][0] for patient in patients]
    for group, size in Counter(merged).most_common():
        tied = members[component[number[group]]]
        if len(tied) > 1 and size > MAX_MERGED_SHARE * len(patients) and len(patients) >= SMALL_SET:
            raise Refused(
                f"{size} of {len(patients)} films, of {len(tied)} patients such as {tied[0]} and {tied[1]}, are tied "
                f"together by near-identical films; expected {MAX_MERGED_SHARE:.0%} at most in one group: look at "
                "these films, and leave out copies or mend the patient_id column"
            )
    return merged


def group_of(row: dict, group_by: str) -> str:
    """Return what must not be split: the patient (with everyone tied to them by copies) or the single image.

    Args:
        row: of `metadata.jsonl`.
        group_by: "patient_id", or "image" where every image counts as a patient of its own.

    Raises:
        Refused: for a row without a patient under "patient_id", or another `group_by`.
    """
    if group_by not in ("patient_id", "image"):
        raise Refused(f"--group_by {group_by} is not known; expected patient_id or image")
    group, patient = row.get("group"), row.get("patient_id")
    if group_by == "image":
        return row["file_name"] if patient is not None or group is None else group
    if patient is None:
        raise Refused(
            f"{row['file_name']} has no patient_id, so its patient could be on both sides of the split; add the "
            "column, or say --group_by image if every image is its own patient"
        )
    return patient if group is None else group


def stratum_of(row: dict) -> str:
    """Return whether any finding is known of a film."""
    findings = row.get("findings")
    return "unknown" if findings is None else "any finding" if findings else "no finding"


def strata_of(rows: Sequence[dict]) -> list[str]:
    """Return for each film what is spread evenly over folds: its rarest finding, as the commoner ones even out by themselves.

    A finding in another place is another one, where the table knows the places. Of many findings the MOST_STRATA
    commonest count: of others there are too few to be spread.
    """
    findings = [placed_findings(row) for row in rows]
    films_with = Counter(finding for found in findings for finding in found)
    common = {finding for finding, _ in sorted(films_with.items(), key=lambda item: (-item[1], item[0]))[:MOST_STRATA]}
    return [
        min(common & found, key=lambda finding: (films_with[finding], finding), default=stratum_of(row))
        for row, found in zip(rows, findings, strict=True)
    ]


def placed_findings(row: dict) -> set[str]:
    """Return a film's findings: with side and zone where it has boxes, as "nodule, right, middle"."""
    boxes = row.get("boxes")  # in a table of somebody else's perhaps how many there are
    boxes = [box for box in boxes if isinstance(box, dict)] if isinstance(boxes, list) else []
    placed = {", ".join(str(box[key]) for key in ("finding", "side", "zone") if box.get(key)) for box in boxes}
    return placed or set(row.get("findings") or ())


def with_folds(rows: Iterable[dict], num_folds: int = 5, seed: int = 0, group_by: str = "patient_id") -> list[dict]:
    """Return the rows sorted by file name, each with a `fold`; the order they came in makes no difference.

    Rows that have folds keep them. Others, of a folder that download.py has not written, are dealt out here; equal
    files stay together, also when validation is set aside, but only download.py looks for films that are nearly equal.

    Raises:
        Refused: where some rows have folds and others none, with fewer groups than folds, for a film whose copy is in
            another fold, or for rows without a patient, see `group_of`.
    """
    rows = sorted(rows, key=lambda row: row["file_name"])
    without = [row["file_name"] for row in rows if row.get("fold") is None]
    if 0 < len(without) < len(rows):
        raise Refused(f"{without[0]} has no fold but other rows have; give one to every row or to none")
    first = {}
    copies = [(first.setdefault(row.get("sha256"), i), i) for i, row in enumerate(rows) if row.get("sha256")]
    copies = [(i, j) for i, j in copies if i != j]
    for one, other in ((rows[i], rows[j]) for i, j in copies):
        if one.get("fold") != other.get("fold"):
            raise Refused(
                f"{one['file_name']} and {other['file_name']} are the same file, in folds {one['fold']} and {other['fold']}; "
                "give them one fold, or leave one out"
            )
    if not (without or copies):
        return rows
    groups = merge_groups([group_of(row, group_by) for row in rows], copies)
    if not without:
        return [{**row, "group": group} for row, group in zip(rows, groups, strict=True)]
    folds = assign_folds(groups, strata_of(rows), num_folds, seed)
    return [{**row, "group": group, "fold": fold} for row, group, fold in zip(rows, groups, folds, strict=True)]


def split_fold(
    rows: Iterable[dict], fold: int, seed: int, validation_fraction: float = 0.1, group_by: str = "patient_id"
) -> tuple[list[dict], list[dict], list[dict]]:
    """Return the training, validation and held-out rows of a fold, each sorted by file name.

    The held-out rows are those of the fold. Of the patients in the others a share, at least one, is set aside for
    validation, with as many findings among them as among the rest; the choice depends on seed and fold only.

    Args:
        rows: with a `fold` each.
        validation_fraction: share of the patients outside the fold.
        group_by: "patient_id" or "image", see `group_of`.

    Raises:
        Refused: for rows without folds, a fold that does not exist, or too few patients outside it.
    """
    rows = sorted(rows, key=lambda row: row["file_name"])
    if any(row.get("fold") is None for row in rows):
        raise Refused("the table has no column fold; make folds first (download.py writes them)")
    folds = sorted({row["fold"] for row in rows})
    if fold not in folds:
        raise Refused(f"--fold {fold} does not exist; the set has folds {', '.join(map(str, folds))}")
    held_out = [row for row in rows if row["fold"] == fold]
    films = defaultdict(list)
    for row in rows:
        if row["fold"] != fold:
            films[group_of(row, group_by)].append(row)
    if len(films) < 2:
        raise Refused(f"{len(films)} patients outside fold {fold}; expected two at least, to train on and to validate")

    # A systematic sample of the patients, sick before healthy and shuffled within, has the share of both
    draws = np.random.default_rng(derive_seed("validation", seed, fold)).random(len(films))
    ranked = sorted(
        zip(sorted(films), draws, strict=True), key=lambda pair: (min(map(stratum_of, films[pair[0]])), pair[1])
    )
    num_validation = min(max(1, round(validation_fraction * len(films))), len(films) - 1)
    picks = ((np.arange(num_validation) + 0.5) * len(films) / num_validation).astype(int)
    chosen = {ranked[pick][0] for pick in picks}
    outside = [row for row in rows if row["fold"] != fold]
    training = [row for row in outside if group_of(row, group_by) not in chosen]
    validation = [row for row in outside if group_of(row, group_by) in chosen]
    return training, validation, held_out


def held_out_of(rows: Sequence[dict], header: dict) -> set[str]:
    """Return the names of the films that an adapter's fold holds out, none where it was not trained on this set.

    Args:
        rows: of `metadata.read_metadata`.
        header: of the adapter file; of other tools' adapters it is empty.
    """
    if "data_hash" not in header:
        return set()
    group_by = header["settings"]["group_by"]
    if group_by == "patient_id" and any(row["patient_id"] is None for row in rows):
        return set()  # it cannot have been trained on these
    dealt = with_folds(rows, group_by=group_by)
    if dataset_hash(dealt) != header["data_hash"]:
        return set()
    return {row["file_name"] for row in dealt if row["fold"] == header["fold"]}


def patient_of(row: dict) -> str:
    """Return whose film a row is; patients who share a film count as one."""
    return str(row.get("group") or row.get("patient_id") or row["file_name"])


def draw_patients(rows: Sequence[dict], most: int, seed: int) -> list[dict]:
    """Return one film each of at most so many patients, both drawn by seed, in an order that chance gave them."""
    order = np.random.default_rng(derive_seed(seed, "patients")).permutation(len(rows))
    first = {}
    for i in order:
        first.setdefault(patient_of(rows[i]), rows[i])
    return list(first.values())[:most]


def draw_most_patients(rows: list[dict], most: int, seed: int) -> list[dict]:
    """Return `most` of the rows, of as many patients as may be, drawn by seed, in their old order."""
    chosen = [row["file_name"] for row in draw_patients(rows, most, seed)]
    rest = [row for row in rows if row["file_name"] not in set(chosen)]
    chosen += [row["file_name"] for row in draw_rows(rest, most - len(chosen), seed)]
    return [row for row in rows if row["file_name"] in set(chosen)]


def shuffle_captions(rows: Sequence[dict], seed: int) -> list[dict]:
    """Return the rows with their captions, column `text`, dealt out anew: what a model learns from them is not the text."""
    order = np.random.default_rng(derive_seed(seed, "captions")).permutation(len(rows))
    return [{**row, "text": rows[i]["text"]} for row, i in zip(rows, order, strict=True)]


def draw_rows(rows: list[dict], most: int, seed: int) -> list[dict]:
    """Return `most` of the rows, drawn by seed, in their old order; all of them where there are no more."""
    if most >= len(rows):
        return rows
    chosen = np.random.default_rng(derive_seed(seed, "rows")).permutation(len(rows))[:most]
    return [rows[i] for i in sorted(chosen)]
