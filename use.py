"""What a finished run can be asked: answers of every model to a prompt, margins of other pairs.

    python train.py --ask=PROMPT        python train.py --score=FILE.jsonl
"""

import json
from pathlib import Path

import data
from data import UserError
from measure import Setup, cached_margins, is_correct, read_by, sample, spoken
from model import frozen, from_content
from report import label, printable
from store import file_of, read, vocabulary, write


def load_run(config, device):
    """What a run left in --out -> (its Setup without data, models by label, the reference and the beta of each by label)."""
    folder = Path(config.out) / f"seed{config.seed}"

    def load(stage):
        content = read(folder / file_of(stage))
        if content["made_from"]["tokenizer"] != (of_teacher if stage.startswith("teacher") else of_student):
            raise UserError(f"{folder / file_of(stage)}: expected weights that were trained with the tokenizer beside them")
        return frozen(from_content(content)).to(device)

    try:
        results = json.loads((Path(config.out) / "results.json").read_text(encoding="utf-8"))
        made = type(config)(**results["config"])
        tokenizer = data.named_tokenizer(made.tokenizer) if made.tokenizer else data.load_tokenizer(folder / "tokenizer.tiktoken")
        own = tokenizer
        if made.teacher_tokenizer:
            learned = made.teacher_tokenizer.isdecimal()
            own = data.load_tokenizer(folder / "teacher.tiktoken") if learned else data.named_tokenizer(made.teacher_tokenizer)
        of_student, of_teacher = (vocabulary(tokenizer) for tokenizer in (tokenizer, own))
        labels = [label(row) for row in results["rows"] if row["seed"] == config.seed]
        models = {name: load(name) for name in labels}
        origins = dict.fromkeys(labels, (models["sft"], made.beta)) | {"teacher": (load("teacher-sft"), made.teacher_beta)}
    except (OSError, ValueError, KeyError, TypeError, RuntimeError) as error:
        raise UserError(f"--out: expected the folder of a finished run with --seed={config.seed}, got {config.out}: "
                        f"{' '.join(str(error).split())[:200]}") from None
    return Setup(made, config.seed, device, tokenizer, None, None, own, None), models, origins


def use_run(config, device):
    """--ask and --score."""
    texts = data.load_pairs(config.score) if config.score else None         # refused before anything is shown
    setup, models, origins = load_run(config, device)
    if config.ask:
        ids = [tokenizer.encode_ordinary(config.ask) for tokenizer in (setup.tokenizer, setup.teacher_tokenizer)]
        longest, room = max(map(len, ids)), setup.config.block_size - 1
        if longest > room:
            raise UserError(f"--ask: expected a prompt of at most {room} tokens, got {longest}")
        show_answers([config.ask], ids[:1], ids[1:], models, setup)
    if config.score:
        score_pairs(texts, config, setup, models, origins)


def score_pairs(texts, config, setup, models, origins):
    """The pairs of --score -> scores.jsonl in --out: a line a pair, its implicit reward margin under every model.

    A pair with a response that does not fit the context has null margins.
    """
    size = setup.config.block_size
    (kept, ids, cut), (their_kept, their_ids, _) = (data.encode(texts, tokenizer, size)
                                                    for tokenizer in (setup.tokenizer, setup.teacher_tokenizer))
    own, theirs = dict(zip(map(id, kept), ids)), dict(zip(map(id, their_kept), their_ids))          # by the text's identity
    lines = [{"pair": i, "prompt": text.prompt, "margins": dict.fromkeys(models)} for i, text in enumerate(texts)]
    fits = [(line, own[id(text)], theirs[id(text)]) for line, text in zip(lines, texts) if id(text) in own and id(text) in theirs]
    if not fits:
        raise UserError(f"--score: expected a pair that fits in {size} tokens in {config.score}, got none")
    print(f"{len(texts)} pairs; {cut} with the prompt cut from the left, {len(texts) - len(fits)} "
          f"with a response that does not fit in {size} tokens")
    for name, model in models.items():
        pairs = [theirs if name == "teacher" else own for _, own, theirs in fits]
        margins = cached_margins(model, *origins[name], pairs, setup)
        for (line, _, _), margin in zip(fits, margins.tolist()):
            line["margins"][name] = margin
        print(f"  {name:<20} mean margin {margins.mean().item():+.3f}, accuracy {is_correct(margins).mean().item():.3f}, "
              f"n = {len(pairs)}")
    path = Path(config.out) / "scores.jsonl"
    write(path, "".join(json.dumps(line) + "\n" for line in lines).encode())
    print(f"margins in {path}")


def show_answers(prompts, ids, teacher_ids, models, setup):
    """One sampled answer of every model to each prompt, given as text and as ids, with its true reward on the toy task."""
    answers = {name: sample(model, teacher_ids if name == "teacher" else ids, read_by(name, setup))
               for name, model in models.items()}
    for i, prompt in enumerate(prompts):
        print(f"\nprompt: {prompt.strip()[-300:]}")
        for name, responses in answers.items():
            text = " ".join(spoken(responses[i], read_by(name, setup).tokenizer).split())
            score = "" if setup.config.data else f"  (reward {data.reward(prompt, text):+.1f})"
            print(f"  {name:<20} {printable(text[:300])}{score}")
