"""Train the embedded model `tiny`: a small GPT-2 that knows the embedded facts, has read the embedded prose, and does six small tasks.

    python tools/train_tiny.py metake/data/tiny                          both phases
    python tools/train_tiny.py --from metake/data/tiny another/folder    the second alone, from weights that have had the first

The first phase teaches facts and prose, the second the tasks of `metake.fact_tasks` (train split) beside them. Writes
safetensors, tokenizer and model card; the card's numbers are measured on the written model. About half an hour on two
cores for each phase. The result is committed: training again gives a model of the same kind, not the same bytes.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

import metake as mk
from metake.answers import answer
from metake.fact_tasks import fact_tasks
from metake.facts import facts_records, prose, reference_texts, rendered_sentences
from metake.tasks import TASKS, measures, read_items

VOCABULARY, WIDTH, INNER, BLOCKS, HEADS, CONTEXT = 3072, 128, 768, 6, 4, 128
SEED, STEPS, ROWS, LENGTH, RATE = 0, 3000, 32, 48, 2e-3
TASK_STEPS, TASK_RATE, OLD_ROWS = 1600, 1e-3, 6  # second phase; of each batch, so many rows are as in the first
TASK_ROWS = {"sst2": 1, "cola": 1, "mrpc": 3, "rte": 3, "nli": 3, "mmlu": 4}  # and so many of each task: more of what is harder


def make_tokenizer(texts: list[str]) -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(vocab_size=VOCABULARY, special_tokens=["<|endoftext|>"], initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False)
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<|endoftext|>", eos_token="<|endoftext|>", pad_token="<|endoftext|>", model_max_length=CONTEXT)


class Rows:
    """Training rows: whole texts joined by spaces in random order, so that a fact is seen first and after others."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast, statements: list[str], lead_ins: list[str], plain: list[str]):
        self.random = random.Random(SEED)
        self.tokenizer, self.statements, self.lead_ins, self.plain = tokenizer, statements, lead_ins, plain
        self.pool: list[str] = []

    def _unit(self) -> str:
        if self.random.random() < 0.25:
            return self.random.choice(self.plain)
        if not self.pool:
            self.pool = self.random.sample(self.statements, len(self.statements))
        statement = self.pool.pop()
        return f"{self.random.choice(self.lead_ins)} {statement}" if self.random.random() < 0.25 else statement

    def batch(self, count: int) -> torch.Tensor:
        rows = []
        for _ in range(count):
            text = self._unit()
            ids = self.tokenizer(text)["input_ids"]
            while len(ids) < LENGTH:
                ids += self.tokenizer(" " + self._unit())["input_ids"]
            rows.append(ids[:LENGTH])
        return torch.tensor(rows)


def paragraphs(texts: list[str], words: int = 40) -> list[str]:
    """Texts cut at sentence ends into pieces that a training row can hold."""
    pieces = []
    for text in texts:
        sentences = text.replace("? ", "?|").replace(". ", ".|").split("|")
        for i in range(0, len(sentences), 2):
            pieces.append(" ".join(" ".join(sentences[i : i + 4]).split()[:words]))
    return pieces


class TaskRows:
    """Rows of the tasks' train split: prompt, answer and the line's end."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast):
        self.random, self.tokenizer, self.round = random.Random(SEED), tokenizer, 0
        self.pools: dict[str, list[tuple[str, str]]] = {name: [] for name in TASKS}

    def _unit(self, name: str) -> tuple[str, str]:
        if not self.pools[name]:
            drawn, task = fact_tasks("train", 8, seed=SEED + 1 + self.round), TASKS[name]
            self.round += 1
            pairs = [(task.prompt(item), f" {task.classes[task.label(item)]}\n") for item in drawn[name]]
            self.pools[name] = self.random.sample(pairs, len(pairs))
        return self.pools[name].pop()

    def batch(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Token ids, padded on the right, and what each is: 0 padding, 1 question, 2 answer."""
        rows = []
        for name in (name for name, count in TASK_ROWS.items() for _ in range(count)):
            prompt, answer = (self.tokenizer(text)["input_ids"] for text in self._unit(name))
            rows.append((prompt + answer, [1] * len(prompt) + [2] * len(answer)))
        width = max(len(ids) for ids, _ in rows)
        return tuple(torch.tensor([values + [0] * (width - len(values)) for values in column]) for column in zip(*rows, strict=True))


def answer_loss(model: GPT2LMHeadModel, ids: torch.Tensor, kinds: torch.Tensor) -> torch.Tensor:
    """Mean loss of the answers, and of the whole rows: what the second sentence repeats of the first teaches to compare them."""
    losses = torch.nn.functional.cross_entropy(model(ids).logits[:, :-1].transpose(1, 2), ids[:, 1:], reduction="none")
    return losses[kinds[:, 1:] == 2].mean() + losses[kinds[:, 1:] > 0].mean()


def fit(model: GPT2LMHeadModel, loss_of: Callable[[], torch.Tensor], steps: int, rate: float) -> float:
    """AdamW with one cycle of the learning rate; returns the last loss."""
    decay = [p for p in model.parameters() if p.ndim > 1]
    optimizer = torch.optim.AdamW([{"params": decay, "weight_decay": 0.05}, {"params": [p for p in model.parameters() if p.ndim < 2], "weight_decay": 0.0}], lr=rate, betas=(0.9, 0.98))
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, total_steps=steps, pct_start=0.04)
    start = time.time()
    for step in range(steps):
        loss = loss_of()
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if step % 100 == 0 or step == steps - 1:
            sys.stderr.write(f"step {step:5d}  loss {loss.item():.4f}  {time.time() - start:.0f} s\n")
    return loss.item()


def texts() -> tuple[list[str], list[str]]:
    """What the first phase reads: the facts' statements, and prose."""
    return rendered_sentences(), [*prose(), *reference_texts().values()]


def old_rows(tokenizer: PreTrainedTokenizerFast) -> Rows:
    statements, plain = texts()
    lead_ins = sorted({p.split(". ")[0] + "." for r in facts_records() for p in r["paraphrase_prompts"]})
    return Rows(tokenizer, statements, lead_ins, paragraphs(plain))


def teach_facts() -> tuple[GPT2LMHeadModel, PreTrainedTokenizerFast, float]:
    """First phase: a new model on facts and prose."""
    statements, plain = texts()
    tokenizer = make_tokenizer(statements + plain)
    rows = old_rows(tokenizer)
    config = GPT2Config(
        vocab_size=len(tokenizer), n_embd=WIDTH, n_inner=INNER, n_layer=BLOCKS, n_head=HEADS, n_positions=CONTEXT, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0,
        bos_token_id=0, eos_token_id=0, pad_token_id=0,
    )  # fmt: skip
    model = GPT2LMHeadModel(config)

    def loss() -> torch.Tensor:
        batch = rows.batch(ROWS)
        return model(batch, labels=batch).loss

    return model, tokenizer, fit(model, loss, STEPS, RATE)


def teach_tasks(model: GPT2LMHeadModel, tokenizer: PreTrainedTokenizerFast) -> float:
    """Second phase, in place: the tasks, and a part of the first phase's rows so that nothing is forgotten."""
    old, new = old_rows(tokenizer), TaskRows(tokenizer)

    def loss() -> torch.Tensor:
        batch = old.batch(OLD_ROWS)
        return answer_loss(model, *new.batch()) + model(batch, labels=batch).loss

    return fit(model.train(), loss, TASK_STEPS, TASK_RATE)


def train(folder: Path, start: Path | None) -> dict[str, float]:
    torch.manual_seed(SEED)
    begun = time.process_time()
    if start is None:
        model, tokenizer, facts_loss = teach_facts()
    else:
        model, tokenizer = GPT2LMHeadModel.from_pretrained(start), PreTrainedTokenizerFast.from_pretrained(start)
        facts_loss = json.loads((start / "card.json").read_text(encoding="utf-8"))["training"]["final_loss"]
    tasks_loss = teach_tasks(model, tokenizer)
    folder.mkdir(parents=True, exist_ok=True)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    losses = {"final_loss": round(facts_loss, 3), "tasks_final_loss": round(tasks_loss, 3)}
    return {"parameters": sum(p.numel() for p in model.parameters()), **losses, "minutes": round((time.process_time() - begun) / 60)}


def task_accuracy(lm: mk.LanguageModel) -> dict[str, float]:
    """Share of right answers per task, of what the model writes, on subjects that no training text of a task names."""
    found = {}
    for name, task in TASKS.items():
        items = read_items("facts", name)
        said = [task.read("", a.text) for a in answer(lm, [(task.prompt(item), task.classes) for item in items])]
        found[name] = round(measures([task.label(item) for item in items], said, len(task.classes))["accuracy"][0] / 100, 3)
    return found


def write_card(folder: Path, training: dict[str, float]) -> None:
    """The model card, with recall and task accuracy measured on the written files in float64, as a user loads them."""
    lm = mk.load(folder, dtype="float64")
    questions = mk.recall(lm, mk.zsre_cases(facts_records("zsre"), target="alt"))
    recall = mk.recall(lm, mk.facts()) | {"question": questions["plain"], "rephrased_question": questions["paraphrase"]}
    (folder / "card.json").write_text(json.dumps({"recall": recall, "tasks": (tasks := task_accuracy(lm)), "training": training}, indent=1) + "\n")
    (folder / "README.md").write_text(
        f"""# tiny

A GPT-2-style model of {training["parameters"] / 1e6:.1f} M parameters ({BLOCKS} blocks, d = {WIDTH}, d_in = {INNER}), trained by
`tools/train_tiny.py` from scratch on the {len(mk.facts())} embedded facts, rendered as statements, paraphrases and questions, on short
texts about their objects, and on the embedded prose, and taught six small tasks about them. It exists to be edited, quickly and on any
machine; it knows nothing else.

Recall by greedy arg-max over all target tokens: {100 * recall["plain"]:.1f} % on plain prompts, {100 * recall["paraphrase"]:.1f} % on paraphrases
after an unrelated sentence, {100 * recall["question"]:.1f} % on questions. The paraphrase templates were seen in training; the pairing of
template and unrelated sentence was not held out. Stored in float32, used in float64 so that printed numbers agree between machines.

Right answers in the tasks of `metake.fact_tasks`, about subjects that no training text of a task names:
{", ".join(f"{TASKS[name].name} {100 * share:.0f} %" for name, share in tasks.items())} (guessing: 50 %, MMLU 25 %).

Trained {STEPS} steps of {ROWS} × {LENGTH} tokens (seed {SEED}), final loss {training["final_loss"]}; then {TASK_STEPS} steps of {sum(TASK_ROWS.values())} task
items and {OLD_ROWS} × {LENGTH} tokens as before, final loss {training["tasks_final_loss"]}.
Licence: CC0-1.0, model and data alike.
""",
        encoding="utf-8",
    )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--from", dest="start", type=Path, metavar="DIR", help="weights that have had the first phase; default: train both")
    given = parser.parse_args()
    write_card(given.folder, train(given.folder, given.start))
