import torch

from nnx_cli.optim._groups import cast_matrices, embedding_and_head, hidden_matrices, parameter_groups, split_group


def test_matrices_decay_and_vectors_do_not(tiny):
    model = tiny("llama")
    groups = parameter_groups(model, 0.1)
    decay = {id(p): group["weight_decay"] for group in groups for p in group["params"]}
    assert decay == {id(p): 0.1 if p.dim() >= 2 else 0.0 for p in model.parameters()}


def test_frozen_parameters_are_left_out(tiny):
    model = tiny("llama")
    for parameter in model.parameters():
        parameter.requires_grad_(parameter.dim() < 2)
    (group,) = parameter_groups(model, 0.1)
    assert all(p.dim() < 2 for p in group["params"]) and group["weight_decay"] == 0.0


def test_hidden_matrices_are_those_of_the_blocks_with_their_projections(tiny):
    model = tiny("llama")
    names = {p: name for name, p in model.named_parameters()}
    found = {names[p]: splits for p, splits in hidden_matrices(model).items()}
    assert len(found) == 8 and all(name.startswith("blocks.") for name in found)
    assert found["blocks.0.attention.qkv.weight"] == (32, 16, 16)
    assert found["blocks.1.mlp.down.weight"] == (32,)


def test_stored_weights_are_matrices_and_tied_ones_stay_tied(tiny):
    model = tiny("ngpt")
    cast_matrices(model, "bf16")
    assert all(p.dtype == (torch.bfloat16 if p.dim() >= 2 else torch.float32) for p in model.parameters())
    assert model.head.proj.weight is model.embedding.weight


def test_groups_are_split_with_their_options():
    a, b, c = (torch.zeros(2) for _ in range(3))
    groups = [{"params": [a, b], "weight_decay": 0.1}, {"params": [c], "weight_decay": 0.0}]
    split = split_group(groups, {b, c}, orthogonal=True)
    assert [(len(group["params"]), group["weight_decay"], "orthogonal" in group) for group in split] == [
        (1, 0.1, False),
        (1, 0.1, True),
        (1, 0.0, True),
    ]


def test_embedding_and_head_are_outside_of_the_blocks(tiny):
    model = tiny("llama")
    names = {p: name for name, p in model.named_parameters()}
    assert all(not names[p].startswith("blocks.") for p in embedding_and_head(model))
    assert model.embedding.weight in embedding_and_head(model)
