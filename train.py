"""The whole method, end to end, from text to a comparison table.

    python train.py                         the toy task: an exact true reward to judge by
    python train.py --data=FILE.jsonl       real preferences, one pair a line (the layouts: data.parse_pair)
    python train.py --help                  every option

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
import sys
import time
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path

import torch
import torch.nn.functional as F
from torch.nn.utils.rnn import pad_sequence

import data
from data import UserError
from model import GPT, GPTConfig, evaluating
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
    # the loss
    alpha: float = option(1.0, "weight of the teacher's psi in TVKD; 0 is DPO")
    beta: float = option(1.0, "strength of the student's KL penalty, in DPO and TVKD; larger stays closer to the reference", 0.1)
    gamma: float = option(1.0, "discount in psi = gamma V(s') - V(s); below 1, the sum of psi is mostly biased by length")
    value: tuple = option(VALUES, "the teacher's value, a TVKD row each: implicit (from its log-ratios), logits (the paper's form)")
    terminal: str = option("", "potential of the finished response: zero, hold or value; empty: value for implicit, hold for logits")
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
    teacher_sft_steps: int = option(400, "steps of the teacher's supervised fine-tuning", 150)
    teacher_dpo_steps: int = option(94, "steps of the teacher's DPO", 42)
    student_sft_steps: int = option(600, "steps of the student's supervised fine-tuning", 150)
    steps: int = option(60, "steps of every method that trains the student", 42)
    teacher_sft_lr: float = option(3e-3, "learning rate of the teacher's supervised fine-tuning")
    teacher_dpo_lr: float = option(3e-4, "learning rate of the teacher's DPO", 1e-4)
    student_sft_lr: float = option(5e-3, "learning rate of the student's supervised fine-tuning")
    lr: float = option(3e-4, "learning rate of the student in dpo and tvkd", 1e-4)
    distill_lr: float = option(3e-3, "learning rate of the student in bc and kd", 1e-3)
    # measuring
    samples: int = option(4, "sampled responses per held-out prompt, at temperature 1", 1)
    max_new_tokens: int = option(48, "longest sampled response, in tokens", 200)
    log_interval: int = option(20, "steps between two lines of the log", 10)
    eval_interval: int = option(20, "steps between two evaluations on the validation prompts", 42)

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
        for name, known in (("methods", METHODS), ("value", VALUES)):
            expect(name, getattr(self, name) and set(getattr(self, name)) <= set(known), f"some of {','.join(known)}")
        expect("terminal", self.terminal in ("", *TERMINALS), f"one of {', '.join(TERMINALS)}, or nothing")
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
    defaults = {f.name: f.metadata["with_data"] for f in fields(Config)} if given.get("data") else {}
    config = Config(**{**defaults, **given})
    config.check()
    return config


def pick_device(name):
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    return torch.device(name)


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
    with evaluating(teacher), evaluating(teacher_ref):
        for ids, tokens, mask in batches(rows, batch_size, device):
            if kind == "logits":
                batch = soft_value(teacher(tokens), beta)                                           # (B, T+1)
            else:
                batch = implicit_value(score(teacher, tokens), score(teacher_ref, tokens), mask, beta)
            for i, value in zip(ids, batch):
                values[i] = value[:sum(map(len, rows[i]))].clone()                                  # without the padding
    return values


def cached_psi(values, rows, gamma, terminal):
    """psi of every action: values, a list of (tokens,) per row, -> (len(rows), T), 0 outside the response.

    In float64: summed in float32, what should cancel (--terminal=zero) would leave rounding errors behind.
    """
    _, mask = data.collate(rows)                                                                    # (N, T)
    padded = pad_sequence(values, batch_first=True).double()                                        # (N, T+1)
    return shaping(padded, mask.to(padded.device), gamma, terminal)


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
            raise FloatingPointError(f"{stage}: loss {loss.item()} at step {step}; expected a finite number, try a learning rate below {lr}")
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
        print(f"  {stage} {step}/{steps}  {shown}  {tokens / spent:,.0f} tokens/s  {spent / step * (steps - step):.0f} s left", flush=True)
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
        names = ("policy_chosen", "policy_rejected", "ref_chosen", "ref_rejected")
        metrics = {name: logps.mean().item() for name, logps in zip(names, four)}
        return losses.mean(), {**metrics, **margin_metrics(reward_margins(*four, beta))}, tokens.numel()
    return loss_of


def both_responses(pairs):
    """Pairs -> Rows: all chosen responses, then all rejected ones."""
    return [data.Row(p.prompt, p.chosen) for p in pairs] + [data.Row(p.prompt, p.rejected) for p in pairs]


def reward_margins(policy_chosen, policy_rejected, ref_chosen, ref_rejected, beta):
    """Implicit reward of the chosen minus that of the rejected response, beta times log-ratio each: (B,)."""
    return beta * ((policy_chosen - ref_chosen) - (policy_rejected - ref_rejected)).detach()


def margin_metrics(margins):
    """Mean margin; accuracy, the share of pairs with a positive one. A tie counts one half: policy = reference scores 0.5."""
    return {"margin": margins.mean().item(), "accuracy": ((margins > 0).double() + 0.5 * (margins == 0)).mean().item()}


def check_start(loss_of, model, n, alpha_psi):
    """What must hold before a preference run: policy = reference, so the margin is 0 and the loss known; gradient not zero.

    alpha_psi: alpha times (summed psi of the chosen - of the rejected), (pairs,); zeros for DPO, where the loss is ln 2.
    """
    ids = list(range(min(n, 64)))
    loss, metrics, _ = loss_of(ids)
    expected = -F.logsigmoid(-alpha_psi[ids]).mean().item()
    gradient = torch.stack([g.norm() for g in torch.autograd.grad(loss, list(model.parameters()))]).norm().item()
    print(f"  step 0 check: loss {loss.item():.4f}, expected {expected:.4f}{' = ln 2' if not alpha_psi.any() else ''}; "
          f"margin {metrics['margin']:.1e}, expected 0; gradient norm {gradient:.3f}, expected not 0")
    if abs(loss.item() - expected) > 1e-3 or abs(metrics["margin"]) > 1e-3 or not gradient > 0:
        raise RuntimeError("the step 0 check failed: policy and reference are not the same model, or are scored differently")


# ---------------------------------------------------------------------------------------------------------------------------
# Measuring

@torch.no_grad()
def sample(model, prompts, tokenizer, config, seed, device):
    """One response to each prompt of ids -> list of ids, with EOS where the model ended it."""
    generator, eos, responses = torch.Generator(device).manual_seed(seed), tokenizer.eot_token, []
    for start in range(0, len(prompts), 250):
        batch = prompts[start:start + 250]
        for prompt, ids in zip(batch, model.generate(batch, config.max_new_tokens, eos, generator=generator)):
            ended = len(ids) < config.max_new_tokens and len(prompt) + len(ids) < config.block_size
            responses.append(ids + [eos] if ended else ids)
    return responses


@torch.no_grad()
def policy_kl(model, ref, rows, batch_size, device):
    """KL(model || ref) in nats per response: summed over the vocabulary and over the states of the model's own responses."""
    total = 0.0
    with evaluating(model):
        for _, tokens, mask in batches(rows, batch_size, device):
            policy, reference = (F.log_softmax(m(tokens)[:, :-1][mask].float(), -1) for m in (model, ref))
            total += (policy.exp() * (policy - reference)).sum().item()
    return total / len(rows)


def evaluate(model, ref, texts, pairs, config, samples, beta, tokenizer, seed, device):
    """Sampled responses and held-out preferences of one model -> (metrics, true reward per prompt or None).

    texts and pairs: the same held-out Pairs as text and as ids; ref and beta: what the model started from, and its own beta.
    """
    prompts = [pair.prompt for pair in pairs for _ in range(samples)]
    responses = sample(model, prompts, tokenizer, config, seed, device)
    rows = [data.Row(prompt, response) for prompt, response in zip(prompts, responses)]
    metrics, rewards = {"reward": None}, None
    if not config.data:
        spoken = [tokenizer.decode([i for i in response if i != tokenizer.eot_token]) for response in responses]
        rewards = torch.tensor([data.reward(texts[i // samples].prompt, text) for i, text in enumerate(spoken)], dtype=torch.double)
        rewards = rewards.view(-1, samples).mean(1)                                                 # (prompts,)
        metrics["reward"] = rewards.mean().item()
    held_out = both_responses(pairs)
    four = [logps for m in (model, ref) for logps in cached_logps(m, held_out, config.batch_size, device).chunk(2)]
    margins = margin_metrics(reward_margins(*four, beta))
    return {**metrics, "pref_acc": margins["accuracy"], "pref_margin": margins["margin"],
            "kl": policy_kl(model, ref, rows, config.batch_size, device),
            "length": sum(map(len, responses)) / len(responses)}, rewards


def interval(x, t=1.96):
    """Half-width of a 95% interval of the mean of x, or None for fewer than two."""
    return t * x.std().item() / math.sqrt(len(x)) if len(x) > 1 else None


# ---------------------------------------------------------------------------------------------------------------------------
# The pipeline

def prepare(config, seed):
    """Text -> (Splits of text, Splits of ids, tokenizer); what was cut and what was dropped is printed."""
    sizes = (config.train_pairs, config.val_pairs, config.test_pairs)
    texts = data.split_pairs(data.load_pairs(config.data), *sizes, seed) if config.data else data.toy_splits(*sizes, seed)
    tokenizer = data.named_tokenizer(config.tokenizer) if config.tokenizer else data.learn_tokenizer(texts.train, config.vocab_size)
    kept, encoded = [], []
    for name, items in texts._asdict().items():
        text, ids, cut = data.encode(items, tokenizer, config.block_size)
        if not ids:
            raise UserError(f"--block_size: expected room for a prompt and a response of the {name} split, got {config.block_size}")
        kept.append(text)
        encoded.append(ids)
        print(f"  {name}: {len(ids)} {'rows' if name == 'sft' else 'pairs'} of {len(items)}; {cut} with the prompt cut from the left, "
              f"{len(items) - len(ids)} dropped because a response does not fit in {config.block_size} tokens")
    return data.Splits(*kept), data.Splits(*encoded), tokenizer


def frozen(model):
    """A copy that nothing trains: another object, so that the policy's steps cannot move its own reference."""
    return copy.deepcopy(model).eval().requires_grad_(False)


def run(config, seed, folder, log_file, device):
    """One full pipeline of one seed -> rows of the table. Prints as it goes; weights and tokenizer go to `folder`."""
    print(f"seed {seed}: data")
    texts, ids, tokenizer = prepare(config, seed)
    if not config.tokenizer:
        data.save_tokenizer(tokenizer, folder / "tokenizer.tiktoken")

    def new_model(who):
        size = {name: getattr(config, f"{who}_{option}") for name, option in
                (("n_layer", "layers"), ("n_head", "heads"), ("n_embd", "width"))}
        torch.manual_seed(seed)                                         # weights depend on nothing that ran before
        model = GPT(GPTConfig(tokenizer.n_vocab, config.block_size, **size)).to(device)
        print(f"{who}: {sum(p.numel() for p in model.parameters()):,} parameters")
        return model

    def train(stage, model, loss_of, n, steps, lr, ref=None, beta=None):
        """Fit and save; with ref and beta, validate against them on the way."""
        def validate():
            metrics, _ = evaluate(model, ref, texts.val, ids.val, config, 1, beta, tokenizer, seed, device)
            return {f"val_{name}": value for name, value in metrics.items()}
        fit(stage, model, loss_of, n, steps, lr, config, seed, log_file, validate if ref else None)
        name = stage.replace(" ", "-").replace("/", "-")
        torch.save({"config": asdict(model.config), "model": model.state_dict()}, folder / f"{name}.pt")

    sft_rows = [[row] for row in ids.sft]
    teacher = new_model("teacher")
    train("teacher-sft", teacher, supervised(teacher, sft_rows, device), len(sft_rows), config.teacher_sft_steps, config.teacher_sft_lr)
    teacher_ref = frozen(teacher)
    ref_logps = cached_logps(teacher_ref, both_responses(ids.train), config.batch_size, device).view(2, -1)
    loss_of = preference(teacher, ids.train, ref_logps, config.teacher_beta, device)
    check_start(loss_of, teacher, len(ids.train), torch.zeros(len(ids.train)))
    train("teacher-dpo", teacher, loss_of, len(ids.train), config.teacher_dpo_steps, config.teacher_dpo_lr,
          teacher_ref, config.teacher_beta)
    teacher = frozen(teacher)

    student = new_model("student")
    train("student-sft", student, supervised(student, sft_rows, device), len(sft_rows), config.student_sft_steps, config.student_sft_lr)
    ref = frozen(student)
    pairs = ids.train[:config.student_pairs or None]
    both = both_responses(pairs)
    ref_logps = cached_logps(ref, both, config.batch_size, device).view(2, -1)                     # (2, pairs)

    models = {"teacher": teacher, "sft": ref}
    rows = [{"method": "teacher", "value": None, "terminal": None}, {"method": "sft", "value": None, "terminal": None}]
    for method, kind in [(m, v) for m in config.methods for v in (config.value if m == "tvkd" else (None,))]:
        policy, lr = copy.deepcopy(student), config.lr if method in ("dpo", "tvkd") else config.distill_lr
        row = {"method": method, "value": kind, "terminal": kind and (config.terminal or DEFAULT_TERMINAL[kind])}
        if method == "bc":
            prompts = [row.prompt for row in both]
            answers = [data.Row(*row) for row in zip(prompts, sample(teacher, prompts, tokenizer, config, seed, device))]
            loss_of = supervised(policy, list(zip(answers[:len(pairs)], answers[len(pairs):])), device)
        elif method == "kd":
            loss_of = distillation(policy, teacher, pairs, device)
        else:
            psi = torch.zeros(2, len(pairs), device=device)
            if kind:
                values = cached_values(kind, teacher, teacher_ref, both, config.teacher_beta, config.batch_size, device)
                psi = cached_psi(values, both, config.gamma, row["terminal"]).sum(-1).float().view(2, -1)
            loss_of = preference(policy, pairs, ref_logps, config.beta, device, *((psi, config.alpha) if kind else ()))
            check_start(loss_of, policy, len(pairs), config.alpha * (psi[0] - psi[1]).cpu())
        train(label(row), policy, loss_of, len(pairs), config.steps, lr, ref, config.beta)
        models[label(row)] = policy
        rows.append(row)

    rewards = {}
    for row, (name, model) in zip(rows, models.items()):
        origin, beta = (teacher_ref, config.teacher_beta) if name == "teacher" else (ref, config.beta)
        metrics, rewards[name] = evaluate(model, origin, texts.test, ids.test, config, config.samples, beta, tokenizer, seed, device)
        row.update(seed=seed, **metrics, reward_ci=None, vs_dpo=None, vs_dpo_ci=None, pref_n=len(ids.test))
        row["pref_acc_ci"] = 1.96 * math.sqrt(row["pref_acc"] * (1 - row["pref_acc"]) / row["pref_n"])
        if rewards[name] is not None:
            row["reward_ci"] = interval(rewards[name])
    for row, name in zip(rows, models):
        if rewards.get("dpo") is not None and name != "dpo":
            difference = rewards[name] - rewards["dpo"]                 # (prompts,), paired by prompt
            row.update(vs_dpo=difference.mean().item(), vs_dpo_ci=interval(difference))

    show_samples(models, texts, ids, tokenizer, config, seed, device)
    for kind in config.value if "tvkd" in config.methods else ():
        terminal, pair = config.terminal or DEFAULT_TERMINAL[kind], both_responses(ids.test[:1])
        values = cached_values(kind, teacher, teacher_ref, pair, config.teacher_beta, 2, device)
        show_psi(f"{kind}/{terminal}", cached_psi(values, pair, config.gamma, terminal), pair, tokenizer)
    return rows


# ---------------------------------------------------------------------------------------------------------------------------
# Showing

def label(row):
    return row["method"] + (f" {row['value']}/{row['terminal']}" if row["value"] else "")


def show_samples(models, texts, ids, tokenizer, config, seed, device):
    """Two sampled answers per model, to the first two held-out prompts."""
    answers = {name: sample(model, [pair.prompt for pair in ids.test[:2]], tokenizer, config, seed, device)
               for name, model in models.items()}
    for i, pair in enumerate(texts.test[:2]):
        print(f"\nprompt: {pair.prompt.strip()[-300:]}")
        for name, responses in answers.items():
            text = tokenizer.decode([token for token in responses[i] if token != tokenizer.eot_token]).strip()
            score = "" if config.data else f"  (reward {data.reward(pair.prompt, text):+.1f})"
            print(f"  {name:<20} {' '.join(text.split())[:300]}{score}")


def show_psi(name, psi, rows, tokenizer, most=60):
    """psi of each token of a pair: the token, then what the teacher's value gains (+) or loses (-) by it."""
    for which, row, values in zip(("chosen", "rejected"), rows, psi):
        values = values[len(row.prompt) - 1:len(row.prompt) - 1 + len(row.response)].tolist()
        tokens = [tokenizer.decode([token]).strip() or "\u2423" for token in row.response]
        more = f" ... and {len(tokens) - most} more" if len(tokens) > most else ""
        print(f"\npsi per token, {name}, {which} (sum {sum(values):+.2f}):")
        print("  " + " ".join(f"{token}[{value:+.2f}]" for token, value in list(zip(tokens, values))[:most]) + more)


# 97.5% quantiles of Student's t for 1, 2, ... degrees of freedom; 1.96 beyond
T_975 = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.160, 2.145, 2.131, 2.120, 2.110, 2.101,
         2.093, 2.086)


def table(rows):
    """The comparison table as text: one seed's intervals over prompts, or several seeds' intervals over seeds."""
    seeds = sorted({row["seed"] for row in rows})
    names = list(dict.fromkeys(label(row) for row in rows))

    def cell(name, key, digits):
        values = torch.tensor([row[key] for row in rows if label(row) == name and row[key] is not None], dtype=torch.double)
        if not len(values):
            return "-"
        if len(seeds) > 1:
            ci = interval(values, T_975[len(values) - 2] if len(values) - 2 < len(T_975) else 1.96) if len(values) > 1 else None
        else:
            ci = next(row for row in rows if label(row) == name).get(f"{key}_ci")
        sign = "+" if key == "vs_dpo" else ""
        return f"{values.mean().item():{sign}.{digits}f}" + (f" \u00b1 {ci:.{digits}f}" if ci is not None else "")

    lines = [f"{'model':<20} {'true reward':>14} {'minus DPO':>15} {'held-out accuracy':>18} {'KL to reference':>16} {'tokens':>7}"]
    for name in names:
        lines.append(f"{name:<20} {cell(name, 'reward', 2):>14} {cell(name, 'vs_dpo', 2):>15} {cell(name, 'pref_acc', 3):>18} "
                     f"{cell(name, 'kl', 2):>16} {cell(name, 'length', 1):>7}")
    over = f"{len(seeds)} seeds" if len(seeds) > 1 else f"held-out prompts, of one training run (seed {seeds[0]})"
    return "\n".join([*lines, f"\u00b1: 95% interval over {over}; accuracy on n = {rows[0]['pref_n']} held-out pairs. "
                      "KL in nats per response, on the model's own samples; the teacher's and its accuracy against its own reference."])


def main(argv=None):
    started = time.perf_counter()
    try:
        config = parse_args(argv)
        device, out, rows = pick_device(config.device), Path(config.out), []
        try:
            out.mkdir(parents=True, exist_ok=True)
            log_file = open(out / "log.jsonl", "w", encoding="utf-8")
        except OSError as error:
            raise UserError(f"--out: expected a folder that can be written, got {config.out}: {error.strerror}") from None
        with log_file:
            for seed in range(config.seed, config.seed + config.seeds):
                (out / f"seed{seed}").mkdir(exist_ok=True)
                rows += run(config, seed, out / f"seed{seed}", log_file, device)
                seconds = time.perf_counter() - started
                made = {"torch": torch.__version__, "device": str(device), "threads": torch.get_num_threads(), "seconds": round(seconds, 1)}
                text = json.dumps({"config": asdict(config), "rows": rows, "made": made}, indent=1)
                (out / "results.json").write_text(text + "\n", encoding="utf-8")
                print(f"\n{table([row for row in rows if row['seed'] == seed])}")
        if config.seeds > 1:
            print(f"\nall seeds\n{table(rows)}")
        print(f"\n{time.perf_counter() - started:.0f} s; rows in {out / 'results.json'}, curves in {out / 'log.jsonl'}")
        return 0
    except UserError as error:
        print(f"train.py: {error}", file=sys.stderr)
        return 2
    except FloatingPointError as error:
        print(f"train.py: {error}", file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main())
