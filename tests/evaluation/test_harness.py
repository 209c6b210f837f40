from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path

import pytest
import torch
from tokenizers.processors import TemplateProcessing

from shareprefill.artifact import Policy
from shareprefill.config import RuntimeConfig
from shareprefill.errors import ArtifactError, ConfigError, UnsupportedError
from shareprefill.evaluation.harness import harness_model
from shareprefill.models import load_tokenizer
from shareprefill.runtime.session import share_prefill
from tests.support.tiny import tiny_artifact, tiny_llama

needs_harness = pytest.mark.skipif(
    importlib.util.find_spec("lm_eval") is None,
    reason="needs lm-evaluation-harness: pip install 'shareprefill[lm-eval]'",
)


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer("sp-tiny")


@pytest.fixture
def model(tokenizer):
    return tiny_llama(vocab_size=len(tokenizer))


@needs_harness
def test_a_local_task_runs_under_a_policy(model, tokenizer, tmp_path: Path) -> None:
    import lm_eval
    from lm_eval.tasks import TaskManager

    rows = [
        {
            "context": f"Line {n}:" + " some words of text" * 40,
            "choices": [" yes", " no"],
            "gold": 1,
        }
        for n in range(2)
    ]
    data = tmp_path / "rows.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    task = tmp_path / "local_choice.yaml"
    task.write_text(
        "task: local_choice\ndataset_path: json\n"
        f"dataset_kwargs:\n  data_files: {json.dumps({'test': str(data)})}\n"
        "test_split: test\noutput_type: multiple_choice\ndoc_to_text: '{{context}}'\n"
        "doc_to_choice: '{{choices}}'\ndoc_to_target: gold\nmetric_list:\n  - metric: acc\n"
    )
    artifact = tiny_artifact(model, [[Policy.SAMPLED] * 4] * 3)
    lm = harness_model(model, tokenizer, artifact, RuntimeConfig(min_tokens=0, max_density=1.0))
    results = lm_eval.simple_evaluate(
        model=lm,
        tasks=["local_choice"],
        task_manager=TaskManager(include_path=str(tmp_path), include_defaults=False),
        bootstrap_iters=0,
    )
    assert results is not None
    assert results["n-samples"]["local_choice"]["effective"] == 2
    report = lm.session.report()
    # A request for each choice, or one for both where the harness sees that the prompt is the same.
    assert report.prefills in (2, 4)
    assert report.dense_prefills == 0
    assert report.density < 1

    # The very log likelihood of the model under a session of the same options.
    (found, _), *_ = lm.loglikelihood(
        [_request("loglikelihood", (rows[0]["context"], " no"), task="local_choice")]
    )
    prompt = tokenizer(rows[0]["context"]).input_ids
    answer = tokenizer(" no", add_special_tokens=False).input_ids
    ids = torch.tensor([prompt + answer])
    session = share_prefill(model, artifact, RuntimeConfig(min_tokens=0, max_density=1.0))
    with torch.no_grad(), session:
        logits = model(ids[:, :-1]).logits.log_softmax(-1)[0, -len(answer) :]
    expected = logits.gather(1, torch.tensor(answer)[:, None]).sum().item()
    assert found == pytest.approx(expected, abs=1e-4)


@needs_harness
def test_generation_runs_under_a_policy(model, tokenizer) -> None:
    artifact = tiny_artifact(model)
    lm = harness_model(model, tokenizer, artifact, RuntimeConfig(min_tokens=0))
    request = _request(
        "generate_until", ("some words of text " * 40, {"until": ["\n"], "max_gen_toks": 3})
    )
    assert isinstance(lm.generate_until([request])[0], str)
    assert lm.session.report().prefills == 1


@needs_harness
def test_no_prompt_ends_where_the_tokenizer_adds_an_eos(model) -> None:
    tokenizer = load_tokenizer("sp-tiny")
    bos, eos = tokenizer.bos_token, tokenizer.eos_token
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single=f"{bos} $A {eos}",
        special_tokens=[(bos, tokenizer.bos_token_id), (eos, tokenizer.eos_token_id)],
    )
    lm = harness_model(model, tokenizer, tiny_artifact(model), RuntimeConfig(min_tokens=0))
    expected = tokenizer("some words").input_ids[:-1]
    assert lm.tok_encode("some words") == expected
    assert lm.tok_encode("some words", add_special_tokens=False) == expected[1:]
    ids, mask = lm.tok_batch_encode(["some words"])
    assert ids.tolist() == [expected]
    assert mask.tolist() == [[1] * len(expected)]
    context, continuation = lm._encode_pair("some words", " more")
    assert context == expected
    assert tokenizer.eos_token_id not in continuation


@needs_harness
def test_only_one_request_at_a_time(model, tokenizer) -> None:
    with pytest.raises(ConfigError, match="batch_size = 8 is not allowed"):
        harness_model(model, tokenizer, tiny_artifact(model), batch_size=8)


@needs_harness
def test_an_artifact_of_another_model_is_refused(model, tokenizer) -> None:
    other = tiny_artifact(tiny_llama(seed=1))
    with pytest.raises(ArtifactError):
        harness_model(model, tokenizer, other)


def test_a_missing_harness_is_told(model, tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    monkeypatch.setitem(sys.modules, "lm_eval.models.huggingface", None)
    with pytest.raises(UnsupportedError, match=r"pip install 'shareprefill\[lm-eval\]'"):
        harness_model(model, tokenizer, tiny_artifact(model))


def _request(kind: str, arguments: tuple, task: str = "t"):
    from lm_eval.api.instance import Instance

    return Instance(request_type=kind, doc={}, arguments=arguments, idx=0, metadata=(task, 0, 1))
