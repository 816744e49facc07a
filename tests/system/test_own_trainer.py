"""docs/own-trainer.md: its code runs, with a stand-in for the libraries that it imports, and gives
what tvkd.py gives for whole rows, or what comes out by hand."""

import copy
import math
import re
import sys
import weakref
from types import SimpleNamespace
from unittest.mock import MagicMock

import pytest
import torch

from conftest import ROOT, close
from model import GPT, GPTConfig
from tvkd import dpo_loss, implicit_value, sequence_logps, shaping, token_logps, tvkd_loss

PAGE = (ROOT / "docs/own-trainer.md").read_text(encoding="utf-8")
VALUES, TRL, LOOP = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
LN2 = math.log(2)


class Tokenizer:
    """A letter is a token, its code modulo EOS. bos: ids before each text."""

    def __init__(self, eos, bos):
        self.eos_token_id, self.bos = eos, bos

    def __call__(self, text, add_special_tokens=True):
        ids = [ord(letter) % self.eos_token_id for letter in text]
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


@pytest.fixture
def page(monkeypatch):
    """The names of the page's first block. The teacher has another vocabulary and a BOS id."""
    models = {}
    for seed, name in enumerate(("student-sft", "teacher-dpo", "teacher-sft")):
        torch.manual_seed(seed)
        tokenizer = Tokenizer(128, []) if name == "student-sft" else Tokenizer(100, [7])
        models[name] = GPT(GPTConfig(tokenizer.eos_token_id + 1, n_embd=16)).eval(), tokenizer
    library = MagicMock()
    library.AutoTokenizer.from_pretrained = lambda folder: models[folder][1]
    library.AutoModelForCausalLM.from_pretrained = lambda folder, **options: Loaded(
        models[folder][0], **options)
    for name in ("transformers", "datasets", "trl"):
        monkeypatch.setitem(sys.modules, name, library)
    Loaded.in_memory.clear()
    names = {"models": models}
    exec(VALUES, names)
    return names


def test_the_loop_step_by_step(page, capsys):
    """Values and ten losses, without batches and slices, by tvkd.py's functions for whole rows."""
    torch.manual_seed(5)
    exec(LOOP, page)
    printed = [float(line.split()[1]) for line in capsys.readouterr().out.splitlines()]
    tokens, mask = page["collate"](page["pairs"], page["models"]["teacher-dpo"][1])
    teacher, teacher_ref = (token_logps(page["models"][name][0](tokens), tokens)
                            for name in ("teacher-dpo", "teacher-sft"))
    values = implicit_value(teacher, teacher_ref, mask, page["teacher_beta"])
    psi = shaping(values, mask).sum(-1).view(2, -1)
    close(page["values"].T, psi, 1e-5)
    student, tokenizer = page["models"]["student-sft"]
    tokens, mask = page["collate"](page["pairs"], tokenizer)
    optimizer, logps, losses = torch.optim.AdamW(student.parameters(), lr=1e-5), [], []
    torch.manual_seed(5)
    for ids in [ids for _ in range(5) for ids in torch.randperm(3).split(2)]:
        logps.append(sequence_logps(token_logps(student(tokens), tokens), mask).view(2, -1))
        losses.append(tvkd_loss(*logps[-1][:, ids], *logps[0][:, ids], *psi[:, ids],
                                page["beta"], page["alpha"]).mean())
        optimizer.zero_grad()
        losses[-1].backward()
        optimizer.step()
    close(printed, [loss.item() for loss in losses], 1e-5)
    assert {p.dtype for p in page["student"].parameters()} == {torch.float32}           # trap 7


def test_collate_by_hand(page):
    """EOS is 9, a BOS 5. Prompt a, chosen b, rejected cd: 97 to 100 modulo 9 are 7, 8, 0, 1.

        5 7 | 8 9 0     actions  7 | 8 9 .     mask 0 | 1 1 0
        5 7 | 0 1 9              7 | 0 1 9          0 | 1 1 1"""
    tokens, mask = page["collate"]([("a", "b", "cd")], Tokenizer(9, [5]))
    assert tokens.tolist() == [[5, 7, 8, 9, 0], [5, 7, 0, 1, 9]]
    assert mask.tolist() == [[False, True, True, False], [False, True, True, True]]


@pytest.mark.parametrize("alpha, odds", [(0, 1 / 2), (1 / 8, 1), (1 / 4, 2), (-1 / 8, 1 / 4)])
def test_dpo_with_the_tilted_reference_is_tvkd(page, alpha, odds):
    """The recipe for TRL, values and gradients, in units of ln 2: policy -2, -2, reference -6, -4,
    psi 9, 1. beta is 1/2. DPO's margin is 1/2 (4 - 2) = 1, TVKD's 1 - 8 alpha. With odds =
    exp(-margin) = 2^(8 alpha - 1) the loss is ln(1 + odds), its slopes -+ 1/2 odds / (1 + odds).
    alpha 1/4: a tilt of 9/2, 1/2 gives the margin 1/2 [(-2 + 6 - 9/2) - (-2 + 4 - 1/2)] = -1."""
    before = sys.modules["trl"].DPOTrainer.return_value.train_dataset
    psi = torch.tensor([[9.0, 1.0]]) * LN2
    page |= {"pairs": [("x", "w", "l")], "values": psi, "alpha": alpha, "beta": 0.5}
    exec(TRL, page)
    before.map.assert_called_once_with(page["tilt"])
    assert page["trainer"].train_dataset is before.map.return_value
    tilted = page["tilt"](page["rows"][0] | {"ref_chosen_logps": -6 * LN2,
                                             "ref_rejected_logps": -4 * LN2})
    tilted = [torch.tensor([tilted[name]]) for name in ("ref_chosen_logps", "ref_rejected_logps")]
    ref_logps = torch.tensor([[-6.0], [-4.0]]) * LN2
    for loss, constants in ((dpo_loss, (*tilted, 0.5)),
                            (tvkd_loss, (*ref_logps, *psi.T, 0.5, alpha))):
        policy = torch.full((2, 1), -2 * LN2, requires_grad=True)
        got = loss(*policy, *constants)
        got.backward()
        close(got, [math.log(1 + odds)])
        close(policy.grad, [[-0.5 * odds / (1 + odds)], [0.5 * odds / (1 + odds)]])
