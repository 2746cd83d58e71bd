"""The results of protocols side by side, as a page."""

import html
import json
from pathlib import Path


def write(results, path):
    """Write results, each the content of a results.json, as an HTML file."""
    text = html.escape(json.dumps(results, indent=2))
    Path(path).write_text(f"<!DOCTYPE html><pre>{text}</pre>\n", encoding="utf-8")
