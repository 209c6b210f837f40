from __future__ import annotations

import math
import re
from dataclasses import replace
from html import unescape
from pathlib import Path
from typing import Any

import pytest
import torch

from shareprefill import share_prefill
from shareprefill.artifact import Policy
from shareprefill.audit.trace import trace_heads, trace_page
from shareprefill.config import RuntimeConfig
from shareprefill.runtime.reasons import reason
from shareprefill.runtime.report import LayerReport
from tests.audit.synthetic import with_gaps
from tests.report.browser import running_browser
from tests.support.tiny import tiny_artifact, tiny_llama, token_ids

P, S, R, V = Policy.PIVOT, Policy.SHARE, Policy.SAMPLED, Policy.VERTICAL_SLASH
POLICIES = [[P, S, R, V], [S, S, P, R], [V, R, S, S]]
# A slack of 1 lets every head share.
CONFIG = RuntimeConfig(gamma=0.6, slack=1.0, min_tokens=0, max_density=1.0)


def traced(config: RuntimeConfig = CONFIG, tokens: int = 160, **changes: Any) -> Any:
    model = tiny_llama()
    artifact = tiny_artifact(model, POLICIES, **changes)
    with share_prefill(model, artifact, config, keep_maps=True) as session, torch.no_grad():
        model(input_ids=token_ids(1, tokens))
    return artifact, config, session.report(), session.sketches()


def page_of(*found: Any) -> str:
    return trace_page(*found, prompt_tokens=160, least_tokens=500, device="cpu")


@pytest.fixture(scope="module")
def page() -> str:
    return page_of(*traced())


def test_a_sketch_is_the_map_and_what_was_read() -> None:
    *_, report, sketches = traced()
    assert [*sketches] == [0, 1, 2]
    causal = torch.ones(10, 10, dtype=torch.bool).tril()
    for layer in report.layers:
        sketch = sketches[layer.layer]
        assert (sketch.queries, sketch.keys, sketch.maps.shape) == (160, 160, (4, 10, 10))
        rows = sketch.maps.float().sum(-1)
        torch.testing.assert_close(rows, torch.ones_like(rows), rtol=2e-3, atol=2e-3)
        assert not sketch.read[:, ~causal].any()
        shares = sketch.read.float().sum((1, 2)) / causal.sum()
        assert shares.tolist() == pytest.approx(layer.density, abs=1e-4)
        inside = (sketch.maps.float() * sketch.read.float()).sum((1, 2)) / 10
        assert inside.tolist() == pytest.approx(layer.recall, abs=5e-3)


def test_long_maps_are_averaged_and_without_a_wish_none_is_kept() -> None:
    *_, sketches = traced(tokens=16 * 70)
    assert sketches[0].maps.shape == (4, 64, 64)
    model = tiny_llama()
    with share_prefill(model, tiny_artifact(model, POLICIES), CONFIG) as session, torch.no_grad():
        model(input_ids=token_ids(1, 64))
    assert session.sketches() == {}


def test_every_head_is_told_of(page: str) -> None:
    artifact, config, report, _ = traced()
    heads = trace_heads(artifact, config, report, "cpu")
    assert len(heads) == 12
    assert {head.pivot for head in heads if head.planned == "share"} == {(0, 0), (1, 2)}
    text = unescape(page)
    for head in heads:
        assert f'id="head-{head.layer}-{head.head}"' in page
        assert text.count(f"head {head.place}: {head.taken}\nplanned {head.planned}\n") == 3
        assert head.reason in text
    assert re.findall(r'<details id="(pivot[^"]*)">', page) == ["pivot-1-2", "pivot-0-0"]
    # A pivot and its sharers: two small pictures each.
    assert page.count("data:image/png") == 2 * (2 + 5)
    links = set(re.findall(r'<a href="#((?:pivot|head)[^"]*)"', page))
    assert links <= set(re.findall(r'id="([^"]+)"', page))
    assert "<script" not in page


def test_a_run_that_covers_less_than_promised_is_no_good_news(page: str) -> None:
    assert 'class="verdict doubtful"' in page
    kept = page_of(*traced(recall=torch.full((3, 4), 0.5)))
    assert 'class="verdict"' in kept


def test_a_run_without_sparse_prefills_says_so() -> None:
    html = page_of(*traced(RuntimeConfig(min_tokens=500)))
    assert "Everything ran dense: no prefill had 500 tokens" in html


def test_the_paper_s_rule_and_policies_of_no_artifact_are_told() -> None:
    html = unescape(page_of(*traced(replace(CONFIG, policy="shareprefill", delta=1.0, slack=None))))
    assert "by the paper's rule" in html
    assert "JS distance to its pivot" in html
    assert "streaming" in page_of(*traced(CONFIG.with_policy("streaming")))


def layer(planned: Policy, taken: Policy, covered: float = math.nan, **changes: Any) -> LayerReport:
    fields: dict[str, Any] = {
        "layer": 0,
        "first_head": 0,
        "planned": (planned.label,),
        "policies": (taken.label,),
        "density": (0.5,),
        "covered": (covered,),
        "min_coverage": (0.9,),
        "distance": (math.nan,),
        "tau": None,
        "recall": (1.0,),
    }
    return LayerReport(**fields | changes)


@pytest.mark.parametrize(
    ("did", "words"),
    [
        (layer(S, S, 0.95), "check passed: 0.950 of"),
        (layer(S, R, 0.85), "check failed: 0.850 of"),
        (layer(S, R), "check failed: its pivot's pattern rests on NaN or Inf"),
        (layer(S, Policy.DENSE, 0.95), "its pattern was denser than 0.6 of"),
        (layer(S, Policy.DENSE, 0.85), "0.900 are needed; its pattern was denser"),
        (layer(R, Policy.DENSE), "its pattern was denser than 0.6 of"),
        (layer(V, R), "not highly sparse"),
        (layer(P, P), "as planned: it gives its pattern"),
        (layer(Policy.DENSE, Policy.DENSE), "as planned: all blocks"),
        (layer(S, S, tau=0.2, distance=(0.1,)), "0.100, below tau = 0.2"),
        (layer(S, V, tau=0.2, distance=(0.3,)), "0.300, not below tau = 0.2"),
        (layer(S, V, tau=0.2), "highly sparse (JS distance to uniform above 0.3)"),
    ],
)
def test_reasons(did: LayerReport, words: str) -> None:
    assert words in reason(did, 0, max_density=0.6, delta=0.3)


@pytest.mark.parametrize(("width", "dark"), [(1400, False), (420, True)])
def test_a_browser_shows_it(tmp_path: Path, page: str, width: int, dark: bool) -> None:
    path = tmp_path / "trace.html"
    # All folds open.
    path.write_text(page.replace("<details", "<details open"), encoding="utf-8")
    with running_browser(tmp_path / "profile") as browser:
        shown = browser.render(path, width, dark=dark)
    assert shown.complaints == []
    assert (shown.width, shown.wide) == (width, [])
    assert "check passed" in shown.text


def test_held_out_prompts_are_named_where_they_said_something() -> None:
    artifact, config, report, sketches = traced()
    measured = artifact.recall.mean().item()
    text = unescape(page_of(artifact, config, report, sketches))
    assert f"; held-out prompts had {measured:.1%}." in text
    report = replace(report, layers=report.layers[1:2])
    text = unescape(page_of(with_gaps(artifact, 1), config, report, sketches))
    assert "held-out prompts had" not in text
    assert "nan" not in text
