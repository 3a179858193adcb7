import json


def test_logs_are_cut_back_to_a_step(run):
    path = run.folder / "metrics.jsonl"
    lines = path.read_text().splitlines()
    steps = [json.loads(line)["step"] for line in lines]
    assert steps == sorted(set(steps)) and steps[-1] == 40
    with open(path, "a") as file:
        file.write("not json\n[]\n{}\n" + '{"step": 4')
    run.cut_logs(20)
    kept = [json.loads(line)["step"] for line in path.read_text().splitlines()]
    assert kept == [step for step in steps if step <= 20]


def test_numbers_that_are_not_finite_become_null(run):
    run.append("metrics.jsonl", {"step": 41, "train_loss": float("nan"), "grad_norm": float("inf"), "lr": 0.5})
    last = json.loads((run.folder / "metrics.jsonl").read_text().splitlines()[-1])
    assert last == {"step": 41, "train_loss": None, "grad_norm": None, "lr": 0.5}
