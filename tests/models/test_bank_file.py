"""Functions of Neon's bank in a file of the user's: what they are given, how they fail, and when the file is run."""

import hashlib
import json
import math
import re
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from nnx_cli import models
from nnx_cli.errors import FunctionError, UsageError
from nnx_cli.layers import outside_functions
from nnx_cli.layers.loss import LossModule
from nnx_cli.layers.outside_functions import OutsideFunction
from nnx_cli.layers.quantized import quantizable
from nnx_cli.planning import memory
from nnx_cli.planning.flops import count_flops, count_parameters, meta_model
from nnx_cli.runs.manifest import read_verified_config
from nnx_cli.runs.run import Run
from nnx_cli.training.stepper import Stepper

RECIPES = Path(__file__).parents[1] / "banks"
SHAPE = ["--dim", 32, "--n-layers", 2, "--n-heads", 2, "--seq-len", 32]
QUICK = ["--no-report", "--no-watch", "--val-every", 9]
BATCH = ["--batch-size", 2, "--grad-accum", 1, "--threads", 1, "--sample-every", 0]
FUNCTIONS = '''
import torch
from torch import nn

class Recent(nn.Module):
    """Learns from the last three ids and where it is."""
    context = 3

    def __init__(self, dim, vocab_size):
        super().__init__()
        self.embedding = nn.Embedding(vocab_size + 1, dim)

    def forward(self, x, input_ids, positions):
        return self.embedding(input_ids + 1).cumsum(1)[:, -1] + torch.sin(positions)[:, None]

class Wave(nn.Module):
    """Has no gradient at all, and writes into its input."""
    def forward(self, x):
        return x.mul_(3).detach().sin()

class _Part(nn.Module):
    pass
'''
MORE = dict(decoder="function", n_global_functions=2, n_layer_functions=2, bank_file="bank.py")
FAILING = """
import time
from pathlib import Path
import torch
from torch import nn

class Oracle(nn.Module):
    def forward(self, x):
        if Path("trouble").exists():
            return eval(Path("trouble").read_text())
        return x.relu()
"""


@pytest.fixture
def bank(workspace):
    """bank.py, which leaves a line in ran.txt whenever it is run."""
    own = f"\n# {workspace}: a text of its own, for a text is run once\nopen('ran.txt', 'a').write('ran ')\n"
    Path("bank.py").write_text(FUNCTIONS + own, encoding="utf-8")
    return Path("bank.py")


@pytest.fixture
def model(tiny, bank):
    """A model whose choices are spread over all its functions."""
    model = tiny("neon", **MORE)
    with torch.no_grad():
        for block in model.blocks:
            block.bank.scorer.weight.mul_(50)
    return model


def draw_ids(*shape, seed=1):
    return torch.randint(64, shape, generator=torch.Generator().manual_seed(seed))


def close(a, b, tolerance=2e-5):
    return a.shape == b.shape and (a - b).abs().max().item() <= tolerance * max(1.0, b.abs().max().item())


def train(nnx, *words, out="weights/mine"):
    line = ["train", "--model", "neon", "--decoder", "function", "--out", out, *SHAPE, *BATCH, *QUICK]
    return nnx(*line, *words)


# what a function is given and what becomes of it


def test_a_function_is_given_the_ids_that_stand_before_its_token(model):
    seen, ids = [], draw_ids(2, 5)
    model.outside[0].function.register_forward_hook(lambda _, args, kwargs, y: seen.append(kwargs), with_kwargs=True)
    model(ids)
    padded = F.pad(ids, (2, 0), value=-1)
    for given in seen:
        assert given["positions"].tolist() == [0, 1, 2, 3, 4] * 2
        assert given["input_ids"].tolist() == [padded[b, t : t + 3].tolist() for b in range(2) for t in range(5)]
    assert len(seen) == 2 and model.outside[1].asks == []


@torch.no_grad()
def test_every_token_takes_the_function_that_it_chose(model):
    model.eval()
    seen = []
    hook = model.blocks[0].bank.register_forward_hook(lambda _, args, y: seen.append((args[0], y)))
    ids = draw_ids(2, 20)
    model(ids)
    hook.remove()
    ((h, y),) = seen
    bank, (recent, wave) = model.blocks[0].bank, model.outside
    shared, own = (scores.argmax(-1) for scores in bank.scorer(h))
    assert {2, 3} < set(shared.flatten().tolist()), "or nothing is shown"
    assert torch.equal(model.selection_counts()["0/global"], shared.flatten().bincount(minlength=4))
    padded, wanted = F.pad(ids, (2, 0), value=-1), torch.zeros_like(y)
    for b in range(2):
        for t in range(20):
            one = (h[b, t, None].clone(), padded[b, t : t + 3][None], torch.tensor([t]))
            functions = [*model.functions, lambda x, i, p: recent(x, i, p), lambda x, i, p: wave(x, i, p)]
            j = shared[b, t]
            wanted[b, t] = (functions[j](one[0]) if j < 2 else functions[j](*one))[0]
            wanted[b, t] += bank.functions[own[b, t]](h[b, t])
    assert close(y, wanted)


@torch.no_grad()
def test_later_tokens_change_nothing_and_the_cache_equals_the_full_pass(model):
    model.eval()
    ids = draw_ids(2, 20)
    full, changed = model(ids), ids.clone()
    changed[:, 12:] = (changed[:, 12:] + 1) % 64
    assert torch.equal(model(changed)[:, :12], full[:, :12])
    cache = model.make_cache(2, 24)
    logits = [model(ids[:, :7], cache=cache), model(ids[:, 7:10], cache=cache)]
    logits += [model(ids[:, t : t + 1], cache=cache) for t in range(10, 20)]
    assert close(torch.cat(logits, dim=1), full)
    cache.truncate(torch.tensor([4, 11])).take(torch.tensor([1, 0])).repeat(2)
    larger = model.make_cache(5, 32)
    larger.put(torch.tensor([3, 1, 0, 4]), cache)
    lengths, rows = [4, 11, 0, 11, 4], [0, 1, 0, 1, 0]
    for t in range(3):
        new = torch.stack([ids[row, length + t] for row, length in zip(rows, lengths, strict=True)])[:, None]
        logits = model(new, cache=larger)
        assert all(close(logits[k, 0], full[row, lengths[k] + t]) for k, row in enumerate(rows))
    larger.reset()
    assert close(model(ids[[0] * 5, :3], cache=larger), full[[0] * 5, :3])


def test_a_function_without_a_gradient_still_trains_its_selection(model):
    ids = draw_ids(4, 33)
    noise = {f"{layer}/{kind}": torch.zeros(4, 33, n) for layer in "01" for kind, n in model.bank_sizes().items()}
    assert model.bank_sizes() == {"global": 4, "layer": 2}
    model.set_noise(noise)
    seen = []
    hook = model.blocks[1].bank.register_forward_hook(lambda _, args, y: seen.append((args[0], y)))
    loss, count = LossModule(model)(ids[:, :-1], ids[:, 1:])
    hook.remove()
    ((h, y),) = seen
    h.retain_grad(), y.retain_grad()
    (loss / count).backward()
    rows, dy, scorer = h.detach().flatten(0, 1), y.grad.flatten(0, 1), model.blocks[1].bank.scorer.weight
    p = (rows @ scorer.detach()[:4].T).softmax(-1).requires_grad_()
    outputs = [F.linear(rows, f.weight.detach()) for f in model.functions]
    ids = F.pad(ids[:, :-1], (2, 0), value=-1).unfold(1, 3, 1).flatten(0, 1)
    positions = torch.arange(32).repeat(4)
    outputs += [function(rows, ids, positions).detach() for function in model.outside]
    scores = rows @ scorer.detach()[:4].T
    scores.requires_grad_()
    sum(scores.softmax(-1)[:, j, None] * y for j, y in enumerate(outputs)).backward(dy)
    assert close(scorer.grad[:4], scores.grad.T @ rows, 1e-4)
    assert scorer.grad[3].abs().max() > 0 and p.shape == (128, 4)
    assert [n for n, q in model.named_parameters() if q.grad is None or not q.grad.abs().max() > 0] == []


def test_functions_alone_are_what_layers_share(tiny, bank):
    model = tiny("neon", **MORE | dict(n_global_functions=0, normalized=True))
    lengths = model.outside[0].function.embedding.weight.norm(dim=1)
    ids = draw_ids(2, 9)
    loss, _ = LossModule(model)(ids[:, :-1], ids[:, 1:])
    loss.backward()
    model.post_optim_step()
    assert model.blocks[0].bank.scorer.weight.grad.abs().max() > 0
    assert torch.equal(model.outside[0].function.embedding.weight.norm(dim=1), lengths), "not put on the sphere"
    assert close(model.eval()(ids)[:, :5], model(ids[:, :5]))


def test_compiled_blocks_ask_functions_at_every_step(tiny, bank):
    torch._dynamo.reset()
    model = tiny("neon", **MORE, n_layers=1)
    with torch.no_grad():
        model.blocks[0].bank.scorer.weight.mul_(50)
    ids, calls = draw_ids(2, 17), []
    model.outside[1].function.register_forward_hook(lambda *_: calls.append(1))

    def loss():
        torch.manual_seed(3)
        total, count = LossModule(model)(ids[:, :-1], ids[:, 1:])
        (total / count).backward()
        return (total / count).item()

    eager = loss()
    for block in model.blocks:
        block.compile(backend="aot_eager", dynamic=False)
    assert [loss(), loss()] == pytest.approx([eager] * 2, abs=1e-5) and len(calls) == 3
    assert not model.capturable


def test_it_is_planned_without_numbers(bank, tiny):
    model = meta_model("neon", tiny("neon", **MORE).config)
    plain = meta_model(
        "neon", models.make_config("neon", **MORE | dict(bank_file=None, dim=32, n_heads=2, n_layers=2, vocab_size=64))
    )
    assert count_parameters(model)["total"] - count_parameters(plain)["total"] > 65 * 32
    assert count_flops(model, 32) > 0
    assert memory.evaluation_bytes(model, 1, 64, memory.CPU) > memory.evaluation_bytes(plain, 1, 64, memory.CPU)
    bank.write_text(
        "import torch\nclass Host(torch.nn.Module):\n    def forward(self, x):\n        return x * x.sum().item()\n"
    )
    assert count_flops(meta_model("neon", model.config), 32) > 0, "what cannot be known is not counted"


def test_quantization_and_narrow_weights_leave_functions_alone(model):
    from nnx_cli.optim._groups import cast_matrices

    assert not [name for name in quantizable(model) if name.startswith("outside.")]
    cast_matrices(model, "bf16")
    assert model.outside[0].function.embedding.weight.dtype == torch.float32
    assert model.functions[0].weight.dtype == torch.bfloat16
    model.compute_dtype = torch.bfloat16
    assert model(draw_ids(1, 5)).isfinite().all()


# how it fails


# ends by itself, for a thread that never does takes the time of all tests behind it
BUSY = "import time; begun = time.monotonic()\n        while time.monotonic() < begun + 0.6: pass"


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("return x[:, :3]", r"a tensor \(.*, 3\)"),
        ("return x[None]", r"a tensor \(1, "),
        ("return x.sum()", r"a tensor \(\)"),
        ("return None", "a NoneType"),
        ("return x.tolist()", "a list"),
        ("return x / 0", "not finite"),
        ("return x.to_sparse()", "a tensor of torch.sparse_coo"),
        ("return x + 1j", "a tensor of torch.strided and torch.complex64"),
        ("return x.to('meta')", "raises NotImplementedError"),
        ("import asyncio; raise asyncio.CancelledError", "raises CancelledError"),
        ("raise KeyError('no such word')", "raises KeyError: 'no such word'"),
        ("import sys; sys.exit(3)", "raises SystemExit: 3"),
        ("return x @ torch.ones(7, 7)", "raises RuntimeError: "),
        (BUSY, "did not return within 0.2 seconds"),
        ("import time; time.sleep(2)", "did not return within 0.2 seconds"),
    ],
    ids=lambda value: value[:25],
)
def test_what_a_function_does_wrong_is_said_by_its_name(body, message, monkeypatch):
    monkeypatch.setattr(outside_functions, "SECONDS", 0.2)
    scope = {"torch": torch}
    exec(f"class Odd(torch.nn.Module):\n    def forward(self, x):\n        {body}", scope)
    function = OutsideFunction("Odd", scope["Odd"]())
    with pytest.raises(FunctionError, match=f"^Odd .*{message}"):
        function(torch.ones(4, 8), torch.zeros(4, 1).long(), torch.arange(4))
    with pytest.raises(FunctionError):
        function.check(8)
    assert OutsideFunction("Fine", torch.nn.ReLU()).check(8) is None, "the next one is asked as ever"


BACKWARD = """
class Back(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x * 2
    @staticmethod
    def backward(ctx, dy):
        {body}
class Odd(torch.nn.Module):
    def forward(self, x):
        return Back.apply(x)
"""


def odd_backward(body):
    scope = {"torch": torch}
    exec(BACKWARD.format(body=body), scope)
    h = torch.ones(4, 8, requires_grad=True)
    OutsideFunction("Odd", scope["Odd"]())(h * 3, torch.zeros(4, 1).long(), torch.arange(4)).sum().backward()
    return h.grad


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("raise KeyError('no such word')", "raises KeyError in its backward pass: 'no such word'"),
        ("return dy[:, :3]", "raises RuntimeError in its backward pass: .* invalid gradient"),
        ("import sys; sys.exit(3)", "raises SystemExit in its backward pass: 3"),
        ("import time; time.sleep(1)", "did not return within 0.2 seconds in its backward pass"),
    ],
)
def test_what_its_backward_pass_does_wrong_is_said_by_its_name(body, message, monkeypatch):
    monkeypatch.setattr(outside_functions, "SECONDS", 0.2)
    with pytest.raises(FunctionError, match=f"^Odd {message}"):
        odd_backward(body)
    assert odd_backward("return 2 * dy").unique().tolist() == [6.0], "the next one is asked as ever"


def test_what_a_function_is_given_is_its_own():
    class Writes(torch.nn.Module):
        def forward(self, x, input_ids, positions):
            return x.mul_(2) + input_ids.add_(1) + positions.add_(1)[:, None]

    h, ids, positions = torch.ones(3, 2), torch.arange(3)[:, None], torch.arange(3)
    y = OutsideFunction("Writes", Writes())(h, ids, positions)
    assert y.tolist() == [[4.0] * 2, [6.0] * 2, [8.0] * 2]
    assert h.unique().tolist() == [1.0] and ids.flatten().tolist() == positions.tolist() == [0, 1, 2]


def test_a_lack_of_memory_is_none_of_the_functions(monkeypatch):
    class Large(torch.nn.Module):
        def forward(self, x):
            raise torch.OutOfMemoryError("CUDA out of memory")

    with pytest.raises(torch.OutOfMemoryError):
        OutsideFunction("Large", Large())(torch.ones(4, 8), torch.zeros(4, 1).long(), torch.arange(4))


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("class Broken(", "bank.py is no Python: "),
        ("\0", "bank.py is no Python: "),
        ("x = 1\n", "no class that is a torch.nn.Module"),
        ("class Number(int):\n    pass\n", "no class that is a torch.nn.Module"),
        ("from torch.nn import ReLU, Module\nclass _Own(Module):\n    pass\n", "no class that is a torch.nn.Module"),
        (
            "class F(M):\n    def forward(self, x):\n        return x[:, :2]\n",
            r"F returns a tensor \(3, 2\), not one of",
        ),
        (
            "class F(M):\n    def forward(self, x, words):\n        return x\n",
            "F asks for words; a function may ask for",
        ),
        ("class F(M):\n    context = 0\n    def forward(self, x):\n        return x\n", "F has a context of 0"),
        ("class F(M):\n    context = '3'\n    def forward(self, x):\n        return x\n", "F has a context of '3'"),
        ("class F(M):\n    def __init__(self, depth):\n        pass\n", "F cannot be made: TypeError: "),
        ("class F(M):\n    pass\n", "F raises NotImplementedError: "),
        ("class F(M):\n    def forward(self, x):\n        return x\n1 / 0\n", "bank.py fails: ZeroDivisionError"),
        ("raise SystemExit(0)\nclass F(M):\n    pass\n", "bank.py fails: SystemExit"),
    ],
    ids=range(13),
)
def test_a_file_without_such_functions_is_refused(workspace, source, message):
    Path("bank.py").write_text("from torch.nn import Module as M\n" + source, encoding="utf-8")
    with pytest.raises(UsageError, match=message):
        models.build("neon", **MORE)


def test_options_that_make_no_sense_are_refused(refused, bank, text_file, token_path):
    refused(
        2,
        "cannot read --bank-file your.py",
        "summarize",
        "--model",
        "neon",
        "--decoder",
        "function",
        "--bank-file",
        "your.py",
    )
    refused(2, "--decoder function", "train", "--model", "neon", "--bank-file", bank, "--data", token_path)
    refused(2, "it belongs to neon", "summarize", "--model", "llama", "--bank-file", bank)
    Path("my.py").write_text((models.FOLDER / "neon.py").read_text(encoding="utf-8"), encoding="utf-8")
    line = ["--decoder", "function", "--bank-file", bank, "--filepath", text_file, "--max-steps", 2, *SHAPE, *BATCH]
    refused(2, "goes with nnx's own", "train", "--model", "my.py", *line)
    assert not Path("weights").exists()


@pytest.fixture
def fails(monkeypatch, workspace):
    """Lets the function of bank.py do this at the sixth step."""
    Path("bank.py").write_text(f"{FAILING}# {workspace}\n", encoding="utf-8")
    monkeypatch.setattr(outside_functions, "SECONDS", 0.5)
    take, once = Stepper.take, []

    def at_the_sixth_step(trouble):
        def taken(stepper, number, lr):
            if number == 5 and not once:
                once.append(number)
                Path("trouble").write_text(trouble)
            return take(stepper, number, lr)

        monkeypatch.setattr(Stepper, "take", taken)
        return [
            "--bank-file",
            "bank.py",
            "--max-steps",
            9,
            "--compile",
            "off",
            "--no-report",
            "--no-watch",
        ]

    return at_the_sixth_step


def test_a_run_whose_function_raises_is_saved_and_goes_on(nnx, token_path, fails):
    line = [*fails("open('no-such-word')"), "--data", token_path]
    done = train(nnx, *line)
    assert done.exit_code == 3 and "Oracle raises FileNotFoundError" in done.stderr, done.stderr
    assert "step 5 is saved" in done.stderr and "nnx train --resume weights/mine --bank-file bank.py" in done.stderr
    run = Run(Path("weights/mine"))
    assert run.status()["status"] == "interrupted" and run.newest_checkpoint()[0].step == 5
    Path("trouble").unlink()
    done = nnx("train", "--resume", "weights/mine", "--bank-file", "bank.py", "--json")
    assert done.exit_code == 0 and json.loads(done.stdout)["step"] == 9, done.stderr


def test_weights_that_moved_in_the_backward_pass_are_not_saved(nnx, token_path, fails):
    """A step that the optimizer has begun is no whole one."""
    line = fails("1 / 0")
    body = "return eval(Path('trouble').read_text()) if Path('trouble').exists() else dy"
    Path("bank.py").write_text("import torch\nfrom pathlib import Path\n" + BACKWARD.format(body=body))
    in_backward = ["--optimizer", "adamw", "--optimizer-in-backward", "--save-every", 2]
    done = train(nnx, *line, *in_backward, "--data", token_path)
    assert done.exit_code == 3 and "Odd raises ZeroDivisionError in its backward pass" in done.stderr, done.stderr
    assert "the last checkpoint is intact" in done.stderr and "--resume weights/mine --bank-file bank.py" in done.stderr
    assert Run(Path("weights/mine")).newest_checkpoint()[0].step == 4


def test_a_run_whose_function_hangs_is_saved(nnx, token_path, fails):
    done = train(nnx, *fails("time.sleep(30)"), "--data", token_path)
    assert done.exit_code == 3 and "Oracle did not return within 0.5 seconds" in done.stderr, done.stderr
    assert Run(Path("weights/mine")).newest_checkpoint()[0].step == 5


# when the file is run


def test_every_verb_knows_a_bank_that_is_named(nnx, bank, token_path):
    assert train(nnx, "--bank-file", bank, "--data", token_path, "--max-steps", 4).exit_code == 0
    described = read_verified_config(Path("weights/mine"))["model"]
    assert (described["name"], described["file"], described["bank_file"]) == ("neon", "bank.py", "bank.py")
    assert described["sha256"] == hashlib.sha256(bank.read_bytes()).hexdigest()
    assert Path("weights/mine/model.py.txt").read_bytes() == bank.read_bytes()
    Path("elsewhere").mkdir()
    moved = bank.rename("elsewhere/other.py")
    lines = [
        ["train", "--resume", "mine", "--max-steps", 6],
        ["sample", "mine", "--max-new-tokens", 3],
        ["quantize", "mine", "--max-drop", 9, "--out", "weights/small"],
        ["sample", "weights/small", "--max-new-tokens", 3],
        ["summarize", "mine"],
        [
            "train",
            "--init-from",
            "mine",
            "--lora-rank",
            2,
            "--max-steps",
            2,
            "--out",
            "weights/adapted",
            *BATCH,
            *QUICK,
        ],
        ["merge", "weights/adapted", "--out", "weights/merged"],
    ]
    for line in lines:
        done = nnx(*line, "--bank-file", moved, "--json")
        assert done.exit_code == 0, (line, done.stderr)
    Path("ran.txt").unlink()
    for line in (["sample"], ["eval"], ["quantize"], ["summarize"], ["train", "--max-steps", 9, "--resume"]):
        done = nnx(*line, "mine")
        assert done.exit_code == 5 and "--bank-file bank.py" in done.stderr, (line, done.stderr)
    moved.write_text(moved.read_text() + "# another text\n")
    done = nnx("sample", "mine", "--bank-file", moved)
    assert done.exit_code == 5 and "SHA-256 differs" in done.stderr
    Path("bank.py").write_text("open('ran.txt', 'w')\n")  # where config.json says that it was
    assert nnx("sample", "mine").exit_code == 5 and nnx("list").exit_code == 0
    assert nnx("train", "--init-from", "mine").exit_code == 5
    assert not Path("ran.txt").exists() and not list(Path("weights").rglob("*.py"))


def test_a_config_that_leaves_out_the_sha256_runs_nothing(nnx, bank, token_path):
    assert train(nnx, "--bank-file", bank, "--data", token_path, "--max-steps", 1).exit_code == 0
    Path("ran.txt").unlink()
    config = json.loads(Path("weights/mine/config.json").read_text())
    del config["model"]["file"], config["model"]["sha256"]
    Path("weights/mine/config.json").write_text(json.dumps(config))
    manifest = json.loads(Path("weights/mine/manifest.json").read_text())
    manifest["files"]["config.json"] = hashlib.sha256(Path("weights/mine/config.json").read_bytes()).hexdigest()
    Path("weights/mine/manifest.json").write_text(json.dumps(manifest))
    for words in ([], ["--bank-file", bank]):
        assert nnx("sample", "mine", *words).exit_code == 5
    assert not Path("ran.txt").exists()


# the recipes


def test_the_table_of_ngrams_says_what_followed(token_path, tokens, tiny, workspace):
    source = (RECIPES / "ngram_table.py").read_text(encoding="utf-8")
    Path("bank.py").write_text(re.sub('TEXT = ".*"', f"TEXT = {str(token_path)!r}", source), encoding="utf-8")
    model = tiny("neon", vocab_size=tokens.vocab_size, **MORE)
    (table,) = [function.function for function in model.outside]
    ids = tokens.train[:4000].tolist()
    everything = tokens.train.tolist()
    for place in (3, 100, 2500):
        before = ids[place - 3 : place]
        after = [everything[i] for i in range(3, len(everything)) if everything[i - 3 : i] == before]
        counts = sorted(((after.count(x), x) for x in set(after)), reverse=True)
        y = table(torch.zeros(1, 32), torch.tensor([before]))
        if len(counts) <= 4:
            wanted = sum(n / len(after) * table.embedding.weight[x] for n, x in counts)
            assert close(y[0], wanted)
        assert y.abs().max() > 0
    assert table(torch.zeros(1, 32), torch.tensor([[-1, -1, ids[0]]])).abs().max() == 0
    assert not [name for name in model.state_without_ties() if "share" in name or "keys" in name]


def test_a_frozen_model_stays_as_it_is(run, tiny, workspace):
    source = (RECIPES / "frozen_model.py").read_text(encoding="utf-8")
    Path("bank.py").write_text(re.sub('SMALLER = ".*"', f"SMALLER = {str(run.folder)!r}", source), encoding="utf-8")
    model = tiny("neon", vocab_size=run.config["model"]["vocab_size"], **MORE)
    (frozen,) = [function.function for function in model.outside]
    before = {name: tensor.clone() for name, tensor in frozen.smaller.state_dict().items()}
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    ids = draw_ids(2, 17) % model.config.vocab_size
    losses = []
    for _ in range(3):
        loss, count = LossModule(model.train())(ids[:, :-1], ids[:, 1:])
        (loss / count).backward()
        optimizer.step(), optimizer.zero_grad()
        losses.append((loss / count).item())
    assert all(torch.equal(before[name], tensor) for name, tensor in frozen.smaller.state_dict().items())
    assert not frozen.smaller.training and losses[0] < math.log(model.config.vocab_size) * 1.2
    x = frozen(torch.zeros(1, 32), ids[:1, :16])
    assert close(x, frozen.out(frozen.smaller.trunk(ids[:1, :16])[:, -1]))
