"""The command line from end to end: what a run leaves, prints and refuses, and how it is used."""

import contextlib
import errno
import io
import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, fields
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import data
import train
from conftest import ROOT, close
from data import Example, Pair
from harness.errors import CheckFailed, UserError
from harness import tokenizers
from harness import evaluate
from harness.evaluate import HeldOut, policy_kl
from harness.keep import file_of
from harness.options import Config, parse_args
from harness.outcome import exit_code
from harness.texts import load_task
from harness.weights import pretrained
from model import GPT, GPTConfig, both_responses, rows_logps
from small_run import SMALL, TINY, refused, rows_of, run, write_pairs

LABELS = ["teacher", "sft", "bc", "kd", "dpo", "tvkd implicit/value", "tvkd logits/hold"]


@pytest.fixture(scope="module")
def default_run(tmp_path_factory):
    """A run with the options of SMALL: its folder, rows, log and what it printed."""
    out, printed = tmp_path_factory.mktemp("default") / "out", io.StringIO()
    with contextlib.redirect_stdout(printed):
        rows, log = run(out)
    return SimpleNamespace(out=out, rows=rows, log=log, printed=printed.getvalue())


# --- the whole run -------------------------------------------------------------------------------

def test_results(default_run):
    """A row for the teacher, the student and each method; tvkd once for each value."""
    rows = default_run.rows
    assert list(rows) == LABELS
    for row in rows.values():
        assert row["seed"] == 0 and row["pref_n"] == 10 and row["kl"] >= 0
        assert 0 <= row["pref_acc"] <= 1 and math.isfinite(row["reward"]) and row["reward_ci"] >= 0
    # The fine-tuned student is its own reference: all ties, each half right.
    assert rows["sft"]["kl"] == 0 and rows["sft"]["pref_acc"] == 0.5
    assert rows["dpo"]["vs_dpo"] is None
    close(rows["kd"]["vs_dpo"], rows["kd"]["reward"] - rows["dpo"]["reward"])
    results = json.loads((default_run.out / "results.json").read_text(encoding="utf-8"))
    assert results["config"]["alpha"] == 1.0 and results["made"]["torch"] == torch.__version__
    measured = ("teacher", "sft", "bc", "kd", "dpo", "tvkd-implicit-value", "tvkd-logits-hold")
    stages = ("teacher-sft", "teacher-ref-logps", "teacher-dpo", "student-sft", "ref-logps",
              "teacher-answers", "values-implicit", "values-logits", *measured[2:])
    assert {path.name for path in (default_run.out / "seed0").iterdir()} == {
        "tokenizer.tiktoken", *(f"{stage}.pt" for stage in stages),
        *(f"{label}.row.pt" for label in measured),
        *(f"{label}.psi.pt" for label in measured[-2:])}


def test_log(default_run):
    """The four log-probs, margin and accuracy of preference stages, validation with KL and reward.

    DPO starts at ln 2; near there the loss is about -log sigmoid(mean margin).
    """
    lines = [line for line in default_run.log if line["stage"] == "dpo"]
    assert [line["step"] for line in lines] == [1, 2, 3, 4]
    close(lines[0]["loss"], math.log(2), 1e-5)
    assert {"policy_chosen", "policy_rejected", "ref_chosen", "ref_rejected", "margin",
            "accuracy"} <= set(lines[0])
    assert "val_kl" not in lines[0] and {"val_kl", "val_reward", "val_pref_acc"} <= set(lines[1])
    assert lines[3]["loss"] == pytest.approx(math.log(1 + math.exp(-lines[3]["margin"])), rel=0.05)


def test_what_is_printed(default_run):
    """Step 0 of the teacher's and the student's DPO and of both TVKD, progress, answers, table."""
    assert default_run.printed.count("expected 0.6931; ") == 2
    assert default_run.printed.count("step 0 check") == 4
    for part in ("true reward", "psi per token, implicit/value, chosen", "tokens/s",
                 "prompt: Describe the", "0 dropped because a response", "teacher: 9,136 param"):
        assert part in default_run.printed, part


def test_the_time_left_is_printed_from_step_5_on(tmp_path, capsys):
    run(tmp_path, "--methods=dpo", "--steps=6", sizes=TINY)
    lines = re.findall(r"^  dpo \d/6 .*", capsys.readouterr().out, re.MULTILINE)
    assert [line.endswith(" s left") for line in lines] == [False] * 4 + [True] * 2


def test_code_of_the_readme(default_run, monkeypatch, capsys):
    """The README's Python code reads the weights and the tokenizer of a run, and prints."""
    snippets = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(encoding="utf-8"),
                          re.DOTALL)
    monkeypatch.chdir(default_run.out.parent)
    assert snippets
    for snippet in snippets:
        exec(compile(snippet, "README.md", "exec"), {})
        assert capsys.readouterr().out.endswith("\n")


# --- using a run ---------------------------------------------------------------------------------

def test_ask(default_run, capsys):
    """Three answers of every model, with the true reward where the toy task has one; the same
    command repeats them. A free question has no reward."""
    printed = []
    for prompt in ("Describe the dog: black, tiny, quick, ancient.", ) * 2 + ("Describe it.",):
        assert train.main([f"--out={default_run.out}", f"--ask={prompt}", "--device=cpu"]) == 0
        printed.append(capsys.readouterr().out)
    assert printed[0] == printed[1] and "prompt: Describe the dog: black" in printed[0]
    for name in default_run.rows:
        assert len(re.findall(rf"^  {name} .*\(reward [+-]", printed[0], re.MULTILINE)) == 3
        assert len(re.findall(rf"^  {name} ", printed[2], re.MULTILINE)) == 3
    assert "reward" not in printed[2]


def test_ask_with_tokens(default_run, capsys):
    """psi of every token of the first answer: they add up to what is printed as their sum."""
    command = [f"--out={default_run.out}", "--ask=Describe the dog: black.", "--device=cpu"]
    assert train.main([*command, "--tokens=1"]) == 0
    printed = capsys.readouterr().out
    parts = re.findall(r"psi of the first answer of (.*), implicit.*\(sum (.*)\):\n  (.*)", printed)
    assert [name for name, _, _ in parts] == LABELS
    for _, total, tokens in parts:
        psi = [float(number) for number in re.findall(r"\[([+-]\d+\.\d\d)\]", tokens)]
        assert 1 <= len(psi) <= 12 and sum(psi) == pytest.approx(float(total), abs=0.005 * 13)


@pytest.fixture(scope="module")
def scored(default_run, tmp_path_factory):
    """The run's test pairs scored again, with a response of 200 bytes that does not fit."""
    pairs = [*data.toy_splits(24, 6, 10, 0).test, Pair("a", "b", "\u00e9" * 100)]
    path = write_pairs(tmp_path_factory.mktemp("pairs") / "pairs.jsonl", pairs)
    printed, out = io.StringIO(), default_run.out
    with contextlib.redirect_stdout(printed):
        assert train.main([f"--out={out}", f"--score={path}", "--tokens=1", "--device=cpu"]) == 0
    lines = (out / "scores.jsonl").read_text(encoding="utf-8").splitlines()
    return SimpleNamespace(pairs=pairs[:10], lines=[json.loads(line) for line in lines],
                           printed=printed.getvalue())


def test_score(default_run, scored):
    """The margins behind pref_margin and pref_acc of the table; the pairs as they were given."""
    assert ("11 pairs; 7 with the prompt cut from the left, 1 left out because a response does not "
            "fit in 64 tokens") in scored.printed
    assert [Pair(*(line[name] for name in ("prompt", "chosen", "rejected")))
            for line in scored.lines] == scored.pairs
    assert [line["pair"] for line in scored.lines] == list(range(10))
    for name, row in default_run.rows.items():
        margins = torch.tensor([line["margins"][name] for line in scored.lines])
        close(margins.mean(), row["pref_margin"], 1e-5)
        close(((margins > 0) + 0.5 * (margins == 0)).mean(), row["pref_acc"], 1e-6)


def test_score_gives_the_teachers_values_and_the_log_ratios_of_tokens(scored):
    """Values: teacher_beta (here 1) times the teacher's log-ratio, the sum of its tokens."""
    for line in scored.lines:
        values = {which: line[f"{which}_value"] for which in ("chosen", "rejected")}
        close(values["chosen"] - values["rejected"], line["margins"]["teacher"], 1e-4)
        for which, value in values.items():
            close(value, sum(line["log_ratios"]["teacher"][which]), 1e-4)
            for name, ratios in line["log_ratios"].items():
                assert len(ratios[which]) == len(line["tokens"][which])
                close(sum(ratios[which]), line["logps"][name][which] - line["logps"]["sft"][which]
                      if name not in ("teacher", "sft") else sum(ratios[which]), 1e-3)
            assert "".join(line["tokens"][which]) == f"{line[which]}{tokenizers.END_OF_TEXT}"
        assert not any(line["log_ratios"]["sft"]["chosen"])


def test_export(default_run, tmp_path, capsys):
    """Every model in a folder of its own, from which the same weights can be read again."""
    command = [f"--out={default_run.out}", f"--export={tmp_path}", "--device=cpu"]
    assert train.main(command) == 0
    names = [label.replace(" ", "-").replace("/", "-") for label in LABELS]
    names[:2] = "teacher-dpo", "student-sft"
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(names)
    content = torch.load(default_run.out / "seed0" / "dpo.pt", weights_only=True)
    again = pretrained("--student_init", tmp_path / "dpo", content["config"]["vocab_size"], 64)
    for name, tensor in again.state_dict().items():
        assert torch.equal(tensor, content["model"][name]), name


def test_use_of_a_run_that_is_not_there(capsys, tmp_path):
    for option in ("--ask=hi", f"--export={tmp_path / 'x'}"):
        assert ("--out: expected the folder of a finished run with --seed=0, got"
                in refused(capsys, f"--out={tmp_path}", option))
    assert list(tmp_path.iterdir()) == []


def edit(value, path, new):
    *before, last = path
    for key in before:
        value = value[key]
    value[last] = new


@pytest.mark.parametrize("path, new", [
    (["rows"], []), (["rows"], [1]), (["rows"], None), (["rows", 0, "method"], "../x"),
    (["rows", 0, "method"], "\x1b[2J"), (["rows", 0, "method"], 7), (["rows", 1, "seed"], "x"),
    (["config"], [1]), (["config"], None), (["config", "batch_size"], "8"),
    (["config", "batch_size"], -1), (["config", "max_new_tokens"], 10 ** 30),
    (["config", "beta"], math.inf), (["config", "beta"], None), (["config", "methods"], [1]),
    (["config", "block_size"], 63), (["config", "unknown"], 1), (["tokenizers"], {}),
    (["tokenizers", "0"], "another"),
])
def test_results_of_unknown_origin(default_run, tmp_path, capsys, path, new):
    """A results.json that no run wrote: --ask ends in a line, not in a traceback."""
    out = tmp_path / "out"
    shutil.copytree(default_run.out, out)
    results = json.loads((out / "results.json").read_text(encoding="utf-8"))
    edit(results, path, new)
    (out / "results.json").write_text(json.dumps(results), encoding="utf-8")
    status = train.main([f"--out={out}", "--ask=hi", "--device=cpu"])
    error = capsys.readouterr().err
    assert status == 2 and error.count("\n") == 1 and error[:-1].isprintable()
    assert error.startswith(f"train.py: {'' if 'trained with' in error else '--out: expected '}")


@pytest.mark.parametrize("name", ["..", "\x1b[2J", "a\nb", ""])
def test_names_of_unknown_origin(default_run, tmp_path, capsys, name):
    """The name of a method that another program gave: it would be printed, and name a folder."""
    out = tmp_path / "runs" / "out"
    shutil.copytree(default_run.out, out)
    results = json.loads((out / "results.json").read_text(encoding="utf-8"))
    results["rows"][2]["method"] = name
    (out / "results.json").write_text(json.dumps(results), encoding="utf-8")
    (out / "seed0" / "bc.pt").rename(out / "seed0" / file_of(name))
    for option in ("--ask=hi", f"--export={tmp_path / 'exported'}"):
        assert "rows: expected names of methods, got " in refused(capsys, f"--out={out}", option)
    assert [path.name for path in tmp_path.iterdir()] == ["runs"]


def test_a_refused_or_broken_run_leaves_no_mixture(default_run, tmp_path, capsys):
    """A refused command, or one that fails before it has made anything, leaves a run as it was.

    One that has replaced a file takes the table away, so that --ask refuses.
    """
    out = tmp_path / "out"
    shutil.copytree(default_run.out, out)
    before, command = (out / "results.json").read_bytes(), [*SMALL, f"--out={out}"]
    refused(capsys, f"--out={out}", "--data=missing.jsonl")
    assert train.main([*command, "--teacher_sft_lr=1e6", "--teacher_sft_steps=40"]) == 1
    assert (out / "results.json").read_bytes() == before
    assert train.main([f"--out={out}", "--ask=hi", "--device=cpu"]) == 0
    assert train.main([*command, "--teacher_sft_steps=5", "--teacher_dpo_lr=1e6",
                       "--teacher_dpo_steps=40"]) == 1
    capsys.readouterr()
    assert "results.json" in refused(capsys, f"--out={out}", "--ask=hi")


# --- what must be equal, and what must not -------------------------------------------------------

NAMES = ("method", "value", "terminal", "seed", "vs_dpo", "vs_dpo_ci")


def numbers(row):
    return {name: x for name, x in row.items() if name not in NAMES}


def rerun(default_run, tmp_path, *options):
    """The rows of the run with other options, in a copy: only what depends on them is trained."""
    out = tmp_path / "copy"
    shutil.rmtree(out, ignore_errors=True)
    shutil.copytree(default_run.out, out)
    assert train.main([*SMALL, f"--out={out}", *options]) == 0
    return rows_of(out)


def test_strict_shaping_trains_to_the_same_numbers_as_dpo(default_run, tmp_path):
    """terminal "zero" and alpha 0 are DPO to the last digit; every other option of the loss moves
    the student."""
    dpo, tvkd = (numbers(default_run.rows[name]) for name in ("dpo", "tvkd implicit/value"))
    only = ("--methods=tvkd", "--value=implicit")
    rows = rerun(default_run, tmp_path, *only, "--terminal=zero", "--alpha=3")
    assert numbers(rows["tvkd implicit/zero"]) == dpo
    assert numbers(rerun(default_run, tmp_path, *only, "--alpha=0")["tvkd implicit/value"]) == dpo
    assert tvkd["pref_margin"] != dpo["pref_margin"]
    for change in ("--alpha=2", "--alpha=-1", "--beta=0.5", "--gamma=0.5", "--terminal=hold",
                   "--teacher_beta=0.5"):
        *_, row = rerun(default_run, tmp_path, *only, change).values()
        assert row["method"] == "tvkd" and row["pref_margin"] != tvkd["pref_margin"], change


def test_runs_repeat_and_measuring_changes_nothing(default_run, tmp_path):
    """The same rows with other intervals of the log, with fewer methods beside, and as one of two
    seeds; another seed gives others."""
    rare = ("--eval_interval=1000", "--log_interval=1000")
    both, _ = run(tmp_path, *rare, "--methods=tvkd,dpo", "--value=implicit", "--seeds=2")
    labels = ["teacher", "sft", "tvkd implicit/value", "dpo"]
    assert list(both) == [*labels, *(f"{label} 1" for label in labels)]
    for name in labels:
        assert numbers(both[name]) == numbers(default_run.rows[name]), name
    assert numbers(both["dpo"]) != numbers(both["dpo 1"])
    alone, _ = run(tmp_path, "--seed=1", "--methods=dpo")
    assert numbers(alone["dpo 1"]) == numbers(both["dpo 1"])


# --- another method ------------------------------------------------------------------------------

@dataclass(frozen=True, eq=False)
class IPO(train.OfPairs):
    """(log-ratio of chosen - of rejected - 1 / (2 beta))^2, arXiv 2310.12036."""
    ref_logps: torch.Tensor
    beta: float

    def __call__(self, model, ids):
        both = self.rows(ids.tolist())
        logps = train.four_logps(model, both, self.ref_logps[:, ids])
        ratio = (logps[0] - logps[2]) - (logps[1] - logps[3])
        return train.with_metrics((ratio - 1 / (2 * self.beta)) ** 2, logps, self.beta, both)


def quarter(loss, ids):
    """At step 0 the ratio is 0: (1 / (2 beta))^2 for each pair."""
    return torch.full((len(ids),), 1 / (4 * loss.beta ** 2))


def test_a_method_is_one_class_and_one_line(tmp_path, monkeypatch, capsys):
    """IPO at beta 1/2: the loss at step 1 is (1 / (2 beta))^2 = 1; it has a row in the table."""
    ipo = train.Method(IPO, "lr", ("pairs", "ref_logps", "beta"), quarter)
    monkeypatch.setitem(train.METHODS, "ipo", ipo)
    rows, log = run(tmp_path, "--methods=dpo,ipo", "--beta=0.5", sizes=TINY)
    assert list(rows) == ["teacher", "sft", "dpo", "ipo"] and rows["ipo"]["vs_dpo"] is not None
    [first] = [line for line in log if line["stage"] == "ipo" and line["step"] == 1]
    close(first["loss"], 1.0, 1e-4)
    assert "loss 1.0000, expected 1.0000; margin" in capsys.readouterr().out
    assert train.main([f"--out={tmp_path}", "--ask=hi", "--device=cpu"]) == 0
    assert "\n  ipo   " in capsys.readouterr().out


def test_an_input_that_nobody_has_is_refused_at_once():
    """Not by a KeyError after the teacher was trained."""
    with pytest.raises(ValueError, match="inputs: expected some of pairs, ref_logps"):
        train.Method(train.DPO, "lr", ("pairs", "ref_logp", "beta"))


# --- real preferences ----------------------------------------------------------------------------

@pytest.fixture
def preferences(tmp_path):
    """A JSONL file with pairs in all four layouts, 40 prompts."""
    path, lines = tmp_path / "pairs.jsonl", []
    for i in range(40):
        question, good, bad = f"What is {i} and one?", f"It is {i + 1}.", f"It is {i}, or so."
        user, hh = [{"role": "user", "content": question}], f"\n\nHuman: {question}\n\nAssistant:"
        chosen, rejected = ([{"role": "assistant", "content": text}] for text in (good, bad))
        lines.append([{"prompt": question, "chosen": f" {good}", "rejected": f" {bad}"},
                      {"prompt": user, "chosen": chosen, "rejected": rejected},
                      {"chosen": user + chosen, "rejected": user + rejected},
                      {"chosen": f"{hh} {good}", "rejected": f"{hh} {bad}"}][i % 4])
    path.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    return path


def test_real_preferences(preferences, tmp_path, capsys):
    rows, _ = run(tmp_path / "out", f"--data={preferences}", "--train_pairs=0")
    assert list(rows) == LABELS
    assert rows["dpo"]["reward"] is None and rows["dpo"]["pref_n"] == 10
    printed = capsys.readouterr().out
    assert "n = 10 held-out pairs" in printed and "true reward" not in printed
    assert "train: 24 of 24 pairs; 0 with the prompt cut" in printed


def test_what_is_cut_and_dropped_is_counted(preferences, tmp_path, capsys):
    """block_size 16 cuts some prompts and drops no response; 4 leaves no pair at all."""
    command = [*SMALL, f"--data={preferences}", "--train_pairs=0"]
    load_task(parse_args([*command, "--block_size=16"], train.METHODS), 0,
              train.load_pairs(preferences))
    assert re.search(r"train: 24 of 24 pairs; [1-9]\d* with the prompt cut from the left, 0 dropp",
                     capsys.readouterr().out)
    error = refused(capsys, *command, "--block_size=4", f"--out={tmp_path / 'out'}")
    assert "--block_size: expected room for a prompt and a response (sft), got 4" in error


def test_pairs_left_out_are_counted(preferences, capsys):
    """Of 40 pairs 20, 6 and 10 are asked for. Then a pair comes twice, and once with its labels
    swapped."""
    config = parse_args([*SMALL, f"--data={preferences}", "--train_pairs=20"], train.METHODS)
    pairs = train.load_pairs(preferences)
    first = pairs[0]
    swapped = Pair(first.prompt, first.rejected, first.chosen)
    for more, numbers in (([], (40, 4, 0, 0)), ([first, swapped], (42, 6, 1, 2))):
        load_task(config, 0, pairs + more)
        printed = capsys.readouterr().out
        assert numbers == tuple(map(int, re.search(
            r": (\d+) pairs; (\d+) left out by --train_pairs; kept: (\d+) that repeat another, "
            r"(\d+) that another contradicts\n", printed).groups()))


class Overwriting:
    """train.load_task, which overwrites the file before it goes on."""

    def __init__(self, path):
        self.path, self.load, self.seen = path, train.load_task, []

    def __call__(self, config, seed, pairs):
        self.seen.append(pairs)
        self.path.write_text("no JSON\n", encoding="utf-8")
        return self.load(config, seed, pairs)


def test_the_file_is_read_once_for_all_seeds(preferences, tmp_path, monkeypatch):
    """Both seeds see the same pairs, although the file has changed between them."""
    loading = Overwriting(preferences)
    monkeypatch.setattr(train, "load_task", loading)
    rows, _ = run(tmp_path / "out", f"--data={preferences}", "--seeds=2", "--methods=dpo",
                  sizes=[*TINY, "--train_pairs=20"])
    assert list(rows)[2::3] == ["dpo", "dpo 1"]
    assert loading.seen[0] is loading.seen[1] and len(loading.seen[0]) == 40


# --- the teacher's values from a file ------------------------------------------------------------

@pytest.fixture(scope="module")
def with_teacher(tmp_path_factory):
    """40 pairs, TVKD trained on them with a teacher inside, and their scores by that teacher."""
    folder = tmp_path_factory.mktemp("values")
    path = write_pairs(folder / "pairs.jsonl", data.toy_splits(38, 1, 1, 3).train + [
        Pair(f"Say {i}.", " yes", " no, no") for i in range(2)])
    options = [*TINY, "--block_size=200", "--train_pairs=0", "--val_pairs=4", "--test_pairs=4",
               "--methods=dpo,tvkd", "--alpha=3", "--teacher_dpo_lr=1e-2", "--student_pairs=12"]
    _, log = run(folder / "out", f"--data={path}", "--value=implicit", sizes=options)
    assert train.main([f"--out={folder / 'out'}", f"--score={path}", "--device=cpu"]) == 0
    return SimpleNamespace(options=options, log=log, scores=folder / "out" / "scores.jsonl")


def losses(log, stage):
    return [line["loss"] for line in log if line["stage"] == stage]


def test_values_from_a_file_give_the_losses_of_the_run_with_the_teacher(with_teacher, tmp_path):
    """--score, then --value=given on its file: the same losses at every step, and no teacher."""
    rows, log = run(tmp_path / "given", f"--data={with_teacher.scores}", "--value=given",
                    sizes=with_teacher.options)
    assert list(rows) == ["sft", "dpo", "tvkd given/value"]
    assert not any(line["stage"].startswith("teacher") for line in log)
    expected = losses(with_teacher.log, "tvkd implicit/value")
    close(losses(log, "tvkd given/value"), expected, 1e-5)
    close(losses(log, "dpo"), losses(with_teacher.log, "dpo"), 1e-5)
    assert abs(expected[0] - math.log(2)) > 1e-2 and len(expected) == 4     # psi is not nothing


def test_the_teacher_may_have_another_vocabulary(with_teacher, tmp_path):
    """The file was scored with 300 ids, the student has 270. Step 1 from the file's numbers alone:
    the mean of -log sigmoid(-3 (V_w - V_l)) over the first batch."""
    options = [*with_teacher.options, "--vocab_size=270", f"--data={with_teacher.scores}",
               "--value=given", "--student_pairs=5"]
    _, log = run(tmp_path / "given", sizes=options)
    task = load_task(parse_args(options, train.METHODS), 0, train.load_pairs(with_teacher.scores))
    assert task.tokenizer.n_vocab == 270
    lines = [json.loads(line) for line in
             with_teacher.scores.read_text(encoding="utf-8").splitlines()]
    values = {line["prompt"]: line["chosen_value"] - line["rejected_value"] for line in lines}
    expected = sum(math.log(1 + math.exp(3 * values[pair.prompt]))
                   for pair in task.texts.train[:5]) / 5
    close(losses(log, "tvkd given/value")[0], expected, 1e-5)


def test_values_are_needed_where_they_are_asked_for(preferences, tmp_path, capsys):
    """In every row; on real preferences, with the terminal and the discount they have."""
    command = [*SMALL, f"--data={preferences}", f"--out={tmp_path / 'out'}", "--value=given"]
    assert f'{preferences}:1: expected "chosen_value" and "rejected_value", which --value=given ' \
        in refused(capsys, *command)
    for option, expected in (("--gamma=0.9", "--gamma: expected 1"),
                             ("--terminal=zero", "--terminal: expected value")):
        assert f"{expected} beside --value=given, got " in refused(capsys, *command, option)
    assert "--value: expected --data beside given: the toy task has no" in refused(
        capsys, "--value=given")


# --- the numbers of the table --------------------------------------------------------------------

def test_true_accuracy_by_hand(monkeypatch):
    """Three pairs of true difference +2, -2 (a wrong label) and 0; all margins are positive.

    The first is right, the second wrong, the third is left out; without any the mean is unknown.
    """
    prompt, right, wrong = "Describe the cat: red, small, fast, old.", " The cat is red.", \
        " The cat is blue."
    texts = [Pair(prompt, right, wrong), Pair(prompt, wrong, right), Pair(prompt, right, right)]
    tokenizer = tokenizers.learn_tokenizer(data.toy_splits(30, 1, 1, 0).train, 300)
    _, ids, _ = data.encode(texts, tokenizer, 128)
    torch.manual_seed(0)
    model = GPT(GPTConfig(tokenizer.n_vocab, 128, 1, 2, 8))
    every = HeldOut(ids, texts, tokenizer, True, 1, 2, 8, 0)
    assert evaluate.cached_margins(model, model, 1.0, every).tolist() == [0, 0, 0]
    monkeypatch.setattr(evaluate, "cached_margins", lambda *args: torch.ones(len(args[3].pairs)))
    for part, expected in ((slice(0, 3), [1, 0]), (slice(2, 3), [])):
        held_out = HeldOut(ids[part], texts[part], tokenizer, True, 1, 2, 8, 0)
        metrics, each = evaluate.evaluate(model, model, 1.0, held_out)
        assert each["true_acc"].tolist() == expected
        assert metrics["true_acc"] == (0.5 if expected else None)


class Constant(torch.nn.Module):
    """Ignores its input."""

    def __init__(self, *probabilities):
        super().__init__()
        self.logits = torch.nn.Parameter(torch.tensor(probabilities).log())

    def forward(self, tokens, states):
        return self.logits.expand(int(states.sum()), 2)


def test_policy_kl_by_hand():
    """KL((.5, .5) || (.9, .1)) = 0.510826 a state; three states in each response: 1.532477. In one
    batch or in two."""
    rows = [Example([0, 1], [1, 1, 0]), Example([1], [0, 1, 0])]
    for batch_size in (2, 1):
        close(policy_kl(Constant(.5, .5), Constant(.9, .1), rows, batch_size), 3 * 0.510826, 1e-5)


def test_pair_logps_in_two_halves(monkeypatch):
    """Row 0 the chosen responses as one call scores them, row 1 the rejected ones, in the pairs'
    order, also from a model in training. Its dropout is off before the first half begins and until
    the last has ended."""
    torch.manual_seed(0)
    model = GPT(GPTConfig(9, 16, 1, 1, 8, dropout=0.5)).train()
    for n in (1, 3):
        pairs = [Pair([1 + i], [2 + i, 0], [3, 4 + i, 5, 0]) for i in range(n)]
        chosen, rejected = rows_logps(model, both_responses(pairs), 8).chunk(2)
        logps = evaluate.pair_logps(model, pairs, 8)
        close(logps[0], chosen, 1e-5)
        close(logps[1], rejected, 1e-5)
        assert model.training
    seen = []
    monkeypatch.setattr(evaluate, "part_logps", lambda model, batch_size, rows: (
        seen.append(model.training) or torch.zeros(len(rows))))
    evaluate.pair_logps(model, pairs, 8)
    assert seen == [False, False] and model.training


def test_an_unknown_number_is_null(tmp_path):
    """One held-out pair whose answers have the same true reward: neither an interval nor a true
    accuracy. rows_of and log_of read strict JSON, in which NaN is none."""
    seed = next(seed for seed in range(100) if same_reward(data.toy_splits(24, 2, 1, seed).test[0]))
    rows, _ = run(tmp_path, f"--seed={seed}", "--test_pairs=1", "--methods=dpo", sizes=TINY)
    [row] = [row for row in rows.values() if row["method"] == "dpo"]
    assert [row[name] for name in ("true_acc", "true_acc_ci", "reward_ci")] == [None] * 3
    assert row["pref_n"] == 1 and row["reward"] is not None


def same_reward(pair):
    return data.reward(pair.prompt, pair.chosen) == data.reward(pair.prompt, pair.rejected)


# --- the command line ----------------------------------------------------------------------------

@pytest.mark.parametrize("options, message", [
    (["--learning_rate=1"], "unrecognized arguments: --learning_rate=1"),
    (["--alph=1"], "unrecognized arguments: --alph=1"),
    (["--compile=1"], "unrecognized arguments: --compile=1"),
    (["--teacher_tokenizer=300"], "unrecognized arguments: --teacher_tokenizer=300"),
    (["--\x1b[31m\n=1"], "unrecognized arguments: --\ufffd[31m\ufffd=1"),
    (["--alpha=much"], "invalid float value: 'much'"),
    (["--alpha=nan"], "--alpha: expected a number from -1e+06 to 1e6, got nan"),
    (["--gamma=-1"], "--gamma: expected a number from 0 to 1e6, got -1.0"),
    (["--beta=0"], "--beta: expected a number from 1e-12 to 1e6, got 0.0"),
    (["--beta=1e-40"], "--beta: expected a number from 1e-12 to 1e6, got 1e-40"),
    (["--beta=-1"], "--beta: expected a number from 1e-12 to 1e6, got -1.0"),
    (["--lr=1e20", "--steps=1"], "--lr: expected a number from 1e-12 to 1e6, got 1e+20"),
    (["--methods=dpo,ppo"], "--methods: expected some of bc,kd,dpo,tvkd, each once, got dpo,ppo"),
    (["--methods="], "--methods: expected some of"),
    (["--methods=dpo,dpo"], "each once, got dpo,dpo"),
    (["--value=q"], "--value: expected some of implicit,logits,given"),
    (["--terminal=end"], "--terminal: expected one of zero, hold, value"),
    (["--precision=half"], "--precision: expected one of auto, float32, bfloat16"),
    (["--student_width=10"], "--student_width: expected a multiple of --student_heads=4, got 10"),
    (["--teacher_width=1000000000"], "--teacher_width: expected 1 to 100000, got 1000000000"),
    (["--steps=0"], "--steps: expected at least 1, got 0"),
    (["--batch_size=1" + "0" * 30], "--batch_size: expected 1 to 1000000, got 1000000"),
    (["--seed=99999999999999999999"], "--seed: expected 0 to 4611686018427387904, got 9999"),
    (["--trust_code=2"], "--trust_code: expected 0 to 1, got 2"),
    (["--ask="], "--ask: expected a value, got an empty one"),
    (["--export="], "--export: expected a value, got an empty one"),
    (["--ask=hi", "--steps=5"],
     "--steps: expected only --out, --seed, --device and --tokens beside --ask"),
    (["--tokens=1"], "--tokens: expected --ask or --score beside it"),
    (["--device=tpu"], "--device: expected one of auto, cpu, cuda, mps"),
    (["--train_pairs=0"], "--train_pairs: expected at least 1 on the toy task"),
    (["--train_pairs=100000"],
     "--train_pairs + --val_pairs + --test_pairs: expected at most 15552"),
    (["--student_pairs=50", "--train_pairs=40"],
     "--student_pairs: expected at most the 40 training pairs, got 50"),
    (["--vocab_size=100", "--train_pairs=9"], "--vocab_size: expected at least 257"),
    (["--tokenizer=gpt9", "--train_pairs=9"], "--tokenizer: expected one of"),
    (["--data=missing.jsonl"], "missing.jsonl: expected a readable JSONL file"),
    (["--data=a\nb\x1b[31m\x07\u202e"], "a\ufffdb\ufffd[31m\ufffd\ufffd: expected a readable"),
])
def test_bad_options(capsys, tmp_path, options, message):
    out = tmp_path / "out"
    assert message in refused(capsys, f"--out={out}", *options) and not out.exists()


@pytest.mark.parametrize("line, message", [
    ('{"prompt": "a", "chosen": ', "expected one JSON object"),
    ('{"prompt": "a", "chosen": "b"}', 'expected a field "rejected"'),
    ('{"prompt": "a", "chosen": "", "rejected": "b"}', 'expected text in "chosen"'),
    ('{"prompt": "a", "chosen": "b", "rejected": "b"}', "the same response twice"),
    ('{"chosen": "\\n\\nHuman: a\\n\\nAssistant: b", "rejected": "c"}', "share the prompt"),
])
def test_bad_data_names_file_and_line(capsys, tmp_path, line, message):
    path = tmp_path / "pairs.jsonl"
    path.write_text(f'{{"prompt": "a", "chosen": "b", "rejected": "c"}}\n{line}\n',
                    encoding="utf-8")
    error = refused(capsys, f"--data={path}", f"--out={tmp_path / 'out'}")
    assert f"{path}:2: " in error and message in error


def test_help_lists_every_option_in_its_section(capsys):
    """In the order of Config, each with its default; the sections with their titles."""
    with pytest.raises(SystemExit) as stop:
        train.main(["--help"])
    printed = capsys.readouterr().out
    options = re.findall(r"^  --(\w+) [A-Z_]+", printed, re.MULTILINE)
    assert stop.value.code == 0 and options == [f.name for f in fields(Config)]
    groups = [f.metadata["group"] for f in fields(Config) if f.metadata["group"]]
    assert [line[:-1] for line in printed.splitlines() if line[:-1] in groups] == groups
    assert " ".join(printed.split()).count(" (default: ") == len(options)


@pytest.mark.parametrize("options, status, message", [
    (["--teacher_beta=1e4", "--alpha=1e6"], 0, ""),
    (["--beta=1e-12"], 0, ""),
    (["--lr=1e6"], 1, "train.py: dpo: after step 1: .*expected finite .* a lower learning rate"),
])
def test_extreme_values(default_run, tmp_path, capsys, options, status, message):
    """What is accepted runs, or ends in a line that is true."""
    out = tmp_path / "out"
    shutil.copytree(default_run.out, out)
    command = [*SMALL, f"--out={out}", "--methods=dpo,tvkd", "--value=implicit", "--steps=1"]
    assert train.main([*command, *options]) == status
    error = capsys.readouterr().err
    assert re.search(message, error) and error.count("\n") == (status > 0)


def test_a_loss_that_is_not_finite_stops(tmp_path, capsys):
    assert train.main([*TINY, f"--out={tmp_path}", "--teacher_sft_lr=1e6",
                       "--teacher_sft_steps=40"]) == 1
    assert re.search(r"train.py: teacher-sft: loss \S+, gradient norm nan at step \d+;.* "
                     r"than 1000000.0; batch \[\d", capsys.readouterr().err)


def fails(error):
    """A run that raises the error."""
    raise error


NO_ROOM = "out of memory; try a smaller --micro_batch, --samples or model"


@pytest.mark.parametrize("error, status, message", [
    (UserError("--x: expected y"), 2, "--x: expected y"),
    (FloatingPointError("loss nan\x1b[0m"), 1, "loss nan\ufffd[0m"),
    (KeyboardInterrupt(), 130, "stopped; the same command continues from here"),
    (MemoryError(), 2, NO_ROOM), (torch.OutOfMemoryError("x"), 2, NO_ROOM),
    (CheckFailed("the step 0 check failed: x"), 1, "the step 0 check failed: x"),
    (OSError(errno.ENOSPC, "No space left", "a\nb"), 2,
     "expected files that can be read and written: [Errno 28] No space left: 'a\\nb'"),
])
def test_how_a_run_ends(capsys, error, status, message):
    assert exit_code(fails, error) == status
    assert capsys.readouterr().err == f"train.py: {message}\n"


def test_memory_that_torch_cannot_have(capsys):
    """4 PB: torch's error for the CPU has no type of its own."""
    assert exit_code(torch.empty, 10 ** 15) == 2
    assert capsys.readouterr().err == f"train.py: {NO_ROOM}\n"


def test_an_error_of_the_program_keeps_its_traceback():
    for error in (RuntimeError("the step 0 check failed"), RuntimeError("memory"), TypeError("x")):
        with pytest.raises(type(error)):
            exit_code(fails, error)


# --- surroundings --------------------------------------------------------------------------------

def forked(prepare, out):
    """A run in a process of its own, after prepare() -> its exit status and its stderr."""
    errors = out.with_suffix(".errors")
    pid = os.fork()
    if pid == 0:
        try:
            sys.stderr = open(errors, "w", encoding="utf-8", buffering=1)
            prepare()
            os._exit(train.main([*TINY, f"--out={out}", "--methods=tvkd"]))
        except BaseException:
            sys.excepthook(*sys.exc_info())
        finally:
            os._exit(99)
    status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    return status, errors.read_text(encoding="utf-8")


def close_stdout():
    """As a shell does with >&-: no file descriptor 1, and sys.stdout is None."""
    os.close(1)
    sys.stdout = None


def print_to_nobody():
    """To a pipe whose reader has left, as `head` does."""
    read, write = os.pipe()
    os.close(read)
    sys.stdout = os.fdopen(write, "w", encoding="utf-8", buffering=1)


def delete_working_folder():
    os.chdir(tempfile.mkdtemp())
    os.rmdir(os.getcwd())


def print_to_full():
    sys.stdout = open("/dev/full", "w", encoding="utf-8")


def test_a_closed_stdout(tmp_path):
    """The run ends well, with its results. Where the reader of a pipe left, or the disk is full, it
    ends in one line."""
    assert forked(close_stdout, tmp_path / "out") == (0, "") and len(rows_of(tmp_path / "out")) == 4
    assert forked(print_to_nobody, tmp_path / "left") == (
        141, "train.py: stopped: nobody reads its output; the same command continues\n")
    assert forked(print_to_full, tmp_path / "full") == (
        2, "train.py: expected files that can be read and written: stdout: [Errno 28] No space "
        "left on device\n")


def test_a_deleted_working_folder(tmp_path):
    assert forked(delete_working_folder, tmp_path / "out") == (
        2, "train.py: expected a working folder that exists, got one that was deleted\n")


def odd_surroundings():
    """A terminal in ASCII, and what another program's processes left in the environment."""
    sys.stdout = open(os.devnull, "w", encoding="ascii")
    os.environ |= {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1", "MASTER_ADDR": "localhost",
                   "MASTER_PORT": "1"}


def test_odd_surroundings(tmp_path):
    """The \u00b1 of the table is not in ASCII; nobody waits for a second process."""
    assert forked(odd_surroundings, tmp_path / "out") == (0, "")


def test_ctrl_c_again_and_again_while_the_command_ends(tmp_path):
    """Five of them, 10 ms apart: one line that says how to go on, and nothing behind it."""
    command = [sys.executable, "-W", "error", str(ROOT / "train.py"), *TINY, f"--out={tmp_path}",
               "--teacher_sft_steps=100000"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    while " loss " not in process.stdout.readline():
        assert process.poll() is None
    for _ in range(5):
        process.send_signal(signal.SIGINT)
        time.sleep(0.01)
    last = process.communicate()[1].splitlines()[-2:]
    assert process.returncode == 130 and last == [
        "stopping after this step; Ctrl-C again stops at once",
        "train.py: stopped; the same command continues from here"]


def test_a_folder_whose_name_is_no_text(tmp_path):
    """results.json holds no half characters, and no file of the run stays open."""
    out = f"{tmp_path}/\udcff"
    command = [sys.executable, "-W", "error", str(ROOT / "train.py"), *TINY, f"--out={out}",
               "--methods=dpo"]
    done = subprocess.run(command, capture_output=True)
    assert (done.returncode, done.stderr) == (0, b"")
    results = (Path(out) / "results.json").read_text(encoding="utf-8")
    assert json.loads(results)["config"]["out"] == f"{tmp_path}/\ufffd"


@pytest.mark.slow
def test_as_a_command(tmp_path):
    """python train.py in a shell, in ASCII and with >&-. A run on the CPU never asks for CUDA."""
    command = [sys.executable, str(ROOT / "train.py"), *TINY, "--methods=tvkd"]
    ascii_only = {**os.environ, "PYTHONIOENCODING": "ascii"}
    done = subprocess.run([*command, f"--out={tmp_path / 'out'}"], capture_output=True,
                          env=ascii_only)
    assert done.returncode == 0 and b"0.500 ? " in done.stdout and done.stderr == b""
    done = subprocess.run(["sh", "-c", 'exec "$0" "$@" >&-', *command, f"--out={tmp_path / 'no'}"],
                          stderr=subprocess.PIPE)
    assert done.returncode == 0 and done.stderr == b""
    assert rows_of(tmp_path / "no") == rows_of(tmp_path / "out")
    code = ("import sys, torch, train; status = train.main(sys.argv[1:]); "
            "sys.exit(status or torch.cuda.is_initialized())")
    done = subprocess.run([sys.executable, "-c", code, *command[2:], f"--out={tmp_path / 'cuda'}"],
                          capture_output=True, env={**os.environ, "PYTHONPATH": str(ROOT)})
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("name", ["scores.jsonl", "results.json", "seed0/dpo.pt", "mine.jsonl"])
@pytest.mark.parametrize("option", ["data", "teacher_init", "student_init", "score"])
def test_inputs_do_not_lie_in_out(default_run, tmp_path, capsys, option, name):
    """The run would overwrite them, or remove them as stale. Nothing in the folder changes."""
    out = tmp_path / "out"
    shutil.copytree(default_run.out, out)
    for path in (out / "scores.jsonl", out / "mine.jsonl"):
        path.write_text("{}\n", encoding="utf-8")
    before = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    sizes = () if option == "score" else TINY[:1]
    message = refused(capsys, *sizes, f"--{option}={out / name}", f"--out={out}")
    assert f"--{option}: expected a file outside --out={out}" in message
    assert {path: path.read_bytes() for path in out.rglob("*") if path.is_file()} == before


@pytest.mark.parametrize("name", ["results.json", "log.jsonl", ".lock", "seed0/dpo.pt",
                                  "seed0/tokenizer.tiktoken"])
def test_a_pipe_in_out_is_not_opened(default_run, tmp_path, capsys, name):
    """Opening it would wait for a writer for ever. Refused before anything is touched."""
    out = tmp_path / "out"
    shutil.copytree(default_run.out, out)
    (out / name).unlink(missing_ok=True)
    os.mkfifo(out / name)
    log = None if name == "log.jsonl" else (out / "log.jsonl").read_bytes()
    assert f"{name}: expected a file as a run wrote it" in refused(capsys, *SMALL, f"--out={out}")
    if name not in ("log.jsonl", ".lock"):
        assert name in refused(capsys, f"--out={out}", "--ask=hi", "--device=cpu")
    assert log is None or (out / "log.jsonl").read_bytes() == log


def test_export_looks_at_all_targets_first(default_run, tmp_path, capsys):
    """A file where the last model would go: refused before the first one is written."""
    (tmp_path / "tvkd-logits-hold").write_text("x", encoding="utf-8")
    assert "--export: expected a folder or nothing at " in refused(
        capsys, f"--out={default_run.out}", f"--export={tmp_path}", "--device=cpu")
    assert [path.name for path in tmp_path.iterdir()] == ["tvkd-logits-hold"]


def test_a_folder_to_write_to(capsys, tmp_path):
    (tmp_path / "file").write_text("x", encoding="utf-8")
    for out in (tmp_path / "file", tmp_path / "file" / "out"):
        assert "--out: expected a folder that can be written, got " in refused(
            capsys, *TINY, f"--out={out}")


def test_nothing_reaches_the_terminal_but_text(tmp_path, capsys):
    """ESC, BEL, C1, right-to-left override and line feed in prompts, answers and file names: the
    lines of a run, of the same run again and of its use are printable."""
    odd = "\x1b[31m\x07\x9b2J\u202e"
    path = write_pairs(tmp_path / f"pairs {odd}\nline.jsonl", [
        Pair(f"{odd} {i}?", f" {odd} yes", f" no {odd}\n") for i in range(40)])
    out = tmp_path / f"out {odd}\nline"
    command = [*TINY, f"--data={path}", f"--out={out}", "--methods=dpo", "--train_pairs=20"]
    use = [f"--out={out}", "--device=cpu"]
    for argv in (command, command, [*command, "--beta=2"],
                 [*use, f"--ask={odd} why?", "--tokens=1"], [*use, f"--score={path}"],
                 [*use, f"--export={tmp_path / odd}"], [*TINY, f"--out={path}"]):
        train.main(argv)
        printed = capsys.readouterr()
        lines = (printed.out + printed.err).split("\n")
        assert len(lines) > 1 and [line for line in lines if not line.isprintable()] == []
        assert not any(line.startswith("line") for line in lines)
