"""The sockets of a process to which anybody could connect, and strangers who do: of another user, of another namespace.

listening(pid)                          as the kernel lists them
knock(door, b"..", user=.., where=..)   what who sends that there gets; None: not even a connection
Network()                               hosts on one bridge: each a network namespace, gone with its process
"""

import ctypes
import fcntl
import os
import signal
import socket
import struct
import subprocess
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

STRANGER = 65534
Where = Literal["here", "own"] | int
"""In which network namespace: this one, a new one of its own, or that of a process."""

_NEW_NETWORK = 0x40000000
_SET_FLAGS = 0x8914
_libc = ctypes.CDLL(None, use_errno=True)
"127.0.0.1".encode("idna")  # a stranger may not read what Python would import for that


@dataclass(frozen=True)
class Listening:
    kind: str
    address: str
    port: str


def listening(pid: int) -> list[Listening]:
    own = set()
    for path in Path(f"/proc/{pid}/fd").iterdir():
        try:
            own.add(os.readlink(path))
        except OSError:
            continue
    found = []
    for table in ("tcp", "tcp6", "udp", "udp6", "unix"):
        for line in Path(f"/proc/{pid}/net/{table}").read_text().splitlines()[1:]:
            fields = line.split()
            if table == "unix":
                inode, is_open = fields[6], int(fields[3], 16) & 0x10000  # __SO_ACCEPTCON
                place = (fields[7] if len(fields) > 7 else "", "")
            else:
                inode, is_open = fields[9], fields[3] == "0A" or table.startswith("udp")
                at, port = fields[1].split(":")
                place = (".".join(str(byte) for byte in reversed(bytes.fromhex(at))), str(int(port, 16)))
            if is_open and f"socket:[{inode}]" in own:
                found.append(Listening(table, *place))
    return found


def go_to(where: Where) -> None:
    """Moves this process, which must be root's and have one thread."""
    if where == "own":
        _require(_libc.unshare(_NEW_NETWORK))
        with socket.socket() as any_socket:
            fcntl.ioctl(any_socket, _SET_FLAGS, struct.pack("16sh14x", b"lo", 1))  # its loopback interface works
    elif where != "here":
        namespace = os.open(f"/proc/{where}/ns/net", os.O_RDONLY)
        _require(_libc.setns(namespace, _NEW_NETWORK))
        os.close(namespace)


def _require(result: int) -> None:
    if result:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))


def become_stranger() -> None:
    os.setgroups([])
    os.setgid(STRANGER)
    os.setuid(STRANGER)


def in_child(work: Callable[[], bytes], *, is_stranger: bool, where: Where) -> bytes | None:
    """What `work` returns, done by another process; None: it failed."""
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        code = 1
        try:
            go_to(where)
            if is_stranger:
                become_stranger()
            os.write(writer, b"." + work())
            code = 0
        finally:
            os._exit(code)
    os.close(writer)
    with os.fdopen(reader, "rb") as answer:
        said = answer.read()
    os.waitpid(child, 0)
    return said[1:] if said else None


def knock(door: Listening, content: bytes, *, is_stranger: bool, where: Where = "here") -> bytes | None:
    def work() -> bytes:
        if door.kind == "unix":
            connection = socket.socket(socket.AF_UNIX)
            connection.settimeout(3)
            connection.connect("\0" + door.address[1:])
        else:
            connection = socket.create_connection((door.address, int(door.port)), timeout=1)
        try:
            connection.sendall(content)
            connection.settimeout(1)
            return connection.recv(1000)
        except OSError:
            return b""

    return in_child(work, is_stranger=is_stranger, where=where)


def why_no_namespaces() -> str:
    """Why this machine does not let us make networks of our own; "" where it does."""
    if os.geteuid() != 0:
        return "only root can make network namespaces"
    try:
        with Network(2):
            return ""
    except (OSError, subprocess.CalledProcessError) as error:
        return f"no network namespaces can be made here: {getattr(error, 'stderr', None) or error}"


class Network:
    """Hosts 10.231.0.1, .2 and so on: all on a bridge that the first one has, each over a veth of its own."""

    def __init__(self, num_hosts: int) -> None:
        self.pids: list[int] = []
        try:
            for _ in range(num_hosts):
                self.pids.append(_wait_in_new_namespace())
            first = self.pids[0]
            _ip(first, "link add eth type bridge")
            for number, pid in enumerate(self.pids[1:], start=1):
                _ip(first, f"link add port{number} type veth peer name eth netns {pid}")
                _ip(first, f"link set port{number} master eth up")
            for pid, address in zip(self.pids, self.addresses, strict=True):
                _ip(pid, f"addr add {address}/24 dev eth")
                _ip(pid, "link set eth up")
        except BaseException:
            self.close()
            raise

    @property
    def addresses(self) -> list[str]:
        return [f"10.231.0.{number}" for number in range(1, len(self.pids) + 1)]

    def __enter__(self) -> "Network":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def cut(self, host: int) -> None:
        """Takes a host's link away from the bridge; the host's own end does not notice."""
        _ip(self.pids[0], f"link set port{host} nomaster")

    def close(self) -> None:
        for pid in self.pids:
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
        self.pids.clear()


def _wait_in_new_namespace() -> int:
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            go_to("own")
            os.write(writer, b".")
            os.close(writer)
            while os.getppid() != 1:
                signal.sigtimedwait([signal.SIGUSR1], 5)
        finally:
            os._exit(1)
    os.close(writer)
    with os.fdopen(reader, "rb") as answer:
        if not answer.read():
            os.waitpid(child, 0)
            raise OSError("unshare(CLONE_NEWNET) is not permitted")
    return child


def _ip(pid: int, arguments: str) -> None:
    command = ["nsenter", "-t", str(pid), "-n", "ip", *arguments.split()]
    subprocess.run(command, check=True, capture_output=True, text=True)
