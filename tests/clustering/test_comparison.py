from __future__ import annotations

import itertools
import json
from dataclasses import replace
from typing import Any

import pytest
import torch

from shareprefill.artifact import Artifact, Policy, Thresholds
from shareprefill.clustering.comparison import (
    ABSENT,
    Setting,
    compare_artifacts,
    match_clusters,
)
from shareprefill.commands.diff import show_comparison
from shareprefill.errors import ArtifactError
from tests.audit.synthetic import with_gaps
from tests.support.tiny import tiny_artifact, tiny_llama

SAMPLED, PIVOT, SHARE, DENSE = Policy.SAMPLED, Policy.PIVOT, Policy.SHARE, Policy.DENSE
BEFORE = [
    [PIVOT, SHARE, SAMPLED, SAMPLED],
    [SHARE, SAMPLED, SAMPLED, SAMPLED],
    [SAMPLED, SAMPLED, SAMPLED, DENSE],
]


@pytest.fixture(scope="module")
def model() -> Any:
    return tiny_llama()


def labels(*rows: str) -> torch.Tensor:
    return torch.tensor([[int(label) for label in row.split()] for row in rows], dtype=torch.int32)


def artifact(model: Any, policies: list[list[Policy]] = BEFORE, **changes: Any) -> Artifact:
    changes.setdefault("cluster", labels("0 0 1 1", "0 1 1 2", "2 2 2 2"))
    return tiny_artifact(model, policies, **changes)


def test_an_artifact_equals_itself(model: Any, capfd: pytest.CaptureFixture[str]) -> None:
    one = artifact(model)
    found = compare_artifacts(one, replace(one, code=one.code.clone()))
    assert not found.differs
    assert (found.moved, found.values, found.settings) == ((), {}, ())
    assert (found.rand_index, found.heads) == (1.0, 12)
    show_comparison(found)
    assert capfd.readouterr().out == "the artifacts are equal: 12 heads of tiny\n"


def test_layers_that_were_not_captured_are_equal(model: Any) -> None:
    gaps = with_gaps(tiny_artifact(model), 1)
    same = compare_artifacts(gaps, gaps)
    assert (same.values, same.differs) == ({}, False)
    captured = compare_artifacts(gaps, tiny_artifact(model))
    assert captured.values["recall"] == gaps.policy.shape[1]
    assert captured.recall[0] == pytest.approx(gaps.recall[[0, 2]].mean().item())


def test_renumbered_clusters_are_the_same_clusters(model: Any) -> None:
    one = artifact(model)
    found = compare_artifacts(one, replace(one, cluster=labels("2 2 0 0", "2 0 0 1", "1 1 1 1")))
    assert found.differs
    assert (found.moved, found.rand_index) == ((), 1.0)


def test_heads_that_moved_by_hand(model: Any) -> None:
    after = [row.copy() for row in BEFORE]
    after[0][0], after[0][1] = SHARE, PIVOT  # the pivot of cluster 0 is another head
    after[2][3] = SAMPLED
    one = artifact(model)
    # Head 1.2 leaves cluster 1 for one of its own, which is numbered last in either case.
    two = artifact(model, after, cluster=labels("1 1 0 0", "1 0 3 2", "2 2 2 2"))
    found = compare_artifacts(one, two)
    rows = {h.head: (h.policy, h.pivot, h.cluster) for h in found.moved}
    assert rows == {
        "0.0": (("pivot", "share"), ("0.0", "0.1"), (0, 0)),
        "0.1": (("share", "pivot"), ("0.0", "0.1"), (0, 0)),
        "1.0": (("share", "share"), ("0.0", "0.1"), (0, 0)),
        "1.2": (("sampled", "sampled"), (None, None), (1, 3)),
        "2.3": (("dense", "sampled"), (None, None), (2, 2)),
    }
    assert [h.head for h in found.moved] == ["0.0", "0.1", "1.0", "1.2", "2.3"]
    # Sizes 3, 4, 5 become 3, 3, 5, 1: pairs together in both 3 + 3 + 10 = 16, before
    # 3 + 6 + 10 = 19, after 16, of 66 in all; expected by chance 19 * 16 / 66.
    chance = 19 * 16 / 66
    assert found.rand_index == pytest.approx((16 - chance) / ((19 + 16) / 2 - chance))


def test_figures_values_and_settings(model: Any) -> None:
    one = artifact(
        model,
        configuration={"cluster": {"k": None, "tau": 0.2}, "flag": True, "old": []},
        summary={"cost": 0.5, "density": 0.3, "clusters": 3},
    )
    density, gamma = one.density.clone(), one.gamma.clone()
    density[1] = 0.6
    gamma[0, :2] = 0.8
    two = replace(
        one,
        density=density,
        gamma=gamma,
        thresholds=Thresholds(gamma=0.9, tau=0.25, delta=0.3),
        configuration={"cluster": {"k": 4, "tau": 0.2}, "flag": 1, "new": "[red]x"},
        summary={"cost": 0.4, "density": 0.4, "clusters": 3},
    )
    found = compare_artifacts(one, two)
    assert found.density == pytest.approx((0.3, 0.4))
    assert found.recall == pytest.approx((0.95, 0.95))
    assert found.cost == (0.5, 0.4)
    assert found.values == {"gamma": 2, "density": 4}
    assert found.settings == (
        Setting("configuration.cluster.k", None, 4),
        Setting("configuration.flag", True, 1),
        Setting("configuration.new", ABSENT, "[red]x"),
        Setting("configuration.old", [], ABSENT),
        Setting("thresholds.tau", 0.2, 0.25),
    )
    written = json.loads(json.dumps(found.to_dict()))["settings"]
    assert written[0] == {"name": "configuration.cluster.k", "before": None, "after": 4}
    assert written[2] == {"name": "configuration.new", "after": "[red]x"}


def test_codes_of_another_size_differ_everywhere(model: Any) -> None:
    one = artifact(model)
    assert compare_artifacts(one, artifact(model, code=torch.zeros(3, 4, 9))).values == {"code": 12}


def test_no_cost_and_no_cluster(model: Any) -> None:
    alone = [[SAMPLED] * 4] * 3
    none = artifact(model, alone, cluster=torch.full((3, 4), -1, dtype=torch.int32))
    found = compare_artifacts(none, artifact(model, alone, summary={"cost": "?"}))
    assert found.cost == (None, None)
    assert [head.cluster for head in found.moved[:4]] == [(-1, 0), (-1, 0), (-1, 1), (-1, 1)]
    assert compare_artifacts(none, none).moved == ()


def test_matching_keeps_the_most_heads() -> None:
    # Greedily, cluster 0 would take its two heads in 0 and leave 1 with none: 2 heads kept, not 3.
    before = torch.tensor([0, 0, 0, 1, 1])
    after = torch.tensor([0, 0, 1, 0, 0])
    assert match_clusters(before, after).tolist() == [1, 1, 0, 1, 1]
    random = torch.randint(-1, 5, (40,))
    order = torch.randperm(5)
    renamed = torch.where(random < 0, random, order[random])
    assert torch.equal(match_clusters(random, renamed), random)


def test_of_equal_matchings_the_first_heads_keep_their_cluster() -> None:
    before = torch.tensor([0, 0, 1, 2])
    for labels in itertools.permutations(range(3)):
        after = torch.tensor(labels)[[1, 0, 2, 2]]
        assert match_clusters(before, after).tolist() == [0, 3, 1, 1]


def test_the_table_shows_twenty_heads(model: Any, capfd: pytest.CaptureFixture[str]) -> None:
    wide = tiny_llama(num_hidden_layers=6)
    one = tiny_artifact(wide, configuration={"note": "[bold]kept[/bold]"})
    changed = torch.full_like(one.policy, int(DENSE))
    two = replace(one, policy=changed, fallback=changed.clone(), configuration={})
    found = compare_artifacts(one, two)
    assert len(found.moved) == len(found.to_dict()["moved"]) == 24
    show_comparison(found)
    out = capfd.readouterr().out
    assert out.count("sampled > dense") == 20
    assert "and 4 more; --json has all" in out
    assert "24 of 24 heads moved" in out
    assert '"[bold]kept[/bold]"' in out


def test_other_geometry_is_refused_with_both_named(model: Any) -> None:
    other = replace(tiny_artifact(tiny_llama(num_hidden_layers=2)), model="other")
    with pytest.raises(ArtifactError, match=r"tiny \(llama of 3 layers.*other \(llama of 2 layers"):
        compare_artifacts(artifact(model), other)
