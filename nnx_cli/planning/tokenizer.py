"""Which tokenizer `auto` takes, and how many ids `bpe` has: by the text, and by the model where it is known.

Here and not in the recipe, which needs torch: preparing a text does not.
"""

from __future__ import annotations

from nnx_cli.data.tokenizers.bpe import DEFAULT_VOCAB_SIZE

BPE_FROM_BYTES = 8_000_000  # of text, from which on `auto` is bpe: for `small` bytes won at 5 MB: tests/bench
SMALL = 3_000_000  # parameters; for less bpe won from 1.2 MB on by 3 to 14 %, and lost below: tests/bench
BPE_FROM_BYTES_SMALL = 2_000_000
# bytes of text from which on a vocabulary may have so many ids; not raced but for 8,192 on 220 MB: tests/bench
IDS_BY_BYTES = ((0, DEFAULT_VOCAB_SIZE), (20_000_000, 8192), (200_000_000, 16_384), (2_000_000_000, 32_768))
# parameters (at 256 ids) from which on a model has the width for so many: Tao et al. 2024,
# https://arxiv.org/abs/2407.13623, whose table of embeddings grows with the power 0.83 of all other parameters
IDS_BY_PARAMETERS = ((0, 4096), (20_000_000, 8192), (250_000_000, 16_384), (700_000_000, 32_768))


def vocabularies_for(n_parameters: int | None = None) -> tuple[tuple[int, int], ...]:
    """(bytes of text, ids): from so much text on `bpe` has so many ids, for a model of so many parameters or any.

    With less text than the first `auto` is bytes.
    """
    least_text = bpe_from(n_parameters)
    most = max(ids for least, ids in IDS_BY_PARAMETERS if n_parameters is None or n_parameters >= least)
    return tuple((max(n_bytes, least_text), ids) for n_bytes, ids in IDS_BY_BYTES if ids <= most)


def bpe_from(n_parameters: int | None) -> int:
    """Bytes of text from which on `auto` is bpe, for a model of so many parameters or any."""
    return BPE_FROM_BYTES if n_parameters is None or n_parameters > SMALL else BPE_FROM_BYTES_SMALL
