"""Certificates: the code counted exactly, the integers against a slow reference, tampering, the committed record."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
import tracemalloc
import zlib
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from examples.certificate import __main__ as certificate
from examples.certificate import complete
from examples.certificate.features import N_FEATURES, features, isqrt, normalised
from examples.certificate.network import (
    HIDDEN_BIAS,
    LOTS,
    OUTPUT_BIAS,
    Network,
    count_errors,
    decode,
    encode,
    scores,
    shapes,
    without_idle_units,
)
from examples.certificate.polish import State, array_bits, certified, moves, neighbours, polish, price_of_an_error
from examples.certificate.record import MOST_BYTES, read_record
from examples.certificate.search import Training, description_bits, prices, train
from ticketlab import bounds

ROOT = Path(__file__).parent.parent
COMPLETE = complete.RECORDS / "mnist-complete.json"
CERTIFICATES = sorted(complete.RECORDS.glob("mnist*.json"))
TINY = ["--steps", "60", "--rounds", "1", "--hidden", "6", "--batch-size", "200"]


def random_network(seed: int, hidden: int = 4, density: float = 0.02) -> Network:
    rng = np.random.default_rng(seed)
    arrays = [rng.integers(-7, 8, shape) for shape in shapes(hidden)]
    arrays[0] *= rng.random(arrays[0].shape) < density
    return Network(*arrays)


def examples(n: int = 60, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    return rng.integers(0, 256, (n, N_FEATURES)).astype(np.uint8), rng.integers(0, 10, n).astype(np.uint8)


@given(st.integers(0, 10**6), st.integers(1, 12), st.floats(0, 0.3))
@settings(max_examples=15, deadline=None)
def test_a_network_comes_back_from_its_message(seed, hidden, density):
    network = random_network(seed, hidden, density)
    for mine, theirs in zip(network.arrays, decode(encode(network)).arrays, strict=True):
        np.testing.assert_array_equal(mine, theirs)


def test_bits_are_those_of_the_adaptive_code():
    """The probability of the message, flag by flag in fractions, against the length of the message."""
    network = random_network(1)
    bits = 16 + 6.0  # which design, and which of 64 numbers of hidden units
    for array in network.arrays:
        live = array[array != 0]
        flags = (
            [array[:, lot].ravel() != 0 for lot in LOTS] if array.shape[1:] == (N_FEATURES,) else [array.ravel() != 0]
        )
        flags += [live < 0, *(abs(live[abs(live) >= size]) > size for size in range(1, 7))]
        before = bits
        for kind in flags:
            counts = [0.5, 0.5]
            for flag in kind.astype(int):
                bits -= math.log2(counts[flag] / sum(counts))
                counts[flag] += 1
        assert array_bits(array) == pytest.approx(bits - before, abs=1e-9)
    assert bits <= 8 * len(encode(network)) < bits + 10


def test_lots_are_a_partition_of_the_features():
    assert (sum(lot.astype(int) for lot in LOTS) == 1).all()
    assert [int(lot.sum()) for lot in LOTS] == [200, 192, 588]


def test_weights_too_large_for_the_code_are_refused():
    network = random_network(0)
    network.output[0, 0] = 8
    with pytest.raises(ValueError, match=r"must be in -7\.\.7: got 8"):
        encode(network)


def test_no_bytes_but_the_encoders_decode():
    message = encode(random_network(2))
    for wrong in (message[:-1], message + b"\0", b"", b"\1" + message[1:]):
        with pytest.raises(ValueError, match="message"):
            decode(wrong)


def test_scores_and_errors_against_integers_of_any_size():
    network, (x, y) = random_network(3), examples()
    expected, errors = [], 0
    for image, label in zip(x.tolist(), y.tolist(), strict=True):
        hidden = [
            max(0, sum(w * v for w, v in zip(row, image, strict=True)) + HIDDEN_BIAS * b)
            for row, b in zip(network.weights.tolist(), network.hidden_bias.tolist(), strict=True)
        ]
        found = [
            sum(v * h for v, h in zip(row, hidden, strict=True)) + OUTPUT_BIAS * c
            for row, c in zip(network.output.tolist(), network.output_bias.tolist(), strict=True)
        ]
        errors += any(score >= found[label] for klass, score in enumerate(found) if klass != label)
        expected.append(found)
    assert scores(network, x).astype(int).tolist() == expected
    assert count_errors(network, x, y, chunk=7) == errors


def test_a_tie_is_an_error():
    silent = Network(*(np.zeros(shape, dtype=np.int64) for shape in shapes(1)))
    x, y = examples(20)
    assert count_errors(silent, x, y) == 20


def test_idle_units_go_and_the_function_stays():
    network, (x, _) = random_network(4, hidden=5), examples()
    network.weights[1] = network.hidden_bias[1] = 0
    network.output[:, 3] = 0
    smaller = without_idle_units(network)
    assert len(smaller.hidden_bias) == 3
    np.testing.assert_array_equal(scores(network, x), scores(smaller, x))


def test_features_do_not_depend_on_company_or_place():
    images = np.zeros((3, 28, 28), dtype=np.uint8)
    images[0, 5:15, 8:12], images[1, 9:19, 13:17] = 200, 200  # the same bar elsewhere
    images[2, 4:20, 4:20], images[2, 8:16, 8:16] = 255, 0  # a ring
    found = features(images)
    assert found.shape == (3, N_FEATURES) and found.dtype == np.uint8
    np.testing.assert_array_equal(found[0], found[1])
    np.testing.assert_array_equal(found[2:], features(images[2:]))
    holes = found.reshape(3, -1, 49)[:, 8]
    assert holes[2].argmax() == 24 and not holes[:2].any()


def test_normalisation_sets_a_slanted_bar_upright():
    image = np.zeros((1, 28, 28), dtype=np.uint8)
    for row in range(4, 24):
        image[0, row, 4 + row // 2 : 7 + row // 2] = 255
    upright = normalised(image)[0]
    columns = [float((row * np.arange(28)).sum() / row.sum()) for row in upright if row.sum() > 500]
    assert len(columns) > 15 and max(columns) - min(columns) < 2


@given(st.integers(0, 2**51))
def test_integer_square_roots(value):
    assert isqrt(np.array([value])).tolist() == [math.isqrt(value)]


def test_blank_images_have_features_too():
    assert features(np.zeros((2, 28, 28), dtype=np.uint8)).sum() == 0


def test_every_move_changes_the_state_as_a_new_start_would():
    network, (x, y) = random_network(5), examples(40)
    inputs, labels = torch.from_numpy(x.T.astype(np.float32)), torch.from_numpy(y.astype(np.int64))
    state = State.of(network, inputs, labels)
    some = moves(network, inputs, labels, 100, 0)[::25]
    assert {move[0] for move in some} == {0, 1, 2, 3} and {len(move[1]) for move in some} == {1, 2}
    for move in some:
        which, indices, values = move
        arrays = [array.copy() for array in network.arrays]
        arrays[which].flat[list(indices)] = values
        fresh = State.of(Network(*arrays), inputs, labels)
        row, lead = state.after(move)
        assert torch.equal(lead, fresh.lead)
        if row is not None:
            assert torch.equal(row, fresh.before[state.unit(move)])


def test_neighbours_stay_inside_the_maps():
    assert sorted(neighbours(0)) == [1, 7, 49]
    assert sorted(neighbours(49 + 24)) == [24, 49 + 17, 49 + 23, 49 + 25, 49 + 31, 98 + 24]


def test_polish_never_makes_the_bound_worse():
    network, (x, y) = random_network(6, density=0.005), examples(300)
    after = polish(network, x, y, sweeps=2, delta=0.05, additions=60, share=1.0)
    assert certified(after, x, y, 0.05) < certified(network, x, y, 0.05)


def test_networks_without_a_bound_below_1_are_polished_too():
    x, y = examples(60)
    silent = Network(*(np.zeros(shape, dtype=np.int64) for shape in shapes(2)))  # wrong everywhere
    for start in (silent, random_network(7)):
        assert certified(start, x, y, 0.05)[0] == 1
        assert certified(polish(start, x, y, sweeps=1, delta=0.05, additions=60), x, y, 0.05)[0] <= 1
    assert price_of_an_error(6, 60, 0.25) == math.log2(3)
    assert 50 < price_of_an_error(6, 60, 1.0) < 60


@pytest.mark.parametrize(
    ("name", "value", "complaint"),
    [
        *((name, 0, "must be at least 1, and seed 0: got") for name in ("hidden", "steps", "rounds", "batch_size")),
        ("seed", -1, "must be at least 1, and seed 0: got"),
        ("hidden", 65, "hidden must be at most 64"),
        ("nats_per_bit", math.nan, "nats_per_bit must be at least 0"),
        ("learning_rate", 0.0, "learning_rate above 0"),
        ("power", 1.5, r"power in \[0, 1\]"),
    ],
)
def test_settings_that_cannot_be_searched_with_are_refused_at_once(name, value, complaint):
    with pytest.raises(ValueError, match=complaint):
        Training(**{name: value})


def test_prices_are_the_empirical_ideal_lengths():
    w = torch.tensor([0.0] * 12 + [1, -1, 1, -2.0])
    table = prices(w)
    assert (2.0 ** -(table[1:].double() - 1)).sum() + 2.0 ** -table[0].double() == pytest.approx(1, abs=1e-5)
    assert float(description_bits(torch.tensor([0.5]), table)) == pytest.approx(float(table[:2].mean()), abs=1e-5)


def test_training_is_seeded():
    x, y = examples(200)
    quick = Training(hidden=3, steps=5, batch_size=50)
    one, two, other = (train(x, y, Training(**{**vars(quick), "seed": seed})) for seed in (0, 0, 1))
    assert encode(one) == encode(two) != encode(other)


@pytest.fixture(scope="module")
def digits(tmp_path_factory):
    out = tmp_path_factory.mktemp("certificate")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(certificate, "load", loaded)
        assert certificate.main(["--out", str(out), *TINY]) == 0
    return out / "digits.json"


_memory: dict[str, certificate.Data] = {}
_load = certificate.load


def loaded(task: str) -> certificate.Data:
    """Digits are read once for all tests."""
    if task not in _memory:
        _memory[task] = _load(task)
    return _memory[task]


@pytest.fixture(autouse=True)
def _read_once(monkeypatch):
    monkeypatch.setattr(certificate, "load", loaded)


def test_a_certificate_of_digits_verifies(digits, capsys):
    assert certificate.main(["--verify", str(digits)]) == 0
    printed = capsys.readouterr().out
    assert printed.endswith("found_by is not verified; every number is right\n")
    assert {"paid", "free", "holds", "found_by"} <= {line.split()[0] for line in printed.splitlines()}
    found = json.loads(digits.read_text())
    assert found["n"] == 1437 and found["description_bits"] == 4 * len(found["message"])
    nats = found["description_bits"] * math.log(2)
    assert found["bound"] == float(bounds.binomial_tail(found["training_errors"] / 1437, nats, 1437, 0.05))


@pytest.mark.parametrize(
    ("name", "value"),
    [("training_errors", 0), ("bound", 0.01), ("description_bits", 8), ("n", 10**9), ("training_sha256", "0")],
)
def test_a_number_changed_is_found(digits, tmp_path, capsys, name, value):
    copy = tmp_path / "copy.json"
    copy.write_text(json.dumps({**json.loads(digits.read_text()), name: value}))
    assert certificate.main(["--verify", str(copy)]) == 1
    assert f"wrong in {name}\n" in capsys.readouterr().out


def test_a_certificate_of_another_task_is_refused(digits, capsys):
    assert certificate.main(["--verify", str(digits), "--task", "mnist"]) == 2
    assert "must be of the task mnist: it is of digits" in capsys.readouterr().err


def refusal(tmp_path, capsys, content):
    """The one line that verifying such a file ends with."""
    path = tmp_path / "certificate.json"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    assert certificate.main(["--verify", str(path)]) == 2
    out, err = capsys.readouterr()
    assert not out and err.count("\n") == 1 and err.startswith("error: ")
    return err


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"true_error": 0.001}, "['true_error'] too many"),
        ({"x\ncertificate.json: every number is right": 1}, r"['x\ncertificate.json: every number is right'] too many"),
        ({"\u202ebound": 1}, r"['\u202ebound'] too many"),
        ({"\ud800": 1}, r"['\ud800'] too many"),
        ({"word": "00"}, "it has none, or both"),
        ({"delta": ...}, "['delta'] missing"),
        ({"delta": 0.0}, "delta in (0, 1)"),
        ({"delta": 1}, "types: {'delta': 'float'}"),
        ({"n": 1437.0}, "types: {'n': 'int'}"),
        ({"n": True}, "types: {'n': 'int'}"),
        ({"bound": [0.1]}, "types: {'bound': 'float'}"),
        ({"test_errors": -1}, "negative numbers: ['test_errors']"),
        ({"n": 10**15}, "more than 15 digits"),
        ({"bound": math.nan}, "NaN is no finite number"),
        ({"held_out_bound": -math.inf}, "-Infinity is no finite number"),
        ({"task": "svhn\n"}, r"got 'svhn\n'"),
        ({"training_sha256": "0\nright"}, "training_sha256 must be hexadecimal digits"),
        ({"message": "00\n00"}, "message must be hexadecimal digits"),
        ({"message": "0"}, "message must be hexadecimal digits"),
        ({"message": ""}, "the end is missing"),
        ({"found_by": {"bound": 1e-9, "training_errors": 0}}, "found_by must hold the keys"),
        ({"found_by": "this certificate holds without conditions"}, "types: {'found_by': 'dict'}"),
    ],
)
def test_what_a_certificate_may_not_say_is_refused(digits, tmp_path, capsys, changes, complaint):
    changed = {**json.loads(digits.read_text()), **changes}
    content = json.dumps({key: value for key, value in changed.items() if value is not ...})
    assert complaint in refusal(tmp_path, capsys, content)


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"bound": 0.01}, "['bound'] too many"),
        ({"seed": 0.0}, "types: {'seed': 'int'}"),
        ({"steps": 0}, "must be at least 1"),
        ({"power": 2.0}, "power in [0, 1]"),
    ],
)
def test_a_remark_holds_settings_alone(digits, tmp_path, capsys, changes, complaint):
    content = json.loads(digits.read_text())
    assert complaint in refusal(tmp_path, capsys, json.dumps({**content, "found_by": content["found_by"] | changes}))


def test_texts_that_are_no_certificate_are_refused_in_one_line(digits, tmp_path, capsys):
    good = digits.read_text()
    for content, complaint in {
        "# a text": "a JSON file as in examples/certificate/records: Expecting value",
        "[]": "it holds no object",
        "{}": "must hold a message or a word",
        '{"message": "00"}': "missing",
        '{"message": 1}': "missing",
        good.replace('"bound":', '"bound": 0.0001, "bound":'): "the key 'bound' comes more than once",
        good.replace('"found_by": {', '"found_by": {"seed": 1,'): "the key 'seed' comes more than once",
        good.replace('"bound": ', '"bound": 1e999, "b": '): "1e999 is no finite number",
        good + "{}": "Extra data",
        "[" * 100_000: "nested too deep",
        '{"a":' * 20_000: "nested too deep",
        good + " " * MOST_BYTES: f"more than {MOST_BYTES:,} bytes",
        good.encode("utf-16"): "codec can't decode",
        b"\xff" + good.encode(): "codec can't decode",
        b"\xef\xbb\xbf" + good.encode(): "BOM",
        b"": "Expecting value",
    }.items():
        assert complaint in refusal(tmp_path, capsys, content)


def test_paths_that_are_no_file_are_refused_in_one_line(tmp_path, capsys):
    locked, pipe = tmp_path / "no\nname", tmp_path / "pipe"
    os.mkfifo(pipe)
    for path in (tmp_path, tmp_path / "none.json", tmp_path / "x" / "y", "/dev/zero", pipe, "n" * 5000, locked):
        for flag in ("--verify", "--start", "--complete"):
            assert certificate.main([flag, str(path), *(["--out", str(tmp_path)] if flag != "--verify" else [])]) == 2
            assert "must be a certificate" in (err := capsys.readouterr().err) and err.count("\n") == 1


def test_a_word_is_inflated_no_further_than_the_program_is_long(digits, tmp_path, capsys):
    deflate = zlib.compressobj(9, zlib.DEFLATED, -15)
    bomb = deflate.compress(b"#" * (1 << 24)) + deflate.flush()
    content = {key: value for key, value in json.loads(COMPLETE.read_text()).items() if key != "word"}
    tracemalloc.start()
    assert "below 1000 bytes" in refusal(tmp_path, capsys, json.dumps({**content, "word": bomb.hex()}))
    assert tracemalloc.get_traced_memory()[1] < 2**21
    tracemalloc.stop()
    for start in (bomb[:100], bytes(100), b"\xff" * 100):
        assert "the word must begin with" in refusal(tmp_path, capsys, json.dumps({**content, "word": start.hex()}))
    whole = json.dumps({**json.loads(COMPLETE.read_text()), "task": "digits"})
    assert "sees the images of mnist: the task is digits" in refusal(tmp_path, capsys, whole)


def test_flags_that_would_do_nothing_are_refused(capsys):
    for flags, unused in (
        (["--verify", "x", "--delta", "0.1", "--steps", "3"], "delta', 'training"),
        (["--complete", "x", "--task", "mnist"], "task"),
        (["--verify", "x", "--complete", "y"], "complete"),
    ):
        assert certificate.main(flags) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert f"['{unused}'] would do" in line


def test_a_folder_that_cannot_be_made_is_refused_before_the_search(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(certificate, "search", lambda *args: pytest.fail("searched"))
    (tmp_path / "file").touch()
    assert certificate.main(["--out", str(tmp_path / "file" / "folder")]) == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_a_bug_keeps_its_traceback(digits, monkeypatch):
    monkeypatch.setattr(certificate, "certify", lambda *args: int("a bug"))
    with pytest.raises(ValueError, match="a bug"):
        certificate.main(["--verify", str(digits)])


def test_the_old_door_leads_here():
    command = [sys.executable, "-m", "analyses.certificate", "--verify", "none.json"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and "must be a certificate" in done.stderr


def test_a_delta_out_of_range_is_refused_before_training(capsys):
    assert certificate.main(["--delta", "1"]) == 2
    assert "delta must lie in (0, 1): got 1.0" in capsys.readouterr().err


def test_other_data_than_those_named_are_refused(monkeypatch):
    raw = certificate.read("digits")
    monkeypatch.setattr(certificate, "read", lambda task: raw._replace(x=np.repeat(raw.x[:1], len(raw.x), axis=0)))
    with pytest.raises(ValueError, match="training examples of digits must have SHA-256"):
        _load("digits")


def program_and_message(word):
    inflate = zlib.decompressobj(-15)
    return inflate.decompress(word).decode(), inflate.unused_data


@pytest.fixture(scope="module")
def enlarged():
    """Handwritten digits of 28 x 28 pixels, and the committed network with and without its program."""
    images = np.pad(loaded("digits").images[:300].repeat(3, axis=1).repeat(3, axis=2), ((0, 0), (2, 2), (2, 2)))
    record = read_record(COMPLETE)
    assert record.code == "word"
    return images, record.word, certificate.network_of(COMPLETE.with_name("mnist.json"))


def test_the_program_is_the_network_in_short(enlarged):
    images, word, network = enlarged
    program, message = program_and_message(word)
    assert program == complete.PROGRAM.read_text()
    assert program_and_message(complete.encode(program, network)) == (program, message)
    found = complete.scores(word, images)
    with_biases = replace(network, output_bias=0 * network.output_bias)
    expected = scores(with_biases, features(images))
    assert np.corrcoef(found.ravel(), expected.ravel())[0, 1] > 0.95  # real numbers in place of rounded ones
    assert (found.argmax(1) == expected.argmax(1)).mean() > 0.9


def test_no_other_program_runs(enlarged):
    images, word, network = enlarged
    deflate = zlib.compressobj(9, zlib.DEFLATED, -15, 9)
    other = deflate.compress(b"raise SystemExit") + deflate.flush() + program_and_message(word)[1]
    for bad, complaint in ((other, "program must be"), (word[5:], "program"), (word + b"0", "shortest form")):
        with pytest.raises(ValueError, match=complaint):
            complete.scores(bad, images[:1])
    with pytest.raises(ValueError, match="program must be"):
        complete.encode("print()", network)
    with pytest.raises(ValueError, match=r"weights must be in -5\.\.5: got 6"):
        complete.encode(complete.PROGRAM.read_text(), replace(network, output=network.output * 0 + 6))


def test_decoder_and_imports_can_be_paid_for_too(enlarged, capsys):
    images, word, _ = enlarged
    longer = complete.with_decoder(word)
    text, message = program_and_message(longer)
    assert text == complete.DECODER.read_text() + complete.PROGRAM.read_text()
    assert message == program_and_message(word)[1]
    names = {"I": images[:5].astype(float), "M": message, "R": []}  # and nothing else: no name comes from here
    exec(text, names)
    np.testing.assert_array_equal(names["R"], complete.scores(word, images[:5]))
    terms = certificate.terms("word", word, 831, 60_000, 0.05)
    assert f"{8 * len(longer)} description bits" in terms["these paid too"]
    found = float(terms["these paid too"].split("bound ")[1].split()[0])
    assert found == bounds.binomial_tail(831 / 60_000, 8 * len(longer) * math.log(2), 60_000, 0.05).value
    assert 0.0930 < found < 0.1095  # 0.1090 with zlib 1.2.13


def test_a_decoder_that_reads_otherwise_is_refused(enlarged, tmp_path, monkeypatch):
    other = tmp_path / "decoder.txt"
    other.write_text(complete.DECODER.read_text().replace("1<<48", "1<<40"))
    monkeypatch.setattr(complete, "DECODER", other)
    with pytest.raises(ValueError, match="must decode alike"):
        complete.with_decoder(enlarged[1])


def test_ties_and_scores_that_are_no_numbers_are_errors(enlarged, monkeypatch):
    images, word, _ = enlarged
    assert complete.count_errors(word, np.zeros_like(images[:2]), np.array([0, 1])) == 2  # blank: all scores are 0
    monkeypatch.setattr(complete, "scores", lambda word, images: np.array([[np.nan] * 10, np.arange(10.0)]))
    assert complete.count_errors(word, images[:2], np.array([9, 9])) == 1


def test_a_flipped_bit_is_refused_or_gets_its_own_numbers(digits, tmp_path, capsys):
    claimed = json.loads(digits.read_text())
    message, copy = bytes.fromhex(claimed["message"]), tmp_path / "copy.json"
    for place in (3, len(message) // 2, len(message) - 1):
        flipped = bytearray(message)
        flipped[place] ^= 16
        copy.write_text(json.dumps({**claimed, "message": flipped.hex()}))
        code = certificate.main(["--verify", str(copy)])
        printed = capsys.readouterr()
        assert "message" in printed.err if code == 2 else code == 1 and "wrong in" in printed.out


def test_the_order_of_the_images_does_not_matter(monkeypatch):
    raw = certificate.read("digits")
    order = np.random.default_rng(0).permutation(len(raw.y))
    monkeypatch.setattr(certificate, "read", lambda task: raw._replace(x=raw.x[order], y=raw.y[order]))
    assert (_load("digits").y == loaded("digits").y[order]).all()  # read without complaint


@pytest.mark.skipif(not os.environ.get("TICKETLAB_DATA"), reason="the images of MNIST are not here")
@pytest.mark.parametrize("path", CERTIFICATES, ids=lambda path: path.stem)
def test_committed_certificates_verify(path, capsys):
    assert certificate.main(["--verify", str(path)]) == 0
    printed = capsys.readouterr().out
    assert "every number is right" in printed and ("bound 0.1090" in printed) == (path == COMPLETE)
