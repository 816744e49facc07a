"""course/walkthrough.ipynb: its code cells, run in order, print what is committed."""

import io
import json
import re
from contextlib import redirect_stdout

import pytest
import torch

from conftest import ROOT

NUMBER = re.compile(r"[-+]?\d+\.\d+")


@pytest.mark.slow
def test_walkthrough_prints_what_is_committed(monkeypatch):
    """Words and whole numbers to the letter; decimals within 0.1, since another processor rounds
    differently in training. psi's tint depends on such a number, so escape codes do not count."""
    monkeypatch.chdir(ROOT)
    book = json.loads((ROOT / "course" / "walkthrough.ipynb").read_text(encoding="utf-8"))
    code = [cell for cell in book["cells"] if cell["cell_type"] == "code"]
    text = "".join(line for cell in book["cells"] if cell["cell_type"] == "markdown"
                   for line in [*cell["source"], "\n"])
    numbers = re.findall(r"^## (\d+)\.", text, re.MULTILINE)          # a section is its In[n]
    assert numbers == [str(cell["execution_count"]) for cell in code]
    assert text.count("**Predict") >= 10 and (ROOT / "course" / "tree.svg").is_file()
    namespace, threads = {"__name__": "walkthrough"}, torch.get_num_threads()
    assert len(code) >= 12
    for number, cell in enumerate(code, 1):
        assert cell["execution_count"] == number
        printed = io.StringIO()
        with redirect_stdout(printed):
            exec(compile("".join(cell["source"]), f"cell {number}", "exec"), namespace)
        committed = "".join(text for output in cell["outputs"] for text in output["text"])
        now, then = (re.sub("\033\\[[0-9;]*m", "", text).split() for text in (printed.getvalue(),
                                                                             committed))
        assert [NUMBER.sub("#", word) for word in now] == [NUMBER.sub("#", word) for word in then]
        for got, expected in zip(NUMBER.findall(" ".join(now)), NUMBER.findall(" ".join(then))):
            assert float(got) == pytest.approx(float(expected), abs=0.1, rel=0.05), number
    torch.set_num_threads(threads)
