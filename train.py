"""The whole method, from text to a comparison table.

    python train.py                         the toy task, whose true reward is known
    python train.py --data=FILE.jsonl       your own preferences, one pair a line
    python train.py --help                  every option
    python train.py --ask=PROMPT            every model of a finished run answers
    python train.py --score=FILE.jsonl      scores other pairs under every model of a finished run
    python train.py --export=FOLDER         those models for the transformers library

    torchrun --standalone --nproc_per_node=2 train.py       shares every batch among processes

`experiment` near the end is the method: train the teacher (fine-tuning, DPO), fine-tune the
student, compute the teacher's values once, then train the student by each of METHODS. They differ
in the loss and, for bc and kd, in the learning rate. `keep(name, f, *args)` returns f(*args), or
what an earlier run kept of the same f and arguments. Everything in harness/ can be skipped.
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
from harness.evaluate import (HeldOut, Validation, fill, is_correct, measure, pair_logps,
                              psi_of_pairs, reward_margins, sample)
from harness.keep import Keep, refuse_inside
from harness.options import in_bfloat16, parse_args, pick_device
from harness.outcome import Outcome, exit_code
from harness.preferences import load_pairs
from harness.processes import is_first, rank_and_world, joined_processes, two_at_once, two_halves
from harness.progress import Progress, ctrl_c_held
from harness.table import Row
from harness.texts import load_task
from harness.weights import pretrained
from model import (GPT, GPTConfig, batches, both_responses, state_values, device_of, frozen_copy,
                   part_size, rows_logps_with_grad, response_logps, summed_psi, tokens_in)
from tvkd import dpo_loss, kd_loss, nll_loss, tvkd_loss

# --------------------------------------------------------------------------------------------------
# Losses. loss(model, ids) takes a batch of indices and returns sums over it: {"loss", "n": the
# number of tokens or pairs, "tokens": all tokens read, further numbers for the log}. Sums, because
# micro-batches have different sizes: we divide by n once, at the end. Two threads call it at once.
# len(loss) is the number of indices; rows(a list of them) gives the Examples that it reads.

@dataclass(frozen=True, eq=False)
class Likelihood:
    """-log pi(a|s), a mean over tokens: supervised fine-tuning, and bc on the teacher's answers."""
    answers: list               # answers[i]: the Examples trained on when index i is drawn

    def __len__(self):
        return len(self.answers)

    def rows(self, ids):
        return [row for i in ids for row in self.answers[i]]

    def __call__(self, model, ids):
        rows, loss = self.rows(ids.tolist()), 0
        for _, tokens, mask in batches(rows, part_size(rows), ids.device):
            # The mean over tokens times their number: back to a sum.
            loss = loss + nll_loss(response_logps(model, tokens, mask), mask) * mask.sum()
        return {"loss": loss, "n": sum(len(r.response) for r in rows), "tokens": tokens_in(rows)}


@dataclass(frozen=True, eq=False)
class OfPairs:
    """What all losses of pairs share."""
    pairs: list

    def __len__(self):
        return len(self.pairs)

    def rows(self, ids):
        return both_responses([self.pairs[i] for i in ids])             # B chosen, B rejected


@dataclass(frozen=True, eq=False)
class KD(OfPairs):
    """KL(teacher || student), a mean over the tokens of both responses."""
    teacher: GPT

    def __call__(self, model, ids):
        rows, loss = self.rows(ids.tolist()), 0
        for _, tokens, mask in batches(rows, part_size(rows), ids.device):
            with torch.no_grad():       # in every step: V floats a token are too many to keep
                teacher_logits = self.teacher(tokens)                           # (B, T+1, V)
            loss = loss + kd_loss(model(tokens), teacher_logits, mask) * mask.sum()
        return {"loss": loss, "n": sum(len(r.response) for r in rows), "tokens": tokens_in(rows)}


@dataclass(frozen=True, eq=False)
class DPO(OfPairs):
    """Only the labels. ref_logps (2, N): of the chosen and the rejected responses, cached."""
    ref_logps: torch.Tensor
    beta: float

    def __call__(self, model, ids):
        both = self.rows(ids.tolist())                                  # B chosen, B rejected
        logps = four_logps(model, both, self.ref_logps[:, ids])                 # four of (B,)
        return with_metrics(dpo_loss(*logps, self.beta), logps, self.beta, both)


@dataclass(frozen=True, eq=False)
class TVKD(OfPairs):
    """The labels and psi (2, N), summed over each response: all that it uses of the teacher."""
    ref_logps: torch.Tensor
    psi: torch.Tensor
    beta: float
    alpha: float

    def __call__(self, model, ids):
        both = self.rows(ids.tolist())                                  # B chosen, B rejected
        logps = four_logps(model, both, self.ref_logps[:, ids])                 # four of (B,)
        losses = tvkd_loss(*logps, *self.psi[:, ids], self.beta, self.alpha)    # (B,)
        return with_metrics(losses, logps, self.beta, both)


def four_logps(model, both, ref_logps):
    """log pi(y_w|x), log pi(y_l|x) of the policy, then of the reference: four of (B,), nats."""
    logps = rows_logps_with_grad(model, both, part_size(both))                        # (2B,)
    return *logps.chunk(2), *ref_logps


def with_metrics(losses, logps, beta, both):
    """Sums over the pairs of a batch. losses (B,), logps: what `four_logps` gives."""
    margins = reward_margins(*logps, beta)
    names = ("loss", "policy_chosen", "policy_rejected", "ref_chosen", "ref_rejected", "margin",
             "accuracy")
    columns = (losses, *logps, margins, is_correct(margins))                    # (B,) each
    sums = {name: x.sum() for name, x in zip(names, columns)}
    return {**sums, "n": len(losses), "tokens": tokens_in(both)}


def dpo_loss_at_start(loss, ids):
    """At step 0 policy = reference: every margin is 0, and -log sigmoid(0) = ln 2."""
    return torch.full((len(ids),), math.log(2))


def tvkd_loss_at_start(loss, ids):
    """At step 0 only the teacher's term is left: -log sigmoid(-alpha (sum psi_w - sum psi_l))."""
    psi_chosen, psi_rejected = loss.psi[:, ids]
    return -F.logsigmoid(-loss.alpha * (psi_chosen - psi_rejected))


# --------------------------------------------------------------------------------------------------
# The methods. To add one, write its loss above and its line here.

INPUTS = ("pairs", "ref_logps", "beta", "alpha", "psi", "teacher", "answers")


@dataclass(frozen=True)
class Method:
    loss: type              # called with the inputs by name
    lr: str                 # which option is its learning rate
    inputs: tuple           # any of INPUTS
    loss_at_start: object = None    # (loss, ids) -> what it must be at step 0, of each pair

    def __post_init__(self):        # now, not after the training before it
        if not set(self.inputs) <= set(INPUTS):
            raise ValueError(f"inputs: expected some of {', '.join(INPUTS)}, got {self.inputs}")

    @property
    def needs_teacher(self):        # psi may also come with the pairs (--value=given)
        return bool({"teacher", "answers"} & set(self.inputs))


METHODS = {
    "bc": Method(Likelihood, "distill_lr", ("answers",)),
    "kd": Method(KD, "distill_lr", ("pairs", "teacher")),
    "dpo": Method(DPO, "lr", ("pairs", "ref_logps", "beta"), dpo_loss_at_start),
    "tvkd": Method(TVKD, "lr", ("pairs", "ref_logps", "psi", "beta", "alpha"), tvkd_loss_at_start),
}


# --------------------------------------------------------------------------------------------------
# Training

def fit(start, loss, recipe, seed, loss_at_start=None, validate=None, progress=None):
    """Train a copy of `start` on `loss` -> the trained model, frozen.

    recipe: steps, lr, batch_size, micro_batch. AdamW with the learning rate of `schedule`.
    loss_at_start: a Method's, checked before the first step. validate(model) -> metrics, now and
    then. progress: harness.progress.Progress, which logs and saves; `keep` passes it. Neither of
    the two affects training. Raises FloatingPointError where loss or gradient is not finite.
    """
    progress = progress or Progress()
    model = copy.deepcopy(start).requires_grad_(True)
    device = device_of(model)
    network = model if rank_and_world()[1] == 1 else DistributedDataParallel(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=recipe.lr, betas=(0.9, 0.95),
                                  weight_decay=0.0, fused=True)
    if loss_at_start:
        first = torch.arange(min(len(loss), recipe.micro_batch or recipe.batch_size), device=device)
        check_start(loss, model, first, loss_at_start(loss, first))
    order = data.shuffled_batches(len(loss), recipe.batch_size, torch.Generator().manual_seed(seed))
    steps_done = progress.go_on_from(model, optimizer)      # 0, unless the stage was interrupted
    for _ in range(steps_done):
        next(order)
    model.train()
    with ctrl_c_held(bool(progress.partial)) as interrupted:
        for step in range(steps_done + 1, recipe.steps + 1):
            ids = next(order)
            optimizer.zero_grad(set_to_none=True)
            total = gradient(model, network, loss, ids.to(device), recipe.micro_batch)
            norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            if not math.isfinite(total["loss"]) or not norm.isfinite():
                # Raised before the step, so that no checkpoint contains it.
                hint = f"a lower learning rate than {recipe.lr}" if step > 1 else \
                    "another start: its weights are not finite or too large"
                raise FloatingPointError(
                    f"{progress.stage}: loss {total['loss'] / total['n']}, gradient norm "
                    f"{norm.item()} at step {step}; expected finite numbers, try {hint}; "
                    f"batch {ids.tolist()}")
            for group in optimizer.param_groups:
                group["lr"] = recipe.lr * schedule(step, recipe.steps)
            optimizer.step()
            progress.after(step, recipe.steps, total, model, optimizer, validate, interrupted)
    return frozen_copy(model)


def schedule(step, steps):
    """Factor of the learning rate: up in the first tenth, 1, then down to 2/steps from half on."""
    return min(1.0, 10 * step / steps, 2 - 2 * (step - 1) / steps)


def gradient(model, network, loss, ids, micro_batch):
    """Fill .grad of the model for the mean loss of the batch -> the sums of the loss over it.

    network: the model, or what torchrun makes of it. The sums over micro-batches of unequal size
    add up to the gradient of the whole batch; their means would not.
    """
    rank, world = rank_and_world()
    micro_batches = world * math.ceil(len(ids) / (world * (micro_batch or len(ids))))
    if micro_batches == 1:      # two halves at once; three would add up in varying order
        halves = two_halves(loss, ids) if torch.get_num_threads() > 1 else [ids]
        sums = two_at_once(add_gradient, halves, ids.device, network, loss, ids)
    else:
        shares = ids.tensor_split(micro_batches)[rank::world]
        sums = [add_gradient(network, loss, ids, share) for share in shares]
    total = torch.stack([torch.stack(list(of_share.values())) for of_share in sums]).sum(0)
    if world > 1:
        torch.distributed.all_reduce(total)
    total = dict(zip(sums[0], total.tolist()))
    for parameter in model.parameters():
        parameter.grad *= world / total["n"]        # the network averaged over the processes
    return total


def add_gradient(network, loss, ids, share):
    """Add the gradient of the sum over `share`, a part of ids -> the sums over it."""
    # A process with no data runs one index with weight 0: the others wait for every process.
    sums = loss(network, share if len(share) else ids[:1])
    sums = {name: torch.as_tensor(x, dtype=torch.float32, device=ids.device) * (len(share) > 0)
            for name, x in sums.items()}
    sums["loss"].backward()
    return {name: x.detach() for name, x in sums.items()}


def check_start(loss, model, ids, expected):
    """What must hold before a preference run: policy = reference, so margin 0 and a known loss.

    expected: the loss of each pair of `ids`, (B,). Raises RuntimeError where it is another one or
    the gradient is 0, FloatingPointError where something is not finite.
    """
    sums = loss(model, ids)
    expected = expected.mean().item()
    start, margin = sums["loss"] / sums["n"], sums["margin"].item() / sums["n"]
    grads = torch.autograd.grad(start, list(model.parameters()))
    norm, start = torch.stack([grad.norm() for grad in grads]).norm().item(), start.item()
    print(f"  step 0 check on {len(ids)} pairs: loss {start:.4f}, expected {expected:.4f}; "
          f"margin {margin:.1e}, expected 0; gradient norm {norm:.3g}, expected not 0")
    if not math.isfinite(start + norm):
        raise FloatingPointError("the step 0 check failed: expected a finite loss and gradient; "
                                 "the weights or psi are not finite")
    # The reference was scored in other batches, so its sums are rounded in another order.
    beta = getattr(loss, "beta", 1.0)
    rounding = (0.2 if model.config.bfloat16 else 1e-3) * max(1.0, beta)
    if abs(margin) > rounding or abs(start - expected) > rounding + 1e-6 * abs(expected):
        raise RuntimeError("the step 0 check failed: policy and reference are not scored alike")
    if norm == 0:
        raise RuntimeError("the step 0 check failed: expected a gradient, got 0; "
                           f"beta={beta:g} may be too small for float32")


# --------------------------------------------------------------------------------------------------
# The experiment

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
    # The teacher is trained on the prompts as well, which makes it learn sooner to copy facts.
    corpus = [[data.Example(row.prompt[:1], row.prompt[1:] + row.response)] for row in ids.sft]
    teacher_ref = keep("teacher-sft", fit, new_teacher, Likelihood(corpus),
                       config.recipe("teacher_sft_steps", "teacher_sft_lr"), seed)
    ref_logps = keep("teacher-ref-logps", pair_logps, teacher_ref, pairs, config.batch_size)
    teacher = keep("teacher-dpo", fit, teacher_ref, DPO(pairs, ref_logps, beta),
                   config.recipe("teacher_dpo_steps", "teacher_dpo_lr"), seed,
                   loss_at_start=dpo_loss_at_start, validate=Validation(teacher_ref, beta, val))
    return teacher_ref, teacher


def teacher_psi(kind, config, pairs, teacher, teacher_ref, keep):
    """psi summed over each response, (2, N): all that TVKD uses of the teacher."""
    if kind == "given":                                     # read with the pairs, from --data
        return torch.tensor([pair.values for pair in pairs]).T.contiguous()
    both = both_responses(pairs)
    values = keep(f"values-{kind}", state_values, kind, teacher, teacher_ref, both,
                  config.teacher_beta, config.batch_size)   # V of every state, one float a token
    return summed_psi(values, both, config.gamma, config.terminal_of(kind)).view(2, -1)


def teacher_answers(config, seed, pairs, tokenizer, teacher, keep):
    """For bc: two answers that the teacher samples to the prompt of each pair."""
    prompts = [row.prompt for row in both_responses(pairs)]                     # every prompt twice
    sampled = keep("teacher-answers", sample, teacher, prompts, tokenizer.eot_token,
                   config.max_new_tokens, seed)
    examples = [data.Example(*row) for row in zip(prompts, sampled)]
    return list(zip(examples[:len(pairs)], examples[len(pairs):]))


def experiment(config, seed, task, device, keep):
    """One seed, from pairs to the table -> (rows, models by label, psi of held-out pairs)."""
    texts, ids, tokenizer = task
    pairs = ids.train[:config.student_pairs or None]        # the student's: the first N of all
    methods = {name: METHODS[name] for name in config.methods}
    inputs = {name for method in methods.values() for name in method.inputs}
    test = HeldOut(ids.test, texts.test, tokenizer, not config.data, config.samples,
                   config.max_new_tokens, config.batch_size, seed)
    val = replace(test, pairs=ids.val, texts=texts.val, samples=1)
    new_student = new_model("student", config, tokenizer.n_vocab, seed, device)
    rows, models, origins = [], {}, {}          # origins: (reference, beta) that differ

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
    ref_logps = keep("ref-logps", pair_logps, student_ref, pairs, config.batch_size)    # (2, N)
    rows.append(Row("sft", seed=seed))
    models["sft"] = student_ref

    # 3. What the losses read. TVKD uses one number per response of the teacher, computed here.
    available = {"pairs": pairs, "ref_logps": ref_logps, "teacher": teacher,
                 "beta": config.beta, "alpha": config.alpha}
    if "answers" in inputs:
        available["answers"] = teacher_answers(config, seed, pairs, tokenizer, teacher, keep)
    kinds = config.value if "psi" in inputs else ()
    psi = {kind: teacher_psi(kind, config, pairs, teacher, teacher_ref, keep).to(device)
           for kind in kinds}                                                   # (2, N) each

    # 4. Same start, same prompts, same order, same number of steps; the loss differs.
    for name, method in methods.items():
        for kind in kinds if "psi" in method.inputs else (None,):
            row = Row(name, kind, kind and config.terminal_of(kind), seed)
            choices = {**available, "psi": psi.get(kind)}
            loss = method.loss(**{field: choices[field] for field in method.inputs})
            models[row.label] = keep(row.label, fit, student_ref, loss,
                                     config.recipe("steps", method.lr), seed,
                                     loss_at_start=method.loss_at_start,
                                     validate=Validation(student_ref, config.beta, val))
            rows.append(row)

    # 5. The table: every model on the same held-out prompts. One process is enough.
    if not is_first():
        return [], {}, []
    fill(rows, {row.label: keep(f"{row.label}.row", measure, models[row.label],
                                *origins.get(row.label, (student_ref, config.beta)), test,
                                alone=True) for row in rows})
    psi_shown = [keep(f"{row.label}.psi", psi_of_pairs, row.value, row.terminal, config.gamma,
                      teacher, teacher_ref, config.teacher_beta, models[row.label], student_ref,
                      config.beta, test, alone=True)
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
    with joined_processes(device) as device:
        for option in ("data", "teacher_init", "student_init"):
            refuse_inside(option, getattr(config, option), config.out)
        # Read once: a file that changes between two seeds must not be mixed.
        pairs = (load_pairs(config.data, "given" in config.value, config.skip_bad)
                 if config.data else None)
        # Beginnings of the names of stages that stay although the code changed.
        trusted = ("teacher-", "student-", "ref-", "values-") if config.trust_code else ()
        keep = Keep(config.out, device, config.intervals(), trusted)
        outcome = Outcome(config, keep, started)
        for seed in range(config.seed, config.seed + config.seeds):
            keep.seed = seed
            task = load_task(config, seed, pairs)
            outcome.add(task, *experiment(config, seed, task, device, keep))
        outcome.finish()


if __name__ == "__main__":
    sys.exit(main())
