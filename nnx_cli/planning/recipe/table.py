"""What the recipe depends on: a line for each number, with what it is and, at the end, where it is from: a page of
tests/bench, a paper, or "not raced".

Two more are the optimizer's, `lr_share` and momentum of `optim.muon`, and each architecture has its factors of the
rate, `models._base.Recipe`: zoo.md. Needs no torch: preparing a text reads it too.
"""

from __future__ import annotations

from nnx_cli.config import BPE_IDS

# length
DEFAULT_SECONDS = 240  # of training without a length: not raced
USEFUL_EPOCHS = 32  # more bring nothing: horizon.md
USEFUL_EPOCHS_TO_LARGE = 16  # nor more than these to a large model that can overfit: horizon.md
LARGE = 5e6  # parameters from which on that holds: a guess between 0.8 and 10.7 million of horizon.md
VERY_LARGE = 6e7  # parameters from which on fewer are enough: a guess between 30 and 125 million of horizon.md
LEAST_USEFUL_EPOCHS, MOST_USEFUL_TOKENS = 12, 3.4e7  # of these: 12, or up to 16 until so many tokens: horizon.md

# size
TOKENS_PER_PARAMETER_ON_CPU = 10  # that a size should see in the planned time to be worth its width: not raced
TOKENS_PER_PARAMETER = 0.3  # that a size should see on a GPU; below that a smaller one learns more: more_time.md
PARAMETERS_PER_BYTE = 30  # of training text, up to which a larger size was better, given the time: more_time.md
# bytes of training text from which on each size has no more than that; between `small` and `base`: not raced
SIZES_BY_BYTES = (
    (0, "nano"),
    (360_000, "tiny"),
    (1_000_000, "small"),
    (4_200_000, "base"),
    (11_800_000, "large"),
    (33_600_000, "xl"),
)

# tokenizer
SMALL = 3e6  # parameters, up to which a model has the lower of the next two borders: tokenizer_race.md
BPE_FROM_BYTES_SMALL = 2_000_000  # of text, from which on `auto` is bpe: tokenizer_race.md
BPE_FROM_BYTES = 8_000_000  # the same for larger models; bytes won at 5 MB: tokenizer_race.md
# bytes of text from which on a vocabulary may have so many ids; 8,192 on 220 MB: five_minutes.md, the larger: not raced
IDS_BY_BYTES = ((0, BPE_IDS), (20_000_000, 8192), (200_000_000, 16_384), (2_000_000_000, 32_768))
# parameters (at 256 ids) from which on a model has the width for so many: https://arxiv.org/abs/2407.13623 (Tao et al.
# 2024), whose table of embeddings grows with the power 0.83 of all other parameters
IDS_BY_PARAMETERS = ((0, 4096), (20_000_000, 8192), (250_000_000, 16_384), (700_000_000, 32_768))

# optimizer
PARAMETERS_PER_TOKEN_TO_OVERFIT = 8  # of the text, from which on a model can learn it by heart: horizon.md
EPOCHS_TO_OVERFIT = 16  # beyond which AdamW then beats Muon, which does so faster: zoo.md
BETA2 = 0.99  # whatever batch and width: zoo.md

# learning rate
LR_AT_128 = 4e-3  # of AdamW at a width of 128; it falls with the width, or its root with Muon in short runs: zoo.md
WIDEST_RACED = 384  # width up to which that root, and more weight decay, were raced: zoo.md
STEPS_PER_WARMUP_STEP, MOST_WARMUP_STEPS = 50, 200  # of a run: not raced

# tokens of a step
CPU_TOKENS_PER_STEP = (1024, 2048)  # for models of up to 2 million parameters: zoo.md, and larger: not raced
GPU_TOKENS_PER_STEP = (8192, 16_384, 32_768)  # up to 20, 60 million: zoo.md, and more: not raced
MOST_PARAMETERS_ON_CPU, MOST_PARAMETERS_ON_GPU = 2e6, (2e7, 6e7)  # these borders: not raced
SHORT_SEQUENCES, STEPS_FOR_SHORT = 1 / 3, 400  # of a run of so many steps on a CPU, in half the length: zoo.md

# dropout
DROPOUT = ((20, 0.3), (12, 0.2), (6, 0.1))  # epochs from which on a model needs it: horizon.md, zoo.md
PARAMETERS_PER_TOKEN_TO_DROP = 0.5  # of the text, from which on it pays: horizon.md
SOONER_FROM = 4  # parameters a token, from which on fewer epochs are enough: zoo.md

# weight decay; D is what weights forget in a run: `default_weight_decay`
EPOCHS_TO_FORGET, MOST_FORGOTTEN = 6, 3  # epochs for a D of 1, and the highest D, at a width of 128: zoo.md
READ_AGAIN = 3  # epochs from which on they count: zoo.md
# epochs and steps for a D of 1, of which the lower D counts, and the highest, with Muon and any width: zoo.md
EPOCHS_OF_ANY_WIDTH, STEPS_TO_FORGET, MOST_OF_ANY_WIDTH = 2, 700, 6
LEAST_FORGOTTEN, SHORTEST_RACED = 0.6, 295  # the lowest D with Muon in so many steps, less in fewer: zoo.md
MOST_DECAY = 0.04  # of a weight in a step, against losing it all where a text is read very often: not raced
