"""Looks at the page in all its states: `python looks.py`.

axe-core, which is expected in node_modules beside this file, looks at each state in two widths and
three colour schemes. Screenshots go to the folder that CHAT_SCREENSHOTS names.
"""

import base64
import itertools
import os
import pathlib
import sys
import unittest
from unittest import mock

HERE = pathlib.Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))

import test_chat  # noqa: E402

AXE = (HERE / "node_modules/axe-core/axe.min.js").read_text(encoding="utf-8")
RUN = "axe.run(%s).then(found => found.violations.map(v => [v.id, v.nodes.map(n => n.html)]))"
# Forced colours are the reader's own, whatever contrast they have.
FORCED = '{rules: {"color-contrast": {enabled: false}}}'
SCHEMES = {"light": ("light", "none"), "dark": ("dark", "none"), "forced": ("dark", "active")}


class Looks(test_chat.PageCase):
    async def looks_at(self, tab, state):
        """Assert that axe finds nothing, and take screenshots."""
        folder = os.environ.get("CHAT_SCREENSHOTS")
        for (width, height), name in itertools.product(
            [(360, 800), (390, 844), (1440, 900)], SCHEMES
        ):
            scheme, forced = SCHEMES[name]
            features = {"prefers-color-scheme": scheme, "forced-colors": forced}
            features = [{"name": key, "value": value} for key, value in features.items()]
            await tab.call("Emulation.setEmulatedMedia", features=features)
            await tab.resizes(width, height)
            if width != 390:
                with self.subTest(state, width=width, scheme=name):
                    run = RUN % (FORCED if forced == "active" else "")
                    self.assertEqual(await tab.evaluate(run), [])
            if folder and width != 360 and forced == "none":
                picture = (await tab.call("Page.captureScreenshot"))["data"]
                path = pathlib.Path(folder, f"{state}-{width}-{name}.png")
                path.write_bytes(base64.b64decode(picture))

    async def test_states(self):
        """axe-core finds nothing in any state of the page."""
        tab = await self.opens(AXE)
        for _ in range(2):
            await tab.clicks("Wire")  # It stays open on a phone.
        await self.looks_at(tab, "alone")
        anna, ben = await self.joins(), await self.joins()
        await anna.says("Good morning! Does anybody see this?")
        await tab.sees(last="other Good morning")
        await tab.says("Yes. You sent one frame, and the server pushed it to all of us.")
        await tab.sees(last="own delivered Yes")
        await ben.says("I did not ask for it, and still it came. So that is push 👋")
        await tab.sees(["^message"], last="other I did not")
        await self.looks_at(tab, "talking")
        await tab.passes(2)
        await tab.resizes(1440, 900)
        await tab.clicks("your own")
        await tab.sees(opened="on the wire")
        await self.looks_at(tab, "opened")
        await tab.resizes(1440, 900)
        await tab.clicks("your own")
        await tab.evaluate("draft.focus()")
        with mock.patch.object(self.room, "publish", mock.AsyncMock()):
            await tab.says("This one is refused.", "This one waits.")
            await test_chat.until(lambda: len(tab.sent()) == 3)
            self.pushes(test_chat.ERROR | tab.sent()[1] | {"content": "Not now."})
            await tab.types("x" * 2_001)
            await tab.sees(last="own waiting", log="own refused", counter="2,001")
            await self.looks_at(tab, "refused")
        await tab.resizes(1440, 900)
        await tab.clicks("Cut the line")
        await tab.evaluate("draft.select(), draft.focus()")
        await tab.says("Does anybody hear me?")
        await anna.says("Hello?")
        await tab.sees(["lost", "lost"], log="own waiting Does")
        await self.looks_at(tab, "cut")
        await tab.resizes(1440, 900)
        await tab.clicks("Mend the line")
        await tab.sees(status="Connected", log="own delivered Does")
        await tab.passes(2)
        await self.floods(600)
        await tab.sees(log="other 599")
        await self.looks_at(tab, "storm")
        await tab.resizes(1440, 900)
        await tab.clicks("Hang up")
        await self.looks_at(tab, "unplugged")
        await tab.resizes(1440, 900)
        await tab.clicks("Call again")
        await tab.sees(status="Connected")
        self.server.close()
        await tab.sees(status="The server has stopped")
        await tab.passes(0.25)
        await self.looks_at(tab, "reconnecting")


if __name__ == "__main__":
    unittest.main()
