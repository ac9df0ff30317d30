"""Python code in a process of its own that has heavy imports behind it already: it is forked from one that waits.

    done = forked("import torch", "print(torch.get_num_threads())")  # a subprocess.CompletedProcess, with text

Like subprocess.run([sys.executable, "-c", code]), with its own exit code, output and sys.modules (the imports apart),
but without the seconds that the imports take each time. They start no threads, which a fork would lose.
"""

from __future__ import annotations

import atexit
import functools
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

SERVER = """
import json, os, sys
exec(sys.argv[1])
for line in sys.stdin:
    code, where, environment, folder = json.loads(line)
    if not os.fork():
        break
    print(os.waitstatus_to_exitcode(os.wait()[1]), flush=True)
else:
    sys.exit()
os.chdir(where)
os.environ.clear()
os.environ.update(environment)
for number, (name, flags) in enumerate([(os.devnull, os.O_RDONLY), ("out", os.O_WRONLY), ("err", os.O_WRONLY)]):
    os.dup2(os.open(os.path.join(folder, name), flags), number)
sys.argv[:] = ["-c"]
exec(code, {"__name__": "__main__"})
"""


def forked(imports: str, code: str) -> subprocess.CompletedProcess[str]:
    server = _server(imports)
    assert server.stdin is not None
    assert server.stdout is not None
    with tempfile.TemporaryDirectory() as folder:
        out, err = Path(folder, "out"), Path(folder, "err")
        out.touch()
        err.touch()
        server.stdin.write(json.dumps([code, str(Path.cwd()), dict(os.environ), folder]) + "\n")
        server.stdin.flush()
        said = server.stdout.readline()
        assert said, f"the process that ran {imports!r} is gone"
        return subprocess.CompletedProcess(code, int(said), out.read_text("utf-8"), err.read_text("utf-8"))


@functools.cache
def _server(imports: str) -> subprocess.Popen[str]:
    """Waits for code to run, after `imports`; ends with this process."""
    command = [sys.executable, "-c", SERVER, imports]
    server = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    atexit.register(_end, server)
    return server


def _end(server: subprocess.Popen[str]) -> None:
    server.communicate()  # closes its input
