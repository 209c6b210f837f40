from dataclasses import fields, replace
from functools import cache, partial
from typing import Any

import pytest
import torch

from shareprefill import share_prefill
from shareprefill.artifact import Artifact, Policy, Thresholds
from shareprefill.config import RuntimeConfig
from shareprefill.errors import ConfigError, DataError
from shareprefill.policy_names import POLICIES, READ_BY, SELECTION_POLICIES, reads
from shareprefill.runtime.core import SparsePrefill
from shareprefill.runtime.ops.block_sparse_attention import block_sparse_attention
from shareprefill.runtime.ops.blocks import always_blocks, causal_lists
from shareprefill.runtime.plan import make_plan, plan_without_artifact, unread
from shareprefill.runtime.policies import make_policy, policy_text
from shareprefill.runtime.policies.sampled import Sampled
from shareprefill.runtime.policies.streaming import Streaming
from shareprefill.runtime.records import on_host
from tests.support.plans import D, M, P, R, S, V
from tests.support.tiny import tiny_artifact, tiny_llama, token_ids


@pytest.mark.parametrize("name", ["pivot_rows", "sample_rows", "check_rows"])
def test_a_block_has_so_many_rows(name: str) -> None:
    """Also for engines, which make plans without `share_prefill`."""
    artifact = artifact_of((P, S, R, V), (D,) * 4, (D,) * 4)
    rows = {name: artifact.block_size + 1}
    with pytest.raises(ConfigError, match=f"{name} = 17 is not allowed: a block has 16 rows"):
        make_plan(artifact, RuntimeConfig.from_dict(rows))
    with pytest.raises(ConfigError, match="sample_rows = 129 .* a block has 128 rows"):
        plan_without_artifact(1, 1, RuntimeConfig(policy="sampled", sample_rows=129))


@pytest.mark.parametrize("policy", SELECTION_POLICIES)
def test_a_policy_for_every_head_needs_no_artifact(policy: str):
    """With every block read, a layer gives what dense attention gives."""
    gamma = 1.0 if reads(policy, "gamma") else None
    config = RuntimeConfig(policy=policy, gamma=gamma, max_density=0.01)
    plan = plan_without_artifact(2, 4, config)
    assert [head.head for layer in plan.layers for head in layer] == [*range(8)]
    query, key, value = torch.randn(4, 300, 16), torch.randn(2, 300, 16), torch.randn(2, 300, 16)
    prefill = SparsePrefill(plan)
    state = prefill.begin(plan.geometry(300, 300, query.device))
    out, record = prefill.attend(1, state, query, key, value, scale=0.25)
    lists = causal_lists(300, 0, plan.block_size, 4, query.device)
    expected = block_sparse_attention(query, key, value, lists, scale=0.25)
    torch.testing.assert_close(out, expected, atol=1e-5, rtol=1e-5)
    assert record.layer == 1


@pytest.mark.parametrize(("sink_blocks", "local_blocks"), [(0, 1), (1, 1), (2, 3)])
def test_streaming_reads_what_its_parameters_say_and_no_more(sink_blocks: int, local_blocks: int):
    policy = f"streaming:sink_blocks={sink_blocks},local_blocks={local_blocks}"
    plan = plan_without_artifact(1, 4, RuntimeConfig(policy=policy, max_density=1.0))
    query, key, value = torch.randn(4, 900, 16), torch.randn(2, 900, 16), torch.randn(2, 900, 16)
    prefill, geometry = SparsePrefill(plan), plan.geometry(900, 900, query.device)
    _, record = prefill.attend(0, prefill.begin(geometry), query, key, value, scale=0.25)
    expected = always_blocks(
        900, 0, plan.block_size, sink_blocks=sink_blocks, local_blocks=local_blocks
    )
    assert on_host([record])[0].blocks.tolist() == [expected.sum().item()] * 4


@pytest.mark.parametrize("parameter", ["sink_blocks=-1", "local_blocks=0"])
def test_streaming_reads_at_least_the_diagonal(parameter: str):
    with pytest.raises(ConfigError, match=f"{parameter.replace('=', ' = ')} is not allowed"):
        make_policy(f"streaming:{parameter}")


@pytest.mark.parametrize("policy", ["auto", "shareprefill"])
def test_policies_that_need_an_artifact_say_so(policy: str):
    with pytest.raises(ConfigError, match="needs an artifact"):
        plan_without_artifact(2, 4, RuntimeConfig(policy=policy))


def test_a_pipeline_rank_s_heads_do_alone_what_another_rank_s_pivot_would_tell_them():
    artifact = tiny_artifact(tiny_llama(), [[P, S, D, D], [S, S, D, D], [P, S, D, D]])
    plan = make_plan(artifact, RuntimeConfig())
    first, last = plan.on_layers(range(1)), plan.on_layers(range(1, 3))
    assert first.layers[0] == plan.layers[0]
    pivots = {head.head for head in plan.layers[2] if head.policy == P}
    for layer, kept in zip(plan.layers[1:], last.layers[1:], strict=True):
        for before, after in zip(layer, kept, strict=True):
            if before.policy == S and before.pivot not in pivots:
                assert (after.policy, after.gamma) == (before.fallback, before.fallback_gamma)
                assert after.pivot == -1
            else:
                assert after == before
    assert any(h.policy != S for h in last.layers[1]), "a head of layer 1 shared with layer 0"


# For every option of a session what it is changed to, and what it is changed in.
CHANGES: dict[str, tuple[Any, dict[str, Any]]] = {
    "gamma": (0.2, {}),
    "slack": (-1.0, {}),
    "tau": (0.0, {}),
    "delta": (0.0, {}),
    "pivot_rows": (1, {}),
    "sample_rows": (1, {}),
    "check_rows": (16, {}),
    "sink_blocks": (6, {}),
    "local_blocks": (10, {}),
    "min_tokens": (10**6, {}),
    "max_density": (0.01, {}),
    "nonfinite": ("error", {}),
    "precision": ("fp8", {}),
    "fp8_error": (0.01, {"precision": "fp8"}),
    "decode": ("sparse", {}),
    "decode_density": (0.1, {"decode": "sparse", "decode_density": 0.9}),
}
OWN_PARAMETERS = (
    *("sampled:rows=4", "flash:alpha=0.2", "decompose:max_error=0.2", "decompose:time_budget=0.2"),
    *("streaming:local_blocks=3", policy_text(Sampled()), policy_text(Streaming())),
)


@cache
def artifact_of(*policies: tuple[Policy, ...], clusters: int | None = None) -> Artifact:
    """A tiny artifact, whose heads are all in one cluster, or each in one of so many at most."""
    gamma, errors = torch.full((3, 4), 0.6), torch.linspace(0, 0.2, 12).view(3, 4)
    number = torch.arange(12).view(3, 4)
    in_clusters = number.where(number < (clusters or 0), -1)
    return tiny_artifact(
        tiny_llama(),
        [[*row] for row in policies],
        thresholds=Thresholds(gamma=0.6, tau=0.6, delta=0.3),
        gamma=gamma,
        fallback_gamma=gamma,
        fp8_error=errors,
        **({} if clusters is None else {"cluster": in_clusters.int()}),
    )


@cache
def what_is_done(artifact: Artifact, config: RuntimeConfig, *, is_broken: bool) -> Any:
    """Results and figures of a prompt and two steps of decoding; or what is said of NaN."""
    if config.precision == "fp8":
        # FP8 attention is for GPUs of one kind.
        return [head.is_fp8 for layer in make_plan(artifact, config).layers for head in layer]
    model, cache, logits = tiny_llama(), None, []
    torch.manual_seed(0)
    parts = token_ids(1, 209).split([207, 1, 1], 1)
    with torch.no_grad(), share_prefill(model, artifact, config) as session:
        if is_broken:
            model.model.layers[1].self_attn.k_proj.weight.data[0] = torch.nan
        try:
            for part in parts:
                found = model(input_ids=part, past_key_values=cache, use_cache=True)
                cache = found.past_key_values
                logits.append(found.logits[0].nan_to_num(nan=1e9))
        except DataError as error:
            return str(error)
    report = session.report()
    counts = (report.prefills, report.dense_prefills, report.selection_work)
    return torch.cat(logits).tolist(), counts


def does_something(
    artifact: Artifact, policy: str, option: str, monkeypatch: pytest.MonkeyPatch
) -> bool:
    """Whether an option changes something under a policy; else it is refused, for good reason."""
    changed, base = CHANGES[option]
    is_dense = policy == "dense" or (policy == "auto" and not artifact.policy.any())
    options = {"policy": policy, "min_tokens": 0, **({} if is_dense else {"max_density": 1.0})}
    done = partial(what_is_done, artifact, is_broken=option == "nonfinite")
    if policy == "dense" and option in ("precision", "fp8_error"):
        # That would be another attention than the model's own.
        with pytest.raises(ConfigError, match="policy 'dense'"):
            RuntimeConfig.from_dict({**options, **base, option: changed})
        return False
    before = done(RuntimeConfig.from_dict({**options, **base}))
    options |= {**base, option: changed}
    try:
        return done(RuntimeConfig.from_dict(options)) != before
    except ConfigError as error:
        refusal = str(error)
    assert f"{option} = {changed!r} does nothing to" in refusal
    with monkeypatch.context() as patch:
        patch.setattr(RuntimeConfig, "given", dict)
        assert done(RuntimeConfig.from_dict(options)) == before
    return False


@pytest.mark.parametrize("option", CHANGES)
@pytest.mark.parametrize("policy", [*POLICIES, *OWN_PARAMETERS])
def test_every_option_does_something_or_is_refused(
    policy: str, option: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    artifact = artifact_of((P, S, V, R), (S, S, M, D), (V, R, S, P))
    assert does_something(artifact, policy, option, monkeypatch) == reads(policy, option)


OF_PATTERNS = ("gamma", "sink_blocks", "local_blocks", "max_density")


@pytest.mark.parametrize("option", [*READ_BY, *OF_PATTERNS])
@pytest.mark.parametrize(
    ("heads", "read"),
    [
        ((D, D, D, D), ()),
        ((M, M, D, M), OF_PATTERNS),
        ((R, R, M, D), (*OF_PATTERNS, "sample_rows")),
        ((V, V, V, V), (*OF_PATTERNS, "sample_rows", "delta")),
        ((P, S, S, S), (*OF_PATTERNS, "slack", "pivot_rows", "check_rows")),
    ],
)
def test_every_option_does_something_to_a_plan_or_is_refused(
    heads: tuple[Policy, ...],
    read: tuple[str, ...],
    option: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    artifact = artifact_of(heads, heads, heads)
    assert does_something(artifact, "auto", option, monkeypatch) == (option in read)


@pytest.mark.parametrize(
    ("clusters", "read"), [(0, ()), (12, ("delta",)), (None, ("delta", "tau"))]
)
@pytest.mark.parametrize("option", ["delta", "tau"])
def test_the_papers_rule_reads_thresholds_where_there_are_clusters(
    clusters: int | None, read: tuple[str, ...], option: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    artifact = artifact_of((D,) * 4, (D,) * 4, (D,) * 4, clusters=clusters)
    assert does_something(artifact, "shareprefill", option, monkeypatch) == (option in read)


def test_a_fallback_reads_options_too() -> None:
    artifact = artifact_of((P, S, S, S), (D,) * 4, (D,) * 4)
    for fallback, read in ((R, ["sample_rows"]), (V, ["sample_rows", "delta"]), (D, [])):
        changed = artifact.fallback.masked_fill(artifact.policy == S, fallback)
        planned = replace(artifact, fallback=changed)
        for option in ("sample_rows", "delta"):
            given = RuntimeConfig.from_dict({option: 1})
            assert (option not in unread(planned, given)) == (option in read)


def test_an_option_that_no_head_reads_is_refused_by_name() -> None:
    artifact = artifact_of((R,) * 4, (R,) * 4, (R,) * 4)
    with pytest.raises(ConfigError, match=r"slack = 0\.1 .* 'auto' with this .* heads is share:"):
        make_plan(artifact, RuntimeConfig(slack=0.1))
    # Another policy than the plan's has readers of its own.
    assert make_plan(artifact, RuntimeConfig(policy="sampled", sample_rows=4)).sample_rows == 4


def test_all_options_are_changed_above() -> None:
    assert {*CHANGES, "policy"} == {field.name for field in fields(RuntimeConfig)}
