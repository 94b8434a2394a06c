"""`mola with PROGRAM ...`: run a program that uses PEFT with mola registered in all its processes.

    mola with transformers serve
    mola with accelerate launch --num_processes 2 train.py
    mola with python -m lm_eval --model hf --model_args pretrained=BASE,peft=ADAPTER --tasks my_task

Without `mola with`, these programs end in `KeyError: 'MOLA'` when they load a mola adapter, since nothing imports mola.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Sequence

from mola._process import SET
from mola.errors import MolaError
from mola.integrations import startup


def main(arguments: Sequence[str]) -> int:
    """Replace this process by a program.

    Args:
        arguments: the name of the program, then the program's own arguments.

    Returns:
        The exit code of the program, on systems where a process cannot be replaced (Windows).

    Raises:
        MolaError: there is no such program, or it cannot be started.
    """
    if not arguments or arguments[0] in ("-h", "--help"):
        print(__doc__)
        return 0 if arguments else 2
    # Programs of this Python environment come first, as if it were activated.
    own = os.path.dirname(sys.executable)
    program = shutil.which(arguments[0], path=os.pathsep.join([own, os.environ.get("PATH", os.defpath)]))
    if program is None:
        raise MolaError(
            f"`mola with` needs the name of a program: there is no {arguments[0]!r} in {own} or on the PATH. "
            "For a file write `mola with python FILE`."
        )
    environment = {name: value for name, value in os.environ.items() if name not in SET}
    path = [os.path.dirname(os.path.abspath(startup.__file__)), environment.get("PYTHONPATH", "")]
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, path))
    command = [program, *arguments[1:]]
    if os.name == "nt":  # exec would start a new process and end this one
        return subprocess.call(command, env=environment)
    sys.stdout.flush()
    try:
        os.execve(program, command, environment)
    except OSError as error:  # such as a script without a shebang line
        raise MolaError(
            f"`mola with` cannot start {program!r}: {error}. For a script write `mola with sh FILE`."
        ) from error
