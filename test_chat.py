"""Tests of the chat: what its users and the README are promised, over real connections."""

import asyncio
import base64
import collections
import contextlib
import functools
import gc
import itertools
import json
import logging
import os
import pathlib
import random
import re
import shutil
import signal
import socket
import ssl
import statistics
import subprocess
import sys
import tempfile
import textwrap
import time
import tomllib
import tracemalloc
import unittest
from datetime import UTC, datetime, timedelta
from typing import ClassVar
from unittest import mock

import websockets

import chat

HERE = pathlib.Path(__file__).parent
PATIENCE = 10  # seconds until something awaited counts as missing


def skip(reason):
    """Skip the calling test, or fail it where CHAT_NO_SKIPS is set."""
    if os.environ.get("CHAT_NO_SKIPS"):
        raise AssertionError(f"skips are not allowed here: {reason}")
    raise unittest.SkipTest(reason)


async def until(condition):
    """Wait until condition() is true."""
    async with asyncio.timeout(PATIENCE):
        while not condition():
            await asyncio.sleep(0.01)


def message(content, id, time=None, nonce=None):
    """Return a message as the server makes them."""
    time = time or datetime.now(UTC).isoformat(timespec="milliseconds")
    fields = {"type": "message", "username": "Port1", "content": content}
    return fields | {"id": id, "nonce": nonce or id, "time": time}


class Cuttable(websockets.ClientConnection):
    """A connection that can end as when a cable is pulled, with no close frame."""

    def connection_made(self, transport):
        super().connection_made(transport)
        self.cut = transport.abort


class Client:
    """A client of the chat: `async with Client(port) as client`."""

    def __init__(self, port, after=None, **options):
        self.url = f"ws://127.0.0.1:{port}/ws" + (f"?after={after}" if after else "")
        self.options = options

    async def __aenter__(self):
        self.connection = await websockets.connect(
            self.url,
            proxy=None,
            max_queue=None,  # or close() would wait behind frames that nobody reads
            create_connection=Cuttable,
            **self.options,
        )
        self.port = self.connection.local_address[1]
        self.welcome = await self.frame()
        self.name = self.welcome["username"]
        return self

    async def __aexit__(self, *_):
        await self.connection.close()

    async def frame(self, *types):
        """Return the next frame, or the next of these types."""
        async with asyncio.timeout(PATIENCE):
            while True:
                frame = json.loads(await self.connection.recv())
                if not types or frame["type"] in types:
                    return frame

    async def contents(self, count):
        """Return the contents of the next messages."""
        return [(await self.frame("message"))["content"] for _ in range(count)]

    async def say(self, content, **more):
        await self.connection.send(json.dumps({"content": content, **more}))


class ServerCase(unittest.IsolatedAsyncioTestCase):
    """A server of its own for each test, which must log no warning and leave no task."""

    async def asyncSetUp(self):
        self.complaints = []
        complain = logging.Handler(logging.WARNING)
        complain.emit = lambda record: self.complaints.append(complain.format(record))
        logging.getLogger().addHandler(complain)
        self.addCleanup(logging.getLogger().removeHandler, complain)
        asyncio.get_running_loop().slow_callback_duration = PATIENCE  # slow is not wrong
        self.room = chat.Room()
        self.server = await chat.start(self.room, "127.0.0.1", 0)
        self.port = self.server.sockets[0].getsockname()[1]

    async def asyncTearDown(self):
        self.server.close()
        async with asyncio.timeout(PATIENCE):
            await self.server.wait_closed()
        self.assertEqual(self.room.connections, set())
        self.assertEqual(self.room.names, set())
        await until(lambda: asyncio.all_tasks() == {asyncio.current_task()})
        self.assertEqual(self.complaints, [])

    def client(self, **options):
        return Client(self.port, **options)

    def fill(self, count, start=0):
        """Deliver many messages."""
        for number in range(start, start + count):
            self.room.deliver(message(f"{number}", f"{number}"))

    async def raw(self, data):
        """Send bytes to the server; return what it answers until it closes or falls silent."""
        reader, writer = await asyncio.open_connection("127.0.0.1", self.port)
        writer.write(data)
        answer = b""
        with contextlib.suppress(ConnectionError):  # a reset is an end as well
            async with asyncio.timeout(PATIENCE):
                answer = await reader.read()
        writer.close()
        with contextlib.suppress(ConnectionError):
            await writer.wait_closed()
        return answer.decode()

    async def http(self, line, **headers):
        """Send a request; return its status, headers and body."""
        headers = {"Host": f"127.0.0.1:{self.port}"} | headers
        lines = [f"{name.replace('_', '-')}: {value}" for name, value in headers.items()]
        answer = await self.raw("\r\n".join([f"{line} HTTP/1.1", *lines, "", ""]).encode())
        head, _, body = answer.partition("\r\n\r\n")
        status, *fields = head.split("\r\n")
        return int(status.split()[1]), [tuple(field.split(": ", 1)) for field in fields], body


UPGRADE = {
    "Connection": "Upgrade",
    "Upgrade": "websocket",
    "Sec_WebSocket_Version": "13",
    "Sec_WebSocket_Key": "dGhlIHNhbXBsZSBub25jZQ==",
}


def upgrade_request(port):
    """Return the bytes of an opening handshake."""
    fields = {"Host": f"127.0.0.1:{port}"} | UPGRADE
    lines = [f"{name.replace('_', '-')}: {value}" for name, value in fields.items()]
    return "\r\n".join(["GET /ws HTTP/1.1", *lines, "", ""]).encode()


class Protocol(ServerCase):
    async def test_welcome(self):
        """The first frame tells a newcomer its name, who is there and what was said."""
        async with self.client() as first, self.client() as second:
            self.assertEqual(first.welcome["type"], "welcome")
            self.assertEqual(first.welcome["username"], f"Port{first.port}")
            self.assertEqual(first.welcome["history"], [])
            self.assertEqual(first.welcome["gap"], False)
            self.assertEqual([first.welcome["online"], second.welcome["online"]], [1, 2])

    async def test_everyone_gets_a_message(self):
        """A message goes to everyone, the sender included, with id, nonce and UTC time in ms."""
        async with self.client() as first, self.client() as second:
            await first.say("hello", nonce="a")
            got = await first.frame("message")
            self.assertEqual(got, await second.frame("message"))
            self.assertRegex(got["time"], r"^\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}\+00:00$")
            time = datetime.fromisoformat(got.pop("time"))
            self.assertLess(abs(datetime.now(UTC) - time), timedelta(seconds=PATIENCE))
            self.assertGreaterEqual(len(got.pop("id")), 16)  # 96 bits, so never given twice
            expected = {"type": "message", "username": first.name, "content": "hello", "nonce": "a"}
            self.assertEqual(got, expected)

    async def test_simplest_client(self):
        """A client that reads and writes nothing but username and content is a full member."""
        async with self.client() as other:
            async with websockets.connect(f"ws://127.0.0.1:{self.port}/ws", proxy=None) as simple:
                await simple.send('{"content": "hi"}')
                said = []
                while not said or said[-1] != f"Port{simple.local_address[1]}: hi":
                    frame = json.loads(await simple.recv())
                    said.append("{username}: {content}".format(**frame))
                self.assertRegex(said[0], "^Port[0-9]+: Welcome")
            self.assertEqual(await other.contents(1), ["hi"])

    async def test_ids(self):
        """Each message gets an id of its own, which is its nonce too where it came with none."""
        async with self.client() as client:
            frames = []
            for nonce in {}, {}, {"nonce": "a"}, {"nonce": "b"}:
                await client.say("one", **nonce)
                frames.append(await client.frame("message"))
            self.assertEqual(len({frame["id"] for frame in frames}), 4)
            for frame in frames[:2]:
                self.assertEqual(frame["nonce"], frame["id"])

    async def test_username_is_the_servers_to_say(self):
        """Keys other than content and nonce are ignored, above all username and id."""
        async with self.client() as client:
            await client.say("I am root", username="root", type="presence", online=7, id="a")
            frame = await client.frame("message")
            self.assertNotEqual(frame["id"], "a")
            self.assertEqual(frame["username"], client.name)
            self.assertNotIn("online", frame)

    async def test_white_space_is_stripped(self):
        """White space at both ends of a message is stripped, inside it stays."""
        async with self.client() as client:
            await client.say("\n  a\n\n b \t")
            self.assertEqual(await client.contents(1), ["a\n\n b"])

    async def test_utf8_goes_out_as_such(self):
        """Text that is not ASCII leaves as UTF-8, not as escapes of twice its size."""
        async with self.client() as client:
            await client.say("żółć 👋")
            payload = ""
            while '"message"' not in payload:
                payload = await client.connection.recv()
            self.assertIn("żółć 👋", payload)

    async def test_longest_message(self):
        """2,000 characters pass even where each is two escaped surrogates."""
        async with self.client() as client:
            await client.connection.send('{"content": "' + r"\ud83d\ude00" * 2000 + '"}')
            self.assertEqual(await client.contents(1), ["😀" * 2000])

    async def test_longest_nonce(self):
        """A nonce of 64 characters passes."""
        async with self.client() as client:
            await client.say("hello", nonce="é" * 64)
            self.assertEqual((await client.frame("message"))["nonce"], "é" * 64)

    async def test_shared_port(self):
        """Two hosts' clients that share a port get different names."""
        other = await chat.start(self.room, "127.0.0.1", 0)
        second_port = other.sockets[0].getsockname()[1]
        sockets = [socket.socket(), socket.socket()]
        for end, port in zip(sockets, (self.port, second_port), strict=True):
            end.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            end.bind(sockets[0].getsockname() if end is sockets[1] else ("127.0.0.1", 0))
            end.connect(("127.0.0.1", port))
        first, second = self.client(sock=sockets[0]), Client(second_port, sock=sockets[1])
        async with first, second:
            self.assertEqual(second.name, f"{first.name}-2")
        other.close()
        await other.wait_closed()

    async def test_one_order(self):
        """Everyone sees all messages in the same order, however many speak at once."""
        async with contextlib.AsyncExitStack() as stack:
            clients = [await stack.enter_async_context(self.client()) for _ in range(5)]
            said = [client.say(f"{number}") for number in range(10) for client in clients]
            await asyncio.gather(*said)
            orders = [[await c.frame("message") for _ in said] for c in clients]
            for order in orders:
                self.assertEqual(order, orders[0])

    async def test_join_is_atomic(self):
        """Whoever joins while others talk has no gap and no overlap after the history."""
        total = 40
        async with self.client() as speaker:

            async def newcomer():
                async with self.client() as client:
                    seen = [message["content"] for message in client.welcome["history"]]
                    return seen + await client.contents(total - len(seen))

            joining = []
            for number in range(total):
                await speaker.say(f"{number}")
                joining.append(asyncio.create_task(newcomer()))
                await speaker.contents(1)
            for seen in await asyncio.gather(*joining):
                self.assertEqual(seen, [f"{number}" for number in range(total)])

    async def test_same_turn(self):
        """What is said in the very turn of a join is in the history or comes live, never both,
        and never before the welcome.
        """
        join = self.room.join

        def join_amid_talk(*arguments):
            self.fill(1, start=0)
            name = join(*arguments)
            self.fill(1, start=1)
            return name

        with mock.patch.object(self.room, "join", join_amid_talk):
            async with self.client() as client:
                self.assertEqual(client.welcome["type"], "welcome")
                self.assertEqual([m["content"] for m in client.welcome["history"]], ["0"])
                self.assertEqual(await client.contents(1), ["1"])

    async def test_history(self):
        """Newcomers are shown the last 50 messages, the oldest first, as they were pushed."""
        async with self.client() as witness:
            self.fill(52)
            frames = [await witness.frame("message") for _ in range(52)]
            async with self.client() as newcomer:
                self.assertEqual(newcomer.welcome["history"], frames[2:])
                self.assertFalse(newcomer.welcome["gap"])

    async def test_resume(self):
        """A connection with ?after=ID is shown what came after that message, and no gap."""
        async with self.client() as speaker:
            ids = {}
            for content in "abc":
                await speaker.say(content)
                ids[content] = (await speaker.frame("message"))["id"]
            for content, missed in {"a": ["b", "c"], "c": []}.items():
                async with self.client(after=ids[content]) as client:
                    history = [message["content"] for message in client.welcome["history"]]
                    self.assertEqual(history, missed)
                    self.assertFalse(client.welcome["gap"])

    async def test_resume_after_rubbish(self):
        """Where ID is not remembered, all that is remembered comes, with gap true."""
        rubbish = ["never", "%00", "%ff%fe", "a&after=b", "%5B" * 99, "x" * 4000, "💥", "..//"]
        async with self.client() as speaker:
            await speaker.say("hello")
            await speaker.contents(1)
            for after in rubbish:
                with self.subTest(after=after[:9]):
                    async with self.client(after=after) as client:
                        self.assertEqual(len(client.welcome["history"]), 1)
                        self.assertTrue(client.welcome["gap"])

    async def test_remembered_nonce(self):
        """What has the nonce and the content of a remembered message is not pushed again."""
        async with self.client() as client, self.client() as other:
            await client.say("once", nonce="a")
            await client.contents(1)
            for resending in client, other:
                await resending.say("once", nonce="a")
                await resending.say("then")
                self.assertEqual(await client.contents(1), ["then"])

    async def test_same_nonce(self):
        """Two clients that choose the same nonce for other content lose nothing."""
        async with self.client() as one, self.client() as two:
            await one.say("first", nonce="1")
            await two.say("second", nonce="1")
            await one.say("second", nonce="2")
            frames = [await one.frame("message") for _ in range(3)]
            self.assertEqual([frame["content"] for frame in frames], ["first", "second", "second"])
            self.assertEqual(len({frame["id"] for frame in frames}), 3)

    async def test_forgotten_message_said_again(self):
        """A forgotten message that is said again is a new one, and whoever resumes after the old
        one is told of the gap.
        """
        async with self.client() as client:
            await client.say("again", nonce="a")
            old = (await client.frame("message"))["id"]
            self.fill(50)
            await client.contents(50)
            await client.say("again", nonce="a")
            new = (await client.frame("message"))["id"]
            for after, missed, gap in (old, 50, True), (new, 0, False):
                async with self.client(after=after) as back:
                    self.assertEqual(len(back.welcome["history"]), missed)
                    self.assertEqual(back.welcome["gap"], gap)

    async def test_old_names_are_not_for_others(self):
        """Neither as nonce nor as id can anybody speak, hide or move a message of another."""
        async with self.client() as client, self.client() as thief:
            await client.say("mine", nonce="a")
            mine = await client.frame("message")
            await thief.say("not mine", nonce="a", id=mine["id"])
            await thief.say("not mine", nonce=mine["id"])
            for _ in range(2):
                frame = await client.frame("message")
                self.assertEqual(frame["username"], thief.name)
                self.assertNotEqual(frame["id"], mine["id"])
            async with self.client() as newcomer:
                self.assertEqual(newcomer.welcome["history"][0], mine)

    async def test_presence(self):
        """Everyone is told how many are online, and who came and went, in a sentence."""
        async with self.client() as first:
            frame = await first.frame("presence")
            self.assertEqual(frame["content"], f"{first.name} joined.")
            async with self.client() as second:
                frame = await first.frame("presence")
                self.assertEqual((frame["content"], frame["online"]), (f"{second.name} joined.", 2))
                self.assertTrue(frame["username"])
            frame = await first.frame("presence")
            self.assertEqual((frame["content"], frame["online"]), (f"{second.name} left.", 1))

    async def test_presence_of_many(self):
        """However many come and go, a tab gets a presence frame at most every 250 ms."""
        async with self.client() as watcher:
            await watcher.frame("presence")
            started = time.monotonic()
            for _ in range(100):
                async with self.client():
                    pass
            async with self.client() as last:
                frames = [await watcher.frame("presence")]
                while last.name not in frames[-1]["content"]:
                    frames.append(await watcher.frame("presence"))
                self.assertLessEqual(len(frames), 1 + (time.monotonic() - started) / 0.25)

    async def test_presence_in_short(self):
        """Where more than three come or go, the sentence counts them."""
        async with self.client() as watcher, contextlib.AsyncExitStack() as stack:
            await watcher.frame("presence")
            clients = [self.client() for _ in range(4)]
            await asyncio.gather(*(stack.enter_async_context(client) for client in clients))
            frame = await watcher.frame("presence")
            self.assertEqual((frame["content"], frame["online"]), ("4 people joined.", 5))

    async def test_heartbeat(self):
        """A presence frame with empty content comes when nothing else was announced for long."""
        self.assertEqual(chat.HEARTBEAT, 20)
        with mock.patch.object(chat, "HEARTBEAT", 0.05):
            async with self.client() as client:
                await client.frame("presence")
                for _ in range(3):
                    frame = await client.frame("presence")
                    self.assertEqual((frame["content"], frame["online"]), ("", 1))
                    self.assertEqual(frame["username"], "server")

    async def test_heartbeat_beside_restless_people(self):
        """Whoever comes and goes all the time does not put the next presence frame off."""
        async with self.client() as client:
            await client.frame("presence")
            self.room.presence.tell("Port1", "joined")
            due = self.room.presence.timer.when()
            for news in ["left", "joined"] * 3:
                await asyncio.sleep(0)
                self.room.presence.tell("Port1", news)
                self.assertEqual(self.room.presence.timer.when(), due)
            self.assertEqual((await client.frame("presence"))["content"], "Port1 joined.")

    async def test_empty_room_schedules_nothing(self):
        """When the last one has left, no presence frame is due any more."""
        async with self.client() as last:
            self.assertIsNotNone(self.room.presence.timer)
            await last.frame("presence")
        await until(lambda: not self.room.connections)
        self.assertIsNone(self.room.presence.timer)
        async with self.client() as next:
            self.assertEqual((await next.frame("presence"))["content"], f"{next.name} joined.")

    async def test_publish_that_refuses(self):
        """Where publish raises Refused, the speaker alone gets an error that says why."""
        refusal = chat.Refused("The broker is away. Try again.", nonce="a")
        async with self.client() as client:
            with mock.patch.object(self.room, "publish", side_effect=refusal):
                await client.say("hello", nonce="a")
                error = await client.frame("error", "message")
            self.assertEqual((error["content"], error["nonce"]), (str(refusal), "a"))
            await client.say("hello", nonce="a")
            self.assertEqual(await client.contents(1), ["hello"])


BAD_FRAMES = {
    "binary": b'{"content": "hello"}',
    "empty": "",
    "no JSON": "hello",
    "cut off": '{"content": "hel',
    "null": "null",
    "a number": "5",
    "a string": '"\\ud800"',
    "a list": '[{"content": "hello"}]',
    "nested too deep": "[" * 10_000,
    "objects nested too deep": '{"a":' * 5_000,
    "a number too long": '{"content": ' + "9" * 5_000 + "}",
    "no content": "{}",
    "content null": '{"content": null}',
    "content a number": '{"content": 5, "nonce": "mine"}',
    "content a list": '{"content": ["hello"], "nonce": "mine"}',
    "content blank": '{"content": " \\n\\t\\u3000", "nonce": "mine"}',
    "content empty": '{"content": "", "nonce": "mine"}',
    "content too long": json.dumps({"content": "a" * 2001, "nonce": "mine"}),
    "content unpaired": '{"content": "\\ud800", "nonce": "mine"}',
    "content unpaired low": '{"content": "a\\udfff", "nonce": "mine"}',
    "nonce too long": json.dumps({"content": "hello", "nonce": "a" * 65}),
    "nonce empty": '{"content": "hello", "nonce": ""}',
    "nonce a number": '{"content": "hello", "nonce": 5}',
    "nonce null": '{"content": "hello", "nonce": null}',
    "nonce a list": '{"content": "hello", "nonce": ["a"]}',
    "nonce unpaired": '{"content": "hello", "nonce": "\\ud800"}',
}


class BadInput(ServerCase):
    async def test_bad_frames(self):
        """Each kind of bad frame gets its sender alone an error, and the connection stays."""
        async with self.client() as friend, self.client() as client:
            for number, (kind, payload) in enumerate(BAD_FRAMES.items()):
                with self.subTest(kind):
                    await client.connection.send(payload)
                    error = await client.frame("error", "message")
                    self.assertEqual(error["type"], "error")
                    self.assertRegex(error["content"], "^Send ")
                    mine = isinstance(payload, str) and '"mine"' in payload
                    self.assertEqual(error.get("nonce"), "mine" if mine else None)
                    await friend.say(f"{number}")
                    frame = await friend.frame("message", "error")
                    self.assertEqual(frame["content"], f"{number}")
                    self.assertEqual(await client.contents(1), [f"{number}"])

    async def test_frame_too_long(self):
        """A frame over 32 KiB closes the connection with 1009."""
        async with self.client() as friend, self.client() as client:
            await client.connection.send("x" * (32 * 1024))
            await client.frame("error")
            await client.connection.send("x" * (33 * 1024))
            with self.assertRaises(websockets.ConnectionClosed) as closed:
                await client.frame("error")
            self.assertEqual(closed.exception.rcvd.code, 1009)
            await friend.say("still here")
            self.assertEqual(await friend.contents(1), ["still here"])

    async def test_garbage(self):
        """Bytes that are no HTTP request end with their connection; nobody else notices."""
        tls_hello = bytes.fromhex("16030100050100000100")
        garbage = [b"\r\n\r\n", b"hello\r\n\r\n", b"GET /ws\r\n\r\n", b"\x00" * 9000]
        garbage += [
            tls_hello + b"\n",
            b"GET / HTTP/1.1\r\nno colon\r\n\r\n",
            b"GET /" + b"a" * 9000,
        ]
        async with self.client() as friend:
            for data in garbage:
                with self.subTest(data[:9]):
                    answer = await self.raw(data)
                    self.assertRegex(answer, "^(HTTP/1.1 4[0-9][0-9] .*)?")
                    await friend.say("hello")
                    self.assertEqual(await friend.contents(1), ["hello"])

    async def test_cut_off(self):
        """A request or a frame that is cut off half-way leaves no trace."""
        whole = upgrade_request(self.port)
        starts = [b"", b"GET", whole[:40], whole, whole + b"\x81", whole + b"\x81\x85abcdhe"]
        async with self.client() as friend:
            for data in starts:
                with self.subTest(data[-9:]):
                    _, writer = await asyncio.open_connection("127.0.0.1", self.port)
                    writer.write(data)
                    await writer.drain()
                    writer.transport.abort()
                    await friend.say("hello")
                    self.assertEqual(await friend.contents(1), ["hello"])
            await until(lambda: len(self.room.connections) == 1)

    async def test_invalid_utf8(self):
        """A text frame that is no UTF-8 closes the connection with 1007 (RFC 6455, 8.1)."""
        async with self.client() as client:
            await client.connection.send(b"\xff\xfe", text=True)
            with self.assertRaises(websockets.ConnectionClosed) as closed:
                await client.frame("error")
            self.assertEqual(closed.exception.rcvd.code, 1007)

    async def test_silent_client(self):
        """A client that answers no ping in time is closed, and its name is free again."""
        quick = functools.partial(websockets.serve, ping_interval=0.1, ping_timeout=0.1)
        with mock.patch.object(websockets, "serve", quick):
            server = await chat.start(self.room, "127.0.0.1", 0)
        port = server.sockets[0].getsockname()[1]
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(upgrade_request(port))
        async with asyncio.timeout(PATIENCE):
            received = await reader.read()
        writer.close()
        self.assertIn(b"\x89\x04", received)  # a ping
        self.assertIn((1011).to_bytes(2), received)  # a close frame's code
        await until(lambda: not self.room.names)
        server.close()
        await server.wait_closed()


def masked(payload, first=0x81):
    """Return the bytes of a client's frame, masked with zeros (RFC 6455, section 5.2)."""
    size = len(payload)
    length = bytes([0x80 | size]) if size < 126 else b"\xfe" + size.to_bytes(2)
    return bytes([first]) + length + bytes(4) + payload


ENDING_FRAMES = {
    "a close frame": masked((1000).to_bytes(2), first=0x88),
    "an empty close frame": masked(b"", first=0x88),
    "an unmasked frame": b"\x81\x05hello",
    "a reserved bit": masked(b"hello", first=0xC1),
    "an unknown opcode": masked(b"hello", first=0x83),
    "a continuation of nothing": masked(b"hello", first=0x80),
    "a frame too long": b"\x81\xff" + bytes([0x7F]) + bytes(11),
    "a second request": b"GET /ws HTTP/1.1\r\n\r\n",
}


class Rubbish(ServerCase):
    """What one connection sends, in whatever state and pieces, the others go on."""

    async def test_end_right_behind_the_request(self):
        """Whatever ends the stream before the answer has left, all others are heard as before."""
        requests = {"/ws": upgrade_request(self.port), "/": b"GET / HTTP/1.1\r\n\r\n"}
        async with self.client() as speaker, self.client() as listener:
            for path, kind in itertools.product(requests, ENDING_FRAMES):
                with self.subTest(path=path, kind=kind):
                    await self.raw(requests[path] + ENDING_FRAMES[kind])
                    await speaker.say(kind)
                    self.assertEqual(await listener.contents(1), [kind])
            await until(lambda: len(self.room.connections) == 2)

    async def test_end_behind_a_request_that_fills_a_read(self):
        """What ends the stream may also come in the read after that of the request."""
        for path in "/", "/ws", "/other":
            with self.subTest(path):
                request = f"GET {path} HTTP/1.1\r\nX: ".encode()
                request += b"x" * (chat.READ_AT_ONCE - len(request) - 4) + b"\r\n\r\n"
                await self.raw(request + ENDING_FRAMES["a close frame"])

    async def test_fuzz(self):
        """While 300 connections send random bytes and frames in random pieces and end in random
        ways, two others hold a conversation of which every message arrives.
        """
        chance = random.Random(4)

        def frame():
            payload = chance.randbytes(chance.choice([0, 1, 2, 5, 125, 126, 4000]))
            if chance.random() < 0.5:
                payload = json.dumps({"content": chance.choice(["", "hi", "x" * 2001])}).encode()
            if chance.random() < 0.1:
                return chance.randbytes(chance.randrange(40))
            if chance.random() < 0.2:
                return chance.choice([*ENDING_FRAMES.values()])
            opcode = chance.choice([0, 1, 1, 1, 2, 8, 9, 10, chance.randrange(16)])
            final = chance.choice([0x80, 0x80, 0x80, 0])
            return masked(payload[:125] if opcode > 7 else payload, first=final | opcode)

        async def rubbish():
            reader, writer = await asyncio.open_connection("127.0.0.1", self.port)
            data = b"".join(frame() for _ in range(chance.randrange(9)))
            if chance.random() < 0.9:
                data = upgrade_request(self.port) + data
            with contextlib.suppress(OSError):  # the server may have closed it meanwhile
                while data:
                    size = chance.choice([1, 100, 4000, len(data), len(data)])
                    writer.write(data[:size])
                    data = data[size:]
                    if chance.random() < 0.2:
                        await asyncio.sleep(chance.random() / 50)
                    await writer.drain()
                if chance.random() < 0.3:
                    writer.write_eof()
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(chance.random() / 20):
                        await reader.read()
            if chance.random() < 0.5:
                writer.transport.abort()
            writer.close()

        async def converse(speaker, listener, rubbishing):
            count = 0
            while not rubbishing.done():
                await speaker.say(f"{count}", nonce=speaker.name)
                for client in speaker, listener:
                    frame = await client.frame("message")
                    while frame["username"] != speaker.name:
                        frame = await client.frame("message")
                    self.assertEqual(frame["content"], f"{count}")
                count += 1
                await asyncio.sleep(0.05)
            self.assertGreater(count, 3)

        async def all_rubbish():
            for _ in range(10):
                await asyncio.gather(*(rubbish() for _ in range(30)))

        async with self.client() as speaker, self.client() as listener:
            rubbishing = asyncio.create_task(all_rubbish())
            await converse(speaker, listener, rubbishing)
            await rubbishing
            await until(lambda: len(self.room.connections) == 2)


class Http(ServerCase):
    async def test_page(self):
        """GET / answers with the page and headers that let nothing else in."""
        status, headers, body = await self.http("GET /")
        self.assertEqual(status, 200)
        self.assertEqual(body, (HERE / "index.html").read_text(encoding="utf-8"))
        types = [value for name, value in headers if name.lower() == "content-type"]
        self.assertEqual(types, ["text/html; charset=utf-8"])
        fields = dict(headers)
        self.assertEqual(fields["Content-Length"], str(len(body.encode())))
        self.assertEqual(fields["X-Content-Type-Options"], "nosniff")
        self.assertEqual(fields["Referrer-Policy"], "no-referrer")
        self.assertEqual(fields["Cache-Control"], "no-store")
        policy = fields["Content-Security-Policy"].split("; ")
        self.assertIn("default-src 'none'", policy)
        self.assertIn("frame-ancestors 'none'", policy)
        self.assertIn("require-trusted-types-for 'script'", policy)
        self.assertNotIn("unsafe", fields["Content-Security-Policy"])

    async def test_query(self):
        """A query does not hide the page."""
        self.assertEqual((await self.http("GET /?lesson=1"))[0], 200)

    async def test_head(self):
        """HEAD answers as GET does, without the body."""
        status, headers, body = await self.http("HEAD /")
        self.assertEqual((status, body), (200, ""))
        got = dict((await self.http("GET /"))[1])
        self.assertEqual(dict(headers)["Content-Length"], got["Content-Length"])

    async def test_not_found(self):
        """Other paths answer 404, and neither dots nor brackets confuse them."""
        for path in "/chat.py", "/wss", "/ws/", "//", "//[", "/../chat.py", "*", "/%2e%2e/":
            with self.subTest(path):
                self.assertEqual((await self.http(f"GET {path}"))[0], 404)

    async def test_method_not_allowed(self):
        """Methods other than GET and HEAD answer 405 and say which are allowed."""
        for method in "POST", "PUT", "DELETE", "OPTIONS", "BREW":
            for path in "/", "/ws", "/other":
                with self.subTest(f"{method} {path}"):
                    status, headers, _ = await self.http(f"{method} {path}")
                    self.assertEqual(status, 405)
                    self.assertEqual(dict(headers)["Allow"], "GET, HEAD")

    async def test_upgrade_required(self):
        """A plain GET of /ws answers 426, and so does HEAD, without a body."""
        for method in "GET", "HEAD":
            status, headers, body = await self.http(f"{method} /ws")
            self.assertEqual((status, dict(headers)["Upgrade"]), (426, "websocket"))
            self.assertEqual(body == "", method == "HEAD")

    async def test_headers_too_long(self):
        """Long lists in headers, which are slow to parse, are refused before that."""
        head = upgrade_request(self.port)[:-2]
        lists = b"".join(b"Sec-WebSocket-Protocol: %s\r\n" % (b"a," * 4000) for _ in range(100))
        with mock.patch.object(websockets.server.ServerProtocol, "accept") as accept:
            self.assertRegex(await self.raw(head + lists + b"\r\n"), "^HTTP/1.1 431 ")
        accept.assert_not_called()

    async def test_own_origin(self):
        """A page from this host and port may open a WebSocket."""
        server = {"host": "127.0.0.1", "port": self.port, "proxy": None}
        for host in f"127.0.0.1:{self.port}", "chat.example":
            async with websockets.connect(
                f"ws://{host}/ws", origin=f"http://{host}", **server
            ) as connection:
                self.assertEqual(json.loads(await connection.recv())["type"], "welcome")

    async def test_case_of_hosts(self):
        """Host and Origin are compared without regard to case (RFC 9110, section 4.2.3)."""
        async with websockets.connect(
            "ws://Chat.Example/ws",
            origin="http://chaT.example",
            host="127.0.0.1",
            port=self.port,
            proxy=None,
        ) as connection:
            self.assertEqual(json.loads(await connection.recv())["type"], "welcome")

    async def test_other_origin(self):
        """A page from any other host or port gets 403, and the way to put a proxy right."""
        origins = ["http://evil.example", f"http://127.0.0.1:{self.port + 1}", "null", "", "x"]
        origins += [f"http://127.0.0.1:{self.port}.evil.example", "http://[", "http://127.0.0.1"]
        for origin in origins:
            with self.subTest(origin):
                status, _, body = await self.http("GET /ws", Origin=origin, **UPGRADE)
                self.assertEqual(status, 403)
                self.assertIn("Host", body)
                self.assertIn("proxy", body)

    async def test_repeated_headers(self):
        """Headers that come twice are refused, not guessed at."""
        headers = "Origin: http://a\r\nOrigin: http://127.0.0.1\r\nHost: 127.0.0.1\r\nHost: a"
        request = f"GET /ws HTTP/1.1\r\n{headers}\r\n\r\n"
        self.assertRegex(await self.raw(request.encode()), "^HTTP/1.1 403 ")


class Crowd(ServerCase):
    async def test_coming_and_going(self):
        """200 clients that join, talk and leave at random leave an empty room."""
        chance = random.Random(1)
        deadline = time.monotonic() + 3

        async def visit(number):
            while time.monotonic() < deadline:
                async with self.client() as client:
                    for _ in range(chance.randrange(4)):
                        await client.say(f"{number}")
                        await client.frame("message")
                    if chance.random() < 0.3:
                        client.connection.cut()

        await asyncio.gather(*(visit(number) for number in range(200)))
        await until(lambda: not self.room.connections)
        self.assertEqual(self.room.names, set())  # asyncTearDown looks at tasks and logs

    async def test_cut_connections(self):
        """Over 50 cuts with resumption, a listener sees every message exactly once, in order."""
        chance = random.Random(2)
        said, heard = [], []  # nonces, and the messages that the listener saw
        done = asyncio.Event()

        async def hear():
            """Follow the conversation through many connections, until all was heard."""
            while not done.is_set() or heard[-1]["nonce"] != said[-1]:
                after = heard[-1]["id"] if heard else None
                async with self.client(after=after) as client:
                    self.assertFalse(client.welcome["gap"])
                    heard.extend(client.welcome["history"])
                    with contextlib.suppress(TimeoutError):
                        async with asyncio.timeout(chance.uniform(0, 0.05)):
                            while True:
                                heard.append(await client.frame("message"))
                    client.connection.cut()

        async def speak():
            """Say things, cut at random moments, and say again what did not come back."""
            last, waiting = None, []

            def back(message):
                nonlocal last
                last = message["id"]
                waiting.remove(message["nonce"])

            for cut in range(51):
                async with self.client(after=last) as client:
                    for message in client.welcome["history"]:
                        back(message)
                    new = [f"{cut}-{number}" for number in range(chance.randrange(4))]
                    said.extend(new)
                    waiting += new
                    for nonce in waiting:
                        await client.say("hello", nonce=nonce)
                    coming = len(waiting) if cut == 50 else chance.randrange(len(waiting) + 1)
                    for _ in range(coming):
                        back(await client.frame("message"))
                    client.connection.cut()
            done.set()

        async with self.client() as witness:
            listening = asyncio.create_task(hear())
            await speak()
            order = [await witness.frame("message") for _ in said]
            await listening
        self.assertEqual(sorted(frame["nonce"] for frame in order), sorted(said))
        self.assertEqual(heard, order)


class CountingTransport:
    """A transport that counts the writes which reach it."""

    def __init__(self, transport):
        self.transport, self.writes, self.longest = transport, 0, 0

    def __getattr__(self, name):
        return getattr(self.transport, name)

    def write(self, data):
        self.writes += 1
        self.longest = max(self.longest, len(data))
        self.transport.write(data)


class CountingConnection(chat.Connection):
    """A connection that counts the writes to the transport below it, by client's port."""

    counts: ClassVar = {}

    def connection_made(self, transport):
        counting = CountingTransport(transport)
        self.counts[transport.get_extra_info("peername")[1]] = counting
        super().connection_made(counting)


class Writing(ServerCase):
    async def asyncSetUp(self):
        self.enterContext(mock.patch.object(chat, "Connection", CountingConnection))
        self.addCleanup(CountingConnection.counts.clear)
        await super().asyncSetUp()

    def push(self, *contents):
        """Deliver messages as the server does, all in one turn of the event loop."""
        for content in contents:
            self.room.deliver(message(content, f"{random.random()}"))

    async def test_one_write_a_turn(self):
        """A hundred messages of one turn reach each tab in one write, and are still 100 frames."""
        async with self.client() as first, self.client() as second:
            await first.frame("presence")
            await second.frame("presence")
            before = {port: count.writes for port, count in CountingConnection.counts.items()}
            said = [f"{number}" for number in range(100)]
            self.push(*said)
            for client in first, second:
                self.assertEqual(await client.contents(100), said)
                count = CountingConnection.counts[client.port]
                self.assertEqual(count.writes - before[client.port], 1)

    async def test_one_message_leaves_at_once(self):
        """A message alone leaves without any other needed to push it out."""
        async with self.client() as client:
            self.push("hello")
            self.assertEqual(await client.contents(1), ["hello"])

    async def test_held_bytes(self):
        """A turn with more than 16 KiB for a tab is written in parts of about that size."""
        async with self.client() as client:
            said = ["x" * 1000] * 100
            self.push(*said)
            self.assertEqual(await client.contents(100), said)
            count = CountingConnection.counts[client.port]
            self.assertLess(count.longest, 16 * 1024 + 1200)
            self.assertLess(count.writes, 12)

    async def test_close_comes_last(self):
        """What was said before the server closes a connection arrives before the close frame."""
        async with self.client() as client:
            self.push("one", "two")
            self.server.close()
            self.assertEqual(await client.contents(2), ["one", "two"])
            with self.assertRaises(websockets.ConnectionClosed) as closed:
                await client.frame("message")
            self.assertEqual(closed.exception.rcvd.code, 1001)

    async def test_aborted(self):
        """A connection that is lost within a turn drops what was held, without a complaint."""
        async with self.client() as client:
            counting = CountingConnection.counts[client.port]
            self.push("one", "two")
            counting.abort()
            writes = counting.writes
            self.push(*["more"] * 10)
            await until(lambda: not self.room.connections)
            self.assertEqual(counting.writes, writes)

    async def test_write_after_the_end(self):
        """A write after write_eof raises to whoever writes, as asyncio's own transports do."""
        async with self.client() as client:
            (connection,) = self.room.connections
            connection.transport.write_eof()
            with self.assertRaisesRegex(RuntimeError, "write_eof"):
                connection.transport.write(b"late")
            with self.assertRaises(websockets.ConnectionClosed):
                await client.frame("message")

    async def test_same_as_its_transport(self):
        """What is asked of it and written to it has the same effect as on asyncio's transport."""
        async with self.client() as client:
            (connection,) = self.room.connections
            gathering, own = connection.transport, connection.transport.transport
            for ask in "is_closing", "can_write_eof", "get_protocol", "get_write_buffer_limits":
                self.assertEqual(getattr(gathering, ask)(), getattr(own, ask)())
            for wrong in "text", None, 5:
                for transport in gathering, own:
                    with self.assertRaises(TypeError):
                        transport.write(wrong)
            changing = bytearray(b"\x81\x05hello")
            gathering.write(changing)
            changing[:] = b"\x81\x05later"
            gathering.writelines([changing[:3], memoryview(changing)[3:]])
            self.assertEqual(gathering.get_write_buffer_size(), 14)
            said = [await client.connection.recv() for _ in range(2)]
            self.assertEqual(said, ["hello", "later"])
            self.assertEqual(gathering.get_write_buffer_size(), 0)

    async def test_flush_that_raises(self):
        """Whatever flushing one transport raises, all others are flushed, in this turn and the
        next; the one is cut off, since it has lost a frame.
        """
        async with self.client() as one, self.client() as two, self.client() as three:
            broken = CountingConnection.counts[two.port]
            with mock.patch.object(broken, "write", side_effect=ValueError("broken")):
                self.push("now")
                self.push("later")
                for client in one, three:
                    self.assertEqual(await client.contents(2), ["now", "later"])
            self.push("then")
            for client in one, three:
                self.assertEqual(await client.contents(1), ["then"])
            await until(lambda: len(self.room.connections) == 2)
        self.assertEqual(len(self.complaints), 1)
        self.complaints.clear()

    async def test_tls(self):
        """Over TLS every frame of a turn arrives, in order, up to the close frame."""
        with tempfile.TemporaryDirectory() as folder:
            server, client = await serve_tls(self.room, folder)
        async with client:
            await client.say("hello")
            self.assertEqual(await client.contents(1), ["hello"])
            said = [f"{number}" + "x" * 500 for number in range(100)]
            self.push(*said)
            server.close()
            self.assertEqual(await client.contents(100), said)
            with self.assertRaises(websockets.ConnectionClosed) as closed:
                await client.frame("message")
            self.assertEqual(closed.exception.rcvd.code, 1001)
        await server.wait_closed()

    async def test_tls_close(self):
        """Over TLS, where a close frame and the end are written at once, the frame arrives."""
        with tempfile.TemporaryDirectory() as folder:
            server, client = await serve_tls(self.room, folder)
        async with client:
            await client.connection.close()
            self.assertEqual(client.connection.close_code, 1000)
        server.close()
        await server.wait_closed()


async def serve_tls(room, folder):
    """Start a TLS server with a certificate of its own making; return it and a client."""
    openssl = shutil.which("openssl") or skip("openssl makes the certificate, but is missing")
    key, certificate = f"{folder}/key.pem", f"{folder}/certificate.pem"
    command = "req -x509 -newkey rsa:2048 -nodes -subj /CN=localhost"
    command += f" -addext subjectAltName=DNS:localhost -keyout {key} -out {certificate}"
    quiet = {"stderr": subprocess.DEVNULL}
    making = await asyncio.create_subprocess_exec(openssl, *command.split(), **quiet)
    if await making.wait():
        raise AssertionError("openssl made no certificate")
    tls = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    tls.load_cert_chain(certificate, key)
    with mock.patch.object(websockets, "serve", functools.partial(websockets.serve, ssl=tls)):
        server = await chat.start(room, "127.0.0.1", 0)
    port = server.sockets[0].getsockname()[1]
    trusting = ssl.create_default_context(cafile=certificate)
    client = Client(port, sock=socket.create_connection(("127.0.0.1", port)), ssl=trusting)
    client.url = f"wss://localhost:{port}/ws"
    return server, client


class Reading(ServerCase):
    async def read_in_turns(self, server, client):
        """Let a client send 256 KiB of pings at once; return how many bytes each turn handled."""
        turn, handled = 0, collections.Counter()

        def next_turn():
            nonlocal turn, tick
            turn += 1
            tick = asyncio.get_running_loop().call_soon(next_turn)

        data_received = chat.Connection.data_received

        def count(connection, data):
            handled[turn] += len(data)
            data_received(connection, data)

        tick = asyncio.get_running_loop().call_soon(next_turn)
        async with client:
            with mock.patch.object(chat.Connection, "data_received", count):
                client.connection.transport.write(masked(b"", first=0x89) * 43_000)
                await until(lambda: handled.total() >= 43_000 * 6)
            client.connection.cut()
        tick.cancel()
        return [*handled.values()]

    async def test_turns(self):
        """Of what a client floods with, one turn of the event loop handles at most 4 KiB."""
        handled = await self.read_in_turns(self.server, self.client())
        self.assertEqual(max(handled), 4096)

    async def test_turns_over_tls(self):
        """Over TLS asyncio may come back a few times in a turn, but not for all that was sent."""
        with tempfile.TemporaryDirectory() as folder:
            server, client = await serve_tls(self.room, folder)
        handled = await self.read_in_turns(server, client)
        self.assertLess(max(handled), 64 * 1024)
        server.close()
        await server.wait_closed()

    async def test_handshake_is_forgotten(self):
        """A connection whose handshake had 16 KB of headers and 8 KB of path costs no more."""
        request = upgrade_request(self.port)
        long = request[:-2] + b"".join(b"X: %s\r\n" % (b"x" * 4000) for _ in range(4)) + b"\r\n"
        long = long.replace(b"/ws", b"/ws?" + b"x" * 8000)
        costs = []
        async with contextlib.AsyncExitStack() as stack:
            for data in request, request, long:  # the first fills caches
                before = len(self.room.connections)
                tracemalloc.start()
                for _ in range(5):
                    reader, writer = await asyncio.open_connection("127.0.0.1", self.port)
                    stack.callback(writer.close)
                    writer.write(data)
                    await reader.readuntil(b'"gap": false}')
                await until(lambda before=before: len(self.room.connections) == before + 5)
                gc.collect()
                costs.append(tracemalloc.get_traced_memory()[0])
                tracemalloc.stop()
        self.assertLess(costs[2], costs[1] + 5 * 4000)

    async def test_patience(self):
        """Connections have 20 s between pings and to answer one, and 10 s to close, as a slow
        phone needs to read the page to its end.
        """
        async with self.client():
            (connection,) = self.room.connections
            self.assertEqual((connection.ping_interval, connection.ping_timeout), (20, 20))
            self.assertEqual(connection.close_timeout, 10)


class Load(ServerCase):
    async def test_slow_tab(self):
        """A tab that leaves 1 MiB unread is cut off, with one line in the log; nobody waits."""
        stalled = socket.socket()
        stalled.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        self.addCleanup(stalled.close)
        stalled.connect(("127.0.0.1", self.port))
        name = f"Port{stalled.getsockname()[1]}"
        stalled.sendall(upgrade_request(self.port))
        async with self.client() as friend:
            await until(lambda: len(self.room.connections) == 2)
            last, pushed = None, 0
            while name in self.room.names:
                self.room.deliver(message("x" * 2000, f"{pushed}"))
                last, pushed = await friend.frame("message"), pushed + 1
                self.assertLess(pushed, 10_000)
            self.assertEqual(last["id"], f"{pushed - 1}")
        complaint = self.complaints.pop()
        self.assertIn(name, complaint)
        self.assertIn("too slowly", complaint)

    async def test_slow_tab_returns(self):
        """A tab that was cut off comes back with `after` and misses nothing remembered."""
        async with self.client() as slow, self.client() as friend:
            await friend.say("seen")
            seen = (await slow.frame("message"))["id"]
            for connection in self.room.connections:
                if connection.remote_address[1] == slow.port:
                    connection.pause_writing()  # as asyncio does once too much is unsent
            await until(lambda: len(self.room.connections) == 1)
            await friend.say("missed")
            await friend.contents(2)
            async with self.client(after=seen) as back:
                self.assertEqual([m["content"] for m in back.welcome["history"]], ["missed"])
                self.assertFalse(back.welcome["gap"])
        self.assertEqual(len(self.complaints), 1)
        self.complaints.clear()

    async def test_speed(self):
        """Of 50 messages sent at once, 20 come in a second; all come, in order."""
        async with self.client() as client:
            said = [f"{number}" for number in range(50)]
            for content in said:
                await client.say(content)
            frames = [await client.frame("message") for _ in said]
            self.assertEqual([frame["content"] for frame in frames], said)
            times = [datetime.fromisoformat(frame["time"]).timestamp() for frame in frames]
            waits = [later - first for first, later in zip(times, times[20:], strict=False)]
            # The time in a frame is not the time that was waited for: a single one may be off.
            self.assertGreater(statistics.median(waits), 0.95)

    async def test_flood_ends_with_its_sender(self):
        """When a tab that floods is gone, so are its name and the rest of its flood."""
        async with self.client() as flooder, self.client() as friend:
            for _ in range(1000):
                await flooder.say("flood")
            await friend.contents(20)
            flooder.connection.cut()
            await until(lambda: flooder.name not in self.room.names)
            await friend.say("over")
            heard = 20
            while (await friend.contents(1)) != ["over"]:
                heard += 1
            self.assertLess(heard, 500)

    async def test_resending(self):
        """20 messages sent at once, as by a page that comes back, do not wait for each other."""
        async with self.client() as client:
            for number in range(20):
                await client.say(f"{number}")
            frames = [await client.frame("message") for _ in range(20)]
            times = [datetime.fromisoformat(frame["time"]).timestamp() for frame in frames]
            self.assertLess(times[-1] - times[0], 0.9)


class ProgramCase(unittest.TestCase):
    """Runs `python chat.py` as a user does."""

    def start(self, *options, program=HERE / "chat.py", shell_first=None):
        """Start the program; return its process, which ends with the test."""
        command = [sys.executable, program, *options]
        if shell_first:
            command = ["sh", "-c", f'{shell_first}; exec "$@"', "sh", *command]
        process = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        self.addCleanup(process.wait)
        self.addCleanup(process.stdout.close)
        self.addCleanup(process.stderr.close)
        self.addCleanup(process.kill)
        return process

    def start_serving(self, *options, host="127.0.0.1", port=0, **more):
        """Start the program; return its process, its port and the lines it begins with."""
        options = ["--host", host, "--port", f"{port}", *options]
        process = self.start(*options, **more)
        lines = [process.stdout.readline()]
        while "Ctrl-C" not in lines[-1]:
            self.assertTrue(lines[-1], "the server did not start")
            lines.append(process.stdout.readline())
        return process, int(re.search(r":(\d+) ", lines[0])[1]), "".join(lines)


class CommandLine(ProgramCase):
    def assert_gives_up(self, process, *words):
        """It must exit with status 1 after one line that says what is wrong and what to do."""
        out, complaint = process.communicate(timeout=PATIENCE)
        self.assertEqual((process.returncode, out, complaint.count("\n")), (1, "", 1))
        for word in words:
            self.assertIn(word, complaint)

    def test_says_what_to_open(self):
        """It prints the address to open and how to stop."""
        _, port, said = self.start_serving(host="localhost")
        self.assertEqual(
            said, f"Open http://localhost:{port} in two windows. Ctrl-C stops the chat.\n"
        )
        with socket.create_connection(("localhost", port), PATIENCE):
            pass

    def test_says_what_to_open_elsewhere(self):
        """With all addresses, it prints the one that other devices can open, if there is one."""
        _, port, said = self.start_serving(host="0.0.0.0")
        (host,) = re.findall("http://(.+):", said)
        with socket.create_connection((host, port), PATIENCE):
            pass
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
            try:
                probe.connect(("192.0.2.1", 9))
            except OSError:
                self.assertEqual(host, "localhost")
            else:
                self.assertEqual(host, probe.getsockname()[0])

    def test_ipv6_address(self):
        """An IPv6 address is printed in brackets, as browsers need it (RFC 3986, 3.2.2)."""
        _, port, said = self.start_serving(host="::1")
        self.assertIn(f"Open http://[::1]:{port} ", said)

    def test_port_in_use(self):
        """A port in use ends it with a line that names the way out."""
        with socket.create_server(("127.0.0.1", 0)) as taken:
            port = str(taken.getsockname()[1])
            process = self.start("--host", "127.0.0.1", "--port", port)
            self.assert_gives_up(process, port, "in use", "--port")

    def test_bad_host(self):
        """A host that is not here ends it with a line that names the way out."""
        for host in "no.such.host.invalid", "a..b", "192.0.2.1":
            with self.subTest(host):
                self.assert_gives_up(self.start("--host", host), host, "--host")

    def test_bad_port(self):
        """A port that no machine has ends it with a line that names the way out."""
        self.assert_gives_up(self.start("--port", "65536"), "65536", "--port")

    def test_missing_page(self):
        """Without index.html, or with one that is not text, it says where to put it."""
        with tempfile.TemporaryDirectory() as folder:
            program = shutil.copy(HERE / "chat.py", folder)
            self.assert_gives_up(self.start(program=program), "index.html beside", folder)
            pathlib.Path(folder, "index.html").write_bytes(b"\xff")
            self.assert_gives_up(self.start(program=program), "index.html beside")

    def assert_stops(self, number, **more):
        """It must stop at this signal at once, with 1001 for the tabs and not a word."""
        process, port, _ = self.start_serving(**more)

        async def follow():
            async with Client(port) as client:
                process.send_signal(number)
                with self.assertRaises(websockets.ConnectionClosed) as closed:
                    while True:
                        await client.frame()
                return closed.exception.rcvd.code

        self.assertEqual(asyncio.run(follow()), 1001)
        started = time.monotonic()
        self.assertEqual(process.communicate(timeout=PATIENCE), ("", ""))
        self.assertEqual(process.returncode, 0)
        self.assertLess(time.monotonic() - started, 2)

    @unittest.skipIf(sys.platform == "win32", "Windows has no signal to send here")
    def test_stop_signals(self):
        """SIGINT and SIGTERM stop it, also where SIGINT comes ignored as from a shell's &."""
        ignoring = {"shell_first": "trap '' INT"}
        for number in signal.SIGINT, signal.SIGTERM:
            for how in {}, ignoring:
                with self.subTest(number, how=how):
                    self.assert_stops(number, **how)

    def test_flood(self):
        """While one tab floods with 10,000 messages, the others' come back as quick as before."""
        _, port, _ = self.start_serving()

        async def talk():
            async with Client(port) as flooder, Client(port) as friend:
                for _ in range(10_000):
                    with contextlib.suppress(TimeoutError):
                        flood = flooder.connection.send('{"content": "flood"}')
                        await asyncio.wait_for(flood, 0.5)
                        continue
                    break  # the server does not read any more: the rest waits here
                between = 0
                for number in range(20):
                    await friend.say(f"{number}")
                    frame = await friend.frame("message")
                    while frame["content"] == "flood":
                        between += 1
                        frame = await friend.frame("message")
                    self.assertEqual(frame["content"], f"{number}")
                flooder.connection.cut()
                return between

        self.assertLess(asyncio.run(talk()), 200)

    async def come_late(self, port):
        """Connect to a full room; return the close frame that comes instead of a welcome."""
        async with websockets.connect(f"ws://127.0.0.1:{port}/ws", proxy=None) as connection:
            with self.assertRaises(websockets.ConnectionClosed) as closed:
                await connection.recv()
        return closed.exception.rcvd

    @unittest.skipIf(sys.platform == "win32", "Windows does not limit file descriptors so")
    def test_full_room(self):
        """Before file descriptors run out newcomers get 1013 and a reason; those inside stay."""
        process, port, _ = self.start_serving(shell_first="ulimit -n 64")

        async def crowd():
            async with contextlib.AsyncExitStack() as stack:
                inside = [await stack.enter_async_context(Client(port)) for _ in range(32)]
                for _ in range(4):
                    late = (self.come_late(port) for _ in range(12))
                    for refusal in await asyncio.gather(*late):
                        self.assertEqual(refusal.code, 1013)
                        self.assertIn("full", refusal.reason)
                await inside[0].say("hello")
                for client in inside:
                    self.assertEqual(await client.contents(1), ["hello"])
                reader, writer = await asyncio.open_connection("127.0.0.1", port)
                writer.write(b"GET / HTTP/1.1\r\n\r\n")
                self.assertEqual(await reader.readline(), b"HTTP/1.1 200 OK\r\n")
                writer.close()
            async with Client(port):  # room again
                pass

        asyncio.run(crowd())
        process.terminate()
        self.assertEqual(process.communicate(timeout=PATIENCE), ("", ""))

    @unittest.skipIf(sys.platform == "win32", "Windows does not limit file descriptors so")
    def test_soft_limit(self):
        """A soft limit on descriptors is raised as far as the hard one permits."""
        _, port, _ = self.start_serving(shell_first="ulimit -Sn 64")

        async def crowd():
            async with contextlib.AsyncExitStack() as stack:
                for _ in range(100):
                    await stack.enter_async_context(Client(port))

        asyncio.run(crowd())

    @unittest.skipIf(sys.platform == "win32", "Windows has no pipes of this kind")
    def test_nobody_reads(self):
        """Where nobody reads what it prints it ends, without a traceback."""
        process = self.start("--port", "0", shell_first="sleep 0.1")
        process.stdout.close()
        process.stdout = None
        _, complaint = process.communicate(timeout=PATIENCE)
        self.assertEqual((process.returncode, complaint), (1, ""))

    @unittest.skipIf(sys.platform == "win32", "Windows does not limit file descriptors so")
    def test_rush(self):
        """More latecomers at once than there are descriptors left wait, and all get 1013."""
        process, port, _ = self.start_serving(shell_first="ulimit -n 128")

        async def rush():
            async with contextlib.AsyncExitStack() as stack:
                for _ in range(64):
                    await stack.enter_async_context(Client(port))
                late = (self.come_late(port) for _ in range(60))
                codes = {refusal.code for refusal in await asyncio.gather(*late)}
                self.assertEqual(codes, {1013})

        asyncio.run(rush())
        process.terminate()
        self.assertEqual(process.communicate(timeout=PATIENCE), ("", ""))

    @unittest.skipIf(sys.platform == "win32", "Windows has no signal to send here")
    def test_second_signal(self):
        """Whoever presses Ctrl-C twice gets the same clean end."""
        process, _, _ = self.start_serving()
        for _ in range(20):
            process.send_signal(signal.SIGINT)
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(0.005)
        self.assertEqual(process.communicate(timeout=PATIENCE), ("", ""))
        self.assertEqual(process.returncode, 0)

    @unittest.skipIf(sys.platform == "win32", "Windows has no signal to send here")
    def test_stops_in_time(self):
        """It stops within 2 s though one tab answers nothing and others never shook hands, or were
        sent the page and read nothing.
        """
        process, port, _ = self.start_serving()
        with (
            socket.create_connection(("127.0.0.1", port), PATIENCE) as mute,
            socket.create_connection(("127.0.0.1", port), PATIENCE),
            socket.create_connection(("127.0.0.1", port), PATIENCE) as reading,
        ):
            reading.sendall(b"GET / HTTP/1.1\r\n\r\n")
            reading.recv(1)
            mute.sendall(upgrade_request(port))
            while b"welcome" not in mute.recv(4096):
                pass
            started = time.monotonic()
            process.send_signal(signal.SIGTERM)
            self.assertEqual(process.communicate(timeout=PATIENCE), ("", ""))
            self.assertEqual(process.returncode, 0)
            self.assertLess(time.monotonic() - started, 2)

    def test_debug(self):
        """--debug shows the handshake and each frame; nothing of it without the flag."""
        for options in ["--debug"], []:
            with self.subTest(options):
                process, port, _ = self.start_serving(*options)

                async def talk(port):
                    async with Client(port) as client:
                        await client.say("hello")
                        await client.contents(1)

                asyncio.run(talk(port))
                process.kill()
                _, log = process.communicate(timeout=PATIENCE)
                if not options:
                    self.assertEqual(log, "")
                for sign in "< GET /ws HTTP/1.1", "< TEXT", "> TEXT", "< CLOSE", "> CLOSE":
                    self.assertEqual(sign in log, bool(options), sign)


class Files(unittest.TestCase):
    def test_requirements(self):
        """requirements.txt and the head of chat.py (PEP 723) name the same dependencies."""
        source = (HERE / "chat.py").read_text(encoding="utf-8")
        head = re.search(r"^# /// script\n(.*?)^# ///$", source, re.MULTILINE | re.DOTALL)[1]
        metadata = tomllib.loads(re.sub("^# ?", "", head, flags=re.MULTILINE))
        required = (HERE / "requirements.txt").read_text(encoding="utf-8").split()
        self.assertEqual(metadata["dependencies"], required)
        self.assertEqual(metadata["requires-python"], ">=3.11")


# In a real browser


def find_browser():
    """Return the path of a Chromium, or skip the test."""
    names = ["chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "msedge"]
    places = [
        "/Applications/Google Chrome.app/Contents/MacOS/Google Chrome",
        "/Applications/Chromium.app/Contents/MacOS/Chromium",
        "/Applications/Microsoft Edge.app/Contents/MacOS/Microsoft Edge",
        r"C:\Program Files\Google\Chrome\Application\chrome.exe",
        r"C:\Program Files (x86)\Microsoft\Edge\Application\msedge.exe",
    ]
    for candidate in [os.environ.get("CHROME", ""), *names, *places]:
        if path := shutil.which(candidate):
            return path
    return skip("no Chromium found: install Chromium or Chrome, or set CHROME to its path")


class Browser:
    """A headless Chromium; `url` is where its DevTools listen."""

    FLAGS = (
        "--headless --remote-debugging-port=0 --disable-background-networking --disable-gpu "
        "--disable-component-update --disable-sync --no-first-run --disable-quic "
        "--disable-dev-shm-usage"
    )

    def __init__(self):
        path = find_browser()
        self.profile = tempfile.TemporaryDirectory(ignore_cleanup_errors=True)
        command = [path, *self.FLAGS.split(), f"--user-data-dir={self.profile.name}"]
        command.append("--host-resolver-rules=MAP chat.example 127.0.0.1")
        if hasattr(os, "geteuid") and os.geteuid() == 0:
            command.append("--no-sandbox")  # which does not work for root
        self.process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
        lines = iter(self.process.stderr.readline, "")
        self.url = next(line.split()[-1] for line in lines if "DevTools listening" in line)

    def close(self):
        self.process.terminate()
        self.process.communicate()
        self.profile.cleanup()


class Tab:
    """A browser tab, driven over https://chromedevtools.github.io/devtools-protocol/."""

    def __init__(self, browser, url, ready=None, opener=None, ignore_certificate=False, before="0"):
        """`ready` is the JavaScript to wait for, `before` what runs before the page's own; with
        an opener the tab hides that one.
        """
        self.before = before
        self.browser, self.url, self.ids = browser, url, itertools.count()
        self.ready = ready or (ONLINE if url.startswith("http") else "true")
        self.new_window, self.ignore_certificate = opener is None, ignore_certificate
        self.answers, self.events = {}, []

    async def __aenter__(self):
        async with websockets.connect(self.browser.url, proxy=None) as self.devtools:
            reading = asyncio.create_task(self.read())
            target = await self.call(
                "Target.createTarget", url="about:blank", newWindow=self.new_window
            )
        await reading
        url = self.browser.url.partition("/devtools/")[0] + "/devtools/page/" + target["targetId"]
        self.devtools = await websockets.connect(url, proxy=None, max_size=None)
        self.reading = asyncio.create_task(self.read())
        for domain in "Page", "Runtime", "Log", "Network":
            await self.call(f"{domain}.enable")
        await self.call("Security.setIgnoreCertificateErrors", ignore=self.ignore_certificate)
        await self.call("Page.addScriptToEvaluateOnNewDocument", source=self.before)
        await self.call("Page.navigate", url=self.url)
        await self.until(f"document.readyState === 'complete' && {self.ready}")
        return self

    async def __aexit__(self, *_):
        await self.send("Page.close")  # which may take the connection with it, unanswered
        await self.reading

    async def read(self):
        with contextlib.suppress(websockets.ConnectionClosedError):
            async for payload in self.devtools:
                said = json.loads(payload)
                if "id" in said:
                    self.answers.pop(said["id"]).set_result(said)
                else:
                    self.events.append(said)

    async def send(self, method, **params):
        """Call a method of the protocol; return the future of its answer."""
        id = next(self.ids)
        answer = self.answers[id] = asyncio.get_running_loop().create_future()
        await self.devtools.send(json.dumps({"id": id, "method": method, "params": params}))
        return answer

    async def call(self, method, **params):
        """Call a method of the protocol; return its result."""
        async with asyncio.timeout(PATIENCE):
            return (await (await self.send(method, **params)))["result"]

    async def evaluate(self, expression):
        """Return the value of a JavaScript expression, awaited where it is a promise."""
        more = {"returnByValue": True, "awaitPromise": True}
        answer = await self.call("Runtime.evaluate", expression=expression, **more)
        if "exceptionDetails" in answer:
            raise AssertionError(f"{expression}: {answer['exceptionDetails']}")
        return answer["result"].get("value")

    async def until(self, expression):
        """Wait until a JavaScript expression is true."""
        try:
            async with asyncio.timeout(PATIENCE):
                while not await self.evaluate(expression):
                    await asyncio.sleep(0.02)
        except TimeoutError:
            raise AssertionError(f"never true: {expression}") from None

    async def type(self, text):
        """Type into what has the focus; a line feed presses Enter."""
        for line in re.split("(\n)", text):
            if line == "\n":
                await self.press("Enter")
            elif line:
                await self.call("Input.insertText", text=line)

    async def press(self, key, **more):
        """Press and release a key."""
        code = {"Backspace": 8, "Tab": 9, "Enter": 13, " ": 32}[key]
        more |= {"key": key, "windowsVirtualKeyCode": code}
        text = {"text": "\r"} if key == "Enter" else {}
        await self.call("Input.dispatchKeyEvent", type="keyDown", **more, **text)
        await self.call("Input.dispatchKeyEvent", type="keyUp", **more)

    async def click(self, selector):
        """Click the middle of an element, once it stands where the next frame draws it."""
        frames = "new Promise(done => requestAnimationFrame(() => requestAnimationFrame(done)))"
        await self.evaluate(frames)
        middle = "(b => [b.x + b.width / 2, b.y + b.height / 2])(e.getBoundingClientRect())"
        x, y = (await self.evaluate(look(selector, middle)))[0]
        for type in "mousePressed", "mouseReleased":
            mouse = {"x": x, "y": y, "button": "left", "clickCount": 1}
            await self.call("Input.dispatchMouseEvent", type=type, **mouse)

    async def reload(self):
        await self.evaluate("window.stale = true")
        await self.call("Page.reload")
        await self.until(f"!window.stale && document.readyState === 'complete' && {self.ready}")

    async def offline(self, yes):
        """Cut the tab off from the network, or connect it again."""
        throughput = {"latency": 0, "downloadThroughput": -1, "uploadThroughput": -1}
        await self.call("Network.emulateNetworkConditions", offline=yes, **throughput)

    async def size(self, width, height):
        metrics = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 500}
        await self.call("Emulation.setDeviceMetricsOverride", **metrics)

    def seen(self, method):
        """Return the events of one kind, so far."""
        return [event for event in self.events if event["method"] == method]

    def frames(self, way):
        """Return the frames that were "Sent" or "Received", so far."""
        frames = self.seen(f"Network.webSocketFrame{way}")
        return [json.loads(frame["params"]["response"]["payloadData"]) for frame in frames]

    def sent(self):
        """Return the frames that the page sent, so far."""
        return self.frames("Sent")

    def received(self):
        """Return the frames that the page received, so far."""
        return self.frames("Received")

    def problems(self):
        """Return what the console complained of: errors and policy violations."""
        noise = {"Runtime.exceptionThrown", "Log.entryAdded"}
        return [event for event in self.events if event["method"] in noise]


@functools.cache
def shared_browser():
    """Return the browser that all tests share; each has its own tabs."""
    browser = Browser()
    unittest.addModuleCleanup(browser.close)
    return browser


class BrowserCase(ServerCase):
    """A server of its own for each test, looked at through a browser."""

    def setUp(self):
        self.browser = shared_browser()

    async def asyncSetUp(self):
        transports = self.transports = []

        class Tracked(chat.Connection):
            def connection_made(self, transport):
                transports.append(transport)
                super().connection_made(transport)

        self.enterContext(mock.patch.object(chat, "Connection", Tracked))
        self.tabs = contextlib.AsyncExitStack()
        await super().asyncSetUp()

    async def asyncTearDown(self):
        await self.tabs.aclose()
        self.server.close()
        for transport in self.transports:
            transport.abort()  # browsers keep spare connections, on which nothing was asked yet
        await super().asyncTearDown()

    def tab(self, **options):
        return Tab(self.browser, f"http://127.0.0.1:{self.port}/", **options)

    def hold(self):
        """Let messages wait before they are published, until the returned event is set."""
        let_through, publish = asyncio.Event(), self.room.publish

        async def hold(message):
            await let_through.wait()
            await publish(message)

        self.enterContext(mock.patch.object(self.room, "publish", hold))
        return let_through


def look(selector, what):
    """Return the JavaScript that lists what the elements of that selector show."""
    return f"[...document.querySelectorAll({json.dumps(selector)})].map(e => {what})"


def says(selector, text):
    """Return the JavaScript that tells whether an element contains a text."""
    found = f"document.querySelector({json.dumps(selector)})"
    return f"Boolean({found}?.innerText.includes({json.dumps(text)}))"


# Timers run ten times as fast; `asked` has what they were asked for.
FAST = """
    window.asked = [];
    const slowly = setTimeout;
    window.setTimeout = (action, ms = 0, ...more) => {
        asked.push(ms);
        return slowly(action, ms / 10, ...more);
    };
"""
# The page's clock can be put forward: `later` is by how many ms.
LATER = """{
    const now = performance.now.bind(performance);
    performance.now = () => now() + (window.later ?? 0);
}"""
TEXTS = look("#messages .text", "e.textContent")
IDS = look("#messages li[data-id]", "e.dataset.id")
STATES = look("#messages [data-kind=own]", "e.dataset.state")
ONLINE = "document.querySelector('#status').dataset.state === 'online'"
OFFLINE = "document.querySelector('#status').dataset.state === 'reconnecting'"


class Page(BrowserCase):
    async def test_two_tabs(self):
        """Two tabs see what each other sends, markup as text, and the console stays silent."""
        said = ["hello", "<img src=x onerror=alert(1)>", "<script>alert(1)</script> &amp;"]
        async with self.tab() as first, self.tab() as second:
            for tab, text in zip((first, second, first), said, strict=True):
                await tab.type(text + "\n")
                for other in first, second:
                    await other.until(f"{TEXTS}.includes({json.dumps(text)})")
            for tab in first, second:
                self.assertEqual(await tab.evaluate(TEXTS), said)
                self.assertEqual(await tab.evaluate("document.images.length"), 0)
                self.assertEqual(tab.problems(), [])
                await tab.until("document.querySelector('#online').textContent === '2'")

    async def test_one_request(self):
        """The page takes one HTTP request and one WebSocket, and has less than 40 KB."""
        async with self.tab() as tab:
            events = [event for event in tab.events if event["method"].startswith("Network.")]
            requests = [
                event["params"]["request"]["url"]
                for event in events
                if event["method"] == "Network.requestWillBeSent"
                and not event["params"]["request"]["url"].startswith("data:")
            ]
            self.assertEqual(requests, [tab.url])
            self.assertEqual(len(tab.seen("Network.webSocketCreated")), 1)
        self.assertLess((HERE / "index.html").stat().st_size, 44 * 1024)

    async def test_waiting_and_delivered(self):
        """A message shows at once as waiting, and as delivered when it comes back."""
        let_through = self.hold()
        async with self.tab() as tab:
            await tab.type("hello\n")
            await tab.until(f"{STATES}[0] === 'waiting'")
            self.assertTrue(await tab.evaluate(says("#messages [data-kind=own]", "waiting")))
            let_through.set()
            await tab.until(f"{STATES}[0] === 'delivered'")
            self.assertTrue(await tab.evaluate(says("#messages [data-kind=own]", "delivered")))
            self.assertEqual(await tab.evaluate(TEXTS), ["hello"])

    async def test_waiting_below(self):
        """What waits stands below all that is delivered, and moves to its place in their order."""
        let_through = self.hold()
        async with self.tab() as tab:
            await tab.type("mine\n")
            await tab.until(f"{STATES}[0] === 'waiting'")
            self.fill(1)
            await tab.until(f"{TEXTS}.length === 2")
            self.assertEqual(await tab.evaluate(TEXTS), ["0", "mine"])
            let_through.set()
            await tab.until(f"{STATES}[0] === 'delivered'")
            self.assertEqual(await tab.evaluate(TEXTS), ["0", "mine"])

    async def test_in_flight(self):
        """At most 20 messages are under way at once; the rest waits for echoes."""
        let_through = self.hold()
        async with self.tab() as tab:
            said = [f"{number}" for number in range(25)]
            for text in said:
                await tab.type(text + "\n")
            await tab.until(f"{STATES}.length === 25")
            self.assertEqual([frame["content"] for frame in tab.sent()], said[:20])
            let_through.set()
            await tab.until(f"{STATES}.every(state => state === 'delivered')")
            self.assertEqual(await tab.evaluate(TEXTS), said)
            self.assertEqual([frame["content"] for frame in tab.sent()], said)

    async def test_half_open(self):
        """A connection that gives no sign for 5 s though an answer is due is dead: the page
        reconnects, is shown what it missed and sends again only what did not get through.
        """
        async with self.tab() as tab, self.client() as friend:
            await tab.type("before\n")
            await tab.until(f"{STATES}[0] === 'delivered'")
            ids = await tab.evaluate(IDS)
            await tab.offline(True)
            await friend.say("missed")
            await tab.type("typed offline\n")
            await tab.until(f"{STATES}[1] === 'waiting'")
            await tab.until(OFFLINE)
            self.assertEqual(len(tab.seen("Network.webSocketCreated")), 1)
            await tab.offline(False)
            await tab.until(f"{STATES}[1] === 'delivered'")
            self.assertEqual(await tab.evaluate(TEXTS), ["before", "missed", "typed offline"])
            self.assertEqual(await friend.contents(3), ["before", "missed", "typed offline"])
            self.assertEqual([f["content"] for f in tab.sent()].count("before"), 1)
            resumed = tab.seen("Network.webSocketCreated")[1]["params"]["url"]
            self.assertTrue(resumed.endswith(f"/ws?after={ids[0]}"), resumed)

    async def test_cuts(self):
        """Over ten cuts while two tabs talk, both show all messages once, in the same order,
        and never hold more than one connection each.
        """
        chance = random.Random(3)
        async with self.tab() as first, self.tab() as second:
            said = []
            for cut in range(10):
                for tab in first, second:
                    for number in range(2):
                        said.append(f"{cut} {number} {tab is first}")
                        await tab.type(said[-1] + "\n")
                self.assertLessEqual(len(self.room.connections), 2)
                for connection in list(self.room.connections)[: chance.randint(1, 2)]:
                    connection.transport.abort()
                for tab in first, second:
                    if chance.random() < 0.5:
                        await tab.evaluate("document.querySelector('#now').click()")
            for tab in first, second:
                await tab.until(f"{TEXTS}.length >= {len(said)}")
                await tab.until(f"{STATES}.every(state => state === 'delivered')")
            order = await first.evaluate(TEXTS)
            self.assertEqual(sorted(order), sorted(said))
            self.assertEqual(await second.evaluate(TEXTS), order)

    async def test_reload(self):
        """Two waiting messages and the draft survive a reload, and keep their nonces."""
        let_through = self.hold()
        async with self.tab() as tab:
            await tab.type("one\ntwo\nthree")
            await tab.until(f"{STATES}.length === 2")
            before = await tab.evaluate(IDS)
            await tab.reload()
            await tab.until(f"{STATES}.length === 2")
            draft = "document.querySelector('#draft').value"
            self.assertEqual(await tab.evaluate(draft), "three")
            let_through.set()
            await tab.until(f"{STATES}.every(state => state === 'delivered')")
            self.assertEqual(await tab.evaluate(TEXTS), ["one", "two"])
            self.assertEqual([frame["nonce"] for frame in tab.sent()[-2:]], before)

    async def test_reload_keeps_own(self):
        """After a reload, what this tab said is still shown as its own."""
        async with self.tab() as tab, self.client() as other:
            await other.say("theirs")
            await tab.type("mine\n")
            await tab.until(f"{TEXTS}.length === 2 && {STATES}[0] === 'delivered'")
            await tab.reload()
            await tab.until(f"{TEXTS}.length === 2")
            kinds = look(
                "#messages [data-id]", "e.dataset.kind + e.querySelector('.text').innerText"
            )
            self.assertEqual(sorted(await tab.evaluate(kinds)), ["othertheirs", "ownmine"])

    async def test_plain_http(self):
        """It also works over plain HTTP from another host, where the browser withholds a lot."""
        url = f"http://chat.example:{self.port}/"
        async with Tab(self.browser, url) as tab:
            self.assertFalse(await tab.evaluate("isSecureContext"))
            await tab.type("hello\n")
            await tab.until(f"{STATES}[0] === 'delivered'")

    async def test_full(self):
        """Where the server refuses a newcomer, its reason is shown."""
        self.room.capacity = 0
        async with self.tab(ready=OFFLINE) as tab:
            await tab.until(says("#status", "The room is full."))

    async def test_delays(self):
        """The delays between attempts to connect double, with chance in each."""
        self.room.capacity = 0
        async with self.tab(ready=OFFLINE) as first, self.tab(ready=OFFLINE) as second:
            delays = []
            for tab in first, second:
                asked = "Network.webSocketWillSendHandshakeRequest"
                await until(lambda tab=tab, asked=asked: len(tab.seen(asked)) > 2)
                closed = [e["params"]["timestamp"] for e in tab.seen("Network.webSocketClosed")]
                opened = [e["params"]["timestamp"] for e in tab.seen(asked)]
                gaps = [later - end for later, end in zip(opened[1:], closed, strict=False)]
                self.assertTrue(0.4 < gaps[0] < 1.4, gaps)
                self.assertTrue(0.9 < gaps[1] < 2.4, gaps)
                delays += gaps[:2]
            self.assertGreater(abs(delays[0] - delays[2]) + abs(delays[1] - delays[3]), 0.002)

    async def test_now(self):
        """The status counts down to the next attempt, and its button does not wait for it."""
        self.room.capacity = 0
        async with self.tab(ready=OFFLINE) as tab:
            await until(lambda: len(tab.seen("Network.webSocketCreated")) > 2)
            await tab.until(says("#countdown", "3 s"))
            await tab.until(says("#countdown", "2 s"))
            self.room.capacity = 9
            started = time.monotonic()
            await tab.click("#now")
            await tab.until(ONLINE)
            self.assertLess(time.monotonic() - started, 1)
            self.assertEqual(len(tab.seen("Network.webSocketCreated")), 4)
            self.assertEqual(len(self.room.connections), 1)

    async def test_back_online(self):
        """The browser's word that it is online again brings an attempt at once."""
        self.room.capacity = 0
        async with self.tab(ready=OFFLINE) as tab:
            await until(lambda: len(tab.seen("Network.webSocketCreated")) > 1)
            await tab.until(says("#countdown", "2 s"))
            await tab.offline(True)
            self.room.capacity = 9
            started = time.monotonic()
            await tab.offline(False)
            await tab.until(ONLINE)
            self.assertLess(time.monotonic() - started, 0.9)
            self.assertEqual(len(tab.seen("Network.webSocketCreated")), 3)

    async def test_one_connection(self):
        """The browser's word that it is online again opens no second connection."""
        async with self.tab() as tab:
            await tab.offline(True)
            await tab.until("!navigator.onLine")
            await tab.offline(False)
            await tab.until("navigator.onLine")
            await tab.type("hello\n")
            await tab.until(f"{STATES}[0] === 'delivered'")
            self.assertEqual(len(tab.seen("Network.webSocketCreated")), 1)
            self.assertEqual(len(self.room.connections), 1)

    async def test_sides(self):
        """Own messages stand on the right, others' on the left."""
        async with self.tab() as tab, self.client() as other:
            await other.say("theirs")
            await tab.type("mine\n")
            await tab.until(f"{TEXTS}.length === 2")
            places = "(b => [b.left, innerWidth - b.right])(e.getBoundingClientRect())"
            for kind, near in ("other", 0), ("own", 1):
                sides = (await tab.evaluate(look(f"[data-kind={kind}] .text", places)))[0]
                self.assertLess(sides[near], sides[1 - near])

    async def test_colours(self):
        """Each person has one colour everywhere, another than their neighbour's."""
        colour = "getComputedStyle(e).color"
        async with self.tab() as tab, self.client() as one, self.client() as two:
            for client in one, two, one:
                await client.say("hello")
                await client.frame("message")
            await tab.type("hello\n")
            await tab.until(f"{TEXTS}.length === 4 && {STATES}[0] === 'delivered'")
            first, second, again, own = await tab.evaluate(look("#messages .name", colour))
            self.assertEqual(first, again)
            self.assertEqual(len({first, second, own}), 3)
            self.assertEqual(await tab.evaluate(look("#name", colour)), [own])

    async def test_groups(self):
        """What one person says within a minute stands together below one name."""
        async with self.tab() as tab:
            for id, second in ("a", 0), ("b", 59), ("c", 59 + 60):
                time = (datetime(2026, 1, 1, tzinfo=UTC) + timedelta(seconds=second)).isoformat()
                self.room.deliver(message(id, id, time))
            await tab.until(f"{TEXTS}.length === 3")
            names = look("#messages .name", "e.checkVisibility()")
            self.assertEqual(await tab.evaluate(names), [True, False, True])

    async def test_times(self):
        """A message shows its local time, and on hover its full date."""
        async with self.tab() as tab:
            await tab.call("Emulation.setTimezoneOverride", timezoneId="Asia/Tokyo")
            await tab.reload()
            time = "2026-03-04T01:02:03.000+00:00"
            self.room.deliver(message("hello", "a", time))
            await tab.until(f"{TEXTS}.length === 1")
            shown = (await tab.evaluate(look("time", "[e.textContent, e.title]")))[0]
            self.assertRegex(shown[0], "10:02")
            self.assertRegex(shown[1], "March 4, 2026.*10:02:03")

    async def test_presence_lines(self):
        """Joins and leaves are quiet lines of their own kind."""
        async with self.tab() as tab:
            async with self.client() as other:
                await tab.until(says("#messages", f"{other.name} joined."))
            await tab.until(says("#messages", f"{other.name} left."))
            kinds = set(await tab.evaluate(look("#messages li", "e.dataset.kind")))
            self.assertEqual(kinds, {"system"})

    async def test_following(self):
        """The log follows new messages only for a reader at the bottom; else a pill counts them
        and jumps there.
        """
        bottom = "(e => e.scrollHeight - e.scrollTop - e.clientHeight < 2)"
        at_bottom = bottom + "(document.querySelector('#log'))"
        async with self.tab() as tab:
            self.fill(50)
            await tab.until(f"{TEXTS}.length === 50 && {at_bottom}")
            await tab.call(
                "Input.dispatchMouseEvent", type="mouseWheel", x=300, y=300, deltaX=0, deltaY=-900
            )
            await tab.until(f"!{at_bottom}")
            top = await tab.evaluate("document.querySelector('#log').scrollTop")
            self.fill(3, start=50)
            await tab.until(f"{TEXTS}.length === 53")
            await tab.until(says("#pill", "3 new"))
            self.assertEqual(await tab.evaluate("document.querySelector('#log').scrollTop"), top)
            await tab.click("#pill")
            await tab.until(f"{at_bottom} && document.querySelector('#pill').hidden")
            self.fill(1, start=53)
            await tab.until(f"{TEXTS}.length === 54 && {at_bottom}")

    async def test_unread(self):
        """While the tab is hidden its title counts what came; once seen, the count is gone."""
        async with self.tab() as tab:
            async with Tab(self.browser, "about:blank", opener=tab):
                await tab.until("document.hidden")
                self.fill(3)
                await tab.until("document.title === '(3) Chat'")
                await tab.until(f"{TEXTS}.length === 3")
            await tab.call("Page.bringToFront")
            await tab.until("!document.hidden && document.title === 'Chat'")

    async def test_front(self):
        """A tab that comes to the front tries to connect at once."""
        self.room.capacity = 0
        async with self.tab(ready=OFFLINE) as tab:
            await until(lambda: len(tab.seen("Network.webSocketCreated")) > 1)
            await tab.until(says("#countdown", "2 s"))
            async with Tab(self.browser, "about:blank", opener=tab):
                await tab.until("document.hidden")
                self.room.capacity = 9
                started = time.monotonic()
            await tab.call("Page.bringToFront")
            await tab.until(ONLINE)
            self.assertLess(time.monotonic() - started, 0.9)
            self.assertEqual(len(tab.seen("Network.webSocketCreated")), 3)

    async def test_alone(self):
        """The first person alone is told what to do, and a button opens a second tab."""
        async with self.tab() as tab:
            await tab.until(says("#alone", "first one here"))
            self.assertTrue(await tab.evaluate(says("#alone", "--host 0.0.0.0")))
            await tab.until(says("#messages", "joined."))  # which moves the button
            await tab.click("#second")
            await until(lambda: len(self.room.connections) == 2)
            await tab.until("!document.querySelector('#alone').checkVisibility()")
            for target in (await tab.call("Target.getTargets"))["targetInfos"]:
                if target["url"] == tab.url and not target["attached"]:
                    await tab.call("Target.closeTarget", targetId=target["targetId"])
            await until(lambda: len(self.room.connections) == 1)

    async def test_left_over(self):
        """Whoever is alone again after a conversation is not told that they are the first."""
        async with self.tab() as tab:
            async with self.client() as other:
                await other.say("hello")
                await tab.until(f"{TEXTS}.length === 1")
                await tab.until(says("#messages", "joined."))
            await tab.until(says("#messages", f"{other.name} left."))
            self.assertFalse(
                await tab.evaluate("document.querySelector('#alone').checkVisibility()")
            )

    async def test_draft_grows(self):
        """Shift+Enter breaks the line, the draft grows to five lines, and Enter sends it all."""
        height = "document.querySelector('#draft').clientHeight"
        async with self.tab() as tab:
            heights = []
            for line in range(8):
                heights.append(await tab.evaluate(height))
                await tab.type(f"{line}")
                await tab.press("Enter", modifiers=8)
            self.assertEqual(heights[:5], sorted(set(heights[:5])))
            self.assertEqual(heights[5:], [heights[5]] * 3)
            await tab.type("end\n")
            await tab.until(f"{TEXTS}.length === 1")
            self.assertEqual(await tab.evaluate(TEXTS), ["\n".join([*"01234567", "end"])])
            self.assertEqual(await tab.evaluate(height), heights[0])

    async def test_composition(self):
        """The Enter that ends an input method's composition does not send."""
        async with self.tab() as tab:
            ime = {"selectionStart": 2, "selectionEnd": 2}
            await tab.call("Input.imeSetComposition", text="に", **ime)
            await tab.press("Enter")
            await tab.call("Input.insertText", text="日本")
            self.assertEqual(tab.sent(), [])
            await tab.type("\n")
            await tab.until(f"{TEXTS}.length === 1")
            self.assertEqual(await tab.evaluate(TEXTS), ["日本"])

    async def test_counter(self):
        """Near 2,000 characters a counter appears, which counts as the server does."""
        async with self.tab() as tab:
            await tab.type("😀" * 1800)
            self.assertEqual(await tab.evaluate(look("#counter", "e.textContent")), [""])
            await tab.type("😀")
            await tab.until(says("#counter", "1,801 of 2,000"))

    async def test_refusal(self):
        """An error is shown beside its message, whose text can be taken back and sent anew."""
        async with self.tab() as tab:
            await tab.until(says("#messages", "joined."))  # which would move the buttons
            await tab.type("x" * 2001 + "\n")
            await tab.until(says("#messages [data-kind=own]", "Send at most 2,000 characters"))
            await tab.click("#messages button:last-of-type")
            await tab.until(f"{TEXTS}.length === 0")
            await tab.press("Backspace")
            await tab.type("\n")
            await tab.until(f"{STATES}[0] === 'delivered'")
            self.assertEqual(await tab.evaluate(TEXTS), ["x" * 2000])

    async def test_too_long_for_a_frame(self):
        """A text that the server would close the connection for is refused here, and can be
        taken back; what is said next gets through.
        """
        async with self.tab() as tab:
            await tab.type("x" * 40_000 + "\n")
            await tab.until(says("#messages [data-state=refused]", "Send at most 2,000"))
            await tab.type("next\n")
            await tab.until(f"{STATES}.includes('delivered')")
            self.assertEqual([frame["content"] for frame in tab.sent()], ["next"])

    async def test_stolen_nonce(self):
        """Whoever says something else with a nonce of this tab's, of before or of what waits,
        speaks as another.
        """
        let_through = self.hold()
        async with self.tab() as tab:
            await tab.type("mine\n")
            await tab.until(f"{STATES}[0] === 'waiting'")
            nonce = tab.sent()[0]["nonce"]
            self.room.deliver(message("not mine", "a", nonce=nonce))
            await tab.until(f"{TEXTS}.length === 2")
            self.assertEqual(await tab.evaluate(STATES), ["waiting"])
            let_through.set()
            await tab.until(f"{STATES}[0] === 'delivered'")
            self.room.deliver(message("nor this", "b", nonce=nonce))
            await tab.until(f"{TEXTS}.length === 3")
            kinds = look("#messages [data-id]", "e.dataset.kind")
            self.assertEqual(await tab.evaluate(kinds), ["other", "own", "other"])

    async def test_unknown_frames(self):
        """A frame of a type that the page does not know costs nothing but its row on the wire."""
        async with self.tab() as tab:
            for number in range(5):
                self.fill(1, start=number)
                chat.push(self.room.connections, {"type": "typing", "username": "Port1"})
                chat.push(self.room.connections, ["no", "object"])
            await tab.until(f"{TEXTS}.length === 5")
            await tab.until("document.querySelectorAll('[data-kind=unknown]').length >= 5")
            self.assertEqual(tab.problems(), [])

    async def test_frames_before_the_welcome(self):
        """What comes before the welcome counts for nothing: all of the history is shown."""
        self.fill(2)
        join = self.room.join

        def hasty_join(connection, after):
            chat.push([connection], message("2", "2"))
            return join(connection, after)

        with mock.patch.object(self.room, "join", hasty_join):
            async with self.tab() as tab:
                await tab.until(f"{TEXTS}.length === 2")
                self.assertEqual(await tab.evaluate(TEXTS), ["0", "1"])

    async def test_white_space_of_python(self):
        """What the server strips is stripped before it is sent, or it would never come back."""
        async with self.tab() as tab:
            await tab.type("\x1c\x85 hello \x1f\x85\n")
            await tab.until(f"{STATES}.join() === 'delivered'")
            self.assertEqual(await tab.evaluate(TEXTS), ["hello"])
            self.assertEqual(tab.sent()[0]["content"], "hello")

    async def test_stored_entries_that_never_come_back(self):
        """What was stored but would not come back as it is, or twice, is not sent."""
        nonce = "0123456789abcdef01234567"
        bad = [{"nonce": "", "content": "a"}, {"nonce": nonce, "content": " padded "}]
        good = {"nonce": nonce[::-1], "content": "good"}
        stored = json.dumps(json.dumps([*bad, good, good, {"nonce": "x" * 65, "content": "b"}]))
        async with self.tab(before=f"sessionStorage.chatWaiting ??= {stored}") as tab:
            await tab.until(f"{STATES}.join() === 'delivered'")
            self.assertEqual(tab.sent(), [good])

    async def test_drawing_that_throws(self):
        """A message that cannot be drawn costs itself alone."""
        async with self.tab() as tab:
            self.fill(1)
            await tab.until(f"{TEXTS}.includes('0')")
            for number in range(510):
                self.room.deliver(message("bad", f"bad{number}", time="no time at all"))
            self.fill(1, start=1)
            await tab.until(f"{TEXTS}.includes('1')")
            self.assertIn("0", await tab.evaluate(TEXTS))

    async def test_duplicated_tab(self):
        """A tab with a copy of another's storage does not show that one's later words as its own,
        and of what waited in both everyone sees one.
        """
        let_through = self.hold()
        async with self.tab() as tab, self.client() as witness:
            await tab.type("waits in both\n")
            await tab.until(f"{STATES}.length === 1")
            copy = await tab.evaluate("JSON.stringify(sessionStorage)")
            before = f"if (!sessionStorage.chatWaiting) Object.assign(sessionStorage, {copy})"
            async with self.tab(before=before) as twin:
                let_through.set()
                for one in tab, twin:
                    await one.until(f"{STATES}.join() === 'delivered'")
                await tab.type("later\n")
                await twin.until(f"{TEXTS}.includes('later')")
                kinds = look("#messages [data-id]", "e.dataset.kind")
                self.assertEqual(await twin.evaluate(kinds), ["own", "other"])
                self.assertEqual(await witness.contents(2), ["waits in both", "later"])

    async def test_said_again_after_forgotten(self):
        """A message that the server had forgotten and was told again is shown once."""
        async with self.tab() as tab:
            self.room.deliver(message("hello", "a", nonce="n"))
            self.fill(1)
            self.room.history.clear()
            self.room.deliver(message("hello", "b", nonce="n"))
            self.room.deliver(message("other words", "c", nonce="n"))
            await tab.until(f"{TEXTS}.includes('other words')")
            self.assertEqual(await tab.evaluate(TEXTS), ["hello", "0", "other words"])

    async def test_silence(self):
        """A tab that says nothing reconnects after 45 s without a frame, heartbeats included."""
        async with self.tab(before=FAST) as tab:
            await tab.until(says("#messages", "joined."))
            self.assertIn(45_000, await tab.evaluate("asked"))
            self.room.presence.push()
            await tab.until("asked.filter(ms => ms === 45000).length >= 3")
            await tab.offline(True)
            await tab.until(OFFLINE)

    async def test_server_that_welcomes_and_closes(self):
        """The delays go on growing where no connection lasts for 10 s."""
        join = self.room.join

        def close_soon(connection, after):
            asyncio.get_running_loop().call_soon(connection.transport.abort)
            return join(connection, after)

        with mock.patch.object(self.room, "join", close_soon):
            async with self.tab(before=FAST, ready="true") as tab:
                await until(lambda: len(tab.seen("Network.webSocketCreated")) >= 4)
                ceiling = "asked.filter(ms => ms % 1 && ms > 400)"
                delays = await tab.evaluate(f"{ceiling}.filter(ms => ms < 31000)")
        self.assertGreater(max(delays), 2_000)

    async def test_rubbish_in_storage(self):
        """Whatever is in the browser's storage, the page starts and works."""
        rubbish = ["x", "{}", "5", "null", "[null]", "[{}]", "[[[]]]", '[{"nonce": 1}]', '"text"']
        for text in rubbish:
            value = json.dumps(text)
            before = f"sessionStorage.chatWaiting = sessionStorage.chatOwn = {value}"
            with self.subTest(text):
                async with self.tab(before=before) as tab:
                    await tab.type("hello\n")
                    await tab.until(f"{STATES}.join() === 'delivered'")
                    self.assertEqual(tab.problems(), [])
            self.room.history.clear()

    async def test_denied_storage(self):
        """Where the browser denies its storage, the page starts and works."""
        before = """for (const kind of ["localStorage", "sessionStorage"])
            Object.defineProperty(window, kind, {get() { throw new Error("denied"); }});"""
        async with self.tab(before=before) as tab:
            await tab.type("hello\n")
            await tab.until(f"{STATES}.join() === 'delivered'")
            visible = "document.querySelector('#panel').checkVisibility()"
            before = await tab.evaluate(visible)
            await tab.evaluate("document.querySelector('#wire-toggle').click()")
            self.assertNotEqual(await tab.evaluate(visible), before)
            self.assertEqual(tab.problems(), [])

    async def test_restless_people(self):
        """However often people come and go, one line tells the latest, and messages stay."""
        async with self.tab() as tab:
            self.fill(1)
            await tab.until(f"{TEXTS}.length === 1")
            for number in range(5):
                self.room.presence.tell(f"Port{number}", "joined")
                self.room.presence.push()
            await tab.until(says("#messages", "Port4 joined."))
            lines = await tab.evaluate(look("#messages [data-kind=system]", "e.innerText"))
            self.assertEqual(lines[1:] or lines, ["Port4 joined."])

    async def test_greedy_messages(self):
        """One message takes no more than its share of the page: 2,000 lines scroll in it, and
        combining characters piled up stay inside it.
        """
        async with self.tab() as tab:
            await tab.size(1280, 800)
            self.room.deliver(message("\n".join("x" * 1000), "a"))
            self.room.deliver(message("a" + "\u0301" * 1999, "b"))
            await tab.until(f"{TEXTS}.length === 2")
            tall, piled = await tab.evaluate(look(".text", "e.clientHeight"))
            self.assertLess(tall, 400)
            self.assertLess(piled, 60)
            self.assertEqual(
                set(await tab.evaluate(look(".text", "getComputedStyle(e).overflowX"))), {"hidden"}
            )
            self.assertEqual((await tab.evaluate(look(".text", "e.tabIndex")))[0], 0)

    async def test_colour_follows_from_the_name(self):
        """A person has the same colour in every tab, whoever came first, and the next port has
        another.
        """
        colours = []
        for names in ("Port50000", "Port50002"), ("Port50002", "Port50000"):
            self.room.history.clear()
            for name in names:
                self.room.deliver(message(f"I am {name}", name) | {"username": name})
            async with self.tab() as tab:
                await tab.until(f"{TEXTS}.length === 2")
                colour = "[e.innerText, getComputedStyle(e).color]"
                colours.append(dict(await tab.evaluate(look("#messages .name", colour))))
        self.assertEqual(*colours)
        self.assertEqual(len(set(colours[0].values())), 2)

    async def test_spoken_once(self):
        """Those who listen to the page hear each message once."""
        async with self.tab() as tab, self.client() as other:
            await tab.type("mine\n")
            await tab.until(f"{STATES}.join() === 'delivered'")
            await other.say("theirs")
            await tab.until(f"{TEXTS}.length === 2")
            heard = await tab.evaluate(look("#spoken p", "e.textContent"))
            messages = [text for text in heard if "joined" not in text]
            self.assertEqual(messages, ["You: mine", f"{other.name}: theirs"])
            self.assertEqual(await tab.evaluate(look("#log", "e.ariaLive")), ["off"])
            storm = "for (let n = 0; n < 20; n++) draw(() => drawSystem('storm')); 0"
            await tab.evaluate(storm)
            await tab.until(says("#messages", "storm"))
            self.assertEqual(await tab.evaluate(look("#spoken p", "e.textContent")), heard)

    async def test_past(self):
        """While there is no connection, the name and the number of people look like the past."""
        past = "Number(getComputedStyle(document.querySelector('#who')).opacity) < 1"
        async with self.tab() as tab:
            self.assertFalse(await tab.evaluate(past))
            await tab.evaluate("document.querySelector('#unplug').click()")
            self.assertTrue(await tab.evaluate(past))

    async def test_missed_from_the_start(self):
        """A tab that has seen nothing yet is also told when it may have missed something."""
        for missed, dividers in (3, 0), (60, 1):
            self.room.history.clear()
            async with self.tab() as tab:
                await tab.evaluate("document.querySelector('#unplug').click()")
                await until(lambda: not self.room.connections)
                self.fill(missed)
                await tab.evaluate("document.querySelector('#unplug').click()")
                await tab.until(f"{TEXTS}.includes('{missed - 1}')")
                shown = await tab.evaluate("document.querySelectorAll('.divider').length")
                self.assertEqual(shown, dividers)

    async def test_one_divider(self):
        """After a restart, one divider says that messages may be missing, not one each time."""
        async with self.tab() as tab:
            await tab.type("before\n")
            await tab.until(f"{STATES}[0] === 'delivered'")
            self.room.history.clear()
            for _ in range(3):
                await tab.evaluate("document.querySelector('#unplug').click()")
                await until(lambda: not self.room.connections)
                await tab.evaluate("document.querySelector('#unplug').click()")
                await tab.until(ONLINE)
            await tab.until("document.querySelectorAll('.divider').length > 0")
            self.assertEqual(await tab.evaluate("document.querySelectorAll('.divider').length"), 1)

    async def test_full_storage(self):
        """Where the browser's storage is full, messages are sent and shown all the same."""
        async with self.tab() as tab:
            await tab.evaluate(
                "try { for (let n = 0; ; n++) sessionStorage[n] = 'x'.repeat(1e5); } catch {} "
                "try { for (let n = 0; ; n++) sessionStorage['y' + n] = 'x'; } catch {} 0"
            )
            await tab.type("hello\n")
            await tab.until(f"{STATES}[0] === 'delivered'")
            self.assertEqual(await tab.evaluate(TEXTS), ["hello"])

    async def test_send_again(self):
        """A message that was refused for now can be sent again as it is."""

        async def refuse(message):
            raise chat.Refused("The broker is away.", nonce=message["nonce"])

        async with self.tab() as tab:
            await tab.until(says("#messages", "joined."))  # which would move the buttons

            with mock.patch.object(self.room, "publish", refuse):
                await tab.type("hello\n")
                await tab.until(says("#messages [data-kind=own]", "The broker is away."))
            await tab.click("#messages button:first-of-type")
            await tab.until(f"{STATES}[0] === 'delivered'")
            first, again = tab.sent()
            self.assertEqual(first, again)

    async def test_focus(self):
        """After sending, with the button as well, the focus is in the draft again."""
        async with self.tab() as tab:
            focus = "document.activeElement.id"
            self.assertEqual(await tab.evaluate(focus), "draft")
            await tab.type("hello")
            await tab.click("#send")
            await tab.until(f"{STATES}[0] === 'delivered'")
            self.assertEqual(await tab.evaluate(focus), "draft")

    async def test_keyboard(self):
        """The Tab key alone reaches everything that can be used, visibly."""
        async with self.tab() as tab:
            reached = set()
            for _ in range(8):
                await tab.press("Tab")
                reached.add(await tab.evaluate("document.activeElement.id"))
                outline = "getComputedStyle(document.activeElement).outlineStyle"
                if await tab.evaluate("document.activeElement !== document.body"):
                    self.assertEqual(await tab.evaluate(outline), "solid")
            self.assertLessEqual({"log", "second", "draft", "send"}, reached)

    async def test_roles(self):
        """Screen readers are told of messages politely, and of the connection."""
        async with self.tab() as tab:
            tree = (await tab.call("Accessibility.getFullAXTree"))["nodes"]
            roles = {node["role"]["value"] for node in tree if "role" in node}
            self.assertLessEqual({"log", "status", "main", "textbox", "button"}, roles)

    async def test_no_scrolling(self):
        """However much is shown, the page itself does not scroll, only its log and wire do."""
        async with self.tab() as tab:
            await tab.size(1280, 800)
            for number in range(60):
                self.fill(1, start=number)
                await tab.until(f"{TEXTS}.includes('{number}')")
            page = "document.documentElement"
            self.assertTrue(await tab.evaluate(f"{page}.scrollHeight <= innerHeight"))

    async def test_narrow(self):
        """On 320 pixels nothing scrolls sideways, and all buttons can be hit with a finger."""
        async with self.tab() as tab:
            await tab.size(320, 568)
            await tab.type("x" * 300 + "\n")
            await tab.until(f"{STATES}[0] === 'delivered'")
            for element in "document.documentElement", "document.querySelector('#log')":
                self.assertTrue(
                    await tab.evaluate(f"{element}.scrollWidth <= {element}.clientWidth")
                )
            size = "(b => Math.min(b.width, b.height))(e.getBoundingClientRect())"
            for smaller in await tab.evaluate(look("button, #draft", f"e.hidden ? 99 : {size}")):
                self.assertTrue(smaller == 0 or smaller >= 44, smaller)

    async def test_direction(self):
        """Text that runs from right to left does so in its own bubble alone."""
        async with self.tab() as tab:
            await tab.type("שלום!\n")
            await tab.until(f"{STATES}[0] === 'delivered'")
            style = "getComputedStyle(e).direction + getComputedStyle(e).unicodeBidi"
            self.assertEqual(await tab.evaluate(look(".text", style)), ["rtlisolate"])
            direction = "getComputedStyle(e).direction"
            self.assertEqual(set(await tab.evaluate(look("#messages li", direction))), {"ltr"})

    async def test_reduced_motion(self):
        """Where the system asks for reduced motion, nothing moves, in the log or on the wire."""
        async with self.tab() as tab:
            await tab.size(1280, 800)
            reduce = [{"name": "prefers-reduced-motion", "value": "reduce"}]
            await tab.call("Emulation.setEmulatedMedia", features=reduce)
            await tab.until("document.querySelector('#wire').checkVisibility()")
            await tab.evaluate(
                "window.moved = 0; addEventListener('animationstart', () => moved++, true); 0"
            )
            await tab.type("hello\n")
            await tab.until(f"{STATES}[0] === 'delivered' && {says('#wire', 'pushed')}")
            self.assertEqual(await tab.evaluate("document.getAnimations().length + moved"), 0)

    async def test_storm(self):
        """2,000 messages within 2 s are drawn at most 50 in one animation frame, typing keeps up,
        and the newest 500 stay in the document.
        """
        async with self.tab() as tab:
            await tab.evaluate(
                "window.most = 0; new MutationObserver(records => { most = Math.max(most, "
                "records.filter(record => record.addedNodes.length).length); })"
                ".observe(document.querySelector('#messages'), {childList: true}); 0"
            )
            for burst in range(40):
                self.fill(50, start=burst * 50)
                await tab.type("x")
            self.fill(1, start=2000)
            await tab.until(f"{TEXTS}.includes('2000')")
            self.assertEqual(await tab.evaluate("document.querySelector('#draft').value"), "x" * 40)
            self.assertEqual(
                await tab.evaluate("document.querySelectorAll('#messages li').length"), 500
            )
            shown = await tab.evaluate(TEXTS)
            self.assertEqual(shown, [f"{number}" for number in range(2001 - len(shown), 2001)])
            self.assertLessEqual(await tab.evaluate("most"), 50)


KINDS = look("#wire li", "e.dataset.kind")
LEGS = "[...e.querySelectorAll('.leg')].map(leg => [leg.className.slice(4), leg.innerText.trim()])"


class Wire(BrowserCase):
    async def wide_tab(self):
        """Return a tab that is wide enough for the wire beside the log, without a scroll bar."""
        tab = await self.tabs.enter_async_context(self.tab())
        await tab.size(1280, 1600)
        await tab.until("document.querySelector('#wire').checkVisibility()")
        return tab

    async def rows(self, tab, *kinds):
        """Wait until the wire ends with rows of these kinds, presence apart; return their legs."""
        listed = f"{KINDS}.filter(kind => kind !== 'presence')"
        await tab.until(f"{listed}.slice(-{len(kinds)}).join() === {json.dumps(','.join(kinds))}")
        legs = await tab.evaluate(look("#wire li:not([data-kind=presence])", LEGS))
        return legs[-len(kinds) :]

    async def test_opening(self):
        """Opening is drawn as a request, its answer and the welcome; the first two inferred."""
        async with self.client() as other:
            await other.say("remembered")
            await other.contents(1)
            tab = await self.wide_tab()
            request, response, welcome = await self.rows(tab, "request", "response", "welcome")
        self.assertEqual(request, [["up guess", "GET /ws\nUpgrade: websocket"]])
        self.assertEqual(response[0][0], "down guess")
        self.assertRegex(response[0][1], "^101 Switching Protocols\nafter [0-9]+ ms$")
        self.assertEqual(welcome, [["down", "welcome\n1 remembered"]])

    async def test_sending_alone(self):
        """A message goes up, and is pushed back to this tab and to nobody else."""
        tab = await self.wide_tab()
        await tab.type("hello\n")
        send, push = await self.rows(tab, "send", "echo")
        size = len(json.dumps(tab.sent()[0], separators=(",", ":")))
        self.assertEqual(send, [["up", f"message, {size} bytes\n“hello”"]])
        self.assertEqual(len(push), 1)
        self.assertRegex(push[0][1], "^message, back\nyour own, after [0-9]+ ms$")

    async def test_sending_to_others(self):
        """One frame up, and in one row the push to this tab, filled and thick, and to others."""
        tab = await self.wide_tab()
        async with self.client(), self.client():
            await tab.until("document.querySelector('#online').textContent === '3'")
            await tab.type("hello\n")
            _, push = await self.rows(tab, "send", "echo")
            self.assertEqual(push[0][0], "down")
            self.assertEqual(push[1], ["to guess", "to 2 other tabs\nthe same frame"])
            style = "(s => [s.outlineStyle, s.backgroundColor])(getComputedStyle(e))"
            ((outline, fill),) = await tab.evaluate(look("#wire [data-kind=echo]", style))
            self.assertEqual(outline, "none")
            self.assertNotEqual(fill, "rgba(0, 0, 0, 0)")
            thick = "getComputedStyle(e, '::before').borderBottomWidth"
            self.assertEqual(
                await tab.evaluate(look("[data-kind=echo] .down", thick)),
                ["4px"],
            )

    async def test_receiving(self):
        """What another says has a box, since nobody here asked for it, and is drawn from its
        speaker and back to all others, in their colour.
        """
        tab = await self.wide_tab()
        async with self.client() as other:
            await other.say("hello")
            (message,) = await self.rows(tab, "message")
            expected = [
                ["down", "message, pushed\nnobody here asked"],
                ["from guess", f"{other.name} spoke\n“hello”"],
                ["to guess", "to 1 other tab\nthe sender included"],
            ]
            self.assertEqual(message, expected)
            ray = "getComputedStyle(e.querySelector('.leg'), '::before').borderBottomColor"
            name = await tab.evaluate(look("#messages .name", "getComputedStyle(e).color"))
            self.assertEqual(await tab.evaluate(look("#wire [data-kind=message]", ray)), name)
            outline = look("#wire [data-kind=message]", "getComputedStyle(e).outlineStyle")
            self.assertEqual(await tab.evaluate(outline), ["solid"])

    async def test_caption(self):
        """The first frame that nobody here asked for, and no other, says what push is."""
        tab = await self.wide_tab()
        async with self.client() as other:
            await tab.type("hello\n")
            await other.say("hello")
            await self.rows(tab, "send", "echo", "message")
            await tab.until(says("#wire", "2 online"))
        caption = "[e.dataset.kind, getComputedStyle(e, '::after').content]"
        captions = dict(await tab.evaluate(look("#wire li", caption)))
        self.assertEqual(set(captions.values()), {"none", '"This tab sent nothing. That is push."'})

    async def test_presence(self):
        """Presence is drawn as a push to everyone."""
        tab = await self.wide_tab()
        async with self.client():
            await tab.until(f"{KINDS}.at(-1) === 'presence' && {says('#wire', '2 online')}")
            row = (await tab.evaluate(look("#wire li", LEGS)))[-1]
            self.assertEqual(row[0], ["down", "presence, pushed\n2 online"])
            self.assertEqual(row[1], ["to guess", "to 1 other tab\nthe same frame"])

    async def test_heartbeat(self):
        """A heartbeat is a row on the wire, and no line in the conversation."""
        tab = await self.wide_tab()
        await tab.until(f"{KINDS}.includes('presence')")
        lines = await tab.evaluate(look("#messages li", "e.innerText"))
        self.room.presence.push()
        await tab.until(f"{KINDS}.filter(kind => kind === 'presence').length === 2")
        self.assertEqual(await tab.evaluate(look("#messages li", "e.innerText")), lines)

    async def test_error(self):
        """An error is drawn as the answer to this tab alone."""
        tab = await self.wide_tab()
        await tab.type("x" * 2001 + "\n")
        _, error = await self.rows(tab, "send", "error")
        self.assertEqual(error, [["down", "error\nto this tab alone"]])

    async def test_stop_and_start(self):
        """A restart is drawn: the close code by name, the wait, that nobody answers, and how it
        opens again.
        """
        tab = await self.wide_tab()
        self.server.close()
        close, wait = await self.rows(tab, "close", "wait")
        self.assertEqual(close, [["down", "close 1001 going away"]])
        self.assertRegex(wait[0][1], r"^wait\n[0-9.]+ m?s to reconnect$")
        await tab.until(f"{KINDS}.slice(-3).join() === 'request,close,wait'")
        close = (await tab.evaluate(look("#wire [data-kind=close]", LEGS)))[-1]
        self.assertEqual(close, [["still", "no answer\n1006, which no frame carries"]])
        self.server = await chat.start(self.room, "127.0.0.1", self.port)
        await self.rows(tab, "wait", "request", "response", "welcome")

    async def test_hang_up(self):
        """Who has hung up stays so until calling again; then what was missed comes with the
        welcome, and what waited goes out, once.
        """
        tab = await self.wide_tab()
        async with self.client() as friend:
            await friend.say("before")
            await self.rows(tab, "message")
            await tab.click("#unplug")
            (close,) = await self.rows(tab, "close")
            self.assertEqual(close, [["up", "close 1000 normal closure"]])
            await until(lambda: len(self.room.connections) == 1)
            await friend.say("missed")
            await tab.click("#draft")
            await tab.type("one\ntwo\n")
            await tab.offline(True)
            await tab.offline(False)
            state = "document.querySelector('#status').dataset.state"
            self.assertEqual(await tab.evaluate(state), "unplugged")
            self.assertEqual(len(self.room.connections), 1)
            await tab.click("#unplug")
            await tab.until(f"{STATES}.join() === 'delivered,delivered'")
            kinds = ["close", "request", "response", "welcome", "send", "send", "echo", "echo"]
            welcome = (await self.rows(tab, *kinds))[3]
            self.assertEqual(welcome[0][1], "welcome\n1 missed")
            self.assertEqual(await tab.evaluate(TEXTS), ["before", "missed", "one", "two"])
            self.assertEqual(await friend.contents(4), ["before", "missed", "one", "two"])

    async def test_cut(self):
        """On a cut line nothing is sent and nothing heard, and neither side knows, until nothing
        comes back; once it is mended, all that was said on both sides is there.
        """
        tab = await self.wide_tab()
        async with self.client() as friend:
            await friend.say("before")
            await self.rows(tab, "message")
            await tab.until(says("#wire", "2 online"))
            await tab.click("#cut")
            await friend.say("missed")
            await tab.click("#draft")
            await tab.type("mine\n")
            await tab.until(f"{KINDS}.filter(kind => kind === 'lost').length === 2")
            lost = await tab.evaluate(look("#wire [data-kind=lost]", LEGS))
            ways = sorted(legs[0][0] for legs in lost)
            self.assertEqual(ways, ["down lost", "up lost"])
            self.assertTrue(await tab.evaluate(ONLINE))
            self.assertEqual(len(self.room.connections), 2)
            self.assertNotIn("send", await tab.evaluate(KINDS))
            self.assertEqual(await tab.evaluate(look("#frames-up", "e.innerText")), ["0 frames"])
            await tab.until(OFFLINE)
            self.assertEqual(tab.sent(), [])
            self.assertEqual(len(self.room.connections), 2)
            await tab.click("#cut")
            await tab.evaluate("document.querySelector('#now').click()")
            await tab.until(f"{STATES}.join() === 'delivered'")
            self.assertEqual(await tab.evaluate(TEXTS), ["before", "missed", "mine"])
            self.assertEqual(await friend.contents(3), ["before", "missed", "mine"])
            await until(lambda: len(self.room.connections) == 2)

    async def test_cut_and_mended_at_once(self):
        """However soon the line is mended, nothing is lost in either direction."""
        tab = await self.wide_tab()
        async with self.client() as friend:
            await friend.say("before")
            await self.rows(tab, "message")
            await tab.click("#cut")
            await friend.say("missed")
            await tab.click("#draft")
            await tab.type("mine\n")
            await tab.until(f"{KINDS}.filter(kind => kind === 'lost').length >= 2")
            await tab.click("#cut")
            await friend.say("later")
            await tab.until(f"{STATES}.join() === 'delivered' && {TEXTS}.length === 4")
            self.assertEqual(await friend.contents(4), await tab.evaluate(TEXTS))

    async def test_folded_rows(self):
        """A row that stands for many says for how many."""
        tab = await self.wide_tab()
        await tab.until(f"{KINDS}.includes('presence')")
        await tab.evaluate("document.querySelector('#pause').click()")
        for _ in range(12):
            self.room.presence.push()
        await until(lambda: len(tab.received()) == 14)
        await tab.evaluate("document.querySelector('#pause').click()")
        await tab.until(says("#wire", "2 × presence, pushed"))

    async def test_row_that_throws(self):
        """A row that cannot be drawn costs itself alone."""
        tab = await self.wide_tab()
        await self.rows(tab, "welcome")
        chat.push(self.room.connections, {"type": "presence", "content": 5})
        self.fill(1)
        await self.rows(tab, "message")

    async def test_resending(self):
        """What is sent again, since it did not come back, is drawn as such."""
        tab = await self.wide_tab()
        with mock.patch.object(self.room, "publish", mock.AsyncMock()):  # it is lost
            await tab.type("hello\n")
            await self.rows(tab, "send")
            await tab.click("#unplug")
            await until(lambda: not self.room.connections)
        await tab.click("#unplug")
        await self.rows(tab, "welcome", "resend", "echo")

    async def test_counters(self):
        """Frames and bytes, up and down, and their ratio are what really passed."""
        tab = await self.wide_tab()
        async with self.client() as other:
            await tab.type("żółć 👋\nhello\n" + "x" * 2001 + "\n")
            await other.say("hi")
            await self.rows(tab, "message")
            await tab.until(says("#wire", "2 online"))
            observed = []
            for way in "Sent", "Received":
                frames = tab.seen(f"Network.webSocketFrame{way}")
                payloads = [frame["params"]["response"]["payloadData"] for frame in frames]
                observed += [len(payloads), sum(len(payload.encode()) for payload in payloads)]
            up, up_bytes, down, down_bytes = observed
            shown = (await tab.evaluate("document.querySelector('#counts').innerText")).split("\n")
            self.assertEqual(shown[0], f"↑ {up} frames · {up_bytes:,} bytes")
            ratio = f" · {down / up:.1f} for each sent"
            self.assertEqual(shown[1], f"↓ {down} frames · {down_bytes:,} bytes{ratio}")

    async def test_row_opens(self):
        """A row opens on a click or Enter and shows its frame, with a meaning for each field."""
        tab = await self.wide_tab()
        await tab.type("hello\n")
        await self.rows(tab, "send", "echo")
        await tab.evaluate("document.querySelector('[data-kind=echo] summary').focus()")
        await tab.press("Enter")
        await tab.until(says("[data-kind=echo] pre", '"hello"'))
        frames = tab.seen("Network.webSocketFrameReceived")
        data = [frame["params"]["response"]["payloadData"] for frame in frames]
        (data,) = (text for text in data if json.loads(text)["type"] == "message")
        text = await tab.evaluate("document.querySelector('[data-kind=echo] pre').innerText")
        self.assertTrue(text.startswith(data))
        self.assertIn(f"{len(data.encode())} bytes on the wire", text)
        for key, value in json.loads(data).items():
            self.assertRegex(text, f"{json.dumps(key)}: {re.escape(json.dumps(value))}  [a-z]")
        await tab.click("[data-kind=send] summary")
        await tab.until(says("[data-kind=send] pre", '"hello"'))

    async def test_open_row_stays(self):
        """While a row is open, what comes does not scroll it away."""
        tab = await self.wide_tab()
        await tab.size(1280, 600)
        await tab.type("hello\n")
        await self.rows(tab, "send", "echo")
        await tab.evaluate("document.querySelector('[data-kind=echo] summary').click()")
        await tab.until(says("[data-kind=echo] pre", '"hello"'))
        place = "document.querySelector('[data-kind=echo]').getBoundingClientRect().top"
        await tab.until("document.querySelector('[data-kind=echo] pre').checkVisibility()")
        before = await tab.evaluate(f"new Promise(d => setTimeout(d, 100)).then(() => {place})")
        self.fill(8)
        await self.rows(tab, *["message"] * 8)
        self.assertEqual(await tab.evaluate(place), before)

    async def test_storm_of_many(self):
        """A run of messages in a storm says how many spoke, or who it was."""
        tab = await self.wide_tab()
        await tab.evaluate("document.querySelector('#pause').click()")
        for number in range(20):
            self.room.deliver(message("x", f"a{number}") | {"username": f"Port{number}"})
        await tab.until(f"{TEXTS}.length === 20")
        await tab.evaluate("document.querySelector('#pause').click()")
        await tab.until(says("#wire", "10 people spoke"))
        await tab.evaluate("document.querySelector('#pause').click()")
        for number in range(20):
            self.room.deliver(message("x", f"b{number}") | {"username": "Port7"})
        await tab.until(f"{TEXTS}.length === 40")
        await tab.evaluate("document.querySelector('#pause').click()")
        await tab.until(says("#wire", "Port7 spoke"))

    async def test_pause(self):
        """While the drawing pauses the conversation goes on, and going on catches up."""
        tab = await self.wide_tab()
        await self.rows(tab, "welcome")
        await tab.click("#pause")
        self.fill(3)
        await tab.until(f"{TEXTS}.length === 3")
        self.assertNotIn("message", await tab.evaluate(KINDS))
        await tab.click("#pause")
        await self.rows(tab, "message", "message", "message")

    async def test_slow(self):
        """Slowly, one event is drawn every 700 ms; the conversation is not delayed."""
        tab = await self.tabs.enter_async_context(self.tab(before=FAST))
        await tab.size(1280, 800)
        await tab.until(f"{KINDS}.includes('presence')")
        await tab.click("#slow")
        await tab.evaluate("asked.length = 0")
        self.fill(3)
        await tab.until(f"{TEXTS}.length === 3")
        await self.rows(tab, "message", "message", "message")
        self.assertEqual(await tab.evaluate("asked.filter(ms => ms === 700).length"), 3)

    async def test_lit(self):
        """Pointing at a message lights its rows on the wire, and a row its message."""
        tab = await self.wide_tab()
        await tab.type("hello\n")
        await self.rows(tab, "send", "echo")
        lit = look(".lit", "e.dataset.kind")
        point = "dispatchEvent(new PointerEvent('pointerover', {bubbles: true}))"
        for start in "#messages .text", "[data-kind=echo] summary":
            await tab.evaluate(f"document.querySelector('{start}').{point}")
            self.assertEqual(await tab.evaluate(lit), ["own", "send", "echo"])
            await tab.evaluate(f"document.querySelector('h1').{point}")
            self.assertEqual(await tab.evaluate(lit), [])

    async def test_polling(self):
        """What asking once a second would have cost is told from the page's own load."""
        tab = await self.tabs.enter_async_context(self.tab(before=LATER))
        await tab.size(1280, 800)
        pattern = "Asking once a second would have taken 6[0-9] requests and at least [0-9]+ kB"
        polling = "document.querySelector('#polling').innerText"
        await tab.until("document.querySelector('#frames-down').innerText.startsWith('2')")
        self.assertEqual(await tab.evaluate(polling), "")
        await tab.evaluate("window.later = 60_000")
        await tab.until(f"{polling} !== ''")
        self.assertRegex(await tab.evaluate(polling), pattern)
        self.assertRegex(await tab.evaluate(polling), "This took 1 request and [0-9]+ frames?")
        await tab.evaluate("document.querySelector('[data-kind=request] summary').click()")
        less = "e.transferSize - e.encodedBodySize"
        load = "performance.getEntriesByType('navigation')"
        measured = await tab.evaluate(f"(([e]) => {less})({load})")
        await tab.until(says("[data-kind=request] pre", f"measured {measured} bytes"))

    async def test_guide(self):
        """One line says what to try next, goes on when that has happened, and can be put away."""
        tab = await self.wide_tab()
        for words in "second window", "Say something", "other window speak", "Cut the line":
            await tab.until(says("#guide", words))
            if words == "second window":
                other = await self.tabs.enter_async_context(self.client())
            elif words == "Say something":
                await tab.type("hello\n")
            elif words == "other window speak":
                await other.say("hello")
        await tab.evaluate("document.querySelector('#guide button').click()")
        await tab.reload()
        self.assertFalse(await tab.evaluate("document.querySelector('#guide').checkVisibility()"))
        await tab.evaluate("localStorage.clear()")

    async def test_lanes(self):
        """The heads of the lanes stand over their lanes at every width."""
        tab = await self.wide_tab()
        middle = "(b => b.x + b.width / 2)(e.getBoundingClientRect())"
        for width in 360, 700, 1280, 1920:
            await tab.size(width, 800)
            await tab.evaluate("document.querySelector('#panel').hidden = false")
            heads = await tab.evaluate(look("#lanes span", middle))
            ends = "(b => [b.left, b.right])(e.getBoundingClientRect())"
            ((left, right), *_) = await tab.evaluate(look("[data-kind=welcome] .down", ends))
            self.assertAlmostEqual(heads[0], left, delta=2)
            self.assertAlmostEqual(heads[1], right, delta=2)

    async def test_storm(self):
        """A storm folds into few rows, of which the newest 200 stay."""
        tab = await self.wide_tab()
        for burst in range(30):
            self.fill(100, start=burst * 100)
        self.fill(1, start=3000)
        await tab.until(f"{TEXTS}.includes('3000')")
        self.assertTrue(await tab.evaluate(says("#wire", "× message, pushed")))
        self.assertLess(await tab.evaluate(f"{KINDS}.length"), 100)
        for number in range(3001, 3001 + 240, 8):
            self.fill(8, start=number)
            await tab.until(f"{TEXTS}.includes('{number + 7}')")
        self.assertEqual(await tab.evaluate(f"{KINDS}.length"), 200)

    async def test_panel(self):
        """The wire is open beside the log, behind a button where that is narrow, and stays as
        it was left.
        """
        visible = "document.querySelector('#wire').checkVisibility()"
        async with self.tab() as tab:
            await tab.size(360, 640)
            await tab.until(f"!{visible}")
            await tab.size(1280, 800)
            await tab.until(visible)
            await tab.click("#wire-toggle")
            self.assertFalse(await tab.evaluate(visible))
            await tab.reload()
            self.assertFalse(await tab.evaluate(visible))
            await tab.size(360, 640)
            await tab.click("#wire-toggle")
            self.assertTrue(await tab.evaluate(visible))

    async def test_sentences(self):
        """Screen readers get each row as a sentence."""
        tab = await self.wide_tab()
        await tab.type("hello\n")
        await self.rows(tab, "send", "echo")
        sentences = await tab.evaluate(look("#wire summary", "e.firstChild.textContent"))
        for sentence in sentences:
            self.assertRegex(sentence, "^(This tab|The server): .+[.]$")
        hidden = look("#wire .leg", "e.ariaHidden")
        self.assertEqual(set(await tab.evaluate(hidden)), {"true"})


class Pictures(BrowserCase):
    async def test_pictures(self):
        """A conversation of three says the same in both colour schemes, wide and narrow; with
        CHAT_SCREENSHOTS set to a folder, its pictures are left there.
        """
        async with self.tab() as tab, self.client() as first, self.client() as second:
            await tab.until("document.querySelector('#online').textContent === '3'")
            await first.say("Good morning! Does anybody see this?")
            await tab.until(f"{TEXTS}.length === 1")
            await tab.type("Yes. You sent one frame, and the server pushed it to all of us.\n")
            await tab.until(f"{STATES}[0] === 'delivered'")
            await second.say("I did not ask for it, and still it came. So that is push 👋")
            await tab.until(f"{TEXTS}.length === 3")
            texts = await tab.evaluate(TEXTS)
            for shape, width, height in ("", 1280, 720), ("-narrow", 360, 640):
                await tab.size(width, height)
                wire = "document.querySelector('#wire').checkVisibility()"
                if shape:
                    await tab.until("!" + wire)
                    await tab.click("#wire-toggle")
                await tab.until(wire)
                for scheme in "light", "dark":
                    features = {"prefers-color-scheme": scheme, "prefers-reduced-motion": "reduce"}
                    features = [{"name": n, "value": value} for n, value in features.items()]
                    await tab.call("Emulation.setEmulatedMedia", features=features)
                    self.assertEqual(await tab.evaluate(TEXTS), texts)
                    picture = await tab.call("Page.captureScreenshot", format="png")
                    if folder := os.environ.get("CHAT_SCREENSHOTS"):
                        path = pathlib.Path(folder, f"{scheme}{shape}.png")
                        path.write_bytes(base64.b64decode(picture["data"]))


class PageAndProgram(ProgramCase, unittest.IsolatedAsyncioTestCase):
    """The page beside a real server that is stopped, killed and started again."""

    async def asyncSetUp(self):
        asyncio.get_running_loop().slow_callback_duration = PATIENCE  # servers take time to start

    def tab(self, port, **options):
        return Tab(shared_browser(), f"http://127.0.0.1:{port}/", **options)

    async def test_restart(self):
        """Across a clean restart nothing is lost or doubled, and what was typed meanwhile goes
        out in order, with the nonces that it had.
        """
        process, port, _ = self.start_serving()
        async with self.tab(port) as first, self.tab(port) as second:
            await first.type("before\n")
            for tab in first, second:
                await tab.until(f"{TEXTS}.length === 1 && {STATES}.every(s => s === 'delivered')")
            process.terminate()
            await first.until(says("#status", "The server was stopped"))
            await first.type("one\ntwo\nthree\n")
            await first.until(f"{STATES}.filter(state => state === 'waiting').length === 3")
            nonces = (await first.evaluate(IDS))[1:]
            process.wait()
            process, _, _ = self.start_serving(port=port)
            for tab in first, second:
                await tab.until(f"{TEXTS}.length === 4 && {STATES}.every(s => s === 'delivered')")
                self.assertEqual(await tab.evaluate(TEXTS), ["before", "one", "two", "three"])
                self.assertTrue(await tab.evaluate(says("#messages .divider", "may be missing")))
            self.assertEqual([frame["nonce"] for frame in first.sent()[1:]], nonces)

    async def test_kill(self):
        """Across a crash nothing is doubled or stuck, whatever was under way."""
        process, port, _ = self.start_serving()
        async with self.tab(port) as first, self.tab(port) as second:
            said = []
            for number in range(3):
                for tab in first, second:
                    said += [f"{number} {tab is first}"]
                    await tab.type(said[-1] + "\n")
                process.kill()
                process.wait()
                process, _, _ = self.start_serving(port=port)
            for tab in first, second:
                await tab.until(f"{STATES}.length === 3 && {STATES}.every(s => s === 'delivered')")
                shown = await tab.evaluate(TEXTS)
                self.assertEqual(len(shown), len(set(shown)))
                self.assertLessEqual(set(shown), set(said))


README = (HERE / "README.md").read_text(encoding="utf-8")


def listings(language):
    """Return the code blocks of one language in the README, in order."""
    blocks = re.findall(rf"^( *)```{language}\n(.*?)^ *```$", README, re.MULTILINE | re.DOTALL)
    return [textwrap.dedent(block) for _, block in blocks]


def need(program):
    """Return the path of a program, or skip the test."""
    return shutil.which(program) or skip(f"{program} is not installed")


def free_port():
    """Return a port that is free now, for a program that cannot choose one itself."""
    with socket.create_server(("127.0.0.1", 0)) as probe:
        return probe.getsockname()[1]


class ReadmeCase(ProgramCase, unittest.IsolatedAsyncioTestCase):
    """Runs what the README prints, in a copy of the project."""

    def setUp(self):
        self.folder = self.enterContext(tempfile.TemporaryDirectory(ignore_cleanup_errors=True))
        for name in "chat.py", "index.html", "requirements.txt":
            shutil.copy(HERE / name, self.folder)

    async def asyncSetUp(self):
        asyncio.get_running_loop().slow_callback_duration = PATIENCE  # programs take time to start

    def use_this_python(self):
        """Let .venv be the environment that runs the tests, rather than install it again."""
        if not pathlib.Path(sys.prefix, "bin", "python").exists():
            skip("the README's sh blocks need a virtual environment with a bin folder")
        pathlib.Path(self.folder, ".venv").symlink_to(sys.prefix)

    def sh(self, script, port=8080):
        """Start a script in the copy, on another port than 8080; return its process."""
        process = subprocess.Popen(
            ["bash", "-ec", script.replace("8080", f"{port}")],
            cwd=self.folder,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            errors="replace",  # curl shows the bytes of a frame
            start_new_session=True,
        )
        for end in process.stdin, process.stdout, process.stderr:
            self.addCleanup(end.close)
        self.addCleanup(process.wait)
        self.addCleanup(self.end, process)
        return process

    def end(self, process):
        """Kill a script and what it started."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)

    def until_served(self, process):
        """Wait until a script's server runs; return the lines that it printed before."""
        lines = [process.stdout.readline()]
        while "Ctrl-C" not in lines[-1]:
            self.assertTrue(lines[-1], lines)
            lines.append(process.stdout.readline())
        return "".join(lines)


@unittest.skipIf(sys.platform == "win32", "the README's sh blocks are not for Windows")
class Readme(ReadmeCase):
    def block(self, words):
        """Return the sh block that contains these words."""
        (found,) = [block for block in listings("sh") if words in block]
        return found

    def test_sizes(self):
        """It begins with the true line counts, and is itself not too long."""
        for name in "chat.py", "index.html":
            lines = len((HERE / name).read_text(encoding="utf-8").splitlines())
            told = re.search(rf"([0-9]+)\s+lines\s+of\s+[A-Za-z]+\s+in\s+\[`{name}`\]", README)
            self.assertEqual((name, int(told[1])), (name, lines))
        self.assertLess(len(README.splitlines()), 250)

    def test_all_blocks_are_known(self):
        """Each sh block has its test here; the one that runs the tests is run by .ci/run."""
        known = ["&& .venv/bin/python chat.py", "unittest", "--debug", "curl", "-m websockets"]
        known += ["--host 0.0.0.0", "install redis"]
        self.assertEqual(len(listings("sh")), len(known))
        for words in known:
            self.block(words)

    async def test_run(self):
        """The command that runs it does its whole set-up, from nothing."""
        port = free_port()
        script = self.block("&& .venv/bin/python chat.py").replace(
            "chat.py", f"chat.py --port {port}"
        )
        said = await asyncio.to_thread(self.until_served, self.sh(script))
        self.assertIn(f"http://localhost:{port} ", said)

    async def test_debug(self):
        """With --debug the terminal shows handshakes, frames and the close."""
        self.use_this_python()
        port = free_port()
        server = self.sh(self.block("--debug").replace("--debug", f"--debug --port {port}"))
        self.until_served(server)
        async with Client(port) as client:
            await client.say("hello")
            await client.contents(1)
        os.killpg(server.pid, signal.SIGTERM)
        log = server.communicate(timeout=PATIENCE)[1]
        for sign in "GET /ws", "101 Switching Protocols", "TEXT", "CLOSE":
            self.assertIn(sign, log)

    async def test_curl(self):
        """The handshake by hand shows the answer to the key, and the welcome."""
        need("curl")
        _, port, _ = self.start_serving()
        shown, _ = await asyncio.to_thread(self.sh(self.block("curl"), port).communicate)
        self.assertIn("101 Switching Protocols", shown)
        self.assertIn("Sec-WebSocket-Accept: s3pPLMBiTxaQ9kYGzzhZRbK+xOo=", shown)
        self.assertIn("welcome", shown)

    async def test_terminal(self):
        """The library's own client joins, speaks and leaves."""
        self.use_this_python()
        _, port, _ = self.start_serving()
        async with Client(port) as friend:
            client = self.sh(self.block("-m websockets"), port)
            client.stdin.write('{"content": "hello"}\n')
            client.stdin.flush()
            self.assertEqual(await friend.contents(1), ["hello"])
            shown, _ = await asyncio.to_thread(client.communicate, "")
        self.assertIn("Welcome!", shown)

    async def test_whole_network(self):
        """--host 0.0.0.0 serves all addresses."""
        self.use_this_python()
        port = free_port()
        block = self.block("--host 0.0.0.0").replace("0.0.0.0", f"0.0.0.0 --port {port}")
        self.until_served(self.sh(block))
        async with Client(port) as client:
            self.assertEqual(client.welcome["online"], 1)

    async def test_nginx(self):
        """Behind nginx with the README's configuration, two tabs talk over wss:."""
        nginx, openssl, port, folder = need("nginx"), need("openssl"), free_port(), self.folder
        _, upstream, _ = self.start_serving()
        key, certificate = f"{folder}/key.pem", f"{folder}/certificate.pem"
        command = "req -x509 -newkey rsa:2048 -nodes -subj /CN=localhost"
        making = self.sh(f"exec {openssl} {command} -keyout {key} -out {certificate}")
        self.assertEqual(await asyncio.to_thread(making.wait), 0)
        (server,) = listings("nginx")
        for old, new in {
            "listen 443 ssl": f"listen 127.0.0.1:{port} ssl",
            "/etc/ssl/chat.example.pem": certificate,
            "/etc/ssl/chat.example.key": key,
            "127.0.0.1:8080": f"127.0.0.1:{upstream}",
        }.items():
            self.assertIn(old, server)
            server = server.replace(old, new)
        paths = "".join(
            f"{name}_temp_path {folder};"
            for name in ("client_body", "proxy", "fastcgi", "uwsgi", "scgi")
        )
        pathlib.Path(folder, "nginx.conf").write_text(
            f"daemon off; pid {folder}/nginx.pid; error_log {folder}/error.log; events {{}}\n"
            f"http {{ access_log off; {paths}\n{server}\n}}\n"
        )
        proxy = self.sh(f"exec {nginx} -e {folder}/error.log -c {folder}/nginx.conf")
        await until(lambda: proxy.poll() is not None or is_open(port))
        url = f"https://localhost:{port}/"
        ignoring = {"ready": ONLINE, "ignore_certificate": True}
        async with (
            Tab(shared_browser(), url, **ignoring) as first,
            Tab(shared_browser(), url, **ignoring) as second,
        ):
            await first.type("hello\n")
            await second.until(f"{TEXTS}.includes('hello')")
            await second.type("hello back\n")
            await first.until(f"{TEXTS}.includes('hello back')")
            created = first.seen("Network.webSocketCreated")[0]["params"]["url"]
            self.assertEqual(created, f"wss://localhost:{port}/ws")


def is_open(port):
    """Tell whether a server listens there."""
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


@unittest.skipIf(sys.platform == "win32", "Redis is not for Windows")
class RedisStreams(ReadmeCase):
    """The README's chat_redis.py: two servers, one Redis."""

    def setUp(self):
        super().setUp()
        need("redis-server")
        try:
            __import__("redis")
        except ImportError:
            skip("the redis package is not installed")
        self.use_this_python()
        (listing,) = listings("python")
        self.assertLessEqual(len(listing.splitlines()), 40)
        self.redis_port = free_port()
        url = f"redis://localhost:{self.redis_port}"
        listing = listing.replace("redis://localhost", url)
        pathlib.Path(self.folder, "chat_redis.py").write_text(listing)

    async def redis(self):
        """Start Redis, with what it kept on disk when it last ran."""
        options = f"--port {self.redis_port} --bind 127.0.0.1 --dir {self.folder} --appendonly yes"
        process = self.sh(f"exec redis-server {options}")
        await until(lambda: is_open(self.redis_port))
        return process

    async def server(self, port=0):
        """Start a chat server; return its process and its port."""
        process = self.sh(f"exec .venv/bin/python chat_redis.py --host 127.0.0.1 --port {port}")
        return process, int(re.search(r":(\d+)", self.until_served(process))[1])

    async def test_one_order(self):
        """Tabs on two servers see all messages once, in one order."""
        await self.redis()
        (_, one), (_, two) = await self.server(), await self.server()
        async with Client(one) as first, Client(two) as second:
            for number in range(15):
                await first.say(f"first {number}")
                await second.say(f"second {number}", nonce=f"{number}")
            order = await first.contents(30)
            self.assertEqual(await second.contents(30), order)
            self.assertEqual(len(set(order)), 30)

    async def test_one_server_dies(self):
        """A tab whose server is killed resumes on the other, and nothing is lost or doubled."""
        await self.redis()
        (doomed, one), (_, two) = await self.server(), await self.server()
        async with Client(one) as first, Client(two) as second:
            await first.say("seen", nonce="a")
            seen = (await first.frame("message"))["id"]
            doomed.kill()
            await second.say("missed")
            self.assertEqual(await second.contents(2), ["seen", "missed"])
            async with Client(two, after=seen) as back:
                history = [message["content"] for message in back.welcome["history"]]
                self.assertEqual((history, back.welcome["gap"]), (["missed"], False))
                await back.say("seen", nonce="a")
                await back.say("here again")
                self.assertEqual(await second.contents(1), ["here again"])

    async def test_server_restarts(self):
        """A server that starts fills its history from the stream before anybody joins."""
        await self.redis()
        server, port = await self.server()
        async with Client(port) as client:
            await client.say("before")
            before = (await client.frame("message"))["id"]
        server.terminate()
        server.wait()
        self.assertEqual(server.returncode, 0)
        _, port = await self.server(port)
        async with Client(port, after=before) as client:
            self.assertEqual((client.welcome["history"], client.welcome["gap"]), ([], False))

    async def test_redis_goes_and_comes_back(self):
        """While Redis is away tabs stay connected and are told so; later all goes on as before."""
        redis = await self.redis()
        (_, one), (_, two) = await self.server(), await self.server()
        async with Client(one) as first, Client(two) as second:
            await first.say("before")
            self.assertEqual(await second.contents(1), ["before"])
            redis.terminate()
            redis.wait()
            await first.say("lost", nonce="lost")
            error = await first.frame("error")
            self.assertEqual(error["nonce"], "lost")
            self.assertIn("Send it again", error["content"])
            await self.redis()
            frame = error
            while frame["type"] == "error":
                await first.say("retried", nonce="retried")
                frame = await first.frame("error", "message")
            await second.say("after")
            self.assertEqual(await second.contents(2), ["retried", "after"])
