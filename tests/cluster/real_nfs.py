"""A real NFS on this machine: a server in user space (NFS-Ganesha), and two hosts that mount its folder by Linux's own client.

The hosts are kernels that run as programs (User-Mode Linux) on this machine's files: they need no kernel module here and no
virtualisation. Debian's packages, unpacked into a folder; needs root and /dev/net/tun. A host runs what is sent to it:
`python real_nfs.py ADDRESS MODULES` is the program there.
"""

from __future__ import annotations

import ctypes
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from contextlib import suppress
from pathlib import Path

from cluster.debian_packages import unpack

PACKAGES = ("user-mode-linux", "nfs-ganesha", "nfs-ganesha-vfs")
HOSTS = (1, 2)
MOUNT = Path("/mnt/export")
"""Where each host has the folder that is exported."""
PROGRAM = Path(__file__).resolve()
NETWORK, PORT = "10.213", 9000
MEMORY = "1500M"
# Without UseGetpwnam, the server looks for plug-ins of libnfsidmap where Debian installs them, and ends if there are none.
CONFIGURATION = """
NFS_CORE_PARAM {{ Protocols = 4; NFS_Port = {port}; Enable_NLM = false; Enable_RQUOTA = false; Plugins_Dir = "{plugins}"; }}
NFSV4 {{ UseGetpwnam = true; Lease_Lifetime = 6; Grace_Period = 10; RecoveryRoot = "{folder}/recovery"; }}
EXPORT {{
  Export_Id = 1; Path = {folder}/export; Pseudo = /export; Protocols = 4; Transports = TCP;
  Access_Type = RW; Squash = No_Root_Squash; SecType = sys; FSAL {{ Name = VFS; }}
}}
"""
BOOT = """#!/bin/bash
export PATH=/usr/sbin:/usr/bin:/sbin:/bin HOME=/root PYTHONPATH={tests}
for kind in proc:/proc sysfs:/sys tmpfs:/run tmpfs:/mnt; do mount -t ${{kind%:*}} none ${{kind#*:}}; done
mount -t devtmpfs none /dev; mkdir -p /dev/shm; mount -t tmpfs none /dev/shm
n=$(sed 's/.*node=\\([0-9]\\).*/\\1/' /proc/cmdline)
hostname node$n
ip link set lo up; ip addr add {network}.$n.2/24 dev vec0; ip link set vec0 up
{python} {program} {network}.$n.2 {modules} &
# What loses its parent is this shell's child, which takes note of its end.
while :; do wait; sleep 1; done
"""


class Nfs:
    """Started by `start`, which returns why it cannot, else an empty string; ended by `close`."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.root, self.export = folder, folder / "root", folder / "export"
        self._hosts: list[subprocess.Popen[bytes]] = []
        self._server: subprocess.Popen[bytes] | None = None
        with socket.create_server(("", 0)) as free:
            self._port = free.getsockname()[1]

    def start(self, options: str) -> str:
        """`options` are those of the mount, beside the addresses."""
        if os.geteuid() or not Path("/dev/net/tun").exists():
            return "needs root and /dev/net/tun"
        obstacle = unpack(PACKAGES, self.folder, self.root, "TOKABATCH_TEST_NFS_PACKAGES")
        if obstacle:
            return obstacle
        (modules,) = (self.root / "usr/lib/uml/modules").iterdir()
        self.export.mkdir()
        (self.folder / "recovery").mkdir()
        plugins = self.root / "usr/lib/x86_64-linux-gnu/ganesha"
        (self.folder / "ganesha.conf").write_text(CONFIGURATION.format(port=self._port, plugins=plugins, folder=self.folder))
        boot = self.folder / "boot"
        boot.write_text(
            BOOT.format(network=NETWORK, python=sys.executable, program=PROGRAM, tests=PROGRAM.parents[1], modules=modules)
        )
        boot.chmod(0o755)
        self.serve()
        kernel = [self.root / "usr/bin/linux.uml", "rootfstype=hostfs", "rootflags=/", "rw", f"mem={MEMORY}", "quiet"]
        for host in HOSTS:
            for arguments in (["tuntap", "add", f"tkb{host}", "mode", "tap"], ["link", "set", f"tkb{host}", "up"]):
                subprocess.run(["ip", *arguments], check=True)
            subprocess.run(["ip", "addr", "add", f"{NETWORK}.{host}.1/24", "dev", f"tkb{host}"], check=True)
            own = [
                f"vec0:transport=tap,ifname=tkb{host},depth=128,gro=1",
                f"node={host}",
                f"init={boot}",
                "con=null",
                "con0=null,fd:1",
            ]
            with (self.folder / f"host{host}.log").open("wb") as log:
                environment = {**os.environ, "TMPDIR": "/dev/shm"}
                self._hosts.append(
                    subprocess.Popen(
                        [*kernel, *own],
                        env=environment,
                        stdin=subprocess.DEVNULL,
                        stdout=log,
                        stderr=log,
                        start_new_session=True,
                    )
                )
        for host in HOSTS:
            server = f"{NETWORK}.{host}.1"
            mount = f"mkdir -p {MOUNT}; mount -i -t nfs4 {server}:/export {MOUNT} -o "
            mount += f"addr={server},clientaddr={NETWORK}.{host}.2,port={self._port},{options}; mount | grep -c ' nfs4 '"
            deadline = time.monotonic() + 60
            while time.monotonic() < deadline:
                with suppress(OSError):
                    if self.on(host, mount).strip() == "1":
                        break
                time.sleep(0.5)
            else:
                logs = [(self.folder / name).read_text()[-800:] for name in (f"host{host}.log", "ganesha.log")]
                return f"host {host} does not mount the folder: {logs[0]}\nThe server's log: {logs[1]}"
        return ""

    def serve(self) -> None:
        """Start the server, or start it again."""
        libraries = self.root / "usr/lib/x86_64-linux-gnu"
        command = [
            self.root / "usr/bin/ganesha.nfsd",
            "-F",
            "-f",
            self.folder / "ganesha.conf",
            "-p",
            self.folder / "ganesha.pid",
        ]
        self._server = subprocess.Popen(
            [*command, "-L", self.folder / "ganesha.log", "-N", "EVENT"],
            env={**os.environ, "LD_LIBRARY_PATH": f"{libraries}:{self.root}/usr/lib/ganesha"},
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )

    def kill_server(self) -> None:
        assert self._server is not None
        self._server.kill()
        self._server.wait()

    def on(self, host: int, command: str) -> str:
        """What a shell prints on a host, when it has ended. Raises OSError where the host does not answer."""
        with socket.create_connection((f"{NETWORK}.{host}.2", PORT), 5) as connection:
            connection.settimeout(600)
            connection.sendall(command.encode())
            connection.shutdown(socket.SHUT_WR)
            return connection.makefile().read()

    def close(self) -> None:
        for host in self._hosts:
            with suppress(ProcessLookupError):
                os.killpg(host.pid, signal.SIGKILL)
            host.wait()
        if self._server is not None:
            self.kill_server()
        for host in HOSTS:
            subprocess.run(["ip", "link", "delete", f"tkb{host}"], check=False, stderr=subprocess.DEVNULL)


def load_modules(folder: Path, name: str) -> None:
    """Load a kernel module and what it needs; there is no modprobe in every image."""
    lines = (folder / "modules.dep").read_text().splitlines()
    needs = {line.partition(":")[0]: line.partition(":")[2] for line in lines}
    library = ctypes.CDLL(None, use_errno=True)
    for module in (*reversed(needs[name].split()), name):
        with (folder / module).open("rb") as file:
            # finit_module(2)
            library.syscall(313, file.fileno(), b"", 0)


def _answer(connection: socket.socket) -> None:
    with connection:
        command = connection.makefile().read()
        done = subprocess.run(["bash", "-c", command], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, check=False)
        connection.sendall(done.stdout)


if __name__ == "__main__":
    load_modules(Path(sys.argv[2]), "kernel/fs/nfs/nfsv4.ko")
    with socket.create_server((sys.argv[1], PORT)) as listening:
        while True:
            threading.Thread(target=_answer, args=(listening.accept()[0],), daemon=True).start()
