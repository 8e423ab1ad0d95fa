"""Mistakes that somebody could make, in every room, each with the test or the page that notices it.

A mistake is one place of the package: what stands there, once, and what is written instead. `make torture` makes all of
them, one after the other, in a copy; the tests make a few.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]


class Mutation(NamedTuple):
    """file: below metake/; right, wrong: what stands there and what is written instead; test: what notices it."""

    what: str
    file: str
    right: str
    wrong: str
    test: str


MUTATIONS = tuple(Mutation(*told) for told in (
    (
        "the noise of the gate", "algebra/solve.py", "+ noise * torch.eye(len(keys)",
        "+ 2 * noise * torch.eye(len(keys)", "tests/algebra/test_solve.py::test_memit",
    ),
    (
        "B transposed", "algebra/solve.py", "interaction.T @ residuals", "interaction @ residuals",
        "tests/algebra/test_solve.py::test_a_gate_for_other_keys_than_it_writes_along",
    ),
    (
        "where the residual is found", "algebra/solve.py", "_finite(metric_keys @ at.T)",
        "_finite(at @ metric_keys.T)",
        "tests/algebra/test_solve.py::test_a_gate_for_other_keys_than_it_writes_along",
    ),
    (
        "attenuation", "algebra/solve.py", "association / (noise + association)",
        "association / (noise - association)",
        "tests/algebra/test_solve.py::test_one_request_alone_under_any_noise",
    ),
    (
        "the interval's upper end", "algebra/solve.py", "epsilon * (1 + association / noise)",
        "epsilon * (1 + association * noise)",
        "tests/algebra/test_solve.py::test_one_request_alone_under_any_noise",
    ),
    (
        "the sign of what is remembered", "algebra/geometry.py", "self.base.apply(wide) - overlap.T",
        "self.base.apply(wide) + overlap.T",
        "tests/algebra/test_geometry.py::test_conditioning_is_a_refit_with_the_past_keys",
    ),
    (
        "the null space's complement", "algebra/geometry.py",
        "vectors[:, : self.rank] if self._thin_is_null else vectors[:, self.rank :]",
        "vectors[:, self.rank :] if self._thin_is_null else vectors[:, : self.rank]",
        "tests/algebra/test_geometry.py::test_null_space_is_null_whichever_factor_is_kept",
    ),
    (
        "keys counted twice", "algebra/geometry.py", "self.count += keys.shape[0]",
        "self.count += 2 * keys.shape[0]",
        "tests/algebra/test_geometry.py::test_streamed_second_moment_is_that_of_one_batch",
    ),
    (
        "the weight of the covariance", "algebra/geometry.py", "operator = weight * statistics.covariance",
        "operator = statistics.covariance / weight",
        "tests/algebra/test_geometry.py::test_metrics_are_what_they_say",
    ),
    (
        "the threshold's side", "algebra/geometry.py", "(self.spectrum < threshold).sum()",
        "(self.spectrum > threshold).sum()",
        "tests/algebra/test_geometry.py::test_null_rank_counts_eigenvalues_strictly_under_the_threshold",
    ),
    (
        "RECT's share", "algebra/postprocess.py", "math.floor((1 - self.share) * delta.numel()",
        "math.floor(self.share * delta.numel()",
        "tests/algebra/test_postprocess.py::"
        "test_rect_keeps_the_share_that_it_names_and_the_largest_relative_changes",
    ),
    (
        "SPHERE's sign", "algebra/postprocess.py", "rows - self.strength * (rows @ principal)",
        "rows + self.strength * (rows @ principal)",
        "tests/algebra/test_postprocess.py::test_sphere_removes_the_principal_directions_and_nothing_else",
    ),
    (
        "PRUNE's limit", "algebra/postprocess.py", "torch.where(s >= limit, grown, s)",
        "torch.where(s <= limit, grown, s)",
        "tests/algebra/test_postprocess.py::test_prune_caps_by_a_logarithm_what_is_larger_than_the_weight",
    ),
    (
        "the adapter's factors exchanged", "algebra/update.py",
        "lora_A.weight\"] = torch.nn.functional.pad(u.right,",
        "lora_A.weight\"] = torch.nn.functional.pad(-u.right,",
        "tests/algebra/test_update.py::test_adapters_give_the_logits_of_what_was_exported",
    ),
    (
        "the energy that is dropped", "algebra/update.py", "s[rank:].square().sum() / energy",
        "s[:rank].square().sum() / energy",
        "tests/algebra/test_update.py::test_compression_is_exact_at_full_rank_and_the_best_below",
    ),
    (
        "the first base of a sum", "algebra/update.py", "weights = {**record.weights, **weights}",
        "weights = {**weights, **record.weights}",
        "tests/algebra/test_update.py::test_a_sum_of_edits_does_what_they_do_in_order",
    ),
    (
        "the tolerance of a base", "algebra/base.py", "if away <= tolerance:", "if away >= tolerance:",
        "tests/algebra/test_base.py::test_a_sequence_is_applied_where_products_have_another_last_digit",
    ),
    (
        "content before the name", "support/storage.py",
        "            yield partial\n            _flush(*partial.rglob(\"*\"), partial)\n",
        "            yield partial\n",
        "tests/support/test_crashes.py::"
        "test_the_disk_has_the_content_before_the_name_and_the_name_before_the_call_returns",
    ),
    (
        "the old folder comes back", "support/storage.py", "left.suffix == \".retired\" and not path.exists()",
        "left.suffix == \".retired\" and path.exists()",
        "tests/support/test_storage.py::test_atomic_path_keeps_the_old_folder_when_the_rename_fails",
    ),
    (
        "who is second waits", "support/storage.py", "        lock.acquire()\n    try:", "        pass\n    try:",
        "tests/support/test_crashes.py::test_of_two_that_merge_rows_none_is_lost",
    ),
    (
        "the checksum is compared", "support/storage.py", "!= _checksum(tensors, meta)", "is None",
        "tests/editing/test_statistics.py::test_no_flipped_byte_goes_unnoticed",
    ),
    (
        "the target's label", "data/files.py", "{\"paraphrase\": true, \"neighborhood\": target}",
        "{\"paraphrase\": true, \"neighborhood\": true}",
        "tests/data/test_requests.py::test_rome_layout_gives_every_probe_with_its_comparison",
    ),
    (
        "the subject's last token", "language/tokens.py", "return Located(full, len(upto) - 1)",
        "return Located(full, len(upto) - 2)", "tests/language/test_tokens.py::test_prompts_end_with_the_subject",
    ),
    (
        "a weight's orientation", "language/model.py",
        "return owner.weight.data.T if isinstance(owner, Conv1D) else owner.weight.data",
        "return owner.weight.data",
        "tests/language/test_model.py::test_weight_is_d_out_by_d_in_and_an_update_moves_the_block_by_delta_u",
    ),
    (
        "the seam", "language/tokens.py", "return bare, \" \" if bare != prompt or not unspaced(bare) else \"\"",
        "return bare, \"\" if bare != prompt or not unspaced(bare) else \" \"",
        "tests/language/test_seam.py::test_otherwise_one_blank",
    ),
    (
        "where a vector is planted", "language/capture.py", "first = state[:, 0].to(vector.dtype) + vector",
        "first = state[:, 0].to(vector.dtype) - vector",
        "tests/editing/test_edits_of_families.py::test_a_vector_enters_where_its_module_returns_it",
    ),
    (
        "the scale of a block", "language/model.py",
        "return float(getattr(self.model.config, self.architecture.scale, 1.0))", "return 1.0",
        "tests/editing/test_edits_of_families.py::test_an_exact_write_lands_where_it_was_planned",
    ),
    (
        "the share of a layer", "editing/editor.py", "return 1 / (count - index)",
        "return 1 / (count - index + 1)",
        "tests/editing/test_pipeline.py::test_a_sequence_is_the_literal_algorithm",
    ),
    (
        "PMET's share", "editing/editor.py", "return (count - index) ** -0.5", "return (count - index) ** 0.5",
        "tests/editing/test_pipeline.py::test_a_sequence_is_the_literal_algorithm",
    ),
    (
        "the residual's sign", "editing/editor.py", "(targets.value - found.current) * self.allocation",
        "(found.current - targets.value) * self.allocation",
        "tests/editing/test_pipeline.py::test_a_sequence_is_the_literal_algorithm",
    ),
    (
        "the average of keys", "editing/keys.py", "(grouped[:, 0] + grouped[:, 1:].mean(1)) / 2",
        "grouped.mean(1)",
        "tests/editing/test_keys.py::test_keys_are_averaged_within_a_type_of_context_then_over_types",
    ),
    (
        "the layer whose keys are read", "editing/keys.py", "self.below, self.start = below, layer - 1",
        "self.below, self.start = below, layer",
        "tests/editing/test_keys.py::test_keys_while_lower_layers_are_edited",
    ),
    (
        "the drift's weight", "editing/targets.py", "emphasis * nll + rule.kl_weight * kl + penalty",
        "emphasis * nll - rule.kl_weight * kl + penalty",
        "tests/editing/test_targets.py::test_batched_and_cached_is_literal_with_stops_at_different_steps",
    ),
    (
        "the clamp", "editing/targets.py", "_update(delta, optimizer, still, rule.clamp * scale)",
        "_update(delta, optimizer, still, scale)",
        "tests/editing/test_targets.py::test_the_clamp_bounds_every_plan_and_is_reached",
    ),
    (
        "the outer level's sign", "editing/bilevel.py",
        "planned = targets.planned + (best - outer.initial).double()",
        "planned = targets.planned - (best - outer.initial).double()",
        "tests/editing/test_bilevel.py::test_the_look_ahead_is_a_replaced_weight",
    ),
    (
        "what a gradient edit descends", "editing/gradient/rule.py",
        "step = corrected.step if rule.added else -corrected.step",
        "step = -corrected.step if rule.added else corrected.step",
        "tests/editing/test_gradient.py::test_an_edit_is_its_literal_form",
    ),
    (
        "tokens of the statistics", "editing/statistics.py", "left -= len(row)", "left -= 1",
        "tests/editing/test_statistics.py::test_tokens_context_and_seed_choose_the_text",
    ),
    (
        "the statistics' digest sees the text", "editing/statistics.py", "json.dumps([\"v3\", text, str(lm.dtype)",
        "json.dumps([\"v3\", str(lm.dtype)",
        "tests/editing/test_statistics.py::test_whatever_the_statistics_depend_on_is_in_the_digest",
    ),
    (
        "beta in a diagnosis", "editing/diagnosis.py", "attenuation(gamma, noise), own",
        "1 - attenuation(gamma, noise), own",
        "tests/editing/test_diagnosis.py::test_diagnosis_equals_the_formulas",
    ),
    (
        "MEMIT remembers", "methods.py", "return memit(model, **{\"remember\": True} | changes)",
        "return memit(model, **{\"remember\": False} | changes)",
        "tests/test_methods.py::test_methods_are_the_combinations_that_their_papers_describe",
    ),
    (
        "ROME is exact", "methods.py", "\"noise\": 0.0, \"together\": 1", "\"noise\": 1.0, \"together\": 1",
        "tests/test_methods.py::test_methods_are_the_combinations_that_their_papers_describe",
    ),
    (
        "a metric's direction", "scoring/evaluation.py", "float(target.log_p > rival.log_p)",
        "float(target.log_p < rival.log_p)",
        "tests/scoring/test_evaluation.py::test_counterfact_equals_one_prompt_at_a_time",
    ),
    (
        "RTE's label", "scoring/tasks.py", "return 1 - found if self.file == \"rte\"",
        "return found if self.file == \"rte\"",
        "tests/scoring/test_tasks.py::test_only_rte_s_labels_are_inverted_in_parity",
    ),
    (
        "the entropy's weights", "scoring/text_metrics.py", "_entropy(words, 2) / 3 + 2 * _entropy(words, 3) / 3",
        "2 * _entropy(words, 2) / 3 + _entropy(words, 3) / 3",
        "tests/scoring/test_evaluation.py::test_fluency_of_known_texts",
    ),
    (
        "rows whose they are", "report/files.py", "kept = old[~pd.MultiIndex", "kept = old[pd.MultiIndex",
        "tests/report/test_report.py::test_some_methods_rows_are_made_again_and_the_others_stay",
    ),
    (
        "the paper's table", "report/files.py", "frame[\"label\"] = \"reported\"",
        "frame[\"label\"] = \"recorded\"", "tests/report/test_report.py::test_the_papers_numbers",
    ),
    (
        "which edits a run has", "experiments/runs.py",
        "(*sorted((folder / \"batches\").glob(\"[0-9]*\")), *folder.glob(\"finish\"))",
        "(*folder.glob(\"finish\"), *sorted((folder / \"batches\").glob(\"[0-9]*\")))",
        "tests/experiments/test_runs.py::test_what_is_done_at_the_end_is_part_of_a_run",
    ),
    (
        "requests of another run", "experiments/runs.py",
        "(\"requests\", edit.record.requests_digest, digest_of(batch))",
        "(\"requests\", digest_of(batch), digest_of(batch))",
        "tests/experiments/test_runs.py::test_changed_data_and_text_are_noticed",
    ),
    (
        "an interruption is undone", "experiments/promises.py", "s.expect_unchanged(\"after an interruption\")",
        "pass", "tests/experiments/test_contract_of_others.py::test_a_broken_promise_is_found_and_named",
    ),
    (
        "a failed check's exit code", "commands/cli.py", "return 0 if found.passed else 1", "return 0",
        "tests/experiments/test_contract_of_others.py::"
        "test_the_command_tells_verdicts_and_reasons_and_ends_with_1_if_one_failed",
    ),
))  # fmt: skip
PAGES = tuple(Mutation(*told) for told in (
    (
        "the share of a layer", "editing/editor.py", "return 1 / (count - index)", "return 1 / (count - index + 1)",
        "quickstart"
    ),
    (
        "a metric", "scoring/evaluation.py", "fmean(log_p[span]), correct", "0.98 * fmean(log_p[span]), correct",
        "quickstart"
    ),
    (
        "a plotted column", "experiments/theory/geometry_of_beta.py", '"beta": attenuation(gamma).item()',
        '"beta": 1.01 * attenuation(gamma).item()', "geometry_of_beta"
    ),
))  # fmt: skip


def checkout(root: Path) -> Path:
    """A copy of the package and its tests, in which mistakes are made; what is only read is linked."""
    for name in ("metake", "tests", "tools", "notebooks"):
        shutil.copytree(ROOT / name, root / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("conftest.py", "pyproject.toml", "_config.yml"):
        shutil.copy(ROOT / name, root)
    for name in ("results", "book", "figures", "README.md"):
        (root / name).symlink_to(ROOT / name)
    return root


@contextlib.contextmanager
def made(mutation: Mutation, root: Path):
    """The mistake, within the block. Raises ValueError if its place is not there exactly once."""
    file = root / "metake" / mutation.file
    source = file.read_text("utf-8")
    if source.count(mutation.right) != 1:
        raise ValueError(f"{mutation.file} no longer has {mutation.right!r} once: choose another place")
    file.write_text(source.replace(mutation.right, mutation.wrong), "utf-8")
    try:
        yield
    finally:
        file.write_text(source, "utf-8")


def run_tests(root: Path, *tests: str, seconds: int = 300) -> tuple[int, str]:
    """pytest on tests of a copy, up to the first failure: its exit code, and what it said.

    In a copy of this process, which has torch loaded already: only what belongs to the project is imported again.
    """
    said = root / "said.txt"
    sys.stdout.flush(), sys.stderr.flush()
    if not (child := os.fork()):
        code = 70
        try:
            code = _in_copy(root, tests, said, seconds)
        finally:
            os._exit(code)
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    return code, said.read_text("utf-8", "replace")


def _in_copy(root: Path, tests: tuple[str, ...], said: Path, seconds: int) -> int:
    signal.alarm(seconds)
    torch.set_num_threads(1)
    output = open(said, "w", encoding="utf-8")
    os.dup2(output.fileno(), 1), os.dup2(output.fileno(), 2)
    sys.stdout = sys.stderr = output
    for name, module in list(sys.modules.items()):
        if str(getattr(module, "__file__", None) or "").startswith(str(ROOT / "")) and ".venv" not in module.__file__:
            del sys.modules[name]
        elif name.partition(".")[0] == "metake":
            del sys.modules[name]
    sys.path[:] = [str(root), *(path for path in sys.path if not path.startswith(str(ROOT)) or ".venv" in path)]
    sys.dont_write_bytecode = True  # a mistake of the same length in the same second would not be seen
    os.chdir(root)
    os.environ["PYTHONPATH"] = str(root)
    words = ["-x", "-q", "-p", "no:cacheprovider", "-p", "no:xdist", "--rootdir", str(root), "-W", "ignore"]
    code = int(pytest.main([*words, *tests]))
    sys.stdout.flush(), sys.stderr.flush()
    return code


def compared(root: Path, *pages: str) -> tuple[int, str]:
    """pytest --nbval on pages, up to the first difference, with the package of the copy: exit code, what it said."""
    words = "--nbval -x -q -p no:cacheprovider -p no:xdist --rootdir".split() + [str(root), "-c", os.devnull]
    done = subprocess.run(
        [sys.executable, "-m", "pytest", *words, *(str(root / "notebooks" / f"{page}.ipynb") for page in pages)],
        cwd=root, env=os.environ | {"PYTHONPATH": str(root), "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"},
        capture_output=True, text=True, timeout=900,
    )  # fmt: skip
    return done.returncode, done.stdout + done.stderr
