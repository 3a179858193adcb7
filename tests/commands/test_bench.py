import json

import pytest

QUICK = ("bench", "--size", "nano", "--seq-len", 16, "--seconds", 0.02, "--threads", 1, "--device", "cpu")


def test_json_and_no_file(nnx, workspace):
    result = nnx(*QUICK, "--batch-size", "1,2", "--compile", "off", "--json")
    found = json.loads(result.stdout)
    assert found.keys() == {"date", "device", "threads", "system", "versions", "limits", "rows"}
    assert found["limits"]["flops"]["fp32"] > 0 and found["limits"]["bytes_per_s"] > 0
    assert [(row["what"], row["batch_size"]) for row in found["rows"]] == [
        ("decoding", 1),
        ("training", 1),
        ("decoding", 2),
        ("training", 2),
    ]
    for row in found["rows"]:
        assert row["model"] == "nyx" and row["parameters"] == 787_072 and row["precision"] == "fp32"
        assert row["tokens_per_s"] > 0 and row["share"] > 0 and row["problem"] is None
    assert not list(workspace.iterdir())


def test_a_table_to_paste(nnx):
    result = nnx(*QUICK, "--batch-size", 1, "--model", "llama")
    assert "torch" in result.stdout and "TFLOP/s" in result.stdout and "GB/s" in result.stdout
    assert result.stdout.count("llama nano") == 2 and "training" in result.stdout and "decoding" in result.stdout
    assert "llama nano, fp32, batch 1" in result.stderr and "\x1b" not in result.output


def test_nothing_fits(nnx, monkeypatch):
    from nnx_cli.experiments import benchmark as bench

    monkeypatch.setattr(bench, "decoding", lambda case, *rest: case.row("decoding", problem="out of memory"))
    result = nnx(*QUICK, "--batch-size", 64, "--vram", "1.001GB")
    assert result.exit_code == 4 and "--batch-size 64 needs" in result.stderr and "does not fit" in result.stdout


@pytest.mark.parametrize(
    ("code", "message", "words"),
    [
        (2, "did you mean nyx?", ["--model", "nxy"]),
        (2, "no size 'enormous'", ["--size", "enormous"]),
        (2, "--batch-size is 'many'", ["--batch-size", "many"]),
        (2, "--batch-size is ''", ["--batch-size", ""]),
        (2, "--batch-size is 0", ["--batch-size", "1,0"]),
        (2, "--precision has no choice 'fp12'", ["--precision", "fp32,fp12"]),
        (2, "--seconds is nan", ["--seconds", "nan"]),
        (2, "--compile has no choice", ["--compile", "perhaps"]),
        (2, "no amount of memory", ["--vram", "8 apples"]),
        (7, "needs a GPU", ["--precision", "bf16"]),
    ],
)
def test_what_is_refused(refused, code, message, words):
    refused(code, message, "bench", "--device", "cpu", *words)
