"""docs/own-trainer.md: its code runs, and gives the losses of train.py and numbers by hand.

The page imports the transformers library. Here a stand-in with the same interface hands out models
of this project: from_pretrained(folder), model(tokens).logits, tokenizer(text).input_ids.
"""

import copy
import math
import re
import sys
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

import train
from conftest import ROOT, close
from data import Example, Pair
from harness.tokenizers import learn_tokenizer
from model import GPT, GPTConfig, both_responses, rows_logps, state_values, summed_psi
from tvkd import tvkd_loss

PAGE = (ROOT / "docs/own-trainer.md").read_text(encoding="utf-8")


class WithLogits(torch.nn.Module):
    """A GPT that answers as a model of the transformers library does."""

    def __init__(self, gpt):
        super().__init__()
        self.gpt = gpt

    def forward(self, tokens):
        return SimpleNamespace(logits=self.gpt(tokens))


class Tokenizer:
    """A vocabulary of this project behind the library's interface. bos: an id before each text."""

    def __init__(self, encode, eos, bos=()):
        self.encode, self.eos_token_id, self.bos = encode, eos, list(bos)

    def __call__(self, text, add_special_tokens=True):
        return SimpleNamespace(input_ids=self.bos * add_special_tokens + self.encode(text))


@pytest.fixture
def models(monkeypatch):
    """The page's folders, as (GPT, tokenizer). The teacher has another vocabulary and a BOS id."""
    small = learn_tokenizer([Example("2+2= Sky?", " It is blue.")], 262)
    large = learn_tokenizer([Example("cheese made of cheese", " 4 5")], 270)
    tokenizers = {"student": Tokenizer(small.encode_ordinary, small.eot_token),
                  "teacher": Tokenizer(large.encode_ordinary, large.eot_token, [7])}
    models = {}
    for seed, name in enumerate(("student-sft", "teacher-dpo", "teacher-sft")):
        torch.manual_seed(seed)
        tokenizer = tokenizers[name.split("-")[0]]
        models[name] = GPT(GPTConfig(tokenizer.eos_token_id + 1, n_embd=16)).eval(), tokenizer
    library = SimpleNamespace(
        AutoModelForCausalLM=SimpleNamespace(from_pretrained=lambda f: WithLogits(models[f][0])),
        AutoTokenizer=SimpleNamespace(from_pretrained=lambda f: models[f][1]))
    monkeypatch.setitem(sys.modules, "transformers", library)
    return models


def run_page():
    """Execute the page's Python, block after block -> its names."""
    names = {}
    for block in re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL):
        exec(compile(block, "own-trainer.md", "exec"), names)
    return names


def as_ids(pairs, tokenizer):
    return [Pair(tokenizer(prompt).input_ids, *(tokenizer(response, False).input_ids
                                                + [tokenizer.eos_token_id]
                                                for response in responses))
            for prompt, *responses in pairs]


def losses_of_train_py(pairs, models, beta, alpha, teacher_beta, steps, lr):
    """The same training by model.py and train.TVKD."""
    student, tokenizer = copy.deepcopy(models["student-sft"])
    (teacher, teacher_tokenizer), (teacher_ref, _) = models["teacher-dpo"], models["teacher-sft"]
    student_pairs = as_ids(pairs, tokenizer)
    rows = both_responses(as_ids(pairs, teacher_tokenizer))
    values = state_values("implicit", teacher, teacher_ref, rows, teacher_beta, 8)
    psi = summed_psi(values, rows, 1.0, "value").view(2, -1)
    ref_logps = rows_logps(student, both_responses(student_pairs), 8).view(2, -1)
    loss = train.TVKD(student_pairs, ref_logps, psi, beta, alpha)
    optimizer, losses = torch.optim.AdamW(student.parameters(), lr=lr), []
    for _ in range(steps):
        mean = loss(student, torch.arange(len(pairs)))["loss"] / len(pairs)
        losses.append(mean.item())
        optimizer.zero_grad()
        mean.backward()
        optimizer.step()
    return losses


def test_page_trains_as_train_py_does(models, capsys):
    """Ten losses, step by step, of a student under a teacher with a vocabulary of its own."""
    before = copy.deepcopy(models)
    names = run_page()
    printed = [float(line.split()[1]) for line in capsys.readouterr().out.splitlines()]
    expected = losses_of_train_py(names["pairs"], before, names["beta"], names["alpha"],
                                  names["teacher_beta"], steps=10, lr=1e-5)
    close(printed, expected, 1e-5)
    assert printed[0] - printed[-1] > 1e-3          # it trains, far beyond the tolerance


def test_first_loss_is_the_teachers_term_alone(models, capsys):
    """Policy = reference: -log sigmoid(-alpha dpsi), meaned. With psi = 0 that is ln 2."""
    names = run_page()
    chosen, rejected = names["psi"].chunk(2)
    expected = torch.log1p(torch.exp(names["alpha"] * (chosen - rejected))).mean().item()
    first = float(capsys.readouterr().out.split()[1])
    assert first == pytest.approx(expected, abs=1e-5) and abs(first - math.log(2)) > 1e-3


def test_collate_by_hand(models):
    """EOS is 9, a BOS 8. Prompt a, chosen b, rejected cd, with letters as 1, 2, 3, 4:

        8 1 | 2 9 0     actions  1 | 2 9 .     mask 0 | 1 1 0
        8 1 | 3 4 9              1 | 3 4 9          0 | 1 1 1
    """
    names = run_page()
    names["pairs"] = [("a", "b", "cd")]
    letters = Tokenizer(lambda text: [ord(letter) - ord("a") + 1 for letter in text], 9, [8])
    tokens, mask = names["collate"](letters)
    assert tokens.tolist() == [[8, 1, 2, 9, 0], [8, 1, 3, 4, 9]]
    assert mask.tolist() == [[False, True, True, False], [False, True, True, True]]


@pytest.mark.parametrize("alpha, expected", [(0.0, 3 / 2), (0.5, 2), (1.0, 3)])
def test_the_changed_line_by_hand(alpha, expected):
    """Log-ratios ln 4 and ln 2, psi ln 4 and 0, beta 1: margin ln 2, offset alpha ln 4.

    alpha 0: ln(1 + 1/2); 1/2: margin - offset = 0, ln(1 + 1); 1: it is -ln 2, ln(1 + 2).
    """
    four, two, zero = (torch.tensor([math.log(x)]) for x in (4, 2, 1))
    names = {"F": F, "beta": 1.0, "alpha": alpha, "psi_chosen": four, "psi_rejected": zero,
             "policy_chosen": four, "policy_rejected": two, "ref_chosen": zero,
             "ref_rejected": zero}
    [diff] = re.findall(r"```diff\n(.*?)```", PAGE, re.DOTALL)
    exec("\n".join(line[1:] for line in diff.splitlines() if line[0] in " +"), names)
    close(names["losses"], [math.log(expected)])
    close(tvkd_loss(four, two, zero, zero, four, zero, 1.0, alpha), names["losses"])
