"""What requests and answers look like: those of OpenAI's completions and chat completions."""

from __future__ import annotations

import time
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, StrictBool, StrictInt, StrictStr

from nnx_cli.config import SampleConfig
from nnx_cli.data.tokenizers.base import Tokenizer
from nnx_cli.serving.engine import Drawn, Piece

MOST_ANSWERS, MOST_STOPS, MOST_STOP_CHARS, MOST_LIKELIEST = 128, 16, 1000, 20
ENDED = {"length": "length", "stop": "stop", "eot": "stop"}  # our reasons in the words of the protocol
MOST_SEED = 2**63 - 1

Texts = StrictStr | list[StrictStr]


class Refused(Exception):
    """A request that is answered with an error; `param` is the field that is wrong, if it is one."""

    def __init__(
        self, status: int, message: str, param: str | None = None, headers: Mapping[str, str] | None = None
    ) -> None:
        super().__init__(message)
        self.status = status
        self.param = param
        self.headers = headers


class StreamOptions(BaseModel):
    """Of an answer that comes in pieces."""

    model_config = ConfigDict(extra="forbid")
    include_usage: StrictBool = False


class Sampling(BaseModel):
    """What both kinds of request say of how to draw. A field that is not known is refused, for it would do nothing."""

    model_config = ConfigDict(extra="forbid")
    model: StrictStr | None = None
    user: StrictStr | None = None  # whose request it is: nothing depends on that
    max_tokens: StrictInt | None = Field(None, ge=1)
    n: StrictInt | None = Field(None, ge=1, le=MOST_ANSWERS)
    stop: Texts | None = None
    stream: StrictBool | None = None
    stream_options: StreamOptions | None = None
    seed: StrictInt | None = Field(None, ge=0, le=MOST_SEED)
    temperature: float | None = Field(None, ge=0.0, le=2.0)
    top_p: float | None = Field(None, gt=0.0, le=1.0)
    top_k: StrictInt | None = Field(None, ge=1, le=2**24)
    min_p: float | None = Field(None, ge=0.0, le=1.0)
    repetition_penalty: float | None = Field(None, gt=0.0, le=100.0)
    return_tokens_as_token_ids: StrictBool | None = None  # in logprobs "token_id:N", also for what ends an answer

    def stops(self) -> list[str]:
        """The texts that an answer ends before. Raises Refused."""
        stops = [self.stop] if isinstance(self.stop, str) else self.stop or []
        if len(stops) > MOST_STOPS or any(len(stop) > MOST_STOP_CHARS for stop in stops):
            raise Refused(422, f"stop: up to {MOST_STOPS} texts of up to {MOST_STOP_CHARS:,} characters", "stop")
        return stops

    def config(self, default_tokens: int) -> SampleConfig:
        """The same as settings of ours. Without a seed every request draws anew."""
        seed = uuid.uuid4().int % MOST_SEED if self.seed is None else self.seed
        temperature = 1.0 if self.temperature is None else self.temperature
        penalty = 1.0 if self.repetition_penalty is None else self.repetition_penalty
        return SampleConfig(
            max_new_tokens=self.max_tokens or default_tokens,
            num_samples=self.n or 1,
            temperature=temperature,
            top_k=self.top_k,
            top_p=self.top_p,
            min_p=self.min_p,
            repetition_penalty=penalty,
            greedy=temperature == 0.0,
            seed=seed,
        )


class CompletionRequest(Sampling):
    """Text, texts or ids that are to be continued."""

    prompt: StrictStr | list[StrictStr] | list[StrictInt] | list[list[StrictInt]] = ""
    logprobs: StrictInt | None = Field(None, ge=0, le=MOST_LIKELIEST)


class ChatMessage(BaseModel):
    """What one side said."""

    model_config = ConfigDict(extra="forbid")
    role: Literal["system", "user", "assistant"]
    content: StrictStr
    name: StrictStr | None = None


class ChatRequest(Sampling):
    """A conversation that the assistant is to go on with."""

    messages: list[ChatMessage] = Field(min_length=1)
    max_completion_tokens: StrictInt | None = Field(None, ge=1)
    logprobs: StrictBool | None = None
    top_logprobs: StrictInt | None = Field(None, ge=0, le=MOST_LIKELIEST)

    def n_likeliest(self) -> int | None:
        """Likeliest tokens that are told with every token; None where none are asked for. Raises Refused."""
        if self.top_logprobs is not None and not self.logprobs:
            raise Refused(422, "top_logprobs needs logprobs: true", "top_logprobs")
        return self.top_logprobs or 0 if self.logprobs else None


def error_body(status: int, message: str, param: str | None = None) -> dict[str, Any]:
    """An error as clients of the protocol read it, with the field of the request that is wrong."""
    kind = "invalid_request_error" if status < 500 else "server_error"
    return {"error": {"message": message, "type": kind, "param": param, "code": status}}


@dataclass(frozen=True)
class Form:
    """How the answers to one request are written: text to be continued, or a chat."""

    model: str
    tokenizer: Tokenizer | None
    is_chat: bool
    has_logprobs: bool
    has_ids: bool  # in the place of tokens
    made: int
    name: str

    @classmethod
    def of(cls, model: str, tokenizer: Tokenizer | None, asked: Sampling, has_logprobs: bool) -> Form:
        """The form of the answer to a request that comes now."""
        is_chat, has_ids = isinstance(asked, ChatRequest), bool(asked.return_tokens_as_token_ids)
        name = f"{'chatcmpl' if is_chat else 'cmpl'}-{uuid.uuid4().hex}"
        return cls(model, tokenizer, is_chat, has_logprobs, has_ids, int(time.time()), name)

    def head(self, is_streamed: bool) -> dict[str, Any]:
        """What every object begins with."""
        kind = "text_completion" if not self.is_chat else f"chat.completion{'.chunk' * is_streamed}"
        return {"id": self.name, "object": kind, "created": self.made, "model": self.model}

    def whole(self, answers: Sequence[Sequence[Piece]], usage: Mapping[str, int]) -> dict[str, Any]:
        """All answers at once, each from its pieces."""
        choices = []
        for number, pieces in enumerate(answers):
            text, ended = "".join(piece.text for piece in pieces), ENDED[str(pieces[-1].ended)]
            drawn = [token for piece in pieces for token in piece.drawn]
            said = {"message": {"role": "assistant", "content": text}} if self.is_chat else {"text": text}
            choices.append({"index": number, **said, "logprobs": self._logprobs(drawn), "finish_reason": ended})
        return {**self.head(False), "choices": choices, "usage": usage}

    def opening(self, number: int) -> dict[str, Any]:
        """The first event of an answer in a chat."""
        delta = {"role": "assistant", "content": ""}
        return {**self.head(True), "choices": [{"index": number, "delta": delta, "finish_reason": None}]}

    def event(self, piece: Piece) -> dict[str, Any]:
        """A piece of an answer."""
        ended = None if piece.ended is None else ENDED[piece.ended]
        said = {"delta": {"content": piece.text} if piece.text else {}} if self.is_chat else {"text": piece.text}
        logprobs = self._logprobs(piece.drawn) if piece.drawn else None
        choice = {"index": piece.number, **said, "logprobs": logprobs, "finish_reason": ended}
        return {**self.head(True), "choices": [choice]}

    def usage(self, usage: Mapping[str, int]) -> dict[str, Any]:
        """The last event, where it is asked for."""
        return {**self.head(True), "choices": [], "usage": usage}

    def _logprobs(self, drawn: Sequence[Drawn]) -> dict[str, Any] | None:
        if not self.has_logprobs:
            return None
        if self.is_chat:
            return {"content": [self._told(each) for each in drawn], "refusal": None}
        return {
            "tokens": [self._text(each.token) for each in drawn],
            "token_logprobs": [each.logprob for each in drawn],
            "top_logprobs": [{self._text(token): value for token, value in each.likeliest} for each in drawn],
            "text_offset": [each.offset for each in drawn],
        }

    def _told(self, drawn: Drawn) -> dict[str, Any]:
        """A token as chats tell it."""
        likeliest = [self._entry(token, value) for token, value in drawn.likeliest]
        return {**self._entry(drawn.token, drawn.logprob), "top_logprobs": likeliest}

    def _entry(self, token: int, logprob: float) -> dict[str, Any]:
        content = list(self._bytes(token))
        return {"token": self._text(token), "logprob": logprob, "bytes": content}

    def _bytes(self, token: int) -> bytes:
        return f"{token} ".encode() if self.tokenizer is None else self.tokenizer.tokens[token]

    def _text(self, token: int) -> str:
        """A token as text; one that is no whole character, or a special one, by its bytes or name."""
        if self.has_ids:
            return f"token_id:{token}"
        content = self._bytes(token)
        if self.tokenizer is not None and not content:
            names = (name for name, own in self.tokenizer.specials.items() if own == token)
            return next(names, f"<|{token}|>")
        try:
            return content.decode()
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in content)
