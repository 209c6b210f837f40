from __future__ import annotations

from typing import Any

import pytest
import torch

from shareprefill.calib.capture import FULL, capture, coarsen
from shareprefill.errors import DataError, UnsupportedError
from shareprefill.runtime.ops.pooled_attention import sample_rows
from shareprefill.testing import LargestTensor
from tests.support.families import FAMILIES, build
from tests.support.tiny import tiny_llama, token_ids


@pytest.fixture(scope="module")
def model() -> Any:
    return tiny_llama()


@torch.no_grad()
def eager_attention(model: Any, ids: torch.Tensor) -> torch.Tensor:
    """The model's own attention probabilities, [L, H, N, N]."""
    model.set_attn_implementation("eager")
    try:
        return torch.cat(model(input_ids=ids[None], output_attentions=True).attentions)
    finally:
        model.set_attn_implementation("sdpa")


def pool(probabilities: torch.Tensor, rows: torch.Tensor, block: int) -> torch.Tensor:
    columns = [piece.sum(-1) for piece in probabilities.split(block, dim=-1)]
    return torch.stack(columns, -1)[:, :, rows].mean(-2)


@pytest.mark.parametrize(("tokens", "block"), [(96, 16), (101, 16), (130, 32), (40, 64)])
def test_maps_are_the_models_own_attention_by_block(model: Any, tokens: int, block: int) -> None:
    ids = token_ids(tokens)
    found = capture(model, ids, block_size=block, rows=(1, 4, 16))
    probabilities = eager_attention(model, ids)
    assert found.layers == (0, 1, 2)
    for rows in (1, 4, 16):
        chosen = sample_rows(tokens, block, rows)
        expected = pool(probabilities, chosen, block)
        actual = found.tensors[f"rows{rows}"].float()
        torch.testing.assert_close(actual, expected, rtol=2e-3, atol=2e-4)
    for index, start in enumerate(range(0, tokens, block)):
        rows_of_block = torch.arange(start, min(start + block, tokens))[None]
        expected = pool(probabilities, rows_of_block, block)[:, :, 0]
        actual = found.tensors["full"][:, :, index].float()
        torch.testing.assert_close(actual, expected, rtol=2e-3, atol=2e-4)
    last = probabilities[:, :, -min(block, tokens) :].mean(-2)
    vertical = torch.stack([piece.sum(-1) for piece in last.split(block, dim=-1)], -1)
    torch.testing.assert_close(found.tensors["vertical"].float(), vertical, rtol=2e-3, atol=2e-4)
    rows_of_block = torch.arange(tokens)[-block:, None]
    mass = probabilities[:, :, rows_of_block[:, 0]] / len(rows_of_block)
    distance = (rows_of_block - torch.arange(tokens)).clamp(min=0)
    part = distance % block / block
    slash = torch.zeros_like(found.tensors["slash"]).float()
    slash.index_add_(2, (distance // block).flatten(), (mass * (1 - part)).flatten(2))
    slash.index_add_(2, (distance // block + 1).flatten(), (mass * part).flatten(2))
    torch.testing.assert_close(found.tensors["slash"].float(), slash, rtol=2e-3, atol=2e-4)


def test_capture_changes_neither_output_nor_model(model: Any) -> None:
    ids = token_ids(90)
    caught: list[torch.Tensor] = []
    handle = model.register_forward_hook(lambda _m, _i, out: caught.append(out.logits))
    with torch.no_grad():
        model(input_ids=ids[None], logits_to_keep=1)
    capture(model, ids, block_size=16, rows=(1, 2, 4))
    handle.remove()
    own, captured = caught
    torch.testing.assert_close(captured, own, rtol=1e-5, atol=1e-5)
    assert model.config._attn_implementation == "sdpa"


def test_capture_never_holds_an_n_by_n_tensor(model: Any) -> None:
    tokens = 3000
    with LargestTensor() as largest:
        capture(model, token_ids(tokens), block_size=64, rows=(2, 8, 32))
    assert largest.elements < tokens**2 / 4


def test_only_full_attention_layers_are_captured() -> None:
    from transformers import Qwen2Config, Qwen2ForCausalLM

    torch.manual_seed(3)
    mixed = Qwen2ForCausalLM(
        Qwen2Config(
            vocab_size=128,
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=4,
            num_attention_heads=2,
            num_key_value_heads=1,
            use_sliding_window=True,
            sliding_window=20,
            layer_types=["full_attention", "sliding_attention"] * 2,
        )
    ).eval()
    assert capture(mixed, token_ids(80), block_size=16, rows=(1, 2, 4)).layers == (0, 2)


def test_a_model_with_windows_alone_is_refused() -> None:
    from transformers import MistralConfig, MistralForCausalLM

    mistral = MistralForCausalLM(
        MistralConfig(
            vocab_size=128,
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=1,
            num_attention_heads=2,
            num_key_value_heads=1,
            sliding_window=20,
        )
    ).eval()
    with pytest.raises(UnsupportedError, match="no layer with full causal attention"):
        capture(mistral, token_ids(80), block_size=16, rows=(1, 2, 4))


def test_queries_that_are_not_finite_are_refused() -> None:
    broken = tiny_llama()
    broken.model.layers[1].self_attn.q_proj.weight.data[0, 0] = torch.inf
    with pytest.raises(DataError, match="not finite"):
        capture(broken, token_ids(80), block_size=16, rows=(1, 2, 4))


def test_a_model_with_nothing_to_share_is_not_captured() -> None:
    family = next(family for family in FAMILIES if family.name == "mistral (sliding window)")
    with pytest.raises(UnsupportedError, match="sp doctor --model"):
        capture(build(family), token_ids(60), block_size=16, rows=(1, 2, 4))


@pytest.mark.parametrize("name", ["gemma2", "gpt_oss"])
def test_maps_of_soft_capped_logits_and_beside_sinks(name: str) -> None:
    model = build(next(family for family in FAMILIES if family.name == name))
    model.set_attn_implementation("eager")
    ids = token_ids(64)
    found = capture(model, ids, block_size=16, rows=(1, 2, 4))
    assert found.layers == (1,)
    with torch.no_grad():
        weights = model(input_ids=ids[None], output_attentions=True).attentions[1][0]
    # What goes to a sink is of no block.
    weights = weights / weights.sum(-1, keepdim=True)
    maps = weights.unflatten(-1, (4, 16)).sum(-1).unflatten(1, (4, 16)).mean(2)
    torch.testing.assert_close(found.tensors[FULL][0].float(), maps, rtol=1e-2, atol=1e-3)


def test_only_layers_that_can_be_shared_are_captured() -> None:
    family = next(family for family in FAMILIES if family.name == "gemma3_text")
    assert capture(build(family), token_ids(60), block_size=16, rows=(1, 2, 4)).layers == (1,)


@pytest.mark.parametrize("factor", [2, 3])
def test_maps_at_larger_blocks_are_the_attention_of_those(model: Any, factor: int) -> None:
    """As maps of a calibration with larger blocks, up to the last, shorter block."""
    ids = token_ids(16 * 18 * factor - 16)
    options: dict[str, Any] = {"rows": (1, 4, 16)}
    kept = capture(model, ids, block_size=16, map_block=16 * factor, **options).tensors
    coarse = capture(model, ids, block_size=16 * factor, **options).tensors
    for name in ("full", "vertical", "slash"):
        assert kept[name].shape == coarse[name].shape
    full = kept["full"][:, :, :-1].float(), coarse["full"][:, :, :-1].float()
    torch.testing.assert_close(*full, rtol=5e-3, atol=5e-4)
    # Rows are those of the small blocks.
    fine = capture(model, ids, block_size=16, **options).tensors
    pooled = torch.stack([coarsen(layer, factor) for layer in fine["rows4"].float()])
    torch.testing.assert_close(kept["rows4"].float(), pooled, rtol=5e-3, atol=5e-4)
    sums = kept["rows4"].float().sum(-1)
    torch.testing.assert_close(sums, torch.ones_like(sums), rtol=0, atol=2e-3)
    assert torch.equal(kept["lines"], fine["lines"])
    # Behind the distances stands what no distance holds.
    for name, end in (("vertical", None), ("slash", -1)):
        joined = [part.sum(-1) for part in fine[name].float()[..., :end].split(factor, -1)]
        expected = torch.stack(joined, -1)
        torch.testing.assert_close(kept[name].float()[..., :end], expected, rtol=5e-3, atol=5e-4)
