"""Tests of the chat: its promises, over real connections.

They come in layers: the room (a server in this process), then the program (`python chat.py`).
"""

import asyncio
import base64
import collections
import contextlib
import hashlib
import itertools
import json
import os
import pathlib
import re
import shutil
import signal
import socket
import struct
import sys
import tempfile
import time
import tomllib
import types
import unittest
from datetime import UTC, datetime, timedelta
from unittest import mock

import websockets

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
        """Of 1,000 long messages at once, each of 100 clients has at most 1 MiB in memory."""
        for _ in range(100):
            await self.shakes_hands()
        ends, longest = [*self.room.connections], "x" * 2_000
        for end in ends:  # The operating system takes next to nothing.
            link = end.transport.get_extra_info("socket")
            link.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
        with self.assertLogs(level="WARNING") as logs:
            await self.publishes(*[longest] * 100)
            for end in ends:  # asyncio knows the most, so that it can cut the client off.
                self.assertGreater(end.transport.get_write_buffer_size(), 30 * 2_000)
            await self.publishes(*[longest] * 900)
            self.assertTrue(all(end.transport.is_closing() for end in ends))
            await self.has(0)
        self.assertEqual(len(logs.output), 100)

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
        self.addAsyncCleanup(self.kills, process)
        return process

    async def kills(self, process):
        if process.returncode is None:
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
        cases = {"": "127.0.0.1", "--host 127.0.0.1": "127.0.0.1", "--host 0.0.0.0": outward}
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
        cases = {f"--port {taken}": f"port {taken}.* --port", "--port -1": "--port from 0 to 65535"}
        cases |= {"--port 65536": "--port from 0 to 65535"}
        for host in "no.such.invalid", "a..b", "192.0.2.1":
            cases[f"--port 0 --host {host}"] = f"{re.escape(host)}.* --host"
        runs = [(await self.runs(*options.split()), advice) for options, advice in cases.items()]
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
        cases = {"10.4": package, "13.1": package, "14.0": current, "16.0": current}
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
