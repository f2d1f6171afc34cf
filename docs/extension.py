"""What the site needs beyond Sphinx's own: the command line, configurations and presets as they are, and formulas.

All of it is read from the library when the site is built, so that no page repeats what the code says. Formulas become
MathML, which browsers show without a script or a font from elsewhere.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import typer
from docutils import nodes
from docutils.utils.math import latex2mathml
from sphinx.addnodes import pending_xref
from sphinx.application import Sphinx
from sphinx.domains.python import PyObject
from sphinx.environment import BuildEnvironment
from sphinx.util.docstrings import prepare_docstring
from sphinx.util.docutils import SphinxDirective
from sphinx.util.nodes import make_refnode

from hgad_fast import cli, methods
from hgad_fast.models.config import Config
from hgad_fast.models.fields import fields_by_method


def plain(text: str) -> str:
    """Return text as reStructuredText that shows it as it is."""
    return re.sub(r"([\\*`_|<>:@\[\]])", r"\\\1", text)


def table(title: Sequence[str], rows: Iterable[Sequence[str]]) -> Iterator[str]:
    """Yield the lines of a table; cells are reStructuredText of one line."""
    yield from (".. list-table::", "   :header-rows: 1", "   :widths: auto", "")
    for row in (title, *rows):
        yield from (f"   {'*' if i == 0 else ' '} - {cell}" for i, cell in enumerate(row))
    yield ""


class Lines(SphinxDirective):
    """A directive whose content is reStructuredText that it writes itself."""

    has_content = False

    def run(self) -> list[nodes.Node]:
        return self.parse_text_to_nodes("\n".join(self.lines()), allow_section_headings=True)

    def lines(self) -> Iterator[str]:
        """Yield what takes the place of the directive."""
        raise NotImplementedError


class Commands(Lines):
    """Every command of `hgad-fast` in a section of its own: its usage, its help, its arguments and options."""

    def lines(self) -> Iterator[str]:
        group: Any = typer.main.get_command(cli.app)
        yield from (plain(group.epilog), "")
        for name, command in sorted(group.commands.items()):
            if command.hidden:
                continue
            title, context = f"hgad-fast {name}", command.make_context(name, [], resilient_parsing=True)
            usage = " ".join([title, *command.collect_usage_pieces(context)]).replace("{", "").replace("}", "")
            yield from (title, "-" * len(title), "", f".. program:: {title}", "")
            yield from (".. code-block:: text", "", f"   {usage}", "")
            for paragraph in re.split(r"\n\s*\n", inspect.cleandoc(command.help)):
                yield from (plain(" ".join(paragraph.split())), "")
            for parameter in command.params:
                names, meaning = parameter.get_help_record(context)
                names = re.sub(r"<list\[(\w+)\]>", r"<\1>", names)
                if parameter.param_type_name == "argument":
                    names = names.partition(" <")[0]
                yield from (f".. option:: {names}", "", f"   {plain(meaning)}", "")


class Fields(Lines):
    """The fields of a method's configuration that are its own, or of all methods, with defaults and meanings."""

    required_arguments = 1
    final_argument_whitespace = True

    def lines(self) -> Iterator[str]:
        configs = [methods.METHODS[name].config_class for name in sorted(methods.METHODS)]
        fields = dict(fields_by_method(Config, configs))[self.arguments[0]]
        rows = [(f"``{name}``", f"``{default}``", plain(meaning)) for name, default, meaning in fields]
        return table(("field", "default", "meaning"), rows)


class Presets(Lines):
    """What each preset needs and reaches."""

    def lines(self) -> Iterator[str]:
        for row in methods.describe_presets():
            yield f"``{row['preset']}`` of {row['method']}"
            yield from (f"   :{key}: {plain(value or '-')}" for key, value in list(row.items())[2:])
            yield ""


def show_formula(translator: Any, node: nodes.math | nodes.math_block) -> None:
    """Write a formula as MathML; what follows the node's text is left out."""
    is_block = isinstance(node, nodes.math_block)
    formula = latex2mathml.tex2mathml(node.astext(), as_block=is_block)
    translator.body.append(f'<div class="formula">{formula}</div>' if is_block else formula)
    raise nodes.SkipNode


def resolve_by_ending(
    app: Sphinx, environment: BuildEnvironment, node: pending_xref, content: nodes.TextElement
) -> nodes.reference | None:
    """Return a link to the one thing of the site whose full name ends as a docstring has it, such as `ScoreResult`."""
    ending = f".{node['reftarget']}"
    if node["reftype"] != "obj" or node.get("refdomain") != "py":
        return None
    places = {
        (entry.docname, entry.node_id)
        for name, entry in environment.domains.python_domain.objects.items()
        if name.endswith(ending) and ("." in ending[1:] or entry.objtype in ("class", "exception", "function"))
    }
    if len(places) != 1:
        return None
    ((document, place),) = places
    return make_refnode(app.builder, node["refdoc"], document, place, content)


def show_dashes(app: Sphinx, document: nodes.document) -> None:
    """Put a dash between a parameter and its meaning: Sphinx writes two hyphens, as options begin."""
    for text in document.findall(lambda node: isinstance(node, nodes.Text) and node == " -- "):
        text.parent.replace(text, nodes.Text(" \N{EN DASH} "))


def shorten_signature(
    app: Sphinx, what: str, name: str, obj: Any, options: Any, signature: str | None, returns: str | None
) -> tuple[str | None, str | None]:
    """Leave out of a signature the fields of a configuration, which a table tells, and defaults that show nothing."""
    if what == "class" and isinstance(obj, type) and issubclass(obj, Config):
        return "(**fields)", returns
    return signature and re.sub(r"= <[^<>]*>", "= ...", signature), returns


def keep_properties(app: Sphinx, what: str, name: str, obj: Any, options: Any, lines: list[str]) -> None:
    """Show the docstring of a property as it is: Napoleon takes what stands before a colon in it for a type."""
    if what == "property" and obj.__doc__:
        lines[:] = prepare_docstring(obj.__doc__)


def leave_out_aliases(app: Sphinx, what: str, name: str, obj: Any, skip: bool, options: Any) -> bool | None:
    """Leave out the fields of named tuples, of which Python says nothing but their number."""
    return True if (getattr(obj, "__doc__", None) or "").startswith("Alias for field number") else None


def setup(app: Sphinx) -> dict[str, Any]:
    """Register all of it with Sphinx."""
    for field in PyObject.doc_field_types:
        if field.name == "variable":
            field.label = "Attributes"
    app.add_directive("commands", Commands)
    app.add_directive("fields", Fields)
    app.add_directive("presets", Presets)
    app.add_html_math_renderer("mathml", (show_formula, None), (show_formula, None))
    app.connect("missing-reference", resolve_by_ending)
    app.connect("doctree-read", show_dashes)
    app.connect("autodoc-skip-member", leave_out_aliases)
    app.connect("autodoc-process-docstring", keep_properties, priority=600)  # after Napoleon's 500
    app.connect("autodoc-process-signature", shorten_signature)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
