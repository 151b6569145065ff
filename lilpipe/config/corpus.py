"""Section ``corpus``: sources, filters, deduplication, and where the work is done."""

from __future__ import annotations

from typing import Annotated, Literal, get_args

from pydantic import Field, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt, model_validator

from lilpipe.config.section import BuiltIn, NumWorkers, Operational, Ratio, Section, WithOptions


class Columns(Section):
    """Which column, or JSON key, of a source holds what; a dotted name (`meta.url`) looks inside an object."""

    text: str = "text"
    id: str = "id"
    """Rows without one get `<file>:<row>`."""
    url: str = "url"
    date: str = "date"
    """When the page was fetched or written, as ISO 8601; decides which of two pages with one URL stays."""
    licence: str = "licence"
    label: str = "label"


SourceKind = Literal["installed-docs", "jsonl", "parquet", "text", "warc", "huggingface"]


class Source(WithOptions):
    """One origin of raw documents."""

    kind: Annotated[str, BuiltIn("source", get_args(SourceKind))]
    """`installed-docs`: docstrings, topics and READMEs of this Python environment. `jsonl`, `parquet`, `text`
    (plain text, Markdown, reStructuredText: a document for each file) and `warc` (Common Crawl: a document for each
    HTML response): files, plain or compressed (.gz, .zst, .bz2, .xz). `huggingface`: a hub name or a local folder.
    Or a source of your own."""
    name: str
    """The name that documents of this source carry in reports and shards."""
    path: str | None = None
    """File, folder, glob or fsspec URL; for `huggingface` a hub name or folder."""
    columns: Columns = Columns()
    """Names of the columns (`jsonl`, `parquet`, `huggingface`)."""
    subset: str | None = None
    """Configuration of the data set (`huggingface` only)."""
    split: str = "train"
    """Split to read (`huggingface` only)."""
    licence: str = "unknown"
    """Licence of the documents, where the documents do not carry their own."""
    languages: tuple[str, ...] | None = None
    """Languages to keep of this source; `corpus.languages` where none are given."""
    label: str = ""
    """What kind of text this is, such as `code`: mixtures can go by it. Documents may carry their own."""
    weight: Annotated[PositiveFloat | None, Operational] = None
    """Weight of the source in the tokenizer's sample and in the mixture, where those name no weights of their own."""
    max_bytes: PositiveInt | None = None
    """Read at most this many bytes of text from this source, in an order fixed by a hash of the document id."""

    @model_validator(mode="after")
    def _path_matches_kind(self) -> Source:
        if self.kind == "installed-docs" and self.path is not None:
            raise ValueError(f"source {self.name!r}: kind 'installed-docs' reads this environment; remove `path`")
        if self.kind in get_args(SourceKind) and self.kind != "installed-docs" and self.path is None:
            raise ValueError(f"source {self.name!r}: kind {self.kind!r} needs `path`")
        if self.kind != "huggingface" and (self.subset is not None or self.split != "train"):
            raise ValueError(f"source {self.name!r}: `subset` and `split` are for kind 'huggingface'; remove them")
        if self.kind in ("installed-docs", "text", "warc") and self.columns != Columns():
            raise ValueError(f"source {self.name!r}: kind {self.kind!r} has no columns; remove `columns`")
        return self


def _check_names(field: str, sources: tuple[Source, ...]) -> None:
    names = [source.name for source in sources]
    if len(set(names)) != len(names):
        raise ValueError(f"{field}: names must differ, got {names}")


class UrlConfig(Section):
    """Filters on the address of a document; documents without one pass."""

    deduplicate: bool = True
    """Of documents with the same normalised URL keep the most recent (Llama 3), by date, then by the corpus's order."""
    blocked_domains: str | None = None
    """File with a domain on each line; it and its subdomains are rejected."""
    blocked_words: str | None = None
    """File with a word on each line; URLs that contain one between separators are rejected (RefinedWeb)."""


class LanguageConfig(Section):
    """Language identification by fastText (Joulin et al. 2016)."""

    model: str | None = None
    """fastText model file with labels `__label__CODE`; lid.176 where none is given."""
    min_score: Ratio = 0.65
    """Least confidence (FineWeb: 0.65)."""
    min_scores: dict[str, Ratio] = {}
    """Another least confidence for single languages."""


class QualityConfig(Section):
    """Heuristic filters on text."""

    gopher_repetition: bool = True
    """Rae et al. 2021 (Gopher), table A1: shares of repeated lines, paragraphs and n-grams."""
    gopher_quality: bool = True
    """Rae et al. 2021 (Gopher), A1.1: word counts, word lengths, symbols, bullets, stop words."""
    c4: bool = False
    """Raffel et al. 2020 (T5): terminal punctuation, curly brackets, lorem ipsum. Made for web pages; off here."""
    fineweb: bool = True
    """Penedo et al. 2024 (FineWeb): shares of lines ended by punctuation, short lines, duplicated characters."""
    min_words: NonNegativeInt = 30
    """Gopher quality: fewest words in a document."""
    max_words: PositiveInt = 100_000
    """Gopher quality: most words in a document."""
    min_mean_word_length: NonNegativeFloat = 3
    """Gopher quality: least mean length of a word, in characters."""
    max_mean_word_length: PositiveFloat = 10
    """Gopher quality: greatest mean length of a word, in characters."""
    max_symbol_word_ratio: Ratio = 0.1
    """Gopher quality: most `#`, and most ellipses, for each word."""
    max_bullet_line_ratio: Ratio = 0.9
    """Gopher quality: most lines that start with a bullet, as a share."""
    max_ellipsis_line_ratio: Ratio = 0.3
    """Gopher quality: most lines that end in an ellipsis, as a share."""
    min_stop_words: NonNegativeInt = 2
    """Gopher quality: fewest distinct stop words in a document; they are English ones, of English documents alone."""
    min_alpha_word_ratio: Ratio = 0.7
    """Gopher quality: least share of words that hold a letter."""
    max_duplicate_line_ratio: Ratio = 0.3
    """Gopher repetition: most lines that have occurred before, as a share."""
    max_duplicate_paragraph_ratio: Ratio = 0.3
    """Gopher repetition: most paragraphs that have occurred before, as a share."""
    max_duplicate_line_chars: Ratio = 0.2
    """Gopher repetition: most characters in such lines, as a share."""
    max_duplicate_paragraph_chars: Ratio = 0.2
    """Gopher repetition: most characters in such paragraphs, as a share."""
    max_top_ngram_chars: dict[int, Ratio] = {2: 0.2, 3: 0.18, 4: 0.16}
    """Gopher repetition: for each n, most characters in the most frequent n-gram, as a share."""
    max_duplicate_ngram_chars: dict[int, Ratio] = {5: 0.15, 6: 0.14, 7: 0.13, 8: 0.12, 9: 0.11, 10: 0.10}
    """Gopher repetition: for each n, most characters in n-grams that occur more than once, as a share."""
    min_line_punctuation_ratio: Ratio = 0.05
    """FineWeb: least share of lines that end in punctuation."""
    max_short_line_ratio: Ratio = 0.9
    """FineWeb: most lines of at most 30 characters, as a share."""
    max_duplicate_line_char_ratio: Ratio = 0.1
    """FineWeb: most characters in lines that have occurred before, as a share (the paper's 0.1; datatrove: 0.01)."""
    max_line_breaks_per_word: NonNegativeFloat = 0.3
    """FineWeb: most line breaks for each word; lists have more."""
    max_duplicate_ngram_coverage: Ratio | None = None
    """Llama 3 (Grattafiori et al. 2024, 3.1.1): most words that lie in an n-gram (of `coverage_ngram_size` words)
    seen before in the document, as a share; catches logs and error messages. None: off."""
    coverage_ngram_size: PositiveInt = 10
    """Words of those n-grams."""
    max_dirty_words: NonNegativeInt | None = None
    """Llama 3, 3.1.1: most occurrences of words of the list. None: off."""
    dirty_words: str | None = None
    """File with a word on each line; a small neutral list of our own where none is given."""
    max_kl_divergence: PositiveFloat | None = None
    """Llama 3, 3.1.1: greatest Kullback-Leibler divergence, in nats, of the document's words from the corpus's;
    documents of outlier tokens have more. None: off."""


class ExactDedupConfig(Section):
    """Removal of what has been there before, to the letter."""

    documents: bool = True
    """Documents whose normalised text (case, white space and Unicode form apart) has been seen."""
    paragraphs: bool = False
    """Within a document, paragraphs that have occurred before in it are cut out."""
    lines: bool = False
    """Lines that many documents share (navigation, notices) are cut out (Llama 3, 3.1.1)."""
    max_line_occurrences: PositiveInt = 6
    """A line seen more often than this in a bucket of documents is cut out (Llama 3: 6)."""
    bucket_documents: PositiveInt = 30_000_000
    """Documents among which lines are counted together (Llama 3: 30 million)."""


class MinhashConfig(Section):
    """Near-duplicate removal by MinHash-LSH (Broder 1997): candidates share a band of their signatures, and count as
    near-duplicates if their signatures agree in a share of at least `min_similarity`.
    """

    enabled: bool = True
    """Whether to remove near-duplicates at all."""
    num_buckets: PositiveInt = 32
    """LSH bands (FineWeb: 14)."""
    hashes_per_bucket: PositiveInt = 4
    """Rows of a band (FineWeb: 8); candidates at even odds have a Jaccard similarity of about
    (1/num_buckets)^(1/hashes_per_bucket)."""
    min_similarity: Ratio = 0.4
    """Least estimated Jaccard similarity of two documents' shingles; 0 takes every candidate, as FineWeb does. Where
    5 % of the words differ it is 0.63 in the mean, and in short documents often below 0.5."""
    ngram_size: PositiveInt = 5
    """Words of a shingle."""
    seed: NonNegativeInt = 1
    """Seed of the hash family."""


class ClassifierConfig(Section):
    """A fastText classifier of quality, trained on examples that you name (Brown et al. 2020; DCLM, Li et al. 2024)."""

    good: tuple[Source, ...] = ()
    """Examples of what to keep. None, of both: off."""
    bad: tuple[Source, ...] = ()
    """Examples of what to reject."""
    min_score: Ratio | None = None
    """Least probability of being good."""
    keep_ratio: Annotated[float | None, Field(gt=0, le=1)] = None
    """Instead of `min_score`: keep this share of the documents that come so far, the best ones."""
    validation_ratio: Annotated[float, Field(gt=0, lt=1)] = 0.1
    """Share of the examples that the classifier is measured on and not trained on, by a hash of the text."""
    word_ngrams: PositiveInt = 2
    """Features are n-grams of up to this many words."""
    num_epochs: PositiveInt = 5
    learning_rate: PositiveFloat = 0.1
    dimension: PositiveInt = 64

    @property
    def enabled(self) -> bool:
        """Whether there is a classifier."""
        return bool(self.good)

    @model_validator(mode="after")
    def _examples_and_one_rule(self) -> ClassifierConfig:
        if bool(self.good) != bool(self.bad):
            raise ValueError("good and bad: got examples of one alone, expected both, or neither for no classifier")
        if self.enabled and (self.min_score is None) == (self.keep_ratio is None):
            raise ValueError("min_score and keep_ratio: got both or neither, expected one of them")
        if not self.enabled and (self.min_score is not None or self.keep_ratio is not None):
            raise ValueError("min_score and keep_ratio: got one without examples, expected `good` and `bad` beside it")
        _check_names("good", self.good)
        _check_names("bad", self.bad)
        return self


class PIIConfig(Section):
    """Personal data, replaced by a placeholder and counted."""

    emails: bool = True
    ip_addresses: bool = True
    """Public addresses; private, loopback and documentation ranges stay."""
    phone_numbers: bool = False
    """International and North American forms. Off by default: long numbers in code and tables look like them."""
    secrets: bool = True
    """Private keys and access tokens of known forms."""


class DecontaminationConfig(Section):
    """Documents that hold text of an evaluation set (Brown et al. 2020, appendix C; Llama 3, 5.1.4)."""

    enabled: bool = True
    """Whether to look for the evaluation prompts of the pipeline (input `prompts`) and of `sets`."""
    sets: tuple[Source, ...] = ()
    """Evaluation sets that you name; each text is one item."""
    ngram_size: PositiveInt = 13
    """Words that a document and an item must share in a row."""
    min_item_words: PositiveInt = 8
    """Items of fewer words than `ngram_size` are looked for as a whole, if they have at least this many."""
    max_ngram_documents: PositiveInt = 10
    """An n-gram found in more documents of the corpus than this is no sign of contamination (GPT-3: 10)."""
    action: Literal["reject", "report"] = "reject"
    """What becomes of a document that matches."""

    @model_validator(mode="after")
    def _sets_are_named_apart(self) -> DecontaminationConfig:
        _check_names("sets", self.sets)
        return self


class FilterConfig(WithOptions):
    """A filter of your own. Filters run in their order, after the built-in filters of quality."""

    kind: Annotated[str, BuiltIn("filter", ())]
    """Name of the filter."""


class SlurmConfig(Section):
    """Options of `sbatch` for the tasks of the data stages; the store must lie on a file system that all nodes see."""

    partition: str = "cpu"
    time: str = "24:00:00"
    """Longest time of a job, which does several tasks one after the other."""
    cpus_per_task: PositiveInt = 1
    memory_per_cpu_gb: PositiveInt = 4
    sbatch: dict[str, str] = {}
    """Further options of `sbatch`, such as `account`."""
    poll_seconds: PositiveFloat = 5.0
    """How often to look whether tasks are done."""


class RayConfig(Section):
    """The Ray cluster of the data stages."""

    address: str | None = None
    """Address of a running cluster; none starts one on this host."""
    cpus_per_task: PositiveInt = 1
    memory_per_cpu_gb: PositiveFloat = 2


class CorpusConfig(Section):
    """Raw sources to clean, deduplicated documents."""

    sources: tuple[Source, ...] = (Source(kind="installed-docs", name="installed-docs"),)
    """Where documents come from."""
    min_chars: NonNegativeInt = 200
    """Shorter documents are rejected before any other filter."""
    languages: tuple[str, ...] = ("en",)
    """Languages to keep, as codes of fastText's 176-language model; empty keeps any."""
    url: UrlConfig = UrlConfig()
    """Addresses."""
    language: LanguageConfig = LanguageConfig()
    """Language identification."""
    quality: QualityConfig = QualityConfig()
    """Heuristic quality filters."""
    exact_dedup: ExactDedupConfig = ExactDedupConfig()
    """Removal of exact repetitions."""
    minhash: MinhashConfig = MinhashConfig()
    """Near-duplicate removal."""
    classifier: ClassifierConfig = ClassifierConfig()
    """Quality classifier."""
    filters: tuple[FilterConfig, ...] = ()
    """Filters of your own."""
    pii: PIIConfig = PIIConfig()
    """Personal data."""
    decontamination: DecontaminationConfig = DecontaminationConfig()
    """Evaluation sets."""
    max_malformed_ratio: Ratio = 0.01
    """Unreadable rows are quarantined and counted; above this share of a source's rows, or of its
    files where files break off (truncated, corrupt), the stage fails."""
    num_workers: NumWorkers = 2
    """Processes, or tasks of the cluster, at work at a time."""
    executor: Annotated[Literal["local", "slurm", "ray"], Operational] = "local"
    """Where tasks run: datatrove's local executor, a Slurm cluster or a Ray cluster."""
    slurm: Annotated[SlurmConfig, Operational] = SlurmConfig()
    """How tasks are submitted to Slurm."""
    ray: Annotated[RayConfig, Operational] = RayConfig()
    """How Ray is reached."""

    @model_validator(mode="after")
    def _sources_are_named_apart(self) -> CorpusConfig:
        if not self.sources:
            raise ValueError("sources: got none, expected at least one; name a source or leave the default")
        _check_names("sources", self.sources)
        without = [source.name for source in self.sources if source.weight is None]
        if without and len(without) < len(self.sources):
            raise ValueError(f"sources: got no weight for {without}, expected one for every source or for none")
        return self
