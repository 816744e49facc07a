"""Everything around the method: options, kept files, processes, preference files, the report.

Nothing in this folder is part of the method, and nothing in it imports train.py.
"""

import os
import sys

try:
    os.getcwd()                 # a deleted one ends torch's import with a message of its own
except OSError:
    print("expected a working folder that exists, got one that was deleted", file=sys.stderr)
    raise SystemExit(2) from None
# OpenMP threads spin while they wait for each other. On a busy machine they spin away the time that
# the other thread needs. Both variables are read when torch is imported, so they are set first:
# GOMP_SPINCOUNT by GNU's OpenMP (Linux), KMP_BLOCKTIME, in milliseconds, by LLVM's (macOS).
os.environ.setdefault("GOMP_SPINCOUNT", "1000")
os.environ.setdefault("KMP_BLOCKTIME", "1")
