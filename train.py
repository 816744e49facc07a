"""The whole method, from text to a comparison table.

    python train.py                         the toy task, whose true reward is known
    python train.py --data=FILE             your own preferences
    python train.py --ask=PROMPT            every model of a finished run answers
    python train.py --help                  every option: alpha (below 0: plus psi), value, sizes
    torchrun --standalone --nproc_per_node=2 train.py       shares every batch among processes

Read `experiment` first: it is the method section. Then the losses and `fit`. From harness/ come

    gradient        the gradient of a batch, in parts that two threads or several processes share
    Progress        prints and logs the steps of `fit`, and resumes an interrupted one
    keep            keep(name, f, *args) is f(*args), or what an earlier run kept of the same
    new_model       a model with new weights, or those of a file
    all_pair_logps, sample              log-probs of many pairs, answers to many prompts
    HeldOut, Validation, is_correct     accuracy and more, on held-out pairs or a batch
    command_line    options, seeds, the table; or the use of a finished run
"""

import harness      # first: it sets how threads wait, which must happen before torch is imported

import copy
import math
import sys
from dataclasses import dataclass, fields
from functools import cached_property

import torch
import torch.nn.functional as F

from data import Example, shuffled_batches
from harness.errors import CheckFailed
from harness.command import command_line, new_model
from harness.evaluate import HeldOut, Validation, all_pair_logps, is_correct, sample
from harness.progress import Progress
from harness.steps import gradient
from model import (GPT, batches, both_responses, device_of, frozen_copy, pair_logps,
                   response_logps, state_values, summed_psi)
from tvkd import dpo_loss, kd_loss, nll_loss, tvkd_loss

# --------------------------------------------------------------------------------------------------
# Losses. loss(model, ids) reads the rows of a few indices and returns sums over them: {"loss", "n":
# the number of tokens or pairs, further numbers for the log}. Sums, because a batch may be cut into
# parts of unequal size: `gradient` divides by n at the end. lengths[i]: how many tokens each row
# has that index i reads.

@dataclass(frozen=True, eq=False)
class Likelihood:
    """-log pi(a|s), a mean over tokens: supervised fine-tuning, and bc on the teacher's answers."""
    answers: list               # answers[i]: the Examples trained on when index i is drawn

    @cached_property
    def lengths(self):
        return [[len(row.prompt) + len(row.response) for row in rows] for rows in self.answers]

    def __call__(self, model, ids):
        rows, loss = [row for i in ids for row in self.answers[i]], 0
        for _, tokens, mask in batches(rows, len(ids), device_of(model)):
            loss = loss + nll_loss(response_logps(model, tokens, mask), mask) * mask.sum()
        return {"loss": loss, "n": sum(len(row.response) for row in rows)}


@dataclass(frozen=True, eq=False)
class OfPairs:
    """What the losses of pairs share."""
    pairs: list

    @cached_property
    def lengths(self):
        return [[len(pair.prompt) + len(y) for y in (pair.chosen, pair.rejected)]
                for pair in self.pairs]


@dataclass(frozen=True, eq=False)
class KD(OfPairs):
    """KL(teacher || student), a mean over the tokens of both responses."""
    teacher: GPT

    def __call__(self, model, ids):
        rows, loss = both_responses([self.pairs[i] for i in ids]), 0
        for _, tokens, mask in batches(rows, len(ids), device_of(model)):
            with torch.no_grad():       # in every step: V floats a token are too many to keep
                teacher_logits = self.teacher(tokens)                           # (B, T+1, V)
            loss = loss + kd_loss(model(tokens), teacher_logits, mask) * mask.sum()
        return {"loss": loss, "n": sum(len(row.response) for row in rows)}


@dataclass(frozen=True, eq=False)
class DPO(OfPairs):
    """Only the labels. ref_logps (2, N): log pi_ref(y|x) of chosen and rejected, computed once."""
    ref_logps: torch.Tensor
    beta: float

    def losses(self, logps, ids):
        """logps (2, B): log pi(y|x) of the chosen and the rejected responses -> (B,) nats."""
        return dpo_loss(*logps, *self.ref_logps[:, ids], self.beta)

    def at_start(self, ids):
        """What `losses` must be while the policy is still the reference: -log sigmoid(0) = ln 2."""
        return torch.full((len(ids),), math.log(2))

    def __call__(self, model, ids):
        logps = pair_logps(model, [self.pairs[i] for i in ids])                 # (2, B)
        ref = self.ref_logps[:, ids]                                            # (2, B)
        chosen, rejected = (logps - ref).detach()                               # log-ratios (B,)
        margins = self.beta * (chosen - rejected)
        return {"loss": self.losses(logps, ids).sum(), "n": len(ids),
                "policy_chosen": logps[0].sum(), "policy_rejected": logps[1].sum(),
                "ref_chosen": ref[0].sum(), "ref_rejected": ref[1].sum(),
                "margin": margins.sum(), "accuracy": is_correct(margins).sum()}


@dataclass(frozen=True, eq=False)
class TVKD(DPO):
    """The labels and psi (2, N), summed over each response: all that it uses of the teacher."""
    psi: torch.Tensor
    alpha: float

    def losses(self, logps, ids):
        ref, psi = self.ref_logps[:, ids], self.psi[:, ids]                     # (2, B) each
        return tvkd_loss(*logps, *ref, *psi, self.beta, self.alpha)

    def at_start(self, ids):
        """Only the teacher's term is left: -log sigmoid(-alpha (sum psi_w - sum psi_l))."""
        psi_chosen, psi_rejected = self.psi[:, ids]
        return -F.logsigmoid(-self.alpha * (psi_chosen - psi_rejected))


@dataclass(frozen=True, eq=False)
class SoftDPO(DPO):
    """DPO whose label is the teacher's probability that the chosen response is the better one."""
    psi: torch.Tensor

    def losses(self, logps, ids):
        (chosen, rejected), (ref_chosen, ref_rejected) = logps, self.ref_logps[:, ids]
        p = (self.psi[0, ids] - self.psi[1, ids]).sigmoid()                     # (B,)
        as_labelled = dpo_loss(chosen, rejected, ref_chosen, ref_rejected, self.beta)
        flipped = dpo_loss(rejected, chosen, ref_rejected, ref_chosen, self.beta)
        return p * as_labelled + (1 - p) * flipped


# The methods: a loss, whose fields are the `inputs` of `experiment` it reads, and the option of
# its learning rate. To add one: its class above, its line here, a new input in `experiment`.
METHODS = {
    "bc": (Likelihood, "distill_lr"),
    "kd": (KD, "distill_lr"),
    "dpo": (DPO, "lr"),
    "tvkd": (TVKD, "lr"),
    "soft": (SoftDPO, "lr"),
}


# --------------------------------------------------------------------------------------------------

def fit(start, loss, recipe, seed, validate=None, progress=None):
    """Train a copy of `start` on `loss` -> the trained model, frozen.

    recipe: steps, lr, batch_size, micro_batch. validate(model) -> metrics, now and then. progress
    reports, and knows how far an interrupted run came. Neither of them affects training.
    """
    progress = progress or Progress()
    model = copy.deepcopy(start).requires_grad_(True)
    optimizer = torch.optim.AdamW(model.parameters(), lr=recipe.lr, betas=(0.9, 0.95),
                                  weight_decay=0.0, fused=True)
    order = shuffled_batches(len(loss.lengths), recipe.batch_size,
                             torch.Generator().manual_seed(seed))
    steps_done = progress.begin(model, optimizer, recipe, validate)
    for step, ids in zip(range(1, recipe.steps + 1), order):
        if step <= steps_done:
            continue
        for group in optimizer.param_groups:
            group["lr"] = recipe.lr * schedule(step, recipe.steps)
        sums = gradient(model, loss, ids.tolist(), recipe.micro_batch)          # fills .grad
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0).item()
        progress.check_finite(step, sums, norm)
        if step == 1 and hasattr(loss, "at_start"):
            check_start(model, loss, sums, norm, loss.at_start(ids.tolist()).mean().item())
        optimizer.step()
        progress.after(step, sums)
    return model.requires_grad_(False)


def schedule(step, steps):
    """Factor of the learning rate: up in the first tenth, 1, then down to 2/steps from half on."""
    return min(1.0, 10 * step / steps, 2 - 2 * (step - 1) / steps)


def check_start(model, loss, sums, norm, expected):
    """Before the first step policy = reference, so the loss is known. Raises CheckFailed."""
    start = sums["loss"] / sums["n"]
    print(f"  first batch: loss {start:.4f}, expected {expected:.4f}; gradient norm {norm:.3g}")
    # The reference was scored in other batches: its sums were rounded in another order.
    nats = max(abs(sums["ref_chosen"]), abs(sums["ref_rejected"])) / sums["n"]
    rounding = max(1.0, loss.beta) * (0.2 if model.config.bfloat16 else 1e-3 + 2e-6 * nats)
    if abs(start - expected) > rounding + 1e-6 * abs(expected):
        raise CheckFailed(f"first batch: loss {start:.6g}, expected {expected:.6g}: policy and "
                          "reference are not scored alike")
    if norm == 0:
        raise CheckFailed(f"first batch: gradient 0 at a loss of {start:.3g}, where the sigmoid is "
                          "flat; scale the teacher's values down, lower --alpha, or raise --beta")


# --------------------------------------------------------------------------------------------------
# The experiment

def train_teacher(config, seed, task, device, val, keep):
    """Supervised fine-tuning, then DPO against its own fine-tuned self -> (reference, teacher)."""
    new, beta = new_model("teacher", config, task, seed, device), config.teacher_beta
    if config.teacher:                  # it comes DPO-trained, and --teacher_init is its reference
        given = new_model("teacher", config, task, seed, device, config.teacher)
        return keep("teacher-sft", frozen_copy, new), keep("teacher-dpo", frozen_copy, given)
    # The teacher is trained on the prompts as well, which makes it learn sooner to copy facts.
    corpus = [[Example(row.prompt[:1], row.prompt[1:] + row.response)] for row in task.ids.sft]
    teacher_ref = keep.train("teacher-sft", fit, new, Likelihood(corpus),
                             config.recipe("teacher_sft_steps", "teacher_sft_lr"), seed)
    pairs = task.ids.train
    ref_logps = keep("teacher-ref-logps", all_pair_logps, teacher_ref, pairs, config.batch_size)
    teacher = keep.train("teacher-dpo", fit, teacher_ref, DPO(pairs, ref_logps, beta),
                         config.recipe("teacher_dpo_steps", "teacher_dpo_lr"), seed,
                         Validation(teacher_ref, beta, val))
    return teacher_ref, teacher


def teacher_psi(kind, config, pairs, teacher, teacher_ref, keep):
    """psi summed over each response, (2, N): all that TVKD uses of the teacher."""
    if kind == "given":                                     # read with the pairs, from --data
        return torch.tensor([pair.values for pair in pairs]).T.contiguous()
    both = both_responses(pairs)
    values = keep(f"values-{kind}", state_values, kind, teacher, teacher_ref, both,
                  config.teacher_beta, config.batch_size)   # V of every state, one float a token
    return summed_psi(values, both, config.gamma, config.terminal_of(kind)).view(2, -1)


def teacher_answers(config, seed, pairs, task, teacher, keep):
    """For bc: two answers that the teacher samples to the prompt of each pair."""
    prompts = [pair.prompt for pair in pairs] * 2
    sampled = keep("teacher-answers", sample, teacher, prompts, task.tokenizer.eot_token,
                   config.max_new_tokens, seed)
    rows = [Example(*row) for row in zip(prompts, sampled)]
    return list(zip(rows[:len(pairs)], rows[len(pairs):]))


def experiment(config, seed, task, device, keep):
    """The whole method for one seed -> {label: (model, its reference, its beta)}."""
    pairs = task.ids.train[:config.student_pairs or None]   # the student's: the first N of all
    reads = {name: {field.name for field in fields(loss)} for name, (loss, _) in METHODS.items()}
    needed = set().union(*map(reads.get, config.methods))
    val = HeldOut.of(task, "val", config, seed)
    new_student, models = new_model("student", config, task, seed, device), {}

    # 1. The teacher: supervised fine-tuning, then DPO on all pairs.
    teacher = teacher_ref = None
    if config.value != ("given",) or needed & {"teacher", "answers"}:
        teacher_ref, teacher = train_teacher(config, seed, task, device, val, keep)
        models["teacher"] = teacher, teacher_ref, config.teacher_beta

    # 2. The student that every method starts from. It is their reference, too.
    student_ref = keep.train("student-sft", fit, new_student,
                             Likelihood([[row] for row in task.ids.sft]),
                             config.recipe("student_sft_steps", "student_sft_lr"), seed)
    ref_logps = keep("ref-logps", all_pair_logps, student_ref, pairs, config.batch_size)  # (2, N)
    models["sft"] = student_ref, student_ref, config.beta

    # 3. What the losses read. TVKD uses one number per response of the teacher, computed here.
    inputs = {"pairs": pairs, "ref_logps": ref_logps, "teacher": teacher, "beta": config.beta,
              "alpha": config.alpha}
    if "answers" in needed:
        inputs["answers"] = teacher_answers(config, seed, pairs, task, teacher, keep)
    psi = {kind: teacher_psi(kind, config, pairs, teacher, teacher_ref, keep).to(device)
           for kind in config.value if "psi" in needed}                         # (2, N) each

    # 4. Same start, prompts, order and number of steps; the loss differs, and for bc, kd the rate.
    for name in config.methods:
        loss_class, lr = METHODS[name]
        for kind in psi if "psi" in reads[name] else [None]:
            label = name if kind is None else f"{name} {kind}/{config.terminal_of(kind)}"
            inputs["psi"] = psi.get(kind)
            loss = loss_class(**{field: inputs[field] for field in reads[name]})
            student = keep.train(label, fit, student_ref, loss, config.recipe("steps", lr), seed,
                                 Validation(student_ref, config.beta, val))
            models[label] = student, student_ref, config.beta
    return models


def main(argv=None):
    return command_line(argv, experiment, METHODS, __doc__)


if __name__ == "__main__":
    sys.exit(main())
