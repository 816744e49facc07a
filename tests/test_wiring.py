"""The wiring of train.experiment: which model, which pairs and which option go where.

One run with options that are all different; every test works a part of it out again from the same
weights, so what differs is the rounding of float32: 1e-3 for sums of some 100 nats, 1e-4 for means.
"""

import json
import math
import re
from dataclasses import make_dataclass

import pytest
import torch
import torch.nn.functional as F

import data
import train
from conftest import close
from data import Example
from harness.evaluate import HeldOut
from harness.keep import Keep
from harness.options import Recipe, parse_args
from harness.progress import Progress
from harness.sampling import sample
from harness.texts import load_task
from harness.tokenizers import learn_tokenizer, tokenizer_text
from model import GPT, both_responses, pair_logps, response_logps, rows_logps
from small_run import SMALL, TINY
from test_model import tiny
from tvkd import kd_loss

SEED, BETA, TEACHER_BETA, ALPHA, GAMMA = 1, 0.5, 0.25, 1.5, 0.9
# 5 student pairs, so that the first batch of every method is all of them.
OPTIONS = [*SMALL, *f"""--seed={SEED} --beta={BETA} --teacher_beta={TEACHER_BETA} --alpha={ALPHA}
    --gamma={GAMMA} --student_pairs=5 --teacher_sft_steps=5 --teacher_dpo_steps=6
    --student_sft_steps=7 --teacher_sft_lr=0.01 --teacher_dpo_lr=0.02 --student_sft_lr=0.03
    --lr=0.04 --distill_lr=0.05 --micro_batch=100 --methods=bc,kd,dpo,tvkd,soft,ipo""".split()]
CPU = torch.device("cpu")


class IPO(train.DPO):
    """A method that a reader adds. With beta 1/2 it starts at 1 / (2 beta)^2 = 1."""
    def losses(self, logps, ids):
        chosen, rejected = logps - self.ref_logps[:, ids]
        return (chosen - rejected - 1 / (2 * self.beta)) ** 2

    def at_start(self, ids):
        return torch.ones(len(ids))


class Recorder:
    """keep(name, f, *args) is f(*args). args, result, lines of the log: by the name of a stage."""
    def __init__(self):
        self.args, self.made, self.lines = {}, {}, {}

    def __call__(self, name, f, *args, **progress):
        self.args[name], self.made[name] = args, f(*args, **progress)
        return self.made[name]

    def train(self, name, f, *args):
        progress = Progress(name, SEED)
        model = self(name, f, *args, progress=progress)
        self.lines[name] = [json.loads(line) for line in progress.lines]
        return model


@pytest.fixture(scope="module")
def wired():
    keep = Recorder()
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(train.METHODS, "ipo", (IPO, "lr"))
        keep.config = parse_args(OPTIONS, train.METHODS)
        keep.task = load_task(keep.config, SEED)
        keep.models = train.experiment(keep.config, SEED, keep.task, CPU, keep)
    keep.pairs = keep.task.ids.train[:5]
    return keep


def first_batch(rows):
    """The rows of step 1: the order of the batches depends on the seed alone."""
    order = data.shuffled_batches(len(rows), 8, torch.Generator().manual_seed(SEED))
    return [rows[i] for i in next(order)]


def mean_nll(model, rows):
    return -rows_logps(model, rows, 8).sum() / sum(len(row.response) for row in rows)


def test_where_each_stage_starts_and_how_it_is_trained(wired):
    """A stage -> loss, steps and learning rate; all in batches of 8. Each model stands in the table
    with what it started from and with its beta, and has its curve from one answer to each
    validation prompt; the table has two to each test prompt."""
    expected = {
        "teacher-sft": (train.Likelihood, 5, 0.01), "teacher-dpo": (train.DPO, 6, 0.02),
        "student-sft": (train.Likelihood, 7, 0.03), "bc": (train.Likelihood, 4, 0.05),
        "kd": (train.KD, 4, 0.05), "dpo": (train.DPO, 4, 0.04),
        "tvkd implicit/value": (train.TVKD, 4, 0.04), "tvkd logits/hold": (train.TVKD, 4, 0.04),
        "soft implicit/value": (train.SoftDPO, 4, 0.04),
        "soft logits/hold": (train.SoftDPO, 4, 0.04), "ipo": (IPO, 4, 0.04)}
    assert list(wired.lines) == list(expected)
    for name, (loss, steps, lr) in expected.items():
        assert type(wired.args[name][1]) is loss and len(wired.lines[name]) == steps
        assert wired.args[name][2:4] == (Recipe(steps, lr, 8, 100, 1, 2), SEED)
    sft, teacher_sft, made = wired.made["student-sft"], wired.made["teacher-sft"], wired.made
    assert wired.models == {"teacher": (made["teacher-dpo"], teacher_sft, TEACHER_BETA),
                            "sft": (sft, sft, BETA),
                            **{name: (made[name], sft, BETA) for name in list(expected)[3:]}}
    texts, ids, tokenizer = wired.task
    held_out = HeldOut(ids.val, texts.val, tokenizer, True, 1, 12, 8, SEED)
    for label, (_, ref, beta) in wired.models.items():
        if label != "sft":
            start, _, _, _, curve = wired.args[label.replace("teacher", "teacher-dpo")]
            assert (start, curve.ref, curve.beta) == (ref, ref, beta)
            assert vars(curve.held_out) == vars(held_out)
    assert HeldOut.of(wired.task, "test", wired.config, SEED).samples == 2


def test_new_models_and_fine_tuning(wired):
    """New weights are drawn by the run's seed; step 1 of fine-tuning is their mean -log p: of the
    responses for the student, of the prompts as well for the teacher. The vocabulary is learned
    from the training pairs alone."""
    rows = first_batch(wired.task.ids.sft)
    whole = [Example(row.prompt[:1], row.prompt[1:] + row.response) for row in rows]
    for name, width, rows in (("teacher-sft", 16, whole), ("student-sft", 8, rows)):
        torch.manual_seed(SEED)
        again = GPT(wired.args[name][0].config)
        close(wired.lines[name][0]["loss"], mean_nll(again, rows), 1e-4)
        assert again.config.n_embd == width
    learned = learn_tokenizer(wired.task.texts.train, 300)
    assert tokenizer_text(learned) == tokenizer_text(wired.task.tokenizer)


def test_teacher_learns_from_all_pairs_and_the_student_from_its_share(wired):
    """Step 1's mean log-probs: of 8 of the 24 pairs for the teacher, of the student's 5 pairs. A
    margin is beta times the difference of the log-ratios. IPO starts at 1 / (2 * 1/2)^2 = 1."""
    for stage, ref, beta, pairs in (
            ("teacher-dpo", "teacher-sft", TEACHER_BETA, first_batch(wired.task.ids.train)),
            ("dpo", "student-sft", BETA, wired.pairs)):
        means, (first, *_, last) = pair_logps(wired.made[ref], pairs).mean(1), wired.lines[stage]
        for who in ("ref", "policy"):
            close([first[f"{who}_chosen"], first[f"{who}_rejected"]], means, 1e-3)
        close(first["loss"], math.log(2), 1e-3)
        chosen, rejected = (last[f"policy_{x}"] - last[f"ref_{x}"] for x in ("chosen", "rejected"))
        close(last["margin"], beta * (chosen - rejected), 1e-3)
        assert abs(last["margin"]) > 0.01
    close(wired.lines["ipo"][0]["loss"], 1.0, 1e-3)


def test_tvkd_and_soft_labels_read_the_teachers_values(wired):
    """implicit: V(s) is teacher_beta times the teacher's log-ratio so far, up to s_end; logits:
    teacher_beta times logsumexp, and "hold" repeats V(s_end-1). psi = gamma V(s') - V(s). At step 1
    policy = reference, so TVKD's loss is -log sigmoid(-alpha (psi_w - psi_l))."""
    teacher, ref, _ = wired.models["teacher"]
    sums = {"implicit/value": [], "logits/hold": []}
    for row in both_responses(wired.pairs):
        tokens, mask = data.collate([row])
        ratios = (response_logps(teacher, tokens, mask) - response_logps(ref, tokens, mask))[mask]
        soft = teacher(tokens)[0].logsumexp(-1)[len(row.prompt) - 1:]           # s_p to s_end
        soft[-1] = soft[-2]
        for name, values in zip(sums, (F.pad(ratios.cumsum(0), (1, 0)), soft)):
            sums[name].append(TEACHER_BETA * (GAMMA * values[1:] - values[:-1]).sum())
    for name, psi in sums.items():
        chosen, rejected = psi = torch.stack(psi).view(2, -1)
        close(wired.args[f"soft {name}"][1].psi, psi, 1e-4)
        expected = -F.logsigmoid(-ALPHA * (chosen - rejected)).mean()
        close(wired.lines[f"tvkd {name}"][0]["loss"], expected, 1e-3)
        assert abs(expected - math.log(2)) > 1e-2               # or a psi of 0 would pass


def test_bc_and_kd_imitate_the_teacher(wired):
    """bc: -log p of two answers to each prompt, sampled from the teacher by the run's seed. kd:
    KL(teacher || student) per token of both responses."""
    (teacher, *_), (student, *_) = wired.models["teacher"], wired.models["sft"]
    prompts = [pair.prompt for pair in wired.pairs] * 2
    answers = sample(teacher, prompts, wired.task.tokenizer.eot_token, 12, SEED)
    rows = [Example(*row) for row in zip(prompts, answers)]
    assert wired.args["bc"][1].answers == list(zip(rows[:5], rows[5:]))
    close(wired.lines["bc"][0]["loss"], mean_nll(student, rows), 1e-4)
    tokens, mask = data.collate(both_responses(wired.pairs))
    close(wired.lines["kd"][0]["loss"], kd_loss(student(tokens), teacher(tokens), mask), 1e-4)


def test_a_misspelt_field_of_a_loss_is_refused(monkeypatch):
    monkeypatch.setitem(train.METHODS, "wrong", (make_dataclass("Wrong", ["phi"]), "lr"))
    config = parse_args([*TINY, "--methods=wrong"], train.METHODS)
    with pytest.raises(KeyError, match="'phi'"):
        train.experiment(config, SEED, load_task(config, SEED), CPU, Recorder())


def test_a_key_tells_models_of_one_set_of_weights_apart():
    """The same numbers with one head or two, or another GELU, are other models."""
    keys = [Keep("", CPU).describe("model", model)
            for model in (tiny(), tiny(), tiny(n_head=1), tiny(gelu="tanh"))]
    assert keys[0] == keys[1] and keys[2] not in keys[:2] and keys[3] not in keys[:3]


def test_each_seed_has_its_table_and_then_all(tmp_path, capsys):
    assert train.main([*TINY, f"--out={tmp_path}", "--methods=dpo", "--seeds=2"]) == 0
    over = re.findall(r"interval .*over .*?(seed \d|\d seeds)\.", capsys.readouterr().out)
    assert over == ["seed 0", "seed 1", "2 seeds"]
