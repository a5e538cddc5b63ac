"""Online Self-Preferring Language Models (OSP, arXiv 2405.14103): a reference implementation.

One language model answers, judges its own answers, and learns from how STRONGLY one is preferred:

    sample K responses -> rank -> pair -> the frozen SFT model judges each pair -> SPCE loss -> update

    python osp.py                                           the built-in task, whose true reward is known
    python osp.py --model_name_or_path M --dataset_name D   a Hugging Face causal LM and preference data
    torchrun --nproc_per_node N osp.py ...                  the same in N processes, with a GPU each

Part I is the method, in the order of the algorithm. Part II is what makes it practical.

The paper's public text leaves some steps open. Those listed here with [R] are this project's own, as
are the judge's question, the curriculum of SFT and the built-in task. Docstrings say "reconstruction":
  [R] the judging task shows each pair in both orders; its loss is on the verdict alone (section 5)
  [R] all responses are compared with the first one sampled, which is always shown as A (section 7)
  [R] pairs are best with worst, second best with second worst, and so on inwards (section 7)
  [R] strengths are asked in both orders, and their probabilities are averaged (section 8)
  [R] the formula of the SPCE loss; the paper gives its name and its purpose (section 9)

Shapes: B prompts, K responses a prompt, P pairs, N sequences, T columns of tokens, V words of the
vocabulary. Pr(A) is the judge's probability of the verdict A, p a strength: how likely 1 is better.
`logps` is always a SUM over a response's tokens, its EOS included, its prompt excluded; `token_logps`
is per token. The reward of a response is beta * (log pi_theta - log pi_reference), as in DPO.
A stage's `args` is an Arguments, its `models` a Models, its `rows` and `pairs` lists of Row and Pair.
"""
import copy
import dataclasses
import difflib
import functools
import inspect
import itertools
import json
import math
import os
import random
import re
import shutil
import signal
import sys
import time
from collections import Counter, namedtuple
from collections.abc import Callable, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import datasets
import jinja2
import numpy as np
import pandas as pd
import tokenizers
import torch
import torch.distributed as dist
import transformers
from safetensors import SafetensorError
from torch import Tensor, nn
from torch.distributed.checkpoint import state_dict as dcp
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from tqdm.auto import tqdm
from transformers.modeling_layers import GradientCheckpointingLayer

Prompt = str | list[dict]  # a text, or chat messages [{"role": ..., "content": ...}, ...]
Ids = list[int]  # the token ids of one prompt or of one response


class Stop(Exception):
    """Why a run cannot go on, in one sentence for the user. `code`: 2 before the first step, 1 later."""
    def __init__(self, sentence: str, code: int = 2):
        super().__init__(sentence)
        self.code = code


# 1. Arguments -------------------------------------------------------------------------------------
@dataclasses.dataclass
class Arguments:
    """The command line; a comment is the help on its option. BUILTIN (section 12) has those
    of the built-in task. Of all these values the paper's public text names only the 200 prompts."""
    method: str = "osp"  # a name in METHODS
    model_name_or_path: str | None = None  # Hub name or folder; none: a tiny random model
    dataset_name: str | None = None  # Hub name, file or folder; none: the built-in task
    seed: int = 0  # the only source of randomness
    sft: bool | None = None  # fine-tune first; none: if the data has chosen and rejected
    sft_learning_rate: float = 1e-5  # peak learning rate of SFT
    sft_batch_size: int = 16  # preference pairs an SFT step, each in both orders
    sft_max_steps: int = 2000  # SFT steps
    num_generations: int = 8  # K, the responses sampled for each prompt
    max_new_tokens: int = 128  # longest response, in tokens
    temperature: float = 1.0  # of sampling; 1 is on-policy
    beta: float = 0.1  # scale of the implicit reward
    num_train_prompts: int = 200  # distinct prompts to train on
    prompts_per_step: int = 16  # B, the prompts of a step, of all processes together
    num_train_epochs: int = 3  # passes over these prompts
    max_steps: int = -1  # end after so many steps; -1: after the epochs; 0: only SFT and evaluation
    learning_rate: float = 1e-6  # peak learning rate
    lr_scheduler_type: Literal["linear", "cosine", "constant", "constant_with_warmup"] = "linear"  # form
    warmup_steps: float = 0.1  # steps of warm-up; below 1: their share of all steps
    max_grad_norm: float = 1.0  # gradients are clipped to this norm
    bf16: bool = False  # bf16 autocast for the update, bf16 copies for all else
    gradient_checkpointing: bool = False  # recompute activations in the backward pass
    micro_batch_size: int = 8  # sequences a forward pass
    # Part II: data, the run's folder, evaluation, and the variants of sections 19 and 20
    dataset_config: str | None = None  # configuration of the data set
    dataset_data_dir: str | None = None  # folder within the data set, such as harmless-base of HH
    dataset_train_split: str = "train"  # split to train on
    dataset_test_split: str | None = None  # split to measure on; none: test, else part of train
    chat_template_kwargs: str = "{}"  # more for the chat template, as JSON: {"enable_thinking": false}
    trust_remote_code: bool = False  # run Python code that comes with the model
    output_dir: str | None = None  # folder of the run; none: runs/<model>-<data>-seed<seed>
    overwrite_output_dir: bool = False  # replace the run that output_dir holds
    resume_from_checkpoint: Literal["latest"] | None = None  # latest: go on with the run in output_dir
    save_steps: int = 100  # steps between checkpoints, of SFT and of the method
    save_total_limit: int | None = None  # checkpoints of the method to keep; none: all
    eval_steps: int = 50  # steps between evaluations
    num_eval_prompts: int = 256  # held-out prompts, one sampled response each
    num_eval_pairs: int = 512  # held-out pairs that the judge is measured on
    eval_judge_name_or_path: str | None = None  # another model as judge of the win rate
    matrix_model_names_or_paths: list[str] = dataclasses.field(default_factory=list)  # tso, collect also
    dual_clip: float = 0.2  # tso: a reward has no gradient beyond it, above or below
    label_margin: float = 0.1  # tso: pairs whose strength is nearer to 1/2 are dropped
    reference_steps: int = 50  # tso: steps after which the reference becomes the policy
    num_labels: int = 500  # collect: how many pairs a human labels
    keep_prompts: float = 0.5  # collect: share of prompts to keep, those of the widest spread of scores
    max_similarity: float = 0.9  # collect: pairs of texts more alike are dropped; 1 is equal
    min_strength: float = 0.55  # collect: pairs nearer to a tie are dropped
    max_strength: float = 0.95  # collect: pairs nearer to a landslide are dropped
    pairs_per_prompt: int = 2  # collect: at most so many pairs a prompt, the least alike first


# 2. Load the SFT model; the records that the stages hand on ---------------------------------------
def load_model(name, args, dtype=torch.float32):
    """A causal LM without dropout, and its tokenizer; no name: the built-in ones. Raises Stop."""
    if name is None:
        return builtin_model(args.seed)
    trust = args.trust_remote_code
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(name, trust_remote_code=trust)
        model = transformers.AutoModelForCausalLM.from_pretrained(
            name, dtype=dtype, use_safetensors=True, trust_remote_code=trust)
    except Exception as error:  # the libraries raise a dozen kinds; each is the user's to mend
        raise Stop(f"Cannot load {name!r} as a causal language model ({cause(error)}): give a Hub name "
                   "(needs the network), or a folder with config, tokenizer and safetensors.") from error
    tokenizer.apply_chat_template = functools.partial(  # a dict since parse_arguments
        tokenizer.apply_chat_template, **args.chat_template_kwargs)
    return checked_model(model, tokenizer, name), tokenizer


@dataclasses.dataclass
class Models:
    """The models of a run by role. In OSP start, reference and judge are one: the frozen pi_SFT."""
    tokenizer: Any
    policy: Any  # pi_theta, which the optimizer trains
    start: Any = None  # pi_SFT, with which evaluation compares; it never moves
    reference: Any = None  # of the loss
    judge: Any = None  # of the strengths
    eval_judge: Any = None  # of the win rate where the truth is not known: (model, tokenizer)
    optimizer: Any = None
    scheduler: Any = None


@dataclasses.dataclass
class Candidate:
    """A response to a prompt."""
    ids: Ids
    text: str
    source: str = "policy"  # who wrote it
    score: float = 0.5  # in [0, 1]; by it the candidates of a prompt are ranked


@dataclasses.dataclass
class Row:
    """A prompt."""
    prompt: Prompt
    ids: Ids  # of the framed prompt, which a response continues
    index: int  # its number in its set, which picks its sampling noise
    responses: list  # the data's own (chosen, rejected)s, if it has any
    start: Candidate | None = None  # pi_SFT's response, for evaluation
    policy: Candidate | None = None  # the policy's own at the last evaluation


@dataclasses.dataclass
class Pair:
    """Two responses to one prompt, the one that ranks higher first."""
    row: Row
    better: Candidate
    worse: Candidate
    strength: float | None = None  # p(better > worse); below 1/2 it contradicts the ranking
    verdicts: tuple | None = None  # the judge's Pr(A) with the better one as A, with the worse as A
    ref_logps: tuple | None = None  # of the better and the worse one under the reference
    seen: tuple | None = None  # by the update, before its step: loss, reward of the better, of the worse


# 3. From text to token ids: what the policy continues, and what the judge is asked ----------------
JUDGE_FRAME = "Which response is better, A or B?\n\nPrompt:\n{prompt}\n\nA:\n{a}\n\nB:\n{b}\n\nBetter:"


def framed(tokenizer, prompt):
    """A prompt as the model reads it: by its chat template, or else as text, messages as in HH."""
    if tokenizer.chat_template:
        messages = [one | {"content": plain(tokenizer, one["content"])} for one in as_messages(prompt)]
        return tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    text = prompt if isinstance(prompt, str) else f"\n\n{transcript(prompt)}\n\nAssistant:"
    return plain(tokenizer, text)


def encode(tokenizer, texts):
    """Framed texts -> ids. A chat template writes BOS itself; else it is added if need be."""
    rows = tokenizer(texts, add_special_tokens=False).input_ids if texts else []
    if not tokenizer.chat_template and tokenizer("a").input_ids[0] == tokenizer.bos_token_id:
        rows = [[tokenizer.bos_token_id] + ids for ids in rows]
    return rows


def encode_prompts(tokenizer, prompts):
    """N prompts -> their ids, which a response continues."""
    return encode(tokenizer, [framed(tokenizer, prompt) for prompt in prompts])


def encode_responses(tokenizer, prompts, responses, limit):
    """N texts -> ids as the policy would sample them: cut at `limit` tokens, else ending in EOS."""
    rows = []
    for prompt, response in zip(prompts, responses):
        head, tail = framed(tokenizer, prompt), plain(tokenizer, response)
        if not head[-1].isspace():
            tail = " " + tail  # "Assistant:" and " Hi"
        head_ids, both_ids = encode(tokenizer, [head, head + tail])
        ids = both_ids[len(head_ids):]  # read off the whole: encodings do not add up
        if both_ids[: len(head_ids)] != head_ids:  # the texts were merged where they meet
            ids = tokenizer(tail, add_special_tokens=False).input_ids
        rows.append((ids + [tokenizer.eos_token_id])[:limit])
    return rows


def quoted(text):
    """Every line behind "> ", so that no line of a response can pass for one of the judge's frame."""
    return "\n".join("> " + line for line in text.splitlines() if line.strip()) or "> "


def judge_question(tokenizer, prompt, a, b, end):
    """The framed text whose next token is the verdict, "A" or "B"; verdict_format gives `end`."""
    question = JUDGE_FRAME.format(prompt=quoted(transcript(prompt)), a=quoted(a), b=quoted(b))
    return framed(tokenizer, question + end)


@functools.lru_cache(maxsize=4)
def verdict_format(tokenizer):
    """What ends the judge's question, and the ids of the verdicts A and B after it. Raises Stop. A
    letter encoded by itself may get another id, so both are read off the end of a whole question: after
    a space ("Better: A"), or on a new line, or at once. Each must add one token to it."""
    for end, gap in (("", " "), ("\n", ""), ("", "")):
        text = judge_question(tokenizer, "p", "x", "y", end)
        if text[-1].isspace():  # so the chat template ends
            gap = ""
        head, with_a, with_b = encode(tokenizer, [text, text + gap + "A", text + gap + "B"])
        if with_a[:-1] == with_b[:-1] == head and with_a[-1] != with_b[-1]:
            return end, with_a[-1], with_b[-1]
    raise Stop("This tokenizer never makes one token each of the verdicts A and B after the judge's "
               "question: change the end of JUDGE_FRAME in osp.py.")


def encode_questions(tokenizer, prompts, shown_as_a, shown_as_b, limit=sys.maxsize):
    """N questions to the judge as ids; where one has over `limit`, the ends of its responses go."""
    end, _, _ = verdict_format(tokenizer)
    rows = list(zip(prompts, shown_as_a, shown_as_b))
    questions = encode(tokenizer, [judge_question(tokenizer, *row, end) for row in rows])
    for i, (prompt, a, b) in enumerate(rows):
        while len(questions[i]) > limit and a + b:
            a, b = a[: len(a) * 3 // 4], b[: len(b) * 3 // 4]
            [questions[i]] = encode(tokenizer, [judge_question(tokenizer, prompt, a, b, end)])
    return questions


# 4. Log-probabilities of responses ----------------------------------------------------------------
def padded(prompt_ids: list[Ids], response_ids: list[Ids], device, pad=0) -> tuple[Tensor, Tensor]:
    """N prompts padded on the left and N responses on the right, so that all meet at one column.
    The mask goes by position and never by id, so any id will do for padding.
    Prompts [1 2 3], [4], responses [5], [6 7] -> ids [[1 2 3 5 .], [. . 4 6 7]] and
    mask [[1 1 1 1 0], [0 0 1 1 1]]."""
    halves = []
    for rows, side in ((prompt_ids, "left"), (response_ids, "right")):
        rows = [torch.tensor(ids, dtype=torch.long) for ids in rows]
        halves.append(nn.utils.rnn.pad_sequence(
            rows, batch_first=True, padding_value=-1, padding_side=side))
    ids = torch.cat(halves, 1).to(device)
    return ids.where(ids >= 0, pad), (ids >= 0).long()


def forward(model, ids, mask, keep=0, cache=None):
    """ids (N, T) -> logits (N, keep, V) of what follows the last `keep` columns (0: all). The mask
    covers what is cached, too."""
    positions = (mask.cumsum(-1) - 1).clamp(min=0)[:, -ids.shape[1]:]  # they skip all padding
    return model(input_ids=ids, attention_mask=mask, position_ids=positions, past_key_values=cache,
                 use_cache=cache is not None, logits_to_keep=keep).logits


def prefill(model, prompt_ids):
    """N prompts -> their keys and values, the logits (N, V) of what follows, and the mask (N, T). Equal
    prompts are computed once; all responses to one send their gradients through that computation."""
    distinct = {}  # prompt -> its row
    rows = [distinct.setdefault(tuple(ids), len(distinct)) for ids in prompt_ids]
    ids, mask = padded(list(distinct), [[]] * len(distinct), model.device)
    cache = transformers.DynamicCache(config=model.config)
    logits = forward(model, ids, mask, 1, cache)[:, -1]
    rows = torch.tensor(rows, device=model.device)
    cache.batch_select_indices(rows)  # from a row a distinct prompt to N rows
    return cache, logits[rows], mask[rows]


def token_logps(model, prompt_ids: list[Ids], response_ids: list[Ids], pad=0, share=False) -> Tensor:
    """N prompts and responses -> (N, T) fp32 log-probs of the responses' tokens, 0 beyond their ends.
    Logits are made at the responses' positions only. `share` computes equal prompts once."""
    ids, mask = padded(prompt_ids, response_ids, model.device, pad)
    T = max(map(len, response_ids))
    left = ids.shape[1] - T  # columns of the prompts
    if share:
        end = left + max(T - 1, 1)  # one column at least: all processes make equally many passes
        cache, first, _ = prefill(model, prompt_ids)
        rest = forward(model, ids[:, left:end], mask[:, :end], 0, cache)
        logits = torch.cat([first[:, None], rest], 1)[:, :T]
    else:
        logits = forward(model, ids, mask, T + 1)[:, :-1]  # column t predicts column t + 1
    logps = logits.float().log_softmax(-1).gather(-1, ids[:, left:, None])[:, :, 0]
    return logps.where(mask[:, left:].bool(), 0.0)


def response_logps(model, prompt_ids: list[Ids], response_ids: list[Ids], pad_token_id: int = 0,
                   micro_batch_size: int = 8) -> Tensor:
    """N prompts and responses -> (N,) fp32 logps in nats: sums over a response's tokens, EOS included.
    Sums and not means: the implicit reward is a ratio of the probabilities of whole responses."""
    share = not (model.training and model.is_activation_checkpointing)  # it allows no cache
    order = sorted(range(len(prompt_ids)), key=lambda i: (len(prompt_ids[i]), prompt_ids[i]))
    sums = [torch.zeros(0, device=model.device)]
    for part in chunks(order, micro_batch_size):
        prompts, responses = [prompt_ids[i] for i in part], [response_ids[i] for i in part]
        sums.append(token_logps(model, prompts, responses, pad_token_id, share).sum(-1))
    return torch.cat(sums)[torch.tensor(order, dtype=torch.long).argsort()]  # in the order asked


# 5. Supervised fine-tuning with the judging task: makes pi_SFT ------------------------------------
EASY_STEPS, EASY_ROWS = 0.3, 0.25  # a curriculum: 30% of the steps see the shortest quarter of the pairs


def supervised_tasks(models, batch, args):
    """(prompt, chosen, rejected)s -> both tasks' prompts and targets as ids; the loss is on the targets.

    respond: the chosen responses. A third is enough: responding is learned long before judging.
    judge: the right verdict on each pair, in both orders. Reconstruction: the third, both orders, and
    the loss on the verdict alone."""
    tokenizer, (prompts, chosen, rejected) = models.tokenizer, columns(batch)
    some = prompts[: math.ceil(len(batch) / 3)]
    responses = encode_responses(tokenizer, some, chosen, args.max_new_tokens)
    questions = encode_questions(tokenizer, prompts * 2, chosen + rejected, rejected + chosen,
                                 context_length(models.policy) - 1)  # room for the verdict
    _, a, b = verdict_format(tokenizer)
    verdicts = [[a]] * len(batch) + [[b]] * len(batch)
    return {"respond": (encode_prompts(tokenizer, some), responses), "judge": (questions, verdicts)}


def supervised_backward(model, prompt_ids, target_ids, args):
    """Adds the gradient of one task's mean loss over all target tokens; returns that loss."""
    tokens, losses = sum(map(len, target_ids)), []
    order = sorted(range(len(prompt_ids)), key=lambda i: len(prompt_ids[i]))
    for part, weight in own_micro_batches(order, args.micro_batch_size):  # weight: 1 in one process
        with torch.autocast(model.device.type, torch.bfloat16, enabled=args.bf16):
            logps = token_logps(model, [prompt_ids[i] for i in part], [target_ids[i] for i in part])
        loss = -logps.sum() / tokens
        (weight * loss).backward()
        losses.append(loss.item() * bool(weight))
    return sum(collected(losses))


def supervised_finetune(models, pairs, args):
    """Makes the policy pi_SFT by (prompt, chosen, rejected)s and the sum of both tasks' losses."""
    start_training(models, args.sft_learning_rate, args.sft_max_steps, args)
    by_size = sorted(pairs, key=lambda pair: len(pair[1] + pair[2]))
    easy = by_size[: math.ceil(len(pairs) * EASY_ROWS)]
    for step, show in resumable_steps("sft-checkpoint", args.sft_max_steps, models, args):
        models.policy.train()
        allowed = easy if step < args.sft_max_steps * EASY_STEPS else by_size
        batch = [allowed[i] for i in step_indices(len(allowed), args.sft_batch_size, step, args.seed)]
        tasks = supervised_tasks(models, batch, args)
        losses = {task: supervised_backward(models.policy, *ids, args) for task, ids in tasks.items()}
        optimizer_step(models, sum(losses.values()), f"SFT step {step + 1}", args)
        show(", ".join(f"{task} {loss:.3f}" for task, loss in losses.items()))


# 6. Sample K responses a prompt from the current policy -------------------------------------------
SAMPLING_BATCH_SIZE = 128  # responses side by side: without activations more fit than in an update


def sampling_noise(seed, step, index, k, length):
    """(T,) uniform float64 that belong to (seed, step, prompt, k), not to the batch or the process."""
    return np.random.default_rng((seed, step, index, k)).random(length)


@torch.no_grad()
def sample(model, prompt_ids, noise, temperature, stop_ids):
    """N prompts and noise (N, T) -> N responses of at most T tokens, with the EOS where one was drawn.
    On-policy means the distribution itself: no top-k, no top-p, nothing of the generation_config. A
    token is the first whose cumulative probability exceeds its noise, so no row depends on its batch."""
    cache, logits, mask = prefill(model, prompt_ids)
    noise, stops = noise.to(model.device), torch.tensor(stop_ids, device=model.device)
    ended = torch.zeros_like(logits[:, 0], dtype=torch.bool)
    lengths, tokens = torch.zeros_like(ended, dtype=torch.long), []
    for uniform in noise.T:
        cdf = (logits.float() / temperature).softmax(-1).double().cumsum(-1)  # float64: V may be large
        token = torch.searchsorted(cdf, uniform[:, None] * cdf[:, -1:], right=True)
        tokens.append(token.clamp_(max=cdf.shape[1] - 1))
        lengths += ~ended
        ended |= torch.isin(token[:, 0], stops)
        if ended.all() or len(tokens) == noise.shape[1]:
            break
        mask = nn.functional.pad(mask, (0, 1), value=1)
        logits = forward(model, token, mask, 1, cache)[:, -1]
    return [ids[:length] for ids, length in zip(torch.cat(tokens, 1).tolist(), lengths.tolist())]


def respond(model, tokenizer, rows, ks, step, args, source="policy"):
    """Responses of `model` to each row, one for each number in `ks`, which picks its noise."""
    stops, ids = stop_token_ids(model, tokenizer), []
    prompts = encode_prompts(tokenizer, [row.prompt for row in rows])  # its tokenizer may be another
    asked = [(prompt, sampling_noise(args.seed, step, row.index, k, args.max_new_tokens))
             for row, prompt in zip(rows, prompts) for k in ks]
    with inference(model, args) as model:
        for part in chunks(asked, SAMPLING_BATCH_SIZE):
            some, noise = zip(*part)
            ids += sample(model, some, torch.tensor(np.array(noise)), args.temperature, stops)
    texts = tokenizer.batch_decode(ids, skip_special_tokens=True)
    return chunks([Candidate(one, text.strip(), source) for one, text in zip(ids, texts)], len(ks))


def sample_policy(models, rows, step, args):
    """OSP's candidates: K responses of the policy as it stands. Source: the paper's Figure 2."""
    return respond(models.policy, models.tokenizer, rows, range(args.num_generations), step, args)


# 7. Rank against one baseline, and pair -----------------------------------------------------------
def ranking_scores(models, rows, candidates, args):
    """Each prompt's candidates -> their scores 1 - Pr(A), where A is the prompt's first candidate and B
    the one that is scored, the first included. K questions, not K^2. Source: surveys of LLM judges
    describe OSP's ranking so. Reconstruction: the first is the baseline, since a response of the present
    policy stays comparable; only one order is asked, since a liking for A is much the same in all K."""
    texts = []
    for row, found in zip(rows, candidates):
        texts += [(row.prompt, found[0].text, candidate.text) for candidate in found]
    with inference(models.judge, args) as judge:
        p_a = verdict_probabilities(judge, models.tokenizer, *columns(texts), args.micro_batch_size)
    remaining = iter(p_a)
    return [[1 - next(remaining) for _ in found] for found in candidates]


def ranked_pairs(scores: Sequence[float]) -> list[tuple[int, int]]:
    """K scores of one prompt's responses -> K//2 pairs (better, worse): best with worst, then inwards.
    [0.5, 0.9, 0.1, 0.7] -> [(1, 2), (3, 0)]. An odd K leaves out the middle; ties keep their order.
    Source: the paper for K//2. Reconstruction: which; they range from a landslide to a near tie."""
    order = sorted(range(len(scores)), key=lambda k: -float(scores[k]))
    return [(order[i], order[-1 - i]) for i in range(len(order) // 2)]


# 8. Judge: the frozen SFT model says how strongly it prefers one response to another --------------
@torch.no_grad()
def verdict_probabilities(judge, tokenizer, prompts, shown_as_a, shown_as_b, micro_batch_size=8):
    """N questions -> Pr(A) of each: softmax over the logits of the two verdict tokens that may follow.
    Equal questions are asked once. The head that a prompt's questions share is computed once."""
    judge.eval()
    _, a, b = verdict_format(tokenizer)
    questions = encode_questions(tokenizer, prompts, shown_as_a, shown_as_b, context_length(judge))
    of_prompt, rows, p_a = {}, [], {}
    for prompt, ids in zip(prompts, questions):
        of_prompt.setdefault(transcript(prompt), set()).add(tuple(ids))
    for group in of_prompt.values():
        shared = len(os.path.commonprefix([ids[:-1] for ids in group]))  # leaves a tail of one or more
        rows += [(ids[:shared], ids[shared:]) for ids in group]
    for part in chunks(sorted(rows, key=lambda row: (len(row[0]), row)), micro_batch_size):
        heads, tails = zip(*part)
        cache, _, mask = prefill(judge, heads)
        ids, tail_mask = padded(tails, [[]] * len(part), judge.device)  # on the left: verdicts meet
        logits = forward(judge, ids, torch.cat([mask, tail_mask], 1), 1, cache)[:, -1, [a, b]]
        for (head, tail), p in zip(part, logits.float().softmax(-1)[:, 0].tolist()):
            p_a[head + tail] = p
    if any(map(math.isnan, p_a.values())):
        raise Stop("The judge's verdicts are not numbers: its weights or precision are broken.", code=1)
    return [p_a[tuple(ids)] for ids in questions]


def both_orders(judge, tokenizer, prompts, responses_1, responses_2, micro_batch_size=8):
    """P pairs of texts -> Pr(A) with response 1 as A, and Pr(A) with response 2 as A, (P,) each."""
    texts = prompts * 2, responses_1 + responses_2, responses_2 + responses_1
    p_a = verdict_probabilities(judge, tokenizer, *texts, micro_batch_size)
    return torch.tensor(p_a[: len(prompts)]), torch.tensor(p_a[len(prompts):])


def averaged_strength(p_12: Tensor, p_21: Tensor) -> Tensor:
    """(P,), (P,) -> (P,): the mean of both orders. In this form, brackets included, equal texts give
    exactly 1/2 in floating point. Reconstruction."""
    return (p_12 + (1 - p_21)) / 2


def preference_strength(model, tokenizer, prompts: list[Prompt], responses_1: list[str],
                        responses_2: list[str], micro_batch_size: int = 8) -> Tensor:
    """P pairs of texts -> (P,) strengths p(1 > 2) in [0, 1], where p(1 > 2) + p(2 > 1) = 1. Source: the
    paper for the probability of a verdict. Reconstruction: the average of both orders."""
    verdicts = both_orders(model, tokenizer, prompts, responses_1, responses_2, micro_batch_size)
    return averaged_strength(*verdicts)


def ask_judge(judge, tokenizer, texts, args):
    """both_orders of P (prompt, response 1, response 2)s."""
    with inference(judge, args) as judge:
        return both_orders(judge, tokenizer, *columns(texts), args.micro_batch_size)


def judge_pairs(models, pairs, args):
    """OSP's strengths: what the frozen judge says of each pair. Notes its two verdicts on the pair."""
    texts = [(pair.row.prompt, pair.better.text, pair.worse.text) for pair in pairs]
    p_12, p_21 = ask_judge(models.judge, models.tokenizer, texts, args)
    for pair, verdicts in zip(pairs, zip(p_12.tolist(), p_21.tolist())):
        pair.verdicts = verdicts
    return averaged_strength(p_12, p_21).tolist()


# 9. The SPCE loss ---------------------------------------------------------------------------------
def spce_loss(reward_1: Tensor, reward_2: Tensor, strength: Tensor) -> Tensor:
    """Soft-preference cross-entropy: rewards and strengths p(1 > 2), (P,) each -> losses (P,).

        h = r_1 - r_2,   L = -[ p log sigmoid(h) + (1 - p) log sigmoid(-h) ],   dL/dh = sigmoid(h) - p

    It is least at h = logit(p). p = 1 is DPO; p = 1 - eps is conservative DPO. Source: the paper for its
    name and purpose. Reconstruction: the formula, the cross-entropy between the judge's Bernoulli(p) and
    the policy's Bernoulli(sigmoid(h))."""
    h = reward_1 - reward_2
    return -(strength * nn.functional.logsigmoid(h) + (1 - strength) * nn.functional.logsigmoid(-h))


# 10. Update: one optimiser step on all parameters -------------------------------------------------
def start_training(models, learning_rate, steps, args):
    """AdamW over all parameters without weight decay, and a schedule of transformers by its name. The
    weights are fp32 even with --bf16, which would round small updates away."""
    weights, warmup, schedule = models.policy.parameters(), args.warmup_steps, args.lr_scheduler_type
    if warmup < 1:
        warmup = math.ceil(warmup * steps)
    models.optimizer = torch.optim.AdamW(weights, lr=learning_rate, betas=(0.9, 0.95), weight_decay=0.0)
    models.scheduler = transformers.get_scheduler(schedule, models.optimizer, int(warmup), steps)


def optimizer_step(models, loss, where, args):
    """Clips, steps, forgets the gradients; returns their norm before clipping. Raises Stop on NaN."""
    weights = models.policy.parameters()
    grad_norm = nn.utils.clip_grad_norm_(weights, args.max_grad_norm).item()
    if not (math.isfinite(loss) and math.isfinite(grad_norm)):
        raise Stop(f"{where}: the loss is {loss}, the gradient norm {grad_norm}, so no step was made: "
                   "start again with a lower learning rate.", code=1)
    models.optimizer.step()
    models.scheduler.step()
    models.optimizer.zero_grad()
    return grad_norm


def step_indices(n, size, step, seed):
    """The numbers of a step's rows. Each epoch has a new order; its last step may be smaller. They are a
    function of the step alone, so a resumed run needs no saved position in the data."""
    epoch, position = divmod(step, math.ceil(n / size))
    order = np.random.default_rng((seed, epoch)).permutation(n)
    return order[position * size : (position + 1) * size].tolist()


def prompts_and_responses(pairs):
    """P pairs -> N = 2P prompts and responses as ids: all the better ones, then all the worse ones."""
    prompts = [pair.row.ids for pair in pairs]
    return prompts * 2, [pair.better.ids for pair in pairs] + [pair.worse.ids for pair in pairs]


def update(models, pairs, method, step, args):
    """One optimiser step on the mean loss over all P pairs. Notes on each pair what it saw."""
    policy, seen = models.policy.train(), []
    for part, weight in own_micro_batches(pairs, max(1, args.micro_batch_size // 2)):
        strength = torch.tensor([pair.strength for pair in part], device=policy.device)
        ref_logps = torch.tensor([pair.ref_logps for pair in part], device=policy.device).T
        with torch.autocast(policy.device.type, torch.bfloat16, enabled=args.bf16):
            logps = response_logps(policy, *prompts_and_responses(part), micro_batch_size=2 * len(part))
        reward_1, reward_2 = args.beta * (logps.reshape(2, -1) - ref_logps)
        losses = method.loss(reward_1, reward_2, strength)
        (weight * losses.sum() / len(pairs)).backward()
        if weight:
            seen.append(torch.stack([losses, reward_1, reward_2], 1).tolist())
    for pair, pair_seen in zip(pairs, sum(collected(seen), [])):  # of all processes, in order
        pair.seen = pair_seen
    loss, rate = sum(pair.seen[0] for pair in pairs) / len(pairs), models.scheduler.get_last_lr()[0]
    return {"learning_rate": rate, "grad_norm": optimizer_step(models, loss, f"step {step + 1}", args)}


# 11. One step, the whole run, and the table of stages ---------------------------------------------
def make_pairs(models, rows, method, step, args, seconds):
    """A step before its update: each row's candidates, and all pairs; those to drop have no strength."""
    rows = own_share(rows)
    with timed(seconds, "sample"):
        candidates = method.sample(models, rows, step, args)
    with timed(seconds, "rank"):
        scores = method.score(models, rows, candidates, args)
    pairs = []
    for row, found, row_scores in zip(rows, candidates, scores):
        for candidate, score in zip(found, row_scores):
            candidate.score = score
        pairs.append([Pair(row, found[i], found[j]) for i, j in method.pair(row_scores)])
    with timed(seconds, "judge"):
        different = [pair for pair in sum(pairs, []) if pair.better.ids != pair.worse.ids]
        for pair, strength in zip(different, method.strength(models, different, args)):
            pair.strength = strength
    with timed(seconds, "reference"):
        logps = frozen_logps(models.reference, *prompts_and_responses(different), args)
        for pair, pair_logps in zip(different, logps.reshape(2, -1).T.tolist()):
            pair.ref_logps = pair_logps
    return collected(candidates), sum(collected(pairs), [])


def train_step(models, rows, method, step, args):
    """One step of the paper's Figure 2. Returns its line of metrics.jsonl, the candidates, the pairs."""
    seconds, figures = {}, {}
    candidates, pairs = make_pairs(models, rows, method, step, args, seconds)
    kept = [pair for pair in pairs if pair.strength is not None]
    if kept:
        with timed(seconds, "update"):
            figures = update(models, kept, method, step, args)
    method.after_step(models, step, args)
    metrics = {"step": step + 1} | step_figures(models, candidates, pairs, method, args)
    metrics |= figures | seconds
    tokens = metrics["response_tokens"] * sum(map(len, candidates))
    return metrics | {"tokens_per_second": tokens / sum(seconds.values())}, candidates, pairs


def train(models, data, method, args, seconds):
    """Online training: each step samples from the policy that the last one left. Returns the summary."""
    steps = args.num_train_epochs * math.ceil(len(data.rows) / args.prompts_per_step)
    if args.max_steps >= 0:
        steps = min(steps, args.max_steps)
    start_training(models, args.learning_rate, steps, args)
    add_responses(models, "start", 0, data.held_out + data.ood, args)
    evaluation = None
    with timed(seconds, "train"):
        for step, show in resumable_steps("checkpoint", steps, models, args):
            indices = step_indices(len(data.rows), args.prompts_per_step, step, args.seed)
            rows = [data.rows[i] for i in indices]
            metrics, candidates, pairs = train_step(models, rows, method, step, args)
            if (step + 1) % args.eval_steps == 0 or step + 1 == steps:
                evaluation = evaluate(models, data.held_out, data.gold, args)
                metrics |= {f"eval_{name}": value for name, value in evaluation.items()}
            if step in (0, steps // 2, steps - 1):
                write_samples(step + 1, rows, candidates, pairs, args)
            log_step(metrics, show, args)
    with writing(args.output_dir):
        save_model(models, args.output_dir)
    evaluation = evaluation or evaluate(models, data.held_out, data.gold, args)
    return report(evaluation | seconds, models, data, args)


@dataclasses.dataclass(frozen=True)
class Method:
    """The stages; the defaults are OSP. A variant replaces some, as in Method(loss=...)."""
    sample: Callable = sample_policy  # models, rows, step, args -> candidates of each row
    score: Callable = ranking_scores  # models, rows, candidates, args -> scores of each row's candidates
    pair: Callable = ranked_pairs  # scores of one row -> pairs of indices (better, worse)
    strength: Callable = judge_pairs  # models, pairs, args -> strength of each pair; None drops it
    loss: Callable = spce_loss  # reward_1, reward_2, strength, (P,) each -> losses (P,)
    figures: Callable = lambda pairs, reward_1, reward_2: {}  # what else to log of a step
    after_step: Callable = lambda models, step, args: None
    moves_reference: bool = False  # whether after_step does; the reference is then a model of its own
    others: Sequence = ()  # (model, tokenizer)s of its own, which must be able to read the prompts
    run: Callable = train  # what is done with the models


METHODS = {"osp": lambda args: Method()}  # name -> what makes it from the arguments


def main(argv: list[str] | None = None) -> dict:
    """Runs a method by the command line; returns the figures of summary.json. Raises Stop."""
    seconds = {"seconds_sft": 0.0}
    start_process()
    args = parse_arguments(argv)
    path, resumed = open_run(args)
    policy, tokenizer = load_model(path, args)
    others = [frozen(args.eval_judge_name_or_path, args)] if args.eval_judge_name_or_path else []
    method = METHODS[args.method](args)
    data = load_data([(policy, tokenizer), *others, *method.others], args)
    begin_run(resumed, args)  # all input was checked: from here on files are written

    models = Models(tokenizer, placed(policy, args))
    if data.sft_pairs and path == args.model_name_or_path:  # else SFT was done before
        with timed(seconds, "sft"):
            supervised_finetune(models, data.sft_pairs, args)
            path = save_sft(models, args)
    models.start, _ = frozen(path, args)  # pi_SFT
    models.judge = models.reference = models.start
    if method.moves_reference:
        models.reference, _ = frozen(path, args)
    models.eval_judge = others[0] if others else (models.start, tokenizer)
    return method.run(models, data, method, args, seconds)


# Part II: what makes it practical. A reader of the method may stop here. ==========================
# 12. The command line -----------------------------------------------------------------------------
BUILTIN = {
    "max_new_tokens": 16, "micro_batch_size": 96, "sft_learning_rate": 3e-3, "sft_batch_size": 48,
    "sft_max_steps": 800, "learning_rate": 1e-3, "num_train_epochs": 9, "eval_steps": 13,
    "reference_steps": 39}
LEAST = {"max_steps": -1, "seed": 0, "warmup_steps": 0, "sft_max_steps": 0, "num_generations": 2}


def parse_arguments(argv):
    """The command line as Arguments, checked. Raises Stop."""
    own = "".join(f" --{name} {value}" for name, value in BUILTIN.items())
    own = "Defaults of the built-in task:" + own
    parser = transformers.HfArgumentParser(Arguments, allow_abbrev=False, epilog=own)
    helps = dict(re.findall(r"^    (\w+): .*  # (.+)", inspect.getsource(Arguments), re.M))
    for action in parser._actions:
        action.help = helps.get(action.dest, action.help)
    parser.error = refuse
    parser._option_string_actions["--method"].choices = METHODS
    parser._negative_number_matcher = re.compile(r"-[\d.]")  # else -1e-5 passes for an option
    if parser.parse_known_args(argv)[0].model_name_or_path is None:
        parser.set_defaults(**BUILTIN)
    values, unknown = parser.parse_known_args(argv)
    if unknown:
        near = difflib.get_close_matches(unknown[0], ["--" + name for name in vars(values)], 1, 0)
        refuse(f"{unknown[0]} is no argument; the nearest one is {near[0]}")
    args = Arguments(**vars(values))
    for name, value in vars(args).items():
        bound = f"at least {LEAST[name]}" if name in LEAST else "above 0"
        if type(value) in (int, float) and not LEAST.get(name, 1e-12) <= value < 2**32:
            refuse(f"--{name} is {value}: it must be {bound}, and below 2**32")
    if args.dataset_name and not args.model_name_or_path:
        refuse("--dataset_name needs --model_name_or_path: the built-in model knows no other words")
    try:
        args.chat_template_kwargs = dict(json.loads(args.chat_template_kwargs))
    except (ValueError, TypeError) as error:
        refuse(f"--chat_template_kwargs is no JSON object ({cause(error)}): write it as in --help")
    if args.output_dir is None:
        model, data = Path(args.model_name_or_path or "builtin").name, Path(args.dataset_name or "").name
        names = [model, data, args.dataset_config, args.dataset_data_dir, args.method.replace("osp", "")]
        args.output_dir = f"runs/{'-'.join(filter(None, names)).replace('/', '-')}-seed{args.seed}"
    args.output_dir = Path(args.output_dir)
    return args


def refuse(sentence):
    """Raises Stop, for a mistake that shows before the first step."""
    raise Stop(sentence + ".")


def cause(error):
    """The first line of a library's message, for a sentence of ours."""
    return (str(error).strip() or type(error).__name__).splitlines()[0][:300].rstrip(".")


# 13. Evaluate and report --------------------------------------------------------------------------
EVALUATION = 2**31  # the "step" under which evaluation draws its noise; no training step reaches it
REPORT = (
    "gold_reward win_rate_vs_sft win_rate_vs_sft_se ood_win_rate_vs_sft kl response_tokens cut_fraction "
    "distinct_fraction judge_accuracy judge_calibration_error judge_ece order_agreement").split()


def means(**columns):
    """The mean of each column; those without values are left out."""
    return {name: float(np.mean(np.asarray(values))) for name, values in columns.items() if len(values)}


def described(models, responses):
    """What responses are like; `cut_fraction` is the share that --max_new_tokens cut off."""
    stops, ids = stop_token_ids(models.policy, models.tokenizer), [tuple(one.ids) for one in responses]
    return means(response_tokens=[*map(len, ids)], cut_fraction=[one[-1] not in stops for one in ids],
                 distinct_fraction=[len(set(ids)) / len(ids)])


def add_responses(models, role, k, rows, args):
    """Notes on each row the response of this role, "start" or "policy", for evaluation to compare."""
    found = respond(getattr(models, role), models.tokenizer, own_share(rows), [k], EVALUATION, args)
    for row, [response] in zip(rows, collected(found)):
        setattr(row, role, response)


def evaluate(models, rows, gold, args):
    """The policy against pi_SFT, one response to each row; the README says what the figures are."""
    add_responses(models, "policy", 1, rows, args)
    own, golds = own_share(rows), []
    ids = [row.ids for row in own], [row.policy.ids for row in own]
    kl = frozen_logps(models.policy, *ids, args) - frozen_logps(models.start, *ids, args)
    texts = [(row.prompt, row.policy.text, row.start.text) for row in own]
    if gold:
        golds = [gold(prompt, ours) for prompt, ours, _ in texts]
        wins = [(1 + np.sign(true_strength(*text) - 0.5)) / 2 for text in texts]
    else:
        wins = averaged_strength(*ask_judge(*models.eval_judge, texts, args)).tolist()
    kl, wins, golds = map(collected, (kl.tolist(), wins, golds))
    figures = means(win_rate_vs_sft=wins, kl=kl, gold_reward=golds)
    figures |= described(models, [row.policy for row in rows])
    return figures | {"win_rate_vs_sft_se": np.std(wins) / math.sqrt(len(wins))}


def judge_figures(models, texts, gold, args):
    """The judge on (prompt, chosen, rejected)s: against the truth if it is known, else the labels."""
    verdicts = ask_judge(models.judge, models.tokenizer, own_share(texts), args)
    p_12, p_21 = [torch.tensor(collected(p_a.tolist())) for p_a in verdicts]
    truth = torch.tensor([true_strength(*text) for text in texts]) if gold else None
    return verdict_figures(p_12, p_21, truth) | {"judge_pairs": len(texts)}


def verdict_figures(p_12, p_21, truth=None):
    """Both orders' Pr(A) of (chosen, rejected)s, and the true strengths if they are known, (P,) each
    -> the judge's figures."""
    strength = averaged_strength(p_12, p_21)
    figures = means(order_agreement=orders_agree(p_12, p_21))
    if truth is None:
        right, confidence = same_side(strength, torch.ones(())), torch.maximum(strength, 1 - strength)
        figures["judge_ece"] = expected_calibration_error(confidence, right)
    else:
        right = same_side(strength, truth)[truth != 0.5]
        figures |= means(judge_calibration_error=(strength - truth).abs())
    return figures | means(judge_accuracy=right)


def orders_agree(p_12, p_21):
    """1 where both orders name one winner, 0 where not; pairs of equal verdicts are left out."""
    return same_side(p_12, 1 - p_21)[p_12 != p_21]


def same_side(one, two):
    """(P,), (P,) -> (P,): 1 where both are on one side of 1/2, 0 where not, 1/2 where one is a tie."""
    return (1 + (one - 0.5).sign() * (two - 0.5).sign()) / 2


def expected_calibration_error(confidence, right, bins=10):
    """(P,) confidences in [1/2, 1], and whether each was right -> the mean gap over bins, by size."""
    which = ((confidence - 0.5) * 2 * bins).long().clamp(max=bins - 1)
    return which.bincount(confidence - right).abs().sum().item() / len(confidence)


def step_figures(models, candidates, pairs, method, args):
    """What a step sampled, paired, and saw before its update."""
    kept = [pair for pair in pairs if pair.strength is not None]
    identical = sum(pair.better.ids == pair.worse.ids for pair in pairs)
    p_12, p_21 = torch.tensor([pair.verdicts for pair in pairs if pair.verdicts]).reshape(-1, 2).T
    figures = means(order_agreement=orders_agree(p_12, p_21))
    figures |= described(models, sum(candidates, []))
    figures |= {"pairs": len(kept), "dropped_identical_pairs": identical,
                "dropped_unsure_pairs": len(pairs) - len(kept) - identical}
    if kept:
        losses, reward_1, reward_2 = torch.tensor([pair.seen for pair in kept]).T
        strength, margin = torch.tensor([pair.strength for pair in kept]), reward_1 - reward_2
        agree = same_side(torch.sigmoid(margin), strength)
        figures |= means(loss=losses, strength_mean=strength, margin=margin, margin_accuracy=agree,
                         kl=(reward_1 + reward_2) / 2 / args.beta)
        figures["strength_std"] = strength.std(correction=0).item()
        figures |= method.figures(kept, reward_1, reward_2)
    return figures


@contextmanager
def timed(seconds, stage):
    """Adds the wall time of a block to seconds["seconds_" + stage]."""
    start = time.perf_counter()
    yield
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    seconds["seconds_" + stage] = seconds.get("seconds_" + stage, 0.0) + time.perf_counter() - start


def log_step(metrics, show, args):
    """Adds a step's line to metrics.jsonl, and shows the figures that matter on the progress bar."""
    path = args.output_dir / "metrics.jsonl"
    if RANK == 0:
        with writing(path), path.open("a") as file:
            file.write(json.dumps(metrics, allow_nan=False) + "\n")
    text = "loss {loss:.3f}, strength {strength_mean:.2f}, margin {margin:.2f}, KL {kl:.2f}"
    show(text.format(**metrics) if metrics["pairs"] else "no pair was left, so no update was made")


def write_samples(step, rows, candidates, pairs, args):
    """Adds a step's first three prompts to samples.md; what a broken run wrote of it and later goes."""
    path, heading = args.output_dir / "samples.md", f"\n## Step {step}\n"
    text = path.read_text("utf-8") if path.exists() else "# Samples\n"
    text = text.partition(heading)[0] + heading
    for row, found in list(zip(rows, candidates))[:3]:
        text += f"\n{quoted(transcript(row.prompt))}\n\n"
        for one in sorted(found, key=lambda one: -one.score):
            text += f"* score {one.score:.3f}: {' '.join(one.text.split())}\n"
        strengths = [pair.strength for pair in pairs if pair.row.index == row.index]
        strengths = ["dropped" if p is None else f"{p:.3f}" for p in strengths]
        text += f"\nStrengths, from best over worst inwards: {', '.join(strengths)}\n"
    write_text(path, text)


def draw_curves(lines, path):
    """The lines of metrics.jsonl -> curves.png."""
    from matplotlib.figure import Figure  # here, since it takes a second to load
    names = "eval_win_rate_vs_sft eval_gold_reward eval_kl strength_mean margin response_tokens".split()
    figure = Figure(figsize=(11, 6), layout="constrained")
    for axes, name in zip(figure.subplots(2, 3).flat, names):
        points = [(one["step"], one[name], one.get(name + "_se", 0.0)) for one in lines if name in one]
        axes.errorbar(*columns(points), marker=".")
        axes.set(title=name.replace("_", " "), xlabel="step")
        if "rate" in name or "strength" in name:
            axes.set(ylim=(0, 1))
    with written_whole(path) as scratch:
        figure.savefig(scratch, format="png", dpi=110)


def report(summary, models, data, args):
    """Measures what is measured once; writes curves.png, summary.json, a model card; prints a table."""
    output, method = args.output_dir, args.method.upper()
    for name, value in described(models, [row.start for row in data.held_out]).items():
        summary[name + "_sft"] = value
    if data.held_out_pairs:
        summary |= judge_figures(models, data.held_out_pairs, data.gold, args)
    if data.gold:
        golds = [data.gold(row.prompt, row.start.text) for row in data.held_out]
        ood = evaluate(models, data.ood, data.gold, args)
        ood |= judge_figures(models, data.ood_pairs, data.gold, args)
        summary["gold_reward_sft"] = np.mean(golds)
        summary |= {"ood_" + name: value for name, value in ood.items()}
    lines = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    for line in lines:
        if line["pairs"]:
            summary |= {"margin": line["margin"], "margin_accuracy": line["margin_accuracy"]}
    summary |= {"held_out_prompts": len(data.held_out), "prompts": len(data.rows), "steps": len(lines),
                "seed": args.seed, "self_judged": not (data.gold or args.eval_judge_name_or_path)}
    table = report_table(summary, method)
    print("\n" + table)
    for row in data.held_out[:3]:
        print(f"{transcript(row.prompt)}\n  SFT: {row.start.text}\n  {method}: {row.policy.text}\n")
    print("{seconds_sft:.0f} s SFT, {seconds_train:.0f} s training. The model, metrics.jsonl, "
          "summary.json, curves.png and samples.md are in".format(**summary), output)
    if RANK == 0:
        draw_curves(lines, output / "curves.png")
    model, task = args.model_name_or_path or "A random model", args.dataset_name or "the built-in task"
    card = f"{model} after {method} of osp.py with {task}, seed {args.seed}.\n\n```\n{table}```\n"
    write_text(output / "README.md", f"# {output.name}\n\n{card}")
    write_text(output / "summary.json", json.dumps(summary, indent=2, allow_nan=False) + "\n")
    return summary


def report_table(summary, method):
    """SFT against the policy, and warnings where the figures may mean nothing."""
    table = f"{'':32}{'SFT':>9} {method:>8}\n"
    for name in REPORT:
        if name in summary:
            of_sft = f"{summary[name + '_sft']:.3f}" if name + "_sft" in summary else ""
            table += f"{name:32}{of_sft:>9}{summary[name]:9.3f}\n"
    table += "{held_out_prompts} held-out prompts; wins self-judged: {self_judged}\n".format(**summary)
    chance = 0.5 + 1 / math.sqrt(summary.get("judge_pairs", 1))  # two standard errors above 1/2
    if summary.get("judge_accuracy", 1.0) < chance:
        table += "Warning: the judge is no better than chance. Take more SFT, pairs, or another model.\n"
    if summary.get("order_agreement", 1.0) < 2 / 3:
        table += "Warning: the judge's two orders disagree: it goes by position. Take a better judge.\n"
    if summary["cut_fraction"] > 0.5:
        table += "Warning: over half of the responses were cut off. Raise --max_new_tokens.\n"
    return table


# 14. Save and resume ------------------------------------------------------------------------------
FULL = dcp.StateDictOptions(full_state_dict=True, cpu_offload=True)  # whole tensors, on process 0's CPU
RUN_FILES = (
    "metrics.jsonl samples.md curves.png summary.json README.md sft questions.json answers.json "
    "preferences.jsonl config.json generation_config.json model* tokenizer* chat_template*").split()
MAY_CHANGE = "output_dir overwrite_output_dir resume_from_checkpoint save_steps save_total_limit".split()


def open_run(args):
    """The start model, and whether the run of --output_dir goes on. Raises Stop; writes nothing."""
    output, start = args.output_dir, args.model_name_or_path
    goes_on = args.resume_from_checkpoint or args.method == "collect" and not args.overwrite_output_dir
    is_ours = (output / "arguments.json").exists()
    unfinished = is_ours and not (output / "summary.json").exists()
    for name in filter(os.path.exists, filter(None, (start, args.dataset_name))):
        folders = [output.resolve(), Path(name).resolve()]
        if Path(os.path.commonpath(folders)) in folders:
            refuse(f"--output_dir {output} and {name} lie in one another: give another --output_dir")
    if goes_on and unfinished:
        then = json.loads((output / "arguments.json").read_text())
        changed = [f"{name} was {then.get(name)!r}, is {value!r}" for name, value in vars(args).items()
                   if name not in MAY_CHANGE and then.get(name) != value]
        if changed:
            refuse(f"{output} holds a run with other arguments ({'; '.join(changed)}): "
                   "give the same, or another --output_dir")
        return str(output / "sft") if (output / "sft").exists() else start, True
    if output.is_dir() and any(output.iterdir()) and not (is_ours and args.overwrite_output_dir):
        ways = "give another --output_dir"
        if is_ours:
            ways += ", or replace it with --overwrite_output_dir"
        if unfinished:
            ways += ", or go on with it with --resume_from_checkpoint latest"
        refuse(f"{output} already holds {'a run' if is_ours else 'other files'}: {ways}")
    return start, False


def begin_run(resumed, args):
    """Removes what will be done again: what came after the newest checkpoint, or a whole older run."""
    collected([])  # waits: none may write before all have looked
    old = list(args.output_dir.glob(".*.partial"))
    if not resumed:
        for name in RUN_FILES:
            old += args.output_dir.glob(name)
        old += checkpoints(args, "checkpoint") + checkpoints(args, "sft-checkpoint")
    for path in old:
        remove(path)
    write_text(args.output_dir / "arguments.json", json.dumps(vars(args), indent=2, default=str))
    metrics = args.output_dir / "metrics.jsonl"
    lines = metrics.read_text().splitlines(keepends=True) if metrics.exists() else []
    done = max([int(path.name.split("-")[1]) for path in checkpoints(args, "checkpoint")], default=0)
    write_text(metrics, "".join(lines[:done]))
    collected([])


def checkpoints(args, name):
    """The folders <name>-<step> of the run, oldest first."""
    steps = [path.name.removeprefix(name + "-") for path in args.output_dir.glob(name + "-*")]
    return [args.output_dir / f"{name}-{step}" for step in sorted(filter(str.isdigit, steps), key=int)]


@contextmanager
def writing(path):
    """Raises Stop where what the block writes to `path` cannot be written."""
    try:
        yield
    except (OSError, RuntimeError, ValueError, SafetensorError) as error:  # ValueError: NaN in JSON
        raise Stop(f"Cannot write {str(path)!r} ({cause(error)}): make room and go on with "
                   "--resume_from_checkpoint latest, or give another --output_dir.", code=1) from error


@contextmanager
def written_whole(path):
    """Yields a scratch path, which then becomes `path` in one move, never half of it. Raises Stop."""
    scratch = path.with_name(f".{path.name}.partial")
    try:
        with writing(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            yield scratch
            if RANK == 0:
                os.replace(scratch, path)
    finally:
        remove(scratch)


def write_text(path, text):
    """A text file, written whole."""
    with written_whole(path) as scratch:
        if RANK == 0:
            scratch.write_text(text, "utf-8")


def remove(path):
    """Removes a file or a folder, if there is one."""
    if RANK == 0 and path.is_dir():
        shutil.rmtree(path)
    elif RANK == 0 and path.exists():
        path.unlink()


def save_model(models, folder):
    """The policy and its tokenizer for plain from_pretrained. All processes must call it."""
    weights = dcp.get_model_state_dict(models.policy, options=FULL)
    if RANK == 0:
        for name in models.policy.all_tied_weights_keys:
            del weights[name]
        models.policy.save_pretrained(folder, state_dict=weights)
        models.tokenizer.save_pretrained(folder)


def save_sft(models, args):
    """Writes pi_SFT into the run's folder `sft`, and returns that folder."""
    folder = args.output_dir / "sft"
    with written_whole(folder) as scratch:
        save_model(models, scratch)
    for path in checkpoints(args, "sft-checkpoint"):
        remove(path)
    collected([])  # waits for the files
    return str(folder)


def save_checkpoint(models, path, step):
    """All that an exact resume needs; samples and order of the data are functions of (seed, step)."""
    state = {"step": step, "scheduler": models.scheduler.state_dict()}
    if models.optimizer.state:  # else there was no update yet
        state["optimizer"] = dcp.get_optimizer_state_dict(models.policy, models.optimizer, options=FULL)
    if models.reference is not models.start:
        state["reference"] = dcp.get_model_state_dict(models.reference, options=FULL)
    with written_whole(path) as scratch:
        save_model(models, scratch)
        if RANK == 0:
            torch.save(state, scratch / "training_state.pt")


def load_checkpoint(models, found, args):
    """All as it was at the newest of these checkpoints; returns the steps done. Raises Stop."""
    path, older = found[-1], ", ".join(one.name for one in found[:-1]) or "none"
    try:
        weights = load_model(str(path), args)[0].state_dict()
        state = torch.load(path / "training_state.pt", map_location="cpu", weights_only=True)
    except Exception as error:
        refuse(f"The checkpoint {str(path)!r} is damaged ({cause(error)}): delete it, and the same "
               f"command goes on from the newest older one ({older})")
    dcp.set_model_state_dict(models.policy, weights, options=FULL)
    if "optimizer" in state:
        dcp.set_optimizer_state_dict(models.policy, models.optimizer, state["optimizer"], options=FULL)
    if "reference" in state:
        dcp.set_model_state_dict(models.reference, state["reference"], options=FULL)
    models.scheduler.load_state_dict(state["scheduler"])
    return state["step"]


def resumable_steps(name, steps, models, args):
    """The steps that are left, each with a function that shows a text on the progress bar. A checkpoint
    follows if one is due, or if any process got Ctrl-C or SIGTERM, which ends the run. Raises Stop."""
    def notice(number, _):
        """Meets a signal: the first one is remembered, another one quits."""
        if signals:
            raise KeyboardInterrupt
        signals.append(number)
        os.write(2, b"\nosp: saving a checkpoint after this step; once more quits at once\n")

    signals, found = [], checkpoints(args, name)
    done = load_checkpoint(models, found, args) if found else 0
    title = name.replace("checkpoint", "step")
    bar = tqdm(range(done, steps), title, steps, initial=done, disable=RANK > 0)
    limit = args.save_total_limit if name == "checkpoint" else 2
    before = {number: signal.signal(number, notice) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        for step in bar:
            yield step, bar.set_postfix_str
            interrupted = any(collected([bool(signals)]))
            if interrupted or (step + 1) % args.save_steps == 0 and step + 1 < steps:
                save_checkpoint(models, args.output_dir / f"{name}-{step + 1}", step + 1)
                for old in checkpoints(args, name)[: -limit if limit else 0]:
                    remove(old)
            if interrupted:
                raise Stop(f"interrupted; {name}-{step + 1} is saved: the same command with "
                           "--resume_from_checkpoint latest goes on from there.", code=130)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


# 15. Several processes ----------------------------------------------------------------------------
# Each makes the pairs of its own prompts. All then get all pairs, and divide the update among them.
RANK, WORLD = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))  # torchrun sets them


def start_process():
    """Joins the processes that torchrun started, if it did; the first of them alone prints."""
    transformers.utils.logging.disable_progress_bar()  # its bars for reading and writing weights
    if WORLD > 1 and not dist.is_initialized():
        dist.init_process_group("cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo")
        if torch.cuda.is_available():
            if int(os.environ["LOCAL_WORLD_SIZE"]) > torch.cuda.device_count():
                refuse("There are more processes than GPUs: give torchrun a smaller --nproc_per_node")
            torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    if RANK > 0:
        sys.stdout = open(os.devnull, "w")
        datasets.disable_progress_bars()
        transformers.utils.logging.set_verbosity_error()


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


def own_micro_batches(items, size):
    """The micro-batches, of at most `size` items, of this process, and the weights of their losses. FSDP
    averages gradients where the loss wants their sum, hence WORLD. All processes make equally many
    sharded passes: one that has fewer batches repeats one with weight 0."""
    parts = chunks(items, max(1, min(size, math.ceil(len(items) / WORLD))))
    turns = range(RANK, math.ceil(len(parts) / WORLD) * WORLD, WORLD)
    return [(parts[i % len(parts)], float(WORLD * (i < len(parts)))) for i in turns]


def placed(model, args):
    """A model on its device; several processes divide its weights, gradients and optimiser state."""
    if args.gradient_checkpointing:
        model.activation_checkpointing_enable()
    if WORLD == 1:
        return model.to("cuda" if torch.cuda.is_available() else "cpu")
    mixed = MixedPrecisionPolicy(torch.bfloat16 if args.bf16 else None, torch.float32)
    layers = [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]
    for module in [*layers, model]:
        fully_shard(module, mp_policy=mixed)
    return model


def frozen(name, args):
    """A judge that is not trained, and its tokenizer; with --bf16 in bf16. Raises Stop."""
    model, tokenizer = load_model(name, args, torch.bfloat16 if args.bf16 else torch.float32)
    verdict_format(tokenizer)
    return placed(model.requires_grad_(False), args), tokenizer


@contextmanager
def inference(model, args):
    """A model for passes without gradients: whole in each process, and with --bf16 in bf16, for decoding
    reads every weight for every token, and autocast would cast them anew each time."""
    units = [module for module in model.modules() if isinstance(module, FSDPModule)]
    for unit in units:
        unit.unshard()
        unit.set_reshard_after_forward(False, recurse=False)
    with torch.no_grad():
        yield model.eval() if units or not args.bf16 else bf16_copy(model)
    for unit in units:
        unit.set_reshard_after_forward(True, recurse=False)
        unit.reshard()


def bf16_copy(model):
    """A frozen copy in bf16, made without one in fp32; buffers, as rotary frequencies, stay fp32."""
    if model.dtype == torch.bfloat16:
        return model
    copies = {id(one): nn.Parameter(one.detach().bfloat16(), False) for one in model.parameters()}
    return copy.deepcopy(model, copies).eval()


def frozen_logps(model, prompt_ids, response_ids, args):
    """response_logps without gradients."""
    with inference(model, args) as model:
        return response_logps(model, prompt_ids, response_ids, micro_batch_size=args.micro_batch_size)


# 16. Details of models, batches and texts ---------------------------------------------------------
HH_TURN = re.compile(r"\n\n(Human|Assistant):")


def checked_model(model, tokenizer, name):
    """The model without dropout, so that pi_theta and pi_SFT are one function at first. Raises Stop for
    what is no causal language model, and for a tokenizer that does not fit."""
    embedded = model.get_input_embeddings().num_embeddings
    if tokenizer.eos_token_id is None:
        refuse(f"The tokenizer of {name!r} has no EOS token, so no response ends: set its eos_token")
    if len(tokenizer) > embedded:
        refuse(f"{name!r} has a tokenizer of {len(tokenizer)} tokens, but embeds only {embedded}")
    with torch.no_grad():
        one, two = model(input_ids=torch.tensor([[1, 2], [1, 3]])).logits[:, 0]
    if not torch.allclose(one, two, atol=1e-4):
        refuse(f"{name!r} is not a causal language model: its first position sees the second token")
    for module in model.modules():
        for key, value in vars(module).items():
            is_rate = "drop" in key or key == "p" and isinstance(module, nn.Dropout)
            if is_rate and isinstance(value, float):
                setattr(module, key, 0.0)
    return model


def stop_token_ids(model, tokenizer):
    """The ids that end a response: the tokenizer's EOS and those of the model's generation_config."""
    more = np.ravel(model.generation_config.eos_token_id).tolist()  # one id, a list, or None
    return sorted({tokenizer.eos_token_id, *more} - {None})


def context_length(model):
    """How many positions the model knows; unlimited where its configuration names no limit."""
    return getattr(model.config, "max_position_embeddings", None) or sys.maxsize


def chunks(items, size):
    """Consecutive slices of at most `size` items."""
    return [items[i : i + size] for i in range(0, len(items), size)]


def columns(rows):
    """Rows of three -> their three columns, empty where there are no rows."""
    return [[row[i] for row in rows] for i in range(3)]


def as_messages(prompt):
    """"\\n\\nHuman: hi\\n\\nAssistant:" -> [{"role": "user", "content": "hi"}]; other: one message."""
    if not isinstance(prompt, str):
        return prompt
    if not HH_TURN.match(prompt):
        return [{"role": "user", "content": prompt}]
    parts = HH_TURN.split(prompt.rstrip().removesuffix("\n\nAssistant:"))[1:]  # who, text, who, ...
    roles = ["user" if who == "Human" else "assistant" for who in parts[::2]]
    return [{"role": role, "content": text.strip()} for role, text in zip(roles, parts[1::2])]


def transcript(prompt):
    """A prompt as HH writes it: "Human: hi\\n\\nAssistant: hello\\n\\nHuman: and now?"."""
    names = {"user": "Human", "assistant": "Assistant", "system": "System"}
    turns = [f"{names.get(one['role'], one['role'])}: {one['content']}" for one in as_messages(prompt)]
    return "\n\n".join(turns)


@functools.lru_cache(maxsize=4)
def special_tokens(tokenizer):
    """The texts of the special tokens."""
    tokens = tokenizer.added_tokens_decoder.values()
    return [one.content for one in tokens if one.special and len(one.content) > 1]


def plain(tokenizer, text):
    """Text from outside, with a space put into what spells a special token, so that it becomes none."""
    for special in special_tokens(tokenizer):
        text = text.replace(special, special[0] + " " + special[1:])
    return text


# 17. Data -----------------------------------------------------------------------------------------
COLUMNS = set("prompt question system chosen rejected info summaries choice".split())  # that are read


# What a run trains and is measured on. The pairs are (prompt, chosen, rejected)s, the others Rows, whose
# prompts are disjoint. The built-in task alone has out-of-domain ones, and gold: the true reward.
Data = namedtuple("Data", "sft_pairs rows held_out held_out_pairs ood ood_pairs gold")


def load_data(readers, args):
    """The Data of this run: rows that all these (model, tokenizer)s can read. The first is the policy's.
    Raises Stop."""
    builtin, held_out_prompts, tokenizer = args.dataset_name is None, set(), readers[0][1]
    limit = min(context_length(model) for model, _ in readers)
    def unfit(prompt, *_):
        """Why a row is dropped; None if it is not."""
        if transcript(prompt) in held_out_prompts:
            return "its prompt is held out"
        questions = []
        try:
            for _, one in readers:
                framed(one, prompt)
                questions += encode_questions(one, [prompt], [""], [""])
        except (jinja2.TemplateError, TypeError):
            return "the chat template refuses it"
        if max(map(len, questions)) + 2 * args.max_new_tokens > limit:
            return f"too long for {limit} tokens with two responses of --max_new_tokens"

    splits = read_dataset(args.dataset_name, args.dataset_config, args.dataset_data_dir)
    train = take_split(splits, args.dataset_train_split, "dataset_train_split").shuffle(seed=args.seed)
    show_columns(train)
    unread, test_split, sets = iter(train), args.dataset_test_split, []
    if test_split is None and "test" in splits and args.dataset_train_split != "test":
        test_split = "test"
    measured = max(args.num_eval_prompts, args.num_eval_pairs)
    source, most = unread, min(measured, len(train) // 10 + 1)
    if test_split:
        source, most = take_split(splits, test_split, "dataset_test_split"), -1
    held_out = usable_rows(source, unfit, most, "held-out")
    held_out_prompts.update(transcript(prompt) for prompt, *_ in held_out)
    ood = usable_rows(splits["ood"], unfit, measured, "out-of-domain") if builtin else []
    for rows in (held_out, ood):
        sets += [distinct_prompts(tokenizer, rows, args.num_eval_prompts),
                 [row for row in rows[: args.num_eval_pairs] if len(row) > 1]]
    has_pairs = hold_pairs(train.column_names)
    if args.sft and not has_pairs:
        refuse("--sft True needs chosen and rejected responses, and the data has none")
    sft = has_pairs and args.sft is not False
    wanted = max(sft * args.sft_max_steps * args.sft_batch_size, 4 * args.num_train_prompts)
    pairs = usable_rows(unread, unfit, wanted, "training")
    no_sft = "" if has_pairs else "; no SFT, as the data has no pairs"
    print(f"{len(pairs)} rows to train on, of {len(train)}{no_sft}")
    rows = distinct_prompts(tokenizer, pairs, args.num_train_prompts)
    return Data(pairs if sft else [], rows, *sets, gold_reward if builtin else None)


def usable_rows(raws, unfit, wanted, name):
    """The first `wanted` usable rows (-1: all); says how many are not, and why. Raises Stop."""
    kept, dropped = [], Counter()
    for row in map(parse_row, raws):
        reason = row if isinstance(row, str) else unfit(*row)
        if reason:
            dropped[reason] += 1
        else:
            kept.append(row)
        if len(kept) == wanted:
            break
    reasons = ", ".join(f"{n} dropped: {reason}" for reason, n in dropped.most_common())
    if not kept:
        refuse(f"No {name} row is left ({reasons or 'no other row'})")
    if dropped:
        print(f"{name} rows: {reasons}")
    return kept


def distinct_prompts(tokenizer, rows, most):
    """The first `most` distinct prompts as Rows, with all the responses that the data has to each."""
    found = {}
    for prompt, *responses in rows:
        key = transcript(prompt)
        if key not in found and len(found) < most:
            [ids] = encode_prompts(tokenizer, [prompt])
            found[key] = Row(prompt, ids, len(found), [])
        if key in found and responses:
            found[key].responses.append(responses)
    return list(found.values())


def load_preferences(name_or_path: str | None, split: str = "train") -> list[dict]:
    """Data in any known format -> rows of `prompt` (text or messages) and, if it has them, `chosen` and
    `rejected` (text). Takes a Hub name, a .json, .jsonl, .jsonl.gz or .parquet file, a folder of these,
    a save_to_disk folder, or None for the built-in task. Raises Stop where nothing can be used."""
    raws = take_split(read_dataset(name_or_path), split, "split")
    rows = usable_rows(raws, lambda *_: None, -1, split)
    return [dict(zip(("prompt", "chosen", "rejected"), row)) for row in rows]


def read_dataset(name, config=None, data_dir=None):
    """The raw splits, by whichever loader of `datasets` fits the name. Raises Stop."""
    if name is None:
        return builtin_preferences()
    path = Path(name)
    try:
        if (path / "dataset_dict.json").is_file() or (path / "state.json").is_file():
            data = datasets.load_from_disk(name)
        elif path.is_file() or path.suffix in (".json", ".jsonl", ".gz", ".parquet"):
            path.stat()  # else a file that is not there would be looked for on the Hub
            kind = "parquet" if ".parquet" in path.suffixes else "json"
            data = datasets.load_dataset(kind, data_files=name)
        else:
            data = datasets.load_dataset(name, config, data_dir=data_dir)
    except Exception as error:  # the loaders raise a dozen kinds; each is the user's to mend
        raise Stop(f"Cannot read the data set {name!r} ({cause(error.__cause__ or error)}): give a Hub "
                   "name, a .json, .jsonl, .jsonl.gz or .parquet file, or a folder.") from error
    return data if isinstance(data, dict) else {"train": data}


def take_split(splits, split, option):
    """The rows of a split. Raises Stop if it is missing, or if its columns fit no format."""
    if split not in splits:
        refuse(f"There is no split {split!r}: give --{option} one of {', '.join(map(str, splits))}")
    names = splits[split].column_names
    if not ({"prompt", "question"} & set(names) or hold_pairs(names)):
        refuse(f"The columns {sorted(names)} fit no known format: give chosen and rejected (and "
               "prompt), prompt alone, or TL;DR's info, summaries and choice")
    return splits[split]


def hold_pairs(names):
    """Whether the columns of these names hold pairs of responses, or prompts alone."""
    return "summaries" in names or {"chosen", "rejected"} <= set(names)


def show_columns(rows):
    """Prints which columns are read, and a row. Raises Stop if the prompt may stand in another."""
    raw, row = rows[0], parse_row(rows[0])
    used, unused = COLUMNS & raw.keys(), [name for name in raw if name not in COLUMNS]
    texts = [name for name in unused if isinstance(raw[name], str)]
    implicit = not {"prompt", "question", "summaries"} & used and isinstance(raw["chosen"], str)
    if implicit and texts and not HH_TURN.search(raw["chosen"]):
        names = " or ".join(texts)
        refuse(f"The data has no column prompt: rename the one that holds it, which may be {names}")
    ignored = ", ".join(unused) or "none"
    print(f"columns read: {', '.join(sorted(used))}; ignored: {ignored}; the first row:")
    for part in [row] if isinstance(row, str) else row:
        print(f"  {str(part)[:90]!r}")


def parse_row(raw):
    """A raw row of any known format -> (prompt, chosen, rejected) or (prompt,); or why it is dropped."""
    try:
        prompt = raw.get("prompt", raw.get("question"))
        if raw.get("system") and prompt:
            prompt = [{"role": "system", "content": raw["system"]}, *as_messages(prompt)]
        if "summaries" in raw:
            row = parse_tldr(raw["info"], raw["summaries"], raw["choice"])
        elif "chosen" in raw and "rejected" in raw:
            row = parse_pair(prompt, raw["chosen"], raw["rejected"])
        else:
            row = (prompt,)
        return row if isinstance(row, str) else checked(*row)
    except (LookupError, TypeError, AttributeError, ValueError):
        return "not in the format of the data's columns"


def checked(prompt, *responses):
    """A prompt, and chosen and rejected, if any -> the same, stripped; or why the row is dropped."""
    text = prompt
    if isinstance(prompt, list):
        prompt = [{"role": turn["role"], "content": turn["content"]} for turn in prompt]
        text = "".join(turn["role"] + turn["content"] for turn in prompt)
        if prompt and prompt[-1]["role"] != "user":
            return "the prompt does not end with a user's message"
    if not text or not text.strip():
        return "no prompt"
    responses = [response.strip() for response in responses]
    if not all(responses):
        return "an empty response"
    if any(map(HH_TURN.search, responses)):
        return "a role marker inside a response"
    if len(set(responses)) < len(responses):
        return "identical responses"
    return (prompt, *responses)


def parse_tldr(info, summaries, choice):
    """{"post", "title", "subreddit"}, [{"text"}, {"text"}], 0 or 1; rows of CNN/DM have no post."""
    if not info.get("post"):
        return "not a TL;DR post"
    post = info["post"].strip()
    prompt = f"SUBREDDIT: r/{info['subreddit']}\nTITLE: {info['title']}\nPOST: {post}\nTL;DR:"
    return prompt, summaries[choice]["text"], summaries[1 - choice]["text"]


def parse_pair(prompt, chosen, rejected):
    """TRL's, HH's and UltraFeedback's formats, with the prompt given or implicit: texts, transcripts, or
    lists of messages that may repeat the prompt from its start, or its end."""
    if isinstance(chosen, str):
        if prompt is not None:
            return prompt, chosen, rejected
        shared = os.path.commonprefix([chosen, rejected])
        marker = "\n\nAssistant:" if HH_TURN.search(chosen) else " "  # of HH's transcripts, TRL's texts
        end = shared.rfind(marker) + len(marker) if marker in shared else 0  # the LAST that both share
        return shared[:end].rstrip(), chosen[end:], rejected[end:]
    shared = os.path.commonprefix([chosen[:-1], rejected[:-1]])
    answers = chosen[len(shared):] + rejected[len(shared):]
    if [turn["role"] for turn in answers] != ["assistant", "assistant"]:
        return "the responses are not one assistant's message each"
    prompt = as_messages(prompt or [])
    if prompt in (shared[: len(prompt)], shared[len(shared) - len(prompt):]):
        prompt = shared
    elif prompt[len(prompt) - len(shared):] != shared:
        prompt = prompt + shared
    return prompt, answers[0]["content"], answers[1]["content"]


# 18. The built-in task: a miniature of HH in which the truth is known -----------------------------
TOPICS = "rain snow tea bread music chess honey poetry coffee jazz soup football".split()
VERBS = "is seems feels sounds".split()
KIND = "gentle lovely warm sweet bright calm splendid charming".split()
RUDE = "awful stupid ugly nasty boring useless rotten dreadful".split()
PEOPLE = "friend sister brother mother father teacher neighbour boss".split()
TIMES = "tonight today tomorrow now soon later".split()
CLAUSES = set(itertools.product(TOPICS, VERBS, KIND + RUDE))
PHRASINGS = [
    "tell my {person} about {topic} {time}", "{time} my {person} asks about {topic}",
    "my {person} likes {topic} {time}", "describe {topic} to my {person} {time}",
    "please tell me about {topic} {time} says my {person}",
    "what is {topic} like {time} asks my {person}",
    "{time} write to my {person} about {topic}", "say something about {topic} to my {person} {time}"]
OOD_PHRASINGS = [
    "about {topic} please tell my {person} something {time}",
    "{time} describe to my {person} what {topic} is like"]


def gold_reward(prompt, response):
    """The truth: each clause gains or loses 1/2 for the prompt's own topic (helpful), 1/4 for its tone.
    "Human: tell my boss about rain now", "rain is gentle . snow is ugly ." -> 0.75 - 0.75 = 0. Only the
    first three different well-formed clauses count: or length and repetition would be the reward."""
    clauses = dict.fromkeys(tuple(clause.split()) for clause in response.split(".")[:-1])
    golds = [0.0]
    for topic, _, adjective in [clause for clause in clauses if clause in CLAUSES][:3]:
        golds.append((0.5 if topic in prompt.split() else -0.5) + (0.25 if adjective in KIND else -0.25))
    return sum(golds)


def true_strength(prompt, response_1, response_2):
    """The probability with which a human of this world prefers response 1."""
    return 1 / (1 + math.exp(-4 * (gold_reward(prompt, response_1) - gold_reward(prompt, response_2))))


def builtin_prompts(split):
    """A split's prompts. Those of "ood" have phrasings and pairs of topic and person of their own."""
    texts, phrasings = [], OOD_PHRASINGS if split == "ood" else PHRASINGS
    for (i, topic), (j, person) in itertools.product(enumerate(TOPICS), enumerate(PEOPLE)):
        if ((i + j) % 4 == 0) == (split == "ood"):
            for time, phrasing in itertools.product(TIMES, phrasings):
                asked = phrasing.format(topic=topic, person=person, time=time)
                texts.append(f"\n\nHuman: {asked}\n\nAssistant:")
    random.Random(0).shuffle(texts)
    return {"train": texts[512:], "test": texts[:512], "ood": texts}[split]


def builtin_pair(rng, prompt):
    """A row, labelled by Bernoulli(true_strength). A third differ in helpfulness alone and a third in
    harmlessness alone, as HH's two halves do; the others are independent."""
    one = [[rng.random() < 0.5, rng.random() < 0.5] for _ in range(rng.randint(1, 3))]
    two = [[rng.random() < 0.5, rng.random() < 0.5] for _ in range(rng.randint(1, 3))]
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
    frame = JUDGE_FRAME.format(prompt="> Human: Assistant:", a="> A", b="> B .")
    phrases = " ".join(PHRASINGS + OOD_PHRASINGS).format(topic="", person="", time="")
    words = sorted({*frame.split(), *phrases.split(), *TOPICS + VERBS + KIND + RUDE + PEOPLE + TIMES})
    vocabulary = {word: i for i, word in enumerate(["<pad>", "<eos>", "<unk>", *words])}
    inner = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="<unk>"))
    inner.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=inner, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>")
    config = transformers.LlamaConfig(
        vocab_size=len(vocabulary), hidden_size=64, intermediate_size=128, num_hidden_layers=3,
        num_attention_heads=4, initializer_range=0.06, max_position_embeddings=256,
        tie_word_embeddings=True, pad_token_id=0, eos_token_id=1, bos_token_id=None)
    torch.manual_seed(seed)
    return transformers.LlamaForCausalLM(config), tokenizer


# 19. TSO, a variant: after arXiv 2409.02118, its formulas reconstructed ---------------------------
HUMAN = ("chosen by a human", "rejected by a human")  # sources of the data's own responses


def tso(args):
    """Self-Training with Scaled Preference Optimization. Its parts are published, the formulas ours."""
    return matrix_method(
        ["policy", "reference", "start"], args, with_human=True, strength=corrected_labels,
        loss=functools.partial(dual_clip_loss, clip=args.dual_clip),
        figures=functools.partial(tso_figures, clip=args.dual_clip),
        after_step=move_reference, moves_reference=True)


def matrix_method(roles, args, with_human, **stages):
    """A Method with a matrix as `sample`: these roles and --matrix_model_names_or_paths respond in turn;
    then come a human's chosen and rejected response, if the prompt has any. Raises Stop. Source: TSO for
    the matrix and human responses. Reconstruction: its members, in equal shares of K."""
    others = [frozen(name, args) for name in args.matrix_model_names_or_paths]
    size = len(roles) + len(others)
    if args.num_generations < size:
        refuse(f"--num_generations is {args.num_generations}, fewer than the {size} models that respond")
    def sample_in_turn(models, rows, step, args):
        """Each row's candidates, in the order of their sources."""
        if step == 0 and with_human and not any(row.responses for row in rows):
            print("The data has no human responses: the models' alone are used.")
        members = [(getattr(models, role), models.tokenizer) for role in roles] + others
        candidates, sources = [[] for _ in rows], roles + args.matrix_model_names_or_paths
        for i, (source, (model, tokenizer)) in enumerate(zip(sources, members)):
            ks = range(i, args.num_generations, size)
            for own, more in zip(candidates, respond(model, tokenizer, rows, ks, step, args, source)):
                own += more
        for row, own in zip(rows, candidates):
            if with_human and row.responses:
                texts = row.responses[step % len(row.responses)]
                own += [Candidate([], text, source) for text, source in zip(texts, HUMAN)]
            for one in own:
                if one.source not in roles:  # not yet in the policy's tokens
                    text = [row.prompt], [one.text]
                    [one.ids] = encode_responses(models.tokenizer, *text, args.max_new_tokens)
        return candidates
    return Method(sample=sample_in_turn, others=others, **stages)


def corrected_labels(models, pairs, args):
    """Hard labels: the judge's, none within label_margin of 1/2; a human's where both responses are.
    Source: TSO for corrections by AI and human feedback. Reconstruction: the rule."""
    labels = []
    for pair, p in zip(pairs, judge_pairs(models, pairs, args)):
        if pair.better.source in HUMAN and pair.worse.source in HUMAN:
            p = float(pair.better.source == HUMAN[0])
        labels.append(float(p > 0.5) if abs(p - 0.5) > args.label_margin else None)
    return labels


def dual_clip_loss(reward_1: Tensor, reward_2: Tensor, strength: Tensor, clip: float) -> Tensor:
    """Rewards, labels (P,) -> losses (P,), -log sigmoid(min(r_winner, clip) - max(r_loser, -clip)).
    Beyond clip a winner gets no more gradient, below -clip a loser none; clip = infinity is DPO. Source:
    TSO for a dual clip reward. Reconstruction: the formula."""
    winner, loser = winner_and_loser(reward_1, reward_2, strength)
    return -nn.functional.logsigmoid(winner.clamp(max=clip) - loser.clamp(min=-clip))


def winner_and_loser(reward_1, reward_2, label):
    """Rewards and labels, (P,) each -> the rewards of the winners and of the losers."""
    return reward_1.where(label > 0.5, reward_2), reward_2.where(label > 0.5, reward_1)


def tso_figures(pairs, reward_1, reward_2, clip):
    """Shares of winners and losers clipped, how many verdicts a human overruled, who wrote the pairs."""
    label = torch.tensor([pair.strength for pair in pairs])
    winner, loser = winner_and_loser(reward_1, reward_2, label)
    judged = averaged_strength(*torch.tensor([pair.verdicts for pair in pairs]).T)
    writers = Counter(one.source for pair in pairs for one in (pair.better, pair.worse))
    return means(winners_clipped=winner > clip, losers_clipped=loser < -clip) | {
        "overruled_verdicts": sum(same_side(judged, label) < 0.5).item(), "written_by": writers}


def move_reference(models, step, args):
    """Every reference_steps steps the reference becomes the policy. Source: TSO for an iteration that
    updates the reference. Reconstruction: when."""
    if (step + 1) % args.reference_steps == 0:
        models.reference.load_state_dict(models.policy.state_dict())


# 20. Preference data collection: after arXiv 2406.16486, its steps reconstructed ------------------
def collect(models, data, method, args, seconds):
    """Prompts, responses, filter, labels: each saves human labour in the next. Writes preferences.jsonl;
    returns what each step left. Source: the paper for the steps. Reconstruction: how."""
    saved = args.output_dir / "questions.json"
    if not saved.exists():
        candidates, pairs = make_pairs(models, data.rows, method, 0, args, seconds)
        kept = widest_spreads(candidates, args.keep_prompts)
        questions, counts = worth_asking([pair for pair in pairs if pair.row.index in kept], args)
        counts = {"prompts": len(candidates), "prompts_kept": len(kept)} | counts
        write_text(saved, json.dumps([questions, counts]))
    questions, counts = json.loads(saved.read_text())
    if not questions:
        refuse("No pair is left to ask about: give more prompts, or wider bounds, and "
               "--overwrite_output_dir")
    answers = ask_human(questions, data.gold, args)
    counts |= {"labels": len(answers) - answers.count("s"), "skipped": answers.count("s")}
    write_text(args.output_dir / "summary.json", json.dumps(counts, indent=2))
    print(f"{counts}\n{counts['labels']} labels of {args.num_labels} wanted; to train on them:",
          "--dataset_name", args.output_dir / "preferences.jsonl")
    return counts


def collecting(args):
    """The stages of training, of which the first four are run once."""
    if WORLD > 1:
        refuse("--method collect asks one human: run it in one process")
    return matrix_method(["start"], args, with_human=False, run=collect)


METHODS |= {"tso": tso, "collect": collecting}


def widest_spreads(candidates, share):
    """Step 1, prompts: the numbers of those whose scores differ most: there a model can improve."""
    spreads = [np.std([candidate.score for candidate in found]) for found in candidates]
    return np.argsort(spreads)[::-1][: math.ceil(share * len(spreads))].tolist()


def worth_asking(pairs, args):
    """Step 3, filter (step 2, responses, is the stage `sample`): no texts that are alike; no near tie,
    where a human would toss a coin; no landslide, which the judge knows; of a prompt the least alike.
    Returns the questions, with the responses in random order, and how many each filter left."""
    rng, questions = np.random.default_rng(args.seed), []
    for pair in pairs:
        one, two, p = pair.better, pair.worse, 0.5 if pair.strength is None else pair.strength
        if rng.random() < 0.5:
            one, two, p = two, one, 1 - p
        asked = (pair.row.prompt, one.text, two.text)
        if isinstance(checked(*asked), tuple):  # else it could not be trained on
            alike = difflib.SequenceMatcher(None, one.text.split(), two.text.split()).ratio()
            questions.append((pair.row.index, *asked, one.source, two.source, p, alike))
    names = "row prompt one two one_from two_from strength alike".split()
    table = pd.DataFrame(questions, columns=names)
    counts = {"pairs": len(pairs), "usable": len(questions)}
    conditions = {
        "not_alike": "alike <= @args.max_similarity",
        "no_tie": "strength >= @args.min_strength or strength <= 1 - @args.min_strength",
        "no_landslide": "1 - @args.max_strength <= strength <= @args.max_strength"}
    for name, condition in conditions.items():
        table = table.query(condition)
        counts[name] = len(table)
    table = table.sort_values("alike", kind="stable")
    table = table.assign(turn=table.groupby("row").cumcount()).query("turn < @args.pairs_per_prompt")
    counts["questions"] = len(table)
    return table.sort_values("turn", kind="stable").to_dict("records"), counts


def ask_human(questions, gold, args):
    """Step 4, labels: asks on the standard input until there are num_labels, and writes answers.json and
    preferences.jsonl before the next question. On the built-in task the truth answers."""
    path = args.output_dir / "answers.json"
    answers = json.loads(path.read_text()) if path.exists() else []
    while len(answers) < len(questions):
        asked, labels = questions[len(answers)], len(answers) - answers.count("s")
        if labels == args.num_labels:
            break
        if gold:
            p = true_strength(asked["prompt"], asked["one"], asked["two"])
            answer = "1" if np.random.default_rng((args.seed, len(answers))).random() < p else "2"
        else:
            answer = read_answer(asked, f"{labels} of {args.num_labels}")
        if answer == "q":
            raise Stop(f"{len(answers)} answers are in {path}; the same command, without "
                       "--overwrite_output_dir, goes on there.", code=0)
        answers = answers[:-1] if answer == "u" else [*answers, answer]
        write_preferences(zip(questions, answers), "truth" if gold else "human", args)
        write_text(path, json.dumps(answers))
    return answers


def write_preferences(answered, labeller, args):
    """A row of preferences.jsonl for each answer but skips; strength is p(chosen > rejected)."""
    lines = []
    for asked, answer in answered:
        chosen, rejected, p = "one", "two", asked["strength"]
        if answer == "2":
            chosen, rejected, p = "two", "one", 1 - p
        row = {"prompt": asked["prompt"], "chosen": asked[chosen], "rejected": asked[rejected],
               "strength": p, "labeller": labeller, "chosen_from": asked[chosen + "_from"],
               "rejected_from": asked[rejected + "_from"]}
        if answer != "s":
            lines.append(json.dumps(row) + "\n")
    write_text(args.output_dir / "preferences.jsonl", "".join(lines))


def read_answer(question, count):
    """Shows a question as plain text, in which no character controls the terminal; returns the key."""
    text = f"\n[{count}] {transcript(question['prompt'])}\n\n"
    text += "1: {one}\n\n2: {two}\n".format(**question)
    print("".join(letter if letter.isprintable() or letter == "\n" else "?" for letter in text))
    while True:
        try:
            answer = input("better: 1 or 2; s: skip, u: undo, q: quit > ").strip()
        except EOFError:
            return "q"
        if answer in list("12suq"):
            return answer
        print(f"{answer!r} is none of these keys.")


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # what a cluster sends is a Ctrl-C too
    try:
        main()
        if WORLD > 1:
            dist.destroy_process_group()
        sys.exit()
    except Stop as stop:
        sentence, code = str(stop), stop.code
    except KeyboardInterrupt:
        sentence, code = "interrupted; --resume_from_checkpoint latest goes on from a checkpoint.", 130
    if RANK == 0 or code == 1:  # a mistake of the user's shows in all processes
        print(f"osp: {sentence}", file=sys.stderr)
    sys.exit(code)
