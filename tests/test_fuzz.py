"""A short run of the fuzzer: a few seconds of what ``make fuzz`` does for minutes; its corpus again, whole."""

from __future__ import annotations

import random
from itertools import islice

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fuzz import sweeps
from fuzz.__main__ import Tally, mutated
from fuzz.targets import CORPUS, TARGETS, seeds
from ticketlab.errors import Refused

READERS = [*TARGETS]


@pytest.mark.parametrize("name", READERS)
def test_wrong_bytes_are_refused(name):
    known = seeds(name)

    @given(st.integers(0, 2**32))
    @settings(max_examples=40, deadline=None, database=None)
    def near(seed):
        draw = random.Random(seed)
        tally.add(lambda: TARGETS[name](mutated(draw.choice(known), draw)), f"{name} {seed}")

    tally = Tally()
    for content in known:
        tally.add(lambda content=content: TARGETS[name](content), repr(content[:200]))
    assert tally.taken
    near()
    assert tally.refused and not tally.faults


def test_one_wrong_argument_at_a_time_is_refused():
    cases = [*sweeps.arguments()]
    random.Random(0).shuffle(cases)
    tally = Tally()
    for words, act in islice(cases, 600):
        tally.add(act, words)
    assert tally.refused > 400 and not tally.faults


def test_every_call_of_the_sweep_works_as_it_stands():
    for name, (function, arguments) in sweeps.calls().items():
        if "nowhere" not in map(str, arguments.values()):
            assert function(**arguments) is not None or name == "masks.validate"


def test_one_wrong_flag_at_a_time_is_one_line(tmp_path, capsys):
    cases = [case for case in sweeps.flags(tmp_path) if " imp " in case[0] and case[0].endswith(("'nan'", "'\\n'"))]
    for words, act in cases[::4]:
        assert act() == 2, words
        assert len(capsys.readouterr().err.splitlines()) == 1, words


def test_a_fault_is_counted_by_its_place():
    tally = Tally()
    for error in (Refused("no"), AssertionError(), ZeroDivisionError(), ZeroDivisionError()):
        tally.add(lambda error=error: (_ for _ in ()).throw(error), repr(error))
    assert (tally.refused, tally.silent, tally.tracebacks) == (1, 1, 2) and len(tally.faults) == 2


def test_the_corpus_is_small():
    assert 0 < sum(path.stat().st_size for path in CORPUS.rglob("*") if path.is_file()) < 50_000
