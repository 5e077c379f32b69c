"""A model whose turns a test writes: what comes next follows from the text so far, in whatever order rows are asked."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

CALLS_TURN = "<|im_start|>assistant\n"
OUTPUT = re.compile(r"`{3,}output\n.*?\n`{3,}\n", flags=re.DOTALL)
ODD = "¤"
"""Stands for half of a character: a token that no text is tokenized to."""


class Turns:
    """Texts of the turns of each task, which is told by the number in the prompt's "task 0"."""

    def __init__(self, tokenizer: Any, scripts: Sequence[Sequence[str]]) -> None:
        self.tokenizer = tokenizer
        self.scripts = scripts

    def ids(self, text: str) -> list[int]:
        """Tokens of a text."""
        odd = self.tokenizer.encode(ODD)[1:]
        pieces = [self.tokenizer.encode(piece) for piece in text.split(ODD)]
        return pieces[0] + [token for piece in pieces[1:] for token in [*odd, *piece]]

    def rest(self, row: Sequence[int]) -> list[int]:
        """What is still to come of the turn that a row is in; the end of a turn where there is nothing."""
        text = self.tokenizer.decode(row)
        task = re.search(r"task (\d+)", text)
        if task is None:
            return [self.tokenizer.eos_token_id]
        *former, said = OUTPUT.split(text[text.index(CALLS_TURN) + len(CALLS_TURN) :])
        turn = len(former) + text.count(CALLS_TURN) - 1
        if CALLS_TURN in said:
            said = said.rpartition(CALLS_TURN)[2]
        script = self.scripts[int(task[1])]
        left = script[turn][len(said) :] if turn < len(script) else ""
        return self.ids(left) or [self.tokenizer.eos_token_id]

    def sample(self, row: Sequence[int], most: int, stop: Sequence[str] = ()) -> list[int]:
        """The rest as a generator gives it that stops at the end of a turn, at strings and after so many tokens."""
        ids = self.rest(row)[:most]
        for end in range(1, len(ids) + 1):
            text = self.tokenizer.decode(ids[max(0, end - 20) : end])
            if ids[end - 1] == self.tokenizer.eos_token_id or any(string in text for string in stop):
                return ids[:end]
        return ids
