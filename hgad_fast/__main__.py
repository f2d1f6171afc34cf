"""`python -m hgad_fast` is `hgad-fast`."""

from .cli import app

app(prog_name="hgad-fast")
