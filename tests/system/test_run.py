"""The command line from end to end: what a run leaves, prints and refuses, and how it is used."""

import errno
import json
import math
import os
import re
import subprocess
import sys
from contextlib import closing
from dataclasses import fields
from pathlib import Path

import pytest
import torch

import data
import model
import train
from conftest import ROOT, close
from data import Pair
from harness import keep, options
from harness.errors import CheckFailed, UserError
from harness.options import Config, parse_args
from harness.command import exit_code
from harness.preferences import load_pairs
from harness.texts import load_task
from small_run import (SMALL, TINY, bytes_of, ended, forked, main_after, refused, rows_of, run,
                       write_pairs)
from test_wiring import IPO

LABELS = ["teacher", "sft", "bc", "kd", "dpo", "tvkd implicit/value", "tvkd logits/hold"]


# --- the whole run -------------------------------------------------------------------------------

def test_results(default_run):
    """A row for the teacher, the student and each method; tvkd once for each value. Printed are
    step 0 of the teacher's and the student's DPO and of both TVKD, progress, answers, table."""
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
    assert not torch.cuda.is_initialized()                      # on a CPU nobody asks for CUDA
    stages = ("teacher-sft", "teacher-ref-logps", "ref-logps", "teacher-answers", "values-implicit",
              "values-logits", "implicit.psi", "logits.psi", *LABELS,
              *(f"{label}.row" for label in LABELS))
    assert {path.name for path in (default_run.out / "seed0").iterdir()} == {
        "tokenizer.tiktoken", *map(keep.file_of, stages)}
    assert default_run.printed.count("expected 0.6931; ") == 2
    assert default_run.printed.count("first batch: loss ") == 4
    for part in ("true reward", "psi per token, implicit/value, chosen", "tokens/s",
                 "prompt: Describe the", "0 dropped because a response", "teacher: 9,136 param"):
        assert part in default_run.printed, part


def test_code_of_the_docs(default_run, monkeypatch, capsys):
    """The page's Python code reads the weights and the tokenizer of a run, and prints."""
    page = (ROOT / "docs" / "own-data.md").read_text(encoding="utf-8")
    snippets = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    monkeypatch.chdir(default_run.out.parent)
    assert snippets
    for snippet in snippets:
        exec(compile(snippet, "own-data.md", "exec"), {})
        assert capsys.readouterr().out.endswith("\n")


# --- using a run ---------------------------------------------------------------------------------

def test_ask(default_run, capsys):
    """Three answers of every model, with the true reward where the toy task has one; the same
    command repeats them. A free question has no reward."""
    printed, command = [], [f"--out={default_run.out}", "--device=cpu"]
    for prompt in ("Describe the dog: black, tiny, quick, ancient.", ) * 2 + ("Describe it.",):
        assert train.main([*command, f"--ask={prompt}"]) == 0
        printed.append(capsys.readouterr().out)
    assert printed[0] == printed[1] and "prompt: Describe the dog: black" in printed[0]
    for name in default_run.rows:
        assert len(re.findall(rf"^  {name} .*\(reward [+-]", printed[0], re.MULTILINE)) == 3
        assert len(re.findall(rf"^  {name} ", printed[2], re.MULTILINE)) == 3
    assert "reward" not in printed[2]
    assert "only know prompts like" not in printed[0] and "only know prompts like" in printed[2]
    for more, message in ((["--ask=a\udcffb"], "--ask: expected text in UTF-8"),
                             (["--seed=1", "--ask=a"], "--seed: expected one of the run's, 0")):
        assert message in refused(capsys, *command, *more)


def test_score(default_run, out, tmp_path, capsys):
    """The run's test pairs again, with a response of 200 bytes that does not fit: the margins
    behind pref_margin and pref_acc of the table, and the pairs as they were given. The teacher's
    values are teacher_beta (here 1) times its log-ratios. In float32, sums of some hundred nats
    are right to 1e-4."""
    pairs = [*data.toy_splits(24, 6, 10, 0).test, Pair("a", "b", "\u00e9" * 100)]
    path = write_pairs(tmp_path / "pairs.jsonl", pairs)
    assert train.main([f"--out={out}", f"--score={path}", "--device=cpu"]) == 0
    assert ("11 pairs; 7 with the prompt cut from the left, 1 left out because a response does not "
            "fit in 64 tokens\n") in capsys.readouterr().out
    lines = (out / "scores.jsonl").read_text(encoding="utf-8").splitlines()
    lines = [json.loads(line) for line in lines]
    assert [Pair(*(line[name] for name in Pair._fields[:3])) for line in lines] == pairs[:10]
    assert [line["pair"] for line in lines] == list(range(10))
    for name, row in default_run.rows.items():
        margins = torch.tensor([line["margins"][name] for line in lines])
        close(margins.mean(), row["pref_margin"], 1e-3)
        close(((margins > 0) + 0.5 * (margins == 0)).mean(), row["pref_acc"], 1e-6)
    for line in lines:
        values, logps = (line["chosen_value"], line["rejected_value"]), line["logps"]
        close(values[0] - values[1], line["margins"]["teacher"], 1e-3)
        differences = {which: logps["dpo"][which] - logps["sft"][which] for which in logps["dpo"]}
        close(differences["chosen"] - differences["rejected"], line["margins"]["dpo"], 1e-3)


@pytest.mark.parametrize("path, new", [
    (["models"], {}), (["models"], None), (["models", "0"], [1]), (["models", "0"], {}),
    (["models", "0", "tokenizer"], "another"), (["models", "0", "dpo"], "another"),
    (["models", "0", "../x"], "0"), (["models", "0", "\x1b[2J"], "0"), (["models", "0", "a\nb"], 0),
    (["config"], [1]), (["config"], None), (["config", "batch_size"], math.inf),
    (["config", "batch_size"], -1), (["config", "max_new_tokens"], 10 ** 30),
    (["config", "beta"], math.inf), (["config", "beta"], None), (["config", "unknown"], 1),
])
def test_results_of_unknown_origin(out, tmp_path, capsys, path, new):
    """A results.json that no run wrote: --ask and --export end in a line, not in a traceback, and
    write nothing."""
    results = json.loads((out / "results.json").read_text(encoding="utf-8"))
    value = results
    for key in path[:-1]:
        value = value[key]
    value[path[-1]] = new
    results["digest"] = keep.digest_of([results.get("config"), results.get("models")])
    (out / "results.json").write_text(json.dumps(results), encoding="utf-8")
    for option in ("--ask=hi", f"--export={tmp_path / 'x'}"):
        assert refused(capsys, f"--out={out}", option, "--device=cpu").startswith(
            "train.py: --out: expected ")
    assert [path.name for path in tmp_path.iterdir()] == ["runs"]


def test_a_refused_or_broken_run_leaves_no_mixture(out, capsys):
    """A refused command, or one that fails before it has made anything, leaves a run as it was. One
    that has replaced a model leaves the table, which --ask then refuses."""
    before, command = (out / "results.json").read_bytes(), [*SMALL, f"--out={out}"]
    refused(capsys, f"--out={out}", "--data=missing.jsonl")
    assert train.main([*command, "--teacher_sft_lr=1e6", "--teacher_sft_steps=40"]) == 1
    ask = [f"--out={out}", "--ask=hi", "--device=cpu"]
    assert train.main(ask) == 0
    assert train.main([*command, "--teacher_sft_steps=5", "--teacher_dpo_lr=1e6",
                       "--teacher_dpo_steps=40"]) == 1
    assert (out / "results.json").read_bytes() == before
    capsys.readouterr()
    assert "teacher-sft.pt: expected the model of this run's table" in refused(capsys, *ask)


def test_what_a_run_did_not_write(out, tmp_path, capsys):
    """A stranger's .lock, a log that is a link, options of the table changed, a doubled token."""
    theirs, ask = tmp_path / "theirs", [f"--out={out}", "--ask=hi", "--device=cpu"]
    (theirs / "seed0").mkdir(parents=True)
    for name in (".lock", "log.jsonl", "results.json"):
        (theirs / name).write_text("mine", encoding="utf-8")
    assert "without the .lock of a run" in refused(capsys, *SMALL, f"--out={theirs}")
    assert {(theirs / name).read_text() for name in ("log.jsonl", "results.json")} == {"mine"}
    assert "--ask: expected a value, got none" in refused(capsys, f"--out={out}", "--ask=--")
    (out / "log.jsonl").unlink()
    (out / "log.jsonl").symlink_to(theirs / "log.jsonl")
    assert train.main([*SMALL, f"--out={out}"]) == 0 and train.main(ask) == 0
    assert (theirs / "log.jsonl").read_text() == "mine" and not (out / "log.jsonl").is_symlink()
    text = (out / "results.json").read_text(encoding="utf-8")
    (out / "results.json").write_text(text.replace('"beta": 1.0', '"beta": 2.0'), encoding="utf-8")
    assert "expected options and models as the run wrote them" in refused(capsys, *ask)
    (out / "results.json").write_text(text, encoding="utf-8")
    words = out / "seed0" / "tokenizer.tiktoken"
    words.write_text(words.read_text().replace("8A==", "7w==", 1), encoding="ascii")
    assert "expected lines `base64 rank`" in refused(capsys, *ask)


# --- what must be equal, and what must not -------------------------------------------------------

def test_strict_shaping_trains_to_the_same_numbers_as_dpo(out):
    """terminal "zero" and alpha 0 are DPO to the last bit of every weight; every other option of
    the loss moves the student. In a copy of the run: only what depends on them is trained."""
    options, weights = [*SMALL, "--methods=tvkd", "--value=implicit"], {}
    task = load_task(parse_args(options, train.METHODS), 0)
    with closing(keep.Keep(out, torch.device("cpu"))) as kept:
        for change in ("--methods=dpo", "--terminal=zero --alpha=3", "--alpha=0", "--alpha=1",
                       "--alpha=2", "--alpha=-1", "--beta=0.5", "--gamma=0.5", "--terminal=hold",
                       "--teacher_beta=0.5"):
            config = parse_args([*options, *change.split()], train.METHODS)
            *_, (student, _, _) = train.experiment(config, 0, task, kept.device, kept).values()
            weights[change] = kept.describe("", student)[".weights"]
    dpo, *others = weights.values()
    assert others[:2] == [dpo, dpo] and len({dpo, *others[2:]}) == 8


def test_runs_repeat_and_measuring_changes_nothing(default_run, tmp_path):
    """The same rows with other intervals of the log, with fewer methods beside, and as one of two
    seeds; another seed gives others."""
    rare = ("--eval_interval=1000", "--log_interval=1000")
    both, _ = run(tmp_path, *rare, "--methods=tvkd,dpo", "--value=implicit", "--seeds=2")
    labels = ["teacher", "sft", "tvkd implicit/value", "dpo"]
    assert list(both) == [*labels, *(f"{label} 1" for label in labels)]
    for name in labels:
        assert both[name] == default_run.rows[name], name
    assert both["dpo"]["pref_margin"] != both["dpo 1"]["pref_margin"]
    alone, _ = run(tmp_path, "--seed=1", "--methods=dpo")
    assert alone["dpo 1"] == both["dpo 1"]


# --- another method, another value ---------------------------------------------------------------

def largest_logit(teacher, teacher_ref, tokens, mask, beta):
    return beta * teacher(tokens).amax(-1)


def test_a_method_and_a_value_as_contributing_says(tmp_path, monkeypatch, capsys):
    """IPO at beta 1/2: the loss at step 1 is (1 / (2 beta))^2 = 1; it has a row in the table. With
    --terminal=zero any value leaves DPO's loss, at step 1 ln 2. From step 5 on the time left is
    known."""
    monkeypatch.setitem(train.METHODS, "ipo", (IPO, "lr"))
    monkeypatch.setitem(model.VALUES, "largest", (largest_logit, "hold"))
    monkeypatch.setitem(options.TERMINAL_OF, "largest", "hold")     # made of VALUES at import
    rows, log = run(tmp_path, "--methods=dpo,ipo,tvkd", "--value=largest", "--beta=0.5",
                    "--terminal=zero", "--steps=6", sizes=TINY)
    assert list(rows) == ["teacher", "sft", "dpo", "ipo", "tvkd largest/zero"]
    close(first_loss(log, "ipo"), 1.0, 1e-3)
    close(first_loss(log, "tvkd largest/zero"), math.log(2), 1e-4)
    printed = capsys.readouterr().out
    assert "loss 1.0000, expected 1.0000; " in printed
    lines = re.findall(r"^  ipo \d/6 .*", printed, re.MULTILINE)
    assert [line.endswith(" s left") for line in lines] == [False] * 4 + [True] * 2
    assert train.main([f"--out={tmp_path}", "--ask=hi", "--device=cpu"]) == 0
    assert "\n  ipo   " in capsys.readouterr().out


def first_loss(log, stage):
    return next(line["loss"] for line in log if line["stage"] == stage)


# --- real preferences, and the teacher's values from a file ---------------------------------------

def test_values_from_a_file_give_the_loss_of_the_run_with_the_teacher(tmp_path):
    """40 pairs, TVKD trained on them with a teacher inside, and their scores by that teacher. Then
    --value=given on that file without a teacher, whose vocabulary of 300 ids may be another one.
    Step 1, before the student has moved, is the same in both, and follows from the file's numbers
    alone: the mean of -log sigmoid(-3 (V_w - V_l)) over the first batch, all five pairs."""
    path, scores = tmp_path / "pairs.jsonl", tmp_path / "out" / "scores.jsonl"
    write_pairs(path, data.toy_splits(38, 1, 1, 3).train + [
        Pair(f"Say {i}.", " yes", " no, no") for i in range(2)])
    options = [*TINY, "--block_size=200", "--train_pairs=0", "--val_pairs=4", "--test_pairs=4",
               "--methods=dpo,tvkd", "--alpha=3", "--teacher_dpo_lr=1e-2", "--student_pairs=5"]
    rows, log = run(tmp_path / "out", f"--data={path}", "--value=implicit", sizes=options)
    assert rows["dpo"]["reward"] is None and rows["dpo"]["pref_n"] == 4     # nobody knows it
    assert train.main([f"--out={tmp_path / 'out'}", f"--score={path}", "--device=cpu"]) == 0
    options += [f"--data={scores}", "--value=given", "--vocab_size=270"]
    rows, given = run(tmp_path / "given", sizes=options)
    assert list(rows) == ["sft", "dpo", "tvkd given/value"]
    assert not any(line["stage"].startswith("teacher") for line in given)
    task = load_task(parse_args(options, train.METHODS), 0, load_pairs(scores, True))
    gaps = [pair.values[0] - pair.values[1] for pair in task.texts.train[:5]]
    expected = sum(math.log(1 + math.exp(3 * gap)) for gap in gaps) / 5
    close(first_loss(log, "tvkd implicit/value"), expected, 1e-3)
    close(first_loss(given, "tvkd given/value"), expected, 1e-4)
    assert task.tokenizer.n_vocab == 270 and abs(expected - math.log(2)) > 1e-2


def test_what_is_cut_left_out_and_dropped_is_counted(tmp_path, capsys):
    """block_size 16 cuts some prompts and drops no response; 2 leaves no pair at all. Of 40 pairs
    20, 6 and 10 are asked for; then a pair comes twice, and once with its labels flipped."""
    pairs = [Pair(pair.prompt, " Yes.", " No.") for pair in data.toy_splits(40, 1, 1, 0).train]
    command = [*SMALL, f"--data={write_pairs(tmp_path / 'pairs.jsonl', pairs)}"]
    load_task(parse_args([*command, "--train_pairs=0", "--block_size=16"], train.METHODS), 0, pairs)
    assert re.search(r"train: 24 of 24 rows; [1-9]\d* with the prompt cut from the left, 0 dropp",
                     capsys.readouterr().out)
    assert "--block_size: expected room for a prompt and a response, got 2" in refused(
        capsys, *command, "--train_pairs=0", "--block_size=2", f"--out={tmp_path / 'x'}")
    config = parse_args([*command, "--train_pairs=20"], train.METHODS)
    flipped = Pair(pairs[0].prompt, pairs[0].rejected, pairs[0].chosen)
    for more, counts in (([], (40, 4, 0, 0)), ([pairs[0], flipped], (42, 6, 1, 2))):
        load_task(config, 0, pairs + more)
        assert counts == tuple(map(int, re.search(
            r": (\d+) pairs; (\d+) left out by --train_pairs; kept: (\d+) that repeat another, "
            r"(\d+) that another contradicts\n", capsys.readouterr().out).groups()))


# --- the command line ----------------------------------------------------------------------------

@pytest.mark.parametrize("options, message", [
    (["--alph=1"], "unrecognized arguments: --alph=1"),
    (["--\x1b[31m\n=1"], "unrecognized arguments: --\ufffd[31m\ufffd=1"),
    (["--alpha=nan"], "--alpha: expected -1e+06 to 1e+06, got nan"),
    (["--gamma=-1"], "--gamma: expected 0 to 1e+06, got -1.0"),
    (["--beta=1e-40"], "--beta: expected 1e-12 to 1e+06, got 1e-40"),
    (["--methods=dpo,ppo"], "--methods: expected some of bc,kd,dpo,tvkd,soft, each once, got"),
    (["--methods=dpo,dpo"], "each once, got dpo,dpo"),
    (["--value=q"], "--value: expected some of implicit,logits,given"),
    (["--value=given"], "--value: expected --data beside given: the toy task has no"),
    (["--data=x", "--value=given", "--gamma=0.9"], "--gamma: expected 1 beside --value=given"),
    (["--data=x", "--value=given", "--terminal=hold"], "--terminal: expected value beside"),
    (["--terminal=end"], "--terminal: expected one of zero, hold, value, got 'end'"),
    (["--student_width=10"], "--student_width: expected a multiple of --student_heads=4, got 10"),
    (["--steps=0"], "--steps: expected at least 1, or -N for N epochs, got 0"),
    (["--batch_size=1" + "0" * 30], "--batch_size: expected 1 to 1000000, got 1000000"),
    (["--seed=99999999999999999999"], "--seed: expected at least 0, got 9999"),
    (["--ask="], "--ask: expected a value, got none"),
    (["--ask=hi"], "--out: expected the folder of a finished run with --seed=0, got"),
    (["--ask=hi", "--steps=5"],
     "--steps: expected only --out, --seed, --device beside --ask"),
    (["--train_pairs=0"], "--train_pairs: expected at least 1 on the toy task"),
    (["--train_pairs=100000"],
     "--train_pairs + --val_pairs + --test_pairs: expected at most 15552"),
    (["--student_pairs=50", "--train_pairs=40"],
     "--student_pairs: expected at most the 40 training pairs, got 50"),
    (["--vocab_size=100", "--train_pairs=9"], "--vocab_size: expected at least 257"),
    (["--tokenizer=gpt9", "--train_pairs=9"], "--tokenizer: expected one of"),
    ([*TINY, "--out=/dev/null"], "expected files that can be read and written: [Errno 17] File"),
    ([*TINY, "--out=/dev/null/x"], "written: [Errno 20] Not a directory: '/dev/null/x'"),
    (["--data=a\nb\x1b[31m\x07\u202e"], "a\ufffdb\ufffd[31m\ufffd\ufffd: expected a readable"),
])
def test_bad_options(capsys, tmp_path, options, message):
    out = tmp_path / "out"
    assert message in refused(capsys, f"--out={out}", *options) and not out.exists()


def test_help_lists_every_option_in_its_section(capsys):
    """In the order of Config, each with its default."""
    with pytest.raises(SystemExit) as stop:
        train.main(["--help"])
    printed = capsys.readouterr().out
    options = re.findall(r"^  --(\w+) [A-Z_]+", printed, re.MULTILINE)
    assert stop.value.code == 0 and options == [f.name for f in fields(Config)]
    assert " ".join(printed.split()).count(" (default: ") == len(options)


@pytest.mark.parametrize("options, status, message", [
    (["--teacher_beta=1e4", "--alpha=1e6"], 0, ""),
    (["--beta=1e-12"], 0, ""),
    (["--lr=1e6"], 1, "train.py: .* on held-out pairs; expected finite .* a lower learning rate"),
    (["--student_sft_lr=1e6", "--student_sft_steps=40"], 1, "train.py: student-sft: loss .*, "
     r"gradient norm \S+ at step \d+; .* a lower learning rate than 1e\+06"),
])
def test_extreme_values(out, capsys, options, status, message):
    """What is accepted runs, or ends in a line that is true. Only finite weights are kept."""
    command = [*SMALL, f"--out={out}", "--methods=dpo,tvkd", "--value=implicit", "--steps=1",
               "--save_interval=0"]
    assert train.main([*command, *options]) == status
    error = capsys.readouterr().err
    assert re.search(message, error) and error.count("\n") == (status > 0)
    for path in (out / "seed0").glob("*.partial"):
        assert all(tensor.isfinite().all() for tensor in keep.read(path)["model"].values())


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
    assert exit_code(torch.empty, 10 ** 15) == 2        # 4 PB: an error without a type of its own
    for bug in (RuntimeError("the step 0 check failed"), RuntimeError("memory"), TypeError("x")):
        with pytest.raises(type(bug)):                  # an error of the program: its traceback
            exit_code(fails, bug)


def close_stdout():
    """As a shell does with >&-: no file descriptor 1, and sys.stdout is None."""
    os.close(1)
    sys.stdout = None


def print_to_nobody():
    """To a pipe whose reader has left, as `head` does."""
    read, write = os.pipe()
    os.close(read)
    sys.stdout = os.fdopen(write, "w", encoding="utf-8", buffering=1)


def print_to_full():
    sys.stdout = open("/dev/full", "w", encoding="utf-8")


def odd_surroundings():
    """A terminal in ASCII, which has no \u00b1, and what another program's processes left in the
    environment: nobody waits for a second process."""
    sys.stdout = open(os.devnull, "w", encoding="ascii")
    os.environ |= {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1", "MASTER_ADDR": "localhost",
                   "MASTER_PORT": "1"}


@pytest.mark.parametrize("prepare, status, message", [
    (close_stdout, 0, ""), (odd_surroundings, 0, ""),
    (print_to_nobody, 141, "stopped: nobody reads its output; the same command continues"),
    (print_to_full, 2, "expected files that can be read and written: [Errno 28] No space "
     "left on device"),
])
def test_surroundings(tmp_path, prepare, status, message):
    """A run in a process of its own, after prepare(): it ends well, or in one line."""
    errors, command = tmp_path / "errors", [*TINY, f"--out={tmp_path / 'out'}", "--methods=tvkd"]
    assert ended(forked(errors, main_after, prepare, *command)) == status
    assert errors.read_text(encoding="utf-8") == (f"train.py: {message}\n" if message else "")
    assert status or len(rows_of(tmp_path / "out")) == 4


@pytest.mark.slow
def test_as_a_command(tmp_path):
    """python train.py in ASCII, into a folder whose name is no text. Warnings are errors, so no
    file stays open."""
    command = [sys.executable, "-W", "error", str(ROOT / "train.py"), *TINY, "--methods=tvkd"]
    out, ascii_only = f"{tmp_path}/\udcff", {**os.environ, "PYTHONIOENCODING": "ascii"}
    done = subprocess.run([*command, f"--out={out}"], capture_output=True, env=ascii_only)
    assert done.returncode == 0 and b"0.500 ? " in done.stdout and done.stderr == b""
    results = (Path(out) / "results.json").read_text(encoding="utf-8")
    assert json.loads(results)["config"]["out"] == f"{tmp_path}/\ufffd"


@pytest.mark.parametrize("option", ["data", "teacher_init", "student_init", "score"])
def test_inputs_do_not_lie_in_out(out, capsys, option):
    """The run would overwrite them. Nothing in the folder changes."""
    before = bytes_of(out)
    for name in ("scores.jsonl", "seed0/dpo.pt"):
        error = refused(capsys, f"--{option}={out / name}", f"--out={out}", "--device=cpu")
        assert f"--{option}: expected a path outside --out={out}" in error
    assert bytes_of(out) == before


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
                 [*use, f"--ask={odd} why?"], [*use, f"--score={path}"],
                 [*use, f"--export={tmp_path / odd}"], [*TINY, f"--out={path}"]):
        train.main(argv)
        printed = capsys.readouterr()
        lines = (printed.out + printed.err).split("\n")
        assert len(lines) > 1 and [line for line in lines if not line.isprintable()] == []
        assert not any(line.startswith("line") for line in lines)
