"""Fork server: a process that has imported everything forks a rank on request, so that no rank spends time on imports.

Requests on standard input, one JSON object a line, and the answers on standard output:

    {"command": ["launch/pretrain.py", ...], "stdin": "FILE", "env": {"RANK": "0", ...}, "kill_at": 7, "log": "FILE"}
                        -> process id of the new rank
    {"wait_for": 1234}  -> exit code of that process, null while it runs

command: arguments of Python, a file or -c and a program. kill_at: send the rank SIGKILL before its n-th disk operation
of a save; 0: never.
"""

import json
import os
import runpy
import signal
import sys
import traceback

import deepspeed.runtime.zero.muon.muon_optimizer  # noqa: F401 - the engine imports it at start; it takes seconds
import evaluations  # noqa: F401 - imports all that a rank needs
import torch

import ddae.tools.replay  # noqa: F401
from ddae.distributed import checkpoint


def kill_at(count: int) -> None:
    """Send this process SIGKILL before its count-th creation, write, flush, rename or removal of a file or folder."""
    remaining = [count]

    def counted(call):
        def wrapper(*args, **options):
            remaining[0] -= 1
            if remaining[0] == 0:
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
    """Run the command of a request in this process, a fork. Return its exit code."""
    os.dup2(os.open(task["stdin"], os.O_RDONLY), 0)
    log = os.open(task["log"], os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(log, 1)
    os.dup2(log, 2)
    sys.stdin = os.fdopen(0, closefd=False)  # without the requests that the server has read ahead
    os.environ.update(task["env"])
    if task["kill_at"]:
        kill_at(task["kill_at"])
    elif torch.cuda.is_available():  # a fork cannot use CUDA: start a new Python instead
        os.execv(sys.executable, [sys.executable, *task["command"]])
    program, *args = task["command"]
    try:
        if program == "-c":
            sys.argv = [program, *args[1:]]
            exec(compile(args[0], "-c", "exec"), {"__name__": "__main__"})
        else:
            sys.argv = [program, *args]
            sys.path.insert(0, os.path.dirname(program))  # as Python does
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
        if "wait_for" in task:
            process, status = os.waitpid(task["wait_for"], os.WNOHANG)
            print(json.dumps(os.waitstatus_to_exitcode(status) if process else None), flush=True)
            continue
        child = os.fork()
        if child == 0:
            sys.exit(run(task))  # not os._exit: atexit handlers must run
        print(child, flush=True)
