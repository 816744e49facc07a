"""The whole method, end to end, from text to a comparison table.

    python train.py                         the toy task: an exact true reward to judge by
    python train.py --data=FILE.jsonl       real preferences, one pair a line (the layouts: data.parse_pair)
    python train.py --help                  every option
    python train.py --ask=PROMPT            every model of a finished run answers
    python train.py --score=FILE.jsonl      implicit reward margins of other pairs under every model of a finished run

text -> pairs -> token batch and mask (data.py) -> log-probs and values -> psi -> loss (tvkd.py, on models from model.py) -> table

Teacher: supervised fine-tuning, then DPO. Student: supervised fine-tuning; then, from that one student, on the same pairs in the
same order and for the same number of steps, each of --methods:
    bc    behaviour cloning: likelihood of two answers sampled from the teacher for each pair's prompt
    kd    KL(teacher || student) over the vocabulary, on the tokens of the chosen and the rejected response
    dpo   the labels alone; the reference is the student after supervised fine-tuning
    tvkd  the labels and psi, computed once from the teacher and kept
Left out: resuming, several processes, mixed precision.
"""

import argparse
import copy
import json
import math
import os
import sys
import time
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from shutil import get_terminal_size
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch.nn.utils.rnn import pad_sequence

import data
from data import UserError
from model import GPT, GPTConfig, evaluating
from report import interval, label, printable, show_psi, table, write_report
from tvkd import dpo_loss, implicit_value, kd_loss, nll_loss, sequence_logps, shaping, soft_value, token_logps, tvkd_loss

METHODS, VALUES, TERMINALS = ("bc", "kd", "dpo", "tvkd"), ("implicit", "logits"), ("zero", "hold", "value")
DEFAULT_TERMINAL = {"implicit": "value", "logits": "hold"}      # logits: the network's output after EOS was never trained


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
    # training
    batch_size: int = option(64, "pairs (two rows each) in a step of every stage; supervised stages take as many rows", 8)
    teacher_sft_steps: int = option(400, "steps of the teacher's supervised fine-tuning", 100)
    teacher_dpo_steps: int = option(94, "steps of the teacher's DPO", 40)
    student_sft_steps: int = option(600, "steps of the student's supervised fine-tuning", 100)
    steps: int = option(60, "steps of every method that trains the student", 20)
    teacher_sft_lr: float = option(3e-3, "learning rate of the teacher's supervised fine-tuning")
    teacher_dpo_lr: float = option(3e-4, "learning rate of the teacher's DPO", 1e-4)
    student_sft_lr: float = option(5e-3, "learning rate of the student's supervised fine-tuning")
    lr: float = option(3e-4, "learning rate of the student in dpo and tvkd", 1e-4)
    distill_lr: float = option(1e-2, "learning rate of the student in bc and kd", 1e-3)
    # measuring
    samples: int = option(4, "sampled responses per held-out prompt, at temperature 1", 1)
    max_new_tokens: int = option(48, "longest sampled response, in tokens", 128)
    log_interval: int = option(20, "steps between two lines of the log", 10)
    eval_interval: int = option(20, "steps between two evaluations on the validation prompts", 20)

    def check(self):
        """Raise UserError naming the first option whose value cannot work."""
        def expect(name, holds, expected):
            if not holds:
                raise UserError(f"--{name}: expected {expected}, got {getattr(self, name)!r}")
        for f in fields(self):
            value = getattr(self, f.name)
            if f.type is int:
                least = 0 if f.name in ("seed", "train_pairs", "student_pairs") else 1
                expect(f.name, value >= least, f"at least {least}")
            if f.type is float:
                expect(f.name, math.isfinite(value) and value >= 0, "a number of at least 0")
                expect(f.name, value > 0 or f.name in ("alpha", "gamma"), "a number above 0")
        for name, known in (("methods", METHODS), ("value", VALUES)):
            chosen = getattr(self, name)
            expect(name, len(set(chosen)) == len(chosen) and set(chosen) <= set(known), f"some of {','.join(known)}, each once")
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


def parse_args(argv):
    """Command line -> Config. An option not given takes its default, which may differ with --data."""
    class Parser(argparse.ArgumentParser):
        def error(self, message):
            self.exit(2, f"train.py: {message}; try --help\n")

    parser = Parser(allow_abbrev=False, description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for f in fields(Config):
        default, with_data = (",".join(d) if f.type is tuple else d for d in (f.default, f.metadata["with_data"]))
        shown = f"default: {default}" + (f", with --data: {with_data}" if with_data != default else "")
        parser.add_argument(f"--{f.name}", type=(lambda s: tuple(s.split(","))) if f.type is tuple else f.type,
                            default=argparse.SUPPRESS, metavar=f.name.upper(), help=f"{f.metadata['help']} ({shown})")
    given = vars(parser.parse_args(argv))
    for name in ("data", "ask", "score", "out"):
        if given.get(name) == "":                                           # an unset shell variable, most likely
            parser.error(f"--{name}: expected a value, got an empty one")
    unused = set(given) - {"ask", "score", "out", "seed", "device"}
    if unused and ("ask" in given or "score" in given):
        parser.error(f"--{min(unused)}: expected only --out, --seed and --device beside --ask and --score")
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


class Setup(NamedTuple):
    """What a run of one seed works with."""
    config: Config
    seed: int
    device: torch.device
    tokenizer: object           # a tiktoken.Encoding
    texts: data.Splits
    ids: data.Splits            # the same items as ids, in the same order
    teacher_tokenizer: object   # the teacher's own; without --teacher_tokenizer the very same objects
    teacher_ids: data.Splits

    @property
    def teachers(self):
        """The Setup as the teacher reads it."""
        return self._replace(tokenizer=self.teacher_tokenizer, ids=self.teacher_ids)


def read_by(name, setup):
    """The Setup as the model of this name reads it: the teacher may have another tokenizer."""
    return setup.teachers if name == "teacher" else setup


# ---------------------------------------------------------------------------------------------------------------------------
# Scoring. One function for policy, reference and teacher: two code paths would differ at step 0, where the loss must be ln 2.

def score(model, tokens):
    """tokens (B, T+1) -> log-probs of the actions (B, T) in nats."""
    return token_logps(model(tokens), tokens)


def batches(rows, batch_size, device):
    """Rows of ids -> (their indices, tokens, mask), every row once, rows of like length together: less padding."""
    order = sorted(range(len(rows)), key=lambda i: sum(map(len, rows[i])))
    for start in range(0, len(rows), batch_size):
        ids = order[start:start + batch_size]
        tokens, mask = data.collate([rows[i] for i in ids])
        yield ids, tokens.to(device), mask.to(device)


@torch.no_grad()
def cached_logps(model, rows, batch_size, device):
    """Sequence log-probs of all rows, once: (len(rows),) nats. Filled with NaN first, so that a row left out would show."""
    logps = torch.full((len(rows),), float("nan"), device=device)
    with evaluating(model):
        for ids, tokens, mask in batches(rows, batch_size, device):
            logps[ids] = sequence_logps(score(model, tokens), mask)
    return logps


@torch.no_grad()
def cached_values(kind, teacher, teacher_ref, rows, beta, batch_size, device):
    """The teacher's value of every state of every row: a list of float32 tensors, one float per token of the row."""
    values = [None] * len(rows)
    for ids, tokens, mask in batches(rows, batch_size, device):
        if kind == "logits":
            batch = soft_value(teacher(tokens), beta)                                               # (B, T+1)
        else:
            batch = implicit_value(score(teacher, tokens), score(teacher_ref, tokens), mask, beta)
        for i, value in zip(ids, batch.cpu()):
            values[i] = value[:sum(map(len, rows[i]))].clone()                                      # without the padding
    return values


def cached_psi(values, rows, gamma, terminal):
    """psi of every action: values, a list of (tokens,) per row, -> (len(rows), T), 0 outside the response.

    In float64, on the CPU: summed in float32, what should cancel (--terminal=zero) would leave rounding errors behind.
    """
    _, mask = data.collate(rows)                                                                    # (N, T)
    padded = pad_sequence(values, batch_first=True).double()                                        # (N, T+1)
    return shaping(padded, mask, gamma, terminal)


# ---------------------------------------------------------------------------------------------------------------------------
# Training. A stage is a loss_of(ids) -> (loss, metrics to log, tokens in the batch); `fit` minimises any of them.

def fit(stage, model, loss_of, n, steps, lr, config, seed, log_file, validate=None):
    """Minimise loss_of over batches of the indices below n; log to the screen and to log_file, in intervals of `config`.

    AdamW; the learning rate rises over the first tenth of the steps and falls to 0 over the second half. validate() -> metrics
    is called at every eval_interval and must not touch the order of batches, which has a generator of its own.
    """
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, betas=(0.9, 0.95), weight_decay=0.0)
    order = data.epochs(n, config.batch_size, torch.Generator().manual_seed(seed))
    model.train()
    tokens, spent, since = 0, 0.0, time.perf_counter()
    for step in range(1, steps + 1):
        loss, metrics, count = loss_of(next(order).tolist())
        if not loss.isfinite():
            raise FloatingPointError(f"{stage}: loss {loss.item()} at step {step}; expected a finite number, try a lower "
                                     f"learning rate than {lr}")
        for group in optimizer.param_groups:
            group["lr"] = lr * min(1.0, 10 * step / steps, 2 - 2 * (step - 1) / steps)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()

        tokens += count
        validate_now = validate is not None and (step == steps or step % config.eval_interval == 0)
        if not (validate_now or step in (1, steps) or step % config.log_interval == 0):
            continue
        spent += time.perf_counter() - since                                # training alone, without validation
        metrics = {"loss": loss.item(), **metrics, **(validate() if validate_now else {})}
        log_file.write(json.dumps({"seed": seed, "stage": stage, "step": step, **metrics}) + "\n")
        log_file.flush()
        shown = "  ".join(f"{name} {value:.3f}" for name, value in metrics.items() if value is not None)
        left = spent / step * (steps - step)
        print(f"  {stage} {step}/{steps}  {shown}  {tokens / spent:,.0f} tokens/s  {left:.0f} s left", flush=True)
        since = time.perf_counter()


def supervised(model, rows, device):
    """loss_of for SFT and behaviour cloning; rows[i] is a list of Rows of ids, so that an index may stand for several."""
    def loss_of(ids):
        tokens, mask = data.collate([row for i in ids for row in rows[i]])
        return nll_loss(score(model, tokens.to(device)), mask.to(device)), {}, tokens.numel()
    return loss_of


def distillation(model, teacher, pairs, device, loss=kd_loss):
    """loss_of for KL distillation by loss(student logits, teacher logits, mask).

    The teacher is read live: its logits are V floats per token, too much to keep.
    """
    def loss_of(ids):
        tokens, mask = data.collate(both_responses([pairs[i] for i in ids]))
        tokens, mask = tokens.to(device), mask.to(device)
        with torch.no_grad():
            teacher_logits = teacher(tokens)
        return loss(model(tokens), teacher_logits, mask), {}, tokens.numel()
    return loss_of


def preference(model, pairs, ref_logps, beta, device, psi=None, alpha=0.0):
    """loss_of for DPO, and for TVKD where psi is given. ref_logps and psi (summed): (2, len(pairs)), chosen then rejected."""
    def loss_of(ids):
        tokens, mask = data.collate(both_responses([pairs[i] for i in ids]))                       # (2B, T+1), (2B, T)
        logps = sequence_logps(score(model, tokens.to(device)), mask.to(device))                   # (2B,)
        four = (*logps.chunk(2), *ref_logps[:, ids])                                               # four of (B,)
        losses = dpo_loss(*four, beta) if psi is None else tvkd_loss(*four, *psi[:, ids], beta, alpha)
        margins = reward_margins(*four, beta)
        names = ("policy_chosen", "policy_rejected", "ref_chosen", "ref_rejected", "margin", "accuracy")
        metrics = {name: x.mean().item() for name, x in zip(names, (*four, margins, is_correct(margins)))}
        return losses.mean(), metrics, tokens.numel()
    return loss_of


def both_responses(pairs):
    """Pairs -> Rows: all chosen responses, then all rejected ones."""
    return [data.Row(p.prompt, p.chosen) for p in pairs] + [data.Row(p.prompt, p.rejected) for p in pairs]


def reward_margins(policy_chosen, policy_rejected, ref_chosen, ref_rejected, beta):
    """Implicit reward of the chosen minus that of the rejected response, beta times log-ratio each: (B,)."""
    return beta * ((policy_chosen - ref_chosen) - (policy_rejected - ref_rejected)).detach()


def is_correct(margins):
    """1 where the chosen response has the larger implicit reward, 0 where not, 1/2 for a tie: (B,).

    A model against itself ties; a policy at step 1 against cached log-probs does so only up to rounding.
    """
    return (margins > 0) + 0.5 * (margins == 0)


def check_start(loss_of, model, ids, alpha_psi):
    """What must hold before a preference run: policy = reference, so the margin is 0 and the loss known; gradient not zero.

    ids: the pairs to check on; alpha_psi: alpha times (summed psi of the chosen - of the rejected) for each of them, 0 for DPO.
    """
    loss, metrics, _ = loss_of(ids)
    expected = -F.logsigmoid(-alpha_psi).mean().item()
    gradient = torch.stack([g.norm() for g in torch.autograd.grad(loss, list(model.parameters()))]).norm().item()
    print(f"  step 0 check: loss {loss.item():.4f}, expected {expected:.4f}{' = ln 2' if not alpha_psi.any() else ''}; "
          f"margin {metrics['margin']:.1e}, expected 0; gradient norm {gradient:.3f}, expected not 0")
    if abs(loss.item() - expected) > 1e-3 or abs(metrics["margin"]) > 1e-3 or not gradient > 0:
        raise RuntimeError("the step 0 check failed: policy and reference are not the same model, or are scored differently")


# ---------------------------------------------------------------------------------------------------------------------------
# Measuring

@torch.no_grad()
def sample(model, prompts, setup):
    """One response at temperature 1 to each prompt of ids -> list of ids, with EOS where the model ended it."""
    config, eos, responses = setup.config, setup.tokenizer.eot_token, []
    generator = torch.Generator(setup.device).manual_seed(setup.seed)       # its own: the order of batches is not moved by it
    for start in range(0, len(prompts), 4 * config.batch_size):
        batch = prompts[start:start + 4 * config.batch_size]
        for prompt, ids in zip(batch, model.generate(batch, config.max_new_tokens, eos, generator=generator)):
            ended = len(ids) < config.max_new_tokens and len(prompt) + len(ids) < config.block_size
            responses.append(ids + [eos] if ended else ids)
    return responses


def spoken(response, tokenizer):
    """Response ids -> text, without EOS."""
    return tokenizer.decode([token for token in response if token != tokenizer.eot_token])


@torch.no_grad()
def policy_kl(model, ref, rows, batch_size, device):
    """KL(model || ref) in nats per response: summed over the vocabulary and over the states of the model's own responses."""
    total = 0.0
    with evaluating(model):
        for _, tokens, mask in batches(rows, batch_size, device):
            policy, reference = (F.log_softmax(m(tokens)[:, :-1][mask].float(), -1) for m in (model, ref))
            total += (policy.exp() * (policy - reference)).sum().item()
    return total / len(rows)


def cached_margins(model, ref, beta, pairs, setup):
    """Implicit reward margin of every pair under one model, in batches: (len(pairs),)."""
    both, size = both_responses(pairs), setup.config.batch_size
    return reward_margins(*(logps for m in (model, ref) for logps in cached_logps(m, both, size, setup.device).chunk(2)), beta)


def evaluate(model, ref, beta, split, samples, setup):
    """One model on "val" or "test" -> (metrics, {"reward": of each prompt, "pref_acc": 1, 1/2 or 0 of each pair, "true_acc"}).

    pref_acc: whether the implicit reward orders a pair as its label does; true_acc: as the true reward does, where it differs.

    ref and beta: what the model started from and the beta of its implicit reward. `samples` responses to each prompt; the true
    reward is known on the toy task alone.
    """
    pairs, config = getattr(setup.ids, split), setup.config
    margins = cached_margins(model, ref, beta, pairs, setup)
    prompts = [pair.prompt for pair in pairs for _ in range(samples)]
    responses = sample(model, prompts, setup)
    each = {"pref_acc": is_correct(margins)}
    if not config.data:
        asked = [pair.prompt for pair in getattr(setup.texts, split) for _ in range(samples)]
        rewards = [data.reward(prompt, spoken(response, setup.tokenizer)) for prompt, response in zip(asked, responses)]
        each["reward"] = torch.tensor(rewards, dtype=torch.double).view(-1, samples).mean(1)        # (prompts,)
        gaps = [data.reward(p.prompt, p.chosen) - data.reward(p.prompt, p.rejected) for p in getattr(setup.texts, split)]
        gaps = torch.tensor(gaps, device=setup.device)                                              # (pairs,)
        each["true_acc"] = is_correct(margins * gaps.sign())[gaps != 0]                             # (pairs that differ,)
    rows = [data.Row(*row) for row in zip(prompts, responses)]
    means = {name: x.mean().item() for name, x in each.items()}
    return {"reward": None, "true_acc": None, **means, "pref_margin": margins.mean().item(),
            "kl": policy_kl(model, ref, rows, config.batch_size, setup.device),
            "length": sum(map(len, responses)) / len(responses)}, each


# ---------------------------------------------------------------------------------------------------------------------------
# The pipeline

def prepare(config, seed, device):
    """Text -> Setup of one seed; how many prompts were cut and pairs dropped is printed, once nothing is left to refuse."""
    sizes, lines = (config.train_pairs, config.val_pairs, config.test_pairs), [f"seed {seed}"]
    if config.data:
        pairs = data.load_pairs(config.data)
        texts, once = data.split_pairs(pairs, *sizes, seed), set(pairs)
        unused, again = len(pairs) - sum(map(len, texts[1:])), len(pairs) - len(once)
        swapped = sum((prompt, rejected, chosen) in once for prompt, chosen, rejected in once)
        if unused or again or swapped:
            lines.append(f"  {config.data}: {len(pairs)} pairs; {unused} left out by --train_pairs; kept: {again} that repeat "
                         f"another, {swapped} that another contradicts")
    else:
        texts = data.toy_splits(*sizes, seed)
    if config.tokenizer:
        tokenizer = data.named_tokenizer(config.tokenizer)
    else:
        tokenizer = data.learn_tokenizer(texts.train, config.vocab_size)
    own = tokenizer                                         # the teacher's
    if config.teacher_tokenizer.isdecimal():
        own = data.learn_tokenizer(texts.train, int(config.teacher_tokenizer))
    elif config.teacher_tokenizer:
        own = data.named_tokenizer(config.teacher_tokenizer, "teacher_tokenizer")
    kept, encoded, teachers = [], [], []
    for name, items in texts._asdict().items():
        text, ids, cut = data.encode(items, tokenizer, config.block_size)
        teacher_ids = ids
        if own is not tokenizer:                            # what does not fit in both is left out for both
            text, teacher_ids, _ = data.encode(text, own, config.block_size)
            text, ids, cut = data.encode(text, tokenizer, config.block_size)
        if not ids:
            raise UserError(f"--block_size: expected room for a prompt and a response ({name}), got {config.block_size}")
        kept.append(text)
        encoded.append(ids)
        teachers.append(teacher_ids)
        what, dropped = "rows" if name == "sft" else "pairs", len(items) - len(ids)
        lines.append(f"  {name}: {len(ids)} of {len(items)} {what}; {cut} with the prompt cut from the left, {dropped} dropped "
                     f"because a response does not fit in {config.block_size} tokens")
    kept, encoded, teachers = (data.Splits(*part) for part in (kept, encoded, teachers))
    setup = Setup(config, seed, device, tokenizer, kept, encoded, own, teachers)
    if config.student_pairs > len(setup.ids.train):
        raise UserError(f"--student_pairs: expected at most the {len(setup.ids.train)} training pairs, "
                        f"got {config.student_pairs}")
    print("\n".join(lines))
    return setup


def new_model(who, setup):
    config = setup.config
    layers, heads, width = (getattr(config, f"{who}_{size}") for size in ("layers", "heads", "width"))
    torch.manual_seed(setup.seed)                                           # weights depend on nothing that ran before
    model = GPT(GPTConfig(setup.tokenizer.n_vocab, config.block_size, layers, heads, width)).to(setup.device)
    print(f"{who}: {sum(p.numel() for p in model.parameters()):,} parameters")
    return model


def save_model(model, path):
    torch.save({"config": asdict(model.config), "model": model.state_dict()}, path)


def load_model(path, device):
    checkpoint = torch.load(path, map_location=device, weights_only=True)
    model = GPT(GPTConfig(**checkpoint["config"]))
    model.load_weights(checkpoint["model"])
    return model.to(device)


def frozen(model):
    """A copy that nothing trains: another object, so that the policy's steps cannot move its own reference."""
    return copy.deepcopy(model).eval().requires_grad_(False)


def fine_tuned(who, setup, log_file):
    """A new "teacher" or "student" after supervised fine-tuning on the corpus."""
    config, rows = setup.config, [[row] for row in setup.ids.sft]
    model = new_model(who, setup)
    steps, lr = (getattr(config, f"{who}_sft_{name}") for name in ("steps", "lr"))
    fit(f"{who}-sft", model, supervised(model, rows, setup.device), len(rows), steps, lr, config, setup.seed, log_file)
    return model


def dpo_teacher(teacher_ref, setup, log_file, validate=None):
    """The teacher: DPO on all training pairs, from the fine-tuned teacher, which is its reference. validate: model -> metrics."""
    config, pairs = setup.config, setup.ids.train
    teacher = copy.deepcopy(teacher_ref).requires_grad_(True)
    ref_logps = cached_logps(teacher_ref, both_responses(pairs), config.batch_size, setup.device).view(2, -1)   # (2, all pairs)
    loss_of = preference(teacher, pairs, ref_logps, config.teacher_beta, setup.device)
    check_start(loss_of, teacher, list(range(len(pairs)))[:config.batch_size], torch.zeros(1))
    fit("teacher-dpo", teacher, loss_of, len(pairs), config.teacher_dpo_steps, config.teacher_dpo_lr, config, setup.seed,
        log_file, validate and (lambda: validate(teacher)))
    return teacher


def summed_psi(kind, terminal, teacher, teacher_ref, pairs, setup):
    """Sum of psi of each response of `pairs`, the teacher's ids: (2, pairs) float32, all that TVKD reads of the teacher."""
    config, both = setup.config, both_responses(pairs)
    values = cached_values(kind, teacher, teacher_ref, both, config.teacher_beta, config.batch_size, setup.device)
    return cached_psi(values, both, config.gamma, terminal).sum(-1).float().view(2, -1).to(setup.device)


def teacher_answers(teacher, pairs, setup):
    """Rows for behaviour cloning: to each pair two answers that the teacher samples, in the student's tokens."""
    prompts = [row.prompt for row in both_responses(pairs)]
    theirs = [row.prompt for row in both_responses(setup.teacher_ids.train[:len(pairs)])]
    answers = sample(teacher, theirs, setup.teachers)
    if setup.teacher_tokenizer is not setup.tokenizer:
        eos, ended = setup.tokenizer.eot_token, [setup.teacher_tokenizer.eot_token in answer for answer in answers]
        texts = [spoken(answer, setup.teacher_tokenizer) for answer in answers]
        answers = [setup.tokenizer.encode_ordinary(text) + [eos] * end for text, end in zip(texts, ended)]
        answers = [answer[:setup.config.block_size - len(prompt)] for prompt, answer in zip(prompts, answers)]
    rows = [data.Row(*row) for row in zip(prompts, answers)]
    return list(zip(rows[:len(pairs)], rows[len(pairs):]))


def student_loss(method, policy, pairs, ref_logps, setup, teacher=None, psi=None):
    """loss_of for one of METHODS. pairs: the student's; ref_logps (2, pairs); teacher: for bc, kd; psi (2, pairs): for tvkd."""
    config, device = setup.config, setup.device
    if method == "bc":
        return supervised(policy, teacher_answers(teacher, pairs, setup), device)
    if method == "kd":
        return distillation(policy, teacher, pairs, device)
    loss_of = preference(policy, pairs, ref_logps, config.beta, device, psi, config.alpha)
    first = list(range(len(pairs)))[:config.batch_size]
    check_start(loss_of, policy, first, torch.zeros(1) if psi is None else config.alpha * (psi[0] - psi[1])[first])
    return loss_of


def table_row(row, model, origin, beta, setup, split="test"):
    """A row of the table -> (row, {"reward": of each prompt, ...}). origin, beta: what `evaluate` takes as ref and beta."""
    metrics, each = evaluate(model, origin, beta, split, setup.config.samples, setup)
    intervals = {f"{key}_ci": interval(x.tolist()) for key, x in each.items()}
    return {**row, "seed": setup.seed, "pref_n": len(getattr(setup.ids, split)), "reward_ci": None, "true_acc_ci": None,
            "vs_dpo": None, "vs_dpo_ci": None, **metrics, **intervals}, each


def against_dpo(row, rewards, dpo_rewards):
    """The row with its difference to DPO; true rewards (prompts,) of both, paired by prompt."""
    difference = rewards - dpo_rewards
    return {**row, "vs_dpo": difference.mean().item(), "vs_dpo_ci": interval(difference.tolist())}


def run(setup, folder, log_file):
    """One full pipeline of one seed -> (rows of the table, held-out pairs with psi per token).

    Prints as it goes; weights and tokenizers go to `folder`.
    """
    config, seed, device = setup.config, setup.seed, setup.device
    if not config.tokenizer:
        data.save_tokenizer(setup.tokenizer, folder / "tokenizer.tiktoken")
    if config.teacher_tokenizer.isdecimal():
        data.save_tokenizer(setup.teacher_tokenizer, folder / "teacher.tiktoken")

    def validation(origin, beta, setup):
        return lambda model: {f"val_{key}": x for key, x in evaluate(model, origin, beta, "val", 1, setup)[0].items()}

    teacher_ref = frozen(fine_tuned("teacher", setup.teachers, log_file))
    save_model(teacher_ref, folder / "teacher-sft.pt")
    validate = validation(teacher_ref, config.teacher_beta, setup.teachers)
    teacher = frozen(dpo_teacher(teacher_ref, setup.teachers, log_file, validate))
    save_model(teacher, folder / "teacher-dpo.pt")
    # The student every method starts from, which is also its reference.
    ref = frozen(fine_tuned("student", setup, log_file))
    save_model(ref, folder / "student-sft.pt")
    pairs, teacher_pairs = (ids.train[:config.student_pairs or None] for ids in (setup.ids, setup.teacher_ids))
    ref_logps = cached_logps(ref, both_responses(pairs), config.batch_size, device).view(2, -1)    # (2, pairs)

    models = {"teacher": teacher, "sft": ref}
    rows = [{"method": name, "value": None, "terminal": None} for name in models]
    validate = validation(ref, config.beta, setup)
    for method, kind in [(m, v) for m in config.methods for v in (config.value if m == "tvkd" else (None,))]:
        row = {"method": method, "value": kind, "terminal": kind and (config.terminal or DEFAULT_TERMINAL[kind])}
        psi = summed_psi(kind, row["terminal"], teacher, teacher_ref, teacher_pairs, setup.teachers) if kind else None
        policy = copy.deepcopy(ref).requires_grad_(True)
        loss_of = student_loss(method, policy, pairs, ref_logps, setup, teacher, psi)
        lr = config.lr if method in ("dpo", "tvkd") else config.distill_lr
        fit(label(row), policy, loss_of, len(pairs), config.steps, lr, config, seed, log_file, lambda: validate(policy))
        save_model(policy, weights_file(folder, label(row)))
        models[label(row)] = policy
        rows.append(row)

    origins = dict.fromkeys(models, (ref, config.beta)) | {"teacher": (teacher_ref, config.teacher_beta)}
    found = {name: table_row(row, models[name], *origins[name], read_by(name, setup)) for row, name in zip(rows, models)}
    rewards = {name: each.get("reward") for name, (_, each) in found.items()}
    rows = [row if name == "dpo" or rewards.get("dpo") is None else against_dpo(row, rewards[name], rewards["dpo"])
            for name, (row, _) in found.items()]

    some = [[pair.prompt for pair in split.test[:2]] for split in (setup.texts, setup.ids, setup.teacher_ids)]
    show_answers(*some, models, setup)
    shown = [psi_of_pairs(kind, teacher, teacher_ref, setup.teachers) for kind in config.value if "tvkd" in config.methods]
    for of_kind in shown:
        show_psi(of_kind[0], colour=sys.stdout.isatty() and "NO_COLOR" not in os.environ, width=get_terminal_size().columns)
    return rows, sum(shown, [])


# ---------------------------------------------------------------------------------------------------------------------------
# Using a finished run

def weights_file(folder, stage):
    return folder / f"{stage.replace(' ', '-').replace('/', '-')}.pt"


def load_run(config, device):
    """What a run left in --out -> (its Setup without data, models by label, the reference and the beta of each by label)."""
    folder = Path(config.out) / f"seed{config.seed}"

    def load(stage):
        return frozen(load_model(weights_file(folder, stage), device))

    try:
        results = json.loads((Path(config.out) / "results.json").read_text(encoding="utf-8"))
        made = Config(**results["config"])
        tokenizer = data.named_tokenizer(made.tokenizer) if made.tokenizer else data.load_tokenizer(folder / "tokenizer.tiktoken")
        own = tokenizer
        if made.teacher_tokenizer:
            learned = made.teacher_tokenizer.isdecimal()
            own = data.load_tokenizer(folder / "teacher.tiktoken") if learned else data.named_tokenizer(made.teacher_tokenizer)
        labels = [label(row) for row in results["rows"] if row["seed"] == config.seed]
        models = {name: load({"teacher": "teacher-dpo", "sft": "student-sft"}.get(name, name)) for name in labels}
        origins = dict.fromkeys(labels, (models["sft"], made.beta)) | {"teacher": (load("teacher-sft"), made.teacher_beta)}
    except (OSError, ValueError, KeyError, TypeError, RuntimeError) as error:
        raise UserError(f"--out: expected the folder of a finished run with --seed={config.seed}, got {config.out}: "
                        f"{' '.join(str(error).split())[:200]}") from None
    return Setup(made, config.seed, device, tokenizer, None, None, own, None), models, origins


def use_run(config, device):
    """--ask and --score."""
    setup, models, origins = load_run(config, device)
    if config.ask:
        ids = [tokenizer.encode_ordinary(config.ask) for tokenizer in (setup.tokenizer, setup.teacher_tokenizer)]
        longest, room = max(map(len, ids)), setup.config.block_size - 1
        if longest > room:
            raise UserError(f"--ask: expected a prompt of at most {room} tokens, got {longest}")
        show_answers([config.ask], ids[:1], ids[1:], models, setup)
    if config.score:
        score_pairs(config, setup, models, origins)


def score_pairs(config, setup, models, origins):
    """The pairs of --score -> scores.jsonl in --out: a line a pair, its implicit reward margin under every model.

    A pair with a response that does not fit the context has null margins.
    """
    texts, size = data.load_pairs(config.score), setup.config.block_size
    found, of_teacher = ([data.encode([pair], tokenizer, size) for pair in data.progress(texts, "tokenised")]
                         for tokenizer in (setup.tokenizer, setup.teacher_tokenizer))
    lines = [{"pair": i, "prompt": text.prompt, "margins": dict.fromkeys(models)} for i, text in enumerate(texts)]
    fits = [(line, *own, *theirs) for line, (_, own, _), (_, theirs, _) in zip(lines, found, of_teacher) if own and theirs]
    if not fits:
        raise UserError(f"--score: expected a pair that fits in {size} tokens in {config.score}, got none")
    print(f"{len(texts)} pairs; {sum(cut for _, _, cut in found)} with the prompt cut from the left, {len(texts) - len(fits)} "
          f"with a response that does not fit in {size} tokens")
    for name, model in models.items():
        pairs = [theirs if name == "teacher" else own for _, own, theirs in fits]
        margins = cached_margins(model, *origins[name], pairs, setup)
        for (line, _, _), margin in zip(fits, margins.tolist()):
            line["margins"][name] = margin
        print(f"  {name:<20} mean margin {margins.mean().item():+.3f}, accuracy {is_correct(margins).mean().item():.3f}")
    path = Path(config.out) / "scores.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    print(f"margins in {path}")


# ---------------------------------------------------------------------------------------------------------------------------
# Showing

def show_answers(prompts, ids, teacher_ids, models, setup):
    """One sampled answer of every model to each prompt, given as text and as ids, with its true reward on the toy task."""
    answers = {name: sample(model, teacher_ids if name == "teacher" else ids, read_by(name, setup))
               for name, model in models.items()}
    for i, prompt in enumerate(prompts):
        print(f"\nprompt: {prompt.strip()[-300:]}")
        for name, responses in answers.items():
            text = " ".join(spoken(responses[i], read_by(name, setup).tokenizer).split())
            score = "" if setup.config.data else f"  (reward {data.reward(prompt, text):+.1f})"
            print(f"  {name:<20} {printable(text[:300])}{score}")


def psi_of_pairs(kind, teacher, teacher_ref, setup, most=6):
    """The first held-out pairs, token by token -> list of {"prompt", "value", "terminal", "chosen": {...}, "rejected": {...}}.

    Each response: "tokens" as text, "psi" of each, and "values", V(s) of the states from s_p to s_end (one more than tokens).
    """
    config, pairs = setup.config, setup.ids.test[:most]
    terminal, rows = config.terminal or DEFAULT_TERMINAL[kind], both_responses(pairs)
    values = cached_values(kind, teacher, teacher_ref, rows, config.teacher_beta, config.batch_size, setup.device)
    responses = []
    for row, value, psi in zip(rows, values, cached_psi(values, rows, config.gamma, terminal)):
        first, end = len(row.prompt) - 1, len(row.prompt) + len(row.response) - 1               # s_p and s_end
        responses.append({"tokens": [setup.tokenizer.decode([token]) for token in row.response],
                          "psi": psi[first:end].tolist(), "values": value[first:end + 1].tolist()})
    return [{"seed": setup.seed, "prompt": text.prompt, "value": kind, "terminal": terminal, "chosen": chosen,
             "rejected": rejected} for text, chosen, rejected in zip(setup.texts.test, responses, responses[len(pairs):])]


def main(argv=None):
    started, rows, shown = time.perf_counter(), [], []
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")                            # a sampled character must not end a finished run
    try:
        config = parse_args(argv)
        device, out = pick_device(config.device), Path(config.out)
        if config.ask or config.score:
            use_run(config, device)
            return 0
        for seed in range(config.seed, config.seed + config.seeds):
            setup = prepare(config, seed, device)                           # refuses bad data before --out is touched
            folder = out / f"seed{seed}"
            try:
                folder.mkdir(parents=True, exist_ok=True)
                if seed == config.seed:                                     # no earlier run's table beside new weights
                    for name in ("results.json", "report.html", "log.jsonl"):
                        (out / name).unlink(missing_ok=True)
                log_file = open(out / "log.jsonl", "a", encoding="utf-8")
            except OSError as error:
                raise UserError(f"--out: expected a folder that can be written, got {config.out}: {error.strerror}") from None
            with log_file:
                new_rows, new_shown = run(setup, folder, log_file)
            rows, shown = rows + new_rows, shown + new_shown
            made = {"torch": torch.__version__, "device": str(device), "threads": torch.get_num_threads(),
                    "seconds": round(time.perf_counter() - started, 1)}
            results = {"config": asdict(config), "rows": rows, "pairs": shown, "made": made}
            (out / "results.json").write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
            log = (out / "log.jsonl").read_text(encoding="utf-8").splitlines()
            write_report(results, [json.loads(line) for line in log], out / "report.html")
            print(f"\n{table(new_rows)}")
    except UserError as error:
        print(f"train.py: {error}", file=sys.stderr)
        return 2
    except FloatingPointError as error:
        print(f"train.py: {error}", file=sys.stderr)
        return 1
    if config.seeds > 1:
        print(f"\nall seeds\n{table(rows)}")
    print(f"\n{time.perf_counter() - started:.0f} s; rows in {out / 'results.json'}, pairs and curves in {out / 'report.html'}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
