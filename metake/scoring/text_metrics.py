"""Metrics of generated text: n-gram entropy (fluency) and closeness to a reference (consistency)."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from functools import cache
from statistics import fmean
from typing import Any

from metake.data.facts import prose, reference_texts


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


@cache
def _words() -> Any:
    from nltk.tokenize import NLTKWordTokenizer  # nltk takes as long to import as all the rest: only where it is needed

    return NLTKWordTokenizer()


@cache
def _vectorizer() -> Any:
    """scikit-learn's defaults (as the family's); document frequencies of the embedded reference texts and prose."""
    from sklearn.feature_extraction.text import TfidfVectorizer

    return TfidfVectorizer().fit([*reference_texts().values(), *prose()])
