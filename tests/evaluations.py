"""As a program it is one rank that evaluates encoders: it reads lists of words from its standard input, one a line, the
first of them the command's name."""

import json
import sys

from ddae.cli import Kind, parse
from ddae.engine import stop_process_group
from ddae.errors import UserError
from ddae.eval.finetune import finetune
from ddae.eval.linear_probe import linear_probe
from ddae.eval.recipes import FinetuneConfig, ProbeConfig, check_finetune, check_probe, probe_recipe, recipe

COMMANDS = {
    "finetune": (finetune, Kind(FinetuneConfig, recipe, check_finetune)),
    "linear_probe": (linear_probe, Kind(ProbeConfig, probe_recipe, check_probe)),
}

if __name__ == "__main__":
    for line in sys.stdin:
        name, *words = json.loads(line)
        run, kind = COMMANDS[name]
        try:
            run(parse(words, kind))
        except UserError as error:
            print(f"MISTAKE {error}", flush=True)
    stop_process_group()
