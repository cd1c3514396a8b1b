"""torchrun that forwards signals: asked to stop, its workers save and it exits with code 75.

``python -m launch.local.torchrun`` takes the arguments of torchrun. torchrun itself is killed by
USR1, with which SLURM announces that the time is nearly up, gives its workers 30 s after a TERM,
undoes ``nohup``, and waits for minutes where no DNS knows the name of this machine.
"""

from __future__ import annotations

import os
import signal
import socket
import sys
from typing import Any

from launch.local.signals import SignalForwarder, children

LOOPBACK = "127.0.0.1"


def main(args: list[str] | None = None) -> None:
    """Run torchrun in this process.

    Raises:
        SystemExit: 75 if the workers were asked to stop and ended well, 128 + signal if they were
            ended before they could save, the code of the first worker that failed.
    """
    forwarder = SignalForwarder(workers=lambda: children(os.getpid()), end=_end)
    forwarder.install()  # before the seconds that importing torch takes
    # Restarts with gloo hang now and then if the agent's store is shared under --standalone.
    os.environ.setdefault("TORCH_DISABLE_SHARE_RDZV_TCP_STORE", "1")

    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.elastic.rendezvous import RendezvousConnectionError
    from torch.distributed.run import main as torchrun

    from dinogen.errors import EXIT_STOPPED

    _leave_hopeless()
    given = sys.argv[1:] if args is None else args
    address = _address(given)
    if address:
        # torchrun asks for its full name several times, for labels alone: where a DNS server does
        # not answer, that is 20 s each time.
        socket.getfqdn = lambda name="": name or socket.gethostname()
    try:
        torchrun(["--signals-to-handle", _ITS_OWN, *address, *given])
    except SignalException as error:
        raise SystemExit(128 + error.sigval) from None
    except ChildFailedError as error:
        # The worker has said why; torchrun's traceback is about torchrun.
        rank, failure = error.get_first_failure()
        code = failure.exitcode
        print(
            f"torchrun: rank {rank} failed first: exit code {code}, pid {failure.pid}",
            file=sys.stderr,
        )
        raise SystemExit(128 - code if code < 0 else code) from None
    except RendezvousConnectionError:
        print("torchrun: the node on which all others met is lost", file=sys.stderr)
        raise SystemExit(1) from None
    if forwarder.stopping:
        raise SystemExit(EXIT_STOPPED)


# torchrun has to handle some signal: if none is named, it warns with a traceback. It handles only
# this one, which SignalForwarder does not use: torchrun's handlers would end workers before they
# have saved, and a signal with a handler would no longer be ignored in the workers.
_ITS_OWN = "SIGXCPU"


def _leave_hopeless() -> None:
    """Start no worker again that ended with an error of the user's: it would fail the same way."""
    from torch.distributed.elastic.agent.server import local_elastic_agent as server

    from dinogen.errors import UserError

    monitor = server.LocalElasticAgent._monitor_workers

    def monitored(self: Any, group: Any) -> Any:
        result = monitor(self, group)
        if any(one.exitcode == UserError.exit_code for one in result.failures.values()):
            self._remaining_restarts = 0
        return result

    server.LocalElasticAgent._monitor_workers = monitored  # type: ignore[method-assign]


def _address(given: list[str]) -> list[str]:
    """The address of this machine where all workers are on it, whether or not DNS knows its name.

    Options of torchrun end where the name of its program begins, so only those before it count.
    """
    named = {word.partition("=")[0].replace("_", "-") for word in given[: _num_options(given)]}
    if "--standalone" not in named or "--local-addr" in named:
        return []
    return ["--local-addr", LOOPBACK]


def _num_options(given: list[str]) -> int:
    """How many words come before torchrun's program: it begins after ``-m`` or at a file."""
    for number, word in enumerate(given):
        if word in ("-m", "--module") or word.endswith(".py"):
            return number
    return len(given)


def _end(number: signal.Signals) -> None:
    """End as torchrun does: TERM to the workers, KILL after 30 s."""
    api = sys.modules.get("torch.distributed.elastic.multiprocessing.api")
    error = getattr(api, "SignalException", None)
    if error is None:  # torch is still being imported
        raise SystemExit(128 + number)
    raise error(f"ended by {number.name}", sigval=number)


if __name__ == "__main__":
    main()
