"""What a finished run can be asked: --ask, --score and --export."""

import json
import os
import re
from dataclasses import fields
from pathlib import Path

import torch

import data
from data import UserError, printable
from harness.evaluate import is_correct, pair_logps, reward_margins, sample, spoken
from harness.keep import (digest_of_tokenizer, file_of, lock, read, refuse_inside, refuse_others,
                          write)
from harness.preferences import load_pairs, counted
from harness.processes import under_torchrun
from harness.report import RESULTS, check
from harness.table import Row
from harness.tokenizers import load_tokenizer, named_tokenizer
from harness.weights import export_model
from model import batches, both_responses, device_of, from_content, frozen_copy, response_logps

ANSWERS, SPACE = 3, "\u2423"
WORD = f"(?:{'|'.join([*data.THINGS, *data.ALL_FACTS])})"
TOY_PROMPT = re.compile(rf"\s*Describe the {WORD}: {WORD}(?:, {WORD})*\.", re.IGNORECASE)


def load_run(config, device):
    """What a run left in --out -> (its Config, tokenizer, models by label, origins by label).

    origins: the reference and the beta of each model's implicit reward.
    """
    out = Path(config.out)
    folder = out / f"seed{config.seed}"
    for path in (out / "results.json", folder / "tokenizer.tiktoken"):
        refuse_others(path)
    try:
        results = json.loads((out / "results.json").read_text(encoding="utf-8"))
        check(results, RESULTS, "results.json")
        past = type(config)(**results["config"])
        check_types(past)
        if past.tokenizer:
            tokenizer = named_tokenizer(past.tokenizer)
        else:
            tokenizer = load_tokenizer(folder / "tokenizer.tiktoken")
        if results["tokenizers"][str(config.seed)] != digest_of_tokenizer(tokenizer):
            raise UserError(f"{folder}: expected weights that were trained with the tokenizer "
                            "beside them")
        rows = [Row.from_flat(row) for row in results["rows"]]
        labels = [row.label for row in rows if row.seed == config.seed]
        for label in labels:            # they become names of files, and are printed
            if not re.fullmatch(r"\w[\w .+/-]*", label):
                raise ValueError(f"rows: expected names of methods, got {label!r:.60}")
        stages = labels + ["teacher-sft"] * ("teacher" in labels)
        models = {name: frozen_copy(from_content(read(folder / file_of(name)))).to(device)
                  for name in stages}
        for name, model in models.items():
            sizes = model.config.vocab_size, model.config.block_size
            if sizes != (tokenizer.n_vocab, past.block_size):
                raise UserError(f"{folder / file_of(name)}: expected weights that were trained "
                                "with the tokenizer beside them")
        origins = dict.fromkeys(labels, (models["sft"], past.beta))
        if "teacher" in labels:
            origins["teacher"] = models.pop("teacher-sft"), past.teacher_beta
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RuntimeError) as error:
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"--out: expected the folder of a finished run with --seed={config.seed}, "
                        f"got {config.out}: {reason}") from None
    return past, tokenizer, models, origins


def check_types(past):
    """Raise ValueError unless the options of a results.json are ones that a run can have had."""
    for f in fields(past):
        value = getattr(past, f.name)
        if f.type is tuple:         # a list in JSON
            value = tuple(value)
            setattr(past, f.name, value)
        if type(value) is not f.type and not (f.type is float and type(value) is int):
            raise ValueError(f"config.{f.name}: expected {f.type.__name__}, got {value!r:.60}")
    past.check(past.methods)


def use_run(config, device):
    """--ask, --score and --export. Under torchrun the first process does it."""
    if under_torchrun() and os.environ.get("RANK") != "0":
        return
    refuse_inside("score", config.score, config.out)
    # Refused before anything else.
    pairs = load_pairs(config.score, skip_bad=config.skip_bad) if config.score else None
    past, tokenizer, models, origins = load_run(config, device)
    if config.export:
        check_targets(config.export, models)
    if config.ask:
        ask(config, past, tokenizer, models, origins)
    if config.score:
        score_pairs(pairs, config, past, tokenizer, models, origins)
    if config.export:
        export(config, tokenizer, models)


def ask(config, past, tokenizer, models, origins):
    """Three answers of every model to one prompt; with --tokens psi of each token as well."""
    ids, room = tokenizer.encode_ordinary(config.ask), past.block_size - 1
    if not 0 < len(ids) <= room:
        raise UserError(f"--ask: expected a prompt of 1 to {room} tokens, got {len(ids)}")
    print(f"{ANSWERS} answers of each model at temperature 1; the same command repeats them")
    if not past.data and not TOY_PROMPT.match(config.ask):
        print("these models only know prompts like: Describe the cat: red, small, fast, old.")
    answers = show_answers([config.ask] * ANSWERS, [ids] * ANSWERS, models, tokenizer, past,
                           config.seed)
    if config.tokens:
        if "teacher" not in models:
            raise UserError("--tokens: expected a run with a teacher, whose psi it shows")
        for name, responses in answers.items():
            response = data.Example(ids, responses[0])
            logratios = token_logratios(models["teacher"], origins["teacher"][0], [response])
            psi = [past.teacher_beta * x for x in logratios[0]]
            tokens = [tokenizer.decode([token]) for token in response.response]
            print(f"\npsi of the first answer of {name}, implicit value of the teacher "
                  f"(sum {sum(psi):+.2f}):")
            print("  " + " ".join(f"{printable(token.strip()) or SPACE}[{x:+.2f}]"
                                  for token, x in zip(tokens, psi)))


def show_answers(prompts, ids, models, tokenizer, config, seed):
    """One sampled answer of every model to each prompt, with its true reward on the toy task.

    prompts: text, equal ones next to each other; ids: the same prompts as ids.
    """
    answers = {name: sample(model, ids, tokenizer.eot_token, config.max_new_tokens, seed)
               for name, model in models.items()}
    for prompt in dict.fromkeys(prompts):
        print(f"\nprompt: {printable(' '.join(prompt.split())[-300:])}")
        rewarded = not config.data and TOY_PROMPT.match(prompt)     # else it would mean nothing
        for name, responses in answers.items():
            for response in [r for p, r in zip(prompts, responses) if p == prompt]:
                text = " ".join(spoken(response, tokenizer).split())
                reward = f"  (reward {data.reward(prompt, text):+.1f})" if rewarded else ""
                print(f"  {name:<20} {printable(text[:300])}{reward}")
    return answers


@torch.no_grad()
def token_logratios(model, ref, rows):
    """log pi(a_t|s_t) / pi_ref(a_t|s_t) of the response tokens of each row: lists of nats."""
    logratios = [None] * len(rows)
    for ids, tokens, mask in batches(rows, 64, device_of(model)):
        batch = (response_logps(model, tokens, mask)
                 - response_logps(ref, tokens, mask))                           # (B, T)
        for i, logratio, scored in zip(ids, batch, mask):
            logratios[i] = logratio[scored].tolist()
    return logratios


def score_pairs(pairs, config, past, tokenizer, models, origins):
    """scores.jsonl in --out: the pairs of --score in the layout of --data, with what models say.

    Each line has the pair, "margins" and "logps" (of chosen and rejected) of every model and the
    teacher's implicit values as "chosen_value" and "rejected_value"; with --tokens the "tokens" as
    text and their "log_ratios". Pairs that do not fit the context are left out.
    """
    fitting, ids, cut = data.encode(counted(pairs, "tokenised"), tokenizer, past.block_size)
    number = {id(pair): i for i, pair in enumerate(pairs)}
    if not fitting:
        raise UserError(f"--score: expected a pair that fits in {past.block_size} tokens in "
                        f"{config.score}, got none")
    print(f"{len(pairs)} pairs; {cut} with the prompt cut from the left, "
          f"{len(pairs) - len(fitting)} left out because a response does not fit in "
          f"{past.block_size} tokens")
    both = both_responses(ids)
    lines = [{"pair": number[id(text)], "prompt": text.prompt, "chosen": text.chosen,
              "rejected": text.rejected, "margins": {}, "logps": {}} for text in fitting]
    if config.tokens:
        for line, *rows in zip(lines, both[:len(ids)], both[len(ids):]):
            line["tokens"] = {which: [tokenizer.decode([token]) for token in row.response]
                              for which, row in zip(("chosen", "rejected"), rows)}
            line["log_ratios"] = {}
    for name, model in models.items():
        ref, beta = origins[name]
        policy, reference = (pair_logps(m, ids, past.batch_size) for m in (model, ref))
        margins = reward_margins(*policy, *reference, beta)
        for line, margin, chosen, rejected in zip(lines, margins.tolist(), *policy.tolist()):
            line["margins"][name] = margin
            line["logps"][name] = {"chosen": chosen, "rejected": rejected}
        if name == "teacher":
            for line, chosen, rejected in zip(lines, *(beta * (policy - reference)).tolist()):
                line["chosen_value"], line["rejected_value"] = chosen, rejected
        if config.tokens:
            ratios = token_logratios(model, ref, both)
            for line, chosen, rejected in zip(lines, ratios[:len(ids)], ratios[len(ids):]):
                line["log_ratios"][name] = {"chosen": chosen, "rejected": rejected}
        print(f"  {name:<20} mean margin {margins.mean().item():+.3f}, "
              f"accuracy {is_correct(margins).mean().item():.3f}, n = {len(ids)}")
    path = Path(config.out) / "scores.jsonl"
    refuse_others(path.with_name(".lock"))
    held = lock(Path(config.out))       # no run may replace the models while this is written
    write(path, "".join(json.dumps(line) + "\n" for line in lines).encode())
    held.close()
    print(f"scores in {printable(str(path))}")


def check_targets(folder, models):
    """Raise UserError before anything is written, unless every model has a folder to go to."""
    targets = [Path(folder) / file_of(name, "") for name in models]
    for path in (Path(folder), *targets):
        if path.exists() and not path.is_dir():
            raise UserError(f"--export: expected a folder or nothing at {path}, got another file")
    for path in [target / name for target in targets
                 for name in ("config.json", "model.safetensors", "tokenizer.tiktoken")]:
        refuse_others(path)


def export(config, tokenizer, models):
    """Every model of a run as FOLDER/LABEL/ with config, weights and tokenizer."""
    for name, model in models.items():
        folder = Path(config.export) / file_of(name, "")
        export_model(model, folder, tokenizer)
        print(f"  {name:<20} {printable(str(folder))}")
