from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from shareprefill.artifact import Artifact, Policy, load_artifact, save_artifact
from shareprefill.config import RuntimeConfig
from shareprefill.errors import ArtifactError, ConfigError, DataError, ShareprefillError
from shareprefill.evaluation import runner, suite
from shareprefill.evaluation.config import EvalConfig
from shareprefill.evaluation.questions import Question, make_questions
from shareprefill.evaluation.results import Evaluation
from shareprefill.evaluation.runner import (
    DENSE_VARIANT,
    Outcome,
    PromptMeasurement,
    variants_of,
)
from shareprefill.evaluation.suite import OutcomeCache, evaluate
from shareprefill.evaluation.tables import markdown
from shareprefill.files import locked_folder
from shareprefill.models import load_model, load_tokenizer
from shareprefill.runtime.generation import generate, relative_error
from shareprefill.runtime.interface import is_attached
from shareprefill.runtime.session import share_prefill
from tests.support.checkpoint import change_outside_of_attention, save_checkpoint
from tests.support.tiny import tiny_artifact, tiny_llama

LENGTH = 400


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a checkpoint and an artifact for it."""
    folder = tmp_path_factory.mktemp("evaluation")
    save_checkpoint(folder / "model")
    model = load_model(str(folder / "model"))
    save_artifact(_artifact(model, folder), folder / "clusters.st")
    return folder


def _artifact(model: Any, folder: Path) -> Artifact:
    kinds = [Policy.PIVOT, Policy.SHARE, Policy.SAMPLED, Policy.VERTICAL_SLASH]
    return replace(tiny_artifact(model, [kinds] * 3), model=str(folder / "model"))


def config(folder: Path, **changes: Any) -> EvalConfig:
    options = {
        "artifact": str(folder / "clusters.st"),
        "tasks": ("variable_tracking",),
        "lengths": (LENGTH,),
        "samples": 2,
        "max_density": 1.0,
    }
    return EvalConfig(**{**options, **changes})


@pytest.fixture(scope="module")
def evaluation(folder: Path) -> Evaluation:
    return evaluate(
        config(
            folder,
            tasks=("variable_tracking", "perplexity"),
            policies=("sampled", "dense", "auto"),
            gammas=(0.6, 0.95),
            bins=3,
        ),
        out=folder / "out",
    )


def test_a_cell_for_every_task_policy_and_gamma(evaluation: Evaluation) -> None:
    # Nothing is told of decode steps, which were those of dense attention.
    assert all(cell.answer_kl is cell.decode_density is None for cell in evaluation.cells)
    found = [(cell.task, cell.label) for cell in evaluation.cells]
    labels = ["dense", "sampled, gamma 0.6", "sampled, gamma 0.95"]
    labels += ["auto, gamma 0.6", "auto, gamma 0.95"]
    assert found == [(t, name) for t in ("variable_tracking", "perplexity") for name in labels]
    assert Evaluation.from_dict(json.loads(evaluation.to_json())) == evaluation
    for cell in evaluation.cells:
        assert cell.prompts == 2
        assert LENGTH * 0.9 < cell.tokens <= LENGTH
        assert cell.ttft_s is not None
        assert cell.ttft_s.value > 0
        assert len(cell.bins) == (3 if cell.task == "perplexity" else 0)
    assert evaluation.context["device"] == "CPU"


def test_artifacts_are_compared_as_they_plan(folder: Path, tmp_path: Path) -> None:
    kinds = [Policy.SAMPLED] * 4
    model = load_model(str(folder / "model"))
    for name, gamma in (("few", 0.5), ("many", 0.95)):
        planned = tiny_artifact(model, [kinds] * 3)
        planned = replace(planned, gamma=torch.full_like(planned.gamma, gamma))
        save_artifact(planned, tmp_path / f"{name}.st")
    others = tuple(str(tmp_path / f"{name}.st") for name in ("few", "many"))
    asked = config(folder, policies=("sampled", "auto"), gammas=(0.5, 0.95), others=others)
    found = evaluate(asked)
    labels = ["sampled, gamma 0.5", "sampled, gamma 0.95"]
    labels += [f"auto, artifact {name}" for name in ("clusters", "few", "many")]
    assert [cell.label for cell in found.cells] == ["dense", *labels]
    few, many = found.cells[-2:]
    for planned, alike in zip((few, many), found.cells[1:3], strict=True):
        assert planned.recall == alike.recall
        assert planned.density == alike.density
    assert Evaluation.from_dict(json.loads(found.to_json())) == found
    assert len(found.context["others"]) == 2
    # Of another model, or two that could not be told apart.
    save_artifact(tiny_artifact(tiny_llama(seed=1)), tmp_path / "other.st")
    with pytest.raises(ArtifactError):
        evaluate(replace(asked, others=(str(tmp_path / "other.st"),)))
    with pytest.raises(ConfigError, match="files of different names"):
        replace(asked, others=(others[0], others[0]))
    with pytest.raises(ConfigError, match="auto for more artifacts"):
        replace(asked, policies=("sampled",))


def test_dense_attention_has_no_error(evaluation: Evaluation) -> None:
    dense = evaluation.cell("perplexity", LENGTH, "dense")
    assert dense.difference is None
    assert dense.layer_errors == ()
    assert (dense.density.value, dense.selection_work.value) == (1.0, 0.0)
    assert (dense.kl, dense.top1_agreement, dense.speedup) == (None, None, None)
    assert dense.bins[0].start == 0
    assert dense.bins[-1].stop == LENGTH


def test_more_mass_costs_density_and_saves_error(evaluation: Evaluation) -> None:
    for task in ("variable_tracking", "perplexity"):
        for policy in ("sampled", "auto"):
            few, many = (evaluation.cell(task, LENGTH, policy, gamma=g) for g in (0.6, 0.95))
            assert few.density.value < many.density.value < 1
            assert few.recall is not None
            assert many.recall is not None
            assert many.recall_worst is not None
            assert few.recall.value < many.recall.value
            assert few.kl is not None
            assert many.kl is not None
            assert 0 < many.kl.value < few.kl.value
            assert many.recall_worst.value < many.recall.value
            assert len(many.layer_errors) == 3
            assert sum(e.value for e in many.layer_errors) < sum(e.value for e in few.layer_errors)
            assert sum(many.heads.values()) == 2 * 12


def test_the_figures_are_those_of_a_session(folder: Path, evaluation: Evaluation) -> None:
    model = load_model(str(folder / "model"))
    tokenizer = load_tokenizer(str(folder / "model"))
    runtime = RuntimeConfig(policy="sampled", gamma=0.6, min_tokens=0, max_density=1.0)
    questions = make_questions("variable_tracking", LENGTH, config(folder), tokenizer, longest=None)
    recalls, errors, scores, densities = [], [], [], []
    for question in questions:
        session = share_prefill(model, folder / "clusters.st", runtime, measure_recall=True)
        ids, new_tokens = question.input_ids, question.new_tokens
        dense = generate(model, tokenizer, ids, max_new_tokens=new_tokens)
        with session:
            sparse = generate(model, tokenizer, ids, max_new_tokens=new_tokens)
        report = session.report()
        recalls += [recall for layer in report.layers for recall in layer.recall or ()]
        errors.append(relative_error(sparse.hidden, dense.hidden))
        scores.append(question.score(sparse.text))
        densities.append(report.density)
    cell = evaluation.cell("variable_tracking", LENGTH, "sampled", gamma=0.6)
    assert cell.recall is not None
    assert cell.hidden_error is not None
    assert cell.recall.value == pytest.approx(sum(recalls) / len(recalls), abs=1e-4)
    assert cell.hidden_error.value == pytest.approx(sum(errors) / 2, rel=1e-3)
    assert cell.score.value == sum(scores) / 2
    assert cell.density.value == pytest.approx(sum(densities) / 2)


def test_the_first_layers_error_is_that_of_its_output(folder: Path, evaluation: Evaluation) -> None:
    """Layer 0 has the same inputs in both runs: its error is seen from outside."""
    model = load_model(str(folder / "model"))
    tokenizer = load_tokenizer(str(folder / "model"))
    runtime = RuntimeConfig(policy="sampled", gamma=0.6, min_tokens=0, max_density=1.0)
    outputs: list[torch.Tensor] = []
    projection = model.model.layers[0].self_attn.o_proj
    projection.register_forward_pre_hook(lambda _module, inputs: outputs.append(inputs[0]))
    errors = []
    for question in make_questions("perplexity", LENGTH, config(folder), tokenizer, longest=None):
        outputs.clear()
        with torch.no_grad():
            model(input_ids=question.input_ids[None])
            with share_prefill(model, folder / "clusters.st", runtime):
                model(input_ids=question.input_ids[None])
        dense, sparse = outputs
        errors.append(relative_error(sparse, dense))
    cell = evaluation.cell("perplexity", LENGTH, "sampled", gamma=0.6)
    assert cell.layer_errors[0].value == pytest.approx(sum(errors) / 2, rel=1e-3)
    assert cell.layer_errors[0].value > 0.01


@pytest.mark.parametrize("task", ["variable_tracking", "perplexity"])
def test_the_divergence_is_that_of_all_logits(
    folder: Path, evaluation: Evaluation, task: str
) -> None:
    model = load_model(str(folder / "model"))
    tokenizer = load_tokenizer(str(folder / "model"))
    runtime = RuntimeConfig(policy="sampled", gamma=0.6, min_tokens=0, max_density=1.0)
    kl, agreement = [], []
    for question in make_questions(task, LENGTH, config(folder), tokenizer, longest=None):
        ids = question.input_ids[None]
        with torch.no_grad():
            dense = model(input_ids=ids).logits[0].double().log_softmax(-1)
            with share_prefill(model, folder / "clusters.st", runtime):
                sparse = model(input_ids=ids).logits[0].double().log_softmax(-1)
        kl.append((dense.exp() * (dense - sparse)).sum(-1).mean().item())
        agreement.append((dense.argmax(-1) == sparse.argmax(-1)).double().mean().item())
    cell = evaluation.cell(task, LENGTH, "sampled", gamma=0.6)
    assert cell.kl is not None
    assert cell.top1_agreement is not None
    assert cell.kl.value == pytest.approx(sum(kl) / 2, rel=1e-3)
    assert cell.kl.value > 0.001
    assert cell.kl.low == pytest.approx(min(kl), rel=1e-3)
    assert cell.top1_agreement.value == pytest.approx(sum(agreement) / 2)
    assert cell.top1_agreement.value < 1


def test_dense_and_sparse_prefills_take_turns(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One slow dense prefill is nobody's baseline."""
    model = load_model(str(folder / "model"))
    tokenizer = load_tokenizer(str(folder / "model"))
    asked = config(folder, samples=1, policies=("sampled",))
    (question,) = make_questions("perplexity", LENGTH, asked, tokenizer, longest=None)
    took, order = iter([100.0, *[2.0] * 20]), []
    prefill = PromptMeasurement._prefill

    def timed(self: PromptMeasurement) -> float:
        prefill(self)
        order.append("sparse" if is_attached(model) else "dense")
        return 0.5 if is_attached(model) else next(took)

    monkeypatch.setattr(PromptMeasurement, "_prefill", timed)
    options = {"length": LENGTH, "bins": 1, "measure": False, "warm_up": False}
    measurement = PromptMeasurement(model, tokenizer, question, repeats=asked.repeats, **options)
    (variant,) = variants_of(asked, [load_artifact(folder / "clusters.st")])
    outcome = measurement.run(variant)
    assert order == ["dense", "sparse", *["dense", "sparse"] * 3]
    assert (outcome.ttft_s, outcome.dense_ttft_s) == (0.5, 2.0)
    assert outcome.kl is None
    assert measurement.run(DENSE_VARIANT).ttft_s == 2.0
    assert [replace(asked, samples=n).repeats for n in (1, 2, 3, 20)] == [3, 2, 1, 1]


def test_options_reach_the_artifacts_whose_heads_read_them() -> None:
    model = tiny_llama()
    dense, other = tiny_artifact(model, [[Policy.DENSE] * 4] * 3), tiny_artifact(model)
    options: dict[str, Any] = {"artifact": "dense.st", "max_density": 1.0}
    asked = EvalConfig(**options, policies=("auto", "sampled"), gammas=(0.6, 0.9))
    found = [
        (v.policy, v.settings, v.runtime and v.runtime.max_density)
        for v in variants_of(asked, [dense])
    ]
    assert found == [
        ("auto", {}, None),
        ("sampled", {"gamma": 0.6}, 1.0),
        ("sampled", {"gamma": 0.9}, 1.0),
    ]
    both = variants_of(EvalConfig(**options, others=("other.st",)), [dense, other])
    assert [v.settings for v in both] == [{"artifact": "dense"}, {"artifact": "other"}]
    assert [v.runtime and v.runtime.max_density for v in both] == [None, 1.0]
    with pytest.raises(ConfigError, match=r"max_density = 1\.0 does nothing to policy 'auto' with"):
        variants_of(EvalConfig(**options), [dense])
    with pytest.raises(ConfigError, match=r"gamma = 0\.9 does nothing to policy 'auto' with this"):
        variants_of(EvalConfig(artifact="dense.st", gammas=(0.9,)), [dense])


def test_outcomes_are_those_of_their_own_conditions() -> None:
    """What was timed otherwise, beside others, or not measured, is measured again."""
    known: Any = SimpleNamespace(values={"model": "m", "device": "CPU", "threads": 1})
    asked = EvalConfig(model="m", policies=("sampled",), samples=1)

    def kept(config: EvalConfig, **values: Any) -> Any:
        context: Any = SimpleNamespace(values={**known.values, **values})
        return suite._facts(context, variants_of(config, []), config)

    changes: tuple[dict[str, Any], ...] = (
        *({"times": False}, {"measure": False}, {"workers": 2}),
        *({"samples": 2}, {"policies": ("smoothed",)}),
    )
    for change in changes:
        assert kept(replace(asked, **change)) != kept(asked), change
    assert kept(asked, device="GPU") != kept(asked)
    # Neither more prompts at one time each nor another name of the model is another condition.
    assert kept(replace(asked, samples=9)) == kept(replace(asked, samples=20), model="n")


def test_the_first_prompt_of_a_length_is_warmed_up() -> None:
    def asked(*numbers: int) -> list[Question]:
        return [Question(torch.tensor([number]), "perplexity") for number in numbers]

    questions = {("perplexity", 8): asked(1, 2), ("perplexity", 16): asked(1, 2, 2)}
    cache = OutcomeCache(None)

    def key(question: Question, length: int, column: int) -> dict[str, Any]:
        return {"prompt": question.digest, "length": length, "column": column}

    cache.add(key(questions["perplexity", 8][1], 8, 0), Outcome(1.0, "", 1, None, None))
    jobs = suite._missing(questions, key, 2, cache)
    found = [(job.length, job.columns, job.warm_up) for job in jobs]
    # A row that stands twice is run once.
    assert found == [
        *((8, (0, 1), True), (8, (1,), False)),
        *((16, (0, 1), True), (16, (0, 1), False)),
    ]


def test_ranges_behind_a_short_text_were_not_read(folder: Path) -> None:
    model, tokenizer = load_model(str(folder / "model")), load_tokenizer(str(folder / "model"))
    asked = config(folder, samples=1, policies=("sampled",))
    (question,) = make_questions("perplexity", LENGTH, asked, tokenizer, longest=None)
    tokens = len(question.input_ids)
    options = {"bins": 4, "measure": False, "repeats": 0, "warm_up": False}
    measurement = PromptMeasurement(model, tokenizer, question, length=2 * tokens, **options)
    bins = measurement.run(DENSE_VARIANT).bins
    assert [loss is None for loss in bins] == [False, False, True, True]
    # The first token of a text is not predicted.
    measurement = PromptMeasurement(
        model, tokenizer, question, length=tokens, **{**options, "bins": tokens}
    )
    assert [loss is None for loss in measurement.run(DENSE_VARIANT).bins[:3]] == [
        True,
        False,
        False,
    ]


def test_without_times_one_prefill_measures_the_same(
    folder: Path, evaluation: Evaluation, monkeypatch: pytest.MonkeyPatch
) -> None:
    prefills: list[str] = []
    attend = PromptMeasurement._prefill
    monkeypatch.setattr(
        PromptMeasurement, "_prefill", lambda self: prefills.append("") or attend(self)
    )
    asked = replace(evaluation.config, times=False, gammas=(0.6,))
    found = evaluate(asked)
    # Dense attention, sampled and auto, of the two texts; those that ask are answered apart.
    assert len(prefills) == 3 * 2
    for cell in found.cells:
        timed = evaluation.cell(cell.task, LENGTH, cell.policy, **cell.settings)
        assert timed.ttft_s is not None
        assert cell == replace(timed, ttft_s=None, speedup=None)
    assert Evaluation.from_dict(json.loads(found.to_json())) == found
    assert " | - | - |" in markdown(found)


def test_sparse_steps_are_measured_along_the_dense_answer(folder: Path) -> None:
    asked = config(folder, policies=("dense", "auto"), decode="sparse", samples=1)
    found = evaluate(replace(asked, decode_density=0.35, times=False))
    assert [cell.label for cell in found.cells] == [
        "dense",
        "dense, decode 0.35",
        "auto, decode 0.35",
    ]
    dense, steps, both = found.cells
    assert (dense.answer_kl, dense.decode_density, dense.difference) == (None, None, None)
    # Prefills are dense, and the steps are not.
    assert steps.kl is not None
    assert steps.kl.value < 1e-9
    assert (steps.density.value, steps.recall) == (1.0, None)
    assert both.density.value < 1
    for cell in (steps, both):
        assert cell.answer_kl is not None
        assert cell.answer_agreement is not None
        assert cell.decode_density is not None
        assert cell.answer_kl.value > 1e-7
        assert 0.3 < cell.decode_density.value < 0.9
    assert Evaluation.from_dict(json.loads(found.to_json())) == found
    text = markdown(found)
    assert text.count("| answer KL | answer top 1 | decode |") == 2
    assert "answer KL" in found.summary()
    # A text that is only read has no steps, and no share in their mean.
    alone = replace(asked, policies=("dense",), max_density=None, times=False)
    tasks = (*asked.tasks, "perplexity")
    of_both = evaluate(replace(alone, tasks=tasks, decode_density=0.35))
    _, answered, _, text_alone = of_both.cells
    assert answered.decode_density == steps.decode_density
    assert text_alone.decode_density is None
    assert steps.decode_density is not None
    assert of_both.summaries()[1].decode_density == steps.decode_density.value
    # At density 1 steps are those of dense attention.
    [_, everything] = evaluate(replace(alone, decode_density=1.0)).cells
    assert everything.answer_kl is not None
    assert steps.answer_kl is not None
    assert everything.answer_kl.value < min(1e-6, steps.answer_kl.value / 10)
    for changes, said in (
        ({"decode": "dense", "decode_density": 0.3}, "is for sparse decode steps"),
        ({"tasks": ("perplexity",)}, "name a task that asks"),
    ):
        with pytest.raises(ConfigError, match=said):
            replace(asked, **changes)


def test_what_a_session_refuses_is_told_before_dense_attention_runs(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At 32K tokens that takes minutes."""
    monkeypatch.setattr(runner, "generate", lambda *_, **__: pytest.fail("a prompt was answered"))
    artifact = load_artifact(folder / "clusters.st")
    known = replace(artifact, fp8_error=torch.zeros(artifact.policy.shape))
    save_artifact(known, folder / "fp8.st")
    for name, said in (("clusters.st", "needs an artifact"), ("fp8.st", "needs a Hopper GPU")):
        asked = config(folder, artifact=str(folder / name), precision="fp8", device="cpu")
        with pytest.raises(ShareprefillError, match=said):
            evaluate(asked)


def test_finished_outcomes_are_used_again(
    folder: Path, evaluation: Evaluation, monkeypatch: pytest.MonkeyPatch
) -> None:
    ran: list[str] = []
    run = PromptMeasurement.run
    monkeypatch.setattr(
        PromptMeasurement, "run", lambda self, v: ran.append(v.policy) or run(self, v)
    )
    out = folder / "out"
    assert evaluate(evaluation.config, out=out) == evaluation
    assert ran == []
    # Another policy alone is new; one that goes takes nothing along.
    changed = replace(evaluation.config, tasks=("perplexity",), policies=("vertical-slash",))
    found = evaluate(changed, out=out)
    assert ran == ["vertical-slash"] * 4
    assert found.cell("perplexity", LENGTH, "dense") == evaluation.cell(
        "perplexity", LENGTH, "dense"
    )
    # The last line is lost, as after a kill.
    kept = out / "outcomes.jsonl"
    lines = kept.read_bytes()
    kept.write_bytes(lines[:-20])
    ran.clear()
    assert evaluate(changed, out=out).cells[-1].score == found.cells[-1].score
    assert ran == ["vertical-slash"]
    assert all(json.loads(line)["key"] for line in kept.read_text().splitlines())
    ran.clear()
    single = config(folder, tasks=("perplexity",), samples=1, gammas=(0.6,), policies=("sampled",))
    evaluate(single, out=out, fresh=True)
    assert ran == ["dense", "sampled"]
    assert len(kept.read_text().splitlines()) == 2


def test_another_seed_model_or_artifact_is_measured_anew(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ran: list[str] = []
    run = PromptMeasurement.run
    monkeypatch.setattr(
        PromptMeasurement, "run", lambda self, v: ran.append(v.policy) or run(self, v)
    )
    one = config(folder, samples=1, measure=False)
    first = evaluate(one, out=tmp_path)
    auto = first.cells[1]
    assert (auto.recall, auto.recall_worst, auto.layer_errors) == (None, None, ())
    assert (auto.kl, auto.top1_agreement) == (None, None)
    assert auto.score.low is not None
    assert auto.density.low is None
    ran.clear()
    evaluate(replace(one, seed=1), out=tmp_path)
    assert ran == ["dense", "auto"]
    ran.clear()
    evaluate(replace(one, measure=True), out=tmp_path)
    assert ran == ["dense", "auto"]
    model = load_model(str(folder / "model"))
    other = replace(_artifact(model, folder), gamma=torch.full((3, 4), 0.5))
    save_artifact(other, tmp_path / "other.st")
    ran.clear()
    evaluate(replace(one, artifact=str(tmp_path / "other.st")), out=tmp_path)
    assert ran == ["auto"]


@pytest.mark.parametrize("part", ["mlp", "rope"])
def test_a_model_that_changed_outside_of_attention_is_measured_anew(
    part: str, folder: Path, tmp_path: Path
) -> None:
    place = save_checkpoint(tmp_path / "model")
    made = load_artifact(folder / "clusters.st")
    asked = config(folder, model=str(place), tasks=("perplexity",), samples=1, measure=False)
    if part == "rope":
        # Of an earlier version, which does not say what RoPE it was made for.
        made = replace(made, fingerprint=replace(made.fingerprint, attention=None))
        save_artifact(made, tmp_path / "old.st")
        asked = replace(asked, artifact=str(tmp_path / "old.st"))
    before = evaluate(asked, out=tmp_path / "out").cells[0].score
    change_outside_of_attention(place, part)
    assert evaluate(asked, out=tmp_path / "out").cells[0].score != before


def test_a_damaged_ledger_and_a_folder_in_use(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "outcomes.jsonl").write_text('{"key": "x"}\n')
    with pytest.raises(DataError, match=r"line 1 of .*outcomes.jsonl is damaged.*--fresh"):
        evaluate(config(folder), out=tmp_path)
    (tmp_path / "outcomes.jsonl").write_text("[" * 100_000 + "\n")
    with pytest.raises(DataError, match=r"line 1 of .*outcomes.jsonl is damaged.*--fresh"):
        evaluate(config(folder), out=tmp_path)
    with locked_folder(tmp_path), pytest.raises(DataError, match="in use by another process"):
        evaluate(config(folder), out=tmp_path)


@pytest.mark.parametrize("fresh", [True, False])
def test_a_ledger_that_cannot_be_used(folder: Path, tmp_path: Path, fresh: bool) -> None:
    (tmp_path / "outcomes.jsonl").mkdir()
    with pytest.raises(DataError, match=r"cannot (read|remove) .*outcomes.jsonl"):
        evaluate(config(folder), out=tmp_path, fresh=fresh)


def test_an_outcome_that_was_changed_is_refused(folder: Path, tmp_path: Path) -> None:
    asked = config(folder, tasks=("perplexity",), samples=1, measure=False)
    evaluate(asked, out=tmp_path)
    kept = tmp_path / "outcomes.jsonl"
    lines = kept.read_text().splitlines()
    values = json.loads(lines[1])
    for change in ({"score": values["outcome"]["score"] / 2}, {"tokens": "x"}):
        changed = {**values, "outcome": {**values["outcome"], **change}}
        kept.write_text(f"{lines[0]}\n{json.dumps(changed)}\n")
        with pytest.raises(DataError, match=r"line 2 of .* \(its checksum is another.*--fresh"):
            evaluate(asked, out=tmp_path)


def test_what_cannot_be_evaluated(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="length = 5000 is beyond the model's maximum of 4096"):
        evaluate(config(folder, lengths=(5000,)))
    with pytest.raises(ConfigError, match="'retr_vk' is not known"):
        evaluate(config(folder, tasks=("retr_vk",)))
    with pytest.raises(ArtifactError, match="missing.st"):
        evaluate(config(folder, artifact="missing.st"))
    save_artifact(tiny_artifact(tiny_llama(seed=1)), tmp_path / "other.st")
    with pytest.raises(ArtifactError):
        evaluate(config(folder, artifact=str(tmp_path / "other.st"), model=str(folder / "model")))


def test_a_prompt_shorter_than_a_block_has_all_its_mass(folder: Path, tmp_path: Path) -> None:
    rows = [{"input": "Short.", "outputs": ["x"]}, {"input": "words " * 150, "outputs": ["x"]}]
    (tmp_path / "vt.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    found = evaluate(config(folder, tasks=(f"ruler:{tmp_path / 'vt.jsonl'}",), gammas=(0.5,)))
    cell = found.cells[1]
    assert cell.recall is not None
    assert cell.recall.high == 1
    assert cell.recall.low is not None
    assert cell.recall.low < 1
    assert cell.density.high == 1
    assert cell.metric == "string_match_all"


def test_too_little_memory_is_told_in_words(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def run(self: PromptMeasurement, variant: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(PromptMeasurement, "run", run)
    with pytest.raises(ConfigError, match=r"too little memory .* under policy dense: lower"):
        evaluate(config(folder))
