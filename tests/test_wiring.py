"""The wiring of train.experiment: which model, which pairs and which option go where.

One run with options that are all different; every test works a part of it out again. `keep` is a
recorder: it computes, keeps nothing and remembers the arguments and the result of each stage.
"""

import json
import math
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

import data
import train
from conftest import close
from harness.evaluate import HeldOut, cached_margins, policy_kl, spoken
from harness.options import Recipe, parse_args
from harness import tokenizers
from harness.progress import Progress
from harness.numbers import interval
from harness.texts import load_task
from model import GPT, both_responses, rows_logps_with_grad, response_logps
from small_run import SMALL
from tvkd import kd_loss, nll_loss

SEED, BETA, TEACHER_BETA, ALPHA, GAMMA = 1, 0.5, 0.25, 1.5, 0.9
# 5 student pairs, so that the first batch of every method is all of them.
OPTIONS = [*SMALL, f"--seed={SEED}", f"--beta={BETA}", f"--teacher_beta={TEACHER_BETA}",
           f"--alpha={ALPHA}", f"--gamma={GAMMA}", "--student_pairs=5", "--teacher_sft_steps=5",
           "--teacher_dpo_steps=6", "--student_sft_steps=7", "--teacher_sft_lr=0.01",
           "--teacher_dpo_lr=0.02", "--student_sft_lr=0.03", "--lr=0.04", "--distill_lr=0.05",
           "--micro_batch=100"]


class Recorder:
    """keep(name, f, *args) -> f(*args). args, results, lines of the log: by the name of a stage."""

    def __init__(self):
        self.args, self.results, self.lines = {}, {}, {}

    def __call__(self, name, f, *args, alone=False, **aside):
        if f is train.fit:
            progress = Progress(name, SEED, log_interval=1, eval_interval=2)
            aside["progress"] = progress
        self.args[name], self.results[name] = args, f(*args, **aside)
        if f is train.fit:
            self.lines[name] = [json.loads(line) for line in progress.lines]
        return self.results[name]


@pytest.fixture(scope="module")
def wired():
    config, keep = parse_args(OPTIONS, train.METHODS), Recorder()
    task = load_task(config, SEED)
    rows, models, _ = train.experiment(config, SEED, task, torch.device("cpu"), keep)
    return SimpleNamespace(config=config, task=task, stages=keep.results, args=keep.args,
                           lines=keep.lines, rows={row.label: row for row in rows}, models=models,
                           pairs=task.ids.train[:5], both=both_responses(task.ids.train[:5]))


def first_batch(rows):
    """The rows of step 1: the order of the batches depends on the seed alone."""
    order = data.shuffled_batches(len(rows), 8, torch.Generator().manual_seed(SEED))
    return [rows[i] for i in next(order)]


def mean_nll(model, rows):
    tokens, mask = data.collate(rows)
    return nll_loss(response_logps(model, tokens, mask), mask).item()


def test_where_each_stage_starts_and_how_it_is_trained(wired):
    """A stage -> start, loss, steps and learning rate; all in batches of 8."""
    expected = {
        "teacher-sft": (None, train.Likelihood, 5, 0.01),
        "teacher-dpo": ("teacher-sft", train.DPO, 6, 0.02),
        "student-sft": (None, train.Likelihood, 7, 0.03),
        "bc": ("student-sft", train.Likelihood, 4, 0.05),
        "kd": ("student-sft", train.KD, 4, 0.05),
        "dpo": ("student-sft", train.DPO, 4, 0.04),
        "tvkd implicit/value": ("student-sft", train.TVKD, 4, 0.04),
        "tvkd logits/hold": ("student-sft", train.TVKD, 4, 0.04),
    }
    assert list(wired.lines) == list(expected)
    for name, (start, loss, steps, lr) in expected.items():
        model, its_loss, recipe, seed = wired.args[name]
        assert start is None or model is wired.stages[start], name
        assert type(its_loss) is loss and seed == SEED
        assert recipe == Recipe(steps, lr, 8, 100) and len(wired.lines[name]) == steps
    assert list(wired.rows) == list(wired.models) == ["teacher", "sft", *list(expected)[3:]]


def test_new_models_and_fine_tuning(wired):
    """New weights are drawn by the run's seed; step 1 of fine-tuning is their mean -log p: of the
    responses for the student, of the prompts as well for the teacher."""
    rows = first_batch(wired.task.ids.sft)
    whole = [data.Example(row.prompt[:1], row.prompt[1:] + row.response) for row in rows]
    for name, width, rows in (("teacher-sft", 16, whole), ("student-sft", 8, rows)):
        start = wired.args[name][0]
        torch.manual_seed(SEED)
        again = GPT(start.config)
        assert start.config.n_embd == width
        assert all(torch.equal(p, q) for p, q in zip(start.parameters(), again.parameters()))
        close(wired.lines[name][0]["loss"], mean_nll(again, rows), 1e-5)


def test_teacher_learns_from_all_pairs_and_the_student_from_its_share(wired):
    """Step 1's mean log-probs: of 8 of the 24 pairs for the teacher, of the student's 5 pairs."""
    for stage, ref, pairs in (("teacher-dpo", "teacher-sft", first_batch(wired.task.ids.train)),
                              ("dpo", "student-sft", wired.pairs)):
        logps = rows_logps_with_grad(wired.stages[ref], both_responses(pairs), 100)
        line = wired.lines[stage][0]
        for name, expected in zip(("chosen", "rejected"), logps.view(2, -1).mean(1)):
            close(line[f"ref_{name}"], expected, 1e-3)
            close(line[f"policy_{name}"], expected, 1e-3)
        close(line["loss"], math.log(2), 1e-4)
    # Every margin is beta times the difference of the log-ratios, with the teacher's own beta.
    for stage, lines in wired.lines.items():
        for line in (line for line in lines if "margin" in line):
            beta = TEACHER_BETA if stage == "teacher-dpo" else BETA
            chosen, rejected = (line[f"policy_{x}"] - line[f"ref_{x}"] for x in
                                ("chosen", "rejected"))
            close(line["margin"], beta * (chosen - rejected), 1e-3)


def test_tvkd_reads_the_teachers_values(wired):
    """At step 1 policy = reference, so the loss is -log sigmoid(-alpha (psi_w - psi_l)).

    implicit: V(s) is teacher_beta times the teacher's log-ratio so far, up to s_end; logits:
    teacher_beta times logsumexp, and "hold" repeats V(s_end-1). psi = gamma V(s') - V(s).
    """
    teacher, ref = wired.stages["teacher-dpo"], wired.stages["teacher-sft"]
    sums = {"tvkd implicit/value": [], "tvkd logits/hold": []}
    for row in wired.both:
        tokens, mask = data.collate([row])
        ratios = (response_logps(teacher, tokens, mask) - response_logps(ref, tokens, mask))[mask]
        implicit = [TEACHER_BETA * ratios[:t].sum().item() for t in range(len(ratios) + 1)]
        soft = TEACHER_BETA * teacher(tokens)[0].logsumexp(-1)
        soft = soft[len(row.prompt) - 1:-1].tolist()                # s_p to s_end-1
        for name, values in (("tvkd implicit/value", implicit), ("tvkd logits/hold",
                                                                 [*soft, soft[-1]])):
            sums[name].append(sum(GAMMA * after - before
                                  for before, after in zip(values, values[1:])))
    for name, psi in sums.items():
        chosen, rejected = torch.tensor(psi).view(2, -1)
        expected = -F.logsigmoid(-ALPHA * (chosen - rejected)).mean()
        close(wired.lines[name][0]["loss"], expected, 1e-4)
        assert abs(expected - math.log(2)) > 1e-3               # or a psi of 0 would pass


def test_bc_and_kd_imitate_the_teacher(wired):
    """bc: -log p of two answers to each prompt, drawn from the teacher at temperature 1 by the
    run's seed. kd: KL(teacher || student) per token of both responses."""
    teacher, student, prompts = wired.models["teacher"], wired.models["sft"], \
        [row.prompt for row in wired.both]
    answers = drawn(teacher, prompts, wired.task.tokenizer.eot_token)
    rows = [data.Example(*row) for row in zip(prompts, answers)]
    assert wired.args["bc"][1].answers == [(rows[i], rows[5 + i]) for i in range(5)]
    close(wired.lines["bc"][0]["loss"], mean_nll(student, rows), 1e-4)
    tokens, mask = data.collate(wired.both)
    close(wired.lines["kd"][0]["loss"], kd_loss(student(tokens), teacher(tokens), mask), 1e-4)


def drawn(model, prompts, eos):
    """At most 12 tokens to each prompt at temperature 1, and EOS where the model ended there. The
    second half of the prompts has a generator of its own: the seed plus its first index."""
    answers, half = [], math.ceil(len(prompts) / 2)
    for start, group in ((0, prompts[:half]), (half, prompts[half:])):
        generator = torch.Generator().manual_seed(SEED + start)
        answers += model.generate(group, 12, eos, temperature=1.0, generator=generator)
    full = [len(ids) == 12 or len(prompt) + len(ids) == 64 for prompt, ids in zip(prompts, answers)]
    return [ids if cut else [*ids, eos] for ids, cut in zip(answers, full)]


def test_table_and_validation_measure_each_model_against_its_start(wired):
    """Two answers to each of the 10 test prompts, side by side; one to each of the 6 for the curve.

    The reference is what the model started from, with its beta; intervals are over prompts.
    """
    texts, ids, tokenizer = wired.task
    rewards = {}
    for label, row in wired.rows.items():
        ref, beta = (("teacher-sft", TEACHER_BETA) if label == "teacher"
                     else ("student-sft", BETA))
        ref, model = wired.stages[ref], wired.models[label]
        stage = {"teacher": "teacher-dpo", "sft": "student-sft"}.get(label, label)
        curve = {name.removeprefix("val_"): x for name, x in wired.lines[stage][-1].items()}
        for split, samples, numbers in (("test", 2, row.numbers), ("val", 1, curve)):
            if label == "sft" and split == "val":
                continue                                        # fine-tuning has no curve
            pairs, its_texts = getattr(ids, split), getattr(texts, split)
            prompts = [pair.prompt for pair in pairs for _ in range(samples)]
            answers = drawn(model, prompts, tokenizer.eot_token)
            asked = [pair.prompt for pair in its_texts for _ in range(samples)]
            reward = torch.tensor([data.reward(prompt, spoken(answer, tokenizer))
                                   for prompt, answer in zip(asked, answers)]).view(-1, samples)
            held_out = HeldOut(pairs, its_texts, tokenizer, True, samples, 12, 8, SEED)
            margins = cached_margins(model, ref, beta, held_out)
            examples = [data.Example(*item) for item in zip(prompts, answers)]
            close(numbers["reward"], reward.mean(), 1e-5)
            close(numbers["pref_margin"], margins.mean(), 1e-4)
            close(numbers["kl"], policy_kl(model, ref, examples, 8), 1e-4)
            if split == "test":
                rewards[label] = reward.double().mean(1)
                close(numbers["reward_ci"], interval(rewards[label].tolist()), 1e-5)
    dpo, numbers = rewards["dpo"], wired.rows["kd"].numbers
    close(numbers["vs_dpo"], (rewards["kd"] - dpo).mean(), 1e-5)
    close(numbers["vs_dpo_ci"], interval((rewards["kd"] - dpo).tolist()), 1e-5)
    assert wired.rows["dpo"].numbers["vs_dpo"] is None


def test_the_vocabulary_is_learned_from_the_training_pairs_alone(wired):
    learned = tokenizers.learn_tokenizer(wired.task.texts.train, 300)
    assert tokenizers.tokenizer_text(learned) == tokenizers.tokenizer_text(wired.task.tokenizer)
