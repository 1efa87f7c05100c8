"""Seeds derived from what they are for, so that no random state has to be stored or agreed between processes."""

import hashlib

from utils.files import canonical_json


def derive_seed(*keys: int | str) -> int:
    """Return a seed in [0, 2^63) that depends on every key and nothing else.

    Keys are hashed together: `derive_seed(0, 1)` and `derive_seed(1, 0)` are unrelated, unlike `seed + rank`, where
    run 1 on rank 0 repeats run 0 on rank 1.
    """
    digest = hashlib.sha256(canonical_json(keys).encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1
