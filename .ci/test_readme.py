"""Tests of what the README prints: its blocks, its figures, nginx, Redis and uv; and of rubbish.

Run it as `.ci/run` does, with `redis` and `uv` installed, and nginx, redis-server, curl and xxd.
"""

import asyncio
import contextlib
import os
import pathlib
import random
import re
import shutil
import signal
import socket
import ssl
import sys
import tempfile
import textwrap
import tomllib
import unittest

import redis
import websockets

HERE = pathlib.Path(__file__).resolve().parent.parent
sys.path.insert(0, str(HERE))

import chat  # noqa: E402
from test_chat import HANDSHAKE, PATIENCE, ProgramCase, ServerCase, masked, request, until  # noqa: E402

README = (HERE / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^( *)```(\w+)\n(.*?)^ *```$", README, re.MULTILINE | re.DOTALL)


def blocks(language):
    """Return the README's code blocks in a language, in order."""
    return [textwrap.dedent(text) for _, name, text in BLOCKS if name == language]


def block(words, language="sh"):
    """Return the README's only block with these words."""
    (found,) = [text for text in blocks(language) if words in text]
    return found


def free_port():
    """Return a port that is free now, for programs that cannot choose one themselves."""
    with socket.create_server(("127.0.0.1", 0)) as probe:
        return probe.getsockname()[1]


def is_open(port):
    with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), 1):
        return True
    return False


class ReadmeCase(ProgramCase):
    """Runs what the README prints, in a copy of the project."""

    async def asyncSetUp(self):
        await super().asyncSetUp()
        folder = tempfile.TemporaryDirectory(ignore_cleanup_errors=True)
        self.folder = pathlib.Path(self.enterContext(folder))
        for name in "chat.py", "index.html", "requirements.txt":
            shutil.copy(HERE / name, self.folder)

    async def sh(self, script, environment=sys.prefix, **options):
        """Run a script in the copy, where .venv is the environment of this test, or missing."""
        if environment and not (self.folder / ".venv").exists():
            (self.folder / ".venv").symlink_to(environment)
        pipes = dict.fromkeys(["stdin", "stdout", "stderr"], asyncio.subprocess.PIPE)
        options = pipes | {"cwd": self.folder, "start_new_session": True} | options
        process = await asyncio.create_subprocess_exec("bash", "-ec", script, **options)
        self.addAsyncCleanup(self.kills_group, process)
        return process

    async def kills_group(self, process):
        """Kill a process with its children, as uv has one."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        await process.wait()

    async def opens(self, process):
        """Wait until a server says where it serves. Return its port."""
        async with asyncio.timeout(15 * PATIENCE):  # It may have to be installed first.
            while b"Open http" not in (line := await process.stdout.readline()):
                self.assertTrue(line, "The server did not start.")
        self.port = int(re.search(rb":(\d+) ", line)[1])
        return self.port


class Blocks(ReadmeCase):
    def test_each_sh_block_has_its_test(self):
        """Each sh block is run here, except for the one that runs the tests, which .ci/run runs."""
        known = ["&& .venv/bin/python chat.py", "-m unittest", "curl", "install redis"]
        self.assertEqual(sorted(map(block, known)), sorted(blocks("sh")))

    def test_the_number_of_lines_is_true(self):
        """The README says how many lines chat.py has."""
        lines = len((HERE / "chat.py").read_text(encoding="utf-8").splitlines())
        self.assertIn(f"{lines} lines of Python", README)

    def test_both_lists_of_requirements_agree(self):
        """requirements.txt and the head of chat.py (PEP 723) name the same packages."""
        head = (HERE / "chat.py").read_text(encoding="utf-8").partition("# ///\n")[0]
        metadata = tomllib.loads(head.removeprefix("# /// script\n").replace("# ", ""))
        required = (HERE / "requirements.txt").read_text(encoding="utf-8").split()
        self.assertEqual(metadata, {"dependencies": required, "requires-python": ">=3.11"})

    def test_the_limits_are_true(self):
        """The README's limits are those of chat.py."""
        limits = {
            "request": f"{chat.MAX_REQUEST // 1024} KiB",
            "content": f"{chat.MAX_CONTENT:,} characters",
            "speed": f"{chat.MESSAGES_PER_SECOND} messages a second",
            "remembered messages": f"{chat.HISTORY_SIZE}",
            "connections": f"{chat.MAX_CONNECTIONS:,}",
        }
        for name, value in limits.items():
            self.assertRegex(README, rf"(?m)^\| {name} \| {re.escape(value)}\b")

    async def test_the_port_is_8080(self):
        """The default port is the one in the README's addresses."""
        process = await self.sh(".venv/bin/python chat.py --help")
        self.assertIn(b"default: 8080", (await process.communicate())[0])

    async def test_run_sets_up_everything(self):
        """The command under Run installs the package and serves, in a folder without anything."""
        command = block("&& .venv/bin/python chat.py")
        script = command.replace("python chat.py", "python chat.py --port 0")
        await self.opens(await self.sh(script, environment=None))
        await self.joins()

    async def test_uv_runs_it(self):
        """`uv run chat.py` serves."""
        self.assertIn("`uv run chat.py`", README)
        uv = pathlib.Path(sys.prefix, "bin", "uv")
        environment = os.environ | {"UV_PYTHON": sys.executable, "UV_NO_PROGRESS": "1"}
        script = f"exec {uv} run --cache-dir cache chat.py --port 0"
        await self.opens(await self.sh(script, env=environment))
        await self.joins()

    async def test_debug_shows_both_directions(self):
        """With --debug the terminal shows the handshake, the frames and the close."""
        self.assertIn("`.venv/bin/python chat.py --debug`", README)
        process = await self.sh("exec .venv/bin/python chat.py --debug --port 0")
        await self.opens(process)
        anna = await self.joins()
        await anna.says("hello")
        await anna.hears("hello")
        process.terminate()
        log = (await process.communicate())[1].decode()
        for sign in "< GET /ws HTTP/1.1", "101 Switching Protocols", "< TEXT", "> TEXT", "> CLOSE":
            self.assertIn(sign, log)

    async def test_curl_shows_the_header_of_the_welcome(self):
        """curl's output begins with the frame header that the README explains."""
        await self.serves()
        script = block("curl").replace("8080", f"{self.port}").replace("--max-time 2", "-m 1")
        shown, _ = await (await self.sh(script + " || true")).communicate()
        self.assertRegex(shown.decode(), r"(?m)^00000000: 81 7e 00 [0-9a-f]{2} 7b 22 74 79 70 65")
        self.assertIn("`81 7e 00 ", README)

    async def test_the_terminal_client_joins(self):
        """The library's own client hears the welcome and its own message."""
        await self.serves()
        command = ".venv/bin/python -m websockets ws://127.0.0.1:8080/ws"
        self.assertIn(f"`{command}`", README)
        process = await self.sh(command.replace("8080", f"{self.port}"))
        process.stdin.write(b'{"content": "hello"}\n')
        shown = b""
        async with asyncio.timeout(2 * PATIENCE):
            while b'"content": "hello"' not in shown:
                shown += await process.stdout.read(100)
        self.assertIn(b"Welcome!", shown)
        await process.communicate(b"")  # It closes standard input, as Ctrl-D does.

    async def test_the_whole_network_is_served(self):
        """--host 0.0.0.0 serves all addresses."""
        self.assertIn("`.venv/bin/python chat.py --host 0.0.0.0`", README)
        await self.opens(await self.sh("exec .venv/bin/python chat.py --host 0.0.0.0 --port 0"))
        await self.joins()

    async def test_nine_lines_are_a_chat_server(self):
        """The nine lines push each message to every connection."""
        core = block("connections.discard", "python")
        self.assertEqual(len([line for line in core.splitlines() if line]), 9)
        namespace = {}
        exec(core, namespace)
        async with websockets.serve(namespace["converse"], "127.0.0.1", 0) as server:
            url = f"ws://127.0.0.1:{server.sockets[0].getsockname()[1]}"
            async with websockets.connect(url) as anna, websockets.connect(url) as ben:
                await until(lambda: len(namespace["connections"]) == 2)
                await anna.send("hello")
                self.assertEqual([await anna.recv(), await ben.recv()], ["hello", "hello"])
            await until(lambda: not namespace["connections"])


class Proxy(ReadmeCase):
    async def test_nginx_forwards_the_chat(self):
        """Behind the README's nginx two clients talk over TLS, with an Origin as browsers send."""
        await self.serves()
        port, folder = free_port(), self.folder
        command = "openssl req -x509 -newkey rsa:2048 -nodes -keyout key -out pem"
        command += " -subj /CN=localhost -addext subjectAltName=IP:127.0.0.1"
        await (await self.sh(command)).communicate()
        server = block("proxy_pass", "nginx").replace("443", f"127.0.0.1:{port}")
        server = server.replace("8080", f"{self.port}")
        server = re.sub("/etc/ssl/chat.example.(pem|key)", rf"{folder}/\1", server)
        kinds = "client_body", "proxy", "fastcgi", "uwsgi", "scgi"
        paths = "".join(f"{kind}_temp_path {folder}/{kind};" for kind in kinds)
        head = f"daemon off; pid {folder}/pid; error_log {folder}/log; events {{}}"
        configuration = f"{head} http {{ access_log off; {paths} {server} }}"
        (folder / "nginx.conf").write_text(configuration, encoding="utf-8")
        proxy = await self.sh(f"exec nginx -e log -c {folder}/nginx.conf")
        await until(lambda: proxy.returncode is not None or is_open(port))
        url, trust = f"wss://127.0.0.1:{port}/ws", ssl.create_default_context(cafile=folder / "pem")
        options = {"ssl": trust, "origin": f"https://127.0.0.1:{port}", "proxy": None}
        connect = websockets.connect(url, **options), websockets.connect(url, **options)
        async with connect[0] as anna, connect[1] as ben, asyncio.timeout(PATIENCE):
            await anna.send('{"content": "through nginx"}')
            while "through nginx" not in await ben.recv():
                pass


GARBAGE = [  # entries of a stream, as anyone can write them
    {"foo": "bar"},
    {"message": "{"},
    {"message": "[]"},
    {"message": "5"},
    {"message": "null"},
    {"message": b"\xff\xfe"},
    {"message": '{"type": "message", "username": "a", "content": "b", "nonce": "c", "time": "d"}'},
    {"message": r'{"username": "a", "content": "\ud800", "id": "b", "nonce": "c", "time": "d"}'},
    {"message": '{"username": "a", "content": "b", "id": 5, "nonce": "c", "time": "d"}'},
    {"message": '{"username": "a", "content": ["b"], "id": "e", "nonce": "c", "time": "d"}'},
    {"message": "[" * 10_000},
]


class TwoServers(ReadmeCase):
    """The README's chat_redis.py: one Redis, and two servers with a client each."""

    async def asyncSetUp(self):
        await super().asyncSetUp()
        self.redis_port = free_port()
        listing = block("class RedisRoom", "python")
        listing = listing.replace("//localhost", f"//127.0.0.1:{self.redis_port}")
        (self.folder / "chat_redis.py").write_text(listing, encoding="utf-8")
        await self.starts_redis()
        self.assertIn(".venv/bin/pip install redis", block("install redis"))
        self.first, self.anna = await self.starts_server()
        _, self.ben = await self.starts_server()
        self.other_port = self.port

    async def starts_redis(self):
        options = f"--port {self.redis_port} --bind 127.0.0.1 --dir {self.folder} --appendonly yes"
        self.redis = await self.sh(f"exec redis-server {options}")
        await until(lambda: is_open(self.redis_port))
        self.stream = redis.Redis(port=self.redis_port)
        self.addCleanup(self.stream.close)

    async def starts_server(self):
        """Return a server and a client of it."""
        last = block("install redis").splitlines()[-1]
        process = await self.sh("exec " + last.replace("8081", "0"))
        await self.opens(process)
        return process, await self.joins()

    async def test_everyone_hears_one_order(self):
        """Clients of two servers hear all messages once, in one order."""
        for number in range(15):
            await self.anna.says(f"anna {number}")
            await self.ben.says(f"ben {number}", nonce=f"{number}")
        orders = []
        for client in self.anna, self.ben:
            orders.append([(await client.frame("message"))["content"] for _ in range(30)])
        self.assertEqual(orders[0], orders[1])
        self.assertEqual(len(set(orders[0])), 30)

    async def test_a_client_resumes_on_any_server(self):
        """After its server was killed a client resumes on an old or a new one, nothing doubled."""
        await self.anna.says("seen", nonce="a")
        seen = await self.anna.hears("seen")
        await self.ben.hears("seen")
        self.first.kill()
        await self.ben.says("missed")
        await self.ben.hears("missed")
        await self.starts_server()
        for port in self.port, self.other_port:
            self.port = port
            anna = await self.joins(after=seen["id"])
            history = [message["content"] for message in anna.welcome["history"]]
            self.assertEqual((history, anna.welcome["gap"]), (["missed"], False))
            await anna.says("seen", nonce="a")
        await self.ben.says("after")
        await self.ben.hears("after")

    async def test_senders_are_told_that_redis_is_down(self):
        """While Redis is down senders get an error, and later all goes on."""
        self.redis.terminate()
        await self.redis.wait()
        await self.anna.says("lost", nonce="lost")
        await self.anna.is_refused("Send it again", nonce="lost")
        await self.starts_redis()
        frame = {"type": "error"}
        while frame["type"] == "error":
            await self.anna.says("retried", nonce="retried")
            frame = await self.anna.frame("error", "message")
        await self.ben.hears("retried")

    async def test_garbage_is_skipped(self):
        """Entries that are no messages silence no server, old or new."""
        for entry in GARBAGE:
            self.stream.xadd("chat", entry)
        await self.anna.says("still here")
        await self.anna.hears("still here")
        await self.ben.hears("still here")
        _, carol = await self.starts_server()
        self.assertEqual([m["content"] for m in carol.welcome["history"]], ["still here"])

    async def test_a_catch_up_cuts_off_nobody(self):
        """A client hears 1,000 long messages that arrive at once, in order."""
        keys = "username", "id", "nonce", "time"
        with self.stream.pipeline() as pipeline:
            for number in range(1000):
                message = dict.fromkeys(keys, f"{number}") | {"content": f"{number}" + "x" * 1990}
                pipeline.xadd("chat", {"message": chat.json.dumps(message)})
            pipeline.execute()
        for number in range(1000):
            frame = await self.anna.frame("message")
            self.assertEqual(frame["id"], f"{number}")


class Log(ProgramCase):
    async def test_the_log_is_printable(self):
        """--debug logs each handshake and frame, without a byte that a terminal obeys."""
        process, _ = await self.serves("--debug")
        attack = "\x1b]0;owned\x07"
        anna = await self.joins(user_agent_header="owned-agent")
        await anna.says(attack + "\u202e\x9b\r\n2026 forged")
        await anna.frame("message")
        await anna.close(4000, f"{attack}\n2026 forged")
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
        self.assertIn(r"\x1b]0;owned\x07", log)  # escaped rather than dropped
        self.assertIn("\n    Traceback", log)  # still on lines of its own


class Fuzz(ServerCase):
    async def test_rubbish_disturbs_no_conversation(self):
        """While 200 connections send random rubbish, two clients hold a conversation."""
        chance = random.Random(4)
        endings = [masked(b"", 0x88), masked(b"hello", 0xC1), b"\x81\x05hello", HANDSHAKE]

        def piece():
            payload = chance.randbytes(chance.choice([0, 5, 125, 4000]))
            first = chance.choice([0x81, 0x01, 0x80, 0x89, chance.randrange(256)])
            message = masked(b'{"content": "rubbish"}')
            return chance.choice([message, message, masked(payload, first), payload, *endings])

        async def sends_rubbish():
            await asyncio.sleep(chance.random() / 4)
            start = chance.choice([b"", *[HANDSHAKE] * 9])
            line = await self.calls(start + b"".join(piece() for _ in range(chance.randrange(9))))
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(chance.random() / 10):
                    await line.ends()
            if chance.random() < 0.3:
                line.vanish()
            else:
                line.socket.close()

        anna, ben = await self.joins(), await self.joins()
        rubbish, count = asyncio.gather(*(sends_rubbish() for _ in range(200))), 0
        while not rubbish.done():
            await anna.says(f"{count}")
            for client in anna, ben:
                while (await client.frame("message"))["content"] != f"{count}":
                    pass
            count += 1
        await rubbish
        await self.has(2)


if __name__ == "__main__":
    unittest.main()
