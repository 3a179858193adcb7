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
