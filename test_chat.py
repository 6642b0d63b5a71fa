"""Tests of the chat: its promises, over real connections.

They come in layers: the room (a server in this process), the program (`python chat.py`), and the
page with its wire (in Chromium).
"""

import asyncio
import collections
import contextlib
import functools
import itertools
import json
import logging
import math
import os
import pathlib
import re
import shutil
import signal
import socket
import struct
import subprocess
import sys
import tempfile
import time
import tracemalloc
import types
import unittest
from datetime import UTC, datetime, timedelta
from unittest import mock

import websockets
from websockets.sync.client import connect

import chat

HERE = pathlib.Path(__file__).resolve().parent
PATIENCE = 8  # seconds: a longer wait fails. websockets itself gives up after 10.
MONOTONIC = time.monotonic
SKIPPED = collections.defaultdict(list)  # the ids of tests, by the reason


def tearDownModule():
    """Print which tests were skipped and why. unittest itself does so with -v only."""
    for reason, ids in SKIPPED.items():
        print(f"\nSkipped, because {reason}: {', '.join(ids)}", file=sys.stderr)


async def until(condition):
    """Wait until condition() is true."""
    async with asyncio.timeout(PATIENCE):
        while not condition():
            await asyncio.sleep(0.005)


def request(line, **headers):
    """Return the bytes of an HTTP request."""
    lines = [f"{name}: {value}" for name, value in headers.items()]
    return "\r\n".join([f"{line} HTTP/1.1", *lines, "", ""]).encode()


UPGRADE = {"Connection": "Upgrade", "Upgrade": "websocket", "Sec-WebSocket-Version": "13"}
UPGRADE["Sec-WebSocket-Key"] = "dGhlIHNhbXBsZSBub25jZQ=="
HANDSHAKE = request("GET /ws", Host="127.0.0.1", **UPGRADE)


def masked(payload, first=0x81):
    """Return the bytes of a client's frame, masked with zeros (RFC 6455, section 5.2)."""
    size = len(payload)
    length = bytes([0x80 | size]) if size < 126 else b"\xfe" + size.to_bytes(2)
    return bytes([first]) + length + bytes(4) + payload


def said(content, **more):
    """Return the bytes of a client's frame that says something."""
    return masked(json.dumps({"content": content, **more}).encode())


GOODBYE, PING = masked(b"", first=0x88), masked(b"", first=0x89)
CHECK = unittest.TestCase()  # for assertions of what is not a test


class Client(websockets.ClientConnection):
    """A well-behaved client, as a tab is. Its verbs wait for the next frame."""

    async def frame(self, *types):
        """Return the next frame, or the next of these types."""
        async with asyncio.timeout(PATIENCE):
            while True:
                self.payload = await self.recv()
                frame = json.loads(self.payload)
                if not types or frame["type"] in types:
                    return frame

    async def says(self, *contents, **more):
        for content in contents:
            await self.send(json.dumps({"content": content, **more}))

    async def hears(self, *contents):
        """Assert that the next messages have these contents. Return the last message."""
        frames = [await self.frame("message", "error") for _ in contents]
        CHECK.assertEqual([frame["content"] for frame in frames], [*contents])
        return frames[-1]

    async def is_refused(self, why, **more):
        """Assert that the next frame is an error whose content matches `why`."""
        error = await self.frame("message", "error")
        CHECK.assertRegex(error.pop("content"), why)
        CHECK.assertEqual(error, {"type": "error", "username": "server", **more})

    async def is_told(self, sentence, online):
        """Assert that the next frame about presence has this sentence and this number."""
        expected = {"type": "presence", "username": "server", "content": sentence}
        CHECK.assertEqual(await self.frame("presence"), expected | {"online": online})

    async def is_closed_with(self, code):
        """Assert that no more messages come before the connection closes with this code."""
        with CHECK.assertRaises(websockets.ConnectionClosed):
            await self.frame("message", "error")
        CHECK.assertEqual(self.close_code, code)


def names(*clients):
    return ", ".join(sorted(client.name for client in clients))


class Line:
    """A raw connection for clients that misbehave. It reads nothing until a test asks it to."""

    def __init__(self, port, **buffers):
        self.socket, self.heard = socket.socket(), b""
        for name, size in buffers.items():
            self.socket.setsockopt(socket.SOL_SOCKET, getattr(socket, name), size)
        self.socket.settimeout(PATIENCE)
        self.socket.connect(("127.0.0.1", port))
        self.socket.setblocking(False)
        self.port = self.socket.getsockname()[1]

    async def sends(self, data):
        with contextlib.suppress(ConnectionError):  # Then reading shows that the server closed it.
            async with asyncio.timeout(PATIENCE):
                await asyncio.get_running_loop().sock_sendall(self.socket, data)

    async def reads(self):
        """Return the next bytes, or none if the server has closed the connection."""
        with contextlib.suppress(ConnectionError):
            async with asyncio.timeout(PATIENCE):
                data = await asyncio.get_running_loop().sock_recv(self.socket, 65536)
                self.heard += data
                return data
        return b""

    async def hears(self, data):
        """Read until these bytes have come."""
        while data not in self.heard:
            if not await self.reads():
                raise AssertionError(f"{data} did not come, only {self.heard}")

    async def ends(self):
        """Return all that comes until the server closes the connection."""
        while await self.reads():
            pass
        return self.heard

    def vanish(self):
        """Reset the connection."""
        self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.socket.close()


class Case(unittest.IsolatedAsyncioTestCase):
    """Talks to the server at self.port."""

    async def asyncSetUp(self):
        asyncio.get_running_loop().set_debug(False)  # It makes everything half as fast.
        await asyncio.sleep(0)  # This iteration would still log a warning if it were slow.

    def skip(self, reason):
        """Skip the test, or fail it if the environment variable CHAT_NO_SKIPS is set."""
        if os.environ.get("CHAT_NO_SKIPS"):
            self.fail(f"nothing may be skipped here, but {reason}")
        SKIPPED[reason].append(self.id().removeprefix(f"{__name__}."))
        self.skipTest(reason)

    async def joins(self, after=None, **options):
        """Return a client that has got its welcome. It leaves when the test ends."""
        url = f"ws://127.0.0.1:{self.port}/ws" + ("" if after is None else f"?a&after={after}")
        options = {"proxy": None, "ping_interval": None, "max_queue": None} | options
        client = await websockets.connect(url, create_connection=Client, **options)
        self.addAsyncCleanup(client.close)
        client.welcome = await client.frame()
        self.assertEqual(client.welcome["type"], "welcome")
        client.name, client.port = client.welcome["username"], client.local_address[1]
        return client

    async def calls(self, data=b"", **buffers):
        """Return a raw connection on which these bytes were sent. It closes when the test ends."""
        line = Line(self.port, **buffers)
        self.addCleanup(line.socket.close)
        await line.sends(data)
        return line

    async def shakes_hands(self, **buffers):
        """Return a raw connection that has got its welcome."""
        line = await self.calls(HANDSHAKE, **buffers)
        await line.hears(b"welcome")
        return line

    async def http(self, line, **headers):
        """Send a request. Return its status, its headers and its body."""
        sent = request(line, **{"Host": f"127.0.0.1:{self.port}"} | headers)
        line = await self.calls(sent)
        answer = await line.ends()
        head, _, body = answer.decode().partition("\r\n\r\n")
        status, *fields = head.split("\r\n")
        return int(status.split()[1]), [tuple(field.split(": ", 1)) for field in fields], body


class ServerCase(Case):
    """A room of its own for each test. It must log no warning and keep nobody."""

    async def asyncSetUp(self):
        await super().asyncSetUp()
        self.enterContext(self.assertNoLogs(level="WARNING"))
        self.passed = 0  # seconds
        self.enterContext(mock.patch.multiple(time, monotonic=lambda: MONOTONIC() + self.passed))
        self.room = chat.Room()
        self.addAsyncCleanup(self.assert_nothing_is_left)
        self.server = await self.serves()
        presence = asyncio.create_task(chat.announce_presence(self.room))
        self.addCleanup(presence.cancel)

    async def serves(self, port=0):
        """Start a server for the room. Return it."""
        server = await chat.start(self.room, "127.0.0.1", port)
        self.port = server.sockets[0].getsockname()[1]
        self.addAsyncCleanup(self.stops, server)
        return server

    async def stops(self, server):
        server.close()
        async with asyncio.timeout(PATIENCE):
            await server.wait_closed()

    async def assert_nothing_is_left(self):
        self.assertEqual((self.room.connections, self.room.names), (set(), set()))
        await until(lambda: asyncio.all_tasks() == {asyncio.current_task()})

    def set(self, **constants):
        """Give constants of chat.py other values until the test ends."""
        self.enterContext(mock.patch.multiple(chat, **constants))

    async def passes(self, seconds):
        """Let time pass, for the event loop and for chat.py, without waiting for it."""
        for _ in range(10):  # Whatever is about to sleep begins to.
            await asyncio.sleep(0)
        self.passed += seconds

    async def publishes(self, *contents):
        """Publish messages within one iteration of the event loop, as a broker's catch-up does."""
        for content in contents:
            await self.room.publish(chat.parse_message("Port1", json.dumps({"content": content})))

    async def has(self, count):
        """Wait until so many are in the room."""
        await until(lambda: len(self.room.connections) == count)

    def end_of(self, client):
        """Return the server's end of a client's connection."""
        ends = {end.remote_address[1]: end for end in self.room.connections}
        return ends[client.port]


# The room

GOOD_FRAMES = [  # with the content and the nonce, or None for the id, of the message
    (json.dumps({"content": "hello", "nonce": "é" * 64}), "hello", "é" * 64),
    (r'{"content": "\n  a\n\n żółć 👋 \t"}', "a\n\n żółć 👋", None),
    ('{"content": " ' + r"\ud83d\ude00" * 2000 + ' "}', "😀" * 2000, None),
    ('{"content": "hi", "type": "error", "username": "root", "id": "a", "online": 7}', "hi", None),
]


class Messages(ServerCase):
    async def test_a_message_reaches_everyone(self):
        """Everyone gets the same frame, with the server's name, id and time for the message."""
        anna, ben, ids = await self.joins(), await self.joins(), set()
        for payload, content, nonce in GOOD_FRAMES:
            with self.subTest(payload[:50]):
                await anna.send(payload)
                message = await anna.hears(content)
                self.assertEqual(await ben.hears(content), message)
                self.assertIn(json.dumps(content, ensure_ascii=False), ben.payload)  # no escapes
                id, moment = message.pop("id"), message.pop("time")
                expected = {"type": "message", "username": anna.name, "content": content}
                self.assertEqual(message, expected | {"nonce": nonce or id})
                self.assertRegex(moment, r"^\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}\+00:00$")
                age = datetime.now(UTC) - datetime.fromisoformat(moment)
                self.assertLess(abs(age), timedelta(seconds=PATIENCE))
                ids.add(id)
        self.assertEqual([len(id) for id in ids], [16] * 4)  # 96 bits each

    async def test_a_repeated_message_is_pushed_once(self):
        """A message with the nonce and content of one of the last 50 is a duplicate."""
        anna, ben = await self.joins(), await self.joins()
        await anna.says("mine", " mine ", nonce="a")
        mine = await ben.hears("mine")
        await ben.says("mine", "other", nonce="a")  # as after a reconnection with another name
        await ben.says("mine", nonce=mine["id"])
        await ben.says("mine", nonce="b")
        await ben.hears("other", "mine", "mine")
        words = [f"{number}" for number in range(46)]
        await self.publishes(*words)
        await anna.says("mine", nonce="a")
        await anna.says("the 50th since then")
        await anna.says("mine", nonce="a")
        await ben.hears(*words, "the 50th since then", "mine")

    async def test_last_words_are_heard(self):
        """Messages that a client sends right before its close frame are pushed to the others."""
        anna = await self.joins()
        for words in ["bye"], ["hello", "bye"], [f"{number}" for number in range(20)]:
            line = await self.shakes_hands()
            await line.sends(b"".join(said(content) for content in words) + GOODBYE)
            await anna.hears(*words)

    async def test_frames_come_before_the_close_frame(self):
        """Frames sent before the close frame arrive before it, whoever closes. None comes later."""
        anna, ben, words = await self.joins(), await self.joins(), [f"{n}" for n in range(100)]
        await self.publishes(*words)
        self.room.stopping = True
        await self.publishes("late")  # It goes to nobody.
        await anna.close()
        self.server.close()
        for client, code in (anna, 1000), (ben, 1001):
            await client.hears(*words)
            await client.is_closed_with(code)
        self.assertEqual(self.room.history[-1]["content"], words[-1])


class Joining(ServerCase):
    async def test_the_welcome_comes_first(self):
        """The first frame has the client's name, the number of clients and the last 50 messages."""
        self.set(PRESENCE_DELAY=PATIENCE)
        ben, words = await self.joins(), [f"{number}" for number in range(52)]
        await self.publishes(*words)
        messages = [await ben.hears(content) for content in words]
        anna = await self.joins()
        expected = {"type": "welcome", "username": f"Port{anna.port}", "online": 2, "gap": False}
        self.assertTrue(anna.welcome.pop("content"))
        self.assertEqual(anna.welcome, expected | {"history": messages[2:]})
        await self.publishes("end")
        self.assertEqual((await ben.frame())["content"], "end")  # not anna's welcome

    async def test_a_client_resumes_after_a_message(self):
        """The history begins after the given id. If that has been forgotten, a gap is possible."""
        await self.publishes(*(f"{number}" for number in range(52)))
        ids = [message["id"] for message in self.room.history]
        rubbish = ["never", "%00", "%ff%fe", "%5B" * 99, "x" * 4000, "💥", "..//", ids[9][:-1]]
        cases = {f"{ids[0]}": (49, False), f"{ids[48]}&after=x": (1, False), ids[49]: (0, False)}
        cases |= {"": (50, False)} | dict.fromkeys(rubbish, (50, True))
        for after, (count, gap) in cases.items():
            with self.subTest(after[:50]):
                anna = await self.joins(after=after)
                history = [message["content"] for message in anna.welcome["history"]]
                self.assertEqual(history, [f"{n}" for n in range(52 - count, 52)])
                self.assertIs(anna.welcome["gap"], gap)

    async def test_nothing_is_lost_between_history_and_live_messages(self):
        """History and live messages have no gap and no overlap, however fast others talk."""

        async def talk():  # in each iteration of the event loop
            for number in itertools.count():
                await self.publishes(f"{number}")
                await asyncio.sleep(0)

        self.addCleanup(asyncio.create_task(talk()).cancel)
        for _ in range(5):
            anna = await self.joins()
            messages = anna.welcome["history"] + [await anna.frame("message") for _ in range(20)]
            numbers = [int(message["content"]) for message in messages]
            self.assertEqual(numbers, [*range(numbers[0], numbers[0] + len(numbers))])

    async def test_the_longest_history_arrives(self):
        """Even 50 messages at their longest fit into a welcome."""
        self.server.sockets[0].setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
        longest = [{"content": f"{n:04}" + "\1" * 1996, "nonce": "\1" * 64} for n in range(50)]
        for message in longest:
            await self.room.publish(chat.parse_message("Port1", json.dumps(message)))
        anna = await self.joins(max_size=None)
        self.assertEqual(len(anna.welcome["history"]), 50)

    async def test_clients_with_one_port_get_different_names(self):
        """Clients with the same port get numbered names. A name is free when its client leaves."""
        with mock.patch.object(chat.Connection, "remote_address", ("127.0.0.1", 54321)):
            clients = [await self.joins() for _ in range(3)]
            await clients[1].close()
            await self.has(2)
            clients.append(await self.joins())
        expected = ["Port54321", "Port54321-2", "Port54321-3", "Port54321-2"]
        self.assertEqual([client.name for client in clients], expected)

    async def test_a_full_room_turns_clients_away(self):
        """A full room turns clients away with code 1013. It cuts off those that do not answer."""
        self.room.capacity = 2
        anna, ben = await self.joins(), await self.joins()
        late = await self.calls(HANDSHAKE)
        await late.hears((1013).to_bytes(2) + b"The room is full")
        await self.passes(1)  # The client does not answer, so it is cut off.
        self.assertNotIn(b"welcome", await late.ends())
        await anna.says("still here")
        await ben.hears("still here")
        await ben.close()
        await self.has(1)
        await self.joins()


class Presence(ServerCase):
    async def test_news_takes_250_ms(self):
        """Everyone hears who joined, no sooner than after a quarter of a second."""
        anna = await self.joins()
        await anna.is_told(f"{anna.name} joined.", 1)
        start = time.monotonic()
        ben = await self.joins()
        for client in anna, ben:
            await client.is_told(f"{ben.name} joined.", 2)
        self.assertTrue(0.23 <= time.monotonic() - start < 2)  # Windows has a coarse clock.

    async def test_one_frame_announces_all_news(self):
        """A frame names up to three clients and counts more. It omits those that came and went."""
        self.set(PRESENCE_DELAY=PATIENCE / 2)
        anna, ben, cleo = [await self.joins() for _ in range(3)]
        await self.passes(PATIENCE / 2)
        await anna.is_told(f"{names(anna, ben, cleo)} joined.", 3)
        dora, passing = await self.joins(), await self.joins()
        for client in ben, passing:
            await client.close()
        await self.has(3)
        await self.passes(PATIENCE / 2)
        await anna.is_told(f"{dora.name} joined. {ben.name} left.", 3)
        for leaving in cleo, dora:
            await leaving.close()
        for _ in range(4):
            await self.joins()
        await self.has(5)
        await self.passes(PATIENCE / 2)
        await anna.is_told(f"4 people joined. {names(cleo, dora)} left.", 5)

    async def test_a_heartbeat_comes_every_20_s(self):
        """Without news a frame with empty content comes after 20 s, because no page sees pings."""
        self.set(PRESENCE_DELAY=0)
        anna = await self.joins()
        await anna.is_told(f"{anna.name} joined.", 1)
        for _ in range(2):
            for seconds in 19, 0:  # The second round lets a frame that is due arrive.
                await self.passes(seconds)
                await anna.says("quiet")
                self.assertEqual((await anna.frame())["content"], "quiet")
            await self.passes(1)
            await asyncio.wait_for(anna.is_told("", 1), 4)

    async def test_a_silent_client_is_closed(self):
        """After 20 s each client gets a ping. One that does not answer for 20 s is closed."""
        anna, line = await self.joins(), await self.shakes_hands()
        await self.passes(18)
        await anna.says("still here")
        await line.hears(b"still here")
        self.assertNotIn(b"\x89\x04", line.heard)  # no ping yet
        await self.passes(2)
        await line.hears(b"\x89\x04")
        for _ in range(2):  # Then the server has received anna's pong.
            await anna.says("here")
            await anna.frame("message")
        await self.passes(18)
        for content in "once more", "for now":
            await anna.says(content)
            await line.hears(content.encode())
        await self.passes(2)
        await line.hears((1011).to_bytes(2))
        await self.passes(10)  # The client does not answer the close frame either.
        await self.has(1)
        await anna.says("alone")
        await anna.hears("here", "once more", "for now", "alone")


REASONS = {  # words of the error, and frames: an object's fields, or a payload
    "binary": [b'{"content": "hello"}', b"\xff"],
    r"JSON\.": ["", "hello", '{"content": "hel', "x" * 32 * 1024, "9" * 5_000, "[" * 10_000],
    "JSON object": ["null", "5", r'"\ud800"', '[{"content": "hi"}]'],
    "a string": [{}, {"contents": "hello"}]
    + [{"content": content, "nonce": "mine"} for content in (None, 5, ["hello"], {})],
    "not blank": [{"content": ""}, {"content": " \n\t\u3000", "nonce": "mine"}],
    "at most 2,000 characters, not 2,001": [{"content": "😀" * 2001, "nonce": "mine"}],
    "surrogates": [{"content": content} for content in ("\ud800", "a\udfff", "\ude00b")],
    "1 to 64 .*nonce": [{"content": "a", "nonce": n} for n in (None, 5, 0, ["a"], "", "a" * 65)],
    "nonce|surrogates": [{"content": "hello", "nonce": "\ud800"}],
}


class BadInput(ServerCase):
    async def test_a_bad_frame_gets_the_reason(self):
        """A bad frame is answered with the reason. Its sender stays unless it has over 32 KiB."""
        self.set(MESSAGES_PER_SECOND=1_000)
        anna, ben = await self.joins(), await self.joins()
        for reason, frames in REASONS.items():
            for frame in frames:
                with self.subTest(reason, frame=f"{frame}"[:50]):
                    fields = isinstance(frame, dict)
                    await anna.send(json.dumps(frame) if fields else frame)
                    more = {"nonce": "mine"} if fields and frame.get("nonce") == "mine" else {}
                    await anna.is_refused(f"^Send .*({reason})", **more)
                    await anna.says("hello")
                    for client in anna, ben:
                        await client.hears("hello")
        await ben.send("x" * (32 * 1024 + 1))
        await ben.is_closed_with(1009)


class Http(ServerCase):
    async def test_the_page_has_its_headers(self):
        """The page's headers forbid everything but its own scripts and styles, and caching."""
        page = (HERE / "index.html").read_text(encoding="utf-8")
        policy = "default-src 'none'; script-src HASHES; style-src HASHES; img-src data:; "
        policy += "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
        hashes = "('sha256-[^ ]*' ?)+(?=;)"  # Chromium checks them.
        expected = {
            "Cache-Control": "no-store",
            "Content-Length": f"{len(page.encode())}",
            "Content-Security-Policy": f"{policy}; require-trusted-types-for 'script'",
            "Content-Type": "text/html; charset=utf-8",
            "Referrer-Policy": "no-referrer",
            "X-Content-Type-Options": "nosniff",
        }
        for line, body in {"GET /": page, "GET /?lesson=1": page, "HEAD /": ""}.items():
            with self.subTest(line):
                status, headers, got = await self.http(line)
                self.assertEqual((status, got), (200, body))
                headers = [(name, re.sub(hashes, "HASHES", value)) for name, value in headers]
                fields = [field for field in headers if field[0] in expected]
                self.assertEqual(sorted(fields), [*expected.items()])  # each of them once

    async def test_each_request_gets_its_status(self):
        """The status depends on the method and the path. HEAD gets that of GET without a body."""
        missing = ["/chat.py", "/../chat.py", "/%2e%2e/", "/wss", "/ws/", "//", "//[", "*", "ws"]
        cases = {f"GET {path}": 404 for path in missing}
        for url, status in {"/": 200, "": 200, "?a=/no": 200, "/ws": 426, "/no": 404}.items():
            cases[f"GET http://chat.example{url}"] = status  # RFC 9112, section 3.2.2
            cases[f"GET HTTPS://chat.example:8080{url}"] = status
        cases |= {"GET /": 200, "GET /ws": 426, "GET /ws?after=/": 426, "GET /?/ws": 200}
        cases |= {line.replace("GET", "HEAD"): status for line, status in cases.items()}
        for method in "POST", "PUT", "DELETE", "OPTIONS", "BREW", "get":
            cases |= {f"{method} {path}": 405 for path in ("/", "/ws", "/no")}
        required = {426: {("Upgrade", "websocket")}, 405: {("Allow", "GET")}}
        for line, expected in cases.items():
            with self.subTest(line):
                status, headers, body = await self.http(line)
                self.assertEqual((status, body == ""), (expected, line.startswith("HEAD")))
                self.assertTrue(status != 404 or body in ("", "The chat is at /\n"))
                self.assertLessEqual(required.get(status, set()), {*headers})
                self.assertEqual(len([name for name, _ in headers if name == "Content-Type"]), 1)

    async def test_pages_of_the_same_origin_are_welcome(self):
        """A page of this server can open a WebSocket, as can a program, which sends no Origin."""
        pairs = {"http://chaT.example": "Chat.Example", "http://[::1]:8080": "[::1]:8080"}
        pairs |= {"https://a.example": "a.example:443", "https://a.example:443": "a.example"}
        pairs |= {"http://a.example": "a.example:80"}  # default ports (RFC 6454, section 4)
        pairs |= {f"{scheme}://a.example:8080": "a.example:8080" for scheme in ("http", "https")}
        for origin, host in [("", "a.example"), *pairs.items()]:
            with self.subTest(origin, host=host):
                headers = {"Origin": origin} if origin else {}
                line = await self.calls(request("GET /ws", Host=host, **headers, **UPGRADE))
                await line.hears(b"welcome")

    async def test_pages_of_other_origins_are_refused(self):
        """Other pages get 403. The body and one line of the log say what a proxy must forward."""
        own = "a.example:8080"
        cases = [(origin, own) for origin in ("http://evil.example", "null", "x", "http://[")]
        cases += [(f"http://{own}.evil.example", own), (f"http://evil.example/{own}", own)]
        cases += [("http://a.example", own), ("http://a.example:8081", own)]
        cases += [("https://a.example", "a.example:80"), ("http://a.example", "a.example:443")]
        cases += [(f"http://evil.example\r\nOrigin: http://{own}", own), ("a" * 99, "b" * 99)]
        for origin, host in cases:
            with self.subTest(origin, host=host), self.assertLogs(level="WARNING") as logs:
                status, _, body = await self.http("GET /ws", Origin=origin, Host=host, **UPGRADE)
                origin = origin.replace("\r\nOrigin:", ",")
                why = f"Origin {origin[:80]} is not Host {host[:80]}. A proxy must forward Host."
                self.assertEqual((status, body), (403, f"{why}\n"))
                self.assertEqual([record.message for record in logs.records], [f"403: {why}"])

    async def test_a_request_has_at_most_16_kib(self):
        """A request of 16 KiB is answered. A longer one is cut off, even if it never ends."""
        headers = {"Host": "a", "A": "a" * 8_000, "C": "c" * 500, **UPGRADE}
        for target, start in {"GET /": b"HTTP/1.1 200 ", "GET /ws": b"HTTP/1.1 101 "}.items():
            rest = 16 * 1024 - len(request(target, **headers, B=""))
            line = await self.calls(request(target, **headers, B="b" * rest))
            await line.hears(start)
            line = await self.calls(request(target, **headers, B="b" * (rest + 1)))
            self.assertEqual(await line.ends(), b"")
        too_long = b"GET / HTTP/1.1\r\nA: " + b"a" * 9_000  # websockets refuses this with 431
        for start in b"GET / HTTP/1.1\r\n", too_long, request("GET /"), request("GET /no") * 20:
            with self.subTest(start[:30]):
                line = await self.calls(start)
                await line.sends((b"X: " + b"x" * 1_000 + b"\r\n") * 1_000)
                await line.ends()  # websockets itself would wait for 10 s.

    async def test_a_slow_phone_gets_the_whole_page(self):
        """A client that begins to read only after nine seconds still gets all of the page."""
        self.server.sockets[0].setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
        line = await self.calls(request("GET /"), SO_RCVBUF=1024)
        await line.hears(b"200 OK")
        await self.passes(9)
        answer = await line.ends()
        self.assertTrue(answer.endswith((HERE / "index.html").read_bytes()))


class Serving(ServerCase):
    async def test_one_send_for_many_frames(self):
        """All frames of one iteration of the event loop leave in one system call per client."""
        if sys.platform == "win32":
            self.skip("asyncio sends without socket.send on Windows")
        self.set(PRESENCE_DELAY=PATIENCE)
        anna, ben, words = await self.joins(), await self.joins(), [f"{n}" for n in range(50)]
        counts, send = collections.Counter(), socket.socket.send

        def count(end, *args):
            counts[end.getpeername()[1]] += 1
            return send(end, *args)

        with mock.patch.object(socket.socket, "send", count):
            await self.publishes(*words)
            for client in anna, ben:
                await client.hears(*words)
        self.assertEqual(counts, {anna.port: 1, ben.port: 1})

    async def test_a_broken_connection_costs_nobody_else(self):
        """If a connection cannot be written to, it is dropped and the others get their frames."""
        anna, words = await self.joins(), [f"{number}" for number in range(500)]
        for breaks, complaints in ("write_eof", 1), ("abort", 0):
            with self.subTest(breaks), self.assertLogs(level="WARNING") as logs:
                logging.warning("start")  # because assertLogs wants one
                broken = await self.shakes_hands()
                getattr(self.end_of(broken).transport, breaks)()
                await self.publishes(*words)  # asyncio would warn of the fifth attempt to send.
                await anna.hears(*words)
                await self.has(1)
                about = [f"Port{broken.port}" in line for line in logs.output]
                self.assertEqual(about, [False] + [True] * complaints)

    async def test_a_catch_up_takes_bounded_memory(self):
        """1,000 long messages at once take little memory, although 100 clients read nothing yet."""
        self.server.sockets[0].setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
        for _ in range(100):
            await self.shakes_hands()
        tracemalloc.start()
        self.addCleanup(tracemalloc.stop)
        with self.assertLogs(level="WARNING") as logs:
            await self.publishes(*["x" * 2_000] * 1_000)
            await self.has(0)
        self.assertLess(tracemalloc.get_traced_memory()[1], 20_000_000)  # bytes, not 200 million
        self.assertEqual(len(logs.output), 100)

    async def test_a_slow_reader_is_cut_off(self):
        """A client that leaves 1 MiB unread is cut off, with one line in the log."""
        anna, slow = await self.joins(), await self.shakes_hands(SO_RCVBUF=4096)
        end, unsent = self.end_of(slow), []
        with self.assertLogs(level="WARNING") as logs:
            while end in self.room.connections:
                await self.publishes(content := f"{len(unsent)}" + "x" * 700)
                await anna.hears(content)
                unsent.append(end.transport.get_write_buffer_size())
        self.assertIn(max(unsent), range(1024**2 - 1_000, 1024**2 + 1))
        self.assertRegex(f"{logs.output}", f"^[^,]*Port{slow.port} reads too slowly[^,]*$")

    async def test_a_fast_talker_waits(self):
        """If a client sends more than 20 messages at once, the rest waits a second, in order."""
        anna, words = await self.joins(), [f"{number}" for number in range(30)]
        await anna.says(*words)
        await anna.hears(*words)
        times = [datetime.fromisoformat(message["time"]) for message in self.room.history]
        waits = [later - sooner for sooner, later in itertools.pairwise(times)]
        self.assertEqual(max(range(29), key=waits.__getitem__), 19)
        self.assertTrue(0.98 <= (times[20] - times[0]).total_seconds() < 1.9)

    async def test_a_flood_ends_with_its_client(self):
        """A flood does not hold up other clients. It ends when its client leaves."""
        anna, flood = await self.joins(), await self.shakes_hands()
        end = self.end_of(flood)
        await flood.sends(said("flood") * 100)
        await anna.hears(*["flood"] * 20)
        flood.vanish()
        while end.state is websockets.State.OPEN:  # until a message does not arrive there
            await anna.says("hello")
            await anna.hears("hello")
        await self.passes(1)
        await self.has(1)
        await anna.says("over")
        await anna.hears("over")

    async def test_a_flood_is_read_in_small_pieces(self):
        """The operating system buffers less than 64 KiB of a flood ahead of the server."""
        flood, size = await self.shakes_hands(SO_SNDBUF=4096), 0
        with contextlib.suppress(BlockingIOError):
            while True:
                size += flood.socket.send(PING * 100)
        self.assertLess(size, 64 * 1024)

    async def test_it_says_why_it_cannot_serve(self):
        """If it cannot serve its page at an address, it says so and ends with advice."""
        cases = {("127.0.0.1", port): "--port from 0 to 65535" for port in (-1, 65536)}
        cases["127.0.0.1", self.port] = f"port {self.port}.* --port"
        for host in "no.such.invalid", "a..b", "192.0.2.1":
            cases[host, 0] = f"{re.escape(host)}.* --host"
        for (host, port), advice in cases.items():
            with self.subTest(host, port=port), self.assertRaisesRegex(SystemExit, advice):
                await chat.start(self.room, host, port)
        folder = pathlib.Path(self.enterContext(tempfile.TemporaryDirectory())).resolve()
        with mock.patch.object(chat, "__file__", folder / "chat.py"):
            for _ in range(2):  # without a page, and with one that is not UTF-8
                with self.assertRaisesRegex(
                    SystemExit, f"{re.escape(str(folder))}.*Keep index.html"
                ):
                    await chat.start(self.room, "127.0.0.1", 0)
                (folder / "index.html").write_bytes(b"\xff")

    async def test_many_can_connect_at_once(self):
        """120 clients connect before the server accepts one: more than asyncio's backlog."""
        for line in [Line(self.port) for _ in range(120)]:
            line.socket.close()


# The program


class ProgramCase(Case):
    """Runs `python chat.py` as a user does."""

    async def runs(self, *options, program=HERE / "chat.py", shell="", python=""):
        """Run chat.py, after some shell or Python code. Return its process."""
        command = [sys.executable, program, *options]
        if python:
            python += "\nimport runpy, sys; runpy.run_path(sys.argv.pop(1), run_name='__main__')"
            command[1:1] = ["-c", python]
        if shell:
            command = ["sh", "-c", f'{shell}; exec "$@"', "sh", *command]
        environment = os.environ | {"PYTHONPATH": "", "NO_COLOR": "1"}
        environment.pop("PYTHONUNBUFFERED", None)  # It would hide that print does not flush.
        pipes = dict.fromkeys(["stdin", "stdout", "stderr"], asyncio.subprocess.PIPE)
        process = await asyncio.create_subprocess_exec(*command, env=environment, **pipes)
        self.addAsyncCleanup(self.kills, process)
        return process

    async def kills(self, process):
        with contextlib.suppress(ProcessLookupError):
            process.kill()
        await process.communicate()

    async def serves(self, *options, **more):
        """Run chat.py and wait until it serves. Return its process and the host it prints."""
        process = await self.runs("--port", "0", *options, **more)
        async with asyncio.timeout(2 * PATIENCE):
            line = (await process.stdout.readline()).decode()
        sentence = r"^Open http://(\S+):(\d+) in two windows. Ctrl-C stops the chat.\n$"
        self.assertRegex(line, sentence)
        host, port = re.match(sentence, line).groups()
        self.port = int(port)
        return process, host

    async def ends(self, process, status=0, says="^$"):
        """Assert that a process ends with this status and complaint. Return the complaint."""
        async with asyncio.timeout(3 * PATIENCE):
            out, complaint = [text.decode() for text in await process.communicate(b"")]
        self.assertRegex(complaint, says)
        self.assertEqual((process.returncode, out), (status, ""))
        return complaint


OFFLINE = "import os, socket; socket.socket.connect = lambda *_: os.stat('/no/network')"
AS_ON_WINDOWS = "import asyncio, sys; sys.modules['resource'] = None\n"
AS_ON_WINDOWS += "asyncio.SelectorEventLoop.add_signal_handler = None"
AS_ON_MACOS = "import resource; resource.setrlimit = lambda *_: int('too many')"
WITH_A_DEFECT = "import json; dumps = json.dumps; json.dumps = lambda fields, **options: ("
WITH_A_DEFECT += "fields['defect'] if fields['type'] == 'presence' else dumps(fields, **options))"
OLD = "import websockets.version; websockets.version.version = '16.0'"
MISSING = "import sys; sys.modules['websockets'] = None"


class CommandLine(ProgramCase):
    async def test_it_prints_an_address_that_opens(self):
        """The printed address can be reached, from other machines too if it serves them."""
        for options, python, pattern in [
            ("", "", r"^127\.0\.0\.1$"),
            ("", AS_ON_WINDOWS, r"^127\.0\.0\.1$"),
            ("--host 0.0.0.0", "", r"^(?!0\.|127\.)"),
            ("--host 0.0.0.0", OFFLINE, "^localhost$"),
            ("--host ::1", "", r"^\[::1\]$"),  # RFC 3986, section 3.2.2
            ("--host ::", "", r"^(\[(?!::).+\]|localhost)$"),
        ]:
            with self.subTest(options, python=python):
                if "::" in options:
                    try:
                        socket.create_server(("::1", 0), family=socket.AF_INET6).close()
                    except OSError:
                        self.skip("this machine has no IPv6")
                _, host = await self.serves(*options.split(), python=python)
                self.assertRegex(host, pattern)
                socket.create_connection((host.strip("[]"), self.port), PATIENCE).close()

    async def test_it_finds_its_page_through_a_symbolic_link(self):
        """If chat.py is a symbolic link, it serves the page beside the real file."""
        link = pathlib.Path(self.enterContext(tempfile.TemporaryDirectory()), "chat.py")
        try:
            link.symlink_to(HERE / "chat.py")
        except OSError:
            self.skip("this user cannot make symbolic links")
        await self.serves(program=link)

    async def test_it_needs_a_new_websockets(self):
        """With an old websockets, or without any, it ends with one line that says what to do."""
        for python in OLD, MISSING:
            with self.subTest(python):
                process = await self.runs(python=python)
                await self.ends(process, 1, '^.*websockets 17.*-m pip install "websockets>=17"\n$')
        await self.serves(python=OLD.replace("16", "18"))

    async def test_a_failed_presence_stops_the_server(self):
        """If presence fails, because of a defect, the server closes all connections and says so."""
        process, _ = await self.serves(python=WITH_A_DEFECT)
        anna = await self.joins()
        await anna.is_closed_with(1001)
        await self.ends(process, 1, "KeyError: 'defect'")


class Stopping(ProgramCase):
    def setUp(self):
        if sys.platform == "win32":
            self.skip("Windows has no such signals and limits")

    async def test_signals_stop_it(self):
        """Ctrl-C and SIGTERM close every connection with 1001 and print nothing, however often."""
        at_exit = "lambda: (print(flush=True), sys.stdin.read())"
        for number in signal.SIGINT, signal.SIGTERM:
            for shell in "", "trap '' INT":  # A shell's & ignores SIGINT.
                with self.subTest(number, shell=shell):
                    python = f"import atexit, sys; atexit.register({at_exit})"
                    process, _ = await self.serves(shell=shell, python=python)
                    anna = await self.joins()
                    process.send_signal(number)
                    process.send_signal(number)
                    await anna.is_closed_with(1001)
                    async with asyncio.timeout(PATIENCE):
                        await process.stdout.readline()
                    process.send_signal(number)  # now that the program has all but ended
                    await self.ends(process)

    async def test_a_stop_loses_nothing_that_was_delivered(self):
        """A message that its sender got back reaches the others, though the server stops."""
        process, _ = await self.serves()
        anna, ben, words = await self.joins(), await self.joins(), [f"{n}" for n in range(20)]
        await anna.says(*words)
        await anna.hears(*words)
        process.terminate()
        await ben.hears(*words)
        await ben.is_closed_with(1001)

    async def test_it_stops_soon_despite_bad_clients(self):
        """It stops in time though clients answer nothing, read nothing, or flood with pings."""
        process, _ = await self.serves()
        anna = await self.joins()
        for _ in range(50):
            await self.shakes_hands()
        for data in b"", b"GET /", request("GET /"), HANDSHAKE[:-2]:
            await self.calls(data, SO_RCVBUF=1024)
        floods = [await self.shakes_hands() for _ in range(20)]
        flooding = asyncio.gather(*map(Line.sends, floods, [PING * 1_000_000] * 20))
        await anna.says("hello")
        await anna.hears("hello")
        start = MONOTONIC()
        process.terminate()
        await self.ends(process)
        self.assertLess(MONOTONIC() - start, 5)  # s. It takes 2 on a machine that is not busy.
        await anna.is_closed_with(1001)
        await flooding

    async def test_descriptors_limit_the_room(self):
        """Half of the file descriptors are for clients. The limit is raised first if possible."""
        full = (1013).to_bytes(2)
        for shell, python, answer in [
            ("ulimit -n 64", "", full),
            ("ulimit -Sn 64", AS_ON_MACOS, full),
            ("ulimit -Sn 64", "", b"welcome"),
        ]:
            with self.subTest(shell, python=python):
                process, _ = await self.serves(shell=shell, python=python)
                inside = [await self.joins() for _ in range(32)]
                lines = [await self.calls(HANDSHAKE) for _ in range(40)]
                await inside[0].says("hello")
                for client in inside:
                    await client.hears("hello")
                for line in lines:
                    await line.hears(answer)
                    line.vanish()
                await inside[0].close()
                await self.joins()
                process.terminate()
                await self.ends(process)


# The page with its wire, in Chromium

# JavaScript that returns what people see of the page
SIGHTS = r"""
window.sights = (() => {
    const all = selector => (
        [...document.querySelectorAll(selector)].filter(e => e.checkVisibility()));
    const words = e => e.innerText.replace(/\s+/g, " ").trim();
    const label = button => (button.ariaLabel || words(button)).replace(/ \(\d+ s\)$/, "");
    const said = e => [e.dataset.kind, e.dataset.state, e.querySelector(".text").innerText];
    const row = summary => words(summary).replace(/^\+\S+ m?s/, "");
    const sights = {
        all, words,
        look: name => sights[name]?.() ?? all(`#${name}`).map(words).join(""),
        log: () => all("#messages [data-id]").map(e => said(e).filter(Boolean).join(" ")),
        last: () => sights.log().at(-1),
        bubbles: () => all("#messages [data-id]").map(words),
        lines: () => all("#messages [data-kind=system]").map(words),
        wire: () => all("#wire summary").map(e => `${e.closest("li").dataset.kind}:${row(e)}`),
        opened: () => all("#wire pre").map(e => e.innerText).join("").replace(/ +\n/g, "\n"),
        counts: () => all("#counts b").map(e => Number(words(e).replace(/\D/g, ""))),
        title: () => document.title,
        buttons: () => all("button").map(label),
        draft: () => document.querySelector("#draft").value,
        focus: () => document.activeElement.id || document.activeElement.tagName,
        spoken: () => all("[aria-live=polite] p").map(words),
        has_joined: () => sights.lines().join().includes(sights.look("name")),
        reads_the_end: () => all("#messages li").at(-1).getBoundingClientRect().bottom
            <= document.querySelector("#log").getBoundingClientRect().bottom,
        place(text) {  // the middle of a button or a row of that name, if a click there reaches it
            const part = all("button").find(e => label(e) === text)
                ?? all("summary").findLast(e => words(e).includes(text));
            part?.scrollIntoView({block: "nearest"});
            const {x, y, width, height} = part?.getBoundingClientRect() ?? {};
            const point = [x + width / 2, y + height / 2];
            return part?.contains(document.elementFromPoint(...point)) ? point : null;
        },
    };
    return sights;
})();
"""

# The page's clock. Time stands still until it passes, except pauses for drawing.
CLOCK = """
window.clock = (() => {
    const timers = new Map(), began = Date.now(), [later, cancel] = [setTimeout, clearTimeout];
    let now = 1_000, asleep = 0, ids = 1_000_000;  // now and asleep in ms
    window.setTimeout = (action, ms = 0, every = 0) => {
        if (ms < 100) return later(action, ms);
        timers.set(++ids, {action, due: now + ms, every});
        return ids;
    };
    window.setInterval = (action, ms) => setTimeout(action, ms, ms);
    window.clearTimeout = id => { if (!timers.delete(id)) cancel(id); };
    performance.now = () => now;
    Date.now = () => began + now + asleep;
    const tick = ms => {
        now += ms;
        for (const [id, timer] of timers) if (timer.due <= now) {
            if (timer.every) timer.due += timer.every; else timers.delete(id);
            timer.action();
        }
    };
    return {
        passes(ms) { for (const end = now + ms; now < end;) tick(Math.min(10, end - now)); },
        sleeps(ms) { asleep += ms; },
    };
})();
"""

PROGRAMS = (
    *(os.environ.get("CHROME", ""), "chromium", "chromium-browser", "google-chrome"),
    "/Applications/Google Chrome.app/Contents/MacOS/Google Chrome",
    r"C:\Program Files (x86)\Microsoft\Edge\Application\msedge.exe",
)
FLAGS = (  # The sandbox cannot serve root.
    "--headless --remote-debugging-port=0 --disable-background-networking --disable-gpu "
    "--disable-component-update --disable-sync --no-first-run --disable-quic --no-sandbox "
    "--disable-dev-shm-usage --disable-back-forward-cache"
)


@functools.cache
def chromium():
    """Start the Chromium that all tests share, or return None if there is none."""
    path = next(filter(None, map(shutil.which, PROGRAMS)), None)
    if not path:
        return None
    folder = tempfile.TemporaryDirectory(ignore_cleanup_errors=True)
    unittest.addModuleCleanup(folder.cleanup)
    command = [path, *FLAGS.split(), f"--user-data-dir={folder.name}"]
    command.append("--host-resolver-rules=MAP chat.example 127.0.0.1")
    log = pathlib.Path(folder.name, "log")
    with log.open("wb") as output:
        process = subprocess.Popen(command, stdout=output, stderr=output)
    deadline = MONOTONIC() + 5 * PATIENCE
    while not (found := re.search("DevTools listening on (.+)\n", log.read_text())):
        if process.poll() is not None or MONOTONIC() > deadline:
            process.kill()
            raise AssertionError(f"{path} does not start: {log.read_text()}")
        time.sleep(0.02)

    def quit():
        with connect(found[1], proxy=None) as devtools:  # If killed, it would leave files behind.
            devtools.send(json.dumps({"id": 0, "method": "Browser.close"}))
        process.wait(PATIENCE)

    unittest.addModuleCleanup(quit)
    return types.SimpleNamespace(url=found[1], idle=[])  # idle: tabs that tests have finished with


def fits(seen, expected):
    """Return whether a value, a part of a text, or the last rows of the wire are as expected."""
    if isinstance(expected, str):
        return expected in f"{seen}" if expected else not seen
    if not isinstance(expected, tuple):
        return expected == seen
    if "presence" not in f"{expected}":
        seen = [row for row in seen if not row.startswith("presence")]
    rows = seen[-len(expected) :]
    return len(rows) == len(expected) and all(map(re.search, expected, rows))


class Tab:
    """A browser tab. Its verbs are what people do with it and what they see.

    It speaks https://chromedevtools.github.io/devtools-protocol/. Later tests use the tab again.
    """

    def __init__(self, browser):
        self.browser, self.ids, self.events = browser, itertools.count(), []

    # Six methods that other browsers override
    async def opens(self, url, before):
        """Open a page. Some JavaScript runs before its own."""
        self.url = url
        if not self.browser.idle:
            await self.attaches(self.browser.url)
            window = {"url": "about:blank", "newWindow": True, "width": 1280, "height": 900}
            id = (await self.call("Target.createTarget", **window))["targetId"]
            await self.devtools.close()
            self.browser.idle.append(re.sub("browser/.*", f"page/{id}", self.browser.url))
        self.place = self.browser.idle.pop()
        await self.attaches(self.place)
        for domain in "Page", "Runtime", "Network":
            await self.call(f"{domain}.enable")
        await self.call("Emulation.setLocaleOverride", locale="en-US")
        await self.call("Page.addScriptToEvaluateOnNewDocument", source=before)
        await self.call("Page.navigate", url=url)

    async def closes(self):
        await self.call("Page.disable")  # It ends the script that runs before the page's own.
        await self.evaluate("try { localStorage.clear(), sessionStorage.clear() } catch {}")
        await self.call("Page.navigate", url="about:blank")
        await self.devtools.close()
        self.browser.idle.append(self.place)

    async def evaluate(self, expression):
        """Return the value of a JavaScript expression."""
        more = {"returnByValue": True, "awaitPromise": True, "userGesture": True}
        answer = await self.call("Runtime.evaluate", expression=expression, **more)
        if "exceptionDetails" in answer:
            raise AssertionError(f"{expression}: {answer['exceptionDetails']}")
        return answer["result"].get("value")

    async def types(self, text):
        await self.call("Input.insertText", text=text)

    async def presses(self, key, **more):
        """Press and release a key, or Shift and a key."""
        shift, _, key = key.rpartition("+")
        code, text = {"Tab": (9, ""), "Enter": (13, "\r")}[key]
        more = {"key": key, "windowsVirtualKeyCode": code, "modifiers": 8 * bool(shift)} | more
        await self.call("Input.dispatchKeyEvent", type="keyDown", text=text, **more)
        await self.call("Input.dispatchKeyEvent", type="keyUp", **more)

    async def clicks_at(self, x, y):
        for type in "mousePressed", "mouseReleased":
            mouse = {"x": x, "y": y, "button": "left", "clickCount": 1}
            await self.call("Input.dispatchMouseEvent", type=type, **mouse)

    # DevTools
    async def attaches(self, url):
        more = {"proxy": None, "max_size": None, "max_queue": None}
        self.devtools = await websockets.connect(url, **more)

    async def call(self, method, **params):
        """Call a method of the protocol. Return its result."""
        request = {"id": next(self.ids), "method": method, "params": params}
        await self.devtools.send(json.dumps(request))
        async with asyncio.timeout(PATIENCE):
            while (event := json.loads(await self.devtools.recv())).get("id") != request["id"]:
                self.events.append(event)
        return event.get("result", {"result": {}})  # none if the page goes

    def heard_of(self, method):
        """Return the parameters of the events of one kind so far."""
        return [event["params"] for event in self.events if event.get("method") == method]

    def frames(self, way):
        """Return the payloads of the frames that were "Sent" or "Received" so far."""
        events = self.heard_of(f"Network.webSocketFrame{way}")
        return [event["response"]["payloadData"] for event in events]

    def sent(self):
        return [json.loads(payload) for payload in self.frames("Sent")]

    async def resizes(self, width, height):
        metrics = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 500}
        await self.call("Emulation.setDeviceMetricsOverride", **metrics)

    # Verbs for every browser
    async def is_ready(self, **expected):
        """Wait until the page has loaded and shows this, or that it has joined."""
        await self.waits_for("window.sights && document.readyState === 'complete'")
        await self.sees(**expected or {"status": "Connected", "has_joined": True})
        (self.name,) = await self.looks("name")

    async def reloads(self):
        await self.evaluate("sights = null, location.reload()")
        await self.is_ready()

    async def looks(self, *names):
        """Return what people see of this: sights, or parts of the page by their ids."""
        return await self.evaluate(f"{json.dumps(names)}.map(sights.look)")

    async def waits_for(self, condition):
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(PATIENCE):
                while not await self.evaluate(f"Boolean({condition})"):
                    await asyncio.sleep(0.01)
                return
        raise AssertionError(f"not true: {condition}")

    async def sees(self, *rows, **expected):
        """Wait until people see these rows at the end of the wire, and the rest."""
        expected |= {"wire": rows} if rows else {}
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(PATIENCE):
                while True:
                    seen = await self.looks(*expected)
                    if all(map(fits, seen, expected.values())):
                        return
                    await asyncio.sleep(0.01)
        raise AssertionError(f"seen: {seen}\nexpected: {expected}")

    async def says(self, *texts):
        for text in texts:
            await self.types(text)
            await self.presses("Enter")

    async def clicks(self, name):
        """Click a button, or else the last row of the wire, by a name that people see."""
        await self.waits_for(place := f"sights.place({json.dumps(name)})")
        await self.clicks_at(*await self.evaluate(place))

    async def passes(self, seconds):
        """Let time pass on the page's clock."""
        await self.evaluate(f"clock.passes({1000 * seconds})")


class PageCase(ServerCase):
    """A room of its own for each test, and tabs in it."""

    def setUp(self):
        advice = "install Chromium or Chrome, or set CHROME to its path"
        self.browser = chromium() or self.skip(f"no Chromium was found: {advice}")

    async def asyncSetUp(self):
        self.transports, connection_made = [], chat.Connection.connection_made

        def record(connection, transport):
            self.transports.append(transport)
            connection_made(connection, transport)

        self.enterContext(mock.patch.object(chat.Connection, "connection_made", record))
        self.set(PRESENCE_DELAY=0, HEARTBEAT=600)  # Rows come only when a test wants them.
        await super().asyncSetUp()

    async def stops(self, server):
        server.close()
        for transport in self.transports:
            transport.abort()  # Chromium keeps spare connections.
        await super().stops(server)

    async def goes_down(self):
        """Stop the server, as a signal does."""
        self.server.close()
        await self.has(0)
        await self.stops(self.server)

    def cuts_off(self):
        """Break all connections without a close frame."""
        for connection in self.room.connections:
            connection.transport.abort()

    async def opens(self, before="", host="127.0.0.1", **expected):
        """Return a tab that has opened the page and sees this."""
        tab = Tab(self.browser)
        await tab.opens(f"http://{host}:{self.port}/", SIGHTS + CLOCK + before)
        self.addAsyncCleanup(self.closes, tab)
        await tab.is_ready(**expected)
        return tab

    async def closes(self, tab):
        await tab.closes()
        self.assertEqual(tab.heard_of("Runtime.exceptionThrown"), [])

    def holds(self):
        """Hold messages back, before they are published, until the returned event is set."""
        released, publish = asyncio.Event(), self.room.publish

        async def hold(message):
            await released.wait()
            await publish(message)

        self.enterContext(mock.patch.object(self.room, "publish", hold))
        self.addCleanup(released.set)
        return released

    async def shows(self, content, **more):
        """Publish a message with more fields, such as its nonce, even if messages are held back."""
        message = chat.parse_message("Port1", json.dumps({"content": content})) | more
        await chat.Room.publish(self.room, message)

    async def floods(self, count):
        await self.publishes(*map(str, range(count)))

    def pushes(self, frame):
        chat.push(self.room.connections, frame)


HEARTBEAT = {"type": "presence", "username": "server", "content": "", "online": 1}
ERROR = {"type": "error", "username": "server", "content": "Not now."}
OPENING = ["^request: This tab: GET /ws", "^response: The server: 101 Switching Protocols$"]


class Talking(PageCase):
    async def test_two_tabs_talk(self):
        """Two tabs show what each says, markup as text, after one request over HTTP each."""
        first, second = await self.opens(), await self.opens()
        markup = "<img src=x onerror=alert()>&amp;"
        await first.says("hello")
        await second.sees(log=["other hello"], online="2")
        await second.types(markup)
        await second.clicks("Send")
        await first.sees(log=["own delivered hello", f"other {markup}"])
        await second.sees(log=["other hello", f"own delivered {markup}"], draft="", focus="draft")
        urls = [event["request"]["url"] for event in first.heard_of("Network.requestWillBeSent")]
        self.assertEqual([url for url in urls if url.startswith("http")], [first.url])

    async def test_a_message_waits_for_its_echo(self):
        """A message stands below all others until its echo comes, then where everyone has it."""
        released, tab = self.holds(), await self.opens()
        await tab.says("one", "two")
        await self.shows("news")
        await tab.sees(log=["other news", "own waiting one", "own waiting two"])
        await self.shows("two", nonce=tab.sent()[1]["nonce"])
        await tab.sees(log=["other news", "own delivered two", "own waiting one"])
        await tab.sees(bubbles="two ✓ delivered")
        await tab.sees(bubbles="one ◷ waiting")
        released.set()
        await tab.sees(log=["other news", "own delivered two", "own delivered one"])

    async def test_a_refused_message_can_be_edited(self):
        """A refused message shows why, also after a reload. Edit takes it back into the draft."""
        tab, log = await self.opens(), ["own refused one", "own waiting two"]
        with mock.patch.object(self.room, "publish", mock.AsyncMock()):  # It publishes nothing.
            await tab.says("one", "two")
            await tab.sees(last="own waiting two")
            self.pushes(ERROR | {"nonce": tab.sent()[0]["nonce"]})
            await tab.sees(log=log, spoken="Not now.")
            self.assertEqual(len(tab.sent()), 2)
            await tab.types("draft")
            await tab.reloads()
            await tab.sees(log=log, bubbles="one ✗ not delivered: Not now. Edit")
            await tab.clicks("Edit")
            await tab.sees(log=log[1:], draft="one\ndraft", focus="draft")
        await tab.reloads()
        await tab.presses("Enter")
        await tab.sees(log=["own delivered two", "own delivered one\ndraft"])

    async def test_a_message_is_shown_once(self):
        """The page knows a message by its nonce and content, even if a translation has changed its
        text."""
        self.holds()
        tab = await self.opens()
        await tab.says("mine")
        await tab.sees(log=["own waiting mine"])
        nonce = tab.sent()[0]["nonce"]
        await self.shows("not mine", nonce=nonce)
        await tab.sees(log=["other not mine", "own waiting mine"])
        await self.shows("mine", nonce=nonce)
        await tab.sees(log=["other not mine", "own delivered mine"])
        await tab.evaluate("sights.all('.text').map(e => { e.textContent += '!'; })")
        self.room.history.clear()  # as a crash does
        for content in "mine", "not mine", "nor this":
            await self.shows(content, nonce=nonce)
        await tab.sees(log=["other not mine!", "own delivered mine!", "other nor this"])

    async def test_a_duplicated_tab_doubles_nothing(self):
        """If a tab is duplicated while a message waits, everyone sees that message once."""
        released, tab = self.holds(), await self.opens()
        await tab.says("both")
        await tab.sees(log=["own waiting both"])
        copy = await tab.evaluate("JSON.stringify(sessionStorage)")
        twin = await self.opens(f"sessionStorage.length || Object.assign(sessionStorage, {copy})")
        released.set()
        for each in tab, twin:
            await each.sees(log=["own delivered both"])
        await tab.says("later")
        await twin.sees(log=["own delivered both", "other later"])

    async def test_a_bad_frame_costs_only_itself(self):
        """Frames that are unknown or cannot be drawn cost nothing else. An error is shown."""
        tab = await self.opens()
        for kind in "presence", ["message"], "message", "typing":
            self.pushes({"type": kind, "content": 5, "online": "x"})
        await tab.sees("^unknown: The server: typing unknown, ignored$")
        for frame in 5, None, "text", ["a"], {}, {"type": "message", "id": "a", "time": "no time"}:
            self.pushes(frame)
        await self.shows("1")
        self.pushes(ERROR)
        await tab.sees(log="other 1", lines="Not now.")
        tab.events.clear()  # The console may have complained.


class Connecting(PageCase):
    async def test_the_status_says_why(self):
        """The status says why a connection ended. A button offers what helps."""
        tab, again = await self.opens(), "Reconnect now"
        await tab.clicks("Hang up")
        await tab.sees(status="Disconnected. Your messages will wait.", now="")
        await tab.clicks("Call again")
        await tab.sees(status="Connected", buttons="Hang up")
        (connection,) = self.room.connections
        await connection.close(1011)
        await tab.sees(status="Closed with code 1011")
        self.room.capacity = 0
        await tab.clicks(again)
        await tab.sees(status="The room is full. Try again in a minute.")
        self.room.capacity = 1
        with self.assertLogs(), mock.patch.object(chat, "same_origin", return_value=False):
            await tab.clicks(again)
            await tab.sees(status="WebSocket refused. The server's terminal says why.")
        await tab.sees("^request", "^refused: The server: refused")
        await tab.clicks("refused")
        await tab.sees(opened="did not answer with 101")
        await tab.clicks(again)
        await tab.sees(status="Connected", now="")
        self.cuts_off()
        await tab.sees(status="No connection")
        await tab.clicks(again)
        await tab.sees(status="Connected")
        await self.goes_down()
        await tab.sees(status="The server has stopped", buttons=again)

    async def test_only_http_asks_during_an_outage(self):
        """A tab opens no WebSocket that would fail, because Firefox delays the next one then."""
        tab = await self.opens("Math.random = () => 0;")
        await self.goes_down()
        await tab.sees(status="The server has stopped")
        for count in range(4):
            await tab.passes(2**count / 2)
            await tab.sees(*["^close: The server: no answer to HEAD /"] * (count + 1))
        self.assertEqual(len(tab.heard_of("Network.webSocketCreated")), 1)
        await self.serves(self.port)
        await tab.passes(8)
        await tab.sees("no answer", *OPENING, "^welcome", status="Connected")

    async def test_a_slow_server_has_time_to_answer(self):
        """An opening that takes 44 s succeeds. One that takes 45 s is given up."""
        released, answer = asyncio.Event(), chat.answer

        async def answer_late(page, connection, request):
            if request.path.startswith("/ws"):
                await released.wait()
            return answer(page, connection, request)

        self.addCleanup(released.set)
        self.enterContext(mock.patch.object(chat, "answer", answer_late))
        await self.serves()
        tab, other = [await self.opens(status="Connecting") for _ in range(2)]
        await tab.says("early")
        await tab.passes(44)
        await other.passes(45)
        await other.sees("^request", "^close: The server: no answer", status="No connection")
        await tab.sees(status="Connecting", log=["own waiting early"])
        released.set()
        await tab.sees(status="Connected", log=["own delivered early"])

    async def test_waking_up_reconnects(self):
        """A tab that wakes up reconnects at once, also if it heard nothing for 25 s, but not
        after hanging up."""
        tab, opening = await self.opens(), [*OPENING, "^welcome"]
        for event in "window: online", "window: pageshow", "document: visibilitychange":
            with self.subTest(event):
                wake = "{}.dispatchEvent(new Event('{}'))".format(*event.split(": "))
                self.cuts_off()
                await tab.sees(status="No connection")
                await tab.evaluate(f"{wake}, {wake}")
                await tab.sees(*opening, has_joined=True)
                status = await tab.evaluate(f"clock.sleeps(24000), {wake}, sights.look('status')")
                self.assertEqual(status, "Connected")
                await tab.evaluate(f"clock.sleeps(2000), {wake}")
                await tab.sees("no answer", *opening, "no answer", *opening, has_joined=True)
        await tab.clicks("Hang up")
        await tab.evaluate(wake)
        await self.has(0)
        await tab.sees("^welcome", "close 1000", status="Disconnected")

    async def test_delays_double(self):
        """The delays to reconnect double from 1 s to 30 s, half by chance, with a countdown."""
        tab = await self.opens()
        await self.goes_down()
        await tab.sees(status="The server has stopped")
        for chance, delays in (0, [0.5, 1, 2, 4, 8, 15, 15]), (1, [1, 2, 4, 8, 16, 30, 30]):
            await tab.evaluate(f"Math.random = () => {chance}")
            await tab.clicks("Hang up")
            await tab.clicks("Call again")
            for delay in delays:
                await tab.sees(status="No connection", buttons="Reconnect now")
                await tab.passes(0.25)
                await tab.sees(countdown=f"({math.ceil(delay - 0.25)} s)")
                await tab.passes(delay - 0.25)
                await tab.sees(countdown="")

    async def test_delays_start_over(self):
        """After 10 s with a connection the delays start over, not sooner."""
        tab = await self.opens("Math.random = () => 1;")
        for seconds, delay in (9, 1), (9, 2), (11, 1):
            await tab.passes(seconds)
            self.cuts_off()
            await tab.sees(status="No connection")
            await tab.passes(0.25)
            await tab.sees(countdown=f"({delay} s)")
            await tab.passes(delay)
            await tab.sees(status="Connected")

    async def test_a_dead_connection_is_noticed(self):
        """A connection counts as dead after 45 s without a frame, or 5 s if an echo is due."""
        self.holds()
        tab = await self.opens()
        for online in "23":
            await tab.passes(44)
            self.pushes(HEARTBEAT | {"online": int(online)})
            await tab.sees(status="Connected", online=online)
        await tab.passes(45)
        await tab.sees("no answer code 1006: no close frame came", status="No connection")
        await tab.clicks("Reconnect now")
        await tab.sees(status="Connected", has_joined=True)
        await tab.says("one")
        await tab.passes(4)
        await tab.says("two")
        await tab.sees(status="Connected")
        await tab.passes(1)
        await tab.sees(log=["own waiting one", "own waiting two"], status="No connection")

    async def test_a_dead_way_up_is_noticed(self):
        """If others' frames come but no echo for 15 s, the connection counts as dead. Echoes that
        come more slowly than their messages keep it alive."""
        self.holds()
        tab = await self.opens()
        await tab.says("0", "1")
        await tab.sees(log=["own waiting 0", "own waiting 1"])
        for seconds in 4, 8, 12, 16, 20, 24:
            await tab.passes(4)
            self.pushes(HEARTBEAT | {"online": seconds})
            await tab.sees(status="Connected", online=f"{seconds}")
            if seconds == 12:
                await self.shows("0", nonce=tab.sent()[0]["nonce"])
                await tab.sees(last="own waiting 1", log="own delivered 0")
        await tab.passes(3)
        await tab.sees(last="own waiting 1", status="No connection")

    async def test_nothing_is_lost_or_doubled(self):
        """However a connection ends, the tab shows what it missed and sends what waits, once."""
        log = ["own delivered one", "other two", "other missed", "own delivered mine"]
        ways = {"Hang up": "Call again", "Cut the line": "Mend the line", "": "Reconnect now"}
        for leave, come_back in ways.items():
            with self.subTest(leave):
                self.room.history.clear()
                tab = await self.opens()
                await tab.says("one")
                await tab.sees(log=log[:1])
                await self.shows("two")
                await tab.sees(log=log[:2])
                await tab.clicks(leave) if leave else self.cuts_off()
                await self.shows("missed")
                await tab.says("mine")
                await tab.sees(log=[*log[:2], "own waiting mine"])
                await tab.clicks(come_back)
                await tab.sees("GET /ws.after=", "101", "1 missed", "“mine”", "^echo", log=log)
                said = [message["content"] for message in self.room.history]
                self.assertEqual(said, ["one", "two", "missed", "mine"])

    async def test_a_divider_shows_a_gap(self):
        """If a tab has missed 50 or more messages, a line says that some may be missing, also if
        the room was empty when it joined."""
        for missed, expected in (50, 1), (49, 0):
            with self.subTest(missed):
                self.room.history.clear()
                tab = await self.opens()
                await tab.clicks("Hang up")
                await self.has(0)
                await self.floods(missed)
                await tab.clicks("Call again")
                await tab.sees(last=f"other {missed - 1}")
                (lines,) = await tab.looks("lines")
                self.assertEqual(f"{lines}".count("may be missing"), expected)
                await tab.clicks("Hang up")


class Storing(PageCase):
    async def test_a_reload_keeps_what_waits(self):
        """After a reload everything looks as before. What waits is sent again, nothing else."""
        tab, log = await self.opens(), ["own delivered old", "own waiting mine"]
        await tab.says("old")
        await tab.sees(log=log[:1])
        released = self.holds()
        await tab.says("mine")
        await tab.types("draft")
        await tab.sees(log=log)
        await tab.reloads()
        await tab.sees("^resend: This tab: again.*“mine”", log=log, draft="draft")
        released.set()
        await tab.sees(last="own delivered mine")
        await tab.reloads()
        await tab.sees(log=["own delivered old", "own delivered mine"], draft="draft")
        _, first, again = tab.sent()
        self.assertEqual(again, first)

    async def test_a_huge_paste_does_not_stop_saving(self):
        """If more is pasted than storage holds, what was said and the paste's start are saved."""
        self.holds()
        tab = await self.opens("sessionStorage.more ??= 'x'.repeat(5_200_000);")
        await tab.says("mine")
        paste = "draft.value = 'x'.repeat(100_000), draft.dispatchEvent(new Event('input'))"
        await tab.evaluate(paste)
        await tab.reloads()
        await tab.sees(log=["own waiting mine"], draft="x" * 2_001)

    async def test_rubbish_in_storage_does_no_harm(self):
        """Whatever has been stored, the page works, and sends nothing that would not come back."""
        tab = await self.opens()
        good = {"content": "twice", "nonce": "twice"}
        entries = [None, 5, [[]], {}, good, good]
        entries += [good | {"nonce": nonce} for nonce in ("", "x" * 65, "a b", 1, None, ["a"])]
        entries += [good | {"content": content} for content in (" padded ", 5, None, ["a"])]
        for rubbish in "x", "5", "null", "[null, 5, {}]", "", json.dumps(entries):
            with self.subTest(rubbish):
                await tab.evaluate("draft.select()")
                await tab.says("hello")
                await tab.sees(last="own delivered hello", draft="")
                spoil = f"Object.keys(store).map(key => {{ store[key] = {json.dumps(rubbish)}; }})"
                await tab.evaluate(f"[localStorage, sessionStorage].map(store => {spoil})")
                await tab.reloads()
        await tab.sees(log="own delivered twice")
        sent = [frame["content"] for frame in tab.sent()]
        self.assertEqual(sent, ["hello"] * 6 + ["twice"])

    async def test_it_works_without_storage_or_secure_context(self):
        """The page works if storage is denied or full, and over plain HTTP from another host."""
        deny = """for (const kind of ["localStorage", "sessionStorage"])
            Object.defineProperty(window, kind, {get() { %s }});"""
        denied = deny % "throw new Error('denied');"
        full = deny % "return new Proxy({}, {set() { throw new Error('full'); }});"
        for host, before in ("127.0.0.1", denied), ("127.0.0.1", full), ("chat.example", ""):
            with self.subTest(host, before=before):
                tab = await self.opens(before, host)
                self.assertEqual(await tab.evaluate("isSecureContext"), host == "127.0.0.1")
                await tab.says("hello")
                await tab.clicks("Wire")
                await tab.sees(wire=[], last="own delivered hello")


class Reading(PageCase):
    async def test_messages_stand_together(self):
        """Messages of one person within a minute stand together, below one name and one time."""
        tab = await self.opens()
        await tab.call("Emulation.setTimezoneOverride", timezoneId="Asia/Tokyo")
        for name, at in ("A", "02:03"), ("A", "03:02"), ("A", "04:02"), ("B", "04:02"):
            await self.shows(at, username=name, time=f"2026-03-04T01:{at}.000+00:00")
        bubbles = ["A 10:02 AM 02:03", "03:02", "A 10:04 AM 04:02", "B 10:04 AM 04:02"]
        await tab.sees(bubbles=bubbles)

    async def test_presence_is_one_line(self):
        """However often people come and go, one line tells the latest, below the messages."""
        tab = await self.opens()
        await self.shows("hello")
        for number in range(5):
            self.pushes(HEARTBEAT | {"content": f"Port{number} left."})
        await tab.sees(lines=[f"{tab.name} joined.", "Port4 left."])

    async def test_a_reader_keeps_the_place(self):
        """New messages do not move a reader who has scrolled up. A button counts them."""
        tab = await self.opens()
        await self.floods(50)
        await tab.sees(reads_the_end=True, last="other 49")
        top = "document.querySelector('#messages li:nth-child(40)').getBoundingClientRect().top"
        wheel = {"type": "mouseWheel", "x": 200, "y": 300, "deltaX": 0, "deltaY": -400}
        for come_back, words in (tab.clicks, "3 new ↓"), (tab.says, "hello"):
            await tab.call("Input.dispatchMouseEvent", **wheel)
            await tab.waits_for("log.scrollTop === -400")
            place = await tab.evaluate(top)
            await self.floods(3)
            await tab.sees(pill="3 new ↓", title="(3) Chat")
            self.assertAlmostEqual(await tab.evaluate(top), place, delta=1)
            await come_back(words)
            await tab.sees(reads_the_end=True, focus="draft", pill="")

    async def test_a_hidden_tab_counts(self):
        """The title of a hidden tab counts what others say, and screen readers hear none of it."""
        released, tab = self.holds(), await self.opens()
        window = (await tab.call("Browser.getWindowForTarget"))["windowId"]
        becomes = functools.partial(tab.call, "Browser.setWindowBounds", windowId=window)
        self.addAsyncCleanup(becomes, bounds={"windowState": "normal"})
        await tab.says("mine")
        await becomes(bounds={"windowState": "minimized"})
        await tab.waits_for("document.hidden")
        released.set()
        await self.shows("theirs")
        await tab.sees(title="(1) Chat", log="own delivered mine")
        await self.floods(600)
        await tab.sees(title="(601) Chat", spoken=[f"{tab.name} joined."])
        await becomes(bounds={"windowState": "normal"})
        await tab.waits_for("document.title === 'Chat'")
        await tab.sees(log=[f"other {number}" for number in range(100, 600)])

    async def test_a_storm_shows_its_newest_500(self):
        """Of 2,000 messages at once the newest 500 are shown, while typing and speaking go on.
        Screen readers hear the end of the storm."""
        tab = await self.opens()
        await tab.evaluate("""window.added = 0, new MutationObserver(records => {
            added += records.flatMap(record => [...record.addedNodes]).length;
        }).observe(document.querySelector("[aria-live=polite]"), {childList: true})""")
        await self.floods(2_000)
        await tab.types("hello")
        await tab.sees(log=[f"other {number}" for number in range(1_500, 2_000)])
        self.assertLess(await tab.evaluate("added"), 1_000)
        await tab.sees(spoken="Port1: 1999")
        await tab.presses("Enter")
        await tab.sees(last="own delivered hello", reads_the_end=True)

    async def test_a_tab_that_is_alone_offers_company(self):
        """A tab that is alone says so. Its button opens a window that cannot reach this one."""
        tab = await self.opens()
        await tab.sees(alone="You are the only one here", online="1")
        await tab.clicks("Open a second window")
        await tab.sees(alone="", online="2")
        targets = (await tab.call("Target.getTargets"))["targetInfos"]
        (second,) = [t for t in targets if t["url"] == tab.url and not t["attached"]]
        self.assertFalse(second["canAccessOpener"])
        await tab.call("Target.closeTarget", targetId=second["targetId"])
        await tab.sees(alone="--host 0.0.0.0", online="1")
        await tab.says("hello")
        await tab.sees(log=["own delivered hello"], alone="")

    async def test_screen_readers_hear_everything_once(self):
        """Screen readers hear each message once. They find the parts of the page, and which side
        sends each row of the wire."""
        tab = await self.opens()
        await tab.says("mine")
        await tab.sees("^send", "^echo", log=["own delivered mine"])
        await self.shows("theirs")
        await tab.sees(spoken=[f"{tab.name} joined.", "You: mine", "Port1: theirs"])
        await tab.types("x" * 1_801)
        nodes = (await tab.call("Accessibility.getFullAXTree"))["nodes"]
        parts = [(node["role"]["value"], node["name"]["value"]) for node in nodes if "name" in node]
        self.assertLessEqual({"log", "status", "main", "textbox"}, {role for role, _ in parts})
        (draft,) = [node for node in nodes if node["role"]["value"] == "textbox"]
        self.assertEqual(draft["description"]["value"], "1,801 of 2,000 characters")
        rows = [name for role, name in parts if role == "DisclosureTriangle"]
        self.assertEqual(len(rows), 7)
        for row in rows:
            self.assertRegex(row, "(This tab|The server): .")
        live = await tab.evaluate("sights.all('[role=log], [aria-live]').map(e => e.ariaLive)")
        self.assertEqual(live, ["off", "polite"])

    async def test_the_focus_is_never_lost(self):
        """If a button or a message that has the focus goes, the draft gets it."""
        tab = await self.opens()
        await self.shows("\n".join("x" * 100))
        await tab.sees(log="x")
        self.cuts_off()
        await tab.sees(status="No connection", buttons="Reconnect now")
        await tab.evaluate("now.focus()")
        await tab.presses("Enter")
        await tab.sees(status="Connected", focus="draft")
        await tab.evaluate("sights.all('.text[tabindex]')[0].focus()")
        await tab.sees(focus="P")
        await self.floods(501)
        await tab.sees(focus="draft")

    async def test_the_keyboard_reaches_everything(self):
        """The Tab key reaches all that can be used, visibly, and what scrolls."""
        tab, reached = await self.opens(), set()
        await self.shows("\n".join("x" * 100))
        await tab.sees(log="x", focus="draft")
        focus = "[document.activeElement.className || sights.focus(), "
        focus += "getComputedStyle(document.activeElement).outlineStyle]"
        for _ in range(30):  # more than a round
            await tab.presses("Tab")
            name, outline = await tab.evaluate(focus)
            reached.add(name)
            self.assertTrue(outline != "none" or name == "BODY", name)
        names = "send slow pause unplug cut wire-toggle diagram away log text"
        self.assertLessEqual({*names.split()}, reached)


class Writing(PageCase):
    async def test_shift_and_enter_break_the_line(self):
        """Shift and Enter break the line, and five lines are in view. Enter sends them without the
        white space around them, and nothing if there is nothing else."""
        tab = await self.opens()
        await tab.says(" \n\u3000")
        await tab.evaluate("draft.select()")
        await tab.types("\x1c\x85\n")
        for line in range(4):
            await tab.types(f"{line}")
            self.assertTrue(await tab.evaluate("draft.scrollHeight < draft.clientHeight + 5"))
            await tab.presses("Shift+Enter")
        await tab.says("end \x1f\x85\u3000")
        await tab.sees(log=["own delivered 0\n1\n2\n3\nend"], draft="")

    async def test_the_enter_of_a_composition_does_not_send(self):
        """An Enter that ends an input method's composition sends nothing, not even in Safari."""
        tab, end = await self.opens(), {"selectionStart": 1, "selectionEnd": 1}
        await tab.call("Input.imeSetComposition", text="に", **end)
        await tab.presses("Enter")
        await tab.types("日本")
        await tab.presses("Enter", windowsVirtualKeyCode=229)
        await tab.sees(draft="日本", log=[])
        await tab.presses("Enter")
        await tab.sees(log=["own delivered 日本"])

    async def test_a_message_has_at_most_2000_characters(self):
        """A draft of 2,000 characters can be sent, emoji included. A longer one stays."""
        tab = await self.opens()
        for count, counter in (1_800, ""), (2_001, "2,001 of 2,000 characters"):
            await tab.evaluate("draft.select()")
            await tab.types("😀" * count)
            await tab.sees(counter=counter)
        await tab.presses("Enter")
        await tab.evaluate("draft.select()")
        await tab.types("😀" * 2_000 + " \n")
        await tab.sees(counter="2,000 of 2,000 characters", log=[])
        await tab.presses("Enter")
        await tab.sees(log=["own delivered " + "😀" * 2_000], counter="")


class Wire(PageCase):
    async def test_the_walkthrough_works_step_by_step(self):
        """Each step of the README's walkthrough has its rows, and the guide leads to the next."""
        first = await self.opens()
        welcome, pushed = "^welcome: The server: welcome", "^presence: The server: presence, pushed"
        others = "The server: to 1 other tab"
        echo = "^echo: The server: message, echoed your own, after 0 ms"
        heard = "^message: The server: message, pushed not requested Another tab:"
        await first.sees(*OPENING, f"{welcome} no history yet$", f"{pushed} 1 online$")
        await first.sees(guide="Open a second window")
        second = await self.opens()
        await first.sees(f"{pushed} 2 online {others} the same frame$")

        await first.sees(guide="Say something. One frame goes up")
        await first.says("hello")
        sent = r"^send: This tab: message, \d+ bytes “hello”$"
        await first.sees(sent, f"{echo} {others} the same frame$")
        push = f"{others} the sender included That is push.$"
        await second.sees(f"{heard} {first.name} spoke “hello” {push}")
        for tab in first, second:
            await tab.sees(guide="Say something in the other window")
        await second.says("hi")
        await first.sees(f"{heard} {second.name} spoke “hi” {push}")

        await first.sees(guide="Cut the line")
        await first.clicks("Cut the line")
        (counts,) = await first.looks("counts")
        await first.says("mine")
        await second.says("theirs")
        lost = [f"^lost: {end}: message, lost" for end in ("This tab", "The server")]
        await first.sees(f"{lost[0]} “mine”$", f"{lost[1]} “theirs”$", counts=counts, now="")
        await first.passes(5)
        died = "^close: The server: no answer code 1006: no close frame came$"
        await first.sees(*lost, died, status="No connection")
        await first.clicks("Mend the line")
        resume = rf"GET /ws\?after={self.room.history[-2]['id']} Upgrade: websocket$"
        again = r"^resend: This tab: again, \d+ bytes “mine”$"
        await first.sees(died, resume, OPENING[1], f"{welcome} 1 missed$", again, echo)
        log = ["other hello", "own delivered hi", "own delivered theirs", "other mine"]
        await second.sees(log=log)
        await first.sees(last="own delivered mine", log="other theirs")

        for tab in first, second:
            await tab.sees(guide="Stop the server")
        await self.goes_down()
        await first.sees("^close: The server: close 1001 going away$")
        await first.says("meanwhile")
        await first.passes(2)
        await first.sees("^close: The server: no answer to HEAD /$", guide="")
        self.room.history.clear()
        await self.serves(self.port)
        await first.passes(4)
        await first.sees(*OPENING, f"{welcome} 0 missed, or more$", "^send", "^echo")
        await first.sees(last="own delivered meanwhile", lines="may be missing")
        await second.passes(1)
        await second.sees(log=[*log, "other meanwhile"], lines="may be missing", guide="")

    async def test_rows_open_to_the_bytes_on_the_wire(self):
        """A row opens to its frame: the header in hexadecimal, the text, then field by field. The
        counters count all of these bytes."""
        tab = await self.opens()
        await tab.says("żółć 👋")
        await tab.sees("^send", "^echo")
        (sent,) = tab.frames("Sent")
        size, nonce = len(sent.encode()), json.loads(sent)["nonce"]
        rows = {"GET /ws": ["Sec-WebSocket-Key"], "101": ["Sec-WebSocket-Accept"]}
        rows["“żółć"] = [f"81 {128 + size:x} xx xx xx xx {size + 6} bytes on the wire\n{sent}\n"]
        rows["“żółć"] += [f"masked, {size} bytes", '"content": "żółć 👋"', f'"nonce": "{nonce}"']
        for size, header in (125, "7d"), (126, "7e 00 7e"), (65_536, "7f 00 00 00 00 00 01 00 00"):
            frame = json.dumps({"type": f"t{size}", "content": ""})
            self.pushes(json.loads(frame) | {"content": "x" * (size - len(frame))})
            total = f"{size + 1 + len(header.split()):,}"
            rows[f"t{size}"] = [f"81 {header} {total} bytes on the wire\n", f"{size:,} bytes"]
        for row, parts in rows.items():
            with self.subTest(row):
                await tab.clicks(row)
                for part in parts:
                    await tab.sees(opened=part)
                await tab.clicks(row)
                await tab.sees(opened="")
        got = [len(payload.encode()) for payload in tab.frames("Received")]
        total = sum(size + (2 if size < 126 else 4 if size < 65_536 else 10) for size in got)
        await tab.sees(counts=[1, len(sent.encode()) + 6, len(got), total])

    async def test_slow_and_pause_hold_back_only_rows(self):
        """Slow shows a row every 0.7 s, and Pause none. Neither delays the conversation."""
        tab = await self.opens()
        (before,) = await tab.looks("wire")
        await tab.clicks("Slow")
        await self.floods(3)
        await tab.sees(log=["other 0", "other 1", "other 2"], wire=before)
        await tab.passes(0.7)
        await tab.sees("^welcome", "“0”")
        await tab.clicks("Pause")
        await tab.clicks("Slow")  # It is no longer slow.
        await self.shows("held")
        await tab.passes(5)
        await tab.sees("^welcome", "“0”", last="other held")
        await tab.clicks("Pause")
        await tab.passes(0.7)
        await tab.sees("^welcome", "“0”", "“1”", "“2”", "“held”")

    async def test_a_storm_shares_a_row(self):
        """From the tenth within a second, frames that are alike share a row. Slow talk does not."""
        tab = await self.opens()
        await tab.passes(1)
        await self.floods(30)
        await tab.sees("welcome", *["“[0-8]”"] * 9, "“9” and 20 more like it")
        self.pushes(HEARTBEAT)
        await self.shows("end")
        await tab.sees("and 20 more like it$", "^presence", "“end”")
        await tab.passes(1)
        for number in range(12):
            await tab.passes(0.2)
            await self.shows(f"{number}")
            await tab.sees(f"“{number}”")

    async def test_the_newest_rows_stay(self):
        """The newest 300 rows stay, as does a row that is open."""
        tab = await self.opens()
        await tab.clicks("GET /ws")
        for second in range(40):
            await tab.passes(1)
            await self.publishes(*(f"{second}.{n}" for n in range(9)))  # too few for a storm
            await tab.waits_for(f"sights.words(wire.lastElementChild).includes('{second}.8')")
        ((opened, oldest, *rest),) = await tab.looks("wire")
        self.assertEqual((opened[:7], oldest[-5:], len(rest)), ("request", "“6.7”", 298))

    async def test_the_panel_stays_as_it_was_left(self):
        """The wire is open beside the chat, closed on a phone, and stays as its user leaves it. The
        guide can be put away, in all windows."""
        tab, other = await self.opens(), await self.opens()
        await other.clicks("Put the walkthrough away")
        await tab.sees(guide="")
        for width, click, button in (1280, "", "Pause"), (390, "", ""), (390, "Wire", "Pause"):
            await tab.resizes(width, 844)
            if click:
                await tab.clicks(click)
            await tab.reloads()
            await tab.sees(pause=button, guide="")
            is_open = f"{bool(button)}".lower()
            await tab.waits_for(f"sights.all('#wire-toggle[aria-expanded={is_open}]').length")
