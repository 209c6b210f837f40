from __future__ import annotations

import itertools
import json
import random
import tracemalloc
from pathlib import Path
from typing import Any

import pytest

from shareprefill.data import sources
from shareprefill.data.sources import TEXT_FILES, read_objects, read_rows, read_texts, reread
from shareprefill.errors import ConfigError, DataError

# All that `str.splitlines` ends lines at, but for those that end lines of files.
SEPARATORS = "\u2028\u2029\x85\x0b\x0c\x1c\x1d\x1e"


def values(path: Path, **options: Any) -> list[Any]:
    rows = list(read_rows(str(path), TEXT_FILES, **options))
    for row in rows:
        assert row.span is None or reread(row.span) == row.values, row.place
    return [row.values for row in rows]


@pytest.mark.parametrize("separator", SEPARATORS)
@pytest.mark.parametrize("name", ["rows.jsonl", "rows.json"])
def test_separators_inside_strings(tmp_path: Path, name: str, separator: str) -> None:
    rows = [{"text": f"one{separator}two"}, {"text": separator}, {"text": "last"}]
    lines = [json.dumps(row, ensure_ascii=False) for row in rows]
    # As they are, too: json escapes those below the space.
    lines.append(f'{{"text": "raw{separator}"}}')
    joined = "\n".join(lines) if name.endswith("l") else f"[{','.join(lines)}]"
    (tmp_path / name).write_bytes(joined.encode())
    assert values(tmp_path / name) == [*rows, {"text": f"raw{separator}"}]


@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        ("a.jsonl", b'\xef\xbb\xbf{"text": "x"}\n\xef\xbb\xbf{"text": "y"}\n', ["x", "y"]),
        ("a.jsonl", b'{"text": "x"}\r\n\r\n{"text": "y"}\r{"text": "z"}', ["x", "y", "z"]),
        ("a.jsonl", b'\x1e{"text": "x"}\n \x0c\n\t{"text": "y"} \x0b\n', ["x", "y"]),
        (
            "a.jsonl",
            b'{"text": "\\ud83d\\ude00 \\ud800 \\udc00x"}\n',
            ["\U0001f600 \ufffd \ufffdx"],
        ),
        ("a.jsonl", b'{"text": "x", "score": NaN, "other": -Infinity}', ["x"]),
        ("a.JSONL", b'{"text": "x"}', ["x"]),
        ("a.json", b'\xef\xbb\xbf [{"text": "x"} , {"text": "y\\uDEADz"}]\n', ["x", "y\ufffdz"]),
        ("a.json", b'{"text": "x"}\n{"text": "y"}\n', ["x", "y"]),
        ("a.json", b'{"data": [{"text": "x"}, {"text": "y"}]}', ["x", "y"]),
        ("a.json", b'{"text": "x"}', ["x"]),
        ("a.json", b"[]", []),
        ("a.jsonl", b"", []),
    ],
)
def test_rows_as_they_come(tmp_path: Path, name: str, content: bytes, expected: list) -> None:
    (tmp_path / name).write_bytes(content)
    assert [row["text"] for row in values(tmp_path / name)] == expected


def test_a_text_file_in_parts(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbf" + "äx€\r\n\U0001f600".encode() * 3)
    assert "".join(values(tmp_path / "a.txt", text_size=4)) == "äx€\n\U0001f600" * 3
    assert list(read_texts(str(tmp_path / "a.txt"))) == ["äx€\n\U0001f600" * 3]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", b'{"a": 1}\n{"a": \n', "row 1 of .*a.jsonl is not valid JSON: .* at column"),
        ("a.jsonl", b'{"a": 1} {"a": 2}\n', "row 0 of .*a.jsonl is not valid JSON: Extra data"),
        ("a.jsonl", b'{"a": 1}\n{"a": "\xff"}\n', "a.jsonl cannot be read as UTF-8 text .row 1"),
        ("a.jsonl", b'{"a": 1}\n{"a": "\xed\xa0\x80"}\n', "cannot be read as UTF-8 text .row 1"),
        ("a.jsonl", b"1\n" + b"[" * 200_000 + b"]" * 200_000, "row 1 of .* nested too deeply"),
        ("a.json", b"[1, " + b'{"a":' * 200_000, "row 1 of .* nested too deeply"),
        ("a.jsonl", b"9" * 5000, "row 0 of .* is not valid JSON: Exceeds the limit"),
        ("a.jsonl", b"{}\n\x00\x00\n", "row 1 of .* is not valid JSON"),
        ("a.json", b'[{"a": 1}, {"a": }]', "row 1 of .* is not valid JSON: .* at byte 17"),
        ("a.json", b'[{"a": 1} {"a": 2}]', "row 0 of .* must follow"),
        ("a.json", b'[{"a": 1}', "row 0 of .* must follow"),
        ("a.json", b'[{"a": 1},]', "row 1 of .* missing behind the last comma"),
        ("a.json", b"[1] [2]", "something stands behind the end"),
        ("a.json", b"", "row 0 of .* is not valid JSON"),
        ("a.json", b'"text"', "must hold a list of rows"),
        ("a.json", b'{"data": 3}', "must hold a list of rows"),
        ("a.txt", b"abc\xe2\x82", "a.txt cannot be read as UTF-8"),
        ("a.txt", b"\xff\xfea\x00", "a.txt cannot be read as UTF-8"),
    ],
)
def test_what_is_damaged_is_named(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=message) as caught:
        list(read_rows(str(tmp_path), TEXT_FILES))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("path", ["nowhere.jsonl", "x" * 5000, "a\0b.jsonl", "~nobody/x.jsonl"])
def test_paths_that_nothing_is_at(path: str) -> None:
    with pytest.raises(ConfigError, match="there is no "):
        list(read_rows(path))


def test_rows_that_are_no_objects(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{}\nnull\n{"text": null}\n{"text": "x"}\n"y"\n7\n')
    with pytest.raises(DataError, match="row 1 of .* must be an object, got NoneType"):
        list(read_objects(str(tmp_path / "a.jsonl")))
    texts = read_texts(str(tmp_path / "a.jsonl"))
    assert [next(texts), next(texts)] == ["x", "y"]
    with pytest.raises(DataError, match="row 5 of .* must be an object, got int"):
        next(texts)


@pytest.mark.parametrize(
    ("row", "text"),
    [
        ({"prompt": "a", "text": "b"}, "a"),
        ({"input": "a"}, "a"),
        ({"context": "a", "input": "b"}, "a\n\nb"),
        ({"context": "a", "input": ""}, "a"),
        ({"messages": [{"role": "user", "content": "a"}]}, [{"role": "user", "content": "a"}]),
        ({"messages": None, "content": "a"}, "a"),
    ],
)
def test_texts_are_those_that_calibration_reads(tmp_path: Path, row: Any, text: Any) -> None:
    (tmp_path / "a.jsonl").write_text(json.dumps(row) + '\n{"question": "?"}\n')
    texts = read_texts(str(tmp_path / "a.jsonl"))
    assert next(texts) == text
    with pytest.raises(DataError, match="row 1 of .* has no text: .* messages, prompt, input, "):
        next(texts)


@pytest.mark.parametrize("block", [1, 2, 3, 7, 64])
@pytest.mark.parametrize("indent", [None, 2])
def test_arrays_whatever_the_blocks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, block: int, indent: int | None
) -> None:
    monkeypatch.setattr(sources, "_BLOCK", block)
    rng = random.Random(0)
    rows: list[Any] = [0, 12345, -1.5e-7, True, None, "", [], {}, 'é"\\ []{},:\u2028\U0001f600']
    rows += [{"n": rng.random(), "deep": [[rows[k]], k]} for k in range(len(rows))]
    rng.shuffle(rows)
    content = json.dumps(rows, indent=indent, ensure_ascii=False)
    (tmp_path / "a.json").write_text(content, encoding="utf-8")
    assert values(tmp_path / "a.json") == rows
    for cut in range(1, len(content) - 1, 9):
        (tmp_path / "a.json").write_text(content[:cut], encoding="utf-8")
        with pytest.raises(DataError):
            list(read_rows(str(tmp_path / "a.json")))


@pytest.mark.parametrize("name", ["big.jsonl", "big.json", "big.txt"])
def test_two_rows_of_a_large_file_are_cheap(tmp_path: Path, name: str) -> None:
    row = json.dumps({"text": "words " * 2000})
    first, between, last = ("[", ",", "]") if name == "big.json" else ("", "\n", "")
    with open(tmp_path / name, "w") as file:
        file.write(first + row)
        for _ in range(3000):
            file.write(between + row)
        file.write(last)
    tracemalloc.start()
    try:
        rows = read_rows(str(tmp_path / name), TEXT_FILES)
        assert len(list(itertools.islice(rows, 2))) == 2
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert (tmp_path / name).stat().st_size > 30e6
    # Of a text, one part of 4 Mi characters and the next.
    assert peak < 20e6


HUB_ROW = '{"text": "x"}\n'


def hub_rows(folder: Path, content: bytes) -> list[Any]:
    folder.mkdir(exist_ok=True)
    (folder / "train.jsonl").write_bytes(content)
    return [row.values for row in read_rows(f"hub:{folder}::train")]


@pytest.mark.parametrize(
    "content",
    [
        (HUB_ROW + '{"text": \n' + HUB_ROW).encode(),
        (HUB_ROW + "[1]\n").encode(),
        (HUB_ROW + '{"text": "\\ud800"}\n').encode(),
        (HUB_ROW + '{"text": ' + "[" * 3000 + "]" * 3000 + "}\n").encode(),
        b'{"text": "\xff"}\n',
    ],
)
def test_broken_rows_of_a_local_data_set_through_the_hub(
    tmp_path: Path, content: bytes, capfd: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(DataError, match=r"hub:.* cannot be (opened|read from row \d+ on): ."):
        hub_rows(tmp_path / "set", content)
    assert capfd.readouterr() == ("", "")


def test_empty_rows_of_a_local_data_set_through_the_hub(tmp_path: Path) -> None:
    row = {"text": "x"}
    found = hub_rows(tmp_path / "some", (HUB_ROW + "{}\nnull\n" + HUB_ROW).encode())
    assert found == [row, {"text": None}, {"text": None}, row]
    assert list(read_texts(f"hub:{tmp_path / 'some'}::train")) == ["x", "x"]
    assert hub_rows(tmp_path / "none", b"") == []
