"""Attention with operands of e4m3: what rounding does, what is refused, and on Hopper the kernels
against the same rounding in torch and against float64."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from shareprefill.errors import ConfigError, UnsupportedError
from shareprefill.models import load_model
from shareprefill.runtime.interface import AttentionCall, attached, dense_attention
from shareprefill.runtime.ops.block_sparse_attention import reference as exact_reference
from shareprefill.runtime.ops.blocks import BlockLists, causal_lists, count_blocks
from shareprefill.runtime.ops.fp8_attention import fp8_attention, hopper, reference
from shareprefill.runtime.ops.hopper import launch
from tests.support.attention import DEVICE, HOPPER_SIZES, random_inputs, random_lists

REFUSAL = launch.unavailable(torch.device(DEVICE))
needs_hopper = pytest.mark.skipif(REFUSAL is not None, reason=f"the kernel {REFUSAL}")
# An operand in e4m3 is off by 2.4 % of its norm: half a step of 1/8 is uniform over an octave. Of
# inputs without structure, whose means are as small as their errors, that counts for weights and
# values, and for queries and keys by the spread of logits, which is one: 4.9 % together.
RANDOM_ERROR = 0.06
# Between the kernel and the same rounding in torch: the matrix unit's 14 bits move some weights to
# the neighbour of where they should be rounded to, 6 to 12 % away. One in a hundred makes .9 %. And
# the output is of half precision.
KERNEL_ERROR = 0.015

Tensors = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


def full_lists(heads: int, n_tokens: int) -> BlockLists:
    return causal_lists(n_tokens, 0, 128, heads, torch.device(DEVICE))


def exact(inputs: Tensors, lists: BlockLists) -> torch.Tensor:
    """The output in float64, NaN in left-out heads."""
    query, key, value = (tensor.double() for tensor in inputs)
    out = torch.full_like(query, torch.nan)
    exact_reference.attend(query, key, value, lists, query.shape[2] ** -0.5, out, None)
    return out


def rounded(inputs: Tensors, lists: BlockLists) -> torch.Tensor:
    """The same of operands in e4m3."""
    out = torch.full(inputs[0].shape, torch.nan, dtype=torch.float64, device=DEVICE)
    reference.attend(*inputs, lists, inputs[0].shape[2] ** -0.5, out)
    return out


def error(found: torch.Tensor, wanted: torch.Tensor) -> float:
    difference, size = (found.double() - wanted.double()).norm(), wanted.double().norm()
    assert not difference.isnan()
    return float(difference / size) if size else float(difference)


class TestRounding:
    @pytest.mark.parametrize("width", [1e-3, 1.0, 1e3])
    def test_is_a_few_percent_of_unstructured_inputs(self, width: float) -> None:
        query, key, value = random_inputs(2, 1, 500, 500, 64, torch.float32)
        inputs, lists = (query / width, key * width, value * width), full_lists(2, 500)
        found = error(rounded(inputs, lists), exact(inputs, lists))
        assert 0.01 < found < RANDOM_ERROR

    def test_does_not_see_what_all_keys_have_in_common(self) -> None:
        query, key, value = random_inputs(2, 1, 300, 300, 64, torch.float32)
        lists = full_lists(2, 300)
        before = error(rounded((query, key, value), lists), exact((query, key, value), lists))
        shift = torch.zeros(64, device=DEVICE)
        shift[5] = 50.0
        inputs = (query, key + shift, value)
        assert error(rounded(inputs, lists), exact(inputs, lists)) < 1.2 * before

    def test_equal_keys_and_zeros_have_scales(self) -> None:
        query, key, value = random_inputs(2, 1, 200, 200, 64, torch.float32)
        inputs, lists = (
            (query, torch.full_like(key, 3.0), torch.zeros_like(value)),
            full_lists(2, 200),
        )
        assert (rounded(inputs, lists) == 0.0).all()

    def test_one_scale_a_head_is_as_good_as_one_a_block(self) -> None:
        """A float's digits do not depend on its size: blocks may be 1,000 times as large."""
        _query, key, value = random_inputs(1, 1, 512, 512, 64, torch.float32)
        sizes = torch.tensor([1.0, 1e-3, 1.0, 1e-2], device=DEVICE).repeat_interleave(128)
        _, values = reference.rounded_keys_and_values(key, value * sizes[:, None])
        blocks = (tokens[0].split(128) for tokens in (values, value * sizes[:, None]))
        assert max(map(error, *blocks)) < 0.03

    def test_keeps_what_lists_leave_out(self) -> None:
        inputs = random_inputs(3, 1, 200, 400, 64, torch.float32)
        bitmap = torch.zeros(1, 2, 4, dtype=torch.bool, device=DEVICE)
        bitmap[0, 1, 1] = True
        pattern = torch.tensor([0, -1, 0], device=DEVICE)
        out = rounded(inputs, BlockLists.from_bitmap(bitmap, pattern, 128))
        assert out[1].isnan().all()
        assert (out[0, :128] == 0.0).all()
        assert (out[0, 128:] != 0.0).any()


class TestDoor:
    @staticmethod
    def call(impl: str = "auto", dim: int = 64, heads: int = 2) -> torch.Tensor:
        query, key, value = (torch.randn(2, 200, dim) for _ in range(3))
        lists = causal_lists(200, 0, 128, heads, torch.device("cpu"))
        return fp8_attention(query, key, value, lists, out=torch.empty_like(query), impl=impl)

    def test_a_cpu_has_the_reference_alone(self) -> None:
        assert self.call("reference").isfinite().all()
        for impl in ("auto", "hopper"):
            with pytest.raises(UnsupportedError, match="needs a Hopper GPU.*precision='model'"):
                self.call(impl)

    def test_other_sizes_and_words_are_refused(self) -> None:
        with pytest.raises(UnsupportedError, match=r"head_dim of 64, 96 or 128.*got 80"):
            self.call("reference", dim=80)
        with pytest.raises(ConfigError, match="impl must be one of"):
            self.call("quick")
        with pytest.raises(ConfigError, match="lists are for 3 heads"):
            self.call("reference", heads=3)


@needs_hopper
@pytest.mark.gpu
class TestOnHopper:
    @pytest.mark.parametrize(
        ("groups", "n_tokens", "dim", "dtype"),
        [
            (1, 1, 128, torch.bfloat16),
            (2, 1000, 128, torch.bfloat16),
            (3, 129, 64, torch.float16),
            (2, 777, 96, torch.bfloat16),
        ],
    )
    def test_operands_are_those_of_the_reference(
        self, groups: int, n_tokens: int, dim: int, dtype: torch.dtype
    ) -> None:
        rows = torch.randn(2, n_tokens, groups, dim, device=DEVICE, dtype=dtype)
        key, value = rows.transpose(1, 2)
        key[..., 3] += 30.0
        small = hopper.small_operands(key, value)
        for found, wanted in zip(
            laid_out(small, n_tokens, dim),
            reference.rounded_keys_and_values(key, value),
            strict=True,
        ):
            # Sums in another order may move a number over a rounding's edge.
            assert (found != wanted).float().mean() <= 1e-2
            torch.testing.assert_close(found, wanted, rtol=0.13, atol=1e-3)
        assert (small.key.float()[:, n_tokens:] == 0.0).all()

    @pytest.mark.parametrize(("heads", "groups", "n_q", "n_k", "dim", "dtype"), HOPPER_SIZES)
    @pytest.mark.parametrize("density", [0.0, 0.1, 0.6, 1.0])
    def test_matches_the_reference_and_float64(
        self, heads: int, groups: int, n_q: int, n_k: int, dim: int, dtype: torch.dtype,
        density: float,
    ) -> None:  # fmt: skip
        inputs = random_inputs(heads, groups, n_q, n_k, dim, dtype)
        check(inputs, random_lists(heads, n_q, n_k, density), RANDOM_ERROR)

    def test_outlier_channels(self) -> None:
        query, key, value = random_inputs(8, 2, 1500, 2500, 128, torch.bfloat16)
        key[..., 3] += 40.0
        key[..., 7] *= 6.0
        value[..., 5] += 8.0
        value[..., 9] *= 30.0
        # A channel that is six times as wide makes logits six times as far apart.
        check((query, key, value), random_lists(8, 1500, 2500, 0.5), 2 * RANDOM_ERROR)

    def test_blocks_of_sizes_far_apart(self) -> None:
        query, key, value = random_inputs(8, 2, 1500, 2500, 128, torch.bfloat16)
        sizes = 10.0 ** -(torch.arange(2500, device=DEVICE) // 128 % 4)
        values = (value * sizes[:, None]).bfloat16()
        check((query, key, values), random_lists(8, 1500, 2500, 0.5), RANDOM_ERROR)

    def test_many_blocks_are_added_exactly(self) -> None:
        """Where all weights are alike, errors of a sum with 14 bits would add up over blocks."""
        query, key, value = random_inputs(4, 1, 256, 40_000, 128, torch.bfloat16)
        bitmap = torch.ones(1, 2, count_blocks(40_000, 128), dtype=torch.bool, device=DEVICE)
        lists = BlockLists.from_bitmap(bitmap, torch.zeros(4, device=DEVICE), 128)
        check((query * 0.05, key, value + 4.0), lists, 0.01, kernel_error=4e-3)
        check((query * 0.0, key, value + 4.0), lists, 0.01, kernel_error=4e-3)

    @torch.no_grad()
    def test_captured_inputs(self) -> None:
        model = load_model("sp-tiny", device=DEVICE, dtype="bfloat16")
        layers: list[Tensors] = []

        def keep(call: AttentionCall) -> torch.Tensor:
            layers.append((call.query[0], call.key[0], call.value[0]))
            return dense_attention(call)

        with attached(model, keep):
            model(torch.randint(3, 200, (1, 1001), device=DEVICE))
        assert layers
        for inputs in layers:
            check(inputs, full_lists(len(inputs[0]), 1001), 0.1)

    def test_strided_inputs_and_output(self) -> None:
        heads, groups, n_q, n_k = 8, 2, 500, 900
        inputs = random_inputs(heads, groups, n_q, n_k, 128, torch.bfloat16)
        query, key, value = (x.transpose(0, 1).contiguous().transpose(0, 1) for x in inputs)
        rows = torch.empty(n_q, heads, 3 * 128, dtype=torch.bfloat16, device=DEVICE)
        rows.fill_(7.0)
        out = rows[..., 128:256].transpose(0, 1)
        check((query, key, value), random_lists(heads, n_q, n_k, 0.4), RANDOM_ERROR, out=out)
        assert (rows[..., :128] == 7.0).all()
        assert (rows[..., 256:] == 7.0).all()

    def test_nan_stays_in_its_kv_head(self) -> None:
        inputs = random_inputs(4, 2, 300, 300, 128, torch.bfloat16)
        for number in (torch.nan, torch.inf):
            for tensor in inputs[1:]:
                kept = tensor[0, 250].clone()
                tensor[0, 250] = number
                out = torch.empty_like(inputs[0])
                fp8_attention(*inputs, full_lists(4, 300), out=out)
                assert out[:2].isnan().all()
                assert out[2:].isfinite().all()
                tensor[0, 250] = kept

    def test_calls_repeat_bit_for_bit(self) -> None:
        inputs = random_inputs(32, 8, 4096, 4096, 128, torch.bfloat16)
        lists = full_lists(32, 4096)
        outs = [torch.empty_like(inputs[0]) for _ in range(9)]
        streams = [torch.cuda.Stream() for _ in range(3)]
        torch.cuda.synchronize()
        for place, out in enumerate(outs):
            with torch.cuda.stream(streams[place % 3]):
                fp8_attention(*inputs, lists, out=out)
        torch.cuda.synchronize()
        for out in outs[1:]:
            assert torch.equal(out, outs[0])

    def test_a_new_size_compiles_nothing(self, monkeypatch: pytest.MonkeyPatch) -> None:
        import triton

        def run(heads: int, groups: int, n_q: int, n_k: int) -> None:
            inputs = random_inputs(heads, groups, n_q, n_k, 128, torch.bfloat16)
            check(inputs, random_lists(heads, n_q, n_k, 0.5), RANDOM_ERROR)

        run(4, 2, 256, 256)
        compiled: list[Any] = []
        monkeypatch.setattr(
            triton.knobs.runtime, "jit_post_compile_hook", lambda **call: compiled.append(call)
        )
        for sizes in ((4, 2, 1, 1), (7, 7, 255, 1111), (16, 2, 640, 641)):
            run(*sizes)
        assert not compiled


def laid_out(
    small: hopper.SmallOperands, n_tokens: int, dim: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """What the kernel's operands stand for: float32 `[G, N, D]` twice."""
    n_groups = len(small.key)
    keys = small.key.float() * small.scales[:, :1, None]
    blocks = small.value.float().view(n_groups, -1, 128, 128) * small.scales[:, 1, None, None, None]
    order = (0, 1, 8, 9, 2, 3, 10, 11, 4, 5, 12, 13, 6, 7, 14, 15)
    places = torch.arange(128, device=keys.device).view(-1, 16)[:, order].flatten()
    values = blocks[..., places.argsort()].transpose(2, 3).flatten(1, 2)
    return keys[:, :n_tokens, :dim], values[:, :n_tokens, :dim]


def check(
    inputs: Tensors,
    lists: BlockLists,
    most: float,
    *,
    kernel_error: float = KERNEL_ERROR,
    out: torch.Tensor | None = None,
) -> None:
    """Compare a call on a poisoned output with the reference and with float64."""
    out = torch.empty_like(inputs[0]) if out is None else out
    out.fill_(torch.nan)
    fp8_attention(*inputs, lists, out=out, impl="hopper")
    computed = lists.head_to_list >= 0
    assert out[~computed].isnan().all()
    assert error(out[computed], rounded(inputs, lists)[computed]) <= kernel_error
    assert error(out[computed], exact(inputs, lists)[computed]) <= most
