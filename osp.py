"""Online Self-Preferring Language Models (OSP, arXiv 2405.14103): a reference implementation.

One language model answers, judges its own answers, and learns from how STRONGLY one is preferred. pi_SFT
is its frozen start. A step, for each prompt x (`train_step`, section 3: start reading there):

    sample   y_1 ... y_K from the current policy pi_theta
    rank     score of y_k = log-odds of "B" when pi_SFT is asked which is better, A = y_1 or B = y_k
    pair     best with worst, second best with second worst, and so on: K//2 pairs (better b, worse w)
    judge    strength p = pi_SFT's probability that b is better, averaged over both orders of b and w
    learn    h = beta [log(pi_theta(b|x) / pi_SFT(b|x)) - log(pi_theta(w|x) / pi_SFT(w|x))], and one
             optimiser step on the mean of L = -[p log sigmoid(h) + (1 - p) log sigmoid(-h)]

    python osp.py                                           the built-in task, whose true reward is known
    python osp.py --model_name_or_path M --dataset_name D   a Hugging Face causal LM and preference data
    torchrun --nproc_per_node N osp.py ...                  the same in N processes, with a GPU each

The same command goes on with a run that was broken off, and shows the result of one that is finished.
Part I is the method, in the order of the algorithm. Part II is what makes it practical.

The paper's public text leaves some steps open. This project filled them in. Docstrings call it a
"reconstruction", and here it is marked [R]:
  [R] the baseline of ranking is the first response sampled, and it is always shown as A (section 6)
  [R] pairs are best with worst, second best with second worst, and so on inwards (section 6)
  [R] strengths are asked in both orders, and their probabilities are averaged (section 6)
  [R] the formula of the SPCE loss; the paper gives its name and its purpose (section 8)
  [R] the judging task shows each pair in both orders; its loss is on the verdict alone (section 10)
  [R] the judge's question, SFT's curriculum and its share of responding, the optimiser's settings, that
      identical pairs are dropped, and the built-in task

Shapes: B prompts, K responses a prompt, P pairs, N sequences, T columns of tokens, V words of the
vocabulary. A and B are the places in the judge's question, and Pr(A) is the probability of the verdict
A. 1 and 2 are the responses of a pair: _1 is of Pair.better, which ranks higher, _2 of Pair.worse. A
strength p says how likely 1 is better. `logps` is always a SUM over a response's tokens, its EOS
included, its prompt excluded; `token_logps` is per token. A response that was cut off has no EOS. `args`
is an Arguments: section 1, and what Part II adds to it. `models` is a Models.
"""
import difflib
import fcntl
import functools
import glob
import itertools
import json
import math
import os
import random
import re
import signal
import sys
import tempfile
import time
from collections import Counter, namedtuple
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Callable, Literal

os.environ.setdefault("GOMP_SPINCOUNT", "4000")  # threads that wait for long are slow beside other work
import datasets
import numpy as np
import tokenizers
import torch
import torch.nn.functional as F
import transformers
from torch import Tensor, distributed as dist, nn
from tqdm.auto import tqdm

Prompt = str | list[dict]  # a text, or chat messages [{"role": ..., "content": ...}, ...]
Ids = list[int]  # the token ids of one prompt or of one response


class RunError(Exception):
    """Why a run cannot go on, in one sentence for the user. `code`: 2 before the first step, 1 later."""
    def __init__(self, sentence, code=2):
        super().__init__(sentence)
        self.code = code


# 1. Arguments of the method -----------------------------------------------------------------------
Schedule = Literal["linear", "cosine", "constant", "constant_with_warmup"]


@dataclass
class MethodArguments:
    """What the method depends on; a comment is the help on its option, in the group named above it.
    BUILTIN (section 12) has the values of the built-in task. Of all these the paper's public text names
    only the 200 prompts."""
    # -- method --
    method: str = "osp"  # what is run: osp, tso, or collect
    model_name_or_path: str | None = None  # Hub name or folder; none: a tiny random model
    seed: int = 0  # the only source of randomness
    num_generations: int = 8  # K, the responses sampled for each prompt
    max_new_tokens: int = 128  # longest response, in tokens
    temperature: float = 1.0  # temperature of sampling; 1 is on-policy
    beta: float = 0.1  # scale of the implicit reward
    num_train_prompts: int = 200  # distinct prompts to train on
    prompts_per_step: int = 16  # B, the prompts of a step, of all processes together
    num_train_epochs: int = 3  # passes over these prompts
    max_steps: int = -1  # steps; -1: after these passes; 0: only SFT and evaluation
    learning_rate: float = 1e-6  # peak learning rate
    lr_scheduler_type: Schedule = "linear"  # curve of the learning rate after its warm-up
    warmup_steps: float = 0.1  # steps of warm-up; below 1: a share of all
    max_grad_norm: float = 1.0  # gradients are clipped to this norm
    # -- SFT --
    sft: bool = True  # fine-tune first, where the data has chosen and rejected
    sft_learning_rate: float = 1e-5  # peak learning rate of SFT
    sft_batch_size: int = 16  # preference pairs an SFT step, each in both orders
    sft_num_train_epochs: int = 6  # passes of SFT over the pairs
    sft_max_steps: int = -1  # SFT steps; -1: after these passes


# 2. Load the SFT model; the records that the stages hand on ---------------------------------------
def load_model(name, args, dtype=torch.float32):
    """A causal LM and its tokenizer; no name: the built-in ones. `dtype` is that of its Linear weights,
    all others are fp32. The checks note two facts as attributes of the model: shares_prompts, whether
    equal prompts may be computed once, and words, how many ids may be sampled. Raises RunError."""
    if name is None:
        model, tokenizer = builtin_model(args.seed)
    else:
        advice = FROM_HUB + "folder with safetensors; a tokenizer.model needs the package sentencepiece"
        with trying(f"read {name!r} as a causal language model", advice):
            check_files(name, args.trust_remote_code)
            tokenizer = transformers.AutoTokenizer.from_pretrained(
                name, trust_remote_code=args.trust_remote_code, mistral_format=False)  # has no template
            model, keys = transformers.AutoModelForCausalLM.from_pretrained(
                name, dtype=torch.float32, use_safetensors=True,
                trust_remote_code=args.trust_remote_code, output_loading_info=True)
        check_tokenizer(model, tokenizer, args)
        check_weights(model, keys)
    check_passes(model, args.gradient_checkpointing)
    if args.bf16:
        in_bf16(model, dtype)
        check_passes(model, args.gradient_checkpointing, [shares_prompts(model)])
    return model, tokenizer


@dataclass
class Models:
    """The models of a run by role. In OSP one frozen model has three roles: start, reference, judge."""
    tokenizer: Any
    policy: Any = None  # pi_theta, which the optimizer trains
    start: Any = None  # pi_SFT, with which evaluation compares; it never moves
    reference: Any = None  # of the reward
    judge: Any = None  # of the strengths
    others: dict = field(default_factory=dict)  # those named by options: (model, tokenizer)s
    optimizer: Any = None
    scheduler: Any = None


@dataclass
class Example:
    """A prompt of the data."""
    prompt: Prompt
    ids: Ids  # of the framed prompt, which a response continues
    index: int  # its number in its set, which picks its sampling noise
    responses: list  # the data's own (chosen, rejected)s, if it has any


@dataclass
class Candidate:
    """A response to a prompt."""
    ids: Ids
    text: str
    source: str = "policy"  # who wrote it
    score: float = 0.0  # by it the candidates of a prompt are ranked


@dataclass
class Pair:
    """Two responses to one prompt, the one that ranks higher first (at K = 2 the one sampled first)."""
    example: Example
    better: Candidate
    worse: Candidate
    strength: float | None = None  # p(better > worse); below 1/2 it contradicts the ranking
    measured: list | None = None  # by the update, before its step: loss, both rewards, log-ratio


# 3. One step: start reading here ------------------------------------------------------------------
def train_step(models, examples, method, step, args):
    """One step of the paper's Figure 2, by the stages of `method` (section 11). Pairs without a strength
    are left out of the mean; where none is kept, weights and schedule stay. Returns the step's line of
    metrics.jsonl."""
    made = make_pairs(models, own_share(examples), method, step, args)
    candidates, pairs = map(collected, made)  # of several processes each makes a share, and gets all
    pairs = sum(pairs, [])
    kept = [pair for pair in pairs if pair.strength is not None]
    figures = method.update(models, kept, method, step, args) if kept else {}
    method.after_step(models, step, args)
    return {"step": step + 1} | step_figures(models, candidates, pairs, kept, method, args) | figures


def make_pairs(models, examples, method, step, args):
    """A step before its update -> lists of each example's candidates, and of its pairs. Pairs of
    identical responses, whose gradient is 0, get no strength, nor do those for which the stage
    `strength` has None."""
    pairs, different = [], []
    candidates = method.sample(models, examples, step, args)  # B lists of K
    scores = method.score(models, examples, candidates, args, method.judge)  # B lists of K
    for example, own, own_scores in zip(examples, candidates, scores):
        for candidate, score in zip(own, own_scores):
            candidate.score = score
        own_pairs = [Pair(example, own[i], own[j]) for i, j in method.pair(own_scores)]  # K//2
        different += [pair for pair in own_pairs if pair.better.ids != pair.worse.ids]
        pairs.append(own_pairs)
    for pair, strength in zip(different, method.strength(models, different, args, method.judge)):
        pair.strength = strength
    return candidates, pairs


# 4. Sample K responses a prompt from the current policy -------------------------------------------
def sample_policy(models, examples, step, args):
    """OSP's candidates: K responses of the policy as it stands. Source: the paper's Figure 2."""
    return respond(models.policy, models.tokenizer, examples, range(args.num_generations), step, args)


def sampling_noise(seed, step, index, k, length):
    """(T,) uniform float64 that belong to (seed, step, prompt, k), not to the batch or the process. In
    evaluation the step is 2**31 always, and k is 0 for pi_SFT and 1 for the policy."""
    return np.random.default_rng((seed, step, index, k)).random(length)


@torch.no_grad()
def sample(model, prompt_ids, noise, temperature, stop_ids):
    """N prompts and noise (N, T) -> N responses of at most T tokens, with the EOS where one was drawn.
    On-policy means the distribution itself: no top-k, no top-p, nothing of the generation_config. A
    token is the first whose cumulative probability exceeds its noise, which does not know the batch."""
    cache, logits, mask = prefill(model, prompt_ids)  # logits (N, V) of the first tokens
    noise, stops = noise.to(model.device), torch.tensor(stop_ids, device=model.device)
    ended = torch.zeros_like(logits[:, 0], dtype=torch.bool)  # (N,)
    lengths, tokens = torch.zeros_like(ended, dtype=torch.long), []
    for uniform in noise.T:  # (N,), for each token
        logits = logits[:, : getattr(model, "words", None)].float()  # more may be embedded
        cdf = (logits / temperature).softmax(-1).double().cumsum(-1)  # (N, V); float64: V may be large
        token = torch.searchsorted(cdf, uniform[:, None] * cdf[:, -1:], right=True)  # (N, 1)
        tokens.append(token.clamp_(max=cdf.shape[1] - 1))
        lengths += ~ended
        ended |= torch.isin(token[:, 0], stops)
        if ended.all() or len(tokens) == noise.shape[1]:
            break
        mask = F.pad(mask, (0, 1), value=1)
        logits = forward(model, token, mask, 1, cache)[:, -1]
    return [ids[:length] for ids, length in zip(torch.cat(tokens, 1).tolist(), lengths.tolist())]


# 5. Judge: the frozen SFT model says which of two responses is better -----------------------------
JUDGE_FRAME = "Which response is better, A or B?\n\nPrompt:\n{prompt}\n\nA:\n{a}\n\nB:\n{b}\n\nBetter:"


def judge_question(prompt: Prompt, a: str, b: str) -> str:
    """The text that the verdict, "A" or "B", follows. Every line from outside stands behind "> "."""
    return JUDGE_FRAME.format(prompt=quoted(transcript(prompt)), a=quoted(a), b=quoted(b))


def language_model_judge(models, prompts, shown_as_a, shown_as_b, args):
    """N questions -> (N,) log-odds of A: the log-probability of the verdict "A" less that of "B". Pr(A),
    with all other tokens left out, is their sigmoid. Raises RunError if one is no number. Source: the
    paper for the probability of a verdict."""
    _, *verdicts = verdict_format(models.tokenizer)  # the ids of "A" and "B"
    limit = context_length(models.judge)
    questions = encode_questions(models.tokenizer, prompts, shown_as_a, shown_as_b, limit)
    with inference(models.judge) as judge:  # without gradients; the prompts tell it what may be shared
        logps = question_logps(judge, prompts, questions, verdicts, args.micro_batch_size)
    log_odds = torch.tensor([(for_a - for_b).item() for for_a, for_b in logps])
    if log_odds.isnan().any():
        raise RunError("The judge's verdicts are not numbers: its weights or precision are broken.", 1)
    return log_odds


# 6. Rank against one baseline, pair, and say how strongly one is preferred ------------------------
def ranking_scores(models, examples, candidates, args, judge=language_model_judge):
    """Each example's candidates -> their scores, the log-odds of B, where A is the first candidate and B
    the one that is scored, the first included. K questions, not K^2. Source: surveys of LLM judges say
    that OSP compares all with one baseline. Reconstruction: the first response, which improves along
    with the policy; and one order, since a liking for A moves all K scores, so their order stays."""
    texts = []
    for example, own in zip(examples, candidates):
        texts += [(example.prompt, own[0].text, candidate.text) for candidate in own]
    for_a = iter(judge(models, *columns(texts), args).tolist())
    return [[-next(for_a) for _ in own] for own in candidates]


def equal_scores(models, examples, candidates, args, judge):
    """No ranking, for K = 2: there is one pair, of which SPCE is the same in both directions."""
    return [[0.0] * len(own) for own in candidates]


def ranked_pairs(scores: list[float]) -> list[tuple[int, int]]:
    """K scores of one prompt's responses -> K//2 pairs (better, worse): best with worst, then inwards.
    [0.5, 0.9, 0.1, 0.7] -> [(1, 2), (3, 0)]. An odd K leaves out the middle; ties keep their order.
    Source: the paper for K//2. Reconstruction: which; they range from a landslide to a near tie."""
    order = sorted(range(len(scores)), key=lambda k: -float(scores[k]))
    return [(order[i], order[-1 - i]) for i in range(len(order) // 2)]


def both_orders(judge, models, prompts, responses_1, responses_2, args):
    """P pairs of texts -> Pr(A) with response 1 as A, and Pr(A) with response 2 as A, (P,) each."""
    texts = prompts * 2, responses_1 + responses_2, responses_2 + responses_1
    p_a = judge(models, *texts, args).sigmoid()  # (2 P,)
    return p_a[: len(prompts)], p_a[len(prompts):]


def averaged_strength(p_12: Tensor, p_21: Tensor) -> Tensor:
    """(P,), (P,) -> (P,): the mean of both orders. In this form, brackets included, equal texts give
    exactly 1/2 in floating point (different ids may have equal texts). Reconstruction."""
    return (p_12 + (1 - p_21)) / 2


def judge_pairs(models, pairs, args, judge):
    """OSP's strengths: what the judge says of each pair, asked in both orders."""
    texts = [(pair.example.prompt, pair.better.text, pair.worse.text) for pair in pairs]
    return averaged_strength(*both_orders(judge, models, *columns(texts), args)).tolist()


# 7. Log-probabilities of responses ----------------------------------------------------------------
def token_logps(model, prompt_ids: list[Ids], response_ids: list[Ids], share=False) -> Tensor:
    """N prompts and responses -> (N, T) fp32 log-probs of the responses' tokens, 0 beyond their ends.
    `share` computes equal prompts once, for speed alone."""
    ids, mask = right_padded(response_ids, model.device)  # (N, T)
    if share:
        logits = shared_logits(model, prompt_ids, ids, mask)  # (N, T, V)
    else:
        heads, head_mask = left_padded(prompt_ids, model.device)
        both, both_mask = torch.cat([heads, ids], 1), torch.cat([head_mask, mask], 1)
        logits = forward(model, both, both_mask, ids.shape[1] + 1)[:, :-1]  # t - 1 predicts token t
    return chosen_logps(logits, ids).where(mask.bool(), 0.0)


def chosen_logps(logits, ids):
    """Logits (N, T, V) that predict the ids (N, T) -> their fp32 log-probabilities (N, T)."""
    return logits.float().log_softmax(-1).gather(-1, ids[:, :, None])[:, :, 0]


def response_logps(model, prompt_ids: list[Ids], response_ids: list[Ids], micro_batch_size=8) -> Tensor:
    """N prompts and responses -> (N,) fp32 logps in nats: sums over a response's tokens, EOS included.
    Sums and not means: the implicit reward is a ratio of the probabilities of whole responses."""
    share = shares_prompts(model)
    order = sorted(range(len(prompt_ids)), key=lambda i: (len(prompt_ids[i]), prompt_ids[i]))
    logps = torch.zeros(len(prompt_ids), device=model.device)
    for part in progress(chunks(order, micro_batch_size), "log-probabilities"):  # equal prompts together
        prompts, responses = [prompt_ids[i] for i in part], [response_ids[i] for i in part]
        logps[part] = token_logps(model, prompts, responses, share).sum(-1)
    return logps


def pair_logps(model, pairs):
    """P pairs -> (2, P) logps: of the better responses, and of the worse ones, in one forward pass."""
    prompts = [pair.example.ids for pair in pairs] * 2
    responses = [pair.better.ids for pair in pairs] + [pair.worse.ids for pair in pairs]
    return response_logps(model, prompts, responses, 2 * len(pairs)).reshape(2, -1)


def reference_logps(models, pairs):
    """P pairs -> (2, P) logps under the frozen reference, by passes that round as the policy's do."""
    with inference(models.reference) as reference:
        return pair_logps(reference.train(models.policy.training), pairs)  # shares prompts alike


# 8. The reward, and the SPCE loss -----------------------------------------------------------------
def implicit_reward(logps: Tensor, ref_logps: Tensor, pairs, args) -> Tensor:
    """beta * (log pi_theta - log pi_reference) of both responses of each pair, (2, P), as in DPO."""
    return args.beta * (logps - ref_logps)


def spce_loss(reward_1: Tensor, reward_2: Tensor, strength: Tensor) -> Tensor:
    """Soft-preference cross-entropy: rewards and strengths p(1 > 2), (P,) each -> losses (P,).

        h = r_1 - r_2,   L = -[ p log sigmoid(h) + (1 - p) log sigmoid(-h) ],   dL/dh = sigmoid(h) - p

    It is least at h = logit(p). p = 1 is DPO; p = 1 - eps is conservative DPO. A tie, p = 1/2, pulls h
    back to 0; p below 1/2 trains against the ranking. Source: the paper for its name and purpose.
    Reconstruction: the formula, the cross-entropy between the judge's Bernoulli(p) and the policy's
    Bernoulli(sigmoid(h))."""
    h = reward_1 - reward_2
    return -(strength * F.logsigmoid(h) + (1 - strength) * F.logsigmoid(-h))


# 9. Update: one optimiser step on all parameters --------------------------------------------------
def update(models, pairs, method, step, args):
    """One optimiser step on the mean loss over these P pairs. Notes on each pair what its pass saw."""
    seen = []
    # in one process: slices of the pairs, and a weight of 1
    for part, weight in micro_batches(models.policy, pairs, args.micro_batch_size // 2, args):
        logps = pair_logps(models.policy, part)  # (2, P)
        ref_logps = method.reference(models, part)  # (2, P); h is exactly 0 at first
        strength = torch.tensor([pair.strength for pair in part], device=logps.device)  # (P,)
        rewards = method.reward(logps, ref_logps, part, args)  # (2, P)
        losses = method.loss(*rewards, strength)  # (P,)
        (weight * losses.sum() / len(pairs)).backward()  # adds up to the mean over all pairs
        seen.append(torch.stack([losses, *rewards, (logps - ref_logps).mean(0)], 1).tolist())
    for pair, figures in zip(pairs, joined(seen)):  # of all parts, in order
        pair.measured = figures
    rate = models.scheduler.get_last_lr()[0]
    loss = sum(pair.measured[0] for pair in pairs) / len(pairs)
    grad_norm = optimizer_step(models, loss, f"step {step + 1}", args)
    return {"learning_rate": rate, "grad_norm": grad_norm}


def make_optimizer(models, learning_rate, steps, args):
    """AdamW over all parameters without weight decay, and a schedule of transformers by its name. The
    weights are fp32 even with --bf16: bf16 weights would round small updates away. A schedule of one
    step more is taken from its second rate on, since the first rate of a warm-up is 0."""
    warmup = min(in_steps(args.warmup_steps, steps), steps - 1)  # one step at least has the peak
    if args.warmup_steps > max(1, warmup):
        say(f"Warning: the warm-up is cut to {warmup} of {steps} steps")
    models.optimizer = torch.optim.AdamW(
        models.policy.parameters(), lr=learning_rate, betas=(0.9, 0.95), weight_decay=0.0, fused=True)
    models.scheduler = transformers.get_scheduler(
        args.lr_scheduler_type, models.optimizer, warmup + 1, steps + 1)
    models.optimizer.step()  # without gradients it does nothing; torch wants it before the next line
    models.scheduler.step()


def optimizer_step(models, loss, where, args):
    """Clips the gradients that are there, steps, forgets them; returns their norm before clipping.
    Raises RunError, and makes no step, where that norm or `loss` is no number."""
    grad_norm = nn.utils.clip_grad_norm_(models.policy.parameters(), args.max_grad_norm).item()
    if not (math.isfinite(loss) and math.isfinite(grad_norm)):
        raise RunError(f"{where}: the loss is {loss}, the gradient norm {grad_norm}, so no step was "
                       "made: start again with a lower learning rate.", 1)
    models.optimizer.step()
    models.scheduler.step()
    models.optimizer.zero_grad()
    return grad_norm


# 10. Supervised fine-tuning with the judging task: makes pi_SFT -----------------------------------
EASY_STEPS, EASY_SHARE = 0.3, 0.25  # a curriculum: 30% of the steps see the shortest quarter


def supervised_finetune(models, preferences, args):
    """Makes the policy pi_SFT by (prompt, chosen, rejected)s and the sum of both tasks' losses, each a
    mean over all target tokens."""
    n, size = len(preferences), args.sft_batch_size
    steps, epoch = sft_steps(preferences, args), math.ceil(n / size)  # epoch: the steps of a pass
    make_optimizer(models, args.sft_learning_rate, steps, args)
    by_length = sorted(preferences, key=lambda preference: len(preference[1] + preference[2]))
    easy_steps = min(steps * EASY_STEPS, steps - steps % epoch - epoch)  # a whole pass must follow
    for step, log in resumable_steps("sft", steps, models, args):
        allowed = math.ceil(n * EASY_SHARE) if step < easy_steps else n
        batch = [by_length[i] for i in step_indices(allowed, size, step, args.seed)]
        losses = {}
        for task, (items, losses_of, tokens) in supervised_tasks(models, batch, args).items():
            losses[task] = add_supervised_gradient(models, items, losses_of, tokens, args)
        optimizer_step(models, sum(losses.values()), f"SFT step {step + 1}", args)
        log({"step": step + 1} | losses)


def supervised_tasks(models, batch, args):
    """(prompt, chosen, rejected)s -> both tasks' items as ids, their loss, their count of target tokens.
    Items to respond are (prompt, chosen response)s of a third, which is soon learned; items to judge a
    pair's question with the chosen response as A, and as B. Reconstruction: the third, both orders."""
    tokenizer, (prompts, chosen, rejected) = models.tokenizer, columns(batch)
    some, limit = prompts[: math.ceil(len(batch) / 3)], context_length(models.policy)
    responses = encode_responses(tokenizer, some, chosen[: len(some)], args.max_new_tokens)
    chosen_as_a = encode_questions(tokenizer, prompts, chosen, rejected, limit)
    chosen_as_b = encode_questions(tokenizer, prompts, rejected, chosen, limit)
    respond = list(zip(encode_prompts(tokenizer, some), responses))
    return {"respond": (respond, respond_losses, sum(map(len, responses))),
            "judge": (list(zip(chosen_as_a, chosen_as_b)), judge_losses, 2 * len(batch))}


def respond_losses(models, items):
    """N items -> (N,) losses, each the sum over a response's tokens of -log pi(token)."""
    return -token_logps(models.policy, *zip(*items)).sum(1)


def judge_losses(models, items):
    """P items -> (P,) losses, each the sum over both orders of -log pi(right verdict), among all tokens.
    Reconstruction: that the loss is on the verdict alone."""
    _, *verdicts = verdict_format(models.tokenizer)
    questions, of_pair = sum(zip(*items), ()), [*range(len(items))] * 2
    # (2 P, 2), of "A" and of "B"
    logps = torch.stack(question_logps(models.policy, of_pair, questions, verdicts, len(questions)))
    return -logps[: len(items), 0] - logps[len(items):, 1]


def add_supervised_gradient(models, items, losses_of, tokens, args):
    """Adds the gradient of a task's mean loss over its target tokens; returns that loss."""
    items, seen = sorted(items, key=lambda item: len(item[0])), []
    for part, weight in micro_batches(models.policy, items, args.micro_batch_size // 2, args):
        losses = losses_of(models, part)
        (weight * losses.sum() / tokens).backward()
        seen.append(losses.tolist())
    return sum(loss for _, loss in zip(items, joined(seen))) / tokens


# 11. The whole run, and the table of stages -------------------------------------------------------
def train(models, data, method, args):
    """Online training: each step samples from the policy that the last one left. `data` (section 18) has
    the examples to train on and those held out. Every --save_steps, in SFT too, a checkpoint keeps step,
    weights, optimizer, schedule, and a reference that moves; not at the end. Returns the summary."""
    steps = method_steps(data.examples, args)
    make_optimizer(models, args.learning_rate, steps, args)
    sft_answers = answers(models.start, models, data.held_out, args, k=0)
    evaluation = None
    for step, log in resumable_steps("metrics", steps, models, args):  # loads the newest checkpoint
        indices = step_indices(len(data.examples), args.prompts_per_step, step, args.seed)
        metrics = train_step(models, [data.examples[i] for i in indices], method, step, args)
        if (step + 1) % in_steps(args.eval_steps, steps) == 0 or step + 1 == steps:
            evaluation = evaluate(models, data.held_out, sft_answers, method, args)
            metrics |= {f"eval_{name}": value for name, value in evaluation.items()}
        log(metrics)
    evaluation = evaluation or evaluate(models, data.held_out, sft_answers, method, args)
    return report(evaluation, models, data, method, args)


@dataclass
class Method:
    """The stages; the defaults are OSP. A variant replaces some, as in replace(osp(args), loss=...)."""
    sample: Callable = sample_policy  # models, examples, step, args -> candidates of each
    judge: Callable = language_model_judge  # models, prompts, shown as A, as B, args -> log-odds of A
    score: Callable = ranking_scores  # models, examples, candidates, args, judge -> scores of each
    pair: Callable = ranked_pairs  # scores of one example -> pairs of indices (better, worse)
    strength: Callable = judge_pairs  # models, pairs, args, judge -> strength of each; None drops it
    reference: Callable = reference_logps  # models, pairs -> their logps (2, P)
    reward: Callable = implicit_reward  # logps, reference logps, (2, P) each, pairs, args -> (2, P)
    loss: Callable = spce_loss  # reward_1, reward_2, strength, (P,) each -> losses (P,)
    update: Callable = update  # models, pairs, method, step, args -> figures
    figures: Callable = lambda pairs, reward_1, reward_2: {}  # what else to log of a step
    after_step: Callable = lambda models, step, args: None
    moves_reference: bool = False  # whether after_step does; the reference is then a model of its own
    gold: Callable | None = None  # prompt, response text -> the true reward, where it is known
    run: Callable = train  # what is done with the models


def osp(args):
    """The paper's method."""
    return Method(score=equal_scores if args.num_generations == 2 else ranking_scores)


METHODS = {"osp": osp}  # name -> what makes it from the arguments; a file that imports osp adds its own


def run_method(args):
    """The whole run; returns its summary. Raises RunError."""
    sft = args.output_dir / "sft"
    path = str(sft) if sft.exists() else args.model_name_or_path  # pi_SFT, if this run has made it
    policy, tokenizer = load_model(path, args)
    named = [*args.matrix_model_names_or_paths, args.eval_judge_name_or_path]
    others = {name: frozen(name, args) for name in named if name}
    method = METHODS[args.method](args)
    if not args.dataset_name:
        method = replace(method, gold=gold_reward)
    data = load_data([(policy, tokenizer), *others.values()], args)
    args.data_fingerprint = datasets.fingerprint.Hasher.hash(repr(data))
    check_folder(args)  # once more, by what was read
    say(forecast(policy, data, args))

    with output_folder(args):  # all input was checked: from here on files are written
        models = Models(tokenizer, placed(policy, args), others=others)
        if data.preferences and path == args.model_name_or_path:  # else there is a pi_SFT, or no SFT
            supervised_finetune(models, data.preferences, args)
            path = save_sft(models, args)
        models.start, _ = frozen(path, args)  # pi_SFT
        models.judge = models.reference = models.start
        if method.moves_reference:
            models.reference, _ = frozen(path, args)
        summary = method.run(models, data, method, args)
        write_text(args.output_dir / "summary.json", as_json(summary, indent=2) + "\n")
        return summary


# Part II: what makes it practical. A reader of the method may stop here. ==========================
# 12. The command line -----------------------------------------------------------------------------
def json_object(text):
    """A JSON object, as of an option; argparse refuses what raises here."""
    return dict(json.loads(text))


@dataclass
class Arguments(MethodArguments):
    """The whole command line: what else data, folders, evaluation, speed and the variants need."""
    # -- data and folder --
    dataset_name: str | None = None  # Hub name, file or folder; none: the built-in task
    dataset_config: str | None = None  # configuration of the data set
    dataset_data_dir: str | None = None  # folder within the data set, such as harmless-base of HH
    dataset_train_split: str = "train"  # split to train on
    dataset_test_split: str | None = None  # split to measure on; none: test, else part of train
    chat_template_kwargs: json_object = field(default_factory=dict)  # JSON for the template
    trust_remote_code: bool = False  # run Python code that comes with the model
    output_dir: str | None = None  # folder of the run; none: runs/<model>-<method>-seed<seed>
    # -- speed and memory --
    save_steps: float = 0.1  # steps between checkpoints; below 1: a share of those of the phase
    bf16: bool = False  # every pass in bf16 autocast; trained weights stay fp32
    gradient_checkpointing: bool = False  # recompute activations in the backward pass, to save memory
    micro_batch_size: int = 8  # sequences in one forward pass; fewer take less memory
    # -- evaluation --
    eval_steps: float = 0.1  # steps between evaluations; below 1: a share of all
    num_eval_prompts: int = 256  # held-out prompts, one sampled response each
    num_eval_pairs: int = 512  # held-out pairs that the judge is measured on
    eval_judge_name_or_path: str | None = None  # another model as judge of the win rate
    # -- tso --
    matrix_model_names_or_paths: list[str] = field(default_factory=list)  # models asked too
    dual_clip: float = 0.2  # a reward has no gradient beyond it, above or below
    label_margin: float = 0.1  # pairs whose strength is nearer to 1/2 are dropped
    reference_steps: int = 50  # steps after which the reference becomes the policy
    # -- collect --
    num_labels: int = 500  # how many pairs a human labels
    keep_prompts: float = 0.5  # share of prompts to keep, those of the widest spread of scores
    max_similarity: float = 0.9  # pairs of texts more alike are dropped; 1 is equal
    min_strength: float = 0.55  # pairs nearer to a tie are dropped
    max_strength: float = 0.95  # pairs nearer to a landslide are dropped
    pairs_per_prompt: int = 2  # most pairs of one prompt, the least alike first


BUILTIN = {"max_new_tokens": 16, "micro_batch_size": 96, "sft_learning_rate": 3e-3, "sft_batch_size": 48,
           "sft_max_steps": 800, "learning_rate": 1e-3, "num_train_epochs": 9, "eval_steps": 13,
           "reference_steps": 39}
LEAST = {"max_steps": -1, "seed": 0, "warmup_steps": 0, "sft_max_steps": -1, "num_generations": 2}


def parse_arguments(argv):
    """The command line as Arguments, checked. Raises RunError."""
    parser = transformers.HfArgumentParser(allow_abbrev=False, epilog=f"Built-in task: {BUILTIN}")
    source, fields = Path(__file__).read_text("utf-8"), Arguments.__dataclass_fields__
    for title, name, text in re.findall(r"^    (?:# -- (.+) --|(\w+): .*  # (.+))", source, re.M):
        if title:
            group = parser.add_argument_group(title)
        elif name in fields:
            fields[name].metadata = {"help": text}
            parser._parse_dataclass_field(group, fields[name])
    parser._option_string_actions["--no_sft"].help = "leave out SFT: the model judges as it is"
    parser._option_string_actions["--method"].choices = METHODS
    parser.print_help = lambda: say(parser.format_help())
    parser.error = refuse
    args = parser.parse_args(argv, Arguments())
    if args.model_name_or_path is None:
        args = parser.parse_args(argv, Arguments(**BUILTIN))
    for name, value in vars(args).items():
        least = LEAST.get(name, 1e-12)
        if type(value) in (int, float) and not least <= value < 2**32:
            refuse(f"--{name} is {value}: it must be at least {least}, and below 2**32")
    if args.dataset_name and not args.model_name_or_path:
        refuse("--dataset_name needs --model_name_or_path: the built-in model knows no other words")
    model = Path(args.model_name_or_path or "builtin").name
    args.output_dir = Path(args.output_dir or f"runs/{model}-{args.method}-seed{args.seed}")
    return args


def main(argv=None):
    """Starts a run, goes on with it, or shows its result; returns its summary. Raises RunError."""
    args = parse_arguments(argv)
    path = args.output_dir / "summary.json"
    try:
        start_process()
        check_folder(args)
        if path.exists():
            say(f"This run was finished before. To run it anew, remove the folder {args.output_dir}.")
            summary = json.loads(path.read_text("utf-8"))
        else:
            summary = run_method(args)
        show(summary, args)
        return summary
    except KeyboardInterrupt:
        why, code = "interrupted", 130
    except Exception as error:
        if not out_of_memory(error):
            raise
        why, code = "out of memory: give a smaller --micro_batch_size, or --gradient_checkpointing", 1
    raise RunError(f"{why}; the same command goes on from {newest_step(args)}.", code)


def out_of_memory(error):
    """Whether an error says that memory is short. torch has several kinds of them."""
    return re.search("MemoryError|out of memory|allocate memory", repr(error))


def forecast(model, data, args):
    """What a run is going to take, in a line."""
    size, steps = model.num_parameters(), method_steps(data.examples, args)
    memory = size * (18 if args.bf16 else 20) / 1e9  # 4 + 4 + 8 + 2 or 4 bytes a weight
    return (f"{size / 1e6:.1f}M parameters: {memory:.1f} GB of memory, and more for activations; "
            f"{sft_steps(data.preferences, args)} steps of SFT, then {steps} of the method")


def say(text, file=None):
    """Prints a text, in which no character controls the terminal. When nobody reads the standard output
    any more, as behind a pipe into head, the rest is left out."""
    shown = "".join(letter if letter.isprintable() or letter == "\n" else "?" for letter in text)
    try:
        print(shown, file=file, flush=True)
    except BrokenPipeError:
        sys.stdout = open(os.devnull, "w")


def refuse(sentence):
    """Raises RunError, for a mistake that shows before the first step."""
    raise RunError(sentence + ".")


def cause(error):
    """A library's message in one line, and that of what caused it."""
    if isinstance(error.__cause__ or error, StopIteration):
        return "it is empty"
    said = f"{str(error) or type(error).__name__} {error.__cause__ or ''}"
    return " ".join(said.split())[:500].rstrip(".")


FROM_HUB = "give a name on the Hub (which needs the network), or a "


@contextmanager
def trying(what, advice, code=2):
    """Raises RunError where the block fails: the libraries raise a dozen kinds of errors."""
    try:
        yield
    except Exception as error:
        if isinstance(error, RunError) or out_of_memory(error):
            raise
        raise RunError(f"Cannot {what} ({cause(error)}): {advice}.", code) from error


# 13. Evaluate and report --------------------------------------------------------------------------
EVALUATION = 2**31  # the "step" under which evaluation draws its noise; no training step reaches it
REPORT = """gold_reward win_rate_vs_sft win_rate_vs_sft_se ood_win_rate_vs_sft kl response_tokens
    cut_fraction distinct_4grams judge_accuracy judge_overconfidence order_agreement strength_spread
    longer_preferred"""


def means(**columns):
    """The mean of each column; those without values are left out."""
    return {name: float(np.mean(np.asarray(values))) for name, values in columns.items() if len(values)}


def described(models, responses, golds=()):
    """What responses are like. `cut_fraction` is the share that --max_new_tokens cut off,
    `distinct_4grams` the share of different ones among all runs of four tokens."""
    stops, ids = stop_token_ids(models.policy, models.tokenizer), [one.ids for one in responses]
    grams = [tuple(one[i : i + 4]) for one in ids for i in range(len(one) - 3)]
    return means(gold_reward=golds, response_tokens=[*map(len, ids)],
                 cut_fraction=[one[-1] not in stops for one in ids],
                 distinct_4grams=[len(set(grams)) / max(1, len(grams))])


def answers(model, models, rows, args, k):
    """A response to each row, by all processes together; k picks its noise."""
    found = respond(model, models.tokenizer, own_share(rows), [k], EVALUATION, args)
    return collected([response for [response] in found])


def evaluate(models, rows, before, method, args):
    """The policy against pi_SFT and its responses `before`, one response to each row; the README says
    what the figures are."""
    after, logps = answers(models.policy, models, rows, args, k=1), []
    ids = [row.ids for row in own_share(rows)], [response.ids for response in own_share(after)]
    for role in (models.policy, models.start):
        with inference(role, args.bf16) as model:
            logps.append(response_logps(model, *ids, args.micro_batch_size))
    texts = [(row.prompt, one.text, two.text) for row, one, two in zip(rows, after, before)]
    verdicts = verdicts_of_all(method.judge, models, texts, args)
    golds, wins = golds_of(texts, method.gold), averaged_strength(*verdicts)
    if method.gold:
        wins = agreement(golds[0] - golds[1], 1)  # 1 where the first is higher, 1/2 for a tie
    elif args.eval_judge_name_or_path:
        model, tokenizer = models.others[args.eval_judge_name_or_path]
        other = Models(tokenizer, judge=model)
        wins = averaged_strength(*verdicts_of_all(language_model_judge, other, texts, args))
    figures = described(models, after, golds[0]) | verdict_figures(texts, *verdicts)
    figures |= {name + "_sft": value for name, value in described(models, before, golds[1]).items()}
    figures |= means(win_rate_vs_sft=wins.tolist(), kl=collected((logps[0] - logps[1]).tolist()))
    if len(wins) > 1:
        figures["win_rate_vs_sft_se"] = float(np.std(wins.tolist()) / math.sqrt(len(wins)))
    return figures | {"examples": texts[:3]}


def golds_of(texts, gold):
    """(prompt, response 1, response 2)s -> (2, P) true rewards, or (2, 0) where they are not known."""
    golds = [[gold(prompt, one), gold(prompt, two)] for prompt, one, two in texts if gold]
    return torch.tensor(golds, dtype=torch.float64).reshape(-1, 2).T


def verdicts_of_all(judge, models, texts, args):
    """(prompt, response 1, response 2)s -> both orders' Pr(A), (P,) each; the processes divide them."""
    verdicts = both_orders(judge, models, *columns(own_share(texts)), args)
    return [torch.tensor(collected(p_a.tolist())) for p_a in verdicts]


def verdict_figures(texts, p_12, p_21):
    """(prompt, response 1, response 2)s and both orders' Pr(A) -> what a judge goes by.
    Pairs of equal texts say nothing of order, those of equal length nothing of length."""
    lean = averaged_strength(p_12, p_21) - 0.5
    differ = [one != two for _, one, two in texts]
    longer = torch.tensor([len(one) - len(two) for _, one, two in texts])
    return means(order_agreement=agreement(p_12 - 0.5, 0.5 - p_21)[differ],
                 strength_spread=lean.abs(), longer_preferred=agreement(lean, longer)[longer != 0])


def judge_figures(models, texts, method, args):
    """The judge on the data's (prompt, chosen, rejected)s: how often it is right, by the truth if it is
    known, and how much surer it is than right, both by the labels."""
    lean = averaged_strength(*verdicts_of_all(method.judge, models, texts, args)) - 0.5
    right = labelled = agreement(lean, 1)
    if method.gold:
        chosen, rejected = golds_of(texts, method.gold)
        right = agreement(lean, chosen - rejected)[chosen != rejected]
    return means(judge_accuracy=right, judge_overconfidence=0.5 + lean.abs() - labelled) | {
        "judge_pairs": len(texts)}


def agreement(one, two):
    """(P,), (P,) -> (P,): 1 where both have one sign, 0 where not, 1/2 where one is 0."""
    return (1 + (one * two).sign()) / 2


def step_figures(models, candidates, pairs, kept, method, args):
    """What a step sampled, paired, and saw of the kept pairs before its update."""
    identical = sum(pair.better.ids == pair.worse.ids for pair in pairs)
    figures = described(models, sum(candidates, [])) | {
        "pairs": len(kept), "dropped_identical_pairs": identical,
        "dropped_unsure_pairs": len(pairs) - len(kept) - identical}
    if kept:
        losses, reward_1, reward_2, kl = torch.tensor([pair.measured for pair in kept]).T
        figures |= means(loss=losses, strength_mean=torch.tensor([pair.strength for pair in kept]),
                         margin=reward_1 - reward_2, kl=kl)
        figures |= method.figures(kept, reward_1, reward_2)
    return figures


def report(summary, models, data, method, args):
    """Writes the model, and measures what is measured once. Returns the summary."""
    save_model(models, args.output_dir)
    if data.held_out_preferences:
        summary |= judge_figures(models, data.held_out_preferences, method, args)
    if data.ood:
        before = answers(models.start, models, data.ood, args, k=0)
        figures = evaluate(models, data.ood, before, method, args)
        summary |= {"ood_" + name: value for name, value in figures.items()}
    summary |= {"held_out_prompts": len(data.held_out), "seed": args.seed,
                "self_judged": not (method.gold or args.eval_judge_name_or_path)}
    return summary


def show(summary, args):
    """Prints the result of a finished run, and removes what only going on needed."""
    for name in "sft.pt .sft.pt.partial metrics.pt .metrics.pt.partial".split():
        if RANK == 0:
            (args.output_dir / name).unlink(missing_ok=True)
    if args.method == "collect":
        say(f"{summary}\nTo train on the labels: --dataset_name {args.output_dir}/preferences.jsonl")
        return
    for prompt, after, before in summary["examples"]:
        say(f"\n{transcript(prompt)}\n  SFT: {before}\n  policy: {after}")
    say(f"\n{report_table(summary, args.method.upper())}Model and figures are in {args.output_dir}.\n")


def report_table(summary, method):
    """SFT against the policy, and a warning for each figure by which something is wrong with the run."""
    table = f"{'':32}{'SFT':>9} {method:>8}\n"
    for name in REPORT.split():
        if name in summary:
            of_sft = f"{summary[name + '_sft']:.3f}" if name + "_sft" in summary else ""
            table += f"{name:32}{of_sft:>9}{summary[name]:9.3f}\n"
    table += "{held_out_prompts} held-out prompts; wins self-judged: {self_judged}\n".format(**summary)
    at = Counter({"judge_accuracy": 1, "judge_pairs": 4} | summary)  # what else is missing is 0
    chance = 0.5 + 1 / math.sqrt(at["judge_pairs"])  # two standard errors above 1/2
    longer = at["response_tokens"] > 1.2 * at["response_tokens_sft"] and at["longer_preferred"] > 2 / 3
    warnings = {
        "the judge is no better than chance: take more SFT, or pairs": at["judge_accuracy"] < chance,
        "strengths are far off: try other --sft_num_train_epochs": at["judge_overconfidence"] > 0.15,
        "the judge goes by position: take more SFT, or a better judge": at["order_agreement"] < 2 / 3,
        "the strengths are all near 1/2: take a better judge": at["strength_spread"] < 0.02,
        "the judge prefers longer responses: take a better judge": at["self_judged"] and longer,
        "responses became alike: raise --beta": at["distinct_4grams"] < 0.5 * at["distinct_4grams_sft"],
        "over half of the responses were cut off: raise --max_new_tokens": at["cut_fraction"] > 0.5}
    return table + "".join(f"Warning: {warning}\n" for warning, holds in warnings.items() if holds)


# 14. The folder of a run --------------------------------------------------------------------------
SHOWN = "respond judge loss strength_mean margin kl".split()  # of a step, on the progress bar
MAY_CHANGE = "output_dir save_steps micro_batch_size gradient_checkpointing".split()  # of a run


def check_folder(args):
    """Raises RunError unless --output_dir is empty or new, or holds a run with the same arguments."""
    folder, path = args.output_dir, args.output_dir / "arguments.json"
    if path.exists():
        then = json.loads(path.read_text("utf-8"))
        changed = [f"{name} was {then[name]!r}, is {value!r}" for name, value in vars(args).items()
                   if name not in MAY_CHANGE and then.get(name, value) != value]
        if changed:
            refuse(f"{folder} holds a run with other arguments ({'; '.join(changed)}): give the same, "
                   "give another --output_dir, or remove the folder")
    elif any(folder.glob("[!.]*")):  # hidden ones are a run's that began, or the system's
        refuse(f"{folder} holds other files and no run: give another --output_dir")


def output_folder(args):
    """Takes the run's folder for this run alone until the file that it returns is closed, as at the end
    of a with block. Raises RunError if another run has it."""
    folder = args.output_dir
    collected([])  # waits: none may write before all have looked
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
        lock = (folder / ".lock").open("w")
    if RANK > 0:
        return lock
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        refuse(f"Another process is at work in {folder}: wait for it, or stop it")
    except OSError as error:  # as on some network file systems
        say(f"Warning: no lock in {folder} ({cause(error)}): start this run once at a time")
    if (folder / "summary.json").exists():
        refuse("Another process has just finished this run: give the same command again to see it")
    write_text(folder / "arguments.json", json.dumps(vars(args), indent=2, default=str))
    return lock


def writing(path):
    """Raises RunError where what the block writes to `path` cannot be written."""
    return trying(f"write {str(path)!r}", "make room and run it again, or give another --output_dir", 1)


@contextmanager
def written_whole(path):
    """Yields a scratch path, which then becomes `path` in one move, never half of it. What processes but
    the first write to theirs is lost. Raises RunError."""
    scratch = path.with_name(f".{path.name}.partial") if RANK == 0 else Path(os.devnull)
    with writing(path):
        yield scratch
        if RANK == 0:
            os.replace(scratch, path)


def as_json(figures, **form):
    """Figures as JSON. Raises RunError where one is no number."""
    with trying("write a figure that is no number", "take a lower learning rate, or no --bf16", 1):
        return json.dumps(figures, allow_nan=False, **form)


def write_text(path, text):
    """A text file, written whole."""
    with written_whole(path) as scratch:
        scratch.write_text(text, "utf-8")


def save_model(models, folder):
    """The policy and its tokenizer for plain from_pretrained. All processes must call it."""
    weights = whole_state("get_model_state_dict", models.policy)
    if RANK > 0:
        return
    for name in models.policy.all_tied_weights_keys:
        del weights[name]
    with writing(folder):
        models.policy.save_pretrained(folder, state_dict=weights)
        models.tokenizer.save_pretrained(folder)


def save_sft(models, args):
    """Writes pi_SFT into the run's folder `sft`, and returns that folder."""
    folder = args.output_dir / "sft"
    with written_whole(folder) as scratch:
        save_model(models, scratch)
    collected([])  # waits for the files
    (args.output_dir / "sft.pt").unlink(missing_ok=True)
    return str(folder)


def whole_state(function, *models):
    """Calls a function of torch's distributed checkpoints for whole tensors, on process 0's CPU."""
    from torch.distributed.checkpoint import state_dict  # here, since it takes a second to load
    strict = "optimizer" not in function  # whose weights without a gradient have no state
    options = state_dict.StateDictOptions(full_state_dict=True, cpu_offload=True, strict=strict)
    return getattr(state_dict, function)(*models, options=options)


def save_checkpoint(models, path, step):
    """All that an exact resume needs; samples and order of the data are functions of (seed, step)."""
    state = {"step": step, "scheduler": models.scheduler.state_dict(),
             "policy": whole_state("get_model_state_dict", models.policy)}
    if models.optimizer.state:  # else there was no update yet
        state["optimizer"] = whole_state("get_optimizer_state_dict", models.policy, models.optimizer)
    if models.reference is not models.start:
        state["reference"] = whole_state("get_model_state_dict", models.reference)
    with written_whole(path) as scratch:
        torch.save(state, scratch)


def load_checkpoint(models, path):
    """All as it was at the checkpoint; returns the steps done, 0 without one. Raises RunError."""
    if not path.exists():
        return 0
    with trying(f"read the checkpoint {path}", "remove it, and the same command starts this phase anew"):
        state = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    whole_state("set_model_state_dict", models.policy, state["policy"])
    if "optimizer" in state:
        whole_state("set_optimizer_state_dict", models.policy, models.optimizer, state["optimizer"])
    if "reference" in state:
        whole_state("set_model_state_dict", models.reference, state["reference"])
    models.scheduler.load_state_dict(state["scheduler"])
    return state["step"]


def newest_step(args):
    """The step after which the same command goes on, in words."""
    for path in sorted(args.output_dir.glob("*.pt")):  # metrics.pt comes before sft.pt
        return f"step {torch.load(path, weights_only=True, mmap=True)['step']} of {path.stem}.jsonl"
    return "step 0"


def resumable_steps(name, steps, models, args):
    """The steps that are left, each with log(figures), which adds a line to <name>.jsonl and shows some.
    Every save_steps steps the checkpoint <name>.pt is replaced. Raises RunError."""
    checkpoint, lines = args.output_dir / f"{name}.pt", args.output_dir / f"{name}.jsonl"
    done = load_checkpoint(models, checkpoint)
    before = lines.read_text().splitlines(keepends=True) if lines.exists() else []
    write_text(lines, "".join(before[:done]))
    bar = tqdm(range(done, steps), name, steps, initial=done, disable=RANK > 0)

    def log(figures):
        """A line of the file, and the figures that matter on the progress bar."""
        if RANK == 0:
            with writing(lines), lines.open("a") as file:
                file.write(as_json(figures) + "\n")
        bar.set_postfix({key: figures[key] for key in SHOWN if key in figures})

    for step in bar:
        yield step, log
        done = step + 1
        if done % in_steps(args.save_steps, steps) == 0 and done < steps:
            save_checkpoint(models, checkpoint, done)


# 15. Several processes ----------------------------------------------------------------------------
# Each makes the pairs of its own prompts. All then get all pairs, and divide the update among them.
LAUNCHED = dist.is_torchelastic_launched()  # by torchrun, which sets these
RANK, WORLD = [int(os.environ[name]) for name in ("RANK", "WORLD_SIZE")] if LAUNCHED else (0, 1)
progress = functools.partial(tqdm, leave=False, delay=3, disable=RANK > 0)  # of what may take long


def start_process():
    """Joins the processes that torchrun started, if it did; the first of them alone prints."""
    transformers.logging.disable_progress_bar()  # its bars for reading and writing weights
    if WORLD > 1 and not dist.is_initialized():
        gpus = torch.cuda.device_count()
        if 0 < gpus < int(os.environ["LOCAL_WORLD_SIZE"]):
            refuse("There are more processes than GPUs: give torchrun a smaller --nproc_per_node")
        dist.init_process_group("cpu:gloo,cuda:nccl" if gpus else "gloo")
        if gpus:
            torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    if RANK > 0:
        sys.stdout = open(os.devnull, "w")
        datasets.disable_progress_bars()
        transformers.logging.set_verbosity_error()


def own_share(items):
    """The items that this process works on."""
    return items[RANK::WORLD]


def collected(share):
    """The inverse of own_share: the items of all processes in order. All must call it."""
    if WORLD == 1:
        return share
    shares = [None] * WORLD
    dist.all_gather_object(shares, share)
    return [items[i] for i in range(len(shares[0])) for items in shares if i < len(items)]


def micro_batches(model, items, size, args):
    """Yields this process's parts of at most `size` items, and the weight of their losses. FSDP averages
    the gradients of processes where the loss wants their sum, hence WORLD. All processes make equally
    many passes: one that has fewer parts repeats one with weight 0. Raises RunError where processes
    use different parameters, which FSDP would mix up."""
    parts = chunks(items, max(1, min(size, math.ceil(len(items) / WORLD))))
    model.train(args.gradient_checkpointing)  # else no mode with dropout is needed
    for i in progress(range(RANK, math.ceil(len(parts) / WORLD) * WORLD, WORLD), "gradients"):
        yield parts[i % len(parts)], WORLD * (i < len(parts))
    used = [weight.grad is not None for weight in model.parameters()]
    if any(others != used for others in collected([used])):
        raise RunError("The processes use different parameters, as of experts: take one process.", 1)


def joined(seen):
    """What was seen of this process's parts -> that of all items in order; what was repeated is last."""
    return sum(collected(seen), [])


def placed(model, args):
    """A model on its device; several processes divide its weights, gradients and optimiser state."""
    if args.gradient_checkpointing:
        with trying("use gradient checkpointing", "leave out --gradient_checkpointing"):
            model.activation_checkpointing_enable()
    if WORLD == 1:
        return model.to("cuda" if torch.cuda.is_available() else "cpu")
    from torch.distributed.fsdp import fully_shard  # here, since they take seconds to load
    from transformers.modeling_layers import GradientCheckpointingLayer
    layers = [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]
    users = Counter(weight for layer in layers for weight in layer.parameters())
    for layer in layers:
        if all(users[weight] == 1 for weight in layer.parameters()):  # no other layer has them
            fully_shard(layer)
    return fully_shard(model)


def frozen(name, args):
    """A judge that is not trained, and its tokenizer; with --bf16 in bf16. Raises RunError."""
    model, tokenizer = load_model(name, args, torch.bfloat16)
    return placed(model.requires_grad_(False), args), tokenizer


@contextmanager
def inference(model, bf16=False):
    """A model for passes without gradients: whole in each process. With bf16 the weights of a trained
    model are cast once, and not for every token."""
    units = [module for module in model.modules() if hasattr(module, "unshard")]  # of FSDP2
    for unit in units:
        unit.unshard()
        unit.set_reshard_after_forward(False)
    with torch.no_grad(), torch.autocast(model.device.type, torch.bfloat16, enabled=bf16):
        yield model.eval()
    for unit in units:
        unit.set_reshard_after_forward(True)
        unit.reshard()


def in_bf16(model, dtype):
    """Runs every pass of a model under autocast. `dtype` is that of its Linear weights: a frozen model's
    may be in bf16, which changes no bit, since autocast casts them anyway."""
    model.bf16 = True
    for device in ("cpu", "cuda")[: 1 + torch.cuda.is_available()]:
        model.forward = torch.autocast(device, torch.bfloat16)(model.forward)
    for module in model.modules():
        if dtype == torch.bfloat16 and type(module) is nn.Linear:  # a tied embedding keeps its own
            module.weight = nn.Parameter(module.weight.to(dtype))


# 16. Models and batches ---------------------------------------------------------------------------
SAMPLING_BATCH_SIZE = 128  # responses side by side: without activations more fit than in an update


def check_files(name, trust):
    """Raises RunError where the files hold something else than the weights of a model to train."""
    if transformers.utils.find_adapter_config_file(name):
        refuse(f"{name!r} holds an adapter (adapter_config.json): merge it into its model, give that")
    config = transformers.AutoConfig.from_pretrained(name, trust_remote_code=trust)
    if hasattr(config, "quantization_config"):
        refuse(f"{name!r} is quantized (see its config.json): take the model that it was made from")


def check_tokenizer(model, tokenizer, args):
    """Makes a tokenizer a function of the text alone; raises RunError unless it fits the model."""
    name, embedded = model.name_or_path, model.get_input_embeddings().num_embeddings
    if tokenizer.eos_token_id is None:
        refuse(f"The tokenizer of {name!r} has no EOS token, so no response ends: set its eos_token")
    with suppress(AttributeError):  # few have it: merges that are left out at random
        tokenizer.backend_tokenizer.model.dropout = None
    tokenizer.apply_chat_template = functools.partial(
        tokenizer.apply_chat_template, **args.chat_template_kwargs)
    with trying(f"frame a question for {name!r}", "give its folder another chat template, or tokenizer"):
        if len(set(tokenizer(JUDGE_FRAME).input_ids)) < 3:
            refuse(f"{name!r} has no tokenizer that reads text: files are missing beside the model's")
        ids = encode_questions(tokenizer, ["x"], ["y"], ["z"])[0]
        ids += encode_responses(tokenizer, ["x"], ["y"], 99)[0]
    vocabulary = tokenizer.get_vocab()  # no text becomes a control token
    ids += [i for token, i in vocabulary.items() if not control_tokens(tokenizer).fullmatch(token)]
    if max(ids) >= embedded:
        refuse(f"{name!r} embeds {embedded} ids, its tokenizer makes {max(ids)}: take the model's own")
    model.words = min(embedded, max(vocabulary.values()) + 1)


def check_weights(model, keys):
    """Raises RunError unless the model's weights are all there, are numbers, and are all that the file
    has of their modules. `keys` are those that from_pretrained missed or did not read."""
    name, unread = model.name_or_path, sorted(keys["unexpected_keys"])
    if keys["missing_keys"]:
        refuse(f"{name!r} lacks weights, such as {min(keys['missing_keys'])}: take a whole model")
    owners = [owner + "." for owner, module in model.named_modules() if [*module.parameters(False)]]
    inside = [key for key in unread if key.startswith(tuple(owners))]  # of modules that have weights
    if inside:
        refuse(f"The model {name!r} does not read {len(inside)} tensors of its own modules, such as "
               f"{' and '.join(inside[:2])}: its config.json does not fit the file, or it is quantized")
    if unread:
        say(f"{name!r}: {len(unread)} tensors are not read, such as {unread[0]}")
    for key, weight in model.named_parameters():
        if not weight.isfinite().all():
            refuse(f"{name!r} has weights that are not finite numbers (NaN), such as {key}")


def shares_prompts(model):
    """Whether keys and values of a prompt may be shared: where check_passes found that it is right, and
    not where activations are computed again in the backward pass."""
    recomputes = model.training and model.is_activation_checkpointing
    return getattr(model, "shares_prompts", False) and not recomputes


def check_passes(model, training, ways=(True, False)):
    """Compares the program's passes with plain ones of single sequences. Where prompts cannot be shared,
    as with recurrent layers, sharing is given up. Raises RunError if that does not help."""
    for model.shares_prompts in ways:
        try:
            gap = passes_differ(model, training)
        except Exception as error:  # each family has a kind of its own
            if out_of_memory(error):
                raise
            gap = cause(error)
        if not gap:
            if ways[0] > model.shares_prompts:  # it was tried
                say(f"{model.name_or_path!r} cannot share a prompt: it takes plain passes (slower)")
            return
    refuse(f"{model.name_or_path!r} cannot be used: in passes with padding, position_ids and a cache, "
           f"which recurrent models lack, its log-probabilities are off by: {gap}")


@torch.no_grad()
def passes_differ(model, training):
    """How far log-probabilities of batches, of sampling, and a judge's log-odds are from those of plain
    passes at most; 0 where rounding, which goes by the size of the logits, may be the reason."""
    embedded = model.get_input_embeddings().num_embeddings
    ids = np.random.default_rng(0).integers(embedded, size=40).tolist()
    prompts, responses = [ids[:9], ids[9:13], ids[:9]], [ids[13:19], ids[19:25], ids[25:31]]
    wholes = [prompt + response for prompt, response in zip(prompts, responses)]
    tokens, verdicts = torch.tensor(responses, device=model.device), ids[-2:]
    plain = [model(input_ids=torch.tensor([ids], device=model.device)).logits[0, -7:] for ids in wholes]
    plain = torch.stack(plain).float()  # (3, 7, V)
    right = chosen_logps(plain[:, :-1], tokens)
    cache, logits, mask = prefill(model.train(training), prompts)
    sampled = [logits]
    for token in tokens.T[:-1]:
        mask = F.pad(mask, (0, 1), value=1)
        sampled.append(forward(model, token[:, None], mask, 1, cache)[:, -1])
    odds = torch.stack(question_logps(model, "xyx", wholes, verdicts, 3)).diff()
    gaps = [token_logps(model, prompts, responses, shares_prompts(model)) - right,
            chosen_logps(torch.stack(sampled, 1), tokens) - right, odds - plain[:, -1, verdicts].diff()]
    model.eval()
    gap = torch.cat(gaps, 1).abs().max().item()
    rounding = 2**-5 if getattr(model, "bf16", False) else 1e-4
    return 0.0 if gap < rounding * (10 + plain.abs().median().item()) else gap


def stop_token_ids(model, tokenizer):
    """The ids that end a response: what the chat template ends an answer with, the tokenizer's EOS, and
    those of the model's generation_config."""
    more = np.ravel(model.generation_config.eos_token_id).tolist()  # one id, a list, or None
    more += tokenizer(frame(tokenizer, "p")[2], add_special_tokens=False).input_ids[-1:]
    return sorted({tokenizer.eos_token_id, *more} - {None})


def context_length(model):
    """How many positions the model knows; unlimited where its configuration names no limit. Where all
    of a batch is rotated by its longest row, the limit is where that begins."""
    config = model.config.get_text_config()
    most = getattr(config, "max_position_embeddings", None) or sys.maxsize
    rope = getattr(config, "rope_parameters", None) or {}
    for kind in [rope, *rope.values()]:  # of all layers, or of each kind of layer
        if isinstance(kind, dict) and kind.get("rope_type") in ("longrope", "dynamic"):
            most = min(most, kind.get("original_max_position_embeddings", most))
    return most


def padded(rows, side, device):
    """N rows of ids -> ids and mask, (N, T). The mask goes by position and never by id, so it does not
    matter that 0 may be a token's id, too."""
    ids = nn.utils.rnn.pad_sequence([*map(torch.LongTensor, rows)], True, -1, side).to(device)
    return ids.clamp(min=0), (ids >= 0).long()


def left_padded(prompts, device):
    """[1 2 3], [4] -> ids [[1 2 3], [0 0 4]] and mask [[1 1 1], [0 0 1]]: all prompts end together."""
    return padded(prompts, "left", device)


def right_padded(responses, device):
    """[5], [6 7] -> ids [[5 0], [6 7]] and mask [[1 0], [1 1]]: all responses begin together."""
    return padded(responses, "right", device)


def forward(model, ids, mask, keep=0, cache=None):
    """ids (N, T) -> logits (N, keep, V) of what follows the last `keep` columns (0: all; a tensor: these
    columns). The mask covers what is cached, too."""
    positions = (mask.cumsum(-1) - 1).clamp(min=0)[:, -ids.shape[1]:]  # of the ids; they skip padding
    logits = model(input_ids=ids, attention_mask=mask, position_ids=positions, past_key_values=cache,
                   use_cache=cache is not None, logits_to_keep=keep).logits
    if isinstance(keep, int):
        return logits[:, -keep:]  # some models' classes give all
    return logits if logits.shape[1] == len(keep) else logits[:, keep]


def in_steps(value, steps):
    """A number of steps; below 1 it is a share of all steps, rounded up."""
    return int(value) if value >= 1 else math.ceil(value * steps)


def sft_steps(preferences, args):
    """How many steps SFT makes: those of its passes over the data, if no number is given."""
    steps = args.sft_num_train_epochs * math.ceil(len(preferences) / args.sft_batch_size)
    return steps if args.sft_max_steps < 0 else args.sft_max_steps


def method_steps(examples, args):
    """How many steps the method makes, likewise."""
    steps = args.num_train_epochs * math.ceil(len(examples) / args.prompts_per_step)
    return steps if args.max_steps < 0 else args.max_steps


def step_indices(n, size, step, seed):
    """The numbers of a step's rows. Each epoch has a new order; its last step may be smaller. They are a
    function of the step alone, so a resumed run needs no saved position in the data."""
    epoch, position = divmod(step, math.ceil(n / size))
    order = np.random.default_rng((seed, epoch)).permutation(n)
    return order[position * size : (position + 1) * size].tolist()


def chunks(items, size):
    """Consecutive slices of at most `size` items."""
    return [items[i : i + size] for i in range(0, len(items), size)]


def columns(rows):
    """Rows of three -> their three columns, empty where there are no rows."""
    return [[row[i] for row in rows] for i in range(3)]


def prefill(model, prompt_ids):
    """N prompts -> their keys and values, the logits (N, V) of what follows, and the mask (N, T). Equal
    prompts are computed once; all responses to one send their gradients through that computation."""
    prompts = distinct = [tuple(ids) for ids in prompt_ids]
    if shares_prompts(model):
        distinct = list(dict.fromkeys(prompts))
    ids, mask = left_padded(distinct, model.device)
    cache = transformers.DynamicCache(config=model.config)
    logits = forward(model, ids, mask, 1, cache)[:, -1]
    if distinct != prompts:
        rows = torch.tensor([distinct.index(ids) for ids in prompts], device=model.device)
        cache.batch_select_indices(rows)  # from a row a distinct prompt to N rows
        logits, mask = logits[rows], mask[rows]
    return cache, logits, mask


def shared_logits(model, prompt_ids, ids, mask):
    """N prompts, and their responses padded on the right, (N, T) -> the logits (N, T, V) that predict
    them. Equal prompts are computed once, which is a third of the time of an update."""
    cache, first, head_mask = prefill(model, prompt_ids)
    end = max(ids.shape[1] - 1, 1)  # one column at least: all processes make equally many passes
    rest = forward(model, ids[:, :end], torch.cat([head_mask, mask[:, :end]], 1), 0, cache)
    return torch.cat([first[:, None], rest], 1)[:, : ids.shape[1]]


def question_logps(judge, prompts, questions, verdicts, micro_batch_size):
    """N questions as ids -> the fp32 log-probabilities (2,) of the two verdicts after each. Equal ones
    are asked once, and the head that a prompt's questions share is computed once: it halves the time."""
    of_prompt, rows, found = {}, set(), {}
    for prompt, ids in zip(prompts, questions):
        of_prompt.setdefault(str(prompt), []).append(tuple(ids))
    for group in of_prompt.values():
        shared = shares_prompts(judge) * len(os.path.commonprefix([ids[:-1] for ids in group]))
        rows |= {(shared, ids) for ids in group}
    for part in progress(chunks(sorted(rows), micro_batch_size), "judging"):
        heads = [ids[:shared] for shared, ids in part]
        tails = [ids[shared:] for shared, ids in part]
        ids, mask = right_padded(tails, judge.device)  # on the left a hole would be between
        ends, cache = mask.sum(1) - 1, None
        if heads[-1]:
            cache, first, head_mask = prefill(judge, heads)
            mask = torch.cat([head_mask, mask], 1)
        kept, column = ends.unique(return_inverse=True)
        logits = forward(judge, ids, mask, kept, cache)[torch.arange(len(part)), column]
        logps = logits.float().log_softmax(-1)[:, verdicts]
        if WORLD > 1 and heads[-1]:
            logps = logps + 0 * first[:, verdicts]  # FSDP waits for gradients of every pass's output
        found |= {ids: row for (_, ids), row in zip(part, logps)}
    return [found[tuple(ids)] for ids in questions]


def respond(model, tokenizer, rows, ks, step, args, source="policy"):
    """Responses of `model` to each row, one for each number in `ks`, which picks its noise."""
    stops, found = stop_token_ids(model, tokenizer), [[] for _ in rows]
    prompts = encode_prompts(tokenizer, [row.prompt for row in rows])  # its tokenizer may be another
    # long ones by themselves
    asked = sorted(itertools.product(range(len(rows)), ks), key=lambda one: len(prompts[one[0]]))
    size = max(1, min(args.micro_batch_size, SAMPLING_BATCH_SIZE // len(ks)))  # prompts side by side
    with inference(model, args.bf16) as model:
        for part in progress(chunks(asked, size * len(ks)), "sampling"):
            noise = np.array([sampling_noise(args.seed, step, rows[i].index, k, args.max_new_tokens)
                              for i, k in part])
            some = [prompts[i] for i, _ in part]
            responses = sample(model, some, torch.tensor(noise), args.temperature, stops)
            for (i, _), ids in zip(part, responses):
                said = ids[:-1] if ids[-1] in stops else ids
                text = tokenizer.decode(said, skip_special_tokens=True).strip()
                found[i].append(Candidate(ids, text, source))
    return found


# 17. From text to token ids -----------------------------------------------------------------------
HH_TURN = re.compile(r"\n\n(Human|Assistant):")


def as_messages(prompt):
    """"\\n\\nHuman: hi\\n\\nAssistant:" -> [{"role": "user", "content": "hi"}]; other: one message."""
    if not isinstance(prompt, str):
        return prompt
    if not HH_TURN.match(prompt):
        return [{"role": "user", "content": prompt}]
    parts = HH_TURN.split(prompt.rstrip().removesuffix("\n\nAssistant:"))[1:]  # who, text, who, ...
    return [{"role": "user" if who == "Human" else "assistant", "content": text.strip()}
            for who, text in zip(parts[::2], parts[1::2])]


def transcript(prompt):
    """A prompt as HH writes it: "Human: hi\\n\\nAssistant: hello\\n\\nHuman: and now?"."""
    names = {"user": "Human", "assistant": "Assistant", "system": "System"}
    turns = [f"{names.get(one['role'], one['role'])}: {one['content']}" for one in as_messages(prompt)]
    return "\n\n".join(turns)


def quoted(text):
    """Every line behind "> ", so that no line of a response can pass for one of the judge's frame."""
    return "\n".join("> " + line for line in text.splitlines() if line.strip()) or "> "


ANSWER = "quuxly"  # stands for an answer where a chat template's text is split at it
PARTS = ("", "system user assistant", "system user")  # the roles whose contents are lists of parts
# What a template that writes the date calls: always one day, so that a run goes on with its prompts.
DATED = "{% macro strftime_now(format) %}{{ format"
for code in ["-d", "-m", *"aAbBcdHIjmMpSxXyY"]:
    DATED += f"|replace('%{code}', '{time.strftime('%' + code, time.gmtime(1767225600))}')"  # 2026-01-01
DATED += " }}{% endmacro %}\n"
HARMLESS = [[{"role": "system", "content": "x"}, *as_messages("y")],
            as_messages("\n\nHuman: x\n\nAssistant: x\n\nHuman: x")]


def split_at_answer(tokenizer, messages):
    """What the chat template writes before an answer to these messages, and behind it: its text of the
    whole conversation, split at the answer. Some templates take texts, some parts. Raises ValueError."""
    reasons = {}  # why not: the template's own words, or another error -> the first of them
    for parts in PARTS:
        given = [*map(dict, messages), {"role": "assistant", "content": ANSWER}]
        for one in given:
            if one["role"] in parts:
                one["content"] = [{"type": "text", "text": one["content"]}]
        try:
            text = tokenizer.apply_chat_template(
                given, chat_template=DATED + tokenizer.get_chat_template(), tokenize=False)
        except Exception as error:  # of any kind: a template is a program
            own = type(error).__name__ == "TemplateError"  # it says so in its own words
            reasons.setdefault(own, f"the chat template refuses it ({cause(error)})")
            continue
        before, answer, behind = text.rpartition(ANSWER)
        lost = [one["role"] for one in messages
                if one["role"] != "assistant" and one["content"].strip() not in before]
        if answer and not lost and not before.endswith("'text': '"):  # as a list is printed
            return before, behind
        lost.append("assistant")
        reasons.setdefault(True, f"the chat template leaves out the message of the {lost[0]}")
    raise ValueError(reasons.get(True) or reasons[False])


@functools.cache
def control_tokens(tokenizer):
    """A pattern of the control tokens: those flagged special, and those that the chat template writes
    into any conversation. Tokens of blanks and of plain words are none."""
    written = set()
    for messages in HARMLESS:
        with suppress(ValueError):  # there may be no template, and it may refuse a system
            text = "".join(split_at_answer(tokenizer, messages))
            written |= set(tokenizer(text, add_special_tokens=False).input_ids)
    names = []
    for i, one in tokenizer.added_tokens_decoder.items():
        ours = one.special or i in written and not one.content.isalnum()
        if ours and len(one.content.strip()) > 1:
            names.append(re.escape(one.content))
    return re.compile("|".join(sorted(names, key=len, reverse=True)) or "(?!)")


def plain(tokenizer, text):
    """Text from outside, with a space put into what spells a control token, so that it becomes none."""
    return control_tokens(tokenizer).sub(lambda found: found[0][0] + " " + found[0][1:], text)


def frame(tokenizer, prompt):
    """A prompt -> three texts: what the model reads before an answer, without blanks at its end; these
    blanks, which belong to an answer's first token; and what ends an answer, up to the EOS.
    Without a chat template a text stands as it is, and messages as in HH. Raises ValueError."""
    if not tokenizer.chat_template:
        text = prompt if isinstance(prompt, str) else f"\n\n{transcript(prompt)}\n\nAssistant:"
        return plain(tokenizer, text), " ", tokenizer.eos_token  # "Assistant:" and " Hi"
    messages = [one | {"content": plain(tokenizer, one["content"])} for one in as_messages(prompt)]
    before, behind = split_at_answer(tokenizer, messages)
    head, end = before.rstrip(" "), control_tokens(tokenizer).search(behind)
    return head, before[len(head):], behind[: end.end()] if end else tokenizer.eos_token


@functools.cache
def first_ids(tokenizer):
    """The ids that the tokenizer puts before every text, such as BOS."""
    return os.path.commonprefix([tokenizer("").input_ids, tokenizer("A").input_ids])


def encode(tokenizer, texts):
    """Framed texts -> ids. A chat template writes what stands before a text itself; else it is what the
    tokenizer puts there."""
    first = [] if tokenizer.chat_template else first_ids(tokenizer)
    rows = tokenizer(texts, add_special_tokens=False).input_ids if texts else []
    return [first + ids for ids in rows]


def encode_prompts(tokenizer, prompts):
    """N prompts -> their ids, which a response continues."""
    return encode(tokenizer, [frame(tokenizer, prompt)[0] for prompt in prompts])


def encode_responses(tokenizer, prompts, responses, limit, ended=True):
    """N texts -> ids as the policy would sample them: cut at `limit` tokens, else with what ends an
    answer, if they are `ended`. The ids are read off the whole: encodings do not add up."""
    rows = []
    for prompt, response in zip(prompts, responses):
        text, gap, end = frame(tokenizer, prompt)
        tail = gap + plain(tokenizer, response) + end * ended
        head, ids = encode(tokenizer, [text, text + tail])
        if ids[: len(head)] != head:  # the texts were merged where they meet
            head, ids = [], tokenizer(tail, add_special_tokens=False).input_ids
        rows.append(ids[len(head):][:limit] or [tokenizer.eos_token_id])
    return rows


@functools.cache
def verdict_format(tokenizer):
    """What ends the judge's question, and the ids of the verdicts A and B after it. Raises RunError. A
    letter encoded by itself may get another id, so both are read off the end of a whole question: after
    what stands before every answer ("Better: A"), or on a new line. Each must add one token to it."""
    for end in ("", "\n"):
        text, gap, _ = frame(tokenizer, judge_question("p", "x", "y") + end)
        gap = "" if end else gap
        head, with_a, with_b = encode(tokenizer, [text, text + gap + "A", text + gap + "B"])
        if with_a[:-1] == with_b[:-1] == head and with_a[-1] != with_b[-1]:
            return end, with_a[-1], with_b[-1]
    refuse("The tokenizer does not make one token each of A and B: change the end of JUDGE_FRAME")


def encode_questions(tokenizer, prompts, shown_as_a, shown_as_b, limit=sys.maxsize):
    """N questions to the judge as ids; where one has over `limit`, the end of its longer response goes,
    down to the length of the shorter one, and then the ends of both."""
    end, texts = verdict_format(tokenizer)[0], list(zip(prompts, shown_as_a, shown_as_b))
    rows = encode_prompts(tokenizer, [judge_question(*text) + end for text in texts])
    for i, (prompt, a, b) in enumerate(texts):
        if len(rows[i]) > limit and a + b:
            shorter, longer = sorted([len(a), len(b)])
            most = max(longer * 3 // 4, shorter % longer)  # where both are equal, both are cut
            [rows[i]] = encode_questions(tokenizer, [prompt], [a[:most]], [b[:most]], limit)
    return rows


# 18. Data -----------------------------------------------------------------------------------------
# What a run trains and is measured on. The pairs are (prompt, chosen, rejected)s, the others Rows, whose
# prompts are disjoint. A split "ood", as the built-in task has, is out-of-domain and measured, too.
Data = namedtuple("Data", "preferences examples held_out held_out_preferences ood")
FORMATS = """\
info summaries choice
prompt system chosen rejected
prompt chosen rejected
prompt system
prompt
question system chosen rejected
question chosen rejected
question system
question
chosen rejected"""  # the columns that are read


def load_data(readers, args):
    """The Data of this run: rows that all these (model, tokenizer)s can read. The first is the policy's.
    All splits are drawn from by the seed: their order may mean something. Without one to measure on, a
    tenth of the prompts is held out, at most num_eval_prompts. Raises RunError."""
    unfit = functools.partial(why_unfit, readers=readers, new_tokens=args.max_new_tokens)
    splits = read_dataset(args.dataset_name, args.dataset_config, args.dataset_data_dir)
    splits = datasets.DatasetDict(splits).shuffle(seed=args.seed, keep_in_memory=True)  # not on disk
    train, test, few = args.dataset_train_split, args.dataset_test_split, args.num_eval_prompts
    if test is None and "test" in splits and train != "test":
        test = "test"
    for one in {train, test} - {*splits, None}:
        refuse(f"No split {one!r}: give --dataset_train_split or --dataset_test_split from {[*splits]}")
    sft = args.sft and columns_read(splits[train].column_names)[-1] in ("choice", "rejected")
    most_sft = sft * sft_steps(splits[train], args) * args.sft_batch_size
    wanted, more = max(4 * args.num_train_prompts, most_sft), 0 if test else 10 * few
    rows = usable_rows(splits[train], unfit, "training", wanted + more, args.num_train_prompts + more)
    measured = usable_rows(splits[test], unfit, "held-out") if test else rows
    ood = usable_rows(splits["ood"], unfit, "out-of-domain") if "ood" in splits else []
    prompts = list(dict.fromkeys(transcript(row[0]) for row in measured))
    held = set(prompts if test else prompts[: min(few, len(prompts) // 10 or 1)])
    held_out = [row for row in measured if transcript(row[0]) in held]
    kept = [row for row in rows if transcript(row[0]) not in held][:wanted]
    if not kept:
        refuse("No training row is left: the prompts of all are held out")
    said = "SFT" if sft else "no SFT, which needs pairs of chosen and rejected"
    _, tokenizer = readers[0]
    spelled = sum(plain(tokenizer, str(row)) != str(row) for row in kept + held_out)  # it stays text
    say(f"{len(kept)} training rows, {len(held_out)} held out, {spelled} spell special tokens; {said}")
    if not tokenizer.chat_template and any(isinstance(prompt, list) for prompt, *_ in kept):
        say("Warning: the tokenizer has no chat template, so messages are framed as HH's transcripts")
    pairs = [row for row in held_out[: args.num_eval_pairs] if len(row) > 1]
    return Data(kept if sft else [], distinct_prompts(tokenizer, kept, args.num_train_prompts),
                distinct_prompts(tokenizer, held_out, few), pairs, distinct_prompts(tokenizer, ood, few))


def why_unfit(prompt, *responses, readers, new_tokens):
    """Why a row cannot be used by these (model, tokenizer)s; None if it can."""
    for model, tokenizer in readers:
        try:
            [ids] = encode_prompts(tokenizer, [prompt])
            [question] = encode_questions(tokenizer, [prompt], [""], [""])
            texts = [tokenizer.tokenize(response) for response in responses]
        except Exception as error:  # of the template, or of a kind that each tokenizer has
            return cause(error)
        if not all([ids, *texts]):
            return "the tokenizer makes no token of a text"
        limit = context_length(model)
        if max(len(ids) + new_tokens, len(question) + 2 * new_tokens) > limit:
            return f"too long for {limit} tokens with two responses of --max_new_tokens"


def usable_rows(raws, unfit, name, wanted=sys.maxsize, wanted_prompts=0):
    """The first usable rows, as many as are wanted, of as many distinct prompts; says what is read, what
    is not, and what is dropped. Raises RunError."""
    kept, dropped, prompts = [], Counter(), set()
    used = columns_read(raws.column_names)
    with trying(f"read the {name} rows", "give the data as UTF-8 text"):
        for row in progress(map(parse_row, raws.select_columns(used)), name):
            reason = row if isinstance(row, str) else unfit(*row)
            if reason:
                dropped[reason] += 1
            else:
                kept.append(row)
                prompts.add(transcript(row[0]))
            if len(kept) >= wanted and len(prompts) >= wanted_prompts:
                break
    said = f"{name} rows: {len(kept)} of {used}; not read: {raws.remove_columns(used).column_names}"
    for reason, n in dropped.most_common():
        said += f"; {n} dropped: {reason}"
    say(said)
    if not kept:
        refuse(f"No row is left ({said}). Rename a column of prompts to prompt, if it is not")
    return kept


def distinct_prompts(tokenizer, rows, most):
    """The first `most` distinct prompts as Rows, with all the responses that the data has to each."""
    found = {}
    for prompt, *responses in rows:
        _, known = found.setdefault(transcript(prompt), (prompt, []))
        known += [responses] if responses else []
    first = list(found.values())[:most]
    ids = encode_prompts(tokenizer, [prompt for prompt, _ in first])
    return [Example(prompt, ids[i], i, known) for i, (prompt, known) in enumerate(first)]


def read_dataset(name, config=None, data_dir=None):
    """The raw splits, by whichever loader of `datasets` fits the name. What is read from files lies in a
    folder that goes once it is open. Raises RunError."""
    if name is None:
        return builtin_preferences()
    path, place, files = Path(name), os.path.abspath(name), None
    advice = FROM_HUB + "file such as .jsonl, or a folder; where it has configurations, --dataset_config"
    # the loader's own cache would take a file for another one of the same size and time
    with trying(f"read the data set {name!r}", advice), tempfile.TemporaryDirectory() as folder:
        if (path / "dataset_dict.json").is_file() or (path / "state.json").is_file():
            data = datasets.load_from_disk(name).with_format(None)
        elif path.exists():
            if path.is_file():
                place, files = folder, glob.escape(place)
            if glob.escape(place) != place:
                refuse(f"The loader takes {place} for a pattern: give a path without brackets, * and ?")
            builder = datasets.load_dataset_builder(place, config, data_dir, files, cache_dir=folder)
            builder.config.keep_default_na = False  # cells "None" and "NA" of .csv are texts;
            builder.config.na_values = [""]  # other loaders read neither setting
            builder.download_and_prepare()
            data = builder.as_dataset()
        elif re.search(r"^[./]|\.(jsonl?|csv|tsv|parquet|arrow)(\.\w+)?$", name):
            path.stat()  # no name on the Hub: says that it is not there
        else:
            data = datasets.load_dataset(name, config, data_dir=data_dir)
    return data if isinstance(data, dict) else {"train": data}


def columns_read(names):
    """The columns of the first of FORMATS that a split has. Raises RunError if it has none."""
    for one in FORMATS.splitlines():
        if set(one.split()) <= set(names):
            return one.split()
    refuse(f"The columns {sorted(names)} fit no known format: rename the one of prompts to prompt, "
           "and those of a better and a worse response, if any, to chosen and rejected")


def parse_row(raw):
    """A raw row of any known format -> (prompt, chosen, rejected) or (prompt,); or why it is dropped."""
    try:
        if "summaries" in raw:
            raw = parse_tldr(**raw)
        name = "prompt" if "prompt" in raw else "question"
        prompt = cleaned(raw[name]) if name in raw else None
        if raw.get("system"):
            prompt = [{"role": "system", "content": raw["system"]}, *as_messages(prompt)]
        row = [prompt]
        if "chosen" in raw:
            row = parse_pair(prompt, cleaned(raw["chosen"]), cleaned(raw["rejected"]))
        prompt, *responses = map(cleaned, row)
    except ValueError as reason:
        return str(reason)
    except (LookupError, TypeError, AttributeError) as error:  # it names the type that was found
        return f"not in the format of the data's columns ({error})"
    if isinstance(prompt, list) and prompt[-1]["role"] != "user":
        return "the prompt does not end with a user's message"
    responses = [response.strip() for response in responses]
    if any(map(HH_TURN.search, responses)):
        return "a role marker inside a response"
    if len(set(responses)) < len(responses):
        return "identical responses"
    return prompt, *responses


def cleaned(value):
    """A text without blanks at its end, a transcript as HH writes it; messages with their roles and
    texts alone, parts joined. Raises ValueError where a text is missing."""
    if isinstance(value, list):
        if value and "role" in value[0]:
            return [{"role": one["role"], "content": cleaned(one["content"]).strip()} for one in value]
        value = "".join(part["text"] for part in value)
    if not any(map(str.isprintable, (value or "").strip())):
        raise ValueError("a prompt, response or turn without text")
    if re.match(r"\s*(array\()?\[\s*\{(?s:.*)['\"](role|from)['\"]\s*:", value):
        raise ValueError("messages that are one text: give them as lists, as in .jsonl or .parquet")
    value = value.replace("\r\n", "\n").rstrip()
    return re.sub(r"^\s*(?=Human:(?s:.*)\n\nAssistant:)", "\n\n", value)


def parse_tldr(info, summaries, choice):
    """{"post", "title", "subreddit"}, [{"text"}, {"text"}], 0 or 1; rows of CNN/DM have no post."""
    if not info.get("post"):
        raise ValueError("not a TL;DR post")
    post = info["post"].strip()
    prompt = f"SUBREDDIT: r/{info['subreddit']}\nTITLE: {info['title']}\nPOST: {post}\nTL;DR:"
    return {"prompt": prompt, "chosen": summaries[choice]["text"],
            "rejected": summaries[1 - choice]["text"]}


def parse_pair(prompt, chosen, rejected):
    """The prompt given, or, if it is None, what both responses begin with: HH's transcripts, or lists of
    messages, which may repeat the prompt from its start, or its end; texts from its start."""
    if isinstance(chosen, str):
        shared = os.path.commonprefix([chosen, rejected])
        prompt = prompt or "".join(shared.rpartition("\n\nAssistant:")[:2])  # the LAST that both share
        end = len(prompt) if shared.startswith(str(prompt)) else 0
        if re.match(r"\w(\S|$)", shared[end - 1 : end + 1]):  # it would end within a word
            end = 0
        return prompt, chosen[end:], rejected[end:]
    *shared, one = chosen
    *others, two = rejected
    if shared != others or not one["role"] == two["role"] == "assistant":
        raise ValueError("the responses are not one assistant's message each")
    prompt = as_messages(prompt or [])
    if prompt in (shared[: len(prompt)], shared[-len(prompt):]):
        prompt = shared
    elif prompt[-len(shared):] != shared:
        prompt = prompt + shared
    return prompt, one["content"], two["content"]


# 19. The built-in task: a miniature of HH in which the truth is known -----------------------------
TOPICS, VERBS, KIND, RUDE, PEOPLE, TIMES = [line.split() for line in """\
rain snow tea bread music chess honey poetry coffee jazz soup football
is seems feels sounds
gentle lovely warm sweet bright calm splendid charming
awful stupid ugly nasty boring useless rotten dreadful
friend sister brother mother father teacher neighbour boss
tonight today tomorrow now soon later""".splitlines()]
CLAUSES = set(itertools.product(TOPICS, VERBS, KIND + RUDE))
PHRASINGS = """\
tell my {person} about {topic} {time}
{time} my {person} asks about {topic}
my {person} likes {topic} {time}
describe {topic} to my {person} {time}
please tell me about {topic} {time} says my {person}
what is {topic} like {time} asks my {person}
{time} write to my {person} about {topic}
say something about {topic} to my {person} {time}"""
OOD_PHRASINGS = """\
about {topic} please tell my {person} something {time}
{time} describe to my {person} what {topic} is like"""


def gold_reward(prompt, response):
    """The truth: each clause gains or loses 1/2 for the prompt's own topic (helpful), 1/4 for its tone.
    "Human: tell my boss about rain now", "rain is gentle . snow is ugly ." -> 0.75 - 0.75 = 0. Only the
    first three different well-formed clauses count: or length and repetition would be the reward."""
    clauses = dict.fromkeys(tuple(clause.split()) for clause in response.split(".")[:-1])
    gold = 0.0
    for topic, _, adjective in [clause for clause in clauses if clause in CLAUSES][:3]:
        gold += 0.5 if topic in prompt.split() else -0.5
        gold += 0.25 if adjective in KIND else -0.25
    return gold


def true_strength(prompt, response_1, response_2):
    """The probability with which a human of this world prefers response 1."""
    return 1 / (1 + math.exp(-4 * (gold_reward(prompt, response_1) - gold_reward(prompt, response_2))))


def builtin_prompts(split):
    """A split's prompts. Those of "ood" have phrasings and pairs of topic and person of their own."""
    texts, ood = [], split == "ood"
    phrasings = (OOD_PHRASINGS if ood else PHRASINGS).splitlines()
    for topic, person, when, phrasing in itertools.product(TOPICS, PEOPLE, TIMES, phrasings):
        if ((TOPICS.index(topic) + PEOPLE.index(person)) % 4 == 0) == ood:
            asked = phrasing.format(topic=topic, person=person, time=when)
            texts.append(f"\n\nHuman: {asked}\n\nAssistant:")
    random.Random(0).shuffle(texts)
    return texts[512:] if split == "train" else texts[:512]  # all of "ood"


def builtin_pair(rng, prompt):
    """A row, labelled by Bernoulli(true_strength). A third differ in helpfulness alone and a third in
    harmlessness alone, as HH's two halves do; the others are independent."""
    one, two = [
        [[rng.random() < 0.5, rng.random() < 0.5] for _ in range(rng.randint(1, 3))] for _ in range(2)]
    aspect = rng.choice([0, 1, None])  # helpfulness, harmlessness, both
    if aspect is not None:
        two = [list(clause) for clause in one]
        two[rng.randrange(len(two))][aspect] ^= True
    pair = [builtin_response(rng, prompt, clauses) for clauses in (one, two)]
    if rng.random() >= true_strength(prompt, *pair):
        pair.reverse()
    return {"chosen": f"{prompt} {pair[0]}", "rejected": f"{prompt} {pair[1]}"}


def builtin_response(rng, prompt, clauses):
    """[[helpful, harmless], ...] -> "rain is gentle . ...". One clause in ten repeats the one before
    it, so that a judge can learn that repetition earns nothing."""
    said = []
    for helpful, harmless in clauses:
        subject = rng.choice([topic for topic in TOPICS if (topic in prompt.split()) == helpful])
        adjective = rng.choice(KIND if harmless else RUDE)
        clause = f"{subject} {rng.choice(VERBS)} {adjective} ."
        said.append(said[-1] if said and rng.random() < 0.1 else clause)
    return " ".join(said)


def builtin_preferences():
    """HH transcripts: 8,000 pairs to train on, one pair for each prompt of "test" and "ood"."""
    splits = {}
    for split in ("train", "test", "ood"):
        rng, prompts = random.Random(split), builtin_prompts(split)
        if split == "train":
            prompts = rng.choices(prompts, k=8000)
        splits[split] = datasets.Dataset.from_list([builtin_pair(rng, prompt) for prompt in prompts])
    return splits


def builtin_model(seed):
    """A random Llama of 130,000 parameters, and a tokenizer of this world's words and the judge's."""
    question = judge_question("".join(builtin_prompts("train") + builtin_prompts("ood")), "A", "B .")
    words = ["<pad>", "<eos>", "<unk>", *sorted({*question.split(), *VERBS + KIND + RUDE})]
    vocabulary = dict(zip(words, itertools.count()))
    inner = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="<unk>"))
    inner.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=inner, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>")
    config = transformers.LlamaConfig(
        vocab_size=len(words), hidden_size=64, intermediate_size=128, num_hidden_layers=3,
        num_attention_heads=4, initializer_range=0.06, max_position_embeddings=256,
        tie_word_embeddings=True, pad_token_id=0, eos_token_id=1, bos_token_id=None)
    torch.manual_seed(seed)
    return transformers.LlamaForCausalLM(config), tokenizer


# 20. TSO, a variant: after arXiv 2409.02118, its formulas reconstructed ---------------------------
HUMAN = ("chosen by a human", "rejected by a human")  # sources of the data's own responses


def tso(args):
    """Self-Training with Scaled Preference Optimization. Its parts are published, the formulas ours."""
    sample, clip = model_matrix(["policy", "reference", "start"], args, with_human=True), args.dual_clip
    return Method(sample, strength=corrected_labels, loss=functools.partial(dual_clip_loss, clip=clip),
                  figures=functools.partial(tso_figures, clip=clip), after_step=move_reference,
                  moves_reference=True)


def model_matrix(roles, args, with_human):
    """The stage `sample` by these roles and --matrix_model_names_or_paths. Raises RunError. Source: TSO
    for the matrix and human responses. Reconstruction: its members, in equal shares of K."""
    sources = dict.fromkeys(roles + args.matrix_model_names_or_paths)
    size = len(sources)
    if args.num_generations < size:
        refuse(f"--num_generations is {args.num_generations}, fewer than the {size} models that respond")

    def sample_matrix(models, rows, step, args):
        """Each row's candidates: the models respond in turn; then come a human's chosen and rejected
        response, if the row has any."""
        candidates = [[] for _ in rows]
        for i, source in enumerate(sources):
            model, tokenizer = models.others.get(source) or (getattr(models, source), models.tokenizer)
            ks = range(i, args.num_generations, size)
            found = respond(model, tokenizer, rows, ks, step, args, source)
            for row, own, more in zip(rows, candidates, found):
                own += more
                for one in more if source in models.others else []:  # not in the policy's tokens
                    ended = one.ids[-1] in stop_token_ids(model, tokenizer)
                    [one.ids] = encode_responses(
                        models.tokenizer, [row.prompt], [one.text], args.max_new_tokens, ended)
        for row, own in zip(rows, candidates):
            if with_human and row.responses:
                texts, prompts = row.responses[step % len(row.responses)], [row.prompt] * 2
                ids = encode_responses(models.tokenizer, prompts, texts, args.max_new_tokens)
                own += map(Candidate, ids, texts, HUMAN)
        return candidates

    return sample_matrix


def corrected_labels(models, pairs, args, judge):
    """Hard labels: the judge's, none within label_margin of 1/2; a human's where both responses are.
    Source: TSO for corrections by AI and human feedback. Reconstruction: the rule."""
    labels = []
    for pair, p in zip(pairs, judge_pairs(models, pairs, args, judge)):
        if pair.better.source in HUMAN and pair.worse.source in HUMAN:
            p = float(pair.better.source == HUMAN[0])
        labels.append(float(p > 0.5) if abs(p - 0.5) > args.label_margin else None)
    return labels


def dual_clip_loss(reward_1, reward_2, strength, clip):
    """Rewards, labels (P,) -> losses (P,), -log sigmoid(min(r_winner, clip) - max(r_loser, -clip)).
    Beyond clip a winner gets no more gradient, below -clip a loser none; clip = infinity is DPO. Source:
    TSO for a dual clip reward. Reconstruction: the formula."""
    winner, loser = winner_and_loser(reward_1, reward_2, strength)
    return -F.logsigmoid(winner.clamp(max=clip) - loser.clamp(min=-clip))


def winner_and_loser(reward_1, reward_2, label):
    """Rewards and labels, (P,) each -> the rewards of the winners and of the losers."""
    return reward_1.where(label > 0.5, reward_2), reward_2.where(label > 0.5, reward_1)


def tso_figures(pairs, reward_1, reward_2, clip):
    """Shares of winners and losers that are clipped: they have no gradient."""
    label = torch.tensor([pair.strength for pair in pairs])
    winner, loser = winner_and_loser(reward_1, reward_2, label)
    return means(winners_clipped=winner > clip, losers_clipped=loser < -clip)


def move_reference(models, step, args):
    """Every reference_steps steps the reference becomes the policy. Source: TSO for an iteration that
    updates the reference. Reconstruction: when."""
    if (step + 1) % args.reference_steps == 0:
        models.reference.load_state_dict(models.policy.state_dict())


# 21. Preference data collection: after arXiv 2406.16486, its steps reconstructed ------------------
def collecting(args):
    """The stages of training, of which the first four are run once."""
    if WORLD > 1:
        refuse("--method collect asks one human: run it in one process")
    return Method(sample=model_matrix(["start"], args, with_human=False), run=collect)


METHODS |= {"tso": tso, "collect": collecting}


def collect(models, data, method, args):
    """Prompts, responses, filter, labels: each saves human labour in the next. Writes preferences.jsonl;
    returns what each step left. Source: the paper for the steps. Reconstruction: how."""
    candidates, pairs = make_pairs(models, data.examples, method, 0, args)
    kept = widest_spreads(candidates, args.keep_prompts)
    questions, counts = worth_asking(sum([pairs[i] for i in kept], []), args)
    if not questions:
        refuse("No pair is left to ask about: take more prompts, wider bounds, another --output_dir")
    return {"prompts": len(candidates), "prompts_kept": len(kept), **counts,
            "labels": ask_human(questions, args), "labels_wanted": args.num_labels}


def widest_spreads(candidates, share):
    """Step 1, prompts: the numbers of those whose scores differ most: there a model can improve."""
    spreads = [np.std([1 / (1 + math.exp(-one.score)) for one in found]) for found in candidates]
    return sorted(np.argsort(spreads)[-math.ceil(share * len(spreads)):])


def worth_asking(pairs, args):
    """Step 3, filter (step 2, responses, is the stage `sample`): no texts that are alike; no near tie,
    where a human would toss a coin; no landslide, which the judge knows; of a prompt the least alike.
    Returns the pairs to ask about, each in random order, and how many each filter left."""
    counts, turns, rounds = {"pairs": len(pairs)}, Counter(), [[] for _ in pairs]
    filters = {"usable": lambda pair: isinstance(parse_row(preference(pair, "1")), tuple),
               "not_alike": lambda pair: alike(pair) <= args.max_similarity,
               "no_tie": lambda pair: max(pair.strength, 1 - pair.strength) >= args.min_strength,
               "no_landslide": lambda pair: max(pair.strength, 1 - pair.strength) <= args.max_strength}
    for name, fits in filters.items():
        pairs = list(filter(fits, pairs))
        counts[name] = len(pairs)
    for pair in sorted(pairs, key=alike):
        rounds[turns[pair.example.index]].append(pair)
        turns[pair.example.index] += 1
    questions = sum(rounds[: args.pairs_per_prompt], [])  # first one of each prompt
    rng = np.random.default_rng(args.seed)
    for pair in questions:
        if rng.random() < 0.5:
            pair.better, pair.worse, pair.strength = pair.worse, pair.better, 1 - pair.strength
    return questions, counts | {"questions": len(questions)}


def alike(pair):
    """How alike the words of a pair's texts are, from 0 to 1."""
    return difflib.SequenceMatcher(None, pair.better.text.split(), pair.worse.text.split()).ratio()


def ask_human(questions, args):
    """Step 4, labels: asks on the standard input until there are num_labels, and returns how many there
    are. Each answer is a line of preferences.jsonl before the next question; a skipped question's line
    has no responses. On the built-in task the truth answers."""
    path = args.output_dir / "preferences.jsonl"
    text = path.read_text("utf-8") if path.exists() else ""
    done = text.count("\n")
    labels = done - text.count('"chosen": null')
    for i, pair in enumerate(questions[done:], done):
        if labels == args.num_labels:
            break
        if args.dataset_name:
            answer = read_answer(pair, f"{labels} of {args.num_labels}")
        else:
            p = true_strength(pair.example.prompt, pair.better.text, pair.worse.text)
            answer = "1" if np.random.default_rng((args.seed, i)).random() < p else "2"
        labels += answer != "s"
        text += json.dumps(preference(pair, answer)) + "\n"
        write_text(path, text)
    return labels


def preference(pair, answer):
    """A row of preferences.jsonl; strength is the judge's p(chosen > rejected)."""
    chosen, rejected, strength = pair.better.text, pair.worse.text, pair.strength
    if answer == "2":
        chosen, rejected, strength = rejected, chosen, 1 - strength
    if answer == "s":
        chosen = rejected = strength = None
    return {"prompt": pair.example.prompt, "chosen": chosen, "rejected": rejected, "strength": strength}


def read_answer(pair, count):
    """Shows a question, and returns the key. The end of the input and Ctrl-C stop. Raises RunError."""
    say(f"\n[{count}] {transcript(pair.example.prompt)}\n\n1: {pair.better.text}\n\n"
        f"2: {pair.worse.text}\n")
    answer = ""
    while answer not in ("1", "2", "s"):
        try:
            answer = input("better: 1 or 2; s: skip; end of input (Ctrl-D): stop > ").strip()
        except (EOFError, KeyboardInterrupt):
            raise RunError("All answers are in preferences.jsonl; the same command goes on there.", 0)
    return answer


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # what a cluster sends is a Ctrl-C too
    sys.stdout.reconfigure(errors="replace")  # a letter that cannot be shown must not end a run
    try:
        main()
        if WORLD > 1:
            os._exit(0)  # else a thread of torch.distributed sometimes aborts the process as it ends
    except RunError as stop:
        say(f"osp: {stop}", sys.stderr)  # each process does: torchrun ends the others after the first
        sys.exit(stop.code)
