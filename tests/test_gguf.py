"""Models in GGUF files: loaded, named, refused where they are damaged."""

from __future__ import annotations

import contextlib
import random
import shutil
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from shareprefill import models
from shareprefill.cli import main
from shareprefill.errors import ModelError
from shareprefill.models import (
    fingerprint,
    load_config,
    load_model,
    load_tokenizer,
    model_slug,
    resolve_model,
)
from tests.support.checkpoint import save_checkpoint

pytest.importorskip("gguf", reason="the package gguf, of the extra of that name, is missing")

from tests.support.gguf_file import write_gguf
from tools.real_model import write_model


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    path = tmp_path_factory.mktemp("gguf") / "Tiny.Q8_0.gguf"
    return path, write_gguf(path)


@pytest.fixture
def damaged(written: tuple[Path, Any], tmp_path: Path) -> Path:
    return Path(shutil.copy(written[0], tmp_path / "damaged.gguf"))


def test_a_gguf_file_is_a_model(written: tuple[Path, Any], capsys: pytest.CaptureFixture) -> None:
    path, original = written
    model = load_model(str(path), device="cpu")
    tokenizer = load_tokenizer(str(path))
    assert not model.training
    assert (model.dtype, load_config(str(path)).model_type) == (torch.float32, "llama")
    ids = tokenizer("the a").input_ids
    assert tokenizer.decode(ids) == "the a"
    assert len(ids) == 3
    with torch.no_grad():
        torch.testing.assert_close(
            model(torch.tensor([ids])).logits, original(torch.tensor([ids])).logits
        )
    assert fingerprint(model) == fingerprint(original)
    assert capsys.readouterr().err == ""


def test_quantised_weights_are_plain_tensors_after_loading(tmp_path: Path) -> None:
    original = write_gguf(tmp_path / "m.gguf", quantised=True)
    for dtype in (torch.float32, torch.bfloat16):
        model = load_model(str(tmp_path / "m.gguf"), device="cpu", dtype=str(dtype)[6:])
        weight = model.model.layers[1].self_attn.k_proj.weight
        assert type(weight) is torch.nn.Parameter
        assert weight.dtype == dtype
        torch.testing.assert_close(
            weight.float(), original.model.layers[1].self_attn.k_proj.weight, atol=0.02, rtol=0.02
        )


def test_files_beside_a_gguf_file_are_not_taken_for_its_own(
    written: tuple[Path, Any], tmp_path: Path
) -> None:
    save_checkpoint(tmp_path)
    path = Path(shutil.copy(written[0], tmp_path / "m.GGUF"))
    assert load_tokenizer(str(path)).get_vocab() == load_tokenizer(str(written[0])).get_vocab()
    assert load_config(str(path)).vocab_size == written[1].config.vocab_size


def test_names_of_gguf_files(
    written: tuple[Path, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = written[0]
    assert resolve_model(str(path)) == str(path)
    assert model_slug(str(path)) == path.name
    monkeypatch.setenv("HOME", str(path.parent))
    assert load_config(f"~/{path.name}").model_type == "llama"
    assert model_slug(f"~/{path.name}") == path.name
    monkeypatch.chdir(path.parent)
    assert load_config(path.name).model_type == "llama"
    link = tmp_path / "link.gguf"
    link.symlink_to(path)
    assert load_config(str(link)).model_type == "llama"
    for name in ("none.gguf", "organisation/none.gguf", "./none.GGUF", "none\x1b[2J.gguf"):
        with pytest.raises(ModelError, match="there is no file .*: check the path") as caught:
            load_model(name)
        assert str(caught.value).isprintable()


def test_a_folder_with_a_gguf_files_name_is_a_folder(tmp_path: Path) -> None:
    folder = save_checkpoint(tmp_path / "x.gguf")
    assert load_model(str(folder), device="cpu").config.model_type == "llama"
    assert load_tokenizer(str(folder))("a b").input_ids
    assert model_slug(str(folder)) == "x.gguf"


@pytest.mark.parametrize("missing", ["gguf", "accelerate"])
def test_missing_packages_are_named(
    missing: str, written: tuple[Path, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    def found(name: str) -> ModuleType | None:
        return None if name == missing else models

    monkeypatch.setattr(models, "find_spec", found)
    for load in (load_model, load_tokenizer, load_config):
        with pytest.raises(ModelError, match=rf"without {missing}: pip install .*prefill\[gguf\]"):
            load(str(written[0]))


@pytest.mark.parametrize("kept", [0, 3, 4, 10, 24, 200, 2000, -1000])
def test_cut_files_are_refused(kept: int, damaged: Path) -> None:
    damaged.write_bytes(damaged.read_bytes()[:kept])
    with pytest.raises(ModelError, match=r"damaged\.gguf .*get the .* again") as caught:
        load_model(str(damaged), device="cpu")
    assert str(caught.value).isprintable()


def test_other_files_of_that_name_are_refused(damaged: Path) -> None:
    for content in (b"GGUF", b"hello" * 1000, b"\x00" * 5000):
        damaged.write_bytes(content)
        for load in (load_model, load_tokenizer, load_config):
            with pytest.raises(ModelError, match=r"damaged\.gguf .*get the file again"):
                load(str(damaged))


def test_an_unknown_architecture_is_refused(damaged: Path) -> None:
    damaged.write_bytes(damaged.read_bytes().replace(b"llama", b"lxama"))
    with pytest.raises(ModelError, match="lxama"):
        load_model(str(damaged), device="cpu")


def test_flipped_bytes_raise_nothing_but_our_own_errors(damaged: Path) -> None:
    """A flipped weight cannot be seen; every other damage must end in a ModelError."""
    good, rng = damaged.read_bytes(), random.Random(0)
    for _ in range(60):
        data = bytearray(good)
        # Names, sizes and types stand in the first 8 KiB; the weights follow.
        data[rng.randrange(8192)] ^= 1 << rng.randrange(8)
        damaged.write_bytes(data)
        for load in (load_config, load_tokenizer):
            with contextlib.suppress(ModelError):
                load(str(damaged))


@pytest.mark.slow
def test_the_three_commands_take_a_gguf_file(
    written: tuple[Path, Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture,
) -> None:
    monkeypatch.chdir(tmp_path)
    name = str(written[0])
    small = ("--samples", "3", "--length", "320", "--block-size", "32")
    (tmp_path / "prompt.txt").write_text("the needle is a haystack " * 40)
    for arguments in (
        ("calibrate", "--model", name, "--data", "text", *small),
        ("cluster",),
        ("doctor", "--model", name),
        ("run", "--artifact", "clusters.st", "prompt.txt", "--max-new-tokens", "3"),
    ):
        monkeypatch.setattr("sys.argv", ["sp", *arguments])
        with pytest.raises(SystemExit) as ended:
            main()
        assert ended.value.code in (0, None), capsys.readouterr().err
    assert (tmp_path / "artifacts" / written[0].name / "calibration" / "index.json").exists()


def test_the_real_model_tool_writes_a_folder_of_the_same_model(
    written: tuple[Path, Any], tmp_path: Path
) -> None:
    out = tmp_path / "out"
    write_model(written[0], b"a licence", out, dtype="float32")
    assert (out / "LICENSE").read_bytes() == b"a licence"
    assert "Q4_1" in (out / "README.md").read_text()
    ids = load_tokenizer(str(written[0]))("the a").input_ids
    assert load_tokenizer(str(out))("the a").input_ids == ids
    found = load_model(str(out), device="cpu")
    with torch.no_grad():
        torch.testing.assert_close(
            found(torch.tensor([ids])).logits, written[1](torch.tensor([ids])).logits
        )
