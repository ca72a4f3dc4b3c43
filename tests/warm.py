"""Run commands in forks of this process, which has imported what they need: `python warm.py SOCKET MODULE...`.

A command, or a script, starts as it does in a Python of its own, seconds earlier. The other end of the socket is in
conftest.py.
"""

import array
import atexit
import importlib
import json
import os
import resource
import runpy
import signal
import socket
import sys
import traceback


def main() -> None:
    requests = socket.socket(fileno=int(sys.argv[1]))
    del sys.path[0]  # the tests' folder
    for module in sys.argv[2:]:
        importlib.import_module(module)
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody waits for those that watch the commands
    while True:
        text, files, _, _ = socket.recv_fds(requests, 2**20, 3)
        if not text:  # the tests are over
            return
        if os.fork() == 0:
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            requests.close()
            watch(json.loads(text), *files)
            os._exit(0)
        for file in files:
            os.close(file)


def watch(request: dict, answers: int, stdout: int, stderr: int) -> None:
    """Start the command; answer with its number, and with its exit code when it has ended."""
    child = os.fork()
    if child == 0:
        os.close(answers)
        for old, new in ((os.open(os.devnull, os.O_RDONLY), 0), (stdout, 1), (stderr, 2)):
            os.dup2(old, new)
            os.close(old)
        os._exit(run(request))
    for old in (stdout, stderr, 0, 1, 2):  # whoever reads the command's output waits for its end alone
        os.close(old)
    with socket.socket(fileno=answers) as connection:
        connection.sendall(array.array("i", [child]))
        code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        connection.sendall(array.array("i", [code]))


def run(request: dict) -> int:
    """The command in this process: its exit code."""
    os.chdir(request["folder"])
    os.environ.clear()
    os.environ.update(request["environment"])
    sys.path[1:1] = [path for path in os.environ.get("PYTHONPATH", "").split(os.pathsep) if path not in ("", *sys.path)]
    if request["limit"] is not None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (request["limit"], resource.RLIM_INFINITY))
    sys.argv = request["command"]
    module, name = request["main"].split(":")
    code = None
    try:
        if sys.argv[0].endswith(".py"):  # a script
            sys.path.insert(0, os.path.dirname(sys.argv[0]))
            runpy.run_path(sys.argv[0], run_name="__main__")
        else:
            code = getattr(importlib.import_module(module), name)()
    except SystemExit as end:
        code = end.code
    except BaseException:
        traceback.print_exc()
        code = 1
    if isinstance(code, str):
        print(code, file=sys.stderr)
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    return code if isinstance(code, int) else int(code is not None)


if __name__ == "__main__":
    main()
