"""Generated long-context tasks: prompts of an exact token length whose right answer is known.

`retr_kv`, `retr_passkey`, `retr_number`, `math_find` and `code_run` have the format of
InfiniteBench (Zhang et al., 2024); `needle` and `variable_tracking` follow RULER's tasks of
those names, and the `niah_` tasks its needle family (Hsieh et al., 2024). `text` is plain
documentation, without a question.
"""

from __future__ import annotations

from shareprefill.calib.tasks.example import Example
from shareprefill.calib.tasks.generation import NIAH_TASKS, TASKS, generate
from shareprefill.calib.tasks.scoring import score

__all__ = ["NIAH_TASKS", "TASKS", "Example", "generate", "score"]
