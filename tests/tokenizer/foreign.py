"""Tokenizers from elsewhere, in the styles of published families, made here by Hugging Face's own library."""

import json
import random
import tempfile
from pathlib import Path

from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers, processors, trainers
from tokenizers import Tokenizer as Library

from lilpipe.tokenizer.encoding import Tokenizer
from lilpipe.tokenizer.patterns import PATTERNS
from lilpipe.tokenizer.vocabulary import to_hugging_face
from tests.tokenizer.conftest import PROSE

SENTENCES = [
    *PROSE,
    "the theory of the thing is thinner than the other thing, 1234567 and 20.5%",
    "naïve café l'été, they're there's don't I'LL",
    "for i in range(10):\n        if i % 2 == 0:\n            print(i)\n",
    "<html><body class='x'>&amp;</body></html>\n\n\n\n",
]
CL100K = PATTERNS["gpt4"]


def with_special_tokens(ranks, pattern, special, *, document_end, template=None, names=None):
    """A byte-level vocabulary with other special tokens than ours, and perhaps a chat template."""
    ids = [(len(ranks) + index, name) for index, name in enumerate(special)]
    stated = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": document_end, **(names or {})}
    with tempfile.TemporaryDirectory() as directory:
        folder = Path(directory)
        (folder / "tokenizer.json").write_text(json.dumps(to_hugging_face(ranks, pattern, ids)))
        (folder / "tokenizer_config.json").write_text(json.dumps(stated))
        (folder / "document_end.json").write_text(json.dumps({"document_end": document_end}))
        if template is not None:
            (folder / "chat_template.jinja").write_text(template)
        return Tokenizer.load(folder)


# --- families -----------------------------------------------------------------------------------------------------


def byte_level(pre_tokenizer=None, *, normalizer=None, size=400):
    """Byte-level BPE after the pre-tokenizer, by default GPT-2's."""
    library = Library(models.BPE())
    if normalizer is not None:
        library.normalizer = normalizer
    library.pre_tokenizer = pre_tokenizer or pre_tokenizers.ByteLevel(add_prefix_space=False)
    library.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=size, initial_alphabet=alphabet, show_progress=False)
    library.train_from_iterator(SENTENCES * 3, trainer)
    return library


def after(*steps):
    return pre_tokenizers.Sequence([*steps, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])


def split(pattern, behavior="isolated"):
    return pre_tokenizers.Split(Regex(pattern), behavior)


def gpt2():
    library = byte_level()
    library.post_processor = processors.ByteLevel(trim_offsets=False)
    library.add_special_tokens(["<|endoftext|>"])
    return library, {"eos_token": "<|endoftext|>", "bos_token": "<|endoftext|>"}


def llama3():
    """Merges of every pair, ids in another order than the merges, whole pieces first, a token before each text."""
    library = byte_level(after(split(CL100K)))
    content = json.loads(library.to_str())
    ids = content["model"]["vocab"]
    numbers = list(ids.values())
    random.Random(0).shuffle(numbers)
    content["model"]["vocab"] = dict(zip(ids, numbers, strict=True))
    content["model"]["ignore_merges"] = True
    library = Library.from_str(json.dumps(content))
    library.add_special_tokens(["<|begin_of_text|>", "<|end_of_text|>", "<|start_header_id|>", "<|end_header_id|>"])
    library.add_special_tokens(["<|eot_id|>", "<|python_tag|>"])
    begin = library.token_to_id("<|begin_of_text|>")
    template = processors.TemplateProcessing(
        single="<|begin_of_text|> $A", pair="<|begin_of_text|> $A $B", special_tokens=[("<|begin_of_text|>", begin)]
    )
    library.post_processor = processors.Sequence([processors.ByteLevel(trim_offsets=True), template])
    return library, {"bos_token": "<|begin_of_text|>", "eos_token": "<|end_of_text|>"}


def qwen():
    """NFC, single digits, and tokens for thinking that are not special."""
    pattern = CL100K.replace(r"\p{N}{1,3}", r"\p{N}")
    library = byte_level(after(split(pattern)), normalizer=normalizers.NFC())
    library.add_special_tokens(["<|endoftext|>", "<|im_start|>", "<|im_end|>"])
    library.add_tokens([AddedToken(name, normalized=False) for name in ("<think>", "</think>", "<tool_call>")])
    return library, {"eos_token": "<|endoftext|>", "pad_token": "<|endoftext|>", "add_bos_token": False}


def smollm2():
    library = byte_level(
        pre_tokenizers.Sequence(
            [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
        )
    )
    content = json.loads(library.to_str())  # special tokens come first
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<repo_name>"]
    vocab = {name: number + len(special) for name, number in content["model"]["vocab"].items()}
    content["model"]["vocab"] = {**{name: index for index, name in enumerate(special)}, **vocab}
    library = Library.from_str(json.dumps(content))
    library.add_special_tokens(special)
    return library, {"bos_token": "<|im_start|>", "eos_token": "<|im_end|>", "unk_token": "<|endoftext|>"}


def deepseek():
    """Several splits; the settings ask for a token before each text, the post-processor does not."""
    letters = r"\s?[A-Za-zµÀ-ÖØ-öø-ƺƼ-ƿǄ-ʓʕ-ʯͰ-ͳͶͷͻ-ͽͿΆΈ-ΊΌΎ-ΡΣ-ϵϷ-ҁҊ-ԯԱ-Ֆ]+"
    steps = [split(r"[\r\n]"), split(letters), split(r"\s?[!-/:-~！-／：-～‘-‟　-。]+"), split(r"\s+$")]
    steps += [split(r"[一-龥ࠀ-一가-퟿]+"), pre_tokenizers.Digits(individual_digits=True)]
    library = byte_level(after(*steps))
    names = ["<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>", "<｜User｜>", "<｜Assistant｜>"]
    library.add_special_tokens(names)
    library.post_processor = processors.ByteLevel(trim_offsets=False)
    return library, {"bos_token": names[0], "eos_token": names[1], "add_bos_token": True, "add_eos_token": False}


def gpt_neox():
    """Runs of spaces as added tokens that are not special."""
    library = byte_level(normalizer=normalizers.NFC())
    library.add_special_tokens(["<|endoftext|>", "<|padding|>"])
    library.add_tokens([AddedToken(" " * count, normalized=True) for count in range(12, 1, -1)])
    return library, {"eos_token": "<|endoftext|>", "bos_token": "<|endoftext|>"}


def pieces(size=420, *, byte_fallback=True, special=("<unk>", "<s>", "</s>"), normalizer, pre_tokenizer=None):
    """SentencePiece-style BPE: special tokens, then bytes, then pieces with ``▁`` for a space."""
    learner = Library(models.BPE())
    learner.normalizer = normalizer
    if pre_tokenizer is None:  # learn within words, encode across them
        learner.pre_tokenizer = pre_tokenizers.Split(" ", "merged_with_next")
    trainer = trainers.BpeTrainer(vocab_size=size, show_progress=False)
    learner.normalizer = normalizers.Replace(" ", "▁")
    learner.pre_tokenizer = pre_tokenizers.Split("▁", "merged_with_next")
    learner.train_from_iterator([f" {text}" for text in SENTENCES * 3], trainer)
    learnt = json.loads(learner.to_str())["model"]
    fallback = [f"<0x{byte:02X}>" for byte in range(256)] if byte_fallback else []
    names = dict.fromkeys([*special, *fallback, *learnt["vocab"]])
    model = models.BPE(
        vocab={name: index for index, name in enumerate(names)},
        merges=[tuple(pair) for pair in learnt["merges"]],
        unk_token="<unk>",
        fuse_unk=True,
        byte_fallback=byte_fallback,
    )
    library = Library(model)
    library.normalizer = normalizer
    if pre_tokenizer is not None:
        library.pre_tokenizer = pre_tokenizer
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    library.decoder = decoders.Sequence(steps)
    library.add_special_tokens([AddedToken(name, normalized=False, special=True) for name in special])
    return library


def prepended():
    return normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])


def begins(library, name):
    number = library.token_to_id(name)
    library.post_processor = processors.TemplateProcessing(
        single=f"{name} $A", pair=f"{name} $A $B", special_tokens=[(name, number)]
    )


def strips(library):
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    library.decoder = decoders.Sequence(steps)


def llama2():
    library = pieces(normalizer=prepended())
    begins(library, "<s>")
    strips(library)
    return library, {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "add_bos_token": True}


def mistral():
    """A prefix of the first part alone, and control tokens among the first ids."""
    special = ("<unk>", "<s>", "</s>", "[INST]", "[/INST]", "[TOOL_CALLS]", "[AVAILABLE_TOOLS]", "[/AVAILABLE_TOOLS]")
    metaspace = pre_tokenizers.Metaspace(replacement="▁", prepend_scheme="first", split=False)
    library = pieces(special=special, normalizer=normalizers.Sequence([]), pre_tokenizer=metaspace)
    begins(library, "<s>")
    strips(library)
    return library, {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}


def gemma():
    """No prefix; runs of line breaks and spaces, and HTML, are added tokens that are not special."""
    special = ("<pad>", "<eos>", "<bos>", "<unk>", "<start_of_turn>", "<end_of_turn>")
    library = pieces(special=special, normalizer=normalizers.Replace(" ", "▁"))
    runs = ["\n" * count for count in range(1, 6)] + ["▁" * count for count in range(2, 8)] + ["<body>", "</body>"]
    library.add_tokens([AddedToken(name, normalized=False) for name in runs])
    begins(library, "<bos>")
    return library, {"bos_token": "<bos>", "eos_token": "<eos>", "pad_token": "<pad>"}


def phi3():
    """Special tokens that take the white space to their right."""
    library = pieces(normalizer=prepended())
    library.add_special_tokens(
        [AddedToken(n, rstrip=True, normalized=False) for n in ("<|user|>", "<|end|>", "<|assistant|>", "<|system|>")]
    )
    library.add_special_tokens(["<|endoftext|>"])
    strips(library)
    return library, {"bos_token": "<s>", "eos_token": "<|endoftext|>", "add_bos_token": False}


def t5():
    """Unigram with NFKC, and special tokens that are pieces of the vocabulary."""
    library = Library(models.Unigram())
    library.normalizer = normalizers.Sequence([normalizers.NFKC(), normalizers.Replace(Regex(" {2,}"), " ")])
    library.pre_tokenizer = pre_tokenizers.Metaspace()
    library.decoder = decoders.Metaspace()
    trainer = trainers.UnigramTrainer(
        vocab_size=300,
        special_tokens=["<pad>", "</s>", "<unk>", "<extra_id_0>"],
        unk_token="<unk>",
        show_progress=False,
    )
    library.train_from_iterator(SENTENCES * 3, trainer)
    return library, {"eos_token": "</s>", "pad_token": "<pad>", "unk_token": "<unk>"}


def bloom():
    """The opposite of GPT-2: a split without ``\\s``, and special tokens at the front."""
    library = byte_level(after(split(r" ?[^(\s|[.,!?…。，、।۔،])]+", "isolated")))
    content = json.loads(library.to_str())
    special = ["<unk>", "<s>", "</s>", "<pad>"]
    vocab = {name: number + 4 for name, number in content["model"]["vocab"].items()}
    content["model"]["vocab"] = {**{name: index for index, name in enumerate(special)}, **vocab}
    content["model"]["vocab"]["lonely"] = 900  # a gap before it
    library = Library.from_str(json.dumps(content))
    library.add_special_tokens(special)
    return library, {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>", "unk_token": "<unk>"}


FAMILIES = {
    function.__name__: function
    for function in (gpt2, llama3, qwen, smollm2, deepseek, gpt_neox, llama2, mistral, gemma, phi3, t5, bloom)
}


def write(name, directory):
    """Write a family's tokenizer as its models carry it."""
    library, stated = FAMILIES[name]()
    directory.mkdir(exist_ok=True)
    library.save(str(directory / "tokenizer.json"))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False, **stated}
    (directory / "tokenizer_config.json").write_text(json.dumps(settings))
    return directory
