"""What a script says, and how it ends, when its input cannot be used.

Every script ends in `sys.exit(run(main, parse_args))`: 0 is done, 1 is a check that found faults, 2 is refused
input, told in one line on stderr. A traceback therefore always means a fault of ours, never one of the user's.
"""

import argparse
import errno
import json
import os
import signal
import sys
import time
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path

# A full or read-only disk, a folder of somebody else's, a file where a folder should be, a text where a name should be
UNUSABLE_DISK = (
    errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EPERM, errno.ENOTDIR, errno.EEXIST,
    errno.ENAMETOOLONG,
)  # fmt: skip


LONGEST = 1000  # characters of a message; a table may hold a name of ten million


class Refused(ValueError):
    """Input that cannot be used; the message says what was given, what was expected and what to do."""


class ArgumentParser(argparse.ArgumentParser):
    """An argument parser whose complaint is one line, like every other refusal."""

    def error(self, message: str) -> None:
        raise Refused(f"{message}; see --help")


def run(main: Callable[[Namespace], int | None], parse_args: Callable[[], Namespace]) -> int:
    """Call `main(parse_args())` and return the exit status of the process.

    Returns:
        What `main` returned (None counts as 0), 2 after `Refused` or a full disk, 128 + its number after a signal.
    """
    script = Path(sys.argv[0]).name
    try:
        return main(parse_args()) or 0
    except (Refused, OSError) as error:
        message = str(error)
        if isinstance(error, OSError):
            if error.errno not in UNUSABLE_DISK:
                raise
            where = f" {error.filename}" if error.filename else ""
            message = f"cannot read or write{where}: {error.strerror}"
        message = " ".join(message.split())
        if len(message) > LONGEST:  # what to do about it stands at the end
            message = f"{message[: LONGEST // 2]} [...] {message[-LONGEST // 2 :]}"
        print(f"{script}: {message}", file=sys.stderr)
        if report := os.environ.get("TORCHELASTIC_ERROR_FILE"):  # torchrun shows it below its own traceback
            Path(report).write_text(json.dumps({"message": message, "timestamp": int(time.time())}), encoding="utf-8")
        return 2
    except KeyboardInterrupt as interrupt:
        if os.environ.get("RANK", "0") == "0":
            afresh = any(word.startswith("--resume_from_checkpoint") for word in sys.argv)
            command = "the same command without --resume_from_checkpoint" if afresh else "the same command"
            print(f"\n{script}: interrupted; {command} goes on from here", file=sys.stderr)
        return 128 + (interrupt.args[0] if interrupt.args else signal.SIGINT)
