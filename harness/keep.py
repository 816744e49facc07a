"""What a run keeps on disk, so that no stage is computed twice.

    keep(name, f, *args)            f(*args), or what an earlier run kept of the same
    keep.train(name, fit, *args)    the same; fit is also given a Progress, which can resume
    keep.alone(name, f, *args)      the same in one process, while others do something else

All arguments are in the key: plain values as they are, models, tensors and texts by their SHA-256.
So are seed, torch, device, numbers of threads and processes, and every definition that f and the
classes of its arguments reach by name (harness/code.py): an edit re-makes the stages that read it,
no others. Files are written whole or not at all and end in the SHA-256 of their bytes.
"""

import functools
import hashlib
import inspect
import io
import json
import os
from dataclasses import asdict, fields, is_dataclass
from pathlib import Path

import tiktoken
import torch

from harness.errors import printable, UserError
from harness.code import reached
from harness.files import load_safely, write
from harness.progress import Progress
from harness.steps import in_all, is_first, rank_and_world
from harness.tokenizers import tokenizer_text
from model import GPT, GPTConfig

try:
    import fcntl
except ImportError:             # on Windows nothing keeps two runs out of one folder
    fcntl = None

WRITTEN = ("results.json*", "report.html*", "log.jsonl", "scores.jsonl*", "seed*[0-9]")  # to --out
MARK = b"a run of TVKD, https://arxiv.org/abs/2509.16965\n"                 # in .lock
DIGITS = 64                                                                 # of a SHA-256


def file_of(stage, ending=".pt"):
    """Name of a stage's file. The table's teacher and sft are the stages before it."""
    stage = {"teacher": "teacher-dpo", "sft": "student-sft"}.get(stage, stage)
    return f"{stage.replace(' ', '-').replace('/', '-')}{ending}"


def read(path):
    """Content of a kept file, tensors on the CPU. Nothing that it contains is executed."""
    raw = path.read_bytes()
    if hashlib.sha256(raw[:-DIGITS]).hexdigest().encode() != raw[-DIGITS:]:
        raise UserError(f"{path}: expected a file as a run wrote it, got other bytes")
    content = load_safely(io.BytesIO(raw), path)
    return {**content, "key": dict(json.loads(content["key"]))}


def lock(folder):
    """Hold a run's folder until this process ends, however it ends: the system frees the lock.
    Raises UserError where another run holds it, and where files in the way are not a run's."""
    path, found = folder / ".lock", [x for name in WRITTEN for x in sorted(folder.glob(name))]
    mark = path.read_bytes() if path.exists() else b""
    if (found or mark) and mark != MARK:            # other programs write a .lock, too
        raise UserError(f"--out: expected a new folder or that of a run, got {folder} with "
                        f"{(*found, path)[0].name} and without the .lock of a run; choose another")
    file = open(path, "ab", buffering=0)
    try:
        if fcntl:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.close()
        raise UserError(f"--out: expected a folder that no other run uses: {folder}") from None
    except OSError:                     # a file system without locks
        pass
    if not mark:
        file.write(MARK)
    return file


def digest_of(value):
    """SHA-256 of all that a value consists of."""
    if isinstance(value, GPT):
        value = list(value.state_dict().values())
    if isinstance(value, torch.Tensor):
        flat = value.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
        raw = f"{value.dtype} {tuple(value.shape)}".encode() + flat.numpy().tobytes()
    elif isinstance(value, tiktoken.Encoding):      # one that was not learned is known by its name
        raw = (tokenizer_text(value) if value.name == "learned" else value.name).encode()
    elif isinstance(value, list) and value and isinstance(value[0], (torch.Tensor, list, tuple)):
        raw = " ".join(["parts:", *map(digest_of, value)]).encode()
    else:       # a Pair's values are left out: they reach a loss as psi, which is digested there
        value = value[:3] if hasattr(value, "rejected") else value
        raw = repr(value).encode("utf-8", "surrogatepass")
    return hashlib.sha256(raw).hexdigest()


def pack(value):
    """What torch.save writes of a result, so that torch.load(weights_only=True) reads it."""
    if isinstance(value, GPT):
        return {"config": asdict(value.config), "model": value.state_dict()}
    if isinstance(value, list) and value and all(isinstance(x, torch.Tensor) for x in value):
        return {"flat": torch.cat(value), "lengths": [len(x) for x in value]}   # not a file a row
    return {"value": value}


def unpack(content, device):
    if "model" in content:
        model = GPT(GPTConfig(**content["config"]))
        model.load_state_dict(content["model"])
        return model.requires_grad_(False).to(device)
    if "flat" in content:
        return list(content["flat"].split(content["lengths"]))
    value = content["value"]
    return value.to(device) if isinstance(value, torch.Tensor) else value


class Keep:
    """See the top of this file. `seed` is set before each seed."""

    def __init__(self, out, device, save_interval=30.0):
        self.out, self.device, self.save_interval = Path(out), device, save_interval
        self.seed, self.digests, self.opened, self.lock, self.log_file = 0, {}, None, None, None
        self.common = {"torch": str(torch.__version__), "device": device.type,
                       "threads": torch.get_num_threads(), "processes": rank_and_world()[1]}

    def __call__(self, name, f, *args, trains=False, agree=in_all):
        """With several processes all of them read, or all of them compute; the first one writes."""
        self.open()
        path, key, lines = self.out / f"seed{self.seed}" / file_of(name), self.key(f, args), []
        checkpoint = path.with_name(f"{path.name}.partial")
        content = self.find(path, key)
        if agree(content is not None):
            checkpoint.unlink(missing_ok=True)          # a kill came between
            self.log(*content["log"])
            if trains:
                print(f"  {name}: kept in {printable(path)}", flush=True)
            return unpack(content, self.device)
        if trains:
            progress = Progress(name, self.seed, self, checkpoint, key)
            value, lines = f(*args, progress=progress), progress.lines
        else:
            value = f(*args)
        self.put(path, key, {"log": lines, **pack(value)})
        checkpoint.unlink(missing_ok=True)
        agree(True)                 # nobody goes on to read what is not yet written
        return value

    train = functools.partialmethod(__call__, trains=True)
    alone = functools.partialmethod(__call__, agree=bool)

    def open(self):
        """Before the first stage of a seed, so that a command that is refused earlier leaves a run
        as it was: lock the folder, remove what a kill left half written."""
        folder = self.out / f"seed{self.seed}"
        if folder == self.opened or not is_first():
            return
        self.opened, self.digests = folder, {}          # the objects of the seed before may go
        self.out.mkdir(parents=True, exist_ok=True)
        self.lock = self.lock or lock(self.out)
        if folder.is_symlink():
            raise UserError(f"--out: expected {folder} as a folder of its own, got a link")
        folder.mkdir(exist_ok=True)
        for path in folder.glob("*.tmp"):
            path.unlink()
        if not self.log_file:
            (self.out / "log.jsonl").unlink(missing_ok=True)            # it may be a link
            self.log_file = open(self.out / "log.jsonl", "w", buffering=1, encoding="utf-8")

    def close(self):
        for file in filter(None, (self.log_file, self.lock)):
            file.close()

    def log(self, *lines):
        if self.log_file:
            self.log_file.writelines(f"{line}\n" for line in lines)

    def key(self, f, args):
        """{name: plain value or digest} of all that the result depends on."""
        key = {"seed": self.seed, **self.common, "function": f.__name__}
        for name, value in zip(inspect.signature(f).parameters, args):
            key |= self.describe(name, value)
        names = [f.__name__, *(x for x in key.values() if isinstance(x, str))]      # and classes
        return key | {f"code: {name}": digest for name, digest in reached(names).items()}

    def describe(self, name, value):
        """The parts of a key for one argument, a dataclass or a model field by field."""
        if isinstance(value, (bool, int, float, str, type(None))):
            return {name: value}
        if isinstance(value, GPT):
            return {f"{name} is": "GPT", f"{name}.weights": self.digest(value)} | self.describe(
                name, value.config)
        if not is_dataclass(value):
            return {name: self.digest(value)}
        parts = {name: type(value).__name__}
        for field in fields(value):
            parts |= self.describe(f"{name}.{field.name}", getattr(value, field.name))
        return parts

    def digest(self, value):
        """`digest_of`, once for each object, which stays here so that no id comes twice."""
        if id(value) not in self.digests:
            self.digests[id(value)] = value, digest_of(value)
        return self.digests[id(value)][1]

    def find(self, path, key):
        """Content of a kept file, or None where it is missing, damaged or of another key."""
        if not os.path.lexists(path):
            return None
        try:
            content = read(path)
        except (OSError, KeyError, TypeError, ValueError) as error:     # another's, or unreadable
            print(f"{printable(error)}; {path.name} rebuilt", flush=True)
            return None
        changed, stored = [], content["key"]
        for part in sorted(part for part in {*stored, *key} if stored.get(part) != key.get(part)):
            was, now = stored.get(part), key.get(part)
            what = f"was {was!r}, is {now!r}" if len(f"{was}{now}") < DIGITS else "changed"
            changed.append(printable(f"{part.removeprefix('code: ')} {what}"))
        if not changed:
            return content
        print(f"{printable(path)}: rebuilt, because {', '.join(changed)}", flush=True)
        return None

    def put(self, path, key, content):
        if is_first():
            file = io.BytesIO()
            # The key as one text: pickle writes equal texts once if they are one object.
            torch.save({"key": json.dumps(key, sort_keys=True), **content}, file)
            write(path, file.getvalue() + hashlib.sha256(file.getvalue()).hexdigest().encode())
