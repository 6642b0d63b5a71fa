# /// script
# requires-python = ">=3.11"
# dependencies = ["websockets>=17"]
# ///
"""A chat room that shows how a server pushes messages with WebSockets (RFC 6455).

`GET /` serves the page. `GET /ws` opens a WebSocket, on which both sides can send at any time. Each
text frame holds one JSON object. A client sends
    {"content": "hello", "nonce": "c0ffee"}
and the server pushes to every client, including the sender,
    {"type": "message", "username": "Port54321", "content": "hello",
     "id": "5eed", "nonce": "c0ffee", "time": "2026-11-26T09:30:00.000+00:00"}
The sender chooses the nonce. If a message does not come back, its sender repeats both, and the
server drops the duplicate. The server chooses the id. `GET /ws?after=5eed` asks for later messages.
Other frames are "welcome" (the history), "presence" (who joined or left) and "error".
"""

import argparse
import asyncio
import contextlib
import functools
import hashlib
import json
import logging
import pathlib
import re
import secrets
import signal
import socket
import sys
import time
from base64 import b64encode
from collections import deque
from collections.abc import Iterable
from datetime import UTC, datetime
from typing import Any

try:
    import websockets
    from websockets import ConnectionClosed, Request, Response, ServerConnection, State
except ImportError:
    websockets = None  # type: ignore[assignment]
if not websockets or int(websockets.version.version.split(".")[0]) < 17:
    sys.exit(f'Install websockets 17 or newer: {sys.executable} -m pip install "websockets>=17"')

HISTORY_SIZE = 50  # messages that the room remembers: a screen or two for new clients
MESSAGES_PER_SECOND = 20  # from one connection: nobody types faster
MAX_CONNECTIONS = 10_000  # one process pushes a message to this many in 0.1 to 0.3 s


def push(connections: Iterable[ServerConnection], fields: dict[str, Any]) -> None:
    """Send one frame to every connection, unrequested, without waiting for any of them."""
    websockets.broadcast(connections, json.dumps(fields, ensure_ascii=False))


class Room:
    """The open connections and the latest messages."""

    def __init__(self) -> None:
        self.connections: set[ServerConnection] = set()
        self.names: set[str] = set()  # a different one for each connection
        self.history: deque[dict[str, Any]] = deque(maxlen=HISTORY_SIZE)  # messages, oldest first
        self.capacity = MAX_CONNECTIONS  # fewer if the operating system allows fewer
        self.changed = asyncio.Event()  # set when a connection joins or leaves
        self.unflushed: list[Connection] = []  # those that have unsent frames
        self.latest: list[bytes] = []  # the frame that was queued last, for all to share
        self.stopping = False

    def join(self, connection: ServerConnection, after: str | None) -> str:
        """Welcome a connection, add it to the room and return its name."""
        name = port = f"Port{connection.remote_address[1]}"
        suffix = 2
        while name in self.names:  # Clients on two hosts can have the same port.
            name, suffix = f"{port}-{suffix}", suffix + 1
        self.names.add(name)
        # Do not await between copying the history and adding the connection. Other tasks run during
        # an await, and this client would never get a message that they publish then.
        ids = [message["id"] for message in self.history]
        start = ids.index(after) + 1 if after in ids else 0
        gap = after is not None and after not in ids  # Messages since `after` may be lost.
        more = {"online": len(self.names), "history": list(self.history)[start:], "gap": gap}
        content = f"Welcome! {name} is your name here, {len(self.names)} online."
        push([connection], {"type": "welcome", "username": name, "content": content, **more})
        self.connections.add(connection)
        self.changed.set()
        return name

    async def publish(self, message: dict[str, Any]) -> None:
        """Push a message to every connection and remember it, unless the room already has it."""
        # Async so that a subclass can await a message broker (see README.md).
        known = [(old["nonce"], old["content"]) for old in self.history]
        if not self.stopping and (message["nonce"], message["content"]) not in known:
            push(self.connections, message)
            self.history.append(message)

    def leave(self, connection: ServerConnection, name: str) -> None:
        self.connections.discard(connection)
        self.names.discard(name)
        self.changed.set()


async def converse(room: Room, connection: ServerConnection) -> None:
    """Serve one connection, from its welcome to its end. websockets calls this for each one."""
    if len(room.connections) >= room.capacity:
        connection.loop.call_later(CLOSE_TIMEOUT, connection.transport.abort)  # if unanswered
        return await connection.close(1013, "The room is full. Try again in a minute.")
    resume = re.search("[?&]after=([^&]+)", connection.request.path)  # type: ignore[union-attr]
    name = room.join(connection, resume[1] if resume else None)
    came_at = [-1.0] * MESSAGES_PER_SECOND  # times (s) of the latest frames; -1: long ago
    try:
        async for payload in connection:  # waits until this client sends a frame
            wait = came_at.pop(0) + 1 - time.monotonic()
            if wait > 0:
                await asyncio.sleep(wait)  # Nothing is read meanwhile, so the client has to wait.
                if connection.state is not State.OPEN:
                    connection.transport.abort()  # The client has left, so drop its flood.
                    break
            came_at.append(time.monotonic())
            try:
                await room.publish(parse_message(name, payload))
            except Refused as refused:
                push([connection], refused.fields)
    except ConnectionClosed:
        pass  # The connection broke. (A close frame ends the loop without an exception.)
    finally:
        room.leave(connection, name)


# The lesson ends here. The rest makes the chat robust. First, what clients send:
MAX_CONTENT = 2_000  # characters (code points): a long paragraph, not a file
SURROGATE = re.compile("[\ud800-\udfff]")  # unpaired: JSON allows it, UTF-8 does not


class Refused(Exception):
    """A frame cannot be used. `fields` tells its sender why and what to send instead."""

    def __init__(self, content: str, **more: str) -> None:
        self.fields = {"type": "error", "username": "server", "content": content, **more}


def parse_message(username: str, payload: str | bytes) -> dict[str, Any]:
    """Make a message from a client's frame, or raise Refused."""
    if isinstance(payload, bytes):
        raise Refused("Send a text frame, not a binary frame.")
    try:
        sent = json.loads(payload)
    except (ValueError, RecursionError) as problem:
        raise Refused(f"Send JSON. This frame is not JSON: {problem}") from None
    if not isinstance(sent, dict):
        raise Refused('Send a JSON object: {"content": "hello"}')
    content, nonce = sent.get("content"), sent.get("nonce", "")
    if "nonce" in sent and not (isinstance(nonce, str) and 1 <= len(nonce) <= 64):
        raise Refused('Send 1 to 64 characters as "nonce", or omit it.')
    echo = {"nonce": nonce} if nonce and not SURROGATE.search(nonce) else {}
    if not isinstance(content, str) or not content.strip():
        raise Refused('Send a "content" that is a string and not blank: {"content": "hi"}', **echo)
    if SURROGATE.search(nonce + content):
        raise Refused("Send text without unpaired surrogates: UTF-8 has no bytes for them.", **echo)
    content = content.strip()
    if len(content) > MAX_CONTENT:
        raise Refused(f"Send at most {MAX_CONTENT:,} characters, not {len(content):,}.", **echo)
    id, now = secrets.token_urlsafe(12), datetime.now(UTC).isoformat(timespec="milliseconds")
    more = {"id": id, "nonce": nonce or id, "time": now}
    return {"type": "message", "username": username, "content": content, **more}


PRESENCE_DELAY = 0.25  # seconds: at most four frames a second, however many clients join
HEARTBEAT = 20  # seconds: browsers hide pings from pages, so a frame shows that the server lives


async def announce_presence(room: Room) -> None:
    """Push who joined and who left. If nobody did, push a heartbeat."""
    announced: set[str] = set()
    while True:
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(HEARTBEAT - PRESENCE_DELAY):
                await room.changed.wait()
        await asyncio.sleep(PRESENCE_DELAY)  # One frame announces all that happens meanwhile.
        room.changed.clear()
        sentences = []
        for change, names in ("joined", room.names - announced), ("left", announced - room.names):
            who = ", ".join(sorted(names)) if len(names) <= 3 else f"{len(names)} people"
            if names:
                sentences.append(f"{who} {change}.")
        announced = room.names.copy()
        fields = {"type": "presence", "username": "server", "content": " ".join(sentences)}
        push(room.connections, fields | {"online": len(announced)})


def answer(page: str, connection: ServerConnection, request: Request) -> Response | None:
    """Return the response to a plain HTTP request, or None to let websockets upgrade it."""
    # A request may hold the whole URL (RFC 9112, 3.2.2).
    path = re.sub("^https?://[^/?]*", "", request.path, flags=re.I).partition("?")[0] or "/"
    origin, host = (", ".join(request.headers.get_all(name)) for name in ("Origin", "Host"))
    if request.method not in ("GET", "HEAD"):
        return None  # websockets answers 405.
    if path == "/":
        response = connection.respond(200, page)
        del response.headers["Content-Type"]  # or there would be two
        response.headers.update(page_headers(page))
    elif path != "/ws":
        response = connection.respond(404, "The chat is at /\n")
    elif origin and not same_origin(origin, host):
        why = f"Origin {origin[:80]} is not Host {host[:80]}. A proxy must forward Host.\n"
        logging.warning("403: %s", why.rstrip())  # because browsers do not show it
        response = connection.respond(403, why)
    elif request.method == "HEAD":
        response = connection.respond(426, "")
        response.headers["Upgrade"] = "websocket"
    else:
        return None
    if request.method == "HEAD":
        response.body = b""
    return response


def page_headers(page: str) -> dict[str, str]:
    """Return headers that allow only the page's own scripts and styles, by hash (CSP 3, 2.3.1)."""
    inline = re.findall("<(?:script|style)>(.*?)</", page, re.DOTALL)
    digests = [b64encode(hashlib.sha256(part.encode()).digest()).decode() for part in inline]
    hashes = " ".join(f"'sha256-{digest}'" for digest in digests)
    return {
        "Content-Type": "text/html; charset=utf-8",
        "Content-Security-Policy": f"default-src 'none'; script-src {hashes}; style-src {hashes}; "
        "img-src data:; connect-src 'self'; base-uri 'none'; form-action 'none'; "
        "frame-ancestors 'none'; require-trusted-types-for 'script'",
        "X-Content-Type-Options": "nosniff",
        "Referrer-Policy": "no-referrer",
        "Cache-Control": "no-store",
    }


def same_origin(origin: str, host: str) -> bool:
    """Return whether a request comes from our page, not from another site's (RFC 6455, 10.2)."""
    scheme, _, address = origin.lower().partition("://")
    default_port = {"http": ":80", "https": ":443"}.get(scheme, "")  # RFC 6454, 4
    return address.removesuffix(default_port) == host.lower().removesuffix(default_port)


MAX_REQUEST = 16 * 1024  # bytes: websockets itself would read, parse and keep 1 MB


class Connection(ServerConnection):
    """A connection that sends frames in batches and limits what its client sends."""

    request_size = 0  # bytes

    def __init__(self, room: Room, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.room = room
        self.unsent: list[bytes] = []  # frames

    def send_data(self) -> None:
        """Send the frames of one event loop iteration together, because system calls are slow.
        websockets calls this after each frame. Undocumented; the chat works without it.
        """
        if self.protocol.state is not State.OPEN:
            flush([self])
            super().send_data()
            return
        if not self.unsent:
            if not self.room.unflushed:
                self.loop.call_soon(flush, self.room.unflushed)
            self.room.unflushed.append(self)
        if (frames := self.protocol.data_to_send()) != self.room.latest:
            self.room.latest = frames
        self.unsent += self.room.latest  # Shared frames take less memory, and so less time.

    def data_received(self, data: bytes) -> None:
        self.request_size += len(data) if self.state is State.CONNECTING else 0
        # During a stop, a client owes only a close frame. Reading a flood would take seconds.
        if self.request_size > MAX_REQUEST or (self.room.stopping and len(data) > 1024):
            self.transport.abort()
            return
        super().data_received(data)
        # If garbage follows a request, websockets fails before it answers, and logs a traceback.
        if self.request and not self.response and self.protocol.close_expected():
            self.transport.abort()

    def pause_writing(self) -> None:
        """Cut off a client that reads too slowly. asyncio calls this at the write limit."""
        self.transport.abort()
        logging.warning("Port%s reads too slowly and is cut off", self.remote_address[1])


def flush(unflushed: list[Connection]) -> None:
    """Write the unsent frames of connections, and empty the list."""
    for connection in unflushed:
        frames, connection.unsent = connection.unsent, []
        try:
            if frames and not connection.transport.is_closing():
                connection.transport.write(b"".join(frames))
        except Exception:  # It must not cost the other connections their frames.
            logging.exception("Cannot send to Port%s", connection.remote_address[1])
            connection.transport.abort()
    unflushed.clear()


# Starting and stopping
CLOSE_TIMEOUT = 1  # seconds to answer a close frame


async def run(room: Room, host: str, port: int) -> None:
    """Serve until SIGINT or SIGTERM. Raise SystemExit, with advice, if the start fails."""
    presence, loop = asyncio.create_task(announce_presence(room)), asyncio.get_running_loop()

    def stop(*_: Any) -> None:
        if not room.stopping:  # A second signal can come after the loop has ended.
            room.stopping = True
            loop.call_soon_threadsafe(presence.cancel)

    for number in signal.SIGINT, signal.SIGTERM:  # Windows has no loop.add_signal_handler.
        signal.signal(number, stop)
    server = await start(room, host, port)
    print(f"Open {get_url(server)} in two windows. Ctrl-C stops the chat.", flush=True)
    await asyncio.wait([presence])  # stop() cancels it. A defect would end it, too.
    server.close()  # with code 1001, going away
    with contextlib.suppress(TimeoutError):
        await asyncio.wait_for(server.wait_closed(), CLOSE_TIMEOUT)
    for connection in room.connections:
        connection.transport.abort()
    if not presence.cancelled():
        presence.result()  # raises


async def start(room: Room, host: str, port: int) -> websockets.Server:
    """Return a listening server. Raise SystemExit, with advice, if the start fails."""
    if not 0 <= port <= 65535:  # 65536 would wrap to 0, which means any free port.
        sys.exit("chat.py: choose a --port from 0 to 65535.")
    room.capacity = min(MAX_CONNECTIONS, raise_descriptor_limit(2 * MAX_CONNECTIONS) // 2)
    page = pathlib.Path(__file__).resolve().with_name("index.html")
    try:
        server = await websockets.serve(
            functools.partial(converse, room),
            host,
            port,
            process_request=functools.partial(answer, page.read_text(encoding="utf-8")),
            create_connection=functools.partial(Connection, room),  # type: ignore[arg-type]
            compression=None,  # It would compress each message again for every connection.
            max_size=32 * 1024,  # bytes: 2,000 characters, each escaped ("\ud83d\ude00")
            write_limit=1024 * 1024,  # bytes that a client can leave unread: a welcome has 600 KB
            backlog=1024,  # connections that wait: after a restart, all tabs come back at once
        )
    except (OSError, ValueError) as problem:
        advice = "Keep index.html beside chat.py, or choose another --host or --port."
        sys.exit(f"chat.py: cannot serve {page} at {host} port {port}: {problem}. {advice}")
    for listener in server.sockets:  # Accepted sockets inherit this and buffer little of a flood.
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)  # bytes
    return server


def raise_descriptor_limit(wanted: int) -> int:
    """Raise the limit on open sockets and files towards `wanted`, and return the new limit."""
    with contextlib.suppress(ImportError):  # Windows has no such limit.
        import resource

        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        with contextlib.suppress(ValueError, OSError):  # macOS may refuse what hard allows.
            resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, min(wanted, hard)), hard))
        return resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    return wanted


def get_url(server: websockets.Server) -> str:
    """Return the address of the page, as other machines see it if the server listens to them."""
    listener = server.sockets[0]
    host, port = listener.getsockname()[:2]
    # A UDP connect sends nothing, but picks our address. RFC 5737 and 3849 reserve the targets.
    if destination := {"0.0.0.0": "192.0.2.1", "::": "2001:db8::1"}.get(host):
        host = "localhost"  # if there is no network
        with contextlib.suppress(OSError), socket.socket(listener.family, socket.SOCK_DGRAM) as udp:
            udp.connect((destination, 9))
            host = udp.getsockname()[0]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


class PrintableFormatter(logging.Formatter):
    """Escape what a client could use to drive the terminal or to forge a line of the log."""

    def format(self, record: logging.LogRecord) -> str:
        text = super().format(record).replace("\n", "\n    ")
        return "".join(c if c.isprintable() or c == "\n" else ascii(c)[1:-1] for c in text)


def read_options() -> tuple[str, int]:
    """Return the host and the port on the command line, and set up logging."""
    parser = argparse.ArgumentParser(description="A chat room over WebSockets.")
    parser.add_argument("--host", default="127.0.0.1", help="0.0.0.0 for the whole network")
    parser.add_argument("--port", default=8080, type=int, help="default: %(default)s")
    parser.add_argument("--debug", action="store_true", help="log each handshake and frame")
    options = parser.parse_args()
    logging.basicConfig(level="DEBUG" if options.debug else "WARNING")
    logging.root.handlers[0].setFormatter(PrintableFormatter("%(asctime)s %(message)s"))
    # If descriptors run out, asyncio logs a traceback for each connection that has to wait.
    logging.getLogger("asyncio").addFilter(lambda r: not re.search("accept|_start_serving", r.msg))
    return options.host, options.port


if __name__ == "__main__":
    asyncio.run(run(Room(), *read_options()))
