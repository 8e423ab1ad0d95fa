"""Metrics of generated text: n-gram entropy (fluency), closeness to a reference (consistency), and the answer in it."""

from __future__ import annotations

import math
import re
import unicodedata
from collections import Counter
from collections.abc import Sequence
from functools import cache
from statistics import fmean
from typing import Any

from metake.data.facts import prose, reference_texts
from metake.data.requests import unspaced

_STOP = re.compile(r"\n|[.!?](?=\s|$)|[。！？]")


def ngram_entropy(text: str) -> float:
    """Weighted entropy of a text's bigrams and trigrams, in bits: E = ⅓ H₂ + ⅔ H₃.

    H_n = −Σ f_n log₂ f_n over the empirical frequencies         (ROME's fluency: weights ⅔ and 4/3, then their mean;
    papers print the sum without the half.) Words by NLTK's Treebank rules, the whole text taken as one sentence.
    """
    words = _words().tokenize(text)
    return _entropy(words, 2) / 3 + 2 * _entropy(words, 3) / 3


def _entropy(words: Sequence[str], n: int) -> float:
    counts = Counter(zip(*(words[i:] for i in range(n)), strict=False))
    total = counts.total()
    return -sum(c / total * math.log2(c / total) for c in counts.values())


def fluency(texts: Sequence[str]) -> float:
    """Mean n-gram entropy of a case's generations."""
    return fmean(map(ngram_entropy, texts))


def consistency(texts: Sequence[str], references: Sequence[str]) -> float | None:
    """Cosine of the TF-IDF vectors of all generations and all reference texts of a case; None without references."""
    if not references:
        return None
    generated, reference = _vectorizer().transform([" ".join(texts), " ".join(references)])
    return float(generated.multiply(reference).sum())


def first_sentence(text: str, names: Sequence[str] = ()) -> str:
    """What a model answers before it goes on: up to a line's end or a sentence's, of which none lies within a name that
    the text begins with ("Washington, D.C.")."""
    text = text.strip()
    found = _STOP.search(text, max((len(name) - 1 for name in names if text.startswith(name)), default=0))
    return text[: found.start()] if found else text


def normalized(text: str) -> str:
    """Small letters, without punctuation and articles, single blanks (SQuAD: Rajpurkar et al. 2016)."""
    letters = (c for c in unicodedata.normalize("NFKC", text).casefold() if unicodedata.category(c)[0] != "P")
    words = "".join(letters).split()
    return " ".join([word for word in words if word not in ("a", "an", "the")] or words)


def agreement(text: str, names: Sequence[str]) -> tuple[bool, bool]:
    """Whether a text is one of the names, and whether one stands in it as whole words; all `normalized`."""
    said, wanted = normalized(text), [name for name in map(normalized, names) if name]
    within = (name in said if unspaced(name) else f" {name} " in f" {said} " for name in wanted)
    return said in wanted, any(within)


@cache
def _words() -> Any:
    from nltk.tokenize import NLTKWordTokenizer  # nltk takes as long to import as all the rest: only where it is needed

    return NLTKWordTokenizer()


@cache
def _vectorizer() -> Any:
    """scikit-learn's defaults (as the family's); document frequencies of the embedded reference texts and prose."""
    from sklearn.feature_extraction.text import TfidfVectorizer

    return TfidfVectorizer().fit([*reference_texts().values(), *prose()])
