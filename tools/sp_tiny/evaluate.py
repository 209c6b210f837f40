"""Exact match of a saved sp-tiny on the generated tasks, and its loss on held-out text."""

from __future__ import annotations

import argparse
import multiprocessing
from collections.abc import Iterator
from functools import lru_cache, partial
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
import torch.nn.functional as F

from shareprefill.calib.tasks import TASKS, generate
from shareprefill.tokens import encode

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_WINDOWS = 16


@lru_cache(maxsize=1)
def _load_tokenizer(data: Path) -> PreTrainedTokenizerBase:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(data)


def encode_question(data: Path, question: tuple[str, int, int]) -> tuple[str, list[int], int]:
    """Task, token ids of prompt and answer, and the number of answer tokens of a question."""
    task, length, seed = question
    tokenizer = _load_tokenizer(data)
    answer_room = 48
    example = generate(task, tokenizer, length - answer_room, seed)
    prompt = encode(tokenizer, example.prompt).tolist()
    answer = tokenizer(example.answer, add_special_tokens=False).input_ids
    assert len(answer) <= answer_room
    return task, prompt + answer, len(answer)


@torch.no_grad()
def answered(model: torch.nn.Module, ids: list[int], answer: int) -> bool:
    """Whether greedy decoding writes the last `answer` tokens of `ids` behind the others.

    One forward pass tells: the decoder follows the right answer for as long as every argmax
    agrees with it.
    """
    inputs = torch.tensor([ids[:-1]], device=model.device)
    logits = model(input_ids=inputs, use_cache=False, logits_to_keep=answer).logits[0]
    return logits.argmax(-1).tolist() == ids[-answer:]


@torch.no_grad()
def text_loss(model: torch.nn.Module, stream: np.ndarray, length: int) -> float:
    """Mean loss in nats over windows of `length` tokens, evenly spread over `stream`."""
    total = 0.0
    for start in np.linspace(0, len(stream) - length - 1, _WINDOWS).astype(int):
        ids = torch.from_numpy(stream[start : start + length + 1].astype(np.int64))
        ids = ids.to(model.device)
        logits = model(input_ids=ids[None, :-1], use_cache=False).logits[0]
        total += F.cross_entropy(logits.float(), ids[1:]).item()
    return total / _WINDOWS


def evaluate(args: argparse.Namespace) -> Iterator[tuple[int, dict[str, object]]]:
    """Yields each length with the right answers and questions of every task, and the text loss."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(args.out, dtype=torch.bfloat16).to(args.device)
    stream = np.memmap(args.data / "val.bin", dtype=np.uint16, mode="r")
    with multiprocessing.get_context("spawn").Pool(args.workers) as pool:
        for length in args.eval_lengths:
            questions = [(task, length, seed) for task in TASKS for seed in range(args.questions)]
            right = dict.fromkeys(TASKS, 0)
            for task, ids, answer in pool.imap(
                partial(encode_question, args.data), questions, chunksize=4
            ):
                right[task] += answered(model, ids, answer)
            results: dict[str, object] = {
                task: {"right": right[task], "questions": args.questions} for task in TASKS
            }
            results["text_loss"] = round(text_loss(model, stream, length), 4)
            yield length, results
