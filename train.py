"""The whole method, from text to a comparison table.

    python train.py                         the toy task, whose true reward is known
    python train.py --data=FILE.jsonl       your own preferences, one pair a line
    python train.py --help                  every option
    python train.py --ask=PROMPT            every model of a finished run answers
    python train.py --score=FILE.jsonl      scores other pairs under every model of a finished run
    python train.py --export=FOLDER         those models for the transformers library

    torchrun --standalone --nproc_per_node=2 train.py       shares every batch among processes

`experiment` at the end is the method, in the order of the paper's pipeline as we read its abstract:
teacher (fine-tuning, DPO) -> student (fine-tuning) -> the teacher's values, once -> the student
trained by each of METHODS, which differ in the loss alone. `keep(name, f, *args)` returns f(*args),
or what an earlier run kept of the same f and arguments. Everything in harness/ can be skipped.
"""

import harness      # first: it sets how threads wait, which must happen before torch is imported

import copy
import math
import sys
import time
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch.nn.parallel import DistributedDataParallel

import data
from harness.ask import use_run
from harness.evaluate import (HeldOut, Validation, fill, is_correct, measure, psi_of_pairs,
                              reward_margins, sample)
from harness.keep import Keep
from harness.options import in_bfloat16, parse_args, pick_device
from harness.outcome import Outcome, exit_code
from harness.preferences import load_pairs
from harness.processes import is_first, rank_and_world, together
from harness.progress import Progress, ctrl_c_held
from harness.table import Row
from harness.texts import load_task
from harness.weights import pretrained
from model import (GPT, GPTConfig, batches, both_responses, cached_logps, cached_values, device_of,
                   frozen, response_logps, score, summed_psi)
from tvkd import dpo_loss, kd_loss, nll_loss, tvkd_loss

# --------------------------------------------------------------------------------------------------
# Losses. loss(model, ids) reads the examples or pairs of these indices and returns sums over them:
# {"loss", "n": what the mean is over, "tokens", further numbers for the log}. Sums, because the
# shares of a batch in micro-batches and processes add up only if nobody divides too early.

def part_size(rows):
    """How many rows of a batch go through the model at once, sorted by length: same loss, faster.

    As few parts as leave at most a tenth of padding. Never one: what two halves of a batch leave
    in the processor's cache is smaller.
    """
    lengths = sorted(len(row.prompt) + len(row.response) for row in rows)
    for parts in range(2, 9):
        size = math.ceil(len(rows) / parts)
        longest = [lengths[min(i + size, len(rows)) - 1] for i in range(0, len(rows), size)]
        padded = sum(longest) * size - longest[-1] * (-len(rows) % size)
        if sum(lengths) >= 0.9 * padded:
            break
    return size


def tokens_in(rows):
    return sum(len(row.prompt) + len(row.response) for row in rows)


@dataclass(frozen=True, eq=False)
class Likelihood:
    """Mean of -log pi(a|s) per token: supervised fine-tuning, and bc on the teacher's answers."""
    answers: list               # answers[i]: the Examples that stand for index i

    def __len__(self):
        return len(self.answers)

    def __call__(self, model, ids):
        rows, loss, n = [row for i in ids.tolist() for row in self.answers[i]], 0.0, 0
        for _, tokens, mask in batches(rows, part_size(rows), ids.device):
            loss = loss + nll_loss(score(model, tokens, mask), mask) * mask.sum()
            n = n + mask.sum()
        return {"loss": loss, "n": n, "tokens": tokens_in(rows)}


@dataclass(frozen=True, eq=False)
class KD:
    """Mean of KL(teacher || student) per token of both responses.

    The teacher is read in every step: its logits are V floats a token, too many to keep.
    """
    pairs: list
    teacher: GPT

    def __len__(self):
        return len(self.pairs)

    def __call__(self, model, ids):
        rows, loss, n = both_responses([self.pairs[i] for i in ids.tolist()]), 0.0, 0
        for _, tokens, mask in batches(rows, part_size(rows), ids.device):
            with torch.no_grad():
                teacher_logits = self.teacher(tokens)                           # (B, T+1, V)
            loss = loss + kd_loss(model(tokens), teacher_logits, mask) * mask.sum()
            n = n + mask.sum()
        return {"loss": loss, "n": n, "tokens": tokens_in(rows)}


@dataclass(frozen=True, eq=False)
class DPO:
    """The labels alone. ref_logps (2, N): of the chosen and rejected responses, cached."""
    pairs: list
    ref_logps: torch.Tensor
    beta: float

    def __len__(self):
        return len(self.pairs)

    def __call__(self, model, ids):
        both = both_responses([self.pairs[i] for i in ids.tolist()])            # 2B rows
        logps = four_logps(model, both, self.ref_logps[:, ids])                 # four of (B,)
        return with_metrics(dpo_loss(*logps, self.beta), logps, self.beta, both)


@dataclass(frozen=True, eq=False)
class TVKD:
    """The labels, and psi (2, N): summed over each response, all that is read of the teacher."""
    pairs: list
    ref_logps: torch.Tensor
    psi: torch.Tensor
    beta: float
    alpha: float

    def __len__(self):
        return len(self.pairs)

    def __call__(self, model, ids):
        both = both_responses([self.pairs[i] for i in ids.tolist()])            # 2B rows
        logps = four_logps(model, both, self.ref_logps[:, ids])                 # four of (B,)
        losses = tvkd_loss(*logps, *self.psi[:, ids], self.beta, self.alpha)    # (B,)
        return with_metrics(losses, logps, self.beta, both)


def four_logps(model, both, ref_logps):
    """log pi(y_w|x), log pi(y_l|x) of the policy, then of the reference: four of (B,), nats."""
    logps = response_logps(model, both, part_size(both))                        # (2B,)
    return *logps.chunk(2), *ref_logps


def with_metrics(losses, logps, beta, both):
    """Sums over the pairs of a batch. losses (B,), logps: what `four_logps` gives."""
    margins = reward_margins(*logps, beta)
    names = ("loss", "policy_chosen", "policy_rejected", "ref_chosen", "ref_rejected", "margin",
             "accuracy")
    columns = (losses, *logps, margins, is_correct(margins))                    # (B,) each
    sums = {name: x.sum() for name, x in zip(names, columns)}
    return {**sums, "n": len(losses), "tokens": tokens_in(both)}


def ln_2(loss, ids):
    """At step 0 policy = reference: every margin is 0, and -log sigmoid(0) = ln 2."""
    return torch.full((len(ids),), math.log(2))


def psi_alone(loss, ids):
    """At step 0 only the teacher's term is left: -log sigmoid(-alpha (sum psi_w - sum psi_l))."""
    psi_chosen, psi_rejected = loss.psi[:, ids]
    return -F.logsigmoid(-loss.alpha * (psi_chosen - psi_rejected))


# --------------------------------------------------------------------------------------------------
# The methods. To add one, write its loss above and its line here.

@dataclass(frozen=True)
class Method:
    loss: type              # called with the inputs by name
    lr: str                 # which option is its learning rate
    inputs: tuple           # of pairs, ref_logps, beta, alpha, psi, teacher, answers
    start: object = None    # (loss, ids) -> what each pair's loss must be at step 0, if known

    @property
    def needs_teacher(self):
        return bool({"teacher", "answers"} & set(self.inputs))


METHODS = {
    "bc": Method(Likelihood, "distill_lr", ("answers",)),
    "kd": Method(KD, "distill_lr", ("pairs", "teacher")),
    "dpo": Method(DPO, "lr", ("pairs", "ref_logps", "beta"), ln_2),
    "tvkd": Method(TVKD, "lr", ("pairs", "ref_logps", "psi", "beta", "alpha"), psi_alone),
}


# --------------------------------------------------------------------------------------------------
# Training

def fit(start, loss, recipe, seed, expected=None, validate=None, progress=None):
    """Train a copy of `start` on `loss` -> the trained model, frozen.

    recipe: steps, lr, batch_size, micro_batch. AdamW; the learning rate rises over the first tenth
    of the steps and falls to 0 over the second half. expected: a Method's `start`, checked before
    the first step. validate(model) -> metrics, now and then; progress: harness.progress.Progress,
    which logs and saves. Neither changes what is trained: the order of batches has a generator of
    its own. Raises FloatingPointError where loss or gradient is not finite.
    """
    progress = progress or Progress()
    model = copy.deepcopy(start).requires_grad_(True)
    device = device_of(model)
    network = model if rank_and_world()[1] == 1 else DistributedDataParallel(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=recipe.lr, betas=(0.9, 0.95),
                                  weight_decay=0.0, fused=True)
    if expected:
        first = torch.arange(min(len(loss), recipe.micro_batch or recipe.batch_size), device=device)
        check_start(loss, model, first, expected(loss, first))
    order = data.epochs(len(loss), recipe.batch_size, torch.Generator().manual_seed(seed))
    behind = progress.go_on_from(model, optimizer)
    for _ in range(behind):
        next(order)
    model.train()
    with ctrl_c_held(bool(progress.partial)) as interrupted:
        for step in range(behind + 1, recipe.steps + 1):
            ids = next(order)
            optimizer.zero_grad(set_to_none=True)
            total = gradient(model, network, loss, ids.to(device), recipe.micro_batch)
            norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            if not math.isfinite(total["loss"]) or not norm.isfinite():
                # Before the step: no checkpoint may have it in.
                raise FloatingPointError(
                    f"{progress.stage}: loss {total['loss'] / total['n']}, gradient norm "
                    f"{norm.item()} at step {step}; expected finite numbers, try a lower learning "
                    f"rate than {recipe.lr}; batch {ids.tolist()}")
            for group in optimizer.param_groups:
                group["lr"] = recipe.lr * schedule(step, recipe.steps)
            optimizer.step()
            progress.after(step, recipe.steps, total, model, optimizer, validate, interrupted)
    return frozen(model)


def schedule(step, steps):
    """Share of the learning rate at a step from 1 to steps: up in the first tenth, then down."""
    return min(1.0, 10 * step / steps, 2 - 2 * (step - 1) / steps)


def gradient(model, network, loss, ids, micro_batch):
    """Fill .grad of the model for the mean loss of the batch -> the sums of the loss over it.

    network: the model, or what torchrun makes of it. Every process takes its share of the batch in
    micro-batches of unequal numbers of pairs or tokens. Their sums add up to the gradient of the
    whole batch; their means would not.
    """
    rank, world = rank_and_world()
    micro_batches = world * math.ceil(len(ids) / (world * (micro_batch or len(ids))))
    total = 0.0
    for share in ids.tensor_split(micro_batches)[rank::world]:
        # A process without a pair of its own takes one times 0: all must join every exchange.
        sums = loss(network, share if len(share) else ids[:1])
        sums = {name: x * (len(share) > 0) for name, x in sums.items()}
        sums["loss"].backward()
        total = total + torch.stack([torch.as_tensor(x, dtype=torch.float32, device=ids.device)
                                     .detach() for x in sums.values()])
    if world > 1:
        torch.distributed.all_reduce(total)
    total = dict(zip(sums, total.tolist()))
    for parameter in model.parameters():
        parameter.grad *= world / total["n"]        # DistributedDataParallel took the mean
    return total


def check_start(loss, model, ids, expected):
    """What must hold before a preference run: policy = reference, so margin 0 and a known loss.

    expected: the loss of each pair of `ids`, (B,). Raises RuntimeError where it is another one or
    the gradient is 0, FloatingPointError where something is not finite.
    """
    sums, expected = loss(model, ids), expected.mean().item()
    start, margin = sums["loss"] / sums["n"], sums["margin"].item() / sums["n"]
    grads = torch.autograd.grad(start, list(model.parameters()))
    norm, start = torch.stack([grad.norm() for grad in grads]).norm().item(), start.item()
    is_ln_2 = " = ln 2" if abs(expected - math.log(2)) < 1e-6 else ""
    print(f"  step 0 check: loss {start:.4f}, expected {expected:.4f}{is_ln_2}; "
          f"margin {margin:.1e}, expected 0; gradient norm {norm:.3g}, expected not 0")
    if not math.isfinite(start + norm):
        raise FloatingPointError("the step 0 check failed: expected a finite loss and gradient; "
                                 "the weights or psi are not finite")
    # The reference was scored in other batches, so its sums are rounded in another order.
    rounding = (0.2 if model.config.bfloat16 else 1e-3) * max(1.0, loss.beta)
    if abs(margin) > rounding or abs(start - expected) > rounding + 1e-6 * abs(expected):
        raise RuntimeError("the step 0 check failed: policy and reference are not the same model, "
                           "or are scored differently")
    if norm == 0:
        raise RuntimeError("the step 0 check failed: expected a gradient, got 0; "
                           f"beta={loss.beta:g} may be too small for float32")


# --------------------------------------------------------------------------------------------------
# The experiment

BEFORE_METHODS = ("teacher-", "student-", "ref-", "values-")    # what --trust_code=1 keeps


def new_model(who, config, n_vocab, seed, device):
    """The "teacher" or "student" before training: new weights, or those of --WHO_init."""
    layers, heads, width, path = (getattr(config, f"{who}_{name}")
                                  for name in ("layers", "heads", "width", "init"))
    if path:
        model = pretrained(f"--{who}_init", path, n_vocab, config.block_size)
    else:
        torch.manual_seed(seed)         # weights depend on nothing that ran before
        model = GPT(GPTConfig(n_vocab, config.block_size, layers, heads, width))
    model.config.bfloat16 = in_bfloat16(config.precision, device)
    print(f"{who}: {sum(p.numel() for p in model.parameters()):,} parameters")
    return model.to(device)


def train_teacher(config, seed, ids, new_teacher, val, keep):
    """Supervised fine-tuning, then DPO against its own fine-tuned self -> (reference, teacher)."""
    pairs, beta = ids.train, config.teacher_beta
    # Prompts are scored, too: a model that predicts facts learns sooner to copy them.
    corpus = [[data.Example(row.prompt[:1], row.prompt[1:] + row.response)] for row in ids.sft]
    teacher_ref = keep("teacher-sft", fit, new_teacher, Likelihood(corpus),
                       config.recipe("teacher_sft_steps", "teacher_sft_lr"), seed)
    ref_logps = keep("teacher-ref-logps", cached_logps, teacher_ref, both_responses(pairs),
                     config.batch_size).view(2, -1)                             # (2, all pairs)
    teacher = keep("teacher-dpo", fit, teacher_ref, DPO(pairs, ref_logps, beta),
                   config.recipe("teacher_dpo_steps", "teacher_dpo_lr"), seed,
                   expected=ln_2, validate=Validation(teacher_ref, beta, val))
    return teacher_ref, teacher


def teacher_psi(kind, config, pairs, teacher, teacher_ref, keep):
    """Sum of psi over each response, (2, N): all that TVKD reads of the teacher, computed once."""
    if kind == "given":                                     # read with the pairs, from --data
        return torch.tensor([pair.values for pair in pairs]).T.contiguous()
    both = both_responses(pairs)
    values = keep(f"values-{kind}", cached_values, kind, teacher, teacher_ref, both,
                  config.teacher_beta, config.batch_size)   # V of every state, one float a token
    return summed_psi(values, both, config.gamma, config.terminal_of(kind)).view(2, -1)


def teacher_answers(config, seed, pairs, tokenizer, teacher, keep):
    """For bc: two answers that the teacher samples to the prompt of each pair."""
    prompts = [row.prompt for row in both_responses(pairs)]                     # every prompt twice
    sampled = keep("teacher-answers", sample, teacher, prompts, tokenizer.eot_token,
                   config.max_new_tokens, config.batch_size, seed)
    examples = [data.Example(*row) for row in zip(prompts, sampled)]
    return list(zip(examples[:len(pairs)], examples[len(pairs):]))


def experiment(config, seed, task, device, keep):
    """One seed, from pairs to the table -> (rows, models by label, psi of held-out pairs)."""
    texts, ids, tokenizer = task
    pairs = ids.train[:config.student_pairs or None]        # the student's, the first of all
    methods = {name: METHODS[name] for name in config.methods}
    inputs = {name for method in methods.values() for name in method.inputs}
    test = HeldOut(ids.test, texts.test, tokenizer, not config.data, config.samples,
                   config.max_new_tokens, config.batch_size, seed)
    val = replace(test, pairs=ids.val, texts=texts.val, samples=1)
    new_student = new_model("student", config, tokenizer.n_vocab, seed, device)
    rows, models, origins = [], {}, {}                      # origin: the reference and the beta

    # 1. The teacher: supervised fine-tuning, then DPO on all pairs.
    teacher_ref = teacher = None
    if config.value != ("given",) or any(method.needs_teacher for method in methods.values()):
        new_teacher = new_model("teacher", config, tokenizer.n_vocab, seed, device)
        teacher_ref, teacher = train_teacher(config, seed, ids, new_teacher, val, keep)
        rows.append(Row("teacher", seed=seed))
        models["teacher"], origins["teacher"] = teacher, (teacher_ref, config.teacher_beta)

    # 2. The student that every method starts from. It is their reference, too.
    student_ref = keep("student-sft", fit, new_student, Likelihood([[row] for row in ids.sft]),
                       config.recipe("student_sft_steps", "student_sft_lr"), seed)
    ref_logps = keep("ref-logps", cached_logps, student_ref, both_responses(pairs),
                     config.batch_size).view(2, -1)                             # (2, N)
    rows.append(Row("sft", seed=seed))
    models["sft"] = student_ref

    # 3. What the losses read. Of the teacher, TVKD reads psi: two numbers a pair, computed once.
    available = {"pairs": pairs, "ref_logps": ref_logps, "teacher": teacher,
                 "beta": config.beta, "alpha": config.alpha}
    if "answers" in inputs:
        available["answers"] = teacher_answers(config, seed, pairs, tokenizer, teacher, keep)
    kinds = config.value if "psi" in inputs else ()
    psi = {kind: teacher_psi(kind, config, pairs, teacher, teacher_ref, keep).to(device)
           for kind in kinds}                                                   # (2, N) each

    # 4. Same start, same pairs, same order, same number of steps: only the loss differs.
    for name, method in methods.items():
        for kind in kinds if "psi" in method.inputs else (None,):
            row = Row(name, kind, kind and config.terminal_of(kind), seed)
            available["psi"] = psi.get(kind)
            loss = method.loss(**{field: available[field] for field in method.inputs})
            models[row.label] = keep(row.label, fit, student_ref, loss,
                                     config.recipe("steps", method.lr), seed, expected=method.start,
                                     validate=Validation(student_ref, config.beta, val))
            rows.append(row)

    # 5. The table: every model on the same held-out prompts. One process is enough.
    if not is_first():
        return [], {}, []
    measured = {}
    for row in rows:
        origin = origins.get(row.label, (student_ref, config.beta))
        measured[row.label] = keep(f"{row.label}.row", measure, models[row.label], *origin, test,
                                   together=False)
    fill(rows, measured)
    psi_shown = [keep(f"{row.label}.psi", psi_of_pairs, row.value, row.terminal, config.gamma,
                      teacher, teacher_ref, config.teacher_beta, models[row.label], student_ref,
                      config.beta, test, together=False)
                 for row in rows if row.value in ("implicit", "logits")]
    return rows, models, psi_shown


def main(argv=None):
    return exit_code(run, argv)


def run(argv):
    """The command line: use a finished run, or `experiment` for every seed and save the table."""
    started = time.perf_counter()
    config = parse_args(argv, METHODS, __doc__)
    device = pick_device(config.device)
    if config.ask or config.score or config.export:
        use_run(config, device)
        return
    with together(device) as device:
        # Read once: a file that changes between two seeds must not be mixed.
        pairs = load_pairs(config.data, "given" in config.value) if config.data else None
        trusted = BEFORE_METHODS if config.trust_code else ()
        keep = Keep(config.out, device, config.intervals(), trusted)
        outcome = Outcome(config, keep, started)
        for seed in range(config.seed, config.seed + config.seeds):
            keep.seed = seed
            task = load_task(config, seed, pairs)
            outcome.add(task, *experiment(config, seed, task, device, keep))
        outcome.finish()


if __name__ == "__main__":
    sys.exit(main())
