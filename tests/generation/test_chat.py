import io

import pytest
from typer.testing import CliRunner

from lilpipe.cli import app
from lilpipe.config.sampling import SamplingConfig
from lilpipe.errors import ArtifactError, ConfigError
from lilpipe.generation import chat as module
from lilpipe.generation.chat import chat, fit, text_pieces
from lilpipe.model.hub import save_model
from lilpipe.schemas.messages import Message
from lilpipe.tokenizer.chat_template import render
from tests.model.checkpoints import small_model, small_tokenizer

TOKENIZER = small_tokenizer()


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    directory = tmp_path_factory.mktemp("checkpoint")
    save_model(small_model(), TOKENIZER, directory)
    return directory


@pytest.fixture
def talk(checkpoint, monkeypatch, capsys):
    """Say lines to a model that answers with `answer`; gives the prompts that it saw and what was printed."""

    def say(text, *, answer="fine", **options):
        prompts = []

        def stream(model, prompt, **_):
            prompts.append(TOKENIZER.decode(prompt))
            yield from TOKENIZER.encode(answer)

        monkeypatch.setattr(module, "stream", stream)
        monkeypatch.setattr("sys.stdin", io.StringIO(text))
        chat(checkpoint, **options)
        return prompts, capsys.readouterr().out

    return say


def test_the_conversation_so_far_is_the_prompt(talk):
    prompts, out = talk("hi\n\n  \nand you\n")
    assert prompts == [
        "<|user|>hi<|end_of_turn|><|assistant|>",
        "<|user|>hi<|end_of_turn|><|assistant|>fine<|end_of_turn|><|user|>and you<|end_of_turn|><|assistant|>",
    ]
    assert out.count("fine\n") == 2


def test_reset_forgets_the_conversation(talk):
    prompts, _ = talk("hi\n/reset\nand you\n")
    assert prompts[1] == "<|user|>and you<|end_of_turn|><|assistant|>"


def test_what_the_model_was_told_stays_when_the_conversation_is_forgotten(talk):
    prompts, _ = talk("hi\n/reset\nand you\n", system="rhyme")
    assert prompts == [
        "<|system|>rhyme<|end_of_turn|><|user|>hi<|end_of_turn|><|assistant|>",
        "<|system|>rhyme<|end_of_turn|><|user|>and you<|end_of_turn|><|assistant|>",
    ]


def test_quit_ends_it(talk):
    assert len(talk("hi\n/quit\nmore\n")[0]) == 1


def test_a_question_that_is_too_long_is_said_and_left_out(talk):
    prompts, out = talk("x" * 100 + "\nhi\n")
    assert "too long: the context length is 64 tokens" in out
    assert prompts == ["<|user|>hi<|end_of_turn|><|assistant|>"]


def test_the_oldest_turns_are_forgotten_when_the_model_is_full():
    roles = ("user", "assistant", "user", "assistant", "user")
    messages = [Message(role=role, content="abcdefgh") for role in roles]
    whole = len(render(TOKENIZER, messages, add_generation_prompt=True)[0])
    assert fit(TOKENIZER, messages, max_tokens=whole) is not None
    assert len(messages) == 5
    prompt = fit(TOKENIZER, messages, max_tokens=whole - 1)
    assert len(messages) == 3
    assert prompt == render(TOKENIZER, messages, add_generation_prompt=True)[0]
    assert fit(TOKENIZER, messages, max_tokens=5) is None


def test_the_system_message_is_not_forgotten_with_the_oldest_turns():
    roles = ("system", "user", "assistant", "user")
    messages = [Message(role=role, content=f"{role} abcdefgh") for role in roles]
    whole = len(render(TOKENIZER, messages, add_generation_prompt=True)[0])
    assert fit(TOKENIZER, messages, max_tokens=whole - 1) is not None
    assert [message["role"] for message in messages] == ["system", "user"]
    assert fit(TOKENIZER, messages, max_tokens=5) is None


def test_an_interrupted_answer_is_kept_as_far_as_it_came(checkpoint, monkeypatch, capsys):
    def stream(model, prompt, **_):
        yield from TOKENIZER.encode("the thing")
        raise KeyboardInterrupt

    monkeypatch.setattr(module, "stream", stream)
    monkeypatch.setattr("sys.stdin", io.StringIO("hi\n"))
    chat(checkpoint)
    assert "the thing\n" in capsys.readouterr().out


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_real_model_answers_and_gives_the_same_again(checkpoint, monkeypatch, capsys, temperature):
    def say():
        monkeypatch.setattr("sys.stdin", io.StringIO("hi\nwhat\n"))
        chat(checkpoint, sampling=SamplingConfig(temperature=temperature, max_new_tokens=8))
        return capsys.readouterr().out

    assert say() == say()


@pytest.mark.parametrize("text", ["plain", "étude 日本語 🙂!", "🙂", "bad \ufffd and more", ""])
def test_a_character_is_held_back_until_its_last_byte_has_come(text):
    pieces = list(text_pieces(TOKENIZER, TOKENIZER.encode(text)))
    assert "".join(pieces) == text
    for piece in pieces:
        assert all(character in text for character in piece)


def test_bytes_that_never_become_a_character_show_at_the_end():
    pieces = list(text_pieces(TOKENIZER, [*TOKENIZER.encode("a"), 0xF0, 0x9F]))
    assert pieces[:3] == ["a", "", ""]
    assert set(pieces[3]) == {"\ufffd"}


def test_bytes_that_are_no_utf8_show_once_text_goes_on():
    pieces = list(text_pieces(TOKENIZER, [0xC3, *TOKENIZER.encode("ab")]))
    assert "".join(pieces) == "\ufffdab"


def test_a_directory_that_is_no_checkpoint_is_refused(tmp_path):
    with pytest.raises(ArtifactError, match=r"config\.json"):
        chat(tmp_path)


def test_the_command_passes_its_options_on_and_refuses_what_is_impossible(checkpoint, monkeypatch, tmp_path):
    monkeypatch.setenv("LILPIPE_STORE", str(tmp_path))
    given = []
    monkeypatch.setattr(module, "chat", lambda directory, **options: given.append((directory, options)))
    options = ["--system", "rhyme", "--temperature", "0.5", "--top-k", "3", "--min-p", "0.1", "--max-tokens", "9"]
    assert CliRunner().invoke(app, ["chat", str(checkpoint), *options]).exit_code == 0
    expected = SamplingConfig(temperature=0.5, top_k=3, min_p=0.1, max_new_tokens=9)
    assert given == [(checkpoint, {"sampling": expected, "system": "rhyme", "seed": 0})]
    refused = CliRunner().invoke(app, ["chat", str(checkpoint), "--top-p", "2"])
    assert isinstance(refused.exception, ConfigError)
    assert "chat: top_p" in str(refused.exception)
