"""Literal transcriptions of what the papers publish: d×d systems, one request at a time, full forwards.
Slow on purpose.

Columns as in the papers: keys K (d_in, n), residuals R (d_out, n), past keys Kₚ (d_in, N). Nothing here calls the part
of
the library that it checks: hooks, padding, positions, averaging and solves are written out again.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import pytest
import torch
from models import CONFIGS
from torch import Tensor
from torch.func import functional_call
from torch.linalg import inv, solve
from torch.nn.functional import kl_div
from transformers.pytorch_utils import Conv1D

from metake.data.requests import EditCase, EditRequest
from metake.editing.gradient.editor import GradientEditor
from metake.language.model import LanguageModel

CONTEXTS = ("{}", "I think that you are there. {}", "Because. {}")
REQUESTS = (
    EditRequest("The mother tongue of {} is", "Danielle Darrieux", "English", "late subject"),
    EditRequest("{} was born in", "Beyoncé", "Berlin, Madrid", "long target"),
    EditRequest("{} think that you are", "I", "there", "position 0"),
    EditRequest("The Boeing flies to {}", "Rome", "Paris because the word is French", "subject last"),
    EditRequest("The capital of {} is", "France", "a", "one token"),
)


def eye(d: int, device: torch.device | None = None) -> Tensor:
    return torch.eye(d, dtype=torch.float64, device=device)


# Solves, (d_out, d_in), and gates, (n, d_in)


def memit(K: Tensor, R: Tensor, C: Tensor, weight: float, Kp: Tensor | None = None) -> Tensor:
    """MEMIT eq. 14; with Kₚ the sequential variant of AlphaEdit's repository."""
    past = 0 if Kp is None else Kp @ Kp.T
    return R @ solve(weight * C + past + K @ K.T, K).T


def projector(C: Tensor, threshold: float) -> Tensor:
    """AlphaEdit's code: left singular vectors of C with singular value under the threshold."""
    U, S, _ = torch.linalg.svd(C)
    return U[:, S < threshold] @ U[:, S < threshold].T


def alphaedit_code(K: Tensor, R: Tensor, P: Tensor, ridge: float, Kp: Tensor) -> Tensor:
    return solve(P @ (K @ K.T + Kp @ Kp.T) + ridge * eye(len(K), K.device), P @ K @ R.T).T


def alphaedit_paper(K: Tensor, R: Tensor, P: Tensor, ridge: float, Kp: Tensor) -> Tensor:
    return R @ K.T @ P @ inv(Kp @ Kp.T @ P + K @ K.T @ P + ridge * eye(len(K)))


def alphaedit_projected(K: Tensor, R: Tensor, P: Tensor, ridge: float, Kp: Tensor) -> Tensor:
    K, Kp = P @ K, P @ Kp
    return R @ K.T @ inv(Kp @ Kp.T + ridge * eye(len(K)) + K @ K.T)


def pmet(K: Tensor, R: Tensor, C: Tensor, weight: float) -> Tensor:
    """PMET's code: the inverse itself."""
    return R @ K.T @ inv(K @ K.T + weight * C)


def rome(k: Tensor, r: Tensor, C: Tensor, at: Tensor | None = None) -> Tensor:
    """ROME: one request, (W + Δ) k = v exactly; at: the plain prompt's key, where k is a mean over contexts."""
    u = inv(C) @ k
    u = u / u.norm()
    return torch.outer(r, u) / (u @ (k if at is None else at))


def emmet(K: Tensor, R: Tensor, C: Tensor, ridge: float) -> Tensor:
    """EMMET as its optimality system: minimize tr(ΔCΔᵀ) + ‖ΔK − R‖²/ridge; ridge 0 is the equality constraint
    ΔK = R.
    """
    d, n = K.shape
    system = torch.cat([torch.cat([C, -K], 1), torch.cat([K.T, ridge * eye(n)], 1)])
    return solve(system, torch.cat([torch.zeros(d, len(R), dtype=K.dtype), R.T]))[:d].T


def malmen(K: Tensor, D: Tensor, ridge: float) -> Tensor:
    """MALMEN's normal equation in input space, K: (T, d_in), D: (T, d_out): Sᵀ with S = (KᵀK + λI)⁻¹KᵀD."""
    return torch.linalg.solve(K.T @ K + ridge * eye(K.shape[1]), K.T @ D).T


def gate_v1(K: Tensor, C: Tensor, ridge: float) -> Tensor:
    """MetaKE's first version, eq. 7."""
    return K.T @ inv(C + ridge * eye(len(K), K.device) + K @ K.T)


def gate_b3(K: Tensor, P: Tensor, ridge: float, Kp: Tensor) -> Tensor:
    """MetaKE v3 eq. 8 and B.3."""
    return K.T @ P @ inv(Kp @ Kp.T @ P + K @ K.T @ P + ridge * eye(len(K)))


def gate_key_only(K: Tensor, ridge: float) -> Tensor:
    """MetaKE's ablation without the structural gate."""
    return K.T @ inv(K @ K.T + ridge * eye(len(K)))


# What is done to a finished update, (d_out, d_in)


def rect_code(delta: Tensor, W: Tensor) -> Tensor:
    """RECT in AlphaEdit's repository: a change stays if it is not below the 60th percentile of the relative ones."""
    relative = torch.abs(delta / (W + 1e-8))
    threshold = relative.flatten().sort().values[delta.numel() * (100 - 40) // 100 - 1]
    return torch.where(relative < threshold, 0.0, delta)


def rect_original(delta: Tensor, W: Tensor) -> Tensor:
    """RECT's own code: the 80 % smallest relative changes are set to zero."""
    smallest = torch.abs(delta / W).flatten().argsort()[: int(delta.numel() * 0.8)]
    kept = delta.flatten().clone()
    kept[smallest] = 0.0
    return kept.view_as(delta)


def prune(W: Tensor, W0: Tensor, twice: bool = False) -> Tensor:
    """PRUNE: the weight at the end of a sequence; twice: the capped change is added to the edited weight
    (AlphaEdit's repository).
    """
    U, S, Vh = torch.linalg.svd(W - W0, full_matrices=False)
    largest = torch.linalg.svd(W0)[1].max()
    capped = torch.tensor(
        [float(largest + torch.log(s) - torch.log(largest)) if s >= largest else float(s) for s in S], dtype=W.dtype
    )
    return (W if twice else W0) + U @ torch.diag(capped) @ Vh


def sphere(delta: Tensor, W: Tensor, ratio: float, strength: float, transposed: bool = False) -> Tensor:
    """SPHERE's code on a weight stored as (d_out, d_in), as its paper has it; transposed: stored as GPT-2 does."""
    if transposed:
        return sphere(delta.T, W.T, ratio, strength).T
    unit = W / (W.norm(dim=1, keepdim=True) + 1e-8)
    values, vectors = torch.linalg.eigh(unit.T @ unit / len(unit))
    count = int((values.flip(0).cumsum(0) / values.sum() <= ratio).sum()) + 1
    U = vectors[:, -count:]
    return delta @ (eye(W.shape[1]) - strength * U @ U.T).T


# Models


class _Wider:
    """The module `torch`, except that its float32 is float64."""

    def __getattr__(self, name: str) -> Any:
        return getattr(torch, "float64" if name == "float32" else name)


@pytest.fixture
def double_inside(monkeypatch: pytest.MonkeyPatch) -> None:
    """Norms, softmaxes and GPT-J's attention compute in float32 whatever the model's dtype; here they do not.

    Otherwise two orders of summation that agree to 1e-15 may round apart there, and comparing to 1e-9 needs luck.
    """
    for kind in CONFIGS:
        monkeypatch.setattr(importlib.import_module(f"transformers.models.{kind}.modeling_{kind}"), "torch", _Wider())


@contextmanager
def unchanged(lm: LanguageModel) -> Iterator[None]:
    """Fails if a parameter, a buffer, a hook or a module's forward differs at the end, also after an error."""

    def look() -> tuple[dict[str, Tensor], list]:
        tensors = {k: t.clone() for k, t in (*lm.model.named_parameters(), *lm.model.named_buffers())}
        marks = [
            (len(m._forward_hooks), len(m._forward_pre_hooks), m.__dict__.get("forward"), m.training)
            for m in lm.model.modules()
        ]
        return tensors, [*marks, *(p.grad is None and not p.requires_grad for p in lm.model.parameters())]

    tensors, marks = look()
    try:
        yield
    finally:
        now, now_marks = look()
        assert marks == now_marks
        assert all(torch.equal(tensors[k], now[k]) for k in tensors | now)


def weight(lm: LanguageModel, layer: int) -> torch.nn.Parameter:
    return lm.model.get_submodule(lm.architecture.write.format(layer)).weight


def stored(lm: LanguageModel, layer: int, matrix: Tensor) -> Tensor:
    """A (d_out, d_in) matrix as the module keeps it."""
    return matrix.T if isinstance(lm.model.get_submodule(lm.architecture.write.format(layer)), Conv1D) else matrix


def padded(lm: LanguageModel, texts: Sequence[str]) -> dict[str, Tensor]:
    batch = lm.tokenizer(list(texts), return_tensors="pt", padding=True, padding_side="right")
    return {name: batch[name].to(lm.device) for name in ("input_ids", "attention_mask")}


def lookup(lm: LanguageModel, template: str, subject: str) -> int:
    return len(lm.tokenizer(template.split("{}")[0] + subject)["input_ids"]) - 1


def target_ids(lm: LanguageModel, request: EditRequest) -> list[int]:
    ids = lm.tokenizer(" " + request.target)["input_ids"]
    return ids[1:] if ids[0] in (lm.tokenizer.bos_token_id, lm.tokenizer.unk_token_id) else ids


def templates(request: EditRequest, contexts: Sequence[str]) -> list[str]:
    return [c.replace("{}", request.prompt) for c in contexts]


def rewriting(lm: LanguageModel, request: EditRequest, contexts: Sequence[str]) -> list[str]:
    """The prompt in each context, with the target but its last token."""
    taught = lm.tokenizer.decode(target_ids(lm, request)[:-1])
    return [t.replace("{}", request.subject) + taught for t in templates(request, contexts)]


def target_positions(lm: LanguageModel, batch: dict[str, Tensor], request: EditRequest) -> Iterator[tuple[int, int]]:
    """Row and first position that predicts the target, of every row: its m tokens are the last m of the unpadded
    row.
    """
    target = target_ids(lm, request)
    for row, length in enumerate(batch["attention_mask"].sum(1).tolist()):
        start = length - len(target)
        assert batch["input_ids"][row, start + 1 : length].tolist() == target[:-1]
        yield row, start


def target_nll(lm: LanguageModel, log_p: Tensor, batch: dict[str, Tensor], request: EditRequest) -> Tensor:
    """Mean over rows of the mean over target tokens."""
    target = target_ids(lm, request)
    rows = [
        -sum(log_p[row, start + j, y] for j, y in enumerate(target)) / len(target)
        for row, start in target_positions(lm, batch, request)
    ]
    return sum(rows) / len(rows)


@torch.no_grad()
def is_certain(lm: LanguageModel, log_p: Tensor, batch: dict[str, Tensor], request: EditRequest) -> bool:
    """PMET: whether the mean over rows of the target's geometric-mean probability is that of the likeliest tokens."""
    target, taught, best = target_ids(lm, request), [], []
    for row, start in target_positions(lm, batch, request):
        taught.append((sum(log_p[row, start + j, y] for j, y in enumerate(target)) / len(target)).exp())
        best.append((sum(log_p[row, start + j].max() for j in range(len(target))) / len(target)).exp())
    return bool(sum(taught) / len(taught) == sum(best) / len(best))


# others: self_attn.o_proj
ATTENTION = {"gpt2": "attn.c_proj", "gptj": "attn.out_proj", "gpt_neox": "attention.dense", "phi": "self_attn.dense"}


def planted(lm: LanguageModel, site: str, layer: int) -> list[torch.nn.Module]:
    """Where a vector is added: to the block's output (MEMIT), the MLP's (ROME), or both output projections' (PMET)."""
    row = lm.architecture
    attention = f"{row.block}.{ATTENTION.get(lm.model.config.model_type, 'self_attn.o_proj')}"
    paths = {"block": [row.block], "mlp": [row.mlp], "mlp+attention": [row.write, attention]}[site]
    return [lm.model.get_submodule(path.format(layer)) for path in paths]


def stage_one_texts(lm: LanguageModel, request: EditRequest, contexts: Sequence[str]) -> list[str]:
    """The rewriting rows, then the one that watches for drift."""
    return [*rewriting(lm, request, contexts), f"{request.subject} is a"]


def stage_one(
    lm: LanguageModel, request: EditRequest, contexts: Sequence[str], layer: int, rule
) -> tuple[Tensor, Tensor, list[float]]:
    """h, δ and the losses of one request: every row in full through the model, δ added by a hook at each lookup
    position.

    As the released code of the family computes it: the model's own logits of all rows and positions serve the KL,
    and the head is applied again to the last states of the rewriting rows for the likelihood. Of PMET's two vectors,
    the MLP's.
    """
    texts = stage_one_texts(lm, request, contexts)
    positions = [lookup(lm, t, request.subject) for t in (*templates(request, contexts), "{} is a")]
    batch = padded(lm, texts)
    rows = {k: v[:-1] for k, v in batch.items()}
    modules = planted(lm, rule.site, layer)
    deltas = [
        torch.zeros(lm.model.config.hidden_size, dtype=torch.float64, device=lm.device, requires_grad=True)
        for _ in modules
    ]
    optimizer = torch.optim.Adam(deltas, lr=rule.step_size)
    first: dict[Any, Tensor] = {}

    def plant(module, _, output):
        state, which = output[0] if isinstance(output, tuple) else output, modules.index(module)
        first.setdefault(which, state[0, positions[0]].detach().clone())
        moved = state.clone()
        for row, position in enumerate(positions):
            moved[row, position] += deltas[which]
        return (moved, *output[1:]) if isinstance(output, tuple) else moved

    losses, emphasis = [], 1.0
    head = lm.model.get_output_embeddings()
    handles = (
        *(m.register_forward_hook(plant) for m in modules),
        head.register_forward_pre_hook(lambda _, args: first.update(last=args[0])),
    )
    try:
        for step in range(rule.steps):
            optimizer.zero_grad()
            now = torch.log_softmax(lm.model(**batch).logits[-1, positions[-1]], dim=-1)
            log_p = torch.log_softmax(head(first["last"][:-1]), dim=-1)
            before = first.setdefault("p", now.detach().clone())
            kl = kl_div(before, now, log_target=True, reduction="sum")
            loss = emphasis * target_nll(lm, log_p, rows, request) + rule.kl_weight * kl
            loss = loss + rule.decay * sum(
                delta.norm() / first[which].norm() ** 2 for which, delta in enumerate(deltas)
            )
            losses.append(loss.item())
            if loss < rule.stop_below:
                break
            if rule.relax is not None:
                emphasis = rule.relax if is_certain(lm, log_p, rows, request) else 1.0
                if emphasis != 1.0 and (rule.kl_weight * kl if rule.drift_weighted else kl) <= rule.drift_below:
                    break
            if step == rule.steps - 1:
                break
            loss.backward()
            optimizer.step()
            for which, delta in enumerate(deltas):
                limit = rule.clamp * first[which].norm()
                if delta.norm() > limit:
                    with torch.no_grad():
                        delta *= limit / delta.norm()
    finally:
        for handle in handles:
            handle.remove()
    return first[0], deltas[0].detach(), losses


class Seen(NamedTuple):
    """At the subject's last token."""

    key: Tensor
    block: Tensor
    mlp: Tensor


def at_lookup(
    lm: LanguageModel, template: str, subject: str, layer: int, edited: dict[str, Tensor] | None = None
) -> Seen:
    """Input of the write module and outputs of block and MLP at the subject's last token; one full prompt,
    one full forward, with weights replaced.
    """
    found, position = {}, lookup(lm, template, subject)
    write, block, mlp = (
        lm.model.get_submodule(path.format(layer))
        for path in (lm.architecture.write, lm.architecture.block, lm.architecture.mlp)
    )
    handles = [
        write.register_forward_pre_hook(lambda _, args: found.update(key=args[0][0, position].clone())),
        block.register_forward_hook(
            lambda _, __, out: found.update(block=(out[0] if isinstance(out, tuple) else out)[0, position].clone())
        ),
        mlp.register_forward_hook(lambda _, __, out: found.update(mlp=out[0, position].clone())),
    ]
    functional_call(lm.model, edited or {}, kwargs=padded(lm, [template.replace("{}", subject)]))
    for handle in handles:
        handle.remove()
    return Seen(**found)


def keys(
    lm: LanguageModel, requests: Sequence[EditRequest], contexts: Sequence[str], layer: int,
    edited: dict[str, Tensor] | None = None
) -> Tensor:
    """K, (d_in, n): averaged within a type of context (the plain prompt; the others), then over types."""
    columns = []
    for r in requests:
        plain, *others = (at_lookup(lm, t, r.subject, layer, edited).key for t in templates(r, contexts))
        columns.append((plain + sum(others) / len(others)) / 2 if others else plain)
    return torch.stack(columns, 1)


@torch.no_grad()
def key_pass(lm: LanguageModel, requests: Sequence[EditRequest], contexts: Sequence[str], layer: int) -> Tensor:
    """Inputs of the write module at the subject's last token, (rows, d_in): the released code's pass for one layer,
    all rows padded, to the logits.
    """
    texts = [(t, r.subject) for r in requests for t in templates(r, contexts)]
    found, positions = {}, [lookup(lm, t, subject) for t, subject in texts]
    write = lm.model.get_submodule(lm.architecture.write.format(layer))
    handle = write.register_forward_pre_hook(
        lambda _, args: found.update(keys=args[0][range(len(texts)), positions].clone())
    )
    lm.model(**padded(lm, [t.replace("{}", subject) for t, subject in texts]))
    handle.remove()
    return found["keys"]


def states(
    lm: LanguageModel, requests: Sequence[EditRequest], layer: int, of: str = "block",
    edited: dict[str, Tensor] | None = None
) -> Tensor:
    """H, (d, n), of the plain prompts: outputs of the block, or of its MLP."""
    return torch.stack([getattr(at_lookup(lm, r.prompt, r.subject, layer, edited), of) for r in requests], 1)


@contextmanager
def kept(lm: LanguageModel, layers: Sequence[int]) -> Iterator[None]:
    """Whatever is written to these weights is taken back."""
    originals = {layer: weight(lm, layer).detach().clone() for layer in layers}
    try:
        yield
    finally:
        for layer, original in originals.items():
            weight(lm, layer).data.copy_(original)


def write(lm: LanguageModel, layer: int, delta: Tensor) -> None:
    weight(lm, layer).data += stored(lm, layer, delta)


def plain_weight(lm: LanguageModel, layer: int) -> Tensor:
    """W, (d_out, d_in)."""
    return stored(lm, layer, weight(lm, layer).detach()).clone()


Update = Callable[[int, Tensor, Tensor], Tensor]  # layer, K, R → Δ
Batch = tuple[dict[int, Tensor], dict[int, Tensor]]  # Δ and K per layer


def stage_two(
    lm: LanguageModel, requests: Sequence[EditRequest], contexts: Sequence[str], layers: Sequence[int], Z: Tensor,
    update: Update,
    share: Callable[[int], float] = lambda left: 1 / left, of: str = "block",
) -> Batch:  # fmt: skip
    """The shared loop: reread everything, a share of the residual by how many layers are left, d×d solve, write."""
    deltas, all_keys = {}, {}
    with kept(lm, layers):
        for i, layer in enumerate(layers):
            all_keys[layer] = keys(lm, requests, contexts, layer)
            R = (Z - states(lm, requests, layers[-1], of)) * share(len(layers) - i)
            deltas[layer] = update(layer, all_keys[layer], R)
            write(lm, layer, deltas[layer])
    return deltas, all_keys


def blue(
    lm: LanguageModel, requests: Sequence[EditRequest], contexts: Sequence[str], layers: Sequence[int],
    targets: Callable[[int], Tensor], update: Update
) -> Batch:
    """BLUE's loop: each layer has targets of its own, (d, n), on the model that the layers before have changed,
    and the whole residual.
    """
    deltas, all_keys = {}, {}
    with kept(lm, layers):
        for layer in layers:
            Z = targets(layer)
            all_keys[layer] = keys(lm, requests, contexts, layer)
            deltas[layer] = update(layer, all_keys[layer], Z - states(lm, requests, layer))
            write(lm, layer, deltas[layer])
    return deltas, all_keys


def rome_one_by_one(
    lm: LanguageModel, requests: Sequence[EditRequest], contexts: Sequence[str], layer: int, rule, C: Tensor
) -> Batch:
    """ROME's list of requests: each one on the model that those before have edited; k̄ a flat mean,
    exact at the plain prompt's key.
    """
    total, means = 0, []
    with kept(lm, [layer]):
        for r in requests:
            means.append(sum(at_lookup(lm, t, r.subject, layer).key for t in templates(r, contexts)) / len(contexts))
            h, delta, _ = stage_one(lm, r, contexts, layer, rule)
            plain = at_lookup(lm, r.prompt, r.subject, layer)
            update = rome(means[-1], h + delta - plain.mlp, C, plain.key)
            write(lm, layer, update)
            now = at_lookup(lm, r.prompt, r.subject, layer).mlp
            assert (now - h - delta).abs().max() < 1e-9, "(W + Δ) k = v"
            total = total + update
    return {layer: total}, {layer: torch.stack(means, 1)}


def drift(lm: LanguageModel, request: EditRequest, weights: dict[str, Tensor], position: str) -> Tensor:
    """Next-token log-probabilities of "{subject} is a", at the subject's last token or at the end."""
    logits = functional_call(lm.model, weights, kwargs=padded(lm, [f"{request.subject} is a"])).logits[0]
    return torch.log_softmax(logits, -1)[lookup(lm, "{} is a", request.subject) if position == "subject" else -1]


Edited = Callable[[Tensor], dict[str, Tensor]]  # V, (d, n) → the weights of the virtually edited model, by name


def last_layer(lm: LanguageModel, layer: int, H: Tensor, M: Tensor) -> Edited:
    """MetaKE's look-ahead: W_L really replaced by W_L + (V − H) M."""
    name = lm.architecture.write.format(layer) + ".weight"
    return lambda V: {name: weight(lm, layer) + stored(lm, layer, (V - H) @ M)}


def all_layers(
    lm: LanguageModel, requests: Sequence[EditRequest], contexts: Sequence[str], layers: Sequence[int], update: Update
) -> Edited:
    """`stage_two` towards V with weights replaced instead of written: what is read of one layer depends on V."""

    def edit(V: Tensor) -> dict[str, Tensor]:
        edited: dict[str, Tensor] = {}
        for i, layer in enumerate(layers):
            K, H = keys(lm, requests, contexts, layer, edited), states(lm, requests, layers[-1], edited=edited)
            delta = update(layer, K, (V - H) / (len(layers) - i))
            edited[lm.architecture.write.format(layer) + ".weight"] = weight(lm, layer) + stored(lm, layer, delta)
        return edited

    return edit


def refinement(
    lm: LanguageModel, requests: Sequence[EditRequest], contexts: Sequence[str], initial: Tensor, edit: Edited, rule
) -> tuple[Tensor, Tensor]:
    """MetaKE's outer level on a model whose weights are replaced: V, (d, n), and the losses, (steps + 1, n, 3)."""
    contexts = contexts if rule.prompts == "contexts" else ("{}",)
    before = [drift(lm, r, {}, rule.locality_position).detach() for r in requests]
    V = initial.clone().requires_grad_()
    optimizer = {"adam": torch.optim.Adam, "sgd": torch.optim.SGD}[rule.optimizer]([V], lr=rule.step_size)
    tried, history = [], []
    for _ in range(rule.steps + 1):
        optimizer.zero_grad()
        edited = {name: W if rule.feedback else W.detach() for name, W in edit(V).items()}
        losses = torch.stack(
            [
                outer_loss(lm, r, contexts, edited, before[i], V[:, i], initial[:, i], rule)
                for i, r in enumerate(requests)
            ]
        )
        tried.append(V.detach().clone())
        history.append(losses.detach())
        (losses * losses.new_tensor([rule.edit_weight, rule.locality_weight, rule.anchor_weight])).sum().backward()
        if len(history) <= rule.steps:
            optimizer.step()
    totals = [h.sum(0) @ h.new_tensor([rule.edit_weight, rule.locality_weight, rule.anchor_weight]) for h in history]
    kept = rule.steps if rule.keep == "last" else min(range(len(totals)), key=lambda i: totals[i])
    return tried[kept], torch.stack(history)


def outer_loss(
    lm: LanguageModel, request: EditRequest, contexts: Sequence[str], edited: dict[str, Tensor], before: Tensor,
    v: Tensor, v_init: Tensor, rule
) -> Tensor:
    """L_edit, L_loc and L_reg of one request on the virtually edited model."""
    batch = padded(lm, rewriting(lm, request, contexts))
    log_p = torch.log_softmax(functional_call(lm.model, edited, kwargs=batch).logits, -1)
    after = drift(lm, request, edited, rule.locality_position)
    p, q = (after, before) if rule.locality_direction == "post_pre" else (before, after)
    scale = {"sum": 1, "mean": len(v), "relative": (v_init**2).sum()}[rule.anchor_norm]
    return torch.stack(
        [target_nll(lm, log_p, batch, request), (p.exp() * (p - q)).sum(), ((v - v_init) ** 2).sum() / scale]
    )


def answer_ids(lm: LanguageModel, text: str) -> list[int]:
    return lm.tokenizer(f" {text}", add_special_tokens=False)["input_ids"]


def probe_texts(lm: LanguageModel, case: EditCase) -> list[list[str]]:
    """Per probe its rows: with a rival, the prompt with either object; without, with every beginning of the answer."""
    found = []
    for probe in case.probes:
        if probe.kind != "generation":
            ids = answer_ids(lm, probe.target)
            starts = (
                ["", *(lm.tokenizer.decode(ids[:j]) for j in range(1, len(ids)))]
                if probe.rival is None
                else [f" {probe.target}", f" {probe.rival}"]
            )
            found.append([probe.prompt + start for start in starts])
    return found


@torch.no_grad()
def evaluation(lm: LanguageModel, case: EditCase) -> list[tuple[list[float], list[bool]]]:
    """One case as released code evaluates it: all its rows in one padded batch, logits at every position.

    Per probe: with a rival, a row for either object, the mean NLL of the target and of the rival,
    and which tokens of the target are the arg-max; without, a row for every beginning of the answer,
    and which next token is the arg-max.
    """
    asked, texts = [probe for probe in case.probes if probe.kind != "generation"], probe_texts(lm, case)
    answers = [[answer_ids(lm, s) for s in (probe.target, probe.rival) if s is not None] for probe in asked]
    batch = padded(lm, [text for own in texts for text in own])
    log_p, lengths = torch.log_softmax(lm.model(**batch).logits, -1), batch["attention_mask"].sum(1).tolist()
    found, row = [], 0
    for probe, ids, own in zip(asked, answers, texts, strict=True):
        if probe.rival is None:
            found.append(
                ([], [log_p[row + j, lengths[row + j] - 1].argmax().item() == y for j, y in enumerate(ids[0])])
            )
        else:
            first = len(lm.tokenizer(probe.prompt)["input_ids"]) - 1
            means = [
                -sum(log_p[row + i, first + j, y].item() for j, y in enumerate(tokens)) / len(tokens)
                for i, tokens in enumerate(ids)
            ]
            found.append((means, [log_p[row, first + j].argmax().item() == y for j, y in enumerate(ids[0])]))
        row += len(own)
    return found


def gradient_steps(lm: LanguageModel, requests: Sequence[EditRequest], editor: GradientEditor) -> dict[str, Tensor]:
    """An edit of the gradient family, prompt by prompt, token by token: sums of outer products, or MALMEN's equation.

    Slopes by ordinary gradients: inputs by a hook, output gradients by retaining them.
    """
    rule, total = editor.rule, {path: torch.zeros_like(lm.weight(path)) for path in editor.modules}
    with kept_modules(lm, editor.modules):
        for j in range(rule.steps):
            rows = {path: [] for path in editor.modules}
            for request in requests:
                for path, found in token_slopes(lm, request, editor.modules, rule.tokens).items():
                    rows[path] += found
            sizes = list(dict.fromkeys(lm.shape(path) for path in editor.modules))
            for path in editor.modules:
                K, g = (torch.stack(part) for part in zip(*rows[path], strict=True))
                shape = sizes.index(lm.shape(path))
                alike = [p for p in editor.modules if lm.shape(p) == lm.shape(path)]
                x = torch.cat([K, g], 1)
                if rule.living:
                    seen = torch.cat([torch.cat([torch.stack(part) for part in zip(*rows[p], strict=True)], 1)
                                      for p in alike])  # fmt: skip
                    y, eta, ridge = (x - seen.mean(0)) / (seen.std(0) + 1e-7), rule.step, 1.0
                else:
                    network, place = editor.networks[j][shape], alike.index(path)
                    n, mean, squares = network.table
                    y = (x - mean) / ((squares / (n - 1)).sqrt() + 1e-7)
                    eta, ridge = network.step[place].item(), network.log_ridge[place].exp().item()
                    for A, B, c, s, o in zip(network.down, network.up, network.bias, network.scale, network.shift,
                                             strict=True):  # fmt: skip
                        inner = (y @ A @ B + c) * s[place] + o[place] if rule.inside else y @ A @ B + c
                        grown = torch.where(inner > 0, inner, torch.zeros_like(inner))
                        y = (y + grown if rule.inside else y + s[place] * grown + o[place]).detach()
                k2, g2 = y[:, : K.shape[1]], y[:, K.shape[1] :]
                if rule.solve == "sum":
                    delta = -eta * sum(torch.outer(b, a) for a, b in zip(k2, g2, strict=True))
                else:
                    first = K if rule.coefficient == "raw" else k2
                    D = torch.stack([-eta * (a @ b) * c for a, b, c in zip(first, k2, g2, strict=True)])
                    delta = malmen(K, D, ridge)
                total[path] += delta
            for path in editor.modules:
                lm.write_weight(path, lm.original[path] + total[path])
    return total


@contextmanager
def kept_modules(lm: LanguageModel, modules: Sequence[str]) -> Iterator[None]:
    """The weights of these modules, put back afterwards; meanwhile `lm.original` has them."""
    lm.original = {path: lm.weight(path).clone() for path in modules}
    try:
        yield
    finally:
        for path, weight in lm.original.items():
            lm.write_weight(path, weight)
        del lm.original


def token_slopes(
    lm: LanguageModel, request: EditRequest, modules: Sequence[str], tokens: str
) -> dict[str, list[tuple[Tensor, Tensor]]]:
    """(input, gradient of the mean −log p of the answer at the output) at each token of one prompt and answer."""
    prompt = lm.tokenizer(request.text)["input_ids"]
    answer = target_ids(lm, request)
    ids, seen, handles = torch.tensor([prompt + answer[:-1]]), {}, []
    for path in modules:
        def hook(_: Any, args: tuple, out: Tensor, path: str = path) -> Tensor:
            leaf = out.detach().clone().requires_grad_() if not out.requires_grad else out
            leaf.retain_grad()
            seen[path] = (args[0].detach()[0], leaf)
            return leaf

        handles.append(lm.model.get_submodule(path).register_forward_hook(hook))
    try:
        logits = lm.model(ids).logits[0]
    finally:
        for handle in handles:
            handle.remove()
    log_p = torch.log_softmax(logits, -1)
    first = len(prompt) - 1
    loss = -sum(log_p[first + i, token] for i, token in enumerate(answer)) / len(answer)
    loss.backward()
    places = range(first, first + len(answer)) if tokens == "answer" else range(ids.shape[1])
    return {path: [(inputs[i], out.grad[0, i]) for i in places] for path, (inputs, out) in seen.items()}
