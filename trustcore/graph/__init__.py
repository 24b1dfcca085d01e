"""Programs as data: one walker over jaxprs, an address for every equation, and what is read off them."""

from trustcore.graph.layout import Product, View, product_of, through
from trustcore.graph.modules import Traced, module_scopes, trace
from trustcore.graph.observe import Probe, Tap, observe
from trustcore.graph.program import Address, Node, Origin, Program, Scope, origins
from trustcore.graph.rewriting import Rewriting, Rewritten, Rule, Static, rewrite
from trustcore.graph.rewriting.optimize import kernel_rules, optimize
from trustcore.graph.symbolic import Shapes, shapes
from trustcore.graph.walk import aval, bind, bodies, called, inline, run

__all__ = [
    "Address",
    "Node",
    "Origin",
    "Probe",
    "Product",
    "Program",
    "Rewriting",
    "Rewritten",
    "Rule",
    "Scope",
    "Shapes",
    "Static",
    "Tap",
    "Traced",
    "View",
    "aval",
    "bind",
    "bodies",
    "called",
    "inline",
    "kernel_rules",
    "module_scopes",
    "observe",
    "optimize",
    "origins",
    "product_of",
    "rewrite",
    "run",
    "shapes",
    "through",
    "trace",
]
