"""Models that a class of transformers computes: the oracle is that class."""

import json
import sys
from typing import Any, cast

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from lilpipe.config.backend import BackendConfig
from lilpipe.config.model import ImportModelConfig
from lilpipe.errors import ArtifactError, ConfigError
from lilpipe.model import backend, import_model
from lilpipe.model.backend import Backend
from lilpipe.model.hub import check_model, load_model, load_weights, save_model
from lilpipe.model.transformer import Transformer
from lilpipe.stage import Workspace
from lilpipe.tokenizer.encoding import Tokenizer
from tests.model.checkpoints import small_tokenizer
from tests.model.published import PUBLISHED, publish, their_model
from tests.tokenizer.foreign import write

ROWS_BT = torch.randint(3, 260, (3, 24), generator=torch.Generator().manual_seed(1))


def logprobs(model, tokens_BT):
    """The log-probability of each token after the first, by the class alone."""
    logits = model(input_ids=tokens_BT).logits[:, :-1]
    return logits.log_softmax(-1).gather(-1, tokens_BT[:, 1:, None])[..., 0]


def imported(directory, tmp_path, **settings):
    workspace = Workspace(tmp_path / "work")
    metrics = import_model.run(ImportModelConfig(path=str(directory), **settings), {}, workspace)
    return workspace, metrics


@pytest.mark.parametrize("kind", PUBLISHED)
def test_log_probabilities_and_gradients_are_those_of_the_class(kind, tmp_path):
    theirs = publish(kind, tmp_path)
    ours, _ = load_model(tmp_path)
    ours.train()
    expected = logprobs(theirs, ROWS_BT)
    got = ours(ROWS_BT[:, :-1], targets_BT=ROWS_BT[:, 1:]).logprobs
    torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(ours(ROWS_BT), theirs(ROWS_BT).logits, atol=1e-4, rtol=1e-4)
    expected.sum().backward()
    got.sum().backward()
    gradients = {f"model.network.{name}": parameter.grad for name, parameter in theirs.named_parameters()}
    for name, parameter in ours.named_parameters():
        wanted = gradients[name]
        if wanted is not None:
            torch.testing.assert_close(parameter.grad, wanted, atol=1e-3, rtol=1e-3, msg=name)


@pytest.mark.parametrize("kind", PUBLISHED)
def test_documents_of_a_row_are_computed_as_if_alone(kind, tmp_path):
    publish(kind, tmp_path)
    model, _ = load_model(tmp_path)
    documents_BT = torch.tensor([[0] * 3 + [1] * 13 + [2] * 8, [0] * 20 + [-1] * 4, [0] * 24])
    with torch.no_grad():
        for one_pass in (False, True):
            cast(Backend, model.model).one_pass = one_pass
            got = model(ROWS_BT, documents_BT=documents_BT)
            for row, ids in enumerate(documents_BT):
                for document in ids.unique().tolist():
                    if document >= 0:
                        alone = model(ROWS_BT[row, ids == document][None])[0]
                        torch.testing.assert_close(got[row, ids == document], alone, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("kind", PUBLISHED)
def test_a_saved_model_is_the_same_model_of_the_same_class(kind, tmp_path):
    theirs = publish(kind, tmp_path / "published")
    model, tokenizer = load_model(tmp_path / "published")
    save_model(model, tokenizer, tmp_path / "ours")
    found: Any = AutoModelForCausalLM.from_pretrained(tmp_path / "ours", output_loading_info=True)
    loaded, info = found
    assert type(loaded) is type(theirs)
    assert not info["missing_keys"] | info["unexpected_keys"] | info["mismatched_keys"]
    before, after = (load_file(tmp_path / name / "model.safetensors") for name in ("published", "ours"))
    assert before.keys() == after.keys()
    for name, tensor in before.items():
        assert torch.equal(after[name], tensor), name
    stated, written = (json.loads((tmp_path / name / "config.json").read_text()) for name in ("published", "ours"))
    assert written == stated | {"dtype": "float32", "torch_dtype": "float32"}


def test_weights_are_copied_into_an_initialized_model(tmp_path):
    publish("opt", tmp_path)
    config, vocab_size, _ = check_model(tmp_path)
    model = Transformer(config, vocab_size).eval()
    load_weights(dict(model.state_dict()), tmp_path)
    assert torch.equal(model(ROWS_BT), load_model(tmp_path)[0](ROWS_BT))


def test_import_keeps_the_files_and_states_the_backend(tmp_path):
    theirs = publish("opt", tmp_path / "published")
    workspace, metrics = imported(tmp_path / "published", tmp_path)
    for name in ("config.json", "model.safetensors", "tokenizer.json"):
        assert (workspace.output / name).read_bytes() == (tmp_path / "published" / name).read_bytes()
    assert json.loads((workspace.output / "origin.json").read_text()) == {"backend": "transformers"}
    assert metrics["num_parameters"] == theirs.num_parameters()
    log = (tmp_path / "work" / "events.jsonl").read_text()
    assert "OPTForCausalLM of transformers computes this model" in log


@pytest.mark.parametrize("spare", [0, 3])
def test_chatml_tokens_get_mean_embeddings(spare, tmp_path):
    tokenizer = Tokenizer.load(write("llama3", tmp_path / "published"))
    (tmp_path / "published" / "chat_template.jinja").unlink(missing_ok=True)
    before = tokenizer.vocab_size
    theirs = their_model("phi", tokenizer=tokenizer, vocab_size=before + spare)
    theirs.save_pretrained(tmp_path / "published")
    workspace, _ = imported(tmp_path / "published", tmp_path, chat_template="chatml")
    loaded = AutoModelForCausalLM.from_pretrained(workspace.output)
    assert loaded.config.vocab_size == before + max(2, spare)
    assert Tokenizer.load(workspace.output).special_ids["<|im_end|>"] == before + 1
    heads = (loaded.lm_head.weight, theirs.lm_head.weight), (loaded.lm_head.bias, theirs.lm_head.bias)
    for got, old in ((loaded.model.embed_tokens.weight, theirs.model.embed_tokens.weight), *heads):
        assert torch.equal(got[:before], old[:before])
        torch.testing.assert_close(got[[before, before + 1]], old[:before].mean(0).expand(2, *old.shape[1:]))


def test_a_model_that_is_not_causal_is_refused(tmp_path):
    directory = tmp_path / "published"
    config = {"model_type": "bert", "vocab_size": 300, "hidden_size": 32, "num_hidden_layers": 2}
    config |= {"num_attention_heads": 4, "intermediate_size": 48, "is_decoder": False}
    from transformers import BertConfig, BertLMHeadModel

    torch.manual_seed(0)
    model = BertLMHeadModel(BertConfig(**config))
    for parameter in model.parameters():
        parameter.data.mul_(8.0)
    model.save_pretrained(directory)
    small_tokenizer().save(directory)
    with pytest.raises(ArtifactError, match="BertLMHeadModel with tokens that depend on later ones"):
        imported(directory, tmp_path)


def test_code_of_a_repository_is_never_run(tmp_path):
    publish("opt", tmp_path)
    stated = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\n")
    code = {"AutoConfig": "evil.Config", "AutoModelForCausalLM": "evil.Model"}
    (tmp_path / "config.json").write_text(json.dumps({**stated, "auto_map": code}))
    load_model(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({**stated, "auto_map": code, "model_type": "evil"}))
    with pytest.raises(ArtifactError, match=r"got 'evil'.* code of its repository, which is never run"):
        load_model(tmp_path)
    assert not (tmp_path / "ran").exists()


def test_files_that_do_not_fit_the_config_are_refused(tmp_path):
    publish("opt", tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    name = "model.decoder.layers.0.fc1.weight"
    save_file({key: value for key, value in weights.items() if key != name}, tmp_path / "model.safetensors")
    with pytest.raises(ArtifactError, match=f"{name}: missing"):
        load_model(tmp_path)
    save_file({**weights, name: weights[name][:-1].clone()}, tmp_path / "model.safetensors")
    with pytest.raises(ArtifactError, match=f"{name}: of another shape"):
        load_model(tmp_path)
    save_file({**weights, name: weights[name].to(torch.int8)}, tmp_path / "model.safetensors")
    with pytest.raises(ArtifactError, match=r"got torch\.int8.* use the unquantized checkpoint"):
        load_model(tmp_path)


def test_a_class_without_a_causal_language_model_is_refused(tmp_path):
    publish("opt", tmp_path)
    stated = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**stated, "model_type": "vit"}))
    with pytest.raises(ArtifactError, match="got 'vit', which has no causal language model in transformers"):
        load_model(tmp_path)


def test_the_class_keeps_its_dropout_off_in_training(tmp_path):
    publish("opt", tmp_path)  # with a dropout of 0.5
    model, _ = load_model(tmp_path)
    assert torch.equal(model.train()(ROWS_BT), model.eval()(ROWS_BT))


def test_sizes_come_from_the_class(tmp_path):
    publish("mamba", tmp_path)
    config, vocab_size, _ = check_model(tmp_path)
    assert isinstance(config, BackendConfig)
    assert (config.num_layers, vocab_size) == (2, their_model("mamba").config.vocab_size)
    assert config.num_parameters == their_model("mamba").num_parameters()


def test_without_transformers_the_extra_is_named(tmp_path, monkeypatch):
    publish("opt", tmp_path)
    monkeypatch.setitem(sys.modules, "transformers", None)
    backend._without_weights.cache_clear()
    with pytest.raises(ConfigError, match=r"got 'opt', which the decoder does not compute.*install lilpipe\[hf\]"):
        check_model(tmp_path)
