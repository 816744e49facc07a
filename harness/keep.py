"""What a run keeps on disk, so that no stage is computed twice.

    keep(name, f, *args)        f(*args), or what an earlier run kept of the same f and arguments

A stage is a function of plain arguments, so its arguments are its key: numbers and names as they
are, models, tensors and texts by their SHA-256. The seed, the code, torch, the device and the
number of threads and processes belong to it too. A kept file holds the key beside the result, with
the SHA-256 of all its bytes at the end; torch.load reads it as it is. If the bytes or any part of
the key changed, the stage runs again and the reason is printed. Every file is written whole or not
at all, so the same command goes on after a kill. A locked folder serves one run at a time.
"""

import ast
import functools
import hashlib
import inspect
import io
import os
import warnings
from collections.abc import Sequence
from dataclasses import asdict, fields, is_dataclass
from pathlib import Path

import numpy as np
import tiktoken
import torch

from data import UserError, printable
from harness.processes import in_all, is_first, rank_and_world
from harness.progress import Progress
from harness.tokenizers import tokenizer_text
from model import GPT, from_content, frozen_copy

ROOT = Path(__file__).resolve().parent.parent
# The modules that make weights, values and numbers. The report page is not among them.
SOURCES = ("tvkd.py", "model.py", "data.py", "train.py", "harness/evaluate.py",
           "harness/processes.py", "harness/numbers.py", "harness/tokenizers.py")
DIGITS = 64                                     # of a SHA-256
DERIVED = ("results.json", "report.html", "scores.jsonl")       # stale as soon as a model changes
WRITTEN = (*DERIVED, "log.jsonl", ".lock")      # beside the folders of the seeds
PARTIAL = ".partial"


def file_of(stage, ending=".pt"):
    """Name of a stage's file. The table's teacher and sft are the stages before it."""
    stage = {"teacher": "teacher-dpo", "sft": "student-sft"}.get(stage, stage)
    return f"{stage.replace(' ', '-').replace('/', '-')}{ending}"


# --------------------------------------------------------------------------------------------------
# Files

def write(path, content, option="--out"):
    """Bytes to a file, first under another name: a kill leaves the old file or the new one.

    option: the one that named the folder, for the message where there is no room.
    """
    temporary = path.with_name(f"{path.name}.tmp")
    try:
        with open(temporary, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise UserError(f"{option}: expected a folder with room to write {path}: "
                        f"{error.strerror}") from None


def read(path):
    """Content of a kept file, tensors on the CPU. Runs nothing that it finds there.

    Raises UserError where the bytes are not those that a run wrote.
    """
    refuse_others(path)
    try:
        raw = path.read_bytes()
    except OSError as error:
        raise UserError(f"{path}: expected a file as a run wrote it, "
                        f"got: {error.strerror}") from None
    if hashlib.sha256(raw[:-DIGITS]).hexdigest().encode() != raw[-DIGITS:]:
        raise UserError(f"{path}: expected a file as a run wrote it, got other bytes")
    content = load_safely(io.BytesIO(raw), path)
    if not isinstance(content, dict) or not isinstance(content.get("key"), dict):
        raise UserError(f"{path}: expected a file as a run wrote it, got other content")
    return content


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


def refuse_others(path):
    """Raise UserError for what is neither missing nor a file: opening a pipe would hang."""
    if path.exists() and not path.is_file():
        raise UserError(f"{path}: expected a file as a run wrote it or nothing, "
                        "got a folder, a pipe or a device")


def refuse_inside(option, path, out):
    """Raise UserError for an input in --out: the run would overwrite it or remove it as stale."""
    if path and Path(os.path.realpath(out)) in Path(os.path.realpath(path)).parents:
        raise UserError(f"--{option}: expected a file outside --out={out}, which this command "
                        f"writes to, got {path}")


def lock(folder):
    """Hold the folder until this process ends, however it ends: the system frees the lock."""
    file = open(folder / ".lock", "a", encoding="utf-8")
    try:
        if os.name == "nt":
            import msvcrt
            msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)
        else:
            import fcntl
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):
        file.close()
        raise UserError(f"--out: expected a folder that no other run is using, "
                        f"got {folder}") from None
    except OSError:                     # a file system without locks
        pass
    return file


# --------------------------------------------------------------------------------------------------
# Keys

def digest_of_items(items):
    """SHA-256 of a list of Examples, Pairs or other tuples of texts or ids, or of lists of these.

    A Pair's values are left out: they reach a loss as psi, which is digested there.
    """
    digest = hashlib.sha256()
    for item in items:
        digest.update(len(item).to_bytes(8, "little"))
        for part in item[:3] if hasattr(item, "values") else item:
            if isinstance(part, tuple):
                raw = digest_of_items([part]).encode()
            elif isinstance(part, str):
                raw = part.encode("utf-8")
            else:
                raw = np.asarray(part, dtype=np.int64).tobytes()
            digest.update(len(raw).to_bytes(8, "little") + raw)
    return digest.hexdigest()


def digest_of_tensors(tensors):
    digest = hashlib.sha256()
    for tensor in tensors:
        digest.update(f"{tensor.dtype} {tuple(tensor.shape)}".encode())
        flat = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
        digest.update(flat.numpy().tobytes())
    return digest.hexdigest()


def digest_of_code(sources=SOURCES, root=ROOT):
    """SHA-256 of the modules' syntax trees: comments, docstrings and line breaks do not count."""
    digest = hashlib.sha256()
    for name in sources:
        tree = ast.parse((root / name).read_text(encoding="utf-8"))
        for node in ast.walk(tree):
            body = getattr(node, "body", None)
            if isinstance(body, list) and body and isinstance(body[0], ast.Expr) \
                    and isinstance(body[0].value, ast.Constant) \
                    and isinstance(body[0].value.value, str):
                body[0].value.value = ""
        digest.update(ast.dump(tree).encode())
    return digest.hexdigest()


@functools.cache
def digest_of_this_code():
    """Of the code that this process runs: what is edited later has not been imported."""
    return digest_of_code()


def digest_of_tokenizer(tokenizer):
    """Of a learned vocabulary; any other is known by its name."""
    if tokenizer.name != "learned":
        return tokenizer.name
    return hashlib.sha256(tokenizer_text(tokenizer).encode()).hexdigest()


class Digests:
    """Digests of large objects, computed once. They stay referenced, so no id comes twice."""

    def __init__(self):
        self.known = {}

    def of(self, value):
        if id(value) not in self.known:
            self.known[id(value)] = value, self.compute(value)
        return self.known[id(value)][1]

    def compute(self, value):
        if isinstance(value, GPT):
            return digest_of_tensors(value.state_dict().values())
        if isinstance(value, torch.Tensor):
            return digest_of_tensors([value])
        if isinstance(value, tiktoken.Encoding):
            return digest_of_tokenizer(value)
        if isinstance(value, Sequence) and all(isinstance(x, torch.Tensor) for x in value):
            return digest_of_tensors(value)
        return digest_of_items(value)

    def describe(self, name, value):
        """{name: plain value or digest} of an argument, a dataclass field by field."""
        if value is None or isinstance(value, (bool, int, float, str)):
            return {name: value}
        if callable(value) and hasattr(value, "__name__"):
            return {name: value.__name__}
        if isinstance(value, GPT):
            sizes = {f"{name}.{key}": x for key, x in asdict(value.config).items()}
            return sizes | {f"{name}.weights": self.of(value)}
        if is_dataclass(value):
            parts = {name: type(value).__name__}
            for field in fields(value):
                parts |= self.describe(f"{name}.{field.name}", getattr(value, field.name))
            return parts
        return {name: self.of(value)}


# --------------------------------------------------------------------------------------------------
# Keeping

def pack(value):
    """What torch.save writes of a result, so that torch.load(weights_only=True) reads it."""
    if isinstance(value, GPT):
        return {"config": asdict(value.config), "model": value.state_dict()}
    if isinstance(value, list) and value and all(isinstance(x, torch.Tensor) for x in value):
        return {"flat": torch.cat(value), "lengths": [len(x) for x in value]}   # not a file a row
    return {"value": value}


def one_object_each(value, texts):
    """The same plain value with equal texts as one object.

    pickle writes an object once and then refers to it, so the bytes of a file would depend on
    whether an equal text was read from another file or is the same constant.
    """
    if isinstance(value, str):
        return texts.setdefault(value, value)
    if type(value) is dict:
        return {one_object_each(name, texts): one_object_each(x, texts)
                for name, x in value.items()}
    return [one_object_each(x, texts) for x in value] if type(value) is list else value


def unpack(content, device):
    if "model" in content:
        return frozen_copy(from_content(content)).to(device)
    if "flat" in content:
        return list(content["flat"].split(content["lengths"]))
    value = content["value"]
    return value.to(device) if isinstance(value, torch.Tensor) else value


def without_keeping(name, f, *args, alone=False, **aside):
    """The same call as `Keep`, for tests and notebooks: computes and keeps nothing."""
    return f(*args, **aside)


class Keep:
    """keep(name, f, *args) for one command. `seed` is set before each seed.

    trusted: beginnings of the names of stages that stay although the code changed (--trust_code).
    """

    def __init__(self, out, device, intervals=None, trusted=(), quiet=False):
        self.out, self.device = Path(out), device
        self.intervals, self.trusted, self.quiet = intervals or {}, trusted, quiet
        self.seed, self.writes, self.digests, self.opened = 0, is_first(), Digests(), set()
        self.lock = self.log_file = None
        self.common = {"torch": str(torch.__version__), "device": device.type,
                       "threads": torch.get_num_threads(), "processes": rank_and_world()[1],
                       "the code": digest_of_this_code()}

    @property
    def folder(self):
        return self.out / f"seed{self.seed}"

    def open(self):
        """Before the first write of a seed: lock the folder, remove what a kill left half written.

        Nothing in --out is touched before, so a refused command leaves an earlier run as it was.
        """
        if self.folder in self.opened or not self.writes:
            return
        self.digests = Digests()        # the objects of the seed before may go
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            # All are looked at before the first one is touched.
            for path in (*self.folder.iterdir(), *map(self.out.joinpath, WRITTEN)):
                refuse_others(path)
            self.lock = self.lock or lock(self.out)
            if not self.log_file:
                (self.out / "log.jsonl").unlink(missing_ok=True)
                self.log_file = open(self.out / "log.jsonl", "a", encoding="utf-8")
            for path in self.folder.glob("*.tmp"):
                path.unlink()
        except OSError as error:
            raise UserError(f"--out: expected a folder that can be written, got {self.out}: "
                            f"{error.strerror}") from None
        self.opened.add(self.folder)
        names = sorted(path.name for path in self.folder.iterdir())
        started = [name[:-3] for name in names if name.endswith(".pt") and "." not in name[:-3]]
        partial = [name.removesuffix(f".pt{PARTIAL}") for name in names if name.endswith(PARTIAL)]
        if partial or started and not (self.out / "results.json").exists():
            half = f" and part of {', '.join(partial)}" if partial else ""
            self.say(f"{printable(str(self.folder))}: an interrupted run left "
                     f"{', '.join(started) or 'nothing finished'}{half}; what still fits is used")

    def say(self, line):
        if not self.quiet:
            print(line, flush=True)

    def log(self, line):
        if self.log_file:
            self.log_file.write(f"{line}\n")
            self.log_file.flush()

    def __call__(self, name, f, *args, alone=False, **aside):
        """f(*args), computed or read. aside: further arguments that cannot change the result.

        With several processes all of them read, or all of them compute; the first one writes.
        alone=True: this process works alone.
        """
        self.open()
        key = self.key(f, args)
        path = self.path(name, key)
        content = self.find(path, key, name)
        agree = bool if alone else in_all
        if agree(content is not None):
            path.with_name(path.name + PARTIAL).unlink(missing_ok=True)     # a kill came between
            for line in content["log"]:
                self.log(line)
            if content["log"]:
                self.say(f"  {name}: kept in {printable(str(path))}")
            return unpack(content, self.device)
        progress = None
        if "progress" in inspect.signature(f).parameters:
            partial = Partial(self, path.with_name(path.name + PARTIAL), key, name)
            progress = Progress(name, self.seed, partial=partial, log=self.log, **self.intervals)
            aside = {**aside, "progress": progress}
        value = f(*args, **aside)
        if self.writes:
            for derived in DERIVED:
                (self.out / derived).unlink(missing_ok=True)
            self.put(path, {"key": key, "log": progress.lines if progress else [], **pack(value)})
            path.with_name(path.name + PARTIAL).unlink(missing_ok=True)
        agree(True)                 # nobody goes on to read what is not yet written
        return value

    def path(self, name, key):
        """One file for each name: a stage with another key replaces it."""
        return self.folder / file_of(name)

    def key(self, f, args):
        """{name: plain value or digest} of all that the result depends on."""
        key = {"seed": self.seed, **self.common, "function": f.__name__}
        for name, value in zip(inspect.signature(f).parameters, args):
            key |= self.digests.describe(name, value)
        return key

    def find(self, path, key, name):
        """Content of a kept file, or None where it is missing, damaged or of another key."""
        if not path.exists():
            return None
        try:
            content = read(path)
        except UserError as error:
            self.say(f"{error}; rebuilt")
            return None
        stored = content["key"]
        changed = [part for part in sorted({*stored, *key}) if stored.get(part) != key.get(part)]
        if changed == ["the code"] and name.startswith(self.trusted):
            self.say(f"  {name}: kept although the code changed (--trust_code)")
            return content
        if changed:
            self.say(f"{printable(str(path))}: rebuilt, because {reasons(changed, stored, key)}")
        return None if changed else content

    def put(self, path, content):
        file = io.BytesIO()
        torch.save(one_object_each(content, {}), file)
        raw = file.getvalue()
        write(path, raw + hashlib.sha256(raw).hexdigest().encode())


def reasons(changed, stored, key):
    """Which parts of a key changed, in words: plain values with both, digests by name alone."""
    texts = []
    for part in changed:
        was, now = stored.get(part), key.get(part)
        plain = not any(isinstance(x, str) and len(x) == DIGITS for x in (was, now))
        text = f"{part} was {was!r}, is {now!r}" if plain else f"{part} changed"
        if part == "threads":
            text += " (another number of threads rounds sums differently)"
        texts.append(text)
    return printable(", ".join(texts))


class Partial:
    """The checkpoint of a stage that is still training."""

    def __init__(self, keep, path, key, name):
        self.keep, self.path, self.key, self.name = keep, path, key, name

    def load(self):
        return self.keep.find(self.path, self.key, self.name)

    def save(self, content):
        if self.keep.writes:
            self.keep.put(self.path, {"key": self.key, **content})
