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


def distillation(model, teacher, pairs, device):
    """loss_of for KL distillation. The teacher is read live: its logits are V floats per token, too much to keep."""
    def loss_of(ids):
        tokens, mask = data.collate(both_responses([pairs[i] for i in ids]))
        tokens, mask = tokens.to(device), mask.to(device)
        with torch.no_grad():
            teacher_logits = teacher(tokens)
        return kd_loss(model(tokens), teacher_logits, mask), {}, tokens.numel()
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
    """One model on "val" or "test" -> (metrics, {"reward": of each prompt, "pref_acc": 1, 1/2 or 0 of each pair}).

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
    rows = [data.Row(*row) for row in zip(prompts, responses)]
    return {"reward": None, **{name: x.mean().item() for name, x in each.items()}, "pref_margin": margins.mean().item(),
            "kl": policy_kl(model, ref, rows, config.batch_size, setup.device),
            "length": sum(map(len, responses)) / len(responses)}, each


# ---------------------------------------------------------------------------------------------------------------------------
# The pipeline

def prepare(config, seed, device):
    """Text -> Setup of one seed; how many prompts were cut and pairs dropped is printed, once nothing is left to refuse."""
    sizes = (config.train_pairs, config.val_pairs, config.test_pairs)
    texts = data.split_pairs(data.load_pairs(config.data), *sizes, seed) if config.data else data.toy_splits(*sizes, seed)
    if config.tokenizer:
        tokenizer = data.named_tokenizer(config.tokenizer)
    else:
        tokenizer = data.learn_tokenizer(texts.train, config.vocab_size)
    kept, encoded, lines = [], [], [f"seed {seed}"]
    for name, items in texts._asdict().items():
        text, ids, cut = data.encode(items, tokenizer, config.block_size)
        if not ids:
            raise UserError(f"--block_size: expected room for a prompt and a response ({name}), got {config.block_size}")
        kept.append(text)
        encoded.append(ids)
        what, dropped = "rows" if name == "sft" else "pairs", len(items) - len(ids)
        lines.append(f"  {name}: {len(ids)} of {len(items)} {what}; {cut} with the prompt cut from the left, {dropped} dropped "
                     f"because a response does not fit in {config.block_size} tokens")
    setup = Setup(config, seed, device, tokenizer, data.Splits(*kept), data.Splits(*encoded))
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


def frozen(model):
    """A copy that nothing trains: another object, so that the policy's steps cannot move its own reference."""
    return copy.deepcopy(model).eval().requires_grad_(False)


def run(setup, folder, log_file):
    """One full pipeline of one seed -> (rows of the table, held-out pairs with psi per token).

    Prints as it goes; weights and tokenizer go to `folder`.
    """
    config, seed, device, ids, size = setup.config, setup.seed, setup.device, setup.ids, setup.config.batch_size
    if not config.tokenizer:
        data.save_tokenizer(setup.tokenizer, folder / "tokenizer.tiktoken")

    def train(stage, model, loss_of, n, steps, lr, ref=None, beta=None):
        """Fit and save; with ref and beta, validate against them on the way."""
        def validate():
            return {f"val_{name}": value for name, value in evaluate(model, ref, beta, "val", 1, setup)[0].items()}
        fit(stage, model, loss_of, n, steps, lr, config, seed, log_file, validate if ref else None)
        torch.save({"config": asdict(model.config), "model": model.state_dict()}, weights_file(folder, stage))

    # The teacher: supervised fine-tuning, then DPO on all training pairs.
    sft_rows, all_both = [[row] for row in ids.sft], both_responses(ids.train)
    teacher = new_model("teacher", setup)
    train("teacher-sft", teacher, supervised(teacher, sft_rows, device), len(sft_rows),
          config.teacher_sft_steps, config.teacher_sft_lr)
    teacher_ref = frozen(teacher)
    ref_logps = cached_logps(teacher_ref, all_both, size, device).view(2, -1)                      # (2, all pairs)
    loss_of = preference(teacher, ids.train, ref_logps, config.teacher_beta, device)
    check_start(loss_of, teacher, list(range(len(ids.train)))[:size], torch.zeros(1))
    train("teacher-dpo", teacher, loss_of, len(ids.train), config.teacher_dpo_steps, config.teacher_dpo_lr,
          teacher_ref, config.teacher_beta)
    teacher = frozen(teacher)

    # The student every method starts from, which is also its reference.
    student = new_model("student", setup)
    train("student-sft", student, supervised(student, sft_rows, device), len(sft_rows),
          config.student_sft_steps, config.student_sft_lr)
    ref = frozen(student)
    pairs = ids.train[:config.student_pairs or None]
    both = both_responses(pairs)
    ref_logps = cached_logps(ref, both, size, device).view(2, -1)                                  # (2, pairs)

    models = {"teacher": teacher, "sft": ref}
    rows = [{"method": "teacher", "value": None, "terminal": None}, {"method": "sft", "value": None, "terminal": None}]
    for method, kind in [(m, v) for m in config.methods for v in (config.value if m == "tvkd" else (None,))]:
        policy, lr = copy.deepcopy(student), config.lr if method in ("dpo", "tvkd") else config.distill_lr
        row = {"method": method, "value": kind, "terminal": kind and (config.terminal or DEFAULT_TERMINAL[kind])}
        if method == "bc":
            prompts = [answer.prompt for answer in both]
            answers = [data.Row(*answer) for answer in zip(prompts, sample(teacher, prompts, setup))]
            loss_of = supervised(policy, list(zip(answers[:len(pairs)], answers[len(pairs):])), device)
        elif method == "kd":
            loss_of = distillation(policy, teacher, pairs, device)
        else:
            psi, alpha = None, 0.0
            if method == "tvkd":
                values = cached_values(kind, teacher, teacher_ref, both, config.teacher_beta, size, device)
                psi = cached_psi(values, both, config.gamma, row["terminal"]).sum(-1).float().view(2, -1).to(device)
                alpha = config.alpha
            loss_of = preference(policy, pairs, ref_logps, config.beta, device, psi, alpha)
            first = list(range(len(pairs)))[:size]
            check_start(loss_of, policy, first, torch.zeros(1) if psi is None else alpha * (psi[0] - psi[1])[first])
        train(label(row), policy, loss_of, len(pairs), config.steps, lr, ref, config.beta)
        models[label(row)] = policy
        rows.append(row)

    each = {}
    for row, (name, model) in zip(rows, models.items()):
        origin, beta = (teacher_ref, config.teacher_beta) if name == "teacher" else (ref, config.beta)
        metrics, each[name] = evaluate(model, origin, beta, "test", config.samples, setup)
        row.update(seed=seed, pref_n=len(ids.test), reward_ci=None, vs_dpo=None, vs_dpo_ci=None, **metrics)
        row.update({f"{key}_ci": interval(x.tolist()) for key, x in each[name].items()})
    for row, name in zip(rows, models):
        if "reward" in each.get("dpo", ()) and name != "dpo":
            difference = each[name]["reward"] - each["dpo"]["reward"]       # (prompts,), paired by prompt
            row.update(vs_dpo=difference.mean().item(), vs_dpo_ci=interval(difference.tolist()))

    show_answers([pair.prompt for pair in setup.texts.test[:2]], [pair.prompt for pair in ids.test[:2]], models, setup)
    shown = [psi_of_pairs(kind, teacher, teacher_ref, setup) for kind in config.value if "tvkd" in config.methods]
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
        checkpoint = torch.load(weights_file(folder, stage), map_location=device, weights_only=True)
        model = GPT(GPTConfig(**checkpoint["config"]))
        model.load_weights(checkpoint["model"])
        return frozen(model.to(device))

    try:
        results = json.loads((Path(config.out) / "results.json").read_text(encoding="utf-8"))
        made = Config(**results["config"])
        tokenizer = data.named_tokenizer(made.tokenizer) if made.tokenizer else data.load_tokenizer(folder / "tokenizer.tiktoken")
        labels = [label(row) for row in results["rows"] if row["seed"] == config.seed]
        models = {name: load({"teacher": "teacher-dpo", "sft": "student-sft"}.get(name, name)) for name in labels}
        origins = dict.fromkeys(labels, (models["sft"], made.beta)) | {"teacher": (load("teacher-sft"), made.teacher_beta)}
    except (OSError, ValueError, KeyError, TypeError, RuntimeError) as error:
        raise UserError(f"--out: expected the folder of a finished run with --seed={config.seed}, got {config.out}: "
                        f"{' '.join(str(error).split())[:200]}") from None
    return Setup(made, config.seed, device, tokenizer, None, None), models, origins


def use_run(config, device):
    """--ask and --score."""
    setup, models, origins = load_run(config, device)
    if config.ask:
        ids, room = setup.tokenizer.encode_ordinary(config.ask), setup.config.block_size - 1
        if len(ids) > room:
            raise UserError(f"--ask: expected a prompt of at most {room} tokens, got {len(ids)}")
        show_answers([config.ask], [ids], models, setup)
    if config.score:
        score_pairs(config, setup, models, origins)


def score_pairs(config, setup, models, origins):
    """The pairs of --score -> scores.jsonl in --out: a line a pair, its implicit reward margin under every model.

    A pair with a response that does not fit the context has null margins.
    """
    texts = data.load_pairs(config.score)
    found = [data.encode([pair], setup.tokenizer, setup.config.block_size) for pair in texts]
    encoded, cut = [ids for _, ids, _ in found], sum(cut for _, _, cut in found)
    fits = [pair for pairs in encoded for pair in pairs]
    lines = [{"pair": i, "prompt": text.prompt, "margins": dict.fromkeys(models)} for i, text in enumerate(texts)]
    fitting = [line for line, pairs in zip(lines, encoded) if pairs]
    if not fits:
        raise UserError(f"--score: expected a pair that fits in {setup.config.block_size} tokens in {config.score}, got none")
    print(f"{len(texts)} pairs; {cut} with the prompt cut from the left, {len(texts) - len(fits)} with a response that does not "
          f"fit in {setup.config.block_size} tokens")
    for name, model in models.items():
        margins = cached_margins(model, *origins[name], fits, setup)
        for line, margin in zip(fitting, margins.tolist()):
            line["margins"][name] = margin
        print(f"  {name:<20} mean margin {margins.mean().item():+.3f}, accuracy {is_correct(margins).mean().item():.3f}")
    path = Path(config.out) / "scores.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    print(f"margins in {path}")


# ---------------------------------------------------------------------------------------------------------------------------
# Showing

def show_answers(prompts, ids, models, setup):
    """One sampled answer of every model to each prompt, given as text and as ids, with its true reward on the toy task."""
    answers = {name: sample(model, ids, setup) for name, model in models.items()}
    for i, prompt in enumerate(prompts):
        print(f"\nprompt: {prompt.strip()[-300:]}")
        for name, responses in answers.items():
            text = " ".join(spoken(responses[i], setup.tokenizer).split())
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
