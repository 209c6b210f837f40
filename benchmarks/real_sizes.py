"""Time, disk and memory of a calibration of a large model, and of its clustering.

The model has a known shape and random weights, and prompts are random tokens: nothing is said of
accuracy. `capture` writes a map store as `sp calibrate` does, and times dense prefills beside it.
`cluster` makes maps up, of heads that are alike in groups, trains the autoencoder and clusters.

python benchmarks/real_sizes.py capture --shape llama-3.1-8b --length 131072 --samples 3 --out F
python benchmarks/real_sizes.py cluster --layers 32 --length 131072 --prompts 12 --out F
"""

from __future__ import annotations

import argparse
import resource
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from time import perf_counter

import torch
from provenance import provenance, summary

from shareprefill.autoencoder.pipeline import train
from shareprefill.bench.shapes import SHAPES, build_shape, layers_of
from shareprefill.calib.capture import FULL, LINES, SLASH, VERTICAL, PromptMaps, rows_key
from shareprefill.calib.capture import capture as capture_maps
from shareprefill.calib.effect import CHANGE, DIVERGENCE, LOST, STEP_CHANGE, STEP_LOST
from shareprefill.calib.pipeline import capture_prompts
from shareprefill.calib.prompts import Prompt
from shareprefill.calib.store import MapStore
from shareprefill.clustering.pipeline import cluster
from shareprefill.config import CalibrateConfig, ClusterConfig, TrainConfig
from shareprefill.models import Fingerprint, ModelGeometry, fingerprint
from shareprefill.runtime.ops.blocks import count_blocks


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("step", choices=("capture", "cluster"))
    parser.add_argument("--shape", default="llama-3.1-8b", choices=tuple(SHAPES))
    parser.add_argument("--layers", type=int, help="all of the shape's by default")
    parser.add_argument("--length", type=int, default=131072)
    parser.add_argument("--samples", type=int, default=3, help="prompts that are captured")
    parser.add_argument("--prompts", type=int, default=12, help="that are clustered")
    parser.add_argument("--budget", type=float, help="of the plan; by recall without it")
    parser.add_argument("--epochs", type=int, default=TrainConfig().epochs)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--commit", help="of a copy without git's own files")
    args = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    print(summary(provenance(device, args.commit)), flush=True)
    if args.step == "capture":
        capture(args, torch.device(device))
    else:
        cluster_made_up(args)


def capture(args: argparse.Namespace, device: torch.device) -> None:
    """Captures prompts, and prints what that took."""
    layers = args.layers or layers_of(args.shape)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    model = build_shape(args.shape, layers=layers, tokens=args.length, device=device, dtype=dtype)
    made_for, loaded = fingerprint(model), host_bytes()
    generator = torch.Generator().manual_seed(0)
    shape = (args.length,)
    ids = [
        torch.randint(3, model.config.vocab_size, shape, generator=generator)
        for _ in range(args.samples)
    ]
    prompts = [Prompt("random", tokens) for tokens in ids]
    samples = max(3, args.samples)
    config = CalibrateConfig(model=args.shape, samples=samples, length=args.length)
    warm = ids[0][: args.length // 8]
    prefill(model, warm.to(device))
    capture_maps(model, warm, block_size=config.block_size, rows=config.rows)
    dense = timed(lambda: prefill(model, ids[0].to(device)), device)
    ends = []

    def progress(done: int, of: int) -> None:
        wait(device)
        ends.append(perf_counter())
        print(f"{done} of {of} prompts", flush=True)

    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    store = capture_prompts(model, prompts, made_for, config, args.out, progress=progress)
    assert store is not None
    took = [late - early for early, late in pairwise(ends)]
    disk = [(args.out / record.file).stat().st_size for record in store.prompts]
    gib, effects = 2**30, config.effect_tokens
    for line in (
        f"{args.shape}, {layers} layers, {args.length:,} tokens, effects on {effects:,}",
        f"dense prefill: {dense:.2f} s",
        f"prompts, s: {', '.join(f'{t:.2f}' for t in took)}; the last {took[-1] / dense:.2f} dense",
        f"disk: {max(disk) / 1e6:.1f} MB a prompt, blocks of {store.prompts[0].map_block}",
        f"host memory: {loaded / gib:.2f} GiB with the model, {host_bytes() / gib:.2f} at the peak",
    ):
        print(line)
    if device.type == "cuda":
        weights = sum(p.numel() * p.element_size() for p in model.parameters())
        peak = torch.cuda.max_memory_allocated()
        print(f"GPU memory, GiB: {weights / 2**30:.1f} of weights, {peak / 2**30:.1f} at the peak")


def cluster_made_up(args: argparse.Namespace) -> None:
    """Trains on and clusters made-up maps, with lines that groups of heads share."""
    layers, shape = args.layers or layers_of(args.shape), SHAPES[args.shape]
    heads, kv_heads = shape["num_attention_heads"], shape["num_key_value_heads"]
    sizes = ModelGeometry(layers, heads, kv_heads, shape["hidden_size"] // heads)
    made_for = Fingerprint("llama", sizes, "0" * 64, "")
    config = CalibrateConfig(model=args.shape, samples=args.prompts, length=args.length)
    store = MapStore.begin(args.out, config, made_for, resume=False)
    generator = torch.Generator().manual_seed(0)
    kinds = torch.randint(24, (layers * heads,), generator=generator)
    for number in range(args.prompts):
        ids = torch.full((args.length,), number)
        store.add("made up", ids, f"{number}", made_up_maps(store, kinds, number))
    begun = perf_counter()
    training = train(args.out, TrainConfig(epochs=args.epochs))
    trained = perf_counter()
    artifact, trials = cluster(args.out, ClusterConfig(budget=args.budget))
    ended = perf_counter()
    print(f"{artifact.heads} heads, {args.prompts} prompts, {torch.get_num_threads()} threads")
    print(f"autoencoder, s: {trained - begun:.1f}, {training.epochs} epochs")
    print(f"clustering, s: {ended - trained:.1f}, {len(trials)} numbers of clusters tried")
    print(f"{artifact.policy_counts()}")
    print(f"host memory, GiB: {host_bytes() / 2**30:.2f} at the peak")


def made_up_maps(store: MapStore, kinds: torch.Tensor, number: int) -> PromptMaps:
    """Maps of every head: key blocks and distances that its kind attends to, and noise."""
    config, sizes = store.config, store.fingerprint.geometry
    n = count_blocks(config.length, store.map_block(config.length))
    generator = torch.Generator().manual_seed(number)
    place = torch.arange(n)
    distance = (place[:, None] - place).clamp_min(0)
    kind_logits = torch.randn(24, 2, n, generator=torch.Generator().manual_seed(-1 - number)) * 2
    hidden = ~(place[:, None] >= place)

    def draw(noise: float) -> torch.Tensor:
        columns, distances = kind_logits[kinds].unbind(1)  # [K, n]
        logits = columns[:, None] + distances[:, distance]
        logits += noise * torch.randn(logits.shape, generator=generator)
        return logits.masked_fill_(hidden, -torch.inf).softmax(-1).half()

    shape = (sizes.layers, sizes.heads)
    tensors = {name: draw(0.5).unflatten(0, shape) for name in (FULL, *map(rows_key, config.rows))}
    tensors |= {
        VERTICAL: tensors[FULL][:, :, -1].clone(),
        SLASH: torch.full((*shape, n + 1), 1 / (n + 1)).half(),
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


if __name__ == "__main__":
    main()
