"""Programs as data: one walker over jaxprs, and what is read off them."""

from trustcore.graph.layout import Product, View, product_of, through
from trustcore.graph.walk import aval, bind, called, inline, run

__all__ = ["Product", "View", "aval", "bind", "called", "inline", "product_of", "run", "through"]
