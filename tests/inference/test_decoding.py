from nnx_cli.inference.decoding import window_start


def test_window_slides_by_half_a_context():
    assert [window_start(n, 32) for n in (1, 31, 32, 33, 48, 49, 64, 65)] == [0, 0, 0, 16, 16, 32, 32, 48]
    for seq_len in (1, 2, 3, 7, 32):
        for length in range(1, 200):
            assert 1 <= length - window_start(length, seq_len) <= seq_len
