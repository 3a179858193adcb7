import json
import os
import random
from pathlib import Path

import pytest
from bench.answers import different, share_answered, write_rows
from console.terminal import NOT_OF_A_TERMINAL, Terminal

from nnx_cli.commands._chat_session import ChatSession
from nnx_cli.config import SampleConfig
from nnx_cli.console.output import Output
from nnx_cli.data.conversations import Message, with_template
from nnx_cli.data.tokenizers.byte import ByteTokenizer
from nnx_cli.inference.chat import Chat, Reply
from nnx_cli.runs.load import ModelRef

TALK = ["--max-steps", 2, "--batch-size", 2, "--grad-accum", 2, "--device", "cpu", "--compile", "off"]
KEYS = {"/set", "/show", "/reset", "/retry", "/undo", "/save", "/help", "/quit"}
needs_terminals = pytest.mark.skipif(os.name == "nt", reason="needs pseudo-terminals")


@pytest.fixture
def talk(nnx, run, workspace):
    """The run words, trained on a few conversations."""
    rows = [{"q": f"behind {n}?", "a": f"{n + 1}"} for n in range(60)]
    (workspace / "chats.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n")
    words = ["--filepath", "chats.jsonl", "--prompt-key", "q", "--answer-key", "a", "--out", "weights/talk", *TALK]
    done = nnx("train", "--init-from", "words", *words)
    assert done.exit_code == 0, done.stderr
    return "talk"


@pytest.fixture
def session(tiny, capsys):
    """A chat with an untrained model of conversations, or without a template."""

    def make(talks=True, **settings):
        tokenizer = with_template(ByteTokenizer()) if talks else ByteTokenizer()
        model = tiny("llama", vocab_size=tokenizer.vocab_size, seq_len=128)
        config = SampleConfig(**({"max_new_tokens": 12} | settings))
        return ChatSession(Output(), Chat(model, tokenizer, [10]), config, [])

    return make


def lines(*words):
    return "\n".join(words) + "\n"


def test_a_model_of_conversations_is_asked_by_its_template(nnx, talk):
    asked = lines("behind 7?", "and 8?")
    found = nnx("chat", talk, "--seed", 3, "--json", input=asked)
    assert found.exit_code == 0, found.stderr
    product = json.loads(found.stdout)
    assert product["template"] is True and product["model"] == "weights/talk"
    assert [m["role"] for m in product["messages"]] == ["user", "assistant"] * 2
    assert [m["content"] for m in product["messages"]][::2] == ["behind 7?", "and 8?"]
    again = json.loads(nnx("chat", talk, "--seed", 3, "--json", input=asked).stdout)
    assert again == product, "the same seed, the same chat"
    assert json.loads(nnx("chat", talk, "--seed", 4, "--json", input=asked).stdout) != product


def test_a_base_model_goes_on_with_a_text(nnx, run):
    found = nnx("chat", "words", "--greedy", "--max-new-tokens", 20, input=lines("the cat", ""))
    assert found.exit_code == 0, found.stderr
    whole = nnx("sample", "words", "--greedy", "--max-new-tokens", 40, "--prompt", "the cat").stdout
    assert found.stdout.replace("\n", "") == whole.removeprefix("the cat").replace("\n", ""), "Enter alone goes on"
    refused = nnx("chat", "words", "--system", "be kind", input="")
    assert refused.exit_code == 2 and "was trained on no conversations" in refused.stderr


@pytest.mark.parametrize(
    ("words", "why"),
    [
        (["--greedy", "--top-k", 3], "--top-k does nothing with --greedy"),
        (["--temperature", -1], "temperature"),
        (["--num-samples", 2], "No such option"),
        (["--system", ""], "without text"),
    ],
)
def test_bad_options(nnx, run, words, why):
    found = nnx("chat", "words", *words, input="")
    assert found.exit_code == 2 and why in found.stderr


def test_a_model_of_bare_ids_is_refused(nnx, run, monkeypatch):
    monkeypatch.setattr(ModelRef, "tokenizer", None)
    found = nnx("chat", "words", input="hi\n")
    assert found.exit_code == 2 and "has no tokenizer" in found.stderr


def test_commands_of_a_chat(session, tmp_path, capsys):
    chat = session()
    for line in ("behind 7?", "and 8?", "/undo", "/set temperature 1.5", "/set greedy on", "/set stop \\n"):
        assert chat.take(line)
    assert len(chat.chat.messages) == 2 and chat.config.temperature == 1.5 and chat.config.greedy
    assert chat.stops == ["\n"]
    assert chat.take("/set greedy") and not chat.config.greedy, "without a value its default"
    assert chat.take("/set system be kind") and chat.chat.conversation[0] == Message("system", "be kind")
    capsys.readouterr()
    assert chat.take("/show") and chat.take("/help")
    shown = capsys.readouterr().err
    assert "temperature         1.5" in shown and "system              be kind" in shown
    assert "2 messages" in shown and "of 128 tokens" in shown and all(key in shown for key in KEYS)
    path = tmp_path / "a talk.jsonl"
    assert chat.take(f"/save '{path}'")
    saved = json.loads(path.read_text(encoding="utf-8"))["messages"]
    assert [m["role"] for m in saved] == ["system", "user", "assistant"]
    assert chat.take("/reset") and not chat.chat.messages
    assert not chat.take("/quit")


def test_a_retry_says_something_else_and_is_one_exchange(session):
    chat = session(max_new_tokens=40)
    chat.take("hi")
    before = chat.chat.messages[-1].content
    chat.take("/retry")
    assert len(chat.chat.messages) == 2 and chat.chat.messages[0].content == "hi"
    assert chat.chat.messages[-1].content != before


@pytest.mark.parametrize(
    ("line", "why"),
    [
        ("/undo", "nothing was said yet"),
        ("/retry", "nothing was said yet"),
        ("/sho", "there is no /sho; did you mean show?"),
        ("/", "there is no /"),
        ("/set top-k many", "top-k is a number, not 'many'"),
        ("/set top-k -1", "top-k"),
        ("/set temperature nan", "temperature"),
        ("/set greedy perhaps", "greedy is on or off"),
        ("/set warmth 1", "there is no setting 'warmth'"),
        ("/set num-samples 2", "there is no setting 'num-samples'"),
        ("/set", "there is no setting ''"),
        ("/save", "takes the name of a file"),
        ("/save ''", "takes the name of a file"),
        ("/save .", "exists already"),
        ("/save nowhere/a.jsonl", "cannot write"),
    ],
)
def test_what_a_chat_refuses_ends_nothing(session, capsys, workspace, line, why):
    chat = session()
    before = chat.config
    assert chat.take(line) and chat.config == before
    assert why in capsys.readouterr().err


def test_a_slash_can_be_said_and_nothing_is_said_with_blanks(session):
    chat = session()
    chat.take("//help me")
    chat.take("   ")
    assert [m.content for m in chat.chat.messages[:1]] == ["/help me"] and len(chat.chat.messages) == 2


def test_the_oldest_exchanges_are_forgotten_first(session, capsys):
    chat = session(max_new_tokens=10)
    chat.chat.system = "S"
    chat.chat.messages = [Message(r, f"{n}{r}" * 4) for n in range(4) for r in ("user", "assistant")]
    chat.take("what now?")
    assert "messages are beyond its context)" in capsys.readouterr().err and len(chat.chat.messages) == 10
    ids, forgotten = chat.chat.prompt_ids(10)
    text = chat.chat.template.spoken(ids)
    assert len(ids) <= 118 and text.startswith("S\n") and "what now?" in text and forgotten % 2 == 0
    chat.take("x" * 500)
    assert len(chat.chat.messages) == 12, "one message longer than the context: the model sees its end"


def test_control_characters_of_a_reply_are_shown_escaped(session, capsys, monkeypatch):
    chat = session()

    def say(said, config, stops, on_text, should_stop):
        on_text("\x1b[2Jred")
        return Reply("\x1b[2Jred", "eot", 3, 1.0, 0)

    monkeypatch.setattr(chat.chat, "say", say)
    chat.take("hi")
    assert capsys.readouterr().out == "\\x1b[2Jred\n"


def test_a_reply_ended_before_its_first_word_is_none(session, monkeypatch):
    chat = session().chat
    reply = chat.say("hi", SampleConfig(max_new_tokens=50), should_stop=lambda: True)
    assert reply.stop_reason == "interrupted"
    assert len(chat.messages) == (2 if reply.text else 0)
    monkeypatch.setattr("nnx_cli.inference.chat.generate", lambda *a, **b: 1 / 0)
    n = len(chat.messages)
    with pytest.raises(ZeroDivisionError):
        chat.say("hi", SampleConfig())
    assert len(chat.messages) == n


# what is learned


def test_a_small_model_answers_questions_that_it_has_not_seen(nnx, workspace):
    """In a few steps; what a nano model learns in a minute, tests/bench/answers.py shows."""
    draw = random.Random(0)
    learned = different(draw, 4000, {})
    write_rows(learned, workspace / "qa.jsonl")
    shape = "--dim 64 --n-layers 2 --n-heads 2 --seq-len 128 --lr 0.02 --max-steps 280".split()
    words = ["--filepath", "qa.jsonl", *shape, "--threads", 1, "--device", "cpu", "--sample-every", 0, "--no-report"]
    done = nnx("train", *words, "--out", "weights/qa")
    assert done.exit_code == 0, done.stderr
    assert share_answered("qa", different(draw, 100, learned)) >= 0.9


# at a terminal


class ChatTerminal(Terminal):
    """`nnx chat` at a terminal, forked from a process with torch in it, where some modules are not installed."""

    def __init__(self, words, hidden):
        self.hidden = hidden
        super().__init__(["chat", *words], 100, 30, echoes=True, PROMPT_TOOLKIT_NO_CPR="1")

    def start(self, command, variables):
        from tests.reliability.processes import Command, Setting, Surroundings

        change = Surroundings(variables, NOT_OF_A_TERMINAL, self.hidden)
        self.command = Command(Path.cwd(), *command, setting=Setting(terminal=os.ttyname(self.theirs), change=change))
        return self.command.process

    def is_over(self):
        return not self.command.running()

    def wait(self, seconds=20):
        return self.command.wait(seconds)


@pytest.fixture(params=["readline", "prompt_toolkit", "plain"])
def at_terminal(request):
    """Starts `nnx chat` at a terminal, with a library to edit lines or without."""
    if request.param == "prompt_toolkit":
        pytest.importorskip("prompt_toolkit", reason="an extra: pip install 'nnx-cli[chat]'")
    opened = []
    hidden = {"readline": ("prompt_toolkit",), "prompt_toolkit": (), "plain": ("prompt_toolkit", "readline")}

    def begin(*words):
        opened.append(ChatTerminal(words, hidden[request.param]))
        return opened[-1]

    yield begin
    for terminal in opened:
        terminal.close()


def says(words):
    """Whether that stands on the screen, and the prompt below it waits for a line."""
    return lambda text: words in text and text.rstrip().split("\n")[-1].strip() == ">"


@needs_terminals
def test_a_chat_at_a_terminal(at_terminal, run):
    terminal = at_terminal("words", "--max-new-tokens", "100000", "--device", "cpu")
    shown = terminal.read(says("Ctrl-D the chat"), 60)
    assert any("it continues text" in line for line in shown)
    before = len(terminal.written)
    terminal.type("the cat\r")
    for _ in range(200):  # until there is an answer, which goes on
        terminal.read(seconds=0.1)
        if len(terminal.written) > before + 200:
            break
    terminal.type("\x03")
    assert "(ended by Ctrl-C)" in "\n".join(terminal.read(says("(ended by Ctrl-C)"), 6))
    terminal.type("/show\r")
    assert "2 messages" in "\n".join(terminal.read(says("tokens of context"), 20))
    terminal.type("half a li")
    terminal.read(lambda text: "half a li" in text, 10)
    terminal.type("\x03")
    assert "(Ctrl-D or /quit" in "\n".join(terminal.read(says("(Ctrl-D or /quit ends the chat)"), 10))
    terminal.type("\x04")
    assert terminal.wait(20) == 0


@needs_terminals
def test_lines_are_edited_and_remembered(at_terminal, talk, request):
    if "plain" in request.node.name:
        pytest.skip("without a library there is nothing to edit with")
    terminal = at_terminal("talk", "--max-new-tokens", "5", "--device", "cpu")
    assert "was trained on conversations" in "\n".join(terminal.read(says("Ctrl-D the chat"), 60))
    terminal.type("/set seed 57\x7f\r")  # a backspace
    assert "seed is 5\n" in "\n".join(terminal.read(says("seed is 5"), 10))
    terminal.type("\x1b[A\x7f6\r")  # the line before, changed
    assert "seed is 6\n" in "\n".join(terminal.read(says("seed is 6"), 10))
    terminal.type("/quit\r")
    assert terminal.wait(20) == 0
