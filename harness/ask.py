"""What a finished run can be asked: --ask, --score and --export."""

import json
import re
from dataclasses import fields
from pathlib import Path

import data
from harness.errors import UserError, printable
from harness.evaluate import all_pair_logps, is_correct, spoken
from harness.files import refuse_inside, write
from harness.keep import digest_of, file_of, lock, read, unpack
from harness.preferences import counted, load_pairs
from harness.sampling import sample
from harness.tokenizers import load_tokenizer, named_tokenizer
from harness.weights import export_model, export_targets

ANSWERS = 3
WORD = f"(?:{'|'.join([*data.THINGS, *data.ALL_FACTS])})"
TOY_PROMPT = re.compile(rf"\s*Describe the {WORD}: {WORD}(?:, {WORD})*\.", re.IGNORECASE)


def load_run(config, device):
    """What a run left in --out -> (its Config, tokenizer, {label: (model, reference, beta)}). Every
    file must be the one whose digest results.json has: one of another run would answer, too."""
    out, seed = Path(config.out), str(config.seed)
    folder, types = out / f"seed{seed}", {f.name: f.type for f in fields(config)}
    try:
        results = json.loads((out / "results.json").read_text(encoding="utf-8"))
        if results["digest"] != digest_of([results["config"], results["models"]]):
            raise UserError("results.json: expected options and models as the run wrote them")
        past = type(config)(**{name: types[name](x) for name, x in results["config"].items()})
        past.check(past.methods)
        if seed not in results["models"]:
            raise UserError(f"--seed: expected one of the run's, {', '.join(results['models'])}")
        digests, models = dict(results["models"][seed]), {}
        tokenizer = named_tokenizer(past.tokenizer) if past.tokenizer else \
            load_tokenizer(folder / "tokenizer.tiktoken")
        if digest_of(tokenizer) != digests.pop("tokenizer"):
            raise UserError(f"{folder}: expected the tokenizer that the models were trained with")
        for name, digest in digests.items():
            models[name] = unpack(read(folder / file_of(name)), device)
            if digest_of(models[name]) != digest:
                raise UserError(f"{folder / file_of(name)}: expected the model of this run's "
                                "table, got another one; repeat the training command")
    except Exception as error:          # anything can go wrong in bytes that nobody vouches for
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"--out: expected the folder of a finished run with --seed={config.seed}, "
                        f"got {config.out}: {reason}") from None
    teacher_ref = models.pop("teacher-sft", None)
    return past, tokenizer, {
        name: (model, teacher_ref, past.teacher_beta) if name == "teacher" else
        (model, models["sft"], past.beta) for name, model in models.items()}


def use_run(config, device):
    """--ask, --score and --export: first what can be refused early."""
    refuse_inside("score", config.score, config.out)
    pairs = load_pairs(config.score, skip_bad=config.skip_bad) if config.score else None
    past, tokenizer, models = load_run(config, device)
    exported = {name: model for name, (model, _, _) in models.items()}
    if "teacher" in models:
        exported["teacher-sft"] = models["teacher"][1]
    targets = export_targets(config.export, config.out, exported) if config.export else {}
    if config.ask:
        ask(config, past, tokenizer, models)
    if config.score:
        score_pairs(pairs, config, past, tokenizer, models)
    for name, target in targets.items():
        export_model(exported[name], target, tokenizer)
        print(f"  {name:<20} {printable(target)}")


def ask(config, past, tokenizer, models):
    """Three answers of every model to one prompt."""
    if re.search("[\ud800-\udfff]", config.ask):
        raise UserError("--ask: expected text in UTF-8, got other bytes")
    ids, room = tokenizer.encode_ordinary(config.ask), past.block_size - 1
    if not 0 < len(ids) <= room:
        raise UserError(f"--ask: expected a prompt of 1 to {room} tokens, got {len(ids)}")
    print(f"{ANSWERS} answers of each model at temperature 1; the same command repeats them")
    if not past.data and not TOY_PROMPT.match(config.ask):
        print("these models only know prompts like: Describe the dog: black, tiny, quick, ancient.")
    show_answers([config.ask] * ANSWERS, [ids] * ANSWERS,
                 {name: model for name, (model, _, _) in models.items()}, tokenizer, past,
                 config.seed)


def show_answers(prompts, ids, models, tokenizer, config, seed):
    """One sampled answer of every model to each prompt, with its true reward on the toy task.
    prompts: text, equal ones next to each other; ids: the same prompts as ids."""
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


def score_pairs(pairs, config, past, tokenizer, models):
    """scores.jsonl in --out: the pairs of --score in the layout of --data, with what models say.
    Each line has the pair and its index, "margins" and "logps" (of chosen and rejected) of every
    model and the teacher's implicit values as "chosen_value" and "rejected_value"."""
    fitting, ids, cut = data.encode(counted(pairs, "tokenised"), tokenizer, past.block_size)
    if not fitting:
        raise UserError(f"--score: expected a pair that fits in {past.block_size} tokens in "
                        f"{config.score}, got none")
    fits = set(map(id, fitting))
    print(f"{len(pairs)} pairs; {cut} with the prompt cut from the left, {len(pairs) - len(ids)} "
          f"left out because a response does not fit in {past.block_size} tokens")
    lines = [{"pair": i, "prompt": pair.prompt, "chosen": pair.chosen, "rejected": pair.rejected,
              "margins": {}, "logps": {}} for i, pair in enumerate(pairs) if id(pair) in fits]
    for name, (model, ref, beta) in models.items():
        policy, reference = (all_pair_logps(m, ids, past.batch_size) for m in (model, ref))
        ratios = policy - reference                                                 # (2, pairs)
        margins = beta * (ratios[0] - ratios[1])
        for line, margin, logps, values in zip(lines, margins.tolist(), policy.T.tolist(),
                                               (beta * ratios).T.tolist()):
            line["margins"][name] = margin
            line["logps"][name] = dict(zip(("chosen", "rejected"), logps))
            if name == "teacher":
                line["chosen_value"], line["rejected_value"] = values
        print(f"  {name:<20} mean margin {margins.mean().item():+.3f}, "
              f"accuracy {is_correct(margins).mean().item():.3f}, n = {len(ids)}")
    path = Path(config.out) / "scores.jsonl"
    with lock(path.parent):                                     # no run may go on meanwhile
        write(path, "".join(json.dumps(line) + "\n" for line in lines).encode())
    print(f"scores in {printable(path)}")
