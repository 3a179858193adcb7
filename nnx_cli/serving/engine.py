"""Requests to text: a thread that decodes all that are there together, and tells each what is written for it."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from nnx_cli.config import SampleConfig
from nnx_cli.data.tokenizers.base import Tokenizer
from nnx_cli.errors import is_out_of_memory
from nnx_cli.inference.batch import Batch, Row
from nnx_cli.inference.generate import ready_to_decode
from nnx_cli.inference.text_stream import TextStream
from nnx_cli.models._base import LanguageModel

STOPPED = "the server was stopped"
OUT_OF_MEMORY = "out of memory; the requests that were being answered were dropped"


class QueueFull(Exception):
    """More requests wait than may."""


class Closed(Exception):
    """The engine answers nothing more; the message says why."""


@dataclass(frozen=True)
class Drawn:
    """A token: its log-probability before any rule, and the likeliest tokens with theirs, where they were asked for.
    `offset` is where its text begins in the answer, in characters."""

    token: int
    logprob: float
    likeliest: Sequence[tuple[int, float]]
    offset: int


@dataclass(frozen=True)
class Piece:
    """What is new of an answer: `number` is that of the answer in its job. `ended` says why it ended there: length,
    stop or eot, or `failed` with an `error`."""

    number: int
    text: str
    drawn: Sequence[Drawn] = ()
    ended: str | None = None
    error: str | None = None


@dataclass(eq=False)
class Job:
    """What a request asks for: `config.num_samples` answers to every prompt (ids, at least one each).

    `deliver` gets pieces from the engine's thread. `n_likeliest`: log-probabilities with every token, and of as many of
    the likeliest; None: none. `tells_end`: also with the token that ends an answer.
    """

    prompts: Sequence[Sequence[int]]
    config: SampleConfig
    deliver: Callable[[Piece], None]
    stops: Sequence[str] = ()
    n_likeliest: int | None = None
    tells_end: bool = False
    is_cancelled: bool = False
    n_written: int = 0  # tokens, of all answers

    @property
    def n_answers(self) -> int:
        """Answers that it asks for."""
        return len(self.prompts) * self.config.num_samples


@dataclass(eq=False)
class _Answer:
    """One of the answers to a job, on its way."""

    job: Job
    number: int
    row: Row
    stream: TextStream
    text: list[str]  # written since the last piece
    drawn: list[Drawn] = field(default_factory=list)
    n_chars: int = 0

    @classmethod
    def of(cls, job: Job, number: int, tokenizer: Tokenizer | None) -> _Answer:
        """The answer of that number, of which nothing is written."""
        n = job.config.num_samples
        text: list[str] = []
        row = Row(job.prompts[number // n], job.config, number % n, job.n_likeliest)
        return cls(job, number, row, TextStream(tokenizer, job.stops, text.append), text)

    def push(self, token: int) -> str | None:
        """Take the next token; returns why the answer ends with it, if it does."""
        offset = self.n_chars + sum(map(len, self.text)) + len(self.stream.held)
        before = len(self.stream.tokens)
        self.stream.push(token)
        self.job.n_written += 1
        if self.job.n_likeliest is not None and (len(self.stream.tokens) > before or self.job.tells_end):
            self.drawn.append(Drawn(token, self.row.logprobs[-1], self.row.likeliest[-1], offset))
        if self.stream.stop_reason is None and len(self.stream.tokens) >= self.job.config.max_new_tokens:
            self.stream.finish("length")
        return self.stream.stop_reason

    def tell(self, ended: str | None = None, error: str | None = None) -> None:
        """Deliver what is new, if anything is."""
        if self.text or ended:
            piece = Piece(self.number, "".join(self.text), tuple(self.drawn), ended, error)
            self.n_chars += len(piece.text)
            self.text.clear()
            self.drawn.clear()
            self.job.deliver(piece)


class Engine:
    """Answers jobs on a thread of its own, up to `n_rows` answers at a time and `queue` waiting."""

    def __init__(self, model: LanguageModel, tokenizer: Tokenizer | None, n_rows: int, queue: int) -> None:
        self.model = model
        self.tokenizer = tokenizer
        self.n_rows = n_rows
        self.queue = queue
        self.changed = threading.Condition()  # of what follows
        self.waiting: deque[_Answer] = deque()
        self.working: list[_Answer] = []
        self.closed: str | None = None  # why no job is taken any more
        self.thread = threading.Thread(target=self._run, name="decoding", daemon=True)

    def start(self) -> None:
        """Begin to answer."""
        self.thread.start()

    def submit(self, job: Job) -> None:
        """Have a job answered. Raises QueueFull, Closed."""
        with self.changed:
            if self.closed is not None:
                raise Closed(self.closed)
            room = self.queue + self.n_rows - len(self.working) - len(self.waiting)
            if job.n_answers > room:
                raise QueueFull
            self.waiting += [_Answer.of(job, number, self.tokenizer) for number in range(job.n_answers)]
            self.changed.notify()

    def cancel(self, job: Job) -> None:
        """Forget a job: nobody waits for it."""
        with self.changed:
            job.is_cancelled = True
            self.changed.notify()

    def close(self, why: str = STOPPED) -> None:
        """End all answers where they are, and take no more."""
        with self.changed:
            self.closed = self.closed or why
            self.changed.notify()

    def _run(self) -> None:
        """Decode until it is closed."""
        batch = Batch(self.model, self.n_rows)
        try:
            with ready_to_decode(self.model, self.n_rows):
                while (joining := self._take_in(batch)) is not None:
                    try:
                        batch.add([answer.row for answer in joining])
                        self._step(batch)
                    except (RuntimeError, MemoryError) as error:
                        if not is_out_of_memory(error):
                            raise
                        batch.clear()
                        self._fail(OUT_OF_MEMORY)
        finally:
            self.close("decoding failed")  # unless it was closed already
            ended = "length" if self.closed == STOPPED else "failed"
            self._end_all(ended, None if ended == "length" else self.closed)

    def _take_in(self, batch: Batch) -> list[_Answer] | None:
        """Drop what was cancelled; returns what may join, as far as there are rows. Waits where there is nothing to do.
        None: it was closed."""
        with self.changed:
            self.changed.wait_for(lambda: self.waiting or self.working or self.closed)
            if self.closed is not None:
                return None
            self.waiting = deque(answer for answer in self.waiting if not answer.job.is_cancelled)
            for answer in [answer for answer in self.working if answer.job.is_cancelled]:
                self._leave(batch, answer)
            joining = [self.waiting.popleft() for _ in range(min(len(self.waiting), self.n_rows - len(self.working)))]
            self.working += joining
            return joining

    def _leave(self, batch: Batch, answer: _Answer) -> None:
        batch.remove(answer.row)
        self.working.remove(answer)

    def _step(self, batch: Batch) -> None:
        """Draw a token of every answer, and tell what became of it."""
        by_row = {id(answer.row): answer for answer in self.working}
        for row, token in batch.step():
            answer = by_row[id(row)]
            ended = answer.push(token)
            if ended is not None:
                with self.changed:
                    self._leave(batch, answer)
            answer.tell(ended)

    def _fail(self, error: str) -> None:
        """End all answers that are being written with an error."""
        with self.changed:
            working, self.working = self.working, []
        for answer in working:
            answer.tell("failed", error)

    def _end_all(self, ended: str, error: str | None) -> None:
        """End everything, also what waits."""
        with self.changed:
            answers = [*self.working, *self.waiting]
            self.working, self.waiting = [], deque()
        for answer in answers:
            if error is None:
                answer.stream.finish("length")
            answer.tell(ended, error)
