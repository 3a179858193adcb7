"""Fields that change nothing beside the values of others, as `Config.unread` says."""

import pytest
import torch
import torch.nn.functional as F

from nnx_cli import models

# architecture, what is set beside it so that a field does nothing, so that it does something, the field with a value
CASES = [
    ("nyx", {}, {"qk_norm": True}, {"qk_norm_scale": 2.0}),
    ("nyx", {"qk_norm": True, "variant": "original"}, {"qk_norm": True}, {"qk_norm_scale": 2.0}),
    ("nyx", {"xpos": False}, {}, {"xpos_scale_base": 8.0}),
    ("neon", {}, {"decoder": "function"}, {"function_temperature": 3.0}),
    ("neon", {"decoder": "memory"}, {"decoder": "function"}, {"function_balance": 0.5}),
    ("neon", {}, {"decoder": "function"}, {"function_anneal_steps": 1}),
    (
        "neon",
        {"decoder": "function"},
        {"decoder": "function", "function_anneal_steps": 1},
        {"function_min_temperature": 0.9},
    ),
    ("neon", {"diff_attention": "off"}, {"diff_attention": "off", "diff_mlp": True}, {"paper_lambda": True}),
    ("neon", {"normalized": True}, {}, {"norm_eps": 0.5}),
    ("tape", {"variant": "sound"}, {"variant": "tape"}, {"n_critics": 1}),
    ("tape", {"variant": "original"}, {"variant": "tape"}, {"n_critics": 3}),
    ("tape", {"n_critics": 0}, {}, {"prophet": False}),
    ("tape", {"n_critics": 1}, {"n_critics": 3}, {"moderator": False}),
    ("tape", {"n_critics": 0}, {"n_critics": 1}, {"n_layers": 3}),
    ("tape", {"tails": "normal"}, {"tails": "learned"}, {"student_df": 9.0}),
]


def course(tiny, name, fields):
    """Losses of two steps."""
    model = tiny(name, **fields).train()
    ids = torch.arange(16).view(2, 8)
    losses = []
    for step in range(2):
        torch.manual_seed(step)
        loss = F.cross_entropy(model(ids).flatten(0, 1), ids.flatten())
        losses.append((loss + (model.aux_loss() or 0.0)).item())
        model.zero_grad()
        loss.backward()
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.grad is not None:
                    parameter.sub_(parameter.grad)
        model.post_optim_step()
    return losses


@pytest.mark.parametrize(("name", "idle", "live", "field"), CASES, ids=str)
def test_a_field_is_unread_where_it_changes_nothing(tiny, name, idle, live, field):
    (changed,) = field
    assert changed in tiny(name, **idle).config.unread() and changed not in tiny(name, **live).config.unread()
    assert course(tiny, name, idle) == course(tiny, name, idle | field)
    assert course(tiny, name, live) != course(tiny, name, live | field)


def test_all_of_them_are_tried():
    stated = {name: set() for name in models.names()}
    elsewhere = {"bank_file"}  # test_bank_file
    for name, idle, _, _ in CASES:
        stated[name] |= models.make_config(name, **idle).unread().keys() - elsewhere
    tried = {name: {field for other, _, _, (field,) in CASES if other == name} for name in models.names()}
    assert stated == tried
