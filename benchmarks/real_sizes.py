"""Time, disk and memory of a calibration of a large model, and of its clustering.

The model has a known shape and random weights, and prompts are random tokens: nothing is said of
accuracy. `forecast` tells what `sp calibrate --dry-run` would. `capture` does so too, then writes a
map store as `sp calibrate` does, and times a dense prefill beside it. `make-up` writes one of maps
that are made up, of heads that are alike in groups. `cluster` trains the autoencoder on a store and
clusters.

python benchmarks/real_sizes.py capture --shape llama-3.1-8b --length 131072 --prompts 12 --out F
python benchmarks/real_sizes.py cluster --out F
"""

from __future__ import annotations

import argparse
import resource
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from statistics import median
from time import perf_counter

import torch
from provenance import provenance, summary

from shareprefill.autoencoder.pipeline import train
from shareprefill.bench.shapes import SHAPES, build_shape, layers_of
from shareprefill.calib.capture import FULL, LINES, SLASH, VERTICAL, PromptMaps, rows_key
from shareprefill.calib.effect import CHANGE, DIVERGENCE, LOST, STEP_CHANGE, STEP_LOST
from shareprefill.calib.forecast import forecast_prompts
from shareprefill.calib.pipeline import capture_prompts
from shareprefill.calib.prompts import Prompt
from shareprefill.calib.store import MapStore
from shareprefill.clustering.pipeline import cluster
from shareprefill.config import CalibrateConfig, ClusterConfig, TrainConfig
from shareprefill.models import Fingerprint, ModelGeometry, fingerprint
from shareprefill.runtime.ops.blocks import count_blocks

# Groups of heads that are alike.
_KINDS = 48


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("step", choices=("forecast", "capture", "make-up", "cluster"))
    parser.add_argument("--shape", default="llama-3.1-8b", choices=tuple(SHAPES))
    parser.add_argument("--layers", type=int, help="all of the shape's by default")
    parser.add_argument("--length", type=int, default=131072)
    parser.add_argument("--prompts", type=int, default=12)
    parser.add_argument("--budget", type=float, help="of the plan; by recall without it")
    parser.add_argument("--epochs", type=int, default=TrainConfig().epochs)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--commit", help="of a copy without git's own files")
    args = parser.parse_args()
    has_model = args.step in ("forecast", "capture")
    device = "cuda" if has_model and torch.cuda.is_available() else "cpu"
    say(summary(provenance(device, args.commit)))
    if has_model:
        capture(args, torch.device(device))
    elif args.step == "make-up":
        make_up(args)
    else:
        train_and_cluster(args)


def say(line: str) -> None:
    """Prints a line at once."""
    print(line, flush=True)


def capture(args: argparse.Namespace, device: torch.device) -> None:
    """Forecasts, captures prompts where asked to, and prints what it took."""
    layers = args.layers or layers_of(args.shape)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    model = build_shape(args.shape, layers=layers, tokens=args.length, device=device, dtype=dtype)
    made_for, loaded = fingerprint(model), host_bytes()
    generator = torch.Generator().manual_seed(0)
    shape = (args.length,)
    ids = [
        torch.randint(3, model.config.vocab_size, shape, generator=generator)
        for _ in range(args.prompts)
    ]
    prompts = [Prompt("random", tokens) for tokens in ids]
    config = CalibrateConfig(model=args.shape, samples=args.prompts, length=args.length)
    say(f"{args.shape}, {layers} layers, effects on {config.effect_tokens:,} positions")
    begun = perf_counter()
    expected = forecast_prompts(model, prompts, MapStore(args.out, config, made_for, []))
    say(
        f"forecast in {perf_counter() - begun:.1f} s, from {expected.probes} tokens: "
        f"{expected.seconds:.1f} s, {expected.seconds / args.prompts:.2f} s a prompt; disk "
        f"{expected.disk / 1e6:.1f} MB; host {gib(expected.host_memory)}, GPU "
        f"{gib(expected.device_memory or 0)}"
    )
    if args.step == "forecast":
        return
    prefill(model, ids[0][: args.length // 8].to(device))
    dense = timed(lambda: prefill(model, ids[0].to(device)), device)
    say(f"dense prefill: {dense:.2f} s")
    ends = list[float]()

    def progress(done: int, of: int) -> None:
        wait(device)
        ends.append(perf_counter())
        if done:
            took = ends[-1] - ends[-2]
            say(f"{done} of {of}: {took:.2f} s, {took / dense:.2f} dense; host {gib(host_bytes())}")

    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    store = capture_prompts(model, prompts, made_for, config, args.out, progress=progress)
    assert store is not None
    took = [late - early for early, late in pairwise(ends)]
    disk = [(args.out / record.file).stat().st_size for record in store.prompts]
    typical = median(took)
    say(f"all prompts: {sum(took):.1f} s, median {typical:.2f}, {typical / dense:.2f} dense")
    say(f"disk: {max(disk) / 1e6:.1f} MB a prompt, blocks of {store.prompts[0].map_block}")
    say(f"host memory: {gib(loaded)} with the model, {gib(host_bytes())} at the peak")
    if device.type == "cuda":
        weights = sum(p.numel() * p.element_size() for p in model.parameters())
        peak = torch.cuda.max_memory_allocated()
        say(f"GPU memory: {gib(weights)} of weights, {gib(peak)} at the peak")


def make_up(args: argparse.Namespace) -> None:
    """Writes made-up maps."""
    layers, shape = args.layers or layers_of(args.shape), SHAPES[args.shape]
    heads, kv_heads = shape["num_attention_heads"], shape["num_key_value_heads"]
    sizes = ModelGeometry(layers, heads, kv_heads, shape["hidden_size"] // heads)
    made_for = Fingerprint("llama", sizes, "0" * 64, "")
    config = CalibrateConfig(model=args.shape, samples=args.prompts, length=args.length)
    store = MapStore.begin(args.out, config, made_for, resume=False)
    generator = torch.Generator().manual_seed(0)
    kinds = torch.randint(_KINDS, (layers * heads,), generator=generator)
    for number in range(args.prompts):
        ids = torch.full((args.length,), number)
        store.add("made up", ids, f"{number}", made_up_maps(store, kinds, number))


def train_and_cluster(args: argparse.Namespace) -> None:
    """Trains on a store and clusters it, and prints what that took."""
    store = MapStore.open(args.out)
    layers, heads = len(store.layers), store.fingerprint.geometry.heads
    prompts, tokens = len(store.prompts), store.prompts[0].tokens
    threads = torch.get_num_threads()
    say(f"{layers * heads:,} heads, {prompts} prompts of {tokens:,} tokens, {threads} threads")
    begun = perf_counter()
    training = train(args.out, TrainConfig(epochs=args.epochs))
    trained = perf_counter()
    say(f"autoencoder: {trained - begun:.1f} s, {training.epochs} epochs; host {gib(host_bytes())}")
    artifact, trials = cluster(args.out, ClusterConfig(budget=args.budget))
    took = perf_counter() - trained
    say(f"clustering: {took:.1f} s, {len(trials)} numbers of clusters; host {gib(host_bytes())}")
    counts = {name: count for name, count in artifact.policy_counts().items() if count}
    say(f"{counts}, {artifact.rows}, density {artifact.summary['density']}")


def made_up_maps(store: MapStore, kinds: torch.Tensor, number: int) -> PromptMaps:
    """Maps of every head: key blocks and distances that its kind attends to, and noise.

    A third of the kinds attends to few key blocks and distances, a third to what is near, and a
    third to much. Maps of few rows have more noise.
    """
    config, sizes = store.config, store.fingerprint.geometry
    n = count_blocks(config.length, store.map_block(config.length))
    generator = torch.Generator().manual_seed(number)
    place = torch.arange(n)
    distance = (place[:, None] - place).clamp_min(0)
    # Distances belong to the head, key blocks to the prompt.
    lines = torch.randn(_KINDS, n, generator=torch.Generator().manual_seed(_KINDS))
    blocks = torch.randn(_KINDS, n, generator=generator)
    peaks = torch.tensor([3.0, 0.5, 1.0]).repeat(_KINDS // 3)[:, None]
    near = torch.tensor([0.0, 0.2, 0.0]).repeat(_KINDS // 3)[:, None]
    columns, distances = (blocks * peaks)[kinds], (lines * peaks - near * place)[kinds]  # [K, n]
    exact = columns[:, None] + distances[:, distance]
    exact += 0.3 * torch.randn(exact.shape, generator=generator)
    hidden = ~(place[:, None] >= place)
    shape = (sizes.layers, sizes.heads)

    def sampled(rows: int) -> torch.Tensor:
        noise = torch.randn(exact.shape, generator=generator).mul_(0.5 * rows**-0.5)
        maps = noise.add_(exact).masked_fill_(hidden, -torch.inf).softmax(-1)
        return maps.half().unflatten(0, shape)

    tensors = {FULL: sampled(config.block_size)}
    tensors |= {rows_key(rows): sampled(rows) for rows in config.rows}
    last = tensors[FULL][:, :, -1]
    tensors |= {
        VERTICAL: last.clone(),
        SLASH: torch.cat([last.flip(-1), torch.zeros_like(last[..., :1])], -1),
        LINES: torch.eye(8, dtype=torch.float64).expand(len(config.rows), 8, 8).contiguous(),
        CHANGE: torch.rand(shape, generator=generator) * 1e-4,
        LOST: torch.full(shape, 0.01),
        STEP_CHANGE: torch.rand(shape, generator=generator) * 1e-4,
        STEP_LOST: torch.full(shape, 0.01),
        DIVERGENCE: torch.tensor([0.01]),
    }
    return PromptMaps(tuple(range(sizes.layers)), tensors)


def prefill(model: torch.nn.Module, ids: torch.Tensor) -> None:
    """One dense forward pass `[N]` that keeps nothing but the last token's logits."""
    with torch.no_grad():
        model(input_ids=ids[None], use_cache=False, logits_to_keep=1)


def timed(call: Callable[[], None], device: torch.device) -> float:
    """Seconds of a call, with all that it left to the device."""
    wait(device)
    begun = perf_counter()
    call()
    wait(device)
    return perf_counter() - begun


def wait(device: torch.device) -> None:
    """Waits for the device."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def host_bytes() -> int:
    """The most memory that this process had, in bytes."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def gib(size: int) -> str:
    """Bytes in words."""
    return f"{size / 2**30:.2f} GiB"


if __name__ == "__main__":
    main()
