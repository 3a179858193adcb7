"""The page at `/`, in a real browser. What it shows is tested with the page that `nnx export` writes."""

import json
import time

import pytest
import torch
from reporting.hostile import HOSTILE
from serving.conftest import served

from nnx_cli.data.conversations import Message, Template, with_template
from nnx_cli.data.tokenizers.build import build_tokenizer
from nnx_cli.data.tokenizers.char import CharTokenizer
from nnx_cli.serving.access import Access
from nnx_cli.system.text import well_formed


def wait(page, condition="stopping === null", times=400):
    for _ in range(times):
        if page(condition):
            return
        time.sleep(0.02)
    raise AssertionError(f"never {condition}: {page('document.body.innerText')}")


def write(page, text, **settings):
    """Have the page write, and wait until it has."""
    for name, value in settings.items():
        page(f"part('{name.replace('_', '-')}').value = {value}; 1")
    page(f"prompt.value = {json.dumps(text)}; part('form').requestSubmit(); 1")
    wait(page)


def faults(page):
    """What a page complains of, but for streams that were read to their end: Chromium calls some of them canceled."""
    return [each for each in page.complaints if not (each.get("canceled") and each.get("type") == "Fetch")]


@pytest.mark.parametrize(("width", "scheme"), [(375, "light"), (1400, "dark")])
def test_the_page_writes_with_the_model(browser, server, width, scheme):
    with browser.open(f"{server.url}/", width, scheme=scheme) as page:
        wait(page, "model")
        write(page, "<b>The</b> cat", count=30, temperature=0)
        asked = dict(prompt="<b>The</b> cat", max_tokens=30, temperature=0, logprobs=9, return_tokens_as_token_ids=True)
        found = server.write(**asked).json["choices"][0]["logprobs"]
        ids = [int(token.removeprefix("token_id:")) for token in found["tokens"]]
        assert page("written.map((token) => token.id)") == ids
        logprobs = page("written.map((token) => Math.log(token.probability))")
        assert logprobs == pytest.approx(found["token_logprobs"], abs=1e-4)
        others = page("written[3].others.map((other) => `token_id:${other.id}`)")
        assert others == list(found["top_logprobs"][3])
        assert page("status.textContent").startswith("30 tokens") and not page("document.querySelectorAll('b').length")
        page("goOn.click(); 1")
        wait(page)
        assert page("written.length") == 60 and page("context(1).ids.length") == 74
        other = page("written[2].others[1].id")
        page("part('count').value = 5; take(2, written[2].others[1]); 1")
        wait(page)
        assert page("written.map((token) => token.id)")[:3] == [*ids[:2], other] and page("written.length") == 8
        write(page, "x" * 99, count=2, top_k=0)
        assert page("written.length") == 2 and page("context(1).ids.length") == 101, "it sees the last 32 alone"
        assert page("document.documentElement.scrollWidth <= innerWidth")
        assert set(page.requests) == {f"{server.url}/v1/completions"} and faults(page) == []


def test_it_says_why_it_cannot_write_and_stops(browser, byte_model):
    access = Access("127.0.0.1", api_key="open <sesame>")
    with served(byte_model, build_tokenizer("byte"), max_new_tokens=10**6, access=access) as server:
        page, keyless = server.ask("/"), server.ask("/v1/page")
        assert b'"tokenizer"' not in page.body and keyless.status == 401, "the vocabulary is for who has the key"
        with browser.open(f"{server.url}/") as page:
            enter = "part('key').value = {!r}; part('key').dispatchEvent(new Event('change')); 1".format
            assert "key" in page("status.textContent") and page("primary.disabled")
            page(enter("sesame"))
            page("fetch('/v1/page').then(() => 1)")
            assert page("primary.disabled")
            page(enter("open <sesame>"))
            wait(page, "model")
            page("part('count').value = 10 ** 6; part('form').requestSubmit(); 1")
            wait(page, "written.length > 5")
            page.key("Escape")
            wait(page)
            n = page("written.length")
            assert page("!goOn.disabled && primary.textContent === 'Write'")
            page("part('count').value = 4; goOn.click(); 1")
            wait(page)
            assert page("written.length") == n + 4
            page("model.headers = {}; 1")
            write(page, "a")
            assert "asks for its key" in page("status.textContent") and page("written.length") == 0
        wait(lambda condition: not server.engine.working, "free again")


def test_a_conversation_is_that_of_the_chat_completions(browser, tiny):
    tokenizer = with_template(build_tokenizer("byte"))
    model = tiny("nyx", vocab_size=tokenizer.vocab_size, seq_len=128).eval()
    with torch.no_grad():
        model.embedding.weight[128:] *= 0.1  # so that it writes whole characters
    with served(model, tokenizer) as chat_server, browser.open(f"{chat_server.url}/") as page:
        wait(page, "model")
        messages = []
        for text in ("Hi", "<i>a</i>"):
            write(page, text, count=12, temperature=0)
            messages.append(Message("user", text))
            asked = [message._asdict() for message in messages]
            said = chat_server.ask("/v1/chat/completions", {"messages": asked, "max_tokens": 12, "temperature": 0})
            answer = said.json["choices"][0]["message"]["content"]
            page("last = () => written.filter(({turn, id}) => turn === turns.at(-1) && id < 256); 1")
            ids = page("last().map(({id}) => id)")
            assert tokenizer.decode(ids) == answer and len(ids) == 12
            messages.append(Message("assistant", answer))
        assert page("text.children[2].textContent") == "<i>a</i>" and page("document.querySelector('i')") is None
        assert page("document.querySelector('#text').getAttribute('role')") == "log" and faults(page) == []


def test_hostile_text_stays_text(browser, tiny):
    """In the model's name, its vocabulary and what is asked and written."""
    hostile = "".join(HOSTILE) + "<!--</script><script>alert(1)</script>"
    tokenizer = CharTokenizer(c for c in hostile if not "\ud800" <= c <= "\udfff")
    model = tiny("llama", vocab_size=tokenizer.vocab_size).eval()
    with served(model, tokenizer, title=hostile) as server, browser.open(f"{server.url}/") as page:
        wait(page, "model")
        elements = page("document.querySelectorAll('*').length")
        write(page, hostile, count=40)
        assert page("document.querySelectorAll('*').length") == elements + 41, "the prompt and its tokens"
        asked = page(f"model.tokenizer.encode({json.dumps(hostile)})")
        assert asked == tokenizer.encode(well_formed(hostile)).tolist() and faults(page) == []


def test_an_answer_that_ends_is_told_with_its_last_token(browser, tiny):
    """Whatever else the model may have written there can be taken in its place."""
    tokenizer = with_template(build_tokenizer("byte"))
    end, model = Template(tokenizer).end_id, tiny("nyx", vocab_size=tokenizer.vocab_size).eval()
    logits = torch.arange(float(tokenizer.vocab_size)).index_fill(0, torch.tensor([end]), 999.0)
    model.head.forward = lambda states: logits.expand(*states.shape[:2], -1)
    with served(model, tokenizer) as server, browser.open(f"{server.url}/") as page:
        wait(page, "model")
        write(page, "Hi")
        assert page("written.map(({id}) => id)") == [end] and page("written[0].others.length") == 9
        assert "The answer ends here" in page("status.textContent") and page("goOn.disabled")
        write(page, "Hello")
        assert page("turns.length") == 2
