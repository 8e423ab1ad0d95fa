"""A run that is taken to another machine, was begun by an earlier version, or is handed to other programs."""

import contextlib
import hashlib
import json
import shutil
from dataclasses import replace

import pytest
import torch
from models import stand_in as base
from same import contents, fingerprint
from transformers import AutoModelForCausalLM

import metake as mk
from metake.algebra.update import Edit, LayerUpdate, total
from metake.editing.statistics import documents, token_rows
from metake.experiments import export, runs
from metake.experiments.export import served
from metake.experiments.runs import RunConfig, open_run, reevaluate, run
from metake.language import assets
from metake.support.errors import ParameterError, ProvenanceError
from metake.support.models import findable

CONFIG = RunConfig(method="memit_seq", edits=3, batch=1, text_tokens=1500)


@pytest.fixture(autouse=True)
def _random_base(monkeypatch):
    monkeypatch.setattr(runs, "load", base)
    monkeypatch.setattr(export, "load", base)


@pytest.fixture(scope="module")
def finished(tmp_path_factory, session_cache):
    folder = tmp_path_factory.mktemp("finished") / "run"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("METAKE_CACHE", str(session_cache))
        patch.setattr(runs, "load", base)
        run(CONFIG, folder)
    return folder


@pytest.fixture
def begun(finished, tmp_path):
    """A copy of which two batches are done."""
    shutil.copytree(finished, tmp_path / "run")
    shutil.rmtree(tmp_path / "run/batches/0002")
    return tmp_path / "run"


@pytest.fixture
def elsewhere(monkeypatch):
    """A machine whose products have another last digit."""
    here = LayerUpdate.delta.fget

    def there(self):
        return here(replace(self, left=self.left.flip(1), right=self.right.flip(0))) * (1 + 4e-16)

    monkeypatch.setattr(LayerUpdate, "delta", property(there))


def test_a_run_goes_on_and_is_evaluated_where_products_have_another_last_digit(begun, finished, elsewhere):
    edited = base()
    for edit in open_run(begun)[1]:
        edit.apply(edited)
    found = [record.weights for record in open_run(finished)[1].records()]
    assert any(edited.digest(module) != digest for module, digest in found[2].items()), "the same digits: too easy"
    before, whole = contents(begun / "batches"), run(CONFIG, begun)
    assert contents(begun / "batches").items() >= before.items() and len(open_run(begun)[1]) == 3
    assert reevaluate(begun).metrics == whole.metrics == reevaluate(finished).metrics


def test_another_runs_batch_is_still_refused(begun, tmp_path):
    """In its place, with the same requests: the base that the next one was made on is then another."""
    config = replace(CONFIG, changes={"contexts": ["{}"]})
    run(replace(config, edits=1), tmp_path / "other")
    edit = Edit.load(tmp_path / "other/batches/0000")
    edit.save(begun / "batches/0000")
    Edit.load(begun / "batches/0000")
    lm = base()
    first, second = open_run(begun)[1]
    first.apply(lm)
    before = fingerprint(lm.model)
    with pytest.raises(ProvenanceError, match="of its norm away"):
        second.apply(lm)
    assert fingerprint(lm.model) == before
    with pytest.raises(ProvenanceError):
        run(CONFIG, begun)


def test_loaded_edits_are_applied_wherever_their_tensors_are(finished):
    """The tensors of `meta` have no content; what is asked of them is where they go."""
    asked = []

    class Elsewhere:
        name = "tiny"

        def weight(self, module):
            return torch.empty(1, device="meta")

        def add(self, module, update):
            asked.append(update.delta.device.type)

        def restored_on_error(self, modules):
            return contextlib.nullcontext()

    for edit in open_run(finished)[1]:
        edit.apply(Elsewhere(), check=False)
    assert set(asked) == {"meta"} and len(asked) == 9


# Earlier versions


def former_digest(lm, text, layers, tokens):
    """As it was: over all layers, weights and tokens."""
    config = lm.model.config.to_diff_dict()
    config = {k: v for k, v in config.items() if k not in ("_name_or_path", "transformers_version")}
    rows = token_rows(lm, documents(text), tokens)
    digest = hashlib.sha256(
        json.dumps(["v2", layers, str(lm.dtype), config, rows], sort_keys=True, default=str).encode()
    )
    later = {id(t) for block in lm.blocks[layers[-1] + 1 :] for t in block.state_dict(keep_vars=True).values()}
    for name, tensor in lm.model.base_model.state_dict(keep_vars=True).items():
        if id(tensor) not in later:
            digest.update(name.encode() + tensor.detach().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def rewritten(folder, digest):
    """A run as an earlier version wrote it."""
    for path in (folder / "batches").glob("*/record.json"):
        record = json.loads(path.read_text())
        record["base"] = {k: v for k, v in record["base"].items() if k not in ("sketches", "tolerance")}
        path.write_text(json.dumps(record | {"statistics_digest": digest}))
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({k: v for k, v in config.items() if k not in ("recipe", "layers")}))


def test_a_run_of_an_earlier_version_goes_on(begun, finished):
    rewritten(begun, former_digest(base(), "embedded", [0, 1, 2], 1500))
    assert reevaluate(begun).metrics
    found = run(CONFIG, begun)
    assert found.metrics == reevaluate(finished).metrics
    assert len({r.statistics_digest for r in open_run(begun)[1].records()}) == 1, "one run, one digest"
    rewritten(begun, "0" * 64)
    with pytest.raises(ProvenanceError, match="other key statistics"):
        run(CONFIG, begun)


# Other programs


def test_the_whole_model_is_written(finished, tmp_path):
    export.export(finished, tmp_path / "whole", "model")
    lm = base()
    for edit in open_run(finished)[1]:
        edit.apply(lm)
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "whole", dtype=torch.float64)
    assert fingerprint(again) == fingerprint(lm.model)
    told = json.loads((tmp_path / "whole/metake.json").read_text())
    assert told["weights"] == {m: lm.digest(m) for m in told["weights"]} and len(told["weights"]) == 3
    assert len(told["requests"]) == 3 and told["base"]["id"] == "tiny"
    loaded = mk.load(tmp_path / "whole", "float64")
    ids = lm.tokenizer("The capital of France is")["input_ids"]
    assert loaded.tokenizer("The capital of France is")["input_ids"] == ids
    export.export(finished, tmp_path / "whole", "model", rank=1)
    thin, _ = total(open_run(finished)[1]).compress(1)
    with thin.applied(fresh := base()):
        again = AutoModelForCausalLM.from_pretrained(tmp_path / "whole", dtype=torch.float64)
        assert fingerprint(again) == fingerprint(fresh.model)


def test_a_model_is_written_whole_or_not_at_all(finished, tmp_path, monkeypatch):
    (tmp_path / "theirs").mkdir()
    (tmp_path / "theirs/config.json").write_text("{}")
    loaded = []
    with monkeypatch.context() as patch:
        patch.setattr(export, "load", lambda *_: loaded.append(1))
        with pytest.raises(ParameterError, match="theirs exists and is not of this kind"):
            export.export(finished, tmp_path / "theirs", "model")
    assert not loaded and contents(tmp_path) == {"theirs/config.json": b"{}"}
    lm = base()
    monkeypatch.setattr(export, "load", lambda *_: lm)
    monkeypatch.setattr(lm.tokenizer, "save_pretrained", lambda *_: (_ for _ in ()).throw(OSError(28, "No space left")))
    with pytest.raises(OSError, match="No space"):
        export.export(finished, tmp_path / "whole", "model")
    assert list(contents(tmp_path)) == ["theirs/config.json"]


def test_an_adapter_of_tiny_opens_by_itself(tmp_path):
    from peft import AutoPeftModelForCausalLM

    lm = mk.load("tiny")
    path = lm.write_path(1)
    update = LayerUpdate(path, torch.randn(128, 2).double(), torch.randn(2, 768).double())
    edit = Edit((update,), mk.EditRecord(base=lm.base(), weights={path: lm.digest(path)}))
    edit.to_peft(tmp_path / "lora")
    adapted = AutoPeftModelForCausalLM.from_pretrained(tmp_path / "lora", dtype=torch.float64)
    ids = torch.tensor([[5, 17, 300]])
    with edit.applied(lm), torch.no_grad():
        torch.testing.assert_close(adapted(ids).logits, lm.model(ids).logits)
    assert served(tmp_path / "lora") == "rank 2; a server must allow it: max_lora_rank 8 in vLLM"


@pytest.mark.parametrize(("name", "expected"), [
    ("smollm2-135m", "HuggingFaceTB/SmolLM2-135M-Instruct"), ("owner/name", "owner/name"),
])  # fmt: skip
def test_a_base_that_can_be_found(name, expected, tmp_path, monkeypatch):
    assert findable(name) == expected
    monkeypatch.chdir(tmp_path)
    (tmp_path / "models/mine").mkdir(parents=True)
    assert findable("models/mine") == str(tmp_path / "models/mine")
    assert assets.SOURCES["smollm2-135m"].repo == findable("smollm2-135m")


@pytest.mark.parametrize(("rank", "told"), [
    (1, "max_lora_rank 8 "), (8, "max_lora_rank 8 "), (60, "max_lora_rank 64 "), (257, "max_lora_rank 320 "),
    (512, "max_lora_rank 512 "), (2000, "at most 512, compress it: --rank"),
])  # fmt: skip
def test_what_a_server_must_allow(tmp_path, rank, told):
    (tmp_path / "adapter_config.json").write_text(json.dumps({"r": rank}))
    assert served(tmp_path).startswith(f"rank {rank}; a server must allow it") and told in served(tmp_path)
