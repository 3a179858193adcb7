import json

import numpy as np
import pytest

from nnx_cli.config import PrepareConfig
from nnx_cli.data.conversations import (
    END,
    ROLE_TOKENS,
    Conversation,
    Message,
    Template,
    conversation,
    template_of,
    with_template,
)
from nnx_cli.data.formats import BadRow
from nnx_cli.data.prepare import default_folder, encode_files, prepare
from nnx_cli.data.token_folder import open_token_folder
from nnx_cli.data.tokenizers import bpe
from nnx_cli.data.tokenizers.byte import ByteTokenizer
from nnx_cli.data.tokenizers.char import CharTokenizer
from nnx_cli.data.tokenizers.hf_json import load_tokenizer, save_tokenizer, to_json
from nnx_cli.errors import DataError, UsageError

TEXT = "the cat sat on the mat; the dog, der Hund: größer? ja 小猫\n" * 40
TALK = [Message("system", "be kind"), Message("user", "how are you?"), Message("assistant", "fine, größer 小")]


def tokenizers():
    found = {
        "byte": ByteTokenizer(),
        "char": CharTokenizer("abcdefgh "),
        "gpt2": bpe.BpeTokenizer({bytes([b]): b for b in range(256)}, bpe.GPT2_PATTERN, {}, None),
    }
    if bpe.is_installed():
        found["bpe"] = bpe.train([TEXT], 300)
    return found


@pytest.mark.parametrize(("kind", "plain"), tokenizers().items())
def test_a_template_is_five_special_tokens_of_tokenizer_json(kind, plain, tmp_path):
    tokenizer = with_template(plain)
    assert template_of(plain) is None and template_of(tokenizer) is not None
    assert tokenizer.vocab_size == plain.vocab_size + (4 if plain.eot_id is not None else 5)
    assert with_template(tokenizer).fingerprint == tokenizer.fingerprint != plain.fingerprint
    assert len(to_json(tokenizer)["added_tokens"]) == 5
    save_tokenizer(tokenizer, tmp_path / "tokenizer.json")
    again = load_tokenizer(tmp_path / "tokenizer.json")
    assert again.fingerprint == tokenizer.fingerprint and again.eot_id == tokenizer.eot_id
    assert type(again) is type(plain) and template_of(again).role_ids == Template(tokenizer).role_ids
    assert np.array_equal(again.encode(TEXT), plain.encode(TEXT)), "text has the ids that it had"


@pytest.mark.parametrize(("kind", "plain"), tokenizers().items())
def test_hugging_face_reads_the_same_ids(kind, plain, tmp_path):
    library = pytest.importorskip("tokenizers")
    jinja = pytest.importorskip("jinja2")
    tokenizer = with_template(plain)
    template = Template(tokenizer)
    save_tokenizer(tokenizer, tmp_path / "tokenizer.json")
    theirs = library.Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    rows = [{"role": role, "content": content} for role, content in TALK[:2]]
    text = jinja.Template(template.jinja).render(messages=rows, add_generation_prompt=True)
    assert theirs.encode(text).ids == template.prompt(TALK[:2])
    assert theirs.get_vocab_size() == tokenizer.vocab_size
    whole = jinja.Template(template.jinja).render(messages=[*rows, {"role": "assistant", "content": TALK[2].content}])
    assert theirs.encode(whole).ids == [template.begin_id, *template.encode(TALK)[0].tolist()]


@pytest.mark.parametrize(("kind", "plain"), tokenizers().items())
def test_special_tokens_in_a_text_stay_text(kind, plain):
    template = Template(with_template(plain))
    said = f"write {END}<|assistant_start|> and <|endoftext|>"
    ids, _ = template.encode([Message("user", said), Message("assistant", "no")])
    inside = ids[1 : 1 + len(plain.encode(said))]
    assert np.array_equal(inside, plain.encode(said)) and not set(inside.tolist()) & template.ids
    assert template.tokenizer.decode(inside) == said


def test_only_answers_count_and_the_ends_of_answers():
    template = Template(with_template(ByteTokenizer()))
    ids, counts = template.encode([*TALK, Message("user", "and?"), Message("assistant", "well")])
    names = {i: name for name, i in template.tokenizer.specials.items()}
    learned = [names.get(i) or chr(i) for i in ids[counts].tolist()]
    answer = "fine, größer 小".encode()
    assert learned == [*map(chr, answer), END, *"well", END]
    assert ids.dtype == np.uint16 and len(counts) == len(ids)


@pytest.mark.parametrize(
    ("roles", "why"),
    [
        ("user assistant", None),
        ("system user assistant user assistant", None),
        ("", "it has no answer"),
        ("system", "it has no answer"),
        ("user", "it has no answer"),
        ("user assistant user", "its last message has no answer"),
        ("user user assistant", "user follows user"),
        ("assistant user", "assistant follows the beginning"),
        ("user system assistant", "system follows user"),
        ("system system user assistant", "system follows the beginning"),
    ],
)
def test_the_order_of_roles(roles, why):
    found = conversation([Message(role, "x") for role in roles.split()])
    assert isinstance(found, Conversation) if why is None else isinstance(found, BadRow) and why in found


def row(*contents, **more):
    roles = ("user", "assistant") * len(contents)
    return {"messages": [{"role": r, "content": c} for r, c in zip(roles, contents, strict=False)]} | more


def write_rows(path, rows):
    path.write_text("".join(json.dumps(each) + "\n" for each in rows), encoding="utf-8")
    return path


QUESTIONS = [row(f"what is {n} and {n}?", f"it is {2 * n}") for n in range(130)]


def made(path, out, **options):
    prepare([path], out, PrepareConfig(**({"tokenizer": "byte"} | options)))
    return open_token_folder(out)


def texts(tokens, documents, mask, template):
    """Of every document what counts, and all of it, end-of-text and roles as signs."""
    signs = {template.begin_id: "^", template.end_id: "$"} | dict.fromkeys(template.role_ids.values(), ">")
    bits = np.unpackbits(mask, bitorder="little")[: len(tokens)].astype(bool)
    bounds = [*documents.tolist(), len(tokens)]
    spell = lambda ids: "".join(signs.get(i) or chr(i) for i in ids.tolist())  # noqa: E731
    parts = [slice(a, b) for a, b in zip(bounds, bounds[1:], strict=False)]
    return [(spell(tokens[part][bits[part]]), spell(tokens[part])) for part in parts]


@pytest.mark.parametrize("n", [5, 99, 100, 130])
def test_rows_of_messages_become_a_masked_folder(tmp_path, n):
    data = made(write_rows(tmp_path / "talk.jsonl", QUESTIONS[:n]), tmp_path / "out")
    template = template_of(data.tokenizer)
    assert data.vocab_size == 261 and data.begins_at_documents
    held_out = texts(data.val, data.documents["val"], data.val_mask, template)
    found = texts(data.train, data.documents["train"], data.mask, template)
    if n >= 100:
        found += held_out
    else:  # the end of the text is held out, wherever that is
        rest = np.unpackbits(data.val_mask, bitorder="little")[: len(data.val)].sum()
        assert 0 < rest < len(data.val)
        found = found[:-1]
    for learned, whole in found:
        question, answer = whole.rstrip("^").split("$")[:2]
        assert learned == answer[1:] + "$" and question.startswith(">what is")
    wanted = [f"it is {2 * k}$" for k in range(n)]
    assert sorted(learned for learned, _ in found) == sorted(wanted) or (n < 100 and {x for x, _ in found} <= {*wanted})
    assert sum(data.meta["text_bytes"].values()) == sum(
        len(m["content"]) for each in QUESTIONS[:n] for m in each["messages"]
    )
    assert not list((tmp_path / "out").glob("*.flags")) and data.ngram_bits_per_byte is None


@pytest.mark.parametrize("suffix", ["jsonl", "json", "csv", "tsv", "parquet"])
def test_a_question_and_an_answer_in_two_fields(tmp_path, suffix):
    rows = [{"n": n, "ask": f"what is {n}, please?", "reply": f"it is\n{n}"} for n in range(120)]
    path = tmp_path / f"pairs.{suffix}"
    if suffix == "jsonl":
        write_rows(path, rows)
    elif suffix == "json":
        path.write_text(json.dumps({"data": rows}))
    elif suffix == "parquet":
        arrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
        parquet.write_table(arrow.Table.from_pylist(rows), path)
    else:
        mark = "," if suffix == "csv" else "\t"
        cell = '"{}"' if suffix == "csv" else "{}"
        lines = [
            mark.join([str(r["n"]), cell.format(r["ask"]), cell.format(r["reply"].replace("\n", " "))]) for r in rows
        ]
        path.write_text("\n".join([mark.join(("n", "ask", "reply")), *lines]) + "\n")
    data = made(path, tmp_path / "out", prompt_key="ask", answer_key="reply")
    found = texts(data.train, data.documents["train"], data.mask, template_of(data.tokenizer))
    found += texts(data.val, data.documents["val"], data.val_mask, template_of(data.tokenizer))
    assert sorted(learned.replace("\n", " ") for learned, _ in found) == sorted(f"it is {n}$" for n in range(120))
    assert all("what is" in whole for _, whole in found)


def test_messages_in_a_table(tmp_path):
    arrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    parquet.write_table(arrow.Table.from_pylist(QUESTIONS), tmp_path / "talk.parquet")
    wanted = made(write_rows(tmp_path / "talk.jsonl", QUESTIONS), tmp_path / "lines")
    assert made(tmp_path / "talk.parquet", tmp_path / "table").fingerprint == wanted.fingerprint


def test_one_conversation_or_an_array_in_a_json_file(tmp_path):
    (tmp_path / "one.json").write_text(json.dumps(row("who?", "me")))
    assert made(tmp_path / "one.json", tmp_path / "one").mask is not None
    (tmp_path / "list.json").write_text(json.dumps(QUESTIONS))
    wanted = made(write_rows(tmp_path / "talk.jsonl", QUESTIONS), tmp_path / "lines")
    assert made(tmp_path / "list.json", tmp_path / "list").fingerprint == wanted.fingerprint


@pytest.mark.parametrize(
    ("bad", "why"),
    [
        ({"messages": [{"role": "user", "content": "hi"}]}, "it has no answer"),
        ({"messages": []}, "it has no answer"),
        (row("hi", "  "), "one of its answers is empty"),
        ({"messages": [{"role": "tool", "content": "x"}]}, "the role 'tool' is none of system, user, assistant"),
        ({"messages": [{"from": "human", "value": "x"}]}, "no text as its role or content"),
        ({"messages": [{"role": "user", "content": ["x"]}]}, "no text as its role or content"),
        ({"messages": ["hi", "ho"]}, "no text as its role or content"),
        ({"messages": [{"role": "assistant", "content": "x"}]}, "assistant follows the beginning"),
        ({"text": "a plain row"}, "it is plain text among conversations"),
        ({"messages": "hi"}, "it has no field 'text'"),
    ],
)
def test_a_bad_row_is_told_and_left_out(tmp_path, bad, why):
    path = write_rows(tmp_path / "talk.jsonl", [*QUESTIONS[:20], bad])
    notes = []
    prepare([path], tmp_path / "out", PrepareConfig(tokenizer="byte"), None, lambda e: notes.append(e.get("note", "")))
    assert any("1 row skipped" in note and "line 21" in note and why in note for note in notes), notes
    with pytest.raises(DataError, match="line 21") as error:
        made(path, tmp_path / "strict", errors="strict")
    assert why in str(error.value) and not (tmp_path / "strict").exists()


def test_no_good_row_at_all(tmp_path):
    path = write_rows(tmp_path / "talk.jsonl", [row("hi"), row("ho")])
    with pytest.raises(DataError, match="2 rows skipped, the first at line 1: it has no answer"):
        made(path, tmp_path / "out")
    with pytest.raises(DataError, match="it has no answer: no field 'reply'"):
        made(write_rows(path, [{"ask": "who?"}]), tmp_path / "out", prompt_key="ask", answer_key="reply")
    (tmp_path / "pairs.csv").write_text("ask,answer\nwho?,me\n")
    with pytest.raises(DataError, match="has no column 'reply' but ask, answer") as error:
        made(tmp_path / "pairs.csv", tmp_path / "out", prompt_key="ask", answer_key="reply")
    assert error.value.fix == "name one with --answer-key"


def test_conversations_and_plain_text_are_prepared_apart(tmp_path):
    talk = write_rows(tmp_path / "talk.jsonl", QUESTIONS)
    (tmp_path / "book.txt").write_text("once upon a time\n" * 50)
    for paths in ([talk, tmp_path / "book.txt"], [tmp_path / "book.txt", talk]):
        with pytest.raises(DataError, match="prepared apart"):
            prepare(paths, tmp_path / "out", PrepareConfig(tokenizer="byte"))
        assert not (tmp_path / "out").exists()


def test_a_text_key_still_reads_messages_as_text(tmp_path):
    data = made(write_rows(tmp_path / "talk.jsonl", QUESTIONS), tmp_path / "out", text_key="messages.content")
    assert data.mask is None and data.vocab_size == 256
    both = made(
        write_rows(tmp_path / "both.jsonl", [each | {"text": "plain"} for each in QUESTIONS]), tmp_path / "both"
    )
    assert both.mask is None and "plain" in both.tokenizer.decode(both.train[:40])


@pytest.mark.skipif(not bpe.is_installed(), reason="needs rustbpe")
@pytest.mark.parametrize("tokenizer", ["bpe", "char"])
def test_a_vocabulary_has_as_many_ids_as_asked_for(tmp_path, tokenizer):
    path = write_rows(tmp_path / "talk.jsonl", [row(TEXT, TEXT)] * 3)
    n = 290 if tokenizer == "bpe" else 270
    assert made(path, tmp_path / "out", tokenizer=tokenizer, vocab_size=n).vocab_size == n


def test_both_keys_or_none():
    for options in ({"prompt_key": "a"}, {"answer_key": "a"}):
        with pytest.raises(UsageError, match="belong together"):
            PrepareConfig(**options)
    with pytest.raises(UsageError, match="--text-key and --prompt-key"):
        PrepareConfig(prompt_key="a", answer_key="b", text_key="c")


def test_the_default_folder_knows_the_keys(tmp_path):
    path = write_rows(tmp_path / "pairs.jsonl", [{"a": "x", "b": "y", "text": "z"}])
    plain = default_folder([path], PrepareConfig())
    pairs = [default_folder([path], PrepareConfig(prompt_key=p, answer_key=q)) for p, q in ("ab", "ba")]
    assert len({plain, *pairs}) == 3


def test_validation_rows_of_their_own(tmp_path):
    train = write_rows(tmp_path / "train.jsonl", QUESTIONS[:50])
    val = write_rows(tmp_path / "val.jsonl", QUESTIONS[50:60])
    prepare([train], tmp_path / "out", PrepareConfig(tokenizer="byte"), [val])
    data = open_token_folder(tmp_path / "out")
    found = texts(data.val, data.documents["val"], data.val_mask, template_of(data.tokenizer))
    assert [learned for learned, _ in found] == [f"it is {2 * n}$" for n in range(50, 60)]


def test_held_out_conversations_are_encoded_with_their_mask(tmp_path):
    path = write_rows(tmp_path / "talk.jsonl", QUESTIONS[:9])
    tokenizer = with_template(ByteTokenizer())
    ids, documents, mask = encode_files([path], tokenizer, tmp_path, PrepareConfig())
    assert [x for x, _ in texts(ids, documents, mask, Template(tokenizer))] == [f"it is {2 * n}$" for n in range(9)]
    with pytest.raises(DataError, match="no template") as error:
        encode_files([path], ByteTokenizer(), tmp_path, PrepareConfig())
    assert "--text-key messages.content" in error.value.fix


def test_role_tokens_are_what_the_readme_names():
    assert ROLE_TOKENS == ("<|system_start|>", "<|user_start|>", "<|assistant_start|>", "<|end|>")
