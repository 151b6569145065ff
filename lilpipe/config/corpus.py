"""Section `corpus`: filters and deduplication of documents."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt, model_validator

from lilpipe.config.executors import RayConfig, SlurmConfig
from lilpipe.config.section import BuiltIn, NumWorkers, Operational, Ratio, Section, WithOptions
from lilpipe.config.sources import Source, check_names


class UrlConfig(Section):
    """URL filters; documents without a URL pass."""

    deduplicate: bool = True
    """Of documents with the same normalised URL, keep the most recent (Llama 3); equal dates are resolved by corpus
    order."""
    blocked_domains: str | None = None
    """File with one domain per line; documents from these domains and their subdomains are rejected."""
    blocked_words: str | None = None
    """File with one word per line; URLs that contain such a word between separators are rejected (RefinedWeb)."""


class LanguageConfig(Section):
    """Language identification with fastText (Joulin et al. 2016)."""

    model: str | None = None
    """fastText model file with labels `__label__CODE`; if None, lid.176."""
    min_score: Ratio = 0.65
    """Minimum confidence (FineWeb: 0.65)."""
    min_scores: dict[str, Ratio] = {}
    """Minimum confidence of single languages; overrides `min_score`."""


class QualityConfig(Section):
    """Heuristic quality filters."""

    gopher_repetition: bool = True
    """Rae et al. 2021 (Gopher), table A1: repeated lines, paragraphs and n-grams."""
    gopher_quality: bool = True
    """Rae et al. 2021 (Gopher), A1.1: word counts, word lengths, symbols, bullets, stop words."""
    c4: bool = False
    """Raffel et al. 2020 (T5): terminal punctuation, curly brackets, lorem ipsum. Designed for web pages; off by
    default."""
    fineweb: bool = True
    """Penedo et al. 2024 (FineWeb): lines that end in punctuation, short lines, duplicate characters."""
    min_words: NonNegativeInt = 30
    """Gopher quality: minimum number of words of a document."""
    max_words: PositiveInt = 100_000
    """Gopher quality: maximum number of words of a document."""
    min_mean_word_length: NonNegativeFloat = 3
    """Gopher quality: minimum mean word length, in characters."""
    max_mean_word_length: PositiveFloat = 10
    """Gopher quality: maximum mean word length, in characters."""
    max_symbol_word_ratio: Ratio = 0.1
    """Gopher quality: maximum ratio of `#` to words, and of ellipses to words."""
    max_bullet_line_ratio: Ratio = 0.9
    """Gopher quality: maximum fraction of lines that start with a bullet."""
    max_ellipsis_line_ratio: Ratio = 0.3
    """Gopher quality: maximum fraction of lines that end with an ellipsis."""
    min_stop_words: NonNegativeInt = 2
    """Gopher quality: minimum number of distinct English stop words; applied to English documents only."""
    min_alpha_word_ratio: Ratio = 0.7
    """Gopher quality: minimum fraction of words that contain a letter."""
    max_duplicate_line_ratio: Ratio = 0.3
    """Gopher repetition: maximum fraction of lines that are duplicates."""
    max_duplicate_paragraph_ratio: Ratio = 0.3
    """Gopher repetition: maximum fraction of paragraphs that are duplicates."""
    max_duplicate_line_chars: Ratio = 0.2
    """Gopher repetition: maximum fraction of characters in duplicate lines."""
    max_duplicate_paragraph_chars: Ratio = 0.2
    """Gopher repetition: maximum fraction of characters in duplicate paragraphs."""
    max_top_ngram_chars: dict[int, Ratio] = {2: 0.2, 3: 0.18, 4: 0.16}
    """Gopher repetition: for each n, maximum fraction of characters in the most frequent n-gram."""
    max_duplicate_ngram_chars: dict[int, Ratio] = {5: 0.15, 6: 0.14, 7: 0.13, 8: 0.12, 9: 0.11, 10: 0.10}
    """Gopher repetition: for each n, maximum fraction of characters in n-grams that occur more than once."""
    min_line_punctuation_ratio: Ratio = 0.05
    """FineWeb: minimum fraction of lines that end in punctuation."""
    max_short_line_ratio: Ratio = 0.9
    """FineWeb: maximum fraction of lines with at most 30 characters."""
    max_duplicate_line_char_ratio: Ratio = 0.1
    """FineWeb: maximum fraction of characters in duplicate lines (paper: 0.1; datatrove: 0.01)."""
    max_line_breaks_per_word: NonNegativeFloat = 0.3
    """FineWeb: maximum ratio of line breaks to words; lists exceed it."""
    max_duplicate_ngram_coverage: Ratio | None = None
    """Llama 3 (Grattafiori et al. 2024, 3.1.1): maximum fraction of words covered by duplicate n-grams (of
    `coverage_ngram_size` words) of the document; rejects logs and error messages. None disables it."""
    coverage_ngram_size: PositiveInt = 10
    """N-gram size, in words, of `max_duplicate_ngram_coverage`."""
    max_dirty_words: NonNegativeInt | None = None
    """Llama 3, 3.1.1: maximum number of occurrences of dirty words. None disables it."""
    dirty_words: str | None = None
    """File with one dirty word per line; if None, a small neutral built-in list."""
    max_kl_divergence: PositiveFloat | None = None
    """Llama 3, 3.1.1: maximum Kullback-Leibler divergence, in nats, of the document's word distribution from the
    corpus's; documents with many outlier tokens exceed it. None disables it."""


class ExactDedupConfig(Section):
    """Removal of exact duplicates."""

    documents: bool = True
    """Reject duplicate documents, compared after normalization of case, white space and Unicode form."""
    paragraphs: bool = False
    """Remove duplicate paragraphs within a document."""
    lines: bool = False
    """Remove lines that occur in many documents, such as navigation and notices (Llama 3, 3.1.1)."""
    max_line_occurrences: PositiveInt = 6
    """Maximum occurrences of a line in a bucket of documents; more frequent lines are removed (Llama 3: 6)."""
    bucket_documents: PositiveInt = 30_000_000
    """Number of documents per bucket, within which lines are counted (Llama 3: 30 million)."""


class MinhashConfig(Section):
    """Near-duplicate removal by MinHash-LSH (Broder 1997): candidate pairs share an LSH band, and are near-duplicates
    if their signatures agree in a fraction of at least `min_similarity`.
    """

    enabled: bool = True
    """Remove near-duplicates."""
    num_buckets: PositiveInt = 32
    """Number of LSH bands (FineWeb: 14)."""
    hashes_per_bucket: PositiveInt = 4
    """Rows per band (FineWeb: 8). A pair becomes a candidate with probability 1/2 at a Jaccard similarity of about
    (1/num_buckets)^(1/hashes_per_bucket)."""
    min_similarity: Ratio = 0.4
    """Minimum estimated Jaccard similarity of the shingles of two documents; 0 accepts every candidate, as FineWeb
    does. If 5 % of the words differ, the similarity is 0.63 on average, and in short documents often below 0.5."""
    ngram_size: PositiveInt = 5
    """Words per shingle."""
    seed: NonNegativeInt = 1
    """Seed of the hash functions."""


class ClassifierConfig(Section):
    """fastText quality classifier, trained on your examples (Brown et al. 2020; DCLM, Li et al. 2024)."""

    good: tuple[Source, ...] = ()
    """Sources of positive examples. If both `good` and `bad` are empty, there is no classifier."""
    bad: tuple[Source, ...] = ()
    """Sources of negative examples."""
    min_score: Ratio | None = None
    """Minimum probability of the positive class."""
    keep_ratio: Annotated[float | None, Field(gt=0, le=1)] = None
    """Keep this fraction of the documents that passed the earlier filters, the highest scores first; instead of
    `min_score`."""
    validation_ratio: Annotated[float, Field(gt=0, lt=1)] = 0.1
    """Fraction of the examples in the validation split, chosen by a hash of the text."""
    word_ngrams: PositiveInt = 2
    """Maximum n of the word n-gram features."""
    num_epochs: PositiveInt = 5
    """Number of epochs."""
    learning_rate: PositiveFloat = 0.1
    """fastText learning rate."""
    dimension: PositiveInt = 64
    """Size of the word vectors."""

    @property
    def enabled(self) -> bool:
        """Whether there is a classifier."""
        return bool(self.good)

    @model_validator(mode="after")
    def _examples_and_one_rule(self) -> ClassifierConfig:
        if bool(self.good) != bool(self.bad):
            raise ValueError("good and bad: only one of them has examples, expected both, or neither for no classifier")
        if self.enabled and (self.min_score is None) == (self.keep_ratio is None):
            raise ValueError("min_score and keep_ratio: got both or neither, expected exactly one")
        if not self.enabled and (self.min_score is not None or self.keep_ratio is not None):
            raise ValueError("min_score and keep_ratio: got one without examples; set `good` and `bad` too")
        check_names("good", self.good)
        check_names("bad", self.bad)
        return self


class PIIConfig(Section):
    """Personal data to replace with a placeholder and count."""

    emails: bool = True
    """Email addresses."""
    ip_addresses: bool = True
    """Public addresses; private, loopback and documentation ranges are kept."""
    phone_numbers: bool = False
    """International and North American formats. Off by default: long numbers in code and tables look similar."""
    secrets: bool = True
    """Private keys and access tokens in known formats."""


class DecontaminationConfig(Section):
    """Removal of documents that contain text of an evaluation set (Brown et al. 2020, appendix C; Llama 3, 5.1.4)."""

    enabled: bool = True
    """Search for the evaluation prompts of the pipeline (input `prompts`) and of `sets`."""
    sets: tuple[Source, ...] = ()
    """Further evaluation sets; each text is one item."""
    ngram_size: PositiveInt = 13
    """Length, in words, of an n-gram shared by document and item that counts as a match."""
    min_item_words: PositiveInt = 8
    """Items shorter than `ngram_size` are matched as a whole if they have at least this many words."""
    max_ngram_documents: PositiveInt = 10
    """N-grams that occur in more documents of the corpus than this are ignored as too common (GPT-3: 10)."""
    action: Literal["reject", "report"] = "reject"
    """Reject documents that match, or only report them."""

    @model_validator(mode="after")
    def _sets_are_named_apart(self) -> DecontaminationConfig:
        check_names("sets", self.sets)
        return self


class FilterConfig(WithOptions):
    """A custom filter. Custom filters run in the given order, after the built-in quality filters."""

    kind: Annotated[str, BuiltIn("filter", ())]
    """Name of the filter."""


class CorpusConfig(Section):
    """Raw sources to filtered, deduplicated documents."""

    sources: tuple[Source, ...] = (Source(kind="installed-docs", name="installed-docs"),)
    """Sources of documents."""
    min_chars: NonNegativeInt = 200
    """Minimum length in characters; shorter documents are rejected before all other filters."""
    languages: tuple[str, ...] = ("en",)
    """Languages to keep, as codes of fastText's lid.176 model; if empty, all."""
    url: UrlConfig = UrlConfig()
    language: LanguageConfig = LanguageConfig()
    quality: QualityConfig = QualityConfig()
    exact_dedup: ExactDedupConfig = ExactDedupConfig()
    minhash: MinhashConfig = MinhashConfig()
    classifier: ClassifierConfig = ClassifierConfig()
    filters: tuple[FilterConfig, ...] = ()
    """Custom filters."""
    pii: PIIConfig = PIIConfig()
    decontamination: DecontaminationConfig = DecontaminationConfig()
    max_malformed_ratio: Ratio = 0.01
    """Maximum fraction of malformed rows of a source, or of its files that are truncated or corrupt. Such rows are
    quarantined and counted; above this fraction, the stage fails."""
    num_workers: NumWorkers = 2
    """Number of processes, or tasks of the cluster, that run at a time."""
    executor: Annotated[Literal["local", "slurm", "ray"], Operational] = "local"
    """Executor of the tasks: datatrove's local executor, Slurm or Ray."""
    slurm: Annotated[SlurmConfig, Operational] = SlurmConfig()
    ray: Annotated[RayConfig, Operational] = RayConfig()

    @model_validator(mode="after")
    def _sources_are_named_apart(self) -> CorpusConfig:
        if not self.sources:
            raise ValueError(
                "sources: got none, expected at least one; add a source, or remove the setting for the default"
            )
        check_names("sources", self.sources)
        without = [source.name for source in self.sources if source.weight is None]
        if without and len(without) < len(self.sources):
            raise ValueError(f"sources: got no weight for {without}, expected one for every source or for none")
        return self
