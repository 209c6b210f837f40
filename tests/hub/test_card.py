from __future__ import annotations

import json
import re
from dataclasses import replace
from typing import Any

import pytest
import torch
import yaml

from shareprefill.artifact import Artifact, Policy
from shareprefill.hub.card import code, model_card
from tests.audit.synthetic import with_gaps
from tests.support.tiny import tiny_artifact, tiny_llama

HOSTILE = (
    "a/b\n---\nlicense: mit",
    "`` ` `` <script>alert(1)</script>",
    "[click](javascript:alert(1)) | cell | <img src=x>",
    "```\n# heading\n```",
    "{{ template }} ${{ secrets.TOKEN }} : # - & * !tag",
    "\x1b[2J\u202e\u2028",
    "`",
)


@pytest.fixture(scope="module")
def artifact() -> Artifact:
    mixed = [[Policy.PIVOT, Policy.SHARE, Policy.DENSE, Policy.SAMPLED]] * 3
    made = tiny_artifact(tiny_llama(), mixed, summary={"cost": 0.5})
    return replace(made, model="organisation/model")


def front(card: str) -> dict[str, Any]:
    """The YAML head, which must end at the first line that is a line of dashes."""
    start, head, _ = card.split("---\n", 2)
    assert start == ""
    return yaml.safe_load(head)


def test_the_facts_are_the_artifact_s(artifact: Artifact) -> None:
    card = model_card(artifact, "clusters.st", "me/patterns")
    assert front(card)["base_model"] == "organisation/model"
    assert front(card)["library_name"] == "shareprefill"
    for line in (
        "| model, as its maker named it | `organisation/model` |",
        "| attention | 3 layers, 4 heads, 2 KV heads, head_dim 16 |",
        f"| hash of the attention weights | `{artifact.fingerprint.weights}` |",
        "| tokens a block | 16 |",
        "| thresholds | gamma 0.9, tau 0.2, delta 0.3 |",
        "| share | 3 | 0.9500 | 0.3000 |",
        "| pivot | 3 | 0.9500 | 0.3000 |",
        "sp pull me/patterns --file clusters.st --out clusters.st",
        "sp run --artifact clusters.st --model organisation/model prompt.txt",
    ):
        assert f"\n{line}\n" in card
    assert "vertical-slash" not in card
    (facts,) = re.findall(r"\n```json\n(.*?)\n```\n", card, re.DOTALL)
    assert json.loads(facts) == {"configuration": {}, "summary": {"cost": 0.5}}


def test_layers_that_were_not_captured_have_no_figures(artifact: Artifact) -> None:
    sampled = replace(artifact, policy=torch.full_like(artifact.policy, int(Policy.SAMPLED)))
    card = model_card(with_gaps(sampled, 1), "clusters.st", "me/patterns")
    assert "| dense | 4 | not measured | not measured |" in card
    assert "| expected recall, mean of all heads | 0.9500 |" in card


@pytest.mark.parametrize("name", ["sp-tiny", "../models/sp-ref", "/home/me/model", "a b/c"])
def test_only_a_hub_id_is_called_the_base_model(name: str, artifact: Artifact) -> None:
    card = model_card(replace(artifact, model=name), "a.st", "me/patterns")
    assert "base_model" not in front(card)
    assert f"--model {name if name == 'sp-tiny' else 'MODEL'} prompt.txt" in card


@pytest.mark.parametrize("text", HOSTILE)
def test_hostile_texts_stay_text(text: str, artifact: Artifact) -> None:
    fingerprint = replace(artifact.fingerprint, model_type=text)
    hostile = replace(
        artifact,
        model=text,
        fingerprint=fingerprint,
        configuration={text: text},
        summary={"data": [text]},
    )
    card = model_card(hostile, "a.st", "me/patterns")
    assert set(front(card)) == {"library_name", "tags"}
    # Without code spans and code blocks, nothing of the text is left.
    rest = re.sub(r"(?m)^(`{3,})\w+\n.*?\n\1$", "", card, flags=re.DOTALL)
    rest = re.sub(r"(?<!`)(`+)(?!`)(.*?[^`])\1(?!`)", "", rest)
    clean = model_card(artifact, "a.st", "me/patterns")
    clean = re.sub(r"(?m)^(`{3,})\w+\n.*?\n\1$", "", clean, flags=re.DOTALL)
    clean = re.sub(r"(?<!`)(`+)(?!`)(.*?[^`])\1(?!`)", "", clean)
    assert rest.replace("base_model", "") == clean.replace('base_model: "organisation/model"\n', "")
    assert card.replace("\n", "").isprintable()
    for line in card.splitlines():
        if line.startswith("| architecture"):
            assert len(re.findall(r"(?<!\\)\|", line)) == 3


def test_code_spans() -> None:
    assert code("plain") == "`plain`"
    assert code("a`b``c") == "```a`b``c```"
    assert code("`") == "`` ` ``"
    assert code("\n") == r"`\n`"
    assert len(code("x" * 10_000)) < 600
