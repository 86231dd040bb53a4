"""A run on a Ray cluster: actors hold the replicas of the fleet; the driver plans the run and is the only writer.

The fleet communicates with an actor over a connection, as with a process on its own host. Ray places the actors, assigns their
GPUs, reports when one is lost, and copies the tokenised input to each node once, as an object of its object store. The driver
and an actor exchange small messages over a TCP connection of their own, so that results neither occupy the object store nor are
spilled to disk. Ray retries nothing: the fleet has a record of what a lost actor had finished, and starts another.
"""

from __future__ import annotations

import hmac
import logging
import os
import secrets
import signal
import socket
import sys
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from multiprocessing.connection import Connection
from pathlib import Path
from types import TracebackType
from typing import Any

import ray
from ray import cloudpickle
from ray.exceptions import GetTimeoutError, ObjectStoreFullError, RayError, RayTaskError

from tokabatch import __version__
from tokabatch.errors import EngineError, JobError, ReplicaLost, UsageError
from tokabatch.job import EngineConfig
from tokabatch.number_text import counted
from tokabatch.parallel.layout import Layout
from tokabatch.runner.ledger import Ledger, Part
from tokabatch.runner.member_process import Build, serve
from tokabatch.runner.messages import Message, Order, Pace
from tokabatch.runner.order_sender import MessageReader, OrderSender
from tokabatch.runner.replica import Standing

ADDRESS = "RAY_ADDRESS"
TOKEN_BYTES = 32
HELLO_SECONDS = 2.0
"""Timeout in seconds for the token on a new connection; a connection without it is closed."""
CONNECT_SECONDS = 30.0
CHECK_SECONDS = 0.5
"""Seconds between queries to Ray whether a silent actor has ended."""
PATIENCE_SECONDS = 15.0
"""Seconds that an actor may be pending before a message is shown."""
LAST_WORDS_SECONDS = 5.0
"""Timeout in seconds for Ray's report of why an actor ended, which may arrive after the connection has closed."""
_KEEPALIVE = {"SO_KEEPALIVE": 1, "TCP_KEEPIDLE": 10, "TCP_KEEPINTVL": 5, "TCP_KEEPCNT": 4}
"""Socket options with which a connection to an unreachable host ends after half a minute."""


_PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + bytes.fromhex("000000 04 00 00000000")
"""How an HTTP/2 client begins, with its own, empty settings frame."""
_FRAME_BYTES, _SETTINGS = 9, b"\x04"


class RayCluster:
    """A connection to a Ray cluster for the time of one run, as a context manager.

    `address` is that of a running cluster; the default is RAY_ADDRESS, or else the cluster of this host. A program that is
    already connected to Ray keeps its connection. Raises UsageError if there is no cluster.
    """

    def __init__(self, address: str | None = None) -> None:
        address = address or os.environ.get(ADDRESS) or "auto"
        if address.startswith("ray://"):
            raise UsageError(
                f"--address {address} is a Ray Client address, over which actors cannot reach the driver; start the "
                "command on a node of the cluster and leave --address out"
            )
        self._connected = not ray.is_initialized()
        if self._connected:
            # `ray.init` replaces the handler that stops the run.
            handler = signal.getsignal(signal.SIGTERM)
            try:
                if ":" in address:
                    _refuse_other_service(address)
                ray.init(address=address, log_to_driver=False, logging_level=logging.ERROR, include_dashboard=False)
            except (OSError, RuntimeError, ValueError) as error:
                where = "on this host" if address == "auto" else f"at {address}"
                raise UsageError(
                    f"there is no Ray cluster {where}: {' '.join(str(error).split())}. Start one (`ray start --head`; on the "
                    f"other nodes `ray start --address=HEAD:6379`), or name its address by --address or {ADDRESS}"
                ) from error
            finally:
                with suppress(ValueError):
                    # Outside the main thread neither this nor Ray can set a handler.
                    signal.signal(signal.SIGTERM, handler)

    def layout(self, config: EngineConfig, device: str) -> Layout:
        """Return the layout: `engine.replicas` actors, or as many as the cluster's GPUs suffice for, each with the GPUs of a
        replica on one node. Raises JobError if no node has enough GPUs, if the driver has none although the cluster does, or if
        the number of replicas is not given on CPUs."""
        each = config.tensor * config.pipeline
        per_node = [int(node["Resources"].get("GPU", 0)) for node in ray.nodes() if node["Alive"]]
        if device != "cuda" and sum(per_node) and config.device != "cpu":
            raise JobError(
                f"the Ray cluster has {counted(sum(per_node), 'GPU')}, but the driver's node has none, and the driver needs "
                "one to size the replicas: start it on a node with a GPU (which it does not occupy), or write "
                "engine.device=cpu"
            )
        room = sum(count // each for count in per_node)
        if device == "cuda" and not room:
            raise JobError(
                f"engine.tensor is {config.tensor} and engine.pipeline {config.pipeline}, which takes {counted(each, 'GPU')} "
                f"of one node, and the nodes of the Ray cluster have {', '.join(map(str, per_node))}; lower them"
            )
        if config.replicas != "auto":
            return Layout(config.replicas, config.tensor, config.pipeline, ((),) * config.replicas, "--replicas, on Ray")
        if device != "cuda":
            raise JobError("on the CPUs of a Ray cluster, the number of replicas must be given: add --replicas 4, for example")
        return Layout(room, config.tensor, config.pipeline, ((),) * room, f"{counted(sum(per_node), 'GPU')} of the Ray cluster")

    def launcher(self, layout: Layout, device: str, model: Path, tell: Callable[[str], None]) -> Launcher:
        """Return what starts the actors of a run with this layout. `model` is a folder that each node can read under the same
        path; `tell` is called with messages for the user."""
        each = layout.tensor * layout.pipeline
        return Launcher({"num_cpus": 1, "num_gpus": each if device == "cuda" else 0}, model.absolute(), tell)

    def __enter__(self) -> RayCluster:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        """Disconnect from the cluster, which ends any remaining actors."""
        if self._connected:
            ray.shutdown()


class Launcher:
    """See `Launch`. `needs` are the resources of each actor, by Ray's names."""

    def __init__(self, needs: Mapping[str, Any], model: Path, tell: Callable[[str], None]) -> None:
        self._needs, self._model, self._tell = needs, model, tell
        self._address = str(ray.util.get_node_ip_address())
        self._work: tuple[Any, ...] = ()
        """References to the plan and the pickled `Build` in the object store."""

    def __call__(self, number: int, build: Build, ledger: Ledger, before: Standing, pace: Pace) -> Actor:
        if not self._work:
            try:
                # Pickled to bytes: arrays that come from the object store directly are read-only.
                self._work = ray.put(ledger.plan), ray.put(cloudpickle.dumps(build))
            except ObjectStoreFullError as error:
                size = ledger.plan.tokens.nbytes
                raise EngineError(
                    f"the tokenised input, {counted(size, 'byte')} of tokens, does not fit in Ray's object store on this "
                    "node; start the nodes with a larger one (`ray start --object-store-memory`)"
                ) from error
        return Actor(self, number, before, pace)

    def start(self, number: int, port: int, token: bytes, before: Standing, pace: Pace) -> tuple[Any, Any]:
        """Start an actor. Return it and the reference that becomes ready when it has ended."""
        own = cloudpickle.dumps(((self._address, port), token, str(self._model), number, before, pace))
        place: Any = ray.remote(TokabatchReplica)
        actor = place.options(**self._needs, max_restarts=0, max_task_retries=0).remote()
        # References inside a list are passed on as references, not as their values.
        return actor, actor.serve.remote(__version__, own, list(self._work))

    def listen(self) -> socket.socket:
        """Return a listening socket for one actor, on an address that the nodes of the cluster can reach."""
        return socket.create_server((self._address, 0), backlog=4)

    def wanted(self, number: int) -> None:
        """Show the message that an actor is pending."""
        named = {"num_cpus": "CPU", "num_gpus": "GPU"}
        needs = " and ".join(f"{count} {named[name]}" for name, count in self._needs.items() if count)
        self._tell(f"warning: replica {number} is pending: no room in the Ray cluster ({needs} of one node)")


class Actor:
    """See `Process`: one actor. Until it has been placed and has connected, its `pipe` is the listening socket."""

    def __init__(self, launcher: Launcher, number: int, before: Standing, pace: Pace) -> None:
        self._launcher, self._number = launcher, number
        self._token = secrets.token_bytes(TOKEN_BYTES)
        self._listening = launcher.listen()
        self._connection: Connection | None = None
        self._reader: MessageReader | None = None
        self._sender: OrderSender | None = None
        """The reader and the sender of the connection."""
        self._unsent: list[Order | bytes | None] = []
        self._told = time.monotonic() + PATIENCE_SECONDS
        self._next_check = 0.0
        self._actor, self._ended = launcher.start(number, self._listening.getsockname()[1], self._token, before, pace)

    @property
    def pipe(self) -> Connection | socket.socket:
        return self._listening if self._connection is None else self._connection

    @property
    def pid(self) -> int | None:
        return None

    def receive(self) -> Message | None:
        if self._reader is None:
            self._accept()
            return None
        try:
            return self._reader.receive()
        except (EOFError, OSError) as error:
            raise ReplicaLost(self._reason(LAST_WORDS_SECONDS)) from error

    def send(self, order: Order | bytes | None) -> None:
        if self._sender is None:
            self._unsent.append(order)
            return
        self._sender.put(order)

    def check(self) -> bool:
        now = time.monotonic()
        if now < self._next_check:
            return self._connection is not None
        self._next_check = now + CHECK_SECONDS
        ended, _ = ray.wait([self._ended], timeout=0)
        if ended and (self._connection is None or not self._connection.poll(HELLO_SECONDS)):
            raise ReplicaLost(self._reason(LAST_WORDS_SECONDS))
        if self._connection is None and now > self._told:
            self._told = float("inf")
            self._launcher.wanted(self._number)
        return self._connection is not None

    def kill(self) -> None:
        with suppress(RayError):
            ray.kill(self._actor)

    def hang_up(self) -> None:
        if self._sender is not None:
            self._sender.close()
        self._listening.close()

    def close(self, seconds: float) -> None:
        if seconds:
            ray.wait([self._ended], timeout=seconds)
        self.hang_up()
        self.pipe.close()
        # Its worker ends with it.
        self.kill()

    def _accept(self) -> None:
        """Accept the actor's connection and send what is queued; close a connection that does not send the token."""
        connected, _ = self._listening.accept()
        _watch(connected)
        connection = Connection(connected.detach())
        reader = MessageReader(connection)
        with suppress(EOFError, OSError):
            if hmac.compare_digest(reader.receive_bytes(HELLO_SECONDS, TOKEN_BYTES) or b"", self._token):
                self._connection, self._reader, self._sender = connection, reader, OrderSender(connection)
                self._listening.close()
                for order in self._unsent:
                    self._sender.put(order)
                return
        connection.close()

    def _reason(self, seconds: float) -> str:
        """Return why the actor ended."""
        try:
            ray.get(self._ended, timeout=seconds)
        except RayTaskError as error:
            # An exception of `serve` in the actor.
            return f"the scheduler's actor failed: {' '.join(str(error.cause or error).split())}"
        except GetTimeoutError:
            return "the connection to the scheduler's actor has ended"
        except RayError as error:
            # Ray appends a general list of possible causes.
            lines = [line.strip() for line in str(error).partition("Some common causes")[0].splitlines() if line.strip()]
            return f"the scheduler's actor is lost: {lines[-1].rstrip('.') if lines else type(error).__name__}"
        return "the scheduler's actor has ended"


class TokabatchReplica:
    """The actor that runs one member of a fleet. `ps` and Ray show the name of this class."""

    def serve(self, version: str, own: bytes, shared: list[Any]) -> None:
        """Run the member until it is stopped. `own` and the objects of `shared` are unpickled only after the `version` of the
        driver has been compared. Raises EngineError if it differs, or if this node cannot read the model's folder."""
        here = socket.gethostname()
        if version != __version__:
            raise EngineError(f"{here} has tokabatch {__version__}, and the driver {version}; install the same one")
        address, token, model, number, before, pace = cloudpickle.loads(own)
        if not os.access(model, os.R_OK | os.X_OK):
            raise EngineError(
                f"{here} cannot read the model's folder {model}: keep it where all nodes can read it under the same path "
                "(model.path, or HF_HOME for a model of the hub)"
            )
        plan, build = ray.get(shared)
        connected = socket.create_connection(address, CONNECT_SECONDS)
        connected.settimeout(None)
        _watch(connected)
        connection = Connection(connected.detach())
        connection.send_bytes(token)
        serve(connection, number, cloudpickle.loads(build), Part.joined([]), Ledger(plan), before, pace)


def _refuse_other_service(address: str) -> None:
    """Raise OSError or ValueError if nothing listens at `address`, or something other than a gRPC server such as Ray's, which
    begins with a settings frame (RFC 9113, 3.4). Ray itself would try for a quarter of an hour."""
    host, _, port = address.rpartition(":")
    with socket.create_connection((host.strip("[]"), int(port)), CONNECT_SECONDS) as connected:
        if os.environ.get("RAY_USE_TLS", "0") == "0":
            connected.sendall(_PREFACE)
            if connected.recv(_FRAME_BYTES)[3:4] != _SETTINGS:
                raise OSError("another service listens there; Ray's own port is 6379 unless its head was started with another")


def _watch(connected: socket.socket) -> None:
    """Send messages without delay, and detect an unreachable host by keepalive."""
    connected.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    if sys.platform == "linux":
        for name, value in _KEEPALIVE.items():
            level = socket.SOL_SOCKET if name.startswith("SO_") else socket.IPPROTO_TCP
            connected.setsockopt(level, getattr(socket, name), value)
