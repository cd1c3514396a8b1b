"""DeepSpeed's launcher on this machine, with signals forwarded to its processes.

``python -m launch.local.deepspeed NUM_PROCESSES -m MODULE ARGS...``. DeepSpeed's own command
needs host files, ssh and a GPU; the launcher behind it, which starts the processes of one machine,
needs none of them.
"""

from __future__ import annotations

import base64
import json
import os
import signal
import socket
import subprocess
import sys

from launch.local.signals import SignalForwarder, children


def main() -> None:
    """Run it to its end.

    Raises:
        SystemExit: 75 if the processes were asked to stop and saved; else the launcher's code.
    """
    launcher: subprocess.Popen[bytes] | None = None

    def workers() -> list[int]:
        return children(launcher.pid) if launcher else []

    def end(number: signal.Signals) -> None:
        if launcher is None:
            raise SystemExit(128 + number)
        launcher.terminate()  # TERM to the processes, KILL after 30 s

    SignalForwarder(workers, end).install()
    # In a session of its own: Ctrl-C must reach the processes once, through SignalForwarder.
    launcher = subprocess.Popen(launcher_command(sys.argv[1:]), start_new_session=True)
    code = launcher.wait()
    raise SystemExit(128 - code if code < 0 else code)


def launcher_command(args: list[str]) -> list[str]:
    """The command of DeepSpeed's launcher for ``NUM_PROCESSES -m MODULE ARGS...``.

    Raises:
        SystemExit: not called like that.
    """
    if len(args) < 3 or not args[0].isdigit() or args[1] != "-m":
        raise SystemExit("usage: python -m launch.local.deepspeed NUM_PROCESSES -m MODULE ARGS...")
    count = int(args[0])
    # It sets CUDA_VISIBLE_DEVICES from this list: keep what the user chose.
    chosen = os.environ.get("CUDA_VISIBLE_DEVICES")
    devices = chosen.split(",")[:count] if chosen else [str(number) for number in range(count)]
    if len(devices) < count:
        raise SystemExit(f"CUDA_VISIBLE_DEVICES={chosen} names fewer than {count} GPUs")
    world = base64.urlsafe_b64encode(json.dumps({"localhost": devices}).encode()).decode()
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    program = [
        sys.executable,
        "-m",
        "deepspeed.launcher.launch",
        "--log_level=critical",
        "--no_local_rank",
    ]
    return [*program, f"--world_info={world}", f"--master_port={port}", "--module", *args[2:]]


if __name__ == "__main__":
    main()
