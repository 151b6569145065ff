"""Checkpoints against transformers, which is the reader that they are written for."""

import json
from typing import Any

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard, distribute_tensor
from torch.testing._internal.distributed.fake_pg import FakeStore
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from lilpipe.config.model import ModelConfig, MoEConfig
from lilpipe.config.sampling import SamplingConfig
from lilpipe.digests import digest_file
from lilpipe.errors import ArtifactError
from lilpipe.generation.engine import generate
from lilpipe.model.hub import load_model, load_weights, model_files, read_model_config, save_model, save_tensors
from lilpipe.model.transformer import ModelPart, Transformer
from lilpipe.schemas.messages import Message
from lilpipe.tokenizer.chat_template import render
from tests.model.checkpoints import ARCHITECTURES, MLA, MOE, SMALL, small_model, small_tokenizer
from tests.model.options import of_family

MODEL_TYPES = {"Llama": "llama", "Qwen": "qwen3", "GPT": "gpt2", "GLM": "glm4_moe", "DeepSeek": "deepseek_v3"}


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
    for name in model_files(saved):
        (tmp_path / name).write_bytes((saved / name).read_bytes())
    return tmp_path


def edit(checkpoint, **changes):
    path = checkpoint / "config.json"
    content = {**json.loads(path.read_text()), **changes}
    path.write_text(json.dumps({key: value for key, value in content.items() if value is not ...}))


def logits_of(reference, tokens_BT):
    with torch.no_grad():
        return reference(tokens_BT).logits


@pytest.mark.parametrize(("name", "changes"), ARCHITECTURES.items(), ids=ARCHITECTURES)
def test_transformers_gives_the_same_logits_and_what_it_saves_loads_here(tmp_path, name, changes):
    model = small_model(SMALL.model_copy(update=changes))
    save_model(model, small_tokenizer(), tmp_path / "ours")
    loaded_with_info: Any = AutoModelForCausalLM.from_pretrained(tmp_path / "ours", output_loading_info=True)
    reference, info = loaded_with_info
    assert not any(info.values()), info  # no tensor is missing, left over or of another shape
    assert reference.config.model_type == MODEL_TYPES[name.replace("-", " ").split()[0]]
    expected = logits_of(reference, tokens(model))
    assert expected.std() > 0.5
    with torch.no_grad():
        torch.testing.assert_close(model(tokens(model)), expected, atol=1e-5, rtol=1e-5)

    reference.save_pretrained(tmp_path / "theirs", max_shard_size="20KB")
    assert len(model_files(tmp_path / "theirs")) > 4  # several shards and their index
    small_tokenizer().save(tmp_path / "theirs")
    loaded, _ = load_model(tmp_path / "theirs")
    for name, tensor in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], tensor), name


@pytest.mark.parametrize("changes", ARCHITECTURES.values(), ids=ARCHITECTURES)
def test_a_model_comes_back_as_it_was(tmp_path, changes):
    original = small_model(SMALL.model_copy(update={**changes, "dropout": 0.1}))
    save_model(original, small_tokenizer(), tmp_path)
    loaded, tokenizer = load_model(tmp_path)
    family = json.loads((tmp_path / "config.json").read_text())["model_type"]
    unused = {"architecture": family}  # what is not the model's
    if original.config.mla is not None:
        unused |= {"num_kv_heads": 4}
    elif family == "gpt2":
        unused |= {"rope_theta": 10_000.0}
    assert loaded.config == original.config.model_copy(update=unused)
    assert not loaded.training
    assert tokenizer.digest == small_tokenizer().digest
    assert loaded.state_dict().keys() == original.state_dict().keys()
    for name, tensor in original.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], tensor), name


@pytest.mark.parametrize(
    "changes",
    [
        {"logit_softcap": 5.0},
        {**of_family("gpt2"), "num_kv_heads": 4, "logit_softcap": 5.0},
        {"moe": MoEConfig(num_experts=4, n_shared_experts=0, moe_intermediate_size=24)},
        {"moe": MOE, "mla": MLA, "logit_softcap": 5.0},
    ],
    ids=["bent logits", "bent GPT-2", "no shared expert", "bent DeepSeek-V3"],
)
def test_what_no_class_computes_is_written_under_a_name_of_our_own(tmp_path, changes):
    original = small_model(SMALL.model_copy(update=changes))
    save_model(original, small_tokenizer(), tmp_path)
    with pytest.raises(ValueError, match="lilpipe"):
        AutoConfig.from_pretrained(tmp_path)
    loaded, _ = load_model(tmp_path)
    assert loaded.config == original.config
    assert torch.equal(loaded(tokens(loaded)), original(tokens(original)))


def test_deepseeks_own_order_of_rotated_rows_is_read(tmp_path):
    changes = ARCHITECTURES["DeepSeek-V3"]
    save_model(small_model(SMALL.model_copy(update=changes)), small_tokenizer(), tmp_path)
    edit(tmp_path, rope_interleave=...)  # what transformers takes for true, as DeepSeek's files mean it
    loaded, _ = load_model(tmp_path)
    reference = AutoModelForCausalLM.from_pretrained(tmp_path)
    with torch.no_grad():
        got = loaded(tokens(loaded))
    torch.testing.assert_close(got, logits_of(reference, tokens(loaded)), atol=1e-5, rtol=1e-5)


def test_gpt2_as_openai_left_it_is_read(saved, tmp_path):
    """Without the class's prefix, with the constants of attention, the width of the inner layer unsaid."""
    config = ModelConfig(
        architecture="gpt2", hidden_size=32, num_layers=2, num_heads=4, num_kv_heads=4, intermediate_size=128
    )
    model = small_model(config)
    save_model(model, small_tokenizer(), tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    bare = {name.removeprefix("transformer."): tensor for name, tensor in weights.items()}
    bare |= {f"h.{layer}.attn.bias": torch.ones(1, 1, 256, 256).tril() for layer in range(2)}
    save_file(bare, tmp_path / "model.safetensors")
    edit(tmp_path, n_inner=None, n_ctx=256, resid_pdrop=..., tie_word_embeddings=..., layer_norm_epsilon=...)
    loaded, _ = load_model(tmp_path)
    assert loaded.config == config.model_copy(update={"dropout": 0.1})
    assert torch.equal(loaded(tokens(loaded)), model(tokens(model)))


def test_a_config_of_the_first_llamas_is_read(checkpoint):
    edit(checkpoint, rope_parameters=..., rope_theta=..., num_key_value_heads=..., head_dim=None)
    config, _ = read_model_config(checkpoint)
    assert (config.rope_theta, config.num_kv_heads) == (10_000.0, config.num_heads)


def test_an_output_layer_that_is_stored_twice_is_read_once(checkpoint):
    weights = load_file(checkpoint / "model.safetensors")
    weights["lm_head.weight"] = weights["model.embed_tokens.weight"].clone()
    weights["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(4)
    save_file(weights, checkpoint / "model.safetensors")
    loaded, _ = load_model(checkpoint)
    assert torch.equal(loaded(tokens(loaded)), small_model()(tokens(loaded)))


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


def test_equal_weights_give_equal_bytes_and_no_other_files(saved, tmp_path):
    save_model(small_model(), small_tokenizer(), tmp_path)
    save_model(small_model(), small_tokenizer(), tmp_path)  # over an earlier one
    assert {path.name for path in tmp_path.iterdir()} == set(model_files(saved))
    for name in model_files(saved):
        assert digest_file(tmp_path / name) == digest_file(saved / name), name


def test_a_tied_output_layer_is_stored_once(saved):
    assert "lm_head.weight" not in load_file(saved / "model.safetensors")


def test_a_directory_that_is_no_checkpoint_is_refused(tmp_path):
    with pytest.raises(ArtifactError, match=r"config\.json: cannot be read"):
        load_model(tmp_path)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "new"}, r"model_type: got 'new', expected an architecture of the decoder or of the installed"),
        ({"model_type": ...}, r"model_type: got None, expected an architecture of"),
        ({"model_type": "mamba"}, r"backbone\.embeddings\.weight: missing, expected it from config\.json"),
        ({"model_type": "mamba", "num_hidden_layers": 10**7}, r"number of layers: got 10000000, expected 1 to 10,000"),
        ({"model_type": "gpt2"}, r"n_embd: missing"),
        ({"model_type": "qwen3"}, r"self_attn\.k_norm\.weight: got nothing, expected \(8,\)"),
        ({"model_type": "glm4_moe"}, r"n_routed_experts: missing"),
        ({"model_type": "deepseek_v3"}, r"n_group: got 8, expected 1"),
        ({"model_type": "lilpipe"}, r"model: missing"),
        ({"quantization_config": {"quant_method": "fp8"}}, r"quantization_config: got quantized weights"),
        ({"hidden_act": "foo"}, r"hidden_act: got 'foo', expected one of silu, swish, gelu"),
        ({"attention_bias": True}, r"k_proj\.bias: got nothing, expected \(16,\)"),
        ({"hidden_size": ...}, r"hidden_size: missing"),
        ({"num_attention_heads": 5, "head_dim": ...}, r"hidden_size 32 must be a multiple of num_heads 5"),
        ({"head_dim": 16}, r"k_proj\.weight: got \(16, 32\), expected \(32, 32\)"),
        ({"vocab_size": "many"}, r"vocab_size: got 'many', expected a positive integer"),
        ({"rope_parameters": {"rope_type": "llama3", "rope_theta": 1.0}}, r"rope_scaling\.factor: Field required"),
        (
            {"rope_scaling": {"type": "foo", "factor": 2}},
            r"rope_scaling\.rope_type: got 'foo', expected one of def",
        ),
        ({"rope_scaling": {"type": "linear", "factor": 2, "mrope_section": [1]}}, r"rope_scaling\.mrope_section: got"),
        ({"num_hidden_layers": 10**7}, r"number of layers: got 10000000, expected 1 to 10,000"),
        ({"vocab_size": 100}, r"vocab_size: got 100, expected at least the 270 of the tokenizer"),
        ({"vocab_size": 300}, r"embed_tokens\.weight: got \(270, 32\), expected \(300, 32\)"),
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
    with pytest.raises(ArtifactError, match="vocab_size: got 260, expected at least the 270 of the tokenizer"):
        load_model(tmp_path)


def test_bfloat16_is_written_but_for_the_routers_correction(tmp_path):
    model = small_model(SMALL.model_copy(update=ARCHITECTURES["DeepSeek-V3"]))
    save_model(model, small_tokenizer(), tmp_path, dtype=torch.bfloat16)
    weights = load_file(tmp_path / "model.safetensors")
    kept = [name for name, tensor in weights.items() if tensor.dtype == torch.float32]
    assert kept == [f"model.layers.{layer}.mlp.gate.e_score_correction_bias" for layer in (1, 2)]
    reference = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert reference.dtype == torch.bfloat16
    loaded, _ = load_model(tmp_path)
    for name, tensor in model.state_dict().items():
        rounded = tensor if name.endswith("correction_bias") else tensor.bfloat16().float()
        assert torch.equal(loaded.state_dict()[name], rounded), name


@pytest.mark.parametrize("name", ["GPT-2", "DeepSeek-V3"])
def test_shards_hold_what_one_file_holds_and_leave_nothing_else_behind(tmp_path, name):
    model = small_model(SMALL.model_copy(update=ARCHITECTURES[name]))
    directory = tmp_path / "model"

    def save(max_shard_bytes):
        tensors = ((name, tensor) for name, tensor in model.state_dict().items())  # can be gone through once
        config, vocab_size = model.config, model.vocab_size
        save_tensors(config, vocab_size, tensors, small_tokenizer(), directory, max_shard_bytes=max_shard_bytes)
        return sorted(path.name for path in directory.iterdir())

    whole = save(10**9)
    assert whole == sorted(model_files(directory))
    assert "model.safetensors" in whole
    for size in (60_000, 20_000):
        names = save(size)
        assert names == sorted(model_files(directory))
        assert "model.safetensors" not in names
        loaded, _ = load_model(directory)
        assert torch.equal(loaded(tokens(model)), model(tokens(model)))
    reference = AutoModelForCausalLM.from_pretrained(directory)
    torch.testing.assert_close(logits_of(reference, tokens(model)), model(tokens(model)), atol=1e-5, rtol=1e-5)
    assert save(10**9) == whole


def test_a_pipeline_stage_takes_its_part(saved):
    part = Transformer(SMALL, small_tokenizer().vocab_size, ModelPart(range(1, 2), first=False, last=False))
    load_weights(part.state_dict(), saved)
    whole = small_model().state_dict()
    assert part.state_dict()
    for name, tensor in part.state_dict().items():
        assert torch.equal(tensor, whole[name]), name


def test_a_process_that_holds_shards_takes_its_own(saved):
    dist.init_process_group("fake", rank=1, world_size=2, store=FakeStore())  # sends nothing, waits for nobody
    try:
        mesh = init_device_mesh("cpu", (2,))
        whole = small_model().state_dict()
        sharded = {
            name: distribute_tensor(torch.zeros_like(tensor), mesh, [Shard(0)], src_data_rank=None)
            for name, tensor in whole.items()
        }
        load_weights(sharded, saved)
        for name, tensor in whole.items():
            held = sharded[name]
            assert isinstance(held, DTensor)
            assert torch.equal(held.to_local(), tensor.chunk(2)[1]), name
    finally:
        dist.destroy_process_group()
