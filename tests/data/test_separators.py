"""Where documents end inside a text."""

import random

import pytest

from nnx_cli.data.separators import Documents


def read(text, separator=None, size=None):
    blocks = [text] if size is None else [text[i : i + size] for i in range(0, len(text), size)]
    cut = Documents(separator)
    documents, parts = [], []
    for piece, ends in cut.pieces(blocks):
        parts.append(piece)
        if ends:
            documents.append("".join(parts))
            parts = []
    assert not parts
    return [document for document in documents if document], cut


SIZES = [None, 1, 2, 3, 13, 40]
STORIES = ["Once upon a time.\nThey lived.\n", "Another < | > one.\n", "größer, 小猫\n\n\n", "The end"]


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize(
    "marker",
    [
        "<|endoftext|>",
        "<|end_of_text|>",
        "<|EndOfText|>",
        "<|eos|>",
        "<|EOT|>",
        "<|end-of-doc|>",
        "<|end_of_document|>",
    ],
)
@pytest.mark.parametrize("end", ["\n", "\r\n", "  \n", "\n\n"])
def test_a_line_with_a_marker_ends_a_document(marker, end, size):
    text = f"{marker}{end}".join(STORIES)
    documents, cut = read(text, size=size)
    assert documents == STORIES and (cut.n_found, cut.n_inside, cut.marker) == (3, 0, marker)
    documents, cut = read(f"  {marker}{end}{text}\n{marker}", size=size)
    assert documents == [*STORIES[:-1], "The end\n"] and cut.n_found == 5


@pytest.mark.parametrize("size", [None, 1, 5, 30])
@pytest.mark.parametrize(
    "text",
    [
        "one<|endoftext|>two\n",
        "one<|endoftext|>\n",
        "the token <|endoftext|> means\n",
        "<|endoftext|> starts a line\n",
        "<|im_end|>\n",
        "<|endoftext|\n>\n",
        "<endoftext>\n</s>\n<eos>\n",
        "|>\n" * 20,
        "| a | b |\n" * 400 + "x |> y\n",
        "<|a very long name " + "x" * 100 + "|>\n",
    ],
)
def test_all_else_is_text(text, size):
    documents, cut = read(text * 3, size=size)
    assert documents == [text * 3] and cut.n_found == 0
    if size is None:
        assert cut.n_inside == (3 if "endoftext|>" in text and "\n>" not in text else 0)


def test_markers_are_found_behind_many_bars():
    table = "| a | b |\n" * 2000
    assert read(f"{table}<|endoftext|>\n{table}")[0] == [table, table]


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize(
    ("separator", "text", "documents"),
    [
        ("<|endoftext|>", "one<|endoftext|>two<|endoftext|>\nthree", ["one", "two", "three"]),
        ("</s>", "one\n</s>\ntwo\n</s>\n</s>\n", ["one\n", "two\n"]),
        ("\n---\n", "one --- a\n---\ntwo\n----\nthree", ["one --- a", "two\n----\nthree"]),
        ("\n---\n", "one\r\n---\r\ntwo", ["one", "two"]),
        ("\n\n", "one\nmore\n\ntwo\n\n\n\nthree\n", ["one\nmore", "two", "three\n"]),
        ("***", "one\r\n***\r\ntwo***three", ["one\r\n", "two", "three"]),
        ("。", "一。二。三", ["一", "二", "三"]),
        ("aXa", "oneaXaXatwo", ["one", "Xatwo"]),
        ("nowhere", "one\ntwo", ["one\ntwo"]),
        ("==", "<|endoftext|>\none==two", ["<|endoftext|>\none", "two"]),
    ],
)
def test_what_the_user_says(separator, text, documents, size):
    found, cut = read(text, separator, size)
    assert found == documents
    assert (cut.n_found > 0) is (separator != "nowhere")


@pytest.mark.parametrize("seed", range(60))
def test_blocks_change_nothing(seed):
    chance = random.Random(seed)
    parts = ["<|endoftext|>", "\n", " ", "a", "\r\n", "<|", "|>", "<", "||", "<|eos|>", "é", "bc\n"]
    text = "".join(chance.choices(parts, k=60))
    for separator in (None, "<|endoftext|>", "\n", "a\nb", "||"):
        whole = read(text, separator)[0]
        for size in (1, 2, 5, 17):
            assert read(text, separator, size)[0] == whole


def test_pieces_are_the_blocks_where_nothing_is_cut():
    blocks = ["plain words\n" * 10, "no newline at the end", " of this\n"]
    assert [piece.text for piece in Documents(None).pieces(blocks)] == [*blocks, ""]
