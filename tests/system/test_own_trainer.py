"""docs/own-trainer.md: its code runs, and gives what tvkd.py gives for whole rows, or by hand.

The page imports transformers, datasets and TRL. Stand-ins with their interfaces hand out models of
this project, and read what those libraries read, no more.
"""

import copy
import math
import re
import sys
import weakref
from types import SimpleNamespace

import pytest
import torch

from conftest import ROOT, close
from model import GPT, GPTConfig
from tvkd import dpo_loss, implicit_value, sequence_logps, shaping, token_logps, tvkd_loss

PAGE = (ROOT / "docs/own-trainer.md").read_text(encoding="utf-8")
VALUES, TRL, LOOP = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
LN2 = math.log(2)


def run(block, names):
    exec(compile(block, "own-trainer.md", "exec"), names)
    return names


class Tokenizer:
    """`width` letters are one token. bos: ids before each text."""

    def __init__(self, width, eos, bos=()):
        self.width, self.eos_token_id, self.bos = width, eos, list(bos)

    def __call__(self, text, add_special_tokens=True):
        ids = [sum(map(ord, text[i:i + self.width])) % self.eos_token_id
               for i in range(0, len(text), self.width)]
        return SimpleNamespace(input_ids=self.bos * add_special_tokens + ids)


class Loaded(torch.nn.Module):
    """A GPT behind the library's interface, in float64 unless told otherwise."""
    in_memory = weakref.WeakSet()

    def __init__(self, gpt, dtype=torch.double):
        super().__init__()
        assert not self.in_memory, "trap 4: another model is still in memory"
        self.in_memory.add(self)
        self.gpt = copy.deepcopy(gpt).to(dtype)

    def forward(self, tokens):
        return SimpleNamespace(logits=self.gpt(tokens))


class Dataset(list):
    def map(self, function):
        return Dataset({**row, **function(row)} for row in self)


class DPOTrainer:
    """TRL's of one pair, in units of ln 2: policy -2, -2, reference -6, -4. Other columns drop."""

    def __init__(self, model, train_dataset, args):
        assert args["precompute_ref_log_probs"]
        ref_logps = {"ref_chosen_logps": -6 * LN2, "ref_rejected_logps": -4 * LN2}
        self.beta, self.train_dataset = args["beta"], train_dataset.map(lambda row: ref_logps)

    def train(self):
        [row] = self.train_dataset
        ref = [torch.tensor([row[f"ref_{answer}_logps"]]) for answer in ("chosen", "rejected")]
        self.policy = torch.full((2, 1), -2 * LN2, requires_grad=True)
        self.loss = dpo_loss(*self.policy, *ref, self.beta)


@pytest.fixture
def models(monkeypatch):
    """The page's folders, as (GPT, tokenizer). The teacher has another vocabulary and a BOS id."""
    models = {}
    for seed, name in enumerate(("student-sft", "teacher-dpo", "teacher-sft")):
        torch.manual_seed(seed)
        tokenizer = Tokenizer(1, 128) if name == "student-sft" else Tokenizer(2, 200, [7])
        models[name] = GPT(GPTConfig(tokenizer.eos_token_id + 1, n_embd=16)).eval(), tokenizer
    library = SimpleNamespace(
        AutoModelForCausalLM=SimpleNamespace(
            from_pretrained=lambda folder, **options: Loaded(models[folder][0], **options)),
        AutoTokenizer=SimpleNamespace(from_pretrained=lambda folder: models[folder][1]),
        Dataset=SimpleNamespace(from_list=Dataset), DPOTrainer=DPOTrainer,
        DPOConfig=lambda folder, **options: options)
    for name in ("transformers", "datasets", "trl"):
        monkeypatch.setitem(sys.modules, name, library)
    Loaded.in_memory.clear()
    return models


def test_the_loop_step_by_step(models, capsys):
    """Values and ten losses, without batches and slices, by tvkd.py's functions for whole rows."""
    names = run(VALUES, {})
    torch.manual_seed(5)
    run(LOOP, names)
    printed = [float(line.split()[1]) for line in capsys.readouterr().out.splitlines()]

    tokens, mask = names["collate"](names["pairs"], models["teacher-dpo"][1])
    teacher, teacher_ref = (token_logps(models[name][0](tokens), tokens)
                            for name in ("teacher-dpo", "teacher-sft"))
    values = implicit_value(teacher, teacher_ref, mask, names["teacher_beta"])
    psi = shaping(values, mask).sum(-1).view(2, -1)
    close(names["values"].T, psi, 1e-5)

    student, tokenizer = models["student-sft"]
    tokens, mask = names["collate"](names["pairs"], tokenizer)
    optimizer, logps, losses = torch.optim.AdamW(student.parameters(), lr=1e-5), [], []
    torch.manual_seed(5)
    for ids in [ids for _ in range(5) for ids in torch.randperm(3).split(2)]:
        logps.append(sequence_logps(token_logps(student(tokens), tokens), mask).view(2, -1))
        losses.append(tvkd_loss(*logps[-1][:, ids], *logps[0][:, ids], *psi[:, ids],
                                names["beta"], names["alpha"]).mean())
        optimizer.zero_grad()
        losses[-1].backward()
        optimizer.step()
    close(printed, [loss.item() for loss in losses], 1e-5)
    assert sum(printed[:2]) - sum(printed[-2:]) > 1e-3          # it trains, beyond the tolerance
    assert {p.dtype for p in names["student"].parameters()} == {torch.float32}          # trap 7


def test_collate_by_hand(models):
    """EOS is 9, a BOS 5. Prompt a, chosen b, rejected cd: 97 to 100 modulo 9 are 7, 8, 0, 1.

        5 7 | 8 9 0     actions  7 | 8 9 .     mask 0 | 1 1 0
        5 7 | 0 1 9              7 | 0 1 9          0 | 1 1 1
    """
    tokens, mask = run(VALUES, {})["collate"]([("a", "b", "cd")], Tokenizer(1, 9, [5]))
    assert tokens.tolist() == [[5, 7, 8, 9, 0], [5, 7, 0, 1, 9]]
    assert mask.tolist() == [[False, True, True, False], [False, True, True, True]]


@pytest.mark.parametrize("alpha, odds", [(0, 1 / 2), (1 / 8, 1), (1 / 4, 2), (-1 / 8, 1 / 4)])
def test_dpo_with_the_tilted_reference_is_tvkd(models, alpha, odds):
    """The recipe for TRL, values and gradients. Units of ln 2, beta 1/2, psi 9 and 1.

    Log-ratios 4 and 2: the margin of DPO is 1/2 (4 - 2) = 1, of TVKD 1 - 8 alpha. With odds =
    exp(-margin) = 2^(8 alpha - 1) the loss is ln(1 + odds), its slopes -+ 1/2 odds / (1 + odds).
    alpha 1/4: the tilt of 9/2 and 1/2 takes the reference to -3/2 and -7/2, and the margin is
    1/2 [(-2 + 3/2) - (-2 + 7/2)] = -1.
    """
    psi = torch.tensor([[9.0, 1.0]]) * LN2
    trainer = run(TRL, {"pairs": [("x", "w", "l")], "values": psi, "alpha": alpha, "beta": 0.5,
                        "device": "cpu"})["trainer"]
    policy = torch.full((2, 1), -2 * LN2, requires_grad=True)
    ref_logps = torch.tensor([[-6.0], [-4.0]]) * LN2
    loss = tvkd_loss(*policy, *ref_logps, *psi.T, 0.5, alpha)
    for policy, loss in ((policy, loss), (trainer.policy, trainer.loss)):
        loss.backward()
        close(loss, [math.log(1 + odds)])
        close(policy.grad, [[-0.5 * odds / (1 + odds)], [0.5 * odds / (1 + odds)]])
