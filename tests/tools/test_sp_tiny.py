from __future__ import annotations

import argparse
import re
from pathlib import Path

import numpy as np
import pytest
from tokenizers import Tokenizer

from tools.sp_tiny.card import render_card
from tools.sp_tiny.corpus import documentation
from tools.sp_tiny.data import ANSWER, CONTEXT, TEXT, SampleGenerator
from tools.sp_tiny.train import learning_rate, parse_schedule

ASSETS = Path(__file__).parents[2] / "shareprefill" / "assets" / "sp-tiny"


@pytest.fixture(scope="module")
def tokenizer():
    return Tokenizer.from_file(str(ASSETS / "tokenizer.json"))


@pytest.fixture(scope="module")
def generator(tmp_path_factory, tokenizer):
    data = tmp_path_factory.mktemp("data")
    (data / "tokenizer.json").write_bytes((ASSETS / "tokenizer.json").read_bytes())
    ids = tokenizer.encode("def add(a, b):\n    return a + b\n" * 900).ids
    np.asarray(ids, dtype=np.uint16).tofile(data / "train.bin")
    return SampleGenerator(data, seed=7)


@pytest.mark.parametrize("task", ["key_value", "needle", "variable_tracking", "passkey", "number"])
@pytest.mark.parametrize("size", [513, 1025, 3001])
def test_sample_fits_and_its_answers_are_in_its_context(generator, tokenizer, task, size):
    for _ in range(5):
        sample = getattr(generator, task)(size)
        assert 0.8 * size < len(sample.ids) <= size
        assert len(sample.kinds) == len(sample.ids)
        edges = np.flatnonzero(np.diff([0, *(kind == ANSWER for kind in sample.kinds), 0]))
        assert len(edges) >= 2
        for start, end in edges.reshape(-1, 2):
            answer = tokenizer.decode(sample.ids[start:end]).strip('". \n')
            assert answer in tokenizer.decode(sample.ids[:start])


def test_key_value_queries_are_answered_rightly(generator, tokenizer):
    for _ in range(5):
        text = tokenizer.decode(generator.key_value(2049).ids)
        body, *queries = text.split("\nKey: ")
        pairs = dict(re.findall(r'"([^"]+)": "([^"]+)"', body))
        assert queries
        for query in queries:
            key, value = re.findall(r'"([^"]+)"', query)
            assert pairs[key] == value


def test_pieces_are_tokenized_as_the_whole_is(generator, tokenizer):
    sample = generator.key_value(1025)
    assert tokenizer.encode(tokenizer.decode(sample.ids)).ids == sample.ids


def test_batch_learns_text_and_answers_only(generator):
    ids, kinds = generator.batch(16, 512)
    assert ids.shape == kinds.shape == (16, 513)
    assert ids.dtype == np.uint16
    assert (ids[:, 0] == 0).all()
    assert (kinds[:, 0] == CONTEXT).all()
    assert set(np.unique(kinds)) == {CONTEXT, TEXT, ANSWER}
    assert (kinds[ids == 2] == CONTEXT).all()


def test_documentation_is_split_by_file_name(tmp_path):
    for index in range(200):
        (tmp_path / f"page{index}.rst.txt").write_text(f"page {index}")
    train, held_out = documentation(tmp_path)
    assert len(train) + len(held_out) == 200
    assert not set(train) & set(held_out)
    assert 20 <= len(held_out) <= 60
    assert documentation(tmp_path) == (train, held_out)


def test_schedule_is_parsed_and_checked():
    assert parse_schedule("0:1024,0.5:2048") == [(0.0, 1024), (0.5, 2048)]
    with pytest.raises(argparse.ArgumentTypeError, match="must start at 0"):
        parse_schedule("0.1:1024")
    with pytest.raises(argparse.ArgumentTypeError, match="at least 512"):
        parse_schedule("0:256")


def test_learning_rate_warms_up_and_decays():
    assert learning_rate(1.0, 0, 0.0) == pytest.approx(1 / 200)
    assert learning_rate(1.0, 500, 0.4) == 1.0
    assert learning_rate(1.0, 500, 0.75) == pytest.approx(0.5)
    assert learning_rate(1.0, 500, 1.0) == pytest.approx(0.02)


def test_card_shows_the_counts():
    facts = {
        "parameters": 8_872_000, "device": "a GPU", "torch": "2.11", "seed": 3, "peak_rate": 0.002,
        "lengths": [[0, 1024], [0.8, 8192]], "steps": 10, "tokens": 5_000_000, "seconds": 9.5,
    }  # fmt: skip
    results = {
        "2048": {"retr_kv": {"right": 7, "questions": 9}, "text_loss": 1.5},
        "8192": {"retr_kv": {"right": 4, "questions": 9}, "text_loss": 1.25},
    }
    card = render_card({"training": facts, "results": results})
    assert "| task | 2K | 8K |" in card
    assert "| retr_kv | 7/9 | 4/9 |" in card
    assert "| held-out text, nats per token | 1.50 | 1.25 |" in card
    assert "trained up to 8192 tokens" in card
