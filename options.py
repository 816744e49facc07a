"""The options of train.py: one dataclass, from which the command line, --help and the checks are made."""

import argparse
import math
from dataclasses import dataclass, field, fields

import torch

from data import UserError

METHODS, VALUES, TERMINALS = ("bc", "kd", "dpo", "tvkd"), ("implicit", "logits"), ("zero", "hold", "value")


def terminal_of(kind, config):
    """The potential of the finished response. Logits: the network's output after EOS was never trained."""
    return config.terminal or {"implicit": "value", "logits": "hold"}[kind]


def option(default, help, with_data=None):
    """A field of Config; `with_data` replaces the default where --data names a file."""
    return field(default=default, metadata={"help": help, "with_data": default if with_data is None else with_data})


@dataclass
class Config:
    # what to run
    data: str = option("", "JSONL file of preference pairs; empty: the toy task")
    methods: tuple = option(METHODS, "how to train the student, a row of the table each: any of " + ",".join(METHODS))
    out: str = option("out", "folder for results.json, log.jsonl, and weights and tokenizer of each seed")
    seed: int = option(0, "seed of everything: toy data, split, weights, order of batches, sampling")
    seeds: int = option(1, "number of full runs, with seeds seed, seed+1, ...")
    device: str = option("auto", "cpu, cuda, mps, or auto for the best of the three that is there")
    ask: str = option("", "train nothing; answer this prompt with every model that a run with --seed left in --out")
    score: str = option("", "train nothing; score the pairs of this JSONL file with those models, into scores.jsonl in --out")
    # the loss
    alpha: float = option(1.0, "weight of the teacher's psi in TVKD; 0 is DPO")
    beta: float = option(1.0, "strength of the student's KL penalty, in DPO and TVKD; larger stays closer to the reference", 0.1)
    gamma: float = option(1.0, "discount in psi = gamma V(s') - V(s); below 1, the sum of psi is mostly biased by length")
    value: tuple = option(VALUES, "teacher's value, a TVKD row each: implicit (from its log-ratios), logits (the paper's form)")
    terminal: str = option("", "potential of the finished response: zero, hold, value; empty: value for implicit, else hold")
    teacher_beta: float = option(1.0, "beta of the teacher's own DPO, and so of its value", 0.1)
    # data
    tokenizer: str = option("", "an encoding tiktoken knows, such as gpt2; empty: a vocabulary learned from the training text")
    teacher_tokenizer: str = option("", "the teacher's own: an encoding's name, or the size of a learned one; empty: the same")
    vocab_size: int = option(512, "largest size of a learned vocabulary, EOS included", 2048)
    block_size: int = option(64, "context: the longest prompt + response + EOS, in tokens", 1024)
    train_pairs: int = option(3000, "training pairs, all of which the teacher sees; 0: all that are left", 0)
    student_pairs: int = option(300, "training pairs the student sees; 0: all of the teacher's", 0)
    val_pairs: int = option(200, "pairs for the curves and for choosing settings", 20)
    test_pairs: int = option(500, "held-out pairs for the table", 100)
    # models
    teacher_layers: int = option(3, "blocks of the teacher")
    teacher_heads: int = option(4, "attention heads of the teacher")
    teacher_width: int = option(96, "channels of the teacher")
    student_layers: int = option(2, "blocks of the student")
    student_heads: int = option(4, "attention heads of the student")
    student_width: int = option(48, "channels of the student")
    teacher_init: str = option("", "start the teacher from this checkpoint of nanoGPT or model of out/, its sizes too; empty: new weights")
    student_init: str = option("", "the same for the student")
    # training
    batch_size: int = option(64, "pairs (two rows each) in a step of every stage; supervised stages take as many rows", 8)
    micro_batch: int = option(0, "pairs, or rows, in memory at a time, for a gradient of the same batch; 0: the whole batch")
    precision: str = option("auto", "of the blocks' matrix products: float32, bfloat16, or auto: bfloat16 on CUDA that supports it")
    compile: int = option(0, "1: torch.compile the model in training, which first takes a while in each stage; needs a C++ compiler")
    teacher_sft_steps: int = option(400, "steps of the teacher's supervised fine-tuning", 100)
    teacher_dpo_steps: int = option(94, "steps of the teacher's DPO", 40)
    student_sft_steps: int = option(600, "steps of the student's supervised fine-tuning", 100)
    steps: int = option(60, "steps of every method that trains the student", 20)
    teacher_sft_lr: float = option(3e-3, "learning rate of the teacher's supervised fine-tuning")
    teacher_dpo_lr: float = option(3e-4, "learning rate of the teacher's DPO", 1e-4)
    student_sft_lr: float = option(5e-3, "learning rate of the student's supervised fine-tuning")
    lr: float = option(3e-4, "learning rate of the student in dpo and tvkd", 1e-4)
    distill_lr: float = option(1e-2, "learning rate of the student in bc and kd", 1e-3)
    save_interval: float = option(30.0, "seconds between two checkpoints of a stage in training; a kill loses about as much of it")
    # measuring
    samples: int = option(4, "sampled responses per held-out prompt, at temperature 1", 1)
    max_new_tokens: int = option(48, "longest sampled response, in tokens", 128)
    log_interval: int = option(20, "steps between two lines of the log", 10)
    eval_interval: int = option(20, "steps between two evaluations on the validation prompts", 20)

    def check(self):
        """Raise UserError naming the first option whose value cannot work."""
        def expect(name, holds, expected):
            if not holds:
                got = getattr(self, name)
                got = ",".join(got) if isinstance(got, tuple) else repr(got)
                raise UserError(f"--{name}: expected {expected}, got {got}")
        for f in fields(self):
            value = getattr(self, f.name)
            if f.type is int:
                least = 0 if f.name in ("seed", "train_pairs", "student_pairs", "micro_batch", "compile", "teacher_sft_steps",
                                       "student_sft_steps") else 1
                expect(f.name, value >= least, f"at least {least}")
            if f.type is float:
                expect(f.name, math.isfinite(value) and value >= 0, "a number of at least 0")
                expect(f.name, value > 0 or f.name in ("alpha", "gamma", "save_interval"), "a number above 0")
        for name, known in (("methods", METHODS), ("value", VALUES)):
            chosen = getattr(self, name)
            expect(name, len(set(chosen)) == len(chosen) and set(chosen) <= set(known), f"some of {','.join(known)}, each once")
        expect("compile", self.compile < 2, "0 or 1")
        expect("precision", self.precision in ("auto", "float32", "bfloat16"), "one of auto, float32, bfloat16")
        expect("terminal", self.terminal in ("", *TERMINALS), f"one of {', '.join(TERMINALS)}, or nothing")
        if self.teacher_tokenizer:
            size = int(self.teacher_tokenizer) if self.teacher_tokenizer.isdecimal() else 257
            expect("teacher_tokenizer", size >= 257, "a name or a size of at least 257 (256 bytes and EOS)")
            expect("methods", "kd" not in self.methods, "no kd, which compares two distributions over one vocabulary, beside "
                   "--teacher_tokenizer")
        expect("seed", self.seed + self.seeds < 2 ** 63, "a smaller number")
        expect("train_pairs", self.train_pairs or self.data, "at least 1 on the toy task")
        expect("device", self.device in ("auto", "cpu", "cuda", "mps"), "one of auto, cpu, cuda, mps")
        for who in ("teacher", "student"):
            heads = getattr(self, f"{who}_heads")
            expect(f"{who}_width", getattr(self, f"{who}_width") % heads == 0, f"a multiple of --{who}_heads={heads}")


def parse_args(argv, description=None):
    """Command line -> Config. An option not given takes its default, which may differ with --data."""
    class Parser(argparse.ArgumentParser):
        def error(self, message):
            self.exit(2, f"train.py: {message}; try --help\n")

    parser = Parser(allow_abbrev=False, description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    for f in fields(Config):
        default, with_data = (",".join(d) if f.type is tuple else d for d in (f.default, f.metadata["with_data"]))
        shown = f"default: {default}" + (f", with --data: {with_data}" if with_data != default else "")
        parser.add_argument(f"--{f.name}", type=(lambda s: tuple(s.split(","))) if f.type is tuple else f.type,
                            default=argparse.SUPPRESS, metavar=f.name.upper(), help=f"{f.metadata['help']} ({shown})")
    given = vars(parser.parse_args(argv))
    for name in ("data", "ask", "score", "out", "teacher_init", "student_init"):
        if given.get(name) == "":                                           # an unset shell variable, most likely
            parser.error(f"--{name}: expected a value, got an empty one")
    unused = set(given) - {"ask", "score", "out", "seed", "device"}
    if unused and ("ask" in given or "score" in given):
        parser.error(f"--{min(unused)}: expected only --out, --seed and --device beside --ask and --score")
    for name in sorted(given):
        who, _, size = name.partition("_")
        if size in ("layers", "heads", "width") and f"{who}_init" in given:
            parser.error(f"--{name}: expected none beside --{who}_init, whose checkpoint has its own sizes")
    defaults = {f.name: f.metadata["with_data"] for f in fields(Config)} if given.get("data") else {}
    config = Config(**{**defaults, **given})
    config.check()
    return config


def pick_device(name):
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    elif name == "cuda" and not torch.cuda.is_available() or name == "mps" and not torch.backends.mps.is_available():
        raise UserError(f"--device: expected one this machine has, got {name}")
    return torch.device(name)


def in_bfloat16(precision, device):
    """Whether matrix products are in bfloat16. CUDA is asked only where it is the device."""
    return precision == "bfloat16" or precision == "auto" and device.type == "cuda" and torch.cuda.is_bf16_supported()
