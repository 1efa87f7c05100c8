"""The Hugging Face hub: sending an adapter there, and what its library raises where it cannot be reached. No torch."""

import json
from pathlib import Path

from huggingface_hub import HfApi, constants, get_session
from huggingface_hub.errors import HTTPError

from utils.card import public_config
from utils.refusal import Refused
from utils.release import DECODER_NAME, KOHYA_NAME, WEIGHTS_NAME

# HTTPError is that of the HTTP client which the library is built on, of late another one than ours
HUB_ERRORS = (HTTPError, OSError, ValueError)

# Named one by one, so that nothing else in the folder, such as a picture with patients' films, ever goes along
UPLOADED = [
    WEIGHTS_NAME,
    KOHYA_NAME,
    DECODER_NAME,
    "README.md",
    "log.jsonl",
    "validation.jsonl",
    "curves.png",
    "samples/step-*.png",
]


def why_unreachable() -> str | None:
    """Return why the hub, or the mirror that HF_ENDPOINT names, does not answer within 5 s, None where it does.

    Asked once: the loaders of models ask again and again, for minutes, before they take what the cache holds.
    """
    try:
        get_session().head(constants.ENDPOINT, timeout=5)
    except HUB_ERRORS as error:
        return " ".join(str(error).split())[:200]
    return None


def push(run_dir: Path, repository: str | None, token: str | None) -> str:
    """Upload a run's adapter, card, records and generated samples, and return the repository's full name.

    Args:
        run_dir: the run's folder; its name is that of the repository where none is given.
        repository: "name" or "owner/name".
        token: of the hub; None is the one that `hf auth login` saved.

    Raises:
        Refused: where the hub cannot be reached or does not let us in; the run itself is complete.
    """
    api = HfApi(token=token)
    try:
        repo_id = api.create_repo(repository or run_dir.name, exist_ok=True).repo_id
        config = public_config(json.loads((run_dir / "config.json").read_text(encoding="utf-8")))
        # What another run of the same name had there goes, such as a decoder that is not this one's
        content = json.dumps(config, indent=1, ensure_ascii=False).encode()
        api.upload_file(repo_id=repo_id, path_or_fileobj=content, path_in_repo="config.json")
        api.upload_folder(repo_id=repo_id, folder_path=run_dir, allow_patterns=UPLOADED, delete_patterns=UPLOADED)
    except HUB_ERRORS as error:
        reason = " ".join(str(error).split())[:200]
        raise Refused(f"trained, but not uploaded ({reason}); type the command again to upload only") from error
    return repo_id
