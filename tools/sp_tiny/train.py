"""Trains sp-tiny on one GPU, saves it in bfloat16 and measures what was saved."""

from __future__ import annotations

import argparse
import itertools
import json
import logging
import multiprocessing
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

from tools.sp_tiny.data import ANSWER, CONTEXT, SHORTEST, TEXT, produce
from tools.sp_tiny.evaluate import evaluate
from tools.sp_tiny.tokenizer import BOS, EOS, MAX_LENGTH, PAD, VOCAB_SIZE

_LOGGER = logging.getLogger("sp_tiny")
_ANSWER_WEIGHT = 4.0
_WARMUP_STEPS = 200
_UNTIMED_STEPS = 3  # the first compilation is no part of the schedule
_QUEUE_BATCHES = 24
_LOG_EVERY = 100


def parse_schedule(text: str) -> list[tuple[float, int]]:
    """Parses `share:length,...` into (share of the time from which it holds, length)."""
    stages = [
        (float(share), int(length))
        for share, length in (stage.split(":") for stage in text.split(","))
    ]
    if min(length for _, length in stages) < SHORTEST:
        raise argparse.ArgumentTypeError(f"lengths must be at least {SHORTEST}; got {text!r}")
    if stages[0][0] != 0 or stages != sorted(stages):
        raise argparse.ArgumentTypeError(f"shares must start at 0 and rise; got {text!r}")
    return stages


def build_model() -> torch.nn.Module:
    """An untrained sp-tiny in float32."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=VOCAB_SIZE,
        hidden_size=320,
        intermediate_size=800,
        num_hidden_layers=6,
        num_attention_heads=8,
        num_key_value_heads=4,
        head_dim=64,
        max_position_embeddings=MAX_LENGTH,
        rope_parameters={"rope_theta": 500000.0, "rope_type": "default"},
        rms_norm_eps=1e-6,
        tie_word_embeddings=True,
        bos_token_id=BOS,
        eos_token_id=EOS,
        pad_token_id=PAD,
        attn_implementation="sdpa",
    )
    return LlamaForCausalLM(config)


def build_optimizer(model: torch.nn.Module, device: str) -> torch.optim.AdamW:
    """AdamW that decays matrices only; the training loop sets the learning rate."""
    matrices = [p for p in model.parameters() if p.ndim > 1]
    vectors = [p for p in model.parameters() if p.ndim <= 1]
    groups = [
        {"params": matrices, "weight_decay": 0.1},
        {"params": vectors, "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=0.0, betas=(0.9, 0.95), fused=device == "cuda")


def learning_rate(peak: float, step: int, done: float) -> float:
    """Linear warm-up, constant until half of the time is `done`, then linear to 2 % of the peak."""
    decay = 1.0 if done < 0.5 else max(0.02, 2 * (1 - done))
    return peak * min(1.0, (step + 1) / _WARMUP_STEPS) * decay


def losses(
    model: torch.nn.Module, ids: torch.Tensor, kinds: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Cross entropy of the learned tokens and their kinds.

    Args:
        ids: Token ids `[B, N + 1]` int64.
        kinds: Kinds of the tokens `[B, N + 1]` uint8.

    Returns:
        Losses `[M]` float32 in nats and kinds `[M]` uint8 of the M tokens that are learned.
    """
    with torch.autocast(ids.device.type, torch.bfloat16):
        hidden = model.model(input_ids=ids[:, :-1], use_cache=False).last_hidden_state
        learned = kinds[:, 1:] != CONTEXT  # [B, N]
        logits = model.lm_head(hidden[learned])  # [M, V]: only where there is a loss
    targets = ids[:, 1:][learned]
    return F.cross_entropy(logits.float(), targets, reduction="none"), kinds[:, 1:][learned]


@contextmanager
def batches(args: argparse.Namespace) -> Iterator[tuple]:
    """Starts the data workers; yields their queue and the length that they read."""
    context = multiprocessing.get_context("spawn")
    length = context.Value("i", args.lengths[0][1])
    queue = context.Queue(maxsize=_QUEUE_BATCHES)
    workers = [
        context.Process(
            target=produce,
            args=(queue, length, args.data, args.seed * 1000 + index, args.batch_tokens),
            daemon=True,
        )
        for index in range(args.workers)
    ]
    for worker in workers:
        worker.start()
    try:
        yield queue, length
    finally:
        for worker in workers:
            worker.terminate()
        for worker in workers:
            worker.join()


def next_batch(queue, length: int, device: str) -> tuple[torch.Tensor, torch.Tensor]:
    """The next batch of `length`; those made before the length changed are dropped."""
    while True:
        # A worker that died leaves the queue empty: the timeout ends the run.
        made_for, ids, kinds = queue.get(timeout=120)
        if made_for == length:
            ids = torch.from_numpy(ids.astype(np.int64)).to(device)
            return ids, torch.from_numpy(kinds).to(device)


def train(model: torch.nn.Module, args: argparse.Namespace) -> dict[str, float]:
    """Trains for `args.seconds`; returns steps, tokens and seconds."""
    optimizer = build_optimizer(model, args.device)
    started = None
    tokens = done = 0
    with batches(args) as (queue, shared_length):
        for step in itertools.count():
            if step == _UNTIMED_STEPS:
                started = time.monotonic()
            elapsed = 0.0 if started is None else time.monotonic() - started
            done = elapsed / args.seconds
            if done >= 1:
                break
            length = [length for share, length in args.lengths if done >= share][-1]
            shared_length.value = length
            ids, kinds = next_batch(queue, length, args.device)
            rate = learning_rate(args.rate, step, done)
            for group in optimizer.param_groups:
                group["lr"] = rate
            loss, kind = losses(model, ids, kinds)
            weight = torch.where(kind == ANSWER, _ANSWER_WEIGHT, 1.0)
            optimizer.zero_grad(set_to_none=True)
            ((loss * weight).sum() / weight.sum()).backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            tokens += ids.shape[0] * length
            if step % _LOG_EVERY == 0:
                _LOGGER.info(
                    "step %d, length %d, %.0f s, %.1f M tokens, text %.3f, answers %.3f nats, "
                    "rate %.2e, queue %d",
                    step,
                    length,
                    elapsed,
                    tokens / 1e6,
                    loss[kind == TEXT].mean().item(),
                    loss[kind == ANSWER].mean().item(),
                    rate,
                    queue.qsize(),
                )
    return {"steps": step, "tokens": tokens, "seconds": round(elapsed, 1)}


def save(model: torch.nn.Module, out: Path) -> None:
    """Saves the weights in bfloat16 in shards of at most 15 MB, with index and config."""
    model.eval().to(torch.bfloat16).save_pretrained(out, max_shard_size="15MB")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, required=True, help="output folder of encode.py")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seconds", type=float, default=230, help="training time")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--workers", type=int, default=14, help="data processes")
    parser.add_argument("--rate", type=float, default=2e-3, help="peak learning rate")
    parser.add_argument("--batch-tokens", type=int, default=65536)
    parser.add_argument(
        "--lengths",
        type=parse_schedule,
        default="0:1024,0.2:2048,0.55:4096,0.8:8192",
        help="share:length,... by share of the training time",
    )
    parser.add_argument("--compile", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--eval-lengths", type=int, nargs="+", default=[2048, 4096, 8192])
    parser.add_argument("--questions", type=int, default=100, help="per task and length")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    logging.basicConfig(
        level=logging.INFO,
        format="%(asctime)s %(message)s",
        handlers=[logging.StreamHandler(), logging.FileHandler(args.out / "train.log", mode="w")],
    )
    torch.manual_seed(args.seed)
    torch.set_float32_matmul_precision("high")
    model = build_model().to(args.device)
    facts = {
        "parameters": sum(p.numel() for p in model.parameters()),
        "device": torch.cuda.get_device_name() if args.device == "cuda" else "cpu",
        "torch": torch.__version__,
        "seed": args.seed,
        "peak_rate": args.rate,
        "lengths": args.lengths,
    }
    _LOGGER.info("%s", facts)
    if args.compile:
        # One entry a layer and length; past the limit a layer would silently run uncompiled.
        torch._dynamo.config.recompile_limit = 64
        for layer in model.model.layers:
            layer.compile(dynamic=False)
    facts |= train(model, args)
    save(model, args.out)
    _LOGGER.info("saved after %s", facts)
    report = {"training": facts, "results": {}}
    for length, results in evaluate(args):
        report["results"][str(length)] = results
        _LOGGER.info("%d tokens: %s", length, results)
        (args.out / "results.json").write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    main()
