from nnx_cli.data.conversations import with_template
from nnx_cli.data.tokenizers.byte import ByteTokenizer
from nnx_cli.inference.text_stream import TextStream, overlap


def test_tokens_after_the_end_change_nothing():
    stream = TextStream(ByteTokenizer(), ["b"], lambda piece: None)
    for token in b"ab":
        stream.push(token)
    stream.finish("length")
    assert (stream.text, stream.stop_reason) == ("a", "stop")


def test_overlap():
    assert [overlap("abc", stop) for stop in ("cd", "bcd", "abc", "xyz", "c")] == [1, 2, 0, 0, 0]


def test_a_reply_ends_at_any_special_token_of_a_conversation():
    tokenizer = with_template(ByteTokenizer())
    for special in tokenizer.specials.values():
        stream = TextStream(tokenizer, [], lambda text: None)
        for token in (*b"fine", special):
            stream.push(token)
        assert (stream.text, stream.stop_reason, stream.tokens) == ("fine", "eot", list(b"fine"))
