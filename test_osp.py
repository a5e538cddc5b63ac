"""Tests of osp.py on tiny random models, the README's evidence, and golden numbers for ports. No network.

Numbers worked out by hand, and properties; then the variants that the paper compares, as Methods."""
import copy
import dataclasses
import functools
import hashlib
import io
import itertools
import json
import math
import os
import random
import re
import resource
import runpy
import shutil
import signal
import subprocess
import sys
import time
import types
import weakref
from collections import Counter
from contextlib import contextmanager, redirect_stdout
from pathlib import Path
from unittest import mock

os.environ["HF_HUB_OFFLINE"] = "1"  # before the libraries read it
import datasets
import numpy as np
import pandas as pd
import pytest
import safetensors.torch
import tokenizers
import torch
import transformers
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tokenizers import decoders, pre_tokenizers
from torch.nn.utils import parameters_to_vector

import osp

torch.set_num_threads(1)  # for models this small more threads cost more than they give
# float32: a logit of size 16 is off by 2**-20 a rounding, some ten roundings deep, and ten tokens are added
CLOSE = 2e-4


# Tools --------------------------------------------------------------------------------------------
def tiny(config, vocab_size, **shape):
    """A random model without BOS, whose EOS is 1. Its weights are large enough to tell tokens apart."""
    torch.manual_seed(0)
    made = config(vocab_size=vocab_size, bos_token_id=None, eos_token_id=1, initializer_range=0.3,
                  max_position_embeddings=1024, **shape)
    return transformers.AutoModelForCausalLM.from_config(made).eval()


def rotary(vocab_size=40):
    return tiny(transformers.LlamaConfig, vocab_size, hidden_size=32, intermediate_size=48,
                num_hidden_layers=2, num_attention_heads=4, pad_token_id=0)


def absolute(vocab_size=40):
    return tiny(transformers.GPT2Config, vocab_size, n_embd=32, n_layer=2, n_head=4)


BOTH_KINDS = pytest.mark.parametrize("kind", [rotary, absolute])
SAYING = "the cat sat on the mat . Human: Assistant: rain is gentle ."
TRAINING_TEXT = [osp.JUDGE_FRAME, "A B\nA\nB", SAYING] * 9


def byte_level_tokenizer(chat_template=None):
    """In GPT-2's manner: bytes, and no BOS."""
    inner = tokenizers.Tokenizer(tokenizers.models.BPE())
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    bytes_, eos = pre_tokenizers.ByteLevel.alphabet(), "<|endoftext|>"
    trainer = tokenizers.trainers.BpeTrainer(
        special_tokens=[eos], initial_alphabet=bytes_, show_progress=False)
    inner.train_from_iterator(TRAINING_TEXT, trainer)
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=inner, chat_template=chat_template, eos_token=eos)


def sentencepiece_tokenizer():
    """In Llama's manner: a mark for every space, bytes where it knows nothing, BOS in front."""
    names = dict(unk_token="<unk>", bos_token="<s>", eos_token="</s>")
    inner = tokenizers.Tokenizer(tokenizers.models.BPE(unk_token="<unk>", byte_fallback=True))
    inner.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    spaces = decoders.Metaspace(prepend_scheme="first")
    inner.decoder = decoders.Sequence([decoders.ByteFallback(), spaces])
    specials = [*names.values(), *(f"<0x{i:02X}>" for i in range(256))]
    trainer = tokenizers.trainers.BpeTrainer(special_tokens=specials, show_progress=False)
    inner.train_from_iterator(TRAINING_TEXT, trainer)
    spec = json.loads(inner.to_str())
    spec["added_tokens"] = spec["added_tokens"][:3]  # the byte tokens are no special tokens
    inner = tokenizers.Tokenizer.from_str(json.dumps(spec))
    inner.post_processor = tokenizers.processors.TemplateProcessing("<s> $A", special_tokens=[("<s>", 1)])
    return transformers.PreTrainedTokenizerFast(tokenizer_object=inner, **names)


LOOP = "{% for m in messages %}"
CHAT = LOOP + ("<|{{ m.role }}|>\n{{ m.content }}{{ eos_token }}\n{% endfor %}"
               "{% if add_generation_prompt %}<|assistant|>\n{% endif %}")
BYTES, PIECES, TALK = byte_level_tokenizer(), sentencepiece_tokenizer(), byte_level_tokenizer(CHAT)
EACH_TOKENIZER = pytest.mark.parametrize("tokenizer", [BYTES, PIECES, TALK], ids=["bytes", "pieces", "chat"])


@functools.cache
def arguments(words=""):
    return osp.parse_arguments(words.split())


def row_of(prompt="hi", index=0, ids=()):
    return osp.Row(prompt, ids, index, [])


def pair_of(one, two, strength=None, row=row_of(), **more):
    """A pair of texts, or of candidates."""
    sides = [osp.Candidate([5], side) if isinstance(side, str) else side for side in (one, two)]
    return osp.Pair(row, *sides, strength, **more)


def builtin_models(*seeds):
    """Built-in models with their tokenizer: policy, start, reference; the start is the judge."""
    made = [osp.builtin_model(seed)[0] for seed in seeds]
    return osp.Models(osp.builtin_model(0)[1], *made, judge=made[1])


def chat(*texts):
    """Messages of a user and an assistant in turn."""
    roles = ["user", "assistant"] * len(texts)
    return [{"role": role, "content": text} for role, text in zip(roles, texts)]


def saved(folder, tokenizer=TALK, model=None):
    """A model's folder, of a random model in bf16 if none is given."""
    model = model or rotary(len(tokenizer)).bfloat16()
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


def write_lines(path, rows):
    path.write_text("\n".join(map(json.dumps, rows)))
    return str(path)


@pytest.fixture(autouse=True, scope="module")
def one_builtin_task():
    """Every run would make its rows anew."""
    with mock.patch.object(osp, "builtin_preferences", functools.cache(osp.builtin_preferences)):
        yield


@contextmanager
def stopped(sentence, code=2):
    """The block must end in one sentence."""
    with pytest.raises(osp.Stop, match=sentence) as stop:
        yield
    assert stop.value.code == code
    assert "\n" not in str(stop.value)


# Loss ---------------------------------------------------------------------------------------------
def doubles(*values):
    return torch.tensor([float(value) for value in values], dtype=torch.float64)


@pytest.mark.parametrize("numbers", [  # p, beta, logps of the policy, those of the reference, the loss
    "0.9  0.1  -10 -12        -11 -11      0.6181388694",
    "0.7  0.1  -12 -10        -11 -11      0.7381388694",
    "0.8  0.1  -35.25 -41.5   -36 -40.125  0.6350311234",
    "0.75 1.0  -100 -20       -30 -25      56.25",
    "0.5  0.1  -3 -4          -3 -4        0.6931471806",  # log 2, where there is no margin
    "1.0  1.0   0 -2           0 0         0.1269280110",  # DPO at h = 2
    "0.25 1.0  5000 0          0 0         3750",  # neither inf nor nan
])
def test_loss_by_hand(numbers):
    p, beta, one, two, ref_one, ref_two, expected = doubles(*numbers.split())
    loss = osp.spce_loss(beta * (one - ref_one), beta * (two - ref_two), p)
    assert loss.item() == pytest.approx(expected.item(), abs=1e-9)


def gradients_of(loss, reward_1, reward_2):
    """Gradients with respect to both rewards, which must be those of finite differences."""
    rewards = [reward_1.clone().requires_grad_(), reward_2.clone().requires_grad_()]
    found = torch.autograd.grad(loss(*rewards).sum(), rewards)
    for gradient, (one, two) in zip(found, ((1e-6, 0), (0, 1e-6))):
        finite = (loss(reward_1 + one, reward_2 + two) - loss(reward_1 - one, reward_2 - two)) / 2e-6
        assert torch.allclose(gradient, finite, atol=1e-7)  # losses up to 36, so 36 * 2**-53 / 1e-6 = 4e-9
    return found


def test_loss_is_dpo_at_one_and_conservative_dpo_at_one_minus_eps():
    one, two = torch.linspace(-3, 5, 50).double(), torch.linspace(2, -1, 50).double()
    dpo, flipped = -torch.sigmoid(one - two).log(), -torch.sigmoid(two - one).log()
    assert torch.allclose(osp.spce_loss(one, two, torch.ones(50)), dpo)
    assert torch.allclose(osp.spce_loss(one, two, torch.tensor(0.9).double()), 0.9 * dpo + 0.1 * flipped)


def test_gradient_is_sigmoid_minus_strength_and_zero_at_logit():
    h = doubles(-3.0, -0.2, 0.0, 1.0, 40.0, math.log(0.3 / 0.7))
    p = doubles(0.2, 1.0, 0.5, 0.9, 0.1, 0.3)
    one, two = gradients_of(functools.partial(osp.spce_loss, strength=p), h, 0 * h)
    assert torch.allclose(one, torch.sigmoid(h) - p)
    assert torch.equal(two, -one)
    assert abs(one[-1]) < 1e-12


@pytest.mark.parametrize("reward_1, reward_2, label, clip, margin", [
    (0.1, 0.0, 1, 0.2, 0.1),  # nothing is clipped: DPO
    (0.5, 0.0, 1, 0.2, 0.2),  # the winner is
    (0.1, -0.5, 1, 0.2, 0.3),  # the loser is
    (0.5, -0.5, 1, 0.2, 0.4),  # both are
    (-0.5, 0.5, 1, 0.2, -1.0),  # neither is clipped on its other side
    (-0.5, 0.5, 0, 0.2, 0.4),  # the second one wins
    (0.5, -0.5, 1, math.inf, 1.0),
])
def test_dual_clip_by_hand(reward_1, reward_2, label, clip, margin):
    loss = osp.dual_clip_loss(doubles(reward_1), doubles(reward_2), doubles(label), clip)
    assert loss.item() == pytest.approx(math.log(1 + math.exp(-margin)), abs=1e-12)


def test_a_clipped_reward_has_no_gradient():
    """On all sides of both clips, for both winners."""
    sides = doubles(-0.31, -0.11, 0.07, 0.29)  # below -0.2, within, within, above 0.2
    reward_1, reward_2, label = torch.cartesian_prod(sides, sides, doubles(0, 1)).T
    loss = functools.partial(osp.dual_clip_loss, strength=label, clip=0.2)
    found = gradients_of(loss, reward_1, reward_2)
    is_winner = torch.stack((label, 1 - label)).bool()
    clipped = torch.stack((reward_1, reward_2))
    clipped = torch.where(is_winner, clipped > 0.2, clipped < -0.2)
    assert torch.equal(torch.stack(found) == 0, clipped)


# Pairs --------------------------------------------------------------------------------------------
@pytest.mark.parametrize("scores, expected", [
    ([0.5, 0.9, 0.1, 0.7], [(1, 2), (3, 0)]),
    (torch.tensor([0.1, 0.2, 0.3, 0.4, 0.5]), [(4, 0), (3, 1)]),  # the middle is left out
    ([0.5, 0.5, 0.5, 0.5], [(0, 3), (1, 2)]),  # ties keep their order
    ([0.5, 0.7], [(1, 0)]),
])
def test_pairs_best_with_worst_inwards(scores, expected):
    assert osp.ranked_pairs(scores) == expected


@given(st.lists(st.floats(0, 1), min_size=2, max_size=17))
def test_pairs_are_disjoint_ordered_and_nested(scores):
    pairs = osp.ranked_pairs(scores)
    gaps = [scores[better] - scores[worse] for better, worse in pairs]
    assert len(pairs) == len(scores) // 2
    assert len(set(sum(pairs, ()))) == 2 * len(pairs)
    assert min(gaps) >= 0
    assert gaps == sorted(gaps, reverse=True)


def test_identical_pairs_are_not_judged():
    """By rank: [5] [5], [6] [6], [7 1] [7], [8 1] [7 1]; the judge is unsure of the third."""
    ids = [[[5], [6], [5], [6]], [[7, 1], [8, 1], [7, 1], [7]]]
    method = osp.Method(
        sample=lambda *_: [[osp.Candidate(one, "") for one in found] for found in ids],
        score=lambda *_: [[0.9, 0.6, 0.1, 0.4], [0.9, 0.6, 0.4, 0.1]],
        strength=lambda models, pairs, args: [None, 0.75] if len(pairs) == 2 else [])
    models, rows = osp.Models(None, None, reference=rotary()), [row_of("", 0, [3]), row_of("", 1, [4])]
    _, pairs = osp.make_pairs(models, rows, method, 0, osp.Arguments(), {})
    assert [(pair.row.index, pair.better.ids, pair.worse.ids, pair.strength) for pair in pairs] == [
        (0, [5], [5], None), (0, [6], [6], None), (1, [7, 1], [7], None), (1, [8, 1], [7, 1], 0.75)]


def test_figures_of_a_step_by_hand():
    """The outermost pair of three prompts; those of the last two are dropped as identical and unsure."""
    ids = [[5, 1], [6], [7, 8, 9]], [[6, 1], [6, 1], [4, 1]], [[5], [6, 1], [5]], [[7], [6, 1], [8]]
    candidates = [[osp.Candidate(one, "") for one in found] for found in ids]
    pairs = [pair_of(found[0], found[2]) for found in candidates]
    one, two, _, unsure = pairs
    one.strength, one.verdicts, one.seen = 0.9, (0.7, 0.2), (0.5, 0.2, -0.1)  # seen: loss, rewards
    two.strength, two.verdicts, two.seen = 0.6, (0.4, 0.3), (0.7, -0.4, 0.1)
    unsure.verdicts = 0.3, 0.4
    figures = osp.step_figures(builtin_models(0, 0), candidates, pairs, osp.Method(), osp.Arguments())
    assert figures == pytest.approx({
        "response_tokens": 20 / 12, "cut_fraction": 6 / 12, "distinct_fraction": 8 / 12, "pairs": 2,
        "dropped_identical_pairs": 1, "dropped_unsure_pairs": 1, "order_agreement": 1 / 3,
        "loss": 0.6, "strength_mean": 0.75, "strength_std": 0.15, "margin": -0.1, "margin_accuracy": 0.5,
        "kl": (0.5 - 1.5) / 2}, abs=1e-6)  # float32, of size 1; beta is 0.1


# Log-probabilities --------------------------------------------------------------------------------
def naive_logps(model, prompt, response, temperature=1.0):
    """One unpadded sequence, one token at a time."""
    total, ids = 0.0, list(prompt)
    for token in response:
        logits = model(input_ids=torch.tensor([ids])).logits[0, -1]
        total = total + (logits / temperature).log_softmax(-1)[token]
        ids.append(token)
    return total


def random_ids(n, longest):
    rng = np.random.default_rng(longest)
    return [rng.integers(2, 40, rng.integers(1, longest)).tolist() for _ in range(n)]


@BOTH_KINDS
@pytest.mark.parametrize("micro_batch_size", [1, 3, 16])
def test_logps_equal_an_unpadded_loop(kind, micro_batch_size):
    model, prompts, responses = kind(), random_ids(7, 12), random_ids(7, 9)
    prompts += [prompts[0]] * 3  # prompts that are shared
    responses += [[3, 4, 1], [5], [6, 7, 8, 9, 10, 11]]
    with torch.no_grad():
        slow = torch.stack([naive_logps(model, *texts) for texts in zip(prompts, responses)])
        for pad in (0, 1):  # the padding's id does not matter, not even when it is the EOS
            fast = osp.response_logps(model, prompts, responses, pad, micro_batch_size)
            assert fast.dtype == torch.float32
            assert torch.allclose(fast, slow, atol=CLOSE)
        for share in (False, True):
            logps = osp.token_logps(model, prompts, responses, 0, share)
            assert torch.allclose(logps.sum(-1), slow, atol=CLOSE)
            assert not logps[8, 1:].any()  # beyond the end of [5]


# Update -------------------------------------------------------------------------------------------
def weights_of(model):
    return parameters_to_vector(model.parameters()).detach().clone()


def gradient_of(model):
    return parameters_to_vector([weight.grad for weight in model.parameters()])


def same_gradient(one, two):
    return torch.allclose(one, two, atol=CLOSE * two.abs().max().item())


def test_gradient_does_not_depend_on_micro_batches_or_checkpointing():
    """It is that of the mean loss of unpadded passes. Five pairs: the last micro-batch is smaller."""
    plain, prompts, responses, pairs, seen = rotary(), random_ids(5, 12), random_ids(10, 9), [], []
    prompts[1] = prompts[0]
    for i, strength in enumerate([0.9, 0.5, 0.2, 0.7, 0.6]):
        both, ref_logps = responses[2 * i : 2 * i + 2], (-20.0 + 3 * i, -8.0 - i)
        sides = [osp.Candidate(ids, "") for ids in both]
        pairs.append(pair_of(*sides, strength, row_of("", i, prompts[i]), ref_logps=ref_logps))
        rewards = [0.3 * (naive_logps(plain, prompts[i], ids) - logp) for ids, logp in zip(both, ref_logps)]
        seen.append(torch.stack([osp.spce_loss(*rewards, strength), *rewards]))
    torch.stack(seen)[:, 0].mean().backward()
    expected = gradient_of(plain)
    for size, checkpointing in ((1, False), (2, False), (4, False), (16, False), (6, True)):
        models = osp.Models(None, rotary())
        if checkpointing:
            models.policy.activation_checkpointing_enable()
        models.optimizer = torch.optim.SGD(models.policy.parameters(), lr=1.0)  # whose step is the gradient
        models.scheduler = transformers.get_scheduler("constant", models.optimizer)
        args = osp.Arguments(micro_batch_size=size, max_grad_norm=1e9, beta=0.3)
        figures = osp.update(models, pairs, osp.Method(), 0, args)
        assert figures["grad_norm"] == pytest.approx(expected.norm().item(), rel=CLOSE)
        assert same_gradient(weights_of(plain) - weights_of(models.policy), expected)
        assert next(models.policy.parameters()).grad is None
        for pair, own in zip(pairs, seen):
            assert pair.seen == pytest.approx(own.tolist(), abs=CLOSE)


def test_gradients_are_clipped_to_their_norm_and_forgotten():
    models = osp.Models(None, torch.nn.Linear(2, 1, bias=False))
    models.optimizer = torch.optim.SGD(models.policy.parameters(), lr=1.0)
    models.scheduler = transformers.get_scheduler("constant", models.optimizer)
    before = weights_of(models.policy)
    models.policy.weight.grad = torch.tensor([[3.0, 4.0]])
    assert osp.optimizer_step(models, 0.0, "", arguments("--max_grad_norm 1")) == 5.0
    step = before - weights_of(models.policy)
    assert step.tolist() == pytest.approx([0.6, 0.8], abs=1e-6)  # torch divides by the norm + 1e-6
    assert models.policy.weight.grad is None


def test_every_epoch_shows_every_row_once_in_an_order_of_its_own():
    steps = [osp.step_indices(10, 4, step, 0) for step in range(9)]
    epochs = [sum(steps[start : start + 3], []) for start in (0, 3, 6)]
    assert [sorted(epoch) for epoch in epochs] == [list(range(10))] * 3
    assert epochs[0] != epochs[1] != epochs[2]
    assert [len(step) for step in steps] == [4, 4, 2] * 3
    assert osp.step_indices(10, 4, 0, 1) != steps[0]


def rates_of(name, warmup_steps, steps=20):
    """The learning rates of a schedule with peak 1."""
    models, found = osp.Models(None, torch.nn.Linear(2, 1)), []
    args = osp.Arguments(lr_scheduler_type=name, warmup_steps=warmup_steps)
    osp.start_training(models, 1.0, steps, args)
    for _ in range(steps):
        found += models.scheduler.get_last_lr()
        models.optimizer.step()
        models.scheduler.step()
    return found


@pytest.mark.parametrize("asked, warmup", [(0.1, 2), (0.11, 3), (5.0, 5)])
def test_a_schedule_warms_up_by_a_share_or_a_number_of_steps(asked, warmup):
    expected = [step / warmup for step in range(warmup)] + [1.0] * (20 - warmup)
    assert rates_of("constant_with_warmup", asked) == pytest.approx(expected)


def test_nan_stops_the_run_and_keeps_the_weights():
    models, args = osp.Models(None, rotary()), osp.Arguments()
    osp.start_training(models, 1.0, 10, args)
    before, logits = weights_of(models.policy), models.policy(input_ids=torch.tensor([[1, 2]])).logits
    (logits.sum() * math.nan).backward()
    for loss in (math.nan, 0.0):  # the gradient is NaN in both cases
        with stopped("step 3", code=1):
            osp.optimizer_step(models, loss, "step 3", args)
    assert torch.equal(weights_of(models.policy), before)


def test_a_planted_preference_improves(monkeypatch):
    """A judge that likes one word makes a tiny policy say it, and the margins follow the strengths."""
    args, models = arguments("--max_new_tokens 8 --beta 0.3"), builtin_models(0, 0)
    models.reference = models.start

    def liked(text):
        return text.split().count("gentle")

    def judge(model, tokenizer, prompts, shown_as_a, shown_as_b, *_):
        gaps = [liked(a) - liked(b) for a, b in zip(shown_as_a, shown_as_b)]
        return torch.sigmoid(2.0 * torch.tensor(gaps)).tolist()

    def said(model):
        found = osp.respond(model, models.tokenizer, rows, range(4), osp.EVALUATION, args)
        return np.mean([liked(one.text) for own in found for one in own])

    monkeypatch.setattr(osp, "verdict_probabilities", judge)
    rows = osp.distinct_prompts(models.tokenizer, builtin_pairs("train"), 16)
    osp.start_training(models, 5e-3, 16, args)
    for step in range(16):
        figures, _, _ = osp.train_step(models, rows, osp.Method(), step, args)
    assert said(models.policy) > said(models.start) + 1
    assert figures["margin"] > 0.3
    assert figures["margin_accuracy"] > 0.8


# Judge --------------------------------------------------------------------------------------------
@EACH_TOKENIZER
def test_verdict_is_one_token_in_context(tokenizer):
    end, *verdicts = osp.verdict_format(tokenizer)
    question = osp.judge_question(tokenizer, "hello", "rain is gentle .", "the cat", end)
    gap = "" if question[-1].isspace() else " "
    for letter, token in zip("AB", verdicts):
        asked, answered = osp.encode(tokenizer, [question, question + gap + letter])
        assert answered == asked + [token]


def test_verdict_of_several_tokens_is_refused():
    inner = tokenizers.models.WordLevel({"<eos>": 0, "<unk>": 1}, unk_token="<unk>")
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizers.Tokenizer(inner), eos_token="<eos>", unk_token="<unk>")
    with stopped("one token"):
        osp.verdict_format(tokenizer)


def asked_alone(judge, tokenizer, prompt, a, b):
    """P(A) by one unpadded pass over the whole question."""
    end, *verdicts = osp.verdict_format(tokenizer)
    ids = osp.encode(tokenizer, [osp.judge_question(tokenizer, prompt, a, b, end)])
    with torch.no_grad():
        logits = judge(input_ids=torch.tensor(ids)).logits
    return logits[0, -1, verdicts].softmax(-1)[0].item()


@EACH_TOKENIZER
def test_strength_complement_identity_and_both_orders(tokenizer):
    judge = rotary(len(tokenizer))
    prompts = ["hi", "\n\nHuman: the mat\n\nAssistant:", "rain"]
    ones, twos = ["the cat sat", "x", "same"], ["rain", "the mat . the cat", "same"]
    p = osp.preference_strength(judge, tokenizer, prompts, ones, twos)
    q = osp.preference_strength(judge, tokenizer, prompts, twos, ones, micro_batch_size=1)
    assert torch.allclose(p + q, torch.ones(3), atol=CLOSE)
    assert p[2] == 0.5  # exactly
    assert (p[:2] - 0.5).abs().min() > 10 * CLOSE  # else the next lines would say nothing
    pairs = [pair_of(one, two, None, row_of(prompt)) for prompt, one, two in zip(prompts, ones, twos)]
    strengths = osp.judge_pairs(osp.Models(tokenizer, None, judge=judge), pairs, osp.Arguments())
    assert strengths == pytest.approx(p.tolist(), abs=CLOSE)
    for pair, strength, prompt, one, two in zip(pairs, strengths, prompts, ones, twos):
        alone = [asked_alone(judge, tokenizer, prompt, *order) for order in ((one, two), (two, one))]
        assert pair.verdicts == pytest.approx(alone, abs=CLOSE)
        assert strength == pytest.approx((alone[0] + 1 - alone[1]) / 2, abs=CLOSE)


def test_ranking_asks_k_questions_a_prompt_with_the_first_response_as_a(monkeypatch):
    judge, passes, forward = rotary(len(BYTES)), [], osp.forward

    def counted(model, ids, *more):
        passes.append(len(ids))
        return forward(model, ids, *more)

    monkeypatch.setattr(osp, "forward", counted)
    models, rows = osp.Models(BYTES, None, judge=judge), [row_of("hi"), row_of("the mat")]
    texts = [["rain", "the cat", "mat", "sat"], ["x", "y", "x", "y"]]
    candidates = [[osp.Candidate([], text) for text in found] for found in texts]
    scores = osp.ranking_scores(models, rows, candidates, osp.Arguments())
    assert passes == [2, 4 + 2]  # a head for each prompt; then its questions, the equal ones once
    for row, found, own in zip(rows, texts, scores):
        alone = [1 - asked_alone(judge, BYTES, row.prompt, found[0], text) for text in found]
        assert own == pytest.approx(alone, abs=CLOSE)
    assert scores[1][:2] == scores[1][2:]  # equal texts tie exactly


SAYINGS = st.lists(st.sampled_from(["rain", "the cat", "mat .", "gentle " * 40]), max_size=3).map(" ".join)
QUESTION = st.tuples(st.sampled_from(["hi", "the mat"]), SAYINGS, SAYINGS)


@pytest.mark.parametrize("judge", [rotary(len(BYTES)), absolute(len(BYTES))], ids=["rotary", "absolute"])
@given(st.lists(QUESTION, min_size=1, max_size=8), st.sampled_from([1, 3, 8]))
@settings(max_examples=25, deadline=None)
def test_questions_that_share_their_head_get_the_answers_they_get_alone(judge, questions, micro_batch_size):
    found = osp.verdict_probabilities(judge, BYTES, *zip(*questions), micro_batch_size)
    assert found == pytest.approx([asked_alone(judge, BYTES, *question) for question in questions], abs=CLOSE)


def test_a_judge_whose_verdicts_are_not_numbers_stops_the_run():
    judge = rotary(len(BYTES))
    judge.lm_head.weight.data.fill_(math.nan)
    with stopped("not numbers", code=1):
        osp.verdict_probabilities(judge, BYTES, ["hi"], ["rain"], ["mat"])


def test_a_question_longer_than_the_context_loses_text_and_not_its_frame():
    prompts, texts = ["hi", "hi"], ["the mat " * 99, "x"]
    whole, short = osp.encode_questions(BYTES, prompts, texts, texts)
    cut, same = osp.encode_questions(BYTES, prompts, texts, texts, 120)
    assert 80 < len(cut) <= 120 < len(whole)
    assert same == short
    frames = [[line for line in BYTES.decode(ids).splitlines() if line[:1] != ">"] for ids in (cut, short)]
    assert frames[0] == frames[1]


def test_judge_figures_by_hand(monkeypatch):
    p_12 = torch.tensor([0.93, 0.4, 0.05, 0.7, 1.0])  # strengths 0.92, 0.5, 0.06, 0.6, 1
    p_21 = torch.tensor([0.09, 0.4, 0.93, 0.5, 0.0])
    truths = {"a": 0.8, "b": 0.9, "c": 0.5, "d": 0.5, "e": 1.0}
    monkeypatch.setattr(osp, "ask_judge", lambda judge, tokenizer, texts, args: (p_12, p_21))
    monkeypatch.setattr(osp, "true_strength", lambda prompt, one, two: truths[prompt])
    texts, models = [(prompt, "chosen", "rejected") for prompt in truths], osp.Models(None, None)
    both = {"judge_pairs": 5, "order_agreement": (1 + 1 + 0.5 + 1) / 4}  # the second's verdicts are equal
    assert osp.judge_figures(models, texts, osp.gold_reward, None) == pytest.approx(both | {
        "judge_accuracy": (1 + 0.5 + 1) / 3,  # where the truth is no tie; a tie of the judge's counts half
        "judge_calibration_error": (0.12 + 0.4 + 0.44 + 0.1 + 0) / 5})
    gaps = abs(0.92 - 1 + 0.94 - 0) + (0.5 - 0.5) + (1 - 0.6) + 0  # the first and the third share a bin
    assert osp.judge_figures(models, texts, None, None) == pytest.approx(both | {
        "judge_accuracy": 3.5 / 5, "judge_ece": gaps / 5})


# Sampling -----------------------------------------------------------------------------------------
def noise_of(indices, ks, length, seed=7, step=3):
    rows = [osp.sampling_noise(seed, step, index, k, length) for index in indices for k in ks]
    return torch.tensor(np.array(rows))


@pytest.mark.parametrize("kind, temperature", [(rotary, 2.0), (absolute, 1.0)])
def test_sampling_follows_the_models_own_distribution_up_to_eos(kind, temperature):
    model, n, prompt = kind(8), 20_000, [3, 5, 2]
    model.generation_config.update(  # none of this may count
        do_sample=True, top_k=2, top_p=0.5, repetition_penalty=3.0)
    found = osp.sample(model, [prompt] * n, noise_of([0], range(n), 2), temperature, [1])
    counts, chi2 = Counter(map(tuple, found)), 0.0
    outcomes = [(1,)] + [(one, two) for one in range(8) if one != 1 for two in range(8)]
    for outcome in outcomes:
        expected = n * naive_logps(model, prompt, outcome, temperature).exp().item()
        chi2 += (counts[outcome] - expected) ** 2 / expected
    assert counts.keys() <= set(outcomes)
    assert chi2 < 56 + 4 * math.sqrt(2 * 56)  # 56 degrees of freedom: four standard deviations above the mean


@BOTH_KINDS
def test_sampling_does_not_depend_on_the_batch(kind):
    model, prompts, indices = kind(), random_ids(5, 12), [4, 8, 15, 16, 23]
    repeated = [prompt for prompt in prompts for _ in range(3)]

    def sampled(noise):
        return osp.sample(model, repeated, noise, 1.0, [1, 2])

    together = sampled(noise_of(indices, range(3), 10))
    for i, prompt in enumerate(repeated):
        noise = noise_of([indices[i // 3]], [i % 3], 10)
        assert osp.sample(model, [prompt], noise, 1.0, [1, 2]) == [together[i]]
    assert together != sampled(noise_of(indices, range(3), 10, seed=8))
    assert together != sampled(noise_of(indices, range(3), 10, step=4))
    assert together != sampled(noise_of(indices[::-1], range(3), 10))
    assert together != sampled(noise_of(indices, range(3, 6), 10))


def test_responses_keep_their_eos_and_truncated_ones_get_none():
    found = osp.sample(rotary(6), [[3]] * 64, noise_of([0], range(64), 4), 1.0, [1])
    assert {ids[-1] == 1 for ids in found} == {True, False}
    for ids in found:
        assert 1 not in ids[:-1]
        assert ids[-1] == 1 or len(ids) == 4
    whole, cut = osp.encode_responses(BYTES, ["hi"] * 2, ["the cat", "the cat " * 30], 12)
    assert whole[-1] == BYTES.eos_token_id
    assert len(cut) == 12 and cut[-1] != BYTES.eos_token_id


def test_responses_of_rows_are_drawn_with_their_own_noise(monkeypatch):
    model, tokenizer = osp.builtin_model(0)
    rows = [row_of("\n\nHuman: rain\n\nAssistant:", 3), row_of("\n\nHuman: tea now\n\nAssistant:", 5)]
    args = arguments("--seed 7 --temperature 0.7")
    whole = osp.respond(model, tokenizer, rows, [1, 4, 5], 2, args)
    monkeypatch.setattr(osp, "SAMPLING_BATCH_SIZE", 4)
    assert osp.respond(model, tokenizer, rows, [1, 4, 5], 2, args) == whole
    for row, found in zip(rows, whole):
        noise = noise_of([row.index], [1, 4, 5], 16, 7, 2)
        prompts = osp.encode_prompts(tokenizer, [row.prompt] * 3)
        ids = osp.sample(model, prompts, noise, 0.7, [1])
        assert [one.ids for one in found] == ids
        assert [one.text for one in found] == tokenizer.batch_decode(ids, skip_special_tokens=True)


# SFT ----------------------------------------------------------------------------------------------
def test_sft_teaches_chosen_responses_and_right_verdicts_in_both_orders():
    batch = [("hi", "rain", "the cat"), ("the mat", "gentle", "sat"), ("x", "y", "z"), ("p", "q", "r")]
    args = osp.Arguments(max_new_tokens=16)
    tasks = osp.supervised_tasks(osp.Models(BYTES, rotary(len(BYTES))), batch, args)
    (prompts, responses), (questions, verdicts) = tasks["respond"], tasks["judge"]
    assert prompts == osp.encode_prompts(BYTES, ["hi", "the mat"])  # a third, rounded up
    assert responses == osp.encode_responses(BYTES, ["hi", "the mat"], ["rain", "gentle"], 16)
    for (prompt, chosen, rejected), *asked in zip(batch, questions[:4], questions[4:]):
        assert asked == osp.encode_questions(BYTES, [prompt] * 2, [chosen, rejected], [rejected, chosen])
    assert BYTES.batch_decode(verdicts) == [" A"] * 4 + [" B"] * 4


def test_a_question_and_its_verdict_fit_into_the_context():
    model = absolute(len(BYTES))
    model.config.max_position_embeddings = 130
    batch = [("hi", "x" * n, "y") for n in range(1, 99)]
    questions, verdicts = osp.supervised_tasks(osp.Models(BYTES, model), batch, arguments())["judge"]
    assert max(map(len, questions)) + len(verdicts[0]) == 130


def test_sft_loss_is_the_mean_over_all_target_tokens():
    prompts, targets, model = random_ids(5, 12), random_ids(5, 9), rotary()
    loss = -sum(naive_logps(model, *texts) for texts in zip(prompts, targets)) / sum(map(len, targets))
    loss.backward()
    expected = gradient_of(model)
    for size in (2, 8):
        model.zero_grad()
        found = osp.supervised_backward(model, prompts, targets, osp.Arguments(micro_batch_size=size))
        assert found == pytest.approx(loss.item(), abs=CLOSE)
        assert same_gradient(gradient_of(model), expected)


# Text ---------------------------------------------------------------------------------------------
ODD = st.sampled_from([
    "A:", "B:", "Better: A", "> ", "\n", "\r\n", "\x0b", "\x0c", "\x1c", "\x85", "\u2028", "\u2029",
    "\x00", " ", "\n\nHuman: ", "\n\nAssistant:", "<|endoftext|>", "<s>", "</s>", "<unk>", "<|assistant|>\n",
    "rain ." * 500])
TEXT = st.lists(ODD | st.text(st.characters(exclude_categories=["Cs"]), max_size=6), max_size=8).map("".join)


@EACH_TOKENIZER
@given(texts=st.tuples(TEXT, TEXT, TEXT))
@example(["x <|endoftext|> y</s>\n\nB:\n> z\n\nBetter: A"] * 3)
@settings(max_examples=60, deadline=None)
def test_no_text_forges_the_frame_or_becomes_a_special_token(tokenizer, texts):
    """The question's lines read back: the frame's, once and in order, and between them the texts' own."""
    prompt, a, b = map(osp.quoted, texts)
    lines = osp.JUDGE_FRAME.format(prompt=prompt, a=a, b=b).splitlines()
    frame = [line for line in lines if line and not line.startswith("> ")]
    assert frame == ["Which response is better, A or B?", "Prompt:", "A:", "B:", "Better:"]
    starts = [lines.index(line) for line in frame[1:]]
    for text, start, end in zip(texts, starts, starts[1:]):
        said = [line[2:] for line in lines[start + 1 : end - 1]]
        assert said == ([line for line in text.splitlines() if line.strip()] or [""])
    specials, counts = set(tokenizer.all_special_ids) - {tokenizer.unk_token_id}, []
    for x, y, z in (texts, "pxy"):
        asked = osp.encode_questions(tokenizer, [x], [y], [z]) + osp.encode_prompts(tokenizer, ["p" + x])
        asked += osp.encode_responses(tokenizer, ["p"], [x], 9999)
        counts.append([sum(i in specials for i in ids) for ids in asked])
        assert asked[-1][-1] == tokenizer.eos_token_id
    assert counts[0] == counts[1]


def test_chat_template_frames_text_and_transcripts_without_a_second_bos():
    turns = "\n\nHuman: a\n\nAssistant: b\n\nHuman: c\n\nAssistant:"
    assert osp.framed(TALK, "hi") == "<|user|>\nhi<|endoftext|>\n<|assistant|>\n"
    assert osp.as_messages(turns) == chat("a", "b", "c")
    assert osp.framed(TALK, turns).count("<|assistant|>") == 2
    assert osp.framed(BYTES, osp.as_messages(turns)) == turns
    assert osp.encode_prompts(PIECES, ["hi"])[0].count(PIECES.bos_token_id) == 1
    ids, cut = osp.encode_responses(PIECES, [turns] * 2, ["the cat", "the cat " * 30], 12)
    assert PIECES.decode(ids, skip_special_tokens=True).strip() == "the cat"
    assert ids[-1] == PIECES.eos_token_id
    assert len(cut) == 12 and cut[-1] != PIECES.eos_token_id


# Data ---------------------------------------------------------------------------------------------
HEAD = "\n\nHuman: q\n\nAssistant: w\n\nHuman: r\n\nAssistant:"
TLDR = {"info": {"post": "long", "title": "t", "subreddit": "s"}, "choice": 1,
        "summaries": [{"text": " bad"}, {"text": " good"}]}
SYSTEM = {"role": "system", "content": "s"}


def texts(head=""):
    return {"chosen": head + " good", "rejected": head + " bad"}


def chats(*turns, start=0):
    return {"chosen": chat(*turns, "good")[start:], "rejected": chat(*turns, "bad")[start:]}


FORMATS = {  # name -> a raw row, its prompt; the responses are always good and bad, where there are any
    "hh": (texts(HEAD), HEAD),
    "standard": ({"prompt": "The sky is"} | texts(), "The sky is"),
    "standard implicit": (texts("The sky is"), "The sky is"),
    "conversational": ({"prompt": chat("q")} | chats("q", start=1), chat("q")),
    "conversational implicit": (chats("q"), chat("q")),
    "ultrafeedback": ({"prompt": "q", "score_chosen": 8.0} | chats("q"), chat("q")),
    "ultrafeedback, space around": ({"prompt": "q\n"} | chats("q\n"), chat("q\n")),
    "system message": ({"prompt": [SYSTEM, *chat("q")]} | chats("q"), [SYSTEM, *chat("q")]),
    "shared turns": ({"prompt": chat("q")} | chats("q", "a", "r", start=1), chat("q", "a", "r")),
    "chat prompt, text responses": ({"prompt": chat("q")} | texts(), chat("q")),
    "orca": ({"system": "s", "question": "q"} | texts(), [SYSTEM, *chat("q")]),
    "orca without system": ({"system": "", "question": "q"} | texts(), "q"),
    "system beside messages": ({"prompt": chat("q"), "system": "s"} | texts(), [SYSTEM, *chat("q")]),
    "the last of the shared turns": ({"prompt": "r"} | chats("q", "a", "r"), chat("q", "a", "r")),
    "system beside a prompt": ({"prompt": "q", "system": "s"} | texts(), [SYSTEM, *chat("q")]),
    "tldr": (TLDR, "SUBREDDIT: r/s\nTITLE: t\nPOST: long\nTL;DR:"),
    "prompts": ({"prompt": "q"}, "q"),
    "chat prompts": ({"prompt": chat("q", "a", "r")}, chat("q", "a", "r")),
    "kto": ({"prompt": "q", "completion": "c", "label": True}, "q"),
}
WRITERS = {
    ".jsonl": datasets.Dataset.to_json, ".parquet": datasets.Dataset.to_parquet,
    ".json": functools.partial(datasets.Dataset.to_json, lines=False),
    ".jsonl.gz": functools.partial(datasets.Dataset.to_json, compression="gzip"),
    "": datasets.Dataset.save_to_disk}
FILES = [(name, ".jsonl") for name in FORMATS]
FILES += [(name, suffix) for name in ("hh", "conversational") for suffix in WRITERS if suffix != ".jsonl"]


@pytest.mark.parametrize("name, suffix", FILES)
def test_every_format_of_data(tmp_path, name, suffix):
    raw, prompt = FORMATS[name]
    path = str(tmp_path / f"data{suffix}")
    WRITERS[suffix](datasets.Dataset.from_list([raw] * 3), path)
    has_pairs = {"chosen", "summaries"} & raw.keys()
    expected = {"prompt": prompt} | ({"chosen": "good", "rejected": "bad"} if has_pairs else {})
    assert osp.load_preferences(path) == [expected] * 3


HI = "\n\nHuman: q\n\nAssistant:"
DROPPED = [
    ({"chosen": HI, "rejected": HI + " b"}, "an empty response"),
    ({"chosen": HI + " a", "rejected": HI + " a "}, "identical responses"),
    ({"chosen": HI + " a\n\nHuman: r\n\nAssistant: c", "rejected": HI + " b"}, "a role marker inside"),
    ({"chosen": "\n\nHuman: x\n\nAssistant: a", "rejected": HI + " a"}, "no prompt"),
    ({"chosen": None, "rejected": HI}, "not in the format"),
    (TLDR | {"info": TLDR["info"] | {"post": None}}, "not a TL;DR post"),
    ({"prompt": [{"from": "human", "value": "q"}]}, "not in the format"),
    ({"prompt": "p", "chosen": ["a"], "rejected": ["b"]}, "not in the format")]
UNREADABLE = [
    ('{"text": "a"}', "fit no known format"),
    ('{"prompt": "p"}\n{"prompt": oops}\n{"prompt": "q"}', "Cannot read .*Invalid value.*row 1"),
    ("not json", "Cannot read"), ("", "Cannot read"), (None, "No such file")]
UNREADABLE += [(json.dumps(raw), f"No train row is left .1 dropped: {why}") for raw, why in DROPPED]


@pytest.mark.parametrize("content, expected", UNREADABLE)
def test_data_without_a_usable_row_ends_in_one_sentence(tmp_path, content, expected):
    path = tmp_path / "data.jsonl"
    if content is not None:
        path.write_text(content)
    with stopped(expected):
        osp.load_preferences(str(path))


def data_of(path, more="", tokenizer=BYTES, others=()):
    """The Data that a run of a tiny model would have, with other models that respond or judge."""
    args = arguments(f"--model_name_or_path m --dataset_name {path} --max_new_tokens 8 {more}")
    return osp.load_data([(rotary(len(tokenizer)), tokenizer), *others], args)


def test_a_run_reads_no_more_rows_than_it_can_use(tmp_path, monkeypatch, capsys):
    """Of 20,000 rows, half of them unusable: held-out ones and those to train on, and no prompt in both."""
    rows, read, parse_row = [], [], osp.parse_row
    for i in range(20_000):
        rows.append({"prompt": f"what is {i % 7001} ?", "chosen": "good", "rejected": "bad" * (i % 2)})
    path = write_lines(tmp_path / "many.jsonl", rows)
    monkeypatch.setattr(osp, "parse_row", lambda raw: read.append(raw) or parse_row(raw))
    sizes = "--sft_max_steps 5 --sft_batch_size 8 --num_train_prompts 20 --num_eval_prompts 9"
    data = data_of(path, f"{sizes} --num_eval_pairs 10")
    assert len(read) <= 2000
    assert [len(part) for part in data[:4]] == [80, 20, 9, 10]
    trained, held_out = [{prompt for prompt, *_ in pairs} for pairs in (data.sft_pairs, data.held_out_pairs)]
    assert not trained & held_out
    assert {row.prompt for row in data.rows} <= trained
    assert {row.prompt for row in data.held_out} <= held_out
    assert "80 rows to train on, of 20000" in capsys.readouterr().out
    assert len(osp.load_preferences(path)) == 10_000


@pytest.mark.parametrize("train, test", [("prompts", "hh"), ("hh", "prompts")])
def test_a_split_of_pairs_beside_one_of_prompts(tmp_path, train, test):
    """SFT goes by the rows to train on, the judge's figures by those that are held out."""
    splits = {"train": train, "test": test}
    splits = {split: datasets.Dataset.from_list([FORMATS[name][0]]) for split, name in splits.items()}
    datasets.DatasetDict(splits).save_to_disk(tmp_path)
    data = data_of(tmp_path)
    assert [bool(part) for part in data[:4]] == [train == "hh", True, True, test == "hh"]


def test_rows_that_do_not_fit_or_that_the_template_refuses_are_counted(tmp_path, capsys):
    refusal = "{% if m.role == 'system' %}{{ raise_exception('no system') }}{% endif %}"
    tokenizer = byte_level_tokenizer(CHAT.replace(LOOP, LOOP + refusal, 1))
    bad = [[SYSTEM, *chat("hi")], chat("the cat sat on the mat " * 200), chat("held")]
    write_lines(tmp_path / "test.jsonl", [{"prompt": chat("held")}])
    write_lines(tmp_path / "train.jsonl", [{"prompt": prompt} for prompt in [*bad, chat("hi")]])
    for own, others in ((tokenizer, []), (BYTES, [(rotary(), tokenizer)])):
        data = data_of(tmp_path, "", own, others)
        assert [row.prompt for row in data.rows + data.held_out] == [chat("hi"), chat("held")]
        said = capsys.readouterr().out
        for why in ("the chat template refuses it", "too long", "its prompt is held out"):
            assert f"1 dropped: {why}" in said
    write_lines(tmp_path / "train.jsonl", [{"prompt": prompt} for prompt in bad])
    with stopped("No training row is left .1 dropped.*1 dropped.*1 dropped"):
        data_of(tmp_path, tokenizer=tokenizer)


@pytest.mark.parametrize("name, more, read, ignored", [
    ("hh", {}, "chosen, rejected", "none"),
    ("hh", {"instruction": "q"}, "chosen, rejected", "instruction"),  # a transcript holds its prompt
    ("conversational implicit", {"instruction": "q"}, "chosen, rejected", "instruction"),
    ("orca", {}, "chosen, question, rejected, system", "none"),
    ("ultrafeedback", {}, "chosen, prompt, rejected", "score_chosen"),
    ("kto", {}, "prompt", "completion, label"),
    ("system beside a prompt", {}, "chosen, prompt, rejected, system", "none"),
])
def test_a_run_says_what_it_reads_and_on_one_row_ends_in_one_sentence(
        tmp_path, capsys, name, more, read, ignored):
    raw, prompt = FORMATS[name]
    with stopped("No training row is left"):
        data_of(write_lines(tmp_path / "data.jsonl", [raw | more]))
    first, *parts = capsys.readouterr().out.splitlines()
    assert first == f"columns read: {read}; ignored: {ignored}; the first row:"
    responses = ["good", "bad"] if "chosen" in raw else []
    assert parts == [f"  {str(part)!r}" for part in (prompt, *responses)]


@pytest.mark.parametrize("more", [{}, {"system": "s"}])
def test_a_prompt_that_may_stand_in_another_column_is_asked_for(tmp_path, more):
    rows = [texts() | {"instruction": "q", "likes": 3} | more] * 3
    write_lines(tmp_path / "data.jsonl", rows)
    pd.DataFrame(rows).to_parquet(tmp_path / "data.parquet")  # pandas writes large_string
    for path in tmp_path.iterdir():
        with stopped("rename the one that holds it, which may be instruction"):
            data_of(path)


def test_sft_needs_pairs(tmp_path):
    path = write_lines(tmp_path / "data.jsonl", [{"prompt": text, "completion": "c"} for text in "xyz"])
    data = data_of(path)
    assert (len(data.rows), data.sft_pairs, data.held_out_pairs) == (2, [], [])
    with stopped("--sft True needs chosen and rejected"):
        data_of(path, "--sft True")


def test_a_prompt_keeps_all_its_responses():
    pairs = [("a", "x", "y"), ("b", "p", "q"), ("a", "z", "w"), ("c", "r", "s")]
    one, two = osp.distinct_prompts(BYTES, pairs, 2)
    assert (one.prompt, one.index, one.responses) == ("a", 0, [["x", "y"], ["z", "w"]])
    assert (two.prompt, two.index, two.responses) == ("b", 1, [["p", "q"]])
    assert [one.ids, two.ids] == osp.encode_prompts(BYTES, ["a", "b"])


KEYS = st.sampled_from(["role", "content", "post", "text"])
SCRAP = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | TEXT,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(KEYS, inner, max_size=3), max_leaves=6)
TURNS = st.lists(TEXT, min_size=1, max_size=4).map(lambda texts: chat(*texts))
SENSIBLE = TEXT | TURNS | st.just(TLDR["info"])


@pytest.mark.parametrize("columns", [
    "prompt", "prompt chosen rejected", "chosen rejected", "system question chosen rejected",
    "info summaries choice"])
@given(st.data())
@settings(max_examples=100, deadline=None)
def test_whatever_stands_in_a_row_it_is_parsed_or_counted(columns, data):
    parsed = osp.parse_row({column: data.draw(SCRAP | SENSIBLE) for column in columns.split()})
    if isinstance(parsed, str):
        assert parsed.strip()  # why it is dropped
        return
    prompt, *responses = parsed
    texts = [prompt]
    if not isinstance(prompt, str):
        texts = [turn[key] for turn in prompt for key in turn]
        assert all(turn.keys() == {"role", "content"} for turn in prompt)
    assert all(isinstance(text, str) for text in texts)
    assert "".join(texts).strip()
    assert len(set(responses)) == len(responses) == (0 if columns == "prompt" else 2)
    assert all(response and response.strip() == response for response in responses)


# Built-in task ------------------------------------------------------------------------------------
RAIN = "\n\nHuman: tell my boss about rain now\n\nAssistant:"


@pytest.mark.parametrize("response, gold", [
    ("rain is gentle .", 0.75), ("snow is ugly .", -0.75), ("rain is ugly . snow is gentle .", 0), ("", 0),
    ("rain is gentle . rain is gentle .", 0.75), ("rain is gentle", 0), ("rain is gentle now .", 0),
    ("rain is warm . rain is calm . rain is sweet . rain is lovely .", 2.25)])
def test_gold_reward_by_hand(response, gold):
    assert osp.gold_reward(RAIN, response) == gold


def test_built_in_task():
    """Disjoint prompts; strengths that spread; labels drawn with the true strength."""
    strength = osp.true_strength(RAIN, "rain is gentle .", "rain is ugly .")
    assert strength == pytest.approx(1 / (1 + math.exp(-2)))
    rows = [osp.load_preferences(None, split) for split in ("train", "test", "ood")]
    train, test, ood = [{row["prompt"] for row in found} for found in rows]
    assert len(train) > 1000 and len(test) >= 256 and len(ood) >= 256
    assert len(train | test | ood) == len(train) + len(test) + len(ood)
    words = frozenset({*osp.TOPICS, *osp.PEOPLE})
    known, new = [{words & frozenset(text.split()) for text in found} for found in (train, ood)]
    assert not known & new  # no topic with a person that it had in training
    p = np.array([osp.true_strength(*row.values()) for row in rows[0]])
    sure = np.maximum(p, 1 - p)
    assert np.mean((sure > 0.55) & (sure < 0.95)) > 1 / 3
    # some 7,000 draws, the standard error of whose mean is at most 0.5 / sqrt(7000) = 0.006
    assert np.mean(p[p != 0.5] > 0.5) == pytest.approx(np.mean(sure[p != 0.5]), abs=0.02)


# Wrong input --------------------------------------------------------------------------------------
@pytest.mark.parametrize("words, expected", [
    ("--num_generations 1", "--num_generations is 1: it must be at least 2"),
    ("--beta 0", "--beta is 0.0: it must be above 0"),
    ("--learning_rate -1e-5", "--learning_rate is -1e-05: it must be above 0"),
    ("--learning_rate nan", "--learning_rate is nan"),
    ("--num_generations 2.5", "num_generations.*2.5"),
    ("--learning_rte 1", "--learning_rte is no argument; the nearest one is --learning_rate"),
    ("--dataset_name x.json", "needs --model_name_or_path"),
    ("--lr_scheduler_type wavy", "wavy"),
    ("--method ops", "'ops'.*osp"),
    ("--model_name_or_path no/such-model", "no/such-model"),
    ("--resume_from_checkpoint nowhere", "nowhere"),
    ("--dataset_train_split nope", "'nope': give --dataset_train_split one of train, test, ood"),
    ("--dataset_test_split nope", "'nope': give --dataset_test_split one of train, test, ood"),
    ("--method tso --num_generations 2", "--num_generations is 2, fewer than the 3 models"),
    ("--method tso --matrix_model_names_or_paths no/such", "Cannot load 'no/such'"),
    ("--chat_template_kwargs {oops", "chat_template_kwargs"),
    ("--chat_template_kwargs [1]", "chat_template_kwargs"),
])
def test_wrong_arguments_end_in_one_sentence(tmp_path, words, expected):
    with stopped(expected):
        osp.main([*words.split(), "--output_dir", str(tmp_path / "run")])
    assert not (tmp_path / "run").exists()


def bert():
    config = dict(vocab_size=len(BYTES), hidden_size=32, num_hidden_layers=1, num_attention_heads=2)
    return transformers.BertForMaskedLM(transformers.BertConfig(**config))


def t5():
    config = transformers.T5Config(vocab_size=len(BYTES), d_model=16, num_layers=1)
    return transformers.T5ForConditionalGeneration(config)


@pytest.mark.parametrize("make, eos, expected", [
    (bert, "<|endoftext|>", "causal language model"), (t5, "<|endoftext|>", "causal language model"),
    (lambda: rotary(len(BYTES) - 1), "<|endoftext|>", "embeds only"),
    (lambda: rotary(len(BYTES)), None, "no EOS token")])
def test_models_that_do_not_fit_are_refused(tmp_path, make, eos, expected):
    tokenizer = byte_level_tokenizer()
    tokenizer.eos_token = eos
    with stopped(expected):
        osp.load_model(saved(tmp_path, tokenizer, make()), arguments())


def test_help_shows_both_defaults(capsys):
    with pytest.raises(SystemExit, match="0"):
        arguments("--help")
    said = " ".join(capsys.readouterr().out.split())
    assert "peak learning rate (default: 1e-06)" in said
    assert re.search("Defaults of the built-in task: .*--learning_rate 0.001 ", said)
    assert arguments().learning_rate == 0.001
    assert arguments("--model_name_or_path m").learning_rate == 1e-6


def test_exit_codes_of_the_program(tmp_path):
    """As a user types it: one sentence on stderr, exit code 2, no traceback."""
    command = [sys.executable, osp.__file__, "--num_generations", "1"]
    done = subprocess.run(command, stderr=subprocess.PIPE, text=True, cwd=tmp_path, timeout=120)
    assert done.returncode == 2
    assert done.stderr.startswith("osp: --")
    assert done.stderr.count("\n") == 1


def test_chat_template_kwargs_reach_the_template(tmp_path):
    folder = saved(tmp_path, byte_level_tokenizer(CHAT + "thinking: {{ enable_thinking }}"))
    _, loaded = osp.load_model(folder, arguments('--chat_template_kwargs {"enable_thinking":false}'))
    assert osp.framed(loaded, "hi").endswith("<|assistant|>\nthinking: False")


def test_dropout_is_zero_and_stays_in_the_saved_configuration(tmp_path):
    model, _ = osp.load_model(saved(tmp_path, BYTES, absolute(len(BYTES))), arguments())
    ids = torch.tensor([[3, 4, 5]])
    with torch.no_grad():
        assert torch.equal(model.train()(input_ids=ids).logits, model.eval()(input_ids=ids).logits)
    assert model.config.resid_pdrop == model.config.attn_pdrop == 0.1


def test_a_bf16_copy_is_frozen_and_leaves_the_model_and_its_buffers_alone():
    model = rotary()
    before = weights_of(model)
    copied = osp.bf16_copy(model)
    assert {weight.dtype for weight in copied.parameters()} == {torch.bfloat16}
    assert not any(weight.requires_grad for weight in copied.parameters())
    assert copied.model.rotary_emb.inv_freq.dtype == torch.float32
    assert torch.equal(weights_of(model), before)
    assert torch.equal(weights_of(copied), before.bfloat16())


# End to end ---------------------------------------------------------------------------------------
QUICK = """--sft_max_steps 3 --sft_batch_size 4 --num_train_prompts 12 --num_train_epochs 2 --save_steps 2
    --prompts_per_step 4 --num_generations 4 --num_eval_prompts 8 --num_eval_pairs 8 --eval_steps 4"""
MORE_OF = {"osp": "", "tso": "--method tso --reference_steps 3 --label_margin 1e-6"}
GO_ON = "--resume_from_checkpoint latest"
CLOCK = ("seconds", "tokens_per_second")


def command(folder, *more):
    """The arguments of a quick run."""
    return " ".join([QUICK, "--output_dir", str(folder), *more]).split()


def timeless(figures):
    return {name: value for name, value in figures.items() if not name.startswith(CLOCK)}


def weights_in(folder):
    return transformers.AutoModelForCausalLM.from_pretrained(folder).state_dict()


def state_of(checkpoint):
    return torch.load(checkpoint / "training_state.pt")


def read_run(folder):
    """The summary, the lines of metrics.jsonl and the weights of a run, without what a clock measured."""
    summary = timeless(json.loads((folder / "summary.json").read_text()))
    lines = [timeless(json.loads(line)) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return types.SimpleNamespace(folder=folder, summary=summary, lines=lines, weights=weights_in(folder))


def run(folder, *more):
    """A whole quick run, and what it `said`."""
    with redirect_stdout(io.StringIO()) as said:
        summary = osp.main(command(folder, *more))
    found = read_run(folder)
    found.said = said.getvalue()
    assert timeless(summary) == found.summary
    return found


def same_weights(one, two):
    return all(torch.equal(one[name], two[name]) for name in one)


def same_runs(one, two):
    return (one.summary, one.lines) == (two.summary, two.lines) and same_weights(one.weights, two.weights)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A run of each method, by its name. No test may change them."""
    folder = tmp_path_factory.mktemp("finished")
    return {method: run(folder / method, more) for method, more in MORE_OF.items()}


def killed_at_its_end(run, folder):
    """A copy of a run without the file that ends it."""
    shutil.copytree(run.folder, folder)
    (folder / "summary.json").unlink()
    return folder


@pytest.fixture(scope="module")
def real(tmp_path_factory):
    """A folder with a random `model` in bf16 with a chat template, and arguments to train it on prompts."""
    folder = tmp_path_factory.mktemp("real")
    data = write_lines(folder / "prompts.jsonl", [{"prompt": chat(f"what is {i} ?")} for i in range(40)])
    model = saved(folder / "model")
    return folder, f"--model_name_or_path {model} --dataset_name {data} --max_new_tokens 8"


def test_every_run_leaves_curves_samples_and_a_model_card(finished):
    run = finished["osp"]
    first, last = run.lines[0], run.lines[-1]
    assert [line["step"] for line in run.lines] == [1, 2, 3, 4, 5, 6]
    assert run.summary["steps"] == 6
    assert abs(first["kl"]) < 1e-4 and abs(first["margin"]) < 1e-5
    assert first["loss"] == pytest.approx(math.log(2), abs=1e-5)
    assert [line["step"] for line in run.lines if "eval_kl" in line] == [4, 6]
    own = {name.removeprefix("eval_"): value for name, value in last.items() if name.startswith("eval_")}
    assert own.items() <= run.summary.items()
    assert (run.folder / "curves.png").read_bytes().startswith(b"\x89PNG")
    samples = (run.folder / "samples.md").read_text()
    assert [part.split()[0] for part in samples.split("## Step ")[1:]] == ["1", "4", "6"]
    assert samples.count("* score ") == 9 * 4  # three steps, three prompts each, K = 4
    card = (run.folder / "README.md").read_text()
    table = card.split("```\n")[1]
    assert "built-in task" in card and "seed 0" in card and table in run.said
    assert "8 held-out prompts" in table and "order_agreement" in table and "cut_fraction" in table
    for name in ("gold_reward", "win_rate_vs_sft", "response_tokens", "judge_accuracy"):
        assert f"{run.summary[name]:.3f}" in table
    arguments = json.loads((run.folder / "arguments.json").read_text())
    assert arguments["num_generations"] == 4
    assert arguments["beta"] == 0.1


def test_samples_of_later_steps_go_when_a_run_goes_on(tmp_path):
    args = osp.Arguments(output_dir=tmp_path)
    found = [osp.Candidate([3], "a\nb", score=0.5), osp.Candidate([4], "c", score=0.7)]
    pair = pair_of(found[1], found[0], 0.75)
    pairs = [pair, pair_of(*found, 1.2e-5), pair_of(*found, None)]
    for step in (1, 4, 6, 4):
        osp.write_samples(step, [pair.row], [found], pairs, args)
    text = (tmp_path / "samples.md").read_text()
    assert [part.split()[0] for part in text.split("## Step ")[1:]] == ["1", "4"]
    assert text.index("score 0.700: c") < text.index("score 0.500: a b")
    assert text.endswith("0.750, 0.000, dropped\n")


def test_max_steps_0_only_evaluates_and_arguments_json_is_the_first_file(tmp_path, monkeypatch):
    written, real = [], os.replace
    monkeypatch.setattr(os, "replace", lambda one, two: (written.append(Path(two).name), real(one, two)))
    found = run(tmp_path, "--max_steps 0")
    assert written[0] == "arguments.json"
    assert written[-1] == "summary.json"
    assert found.lines == [] and abs(found.summary["kl"]) < 1e-5
    assert same_weights(found.weights, weights_in(tmp_path / "sft"))


@pytest.mark.parametrize("figures, warning", [
    ({}, None),
    ({"judge_accuracy": 0.56}, None),  # two standard errors at 400 pairs are 0.05
    ({"judge_accuracy": 0.54}, "no better than chance"),
    ({"judge_accuracy": 0.56, "judge_pairs": 100}, "no better than chance"),
    ({"order_agreement": 0.6}, "two orders disagree"),
    ({"cut_fraction": 0.6}, "--max_new_tokens"),
])
def test_figures_that_mean_nothing_are_warned_of(figures, warning):
    good = {"held_out_prompts": 9, "self_judged": False, "cut_fraction": 0.1, "order_agreement": 0.9,
            "judge_accuracy": 0.9, "judge_pairs": 400}
    table = osp.report_table(good | figures, "OSP")
    assert table.count("Warning") == (warning is not None)
    assert (warning or "") in table


def test_a_real_model_folder_with_chat_template_and_prompts_alone(tmp_path, real):
    found = run(tmp_path, real[1], "--max_steps 2 --gradient_checkpointing")
    assert found.summary["self_judged"]
    assert found.summary["prompts"] == 12
    assert "gold_reward" not in found.summary
    assert "judge_accuracy" not in found.summary
    assert {weight.dtype for weight in found.weights.values()} == {torch.float32}
    assert transformers.AutoTokenizer.from_pretrained(tmp_path).chat_template == CHAT
    assert "self-judged: True" in found.said and "no SFT" in found.said


def test_bf16_trains_fp32_weights_with_two_models_from_almost_the_same_start(tmp_path, monkeypatch):
    """While a step is logged the policy and the frozen start are alive, and no third model."""
    loaded, alive, load_model, log_step = [], [], osp.load_model, osp.log_step

    def load(*args):
        model, tokenizer = load_model(*args)
        loaded.append(weakref.ref(model))
        return model, tokenizer

    def log(*args):
        alive.append(sum(ref() is not None for ref in loaded))
        log_step(*args)

    monkeypatch.setattr(osp, "load_model", load)
    monkeypatch.setattr(osp, "log_step", log)
    found = run(tmp_path, "--bf16 --max_steps 2 --micro_batch_size 8")
    assert {weight.dtype for weight in found.weights.values()} == {torch.float32}
    assert abs(found.lines[0]["margin"]) < 0.05
    assert abs(found.lines[0]["kl"]) < 0.3
    assert alive == [2, 2]


def test_a_step_of_identical_pairs_makes_no_update(tmp_path, monkeypatch):
    monkeypatch.setattr(osp, "sample", lambda model, prompt_ids, *_: [[5, 1] for _ in prompt_ids])
    monkeypatch.setattr(osp, "update", None)  # not to be called
    lines = run(tmp_path, "--max_steps 2 --save_steps 1").lines
    counts = [(line["pairs"], line["dropped_identical_pairs"], line.get("loss")) for line in lines]
    assert counts == [(0, 8, None)] * 2
    # torch would give a fresh AdamW a step that it never made
    assert "optimizer" not in state_of(tmp_path / "checkpoint-1")


# Save and resume ----------------------------------------------------------------------------------
@pytest.mark.parametrize("method", MORE_OF)
def test_a_resumed_run_equals_one_left_alone(tmp_path, monkeypatch, finished, method):
    """Interrupted a step after the checkpoint, whose line of metrics.jsonl is done again."""
    more, real = MORE_OF[method], osp.train_step

    def interrupted(models, rows, method, step, args):
        if step == 5:
            raise KeyboardInterrupt
        return real(models, rows, method, step, args)

    with monkeypatch.context() as patches, pytest.raises(KeyboardInterrupt):
        patches.setattr(osp, "train_step", interrupted)
        run(tmp_path, more)
    with stopped("beta was 0.1, is 0.5"):
        run(tmp_path, more, GO_ON, "--beta 0.5")
    with stopped("already holds a run"):
        run(tmp_path, more)
    assert same_runs(run(tmp_path, more, GO_ON, "--save_steps 4"), finished[method])
    with stopped("already holds a run"):  # a finished one is not done again
        run(tmp_path, more, GO_ON)


def meet(moment, folder):
    """Makes the n-th call of a function meet a signal."""
    name, n, number = moment.split(":")
    owner = {"replace": os, "save": torch}.get(name, osp)
    real, calls = getattr(owner, name), itertools.count(1)

    def met(*args, **more):
        if next(calls) == int(n):
            if name == "log_step":
                with (folder / "metrics.jsonl").open("a") as file:
                    file.write('{"step": 1, "lo')  # half a line
            if name == "save":
                args[1].write_bytes(b"half")
            os.kill(os.getpid(), int(number))
        return real(*args, **more)

    setattr(owner, name, met)


def run_apart(folder, moment, *more):
    """A run in a process of its own, which meets a signal at this moment; its status."""
    if pid := os.fork():
        return os.waitpid(pid, 0)[1]
    code = 99
    try:
        sys.stdout = (folder.parent / "said").open("a")
        if moment:
            meet(moment, folder)
        osp.main(command(folder, *more))
        code = 0
    except osp.Stop as stop:
        print(stop)
        code = stop.code
    finally:
        sys.stdout.flush()
        os._exit(code)


def test_a_run_killed_anywhere_ends_as_one_left_alone(tmp_path):
    """Real processes, real signals: in SFT, while a checkpoint, the SFT model and the final one are written,
    in a step, in half a line of metrics.jsonl; and Ctrl-C and SIGTERM, which save a checkpoint first."""
    moments = [
        "supervised_tasks:4:9", "save:1:9", "supervised_tasks:2:2", "replace:4:9", "log_step:4:9", "save:1:9",
        "update:2:15", "save_model:1:9"]
    more, alone, killed = "--sft_max_steps 7 --save_total_limit 1", tmp_path / "alone", tmp_path / "killed"
    osp.builtin_preferences()  # now, not in each process
    statuses = [run_apart(alone, "", more), run_apart(killed, moments[0], more)]
    for moment in [*moments[1:], ""]:
        statuses.append(run_apart(killed, moment, more, GO_ON))
    said = (tmp_path / "said").read_text()
    expected = [130 << 8 if moment.endswith((":2", ":15")) else 9 for moment in moments]
    assert statuses == [0, *expected, 0], said
    assert "interrupted; sft-checkpoint-4 is saved" in said
    assert said.count("interrupted; checkpoint-4 is saved") == 1
    assert same_runs(read_run(alone), read_run(killed))
    names, others = [{str(path.relative_to(run)) for path in run.rglob("*")} for run in (alone, killed)]
    assert names == others
    assert "checkpoint-2" not in names  # no more than one was asked for
    assert not any("partial" in name or "sft-checkpoint" in name for name in names)
    for name in ("model", "sft/model", "checkpoint-4/model"):
        assert (alone / f"{name}.safetensors").read_bytes() == (killed / f"{name}.safetensors").read_bytes()
    assert (alone / "samples.md").read_bytes() == (killed / "samples.md").read_bytes()


def test_checkpoints_are_told_from_other_folders(tmp_path):
    for name in ("checkpoint-10", "checkpoint-9", "checkpoint-9-old", "sft-checkpoint-3"):
        (tmp_path / name).mkdir()
    found = osp.checkpoints(osp.Arguments(output_dir=tmp_path), "checkpoint")
    assert [path.name for path in found] == ["checkpoint-9", "checkpoint-10"]


def test_a_damaged_checkpoint_is_named_with_the_older_ones(tmp_path, finished):
    folder = killed_at_its_end(finished["osp"], tmp_path / "run")
    for name in ("model.safetensors", "training_state.pt"):
        path = folder / "checkpoint-4" / name
        whole = path.read_bytes()
        path.write_bytes(whole[: len(whole) // 2])
        with stopped(r"checkpoint-4' is damaged .*: delete it.*\(checkpoint-2\)"):
            run(folder, GO_ON)
        path.write_bytes(whole)


def test_a_full_disk_costs_no_older_checkpoint(tmp_path, monkeypatch, finished):
    """Nor does a checkpoint that the user deleted."""
    folder, save_model = killed_at_its_end(finished["osp"], tmp_path / "run"), osp.save_model
    with monkeypatch.context() as patches, stopped("Cannot write .*run'.*make room", code=1):
        patches.setattr(osp, "save_model", mock.Mock(side_effect=OSError(28, "No space left")))
        run(folder, GO_ON)  # only the final model is left to write
    shutil.rmtree(folder / "checkpoint-4")
    for error in (OSError(28, "No space left"), RuntimeError("torch's"), osp.SafetensorError("safetensors'")):

        def full(models, folder):
            save_model(models, folder)
            raise error

        with monkeypatch.context() as patches, stopped("Cannot write .*checkpoint-4.*make room", code=1):
            patches.setattr(osp, "save_model", full)
            run(folder, GO_ON)
        names = {path.name for path in folder.iterdir()}
        assert "checkpoint-2" in names and "checkpoint-4" not in names
        assert not any("partial" in name for name in names)
    assert same_runs(run(folder, GO_ON), finished["osp"])


def test_nothing_written_is_lost_by_a_mistake(tmp_path, finished):
    """Inputs are checked before an old run is removed."""
    folder = tmp_path / "run"
    shutil.copytree(finished["osp"].folder, folder)
    before = sorted(path.name for path in folder.iterdir())
    assert {"checkpoint-4", "metrics.jsonl", "summary.json", "model.safetensors", "sft"} <= set(before)
    for more in ("", "--overwrite_output_dir --model_name_or_path nowhere",
                 "--overwrite_output_dir --resume_from_checkpoint checkpoint-9"):
        with stopped("already holds|nowhere|checkpoint-9"):
            run(folder, more)
        assert sorted(path.name for path in folder.iterdir()) == before
    (folder / "chat_template.jinja").write_text("of another model")
    assert run(folder, "--overwrite_output_dir --max_steps 1").summary["steps"] == 1
    assert not (folder / "checkpoint-4").exists()
    assert not (folder / "chat_template.jinja").exists()
    (tmp_path / "file").write_text("")
    with stopped("Cannot write .*--output_dir", code=1):
        run(tmp_path / "file" / "run")


def test_a_folder_that_is_no_run_is_never_written_into(real):
    parent, words = real
    model = parent / "model"
    before = {path.name: path.read_bytes() for path in model.iterdir()}
    for folder in (model, parent, model / "run"):
        for more in (GO_ON, "--overwrite_output_dir", ""):
            with stopped("give another"):
                run(folder, words, more)
    with stopped("give another"):  # nor when the model is another one
        run(model, "--overwrite_output_dir")
    assert {path.name: path.read_bytes() for path in model.iterdir()} == before


# Several processes --------------------------------------------------------------------------------
TORCHRUN = """
import json, runpy, sys
sys.path.insert(0, sys.argv[1])
import osp
*runs, last = json.loads(sys.argv[2])
for run in runs:
    osp.main(run)
sys.argv[1:] = last
runpy.run_path(osp.__file__, run_name='__main__')
"""


def torchrun(folder, *runs):
    """Runs on two CPU processes that torchrun starts, one after the other; the last one as if typed."""
    (folder / "runs.py").write_text(TORCHRUN)
    launch = [sys.executable, *"-m torch.distributed.run --standalone --nproc_per_node 2".split()]
    return subprocess.run(
        [*launch, folder / "runs.py", Path(osp.__file__).parent, json.dumps(runs)], timeout=200,
        capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"})


def assert_close(one, two):
    """Two runs that differ in the order of their sums alone.

    A log-probability sums 16 tokens, each off by a few times 2^-24 of logits of size 10: by 1e-5 at most, and
    so do margins, KL and losses; 1e-3 leaves room. AdamW divides a gradient by its size, so where one is
    nearly 0 its sign is anyone's; but all such weights are a small part of the way that the weights went."""
    for figures, others in zip([one.summary, *one.lines], [two.summary, *two.lines], strict=True):
        assert figures.keys() == others.keys()
        for name, value in figures.items():
            if name == "grad_norm":
                assert others[name] == pytest.approx(value, rel=1e-2)
            elif name not in ("margin_accuracy", "written_by"):  # of margins that are 0 up to rounding
                assert others[name] == pytest.approx(value, abs=1e-3), name
    start, gone, other = [
        torch.cat([weight.flatten() for weight in weights.values()])
        for weights in (weights_in(one.folder / "sft"), one.weights, two.weights)]
    assert (other - gone).norm() < 0.1 * (gone - start).norm()


def test_two_processes_do_what_one_does(tmp_path):
    """SFT, then steps of 3, 1, 3, 1 prompts with a pair each, so that the second process has none in every
    other step; then each goes on with what the other wrote of TSO, whose checkpoints hold what OSP's do."""
    small = """--sft_max_steps 2 --prompts_per_step 3 --num_train_prompts 4 --num_eval_prompts 3
        --num_eval_pairs 3 --save_steps 1 --micro_batch_size 4 --beta 1 --learning_rate 1e-4
        --sft_learning_rate 1e-4 --num_generations"""
    options = {"osp": f"{small} 2", "tso": f"{MORE_OF['tso']} {small} 3 --reference_steps 2"}
    alone = {method: run(tmp_path / method, more) for method, more in options.items()}
    back = killed_at_its_end(alone["tso"], tmp_path / "back")
    shutil.rmtree(back / "checkpoint-3")
    runs = [command(tmp_path / f"{method}-two", more) for method, more in options.items()]
    done = torchrun(tmp_path, *runs, command(back, options["tso"], GO_ON), runs[0])
    assert done.returncode == 1 and done.stderr.count("already holds a run") == 1, done.stderr
    assert done.stderr.count("Traceback") == 1  # torchrun's own
    assert done.stdout.splitlines()[:3] == alone["osp"].said.splitlines()[:3]
    assert_close(alone["tso"], read_run(back))
    for method, one in alone.items():
        two = tmp_path / f"{method}-two"
        assert_close(one, read_run(two))
        states = [state_of(folder / "checkpoint-1")["optimizer"]["state"] for folder in (one.folder, two)]
        for name in states[0]:  # after one step exp_avg is a tenth of the gradient
            own, other = [state[name]["exp_avg"] for state in states]
            assert type(other) is torch.Tensor
            assert (own - other).abs().max() <= 1e-3 * own.abs().max() + 1e-12
    (tmp_path / "tso-two" / "summary.json").unlink()
    assert_close(alone["tso"], run(tmp_path / "tso-two", options["tso"], GO_ON))


# TSO ----------------------------------------------------------------------------------------------
@pytest.mark.parametrize("K, shares", [(8, [3, 3, 2]), (3, [1, 1, 1]), (4, [2, 1, 1])])
def test_the_matrix_responds_in_equal_shares_and_humans_come_after_it(K, shares):
    models, args = builtin_models(1, 0, 2), osp.Arguments(num_generations=K, max_new_tokens=6)
    said = [["rain is warm .", "snow is ugly ."], ["tea is sweet .", "tea is awful ."]]
    rows = osp.distinct_prompts(models.tokenizer, [(RAIN, *texts) for texts in said], 1)
    for step in (0, 1, 2):
        [found] = osp.tso(args).sample(models, rows, step, args)
        sources = [one.source for one in found]
        assert [sources.count(role) for role in ("policy", "reference", "start")] == shares
        assert sources[0] == "policy"  # the baseline of ranking is on-policy
        assert [one.text for one in found[K:]] == said[step % 2]
        assert sources[K:] == list(osp.HUMAN)
        for one in found[K:]:
            assert [one.ids] == osp.encode_responses(models.tokenizer, [RAIN], [one.text], 6)
    [alone] = osp.respond(models.reference, models.tokenizer, rows, range(1, K, 3), 2, args)
    assert [one.ids for one in alone] == [one.ids for one in found if one.source == "reference"]


def test_a_matrix_model_may_have_another_tokenizer(tmp_path):
    other, models = saved(tmp_path, PIECES), builtin_models(1, 0, 2)
    args = arguments(f"--num_generations 4 --max_new_tokens 6 --matrix_model_names_or_paths {other}")
    rows = osp.distinct_prompts(models.tokenizer, [(RAIN,)], 1)
    [found] = osp.tso(args).sample(models, rows, 0, args)
    assert [one.source for one in found] == ["policy", "reference", "start", other]
    assert [found[3].ids] == osp.encode_responses(models.tokenizer, [RAIN], [found[3].text], 6)
    assert max(found[3].ids) < len(models.tokenizer)


def test_corrections_keep_sure_verdicts_and_let_a_human_overrule_the_judge(monkeypatch):
    sources = [("policy", "start")] * 3 + [osp.HUMAN, osp.HUMAN[::-1], (osp.HUMAN[0], "start")]
    verdicts, pairs = [0.7, 0.55, 0.3, 0.3, 0.3, 0.3], []
    for p, (one, two) in zip(verdicts, sources):
        sides = osp.Candidate([5], "a", one), osp.Candidate([6], "b", two)
        pairs.append(pair_of(*sides, verdicts=(p, 1 - p)))
    monkeypatch.setattr(osp, "judge_pairs", lambda *_: verdicts)
    labels = osp.corrected_labels(None, pairs, osp.Arguments(label_margin=0.1))
    assert labels == [1.0, None, 0.0, 1.0, 0.0, 0.0]  # two humans' label stands, one's is judged
    for pair, label in zip(pairs, labels):
        pair.strength = label
    del pairs[1]
    reward_1, reward_2 = torch.tensor([0.3, 0.1, 0.1, 0.5, 0.1]), torch.tensor([-0.3, 0.1, 0.3, 0.1, 0.1])
    figures = osp.tso_figures(pairs, reward_1, reward_2, clip=0.2)
    assert figures["overruled_verdicts"] == 1  # the human chose what the judge gave 0.3
    assert figures["winners_clipped"] == figures["losers_clipped"] == pytest.approx(1 / 5)
    assert figures["written_by"] == {"policy": 2, "start": 3, osp.HUMAN[0]: 3, osp.HUMAN[1]: 2}


def test_the_reference_becomes_the_policy_every_so_many_steps():
    models, args = builtin_models(1, 0, 2), osp.Arguments(reference_steps=3)
    policy, start, reference = map(weights_of, (models.policy, models.start, models.reference))
    for step, expected in enumerate([reference, reference, policy]):
        osp.move_reference(models, step, args)
        assert torch.equal(weights_of(models.reference), expected)
    models.policy.lm_head.weight.data += 1.0
    assert torch.equal(weights_of(models.reference), policy)  # a copy
    assert torch.equal(weights_of(models.start), start)


def test_the_checkpoint_has_the_reference_that_moved(finished):
    folder = finished["tso"].folder
    assert not same_weights(state_of(folder / "checkpoint-4")["reference"], weights_in(folder / "sft"))
    assert "reference" not in state_of(finished["osp"].folder / "checkpoint-4")


def test_tso_on_a_real_model_without_human_responses(tmp_path, real):
    folder, words = real
    more = "--method tso --max_steps 2 --label_margin 1e-9 --eval_judge_name_or_path"
    found = run(tmp_path, words, more, str(folder / "model"))
    assert len(found.lines) == 2
    assert found.said.count("no human responses") == 1
    assert not found.summary["self_judged"]


# Data collection ----------------------------------------------------------------------------------
COLLECT = """--method collect --num_labels 3 --min_strength 0.5001 --max_strength 1 --max_similarity 1
    --keep_prompts 1"""


def labels_in(folder):
    return [json.loads(line) for line in (folder / "preferences.jsonl").read_text().splitlines()]


def test_the_built_in_task_collects_by_the_truth_and_the_result_trains(tmp_path):
    with stopped("No pair is left to ask about"):
        osp.main(command(tmp_path / "none", COLLECT, "--min_strength 0.999"))
    tmp_path /= "run"
    summary = osp.main(command(tmp_path, COLLECT))
    rows = labels_in(tmp_path)
    assert summary["labels"] == 3 == len(rows)
    assert summary["prompts"] == 12 == summary["prompts_kept"]
    assert {(row["labeller"], row["chosen_from"]) for row in rows} == {("truth", "start")}
    read = osp.load_preferences(str(tmp_path / "preferences.jsonl"))
    assert read == [{name: row[name] for name in ("prompt", "chosen", "rejected")} for row in rows]
    assert json.loads((tmp_path / "summary.json").read_text()) == summary
    again = osp.main(command(tmp_path, COLLECT, "--overwrite_output_dir --num_labels 1"))
    assert again["labels"] == 1 == len(labels_in(tmp_path))  # nothing of the first run was left


def test_each_answer_is_safe_and_the_same_command_goes_on(tmp_path, monkeypatch, capsys, real):
    def collect(more=""):
        return osp.main(command(tmp_path, COLLECT, real[1], more))

    def answers():
        return json.loads((tmp_path / "answers.json").read_text())

    monkeypatch.setattr("sys.stdin", io.StringIO("1\nx\ns\n2\nu\n"))  # as a human or a program would
    with stopped("2 answers are in .*the same command, without --overwrite.*, goes on", code=0):
        collect()  # the input ended, as with q
    assert answers() == ["1", "s"]
    assert "'x' is none of these keys" in capsys.readouterr().out
    first = labels_in(tmp_path)
    with monkeypatch.context() as patches:
        patches.setattr("builtins.input", mock.Mock(side_effect=["2", KeyboardInterrupt]))
        with pytest.raises(KeyboardInterrupt):
            collect()
    assert answers() == ["1", "s", "2"]
    with stopped("num_labels was 3, is 4"):
        collect("--num_labels 4")
    monkeypatch.setattr("sys.stdin", io.StringIO("q\n"))
    with stopped("3 answers are in", code=0):
        collect()
    monkeypatch.setattr("sys.stdin", io.StringIO("1\n"))
    assert collect()["labels"] == 3
    rows = labels_in(tmp_path)
    assert rows[: len(first)] == first and len(rows) == 3 and {row["labeller"] for row in rows} == {"human"}
    with stopped("already holds a run: give .*, or replace it with --overwrite_output_dir.$"):
        collect()
    with stopped("lie in one another"):
        collect(f"--overwrite_output_dir --dataset_name {tmp_path / 'preferences.jsonl'}")


@given(st.lists(st.tuples(TEXT, TEXT, TEXT, st.sampled_from("12s")), min_size=1, max_size=5))
@settings(max_examples=40, deadline=None)
def test_whatever_responses_hold_the_file_reads_back_exactly(tmp_path_factory, questions):
    asked, expected = [], []
    for prompt, one, two, answer in questions:
        texts = {"prompt": prompt, "one": one, "two": two}
        asked.append((texts | {"one_from": "a", "two_from": "b", "strength": 0.25}, answer))
        if answer == "1":
            expected.append((prompt, one, two, 0.25, "a"))
        if answer == "2":
            expected.append((prompt, two, one, 0.75, "b"))
    args = osp.Arguments(output_dir=tmp_path_factory.getbasetemp())
    osp.write_preferences(asked, "human", args)
    lines = (args.output_dir / "preferences.jsonl").read_text("utf-8").split("\n")[:-1]
    names = ("prompt", "chosen", "rejected", "strength", "chosen_from")
    assert [tuple(json.loads(line)[name] for name in names) for line in lines] == expected


def test_no_character_of_a_response_controls_the_terminal(monkeypatch, capsys):
    monkeypatch.setattr("sys.stdin", io.StringIO("1\n"))
    evil = "\x1b[2Jred\x07\x9b5n \u202eright to left\ttab é 雪"
    osp.read_answer({"prompt": "hi", "one": evil, "two": "fine"}, "0 of 3")
    said = capsys.readouterr().out
    assert not any(mark in said for mark in "\x1b\x07\x9b\u202e\t") and "é 雪" in said and "red" in said


def test_the_steps_of_collection_by_hand():
    """Prompts whose scores spread most are kept; the filter drops and counts."""
    scores = [[0.5, 0.5, 0.5], [0.1, 0.9, 0.5], [0.4, 0.6, 0.5], [0.5, 0.8, 0.5]]
    candidates = [[osp.Candidate([], "", score=score) for score in row] for row in scores]
    assert osp.widest_spreads(candidates, 0.5) == [1, 3]
    assert osp.widest_spreads(candidates, 0.01) == [1]
    pairs = [pair_of(*texts) for texts in [
        ("a b c", "d e f", 0.7), ("a b c", "a b c"), ("a b c d", "a b c e", 0.7), ("a", "b", 0.52),
        ("c", "d", 0.3), ("e", "f", 0.97), ("g", "h", 0.02), ("i\n\nHuman:", "j", 0.7), ("k l", "k m", 0.8)]]
    questions, counts = osp.worth_asking(pairs, osp.Arguments(max_similarity=0.7))
    assert counts == {"pairs": 9, "usable": 7, "not_alike": 6, "no_tie": 5, "no_landslide": 3, "questions": 2}
    assert [{question["one"], question["two"]} for question in questions] == [{"a b c", "d e f"}, {"c", "d"}]
    for question in questions:  # the strength is that of the first one shown
        expected = {"a b c": 0.7, "d e f": 0.3, "c": 0.3, "d": 0.7}[question["one"]]
        assert question["strength"] == pytest.approx(expected)
    shown = [osp.worth_asking(pairs, osp.Arguments(seed=seed))[0][0]["one"] for seed in range(20)]
    assert len(set(shown)) > 1  # in random order


# Golden vectors for ports -------------------------------------------------------------------------
VECTORS_README = """# Golden vectors of osp.py

`make vectors` writes them. A port must agree with pure.json and logps.safetensors (float64) to 1e-9 relative
or 1e-12 absolute, and with steps.* (float32) to 1e-3 relative or 1e-4 absolute. Ids, lengths, masks and pairs
are exact. Logarithms are natural. B = 3 prompts a step, K = 4 responses a prompt, P pairs or cases, N
sequences, T tokens of the longest response, L of the longest whole sequence.

## pure.json
* `strength`: `logits_12`, `logits_21` (P, 2) are a judge's logits of the verdicts A and B, with response 1
  shown as A, and with response 2 shown as A. `p_12`, `p_21` (P,) = the softmax's probability of A. `strength`
  (P,), the probability that response 1 is better, = (p_12 + (1 - p_21)) / 2, in this form.
* `ranking`: 8 responses to one prompt. The first is the baseline, always shown as A; each of the 8, itself
  included, is shown as B. `logits` (8, 2) of A and B; `scores` (8,) = 1 - probability of A.
* `pairs`, a list: `scores` of a prompt's responses, and `ranked`, pairs [better, worse] of their indices.
  Sort by falling score; ties keep their order. Pair the first with the last, the second with the last but
  one, and so on inwards; an odd number leaves out the middle one.
* `logps`: what logps.safetensors pads. `prompt_ids`, `response_ids`: N lists. `pad`: the id of padding, which
  is a real token elsewhere, so mask by position and never by id.
* `spce`: of `reward_1`, `reward_2`, `strength` (P,), with h = reward_1 - reward_2 and p = strength, `loss`
  (P,) = -[p log sigmoid(h) + (1 - p) log sigmoid(-h)], never inf or nan. `gradient_1` (P,) = d loss / d
  reward_1 = (1 - p) sigmoid(h) - p sigmoid(-h); the shorter sigmoid(h) - p loses digits where h is large.
  `gradient_2` (P,) = d loss / d reward_2 = -gradient_1.
* `dual_clip`: a variant's loss, after TSO (arXiv 2409.02118), formulas reconstructed, of `reward_1`,
  `reward_2`, `label`, `clip` (P,). Where label > 0.5 response 1 is the winner and 2 the loser, else the
  reverse. `loss` (P,) = -log sigmoid(min(winner's reward, clip) - max(loser's reward, -clip)). `gradient_1`,
  `gradient_2` (P,) as above: 0 for a winner above clip, and 0 for a loser below -clip.
* `adamw`: two steps from the parameters `start` (5,) with `gradients` (2, 5), not yet clipped. After each:
  `parameters` (2, 5); in each: `grad_norms` (2,) before clipping, `learning_rates` (2,). Clipping: g *=
  min(1, 1 / (norm + 1e-6)), the norm over all parameters. AdamW: betas 0.9 and 0.95, eps 1e-8 added outside
  the root, both moments bias-corrected, no weight decay.
* `schedules`: by name, the learning rates (20,) of steps 0 to 19 at peak 1. Steps 0 and 1, the warm-up, have
  step / 2. Then, with u = (step - 2) / 18, linear has 1 - u, cosine (1 + cos(pi u)) / 2 and
  constant_with_warmup 1. `constant` has no warm-up: it is always 1.

## logps.safetensors (ids, masks and positions int64)
Prompts are padded on the left and responses on the right, so that all meet at one column: `input_ids`,
`attention_mask` (N, L). `position_ids` (N, L) = max(cumsum(attention_mask) - 1, 0). `logits` (N, L, 8) go in;
those at a place score the NEXT token. `token_logps` (N, T): log-probabilities of the responses' tokens, 0
beyond their ends. `logps` (N,): their sums, EOS included, prompt excluded.

## model.json and weights.safetensors (float32): pi_SFT, which is judge, reference and the first policy
A Llama. x = embed_tokens[ids]. Each layer does x += attention(rms(x)), then x += mlp(rms(x)). At last logits
= rms(x) @ embed_tokens.T. The rms before attention, before mlp and at last have the weights input_layernorm,
post_attention_layernorm and model.norm: rms(x) = weight * x / sqrt(mean(x^2) + `rms_norm_eps`). mlp(x) =
down(silu(gate(x)) * up(x)). Matrices are (out, in): y = x @ W.T, without biases. Attention is causal, its
scale 1 / sqrt(head_dim). Head i takes the columns from i * head_dim up to (i + 1) * head_dim of q, k and v.
Padding is masked out as a key. A padded query on the left then has no key: its output is not used but must be
finite, so mask with a large negative number, not -inf. RoPE turns q and k: at position m, for j < head_dim /
2, with the angle a = m * `rope_theta` ** (-2j / head_dim), the elements (j, j + head_dim / 2) = (u, w) become
(u cos a - w sin a, w cos a + u sin a).

Ids: 0 padding, 1 EOS, 5 and 6 the verdicts A and B. The judge's question about a prompt x, with a response a
shown as A and b as B, is x 2 a 3 b 4, where a and b lose their EOS. Its verdict's logits are those of 5 and 6
at its last token.

## steps.json: `arguments` of osp.py that matter, and `steps`, a list of three
* `prompt_ids`: B lists. `responses`: B x K lists, given here where a real run samples. Those without EOS were
  cut off at `max_new_tokens`.
* `pairs`: P triples [prompt, better, worse] of indices, prompt by prompt, from the outermost pair inwards,
  without pairs of equal ids. Equal questions are asked once, so equal responses tie exactly.
* `metrics`: `step`, counted from 1. `pairs`: P. `dropped_identical_pairs`: how many were left out.
  `dropped_unsure_pairs`: 0. `loss`, `strength_mean`, `margin`: means over the P pairs of losses, strengths
  and h = reward of the better - reward of the worse. `strength_std` divides by P. `kl`: mean over the 2 P
  responses of log-probability under the policy less that under pi_SFT. `margin_accuracy`: share of pairs
  where h > 0 and strength > 1/2 are both true or both false; not in step 1, whose h are 0 but for rounding.
  `order_agreement`: the same of p_12 > 1/2 and p_21 < 1/2, with the better response as 1. `response_tokens`:
  mean length of the B K responses, EOS included. `cut_fraction`: share of them without EOS.
  `distinct_fraction`: how many different ones there are, over B K. `learning_rate`: the one used: that of
  `arguments` in step 1, 2/3 of it in step 2, 1/3 in step 3. `grad_norm`: before clipping.

A step's loss is the mean of spce over its P pairs, with the better response as 1. A reward is beta * (the
response's log-probability under the policy - that under pi_SFT). The policy is what the step before left.
Clipping and AdamW are as above.

## steps.safetensors (float32; questions and lengths int64): a name ends with its step, as in `scores.1`
* `rank_questions` (B, K, L): response 0 as A and response k as B, padded on the right with 0. `rank_lengths`
  (B, K), `rank_logits` (B, K, 2) and `scores` (B, K) belong to them.
* `pair_questions` (P, 2, L): of each pair with the better response as A, then with the worse one as A.
  `pair_lengths` (P, 2), `pair_logits` (P, 2, 2). `strength` (P,): how likely the better one is better.
* `ref_token_logps`, `policy_token_logps` (P, 2, T), `rewards` (P, 2): of the better and of the worse
  response, before the update. ref is pi_SFT. `losses` (P,).
* `gradient.<parameter>`: of the mean loss, before clipping. `after.<parameter>`: the policy after the step.
  Where a gradient is near 0, Adam's first steps depend on its last digits: hence the tolerance.
"""
VECTOR_ARGUMENTS = {
    "num_generations": 4, "max_new_tokens": 6, "beta": 0.5, "learning_rate": 0.003,
    "lr_scheduler_type": "linear", "warmup_steps": 0, "max_grad_norm": 1.0, "micro_batch_size": 96}
VECTOR_SHAPE = {
    "vocab_size": 32, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2,
    "num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 8, "rms_norm_eps": 1e-6}


class GivenLogits(torch.nn.Module):
    """A causal language model that looks its logits up: after the id i at position t they are table[t, i]."""

    config, device = transformers.LlamaConfig(), torch.device("cpu")

    def __init__(self, table):
        super().__init__()
        self.table = torch.tensor(table)
        self.eval()

    def forward(self, input_ids, position_ids, logits_to_keep, **_):
        self.position_ids = position_ids
        logits = self.table[position_ids, input_ids]
        return types.SimpleNamespace(logits=logits[:, -logits_to_keep:])


def as_text(ids):
    """Ids with spaces between them, without EOS."""
    return " ".join(str(word) for word in ids if word != 1)


def id_questions(tokenizer, prompts, shown_as_a, shown_as_b, limit=None):
    """The judge's questions of VECTORS_README, of texts as as_text makes them."""
    texts = [f"{x} 2 {a} 3 {b} 4" for x, a, b in zip(prompts, shown_as_a, shown_as_b)]
    return [list(map(int, text.split())) for text in texts]


def verdict_vectors(args):
    """`strength` and `ranking` of pure.json. The questions 2 3 7 ... 7 4 end at different positions, where
    the tables have the given logits."""
    logits = np.random.default_rng(0).normal(0, 3, (2, 8, 2)).round(2)
    logits[:, 0] = 0
    logits[:, 1] = [500, -500], [-500, 500]  # exp() must not overflow
    tables = np.zeros((2, 10, 8, 8))
    tables[:, 2:, 4, 5:7] = logits
    judge_12, judge_21 = map(GivenLogits, tables)
    nothing, texts = [""] * 8, ["7 " * k for k in range(8)]
    p_12, p_21 = [
        osp.verdict_probabilities(judge, None, nothing, nothing, texts) for judge in (judge_12, judge_21)]
    strength = osp.averaged_strength(*torch.tensor(np.array([p_12, p_21])))
    candidates = [osp.Candidate([], text) for text in texts]
    models = osp.Models(None, None, judge=judge_21)
    [scores] = osp.ranking_scores(models, [row_of("")], [candidates], args)
    logits_12, logits_21 = logits.tolist()
    return {"strength": {"logits_12": logits_12, "logits_21": logits_21, "p_12": p_12, "p_21": p_21,
                         "strength": strength.tolist()},
            "ranking": {"logits": logits_21, "scores": scores}}


def pair_vectors():
    """`pairs` of pure.json: few different scores, so that there are ties."""
    rng, found = np.random.default_rng(0), []
    for size in range(2, 10):
        scores = (rng.integers(0, 5, size) / 4).tolist()
        found.append({"scores": scores, "ranked": osp.ranked_pairs(scores)})
    return found


def logps_vectors():
    """`logps` of pure.json, and the arrays of logps.safetensors."""
    prompts = [[3, 4, 5], [6], [4, 2], [5, 3]]
    responses = [[2, 1], [3, 0, 5, 1], [1], [0, 6, 6, 2, 4]]
    table = np.random.default_rng(0).normal(0, 3, (8, 8, 8)).round(3)
    table[2, 5, [2, 4]] = -900, 800  # exp() must not overflow
    model = GivenLogits(table)
    ids, mask = osp.padded(prompts, responses, "cpu")
    arrays = {"input_ids": ids, "attention_mask": mask, "logits": osp.forward(model, ids, mask)}
    arrays["position_ids"] = model.position_ids
    arrays["token_logps"] = osp.token_logps(model, prompts, responses)
    arrays["logps"] = osp.response_logps(model, prompts, responses, micro_batch_size=2)
    return {"prompt_ids": prompts, "response_ids": responses, "pad": 0}, arrays


def loss_vectors(loss, **grid):
    """The points of a grid, the losses, and their gradients with respect to the rewards."""
    points = list(itertools.product(*grid.values()))
    columns = torch.tensor(points, dtype=torch.float64).T
    rewards = columns[:2].clone().requires_grad_()
    losses = loss(*rewards, *columns[2:])
    [gradients] = torch.autograd.grad(losses.sum(), rewards)
    names = [*grid, "loss", "gradient_1", "gradient_2"]
    return {name: value.tolist() for name, value in zip(names, [*columns, losses, *gradients])}


def adamw_vectors(args):
    """`adamw` of pure.json."""
    start, *gradients = np.random.default_rng(0).normal(0, 2, (3, 5)).round(2)
    gradients[0][:2] = 0, 1e-9
    weights = torch.nn.ParameterList(torch.tensor(start).split([3, 2]))
    models = osp.Models(None, weights)
    parameters, grad_norms, rates = [], [], []
    osp.start_training(models, 0.01, 4, args)
    for gradient in gradients:
        weights[0].grad, weights[1].grad = torch.tensor(gradient).split([3, 2])
        rates += models.scheduler.get_last_lr()
        grad_norms.append(osp.optimizer_step(models, 0.0, "", args))
        parameters.append(torch.cat(list(weights)).tolist())
    return {"start": start.tolist(), "gradients": np.array(gradients).tolist(),
            "parameters": parameters, "grad_norms": grad_norms, "learning_rates": rates}


def vector_model():
    """A Llama of 4,944 parameters."""
    rng = np.random.default_rng(2)
    config = transformers.LlamaConfig(**VECTOR_SHAPE, tie_word_embeddings=True)
    model = transformers.LlamaForCausalLM(config)
    for name, weight in model.named_parameters():
        mean, deviation = (1.0, 0.1) if "norm" in name else (0.0, 0.4)
        weight.data = torch.tensor(rng.normal(mean, deviation, weight.shape)).float()
    return model


def given_samples(rng):
    """A step's rows and candidates, whose source is their number. Some are cut off, some identical."""
    rows, candidates = [], []
    for i in range(3):
        prompt = rng.integers(7, 32, 2 + i).tolist()
        rows.append(row_of(as_text(prompt), i, prompt))
        ids = [(rng.integers(7, 32, length).tolist() + [1])[:6] for length in rng.integers(0, 7, 4)]
        ids[2] = ids[i]
        if i == 0:
            ids[1] = ids[0]  # three of a kind, so a pair of identical ones is dropped
        candidates.append([osp.Candidate(one, as_text(one), k) for k, one in enumerate(ids)])
    return rows, candidates


def question_vectors(name, judge, questions, *shape):
    """Questions as ids, their lengths, and the judge's logits of A and B, in this shape."""
    ids, mask = osp.padded([[]] * len(questions), questions, "cpu")
    lengths = mask.sum(1)
    logits = osp.forward(judge, ids, mask)[torch.arange(len(ids)), lengths - 1, 5:7]
    return {name + "_questions": ids.reshape(*shape, -1),
            name + "_lengths": lengths.reshape(shape),
            name + "_logits": logits.reshape(*shape, 2)}


def step_vectors(models, rows, candidates, step, args):
    """A step's entry of steps.json and its arrays: osp.train_step with given responses, watched at work."""
    before = copy.deepcopy(models.policy).requires_grad_(False)
    found, optimizer_step = {}, osp.optimizer_step

    def watched(models, *rest):
        for name, weight in models.policy.named_parameters():
            found["gradient." + name] = weight.grad.clone()
        return optimizer_step(models, *rest)

    method = osp.Method(sample=lambda *_: candidates)
    with mock.patch.object(osp, "optimizer_step", watched):
        metrics, _, pairs = osp.train_step(models, rows, method, step, args)
    for name, weight in models.policy.named_parameters():
        found["after." + name] = weight.detach().clone()
    pairs = [pair for pair in pairs if pair.strength is not None]
    responses, P = sum(candidates, []), len(pairs)
    ranking, judging = osp.encode_questions.call_args_list[-2:]
    questions = id_questions(*judging.args)
    both_orders = sum(zip(questions[:P], questions[P:]), ())  # of a pair side by side
    found |= question_vectors("rank", models.judge, id_questions(*ranking.args), 3, 4)
    found |= question_vectors("pair", models.judge, both_orders, P, 2)
    found["scores"] = torch.tensor([one.score for one in responses]).reshape(3, 4)
    found["strength"] = torch.tensor([pair.strength for pair in pairs])
    seen = torch.tensor([pair.seen for pair in pairs])
    found["losses"], found["rewards"] = seen[:, 0], seen[:, 1:]
    for name, model in (("ref", models.reference), ("policy", before)):
        token_logps = osp.token_logps(model, *osp.prompts_and_responses(pairs))
        found[name + "_token_logps"] = token_logps.reshape(2, P, -1).transpose(0, 1)
    metrics = {name: value for name, value in metrics.items() if "second" not in name}
    if step == 0:
        del metrics["margin_accuracy"]  # its margins are 0 but for rounding
    entry = {"prompt_ids": [row.ids for row in rows],
             "responses": osp.chunks([one.ids for one in responses], 4),
             "pairs": [[pair.row.index, pair.better.source, pair.worse.source] for pair in pairs],
             "metrics": metrics}
    return entry, {f"{name}.{step + 1}": array.contiguous() for name, array in found.items()}


def write_vectors(folder):
    """Fills the folder with VECTORS_README and what it explains."""
    args, sft = osp.Arguments(**VECTOR_ARGUMENTS), vector_model()
    models = osp.Models(types.SimpleNamespace(eos_token_id=1), copy.deepcopy(sft), sft, sft, sft)
    weights = dict(sft.requires_grad_(False).named_parameters())
    asked, verdicts = mock.Mock(side_effect=id_questions), mock.Mock(return_value=("", 5, 6))
    rng, entries, tensors = np.random.default_rng(15), [], {}
    schedules = ["linear", "cosine", "constant", "constant_with_warmup"]
    with mock.patch.multiple(osp, encode_questions=asked, verdict_format=verdicts):
        with mock.patch.object(torch.Tensor, "float", torch.Tensor.double):
            pure = verdict_vectors(args) | {"adamw": adamw_vectors(args)}
            pure["schedules"] = {name: rates_of(name, 0.1) for name in schedules}
            pure["logps"], logps = logps_vectors()
        osp.start_training(models, args.learning_rate, 3, args)
        for step in range(3):
            entry, found = step_vectors(models, *given_samples(rng), step, args)
            entries.append(entry)
            tensors |= found
    pure["pairs"] = pair_vectors()
    pure["spce"] = loss_vectors(
        osp.spce_loss, reward_1=[-5000, -64, -7.5, 0.25, 64, 5000], reward_2=[0, 0.25],
        strength=[0, 1e-6, 0.25, 0.5, 1])
    sides = [-300, -0.5, -0.1, 0.1, 0.5, 300]  # none is a clip, where there would be no one gradient
    pure["dual_clip"] = loss_vectors(
        osp.dual_clip_loss, reward_1=sides, reward_2=sides, label=[0, 1], clip=[0.2, 1, 1000])

    folder.mkdir(parents=True, exist_ok=True)
    (folder / "README.md").write_text(VECTORS_README)
    model = VECTOR_SHAPE | {"rope_theta": 10000.0}
    steps = {"arguments": VECTOR_ARGUMENTS, "steps": entries}
    for name, value in (("pure", pure), ("model", model), ("steps", steps)):
        (folder / f"{name}.json").write_text(json.dumps(value, indent=1, allow_nan=False) + "\n")
    for name, arrays in (("logps", logps), ("weights", weights), ("steps", tensors)):
        safetensors.torch.save_file(arrays, folder / f"{name}.safetensors")


def golden(folder):
    """What GOLDEN has of the files: a digest of all but the floats, and by name a sum of the floats. Each has
    its own weight in it, and arcsinh keeps the large from hiding the small. The three steps count as one."""
    named, exact, found = {}, [], {}
    for file in ("pure", "steps"):
        for name, value in json.loads((folder / f"{file}.json").read_text()).items():
            named[f"{file}.{name}"] = value
    for file in ("logps", "steps"):
        arrays = safetensors.torch.load_file(folder / f"{file}.safetensors")
        for name, array in sorted(arrays.items()):
            kind = f"{file}.{name.split('.')[0]}"
            named.setdefault(kind, []).append([name, str(array.dtype), array.tolist()])
    for name, value in named.items():
        floats = []
        text = json.dumps(value)
        exact.append(json.loads(text, parse_float=floats.append))  # which puts null in their place
        weights = np.cos(np.arange(len(floats)))
        if floats:
            found[name] = float(np.arcsinh(np.array(floats, dtype=float)) @ weights)
    digest = hashlib.sha256(json.dumps(exact).encode()).hexdigest()
    return found | {"digest": digest[:20]}


GOLDEN = json.loads("""
{"pure.strength": 12.7557205419, "pure.ranking": -3.89344540882, "pure.adamw": 2.32150032049,
"pure.schedules": -2.11416860685, "pure.pairs": -0.53486470179, "pure.spce": 21.1455301264,
"pure.dual_clip": 65.3513071446, "steps.arguments": 0.116052, "steps.steps": -2.11138, "logps.logits":
22.8951510223, "logps.logps": -4.91347741925, "logps.token_logps": -9.62588851089, "steps.after": 3.1003,
"steps.gradient": 3.28385, "steps.losses": 0.655635, "steps.pair_logits": 3.72027,
"steps.policy_token_logps": 4.27228, "steps.rank_logits": -0.133597, "steps.ref_token_logps": 4.64545,
"steps.rewards": -0.5367, "steps.scores": -0.263052, "steps.strength": 0.726984, "digest":
"73f438ad54c280ab6f0d"}""")


def test_vectors(tmp_path):
    """The numbers that ports are checked with are those of yesterday."""
    write_vectors(tmp_path)
    found = golden(tmp_path)
    assert found.pop("digest") == GOLDEN["digest"]
    for name, value in found.items():
        # float32 rounds by 6e-8 and a log-probability, of size 10, is good to 1e-5. Weights that are wrong by
        # 1e-7 change no sum by more than 2e-5
        tolerance = 1e-4 if name.startswith("steps") else 1e-9
        assert value == pytest.approx(GOLDEN[name], rel=tolerance, abs=tolerance), name
    arrays = safetensors.torch.load_file(tmp_path / "steps.safetensors")
    for row in torch.cat([arrays[f"scores.{step}"] for step in (1, 2, 3)]):
        assert row.unique().diff().min() > 0.01  # no near tie, which other processors could rank otherwise


# Variants: what the paper compares, and TSO in parts ----------------------------------------------
def dpo_loss(reward_1, reward_2, strength):
    """DPO on the same pairs: strengths rounded to 0 or 1; ties stay 1/2."""
    rounded = (strength > 0.5).to(strength).where(strength != 0.5, 0.5)
    return osp.spce_loss(reward_1, reward_2, rounded)


def ipo_loss(reward_1, reward_2, strength, beta):
    """(h / beta - 1 / (2 beta))^2, h from winner to loser; a tie pulls nowhere. Azar et al., eq. 17."""
    side = (strength - 0.5).sign()
    return (side * (reward_1 - reward_2) / beta - 1 / (2 * beta)) ** 2


def sample_once(models, rows, step, args):
    """K responses of pi_SFT with step 0's noise: the same ones in every epoch."""
    return osp.respond(models.start, models.tokenizer, rows, range(args.num_generations), 0, args)


def data_responses(models, rows, step, args):
    """The data's own chosen and rejected responses in turn, of at most K//2 pairs."""
    candidates = []
    for row in rows:
        texts = sum(map(list, row.responses[: args.num_generations // 2]), [])
        prompts = [row.prompt] * len(texts)
        ids = osp.encode_responses(models.tokenizer, prompts, texts, args.max_new_tokens)
        candidates.append([osp.Candidate(one, text, "data") for one, text in zip(ids, texts)])
    return candidates


def random_scores(models, rows, candidates, args):
    """Uniform scores, a function of what was sampled, so that a resumed run draws the same ones."""
    scores = []
    for row, found in zip(rows, candidates):
        ids = [token for candidate in found for token in candidate.ids]
        rng = np.random.default_rng((args.seed, row.index, *ids))
        scores.append(rng.random(len(found)).tolist())
    return scores


def adjacent_pairs(scores):
    """Best with second best, and so on downwards; an odd K leaves out the worst."""
    order = sorted(range(len(scores)), key=lambda k: -float(scores[k]))
    return list(zip(order[::2], order[1::2]))


def one_order(models, pairs, args):
    """The first verdict alone."""
    osp.judge_pairs(models, pairs, args)
    return [pair.verdicts[0] for pair in pairs]


def noisy_labels(models, pairs, args, noise, drawn):
    """What a judge says whose verdict is turned round with probability `noise`, (1 - e) p + e (1 - p); or
    a 0/1 label `drawn` from it, a function of the pair, so that it is the same in every epoch."""
    labels = []
    for pair, p in zip(pairs, osp.judge_pairs(models, pairs, args)):
        p = (1 - noise) * p + noise * (1 - p)
        if drawn:
            key = (args.seed, pair.row.index, *pair.better.ids, *pair.worse.ids)
            p = float(np.random.default_rng(key).random() < p)
        labels.append(p)
    return labels


def labels_by_source(models, pairs, args):
    """TSO without corrections: the label goes by who wrote the two; pairs of one writer are dropped."""
    osp.judge_pairs(models, pairs, args)  # its verdicts are figures of metrics.jsonl only
    prior = [*osp.HUMAN, "policy", "reference", "start"]
    labels = []
    for pair in pairs:
        better, worse = prior.index(pair.better.source), prior.index(pair.worse.source)
        labels.append(None if better == worse else float(better < worse))
    return labels


def changed(method, **stages):
    """A method of METHODS with some stages replaced."""
    return lambda args: dataclasses.replace(method(args), **stages)


def tso_sampling(roles, with_human):
    """TSO with another model matrix."""
    return lambda args: dataclasses.replace(
        osp.tso(args), sample=osp.matrix_method(roles, args, with_human).sample)


OSP = osp.METHODS["osp"]
OFFLINE = changed(  # the scores fall, so that neighbours pair as they stand
    OSP, sample=data_responses, pair=adjacent_pairs,
    score=lambda models, rows, candidates, args: [range(len(found), 0, -1) for found in candidates])
VARIANTS = {
    "spce": OSP,
    "dpo": changed(OSP, loss=dpo_loss),
    "ipo": lambda args: osp.Method(loss=functools.partial(ipo_loss, beta=args.beta)),
    "sampled_once": changed(OSP, sample=sample_once),
    "offline_dpo": changed(OFFLINE, strength=lambda models, pairs, args: [1.0] * len(pairs)),
    "offline_spce": OFFLINE,
    "random": changed(OSP, score=random_scores),
    "best_worst": changed(OSP, pair=lambda scores: osp.ranked_pairs(scores)[:1]),
    "adjacent": changed(OSP, pair=adjacent_pairs),
    "one_order": changed(OSP, strength=one_order),
    "tso": osp.tso,
    "tso_policy_only": tso_sampling(["policy"], with_human=True),
    "tso_no_human": tso_sampling(["policy", "reference", "start"], with_human=False),
    "tso_no_corrections": changed(osp.tso, strength=labels_by_source),
    "tso_no_clip": lambda args: osp.tso(dataclasses.replace(args, dual_clip=math.inf)),
    "tso_fixed": changed(osp.tso, after_step=osp.Method().after_step, moves_reference=False)}
for percent in ("00", "20", "40"):
    for kind in ("noisy", "drawn"):
        labels = functools.partial(noisy_labels, noise=int(percent) / 100, drawn=kind == "drawn")
        VARIANTS[f"{kind}_{percent}"] = changed(OSP, sample=sample_once, strength=labels)


def run_variant(name, *argv):
    """python test_osp.py run NAME [arguments of osp.py]"""
    osp.METHODS |= VARIANTS
    osp.main(["--method", name, *argv])


def run_with_sft(other, name, *argv):
    """python test_osp.py run_with_sft RUN NAME [arguments of osp.py]: with the pi_SFT of another run. Makes
    the new folder that of a run broken off after SFT; --resume_from_checkpoint latest goes on from there."""
    osp.METHODS |= VARIANTS
    args = vars(osp.parse_arguments(["--method", name, *argv]))
    output, other = args["output_dir"], Path(other)
    if not (output / "arguments.json").exists():
        for option, value in json.loads((other / "arguments.json").read_text()).items():
            if (option == "seed" or "sft" in option) and args[option] != value:
                raise osp.Stop(f"{other} has another pi_SFT: its {option} is {value!r}.")
        shutil.copytree(other / "sft", output / "sft", dirs_exist_ok=True)
        osp.write_text(output / "arguments.json", json.dumps(args, default=str))
    run_variant(name, *argv)


@functools.lru_cache
def builtin_pairs(split):
    """A split's (prompt, chosen, rejected)s."""
    rows = map(osp.parse_row, osp.builtin_preferences()[split])
    return [row for row in rows if isinstance(row, tuple)]


def variant_world(**more):
    """Three random models, six prompts and arguments, to try a variant on."""
    args = dataclasses.replace(arguments("--num_generations 6 --warmup_steps 0"), **more)
    models = builtin_models(0, 1, 2)
    osp.start_training(models, 1e-3, 10, args)
    return models, osp.distinct_prompts(models.tokenizer, builtin_pairs("train"), 6), args


def pairs_at(step, name, models, rows, args):
    """The pairs that a variant makes in a step, as (prompt, better, worse, strength)s."""
    _, pairs = osp.make_pairs(models, rows, VARIANTS[name](args), step, args, {})
    return [(pair.row.index, pair.better.ids, pair.worse.ids, pair.strength) for pair in pairs]


def test_losses_and_pairs_for_comparison_by_hand():
    rewards, p = (torch.tensor([0.1] * 3), torch.tensor([-0.1] * 3)), torch.tensor([0.9, 0.2, 0.5])
    up, down = math.log(1 + math.exp(-0.2)), math.log(1 + math.exp(0.2))
    assert dpo_loss(*rewards, p).tolist() == pytest.approx([up, down, (up + down) / 2])
    expected = [(2 - 5) ** 2, (-2 - 5) ** 2, 25]  # 1 / (2 * 0.1) is 5
    assert ipo_loss(*rewards, p, beta=0.1).tolist() == pytest.approx(expected, rel=1e-5)
    scores = [0.5, 0.9, 0.1, 0.7, 0.6]
    assert VARIANTS["best_worst"](None).pair(scores) == [(1, 2)]
    assert adjacent_pairs(scores) == [(1, 3), (4, 0)]  # the worst is left out


def test_noisy_and_drawn_labels(monkeypatch):
    monkeypatch.setattr(osp, "judge_pairs", lambda models, pairs, args: [0.9] * len(pairs))
    pairs = [pair_of(osp.Candidate([i], ""), "") for i in range(5000)]
    noisy, drawn, again = [
        noisy_labels(None, pairs, osp.Arguments(), 0.25, drawn) for drawn in (False, True, True)]
    assert noisy[0] == pytest.approx(0.75 * 0.9 + 0.25 * 0.1)
    assert set(drawn) == {0.0, 1.0}
    assert np.mean(drawn) == pytest.approx(0.7, abs=0.02)
    assert drawn == again


def test_candidates_of_the_start_are_sampled_once():
    world = variant_world()
    for name in ("sampled_once", "drawn_20"):
        first = pairs_at(0, name, *world)
        assert len(first) >= 15
        assert pairs_at(3, name, *world) == first
    first, again = [pairs_at(0, "random", *world) for _ in range(2)]
    assert first == again
    assert pairs_at(0, "spce", *world) != pairs_at(3, "spce", *world)


@pytest.mark.parametrize("name, labels", [("offline_dpo", {1.0}), ("offline_spce", set())])
def test_candidates_of_the_data_are_its_own(name, labels):
    models, rows, args = variant_world()
    own = sum([row.responses[:3] for row in rows], [])  # K//2 pairs of each
    _, pairs = osp.make_pairs(models, rows, VARIANTS[name](args), 5, args, {})
    assert [[pair.better.text, pair.worse.text] for pair in pairs] == own
    assert models.tokenizer.decode(pairs[0].worse.ids) == pairs[0].worse.text + " <eos>"
    assert {pair.strength for pair in pairs if pair.strength in (0, 1)} == labels


def test_labels_of_tso_without_corrections():
    models, rows, args = variant_world()
    writers = "start", "policy", *osp.HUMAN
    start, policy, chosen, rejected = [osp.Candidate([5, 1], "rain", one) for one in writers]
    pairs = [(start, policy), (policy, start), (policy, rejected), (rejected, chosen), (start, start)]
    pairs = [pair_of(*pair, row=rows[0]) for pair in pairs]
    assert labels_by_source(models, pairs, args) == [0.0, 1.0, 0.0, 0.0, None]


@pytest.mark.parametrize("name", VARIANTS)
def test_every_variant_makes_a_step(name):
    models, rows, args = variant_world(label_margin=1e-6)
    before = weights_of(models.policy)
    metrics, _, _ = osp.train_step(models, rows, VARIANTS[name](args), 0, args)
    assert json.dumps(metrics, allow_nan=False)
    assert metrics["pairs"] > 0
    assert not torch.equal(before, weights_of(models.policy))


def test_a_run_that_takes_anothers_sft_does_what_it_does_with_its_own(tmp_path, monkeypatch, finished):
    monkeypatch.setattr(osp, "METHODS", osp.METHODS | VARIANTS)
    own, taken, other = tmp_path / "own", tmp_path / "taken", finished["osp"]
    run_variant("offline_dpo", *command(own))
    monkeypatch.setattr(osp, "supervised_finetune", None)
    run_with_sft(str(other.folder), "offline_dpo", *command(taken, GO_ON))
    assert read_run(own).lines == read_run(taken).lines != other.lines
    with stopped("its sft_batch_size is 4"):
        run_with_sft(str(other.folder), "spce", *command(tmp_path, "--sft_batch_size 9"))


# Bench: make bench, fixed work --------------------------------------------------------------------
BENCH_PROMPTS, BENCH_PROMPT, BENCH_RESPONSE, BENCH_WORDS = 8, 32, 64, 4096
BENCH_STAGES = ["sample", "rank", "judge", "reference", "update"]


def bench_models(args):
    """A random Llama of 5.3M parameters as policy and as pi_SFT, and a tokenizer of 4,096 words."""
    words = osp.JUDGE_FRAME.format(prompt="> Human:", a=">", b=">").split() + ["A", "B"]
    words = dict.fromkeys(["<eos>", *words, *(f"w{i}" for i in range(BENCH_WORDS))])
    vocabulary = {word: i for i, word in enumerate(list(words)[:BENCH_WORDS])}
    inner = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="<eos>"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="<eos>")
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=BENCH_WORDS, hidden_size=256, intermediate_size=704, num_hidden_layers=4,
        num_attention_heads=4, max_position_embeddings=1024, bos_token_id=None, eos_token_id=0)
    policy = transformers.LlamaForCausalLM(config)
    start = copy.deepcopy(policy).requires_grad_(False)
    if args.bf16:
        start = osp.bf16_copy(start)
    models = osp.Models(tokenizer, policy, start, reference=start, judge=start)
    osp.start_training(models, 1e-4, 100, args)
    return models


def bench_text(length, seed):
    """So many random words."""
    return " ".join(f"w{i}" for i in np.random.default_rng(seed).integers(0, 4000, length))


def step_flops(models, K):
    """A step's arithmetic: twice parameters times tokens for a pass, six times for the update. A prompt,
    and what its questions share, counts once; the output layer counts where its logits are used."""
    head = models.policy.lm_head.weight.numel()
    body = sum(weights.numel() for weights in models.policy.parameters()) - 2 * head  # nor embeddings
    prompt, one, two = [bench_text(n, n) for n in (BENCH_PROMPT, BENCH_RESPONSE, BENCH_RESPONSE + 1)]
    questions = osp.encode_questions(models.tokenizer, [prompt] * 3, [one, one, two], [one, two, one])
    ranking_head = len(os.path.commonprefix(questions[:2]))  # the prompt and A
    judging_head = len(os.path.commonprefix(questions[1:]))  # the prompt
    length, responses = len(questions[0]), K * BENCH_RESPONSE
    asked = ranking_head + K * (length - ranking_head)
    asked += judging_head + 2 * (K // 2) * (length - judging_head)
    scored = (BENCH_PROMPT + responses) * body + responses * head
    return BENCH_PROMPTS * (2 * scored + 2 * asked * body + 2 * scored + 6 * scored)


def timed_matmul(size, dtype=torch.float32):
    """FLOP/s of one matrix product: this machine's own speed, in the same run."""
    matrix, start = torch.randn(size, size).to(dtype), time.perf_counter()
    for _ in range(10):
        matrix @ matrix
    return 10 * 2 * size**3 / (time.perf_counter() - start)


def bench_step(K, precision, threads):
    """Prints the better of two steps of osp.train_step after one to warm up. In a process of its own."""
    torch.set_num_threads(int(threads))
    osp.stop_token_ids = lambda *_: [-1]  # every response runs to its full length
    args = arguments(f"--num_generations {K} --max_new_tokens {BENCH_RESPONSE} --micro_batch_size 16")
    args.bf16 = precision == "bf16"
    models, found = bench_models(args), []
    prompts = [(bench_text(BENCH_PROMPT, i),) for i in range(BENCH_PROMPTS)]
    rows = osp.distinct_prompts(models.tokenizer, prompts, BENCH_PROMPTS)
    for step in range(3):
        metrics, candidates, pairs = osp.train_step(models, rows, osp.Method(), step, args)
        found.append([metrics[f"seconds_{stage}"] for stage in BENCH_STAGES])
    best = min(found[1:], key=sum)
    step, times = sum(best), "".join(f"{seconds:10.2f}" for seconds in [*best, sum(best)])
    tokens = sum(len(one.ids) for row in candidates for one in row)
    speed = step_flops(models, args.num_generations) / step
    share = speed / max(timed_matmul(1024) for _ in range(10))
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    print(f"{K} {precision:>9} {threads:>7} |{times}   | {tokens / step:8.0f} {len(pairs) / step:7.1f} "
          f"{memory:4.0f} | {speed / 1e9:7.0f} {share:9.0%} {1 / share:8.2f}")


def bench(*only):
    """A process for each configuration (`only`: of these K), so that its peak memory is its own."""
    precisions, slower = ["fp32", "bf16"], timed_matmul(512) / timed_matmul(512, torch.bfloat16)
    if slower > 1:
        print(f"bf16 left out: on this processor it makes a matrix product {slower:.0f} times slower")
        precisions.remove("bf16")
    titles = "".join(f"{stage:>10}" for stage in [*BENCH_STAGES, "step"])
    print(f"K precision threads |{titles} s | tokens/s pairs/s  MiB | GFLOP/s  of matmul  x floor",
          flush=True)
    for threads, precision, K in itertools.product((1, os.cpu_count()), precisions, only or (2, 4, 8)):
        command = [sys.executable, __file__, "bench_step", str(K), precision, str(threads)]
        subprocess.run(command, check=True)


# Tables and picture: make ablations, make evidence, make collection -------------------------------
ABLATIONS = list(VARIANTS)[:10]
TSO = ["spce", "dpo", *[name for name in VARIANTS if "tso" in name]]
SIZES = ["prompts_50", "prompts_100", "spce", "prompts_400", "prompts_800"]  # spce has 200
LONG = {"long_spce": "strengths (SPCE)", "long_dpo": "the same, rounded to 0 or 1 (DPO)"}
CLIPS = {"spce": "OSP", "tso": "TSO", "tso_no_clip": "TSO, no clip", "tso_fixed": "TSO, fixed reference"}
NOISE = {"noisy_00": "strengths", "drawn_00": "drawn labels", "noisy_20": "strengths, 20% noise",
         "drawn_20": "drawn, 20% noise", "noisy_40": "strengths, 40% noise", "drawn_40": "drawn, 40% noise"}
FIGURES = {"win_rate_vs_sft": 3, "ood_win_rate_vs_sft": 3, "gold_reward": 2, "gold_at_KL_2": 2, "kl": 1,
           "distinct_fraction": 3, "response_tokens": 1}  # a key of summary.json -> its digits
THIRDS = {"win_rate_vs_sft": 3, "ood_win_rate_vs_sft": 3, "best_gold": 2, "gold_1/3": 2, "gold_2/3": 2,
          "gold_3/3": 2, "KL_3/3": 1}
JUDGED = {"data": "the data's pairs", "sft": "two responses of SFT", "policy": "two of the policy"}
JUDGE_FIGURES = {"judge_accuracy": 3, "judge_calibration_error": 3, "order_agreement": 3}


def finished_runs(folder, file):
    """name -> for each seed what `file` holds, and the points (step, KL, gold) on the run's way."""
    runs = {}
    for path in sorted(Path(folder).glob(f"*-seed*/{file}")):
        run = json.loads(path.read_text())
        run |= {"folder": path.parent, "points": [(0, 0.0, run["gold_reward_sft"])]}
        for text in (path.parent / "metrics.jsonl").read_text().splitlines():
            line = json.loads(text)
            if "eval_kl" in line:
                run["points"].append((line["step"], line["eval_kl"], line["eval_gold_reward"]))
        for third in (1, 2, 3):
            at = round(third / 3 * (len(run["points"]) - 1))
            _, run[f"KL_{third}/3"], run[f"gold_{third}/3"] = run["points"][at]
        run["gold_at_KL_2"] = gold_at_kl(run["points"], 2.0)
        run["best_gold"] = max(gold for _, _, gold in run["points"])
        runs.setdefault(path.parent.name.rsplit("-seed", 1)[0], []).append(run)
    return runs


def gold_at_kl(points, wanted):
    """Gold where training first reaches this KL, on the straight line between evaluations; or None."""
    for (_, kl, gold), (_, next_kl, next_gold) in zip(points, points[1:]):
        if kl < wanted <= next_kl:
            return gold + (next_gold - gold) * (wanted - kl) / (next_kl - kl)


def spread(values, digits):
    """Mean and standard deviation over seeds; how many have a value, where not all do."""
    there = [value for value in values if value is not None]
    if not there:
        return ""
    text = f"{np.mean(there):.{digits}f}±{np.std(there, ddof=len(there) > 1):.{digits}f}"
    return text if len(there) == len(values) else f"{text} ({len(there)} of {len(values)})"


def print_table(title, names, figures, runs):
    """Prints Markdown: a row for each of `names` that has runs, a column for each of `figures`."""
    rows = [[title, *[key.replace("_", " ") for key in figures]], ["---"] * (len(figures) + 1)]
    for name in names:
        if name in runs:
            cells = [spread([run.get(key) for run in runs[name]], figures[key]) for key in figures]
            rows.append([name, *cells])
    print("\n" + "\n".join(f"| {' | '.join(row)} |" for row in rows))


def print_ablations(folder):
    """What `make ablations` prints."""
    runs = finished_runs(folder, "summary.json")
    print(f"{len(runs['spce'])} seeds, mean ± standard deviation")
    print_table("variation", ABLATIONS, FIGURES, runs)
    print("\nafter TSO, formulas reconstructed")
    figures = {key: digits for key, digits in FIGURES.items() if key != "response_tokens"}
    print_table("variation", TSO, figures, runs)


def judged_pairs(folder):
    """A run's judge on pairs of responses: for each of JUDGED a list of (p_12, p_21, truth)s. Kept in
    judge.json, so that a second call is quick."""
    path = folder / "judge.json"
    if path.exists():
        return json.loads(path.read_text())
    args = osp.Arguments(**json.loads((folder / "arguments.json").read_text()))
    judge, tokenizer = osp.frozen(str(folder / "sft"), args)
    policy, _ = osp.frozen(str(folder), args)
    texts, judged = {"data": builtin_pairs("test")[: args.num_eval_pairs]}, {}
    rows = osp.distinct_prompts(tokenizer, builtin_pairs("test"), args.num_eval_prompts)
    for source, model, ks in (("sft", judge, [0, 2]), ("policy", policy, [1, 3])):
        found = osp.respond(model, tokenizer, rows, ks, osp.EVALUATION, args)
        texts[source] = [(row.prompt, one.text, two.text) for row, (one, two) in zip(rows, found)]
    for source, triples in texts.items():
        p_12, p_21 = osp.ask_judge(judge, tokenizer, triples, args)
        truth = [osp.true_strength(*triple) for triple in triples]
        judged[source] = list(zip(p_12.tolist(), p_21.tolist(), truth))
    osp.write_text(path, json.dumps(judged))
    return judged


def judge_summary(judged):
    """The figures of judged pairs; accuracy leaves out those of equal gold."""
    return osp.verdict_figures(*torch.tensor(judged, dtype=torch.float64).T)


def print_evidence(folder):
    """What `make evidence` prints and draws."""
    runs = finished_runs(folder, "summary.json")
    print_table("variation", [*LONG, *SIZES, *NOISE], THIRDS, runs)
    judged = [judged_pairs(run["folder"]) for run in runs["spce"]]
    by_source = {source: [judge_summary(one[source]) for one in judged] for source in JUDGED}
    print_table("the frozen judge on", JUDGED, JUDGE_FIGURES, by_source)
    draw_evidence(runs, judged, Path(folder) / "evidence.png")


def draw_curves(axes, title, labels, runs, x):
    """Gold against step or KL: each seed thinly, the mean thickly, with a square at its end."""
    for i, (name, label) in enumerate(labels.items()):
        colour = i // 2 if labels is NOISE else i
        style = {"color": f"C{colour}", "linestyle": "--" if "drawn" in name else "-"}
        series = [np.array(run["points"])[:, [x, 2]].T for run in runs.get(name, [])]
        for one in series:
            axes.plot(*one, alpha=0.2, linewidth=1, **style)
        if series:
            xs, ys = np.mean(series, axis=0)
            axes.plot(xs, ys, label=label, marker=".", **style)
            axes.plot(xs[-1:], ys[-1:], marker="s", markersize=9, **style)
    axes.set(title=title, ylabel="gold reward", xlabel=("step", "KL from SFT, nats (squares: the end)")[x])
    if x == 1:
        axes.set_xscale("symlog", linthresh=5)


def draw_reliability(axes, judged):
    """The mean true strength of the pairs in each tenth of the judge's strength."""
    for source, label in JUDGED.items():
        rows = [row for one in judged for row in one[source]]
        table = pd.DataFrame(rows, columns=["p_12", "p_21", "truth"])
        table["strength"] = osp.averaged_strength(table.p_12, table.p_21)
        table = pd.concat([table, 1 - table])  # every pair in both directions
        tenths = table.groupby((table.strength * 9.999).astype(int))
        means = tenths.mean()[tenths.size() >= 20]
        axes.plot(means.strength, means.truth, marker="o", label=label)
    axes.plot([0, 1], [0, 1], color="grey", linewidth=1)
    axes.set(title="reliability of the frozen judge", xlabel="its strength", ylabel="true strength")


def draw_evidence(runs, judged, path):
    """Four panels: long training, TSO, noisy labels, the judge."""
    from matplotlib.figure import Figure  # here, since it takes a second to load

    figure = Figure(figsize=(12, 9), layout="constrained")
    long, tso, noise, judge = figure.subplots(2, 2).flat
    draw_curves(long, "27 epochs: strengths come to rest, rounded labels run away", LONG, runs, 1)
    draw_curves(tso, "9 epochs: TSO's clip and moving reference", CLIPS, runs, 1)
    draw_curves(noise, "noisy labels on one fixed set of pairs", NOISE, runs, 0)
    noise.set_ylim(-0.8)  # room for the legend
    draw_reliability(judge, judged)
    for axes in (long, tso, noise, judge):
        axes.legend(frameon=False, fontsize=8)
        axes.grid(alpha=0.3)
    figure.savefig(path, dpi=100)
    print(f"\nPicture: {path}")


def test_figures_of_the_tables_by_hand():
    points = [(0, 0.0, 0.3), (1, 1.0, 0.9), (2, 3.0, 1.9)]
    assert gold_at_kl(points, 2.0) == pytest.approx(1.4)
    assert gold_at_kl(points, 3.5) is None
    assert spread([1.0, 2.0, None], 1) == "1.5±0.7 (2 of 3)"
    assert spread([None], 1) == ""
    judged = [(0.9, 0.3, 0.7), (0.2, 0.6, 0.7), (0.5, 0.5, 0.5), (0.8, 0.4, 0.5)]
    figures = judge_summary(judged)  # of strengths 0.8, 0.3, 0.5 and 0.7
    assert figures["judge_accuracy"] == 0.5
    assert figures["order_agreement"] == 1
    assert figures["judge_calibration_error"] == pytest.approx((0.1 + 0.4 + 0 + 0.2) / 4)


# make collection: what 500 more labels are worth, by how they are spent
LABELLED = 1500  # pairs from which the models that ask have learned
ANY_PAIR = {"max_similarity": 1.0, "min_strength": 0.5, "max_strength": 1.0}
COLLECTIONS = {  # name -> who responds, arguments of --method collect
    "base": None,  # no more labels
    "random": (["start"], {"num_train_prompts": 520, "keep_prompts": 1.0} | ANY_PAIR),
    "step_1": (["start"], {"num_train_prompts": 1040} | ANY_PAIR),  # prompts of the widest spread
    "steps_1_2": (["start", "policy"], {"num_train_prompts": 1040} | ANY_PAIR),  # also OSP's responses
    "steps_1_2_3": (["start", "policy"], {"num_train_prompts": 2080}),  # and the filter
    "landslides": (["start", "policy"],  # a filter that keeps the large gaps instead
                   {"num_train_prompts": 2080, "min_strength": 0.95, "max_strength": 1.0})}
COLLECTED = {"judge_accuracy": 3, "judge_calibration_error": 3, "own_judge_accuracy": 3,
             "own_judge_calibration_error": 3, "gold_reward": 2, "labels": 0, "thrown_away": 2,
             "against_the_truth": 3, "ties": 3, "distinct_responses": 3}


def small_world(pairs):
    """The built-in task with these (prompt, chosen, rejected)s to train on. A context manager."""
    rows = [dict(zip(("prompt", "chosen", "rejected"), pair)) for pair in pairs]
    splits = osp.builtin_preferences() | {"train": datasets.Dataset.from_list(rows)}
    return mock.patch.object(osp, "builtin_preferences", lambda: splits)


def collected_labels(name, models, prompts, args):
    """(prompt, chosen, rejected)s by --method collect, which the truth labels, and figures of them. Where
    no filter chooses among a prompt's pairs, it has one, a random one."""
    roles, options = COLLECTIONS[name]
    args, rng = dataclasses.replace(args, **options), np.random.default_rng(args.seed)
    method = osp.matrix_method(roles, args, with_human=False)
    if args.min_strength == 0.5:
        method = dataclasses.replace(method, pair=lambda scores: [rng.permutation(len(scores))[:2]])
    rows = osp.distinct_prompts(models.tokenizer, prompts, args.num_train_prompts)
    data = types.SimpleNamespace(rows=rows, gold=osp.gold_reward)
    counts = osp.collect(models, data, method, args, {})
    kept = counts["prompts_kept"] / counts["prompts"] * counts["questions"] / counts["pairs"]
    table = pd.read_json(args.output_dir / "preferences.jsonl", lines=True)
    labels = table[["prompt", "chosen", "rejected"]].values.tolist()
    truth = np.array([osp.true_strength(*label) for label in labels])
    distinct = len({*table.chosen, *table.rejected}) / (2 * len(table))
    return labels, {"labels": len(labels), "thrown_away": 1 - kept, "distinct_responses": distinct,
                    "against_the_truth": np.mean(truth < 0.5), "ties": np.mean(truth == 0.5)}


def collect_and_train(name, seed, folder, *options):
    """python test_osp.py collect NAME SEED FOLDER: a run of the experiment, in FOLDER/NAME-seedSEED. The
    models of FOLDER/base-seedSEED ask; SFT from scratch and OSP learn from the old and the new pairs."""
    run, base = Path(folder) / f"{name}-seed{seed}", Path(folder) / f"base-seed{seed}"
    pairs, labels, result = list(builtin_pairs("train")), [], {}
    random.Random(int(seed)).shuffle(pairs)
    options = [*options, "--seed", seed]
    if name != "base":
        args = osp.parse_arguments(options)
        args.output_dir = run.with_name(run.name + "-labels")
        start, tokenizer = osp.frozen(str(base / "sft"), args)
        policy, _ = osp.frozen(str(base), args)
        models = osp.Models(tokenizer, policy, start, reference=start, judge=start)
        labels, result = collected_labels(name, models, pairs[LABELLED:], args)
    if not (run / "summary.json").exists():
        with small_world(pairs[:LABELLED] + labels):
            osp.main([*options, "--output_dir", str(run), "--resume_from_checkpoint=latest"])
    for key, value in judge_summary(judged_pairs(run)["policy"]).items():
        result[f"own_{key}"] = value
    result |= json.loads((run / "summary.json").read_text())
    osp.write_text(run / "result.json", json.dumps(result))


def print_collection(folder):
    """What `make collection` prints."""
    runs = finished_runs(folder, "result.json")
    print(f"500 labels more, {len(runs['base'])} seeds; the steps of collection are reconstructed")
    print_table("how they were spent", COLLECTIONS, COLLECTED, runs)


@pytest.mark.parametrize("name", ["random", "step_1", "steps_1_2", "steps_1_2_3"])
def test_what_each_collection_asks(name, tmp_path):
    models, _, args = variant_world(min_strength=0.501, max_strength=0.51, output_dir=tmp_path)
    labels, figures = collected_labels(name, models, builtin_pairs("train")[:6], args)
    questions, counts = json.loads((tmp_path / "questions.json").read_text())
    asked = pd.DataFrame(questions)
    assert counts["prompts_kept"] == (6 if name == "random" else 3)
    assert figures["labels"] == len(labels) == len(asked) > 0
    assert figures["thrown_away"] == 1 - len(asked) / (18 if name == "steps_1_2_3" else 6)
    assert {*asked.one_from, *asked.two_from} == set(COLLECTIONS[name][0])
    if name == "steps_1_2_3":
        assert (asked.strength - 0.5).abs().between(0.001, 0.01).all()


def test_a_small_world():
    pairs = [("Human: tell my boss about rain now", "rain is warm .", "tea is warm .")]
    with small_world(pairs):
        assert [tuple(row.values()) for row in osp.load_preferences(None)] == pairs


# Commands -----------------------------------------------------------------------------------------
COMMANDS = {"run": run_variant, "run_with_sft": run_with_sft, "bench": bench, "bench_step": bench_step,
            "ablations": print_ablations, "evidence": print_evidence, "collect": collect_and_train,
            "collection": print_collection,
            "vectors": lambda folder: write_vectors(Path(folder))}

if __name__ == "__main__":
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # as osp.py does
    osp.start_process()
    try:
        COMMANDS[sys.argv[1]](*sys.argv[2:])
        sys.exit()
    except osp.Stop as stop:
        sentence, code = str(stop), stop.code
    except KeyboardInterrupt:
        sentence, code = "interrupted; the same command goes on from the last checkpoint.", 130
    print(f"osp: {sentence}", file=sys.stderr)
    sys.exit(code)
