"""Requests and cases as a user's turn in a chat, by the tokenizer's own chat template."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from typing import Any

from metake.data.requests import Cases, EditCase, EditRequest
from metake.language.model import LanguageModel
from metake.language.tokens import in_context
from metake.support.errors import ParameterError


def chat(lm: LanguageModel, asked: Iterable[EditRequest] | Iterable[EditCase]) -> list[EditRequest] | list[EditCase]:
    """Requests or cases as a chat model is asked: each prompt the user's turn, the target the beginning of the answer.

    The chat template becomes the requests' `frame`, inside which context templates and the locality prompt stand too;
    probes' prompts are rendered. Between prompt and target stands what the template has there, no white space of the
    prompt's. Returns a list, or Cases for Cases; what is a chat stays. Raises ParameterError if no template does this.
    """
    frame, seam = _template(lm)

    def turned(item: Any) -> Any:
        request = item.request if isinstance(item, EditCase) else item
        if request.frame == frame:
            return item
        if item is request:
            return replace(request, prompt=request.prompt.strip(), frame=frame, seam=seam)
        probes = [replace(p, prompt=in_context(frame, p.prompt.strip()), seam=seam) for p in item.probes]
        return EditCase(turned(request), tuple(probes), tuple(map(turned, item.more)))

    found = list(map(turned, asked))
    return Cases(found, *vars(asked).values()) if isinstance(asked, Cases) else found


def _template(lm: LanguageModel) -> tuple[str, str | None]:
    """What a chat template writes around a user's turn, and its seam to the answer, if it tells."""
    turns = [{"role": "user", "content": "{}"}, {"role": "assistant", "content": "Rome"}]
    try:
        write = lm.tokenizer.apply_chat_template
        frame = write(turns[:1], tokenize=False, add_generation_prompt=True)
        whole = write(turns, tokenize=False)
        if frame.count("{}") != 1:
            raise ValueError(f"its template writes {frame!r:.200} around a turn {{}}")
    except Exception as error:  # the template's own, of many classes
        raise ParameterError(
            f"{lm.name!r} cannot be asked as a chat ({' '.join(str(error).split()):.120}); expected a tokenizer whose "
            "chat template writes a turn once: set lm.tokenizer.chat_template, or leave chat out"
        ) from error
    between = whole.removeprefix(frame).partition("Rome")[0] if whole.startswith(frame) else None
    return frame, between if between in ("", " ") else None
