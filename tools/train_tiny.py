"""Train the embedded model `tiny`: a small GPT-2 that knows the embedded facts, has read the embedded prose,
and does six small tasks.

    python tools/train_tiny.py metake/data/tiny                          both phases
    python tools/train_tiny.py another/folder --from metake/data/tiny    the second alone, from weights that have had
    the first
    python tools/train_tiny.py another/folder --from another/folder --known nli mrpc    the rest of it:
    the folder is written after each lesson

The first phase teaches facts and prose, the second the tasks of `metake.data.fact_tasks` (train split) beside them.
Writes safetensors, tokenizer and model card; the card's numbers are measured on the written model.
About half an hour on two cores for the first phase, more than an hour of one core for the second.
The result is committed: training again gives a model of the same kind, not the same bytes.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import time
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

import metake as mk
from metake.data.facts import facts_records, prose, reference_texts, rendered_sentences
from metake.experiments.studies.answers import answer
from metake.experiments.studies.items import measures, read_items
from metake.scoring.tasks import TASKS, lessons

VOCABULARY, WIDTH, INNER, BLOCKS, HEADS, CONTEXT = 3072, 128, 768, 6, 4, 128
SEED, STEPS, ROWS, LENGTH, RATE = 0, 3000, 32, 48, 2e-3
TASK_RATE, OLD_ROWS = 1e-3, 4  # second phase; of each batch, so many rows are as in the first
# each learnt only where it has most of the batch to itself, and from what the one before taught
LESSONS = ("nli", "mrpc", "rte", "mmlu")
# of the lesson, of each lesson learnt, and of the tasks that need none
NEW_ROWS, KNOWN_ROWS, EASY_ROWS = 24, 4, {"sst2": 2, "cola": 2}
# a lesson ends once that share of the last so many batches was right, or after so many
LEARNT, RECENT, LONGEST = 0.85, 40, 2500
REVISION, REVISED_ROWS = 800, 8  # in the end all of them alike, the step size falling to zero


def make_tokenizer(texts: list[str]) -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY, special_tokens=["<|endoftext|>"], initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<|endoftext|>", eos_token="<|endoftext|>", pad_token="<|endoftext|>",
        model_max_length=CONTEXT
    )


class Rows:
    """Training rows: whole texts joined by spaces in random order, so that a fact is seen first and after others."""

    def __init__(
        self, tokenizer: PreTrainedTokenizerFast, statements: list[str], lead_ins: list[str], plain: list[str]
    ):
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
            taught = lessons(8, seed=SEED + 1 + self.round)[name]
            self.round += 1
            self.pools[name] = self.random.sample(taught, len(taught))
        return self.pools[name].pop()

    def batch(self, counts: dict[str, int]) -> tuple[torch.Tensor, torch.Tensor]:
        """Token ids, so many rows of each task in order, padded on the right; and what each is: 0 padding, 1 question,
        2 answer.
        """
        rows = []
        for name in (name for name, count in counts.items() for _ in range(count)):
            question, right = self._unit(name)
            prompt, answer = (self.tokenizer(text)["input_ids"] for text in (question, f"{right}\n"))
            rows.append((prompt + answer, [1] * len(prompt) + [2] * len(answer)))
        width = max(len(ids) for ids, _ in rows)
        return tuple(
            torch.tensor([values + [0] * (width - len(values)) for values in column])
            for column in zip(*rows, strict=True)
        )


def answer_loss(model: GPT2LMHeadModel, ids: torch.Tensor, kinds: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean loss of the answers, and of the whole rows: what the second sentence repeats of the first teaches to
    compare them.

    And which rows' answers are right, as 0 or 1.
    """
    logits, asked, after = model(ids).logits[:, :-1], kinds[:, 1:], ids[:, 1:]
    losses = torch.nn.functional.cross_entropy(logits.transpose(1, 2), after, reduction="none")
    right = ((logits.argmax(-1) == after) | (asked != 2)).all(1).double()
    return losses[asked == 2].mean() + losses[asked > 0].mean(), right


def adamw(model: GPT2LMHeadModel, rate: float) -> torch.optim.AdamW:
    decay, plain = ([p for p in model.parameters() if (p.ndim > 1) == wide] for wide in (True, False))
    return torch.optim.AdamW(
        [{"params": decay, "weight_decay": 0.05}, {"params": plain, "weight_decay": 0.0}], lr=rate, betas=(0.9, 0.98)
    )


def fit(
    model: GPT2LMHeadModel, optimizer: torch.optim.Optimizer, schedule: torch.optim.lr_scheduler.LRScheduler,
    losses: Iterable[torch.Tensor]
) -> float:
    """A step for each loss, each computed after the step before; returns the last."""
    start, loss = time.time(), torch.zeros(())
    for step, loss in enumerate(losses):
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if step % 100 == 0:
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
        vocab_size=len(tokenizer), n_embd=WIDTH, n_inner=INNER, n_layer=BLOCKS, n_head=HEADS, n_positions=CONTEXT,
        resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0,
        bos_token_id=0, eos_token_id=0, pad_token_id=0,
    )  # fmt: skip
    optimizer = adamw(model := GPT2LMHeadModel(config), RATE)
    cycle = torch.optim.lr_scheduler.OneCycleLR(optimizer, RATE, total_steps=STEPS, pct_start=0.04)
    return (
        model, tokenizer,
        fit(
            model, optimizer, cycle,
            (model(batch, labels=batch).loss for batch in (rows.batch(ROWS) for _ in range(STEPS)))
        )
    )


def teach_tasks(
    model: GPT2LMHeadModel, tokenizer: PreTrainedTokenizerFast, known: Sequence[str], folder: Path
) -> float:
    """Second phase, in place: the tasks one after the other, and a part of the first phase's rows so that nothing is
    forgotten.

    known: lessons that the weights have had; folder: where the weights are kept after each lesson, for another sitting.
    Returns the last loss.
    """
    old, new = old_rows(tokenizer), TaskRows(tokenizer)

    def loss(counts: dict[str, int]) -> tuple[torch.Tensor, torch.Tensor]:
        batch, (asked, right) = old.batch(OLD_ROWS), answer_loss(model, *new.batch(counts))
        return asked + model(batch, labels=batch).loss, right

    def course() -> Iterator[torch.Tensor]:
        counts = dict.fromkeys(known, KNOWN_ROWS)
        for lesson in (name for name in LESSONS if name not in known):
            recent: deque[float] = deque(maxlen=RECENT)
            for step in range(LONGEST):
                asked, right = loss({lesson: NEW_ROWS, **EASY_ROWS, **counts})
                yield asked
                recent.append(right[:NEW_ROWS].mean().item())
                if sum(recent) > LEARNT * RECENT:
                    break
            sys.stderr.write(f"{lesson}: {sum(recent) / len(recent):.2f} after {step + 1} steps\n")
            counts[lesson] = KNOWN_ROWS
            model.save_pretrained(folder)

    optimizer = adamw(model.train(), TASK_RATE)  # one for all, since a new one's first steps would undo what was learnt
    fit(model, optimizer, torch.optim.lr_scheduler.LinearLR(optimizer, 0.01, 1.0, 100), course())
    for group in optimizer.param_groups:
        group["lr"] = TASK_RATE
    falling = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, REVISION)
    return fit(
        model, optimizer, falling, (loss(EASY_ROWS | dict.fromkeys(LESSONS, REVISED_ROWS))[0] for _ in range(REVISION))
    )


def train(folder: Path, start: Path | None, known: Sequence[str]) -> dict[str, float]:
    torch.manual_seed(SEED)
    begun, earlier = time.process_time(), 0
    if start is None:
        model, tokenizer, facts_loss = teach_facts()
    else:
        model, tokenizer = GPT2LMHeadModel.from_pretrained(start), PreTrainedTokenizerFast.from_pretrained(start)
        card = json.loads((start / "card.json").read_text(encoding="utf-8"))["training"]
        facts_loss, earlier = card["final_loss"], card["minutes"]

    def minutes() -> int:
        return earlier + round((time.process_time() - begun) / 60)

    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save_pretrained(folder)
    model.save_pretrained(folder)
    (folder / "card.json").write_text(json.dumps({"training": {"final_loss": facts_loss, "minutes": minutes()}}))
    tasks_loss = teach_tasks(model, tokenizer, known, folder)
    model.save_pretrained(folder)
    losses = {"final_loss": round(facts_loss, 3), "tasks_final_loss": round(tasks_loss, 3)}
    return {"parameters": sum(p.numel() for p in model.parameters()), **losses, "minutes": minutes()}


def task_accuracy(lm: mk.LanguageModel) -> dict[str, float]:
    """Share of right answers per task, of what the model writes, on subjects that no training text of a task names."""
    found = {}
    for name, task in TASKS.items():
        items = read_items("facts", name)
        said = [task.read("", a.text) for a in answer(lm, [(task.prompt(item), task.classes) for item in items])]
        found[name] = round(
            measures([task.label(item) for item in items], said, len(task.classes))["accuracy"][0] / 100, 3
        )
    return found


def write_card(folder: Path, training: dict[str, float]) -> None:
    """The model card, with recall and task accuracy measured on the written files in float64, as a user loads them."""
    lm = mk.load(folder, dtype="float64")
    questions = mk.recall(lm, mk.zsre_cases(facts_records("zsre"), target="alt"))
    recall = mk.recall(lm, mk.facts()) | {"question": questions["plain"], "rephrased_question": questions["paraphrase"]}
    (folder / "card.json").write_text(
        json.dumps({"recall": recall, "tasks": (tasks := task_accuracy(lm)), "training": training}, indent=1) + "\n"
    )
    (folder / "README.md").write_text(
        f"""# tiny

A GPT-2-style model of {training["parameters"] / 1e6:.1f} M parameters ({BLOCKS} blocks, d = {WIDTH}, d_in = {INNER}), trained by
`tools/train_tiny.py` from scratch on the {len(mk.facts())} embedded facts, rendered as statements, paraphrases and questions, on short
texts about their objects, and on the embedded prose, and taught six small tasks about them. It exists to be edited, quickly and on any
machine; it knows nothing else.

Recall by greedy arg-max over all target tokens: {100 * recall["plain"]:.1f} % on plain prompts, {100 * recall["paraphrase"]:.1f} % on paraphrases
after an unrelated sentence, {100 * recall["question"]:.1f} % on questions. The paraphrase templates were seen in training; the pairing of
template and unrelated sentence was not held out. Stored in float32, used in float64 so that printed numbers agree between machines.

Right answers in the tasks of `metake.data.fact_tasks`, about subjects that no training text of a task names:
{", ".join(f"{TASKS[name].name} {100 * share:.0f} %" for name, share in tasks.items())} (guessing: 50 %, MMLU 25 %).

Trained {STEPS} steps of {ROWS} × {LENGTH} tokens (seed {SEED}), final loss {training["final_loss"]}; then the
tasks, one lesson after the other and {REVISION} steps of them all, beside {OLD_ROWS} × {LENGTH} tokens as before, final loss {training["tasks_final_loss"]}.
Licence: CC0-1.0, model and data alike.
""",
        encoding="utf-8",
    )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument(
        "--from", dest="start", type=Path, metavar="DIR",
        help="weights that have had the first phase; default: train both"
    )
    parser.add_argument(
        "--known", nargs="+", choices=LESSONS, default=[],
        help="lessons of the second phase that these weights have had too"
    )
    given = parser.parse_args()
    if given.known and given.start is None:
        parser.error("--known speaks of the weights that --from names")
    write_card(given.folder, train(given.folder, given.start, given.known))
