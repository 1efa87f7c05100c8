#!/usr/bin/env bash
# Set up, lint and test on a fresh machine: bash launch/test.sh
# Arguments go to pytest: bash launch/test.sh -k resumed. PYTHON names the interpreter that .venv is made with.
# A worker a core, at most four, each with one thread: threads of several workers would wait for one another. The limit
# holds the scripts to it, too, which take all cores where a launcher, not a person, said one thread.
set -euo pipefail
cd "$(dirname "$0")/.."

# What is compiled is kept, whatever the shell says: some images forbid it, and then every import compiles all anew
unset PYTHONDONTWRITEBYTECODE
[ -x .venv/bin/python ] || "${PYTHON:-python3}" -m venv .venv
# Compiling 17,000 modules takes longer than to unpack them; most are never imported
.venv/bin/python -m pip install --quiet --disable-pip-version-check --no-compile \
    -r requirements.txt -r requirements-dev.txt -c constraints.txt
.venv/bin/ruff check .
.venv/bin/ruff format --check .
OMP_NUM_THREADS=1 OMP_THREAD_LIMIT=1 .venv/bin/python -m pytest -n logical --maxprocesses 4 --dist worksteal "$@"
