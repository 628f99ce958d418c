"""One rank that pretrains and evaluates encoders. Reads commands from standard input, one JSON list a line:

["finetune", "--encoder", ...]   run a command of COMMANDS with these arguments; a UserError is printed after the
                                 word ERROR, and the next command is read
["copy_before", RUN, COPY, STEP] copy a finished run as if it had been killed before its checkpoint of this step
"""

import json
import shutil
import sys
from pathlib import Path

from ddae.config.cli import PRETRAINING, parse
from ddae.config.evaluation import FINETUNING, PROBING
from ddae.config.segmentation import SEGMENTATION
from ddae.config.tokenizer import TOKENIZING
from ddae.distributed.comm import barrier, is_main
from ddae.distributed.engine import stop_process_group
from ddae.distributed.logs import configure_logging
from ddae.errors import UserError
from ddae.eval.finetune import finetune
from ddae.eval.linear_probe import linear_probe
from ddae.eval.segmentation import segment
from ddae.train import pretrain
from ddae.train_tokenizer import train_tokenizer

COMMANDS = {
    "pretrain": (pretrain, PRETRAINING),
    "tokenizer": (train_tokenizer, TOKENIZING),
    "finetune": (finetune, FINETUNING),
    "segment": (segment, SEGMENTATION),
    "linear_probe": (linear_probe, PROBING),
}


def copy_before(run: str, copy: str, step: str) -> None:
    """Copy a finished run without its checkpoint of `step`. All ranks call it."""
    if is_main():
        shutil.copytree(run, copy)
        shutil.rmtree(Path(copy) / "checkpoints" / f"step_{int(step):08d}")
        (Path(copy) / "finished.json").unlink()
    barrier()


if __name__ == "__main__":
    configure_logging()
    for line in sys.stdin:
        name, *args = json.loads(line)
        if name == "copy_before":
            copy_before(*args)
            continue
        run, kind = COMMANDS[name]
        try:
            run(parse(args, kind))
        except UserError as error:
            print(f"ERROR {error}", flush=True)
    stop_process_group()
