import random

from shareprefill.vllm.rows import Division, Prefill, Run, divide


def _covered(division: Division, starts: list[int]) -> list[int]:
    places = [p.tokens for p in division.prefills] + [r.tokens for r in division.rest]
    places += [slice(starts[row], starts[row] + 1) for row in division.decodes]
    return sorted(token for place in places for token in range(place.start, place.stop))


def test_a_step_of_decodes_is_one_run():
    division = divide([0, 1, 2, 3], [9, 4, 7], lambda *_: False)
    assert division == Division((), (), (Run(slice(0, 3), slice(0, 3)),))


def test_prefills_between_decodes_cut_the_rest_into_runs():
    division = divide([0, 1, 301, 302, 303, 703], [5, 300, 8, 9, 1000], lambda _, n, __: n > 1)
    assert division.prefills == (Prefill(1, slice(1, 301), 300), Prefill(4, slice(303, 703), 1000))
    assert division.rest == (
        Run(slice(0, 1), slice(0, 1)),
        Run(slice(2, 4), slice(301, 303)),
    )
    assert [p.is_whole for p in division.prefills] == [True, False]


def test_decodes_are_taken_out_like_prefills():
    starts, lengths = [0, 1, 2, 302, 303, 304], [5, 300, 700, 8, 900]
    division = divide(starts, lengths, lambda _, __, n_key: n_key >= 300)
    assert division.decodes == (1, 4)
    assert division.prefills == (Prefill(2, slice(2, 302), 700),)
    assert division.rest == (Run(slice(0, 1), slice(0, 1)), Run(slice(3, 4), slice(302, 303)))
    assert divide([0, 1, 2], [300, 300], lambda *_: True) == Division((), (0, 1), ())


def test_rows_without_tokens_make_no_run():
    division = divide([0, 200, 200, 200], [200, 5, 5], lambda _, n, __: n == 200)
    assert division.rest == ()
    division = divide([0, 0, 200], [5, 200], lambda _, n, __: n == 200)
    assert division.rest == ()


def test_every_token_is_in_one_place_and_order_is_kept():
    draw = random.Random()
    for _ in range(200):
        sizes = [draw.choice((0, 1, 1, 130, 700)) for _ in range(draw.randint(1, 9))]
        starts = [sum(sizes[:i]) for i in range(len(sizes) + 1)]
        lengths = [size + draw.choice((0, 50)) for size in sizes]
        chosen = {row for row, size in enumerate(sizes) if size and draw.random() < 0.6}
        division = divide(starts, lengths, lambda row, *_, chosen=chosen: row in chosen)
        assert {p.row for p in division.prefills} == {row for row in chosen if sizes[row] > 1}
        assert set(division.decodes) == {row for row in chosen if sizes[row] == 1}
        assert _covered(division, starts) == list(range(starts[-1]))
        for run in division.rest:
            assert starts[run.rows.start] == run.tokens.start
            assert starts[run.rows.stop] == run.tokens.stop
            assert not chosen & set(range(run.rows.start, run.rows.stop))
