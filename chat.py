# /// script
# requires-python = ">=3.11"
# dependencies = ["websockets>=17"]
# ///
"""A chat room that shows how a server pushes messages with WebSockets.

Run `python chat.py`, open the address that it prints in two windows, type in one.

`GET /` serves the page. `GET /ws` upgrades to a WebSocket (RFC 6455): a connection that stays
open, on which both sides may speak at any time. What they say goes in text frames that hold one
JSON object each. A client says

    {"content": "hello", "nonce": "c0ffee"}

and the server pushes to everyone, the sender included,

    {"type": "message", "username": "Port54321", "content": "hello",
     "id": "5eed", "nonce": "c0ffee", "time": "2026-11-23T09:30:00.000+00:00"}

Every frame from the server has `type`, `username` and `content`. The other types are `welcome`,
the first frame of a connection, with the name given to it and the `history`; `presence`, which
announces who came and who went, or only shows that the connection is alive; `error`, which tells
a sender what is wrong.

A message bears two identifiers. The sender chooses the `nonce`, to know its message when it comes
back, and to send it again if it does not: the server drops what has the nonce and the content of
a message that it remembers. The server chooses the `id`, to resume: after a disconnection, the
`welcome` on `GET /ws?after=5eed` has a history that begins after that message.
"""

import argparse
import asyncio
import contextlib
import functools
import hashlib
import json
import logging
import os
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
from urllib.parse import parse_qs

import websockets
from websockets import ConnectionClosed, Headers, Request, Response, ServerConnection, State

try:
    import resource
except ImportError:  # on Windows, which does not limit file descriptors
    resource = None  # type: ignore[assignment]

REMEMBERED = 50  # messages, for newcomers and for those who were away: a screen or two
MESSAGES_PER_SECOND = 20  # from one connection: nobody types faster, and a page resends as many
MAX_PEOPLE = 10_000  # at once: one process can push a message to so many in a tenth of a second

Fields = dict[str, Any]  # the JSON object in a frame

# The push


def push(connections: Iterable[ServerConnection], fields: Fields) -> None:
    """Send all of them the same frame, and wait for none. Nobody asked for it: that is push."""
    websockets.broadcast(connections, json.dumps(fields, ensure_ascii=False))


# The room


class Room:
    """Who is here, and what was said last."""

    def __init__(self) -> None:
        self.connections: set[ServerConnection] = set()
        self.names: set[str] = set()  # of the connections, no two the same
        self.history: deque[Fields] = deque(maxlen=REMEMBERED)  # messages, oldest first
        self.presence = Presence(self)  # announces who comes and goes
        self.capacity = MAX_PEOPLE  # less where the system has no room for so many

    def join(self, connection: ServerConnection, after: str | None) -> str:
        """Welcome a connection with what was said after that id. Return the name it is given."""
        name = port = f"Port{connection.remote_address[1]}"
        number = 1
        while name in self.names:  # two hosts may use the same port
            number += 1
            name = f"{port}-{number}"
        self.names.add(name)
        # No await may stand between copying the history and joining the set. Other connections run
        # while this one awaits, and what they say then would be neither in the copy nor pushed.
        # So the welcome is pushed, since `connection.send` has to be awaited.
        push([connection], self.welcome(name, after))
        self.connections.add(connection)
        self.presence.tell(name, "joined")
        return name

    def welcome(self, name: str, after: str | None) -> Fields:
        history, ids = list(self.history), [message["id"] for message in self.history]
        gap = after is not None and after not in ids  # forgotten, as may be some that came after it
        if after in ids:
            history = history[ids.index(after) + 1 :]
        content = f"Welcome! {name} is your name here, {len(self.names)} online."
        fields = {"type": "welcome", "username": name, "content": content}
        return fields | {"online": len(self.names), "history": history, "gap": gap}

    async def publish(self, message: Fields) -> None:
        """Take in a message. With several servers, a subclass would hand it to a message broker,
        which has each server call `deliver`; if that may not happen it would raise Refused (below).
        """
        self.deliver(message)

    def deliver(self, message: Fields) -> None:
        """Remember a message and push it to everyone, unless that was done already."""
        said = [(old["nonce"], old["content"]) for old in self.history]
        if (message["nonce"], message["content"]) not in said:
            self.history.append(message)
            push(self.connections, message)

    def leave(self, connection: ServerConnection, name: str) -> None:
        self.connections.discard(connection)
        self.names.discard(name)
        self.presence.tell(name, "left")


# One conversation


async def converse(room: Room, connection: ServerConnection) -> None:
    """Run one connection from its welcome to its end. websockets.serve calls this for each."""
    after = take_after(connection)
    if len(room.connections) >= room.capacity:
        await connection.close(1013, "The room is full. Try again in a minute.")
        return
    name = room.join(connection, after)
    times: deque[float] = deque(maxlen=MESSAGES_PER_SECOND)  # of its last messages, in seconds
    try:
        async for payload in connection:  # waits here until this client says something
            # While this sleeps nothing more is read: what is said too fast waits, in order.
            wait = times[0] + 1 - time.monotonic() if len(times) == MESSAGES_PER_SECOND else 0
            if wait > 0:
                await asyncio.sleep(wait)
                if connection.state is not State.OPEN:
                    break  # it has left: what it had still queued is dropped
            times.append(time.monotonic())
            try:
                await room.publish(parse_message(name, payload))
            except Refused as refused:
                push([connection], refused.fields)
    except ConnectionClosed:  # it broke, as happens every day; after a goodbye the loop just ends
        pass
    finally:
        room.leave(connection, name)


# Here ends the lesson. The rest makes it robust: first, checking what clients send

MAX_CONTENT = 2_000  # characters (code points) of a message: a long paragraph, not a file
MAX_NONCE = 64  # characters: any UUID or hash fits


class Refused(Exception):
    """A frame cannot be used. `fields` tell its sender why, and what to send instead."""

    def __init__(self, content: str, **more: str) -> None:
        super().__init__(content)
        self.fields = {"type": "error", "username": "server", "content": content, **more}


def parse_message(username: str, payload: str | bytes) -> Fields:
    """Return the message that a client's frame asks to push. Raises Refused."""
    try:
        said = json.loads(payload) if isinstance(payload, str) else None
    except (ValueError, RecursionError):
        said = None
    if not isinstance(said, dict):
        raise Refused('Send a text frame that holds a JSON object: {"content": "hello"}')
    content, nonce = text(said.get("content")).strip(), text(said.get("nonce"))
    if "nonce" in said and not 1 <= len(nonce) <= MAX_NONCE:
        raise Refused(f'Send a "nonce" that is text of 1 to {MAX_NONCE} characters, or none.')
    about = {"nonce": nonce} if nonce else {}
    if not content:
        raise Refused('Send "content" that is text and not blank: {"content": "hello"}', **about)
    if len(content) > MAX_CONTENT:
        raise Refused(f"Send at most {MAX_CONTENT:,} characters, not {len(content):,}.", **about)
    id, now = secrets.token_urlsafe(12), datetime.now(UTC).isoformat(timespec="milliseconds")
    fields = {"type": "message", "username": username, "content": content}
    return fields | {"id": id, "nonce": nonce or id, "time": now}


def text(value: object) -> str:
    """Return text as it is; "" for other JSON, and for unpaired surrogates, which JSON can hold
    but UTF-8 cannot (RFC 3629, section 3).
    """
    return value if isinstance(value, str) and not re.search("[\ud800-\udfff]", value) else ""


# Who comes and goes

PRESENCE_DELAY = 0.25  # seconds: a thousand joins at once cost a tab four frames a second
HEARTBEAT = 20  # seconds: pages never see a ping, so they listen for this sign of life


class Presence:
    """Tells a room who came and went, in one frame for many, and that its connections are alive."""

    def __init__(self, room: Room) -> None:
        self.room = room
        self.news: dict[str, str] = {}  # who "joined" or "left" since the last frame
        self.timer: asyncio.TimerHandle | None = None  # until the next; none in an empty room

    def tell(self, name: str, news: str) -> None:
        """Let the next frame say that somebody "joined" or "left"."""
        if name in self.news:  # it came and went, or went and came: no news
            del self.news[name]
        else:
            self.news[name] = news
        self.schedule(PRESENCE_DELAY)

    def schedule(self, delay: float) -> None:
        """Push the next frame in at most that many seconds, while anybody is here."""
        loop, timer, somebody = asyncio.get_running_loop(), self.timer, self.room.connections
        if somebody and timer and timer.when() <= loop.time() + delay:
            return
        if timer:
            timer.cancel()
        if somebody:
            self.timer = loop.call_later(delay, self.push)
        else:
            self.timer, self.news = None, {}

    def push(self) -> None:
        sentences = []
        for went in "joined", "left":
            names = [name for name, news in self.news.items() if news == went]
            who = ", ".join(names) if len(names) <= 3 else f"{len(names)} people"
            if names:
                sentences.append(f"{who} {went}.")
        content, online = " ".join(sentences), len(self.room.names)
        fields = {"type": "presence", "username": "server", "content": content, "online": online}
        push(self.room.connections, fields)
        self.timer, self.news = None, {}
        self.schedule(HEARTBEAT)


# The page over HTTP

MAX_HEADERS = 16 * 1024  # bytes: the library takes half a second for 1 MB of comma lists


def answer(page: str, connection: ServerConnection, request: Request) -> Response | None:
    """Answer a plain HTTP request; None leaves it to websockets to open a WebSocket."""
    path, headers = request.path.partition("?")[0], {}
    if request.method not in ("GET", "HEAD"):
        status, body, headers = 405, "Send GET or HEAD.\n", {"Allow": "GET, HEAD"}
    elif sum(len(value) for _, value in request.headers.raw_items()) > MAX_HEADERS:
        status, body = 431, "Send fewer headers.\n"
    elif path == "/":
        status, body, headers = 200, page, page_headers(page)
    elif path != "/ws":
        status, body = 404, "The chat is at /\n"
    elif not same_origin(request.headers):
        status, body = 403, "Only the page of this server may open a WebSocket here. Was it that? "
        body += "A proxy must forward Host as it came; nginx: proxy_set_header Host $http_host;\n"
    elif request.method == "HEAD":
        status, body, headers = 426, "", {"Upgrade": "websocket"}
    else:
        return None
    response = connection.respond(status, body)
    for name, value in headers.items():
        response.headers.pop(name, None)  # or there would be two
        response.headers[name] = value
    if request.method == "HEAD":
        response.body = b""
    return response


@functools.cache
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


def same_origin(headers: Headers) -> bool:
    """Tell whether the page that asks is ours. Any other site's could speak in the name of its
    visitors (RFC 6455, section 10.2). A client without Origin is not a browser, and welcome.

    A name that an attacker's DNS points here passes (DNS rebinding): behind a name, let the proxy
    check it.
    """
    origins = [origin.lower().partition("://")[2] for origin in headers.get_all("Origin")]
    return not origins or origins == [host.lower() for host in headers.get_all("Host")]


def take_after(connection: ServerConnection) -> str | None:
    """Return the ID in /ws?after=ID, and empty the request: it may have 1 MB of headers, which the
    library keeps as long as the connection.
    """
    request: Any = connection.request
    query = parse_qs(request.path.partition("?")[2])
    request.path = ""
    request.headers.clear()
    return query["after"][0] if "after" in query else None


# Starting and stopping

STOP_TIMEOUT = 1  # second for clients to answer the close frame when the server stops


async def run(room: Room, host: str, port: int) -> None:
    """Serve until SIGINT or SIGTERM. Raises SystemExit where that is not possible."""
    stopping, loop = asyncio.Event(), asyncio.get_running_loop()
    # loop.add_signal_handler is missing on Windows.
    on_signal(lambda *_: loop.call_soon_threadsafe(stopping.set))
    server = await start(room, host, port)
    url = address(server.sockets[0], host)
    print(f"Open {url} in two windows. Ctrl-C stops the chat.", flush=True)
    await stopping.wait()
    on_signal(signal.SIG_IGN)  # a second Ctrl-C changes nothing
    server.close()  # closes all connections with 1001, going away
    with contextlib.suppress(TimeoutError):
        await asyncio.wait_for(server.wait_closed(), STOP_TIMEOUT)
    # Who is left does not answer the close frame. Their tasks, cancelled, try to close once more;
    # asyncio.run cancels that, too.
    for task in asyncio.all_tasks() - {asyncio.current_task()}:
        task.cancel()
    await asyncio.sleep(0.05)


def on_signal(handler: Any) -> None:
    """Handle SIGTERM and Ctrl-C, also if a shell's `&` has started this with Ctrl-C ignored."""
    for number in signal.SIGINT, signal.SIGTERM:
        signal.signal(number, handler)


async def start(room: Room, host: str, port: int) -> websockets.Server:
    """Return a running server. Raises SystemExit, with advice, where it cannot start."""
    newcomers = 1024  # at once: after a restart all tabs come back, and the kernel lets them wait
    if resource:  # raise the soft limit on file descriptors to what is needed, as Go programs do
        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        with contextlib.suppress(ValueError, OSError):  # macOS may permit fewer than it says
            needed = MAX_PEOPLE + 2 * newcomers  # half of them to be turned away, or for the page
            resource.setrlimit(resource.RLIMIT_NOFILE, (min(max(soft, needed), hard), hard))
        descriptors = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
        newcomers = min(newcomers, descriptors // 4)
        room.capacity = min(MAX_PEOPLE, descriptors - 2 * newcomers)
    page = pathlib.Path(__file__).with_name("index.html")
    try:
        if not 0 <= port <= 65535:
            raise ValueError("ports go up to 65535")  # 65536 would wrap to 0: any free one
        return await websockets.serve(
            functools.partial(converse, room),
            host,
            port,
            process_request=functools.partial(answer, page.read_text(encoding="utf-8")),
            create_connection=functools.partial(Connection, Turn()),  # type: ignore[arg-type]
            compression=None,  # it would compress every message again for every tab
            max_size=32 * 1024,  # bytes: content escaped ("\ud83d\ude00", 12 a character), and more
            write_limit=MAX_UNSENT,
            backlog=newcomers,
        )
    except (OSError, ValueError) as problem:
        sys.exit(
            f"chat.py: cannot serve {page} at {host} port {port}: {problem}. "
            "Keep index.html beside chat.py, and choose an address with --host and --port."
        )


def address(bound: socket.socket, host: str) -> str:
    """Return where to open the page: for all addresses, the one that this machine's network has."""
    ip, port = bound.getsockname()[:2]
    if ip in ("0.0.0.0", "::"):
        host = "localhost"
        # To connect a UDP socket sends nothing, but picks the address that its packets would bear.
        # The other ends used here are reserved for examples (RFC 5737, RFC 3849).
        with contextlib.suppress(OSError), socket.socket(bound.family, socket.SOCK_DGRAM) as probe:
            probe.connect(("192.0.2.1" if ip == "0.0.0.0" else "2001:db8::1", 9))
            host = probe.getsockname()[0]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def read_options() -> argparse.Namespace:
    """Return host and port as the command line says, and set up the log."""
    parser = argparse.ArgumentParser(description="A chat room over WebSockets.")
    parser.add_argument("--host", default="localhost", help="0.0.0.0 for the whole network")
    parser.add_argument("--port", default=8080, type=int, help="default: %(default)s")
    parser.add_argument("--debug", action="store_true", help="log each handshake and frame")
    options = parser.parse_args()
    level = "DEBUG" if options.debug else "WARNING"
    logging.basicConfig(format="%(asctime)s %(message)s", level=level)
    # Where descriptors run out, newcomers wait a second; asyncio has a traceback for each of them,
    # and for each that waits when the server stops.
    noise = re.compile(r"socket\.accept\(\)|_start_serving")
    logging.getLogger("asyncio").addFilter(lambda record: not noise.search(record.msg))
    return options


# Reading and writing

READ_AT_ONCE = 4 * 1024  # bytes (on Windows 64 KiB): 700 of the smallest frames, 6 ms for others
MAX_UNSENT = 1024 * 1024  # bytes that a client may leave unread; a welcome has at most 600 KB
MAX_HELD = 16 * 1024  # bytes of one connection: 70 messages of usual length
NOT_FOR_WRITING = (  # what a transport does besides
    "abort can_write_eof get_extra_info get_protocol get_write_buffer_limits is_closing is_reading "
    "pause_reading resume_reading set_protocol set_write_buffer_limits"
)


Bytes = bytes | bytearray | memoryview


class Connection(ServerConnection, asyncio.BufferedProtocol):
    """A connection by which no other one is held up."""

    def __init__(self, turn: "Turn", *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self.turn = turn

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        gathering = GatheringTransport(transport, self.turn)  # type: ignore[arg-type]
        super().connection_made(gathering)

    def get_buffer(self, sizehint: int) -> memoryview:
        """Say where to read to, and so how much: a flood gets no more of a turn than others."""
        self.buffer = memoryview(bytearray(READ_AT_ONCE))
        return self.buffer

    def buffer_updated(self, nbytes: int) -> None:
        received = bytes(self.buffer[:nbytes])
        del self.buffer  # an idle connection keeps none
        self.data_received(received)
        # Where a client breaks the protocol right behind its request, the library ends the stream,
        # and would stumble over answering the request if it did not know that all is over.
        if self.request and not self.response and self.transport.ended:  # type: ignore[attr-defined]
            self.transport.abort()
            self.protocol.receive_eof()

    def pause_writing(self) -> None:
        """Cut off a client that reads too slowly: asyncio calls this at MAX_UNSENT bytes."""
        super().pause_writing()
        name = f"Port{self.remote_address[1]}"
        logging.warning("%s reads too slowly: cut off with %s bytes unsent", name, MAX_UNSENT)
        self.transport.abort()


class GatheringTransport(asyncio.Transport):
    """Holds what is written to a transport until the turn of the event loop ends. For speed: with
    hundreds of connections the kernel's send() is most of the cost of a message, and for ten
    frames it costs little more than for one.
    """

    def __init__(self, transport: asyncio.Transport, turn: "Turn") -> None:
        self.transport, self.turn = transport, turn
        self.held: list[bytes] = []
        self.held_size = 0  # bytes
        self.ended = False
        for name in NOT_FOR_WRITING.split():
            setattr(self, name, getattr(transport, name))

    def write(self, data: Bytes) -> None:
        turn = self.turn
        if data != turn.last:
            turn.last = bytes(memoryview(data))  # of a number, bytes() alone would make zeros
        if not self.held:
            if not turn.holding:
                asyncio.get_running_loop().call_soon(turn.end)
            turn.holding.append(self)
        self.held.append(turn.last)  # all hold one object: copies overflow the processor's caches
        self.held_size += len(turn.last)
        if self.held_size > MAX_HELD:
            self.flush()

    def get_write_buffer_size(self) -> int:
        return self.held_size + self.transport.get_write_buffer_size()

    def flush(self) -> None:
        held, self.held, self.held_size = self.held, [], 0
        if held and not self.transport.is_closing():
            self.transport.write(b"".join(held))

    def write_eof(self) -> None:
        self.finish()
        self.transport.write_eof()

    def close(self) -> None:
        self.finish()
        self.transport.close()

    def finish(self) -> None:
        self.flush()
        self.ended = True
        self.write = self.transport.write  # type: ignore[method-assign]  # it refuses more


class Turn:
    """A turn of the event loop: the transports that hold something until it ends."""

    def __init__(self) -> None:
        self.holding: list[GatheringTransport] = []
        self.last = b""  # that was written to any of them

    def end(self) -> None:
        holding, self.holding = self.holding, []
        for transport in holding:
            try:
                transport.flush()
            except Exception:  # it must not cost the others their frames
                logging.exception("A transport cannot be written to")
                transport.abort()


if __name__ == "__main__":
    options = read_options()
    try:
        asyncio.run(run(Room(), options.host, options.port))
    except BrokenPipeError:  # nobody reads what it prints, as in `python chat.py | head -0`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or it fails once more
        sys.exit(1)
