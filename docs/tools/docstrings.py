"""griffe extensions for the API pages: public names at their public paths, Sphinx roles as links, returns as text."""

import re
import textwrap

import griffe

import pruneattn

_ROLE = re.compile(r":(?:func|class|mod):`~?([\w.]+)`")
_RETURNS = re.compile(r"^Returns:\n((?: {4}.*\n?|\n)+)", re.MULTILINE)


class PublicNames(griffe.Extension):
    """Adds public names at their public paths.

    griffe does not import modules, so it misses the names that ``pruneattn`` imports on first use. In ``pruneattn.ops``
    it finds a module instead of the function of the same name.
    """

    def on_package(self, *, pkg, **_):
        for name, module in pruneattn._PUBLIC.items():
            pkg.set_member(name, griffe.Alias(name, f"{pkg.path}.{module}.{name}"))
        ops = pkg["ops"]
        for name, module in list(ops.modules.items()):
            if name in module.members:
                ops.members[name] = griffe.Alias(name, module[name], parent=ops)  # set_member would merge the two


class Markdown(griffe.Extension):
    """Converts Sphinx roles and returns to Markdown before griffe parses a docstring."""

    def on_object(self, *, obj, **_):
        if obj.docstring:
            obj.docstring.value = _RETURNS.sub(_returns, _ROLE.sub(_link, obj.docstring.value))


def _link(found):
    """Return a link to the public ``x`` of ``:func:`x` ``, or code if the reference does not contain it."""
    name = found[1].rpartition(".")[2]
    return f"[`{name}`][pruneattn.{name}]" if name in pruneattn._PUBLIC else f"`{name}`"


def _returns(found):
    """Return the section as plain text, or as a list if it names several results.

    griffe would parse the text before the first colon as a type.
    """
    return "**Returns:**\n\n" + re.sub(r"^(?=\w+: )", "- ", textwrap.dedent(found[1]), flags=re.MULTILINE) + "\n"
