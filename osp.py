"""Online Self-Preferring Language Models (OSP, arXiv 2405.14103): a reference implementation in one file.

One language model answers, judges its own answers, and learns from how STRONGLY one answer is preferred to another:

    sample K responses -> rank -> pair -> the frozen SFT model judges each pair -> SPCE loss -> update

    python osp.py                                           the built-in task, whose truth is known; minutes on a CPU
    python osp.py --model_name_or_path M --dataset_name D   a Hugging Face causal language model and preference data
    torchrun --nproc_per_node N osp.py ...                  the same in N processes, with a GPU each (section 15)

The paper's public text leaves some steps open. Those marked [R] here, and "reconstruction" in the docstrings, are this
project's, and so are the words of the judge's question, the curriculum of SFT and the built-in task:
  [R] the judging task shows each pair of the data in both orders, with the loss on the verdict token only (section 4)
  [R] the one baseline that all candidates are compared with is the first of the K candidates (section 6)
  [R] pairs are best with worst, second best with second worst, and so on inwards (section 6)
  [R] the judge is asked in both orders, and their probabilities are averaged (section 7)
  [R] the formula of the SPCE loss; the paper gives its name and purpose (section 8)

Shapes: B prompts, K responses a prompt, P pairs, N rows (sequences), T tokens, V words of the vocabulary.
`logps` is always a SUM over a response's tokens (its EOS included, its prompt excluded); `token_logps` is per token.
"""
import collections
import copy
import dataclasses
import functools
import hashlib
import itertools
import json
import math
import os
import random
import re
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Literal, NamedTuple

import datasets
import jinja2
import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
import transformers
from safetensors import SafetensorError
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from tqdm.auto import tqdm
from transformers.hf_argparser import HfArg, HfArgumentParser

Prompt = str | list[dict]  # a text, or chat messages [{"role": ..., "content": ...}, ...]
Ids = list[int]  # the token ids of one prompt or of one response


class Stop(Exception):
    """A run that cannot go on: one sentence for the user, and the exit code (2 before the first step, 1 later)."""

    def __init__(self, sentence: str, code: int = 2):
        super().__init__(" ".join(sentence.split()))
        self.code = code


# ----------------------------------------------------------------------------------------------------------------------
# 1. Arguments
# ----------------------------------------------------------------------------------------------------------------------
@dataclasses.dataclass
class Arguments:
    """Defaults are for real models; without --model_name_or_path those of BUILTIN below apply."""

    model_name_or_path: str | None = HfArg(default=None, help="Hub name or folder; none: a tiny random model")
    dataset_name: str | None = HfArg(default=None, help="Hub name, file or folder; none: the built-in task")
    dataset_config: str | None = HfArg(default=None, help="configuration of the data set")
    dataset_data_dir: str | None = HfArg(default=None, help="folder within the data set, such as harmless-base of HH")
    dataset_train_split: str = HfArg(default="train", help="split to train on")
    dataset_test_split: str | None = HfArg(default=None, help="split to measure on; none: test, else held out of train")
    trust_remote_code: bool = HfArg(default=False, help="run Python code that comes with the model")
    output_dir: str | None = HfArg(default=None, help="folder of this run; none: runs/<model>-<data>-seed<seed>")
    overwrite_output_dir: bool = HfArg(default=False, help="replace the run that output_dir holds")
    resume_from_checkpoint: str | None = HfArg(default=None, help="a checkpoint folder, or latest")
    seed: int = HfArg(default=0, help="the only source of randomness")
    bf16: bool = HfArg(default=False, help="bf16 autocast for the update, bf16 copies for all else")
    gradient_checkpointing: bool = HfArg(default=False, help="recompute activations in the backward pass")
    micro_batch_size: int = HfArg(default=8, help="sequences a forward pass")
    sft: bool = HfArg(default=True, help="fine-tune on the chosen responses and on judging first")
    sft_learning_rate: float = HfArg(default=1e-5, help="peak learning rate of SFT")
    sft_batch_size: int = HfArg(default=16, help="preference pairs an SFT step, each in both orders")
    sft_max_steps: int = HfArg(default=2000, help="SFT steps")
    sft_cache_dir: str = HfArg(default="runs/sft-cache", help="where finished SFT models are kept for later runs")
    num_generations: int = HfArg(default=8, help="K, the responses sampled for each prompt")
    max_new_tokens: int = HfArg(default=128, help="longest response, in tokens")
    temperature: float = HfArg(default=1.0, help="of sampling; 1 is on-policy")
    response_source: Literal["policy", "sft", "dataset"] = HfArg(
        default="policy", help="sample from the policy; from pi_SFT, once; or take the data's own pairs (offline)")
    pair_construction: Literal["ranked", "random", "best_worst", "adjacent"] = HfArg(
        default="ranked", help="best with worst and so on inwards; any two; best with worst alone; neighbours in rank")
    judge_both_orders: bool = HfArg(default=True, help="train on both orders of the judge; False: on one")
    labels: Literal["strength", "drawn", "data"] = HfArg(
        default="strength", help="the judge's strength; 0 or 1 drawn from it; the data's own labels")
    label_noise: float = HfArg(default=0.0, help="share of verdicts that noise turns round, 0 to 1/2")
    loss_type: Literal["spce", "dpo", "ipo"] = HfArg(default="spce", help="dpo and ipo round the strengths to 0 or 1")
    beta: float = HfArg(default=0.1, help="scale of the implicit reward")
    num_train_prompts: int = HfArg(default=200, help="distinct prompts that OSP trains on")
    num_train_epochs: int = HfArg(default=3, help="passes over these prompts")
    max_steps: int = HfArg(default=-1, help="end after so many OSP steps; -1: when the epochs are done")
    per_device_train_batch_size: int = HfArg(default=16, help="prompts a step, of all processes together")
    learning_rate: float = HfArg(default=1e-6, help="peak learning rate of OSP")
    lr_scheduler_type: str = HfArg(default="linear", help="linear, cosine, constant or constant_with_warmup")
    warmup_steps: float = HfArg(default=0.1, help="steps of warm-up; below 1: their share of all steps")
    max_grad_norm: float = HfArg(default=1.0, help="gradients are clipped to this norm")
    save_steps: int = HfArg(default=100, help="steps between checkpoints, of SFT and of OSP")
    save_total_limit: int | None = HfArg(default=None, help="OSP checkpoints to keep, the newest; none: all of them")
    eval_steps: int = HfArg(default=50, help="OSP steps between evaluations")
    num_eval_prompts: int = HfArg(default=256, help="held-out prompts, one sampled response each")
    num_eval_pairs: int = HfArg(default=512, help="held-out pairs that the judge is measured on")
    eval_judge_name_or_path: str | None = HfArg(default=None, help="another model as judge of the win rate")


BUILTIN = dict(max_new_tokens=16, micro_batch_size=96, sft_learning_rate=3e-3, sft_batch_size=48, sft_max_steps=800,
               learning_rate=1e-3, num_train_epochs=9, eval_steps=13)


def parse_arguments(argv: list[str] | None) -> Arguments:
    """Command line -> arguments, checked. Raises Stop; an unknown argument ends in argparse's sentence, exit code 2."""
    parser = HfArgumentParser(Arguments, description=__doc__.split("\n\n")[0], allow_abbrev=False)
    if parser.parse_args(argv).model_name_or_path is None:
        parser.set_defaults(**BUILTIN)
    args = parser.parse_args_into_dataclasses(argv)[0]
    if args.dataset_name and not args.model_name_or_path:
        raise Stop("--dataset_name needs --model_name_or_path: the built-in model knows the built-in words only.")
    if args.eval_judge_name_or_path and not args.dataset_name:
        raise Stop("--eval_judge_name_or_path has no use on the built-in task, whose true reward is known.")
    if args.num_generations < 2:
        raise Stop(f"--num_generations is {args.num_generations}: a pair needs at least 2 responses to a prompt.")
    for field in dataclasses.fields(args):
        name, value = field.name, getattr(args, field.name)
        least = -1 if name == "max_steps" else 0 if name in ("seed", "warmup_steps", "sft_max_steps", "label_noise") else 1e-12
        if type(value) in (int, float) and not least <= value < 2**32:
            bound = "above 0" if least == 1e-12 else f"at least {least}"
            raise Stop(f"--{name} is {value}: it must be {bound}, below 2**32.")
    if args.label_noise > 0.5:
        raise Stop(f"--label_noise is {args.label_noise}: above 1/2 the labels would say the opposite.")
    if args.labels == "data" and args.response_source != "dataset":
        raise Stop("--labels data needs --response_source dataset: sampled responses have no labels.")
    if args.label_noise and (args.labels == "data" or args.labels == "strength" and args.loss_type != "spce"):
        raise Stop("--label_noise has no effect here: give --labels drawn, or --labels strength with --loss_type spce.")
    if args.response_source == "dataset" and args.pair_construction != "ranked":
        raise Stop("--pair_construction has no use with --response_source dataset, whose pairs are given.")
    schedules = ("linear", "cosine", "constant", "constant_with_warmup")
    if args.lr_scheduler_type not in schedules:
        raise Stop(f"--lr_scheduler_type is {args.lr_scheduler_type!r}: it must be one of {', '.join(schedules)}.")
    if args.output_dir is None:
        data = re.sub(r"\.(jsonl?|parquet)(\.gz)?$", "", Path(args.dataset_name).name) if args.dataset_name else "builtin"
        names = [Path(args.model_name_or_path or "builtin").name, data, args.dataset_config, args.dataset_data_dir]
        names = dict.fromkeys(name.replace("/", "-") for name in names if name)
        args.output_dir = str(Path("runs") / f"{'-'.join(names)}-seed{args.seed}")
    return args


# ----------------------------------------------------------------------------------------------------------------------
# 2. Load the SFT model and the data
# ----------------------------------------------------------------------------------------------------------------------
def load_model(name: str | None, args: Arguments):
    """A causal LM with fp32 weights and no dropout, and its tokenizer; no name: the built-in ones. Raises Stop."""
    if name is None:
        return builtin_model(args.seed)
    trust = dict(trust_remote_code=args.trust_remote_code)
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(name, **trust)
        model = transformers.AutoModelForCausalLM.from_pretrained(name, dtype=torch.float32, use_safetensors=True, **trust)
    except Exception as error:  # the libraries raise a dozen kinds; each is the user's to mend
        raise Stop(f"Cannot load {name!r} as a causal language model ({first_line(error)}): give a Hub name, which needs "
                   "the network, or a local folder with config, tokenizer and safetensors.") from error
    for module in model.modules():  # dropout 0: pi_theta and pi_SFT must be one function at step 0
        for key, value in list(vars(module).items()):
            if isinstance(value, float) and ("drop" in key or isinstance(module, torch.nn.Dropout) and key == "p"):
                setattr(module, key, 0.0)
    if tokenizer.eos_token_id is None:
        raise Stop(f"The tokenizer of {name!r} has no EOS token, so no response could ever end: set its eos_token.")
    if len(tokenizer) > (rows := model.get_input_embeddings().num_embeddings):
        raise Stop(f"The tokenizer of {name!r} has {len(tokenizer)} tokens, but the model embeds only {rows}.")
    try:
        with torch.no_grad():
            see = model(input_ids=torch.tensor([[1, 2], [1, 3]])).logits[:, 0]
        sample(model, [[1], [1, 2]], torch.zeros(2, 2, 3), 1.0, [], 0)
    except Exception as error:
        raise Stop(f"{name!r} does not work as a causal language model whose cache is shared by the responses to a prompt "
                   f"({first_line(error)}): take another architecture.") from error
    if model.config.is_encoder_decoder or not torch.allclose(see[0], see[1], atol=1e-4):
        raise Stop(f"{name!r} is not a causal language model: its first position sees the second token.")
    return model, tokenizer


def pad_token_id(tokenizer) -> int:
    """Any id will do: padding is masked by position and never by id, so pad == eos harms nothing."""
    return tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id


def stop_token_ids(model, tokenizer) -> list[int]:
    """The ids that end a response: the tokenizer's EOS and those of the model's generation_config."""
    eos = model.generation_config.eos_token_id
    return sorted({tokenizer.eos_token_id, *(eos if isinstance(eos, list) else [eos] if eos is not None else [])})


def context_length(model) -> int:
    """How many positions the model knows; unlimited where its configuration names no limit."""
    return getattr(model.config, "max_position_embeddings", None) or sys.maxsize


def load_preferences(name_or_path: str | None, split: str = "train", config: str | None = None,
                     data_dir: str | None = None) -> datasets.Dataset:
    """Preference data in any known format (section 14) -> rows of `prompt` (text or messages) and, where the data has
    them, `chosen` and `rejected` (text).

    Takes a Hub name, a .json, .jsonl, .jsonl.gz or .parquet file, a folder of these, a `save_to_disk` folder, or None
    for the built-in task. Unusable rows are dropped, and counted by reason in `info.description`. Raises Stop for what
    cannot be read, columns that fit no format, and when no row remains."""
    rows, dropped = read_split(name_or_path, split, config, data_dir), collections.Counter()
    usable = datasets.concatenate_datasets(list(usable_rows(rows, name_or_path, dropped)))
    usable.info.description = reasons(dropped)
    return usable


def reasons(dropped: collections.Counter) -> str:
    """How many rows were dropped, and why."""
    return ", ".join(f"{n} dropped: {reason}" for reason, n in dropped.most_common())


def read_split(name: str | None, split: str, config: str | None, data_dir: str | None) -> datasets.Dataset:
    """The raw rows of a split. Raises Stop."""
    splits = read_dataset(name, config, data_dir)
    if split not in splits:
        raise Stop(f"{name or 'The built-in task'} has no split {split!r}: it has {', '.join(map(str, splits))}.")
    return splits[split]


def usable_rows(rows: datasets.Dataset, name: str | None, dropped: collections.Counter) -> Iterator[datasets.Dataset]:
    """Raw rows -> the usable ones, part by part, each made when it is asked for: a run reads no more of a million rows
    than it can use. The others are counted by reason in `dropped`. Raises Stop if none is usable."""
    (parse, features), usable = row_format(rows, name), 0
    for start in range(0, len(rows), 1000):
        part = datasets.Dataset.from_dict(parse_batch(parse, dropped, features, rows[start : start + 1000]), features)
        usable += len(part)
        yield part
    if not usable:
        raise Stop(f"No usable row in {name!r} ({len(rows)} rows; {reasons(dropped)}).")


class Data(NamedTuple):
    """What a run trains and is measured on; the prompts of the three sets of rows are disjoint."""

    train: datasets.Dataset
    prompts: list[Prompt]  # the distinct prompts that OSP trains on
    held_out: datasets.Dataset
    ood: datasets.Dataset | None  # out-of-domain rows; only the built-in task has them
    gold: Callable[[str, str], float] | None  # a response's true reward; only the built-in task has one
    pairs: dict[str, list[tuple[str, str]]] = {}  # prompt -> its (chosen, rejected), for --response_source dataset


def load_data(tokenizer, model, judge, args: Arguments) -> Data:
    """The rows and prompts of this run. All fit the model's context, and held-out ones that of `judge`, if there is one."""
    name, config, folder = args.dataset_name, args.dataset_config, args.dataset_data_dir
    measured, dropped = max(args.num_eval_prompts, args.num_eval_pairs), collections.Counter()
    rows = read_split(name, args.dataset_train_split, config, folder)
    has_test = "test" in read_dataset(name, config, folder) and args.dataset_train_split != "test"
    test_split = args.dataset_test_split or ("test" if has_test else None)
    if test_split:
        test, train = load_preferences(name, test_split, config, folder), usable_rows(rows, name, dropped)
    else:
        rows = rows.select(np.random.default_rng(args.seed).permutation(len(rows)))
        train, first = usable_rows(rows, name, dropped), []
        for part in train:
            first.append(part)
            if sum(map(len, first)) >= 10 * measured:
                break
        first = datasets.concatenate_datasets(first)
        cut = min(measured, len(first) // 10 + 1)
        test, train = first.take(cut), itertools.chain([first.skip(cut)], train)
    held_out = fitting_rows(tokenizer, model, args, [test], measured, "held-out")
    if judge:
        held_out = fitting_rows(judge[1], judge[0], args, [held_out], measured, "held-out")
    by_sft = args.sft_max_steps * args.sft_batch_size if args.sft and "chosen" in row_format(rows, name)[1] else 0
    wanted = max(by_sft, 4 * args.num_train_prompts)
    train = fitting_rows(tokenizer, model, args, train, wanted, "training", map(prompt_key, test["prompt"]), dropped)
    print(f"{len(train)} rows to train on, of {len(rows)}")
    prompts, pairs = distinct_prompts(train, args.num_train_prompts), {}
    if args.response_source == "dataset":
        if "chosen" not in train.column_names:
            raise Stop("--response_source dataset needs data with chosen and rejected responses.")
        pairs = {prompt_key(prompt): [] for prompt in prompts}
        for row in train:
            pairs.get(prompt_key(row["prompt"]), []).append((row["chosen"], row["rejected"]))
    if name is not None:
        return Data(train, prompts, held_out, None, None, pairs)
    ood = fitting_rows(tokenizer, model, args, [load_preferences(None, "ood")], measured, "out-of-domain")
    return Data(train, prompts, held_out, ood, gold_reward, pairs)


def prompt_key(prompt: Prompt) -> str:
    """What makes two prompts the same."""
    return prompt if isinstance(prompt, str) else transcript(prompt)


def distinct_prompts(rows: datasets.Dataset, most: int) -> list[Prompt]:
    """The prompts of these rows, each once, in their order, and no more than `most`."""
    return list({prompt_key(p): p for p in rows["prompt"]}.values())[:most]


def fitting_rows(tokenizer, model, args: Arguments, parts: Iterable[datasets.Dataset], wanted: int, name: str,
                 excluded: Iterable[str] = (), dropped: collections.Counter | None = None) -> datasets.Dataset:
    """The first `wanted` rows whose prompt is not `excluded`, suits the chat template, and fits the context together with
    the judge's frame and two full responses. Reads no further; says what it passed over, and what the parts' maker had
    `dropped`. Raises Stop if none is left."""
    kept, seen, dropped, excluded = [], 0, collections.Counter() if dropped is None else dropped, set(excluded)
    limit = context_length(model)
    for part, indices in ((part, indices) for part in parts for indices in chunks(range(len(part)), 1000)):
        prompts, fitting = part[indices]["prompt"], []
        questions = encode_questions(tokenizer, prompts, [""] * len(prompts), [""] * len(prompts))
        for i, prompt, question in zip(indices, prompts, questions):
            if prompt_key(prompt) in excluded:
                dropped["its prompt is held out"] += 1
            elif len(question) + 2 * args.max_new_tokens > limit:
                dropped[f"too long, with two responses of {args.max_new_tokens}, for {limit} tokens"] += 1
            elif not suits_template(tokenizer, prompt):
                dropped["the chat template refuses it"] += 1
            else:
                fitting.append(i)
        kept.append(part.select(fitting))
        if (seen := seen + len(fitting)) >= wanted:
            break
    if not seen:
        raise Stop(f"No {name} row is left ({reasons(dropped) or 'there were none'}).")
    if dropped:
        print(f"{name} rows: {reasons(dropped)}")
    rows = datasets.concatenate_datasets(kept)
    return rows.select(range(min(wanted, seen)))


def suits_template(tokenizer, prompt: Prompt) -> bool:
    """Whether the chat template takes these messages: some refuse a system message, or two turns of one role."""
    try:
        framed(tokenizer, prompt)
        return True
    except jinja2.TemplateError:
        return False


def first_line(error: Exception) -> str:
    """The first line of a library's message, for a sentence of ours."""
    return next(iter(str(error).strip().splitlines()), type(error).__name__)[:300].rstrip(".")


# ----------------------------------------------------------------------------------------------------------------------
# 3. From text to token ids: what the policy continues, and what the judge is asked
# ----------------------------------------------------------------------------------------------------------------------
HH_TURN = re.compile(r"\n\n(Human|Assistant):")


def as_messages(prompt: Prompt) -> list[dict]:
    """"\\n\\nHuman: hi\\n\\nAssistant:" -> [{"role": "user", "content": "hi"}]; any other text is one user message."""
    if not isinstance(prompt, str):
        return prompt
    if not HH_TURN.match(prompt):
        return [{"role": "user", "content": prompt.strip()}]
    parts = HH_TURN.split(prompt)[1:]
    roles = ["user" if who == "Human" else "assistant" for who in parts[::2]]
    turns = [{"role": role, "content": text.strip()} for role, text in zip(roles, parts[1::2])]
    return turns[:-1] if turns[-1] == {"role": "assistant", "content": ""} else turns


def transcript(prompt: Prompt) -> str:
    """A prompt as HH writes it: "Human: hi\\n\\nAssistant: hello\\n\\nHuman: and now?"."""
    names = {"user": "Human", "assistant": "Assistant", "system": "System"}
    return "\n\n".join(f"{names.get(m['role'], m['role'])}: {m['content']}" for m in as_messages(prompt))


@functools.lru_cache(maxsize=4)
def special_tokens(tokenizer) -> re.Pattern:
    """Matches the text of any special token."""
    added = {token.content for token in tokenizer.added_tokens_decoder.values() if token.special}
    texts = sorted(added | set(tokenizer.all_special_tokens), key=len, reverse=True)
    return re.compile("|".join(re.escape(text) for text in texts if len(text) > 1) or r"(?!)")


def plain(tokenizer, text: str) -> str:
    """Text from outside, with a space put into whatever spells a special token, so that it never becomes one."""
    return special_tokens(tokenizer).sub(lambda match: match[0][0] + " " + match[0][1:], text)


def framed(tokenizer, prompt: Prompt) -> str:
    """A prompt as the model reads it: by its chat template if it has one, else as text (messages as HH writes them)."""
    if tokenizer.chat_template:
        messages = [{**m, "content": plain(tokenizer, m["content"])} for m in as_messages(prompt)]
        return tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    return plain(tokenizer, prompt if isinstance(prompt, str) else f"\n\n{transcript(prompt)}\n\nAssistant:")


def encode(tokenizer, texts: list[str]) -> list[Ids]:
    """Framed texts -> ids. BOS comes from the chat template, or goes in front where the tokenizer itself puts it."""
    puts_bos = not tokenizer.chat_template and tokenizer("a").input_ids[0] == tokenizer.bos_token_id
    bos = [tokenizer.bos_token_id] if puts_bos else []
    return [bos + ids for ids in tokenizer(texts, add_special_tokens=False).input_ids] if texts else []


def encode_prompts(tokenizer, prompts: list[Prompt]) -> list[Ids]:
    """B prompts -> their ids, which a response continues."""
    return encode(tokenizer, [framed(tokenizer, p) for p in prompts])


def encode_responses(tokenizer, prompts: list[Prompt], responses: list[str], max_new_tokens: int) -> list[Ids]:
    """N responses of the data -> ids as the policy would sample them: cut at max_new_tokens, else ending in EOS."""
    heads, tails = [framed(tokenizer, p) for p in prompts], [plain(tokenizer, r) for r in responses]
    tails = [tail if head[-1].isspace() else " " + tail for head, tail in zip(heads, tails)]
    rows = zip(encode(tokenizer, heads), encode(tokenizer, [h + t for h, t in zip(heads, tails)]), tails)
    # enc(a + b) != enc(a) + enc(b): b is read off the whole, unless its first characters were merged with a's last
    ids = [both[len(head):] if both[: len(head)] == head else tokenizer(tail, add_special_tokens=False).input_ids
           for head, both, tail in rows]
    return [(row + [tokenizer.eos_token_id])[:max_new_tokens] for row in ids]


def decode(tokenizer, rows: list[Ids]) -> list[str]:
    """N sampled responses as the judge reads them, without special tokens."""
    return [text.strip() for text in tokenizer.batch_decode(rows, skip_special_tokens=True)]


JUDGE_FRAME = "Which response is better, A or B?\n\nPrompt:\n{prompt}\n\nA:\n{a}\n\nB:\n{b}\n\nBetter:"


def judge_question(tokenizer, prompt: Prompt, a: str, b: str, end: str) -> str:
    """The framed text whose next token is the verdict, "A" or "B"; `end` comes from verdict_format."""
    return framed(tokenizer, JUDGE_FRAME.format(prompt=quoted(transcript(prompt)), a=quoted(a), b=quoted(b)) + end)


def quoted(text: str) -> str:
    """Every line behind "> ", so that no line of a response can pass for one of the frame's."""
    return "\n".join("> " + line for line in text.splitlines() if line.strip()) or "> "


@functools.lru_cache(maxsize=4)
def verdict_format(tokenizer) -> tuple[str, int, int]:
    """What ends the judge's question, and the ids of the verdicts A and B after it. Raises Stop where there are none.

    A letter encoded by itself may get another id (SentencePiece), so both are read off the end of a whole question:
    after a space ("Better: A"), else on a new line, else at once; one token each, the question's tokens unchanged."""
    for end, gap in (("", " "), ("\n", ""), ("", "")):
        text = judge_question(tokenizer, "p", "x", "y", end)
        gap = "" if text[-1].isspace() else gap
        head, a, b = encode(tokenizer, [text, text + gap + "A", text + gap + "B"])
        if a[:-1] == b[:-1] == head and a[-1] != b[-1] and tokenizer.unk_token_id not in (a[-1], b[-1]):
            return end, a[-1], b[-1]
    raise Stop("This tokenizer never makes the verdict letters A and B one token each at the end of the judge's question "
               f"({text[-20:]!r}): change the end of JUDGE_FRAME in osp.py.")


def encode_questions(tokenizer, prompts: list[Prompt], responses_1: list[str], responses_2: list[str],
                     limit: int = sys.maxsize) -> list[Ids]:
    """N questions to the judge, response 1 shown as A; where one exceeds `limit` tokens, both its responses are cut."""
    end, _, _ = verdict_format(tokenizer)
    rows = zip(prompts, responses_1, responses_2)
    questions = encode(tokenizer, [judge_question(tokenizer, *row, end) for row in rows])
    for i, (a, b) in enumerate(zip(responses_1, responses_2)):
        while len(questions[i]) > limit and (a or b):
            a, b = a[: len(a) * 3 // 4], b[: len(b) * 3 // 4]
            questions[i] = encode(tokenizer, [judge_question(tokenizer, prompts[i], a, b, end)])[0]
    return questions


# ----------------------------------------------------------------------------------------------------------------------
# 4. Supervised fine-tuning with the judging task: makes pi_SFT, which is the start, the judge and the reference
# ----------------------------------------------------------------------------------------------------------------------
SFT_EASY_STEPS, SFT_EASY_ROWS = 0.3, 0.25  # a curriculum: this share of the steps sees this share of the pairs, the shortest


def supervised_tasks(tokenizer, batch: dict, limit: int, args: Arguments) -> dict[str, tuple[list[Ids], list[Ids]]]:
    """Preference pairs -> the rows of both tasks, each as prompt ids and target ids: the loss is on the targets alone.

    respond: the chosen responses; a third of them, for responding is learned long before judging. judge: the right verdict
    on each pair in both orders. Reconstruction: the third, both orders, and the loss on the verdict only."""
    prompts, chosen, rejected = batch["prompt"], batch["chosen"], batch["rejected"]
    _, a, b = verdict_format(tokenizer)
    questions = encode_questions(tokenizer, prompts + prompts, chosen + rejected, rejected + chosen, limit)
    third = math.ceil(len(prompts) / 3)
    answers = encode_responses(tokenizer, prompts[:third], chosen[:third], args.max_new_tokens)
    return {"respond": (encode_prompts(tokenizer, prompts[:third]), answers),
            "judge": (questions, [[a]] * len(prompts) + [[b]] * len(prompts))}


def supervised_finetune(model, tokenizer, train: datasets.Dataset, inputs: str, signals: list, args: Arguments) -> None:
    """Trains `model` in place on the sum of both tasks' mean token losses, for sft_max_steps steps."""
    optimizer, scheduler = optimizer_and_schedule(model, args.sft_learning_rate, args.sft_max_steps, args)
    loop = Loop("sft-checkpoint", args.sft_max_steps, model, tokenizer, optimizer, scheduler, inputs, signals, args)
    checkpoint = newest_whole(checkpoints(Path(args.output_dir), loop.name))
    done = load_checkpoint(checkpoint, loop) if checkpoint else 0
    limit, pad = context_length(model), pad_token_id(tokenizer)
    sizes = [len(chosen) + len(rejected) for chosen, rejected in zip(train["chosen"], train["rejected"])]
    by_size = sorted(range(len(train)), key=sizes.__getitem__)
    model.train()
    for step in (bar := tqdm(range(done, loop.steps), initial=done, total=loop.steps, desc="SFT", disable=RANK > 0)):
        easy = step < args.sft_max_steps * SFT_EASY_STEPS
        allowed = by_size[: math.ceil(len(train) * SFT_EASY_ROWS)] if easy else by_size
        batch = train[[allowed[i] for i in step_indices(len(allowed), args.sft_batch_size, step, args.seed)]]
        losses = {}
        for task, (prompt_ids, target_ids) in supervised_tasks(tokenizer, batch, limit, args).items():
            order, tokens = sorted(range(len(prompt_ids)), key=lambda i: len(prompt_ids[i])), sum(map(len, target_ids))
            for rows, weight in own_chunks(order, args.micro_batch_size):
                prompts, targets = [prompt_ids[i] for i in rows], [target_ids[i] for i in rows]
                with precision(model, args):
                    logps = response_logps(model, prompts, targets, pad, len(rows))
                (loss := -weight * logps.sum() / tokens).backward()
                losses[task] = losses.get(task, 0.0) + loss.item()
        losses = {task: sum(collected([loss])) / WORLD for task, loss in losses.items()}
        optimizer_step(model, optimizer, scheduler, sum(losses.values()), args, f"SFT step {step + 1}")
        bar.set_postfix_str(", ".join(f"{task} {loss:.3f}" for task, loss in losses.items()), refresh=False)
        end_of_step(loop, step + 1)


# ----------------------------------------------------------------------------------------------------------------------
# 5. Sample K responses a prompt from the current policy
# ----------------------------------------------------------------------------------------------------------------------
SAMPLING_BATCH_SIZE = 128  # responses sampled side by side: they keep no activations, so more fit than in an update


def sampling_noise(seed: int, step: int, prompts: list[int], ks: Iterable[int], length: int) -> torch.Tensor:
    """(B, K, T) uniform float64: numbers that belong to (seed, step, prompt, k), not to the batch or the process."""
    draw = lambda i, k: np.random.default_rng((seed, step, i, k)).random(length)
    return torch.from_numpy(np.array([[draw(i, k) for k in ks] for i in prompts]))


@torch.no_grad()
def sample(model, prompt_ids: list[Ids], noise: torch.Tensor, temperature: float, stop_ids: list[int],
           pad: int) -> list[list[Ids]]:
    """B prompts' ids and noise (B, K, T) -> B lists of K responses of at most T tokens, with the EOS where one was drawn.

    On-policy means the distribution itself: no top-k, no top-p, nothing from the checkpoint's generation_config. Each
    token is the inverse of the distribution function at its noise. A prompt is computed once for all its K responses."""
    model.eval()
    (B, K, T), device = noise.shape, model.device
    cache, logits, mask = prefill(model, [ids for ids in prompt_ids for _ in range(K)], pad)
    last, mask = positions(mask)[:, -1:], F.pad(mask, (0, T), value=1)
    noise, stops = noise.reshape(B * K, T).to(device), torch.tensor(stop_ids, device=device)
    done, tokens = torch.zeros(B * K, dtype=torch.bool, device=device), []
    for t in range(T):
        cdf = (logits[:, -1].float() / temperature).softmax(-1).double().cumsum(-1)  # float64: V may be large
        token = torch.searchsorted(cdf, noise[:, t : t + 1] * cdf[:, -1:], right=True).clamp_(max=cdf.shape[-1] - 1)
        tokens.append(token)
        done |= torch.isin(token[:, 0], stops)
        if done.all() or t == T - 1:
            break
        logits = model(input_ids=token, attention_mask=mask[:, : t + 1 - T], position_ids=last + t + 1,
                       past_key_values=cache, use_cache=True, logits_to_keep=1).logits
    rows = [cut_after_stop(row, stop_ids) for row in torch.cat(tokens, 1).tolist()]
    return [rows[i : i + K] for i in range(0, B * K, K)]


def cut_after_stop(ids: Ids, stop_ids: list[int]) -> Ids:
    """[5, 6, eos, 9] -> [5, 6, eos]; a response that never stopped gets no EOS."""
    end = next((t for t, token in enumerate(ids) if token in stop_ids), len(ids))
    return ids[: end + 1]


def bf16_copy(model):
    """A frozen copy in bf16, made without one in fp32; buffers, such as rotary frequencies, keep their precision.

    Decoding reads every weight for every token, and autocast would cast them anew each time."""
    cast = lambda parameter: torch.nn.Parameter(parameter.detach().to(torch.bfloat16), requires_grad=False)
    return copy.deepcopy(model, {id(parameter): cast(parameter) for parameter in model.parameters()})


def sample_responses(model, tokenizer, prompt_ids: list[Ids], noise: torch.Tensor, args: Arguments) -> list[list[Ids]]:
    """`sample`, a few prompts at a time; with --bf16 from a bf16 copy of the policy as it stands."""
    if args.bf16 and next(model.parameters()).dtype == torch.float32 and not isinstance(model, FSDPModule):
        model = bf16_copy(model)
    stops, pad = stop_token_ids(model, tokenizer), pad_token_id(tokenizer)
    size = max(1, SAMPLING_BATCH_SIZE // noise.shape[1])
    draw = lambda rows: sample(model, prompt_ids[rows.start : rows.stop], noise[rows.start : rows.stop],
                               args.temperature, stops, pad)
    return [responses for part in divided(model, draw, range(len(prompt_ids)), size) for responses in part]


def candidates(policy, sft, tokenizer, prompts: list[Prompt], prompt_ids: list[Ids], noise: torch.Tensor, data: Data,
               args: Arguments) -> list[list[Ids]]:
    """Where candidates come from: B lists of K responses, or of the data's chosen and rejected ones in turn."""
    if args.response_source != "dataset":
        return sample_responses(policy if args.response_source == "policy" else sft, tokenizer, prompt_ids, noise, args)
    pairs = [data.pairs[prompt_key(prompt)][: args.num_generations // 2] for prompt in prompts]
    return [encode_responses(tokenizer, [prompt] * 2 * len(rows), sum(map(list, rows), []), args.max_new_tokens)
            for prompt, rows in zip(prompts, pairs)]


# ----------------------------------------------------------------------------------------------------------------------
# 6. Rank against one baseline, and pair
# ----------------------------------------------------------------------------------------------------------------------
def ranking_scores(judge, tokenizer, prompts: list[Prompt], texts: list[list[str]], asked: dict,
                   micro_batch_size: int = 8, both: bool = True) -> torch.Tensor:
    """B prompts with K texts each -> (B, K) scores: the strength of each against the first, whose own score is 1/2.

    O(K) questions instead of O(K^2). Source: the surveys' account of OSP's ranked pairing. The first candidate as the
    baseline is reconstruction: being on-policy, it keeps the comparisons informative as the policy improves."""
    B, K = len(texts), len(texts[0])
    rows = [(prompt, text, row[0]) for prompt, row in zip(prompts, texts) for text in row[1:]]
    strengths = preference_strength(judge, tokenizer, *map(list, zip(*rows)), asked, micro_batch_size, both)
    return torch.cat([torch.full((B, 1), 0.5), strengths.reshape(B, K - 1)], 1)


def candidate_scores(judge, tokenizer, prompts: list[Prompt], texts: list[list[str]], noise: torch.Tensor, asked: dict,
                     args: Arguments) -> tuple[list[list[float]], str]:
    """What the pairs are made by, and the `construction` by which ranked_pairs reads it: ranking_scores; for random pairs
    the uniform noise (B, K); for the data's own pairs numbers that fall from one to the next, so that neighbours pair."""
    if args.response_source == "dataset":
        return [list(range(len(row), 0, -1)) for row in texts], "adjacent"
    if args.pair_construction == "random":
        return noise.tolist(), "ranked"
    scores = ranking_scores(judge, tokenizer, prompts, texts, asked, args.micro_batch_size, args.judge_both_orders)
    return scores.tolist(), args.pair_construction


def ranked_pairs(scores, construction: str = "ranked") -> list[tuple[int, int]]:
    """K scores of one prompt's responses -> K//2 pairs of indices (better, worse): best with worst, then inwards.

    [0.5, 0.9, 0.1, 0.7] -> [(1, 2), (3, 0)]. An odd K leaves out the middle; ties keep their order. Reconstruction: one
    prompt then yields pairs from a landslide to a near tie, which is the point of modelling strength.
    For comparison: best_worst keeps (1, 2) alone; adjacent gives (1, 3), (0, 2)."""
    order = sorted(range(len(scores)), key=lambda k: -float(scores[k]))
    if construction == "adjacent":
        return list(zip(order[::2], order[1::2]))
    pairs = [(order[i], order[-1 - i]) for i in range(len(order) // 2)]
    return pairs[:1] if construction == "best_worst" else pairs


def pair_responses(scores: Sequence, responses: list[list[Ids]],
                   construction: str = "ranked") -> tuple[list[tuple[int, int, int]], int]:
    """(B, K) scores and responses -> P triples (prompt, better, worse), and how many identical pairs were dropped."""
    pairs = [(i, j, k) for i, row in enumerate(scores) for j, k in ranked_pairs(row, construction)]
    kept = [(i, j, k) for i, j, k in pairs if responses[i][j] != responses[i][k]]
    return kept, len(pairs) - len(kept)


# ----------------------------------------------------------------------------------------------------------------------
# 7. Judge: the frozen SFT model says how strongly it prefers one response to another
# ----------------------------------------------------------------------------------------------------------------------
@torch.no_grad()
def verdict_probabilities(judge, tokenizer, prompts: list[Prompt], responses_1: list[str], responses_2: list[str],
                          asked: dict | None = None, micro_batch_size: int = 8,
                          both: bool = True) -> tuple[torch.Tensor, torch.Tensor]:
    """P pairs of texts -> P("A") with response 1 shown as A, and P("A") with response 2 shown as A: (P,) each, in [0, 1].
    With `both` False only the first is asked, and the second is what a judge without position bias would say.

    P("A") is the softmax over the logits of the two verdict tokens after the question. `asked` maps a question's ids to
    its answer: what stands there is not asked again, and what is asked is added. Equal questions are asked once."""
    asked, verdicts = {} if asked is None else asked, list(verdict_format(tokenizer)[1:])
    ones, twos = list(responses_1), list(responses_2)
    columns = (list(prompts) * 2, ones + twos, twos + ones) if both else (list(prompts), ones, twos)
    questions = list(map(tuple, encode_questions(tokenizer, *columns, context_length(judge))))
    judge.eval()

    def answers(rows: Sequence) -> dict[tuple, float]:
        logits = last_logits(judge, rows, pad_token_id(tokenizer))[:, verdicts]
        return dict(zip([head + tail for head, tail in rows], logits.float().softmax(-1)[:, 0].tolist()))

    for part in divided(judge, answers, shared_heads(set(questions) - asked.keys()), micro_batch_size):
        asked.update(part)
    first = torch.tensor([asked[ids] for ids in questions])
    if not first.isfinite().all():
        raise Stop("The judge's verdicts are not numbers (NaN): its weights, or their precision, are broken.", code=1)
    return first[: len(ones)], first[len(ones) :] if both else 1 - first


def last_logits(model, rows: list[tuple[tuple[int, ...], tuple[int, ...]]], pad: int) -> torch.Tensor:
    """N sequences as (head, tail) -> the logits (N, V) after each one's last token; equal heads are computed once."""
    cache, _, mask = prefill(model, [list(head) for head, _ in rows], pad)
    tails = padded([list(tail) for _, tail in rows], [[]] * len(rows), pad, model.device)
    mask = torch.cat([mask, tails["attention_mask"]], 1)
    ids = tails["input_ids"]
    return model(input_ids=ids, attention_mask=mask, position_ids=positions(mask)[:, -ids.shape[1] :],
                 past_key_values=cache, use_cache=True, logits_to_keep=1).logits[:, -1]


def shared_heads(questions: Iterable[tuple[int, ...]]) -> list[tuple[tuple[int, ...], tuple[int, ...]]]:
    """Distinct questions as ids -> each as (head, tail), where equal heads are side by side, to be computed once.

    Neighbours in sorted order form the groups, of 64 at most, that leave the fewest tokens to compute: n questions
    that share c tokens save (n - 1) c. Those against the baseline as A share all up to B, the others their prompt."""
    rows, best = sorted(questions), [(0, 0, 0)]  # best[j]: tokens saved in rows[:j], the last group's start and c
    common = [len(os.path.commonprefix([one[:-1], two[:-1]])) for one, two in zip(rows, rows[1:])]
    for j, row in enumerate(rows):
        c, options = len(row) - 1, []
        for i in range(j, max(-1, j - 64), -1):
            c = min(c, common[i]) if i < j else c
            options.append((best[i][0] + (j - i) * c, i, c))
        best.append(max(options))
    split, j = [], len(rows)
    while j:
        _, i, c = best[j]
        split, j = split + [(ids[:c], ids[c:]) for ids in rows[i:j]], i
    return sorted(split, key=lambda row: (len(row[0]), row[0], len(row[1])))


def both_orders(p_12: torch.Tensor, p_21: torch.Tensor) -> torch.Tensor:
    """(P,), (P,) -> (P,): the average over both orders, in the form that in floats is exactly 1/2 for equal ones."""
    return (p_12 + (1 - p_21)) / 2


def preference_strength(judge, tokenizer, prompts: list[Prompt], responses_1: list[str], responses_2: list[str],
                        asked: dict | None = None, micro_batch_size: int = 8, both: bool = True) -> torch.Tensor:
    """P pairs of texts -> (P,) strengths p(1 > 2) in [0, 1]. Source: the paper; averaging both orders is reconstruction.

    With both orders p(1 > 2) + p(2 > 1) = 1, and identical responses give exactly 1/2."""
    rows = prompts, responses_1, responses_2
    return both_orders(*verdict_probabilities(judge, tokenizer, *rows, asked, micro_batch_size, both))


def training_labels(strength: torch.Tensor, noise: torch.Tensor, args: Arguments) -> torch.Tensor:
    """Who decides the strength: the judge's strengths and uniform noise, (P,) each -> what the loss is given (P,).

    --label_noise e makes of p what a judge says whose verdict is turned round e of the time, (1 - e) p + e (1 - p)."""
    strength = strength + args.label_noise * (1 - 2 * strength)
    drawn = (noise < strength).float()
    return {"strength": strength, "drawn": drawn, "data": torch.ones_like(strength)}[args.labels]


# ----------------------------------------------------------------------------------------------------------------------
# 8. The SPCE loss
# ----------------------------------------------------------------------------------------------------------------------
def implicit_margin(policy_logps_1, policy_logps_2, ref_logps_1, ref_logps_2, beta: float) -> torch.Tensor:
    """(P,) each -> h (P,) = beta * [(log pi(1) - log pi_SFT(1)) - (log pi(2) - log pi_SFT(2))]. Source: DPO."""
    return beta * ((policy_logps_1 - ref_logps_1) - (policy_logps_2 - ref_logps_2))


def spce_loss(policy_logps_1: torch.Tensor, policy_logps_2: torch.Tensor, ref_logps_1: torch.Tensor,
              ref_logps_2: torch.Tensor, strength: torch.Tensor, beta: float) -> torch.Tensor:
    """Soft-preference cross-entropy: logps (P,) and strengths p(1 > 2) (P,) -> losses (P,), not reduced.

        L = -[ p log sigmoid(h) + (1 - p) log sigmoid(-h) ],    dL/dh = sigmoid(h) - p,    least at h = logit(p)

    p = 1 is DPO; p = 1 - eps is conservative DPO. Source: name and purpose are the paper's; reconstruction: the formula,
    the cross-entropy between the judge's Bernoulli(p) and the policy's Bernoulli(sigmoid(h))."""
    h = implicit_margin(policy_logps_1, policy_logps_2, ref_logps_1, ref_logps_2, beta)
    return -(strength * F.logsigmoid(h) + (1 - strength) * F.logsigmoid(-h))


def pair_loss(loss_type: str, policy_logps_1, policy_logps_2, ref_logps_1, ref_logps_2, strength,
              beta: float) -> torch.Tensor:
    """The loss by its name -> (P,). For comparison with SPCE, on strengths rounded to 0 or 1 (ties stay ties):

    dpo: DPO on the same pairs. ipo: (h / beta - 1 / (2 beta))^2 with h from winner to loser. Source: Azar et al., eq. 17."""
    logps = policy_logps_1, policy_logps_2, ref_logps_1, ref_logps_2
    if loss_type != "spce":
        strength = (strength > 0.5).float().where(strength != 0.5, 0.5)
    if loss_type == "ipo":
        return ((2 * strength - 1) * implicit_margin(*logps, beta) / beta - 1 / (2 * beta)) ** 2
    return spce_loss(*logps, strength, beta)


# ----------------------------------------------------------------------------------------------------------------------
# 9. Update: log-probabilities, micro-batches, one optimiser step
# ----------------------------------------------------------------------------------------------------------------------
def padded(prompt_ids: list[Ids], response_ids: list[Ids], pad: int, device) -> dict[str, torch.Tensor]:
    """N prompts padded on the left and N responses on the right, so that all meet at one column; positions skip padding.

    [1 2 3], [4] and [5], [6 7] -> input_ids [[1 2 3 5 .], [. . 4 6 7]], attention_mask [[1 1 1 1 0], [0 0 1 1 1]]."""
    P, R = max(map(len, prompt_ids)), max(map(len, response_ids))
    rows = [(P - len(p), p + r, R - len(r)) for p, r in zip(prompt_ids, response_ids)]
    ids = torch.tensor([[pad] * left + row + [pad] * right for left, row, right in rows], device=device)
    mask = torch.tensor([[0] * left + [1] * len(row) + [0] * right for left, row, right in rows], device=device)
    return {"input_ids": ids, "attention_mask": mask, "position_ids": positions(mask)}


def positions(mask: torch.Tensor) -> torch.Tensor:
    """(N, T) attention mask -> (N, T) positions that skip padding, wherever it stands."""
    return (mask.cumsum(-1) - 1).clamp(min=0)


def prefill(model, prompt_ids: list[Ids], pad: int) -> tuple[transformers.Cache, torch.Tensor, torch.Tensor]:
    """N prompts -> their keys and values, the logits (N, 1, V) that follow, the mask (N, T). Equal prompts are computed once,
    and the gradients of all that continue them go back through the one."""
    distinct = {tuple(ids): i for i, ids in enumerate(dict.fromkeys(map(tuple, prompt_ids)))}
    inputs = padded(list(map(list, distinct)), [[]] * len(distinct), pad, model.device)
    cache = transformers.DynamicCache(config=model.config)
    logits = model(**inputs, past_key_values=cache, use_cache=True, logits_to_keep=1).logits
    rows = torch.tensor([distinct[tuple(ids)] for ids in prompt_ids], device=model.device)
    cache.batch_select_indices(rows)
    return cache, logits[rows], inputs["attention_mask"][rows]


def token_logps(model, prompt_ids: list[Ids], response_ids: list[Ids], pad: int) -> torch.Tensor:
    """N prompts and responses as ids -> (N, T) fp32 log-probs of the responses' tokens, 0 beyond each one's end.

    Logits are made at the response's positions only. A prompt that several rows share is computed once: its keys and
    values serve all of them and carry their gradients back. Not so with gradient checkpointing, which keeps no cache."""
    inputs, T = padded(prompt_ids, response_ids, pad, model.device), max(map(len, response_ids))
    distinct = len(set(map(tuple, prompt_ids)))
    alone = distinct == len(prompt_ids) or T == 1 or model.training and model.is_activation_checkpointing
    if isinstance(model, FSDPModule) and torch.is_grad_enabled():
        alone = any(collected([alone]))  # sharded passes are done together, so all processes need the same number
    if alone:
        logits = model(**inputs, logits_to_keep=T + 1, use_cache=False).logits[:, -T - 1 : -1]
    else:
        cache, first, _ = prefill(model, prompt_ids, pad)
        rest = model(input_ids=inputs["input_ids"][:, -T:-1], attention_mask=inputs["attention_mask"][:, :-1],
                     position_ids=inputs["position_ids"][:, -T:-1], past_key_values=cache, use_cache=True).logits
        logits = torch.cat([first, rest], 1)
    logps = logits.float().log_softmax(-1).gather(-1, inputs["input_ids"][:, -T:, None])[:, :, 0]
    return logps.where(inputs["attention_mask"][:, -T:].bool(), 0.0)


def response_logps(model, prompt_ids: list[Ids], response_ids: list[Ids], pad_token_id: int,
                   micro_batch_size: int = 8) -> torch.Tensor:
    """N prompts and responses as ids -> (N,) fp32 logps in nats: sums over each response's tokens, its EOS included.

    Sums and not means, because the implicit reward is a ratio of the probabilities of whole responses."""
    order = sorted(range(len(prompt_ids)), key=lambda i: (len(prompt_ids[i]), prompt_ids[i], len(response_ids[i])))

    def part(rows: Sequence[int]) -> torch.Tensor:
        return token_logps(model, [prompt_ids[i] for i in rows], [response_ids[i] for i in rows], pad_token_id).sum(-1)

    if torch.is_grad_enabled():  # an update, whose micro-batches are divided already
        sums = [part(rows) for rows in chunks(order, micro_batch_size)]
    else:
        sums = divided(model, lambda rows: part(rows).cpu(), order, micro_batch_size)
    return torch.cat(sums).to(model.device)[torch.tensor(order, device=model.device).argsort()]


class Pairs(NamedTuple):
    """The P pairs of one step: ids, and (P,) tensors."""

    prompt_ids: list[Ids]
    chosen_ids: list[Ids]
    rejected_ids: list[Ids]
    strength: torch.Tensor  # p(chosen > rejected), see training_labels; below 1/2 where it contradicts the ranking
    ref_chosen_logps: torch.Tensor
    ref_rejected_logps: torch.Tensor


def update(policy, optimizer, scheduler, pairs: Pairs, args: Arguments, pad: int, step: int) -> dict[str, float]:
    """One optimiser step on the mean loss over the step's P pairs; micro-batches do not change the gradient.

    Returns the figures of the whole step: loss, strength_mean, strength_std, margin, margin_accuracy (share of decided
    pairs with h > 0 where the strength says so), kl (nats, mean over the paired responses), grad_norm before clipping."""
    policy.train()
    P, done = len(pairs.strength), []
    for rows, weight in own_chunks(range(P), max(1, args.micro_batch_size // 2)):
        prompt_ids, chosen_ids, rejected_ids, strength, *refs = (column[rows.start : rows.stop] for column in pairs)
        with precision(policy, args):
            logps = response_logps(policy, prompt_ids * 2, chosen_ids + rejected_ids, pad, args.micro_batch_size)
        loss = pair_loss(args.loss_type, *logps.chunk(2), *refs, strength, args.beta)
        (weight * loss.sum() / P).backward()
        logps = logps.detach()
        figures = loss.detach(), implicit_margin(*logps.chunk(2), *refs, args.beta), logps - torch.cat(refs)
        done += [[figure.cpu() for figure in figures]] if weight else []
    losses, margin, log_ratios = map(torch.cat, zip(*collected(done)))
    loss, strength = losses.mean().item(), pairs.strength.cpu()
    agree = ((margin > 0) == (strength > 0.5))[strength != 0.5].float()
    grad_norm = optimizer_step(policy, optimizer, scheduler, loss, args, f"step {step + 1}")
    return {"loss": loss, "strength_mean": strength.mean().item(), "strength_std": strength.std(correction=0).item(),
            "margin": margin.mean().item(), "margin_accuracy": agree.mean().item() if len(agree) else 0.5,
            "kl": log_ratios.mean().item(), "grad_norm": grad_norm}


def optimizer_and_schedule(model, learning_rate: float, steps: int, args: Arguments):
    """AdamW over all parameters without weight decay, and a schedule of transformers by its name."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=learning_rate, betas=(0.9, 0.95), weight_decay=0.0)
    warmup = math.ceil(args.warmup_steps * steps) if args.warmup_steps < 1 else int(args.warmup_steps)
    return optimizer, transformers.get_scheduler(args.lr_scheduler_type, optimizer, warmup, steps)


def optimizer_step(model, optimizer, scheduler, loss: float, args: Arguments, where: str) -> float:
    """Clips, steps, forgets the gradients; returns their norm before clipping. Raises Stop rather than write a NaN."""
    grad_norm = whole(torch.nn.utils.clip_grad_norm_(model.parameters(), args.max_grad_norm)).item()
    if not (math.isfinite(loss) and math.isfinite(grad_norm)):
        raise Stop(f"{where}: the loss is {loss} and the gradient norm {grad_norm}, so the weights were left as they were: "
                   "lower the learning rate, or go on with --resume_from_checkpoint latest.", code=1)
    optimizer.step()
    scheduler.step()
    optimizer.zero_grad()
    return grad_norm


def step_indices(n: int, size: int, step: int, seed: int) -> list[int]:
    """The rows of one step: every epoch is a new order of all n, its last step may be smaller. A function of the step
    alone, so that a resumed run needs no other data position."""
    epoch, position = divmod(step, math.ceil(n / size))
    return np.random.default_rng((seed, epoch)).permutation(n)[position * size : (position + 1) * size].tolist()


def chunks(items: Sequence, size: int) -> Iterator[Sequence]:
    """Consecutive slices of at most `size` items."""
    return (items[i : i + size] for i in range(0, len(items), size))


# ----------------------------------------------------------------------------------------------------------------------
# 10. Evaluate: the policy against pi_SFT on held-out prompts, and the judge on held-out pairs
# ----------------------------------------------------------------------------------------------------------------------
EVALUATION = 2**31  # the "step" under which evaluation draws its noise; no training step reaches it


def held_out_responses(model, tokenizer, prompts: list[Prompt], k: int, args: Arguments) -> list[Ids]:
    """One sampled response to each held-out prompt; another k gives another one."""
    noise = sampling_noise(args.seed, EVALUATION, range(len(prompts)), [k], args.max_new_tokens)
    return [row[0] for row in sample_responses(model, tokenizer, encode_prompts(tokenizer, prompts), noise, args)]


def evaluate(policy, sft, tokenizer, data: Data, rows: datasets.Dataset, known: dict, judge,
             args: Arguments) -> tuple[dict, list[tuple[Prompt, str, str]]]:
    """The figures on the prompts of held-out or out-of-domain rows, and samples (prompt, response of pi_SFT, of the
    policy). pi_SFT, which does not move, responds once: `known` keeps its responses.

    win_rate_vs_sft: share of prompts on which the policy's gold is higher, plus half the ties; without gold the mean
    strength by `judge`, a (model, tokenizer). kl: nats, mean over the policy's responses of log pi_theta - log pi_SFT."""
    prompts, pad, size = distinct_prompts(rows, args.num_eval_prompts), pad_token_id(tokenizer), args.micro_batch_size
    if id(rows) not in known:
        known[id(rows)] = held_out_responses(sft, tokenizer, prompts, 0, args)
    ids, before = encode_prompts(tokenizer, prompts), known[id(rows)]
    after = held_out_responses(policy, tokenizer, prompts, 1, args)
    texts_before, texts_after = decode(tokenizer, before), decode(tokenizer, after)
    with torch.no_grad(), precision(policy, args):
        kl = response_logps(policy, ids, after, pad, size) - response_logps(sft, ids, after, pad, size)
    if data.gold:
        gold_before, gold_after = (torch.tensor(list(map(data.gold, prompts, t))) for t in (texts_before, texts_after))
        wins = (gold_after > gold_before).float() + (gold_after == gold_before).float() / 2
        figures = {"gold_reward": gold_after.mean().item(), "gold_reward_sft": gold_before.mean().item()}
    else:
        wins = preference_strength(*judge, prompts, texts_after, texts_before, None, size)
        figures = {"self_judged": args.eval_judge_name_or_path is None}
    figures |= {"win_rate_vs_sft": wins.mean().item(), "kl": kl.mean().item(),
                "win_rate_vs_sft_se": wins.std(correction=0).item() / len(wins) ** 0.5}
    for suffix, responses in (("", after), ("_sft", before)):
        figures["distinct_fraction" + suffix] = len(set(map(tuple, responses))) / len(responses)
        figures["response_tokens" + suffix] = sum(map(len, responses)) / len(responses)
    return figures, list(zip(prompts, texts_before, texts_after))


def judged_pairs(judge, tokenizer, prompts, ones: list[str], twos: list[str], gold,
                 args: Arguments) -> dict[str, torch.Tensor]:
    """P pairs of texts as columns (P,): p_12, p_21, strength, length_difference in tokens, and with gold the truth."""
    p_12, p_21 = verdict_probabilities(judge, tokenizer, prompts, ones, twos, None, args.micro_batch_size)
    tokens = [torch.tensor([len(ids) for ids in encode(tokenizer, texts)]) for texts in (ones, twos)]
    columns = {"p_12": p_12, "p_21": p_21, "strength": both_orders(p_12, p_21), "length_difference": tokens[0] - tokens[1]}
    return columns | ({"truth": torch.tensor(list(map(true_strength, prompts, ones, twos)))} if gold else {})


def judge_figures(columns: dict[str, torch.Tensor], labelled: bool) -> dict[str, float]:
    """order_agreement; judge_accuracy and calibration against the truth if it is known, else, where response 1 is
    `labelled` the chosen one, against the labels; judge_length_bias: correlation of strength with the difference in
    length, over pairs of equal gold if it is known (left out where nothing varies)."""
    strength, truth = columns["strength"], columns.get("truth", torch.ones(len(columns["strength"])))
    right = ((strength > 0.5) == (truth > 0.5)).float().where(strength != 0.5, 0.5)
    figures = {"order_agreement": order_agreement(columns["p_12"], columns["p_21"])}
    if "truth" in columns or labelled:
        figures["judge_accuracy"] = right[truth != 0.5].mean().item() if (truth != 0.5).any() else 0.5
    if "truth" in columns:
        figures["judge_calibration_error"] = (strength - truth).abs().mean().item()
    elif labelled:
        figures["judge_ece"] = expected_calibration_error(torch.maximum(strength, 1 - strength), right)
    equal = truth == 0.5 if "truth" in columns else truth == truth
    if equal.sum() > 1:
        bias = torch.corrcoef(torch.stack([strength, columns["length_difference"]])[:, equal].double())[0, 1].item()
        figures |= {"judge_length_bias": bias} if math.isfinite(bias) else {}
    return figures


def judge_report(policy, sft, tokenizer, data: Data, samples: list[tuple], args: Arguments) -> tuple[dict, list[dict]]:
    """The judge on the data's held-out and out-of-domain pairs (suffix _on_ood), and on two responses of pi_SFT and two of
    the policy (_on_sft, _on_policy) to each held-out prompt, for it is frozen while the policy moves. Figures, and a row
    for each pair."""
    prompts, before, after = map(list, zip(*samples))
    again = lambda model, k: decode(tokenizer, held_out_responses(model, tokenizer, prompts, k, args))
    sources = {"sft": (prompts, before, again(sft, 2)), "policy": (prompts, after, again(policy, 3))}
    for source, dataset in (("data", data.held_out), ("ood", data.ood)):
        if dataset and "chosen" in dataset.column_names:
            pairs = dataset[: args.num_eval_pairs]
            sources[source] = pairs["prompt"], pairs["chosen"], pairs["rejected"]
    figures, rows = {}, []
    for source, columns in sources.items():
        judged = judged_pairs(sft, tokenizer, *columns, data.gold, args)
        suffix = "" if source == "data" else f"_on_{source}"
        figures |= {key + suffix: value for key, value in judge_figures(judged, source in ("data", "ood")).items()}
        columns = [column.tolist() for column in judged.values()]
        rows += [{"on": source} | dict(zip(judged, values)) for values in zip(*columns)]
    return figures, rows


def order_agreement(p_12: torch.Tensor, p_21: torch.Tensor) -> float:
    """Share of pairs of which both orders name the same winner; equal texts, which are one and the same question, left out."""
    p_12, p_21 = p_12[p_12 != p_21], p_21[p_12 != p_21]
    return ((p_12 > 0.5) == (p_21 < 0.5)).float().mean().item() if len(p_12) else 1.0


def expected_calibration_error(confidence: torch.Tensor, right: torch.Tensor, bins: int = 10) -> float:
    """(P,) confidences in [1/2, 1], and whether each was right -> the mean gap of the two over bins, by their size."""
    which = ((confidence - 0.5) * 2 * bins).long().clamp(max=bins - 1)
    gaps = [(confidence[which == b] - right[which == b]).sum().abs() for b in which.unique()]
    return (sum(gaps) / len(confidence)).item()


# ----------------------------------------------------------------------------------------------------------------------
# 11. Save and resume
# ----------------------------------------------------------------------------------------------------------------------
@contextmanager
def written_whole(path: Path, owner: str = "") -> Iterator[Path]:
    """Yields a scratch path to fill, file or folder, which then appears as `path` in one move: a crash leaves no half.

    The scratch is named after its `owner`, whose next start removes what a kill left. Raises Stop on a full disk."""
    if RANK > 0:  # process 0 alone writes
        with tempfile.TemporaryDirectory() as elsewhere:
            yield Path(elsewhere) / path.name
        return
    scratch, old = (path.with_name(f".{path.name}{owner}.{end}") for end in ("partial", "old.partial"))
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield scratch
        if path.is_dir():  # a folder cannot be moved onto another one
            os.replace(path, old)
        os.replace(scratch, path)
    except (OSError, RuntimeError, SafetensorError) as error:  # torch and safetensors raise kinds of their own
        raise cannot_write(path, error) from error
    finally:
        for rest in (scratch, old):
            remove(rest)


def cannot_write(path: Path, error: Exception) -> Stop:
    """The sentence for a full disk, and its like."""
    free = shutil.disk_usage(next(folder for folder in path.absolute().parents if folder.exists())).free / 2**20
    return Stop(f"Cannot write {str(path)!r}, {free:.1f} MiB being free there ({first_line(error)}): make room, then go "
                "on with --resume_from_checkpoint latest.", code=1)


def remove(path: Path) -> None:
    """Removes a file or a folder, if there is one; a folder in one move, so that no half passes for a whole one."""
    if RANK > 0:
        return
    if path.is_dir():
        path = path.rename(path.with_name(f".{path.name.lstrip('.').removesuffix('.partial')}.partial"))
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def write_json(path: Path, value: dict) -> None:
    """One JSON object."""
    with written_whole(path) as scratch:
        scratch.write_text(json.dumps(value, indent=2, allow_nan=False) + "\n")


def save_model(model, tokenizer, folder: Path) -> None:
    """What plain `from_pretrained` loads: config, generation_config, safetensors, tokenizer and chat template."""
    once: dict = {}  # tied weights stay one tensor
    weights = {k: once.setdefault(id(v), whole(v.detach())) for k, v in model.state_dict(keep_vars=True).items()}
    if RANK == 0:
        model.save_pretrained(folder, state_dict=weights)
        tokenizer.save_pretrained(folder)


def save_final(model, tokenizer, output: Path) -> None:
    """The final model, in the run's folder beside its other files; summary.json, written last, says that it is whole."""
    with written_whole(output / "final") as scratch:
        save_model(model, tokenizer, scratch)
        for path in list(scratch.glob("*")):
            with written_whole(output / path.name) as place:
                os.replace(path, place)
    if RANK == 0:
        (output / "final").rmdir()  # what is left of it


def load_weights(folder: Path, model):
    """A model like `model`, in fp32, on the CPU, with the weights that `save_model` wrote."""
    return type(model).from_pretrained(folder, config=model.config, dtype=torch.float32, use_safetensors=True)


def fingerprint(model, tokenizer, train: datasets.Dataset, args: Arguments) -> str:
    """A hash of everything that makes the SFT model: start weights and configuration, tokenizer, rows, arguments."""
    names = ("sft", "sft_learning_rate", "sft_batch_size", "sft_max_steps", "lr_scheduler_type", "warmup_steps",
             "max_grad_norm", "max_new_tokens", "micro_batch_size", "gradient_checkpointing", "bf16", "seed")
    backend = getattr(tokenizer, "backend_tokenizer", None)
    words = backend.to_str() if backend else tokenizer.get_vocab()
    used = [{name: getattr(args, name) for name in names}, words, tokenizer.chat_template, tokenizer.special_tokens_map,
            model.config.to_json_string(), model.generation_config.to_json_string()]
    sha = hashlib.sha256(json.dumps(used, sort_keys=True).encode())
    for name, tensor in model.state_dict().items():
        sha.update(name.encode() + tensor.cpu().reshape(-1).contiguous().view(torch.uint8).numpy().tobytes())
    for rows in train.iter(10_000):
        sha.update(json.dumps(rows).encode())
    return sha.hexdigest()[:20]


def cached_sft(model, tokenizer, train: datasets.Dataset, inputs: str, signals: list, args: Arguments):
    """The SFT model, and whether it was found in the cache; it is made and put there if not. The key is the fingerprint
    `inputs`, the text of this file, and the libraries' versions."""
    code = Path(__file__).read_bytes() + f"{inputs} {torch.__version__} {transformers.__version__}".encode()
    folder = Path(args.sft_cache_dir) / hashlib.sha256(code).hexdigest()[:20]
    if cached := all(collected([is_whole(folder)])):  # a damaged one is made anew
        model = load_weights(folder, model).to(model.device)
    else:
        supervised_finetune(shard(model, args), tokenizer, train, inputs, signals, args)
        with written_whole(folder, cache_owner(args)) as scratch:
            save_model(model, tokenizer, scratch)
            write_manifest(scratch, inputs)
        collected([])  # waits for the file
        model = load_weights(folder, model) if WORLD > 1 else model  # the sharded one, whole again
    for checkpoint in checkpoints(Path(args.output_dir), "sft-checkpoint"):
        remove(checkpoint)
    return model, cached


def cache_owner(args: Arguments) -> str:
    """What a run calls its scratch in the cache, where others may write the same model at the same time."""
    return "." + hashlib.sha256(os.path.abspath(args.output_dir).encode()).hexdigest()[:10]


class Loop(NamedTuple):
    """A loop that can be stopped and gone on with: SFT or OSP."""

    name: str  # of its checkpoints: sft-checkpoint or checkpoint
    steps: int
    model: torch.nn.Module
    tokenizer: transformers.PreTrainedTokenizerBase
    optimizer: torch.optim.Optimizer
    scheduler: torch.optim.lr_scheduler.LRScheduler
    inputs: str  # the fingerprint of what it started from
    signals: list  # those that came, see signals_noticed
    args: Arguments


@contextmanager
def signals_noticed(noticed: list) -> Iterator[None]:
    """Within it a first Ctrl-C or SIGTERM only enters the list, for `end_of_step` to see; a second quits at once."""

    def notice(number, _):
        if noticed:
            raise KeyboardInterrupt
        noticed.append(number)
        os.write(2, b"\nosp: saving a checkpoint after this step; once more quits at once\n")  # print must not nest

    before = {number: signal.signal(number, notice) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def end_of_step(loop: Loop, step: int) -> None:
    """Saves a checkpoint where one is due or a signal has come to any process, which then ends the run."""
    interrupted = any(collected([bool(loop.signals)]))
    if interrupted or step % loop.args.save_steps == 0 and step < loop.steps:
        save_checkpoint(loop, step)
    if interrupted:
        raise Stop(f"interrupted; {loop.name}-{step} is saved: the same command with --resume_from_checkpoint latest "
                   "goes on from there.", code=130)


def save_checkpoint(loop: Loop, step: int) -> None:
    """<name>-<step>, with all that an exact resume needs; sampling and data order are functions of (seed, step). The
    oldest ones beyond --save_total_limit go; of SFT's, which go in the end, no more than two are kept."""
    output = Path(loop.args.output_dir)
    with written_whole(output / f"{loop.name}-{step}") as scratch:
        save_model(loop.model, loop.tokenizer, scratch)
        state = {"step": step, "optimizer": whole(loop.optimizer.state_dict()), "scheduler": loop.scheduler.state_dict(),
                 "rng": torch.get_rng_state()}
        if RANK == 0:
            torch.save(state, scratch / "training_state.pt")
        write_json(scratch / "arguments.json", vars(loop.args))
        write_manifest(scratch, loop.inputs)
    limit = loop.args.save_total_limit or sys.maxsize
    for old in checkpoints(output, loop.name)[: -min(limit, 2 if loop.name == "sft-checkpoint" else limit)]:
        remove(old)


def load_checkpoint(folder: Path, loop: Loop) -> int:
    """Weights, optimiser, schedule and random state as they were; returns the steps done."""
    weights, own = load_weights(folder, loop.model).state_dict(), loop.model.state_dict()
    loop.model.load_state_dict({name: sharded_like(own[name], weights[name]) for name in own})
    state = torch.load(folder / "training_state.pt", map_location="cpu", weights_only=True)
    parameters = list(loop.model.parameters())
    for i, moments in state["optimizer"]["state"].items():
        moments |= {name: sharded_like(parameters[i], value) for name, value in moments.items()}
    loop.optimizer.load_state_dict(state["optimizer"])
    loop.scheduler.load_state_dict(state["scheduler"])
    torch.set_rng_state(state["rng"])
    return state["step"]


def write_manifest(folder: Path, inputs: str) -> None:
    """Notes what a folder started from and every file's hash: neither torch nor safetensors notices a flipped bit."""
    files = {str(path.relative_to(folder)): digest(path) for path in folder.rglob("*") if path.is_file()}
    write_json(folder / "manifest.json", {"inputs": inputs, "sha256": files})


def digest(path: Path) -> str:
    """The SHA-256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def is_whole(folder: Path) -> bool:
    """Whether every file of a folder is as `write_manifest` saw it."""
    with suppress(OSError, ValueError, KeyError, TypeError):
        files = json.loads((folder / "manifest.json").read_text())["sha256"]
        return all(digest(folder / name) == written for name, written in files.items())
    return False


def newest_whole(found: list[Path]) -> Path | None:
    """The last of these checkpoints that is not damaged."""
    return next(filter(is_whole, reversed(found)), None)


def checkpoints(folder: Path, *names: str) -> list[Path]:
    """The checkpoints that this program wrote into a folder, oldest first, those of SFT before those of OSP."""
    names, found = names or ("sft-checkpoint", "checkpoint"), []
    for path in folder.glob("*checkpoint-*/training_state.pt"):
        name, _, step = path.parent.name.rpartition("-")
        found += [(names.index(name), int(step), path.parent)] if name in names and step.isdigit() else []
    return [path for _, _, path in sorted(found)]


def find_checkpoint(args: Arguments) -> Path | None:
    """The folder that --resume_from_checkpoint means, whole and of the same arguments; None to start fresh."""
    if args.resume_from_checkpoint is None:
        return None
    found, latest = checkpoints(Path(args.output_dir)), args.resume_from_checkpoint == "latest"
    if latest and not found:
        print(f"No checkpoint in {args.output_dir}: starting fresh.")
        return None
    asked = found[-1] if latest else Path(args.resume_from_checkpoint)
    places = [path.resolve() for path in found]
    if asked.resolve() not in places:
        raise Stop(f"{str(asked)!r} is not a checkpoint of --output_dir {args.output_dir!r}, which has "
                   f"{', '.join(path.name for path in found) or 'none'}: give the path of one of these, or latest.")
    folder = newest_whole(found[: places.index(asked.resolve()) + 1])
    if folder is None:
        raise Stop(f"The checkpoint {str(asked)!r} is damaged, and no older one is whole: delete it to start anew.")
    if folder.resolve() != asked.resolve():
        if not latest:
            raise Stop(f"The checkpoint {str(asked)!r} is damaged: give {str(folder)!r}, the newest whole one before it.")
        print(f"The checkpoint {str(asked)!r} is damaged: going on from {str(folder)!r}.")
    free = ("output_dir", "overwrite_output_dir", "resume_from_checkpoint", "save_steps", "save_total_limit",
            "sft_cache_dir")
    then = json.loads((folder / "arguments.json").read_text())
    changed = [f"{k} was {then.get(k)!r}, is {v!r}" for k, v in vars(args).items() if k not in free and then.get(k) != v]
    if changed:
        raise Stop(f"{str(folder)!r} was written with other arguments ({'; '.join(changed)}): give the same, or another "
                   "--output_dir.")
    return folder


def check_output(args: Arguments, checkpoint: Path | None) -> Path:
    """The run's folder, made if need be. Raises Stop where it would overwrite a run unasked, or cannot be written."""
    output = Path(args.output_dir)
    held = output.is_dir() and any(output.iterdir())
    try:
        for folder in (output, Path(args.sft_cache_dir)):
            folder.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=folder):
                pass
    except OSError as error:
        raise Stop(f"Cannot write into {str(folder)!r} ({error.strerror}): give another folder.") from error
    resumes = checkpoint or args.resume_from_checkpoint and not (output / "summary.json").exists()
    if held and not (args.overwrite_output_dir or resumes):
        raise Stop(f"{args.output_dir!r} already holds a run: give another --output_dir, --overwrite_output_dir to replace "
                   "it, or --resume_from_checkpoint latest to go on with one that was interrupted.")
    return output


def clear_output(output: Path, checkpoint: Path | None, inputs: str, args: Arguments) -> None:
    """Removes what the run does again: all that came after the checkpoint, or without one the older run; and what
    killed runs had half written. Nothing goes that this program did not write. Raises Stop for another run's checkpoint."""
    if checkpoint and json.loads((checkpoint / "manifest.json").read_text())["inputs"] != inputs:
        raise Stop(f"{str(checkpoint)!r} was written with other data or another start model: start a new --output_dir.")
    found = checkpoints(output)
    kept = [path.resolve() for path in found].index(checkpoint.resolve()) + 1 if checkpoint else 0
    unfinished = [*output.glob(".*.partial"), *Path(args.sft_cache_dir).glob(f".*{cache_owner(args)}.*partial")]
    again = ["summary.json", "judge.jsonl", "curves.png", *([] if checkpoint else ["metrics.jsonl", "samples.md"])]
    for path in [*(output / name for name in again), *unfinished, *found[kept:]]:
        remove(path)


def keep_metrics(path: Path, steps: int) -> None:
    """Keeps the lines of the first `steps` steps: a resumed run does the others again, the last may be half a line."""
    lines = path.read_text().splitlines(keepends=True)[:steps] if path.exists() else []
    with written_whole(path) as scratch:
        scratch.write_text("".join(lines))


# ----------------------------------------------------------------------------------------------------------------------
# 12. The algorithm
# ----------------------------------------------------------------------------------------------------------------------
@contextmanager
def timed(seconds: dict[str, float], stage: str) -> Iterator[None]:
    """Adds the wall time of a block to seconds["seconds_" + stage]."""
    start = time.perf_counter()
    yield
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    seconds["seconds_" + stage] = seconds.get("seconds_" + stage, 0.0) + time.perf_counter() - start


def precision(model, args: Arguments):
    """Weights stay fp32, whose small updates bf16 would round away; with --bf16 the passes through them are in bf16."""
    return torch.autocast(model.device.type, torch.bfloat16, enabled=args.bf16)


Judged = collections.namedtuple("Judged", "prompts texts scores triples strength")  # of one step, for people to read


def train_step(policy, sft, tokenizer, optimizer, scheduler, data: Data, step: int,
               args: Arguments) -> tuple[dict, Judged]:
    """One step of the paper's Figure 2. Returns its line of metrics.jsonl, and what samples.md shows."""
    seconds: dict[str, float] = {}
    rows = step_indices(len(data.prompts), args.per_device_train_batch_size, step, args.seed)
    prompts, pad, size = [data.prompts[i] for i in rows], pad_token_id(tokenizer), args.micro_batch_size
    prompt_ids, both = encode_prompts(tokenizer, prompts), args.judge_both_orders
    with timed(seconds, "sample"):
        T, when = args.max_new_tokens, step if args.response_source == "policy" else 0
        noise = sampling_noise(args.seed, when, rows, range(args.num_generations), T + 2)  # two more: see their use
        responses = candidates(policy, sft, tokenizer, prompts, prompt_ids, noise[..., :T], data, args)
        texts = [decode(tokenizer, row) for row in responses]
    with timed(seconds, "rank"):
        asked: dict[tuple, float] = {}  # this step's questions and their answers: none is asked twice
        scores, construction = candidate_scores(sft, tokenizer, prompts, texts, noise[..., T], asked, args)
        triples, identical = pair_responses(scores, responses, construction)
    flat, stops = [ids for row in responses for ids in row], stop_token_ids(policy, tokenizer)
    metrics = {"step": step + 1, "pairs": len(triples), "dropped_identical_pairs": identical,
               "response_tokens": sum(map(len, flat)) / len(flat),
               "eos_rate": sum(ids[-1] in stops for ids in flat) / len(flat)}
    strength = torch.empty(0)
    if triples:
        chosen, rejected = [texts[i][j] for i, j, _ in triples], [texts[i][k] for i, _, k in triples]
        chosen_ids, rejected_ids = [responses[i][j] for i, j, _ in triples], [responses[i][k] for i, _, k in triples]
        prompt_rows = [prompt_ids[i] for i, _, _ in triples]
        with timed(seconds, "judge"):
            paired = [prompts[i] for i, _, _ in triples]
            p_12, p_21 = verdict_probabilities(sft, tokenizer, paired, chosen, rejected, asked, size, both)
            draws = torch.stack([noise[i, j, T + 1] for i, j, _ in triples])
            strength = training_labels(both_orders(p_12, p_21), draws, args).to(policy.device)
        with timed(seconds, "reference"), torch.no_grad():
            refs = response_logps(sft, prompt_rows * 2, chosen_ids + rejected_ids, pad, size).chunk(2)
        with timed(seconds, "update"):
            metrics |= {"learning_rate": scheduler.get_last_lr()[0]}
            metrics |= {"order_agreement": order_agreement(p_12, p_21)} if both else {}
            pairs = Pairs(prompt_rows, chosen_ids, rejected_ids, strength, *refs)
            metrics |= update(policy, optimizer, scheduler, pairs, args, pad, step)
    metrics |= seconds | {"tokens_per_second": sum(map(len, flat)) / sum(seconds.values())}
    return metrics, Judged(prompts, texts, scores, triples, strength.tolist())


def main(argv: list[str] | None = None) -> dict:
    """Runs OSP with the command line's arguments; returns the figures of summary.json."""
    started = time.perf_counter()
    transformers.utils.logging.disable_progress_bar()  # its bars for reading and writing weights
    device = start_process()
    args = parse_arguments(argv)
    checkpoint = find_checkpoint(args)
    output = check_output(args, checkpoint)

    sft, tokenizer = load_model(args.model_name_or_path, args)
    other_judge = load_model(args.eval_judge_name_or_path, args) if args.eval_judge_name_or_path else None
    verdict_format(tokenizer)  # raises Stop for a tokenizer that has no verdicts
    sft.to("cpu" if WORLD > 1 else device)  # one that will be sharded may not fit a device whole
    if other_judge:
        verdict_format(other_judge[1])
        other_judge[0].to(device)
    data = load_data(tokenizer, sft, other_judge, args)
    seconds, cached, inputs = {}, False, fingerprint(sft, tokenizer, data.train, args)
    collected([])  # waits: none may write before the others have looked at what is there, nor look before that is done
    clear_output(output, checkpoint, inputs, args)
    collected([])
    write_json(output / "arguments.json", vars(args))

    if args.gradient_checkpointing:
        sft.activation_checkpointing_enable()
    signals: list = []
    with signals_noticed(signals), timed(seconds, "sft"):
        if args.sft and "chosen" in data.train.column_names:
            sft, cached = cached_sft(sft, tokenizer, data.train, inputs, signals, args)
    policy = copy.deepcopy(sft)  # pi_theta starts as pi_SFT
    sft = bf16_copy(sft) if args.bf16 else sft.requires_grad_(False)  # pi_SFT: judge and reference in one
    policy, sft = shard(policy, args), shard(sft, args)  # alone: nothing
    if args.gradient_checkpointing:
        policy.activation_checkpointing_enable()
    steps = args.num_train_epochs * math.ceil(len(data.prompts) / args.per_device_train_batch_size)
    steps = steps if args.max_steps < 0 else min(steps, args.max_steps)
    optimizer, scheduler = optimizer_and_schedule(policy, args.learning_rate, steps, args)
    loop = Loop("checkpoint", steps, policy, tokenizer, optimizer, scheduler, inputs, signals, args)
    done = load_checkpoint(checkpoint, loop) if checkpoint and checkpoint.name.startswith(loop.name) else 0
    keep_metrics(output / "metrics.jsonl", done)
    judge, shown_steps = other_judge or (sft, tokenizer), {0, steps // 2, steps - 1}
    known: dict[int, list[Ids]] = {}
    measure = lambda rows: evaluate(policy, sft, tokenizer, data, rows, known, judge, args)

    with signals_noticed(signals), timed(seconds, "osp"):
        for step in (bar := tqdm(range(done, steps), initial=done, total=steps, desc="OSP", disable=RANK > 0)):
            metrics, judged = train_step(policy, sft, tokenizer, optimizer, scheduler, data, step, args)
            if (step + 1) % args.eval_steps == 0 or step + 1 == steps:
                with timed(metrics, "evaluate"):
                    summary, samples = measure(data.held_out)
                metrics |= {f"eval_{key}": value for key, value in summary.items()}
            if step in shown_steps:
                write_samples(output / "samples.md", step + 1, judged)
            log_step(output / "metrics.jsonl", metrics, bar)
            end_of_step(loop, step + 1)
    save_final(policy, tokenizer, output)

    if done == steps:  # nothing was left to do
        summary, samples = measure(data.held_out)
    if data.ood:
        summary |= {f"ood_{k}": v for k, v in measure(data.ood)[0].items()}
    figures, judged_rows = judge_report(policy, sft, tokenizer, data, samples, args)
    summary |= figures | run_figures(output, judged_rows)
    summary |= {"prompts": len(data.prompts), "seed": args.seed, "sft_cached": cached, **seconds,
                "seconds_total": time.perf_counter() - started}
    write_json(output / "summary.json", summary)
    print_report(summary, samples, output)
    return summary


def run_figures(output: Path, judged: list[dict]) -> dict:
    """Writes judge.jsonl and draws curves.png; returns what the lines of metrics.jsonl add to the summary."""
    with written_whole(output / "judge.jsonl") as scratch:
        scratch.write_text("".join(json.dumps(row) + "\n" for row in judged))
    lines = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    draw_curves(lines, output / "curves.png")
    updates = [line for line in lines if line["pairs"]]
    return {k: updates[-1][k] for k in ("margin", "margin_accuracy") if updates} | {
        "steps": len(updates), "tokens_per_second": sum(line["tokens_per_second"] for line in lines) / max(1, len(lines))}


def log_step(path: Path, metrics: dict, bar: tqdm) -> None:
    """One line of metrics.jsonl, and the figures that matter on the progress bar."""
    if RANK > 0:
        return
    try:
        with path.open("a") as file:
            file.write(json.dumps(metrics, allow_nan=False) + "\n")
    except OSError as error:
        raise cannot_write(path, error) from error
    if metrics["pairs"] == 0:
        bar.write(f"step {metrics['step']}: the two responses of every pair were identical, so there was no update")
    else:
        figures = "loss {loss:.3f}, strength {strength_mean:.2f}, margin {margin:.2f}, KL {kl:.2f}"
        bar.set_postfix_str(figures.format(**metrics))


def write_samples(path: Path, step: int, judged: Judged) -> None:
    """Adds a step's first three prompts to samples.md: the K responses by rank, the pairs, the strengths. Sections of this
    and later steps, from before a resume, go."""
    title, *sections = (path.read_text("utf-8") if path.exists() else "# Samples\n").split("\n## Step ")
    sections = [section for section in sections if int(section.split()[0]) < step] + [f"{step}\n"]
    for i, prompt in enumerate(judged.prompts[:3]):
        scores, of = judged.scores[i], [(j, k, p) for (b, j, k), p in zip(judged.triples, judged.strength) if b == i]
        sections[-1] += f"\n{quoted(transcript(prompt))}\n\n| rank | score | response |\n|---|---|---|\n"
        order = sorted(range(len(scores)), key=lambda k: -scores[k])
        cell = lambda text: " ".join(text.replace("|", "\\|").split())
        sections[-1] += "".join(f"| {r} | {scores[k]:.3f} | {cell(judged.texts[i][k])} |\n" for r, k in enumerate(order, 1))
        sections[-1] += "\nPairs, by rank, and p as the loss has it: " + "; ".join(
            f"{order.index(j) + 1} over {order.index(k) + 1}, {p:.3f}" for j, k, p in of) + "\n"
    with written_whole(path) as scratch:
        scratch.write_text("\n## Step ".join([title, *sections]), "utf-8")


def draw_curves(lines: list[dict], path: Path) -> None:
    """The lines of metrics.jsonl -> curves.png: win rate, KL, strength and margin, length, over steps."""
    import matplotlib.figure  # here, since it takes a second to load

    judged = "self-judged " if any(line.get("eval_self_judged") for line in lines) else ""
    start = {"eval_win_rate_vs_sft": 0.5, "eval_kl": 0.0}  # of pi_SFT itself
    panels = [(judged + "win rate against SFT", {"eval_win_rate_vs_sft": "held-out"}),
              ("KL from SFT, nats", {"kl": "paired responses", "eval_kl": "held-out"}),
              ("strength and margin", {"strength_mean": "strength p", "margin": "margin h"}),
              ("response length, tokens", {"response_tokens": "sampled", "eval_response_tokens": "held-out"})]
    figure = matplotlib.figure.Figure(figsize=(9, 6), layout="constrained")
    for axes, (title, keys) in zip(figure.subplots(2, 2).flat, panels):
        for key, label in keys.items():
            points = [(0, start[key])] if key in start else []
            points += [(line["step"], line[key]) for line in lines if key in line]
            marker = "o" if key.startswith("eval_") else None
            axes.plot([x for x, _ in points], [y for _, y in points], label=label, marker=marker, markersize=4)
        axes.set(title=title, xlabel="step")
        axes.legend(frameon=False)
        axes.grid(alpha=0.3)
    with written_whole(path) as scratch:
        figure.savefig(scratch, format="png", dpi=110)


REPORT = [  # name, of SFT, of OSP: a key of the summary, a number, or nothing
    ("gold reward", "gold_reward_sft", "gold_reward"), ("win rate against SFT", 0.5, "win_rate_vs_sft"),
    ("  its standard error", None, "win_rate_vs_sft_se"), ("  out of domain", 0.5, "ood_win_rate_vs_sft"),
    ("KL from SFT, nats", 0.0, "kl"), ("response length, tokens", "response_tokens_sft", "response_tokens"),
    ("distinct responses", "distinct_fraction_sft", "distinct_fraction"), ("judge accuracy", "judge_accuracy", None),
    ("judge calibration error", "judge_calibration_error", None), ("judge calibration error (ECE)", "judge_ece", None)]


def print_report(summary: dict, samples: list[tuple], output: Path) -> None:
    """SFT against OSP in a table, and three held-out prompts with a response before and after."""
    print(f"\n{'':42}{'SFT':>9}{'OSP':>9}" + ("    (win rates are self-judged)" if summary.get("self_judged") else ""))
    for name, *keys in REPORT:
        if all(key in summary for key in keys if isinstance(key, str)):
            values = [summary[key] if isinstance(key, str) else key for key in keys]
            print(f"{name:42}" + "".join(f"{'' if value is None else format(value, '.3f'):>9}" for value in values))
    for prompt, before, after in samples[:3]:
        print(f"\n{transcript(prompt)}\n  SFT: {before}\n  OSP: {after}")
    sft = f"{summary['seconds_sft']:.0f} s SFT" + " (cached)" * summary["sft_cached"]
    print(f"\n{sft}, {summary['seconds_osp']:.0f} s OSP, {summary['seconds_total']:.0f} s in all. The model, metrics.jsonl, "
          f"summary.json, curves.png and samples.md are in {output}")


# ----------------------------------------------------------------------------------------------------------------------
# 13. The built-in task: a miniature of HH in which the truth is known
# ----------------------------------------------------------------------------------------------------------------------
TOPICS = "rain snow tea bread music chess honey poetry coffee jazz soup football".split()
VERBS = "is seems feels sounds".split()
KIND = "gentle lovely warm sweet bright calm splendid charming".split()
RUDE = "awful stupid ugly nasty boring useless rotten dreadful".split()
PEOPLE = "friend sister brother mother father teacher neighbour boss".split()
TIMES = "tonight today tomorrow now soon later".split()
PHRASINGS = [
    "tell my {person} about {topic} {time}", "{time} my {person} asks about {topic}", "my {person} likes {topic} {time}",
    "describe {topic} to my {person} {time}", "please tell me about {topic} {time} says my {person}",
    "what is {topic} like {time} asks my {person}", "{time} write to my {person} about {topic}",
    "say something about {topic} to my {person} {time}"]
OOD_PHRASINGS = [
    "about {topic} please tell my {person} something {time}", "{time} describe to my {person} what {topic} is like"]


def gold_reward(prompt: str, response: str) -> float:
    """The truth: each clause gains or loses 1/2 for the prompt's own topic (helpful) and 1/4 for its tone (harmless).

    "Human: tell my boss about rain now", "rain is gentle . snow is ugly ." -> 0.75 - 0.75 = 0. Only well-formed clauses
    count, the first three, and one said twice counts once: else length or repetition would be the reward."""
    topic = next(word for word in prompt.split() if word in TOPICS)
    clauses = [tuple(clause.split()) for clause in response.split(".")[:-1]]
    words = TOPICS, VERBS, KIND + RUDE
    formed = [c for c in dict.fromkeys(clauses) if len(c) == 3 and all(word in known for word, known in zip(c, words))]
    return sum(((0.5 if c[0] == topic else -0.5) + (0.25 if c[2] in KIND else -0.25) for c in formed[:3]), 0.0)


def true_strength(prompt: str, response_1: str, response_2: str) -> float:
    """The probability with which a human of this world prefers response 1."""
    return 1 / (1 + math.exp(-4 * (gold_reward(prompt, response_1) - gold_reward(prompt, response_2))))


def builtin_prompts(split: str) -> list[str]:
    """A split's prompts in HH's format. The out-of-domain ones have their own phrasings and pairs of topic and person."""
    new = split == "ood"
    combinations = [(t, p) for i, t in enumerate(TOPICS) for j, p in enumerate(PEOPLE) if ((i + j) % 4 == 0) == new]
    texts = [f"\n\nHuman: {phrasing.format(topic=t, person=p, time=time)}\n\nAssistant:"
             for t, p in combinations for time in TIMES for phrasing in (OOD_PHRASINGS if new else PHRASINGS)]
    random.Random(0).shuffle(texts)
    return {"train": texts[512:], "test": texts[:512], "ood": texts}[split]


def builtin_pair(rng: random.Random, prompt: str) -> tuple[str, str]:
    """(chosen, rejected), labelled by Bernoulli(true_strength). A third differ in helpfulness alone and a third in
    harmlessness alone, as HH's two halves do; the others are independent. One clause in ten repeats the one before it:
    without that no judge could learn that repetition earns nothing."""
    topic = next(word for word in prompt.split() if word in TOPICS)
    others = [word for word in TOPICS if word != topic]

    def written(kinds: list[list[bool]]) -> str:
        clauses = []
        for helpful, harmless in kinds:
            subject, adjective = topic if helpful else rng.choice(others), rng.choice(KIND if harmless else RUDE)
            fresh = f"{subject} {rng.choice(VERBS)} {adjective} ."
            clauses.append(clauses[-1] if clauses and rng.random() < 0.1 else fresh)
        return " ".join(clauses)

    one, two = ([[rng.random() < 0.5, rng.random() < 0.5] for _ in range(rng.randint(1, 3))] for _ in range(2))
    if (aspect := rng.choice([0, 1, None])) is not None:  # helpfulness, harmlessness, both
        two = [list(kinds) for kinds in one]
        two[rng.randrange(len(two))][aspect] ^= True
    a, b = written(one), written(two)
    return (a, b) if rng.random() < true_strength(prompt, a, b) else (b, a)


def builtin_preferences() -> datasets.DatasetDict:
    """HH transcripts: 8,000 pairs to train on, one pair for each held-out ("test") and out-of-domain ("ood") prompt."""
    splits = {}
    for split in ("train", "test", "ood"):
        rng, prompts = random.Random(split), builtin_prompts(split)
        prompts = rng.choices(prompts, k=8000) if split == "train" else prompts
        pairs = [(prompt, *builtin_pair(rng, prompt)) for prompt in prompts]
        rows = [{"chosen": f"{prompt} {a}", "rejected": f"{prompt} {b}"} for prompt, a, b in pairs]
        splits[split] = datasets.Dataset.from_list(rows)
    return datasets.DatasetDict(splits)


def builtin_model(seed: int):
    """A random Llama of 130,000 parameters, and a word-level tokenizer for this world's words and the judge's."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    phrases = [phrasing.format(topic="", person="", time="") for phrasing in PHRASINGS + OOD_PHRASINGS]
    frame = JUDGE_FRAME.format(prompt="> Human: Assistant:", a="> A", b="> B .")
    words = sorted({*frame.split(), *" ".join(phrases).split(), *TOPICS, *VERBS, *KIND, *RUDE, *PEOPLE, *TIMES})
    vocabulary = {word: i for i, word in enumerate(["<pad>", "<eos>", "<unk>", *words])}
    inner = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=inner, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>")
    config = transformers.LlamaConfig(
        vocab_size=len(vocabulary), hidden_size=64, intermediate_size=128, num_hidden_layers=3, num_attention_heads=4,
        initializer_range=0.06, max_position_embeddings=256, tie_word_embeddings=True,
        pad_token_id=0, eos_token_id=1, bos_token_id=None)
    torch.manual_seed(seed)
    return transformers.LlamaForCausalLM(config), tokenizer


# ----------------------------------------------------------------------------------------------------------------------
# 14. The formats of preference data
# ----------------------------------------------------------------------------------------------------------------------
Parsed = tuple[Prompt, str | None, str | None] | str  # prompt, chosen, rejected; or why the row cannot be used


@functools.lru_cache(maxsize=2)
def read_dataset(name: str | None, config: str | None, data_dir: str | None) -> datasets.DatasetDict:
    """The raw splits, by whichever loader of `datasets` fits the name. Raises Stop."""
    if name is None:
        return builtin_preferences()
    path, kinds = Path(name), {".json": "json", ".jsonl": "json", ".parquet": "parquet"}
    kind = next((kinds[s] for s in path.suffixes if s in kinds), None)
    try:
        if (path / "dataset_dict.json").is_file() or (path / "state.json").is_file():
            data = datasets.load_from_disk(name)
        elif kind and not path.is_dir():
            data = datasets.load_dataset(kind, data_files=name)
        else:
            data = datasets.load_dataset(name, config, data_dir=data_dir)
    except Exception as error:  # the loaders raise a dozen kinds; each is the user's to mend
        raise Stop(f"Cannot read the data set {name!r} ({first_line(error)}): give a Hub name, which needs the network, "
                   "a .json, .jsonl, .jsonl.gz or .parquet file, or a folder.") from error
    return data if isinstance(data, datasets.DatasetDict) else datasets.DatasetDict(train=data)


def row_format(rows: datasets.Dataset, name: str | None) -> tuple[Callable[[dict], Parsed], datasets.Features]:
    """The parser for rows with these columns, and the columns that it makes."""
    text, columns = datasets.Value("string"), set(rows.column_names)
    if {"info", "summaries", "choice"} <= columns:
        parse = parse_tldr
    elif {"chosen", "rejected"} <= columns:
        parse = parse_pair
    elif "prompt" in columns:
        parse = parse_prompt
    else:
        raise Stop(f"The columns {sorted(columns)} of {name!r} fit no known format: give chosen and rejected (and "
                   "prompt), prompt alone, or TL;DR's info, summaries and choice.")
    shown = [column for column in ("prompt", "chosen") if column in columns and parse is not parse_tldr]
    is_text = all(isinstance(rows.features[column], datasets.Value) for column in shown)
    features = {"prompt": text if is_text else datasets.List({"role": text, "content": text})}
    responses = {} if parse is parse_prompt else {"chosen": text, "rejected": text}
    return parse, datasets.Features(features | responses)


def parse_batch(parse: Callable[[dict], Parsed], dropped: collections.Counter, features: dict, batch: dict) -> dict:
    """A batch of raw rows -> the usable ones under the keys of `features`; the others are counted by reason in `dropped`."""
    out, is_text = {key: [] for key in features}, isinstance(features["prompt"], datasets.Value)
    for row in (dict(zip(batch, values)) for values in zip(*batch.values())):
        try:
            parsed = checked(parse(row), is_text)
        except (KeyError, TypeError, AttributeError, IndexError):
            parsed = "not in the format of the data's columns"
        if isinstance(parsed, str):
            dropped[parsed] += 1
        else:
            for key, value in zip(features, parsed):
                out[key].append(value)
    return out


def checked(parsed: Parsed, is_text: bool) -> Parsed:
    """A parsed row, its responses stripped, its prompt text or messages as asked; or why it must not be trained on."""
    if isinstance(parsed, str):
        return parsed
    prompt, *responses = parsed
    if not prompt or isinstance(prompt, str) and not prompt.strip():
        return "no prompt"
    if not is_text:
        prompt = [{"role": m["role"], "content": m["content"]} for m in as_messages(prompt)]
        if prompt[-1]["role"] != "user" or not all(isinstance(text, str) for m in prompt for text in m.values()):
            return "the prompt does not end with a user's message"
    elif not isinstance(prompt, str):
        return "the prompt is not text"
    if responses == [None, None]:
        return prompt, None, None
    if not all(isinstance(r, str) and r.strip() for r in responses):
        return "an empty response"
    if any(HH_TURN.search(r) for r in responses):
        return "a role marker inside a response"
    chosen, rejected = (r.strip() for r in responses)
    return (prompt, chosen, rejected) if chosen != rejected else "identical responses"


def parse_prompt(row: dict) -> Parsed:
    """{"prompt": text or messages}"""
    return row["prompt"], None, None


def parse_tldr(row: dict) -> Parsed:
    """{"info": {"post", "title", "subreddit"}, "summaries": [{"text"}, {"text"}], "choice"}; CNN/DM rows have no post."""
    info, texts = row["info"] or {}, [s["text"] for s in row["summaries"] or []]
    if not info.get("post"):
        return "not a TL;DR post"
    if row["choice"] not in (0, 1) or len(texts) != 2:
        return "no choice between two summaries"
    prompt = f"SUBREDDIT: r/{info.get('subreddit')}\nTITLE: {info.get('title')}\nPOST: {info['post'].strip()}\nTL;DR:"
    return prompt, texts[row["choice"]], texts[1 - row["choice"]]


def parse_pair(row: dict) -> Parsed:
    """HH's transcripts, UltraFeedback's rows, TRL's standard and conversational ones, the prompt given or implicit."""
    prompt, chosen, rejected = row.get("prompt"), row["chosen"], row["rejected"]
    if isinstance(chosen, list) and isinstance(rejected, list):
        shared = os.path.commonprefix([chosen[:-1], rejected[:-1]])
        answers = [*chosen[len(shared):], *rejected[len(shared):]]
        if len(answers) != 2 or any(m["role"] != "assistant" for m in answers):
            return "the responses are not one assistant's message each"
        prompt = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt or []
        if shared[: len(prompt)] != prompt:  # the responses repeat the prompt from its start, or its end, or not at all
            shared = prompt + shared[len(shared) if prompt[len(prompt) - len(shared):] == shared else 0:]
        return shared, answers[0]["content"], answers[1]["content"]
    if not (isinstance(chosen, str) and isinstance(rejected, str)):
        return "an empty response"
    if prompt is not None:
        return prompt, chosen, rejected
    shared = os.path.commonprefix([chosen, rejected])
    if HH_TURN.search(chosen):  # HH: a transcript each; the prompt ends at the LAST marker that both share
        cut = shared.rfind("\n\nAssistant:") + len("\n\nAssistant:") if "\n\nAssistant:" in shared else 0
    else:  # TRL's implicit prompt: it ends at the last space that both share
        cut = shared.rfind(" ") + 1
    return shared[:cut].rstrip(), chosen[cut:], rejected[cut:]


# ----------------------------------------------------------------------------------------------------------------------
# 15. Several processes: each does a share of the passes, and keeps a share of the training state (torch's FSDP2)
# ----------------------------------------------------------------------------------------------------------------------
# Under torchrun all processes run this same program on the same data. What they compute for each other is exchanged at
# once, so that all know all responses, verdicts and pairs, and take the same decisions.
RANK, WORLD = (int(os.environ[key]) for key in ("RANK", "WORLD_SIZE")) if dist.is_torchelastic_launched() else (0, 1)


def start_process() -> str:
    """Joins the processes that torchrun started, if it did, of which the first alone prints; returns the device."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if WORLD > 1 and not dist.is_initialized():
        dist.init_process_group("cpu:gloo,cuda:nccl" if device == "cuda" else "gloo")
        if device == "cuda":
            if int(os.environ["LOCAL_RANK"]) >= (gpus := torch.cuda.device_count()):
                raise Stop(f"There are more processes than GPUs here ({gpus}): give torchrun a smaller --nproc_per_node.")
            torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    if RANK > 0:
        sys.stdout = open(os.devnull, "w")
        datasets.disable_progress_bars()
        transformers.utils.logging.set_verbosity_error()
    return device


def first_to_stop() -> bool:
    """Whether no other process has said its last sentence: where all raise the same Stop, one says it."""
    return not dist.is_initialized() or dist.distributed_c10d._get_default_store().add("stopped", 1) == 1


def collected(share: list) -> list:
    """Items 0, N, 2N ... of process 0, items 1, N + 1 ... of process 1, and so on -> all items, in every process."""
    if WORLD == 1:
        return share
    shares = [None] * WORLD
    dist.all_gather_object(shares, share)
    return [item for items in itertools.zip_longest(*shares) for item in items if item is not None]


def own_chunks(items: Sequence, size: int) -> list[tuple[Sequence, float]]:
    """The chunks, of at most `size` items, that this process works on, and the weights of their losses; alone: all, 1.

    FSDP averages gradients over the processes where the loss wants their sum, hence the weight N. Sharded passes are done
    together: a process with fewer chunks than another repeats one with weight 0."""
    parts = list(chunks(items, max(1, min(size, math.ceil(len(items) / WORLD)))))
    turns = range(RANK, math.ceil(len(parts) / WORLD) * WORLD, WORLD)
    return [(parts[i % len(parts)], float(WORLD * (i < len(parts)))) for i in turns]


def divided(model, work: Callable[[Sequence], object], items: Sequence, size: int) -> list:
    """What work(chunk), which may use `model` without gradients, gives for each chunk of at most `size` items: every
    process does its share of the chunks, and all get all results."""
    with gathered(model):
        return collected([work(chunk) for chunk, weight in own_chunks(items, size) if weight])


def shard(model, args: Arguments):
    """Divides a model's weights, and with them gradients and optimiser, over the processes, in place; alone: nothing.

    An update gathers them a layer at a time, in bf16 with --bf16, and sums the gradients in fp32; see also `gathered`."""
    if WORLD == 1:
        return model
    mixed = MixedPrecisionPolicy(torch.bfloat16, torch.float32) if args.bf16 else MixedPrecisionPolicy()
    lists = [module for module in model.modules() if isinstance(module, torch.nn.ModuleList)]
    layers = max(lists, key=lambda module: sum(p.numel() for p in module.parameters()), default=[])
    for module in [*layers, model]:
        fully_shard(module, mp_policy=mixed)
    return model


@contextmanager
def gathered(model) -> Iterator[None]:
    """Within it a sharded model is whole in every process, with --bf16 in bf16: its weights are gathered once, not once
    a token, and each process may make as many passes as it likes."""
    units = [module for module in model.modules() if isinstance(module, FSDPModule)] if WORLD > 1 else []
    for unit in units:
        unit.unshard()
        unit.set_reshard_after_forward(False, recurse=False)
    yield
    for unit in units:
        unit.set_reshard_after_forward(True, recurse=False)
        unit.reshard()


def whole(value):
    """Sharded tensors, alone or in dictionaries, as ordinary ones on the CPU; all else as it is. All must call it."""
    if isinstance(value, dict):
        return {key: whole(item) for key, item in value.items()}
    return value.full_tensor().cpu() if isinstance(value, DTensor) else value


def sharded_like(own: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    """The inverse of `whole`: this process's part of `value` where `own` is sharded, and of the same shape."""
    if not isinstance(own, DTensor) or own.shape != value.shape:
        return value
    return distribute_tensor(value.to(own.device), own.device_mesh, own.placements, src_data_rank=None)


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # what a cluster sends is a Ctrl-C too
    try:
        main()
        if WORLD > 1:
            dist.destroy_process_group()
    except Stop as stop:
        if first_to_stop():
            print(f"osp: {stop}", file=sys.stderr)
        sys.exit(stop.code)
    except KeyboardInterrupt:
        if first_to_stop():
            print("osp: interrupted; --resume_from_checkpoint latest goes on from the last checkpoint.", file=sys.stderr)
        sys.exit(130)
