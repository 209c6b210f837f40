from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from shareprefill.calib.prompts import make_prompts
from shareprefill.calib.tasks import TASKS, generate
from shareprefill.config import CalibrateConfig
from shareprefill.errors import ConfigError, DataError
from shareprefill.evaluation.config import EvalConfig
from shareprefill.evaluation.questions import Question, _pieces, make_questions
from shareprefill.models import load_tokenizer
from shareprefill.tokens import encode


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer("sp-tiny")


def ask(tokenizer, task: str, length: int = 600, **options: Any) -> list[Question]:
    config = EvalConfig(**{"artifact": "a.st", "samples": 2, "tasks": (task,), **options})
    return make_questions(task, length, config, tokenizer, None)


def write(path: Path, *rows: object) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def test_no_prompt_is_one_of_a_calibration(tokenizer) -> None:
    config = CalibrateConfig(model="-", data=("retr_kv",), samples=20, length=600)
    seen = {prompt.digest for prompt in make_prompts(config, tokenizer)}
    asked = ask(tokenizer, "retr_kv", samples=20)
    digests = {question.digest for question in asked}
    assert len(digests) == 20
    calibrated = {tuple(p.input_ids.tolist()) for p in make_prompts(config, tokenizer)}
    assert not calibrated & {tuple(q.input_ids.tolist()) for q in asked}
    assert not digests & seen
    other = {question.digest for question in ask(tokenizer, "retr_kv", samples=20, seed=1)}
    assert not digests & other


@pytest.mark.parametrize("task", [*TASKS, "niah_multiquery"])
def test_the_right_answer_scores_one_and_fits(tokenizer, task: str) -> None:
    for number, question in enumerate(ask(tokenizer, task)):
        assert len(question.input_ids) <= 600
        answer = generate(task, tokenizer, 600, -(number + 1)).answer
        tokens = tokenizer(answer, add_special_tokens=False).input_ids
        assert len(tokens) < question.new_tokens
        assert question.score(answer + " and more") == 1
        assert question.score("nothing") == 0


def test_perplexity_reads_shipped_and_own_text(tokenizer, tmp_path: Path) -> None:
    shipped = ask(tokenizer, "perplexity")
    assert all(0.97 * 600 < len(question.input_ids) <= 600 for question in shipped)
    (tmp_path / "a.txt").write_text("Words of my own. " * 100)
    write(tmp_path / "b.jsonl", {"text": "Other words. " * 200})
    pieces = ask(tokenizer, f"perplexity:{tmp_path}", 100, samples=5)
    assert {len(piece.input_ids) for piece in pieces} == {100}
    text = tokenizer((tmp_path / "a.txt").read_text()).input_ids
    # Every piece begins as a text does.
    assert pieces[1].input_ids.tolist() == [text[0], *text[100:199]]
    with pytest.raises(DataError, match="pieces of 100 tokens, 500 samples are wanted"):
        ask(tokenizer, f"perplexity:{tmp_path}", 100, samples=500)


def test_ruler_rows(tokenizer, tmp_path: Path) -> None:
    row = {"index": 0, "input": "Many needles. Which?", "outputs": ["one", "two"]}
    file = write(tmp_path / "niah_multivalue" / "validation.jsonl", row, row)
    question, _ = ask(tokenizer, f"ruler:{file}")
    assert (question.metric, question.new_tokens) == ("string_match_all", 128)
    assert question.score("ONE or three") == 0.5
    assert tokenizer.decode(question.input_ids[1:]) == "Many needles. Which?"
    task = {**row, "task": "qa_1", "answer_prefix": " Answer:"}
    question, _ = ask(tokenizer, f"ruler:{write(tmp_path / 'x.jsonl', task, task)}")
    assert (question.metric, question.score("two")) == ("string_match_part", 1)
    assert tokenizer.decode(question.input_ids).endswith("Which? Answer:")
    parts = {"context": "Many. ", "question": "Which?", "answer": ["one"], "task": "niah_single_1"}
    question, _ = ask(tokenizer, f"ruler:{write(tmp_path / 'y.jsonl', parts, parts)}")
    assert tokenizer.decode(question.input_ids[1:]) == "Many. Which?"
    assert question.score("one") == 1


@pytest.mark.parametrize(
    ("subset", "answer", "completion", "options"),
    [
        ("passkey", ["71432"], " 71432.", []),
        ("number_string", ["7143271432"], "7143271432", []),
        ("kv_retrieval", ["ab-cd"], '"ab-cd",', []),
        ("code_run", ["-4"], "-4", []),
        ("code_debug", ["go"], "B. go", ["run", "go", "stop", "end"]),
        ("math_find", ["12"], "12 is", []),
        ("math_calc", ["1", "2"], "[1, 2]", []),
        ("longbook_qa_eng", ["The Fox"], "fox", []),
        ("longbook_qa_chn", ["狐"], "狐。", []),
        ("longbook_choice_eng", ["go"], "B", ["run", "go", "stop", "end"]),
        ("longbook_sum_eng", ["a b c"], "a b c", []),
        ("longdialogue_qa_eng", ["ANN"], "Ann", []),
    ],
)
def test_infinitebench_rows(
    tokenizer, tmp_path: Path, subset: str, answer: list, completion: str, options: list
) -> None:
    row = {"id": 0, "context": "LONG TEXT", "input": "ASKED", "answer": answer, "options": options}
    file = write(tmp_path / f"{subset}.jsonl", row)
    (question,) = ask(tokenizer, f"infinitebench:{file}", samples=1)
    assert question.score(completion) == 1
    assert question.score("zzz") == 0
    prompt = tokenizer.decode(question.input_ids, skip_special_tokens=True)
    assert prompt.startswith("LONG TEXT")
    assert "ASKED" in prompt
    assert all(option in prompt for option in options)


@pytest.mark.parametrize(
    ("subset", "label", "completion"),
    [
        ("code_run", [[-7]], " -7"),
        ("code_run", "[[-7]]", "-7"),
        ("code_run", ["[-7]"], "-7"),
        ("code_run", -7, "The return value is -7."),
        ("code_run", [-7.0], "-7"),
        ("code_run", "+7", "7"),
        ("math_calc", [[1, 2, 3]], "1, 2, 3"),
        ("math_calc", "[[1, -2, 3]]", "[1, -2, 3]"),
        ("math_calc", ["1", 2.0, "[3]"], "1 2 3"),
        ("math_find", [[-7]], "-7"),
        ("math_find", 0.5, "0.5"),
        ("math_find", "1e2", "100"),
        ("math_find", 10**17, "100000000000000000"),
        ("passkey", 71432, "71432"),
        ("passkey", [["07143"]], "07143."),
        ("number_string", "[[-7]]", "-7"),
        ("kv_retrieval", 5, "5"),
        ("longbook_qa_eng", [["The Fox"]], "fox"),
        ("longbook_choice_eng", [2, "B"], "B"),
    ],
)
def test_labels_in_other_forms(
    tokenizer, tmp_path: Path, subset: str, label: Any, completion: str
) -> None:
    row = {"context": "LONG", "input": "ASKED", "answer": label, "options": [1, 2, 3, 4]}
    file = write(tmp_path / f"{subset}.jsonl", row)
    (question,) = ask(tokenizer, f"infinitebench:{file}", samples=1)
    assert question.score(completion) == 1
    assert question.score("8") == question.score("") == 0


BAD_LABELS: list[Any] = [None, [], {}, {"a": 1}, True, [[]], [None], "", " ", [" "], float("nan")]
DEEP: Any = json.loads("[" * 700 + "1" + "]" * 700)
BAD_NUMBERS: list[Any] = ["seven", "[[seven]]", "[]", "[[true]]", [{"a": 7}], "[" * 9999, "nan"]
NUMBERS = ("code_run", "math_find", "math_calc", "passkey", "number_string")


@pytest.mark.parametrize(
    ("subset", "label"),
    [
        *[(subset, label) for label in BAD_LABELS for subset in (*NUMBERS, "longbook_qa_eng")],
        *[(subset, label) for label in BAD_NUMBERS for subset in NUMBERS],
        *[(subset, 7.5) for subset in ("code_run", "math_calc", "passkey", "number_string")],
        *[(subset, "\u0667") for subset in ("code_run", "math_calc", "passkey")],
        *[(subset, "9" * 9000) for subset in NUMBERS],
        *[(subset, DEEP) for subset in ("code_run", "longbook_qa_eng")],
        ("math_find", "1e999"),
        ("longbook_choice_eng", "E"),
        ("longbook_choice_eng", 1),
        ("code_debug", ["other"]),
    ],
)
def test_labels_that_no_completion_could_have(
    tokenizer, tmp_path: Path, subset: str, label: Any
) -> None:
    good: dict[str, Any] = {
        "context": "LONG",
        "input": "?",
        "answer": "A",
        "options": ["run", "go"],
    }
    if subset in NUMBERS:
        good |= {"answer": "7"}
    file = write(tmp_path / f"{subset}.jsonl", good, {**good, "answer": label})
    with pytest.raises(DataError, match=r"row 1 of .*jsonl (cannot be scored: its|has no answer)"):
        ask(tokenizer, f"infinitebench:{file}")


@pytest.mark.parametrize(
    ("subset", "row"),
    [
        ("trec", {"answers": ["yes"]}),
        ("trec", {"answers": ["yes"], "all_classes": ["no"]}),
        ("trec", {"answers": ["yes"], "all_classes": {"yes": 1}}),
        ("passage_count", {"answers": ["many"]}),
        ("passage_retrieval_en", {"answers": ["Paragraph"]}),
        ("hotpotqa", {"answers": {"text": "yes"}}),
    ],
)
def test_rows_of_longbench_that_cannot_be_scored(
    tokenizer, tmp_path: Path, subset: str, row: dict
) -> None:
    file = write(tmp_path / f"{subset}.jsonl", {"context": "LONG", "input": "?", **row})
    with pytest.raises(DataError, match="row 0 of .* cannot be scored: its "):
        ask(tokenizer, f"longbench:{file}", samples=1)


@pytest.mark.parametrize(
    ("subset", "metric"),
    [("hotpotqa", "token_f1"), ("gov_report_e", "rouge_l"), ("lcc", "edit_similarity")],
)
def test_longbench_rows(tokenizer, tmp_path: Path, subset: str, metric: str) -> None:
    row = {"context": "LONG", "input": "ASKED", "answers": ["yes it is"], "dataset": subset}
    row["all_classes"] = None
    (question,) = ask(tokenizer, f"longbench:{write(tmp_path / 'x.jsonl', row)}", samples=1)
    assert question.metric == metric
    assert question.score("yes it is") == 1
    row["dataset"] = "trec"
    row["all_classes"] = ["yes it is", "no"]
    (question,) = ask(tokenizer, f"longbench:{write(tmp_path / 'y.jsonl', row)}", samples=1)
    assert question.score("yes it is or no") == 0.5


def test_a_data_set_through_the_hubs_library(tokenizer, tmp_path: Path) -> None:
    row = {"context": "LONG", "input": "ASKED", "answer": ["71432"], "options": []}
    write(tmp_path / "data" / "passkey.jsonl", row, {**row, "answer": ["5"]})
    (tmp_path / "data" / "README.md").write_text(
        "---\nconfigs:\n- config_name: default\n  data_files:\n"
        "  - split: passkey\n    path: passkey.jsonl\n---\n"
    )
    first, second = ask(tokenizer, f"infinitebench:hub:{tmp_path / 'data'}::passkey")
    assert first.score("71432") == 1
    assert second.score("5") == 1
    with pytest.raises(DataError, match="cannot be opened"):
        ask(tokenizer, f"infinitebench:hub:{tmp_path / 'data'}::kv_retrieval")
    with pytest.raises(ConfigError, match="no hub address"):
        ask(tokenizer, "infinitebench:hub:nothing")


def test_rows_that_are_too_long(tokenizer, tmp_path: Path) -> None:
    row = {"input": "First words. " + "middle " * 400 + "Last words?", "outputs": ["x"]}
    file = f"ruler:{write(tmp_path / 'vt.jsonl', row)}"
    with pytest.raises(ConfigError, match=r"row 0 of .* beyond the length of 100: .*--cut-middle"):
        ask(tokenizer, file, 100, samples=1)
    (question,) = ask(tokenizer, file, 100, samples=1, cut_middle=True)
    whole = tokenizer(row["input"]).input_ids
    assert question.input_ids.tolist() == whole[:50] + whole[-50:]
    (question,) = ask(tokenizer, file, 101, samples=1, cut_middle=True)
    assert question.input_ids.tolist() == whole[:50] + whole[-51:]


def test_a_text_is_cut_into_all_pieces_that_it_holds(tokenizer) -> None:
    text = "One line of the text, and another one. " * 20
    (whole,) = _pieces(iter([text]), len(encode(tokenizer, text)), tokenizer)
    assert whole.tolist() == encode(tokenizer, text).tolist()
    first = int(whole[0] == tokenizer.bos_token_id)
    pieces = [*_pieces(iter([text]), 50, tokenizer)]
    assert len(pieces) == (len(whole) - first) // (50 - first)
    joined = [token for piece in pieces for token in piece[first:].tolist()]
    assert joined == whole[first : first + len(joined)].tolist()


def test_a_length_beyond_the_model(tokenizer) -> None:
    config = EvalConfig(artifact="a.st")
    with pytest.raises(ConfigError, match="length = 600 is beyond the model's maximum of 512"):
        make_questions("retr_kv", 600, config, tokenizer, 512)


@pytest.mark.parametrize(
    ("task", "rows", "error", "message"),
    [
        ("retr_vk", None, ConfigError, "'retr_vk' is not known: .*retr_kv.*ruler:<file>"),
        ("ruler", None, ConfigError, "'ruler' is not known"),
        ("ruler:missing.jsonl", None, ConfigError, "there is no missing.jsonl"),
        ("ruler:{}", [{"outputs": ["x"]}], DataError, "row 0 of .* no text in its field 'input'"),
        ("ruler:{}", [{"input": "x"}], DataError, "row 0 of .* no answer in its field 'outputs'"),
        ("ruler:{}", [["x"]], DataError, "row 0 of .* must be an object, got list"),
        ("ruler:{}", [{"input": "x", "outputs": ["y"]}], DataError, "only 1 rows, 2 samples"),
        ("longbench:{}", [{"context": "x"}], ConfigError, "of no known subset .vt, .* hotpotqa"),
    ],
)
def test_bad_tasks(
    tokenizer, tmp_path: Path, task: str, rows: list | None, error: type, message: str
) -> None:
    if rows is not None:
        task = task.format(write(tmp_path / "vt.jsonl", *rows))
    with pytest.raises(error, match=message):
        ask(tokenizer, task)


def test_damaged_files(tokenizer, tmp_path: Path) -> None:
    (tmp_path / "cut.jsonl").write_text('{"input": ')
    (tmp_path / "bytes.jsonl").write_bytes(b"\xff\xfe")
    (tmp_path / "x.csv").write_text("a,b")
    with pytest.raises(DataError, match="cut.jsonl is not valid JSON"):
        ask(tokenizer, f"ruler:{tmp_path / 'cut.jsonl'}")
    with pytest.raises(DataError, match="bytes.jsonl cannot be read as UTF-8"):
        ask(tokenizer, f"ruler:{tmp_path / 'bytes.jsonl'}")
    with pytest.raises(ConfigError, match=r"x.csv holds no .jsonl or .json file"):
        ask(tokenizer, f"ruler:{tmp_path / 'x.csv'}")
