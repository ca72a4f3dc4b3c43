"""params.yaml as text: what YAML would read as something else than it looks like is refused, in one line."""

import random
import resource
import time
from pathlib import Path

import pytest
import yaml

from lsgm.config import ConfigError
from lsgm.params import load_params
from lsgm.params.yaml_reader import MAX_BYTES, parse_yaml, read_yaml

PARAMS = Path(__file__).parents[1] / "params.yaml"
LAUGHS = "a: &a [x, x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"{new}: &{new} [{', '.join([f'*{old}'] * 10)}]\n" for old, new in zip("abcdefgh", "bcdefghi", strict=True)
)


def test_the_projects_own_file_is_what_pyyaml_reads_in_the_same_order():
    found = read_yaml(PARAMS)
    expected = yaml.safe_load(PARAMS.read_text())
    assert repr(found.value) == repr(expected)
    lines = PARAMS.read_text().splitlines()
    assert lines[found.lines["models.mnist_demo.train.lr_vae"] - 1] == "      lr_vae: 1.0e-3"
    assert lines[found.lines["ablations.backbones"] - 1] == "  backbones: &backbones"


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("a: &x {b: 1, c: 2}\nd: {<<: *x, c: 3}", {"a": {"b": 1, "c": 2}, "d": {"b": 1, "c": 3}}),
        ("a: &x {b: 1}\nc: {<<: [*x, {b: 2, d: 3}]}", {"a": {"b": 1}, "c": {"b": 1, "d": 3}}),
        ("a: 2024-01-01\nb: 1_000\nc: 1e-3\nd: 0x10", {"a": "2024-01-01", "b": 1000, "c": "1e-3", "d": 16}),
        ("a: '1:30'\n'no': [~, yes, 'yes', !!str 12]", {"a": "1:30", "no": [None, True, "yes", "12"]}),
        ("\ufeffa: 1\r\nb: 2", {"a": 1, "b": 2}),
    ],
)  # fmt: skip
def test_what_is_read(text, value):
    assert parse_yaml(text, "p.yaml").value == value


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: 1\nb: 2\na: 3", "line 3: a: appears twice, first in line 1; delete one"),
        ("a: [1, {b: {c: 1,\n  c: 2}}]", "line 2: a.1.b.c: appears twice, first in line 1"),
        ("a: {b: 1, b: 1}", "line 1: a.b: appears twice, first in the same line"),
        ("a: 1\n__use_yte__: true", "line 2: found the key '__use_yte__', which asks for code to be run; delete it"),
        ("a: {__definitions__: []}", "line 1: found the key '__definitions__'"),
        ("a: [{__variables__: {}}]", "line 1: found the key '__variables__'"),
        ("a:\n  ?if True: 1", "line 2: found the key '.if True'"),
        ("a:\n  b: 1:30", "line 2: found 1:30, which YAML reads as a number to the base 60; write 1.5, or put it"),
        ("a: -1:30:00", "found -1:30:00, .* write -1.5"),
        ("a: 1:30.5", "write 1.50833"),
        ("a: 010", "line 1: found 010, which YAML reads as an octal number; write it without the zero"),
        ("a: 0o17", "found 0o17, which YAML reads as an octal number"),
        ("a: 1\nno: 2", "line 2: expected text as a key, found no, which YAML reads as false; put it in quotes"),
        ("4: 2", "line 1: expected text as a key, found 4, which YAML reads as a number"),
        ("~: 2", "found ~, which YAML reads as none"),
        ("? [a]: b", "line 1: expected text as a key, found a list, a section or an alias"),
        ('"a\\nb": 1', r"expected one line of text as a key, found 'a\\nb'"),
        ("a: !!python/object/apply:os.system [ls]", "line 1: found the tag !!python/object/apply:os.system; expected"),
        ("a: !!binary aGk=", "found the tag !!binary"),
        ("a: !!set {b}", "found the tag !!set"),
        ("a: !mine 1", "found the tag !mine"),
        ("a:\n\t- b", "is not valid YAML: line 2: .*; indent with spaces"),
        ("a: b: c", "line 1: mapping values are not allowed here; put text with a colon in quotes"),
        ("a: [", "is not valid YAML: line 1: .*; check the brackets"),
        ("a: 1\nb: \0", "line 2: the character 0x00, which is no text; delete it"),
        ("a: \x07", "the character 0x07"),
        ('a: "\\UFFFFFFFF"', "is not valid YAML: line 1: .*; check the escapes there"),
        ("a: 1\n---\nb: 1", "line 2: a second document begins"),
        ("", "is empty, expected sections"),
        ("# nothing\n", "is empty, expected sections"),
        ("- a", r"line 1: expected sections .*, found \['a'\]"),
        ("text", "line 1: expected sections .*, found 'text'"),
        ("a: *b", r"line 1: the alias \*b has no anchor &b above it"),
        ("a: &a [*a]", r"line 1: the alias \*a stands within its own anchor"),
        ("a: &a 1\nb: &a 2", "line 2: a second anchor &a; give it another name"),
        ("a: {<<: 3}", "line 1: <<: expected a section or a list of sections to merge, found 3"),
        ("a: " + "9" * 5000, "line 1: expected a number, found 9+[.]{3}; put it in quotes"),
        ("a: 0x_", "expected a number, found 0x_"),
        ("[" * 1000, "line 1: nested deeper than 64 levels"),
        ("a: " + "{a: " * 1000, "nested deeper than 64 levels"),
        ("- " * 1000, "nested deeper than 64 levels"),
        ("a: &a " + "[" * 40 + "]" * 40 + "\nb: " + "[" * 40 + "*a" + "]" * 40, "line 2: nested deeper .* aliases"),
        (LAUGHS, "line 5: more than 100000 values up to here, with those that aliases"),
    ],
)  # fmt: skip
def test_what_is_refused(text, message):
    before = time.process_time()
    with pytest.raises(ConfigError, match=message) as caught:
        parse_yaml(text, "p.yaml")
    assert str(caught.value).startswith("p.yaml: ") and "\n" not in str(caught.value)
    assert time.process_time() - before < 1


def test_files_that_are_no_text(tmp_path):
    path = tmp_path / "params.yaml"
    for content, message in (
        (b"a: \xe9", r"is not a UTF-8 text file \(byte 3 is 0xe9\); save it as UTF-8"),
        ("a: 1".encode("utf-16"), "is not a UTF-8 text file"),
        (b"a" * (MAX_BYTES + 1), f"has {MAX_BYTES + 1} bytes, expected at most {MAX_BYTES}"),
        (b"", "is empty"),
    ):
        path.write_bytes(content)
        with pytest.raises(ConfigError, match=f"params.yaml: {message}"):
            load_params(path)
    with pytest.raises(ConfigError, match=r"cannot be read \(Is a directory\)"):
        load_params(tmp_path)


def test_whatever_the_bytes_there_is_a_line_for_each_mistake(tmp_path):
    """Bytes of a small plan changed, removed and doubled at random: read as another plan, or explained."""
    path, rng = tmp_path / "params.yaml", random.Random(0)
    original = (Path(__file__).parent / "workflow/tiny.yaml").read_bytes()
    refused = 0
    for _ in range(300):
        content = bytearray(original)
        for _ in range(rng.randint(1, 4)):
            at = rng.randrange(len(content))
            piece = (
                bytes([rng.randrange(256)])
                if rng.random() < 0.5
                else rng.choice([b"", b"\t", b":", b"{", b"*a", b"- "])
            )
            content[at : at + rng.randint(0, 3)] = piece
        path.write_bytes(content)
        try:
            load_params(path)
        except ConfigError as error:
            refused += 1
            assert all(line.startswith(f"{path}: ") and line.isprintable() for line in str(error).splitlines())
    assert 100 < refused < 300


def test_mistakes_name_their_line(tmp_path):
    path = tmp_path / "params.yaml"
    text = (Path(__file__).parent / "workflow/tiny.yaml").read_text()
    path.write_text(text.replace("channels: 16", "channels: 0").replace("count: 100", "count: 1"))
    with pytest.raises(ConfigError, match=r"models.tiny.prior.channels: expected .* found 0 \(line 18\)$"):
        load_params(path)
    path.write_text(text.replace("count: 100", "count: 1"))
    with pytest.raises(ConfigError, match=r"models.tiny.sample.count: mnist_classifier needs .* \(line 21\)$"):
        load_params(path)


def test_a_large_file_takes_little_memory():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for text in (LAUGHS, "{" * 10**6, "a: {" + "b: 1, " * 150_000):
        with pytest.raises(ConfigError):
            parse_yaml(text[:MAX_BYTES], "p.yaml")
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 200 * 1024
