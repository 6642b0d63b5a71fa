"""Tests of the chat: its promises, over real connections.

They come in layers: the room (a server in this process), then the program (`python chat.py`).
"""

import asyncio
import base64
import collections
import contextlib
import functools
import hashlib
import itertools
import json
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
import tomllib
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


def setUpModule():
    unittest.addModuleCleanup(print_skips)


def print_skips():
    """Print which tests were skipped and why. unittest itself does so with -v only."""
    tests = collections.defaultdict(list)
    for test, reason in Case.skipped:
        tests[reason].append(test.id().removeprefix(f"{__name__}."))
    for reason, ids in tests.items():
        print(f"\nSkipped, because {reason}: {', '.join(ids)}", file=sys.stderr)


def skip(reason):
    """Skip the calling test, or fail it if the environment variable CHAT_NO_SKIPS is set."""
    if os.environ.get("CHAT_NO_SKIPS"):
        raise AssertionError(f"nothing may be skipped here, but {reason}")
    raise unittest.SkipTest(reason)


async def until(condition):
    """Wait until condition() is true."""
    async with asyncio.timeout(PATIENCE):
        while not condition():
            await asyncio.sleep(0.005)


def request(line, **headers):
    """Return the bytes of an HTTP request."""
    lines = [f"{name.replace('_', '-')}: {value}" for name, value in headers.items()]
    return "\r\n".join([f"{line} HTTP/1.1", *lines, "", ""]).encode()


UPGRADE = {"Connection": "Upgrade", "Upgrade": "websocket", "Sec_WebSocket_Version": "13"}
UPGRADE["Sec_WebSocket_Key"] = "dGhlIHNhbXBsZSBub25jZQ=="
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


class Client:
    """A well-behaved client, as a tab is. Its verbs wait for the next frame."""

    def __init__(self, test, connection):
        self.test, self.connection = test, connection
        self.port = connection.local_address[1]

    async def frame(self, *types):
        """Return the next frame, or the next of these types."""
        async with asyncio.timeout(PATIENCE):
            while True:
                self.payload = await self.connection.recv()
                frame = json.loads(self.payload)
                if not types or frame["type"] in types:
                    return frame

    async def sends(self, payload):
        await self.connection.send(payload)

    async def says(self, content, **more):
        await self.sends(json.dumps({"content": content, **more}))

    async def hears(self, *contents):
        """Assert that the next messages have these contents. Return the last message."""
        frames = [await self.frame("message", "error") for _ in contents]
        self.test.assertEqual([frame["content"] for frame in frames], [*contents])
        return frames[-1]

    async def is_refused(self, why, **more):
        """Assert that the next frame is an error whose content matches `why`."""
        error = await self.frame("message", "error")
        self.test.assertRegex(error.pop("content"), why)
        self.test.assertEqual(error, {"type": "error", "username": "server", **more})

    async def is_told(self, sentence, online):
        """Assert that the next frame about presence has this sentence and this number."""
        expected = {"type": "presence", "username": "server", "content": sentence}
        self.test.assertEqual(await self.frame("presence"), expected | {"online": online})

    async def is_closed_with(self, code, reason="^"):
        async with asyncio.timeout(PATIENCE):
            await self.connection.wait_closed()
        self.test.assertEqual(self.connection.close_code, code)
        self.test.assertRegex(self.connection.close_reason, reason)

    async def leaves(self):
        await self.connection.close()

    def vanish(self):
        """Break the connection without a close frame."""
        self.connection.transport.abort()


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

    skipped = ()  # tests and reasons, from unittest

    def run(self, result=None):
        Case.skipped = getattr(result, "skipped", ())
        return super().run(result)

    async def asyncSetUp(self):
        asyncio.get_running_loop().set_debug(False)  # It makes everything half as fast.

    async def joins(self, after=None, **options):
        """Return a client that has got its welcome. It leaves when the test ends."""
        url = f"ws://127.0.0.1:{self.port}/ws" + ("" if after is None else f"?after={after}")
        options = {"proxy": None, "ping_interval": None, "max_queue": None} | options
        client = Client(self, await websockets.connect(url, **options))
        self.addAsyncCleanup(client.leaves)
        client.welcome = await client.frame()
        self.assertEqual(client.welcome["type"], "welcome")
        client.name = client.welcome["username"]
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
        line.socket.close()
        head, _, body = answer.decode().partition("\r\n\r\n")
        status, *fields = head.split("\r\n")
        return int(status.split()[1]), [tuple(field.split(": ", 1)) for field in fields], body


class ServerCase(Case):
    """A room of its own for each test. It must log no warning and keep nobody."""

    async def asyncSetUp(self):
        await super().asyncSetUp()
        self.enterContext(self.assertNoLogs(level="WARNING"))
        self.passed = 0  # seconds
        self.enterContext(mock.patch.object(time, "monotonic", self.now))
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

    def now(self):
        return MONOTONIC() + self.passed

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
                await anna.sends(payload)
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
        self.assertEqual([len(id) for id in ids], [16] * len(GOOD_FRAMES))  # 96 bits each

    async def test_everyone_hears_the_same_order(self):
        """When several talk at once, all hear their messages in the same order."""
        clients = [await self.joins() for _ in range(4)]
        await asyncio.gather(*(c.says(f"{c.name} {n}") for n in range(15) for c in clients))
        heard = [[(await c.frame("message"))["content"] for _ in range(60)] for c in clients]
        for client, contents in zip(clients, heard, strict=True):
            self.assertEqual(contents, heard[0])
            own = [content for content in contents if content.startswith(f"{client.name} ")]
            self.assertEqual(own, [f"{client.name} {n}" for n in range(15)])

    async def test_a_repeated_message_is_pushed_once(self):
        """A message with a remembered nonce and content is dropped, whoever sends it."""
        anna, ben = await self.joins(), await self.joins()
        await anna.says("mine", nonce="a")
        await anna.says(" mine ", nonce="a")
        mine = await ben.hears("mine")
        await ben.says("mine", nonce="a")  # as after a reconnection, which changes the name
        await ben.says("other", nonce="a")
        await ben.says("mine", nonce="b")
        await ben.says("mine", nonce=mine["id"])
        await ben.says("mine")
        await ben.hears("other", "mine", "mine", "mine")
        self.assertEqual(len({message["id"] for message in self.room.history}), 5)

    async def test_a_forgotten_message_can_be_repeated(self):
        """A message is dropped as a copy as long as it is among the last 50."""
        self.set(MESSAGES_PER_SECOND=1_000)
        anna = await self.joins()
        await anna.says("first", nonce="a")
        await anna.hears("first")
        for number in range(50):
            await anna.says("first", nonce="a")
            await self.publishes(f"{number}")
            await anna.hears(f"{number}")
        await anna.says("first", nonce="a")
        await anna.hears("first")

    async def test_last_words_are_heard(self):
        """What a client sends right before its close frame is pushed to the others."""
        anna = await self.joins()
        for words in ["bye"], ["hello", "bye"], [f"{number}" for number in range(20)]:
            line = await self.shakes_hands()
            await line.sends(b"".join(said(content) for content in words) + GOODBYE)
            await anna.hears(*words)

    async def test_frames_come_before_the_close_frame(self):
        """Whichever end closes a connection, the frames before arrive first."""
        anna, ben, words = await self.joins(), await self.joins(), [f"{n}" for n in range(100)]
        await self.publishes(*words)
        await anna.leaves()
        self.server.close()
        for client, code in (anna, 1000), (ben, 1001):
            await client.hears(*words)
            await client.is_closed_with(code)

    async def test_a_refused_publication_is_explained(self):
        """If publish raises Refused, as a broker's may, the sender gets the reason."""
        anna = await self.joins()
        refusals = [chat.Refused("Redis is down.", nonce="a"), None]
        with mock.patch.object(self.room, "publish", side_effect=refusals):
            await anna.says("hello", nonce="a")
            await anna.is_refused("^Redis is down.$", nonce="a")
        await anna.says("hello", nonce="a")
        await anna.hears("hello")


class Joining(ServerCase):
    async def test_the_welcome_comes_first(self):
        """The first frame has the client's name, the number of clients and the last 50 messages."""
        ben, words = await self.joins(), [f"{number}" for number in range(52)]
        await self.publishes(*words)
        messages = [await ben.hears(content) for content in words]
        anna = await self.joins()
        name = f"Port{anna.port}"
        expected = {"type": "welcome", "username": name, "online": 2, "gap": False}
        self.assertTrue(anna.welcome.pop("content"))
        self.assertEqual(anna.welcome, expected | {"history": messages[2:]})

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
            await anna.leaves()

    async def test_the_longest_history_arrives(self):
        """Even 50 messages at their longest fit into a welcome."""
        longest = [{"content": f"{n:04}" + "\1" * 1996, "nonce": "\1" * 64} for n in range(50)]
        for message in longest:
            await self.room.publish(chat.parse_message("Port1", json.dumps(message)))
        anna = await self.joins(max_size=None)
        self.assertEqual(len(anna.welcome["history"]), 50)

    async def test_names_differ(self):
        """Clients on several hosts that share a port get numbers, and free them by leaving."""
        anna = await self.joins()
        try:
            others = [await self.joins(local_addr=(f"127.0.0.{n}", anna.port)) for n in (2, 3)]
        except OSError:
            skip("this system has no address 127.0.0.2")
        self.assertEqual([c.name for c in others], [f"{anna.name}-2", f"{anna.name}-3"])
        await others[0].leaves()
        await self.has(2)
        again = await self.joins(local_addr=("127.0.0.4", anna.port))
        self.assertEqual(again.name, f"{anna.name}-2")

    async def test_a_full_room_turns_clients_away(self):
        """In a full room a client gets code 1013 and a second to answer, until another leaves."""
        self.room.capacity = 2
        anna, ben = await self.joins(), await self.joins()
        await self.passes(0.25)
        await anna.is_told(f"{names(anna, ben)} joined.", 2)
        late = await self.calls(HANDSHAKE)
        await late.hears((1013).to_bytes(2) + b"The room is full")
        await self.passes(1)  # The client does not answer, so it is cut off.
        self.assertNotIn(b"welcome", await late.ends())
        await anna.says("still here")
        await ben.hears("still here")
        await ben.leaves()
        await anna.is_told(f"{ben.name} left.", 1)
        await self.joins()


class Presence(ServerCase):
    async def test_news_takes_250_ms(self):
        """Everyone hears who joined or left, no sooner than after a quarter of a second."""
        anna = await self.joins()
        await anna.is_told(f"{anna.name} joined.", 1)
        start = time.monotonic()
        ben = await self.joins()
        await anna.is_told(f"{ben.name} joined.", 2)
        await ben.is_told(f"{ben.name} joined.", 2)
        self.assertTrue(0.25 <= time.monotonic() - start < 2)
        ben.vanish()
        await anna.is_told(f"{ben.name} left.", 1)

    async def test_one_frame_announces_all_news(self):
        """A frame names up to three clients and counts more. It omits those that came and went."""
        self.set(PRESENCE_DELAY=PATIENCE / 2)
        anna, present = await self.joins(), []
        await self.passes(PATIENCE / 2)
        await anna.is_told(f"{anna.name} joined.", 1)
        for leave, join, pass_by in (0, 1, 0), (1, 3, 0), (3, 4, 1), (4, 0, 0), (0, 0, 1):
            left, present = present[:leave], present[leave:]
            joined = [await self.joins() for _ in range(join)]
            passing = [await self.joins() for _ in range(pass_by)]
            for client in left + passing:
                await client.leaves()
            present += joined
            await self.has(1 + len(present))
            await self.passes(PATIENCE / 2)
            sentences = []
            for clients, change in (joined, "joined"), (left, "left"):
                who = names(*clients) if len(clients) <= 3 else f"{len(clients)} people"
                sentences += [f"{who} {change}."] if clients else []
            await anna.is_told(" ".join(sentences), 1 + len(present))

    async def test_a_heartbeat_comes_every_20_s(self):
        """Without news a frame with empty content comes after 20 s, because no page sees pings."""
        anna = await self.joins()
        await self.passes(0.25)
        await anna.is_told(f"{anna.name} joined.", 1)
        for _ in range(2):
            for seconds in 18, 1, 0:
                await self.passes(seconds)
                await anna.says("quiet")
                self.assertEqual((await anna.frame())["content"], "quiet")
            await self.passes(1)
            await anna.is_told("", 1)

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
        """The sender of a bad frame learns what is wrong with it, and the connection stays."""
        self.set(MESSAGES_PER_SECOND=1_000)
        anna, ben = await self.joins(), await self.joins()
        for reason, frames in REASONS.items():
            for frame in frames:
                with self.subTest(reason, frame=f"{frame}"[:50]):
                    fields = isinstance(frame, dict)
                    await anna.sends(json.dumps(frame) if fields else frame)
                    more = {"nonce": "mine"} if fields and frame.get("nonce") == "mine" else {}
                    await anna.is_refused(f"^Send .*({reason})", **more)
                    await anna.says("hello")
                    for client in anna, ben:
                        await client.hears("hello")

    async def test_some_frames_close_the_connection(self):
        """A frame over 32 KiB closes its connection, as does one that breaks the protocol."""
        frames = {b"\x81\xfe\x80\x01" + bytes(0x8005): 1009, masked(b"\xff\xfe"): 1007}
        frames |= {masked(b"hello", first): 1002 for first in (0xC1, 0x83, 0x80)}
        frames[b"\x81\x05hello"] = 1002  # It is not masked.
        anna = await self.joins()
        for data, code in frames.items():
            with self.subTest(data):
                line = await self.shakes_hands()
                await line.sends(data)
                await line.hears(code.to_bytes(2))
                line.vanish()
                await self.has(1)
        await anna.says("hello")
        await anna.hears("hello")

    async def test_rubbish_harms_nobody_else(self):
        """Whatever one connection sends, wherever it breaks off, the others go on."""
        goodbyes = [GOODBYE, masked((1000).to_bytes(2), first=0x88), masked(b"hello", 0xC1)]
        behind = [*goodbyes, b"\x81\x05hello", b"\x81\xff\x7f" + bytes(11), b"\x81\x85abcdhe"]
        behind += [request("GET /"), request("GET /") * 20, HANDSHAKE, bytes(9_000), b"\x81", b""]
        cases = [b"", b"GET", HANDSHAKE[:40], b"\r\n\r\n", b"hello\r\n\r\n", b"GET /ws\r\n\r\n"]
        cases += [bytes(9_000), b"\x16\x03\x01\0\5\n"]  # the latter is TLS
        for path, more in itertools.product([b"/", b"/ws", b"/no"], behind):
            cases.append(HANDSHAKE.replace(b"/ws", path) + more)
        self.set(MESSAGES_PER_SECOND=1_000)
        anna, ben = await self.joins(), await self.joins()
        for number, data in enumerate(cases):
            for ending in "close", "reset", "half-close":
                with self.subTest(data, ending=ending):
                    line = await self.calls(data)
                    if ending == "reset":
                        line.vanish()
                    elif ending == "half-close":
                        line.socket.shutdown(socket.SHUT_WR)
                        answer = await line.ends()
                        self.assertRegex(answer, b"^($|HTTP/1.1 (101|200|4[0-9][0-9]) )")
                    line.socket.close()
                    await anna.says(f"{number} {ending}")
                    await ben.hears(f"{number} {ending}")
        await self.has(2)


class Http(ServerCase):
    async def test_the_page_has_its_headers(self):
        """The page's headers forbid everything but its own scripts and styles, and caching."""
        page = (HERE / "index.html").read_text(encoding="utf-8")
        inline = re.findall("<script>(.*?)</script>|<style>(.*?)</style>", page, re.DOTALL)
        digests = [hashlib.sha256("".join(part).encode()).digest() for part in inline]
        hashes = " ".join(f"'sha256-{base64.b64encode(digest).decode()}'" for digest in digests)
        policy = f"default-src 'none'; script-src {hashes}; style-src {hashes}; img-src data:; "
        policy += "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
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
        required = {426: {("Upgrade", "websocket")}, 405: set()}
        for line, expected in cases.items():
            with self.subTest(line):
                status, headers, body = await self.http(line)
                self.assertEqual((status, body == ""), (expected, line.startswith("HEAD")))
                self.assertTrue(status != 404 or body in ("", "The chat is at /\n"))
                self.assertLessEqual(required.get(status, set()), {*headers})
                self.assertEqual(len([name for name, _ in headers if name == "Content-Type"]), 1)

    async def test_a_whole_url_opens_a_websocket(self):
        """A client of a proxy, which sends the whole URL, can join and resume."""
        await self.publishes("first", "second")
        target = f"GET HTTP://chat.example/ws?after={self.room.history[0]['id']}"
        line = await self.calls(request(target, Host="chat.example", **UPGRADE))
        await line.hears(b"second")
        self.assertNotIn(b"first", line.heard)

    async def test_pages_of_the_same_origin_are_welcome(self):
        """A page of this server can open a WebSocket, as can a program, which sends no Origin."""
        own = f"127.0.0.1:{self.port}"
        cases = [{}, {"Origin": f"http://{own}"}, {"Origin": f"https://{own}"}]
        pairs = {"http://chaT.example": "Chat.Example", "http://[::1]:8080": "[::1]:8080"}
        pairs |= {"https://a.example": "a.example:443", "https://a.example:443": "a.example"}
        pairs |= {"http://a.example": "a.example:80"}  # default ports (RFC 6454, section 4)
        cases += [{"Origin": origin, "Host": host} for origin, host in pairs.items()]
        for headers in cases:
            with self.subTest(headers):
                line = await self.calls(request("GET /ws", **{"Host": own} | headers, **UPGRADE))
                await line.hears(b"welcome")

    async def test_pages_of_other_origins_are_refused(self):
        """Other pages get 403. The body and one line of the log say what a proxy must forward."""
        own = f"127.0.0.1:{self.port}"
        cases = [(origin, own) for origin in ("http://evil.example", "null", "x", "http://[")]
        cases += [(f"http://{own}.evil.example", own), ("http://127.0.0.1", own)]
        cases += [(f"http://127.0.0.1:{self.port + 1}", own), (f"http://evil.example/{own}", own)]
        cases += [("https://a.example", "a.example:80"), ("http://a.example", "a.example:443")]
        cases += [("http://a.example", "a.example:8080"), ("http://a.example", "127.0.0.1:8080")]
        for origin, host in cases:
            with self.subTest(origin, host=host), self.assertLogs(level="WARNING") as logs:
                status, _, body = await self.http("GET /ws", Origin=origin, Host=host, **UPGRADE)
                self.assertEqual(status, 403)
                self.assertEqual(len(logs.output), 1)
                for text in body, logs.output[0]:
                    for detail in origin, host, "proxy must forward":
                        self.assertIn(detail, text)
        two = f"http://evil.example\r\nOrigin: http://{own}"
        with self.assertLogs(level="WARNING"):
            self.assertEqual((await self.http("GET /ws", Origin=two, **UPGRADE))[0], 403)

    async def test_a_request_has_at_most_16_kib(self):
        """A request of 16 KiB is answered. One byte more is cut off before it is parsed."""
        limit = 16 * 1024
        for target, start in {"GET /": b"HTTP/1.1 200 ", "GET /ws": b"HTTP/1.1 101 "}.items():
            headers = {"Host": "a", "A": "a" * 8_000, "C": "c" * 500, **UPGRADE}
            rest = limit - len(request(target, **headers, B=""))
            line = await self.calls(request(target, **headers, B="b" * rest))
            await line.hears(start)
            line = await self.calls(request(target, **headers, B="b" * (rest + 1)))
            self.assertEqual(await line.ends(), b"")

    async def test_endless_requests_are_cut_off(self):
        """Headers without an end, and bytes behind a response, are not read beyond 16 KiB."""
        too_long = b"GET / HTTP/1.1\r\nA: " + b"a" * 9_000  # websockets refuses this with 431
        for start in b"GET / HTTP/1.1\r\n", too_long, request("GET /"), request("GET /no"):
            with self.subTest(start[:30]):
                line = await self.calls(start)
                await line.sends((b"X: " + b"x" * 1_000 + b"\r\n") * 1_000)
                await line.ends()  # websockets itself would wait for 10 s.
        line = await self.calls(too_long)
        await line.hears(b"HTTP/1.1 431 ")

    async def test_a_slow_phone_gets_the_whole_page(self):
        """A client that begins to read only after nine seconds still gets all of the page."""
        (listener,) = self.server.sockets  # Its connections inherit the size of the buffer.
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
        line = await self.calls(request("GET /"), SO_RCVBUF=1024)
        await line.hears(b"200 OK")
        await self.passes(9)
        answer = await line.ends()
        self.assertTrue(answer.endswith((HERE / "index.html").read_bytes()))


class Load(ServerCase):
    @contextlib.contextmanager
    def counted_sends(self):
        """Count the system calls that send something from the server, for each client's port."""
        if sys.platform == "win32":
            skip("asyncio sends without socket.send on Windows")
        counts, send = collections.Counter(), socket.socket.send

        def count(end, *args):
            if end.getsockname()[1] == self.port:
                counts[end.getpeername()[1]] += 1
            return send(end, *args)

        with mock.patch.object(socket.socket, "send", count):
            yield counts

    async def test_one_send_for_many_frames(self):
        """All frames of one iteration of the event loop leave in one system call per client."""
        anna, ben, words = await self.joins(), await self.joins(), [f"{n}" for n in range(50)]
        await self.passes(0.25)
        for client in anna, ben:
            await client.is_told(f"{names(anna, ben)} joined.", 2)
        with self.counted_sends() as counts:
            await self.publishes(*words)
            for client in anna, ben:
                await client.hears(*words)
        self.assertEqual(counts, {anna.port: 1, ben.port: 1})

    async def test_a_send_that_fails_costs_one_connection(self):
        """If a connection cannot be written to, the others get their frames and it is dropped."""
        anna, cleo, broken = await self.joins(), await self.joins(), await self.shakes_hands()
        (end,) = self.room.connections - {self.end_of(anna), self.end_of(cleo)}
        end.transport.write_eof()
        with self.assertLogs(level="WARNING") as logs:
            await self.publishes("one", "two")
            for client in anna, cleo:
                await client.hears("one", "two")
            await self.has(2)
        self.assertEqual(len(logs.records), 1)
        self.assertIn(f"Port{broken.socket.getsockname()[1]}", logs.output[0])
        await anna.says("three")
        await cleo.hears("three")

    async def test_nothing_is_sent_on_a_broken_connection(self):
        """Frames for a connection that breaks in the same iteration are dropped silently."""
        anna, ben = await self.joins(), await self.joins()
        words = [f"{number}" for number in range(500)]
        self.end_of(ben).transport.abort()
        await self.publishes(*words)  # asyncio would warn of the fifth attempt to send.
        await anna.hears(*words)
        await self.has(1)

    async def test_it_works_without_send_data(self):
        """If websockets stops calling send_data, nothing is gathered and everything works."""
        original = websockets.ServerConnection.send_data
        self.enterContext(mock.patch.object(chat.Connection, "send_data", original))
        anna, ben, words = await self.joins(), await self.joins(), [f"{n}" for n in range(50)]
        with self.counted_sends() as counts:
            await self.publishes(*words)
            await anna.hears(*words)
        self.assertGreaterEqual(counts[anna.port], 50)
        await anna.is_told(f"{names(anna, ben)} joined.", 2)
        await anna.says("bye")
        await anna.leaves()
        await ben.hears(*words, "bye")
        self.server.close()
        await ben.is_closed_with(1001)

    async def test_a_catch_up_takes_bounded_memory(self):
        """1,000 long messages at once take little memory, although 100 clients read nothing yet."""
        for _ in range(100):
            await self.shakes_hands()
        for end in self.room.connections:  # The operating system takes next to nothing.
            link = end.transport.get_extra_info("socket")
            link.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
        tracemalloc.start()
        self.addCleanup(tracemalloc.stop)
        with self.assertLogs(level="WARNING") as logs:
            await self.publishes(*["x" * 2_000] * 1_000)
            await self.has(0)
        self.assertLess(tracemalloc.get_traced_memory()[1], 20_000_000)  # bytes, not 200 million
        self.assertEqual(len(logs.output), 100)

    async def test_a_stopping_room_publishes_nothing(self):
        """While the server stops, messages wait at their senders, however many have arrived."""
        anna = await self.joins()
        await self.publishes("in time")
        self.room.stopping = True
        await self.publishes("late")
        await anna.hears("in time")
        self.assertEqual([message["content"] for message in self.room.history], ["in time"])

    async def test_a_slow_reader_is_cut_off(self):
        """A client that leaves 1 MiB unread is cut off, with one line in the log."""
        anna, slow = await self.joins(), await self.shakes_hands(SO_RCVBUF=4096)
        (end,) = self.room.connections - {self.end_of(anna)}
        unsent = []
        with self.assertLogs(level="WARNING") as logs:
            while end in self.room.connections:
                await self.publishes(content := f"{len(unsent):04}" + "x" * 1996)
                await anna.hears(content)
                unsent.append(end.transport.get_write_buffer_size())
        self.assertIn(max(unsent), range(1024**2 - 5_000, 1024**2 + 1))
        (line,) = logs.output
        self.assertRegex(line, f"Port{slow.socket.getsockname()[1]} reads too slowly")

    async def test_a_fast_talker_waits(self):
        """Of more messages than 20 at once, the rest waits for a second and keeps its order."""
        anna, words = await self.joins(), [f"{number}" for number in range(30)]
        for content in words:
            await anna.says(content)
        await anna.hears(*words)
        times = [datetime.fromisoformat(message["time"]) for message in self.room.history]
        waits = [later - sooner for sooner, later in itertools.pairwise(times)]
        self.assertEqual(sorted(range(29), key=waits.__getitem__)[-1], 19)
        self.assertTrue(0.99 <= (times[20] - times[0]).total_seconds() < 1.9)

    async def test_a_flood_ends_with_its_client(self):
        """Others' messages pass a flood, of which nothing is published after its client left."""
        anna, flood = await self.joins(), await self.shakes_hands()
        (end,) = self.room.connections - {self.end_of(anna)}
        await flood.sends(said("flood") * 100)
        await anna.hears(*["flood"] * 20)
        await anna.says("hello")
        await anna.hears("hello")
        flood.vanish()
        while end.state is websockets.State.OPEN:  # until a message does not arrive there
            await self.publishes("hello")
            await anna.hears("hello")
        await self.passes(1)
        await self.has(1)
        await anna.says("over")
        await anna.hears("over")

    async def test_a_flood_is_read_in_small_pieces(self):
        """The server's system takes few bytes ahead of the server, so that each has its turn."""
        flood = await self.shakes_hands(SO_SNDBUF=4096)
        size = 0
        with contextlib.suppress(BlockingIOError):
            while True:
                size += flood.socket.send(PING * 100)
        self.assertLess(size, 64 * 1024)

    async def test_impossible_addresses_are_explained(self):
        """A port or a host that cannot be served ends the program with advice."""
        cases = {("127.0.0.1", port): "--port from 0 to 65535" for port in (-1, 65536)}
        for host in "no.such.invalid", "a..b", "192.0.2.1":
            cases[host, 0] = f"{re.escape(host)}.* --host"
        for (host, port), advice in cases.items():
            with self.subTest(host, port=port), self.assertRaisesRegex(SystemExit, advice):
                await chat.start(self.room, host, port)

    async def test_it_serves_at_the_highest_port(self):
        """It serves at port 65535."""
        try:
            socket.create_server(("127.0.0.1", 65535)).close()
        except OSError:
            skip("port 65535 is taken")
        await self.serves(65535)
        await self.joins()

    async def test_many_can_connect_at_once(self):
        """120 clients connect before the server accepts one: more than asyncio's backlog."""
        for line in [Line(self.port) for _ in range(120)]:
            line.socket.close()

    async def test_the_operating_system_limits_the_room(self):
        """Half of the file descriptors are for clients, after the soft limit has been raised."""
        cases = [(64, 128, 64, None), (128, 20_000, 10_000, None), (50_000, 90_000, 10_000, None)]
        cases += [(256, 90_000, 128, ValueError), (256, 90_000, 128, OSError)]  # as on macOS
        for soft, hard, capacity, refusal in cases:
            limits = [soft, hard]

            def change(_, new, limits=limits, refusal=refusal):
                self.assertGreaterEqual(new[0], limits[0])
                if refusal:
                    raise refusal
                limits[:] = new

            resource = types.SimpleNamespace(RLIMIT_NOFILE=7, setrlimit=change)
            resource.getrlimit = lambda _, limits=limits: tuple(limits)
            with mock.patch.dict(sys.modules, resource=resource):
                await self.serves()
            self.assertEqual(self.room.capacity, capacity)
        with mock.patch.dict(sys.modules, resource=None):  # as on Windows
            await self.serves()
        self.assertEqual(self.room.capacity, 10_000)


class TwoServers(unittest.TestCase):
    def test_two_event_loops_do_not_disturb_each_other(self):
        """While one event loop is stopped between a push and its sending, another one pushes."""

        async def start():
            room = chat.Room()
            server = await chat.start(room, "127.0.0.1", 0)
            url = f"ws://127.0.0.1:{server.sockets[0].getsockname()[1]}/ws"
            client = await websockets.connect(url, proxy=None)
            await client.recv()
            return room, server, client

        async def finish(server, client, *contents):
            async with asyncio.timeout(PATIENCE):
                for content in contents:
                    self.assertEqual(json.loads(await client.recv()), {"content": content})
                await client.close()
                server.close()
                await server.wait_closed()

        with asyncio.Runner() as one, asyncio.Runner() as two:
            room, *first = one.run(start())
            other_room, *second = two.run(start())
            loop = one.get_loop()
            loop.call_soon(loop.stop)
            loop.call_soon(chat.push, room.connections, {"content": "first"})
            loop.run_forever()
            two.get_loop().call_soon(chat.push, other_room.connections, {"content": "second"})
            two.run(finish(*second, "second"))
            loop.call_soon(chat.push, room.connections, {"content": "third"})
            one.run(finish(*first, "first", "third"))


# The program


class ProgramCase(Case):
    """Runs `python chat.py` as a user does."""

    async def asyncSetUp(self):
        await super().asyncSetUp()
        self.processes = []

    async def runs(self, *options, program=HERE / "chat.py", shell="", python="", path=""):
        """Run chat.py, after some shell or Python code. Return its process."""
        command = [sys.executable, program, *options]
        if python:
            python += "\nimport runpy, sys; runpy.run_path(sys.argv.pop(1), run_name='__main__')"
            command[1:1] = ["-c", python]
        if shell:
            command = ["sh", "-c", f'{shell}; exec "$@"', "sh", *command]
        environment = os.environ | {"PYTHONPATH": path, "COLUMNS": "80", "NO_COLOR": "1"}
        environment.pop("PYTHONUNBUFFERED", None)  # It would hide that print does not flush.
        pipes = dict.fromkeys(["stdin", "stdout", "stderr"], asyncio.subprocess.PIPE)
        process = await asyncio.create_subprocess_exec(*command, env=environment, **pipes)
        self.processes.append(process)
        return process

    async def asyncTearDown(self):
        for process in self.processes:  # before clients leave, who might wait for its answers
            with contextlib.suppress(ProcessLookupError):
                process.kill()
            await process.communicate()

    async def serves(self, *options, **more):
        """Run chat.py and wait until it serves. Return its process and the address it prints."""
        process = await self.runs("--port", "0", *options, **more)
        async with asyncio.timeout(2 * PATIENCE):
            line = (await process.stdout.readline()).decode()
        sentence = r"Open (http://\S+:(\d+)) in two windows. Ctrl-C stops the chat.\n"
        self.assertRegex(line, f"^{sentence}$")
        address, port = re.match(sentence, line).groups()
        self.port = int(port)
        return process, address

    async def ends(self, process, status=0, says="^$"):
        """Assert that a process ends with this status and complaint. Return the complaint."""
        async with asyncio.timeout(3 * PATIENCE):
            out, complaint = [text.decode() for text in await process.communicate(b"")]
        self.assertRegex(complaint, says)
        self.assertEqual((process.returncode, out), (status, ""))
        return complaint


def outward_address(family, destination):
    """Return the address from which this machine would send to others."""
    with contextlib.suppress(OSError), socket.socket(family, socket.SOCK_DGRAM) as udp:
        udp.connect((destination, 9))
        return udp.getsockname()[0]
    return "localhost"


def has_ipv6():
    with contextlib.suppress(OSError), socket.create_server(("::1", 0), family=socket.AF_INET6):
        return True
    return False


WITHOUT_IPV6 = """
import errno, socket
bind, getaddrinfo = socket.socket.bind, socket.getaddrinfo
def refuse(self, address):
    if self.family == socket.AF_INET6:
        raise OSError(errno.EADDRNOTAVAIL, "Cannot assign requested address")
    bind(self, address)
def name_both(host, *args, **options):
    both = [(socket.AF_INET6, socket.SOCK_STREAM, 6, "", ("::1", 0, 0, 0))]
    return both * (host == "localhost") + getaddrinfo(host, *args, **options)
socket.socket.bind, socket.getaddrinfo = refuse, name_both
"""
OFFLINE = "import os, socket; socket.socket.connect = lambda *_: os.stat('/no/network')"
AS_ON_WINDOWS = "import asyncio, sys; sys.modules['resource'] = None\n"
AS_ON_WINDOWS += "asyncio.SelectorEventLoop.add_signal_handler = None"
WITH_A_DEFECT = "import json; dumps = json.dumps; json.dumps = lambda fields, **options: ("
WITH_A_DEFECT += "fields['defect'] if fields['type'] == 'presence' else dumps(fields, **options))"


class CommandLine(ProgramCase):
    async def test_it_prints_an_address_that_opens(self):
        """The printed address opens the page, from other machines too if it serves them."""
        outward = outward_address(socket.AF_INET, "192.0.2.1")
        outward6 = outward_address(socket.AF_INET6, "2001:db8::1")
        cases = {"": "127.0.0.1", "--host 0.0.0.0": outward}
        cases |= {"--host ::1": "[::1]", "--host ::": f"[{outward6}]"}  # RFC 3986, section 3.2.2
        for options, host in cases.items():
            with self.subTest(options):
                if "::" in options and not has_ipv6():
                    skip("this machine has no IPv6")
                _, address = await self.serves(*options.split())
                self.assertEqual(address, f"http://{host}:{self.port}")
                socket.create_connection((host.strip("[]"), self.port), PATIENCE).close()

    async def test_it_runs_on_systems_that_lack_something(self):
        """It starts and stops without a network, with IPv6 off as in containers, and on Windows."""
        cases = {WITHOUT_IPV6: ["127.0.0.1"], AS_ON_WINDOWS: ["127.0.0.1"]}
        cases[OFFLINE] = ["localhost", "--host", "0.0.0.0"]
        for python, (host, *options) in cases.items():
            with self.subTest(python):
                process, address = await self.serves(*options, python=python)
                self.assertEqual(address, f"http://{host}:{self.port}")
                anna = await self.joins()
                process.terminate()
                await anna.is_closed_with(1001)
                await self.ends(process)

    async def test_it_finds_its_page_through_a_symbolic_link(self):
        """If chat.py is a symbolic link, it serves the page beside the real file."""
        link = pathlib.Path(self.enterContext(tempfile.TemporaryDirectory()), "chat.py")
        try:
            link.symlink_to(HERE / "chat.py")
        except OSError:
            skip("this user cannot make symbolic links")
        await self.serves(program=link)
        self.assertEqual((await self.http("GET /"))[0], 200)

    async def test_it_says_why_it_cannot_serve(self):
        """If it cannot serve, it ends with status 1 and one line of advice."""
        taken = self.enterContext(socket.create_server(("127.0.0.1", 0))).getsockname()[1]
        alone, garbled = (self.enterContext(tempfile.TemporaryDirectory()) for _ in range(2))
        pathlib.Path(garbled, "index.html").write_bytes(b"\xff")
        runs = [(await self.runs("--port", f"{taken}"), f"port {taken}.* --port")]
        for folder in alone, garbled:
            shutil.copy(HERE / "chat.py", folder)
            program = pathlib.Path(folder, "chat.py")
            advice = f"{re.escape(str(program.resolve().parent))}.*Keep index.html beside"
            runs.append((await self.runs("--port", "0", program=program), advice))
        for process, advice in runs:
            with self.subTest(advice):
                await self.ends(process, 1, rf"^chat\.py: .*{advice}.*\n$")

    async def test_it_needs_a_new_websockets(self):
        """With an old websockets, or without any, it ends with one line that says what to do."""
        names = "ConnectionClosed = Request = Response = ServerConnection = State = object\n"
        package = {"__init__": "from .version import version as __version__\n"}
        current = package | {"__init__": package["__init__"] + names}
        cases = {"10.4": package, "13.1": package, "16.0": current}
        runs = {"none": await self.runs(python="import sys; sys.modules['websockets'] = None")}
        for version, files in cases.items():
            folder = self.enterContext(tempfile.TemporaryDirectory())
            pathlib.Path(folder, "websockets").mkdir()
            for name, text in (files | {"version": f"version = '{version}'"}).items():
                pathlib.Path(folder, "websockets", f"{name}.py").write_text(text)
            runs[version] = await self.runs(path=folder)
        for version, process in runs.items():
            with self.subTest(version):
                await self.ends(process, 1, '^.*websockets 17.*-m pip install "websockets>=17"\n$')

    async def test_it_explains_its_options(self):
        """--help names the options and the default port."""
        process = await self.runs("--help")
        async with asyncio.timeout(PATIENCE):
            out, _ = await process.communicate()
        self.assertRegex(out.decode(), r"--host HOST +0\.0\.0\.0 for the whole network\r?\n")
        self.assertRegex(out.decode(), r"--port PORT +default: 8080\r?\n")
        self.assertIn("--debug", out.decode())

    async def test_the_log_is_printable(self):
        """--debug logs each handshake and frame, without a byte that a terminal obeys."""
        process, _ = await self.serves("--debug")
        attack = "\x1b]0;owned\x07"
        anna = await self.joins(user_agent_header="owned-agent")
        await anna.says(attack + "\u202e\x9b\r\n2026 forged")
        await anna.frame("message")
        await anna.connection.close(4000, f"{attack}\n2026 forged")
        for data in [
            request(f"GET /{attack}"),
            request("GET /", X=attack),
            request("GET /", X="\x9b1mowned"),
            f"{attack} / HTTP/1.1\r\n\r\n".encode(),
            request("GET /ws", Origin=f"http://\x9bowned{attack}"),
            HANDSHAKE.replace(b"13", attack.encode()),
            HANDSHAKE + masked(attack.encode(), first=0x83),
        ]:
            line = await self.calls(data)
            await line.reads()
            line.vanish()
        process.terminate()
        log = await self.ends(process, says="GET /ws HTTP/1.1")
        lines = log.split("\n")[:-1]
        self.assertEqual([line for line in lines if not line.isprintable()], [])
        self.assertEqual([line for line in lines if not re.match(r"\d{4}-\d\d-|    ", line)], [])
        self.assertGreater(len([line for line in lines if "owned" in line]), 7)

    async def test_a_failed_presence_stops_the_server(self):
        """If presence fails, because of a defect, the server closes all connections and says so."""
        process, _ = await self.serves(python=WITH_A_DEFECT)
        anna = await self.joins()
        await anna.is_closed_with(1001)
        await self.ends(process, 1, "KeyError: 'defect'")

    def test_both_lists_of_requirements_agree(self):
        """requirements.txt and the head of chat.py (PEP 723) name the same packages."""
        head = (HERE / "chat.py").read_text(encoding="utf-8").partition("# ///\n")[0]
        metadata = tomllib.loads(head.removeprefix("# /// script\n").replace("# ", ""))
        required = (HERE / "requirements.txt").read_text(encoding="utf-8").split()
        self.assertEqual(metadata, {"dependencies": required, "requires-python": ">=3.11"})


class Stopping(ProgramCase):
    async def asyncSetUp(self):
        await super().asyncSetUp()
        if sys.platform == "win32":
            skip("Windows has no such signals and limits")

    async def test_signals_stop_it(self):
        """Ctrl-C and SIGTERM close every connection with 1001 and print nothing."""
        for number, shell in itertools.product(
            (signal.SIGINT, signal.SIGTERM), ("", "trap '' INT")
        ):
            with self.subTest(number, shell=shell):  # A shell's & ignores SIGINT.
                process, _ = await self.serves(shell=shell)
                anna = await self.joins()
                process.send_signal(number)
                await anna.is_closed_with(1001)
                await self.ends(process)

    async def test_a_second_signal_prints_nothing(self):
        """A second Ctrl-C is ignored, even if it comes when the program has all but ended."""
        at_exit = (
            "import atexit, sys; atexit.register(lambda: (print(flush=True), sys.stdin.read()))"
        )
        process, _ = await self.serves(python=at_exit)
        process.send_signal(signal.SIGINT)
        process.send_signal(signal.SIGINT)
        async with asyncio.timeout(PATIENCE):
            await process.stdout.readline()
        process.send_signal(signal.SIGINT)
        await self.ends(process)

    async def test_a_stop_loses_nothing_that_was_delivered(self):
        """A message that its sender got back reaches the others, though the server stops."""
        process, _ = await self.serves()
        anna, ben, words = await self.joins(), await self.joins(), [f"{n}" for n in range(20)]
        for content in words:
            await anna.says(content)
        await anna.hears(*words)
        process.terminate()
        await ben.hears(*words)
        await ben.is_closed_with(1001)

    async def test_it_stops_within_two_seconds(self):
        """It stops in time though clients answer nothing, read nothing, or flood with pings."""
        process, _ = await self.serves()
        anna = await self.joins()
        for _ in range(50):
            await self.shakes_hands()
        for data in b"", b"GET /", request("GET /"), HANDSHAKE[:-2]:
            await self.calls(data, SO_RCVBUF=1024)
        floods = [await self.shakes_hands() for _ in range(20)]
        pings = PING * 1_000_000
        flooding = asyncio.gather(*(line.sends(pings) for line in floods))
        await anna.says("hello")
        await anna.hears("hello")
        start = MONOTONIC()
        process.terminate()
        await self.ends(process)
        self.assertLess(MONOTONIC() - start, 2.5)
        await anna.is_closed_with(1001)
        await flooding

    async def test_descriptors_limit_the_room(self):
        """Before file descriptors run out, clients are turned away. Those inside stay."""
        process, _ = await self.serves(shell="ulimit -n 64")
        inside = [await self.joins() for _ in range(32)]
        lines = [await self.calls(HANDSHAKE) for _ in range(40)]
        await inside[0].says("hello")
        for client in inside:
            await client.hears("hello")
        for line in lines:
            await line.hears((1013).to_bytes(2))
            line.vanish()
        self.assertEqual((await self.http("GET /"))[0], 200)
        await inside[0].leaves()
        await self.joins()
        process.terminate()
        await self.ends(process)

    async def test_the_soft_limit_is_raised(self):
        """A soft limit of 64 descriptors, as some systems have, does not limit the room."""
        process, _ = await self.serves(shell="ulimit -Sn 64")
        for line in [await self.shakes_hands() for _ in range(80)]:
            line.vanish()
        process.terminate()
        await self.ends(process)


# The page with its wire, in Chromium

# JavaScript that returns the visible texts of the page
SIGHTS = r"""
window.sights = (() => {
    const all = selector => (
        [...document.querySelectorAll(selector)].filter(e => e.checkVisibility()));
    const words = e => (e?.checkVisibility() ? e.innerText : "").replace(/\s+/g, " ").trim();
    const one = selector => words(document.querySelector(selector));
    const join = (...parts) => parts.filter(Boolean).join(" ");
    const label = button => (button.ariaLabel || words(button)).replace(/ \(\d+ s\)$/, "");
    const leg = part => join(...[...part.children].map(e => (
        e.textContent.replace(/\s+/g, " ").trim())));
    const log = () => all("#messages [data-id]").map(e => (
        join(e.dataset.kind, e.dataset.state, e.querySelector(".text").innerText)));
    return {
        all, words, log, last: () => log().at(-1),
        bubbles: () => all("#messages [data-id]").map(words),
        names: () => all("#messages .by").map(words),
        lines: () => all("#messages [data-kind=system]").map(words),
        wire: () => all("#wire > li").map(row => join(`${row.dataset.kind}:`,
            ...[...row.querySelectorAll(".leg")].map(leg), words(row.querySelector(".note")))),
        when: () => words(all("#wire .when").at(-1)),
        opened: () => all("#wire pre").map(e => e.innerText).join("").replace(/ +\n/g, "\n"),
        counts: () => ["frames-up", "bytes-up", "frames-down", "bytes-down"].map(id => (
            Number(one(`#${id}`).replace(/\D/g, "")))),
        online: () => Number(one("#online")), name: () => one("#name"), alone: () => one("#alone"),
        status: () => one("#status"), countdown: () => one("#countdown"),
        guide: () => one("#steps"), counter: () => one("#counter"), title: () => document.title,
        buttons: () => all("button").map(label),
        draft: () => document.querySelector("#draft").value,
        focus: () => document.activeElement.id || document.activeElement.tagName,
        spoken: () => [...document.querySelectorAll("[aria-live=polite] p")].map(words),
        has_joined: () => one("#messages [data-kind=system]").includes(one("#name")),
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
})();
"""

# The page's clock. Time stands still until it passes, except pauses for drawing.
CLOCK = """
window.clock = (() => {
    const timers = new Map(), began = Date.now(), [later, cancel] = [setTimeout, clearTimeout];
    let now = 1_000, asleep = 0, ids = 1_000_000;  // now and asleep in ms
    const start = (action, ms = 0, every) => {
        if (ms < 100) return later(action, ms);
        timers.set(++ids, {action, due: now + ms, every});
        return ids;
    };
    window.setTimeout = (action, ms) => start(action, ms);
    window.setInterval = (action, ms) => start(action, ms, ms);
    window.clearTimeout = id => { if (!timers.delete(id)) cancel(id); };
    performance.now = () => now;
    Date.now = () => began + now + asleep;
    AbortSignal.timeout = ms => {
        const controller = new AbortController();
        start(() => controller.abort(), ms);
        return controller.signal;
    };
    const passes = async (ms, end = now + ms) => {
        const [first] = [...timers].sort(([, one], [, other]) => one.due - other.due);
        const [id, timer] = first?.[1].due <= end ? first : [];
        now = timer?.due ?? end;
        if (!timer) return;
        if (timer.every) timer.due += timer.every; else timers.delete(id);
        timer.action();
        await passes(0, end);
    };
    return {passes, sleeps: ms => { asleep += ms; }};
})();
"""


class Chromium:
    """A headless Chromium in a folder of its own."""

    FLAGS = (
        "--headless --remote-debugging-port=0 --disable-background-networking --disable-gpu "
        "--disable-component-update --disable-sync --no-first-run --disable-quic --no-sandbox "
        "--disable-dev-shm-usage --disable-back-forward-cache"  # The sandbox cannot serve root.
    )
    NAMES = (
        *(os.environ.get("CHROME", ""), "chromium", "chromium-browser", "google-chrome", "msedge"),
        "/Applications/Google Chrome.app/Contents/MacOS/Google Chrome",
        r"C:\Program Files\Google\Chrome\Application\chrome.exe",
        r"C:\Program Files (x86)\Microsoft\Edge\Application\msedge.exe",
    )

    def __init__(self):
        path = next(filter(None, map(shutil.which, self.NAMES)), None)
        if not path:
            skip("no Chromium was found: install Chromium or Chrome, or set CHROME to its path")
        self.folder = tempfile.TemporaryDirectory(ignore_cleanup_errors=True)
        more = (
            f"--user-data-dir={self.folder.name}",
            "--host-resolver-rules=MAP chat.example 127.0.0.1",
        )
        self.idle = []  # ids of tabs that tests have finished with
        log = pathlib.Path(self.folder.name, "log")
        with log.open("wb") as output:
            command = [path, *self.FLAGS.split(), *more]
            self.process = subprocess.Popen(command, stdout=output, stderr=output)
        deadline = MONOTONIC() + 5 * PATIENCE
        while not (found := re.search("DevTools listening on (.+)\n", log.read_text())):
            if self.process.poll() is not None or MONOTONIC() > deadline:
                self.process.kill()
                raise AssertionError(f"{path} does not start: {log.read_text()}")
            time.sleep(0.02)
        self.url = found[1]

    def quit(self):
        with connect(self.url, proxy=None) as devtools:  # If killed, it would leave files behind.
            devtools.send(json.dumps({"id": 0, "method": "Browser.close"}))
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(PATIENCE)
        self.process.kill()
        self.process.wait()
        self.folder.cleanup()


@functools.cache
def chromium():
    """Return the browser that all tests share."""
    browser = Chromium()
    unittest.addModuleCleanup(browser.quit)
    return browser


class Tab:
    """A browser tab. Its verbs are what people do with it and what they see.

    It speaks https://chromedevtools.github.io/devtools-protocol/. Later tests use the tab again.
    """

    def __init__(self, browser):
        self.browser, self.ids = browser, itertools.count()
        self.answers, self.events, self.is_hidden = {}, [], False

    # Six methods that other browsers override
    async def opens(self, url, before):
        """Open a page. Some JavaScript runs before its own."""
        self.url = url
        if not self.browser.idle:
            await self.attaches()
            window = {"url": "about:blank", "newWindow": True, "width": 1280, "height": 900}
            target = await self.call("Target.createTarget", **window)
            await self.detaches()
            self.browser.idle.append(target["targetId"])
        self.target = self.browser.idle.pop()
        await self.attaches(self.target)
        domains = "Page", "Runtime", "Log", "Network"
        await asyncio.gather(*(self.call(f"{domain}.enable") for domain in domains))
        await self.call("Emulation.setLocaleOverride", locale="en-US")
        await self.call("Page.addScriptToEvaluateOnNewDocument", source=before)
        await self.call("Page.navigate", url=url)

    async def closes(self):
        await self.call("Page.disable")  # It ends the script that runs before the page's own.
        await self.evaluate("try { localStorage.clear(), sessionStorage.clear() } catch {}")
        if self.is_hidden:
            await self.hides(False)
        await self.call("Page.navigate", url="about:blank")
        await self.detaches()
        self.browser.idle.append(self.target)

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
    async def attaches(self, target=None):
        """Connect to the DevTools of a tab, or of the browser."""
        url = self.browser.url
        if target:
            url = url.partition("/devtools/")[0] + f"/devtools/page/{target}"
        self.devtools = await websockets.connect(url, proxy=None, max_size=None)
        self.reading = asyncio.create_task(self.reads())

    async def detaches(self):
        await self.devtools.close()
        await self.reading

    async def reads(self):
        with contextlib.suppress(websockets.ConnectionClosed):
            async for payload in self.devtools:
                event = json.loads(payload)
                answer = self.answers.pop(event.get("id"), None)
                if not answer:
                    self.events.append(event)
                elif not answer.done():  # or a timeout has ended the wait
                    answer.set_result(event)

    async def call(self, method, **params):
        """Call a method of the protocol. Return its result."""
        id = next(self.ids)
        answer = self.answers[id] = asyncio.get_running_loop().create_future()
        await self.devtools.send(json.dumps({"id": id, "method": method, "params": params}))
        async with asyncio.timeout(PATIENCE):
            return (await answer).get("result", {"result": {}})  # none if the page goes

    def heard_of(self, method):
        """Return the parameters of the events of one kind so far."""
        return [event["params"] for event in self.events if event["method"] == method]

    def frames(self, way):
        """Return the payloads of the frames that were "Sent" or "Received" so far."""
        events = self.heard_of(f"Network.webSocketFrame{way}")
        return [event["response"]["payloadData"] for event in events]

    def sent(self):
        return [json.loads(payload) for payload in self.frames("Sent")]

    def problems(self):
        """Return the errors in the console, except those about a server that is not there."""
        errors = [event["entry"] for event in self.heard_of("Log.entryAdded")]
        errors = [e for e in errors if not re.search("ERR_|WebSocket connection", e["text"])]
        return errors + self.heard_of("Runtime.exceptionThrown")

    async def hides(self, yes=True):
        """Put the window away, or bring it back."""
        window = (await self.call("Browser.getWindowForTarget"))["windowId"]
        bounds = {"windowState": "minimized" if yes else "normal"}
        await self.call("Browser.setWindowBounds", windowId=window, bounds=bounds)
        self.is_hidden = yes
        await self.waits_for(f"document.hidden === {json.dumps(yes)}")

    async def resizes(self, width, height):
        metrics = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 500}
        await self.call("Emulation.setDeviceMetricsOverride", **metrics)

    async def scrolls(self, y):
        """Turn the mouse wheel over the conversation, up if y is negative."""
        mouse = {"type": "mouseWheel", "x": 200, "y": 300, "deltaX": 0, "deltaY": y}
        await self.call("Input.dispatchMouseEvent", **mouse)

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
        """Return what people see of this."""
        return await self.evaluate(f"[{','.join(f'sights.{name}()' for name in names)}]")

    async def waits_for(self, condition):
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(PATIENCE):
                while not await self.evaluate(f"Boolean({condition})"):
                    await asyncio.sleep(0.01)
                return
        raise AssertionError(f"not true: {condition}")

    async def sees(self, wire=None, **expected):
        """Wait until people see this: values, or texts that contain the expected ones. Of the wire
        patterns of its last rows are expected, without presence unless one of them expects it.
        """
        names = [*expected] + ["wire"] * (wire is not None)
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(PATIENCE):
                while True:
                    seen = dict(zip(names, await self.looks(*names), strict=True))
                    if fits(seen, expected) and fits_wire(seen.get("wire"), wire):
                        return
                    await asyncio.sleep(0.01)
        raise AssertionError(f"seen: {seen}\nexpected: {expected} {wire}")

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


def fits(seen, expected):
    """Return whether all that is expected is seen, and in the case of a text, is part of it."""
    return all(
        value in f"{seen[name]}" if value and isinstance(value, str) else value == seen[name]
        for name, value in expected.items()
    )


def fits_wire(rows, patterns):
    if not patterns:
        return rows == patterns
    if not any("presence" in pattern for pattern in patterns):
        rows = [row for row in rows if not row.startswith("presence")]
    rows = rows[-len(patterns) :]
    return len(rows) == len(patterns) and all(map(re.search, patterns, rows))


class PageCase(ServerCase):
    """A room of its own for each test, and tabs in it."""

    def setUp(self):
        self.browser = chromium()

    async def asyncSetUp(self):
        self.transports, connection_made = [], chat.Connection.connection_made

        def record(connection, transport):
            self.transports.append(transport)
            connection_made(connection, transport)

        self.enterContext(mock.patch.object(chat.Connection, "connection_made", record))
        self.set(PRESENCE_DELAY=0)
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

    def cuts_off(self, name=""):
        """Break the connections of that name, or all, without a close frame."""
        for connection in self.room.connections:
            if name in ("", f"Port{connection.remote_address[1]}"):
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
        self.assertEqual(tab.problems(), [])

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
        """Publish many messages within one iteration of the event loop."""
        await self.publishes(*(f"{number}" for number in range(count)))

    def pushes(self, *frames):
        for frame in frames:
            chat.push(self.room.connections, frame)


HEARTBEAT = {"type": "presence", "username": "server", "content": "", "online": 1}
ERROR = {"type": "error", "username": "server", "content": "Not now."}
ONLINE = "window.dispatchEvent(new Event('online'))"
WAKING = [  # what happens to a page when its computer or its tab wakes up
    ONLINE,
    "window.dispatchEvent(new Event('pageshow'))",
    "document.dispatchEvent(new Event('visibilitychange'))",
]


class Talking(PageCase):
    async def test_two_tabs_talk(self):
        """Two tabs show what each says, markup as text, after one request over HTTP each."""
        first, second = await self.opens(), await self.opens()
        markup = "<img src=x onerror=alert()>&amp;"
        await first.says("hello")
        await second.sees(log=["other hello"], online=2)
        await second.types(markup)
        await second.clicks("Send")
        await first.sees(log=["own delivered hello", f"other {markup}"])
        await second.sees(log=["other hello", f"own delivered {markup}"], draft="", focus="draft")
        urls = [event["request"]["url"] for event in first.heard_of("Network.requestWillBeSent")]
        self.assertEqual([url for url in urls if url[:5] != "data:"], [first.url])
        self.assertEqual(len(first.heard_of("Network.webSocketCreated")), 1)

    async def test_a_message_waits_for_its_echo(self):
        """A message stands below all others until its echo comes, then where everyone has it."""
        released, tab = self.holds(), await self.opens()
        await tab.says("one", "two")
        await until(lambda: len(tab.sent()) == 2)
        await self.shows("news")
        await tab.sees(log=["other news", "own waiting one", "own waiting two"])
        await self.shows("two", nonce=tab.sent()[1]["nonce"])
        await tab.sees(log=["other news", "own delivered two", "own waiting one"])
        bubbles = "\n".join((await tab.looks("bubbles"))[0])
        self.assertRegex(bubbles, "two ✓ delivered\n.*one ◷ waiting$")
        released.set()
        await tab.sees(log=["other news", "own delivered two", "own delivered one"])

    async def test_20_messages_are_in_flight(self):
        """At most 20 messages are sent ahead of their echoes. The rest follows in order."""
        released, tab, said = self.holds(), await self.opens(), [f"{n}" for n in range(22)]
        await tab.says(*said)
        await tab.sees(log=[f"own waiting {content}" for content in said])
        self.assertEqual([frame["content"] for frame in tab.sent()], said[:20])
        released.set()
        await tab.sees(log=[f"own delivered {content}" for content in said])

    async def test_white_space_is_stripped(self):
        """White space around a message goes, as on the server, and a blank message stays."""
        tab = await self.opens()
        await tab.says(" \n\u3000", "\n\x1c\x85 hello\n\n  there \x1f\x85\u3000")
        await tab.sees(log=["own delivered hello\n\n  there"])

    async def test_a_refused_message_can_be_edited(self):
        """A refused message shows why, also after a reload. Edit takes it back into the draft."""
        tab, log = await self.opens(), ["own refused one", "own waiting two"]
        with mock.patch.object(self.room, "publish", mock.AsyncMock()):  # It publishes nothing.
            await tab.says("one", "two")
            await until(lambda: len(tab.sent()) == 2)
            self.pushes(ERROR | tab.sent()[0] | {"content": "Not now."})
            await tab.sees(log=log, spoken="Not now.")
            await tab.types("draft")
            await tab.reloads()
            await tab.sees(log=log, draft="draft", bubbles="one ✗ not delivered: Not now. Edit")
            await tab.clicks("Edit")
            await tab.sees(log=log[1:], draft="one\ndraft", focus="draft")
        await tab.reloads()
        await tab.sees(log=["own delivered two"], draft="one\ndraft")
        await tab.presses("Enter")
        await tab.sees(log=["own delivered two", "own delivered one\ndraft"])

    async def test_a_message_is_shown_once(self):
        """Messages are the same by nonce and content, whatever their id and what a translation
        has made of their text."""
        released, tab = self.holds(), await self.opens()
        translate = "sights.all('.text').map(e => { e.textContent += '!'; })"
        await tab.says("mine")
        await tab.sees(log=["own waiting mine"])
        nonce = tab.sent()[0]["nonce"]
        await self.shows("not mine", nonce=nonce)
        await tab.sees(log=["other not mine", "own waiting mine"])
        await tab.evaluate(translate)
        released.set()
        await tab.sees(log=["other not mine!", "own delivered mine"])
        await tab.evaluate(translate)
        self.room.history.clear()  # as a crash does
        for content in "mine", "not mine", "nor this":
            await self.shows(content, nonce=nonce)
        await tab.sees(log=["other not mine!!", "own delivered mine!", "other nor this"])

    async def test_a_duplicated_tab(self):
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
        for kind in "typing", "presence", ["message"], "message":
            self.pushes({"type": kind, "content": 5, "online": "x"})
        self.pushes(5, None, "text", ["a"], {}, {"type": "message", "id": "a", "time": "no time"})
        await self.shows("1")
        self.pushes(ERROR)
        await tab.says("hello")
        await tab.sees(last="own delivered hello", log="other 1", lines="Not now.")
        tab.events.clear()  # The console may have complained.

    async def test_nothing_counts_before_the_welcome(self):
        """If a message comes before the welcome, all of the history is still shown."""
        await self.floods(2)
        join = self.room.join

        def hasty_join(connection, after):
            chat.push([connection], self.room.history[1] | {"id": "2", "content": "2"})
            return join(connection, after)

        with mock.patch.object(self.room, "join", hasty_join):
            tab = await self.opens()
        await tab.sees(log=["other 0", "other 1"])


class Connecting(PageCase):
    async def test_the_status_says_why(self):
        """The status says how the connection is, and why it ended. A button offers what helps."""
        tab, again = await self.opens(), "Reconnect now"

        async def closes(code, reason=""):
            (connection,) = self.room.connections
            await connection.close(code, reason)

        async def breaks():
            self.cuts_off()

        for act, status, button in [
            ("Hang up", "Disconnected. Your messages will wait.", "Call again"),
            ("Call again", "Connected", "Hang up"),
            (functools.partial(closes, 1011), "Closed with code 1011", again),
            (again, "Connected", "Hang up"),
            (functools.partial(closes, 4000, "Lunch."), "Lunch.", again),
            (again, "Connected", "Hang up"),
            (breaks, "No connection", again),
            (again, "The room is full. Try again in a minute.", again),
            (again, "Connected", "Hang up"),
            (self.goes_down, "The server has stopped", again),
            (again, "No connection", again),
        ]:
            with self.subTest(status):
                self.room.capacity = 0 if "full" in status else 9
                await (tab.clicks(act) if isinstance(act, str) else act())
                await tab.sees(status=status, buttons=button)
                self.assertEqual(again in (await tab.looks("buttons"))[0], button == again)

    async def test_a_refused_websocket(self):
        """If the server answers over HTTP but refuses the WebSocket, status and wire say so."""
        why = "WebSocket refused. The server's terminal says why."
        with self.assertLogs(), mock.patch.object(chat, "same_origin", return_value=False):
            tab = await self.opens(status=why)
            await tab.clicks("Reconnect now")
            await tab.sees(["^request", "^refused: The server: refused"] * 2, status=why)
            await tab.clicks("refused")
            await tab.sees(opened="did not answer with 101")
        await tab.clicks("Reconnect now")
        await tab.sees(status="Connected")

    async def test_only_http_asks_during_an_outage(self):
        """A tab opens no WebSocket that would fail, because Firefox delays the next one then."""
        tab = await self.opens("Math.random = () => 0;")
        await self.goes_down()
        await tab.sees(status="The server has stopped")
        for count in range(4):
            await tab.passes(2**count / 2)
            await tab.sees(["^close: The server: no answer to HEAD /"] * (count + 1))
        self.assertEqual(len(tab.heard_of("Network.webSocketCreated")), 1)
        await self.serves(self.port)
        await tab.passes(8)
        await tab.sees(["no answer", *OPENING, "^welcome"], status="Connected")

    async def delays(self, start):
        """Serve again. Answer requests that start so only when the returned event is set."""
        released, answer = asyncio.Event(), chat.answer

        async def answer_late(page, connection, request):
            if f"{request.method} {request.path}".startswith(start):
                await released.wait()
            return answer(page, connection, request)

        self.enterContext(mock.patch.object(chat, "answer", answer_late))
        await self.serves()
        self.addCleanup(released.set)
        return released

    async def test_a_slow_way(self):
        """An opening that takes 12 s succeeds. One that takes 45 s is given up."""
        released = await self.delays("GET /ws")
        tab = await self.opens(status="Connecting")
        await tab.says("early")
        await tab.passes(44)
        await tab.sees(status="Connecting", log=["own waiting early"])
        await tab.passes(1)
        await tab.sees(["^request", "^close: The server: no answer"], status="No connection")
        await tab.clicks("Reconnect now")
        await tab.sees(["^close", "^request"])
        await tab.passes(12)
        released.set()
        await tab.sees(status="Connected", log=["own delivered early"])

    async def test_a_server_that_does_not_answer(self):
        """A request over HTTP that nobody answers ends after 20 s."""
        await self.delays("HEAD")
        tab = await self.opens()
        self.cuts_off()
        await tab.sees(status="No connection")
        await tab.clicks("Reconnect now")
        await tab.passes(19)
        self.assertNotIn("Reconnect now", (await tab.looks("buttons"))[0])
        await tab.passes(1)
        await tab.sees(["no answer to HEAD /"], buttons="Reconnect now")

    async def test_waking_up(self):
        """A tab that wakes up reconnects at once, also if it heard nothing for 25 s, but not
        after hanging up."""
        tab, opening = await self.opens(), ["^close", *OPENING, "^welcome"]
        for wake in WAKING:
            with self.subTest(wake):
                self.cuts_off()
                await tab.sees(status="No connection")
                await tab.evaluate(f"{wake}, {wake}")
                await tab.sees(opening, status="Connected")
                await tab.evaluate(f"clock.sleeps(24000), {wake}")
                await tab.sees(opening, status="Connected")
                await tab.evaluate(f"clock.sleeps(2000), {wake}")
                await tab.sees(["no answer", *opening[1:]], status="Connected")
                await tab.clicks("Hang up")
                await tab.evaluate(wake)
                await self.has(0)
                await tab.sees(["^welcome", "close 1000"], status="Disconnected")
                await tab.passes(1)
                await tab.clicks("Call again")
                await tab.sees(opening, status="Connected")
                await tab.passes(1)

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
                with self.subTest(chance=chance, delay=delay):
                    await tab.sees(status="No connection", buttons="Reconnect now")
                    await tab.passes(0.25)
                    await tab.sees(countdown=f"({math.ceil(delay - 0.25)} s)")
                    await tab.passes(delay - 0.3)
                    await tab.sees(countdown="(1 s)")
                    await tab.passes(0.05)
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

    async def beats(self, tab):
        """Push a heartbeat, and wait until the tab has it."""
        ((_, _, frames, _),) = await tab.looks("counts")
        self.pushes(HEARTBEAT)
        await tab.waits_for(f"sights.counts()[2] > {frames}")

    async def test_a_dead_connection_is_noticed(self):
        """A connection counts as dead after 45 s without a frame, or 5 s if an echo is due."""
        self.holds()
        tab = await self.opens()
        await tab.passes(44)
        await self.beats(tab)
        await tab.passes(44)
        await tab.sees(status="Connected")
        await tab.passes(1)
        await tab.sees(["no answer code 1006: no close frame came"], status="No connection")
        await tab.clicks("Reconnect now")
        await tab.sees(status="Connected")
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
        await tab.says("0", "1", "2", "3")
        await until(lambda: len(tab.sent()) == 4)
        for number in range(4):
            for _ in range(3):
                await tab.passes(4)
                await self.beats(tab)
            await tab.sees(status="Connected")
            if number < 3:
                await self.shows(f"{number}", nonce=tab.sent()[number]["nonce"])
                await tab.sees(log=f"own delivered {number}")
        await tab.passes(3)
        await tab.sees(last="own waiting 3", status="No connection")

    async def test_nothing_is_lost_or_doubled(self):
        """However a connection ends, the tab shows what it missed and sends what waits, once."""
        friend, said = await self.joins(), ["one", "two", "missed", "mine"]
        log = ["own delivered one", "other two", "other missed", "own delivered mine"]
        ways = {"Hang up": "Call again", "Cut the line": "Mend the line", "": "Reconnect now"}
        for leave, come_back in ways.items():
            with self.subTest(leave):
                self.room.history.clear()
                tab = await self.opens()
                await tab.says("one")
                await friend.hears("one")
                await friend.says("two")
                await tab.sees(log=log[:2])
                last = self.room.history[-1]["id"]
                await (tab.clicks(leave) if leave else asyncio.sleep(0, self.cuts_off(tab.name)))
                await friend.says("missed")
                await friend.hears("two", "missed")
                await tab.says("mine")
                await tab.sees(log=[*log[:2], "own waiting mine"])
                await tab.clicks(come_back)
                await tab.sees(log=log, status="Connected")
                await friend.hears("mine")
                self.assertEqual([message["content"] for message in self.room.history], said)
                url = tab.heard_of("Network.webSocketCreated")[-1]["url"]
                self.assertEqual(url, f"ws://127.0.0.1:{self.port}/ws?after={last}")

    async def test_a_divider_shows_a_gap(self):
        """A line says where messages may be missing, also in a tab that joined an empty room and
        then missed more than 50."""
        cases = [([], 3, 1, 0), ([], 60, 1, 1), (["before"], 0, 3, 1)]
        for said, missed, times, dividers in cases:
            with self.subTest(said=said, missed=missed):
                self.room.history.clear()
                tab = await self.opens()
                await tab.says(*said)
                await tab.sees(log=[f"own delivered {content}" for content in said])
                for _ in range(times):
                    self.room.history.clear()
                    await tab.clicks("Hang up")
                    await self.has(0)
                    await self.floods(missed)
                    await tab.clicks("Call again")
                    await tab.sees(status="Connected")
                await tab.says("end")
                await tab.sees(last="own delivered end")
                lines, rows = await tab.looks("lines", "wire")
                self.assertEqual(f"{lines}".count("may be missing"), dividers)
                self.assertEqual("missed, or more" in f"{rows}", bool(dividers))
                await tab.clicks("Hang up")

    async def test_a_restart_of_the_server(self):
        """Over a restart, tabs keep what they show, say what waits once, and mark the gap."""
        first, second = await self.opens(), await self.opens()
        await first.says("before")
        await second.sees(log=["other before"])
        await self.goes_down()
        await first.sees(status="The server has stopped")
        await first.says("meanwhile")
        await first.sees(log=["own delivered before", "own waiting meanwhile"])
        self.room.history.clear()
        await self.serves(self.port)
        for tab in first, second:
            await tab.passes(1)
            await tab.sees(status="Connected", lines="may be missing")
        await first.sees(log=["own delivered before", "own delivered meanwhile"])
        await second.sees(log=["other before", "other meanwhile"])


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
        await tab.sees(["^resend: This tab: again.*“mine”"], log=log, draft="draft")
        released.set()
        await tab.sees(log=["own delivered old", "own delivered mine"])
        await tab.reloads()
        await tab.sees(log=["own delivered old", "own delivered mine"], draft="draft")
        _, first, again = tab.sent()
        self.assertEqual(again, first)

    async def test_a_huge_paste_does_not_stop_saving(self):
        """If more is pasted than storage holds, what was said and the paste's start are saved."""
        self.holds()
        tab = await self.opens("sessionStorage.more ??= 'x'.repeat(5_200_000);")
        await tab.says("mine")
        paste = "draft.value = 'x'.repeat(100_000), draft.dispatchEvent(new Event('input')), 0"
        await tab.evaluate(paste)
        await tab.reloads()
        await tab.sees(log=["own waiting mine"], draft="x" * 2_001)

    async def test_rubbish_in_storage(self):
        """Whatever has been stored, the page works, and sends nothing that would not come back."""
        tab = await self.opens()
        spoil = """(rubbish => {
            for (const storage of [localStorage, sessionStorage])
                for (const key of Object.keys(storage)) storage[key] = rubbish(storage[key]);
        })"""
        entries = """text => {
            const [entry] = text.startsWith("[{") ? JSON.parse(text) : [];
            const twice = {content: "twice", nonce: "twice"};
            const changes = ["", "x".repeat(65), "a b", 1, null, ["a"]].map(nonce => ({nonce}));
            changes.push(twice, twice,
                ...[" padded ", 5, null, ["a"]].map(content => ({content, nonce: "n" + content})));
            return entry ? JSON.stringify([null, 5, [[]], {}, entry,
                ...changes.map(change => ({...entry, id: "", ...change}))]) : text;
        }"""
        kinds = [f"() => {json.dumps(text)}" for text in ("x", "5", "null", "[null, 5, {}]", "")]
        for rubbish in *kinds, entries:
            with self.subTest(rubbish):
                await tab.says("hello")
                await tab.sees(last="own delivered", draft="")
                await tab.evaluate(f"{spoil}({rubbish})")
                await tab.reloads()
        await tab.says("end")
        await tab.sees(last="own delivered end")
        contents = [frame["content"] for frame in tab.sent()]
        self.assertEqual([contents.count(text) for text in ("hello", "twice")], [2, 1])

    async def test_no_storage_and_no_secure_context(self):
        """The page works if storage is denied or full, and over plain HTTP from another host."""
        deny = """for (const kind of ["localStorage", "sessionStorage"])
            Object.defineProperty(window, kind, {get() { %s }});"""
        denied = deny % "throw new Error('denied');"
        full = deny % "return new Proxy({}, {set() { throw new Error('full'); }});"
        for host, before in ("127.0.0.1", denied), ("127.0.0.1", full), ("chat.example", ""):
            with self.subTest(host, before=before):
                self.room.history.clear()
                tab = await self.opens(before, host)
                self.assertEqual(await tab.evaluate("isSecureContext"), host == "127.0.0.1")
                await tab.says("hello")
                await tab.clicks("Wire")
                await tab.sees([], last="own delivered hello")


class Reading(PageCase):
    async def test_names_and_times(self):
        """Messages of one person within a minute stand together, below one name and one time."""
        tab = await self.opens()
        await tab.call("Emulation.setTimezoneOverride", timezoneId="Asia/Tokyo")
        for name, at in ("A", "02:03"), ("A", "03:02"), ("A", "04:02"), ("B", "04:02"):
            await self.shows(at, username=name, time=f"2026-03-04T01:{at}.000+00:00")
        await tab.sees(names=["A 10:02 AM", "A 10:04 AM", "B 10:04 AM"])

    async def test_colours(self):
        """A name has one colour everywhere. Neighbours' colours differ, and none is red."""
        first, second = await self.opens(), await self.opens()
        neighbours = [f"Port{50_000 + number}" for number in (0, 1, 2, 10)]
        for name in neighbours:
            await self.shows(name, username=name)
        await first.says("mine")
        await second.sees(last="other mine")
        hue = "Number(getComputedStyle(e).color.match(/[0-9.]+(?=\\))/)[0])"
        hues = f"sights.all('.name, #name, #lanes :first-child').map(e => [e.innerText, {hue}])"
        one, other = dict(await first.evaluate(hues)), dict(await second.evaluate(hues))
        self.assertEqual(one["this tab"], one[first.name])
        for name in first.name, *neighbours:
            self.assertEqual(one[name], other[name])
            self.assertTrue(60 < one[name] < 340, one)
        hues = sorted(one[name] for name in neighbours)
        self.assertGreater(min(b - a for a, b in itertools.pairwise(hues)), 20)

    async def test_presence_is_one_line(self):
        """However often people come and go, one line tells the latest, below the messages."""
        tab = await self.opens()
        await self.shows("hello")
        for number in range(5):
            self.pushes(HEARTBEAT | {"content": f"Port{number} left."}, HEARTBEAT)
        await tab.sees(lines=[f"{tab.name} joined.", "Port4 left."])

    async def test_a_reader_keeps_the_place(self):
        """New messages do not move a reader who has scrolled up. A button counts them."""
        tab = await self.opens()
        await self.floods(50)
        await tab.sees(reads_the_end=True, last="other 49")
        top = "document.querySelector('#messages li:nth-child(40)').getBoundingClientRect().top"
        for come_back in (
            lambda: tab.clicks("3 new ↓"),
            lambda: tab.says("hello"),
            lambda: tab.scrolls(9_000),
        ):
            await tab.scrolls(-400)
            await tab.sees(reads_the_end=False)
            place = await tab.evaluate(top)
            await self.floods(3)
            await tab.sees(buttons="3 new ↓", title="(3) Chat")
            self.assertAlmostEqual(await tab.evaluate(top), place, delta=1)
            await come_back()
            await tab.sees(reads_the_end=True, focus="draft")
            await tab.waits_for(
                "document.title === 'Chat' && !sights.buttons().includes('3 new ↓')"
            )
        for size in (800, 500), (390, 844), (1280, 900):
            await tab.resizes(*size)
            await tab.sees(reads_the_end=True)

    async def test_a_hidden_tab_counts(self):
        """The title of a hidden tab counts what others say, and screen readers hear none of it."""
        released, tab = self.holds(), await self.opens()
        await tab.says("mine")
        await tab.hides()
        released.set()
        await self.shows("theirs")
        await tab.sees(title="(1) Chat", log="own delivered mine")
        await self.floods(1_500)
        await tab.sees(title="(1501) Chat")
        await tab.sees(spoken=[f"{tab.name} joined."])
        await tab.hides(False)
        await tab.waits_for("document.title === 'Chat'")
        await tab.sees(log=[f"other {number}" for number in range(1_000, 1_500)])

    async def test_a_storm(self):
        """Of 2,000 messages at once the newest 500 are shown, while typing and speaking go on.
        Screen readers hear its end."""
        tab = await self.opens()
        await tab.evaluate("""window.added = 0, new MutationObserver(records => {
            added += records.flatMap(record => [...record.addedNodes]).length;
        }).observe(document.querySelector("[aria-live=polite]"), {childList: true})""")
        await self.floods(2_000)
        await tab.types("hello")
        await tab.sees(log=[f"other {number}" for number in range(1_500, 2_000)])
        self.assertLess(await tab.evaluate("added"), 50)
        await tab.sees(spoken="Port1: 1999")
        await tab.presses("Enter")
        await tab.sees(last="own delivered hello", log="other 1999", reads_the_end=True)

    async def test_company(self):
        """A tab that is alone says so. Its button opens a window that inherits nothing."""
        tab = await self.opens()
        await tab.sees(alone="You are the only one here", online=1)
        await tab.types("draft")
        await tab.clicks("Open a second window")
        await tab.sees(alone="", online=2)
        targets = (await tab.call("Target.getTargets"))["targetInfos"]
        (target,) = [t for t in targets if t["url"] == tab.url and not t["attached"]]
        second = Tab(self.browser)
        await second.attaches(target["targetId"])
        await second.waits_for("document.querySelector('#status')?.innerText === 'Connected'")
        self.assertEqual(await second.evaluate("[draft.value, window.opener]"), ["", None])
        await second.detaches()
        await tab.call("Target.closeTarget", targetId=target["targetId"])
        await tab.sees(alone="--host 0.0.0.0", online=1)
        await tab.presses("Enter")
        await tab.sees(log=["own delivered draft"], alone="")

    async def test_screen_readers_hear_everything_once(self):
        """Screen readers are told of the parts of the page, of each message once, and in each row
        of who sends what."""
        tab = await self.opens()
        await tab.says("mine")
        await tab.sees(["^send", "^echo"], log=["own delivered mine"])
        await self.shows("theirs")
        await tab.sees(spoken=[f"{tab.name} joined.", "You: mine", "Port1: theirs"])
        await tab.types("x" * 1_801)
        tree = (await tab.call("Accessibility.getFullAXTree"))["nodes"]
        nodes = [(node["role"]["value"], node["name"]["value"]) for node in tree if "name" in node]
        self.assertLessEqual({"log", "status", "main", "textbox"}, {role for role, _ in nodes})
        (draft,) = [node for node in tree if node["role"]["value"] == "textbox"]
        self.assertEqual(draft["description"]["value"], "1,801 of 2,000 characters")
        rows = [name for role, name in nodes if role == "DisclosureTriangle"]
        self.assertEqual(len(rows), len((await tab.looks("wire"))[0]))
        for row in rows:
            self.assertRegex(row, "(This tab|The server): .")
        live = await tab.evaluate("sights.all('[role=log], [aria-live]').map(e => e.ariaLive)")
        self.assertEqual(live, ["off", "polite"])

    async def test_the_focus_is_never_lost(self):
        """If a button or a message that has the focus goes, the draft gets it."""
        tab = await self.opens()
        await self.shows("\n".join("x" * 100))
        await tab.sees(log="x")
        focus = "sights.all('button, .text').find(e => sights.words(e).includes('%s')).focus()"
        self.cuts_off()
        await tab.sees(status="No connection")
        await tab.evaluate(focus % "Reconnect now")
        await tab.sees(focus="now")
        await tab.evaluate(ONLINE)
        await tab.sees(status="Connected", focus="draft")
        await tab.evaluate(focus % "x x x")
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
        while "log" not in reached:  # until a round is complete
            await tab.presses("Tab")
            name, outline = await tab.evaluate(focus)
            reached.add(name)
            self.assertTrue(outline != "none" or name == "BODY", name)
        await tab.presses("Tab")
        names = {"send", "slow", "pause", "unplug", "cut", "wire-toggle", "diagram", "away"}
        self.assertLessEqual(names, reached)
        self.assertEqual((await tab.evaluate(focus))[0], "text")

    async def test_the_layout(self):
        """From 360 pixels up, nothing sticks out and buttons are large enough. Nothing moves if the
        system asks for that."""
        tab = await self.opens()
        for text in "x" * 300, "\n".join("x" * 100), "שלום!", "a" + "\u0301" * 500:
            await tab.says(text)
        await tab.sees(last="own delivered a")
        await tab.types("x" * 300)
        await tab.clicks("Wire")
        await tab.clicks("Wire")  # It stays open on a phone.
        fit = "sights.all('html, header, #stage, #log, #diagram, .text').filter(e => "
        fit += "e.scrollWidth > e.clientWidth || (e.tagName === 'HTML' && "
        fit += "e.scrollHeight > e.clientHeight)).map(e => e.outerHTML)"
        small = "sights.all('button, #draft').filter(e => "
        small += "Math.min(e.offsetWidth, e.offsetHeight) < 44).map(e => e.id)"
        for width, height in (360, 640), (390, 844), (1440, 900):
            with self.subTest(width):
                await tab.resizes(width, height)
                self.assertEqual([await tab.evaluate(fit), await tab.evaluate(small)], [[], []])
                await tab.sees(reads_the_end=True)
        reduced = [{"name": "prefers-reduced-motion", "value": "reduce"}]
        await tab.call("Emulation.setEmulatedMedia", features=reduced)
        self.assertEqual(await tab.evaluate("document.getAnimations().length"), 0)
        direction = "sights.all('.text').map(e => getComputedStyle(e).direction)"
        self.assertEqual(await tab.evaluate(direction), ["ltr", "ltr", "rtl", "ltr"])


class Writing(PageCase):
    async def test_shift_and_enter_break_the_line(self):
        """Shift and Enter break the line, five lines are in view, and Enter sends them all."""
        tab = await self.opens()
        for line in range(5):
            await tab.types(f"{line}")
            self.assertTrue(await tab.evaluate("draft.scrollHeight < draft.clientHeight + 5"))
            await tab.presses("Shift+Enter")
        await tab.says("end")
        await tab.sees(log=["own delivered 0\n1\n2\n3\n4\nend"], draft="")

    async def test_enter_can_end_a_composition(self):
        """The Enter that ends an input method's composition does not send, nor does Safari's."""
        tab, end = await self.opens(), {"selectionStart": 1, "selectionEnd": 1}
        await tab.call("Input.imeSetComposition", text="に", **end)
        await tab.presses("Enter")
        await tab.types("日本")
        await tab.presses("Enter", windowsVirtualKeyCode=229)
        await tab.sees(draft="日本", log=[])
        await tab.presses("Enter")
        await tab.sees(log=["own delivered 日本"])

    async def test_a_draft_has_at_most_2000_characters(self):
        """A draft of 2,000 characters can be sent, emoji included. A longer one stays."""
        tab = await self.opens()
        for count, counter in (1_800, ""), (2_001, "2,001 of 2,000 characters"):
            await tab.evaluate("draft.select()")
            await tab.types("😀" * count)
            await tab.sees(counter=counter)
        await tab.presses("Enter")
        await tab.clicks("Send")
        await tab.evaluate("draft.select()")
        await tab.types("😀" * 2_000 + " \n")
        await tab.sees(counter="2,000 of 2,000 characters", log=[])
        await tab.presses("Enter")
        await tab.sees(log=["own delivered " + "😀" * 2_000], counter="")


OPENING = ["^request: This tab: GET /ws", "^response: The server: 101 Switching Protocols$"]


def dissect(payload, masked):
    """Return the parts of a text frame's header, each with a note, and the frame's size."""
    size = len(payload.encode())
    length = (size, 0) if size < 126 else (126, 2) if size < 65_536 else (127, 8)
    note = f"length in {length[1]} more bytes" if length[1] else f"{size} bytes"
    note = f"{'' if masked else 'not '}masked, {note}"
    parts = [("81", "whole text"), (f"{length[0] + 128 * masked:02x}", note)]
    if length[1]:
        parts.append((size.to_bytes(length[1]).hex(" "), f"{size} bytes"))
    if masked:
        parts.append(("xx xx xx xx", "the mask, random: no page sees it"))
    return parts, 2 + length[1] + 4 * masked + size


class Wire(PageCase):
    async def test_walkthrough(self):
        """Each step of the README's walkthrough has its rows, and the guide leads to the next."""
        first = await self.opens()
        welcome, pushed = (
            "^welcome: The server: welcome ",
            "^presence: The server: presence, pushed ",
        )
        rows = [*OPENING, welcome + "no history yet$", pushed + "1 online$"]
        await first.sees(rows, guide="Open a second window")
        second = await self.opens()
        others = " The server: to 1 other tab "
        await first.sees([pushed + f"2 online{others}the same frame$"])

        await first.sees(guide="Say something. One frame goes up")
        await first.says("hello")
        echo = f"^echo: The server: message, echoed your own, after 0 ms{others}the same frame$"
        await first.sees([r"^send: This tab: message, \d+ bytes “hello”$", echo])
        heard = "^message: The server: message, pushed not requested Another tab: {} spoke “{}”"
        heard += f"{others}the sender included"
        await second.sees([heard.format(first.name, "hello") + " That is push.$"])

        for tab in first, second:
            await tab.sees(guide="Say something in the other window")
        await second.says("hi", "there")
        row = heard.format(second.name, "hi") + " That is push.$"
        await first.sees([row, heard.format(second.name, "there") + "$"])

        await first.sees(guide="Cut the line")
        await first.clicks("Cut the line")
        (counts,) = await first.looks("counts")
        await first.says("mine")
        await second.says("theirs")
        lost = [
            "^lost: This tab: message, lost “mine”$",
            "^lost: The server: message, lost “theirs”$",
        ]
        await first.sees(lost, status="Connected", counts=counts)
        await first.passes(5)
        died = "^close: The server: no answer code 1006: no close frame came$"
        await first.sees([*lost, died], status="No connection")
        await first.clicks("Mend the line")
        resume = rf"GET /ws\?after={self.room.history[-2]['id']} Upgrade: websocket$"
        again = [r"^resend: This tab: again, \d+ bytes “mine”$", echo]
        await first.sees([died, resume, OPENING[1], welcome + "1 missed$", *again])
        log = ["hello", "hi", "there", "theirs", "mine"]
        for tab, own in (first, ("hello", "mine")), (second, ("hi", "there", "theirs")):
            kinds = ["own delivered" if content in own else "other" for content in log]
            await tab.sees(log=[" ".join(pair) for pair in zip(kinds, log, strict=True)])
        await first.clicks("Hang up")
        await first.sees(["^close: This tab: close 1000"])
        await first.passes(1)
        await first.clicks("Call again")
        await first.sees([*OPENING, welcome + "0 missed$"])

        for tab in first, second:
            await tab.sees(guide="Stop the server")
        await self.goes_down()
        await first.sees(["^close: The server: close 1001 going away$"])
        await first.passes(1)
        await first.sees(["^close: The server: no answer to HEAD /$"], guide="")
        self.room.history.clear()
        await self.serves(self.port)
        await first.passes(2)
        await first.sees([*OPENING, welcome + "0 missed, or more$"])
        await second.sees(guide="")

    async def test_the_guide_can_be_put_away(self):
        """Whoever puts the guide away does so in all windows, also after a reload."""
        first, second = await self.opens(), await self.opens()
        await first.clicks("Put the walkthrough away")
        for tab in first, second:
            await tab.sees(guide="")
        await second.reloads()
        await second.sees(guide="", focus="draft")

    async def test_bytes_are_counted_as_on_the_wire(self):
        """Frames and bytes count with headers and masks, in the counters and in each row."""
        for number in range(50):
            await self.shows(f"{number}" + "x" * 1_400)
        tab = await self.opens()
        await tab.says("żółć 👋", "x" * 100)
        await tab.sees(last="own delivered x")
        frame = {"type": "typing", "content": ""}
        for size in 125, 126, 65_535, 65_536:
            self.pushes(frame | {"content": "x" * (size - len(json.dumps(frame)))})
        self.pushes(HEARTBEAT | {"content": "end"})
        await tab.sees(lines="end")
        sent = [dissect(payload, True)[1] for payload in tab.frames("Sent")]
        got = [dissect(payload, False)[1] for payload in tab.frames("Received")]
        await tab.sees(counts=[len(sent), sum(sent), len(got), sum(got)])
        rows = [row for row in (await tab.looks("wire"))[0] if row.startswith("send")]
        for size, row in zip(sent, rows, strict=True):
            self.assertIn(f"send: This tab: message, {size} bytes", row)

    async def test_a_row_opens_to_its_frame(self):
        """A row opens to its frame: the header in hexadecimal, the text, then field by field."""
        tab = await self.opens()
        for content in "hi", "x" * 200:
            await tab.says(content)
            await tab.sees(last=f"own delivered {content}")
        sent = tab.frames("Sent")
        rows = {"“hi”": sent[0], "“xx": sent[1], "your own": tab.frames("Received")[-1]}
        for row, payload in rows.items():
            with self.subTest(row):
                parts, size = dissect(payload, payload in sent)
                lines = [" ".join(code for code, _ in parts) + f" {size} bytes on the wire"]
                lines += [payload, *(f"{code} {note}" for code, note in parts)]
                await tab.clicks(row)
                await tab.sees(opened="\n".join([*lines, ""]))
                (opened,) = await tab.looks("opened")
                for key, value in json.loads(payload).items():
                    self.assertIn(f'\n"{key}": {json.dumps(value, ensure_ascii=False)}', opened)
                await tab.clicks(row)
                await tab.sees(opened="")

    async def test_the_handshake_opens(self):
        """The rows of the handshake open to its headers and say how these are known."""
        tab = await self.opens()
        for row, names in ("GET /ws", "-Key -Version: 13"), ("101", "Sec-WebSocket-Accept"):
            await tab.clicks(row)
            for name in "Upgrade: websocket", "Connection: Upgrade", *names.split(" -"), "RFC 6455":
                await tab.sees(opened=name)
            await tab.clicks(row)
            await tab.sees(opened="")

    async def test_an_opened_row_stays_in_view(self):
        """The last row opens into view, and then new rows do not move it."""
        tab = await self.opens()
        await tab.resizes(1280, 500)
        await tab.says("hello")
        await tab.sees(["^echo"])
        await tab.clicks("your own")
        await tab.sees(opened="hello")
        await tab.passes(1)
        place = "['#diagram', '#wire pre'].map(s => "
        place += "document.querySelector(s).getBoundingClientRect().bottom)"
        outer, inner = await tab.evaluate(place)
        self.assertLess(inner, outer + 1)
        await self.floods(5)
        await tab.sees(["^message"] * 5)
        self.assertAlmostEqual((await tab.evaluate(place))[1], inner, delta=1)

    async def test_text_on_the_wire_is_isolated(self):
        """A character that reverses text does not reverse the notes beside it."""
        tab = await self.opens()
        await self.shows("\u202eabc", username="\u202ePort1")
        await tab.clicks("Another tab")
        await tab.sees(opened="\u202eabc")
        runs = """sights.all("#wire pre i").filter(note => sights.words(note)).every(note => {
            const range = document.createRange(), xs = [1, 2].map(start => {
                range.setStart(note.firstChild, start);
                range.setEnd(note.firstChild, start + 1);
                return range.getBoundingClientRect().x;
            });
            return xs[0] < xs[1];
        })"""
        self.assertTrue(await tab.evaluate(runs))

    async def test_slow_and_pause(self):
        """Slow shows a row every 0.7 s, and Pause none. Neither delays the conversation."""
        tab = await self.opens()
        (before,) = await tab.looks("wire")
        await tab.clicks("Slow")
        await self.floods(3)
        await tab.sees(log=["other 0", "other 1", "other 2"])
        for number in range(4):
            (rows,) = await tab.looks("wire")
            self.assertEqual(len(rows), len(before) + min(number, 3))
            if number == 1:
                await tab.clicks("Pause")
                await tab.passes(5)
                self.assertEqual(await tab.looks("wire"), [rows])
                await tab.clicks("Pause")
            await tab.passes(0.7)
        await tab.sees(["“0”", "“1”", "“2”"])

    async def test_a_storm_folds(self):
        """Ten or more alike within a second share a row. Others, and a talk, do not."""
        tab = await self.opens()
        await tab.passes(1)
        await self.floods(30)
        await tab.sees(["welcome", *["“[0-8]”"] * 9, "“9” and 20 more like it"])
        self.pushes(HEARTBEAT)
        await self.shows("end")
        await tab.sees(["and 20 more like it$", "^presence", "“end”"])
        await tab.passes(1)
        for number in range(12):
            await tab.passes(0.2)
            await self.shows(f"{number}")
            await tab.sees([f"“{number}”"])

    async def test_the_newest_rows_stay(self):
        """The newest 300 rows stay, as does a row that is open."""
        tab = await self.opens()
        await tab.clicks("GET /ws")
        await tab.evaluate("performance.now = (now => () => now += 1000)(9e6), 0")
        await self.floods(400)
        await tab.sees(["“399”"])
        ((first, second, *rest),) = await tab.looks("wire")
        self.assertEqual((first[:7], len(rest)), ("request", 298))
        self.assertIn("“101”", second)

    async def test_rows_tell_the_time(self):
        """Each row tells the time since the one before. An unknown frame has a row as well."""
        tab = await self.opens()
        for seconds, shown in (2.3, "+2.3 s"), (0.999, "+999 ms"), (0, "+0 ms"):
            await tab.passes(seconds)
            self.pushes({"type": "typing", "who": shown})
            await tab.sees(["^unknown: The server: typing unknown, ignored$"], when=shown)
            await tab.clicks("typing")
            await tab.sees(opened=f'"who": "{shown}"')

    async def test_arrows_join_the_lanes(self):
        """At every width arrows lead from speaker to hearer, below the names of the lanes."""
        tab, friend = await self.opens(), await self.joins()
        await tab.clicks("Wire")
        await tab.clicks("Wire")
        await tab.says("mine")
        await friend.says("theirs")
        await tab.sees(["^send", "^echo", "^message"])
        arrows = """(lanes => ["send", "echo", "message"].map(kind => (
            [...document.querySelectorAll(`[data-kind=${kind}] .leg`)].map(leg => {
                const {left, right} = leg.getBoundingClientRect(), lane = x => (
                    lanes.findIndex(other => Math.abs(other - x) < 3));
                const head = getComputedStyle(leg, "::after"), ends = [left, right].map(lane);
                return head.rotate !== "none" ? ends.reverse() : ends;
            })
        )))(sights.all("#lanes > *").map(e => e.getBoundingClientRect()).map(({x, width}) =>
            x + width / 2))"""
        for width in 360, 700, 1280, 1920:
            await tab.resizes(width, 800)
            expected = [[[0, 1]], [[1, 0], [1, 2]], [[1, 0], [2, 1], [1, 2]]]
            self.assertEqual(await tab.evaluate(arrows), expected)

    async def test_the_panel(self):
        """The wire is open beside the chat, closed on a phone, and stays as its user leaves it."""
        tab = await self.opens()
        for width, click, wire in (
            (1280, None, ["^welcome"]),
            (390, None, []),
            (390, "Wire", ["^welcome"]),
            (1280, "Wire", []),
        ):
            await tab.resizes(width, 844)
            await (tab.clicks(click) if click else asyncio.sleep(0))
            await tab.reloads()
            await tab.sees(wire)
