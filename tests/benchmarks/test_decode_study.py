"""benchmarks/decode_study.py and its policies."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from torch.nn import functional as F

from shareprefill.errors import ConfigError
from shareprefill.runtime.ops.sketched_selection import Moments

ROOT = Path(__file__).parents[2]
LAYERS, GROUPS, HEADS, STEPS, BLOCKS, BLOCK, DIM = 2, 3, 2, 12, 60, 16, 8
TOKENS = BLOCKS * BLOCK
PROMPT = TOKENS - STEPS


@pytest.fixture(autouse=True)
def benchmarks_are_importable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))


def random_steps(draw: torch.Generator) -> Any:
    from decode_policies import Steps, by_block, causal_logits, make_basis

    query = torch.randn(GROUPS, HEADS, STEPS, DIM, generator=draw)
    key = torch.randn(GROUPS, TOKENS, DIM, generator=draw) * 2
    weights = causal_logits(query @ key[:, None].mT).softmax(-1)
    maps = torch.rand(2, GROUPS, HEADS, BLOCKS, generator=draw)
    basis = make_basis(Moments.of(query.flatten(1, 2), key[:, :PROMPT]))
    share = torch.full((GROUPS, HEADS), 1 / HEADS)
    return Steps(
        *(by_block(weights, BLOCK), share, query, key, 1.0, maps[0], maps[1], basis),
        prompt=PROMPT,
        block=BLOCK,
    )


@pytest.fixture
def calibration() -> Any:
    from decode_policies import Calibration

    draw = torch.Generator().manual_seed(3)
    layers = [random_steps(draw) for _ in range(LAYERS)]
    return Calibration([layers], torch.rand(LAYERS * GROUPS, generator=draw))


def kept(policy: Any, calibration: Any) -> torch.Tensor:
    layers = calibration.prompts[0]
    return torch.cat([policy.keep(layer, steps) for layer, steps in enumerate(layers)])


@pytest.mark.parametrize(
    "spec",
    [
        *("oracle", "oracle+cuts", "oracle+adaptive", "last", "vertical", "quest", "own/4"),
        *("own/4+cuts", "pivots:.2", "pivots:.2/4", "pivots:.2+cuts", "pivots:.2+effect"),
        *(
            "pivots:.2+adaptive",
            "sketch:2x4",
            "sketch:2x8+adaptive",
            "sketch:2x4/4",
            "sketch:2x4+cuts+means",
            "channels:2x4",
        ),
    ],
)
def test_policies_read_what_they_are_allowed(spec: str, calibration: Any) -> None:
    from decode_policies import make_policy

    policy = make_policy(spec, 0.5, calibration)
    assert policy is not None
    keep = kept(policy, calibration)
    steps = calibration.prompts[0][0]
    assert keep[:, steps.always()].all()
    reads = keep.sum(-1).double() / steps.visible.sum(-1)
    assert 0.3 < reads.mean() + policy.extra <= 0.5 + 1e-6


def test_a_policy_whose_choosing_takes_all_reads_is_none(calibration: Any) -> None:
    from decode_policies import make_policy

    assert make_policy("own/4", 0.25, calibration) is None
    assert make_policy("quest", 1 / BLOCK, calibration) is None
    assert make_policy("sketch:8x16", 0.5, calibration) is None
    for spec, said in (
        *(("guess", "not known"), ("pivots", "lacks its size"), ("quest+cuts", "no attention")),
        *(("own/4+means", "need the logits"), ("own/65", "at most 64 steps")),
    ):
        with pytest.raises(ConfigError, match=said):
            make_policy(spec, 0.2, calibration)


def test_units_read_what_their_pivot_saw_last(calibration: Any) -> None:
    from decode_policies import Policy

    policy = Policy("pivots", 0.2, [1, 1, 1, 1, 4, 4], every=4)
    keep = kept(policy, calibration)
    layers = calibration.prompts[0]
    dense = torch.zeros(6, STEPS, dtype=torch.bool)
    dense[[1, 4], ::4] = True
    assert torch.equal(keep.sum(-1) == layers[0].visible.sum(-1), dense)
    assert torch.equal(keep[0], keep[3])
    # Between two refreshes nothing changes; at them it does.
    assert torch.equal(keep[0, 4], keep[0, 7])
    assert not torch.equal(keep[0, 3], keep[0, 4])
    best = layers[0].mass[1, 4].masked_fill(layers[0].always()[4], 0).argmax()
    assert keep[0, 4:8, best].all()


def test_lists_are_read_until_they_are_chosen_anew_in_layers_in_turns(calibration: Any) -> None:
    from decode_policies import make_policy

    every, some = (make_policy(spec, 0.5, calibration) for spec in ("sketch:2x4", "sketch:2x4/4"))
    assert some.extra == every.extra / 4
    for layer, steps in enumerate(calibration.prompts[0]):
        some.density = every.density
        fresh, found = (policy.keep(layer, steps) for policy in (every, some))
        assert not torch.equal(fresh, found)
        for step in range(STEPS):
            last = max(0, step - (step + layer) % 4)
            assert torch.equal(found[:, step], fresh[:, last] | steps.always()[step])


def test_a_step_reads_what_is_worth_its_price() -> None:
    from decode_policies import worth_counts

    held = torch.tensor([[[0.5, 0.8, 0.9, 1.0]]])
    visible, always = torch.ones(1, 4, dtype=torch.bool), torch.tensor([[True, False, True, False]])
    # Lost .5, .2, .1, 0: half squares .125, .02, .005, 0; a block costs a quarter of the worth.
    for worth, count in ((0.45, 2), (0.1, 2), (0.03, 3), (0.015, 4), (0.0, 4)):
        found = worth_counts(held, torch.tensor([worth]), always, visible)
        assert found.tolist() == [[count]]


def test_a_whole_sketch_gives_the_logits(calibration: Any) -> None:
    from decode_policies import causal_logits, sketched_logits

    steps = calibration.prompts[0][1]
    expected = causal_logits(steps.query @ steps.key[:, None].mT)
    torch.testing.assert_close(sketched_logits(steps, DIM, 16), expected, rtol=1e-4, atol=1e-4)
    channels = torch.stack([torch.randperm(DIM) for _ in range(GROUPS)])
    found = sketched_logits(steps, DIM, 16, channels).softmax(-1)
    torch.testing.assert_close(found, expected.softmax(-1), rtol=1e-4, atol=1e-5)
    errors = []
    for rank, bits in ((DIM, 8), (DIM, 4), (4, 16), (1, 16)):
        found = sketched_logits(steps, rank, bits)
        errors.append((found - expected)[expected.isfinite()].std().item())
    assert errors == sorted(errors)
    assert errors[0] < 0.1 * expected[expected.isfinite()].std()


@pytest.fixture(scope="module")
def model() -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8}
    config = LlamaConfig(vocab_size=64, max_position_embeddings=512, **sizes, **heads)
    return LlamaForCausalLM(config).eval()


@pytest.fixture
def study(model: Any, monkeypatch: pytest.MonkeyPatch) -> Any:
    import decode_study

    monkeypatch.setattr(decode_study, "load_model", lambda *_, **__: model)
    return decode_study.Study(
        cast(Any, SimpleNamespace(model="", device="cpu", block=16, artifact=[]))
    )


def test_dense_steps_give_what_the_model_gives(model: Any, study: Any) -> None:
    from decode_study import Decode, Sample

    ids = torch.randint(0, 64, (120,))
    sample = Sample("text", False, ids[:100].tolist(), ids[100:].tolist(), [])
    states = study.steps(sample, Decode(study.prefill(sample), None, None, 16))
    with torch.no_grad():
        whole = model.model(input_ids=ids[None]).last_hidden_state[0]
        expected = model.generate(ids[None, :100], max_new_tokens=6, do_sample=False)[0, 100:]
    torch.testing.assert_close(states, whole[100:])
    found = study.continue_greedily([sample.prompt] * 2, 6)
    assert found == [expected.tolist()] * 2


class Newest:
    """A policy that reads what every policy reads."""

    extra, means = 0.25, False

    def sketched_logits(self, _layer: int, steps: Any) -> torch.Tensor:
        from decode_policies import sketched_logits

        return sketched_logits(steps, 8, 16)

    def keep(self, _layer: int, steps: Any) -> torch.Tensor:
        return steps.always().expand(steps.mass.shape)


@pytest.mark.parametrize("means", [False, True])
def test_blocks_that_are_not_read_are_hidden_or_means(means: bool) -> None:
    from decode_policies import make_basis
    from decode_study import Decode, Prompt

    query, old, new = torch.randn(4, 20, 8), torch.randn(2, 2, 200, 8), torch.randn(2, 2, 20, 8)
    maps = torch.rand(4, 200)
    basis = make_basis(Moments.of(query.unflatten(0, (2, 2)).flatten(1, 2), old[0]))
    prompt = Prompt([old[0]], [old[1]], [maps], [maps], [basis])
    call = SimpleNamespace(layer=0, query=query[None], key=new[:1], value=new[1:], scale=0.3)
    policy = Newest()
    policy.means = means
    handler = Decode(prompt, torch.full((1, 2, 2), 0.5), cast(Any, policy), 16)
    found = handler(cast(Any, call))
    places, positions = torch.arange(220), torch.arange(200, 220)[:, None]
    read = (places < 16) | (places // 16 >= (positions - 63) // 16)
    key, value = (torch.cat((old[n], new[n]), 1).repeat_interleave(2, 0) for n in (0, 1))
    weights = (query @ key.mT * 0.3).masked_fill(places > positions, -torch.inf).softmax(-1)
    if means:
        # Attention is that of all tokens; where a block is not read, its values are their mean.
        mean = F.pad(value, (0, 0, 0, 4)).unflatten(1, (-1, 16)).mean(2, keepdim=True)
        mean = mean.expand(-1, -1, 16, -1).flatten(1, 2)[:, :220]
        expected = (weights * read) @ value + (weights * ~read) @ mean
    else:
        weights = weights * read
        expected = weights @ value / weights.sum(-1, keepdim=True)
    torch.testing.assert_close(found[0], expected)
    assert handler.reads[0] == pytest.approx(0.25 + 6 / 13.5, abs=0.04)


def test_a_run_makes_what_show_prints(
    study: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import decode_study

    monkeypatch.setattr(decode_study, "Study", lambda _: study)
    draw = torch.Generator().manual_seed(1)
    ids = [torch.randint(0, 64, (n,), generator=draw).tolist() for n in (150, 24, 130)]
    samples = [
        decode_study.Sample("needle", calibrates, ids[0], ids[1], [(0, 24)])
        for calibrates in (True, False)
    ]
    samples.append(decode_study.Sample("text", False, ids[2], [], []))
    paths = [str(tmp_path / name) for name in ("prompts.json", "found.json", "found.svg")]
    decode_study.save_samples(Path(paths[0]), samples, 5)
    policies = ["oracle+adaptive", "quest"]
    decode_study.main(
        [
            *("run", "--device", "cpu", "--prompts", paths[0], "--json", paths[1]),
            *("--density", "1", "--policy", *policies),
        ]
    )
    assert len(json.loads(Path(paths[0]).read_text())["samples"][2]["follow"]) == 5
    rows = json.loads(Path(paths[1]).read_text())["rows"]
    assert [(row["task"], row["policy"]) for row in rows] == [
        (task, policy) for task in ("needle", "text") for policy in policies
    ]
    # Whoever reads all changes nothing.
    assert rows[0]["kl"] < 1e-6
    assert rows[0]["recall"] == pytest.approx(1)
    assert rows[0]["answers"] == rows[0]["dense_answers"]
    capsys.readouterr()
    decode_study.main(["show", "--plot", paths[2], paths[1]])
    assert "| quest | 1.0 |" in capsys.readouterr().out
    assert Path(paths[2]).stat().st_size > 1000


def test_effects_and_choices_of_several_kinds_are_compared(
    study: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import decode_effects
    import decode_study

    monkeypatch.setattr(decode_effects, "Study", lambda _: study)
    draw = torch.Generator().manual_seed(1)
    samples = []
    for calibrates in (True, False):
        ids = torch.randint(0, 64, (374,), generator=draw).tolist()
        samples.append(decode_study.Sample("needle", calibrates, ids[:350], ids[350:], [(0, 24)]))
    paths = [tmp_path / name for name in ("chosen.json", "measured.json", "found.json")]
    for path, sample in zip(paths, samples, strict=False):
        decode_study.save_samples(path, [sample], 24)
    for density in (1.0, 0.6):
        arguments = ["--model", "tiny", "--calibrate", paths[0], "--prompts", paths[1]]
        arguments += ["--device", "cpu", "--every", 1, 4, "--density", density, "--json", paths[2]]
        monkeypatch.setattr("sys.argv", ["", *map(str, arguments)])
        decode_effects.main()
        rows = json.loads(paths[2].read_text())["rows"]
        kinds = [("steps", 1), ("steps", 4), ("rows", 1), ("alike", 1)]
        assert [(row["effects"], row["every"]) for row in rows] == kinds
        for row in rows:
            assert row["blocks"] == pytest.approx(density, abs=0.1)
            assert (row["kl"] < 1e-6) == (density == 1)
    assert "rows, every 1 steps: blocks 0." in capsys.readouterr().out


def test_coordinates_are_of_the_prompts_asked_for(study: Any) -> None:
    import decode_effects
    import decode_study

    samples = [
        decode_study.Sample(task, True, torch.randint(0, 64, (200,)).tolist(), [1], [])
        for task in ("retr_kv", "needle", "quotation")
    ]
    kv, needle, quotation = (study.read(sample).moments() for sample in samples)

    def same(kind: str, task: str, moments: Any) -> bool:
        found = decode_effects.coordinates(study, samples, kind)(task)
        expected = decode_study.bases_of(moments)
        assert found is not None
        return all(torch.equal(a.key, b.key) for a, b in zip(found, expected, strict=True))

    assert decode_effects.coordinates(study, samples, "own")("needle") is None
    together = kv.with_another(needle, 2)
    assert same("all", "needle", together.with_another(quotation, 3))
    assert same("others", "quotation", together)
    assert same("one", "retr_kv", needle)
    assert not same("one", "needle", needle)
    # Moments of both prompts' keys, as if they were one's.
    keys = [torch.stack(study.read(sample).key).double() for sample in samples[:2]]
    both = torch.cat(keys, 2)  # [L, G, 2 * N, D]
    torch.testing.assert_close(together.mean, both.mean(2))
    centred = both - both.mean(2, keepdim=True)
    covariance = centred.mT @ centred / both.shape[2]
    torch.testing.assert_close(together.key, covariance, rtol=1e-4, atol=1e-6)


def test_sessions_decode_prompts_of_several_lengths_together(
    study: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import decode_study

    monkeypatch.setattr(decode_study, "Study", lambda _: study)
    samples = [
        decode_study.Sample("needle", False, *(torch.randint(0, 64, (n,)).tolist() for n in of), [])
        for of in ((150, 12), (180, 9))
    ]
    paths = [str(tmp_path / name) for name in ("prompts.json", "found.json")]
    decode_study.save_samples(Path(paths[0]), samples, 12)
    arguments = ["session", "--device", "cpu", "--prompts", paths[0], "--json", paths[1]]
    decode_study.main([*arguments, "--density", "1", ".3"])
    assert "decoding: 24 sparse steps; density 1.000" in capsys.readouterr().out
    rows = json.loads(Path(paths[1]).read_text())["rows"]
    assert [(row["tokens"], row["steps"]) for row in rows] == [(150, 12), (180, 9)] * 2
    # Whoever reads all changes nothing.
    assert max(row["kl"] for row in rows[:2]) < 1e-6 < min(row["kl"] for row in rows[2:])
    assert 0.3 < rows[2]["reads"] < 1


def test_answers_are_right_when_all_of_their_tokens_are() -> None:
    from decode_study import Sample, answers_right

    sample = Sample("needle", False, [], [5, 6, 7, 1, 8, 9], [(0, 3), (4, 6)])
    assert answers_right(sample, torch.tensor([6, 7, 0, 8, 0, 0])) == {
        "right": 1,
        "answers": 2,
        "tokens": 3,
        "of": 4,
    }
    wrong = replace(sample, follow=[5, 6, 7, 1, 3, 9])
    assert answers_right(wrong, torch.tensor([6, 7, 0, 8, 9, 0]))["right"] == 1


def test_a_stream_asks_for_what_its_prompt_holds() -> None:
    from decode_study import make_sample, quotation, stream

    from shareprefill.models import load_tokenizer

    tokenizer = load_tokenizer("sp-tiny")
    for task in ("retr_kv", "needle"):
        prompt, pieces = stream(task, tokenizer, 600, 5)
        assert len(pieces) > 1
        assert all(answer.strip().strip('".') in prompt for answer, _ in pieces)
        sample = make_sample(task, tokenizer, 600, 50, 5, calibrates=False)
        assert len(sample.prompt) <= 600
        assert len(sample.follow) == 50
        start, stop = sample.answers[0]
        assert tokenizer.decode(sample.follow[start:stop]).strip() == pieces[0][0].strip()
    words = [f"w{n} " for n in range(100)]
    prompt, answer = quotation(words)
    assert prompt.endswith("w63 ")
    assert answer.startswith("w64 w65")
