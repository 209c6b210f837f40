from __future__ import annotations

import pytest

from shareprefill.evaluation.scores import SCORES, Reference

ONE = Reference(("1234",))
TWO = Reference(("Red fox", "7"))
MENU = Reference(("soup",), options=("bread", "soup", "cake", "tea"))


@pytest.mark.parametrize(
    ("name", "completion", "reference", "expected"),
    [
        ("exact_match", " 1234, of course", ONE, 1),
        ("exact_match", "It is 1234", ONE, 0),
        ("string_match_all", "a RED FOX and 8", TWO, 0.5),
        ("string_match_all", "red fox, 7", TWO, 1),
        ("string_match_all", "", TWO, 0),
        ("string_match_part", "red fox", TWO, 1),
        ("string_match_part", "blue", TWO, 0),
        ("word_match", '"key": "1234", "x"', ONE, 1),
        ("word_match", "12345", ONE, 0),
        ("upper_word_match", "it was Ann.", Reference(("ANN",)), 1),
        ("upper_word_match", "it was Anna.", Reference(("ANN",)), 0),
        ("first_integer", "is 1234 or 99", ONE, 1),
        ("first_integer", "99 or 1234", ONE, 0),
        ("first_integer", "none", ONE, 0),
        ("first_number", " 12.50 and 3", Reference(("12.5",)), 1),
        ("first_number", " 1234", ONE, 1),
        ("first_number", "-", ONE, 0),
        ("last_integer", "it returns -7.", Reference(("-7",)), 1),
        ("last_integer", "1234 it is", ONE, 0),
        ("last_integer", "", ONE, 0),
        ("leading_integers", "[3, 5, 9]", Reference(("3", "5", "8", "1")), 0.5),
        ("leading_integers", "", Reference(("3",)), 0),
        ("choice", "B. soup", MENU, 1),
        ("choice", "C", MENU, 0),
        ("choice", "I think the answer is: soup", MENU, 1),
        ("choice", "I think the answer is D", MENU, 0),
        ("choice", "maybe B or C", MENU, 1),
        ("choice", "maybe A, but the option is B", MENU, 1),
        ("choice", "no idea", MENU, 0),
        ("choice", "", MENU, 0),
        ("debug_choice", "B. or so", MENU, 1),
        ("debug_choice", "The answer is: soup", MENU, 1),
        ("debug_choice", "The answer is: C", MENU, 0),
        ("debug_choice", "B", Reference(("run", "B")), 0),
        ("token_f1", "The red fox!", TWO, 1),
        ("token_f1", "red hen", TWO, 0.5),
        ("token_f1", "an owl", TWO, 0),
        ("character_f1", "红，狐", Reference(("红狐",)), 1),
        ("character_f1", "红鸡", Reference(("红狐",)), 0.5),
        ("rouge_l", "a b c d", Reference(("a x c y",)), 0.5),
        ("rouge_l", "c b a", Reference(("a b c",)), 1 / 3),
        ("rouge_l", "", Reference(("a",)), 0),
        ("first_line_f1", "\nred fox\nwolf", TWO, 1),
        ("first_line_rouge_l", "a b\nc", Reference(("a b",)), 1),
        ("classification", "City\nState", Reference(("City",), ("City", "State")), 1),
        ("classification", "City or State", Reference(("City",), ("City", "State")), 0.5),
        ("classification", "City name", Reference(("City name",), ("City", "City name")), 1),
        ("classification", "State", Reference(("City",), ("City", "State")), 0),
        ("paragraph", "Paragraph 3, not 4", Reference(("Paragraph 3",)), 0.5),
        ("paragraph", "none", Reference(("Paragraph 3",)), 0),
        ("count", "5 5 6 7", Reference(("5",)), 0.5),
        ("edit_similarity", "\n# comment\nreturn x\nmore", Reference(("return x",)), 1),
        ("edit_similarity", "return y", Reference(("return x",)), 0.88),
        ("edit_similarity", "", Reference(("return x",)), 0),
    ],
)
def test_score(name: str, completion: str, reference: Reference, expected: float) -> None:
    assert SCORES[name](completion, reference) == pytest.approx(expected)
