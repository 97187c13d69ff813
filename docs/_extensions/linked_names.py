"""Names in the text lead to their reference: ``Kronecker``, ``osc.build("mbf", model)``, ``kfac``, ``digits-vae``."""

import re
from typing import Any

import osculate as osc
from docutils import nodes
from osculate.experiments.problems import PROBLEMS
from osculate.framework.whole_model.method import whole_methods

NAME = re.compile(r"(?:osc(?:ulate)?\.)?([A-Za-z_][\w.]*)(?:\(.*\))?", re.DOTALL)


def link(app: Any, doctree: nodes.document, docname: str) -> None:
    """Wrap every literal that is a public name, a method or a problem."""
    objects = app.env.get_domain("py").objects
    methods = {*osc.registry.methods(), *whole_methods()}
    for literal in list(doctree.findall(nodes.literal)):
        if _inside(literal, (nodes.reference, nodes.title)):
            continue
        text = literal.astext()
        target = None
        if text in methods:
            target = ("methods", text)
        elif text in PROBLEMS:
            target = ("problems", "")
        elif match := NAME.fullmatch(text):
            name = re.sub(r"^registry\.", "framework.methods.registry.", match[1])
            entry = objects.get(f"osculate.{name}") or objects.get(f"osculate.curvature.declarations.{name}")
            target = (entry.docname, entry.node_id) if entry else None
        if target is None or (docname == target[0] and (not target[1] or _below(literal, target[1]))):
            continue
        uri = app.builder.get_relative_uri(docname, target[0]) + (f"#{target[1]}" if target[1] else "")
        reference = nodes.reference("", "", internal=True, refuri=uri, classes=["name"])
        literal.replace_self(reference)
        reference += literal


def _below(node: nodes.Node, identifier: str) -> bool:
    """Whether a node lies in the section or the entry of that name."""
    while node is not None:
        if identifier in getattr(node, "attributes", {}).get("ids", ()):
            return True
        if any(identifier in child.get("ids", ()) for child in getattr(node, "children", ()) if _is_signature(child)):
            return True
        node = node.parent
    return False


def _is_signature(node: nodes.Node) -> bool:
    """Whether a node is the line that an entry of the reference begins with."""
    return node.__class__.__name__ == "desc_signature"


def _inside(node: nodes.Node, kinds: tuple[type[nodes.Node], ...]) -> bool:
    """Whether a node lies in one of these."""
    while node is not None:
        if isinstance(node, kinds):
            return True
        node = node.parent
    return False


def setup(app: Any) -> dict[str, bool]:
    """Once references are resolved."""
    app.connect("doctree-resolved", link)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
