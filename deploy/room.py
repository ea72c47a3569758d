"""Inside a network namespace of its own: one server, and the one way in from outside.

Run as a program by `milvus.py`: `unshare --net python room.py SOCKET LOCK PORT COMMAND…`. SOCKET is
the number of a listening socket that was opened outside: what it accepts stays outside, what we
connect is inside, on PORT. LOCK is a file that is locked as long as the server runs. We end with
the server, it ends with us, and both with the starter, who holds the other end of our standard
input: whoever is killed, nobody is left behind.
"""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import os
import signal
import socket
import struct
import subprocess
import sys
import threading
from typing import NoReturn

LOOPBACK = "127.0.0.1"
CHUNK = 1 << 18
SIOCSIFFLAGS, IFF_UP, IFF_RUNNING = 0x8914, 0x1, 0x40  # netdevice(7)
PR_SET_PDEATHSIG = 1  # prctl(2)


def loopback_up() -> None:
    """A new namespace has a loopback interface, switched off."""
    request = struct.pack("16sh14x", b"lo", IFF_UP | IFF_RUNNING)
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as any_socket:
        fcntl.ioctl(any_socket, SIOCSIFFLAGS, request)


def die_with_parent() -> None:
    """In the child, before it becomes the server: the kernel kills it when we are gone."""
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


def copy(source: socket.socket, target: socket.socket) -> None:
    """Until one side ends; if it ends badly, both are."""
    buffer = memoryview(bytearray(CHUNK))
    try:
        while size := source.recv_into(buffer):
            target.sendall(buffer[:size])
        target.shutdown(socket.SHUT_WR)
    except OSError:
        for end in (source, target):
            with contextlib.suppress(OSError):  # the other copier may have been first
                end.shutdown(socket.SHUT_RDWR)


def forward(outside: socket.socket, port: int) -> None:
    """Connect one accepted caller to the server; hang up while it does not listen yet."""
    with outside, contextlib.suppress(OSError), socket.create_connection((LOOPBACK, port)) as inner:
        for end in (outside, inner):
            end.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        back = threading.Thread(target=copy, args=(inner, outside), daemon=True)
        back.start()
        copy(outside, inner)
        back.join()


def accept_all(listener: socket.socket, port: int) -> NoReturn:
    """Two threads a caller: gRPC has one connection for all its calls."""
    while True:
        outside, _ = listener.accept()
        threading.Thread(target=forward, args=(outside, port), daemon=True).start()


def end_with_starter(server: subprocess.Popen[bytes]) -> None:
    """Nobody writes to our standard input: it ends when nobody holds its other end."""
    sys.stdin.buffer.read()
    server.kill()


def main() -> None:
    """See the module; prints the server's process id before anything that the server says."""
    listener, lock, port = socket.socket(fileno=int(sys.argv[1])), int(sys.argv[2]), sys.argv[3]
    loopback_up()
    server = subprocess.Popen(
        sys.argv[4:],
        stdin=subprocess.DEVNULL,
        stderr=subprocess.STDOUT,
        preexec_fn=die_with_parent,  # no thread has begun yet
        pass_fds=[lock],
    )
    print(server.pid, flush=True)
    for work, args in ((accept_all, (listener, int(port))), (end_with_starter, (server,))):
        threading.Thread(target=work, args=args, daemon=True).start()
    code = server.wait()
    os._exit(code if code >= 0 else 128 - code)  # not after threads that wait for callers


if __name__ == "__main__":
    main()
