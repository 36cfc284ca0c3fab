"""A process that solves groups: reads tasks from standard input as JSON lines, answers each with a JSON line.

``python -m fqonnx.calib.worker``. A process of our own rather than ``multiprocessing``: spawning there imports the user's main module
again, which a script that calls ``fqonnx.build`` without a main guard does not survive.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import threading
import time
from pathlib import Path
from typing import Any, TextIO

from fqonnx.errors import FqonnxError


def main(tasks: TextIO, answers: TextIO) -> None:
    """Solve until standard input ends; a group that fails is answered with ``{"error": ...}`` and the next one is taken."""
    threading.Thread(target=_end_with, args=(os.getppid(),), daemon=True).start()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole process group; the parent ends its workers itself
    import torch

    torch.set_num_threads(1)
    for line in tasks:
        answers.write(json.dumps(_answer(json.loads(line))) + "\n")
        answers.flush()


def _end_with(parent: int) -> None:
    """End this process when the one that started it is gone, killed perhaps: nobody waits for the group any more."""
    while os.getppid() == parent:
        time.sleep(0.5)
    os._exit(1)


def _answer(task: dict[str, Any]) -> dict[str, Any]:
    from fqonnx.calib.solve import GroupTask, run_task

    try:
        run_task(GroupTask.from_json(task))
    except FqonnxError as error:
        return {"error": str(error)}
    except MemoryError:
        return {"error": f"group {task['name']!r}: out of memory: use a machine with more, or leave the group in float with --keep"}
    except OSError as error:
        return {"error": f"group {task['name']!r}: {error.strerror or error}: {error.filename or Path.cwd()}"}
    return {}


if __name__ == "__main__":
    # Libraries print; answers must not mix with that.
    channel = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    main(sys.stdin, channel)
