"""Conversations: `sp run --chat`, and rows with the field `messages`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from shareprefill import cli
from shareprefill.calib.pipeline import capture_maps
from shareprefill.calib.prompts import make_prompts
from shareprefill.commands.streams import read_chat
from shareprefill.config import CalibrateConfig
from shareprefill.data.sources import read_texts
from shareprefill.errors import ConfigError, DataError
from shareprefill.evaluation.config import EvalConfig
from shareprefill.evaluation.questions import make_questions
from shareprefill.models import load_tokenizer
from shareprefill.runtime.generation import encode_prompt
from shareprefill.tokens import as_messages, encode_chat, encode_either
from tests.support.tiny import tiny_llama

TEMPLATE = (
    "{% for m in messages %}"
    "{% if m.role == 'bad' %}{{ raise_exception('no such role') }}{% endif %}"
    "<{{ m.role }}>{{ m.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
ASKED = [{"role": "system", "content": "Be short."}, {"role": "user", "content": "Why?"}]
ANSWERED = [*ASKED, {"role": "assistant", "content": "So."}]


@pytest.fixture
def tokenizer() -> Any:
    found = load_tokenizer("sp-tiny")
    found.chat_template = TEMPLATE
    return found


def test_the_template_writes_the_prompt(tokenizer: Any) -> None:
    def text(messages: list[dict[str, str]]) -> str:
        return tokenizer.decode(encode_either(tokenizer, messages))

    assert text(ASKED) == "<system>Be short.\n<user>Why?\n<assistant>"
    # A finished conversation is not begun anew.
    assert text(ANSWERED) == "<system>Be short.\n<user>Why?\n<assistant>So.\n"
    ids = encode_prompt(tiny_llama(), tokenizer, ASKED)
    assert ids.tolist() == encode_chat(tokenizer, ASKED).tolist()


def test_what_cannot_be_a_conversation(tokenizer: Any) -> None:
    for values in (None, [], "text", [{"role": "user"}], [{"content": "x"}], ["x"]):
        with pytest.raises(DataError, match="row 3 of a.jsonl: mess"):
            as_messages(values, "row 3 of a.jsonl")
    parts = [{"role": "user", "content": [{"type": "text", "text": t} for t in "ab"]}]
    assert as_messages(parts, "a") == [{"role": "user", "content": "ab"}]
    with pytest.raises(DataError, match="refuses the messages: no such role"):
        encode_chat(tokenizer, [{"role": "bad", "content": ""}])
    tokenizer.chat_template = None
    with pytest.raises(DataError, match="has no chat template"):
        encode_chat(tokenizer, ASKED)


def test_what_a_template_reads_beside_texts_is_kept(tokenizer: Any, tmp_path: Path) -> None:
    tokenizer.chat_template = TEMPLATE.replace(
        "{{ m.content }}", "{% if m.tool_calls is defined %}CALLS{% endif %}{{ m.content }}"
    )
    calls = {"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "f"}}]}
    asked = [*ASKED, calls, {"role": "tool", "content": "3", "tool_calls": None}]
    (tmp_path / "calls.json").write_text(json.dumps(asked))
    ids = encode_prompt(tiny_llama(), tokenizer, read_chat(tmp_path / "calls.json", None))
    assert tokenizer.decode(ids).endswith("<assistant>CALLS\n<tool>3\n<assistant>")
    rows = tmp_path / "tools.json"
    rows.write_text(json.dumps({"messages": ASKED, "tools": [{"function": {"name": "f"}}]}))
    with pytest.raises(DataError, match=r"tools.json has tools, which are not handed"):
        read_chat(rows, None)
    with pytest.raises(DataError, match=r"tools.json has tools, which are not handed"):
        list(read_texts(str(rows)))
    rows.write_text(json.dumps({"messages": ASKED, "tools": None}))
    assert read_chat(rows, None) == ASKED


def test_an_empty_conversation_is_refused(tokenizer: Any) -> None:
    for content in ("", " \n"):
        for asked in ([], ASKED[:1]):
            with pytest.raises(DataError, match="the conversation is empty"):
                encode_prompt(
                    tiny_llama(), tokenizer, [*asked, {"role": "user", "content": content}]
                )


def test_files_of_messages_and_texts(tmp_path: Path) -> None:
    (tmp_path / "list.json").write_text(json.dumps(ASKED))
    (tmp_path / "object.json").write_text(json.dumps({"messages": ASKED}))
    (tmp_path / "lines.jsonl").write_text("\n".join(map(json.dumps, ASKED)))
    (tmp_path / "question.txt").write_text("Why?")
    for name in ("list.json", "object.json", "lines.jsonl"):
        assert read_chat(tmp_path / name, None) == ASKED
        with pytest.raises(ConfigError, match="leave out --system"):
            read_chat(tmp_path / name, "Be long.")
    assert read_chat(tmp_path / "question.txt", "Be short.") == ASKED
    (tmp_path / "other.json").write_text('{"text": "x"}')
    with pytest.raises(DataError, match=r"other.json: message 0 must be"):
        read_chat(tmp_path / "other.json", None)
    for name in ("none.json", "none.txt"):
        with pytest.raises((ConfigError, DataError), match=f"{name}.* |no .*{name}"):
            read_chat(tmp_path / name, None)


def test_rows_with_messages_calibrate_and_measure_perplexity(
    tokenizer: Any, tmp_path: Path
) -> None:
    file = tmp_path / "rows.jsonl"
    long = [*ASKED, {"role": "user", "content": "word " * 200}]
    file.write_text("\n".join(json.dumps({"messages": long, "text": "no"}) for _ in range(3)))
    config = CalibrateConfig(
        model="m", data=(str(file),), samples=3, length=128, block_size=16, dtype="float32"
    )
    found = make_prompts(config, tokenizer)
    start = tokenizer.decode(found[0].input_ids)[:20]
    assert start == "<system>Be short.\n<u"
    asked = EvalConfig(artifact="a.st", samples=3)
    questions = make_questions(f"perplexity:{file}", 64, asked, tokenizer, None)
    assert tokenizer.decode(questions[0].input_ids).startswith("<system>Be short.")


def test_missing_files_are_called_missing(tokenizer: Any) -> None:
    for name in ("prompts.jsonl", "folder/there", "notes.TXT"):
        config = CalibrateConfig(model="m", data=(name,), samples=3, length=512)
        with pytest.raises(DataError, match=f"{name} does not exist"):
            make_prompts(config, tokenizer)
    config = CalibrateConfig(model="m", data=("retr_vk",), samples=3, length=512)
    with pytest.raises(ConfigError, match=r"'retr_vk' is not known.*did you mean 'retr_kv'\?"):
        make_prompts(config, tokenizer)


def test_data_is_looked_for_before_a_model_is_loaded(tmp_path: Path) -> None:
    config = CalibrateConfig(model="no/such model", data=("none.txt",), samples=3, length=512)
    with pytest.raises(DataError, match="none.txt does not exist"):
        capture_maps(config, tmp_path)


def test_a_system_message_needs_a_conversation(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("x")
    found = CliRunner().invoke(cli.app, ["run", str(tmp_path / "a.txt"), "--system", "Be short."])
    assert isinstance(found.exception, ConfigError)
    assert "--chat" in str(found.exception)
