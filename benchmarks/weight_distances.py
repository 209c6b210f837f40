"""How far the attention weights of quantised, trained and other models are from a model's own.

    python benchmarks/weight_distances.py --model sp-tiny [--gguf FILE]

Each line: the relative distance of the worst layer, as the sketches of two fingerprints say it
(which decides), and exactly. Ways whose library is missing are named as such.
"""

from __future__ import annotations

import argparse
import copy
import warnings
from collections.abc import Callable
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn

from shareprefill.models import attention_layers, fingerprint, load_model
from shareprefill.weights import base_weights, sketch_distances

STEPS, TOKENS = 5, 64


def _dynamic(model: Any) -> Any:
    return torch.ao.quantization.quantize_dynamic(model, {nn.Linear}, dtype=torch.qint8)


def _torchao(model: Any) -> Any:
    from torchao import quantization  # pyright: ignore[reportMissingImports]

    quantization.quantize_(model, quantization.Int8WeightOnlyConfig())
    return model


def _quanto(kind: str) -> Callable[[Any], Any]:
    def quantise(model: Any) -> Any:
        from optimum import quanto  # pyright: ignore[reportMissingImports]

        quanto.quantize(model, weights=getattr(quanto, kind))
        quanto.freeze(model)
        return model

    return quantise


def _bitsandbytes(kind: str) -> Callable[[Any], Any]:
    def quantise(model: Any) -> Any:
        from bitsandbytes.nn import Linear4bit  # pyright: ignore[reportMissingImports]

        for layer in attention_layers(model):
            for name, part in list(layer.module.named_children()):
                if isinstance(part, nn.Linear):
                    packed = Linear4bit(
                        part.in_features,
                        part.out_features,
                        bias=part.bias is not None,
                        quant_type=kind,
                    )
                    packed.load_state_dict(part.state_dict())
                    setattr(layer.module, name, packed.to("cpu"))
        return model

    return quantise


@torch.no_grad()
def _rounded(bits: int, group: int = 32) -> Callable[[Any], Any]:
    def quantise(model: Any) -> Any:
        for matrix in chain.from_iterable(_layers(model)):
            groups = matrix.detach().view(-1, group)
            steps = groups.abs().amax(1, keepdim=True) / (2 ** (bits - 1) - 1)
            groups.copy_((groups / steps).round() * steps)
        return model

    return quantise


def _trained(optimiser: type[torch.optim.Optimizer], rate: float) -> Callable[[Any], Any]:
    def train(model: Any) -> Any:
        steps = optimiser(model.train().parameters(), lr=rate)  # type: ignore[call-arg]
        generator = torch.Generator().manual_seed(0)
        for _ in range(STEPS):
            ids = torch.randint(3, model.config.vocab_size, (1, TOKENS), generator=generator)
            steps.zero_grad()
            model(input_ids=ids, labels=ids).loss.backward()
            steps.step()
        return model.eval()

    return train


def _other(model: Any) -> Any:
    torch.manual_seed(1)
    return type(model)(model.config)


def _other_layer(model: Any) -> Any:
    attention_layers(model)[1].module.load_state_dict(
        attention_layers(_other(model))[1].module.state_dict()
    )
    return model


WAYS: dict[str, Callable[[Any], Any]] = {
    "in float16": lambda model: model.half(),
    "in bfloat16": lambda model: model.bfloat16(),
    "8 bits: torch.ao, dynamic": _dynamic,
    "8 bits: torchao": _torchao,
    "8 bits: quanto qint8": _quanto("qint8"),
    "8 bits: quanto qfloat8": _quanto("qfloat8"),
    "4 bits: bitsandbytes nf4": _bitsandbytes("nf4"),
    "4 bits: bitsandbytes fp4": _bitsandbytes("fp4"),
    "4 bits: quanto qint4": _quanto("qint4"),
    "4 bits: to the nearest, groups of 32": _rounded(4),
    "3 bits: to the nearest, groups of 32": _rounded(3),
    "2 bits: quanto qint2": _quanto("qint2"),
    f"{STEPS} steps of SGD, rate 0.1": _trained(torch.optim.SGD, 0.1),
    f"{STEPS} steps of AdamW, rate 1e-4": _trained(torch.optim.AdamW, 1e-4),
    "one layer of another initialisation": _other_layer,
    "another initialisation": _other,
}


def _layers(model: Any) -> list[list[Tensor]]:
    """Every layer's attention matrices, by name."""
    return [
        [
            weight
            for _, weight in sorted(base_weights(layer.module), key=lambda pair: pair[0])
            if weight.ndim >= 2
        ]
        for layer in attention_layers(model)
    ]


def _exact(one: Any, other: Any) -> float:
    """The exact distance of the worst layer."""
    distances = []
    for pair in zip(_layers(one), _layers(other), strict=True):
        first, second = (torch.cat([m.reshape(-1).float() for m in matrices]) for matrices in pair)
        distances.append((first / first.norm() - second / second.norm()).norm().item())
    return max(distances)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", required=True)
    parser.add_argument("--gguf", help="The same model as a GGUF file.")
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    model = load_model(options.model, device="cpu", dtype="float32")
    own = fingerprint(model)

    def show(way: str, other: Any) -> None:
        distances = sketch_distances(own.sketch, fingerprint(other).sketch)
        assert distances is not None
        print(f"| {way} | {distances.max():.3f} | {_exact(model, other):.3f} |", flush=True)

    print(f"| {options.model} | by sketch | exact |\n| --- | --- | --- |")
    for way, change in WAYS.items():
        try:
            other = change(copy.deepcopy(model))
        except ImportError as error:
            print(f"| {way} | missing: {error} | |")
            continue
        show(way, other)
    if options.gguf is not None:
        show("the GGUF file", load_model(options.gguf, device="cpu", dtype="float32"))


if __name__ == "__main__":
    main()
