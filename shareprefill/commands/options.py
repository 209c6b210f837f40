"""Options that several commands have."""

from __future__ import annotations

from typing import Annotated

import typer

ModelOption = Annotated[
    str, typer.Option("--model", help="Hub id, local folder, .gguf file, or the built-in sp-tiny.")
]
DeviceOption = Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1, ...")]
DtypeOption = Annotated[
    str, typer.Option(help="auto (float32 on a CPU), float32, bfloat16 or float16.")
]
RemoteCodeOption = Annotated[
    bool, typer.Option("--trust-remote-code", help="Run code from the model's repository.")
]
JsonOption = Annotated[bool, typer.Option("--json", help="Print one JSON object instead.")]
