"""Reading and writing files that a kill, a full disk or a stranger may have spoiled."""

import os
import warnings

import torch

from harness.errors import UserError


def write(path, content):
    """Bytes to a file, first under another name: a kill leaves the old file or the new one."""
    temporary = path.with_name(f"{path.name}.tmp")
    try:
        with open(temporary, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise UserError(f"expected to write {path}: {error.strerror}") from None


def refuse_inside(option, path, out):
    """Raise UserError for a file or folder of the user's in --out, which a run writes to."""
    if path and os.path.realpath(path).startswith(os.path.join(os.path.realpath(out), "")):
        raise UserError(f"--{option}: expected a path outside --out={out}, got {path}")


def load_safely(file, name):
    """torch.load of tensors and plain values alone; refuses anything else without running it."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")         # torch's, about old formats
            return torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:          # anything can go wrong in bytes that nobody vouches for
        reason = " ".join(str(error).split("WeightsUnpickler error:")[-1].split())[:120]
        raise UserError(f"{name}: expected a file of tensors and plain values, which torch.load("
                        f"weights_only=True) reads; got: {reason}") from None
