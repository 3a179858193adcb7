"""Text that every program can read, and quantities as people say them."""

from typing import Any

BIDI = {0x061C, 0x200E, 0x200F, *range(0x202A, 0x202F), *range(0x2066, 0x206A)}  # what Unicode calls Bidi_Control


def well_formed(text: str) -> str:
    """`text` with surrogate pairs joined and lone surrogates, which UTF-8 cannot hold, replaced by U+FFFD: Python has
    them for bytes of a command line or a file name that are no text."""
    return text if text.isascii() else text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")


def printable(text: str) -> str:
    """`text` with everything that could drive a terminal made visible: control characters, bidirectional controls,
    lone surrogates."""
    return "".join(char if char in "\n\t" or char.isprintable() or char == " " else escaped(char) for char in text)


def escaped(char: str) -> str:
    """A character as itself where it is harmless (joiners, spaces of other scripts), else as a visible escape."""
    code = ord(char)
    harmful = code < 0x20 or 0x7F <= code < 0xA0 or code in BIDI or 0xD800 <= code < 0xE000 or code in (0x2028, 0x2029)
    if not harmful:
        return char
    return f"\\x{code:02x}" if code < 0x100 else f"\\u{code:04x}"


def listed(value: Any) -> Any:
    """A list as people write it, its values one after the other; anything else as it is."""
    return ", ".join(map(str, value)) if isinstance(value, list) else value


def duration(seconds: float) -> str:
    """Seconds as people say them: 42 s, 3 min 20 s, 2 h 5 min, 3 d 4 h."""
    seconds = round(seconds)
    for big, small, size, unit in (("d", "h", 86400, 3600), ("h", "min", 3600, 60), ("min", "s", 60, 1)):
        if seconds >= size:
            rest = seconds % size // unit
            return f"{seconds // size} {big}" + (f" {rest} {small}" if rest else "")
    return f"{seconds} s"


def size(n_bytes: float | None) -> str:
    """Bytes in the unit that reads best: 512 B, 2.0 KiB, 30.0 MiB, 7.25 GiB."""
    if n_bytes is None:
        return "–"
    for unit, scale in (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)):
        if n_bytes >= scale:
            return f"{n_bytes / scale:.2f} {unit}" if unit == "GiB" else f"{n_bytes / scale:.1f} {unit}"
    return f"{n_bytes:.0f} B"
