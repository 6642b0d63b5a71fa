"""Looks at the page with axe-core, in its states, colour schemes and widths: `python axe.py`.

axe-core is expected in node_modules beside this file. Exits with status 1 where it finds anything.
"""

import itertools
import pathlib
import sys
import unittest
from unittest import mock

HERE = pathlib.Path(__file__).parent
sys.path.insert(0, str(HERE.parent))

import test_chat  # noqa: E402

AXE = (HERE / "node_modules/axe-core/axe.min.js").read_text(encoding="utf-8")
RUN = "axe.run(%s).then(found => found.violations.map(v => [v.id, v.nodes.map(n => n.html)]))"
# Forced colours are the reader's own, whatever contrast they have.
FORCED = '{rules: {"color-contrast": {enabled: false}}}'


class Axe(test_chat.BrowserCase):
    async def look(self, tab, state):
        """Assert that nothing is found, however wide and coloured the page is."""
        schemes = [("light", "none"), ("dark", "none"), ("dark", "active")]
        for width, (scheme, forced) in itertools.product((360, 1440), schemes):
            with self.subTest(state, width=width, scheme=scheme, forced=forced):
                features = {"prefers-color-scheme": scheme, "forced-colors": forced}
                features["prefers-reduced-motion"] = "reduce"
                features = [{"name": name, "value": value} for name, value in features.items()]
                await tab.call("Emulation.setEmulatedMedia", features=features)
                await tab.size(width, 800)
                run = RUN % (FORCED if forced == "active" else "")
                self.assertEqual(await tab.evaluate(run), [])

    async def test_states(self):
        """axe-core finds nothing in any state of the page."""
        tab, other = await self.open(before=AXE), await self.join()
        await tab.evaluate("document.querySelector('#panel').hidden = false")
        await self.look(tab, "empty")
        self.fill(3)
        await other.say("\n".join("x" * 100))
        await tab.type("hello\n")
        await tab.until(f"{test_chat.TEXTS}.length === 5")
        with mock.patch.object(self.room, "publish", mock.AsyncMock()):
            await tab.type("waiting\n" + "x" * 2001 + "\n")
            await tab.until("document.querySelectorAll('[data-state=refused]').length === 1")
            await tab.evaluate("document.querySelector('#wire summary').click()")
            await self.look(tab, "full")
        self.server.close()
        await tab.until(test_chat.OFFLINE)
        await self.look(tab, "reconnecting")
        await tab.evaluate("document.querySelector('#unplug').click()")
        await self.look(tab, "unplugged")


if __name__ == "__main__":
    unittest.main()
