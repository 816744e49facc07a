"""Writes what students get: the stubs and the rest of the program, without the solution.

    python -m course.release FOLDER                 FOLDER, and the instructor's key in FOLDER-key
    python -m course.release FOLDER --variant=2     other names, signs and orders of arguments

FOLDER has no tvkd.py with bodies, no naive bodies, no hidden tests, no mutation test and none of
the pages that answer the exercises. Students write my_tvkd.py; then train.py runs on their
functions. Grade with the whole repository and the same number:

    python -m pytest -q --impl=THEIRS --variant=2 --json=points.json
"""

import shutil
import sys
from pathlib import Path

from course.assignment import ROOT
from course.variants import MY, Variant
from harness.errors import printable

# The tests that a student may see; the rest of tests/ is about other files or holds answers.
FILES = ("model.py", "data.py", "train.py", "requirements.txt", "LICENSE", "harness/*",
         "course/grader.py", "course/worker.py", "course/variants.py", "course/exercises.md",
         "tests/conftest.py", "tests/test_tvkd.py", "tests/test_shaping_invariance.py",
         "tests/toy_mdp.py")
README = """\
# TVKD: exercises

Write the ten functions of `my_tvkd.py`. Each docstring says what goes in and what comes out; the
equations stand above the functions.{unlike}

```sh
pip install -r requirements.txt
python -m pytest -q --impl=my_tvkd.py       # your points; --function=NAME for one function
python train.py                             # with all ten written, the program runs on yours
```

`tvkd.py` lets the rest of the program call your functions; leave it alone. Your instructor grades
with more tests than these. The other exercises are in [course/exercises.md](course/exercises.md);
they call the functions by their names without a number.
"""
UNLIKE = """ Where a docstring says
"UNLIKE THE EQUATIONS ABOVE", do as it says. The tests show numbers in the equations' convention,
and the input as your function got it."""


def stubs(variant):
    """The assignment, with the equations and without what the comments make of them."""
    lines, kept = variant.stubs().splitlines(), []
    first = next(i for i, line in enumerate(lines) if line.startswith('"""'))
    explains = False
    for i, line in enumerate(lines):
        if not line.startswith("#"):
            explains = False
        elif i > first and line == "#":
            explains = True                             # to the end of this block of comments
        if not explains:
            kept.append(line)
    return "\n".join(kept) + "\n"


def write(folder, key, number):
    variant = Variant(number)
    for pattern in FILES:
        for path in sorted(ROOT.glob(pattern)):
            if path.is_file():
                target = folder / path.relative_to(ROOT)
                target.parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(path, target)
    assignment = (ROOT / "course" / "assignment.py").read_text(encoding="utf-8")
    for path, text in {
            folder / "README.md": README.format(unlike=UNLIKE if number else ""),
            folder / "tvkd.py": variant.adapter_source(),
            folder / f"{MY}.py": stubs(variant),
            folder / "course" / "assignment.py": assignment.replace("\nVARIANT = 0 ",
                                                                    f"\nVARIANT = {number} "),
            key / f"{MY}.py": variant.key_source()}.items():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    shutil.copyfile(ROOT / "course" / "answers.md", key / "answers.md")


def main(arguments):
    if arguments == ["--help"]:
        print(__doc__)
        return 0
    folders = [x for x in arguments if not x.startswith("-")]
    numbers = [x.removeprefix("--variant=") for x in arguments if x.startswith("--variant=")]
    wrong = [x for x in arguments if x.startswith("-") and not x.startswith("--variant=")]
    wrong += [x for x in numbers if not (x.isascii() and x.isdigit() and len(x) < 10)]
    try:
        if wrong or len(folders) != 1 or len(numbers) > 1:
            raise ValueError("expected a folder and no more than --variant=N beside it, got "
                             + ascii(" ".join(arguments))[:200])
        folder = Path(folders[0])
        key = folder.with_name(folder.name + "-key")
        for path in (folder, key):
            if path.exists() or path.is_symlink():
                raise ValueError(f"expected a folder that is not there yet, got {path}")
        write(folder, key, int(numbers[0]) if numbers else 0)
    except (OSError, ValueError) as error:
        print(f"course.release: {printable(str(error))}", file=sys.stderr)
        return 2
    print(f"{printable(str(folder))} for students, {printable(str(key))} for you")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
