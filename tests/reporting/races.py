"""A race as `nnx compare` writes it down, made up."""

import math

ENDS = {"nyx": 1.62, "llama": 1.634, "ngpt": 1.70}

RATES = {
    name: [{"lr": lr, "bits_per_byte": 2.5 + abs(math.log(lr / 3e-3))} for lr in (1e-3, 3e-3, 1e-2)] for name in ENDS
}


def curve(seed, end, steps=30, tokens_per_s=50_000):
    """A course of a run that ends near `end` bits per byte."""
    points = []
    for step in range(1, steps + 1):
        tokens = step * 100_000
        bits = end + 3 * math.exp(-step / 4) + 0.02 * math.sin(step + seed) / step
        points.append(
            {
                "step": step * 100,
                "tokens": tokens,
                "time_s": tokens / tokens_per_s,
                "flops": tokens * 6e7,
                "train_loss": bits * 0.69 - 0.01 * step / steps,
                "val_bits_per_byte": bits,
            }
        )
    return points


def a_run(model, seed, end, **changes):
    course = curve(seed, end)
    last = course[-1]
    return {
        "seed": seed,
        "out": f"weights/race-words/{model}-{seed}",
        "status": "finished",
        "bits_per_byte": end + 0.004 * seed,
        "tokens": last["tokens"],
        "time_s": last["time_s"],
        "flops": last["flops"],
        "peak_memory_bytes": 900 * 2**20,
        "curve": course,
        "sample": f"The {model} said: it is a tree, and the tree is old.\nSeed {seed}.",
    } | changes


def a_competitor(model, runs, **changes):
    bits = [run["bits_per_byte"] for run in runs if run["bits_per_byte"] is not None]
    mean = sum(bits) / len(bits) if bits else None
    return {
        "model": model,
        "size": "tiny",
        "config": {"dim": 384, "n_layers": 6, "n_heads": 6, "variant": "sound"}
        | ({"n_kv_heads": 2} if model == "llama" else {}),
        "parameters": 10_700_000,
        "parameters_without_tables": 10_500_000,
        "lr": 3e-3,
        "status": "finished",
        "runs": runs,
        "bits_per_byte": {"mean": mean, "stderr": 0.004 if len(bits) > 1 else None} if bits else None,
        "tokens_per_s": 50_000.0,
        "to_target": {"tokens": 1_200_000, "time_s": 24.0, "flops": 7.2e13} if bits else None,
        "ties_with": [],
    } | changes


def a_race(seeds=3, **changes):
    """A race of three with so many seeds, one that diverged and one that ran out of memory."""
    racers = [a_competitor(name, [a_run(name, s, end) for s in range(seeds)]) for name, end in ENDS.items()]
    racers[0]["ties_with"], racers[1]["ties_with"] = ["llama"], ["nyx"]
    lost = a_run("n4", 0, 4.0, status="diverged", bits_per_byte=None)
    lost["curve"] = lost["curve"][:5]
    racers.append(a_competitor("n4", [lost], status="diverged"))
    blank = dict.fromkeys(("bits_per_byte", "tokens", "time_s", "flops", "peak_memory_bytes", "sample"))
    racers.append(
        a_competitor("tape", [a_run("tape", 0, 1.0, status="out of memory", curve=[], **blank)], status="out of memory")
    )
    return {
        "format": 1,
        "versions": {"nnx": "0.1.0", "torch": "2.13.0", "python": "3.12.1"},
        "settings": {"batch_size": 32, "val_every": 100},
        "device": "CPU (2 threads)",
        "fingerprint": "ab" * 32,
        "state": "finished",
        "comparisons": 3,
        "equal": "tokens",
        "budget": 3_000_000,
        "data": "data/words",
        "tokenizer": {"kind": "byte", "vocab_size": 256},
        "parameters_counted": {"target": 10_500_000, "outside": "embedding and head"},
        "learning_rate_search": {"rates": RATES, "tokens_each": 200_000, "time_s": 75.0},
        "target_bits_per_byte": 1.9,
        "competitors": racers,
    } | changes
