"""The whole method, end to end, from text to a comparison table.

    python train.py                         the toy task: an exact true reward to judge by
    python train.py --data=FILE.jsonl       real preferences, one pair a line (the layouts: data.parse_pair)
    python train.py --help                  every option
    python train.py --ask=PROMPT            every model of a finished run answers
    python train.py --score=FILE.jsonl      implicit reward margins of other pairs under every model of a finished run

    torchrun --standalone --nproc_per_node=2 train.py       the same batches, shared out among processes

text -> pairs -> token batch and mask (data.py) -> log-probs, values, psi (measure.py) -> loss (tvkd.py) -> table. What a stage leaves
in --out is kept (store.py): the same command after a kill goes on where it was, another one makes only what its options change.

Teacher: supervised fine-tuning, then DPO. Student: supervised fine-tuning; then, from that one student, on the same pairs in the
same order and for the same number of steps, each of --methods:
    bc    behaviour cloning: likelihood of two answers sampled from the teacher for each pair's prompt
    kd    KL(teacher || student) over the vocabulary, on the tokens of the chosen and the rejected response
    dpo   the labels alone; the reference is the student after supervised fine-tuning
    tvkd  the labels and psi, from the teacher's values, which are computed once and kept
Left out: float16 with loss scaling, models too large for one device.
"""

import copy
import hashlib
import json
import math
import os
import sys
import time
from contextlib import contextmanager, nullcontext, redirect_stdout
from dataclasses import asdict
from datetime import timedelta
from pathlib import Path
from shutil import get_terminal_size

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch.nn.parallel import DistributedDataParallel

import data
from data import UserError
from measure import (Setup, against_dpo, batches, both_responses, cached_logps, cached_values, evaluate, is_correct, psi_of_pairs,
                     read_by, response_logps, reward_margins, sample, score, spoken, summed_psi, table_row, tokens_in)
from model import GPT, GPTConfig, from_content, frozen
from options import in_bfloat16, parse_args, pick_device, terminal_of
from report import label, show_psi, table, write_report
from store import Store, ctrl_c_held, file_of, fingerprint, fingerprint_of_code, load_safely, vocabulary, write
from tvkd import dpo_loss, kd_loss, nll_loss, tvkd_loss
from use import show_answers, use_run

# ---------------------------------------------------------------------------------------------------------------------------
# Training. A stage is a loss_of(model, ids) -> {"loss": the sum over "n" pairs or tokens, further sums to log, "tokens": of the
# batch}; `fit` minimises the mean of any of them.

PARTS = 6       # the rows of a batch go through the model in so many parts, by length: less padding, the same loss


def part_size(rows):
    """Rows in a part."""
    return math.ceil(len(rows) / PARTS)


def processes():
    """(rank, number of processes): (0, 1) but for torchrun."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def in_all(flag, device):
    """Whether the flag is set in every process; all of them get here before one goes on."""
    found = torch.tensor(float(flag), device=device)
    if processes()[1] > 1:
        dist.all_reduce(found, dist.ReduceOp.MIN)
    return bool(found)


def gradient(model, network, loss_of, ids, micro_batch):
    """Fill .grad of the model with the gradient of the mean loss of the batch `ids` -> the sums of loss_of over all of it.

    network: the model, or what torchrun and torch.compile made of it. Every process takes its share of the batch in micro-batches,
    which have unequal numbers of pairs or tokens: sums add up to the gradient of the whole batch, means would not.
    """
    rank, world = processes()
    micro_batches = world * math.ceil(len(ids) / (world * (micro_batch or len(ids))))
    total = 0.0
    for share in ids.tensor_split(micro_batches)[rank::world]:
        # Without a pair of its own a process takes one times 0: all of them have to take part in every exchange.
        sums = loss_of(network, (share if len(share) else ids[:1]).tolist())
        sums = {name: x * (len(share) > 0) for name, x in sums.items()}
        sums["loss"].backward()
        total = total + torch.stack([torch.as_tensor(x, dtype=torch.float32, device=ids.device).detach() for x in sums.values()])
    if world > 1:
        dist.all_reduce(total)
    total = dict(zip(sums, total.tolist()))
    for parameter in model.parameters():
        parameter.grad *= world / total["n"]                                # DistributedDataParallel took the processes' mean
    return total


def fit(stage, model, loss_of, n, steps, lr, config, seed, log_file, validate=None, partial=None):
    """Minimise loss_of over batches of the indices below n -> the lines of the log, which also go to the screen and to log_file.

    AdamW; the learning rate rises over the first tenth of the steps and falls to 0 over the second half. validate() -> metrics
    is called at every eval_interval and must not touch the order of batches, which has a generator of its own. partial: a
    store.Partial to go on from, and to leave weights, optimiser and step in every save_interval seconds and at Ctrl-C.
    """
    device = next(model.parameters()).device
    network = model if processes()[1] == 1 else DistributedDataParallel(model)
    network = torch.compile(network) if config.compile else network
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, betas=(0.9, 0.95), weight_decay=0.0, fused=True)
    order = data.epochs(n, config.batch_size, torch.Generator().manual_seed(seed))
    state, done, lines = partial and partial.load(), 0, []
    if state:
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        done, lines = state["step"], state["log"]
        print(f"  {stage}: going on from step {done}")
    print(*lines, sep="", end="", file=log_file)
    for _ in range(done):
        next(order)
    model.train()
    tokens, spent, since, saved = 0, 0.0, time.perf_counter(), time.perf_counter()
    with ctrl_c_held() if partial else nullcontext() as interrupted:
        for step in range(done + 1, steps + 1):
            ids = next(order)
            optimizer.zero_grad(set_to_none=True)
            total = gradient(model, network, loss_of, ids.to(device), config.micro_batch)
            norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            if not math.isfinite(total["loss"]) or not norm.isfinite():     # before the step, so that no checkpoint has it in
                raise FloatingPointError(f"{stage}: loss {total['loss'] / total['n']}, gradient norm {norm.item()} at step {step}; "
                                         f"expected finite numbers, try a lower learning rate than {lr}; batch {ids.tolist()}")
            for group in optimizer.param_groups:
                group["lr"] = lr * min(1.0, 10 * step / steps, 2 - 2 * (step - 1) / steps)
            optimizer.step()
            tokens += total["tokens"]

            validate_now = validate is not None and (step == steps or step % config.eval_interval == 0)
            if validate_now or step in (1, steps) or step % config.log_interval == 0:
                spent += time.perf_counter() - since                        # training alone, without validation
                metrics = {name: x / total["n"] for name, x in total.items() if name not in ("n", "tokens")}
                metrics |= validate() if validate_now else {}
                lines.append(json.dumps({"seed": seed, "stage": stage, "step": step, **metrics}) + "\n")
                print(lines[-1], end="", file=log_file, flush=True)
                shown = "  ".join(f"{name} {value:.3f}" for name, value in metrics.items() if value is not None)
                left = spent / (step - done) * (steps - step)
                print(f"  {stage} {step}/{steps}  {shown}  {tokens / spent:,.0f} tokens/s  {left:.0f} s left", flush=True)
                since = time.perf_counter()
            stop = partial is not None and not in_all(not interrupted, device)      # one pressed is all pressed
            if stop or partial and step < steps and time.perf_counter() - saved >= config.save_interval:
                partial.save({"model": model.state_dict(), "optimizer": optimizer.state_dict(), "step": step, "log": lines})
                saved = time.perf_counter()
            if stop:
                raise KeyboardInterrupt
    return lines


def summed(loss, rows, device):
    """loss(tokens, mask), a mean over response tokens, of all rows in parts -> what a loss_of gives."""
    found = [(loss(tokens, mask), mask.sum()) for _, tokens, mask in batches(rows, part_size(rows), device)]
    return {"loss": sum(mean * n for mean, n in found), "n": sum(n for _, n in found), "tokens": tokens_in(rows)}


def supervised(rows, device):
    """loss_of for SFT and behaviour cloning; rows[i] is a list of Rows of ids, so that an index may stand for several."""
    def loss_of(model, ids):
        def loss(tokens, mask):
            return nll_loss(score(model, tokens, mask), mask)
        return summed(loss, [row for i in ids for row in rows[i]], device)
    return loss_of


def distillation(teacher, pairs, device, loss=kd_loss):
    """loss_of for KL distillation by loss(student logits, teacher logits, mask).

    The teacher is read live: its logits are V floats per token, too much to keep.
    """
    def loss_of(model, ids):
        def between(tokens, mask):
            with torch.no_grad():
                teacher_logits = teacher(tokens)
            return loss(model(tokens), teacher_logits, mask)
        return summed(between, both_responses([pairs[i] for i in ids]), device)
    return loss_of


def preference(pairs, ref_logps, beta, device, psi=None, alpha=0.0):
    """loss_of for DPO, and for TVKD where psi is given. ref_logps and psi (summed): (2, len(pairs)), chosen then rejected."""
    def loss_of(model, ids):
        both = both_responses([pairs[i] for i in ids])                                             # 2B rows
        logps = response_logps(model, both, part_size(both), device)                               # (2B,)
        four = (*logps.chunk(2), *ref_logps[:, ids])                                               # four of (B,)
        losses = dpo_loss(*four, beta) if psi is None else tvkd_loss(*four, *psi[:, ids], beta, alpha)
        margins = reward_margins(*four, beta)
        names = ("loss", "policy_chosen", "policy_rejected", "ref_chosen", "ref_rejected", "margin", "accuracy")
        sums = {name: x.sum() for name, x in zip(names, (losses, *four, margins, is_correct(margins)))}
        return {**sums, "n": len(ids), "tokens": tokens_in(both)}
    return loss_of


def check_start(loss_of, model, ids, alpha_psi):
    """What must hold before a preference run: policy = reference, so the margin is 0 and the loss known; gradient not zero.

    ids: the pairs to check on; alpha_psi: alpha times (summed psi of the chosen - of the rejected) for each of them, 0 for DPO.
    """
    sums = loss_of(model, ids)
    loss, margin = sums["loss"] / sums["n"], sums["margin"].item() / sums["n"]
    expected = -F.logsigmoid(-alpha_psi).mean().item()
    gradient = torch.stack([g.norm() for g in torch.autograd.grad(loss, list(model.parameters()))]).norm().item()
    print(f"  step 0 check: loss {loss.item():.4f}, expected {expected:.4f}{' = ln 2' if not alpha_psi.any() else ''}; "
          f"margin {margin:.1e}, expected 0; gradient norm {gradient:.3f}, expected not 0")
    if not math.isfinite(loss.item() + gradient):
        raise FloatingPointError("the step 0 check failed: expected a finite loss and gradient; the weights or psi are not finite")
    rounding = 0.2 if model.config.bfloat16 else 1e-3       # the reference was scored in other batches, so other sums
    if abs(loss.item() - expected) > rounding or abs(margin) > rounding or not gradient > 0:
        raise RuntimeError("the step 0 check failed: policy and reference are not the same model, or are scored differently")


# ---------------------------------------------------------------------------------------------------------------------------
# The pipeline

def prepare(config, seed, device):
    """Text -> Setup of one seed; how many prompts were cut and pairs dropped is printed, once nothing is left to refuse."""
    sizes, lines = (config.train_pairs, config.val_pairs, config.test_pairs), [f"seed {seed}"]
    if config.data:
        pairs = data.load_pairs(config.data)
        texts, once = data.split_pairs(pairs, *sizes, seed), set(pairs)
        unused, again = len(pairs) - sum(map(len, texts[1:])), len(pairs) - len(once)
        swapped = sum((prompt, rejected, chosen) in once for prompt, chosen, rejected in once)
        if unused or again or swapped:
            lines.append(f"  {config.data}: {len(pairs)} pairs; {unused} left out by --train_pairs; kept: {again} that repeat "
                         f"another, {swapped} that another contradicts")
    else:
        texts = data.toy_splits(*sizes, seed)
    if config.tokenizer:
        tokenizer = data.named_tokenizer(config.tokenizer)
    else:
        tokenizer = data.learn_tokenizer(texts.train, config.vocab_size)
    own = tokenizer                                         # the teacher's
    if config.teacher_tokenizer.isdecimal():
        own = data.learn_tokenizer(texts.train, int(config.teacher_tokenizer))
    elif config.teacher_tokenizer:
        own = data.named_tokenizer(config.teacher_tokenizer, "teacher_tokenizer")
    kept, encoded, teachers = [], [], []
    for name, items in texts._asdict().items():
        text, ids, cut = data.encode(items, tokenizer, config.block_size)
        teacher_ids = ids
        if own is not tokenizer:                            # what does not fit in both is left out for both
            text, teacher_ids, _ = data.encode(text, own, config.block_size)
            text, ids, cut = data.encode(text, tokenizer, config.block_size)
        if not ids:
            raise UserError(f"--block_size: expected room for a prompt and a response ({name}), got {config.block_size}")
        kept.append(text)
        encoded.append(ids)
        teachers.append(teacher_ids)
        what, dropped = "rows" if name == "sft" else "pairs", len(items) - len(ids)
        lines.append(f"  {name}: {len(ids)} of {len(items)} {what}; {cut} with the prompt cut from the left, {dropped} dropped "
                     f"because a response does not fit in {config.block_size} tokens")
    kept, encoded, teachers = (data.Splits(*part) for part in (kept, encoded, teachers))
    setup = Setup(config, seed, device, tokenizer, kept, encoded, own, teachers)
    if config.student_pairs > len(setup.ids.train):
        raise UserError(f"--student_pairs: expected at most the {len(setup.ids.train)} training pairs, "
                        f"got {config.student_pairs}")
    for who, reader in (("teacher", setup.teachers), ("student", setup)):
        if getattr(config, f"{who}_init"):
            pretrained(who, reader)                                         # refused now rather than after an hour
    print("\n".join(lines))
    return setup


def new_model(who, setup):
    """A "teacher" or "student": new weights, or those of --teacher_init, --student_init."""
    config = setup.config
    layers, heads, width, path = (getattr(config, f"{who}_{name}") for name in ("layers", "heads", "width", "init"))
    torch.manual_seed(setup.seed)                                           # weights depend on nothing that ran before
    if path:
        model = pretrained(who, setup)
    else:
        model = GPT(GPTConfig(setup.tokenizer.n_vocab, config.block_size, layers, heads, width))
    model.config.bfloat16 = in_bfloat16(config.precision, setup.device)
    print(f"{who}: {sum(p.numel() for p in model.parameters()):,} parameters")
    return model.to(setup.device)


def pretrained(who, setup):
    """The GPT of a checkpoint of nanoGPT, or of a kept file.

    Its context is cut to block_size; the rows that nanoGPT adds to round its vocabulary up to a multiple of 64 go, so that no
    probability is left on ids that no text has.
    """
    option, path = f"--{who}_init", getattr(setup.config, f"{who}_init")
    n_vocab, block_size = setup.tokenizer.n_vocab, setup.config.block_size
    try:
        with open(path, "rb") as file:
            content = load_safely(file, option)
        sizes = content["model_args"] if "model_args" in content else content["config"]         # nanoGPT's, or a kept file's
        sizes = {name: sizes[name] for name in ("vocab_size", "block_size", "n_layer", "n_head", "n_embd", "bias")}
        state = {name.removeprefix("_orig_mod."): tensor for name, tensor in content["model"].items()}
        rounded, vocab_size = 64 * math.ceil(n_vocab / 64), sizes["vocab_size"]
        if vocab_size not in (n_vocab, rounded):
            raise UserError(f"{option}: expected a vocabulary of the tokenizer's {n_vocab} ids (or {rounded}), got {vocab_size} in {path}")
        head, embedding = (state.get(f"{name}.weight") for name in ("lm_head", "transformer.wte"))
        if head is not None and embedding is not None and not torch.equal(head, embedding):
            raise UserError(f"{option}: expected an output head tied to the token embedding, got two tensors in {path}")
        if sizes["block_size"] < block_size:
            raise UserError(f"{option}: expected a context of at least --block_size={block_size}, got {sizes['block_size']} in {path}")
        model = GPT(GPTConfig(**{**sizes, "vocab_size": n_vocab, "block_size": block_size}))
        rows = {"transformer.wte.weight": n_vocab, "lm_head.weight": n_vocab, "transformer.wpe.weight": block_size}
        model.load_weights({name: tensor[:rows.get(name)] for name, tensor in state.items()})
    except UserError:
        raise
    except (OSError, ValueError, KeyError, IndexError, TypeError, AttributeError, RuntimeError) as error:
        said = f"{type(error).__name__}: {' '.join(str(error).split())[:120]}"
        raise UserError(f"{option}: expected a checkpoint of nanoGPT or of this program, got {path}: {said}") from None
    return model


def start_of(who, config):
    """Digest of the checkpoint that a model starts from."""
    path = getattr(config, f"{who}_init")
    return path and hashlib.sha256(Path(path).read_bytes()).hexdigest()


def fine_tuned(who, setup, log_file, partial=None):
    """A new "teacher" or "student" after supervised fine-tuning on the corpus -> (model, lines of the log)."""
    config, rows = setup.config, [[row] for row in setup.ids.sft]
    model = new_model(who, setup)
    steps, lr = (getattr(config, f"{who}_sft_{name}") for name in ("steps", "lr"))
    loss_of = supervised(rows, setup.device)
    return model, fit(f"{who}-sft", model, loss_of, len(rows), steps, lr, config, setup.seed, log_file, partial=partial)


def dpo_teacher(teacher_ref, setup, log_file, validate=None, partial=None):
    """DPO on all training pairs, from the fine-tuned teacher, its reference -> (model, lines). validate: model -> metrics."""
    config, pairs = setup.config, setup.ids.train
    teacher = copy.deepcopy(teacher_ref).requires_grad_(True)
    ref_logps = cached_logps(teacher_ref, both_responses(pairs), config.batch_size, setup.device).view(2, -1)   # (2, all pairs)
    loss_of = preference(pairs, ref_logps, config.teacher_beta, setup.device)
    check_start(loss_of, teacher, list(range(len(pairs)))[:config.micro_batch or config.batch_size], torch.zeros(1))
    return teacher, fit("teacher-dpo", teacher, loss_of, len(pairs), config.teacher_dpo_steps, config.teacher_dpo_lr, config,
                        setup.seed, log_file, validate and (lambda: validate(teacher)), partial)


def teacher_answers(teacher, pairs, setup):
    """Rows for behaviour cloning: to each pair two answers that the teacher samples, in the student's tokens."""
    prompts = [row.prompt for row in both_responses(pairs)]
    theirs = [row.prompt for row in both_responses(setup.teacher_ids.train[:len(pairs)])]
    answers = sample(teacher, theirs, setup.teachers)
    if setup.teacher_tokenizer is not setup.tokenizer:
        eos, ended = setup.tokenizer.eot_token, [setup.teacher_tokenizer.eot_token in answer for answer in answers]
        texts = [spoken(answer, setup.teacher_tokenizer) for answer in answers]
        answers = [setup.tokenizer.encode_ordinary(text) + [eos] * end for text, end in zip(texts, ended)]
        answers = [answer[:setup.config.block_size - len(prompt)] for prompt, answer in zip(prompts, answers)]
    rows = [data.Row(*row) for row in zip(prompts, answers)]
    return list(zip(rows[:len(pairs)], rows[len(pairs):]))


def student_loss(method, policy, pairs, ref_logps, setup, teacher=None, psi=None):
    """loss_of for one of METHODS. pairs: the student's; ref_logps (2, pairs); teacher: for bc, kd; psi (2, pairs): for tvkd."""
    config, device = setup.config, setup.device
    if method == "bc":
        return supervised(teacher_answers(teacher, pairs, setup), device)
    if method == "kd":
        return distillation(teacher, pairs, device)
    loss_of = preference(pairs, ref_logps, config.beta, device, *(() if psi is None else (psi, config.alpha)))
    first = list(range(len(pairs)))[:config.micro_batch or config.batch_size]
    check_start(loss_of, policy, first, torch.zeros(1) if psi is None else config.alpha * (psi[0] - psi[1])[first])
    return loss_of


def run(setup, store, log_file):
    """One full pipeline of one seed -> (rows of the table, held-out pairs with psi per token). Prints as it goes.

    What each stage makes is kept in `store`, under the checksums of what it is made from. The stage gets a Setup whose options are
    noted as it reads them: what it makes must depend on no other. Only its log may: the log of a kept stage is that of its training,
    with the intervals and the validation of then.
    """
    seed, device, is_first = setup.seed, setup.device, processes()[0] == 0

    def trained(stage, setup, made_from, train):
        """The frozen model of a stage. train(setup, partial) -> (model, lines of its log, which go to log_file in any case)."""
        def make(setup, partial):
            model, lines = train(setup, partial)
            return {"config": asdict(model.config), "model": model.state_dict(), "log": lines}
        content, is_new = store.keep(file_of(stage), setup, {**made_from, "tokenizer": vocabulary(setup.tokenizer)}, make)
        if not is_new:
            print(f"  {stage}: kept in {store.folder / file_of(stage)}")
            print(*content["log"], sep="", end="", file=log_file)
        return frozen(from_content(content)).to(device)

    def fine_tuned_as(who, setup):
        made_from = {"corpus": fingerprint(setup.ids.sft), f"weights of --{who}_init": start_of(who, setup.config)}
        return trained(f"{who}-sft", setup, made_from, lambda setup, partial: fine_tuned(who, setup, log_file, partial))

    def validation(origin, beta, setup):
        def validate(model):
            return {f"val_{key}": x for key, x in evaluate(model, origin, beta, "val", 1, setup)[0].items()}
        return validate if is_first else None

    theirs = setup.teachers
    teacher_ref = fine_tuned_as("teacher", theirs)
    validate = validation(teacher_ref, setup.config.teacher_beta, theirs)
    made_from = {"pairs": fingerprint(theirs.ids.train), **store.sums("teacher-sft.pt")}
    teacher = trained("teacher-dpo", theirs, made_from,
                      lambda theirs, partial: dpo_teacher(teacher_ref, theirs, log_file, validate, partial))
    # The student every method starts from, which is also its reference.
    ref = fine_tuned_as("student", setup)
    validate = validation(ref, setup.config.beta, setup)

    pairs, teacher_pairs = (ids.train[:setup.config.student_pairs or None] for ids in (setup.ids, theirs.ids))
    both, teacher_both = both_responses(pairs), both_responses(teacher_pairs)
    made_from = {"pairs": fingerprint(pairs), **store.sums("student-sft.pt")}
    of_teacher = {"the teacher's pairs": fingerprint(teacher_pairs), **store.sums("teacher-sft.pt", "teacher-dpo.pt")}

    def reference(setup, partial):
        return {"logps": cached_logps(ref, both, setup.config.batch_size, device)}
    content, _ = store.keep("ref-logps.pt", setup, made_from, reference)
    ref_logps = content["logps"].to(device).view(2, -1)                                            # (2, pairs)

    def teacher_values(kind):
        def make(theirs, partial):
            return {"values": torch.cat(cached_values(kind, teacher, teacher_ref, teacher_both, theirs.config.teacher_beta,
                                                      theirs.config.batch_size, device))}          # one float a token
        content, _ = store.keep(f"values-{kind}.pt", theirs, of_teacher, make)
        return content["values"].split([tokens_in([row]) for row in teacher_both])
    values = {kind: teacher_values(kind) for kind in setup.config.value if "tvkd" in setup.config.methods}

    def student(row):
        """The student of one row of the table."""
        method, kind = row["method"], row["value"]

        def train(setup, partial):
            config, policy = setup.config, copy.deepcopy(ref).requires_grad_(True)
            psi = summed_psi(values[kind], teacher_pairs, config.gamma, terminal_of(kind, config), device) if kind else None
            loss_of = student_loss(method, policy, pairs, ref_logps, setup, teacher, psi)
            lr = config.lr if method in ("dpo", "tvkd") else config.distill_lr
            lines = fit(label(row), policy, loss_of, len(pairs), config.steps, lr, config, seed, log_file,
                        validate and (lambda: validate(policy)), partial)
            return policy, lines
        kept = {"bc": of_teacher, "kd": of_teacher, "dpo": {}, "tvkd": store.sums(f"values-{kind}.pt") if kind else {}}[method]
        return trained(label(row), setup, {**made_from, **kept}, train)

    rows = [{"method": name, "value": None, "terminal": None} for name in ("teacher", "sft")]
    models = {"teacher": teacher, "sft": ref}
    for method, kind in [(m, v) for m in setup.config.methods for v in (setup.config.value if m == "tvkd" else (None,))]:
        rows.append({"method": method, "value": kind, "terminal": kind and terminal_of(kind, setup.config)})
        models[label(rows[-1])] = student(rows[-1])
    if not is_first:
        return [], []                                                       # evaluation and writing happen once

    rows = measured(rows, models, {"teacher": teacher_ref, "student": ref}, setup, store)
    some = [[pair.prompt for pair in split.test[:2]] for split in (setup.texts, setup.ids, setup.teacher_ids)]
    show_answers(*some, models, setup)
    shown = [psi_of_pairs(kind, terminal_of(kind, setup.config), teacher, teacher_ref, theirs) for kind in values]
    for of_kind in shown:
        show_psi(of_kind[0], colour=sys.stdout.isatty() and "NO_COLOR" not in os.environ, width=get_terminal_size().columns)
    return rows, sum(shown, [])


def measured(rows, models, origins, setup, store):
    """The rows of the table with what is measured of each model on the held-out pairs. origins: what each model started from."""
    rewards = {}
    for i, row in enumerate(rows):
        name, who = label(row), "teacher" if label(row) == "teacher" else "student"

        def make(setup, partial):
            beta = setup.config.teacher_beta if who == "teacher" else setup.config.beta
            found, each = table_row(row, models[name], origins[who], beta, setup)
            return {"row": found, "reward": each.get("reward")}
        own = read_by(name, setup)
        made_from = {"held-out pairs": fingerprint(own.ids.test), "their texts": fingerprint(own.texts.test),
                     "tokenizer": vocabulary(own.tokenizer), **store.sums(file_of(name), f"{who}-sft.pt")}
        content, _ = store.keep(file_of(name, ".row.pt"), own, made_from, make, in_all=bool)
        rows[i], rewards[name] = content["row"], content["reward"]
    if rewards.get("dpo") is None:
        return rows
    return [row if label(row) == "dpo" else against_dpo(row, rewards[label(row)], rewards["dpo"]) for row in rows]


@contextmanager
def together(device):
    """Under torchrun, one of its processes: the device is a GPU of its own where there are GPUs, and only the first one prints."""
    if "TORCHELASTIC_RUN_ID" not in os.environ:
        yield device
        return
    if device.type == "cuda":
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        if device.index >= torch.cuda.device_count():
            raise UserError(f"--nproc_per_node: expected at most the {torch.cuda.device_count()} GPUs of this machine")
        torch.cuda.set_device(device)
    # The others wait while the first one evaluates.
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo", timeout=timedelta(hours=6))
    with open(os.devnull, "w", encoding="utf-8") as nowhere, redirect_stdout(nowhere) if dist.get_rank() else nullcontext():
        yield device
    dist.destroy_process_group()                                            # not after an error: the others may never answer


def run_all(config, device, started):
    """Every seed -> results.json, report.html and log.jsonl in --out."""
    rows, shown, out, is_first = [], [], Path(config.out), processes()[0] == 0
    common = {"torch": str(torch.__version__), "device": device.type, "threads": torch.get_num_threads(),
              "processes": processes()[1], "the code": fingerprint_of_code()}

    def outdated():                                                         # no earlier run's table beside new weights
        for name in ("results.json", "report.html"):
            (out / name).unlink(missing_ok=True)
    for seed in range(config.seed, config.seed + config.seeds):
        setup = prepare(config, seed, device)                               # refuses bad data before --out is touched
        folder = out / f"seed{seed}"
        try:
            folder.mkdir(parents=True, exist_ok=True)
            if seed == config.seed and is_first:
                (out / "log.jsonl").unlink(missing_ok=True)
            log_file = open(out / "log.jsonl" if is_first else os.devnull, "a", encoding="utf-8")
        except OSError as error:
            raise UserError(f"--out: expected a folder that can be written, got {config.out}: {error.strerror}") from None
        for name, tokenizer, learned in (("tokenizer.tiktoken", setup.tokenizer, not config.tokenizer),
                                         ("teacher.tiktoken", setup.teacher_tokenizer, config.teacher_tokenizer.isdecimal())):
            if is_first and learned:
                write(folder / name, data.tokenizer_text(tokenizer).encode())
        with log_file:
            store = Store(folder, {"seed": seed, **common}, is_first, lambda flag: in_all(flag, device), outdated)
            new_rows, new_shown = run(setup, store, log_file)
        if not is_first:
            continue
        rows, shown = rows + new_rows, shown + new_shown
        made = {"torch": torch.__version__, "device": str(device), "threads": torch.get_num_threads(),
                "seconds": round(time.perf_counter() - started, 1)}
        results = {"config": asdict(config), "rows": rows, "pairs": shown, "made": made}
        log = (out / "log.jsonl").read_text(encoding="utf-8").splitlines()
        write_report(results, [json.loads(line) for line in log], out / "report.html")
        write(out / "results.json", (json.dumps(results, indent=1) + "\n").encode())
        print(f"\n{table(new_rows)}")
    if config.seeds > 1:
        print(f"\nall seeds\n{table(rows)}")
    print(f"\n{time.perf_counter() - started:.0f} s; rows in {out / 'results.json'}, pairs and curves in {out / 'report.html'}")


def main(argv=None):
    started = time.perf_counter()
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")                            # a sampled character must not end a finished run
    try:
        config = parse_args(argv, __doc__)
        device = pick_device(config.device)
        if config.ask or config.score:
            if int(os.environ.get("RANK", 0)) == 0:                         # one process is enough
                use_run(config, device)
        else:
            with together(device) as device:
                run_all(config, device, started)
        return 0
    except UserError as error:
        status, said = 2, error
    except FloatingPointError as error:
        status, said = 1, error
    except KeyboardInterrupt:
        status, said = 130, "stopped; the same command goes on from here"
    except BrokenPipeError:                                                 # whoever read the output, such as head, has gone
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())      # or Python would try again at its end
        return 1
    except OSError as error:
        status, said = 2, f"expected files that can be read and written: {error}"
    print(f"train.py: {said}", file=sys.stderr)
    return status


if __name__ == "__main__":
    sys.exit(main())
