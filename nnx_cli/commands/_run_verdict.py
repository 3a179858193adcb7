"""What `nnx train` says of a run that is over: a small table, a verdict, and what may be done next."""

from __future__ import annotations

from contextlib import suppress
from typing import TYPE_CHECKING, Any

from nnx_cli.console.output import Output
from nnx_cli.errors import CheckpointError, counted, quoted
from nnx_cli.runs.command_line import longer_command
from nnx_cli.system.text import duration, size

if TYPE_CHECKING:
    from nnx_cli.reporting.coach import Finding
    from nnx_cli.runs.run import Run
    from nnx_cli.training.trainer import Trainer

MOST = 0.5  # of the validation text, whose loss is as good as that of all
MORE_TEXT = {"overfitting", "repeated"}  # findings about runs that more steps do not help
MOST_FINDINGS = 3  # that are told at the end; the report has all


class RunVerdict:
    """A run that is over and its run.json. `named` stands beside the run in the commands that may follow,
    `ngram_bits_per_byte` is what an n-gram model gets on its text."""

    def __init__(
        self, run: Run, trainer: Trainer, status: dict[str, Any], named: str, ngram_bits_per_byte: float | None
    ) -> None:
        self.run = run
        self.trainer = trainer
        self.status = status
        self.named = named
        self.ngram_bits_per_byte = ngram_bits_per_byte
        self.findings = self._coach()

    def show(self, output: Output) -> None:
        """All of it, as the product."""
        run = self.run
        output.show(f"{run.folder}: {run.config['model']['name']} with {run.config['parameters']:,} parameters")
        output.aligned([*self._qualities(), *self._costs(), ("verdict", self._verdict(), "")], product=True)
        for finding in self.findings:
            output.show(str(finding))
        output.show(*self._next())

    def _coach(self) -> list[Finding]:
        """What the run's own numbers say should be done otherwise; nothing where they cannot be read."""
        from nnx_cli.reporting.coach import findings
        from nnx_cli.reporting.run_record import read_run

        with suppress(CheckpointError):
            return findings(read_run(self.run.folder), self.named)[:MOST_FINDINGS]
        return []

    def _qualities(self) -> list[tuple[str, str, str]]:
        """Best and last validation, and what an n-gram model gets."""
        status, step = self.status, self.trainer.state.step
        if status["best_val_loss"] is None:
            return [("best", "no validation", "")]
        best = status["best_val_bits_per_byte"]
        at = f"at step {status['best_step'] or 0:,}" + self._of_part()
        rows = [("best", _quality(status["best_val_loss"], best), at)]
        if status["best_step"] != step and status.get("val_loss") is not None:
            rows.append(("last", _quality(status["val_loss"], status.get("val_bits_per_byte")), f"at step {step:,}"))
        if self.ngram_bits_per_byte is not None and best is not None:
            percent = round(100 * (best / self.ngram_bits_per_byte - 1))
            more = f"{abs(percent)} % {'more' if percent > 0 else 'fewer'}" if percent else "as many"
            how = f"the run's best takes {more} bits"
            rows.append(("n-gram model", f"{self.ngram_bits_per_byte:.3f} bits per byte", how))
        return rows

    def _of_part(self) -> str:
        """What part of the validation text that was measured on, where it was not most of it."""
        config, trainer = self.trainer.config, self.trainer
        n = (config.val_batches or 0) * (config.batch_size or 0) * trainer.model.config.seq_len
        part = n / len(trainer.data.val) if n else 1.0
        return f", on {max(1, round(100 * part))} % of the validation text" if part < MOST else ""

    def _costs(self) -> list[tuple[str, str, str]]:
        """What it was trained on, how fast, in what memory."""
        from nnx_cli.system.device import peak_memory_bytes
        from nnx_cli.training.trainer import mfu

        trainer, state = self.trainer, self.trainer.state
        speed, peak = state.tokens / max(state.time_s, 1e-9), peak_memory_bytes(trainer.device)
        length = f"{counted(state.step, 'step')}, {state.tokens:,} tokens"
        rows = [("trained", length, f"in {duration(state.time_s)}")]
        share = mfu(trainer, speed)
        rows.append(("speed", f"{speed:,.0f} tokens/s", f"MFU {100 * share:.0f} %" if share else ""))
        return rows + ([("memory", size(peak), "peak")] if peak else [])

    def _verdict(self) -> str:
        if self.findings:
            return "it can be better:"
        if self.status["best_val_loss"] is None:
            return "nothing is known of its quality"
        from nnx_cli.reporting.coach import LATE

        was_improving = (self.status["best_step"] or 0) >= LATE * self.trainer.state.step
        return "healthy" + (", and still getting better when it ended" if was_improving else "")

    def _next(self) -> list[str]:
        """Where to read on, and commands."""
        from nnx_cli.data.conversations import template_of
        from nnx_cli.reporting.coach import MORE

        run, trainer, named = self.run, self.trainer, self.named
        ask = f"sample {quoted(run.folder)}{named}" + ' --prompt "AI is a power!"' * (
            trainer.data.tokenizer is not None
        )
        if template_of(trainer.data.tokenizer) is not None:
            ask = f"chat {quoted(run.folder)}{named}"
        lines = [f"how it went: {run.folder / 'report.html'}"] if trainer.config.report else []
        lines += [
            "next:",
            f"  nnx {ask}",
            f"  nnx eval {quoted(run.folder)}{named}",
        ]
        resume = longer_command(run.folder, trainer.state.time_s, named)
        is_told = resume in {finding.command for finding in self.findings}
        asks_for_text = any(each.rule in MORE_TEXT or MORE in each.command for each in self.findings)
        helps = self.status["ended"] != "data" and not asks_for_text
        return lines + [f"  {resume}"] * (helps and not is_told)


def _quality(loss: float, bits: float | None) -> str:
    return f"validation loss {loss:.4f}" if bits is None else f"{bits:.3f} bits per byte, validation loss {loss:.4f}"
