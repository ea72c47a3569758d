"""The outlines of every product that can be drawn, in a small drawing language.

An outline is written in picture pixels with (0, 0) in the middle of the picture, x to the right
and y downwards. Points are joined by a smooth curve; one that ends in `!` is a corner. Each part
of a shape is painted over the ones before it:

    VERB PAINT [OPTION=VALUE ...] X,Y X,Y ...

Verbs: `full` closes the outline, `half` closes it with its mirror image, `pair` draws it twice
mirrored, `line` and `lines` (mirrored too) stroke it, `dot` puts a disc on every point.
Options: `d` depth of the rounding in pixels, `w` stroke width, `r` disc radius, `s` how much the
pattern slopes away from the middle, `tube=1` for the light on a cylinder.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import lru_cache

import numpy as np

CURVE_STEPS = 7  # straight pieces per curve between two points: under a pixel off at our sizes

_SLEEVES = """
pair cloth s=.35 d=9 46,-90! 66,-80 82,-30 96,58! 74,66! 62,8 50,-40!
"""
SHAPES: dict[str, str] = {
    "t-shirt": """
        half inside d=4 0,-94 26,-98! 14,-74 0,-66
        pair cloth s=.5 d=9 48,-90! 72,-76 104,-26! 74,-6! 54,-38!
        half cloth d=12 0,-68 18,-76 30,-98! 58,-84! 57,-40 58,40 61,102! 30,107 0,108
        line rib w=6 -28,-96 -17,-75 0,-67 17,-75 28,-96
        lines seam w=1 101,-31 71,-11
        line seam w=1 -60,97 -30,102 0,103 30,102 60,97
        lines seam w=1 57,-84 53,-60 56,-38
    """,
    "shirt": _SLEEVES
    + """
        pair plain d=5 73,54! 96,47! 99,68! 76,75!
        half inside d=4 0,-104 20,-104! 12,-80 0,-70
        half cloth d=11 0,-74 22,-100! 56,-88! 55,-36 54,40 60,92! 36,104 0,112
        full plain d=3 -6,-76! 6,-76! 6,111! -6,111!
        pair plain d=4 0,-72! 18,-106! 32,-100 26,-62!
        dot white r=2.6 0,-58 0,-30 0,-2 0,26 0,54 0,82
        full cloth d=3 18,-46! 44,-46! 44,-20! 31,-12! 18,-20!
        lines seam w=1 55,-84 52,-60 55,-36
        dot white r=2.2 -86,62 86,62
    """,
    "dress": """
        half inside d=4 0,-104 24,-124! 14,-96 0,-88
        half cloth d=10 0,-88 14,-98 24,-126! 38,-122! 38,-96 46,-78! 38,-50 31,-26! 0,-24
        half cloth s=-.15 d=14 0,-28 31,-26! 46,20 64,76 82,118! 50,129 0,133
        half deep d=4 0,-32 32,-32! 33,-20! 0,-19
        lines crease w=2.5 10,-16 16,50 20,120
        lines crease w=2.5 24,-14 40,50 56,116
    """,
    "skirt": """
        half cloth s=-.12 d=14 0,-78 40,-80! 58,-20 72,40 86,92! 46,106 0,110
        half deep d=5 0,-94 40,-96! 42,-76! 0,-73
        lines crease w=3 8,-70 12,10 16,102
        lines crease w=3 22,-70 36,10 46,100
        lines crease w=3 33,-70 56,10 72,92
        dot metal r=3.5 0,-84
    """,
    "trousers": """
        half cloth d=11 0,-112 42,-116! 54,-60 54,10 44,132! 14,134! 10,30 3,-34!
        half plain d=4 0,-126 41,-128! 44,-110! 0,-108
        lines seam w=1.5 30,-109 38,-94 51,-84
        line seam w=1.5 1,-108 1,-34
        line seam w=1.2 10,-108 10,-66 2,-54
        lines crease w=2 30,-56 31,30 29,130
        lines plain w=4 26,-128 26,-107
        dot metal r=3.2 1,-118
        lines crease w=2 4,-32 20,-40
    """,
    "jacket": """
        pair cloth s=.35 d=12 46,-92! 74,-82 92,-30 104,60! 78,70! 66,8 52,-40!
        pair rib d=5 76,58! 104,50! 105,72! 80,80!
        half inside d=5 0,-108 22,-112! 14,-88 0,-74
        half cloth d=14 0,-84 24,-104! 60,-92! 62,-40 62,88! 0,92
        half rib d=5 0,86 62,82! 60,106! 0,110
        pair rib d=5 1,-70! 2,-92 16,-116! 32,-106! 22,-84
        lines seam w=1 6,-72 6,106
        line zipper w=4 0,-76 0,108
        pair plain d=4 16,-42! 48,-44! 48,-32 32,-25 16,-30!
        dot metal r=2.4 -32,-31 32,-31
        lines crease w=3 28,34 44,66
        lines seam w=1.4 27,34 43,66
        full metal d=1 -2,-78! 2,-78! 3,-62! -3,-62!
    """,
    "hoodie": """
        half cloth d=9 0,-128 26,-122 42,-96 30,-78! 0,-70
        half inside d=7 0,-116 20,-108 25,-90 14,-74 0,-66
        pair cloth s=.35 d=11 46,-90! 70,-82 88,-30 102,60! 76,68! 64,8 52,-40!
        pair rib d=5 75,58! 102,50! 103,72! 79,79!
        half cloth d=13 0,-64 18,-72 34,-92! 58,-86! 59,-40 60,88! 0,92
        half rib d=5 0,86 60,83! 58,106! 0,109
        line seam w=2 -34,-90 -18,-72 0,-64 18,-72 34,-90
        half cloth d=5 0,22 24,22! 42,62! 42,82! 0,82
        lines white w=2.6 11,-70 13,-40 11,-14
        dot metal r=2 -11,-69 11,-69
        dot white r=2.4 -11,-13 11,-13
        lines seam w=1.2 57,-86 53,-62 58,-38
    """,
    "sweater": _SLEEVES
    + """
        pair rib d=5 72,50! 96,43! 99,70! 77,77!
        half inside d=4 0,-98 22,-102! 12,-82 0,-76
        half cloth d=13 0,-76 16,-84 26,-102! 58,-88! 57,-40 59,88! 0,92
        half rib d=5 0,84 59,81! 56,106! 0,109
        line rib w=9 -24,-100 -15,-82 0,-75 15,-82 24,-100
        lines seam w=1.2 56,-86 51,-62 56,-38
    """,
    "cap": """
        full inside d=6 -74,34! 0,24 62,30! 0,52
        full cloth d=16 -76,40! -78,-10 -52,-52 -8,-66 36,-52 60,-14 64,34! 0,44 -40,48
        full plain d=7 8,42! 44,26 64,26! 96,34 116,58 104,64 70,54 38,56!
        line seam w=1.2 26,52 60,42 108,62
        line crease w=2 -8,-65 8,-30 12,42
        line crease w=2 -8,-65 -44,-20 -50,46
        dot plain r=5 -8,-66
        dot seam r=2 28,-30 -22,-32 -56,-16
    """,
    "scarf": """
        full cloth s=.1 d=9 8,-20! 40,-26! 54,50 50,112! 14,112! 12,40
        full cloth s=-.1 d=9 -34,-20! 4,-18! 2,50 -8,128! -46,126! -42,50
        lines fringe w=2 16,110 17,124
        line fringe w=2 -45,124 -46,140
        line fringe w=2 -35,126 -36,142
        line fringe w=2 -26,126 -27,142
        line fringe w=2 -16,127 -17,142
        line fringe w=2 -9,127 -9,141
        line fringe w=2 26,110 27,126
        line fringe w=2 37,110 38,126
        line fringe w=2 48,110 48,125
        half inside d=9 0,-118 40,-104 56,-66 0,-20
        full cloth d=12 -68,-66 -54,-104! -34,-90 -8,-66 30,-62 52,-84! 70,-66 62,-28 24,-6
            -24,-6 -58,-26
        full cloth s=.3 d=9 -54,-104! -20,-128 22,-128 52,-84! 44,-82 20,-104 -16,-106 -42,-86!
        line crease w=3 -60,-52 -20,-30 30,-34 62,-56
        line crease w=3 -52,-80 -20,-50 24,-48 58,-70
    """,
    "socks": """
        full cloth d=11 -8,-112! 36,-112! 36,-20 44,20 78,50 84,74 66,88 30,78 -4,48 -10,0!
        full rib d=5 -10,-118! 38,-118! 38,-94! -10,-94!
        full cloth d=11 -60,-88! -14,-88! -14,10 -4,48 32,76 38,102 18,118 -24,108 -60,74 -64,30!
        full deep d=6 -63,44 -44,48 -34,68 -44,92! -60,74
        full deep d=6 14,66 32,76 38,102 18,118! 2,98
        full rib d=5 -62,-96! -12,-96! -12,-70! -62,-70!
        line crease w=2.5 -36,40 -14,58 -2,60
    """,
    "sneaker": """
        full inside d=5 -72,-44! -40,-54 -14,-50! -20,-30 -64,-30!
        full cloth d=12 -84,-50! -74,-46 -58,-34 -34,-36 -18,-54! 4,-36 34,-10 78,2 98,22
            100,42! -86,42! -90,0
        full deep d=6 -86,-50! -74,-46 -66,-10 -64,40! -88,40! -92,0
        full plain d=7 56,-4! 82,4 98,22 100,42! 48,42! 46,16
        full plain d=4 -18,-62! -6,-60 40,-8! 36,4! 20,2 -28,-36!
        full white d=7 -92,36! 0,40 60,38 104,34! 108,52 98,60! -84,60! -94,52
        line seam w=1.5 -92,50 106,50
        line white w=4 -30,-26 -6,-46
        line white w=4 -17,-15 6,-34
        line white w=4 -4,-5 18,-22
        line white w=4 9,4 29,-11
        line accent w=5 -66,4 -40,14 -10,10 14,26 40,30
    """,
    "boot": """
        full inside d=5 -50,-106! -16,-114 26,-106! -14,-96
        full cloth d=14 -52,-106! -14,-97 27,-106! 23,-50 27,-6 50,20 82,38 92,62! 90,80!
            -54,80! -60,20 -55,-40
        full elastic d=4 -22,-96! 6,-97! 4,-50 -6,-22 -15,-50
        line seam w=1.5 -14,-22 -22,20 -30,78
        line seam w=1.5 4,-20 24,14 58,28
        full rib d=6 -60,30 -40,36 -34,60 -34,80! -55,80! -59,60
        full dark d=4 -58,76! 20,81 94,73! 94,88! 2,91! -4,104! -58,104!
        full cloth d=3 -44,-120! -33,-120! -33,-90! -44,-90!
        full shine d=8 44,32 66,43 78,54 60,48
        full shine d=8 -44,-70 -36,-40 -36,0 -46,-10
    """,
    "handbag": """
        line deep w=8 -46,-18 -44,-78 -22,-108 22,-108 44,-78 46,-18
        full cloth d=16 -74,-34! 74,-34! 84,30 90,84! 60,92 -60,92 -90,84! -84,30
        full cloth d=6 -75,-38! 75,-38! 76,0 30,26 0,32 -30,26 -76,0
        line seam w=1.3 -72,-2 -30,21 0,27 30,21 72,-2
        pair plain d=3 40,-40! 52,-40! 54,2 46,8 38,2
        full metal d=3 -13,20! 13,20! 13,42! -13,42!
        full dark d=1 -4,28! 4,28! 4,35! -4,35!
        lines metal w=3 40,-6 52,-6
        full shine d=8 -70,64 0,56 66,64 0,74
    """,
    "backpack": """
        line deep w=7 -20,-112 -16,-134 16,-134 20,-112
        pair deep d=7 58,-60! 84,-40 88,60 70,92! 60,20
        half cloth d=18 0,-122 44,-116 66,-76 70,20 70,92 46,110 0,112
        line zipper w=3.5 -58,-10 -54,-74 -34,-98 0,-102 34,-98 54,-74 58,-10
        full metal d=1 56,-12! 60,-12! 61,4! 55,4!
        half cloth d=9 0,8 40,10 52,26 52,88 40,100 0,102
        line zipper w=3 -44,32 0,28 44,32
        full metal d=1 28,30! 32,30! 33,44! 27,44!
        full leather d=3 -16,-72! 16,-72! 16,-46! -16,-46!
        lines seam w=1 50,28 50,90
    """,
    "watch": """
        full cloth d=6 -24,-40! -20,-118 -14,-130 0,-133 14,-130 20,-118 24,-40!
        full cloth d=6 -24,40! -20,108 -12,124 0,130 12,124 20,108 24,40!
        full metal d=3 -25,-122! 25,-122! 25,-110! -25,-110!
        full cloth d=3 -17,-119! 17,-119! 17,-113! -17,-113!
        dot dark r=2.4 0,74 0,88 0,102
        lines seam w=1 20,-104 22,-56
        lines seam w=1 22,56 18,112
        full metal d=3 48,-7! 58,-7! 58,7! 48,7!
        dot metal r=51 0,0
        dot dark r=43 0,0
        dot face r=41 0,0
        dot ink r=2 0,-34 17,-29 29,-17 34,0 29,17 17,29 0,34 -17,29 -29,17 -34,0 -29,-17 -17,-29
        line ink w=3.6 2,2 -17,-12
        line ink w=2.6 -2,3 14,-27
        line accent w=1.4 -2,-6 8,26
        dot metal r=3.4 0,0
        full shine d=6 -34,-10 -14,-36 6,-38 -22,8
    """,
    "sunglasses": """
        lines deep w=7 99,-22 95,-60 88,-88 76,-104
        lines rib w=8 92,-76 86,-92 75,-105
        pair cloth d=6 9,-22! 40,-40 84,-40 107,-33! 105,-4 93,38 58,48 26,40 12,10
        pair glass d=5 21,-13! 44,-28 78,-28 92,-23! 92,2 82,28 57,36 34,29 23,9
        full cloth d=4 -15,-24! 0,-28 15,-24! 12,-10! 0,-16 -12,-10!
        pair sheen d=6 34,-18 56,-22 42,16 31,8
        dot metal r=2 -99,-27 99,-27
    """,
    "mug": """
        line deep w=17 46,-44 76,-46 95,-22 92,8 74,32 46,44
        line cloth w=12 46,-44 76,-46 95,-22 92,8 74,32 46,44
        full cloth tube=1 d=7 -62,-72! 0,-58 62,-72! 61,0 57,66 38,82 0,86 -38,82 -57,66 -61,0
        full white d=4 -63,-72 -40,-83 0,-87 40,-83 63,-72 40,-61 0,-57 -40,-61
        full cup d=7 -56,-72 -36,-80 0,-83 36,-80 56,-72 36,-65 0,-62 -36,-65
        full shine d=10 -48,-42 -38,-40 -36,50 -44,44
    """,
    "umbrella": """
        line wood w=6 0,10 0,100 4,120 20,126 34,116 34,102
        line metal w=3 0,-104 0,-92
        full inside d=5 -100,6! -76,-6 -52,12! -26,2 0,14! 26,2 52,12! 76,-6 100,6! 0,-30
        full cloth d=14 0,-94! 58,-80 96,-30 106,10! 84,-8 56,8! 30,-8 0,10! -30,-8 -56,8!
            -84,-8 -106,10! -96,-30 -58,-80
        line crease w=2.4 0,-92 -36,-60 -56,6
        line crease w=2.4 0,-92 36,-60 56,6
        line crease w=2.4 0,-92 0,8
        dot metal r=2.4 -106,10 -56,9 0,11 56,9 106,10
        dot dark r=3 0,-94
    """,
    "lamp": """
        dot glow r=66 0,-20
        full metal tube=1 d=3 -5,0! 5,0! 5,110! -5,110!
        full base tube=1 d=7 -10,30! 10,30! 20,50 34,76 22,100 10,110! -10,110! -22,100 -34,76
            -20,50
        full wood d=4 -38,112 -20,106 20,106 38,112 38,120 20,125 -20,125 -38,120
        full cloth tube=1 d=6 -42,-120! 0,-116 42,-120! 78,18! 40,27 0,29 -40,27 -78,18!
        line deep w=4 -42,-119 0,-115 42,-119
        line deep w=5 -77,16 -40,25 0,27 40,25 77,16
        full warm d=12 -60,0 -30,-66 30,-66 60,0 30,14 -30,14
    """,
    "cushion": """
        full deep d=10 -96,-92! -40,-84 40,-84 96,-92! 88,-40 88,44 96,94! 40,88 -40,88
            -96,94! -88,44 -88,-40
        full cloth d=26 -93,-89! -40,-81 40,-81 93,-89! 85,-40 85,44 93,91! 40,85 -40,85
            -93,91! -85,44 -85,-40
        lines crease w=4 90,-86 62,-58
        lines crease w=4 90,88 62,60
        lines crease w=4 80,-30 58,-22
        lines crease w=3 34,82 30,62
    """,
    "chair": """
        pair wood tube=1 d=3 56,70! 72,70! 76,132! 68,132!
        pair darkwood d=3 30,70! 42,70! 44,124! 38,124!
        half cloth d=16 0,-116 50,-112 64,-80 62,20! 0,24
        lines crease w=3 24,-104 26,10
        dot seam r=3 -30,-60 30,-60 0,-60 -16,-28 16,-28
        half cloth d=10 0,10 54,10! 60,30 56,50! 0,52
        half deep d=7 0,46 58,46! 60,74! 0,78
        pair cloth d=9 54,-26! 66,-36 84,-32 88,-10 86,70 80,80! 58,80!
        pair plain d=6 58,-20 66,-34 82,-32 88,-16 78,-8 64,-8
    """,
}
STANDING = {"sneaker", "boot", "handbag", "backpack", "mug", "lamp", "chair", "cap"}
TURNABLE = {"cap", "sneaker", "boot", "mug", "socks", "scarf", "umbrella"}
KNITTED = {"sweater", "scarf", "socks"}
RIGID = {"mug", "watch", "sunglasses", "lamp", "boot", "sneaker", "handbag"}


@dataclass(frozen=True)
class Part:
    """One painted part: its paint, its options and its loops of points, (N, 2) picture pixels."""

    verb: str
    paint: str
    options: dict[str, float] = field(hash=False)
    loops: tuple[np.ndarray, ...] = field(hash=False)

    @property
    def stroke(self) -> float:
        """Width of the stroke in picture pixels, 0 for a filled part."""
        return self.options.get("w", 2.0) if self.verb in ("line", "lines") else 0.0


@lru_cache
def shape(kind: str) -> tuple[Part, ...]:
    """The parts of one kind of product, in painting order."""
    parts: list[list[str]] = []
    for token in SHAPES[kind].split():
        if token in ("full", "half", "pair", "line", "lines", "dot"):
            parts.append([])
        parts[-1].append(token)
    return tuple(_part(tokens) for tokens in parts)


def _part(tokens: list[str]) -> Part:
    """Read one part of the drawing language."""
    verb, paint, *rest = tokens
    options = {k: float(v) for k, v in (t.split("=") for t in rest if "=" in t)}
    marks = [t for t in rest if "," in t]
    points = np.array([[float(n) for n in m.rstrip("!").split(",")] for m in marks])
    corners = np.array([m.endswith("!") for m in marks])
    flip = np.array([-1.0, 1.0])
    if verb == "dot":
        loops = [centre + options["r"] * _CIRCLE for centre in points]
    elif verb in ("line", "lines"):
        corners[[0, -1]] = True
        loops = [_curve(points, corners)[: -CURVE_STEPS + 1]]
    elif verb == "half":
        back = [i for i in range(len(points) - 1, -1, -1) if points[i, 0] != 0]
        points = np.concatenate([points, points[back] * flip])
        loops = [_curve(points, np.concatenate([corners, corners[back]]))]
    else:
        loops = [_curve(points, corners)]
    if verb in ("pair", "lines"):
        loops += [loop * flip for loop in loops]
    return Part(verb, paint, options, tuple(loops))


def _curve(points: np.ndarray, corners: np.ndarray) -> np.ndarray:
    """A closed curve through points (N, 2), smooth except at the corners (N,) bool."""
    after = np.roll(points, -1, axis=0)
    before = np.where(corners[:, None], points, np.roll(points, 1, axis=0))
    beyond = np.where(np.roll(corners, -1)[:, None], after, np.roll(points, -2, axis=0))
    t = np.linspace(0, 1, CURVE_STEPS, endpoint=False)[None, :, None]
    leave, arrive = (after - before)[:, None] / 2, (beyond - points)[:, None] / 2
    start, end = points[:, None], after[:, None]
    curve = (
        start * (2 * t**3 - 3 * t**2 + 1)
        + leave * (t**3 - 2 * t**2 + t)
        + end * (3 * t**2 - 2 * t**3)
        + arrive * (t**3 - t**2)
    )
    return curve.reshape(-1, 2)


_ANGLES = np.linspace(0, 2 * np.pi, 40, endpoint=False)
_CIRCLE = np.stack([np.cos(_ANGLES), np.sin(_ANGLES)], axis=1)
