"""Checkpoints against transformers, which is the reader that they are written for."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from lilpipe.artifact import digest_file
from lilpipe.config import SamplingConfig
from lilpipe.errors import ArtifactError
from lilpipe.generation.engine import generate
from lilpipe.model.hub import MODEL_FILES, load_model, read_model_config, save_model
from lilpipe.tokenizer.chat_template import Message, render
from tests.model.checkpoints import SMALL, small_model, small_tokenizer

SHAPES = {
    "grouped heads, tied": {},
    "one key/value head": {"num_kv_heads": 1},
    "a key/value head for each query head": {"num_kv_heads": 4},
    "not tied": {"tie_embeddings": False},
}


def tokens(model, shape=(3, 40)):
    return torch.randint(0, model.vocab_size, shape, generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    directory = tmp_path_factory.mktemp("saved")
    save_model(small_model(), small_tokenizer(), directory)
    return directory


@pytest.fixture
def checkpoint(saved, tmp_path):
    """A copy to damage."""
    for name in MODEL_FILES:
        (tmp_path / name).write_bytes((saved / name).read_bytes())
    return tmp_path


def edit(checkpoint, **changes):
    path = checkpoint / "config.json"
    content = {**json.loads(path.read_text()), **changes}
    path.write_text(json.dumps({key: value for key, value in content.items() if value is not ...}))


@pytest.mark.parametrize("changes", SHAPES.values(), ids=SHAPES)
def test_transformers_gives_the_same_logits(tmp_path, changes):
    model = small_model(SMALL.model_copy(update=changes))
    save_model(model, small_tokenizer(), tmp_path)
    reference = AutoModelForCausalLM.from_pretrained(tmp_path)
    with torch.no_grad():
        expected, got = reference(tokens(model)).logits, model(tokens(model))
    assert expected.std() > 0.5
    torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("tied", [True, False])
def test_what_transformers_saves_loads_here(tmp_path, tied):
    model = small_model(SMALL.model_copy(update={"tie_embeddings": tied}))
    save_model(model, small_tokenizer(), tmp_path / "ours")
    AutoModelForCausalLM.from_pretrained(tmp_path / "ours").save_pretrained(tmp_path / "theirs")
    small_tokenizer().save(tmp_path / "theirs")
    loaded, _ = load_model(tmp_path / "theirs")
    assert loaded.config == model.config
    assert torch.equal(loaded(tokens(model)), model(tokens(model)))


def test_transformers_tokenizer_gives_the_same_ids(saved):
    reference = AutoTokenizer.from_pretrained(saved)
    tokenizer = small_tokenizer()
    text = "the thing in a 123 étude\n\n\t日本"
    assert reference(text)["input_ids"] == tokenizer.encode(text)
    messages = [Message(role="user", content=text)]
    ids = reference.apply_chat_template(messages, add_generation_prompt=True, return_dict=True)["input_ids"]
    assert ids == render(tokenizer, messages, add_generation_prompt=True)[0]


def test_greedy_answers_are_those_of_transformers_generate(saved):
    model, tokenizer = load_model(saved)
    reference = AutoModelForCausalLM.from_pretrained(saved)
    prompts = [tokenizer.encode(text) for text in ("the", "in a thing", "12 34", "x")]
    sampling = SamplingConfig(temperature=0, max_new_tokens=20)
    stop_ids = reference.generation_config.eos_token_id
    answers = generate(model, prompts, sampling=sampling, stop_ids=stop_ids, seed=0)
    for prompt, [answer] in zip(prompts, answers, strict=True):
        ids = reference.generate(  # pyright: ignore[reportAttributeAccessIssue]
            torch.tensor([prompt]), attention_mask=torch.ones(1, len(prompt)), max_new_tokens=20, do_sample=False
        )
        expected = ids[0, len(prompt) :].tolist()
        assert answer.tokens == [token for token in expected if token not in stop_ids]
        assert answer.finished == (expected[-1] in stop_ids)


def test_transformers_reads_the_special_tokens(saved):
    config = AutoModelForCausalLM.from_pretrained(saved).generation_config
    tokenizer = small_tokenizer()
    assert config.eos_token_id == [tokenizer.document_end_id, tokenizer.turn_end_id]
    assert config.bos_token_id == tokenizer.document_end_id
    assert config.pad_token_id == tokenizer.padding_id


def test_the_base_of_the_rotation_is_said_for_transformers_4_and_5(saved):
    config = json.loads((saved / "config.json").read_text())
    assert config["rope_theta"] == config["rope_parameters"]["rope_theta"] == 500.0


def test_a_model_comes_back_as_it_was(saved):
    model, tokenizer = load_model(saved)
    original = small_model()
    assert model.config == original.config
    assert not model.training
    assert tokenizer.digest == small_tokenizer().digest
    for name, tensor in original.state_dict().items():
        assert torch.equal(model.state_dict()[name], tensor), name


def test_equal_weights_give_equal_bytes_and_no_other_files(saved, tmp_path):
    save_model(small_model(), small_tokenizer(), tmp_path)
    save_model(small_model(), small_tokenizer(), tmp_path)  # over an earlier one
    assert {path.name for path in tmp_path.iterdir()} == set(MODEL_FILES)
    for name in MODEL_FILES:
        assert digest_file(tmp_path / name) == digest_file(saved / name), name


def test_a_tied_output_layer_is_stored_once(saved):
    assert "lm_head.weight" not in load_file(saved / "model.safetensors")


def test_a_directory_that_is_no_checkpoint_is_refused(tmp_path):
    with pytest.raises(ArtifactError, match=r"config\.json: cannot be read"):
        load_model(tmp_path)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "gpt2"}, r"model_type: got 'gpt2', expected 'llama'"),
        ({"model_type": ...}, r"model_type: got None, expected 'llama'"),
        ({"hidden_act": "gelu"}, r"hidden_act: got 'gelu', expected 'silu'"),
        ({"attention_bias": True}, r"attention_bias: got True, expected False"),
        ({"hidden_size": ...}, r"hidden_size: missing"),
        ({"num_attention_heads": 5}, r"hidden_size 32 must be a multiple of num_heads 5"),
        ({"head_dim": 16}, r"head_dim: got 16, expected 8"),
        ({"vocab_size": "many"}, r"vocab_size: got 'many', expected a positive whole number"),
        ({"rope_parameters": {"rope_type": "llama3", "rope_theta": 1.0}}, r"rope_type: got 'llama3'"),
        ({"rope_parameters": ..., "rope_theta": ...}, r"rope_theta: missing"),
        ({"vocab_size": 100}, r"embed_tokens\.weight: got \(270, 32\), expected \(100, 32\)"),
        ({"num_hidden_layers": 2}, r"layers\.2\..*: got \(.*\), expected nothing"),
        ({"num_hidden_layers": 4}, r"layers\.3\..*: got nothing, expected"),
        ({"tie_word_embeddings": False}, r"lm_head\.weight: got nothing, expected \(270, 32\)"),
    ],
)
def test_another_architecture_is_refused_by_file_and_key(checkpoint, changes, message):
    edit(checkpoint, **changes)
    with pytest.raises(ArtifactError, match=message) as caught:
        load_model(checkpoint)
    assert str(checkpoint) in str(caught.value)


def test_a_config_of_transformers_4_is_read(checkpoint):
    edit(checkpoint, rope_parameters=...)
    assert read_model_config(checkpoint)[0].rope_theta == 500.0


@pytest.mark.parametrize("content", [b"", b"\x80\x04K\x01.", b"\xff" * 64])
def test_weights_that_are_no_safetensors_are_refused(checkpoint, content):
    (checkpoint / "model.safetensors").write_bytes(content)
    with pytest.raises(ArtifactError, match=r"model\.safetensors: cannot be read as safetensors"):
        load_model(checkpoint)


@pytest.mark.parametrize("content", ["[]", "{", "\x00"])
def test_a_config_that_is_no_json_object_is_refused(checkpoint, content):
    (checkpoint / "config.json").write_text(content)
    with pytest.raises(ArtifactError, match=r"config\.json"):
        load_model(checkpoint)


def test_weights_of_another_precision_load_as_float32(checkpoint):
    weights = {name: tensor.bfloat16() for name, tensor in load_file(checkpoint / "model.safetensors").items()}
    save_file(weights, checkpoint / "model.safetensors", metadata={"format": "pt"})
    model, _ = load_model(checkpoint)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}


def test_a_model_smaller_than_its_tokenizers_vocabulary_is_refused(tmp_path):
    save_model(small_model(vocab_size=260), small_tokenizer(), tmp_path)
    with pytest.raises(ArtifactError, match="vocab_size: got 260, expected at least the tokenizer's 270"):
        load_model(tmp_path)
