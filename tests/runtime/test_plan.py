import pytest
import torch

from shareprefill.artifact import Policy
from shareprefill.config import RuntimeConfig
from shareprefill.errors import ConfigError
from shareprefill.policy_names import SELECTION_POLICIES, WITHOUT_GAMMA
from shareprefill.runtime.core import SparsePrefill
from shareprefill.runtime.ops.block_sparse_attention import block_sparse_attention
from shareprefill.runtime.ops.blocks import always_blocks, causal_lists
from shareprefill.runtime.plan import make_plan, plan_without_artifact
from shareprefill.runtime.policies import make_policy
from shareprefill.runtime.records import on_host
from tests.support.tiny import tiny_artifact, tiny_llama

P, S, D = Policy.PIVOT, Policy.SHARE, Policy.DENSE


@pytest.mark.parametrize("name", ["pivot_rows", "sample_rows", "check_rows"])
def test_a_block_has_so_many_rows(name: str) -> None:
    """Also for engines, which make plans without `share_prefill`."""
    artifact = tiny_artifact(tiny_llama())
    rows = {name: artifact.block_size + 1}
    with pytest.raises(ConfigError, match=f"{name} = 17 is not allowed: a block has 16 rows"):
        make_plan(artifact, RuntimeConfig.from_dict(rows))
    with pytest.raises(ConfigError, match="sample_rows = 129 .* a block has 128 rows"):
        plan_without_artifact(1, 1, RuntimeConfig(policy="sampled", sample_rows=129))


@pytest.mark.parametrize("policy", SELECTION_POLICIES)
def test_a_policy_for_every_head_needs_no_artifact(policy: str):
    """With every block read, a layer gives what dense attention gives."""
    gamma = None if policy in WITHOUT_GAMMA else 1.0
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
    reads = {"sink_blocks": sink_blocks, "local_blocks": local_blocks}
    expected = always_blocks(900, 0, plan.block_size, **reads).sum().item()
    assert on_host([record])[0].blocks.tolist() == [expected] * 4


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
