"""The client of OpenAI."""

import pytest


@pytest.fixture
def openai():
    return pytest.importorskip("openai", reason="the client of OpenAI is not installed")


def test_completions_of_the_openai_client(openai, server):
    client = openai.OpenAI(base_url=f"{server.url}/v1", api_key="any")
    asked = dict(model="tiny", prompt="The cat", max_tokens=24, seed=2, n=2, logprobs=2, user="me")
    whole = client.completions.create(**asked)
    assert [choice.finish_reason for choice in whole.choices] == ["length"] * 2
    assert all(len(choice.logprobs.tokens) == 24 for choice in whole.choices) and whole.usage.completion_tokens == 48
    texts = ["", ""]
    for chunk in client.completions.create(**asked, stream=True):
        for choice in chunk.choices:
            texts[choice.index] += choice.text
    assert texts == [choice.text for choice in whole.choices]
    assert [model.id for model in client.models.list()] == ["tiny"]
    stopped = client.completions.create(model="tiny", prompt="a", max_tokens=500, seed=1, stop=["e"])
    assert "e" not in stopped.choices[0].text


def test_errors_of_the_openai_client(openai, server):
    client = openai.OpenAI(base_url=f"{server.url}/v1", api_key="any", max_retries=0)
    with pytest.raises(openai.UnprocessableEntityError, match="max_tokens is 10,000,000"):
        client.completions.create(model="tiny", prompt="a", max_tokens=10_000_000)
    with pytest.raises(openai.NotFoundError, match="no model"):
        client.completions.create(model="gpt-4", prompt="a")
    with pytest.raises(openai.APIStatusError) as error:
        client.completions.create(model="tiny", prompt="a" * 10_000_000)
    assert error.value.status_code == 413


def test_chats_of_the_openai_client(openai, chat_server):
    client = openai.OpenAI(base_url=f"{chat_server.url}/v1", api_key="any")
    asked = dict(model="tiny", messages=[{"role": "user", "content": "Hi"}], max_completion_tokens=20, seed=4)
    whole = client.chat.completions.create(**asked, logprobs=True, top_logprobs=3)
    content = whole.choices[0].message.content
    assert len(whole.choices[0].logprobs.content[0].top_logprobs) == 3
    chunks = list(client.chat.completions.create(**asked, stream=True, stream_options={"include_usage": True}))
    assert "".join(c.choices[0].delta.content or "" for c in chunks if c.choices) == content
    assert chunks[0].choices[0].delta.role == "assistant" and chunks[-1].usage.completion_tokens <= 20
