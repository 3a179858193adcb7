"""Tables as strangers write them: no row may swallow others, and what cannot be read is told."""

import csv
import io
import random
import tracemalloc

import pytest

from nnx_cli.data import delimited
from nnx_cli.data.delimited import Table
from nnx_cli.data.formats import BadRow
from nnx_cli.errors import DataError


def read(content, key="text", limit=2**20, size=None, quoted=True):
    """Texts, and the line numbers and reasons of bad rows."""
    blocks = [content] if size is None else [content[i : i + size] for i in range(0, len(content), size)]
    rows = list(Table(blocks, key, limit, "a.csv", quoted=quoted).rows())
    return [text for _, text in rows if not isinstance(text, BadRow)], [
        (n, str(t)) for n, t in rows if isinstance(t, BadRow)
    ]


def refused(content, key="text"):
    with pytest.raises(DataError) as error:
        read(content, key)
    return f"{error.value} | {error.value.fix}"


def rows_of(n, text="hello number {}"):
    return [f"{i},{text.format(i)}" for i in range(n)]


CLOSED = "its quote is not closed before other rows begin"


@pytest.mark.parametrize("size", [None, 7, 100])
@pytest.mark.parametrize("header", ["id,text", "id, text", '"id","text"'])
@pytest.mark.parametrize("at", [0, 5, 99, 199])
def test_a_lone_quote_costs_its_own_row_only(header, at, size):
    lines = rows_of(200)
    lines[at] = lines[at].replace(",", ',"')
    texts, bad = read("\n".join([header, *lines, ""]), size=size)
    assert texts == [f"hello number {i}" for i in range(200) if i != at]
    assert bad == [(at + 2, CLOSED)]


@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
def test_two_lone_quotes_and_quoted_rows_between(end):
    lines = rows_of(60)
    lines[10] = '10,"hello number 10'
    lines[20] = '20,"hello, number 20"'
    lines[30] = '30,hello number 30"'
    lines[40] = '40,"hello ""number"" 40"'
    lines[50] = '50,"hello number 50'
    texts, bad = read(end.join(["id,text", *lines, ""]))
    assert [number for number, _ in bad] == [12, 52]
    assert len(texts) == 58 and "hello, number 20" in texts and 'hello "number" 40' in texts
    assert 'hello number 30"' in texts


def test_a_pair_of_lone_quotes_does_not_swallow_what_lies_between():
    lines = rows_of(60)
    lines[10], lines[40] = '10,"hello number 10', '40,hello number 40"'
    texts, bad = read("\n".join(["id,text", *lines]))
    assert bad == [(12, CLOSED)] and len(texts) == 59


def test_without_numbers_ten_lines_are_too_many():
    lines = [f"name {chr(97 + i % 26)},hello {i}" for i in range(60)]
    lines[10], lines[40] = 'x,"hello 10', 'y,hello 40"'
    texts, bad = read("\n".join(["who,text", *lines]))
    assert bad == [(12, CLOSED)] and len(texts) == 59


@pytest.mark.parametrize("end", ["\n", "\r\n"])
@pytest.mark.parametrize("size", [None, 5])
def test_real_line_breaks_in_quotes_stay(end, size):
    texts = [f"Dear {i},{end}I write to you{end}{end}about 1, 2 and 3.{end}Yours, {i}" for i in range(30)]
    file = io.StringIO()
    csv.writer(file, lineterminator=end).writerows([["id", "text"], *enumerate(texts)])
    assert read(file.getvalue(), size=size) == (texts, [])


def test_a_poem_of_many_lines_in_one_column():
    poem = "\n".join(f"line {i} of a poem" for i in range(500))
    assert read(f'text\n"{poem}"\nplain, with a comma\n') == ([poem, "plain, with a comma"], [])


@pytest.mark.parametrize(
    "content",
    [
        "id,text\n1,hello\n2,good bye\n",
        " id , text \n1,hello\n2,good bye\n",
        "id, text\n1, hello\n2, good bye\n",
        "sep=;\nid;text\n1;hello\n2;good bye\n",
        '"sep=;"\r\nid;text\r\n1;hello\r\n2;good bye\r\n',
        "sep=^\nid^text\n1^hello\n2^good bye\n",
        "SEP=,\nid,text\n1,hello\n2,good bye\n",
        "id;text\n1;hello\n2;good bye\n",
        "id\ttext\n1\thello\n2\tgood bye\n",
        "id|text|more\n1|hello|x\n2|good bye|y\n",
        "id,text\r1,hello\r2,good bye\r",
        "id,text\r1,hello\r2,good bye",
        "\n\n  \nid,text\n\n1,hello\n\n\n2,good bye\n",
        "text,id\nhello,1\ngood bye,2\n",
        "text\nhello\ngood bye\n",
        '"text"\n"hello"\n"good bye"\n',
        "id,text,,\n1,hello,,\n2,good bye,,\n",
        "id,text\n1,hello,,\n2,good bye, ,\n",
        'id, text\n1, "hello"\n2, "good bye"\n',
    ],
)
def test_headers_delimiters_and_line_ends(content):
    for size in (None, 3):
        assert read(content, size=size) == (["hello", "good bye"], [])


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("id^text\n1^a\n", "separated by '^', not by a comma, semicolon, tab or | | write sep=^ in a line above"),
        ("id text\n1 a\n", "separated by ' '"),
        ("text:id\na:1\n", "separated by ':'"),
        ("id~~text\n1~~a\n", "separated by '~~', not by a comma, semicolon, tab or | | write it with commas"),
        ("id,body\n1,a\n", "no column 'text' but id, body | name one with --text-key"),
        ("id;my text\n1;a\n", "no column 'text' but id, my text"),
        ("id,TEXT\n1,a\n", "no column 'text' but id, TEXT | add --text-key TEXT"),
        ("id,a text\n1,a\n", "no column 'text' but id, a text"),
    ],
)
def test_what_is_not_understood_is_named(content, message):
    assert message in refused(content)


def test_rows_with_too_much_or_too_little_are_told():
    texts, bad = read('id,text\n1,hello, world\n2\n3,"hello, world"\n4,fine\n')
    assert texts == ["hello, world", "fine"]
    assert bad == [(2, "it has 3 columns, the header 2"), (3, "it has too few columns")]


def test_quotes_that_mean_nothing():
    texts, bad = read('id,text\n1,5" of rain\n2,say "hi"\n3,"so ""what"""\n4,"a "b" c"\n')
    assert texts[:3] == ['5" of rain', 'say "hi"', 'so "what"'] and len(texts) == 4 and bad == []


def test_in_tsv_a_quote_is_a_letter():
    content = 'id\ttext\n1\t"hello\n2\t"good" bye\n3\tsaid "yes\n4\t"tab\tin quotes"\n'
    texts, bad = read(content, quoted=False)
    assert (texts, bad) == (['"hello', '"good" bye', 'said "yes', "tab\tin quotes"], [])


def test_long_lines_and_empty_tables():
    assert read("id,text\n1," + "x" * 5000 + "\n2,fine\n", limit=1000) == (["fine"], [(2, "it has more than 0 MiB")])
    for content in ("", "\n\n", "sep=;\n", "id,text\n"):
        assert read(content) == ([], [])


@pytest.mark.parametrize("seed", range(40))
def test_any_table_that_python_writes_is_read_back(seed):
    """Of cells with quotes, delimiters and line ends, however they fall."""
    chance = random.Random(seed)
    delimiter = chance.choice(",;\t|")
    words = ["", "a", "b c", '"', "''", delimiter, "\n", "1", "x,y", "é"]
    rows = [[str(i), "".join(chance.choices(words, k=chance.randrange(6))), "z"] for i in range(50)]
    file = io.StringIO()
    csv.writer(file, delimiter=delimiter, lineterminator="\n").writerows([["id", "text", "more"], *rows])
    texts, bad = read(file.getvalue(), size=chance.randrange(1, 50))
    assert (texts, bad) == ([row[1] for row in rows], [])


def test_memory_stays_flat_behind_a_lone_quote(monkeypatch):
    monkeypatch.setattr(delimited, "LIKE_ROWS_WITH_NUMBERS", 2**40)  # so that only the limit on a row stops it
    monkeypatch.setattr(delimited, "LIKE_ROWS", 2**40)
    blocks = (f'{i},"never closed\n' if i == 5 else f"{i},hello {i:200}\n" for i in range(20_000))
    tracemalloc.start()
    n = sum(1 for _ in Table(_with_header(blocks), "text", 100_000, "a.csv").rows())
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert n == 20_000 and peak < 3 * 2**20


def _with_header(blocks):
    yield "id,text\n"
    yield from blocks


@pytest.mark.parametrize(
    ("cell", "text"),
    [
        (r'"he said \"hi\", then left"', 'he said "hi", then left'),
        (r'"a \"word\" in it"', 'a "word" in it'),
        (r'"\"begun\" so, and C:\new stays"', r'"begun" so, and C:\new stays'),
        (r'"it ends \"so\""', 'it ends "so"'),
        ('"as ""others"" do, with a path C:\\"', 'as "others" do, with a path C:\\'),
    ],
)
@pytest.mark.parametrize("mark", [",", ";", "\t"])
def test_quotes_behind_a_backslash(cell, text, mark):
    """As MySQL and pandas with an escapechar write them."""
    lines = [mark.join(("id", "text", "n")), *(mark.join((str(i), cell, "3")) for i in range(30)), ""]
    assert read("\n".join(lines)) == ([text] * 30, [])


@pytest.mark.parametrize(
    "above", ["# exported\n", "# by, a tool\n#\n\n", "#sep\n# text: what was said\n", "sep=,\n# 2024\n"]
)
def test_comments_above_the_header(above):
    assert read(above + "id,text\n1,one\n2,# two\n") == (["one", "# two"], [])


def test_a_header_may_begin_like_a_comment():
    assert read("#,text\n1,one\n") == (["one"], []) and read("#text\nx\n", key="#text") == (["x"], [])


@pytest.mark.parametrize("first", ["0,line 0", "1.5,a,b", "line;7", '"12","x"'])
def test_a_table_without_a_header_is_told(first):
    assert "its first line is no header" in refused(f"{first}\n{first}\n") and "in a line above" in refused(first)


@pytest.mark.parametrize("seed", range(40))
def test_blocks_change_nothing(seed):
    """Rows that are lines are read at once up to the first that is none: wherever that is, the same is understood."""
    draw = random.Random(seed)
    kinds = [
        "{},plain words",
        '{},"two\nlines"',
        '{},"quoted ""words"""',
        '{},"open',
        "{},early\rend",
        "",
        '{},a"b',
        "{},x,y",
    ]
    lines = ["id,text", *(draw.choices(kinds, [60, 5, 5, 1, 1, 1, 1, 1])[0].format(i) for i in range(300))]
    content = draw.choice(["\n", "\r\n"]).join(lines) + "\n" * draw.randrange(2)
    whole = read(content)
    assert whole[0] and all(read(content, size=size) == whole for size in (1, 13, 100, 1000))
