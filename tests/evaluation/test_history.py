"""Histories of trainings: what is no table of numbers is named in one line."""

from __future__ import annotations

from pathlib import Path

import pytest

from lsgm.errors import LSGMError
from lsgm.evaluation.history import read_history

HEAD = b"step,epoch,nelbo\n"


def test_an_empty_field_is_nan(tmp_path: Path) -> None:
    (tmp_path / "h.csv").write_bytes(HEAD + b"10,0.5,\n20,1.0,99.5\n20,1.0,nan\n")
    frame = read_history(tmp_path / "h.csv", "again")
    assert frame["nelbo"].isna().tolist() == [True, False, True]


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"", "cannot be read"),
        (bytes(range(256)), "cannot be read"),
        ("step,epoch,nelbo\n1,2,3\n".encode("utf-16"), "cannot be read"),
        (HEAD + b'1,2,"3\n', "cannot be read"),
        (HEAD + b"1,2,\0\n2,3,4\n", "the column 'nelbo' has values that are not numbers"),
        (HEAD + b"1,2,low\n", "the column 'nelbo' has values that are not numbers"),
        (HEAD + b"1,2," + b"9" * 100_000 + b"\n", "the column 'nelbo' has values that are not numbers"),
        (HEAD + b"1,2,3,4\n", "has rows with more fields than its 3 columns"),
        (HEAD + b"1,1,3\n,2,3\n", "the column step is not finite, nonnegative and nondecreasing"),
        (HEAD + b"1,1,3\n2,inf,3\n", "the column epoch is not finite, nonnegative and nondecreasing"),
        (HEAD + b"2,1,3\n1,2,3\n", "the column step is not finite, nonnegative and nondecreasing"),
        (HEAD + b"-1,1,3\n", "the column step is not finite, nonnegative and nondecreasing"),
        (HEAD, "has no rows"),
        (b"step,nelbo\n1,2\n", "has no column epoch"),
    ],
)
def test_what_is_no_history_is_named(tmp_path: Path, content: bytes, says: str) -> None:
    (tmp_path / "h.csv").write_bytes(content)
    with pytest.raises(LSGMError, match=rf"h\.csv: {says}.*; train again$") as caught:
        read_history(tmp_path / "h.csv", "train again")
    assert "\n" not in str(caught.value)
