"""JSON in every shape that datasets have."""

import json
import tracemalloc

import pytest

from nnx_cli.config import PrepareConfig
from nnx_cli.data import json_records
from nnx_cli.data.formats import BadRow, likely_key
from nnx_cli.data.json_records import is_lines, json_rows, jsonl_rows, records_in
from nnx_cli.data.prepare import prepare
from nnx_cli.errors import DataError

TEXTS = ["one", 'two\n{["', "drei größer ]}", "", "四"]
RECORDS = [{"id": i, "text": text, "more": {"text": [1]}} for i, text in enumerate(TEXTS)]


def read(content, key="text", size=None, limit=2**20):
    """Texts, and the numbers and reasons of bad rows."""
    blocks = [content] if size is None else [content[i : i + size] for i in range(0, len(content), size)]
    rows = list(json_rows(blocks, key, limit, "a.json"))
    return [text for _, text in rows if not isinstance(text, BadRow)], [
        (n, str(t)) for n, t in rows if isinstance(t, BadRow)
    ]


SHAPES = {
    "array": json.dumps(RECORDS),
    "array on many lines": json.dumps(RECORDS, indent=2, ensure_ascii=False),
    "array of texts": json.dumps(TEXTS),
    "one after the other": "\n".join(json.dumps(record, indent=1) for record in RECORDS),
    "one after the other without a space": "".join(map(json.dumps, RECORDS)),
    "with commas between": ",\n".join(map(json.dumps, RECORDS)),
    "list in an object": json.dumps({"version": "1", "n": 5, "tags": ["x"], "data": RECORDS}),
    "list in an object, on many lines": json.dumps({"data": RECORDS, "info": {"a": [{"text": 3}]}}, indent=4),
    "columns": json.dumps({"id": [1, 2], "text": TEXTS}),
    "columns by number": json.dumps({"id": {"0": 1}, "text": {str(i): text for i, text in enumerate(TEXTS)}}),
    "blanks before": " \r\n\t" + json.dumps(RECORDS),
}


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("size", [None, 1, 7, 50])
def test_every_shape_gives_the_same_records(shape, size):
    assert read(SHAPES[shape], size=size) == (TEXTS, [])


@pytest.mark.parametrize(
    ("content", "key", "texts"),
    [
        ({"data": [{"a": {"b": "x"}}, {"a": {"b": "y"}}]}, "data.a.b", ["x", "y"]),
        ({"data": [{"a": {"b": "x"}}, {"a": {"b": "y"}}]}, "a.b", ["x", "y"]),
        ([{"messages": [{"content": "x"}, {"content": "y"}]}], "messages.content", ["x\ny"]),
        ({"messages": [{"content": "x"}, {"content": "y"}]}, "messages.content", ["x", "y"]),
        ({"train": [{"text": "x"}], "test": [{"text": "y"}]}, "train.text", ["x"]),
        ({"train": [{"text": "x"}], "test": [{"text": "y"}]}, "text", ["x", "y"]),
        ({"text": "one document", "id": 5}, "text", ["one document"]),
        ({"a": {"text": "deep"}}, "a.text", ["deep"]),
        ([{"text.raw": "x"}], "text.raw", ["x"]),
    ],
)
def test_paths_of_fields(content, key, texts):
    for text in (json.dumps(content), json.dumps(content, indent=1)):
        assert read(text, key) == (texts, [])


def test_a_long_object_is_read_field_by_field(monkeypatch):
    monkeypatch.setattr(json_records, "OBJECT_CHARS", 100)
    for shape in ("list in an object", "columns", "list in an object, on many lines"):
        assert read(SHAPES[shape], size=64) == (TEXTS, [])
    assert read(json.dumps({"text": "x" * 500}) + json.dumps({"text": "y"}), size=64)[0] == ["x" * 500, "y"]


@pytest.mark.parametrize(
    ("broken", "why"),
    [
        (r'{"text": "x\q"}', "it is not JSON"),
        ('{"text": "x\n}', "it is not JSON"),
        ('{"text": }', "it is not JSON"),
        ("{'text': 'x'}", "it is not JSON"),
        ('{"body": "x"}', "it has no field 'text'"),
        ('{"text": 5}', "its field 'text' is not text"),
        ("[1]", "it is not a JSON object"),
        ("null", "it is not a JSON object"),
        ('{"text": "' + "x" * 3000 + '"}', "more than"),
    ],
)
@pytest.mark.parametrize("size", [None, 11])
def test_a_bad_record_costs_itself(broken, why, size):
    texts, bad = read(f'[{{"text": "a"}}, {broken}, {{"text": "b"}}, {{"text": "c"}}]', size=size, limit=2000)
    assert texts == ["a", "b", "c"] and [number for number, _ in bad] == [2] and why in bad[0][1]


@pytest.mark.parametrize("size", [None, 3])
def test_a_file_that_ends_too_early(size):
    whole = json.dumps(RECORDS)
    for cut, n in ((len(whole) - 1, 5), (whole.index('{"id": 3') + 9, 3)):
        texts, bad = read(whole[:cut], size=size)
        assert texts == TEXTS[:n] and len(bad) == 1 and "the file ends inside" in bad[0][1]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"name": "x", "lr": 1e-3, "layers": [1, 2]}, "JSON without records: an object of name, lr, layers"),
        ({"compilerOptions": {"strict": True}}, "an object of compilerOptions"),
        ({"rows": [{"body": "x"}]}, "no list with a field 'text'"),
        ({}, "JSON without records"),
        (5, "is not JSON"),
        ("text", "is not JSON"),
    ],
)
def test_what_holds_no_records_is_named(content, message):
    for text in (json.dumps(content), json.dumps(content, indent=2)):
        with pytest.raises(DataError, match="a.json") as error:
            read(text)
        assert message in str(error.value)
    with pytest.raises(DataError, match="not JSON"):
        read("Once upon a time")


def test_lines_and_what_only_looks_like_them():
    assert is_lines('{"text": "a"}\n{"text": "b"}\n') and is_lines('\n{"a": 1}\nbroken\n')
    for head in ('{"text": "a"}\n', '{\n"text": "a"}\n{', '[{"text": "a"}]\n', "words\nwords", ""):
        assert not is_lines(head)
    rows = list(jsonl_rows(['{"text": "a"}\nbroken\n"just text"\n{"text": "b"}'], "text", 100))
    assert rows == [(1, "a"), (2, "it is not JSON"), (3, "just text"), (4, "b")]


@pytest.mark.parametrize(
    ("head", "found"),
    [
        ('{"text": "a"}\n{"text": "b"}\n', "lines"),
        ('[{"text": "a"}, {"text": "b"}]', "records"),
        ('\n [\n {"text": "a"},\n', "records"),
        ('{"body": "a"}\n', None),
        ('[{"body": "a"}]', None),
        ("[1, 2]", None),
        ("[see below] and so on", None),
        ("{curly} words\n", None),
        ("", None),
    ],
)
def test_records_in_text_without_a_suffix(head, found):
    assert records_in(head, "text") == found


@pytest.mark.parametrize("form", ['[%s{"text": "end"}]', '{"a": 1, "data": [%s{"text": "end"}], "z": 2}'])
def test_memory_stays_flat(form):
    start, end = form.split("%s")

    def blocks(n):
        yield start
        for _ in range(n):
            yield '{"text": "%s"}, ' % ("some words of a record" * 9) * 1000
        yield end

    peaks = []
    for n in (4, 12):
        tracemalloc.start()
        assert sum(1 for _ in json_rows(blocks(n), "text", 2**20, "a.json")) == n * 1000 + 1
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[1] < 1.2 * peaks[0] + 2**20


@pytest.mark.parametrize("text", ["a tab\there", "two\nlines", "bell \x07", "\x00"])
def test_control_characters_in_a_text_are_text(text):
    assert read(f'[{{"text": "{text}"}}, {{"text": "b"}}]') == ([text, "b"], [])
    if "\n" not in text:
        assert [found for _, found in jsonl_rows([f'{{"text": "{text}"}}\n'], "text", 2**20)] == [text]


@pytest.mark.parametrize("mark", ["{},", "\x1e{}", "\ufeff{}", "  {} ,\r", "{}\r"])
def test_what_stands_around_the_record_of_a_line(mark):
    lines = [mark.replace("{}", json.dumps({"text": text})) for text in ("a", "b")]
    assert [text for _, text in jsonl_rows(["\n".join(lines)], "text", 2**20)] == ["a", "b"]


def test_records_by_their_name_in_an_object():
    """As pandas writes a table by its index."""
    named = {f"row {i}": record for i, record in enumerate(RECORDS)}
    assert read(json.dumps(named)) == (TEXTS, []) and read(json.dumps({"n": 1} | named)) == (TEXTS, [])


@pytest.mark.parametrize(
    ("row", "key"),
    [
        ({"instruction": "do it", "output": "it is done well"}, "output"),
        ({"meta": {"author": "me"}, "body": {"content": "a long story"}}, "body.content"),
        ({"turns": [{"by": "me", "said": "how are you?"}, {"by": "you", "said": "fine"}]}, "turns.said"),
        ({"id": 3, "parts": ["some", "words"]}, "parts"),
        ({"id": 3, "ok": True}, None),
    ],
)
def test_the_field_with_most_of_the_text_is_found(row, key, tmp_path):
    assert likely_key(row) == key
    (tmp_path / "a.jsonl").write_text(f"{json.dumps(row)}\n" * 3)
    with pytest.raises(DataError, match="no text in .*a.jsonl: 3 rows skipped, the first at line 1") as error:
        prepare([tmp_path / "a.jsonl"], tmp_path / "made", PrepareConfig())
    assert error.value.fix == (key and f"add --text-key {key}")


@pytest.mark.parametrize("top", ["data", "rows", "cells"])
def test_the_list_with_the_text_is_named(top):
    with pytest.raises(DataError) as error:
        read(json.dumps({"n": 1, top: [{"id": 1, "said": "some words"}]}))
    assert error.value.fix == f"add --text-key {top}.said"
