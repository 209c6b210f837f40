"""One process of a tensor-parallel run: `python tensor_parallel.py FOLDER`, as torchrun starts it.

FOLDER holds a model, `clusters.st`, and `inputs.pt`: `input_ids`, and a list of sessions' options.
The process writes `rank<r>.pt`: for each of them the logits, and every layer's heads.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import torch

from shareprefill import share_prefill
from shareprefill.config import RuntimeConfig
from shareprefill.errors import ShareprefillError


@torch.no_grad()
def sessions(model: Any, folder: Path) -> list[dict[str, Any]]:
    """Runs the prompt under each of the options."""
    inputs = torch.load(folder / "inputs.pt")
    found = []
    for options in inputs["sessions"]:
        config = RuntimeConfig.from_dict(options)
        with share_prefill(model, folder / "clusters.st", config, measure_recall=True) as session:
            logits = model(input_ids=inputs["input_ids"]).logits
        found.append({"logits": logits, "layers": [vars(x) for x in session.report().layers]})
    return found


def main() -> None:
    """Runs as one process of the group."""
    from transformers import AutoModelForCausalLM
    from transformers.distributed import DistributedConfig

    folder, size = Path(sys.argv[1]), int(os.environ["WORLD_SIZE"])
    model = AutoModelForCausalLM.from_pretrained(
        folder, distributed_config=DistributedConfig(tp_size=size)
    )
    try:
        found: Any = sessions(model.eval(), folder)
    except ShareprefillError as error:
        found = str(error)
    torch.save(found, folder / f"rank{os.environ['RANK']}.pt")
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
