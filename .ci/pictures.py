"""Writes the README's pictures, .github/light.png and dark.png: `python .ci/pictures.py`."""

import base64
import pathlib
import sys
import unittest

HERE = pathlib.Path(__file__).parent
sys.path.insert(0, str(HERE.parent))

import test_chat  # noqa: E402


class Pictures(test_chat.BrowserCase):
    async def test_pictures(self):
        """A conversation of three, and what one of them sees on the wire."""
        tab = await self.open()
        first, second = await self.join(), await self.join()
        await tab.size(1280, 720)
        await tab.until("document.querySelector('#online').textContent === '3'")
        await first.say("Good morning! Does anybody see this?")
        await tab.until(f"{test_chat.TEXTS}.length === 1")
        await tab.type("Yes. You sent one frame, and the server pushed it to all of us.\n")
        await tab.until(f"{test_chat.STATES}[0] === 'delivered'")
        await second.say("I did not ask for it, and still it came. So that is push 👋")
        await tab.until(f"{test_chat.ROWS}.filter(kind => kind === 'message').length === 2")
        for scheme in "light", "dark":
            features = {"prefers-color-scheme": scheme, "prefers-reduced-motion": "reduce"}
            features = [{"name": name, "value": value} for name, value in features.items()]
            await tab.call("Emulation.setEmulatedMedia", features=features)
            picture = await tab.call("Page.captureScreenshot", format="png")
            path = HERE.parent / ".github" / f"{scheme}.png"
            path.write_bytes(base64.b64decode(picture["data"]))


if __name__ == "__main__":
    unittest.main()
