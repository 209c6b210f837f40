import pytest
import torch

from shareprefill.artifact import Policy
from shareprefill.config import RuntimeConfig
from shareprefill.errors import ConfigError
from shareprefill.policy_names import SELECTION_POLICIES, WITHOUT_GAMMA
from shareprefill.runtime.core import SparsePrefill
from shareprefill.runtime.ops.block_sparse_attention import block_sparse_attention
from shareprefill.runtime.ops.blocks import causal_lists
from shareprefill.runtime.plan import make_plan, plan_without_artifact
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
