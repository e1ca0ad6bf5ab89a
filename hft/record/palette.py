"""Colors and markers: those of a method are the same in every picture, whatever else is in it."""

import zlib

from hft import catalog

INK, FAINT = "#1f2328", "#d0d7de"
# Told apart by color-blind readers too (after Okabe and Ito).
OWN = {"base": ("#59636e", "X"), "fft": ("#0072b2", "^"), "hft": ("#d55e00", "o")}
COLORS = ("#009e73", "#aa4499", "#b8860b", "#4b4fc4", "#117a8b", "#7a4b2a")
MARKERS, DASHES = "sDv^Pph<>", ("-", "--", ":", "-.")
TRAINED, FROZEN = OWN["hft"][0], "#cfd8dc"
# The methods that come with hft take turns.
METHODS = [*sorted({path.stem for path in catalog.METHODS.glob("*.yaml")} - OWN.keys()), "half-reset"]


def style_of(kind: str) -> tuple[str, str]:
    """Color and marker of a method; words after its name, such as a setting, change its marker alone."""
    method, _, more = kind.partition(" ")
    number = METHODS.index(method) if method in METHODS else zlib.crc32(method.encode())
    color, marker = OWN.get(method, (COLORS[number % len(COLORS)], MARKERS[number // len(COLORS) % len(MARKERS)]))
    return color, MARKERS[zlib.crc32(more.encode()) % len(MARKERS)] if more else marker
