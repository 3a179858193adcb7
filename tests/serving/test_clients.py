"""Clients that people use: OpenAI's own, and a browser."""

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


def wait_until(page, expression, times=200):
    import time

    for _ in range(times):
        if page(expression):
            return
        time.sleep(0.05)
    raise AssertionError(f"never {expression}: {page('document.body.innerText')}")


def faults(page):
    """What a page complains of, but for streams that were read to their end: Chromium calls some of them canceled."""
    return [each for each in page.complaints if not (each.get("canceled") and each.get("type") == "Fetch")]


@pytest.mark.parametrize(("width", "scheme"), [(375, "light"), (1400, "dark")])
def test_the_page_writes_with_the_model(browser, server, width, scheme):
    with browser.open(f"{server.url}/", width, scheme=scheme) as page:
        wait_until(page, "document.title == 'tiny'")
        page("part('text').value = '<b>The</b> cat'; part('tokens').value = 30; part('temperature').value = 0; 1")
        page("part('form').requestSubmit(); 1")
        wait_until(page, "!part('write').disabled && part('text').value.length > 14")
        greedy = server.write(prompt="<b>The</b> cat", max_tokens=30, temperature=0).json["choices"][0]["text"]
        assert page("part('text').value") == "<b>The</b> cat" + greedy.replace("\r\n", "\n").replace("\r", "\n")
        assert page("part('state').textContent") == "" and page("document.querySelectorAll('b').length") == 0
        assert page("document.documentElement.scrollWidth <= innerWidth")
        page("part('tokens').value = 10 ** 7; part('form').requestSubmit(); 1")
        wait_until(page, "part('state').textContent.includes('up to 1,000')")
        assert [url.removeprefix(server.url) for url in page.requests] == [
            "/page.css",
            "/page.js",
            "/health",
            "/v1/completions",
            "/v1/completions",
        ]
        assert not [each for each in faults(page) if "422" not in str(each)]


def test_the_page_stops(browser, byte_model):
    from serving.conftest import served

    from nnx_cli.data.tokenizers.build import build_tokenizer

    with served(byte_model, build_tokenizer("byte"), max_new_tokens=10**6) as server:
        with browser.open(f"{server.url}/") as page:
            wait_until(page, "document.title == 'tiny'")
            page("part('tokens').value = 10 ** 6; part('form').requestSubmit(); 1")
            wait_until(page, "part('text').value.length > 5")
            page("part('stop').click(); 1")
            wait_until(page, "part('state').textContent == 'stopped' && !part('write').disabled")
        for _ in range(200):
            if not server.engine.working:
                break
            __import__("time").sleep(0.05)
        assert not server.engine.working


def test_the_page_holds_a_conversation(browser, chat_server):
    with browser.open(f"{chat_server.url}/") as page:
        wait_until(page, "document.title == 'tiny' && isChat")
        for number, text in enumerate(("Hi", "<i>more</i>"), start=1):
            page(f"part('text').value = '{text}'; part('tokens').value = 12; part('form').requestSubmit(); 1")
            wait_until(page, f"!part('write').disabled && part('log').children.length == {2 * number}")
        assert page("[...part('log').children].map(e => e.className).join()") == "user,assistant,user,assistant"
        assert page("part('log').children[2].textContent") == "<i>more</i>"
        assert page("part('state').textContent") == "" and faults(page) == []
