"""The precision of sparse attention: whose heads run in FP8, and what a layer does with it."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch

from shareprefill import share_prefill
from shareprefill.bench.config import BenchConfig
from shareprefill.bench.synthetic import synthetic_artifact
from shareprefill.config import RuntimeConfig
from shareprefill.errors import ArtifactError, ConfigError, UnsupportedError
from shareprefill.evaluation.config import EvalConfig
from shareprefill.models import load_model
from shareprefill.runtime import core, session
from shareprefill.runtime.core import SparsePrefill
from shareprefill.runtime.ops.blocks import causal_lists
from shareprefill.runtime.ops.fp8_attention import fp8_attention, reference
from shareprefill.runtime.ops.hopper import launch
from shareprefill.runtime.plan import HeadPlan, make_plan
from shareprefill.vllm.options import ServingOptions
from tests.audit.synthetic import made_up_artifact, with_gaps
from tests.support.plans import D, R, layer_plan
from tests.support.tiny import tiny_llama

HEADS, DIM, BLOCK, TOKENS = 4, 64, 128, 700
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
Tensors = tuple[torch.Tensor, torch.Tensor, torch.Tensor]
FP8: Any = {"precision": "fp8"}


def prefill_of(policy: int, in_fp8: tuple[bool, ...]) -> SparsePrefill:
    """A layer whose heads all have one policy, and run in FP8 or not."""
    heads = tuple(
        HeadPlan(
            head=head,
            policy=policy,
            pivot=-1,
            fallback=policy,
            gamma=0.7,
            fallback_gamma=0.7,
            coverage_slack=0.0,
            cluster=-1,
            is_fp8=is_fp8,
        )
        for head, is_fp8 in enumerate(in_fp8)
    )
    return SparsePrefill(layer_plan(heads, BLOCK, max_density=1.0))


def attend(policy: int, in_fp8: tuple[bool, ...], tensors: Tensors, **options: Any) -> torch.Tensor:
    prefill = prefill_of(policy, in_fp8)
    state = prefill.begin(prefill.plan.geometry(TOKENS, TOKENS, tensors[0].device))
    out, _ = prefill.attend(0, state, *tensors, scale=DIM**-0.5, **options)
    return out


def inputs(dtype: torch.dtype = torch.float32) -> Tensors:
    query, key, value = (
        torch.randn(heads, TOKENS, DIM, device=DEVICE, dtype=dtype) for heads in (HEADS, 2, 2)
    )
    key[:, BLOCK : BLOCK + 9] *= 4.0
    return query, key, value


def distance(found: torch.Tensor, wanted: torch.Tensor) -> float:
    return float((found.double() - wanted.double()).norm() / wanted.double().norm())


NONE, SOME, ALL = (False,) * HEADS, (False, True, True, False), (True,) * HEADS


@pytest.fixture
def by_reference(monkeypatch: pytest.MonkeyPatch) -> None:
    """FP8 attention where no kernel computes it."""
    monkeypatch.setattr(core, "fp8_attention", partial(fp8_attention, impl="reference"))
    monkeypatch.setattr(session, "refusal_of_kind", lambda *kind: None)


@pytest.mark.usefixtures("by_reference")
@pytest.mark.parametrize("policy", [R, D])
def test_heads_have_the_precision_that_is_planned(policy: int) -> None:
    tensors = inputs()
    whole, some, every = (attend(policy, heads, tensors) for heads in (NONE, SOME, ALL))
    for head, is_fp8 in enumerate(SOME):
        assert torch.equal(some[head], every[head]) == is_fp8
        if not is_fp8:
            torch.testing.assert_close(some[head], whole[head])
        assert 0.005 < distance(every[head], whole[head]) < 0.1


@pytest.mark.usefixtures("by_reference")
def test_dense_heads_read_all_causal_blocks() -> None:
    tensors = inputs()
    wanted = torch.empty_like(tensors[0])
    lists = causal_lists(TOKENS, 0, BLOCK, HEADS, tensors[0].device)
    reference.attend(*tensors, lists, DIM**-0.5, wanted)
    torch.testing.assert_close(attend(D, ALL, tensors), wanted)


def test_what_only_logits_tell_is_refused() -> None:
    sinks = torch.zeros(HEADS, device=DEVICE)
    for options in ({"softcap": 30.0}, {"sinks": sinks}):
        with pytest.raises(UnsupportedError, match=r"layer 0 .*FP8.*precision='model'"):
            attend(R, SOME, inputs(), **options)


class TestPlan:
    def test_heads_within_the_bound_run_in_fp8(self) -> None:
        artifact = synthetic_artifact(tiny_llama(), 0.3)
        errors = torch.rand(artifact.policy.shape)
        artifact = replace(artifact, fp8_error=errors)
        for bound, config in (
            (0.1, RuntimeConfig(**FP8)),
            (0.5, RuntimeConfig(**FP8, fp8_error=0.5)),
        ):
            plan = make_plan(artifact, config)
            found = [[head.is_fp8 for head in layer] for layer in plan.layers]
            assert found == (errors <= bound).tolist()
        plan = make_plan(artifact, RuntimeConfig())
        assert not any(head.is_fp8 for layer in plan.layers for head in layer)

    def test_layers_that_were_not_measured_keep_the_models_precision(self) -> None:
        artifact = made_up_artifact(4, 3, fp8_error=torch.zeros(4, 3))
        plan = make_plan(with_gaps(artifact, 0, 2), RuntimeConfig(**FP8, fp8_error=1e9))
        assert [layer[0].is_fp8 for layer in plan.layers] == [False, True, False, True]

    def test_without_measured_errors_it_is_refused(self) -> None:
        artifact = replace(synthetic_artifact(tiny_llama(), 0.3), fp8_error=None)
        with pytest.raises(ArtifactError, match=r"make it anew \(sp calibrate, sp cluster\)"):
            make_plan(artifact, RuntimeConfig(**FP8))
        with pytest.raises(ConfigError, match="precision = 'fp8' needs an artifact"):
            share_prefill(tiny_llama(), policy="smoothed", **FP8)


class TestSession:
    def test_what_cannot_be_computed_is_refused_before_the_first_prefill(self) -> None:
        model = tiny_llama()
        with pytest.raises(UnsupportedError, match="needs a Hopper GPU.*precision='model'"):
            session.Session(model, synthetic_artifact(model, 0.3), RuntimeConfig(**FP8))

    def test_of_a_model_its_dtype_and_sizes_are_looked_at(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(launch, "unavailable", lambda device: None)
        model = tiny_llama()
        artifact, config = synthetic_artifact(model, 0.3), RuntimeConfig(**FP8)
        for dtype, reason in ((torch.float32, "float32"), (torch.bfloat16, "head_dim of 64, 96")):
            with pytest.raises(UnsupportedError, match=f"{reason}.*use precision='model'"):
                session.Session(model.to(dtype), artifact, config)

    @pytest.mark.usefixtures("by_reference")
    @torch.no_grad()
    def test_its_report_counts_heads(self) -> None:
        model = tiny_llama(head_dim=64)
        artifact = synthetic_artifact(model, 0.3)
        assert artifact.fp8_error is not None
        artifact.fp8_error[:, ::2] = 1.0
        config = RuntimeConfig(**FP8, min_tokens=0)
        with session.Session(model, artifact, config) as entered:
            model(torch.randint(3, 100, (1, 500)))
        report = entered.report()
        # Heads of policies that compute no output of their own read lists.
        assert report.fp8_heads == artifact.heads // 2
        assert f"FP8: {artifact.heads // 2} of {artifact.heads} heads" in report.summary()
        assert session.Session(model, artifact, RuntimeConfig()).report().fp8_heads is None


def test_an_evaluation_hands_it_on() -> None:
    options = {"model": "m", "policies": ("smoothed", "sampled"), "fp8_error": 0.2, **FP8}
    runtimes = EvalConfig.from_dict(options).runtimes()
    assert [(r.precision, r.fp8_error) for r in runtimes] == [("fp8", 0.2)] * 2


def test_other_words_are_refused() -> None:
    kinds: tuple[Any, ...] = (RuntimeConfig, BenchConfig, partial(EvalConfig, model="m"))
    for kind in kinds[:2]:
        with pytest.raises(ConfigError, match="precision = 'fp4' is not allowed"):
            kind(precision="fp4")
    with pytest.raises(ConfigError, match="precision = 'fp4' is not allowed"):
        kinds[2](policies=("smoothed",), precision="fp4")
    with pytest.raises(ConfigError, match=r"fp8_error = 0.2 is for FP8 attention"):
        RuntimeConfig(fp8_error=0.2)
    with pytest.raises(ConfigError, match="was not tried in engines"):
        ServingOptions(artifact="a.st", runtime=RuntimeConfig(**FP8))


@pytest.mark.gpu
@pytest.mark.skipif(
    launch.unavailable(torch.device(DEVICE)) is not None, reason="needs a Hopper GPU"
)
class TestOnHopper:
    @pytest.mark.parametrize("heads", [SOME, ALL])
    def test_a_layer_is_as_close_as_rounding_lets_it(self, heads: tuple[bool, ...]) -> None:
        tensors = inputs(torch.bfloat16)
        for policy in (R, D):
            whole, found = (attend(policy, kind, tensors) for kind in (NONE, heads))
            for head, is_fp8 in enumerate(heads):
                off = distance(found[head], whole[head])
                assert 0.005 < off < 0.1 if is_fp8 else off < 0.005

    @torch.no_grad()
    def test_a_model_runs_in_it(self) -> None:
        # Of trained weights: layers of random ones multiply what bfloat16 alone is off by.
        model = load_model("sp-tiny", device=DEVICE, dtype="bfloat16")
        artifact = synthetic_artifact(model, 0.9)
        ids = torch.randint(3, 200, (1, 900), device=DEVICE)
        found = {}
        for precision in ("model", "fp8"):
            config = RuntimeConfig.from_dict({"min_tokens": 0, "precision": precision})
            # Further calls would be repeated, if they launched nothing that torch does.
            with session.Session(model, artifact, config) as entered:
                found[precision] = [model(ids).logits for _ in range(4)][-1]
            heads = entered.report().fp8_heads
            assert heads is None if precision == "model" else heads
        assert 0.02 < distance(found["fp8"], found["model"]) < 0.1
