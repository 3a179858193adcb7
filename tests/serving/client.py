"""A client of the standard library's, which shows all of an answer."""

import http.client
import json
from dataclasses import dataclass, field
from typing import Any


@dataclass
class Answer:
    status: int
    headers: dict
    body: bytes

    @property
    def json(self) -> Any:
        return json.loads(self.body)

    @property
    def events(self) -> list:
        """What a stream brought, without its end."""
        lines = self.body.decode().split("\n\n")
        assert lines[-2:] == ["data: [DONE]", ""], lines[-3:]
        return [json.loads(line.removeprefix("data: ")) for line in lines[:-2]]


@dataclass
class Client:
    host: str
    port: int
    engine: Any = None
    headers: dict = field(default_factory=dict)

    @property
    def url(self) -> str:
        return f"http://{self.host}:{self.port}"

    def ask(self, path, body=None, method=None, **headers) -> Answer:
        """The answer to a request; `body` is bytes, or what JSON is made of."""
        connection = http.client.HTTPConnection(self.host, self.port, timeout=60)
        if body is not None and not isinstance(body, bytes):
            body = json.dumps(body).encode()
        sent = {name.replace("_", "-"): value for name, value in (self.headers | headers).items()}
        connection.request(method or ("GET" if body is None else "POST"), path, body, sent)
        response = connection.getresponse()
        answer = Answer(response.status, dict(response.getheaders()), response.read())
        connection.close()
        return answer

    def write(self, **asked) -> Answer:
        return self.ask("/v1/completions", asked)
