"""A process that has imported everything and forks a rank whenever it is asked to: starting one takes no seconds.

    {"words": [...], "env": {"RANK": "0", ...}, "kill_at": 7, "log": "FILE"} -> the process id of a new rank
    {"wait": 1234} -> its exit code, when it has ended

kill_at: the rank is killed (SIGKILL) when it is about to touch the disk for the n-th time in saving; 0: never.
"""

import json
import os
import signal
import sys
import traceback

import deepspeed.runtime.zero.muon.muon_optimizer  # noqa: F401 - of the engine's start: torch's compiler, seconds

import ddae.replay  # noqa: F401 - all that a rank imports, and more
from ddae import checkpoint, train
from ddae.cli import parse
from ddae.engine import stop_process_group
from ddae.errors import UserError


def kill_at(count: int) -> None:
    """SIGKILL before the count-th folder, file, flush, rename or removal."""
    left = [count]

    def counted(call):
        def wrapper(*args, **options):
            left[0] -= 1
            if left[0] == 0:
                os.kill(os.getpid(), signal.SIGKILL)
            return call(*args, **options)

        return wrapper

    for owner, name in (
        (checkpoint, "_make_empty"),
        (checkpoint, "save_file"),
        (checkpoint, "_flush"),
        (checkpoint.torch, "save"),
        (checkpoint.shutil, "rmtree"),
        (os, "rename"),
        (os, "replace"),
    ):
        setattr(owner, name, counted(getattr(owner, name)))


def run(task: dict) -> int:
    """The rank's exit code."""
    log = os.open(task["log"], os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(log, 1)
    os.dup2(log, 2)
    os.environ.update(task["env"])
    if task["kill_at"]:
        kill_at(task["kill_at"])
    try:
        train.pretrain(parse(task["words"]))
        stop_process_group()
    except UserError as error:
        print(f"ddae: {error}", flush=True)
        return 2
    except SystemExit as end:
        return int(end.code or 0)
    except BaseException:
        traceback.print_exc()
        return 1
    return 0


if __name__ == "__main__":
    print("ready", flush=True)
    for line in sys.stdin:
        task = json.loads(line)
        if "wait" in task:
            _, status = os.waitpid(task["wait"], 0)
            print(os.waitstatus_to_exitcode(status), flush=True)
            continue
        child = os.fork()
        if child == 0:
            code = run(task)
            sys.stdout.flush()
            os._exit(code)
        print(child, flush=True)
