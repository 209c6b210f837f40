"""The help of `sp` and of its commands: options in groups, names unbroken, examples."""

from __future__ import annotations

import re
import shutil
import textwrap
from typing import Any

import typer
from typer.core import TyperCommand, TyperGroup

GROUPS: dict[str, tuple[str, ...]] = {
    "Model and data": (
        *("artifact", "model", "calibration", "calibrations", "data", "tasks", "samples"),
        *("length", "lengths", "seed", "cut_middle", "shape", "layers"),
        *("served_name", "url"),
    ),
    "Patterns": (
        *("policy", "policies", "k", "ks", "metric", "linkage", "min_size"),
        *("target_recall", "budget", "max_kl", "gamma", "gammas", "slack", "slacks"),
        *("tau", "taus", "delta", "deltas", "pivot_rows", "block_sizes", "density"),
        *("min_tokens", "max_density", "nonfinite", "precision", "fp8_error"),
    ),
    "Training": (
        *("code_size", "resolution", "hidden", "epochs", "patience", "batch_size"),
        "learning_rate",
    ),
    "Answer": (
        *("chat", "system", "max_new_tokens", "prefill_chunk"),
        *("decode", "decode_density"),
    ),
    "Measurement": (
        *("compare_dense", "recall", "measure", "times", "bins", "block_size"),
        *("map_blocks", "effect_tokens", "chunk", "dense", "repeats", "engine"),
        *("rates", "prompts", "output_tokens"),
    ),
    "Device": ("device", "dtype", "workers", "trust_remote_code"),
    "Selection": ("only", "shard", "listed", "file", "revision", "private"),
    "Output": (
        *("out", "work", "resume", "fresh", "update", "html", "plot", "markdown", "summary"),
        *("trace", "table", "as_json", "exit_code", "force", "dry_run"),
    ),
    "All commands": ("config", "quiet", "verbose", "help"),
}
"""Options by their parameters' names, which mean the same in all commands."""

COMMANDS: dict[str, tuple[str, ...]] = {
    "The three steps": ("calibrate", "cluster", "run"),
    "Look": ("inspect", "diff", "audit", "doctor"),
    "Measure": ("eval", "sweep", "bench", "bench-serve", "tune"),
    "Automate and share": ("regenerate", "train", "push", "pull"),
}

_WIDEST = 100
_NARROW = 72  # below it, what an option does stands under its name
_NAMES = 26  # columns for names, longer ones have a line of their own
_LONG_LIST = re.compile(r"\S{20,}")


class Command(TyperCommand):
    """A command whose help stands in groups, and whose errors name the file that is wrong."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Reads options and arguments."""
        try:
            return super().parse_args(ctx, args)
        except typer.BadParameter as error:
            name = getattr(error.param, "name", None)
            source = ctx.get_parameter_source(name) if name else None
            if name and source is not None and source.name == "DEFAULT_MAP":
                value = (ctx.default_map or {})[name]
                error.message += f" (the file given with --config has {value!r})"
            raise

    def get_help(self, ctx: Any) -> str:
        """The help, as wide as the terminal is."""
        records: dict[str, list[tuple[str, str]]] = {}
        for parameter in sorted(self.get_params(ctx), key=_place_of):
            record = parameter.get_help_record(ctx)
            if record is not None:
                records.setdefault(_group_of(parameter), []).append(record)
        titles = [title for title in ("Arguments", *GROUPS) if title in records]
        sections = [(title, records[title]) for title in titles]
        return _page(self.get_usage(ctx), self.help or "", sections)


class Group(TyperGroup):
    """`sp` itself: what each command does in whole sentences."""

    def get_help(self, ctx: Any) -> str:
        """The help, as wide as the terminal is."""
        sections = [
            (title, [(name, _first_sentence(self.commands[name].help or "")) for name in names])
            for title, names in COMMANDS.items()
        ]
        options = [parameter.get_help_record(ctx) for parameter in self.get_params(ctx)]
        sections.append(("Options", [record for record in options if record is not None]))
        return _page(self.get_usage(ctx), self.help or "", sections)


def _group_of(parameter: Any) -> str:
    if parameter.param_type_name == "argument":
        return "Arguments"
    return next(title for title, names in GROUPS.items() if parameter.name in names)


def _place_of(parameter: Any) -> int:
    """Where an option stands in its group; arguments keep their order."""
    if parameter.param_type_name == "argument":
        return 0
    return GROUPS[_group_of(parameter)].index(parameter.name)


def _first_sentence(text: str) -> str:
    return " ".join(text.partition("\n\n")[0].split())


def _page(usage: str, text: str, sections: list[tuple[str, list[tuple[str, str]]]]) -> str:
    width = min(shutil.get_terminal_size().columns, _WIDEST)
    lines = [" ".join(usage.split()), ""]
    for paragraph in text.split("\n\n"):
        # Lines that are set in are examples: they stay as they are.
        kept = any(line.startswith(" ") for line in paragraph.splitlines())
        lines += [*(paragraph.splitlines() if kept else _wrap(paragraph, width)), ""]
    for title, records in sections:
        lines += [f"{title}:", *_definitions(records, width), ""]
    return "\n".join(lines[:-1])


def _definitions(records: list[tuple[str, str]], width: int) -> list[str]:
    """Names and what they mean: beside each other, or under each other where it is narrow."""
    lines = []
    column = 6 if width < _NARROW else min(max(len(name) for name, _ in records), _NAMES) + 4
    for name, text in records:
        wrapped = _wrap(text, width, " " * column)
        if len(name) + 4 <= column and wrapped:
            wrapped[0] = f"  {name}".ljust(column) + wrapped[0][column:]
            lines += wrapped
        else:
            lines += [f"  {name}", *wrapped]
    return lines


def _wrap(text: str, width: int, indent: str = "") -> list[str]:
    """Lines of whole words: a name has hyphens, and a list without blanks has commas."""
    text = _LONG_LIST.sub(lambda word: word[0].replace(",", ", "), " ".join(text.split()))
    return textwrap.wrap(
        text,
        max(width, len(indent) + 1),
        initial_indent=indent,
        subsequent_indent=indent,
        break_long_words=False,
        break_on_hyphens=False,
    )
