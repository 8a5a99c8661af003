"""A certificate on disk, read without trust: exactly the claims that are known here, each once and of its type.

A file is refused, before anything of it is computed or shown, for whatever would let it say more than is recomputed:
keys that come twice, other keys, numbers that are none, text. Memory stays within a few hundred kilobytes.
"""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Literal, get_args

from examples.certificate.complete import taken_apart
from examples.certificate.network import decode
from examples.certificate.search import Training
from ticketlab.errors import Refused

Task = Literal["digits", "mnist"]
Code = Literal["message", "word"]
"""Of network.py, and of complete.py: the key of a certificate under which its bytes stand."""
CLAIMS: dict[str, type] = {
    "task": str,
    "training_sha256": str,
    "delta": float,
    "n": int,
    "description_bits": int,
    "training_errors": int,
    "bound": float,
    "n_test": int,
    "test_errors": int,
    "held_out_bound": float,
}
REMARK = "found_by"
"""How the search was set: no claim, as a bound speaks of the network itself; of messages alone."""
MOST_BYTES = 1 << 17
"""Of a file: the largest network that network.py can write takes about 60,000 hexadecimal digits."""


@dataclass(frozen=True)
class Record:
    """What a certificate says."""

    code: Code
    word: bytes
    """The network, encoded."""
    claims: dict[str, Any]
    """By the names of `CLAIMS`."""
    remarks: tuple[str, ...]
    """Keys that nothing verifies."""


def read_record(path: Path) -> Record:
    """The certificate in a file.

    Raises:
        Refused: A file that cannot be read, is no JSON object of exactly the known keys, each once and of its type, or
            whose network does not decode.
    """
    try:
        return _record(_json(_bytes(path)))
    except (Refused, UnicodeDecodeError, json.JSONDecodeError, RecursionError, OSError) as error:
        why = "it is nested too deep." if isinstance(error, RecursionError) else shown(error)
        raise Refused(
            f"{shown(path)} must be a certificate, a JSON file as in examples/certificate/records: {why}"
        ) from error


def shown(value: object) -> str:
    """Text that takes one line and no more than its place, whatever a stranger put into it."""
    text = str(value)
    text = text if text.isprintable() else ascii(text)[1:-1]
    return text if len(text) <= 200 else f"{text[:200]}..."


def _bytes(path: Path) -> bytes:
    if not path.is_file():
        raise Refused("it is a folder, or is not there.")
    with path.open("rb") as file:
        content = file.read(MOST_BYTES + 1)
    if len(content) > MOST_BYTES:
        raise Refused(f"it has more than {MOST_BYTES:,} bytes.")
    return content


def _json(content: bytes) -> Any:
    return json.loads(
        content.decode(),
        object_pairs_hook=_each_once,
        parse_constant=_finite,
        parse_float=_finite,
        parse_int=_whole,
    )


def _each_once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    for key, times in Counter(key for key, _ in pairs).most_common(1):
        if times > 1:
            raise Refused(f"the key {shown(repr(key))} comes more than once.")
    return dict(pairs)


def _whole(text: str) -> int:
    if len(text) > 15:
        raise Refused("an integer has more than 15 digits.")
    return int(text)


def _finite(text: str) -> float:
    if not math.isfinite(number := float(text)):
        raise Refused(f"{shown(text)} is no finite number.")
    return number


def _record(content: Any) -> Record:
    if not isinstance(content, dict):
        raise Refused("it holds no object.")
    codes = [code for code in get_args(Code) if code in content]
    if len(codes) != 1:
        raise Refused("it must hold a message or a word in hexadecimal digits: it has none, or both.")
    remarks = {REMARK} & content.keys() if codes == ["message"] else set()
    _keys("it", content, {**CLAIMS, codes[0]: str, **dict.fromkeys(remarks, dict)})
    for key, length in {"training_sha256": 1, codes[0]: 2}.items():
        if not re.fullmatch("[0-9a-f]*", content[key]) or len(content[key]) % length:
            raise Refused(f"{key} must be hexadecimal digits, 0-9 and a-f, two per byte.")
    if content["task"] not in get_args(Task) or not 0 < content["delta"] < 1:
        raise Refused(
            f"task must be one of {get_args(Task)} and delta in (0, 1): got {shown(repr(content['task']))} and "
            f"{content['delta']}."
        )
    if codes == ["word"] and content["task"] != "mnist":
        raise Refused(f"the program of a word sees the images of mnist: the task is {content['task']}.")
    for remark in remarks:
        _keys(remark, content[remark], {field.name: type(field.default) for field in fields(Training)})
        Training(**content[remark])
    word = bytes.fromhex(content[codes[0]])
    (decode if codes[0] == "message" else taken_apart)(word)
    return Record(codes[0], word, {key: content[key] for key in CLAIMS}, tuple(remarks))


def _keys(where: str, given: dict[str, Any], expected: dict[str, type]) -> None:
    """Refuse other keys than those expected, and values of another type: 1 is no float, 1.0 and true are no integer."""
    other, missing = sorted(given.keys() - expected.keys()), sorted(expected.keys() - given.keys())
    if other or missing:
        raise Refused(f"{where} must hold the keys of a certificate alone: {missing} missing, {shown(other)} too many.")
    wrong = {key: kind.__name__ for key, kind in expected.items() if type(given[key]) is not kind}
    if wrong:
        raise Refused(f"{where} must hold values of these types: {wrong}.")
    if negative := [key for key, kind in expected.items() if kind in (int, float) and given[key] < 0]:
        raise Refused(f"{where} must hold no negative numbers: {negative}.")
