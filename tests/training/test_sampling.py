import json

import numpy as np
import pytest

from nnx_cli.config import PrepareConfig
from nnx_cli.data.conversations import Message, template_of
from nnx_cli.data.prepare import prepare
from nnx_cli.data.token_folder import open_token_folder
from nnx_cli.data.tokenizers.byte import ByteTokenizer
from nnx_cli.training.sampling import choose_sampling, choose_start

LINES = "one line\nanother line of it\n" * 200
ONE_LINE = "once upon a time there was no end of a line " * 100
CHINESE = "从前有一座山山里有一座庙" * 300


def started(tmp_path, texts, tokenizer):
    """What a text begins with, decoded, and the ids, for files of these texts."""
    for number, text in enumerate(texts):
        (tmp_path / f"{number}.txt").write_text(text, encoding="utf-8", newline="")
    prepare([tmp_path], tmp_path / "out", PrepareConfig(tokenizer=tokenizer, workers=1))
    tokens = open_token_folder(tmp_path / "out")
    ids = choose_start(tokens.tokenizer, tokens.train)
    assert all((tokens.train[:-1] == token).any() for token in ids), "an id that the model is trained to go on after"
    return tokens.tokenizer.decode(ids), ids


@pytest.mark.parametrize(
    ("texts", "tokenizer", "start"),
    [
        ([LINES], "byte", "\n"),
        ([LINES], "char", "\n"),
        ([LINES], "gpt2", "\n"),
        ([LINES, LINES], "gpt2", ""),
        ([ONE_LINE], "byte", "o"),
        ([ONE_LINE], "char", "o"),
        ([ONE_LINE], "gpt2", "once"),
        ([CHINESE], "byte", "从"),
        ([CHINESE], "char", "从"),
        ([CHINESE], "gpt2", "从"),
        (["\r\n".join(LINES.split("\n"))], "byte", "\n"),
        (["🙂" * 2000], "byte", "🙂"),
    ],
)
def test_a_text_begins_with_what_the_model_is_trained_on(tmp_path, texts, tokenizer, start):
    text, ids = started(tmp_path, texts, tokenizer)
    assert text == start and (start or len(ids) == 1)


def test_an_end_that_only_stands_at_the_end_is_no_beginning():
    tokens = np.array([104, 105, 10], np.uint8)
    assert choose_start(ByteTokenizer(), tokens) == [104]
    assert choose_start(None, tokens) == [104]


def test_prompts_come_before_the_start(tokens):
    assert choose_sampling(tokens.tokenizer, tokens, "AI", 0, 7).prompt_ids == [65, 73]
    assert choose_sampling(tokens.tokenizer, tokens, None, 3, None).prompt_ids == tokens.val[:3].tolist()
    chosen = choose_sampling(tokens.tokenizer, tokens, None, 0, None)
    assert chosen.prompt_ids == chosen.start_ids == [10]


def test_a_run_knows_what_its_text_begins_with(nnx, workspace):
    (workspace / "line.txt").write_text(ONE_LINE)
    shape = ["--dim", 32, "--n-layers", 1, "--n-heads", 2, "--seq-len", 16, "--compile", "off", "--max-steps", 2]
    result = nnx("train", "--filepath", "line.txt", *shape, "--out", "run", "--tokenizer", "char")
    assert result.exit_code == 0, result.stderr
    (sample, *_) = map(json.loads, (workspace / "run" / "samples.jsonl").read_text().splitlines())
    assert sample["prompt"] == "o"
    shown = json.loads(nnx("sample", "run", "--max-new-tokens", 4, "--json").stdout)
    assert shown["prompt"] == "o" and nnx("sample", "run", "--max-new-tokens", 4).stdout.startswith("o")
    config = json.loads((workspace / "run" / "config.json").read_text())
    assert config["sampling"]["start_ids"] == config["sampling"]["prompt_ids"]


def test_a_model_of_conversations_is_asked_a_question(tmp_path):
    rows = [{"q": f"what is {n}?", "a": f"it is {n}"} for n in range(50)]
    (tmp_path / "pairs.jsonl").write_text("\n".join(map(json.dumps, rows)))
    prepare([tmp_path / "pairs.jsonl"], tmp_path / "out", PrepareConfig(prompt_key="q", answer_key="a"))
    data = open_token_folder(tmp_path / "out")
    template = template_of(data.tokenizer)
    chosen = choose_sampling(data.tokenizer, data, None, 0, None)
    assert chosen.prompt_ids[0] == template.begin_id and chosen.prompt_ids[-1] == template.role_ids["assistant"]
    assert template.spoken(chosen.prompt_ids).startswith("what is 4") and chosen.start_ids == chosen.prompt_ids
    asked = choose_sampling(data.tokenizer, data, "who?", 0, None)
    assert asked.prompt_ids == template.prompt([Message("user", "who?")])
    assert template.spoken(asked.prompt_ids) == "who?\n"
