"""Two adapters that peft made, served at once, against peft's own answers."""

import asyncio

import httpx
import pytest
import torch
from transformers import AutoModelForCausalLM

from tests.generation.serving import TOKENIZER, serving

peft = pytest.importorskip("peft")

KINDS = {
    "A": peft.LoraConfig(r=3, lora_alpha=9, target_modules=["q_proj", "down_proj"]),
    "B": peft.LoraConfig(r=4, lora_alpha=5, use_rslora=True, target_modules="all-linear"),
}
PROMPTS = [[3, 4, 5], [90, 30, 60, 12, 8, 200, 7], [41] * 11, [250]]
NUM_TOKENS = 12


@pytest.fixture(scope="module")
def folders(checkpoint, tmp_path_factory):
    folders = {}
    for number, (name, config) in enumerate(KINDS.items()):
        model = peft.get_peft_model(AutoModelForCausalLM.from_pretrained(checkpoint), config)
        for parameter_name, parameter in model.named_parameters():
            if "lora_B" in parameter_name:
                torch.nn.init.normal_(parameter, generator=torch.Generator().manual_seed(number))
        folders[name] = tmp_path_factory.mktemp(name)
        model.save_pretrained(folders[name])
    return folders


@torch.no_grad()
def answer_of(model, prompt):
    """The most probable tokens, with their log-probabilities, until the end of a document."""
    tokens, logprobs = torch.tensor([prompt]), []
    for _ in range(NUM_TOKENS):
        best, token = model(tokens).logits[0, -1].log_softmax(dim=-1).max(dim=-1)
        tokens = torch.cat([tokens, token.view(1, 1)], dim=1)
        if token == TOKENIZER.document_end_id:
            break
        logprobs.append(best.item())
    return TOKENIZER.decode(tokens[0, len(prompt) : len(prompt) + len(logprobs)].tolist()), logprobs


def test_concurrent_requests_get_the_answers_of_peft(checkpoint, folders):
    asked = [(name, prompt) for prompt in PROMPTS for name in ("A", "tiny", "B")]
    settings = {"temperature": 0, "max_tokens": NUM_TOKENS, "logprobs": 0}

    async def ask(url):
        async with httpx.AsyncClient(base_url=url, timeout=60) as client:
            bodies = [{"model": name, "prompt": prompt, **settings} for name, prompt in asked]
            answers = await asyncio.gather(*(client.post("/v1/completions", json=body) for body in bodies))
            return [answer.json()["choices"][0] for answer in answers]

    with serving(checkpoint, adapters=folders) as (client, _):
        choices = asyncio.run(ask(client.base_url))
    models = {"tiny": AutoModelForCausalLM.from_pretrained(checkpoint)}
    for name, folder in folders.items():
        models[name] = peft.PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(checkpoint), folder)
    for (name, prompt), choice in zip(asked, choices, strict=True):
        text, logprobs = answer_of(models[name], prompt)
        assert choice["text"] == text
        assert choice["logprobs"]["token_logprobs"][: len(logprobs)] == pytest.approx(logprobs, abs=1e-4)
    texts = {name: [c["text"] for (n, _), c in zip(asked, choices, strict=True) if n == name] for name in models}
    assert texts["A"] != texts["B"] != texts["tiny"] != texts["A"]
