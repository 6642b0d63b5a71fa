"""Tests of the chat: what its users and the README are promised, over real connections."""

import asyncio
import base64
import contextlib
import functools
import hashlib
import http.client
import importlib.metadata
import importlib.util
import itertools
import json
import logging
import os
import pathlib
import random
import re
import runpy
import shutil
import signal
import socket
import ssl
import subprocess
import sys
import tempfile
import textwrap
import threading
import time
import tomllib
import unittest
import zipfile
from datetime import UTC, datetime, timedelta
from unittest import mock

import websockets
from websockets.sync.client import connect

import chat

HERE = pathlib.Path(__file__).parent
README = (HERE / "README.md").read_text(encoding="utf-8")
PATIENCE = 10  # seconds until something awaited counts as missing
SPEED, DELAY = chat.MESSAGES_PER_SECOND, chat.PRESENCE_DELAY  # which most tests do not wait for


def skip(reason):
    """Skip the calling test, or fail it where CHAT_NO_SKIPS is set."""
    if os.environ.get("CHAT_NO_SKIPS"):
        raise AssertionError(f"skips are not allowed here: {reason}")
    raise unittest.SkipTest(reason)


def need(program):
    """Return the path of a program, or skip the test."""
    return shutil.which(program) or skip(f"{program} is not installed")


def free_port():
    """Return a port that is free now, for a program that cannot choose one itself."""
    with socket.create_server(("127.0.0.1", 0)) as probe:
        return probe.getsockname()[1]


def is_open(port):
    """Tell whether a server listens there."""
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


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


class Client:
    """A client of the chat: `async with Client(port) as client`."""

    def __init__(self, port, after=None, **options):
        scheme = "wss" if options.get("ssl") else "ws"
        self.url = f"{scheme}://127.0.0.1:{port}/ws" + (f"?after={after}" if after else "")
        self.options = options

    async def __aenter__(self):
        self.options |= {"proxy": None, "max_queue": None}  # or closing waits for what is unread
        self.connection = await websockets.connect(self.url, **self.options)
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
                self.payload = await self.connection.recv()
                frame = json.loads(self.payload)
                if not types or frame["type"] in types:
                    return frame

    async def contents(self, count):
        """Return the contents of the next messages."""
        return [(await self.frame("message"))["content"] for _ in range(count)]

    async def say(self, content, **more):
        await self.connection.send(json.dumps({"content": content, **more}))

    async def close_code(self):
        """Wait until the server has closed the connection; return the code that it gave."""
        async with asyncio.timeout(PATIENCE):
            await self.connection.wait_closed()
        return self.connection.close_code


class CountingConnection(chat.Connection):
    """A connection that records its writes and what each turn reads; `made` has all of a test."""

    def connection_made(self, transport):
        self.made.append(self)
        self.below, self.reads = mock.Mock(wraps=transport), [0]
        super().connection_made(self.below)

    def data_received(self, data):
        self.reads[-1] += len(data)
        asyncio.get_running_loop().call_soon(self.reads.append, 0)
        super().data_received(data)


class ServerCase(unittest.IsolatedAsyncioTestCase):
    """A server of its own for each test, which must log no warning and leave no task."""

    async def asyncSetUp(self):
        self.enterContext(self.assertNoLogs(level=logging.WARNING))
        asyncio.get_running_loop().slow_callback_duration = PATIENCE  # slow is not wrong
        self.addAsyncCleanup(self.assert_nothing_left)
        CountingConnection.made = []
        self.set(Connection=CountingConnection, MESSAGES_PER_SECOND=1_000, PRESENCE_DELAY=0.02)
        self.room = chat.Room()
        self.server, self.port = await self.serve()

    def set(self, **constants):
        """Give constants of chat.py these values until the test ends."""
        self.enterContext(mock.patch.multiple(chat, **constants))

    async def assert_nothing_left(self):
        self.assertEqual((self.room.connections, self.room.names), (set(), set()))
        self.assertIsNone(self.room.presence.timer)  # nobody is there to be told
        await until(lambda: asyncio.all_tasks() == {asyncio.current_task()})

    async def serve(self, port=0, **options):
        """Serve the room, with options of websockets.serve; return the server and its port."""
        with mock.patch.object(websockets, "serve", functools.partial(websockets.serve, **options)):
            server = await chat.start(self.room, "127.0.0.1", port)
        self.addAsyncCleanup(self.stop, server)
        return server, server.sockets[0].getsockname()[1]

    async def stop(self, server):
        server.close()
        async with asyncio.timeout(PATIENCE):
            await server.wait_closed()

    async def join(self, **options):
        """Return a client that stays until the test ends."""
        return await self.enterAsyncContext(Client(self.port, **options))

    def fill(self, count, start=0, more=""):
        """Deliver many messages, all in one turn of the event loop."""
        for number in range(start, start + count):
            self.room.deliver(message(f"{number}{more}", f"{number}"))

    async def raw(self, data, port=None, cut=False):
        """Send bytes to the server; return the bytes that it answers until either end closes."""
        reader, writer = await asyncio.open_connection("127.0.0.1", port or self.port)
        with contextlib.closing(writer), contextlib.suppress(ConnectionError):  # a reset is an end
            writer.write(data)
            if cut:
                writer.transport.abort()
            async with asyncio.timeout(PATIENCE):
                return await reader.read()
        return b""

    async def http(self, line, **headers):
        """Send a request; return its status, headers and body."""
        answer = await self.raw(request(line, **{"Host": f"127.0.0.1:{self.port}"} | headers))
        head, _, body = answer.decode().partition("\r\n\r\n")
        status, *fields = head.split("\r\n")
        return int(status.split()[1]), [tuple(field.split(": ", 1)) for field in fields], body


UPGRADE = {"Connection": "Upgrade", "Upgrade": "websocket", "Sec_WebSocket_Version": "13"}
UPGRADE["Sec_WebSocket_Key"] = "dGhlIHNhbXBsZSBub25jZQ=="


def request(line, **headers):
    """Return the bytes of an HTTP request."""
    lines = [f"{name.replace('_', '-')}: {value}" for name, value in headers.items()]
    return "\r\n".join([f"{line} HTTP/1.1", *lines, "", ""]).encode()


def upgrade_request(port):
    """Return the bytes of an opening handshake."""
    return request("GET /ws", Host=f"127.0.0.1:{port}", **UPGRADE)


def masked(payload, first=0x81):
    """Return the bytes of a client's frame, masked with zeros (RFC 6455, section 5.2)."""
    size = len(payload)
    length = bytes([0x80 | size]) if size < 126 else b"\xfe" + size.to_bytes(2)
    return bytes([first]) + length + bytes(4) + payload


GOOD_FRAMES = [  # with the content and the nonce, or None for the id, that come back
    (json.dumps({"content": "hello", "nonce": "é" * 64}), "hello", "é" * 64),
    (r'{"content": "\n  a\n\n żółć 👋 \t"}', "a\n\n żółć 👋", None),
    ('{"content": " ' + r"\ud83d\ude00" * 2000 + ' "}', "😀" * 2000, None),
    ('{"content": "hi", "type": "error", "username": "root", "id": "a", "online": 7}', "hi", None),
]


class Protocol(ServerCase):
    async def test_message(self):
        """A message goes to everyone, with the sender's nonce and what the server alone can say."""
        ids = set()
        async with Client(self.port) as first, Client(self.port) as second:
            for payload, content, nonce in GOOD_FRAMES:
                with self.subTest(payload[:60]):
                    await first.connection.send(payload)
                    got = await first.frame("message")
                    self.assertEqual(got, await second.frame("message"))
                    self.assertIn(json.dumps(content, ensure_ascii=False), first.payload)
                    id, said = got.pop("id"), got.pop("time")
                    expected = {"type": "message", "username": first.name, "content": content}
                    self.assertEqual(got, expected | {"nonce": nonce or id})
                    self.assertRegex(said, r"^\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}\+00:00$")
                    age = datetime.now(UTC) - datetime.fromisoformat(said)
                    self.assertLess(abs(age), timedelta(seconds=PATIENCE))
                    self.assertEqual(len(id), 16)  # 96 bits, so never given twice
                    ids.add(id)
        self.assertEqual(len(ids), len(GOOD_FRAMES))

    async def test_shared_port(self):
        """Hosts' clients that share a port get different names."""
        for taken in 1, 2:
            end = socket.create_connection(("127.0.0.1", self.port))
            name = f"Port{end.getsockname()[1]}"
            names = [name, f"{name}-2", f"{name}-3"]
            self.room.names.update(names[:taken])  # as of other hosts' clients
            async with Client(self.port, sock=end) as client:
                self.assertEqual(client.name, names[taken])
            self.room.names.difference_update(names[:taken])

    async def test_one_order(self):
        """The live messages follow the history without gap or overlap, however others talk."""

        async def talk():  # in each turn of the event loop
            for number in itertools.count():
                self.fill(1, start=number)
                await asyncio.sleep(0)

        self.addCleanup(asyncio.create_task(talk()).cancel)
        for _ in range(5):
            async with Client(self.port) as client:
                seen = client.welcome["history"]
                seen += [await client.frame("message") for _ in range(20)]
                start = int(seen[0]["id"])
                order = [f"{number}" for number in range(start, start + len(seen))]
                self.assertEqual([message["id"] for message in seen], order)

    async def test_welcome(self):
        """The first frame has the last 50 messages, or those after ID, and tells of a gap."""
        rubbish = ["never", "%00", "%ff%fe", "a&after=50", "%5B" * 99, "x" * 4000, "💥", "..//"]
        witness = await self.join()
        self.fill(52)
        pushed = [await witness.frame("message") for _ in range(52)]
        self.assertEqual([frame["id"] for frame in pushed], [f"{n}" for n in range(52)])
        cases = {None: (2, False), "2": (3, False), "50": (51, False), "51": (52, False)}
        cases |= dict.fromkeys(["0", "1", *rubbish], (2, True))
        for after, (start, gap) in cases.items():
            async with Client(self.port, after=after) as client:
                name = f"Port{client.port}"
                content = f"Welcome! {name} is your name here, 2 online."
                expected = {"type": "welcome", "username": name, "content": content}
                expected |= {"online": 2, "history": pushed[start:], "gap": gap}
                self.assertEqual(client.welcome, expected, after)
            await until(lambda: len(self.room.connections) == 1)

    async def test_said_again(self):
        """A remembered message is not pushed again, but nobody can touch it by its nonce or id."""
        first, second = await self.join(), await self.join()
        await first.say("mine", nonce="a")
        mine = await first.frame("message")
        await first.say("mine", nonce="a")
        await first.say("and then")
        self.assertEqual(await first.contents(1), ["and then"])
        said = [("mine", "a"), ("other", "a"), ("mine", "b"), ("other", mine["id"])]
        for content, nonce in said:
            await second.say(content, nonce=nonce, id=mine["id"])
        frames = [await first.frame("message") for _ in said[1:]]
        got = [(frame["username"], frame["content"], frame["nonce"]) for frame in frames]
        self.assertEqual(got, [(second.name, *names) for names in said[1:]])
        self.assertNotIn(mine["id"], [frame["id"] for frame in frames])
        self.assertEqual(self.room.history[0], mine)
        self.fill(50)
        await first.contents(50)
        await first.say("mine", nonce="a")  # which is forgotten, so this is another one
        self.assertEqual(await first.contents(1), ["mine"])

    async def test_last_words(self):
        """Who says something and leaves at once is heard."""
        clock = mock.Mock(monotonic=itertools.count(0.0, 2.0).__next__)  # nobody is too fast
        self.set(MESSAGES_PER_SECOND=1, time=clock)
        listener, goodbye = await self.join(), masked(b"", first=0x88)
        for said in ["last words"], ["first words", "last words"]:
            leaving = await self.join()
            for content in said[:-1]:
                await leaving.say(content)
                self.assertEqual(await listener.contents(1), [content])
            last = masked(json.dumps({"content": said[-1]}).encode())
            leaving.connection.transport.write(last + goodbye)
            self.assertEqual(await listener.contents(1), [said[-1]])

    async def test_presence(self):
        """Everyone is told who came and went, and how many are online; nobody keeps old news."""
        async with Client(self.port) as gone:
            await gone.frame("presence")
        await until(lambda: not self.room.connections)
        async with Client(self.port) as first:
            frames = [await first.frame("presence")]
            async with Client(self.port) as second:
                frames.append(await first.frame("presence"))
            frames.append(await first.frame("presence"))
        names = [(first.name, "joined", 1), (second.name, "joined", 2), (second.name, "left", 1)]
        for frame, (name, news, online) in zip(frames, names, strict=True):
            expected = {"type": "presence", "username": "server", "content": f"{name} {news}."}
            self.assertEqual(frame, expected | {"online": online})

    async def test_full_room(self):
        """Who comes to a full room gets 1013 (try again later) instead of a welcome."""
        self.room.capacity = 1_000
        with mock.patch.object(self.room, "connections", range(1_000)):
            async with websockets.connect(f"ws://127.0.0.1:{self.port}/ws", proxy=None) as late:
                await late.wait_closed()
        self.assertEqual(late.close_code, 1013)

    async def test_presence_frames(self):
        """News comes after 250 ms, of at most three by name, and a sign of life after 20 s."""
        sentences = {"": "+A -A -B +B", "A, B, C joined.": "+A +B +C"}
        sentences |= {"4 people left.": "-A -B -C -D", "A joined. B left.": "-B +A"}
        self.set(PRESENCE_DELAY=DELAY)
        loop, presence = asyncio.get_running_loop(), self.room.presence
        client = await self.join()
        await client.frame("presence")
        for sentence, changes in sentences.items():
            heartbeat = presence.timer
            with mock.patch.object(loop, "call_later", wraps=loop.call_later) as call_later:
                for sign, name in changes.split():
                    presence.tell(name, {"+": "joined", "-": "left"}[sign])
                presence.timer.cancel()
                presence.push()
            self.assertEqual([call.args[0] for call in call_later.mock_calls], [0.25, 20])
            self.assertTrue(heartbeat.cancelled())  # since news came before
            self.assertEqual((await client.frame("presence"))["content"], sentence)


NO_OBJECTS = [b'{"content": "hello"}', "", "hello", '{"content": "hel', "null", "5", r'"\ud800"']
NO_OBJECTS += ['[{"content": "hi"}]', "[" * 10_000, '{"a":' * 5_000, "x" * (32 * 1024), "9" * 5_000]
BAD_CONTENTS = [None, 5, ["hello"], "", " \n\t\u3000", "a" * 2001, "\ud800", "a\udfff"]
BAD_NONCES = [None, 5, ["a"], "", "a" * 65, "\ud800"]
# Close frames, a reserved bit, an unknown opcode, a continuation of nothing
ENDING_FRAMES = [masked((1000).to_bytes(2), first=0x88), masked(b"", first=0x88)]
ENDING_FRAMES += [masked(b"hello", first) for first in (0xC1, 0x83, 0x80)]
# A frame that is not masked, one that is too long, a second request
ENDING_FRAMES += [b"\x81\x05hello", b"\x81\xff\x7f" + bytes(11), b"GET /ws HTTP/1.1\r\n\r\n"]
NO_REQUESTS = [b"\r\n\r\n", b"hello\r\n\r\n", b"GET /ws\r\n\r\n", b"GET /" + b"a" * 9000]
NO_REQUESTS += [b"GET / HTTP/1.1\r\nno colon\r\n\r\n", bytes(9000), b"\x16\x03\x01\0\5\n"]  # TLS


class BadInput(ServerCase):
    async def test_bad_frames(self):
        """Each kind of bad frame gets its sender alone an error, and the connection stays."""
        contents = [json.dumps({"nonce": "mine", "content": content}) for content in BAD_CONTENTS]
        nonces = [json.dumps({"nonce": nonce, "content": "hello"}) for nonce in BAD_NONCES]
        client, friend = await self.join(), await self.join()
        for payload in [*NO_OBJECTS, *contents, *nonces, "{}"]:
            with self.subTest(payload[:50]):
                await client.connection.send(payload)
                error = await client.frame("error", "message")
                self.assertRegex(error.pop("content"), "^Send ")
                about = {"nonce": "mine"} if payload in contents else {}
                self.assertEqual(error, {"type": "error", "username": "server"} | about)
                await client.say("hello")
                for other in client, friend:
                    frame = await other.frame("error", "message")
                    self.assertEqual(frame["content"], "hello")

    async def test_frames_that_close(self):
        """A frame over 32 KiB closes with 1009, one that is no UTF-8 with 1007 (RFC 6455, 7.4)."""
        for payload, code in (b"x" * (32 * 1024 + 1), 1009), (b"\xff\xfe", 1007):
            async with Client(self.port) as client:
                await client.connection.send(payload, text=True)
                self.assertEqual(await client.close_code(), code)

    async def test_publish_that_refuses(self):
        """Where publish raises Refused, the speaker gets an error that says why."""
        refusal = chat.Refused("The broker is away. Try again.", nonce="a")
        self.enterContext(mock.patch.object(self.room, "publish", side_effect=[refusal, None]))
        client = await self.join()
        await client.say("hello", nonce="a")
        error = await client.frame("error", "message")
        self.assertEqual((error["content"], error["nonce"]), (str(refusal), "a"))

    async def test_silent_client(self):
        """A client that answers no ping in time is closed, and its name is free again."""
        _, port = await self.serve(ping_interval=0.1, ping_timeout=0.1)
        received = await self.raw(upgrade_request(port), port)
        self.assertIn((1011).to_bytes(2), received)  # a close frame's code
        await until(lambda: not self.room.names)

    async def test_rubbish(self):
        """What is no request, is cut off, or ends the stream behind one, harms nobody else."""
        whole = upgrade_request(self.port)
        cuts = [b"", b"GET", whole[:40], whole, whole + b"\x81", whole + b"\x81\x85abcdhe"]
        cases = [*NO_REQUESTS, *cuts]
        for path, end in itertools.product([b"/", b"/ws", b"/no"], ENDING_FRAMES):
            asked = whole.replace(b"/ws", path)
            more = b"X: " + b"x" * (chat.READ_AT_ONCE - len(asked) - 5) + b"\r\n\r\n"
            cases += [asked + end, asked[:-2] + more + end]  # in the same read, or in the next
        speaker, listener = await self.join(), await self.join()
        for number, data in enumerate(cases):
            with self.subTest(data):
                answer = await self.raw(data, cut=data in cuts)
                self.assertRegex(answer, b"^($|HTTP/1.1 (101|200|4[0-9][0-9]) )")
                await speaker.say(f"{number}")
                self.assertEqual(await listener.contents(1), [f"{number}"])
        await until(lambda: len(self.room.connections) == 2)

    async def test_fuzz(self):
        """While 200 connections send random rubbish, two hold a conversation that stays whole."""
        chance = random.Random(4)
        starts = [b"", *[upgrade_request(self.port)] * 9]

        def piece():
            payload = chance.randbytes(chance.choice([0, 5, 125, 4000]))
            first = chance.choice([0x81, 0x01, 0x80, 0x89, chance.randrange(256)])
            said = masked(chance.choice([b'{"content": "hi"}', b'{"content": ""}']))
            return chance.choice([said, said, masked(payload, first), payload, *ENDING_FRAMES])

        def rubbish():
            data = chance.choice(starts) + b"".join(piece() for _ in range(chance.randrange(9)))
            return chance.random() / 4, data, chance.random() < 0.3, chance.random() / 10

        async def send(start, data, cut, duration):
            await asyncio.sleep(start)
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(duration):
                    await self.raw(data, cut=cut)

        speaker, listener = await self.join(), await self.join()
        rubbishing, count = asyncio.gather(*(send(*rubbish()) for _ in range(200))), 0
        while not rubbishing.done():
            await speaker.say(f"{count}")
            for client in speaker, listener:
                while await client.contents(1) != [f"{count}"]:
                    pass  # what rubbish says
            count += 1
        await rubbishing
        await until(lambda: len(self.room.connections) == 2)


class Http(ServerCase):
    async def test_page(self):
        """The page's headers let nothing else in, of scripts and styles only those in the page."""
        page = (HERE / "index.html").read_text(encoding="utf-8")
        inline = re.findall("<script>(.*?)</script>|<style>(.*?)</style>", page, re.DOTALL)
        hashed = [hashlib.sha256("".join(part).encode()).digest() for part in inline]
        hashes = " ".join(f"'sha256-{base64.b64encode(digest).decode()}'" for digest in hashed)
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
        for line, shown in {"GET /": page, "GET /?lesson=1": page, "HEAD /": ""}.items():
            status, headers, body = await self.http(line)
            self.assertEqual((status, body), (200, shown))
            told = [field for field in headers if field[0] in expected]
            self.assertEqual(sorted(told), [*expected.items()])  # each of them once
        self.assertIs(chat.page_headers(page), chat.page_headers(page))  # hashed once

    async def test_statuses(self):
        """Each path and method gets its status, and HEAD that of GET, without a body."""
        paths = ["/chat.py", "/../chat.py", "/%2e%2e/", "/wss", "/ws/", "//", "//[", "*"]
        cases = {"GET /": 200, "GET /ws": 426} | {f"GET {path}": 404 for path in paths}
        for method in "POST", "PUT", "DELETE", "OPTIONS", "BREW":
            cases |= {f"{method} {path}": 405 for path in ("/", "/ws", "/no")}
        cases |= {line.replace("GET", "HEAD"): status for line, status in cases.items()}
        told = {426: {("Upgrade", "websocket")}, 405: {("Allow", "GET, HEAD")}}
        for line, expected in cases.items():
            with self.subTest(line):
                status, headers, body = await self.http(line)
                self.assertEqual((status, body == ""), (expected, line.startswith("HEAD")))
                self.assertLessEqual(told.get(status, set()), {*headers})

    async def test_headers_too_long(self):
        """More than 16 KiB in headers, of which lists are slow to parse, is refused before that."""
        lists = {"A": "a" * 8_000, "Sec_WebSocket_Protocol": "a," * 4_000}
        rest = 16 * 1024 - 16_000 - len(f"127.0.0.1:{self.port}")
        for size, status in (rest, 200), (rest + 1, 431):
            self.assertEqual((await self.http("GET /", B="b" * size, **lists))[0], status)
        with mock.patch.object(websockets.server.ServerProtocol, "accept") as accept:
            status, _, _ = await self.http("GET /ws", B="b" * rest, **lists, **UPGRADE)
        self.assertEqual(status, 431)
        accept.assert_not_called()

    async def test_origins(self):
        """A page of another host or port gets 403, and the way to put a proxy right."""
        own = f"127.0.0.1:{self.port}"
        welcome = [{}, {"Origin": f"http://{own}"}]
        welcome += [{"Origin": "http://chaT.example", "Host": "Chat.Example"}]  # RFC 9110, 4.2.3
        for headers in welcome:
            self.assertEqual((await self.http("GET /ws", **headers))[0], 426)
        others = ["http://evil.example", f"http://127.0.0.1:{self.port + 1}", "null", "", "x"]
        others += [f"http://{own}.evil.example", "http://[", "http://127.0.0.1"]
        others += [f"http://a\r\nOrigin: http://{own}"]  # two are not guessed at
        for origin in others:
            with self.subTest(origin):
                status, _, body = await self.http("GET /ws", Origin=origin, **UPGRADE)
                self.assertEqual((status, "Host" in body, "proxy" in body), (403, True, True))


def certify(folder):
    """Make a certificate for this machine, and its key: the files pem and key in the folder."""
    command = "req -x509 -newkey rsa:2048 -nodes -keyout key -out pem -subj /CN=localhost"
    command = [need("openssl"), *command.split(), "-addext", "subjectAltName=IP:127.0.0.1"]
    subprocess.run(command, cwd=folder, check=True, capture_output=True, timeout=6 * PATIENCE)


def tls_contexts():
    """Return what a server needs to speak TLS, and a client to trust it."""
    with tempfile.TemporaryDirectory() as folder:
        certify(folder)
        server = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
        server.load_cert_chain(f"{folder}/pem", f"{folder}/key")
        return server, ssl.create_default_context(cafile=f"{folder}/pem")


class Load(ServerCase):
    def other_end(self, client):
        """Return the server's end of a client's connection."""
        (end,) = (c for c in self.room.connections if c.remote_address[1] == client.port)
        return end

    async def pair(self, tls):
        """Return a server, with TLS or without, and its client."""
        own, trust = tls_contexts() if tls else (None, None)
        server, port = await self.serve(ssl=own)
        return server, await self.enterAsyncContext(Client(port, ssl=trust))

    async def test_one_write_a_turn(self):
        """What one turn says leaves in one write for each tab, and in few where it is much."""
        first, second = await self.join(), await self.join()
        for client in first, second:
            await client.frame("presence")
        for more, most in ("", 1), ("x" * 1000, 7):
            for end in self.room.connections:
                end.below.write.reset_mock()
            self.fill(100, more=more)
            for client in first, second:
                self.assertEqual(await client.contents(100), [f"{n}{more}" for n in range(100)])
                writes = self.other_end(client).below.write.mock_calls
                self.assertLessEqual(len(writes), most)
                self.assertLess(max(len(call.args[0]) for call in writes), 16 * 1024 + 1200)

    async def test_close_comes_last(self):
        """What was said before either end closes arrives before the close frame, TLS or not."""
        for tls in False, True:
            server, client = await self.pair(tls)
            _, leaving = await self.pair(tls)
            self.fill(100, more="x" * 500)
            await leaving.connection.close()
            server.close()
            for end, code in (leaving, 1000), (client, 1001):
                self.assertEqual(len(await end.contents(100)), 100)
                self.assertEqual(await end.close_code(), code)
            self.room.history.clear()

    async def test_same_as_its_transport(self):
        """What is asked of it and written to it has the same effect as on asyncio's transport."""
        client = await self.join()
        end = self.other_end(client)
        gathering, own = end.transport, end.below
        fresh = chat.GatheringTransport(own, chat.Turn())
        self.assertEqual(fresh.get_write_buffer_size(), own.get_write_buffer_size())
        for ask in "is_closing", "can_write_eof", "get_protocol", "get_write_buffer_limits":
            self.assertEqual(getattr(gathering, ask)(), getattr(own, ask)())
        for wrong, transport in itertools.product(["text", None, 5], [gathering, own]):
            with self.assertRaises(TypeError):
                transport.write(wrong)
        changing = bytearray(b"\x81\x05hello")
        gathering.write(changing)
        changing[:] = b"\x81\x05later"
        gathering.writelines([changing[:3], memoryview(changing)[3:]])
        with mock.patch.object(own, "get_write_buffer_size", return_value=5):
            self.assertEqual(gathering.get_write_buffer_size(), 14 + 5)
        self.assertEqual([await client.connection.recv() for _ in range(2)], ["hello", "later"])
        self.assertEqual(gathering.get_write_buffer_size(), 0)
        gathering.write_eof()
        with self.assertRaisesRegex(RuntimeError, "write_eof"):
            gathering.write(b"late")
        await client.close_code()

    async def test_lost_within_a_turn(self):
        """Whatever flushing one transport raises, or where one is lost, all others are flushed."""
        whole, broken, lost = await self.join(), await self.join(), await self.join()
        with self.assertLogs(level=logging.WARNING) as logs:
            self.other_end(broken).below.write.side_effect = ValueError("broken")
            below = self.other_end(lost).below
            below.reset_mock()
            self.fill(2)
            below.abort()
            self.fill(1, start=2)
            self.assertEqual(await whole.contents(3), ["0", "1", "2"])
            await until(lambda: len(self.room.connections) == 1)  # without those two
        self.fill(1, start=3)
        self.assertEqual(await whole.contents(1), ["3"])
        self.assertEqual(len(logs.records), 1)
        below.write.assert_not_called()

    async def test_turns(self):
        """Of a flood one turn reads at most 4 KiB; over TLS, or on Windows, as much as asyncio."""
        flood = masked(b"", first=0x89) * 43_000  # pings
        plain = 64 * 1024 if sys.platform == "win32" else 4 * 1024
        for tls, most in (False, plain), (True, 64 * 1024):
            _, client = await self.pair(tls)
            end = self.other_end(client)
            client.connection.transport.write(flood)
            await until(lambda end=end: sum(end.reads) > len(flood))
            client.connection.transport.abort()
            self.assertIn(max(end.reads), range(4 * 1024, most + 1))

    async def test_limits(self):
        """The README's limits are those of the program, which keeps nothing of a handshake."""
        async with Client(self.port, after="x" * 4000):
            (connection,) = self.room.connections
            unsent = connection.transport.get_write_buffer_limits()[1]
            ping, answer = connection.ping_interval, connection.ping_timeout
            self.assertEqual(connection.close_timeout, 10)  # a slow phone has to read the page
            self.assertEqual([connection.request.path, *connection.request.headers], [""])
        limits = [
            f"content | {chat.MAX_CONTENT:,} characters",
            "frame | 32 KiB",  # BadInput sends one
            f"speed | {SPEED} messages a second",
            f"unsent backlog of one connection | {unsent / 1024**2:g} MiB",
            f"remembered messages | {chat.REMEMBERED}",
            f"people | {chat.Room().capacity:,}, or what the file descriptors allow",
            f"silence | a ping every {ping} s, {answer} s to answer",
        ]
        table = README.partition("## Limits\n\n")[2].partition("\n\n")[0]
        for row, limit in zip(table.splitlines()[2:], limits, strict=True):
            self.assertEqual(row[: 2 + len(limit)], f"| {limit}")

    async def test_many_at_once(self):
        """After a restart all tabs come back, and wait to be accepted: more than asyncio's 100."""
        ends = [socket.create_connection(("127.0.0.1", self.port), PATIENCE) for _ in range(120)]
        for end in ends:
            end.close()

    async def test_descriptors(self):
        """The limit on descriptors is raised to what is needed, and says how many get in."""
        cases = [(64, 128, 128, 128, 64), (20_000, 90_000, 20_000, 20_000, 10_000)]
        for soft, hard, asked, got, capacity in [*cases, (256, 90_000, 12_048, 256, 128)]:
            resource = mock.Mock(getrlimit=mock.Mock(side_effect=[(soft, hard), (got, hard)]))
            with mock.patch.object(chat, "resource", resource):
                await self.serve()
            self.assertEqual(resource.setrlimit.call_args.args[1], (asked, hard))
            self.assertEqual(self.room.capacity, capacity)

    async def test_slow_tab(self):
        """A tab that leaves 1 MiB unread is cut off, with one line in the log; nobody waits."""
        slow, friend = await self.join(), await self.join()
        slow.connection.transport.pause_reading()
        with self.assertLogs(level=logging.WARNING) as logs:
            for number in range(10_000):
                if slow.name in self.room.names:
                    self.fill(1, start=number, more="x" * 1990)
                    self.assertEqual((await friend.frame("message"))["id"], f"{number}")
        (line,) = logs.output
        self.assertRegex(line, f"{slow.name} reads too slowly: .* {1024**2} bytes unsent$")
        self.assertNotIn(slow.name, self.room.names)
        slow.connection.transport.abort()

    async def test_speed(self):
        """20 messages at once do not wait for each other; of more, 20 a second come, in order."""
        said, waits = [f"{number}" for number in range(60)], []

        async def sleep(seconds):
            waits.append(seconds)

        clock = mock.Mock(monotonic=lambda: float(sum(waits)))  # time passes in such sleeps alone
        self.set(MESSAGES_PER_SECOND=SPEED, time=clock)
        self.set(asyncio=mock.Mock(wraps=asyncio, sleep=sleep))
        client = await self.join()
        for content in said:
            await client.say(content)
        self.assertEqual(await client.contents(60), said)
        self.assertEqual(waits, [1, 1])

    async def test_flood(self):
        """While one tab floods, others' messages come at once; when it goes, so does its flood."""
        second_over = asyncio.Event()
        clock = mock.Mock(monotonic=lambda: float(second_over.is_set()))
        self.set(MESSAGES_PER_SECOND=SPEED, time=clock)
        self.set(asyncio=mock.Mock(wraps=asyncio, sleep=lambda _: second_over.wait()))
        flooder, friend = await self.join(), await self.join()
        end = self.other_end(flooder)
        flooder.connection.transport.write(masked(b'{"content": "flood"}') * 10_000)
        self.assertEqual(await friend.contents(SPEED), ["flood"] * SPEED)
        await friend.say("hello")
        self.assertEqual(await friend.contents(1), ["hello"])
        flooder.connection.transport.abort()
        while end.state is websockets.State.OPEN:  # until what is pushed to it does not arrive
            await friend.say("hello")
            self.assertEqual(await friend.contents(1), ["hello"])
        second_over.set()
        await until(lambda: flooder.name not in self.room.names)
        await friend.say("over")
        self.assertEqual(await friend.contents(1), ["over"])


class ProgramCase(unittest.IsolatedAsyncioTestCase):
    """Runs `python chat.py` as a user does."""

    async def asyncSetUp(self):
        asyncio.get_running_loop().slow_callback_duration = PATIENCE  # programs take time to start
        self.enterContext(mock.patch.dict(os.environ))
        os.environ.pop("PYTHONUNBUFFERED", None)  # or nothing that is printed would need a flush
        os.environ |= {"COLUMNS": "80", "NO_COLOR": "1"}  # for --help

    def start(self, *command, **options):
        """Start a program; return its process, which ends with the test, as do its children."""
        pipes = dict.fromkeys(["stdin", "stdout", "stderr"], subprocess.PIPE)
        pipes |= {"encoding": "utf-8", "errors": "replace"}  # curl shows the bytes of a frame
        process = subprocess.Popen(command, start_new_session=True, **pipes, **options)
        self.enterContext(process)
        self.addCleanup(self.kill, process)
        return process

    def kill(self, process):
        with contextlib.suppress(ProcessLookupError, PermissionError):  # it has ended
            os.killpg(process.pid, signal.SIGKILL) if hasattr(os, "killpg") else process.kill()

    def start_chat(self, *options, program=HERE / "chat.py", shell_first=None):
        """Start chat.py, in a shell if that is to do something first; return its process."""
        command = [sys.executable, program, *options]
        if shell_first:
            command = ["sh", "-c", f'{shell_first}; exec "$@"', "sh", *command]
        return self.start(*command)

    def limit(self, process):
        """Kill a process before it is waited for without end, as for what it does not print."""
        overdue = threading.Timer(6 * PATIENCE, self.kill, [process])
        overdue.start()
        self.addCleanup(overdue.cancel)

    def serving(self, process):
        """Wait until a server serves; return its process, its port and what it said."""
        self.limit(process)
        while "Ctrl-C" not in (line := process.stdout.readline()):
            self.assertTrue(line, "the server did not start")
        return process, int(re.search(r":(\d+) ", line)[1]), line

    def serve(self, host="127.0.0.1", port=0, shell_first=None):
        """Start chat.py and wait until it serves; return its process, its port and what it said."""
        options = "--host", host, "--port", f"{port}"
        return self.serving(self.start_chat(*options, shell_first=shell_first))

    def assert_ends(self, process, status=0, says=""):
        """It must end with this status, and with this complaint alone."""
        out, complaint = process.communicate(timeout=6 * PATIENCE)  # a name is looked up for long
        self.assertEqual((process.returncode, out or ""), (status, ""))
        self.assertRegex(complaint, f"^{says}$")


class CommandLine(ProgramCase):
    def outward(self, family, other):
        """Return the address from which this machine would send to others."""
        with contextlib.suppress(OSError), socket.socket(family, socket.SOCK_DGRAM) as probe:
            probe.connect((other, 9))
            return probe.getsockname()[0]
        return "localhost"

    def has_ipv6(self):
        """Tell whether this machine has an IPv6 address at which to serve."""
        with contextlib.suppress(OSError), socket.socket(socket.AF_INET6) as probe:
            probe.bind(("::1", 0))
            return True
        return False

    def test_says_what_to_open(self):
        """It prints the address to open: for all addresses, one that other devices can open."""
        cases = {"localhost": "localhost", "::1": "::1"}
        cases["0.0.0.0"] = self.outward(socket.AF_INET, "192.0.2.1")
        cases["::"] = self.outward(socket.AF_INET6, "2001:db8::1")
        for host, opens in cases.items():
            with self.subTest(host):
                if ":" in host and not self.has_ipv6():
                    skip("this machine has no IPv6")
                _, port, said = self.serve(host=host)
                shown = f"[{opens}]" if ":" in opens else opens  # RFC 3986, section 3.2.2
                expected = f"Open http://{shown}:{port} in two windows. Ctrl-C stops the chat.\n"
                self.assertEqual(said, expected)
                socket.create_connection((opens, port), PATIENCE).close()

    def test_gives_up(self):
        """Where it cannot serve, it ends with status 1 and one line: what is wrong, what to do."""
        alone, garbled = (self.enterContext(tempfile.TemporaryDirectory()) for _ in range(2))
        pathlib.Path(garbled, "index.html").write_bytes(b"\xff")
        for folder in alone, garbled:
            shutil.copy(HERE / "chat.py", folder)
        taken = self.enterContext(socket.create_server(("127.0.0.1", 0))).getsockname()[1]
        cases = [(f"--host 127.0.0.1 --port {taken}", HERE, f"port {taken}: ")]
        cases += [(f"--port {port}", HERE, f"port {port}: ports go up") for port in (-1, 65536)]
        cases += [
            (f"--host {host}", HERE, host) for host in ("no.such.invalid", "a..b", "192.0.2.1")
        ]
        cases += [("", folder, re.escape(folder)) for folder in (alone, garbled)]
        for options, folder, wrong in cases:
            with self.subTest(options, folder=folder):
                process = self.start_chat(*options.split(), program=pathlib.Path(folder, "chat.py"))
                says = f"chat.py: cannot serve .*{wrong}.*index.html beside.*--host and --port.\n"
                self.assert_ends(process, 1, says)

    async def test_highest_port(self):
        """It serves at port 65535, the highest."""
        with mock.patch.object(websockets, "serve", mock.AsyncMock()) as serve:
            await chat.start(chat.Room(), "127.0.0.1", 65535)
        self.assertEqual(serve.await_args.args[1:], ("127.0.0.1", 65535))

    async def test_windows(self):
        """Without the module resource, as on Windows, it starts, with room for 10,000 people."""
        with mock.patch.dict(sys.modules, resource=None):
            program = runpy.run_path(f"{HERE / 'chat.py'}")
        room = program["Room"]()
        server = await program["start"](room, "127.0.0.1", 0)
        self.assertEqual(room.capacity, 10_000)
        server.close()
        await server.wait_closed()

    def test_help(self):
        """--help says how to serve the network, and the port that it takes otherwise."""
        help, _ = self.start_chat("--help").communicate(timeout=PATIENCE)
        self.assertRegex(help, "--host HOST +0.0.0.0 for the whole network\n")
        self.assertRegex(help, "--port PORT +default: 8080\n")

    def test_requirements(self):
        """requirements.txt and the head of chat.py (PEP 723) name the same dependencies."""
        head = (HERE / "chat.py").read_text(encoding="utf-8").partition("# ///\n")[0]
        metadata = tomllib.loads(head.removeprefix("# /// script\n").replace("# ", ""))
        required = (HERE / "requirements.txt").read_text(encoding="utf-8").split()
        self.assertEqual(metadata, {"dependencies": required, "requires-python": ">=3.11"})


@unittest.skipIf(sys.platform == "win32", "Windows has no such signals, limits and pipes")
class Unix(ProgramCase):
    async def test_stop_signals(self):
        """Signals stop it, with 1001 for tabs and not a word, also twice, or in a shell's &."""
        signals, shells = (signal.SIGINT, signal.SIGTERM), (None, "trap '' INT")
        for number, shell_first in itertools.product(signals, shells):
            with self.subTest(number, shell_first=shell_first):
                process, port, _ = self.serve(shell_first=shell_first)
                async with Client(port) as client:
                    process.send_signal(number)
                    self.assertEqual(await client.close_code(), 1001)
                while process.poll() is None:
                    process.send_signal(signal.SIGINT)
                    await asyncio.sleep(0.005)
                self.assert_ends(process)

    def test_stops_in_time(self):
        """It stops soon though tabs answer nothing, shake no hands, or read no page."""
        process, port, _ = self.serve()
        address = "127.0.0.1", port
        mute, silent, reading = (socket.create_connection(address, PATIENCE) for _ in range(3))
        with mute, silent, reading:
            for end, data in (reading, b"GET / HTTP/1.1\r\n\r\n"), (mute, upgrade_request(port)):
                end.sendall(data)
                end.recv(1)
            started = time.monotonic()
            process.terminate()
            self.assert_ends(process)
            self.assertLess(time.monotonic() - started, 8)  # the library alone would take 10 s
        self.assertEqual(chat.STOP_TIMEOUT, 1)  # of the 2 s promised, on any machine

    async def come_late(self, port):
        """Come to a full room, which must answer with 1013 and a reason instead of a welcome."""
        with self.assertRaisesRegex(websockets.ConnectionClosed, "1013.*is full"):
            async with Client(port):
                pass

    async def test_full_room(self):
        """Before descriptors run out newcomers, however many, get 1013; those inside stay."""
        cases = [("ulimit -n 64", 32, [12] * 4), ("ulimit -n 128", 64, [60])]
        cases += [("ulimit -Sn 64", 100, [])]  # which is raised
        for shell_first, inside, rushes in cases:
            process, port, _ = self.serve(shell_first=shell_first)
            async with contextlib.AsyncExitStack() as stack:
                clients = [await stack.enter_async_context(Client(port)) for _ in range(inside)]
                for count in rushes:
                    await asyncio.gather(*(self.come_late(port) for _ in range(count)))
                await clients[0].say("hello")
                for client in clients:
                    self.assertEqual(await client.contents(1), ["hello"])
                with socket.create_connection(("127.0.0.1", port), PATIENCE) as looking:
                    looking.sendall(b"GET / HTTP/1.1\r\n\r\n")
                    self.assertRegex(looking.recv(100), b"^HTTP/1.1 200 OK\r\n")
            async with Client(port):  # room again
                pass
            process.terminate()
            self.assert_ends(process)

    def test_nobody_reads(self):
        """Where nobody reads what it prints it ends, without a traceback."""
        process = self.start_chat("--port", "0", shell_first="read go")
        process.stdout.close()
        process.stdout = None
        self.assert_ends(process, 1)


# In a real browser


def look(selector, what):
    """Return the JavaScript that lists `what`, an expression of `e`, for all of that selector."""
    return f"[...document.querySelectorAll({json.dumps(selector)})].map(e => {what})"


def one(selector, what):
    """Return the JavaScript of a property of the first element of that selector."""
    return f"document.querySelector({json.dumps(selector)}).{what}"


def visible(selector):
    """Return the JavaScript that tells whether an element can be seen."""
    return one(selector, "checkVisibility()")


def says(selector, text):
    """Return the JavaScript that tells whether an element contains a text."""
    return f"{look(selector, 'e.innerText')}.slice(0, 1).join().includes({json.dumps(text)})"


def pace(times):
    """Return the JavaScript that lets the page's timers run so many times as fast, except deadlines
    of connections; `asked` has what all were asked for, in ms, `pending` those that have neither
    fired nor been cleared, `latest` what was due after so many ms.
    """
    return f"""
        window.asked = [];
        window.latest = {{}};
        window.pending = new Map();
        for (const name of ["setTimeout", "setInterval"]) {{
            const slowly = window[name];
            window[name] = (action, ms = 0) => {{
                const deadline = [5_000, 10_000, 45_000].includes(ms);
                const fire = () => {{ pending.delete(id); action(); }};
                const id = slowly(fire, deadline ? ms : ms / {times});
                asked.push(ms);
                latest[ms] = action;
                pending.set(id, ms);
                return id;
            }};
        }}
        const clear = clearTimeout;
        window.clearTimeout = id => {{ pending.delete(id); clear(id); }};
    """


def watch(selector):
    """Return the JavaScript that lists in `batches` the texts of what is added there at a time."""
    return f"""
        window.batches = [];
        new MutationObserver(records => {{
            const added = records.flatMap(record => [...record.addedNodes]);
            if (added.length) batches.push(added.map(node => node.textContent));
        }}).observe(document.querySelector({json.dumps(selector)}), {{childList: true}})
    """


FAST = pace(10)
# The page's clock stands still; `later` puts it forward, in ms. At 0 nothing would count as sent.
LATER = "window.later = 1; performance.now = () => later;"
UNHURRIED = "Math.random = () => 60;"  # so the first attempt to reconnect comes after 30.5 s
TEXTS = look("#messages .text", "e.textContent")
IDS = look("#messages li[data-id]", "e.dataset.id")
LOG = look(
    "#messages li[data-id]",
    "[e.dataset.kind, e.dataset.state, e.querySelector('.text').textContent]"
    ".filter(Boolean).join(' ')",
)
MIDDLE = "(b => [b.x + b.width / 2, b.y + b.height / 2])(e.getBoundingClientRect())"
STATES = look("#messages [data-kind=own]", "e.dataset.state")
LINES = look("#messages [data-kind=system]", "e.innerText")
STATE = one("#status", "dataset.state")
ONLINE = f"{STATE} === 'online'"
OFFLINE = f"{STATE} === 'reconnecting'"
FOCUS = "document.activeElement.id"


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


class Engine:
    """A browser that tests share, in a folder of its own; `close` ends all that it takes."""

    def __init__(self, scheme):
        self.lock = threading.RLock()  # one command at a time
        with contextlib.ExitStack() as self.ends:
            folder = tempfile.TemporaryDirectory(ignore_cleanup_errors=True)
            self.folder = pathlib.Path(self.ends.enter_context(folder))
            self.launch(scheme)
            self.close = self.ends.pop_all().close

    def run(self, *command, ready, **env):
        """Run a program; return what ready(its output) returns as soon as that is true."""
        path = self.folder / f"{pathlib.Path(command[0]).name}.log"
        with path.open("wb") as log:
            process = subprocess.Popen(command, stdout=log, stderr=log, env=os.environ | env)
        self.process = process
        self.ends.callback(self.end, process)
        deadline = time.monotonic() + 6 * PATIENCE  # a browser takes its time
        while not (found := ready(said := path.read_text(errors="replace"))):
            if process.poll() is not None or time.monotonic() > deadline:
                raise AssertionError(f"{command} does not start: {said}")
            time.sleep(0.02)
        return found

    def end(self, process):
        process.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(PATIENCE)
        process.kill()
        process.wait()


class Browser(Engine):
    """A headless Chromium; `url` is where its DevTools listen, `idle` the tabs handed back."""

    FLAGS = (
        "--headless --remote-debugging-port=0 --disable-background-networking --disable-gpu "
        "--disable-component-update --disable-sync --no-first-run --disable-quic "
        "--disable-dev-shm-usage --disable-back-forward-cache"
    )

    def launch(self, scheme):
        self.idle = []  # ids of targets
        command = [find_browser(), *self.FLAGS.split(), f"--user-data-dir={self.folder}"]
        command.append("--host-resolver-rules=MAP chat.example 127.0.0.1")
        if hasattr(os, "geteuid") and os.geteuid() == 0:
            command.append("--no-sandbox")  # which does not work for root
        listening = functools.partial(re.search, "DevTools listening on (.+)\n")
        self.url = self.run(*command, ready=listening)[1]
        self.ends.callback(self.quit)

    def quit(self):
        """Let it end by itself: where it is terminated it leaves a folder beside its own."""
        with connect(self.url, proxy=None) as devtools:
            devtools.send(json.dumps({"id": 0, "method": "Browser.close"}))
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(PATIENCE)


class Tab:
    """A browser tab, driven over https://chromedevtools.github.io/devtools-protocol/. It is used
    again by later tests: what a test stored is cleared, and what it emulated ends with DevTools.
    """

    def __init__(self, browser, url, ready=None, ignore_certificate=False, before="0"):
        """`ready` is the JavaScript to wait for, `before` what runs before the page's own."""
        self.browser, self.url, self.ids = browser, url, itertools.count()
        self.ready, self.before = ready or ONLINE, before
        self.ignore_certificate = ignore_certificate
        self.answers, self.events, self.hidden = {}, [], False

    async def __aenter__(self):
        self.target = self.browser.idle.pop() if self.browser.idle else await self.open()
        url = self.browser.url.partition("/devtools/")[0] + "/devtools/page/" + self.target
        await self.attach(url)
        try:
            for domain in "Page", "Runtime", "Log", "Network":
                await self.call(f"{domain}.enable")
            await self.call("Security.setIgnoreCertificateErrors", ignore=self.ignore_certificate)
            await self.call("Emulation.setLocaleOverride", locale="en-US")
            await self.call("Page.addScriptToEvaluateOnNewDocument", source=self.before)
            await self.call("Page.navigate", url=self.url)
            await self.until(f"document.readyState === 'complete' && {self.ready}")
        except BaseException as problem:
            await self.__aexit__(problem)
            raise
        return self

    async def open(self):
        """Open a tab in a window of its own; return its id."""
        await self.attach(self.browser.url)
        size = {"width": 1280, "height": 900}
        target = await self.call("Target.createTarget", url="about:blank", newWindow=True, **size)
        await self.detach()
        return target["targetId"]

    async def attach(self, url):
        self.devtools = await websockets.connect(url, proxy=None, max_size=None)
        self.reading = asyncio.create_task(self.read())

    async def detach(self):
        await self.devtools.close()
        await self.reading

    async def __aexit__(self, problem, *_):
        await self.call("Page.disable")  # and with it `before`
        if not problem:  # after one, nobody knows in what state it is
            origin = "/".join(self.url.split("/")[:3])
            for local in True, False:
                storage = {"securityOrigin": origin, "isLocalStorage": local}
                await self.call("DOMStorage.clear", storageId=storage)
            if self.hidden:
                await self.hide(False)
            self.browser.idle.append(self.target)
        await self.call("Page.navigate", url="about:blank")
        await self.detach()

    async def read(self):
        with contextlib.suppress(websockets.ConnectionClosedError):
            async for payload in self.devtools:
                said = json.loads(payload)
                answer = self.answers.pop(said.get("id"), None)
                if not answer:
                    self.events.append(said)
                elif not answer.done():  # or nobody waits any more
                    answer.set_result(said)

    async def call(self, method, **params):
        """Call a method of the protocol; return its result."""
        id = next(self.ids)
        answer = self.answers[id] = asyncio.get_running_loop().create_future()
        await self.devtools.send(json.dumps({"id": id, "method": method, "params": params}))
        async with asyncio.timeout(PATIENCE):
            return (await answer)["result"]

    async def evaluate(self, expression):
        """Return the value of a JavaScript expression, awaited where it is a promise."""
        more = {"returnByValue": True, "awaitPromise": True, "userGesture": True}
        answer = await self.call("Runtime.evaluate", expression=expression, **more)
        if "exceptionDetails" in answer:
            raise AssertionError(f"{expression}: {answer['exceptionDetails']}")
        return answer["result"].get("value")

    async def shows(self, expression, expected):
        """Wait until a JavaScript expression has a value."""
        value = None
        try:
            async with asyncio.timeout(PATIENCE):
                while (value := await self.evaluate(expression)) != expected:
                    await asyncio.sleep(0.01)
        except TimeoutError:
            raise AssertionError(f"{expression} is {value!r}, not {expected!r}") from None

    async def until(self, expression):
        """Wait until a JavaScript expression is true."""
        await self.shows(f"Boolean({expression})", True)

    async def type(self, text):
        """Type into what has the focus; a line feed presses Enter."""
        for line in re.split("(\n)", text):
            if line == "\n":
                await self.press("Enter")
            elif line:
                await self.call("Input.insertText", text=line)

    async def say(self, text):
        """Type a message, and wait until it is delivered."""
        await self.type(text + "\n")
        await self.until(f"{STATES}.at(-1) === 'delivered'")

    async def press(self, key, **more):
        """Press and release a key."""
        code = {"Backspace": 8, "Tab": 9, "Enter": 13}[key]
        more = {"key": key, "windowsVirtualKeyCode": code} | more
        text = {"text": "\r"} if key == "Enter" else {}
        await self.call("Input.dispatchKeyEvent", type="keyDown", **more, **text)
        await self.call("Input.dispatchKeyEvent", type="keyUp", **more)

    async def click(self, selector):
        """Click the middle of an element, once it stands where the next frame draws it."""
        frames = "new Promise(done => requestAnimationFrame(() => requestAnimationFrame(done)))"
        await self.evaluate(frames)
        x, y = (await self.evaluate(look(selector, MIDDLE)))[0]
        for type in "mousePressed", "mouseReleased":
            mouse = {"x": x, "y": y, "button": "left", "clickCount": 1}
            await self.call("Input.dispatchMouseEvent", type=type, **mouse)

    async def push(self, selector):
        """Activate a button, wherever it stands."""
        await self.evaluate(one(selector, "click()"))

    async def reload(self):
        await self.evaluate("window.stale = true")
        await self.call("Page.reload")
        await self.until(f"!window.stale && document.readyState === 'complete' && {self.ready}")

    async def offline(self, yes):
        """Cut the tab off from the network, or connect it again."""
        throughput = {"latency": 0, "downloadThroughput": -1, "uploadThroughput": -1}
        await self.call("Network.emulateNetworkConditions", offline=yes, **throughput)
        await self.shows("navigator.onLine", not yes)

    async def size(self, width, height):
        metrics = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 500}
        await self.call("Emulation.setDeviceMetricsOverride", **metrics)

    async def hide(self, yes):
        """Hide the tab, as another one before it does, or bring it to the front."""
        window = (await self.call("Browser.getWindowForTarget"))["windowId"]
        bounds = {"windowState": "minimized" if yes else "normal"}
        await self.call("Browser.setWindowBounds", windowId=window, bounds=bounds)
        await self.shows("document.hidden", yes)
        self.hidden = yes

    async def screenshot(self):
        """Return a PNG of what the window shows."""
        return base64.b64decode((await self.call("Page.captureScreenshot"))["data"])

    def seen(self, method):
        """Return the events of one kind, so far."""
        return [event for event in self.events if event["method"] == method]

    def attempts(self):
        """Return the addresses of the WebSockets that the page asked for, so far."""
        return [event["params"]["url"] for event in self.seen("Network.webSocketCreated")]

    def payloads(self, way):
        """Return the payloads of the frames that were "Sent" or "Received", so far."""
        frames = self.seen(f"Network.webSocketFrame{way}")
        return [frame["params"]["response"]["payloadData"] for frame in frames]

    def sent(self):
        """Return the frames that the page sent, so far."""
        return [json.loads(payload) for payload in self.payloads("Sent")]

    def problems(self):
        """Return what the console complained of: errors and policy violations."""
        return self.seen("Runtime.exceptionThrown") + self.seen("Log.entryAdded")


class Firefox(Engine):
    """A headless Firefox, driven over https://www.w3.org/TR/webdriver-bidi/."""

    CLOSE, RELOAD = "browsingContext.close", "browsingContext.reload"
    ACT, SHOOT = "input.performActions", "browsingContext.captureScreenshot"
    PREFERENCES = (
        'user_pref("layout.css.prefers-color-scheme.content-override", %d);\n'
        'user_pref("network.websocket.delay-failed-reconnects", false);\n'  # the page waits itself
        'user_pref("extensions.enabledScopes", 0);\n'  # no extension, so that it starts sooner
    )

    def launch(self, scheme):
        path = shutil.which("firefox-esr") or shutil.which("firefox")
        path = path or skip("no Firefox found: install firefox-esr or firefox")
        preferences = self.PREFERENCES % ["dark", "light"].index(scheme)
        (self.folder / "user.js").write_text(preferences, encoding="utf-8")
        options = ["--headless", "--no-remote", "--remote-debugging-port", "0", "--profile"]
        listening = functools.partial(re.search, "BiDi listening on (.+)\n")
        home = {"HOME": f"{self.folder}"}  # what it leaves there goes as well
        url = self.run(path, *options, self.folder, ready=listening, **home)[1] + "/session"
        quiet = {"proxy": None, "max_size": None, "ping_interval": None}
        self.socket = self.ends.enter_context(connect(url, **quiet))
        self.ids, self.events = itertools.count(), []
        self.call("session.new", capabilities={})
        self.call("session.subscribe", events=["log.entryAdded"])

    def call(self, method, **params):
        with self.lock:
            id = next(self.ids)
            self.socket.send(json.dumps({"id": id, "method": method, "params": params}))
            while (said := json.loads(self.socket.recv(PATIENCE))).get("id") != id:
                self.events.append(said["params"])
        if "error" in said:
            raise AssertionError(f"{method}: {said}")
        return said["result"].get("data", said["result"])

    def open(self, url):
        tab = self.call("browsingContext.create", type="window")["context"]
        self.call("browsingContext.navigate", context=tab, url=url, wait="complete")
        return tab

    def evaluate(self, tab, expression):
        told = f"Promise.resolve({expression}).then(value => JSON.stringify([value]))"
        where = {"target": {"context": tab}, "awaitPromise": True}
        answer = self.call("script.evaluate", expression=told, **where)
        if answer["type"] == "exception":
            raise AssertionError(f"{expression}: {answer['exceptionDetails']['text']}")
        return json.loads(answer["result"]["value"])[0]

    def problems(self, tab):
        self.evaluate(tab, "0")  # what was logged before comes before its answer
        here = [event for event in self.events if event["source"]["context"] == tab]
        return [event["text"] for event in here if event["level"] == "error"]


class WebKit(Engine):
    """WebKitGTK's own browser on a screen that nobody sees, driven over the older
    https://www.w3.org/TR/webdriver2/, which tells no errors: they are collected in the page, from
    when it has loaded.
    """

    CLOSE, RELOAD, ACT, SHOOT = "DELETE window", "POST refresh", "POST actions", "GET screenshot"
    COLLECT = """
        window.problems = [];
        console.error = (...what) => problems.push(what.join(" "));
        for (const type of ["error", "unhandledrejection"])
            addEventListener(type, ({message, reason}) => problems.push(message ?? `${reason}`));
    """

    def launch(self, scheme):
        browser = next(pathlib.Path("/usr/lib").glob("*/webkit2gtk-4.*/MiniBrowser"), None)
        driver, screen = shutil.which("WebKitWebDriver"), shutil.which("Xvfb")
        if not (browser and driver and screen):
            skip("no WebKit found: install webkit2gtk-driver and xvfb")
        number = functools.partial(re.search, "(?m)^([0-9]+)\n")
        display = self.run(screen, "-displayfd", "1", ready=number)[1]
        env = {"DISPLAY": f":{display}", "GTK_THEME": f"Adwaita:{scheme}"}
        env["HOME"] = f"{self.folder}"  # what it leaves there goes as well
        self.port, self.session = free_port(), "/session"
        self.run(driver, f"--port={self.port}", ready=lambda _: is_open(self.port), **env)
        options = {"binary": f"{browser}", "args": ["--automation"]}
        wanted = {"alwaysMatch": {"webkitgtk:browserOptions": options}}
        self.session += "/" + self.call("POST", capabilities=wanted)["sessionId"]
        self.ends.callback(self.call, "DELETE")
        self.first = self.call("GET window")  # which stays, since it takes one to open another

    def call(self, command, context=None, **body):
        method, *path = command.split()
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=PATIENCE)
        with self.lock, contextlib.closing(connection):
            if context:
                self.call("POST window", handle=context)
            connection.request(method, "/".join([self.session, *path]), json.dumps(body))
            answer = connection.getresponse()
            value = json.load(answer)["value"]
        if answer.status != 200:
            raise AssertionError(f"{command}: {value}")
        return value

    def open(self, url):
        tab = self.call("POST window/new", self.first, type="window")["handle"]
        self.call("POST url", tab, url=url)
        self.call("POST execute/sync", tab, script=self.COLLECT, args=[])
        return tab

    def evaluate(self, tab, expression):
        return self.call("POST execute/sync", tab, script=f"return ({expression})", args=[])

    def problems(self, tab):
        return self.evaluate(tab, "problems")


class EngineTab:
    """A window of such a browser, with Tab's verbs."""

    shows, until = Tab.shows, Tab.until

    def __init__(self, engine, scheme, url):
        self.kind, self.scheme, self.url = engine, scheme, url

    async def __aenter__(self):
        self.engine = await asyncio.to_thread(shared, self.kind, self.scheme)
        self.tab = await asyncio.to_thread(self.engine.open, self.url)
        await self.until(ONLINE)
        return self

    async def __aexit__(self, *_):
        await self.call(self.engine.CLOSE)

    async def call(self, method, **params):
        return await asyncio.to_thread(self.engine.call, method, context=self.tab, **params)

    async def evaluate(self, expression):
        return await asyncio.to_thread(self.engine.evaluate, self.tab, expression)

    async def act(self, kind, *actions):
        """Do what a hand does with a "key" or a "pointer"."""
        await self.call(self.engine.ACT, actions=[{"type": kind, "id": kind, "actions": actions}])

    async def type(self, text):
        """Type into what has the focus; a line feed presses Enter."""
        keys, ways = text.replace("\n", "\ue007"), ("keyDown", "keyUp")
        await self.act("key", *[{"type": way, "value": key} for key in keys for way in ways])

    async def click(self, selector):
        """Click an element."""
        x, y = (await self.evaluate(look(selector, MIDDLE)))[0]
        press = [{"type": way, "button": 0} for way in ("pointerDown", "pointerUp")]
        await self.act("pointer", {"type": "pointerMove", "x": int(x), "y": int(y)}, *press)

    async def reload(self):
        await self.call(self.engine.RELOAD, wait="complete")
        await self.until(ONLINE)

    async def screenshot(self):
        return base64.b64decode(await self.call(self.engine.SHOOT))

    def problems(self):
        return self.engine.problems(self.tab)  # which asks nothing of the server in this thread


@functools.cache
def shared(engine, scheme="light"):
    """Return the browser of an engine that all tests share; each has its own tabs."""
    browser = engine(scheme)
    unittest.addModuleCleanup(browser.close)
    return browser


class BrowserCase(ServerCase):
    """A server of its own for each test, looked at through a browser."""

    def setUp(self):
        self.browser = shared(Browser)

    async def stop(self, server):
        server.close()
        for connection in CountingConnection.made:
            connection.below.abort()  # browsers keep spare ones, on which nothing was asked yet
        await super().stop(server)

    def tab(self, **options):
        return Tab(self.browser, f"http://127.0.0.1:{self.port}/", **options)

    async def open(self, **options):
        """Return a tab that stays until the test ends."""
        return await self.enterAsyncContext(self.tab(**options))

    def hold(self):
        """Let messages wait before they are published, until the returned event is set."""
        let_through, publish = asyncio.Event(), self.room.publish

        async def hold(message):
            await let_through.wait()
            await publish(message)

        self.enterContext(mock.patch.object(self.room, "publish", hold))
        return let_through

    def cut_off(self):
        """End all connections without a word."""
        for connection in self.room.connections:
            connection.transport.abort()


class Page(BrowserCase):
    async def test_one_request(self):
        """The page takes one HTTP request and one WebSocket, and has at most 44 KiB."""
        async with self.tab() as tab:
            asked = [event["params"] for event in tab.seen("Network.requestWillBeSent")]
            urls = [event["request"]["url"] for event in asked]
            self.assertEqual([url for url in urls if not url.startswith("data:")], [tab.url])
            self.assertEqual(len(tab.attempts()), 1)
        self.assertLessEqual((HERE / "index.html").stat().st_size, 44 * 1024)

    async def test_withheld(self):
        """Over plain HTTP from another host, and where storage is denied or full, it works, too."""
        host, other = f"http://127.0.0.1:{self.port}/", f"http://chat.example:{self.port}/"
        denied = """for (const kind of ["localStorage", "sessionStorage"])
            Object.defineProperty(window, kind, {get() { throw new Error("denied"); }});"""
        full = """if (origin !== "null") for (const size of [100_000, 1])
            try { for (let n = 0; ; n++) sessionStorage[size + n] = "x".repeat(size); } catch {}"""
        for url, before in (other, "0"), (host, denied), (host, full):
            with self.subTest(url, before=before):
                async with Tab(self.browser, url, before=before) as tab:
                    self.assertEqual(await tab.evaluate("isSecureContext"), url == host)
                    await tab.say("hello")
                    await tab.push("#wire-toggle")
                    await tab.shows(visible("#wire"), False)
                    self.assertEqual(tab.problems(), [])

    async def test_waiting(self):
        """What is said waits below all that is delivered, and stands then where everyone has it."""
        let_through = self.hold()
        tab = await self.open()
        await tab.type("one\ntwo\n")
        self.fill(1)
        await tab.shows(LOG, ["other 0", "own waiting one", "own waiting two"])
        await until(lambda: len(tab.sent()) == 2)
        self.room.deliver(message("two", "a", nonce=tab.sent()[1]["nonce"]))
        await tab.shows(LOG, ["other 0", "own delivered two", "own waiting one"])
        self.assertTrue(await tab.evaluate(says("[data-state=waiting]", "waiting")))
        self.assertTrue(await tab.evaluate(says("[data-state=delivered]", "delivered")))
        buttons = await tab.evaluate(look("#messages button", "e.checkVisibility()"))
        self.assertEqual({*buttons}, {False})
        let_through.set()
        await tab.shows(STATES, ["delivered", "delivered"])

    async def test_in_flight(self):
        """At most 20 messages are under way at once; the rest waits for echoes or refusals."""
        let_through = self.hold()
        tab = await self.open()
        said = [f"{number}" for number in range(25)]
        await tab.type("\n".join([*said, ""]))
        await tab.shows(STATES, ["waiting"] * 25)
        self.assertEqual([frame["content"] for frame in tab.sent()], said[:20])
        error = {"type": "error", "content": "Not now."}
        for frame in tab.sent()[:20]:
            chat.push(self.room.connections, frame | error)
        await until(lambda: len(tab.sent()) == 25)
        let_through.set()
        await tab.shows(STATES, ["delivered"] * 25)
        self.assertEqual(await tab.evaluate(TEXTS), said)
        self.assertEqual([frame["content"] for frame in tab.sent()], said)

    async def test_stripping(self):
        """What the server would strip is stripped before, in a time that grows with the length."""
        tab = await self.open()
        text = "`x${' '.repeat(50_000)}x`"
        duration = "((do_it, began = performance.now()) => (do_it(), performance.now() - began))"
        ratio = f"{duration}(() => strip({text})) / {duration}(() => [...{text}])"
        self.assertLess(await tab.evaluate(ratio), 30)  # with its square it would be hundreds
        await tab.type(" \u3000 \n\x1c\x85 hello \x1f\x85\n")
        await tab.shows(STATES, ["delivered"])
        self.assertEqual([frame["content"] for frame in tab.sent()], ["hello"])

    async def test_refusal(self):
        """What cannot be said shows why and can be taken back; what is said next gets through."""
        tab = await self.open()
        for size, own in (2_001, []), (32_760, ["delivered"]):
            with self.subTest(size):
                await tab.type("x" * size + "\nmore")
                for place in "[data-state=refused]", "#spoken p:last-child":
                    await tab.until(says(place, "Send at most 2,000 characters"))
                self.assertFalse(await tab.evaluate(visible("[data-state=refused] button")))
                await tab.push("[data-state=refused] button + button")
                await tab.shows(STATES, own)
                text = await tab.evaluate(one("#draft", "value"))
                self.assertEqual(text, "x" * size + "\nmore")
                self.assertEqual(await tab.evaluate("sessionStorage.chatDraft"), text)
                self.assertEqual(await tab.evaluate(FOCUS), "draft")
                await tab.evaluate(one("#draft", "select()"))
                await tab.say("next")

    async def test_send_again(self):
        """A message that was refused for now can be sent again as it is."""
        with mock.patch.object(self.room, "publish", mock.AsyncMock()):  # it publishes nothing
            async with self.tab(before=pace(1)) as tab:
                await tab.type("😀" * 2_000 + "\n")
                await until(tab.sent)
                (said,) = tab.sent()
                chat.push(self.room.connections, said | {"type": "error", "content": "Not now."})
                await tab.until(says("[data-state=refused]", "Not now."))
                await tab.shows("asked.findLast(ms => ms >= 5_000)", 45_000)  # no echo is due
                await tab.click("[data-state=refused] button")
                await until(lambda: tab.sent() == [said, said])
                await tab.shows(STATES, ["waiting"])
                self.assertEqual(await tab.evaluate(FOCUS), "draft")
                stored = "JSON.parse(sessionStorage.chatWaiting).map(entry => entry.refused)"
                self.assertEqual(await tab.evaluate(stored), [None])
                self.assertEqual(len(tab.attempts()), 1)

    async def test_taken_back_too_late(self):
        """Taking back what was delivered in that moment takes nothing, neither it nor another."""
        with mock.patch.object(self.room, "publish", mock.AsyncMock()):  # it publishes nothing
            async with self.tab() as tab:
                await tab.type("one\ntwo\n")
                await until(lambda: len(tab.sent()) == 2)
                for said in tab.sent():
                    error = said | {"type": "error", "content": "Not now."}
                    chat.push(self.room.connections, error)
                await tab.shows(STATES, ["refused", "refused"])
                back = one("#messages li button + button", "click()")
                await tab.evaluate(f"chat.addEventListener('message', () => {back})")
                self.room.deliver(message("one", "a", nonce=tab.sent()[0]["nonce"]))
                await tab.shows(STATES, ["delivered", "refused"])
                self.assertEqual(await tab.evaluate("waiting.map(entry => entry.content)"), ["two"])
                self.assertEqual(await tab.evaluate(one("#draft", "value")), "")

    async def test_nonces(self):
        """What is the same by nonce and content is shown once, other words are another's."""
        let_through = self.hold()
        tab = await self.open()
        await tab.type("mine\n")
        await until(tab.sent)
        nonce = tab.sent()[0]["nonce"]
        self.room.deliver(message("not mine", "a", nonce=nonce))
        await tab.shows(LOG, ["other not mine", "own waiting mine"])
        let_through.set()
        await tab.shows(STATES, ["delivered"])
        self.room.history.clear()
        for content in "mine", "not mine", "nor this":
            self.room.deliver(message(content, content, nonce=nonce))
        await tab.shows(LOG, ["other not mine", "own delivered mine", "other nor this"])

    async def test_duplicated_tab(self):
        """Of what waits in a tab and its duplicate, all see one; later words are one's own."""
        let_through = self.hold()
        tab = await self.open()
        await tab.type("both\n")
        copy = await tab.evaluate("JSON.stringify(sessionStorage)")
        before = f"if (!sessionStorage.chatWaiting) Object.assign(sessionStorage, {copy})"
        async with self.tab(before=before) as twin:
            let_through.set()
            await tab.shows(LOG, ["own delivered both"])
            await twin.shows(LOG, ["own delivered both"])
            await tab.say("later")
            await twin.shows(LOG, ["own delivered both", "other later"])

    async def test_bad_frames(self):
        """A frame that is unknown or cannot be drawn costs itself alone."""
        bad = {"type": "typing"}, ["no", "object"], 5, {"type": "presence", "content": 5}
        tab = await self.open()
        self.fill(1)
        for frame in *bad, *[message("bad", f"bad{n}", time="no time") for n in range(5)]:
            chat.push(self.room.connections, frame)
        self.fill(1, start=1)
        await tab.shows(TEXTS, ["0", "1"])

    async def test_frames_before_the_welcome(self):
        """What comes before the welcome counts for nothing: all of the history is shown."""
        self.fill(2)
        join = self.room.join

        def hasty_join(connection, after):
            chat.push([connection], message("2", "2"))
            return join(connection, after)

        with mock.patch.object(self.room, "join", hasty_join):
            async with self.tab() as tab:
                await tab.shows(TEXTS, ["0", "1"])

    async def test_status(self):
        """The status says how the connection is, and why; without one, the name looks like past."""
        past = "getComputedStyle(document.querySelector('#name').closest('p')).opacity < 1"
        tab = await self.open(before=UNHURRIED)
        for button in "#cut", "#unplug", "#unplug", "#cut":
            await tab.push(button)
        self.assertEqual(await tab.evaluate(STATE), "reconnecting")  # it had called in vain
        await tab.push("#now")
        await tab.until(ONLINE)
        await until(lambda: len(self.room.connections) == 1)  # that before the cut has ended
        for button, capacity, end, state, words in (
            ("#unplug", 9, None, "unplugged", "Hung up"),
            ("#unplug", 9, None, "online", "Connected"),
            ("h1", 0, self.cut_off, "reconnecting", "No connection"),
            ("#now", 0, None, "reconnecting", "The room is full."),
            ("#now", 9, None, "online", "Connected"),
            ("h1", 9, self.server.close, "reconnecting", "The server was stopped"),
        ):
            with self.subTest(words):
                self.room.capacity = capacity
                await tab.push(button)
                if end:
                    end()
                await tab.until(says("#status", words))
                self.assertEqual(await tab.evaluate(STATE), state)
                self.assertEqual(await tab.evaluate(past), state != "online")
                self.assertEqual(await tab.evaluate(visible("#now")), state == "reconnecting")
                label = says("#unplug", "Call again")
                self.assertEqual(await tab.evaluate(label), state == "unplugged")

    async def test_deadlines(self):
        """No answer for 10 s, no frame for 45 s, or for 5 s when an echo is due, is an end."""
        deaf = "window.WebSocket = class extends EventTarget { close() {} };"
        async with self.tab(before=pace(1) + UNHURRIED + deaf, ready="true") as tab:
            await tab.shows(one("#status", "innerText"), "Connecting")
            await tab.type("early\n")
            await tab.shows(STATES, ["waiting"])
            await tab.evaluate("latest[10000](), 0")  # no answer in time
            await tab.until(OFFLINE)
            await tab.push("#now")
            self.assertFalse(await tab.evaluate(visible("#now")))  # an attempt is under way
            self.assertEqual(await tab.evaluate(STATE), "reconnecting")
            await tab.shows(one("#countdown", "innerText"), "")
            await tab.push("#unplug")
            await tab.push("#unplug")
            await tab.shows(STATE, "connecting")  # as if nothing had been tried yet
        self.enterContext(mock.patch.object(self.room, "publish", mock.AsyncMock()))  # no echo
        for ms in 45_000, 5_000:
            async with self.tab(before=pace(1) + UNHURRIED) as tab:
                await tab.until(f"{LINES}.length")
                await tab.evaluate("latest = {}")
                if ms == 5_000:
                    await tab.type("hello\nhello\n")
                    await until(lambda tab=tab: len(tab.sent()) == 2)
                    asked = "asked.filter(ms => ms === 5_000).length"
                    self.assertEqual(await tab.evaluate(asked), 1)  # who talks does not prolong it
                    self.room.presence.push()
                    await tab.shows(asked, 2)
                else:
                    self.room.presence.push()
                await tab.until(f"latest[{ms}]")
                due = await tab.evaluate("[...pending.values()].filter(ms => ms >= 5_000)")
                self.assertEqual(due, [10_000, ms])  # until it has settled, and the one deadline
                await tab.evaluate(f"latest[{ms}](), 0")
                await tab.until(OFFLINE)

    async def test_late_events(self):
        """What a connection brings after it has counted as ended is not heard."""
        keep = """const Real = WebSocket;
            window.sockets = [];
            window.WebSocket = class extends Real {
                constructor(url) { super(url); sockets.push(this); }
            };"""
        late = json.dumps({"data": json.dumps(message("late", "late"))})
        tab = await self.open(before=keep)
        (connection,) = self.room.connections
        await tab.push("#unplug")
        await until(lambda: connection.close_code)
        self.assertEqual(connection.close_code, 1000)
        await tab.push("#unplug")
        await tab.until(ONLINE)
        for event in f"MessageEvent('message', {late})", "CloseEvent('close', {code: 1006})":
            await tab.evaluate(f"sockets[0].dispatchEvent(new {event})")
        await tab.say("hello")
        self.assertEqual(await tab.evaluate(TEXTS), ["hello"])
        self.assertEqual(len(tab.attempts()), 2)

    async def test_missed(self):
        """However a connection ends, what was missed is shown and what was typed goes out, once."""
        said = ["one", "two", "missed", "mine"]
        ways = "offline reconnecting", "#unplug unplugged", "#cut reconnecting", "#cut online"
        for way in ways:
            self.room.history.clear()
            button, state = way.split()
            with self.subTest(way):
                async with self.tab(before=pace(30)) as tab, Client(self.port) as friend:
                    await tab.say("one")
                    await friend.say("two")
                    await tab.shows(LOG, ["own delivered one", "other two"])
                    last = (await tab.evaluate(IDS))[1]
                    await (tab.offline(True) if button == "offline" else tab.push(button))
                    await friend.say("missed")
                    await tab.type("mine\n")
                    if state == "reconnecting":
                        await tab.evaluate("latest[5000]?.(), 0")  # no echo in time
                    await tab.shows(STATE, state)
                    await tab.shows(STATES, ["delivered", "waiting"])
                    await (tab.offline(False) if button == "offline" else tab.push(button))
                    await tab.shows(STATES, ["delivered", "delivered"])
                    await tab.shows(TEXTS, said)
                    self.assertEqual(await friend.contents(4), said)
                    self.assertEqual([f["content"] for f in tab.sent()].count("one"), 1)
                    self.assertTrue(tab.attempts()[1].endswith(f"/ws?after={last}"))

    async def test_dividers(self):
        """One line says where messages may be missing, also to a tab that has seen nothing yet."""
        for said, missed, times, dividers in ([], 3, 1, 0), ([], 60, 1, 1), (["before"], 0, 3, 1):
            self.room.history.clear()
            with self.subTest(said=said, missed=missed):
                async with self.tab() as tab:
                    for text in said:
                        await tab.say(text)
                        self.room.history.clear()
                    for _ in range(times):
                        await tab.push("#unplug")
                        await until(lambda: not self.room.connections)
                        self.fill(missed)
                        await tab.push("#unplug")
                        await tab.until(ONLINE)
                    await tab.say("after")
                    shown = f"{LINES}.filter(line => line.includes('may be missing')).length"
                    self.assertEqual(await tab.evaluate(shown), dividers)
                    more = await tab.evaluate(says("#wire", "missed, or more"))
                    self.assertEqual(more, bool(dividers))

    async def test_delays(self):
        """The delays to reconnect double from 1 s to 30 s, half by chance, welcomed or not."""
        join = self.room.join

        def cut_off(connection, after):
            asyncio.get_running_loop().call_soon(connection.transport.abort)
            return join(connection, after)

        self.enterContext(mock.patch.object(self.room, "join", cut_off))
        least = "500 ms, 1.0 s, 2.0 s, 4.0 s, 8.0 s, 15.0 s"
        most = "1.0 s, 2.0 s, 4.0 s, 8.0 s, 16.0 s, 30.0 s, 30.0 s"
        refused, welcomed = [(100, 0, 0, least), (100, 1, 0, most)], [(100, 0, 9, least[:27])]
        shown = look("#wire [data-kind=wait]", "e.textContent.match(/[0-9.]+ m?s/)[0]")
        for times, chance, capacity, delays in refused + welcomed:
            self.room.capacity = capacity
            before = pace(times) + f"Math.random = () => {chance};"
            with self.subTest(chance=chance, capacity=capacity):
                async with self.tab(before=before, ready="true") as tab:
                    count = len(delays.split(", "))
                    await tab.shows(f"{shown}.slice(0, {count}).join(', ')", delays)

    async def test_settled(self):
        """Failures are told once; after 10 s with a connection the delays begin anew."""
        self.room.capacity = 0
        tab = await self.open(before=pace(20) + "Math.random = () => 0;", ready=OFFLINE)
        await tab.evaluate(watch("#status"))
        await tab.until("asked.includes(8000)")
        self.assertEqual(await tab.evaluate("batches"), [])
        self.room.capacity = 9
        await tab.until(ONLINE)
        await tab.evaluate("latest[10000](), asked.length = 0")  # now it has lasted
        (connection,) = self.room.connections
        await connection.close(1011)  # without a reason
        await tab.until("asked.includes(500)")
        await tab.until(says("#status", "closed: 1011"))

    async def test_at_once(self):
        """A button, a network that is back or coming to the front end the wait, and do no more."""

        async def come_back(tab, way):
            if way == "button":
                press = one("#now", "click()")
                await tab.evaluate(f"{press}, {press}")  # as who is in a hurry does
            if way == "network":
                await tab.offline(True)
                await tab.offline(False)
            if way == "front":
                await tab.hide(True)
                await tab.hide(False)

        for way in "button", "network", "front":
            self.room.capacity = 0
            with self.subTest(way):
                async with self.tab(before=UNHURRIED + LATER, ready=OFFLINE) as tab:
                    await tab.until(says("header", "31 s"))
                    await tab.evaluate("later += 600")
                    await tab.until(says("header", "30 s"))
                    self.room.capacity = 9
                    await come_back(tab, way)
                    await tab.until(ONLINE)
                    self.assertFalse(await tab.evaluate(says("header", " s")))
                    await come_back(tab, way)
                    await tab.say("hello")
                    await tab.push("#unplug")
                    await come_back(tab, way)
                    self.assertEqual(await tab.evaluate(STATE), "unplugged")
                    self.assertEqual(len(tab.attempts()), 2)

    async def test_reload(self):
        """After a reload all is as it was, and only what waits is sent, with its old nonce."""
        long = "x" * 2_001
        before = "sessionStorage.chatOwn ??= JSON.stringify([...Array(500).keys()])"
        tab, other = await self.open(before=before), await self.join()
        await other.say("theirs")
        await tab.shows(LOG, ["other theirs"])
        let_through = self.hold()
        await tab.type(f"{long}\nmine\ndraft")
        waiting = ["other theirs", f"own refused {long}", "own waiting mine"]
        await tab.shows(LOG, waiting)
        await tab.reload()
        await tab.shows(LOG, waiting)
        self.assertEqual(await tab.evaluate(one("#draft", "value")), "draft")
        await tab.until(says("#wire", "message, again"))
        let_through.set()
        delivered = ["other theirs", "own delivered mine", f"own refused {long}"]
        await tab.shows(LOG, delivered)
        await tab.reload()
        await tab.shows(LOG, delivered)
        self.room.history.clear()
        await tab.reload()
        await tab.shows(LOG, delivered[2:])
        _, first, again = tab.sent()
        self.assertEqual(again, first)

    async def test_rubbish_in_storage(self):
        """Whatever was stored, the page works, and sends nothing that would not come back."""
        nonce = "0123456789abcdef01234567"
        good = {"nonce": nonce, "content": "good"}
        entries = [{"nonce": "", "content": "a"}, {"nonce": "x" * 65, "content": "b"}, good, good]
        entries += [{"nonce": nonce[::-1], "content": " padded "}, {"nonce": 1}, None, [[]]]
        entries += [{"nonce": [nonce], "content": "a list is not text"}]
        tab = await self.open()
        for text in "x", "{}", "5", "null", '"text"', json.dumps(entries):
            with self.subTest(text):
                stored = json.dumps(dict.fromkeys(["chatWaiting", "chatOwn"], text))
                await tab.evaluate(f"Object.assign(sessionStorage, {stored})")
                await tab.reload()
                self.assertEqual(tab.problems(), [])
                await tab.say("hello")
        contents = [frame["content"] for frame in tab.sent()]
        self.assertEqual(contents, ["hello"] * 5 + ["good", "hello"])

    async def test_names_and_times(self):
        """Within a minute one name stands above what a person says, with its time and date."""
        tab = await self.open()
        await tab.call("Emulation.setTimezoneOverride", timezoneId="Asia/Tokyo")
        await tab.reload()
        for name, at in ("A", "02:03"), ("A", "03:02"), ("A", "04:02"), ("B", "04:02"):
            said = message("x", f"{name} {at}", f"2026-03-04T01:{at}.000+00:00")
            self.room.deliver(said | {"username": name})
        await tab.shows(look(".name", "e.checkVisibility()"), [True, False, True, True])
        shown = await tab.evaluate(look("time", "e.textContent + ' ' + e.title"))
        self.assertRegex(shown[0], "10:02.* March 4, 2026.*10:02:03")

    async def test_colours(self):
        """Each person has one colour, everywhere, in every tab; their neighbour has another."""
        colour, colours = "[e.innerText, getComputedStyle(e).color]", []
        for names in ("Port50000", "Port50002"), ("Port50002", "Port50000"):
            self.room.history.clear()
            for name in names:
                self.room.deliver(message(f"I am {name}", name) | {"username": name})
            async with self.tab() as tab:
                await tab.say("hello")
                *others, own = await tab.evaluate(look("#messages .name", colour))
                self.assertEqual(await tab.evaluate(look("#name", colour)), [own])
                lane = await tab.evaluate(look("#lanes :first-child", colour))
                self.assertEqual(lane, [["this tab", own[1]]])
                colours.append(sorted(others))
        self.assertEqual(*colours)
        self.assertNotEqual(colours[0][0][1], colours[0][1][1])

    async def test_bubbles(self):
        """A text keeps to its bubble, whatever it is; own ones stand right, others' left."""
        style = "(s => [s.direction, s.unicodeBidi, s.overflowX])(getComputedStyle(e))"
        place = "(b => b.left + b.right)(e.getBoundingClientRect()) > innerWidth"
        tab = await self.open()
        await tab.size(800, 600)  # without the wire
        self.room.deliver(message("\n".join("x" * 1000), "a"))
        self.room.deliver(message("a" + "\u0301" * 1999, "b"))
        await tab.say("שלום!")
        shown = await tab.evaluate(look(".text", f"[e.clientHeight, {place}, ...{style}]"))
        (tall, *first), (piled, *second), (_, *third) = shown
        self.assertLess(tall, 400)
        self.assertLess(piled, 60)
        self.assertEqual([first, second], [[False, "ltr", "isolate", "hidden"]] * 2)
        self.assertEqual(third, [True, "rtl", "isolate", "hidden"])
        self.assertEqual(await tab.evaluate(look(".text", "e.tabIndex")), [0, 0, -1])

    async def test_presence_lines(self):
        """However often people come and go, one quiet line at the bottom tells the latest."""
        tab = await self.open()
        await tab.until(f"{LINES}.length")
        self.fill(1)
        for number in range(5):
            self.room.presence.tell(f"Port{number}", "left")
            self.room.presence.push()
        await tab.until(f"{LINES}.at(-1) === 'Port4 left.'")
        self.assertEqual(await tab.evaluate(f"{LINES}.length"), 2)
        self.assertEqual(await tab.evaluate(TEXTS), ["0"])
        bottoms = look("#log, #messages", "e.getBoundingClientRect().bottom")
        self.assertAlmostEqual(*await tab.evaluate(bottoms), delta=2)

    async def test_following(self):
        """Who is at the bottom, or speaks, follows what comes; for others a pill counts it."""
        at_bottom = "(e => e.scrollHeight - e.scrollTop - e.clientHeight < 2)(log)"
        wheel = {"type": "mouseWheel", "x": 300, "y": 300, "deltaX": 0, "deltaY": -200}
        tab = await self.open()
        self.fill(50)
        await tab.until(f"{TEXTS}.length === 50 && {at_bottom}")
        await tab.call("Input.dispatchMouseEvent", **wheel)
        await tab.until(f"!{at_bottom}")
        top = await tab.evaluate("log.scrollTop")
        self.fill(3, start=50)
        await tab.until(says("#pill", "3 new"))
        self.assertEqual(await tab.evaluate("log.scrollTop"), top)
        await tab.type("draft")  # which a pill does not send
        await tab.click("#pill")
        await tab.until(f"{at_bottom} && !{visible('#pill')}")
        self.fill(1, start=53)
        await tab.until(f"{TEXTS}.length === 54 && {at_bottom}")
        await tab.call("Input.dispatchMouseEvent", **wheel)
        await tab.until(f"!{at_bottom}")
        self.fill(1, start=54)
        await tab.until(says("#pill", "1 new"))
        await tab.call("Input.dispatchMouseEvent", **wheel | {"deltaY": 900})
        await tab.until("atEnd.get(log)")
        self.assertFalse(await tab.evaluate(visible("#pill")))
        await tab.call("Input.dispatchMouseEvent", **wheel)
        await tab.until(f"!{at_bottom}")
        self.assertEqual(await tab.evaluate(STATES), [])
        await tab.say("hello")
        await tab.until(at_bottom)
        for height in "300px", "auto":
            await tab.evaluate(f"composer.style.height = '{height}'")
            await tab.until(at_bottom)
        await tab.size(500, 900)
        await tab.until(at_bottom)
        resized = "document.body.style.height = '400px', dispatchEvent(new Event('resize'))"
        for change in resized, "toggle.click()":
            await tab.evaluate(f"log.scrollTop--, {change}, 0")  # before the event of the scrolling
            await tab.until(at_bottom)

    async def test_unread(self):
        """A hidden tab is silent, and its title counts what others say, until it is seen."""
        let_through = self.hold()
        tab = await self.open()
        await tab.type("mine\n")
        await tab.hide(True)
        let_through.set()
        await tab.shows(STATES, ["delivered"])
        self.assertNotIn("mine", await tab.evaluate(one("#spoken", "textContent")))
        self.fill(3)
        await tab.shows("document.title", "(3) Chat")
        await tab.hide(False)
        await tab.shows("document.title", "Chat")

    async def test_alone(self):
        """Whoever is first is told so, and a button opens a second tab that inherits nothing."""
        tab = await self.open()
        await tab.until(says("#alone", "first one here"))
        self.assertTrue(await tab.evaluate(says("#alone", "--host 0.0.0.0")))
        await tab.push("#second")
        await tab.shows(visible("#alone"), False)
        targets = (await tab.call("Target.getTargets"))["targetInfos"]
        (second,) = [t for t in targets if t["url"] == tab.url and not t["attached"]]
        self.assertFalse(second["canAccessOpener"])
        await tab.say("hello")
        await tab.call("Target.closeTarget", targetId=second["targetId"])
        await tab.shows(one("#online", "textContent"), "1")
        self.assertFalse(await tab.evaluate(visible("#alone")))

    async def test_beside(self):
        """The second window takes the half of the screen where this one is not."""
        tab = await self.open()
        await tab.evaluate("window.open = (url, name, features) => { window.features = features; }")
        for x, left in (0, 800), (600, 0):
            own = {"screenX": x, "outerWidth": 1_000, "screen": {"availWidth": 1_600}}
            for name, value in own.items():
                value = json.dumps({"value": value, "configurable": True})
                await tab.evaluate(f"Object.defineProperty(window, '{name}', {value}), 0")
            await tab.push("#second")
            self.assertIn(f"left={left},width=800", await tab.evaluate("features"))

    async def test_storm(self):
        """Of 600 messages 25 are drawn at a time; typing gets through, and the last 500 stay."""
        tab = await self.open()
        await tab.evaluate(watch("#messages"))
        for start in 0, 300:
            self.fill(300, start=start)
            await tab.type("x")
            await tab.until(f"{TEXTS}.includes('{start + 299}')")
        self.assertEqual(await tab.evaluate(one("#draft", "value")), "xx")
        await tab.shows("messages.childElementCount", 500)
        self.assertEqual(await tab.evaluate(f"{TEXTS}.at(-1)"), "599")
        self.assertLessEqual(max(map(len, await tab.evaluate("batches"))), 25)

    async def test_hidden_storm(self):
        """Of all that a hidden tab gets before it may draw, only what stays is drawn."""
        hold = """const soon = setTimeout;
            window.held = [];
            window.setTimeout = (action, ms, ...more) =>
                ms === 16 && document.hidden ? held.push(action) : soon(action, ms, ...more);"""
        let_through, tab = self.hold(), await self.open(before=hold)
        await tab.until(f"{LINES}.length")
        await tab.type("mine\n")
        await tab.shows(STATES, ["waiting"])
        await tab.hide(True)
        await tab.evaluate(watch("#messages"))
        let_through.set()
        await until(lambda: self.room.history)
        self.fill(1500)
        await tab.shows("document.title", "(1500) Chat")
        await tab.evaluate("held.forEach(action => action())")
        await tab.until(f"{TEXTS}.includes('1499')")
        self.assertEqual(await tab.evaluate("batches.flat().length"), 500)
        self.assertEqual(await tab.evaluate(STATES), [])  # its own is older, and waits no more

    async def test_draft_grows(self):
        """Shift+Enter breaks the line, the draft grows to five lines, and Enter sends it all."""
        height = one("#draft", "clientHeight")
        tab = await self.open()
        heights = []
        for line in range(8):
            heights.append(await tab.evaluate(height))
            await tab.type(f"{line}")
            await tab.press("Enter", modifiers=8)
        self.assertEqual(heights[:5], sorted(set(heights[:5])))
        self.assertEqual(heights[5:], [heights[5]] * 3)
        await tab.say("end")
        shown = await tab.evaluate(look("#messages .text", "e.innerText"))
        self.assertEqual(shown, ["\n".join([*"01234567", "end"])])
        self.assertEqual(await tab.evaluate(height), heights[0])

    async def test_composition(self):
        """The Enter that ends an input method's composition does not send, nor does Safari's."""
        tab = await self.open()
        ime = {"selectionStart": 2, "selectionEnd": 2}
        await tab.call("Input.imeSetComposition", text="に", **ime)
        await tab.press("Enter")
        await tab.call("Input.insertText", text="日本")
        await tab.press("Enter", windowsVirtualKeyCode=229)
        self.assertEqual(await tab.evaluate(STATES), [])
        await tab.say("")
        self.assertEqual(await tab.evaluate(TEXTS), ["日本"])

    async def test_counter(self):
        """Near 2,000 characters, as the server counts, a counter appears, red past them."""
        counter = look("#counter", "[e.textContent, getComputedStyle(e).color]")
        colours = []
        async with self.tab() as tab:
            for size in 1800, 1801, 2000, 2001:
                await tab.evaluate(one("#draft", "select()"))
                await tab.type("😀" * size)
                ((shown, colour),) = await tab.evaluate(counter)
                colours.append(colour)
                self.assertEqual(shown, f"{size:,} of 2,000 characters" if size > 1800 else "")
        self.assertEqual([colour == colours[0] for colour in colours], [True, True, True, False])

    async def test_focus(self):
        """The draft has the focus first, after sending, and after a button that is hidden."""
        tab = await self.open()
        await tab.until(visible("#alone"))
        self.assertEqual(await tab.evaluate(FOCUS), "draft")
        await tab.evaluate(one("#second", "focus()"))
        async with Client(self.port):
            await tab.shows(visible("#alone"), False)
            self.assertEqual(await tab.evaluate(FOCUS), "draft")
        await tab.type("hello")
        await tab.click("#send")
        self.assertEqual(await tab.evaluate(FOCUS), "draft")

    async def test_keyboard(self):
        """The Tab key alone reaches everything that can be used, visibly."""
        buttons = {"second", "send", "unplug", "cut", "slow", "pause", "wire-toggle"}
        tab = await self.open()
        await tab.until(visible("#alone"))
        reached = set()
        for _ in range(25):
            await tab.press("Tab")
            reached.add(await tab.evaluate(FOCUS))
            outline = "getComputedStyle(document.activeElement).outlineStyle"
            if await tab.evaluate("document.activeElement !== document.body"):
                self.assertEqual(await tab.evaluate(outline), "solid")
        self.assertLessEqual({"log", "draft", *buttons}, reached)

    async def test_spoken_once(self):
        """Those who listen to the page hear each message once, but not all of a storm."""
        tab = await self.open()
        await tab.evaluate(watch("[aria-live=polite]"))
        await tab.say("mine")
        self.fill(1)
        said = "batches.flat().filter(text => !text.includes('joined'))"
        await tab.shows(said, ["You: mine", "Port1: 0"])
        self.assertEqual(await tab.evaluate(one("#log", "ariaLive")), "off")
        self.fill(200, start=1)
        await tab.shows(f"{TEXTS}.length", 202)
        self.assertLess(await tab.evaluate("batches.flat().length"), 100)

    async def test_layout(self):
        """The page does not scroll, its log not sideways, no row is long, all buttons are big."""
        size = "(b => Math.min(b.width, b.height))(e.getBoundingClientRect())"
        sizes = look("button, #draft", f"e.checkVisibility() ? {size} : 99")
        self.fill(50)
        tab = await self.open()
        await tab.say("x" * 300)
        for width, height in (1280, 800), (320, 568):
            await tab.size(width, height)
            fits = "[e.scrollWidth <= e.clientWidth, e.scrollHeight <= e.clientHeight]"
            self.assertEqual(await tab.evaluate(look("html", fits)), [[True, True]])
            self.assertEqual(await tab.evaluate(look("#log", fits)), [[True, False]])
            mine = look("[data-kind=own] .text", fits)
            self.assertEqual(await tab.evaluate(mine), [[True, True]])
            self.assertGreaterEqual(await tab.evaluate(f"Math.min(...{sizes})"), 44)
            self.assertLess(max(await tab.evaluate(look("#wire li", "e.clientHeight"))), 100)

    async def test_reduced_motion(self):
        """Where the system asks for reduced motion, nothing moves, in the log or on the wire."""
        reduce = [{"name": "prefers-reduced-motion", "value": "reduce"}]
        count = "window.moved = 0; addEventListener('animationstart', () => moved++, true)"
        tab = await self.open()
        await tab.call("Emulation.setEmulatedMedia", features=reduce)
        await tab.evaluate(count)
        await tab.say("hello")
        await tab.until(says("#wire", "hello"))
        self.assertEqual(await tab.evaluate("document.getAnimations().length + moved"), 0)


ROWS = look("#wire li", "e.dataset.kind")
# What a row shows: for each arrow its lane, its direction or where it is lost, and its line; then
# the words
ROW = """[...[...e.querySelectorAll(".leg")].map(leg => {
    const box = leg.getBoundingClientRect(), row = e.getBoundingClientRect();
    const line = getComputedStyle(leg, "::before"), head = getComputedStyle(leg, "::after");
    const lane = box.x + box.width / 2 < row.x + row.width / 2 ? "near" : "far";
    const isLeft = ({left, right}) => parseFloat(left) < parseFloat(right);
    const isRight = ({left, right}) => parseFloat(left) > parseFloat(right);
    const lost = isLeft(line) ? "─✕" : isRight(line) ? "✕─" : "✕";
    const way = head.clipPath === "none" ? "" : isLeft(head) ? "←" : "→";
    return `${lane} ${head.content.includes("✕") ? lost : way} ${line.borderBottomStyle}`;
}), e.querySelector("summary").textContent].join(", ")"""


class Wire(BrowserCase):
    async def open(self, **options):
        """Return a tab that has drawn the presence, the last row that is due."""
        tab = await super().open(**options)
        await tab.until(f"{ROWS}.includes('presence')")
        return tab

    async def rows(self, tab, *kinds):
        """Wait until the wire ends with rows of these kinds, presence apart; return them."""
        listed = f"{ROWS}.filter(kind => kind !== 'presence').slice(-{len(kinds)})"
        await tab.shows(listed, list(kinds))
        rows = await tab.evaluate(look("#wire li:not([data-kind=presence])", ROW))
        return rows[-len(kinds) :]

    async def test_rows(self):
        """Each event has a row: arrows from who speaks to whom, dashed if inferred, and words."""
        self.fill(1)
        other, _, tab = await self.join(), await self.join(), await self.open(before=UNHURRIED)

        async def expect(**rows):
            for kind, row in zip(rows, await self.rows(tab, *rows), strict=True):
                with self.subTest(kind):
                    self.assertRegex(row, rows[kind])

        opening = {
            "request": "^near → dashed, This tab: GET /ws",
            "response": "^near ← dashed, The server: 101.* [0-9]+ ms",
        }
        await expect(**opening, welcome="^near ← solid, The server: welcome.* 1 remembered")
        await tab.say("hello")
        size = len(tab.payloads("Sent")[0])
        send = f"^near → solid, This tab: message.* {size} bytes.* “hello”"
        echo = "^near ← solid, far → dashed, .* your own, after [0-9]+ ms.* to 2 other tabs"
        await expect(send=send, echo=echo)
        await other.say("hi")
        heard = f"{other.name} spoke.* “hi”.* to 2 other tabs, the sender included"
        await expect(message=f"^near ← solid, far ← dashed, far → dashed, .* {heard}")
        await tab.type("x" * 2001 + "\n")
        await expect(send="^near → solid", error="^near ← solid, The server: error")
        chat.push(self.room.connections, {"type": "typing", "who": "Port1"})
        await expect(unknown="^near ← solid, The server: typing")
        await tab.push("[data-kind=unknown] summary")
        await tab.until(says("[data-kind=unknown] pre", '"who": "Port1"'))
        self.assertFalse(await tab.evaluate(says("[data-kind=unknown] pre", "undefined")))
        await tab.push("#unplug")
        await expect(close="^near → solid, This tab: close 1000 normal closure")
        await until(lambda: len(self.room.connections) == 2)
        self.fill(2, start=1)
        await tab.push("#unplug")
        opening["request"] += r"\?after="
        await expect(**opening, welcome=" 2 missed")
        with mock.patch.object(self.room, "publish", mock.AsyncMock()):  # it is lost
            await tab.type("unheard\n")
            await expect(send="“unheard”")
            await tab.push("#unplug")
            await until(lambda: len(self.room.connections) == 2)
        await tab.push("#unplug")
        await expect(welcome=" 0 missed", resend="^near → solid, .*again.* “unheard”", echo=echo)
        frames_up = look("#frames-up", "e.innerText")
        sent = [tab.sent(), await tab.evaluate(frames_up)]
        await tab.push("#cut")
        await tab.until(says("#cut", "Mend the line"))
        await tab.type("unsaid\n")
        await other.say("unheard")
        for row in "─✕ solid, This tab: .*“unsaid”", "✕─ solid, The server: .*“unheard”":
            lost = look("#wire [data-kind=lost]", f"/^near {row}/.test({ROW})")
            await tab.until(f"{lost}.includes(true)")
        self.assertEqual([tab.sent(), await tab.evaluate(frames_up)], sent)
        self.assertEqual(await tab.evaluate(STATE), "online")
        self.room.capacity = 0
        await tab.push("#cut")
        await expect(close="no answer.* 1006", wait=r"30.5 s to reconnect")
        await tab.push("#now")
        full = "^near ← solid, The server: close 1013.* The room is full"
        await expect(**opening, close=full, wait="[0-9.]+ s to reconnect")
        self.server.close()
        await tab.push("#now")
        await expect(request=opening["request"], close="no answer.* 1006", wait="[0-9.]+ s")
        self.room.capacity = 9
        self.server, _ = await self.serve(self.port)
        await tab.push("#now")
        await expect(**opening, welcome=" missed", resend="“unsaid”", echo="your own, after")
        self.server.close()
        await expect(close="^near ← solid, The server: close 1001 going away", wait="[0-9.]+ s")

    async def test_presence(self):
        """Presence is pushed to everyone, and a heartbeat is a row, but no line in the log."""
        rows = look("#wire [data-kind=presence]", ROW)
        tab = await self.open()
        await tab.shows(f"{rows}.length", 1)
        async with Client(self.port):
            await tab.shows(f"{rows}.length", 2)
            row = (
                "^near ← solid, far → dashed, The server: .* 2 online. The server: to 1 other tab,"
            )
            self.assertRegex((await tab.evaluate(rows))[1], row)
            lines = await tab.evaluate(LINES)
            self.room.presence.push()
            await tab.shows(f"{rows}.length", 3)
            self.assertEqual(await tab.evaluate(LINES), lines)

    async def test_push_and_answer(self):
        """A push has a box in its speaker's colour, the first one a caption; the echo is filled."""
        style = "(s => [s.outlineStyle, s.backgroundColor])(getComputedStyle(e))"
        line = "(s => [s.borderBottomWidth, s.borderBottomColor])"
        first = "getComputedStyle(e.querySelector('.leg'), '::before')"
        caption = "getComputedStyle(e, '::after').content"
        what = f"[e.dataset.kind, [...{style}, ...{line}({first})]]"
        other, tab = await self.join(), await self.open()
        await tab.say("hello")
        await other.say("hello")
        await self.rows(tab, "echo", "message")
        rows = dict(await tab.evaluate(look("#wire li", what)))
        names = await tab.evaluate(look("#messages .name", "getComputedStyle(e).color"))
        self.assertEqual(rows["message"], ["solid", "rgba(0, 0, 0, 0)", "2px", names[1]])
        self.assertEqual(rows["presence"][:3], rows["message"][:3])
        outline, filling, *thick = rows["echo"]
        self.assertEqual([outline, *thick], ["none", "4px", names[0]])
        self.assertNotEqual(filling, "rgba(0, 0, 0, 0)")
        captions = await tab.evaluate(look("#wire li", caption))
        captions = [text != "none" for text in captions]
        kinds = await tab.evaluate(ROWS)
        self.assertEqual(captions, [kind == "message" for kind in kinds])

    async def test_counters(self):
        """Frames and bytes, up and down, and their ratio are what really passed."""
        digits = "Number(e.innerText.replace(/[^0-9]/g, ''))"
        counts = look("#frames-up, #bytes-up, #frames-down, #bytes-down", digits)
        tab, other = await self.open(), await self.join()
        await tab.type("żółć 👋\nhello\n" + "x" * 2001 + "\n")
        await other.say("hi")
        await tab.until(f"{TEXTS}.includes('hi')")
        await tab.until(says("#wire", "2 online"))
        passed = []
        for way in "Sent", "Received":
            payloads = tab.payloads(way)
            passed += [len(payloads), sum(len(payload.encode()) for payload in payloads)]
        await tab.shows(counts, passed)
        ratio = f"{passed[2] / passed[0]:.1f} for each sent"
        self.assertTrue(await tab.evaluate(says("#panel", ratio)))

    async def test_open_row(self):
        """A row opens on a click or Enter, shows its frame field by field, and stays in view."""
        tab = await self.open()
        await tab.size(1280, 600)
        await tab.say("żółć")
        await self.rows(tab, "send", "echo")
        await tab.click("[data-kind=send] summary")
        await tab.until(says("[data-kind=send] pre", '"żółć"'))
        await tab.evaluate(one("[data-kind=echo] summary", "focus()"))
        await tab.press("Enter")
        await tab.until(says("[data-kind=echo] pre", '"żółć"'))
        (data,) = (text for text in tab.payloads("Received") if '"message"' in text)
        text = await tab.evaluate(one("[data-kind=echo] pre", "innerText"))
        self.assertTrue(text.startswith(data))
        self.assertIn(f"{len(data.encode())} bytes on the wire", text)
        for key, value in json.loads(data).items():
            value = re.escape(json.dumps(value, ensure_ascii=False))
            self.assertRegex(text, f"{json.dumps(key)}: {value}  [a-z]")
        await tab.evaluate("diagram.scrollTop = diagram.scrollHeight")
        await tab.until("atEnd.get(diagram)")
        place = one("[data-kind=echo]", "getBoundingClientRect().top")
        before = await tab.evaluate(place)
        self.fill(8)
        await self.rows(tab, *["message"] * 8)
        self.assertEqual(await tab.evaluate(place), before)

    async def test_pause(self):
        """A pause holds the drawing alone; what is drawn then says for how many it stands."""
        tab = await self.open()
        for ports, words in ([7] * 20, "Port7 spoke"), (range(20), "10 people spoke"):
            await tab.push("#pause")
            before = await tab.evaluate(f"{ROWS}.length")
            for number, port in enumerate(ports):
                said = message(words, f"{words} {number}") | {"username": f"Port{port}"}
                self.room.deliver(said)
            await tab.until(f"{TEXTS}.filter(text => text === '{words}').length === 20")
            self.assertEqual(await tab.evaluate(f"{ROWS}.length"), before)
            await tab.push("#pause")
            await tab.until(says("#wire", words))
            await tab.until(says("#wire", "10 × message"))

    async def test_lost_in_a_storm(self):
        """On a cut line a storm's losses fold by their way, and a goodbye is lost, too."""
        tab = await self.open()
        await tab.push("#pause")
        await tab.push("#cut")
        await tab.evaluate("performance.now = () => 0")  # all at once
        self.fill(12)
        await tab.until("queue.length === 11")
        await tab.type("mine\n")
        await tab.push("#pause")
        await tab.until(says("#wire", "The server: 2 × message, lost"))
        await tab.until(says("#wire", "This tab: message, lost"))
        await tab.push("#unplug")
        (close,) = await self.rows(tab, "close")
        self.assertRegex(close, "^near ─✕ solid, This tab: close 1000")
        self.assertEqual(await tab.evaluate(f"{ROWS}.filter(kind => kind === 'lost').length"), 12)

    async def test_pause_of_a_talk(self):
        """What people say while the drawing pauses is not folded, however much it is."""
        tab = await self.open(before=LATER)
        await tab.push("#pause")
        for number in range(15):
            self.fill(1, start=number)
            await tab.shows(f"{TEXTS}.length", number + 1)
            await tab.evaluate("later += 150")
        await tab.push("#pause")
        rows = await self.rows(tab, *["message"] * 15)
        self.assertIn("to 1 other tab", rows[0])  # who speaks is one, even unannounced

    async def test_slow(self):
        """Slowly, a row is drawn every 700 ms, at the speed of speech; the talk is not delayed."""
        last = "#wire li:last-child .down"
        duration = look(last, "getComputedStyle(e, '::before').animationDuration")
        tab = await self.open(before=FAST)
        self.assertEqual(await tab.evaluate(duration), ["0.25s"])
        origin = "parseFloat(getComputedStyle(e, '::before').transformOrigin) / e.clientWidth"
        self.assertGreater((await tab.evaluate(look(last, origin)))[0], 0.9)  # the server's side
        await tab.push("#slow")
        self.assertEqual(await tab.evaluate(duration), ["0.6s"])
        await tab.evaluate("asked.length = 0")
        self.fill(3)
        await tab.shows(f"{TEXTS}.length", 3)
        await self.rows(tab, "message", "message", "message")
        self.assertEqual(await tab.evaluate("asked.filter(ms => ms === 700).length"), 3)
        await tab.evaluate("chat.addEventListener('heard', () => pause.click())")
        self.fill(1, start=3)  # whose row is due when the pause begins, and is held as well
        await tab.shows(f"{TEXTS}.length", 4)
        self.assertEqual(await tab.evaluate("queue.length"), 1)
        self.assertFalse(await tab.evaluate("[...pending.values()].includes(700)"))

    async def test_when(self):
        """Each row has the time since the one before, in ms or in seconds."""
        when = look("#wire li:last-child .when", "e.textContent")
        tab = await self.open(before=LATER)
        for later, said in (2_300, "+2.3 s"), (999, "+999 ms"), (0, "+0 ms"):
            await tab.evaluate(f"later += {later}")
            before = len(self.room.history)
            self.fill(1, start=before)
            await self.rows(tab, *["message"] * (before + 1))
            self.assertEqual(await tab.evaluate(when), [said])

    async def test_lit(self):
        """A message or its row lights both, whether pointed at or focused."""
        point = "dispatchEvent(new PointerEvent('pointerover', {bubbles: true}))"
        lit = ["own", "send", "echo"]
        tab = await self.open()
        await tab.say("hello")
        await self.rows(tab, "send", "echo")
        for start, kinds in ("#messages .text", lit), ("h1", []), ("[data-kind=echo] b", lit):
            await tab.evaluate(one(start, point))
            self.assertEqual(await tab.evaluate(look(".lit", "e.dataset.kind")), kinds)
        await tab.evaluate(look(".lit", "e.classList.remove('lit')"))
        await tab.evaluate(one("[data-kind=send] summary", "focus()"))
        self.assertEqual(await tab.evaluate(look(".lit", "e.dataset.kind")), lit)

    async def test_polling(self):
        """What asking once a second would have cost is told from the page's own load."""
        load = "(([e]) => e.transferSize - e.encodedBodySize)"
        shown = one("#polling", "innerText")
        tab = await self.open(before=LATER + FAST)
        self.assertEqual(await tab.evaluate(shown), "")  # it would mislead in the first seconds
        await tab.evaluate("later = 60_000")
        await tab.until(shown)
        pattern = "once a second .* 60 requests .*[0-9]+ kB.* 1 request and 2 frames"
        self.assertRegex(await tab.evaluate(shown), pattern)
        await tab.push("[data-kind=request] summary")
        size = await tab.evaluate(f"{load}(performance.getEntriesByType('navigation'))")
        await tab.until(says("[data-kind=request] pre", f"{size} bytes"))

    async def test_guide(self):
        """One line says what to try next that has not happened yet, and can be put away."""
        tab = await self.open()
        await tab.until(says("#guide", "second window"))
        other = await self.join()
        await tab.until(says("#guide", "Say something"))
        await other.say("hello")  # which comes later in the list
        await self.rows(tab, "message")
        await tab.until(says("#guide", "Say something"))
        await tab.say("hello")
        await tab.until(says("#guide", "Cut the line"))
        for missed, step in (0, "Cut the line"), (1, "Stop the server"):
            await tab.push("#unplug")
            await until(lambda: len(self.room.connections) == 1)
            self.fill(missed)
            await tab.push("#unplug")
            await tab.until(ONLINE)
            await tab.until(says("#guide", step))
        await tab.push("#guide button")
        await tab.reload()
        self.assertFalse(await tab.evaluate(visible("#guide")))

    async def test_lanes(self):
        """The heads of the lanes stand over their lanes at every width."""
        middle = "(b => b.x + b.width / 2)(e.getBoundingClientRect())"
        ends = "(b => [b.left, b.right])(e.getBoundingClientRect())"
        tab = await self.open()
        await self.rows(tab, "welcome")
        for _ in range(2):
            await tab.push("#wire-toggle")  # so that it stays open where it is narrow
        for width in 360, 700, 1280, 1920:
            await tab.size(width, 800)
            heads = await tab.evaluate(look("#lanes span", middle))
            ((left, right),) = await tab.evaluate(look("[data-kind=welcome] .leg", ends))
            self.assertAlmostEqual(heads[0], left, delta=2)
            self.assertAlmostEqual(heads[1], right, delta=2)

    async def test_wall(self):
        """The panel and its text grow with the window, so that they can be read on a wall."""
        wide = "e.getBoundingClientRect().width"
        shown = look("#panel", f"[{wide}, parseFloat(getComputedStyle(e).fontSize)]")
        sizes = {1000: [480, 12], 1280: [512, 13.04], 1920: [768, 16.56], 3000: [960, 18]}
        tab = await self.open()
        for width, expected in sizes.items():
            await tab.size(width, 720)
            await tab.shows(shown, [expected])

    async def test_storm(self):
        """A storm folds into few rows; the newest 200 rows stay, what is open, and the heads."""
        tab = await self.open()
        self.fill(300)
        await tab.until(f"{TEXTS}.includes('299')")
        await tab.until(says("#wire", "× message"))
        self.assertLess(await tab.evaluate(f"{ROWS}.length"), 150)
        await tab.push("#wire summary")
        await tab.evaluate("window.calls = 0, performance.now = () => calls++ * 1_000")  # no storm
        await tab.push("#pause")
        self.fill(300, start=300)
        await tab.until(f"{TEXTS}.includes('599')")
        self.assertEqual(await tab.evaluate("queue.length"), 200)
        await tab.push("#pause")
        await tab.until(f"{look('#wire li', 'e.innerText')}.at(-1).includes('599')")
        self.assertEqual(await tab.evaluate(f"{ROWS}.length"), 201)
        await tab.evaluate("diagram.scrollTop = diagram.scrollHeight")
        top = "getBoundingClientRect().top"
        heads, diagram = await tab.evaluate(f"[{one('#lanes', top)}, {one('#diagram', top)}]")
        self.assertGreaterEqual(heads, diagram)

    async def test_panel(self):
        """The wire is open where there is room, behind a button, and stays as it was left."""
        tab = await self.open()
        for width, shown in (360, False), (1280, True):
            await tab.size(width, 800)
            await tab.shows(visible("#wire"), shown)
        await tab.click("#wire-toggle")
        self.assertFalse(await tab.evaluate(visible("#wire")))
        await tab.reload()
        self.assertFalse(await tab.evaluate(visible("#wire")))
        await tab.size(360, 640)
        await tab.click("#wire-toggle")
        self.assertTrue(await tab.evaluate(visible("#wire")))
        widths = await tab.evaluate(look("main, #panel", "e.getBoundingClientRect().width"))
        self.assertEqual(widths, [360, 360])  # one below the other

    async def test_screen_readers(self):
        """Screen readers are told of the parts of the page, and of each row in a sentence."""
        tab = await self.open()
        await tab.say("hello")
        await self.rows(tab, "send", "echo")
        await tab.type("x" * 1_801)
        tree = (await tab.call("Accessibility.getFullAXTree"))["nodes"]
        nodes = [(node["role"]["value"], node["name"]["value"]) for node in tree if "name" in node]
        parts = {"log", "status", "main", "textbox"}
        self.assertLessEqual(parts, {role for role, _ in nodes})
        self.assertIn(("button", "Put the walkthrough away"), nodes)
        self.assertFalse([name for _, name in nodes if "●" in name])
        (draft,) = [node for node in tree if node["role"]["value"] == "textbox"]
        self.assertEqual(draft["description"]["value"], "1,801 of 2,000 characters")
        self.assertEqual(await tab.evaluate(look("[aria-pressed]", "e.id")), ["slow", "pause"])
        rows = [name for role, name in nodes if role == "DisclosureTriangle"]
        self.assertEqual(len(rows), await tab.evaluate(f"{ROWS}.length"))
        for row in rows:
            self.assertRegex(row, "^(This tab|The server): .+[.]$")


class Engines:
    """What the page promises in every engine."""

    async def test_two_tabs(self):
        """Two tabs see what each other sends, markup as text, and the console stays silent."""
        said = ["hello", "<img src=x onerror=alert()>&amp;"]
        first, second = await self.open(), await self.open()
        await first.type(said[0] + "\n")
        await second.until(f"{TEXTS}.length === 1")
        await second.type(said[1])
        await second.click("#send")
        for tab in first, second:
            await tab.until(f"{TEXTS}.length === 2")
            self.assertEqual(await tab.evaluate(TEXTS), said)
            self.assertEqual(await tab.evaluate("document.images.length"), 0)
            await tab.until(f"{look('#online', 'e.textContent')}[0] === '2'")
            self.assertEqual(tab.problems(), [])
            await tab.evaluate("void setTimeout(() => nowhere)")
            await until(tab.problems)

    async def test_cuts(self):
        """Over ten cuts that lose a message or an echo, both tabs show all once, in one order."""
        publish, lost, call_again = self.room.publish, [], look("#unplug", "[e.click(), e.click()]")

        async def publish_and_lose(message):
            if lost != ["message"]:
                await publish(message)
            for connection in self.room.connections if lost else ():
                connection.transport.abort()
            lost.clear()

        self.enterContext(mock.patch.object(self.room, "publish", publish_and_lose))
        first, second = await self.open(), await self.open()
        for tab in first, second:
            await tab.evaluate(look("#wire-toggle", "e.click()"))  # to show it takes longer
        for cut in range(10):
            lost.append(["message", "echo"][cut % 2])
            await (first, second)[cut // 2 % 2].type(f"{cut}\n")
            for tab in first, second:
                await tab.until(f"{ROWS}.filter(kind => kind === 'close').length > {cut}")
                await tab.evaluate(call_again)
                await tab.until(ONLINE)
            await until(lambda: len(self.room.connections) == 2)
        for tab in first, second:
            await tab.until(f"{TEXTS}.length >= 10")
            await tab.until(f"{STATES}.every(state => state === 'delivered')")
        order = await first.evaluate(TEXTS)
        self.assertEqual(sorted(order), [*"0123456789"])
        self.assertEqual(await second.evaluate(TEXTS), order)

    async def test_reload(self):
        """What waits survives a reload and keeps its nonce; the draft survives as well."""
        let_through = self.hold()
        tab = await self.open()
        await tab.type("one\ntwo\nthree")
        await tab.until(f"{STATES}.length === 2")
        nonces = await tab.evaluate(IDS)
        await tab.reload()
        self.assertEqual(await tab.evaluate(look("#draft", "e.value")), ["three"])
        let_through.set()
        await tab.until(f"{STATES}.join() === 'delivered,delivered'")
        self.assertEqual([message["nonce"] for message in self.room.history], nonces)

    async def test_wire(self):
        """The wire draws a row for each event, and counts the frames."""
        tab, other = await self.open(), await self.join()
        await tab.type("hello\n")
        await tab.until(f"{STATES}[0] === 'delivered'")
        await other.say("hello back")
        rows = f"{ROWS}.filter(kind => kind !== 'presence')"
        await tab.until(f"{rows}.join() === 'request,response,welcome,send,echo,message'")
        await tab.until(f"{look('#frames-up', 'parseInt(e.innerText)')}[0] === 1")
        await tab.until(f"{look('#frames-down', 'parseInt(e.innerText)')}[0] == {ROWS}.length - 3")

    async def test_pictures(self):
        """The page has its reader's colours; pictures go to the folder CHAT_SCREENSHOTS."""
        papers = []
        for scheme in "light", "dark":
            async with self.tab(scheme) as tab:
                await tab.until("document.getAnimations().length === 0")
                papers += await tab.evaluate(look("body", "getComputedStyle(e).backgroundColor"))
                picture, width = await tab.screenshot(), await tab.evaluate("innerWidth")
                self.assertEqual(picture[:4] + picture[16:20], b"\x89PNG" + width.to_bytes(4))
                if folder := os.environ.get("CHAT_SCREENSHOTS"):
                    name = f"{scheme}-{type(self).__name__}.png"
                    pathlib.Path(folder, name).write_bytes(picture)
        self.assertNotEqual(*papers)


class InChromium(Engines, BrowserCase):
    @contextlib.asynccontextmanager
    async def tab(self, scheme="light"):
        async with BrowserCase.tab(self) as tab:
            features = [{"name": "prefers-color-scheme", "value": scheme}]
            await tab.call("Emulation.setEmulatedMedia", features=features)
            yield tab


class OtherEngineCase(BrowserCase):
    def setUp(self):
        """Start no Chromium."""

    def tab(self, scheme="light"):
        return EngineTab(self.engine, scheme, f"http://127.0.0.1:{self.port}/")


class InFirefox(Engines, OtherEngineCase):
    engine = Firefox


class InWebKit(Engines, OtherEngineCase):
    engine = WebKit


class PageAndProgram(ProgramCase):
    """The page beside a real server that is stopped, killed and started again."""

    def tab(self, port):
        return Tab(shared(Browser), f"http://127.0.0.1:{port}/", before=FAST)

    @unittest.skipIf(sys.platform == "win32", "Windows has no signal that lets it stop cleanly")
    async def test_restart(self):
        """Across a restart nothing is lost or doubled, and what was typed meanwhile goes out."""
        process, port, _ = self.serve()
        async with self.tab(port) as first, self.tab(port) as second:
            await first.say("before")
            await second.shows(TEXTS, ["before"])
            process.terminate()
            await first.until(OFFLINE)
            await first.type("one\ntwo\nthree\n")
            await first.shows(STATES, ["delivered", *["waiting"] * 3])
            nonces = (await first.evaluate(IDS))[1:]
            process.wait(PATIENCE)
            self.serve(port=port)
            for tab in first, second:
                await tab.shows(TEXTS, ["before", "one", "two", "three"])
                await tab.until(says("#messages", "may be missing"))
            await first.shows(STATES, ["delivered"] * 4)
            self.assertEqual([frame["nonce"] for frame in first.sent()[1:]], nonces)

    async def test_kill(self):
        """Across a crash nothing is doubled or stuck, whatever was under way."""
        process, port, _ = self.serve()
        async with self.tab(port) as first, self.tab(port) as second:
            said = []
            for number in range(3):
                for tab in first, second:
                    said += [f"{number} {tab is first}"]
                    await tab.type(said[-1] + "\n")
                process.kill()
                process.wait(PATIENCE)
                process, _, _ = self.serve(port=port)
            for tab in first, second:
                await tab.shows(STATES, ["delivered"] * 3)
                shown = await tab.evaluate(TEXTS)
                self.assertEqual(len(shown), len(set(shown)))
                self.assertLessEqual(set(shown), set(said))


def listings(language):
    """Return the code blocks of one language in the README, in order."""
    blocks = re.findall(rf"^ *```{language}\n(.*?)^ *```$", README, re.MULTILINE | re.DOTALL)
    return [textwrap.dedent(block) for block in blocks]


def block(words):
    """Return the README's sh block that contains these words."""
    return next(listing for listing in listings("sh") if words in listing)


@unittest.skipIf(sys.platform == "win32", "the README's sh blocks are not for Windows")
class ReadmeCase(ProgramCase):
    """Runs what the README prints, in a copy of the project, with the Python that runs this."""

    def setUp(self):
        self.folder = self.enterContext(tempfile.TemporaryDirectory(ignore_cleanup_errors=True))
        for name in "chat.py", "index.html", "requirements.txt":
            shutil.copy(HERE / name, self.folder)
        if not pathlib.Path(sys.prefix, "bin", "python").exists():
            skip("the README's sh blocks take a virtual environment: run the tests as it says")
        pathlib.Path(self.folder, ".venv").symlink_to(sys.prefix)

    def sh(self, script):
        """Start a script in the copy, without any package index; return its process."""
        path = f"{pathlib.Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
        env = {"PATH": path, "PIP_NO_INDEX": "1", "PIP_FIND_LINKS": self.folder}
        return self.start("bash", "-ec", script, cwd=self.folder, env=os.environ | env)

    def serve_by(self, script):
        """Start a script's server on a free port; return its process and the port."""
        script = script.replace("chat.py", "chat.py --port 0").replace("8081", "0")
        return self.serving(self.sh(script))[:2]


class Readme(ReadmeCase):
    def test_sizes(self):
        """It begins with the true line counts, and is itself not too long."""
        for name in "chat.py", "index.html":
            lines = len((HERE / name).read_text(encoding="utf-8").splitlines())
            self.assertRegex(README, rf"{lines}\s+lines\s+of\s+\w+\s+in\s+\[`{name}`\]")
        self.assertLess(len(README.splitlines()), 250)

    def test_all_blocks_are_known(self):
        """Each sh block has its test here; the one that runs the tests is run by .ci/run."""
        known = ["&& .venv/bin/python chat.py", "unittest", "--debug", "curl", "-m websockets"]
        known += ["--host 0.0.0.0", "install redis"]
        self.assertEqual(sorted(map(block, known)), sorted(listings("sh")))

    async def test_run(self):
        """The command that runs it does its whole set-up, from nothing but the package."""
        pathlib.Path(self.folder, ".venv").unlink()
        installed = importlib.metadata.distribution("websockets")
        wheel = f"websockets-{installed.version}-py3-none-any.whl"
        with zipfile.ZipFile(pathlib.Path(self.folder, wheel), "w") as packed:
            for file in installed.files:
                if not {"..", "__pycache__"}.intersection(file.parts):
                    packed.write(file.locate(), file)
        self.serve_by(block("&& .venv/bin/python chat.py"))

    async def test_debug(self):
        """With --debug the terminal shows handshakes, frames and the close."""
        server, port = self.serve_by("exec " + block("--debug"))
        async with Client(port) as client:
            await client.say("hello")
            await client.contents(1)
        server.terminate()
        log = server.communicate(timeout=PATIENCE)[1]
        for sign in "< GET /ws HTTP/1.1", "101 Switching Protocols", "< TEXT", "> TEXT", "> CLOSE":
            self.assertIn(sign, log)

    async def test_by_hand(self):
        """A handshake by hand is answered, and the library's own client joins and speaks."""
        need("curl")
        _, port, _ = self.serve()
        for words, say, signs in (
            ("curl", "", ["101 Switching", "Accept: s3pPLMBiTxaQ9kYGzzhZRbK+xOo=", "welcome"]),
            ("-m websockets", '{"content": "hello"}\n', ["Welcome!", '"content": "hello"']),
        ):
            script = block(words).replace("8080", f"{port}").replace("--max-time 2", "")
            process, shown = self.sh(script), ""
            self.limit(process)
            process.stdin.write(say)
            process.stdin.flush()
            while not all(sign in shown for sign in signs):
                shown += (more := await asyncio.to_thread(process.stdout.read, 1))
                self.assertTrue(more, f"{words}: {shown}")
            if say:
                await asyncio.to_thread(process.communicate, "")  # as Ctrl-D

    async def test_whole_network(self):
        """--host 0.0.0.0 serves all addresses."""
        _, port = self.serve_by(block("--host 0.0.0.0"))
        async with Client(port) as client:
            self.assertEqual(client.welcome["online"], 1)

    async def test_nginx(self):
        """Behind nginx with the README's configuration, two tabs talk over wss:."""
        nginx, port, folder = need("nginx"), free_port(), self.folder
        _, upstream, _ = self.serve()
        (server,), at = listings("nginx"), f"127.0.0.1:{port}"
        server = server.replace("443", at).replace("8080", f"{upstream}")
        server = re.sub("/etc/ssl/chat.example.(pem|key)", rf"{folder}/\1", server)
        kinds = "client_body", "proxy", "fastcgi", "uwsgi", "scgi"
        paths = "".join(f"{kind}_temp_path {folder};" for kind in kinds)
        head = f"daemon off; pid {folder}/pid; error_log {folder}/log; events {{}}"
        server = f"{head} http {{ access_log off; {paths} {server} }}"
        pathlib.Path(folder, "nginx.conf").write_text(server, encoding="utf-8")
        certify(folder)
        proxy = self.sh(f"exec {nginx} -e log -c {folder}/nginx.conf")
        await until(lambda: proxy.poll() is not None or is_open(port))
        options = {"url": f"https://localhost:{port}/", "ready": ONLINE, "ignore_certificate": True}
        tabs = [Tab(shared(Browser), **options) for _ in range(2)]
        async with tabs[0] as first, tabs[1] as second:
            await first.type("hello\n")
            await second.until(f"{TEXTS}.includes('hello')")
            await second.type("hello back\n")
            await first.until(f"{TEXTS}.includes('hello back')")


class RedisStreams(ReadmeCase):
    """The README's chat_redis.py: one Redis, two servers, and a tab on each."""

    async def asyncSetUp(self):
        await super().asyncSetUp()
        if not importlib.util.find_spec("redis"):
            skip("the redis package is not installed")
        (listing,) = listings("python")
        self.assertLessEqual(len(listing.splitlines()), 40)
        self.redis_port = free_port()
        listing = listing.replace("//localhost", f"//localhost:{self.redis_port}")
        pathlib.Path(self.folder, "chat_redis.py").write_text(listing, encoding="utf-8")
        await self.start_redis()
        self.command = "exec " + block("install redis").splitlines()[-1]
        self.server, port = self.serve_by(self.command)
        _, self.other_port = self.serve_by(block("install redis"))
        self.first = await self.enterAsyncContext(Client(port))
        self.second = await self.enterAsyncContext(Client(self.other_port))

    async def start_redis(self):
        """Start Redis, with what it kept on disk when it last ran."""
        options = f"--port {self.redis_port} --bind 127.0.0.1 --dir {self.folder} --appendonly yes"
        self.redis = self.sh(f"exec {need('redis-server')} {options}")
        await until(lambda: is_open(self.redis_port))

    async def test_one_order(self):
        """Tabs on two servers see all messages once, in one order."""
        for number in range(15):
            await self.first.say(f"first {number}")
            await self.second.say(f"second {number}", nonce=f"{number}")
        order = await self.first.contents(30)
        self.assertEqual(await self.second.contents(30), order)
        self.assertEqual(len(set(order)), 30)

    async def test_one_server_ends(self):
        """A tab whose server is killed resumes on any other, old or new, and nothing is doubled."""
        await self.first.say("seen", nonce="a")
        seen = (await self.first.frame("message"))["id"]
        self.server.kill()
        await asyncio.to_thread(self.server.wait)
        await self.second.say("missed")
        self.assertEqual(await self.second.contents(2), ["seen", "missed"])
        _, port = self.serve_by(self.command)
        for back_at in self.other_port, port:
            async with Client(back_at, after=seen) as back:
                history = [message["content"] for message in back.welcome["history"]]
                self.assertEqual((history, back.welcome["gap"]), (["missed"], False))
                await back.say("seen", nonce="a")
        await self.second.say("after")
        self.assertEqual(await self.second.contents(1), ["after"])

    async def test_redis_goes_and_comes_back(self):
        """While Redis is away tabs stay connected and are told so; later all goes on as before."""
        self.redis.terminate()
        await asyncio.to_thread(self.redis.wait)
        await self.first.say("lost", nonce="lost")
        frame = await self.first.frame("error")
        self.assertEqual(frame["nonce"], "lost")
        self.assertIn("Send it again", frame["content"])
        await self.start_redis()
        while frame["type"] == "error":
            await self.first.say("retried", nonce="retried")
            frame = await self.first.frame("error", "message")
        await self.second.say("after")
        self.assertEqual(await self.second.contents(2), ["retried", "after"])
