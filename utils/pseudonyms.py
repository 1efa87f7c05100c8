"""Names that tell nothing: keyed hashes of what identifies a patient, under a key that never leaves the cache folder."""

import hashlib
import hmac
import os
import secrets
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

from utils.files import write_jsonl
from utils.films import Film
from utils.refusal import Refused

SALT_BYTES = 32
DIGITS = 16  # hexadecimal: among a million names two are equal once in 40 million sets


def load_salt(cache_dir: Path) -> bytes:
    """Return the key of all pseudonyms made with this cache folder; it is drawn at random the first time.

    With the same key the same patient has the same pseudonym, so that a set can be resumed and added to. Without it,
    pseudonyms cannot be traced back by hashing all hospital numbers there are.
    """
    path = cache_dir / "salt"
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        # Created as its owner's alone, and only by one of two runs that start at once
        with open(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as file:
            file.write(secrets.token_bytes(SALT_BYTES))
    except FileExistsError:
        pass
    salt = path.read_bytes()
    if len(salt) != SALT_BYTES:
        raise Refused(f"{path} is not the key that download.py wrote; put it back, or delete it and make the set anew")
    return salt


def pseudonym(salt: bytes, kind: str, name: str) -> str:
    """Return HMAC-SHA256 of a name, 16 hexadecimal digits; `kind` keeps patients and files apart."""
    return hmac.new(salt, f"{kind}\0{name}".encode(), hashlib.sha256).hexdigest()[:DIGITS]


def keep_private(path: Path) -> None:
    """Have the next atomic write of a file make it one that nobody but its owner can read."""
    partial = path.with_name(path.name + ".tmp")  # of files.write_bytes, which keeps what is there as it is
    partial.parent.mkdir(parents=True, exist_ok=True)
    os.close(os.open(partial, os.O_WRONLY | os.O_CREAT, 0o600))
    partial.chmod(0o600)


def pseudonymised(films: Iterable[Film], salt: bytes, key_dir: Path) -> list[Film]:
    """Return films whose id, file name and patient are pseudonyms, in the order of these, which says nothing either.

    Which film is which file is written to `key_dir`/names.jsonl, which is its owner's alone.
    """
    renamed, names = [], []
    for film in films:
        film_id = pseudonym(salt, "film", film.source_id)
        patient_id = film.patient_id and pseudonym(salt, "patient", film.patient_id)
        names.append({"source_id": film_id, "file": film.path})
        renamed.append(replace(film, source_id=film_id, file_name=f"images/{film_id}.png", patient_id=patient_id))
    keep_private(key_dir / "names.jsonl")
    write_jsonl(key_dir / "names.jsonl", names)
    return sorted(renamed, key=lambda film: film.source_id)
