from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from shareprefill.calib.prompts import make_prompts
from shareprefill.calib.tasks import TASKS
from shareprefill.config import CalibrateConfig
from shareprefill.errors import ConfigError, DataError
from shareprefill.models import load_tokenizer

TEXT = "The library module opens a file and reads its lines one by one. " * 40


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return load_tokenizer("sp-tiny")


def config(*data: str, **changes: Any) -> CalibrateConfig:
    options: dict[str, Any] = {"samples": 4, "length": 512, "block_size": 64, **changes}
    return CalibrateConfig(model="m", data=data, **options)


def test_a_mixture_holds_every_task_and_text(tokenizer: Any) -> None:
    prompts = make_prompts(config("mixture", samples=9, length=1024), tokenizer)
    assert [p.source for p in prompts] == [*TASKS, "text", TASKS[0]]
    assert all(len(p.input_ids) <= 1024 for p in prompts)
    assert not torch.equal(prompts[0].input_ids, prompts[8].input_ids)


def test_prompts_repeat_and_do_not_depend_on_their_number(tokenizer: Any) -> None:
    few, many = (make_prompts(config("mixture", samples=n), tokenizer) for n in (3, 6))
    assert [p.digest for p in few] == [p.digest for p in many[:3]]
    other = make_prompts(config("mixture", samples=3, seed=1), tokenizer)
    assert all(a.digest != b.digest for a, b in zip(few, other, strict=True))


def test_data_sets_alternate(tokenizer: Any) -> None:
    prompts = make_prompts(config("needle", "retr_kv"), tokenizer)
    assert [p.source for p in prompts] == ["needle", "retr_kv"] * 2


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("rows.jsonl", "\n".join(json.dumps({"text": f"{n} {TEXT}"}) for n in range(5))),
        ("rows.jsonl", "\n".join(json.dumps({"context": TEXT, "input": "?"}) for _ in range(5))),
        ("rows.json", json.dumps([f"{n} {TEXT}" for n in range(5)])),
        ("rows.json", json.dumps({"data": [{"prompt": TEXT}] * 5})),
        ("rows.txt", TEXT * 8),
    ],
)
def test_files(tmp_path: Path, tokenizer: Any, name: str, content: str) -> None:
    path = tmp_path / name
    path.write_text(content)
    for given in (path, tmp_path):
        prompts = make_prompts(config(str(given)), tokenizer)
        assert len(prompts) == 4
        assert all(256 <= len(p.input_ids) <= 512 for p in prompts)


@pytest.mark.parametrize("length", [512, 511])
def test_long_rows_lose_their_middle(tmp_path: Path, tokenizer: Any, length: int) -> None:
    path = tmp_path / "rows.json"
    path.write_text(json.dumps([f"first {TEXT}{TEXT} last"] * 4))
    ids = make_prompts(config(str(path), length=length), tokenizer)[0].input_ids
    text = tokenizer.decode(ids, skip_special_tokens=True)
    assert len(ids) == length
    assert text.startswith("first")
    assert text.endswith("last")


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.json"])
def test_rows_of_other_writers(tmp_path: Path, tokenizer: Any, name: str) -> None:
    texts = [f"{n}\u2028{TEXT}\x85{TEXT}" for n in range(3)] + [f"3 {TEXT} \ud83d {TEXT}"]
    rows = [json.dumps({"text": text}, ensure_ascii=text[0] == "3") for text in texts]
    content = "\n".join(rows) if name.endswith("l") else f"[{','.join(rows)}]"
    (tmp_path / name).write_bytes(b"\xef\xbb\xbf" + content.encode())
    prompts = make_prompts(config(str(tmp_path / name), length=2048), tokenizer)
    whole = {tokenizer.decode(p.input_ids, skip_special_tokens=True)[:1] for p in prompts}
    assert whole == {"0", "1", "2", "3"}


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("rows.jsonl", '{"text": "short"}\n' * 9, "only 0 prompts of at least 256 tokens"),
        (
            "rows.jsonl",
            json.dumps({"text": TEXT * 40}) + "\n" + '{"text": "short"}\n' * 9,
            "only 1 prompt of at least 256 tokens",
        ),
        ("rows.jsonl", '{"label": 3}\n', "no usable rows"),
        ("rows.jsonl", "{", "not valid JSON"),
        ("rows.json", "3", "must hold a list"),
        ("rows.csv", "a,b", "no .jsonl, .json or .txt"),
    ],
)
def test_unusable_files(
    tmp_path: Path, tokenizer: Any, name: str, content: str, message: str
) -> None:
    path = tmp_path / name
    path.write_text(content)
    error = ConfigError if name == "rows.csv" else DataError
    with pytest.raises(error, match=message):
        make_prompts(config(str(path)), tokenizer)


def test_bytes_that_are_no_text(tmp_path: Path, tokenizer: Any) -> None:
    path = tmp_path / "rows.txt"
    path.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(DataError, match="UTF-8"):
        make_prompts(config(str(path)), tokenizer)


def test_unknown_names_and_addresses(tokenizer: Any) -> None:
    with pytest.raises(ConfigError, match="retr_vk.*retr_kv"):
        make_prompts(config("retr_vk"), tokenizer)
    with pytest.raises(ConfigError, match="hub:<dataset>:<config>:<split>"):
        make_prompts(config("hub:name"), tokenizer)


def test_a_hub_address_goes_through_datasets(tmp_path: Path, tokenizer: Any) -> None:
    # A local folder is a data set that `datasets` opens without a network.
    folder = tmp_path / "corpus"
    folder.mkdir()
    rows = "\n".join(json.dumps({"text": f"{n} {TEXT}"}) for n in range(5))
    (folder / "train.jsonl").write_text(rows)
    prompts = make_prompts(config(f"hub:{folder}::train"), tokenizer)
    assert len(prompts) == 4
    with pytest.raises(DataError, match="cannot be opened"):
        make_prompts(config(f"hub:{tmp_path / 'missing'}::train"), tokenizer)
