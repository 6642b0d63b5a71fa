# /// script
# requires-python = ">=3.11"
# dependencies = ["websockets>=17"]
# ///
"""A chat room that shows how a server pushes messages with WebSockets.

Run `python chat.py`, open the address that it prints in two tabs, type in one.

`GET /` serves the page. `GET /ws` upgrades to a WebSocket (RFC 6455): a connection that stays
open, on which both sides may speak at any time. What they say goes in text frames that hold one
JSON object each. A client says

    {"content": "hello", "id": "c0ffee"}

and the server pushes to everyone, the sender included,

    {"type": "message", "username": "Port54321", "content": "hello",
     "id": "c0ffee", "time": "2026-11-23T09:30:00.000+00:00"}

Its other frames have `type`, `username` and `content` as well: `welcome` comes first and tells a
newcomer its name and the `history`; `presence` tells everyone who came or went; `error` tells a
sender what was wrong.

After a disconnection, `GET /ws?after=c0ffee` resumes after that message. An `id` that is still
remembered is not pushed again, so a client may resend what it never saw come back.

To understand push, read `converse`, then `Room.join` and `Room.deliver`. The rest serves them.
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
MAX_FRAME = 32 * 1024  # bytes: MAX_CONTENT escaped ("\ud83d\ude00", 12 a character), and the rest
REMEMBERED = 50  # messages, for newcomers and for those who were away: a screen or two
MESSAGES_PER_SECOND = 20  # from one connection: nobody types faster, and pages resend as many
PRESENCE_INTERVAL = 0.25  # seconds: a thousand joins at once cost a tab four frames a second
PING_INTERVAL = 20  # seconds, and as many to answer: proxies cut connections silent for 60
MAX_UNSENT = 1024 * 1024  # bytes that a client may leave unread; a welcome has at most 600 KB
MAX_HELD = 16 * 1024  # bytes held for a connection until a turn of the event loop ends
SPARE_DESCRIPTORS = 32  # of the file descriptors, for newcomers, pages and the log
ACCEPTED_PER_TURN = 8  # newcomers: they take descriptors before it is known if there is room
LISTEN_BACKLOG = 1024  # connections that the kernel lets wait meanwhile: all tabs, coming back
CLOSE_TIMEOUT = 1  # seconds that a client has to answer a close frame
STOP_TIMEOUT = 1.5  # seconds for all of them when the server stops, half-open ones included

# Frames

Frame = dict[str, object]  # the JSON object in it


class Refused(Exception):
    """A client sent what cannot be used. Says what to send instead; `about` may hold its id."""

    def __init__(self, text: str, **about: str) -> None:
        super().__init__(text)
        self.about = about


def frame(type: str, username: str, content: str, **more: object) -> Frame:
    return {"type": type, "username": username, "content": content, **more}


def encode(fields: Frame) -> str:
    return json.dumps(fields, ensure_ascii=False)  # "é", not "\\u00e9": shorter, and legible


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
    """Tell text from other JSON, and from unpaired surrogates, which JSON can hold but UTF-8
    cannot (RFC 3629, section 3).
    """
    return isinstance(value, str) and not re.search("[\ud800-\udfff]", value)


def presence(joined: set[str], left: set[str], online: int) -> Frame:
    news = []
    for names, went in (joined, "joined"), (left, "left"):
        if names:
            some = ", ".join(sorted(names)) if len(names) <= 3 else f"{len(names)} people"
            news.append(f"{some} {went}.")
    return frame("presence", "server", " ".join(news), online=online)


# The room


class Room:
    """Who is here, and what was said last."""

    def __init__(self) -> None:
        self.connections: set[websockets.ServerConnection] = set()
        self.names: set[str] = set()  # of the connections, no two the same
        self.history: dict[str, Frame] = {}  # the last messages by id, oldest first
        self.announced: set[str] = set()  # the names that everyone was last told of
        self.announcement_due = False
        self.capacity = most_connections()

    def join(self, connection: websockets.ServerConnection, after: str | None) -> str:
        """Welcome a connection with what was said after that id. Return the name it is given."""
        port = f"Port{connection.remote_address[1]}"
        name, number = port, 1
        while name in self.names:  # the same port of another host
            number += 1
            name = f"{port}-{number}"
        self.names.add(name)
        history = list(self.history.values())
        gap = after is not None and after not in self.history
        if after in self.history:
            history = history[list(self.history).index(after) + 1 :]
        online = len(self.names)
        content = f"Welcome! {name} is your name here, {online} online."
        welcome = frame("welcome", name, content, online=online, history=history, gap=gap)
        # No await may stand between reading the history and joining the set: others could speak
        # meanwhile. So this is a broadcast to one, which needs none, where `send` would.
        websockets.broadcast([connection], encode(welcome))
        self.connections.add(connection)
        self.announce_soon()
        return name

    def leave(self, connection: websockets.ServerConnection, name: str) -> None:
        self.connections.discard(connection)
        self.names.discard(name)
        self.announce_soon()

    def announce_soon(self) -> None:
        """Let one presence frame tell of all who come and go within PRESENCE_INTERVAL."""
        if not self.announcement_due:
            self.announcement_due = True
            asyncio.get_running_loop().call_later(PRESENCE_INTERVAL, self.announce)

    def announce(self) -> None:
        joined, left = self.names - self.announced, self.announced - self.names
        self.announcement_due, self.announced = False, self.names.copy()
        if joined or left:
            news = presence(joined, left, len(self.names))
            websockets.broadcast(self.connections, encode(news))

    async def publish(self, message: Frame) -> None:
        """Take in a message. A subclass may pass it through a message broker before it calls
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
        # The push: nobody asked for this frame, but their connections are open.
        websockets.broadcast(self.connections, encode(message))


# One conversation


async def converse(room: Room, connection: websockets.ServerConnection) -> None:
    """Run one connection from its welcome to its end. websockets.serve calls this for each."""
    if len(room.connections) >= room.capacity:
        await connection.close(1013, "The room is full. Try again in a minute.")
        return
    request = cast(websockets.Request, connection.request)  # there is one after the handshake
    after = parse_qs(request.path.partition("?")[2]).get("after", [None])[0]
    name = room.join(connection, after)
    times: deque[float] = deque(maxlen=MESSAGES_PER_SECOND)  # when it spoke, in seconds
    try:
        async for payload in connection:  # waits here until this client says something
            if not await its_turn(connection, times):
                break
            try:
                id, content = parse(payload)
                now = datetime.now(UTC).isoformat(timespec="milliseconds")
                await room.publish(frame("message", name, content, id=id, time=now))
            except Refused as refused:
                error = frame("error", "server", str(refused), **refused.about)
                await connection.send(encode(error))
    except websockets.ConnectionClosed:
        pass  # clients vanish without a close frame every day
    finally:
        room.leave(connection, name)


async def its_turn(connection: websockets.ServerConnection, times: deque[float]) -> bool:
    """Wait until fewer than MESSAGES_PER_SECOND times are younger than a second. Return False
    if the client has gone by then: a flood ends with its sender.

    Meanwhile nothing more is read, so the rest waits in order, at last at the client.
    """
    wait = times[0] + 1 - time.monotonic() if len(times) == MESSAGES_PER_SECOND else 0
    if wait > 0:
        with contextlib.suppress(TimeoutError):  # which means that it is still there
            await asyncio.wait_for(connection.wait_closed(), wait)
            return False
    times.append(time.monotonic())
    return True


# The page over HTTP

PAGE = pathlib.Path(__file__).with_name("index.html")

WRONG_ORIGIN = """Only this server's own page may open a WebSocket here.
If it was that, a proxy changed the Host header, which it must forward as it came;
for nginx: proxy_set_header Host $http_host;
"""


def answer(
    page: str, connection: websockets.ServerConnection, request: websockets.Request
) -> websockets.Response | None:
    """Answer a plain HTTP request; None leaves it to websockets to open a WebSocket."""
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
        response = connection.respond(403, WRONG_ORIGIN)
    elif request.method == "HEAD":
        response = connection.respond(426, "")
        response.headers["Upgrade"] = "websocket"
    else:
        return None
    if request.method == "HEAD":
        response.body = b""
    return response


def page_headers(page: str) -> dict[str, str]:
    """Return the headers of the page. Of scripts and styles they allow those in the page, known
    by their hashes (CSP Level 3, section 2.3.1), and nothing from anywhere else.
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
    """Tell whether the page that asks is ours. Any other site's could speak in the name of its
    visitors (RFC 6455, section 10.2). A client without Origin is not a browser, and welcome.
    """
    origins = [origin.partition("://")[2] for origin in headers.get_all("Origin")]
    return not origins or origins == headers.get_all("Host")


# Writing: for speed alone, all above works without


class Connection(websockets.ServerConnection):
    """A connection to which the frames of one turn of the event loop go in one write."""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        gathering = GatheringTransport(cast(asyncio.Transport, transport))
        super().connection_made(cast(asyncio.Transport, gathering))

    def data_received(self, data: bytes) -> None:
        """Drop a client that broke the protocol right behind its request, before the answer."""
        super().data_received(data)
        if self.request and not self.response and cast(GatheringTransport, self.transport).ended:
            self.transport.abort()

    def pause_writing(self) -> None:
        """Cut off a client that reads too slowly: asyncio calls this at MAX_UNSENT bytes."""
        super().pause_writing()
        name = f"Port{self.remote_address[1]}"
        logging.warning("%s reads too slowly: cut off with %s bytes unsent", name, MAX_UNSENT)
        self.transport.abort()


class GatheringTransport:
    """Holds what is written to a transport until the turn of the event loop ends.

    With hundreds of connections, the kernel's send() is most of the cost of a message, and for
    ten frames it costs little more than for one. All but writing is the transport's own.
    """

    def __init__(self, transport: asyncio.Transport) -> None:
        self.transport = transport
        self.held: list[bytes] = []
        self.held_size = 0
        self.ended = False
        self.abort = transport.abort
        for name in TRANSPORT_METHODS - vars(GatheringTransport).keys():  # all that is not here
            setattr(self, name, getattr(transport, name))

    def write(self, data: bytes) -> None:
        global last_written
        if self.ended:
            raise RuntimeError("Cannot call write() after write_eof()")
        if data != last_written:
            last_written = data
        if not self.held:
            if not holding:
                asyncio.get_running_loop().call_soon(end_turn)
            holding.append(self)
        self.held.append(last_written)  # `broadcast` makes a copy for each: all hold the same one
        self.held_size += len(data)
        if self.held_size > MAX_HELD:
            self.flush()

    def flush(self) -> None:
        held, self.held, self.held_size = self.held, [], 0
        if held and not self.transport.is_closing():
            self.transport.write(b"".join(held))

    def write_eof(self) -> None:
        self.flush()
        self.ended = True
        self.transport.write_eof()

    def close(self) -> None:
        self.flush()
        self.transport.close()


def end_turn() -> None:
    global holding
    flushing, holding = holding, []
    for transport in flushing:
        try:
            transport.flush()
        except Exception:  # which must not cost the others their frames
            logging.exception("A transport cannot be written to")
            transport.abort()


holding: list[GatheringTransport] = []  # those to which something was written in this turn
last_written = b""  # to whichever of them
TRANSPORT_METHODS = {name for name in dir(asyncio.Transport) if not name.startswith("_")}


# Starting and stopping


async def run(room: Room, host: str, port: int) -> None:
    """Serve until SIGINT or SIGTERM. Raises SystemExit where that is not possible."""
    stopping, loop = asyncio.Event(), asyncio.get_running_loop()
    for number in (signal.SIGINT, signal.SIGTERM):
        # loop.add_signal_handler is missing on Windows. SIGINT gets a handler of its own, since
        # it comes ignored where a shell starts this in the background.
        signal.signal(number, lambda *_: loop.call_soon_threadsafe(stopping.set))
    server = await start(room, host, port)
    bound = server.sockets[0]
    address, port = bound.getsockname()[:2]
    everywhere = address in ("0.0.0.0", "::")
    print(f"Open {url('localhost' if everywhere else host, port)} in two tabs.")
    if everywhere and (address := lan_address(bound.family)):
        print(f"On another device in this network, open {url(address, port)}")
    print("Ctrl-C stops the chat.", flush=True)
    await stopping.wait()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)  # a second Ctrl-C changes nothing
    server.close()  # closes all connections with 1001, going away
    with contextlib.suppress(TimeoutError):
        await asyncio.wait_for(server.wait_closed(), STOP_TIMEOUT)


async def start(room: Room, host: str, port: int) -> websockets.Server:
    """Return a running server. Raises SystemExit, with advice, where it cannot start."""
    try:
        page = PAGE.read_text(encoding="utf-8")
    except (OSError, UnicodeError) as problem:
        sys.exit(f"chat.py: cannot read the page ({problem}). Put index.html beside chat.py.")
    try:
        if not 0 <= port <= 65535:
            raise OverflowError("ports go up to 65535")
        server = await websockets.serve(
            functools.partial(converse, room),
            host,
            port,
            process_request=functools.partial(answer, page),
            create_connection=Connection,
            compression=None,  # it would compress every message again for every tab
            ping_interval=PING_INTERVAL,
            ping_timeout=PING_INTERVAL,
            close_timeout=CLOSE_TIMEOUT,
            max_size=MAX_FRAME,
            write_limit=MAX_UNSENT,
            backlog=ACCEPTED_PER_TURN,  # and as many may wait, until the next lines
        )
    except (OSError, OverflowError, UnicodeError) as problem:
        where = f"{host} port {port} ({problem})"
        sys.exit(f"chat.py: cannot serve at {where}. Choose others with --host and --port.")
    for listening in server.sockets:
        with socket.fromfd(listening.fileno(), listening.family, listening.type) as same:
            same.listen(LISTEN_BACKLOG)
    return server


def most_connections() -> int:
    """Return how many connections the file descriptors allow; Windows sets no limit to them."""
    if resource is None:
        return sys.maxsize
    soft = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    return sys.maxsize if soft == resource.RLIM_INFINITY else max(1, soft - SPARE_DESCRIPTORS)


def url(host: str, port: int) -> str:
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def lan_address(family: socket.AddressFamily) -> str | None:
    """Return this machine's address in its network, if it is in one.

    To connect a UDP socket sends nothing, but picks the address that its packets would bear.
    The other ends used here are reserved for examples (RFC 5737, RFC 3849).
    """
    with contextlib.suppress(OSError), socket.socket(family, socket.SOCK_DGRAM) as probe:
        probe.connect(("192.0.2.1" if family == socket.AF_INET else "2001:db8::1", 9))
        return str(probe.getsockname()[0])
    return None


def read_options() -> argparse.Namespace:
    """Return host and port as the command line says, and set up the log."""
    parser = argparse.ArgumentParser(description="A chat room over WebSockets.")
    parser.add_argument("--host", default="localhost", help="0.0.0.0 for the whole network")
    parser.add_argument("--port", default=8080, type=int, help="default: %(default)s")
    parser.add_argument("--debug", action="store_true", help="log each handshake and frame")
    options = parser.parse_args()
    logging.basicConfig(format="%(asctime)s %(message)s")
    logging.getLogger("websockets").setLevel("DEBUG" if options.debug else "WARNING")
    return options


if __name__ == "__main__":
    options = read_options()
    asyncio.run(run(Room(), options.host, options.port))
