"""Looks at the page: its states, sizes, colours and lanes. Run it with `python looks.py`.

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

test_chat.PATIENCE = 30  # seconds: axe takes several on a busy machine

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

    async def test_axe_finds_nothing_in_any_state(self):
        """axe-core finds no fault in these states of the page."""
        tab = await self.opens(AXE)
        for _ in range(2):
            await tab.clicks("Wire")  # It stays open on a phone.
        await self.looks_at(tab, "alone")
        anna, ben = await self.joins(), await self.joins()
        await tab.passes(4.2)
        await anna.says("Good morning! Can anybody read this?")
        await tab.sees(last="other Good morning")
        await tab.passes(6.1)
        await tab.says("Yes, both of us.")
        await tab.sees(last="own delivered Yes")
        await tab.passes(3.4)
        await ben.says("I did not ask for it, and still it came 👋")
        await tab.sees("^message", last="other I did not")
        await self.looks_at(tab, "talking")
        await tab.passes(2)
        await tab.resizes(1280, 800)
        await tab.clicks("not requested")
        await tab.sees(opened="on the wire")
        await self.looks_at(tab, "opened")
        await tab.resizes(1440, 900)
        await tab.clicks("not requested")
        await tab.evaluate("draft.focus()")
        with mock.patch.object(self.room, "publish", mock.AsyncMock()):
            await tab.says("This one is refused.", "This one waits.")
            await test_chat.until(lambda: len(tab.sent()) == 3)
            self.pushes(test_chat.ERROR | {"nonce": tab.sent()[1]["nonce"]})
            await tab.types("x" * 2_001)
            await tab.sees(last="own waiting", log="own refused", counter="2,001")
            await self.looks_at(tab, "refused")
        await tab.resizes(1440, 900)
        await tab.clicks("Cut the line")
        await tab.evaluate("draft.select(), draft.focus()")
        await tab.says("Does anybody hear me?")
        await anna.says("Hello?")
        await tab.sees("lost", "lost", log="own waiting Does")
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

    async def test_the_layout_holds_from_360_pixels_up(self):
        """From 360 pixels up, nothing sticks out and buttons are large enough. Each message runs
        in the direction of its language."""
        tab = await self.opens()
        for text in "\n".join("x" * 100), "שלום!", "a" + "\u0301" * 500, "x" * 300:
            await self.shows(text)
        await tab.sees(last="other xxx")
        await tab.types("x" * 300)
        await tab.clicks("Wire")
        await tab.clicks("Wire")  # It stays open on a phone.
        faults = """[
            ...sights.all("html, header, #stage, #log, #diagram, .text").filter(e => (
                e.scrollWidth > e.clientWidth)),
            ...sights.all("html").filter(e => e.scrollHeight > innerHeight),
            ...sights.all("button, #draft").filter(e => (
                Math.min(e.offsetWidth, e.offsetHeight) < 44)),
        ].map(e => e.outerHTML)"""
        for width, height in (360, 640), (390, 844), (1440, 900):
            with self.subTest(width):
                await tab.resizes(width, height)
                self.assertEqual(await tab.evaluate(faults), [])
                await tab.sees(reads_the_end=True)
        direction = "sights.all('.text').map(e => getComputedStyle(e).direction)"
        self.assertEqual(await tab.evaluate(direction), ["ltr", "rtl", "ltr", "ltr"])

    async def test_arrows_join_the_lanes(self):
        """At every width arrows lead from speaker to hearer, below the names of the lanes."""
        tab, friend = await self.opens(), await self.joins()
        await tab.clicks("Wire")
        await tab.clicks("Wire")  # It stays open on a phone.
        await tab.says("mine")
        await friend.says("theirs")
        await tab.sees("^send", "^echo", "^message")
        arrows = """(lanes => sights.all("#wire .leg").slice(-6).map(leg => {
            const {left, right} = leg.getBoundingClientRect();
            const ends = [left, right].map(x => lanes.findIndex(lane => Math.abs(lane - x) < 3));
            return getComputedStyle(leg, "::after").rotate === "none" ? ends : ends.reverse();
        }))(sights.all("#lanes > *").map(e => e.getBoundingClientRect()).map(({left, right}) =>
            (left + right) / 2))"""
        for width in 360, 700, 1280, 1920:
            await tab.resizes(width, 800)
            expected = [[0, 1], [1, 0], [1, 2], [1, 0], [2, 1], [1, 2]]
            self.assertEqual(await tab.evaluate(arrows), expected)

    async def test_arrows_grow_unless_motion_is_reduced(self):
        """Arrows grow, but not if the system asks for reduced motion."""
        tab = await self.opens()
        count = "window.moves = 0, wire.onanimationstart = () => { moves += 1; }, 0"
        drawn = "requestAnimationFrame(() => requestAnimationFrame(() => done(moves > 0)))"
        for motion, moves in ("no-preference", True), ("reduce", False):
            features = [{"name": "prefers-reduced-motion", "value": motion}]
            await tab.call("Emulation.setEmulatedMedia", features=features)
            await tab.passes(1)
            await tab.evaluate(count)
            await self.shows(motion)
            await tab.sees(f"“{motion}”")
            self.assertEqual(await tab.evaluate(f"new Promise(done => {drawn})"), moves)

    async def test_the_page_is_dark_if_the_system_is(self):
        """The text is dark in a light scheme, and light in a dark one."""
        tab = await self.opens()
        text = "Number(getComputedStyle(document.body).color.match(/[\\d.]+/)[0])"
        for scheme, expected in ("light", True), ("dark", False):
            features = [{"name": "prefers-color-scheme", "value": scheme}]
            await tab.call("Emulation.setEmulatedMedia", features=features)
            self.assertEqual(await tab.evaluate(f"{text} < 128"), expected)

    async def test_a_name_has_one_colour(self):
        """A name has one colour everywhere. Neighbours' colours differ, and none is red."""
        tab, other = await self.opens(), await self.opens()
        await tab.says("mine")
        await other.sees(log=["other mine"])
        neighbours = [f"Port{number}" for number in (50_000, 50_001, 50_002, 50_010)]
        for name in neighbours:
            await self.shows("hello", username=name)
        for each in tab, other:
            await each.sees(bubbles="Port50010")
        hue = "Number(getComputedStyle(e).color.match(/[0-9.]+(?=\\))/)[0])"
        hues = f"sights.all('.name, #name, #lanes :first-child').map(e => [e.innerText, {hue}])"
        one, two = dict(await tab.evaluate(hues)), dict(await other.evaluate(hues))
        self.assertEqual([one["this tab"], two[tab.name]], [one[tab.name]] * 2)
        hues = sorted(one[name] for name in neighbours)
        self.assertGreater(min(b - a for a, b in itertools.pairwise([60, *hues, 360])), 5)

    async def test_text_on_the_wire_is_isolated(self):
        """A character that reverses text does not reverse the notes beside it."""
        tab = await self.opens()
        await self.shows("\u202eabc", username="\u202ePort1")
        await tab.clicks("Another tab")
        await tab.sees(opened="\u202eabc")
        places = """sights.all("#wire pre i").filter(sights.words).map(({firstChild}) => (
            [1, 2].map(start => {
                const range = new Range();
                range.setStart(firstChild, start);
                range.setEnd(firstChild, start + 1);
                return range.getBoundingClientRect().x;
            })))"""
        places = await tab.evaluate(places)
        self.assertGreater(len(places), 5)
        for first, second in places:
            self.assertLess(first, second)

    async def test_an_opened_row_stays_in_view(self):
        """A row opens into view, and then new rows do not move it."""
        tab = await self.opens()
        await tab.resizes(1280, 650)
        await tab.says("hello")
        await tab.sees("^echo")
        await tab.evaluate("diagram.scrollTop = -9999")
        await tab.clicks("GET /ws")
        await tab.sees(opened="Upgrade: websocket")
        place = "[diagram, sights.all('[open]')[0]].map(e => e.getBoundingClientRect().top)"
        outer, inner = await tab.evaluate(place)
        self.assertGreaterEqual(inner, outer - 1)
        await self.floods(5)
        await tab.passes(1)
        await tab.sees(*["^message"] * 5)
        self.assertAlmostEqual((await tab.evaluate(place))[1], inner, delta=1)

    async def test_a_message_lights_up_with_its_rows(self):
        """A message and its rows light up if one of them has the focus or the pointer."""
        tab = await self.opens()
        await tab.says("hello")
        await tab.sees("^send", "^echo", log=["own delivered hello"])
        lit = "sights.all('.lit').length === %d"
        await tab.evaluate("sights.all('summary').at(-1).focus()")
        await tab.waits_for(lit % 3)
        await tab.evaluate("draft.focus()")
        await tab.waits_for(lit % 0)
        place = "(({x, y}) => [x + 5, y + 5])(sights.all('.text')[0].getBoundingClientRect())"
        x, y = await tab.evaluate(place)
        await tab.call("Input.dispatchMouseEvent", type="mouseMoved", x=x, y=y)
        await tab.waits_for(lit % 3)

    async def test_rows_tell_the_time(self):
        """Each row of the wire tells the time since the one before."""
        tab = await self.opens()
        for seconds, shown in (2.3, "+2.3 s"), (0.999, "+999 ms"), (0, "+0 ms"):
            await tab.passes(seconds)
            self.pushes({"type": "typing"})
            await tab.waits_for(f"sights.words(sights.all('.when').at(-1)) === '{shown}'")


if __name__ == "__main__":
    unittest.main()
