"""What `nnx train` shows of a run before it begins: what was decided and why, and what that is going to take."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from nnx_cli import models
from nnx_cli.console.output import Output
from nnx_cli.errors import counted, quoted
from nnx_cli.planning.recipe.table import TOKENS_PER_PARAMETER
from nnx_cli.system.text import duration, listed, size

if TYPE_CHECKING:
    import torch

    from nnx_cli.commands._train_options import Request
    from nnx_cli.data.token_folder import TokenFolder
    from nnx_cli.planning.outlook import Outlook
    from nnx_cli.planning.plan import Plan
    from nnx_cli.runs.load import ModelRef

OUTLOOK = "outlook"  # where expected values come from


class PlanTable:
    """A planned run on a token folder and a device, in words; from `base`, where it begins with a model."""

    def __init__(
        self, plan: Plan, tokens: TokenFolder, device: torch.device, request: Request, base: ModelRef | None
    ) -> None:
        from nnx_cli.planning.flops import count_parameters, meta_model
        from nnx_cli.planning.outlook import outlook
        from nnx_cli.system.device import describe

        self.plan = plan
        self.tokens = tokens
        self.device = describe(device)
        self.is_for_cpu = device.type == "cpu"
        self.n_parameters = count_parameters(meta_model(plan.model, plan.model_config))["total"]
        self.why_tokenizer = _why_tokenizer(request, base, tokens, self.n_parameters)
        self.outlook: Outlook = outlook(plan, tokens, device)
        self.begins_anew = base is None

    def tell(self, output: Output) -> None:
        """The plan in a few lines of notes."""
        output.note(self._head())
        output.aligned(self._rows())
        for line in self._given_up():
            output.note(line)
        self._warn(output)

    def show(self, output: Output) -> None:
        """The plan, then every value and where it comes from, as the product."""
        output.show(self._head())
        output.aligned(self._rows(), product=True)
        output.show(*self._given_up())
        plan, expected = self.plan, self.outlook
        values = {"model": plan.model, "size": plan.size, "data": str(self.tokens.path)}
        values |= models.config_dict(plan.model_config) | asdict(plan.train)
        sources = {name: self._source(name) for name in values}
        reached = expected.reached and [round(run.bits_per_byte, 3) for run in expected.reached]
        extra = {
            "parameters": self.n_parameters,
            "expected_tokens": expected.tokens,
            "expected_epochs": round(expected.epochs, 2),
            "first_sample_s": expected.first_sample_s and round(expected.first_sample_s, 1),
            "run_folder_bytes": expected.folder_bytes,
            "such_runs_bits_per_byte": reached,
        }
        show_settings(output, values, sources, extra)
        self._warn(output)

    def _warn(self, output: Output) -> None:
        """Say that a GPU's memory was named and this is no plan for a GPU; and that a new model is so large that it is
        going to read too little, where there is a smaller size."""
        vram = self.plan.train.vram
        if vram is not None and self.is_for_cpu:
            output.note(f"this plan is for the CPU; what fits on a GPU of {vram}: nnx summarize --vram {quoted(vram)}")
        name, size, seen = self.plan.model, self.plan.size, self.outlook.tokens / self.n_parameters
        if not self.begins_anew or seen >= TOKENS_PER_PARAMETER or size not in models.sizes(name)[1:]:
            return
        smaller = "take a smaller --size" if self._source("size").startswith("derived") else "leave out --size"
        short, more = ("a text", "give it more text") if self._ends_by_text else ("a run", "train longer: --max-time")
        output.warn(
            f"size {size} is large for so short {short}: {self.outlook.tokens:,} tokens for {self.n_parameters:,} "
            f"parameters, {seen:.2g} each; {smaller}, or {more}"
        )

    @property
    def _ends_by_text(self) -> bool:
        """Whether the run is going to end before its time is up, for it has read its text as often as is of use."""
        train = self.plan.train
        if not train.max_steps or not train.max_time:
            return False
        return self.outlook.tokens >= train.max_steps * (train.tokens_per_step or 0)

    def _source(self, name: str) -> str:
        """Where a value comes from."""
        is_of_model = name in self.plan.model_config.__dataclass_fields__
        return self.plan.sources.get(name, "size" if is_of_model else "default")

    def _reason(self, name: str) -> str:
        return self._source(name).removeprefix("derived: ")

    def _head(self) -> str:
        plan = self.plan
        times = f"{len(plan.ranks)} x " if plan.ranks else ""
        return (
            f"{models.stem(plan.model)} on {times}{self.device}, {plan.train.precision}; "
            f"{len(self.tokens.train):,} tokens to train on"
        )

    def _given_up(self) -> list[str]:
        from nnx_cli.planning.parallel import unlike_note

        plan = self.plan
        savers = [f"to fit in {plan.budget_bytes / 2**30:.2f} GiB, {saver.text}" for saver in plan.savers]
        unlike = unlike_note(plan.ranks) if plan.ranks else None
        return savers if unlike is None else [unlike, *savers]

    def _rows(self) -> list[tuple[str, str, str]]:
        """What was decided, and why; then what that takes."""
        plan, train, reason = self.plan, self.plan.train, self._reason
        ends = [duration(train.max_time_s)] if train.max_time_s else []
        ends += [f"{counted(train.max_steps, 'step')} of {train.tokens_per_step:,} tokens"] if train.max_steps else []
        lengths = [reason(name) for name in ("max_time", "max_steps") if getattr(train, name)]
        kind = "unknown" if self.tokens.tokenizer is None else self.tokens.tokenizer.kind
        rate = f"{'at most ' * bool(train.warmup_steps)}{train.lr:g}, {train.schedule}"
        rate += f", {counted(train.warmup_steps, 'step')} of warm-up" if train.warmup_steps else ""
        return [
            ("size", f"{plan.size or 'of your own'}, {self.n_parameters:,} parameters", self._shape_reason()),
            ("tokenizer", f"{kind}, {self.tokens.vocab_size:,} ids", self.why_tokenizer),
            ("optimizer", str(train.optimizer), reason("optimizer")),
            ("learning rate", rate, reason("lr")),
            ("dropout", f"{plan.model_config.dropout:g}", reason("dropout")),
            ("weight decay", f"{train.weight_decay:g}", reason("weight_decay")),
            ("length", " or ".join(ends), "; ".join(dict.fromkeys(lengths))),
            *self._sequence_rows(),
            *self._outlook_rows(),
        ]

    def _sequence_rows(self) -> list[tuple[str, str, str]]:
        part, seq_len = self.plan.train.short_sequences, self.plan.model_config.seq_len
        if not part:
            return []
        value = f"of {seq_len // 2} tokens in the first {100 * part:.0f} % of the run, then of {seq_len}"
        return [("sequences", value, self._reason("short_sequences"))]

    def _shape_reason(self) -> str:
        if self.plan.size is not None:
            return self._reason("size")
        shape = self.plan.model_config.__dataclass_fields__.keys() - {"vocab_size", "seq_len", "dropout"}
        return next((self.plan.sources[name] for name in sorted(shape) if name in self.plan.sources), "your model")

    def _outlook_rows(self) -> list[tuple[str, str, str]]:
        expected = self.outlook
        by_clock = "at this device's nominal speed" if self.plan.train.max_time and not self._ends_by_text else ""
        epochs = f"{expected.epochs:.{1 if expected.epochs >= 1 else 2}f} epochs"
        rows = [("will read", f"{expected.tokens:,} tokens, {epochs}", by_clock)]
        if expected.first_sample_s is not None:
            rows.append(("first sample", f"after about {duration(expected.first_sample_s)}", ""))
        kept = counted(self.plan.train.keep, "checkpoint")
        rows.append(("run folder", f"about {size(expected.folder_bytes)}", f"{kept}, the best weights"))
        if expected.reached is not None:
            low, high = expected.reached
            bits = " to ".join(dict.fromkeys(f"{run.bits_per_byte:.2f}" for run in expected.reached))
            texts = low.text if low.text == high.text else f"{low.text} to {high.text}"
            rows.append(("reached", f"{bits} bits per byte by such runs", texts))
        return rows


def _why_tokenizer(request: Request, base: ModelRef | None, tokens: TokenFolder, n_parameters: int) -> str:
    """Where the tokenizer of a run comes from."""
    from nnx_cli.planning.recipe.tokenizer import bpe_from

    if base is not None and base.tokenizer is not None:
        return f"model: {base.label}"
    if request.data is not None:
        return "token folder"
    for name in ("tokenizer", "vocab_size"):
        if name in request.sources:
            return request.sources[name]
    if request.prepare.tokenizer != "auto":
        return "recipe: NYX"
    assert tokens.tokenizer is not None and tokens.text_bytes is not None, "it was prepared now"
    least = bpe_from(n_parameters)
    is_long = tokens.text_bytes >= least
    if is_long and tokens.tokenizer.kind == "byte":
        return "bpe is not installed"
    return f"text {'from' if is_long else 'below'} {least / 1e6:.0f} MB"


def show_settings(
    output: Output, values: Mapping[str, Any], sources: Mapping[str, str], expected: Mapping[str, Any] | None = None
) -> None:
    """Settings, their values and where each came from; with --json also what is `expected`."""
    rows = [{"setting": name, "value": value, "source": sources[name]} for name, value in values.items()]
    more = [{"setting": name, "value": value, "source": OUTLOOK} for name, value in (expected or {}).items()]
    output.show_json(rows + more)
    shown = [[row["setting"], listed(row["value"]), row["source"]] for row in rows]
    output.table(["setting", "value", "source"], shown)
