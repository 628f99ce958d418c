"""A process that has imported everything and forks a rank whenever it is asked to: starting one takes no seconds.

    {"command": ["launch/pretrain.py", ...], "stdin": "FILE", "env": {"RANK": "0", ...}, "kill_at": 7, "log": "FILE"}
                      -> the process id of a new rank
    {"ended": 1234}   -> its exit code, null while it runs

command: as of Python itself, a file or -c and a program. kill_at: the rank is killed (SIGKILL) when it is about to
touch the disk for the n-th time in saving; 0: never.
"""

import json
import os
import runpy
import signal
import sys
import traceback

import deepspeed.runtime.zero.muon.muon_optimizer  # noqa: F401 - of the engine's start: torch's compiler, seconds
import evaluations  # noqa: F401 - all that a rank imports, and more
import torch

import ddae.tools.replay  # noqa: F401
from ddae.distributed import checkpoint


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
        (checkpoint.atomic, "fsync"),
        (checkpoint.torch, "save"),
        (checkpoint.shutil, "rmtree"),
        (os, "rename"),
        (os, "replace"),
    ):
        setattr(owner, name, counted(getattr(owner, name)))


def run(task: dict) -> int:
    """The rank's exit code."""
    os.dup2(os.open(task["stdin"], os.O_RDONLY), 0)
    log = os.open(task["log"], os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(log, 1)
    os.dup2(log, 2)
    sys.stdin = os.fdopen(0, closefd=False)  # nothing of the tasks that this process has read ahead
    os.environ.update(task["env"])
    if task["kill_at"]:
        kill_at(task["kill_at"])
    elif torch.cuda.is_available():  # which a fork cannot use: it becomes a Python that starts anew
        os.execv(sys.executable, [sys.executable, *task["command"]])
    program, *words = task["command"]
    try:
        if program == "-c":
            sys.argv = [program, *words[1:]]
            exec(compile(words[0], "-c", "exec"), {"__name__": "__main__"})
        else:
            sys.argv = [program, *words]
            runpy.run_path(program, run_name="__main__")
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
        if "ended" in task:
            process, status = os.waitpid(task["ended"], os.WNOHANG)
            print(json.dumps(os.waitstatus_to_exitcode(status) if process else None), flush=True)
            continue
        child = os.fork()
        if child == 0:
            sys.exit(run(task))  # with all that a process does when it ends
        print(child, flush=True)
