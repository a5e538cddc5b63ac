"""Tests of osp.py on tiny random models, the README's evidence, and golden numbers for ports.

No network. Numbers worked out by hand, and properties; then the paper's variants, as Methods."""
import copy
import dataclasses
import fcntl
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
from concurrent.futures import ThreadPoolExecutor
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
from torch.utils.flop_counter import FlopCounterMode

import osp

torch.set_num_threads(1)  # for models this small more threads cost more than they give
# float32: a logit of size 16 is off by 2**-20 a rounding, some ten roundings deep; ten tokens are added
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


def windowed(vocab_size=40):
    """Every layer sees 24 tokens back."""
    return tiny(transformers.MistralConfig, vocab_size, hidden_size=32, intermediate_size=48,
                num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, sliding_window=24)


def hybrid(vocab_size=40):
    """A layer of convolutions, whose state cannot be shared, and one of attention."""
    return tiny(transformers.Lfm2Config, vocab_size, hidden_size=32, intermediate_size=48,
                num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
                layer_types=["conv", "full_attention"])


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
    inner.post_processor = tokenizers.processors.TemplateProcessing(
        "<s> $A", special_tokens=[("<s>", 1)])
    return transformers.PreTrainedTokenizerFast(tokenizer_object=inner, **names)


LOOP = "{% for m in messages %}"
CHAT = LOOP + ("<|{{ m.role }}|>\n{{ m.content }}{{ eos_token }}\n{% endfor %}"
               "{% if add_generation_prompt %}<|assistant|>\n{% endif %}")
BYTES, PIECES, TALK = byte_level_tokenizer(), sentencepiece_tokenizer(), byte_level_tokenizer(CHAT)
EACH_TOKENIZER = pytest.mark.parametrize(
    "tokenizer", [BYTES, PIECES, TALK], ids=["bytes", "pieces", "chat"])


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


def files_in(folder):
    """All files in a folder and their contents."""
    paths = filter(Path.is_file, folder.rglob("*"))
    return {str(path.relative_to(folder)): path.read_bytes() for path in paths}


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
    assert (stop.value.code, "\n" in str(stop.value)) == (code, False)


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
        assert torch.allclose(gradient, finite, atol=1e-7)  # 36 * 2**-53 / 1e-6 is 4e-9
    return found


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
    (-0.5, 0.5, 1, 0.2, -1.0),  # neither is clipped on its other side
    (-0.5, 0.5, 0, 0.2, 0.4),  # the second one wins; both are clipped
    (0.5, -0.5, 1, math.inf, 1.0),
])
def test_dual_clip_by_hand(reward_1, reward_2, label, clip, margin):
    """A clipped reward has no gradient, the others have that of DPO."""
    loss = functools.partial(osp.dual_clip_loss, strength=doubles(label), clip=clip)
    rewards = doubles(reward_1), doubles(reward_2)
    assert loss(*rewards).item() == pytest.approx(math.log(1 + math.exp(-margin)), abs=1e-12)
    winner, loser = rewards if label else rewards[::-1]
    kept = {bool(winner > clip), bool(loser < -clip)}
    assert {gradient.item() == 0 for gradient in gradients_of(loss, *rewards)} == kept


# Pairs --------------------------------------------------------------------------------------------
@pytest.mark.parametrize("scores, expected", [
    ([0.5, 0.9, 0.1, 0.7], [(1, 2), (3, 0)]),
    (torch.tensor([0.1, 0.2, 0.3, 0.4, 0.5]), [(4, 0), (3, 1)]),  # the middle is left out
    ([0.5, 0.5, 0.5, 0.5], [(0, 3), (1, 2)]),  # ties keep their order
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
    """By rank: [5] [5], [7 1] [7], [8 1] [7 1]; the judge is unsure of the second."""
    ids = [[5], [7, 1], [8, 1], [7, 1], [7], [5]]
    method = osp.Method(
        sample=lambda *_: [[osp.Candidate(one, "") for one in ids]],
        score=lambda *_: [[0.9, 0.8, 0.7, 0.3, 0.2, 0.1]],
        strength=lambda models, pairs, args: [None, 0.75])
    models = osp.Models(None, None, reference=rotary())
    _, [pairs] = osp.make_pairs(models, [row_of("", 0, [3])], method, 0, osp.Arguments())
    assert [(pair.better.ids, pair.worse.ids, pair.strength) for pair in pairs] == [
        ([5], [5], None), ([7, 1], [7], None), ([8, 1], [7, 1], 0.75)]


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
    responses += [[3, 4, 1], [5], [6, 0, 8, 9, 10, 11]]
    with torch.no_grad():
        slow = torch.stack([naive_logps(model, *texts) for texts in zip(prompts, responses)])
        fast = osp.response_logps(model, prompts, responses, micro_batch_size)
        alone = osp.token_logps(model, prompts, responses)
    assert fast.dtype == torch.float32
    assert torch.allclose(fast, slow, atol=CLOSE)
    assert torch.allclose(alone.sum(-1), slow, atol=CLOSE)
    assert not alone[8, 1:].any()  # beyond the end of [5]


# Update -------------------------------------------------------------------------------------------
def weights_of(model):
    return parameters_to_vector(model.parameters()).detach().clone()


def gradient_of(model):
    return parameters_to_vector([weight.grad for weight in model.parameters()])


def same_gradient(one, two):
    return torch.allclose(one, two, atol=CLOSE * two.abs().max().item())


def with_sgd(model):
    """Models whose step is the gradient."""
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    scheduler = transformers.get_scheduler("constant", optimizer)
    return osp.Models(None, model, optimizer=optimizer, scheduler=scheduler)


def test_gradient_does_not_depend_on_micro_batches_or_checkpointing():
    """It is that of the mean loss of unpadded passes. Five pairs: the last micro-batch is smaller."""
    plain, prompts, responses, pairs, seen = rotary(), random_ids(5, 12), random_ids(10, 9), [], []
    prompts[1] = prompts[0]
    for i, strength in enumerate([0.9, 0.5, 0.2, 0.7, 0.6]):
        both, ref_logps = responses[2 * i : 2 * i + 2], (-20.0 + 3 * i, -8.0 - i)
        sides = [osp.Candidate(ids, "") for ids in both]
        pairs.append(pair_of(*sides, strength, row_of("", i, prompts[i]), ref_logps=ref_logps))
        logps = [naive_logps(plain, prompts[i], ids) for ids in both]
        rewards = [0.3 * (logp - ref_logp) for logp, ref_logp in zip(logps, ref_logps)]
        seen.append(torch.stack([osp.spce_loss(*rewards, strength), *rewards]))
    torch.stack(seen)[:, 0].mean().backward()
    expected = gradient_of(plain)
    for size, checkpointing in ((1, False), (4, False), (16, False), (6, True)):
        models = with_sgd(rotary())
        if checkpointing:
            models.policy.activation_checkpointing_enable()
        args = osp.Arguments(micro_batch_size=size, max_grad_norm=1e9, beta=0.3)
        figures = osp.update(models, pairs, osp.Method(), 0, args)
        assert figures["grad_norm"] == pytest.approx(expected.norm().item(), rel=CLOSE)
        assert same_gradient(weights_of(plain) - weights_of(models.policy), expected)
        assert next(models.policy.parameters()).grad is None
        for pair, own in zip(pairs, seen):
            assert pair.seen == pytest.approx(own.tolist(), abs=CLOSE)


def test_gradients_are_clipped_to_their_norm_and_nan_stops_the_run():
    models, args = with_sgd(torch.nn.Linear(2, 1, bias=False)), osp.Arguments(max_grad_norm=1)
    weight, before = models.policy.weight, weights_of(models.policy)
    weight.grad = torch.tensor([[3.0, 4.0]])
    assert osp.optimizer_step(models, 0.0, "", args) == 5.0
    after = weights_of(models.policy)
    assert (before - after).tolist() == pytest.approx([0.6, 0.8], abs=1e-6)  # norm + 1e-6
    assert weight.grad is None
    for loss, slope in ((math.nan, 1.0), (0.0, math.nan)):
        weight.grad = torch.tensor([[slope, 0.0]])
        with stopped("step 3: the loss is", code=1):
            osp.optimizer_step(models, loss, "step 3", args)
    assert torch.equal(weights_of(models.policy), after)


def test_every_epoch_shows_every_row_once_in_an_order_of_its_own():
    steps = [osp.step_indices(10, 4, step, 0) for step in range(6)]
    one, two = sum(steps[:3], []), sum(steps[3:], [])
    assert sorted(one) == sorted(two) == list(range(10))
    assert one != two
    assert [len(step) for step in steps] == [4, 4, 2] * 2
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


def test_steps_go_by_passes_or_by_their_number():
    assert [osp.number_of_steps(10, 4, 3, most) for most in (-1, 0, 5, 50)] == [9, 0, 5, 50]
    assert rates_of("linear", 0.1, steps=1) == [1.0]  # a single step trains something


@pytest.mark.parametrize("asked, warmup", [(0.1, 2), (0.11, 3), (5.0, 5)])
def test_a_schedule_warms_up_by_a_share_or_a_number_of_steps(asked, warmup):
    expected = [step / warmup for step in range(warmup)] + [1.0] * (20 - warmup)
    assert rates_of("constant_with_warmup", asked) == pytest.approx(expected)


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
    prompts = [(prompt,) for prompt in osp.builtin_prompts("train")]
    rows = osp.distinct_prompts(models.tokenizer, prompts, 16)
    osp.start_training(models, 5e-3, 16, args)
    for step in range(16):
        figures = osp.measured_step(models, rows, osp.Method(), step, args)
    assert said(models.policy) > said(models.start) + 1
    assert figures["margin"] > 0.3
    assert figures["margin_accuracy"] > 0.8


# Judge --------------------------------------------------------------------------------------------
def framed_question(tokenizer, *texts):
    return osp.framed(tokenizer, osp.judge_question(*texts) + osp.verdict_format(tokenizer)[0])


def test_verdict_of_several_tokens_is_refused():
    inner = tokenizers.models.WordLevel({"<eos>": 0, "<unk>": 1}, unk_token="<unk>")
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizers.Tokenizer(inner), eos_token="<eos>", unk_token="<unk>")
    with stopped("one token"):
        osp.verdict_format(tokenizer)


def asked_alone(judge, tokenizer, *texts):
    """P(A) by one unpadded pass over the whole question."""
    ids = osp.encode(tokenizer, [framed_question(tokenizer, *texts)])
    with torch.no_grad():
        logits = judge(input_ids=torch.tensor(ids)).logits
    return logits[0, -1, osp.verdict_format(tokenizer)[1:]].softmax(-1)[0].item()


@EACH_TOKENIZER
def test_strength_complement_identity_and_both_orders(tokenizer):
    _, *verdicts = osp.verdict_format(tokenizer)
    assert [text.strip() for text in tokenizer.batch_decode([[one] for one in verdicts])] == ["A", "B"]
    judge = rotary(len(tokenizer))
    texts = [("hi", "the cat sat", "rain"), ("rain", "same", "same"),
             ("\n\nHuman: the mat\n\nAssistant:", "x", "the mat . the cat")]
    prompts, ones, twos = map(list, zip(*texts))
    p = osp.preference_strength(judge, tokenizer, prompts, ones, twos)
    q = osp.preference_strength(judge, tokenizer, prompts, twos, ones, micro_batch_size=1)
    assert torch.allclose(p + q, torch.ones(3), atol=CLOSE)
    assert p[1] == 0.5  # exactly
    pairs = [pair_of(one, two, None, row_of(prompt)) for prompt, one, two in texts]
    strengths = osp.judge_pairs(osp.Models(tokenizer, None, judge=judge), pairs, osp.Arguments())
    assert strengths == pytest.approx(p.tolist(), abs=CLOSE)
    for pair, strength, (prompt, one, two) in zip(pairs, strengths, texts):
        p_12 = asked_alone(judge, tokenizer, prompt, one, two)
        p_21 = asked_alone(judge, tokenizer, prompt, two, one)
        assert pair.verdicts == pytest.approx((p_12, p_21), abs=CLOSE)
        assert strength == pytest.approx((p_12 + 1 - p_21) / 2, abs=CLOSE)


def test_ranking_asks_k_questions_a_prompt_with_the_first_response_as_a(monkeypatch):
    judge, forward = rotary(len(BYTES)), mock.Mock(wraps=osp.forward)
    monkeypatch.setattr(osp, "forward", forward)
    models, rows = osp.Models(BYTES, None, judge=judge), [row_of("hi"), row_of("the mat")]
    texts = [["rain", "the cat", "mat", "sat"], ["x", "y", "x", "y"]]
    candidates = [[osp.Candidate([], text) for text in found] for found in texts]
    scores = osp.ranking_scores(models, rows, candidates, osp.Arguments())
    # a head for each prompt; then its questions, the equal ones once
    assert [len(call.args[1]) for call in forward.call_args_list] == [2, 4 + 2]
    for row, found, own in zip(rows, texts, scores):
        alone = [1 - asked_alone(judge, BYTES, row.prompt, found[0], text) for text in found]
        assert own == pytest.approx(alone, abs=CLOSE)
    assert scores[1][:2] == scores[1][2:]  # equal texts tie exactly


SAYING_WORDS = st.sampled_from(["rain", "the cat", "mat .", "gentle " * 40])
SAYINGS = st.lists(SAYING_WORDS, max_size=3).map(" ".join)
QUESTION = st.tuples(st.sampled_from(["hi", "the mat"]), SAYINGS, SAYINGS)


@pytest.mark.parametrize("kind", [rotary, absolute, windowed])
@given(st.lists(QUESTION, min_size=1, max_size=8), st.sampled_from([1, 3, 8]))
@settings(max_examples=25, deadline=None)
def test_questions_that_share_their_head_get_the_answers_they_get_alone(kind, questions, size):
    judge = kind(len(BYTES))
    found = osp.verdict_probabilities(judge, BYTES, *zip(*questions), size)
    alone = [asked_alone(judge, BYTES, *question) for question in questions]
    assert found == pytest.approx(alone, abs=CLOSE)


def test_a_judge_whose_verdicts_are_not_numbers_stops_the_run():
    judge = rotary(len(BYTES))
    judge.lm_head.weight.data.fill_(math.nan)
    with stopped("not numbers", code=1):
        osp.verdict_probabilities(judge, BYTES, ["hi"], ["rain"], ["mat"])


def test_a_question_longer_than_the_context_loses_text_and_not_its_frame():
    prompts, texts = ["hi", "hi"], ["the mat " * 99, "x"]
    _, short = osp.encode_questions(BYTES, prompts, texts, texts)
    cut, same = osp.encode_questions(BYTES, prompts, texts, texts, 120)
    assert 80 < len(cut) <= 120
    assert same == short
    one, two = [re.sub("(?m)^>.*", ">", BYTES.decode(ids)) for ids in (cut, short)]
    assert one == two
    model = absolute(len(BYTES))
    model.config.max_position_embeddings = 130
    batch = [("hi", "x" * n, "y") for n in range(1, 99)]
    questions, _ = osp.supervised_tasks(osp.Models(BYTES, model), batch, arguments())["judge"]
    assert max(map(len, questions)) == 129  # room for the verdict


def test_judge_figures_by_hand():
    p_12 = torch.tensor([0.93, 0.4, 0.05, 0.7, 1.0])  # strengths 0.92, 0.5, 0.06, 0.6, 1
    p_21 = torch.tensor([0.09, 0.4, 0.93, 0.5, 0.0])
    both = {"order_agreement": (1 + 1 + 0.5 + 1) / 4}  # the second's verdicts are equal
    truth = torch.tensor([0.8, 0.9, 0.5, 0.5, 1.0])
    assert osp.verdict_figures(p_12, p_21, truth) == pytest.approx(both | {
        "judge_accuracy": (1 + 0.5 + 1) / 3,  # where the truth is no tie; the judge's counts half
        "judge_calibration_error": (0.12 + 0.4 + 0.44 + 0.1 + 0) / 5})
    gaps = abs(0.92 - 1 + 0.94 - 0) + (0.5 - 0.5) + (1 - 0.6) + 0  # the first and the third share a bin
    assert osp.verdict_figures(p_12, p_21) == pytest.approx(both | {
        "judge_accuracy": 3.5 / 5, "judge_calibration_error": gaps / 5})


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
    assert chi2 < 56 + 4 * math.sqrt(2 * 56)  # 56 degrees of freedom, four standard deviations


@BOTH_KINDS
def test_sampling_does_not_depend_on_the_batch(kind):
    model, prompts = kind(), [prompt for prompt in random_ids(5, 12) for _ in range(3)]
    noise = noise_of([4, 8, 15, 16, 23], range(3), 10)
    together = osp.sample(model, prompts, noise, 1.0, [1, 2])
    for i, prompt in enumerate(prompts):
        assert osp.sample(model, [prompt], noise[i : i + 1], 1.0, [1, 2]) == [together[i]]


def test_responses_of_rows_are_drawn_with_their_own_noise(monkeypatch):
    """Which goes by the seed, the step, the row and k, each of which changes it."""
    model, tokenizer = osp.builtin_model(0)
    rows = [row_of("\n\nHuman: rain\n\nAssistant:", 3), row_of("\n\nHuman: tea now\n\nAssistant:", 5)]
    monkeypatch.setattr(osp, "SAMPLING_BATCH_SIZE", 4)
    responses = osp.respond(
        model, tokenizer, rows, [1, 4, 5], 2, arguments("--seed 7 --temperature 0.7"))
    for row, found in zip(rows, responses):
        prompts = osp.encode_prompts(tokenizer, [row.prompt] * 3)
        ids = osp.sample(model, prompts, noise_of([row.index], [1, 4, 5], 16, 7, 2), 0.7, [1])
        texts = tokenizer.batch_decode(ids, skip_special_tokens=True)
        assert [(one.ids, one.text) for one in found] == list(zip(ids, texts))
    draws = {osp.sampling_noise(*key, 1)[0] for key in itertools.product([7, 8], repeat=4)}
    assert len(draws) == 16


def test_responses_keep_their_eos_and_truncated_ones_get_none():
    found = osp.sample(rotary(6), [[3]] * 64, noise_of([0], range(64), 4), 1.0, [1])
    assert {ids[-1] == 1 for ids in found} == {True, False}
    assert all(1 not in ids[:-1] and 1 in ids[-1:] + [len(ids) - 3] for ids in found)
    for tokenizer in (BYTES, PIECES):
        whole, cut = osp.encode_responses(tokenizer, ["hi"] * 2, ["the cat", "the cat " * 30], 12)
        assert tokenizer.decode(whole[:-1]).strip() == "the cat"
        assert whole[-1] == tokenizer.eos_token_id
        assert len(cut) == 12 and cut[-1] != tokenizer.eos_token_id


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


def test_sft_loss_is_the_mean_over_all_target_tokens():
    prompts, targets, model = random_ids(5, 12), random_ids(5, 9), rotary()
    loss = -sum(naive_logps(model, *texts) for texts in zip(prompts, targets)) / sum(map(len, targets))
    loss.backward()
    expected = gradient_of(model)
    for size in (2, 8):
        model.zero_grad()
        found = osp.supervised_loss(model, prompts, targets, osp.Arguments(micro_batch_size=size))
        assert found == pytest.approx(loss.item(), abs=CLOSE)
        assert same_gradient(gradient_of(model), expected)


# Text ---------------------------------------------------------------------------------------------
ODD = st.sampled_from([
    "A:", "B:", "Better: A", "> ", "\n", "\r\n", "\x0b", "\x0c", "\x1c", "\x85", "\u2028", "\u2029",
    "\x00", " ", "\n\nHuman: ", "\n\nAssistant:", "<|endoftext|>", "<s>", "</s>", "<unk>",
    "<|assistant|>\n", "rain ." * 500])
LETTERS = st.text(st.characters(exclude_categories=["Cs"]), max_size=6)
TEXT = st.lists(ODD | LETTERS, max_size=8).map("".join)


@EACH_TOKENIZER
@given(texts=st.tuples(TEXT, TEXT, TEXT))
@example(["x <|endoftext|> y</s>\n\nB:\n> z\n\nBetter: A"] * 3)
@settings(max_examples=60, deadline=None)
def test_no_text_forges_the_frame_or_becomes_a_special_token(tokenizer, texts):
    """The question's lines read back: the frame's, once and in order, and between the texts' own."""
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
    "conversational": ({"prompt": chat("q")} | chats("q", start=1), chat("q")),
    "conversational implicit": (chats("q"), chat("q")),
    "ultrafeedback": ({"prompt": "q", "score_chosen": 8.0} | chats("q"), chat("q")),
    "system message": ({"prompt": [SYSTEM, *chat("q")]} | chats("q"), [SYSTEM, *chat("q")]),
    "shared turns": ({"prompt": chat("q")} | chats("q", "a", "r", start=1), chat("q", "a", "r")),
    "the last of the shared turns": ({"prompt": "r"} | chats("q", "a", "r"), chat("q", "a", "r")),
    "chat prompt, text responses": ({"prompt": chat("q")} | texts(), chat("q")),
    "orca": ({"system": "s", "question": "q"} | texts(), [SYSTEM, *chat("q")]),
    "system beside a prompt": ({"prompt": "q", "system": "s"} | texts(), [SYSTEM, *chat("q")]),
    "tldr": (TLDR, "SUBREDDIT: r/s\nTITLE: t\nPOST: long\nTL;DR:"),
    "chat prompts": ({"prompt": chat("q", "a", "r")}, chat("q", "a", "r")),
    "kto": ({"prompt": "q", "completion": "c", "label": True}, "q"),
    "a blank at the end": ({"prompt": "The sky is \n"} | texts(), "The sky is"),
    "parts of text": ({"prompt": [{"role": "user", "content": [
        {"type": "text", "text": "The sky "}, {"type": "text", "text": "is"}]}]}, chat("The sky is")),
    "a turn that is repeated with another key": (
        {"prompt": chat("q")} | {name: [chat("q\n")[0] | {"weight": 1}, *chat("", text)[1:]]
                                 for name, text in texts().items()}, chat("q")),
}
WRITERS = {
    ".jsonl": datasets.Dataset.to_json, ".parquet": datasets.Dataset.to_parquet,
    ".csv": datasets.Dataset.to_csv, ".tsv": functools.partial(datasets.Dataset.to_csv, sep="\t"),
    ".json": functools.partial(datasets.Dataset.to_json, lines=False),
    ".jsonl.gz": functools.partial(datasets.Dataset.to_json, compression="gzip"),
    "": datasets.Dataset.save_to_disk}
FILES = [(name, ".jsonl") for name in FORMATS] + [("hh", suffix) for suffix in WRITERS]
FILES += [("conversational", suffix) for suffix in (".parquet", ".json", "")]


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
    ({"chosen": HI, "rejected": HI + " b"}, "a prompt, response or turn without text"),
    ({"chosen": HI + " a", "rejected": HI + " a "}, "identical responses"),
    ({"chosen": HI + " a\n\nHuman: r\n\nAssistant: c", "rejected": HI + " b"}, "a role marker inside"),
    ({"chosen": "\n\nHuman: x\n\nAssistant: a", "rejected": HI + " a"}, "a role marker inside"),
    ({"chosen": "The sky is blue", "rejected": "The sky is red"}, "a prompt, response or turn without"),
    ({"chosen": None, "rejected": HI}, "a prompt, response or turn without"),
    ({"prompt": None, "chosen": HI + " a", "rejected": HI + " b"}, "a prompt, response or turn without"),
    ({"prompt": chat("q", "", "r")}, "a prompt, response or turn without"),
    ({"prompt": chat("q", "\u200b", "r")}, "a prompt, response or turn without"),
    (TLDR | {"info": TLDR["info"] | {"post": None}}, "not a TL;DR post"),
    ({"prompt": [{"from": "human", "value": "q"}]}, "not in the format"),
    ({"prompt": "p", "chosen": ["a"], "rejected": ["b"]}, "not in the format")]
UNREADABLE = [
    ('{"text": "a"}', "fit no known format"),
    ('{"prompt": "p"}\n{"prompt": oops}\n{"prompt": "q"}', "Cannot read .*data.jsonl"),
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
    """Of 20,000, half of them unusable: held-out ones and those to train on, no prompt in both."""
    rows, read, parse_row = [], [], osp.parse_row
    for i in range(20_000):
        rows.append({"prompt": f"what is {i % 7001} ?", "chosen": "good", "rejected": "bad" * (i % 2)})
    path = write_lines(tmp_path / "many.jsonl", rows)
    monkeypatch.setattr(osp, "parse_row", lambda raw: read.append(raw) or parse_row(raw))
    data = data_of(path, """--sft_max_steps 5 --sft_batch_size 8 --num_train_prompts 20
        --num_eval_prompts 9 --num_eval_pairs 10""")
    assert len(read) <= 2000
    assert (len(data.rows), len(data.held_out)) == (20, 9)
    assert 70 < len(data.sft_pairs) <= 80
    sets = data.sft_pairs, data.held_out_pairs
    trained, held_out = [{prompt for prompt, *_ in pairs} for pairs in sets]
    assert not trained & held_out
    assert {row.prompt for row in data.rows} <= trained
    assert {row.prompt for row in data.held_out} <= held_out
    assert f"{len(data.sft_pairs)} rows to train on, of 20000; SFT: True" in capsys.readouterr().out
    assert len(osp.load_preferences(path)) == 10_000


@pytest.mark.parametrize("train, test", [("chat prompts", "hh"), ("hh", "chat prompts")])
def test_a_split_of_pairs_beside_one_of_prompts(tmp_path, train, test):
    """SFT goes by the rows to train on, the judge's figures by those that are held out."""
    splits = {split: datasets.Dataset.from_list([FORMATS[name][0]])
              for split, name in (("train", train), ("test", test))}
    datasets.DatasetDict(splits).save_to_disk(tmp_path)
    assert [bool(part) for part in data_of(tmp_path)[:4]] == [train == "hh", True, True, test == "hh"]
    assert not data_of(tmp_path, "--sft False").sft_pairs


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
        for why in ("the chat template refuses it", "too long"):
            assert f"1 dropped: {why}" in said
    write_lines(tmp_path / "train.jsonl", [{"prompt": prompt} for prompt in bad])
    with stopped("No training row is left: the prompts of all are held out"):
        data_of(tmp_path, tokenizer=tokenizer)


OF_ONE = "the prompts of all are held out"


@pytest.mark.parametrize("name, read, ignored, sentence", [
    ("hh", "chosen rejected", "extra", OF_ONE),  # a transcript holds its prompt
    ("conversational implicit", "chosen rejected", "extra", OF_ONE),
    ("orca", "chosen question rejected system", "extra", OF_ONE),
    ("kto", "prompt", "completion extra label", OF_ONE),
    (None, "chosen rejected", "extra", "1 dropped: a prompt, response or turn without text"),
])
def test_a_run_says_what_it_reads_and_on_one_row_ends_in_one_sentence(
        tmp_path, capsys, name, read, ignored, sentence):
    raw, prompt = FORMATS.get(name, (texts(), None))
    path = tmp_path / "data.parquet"
    pd.DataFrame([raw | {"extra": "q"}]).to_parquet(path)  # pandas writes large_string
    with stopped(sentence):
        data_of(path)
    first, *shown = capsys.readouterr().out.splitlines()
    assert first == f"columns read: {read} - ignored: {ignored}"
    if name:
        responses = ["good", "bad"] if "chosen" in raw else []
        assert shown[0] == "the first row: "
        assert [part.strip() for part in shown[1:]] == [repr(str(part)) for part in (prompt, *responses)]


def test_a_prompt_keeps_all_its_responses():
    pairs = [("a", "x", "y"), ("b", "p", "q"), ("a", "z", "w"), ("c", "r", "s")]
    found = osp.distinct_prompts(BYTES, pairs, 2)
    a, b = osp.encode_prompts(BYTES, ["a", "b"])
    assert found == [osp.Row("a", a, 0, [["x", "y"], ["z", "w"]]), osp.Row("b", b, 1, [["p", "q"]])]


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
    ("rain is gentle .", 0.75), ("snow is ugly .", -0.75), ("", 0),
    ("rain is ugly . snow is gentle .", 0),
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
    assert not train & test
    words = {*osp.TOPICS, *osp.PEOPLE}
    known = {frozenset(words & {*text.split()}) for text in train | test}
    assert not known & {frozenset(words & {*text.split()}) for text in ood}  # no such couple
    p = np.array([osp.true_strength(*row.values()) for row in rows[0]])
    sure = np.maximum(p, 1 - p)
    assert np.mean((sure > 0.55) & (sure < 0.95)) > 1 / 3
    # some 7,000 draws, the standard error of whose mean is at most 0.5 / sqrt(7000) = 0.006
    assert np.mean(p[p != 0.5] > 0.5) == pytest.approx(np.mean(sure[p != 0.5]), abs=0.02)


# Wrong input --------------------------------------------------------------------------------------
@pytest.mark.parametrize("words, expected", [
    ("--num_generations 1", "--num_generations is 1: it must be at least 2"),
    ("--beta 0", "--beta is 0.0: it must be above 0"),
    ("--learning_rate nan", "--learning_rate is nan"),
    ("--num_generations 2.5", "num_generations.*2.5"),
    ("--learning_rte 1", "unrecognized arguments: --learning_rte 1"),
    ("--dataset_name x.json", "needs --model_name_or_path"),
    ("--lr_scheduler_type wavy", "wavy"),
    ("--method ops", "'ops'.*osp"),
    ("--model_name_or_path no/such-model", "Cannot read 'no/such-model' as a causal"),
    ("--dataset_train_split nope", "'nope': give --dataset_train_split one of train, test, ood"),
    ("--dataset_test_split nope", "'nope': give --dataset_test_split one of train, test, ood"),
    ("--method tso --num_generations 2", "--num_generations is 2, fewer than the 3 models"),
    ("--method tso --matrix_model_names_or_paths no/such", "Cannot read 'no/such'"),
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


def broken():
    """One row of one matrix is NaN."""
    model = rotary(len(BYTES))
    model.model.embed_tokens.weight.data[7] = math.nan
    return model


def noisy():
    """It reads its dropout from the configuration at each call."""
    return tiny(transformers.FalconConfig, len(BYTES), hidden_size=32, num_hidden_layers=2,
                num_attention_heads=4, hidden_dropout=0.5, alibi=False)


def recurrent():
    """It has no keys and values."""
    return transformers.MambaForCausalLM(transformers.MambaConfig(
        vocab_size=len(BYTES), hidden_size=32, state_size=8, num_hidden_layers=2))


@pytest.mark.parametrize("make, eos, expected", [
    (bert, "<|endoftext|>", "causal language model"),
    (lambda: rotary(len(BYTES) - 1), "<|endoftext|>", "embeds only"),
    (lambda: rotary(len(BYTES)), None, "no EOS token"),
    (broken, "<|endoftext|>", "not finite numbers .NaN., such as model.embed_tokens.weight"),
    (noisy, "<|endoftext|>", "draws noise"),
    (recurrent, "<|endoftext|>", "with a cache, or in batches, its log-probabilities differ")])
def test_models_that_do_not_fit_are_refused(tmp_path, make, eos, expected):
    tokenizer = byte_level_tokenizer()
    tokenizer.eos_token = eos
    with stopped(expected):
        osp.load_model(saved(tmp_path, tokenizer, make()), arguments())


def test_weights_that_are_missing_or_match_nothing_are_named(tmp_path, capsys):
    folder = Path(saved(tmp_path, BYTES, rotary(len(BYTES))))
    weights = safetensors.torch.load_file(folder / "model.safetensors")
    weights["model.layers.9.odd"] = torch.zeros(2)
    safetensors.torch.save_file(weights, folder / "model.safetensors", {"format": "pt"})
    osp.load_model(str(folder), arguments())
    assert "match nothing: ['model.layers.9.odd']" in capsys.readouterr().out
    del weights["model.layers.1.mlp.up_proj.weight"]
    safetensors.torch.save_file(weights, folder / "model.safetensors", {"format": "pt"})
    with stopped("lacks weights, such as model.layers.1.mlp.up_proj.weight"):
        osp.load_model(str(folder), arguments())


def test_a_model_with_recurrent_layers_runs_by_plain_passes(tmp_path, capsys):
    model, _ = osp.load_model(saved(tmp_path, BYTES, hybrid(len(BYTES))), arguments())
    assert not model.shares_prompts
    assert "plain passes" in capsys.readouterr().out
    prompts, responses = [[5, 6, 7, 8], [9], [5, 6, 7, 8]], [[4, 3], [8, 8, 7], [6]]
    slow = [naive_logps(model, *texts).item() for texts in zip(prompts, responses)]
    assert osp.response_logps(model, prompts, responses).tolist() == pytest.approx(slow, abs=CLOSE)
    questions = [("hi", "rain", "the mat ."), ("hi", "mat", "x")]
    found = osp.verdict_probabilities(model, BYTES, *zip(*questions))
    assert found == pytest.approx([asked_alone(model, BYTES, *one) for one in questions], abs=CLOSE)


def test_ids_that_the_tokenizer_does_not_have_are_never_sampled():
    model = rotary(40)
    model.words = 8
    noise = torch.full((1, 50), 0.999999, dtype=torch.float64)
    assert osp.sample(model, [[3]], noise, 1.0, [1]) == [[7] * 50]


TURN = LOOP + "<{{ m.role }}>{{ m.content }}<end>{% endfor %}"
OPENING = "{% if add_generation_prompt %}<assistant>"
PARTS = "{% for part in m.content %}{{ part.text }}{% endfor %}"


@pytest.mark.parametrize("template, expected", [
    (TURN + OPENING + "{% endif %}", ("<user>hi<end><assistant>", "")),
    (TURN + OPENING + "\n{% endif %}", ("<user>hi<end><assistant>\n", "")),
    (TURN.replace("m.content", "' ' + m.content") + OPENING + "{% endif %}",
     ("<user> hi<end><assistant>", " ")),
    (TURN.replace("{{ m.content", "{% if m.role == 'assistant' %}<think></think>{% endif %}{{ m.content")
     + OPENING + "{% endif %}", ("<user>hi<end><assistant><think></think>", "")),
    (TURN.replace("{{ m.content }}", PARTS) + OPENING + "{% endif %}", ("<user>hi<end><assistant>", "")),
    (TURN + OPENING + "<think>{% endif %}", "enable_thinking"),
    (LOOP + "{% endfor %}" + OPENING + "{% endif %}", "leaves out the prompt")])
def test_what_stands_before_an_answer_is_read_off_the_template(template, expected):
    tokenizer = byte_level_tokenizer(template)
    if isinstance(expected, str):
        with stopped(expected):
            osp.framed(tokenizer, "hi")
        return
    assert (osp.framed(tokenizer, "hi"), osp.template_habits(tokenizer)[2]) == expected
    [ids] = osp.encode_responses(tokenizer, ["hi"], ["the cat"], 99)
    assert tokenizer.decode(ids) == expected[1] + "the cat<|endoftext|>"


def test_help_shows_both_defaults(capsys):
    with pytest.raises(SystemExit, match="0"):
        arguments("--help")
    said = " ".join(capsys.readouterr().out.split())
    assert "peak learning rate (default: 1e-06)" in said
    assert re.search('Defaults of the built-in task: .*"learning_rate": 0.001,', said)
    rates = [arguments(words).learning_rate for words in ("", "--model_name_or_path m")]
    assert rates == [0.001, 1e-6]


def test_chat_template_kwargs_reach_the_template(tmp_path):
    folder = saved(tmp_path, byte_level_tokenizer("{{ enable_thinking }}" + CHAT))
    _, loaded = osp.load_model(folder, arguments('--chat_template_kwargs {"enable_thinking":false}'))
    assert osp.framed(loaded, "hi").startswith("False<|user|>")


def test_dropout_is_zero_and_stays_in_the_saved_configuration(tmp_path):
    model, _ = osp.load_model(saved(tmp_path, BYTES, absolute(len(BYTES))), arguments())
    ids = torch.tensor([[3, 4, 5]])
    with torch.no_grad():
        assert torch.equal(model.train()(input_ids=ids).logits, model.eval()(input_ids=ids).logits)
    assert model.config.resid_pdrop == model.config.attn_pdrop == 0.1


# End to end ---------------------------------------------------------------------------------------
QUICK = """--sft_max_steps 3 --sft_batch_size 4 --num_train_prompts 12 --num_train_epochs 2
    --save_steps 2 --prompts_per_step 4 --num_generations 4 --num_eval_prompts 8 --num_eval_pairs 8
    --eval_steps 4"""
MORE_OF = {"osp": "", "tso": "--method tso --reference_steps 3 --label_margin 1e-6"}
CLOCK = ("seconds", "tokens_per_second")


def command(folder, *more):
    """The arguments of a quick run."""
    return " ".join([QUICK, "--output_dir", str(folder), *more]).split()


def timeless(figures):
    return {name: value for name, value in figures.items() if not name.startswith(CLOCK)}


def weights_in(folder):
    return transformers.AutoModelForCausalLM.from_pretrained(folder).state_dict()


def state_of(checkpoint):
    return torch.load(checkpoint, weights_only=True)


def read_run(folder):
    """The summary, the metrics and the weights of a run, without what a clock measured."""
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
    same_figures = (one.summary, one.lines) == (two.summary, two.lines)
    return same_figures and same_weights(one.weights, two.weights)


@contextmanager
def copied_on_the_way(number):
    """Runs leave copies of their folders, <folder>-in-sft before SFT is saved and <folder>-in-step
    before the step of this number. A run that is killed there leaves the same."""
    save_sft, measured_step = osp.save_sft, osp.measured_step

    def save(models, args):
        shutil.copytree(args.output_dir, f"{args.output_dir}-in-sft")
        return save_sft(models, args)

    def measure(models, rows, method, step, args):
        if step + 1 == number:
            shutil.copytree(args.output_dir, f"{args.output_dir}-in-step")
        return measured_step(models, rows, method, step, args)

    with mock.patch.multiple(osp, save_sft=save, measured_step=measure):
        yield


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A run of each method, by its name, with copies on its way. No test may change them."""
    folder = tmp_path_factory.mktemp("finished")
    with copied_on_the_way(6):
        return {method: run(folder / method, more) for method, more in MORE_OF.items()}


def copied(run, where, folder):
    """A copy of a run's folder, or of one on its way, as if its command had made it here."""
    folder /= "run"
    shutil.copytree(f"{run.folder}{where}", folder)
    arguments = folder / "arguments.json"
    if arguments.exists():
        arguments.write_text(arguments.read_text().replace(str(run.folder), str(folder)))
    return folder


@pytest.fixture(scope="module")
def real(tmp_path_factory):
    """A folder with a random `model` in bf16 with a chat template; arguments to train it on prompts."""
    folder = tmp_path_factory.mktemp("real")
    data = write_lines(folder / "prompts.jsonl", [{"prompt": chat(f"what is {i} ?")} for i in range(40)])
    model = saved(folder / "model")
    return folder, f"--model_name_or_path {model} --dataset_name {data} --max_new_tokens 8"


def test_every_run_leaves_its_figures_curves_and_a_table(finished):
    run = finished["osp"]
    first, last = run.lines[0], run.lines[-1]
    assert [line["step"] for line in run.lines] == [1, 2, 3, 4, 5, 6]
    assert abs(first["kl"]) < 1e-4 and abs(first["margin"]) < 1e-5
    assert first["loss"] == pytest.approx(math.log(2), abs=1e-5)
    assert [line["step"] for line in run.lines if "eval_kl" in line] == [4, 6]
    own = {name.removeprefix("eval_"): value for name, value in last.items() if name.startswith("eval_")}
    assert own.items() <= run.summary.items()
    assert (run.folder / "curves.png").read_bytes().startswith(b"\x89PNG")
    assert run.said.count("\n  policy: ") == 3
    for name in ("gold_reward", "win_rate_vs_sft", "judge_accuracy", "cut_fraction"):
        assert re.search(f"\n{name} .*{run.summary[name]:.3f}\n", run.said)
    line = (run.folder / "metrics.jsonl").read_text().splitlines()[0]
    stages = re.findall(r'"seconds_(\w+)": (?!0.0,)', line)
    assert stages == ["sample", "rank", "judge", "reference", "update"]


def test_max_steps_0_only_evaluates_and_arguments_json_is_the_first_file(tmp_path, monkeypatch):
    replace = mock.Mock(wraps=os.replace)
    monkeypatch.setattr(os, "replace", replace)
    found = run(tmp_path, "--max_steps 0")
    first, *_, last = [call.args[1].name for call in replace.call_args_list]
    assert (first, last) == ("arguments.json", "summary.json")
    assert found.lines == [] and abs(found.summary["kl"]) < 1e-5
    assert same_weights(found.weights, weights_in(tmp_path / "sft"))


@pytest.mark.parametrize("figures, warning", [
    ({}, None),
    ({"judge_accuracy": 0.56}, None),  # two standard errors at 400 pairs are 0.05
    ({"judge_accuracy": 0.54}, "no better than chance"),
    ({"judge_accuracy": 0.56, "judge_pairs": 100}, "no better than chance"),
    ({"order_agreement": 0.6}, "two orders disagree"),
    ({"cut_fraction": 0.6}, "--max_new_tokens"),
    ({"judge_calibration_error": 0.14}, None),
    ({"judge_calibration_error": 0.16}, "--sft_num_train_epochs"),
])
def test_figures_that_mean_nothing_are_warned_of(figures, warning):
    good = {"held_out_prompts": 9, "self_judged": False, "cut_fraction": 0.1, "order_agreement": 0.9,
            "judge_accuracy": 0.9, "judge_pairs": 400}
    table = osp.report_table(good | figures, "OSP")
    assert table.count("Warning") == (warning is not None)
    assert (warning or "") in table


@pytest.mark.parametrize("more, self_judged", [
    ("--gradient_checkpointing", True),
    ("--method tso --label_margin 1e-9 --eval_judge_name_or_path {model}", False)])
def test_a_real_model_folder_with_chat_template_and_prompts_alone(tmp_path, real, more, self_judged):
    folder, words = real
    found = run(tmp_path, words, "--max_steps 2", more.format(model=folder / "model"))
    assert found.summary["self_judged"] is self_judged
    assert (found.summary["prompts"], len(found.lines)) == (12, 2)
    assert not {"gold_reward", "judge_accuracy"} & found.summary.keys()
    assert {weight.dtype for weight in found.weights.values()} == {torch.float32}
    assert transformers.AutoTokenizer.from_pretrained(tmp_path).chat_template == CHAT
    assert f"self-judged: {self_judged}" in found.said and "SFT: False" in found.said


def test_bf16_trains_fp32_weights_with_two_models_from_almost_the_same_start(tmp_path, monkeypatch):
    """While a step is logged the policy and the frozen start are alive, and no third model."""
    loaded, alive, load_model, step_figures = [], [], osp.load_model, osp.step_figures

    def load(*args):
        model, tokenizer = load_model(*args)
        loaded.append(weakref.ref(model))
        return model, tokenizer

    def figures(*args):
        alive.append(sum(ref() is not None for ref in loaded))
        return step_figures(*args)

    monkeypatch.setattr(osp, "load_model", load)
    monkeypatch.setattr(osp, "step_figures", figures)
    found = run(tmp_path, "--bf16 --max_steps 1 --num_eval_prompts 2 --sft_max_steps 1")
    assert {weight.dtype for weight in found.weights.values()} == {torch.float32}
    assert abs(found.lines[0]["margin"]) < 0.05
    assert abs(found.lines[0]["kl"]) < 0.3
    assert alive == [2]


def test_a_step_of_identical_pairs_makes_no_update(tmp_path, monkeypatch):
    monkeypatch.setattr(osp, "sample", lambda model, prompt_ids, *_: [[5, 1] for _ in prompt_ids])
    with copied_on_the_way(2):
        found = run(tmp_path / "run", "--sft False --max_steps 2 --save_steps 1")
    counts = [(line["pairs"], line["dropped_identical_pairs"], line.get("loss")) for line in found.lines]
    assert counts == [(0, 8, None)] * 2
    assert same_weights(found.weights, osp.builtin_model(0)[0].state_dict())
    # torch would give a fresh AdamW a step that it never made
    assert "optimizer" not in state_of(tmp_path / "run-in-step" / "metrics.pt")
    assert same_runs(run(tmp_path / "run-in-step", "--sft False --max_steps 2 --save_steps 1"), found)


# Save and resume ----------------------------------------------------------------------------------
@pytest.mark.parametrize("method, where, lost", [
    ("osp", "-in-step", "metrics.pt"), ("tso", "-in-step", None), ("osp", "-in-sft", None),
    ("osp", "-in-sft", "sft.pt")])
def test_a_run_gone_on_with_equals_one_left_alone(tmp_path, finished, method, where, lost):
    """With its checkpoint, or without it, which starts the phase anew. The step before has its line."""
    folder, other = copied(finished[method], where, tmp_path), finished[method]
    if lost:
        (folder / lost).unlink()
    assert same_runs(run(folder, MORE_OF[method]), other)
    assert files_in(folder).keys() == files_in(other.folder).keys()


def test_a_checkpoint_holds_the_reference_where_it_moves(finished):
    folder = finished["tso"].folder
    state = state_of(f"{folder}-in-step/metrics.pt")
    assert state["step"] == 4
    assert not same_weights(state["reference"], weights_in(folder / "sft"))
    assert not same_weights(state["reference"], state["policy"])
    names = state_of(f"{finished['osp'].folder}-in-step/metrics.pt").keys()
    assert names == {"step", "scheduler", "policy", "optimizer"}


def apart(folder, work):
    """Does work in a process of its own, which writes into folder/said. Returns its exit code, or less
    the signal that ended it."""
    if pid := os.fork():
        return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    code = 99
    try:
        signal.signal(signal.SIGINT, signal.default_int_handler)
        sys.stdout = sys.stderr = (folder / "said").open("a")
        work()
        code = 0
    except SystemExit as end:
        code = end.code or 0
    finally:
        sys.stdout.flush()
        os._exit(code)


def meet(number, owner, name, n, leave=lambda *args: None):
    """Makes the n-th call of a function meet a signal, after it has left something half done."""
    real, calls = getattr(owner, name), itertools.count(1)

    def met(*args, **more):
        if next(calls) == n:
            leave(*args)
            os.kill(os.getpid(), number)
        return real(*args, **more)

    setattr(owner, name, met)


def half_a_file(state, path):
    path.write_bytes(b"half")


def half_a_line(models, rows, method, step, args):
    with (args.output_dir / "metrics.jsonl").open("a") as file:
        file.write('{"step": 4, "lo')


MOMENTS = [
    (osp, "supervised_tasks", 4),
    (torch, "save", 1, half_a_file),  # sft.pt
    (transformers.PreTrainedTokenizerFast, "save_pretrained", 1),  # in sft/, after its weights
    (osp, "measured_step", 4, half_a_line),
    (torch, "save", 1, half_a_file),  # metrics.pt
    (osp, "optimizer_step", 2),
    (transformers.PreTrainedTokenizerFast, "save_pretrained", 1)]  # of the final model


def test_a_run_killed_anywhere_ends_as_one_left_alone(tmp_path):
    """Real processes, real signals."""
    more, alone, killed = "--sft_max_steps 7", tmp_path / "alone", tmp_path / "killed"
    osp.builtin_preferences()  # now, not in each process

    def go_on():
        osp.main(command(killed, more))

    def die():
        meet(signal.SIGKILL, *moment)
        go_on()

    assert apart(tmp_path, lambda: osp.main(command(alone, more))) == 0
    for moment in MOMENTS:
        assert apart(tmp_path, die) == -signal.SIGKILL, moment
    assert apart(tmp_path, go_on) == 0, (tmp_path / "said").read_text()
    assert same_runs(read_run(alone), read_run(killed))
    files, others = files_in(alone), files_in(killed)
    assert files.keys() == others.keys()
    for name in files:
        if name.endswith((".safetensors", "sft.jsonl")):
            assert files[name] == others[name]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_what_the_command_line_says_of_signals_and_mistakes(tmp_path, number):
    def typed(*more):
        sys.argv = [osp.__file__, *command(tmp_path / "run", "--save_steps 1", *more)]
        runpy.run_path(osp.__file__, run_name="__main__")

    def interrupted():
        meet(number, torch, "save", 1)
        typed()

    assert apart(tmp_path, interrupted) == 130
    assert apart(tmp_path, lambda: typed("--beta 0.5")) == 2
    said = (tmp_path / "said").read_text()
    assert "osp: interrupted; the same command goes on from the last checkpoint.\n" in said
    assert said.endswith("or remove the folder.\n") and "osp: " + str(tmp_path) in said
    assert "Traceback" not in said


def locked(folder):
    """Takes a run's lock, as another process at work would."""
    lock = (folder / ".lock").open("w")
    fcntl.flock(lock, fcntl.LOCK_EX)
    return lock


def halved(name):
    """Leaves the first half of a file."""
    return lambda folder: os.truncate(folder / name, (folder / name).stat().st_size // 2)


@pytest.mark.parametrize("where, change, more, sentence", [
    ("-in-step", None, "--beta 0.5", r"other arguments \(beta was 0.1, is 0.5\): give the same"),
    ("", None, "--beta 0.5", "beta was 0.1, is 0.5"),
    ("-in-step", locked, "", "Another process is at work in"),
    ("-in-step", halved("metrics.pt"), "", "metrics.pt is damaged .*: remove it, and the same command"),
    ("-in-sft", halved("sft.pt"), "", "sft.pt is damaged"),
    ("-in-step", lambda folder: (folder / "arguments.json").unlink(), "", "other files and no run"),
    ("/sft", None, "", "other files and no run: give another --output_dir"),
])
def test_what_cannot_go_on_ends_in_one_sentence_and_changes_nothing(
        tmp_path, finished, where, change, more, sentence):
    folder = copied(finished["osp"], where, tmp_path)
    held = change and change(folder)
    before = files_in(folder)
    with stopped(sentence):
        run(folder, more)
    assert files_in(folder) == before
    del held  # the lock


def test_a_finished_run_is_shown_and_not_done_again(monkeypatch, finished):
    monkeypatch.setattr(osp, "load_model", None)
    for method, found in finished.items():
        before = files_in(found.folder)
        again = run(found.folder, MORE_OF[method])
        assert again.said.startswith("This run was finished before.")
        assert osp.report_table(found.summary, method.upper()) in again.said
        assert same_runs(again, found)
        assert files_in(found.folder) == before


def test_a_full_disk_costs_no_file(tmp_path, monkeypatch, finished):
    """While the SFT model, a checkpoint or the final model is written; the same command goes on."""
    folder = copied(finished["osp"], "-in-sft", tmp_path)
    full = OSError(28, "No space left on device")
    for owner, name, error in (
            (osp, "save_model", full), (torch, "save", full), (torch, "save", RuntimeError("torch's"))):
        before = files_in(folder).keys() - {"sft.pt"}
        with monkeypatch.context() as patches, stopped("Cannot write .*make room", code=1):
            patches.setattr(owner, name, mock.Mock(side_effect=error))
            run(folder)
        assert before <= files_in(folder).keys()
    with monkeypatch.context() as patches, stopped("Cannot write .*make room", code=1):
        patches.setattr(osp, "save_model", mock.Mock(side_effect=full))  # SFT is done: the final one
        run(folder)
    assert (folder / "metrics.pt").exists()
    assert same_runs(run(folder), finished["osp"])
    with stopped("Cannot write .*--output_dir", code=1):
        run(folder / "summary.json" / "run")


# Several processes --------------------------------------------------------------------------------
TORCHRUN = """
import json, runpy, shutil, sys
sys.path.insert(0, sys.argv[1])
import osp
measured_step = osp.measured_step
def measure(models, rows, method, step, args):
    if step == 1 and osp.RANK == 0 and method.moves_reference:
        shutil.copytree(args.output_dir, str(args.output_dir) + '-in-step', dirs_exist_ok=True)
    return measured_step(models, rows, method, step, args)
osp.measured_step = measure
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

    A log-probability sums 16 tokens, each off by a few times 2^-24 of logits of size 10, by 1e-5 at
    most, as margins, KL and losses are; 1e-3 leaves room. AdamW divides a gradient by its size, so where
    one is nearly 0 its sign is anyone's; but such weights are a small part of the way they all went."""
    for figures, others in zip([one.summary, *one.lines], [two.summary, *two.lines], strict=True):
        assert figures.keys() == others.keys()
        for name, value in figures.items():
            if name == "grad_norm":
                assert others[name] == pytest.approx(value, rel=1e-2)
            elif name != "margin_accuracy":  # of margins that are 0 up to rounding
                assert others[name] == pytest.approx(value, abs=1e-3), name
    start, gone, other = [
        torch.cat([weight.flatten() for weight in weights.values()])
        for weights in (weights_in(one.folder / "sft"), one.weights, two.weights)]
    assert (other - gone).norm() < 0.1 * (gone - start).norm()


def test_two_processes_do_what_one_does(tmp_path):
    """SFT, then steps of 3, 1, 3, 1 prompts with a pair each, so that the second process has none in
    every other step. Each goes on with what the other left of TSO, whose checkpoints hold the most."""
    small = """--sft_max_steps 2 --prompts_per_step 3 --num_train_prompts 4 --num_eval_prompts 3
        --num_eval_pairs 3 --save_steps 1 --micro_batch_size 4 --beta 1 --learning_rate 1e-4
        --sft_learning_rate 1e-4 --num_generations"""
    options = {"osp": f"{small} 2", "tso": f"{MORE_OF['tso']} {small} 3 --reference_steps 1"}
    with copied_on_the_way(2):
        alone = {method: run(tmp_path / method, more) for method, more in options.items()}
    shutil.copytree(tmp_path / "tso-in-step", tmp_path / "back")
    runs = [command(tmp_path / f"{method}-two", more) for method, more in options.items()]
    runs += [command(tmp_path / "back", options["tso"]), runs[0]]
    done = torchrun(tmp_path, *runs, runs[0] + ["--beta", "0.5"])
    assert done.returncode == 1 and done.stderr.count("beta was 1.0, is 0.5") == 1, done.stderr
    assert done.stderr.count("Traceback") == 1  # torchrun's own
    assert done.stdout.splitlines()[:3] == alone["osp"].said.splitlines()[:3]
    assert done.stdout.count("finished before") == 1
    states = [state_of(tmp_path / f"{name}-in-step" / "metrics.pt") for name in ("tso", "tso-two")]
    moments = [state["optimizer"]["state"] for state in states]
    for name in moments[0]:  # after one step exp_avg is a tenth of the gradient
        own, other = [moment[name]["exp_avg"] for moment in moments]
        assert type(other) is torch.Tensor
        assert (own - other).abs().max() <= 1e-3 * own.abs().max() + 1e-12
    assert_close(alone["osp"], read_run(tmp_path / "osp-two"))
    for folder in ("tso-two", "back"):
        assert_close(alone["tso"], read_run(tmp_path / folder))
    assert_close(alone["tso"], run(tmp_path / "tso-two-in-step", options["tso"]))


# TSO ----------------------------------------------------------------------------------------------
@pytest.mark.parametrize("K, shares", [(8, [2, 2, 2, 2]), (4, [1, 1, 1, 1]), (6, [2, 2, 1, 1])])
def test_the_matrix_responds_in_equal_shares_and_humans_come_after_it(tmp_path, K, shares):
    """A model of the matrix may have another tokenizer: its texts are encoded anew for the policy."""
    other, models = saved(tmp_path, PIECES), builtin_models(1, 0, 2)
    args = arguments(f"--num_generations {K} --max_new_tokens 6 --matrix_model_names_or_paths {other}")
    said = [["rain is warm .", "snow is ugly ."], ["tea is sweet .", "tea is awful ."]]
    rows = osp.distinct_prompts(models.tokenizer, [(RAIN, *texts) for texts in said], 1)
    method = osp.tso(args)
    for step in (0, 1, 2):
        [found] = method.sample(models, rows, step, args)
        sources = [one.source for one in found]
        assert [sources.count(one) for one in ("policy", "reference", "start", other)] == shares
        assert sources[0] == "policy"  # the baseline of ranking is on-policy
        assert [one.text for one in found[K:]] == said[step % 2]
        assert sources[K:] == list(osp.HUMAN)
        for one in found:
            if one.source in (other, *osp.HUMAN):
                assert [one.ids] == osp.encode_responses(models.tokenizer, [RAIN], [one.text], 6)
    [alone] = osp.respond(models.reference, models.tokenizer, rows, range(1, K, 4), 2, args)
    assert [one.ids for one in alone] == [one.ids for one in found if one.source == "reference"]


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
    rewards = torch.tensor([[0.3, 0.1, 0.1, 0.5, 0.1], [-0.3, 0.1, 0.3, 0.1, 0.1]])
    figures = osp.tso_figures(pairs, *rewards, clip=0.2)
    assert figures == pytest.approx({  # the human chose what the judge gave 0.3
        "overruled_verdicts": 1, "winners_clipped": 1 / 5, "losers_clipped": 1 / 5})


# Data collection ----------------------------------------------------------------------------------
COLLECT = """--method collect --num_labels 3 --min_strength 0.5001 --max_strength 1 --max_similarity 1
    --keep_prompts 1"""


def labels_in(folder):
    return [json.loads(line) for line in (folder / "preferences.jsonl").read_text().splitlines()]


def test_the_built_in_task_collects_by_the_truth_and_the_result_trains(tmp_path, capsys):
    with stopped("No pair is left to ask about"):
        osp.main(command(tmp_path / "none", COLLECT, "--min_strength 0.999"))
    folder = tmp_path / "run"
    summary = osp.main(command(folder, COLLECT))
    rows, before = labels_in(folder), files_in(folder)
    assert summary["labels"] == 3 == len(rows)
    assert summary["prompts"] == 12 == summary["prompts_kept"]
    read = osp.load_preferences(str(folder / "preferences.jsonl"))
    assert read == [{name: row[name] for name in ("prompt", "chosen", "rejected")} for row in rows]
    assert osp.main(command(folder, COLLECT)) == summary  # shown again
    assert capsys.readouterr().out.count("To train on the labels: --dataset_name") == 2
    (folder / "summary.json").unlink()
    (folder / "preferences.jsonl").write_text(json.dumps(rows[0]) + "\n")
    assert osp.main(command(folder, COLLECT)) == summary
    assert files_in(folder) == before


def test_each_answer_is_safe_and_the_same_command_goes_on(tmp_path, monkeypatch, capsys, real):
    def collect(*answers, more=""):
        """The answers are typed, as by a human or a program; an exception comes instead of a key."""
        with mock.patch("builtins.input", side_effect=answers):
            return osp.main(command(tmp_path, COLLECT, real[1], more))

    with stopped("All answers are in preferences.jsonl; the same command goes on", code=0):
        collect("1", "x", "s", EOFError)
    assert "'x' is none of these keys" in capsys.readouterr().out
    first = labels_in(tmp_path)
    assert [row["chosen"] is None for row in first] == [False, True]
    with pytest.raises(KeyboardInterrupt):
        collect("2", KeyboardInterrupt)
    with stopped("num_labels was 3, is 4"):
        collect(more="--num_labels 4")
    assert collect("1")["labels"] == 3
    rows = labels_in(tmp_path)
    assert rows[:2] == first and len(rows) == 4
    kept = [row for row in rows if row["chosen"]]
    assert len({(str(row["prompt"]), *sorted((row["chosen"], row["rejected"]))) for row in kept}) == 3
    assert len(osp.load_preferences(str(tmp_path / "preferences.jsonl"))) == 3


@given(st.lists(st.tuples(TEXT, TEXT, TEXT, st.sampled_from("12s")), min_size=1, max_size=5))
@settings(max_examples=40, deadline=None)
def test_whatever_responses_hold_the_file_reads_back_exactly(tmp_path_factory, questions):
    asked, expected, args = [], [], osp.Arguments(output_dir=tmp_path_factory.getbasetemp())
    for prompt, one, two, answer in questions:
        sides = osp.Candidate([], one), osp.Candidate([], two)
        asked.append(osp.Question(row_of(prompt), *sides, 0.25, 0.0))
        rows = {"1": (one, two, 0.25), "2": (two, one, 0.75), "s": (None, None, None)}
        expected.append((prompt, *rows[answer]))
    path = args.output_dir / "preferences.jsonl"
    path.unlink(missing_ok=True)
    with mock.patch.object(osp, "read_answer", side_effect=[answer for *_, answer in questions]):
        labels = osp.ask_human(asked, None, args)
        assert osp.ask_human(asked, None, args) == labels  # no answer is asked for twice
    lines = path.read_text("utf-8").split("\n")[:-1]
    assert [tuple(json.loads(line).values()) for line in lines] == expected
    assert labels == sum(chosen is not None for _, chosen, *_ in expected)


def test_no_character_of_a_response_controls_the_terminal(monkeypatch, capsys):
    monkeypatch.setattr("sys.stdin", io.StringIO("1\n"))
    evil = "\x1b[2Jred\x07\x9b5n \u202eright to left\ttab é 雪"
    sides = osp.Candidate([], evil), osp.Candidate([], "fine")
    osp.read_answer(osp.Question(row_of(), *sides, 0.5, 0.0), "0 of 3")
    said = capsys.readouterr().out
    assert not {*"\x1b\x07\x9b\u202e\t"} & {*said}
    assert "é 雪" in said and "red" in said


def test_the_steps_of_collection_by_hand():
    """Prompts whose scores spread most are kept; the filter drops and counts."""
    scores = [[0.5, 0.5], [0.1, 0.9], [0.4, 0.6], [0.5, 0.8]]
    candidates = [[osp.Candidate([], "", score=score) for score in row] for row in scores]
    assert osp.widest_spreads(candidates, 0.5) == [1, 3]
    assert osp.widest_spreads(candidates, 0.01) == [1]
    pairs = [pair_of(*texts) for texts in [
        ("a b c", "d e f", 0.7), ("a b c", "a b c"), ("a b c d", "a b c e", 0.7), ("a", "b", 0.52),
        ("c", "d", 0.3), ("e", "f", 0.97), ("g", "h", 0.02), ("i\n\nHuman:", "j", 0.7),
        ("k l", "k m", 0.8)]]
    firsts = set()
    for seed in range(20):
        questions, counts = osp.worth_asking(pairs, osp.Arguments(max_similarity=0.7, seed=seed))
        assert counts == {
            "pairs": 9, "usable": 7, "not_alike": 6, "no_tie": 5, "no_landslide": 3, "questions": 2}
        asked = [(one.one.text, one.two.text, round(one.p, 6)) for one in questions]
        assert asked[0] in [("a b c", "d e f", 0.7), ("d e f", "a b c", 0.3)]
        assert asked[1] in [("c", "d", 0.3), ("d", "c", 0.7)]  # of the first one shown
        firsts.add(asked[0])
    assert len(firsts) == 2  # in random order


# Golden vectors for ports -------------------------------------------------------------------------
VECTORS_README = """# Golden vectors of osp.py

`make vectors` writes them. A port must agree with pure.json and logps.safetensors (float64) to 1e-9
relative or 1e-12 absolute, and with steps.* (float32) to 1e-3 relative or 1e-4 absolute. Ids, lengths,
masks and pairs are exact. Logarithms are natural. B = 3 prompts a step, K = 4 responses a prompt, P
pairs or cases, N sequences, T tokens of the longest response, L of the longest whole sequence.

## pure.json
* `strength`: `logits_12`, `logits_21` (P, 2) are a judge's logits of the verdicts A and B, with
  response 1 shown as A, and with response 2 shown as A. `p_12`, `p_21` (P,) = the softmax's probability
  of A. `strength` (P,), the probability that response 1 is better, = (p_12 + (1 - p_21)) / 2, in this
  form.
* `ranking`: 8 responses to one prompt. The first is the baseline, always shown as A; each of the 8,
  itself included, is shown as B. `logits` (8, 2) of A and B; `scores` (8,) = 1 - probability of A.
* `pairs`, a list: `scores` of a prompt's responses, and `ranked`, pairs [better, worse] of their
  indices. Sort by falling score; ties keep their order. Pair the first with the last, the second with
  the last but one, and so on inwards; an odd number leaves out the middle one.
* `logps`: what logps.safetensors pads. `prompt_ids`, `response_ids`: N lists. `pad`: the id of padding,
  which is a real token elsewhere, so mask by position and never by id.
* `spce`: of `reward_1`, `reward_2`, `strength` (P,), with h = reward_1 - reward_2 and p = strength,
  `loss` (P,) = -[p log sigmoid(h) + (1 - p) log sigmoid(-h)], never inf or nan. `gradient_1` (P,) = d
  loss / d reward_1 = (1 - p) sigmoid(h) - p sigmoid(-h); the shorter sigmoid(h) - p loses digits where
  h is large. `gradient_2` (P,) = d loss / d reward_2 = -gradient_1.
* `dual_clip`: a variant's loss, after TSO (arXiv 2409.02118), formulas reconstructed, of `reward_1`,
  `reward_2`, `label`, `clip` (P,). Where label > 0.5 response 1 is the winner and 2 the loser, else the
  reverse. `loss` (P,) = -log sigmoid(min(winner's reward, clip) - max(loser's reward, -clip)).
  `gradient_1`, `gradient_2` (P,) as above: 0 for a winner above clip, and 0 for a loser below -clip.
* `adamw`: two steps from the parameters `start` (5,) with `gradients` (2, 5), not yet clipped. After
  each: `parameters` (2, 5); in each: `grad_norms` (2,) before clipping, `learning_rates` (2,).
  Clipping: g *= min(1, 1 / (norm + 1e-6)), the norm over all parameters. AdamW: betas 0.9 and 0.95, eps
  1e-8 added outside the root, both moments bias-corrected, no weight decay.
* `schedules`: by name, the learning rates (20,) of steps 0 to 19 at peak 1. Steps 0 and 1, the warm-up,
  have step / 2. Then, with u = (step - 2) / 18, linear has 1 - u, cosine (1 + cos(pi u)) / 2 and
  constant_with_warmup 1. `constant` has no warm-up: it is always 1.

## logps.safetensors (ids, masks and positions int64)
Prompts are padded on the left and responses on the right, so that all meet at one column: `input_ids`,
`attention_mask` (N, L). `position_ids` (N, L) = max(cumsum(attention_mask) - 1, 0). `logits` (N, L, 8)
go in; those at a place score the NEXT token. `token_logps` (N, T): log-probabilities of the responses'
tokens, 0 beyond their ends. `logps` (N,): their sums, EOS included, prompt excluded.

## model.json and weights.safetensors (float32): pi_SFT, which is judge, reference and the first policy
A Llama. x = embed_tokens[ids]. Each layer does x += attention(rms(x)), then x += mlp(rms(x)). At last
logits = rms(x) @ embed_tokens.T. The rms before attention, before mlp and at last have the weights
input_layernorm, post_attention_layernorm and model.norm: rms(x) = weight * x / sqrt(mean(x^2) +
`rms_norm_eps`). mlp(x) = down(silu(gate(x)) * up(x)). Matrices are (out, in): y = x @ W.T, without
biases. Attention is causal, its scale 1 / sqrt(head_dim). Head i takes the columns from i * head_dim up
to (i + 1) * head_dim of q, k and v. Padding is masked out as a key. A padded query on the left then has
no key: its output is not used but must be finite, so mask with a large negative number, not -inf. RoPE
turns q and k: at position m, for j < head_dim / 2, with the angle a = m * `rope_theta` ** (-2j /
head_dim), the elements (j, j + head_dim / 2) = (u, w) become (u cos a - w sin a, w cos a + u sin a).

Ids: 0 padding, 1 EOS, 5 and 6 the verdicts A and B. The judge's question about a prompt x, with a
response a shown as A and b as B, is x 2 a 3 b 4, where a and b lose their EOS. Its verdict's logits are
those of 5 and 6 at its last token.

## steps.json: `arguments` of osp.py that matter, and `steps`, a list of three
* `prompt_ids`: B lists. `responses`: B x K lists, given here where a real run samples. Those without
  EOS were cut off at `max_new_tokens`.
* `pairs`: P triples [prompt, better, worse] of indices, prompt by prompt, from the outermost pair
  inwards, without pairs of equal ids. Equal questions are asked once, so equal responses tie exactly.
* `metrics`: `step`, counted from 1. `pairs`: P. `dropped_identical_pairs`: how many were left out.
  `dropped_unsure_pairs`: 0. `loss`, `strength_mean`, `margin`: means over the P pairs of losses,
  strengths and h = reward of the better - reward of the worse. `strength_std` divides by P. `kl`: mean
  over the 2 P responses of log-probability under the policy less that under pi_SFT. `margin_accuracy`:
  share of pairs where h > 0 and strength > 1/2 are both true or both false; not in step 1, whose h are
  0 but for rounding. `order_agreement`: the same of p_12 > 1/2 and p_21 < 1/2, with the better response
  as 1. `response_tokens`: mean length of the B K responses, EOS included. `cut_fraction`: share of them
  without EOS. `distinct_fraction`: how many different ones there are, over B K. `learning_rate`: the
  one used: that of `arguments` in step 1, 2/3 of it in step 2, 1/3 in step 3. `grad_norm`: before
  clipping.

A step's loss is the mean of spce over its P pairs, with the better response as 1. A reward is beta *
(the response's log-probability under the policy - that under pi_SFT). The policy is what the step
before left. Clipping and AdamW are as above.

## steps.safetensors (float32; questions and lengths int64): a name ends with its step, as in `scores.1`
* `rank_questions` (B, K, L): response 0 as A and response k as B, padded on the right with 0.
  `rank_lengths` (B, K), `rank_logits` (B, K, 2) and `scores` (B, K) belong to them.
* `pair_questions` (P, 2, L): of each pair with the better response as A, then with the worse one as A.
  `pair_lengths` (P, 2), `pair_logits` (P, 2, 2). `strength` (P,): how likely the better one is better.
* `ref_token_logps`, `policy_token_logps` (P, 2, T), `rewards` (P, 2): of the better and of the worse
  response, before the update. ref is pi_SFT. `losses` (P,).
* `gradient.<parameter>`: of the mean loss, before clipping. `after.<parameter>`: the policy after the
  step. Where a gradient is near 0, Adam's first steps depend on its last digits: hence the tolerance.
"""
VECTOR_ARGUMENTS = {
    "num_generations": 4, "max_new_tokens": 6, "beta": 0.5, "learning_rate": 0.003,
    "lr_scheduler_type": "linear", "warmup_steps": 0, "max_grad_norm": 1.0, "micro_batch_size": 96}
VECTOR_SHAPE = {
    "vocab_size": 32, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2,
    "num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 8, "rms_norm_eps": 1e-6}


class GivenLogits(torch.nn.Module):
    """A causal language model that looks logits up: after id i at position t they are table[t, i]."""

    config, device = transformers.LlamaConfig(), torch.device("cpu")

    def __init__(self, table):
        super().__init__()
        self.table = torch.tensor(table)
        self.eval()

    def forward(self, input_ids, position_ids, logits_to_keep, **_):
        self.position_ids = position_ids
        logits = self.table[position_ids, input_ids]
        if isinstance(logits_to_keep, int):
            return types.SimpleNamespace(logits=logits[:, -logits_to_keep:])
        return types.SimpleNamespace(logits=logits[:, logits_to_keep])


def as_text(ids):
    """Ids with spaces between them, without EOS."""
    return " ".join(str(word) for word in ids if word != 1)


def id_questions(tokenizer, prompts, shown_as_a, shown_as_b, limit=None):
    """The judge's questions of VECTORS_README, of texts as as_text makes them."""
    texts = [f"{x} 2 {a} 3 {b} 4" for x, a, b in zip(prompts, shown_as_a, shown_as_b)]
    return [list(map(int, text.split())) for text in texts]


@contextmanager
def in_float64():
    """What osp.py computes in float32 is then in float64."""
    zeros = functools.partial(torch.zeros, dtype=torch.float64)
    with mock.patch.object(torch.Tensor, "float", torch.Tensor.double), mock.patch("torch.zeros", zeros):
        yield


def verdict_vectors(args):
    """`strength` and `ranking` of pure.json. The questions 2 3 7 ... 7 4 end at different positions,
    where the tables have the given logits."""
    logits = np.random.default_rng(0).normal(0, 3, (2, 8, 2)).round(2)
    logits[:, 0] = 0
    logits[:, 1] = [500, -500], [-500, 500]  # exp() must not overflow
    tables = np.zeros((2, 10, 8, 8))
    tables[:, 2:, 4, 5:7] = logits
    judges = [GivenLogits(table) for table in tables]
    texts = ["7 " * k for k in range(8)]
    p_12, p_21 = [
        osp.verdict_probabilities(judge, None, [""] * 8, [""] * 8, texts) for judge in judges]
    strength = osp.averaged_strength(*torch.tensor([p_12, p_21], dtype=torch.float64))
    models = osp.Models(None, None, judge=judges[1])
    candidates = [osp.Candidate([], text) for text in texts]
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
    columns = torch.tensor(list(itertools.product(*grid.values())), dtype=torch.float64).T
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


def pure_vectors(args):
    """pure.json, and the arrays of logps.safetensors; all in float64."""
    pure = verdict_vectors(args) | {"adamw": adamw_vectors(args)}
    schedules = ["linear", "cosine", "constant", "constant_with_warmup"]
    pure["schedules"] = {name: rates_of(name, 0.1) for name in schedules}
    pure["logps"], arrays = logps_vectors()
    pure["pairs"] = pair_vectors()
    pure["spce"] = loss_vectors(
        osp.spce_loss, reward_1=[-5000, -64, -7.5, 0.25, 64, 5000], reward_2=[0, 0.25],
        strength=[0, 1e-6, 0.25, 0.5, 1])
    sides = [-300, -0.5, -0.1, 0.1, 0.5, 300]  # none is a clip, where there would be no one gradient
    pure["dual_clip"] = loss_vectors(
        osp.dual_clip_loss, reward_1=sides, reward_2=sides, label=[0, 1], clip=[0.2, 1, 1000])
    return pure, arrays


def vector_model():
    """A Llama of 4,944 parameters."""
    rng = np.random.default_rng(2)
    config = transformers.LlamaConfig(**VECTOR_SHAPE, tie_word_embeddings=True)
    model = transformers.LlamaForCausalLM(config)
    for name, weight in model.named_parameters():
        mean, deviation = (1.0, 0.1) if "norm" in name else (0.0, 0.4)
        weight.data = torch.tensor(rng.normal(mean, deviation, weight.shape)).float()
    return model.requires_grad_(False)


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


def weight_vectors(kind, policy, part):
    """By their names the policy's weights, or another part of its parameters."""
    return {f"{kind}.{name}": part(weight).clone() for name, weight in policy.named_parameters()}


def step_vectors(models, rows, candidates, step, args):
    """A step's entry of steps.json and its arrays: osp.train_step with given responses, watched."""
    before = copy.deepcopy(models.policy).requires_grad_(False)
    found, optimizer_step = {}, osp.optimizer_step

    def watched(models, *rest):
        found.update(weight_vectors("gradient", models.policy, lambda weight: weight.grad))
        return optimizer_step(models, *rest)

    method = osp.Method(sample=lambda *_: candidates)
    with mock.patch.object(osp, "optimizer_step", watched):
        _, pairs, figures = osp.train_step(models, rows, method, step, args)
    found |= weight_vectors("after", models.policy, torch.Tensor.detach)
    metrics = {"step": step + 1} | osp.step_figures(models, candidates, pairs, method, args) | figures
    if step == 0:
        del metrics["margin_accuracy"]  # its margins are 0 but for rounding
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
    prompts = [pair.row.ids for pair in pairs] * 2
    sides = [pair.better.ids for pair in pairs] + [pair.worse.ids for pair in pairs]
    for name, model in (("ref", models.reference), ("policy", before)):
        token_logps = osp.token_logps(model, prompts, sides)
        found[name + "_token_logps"] = token_logps.reshape(2, P, -1).transpose(0, 1)
    entry = {"prompt_ids": [row.ids for row in rows],
             "responses": osp.chunks([one.ids for one in responses], 4),
             "pairs": [[pair.row.index, pair.better.source, pair.worse.source] for pair in pairs],
             "metrics": metrics}
    return entry, {f"{name}.{step + 1}": array.contiguous() for name, array in found.items()}


def write_vectors(folder):
    """python test_osp.py vectors FOLDER: fills the folder with VECTORS_README and what it explains."""
    folder, args, sft = Path(folder), osp.Arguments(**VECTOR_ARGUMENTS), vector_model()
    policy, tokenizer = copy.deepcopy(sft).requires_grad_(True), types.SimpleNamespace(eos_token_id=1)
    models = osp.Models(tokenizer, policy, sft, reference=sft, judge=sft)
    asked, verdicts = mock.Mock(side_effect=id_questions), mock.Mock(return_value=("", 5, 6))
    rng, entries, arrays = np.random.default_rng(15), [], {}
    with mock.patch.multiple(osp, encode_questions=asked, verdict_format=verdicts):
        with in_float64():
            pure, logps = pure_vectors(args)
        osp.start_training(models, args.learning_rate, 3, args)
        for step in range(3):
            entry, found = step_vectors(models, *given_samples(rng), step, args)
            entries.append(entry)
            arrays |= found

    folder.mkdir(parents=True, exist_ok=True)
    (folder / "README.md").write_text(VECTORS_README)
    texts = {"pure": pure, "model": VECTOR_SHAPE | {"rope_theta": 10000.0},
             "steps": {"arguments": VECTOR_ARGUMENTS, "steps": entries}}
    for name, value in texts.items():
        (folder / f"{name}.json").write_text(json.dumps(value, indent=1, allow_nan=False) + "\n")
    tensors = {"logps": logps, "weights": dict(sft.named_parameters()), "steps": arrays}
    for name, value in tensors.items():
        safetensors.torch.save_file(value, folder / f"{name}.safetensors")


def golden(folder):
    """What GOLDEN has of the files: a digest of all but the floats, and by name a sum of the floats.
    Each has its own weight in it, and arcsinh keeps the large from hiding the small. Steps are one."""
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
        # float32 rounds by 6e-8 and a log-probability, of size 10, is good to 1e-5. Weights that are
        # wrong by 1e-7 change no sum by more than 2e-5
        tolerance = 1e-4 if name.startswith("steps") else 1e-9
        assert value == pytest.approx(GOLDEN[name], rel=tolerance, abs=tolerance), name
    arrays = safetensors.torch.load_file(tmp_path / "steps.safetensors")
    for row in torch.cat([arrays[f"scores.{step}"] for step in (1, 2, 3)]):
        assert row.unique().diff().min() > 0.01  # no near tie, for other processors to turn round


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
    """What a judge says whose verdict is turned round with probability `noise`, (1 - e) p + e (1 - p);
    or a 0/1 label `drawn` from it, a function of the pair, so that it is the same in every epoch."""
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
    prior, labels = [*osp.HUMAN, "policy", "reference", "start"], []
    for pair in pairs:
        better, worse = prior.index(pair.better.source), prior.index(pair.worse.source)
        labels.append(None if better == worse else float(better < worse))
    return labels


def changed(method, **stages):
    """A method of METHODS with some stages replaced."""
    return lambda args: dataclasses.replace(method(args), **stages)


def tso_matrix(roles, with_human):
    """TSO with another model matrix."""
    return lambda args: dataclasses.replace(osp.tso(args), **osp.model_matrix(roles, args, with_human))


OSP = osp.METHODS["osp"]
OFFLINE = changed(  # the scores fall, so that neighbours pair as they stand
    OSP, sample=data_responses, pair=adjacent_pairs,
    score=lambda models, rows, candidates, args: [range(len(found), 0, -1) for found in candidates])
ABLATIONS = {
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
    "tso": osp.tso,  # from here on after TSO, formulas reconstructed
    "tso_policy_only": tso_matrix(["policy"], with_human=True),
    "tso_no_human": tso_matrix(["policy", "reference", "start"], with_human=False),
    "tso_no_corrections": changed(osp.tso, strength=labels_by_source),
    "tso_no_clip": lambda args: osp.tso(dataclasses.replace(args, dual_clip=math.inf)),
    "tso_fixed": changed(osp.tso, after_step=osp.Method().after_step, moves_reference=False)}
NOISE = {}
for percent in ("00", "20", "40"):
    for kind in ("noisy", "drawn"):
        labels = functools.partial(noisy_labels, noise=int(percent) / 100, drawn=kind == "drawn")
        NOISE[f"{kind}_{percent}"] = changed(OSP, sample=sample_once, strength=labels)
VARIANTS = ABLATIONS | NOISE


def run_variant(name, *argv):
    """python test_osp.py run NAME [arguments of osp.py]"""
    return osp.main(["--method", name, *argv])


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
    """The pairs that a variant makes in a step, and what is the same when they are."""
    _, pairs = osp.make_pairs(models, rows, VARIANTS[name](args), step, args)
    pairs = sum(pairs, [])
    return pairs, [(pair.row.index, pair.better.ids, pair.worse.ids, pair.strength) for pair in pairs]


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
    assert set(drawn) == {0.0, 1.0} and drawn == again
    assert np.mean(drawn) == pytest.approx(0.7, abs=0.02)


def test_which_candidates_are_the_same_in_every_step():
    world = variant_world()
    models, rows, _ = world
    own = sum([row.responses[:3] for row in rows], [])  # K//2 pairs of each
    for name in ("sampled_once", "drawn_20", "offline_dpo", "offline_spce"):
        pairs, first = pairs_at(0, name, *world)
        assert len(pairs) >= 15 and pairs_at(3, name, *world)[1] == first
        if "offline" in name:
            assert [[pair.better.text, pair.worse.text] for pair in pairs] == own
            assert models.tokenizer.decode(pairs[0].worse.ids) == pairs[0].worse.text + " <eos>"
            rounded = {pair.strength for pair in pairs} & {0.0, 1.0}
            assert rounded == ({1.0} if name == "offline_dpo" else set())
    for name in ("spce", "random"):
        first, again, later = [pairs_at(step, name, *world)[1] for step in (0, 0, 3)]
        assert first == again != later


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
    metrics = osp.measured_step(models, rows, VARIANTS[name](args), 0, args)
    assert json.dumps(metrics, allow_nan=False)
    assert metrics["pairs"] > 0
    assert not torch.equal(before, weights_of(models.policy))


# Bench: make bench, fixed work --------------------------------------------------------------------
BENCH_PROMPTS, BENCH_PROMPT, BENCH_RESPONSE = 8, 32, 64
BENCH_STAGES = ["sample", "rank", "judge", "reference", "update"]


def bench_models(args):
    """A random Llama of 5.3M parameters as policy and as pi_SFT, and a tokenizer of 4,100 words."""
    words = osp.JUDGE_FRAME.format(prompt="> Human:", a="> A", b="> B").split()
    words = dict.fromkeys(["<eos>", *words, *(f"w{i}" for i in range(4096))])
    vocabulary = {word: i for i, word in enumerate(words)}
    inner = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="<eos>"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="<eos>")
    torch.manual_seed(0)
    policy = transformers.LlamaForCausalLM(transformers.LlamaConfig(
        vocab_size=len(vocabulary), hidden_size=256, intermediate_size=704, num_hidden_layers=4,
        num_attention_heads=4, max_position_embeddings=1024, bos_token_id=None, eos_token_id=0))
    start = osp.bf16_copy(policy) if args.bf16 else copy.deepcopy(policy)
    models = osp.Models(tokenizer, policy, start, reference=start, judge=start)
    osp.start_training(models, 1e-4, 100, args)
    return models


def matmul_seconds(flops, dtype=torch.float32):
    """What so many FLOPs take in a matrix product: this machine's own speed, in the same run."""
    matrix, found = torch.randn(1024, 1024).to(dtype), []
    for _ in range(100):
        start = time.perf_counter()
        matrix @ matrix
        found.append(time.perf_counter() - start)
    return flops * min(found) / (2 * 1024**3)


def bench_step(K, precision, threads):
    """Prints the better of two steps after one to warm up. In a process of its own."""
    torch.set_num_threads(int(threads))
    osp.stop_token_ids = lambda *_: [-1]  # every response runs to its full length
    args = arguments(f"--num_generations {K} --max_new_tokens {BENCH_RESPONSE} --micro_batch_size 16")
    args.bf16 = precision == "bf16"
    models, found = bench_models(args), []
    texts = np.random.default_rng(0).integers(0, 4096, (BENCH_PROMPTS, BENCH_PROMPT))
    prompts = [(" ".join(f"w{i}" for i in text),) for text in texts]
    rows = osp.distinct_prompts(models.tokenizer, prompts, BENCH_PROMPTS)
    with FlopCounterMode(display=False) as counter:
        osp.train_step(models, rows, osp.Method(), 0, args)
    for step in (1, 2):
        metrics = osp.measured_step(models, rows, osp.Method(), step, args)
        found.append([metrics[f"seconds_{stage}"] for stage in BENCH_STAGES])
    best = min(found, key=sum)
    times = "".join(f"{seconds:10.2f}" for seconds in [*best, sum(best)])
    share = sum(best) / matmul_seconds(counter.get_total_flops())
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    print(f"{K} {precision:>9} {threads:>7} |{times}   | {memory:4.0f} {share:9.2f}")


def bench(*only):
    """python test_osp.py bench [K ...]: a process for each case, so that its peak memory is its own."""
    titles = "".join(f"{stage:>10}" for stage in [*BENCH_STAGES, "step"])
    print(f"K precision threads |{titles} s |  MiB  x matmul", flush=True)
    threads, precisions = (1, os.cpu_count()), ["fp32", "bf16"]
    if matmul_seconds(1e9, torch.bfloat16) > matmul_seconds(1e9):
        print("bf16 is left out: on this processor it is slower than fp32")
        precisions.remove("bf16")
    for count, precision, K in itertools.product(threads, precisions, only or (2, 4, 8)):
        words = [sys.executable, __file__, "bench_step", str(K), precision, str(count)]
        subprocess.run(words, check=True)


# Experiments: make ablations, make evidence, make collection --------------------------------------
LABELLED = 1500  # pairs from which the models that ask have learned; 500 more are collected
ANY_PAIR = {"max_similarity": 1.0, "min_strength": 0.5, "max_strength": 1.0}
COLLECTIONS = {  # name -> who responds, arguments of --method collect
    "base": None,  # no more labels
    "at_random": (["start"], {"num_train_prompts": 520, "keep_prompts": 1.0} | ANY_PAIR),
    "step_1": (["start"], {"num_train_prompts": 1040} | ANY_PAIR),  # prompts of the widest spread
    "steps_1_2": (["start", "policy"], {"num_train_prompts": 1040} | ANY_PAIR),  # also OSP's responses
    "steps_1_2_3": (["start", "policy"], {"num_train_prompts": 2080}),  # and the filter
    "landslides": (["start", "policy"],  # a filter that keeps the large gaps instead
                   {"num_train_prompts": 2080, "min_strength": 0.95, "max_strength": 1.0})}
LONG = {"long_spce": "strengths (SPCE)", "long_dpo": "the same, rounded to 0 or 1 (DPO)"}
CLIPS = {"spce": "OSP", "tso": "TSO", "tso_no_clip": "TSO, no clip", "tso_fixed": "TSO, fixed reference"}
SIZES = {f"prompts_{n}": f"--num_train_prompts {n} --num_train_epochs 99 --max_steps 117 --eval_steps 39"
         for n in (50, 100, 400, 800)}
EVIDENCE = [*CLIPS, *LONG, *SIZES, *NOISE]

EXPERIMENTS = {name: (name, "") for name in ABLATIONS}  # a run's name -> its variant, its flags
EXPERIMENTS |= {name: ("spce", flags) for name, flags in SIZES.items()}
EXPERIMENTS |= {name: (name, "--num_train_epochs 18 --eval_steps 26") for name in NOISE}
for name in LONG:
    EXPERIMENTS[name] = (name.removeprefix("long_"), "--num_train_epochs 27 --eval_steps 39")
for name in COLLECTIONS:  # on 1,500 pairs the judge is best so early; later it knows the labels by heart
    EXPERIMENTS[name] = (name, "--sft_max_steps 400")
OF_SFT = """seed sft sft_learning_rate sft_batch_size sft_num_train_epochs sft_max_steps
    model_name_or_path dataset_name max_new_tokens lr_scheduler_type warmup_steps max_grad_norm bf16""".split()


def take_sft(other, argv):
    """Makes --output_dir the folder of a run broken off after SFT, with the pi_SFT of another run."""
    args = osp.parse_arguments(argv)
    if args.output_dir.exists():
        return
    for option, value in json.loads((other / "arguments.json").read_text()).items():
        if option in OF_SFT and getattr(args, option) != value:
            raise osp.Stop(f"{other} has another pi_SFT: its {option} is {value!r}.")
    with osp.written_whole(args.output_dir) as scratch:
        shutil.copytree(other / "sft", scratch / "sft", dirs_exist_ok=True)
        (scratch / "arguments.json").write_text(json.dumps(vars(args), indent=2, default=str))


def folder_of(name, seed):
    """Where a run is."""
    return Path("runs", "collection" if name in COLLECTIONS else "evidence", f"{name}-seed{seed}")


def words_of(name, seed, more):
    """What starts a run, or goes on with it; its folder then has the pi_SFT that it takes over."""
    (variant, flags), folder = EXPERIMENTS[name], folder_of(name, seed)
    words = [variant, "--seed", seed, *flags.split(), *more, "--output_dir", str(folder)]
    verb = "collect" if name in COLLECTIONS else "run"
    if verb == "run" and name != "spce":
        take_sft(folder_of("spce", seed), ["--method", *words])
    return [sys.executable, __file__, verb, *words]


def finish_run(folder, words):
    """Runs this command, whose output is in <folder>.log. Raises Stop."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    log, single = folder.with_name(folder.name + ".log"), os.environ | {"OMP_NUM_THREADS": "1"}
    with log.open("w") as file:
        done = subprocess.run(words, stdout=file, stderr=file, env=single)
    if done.returncode:
        last = " / ".join(log.read_text().splitlines()[-3:])
        raise osp.Stop(f"{folder} is not finished; {log} ends in: {last}", code=1)
    print(f"{folder} is finished", flush=True)


def finished_runs(names, more):
    """Does what is missing, JOBS runs at a time; all wait for those of the first name, whose models they
    need. Returns name -> its run of each of SEEDS."""
    seeds = os.environ.get("SEEDS", "0 1 2 3 4").split()
    jobs = int(os.environ.get("JOBS", os.cpu_count()))
    for group in (names[:1], names[1:]):
        missing = {}
        for name, seed in itertools.product(group, seeds):
            if not (folder_of(name, seed) / "summary.json").exists():
                missing[folder_of(name, seed)] = words_of(name, seed, more)
        with ThreadPoolExecutor(jobs) as pool:
            list(pool.map(finish_run, missing, missing.values()))
    return {name: [figures_of(folder_of(name, seed)) for seed in seeds] for name in names}


def figures_of(folder):
    """A run's summary, the points (step, KL, gold) on its way, and figures of these."""
    run = json.loads((folder / "summary.json").read_text())
    points = [(0, 0.0, run["gold_reward_sft"])]
    for line in map(json.loads, (folder / "metrics.jsonl").open()):
        if "eval_kl" in line:
            points.append((line["step"], line["eval_kl"], line["eval_gold_reward"]))
    _, kls, golds = zip(*points)
    return run | {"folder": folder, "points": points, "gold_at_KL_2": gold_at_kl(points, 2.0),
                  "best_gold": max(golds), "gold_at_1/3": golds[round((len(golds) - 1) / 3)],
                  "gold_at_the_end": golds[-1], "KL_at_the_end": kls[-1]}


def gold_at_kl(points, wanted):
    """Gold where training first reaches this KL, on the straight line between evaluations; or None."""
    for (_, kl, gold), (_, next_kl, next_gold) in zip(points, points[1:]):
        if kl < wanted <= next_kl:
            return gold + (next_gold - gold) * (wanted - kl) / (next_kl - kl)


def spread(values):
    """Mean and standard deviation over seeds; how many have a value, where not all do."""
    there = [value for value in values if value is not None]
    if not there:
        return ""
    text = f"{np.mean(there):.3f}±{np.std(there, ddof=len(there) > 1):.3f}"
    return text if len(there) == len(values) else f"{text} ({len(there)} of {len(values)})"


def print_table(title, figures, runs):
    """Prints Markdown: a row for each name of `runs`, a column for each key in `figures`."""
    keys = figures.split()
    rows = [[title, *[key.replace("_", " ") for key in keys]], ["---"] * (len(keys) + 1)]
    for name, found in runs.items():
        rows.append([name, *[spread([run.get(key) for run in found]) for key in keys]])
    print("\n" + "\n".join(f"| {' | '.join(row)} |" for row in rows))


def print_ablations(*more):
    """python test_osp.py ablations [arguments of osp.py]"""
    figures = "win_rate_vs_sft ood_win_rate_vs_sft gold_reward gold_at_KL_2 kl distinct_fraction"
    print_table("variation", figures, finished_runs([*ABLATIONS], more))


def print_evidence(*more):
    """python test_osp.py evidence [arguments of osp.py]: prints the tables and draws the picture."""
    runs, judged, figures = finished_runs(EVIDENCE, more), {}, {}
    for source in ("data", "sft", "policy"):
        found = judged[source] = [judged_pairs(run["folder"], source) for run in runs["spce"]]
        figures[source] = [osp.verdict_figures(*one) for one in found]
    print_table("variation", "win_rate_vs_sft best_gold gold_at_1/3 gold_at_the_end KL_at_the_end", runs)
    keys = "judge_accuracy judge_calibration_error order_agreement"
    print_table("the frozen judge on pairs of", keys, figures)
    draw_evidence(runs, judged, Path("runs/evidence/evidence.png"))


def judged_pairs(folder, source):
    """A run's judge on the data's pairs, or on two responses of "sft" or of the "policy" to each prompt:
    (p_12, p_21, truth), (P,) each."""
    args = osp.Arguments(**json.loads((folder / "arguments.json").read_text()))
    judge, tokenizer = osp.frozen(str(folder / "sft"), args)
    texts = builtin_pairs("test")[: args.num_eval_pairs]
    if source != "data":
        model, _ = osp.frozen(str(folder / source.replace("policy", ".")), args)
        rows = osp.distinct_prompts(tokenizer, builtin_pairs("test"), args.num_eval_prompts)
        found = osp.respond(model, tokenizer, rows, [2, 3], osp.EVALUATION, args)
        texts = [(row.prompt, one.text, two.text) for row, (one, two) in zip(rows, found)]
    verdicts = osp.both_orders(judge, tokenizer, *osp.columns(texts), args.micro_batch_size)
    return torch.stack([*verdicts, torch.tensor([osp.true_strength(*text) for text in texts])])


def draw_curves(axes, title, labels, runs, x):
    """Gold against step or KL: each seed thinly, the mean thickly, with a square at its end."""
    for i, (name, label) in enumerate(labels.items()):
        style = {"color": f"C{i}", "linestyle": "--" if "drawn" in name else "-"}
        series = [np.array(run["points"])[:, [x, 2]].T for run in runs[name]]
        for one in series:
            axes.plot(*one, alpha=0.2, linewidth=1, **style)
        axes.plot(*np.mean(series, axis=0), label=label, marker=".", **style)
        axes.plot(*np.mean(series, axis=0)[:, -1], marker="s", markersize=9, **style)
    axes.set(title=title, ylabel="gold reward", xlabel=("step", "KL from SFT, nats (squares: end)")[x])


def draw_reliability(axes, judged):
    """The mean true strength of the pairs in each tenth of the judge's strength."""
    for source, found in judged.items():
        p_12, p_21, truth = torch.cat(found, 1)
        both = torch.stack([osp.averaged_strength(p_12, p_21), truth])
        both = torch.cat([both, 1 - both], 1)  # every pair in both directions
        tenths = (both[0] * 9.999).long()
        points = [both[:, tenths == i].mean(1) for i in range(10) if (tenths == i).sum() >= 20]
        axes.plot(*zip(*points), marker="o", label=f"pairs of {source}")
    axes.plot([0, 1], [0, 1], color="grey", linewidth=1)
    axes.set(title="reliability of the frozen judge", xlabel="its strength", ylabel="true strength")


def draw_evidence(runs, judged, path):
    """Four panels: long training, TSO, noisy labels, the judge."""
    from matplotlib.figure import Figure  # here, since it takes a second to load

    figure = Figure(figsize=(12, 9), layout="constrained")
    panels = figure.subplots(2, 2).flat
    long, tso, noise, judge = panels
    draw_curves(long, "27 epochs: strengths come to rest, rounded labels run away", LONG, runs, 1)
    draw_curves(tso, "9 epochs: TSO's clip and moving reference", CLIPS, runs, 1)
    kinds = {name: name.replace("noisy", "strengths").replace("_", ", noise in %: ") for name in NOISE}
    draw_curves(noise, "noisy labels on one fixed set of pairs", kinds, runs, 0)
    draw_reliability(judge, judged)
    long.set_xscale("symlog", linthresh=5)
    tso.set_xscale("symlog", linthresh=5)
    noise.set_ylim(-0.8)  # room for the legend
    for axes in panels:
        axes.legend(frameon=False, fontsize=8)
        axes.grid(alpha=0.3)
    figure.savefig(path, dpi=100)
    print(f"\nPicture: {path}")


def labels_of(folder):
    """The (prompt, chosen, rejected)s that --method collect left in a folder."""
    lines = [json.loads(line) for line in (folder / "preferences.jsonl").open()]
    return [(line["prompt"], line["chosen"], line["rejected"]) for line in lines]


def labels_folder(folder):
    """Where the labels are that a run of a collection has learned from, too."""
    return folder.with_name(folder.name + "-labels")


def collect_labels(name, base, pairs, args):
    """(prompt, chosen, rejected)s by --method collect with the models of the run `base`, labelled by the
    truth. Where no filter chooses among a prompt's pairs, it has one, a random one."""
    roles, options = COLLECTIONS[name]
    args = dataclasses.replace(
        args, method="collect", output_dir=labels_folder(args.output_dir), **options)
    start, tokenizer = osp.frozen(str(base / "sft"), args)
    policy, _ = osp.frozen(str(base), args)
    models = osp.Models(tokenizer, policy, start, reference=start, judge=start)
    rng, method = np.random.default_rng(args.seed), osp.model_matrix(roles, args, with_human=False)
    if args.min_strength == 0.5:
        method["pair"] = lambda scores: [rng.permutation(len(scores))[:2]]
    rows = osp.distinct_prompts(tokenizer, pairs, args.num_train_prompts)
    data = types.SimpleNamespace(rows=rows, gold=osp.gold_reward)
    osp.check_folder(args)
    with osp.output_folder(args):
        osp.collect(models, data, osp.Method(**method), args)
    return labels_of(args.output_dir)


def collect_and_train(name, *argv):
    """python test_osp.py collect NAME [arguments of osp.py]: the models of base-seed<seed> beside the
    --output_dir ask; SFT from scratch and OSP learn from the old and the new pairs."""
    args, pairs = osp.parse_arguments(argv), list(builtin_pairs("train"))
    random.Random(args.seed).shuffle(pairs)
    known, unknown = pairs[:LABELLED], pairs[LABELLED:]
    if name != "base":
        known += collect_labels(name, args.output_dir.with_name(f"base-seed{args.seed}"), unknown, args)
    rows = [dict(zip(("prompt", "chosen", "rejected"), pair)) for pair in known]
    splits = osp.builtin_preferences() | {"train": datasets.Dataset.from_list(rows)}
    with mock.patch.object(osp, "builtin_preferences", lambda: splits):
        osp.main([*argv])


def print_collection(*more):
    """python test_osp.py collection [arguments of osp.py]"""
    runs = finished_runs([*COLLECTIONS], more)
    for run in sum(list(runs.values())[1:], []):
        truth = [osp.true_strength(*label) for label in labels_of(labels_folder(run["folder"]))]
        run |= {"labels": len(truth), "against_the_truth": np.mean([p < 0.5 for p in truth])}
    figures = "judge_accuracy judge_calibration_error gold_reward labels against_the_truth"
    print_table("how 500 more labels were spent", figures, runs)


def test_a_run_that_takes_anothers_sft_does_what_it_does_with_its_own(tmp_path, monkeypatch, finished):
    monkeypatch.setattr(osp, "METHODS", osp.METHODS | VARIANTS)
    own, taken, other = tmp_path / "own", tmp_path / "taken", finished["osp"]
    run_variant("offline_dpo", *command(own))
    monkeypatch.setattr(osp, "supervised_finetune", None)
    take_sft(other.folder, ["--method", "offline_dpo", *command(taken)])
    run_variant("offline_dpo", *command(taken))
    assert read_run(own).lines == read_run(taken).lines != other.lines
    for more in ("--sft_batch_size 9", "--seed 1"):
        with stopped("another pi_SFT: its (sft_batch_size is 4|seed is 0)"):
            take_sft(other.folder, command(tmp_path / "none", more))
        assert not (tmp_path / "none").exists()


def leave_a_run(words, stdout, **_):
    """In place of subprocess.run: the folder of a finished run, at once; that of ipo fails."""
    args = osp.parse_arguments(["--method", *words[3:]])
    osp.check_folder(args)
    stdout.write("1\n2\n3\nout of memory\n")
    with osp.output_folder(args):
        sft = args.output_dir / "sft"
        if args.method == "spce":
            sft.mkdir()
            (sft / "model").write_text(str(args.seed))
        assert (sft / "model").read_text() == str(args.seed)
        line = {"step": 1, "eval_kl": 4.0, "eval_gold_reward": float(args.seed)}
        (args.output_dir / "metrics.jsonl").write_text(json.dumps(line))
        if args.method != "ipo":
            (args.output_dir / "summary.json").write_text('{"gold_reward_sft": 0.0, "kl": 7}')
    return types.SimpleNamespace(returncode=int(args.method == "ipo"))


def test_what_is_missing_is_done_once_after_the_run_whose_sft_it_takes(tmp_path, monkeypatch, capsys):
    started = mock.Mock(side_effect=leave_a_run)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("SEEDS", "3 4")
    monkeypatch.setenv("JOBS", "1")  # ast, which parse_arguments uses, is not safe in threads
    monkeypatch.setattr(osp, "METHODS", osp.METHODS | VARIANTS)
    monkeypatch.setattr(subprocess, "run", started)
    with stopped("ipo-seed3 is not finished; .*ipo-seed3.log ends in: 2 / 3 / out of memory", code=1):
        finished_runs(["spce", "dpo", "ipo"], ())
    started.reset_mock()
    runs = finished_runs(["spce", "dpo", "random", "long_dpo"], ("--beta", "0.5"))
    assert {call.args[0][3] for call in started.call_args_list} == {"random", "dpo"}  # which is long_dpo
    assert started.call_count == 4
    arguments = json.loads(Path("runs/evidence/long_dpo-seed4/arguments.json").read_text())
    assert [arguments[name] for name in ("method", "seed", "beta", "eval_steps")] == ["dpo", 4, 0.5, 39]
    print_table("title", "gold_at_KL_2 kl", runs)
    assert "| dpo | 1.750±0.354 | 7.000±0.000 |\n" in capsys.readouterr().out


def test_each_table_has_its_experiments_and_each_is_a_command(monkeypatch):
    monkeypatch.setattr(osp, "METHODS", osp.METHODS | VARIANTS)
    assert EXPERIMENTS.keys() == {*ABLATIONS, *EVIDENCE, *COLLECTIONS}
    for name, (variant, flags) in EXPERIMENTS.items():
        method = "osp" if name in COLLECTIONS else variant
        assert osp.parse_arguments(["--method", method, *flags.split()])


@pytest.mark.parametrize(
    "name, asked", [("at_random", 6), ("step_1", 3), ("steps_1_2", 3), ("steps_1_2_3", 6)])
def test_what_each_collection_asks_and_learns_from(name, asked, tmp_path, monkeypatch, finished):
    """Of six prompts, or the three of the widest spread, a random pair or both."""
    spy, learned, (roles, options) = mock.Mock(side_effect=osp.worth_asking), [], COLLECTIONS[name]
    monkeypatch.setitem(COLLECTIONS, name, (roles, options | {"num_train_prompts": 6}))
    monkeypatch.setattr(osp, "worth_asking", spy)
    monkeypatch.setattr(osp, "main", lambda argv: learned.extend(osp.builtin_preferences()["train"]))
    (tmp_path / "base-seed0").symlink_to(finished["osp"].folder)
    collect_and_train(name, *command(tmp_path / "run", "--min_strength 0.501 --num_labels 2"))
    pairs = spy.call_args.args[0]
    assert len(pairs) == asked
    assert {side.source for pair in pairs for side in (pair.better, pair.worse)} == set(roles)
    new = [tuple(row.values()) for row in learned[LABELLED:]]
    assert {tuple(row.values()) for row in learned[:LABELLED]} < {*builtin_pairs("train")}
    assert new == labels_of(tmp_path / "run-labels") and len(new) == 2
    said = {frozenset([pair.row.prompt, pair.better.text, pair.worse.text]) for pair in pairs}
    assert {frozenset(row) for row in new} <= said


def test_figures_of_the_tables_by_hand():
    points = [(0, 0.0, 0.3), (1, 1.0, 0.9), (2, 3.0, 1.9)]
    assert gold_at_kl(points, 2.0) == pytest.approx(1.4)
    assert gold_at_kl(points, 3.5) is None
    assert spread([1.0, 2.0, None]) == "1.500±0.707 (2 of 3)"
    assert spread([None]) == ""
    judged = [(0.9, 0.3, 0.7), (0.2, 0.6, 0.7), (0.5, 0.5, 0.5), (0.8, 0.4, 0.5)]
    figures = osp.verdict_figures(*torch.tensor(judged).T)  # of strengths 0.8, 0.3, 0.5 and 0.7
    assert figures["judge_accuracy"] == 0.5 and figures["order_agreement"] == 1
    assert figures["judge_calibration_error"] == pytest.approx((0.1 + 0.4 + 0 + 0.2) / 4)


# Commands -----------------------------------------------------------------------------------------
COMMANDS = {"run": run_variant, "collect": collect_and_train, "bench": bench, "bench_step": bench_step,
            "ablations": print_ablations, "evidence": print_evidence, "collection": print_collection,
            "vectors": write_vectors}

if __name__ == "__main__":
    osp.METHODS |= VARIANTS
    osp.start_process()
    try:
        COMMANDS[sys.argv[1]](*sys.argv[2:])
    except osp.Stop as stop:
        print(f"osp: {stop}", file=sys.stderr)
        sys.exit(stop.code)
    except KeyboardInterrupt:
        sys.exit("osp: interrupted; the same command goes on from the last checkpoints.")
