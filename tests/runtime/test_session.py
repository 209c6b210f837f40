from __future__ import annotations

import threading
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from shareprefill import share_prefill
from shareprefill.artifact import Policy, save_artifact
from shareprefill.config import RuntimeConfig
from shareprefill.errors import ArtifactError, ConfigError
from shareprefill.models import warn_once
from shareprefill.runtime.generation import cache_of
from shareprefill.runtime.policies import policy_text
from shareprefill.runtime.policies.streaming import Streaming
from tests.support.families import FAMILIES, build
from tests.support.tiny import BLOCK, tiny_artifact, tiny_llama, token_ids

P, S, R, V = Policy.PIVOT, Policy.SHARE, Policy.SAMPLED, Policy.VERTICAL_SLASH
POLICIES = [[P, S, R, V], [S, S, P, R], [V, R, S, S]]
EVERYTHING = RuntimeConfig(gamma=1.0, slack=1.0, min_tokens=0, max_density=1.0)
SPARSE = RuntimeConfig(gamma=0.6, min_tokens=0, max_density=1.0)
CLOSE = {"rtol": 1e-4, "atol": 1e-4}


@pytest.fixture(scope="module")
def model() -> Any:
    return tiny_llama()


@torch.no_grad()
def logits(model: Any, config: RuntimeConfig, **inputs: Any) -> torch.Tensor:
    with share_prefill(model, tiny_artifact(model, POLICIES), config):
        return model(**inputs).logits


@torch.no_grad()
def test_a_warm_up_runs_sparse_and_is_reported_nowhere(
    model: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    session = share_prefill(model, tiny_artifact(model, POLICIES), min_tokens=10**6)
    with pytest.raises(ConfigError, match="is for inside `with session:`"):
        session.warm_up()
    layers = []
    attend = session.prefill.attend
    monkeypatch.setattr(
        session.prefill, "attend", lambda *call, **o: layers.append(call[0]) or attend(*call, **o)
    )
    with session:
        session.warm_up()
        assert layers == [0, 1, 2]
        assert session.report().prefills == session.report().dense_prefills == 0
        # What follows is below the crossover again.
        model(input_ids=token_ids(1, 400))
    assert layers == [0, 1, 2]
    assert session.report().dense_prefills == 1


@torch.no_grad()
@pytest.mark.gpu
def test_prompts_of_any_length_compile_nothing_after_a_warm_up(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    import triton

    sizes = {"hidden_size": 256, "head_dim": 64, "max_position_embeddings": 2**17}
    model = tiny_llama(**sizes).to("cuda", torch.bfloat16)
    artifact = tiny_artifact(model, POLICIES, block_size=128)
    compiled: list[Any] = []
    hook = "jit_post_compile_hook"
    with share_prefill(model, artifact, min_tokens=0) as session:
        session.warm_up()
        monkeypatch.setattr(triton.knobs.runtime, hook, lambda **call: compiled.append(call))
        for tokens in (1000, 9000, 20_000, 66_000):
            model(input_ids=token_ids(1, tokens).cuda(), use_cache=False, logits_to_keep=1)
    assert session.report().prefills == 4
    assert not compiled


@torch.no_grad()
@pytest.mark.parametrize(
    "policy", ["smoothed", "streaming:local_blocks=1", Streaming(local_blocks=1)]
)
def test_a_policy_that_plans_nothing_needs_no_artifact(
    model: Any, policy: Any, caplog: pytest.LogCaptureFixture
) -> None:
    warn_once.cache_clear()
    ids = token_ids(1, 700)
    options = {"gamma": 0.6} if policy == "smoothed" else {}
    for _ in range(2):
        with share_prefill(model, policy=policy, min_tokens=0, max_density=1, **options) as session:
            sparse = model(input_ids=ids).logits
    (name,) = session.report().policies
    assert name == (policy if isinstance(policy, str) else policy_text(policy))
    assert session.report().policies[name] == 12
    assert 0.1 < session.report().density < 1
    assert not torch.allclose(sparse, model(input_ids=ids).logits, **CLOSE)
    assert caplog.text.count("A calibration plans every head") == 1
    unfitted = "weights that are not fitted to this model"
    assert caplog.text.count(unfitted) == (policy == "smoothed")


def test_without_an_artifact_the_policy_is_smoothed(model: Any) -> None:
    assert share_prefill(model, min_tokens=0).config == RuntimeConfig(
        policy="smoothed", min_tokens=0
    )
    assert share_prefill(model, tiny_artifact(model), gamma=0.5).config == RuntimeConfig(gamma=0.5)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"policy": "auto"}, "policy 'auto' needs an artifact: name one, make one with sp calib"),
        ({"config": RuntimeConfig()}, "policy 'auto' needs an artifact"),
        ({"config": RuntimeConfig(policy="flex"), "gamma": 0.5}, "give config or gamma, not both"),
        ({"gama": 0.5}, r"has no option 'gama' \(did you mean 'gamma'\?\)"),
        ({"policy": "smoothd"}, "did you mean 'smoothed'"),
        ({"artifact": "flex"}, "'flex' is a policy, not an artifact: use policy='flex'"),
        ({"policy": "sampled", "sample_rows": 129}, "a block has 128 rows"),
    ],
)
def test_what_needs_an_artifact_or_is_no_option_is_refused(
    model: Any, arguments: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        share_prefill(model, **arguments)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["gpt2", "clusters.st"], "str is no model of transformers: load one"),
        ([torch.nn.Linear(2, 2)], "Linear is no model of transformers: load one"),
        (["DataParallel"], r"DataParallel is no model of transformers: give its \.module"),
        (["pipeline"], r"SimpleNamespace is no model of transformers: give its \.model"),
        (["model", {"gamma": 0.9}], "artifact = dict is not allowed: it must be a path"),
        (["model", RuntimeConfig()], "artifact = RuntimeConfig is not allowed"),
        (["model", None, {"gamma": 0.9}], "config = dict is not allowed.*fields by name"),
    ],
)
def test_arguments_of_other_kinds_are_refused(
    model: Any, arguments: list[Any], message: str
) -> None:
    made = {
        "model": model,
        "DataParallel": torch.nn.DataParallel(model),
        "pipeline": SimpleNamespace(model=model),
    }
    first, *others = arguments
    with pytest.raises(ConfigError, match=message):
        share_prefill(made.get(first, first) if isinstance(first, str) else first, *others)


def test_where_nothing_ran_no_work_was_done(model: Any) -> None:
    with share_prefill(model, policy="smoothed") as session:
        pass
    report = session.report()
    assert (report.density, report.selection_work) == (1.0, 0.0)


def test_everything_selected_gives_the_models_own_logits(model: Any) -> None:
    ids = token_ids(1, 133)
    with torch.no_grad():
        own = model(input_ids=ids).logits
    torch.testing.assert_close(logits(model, EVERYTHING, input_ids=ids), own, **CLOSE)
    assert not torch.allclose(logits(model, SPARSE, input_ids=ids), own, **CLOSE)


@pytest.mark.parametrize("left", [True, False])
def test_rows_of_a_padded_batch_equal_their_own_runs(model: Any, left: bool) -> None:
    lengths = [150, 64, 17, 5, 101]
    ids, mask = token_ids(len(lengths), max(lengths)), torch.zeros(5, 150, dtype=torch.int64)
    real = [slice(150 - length, 150) if left else slice(0, length) for length in lengths]
    for row, place in enumerate(real):
        mask[row, place] = 1
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    batch = logits(model, SPARSE, input_ids=ids, attention_mask=mask, position_ids=positions)
    for row, place in enumerate(real):
        alone = logits(model, SPARSE, input_ids=ids[row : row + 1, place])
        torch.testing.assert_close(batch[row, place], alone[0], **CLOSE)


def test_chunks_with_everything_selected_equal_one_prefill(model: Any) -> None:
    ids = token_ids(1, 200)
    with torch.no_grad():
        own = model(input_ids=ids).logits
        with share_prefill(model, tiny_artifact(model, POLICIES), EVERYTHING) as session:
            cache: dict[str, Any] = {}
            pieces = []
            for piece in ids.split([70, 1, 7, 22, 100], dim=1):
                step = model(input_ids=piece, **cache, use_cache=True)
                cache = cache_of(step)
                pieces.append(step.logits)
    torch.testing.assert_close(torch.cat(pieces, 1), own, **CLOSE)
    # Pieces shorter than a block run dense.
    report = session.report()
    assert (report.prefills, report.dense_prefills) == (3, 1)


def test_report_counts_what_was_done(model: Any) -> None:
    artifact = tiny_artifact(model, POLICIES)
    with share_prefill(model, artifact, SPARSE, measure_recall=True) as session, torch.no_grad():
        model(input_ids=token_ids(2, 160))
        report = session.report()
        session.reset()
    assert report.prefills == 2
    assert sum(report.policies.values()) == 2 * 12
    assert 0 < report.density < 1
    assert 0 < report.selection_work < 1
    assert [layer.layer for layer in report.layers] == [0, 1, 2]
    densities = [d for layer in report.layers for d in layer.density]
    assert report.density == pytest.approx(sum(densities) / 12)
    assert all(0.5 < r <= 1 for layer in report.layers for r in layer.recall or ())
    assert report.thresholds == {"gamma": 0.6, "slack": None, "delta": 0.3}
    assert session.report().prefills == 0


@torch.no_grad()
def test_report_weighs_every_dense_prefill(model: Any) -> None:
    config = replace(SPARSE, min_tokens=100)
    with share_prefill(model, tiny_artifact(model, POLICIES), config) as session:
        model(input_ids=token_ids(1, 160))
        sparse = session.report().density
        for tokens in (40, 90, 40):
            model(input_ids=token_ids(1, tokens))
    report = session.report()
    assert (report.prefills, report.dense_prefills) == (1, 3)
    # 10, 3, 6 and 3 rows of blocks have 55, 6, 21 and 6 causal ones.
    assert sparse < 0.99
    assert report.density == pytest.approx((55 * sparse + 6 + 21 + 6) / 88)


def test_short_prompts_and_decode_steps_run_dense(model: Any) -> None:
    ids = token_ids(1, 60)
    with share_prefill(model, tiny_artifact(model), RuntimeConfig(min_tokens=61)) as session:
        found = model.generate(ids, max_new_tokens=4, do_sample=False)
    assert torch.equal(found, model.generate(ids, max_new_tokens=4, do_sample=False))
    report = session.report()
    assert (report.prefills, report.dense_prefills, report.density) == (0, 1, 1.0)


def test_generation_under_a_session(model: Any) -> None:
    ids = token_ids(1, 120)
    with share_prefill(model, tiny_artifact(model, POLICIES), EVERYTHING) as session:
        found = model.generate(ids, max_new_tokens=6, do_sample=False)
        beams = model.generate(ids, max_new_tokens=4, num_beams=3, do_sample=False)
    assert torch.equal(found, model.generate(ids, max_new_tokens=6, do_sample=False))
    expected = model.generate(ids, max_new_tokens=4, num_beams=3, do_sample=False)
    assert torch.equal(beams, expected)
    assert session.report().prefills > 0


def test_two_models_at_once_and_reuse(model: Any) -> None:
    other = tiny_llama(seed=1, num_key_value_heads=4)
    ids = token_ids(1, 90)
    expected = logits(model, SPARSE, input_ids=ids), logits(other, SPARSE, input_ids=ids)
    ours = share_prefill(model, tiny_artifact(model, POLICIES), SPARSE)
    theirs = share_prefill(other, tiny_artifact(other, POLICIES), SPARSE)
    with torch.no_grad():
        for _ in range(2):
            with ours, theirs:
                found = model(input_ids=ids).logits, other(input_ids=ids).logits
            torch.testing.assert_close(found, expected, **CLOSE)


def test_threads_keep_their_own_pivots(model: Any) -> None:
    prompts = [token_ids(1, length) for length in (80, 97, 128, 150)]
    expected = [logits(model, SPARSE, input_ids=ids) for ids in prompts]
    found: dict[int, torch.Tensor] = {}
    with share_prefill(model, tiny_artifact(model, POLICIES), SPARSE):

        def work(number: int) -> None:
            with torch.no_grad():
                for _ in range(5):
                    found[number] = model(input_ids=prompts[number]).logits

        threads = [threading.Thread(target=work, args=(n,)) for n in range(len(prompts))]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    for number, logit in enumerate(expected):
        torch.testing.assert_close(found[number], logit, **CLOSE)


def test_an_artifact_from_a_file(model: Any, tmp_path: Any) -> None:
    path = tmp_path / "clusters.st"
    save_artifact(tiny_artifact(model, POLICIES), path)
    ids = token_ids(1, 90)
    with share_prefill(model, path, SPARSE), torch.no_grad():
        found = model(input_ids=ids).logits
    torch.testing.assert_close(found, logits(model, SPARSE, input_ids=ids))


def test_an_artifact_of_another_model_is_refused(model: Any) -> None:
    with pytest.raises(ArtifactError, match="attention weights differ"):
        share_prefill(tiny_llama(seed=5), tiny_artifact(model))
    with pytest.raises(ArtifactError, match="3 layers.*2 layers"):
        share_prefill(tiny_llama(num_hidden_layers=2), tiny_artifact(model))


def test_an_artifact_of_other_positions_is_refused(model: Any) -> None:
    scaled = tiny_llama(rope_parameters={"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4})
    with pytest.raises(ArtifactError, match="rope_parameters.factor none there, 2.0 now.*sp calib"):
        share_prefill(scaled, tiny_artifact(model))
    # As docs/reliability.md takes it all the same.
    unknown = replace(tiny_artifact(model).fingerprint, attention=None)
    share_prefill(scaled, tiny_artifact(model, fingerprint=unknown))
    # Longer prompts alone change nothing.
    share_prefill(tiny_llama(max_position_embeddings=8192), tiny_artifact(model))


def test_more_rows_than_a_block_has_are_refused(model: Any) -> None:
    with pytest.raises(ConfigError, match=f"pivot_rows = 17 .* {BLOCK} rows"):
        share_prefill(model, tiny_artifact(model, [[P, S, S, S]] * 3), RuntimeConfig(pivot_rows=17))


def test_the_attention_implementation_is_restored(model: Any) -> None:
    before = model.config._attn_implementation
    with pytest.raises(RuntimeError, match="stop"), share_prefill(model, tiny_artifact(model)):
        raise RuntimeError("stop")
    assert model.config._attn_implementation == before


def test_a_model_of_one_layer_begins_a_pass_with_every_call() -> None:
    """The pass before left patterns of another prompt, and of another length."""
    model = tiny_llama(num_hidden_layers=1)
    artifact = tiny_artifact(model, [[P, S, R, V]])
    prompts = [token_ids(1, length) for length in (90, 150, 150)]

    def alone(ids: torch.Tensor) -> torch.Tensor:
        with share_prefill(model, artifact, SPARSE):
            return model(input_ids=ids).logits

    with torch.no_grad():
        expected = [alone(ids) for ids in prompts]
        with share_prefill(model, artifact, SPARSE) as session:
            found = [model(input_ids=ids).logits for ids in prompts]
    torch.testing.assert_close(found, expected)
    assert session.report().prefills == len(prompts)


@pytest.mark.parametrize("first", ["sliding_attention", "full_attention", "linear_attention"])
def test_prefills_are_counted_whatever_the_first_layer_is(first: str) -> None:
    """Layers that are never sparse say nothing of a pass."""
    name = "olmo_hybrid" if first == "linear_attention" else "cohere2"
    changes = {"layer_types": [first, "full_attention"], "num_hidden_layers": 2}
    model = build(next(family for family in FAMILIES if family.name == name), **changes)
    config = RuntimeConfig(min_tokens=20, max_density=1.0)
    with share_prefill(model, tiny_artifact(model), config) as session, torch.no_grad():
        for tokens in (40, 60, 17, 80):
            model(input_ids=token_ids(1, tokens))
        model(input_ids=token_ids(2, 40))
    report = session.report()
    assert (report.prefills, report.dense_prefills) == (5, 1)
