# /// script
# requires-python = ">=3.11"
# dependencies = ["websockets>=17"]
# ///
"""A chat room that shows how a server pushes messages with WebSockets.

Run `python chat.py`, open the address that it prints in two tabs, type in one.

`GET /` serves the page. `GET /ws` upgrades to a WebSocket (RFC 6455), on which every message
is one text frame that holds one JSON object. A client says

    {"content": "hello", "id": "c0ffee"}

and the server pushes to everyone, the sender included,

    {"type": "message", "username": "Port54321", "content": "hello",
     "id": "c0ffee", "time": "2026-11-23T09:30:00.000+00:00"}

All other frames from the server have `type`, `username` and `content` too: `welcome`, the first
and to the newcomer alone, with its name and the `history`; `presence`, to everyone, when people
come or go; `error`, to the sender alone, when a frame could not be used.

After a disconnection, `GET /ws?after=c0ffee` resumes behind that message. An `id` that is still
remembered is not pushed again: a client may resend what it never saw come back.
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
import signal
import socket
import sys
import time
import uuid
from base64 import b64encode
from collections import deque
from datetime import UTC, datetime
from typing import cast
from urllib.parse import parse_qs

import websockets

try:
    import resource
except ImportError:  # on Windows
    resource = None  # type: ignore[assignment]

# Limits

MAX_CONTENT = 2_000  # characters (code points) of a message: a long paragraph, not a file
MAX_ID = 64  # characters of an id: any UUID or hash fits
MAX_FRAME = 32 * 1024  # bytes: MAX_CONTENT at 12 a character ("\ud83d\ude00"), and the rest
REMEMBERED = 50  # messages, for newcomers and for those who were away: a screen or two
PRESENCE_INTERVAL = 0.25  # seconds: a thousand joins at once cost a tab four frames a second
PING_INTERVAL = 20  # seconds of silence, and again to answer: proxies cut idle connections at 60
MESSAGES_PER_SECOND = 20  # from one connection: nobody types faster, pages resend at once
SPARE_DESCRIPTORS = 32  # files and sockets not left to connections: pages, newcomers, the log
LISTEN_BACKLOG = 256  # connections that wait to be accepted: a lecture hall that reloads at once
MAX_HELD = 16 * 1024  # bytes held for a connection until the event loop's turn ends
MAX_BACKLOG = 1024 * 1024  # bytes a connection leaves unread: the longest welcome takes 600 KB
CLOSE_TIMEOUT = 1  # seconds that a tab has to answer a close frame
STOP_TIMEOUT = 1.5  # seconds that all have when the server stops, half-open ones included


def most_connections() -> int:
    """Return how many connections the file descriptors allow; Windows has no such limit."""
    if resource is None:
        return sys.maxsize
    soft = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    return sys.maxsize if soft == resource.RLIM_INFINITY else soft - SPARE_DESCRIPTORS


# Frames

Frame = dict[str, object]


class Refused(Exception):
    """Raised where something sent cannot be used: what to send instead, and about which id."""

    def __init__(self, text: str, **about: str) -> None:
        super().__init__(text)
        self.about = about


def frame(type: str, username: str, content: str, **more: object) -> Frame:
    return {"type": type, "username": username, "content": content, **more}


def encode(frame: Frame) -> str:
    return json.dumps(frame, ensure_ascii=False)  # UTF-8 is shorter than escapes, and legible


def parse(payload: str | bytes) -> tuple[str, str]:
    """Return the id and the content of what a client sent. Raises Refused."""
    try:
        said = json.loads(payload) if isinstance(payload, str) else None
    except (ValueError, RecursionError):
        said = None
    if not isinstance(said, dict):
        raise Refused('Send a text frame that holds a JSON object: {"content": "hello"}')
    id, content = said.get("id", uuid.uuid4().hex), said.get("content", "")
    if not is_text(id) or not 1 <= len(id) <= MAX_ID:
        raise Refused(f'Send an "id" that is text of 1 to {MAX_ID} characters, or none.')
    about = {"id": id} if "id" in said else {}
    if not is_text(content) or not content.strip():
        raise Refused('Send "content" that is text and not blank: {"content": "hello"}', **about)
    content = content.strip()
    if len(content) > MAX_CONTENT:
        raise Refused(f"Send at most {MAX_CONTENT:,} characters, not {len(content):,}.", **about)
    return id, content


def is_text(value: object) -> bool:
    """JSON can hold unpaired surrogates, UTF-8 cannot (RFC 3629, section 3)."""
    return isinstance(value, str) and not re.search("[\ud800-\udfff]", value)


def who(names: set[str], did: str) -> str:
    """Return what these people did, as a sentence; where they are many, only how many."""
    return f"{', '.join(sorted(names)) if len(names) < 4 else f'{len(names)} people'} {did}."


# The room


class Room:
    """Who is here, and what was said last."""

    def __init__(self) -> None:
        self.connections: set[websockets.ServerConnection] = set()
        self.names: set[str] = set()  # of the connections, no two the same
        self.announced: set[str] = set()  # the names at the time of the last presence frame
        self.announcing = False  # whether the next one is due
        self.history: dict[str, Frame] = {}  # messages by id, the oldest first
        self.capacity = most_connections()

    def join(self, connection: websockets.ServerConnection, after: str | None) -> str:
        """Welcome a connection with what was said after that id; return its name.

        There is no await between reading the history and joining the set, so no message can
        fall between them. (`broadcast` writes at once; `await connection.send` might wait.)
        """
        name = port = f"Port{connection.remote_address[1]}"
        number = 1
        while name in self.names:  # the same port of another host
            number += 1
            name = f"{port}-{number}"
        self.names.add(name)
        history, gap = list(self.history.values()), after is not None
        if after in self.history:
            history, gap = history[list(self.history).index(after) + 1 :], False
        online = len(self.names)
        content = f"Welcome! {name} is your name here, {online} online."
        welcome = frame("welcome", name, content, online=online, history=history, gap=gap)
        websockets.broadcast([connection], encode(welcome))
        self.connections.add(connection)
        self.announce_soon()
        return name

    def leave(self, connection: websockets.ServerConnection, name: str) -> None:
        self.connections.discard(connection)
        self.names.discard(name)
        self.announce_soon()

    def announce_soon(self) -> None:
        """One presence frame will tell of all who come and go until it is due."""
        if not self.announcing:
            self.announcing = True
            asyncio.get_running_loop().call_later(PRESENCE_INTERVAL, self.announce)

    def announce(self) -> None:
        joined, left = self.names - self.announced, self.announced - self.names
        self.announcing, self.announced = False, self.names.copy()
        news = [who(names, did) for names, did in ((joined, "joined"), (left, "left")) if names]
        if news:
            presence = frame("presence", "server", " ".join(news), online=len(self.names))
            websockets.broadcast(self.connections, encode(presence))

    async def publish(self, message: Frame) -> None:
        """Take in a message. A subclass may send it through a message broker on its way to
        `deliver`; where it cannot promise that the message gets there, it raises Refused.
        """
        self.deliver(message)

    def deliver(self, message: Frame) -> None:
        """Remember a message and push it to everyone, unless that was done already."""
        id = cast(str, message["id"])
        if id in self.history:
            return
        self.history[id] = message
        if len(self.history) > REMEMBERED:
            del self.history[next(iter(self.history))]
        websockets.broadcast(self.connections, encode(message))


# One conversation


async def converse(room: Room, connection: websockets.ServerConnection) -> None:
    """Run one connection from its welcome to its end."""
    if len(room.connections) >= room.capacity:
        await connection.close(1013, "The room is full. Try again in a minute.")
        return
    request = cast(websockets.Request, connection.request)  # there is one after the handshake
    after = parse_qs(request.path.partition("?")[2]).get("after", [None])[0]
    name = room.join(connection, after)
    spoke: deque[float] = deque(maxlen=MESSAGES_PER_SECOND)  # when, in seconds
    try:
        async for payload in connection:
            await wait_for_turn(spoke)
            try:
                id, content = parse(payload)
                now = datetime.now(UTC).isoformat(timespec="milliseconds")
                await room.publish(frame("message", name, content, id=id, time=now))
            except Refused as refused:
                error = frame("error", "server", str(refused), **refused.about)
                await connection.send(encode(error))
    except websockets.ConnectionClosed:
        pass  # tabs vanish without a close frame every day
    finally:
        room.leave(connection, name)


async def wait_for_turn(spoke: deque[float]) -> None:
    """Return when less than MESSAGES_PER_SECOND times in `spoke` are younger than a second.

    Meanwhile nothing is read, so what comes faster waits in order, in the kernel and the client.
    """
    now = time.monotonic()
    if len(spoke) == MESSAGES_PER_SECOND and now - spoke[0] < 1:
        await asyncio.sleep(spoke[0] + 1 - now)
    spoke.append(time.monotonic())


# The page over HTTP

PAGE = pathlib.Path(__file__).with_name("index.html")

FOREIGN = """Only this server's own page may open a WebSocket here.
If it was that, a proxy changed the Host header, which it must forward as it came;
for nginx: proxy_set_header Host $http_host;
"""


def answer(
    page: str, connection: websockets.ServerConnection, request: websockets.Request
) -> websockets.Response | None:
    """Answer a plain HTTP request; None starts the opening handshake of a WebSocket."""
    path = request.path.partition("?")[0]
    if request.method not in ("GET", "HEAD"):
        response = connection.respond(405, "Send GET or HEAD.\n")
        response.headers["Allow"] = "GET, HEAD"
    elif path == "/":
        response = connection.respond(200, page)
        del response.headers["Content-Type"]  # or there would be two
        response.headers.update(page_headers(page))
    elif path != "/ws":
        response = connection.respond(404, "The chat is at /\n")
    elif not same_origin(request.headers):
        response = connection.respond(403, FOREIGN)
    else:
        return None
    if request.method == "HEAD":
        response.body = b""
    return response


def page_headers(page: str) -> dict[str, str]:
    """Only the scripts and styles in the page may run: they are known by their hashes (CSP
    Level 3, section 2.3.1).
    """
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


def same_origin(headers: websockets.Headers) -> bool:
    """Tell whether a page of ours is asking: others could speak for whoever visits them (RFC
    6455, section 10.2). Clients without Origin are no browsers, and welcome.
    """
    origins = [origin.partition("://")[2] for origin in headers.get_all("Origin")]
    return not origins or origins == headers.get_all("Host")


# Writing


class Connection(websockets.ServerConnection):
    """A connection that is written to once in a turn of the event loop, and never waited for."""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        gathering = GatheringTransport(cast(asyncio.Transport, transport))
        super().connection_made(cast(asyncio.Transport, gathering))

    def pause_writing(self) -> None:
        """Cut the connection off; asyncio calls this when MAX_BACKLOG waits to be sent."""
        super().pause_writing()
        name, backlog = f"Port{self.remote_address[1]}", f"{MAX_BACKLOG:,} bytes"
        logging.warning("%s reads too slowly: cut off with %s unsent", name, backlog)
        self.transport.abort()


class GatheringTransport:
    """Holds what is written to a transport until the turn of the event loop ends.

    To hundreds of connections the kernel's send() is most of the cost of a message, and for
    ten frames it costs little more than for one. All but writing is the transport's own.
    """

    def __init__(self, transport: asyncio.Transport) -> None:
        self.transport = transport
        self.held: list[bytes] = []
        self.held_size = 0
        for name in TRANSPORT_METHODS - vars(GatheringTransport).keys():
            # (__getattr__ would slow down the way to `held` as well.)
            setattr(self, name, getattr(transport, name))

    def write(self, data: bytes) -> None:
        global newest
        if data != newest:
            newest = data
        if not self.held:
            asyncio.get_running_loop().call_soon(self.flush)
        self.held.append(newest)  # the same bytes for all connections, not a copy for each
        self.held_size += len(data)
        if self.held_size > MAX_HELD:
            self.flush()

    def flush(self) -> None:
        held, self.held, self.held_size = self.held, [], 0
        if held and not self.transport.is_closing():
            self.transport.write(b"".join(held))

    def write_eof(self) -> None:
        self.flush()
        self.transport.write_eof()

    def close(self) -> None:
        self.flush()
        self.transport.close()


newest = b""  # what was written last, to any connection
TRANSPORT_METHODS = {name for name in dir(asyncio.Transport) if not name.startswith("_")}


# Starting and stopping


async def start(room: Room, host: str, port: int) -> websockets.Server:
    """Return a running server. Raises OSError, OverflowError or ValueError if that fails."""
    page = PAGE.read_text(encoding="utf-8")
    if not 0 <= port <= 65535:
        raise OverflowError("ports go up to 65535")
    return await websockets.serve(
        functools.partial(converse, room),
        host,
        port,
        process_request=functools.partial(answer, page),
        backlog=LISTEN_BACKLOG,
        create_connection=Connection,
        compression=None,  # it would compress every message again for every tab
        ping_interval=PING_INTERVAL,
        ping_timeout=PING_INTERVAL,
        close_timeout=CLOSE_TIMEOUT,
        max_size=MAX_FRAME,
        write_limit=MAX_BACKLOG,
    )


async def run(room: Room, host: str, port: int) -> None:
    """Serve until SIGINT or SIGTERM. Raises SystemExit where the server cannot start."""
    try:
        server = await start(room, host, port)
    except FileNotFoundError:
        sys.exit(f"chat.py: the page is missing. Put index.html at {PAGE}.")
    except (OSError, OverflowError, ValueError) as problem:
        where = f"{host} port {port} ({problem})"
        sys.exit(f"chat.py: cannot serve at {where}. Choose others with --host and --port.")
    family, port = server.sockets[0].family, server.sockets[0].getsockname()[1]
    everywhere = host in ("0.0.0.0", "::")
    print(f"Open {url('localhost' if everywhere else host, port)} in two tabs.")
    if everywhere and (address := lan_address(family)):
        print(f"On another device in this network, open {url(address, port)}")
    print("Ctrl-C stops the chat.", flush=True)
    await stop_signal()
    server.close()  # with 1001, going away
    with contextlib.suppress(TimeoutError):
        await asyncio.wait_for(server.wait_closed(), STOP_TIMEOUT)


def url(host: str, port: int) -> str:
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def lan_address(family: socket.AddressFamily) -> str | None:
    """Return this machine's address in its network, if it is in one.

    Connecting a UDP socket sends nothing; it picks the address that packets would bear.
    Those to connect to are reserved for examples (RFC 5737, RFC 3849).
    """
    with contextlib.suppress(OSError), socket.socket(family, socket.SOCK_DGRAM) as probe:
        probe.connect(("192.0.2.1" if family == socket.AF_INET else "2001:db8::1", 9))
        return str(probe.getsockname()[0])
    return None


async def stop_signal() -> None:
    """Wait for SIGINT or SIGTERM.

    `loop.add_signal_handler` is missing on Windows. Shells start background jobs with SIGINT
    ignored, which would stay so if its handler were not set here.
    """
    loop, stopping = asyncio.get_running_loop(), asyncio.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: loop.call_soon_threadsafe(stopping.set))
    await stopping.wait()


def main(room: Room) -> None:
    """Read the command line and serve the room."""
    parser = argparse.ArgumentParser(description="A chat room over WebSockets.")
    parser.add_argument("--host", default="localhost", help="0.0.0.0 for the whole network")
    parser.add_argument("--port", default=8080, type=int, help="default: %(default)s")
    parser.add_argument("--debug", action="store_true", help="log each handshake and frame")
    args = parser.parse_args()
    logging.basicConfig(format="%(asctime)s %(message)s")
    logging.getLogger("websockets").setLevel("DEBUG" if args.debug else "WARNING")
    asyncio.run(run(room, args.host, args.port))


if __name__ == "__main__":
    main(Room())
