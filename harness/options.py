"""The options of train.py: one dataclass gives the command line, --help and the checks."""

import argparse
import math
from dataclasses import dataclass, field, fields, replace

import torch

from harness.errors import UserError
from model import VALUES

TERMINAL_OF = {**{name: usual for name, (_, usual) in VALUES.items()}, "given": "value"}
SFT_RATE, DPO_RATE = 5e-5, 1e-5                 # usual for weights that are trained already
USES_A_RUN = ("ask", "score", "export")         # these train nothing
NEEDS = {"skip_bad": ("data", "score"), "teacher": ("teacher_init",)}
FLAG, ANY, STEPS = (0, 1), (0, 2 ** 62), (-100, 2 ** 62)       # least, largest
AMONG = {int: (1, 10 ** 6), float: (1e-12, 1e6)}               # where an option does not say


def option(default, help, with_data=None, among=None):
    """A field of Config. with_data: the default beside --data; among: the least and the largest
    number, or all texts that are allowed."""
    with_data = default if with_data is None else with_data
    return field(default=default, metadata={"help": help, "with_data": with_data, "among": among})


@dataclass(frozen=True)
class Recipe:
    """How a stage is trained: all of its options but the loss and the seed."""
    steps: int
    lr: float
    batch_size: int
    micro_batch: int = 0
    log_interval: int = 20      # what a stage logs is kept with it
    eval_interval: int = 30


@dataclass
class Config:
    data: str = option("", "file of preference pairs; without: the toy task")
    skip_bad: int = option(0, "1: leave out rows that cannot be read, and count them", among=FLAG)
    methods: tuple = option(("bc", "kd", "dpo", "tvkd"), "methods that train the student, a row of "
                            "the table for each: any of bc, kd, dpo, tvkd, soft")
    out: str = option("out", "folder for the results and the weights of each seed", "out-data")
    seed: int = option(0, "of toy data, split, weights, batches, sampling", among=ANY)
    seeds: int = option(1, "number of full runs, with seeds seed, seed+1, ...")
    device: str = option("auto", "auto: the best here", among=("auto", "cpu", "cuda", "mps"))
    ask: str = option("", "answer this prompt with every model of the run in --out")
    score: str = option("", "score the pairs of this file into scores.jsonl in --out")
    export: str = option("", "write those models into this folder, for the transformers library")
    alpha: float = option(1.0, "weight of the teacher's psi in TVKD; 0 is DPO, below 0 the plus "
                          "reading of the loss", None, (-1e6, 1e6))
    beta: float = option(1.0, "KL penalty of DPO, TVKD; larger stays closer to the reference", 0.1)
    gamma: float = option(1.0, "discount of psi; below 1 the sum depends on length", None, (0, 1e6))
    value: tuple = option(("implicit", "logits"), "teacher's value, a TVKD row each: implicit (its "
                          "log-ratios), logits (their logsumexp), given (from the rows of --data)")
    terminal: str = option("", "potential of the finished response; without: hold for logits, else "
                           "value", None, ("zero", "hold", "value", ""))
    teacher_beta: float = option(1.0, "of the teacher's own DPO, and so of its value", 0.1)
    tokenizer: str = option("", "a name tiktoken knows, as gpt2; without: learned from the text")
    vocab_size: int = option(512, "largest learned vocabulary, EOS included", 2048)
    block_size: int = option(64, "longest prompt + response + EOS, in tokens", 1024)
    train_pairs: int = option(3000, "that the teacher sees; 0: all that are left", 0, ANY)
    student_pairs: int = option(300, "of these that the student sees; 0: all", 0, ANY)
    val_pairs: int = option(200, "for the curves and for choosing settings", 20)
    test_pairs: int = option(500, "held-out pairs for the table", 200)
    teacher_layers: int = option(2, "blocks of the teacher", among=(1, 1000))
    teacher_heads: int = option(8, "attention heads of the teacher", among=(1, 1000))
    teacher_width: int = option(96, "channels of the teacher", among=(1, 10 ** 5))
    student_layers: int = option(2, "blocks of the student", among=(1, 1000))
    student_heads: int = option(4, "attention heads of the student", among=(1, 1000))
    student_width: int = option(48, "channels of the student", among=(1, 10 ** 5))
    teacher_init: str = option("", "its first weights: a checkpoint, a run's file, a GPT-2 folder")
    student_init: str = option("", "the same for the student")
    teacher: str = option("", "a DPO-trained one, not trained here; --teacher_init: its reference")
    batch_size: int = option(64, "pairs, or rows of a supervised stage, in a step", 8)
    micro_batch: int = option(0, "of these in memory at a time; 0: as fits best", among=ANY)
    precision: str = option("auto", "of the blocks' matrix products; auto: bfloat16 on CUDA, else "
                            "float32", None, ("auto", "float32", "bfloat16"))
    teacher_sft_steps: int = option(400, "of the teacher's fine-tuning; -N: N epochs", -3, STEPS)
    teacher_dpo_steps: int = option(94, "of the teacher's DPO; -N: N epochs", -2, STEPS)
    student_sft_steps: int = option(600, "of the student's fine-tuning; -N: N epochs", -3, STEPS)
    steps: int = option(60, "of each method that trains the student; -N: N epochs", -1, STEPS)
    teacher_sft_lr: float = option(3e-3, f"learning rate; beside --teacher_init {SFT_RATE:g}")
    teacher_dpo_lr: float = option(3e-4, f"same; beside --teacher_init {DPO_RATE:g}", 1e-4)
    student_sft_lr: float = option(5e-3, f"same; beside --student_init {SFT_RATE:g}")
    lr: float = option(3e-4, f"in dpo, tvkd, soft; beside --student_init {DPO_RATE:g}", 1e-4)
    distill_lr: float = option(1e-2, f"in bc, kd; beside --student_init {SFT_RATE:g}", 1e-3)
    save_interval: float = option(30.0, "seconds between checkpoints of a stage", None, (0, 1e6))
    samples: int = option(4, "sampled responses per held-out prompt", 1, (1, 10 ** 4))
    max_new_tokens: int = option(48, "longest sampled response, in tokens", 128)
    log_interval: int = option(20, "steps between two lines of the log", 10)
    eval_interval: int = option(30, "steps between two evaluations on the validation prompts")

    def recipe(self, steps, lr):
        """The Recipe of a stage, by the names of two options."""
        return Recipe(getattr(self, steps), getattr(self, lr), self.batch_size, self.micro_batch,
                      self.log_interval, self.eval_interval)

    def with_steps(self, task):
        """The same with every -N steps as N epochs of the rows or pairs of a Task, and told."""
        rows, pairs = len(task.ids.sft), len(task.ids.train)
        sizes = {"teacher_sft_steps": rows, "teacher_dpo_steps": pairs, "student_sft_steps": rows,
                 "steps": min(pairs, self.student_pairs or pairs)}
        steps = {name: -getattr(self, name) * math.ceil(size / self.batch_size)
                 for name, size in sizes.items() if getattr(self, name) < 0}
        if steps:
            print("  " + " ".join(f"--{name}={n}" for name, n in steps.items()))
        return replace(self, **steps)

    def terminal_of(self, kind):
        """The potential of the finished response: --terminal, or the usual one of this value."""
        return self.terminal or TERMINAL_OF[kind]

    def expect(self, name, holds, expected):
        """Raise UserError naming the option, unless it holds."""
        if not holds:
            got = getattr(self, name)
            got = ",".join(got) if isinstance(got, tuple) else repr(got)
            raise UserError(f"--{name}: expected {expected}, got {got:.100}")

    def check(self, methods):
        """Raise UserError naming the first option whose value cannot work."""
        for f in fields(self):
            value, among = getattr(self, f.name), f.metadata["among"] or AMONG.get(f.type)
            if f.type in AMONG:
                least, most = (f"{x:g}" if f.type is float else x for x in among)
                expected = f"at least {least}" if among[1] == 2 ** 62 else f"{least} to {most}"
                self.expect(f.name, among[0] <= value <= among[1], expected)
            elif among:
                self.expect(f.name, value in among, f"one of {', '.join(filter(None, among))}")
        for name, known in (("methods", methods), ("value", TERMINAL_OF)):
            chosen = getattr(self, name)
            self.expect(name, len(set(chosen)) == len(chosen) and set(chosen) <= set(known),
                        f"some of {','.join(known)}, each once")
        if "given" in self.value:
            self.expect("value", self.data, "--data beside given: the toy task has no such values")
            self.expect("terminal", self.terminal in ("", "value"), "value beside --value=given")
            self.expect("gamma", self.gamma == 1, "1 beside --value=given")
        for name in ("teacher_dpo_steps", "steps"):
            self.expect(name, getattr(self, name), "at least 1, or -N for N epochs")
        self.expect("train_pairs", self.train_pairs or self.data, "at least 1 on the toy task")
        for who in ("teacher", "student"):
            heads = getattr(self, f"{who}_heads")
            self.expect(f"{who}_width", getattr(self, f"{who}_width") % heads == 0,
                        f"a multiple of --{who}_heads={heads}")


class Parser(argparse.ArgumentParser):
    def error(self, message):
        raise UserError(f"{message}; try --help")


def parse_args(argv, methods, description=None):
    """Command line -> Config. Defaults may differ beside --data. methods: the table of train.py."""
    parser = Parser(allow_abbrev=False, description=description,
                    formatter_class=argparse.RawDescriptionHelpFormatter)
    for f in fields(Config):
        default, with_data = (",".join(d) if f.type is tuple else d
                              for d in (f.default, f.metadata["with_data"]))
        beside = f", with --data: {with_data}" if with_data != default else ""
        parser.add_argument(
            f"--{f.name}", type=str if f.type is tuple else f.type, metavar=f.name.upper(),
            default=argparse.SUPPRESS, help=f"{f.metadata['help']} "
            f"(default: {'empty' if default == '' else default}{beside})")
    given = vars(parser.parse_args(argv))
    for name, x in given.items():
        if x in ("", "--", []):     # an unset shell variable, most likely; argparse: [] for --
            parser.error(f"--{name}: expected a value, got none")
        given[name] = tuple(x.split(",")) if name in ("methods", "value") else x
    uses = [name for name in USES_A_RUN if name in given]
    unused = set(given) - {*USES_A_RUN, "out", "seed", "device", "skip_bad"}
    if unused and uses:
        parser.error(f"--{min(unused)}: expected only --out, --seed, --device beside --{uses[0]}")
    for name, others in NEEDS.items():
        if name in given and not set(others) & set(given):
            parser.error(f"--{name}: expected --{' or --'.join(others)} beside it")
    for name in sorted(given):
        who, _, size = name.partition("_")
        if size in ("layers", "heads", "width") and f"{who}_init" in given:
            parser.error(f"--{name}: expected none beside --{who}_init, whose weights have sizes")
    defaults = {f.name: f.metadata["with_data"] for f in fields(Config)} if "data" in given else {}
    if "teacher_init" in given:
        defaults |= {"teacher_sft_lr": SFT_RATE, "teacher_dpo_lr": DPO_RATE}
    if "student_init" in given:
        defaults |= {"student_sft_lr": SFT_RATE, "lr": DPO_RATE, "distill_lr": SFT_RATE}
    if given.get("value") == ("given",) and "methods" not in given:     # no teacher is needed
        defaults["methods"] = tuple(name for name in Config.methods if not {
            "teacher", "answers"} & {field.name for field in fields(methods[name][0])})
    config = Config(**{**defaults, **given})
    config.check(methods)
    return config


def pick_device(name):
    usable = {"cuda": torch.cuda.is_available, "mps": torch.backends.mps.is_available}
    if name == "auto":
        name = next((x for x in usable if usable[x]()), "cpu")
    elif name != "cpu" and not usable[name]():
        raise UserError(f"--device: expected one this machine has, got {name}")
    return torch.device(name)


def in_bfloat16(precision, device):
    """Whether matrix products are in bfloat16. CUDA is asked only where it is the device."""
    return precision == "bfloat16" or (precision == "auto" and device.type == "cuda"
                                       and torch.cuda.is_bf16_supported())
