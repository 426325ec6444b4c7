"""What mkdocs runs while it builds the site."""

from __future__ import annotations

from typing import Any

from markdown.extensions.toc import slugify


def on_config(config: Any) -> Any:
    """Anchors of headings begin with a letter: the theme looks them up as CSS selectors, which must."""
    config["mdx_configs"].setdefault("toc", {})["slugify"] = anchor
    return config


def anchor(text: str, separator: str) -> str:
    """The usual anchor, with a letter before a digit."""
    usual = slugify(text, separator)
    return f"n{usual}" if usual[:1].isdigit() else usual
