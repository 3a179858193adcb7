"""Functions of a bank that are no learned maps: modules from a file of the user's, which may consult anything."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from typing import Any, Self

import torch
from torch import Tensor, nn

from nnx_cli.errors import FunctionError, is_out_of_memory
from nnx_cli.layers.function_bank import StraightThrough, matrix
from nnx_cli.layers.kv_cache import KVCache
from nnx_cli.system.time_limit import TookTooLong, Worker

SECONDS = 60.0  # that one call of a function may take
MAX_CONTEXT = 4096  # ids that a function may ask for
GIVEN = ("input_ids", "positions")  # what a function may ask for besides its input
WORKER = Worker()


class OutsideFunction(nn.Module):
    """A module of the user's, called as `function(x)` or, where its `forward` asks for them, with `input_ids` and
    `positions` too.

    x (N, D) is float32; input_ids (N, C) are the newest ids of each row's text, that of the row last and -1 before the
    text begins, C being the module's attribute `context` (1 where it has none); positions (N,) are those of the rows.
    All of it is its own. It returns (N, D). A row of a batch is a token: nothing says which others are there.
    """

    def __init__(self, name: str, function: nn.Module) -> None:
        super().__init__()
        self.name = name
        self.function = function
        parameters = [*inspect.signature(function.forward).parameters.values()][1:]
        self.asks = [each.name for each in parameters if each.name in GIVEN]
        required = [
            p.name for p in parameters if p.default is p.empty and p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)
        ]
        if odd := sorted(set(required) - set(GIVEN)):
            raise FunctionError(f"{name} asks for {odd[0]}; a function may ask for {' and '.join(GIVEN)}")
        self.context = getattr(function, "context", 1)
        if type(self.context) is not int or not 1 <= self.context <= MAX_CONTEXT:
            raise FunctionError(f"{name} has a context of {self.context!r}; it is a number from 1 to {MAX_CONTEXT:,}")

    @torch.compiler.disable
    def forward(self, h: Tensor, input_ids: Tensor, positions: Tensor) -> Tensor:
        """h (N, D), input_ids (N, C or more) and positions (N,) to (N, D). Raises FunctionError where that fails."""
        given = {"input_ids": input_ids[:, -self.context :], "positions": positions}
        asked = {name: given[name].clone() for name in self.asks}
        if h.is_meta:
            return self._planned(h, asked)
        learned = [parameter for parameter in self.function.parameters() if parameter.requires_grad]
        if torch.is_grad_enabled() and (h.requires_grad or learned):
            y: Tensor = Guarded.apply(self, asked, h, *learned)
            return y
        return self.call(h, asked)

    def call(self, h: Tensor, asked: dict[str, Tensor]) -> Tensor:
        """What the function makes of h, in time and of the right kind."""
        return self.named(partial(self._checked, h, asked), h)

    def named(self, call: Callable[[], Any], x: Tensor, where: str = "") -> Any:
        """What a call that runs the user's code on tensors like x returns; `where` is said of it. Raises FunctionError
        where it raises or takes too long. The backward pass on a GPU may take as long as it likes: a thread of autograd
        waits here, and no other computes meanwhile."""
        try:
            return call() if where and x.is_cuda else WORKER.run(_as_here(call, x), SECONDS)
        except TookTooLong:
            raise FunctionError(f"{self.name} did not return within {SECONDS:g} seconds{where}") from None
        except (FunctionError, KeyboardInterrupt):
            raise
        except BaseException as error:  # those of asyncio and sys.exit are no Exception
            if is_out_of_memory(error):
                raise
            raise FunctionError(f"{self.name} raises {type(error).__name__}{where}: {error}") from error

    def _checked(self, h: Tensor, asked: dict[str, Tensor]) -> Tensor:
        y = self.function(h.float() if h.dtype != torch.float32 else h.clone(), **asked)
        odd = None
        if not isinstance(y, Tensor):
            odd = f"a {type(y).__name__}"
        elif y.shape != h.shape:
            odd = f"a tensor {tuple(y.shape)}"
        elif y.layout != torch.strided or y.is_complex():
            odd = f"a tensor of {y.layout} and {y.dtype}"
        if odd:
            raise FunctionError(f"{self.name} returns {odd}, not one of {tuple(h.shape)} like its input")
        y = y.to(h.device, h.dtype)
        if not y.isfinite().all():
            raise FunctionError(f"{self.name} returns elements that are not finite")
        return y

    def _planned(self, h: Tensor, asked: dict[str, Tensor]) -> Tensor:
        """The output's shape for a plan; what a function does without tensors' values, or cannot do without them, is
        not counted."""
        tensors = [*self.function.named_parameters(), *self.function.named_buffers()]
        try:
            torch.func.functional_call(self.function, {name: t.to("meta") for name, t in tensors}, (h.clone(),), asked)
        except Exception:  # the user's code, which needs numbers
            return torch.empty_like(h)
        return torch.empty_like(h)

    def check(self, dim: int) -> None:
        """Raises FunctionError where the function fails on three tokens with id 0."""
        input_ids = torch.full((3, self.context), -1)
        input_ids[:, -1] = 0
        with torch.no_grad():
            self(torch.zeros(3, dim), input_ids, torch.arange(3))


class Guarded(torch.autograd.Function):
    """A function whose backward pass fails by its name too."""

    @staticmethod
    def forward(
        ctx: Any, function: OutsideFunction, asked: dict[str, Tensor], h: Tensor, *learned: nn.Parameter
    ) -> Tensor:
        """The function's output for h (N, D); `learned` are its parameters."""
        ctx.function, ctx.given = function, (h.detach().requires_grad_(), *learned)
        with torch.enable_grad():
            ctx.y = function.call(ctx.given[0], asked)
        return ctx.y.detach()

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        """Gradients of h and of the parameters; None where the function has none."""
        y, ctx.y = ctx.y, None
        if not y.requires_grad:
            return None, None, *(None for _ in ctx.given)
        call = partial(torch.autograd.grad, y, ctx.given, dy, allow_unused=True)
        return None, None, *ctx.function.named(call, dy, " in its backward pass")


def _as_here(call: Callable[[], Any], x: Tensor) -> Callable[[], Any]:
    """A call that runs on another thread as it would on this one, on tensors like x."""
    with_grad, is_inference, n_threads = (
        torch.is_grad_enabled(),
        torch.is_inference_mode_enabled(),
        torch.get_num_threads(),
    )
    stream = torch.cuda.current_stream(x.device) if x.is_cuda else None

    def called() -> Any:
        if torch.get_num_threads() != n_threads:
            torch.set_num_threads(n_threads)
        with ExitStack() as modes:
            if stream is not None:
                modes.enter_context(torch.cuda.stream(stream))
            modes.enter_context(torch.inference_mode(is_inference))
            modes.enter_context(torch.set_grad_enabled(with_grad))
            return call()

    return called


@dataclass(frozen=True)
class Outside:
    """The functions from outside in one pass: they follow the learned ones that all layers share."""

    functions: Sequence[OutsideFunction]
    input_ids: Tensor  # (N, C)
    positions: Tensor  # (N,)

    def apply(self, h: Tensor, p: Tensor, choice: Tensor, learned: nn.ModuleList, dense: bool) -> Tensor:
        """Every row of h (N, D) through the function it chose: `dense` as `StraightThrough` does, with a gradient for
        p (N, n), else each function sees its own rows only."""
        if dense or h.is_meta:  # who chose what has no meaning there
            return self._dense(h, p, choice, learned)
        return self._dispatch(h, choice, learned)

    def _dense(self, h: Tensor, p: Tensor, choice: Tensor, learned: nn.ModuleList) -> Tensor:
        n = len(learned)
        y = StraightThrough.apply(h, p[:, :n], choice, *map(matrix, learned)) if n else torch.zeros_like(h)
        for j, function in enumerate(self.functions, n):
            taken = (choice == j) + p[:, j] - p[:, j].detach()
            y = y + taken[:, None].to(h.dtype) * function(h, self.input_ids, self.positions)
        return y

    def _dispatch(self, h: Tensor, choice: Tensor, learned: nn.ModuleList) -> Tensor:
        y = torch.zeros_like(h)
        for j in choice.unique().tolist():  # synchronizes
            rows = (choice == j).nonzero()[:, 0]
            if j < len(learned):
                y[rows] = learned[j](h[rows])
            else:
                function = self.functions[j - len(learned)]
                y[rows] = function(h[rows], self.input_ids[rows], self.positions[rows])
        return y


class TokenCache(KVCache):
    """A KVCache that keeps the ids too, for functions that ask for those before."""

    def __init__(self, shape: tuple[int, int, int, int, int], device: torch.device, dtype: torch.dtype) -> None:
        super().__init__(shape, device, dtype)
        self.ids = torch.full((shape[1], shape[3]), -1, device=device)

    def contexts(self, input_ids: Tensor, length: int) -> Tensor:
        """The `length` newest ids at each of the new positions whose ids are (B, T): (B, T, length), -1 before the
        text begins."""
        positions = self.positions(input_ids.shape[1]).expand(input_ids.shape)
        self.ids.scatter_(1, positions, input_ids)
        index = positions[..., None] - torch.arange(length - 1, -1, -1, device=positions.device)
        found = self.ids.gather(1, index.clamp(min=0).flatten(1)).view_as(index)
        return found.masked_fill(index < 0, -1)

    def repeat(self, n: int) -> Self:
        """As in the base."""
        self.ids = self.ids.repeat_interleave(n, dim=0)
        return super().repeat(n)

    def take(self, rows: Tensor) -> Self:
        """As in the base."""
        self.ids = self.ids[rows]
        return super().take(rows)

    def put(self, rows: Tensor, other: Self) -> Self:
        """As in the base."""
        self.ids[rows, : other.max_seq_len] = other.ids
        return super().put(rows, other)

    @property
    def n_bytes(self) -> int:
        """As in the base."""
        return super().n_bytes + self.ids.nbytes


def contexts_of(input_ids: Tensor, length: int, cache: KVCache | None) -> tuple[Tensor, Tensor]:
    """The `length` newest ids at each token of `input_ids` (B, T), (N, length), and the tokens' positions, (N,)."""
    B, T = input_ids.shape
    if isinstance(cache, TokenCache):
        found, positions = cache.contexts(input_ids, length), cache.positions(T).expand(B, T)
    else:
        found = nn.functional.pad(input_ids, (length - 1, 0), value=-1).unfold(1, length, 1)
        positions = torch.arange(T, device=input_ids.device).expand(B, T)
    return found.flatten(0, 1), positions.flatten()
