"""Train the embedded model `tiny`: a small GPT-2 that knows the embedded facts and has read the embedded prose.

    python tools/train_tiny.py metake/data/tiny

Writes safetensors, tokenizer and model card; the card's numbers are measured on the written model. About half an hour
on two cores. The result is committed: training again gives a model of the same kind, not the same bytes.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import time
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

import metake as mk
from metake.facts import facts_records, prose, reference_texts, rendered_sentences

VOCABULARY, WIDTH, INNER, BLOCKS, HEADS, CONTEXT = 3072, 128, 768, 6, 4, 128
SEED, STEPS, ROWS, LENGTH, RATE = 0, 3000, 32, 48, 2e-3


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

    def batch(self) -> torch.Tensor:
        rows = []
        for _ in range(ROWS):
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


def train(folder: Path) -> dict[str, float]:
    torch.manual_seed(SEED)
    statements, plain = rendered_sentences(), [*prose(), *reference_texts().values()]
    tokenizer = make_tokenizer(statements + plain)
    lead_ins = sorted({p.split(". ")[0] + "." for r in facts_records() for p in r["paraphrase_prompts"]})
    rows = Rows(tokenizer, statements, lead_ins, paragraphs(plain))
    config = GPT2Config(
        vocab_size=len(tokenizer), n_embd=WIDTH, n_inner=INNER, n_layer=BLOCKS, n_head=HEADS, n_positions=CONTEXT, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0,
        bos_token_id=0, eos_token_id=0, pad_token_id=0,
    )  # fmt: skip
    model = GPT2LMHeadModel(config)
    decay = [p for p in model.parameters() if p.ndim > 1]
    optimizer = torch.optim.AdamW([{"params": decay, "weight_decay": 0.05}, {"params": [p for p in model.parameters() if p.ndim < 2], "weight_decay": 0.0}], lr=RATE, betas=(0.9, 0.98))
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, RATE, total_steps=STEPS, pct_start=0.04)
    start = time.time()
    for step in range(STEPS):
        batch = rows.batch()
        loss = model(batch, labels=batch).loss
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if step % 100 == 0 or step == STEPS - 1:
            sys.stderr.write(f"step {step:5d}  loss {loss.item():.4f}  {time.time() - start:.0f} s\n")
    folder.mkdir(parents=True, exist_ok=True)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return {"parameters": sum(p.numel() for p in model.parameters()), "final_loss": round(loss.item(), 3), "minutes": round((time.time() - start) / 60)}


def write_card(folder: Path, training: dict[str, float]) -> None:
    """The model card, with recall measured on the written files in float64, as a user loads them."""
    lm = mk.load(folder, dtype="float64")
    questions = mk.recall(lm, mk.zsre_cases(facts_records("zsre"), target="alt"))
    recall = mk.recall(lm, mk.facts()) | {"question": questions["plain"], "rephrased_question": questions["paraphrase"]}
    (folder / "card.json").write_text(json.dumps({"recall": recall, "training": training}, indent=1) + "\n")
    (folder / "README.md").write_text(
        f"""# tiny

A GPT-2-style model of {training["parameters"] / 1e6:.1f} M parameters ({BLOCKS} blocks, d = {WIDTH}, d_in = {INNER}), trained by
`tools/train_tiny.py` from scratch on the {len(mk.facts())} embedded facts, rendered as statements, paraphrases and questions, on short
texts about their objects, and on the embedded prose. It exists to be edited, quickly and on any machine; it knows nothing else.

Recall by greedy arg-max over all target tokens: {100 * recall["plain"]:.1f} % on plain prompts, {100 * recall["paraphrase"]:.1f} % on paraphrases
after an unrelated sentence, {100 * recall["question"]:.1f} % on questions. The paraphrase templates were seen in training; the pairing of
template and unrelated sentence was not held out. Stored in float32, used in float64 so that printed numbers agree between machines.

Trained {STEPS} steps of {ROWS} × {LENGTH} tokens (seed {SEED}), {training["minutes"]} minutes on two CPU cores, final loss {training["final_loss"]}.
Licence: CC0-1.0, model and data alike.
""",
        encoding="utf-8",
    )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("folder", type=Path)
    target = parser.parse_args().folder
    write_card(target, train(target))
