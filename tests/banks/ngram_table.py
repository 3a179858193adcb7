"""A recipe for --bank-file: a table of the n-grams of a text, which a token may consult in the forward pass.

    nnx prepare book.txt --out data/book
    nnx train --model neon --decoder function --bank-file ngram_table.py --data data/book

Copy this file and change TEXT. For the last ORDER - 1 ids of each token the table has the ids that followed them in the
training text most often, and how often; what it returns is the mean of their embeddings, which are learned. Where those
ids never stood together it returns zeros, as a function that has nothing to say.

Besides its input a function gets what its `forward` asks for by name: `input_ids` (N, C), C being `context`, with each
row's own id last and -1 before the text begins, and `positions` (N,). Its constructor may ask for dim, vocab_size and
seq_len. The table is no parameter and not saved with the run: it is made of the text again.
"""

from functools import cache
from pathlib import Path

import torch
from torch import Tensor, nn

from nnx_cli.data.token_folder import open_token_folder

TEXT = "data/book"  # token folder whose training text is counted
ORDER = 4  # ids of an n-gram, the one that follows included
MOST = 4  # ids that are remembered as followers


@cache
def _followers(vocab_size: int) -> tuple[Tensor, Tensor, Tensor]:
    """What stood before (K,), as one number and sorted; its most frequent followers (K, MOST); their shares."""
    ids = torch.from_numpy(open_token_folder(Path(TEXT)).train.astype("int64"))
    pairs, counts = (_keys(ids.unfold(0, ORDER, 1), vocab_size)).unique(return_counts=True)
    pairs, counts = pairs[order := counts.argsort(descending=True, stable=True)], counts[order]
    before = pairs // vocab_size
    order = before.argsort(stable=True)  # by what stood before, and within that by how often
    before, follower, counts = before[order], pairs[order] % vocab_size, counts[order].float()
    keys, index, sizes = before.unique_consecutive(return_inverse=True, return_counts=True)
    place = torch.arange(len(before)) - (sizes.cumsum(0) - sizes)[index]
    total = torch.zeros(len(keys)).index_add(0, index, counts)
    best, share = torch.zeros(len(keys), MOST, dtype=torch.int64), torch.zeros(len(keys), MOST)
    kept = place < MOST
    best[index[kept], place[kept]] = follower[kept]
    share[index[kept], place[kept]] = (counts / total[index])[kept]
    return keys, best, share


def _keys(ids: Tensor, vocab_size: int) -> Tensor:
    """Rows of ids (N, n), each as one number."""
    assert vocab_size**ORDER < 2**63, "take a smaller ORDER"
    return (ids * vocab_size ** torch.arange(ids.shape[1] - 1, -1, -1, device=ids.device)).sum(-1)


class NgramTable(nn.Module):
    """The embeddings of what followed in the training text."""

    context = ORDER - 1

    def __init__(self, dim: int, vocab_size: int) -> None:
        super().__init__()
        self.vocab_size = vocab_size
        self.embedding = nn.Embedding(vocab_size, dim)
        nn.init.normal_(self.embedding.weight, std=0.2)  # about what a learned function returns at first
        for name, table in zip(("keys", "best", "share"), _followers(vocab_size), strict=True):
            self.register_buffer(name, table, persistent=False)

    def forward(self, x: Tensor, input_ids: Tensor) -> Tensor:
        """x (N, dim), which it does not read, and input_ids (N, context) to (N, dim)."""
        wanted = _keys(input_ids, self.vocab_size)
        place = torch.searchsorted(self.keys, wanted).clamp(max=len(self.keys) - 1)
        known = (self.keys[place] == wanted) & (input_ids >= 0).all(-1)
        share = self.share[place] * known[:, None]
        return (share[..., None] * self.embedding(self.best[place])).sum(1)
