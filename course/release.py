"""Writes what students get: the stubs and the rest of the program, without the solution.

    python -m course.release FOLDER                 FOLDER, and the instructor's key in FOLDER-key
    python -m course.release FOLDER --variant=2     other names, signs and units

FOLDER has no tvkd.py with bodies, no naive bodies, no hidden tests, no mutation test and none of
the pages that answer the exercises. Students write my_tvkd.py; then train.py runs on their
functions. Grade with the whole repository and the same number:

    python -m pytest -q --impl=THEIRS --variant=2 --json=points.json
"""

import re
import shutil
import sys
from pathlib import Path

from course.assignment import ROOT, command
from course.variants import MY, Variant
from harness.errors import printable

# The tests that a student may see; the rest of tests/ is about other files or holds answers.
FILES = ("model.py", "data.py", "train.py", "requirements.txt", "LICENSE", "harness/*",
         "course/grader.py", "course/worker.py", "course/variants.py", "course/exercises.md",
         "tests/conftest.py", "tests/test_tvkd.py", "tests/test_shaping_invariance.py",
         "tests/toy_mdp.py")


def stubs(variant):
    """The assignment, with the equations and without what the comments make of them."""
    header, text = variant.stubs().split('"""', 1)
    return header + '"""' + re.sub(r"(?m)^#\n(#.*\n)*", "", text)   # in a block, all from a bare #


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
            folder / "tvkd.py": variant.adapter(),
            folder / f"{MY}.py": stubs(variant),
            folder / "course" / "assignment.py": assignment.replace("\nVARIANT = 0 ",
                                                                    f"\nVARIANT = {number} "),
            key / f"{MY}.py": variant.key()}.items():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    shutil.copyfile(ROOT / "course" / "students.md", folder / "README.md")
    shutil.copyfile(ROOT / "course" / "answers.md", key / "answers.md")


def release(arguments):
    numbers = [x[10:] for x in arguments if re.fullmatch(r"--variant=[0-9]{1,9}", x)]
    folders = [x for x in arguments if not x.startswith("-")]
    if len(folders) != 1 or len(numbers) > 1 or len(folders + numbers) != len(arguments):
        raise ValueError("expected a folder and no more than --variant=N beside it")
    folder = Path(folders[0])
    key = folder.with_name(folder.name + "-key")
    if any(path.exists() or path.is_symlink() for path in (folder, key)):
        raise ValueError("expected a folder that is not there yet, nor one with -key after it")
    write(folder, key, int(*numbers))
    print(f"{printable(folder)} for students, {printable(key)} for you")


def main(arguments):
    return command("release", __doc__, release, arguments)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
