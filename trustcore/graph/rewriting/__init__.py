"""Rewriting of programs: patterns written as plain JAX functions, matched, proven and replaced."""

from trustcore.graph.rewriting.engine import Rewritten, rewrite
from trustcore.graph.rewriting.report import Applied, Refused, Rewriting
from trustcore.graph.rewriting.rule import Finder, Match, NearMiss, Rule, Static
from trustcore.graph.rewriting.terms import Graph, Node, Value, graph_of

__all__ = [
    "Applied",
    "Finder",
    "Graph",
    "Match",
    "NearMiss",
    "Node",
    "Refused",
    "Rewriting",
    "Rewritten",
    "Rule",
    "Static",
    "Value",
    "graph_of",
    "rewrite",
]
