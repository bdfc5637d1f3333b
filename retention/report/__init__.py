"""One study, or two side by side, as a single HTML file that opens offline. Reads the store and statistics alone.

Needs the extra `report` (altair, vl-convert-python, jinja2).
"""

from retention.report._page import write

__all__ = ["write"]
