"""Small models of shapes that a mistake in a converter would show in, with weights none of which is 0 or 1."""

import torch

from nnx_cli import models
from nnx_cli.runs.manifest import describe_model, write_model_folder

SHAPE = dict(vocab_size=61, dim=48, n_heads=3, n_layers=3, seq_len=24)
ODD = [  # of every architecture: grouped queries, untied, one layer, and what it alone has
    ("llama", {}),
    ("llama", dict(n_kv_heads=1, n_layers=1, tie_embeddings=False, rope_theta=500.0, ffn_dim=37)),
    ("n4", {}),
    ("n4", dict(n_kv_heads=1, n_layers=1, window=5, bias=True, dyt_alpha=True, head_scale=True)),
    ("neon", {}),
    ("neon", dict(n_kv_heads=1, n_layers=1, tie_embeddings=False, diff_mlp=True)),
    ("neon", dict(decoder="function", normalized=True, diff_mlp=True, n_layer_functions=3, n_global_functions=0)),
    ("neon", dict(decoder="function", function_anneal_steps=7)),
    ("neon", dict(decoder="memory", n_kv_heads=1, variant="original")),
    ("neon", dict(decoder="linear-control", diff_attention="off", normalized=True)),
    ("neon", dict(diff_attention="constrained", paper_lambda=True)),
    ("ngpt", {}),
    ("ngpt", dict(n_layers=1, tie_embeddings=False, normalize_on_use=True, qk_norm=False, value_residual=False)),
    ("ngpt", dict(alpha_attn_init=0.1, s_qk_init=2.0, head_dim=8)),
    ("nyx", {}),
    ("nyx", dict(n_layers=1, qk_norm=True, head_dim=10, ffn_dim=37, xpos=False)),
    ("nyx", dict(qk_norm=True, variant="original")),
    ("tape", {}),
    ("tape", dict(n_layers=1, coda_layers=1, n_critics=1, variant="sound")),
    ("tape", dict(variant="original", entropy_weight=0.1)),
    ("tape", dict(n_critics=0, tails="normal")),
    ("tape", dict(n_layers=1, prophet=False, moderator=False, tails="learned")),
]


def built(name, fields):
    """A model of ODD."""
    torch.manual_seed(3)
    model = models.build(name, **(SHAPE | fields)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.05 * torch.randn_like(parameter)
    model.post_optim_step()
    return model


def made(folder, name, fields, tokenizer=None):
    """A model folder with a model of ODD, which is returned."""
    model = built(name, fields)
    folder.mkdir(parents=True)
    n_parameters = sum(p.numel() for p in model.parameters())
    config = describe_model(name, None, model.config, n_parameters, tokenizer)
    write_model_folder(folder, config, tokenizer, model.state_without_ties())
    return model
