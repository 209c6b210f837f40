"""The code of guides in docs/ runs as it stands there."""

from __future__ import annotations

import re
import sys
import textwrap
import tomllib
from pathlib import Path
from typing import Any

import pytest

from shareprefill.calib.prompts import make_prompts
from shareprefill.calib.tasks import generate, generation, score
from shareprefill.config import CalibrateConfig
from shareprefill.evaluation.config import EvalConfig
from shareprefill.evaluation.questions import make_questions
from shareprefill.models import load_tokenizer
from shareprefill.policy_names import GROUP, listed_policies
from shareprefill.runtime.policies import make_policy
from shareprefill.testing import check_policy
from shareprefill.tokens import encode
from tests.support.tiny import tiny_llama, token_ids

DOCS = Path(__file__).parents[1] / "docs"


def blocks_of(page: str) -> list[str]:
    """The indented blocks of a page; blank lines within one belong to it."""
    found = re.findall(r"(?m)(?:^    .*\n(?:\n+(?=    ))?)+", (DOCS / page).read_text("utf-8"))
    return [textwrap.dedent(block) for block in found]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    yield tmp_path
    sys.modules.pop("strided", None)


def test_the_guide_to_a_data_set(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    script, _, task = blocks_of("how-to/add-a-data-set.md")
    tokenizer = load_tokenizer("sp-tiny")
    exec(script, {})
    config = CalibrateConfig(model="m", data=("orders.jsonl",), samples=30, length=2048)
    assert all(len(prompt.input_ids) == 2048 for prompt in make_prompts(config, tokenizer))
    asked = EvalConfig(artifact=None, model="m", policies=("oracle",), samples=20)
    questions = make_questions("ruler:orders.jsonl", 8192, asked, tokenizer, None)
    assert {question.metric for question in questions} == {"string_match_part"}
    assert all(len(question.input_ids) > 2048 for question in questions)
    names: dict[str, Any] = {}
    exec(task, names)
    monkeypatch.setitem(generation._DRAFTS, "orders", names["OrderDraft"])
    for length in (200, 1500):
        example = generate("orders", tokenizer, length, 3)
        asked_for = re.search(r"What does order (A\d+) cost\? It costs\Z", example.prompt)
        assert asked_for
        assert f"Order {asked_for[1]} costs {example.answers[0]}.\n" in example.prompt
        assert score(example, example.answer)
        assert length - 20 < len(encode(tokenizer, example.prompt)) <= length


def test_the_guide_to_a_policy(folder: Path) -> None:
    file, mean_keys, its_test, commands, session, entry = blocks_of("add-a-policy.md")
    assert file.count("\n") < 40
    (folder / "strided.py").write_text(file)
    (folder / "my" / "folder").mkdir(parents=True)
    (folder / "my" / "folder" / "strided.py").write_text(file)
    names: dict[str, Any] = {"model": tiny_llama(), "inputs": {"input_ids": token_ids(1, 600)}}
    names["inputs"]["attention_mask"] = names["inputs"]["input_ids"] > -1
    exec(file, names)
    exec(mean_keys, names)
    check_policy(names["MeanKeys"]())
    exec(its_test, names)
    names["test_strided"]()
    exec(session, names)
    assert names["session"].config.policy == "strided:Strided:stride=2"
    assert names["session"].report().prefills == 1
    written = re.findall(r"--polic(?:y|ies) (\S+)", commands)
    policies = [policy for text in written for policy in listed_policies(text)]
    assert len(policies) == 6
    for policy in policies:
        make_policy(policy)
    points = tomllib.loads(entry)["project"]["entry-points"]
    assert points == {GROUP: {"strided": "strided:Strided"}}
