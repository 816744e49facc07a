"""What a run keeps on disk: written whole or not at all, and used again only where it is what would be made anew.

A kept file is what torch.save writes, with the SHA-256 of those bytes behind it; torch.load reads it as it is. It holds all
that it depends on: "options", those that were read while it was made, and "made_from": seed, torch, device, threads, processes,
digests of data, of the code and of the kept files it was made from. Where its bytes or any of these are others now, it is made
anew, and the reason printed. So the same command goes on after a kill; a changed one makes what depends on the change, and only
that. Left out: two runs in one folder at a time.
"""

import hashlib
import io
import os
import signal
import sys
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch

from data import UserError, tokenizer_text

SOURCES = ("data.py", "measure.py", "model.py", "options.py", "report.py", "store.py", "train.py", "tvkd.py")
DIGITS = 64                         # of a SHA-256
NO_EFFECT = ("log_interval", "eval_interval", "save_interval")              # options that no weight, value or row depends on


def write(path, content):
    """Bytes to a file, under another name first: a kill at any moment leaves the old file or the new one."""
    temporary = path.with_name(f"{path.name}.tmp")
    try:
        with open(temporary, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise UserError(f"--out: expected a folder with room to write {path}: {error.strerror}") from None


def read(path):
    """Content of a kept file, tensors on the CPU. Raises UserError where it is not as it was written. Runs nothing it finds."""
    raw = path.read_bytes()
    if hashlib.sha256(raw[:-DIGITS]).hexdigest().encode() != raw[-DIGITS:]:
        raise UserError(f"{path}: expected a file as a run wrote it, got other bytes")
    content = load_safely(io.BytesIO(raw), path)
    if not isinstance(content, dict) or not all(isinstance(content.get(name), dict) for name in ("made_from", "options")):
        raise UserError(f"{path}: expected a file as a run wrote it, got other content")
    return content


def load_safely(file, name):
    """torch.load of tensors and plain values alone: anything else in the file is refused and not run. Raises UserError."""
    try:
        return torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:                      # whatever torch.load stumbles on in bytes that nobody vouches for
        said = " ".join(str(error).split("WeightsUnpickler error:")[-1].split())[:120]
        raise UserError(f"{name}: expected a file of tensors and plain values, which torch.load(weights_only=True) reads; got: "
                        f"{said}") from None


def fingerprint(items):
    """SHA-256 of Rows or Pairs, of texts or of ids."""
    digest = hashlib.sha256()
    for item in items:
        digest.update(len(item).to_bytes(8, "little"))
        for part in item:
            raw = part.encode("utf-8") if isinstance(part, str) else np.asarray(part, dtype=np.int32).tobytes()
            digest.update(len(raw).to_bytes(8, "little") + raw)
    return digest.hexdigest()


def fingerprint_of_code():
    """SHA-256 of SOURCES, whose code makes what is kept: what was made by other code is not used again."""
    folder = Path(__file__).resolve().parent
    return hashlib.sha256(b"".join((folder / name).read_bytes() for name in SOURCES)).hexdigest()


def vocabulary(tokenizer):
    """What tells a tokenizer from another: the fingerprint of a learned one, the name of any other."""
    return fingerprint([[tokenizer_text(tokenizer)]]) if tokenizer.name == "learned" else tokenizer.name


def file_of(stage, ending=".pt"):
    """Name of the file in which a stage is kept; the models of the table have names of their own for two stages."""
    stage = {"teacher": "teacher-dpo", "sft": "student-sft"}.get(stage, stage)
    return f"{stage.replace(' ', '-').replace('/', '-')}{ending}"


class Watched:
    """The options of a Config, which notes the ones that are read: what is made depends on those and on no other."""

    def __init__(self, config):
        self._config, self.read = config, {}

    def __getattr__(self, name):
        self.read[name] = getattr(self._config, name)
        return self.read[name]


class Store:
    """The kept files of one folder. common: what all of them depend on.

    With several processes one `writes`, and in_all(flag) tells whether the flag is set in every one of them. before_change() is
    called before a finished file is written.
    """

    def __init__(self, folder, common, writes=True, in_all=bool, before_change=lambda: None):
        self.folder, self.common, self.writes, self.in_all, self.before_change = folder, common, writes, in_all, before_change
        for path in folder.glob("*.tmp") if writes else ():                 # a kill may have left one
            path.unlink()

    def keep(self, name, setup, made_from, make, in_all=None):
        """The content of file `name`, a dict, and whether it was made now: by make(setup, partial), where it cannot be read.

        made_from: digests of all it is made from but options; those that make() reads from its setup.config are noted. partial:
        a Partial, in which a long make() may leave what it has done so far.
        """
        in_all, path = in_all or self.in_all, self.folder / name
        partial = Partial(self, path.with_name(f"{name}.partial"), {**self.common, **made_from}, Watched(setup.config))
        found = self.find(path, partial.made_from, setup.config)
        if in_all(found is not None):                                       # nobody writes what another has yet to look at
            if self.writes:
                partial.path.unlink(missing_ok=True)                        # a kill may have come just before this
            return found, False
        found = make(setup._replace(config=partial.config), partial)
        if self.writes:
            self.before_change()
            self.put(path, partial.made_from, partial.config, found)
            partial.path.unlink(missing_ok=True)
        in_all(True)                                                        # or goes on to read what is not yet written
        return found, True

    def find(self, path, made_from, config):
        """Content of the file, or None where it is missing, damaged or made of something else; says which."""
        if not path.exists():
            return None
        try:
            found = read(path)
        except UserError as error:
            print(f"{error}; made anew")
            return None
        now = {**made_from, **{f"--{name}": getattr(config, name, None) for name in found["options"]}}
        was = {**found["made_from"], **{f"--{name}": value for name, value in found["options"].items()}}
        other = [name for name in sorted({*was, *now}) if was.get(name) != now.get(name)]
        if other:
            short = [name for name in other if len(f"{was.get(name)!r}{now.get(name)!r}") < 60]         # digests say nothing
            said = [f"{name} was {was.get(name)!r}, is {now.get(name)!r}" for name in short]
            said += [f"{name} is another" for name in other if name not in short]
            print(f"{path}: made anew, because {', '.join(said)}")
        return None if other else found

    def put(self, path, made_from, config, content):
        options = {name: value for name, value in config.read.items() if name not in NO_EFFECT}
        file = io.BytesIO()
        torch.save({**content, "made_from": made_from, "options": options}, file)
        write(path, file.getvalue() + hashlib.sha256(file.getvalue()).hexdigest().encode())

    def sums(self, *names):
        """{file: its checksum}, for what is made from these files."""
        found = {}
        for name in names:
            with open(self.folder / name, "rb") as file:
                file.seek(-DIGITS, os.SEEK_END)
                found[name] = file.read().decode("ascii")
        return found


class Partial:
    """A file of what a stage has done so far."""

    def __init__(self, store, path, made_from, config):
        self.store, self.path, self.made_from, self.config = store, path, made_from, config

    def load(self):
        return self.store.find(self.path, self.made_from, self.config._config)

    def save(self, content):
        if self.store.writes:
            self.store.put(self.path, self.made_from, self.config, content)


@contextmanager
def ctrl_c_held():
    """Inside the block, Ctrl-C only fills the list that is yielded, for the caller to stop at a good moment; twice, it interrupts."""
    pressed = []

    def press(*_):
        if pressed:
            raise KeyboardInterrupt
        pressed.append(True)
        print("stopping after this step; Ctrl-C again stops at once", file=sys.stderr)
    before = signal.signal(signal.SIGINT, press)
    try:
        yield pressed
    finally:
        signal.signal(signal.SIGINT, before)
