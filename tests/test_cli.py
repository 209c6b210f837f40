from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from shareprefill.artifact import load_artifact
from shareprefill.files import locked_folder, locked_output, reading_folder
from shareprefill.report.marks import TRACE, mark_of
from shareprefill.report.page import Page
from shareprefill.runtime.crossover import crossover
from tests.support.checkpoint import save_checkpoint
from tests.support.families import FAMILIES, build

Sp = Any


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a model, its calibration and its artifact, made by the three commands."""
    folder = tmp_path_factory.mktemp("work")
    save_checkpoint(folder / "model")
    data = ["--data", "retr_kv", "--data", "text"]
    size = ["--samples", "4", "--length", "512", "--block-size", "32"]
    for command in (
        ["calibrate", "--model", "model", *data, *size],
        ["cluster", "--k", "auto", "--target-recall", "0.8"],
    ):
        subprocess.run([sys.executable, "-m", "shareprefill.cli", *command], cwd=folder, check=True)
    return folder


def expect_error(result: tuple[int, str, str], *words: str) -> None:
    code, _, err = result
    assert code == 1
    assert err.startswith("sp: ")
    assert err.count("\n") == 1, err
    for word in words:
        assert word in err


def test_the_three_commands(work: Path, sp: Sp, tmp_path: Path) -> None:
    artifact = load_artifact(work / "clusters.st")
    assert artifact.model == "model"
    assert (work / "artifacts" / "model" / "calibration" / "index.json").exists()
    prompt = tmp_path / "prompt.txt"
    prompt.write_text("A line of text that is read. " * 60)
    options = ["--artifact", work / "clusters.st", "--model", work / "model", "--min-tokens", "0"]
    code, out, err = sp("run", *options, prompt, "--max-new-tokens", 5, "--compare-dense", "--json")
    assert (code, err) == (0, "")
    facts = json.loads(out)
    assert 0 < facts["density"] <= 1
    assert sum(facts["policies"].values()) == 12
    assert facts["new_tokens"] == 5
    assert facts["same_answer"] == (facts["text"] == facts["dense_text"])
    for name in ("prompt_tokens", "ttft_s", "decode_tokens_per_s", "hidden_error", "kl"):
        assert facts[name] > 0
    assert 0 < facts["top1_agreement"] <= 1
    assert facts["speedup"] == pytest.approx(facts["dense_ttft_s"] / facts["ttft_s"])
    low, high = facts["ttft_s_range"]
    assert low <= facts["ttft_s"] <= high
    code, out, _ = sp("run", *options, prompt, "--max-new-tokens", 5, "--policy", "dense")
    assert code == 0
    assert facts["dense_text"] in out
    assert f"{facts['prompt_tokens']} prompt tokens" in out.splitlines()[-1]


def test_sparse_steps_are_compared_with_dense_ones(work: Path, sp: Sp, tmp_path: Path) -> None:
    (tmp_path / "prompt.txt").write_text("A line of text that is read. " * 60)
    options = ["--artifact", work / "clusters.st", "--model", work / "model", "--min-tokens", "0"]
    options += ["--max-new-tokens", 5, "--policy", "dense", "--decode", "sparse", "--compare-dense"]
    code, out, _ = sp("run", *options, "prompt.txt", "--json")
    facts = json.loads(out)
    assert code == 0
    assert facts["kl"] < 1e-9 < facts["answer_kl"]
    assert 0 <= facts["answer_top1_agreement"] <= 1
    code, out, _ = sp("run", *options, "prompt.txt")
    assert code == 0
    assert "KL of the answer's steps" in " ".join(out.split())


def test_no_speedup_where_nothing_was_sparse(work: Path, sp: Sp, tmp_path: Path) -> None:
    (tmp_path / "prompt.txt").write_text("A line of text that is read. " * 60)
    options = ["--artifact", work / "clusters.st", "--model", work / "model", "--max-new-tokens", 2]
    code, out, _ = sp(
        "run", *options, "prompt.txt", "--policy", "dense", "--compare-dense", "--json"
    )
    facts = json.loads(out)
    assert (code, facts["density"], facts["speedup"]) == (0, 1.0, None)
    assert (facts["kl"], facts["top1_agreement"]) == (0.0, 1.0)
    code, out, _ = sp("run", *options, "prompt.txt", "--compare-dense")
    assert code == 0
    assert "speed-up: no prefill was sparse" in out


def test_times_do_not_hold_what_measures_recall(
    work: Path, sp: Sp, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from shareprefill.runtime import answering

    measured = []
    session, timed = answering.share_prefill, answering._time_prefill

    def share(*arguments: Any, **options: Any) -> Any:
        measured.append(options.get("measure_recall", False))
        return session(*arguments, **options)

    runs: list[float] = []

    def time_prefill(*arguments: Any) -> float:
        runs.append(timed(*arguments))
        return runs[-1]

    monkeypatch.setattr(answering, "share_prefill", share)
    monkeypatch.setattr(answering, "_time_prefill", time_prefill)
    (tmp_path / "prompt.txt").write_text("A line of text that is read. " * 60)
    options = ["--artifact", work / "clusters.st", "--model", work / "model", "--min-tokens", "0"]
    code, out, _ = sp("run", *options, "prompt.txt", "--recall", "--compare-dense", "--json")
    facts = json.loads(out)
    assert (code, measured) == (0, [False, True])
    assert facts["recall"] > 0
    # Ours and dense attention's took turns.
    assert len(runs) == 4
    assert {*runs[::2]} & {*facts["ttft_s_range"], facts["ttft_s"]}
    assert {*runs[1::2]} & {*facts["dense_ttft_s_range"], facts["dense_ttft_s"]}


def test_a_prompt_from_standard_input(work: Path) -> None:
    # Without --model: it was calibrated in this folder.
    command = ["run", "--artifact", "clusters.st", "-", "--max-new-tokens", "2", "--json"]
    found = subprocess.run(
        [sys.executable, "-m", "shareprefill.cli", *command],
        cwd=work,
        input="Some words.",
        capture_output=True,
        text=True,
        check=True,
    )
    facts = json.loads(found.stdout)
    assert facts["density"] == 1.0
    assert facts["policies"] == {}


def test_a_model_that_only_a_file_names_is_not_loaded(work: Path, sp: Sp, tmp_path: Path) -> None:
    save_checkpoint(tmp_path / "model")
    (tmp_path / "prompt.txt").write_text("words")
    result = sp("run", "--artifact", work / "clusters.st", "prompt.txt")
    expect_error(result, "names the model model", "say --model")


def test_a_trace_replaces_its_models_traces_alone(work: Path, sp: Sp, tmp_path: Path) -> None:
    (tmp_path / "prompt.txt").write_text("A line of text that is read. " * 60)
    options = ["--artifact", work / "clusters.st", "--model", work / "model", "--min-tokens", "0"]
    run = ["run", *options, "prompt.txt", "--max-new-tokens", 1, "--trace", "trace.html"]
    assert [sp(*run)[0] for _ in range(2)] == [0, 0]
    for page in ("<!DOCTYPE html>my own", Page("t", mark=mark_of(TRACE, "other")).html()):
        (tmp_path / "trace.html").write_text(page)
        expect_error(sp(*run), "trace.html is there and", "use --force")
        assert (tmp_path / "trace.html").read_text() == page


def test_recall_on_request(work: Path, sp: Sp, tmp_path: Path) -> None:
    (tmp_path / "prompt.txt").write_text("A line of text that is read. " * 60)
    options = ["--artifact", work / "clusters.st", "--model", work / "model", "--min-tokens", "0"]
    code, out, _ = sp("run", *options, "prompt.txt", "--recall", "--json", "--gamma", "0.7")
    assert code == 0
    assert 0.6 < json.loads(out)["recall"] <= 1


def test_inspect(work: Path, sp: Sp) -> None:
    code, out, _ = sp("inspect", work / "clusters.st", "--json")
    facts = json.loads(out)
    assert (code, facts["heads"], facts["block_size"]) == (0, 12, 32)
    assert facts["configuration"]["calibrate"]["data"] == ["retr_kv", "text"]
    code, out, _ = sp("inspect", work / "clusters.st")
    assert code == 0
    assert "heads by policy" in out


def test_one_process_an_output(work: Path, sp: Sp, tmp_path: Path) -> None:
    folder = work / "artifacts" / "model" / "calibration"
    with locked_output(tmp_path / "a.st"):
        expect_error(sp("cluster", folder, "--out", "a.st"), "a.st is in use by another process")
    with locked_folder(folder):
        expect_error(sp("cluster", folder, "--out", "a.st"), "calibration is in use by another")
    with reading_folder(folder):
        expect_error(sp("train", folder, "--epochs", 1), "calibration is in use by another")
    assert list(tmp_path.iterdir()) == []


def test_cluster_says_which_calibration_it_takes(work: Path, sp: Sp, tmp_path: Path) -> None:
    (tmp_path / "artifacts").symlink_to(work / "artifacts")
    code, out, err = sp("cluster", "--k", 3, "--out", "three.st")
    assert code == 0
    assert "artifacts/model/calibration (the newest)" in err
    assert "heads by policy" in out
    assert load_artifact(tmp_path / "three.st").cluster.max() == 2


def test_cluster_replaces_only_what_is_its_models(work: Path, sp: Sp, tmp_path: Path) -> None:
    folder = work / "artifacts" / "model" / "calibration"
    other = Path(__file__).parent / "data" / "format-1.st"
    for name, content, word in (
        ("other.st", other.read_bytes(), "an artifact of another model"),
        ("notes.st", b"my notes", "no artifact"),
        ("empty.st", b"", "no artifact"),
    ):
        (tmp_path / name).write_bytes(content)
        result = sp("cluster", folder, "--k", 2, "--out", name)
        expect_error(result, f"{name} is", word, "--force", "--out")
        assert (tmp_path / name).read_bytes() == content
    assert sp("cluster", folder, "--k", 2, "--out", "other.st", "--force")[0] == 0
    # Its own model's is replaced as before.
    assert sp("cluster", folder, "--k", 3, "--out", "other.st")[0] == 0
    assert load_artifact(tmp_path / "other.st").cluster.max() == 2


def test_train_alone_and_resume(work: Path, sp: Sp) -> None:
    folder = work / "artifacts" / "model" / "calibration"
    code, out, _ = sp("train", folder, "--epochs", 2, "--code-size", 8)
    assert code == 0
    assert "autoencoder-8" in out
    assert "PCA-8" in out
    assert "mean map" in out
    stamps = {p: p.stat().st_mtime_ns for p in folder.glob("maps-*")}
    options = ["--samples", 4, "--length", 512, "--block-size", 32, "--out", folder]
    data = ["--data", "retr_kv", "--data", "text"]
    result = sp("calibrate", "--model", work / "model", *data, *options)
    expect_error(result, "another configuration", "model 'model' there")
    command = ["calibrate", "--model", "model", *data, *options]
    subprocess.run(
        [sys.executable, "-m", "shareprefill.cli", *map(str, command)], cwd=work, check=True
    )
    assert {p: p.stat().st_mtime_ns for p in folder.glob("maps-*")} == stamps


def test_doctor(sp: Sp) -> None:
    code, out, _ = sp("doctor", "--json")
    checks = {check["name"]: check for check in json.loads(out)}
    assert code == 0
    assert checks["attention: blockwise"]["state"] == "works"
    if not torch.cuda.is_available():
        assert checks["pages of 128 tokens"]["state"] == "gathered"
        assert "blockwise reads no pages" in checks["pages of 128 tokens"]["detail"]
    found = [(c["state"], c["detail"]) for c in json.loads(out) if c["name"] == "crossover"]
    known = crossover(torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    assert [state for state, _ in found] == [f"{known.tokens} tokens", f"density {known.density:g}"]
    assert all(known.source in detail for _, detail in found)
    assert sp("doctor")[0] == 0


def test_bad_prompts(work: Path, sp: Sp, tmp_path: Path) -> None:
    (tmp_path / "empty.txt").write_text(" \n")
    (tmp_path / "bytes.txt").write_bytes(b"\xff\xfe")
    (tmp_path / "long.txt").write_text("word " * 6000)
    options = ["--artifact", work / "clusters.st", "--model", work / "model"]
    expect_error(sp("run", *options, "missing.txt"), "missing.txt", "does not exist")
    expect_error(sp("run", *options, "empty.txt"), "empty")
    expect_error(sp("run", *options, "bytes.txt"), "bytes.txt", "UTF-8")
    expect_error(sp("run", *options, "long.txt"), "maximum of 4096")


def test_bad_artifacts(work: Path, sp: Sp, tmp_path: Path) -> None:
    (tmp_path / "prompt.txt").write_text("words")
    good = (work / "clusters.st").read_bytes()
    (tmp_path / "cut.st").write_bytes(good[:-10])
    expect_error(sp("run", "--artifact", "missing.st", "prompt.txt"), "missing.st")
    expect_error(sp("run", "--artifact", "cut.st", "prompt.txt"), "cut.st", "regenerate it")
    expect_error(sp("inspect", "cut.st"), "cut.st")
    other = save_checkpoint(tmp_path / "other")
    config = json.loads((other / "config.json").read_text())
    from transformers import LlamaConfig, LlamaForCausalLM

    LlamaForCausalLM(LlamaConfig(**{**config, "num_hidden_layers": 2})).save_pretrained(other)
    options = ["--artifact", work / "clusters.st", "--model", other]
    expect_error(sp("run", *options, "prompt.txt"), "3 layers", "2 layers")


def test_lengths_are_written_alike_in_all_commands(work: Path, sp: Sp) -> None:
    model = ("--model", work / "model")
    expect_error(sp("calibrate", *model, "--length", "5K"), "5120", "maximum of 4096")
    one = (*model, "--artifact", work / "clusters.st", "--tasks", "retr_kv")
    expect_error(sp("eval", *one, "--lengths", "5K"), "length = 5120", "maximum of 4096")
    expect_error(sp("sweep", *one, "--gamma", 0.9, "--length", "5k"), "length = 5120")
    expect_error(sp("eval", *one, "--lengths", "5X"), "'5X' is not allowed")
    for command, length in ((("sweep", *one, "--gamma", 0.9), "1K,2K"), (("calibrate",), "many")):
        code, _, err = sp(*command, *model, "--length", length)
        assert code == 2
        assert f"{length!r} is not allowed" in err


def test_bad_models(sp: Sp, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    for name in ("./nowhere", "empty"):
        expect_error(sp("calibrate", "--model", name, "--length", 512), name)
    assert not (tmp_path / "artifacts").exists()
    checkpoint = save_checkpoint(tmp_path / "bare")
    for file in checkpoint.glob("token*"):
        file.unlink()
    expect_error(sp("calibrate", "--model", "bare", "--length", 512), "tokenizer")


def test_bad_options(work: Path, sp: Sp, tmp_path: Path) -> None:
    model = work / "model"
    short = ("--model", model, "--length", 512)
    expect_error(sp("calibrate", *short, "--data", "retr_vk"), "retr_vk", "retr_kv")
    expect_error(sp("calibrate", "--model", model, "--samples", 1), "samples = 1")
    expect_error(sp("calibrate", "--model", model, "--length", 5000), "maximum of 4096")
    folder = work / "artifacts" / "model" / "calibration"
    expect_error(sp("cluster", folder, "--k", 13), "k = 13", "12")
    expect_error(sp("cluster", folder, "--k", "many"), "'many'", "auto")
    expect_error(sp("cluster", folder, "--metric", "cosine"), "'cosine'", "jaccard-raw")
    expect_error(sp("cluster"), "holds no calibration", "sp calibrate")
    assert sp("cluster", "--no-such-option")[0] == 2
    assert list(tmp_path.iterdir()) == []


@pytest.mark.skipif(os.geteuid() != 0, reason="needs a mount: run as root")
def test_a_full_disk_leaves_nothing_behind(work: Path, sp: Sp, tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=8k", "tmpfs", disk], check=False)
    if mounted.returncode:
        pytest.skip("mounting is not allowed here")
    try:
        folder = work / "artifacts" / "model" / "calibration"
        (disk / "clusters.st").write_bytes(b"earlier")
        full = sp("cluster", folder, "--out", disk / "clusters.st", "--force")
        expect_error(full, "disk is full")
        assert [p.name for p in disk.iterdir()] == ["clusters.st"]
        assert (disk / "clusters.st").read_bytes() == b"earlier"
    finally:
        subprocess.run(["umount", disk], check=True)


def test_help_is_quick_and_loads_no_torch() -> None:
    check = "import sys, shareprefill.cli; print('torch' in sys.modules)"
    found = subprocess.run(
        [sys.executable, "-c", check], capture_output=True, text=True, check=True
    )
    assert found.stdout.strip() == "False"
    start = time.perf_counter()
    subprocess.run([sys.executable, "-m", "shareprefill.cli", "--help"], check=True)
    assert time.perf_counter() - start < 5


def test_diff(work: Path, sp: Sp, tmp_path: Path) -> None:
    folder, before = work / "artifacts" / "model" / "calibration", work / "clusters.st"
    assert sp("cluster", folder, "--k", 3, "--tau", 0.3, "--out", "after.st")[0] == 0
    code, out, err = sp("diff", before, "after.st", "--json")
    assert (code, err) == (0, "")
    facts = json.loads(out)
    assert facts["differs"]
    assert {"name": "thresholds.tau", "before": 0.2, "after": 0.3} in facts["settings"]
    code, out, _ = sp("diff", before, "after.st", "--exit-code")
    assert code == 1
    assert f"{len(facts['moved'])} of 12 heads moved" in out
    assert "thresholds.tau" in out
    assert sp("diff", before, before, "--exit-code")[:2] == (
        0,
        "the artifacts are equal: 12 heads of model\n",
    )


def test_diff_refuses_what_it_cannot_compare(work: Path, sp: Sp, tmp_path: Path) -> None:
    (tmp_path / "cut.st").write_bytes((work / "clusters.st").read_bytes()[:-10])
    expect_error(sp("diff", work / "clusters.st", "cut.st"), "cut.st", "regenerate it")
    expect_error(sp("diff", "missing.st", work / "clusters.st"), "missing.st")


def test_doctor_tells_what_each_layer_of_a_model_is(sp: Sp, tmp_path: Path) -> None:
    for name in ("gemma3_text", "gpt_oss", "qwen3_next", "gpt_neo"):
        build(next(f for f in FAMILIES if f.name == name)).save_pretrained(tmp_path / name)
        # Only the configuration is looked at.
        (tmp_path / name / "model.safetensors").unlink()

    def checks(name: str, status: int = 0) -> list[tuple[str, str, str]]:
        code, out, _ = sp("doctor", "--model", name, "--json")
        assert code == status
        return [(check["name"], check["state"], check["detail"]) for check in json.loads(out)]

    assert checks("sp-tiny") == [("layers 0-5", "shared", "")]
    assert checks("gemma3_text") == [
        ("layers 0, 2", "window, dense", "sliding window of 24"),
        ("layer 1", "shared", ""),
    ]
    # Its attention sinks are computed along.
    assert checks("gpt_oss") == [
        ("layers 0, 2", "window, dense", "sliding window of 24"),
        ("layer 1", "shared", ""),
    ]
    assert checks("qwen3_next") == [
        ("layer 0", "not attention", "linear attention"),
        ("layer 1", "shared", ""),
    ]
    ((name, state, detail),) = checks("gpt_neo", status=1)
    assert (name, state) == ("model", "unsupported")
    assert "computes attention by itself" in detail
    assert "sliding window of 24" in sp("doctor", "--model", "gpt_oss")[1]
    expect_error(sp("doctor", "--model", "missing/model/x"), "missing/model/x")


def test_doctor_loads_a_model_that_does_not_run_without_weights(
    sp: Sp, monkeypatch: pytest.MonkeyPatch
) -> None:
    from shareprefill.runtime import layers

    devices = []

    def needs_values(model: Any) -> Any:
        devices.append(model.device.type)
        if devices == ["meta"]:
            raise RuntimeError("Tensor.item() cannot be called on meta tensors")
        return found(model)

    found = layers.layer_uses
    monkeypatch.setattr(layers, "layer_uses", needs_values)
    assert "layers 0-5" in sp("doctor", "--model", "sp-tiny")[1]
    assert len(devices) == 2
    assert devices[1] != "meta"
