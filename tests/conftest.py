"""Settings of all tests."""

from __future__ import annotations

import os

from hypothesis import settings

# CI judges a change, not the luck of a draw: there the same examples are drawn each time. Elsewhere new ones are.
settings.register_profile("ci", derandomize=True)
if os.environ.get("CI"):
    settings.load_profile("ci")
