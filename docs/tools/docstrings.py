"""What the API pages show of docstrings: public names where users find them, Sphinx roles as links, returns as text."""

import re
import textwrap

import griffe

import pruneattn

_ROLE = re.compile(r":(?:func|class|mod):`~?([\w.]+)`")
_RETURNS = re.compile(r"^Returns:\n((?: {4}.*\n?|\n)+)", re.MULTILINE)


class PublicNames(griffe.Extension):
    """Puts functions where users find them: griffe imports nothing, so it misses what ``pruneattn`` imports on first
    use, and sees a module where ``pruneattn.ops`` has the function of the same name.
    """

    def on_package(self, *, pkg, **_):
        for name, module in pruneattn._PUBLIC.items():
            pkg.set_member(name, griffe.Alias(name, f"{pkg.path}.{module}.{name}"))
        ops = pkg["ops"]
        for name, module in list(ops.modules.items()):
            if name in module.members:
                ops.members[name] = griffe.Alias(name, module[name], parent=ops)  # set_member would merge them


class Markdown(griffe.Extension):
    """Rewrites what Markdown does not know, before griffe takes the docstring apart."""

    def on_object(self, *, obj, **_):
        if obj.docstring:
            obj.docstring.value = _RETURNS.sub(_returns, _ROLE.sub(_link, obj.docstring.value))


def _link(found):
    """The public ``x`` of ``:func:`x` ``, or code where it has no place in the reference."""
    name = found[1].rpartition(".")[2]
    return f"[`{name}`][pruneattn.{name}]" if name in pruneattn._PUBLIC else f"`{name}`"


def _returns(found):
    """Text, which griffe would take for a type up to its first colon; several named results become a list."""
    return "**Returns:**\n\n" + re.sub(r"^(?=\w+: )", "- ", textwrap.dedent(found[1]), flags=re.MULTILINE) + "\n"
