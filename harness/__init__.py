"""Everything around the method: options, kept files, threads and processes, files, the report.
Nothing in this folder imports train.py."""

import os
import signal
import sys


def stop_at_once(*_):
    """At Ctrl-C, as kill -9 does: every file is there as a whole, or not at all."""
    try:
        os.write(2, f"{PROGRAM}: stopped; the same command continues from here\n".encode())
    finally:                            # also where nobody reads stderr any more
        os._exit(130)


# Only where one of ours is the program, and not where Ctrl-C is ignored.
PROGRAM = os.path.basename(sys.argv[0])
IS_PROGRAM = (PROGRAM in ("train.py", "run.py", "tables.py", "bench.py")
              and signal.getsignal(signal.SIGINT) is signal.default_int_handler)
if IS_PROGRAM:
    signal.signal(signal.SIGINT, stop_at_once)
# OpenMP threads spin while they wait for each other, which takes the time that the other one needs
# on a busy machine. Read when torch is imported: GOMP_SPINCOUNT by GNU's OpenMP (Linux),
# KMP_BLOCKTIME, in milliseconds, by LLVM's (macOS).
os.environ.setdefault("GOMP_SPINCOUNT", "1000")
os.environ.setdefault("KMP_BLOCKTIME", "1")
