"""train.py end to end at toy sizes: what is frozen stays frozen, what should be equal is equal, bad input is refused in a line."""

import ast
import copy
import io
import json
import math
import os
import re
import shutil
import subprocess
import sys
from dataclasses import fields

import pytest
import torch

import data
import measure
import report
import train
import use
from conftest import ROOT
from model import GPT, GPTConfig, from_content, frozen
from options import Config, parse_args
from store import read
from tvkd import implicit_value, sequence_logps

SMALL = ["--train_pairs=24", "--student_pairs=12", "--val_pairs=6", "--test_pairs=10", "--batch_size=8", "--samples=2",
         "--max_new_tokens=12", "--teacher_layers=1", "--teacher_width=16", "--student_layers=1", "--student_width=8",
         "--teacher_heads=2", "--student_heads=2", "--teacher_sft_steps=4", "--teacher_dpo_steps=4", "--student_sft_steps=4",
         "--steps=4", "--log_interval=1", "--eval_interval=2", "--vocab_size=300", "--device=cpu"]


def run(out, *options):
    """A run in an empty folder -> rows by label, log lines"""
    shutil.rmtree(out, ignore_errors=True)                                  # or what an earlier run kept would be read
    assert train.main([*SMALL, f"--out={out}", *options]) == 0
    rows = json.loads((out / "results.json").read_text(encoding="utf-8"))["rows"]
    log = [json.loads(line) for line in (out / "log.jsonl").read_text(encoding="utf-8").splitlines()]
    return {train.label(row) if row["seed"] == 0 else f"{train.label(row)} {row['seed']}": row for row in rows}, log


@pytest.fixture(scope="module")
def default_run(tmp_path_factory):
    out = tmp_path_factory.mktemp("default") / "out"
    return out, *run(out)


# --- the whole run ---------------------------------------------------------------------------------------------------------

def test_results(default_run):
    """A row for the teacher, the student it starts from, and each method; tvkd once for each value."""
    out, rows, _ = default_run
    assert list(rows) == ["teacher", "sft", "bc", "kd", "dpo", "tvkd implicit/value", "tvkd logits/hold"]
    for row in rows.values():
        assert row["seed"] == 0 and row["pref_n"] == 10 and row["kl"] >= 0
        assert 0 <= row["pref_acc"] <= 1 and math.isfinite(row["reward"]) and row["reward_ci"] >= 0
    assert rows["sft"]["kl"] == 0 and rows["sft"]["pref_acc"] == 0.5           # it is its own reference: ties, each half right
    assert rows["dpo"]["vs_dpo"] is None and rows["kd"]["vs_dpo"] == pytest.approx(rows["kd"]["reward"] - rows["dpo"]["reward"])
    results = json.loads((out / "results.json").read_text(encoding="utf-8"))
    assert results["config"]["alpha"] == 1.0 and results["made"]["torch"] == torch.__version__
    measured = ("teacher-dpo", "student-sft", "bc", "kd", "dpo", "tvkd-implicit-value", "tvkd-logits-hold")
    assert {p.name for p in (out / "seed0").iterdir()} == {
        "tokenizer.tiktoken", "teacher-sft.pt", "ref-logps.pt", "values-implicit.pt", "values-logits.pt",
        *(f"{stage}.pt" for stage in measured), *(f"{stage}.row.pt" for stage in measured)}


def test_log(default_run):
    """The four log-probs, margin and accuracy of preference stages; validation with KL and reward; DPO starts at ln 2."""
    _, _, log = default_run
    dpo = [line for line in log if line["stage"] == "dpo"]
    assert [line["step"] for line in dpo] == [1, 2, 3, 4]
    assert dpo[0]["loss"] == pytest.approx(math.log(2), abs=1e-5)
    assert {"policy_chosen", "policy_rejected", "ref_chosen", "ref_rejected", "margin", "accuracy"} <= set(dpo[0])
    assert "val_kl" not in dpo[0] and {"val_kl", "val_reward", "val_pref_acc"} <= set(dpo[1])
    assert dpo[3]["loss"] == pytest.approx(-math.log(1 / (1 + math.exp(-dpo[3]["margin"]))), rel=0.05)


def test_step_0_is_shown(default_run, tmp_path, capsys):
    run(tmp_path, "--methods=dpo,tvkd", "--value=implicit")
    shown = capsys.readouterr().out
    assert shown.count("expected 0.6931 = ln 2") == 2                          # the teacher's DPO and the student's
    assert shown.count("step 0 check") == 3
    for part in ("true reward", "psi per token, implicit/value, chosen", "tokens/s", "s left", "prompt: Describe the"):
        assert part in shown, part


def test_readme_snippet_answers(default_run):
    """The README's own code reads the weights and the tokenizer of a run and prints an answer."""
    out, *_ = default_run
    [snippet] = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(encoding="utf-8"), re.DOTALL)
    done = subprocess.run([sys.executable, "-c", snippet], cwd=out.parent, env={**os.environ, "PYTHONPATH": str(ROOT)},
                          capture_output=True, text=True, timeout=60)
    assert done.returncode == 0 and done.stdout.endswith("\n"), done.stderr


def test_ask(default_run, capsys):
    """Every model of the run answers, with the true reward beside; the same seed gives the same answers."""
    out, rows, _ = default_run
    shown = []
    for _ in range(2):
        assert train.main([f"--out={out}", "--ask=Describe the dog: black, tiny, quick, ancient.", "--device=cpu"]) == 0
        shown.append(capsys.readouterr().out)
    assert shown[0] == shown[1] and "prompt: Describe the dog" in shown[0]
    assert all(re.search(rf"^  {name} .*\(reward [+-]", shown[0], re.MULTILINE) for name in rows)


def test_score(default_run, tmp_path, capsys):
    """The run's own test pairs, written to a file and scored again: the margins behind pref_margin and pref_acc of its table.
    One pair more has a response of 200 bytes, which does not fit: null."""
    out, rows, _ = default_run
    pairs = [*data.toy_splits(24, 6, 10, 0).test, data.Pair("a", "b", "\u00e9" * 100)]
    path = tmp_path / "pairs.jsonl"
    path.write_text("".join(json.dumps(pair._asdict()) + "\n" for pair in pairs), encoding="utf-8")
    assert train.main([f"--out={out}", f"--score={path}", "--device=cpu"]) == 0
    shown = capsys.readouterr().out
    assert "11 pairs; 7 with the prompt cut from the left, 1 with a response that does not fit in 64 tokens" in shown
    lines = [json.loads(line) for line in (out / "scores.jsonl").read_text(encoding="utf-8").splitlines()]
    assert [line["prompt"] for line in lines] == [pair.prompt for pair in pairs]
    for name, row in rows.items():
        *margins, missing = [line["margins"][name] for line in lines]
        assert missing is None and sum(margins) / 10 == pytest.approx(row["pref_margin"], abs=1e-5)
        assert sum((m > 0) + (m == 0) / 2 for m in margins) / 10 == pytest.approx(row["pref_acc"])


def test_refused_and_broken_runs_leave_no_mixture(default_run, tmp_path, capsys):
    """A refused command and one that fails before it has made anything leave an earlier run as it was; one that has replaced a
    file takes the table away, so that --ask refuses."""
    out = tmp_path / "out"
    shutil.copytree(default_run[0], out)
    before = (out / "results.json").read_bytes()
    refused(capsys, f"--out={out}", "--data=missing.jsonl")
    assert train.main([*SMALL, f"--out={out}", "--teacher_sft_lr=1e30", "--teacher_sft_steps=40"]) == 1
    assert (out / "results.json").read_bytes() == before and train.main([f"--out={out}", "--ask=hi", "--device=cpu"]) == 0
    assert train.main([*SMALL, f"--out={out}", "--teacher_sft_steps=5", "--teacher_dpo_lr=1e30", "--teacher_dpo_steps=40"]) == 1
    capsys.readouterr()
    assert "results.json" in refused(capsys, f"--out={out}", "--ask=hi")


def test_output_of_any_encoding(tmp_path):
    """A terminal or file in ASCII: what it cannot show is replaced, and the run ends well."""
    done = subprocess.run([sys.executable, ROOT / "train.py", *SMALL, "--methods=tvkd", f"--out={tmp_path}"], capture_output=True,
                          env={**os.environ, "PYTHONIOENCODING": "ascii"}, timeout=60)
    assert done.returncode == 0 and b"0.500 ? " in done.stdout, done.stderr


def test_ask_without_a_run(capsys, tmp_path):
    assert "--out: expected the folder of a finished run with --seed=0" in refused(capsys, f"--out={tmp_path}", "--ask=hi")


# --- what must be equal, and what must not ---------------------------------------------------------------------------------

def numbers(row):
    return {name: x for name, x in row.items() if name not in ("method", "value", "terminal", "seed", "vs_dpo", "vs_dpo_ci")}


def test_strict_shaping_trains_to_the_same_numbers_as_dpo(default_run, tmp_path):
    """terminal "zero" and alpha 0 are DPO to the last digit; the default is not, and neither is each other option of the loss."""
    _, rows, _ = default_run
    dpo, tvkd = numbers(rows["dpo"]), numbers(rows["tvkd implicit/value"])
    only = ("--methods=dpo,tvkd", "--value=implicit")
    assert numbers(run(tmp_path, *only, "--terminal=zero", "--alpha=3")[0]["tvkd implicit/zero"]) == dpo
    assert numbers(run(tmp_path, *only, "--alpha=0")[0]["tvkd implicit/value"]) == dpo
    assert tvkd["pref_margin"] != dpo["pref_margin"]
    for change in ("--alpha=2", "--beta=0.5", "--gamma=0.5", "--terminal=hold", "--teacher_beta=0.5"):
        row = next(row for name, row in run(tmp_path, "--methods=tvkd", "--value=implicit", change)[0].items() if "tvkd" in name)
        assert row["pref_margin"] != tvkd["pref_margin"], change


def test_runs_repeat_and_measuring_changes_nothing(default_run, tmp_path):
    """The same command gives the same rows; so do other logging and evaluation intervals, and other methods beside."""
    _, rows, _ = default_run
    assert run(tmp_path)[0] == rows
    sparse = run(tmp_path, "--eval_interval=1000", "--log_interval=1000", "--methods=tvkd,dpo")[0]
    for name in ("teacher", "sft", "dpo", "tvkd implicit/value", "tvkd logits/hold"):
        assert numbers(sparse[name]) == numbers(rows[name])
    both = run(tmp_path, "--seeds=2", "--methods=dpo")[0]
    assert numbers(both["dpo"]) == numbers(rows["dpo"]) != numbers(both["dpo 1"])
    assert numbers(run(tmp_path, "--seed=1", "--methods=dpo")[0]["dpo 1"]) == numbers(both["dpo 1"])


@pytest.fixture
def setup():
    """A small student, its frozen reference, a teacher, and 12 encoded pairs."""
    tokenizer = data.learn_tokenizer(data.toy_splits(30, 1, 1, 0).train, 300)
    _, pairs, _ = data.encode(data.toy_splits(12, 1, 1, 0).train, tokenizer, 128)
    models = []
    for seed in (0, 1):
        torch.manual_seed(seed)
        models.append(GPT(GPTConfig(tokenizer.n_vocab, 128, 1, 2, 8)))
    return models[0], frozen(models[0]), frozen(models[1]), pairs


CPU = torch.device("cpu")


def test_wiring(tmp_path):
    """Which model, which beta and which pairs go where, from the weights a run saved: beta 0.5, the teacher's 0.25, alpha 1.5 and
    5 student pairs, so that the first batch is all of them and every loss at step 1 can be worked out again."""
    options = ["--beta=0.5", "--teacher_beta=0.25", "--alpha=1.5", "--student_pairs=5"]
    rows, log = run(tmp_path, *options)
    config = parse_args([*SMALL, *options])
    setup = train.prepare(config, 0, CPU)
    _, models, _ = use.load_run(Config(out=str(tmp_path)), CPU)
    models["teacher before DPO"] = GPT(models["teacher"].config)
    models["teacher before DPO"].load_weights(torch.load(tmp_path / "seed0" / "teacher-sft.pt", weights_only=True)["model"])
    both = measure.both_responses(setup.ids.train[:5])
    logps = {name: measure.cached_logps(model, both, 10, CPU) for name, model in models.items()}

    def first(stage):
        return next(line for line in log if line["stage"] == stage)

    # TVKD at policy = reference: -log sigmoid(-alpha (psi_w - psi_l)); implicit: teacher_beta times the teacher's log-ratio
    implicit = 0.25 * (logps["teacher"] - logps["teacher before DPO"])
    states = [models["teacher"](torch.tensor([row.prompt + row.response]))[0].logsumexp(-1) for row in both]
    held = torch.stack([0.25 * (lse[len(lse) - 2] - lse[len(row.prompt) - 1]) for lse, row in zip(states, both)])
    for stage, psi in (("tvkd implicit/value", implicit), ("tvkd logits/hold", held)):
        expected = -torch.nn.functional.logsigmoid(-1.5 * (psi[:5] - psi[5:])).mean().item()
        assert first(stage)["loss"] == pytest.approx(expected, abs=1e-5), stage
    # behaviour cloning: the student's mean -log p of the teacher's own answers
    prompts = [row.prompt for row in both]
    tokens, mask = data.collate([data.Row(*row) for row in zip(prompts, measure.sample(models["teacher"], prompts, setup))])
    assert first("bc")["loss"] == pytest.approx(train.nll_loss(measure.score(models["sft"], tokens, mask), mask).item(), abs=1e-5)
    # margins are beta times the difference of log-ratios, the teacher's with its own beta
    for line in log:
        if "margin" in line:
            beta = 0.25 if line["stage"] == "teacher-dpo" else 0.5
            ratios = (line["policy_chosen"] - line["ref_chosen"]) - (line["policy_rejected"] - line["ref_rejected"])
            assert line["margin"] == pytest.approx(beta * ratios, abs=1e-4), line["stage"]
    # validation and table: each model against what it started from, with its own beta
    rewards = {}
    for name, row in rows.items():
        ref, beta = (models["teacher before DPO"], 0.25) if name == "teacher" else (models["sft"], 0.5)
        metrics, each = measure.evaluate(models[name], ref, beta, "test", 2, setup)
        assert {key: row[key] for key in metrics} == pytest.approx(metrics, abs=1e-5), name
        rewards[name] = each["reward"]
        if name != "sft":
            last = [line for line in log if line["stage"] == {"teacher": "teacher-dpo"}.get(name, name)][-1]
            metrics, _ = measure.evaluate(models[name], ref, beta, "val", 1, setup)
            assert {key: last[f"val_{key}"] for key in metrics} == pytest.approx(metrics, abs=1e-5), name
    assert rows["kd"]["vs_dpo_ci"] == pytest.approx(report.interval((rewards["kd"] - rewards["dpo"]).tolist()))
    # two answers to each prompt, side by side
    prompts = [pair.prompt for pair in setup.ids.test for _ in range(2)]
    texts = [measure.spoken(answer, setup.tokenizer) for answer in measure.sample(models["bc"], prompts, setup)]
    by_hand = [(data.reward(pair.prompt, texts[2 * i]) + data.reward(pair.prompt, texts[2 * i + 1])) / 2
               for i, pair in enumerate(setup.texts.test)]
    assert rewards["bc"].tolist() == by_hand
    # the vocabulary is learned from the training split alone
    own = data.learn_tokenizer(setup.texts.train, config.vocab_size)
    assert [own.decode_single_token_bytes(i) for i in range(256, own.eot_token)] == [
        setup.tokenizer.decode_single_token_bytes(i) for i in range(256, setup.tokenizer.eot_token)]


def test_teacher_of_another_vocabulary(tmp_path, capsys):
    """A teacher with 270 ids beside a student with 300: TVKD's loss at step 1 is worked out again from the texts alone, BC gets
    the teacher's words in the student's ids, --ask and --score read every model with its own tokenizer."""
    options = ["--teacher_tokenizer=270", "--block_size=160", "--methods=bc,dpo,tvkd", "--value=implicit", "--student_pairs=5"]
    rows, log = run(tmp_path, *options)
    assert list(rows) == ["teacher", "sft", "bc", "dpo", "tvkd implicit/value"]
    own = data.load_tokenizer(tmp_path / "seed0" / "teacher.tiktoken")
    models = {stage: from_content(read(tmp_path / "seed0" / f"{stage}.pt")).eval() for stage in ("teacher-sft", "teacher-dpo")}
    assert own.n_vocab == models["teacher-dpo"].config.vocab_size == 270
    psi = []
    for pair in data.toy_splits(24, 6, 10, 0).train[:5]:
        for response in (pair.chosen, pair.rejected):
            tokens, mask = data.collate([(own.encode_ordinary(pair.prompt), own.encode_ordinary(response) + [own.eot_token])])
            phi, ref = (sequence_logps(measure.score(models[stage], tokens, mask), mask) for stage in ("teacher-dpo", "teacher-sft"))
            psi.append(phi - ref)
    psi = torch.cat(psi).view(5, 2)
    expected = -torch.nn.functional.logsigmoid(psi[:, 1] - psi[:, 0]).mean().item()
    found = next(line for line in log if line["stage"] == "tvkd implicit/value" and line["step"] == 1)
    assert found["loss"] == pytest.approx(expected, abs=1e-5) and abs(found["loss"] - math.log(2)) > 1e-4

    setup = train.prepare(parse_args([*SMALL, *options]), 0, CPU)
    answers = train.teacher_answers(models["teacher-dpo"], setup.ids.train[:5], setup)
    theirs = measure.sample(models["teacher-dpo"], [p.prompt for p in setup.teacher_ids.train[:5]] * 2, setup.teachers)
    for i, answer in enumerate(theirs):
        row = answers[i % 5][i // 5]
        assert row.prompt == setup.ids.train[i % 5].prompt
        assert row.response == (setup.tokenizer.encode_ordinary(measure.spoken(answer, own))
                                + [setup.tokenizer.eot_token] * (own.eot_token in answer))

    capsys.readouterr()
    path = tmp_path / "pairs.jsonl"
    path.write_text("".join(json.dumps(p._asdict()) + "\n" for p in setup.texts.test), encoding="utf-8")
    assert train.main([f"--out={tmp_path}", f"--score={path}", "--ask=Describe the dog: black.", "--device=cpu"]) == 0
    lines = [json.loads(line) for line in (tmp_path / "scores.jsonl").read_text(encoding="utf-8").splitlines()]
    for name, row in rows.items():
        assert sum(line["margins"][name] for line in lines) / 10 == pytest.approx(row["pref_margin"], abs=1e-5), name


def test_true_accuracy_by_hand(setup, monkeypatch):
    """Three pairs of true difference +2, -2 (a wrong label) and 0, margins all positive: the first is right, the second wrong,
    the third left out."""
    student, ref, _, _ = setup
    prompt, right, wrong = "Describe the cat: red, small, fast, old.", " The cat is red.", " The cat is blue."
    texts = [data.Pair(prompt, right, wrong), data.Pair(prompt, wrong, right), data.Pair(prompt, right, right)]
    tokenizer = data.learn_tokenizer(data.toy_splits(30, 1, 1, 0).train, 300)
    ids = data.encode(texts, tokenizer, 128)[1]
    splits = [data.Splits([], [], [], items) for items in (texts, ids)]
    whole = measure.Setup(Config(max_new_tokens=2), 0, CPU, tokenizer, *splits, tokenizer, splits[1])
    margins = measure.cached_margins(student, ref, 1.0, ids, whole)
    assert margins.tolist() == [0, 0, 0]
    monkeypatch.setattr(measure, "cached_margins", lambda *args: torch.tensor([1.0, 1.0, 1.0]))
    assert measure.evaluate(student, ref, 1.0, "test", 1, whole)[1]["true_acc"].tolist() == [1, 0]


def test_psi_is_summed_in_float64():
    """60 values of size 1e4 in float32: strict psi adds up to -V(s_p) to 1e-9; float32 sums would be off by about 1e-2."""
    values = 1e4 * torch.randn(2, 62, generator=torch.Generator().manual_seed(0))
    psi = measure.cached_psi(list(values), [data.Row([0, 0], [0] * 60)] * 2, 1.0, "zero")
    assert psi.sum(-1).tolist() == pytest.approx((-values[:, 1]).tolist(), abs=1e-9)


def test_cache_is_the_live_score_of_each_row(setup):
    """Cached in batches sorted by length, looked up by index: within 1e-5 of scoring each row alone."""
    _, ref, teacher, pairs = setup
    rows = measure.both_responses(pairs)
    logps = measure.cached_logps(ref, rows, 5, CPU)
    values = measure.cached_values("implicit", teacher, ref, rows, 0.5, 5, CPU)
    psi = measure.cached_psi(values, rows, 1.0, "value").sum(-1)
    for at_once in (5, 1000):
        torch.testing.assert_close(measure.summed_psi(values, pairs, 1.0, "value", CPU, at_once).flatten(), psi.float())
    for i, row in enumerate(rows):
        tokens, mask = data.collate([row])
        own, its_teacher = measure.score(ref, tokens, mask), measure.score(teacher, tokens, mask)
        assert logps[i].item() == pytest.approx(sequence_logps(own, mask).item(), abs=1e-4)
        live = implicit_value(its_teacher, own, mask, 0.5)[0]
        torch.testing.assert_close(values[i], live, atol=1e-4, rtol=0)
        assert values[i].shape == (len(row.prompt) + len(row.response),) and values[i].element_size() == 4
        assert psi[i].item() == pytest.approx(live[-1].item(), abs=1e-4)       # V(s_end) - V(s_p), and V(s_p) = 0


def test_training_moves_the_policy_alone(setup):
    """After 3 TVKD steps the policy has moved; reference and teacher have not, took no gradient and are in eval mode."""
    student, ref, teacher, pairs = setup
    rows = measure.both_responses(pairs)
    logps = measure.cached_logps(ref, rows, 8, CPU).view(2, -1)
    values = measure.cached_values("logits", teacher, ref, rows, 1.0, 8, CPU)
    psi = measure.cached_psi(values, rows, 1.0, "hold").sum(-1).float().view(2, -1)
    before = {model: copy.deepcopy(model.state_dict()) for model in (student, ref, teacher)}
    loss_of = train.preference(pairs, logps, 1.0, CPU, psi, 1.0)
    train.fit("tvkd", student, loss_of, len(pairs), 3, 1e-2, Config(batch_size=8, log_interval=1), 0, io.StringIO())
    for model in (ref, teacher):
        assert all(torch.equal(value, model.state_dict()[name]) for name, value in before[model].items())
        assert not model.training and all(p.grad is None and not p.requires_grad for p in model.parameters())
    assert any(not torch.equal(value, student.state_dict()[name]) for name, value in before[student].items())


def test_kd_reads_the_teacher(setup):
    """Distilling from itself: loss 0 and no gradient; from another teacher: not."""
    student, ref, teacher, pairs = setup
    for source, zero in ((ref, True), (teacher, False)):
        sums = train.distillation(source, pairs, CPU)(student, list(range(12)))
        loss = sums["loss"] / sums["n"]
        gradients = torch.autograd.grad(loss, list(student.parameters()))
        assert (abs(loss.item()) < 1e-6) == zero == (max(g.abs().max().item() for g in gradients) < 1e-6)


def test_step_0_check_notices_another_reference(setup):
    student, ref, teacher, pairs = setup
    rows = measure.both_responses(pairs)
    for source, right in ((ref, True), (teacher, False)):
        loss_of = train.preference(pairs, measure.cached_logps(source, rows, 8, CPU).view(2, -1), 1.0, CPU)
        if right:
            train.check_start(loss_of, student, list(range(8)), torch.zeros(1))
        else:
            with pytest.raises(RuntimeError, match="step 0 check failed"):
                train.check_start(loss_of, student, list(range(8)), torch.zeros(1))


def test_margins_by_hand():
    """beta 0.1; log-ratios 2 and 0, 0 and 1, 3 and 3: margins 0.2, -0.1, 0: right, wrong, a tie."""
    margins = measure.reward_margins(torch.tensor([2.0, 0, 3]), torch.tensor([0.0, 1, 3]), torch.zeros(3), torch.zeros(3), 0.1)
    assert margins.tolist() == pytest.approx([0.2, -0.1, 0.0])
    assert measure.is_correct(margins).tolist() == [1.0, 0.0, 0.5]


def test_policy_kl_by_hand(setup):
    """Reference and policy that ignore their input: KL((.5,.5) || (.9,.1)) = .510826 per state, three states: 1.532477."""
    class Constant(torch.nn.Module):
        def __init__(self, *probs):
            super().__init__()
            self.logits = torch.tensor(probs).log()

        def forward(self, tokens, states):
            return self.logits.expand(int(states.sum()), 2)

    rows = [data.Row([0, 1], [1, 1, 0]), data.Row([1], [0, 1, 0])]
    assert measure.policy_kl(Constant(.5, .5), Constant(.9, .1), rows, 2, CPU) == pytest.approx(3 * 0.510826, abs=1e-5)


def test_psi_in_the_terminal(capsys):
    """psi 2, -1, 0 of a largest 2: levels 4 (more), 2 (less), 0; white space gets a sign; no escape codes without colour."""
    side = {"tokens": [" red", "\n", "x"], "psi": [2.0, -1.0, 0.0], "values": [0.0, 2.0, 1.0, 1.0]}
    pair = {"value": "implicit", "terminal": "value", "chosen": side, "rejected": side}
    report.show_psi(pair, colour=False, width=80)
    assert "chosen (sum +1.00):\n  red[+2.00] \u2423[-1.00] x[+0.00]\n" in capsys.readouterr().out
    assert report.printable("red\x1b[31m\x00") == "red\ufffd[31m\ufffd"         # no escape code of a model's own
    report.show_psi(pair, colour=False, width=14)                               # too narrow for two: a line each
    assert "\n  red[+2.00]\n  \u2423[-1.00]\n  x[+0.00]\n" in capsys.readouterr().out
    report.show_psi(pair, colour=True, width=80, most=2)
    shown = capsys.readouterr().out
    assert f"48;5;{report.MORE[3]}mred\033[0m[+2.00]" in shown and f"48;5;{report.LESS[1]}m\u2423" in shown
    assert shown.count("... and 1 more") == 2


def test_interval_by_hand():
    """1, 2, 3, 4: variance 5/3, standard error sqrt(5/12) = 0.645497; times t = 3.182 (3 degrees) 2.053972. Of one: none."""
    assert report.interval([1, 2, 3, 4]) == pytest.approx(2.053972, abs=1e-5)
    assert report.interval([1]) is None


def test_table_over_seeds_by_hand():
    """Rewards 1 and 3 of two seeds: 2 +- 12.706 sqrt(2)/sqrt(2) = 12.71; of one seed: its own interval."""
    rows = [{"method": "dpo", "value": None, "terminal": None, "seed": seed, "reward": reward, "reward_ci": 0.5, "vs_dpo": None,
             "vs_dpo_ci": None, "pref_acc": 0.5, "pref_acc_ci": 0.1, "pref_n": 10, "kl": 0.0, "length": 3.0}
            for seed, reward in ((0, 1.0), (1, 3.0))]
    assert "2.00 ± 12.71" in report.table(rows) and "2 seeds" in report.table(rows)
    assert "1.00 ± 0.50" in report.table(rows[:1])


# --- real preferences ------------------------------------------------------------------------------------------------------

@pytest.fixture
def preferences(tmp_path):
    """A JSONL file with pairs in all four layouts, 40 prompts."""
    path = tmp_path / "pairs.jsonl"
    lines = []
    for i in range(40):
        question, good, bad = f"What is {i} and one?", f"It is {i + 1}.", f"It is {i}, or so."
        user, hh = [{"role": "user", "content": question}], f"\n\nHuman: {question}\n\nAssistant:"
        answers = [[{"role": "assistant", "content": text}] for text in (good, bad)]
        lines.append([{"prompt": question, "chosen": " " + good, "rejected": " " + bad},
                      {"prompt": user, "chosen": answers[0], "rejected": answers[1]},
                      {"chosen": user + answers[0], "rejected": user + answers[1]},
                      {"chosen": f"{hh} {good}", "rejected": f"{hh} {bad}"}][i % 4])
    path.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    return path


def test_real_preferences(preferences, tmp_path, capsys):
    rows, _ = run(tmp_path / "out", f"--data={preferences}", "--train_pairs=0", "--block_size=64")
    assert rows["dpo"]["reward"] is None and rows["dpo"]["pref_n"] == 10
    shown = capsys.readouterr().out
    assert "n = 10 held-out pairs" in shown and "train: 24 of 24 pairs; 0 with the prompt cut" in shown


def test_what_is_cut_and_dropped_is_counted(preferences, tmp_path, capsys):
    """block_size 16 cuts some prompts and drops no response; 4 leaves no pair at all, and says which option."""
    run(tmp_path / "out", f"--data={preferences}", "--train_pairs=0", "--block_size=16", "--methods=dpo")
    assert re.search(r"train: 24 of 24 pairs; [1-9]\d* with the prompt cut from the left, 0 dropped", capsys.readouterr().out)
    assert train.main([*SMALL, f"--data={preferences}", "--train_pairs=0", "--block_size=4", f"--out={tmp_path / 'o'}"]) == 2
    assert capsys.readouterr().err.startswith("train.py: --block_size: expected room for")


def test_pairs_left_out_are_counted(preferences, capsys):
    """40 pairs, of which 20, 6 and 10 are asked for: 4 are left out. A pair again and a pair with its labels swapped: 6."""
    config = parse_args([*SMALL, f"--data={preferences}", "--train_pairs=20"])
    train.prepare(config, 0, torch.device("cpu"))
    assert "40 pairs; 4 left out by --train_pairs; kept: 0 that repeat another, 0 that another" in capsys.readouterr().out
    first = json.loads(preferences.read_text(encoding="utf-8").splitlines()[0])
    with open(preferences, "a", encoding="utf-8") as file:
        file.write(f"{json.dumps(first)}\n{json.dumps({**first, 'chosen': first['rejected'], 'rejected': first['chosen']})}\n")
    train.prepare(config, 0, torch.device("cpu"))
    assert "42 pairs; 6 left out by --train_pairs; kept: 1 that repeat another, 2 that another" in capsys.readouterr().out


# --- the command line ------------------------------------------------------------------------------------------------------

def refused(capsys, *options):
    """The one line on stderr with which a command is refused, exit code 2, before any training."""
    try:
        code = train.main(list(options))
    except SystemExit as stop:                                                  # argparse's own
        code = stop.code
    shown = capsys.readouterr()
    assert code == 2 and "step" not in shown.out
    assert shown.err.startswith("train.py: ") and shown.err.count("\n") == 1, shown.err
    return shown.err


@pytest.mark.parametrize("options, said", [
    (["--learning_rate=1"], "unrecognized arguments: --learning_rate=1"),
    (["--alph=1"], "unrecognized arguments: --alph=1"),
    (["--alpha=much"], "invalid float value: 'much'"),
    (["--alpha=nan"], "--alpha: expected a number of at least 0, got nan"),
    (["--beta=0"], "--beta: expected a number above 0, got 0.0"),
    (["--beta=-1"], "--beta: expected a number of at least 0, got -1.0"),
    (["--methods=dpo,ppo"], "--methods: expected some of bc,kd,dpo,tvkd, each once, got dpo,ppo"),
    (["--methods="], "--methods: expected some of"),
    (["--methods=dpo,dpo"], "each once, got dpo,dpo"),
    (["--value=q"], "--value: expected some of implicit,logits"),
    (["--terminal=end"], "--terminal: expected one of zero, hold, value"),
    (["--student_width=10"], "--student_width: expected a multiple of --student_heads=4, got 10"),
    (["--steps=0"], "--steps: expected at least 1, got 0"),
    (["--seed=99999999999999999999"], "--seed: expected a smaller number"),
    (["--ask="], "--ask: expected a value, got an empty one"),
    (["--ask=hi", "--steps=5"], "--steps: expected only --out, --seed and --device beside --ask"),
    (["--device=tpu"], "--device: expected one of auto, cpu, cuda, mps"),
    (["--train_pairs=0"], "--train_pairs: expected at least 1 on the toy task"),
    (["--train_pairs=100000"], "--train_pairs + --val_pairs + --test_pairs: expected at most 15552"),
    (["--student_pairs=50", "--train_pairs=40"], "--student_pairs: expected at most the 40 training pairs, got 50"),
    (["--vocab_size=100"], "--vocab_size: expected at least 257"),
    (["--tokenizer=gpt9"], "--tokenizer: expected one of"),
    (["--teacher_tokenizer=gpt9", "--methods=tvkd"], "--teacher_tokenizer: expected one of"),
    (["--teacher_tokenizer=100", "--methods=tvkd"], "--teacher_tokenizer: expected a name or a size of at least 257"),
    (["--teacher_tokenizer=300"], "--methods: expected no kd, which compares two distributions over one vocabulary"),
    (["--data=missing.jsonl"], "missing.jsonl: expected a readable JSONL file"),
])
def test_bad_options(capsys, tmp_path, options, said):
    assert said in refused(capsys, f"--out={tmp_path / 'out'}", *options)


@pytest.mark.parametrize("line, said", [
    ('{"prompt": "a", "chosen": ', "expected one JSON object"),
    ('{"prompt": "a", "chosen": "b"}', 'expected a field "rejected"'),
    ('{"prompt": "a", "chosen": "", "rejected": "b"}', 'expected text in "chosen"'),
    ('{"prompt": "a", "chosen": "b", "rejected": "b"}', "the same response twice"),
    ('{"chosen": "\\n\\nHuman: a\\n\\nAssistant: b", "rejected": "c"}', "share the prompt"),
])
def test_bad_data_names_file_and_line(capsys, tmp_path, line, said):
    path = tmp_path / "pairs.jsonl"
    path.write_text('{"prompt": "a", "chosen": "b", "rejected": "c"}\n' + line + "\n", encoding="utf-8")
    message = refused(capsys, f"--data={path}", f"--out={tmp_path / 'out'}")
    assert f"{path}:2: " in message and said in message


def test_unwritable_out(capsys, tmp_path):
    (tmp_path / "file").write_text("x")
    assert "--out: expected a folder that can be written" in refused(capsys, f"--out={tmp_path / 'file' / 'out'}")


def test_help_lists_every_option(capsys):
    with pytest.raises(SystemExit) as stop:
        train.main(["--help"])
    shown = capsys.readouterr().out
    assert stop.value.code == 0 and all(f"--{f.name} " in shown for f in fields(Config))


def test_non_finite_gradient_stops(tmp_path):
    """sqrt(0 w) is 0 with a gradient of NaN: stopped before the step, the weight is as it was."""
    model, batch = torch.nn.Linear(1, 1, bias=False), {"n": 1, "tokens": 1}
    before = model.weight.item()
    with pytest.raises(FloatingPointError, match="x: loss 0.0, gradient norm nan at step 1; .* batch \\[0\\]"):
        train.fit("x", model, lambda model, ids: {"loss": (0 * model.weight.sum()).sqrt(), **batch}, 1, 3, 0.1, Config(), 0, io.StringIO())
    assert model.weight.item() == before


def test_non_finite_loss_stops(tmp_path, capsys):
    assert train.main([*SMALL, f"--out={tmp_path}", "--teacher_sft_lr=1e30", "--teacher_sft_steps=40"]) == 1
    assert re.search(r"teacher-sft: loss (nan|inf), gradient norm \S+ at step \d+;.* batch \[\d", capsys.readouterr().err)


def test_cpu_never_touches_cuda(tmp_path):
    """--device=cpu in a fresh process: CUDA stays uninitialised."""
    code = f"import train, torch, sys; code = train.main({[*SMALL, '--methods=dpo', f'--out={tmp_path}']!r}); " \
           "sys.exit(code or torch.cuda.is_initialized())"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, timeout=60).returncode == 0


# --- the repository --------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("name, allowed", [
    ("tvkd", set()), ("model", set()), ("data", {"numpy", "tiktoken"}), ("report", set()),
    ("measure", {"data", "model", "report", "tvkd"}), ("store", {"data", "numpy"}),
    ("use", {"data", "measure", "model", "report", "store"}),
    ("options", {"data"}), ("train", {"data", "measure", "model", "options", "report", "store", "tvkd", "use"}), ("figures", {"report"}),
    ("evidence", {"data", "figures", "measure", "model", "options", "store", "train", "tvkd"})])
def test_imports(name, allowed):
    """tvkd and model import torch alone; data numpy, torch and tiktoken; nothing imports what comes after it."""
    tree = ast.parse((ROOT / f"{name}.py").read_text(encoding="utf-8"))
    found = {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
    found |= {node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    assert {module.split(".")[0] for module in found} - sys.stdlib_module_names - {"torch"} == allowed


def test_readme_names_exist():
    """Every test and every option the README names is there; every function of tvkd.py is in its table."""
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    tests = "".join(path.read_text(encoding="utf-8") for path in ROOT.glob("tests/*.py"))
    for name in re.findall(r"`(test_\w+)`", readme):
        assert f"def {name}(" in tests, name
    options = {f.name for f in fields(Config)} | {"help", "index-url", "impl", "function", "tb", "results", "jobs", "standalone",
                                              "nproc_per_node", "sizes"}
    assert set(re.findall(r"--([a-z][\w-]+)", readme)) <= options
    functions = re.findall(r"^def ([a-z]\w+)", (ROOT / "tvkd.py").read_text(encoding="utf-8"), re.MULTILINE)
    assert len(functions) == 10 and all(f"| `{name}`" in readme or f"`{name}` |" in readme for name in functions)


def test_text_files_are_opened_as_utf8():
    """On Windows the default encoding is another."""
    for path in [*ROOT.glob("*.py"), *ROOT.glob("tests/*.py")]:
        for call in re.findall(r"(?:(?<!os\.)\bopen|read_text|write_text)\([^\n]*", path.read_text(encoding="utf-8")):
            assert "encoding=" in call or 'b")' in call or path.parent.name == "tests", f"{path.name}: {call}"
