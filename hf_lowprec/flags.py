# SPDX-License-Identifier: Apache-2.0
"""Switches that arguments or environment variables turn on or off."""

from __future__ import annotations

import os


def read_switch(name: str, default: bool) -> bool:
    """An environment variable that switches. Raises ValueError for anything but 0, 1, or nothing."""
    text = os.environ.get(name, "").strip()
    if text not in ("", "0", "1"):
        raise ValueError(f"{name}={text!r}: 0 or 1")
    return default if not text else text == "1"


def read_automatic(name: str) -> bool | None:
    """An environment variable that switches, or leaves it to what is found: None, for nothing and for `auto`. Raises
    ValueError for anything but 0, 1 and these."""
    text = os.environ.get(name, "").strip()
    if text not in ("", "0", "1", "auto"):
        raise ValueError(f"{name}={text!r}: 0, 1 or auto")
    return text == "1" if text in ("0", "1") else None


def check_switch(name: str, value: object) -> None:
    """Raises TypeError unless `value` is True, False or None."""
    if value is not None and not isinstance(value, bool):
        raise TypeError(f"{name}={value!r}: True, False or None")
